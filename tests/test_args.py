"""Every flag, and one clear sentence with exit code 2 for every mistake, before anything is written."""

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from diffusers import UNet2DConditionModel
from helpers import (
    SCRIPT,
    data_args,
    dataset_of,
    hub_cache,
    make_pipeline,
    toy_images,
    write_imagefolder,
)
from launcher import Launcher
from torchvision.transforms import InterpolationMode
from transformers import CLIPTextModel

import distill_training as dt

# The flags of diffusers' examples/text_to_image/train_text_to_image.py, each with a value (None for a switch) and
# what it must come to.
ACCEPTED: list[tuple[str, str | None, object]] = [
    ("pretrained_model_name_or_path", "someone/model", "someone/model"),
    ("revision", "main", "main"),
    ("variant", "fp16", "fp16"),
    ("dataset_name", "someone/images", "someone/images"),
    ("dataset_config_name", "default", "default"),
    ("train_data_dir", "{shards}", "{shards}"),
    ("image_column", "picture", "picture"),
    ("caption_column", "caption", "caption"),
    ("max_train_samples", "7", 7),
    ("output_dir", "{root}/new", "{root}/new"),
    ("cache_dir", "cache", "cache"),
    ("seed", "0", 0),
    ("resolution", "256", 256),
    ("center_crop", None, True),
    ("random_flip", None, True),
    ("train_batch_size", "3", 3),
    ("num_train_epochs", "2", 2),
    ("max_train_steps", "9", 9),
    ("gradient_accumulation_steps", "4", 4),
    ("gradient_checkpointing", None, True),
    ("learning_rate", "1e-5", 1e-5),
    ("scale_lr", None, True),
    ("lr_scheduler", "cosine", "cosine"),
    ("lr_warmup_steps", "0", 0),
    ("use_8bit_adam", None, True),
    ("allow_tf32", None, True),
    ("use_ema", None, True),
    ("offload_ema", None, True),
    ("foreach_ema", None, True),
    ("dataloader_num_workers", "2", 2),
    ("adam_beta1", "0.8", 0.8),
    ("adam_beta2", "0.99", 0.99),
    ("adam_weight_decay", "0", 0.0),
    ("adam_epsilon", "1e-6", 1e-6),
    ("max_grad_norm", "2.5", 2.5),
    ("push_to_hub", None, True),
    ("hub_token", "hf_secret", "hf_secret"),
    ("prediction_type", "v_prediction", "v_prediction"),
    ("hub_model_id", "me/mine", "me/mine"),
    ("logging_dir", "log", "log"),
    ("mixed_precision", "bf16", "bf16"),
    ("report_to", "tensorboard", "tensorboard"),
    ("local_rank", "1", 1),
    ("checkpointing_steps", "5", 5),
    ("checkpoints_total_limit", "1", 1),
    ("resume_from_checkpoint", "latest", "latest"),
    ("noise_offset", "0.1", 0.1),
    ("tracker_project_name", "mine", "mine"),
    ("input_perturbation", "0.1", 0.1),
    ("image_interpolation_mode", "bicubic", "bicubic"),
    ("validation_prompts", "a red circle", ["a red circle"]),
]
REFUSED: list[tuple[str, str | None, str]] = [
    ("snr_gamma", "5.0", "was removed"),
    ("validation_epochs", "5", "is replaced by --validation_steps"),
    ("enable_xformers_memory_efficient_attention", None, "SDPA"),
    ("non_ema_revision", "main", "--student_model_name_or_path"),
    ("dream_training", None, "--output_weight and --feature_weight"),
    ("dream_detail_preservation", "1.0", "--dream_training"),
]
DIFFUSERS_FLAGS = """
    pretrained_model_name_or_path revision variant dataset_name dataset_config_name train_data_dir image_column
    caption_column max_train_samples validation_prompts output_dir cache_dir seed resolution center_crop random_flip
    train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps gradient_checkpointing learning_rate
    scale_lr lr_scheduler lr_warmup_steps snr_gamma dream_training dream_detail_preservation use_8bit_adam allow_tf32
    use_ema offload_ema foreach_ema non_ema_revision dataloader_num_workers adam_beta1 adam_beta2 adam_weight_decay
    adam_epsilon max_grad_norm push_to_hub hub_token prediction_type hub_model_id logging_dir mixed_precision report_to
    local_rank checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    enable_xformers_memory_efficient_attention noise_offset validation_epochs tracker_project_name input_perturbation
    image_interpolation_mode
""".split()

