"""What test modules and benchmarks share: toy models and data, whole runs, and comparisons of what comes out."""

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import distill_training as dt

if TYPE_CHECKING:  # the benchmarks import this module without pytest
    import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "distill_training.py"
WORDS = ["a", "red", "green", "blue", "circle", "square", "on", "background"]
# For a process that has no conftest.py: a shuffled stream sleeps five seconds after every epoch otherwise.
QUICK_STREAMS = "import datasets; datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1"

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16, 16),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def components_of(teacher: Path, level: str = "sd_tiny", **others: Any) -> dt.Components:
    """The models of a run as `main` loads them, a student of this level among them; `others` take their place."""
    teacher_unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet")
    loaded = {
        "tokenizer": make_tokenizer(),
        "noise_scheduler": DDPMScheduler.from_pretrained(teacher, subfolder="scheduler"),
        "text_encoder": CLIPTextModel.from_pretrained(teacher, subfolder="text_encoder"),
        "vae": AutoencoderKL.from_pretrained(teacher, subfolder="vae"),
        "unet": dt.build_student(teacher_unet, level),
        "teacher_unet": teacher_unet,
    }
    return dt.Components(**(loaded | others))


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with letters for its vocabulary."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)


def make_pipeline(folder: Path, *, prediction_type: str = "epsilon", half: bool = False, **unet: Any) -> Path:
    """Save a random pipeline of the Stable Diffusion 1.x shape at toy width; `unet` overrides the U-Net's config."""
    torch.manual_seed(0)
    unet_config = UNET_CONFIG | unet
    tokenizer = make_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=unet_config["cross_attention_dim"],
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=1,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**unet_config),
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16 if half else torch.float32).save_pretrained(folder)
    return folder


def hub_cache(folder: Path, teacher: Path) -> Path:
    """The cache of a machine without a network that has fetched `teacher` as someone/tiny: links into blobs."""
    repository, commit = folder / "models--someone--tiny", "0" * 40
    for path in teacher.rglob("*"):
        if path.is_file():
            link = repository / "snapshots" / commit / path.relative_to(teacher)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob = repository / "blobs" / "-".join(path.relative_to(teacher).parts)
            blob.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, blob)
            link.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return folder


def toy_images(count: int, size: tuple[int, int] = (64, 64)) -> list[tuple[bytes, str]]:
    """`count` PNG files, all different, with captions."""
    images = []
    for i in range(count):
        gradient = torch.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0])
        channels = [gradient, gradient.flip(0), torch.full_like(gradient, 5 * i % 256)]
        image = Image.fromarray(torch.stack(channels, -1).to(torch.uint8).numpy())
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        images.append((buffer.getvalue(), f"a {WORDS[1 + i % 3]} {WORDS[4 + i % 2]} no {'abcdefghij'[i % 10]}"))
    return images


