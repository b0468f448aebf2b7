"""Which checkpoint is meant, what one holds, and the model card."""

import ast
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from helpers import UNET_CONFIG, same_tensors
from huggingface_hub import ModelCard
from PIL import Image

import distill_training as dt


def make_folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "trainer_state.json").write_text("{}")


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    """Three checkpoints among what else may lie there."""
    folder = tmp_path / "output"
    make_folders(folder, "checkpoint-10", "checkpoint-2", "checkpoint-100")
    make_folders(folder, "checkpoint-best", "checkpoint-3.bak", "my-checkpoint-7", ".checkpoint-400.partial", "logs")
    make_folders(folder, "checkpoint-", "checkpoint--5", "nested/checkpoint-500")
    (folder / "checkpoint-300").write_text("a file")
    return folder


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_list_is_in_numeric_order_without_strangers(output_dir: Path) -> None:
    assert dt.list_checkpoints(output_dir) == [output_dir / f"checkpoint-{step}" for step in (2, 10, 100)]
    assert dt.list_checkpoints(str(output_dir)) == dt.list_checkpoints(output_dir)


def test_list_of_nothing(tmp_path: Path) -> None:
    assert dt.list_checkpoints(tmp_path) == []
    assert dt.list_checkpoints(tmp_path / "absent") == []


def test_find(output_dir: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    make_folders(elsewhere, "checkpoint-7")
    assert dt.find_checkpoint(output_dir, None) is None
    assert dt.find_checkpoint(output_dir, "latest") == output_dir / "checkpoint-100"
    assert dt.find_checkpoint(output_dir, "checkpoint-2") == output_dir / "checkpoint-2"
    assert dt.find_checkpoint(output_dir, str(output_dir / "checkpoint-10")) == output_dir / "checkpoint-10"
    assert dt.find_checkpoint(output_dir, str(elsewhere / "checkpoint-7")) == elsewhere / "checkpoint-7"


def test_path_is_taken_relative_to_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folders(tmp_path, "other/checkpoint-7")
    monkeypatch.chdir(tmp_path)
    found = dt.find_checkpoint(tmp_path / "output", "other/checkpoint-7")
    assert found is not None and found.resolve() == tmp_path / "other" / "checkpoint-7"


def test_latest_of_nothing_starts_fresh(tmp_path: Path) -> None:
    assert dt.find_checkpoint(tmp_path, "latest") is None
    assert dt.find_checkpoint(tmp_path / "absent", "latest") is None


def test_absent_checkpoint_lists_those_there(output_dir: Path, tmp_path: Path) -> None:
    for absent in ("checkpoint-3", "checkpoint-300", "/absent/checkpoint-2"):
        with pytest.raises(FileNotFoundError) as missing:
            dt.find_checkpoint(output_dir, absent)
        sentence = str(missing.value)
        assert sentence.startswith(f"--resume_from_checkpoint {absent} does not exist")
        assert sentence.endswith(f"{output_dir} are: checkpoint-2, checkpoint-10, checkpoint-100.")
    with pytest.raises(FileNotFoundError, match="are: none"):
        dt.find_checkpoint(tmp_path / "absent", "checkpoint-2")


@pytest.mark.parametrize("name", ["", ".", "logs"])
def test_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    """An empty name (an unset variable of the shell, say) must not be taken for the output folder."""
    make_folders(tmp_path, "checkpoint-2")
    (tmp_path / "logs").mkdir()
    with pytest.raises(FileNotFoundError, match="checkpoint-2"):
        dt.find_checkpoint(tmp_path, name)


def test_prune_keeps_the_newest_and_all_strangers(output_dir: Path) -> None:
    before = {path.name for path in output_dir.iterdir()}
    assert dt.prune_checkpoints(output_dir, 5) == dt.prune_checkpoints(output_dir, 3) == []
    assert {path.name for path in output_dir.iterdir()} == before
    assert names(dt.prune_checkpoints(output_dir, 1)) == ["checkpoint-2", "checkpoint-10"]
    assert {path.name for path in output_dir.iterdir()} == before - {"checkpoint-2", "checkpoint-10"}
    assert dt.prune_checkpoints(output_dir / "absent", 1) == []


# ----------------------------------------------------------------------------------------------------------------
# What a checkpoint holds.


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def toy_student(seed: int) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return dt.build_student(UNet2DConditionModel(**UNET_CONFIG), "sd_tiny")


def register(accelerator: Accelerator, ema: EMAModel | None) -> None:
    save, load = dt.checkpoint_hooks(accelerator, ema)
    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def make_ema(student: UNet2DConditionModel) -> EMAModel:
    ema = EMAModel(student.parameters(), decay=0.9, model_cls=UNet2DConditionModel, model_config=student.config)
    for shadow in ema.shadow_params:
        shadow.add_(1.0)  # so that the two can be told apart
    ema.optimization_step = 7
    return ema


def test_checkpoint_holds_the_student_and_its_average(tmp_path: Path, accelerator: Accelerator) -> None:
    student = toy_student(1)
    ema = make_ema(student)
    prepared = accelerator.prepare(student)
    register(accelerator, ema)
    accelerator.save_state(str(tmp_path))

    assert {"unet", "unet_ema"} <= {path.name for path in tmp_path.iterdir()}
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]  # no second copy of the weights
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert same_tensors(loaded, student) and len(loaded.down_blocks) == 3
    average = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet_ema")
    for parameter, of_average in zip(student.parameters(), average.parameters(), strict=True):
        assert torch.equal(of_average, parameter + 1)

    saved = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with torch.no_grad():
        for tensor in (*student.parameters(), *ema.shadow_params):
            tensor.zero_()
    ema.optimization_step = 0
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in prepared.state_dict().items())
    for parameter, shadow in zip(student.parameters(), ema.shadow_params, strict=True):
        assert torch.equal(shadow, parameter + 1)
    assert ema.optimization_step == 7 and ema.decay == 0.9