AT_LEAST_0 = "at least 0", ["-1"], ["0"]
AT_LEAST_0_REAL = "at least 0", ["-1", "-0.001", "nan", "inf"], ["0", "0.5", "20"]
AT_LEAST_1 = "at least 1", ["0", "-3"], ["1"]
MORE_THAN_0 = "more than 0", ["0", "-1e-4", "nan", "inf"], ["1e-9", "3"]
BELOW_1 = "from 0 to below 1", ["-0.1", "1", "1.5", "nan"], ["0", "0.9999"]
BOUNDS: dict[str, tuple[str, list[str], list[str]]] = {
    "output_weight": AT_LEAST_0_REAL,
    "feature_weight": AT_LEAST_0_REAL,
    "noise_offset": AT_LEAST_0_REAL,
    "input_perturbation": AT_LEAST_0_REAL,
    "validation_guidance_scale": AT_LEAST_0_REAL,
    "adam_weight_decay": AT_LEAST_0_REAL,
    "dataloader_num_workers": AT_LEAST_0,
    "lr_warmup_steps": AT_LEAST_0,
    "max_bad_steps": AT_LEAST_0,
    "fidelity_samples": AT_LEAST_0,
    "student_num_inference_steps": ("at least 4", ["3", "-1"], ["4", "50"]),
    "student_guidance_scale": AT_LEAST_0_REAL,
    "seed": ("from 0 to 4294967295", ["-1"], ["0", "4294967295"]),
    "max_train_samples": AT_LEAST_1,
    "train_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "num_train_epochs": AT_LEAST_1,
    "max_train_steps": AT_LEAST_1,
    "logging_steps": AT_LEAST_1,
    "validation_steps": AT_LEAST_1,
    "num_validation_images": AT_LEAST_1,
    "checkpointing_steps": AT_LEAST_1,
    "checkpoints_total_limit": AT_LEAST_1,
    "resolution": ("at least 1", ["0", "-8"], ["8", "64", "512"]),
    "learning_rate": MORE_THAN_0,
    "adam_epsilon": MORE_THAN_0,
    "max_grad_norm": MORE_THAN_0,
    "adam_beta1": BELOW_1,
    "adam_beta2": BELOW_1,
    "ema_decay": BELOW_1,
    "proportion_empty_prompts": ("from 0 to 1", ["-0.1", "1.1", "nan"], ["0", "0.1", "1"]),
    "random_conditioning": AT_LEAST_0_REAL,
    "task_weight": AT_LEAST_0_REAL,
    "teacher_latents": AT_LEAST_1,
    "teacher_latents_steps": AT_LEAST_1,
    "teacher_latents_guidance_scale": AT_LEAST_0_REAL,
    "teacher_latents_seed": ("from 0 to 4294967295", ["-1"], ["0", "4294967295"]),
}

