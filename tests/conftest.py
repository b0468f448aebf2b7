"""A toy Stable Diffusion pipeline and toy pictures, made on the spot from the real classes."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from PIL import Image  # noqa: E402
from servers import data_folder, hub_server, image_server  # noqa: E402, F401  (fixtures)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

torch.set_num_threads(1)
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # seconds; a shuffled stream sleeps 5 after every epoch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "distill_training.py"
WORDS = ["a", "red", "green", "blue", "circle", "square", "on", "background"]

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16, 16),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def make_tokenizer() -> CLIPTokenizer:
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


def toy_pictures(count: int, size: tuple[int, int] = (64, 64)) -> list[tuple[bytes, str]]:
    """`count` PNG files, all different, with captions."""
    pictures = []
    for i in range(count):
        gradient = torch.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0])
        channels = [gradient, gradient.flip(0), torch.full_like(gradient, 5 * i % 256)]
        image = Image.fromarray(torch.stack(channels, -1).to(torch.uint8).numpy())
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        pictures.append((buffer.getvalue(), f"a {WORDS[1 + i % 3]} {WORDS[4 + i % 2]} no {'abcdefghij'[i % 10]}"))
    return pictures


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


def write_shards(folder: Path, pictures: list[tuple[bytes, str]], per_shard: int = 8) -> Path:
    for start in range(0, len(pictures), per_shard):
        samples = [{"png": data, "txt": text.encode()} for data, text in pictures[start : start + per_shard]]
        write_tar(folder / f"{start // per_shard:05d}.tar", samples, start)
    return folder


def write_imagefolder(folder: Path, pictures: list[tuple[bytes, str]]) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for number, (data, text) in enumerate(pictures):
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


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the precision of a process's first accelerator for good."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), toy_pictures(20))