def test_checkpoint_without_average(tmp_path: Path, accelerator: Accelerator) -> None:
    student = accelerator.prepare(toy_student(1))
    register(accelerator, None)
    accelerator.save_state(str(tmp_path / "checkpoint"))
    assert not (tmp_path / "checkpoint" / "unet_ema").exists()
    wanted = toy_student(1)
    student.load_state_dict(toy_student(2).state_dict())
    assert not same_tensors(student, wanted)
    accelerator.load_state(str(tmp_path / "checkpoint"))
    assert same_tensors(student, wanted)


def test_checkpoint_of_another_student_is_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    accelerator.prepare(toy_student(1))
    register(accelerator, None)
    accelerator.save_state(str(tmp_path))
    dt.build_student(UNet2DConditionModel(**UNET_CONFIG), "bk_small").save_pretrained(tmp_path / "unet")
    with pytest.raises(RuntimeError, match="down_blocks"):
        accelerator.load_state(str(tmp_path))


def test_two_models_are_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    """A teacher that was prepared as well would be written over the student."""
    accelerator.prepare(toy_student(1), toy_student(2))
    register(accelerator, None)
    with pytest.raises(ValueError, match="student alone, got 2 models"):
        accelerator.save_state(str(tmp_path))
    assert not (tmp_path / "unet").exists()


# ----------------------------------------------------------------------------------------------------------------
# The model card.

BLACK = Image.new("RGB", (8, 8))


def card_args(source: object, *flags: str) -> Namespace:
    line = ["--pretrained_model_name_or_path", str(source), "--output_dir", "unused-output", "--distill_level"]
    return dt.parse_args([*line, "sd_tiny", *flags])


def read_card(folder: Path) -> ModelCard:
    """The card as the hub reads it."""
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "creativeml-openrail-m"
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert "knowledge-distillation" in card.data.tags
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        ast.parse(block)
    return card


@pytest.mark.parametrize("prompts", [[], ["a red circle", "a blue square"]], ids=["no-prompts", "prompts"])
@pytest.mark.parametrize("images", [None, [], [BLACK], [BLACK, BLACK]], ids=["none", "empty", "one", "two"])
@pytest.mark.parametrize("facts", [None, {"Student's U-Net": "323,384,964 parameters", "Final loss": "0.123"}])
def test_card_with_and_without_everything(
    tmp_path: Path, prompts: list[str], images: list[Image.Image] | None, facts: dict[str, str] | None
) -> None:
    flags = ["--dataset_name", "someone/pictures", "--hub_token", "hf_secret"]
    flags += ["--validation_prompts", *prompts] if prompts else []
    args = card_args("someone/teacher", *flags)
    dt.save_model_card(args, "me/small", images, str(tmp_path), facts)
    card = read_card(tmp_path)
    assert card.data.base_model == "someone/teacher"
    assert card.data.datasets == ["someone/pictures"]
    assert "hf_secret" not in str(card)
    assert "# me/small" in card.text and 'from_pretrained("me/small"' in card.text
    assert "sd_tiny, BK-SDM-Tiny" in card.text
    assert "task + 0.5 * output + 0.5 * feature" in card.text
    assert "- `learning_rate`: 0.0001" in card.text
    if facts:
        assert "| Student's U-Net | 323,384,964 parameters |" in card.text and "| Final loss | 0.123 |" in card.text
    written = {path.name for path in tmp_path.iterdir()}
    if images:
        assert written == {"README.md", "val_imgs_grid.png"} and "(./val_imgs_grid.png)" in card.text
        assert Image.open(tmp_path / "val_imgs_grid.png").size == (8 * len(images), 8)
    else:
        assert written == {"README.md"} and "val_imgs_grid" not in card.text
    assert ('pipeline("a red circle")' in card.text) == bool(prompts)


def test_card_of_local_model_and_data_names_no_folder_to_the_hub(tmp_path: Path, teacher: Path, shards: Path) -> None:
    """A folder is no valid base_model or dataset there, and the hub would refuse the card."""
    dt.save_model_card(card_args(teacher, "--train_data_dir", str(shards)), "small", None, str(tmp_path))
    card = read_card(tmp_path)
    assert card.data.base_model is None and card.data.datasets is None
    assert f"**{teacher.name}**" in card.text and str(teacher.parent) not in card.text


@pytest.mark.parametrize("prompt", ['a sign that says "stop"', "a back\\table", "first line\nsecond line"])
def test_snippet_of_the_card_holds_any_prompt(tmp_path: Path, prompt: str) -> None:
    args = card_args("someone/teacher", "--dataset_name", "someone/pictures", "--validation_prompts", prompt)
    dt.save_model_card(args, "me/small", [BLACK], str(tmp_path))
    card = read_card(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    strings = [node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)]
    assert prompt in strings


def test_card_goes_to_the_output_folder_by_default(tmp_path: Path) -> None:
    args = card_args("someone/teacher", "--dataset_name", "someone/pictures")
    args.output_dir = str(tmp_path)
    dt.save_model_card(args, "me/small")
    assert read_card(tmp_path).data.base_model == "someone/teacher"


def test_parameters_are_counted() -> None:
    assert dt.count_parameters(torch.nn.Conv2d(4, 8, 3)) == 8 * 4 * 3 * 3 + 8