def write_tar(path: Path, samples: list[dict[str, bytes]], first: int = 0) -> Path:
    """A WebDataset shard: `samples` map suffixes to contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples, start=first):
            for suffix, data in sample.items():
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder: Path, images: list[tuple[bytes, str]], per_shard: int = 8) -> Path:
    """WebDataset shards of images with captions in `.txt` files."""
    for start in range(0, len(images), per_shard):
        samples = [{"png": data, "txt": text.encode()} for data, text in images[start : start + per_shard]]
        write_tar(folder / f"{start // per_shard:05d}.tar", samples, start)
    return folder


def write_imagefolder(folder: Path, images: list[tuple[bytes, str]]) -> Path:
    """A folder of images with their captions in `metadata.jsonl`."""
    folder.mkdir(parents=True)
    lines = []
    for number, (data, text) in enumerate(images):
        (folder / f"{number:05d}.png").write_bytes(data)
        lines.append(json.dumps({"file_name": f"{number:05d}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def run_script(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python distill_training.py ...` in a process of its own."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


def flags(teacher: Path, data: Path, output: Path, **settings: Any) -> list[str]:
    """The command line of a small run: `settings` replace its defaults; None and False leave a flag out."""
    defaults = {
        "pretrained_model_name_or_path": teacher,
        "train_data_dir": data,
        "output_dir": output,
        "resolution": 64,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "seed": 11,
        "report_to": "none",
        "fidelity_samples": 0,
    }
    line = []
    for name, value in {**defaults, **settings}.items():
        if value is True:
            line.append(f"--{name}")
        elif isinstance(value, (list, tuple)):
            line += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            line += [f"--{name}", str(value)]
    return line


def train(*args: Any, **settings: Any) -> None:
    """Run the trainer in this process with `flags` of the same arguments."""
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision is kept between runs otherwise
    dt.main(dt.parse_args(flags(*args, **settings)))


@contextlib.contextmanager
def watched(
    monkeypatch: "pytest.MonkeyPatch", look: Callable[[dt.Distillation], Any] = lambda run: run
) -> Iterator[list[Any]]:
    """What `look` sees before every step that is taken inside: by itself, its `Distillation`."""
    seen: list[Any] = []
    step = dt.training_step

    def watch(run: dt.Distillation, *args: Any) -> Any:
        seen.append(look(run))
        return step(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(dt, "training_step", watch)
        yield seen


def data_args(teacher: Path, **settings: object) -> argparse.Namespace:
    """Parsed flags of a run whose data alone is looked at."""
    defaults = {"resolution": 32, "train_batch_size": 4, "seed": 3, "center_crop": True, "proportion_empty_prompts": 0}
    defaults["fidelity_samples"] = 0
    line = ["--pretrained_model_name_or_path", str(teacher), "--output_dir", "unused-output"]
    for name, value in {**defaults, **settings}.items():
        if value is not False:
            line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return dt.parse_args(line)


def dataset_of(args: argparse.Namespace) -> dt.DistillationDataset | dt.StreamingDataset:
    """The training samples that a run with these flags has."""
    return dt.make_train_dataset(args, make_tokenizer(), Accelerator(cpu=True))


def new_run(teacher: Path, accelerator: Accelerator | None = None, encodes: bool = False, **settings: Any) -> Any:
    """A run as `main` builds it, of one thousand steps."""
    defaults = {"dataset_name": "of/none", "distill_level": "sd_tiny", "lr_warmup_steps": 0}
    args = data_args(teacher, **(defaults | settings))
    args.max_train_steps = 1000
    accelerator = accelerator or Accelerator(cpu=True)
    return dt.make_run(args, accelerator, components_of(teacher), dt.RunState(), encodes=encodes)


def unet_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved U-Net by name."""
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def scalars(output: Path) -> dict[str, dict[int, float]]:
    """What a run logged to TensorBoard: tag to step to value."""
    events = [EventAccumulator(str(path.parent)).Reload() for path in output.rglob("events.out*")]
    found: dict[str, dict[int, float]] = {}
    for accumulator in events:
        for tag in accumulator.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in accumulator.Scalars(tag)})
    return found


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """The same tensors under the same names."""
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


def same_tensors(left: nn.Module, right: nn.Module) -> bool:
    """Whether two modules have the same parameters and buffers."""
    found, wanted = left.state_dict(), right.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def assert_same_nested(left: Any, right: Any, where: str = "") -> None:
    """Equal to the last bit, whatever is nested in it."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), where
    elif isinstance(left, Mapping):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same_nested(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same_nested(one, other, f"{where}.{index}")
    else:
        assert left == right, where


def assert_same_batches(left: list[dict[str, torch.Tensor]], right: list[dict[str, torch.Tensor]]) -> None:
    """Equal batches, or single samples, and not none at all."""
    assert len(left) == len(right) > 0
    assert_same_nested(left, right)


def assert_same_checkpoint(left: Path, right: Path) -> None:
    """The same files with the same content, but for how far the run was to go."""
    files = [{str(path.relative_to(root)) for path in root.rglob("*")} for root in (left, right)]
    assert files[0] == files[1]
    for name in ("unet", "unet_ema"):
        if (left / name).is_dir():
            assert_equal(unet_weights(left / name), unet_weights(right / name))
            assert_same_nested(
                *(json.loads((root / name / "config.json").read_text()) for root in (left, right)), name
            )
    for name in ("optimizer.bin", "scheduler.bin"):
        states = [torch.load(root / name, weights_only=True) for root in (left, right)]
        for state in states:
            state.pop("_step_count", None)  # calls of `step`, which torch keeps for a warning only
        assert_same_nested(*states, name)
    states = [json.loads((root / "trainer_state.json").read_text()) for root in (left, right)]
    for state in states:
        del state["max_train_steps"]  # how far the run was to go
    assert_same_nested(*states, "trainer_state")