# (flags, data flags, the sentence). {names} are the folders of `world`.
DATA = ["--train_data_dir", "{shards}"]
BAD_INPUT: dict[str, tuple[list[str], list[str], str]] = {
    "odd resolution": (
        ["--resolution", "100"],
        DATA,
        "--resolution must be a multiple of 8, the VAE's factor, got 100",
    ),
    "seed too large": (["--seed", str(2**32)], DATA, "--seed must be"),
    "no data": ([], [], "Give exactly one of --dataset_name, --train_data_dir and --teacher_latents."),
    "both data": (["--dataset_name", "someone/images"], DATA, "Give exactly one of --dataset_name, --train_data_dir"),
    "data absent": ([], ["--train_data_dir", "{root}/absent"], "--train_data_dir {root}/absent is not a folder."),
    "data a file": ([], ["--train_data_dir", "{root}/file"], "--train_data_dir {root}/file is not a folder."),
    "data without images": (
        [],
        ["--train_data_dir", "{root}/notes"],
        "--train_data_dir {root}/notes holds neither *.tar shards nor images.",
    ),
    "streaming a folder": (
        ["--streaming", "--max_train_steps", "5"],
        DATA,
        "--streaming goes with --dataset_name only: local data is read in place",
    ),
    "streaming without end": (
        ["--streaming"],
        ["--dataset_name", "someone/images"],
        "--streaming needs --max_train_steps",
    ),
    "model absent": (
        ["--pretrained_model_name_or_path", "{root}/absent"],
        DATA,
        "--pretrained_model_name_or_path {root}/absent is neither a folder nor a name on the hub.",
    ),
    "model a file": (
        ["--pretrained_model_name_or_path", "{root}/file"],
        DATA,
        "--pretrained_model_name_or_path {root}/file: of single files only .safetensors are read",
    ),
    "model of one part": (
        ["--pretrained_model_name_or_path", "{root}/notes"],
        DATA,
        "--pretrained_model_name_or_path {root}/notes holds no model_index.json",
    ),
    "student absent": (
        ["--student_model_name_or_path", "{root}/absent"],
        DATA,
        "--student_model_name_or_path {root}/absent is neither a folder nor a name on the hub.",
    ),
    "output a file": (["--output_dir", "{root}/file"], DATA, "--output_dir {root}/file is not a folder."),
    "output a link to nothing": (["--output_dir", "{root}/link"], DATA, "--output_dir {root}/link is not a folder."),
    "output in a file": (
        ["--output_dir", "{root}/file/out"],
        DATA,
        "--output_dir {root}/file/out cannot be written to: {root}/file is not a folder that you may write in.",
    ),
    "output with a long name": (
        ["--output_dir", "{root}/" + "x" * 300],
        DATA,
        "A path cannot be used: [Errno 36] File name too long: '{root}/xxx",
    ),
    "model with a long name": (
        ["--pretrained_model_name_or_path", "{root}/" + "x" * 300],
        DATA,
        "A path cannot be used: [Errno 36] File name too long: '{root}/xxx",
    ),
    "logs in a file": (
        ["--output_dir", "{root}/stopped", "--logging_dir", "args.json", "--resume_from_checkpoint", "latest"],
        DATA,
        "--logging_dir {root}/stopped/args.json cannot be written to: {root}/stopped/args.json is not a folder that",
    ),
    "logs elsewhere": (
        ["--logging_dir", "../file/logs"],
        DATA,
        "--logging_dir {root}/file/logs cannot be written to: {root}/file is not a folder that you may write in.",
    ),
    "output with checkpoints": (
        ["--output_dir", "{root}/stopped"],
        DATA,
        "--output_dir {root}/stopped holds another run's checkpoints (checkpoint-10): go on with "
        "--resume_from_checkpoint latest",
    ),
    "output finished": (
        ["--output_dir", "{root}/finished"],
        DATA,
        "--output_dir {root}/finished holds a finished pipeline",
    ),
    "output finished, resuming": (
        ["--output_dir", "{root}/finished", "--resume_from_checkpoint", "latest"],
        DATA,
        "--output_dir {root}/finished holds a finished pipeline",
    ),
    "output finished, resuming another": (
        ["--output_dir", "{root}/finished", "--resume_from_checkpoint", "{root}/stopped/checkpoint-2"],
        DATA,
        "--output_dir {root}/finished holds a finished pipeline",
    ),
    "output with checkpoints, resuming another": (
        ["--output_dir", "{root}/stopped", "--resume_from_checkpoint", "{root}/other/checkpoint-5"],
        DATA,
        "--output_dir {root}/stopped holds another run's checkpoints",
    ),
    "output with a README": (["--output_dir", "{root}/foreign"], DATA, "--output_dir {root}/foreign holds README.md"),
    "output with a model": (["--output_dir", "{root}/part"], DATA, "--output_dir {root}/part holds unet"),
    "checkpoint absent": (
        ["--output_dir", "{root}/stopped", "--resume_from_checkpoint", "checkpoint-7"],
        DATA,
        "--resume_from_checkpoint checkpoint-7 does not exist; the checkpoints in {root}/stopped are: "
        "checkpoint-2, checkpoint-10.",
    ),
    "no checkpoint there": (
        ["--resume_from_checkpoint", "checkpoint-7"],
        DATA,
        "--resume_from_checkpoint checkpoint-7 does not exist; the checkpoints in {root}/new are: none.",
    ),
    "unknown tracker": (["--report_to", "abacus"], DATA, "--report_to must be one of "),
    "tracker not installed": (["--report_to", "{tracker}"], DATA, "--report_to {tracker} is not installed"),
    "token shown": (["--hub_token", "hf_secret", "--report_to", "all"], DATA, "--hub_token could be shown by all"),
    "offload without EMA": (["--offload_ema"], DATA, "--offload_ema needs --use_ema."),
    "foreach without EMA": (["--foreach_ema"], DATA, "--foreach_ema needs --use_ema."),
    "prepare_unet": (["--prepare_unet", "True"], DATA, "--prepare_unet was removed"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, teacher: Path, shards: Path) -> dict[str, str]:
    """Folders of a user's that no mistake may change."""
    root = tmp_path_factory.mktemp("world")
    for path in (
        "file",
        "notes/notes.txt",
        "stopped/checkpoint-2/trainer_state.json",
        "stopped/checkpoint-10/trainer_state.json",
        "stopped/args.json",
        "other/checkpoint-5/trainer_state.json",
        "finished/model_index.json",
        "foreign/README.md",
        "part/unet/config.json",
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("{}")
    (root / "link").symlink_to(root / "absent")
    installed = [str(tracker) for tracker in get_available_trackers()]
    tracker = next(name for name in LOGGER_TYPE_TO_CLASS if name not in installed)
    return {"root": str(root), "teacher": str(teacher), "shards": str(shards), "tracker": tracker}


def snapshot(*folders: str | Path) -> dict[Path, bytes | None]:
    paths = [path for folder in folders for path in Path(folder).rglob("*")]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def command_line(world: dict[str, str], flags: list[str], data: list[str] = DATA) -> list[str]:
    line = ["--pretrained_model_name_or_path", "{teacher}", "--output_dir", "{root}/new", *data, *flags]
    return [part.format(**world) for part in line]


def complaints(capsys: pytest.CaptureFixture[str], line: list[str]) -> list[str]:
    """The sentences that these flags are answered with."""
    with pytest.raises(SystemExit) as stopped:
        dt.parse_args(line)
    assert stopped.value.code == 2
    usage, head, *sentences = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: accelerate launch distill_training.py") and len(usage) < 119
    assert head.endswith("error: ") or not sentences
    return [sentence.strip() for sentence in sentences] or [head.partition("error: ")[2]]


def test_the_plain_command_line_is_right(world: dict[str, str]) -> None:
    """What all rows below add their mistake to."""
    args = dt.parse_args(command_line(world, []))
    assert (args.distill_level, args.output_weight, args.feature_weight) == ("sd_small", 0.5, 0.5)
    assert not hasattr(args, "refused")


def test_flag_list_is_whole() -> None:
    assert len(DIFFUSERS_FLAGS) == 57
    assert sorted(DIFFUSERS_FLAGS) == sorted(name for name, *_ in [*ACCEPTED, *REFUSED])


@pytest.mark.parametrize(("name", "value", "expected"), ACCEPTED, ids=[name for name, *_ in ACCEPTED])
def test_diffusers_flag_is_accepted(
    world: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    value: str | None,
    expected: object,
) -> None:
    flags = [f"--{name}"] + ([] if value is None else [value])
    if name in ("offload_ema", "foreach_ema"):
        flags.append("--use_ema")
    if name == "use_8bit_adam":  # only looked for here, not imported
        (tmp_path / "bitsandbytes.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
    data = [] if name == "dataset_name" else DATA
    args = dt.parse_args(command_line(world, flags, data))
    assert getattr(args, name) == (expected.format(**world) if isinstance(expected, str) else expected)


@pytest.mark.parametrize(("name", "value", "replacement"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_diffusers_flag_is_refused(
    capsys: pytest.CaptureFixture[str], world: dict[str, str], name: str, value: str | None, replacement: str
) -> None:
    flags = [f"--{name}"] + ([] if value is None else [value])
    for line in (flags, [*flags, "--seed", "3"], ["=".join(flags)]):
        (sentence,) = complaints(capsys, command_line(world, line))
        assert sentence.startswith(f"--{name} ") and replacement in sentence and sentence.endswith(".")


def test_every_interpolation_mode_of_diffusers_is_accepted(world: dict[str, str]) -> None:
    for mode in InterpolationMode:
        dt.parse_args(command_line(world, ["--image_interpolation_mode", mode.name.lower()]))


@pytest.mark.parametrize(
    "schedule", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
)
def test_every_schedule_of_diffusers_is_accepted(world: dict[str, str], schedule: str) -> None:
    assert dt.parse_args(command_line(world, ["--lr_scheduler", schedule])).lr_scheduler == schedule


def test_feature_weight_is_spelled_either_way(world: dict[str, str]) -> None:
    for spelling in (["--feature-weight", "0.25"], ["--feature-weight=0.25"], ["--feature_weight", "0.25"]):
        assert dt.parse_args(command_line(world, spelling)).feature_weight == 0.25


def test_levels_come_from_the_table(capsys: pytest.CaptureFixture[str], world: dict[str, str]) -> None:
    for level in dt.DISTILL_LEVELS:
        assert dt.parse_args(command_line(world, ["--distill_level", level])).distill_level == level
    (sentence,) = complaints(capsys, command_line(world, ["--distill_level", "sd_tniy"]))
    assert "--distill_level" in sentence and "sd_tniy" in sentence
    assert all(level in sentence for level in ("sd_small", "bk_small", "sd_tiny"))


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds(capsys: pytest.CaptureFixture[str], world: dict[str, str], name: str) -> None:
    allowed, bad, good = BOUNDS[name]
    pool = ["--teacher_latents", "3", "--caption_pool", "{root}/captions.txt"]
    Path(world["root"], "captions.txt").write_text("a red circle")
    data = pool if name.startswith("teacher_latents") else DATA
    data = [*data, "--evaluate", "{teacher}"] if name.startswith("student_") else data
    for value in bad:
        (sentence,) = complaints(capsys, command_line(world, [f"--{name}={value}"], data))
        rule, _, got = sentence.removesuffix(".").partition(", got ")
        assert rule == f"--{name} must be {allowed}"
        assert str(float(got)) == str(float(value))
    for value in good:
        assert getattr(dt.parse_args(command_line(world, [f"--{name}={value}"], data)), name) == float(value)


def test_every_number_has_a_bound() -> None:
    args = dt.parse_args(["--pretrained_model_name_or_path", "a/b", "--dataset_name", "c/d", "--output_dir", "unused"])
    numbers = {key for key, value in vars(args).items() if isinstance(value, (int, float)) and value is not False}
    unset = {"max_train_steps", "max_train_samples", "checkpoints_total_limit", "seed", "teacher_latents"}
    unset |= {"student_guidance_scale"}
    assert (numbers | unset) - {"local_rank"} == set(BOUNDS)


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(capsys: pytest.CaptureFixture[str], world: dict[str, str], name: str) -> None:
    flags, data, expected = BAD_INPUT[name]
    before = snapshot(world["root"])
    (sentence,) = complaints(capsys, command_line(world, flags, data))
    assert sentence.startswith(expected.format(**world))
    assert sentence.endswith(".") or "must be one of" in sentence
    assert snapshot(world["root"]) == before


def test_bitsandbytes_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, world: dict[str, str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    (sentence,) = complaints(capsys, command_line(world, ["--use_8bit_adam"]))
    assert sentence == "--use_8bit_adam needs bitsandbytes: pip install bitsandbytes."


def test_all_mistakes_are_reported_at_once(capsys: pytest.CaptureFixture[str], world: dict[str, str]) -> None:
    before = snapshot(world["root"])
    flags = ["--output_weight", "-1", "--snr_gamma", "5", "--resolution", "100", "--validation_steps", "0"]
    flags += ["--validation_epochs", "2", "--output_dir", "{root}/stopped", "--report_to", "abacus", "--offload_ema"]
    found = complaints(capsys, command_line(world, flags, []))
    named = [sentence.split()[0] for sentence in found]
    expected = ["--snr_gamma", "--validation_epochs", "--output_weight", "--validation_steps", "--resolution", "Give"]
    assert sorted(named) == sorted([*expected, "--output_dir", "--offload_ema", "--report_to"])
    assert snapshot(world["root"]) == before


@pytest.mark.parametrize(
    "flags", [["--nonsense"], ["--feature_weigh", "1"], ["--output_w", "1"], ["--train_data", "x"], ["--use_em"]]
)
def test_unknown_and_shortened_flags_are_refused(
    capsys: pytest.CaptureFixture[str], world: dict[str, str], flags: list[str]
) -> None:
    (sentence,) = complaints(capsys, command_line(world, flags))
    assert sentence == f"unrecognized arguments: {' '.join(flags)}"


def test_teacher_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    (sentence,) = complaints(capsys, ["--dataset_name", "a/b"])
    assert sentence.endswith("required: --pretrained_model_name_or_path")


def test_help_lists_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        dt.parse_args(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name, *_ in ACCEPTED:
        assert f"--{name}" in text
    for name, *_ in REFUSED:
        assert f"--{name} " not in text


@pytest.mark.parametrize(
    "flags",
    [
        ["--output_dir", "{root}/stopped", "--resume_from_checkpoint", "latest"],
        ["--output_dir", "{root}/stopped", "--resume_from_checkpoint", "checkpoint-2"],
        ["--output_dir", "{root}/stopped", "--resume_from_checkpoint", "{root}/stopped/checkpoint-2"],
        ["--output_dir", "{root}/new", "--resume_from_checkpoint", "{root}/stopped/checkpoint-2"],
        ["--output_dir", "{root}/new", "--resume_from_checkpoint", "latest"],
    ],
    ids=["latest", "name", "path", "path-elsewhere", "latest-of-none"],
)
def test_resuming_is_accepted(world: dict[str, str], flags: list[str]) -> None:
    dt.parse_args(command_line(world, flags))


def test_token_is_no_public_setting(world: dict[str, str]) -> None:
    args = dt.parse_args(command_line(world, ["--hub_token", "hf_secret", "--hub_model_id", "me/mine"]))
    public = dt.public_args(args)
    assert "hf_secret" not in repr(public)
    assert public["hub_model_id"] == "me/mine"
    assert args.hub_token == "hf_secret"  # still there for the upload
    assert set(vars(args)) - set(public) == {"hub_token"}


# ----------------------------------------------------------------------------------------------------------------
# What only the models and the data show.


def refusal(world: dict[str, str], tmp_path: Path, flags: list[str]) -> str:
    output = tmp_path / "output"
    args = dt.parse_args(command_line(world, ["--output_dir", str(output), "--resolution", "64", *flags]))
    before = snapshot(tmp_path)
    with pytest.raises(dt.UserError) as refused:
        dt.main(args)
    assert snapshot(tmp_path) == before and not output.exists()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_pipeline_of_another_class_is_refused(world: dict[str, str], tmp_path: Path, teacher: Path) -> None:
    shutil.copytree(teacher, tmp_path / "other")
    index = json.loads((teacher / "model_index.json").read_text()) | {"_class_name": "StableDiffusionXLPipeline"}
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index))
    sentence = refusal(world, tmp_path, ["--pretrained_model_name_or_path", str(tmp_path / "other")])
    assert sentence == (
        f"--pretrained_model_name_or_path {tmp_path}/other is a StableDiffusionXLPipeline; "
        "a StableDiffusionPipeline is needed."
    )


def test_inpainting_unet_is_refused(world: dict[str, str], tmp_path: Path) -> None:
    make_pipeline(tmp_path / "inpainting", in_channels=9)
    sentence = refusal(world, tmp_path, ["--pretrained_model_name_or_path", str(tmp_path / "inpainting")])
    assert "takes 9 channels where its VAE gives 4" in sentence


def test_whole_unet_as_student_is_refused(world: dict[str, str], tmp_path: Path) -> None:
    sentence = refusal(world, tmp_path, ["--student_model_name_or_path", world["teacher"]])
    assert sentence.startswith("--student_model_name_or_path ")


def test_compile_needs_a_compiler(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "absent -O2")
    monkeypatch.setattr(dt.torch.cuda, "is_available", lambda: False)
    sentences = complaints(capsys, command_line(world, ["--compile"]))
    assert sentences == ["--compile needs a compiler: absent is not there; install it or name one in CXX."]
    monkeypatch.setattr(dt.torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    sentences = complaints(capsys, command_line(world, ["--compile"]))
    assert sentences == ["--compile needs a compiler: gcc or clang is not there; install it or name one in CC."]
    (tmp_path / "clang").touch(mode=0o755)
    assert complaints(capsys, command_line(world, ["--compile", "--train_batch_size", "0"])) == [
        "--train_batch_size must be at least 1, got 0."
    ]


def assert_refused(code: object, stderr: str) -> str:
    """The one sentence that a run ended with."""
    assert code == 2, stderr
    assert "Traceback" not in stderr
    errors = [text for text in stderr.splitlines() if "error:" in text]
    assert len(errors) == 1 and stderr.splitlines()[-1] == errors[0], stderr
    program, _, sentence = errors[0].partition(": error: ")
    assert program == "distill_training.py"
    return sentence


def test_hub_name_without_network(world: dict[str, str], tmp_path: Path, launcher: Launcher) -> None:
    before = snapshot(tmp_path, world["teacher"], world["shards"])
    flags = ["--pretrained_model_name_or_path", "someone/absent", "--train_data_dir", world["shards"]]
    flags += ["--resolution", "64", "--output_dir", tmp_path / "output", "--cache_dir", tmp_path / "cache"]
    process = launcher.finish(flags, tmp_path.with_name("log"))
    sentence = assert_refused(process.returncode, process.stderr)
    assert snapshot(tmp_path, world["teacher"], world["shards"]) == before
    assert sentence.startswith("--pretrained_model_name_or_path someone/absent cannot be loaded")
    assert "the hub does not have it or is out of reach" in sentence


@pytest.fixture
def refused_run(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The script's own last lines run in this process, which saves the seconds of another start."""

    def run(flags: list[str], data: list[str] = DATA) -> str:
        before = snapshot(tmp_path, world["teacher"], world["shards"])
        flags = [*flags, "--resolution", "64", "--output_dir", str(tmp_path / "output")]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command_line(world, flags, data)])
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        after = snapshot(tmp_path, world["teacher"], world["shards"])
        assert before == {
            path: data for path, data in after.items() if tmp_path / "cache" not in (path, *path.parents)
        }
        return assert_refused(stopped.value.code, capsys.readouterr().err)

    return run


def test_fp16_on_a_cpu(refused_run: Callable[..., str], tmp_path: Path) -> None:
    sentence = refused_run(["--mixed_precision", "fp16"])
    assert sentence == "--mixed_precision fp16 needs a GPU: choose bf16 or no on a CPU."
    assert not any(tmp_path.iterdir())


def test_image_column_that_is_not_there(refused_run: Callable[..., str], tmp_path: Path) -> None:
    folder = write_imagefolder(tmp_path / "images", toy_images(2))
    data = ["--train_data_dir", str(folder), "--cache_dir", str(tmp_path / "cache")]
    sentence = refused_run(["--image_column", "picture"], data)
    assert sentence == "--image_column picture is not there; the columns are image, text."


def config_of(part: str, **changes: object) -> Callable[[Path], None]:
    """A teacher of which a part's config has other values; a file's name stands for `config.json` of the part."""

    def change(folder: Path) -> None:
        path = folder / part if part.endswith(".json") else folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def file_of(name: str, text: str | None) -> Callable[[Path], None]:
    """A teacher of which a file is another, or is not there."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        if text is not None:
            (folder / name).write_text(text)

    return change


def without(*parts: str) -> Callable[[Path], None]:
    return lambda folder: [shutil.rmtree(folder / part) for part in parts] and None


def without_vocabulary(folder: Path) -> None:
    for path in (folder / "tokenizer").iterdir():
        if path.name != "tokenizer_config.json":
            path.unlink()


def of_variant(*names: str) -> Callable[[Path], None]:
    """A teacher whose weights have these names: "{}" stands for the file's own."""

    def change(folder: Path) -> None:
        for path in list(folder.rglob("*.safetensors")):
            for name in names:
                shutil.copy(path, path.with_name(name.format(path.stem)))
            path.unlink()

    return change


VOCABULARY = "(tokenizer) has no vocabulary: vocab.json and merges.txt, or tokenizer.json, are missing."
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
PROJECTION = config_of("model_index.json", text_encoder=["transformers", "CLIPTextModelWithProjection"])
PARTS_AND_FLAGS: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "fewer tokens than the tokenizer": (
        config_of("text_encoder", vocab_size=9),
        [],
        "its text encoder 9 of them: save the text encoder with the embeddings",
    ),
    "another width": (
        config_of("text_encoder", hidden_size=8),
        [],
        "its text encoder gives 8 numbers a token, its U-Net attends to",
    ),
    "a variant": (of_variant("{}.fp16.safetensors"), [], "say --variant fp16."),
    "no vocabulary": (without_vocabulary, [], VOCABULARY),
    "no tokenizer": (without("tokenizer"), [], VOCABULARY),
    "no text encoder": (without("text_encoder"), [], "teacher has no text_encoder/config.json."),
    "no text encoder's config": (file_of("text_encoder/config.json", None), [], "has no text_encoder/config.json."),
    "no VAE": (without("vae"), [], "teacher (vae) cannot be loaded: "),
    "no scheduler": (without("scheduler"), [], "teacher (scheduler) cannot be loaded: "),
    "a part of another library": (
        config_of("model_index.json", upscaler=["mylib", "Upscaler"]),
        [],
        "The teacher's upscaler is named in its model_index.json and not there",
    ),
    "index a list": (file_of("model_index.json", "[]"), [], "cannot be loaded: its config is no JSON object"),
    "U-Net's config a list": (file_of("unet/config.json", "[]"), [], "(unet) cannot be loaded: its config is no"),
    "VAE's config null": (file_of("vae/config.json", "null"), [], "(vae) cannot be loaded: its config is no JSON"),
    "VAE's config without blocks": (
        file_of("vae/config.json", '{"_class_name": "AutoencoderKL"}'),
        [],
        "the config of its unet or vae is damaged (KeyError: 'block_out_channels').",
    ),
    "VAE's blocks null": (config_of("vae", block_out_channels=None), [], "is damaged (TypeError: "),
    "flow matching": (
        file_of("scheduler/scheduler_config.json", json.dumps(FLOW)),
        [],
        "scheduler (FlowMatchEulerDiscreteScheduler) has no beta_start and beta_schedule",
    ),
    "widths that differ": (
        config_of("unet", cross_attention_dim=[16, 16, 16, 8]),
        [],
        "its U-Net attends to [16, 16, 16, 8]: the text encoder is that of another model.",
    ),
    "single file of a projection": (
        PROJECTION,
        ["--export", "fp16", "single_file"],
        "--export single_file takes a CLIPTextModel; the text encoder of ",
    ),
    "variant in several files": (
        of_variant("{}.fp16-00001-of-00002.safetensors", "{}.fp16-00002-of-00002.safetensors"),
        [],
        "(text_encoder) cannot be loaded: it has no weights in *.safetensors. Its files are a variant's: "
        "say --variant fp16.",
    ),
    "two variants": (
        of_variant("{}.fp16.safetensors", "{}-00001-of-00001.bf16.safetensors"),
        [],
        "say --variant bf16 or fp16.",
    ),
    "variant of the U-Net alone": (
        lambda folder: of_variant("{}.fp16.safetensors")(folder / "unet"),
        [],
        "teacher (unet) cannot be loaded: it has no weights in *.safetensors. Its files are a variant's: say --var",
    ),
    "no such variant": (without(), ["--variant", "bf16"], "--variant bf16: "),
    "pickles": (of_variant("{}.bin"), [], "Only safetensors are read; if you trust its .bin weights, convert them"),
    "no weights": (of_variant(), [], "(text_encoder) cannot be loaded: it has no weights in *.safetensors."),
}


@pytest.mark.parametrize("name", PARTS_AND_FLAGS)
def test_a_teacher_with_a_fault(
    refused_run: Callable[..., str],
    world: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """What configs and file names show is said before any weights are read."""
    change, flags, expected = PARTS_AND_FLAGS[name]
    folder = tmp_path_factory.mktemp("t") / "teacher"
    shutil.copytree(world["teacher"], folder)
    change(folder)
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", None)
    monkeypatch.setattr(CLIPTextModel, "from_pretrained", None)
    sentence = refused_run(["--pretrained_model_name_or_path", str(folder), *flags])
    assert expected in sentence
    assert ("convert" in sentence) == (name == "pickles")


@pytest.mark.parametrize(
    ("change", "variant", "said"),
    [
        (of_variant("{}.fp16.safetensors"), None, "someone/tiny (text_encoder) cannot be loaded: it has no weights"),
        (without(), "fp16", "--variant fp16: --pretrained_model_name_or_path someone/tiny has no "),
    ],
)
def test_a_variant_on_the_hub(
    refused_run: Callable[..., str],
    world: dict[str, Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    change: Callable[[Path], None],
    variant: str | None,
    said: str,
) -> None:
    folder = tmp_path_factory.mktemp("t") / "teacher"
    shutil.copytree(world["teacher"], folder)
    change(folder)
    flags = ["--pretrained_model_name_or_path", "someone/tiny", "--cache_dir", str(hub_cache(tmp_path / "c", folder))]
    sentence = refused_run([*flags, *(["--variant", variant] if variant else [])])
    assert said in sentence and "out of reach" not in sentence
    assert variant or sentence.endswith("say --variant fp16.")


def test_a_schedule_that_its_library_refuses(refused_run: Callable[..., str]) -> None:
    sentence = refused_run(["--lr_scheduler", "polynomial", "--learning_rate", "1e-7"])
    assert sentence.startswith("--lr_scheduler polynomial with a learning rate of 1e-07: ")


@pytest.mark.parametrize(
    "length", [["--max_train_steps", "10"], ["--num_train_epochs", "2", "--train_batch_size", "4"]]
)
def test_a_warm_up_that_takes_all_steps(refused_run: Callable[..., str], length: list[str]) -> None:
    """The schedule divides by zero in the last step, with 20 images too."""
    whole = ["--lr_scheduler", "polynomial", "--lr_warmup_steps", "10", "--fidelity_samples", "0"]
    sentence = refused_run([*whole, *length])
    assert sentence == "--lr_scheduler polynomial: --lr_warmup_steps 10 must not be all of the 10 steps."


def test_wandb_without_a_login(world: dict[str, str], tmp_path: Path, launcher: Launcher) -> None:
    home = {"WANDB_API_KEY": "", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_MODE": "online"}
    line = command_line(world, ["--report_to", "wandb", "--resolution", "64", "--output_dir", str(tmp_path / "out")])
    done = launcher.finish(line, tmp_path / "log", ACCELERATE_USE_CPU="true", **home)
    sentence = assert_refused(done.returncode, done.stderr)
    assert not (tmp_path / "out").exists()
    assert sentence.startswith("--report_to wandb: ") and "wandb" in sentence.removeprefix("--report_to wandb: ")


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_a_launcher_whose_processes_are_not_seen(
    world: dict[str, str], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    args = dt.parse_args(command_line(world, []))
    monkeypatch.setenv(variable, "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(dt.UserError, match=f"^{variable} is 2, but accelerate sees 1 process: .* unset {variable}.$"):
        dt.make_accelerator(args)


def test_more_processes_launched_than_seen(world: dict[str, str], tmp_path: Path, launcher: Launcher) -> None:
    line = [*command_line(world, []), "--resolution", "64", "--output_dir", str(tmp_path / "out")]
    run = launcher.start(line, tmp_path / "log", ranks=2, CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="false")
    assert run.wait() == [2, 2] and not (tmp_path / "out").exists(), run.log()
    for rank in (0, 1):
        assert "error: WORLD_SIZE is 2, but accelerate sees 1 process: " in run.log(rank)


def test_images_as_text_that_names_no_file(refused_run: Callable[..., str], tmp_path: Path) -> None:
    rows = {"image": ["aGVsbG8=" * 2000], "text": ["a red circle"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "table" / "a.parquet")
    data = ["--dataset_name", str(tmp_path / "table"), "--cache_dir", str(tmp_path / "cache")]
    assert refused_run([], data).startswith("--image_column image holds text that names no file here ('aGVsbG8=")


def test_a_parquet_file_that_is_cut_is_named(refused_run: Callable[..., str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        datasets.Dataset.from_dict({"image": ["x"], "text": ["a"]}).to_parquet(tmp_path / "table" / f"{name}.parquet")
    path = tmp_path / "table" / "b.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    data = ["--dataset_name", str(tmp_path / "table"), "--cache_dir", str(tmp_path / "cache")]
    assert refused_run([], data).endswith("(b.parquet is damaged or cut)")


def test_a_configuration_must_be_chosen(refused_run: Callable[..., str], tmp_path: Path) -> None:
    for name in ("day", "night"):
        rows = datasets.Dataset.from_dict({"image": ["x"], "text": ["a"]})
        rows.to_parquet(tmp_path / "table" / name / "train.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("day", "night"))
    (tmp_path / "table" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    data = ["--dataset_name", str(tmp_path / "table"), "--cache_dir", str(tmp_path / "cache")]
    sentence = refused_run([], data)
    assert "choose one with --dataset_config_name, of ['day', 'night']." in sentence


def test_what_save_to_disk_wrote_is_read(tmp_path: Path, teacher: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": toy_images(1)[0][0], "path": None}], "text": ["a red circle"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    assert dataset_of(data_args(teacher, dataset_name=tmp_path / "saved")).example(0, 0)["caption"] == "a red circle"
