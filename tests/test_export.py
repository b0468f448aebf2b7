"""What is handed on of a teacher, what --export makes of a result, and a teacher in a single file."""

import json
import os
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers
from helpers import ROOT, assert_equal, flags, hub_cache, make_pipeline, same_tensors, train, unet_weights
from launcher import Launcher
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

import distill_training as dt

TINY_SD = ROOT / "tests" / "tiny-sd"
UNTRAINED = ("scheduler", "text_encoder", "tokenizer", "vae")


def files_of(folder: Path, parts: tuple[str, ...] = UNTRAINED) -> dict[str, bytes]:
    """Every file of these parts by its path in the folder; links are none."""
    paths = [path for part in parts for path in (folder / part).rglob("*")]
    assert not any(path.is_symlink() for path in paths)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("kind", ["folder", "variant", "variant of a part", "links", "hub"])
def test_what_is_not_trained_is_handed_on_as_the_teacher_has_it(tmp_path: Path, shards: Path, kind: str) -> None:
    teacher, settings = tmp_path / "teacher", {}
    shutil.copytree(TINY_SD, teacher)
    path = teacher / "text_encoder" / "model.safetensors"  # in half precision, which the library would read as float32
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    wanted = files_of(teacher)
    for part in ("text_encoder", "vae"):
        (teacher / part / "pytorch_model.bin").write_bytes(b"a pickle")
    if kind == "variant":
        settings["variant"] = "fp16"
        for path in list(teacher.rglob("*.safetensors")):
            path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
        (teacher / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"not what was asked for")
    elif kind == "variant of a part":
        settings["variant"] = "fp16"
        path.rename(path.with_name("model.fp16.safetensors"))
    elif kind == "links":
        for path in [path for path in teacher.rglob("*") if path.is_file()]:
            path.rename(tmp_path / f"{path.parent.name}-{path.name}")
            path.symlink_to(tmp_path / f"{path.parent.name}-{path.name}")
    elif kind == "hub":
        settings["cache_dir"], teacher = hub_cache(tmp_path / "cache", teacher), "someone/tiny"
    train(teacher, shards, tmp_path / "out", max_train_steps=1, **settings)
    assert files_of(tmp_path / "out") == wanted
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index == json.loads((TINY_SD / "model_index.json").read_text())
    assert unet_weights(tmp_path / "out" / "unet")["conv_in.weight"].dtype == torch.float32
    DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)("a", num_inference_steps=1)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files_are_handed_on(tmp_path: Path, variant: str | None) -> None:
    encoder = CLIPTextModel.from_pretrained(TINY_SD, subfolder="text_encoder")
    encoder.save_pretrained(tmp_path / "part", max_shard_size="150KB")
    weights = [path for path in (tmp_path / "part").iterdir() if ".safetensors" in path.name]
    assert len(weights) > 2
    if variant:
        for path in weights:
            path.rename(path.with_name(path.name.replace("model-0", "model.fp16-0").replace("index.", "index.fp16.")))
        index = tmp_path / "part" / "model.safetensors.index.fp16.json"
        index.write_text(index.read_text().replace("model-0", "model.fp16-0"))
        CLIPTextModel.from_pretrained(tmp_path / "part", variant=variant)  # the names are what the library reads
    dt.copy_part(tmp_path / "part", tmp_path / "copy", variant)
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {path.name for path in weights} | {"config.json"}
    assert same_tensors(CLIPTextModel.from_pretrained(tmp_path / "copy"), encoder)


def test_a_flag_changes_the_scheduler_alone(tmp_path: Path, shards: Path) -> None:
    train(TINY_SD, shards, tmp_path / "out", max_train_steps=1, prediction_type="v_prediction")
    found, wanted = files_of(tmp_path / "out"), files_of(TINY_SD)
    name = "scheduler/scheduler_config.json"
    assert json.loads(found.pop(name)) == json.loads(wanted.pop(name)) | {"prediction_type": "v_prediction"}
    assert found == wanted


@pytest.mark.parametrize("kind", ["absent", "without weights", "pickle on the hub"])
def test_a_safety_checker_that_is_not_there_is_left_out_with_a_word(
    tmp_path: Path, shards: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    teacher, output, settings = tmp_path / "teacher", tmp_path / "out", {}
    shutil.copytree(TINY_SD, teacher)
    path = teacher / "model_index.json"
    index = json.loads(path.read_text())
    absent = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    path.write_text(json.dumps(index | absent | {"requires_safety_checker": True}))
    if kind != "absent":
        (teacher / "feature_extractor").mkdir()
        (teacher / "safety_checker").mkdir()
        (teacher / "safety_checker" / "config.json").write_text('{"model_type": "clip"}')
    if kind == "pickle on the hub":
        (teacher / "safety_checker" / "pytorch_model.bin").write_bytes(b"a pickle")
        settings["cache_dir"], teacher = hub_cache(tmp_path / "cache", teacher), "someone/tiny"
    train(teacher, shards, output, max_train_steps=1, **settings)
    for name in absent:
        assert f"The teacher's {name} is named in its model_index.json and not there: it is left out." in caplog.text
    saved = json.loads((output / "model_index.json").read_text())
    assert saved == index | dict.fromkeys(absent, [None, None]) | {"requires_safety_checker": False}
    assert DiffusionPipeline.from_pretrained(output).safety_checker is None


OLD = """
import sys, diffusers, torch, transformers
print("diffusers", diffusers.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
pipeline = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
image = pipeline("a red circle on a blue background", num_inference_steps=2, output_type="np").images[0]
assert image.shape == (64, 64, 3)
print(pipeline.tokenizer("a red circle").input_ids, len(pipeline.unet.state_dict()))
single = diffusers.StableDiffusionPipeline.from_single_file(sys.argv[2], config=sys.argv[1], torch_dtype=torch.float16)
for name in ("unet", "vae", "text_encoder"):
    one, other = (part.half().state_dict() for part in (getattr(pipeline, name), getattr(single, name)))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
half = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], variant="fp16", torch_dtype=torch.float16)
for name in ("unet", "vae", "text_encoder"):
    one, other = (getattr(each, name).state_dict() for each in (single, half))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
"""


@pytest.mark.skipif("DISTILL_SD_OLD_ENV" not in os.environ, reason="DISTILL_SD_OLD_ENV names no virtual environment")
@pytest.mark.parametrize("level", dt.DISTILL_LEVELS)
def test_old_libraries_load_the_result_and_its_exports(tmp_path: Path, shards: Path, level: str) -> None:
    """In an environment of the oldest diffusers and transformers that the README names."""
    output = tmp_path / "out"
    train(TINY_SD, shards, output, distill_level=level, max_train_steps=1, export=["single_file", "fp16"])
    python = Path(os.environ["DISTILL_SD_OLD_ENV"]) / "bin" / "python"
    line = [python, "-c", OLD, output, output / "out.safetensors"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    tokenizer = DiffusionPipeline.from_pretrained(TINY_SD).tokenizer
    assert str(tokenizer("a red circle").input_ids) in done.stdout


# ----------------------------------------------------------------------------------------------------------------
# Exports.


RESULTS = [(level, family) for family in "12" for level in dt.DISTILL_LEVELS]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[tuple[str, str], Path]:
    """A result of every level, exported, of a teacher like Stable Diffusion 1.x and of one like 2.x."""
    root = tmp_path_factory.mktemp("results")
    shutil.copytree(TINY_SD, root / "1")
    make_pipeline(
        root / "2", prediction_type="v_prediction", use_linear_projection=True, attention_head_dim=(2, 2, 4, 4)
    )
    config = json.loads((root / "2" / "text_encoder" / "config.json").read_text()) | {"hidden_act": "gelu"}
    (root / "2" / "text_encoder" / "config.json").write_text(json.dumps(config))
    for level, family in RESULTS:
        settings = {"distill_level": level, "max_train_steps": 1, "export": ["fp16", "single_file"]}
        train(root / family, shards, root / f"{level}-{family}", **settings)
    return {(level, family): root / f"{level}-{family}" for level, family in RESULTS}


@pytest.mark.xdist_group("exports")  # which share `results`
@pytest.mark.parametrize(("level", "family"), RESULTS)
def test_the_single_file_is_the_folder_in_half_precision(
    results: dict[tuple[str, str], Path], level: str, family: str
) -> None:
    folder = results[level, family]
    file = folder / f"{level}-{family}.safetensors"
    loaded = StableDiffusionPipeline.from_single_file(str(file), config=str(folder), dtype=torch.float16)
    original = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    for name in ("unet", "vae", "text_encoder"):
        assert same_tensors(getattr(loaded, name), getattr(original, name).half()), name
    weights = load_file(file)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    # Blocks without gaps, as ComfyUI counts them, and no mid block where the student has none.
    for blocks, count in (
        ("input_blocks", 6 if level == "sd_tiny" else 8),
        ("output_blocks", 6 if level == "sd_tiny" else 8),
    ):
        numbers = {int(name.split(".")[3]) for name in weights if name.startswith(f"model.diffusion_model.{blocks}.")}
        assert numbers == set(range(count)), blocks
    assert any(".middle_block." in name for name in weights) == (level == "sd_small")
    assert weights["first_stage_model.encoder.mid.attn_1.q.weight"].ndim == 4  # a convolution, as the original has it
    in_proj = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    assert ("cond_stage_model.transformer.text_model.final_layer_norm.weight" in weights) == (family == "1")
    assert family == "1" or weights[in_proj].shape == (48, 16)
    with safe_open(file, "pt") as opened:
        spec = opened.metadata()
    wanted = ("stable-diffusion-v1", "epsilon") if family == "1" else ("stable-diffusion-v2-768-v", "v")
    assert (spec["modelspec.architecture"], spec["modelspec.prediction_type"]) == wanted
    assert spec["modelspec.title"] == f"{level}-{family}"
    assert (spec["modelspec.implementation"], spec["modelspec.resolution"]) == ("sgm", "64x64")


def test_a_whole_unet_has_the_numbers_of_stable_diffusion() -> None:
    unet = UNet2DConditionModel.from_pretrained(TINY_SD / "unet")
    names = {dt.original_unet_name(name, unet.config) for name in unet.state_dict()}
    assert len(names) == len(unet.state_dict())
    for name in (
        "input_blocks.3.0.op.weight",
        "input_blocks.11.0.in_layers.0.weight",
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "output_blocks.2.1.conv.weight",
        "output_blocks.5.2.conv.weight",
        "output_blocks.11.1.proj_in.weight",
        "time_embed.2.bias",
        "out.2.bias",
    ):
        assert name in names, name


@pytest.mark.xdist_group("exports")  # which share `results`
@pytest.mark.parametrize("level", dt.DISTILL_LEVELS)
def test_the_variant_is_the_folder_in_half_precision(results: dict[tuple[str, str], Path], level: str) -> None:
    folder = results[level, "1"]
    half = DiffusionPipeline.from_pretrained(folder, variant="fp16", dtype=torch.float16)
    original = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    for name in ("unet", "vae", "text_encoder"):
        assert same_tensors(getattr(half, name), getattr(original, name).half()), name
        (file,) = (folder / name).glob("*.fp16.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    assert files_of(folder).items() >= files_of(folder.with_name("1")).items()  # nothing that was there is another


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.xdist_group("exports")  # which share `results`
def test_a_folder_that_exists_is_exported_without_training(
    tmp_path: Path, results: dict[tuple[str, str], Path], launcher: Launcher
) -> None:
    folder = tmp_path / "small-sd"
    shutil.copytree(results["sd_small", "1"], folder)
    made = {path: path.read_bytes() for path in [*folder.glob("*/*.fp16.*"), *folder.glob("*.safetensors")]}
    assert len(made) == 4
    for path in made:
        path.unlink()
    before = snapshot(folder)
    line = ["--export", "single_file", "fp16", "--export_from", str(folder)]
    done = launcher.finish(line, tmp_path / "log")
    assert done.returncode == 0, done.stderr[-3000:]
    after = snapshot(folder)
    assert {name: after.pop(name) for name in before} == before
    fp16 = {str(path.relative_to(folder)): content for path, content in made.items() if path.parent != folder}
    assert after.pop("small-sd.safetensors") and after == fp16
    # Again: what is there is not overwritten.
    done = launcher.finish(line, tmp_path / "log")
    assert (
        done.returncode == 2 and f"{folder}/small-sd.safetensors is there, and no export is overwritten" in done.stderr
    )
    assert "Traceback" not in done.stderr and snapshot(folder) == before | fp16 | {
        "small-sd.safetensors": (folder / "small-sd.safetensors").read_bytes()
    }


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            ["--export", "fp16", "--learning_rate", "1"],
            "--export_from goes with --export alone: leave out --learning_rate 1.",
        ),
        ([], "--export_from needs --export single_file or fp16."),
        (["--export", "gguf"], "invalid choice: 'gguf'"),
    ],
)
def test_what_only_exports_takes_nothing_else(
    line: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        dt.parse_args(["--export_from", str(TINY_SD), *line])
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({"_class_name": "StableDiffusionXLPipeline"}, "is a StableDiffusionXLPipeline; a StableDiffusionPipeline is"),
        ({"text_encoder": ["transformers", "CLIPTextModelWithProjection"]}, "is a CLIPTextModelWithProjection"),
    ],
)
def test_a_pipeline_that_cannot_be_exported(tmp_path: Path, index: dict[str, object], sentence: str) -> None:
    """Said before anything is loaded: there is nothing but the index."""
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps(json.loads((TINY_SD / "model_index.json").read_text()) | index))
    with pytest.raises(dt.UserError, match=sentence):
        dt.main(dt.parse_args(["--export", "single_file", "--export_from", str(tmp_path)]))
    assert [*tmp_path.iterdir()] == [path]


def test_one_of_several_processes_exports_into_a_folder_with_brackets(tmp_path: Path, launcher: Launcher) -> None:
    folder = tmp_path / "my [v1] *"
    shutil.copytree(TINY_SD, folder)
    line = ["--export", "single_file", "fp16", "--export_from", str(folder)]
    run = launcher.start(line, tmp_path / "log", ranks=2)
    assert run.wait() == [0, 0], run.log()[-3000:]
    assert (folder / "my [v1] *.safetensors").is_file() and len(exports_in(folder)) == 4
    assert "Exported" in run.log() and "Exported" not in run.log(1)


def test_no_pipeline_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        dt.parse_args(["--export", "fp16", "--export_from", str(tmp_path)])
    assert f"--export_from {tmp_path} holds no model_index.json" in capsys.readouterr().err


def test_a_file_in_the_way_of_the_export_is_said_before_training(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "out.safetensors").write_text("the user's own")
    with pytest.raises(SystemExit, match="2"):
        dt.parse_args(flags(TINY_SD, shards, tmp_path / "out", export=["single_file"]))
    assert f"{tmp_path}/out/out.safetensors is there, and no export is overwritten: move" in capsys.readouterr().err


def exports_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.safetensors") if path.parent == folder or ".fp16." in path.name]


def test_exports_of_an_earlier_result_are_not_left_beside_another(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "vae").mkdir(parents=True)
    (tmp_path / "out" / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_text("of another result")
    with pytest.raises(SystemExit, match="2"):
        dt.parse_args(flags(TINY_SD, shards, tmp_path / "out"))
    assert "model.fp16.safetensors is there, and no export is overwritten: move it" in capsys.readouterr().err


def test_an_export_that_cannot_be_placed_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second file does not go into its place, as where a part is a link to another disk."""
    folder, place, placed = tmp_path / "result", dt.data.put_in_place, []
    shutil.copytree(TINY_SD, folder)
    before = snapshot(folder)

    def fails_at_last(new: Path, path: Path, *more: Path) -> None:
        placed.append(path)
        if len(placed) == 3:
            raise OSError(18, "Invalid cross-device link")
        place(new, path, *more)

    monkeypatch.setattr(dt.data, "put_in_place", fails_at_last)
    dt.Accelerator(cpu=True)
    with pytest.raises(dt.TrainingError, match="stays as it is: .*Invalid cross-device link"):
        dt.export_pipeline(folder, ["single_file", "fp16"])
    assert len(placed) == 3 and snapshot(folder) == before


@pytest.mark.parametrize("kind", ["single_file", "fp16"])
def test_an_export_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """One tensor is written wrongly: what is loaded back shows it."""
    folder = tmp_path / "result"
    shutil.copytree(TINY_SD, folder)
    before, layout, save = snapshot(folder), dt.original_layout, StableDiffusionPipeline.save_pretrained

    def wrong(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
        weights = layout(pipeline)
        return weights | {"first_stage_model.quant_conv.bias": weights["first_stage_model.quant_conv.bias"] + 1}

    def save_wrong(pipeline: StableDiffusionPipeline, path: Path, **settings: Any) -> None:
        save(pipeline, path, **settings)
        (file,) = (path / "vae").glob("*.safetensors")
        weights = load_file(file)
        save_file(weights | {"quant_conv.bias": weights["quant_conv.bias"] + 1}, file, metadata={"format": "pt"})

    monkeypatch.setattr(dt, "original_layout", wrong)
    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", save_wrong)
    dt.Accelerator(cpu=True)
    with pytest.raises(dt.TrainingError, match=f"stays as it is: vae of {kind} differs when it is loaded back"):
        dt.export_pipeline(folder, [kind])
    assert snapshot(folder) == before


def test_a_file_that_came_in_between_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, compare = tmp_path / "result", dt.same_weights
    shutil.copytree(TINY_SD, folder)

    def meanwhile(*models: nn.Module) -> bool:
        (folder / "result.safetensors").write_text("the user's own")
        return compare(*models)

    monkeypatch.setattr(dt, "same_weights", meanwhile)
    dt.Accelerator(cpu=True)
    with pytest.raises(dt.TrainingError, match="is there, and no export is overwritten"):
        dt.export_pipeline(folder, ["fp16", "single_file"])
    assert [path.read_text() for path in exports_in(folder)] == ["the user's own"]


def test_a_failed_export_ends_with_1_and_the_folder_stays(tmp_path: Path, shards: Path, launcher: Launcher) -> None:
    """The teacher's text encoder has a number that float16 does not have."""
    teacher, output = tmp_path / "teacher", tmp_path / "out"
    shutil.copytree(TINY_SD, teacher)
    path = teacher / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    weights["text_model.embeddings.token_embedding.weight"][3] = 1e6  # of a letter that no caption has
    save_file(weights, path, metadata={"format": "pt"})
    settings = {"max_train_steps": 1, "export": ["fp16", "single_file"]}
    done = launcher.finish(flags(teacher, shards, output, **settings), tmp_path / "log")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    error = f"--export: {output} stays as it is: text_encoder has weights that half precision cannot hold"
    assert done.stderr.splitlines()[-1].endswith(error)
    assert (output / "README.md").is_file() and not (output / ".export.partial").exists() and not exports_in(output)
    DiffusionPipeline.from_pretrained(output)


# ----------------------------------------------------------------------------------------------------------------
# Other tools: the README's table says what is found here.


@pytest.fixture
def pipeline(results: dict[tuple[str, str], Path], level: str) -> StableDiffusionPipeline:
    loaded = DiffusionPipeline.from_pretrained(results[level, "1"])
    loaded.set_progress_bar_config(disable=True)
    return loaded


def control(pipeline: StableDiffusionPipeline, unet: UNet2DConditionModel) -> None:
    """Two steps with a new ControlNet of this U-Net."""
    parts = {"controlnet": ControlNetModel.from_unet(unet), "requires_safety_checker": False}
    controlled = StableDiffusionControlNetPipeline(**pipeline.components, **parts)
    controlled.set_progress_bar_config(disable=True)
    controlled("a red circle", image=torch.zeros(1, 3, 64, 64), num_inference_steps=2)


@pytest.mark.xdist_group("exports")
@pytest.mark.parametrize("level", dt.DISTILL_LEVELS)
def test_tools_controlnet(pipeline: StableDiffusionPipeline, level: str) -> None:
    with nullcontext() if level == "sd_small" else pytest.raises(ValueError, match="unknown mid_block_type"):
        control(pipeline, pipeline.unet)
    with pytest.raises(RuntimeError, match="must match the size"):
        control(pipeline, UNet2DConditionModel.from_pretrained(TINY_SD / "unet"))  # as published ones are


@pytest.mark.xdist_group("exports")
@pytest.mark.parametrize(("level", "fit"), [("sd_small", 160), ("bk_small", 144), ("sd_tiny", None)])
def test_tools_lora_of_the_teacher(
    pipeline: StableDiffusionPipeline, level: str, fit: int | None, tmp_path: Path
) -> None:
    unet = UNet2DConditionModel.from_pretrained(TINY_SD / "unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    assert len(layers) == 256
    with nullcontext() if fit else pytest.raises(RuntimeError, match="size mismatch"):
        pipeline.load_lora_weights(tmp_path)
        assert sum("lora_" in name for name in pipeline.unet.state_dict()) == fit


class Prediction(nn.Module):
    """A U-Net that returns a tensor."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.unet(sample, timestep, text, return_dict=False)[0]


@pytest.mark.xdist_group("exports")
@pytest.mark.parametrize("level", dt.DISTILL_LEVELS)
def test_tools_onnx(pipeline: StableDiffusionPipeline, level: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs pip install onnx onnxscript onnxruntime")
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 16, 64))
    torch.onnx.export(Prediction(pipeline.unet).eval(), inputs, tmp_path / "unet.onnx", dynamo=True)
    session = runtime.InferenceSession(tmp_path / "unet.onnx")
    names = [entry.name for entry in session.get_inputs()]
    (found,) = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    with torch.no_grad():
        wanted = Prediction(pipeline.unet)(*inputs)
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.xdist_group("exports")
@pytest.mark.parametrize("level", dt.DISTILL_LEVELS)
def test_tools_deepcache(pipeline: StableDiffusionPipeline, level: str) -> None:
    helper = pytest.importorskip("DeepCache", reason="needs pip install DeepCache").DeepCacheSDHelper(pipe=pipeline)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    with nullcontext() if level == "sd_small" else pytest.raises(AttributeError):
        helper.enable()
        pipeline("a red circle", num_inference_steps=6)


# ----------------------------------------------------------------------------------------------------------------
# A teacher in a single file.


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/tiny-sd in one file, made by `--export single_file`, and beside it a folder of the same values."""
    folder = tmp_path_factory.mktemp("single") / "realistic"
    pipeline = DiffusionPipeline.from_pretrained(TINY_SD, dtype=torch.float16)
    pipeline.save_pretrained(folder)
    dt.Accelerator(cpu=True)
    dt.export_pipeline(folder, ["single_file"])
    return folder / "realistic.safetensors"


def test_a_single_file_trains_as_its_folder_does(tmp_path: Path, single: Path, shards: Path) -> None:
    settings = {"max_train_steps": 2, "validation_prompts": ["a red circle"], "distill_level": "sd_small"}
    train(single, shards, tmp_path / "file", single_file_config=TINY_SD, **settings)
    train(single.parent, shards, tmp_path / "folder", **settings)
    assert_equal(*(unet_weights(tmp_path / name / "unet") for name in ("file", "folder")))
    grids = [(tmp_path / name / "validation" / "step-2.png").read_bytes() for name in ("file", "folder")]
    assert grids[0] == grids[1]
    file, folder = (
        DiffusionPipeline.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("file", "folder")
    )
    for name, part in file.components.items():
        if isinstance(part, nn.Module):
            assert same_tensors(part, getattr(folder, name)), name
    assert file.scheduler.config.prediction_type == "epsilon"
    card = (tmp_path / "file" / "README.md").read_text()
    assert "**realistic.safetensors**" in card and str(single.parent) not in card and str(TINY_SD) not in card


def refused(launcher: Launcher, folder: Path, *line: object) -> str:
    done = launcher.finish([*line, "--report_to", "none", "--resolution", "64"], folder / "log")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stderr.splitlines()[-1]


def test_configs_that_cannot_be_had(tmp_path: Path, single: Path, shards: Path, launcher: Launcher) -> None:
    line = ["--pretrained_model_name_or_path", single, "--train_data_dir", shards, "--output_dir", tmp_path / "out"]
    sentence = refused(launcher, tmp_path, *line, "--cache_dir", tmp_path / "home")
    assert f"--pretrained_model_name_or_path {single} cannot be loaded" in sentence
    assert sentence.endswith("(its configs come from the hub, or from --single_file_config FOLDER)")
    assert not (tmp_path / "out").exists()


def test_a_single_file_that_lacks_the_rest(tmp_path: Path, shards: Path, launcher: Launcher) -> None:
    """A U-Net in diffusers' names: the commonest file that is no pipeline."""
    line = ["--pretrained_model_name_or_path", TINY_SD / "unet" / "diffusion_pytorch_model.safetensors"]
    line += ["--train_data_dir", shards, "--output_dir", tmp_path / "out", "--single_file_config", TINY_SD]
    sentence = refused(launcher, tmp_path, *line)
    assert "diffusion_pytorch_model.safetensors" in sentence and not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["model.diffusion_model", "first_stage_model", "cond_stage_model"])
def test_a_single_file_that_lacks_a_tensor(tmp_path: Path, single: Path, part: str) -> None:
    weights = load_file(single)
    del weights[max(name for name in weights if name.startswith(part))]
    save_file(weights, tmp_path / "cut.safetensors", metadata={"format": "pt"})
    with pytest.raises(dt.UserError, match="cut.safetensors.* tensors are missing from it"):
        dt.open_single_file(str(tmp_path / "cut.safetensors"), str(TINY_SD), None)


def test_a_config_that_names_what_it_lacks(tmp_path: Path, single: Path) -> None:
    """A safety checker is left out, a tokenizer is needed."""
    dt.Accelerator(cpu=True)
    shutil.copytree(TINY_SD, tmp_path / "config")
    path = tmp_path / "config" / "model_index.json"
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    checker |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | checker))
    assert dt.open_single_file(str(single), str(tmp_path / "config"), None).safety_checker is None
    dt.open_single_file.cache_clear()
    shutil.rmtree(tmp_path / "config" / "tokenizer")
    with pytest.raises(dt.UserError, match="tokenizer is named .* and not there .*--single_file_config .*config"):
        dt.open_single_file(str(single), str(tmp_path / "config"), None)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"variant": "fp16"}, "--variant has no meaning where --pretrained_model_name_or_path is a single file"),
        ({"single_file_config": "{shards}"}, "--single_file_config {shards} holds no model_index.json"),
        (
            {"pretrained_model_name_or_path": TINY_SD, "single_file_config": TINY_SD},
            "--single_file_config has no meaning where --pretrained_model_name_or_path is no single file",
        ),
        ({"pretrained_model_name_or_path": "{root}/a.ckpt"}, "a.ckpt: of single files only .safetensors are read"),
    ],
)
def test_flags_that_do_not_fit_a_single_file(
    tmp_path: Path, single: Path, shards: Path, settings: dict, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"a pickle")
    places = {"shards": shards, "root": tmp_path}
    settings = {name: str(value).format(**places) for name, value in settings.items()}
    with pytest.raises(SystemExit, match="2"):
        dt.parse_args(flags(single, shards, tmp_path / "out", **settings))
    assert sentence.format(**places) in capsys.readouterr().err
