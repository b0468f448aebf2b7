#!/usr/bin/env python
"""A tiny world of coloured shapes, and a Stable Diffusion pipeline trained from nothing to paint it.

    python tests/make_tiny_sd.py --output_dir tests

draws the images, trains autoencoder, text encoder and U-Net, and writes

    tests/tiny-sd/                 the pipeline: the full Stable Diffusion 1.x shape at toy width, 64 pixels
    tests/shapes/train/*.tar       captioned images as WebDataset shards, named as img2dataset names them
    tests/shapes/eval/*.tar        the same for the captions that nothing was trained on

The world: one shape (circle, square, triangle, star) in one of eight colours on a background of another colour, 224
triples in all, position and size varied. 96 triples (43 %) are held out: they are the evaluation prompts, and no
image of them is drawn for training, neither of the teacher nor in `shapes/train`. Every pair of colours occurs in
training with two shapes or three, so a held-out triple is a new combination of known words.

The committed files were made by this command on one NVIDIA H100 in 233 seconds: 54 for the autoencoder, 150 for the
U-Net and the text encoder, 21 for the judging at the end. All 96 held-out prompts came out right with each of three
seeds. Two shorter runs there (100 steps each) gave the same bytes. On a CPU it takes hours: one of the 4,000 U-Net
steps took 5 to 7 seconds on one busy core, and it wasn't run to the end. Guidance around 3 suits this world; 7.5 blurs
an outline now and then.
"""

import argparse
import io
import json
import os
import random
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE = 64
SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (230, 30, 30),
    "green": (30, 180, 50),
    "blue": (40, 50, 230),
    "yellow": (250, 230, 40),
    "magenta": (230, 40, 220),
    "cyan": (40, 220, 230),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
}
HELD_OUT = 96
SEED = 0
UNET_CHANNELS = (32, 32, 64, 64)
KL_WEIGHT = 5e-6
TOKENS = 16  # the longest prompt in tokens, begin and end included; the captions of this world take 9 or 12

Triple = tuple[str, str, str]  # shape, colour, background
Reading = tuple[str | None, str | None, str | None]  # the same as the judge reads it, None where it can't


# ---------------------------------------------------------------------------------------------------------------------
# The world
# ---------------------------------------------------------------------------------------------------------------------


def _outline(shape: str) -> np.ndarray:
    """The outline of a shape around the origin, [points, 2], y downwards, of about the same extent for all shapes."""
    if shape == "circle":
        turns, radii = np.linspace(0, 1, 96, endpoint=False), np.full(96, 0.85)
    elif shape == "square":
        turns, radii = np.arange(4) / 4 + 1 / 8, np.full(4, 1.05)
    elif shape == "triangle":
        turns, radii = np.arange(3) / 3, np.full(3, 1.05)
    elif shape == "star":
        turns, radii = np.arange(10) / 10, np.tile([1.05, 0.47], 5)
    else:
        raise ValueError(f"no shape {shape!r} in this world, only {', '.join(SHAPES)}")
    angles = 2 * np.pi * turns
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def draw(shape: str, color: str, background: str, rng: random.Random) -> Image.Image:
    """One image of the world, RGB, 64 x 64.

    `rng` gives the size (24 to 34 % of the side as radius) and the centre (within 10 % of the side around the
    middle), so the same state of `rng` draws the same image. It is drawn at four times the size and shrunk.
    """
    radius = SIZE * rng.uniform(0.24, 0.34)
    centre = [SIZE * (0.5 + rng.uniform(-0.1, 0.1)) for _ in range(2)]
    large = Image.new("RGB", (4 * SIZE, 4 * SIZE), COLORS[background])
    points = 4 * (_outline(shape) * radius + centre)
    ImageDraw.Draw(large).polygon([tuple(point) for point in points.tolist()], fill=COLORS[color])
    return large.resize((SIZE, SIZE), Image.Resampling.BOX)


def caption(shape: str, color: str, background: str) -> str:
    """The caption of a triple, e.g. "a red circle on a blue background"."""
    return f"a {color} {shape} on a {background} background"


def all_triples() -> list[Triple]:
    """All 224 combinations of shape, colour and another colour as background, in a fixed order."""
    return [(s, c, b) for c in COLORS for b in COLORS if c != b for s in SHAPES]


def evaluation_prompts() -> list[Triple]:
    """The 96 triples held out of all training, always the same, 24 of each shape; `caption(*triple)` is the prompt.

    One or two of the four shapes are held out for each of the 56 ordered pairs of colours.
    """
    rng = random.Random(0)
    pairs = [(c, b) for c in COLORS for b in COLORS if c != b]
    rng.shuffle(pairs)
    held_out, count = [], dict.fromkeys(SHAPES, 0)
    for number, (color, background) in enumerate(pairs):
        shapes = sorted(SHAPES, key=lambda shape: (count[shape], rng.random()))
        for shape in shapes[: 2 if number < HELD_OUT - len(pairs) else 1]:
            held_out.append((shape, color, background))
            count[shape] += 1
    return held_out


def training_triples() -> list[Triple]:
    """The 128 triples that aren't evaluation prompts, in a fixed order."""
    held_out = set(evaluation_prompts())
    return [triple for triple in all_triples() if triple not in held_out]


# ---------------------------------------------------------------------------------------------------------------------
# The judge
# ---------------------------------------------------------------------------------------------------------------------


@cache
def _stencil(shape: str) -> np.ndarray:
    """A shape of area 1 around its centroid, as booleans [401, 401] over the square from -1 to 1."""
    outline = _outline(shape)
    x, y = outline.T
    cross = x * np.roll(y, -1) - y * np.roll(x, -1)
    outline = outline / np.sqrt(abs(cross.sum()) / 2)  # the centroid is the origin already, by symmetry
    stencil = Image.new("1", (401, 401))
    ImageDraw.Draw(stencil).polygon([tuple(point) for point in (200 + 200 * outline).tolist()], fill=1)
    return np.asarray(stencil)


def _overlap(mask: np.ndarray, shape: str) -> float:
    """Intersection over union of a mask, [64, 64] in 0..1, and the shape that has its area and its centroid."""
    side = np.sqrt(mask.sum())
    middles = np.arange(SIZE) + 0.5
    centre_y = (mask.sum(1) * middles).sum() / mask.sum()
    centre_x = (mask.sum(0) * middles).sum() / mask.sum()
    fine = (np.arange(4 * SIZE) + 0.5) / 4  # each pixel is looked up at 4 x 4 points
    rows = np.clip(np.round(200 + 200 * (fine - centre_y) / side), 0, 400).astype(int)
    columns = np.clip(np.round(200 + 200 * (fine - centre_x) / side), 0, 400).astype(int)
    ideal = _stencil(shape)[rows][:, columns].reshape(SIZE, 4, SIZE, 4).mean((1, 3))
    return float(np.minimum(mask, ideal).sum() / np.maximum(mask, ideal).sum())


def judge(image: Image.Image) -> Reading:
    """Read shape, colour and background off an image; None for each that can't be read.

    Nothing here is learnt. A pixel has a colour if it is within 85 of it (Euclidean, RGB; no two colours are nearer
    than 160 to each other).
    - Background: the colour of at least 90 % of the pixels along the border.
    - Colour: the colour, other than the background, of at least 5 % of all pixels and of at least 80 % of those
      that have a colour other than the background.
    - Shape: every pixel is placed on the line from background to colour. At least 95 % of them must lie near that
      line, else the image is no flat shape. What is left is a mask between 0 and 1, compared with each of the four
      shapes drawn at the mask's own area and centroid. The best intersection over union names the shape, if it is at
      least 0.85 and 0.02 above the second best: a wobbly outline passes, a blot, two shapes or a bar does not.
    """
    pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64)
    names, palette = list(COLORS), np.array(list(COLORS.values()), dtype=np.float64)
    distance = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    nearest = np.where(distance.min(-1) < 85, distance.argmin(-1), -1)

    border = np.concatenate([nearest[0], nearest[-1], nearest[1:-1, 0], nearest[1:-1, -1]])
    ground = int(np.bincount(border + 1, minlength=len(names) + 1)[1:].argmax())
    if (border == ground).mean() < 0.9:
        return None, None, None

    counts = np.bincount(nearest.ravel() + 1, minlength=len(names) + 1)[1:]
    counts[ground] = 0
    ink = int(counts.argmax())
    if counts[ink] < 0.05 * SIZE * SIZE or counts[ink] < 0.8 * counts.sum():
        return None, None, names[ground]

    line = palette[ink] - palette[ground]
    place = (pixels - palette[ground]) @ line / (line @ line)
    off_line = np.linalg.norm(pixels - palette[ground] - place[..., None] * line, axis=-1)
    if (off_line < 70).mean() < 0.95:
        return None, names[ink], names[ground]
    mask = np.clip(place, 0, 1)
    overlaps = sorted(((_overlap(mask, shape), shape) for shape in SHAPES), reverse=True)
    (best, shape), (second, _) = overlaps[:2]
    return shape if best >= 0.85 and best - second >= 0.02 else None, names[ink], names[ground]


def caption_accuracy(
    pipeline: StableDiffusionPipeline,
    triples: Sequence[Triple],
    seed: int,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
    batch_size: int = 48,
) -> dict[str, float]:
    """Paint one image for each triple and let the judge read it.

    Image number i starts from its own noise, drawn from `seed` and i alone (and from none of the seeds used in
    training), so that two pipelines can be compared on the same noise whatever the batch size. The sampler is
    DPM-Solver++, whatever scheduler the pipeline has; the pipeline itself isn't changed.

    Returns the fractions that are right: `shape`, `color`, `background`, and `all` three at once.
    """
    images = paint(pipeline, triples, seed, num_inference_steps, guidance_scale, batch_size)
    right = np.array(
        [[a == b for a, b in zip(judge(i), t, strict=True)] for i, t in zip(images, triples, strict=True)]
    )
    fractions = dict(zip(("shape", "color", "background"), right.mean(0).tolist(), strict=True))
    return fractions | {"all": float(right.all(1).mean())}


def paint(
    pipeline: StableDiffusionPipeline,
    triples: Sequence[Triple],
    seed: int,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
    batch_size: int = 48,
) -> list[Image.Image]:
    """The images that `caption_accuracy` judges, one for each triple."""
    sampler = StableDiffusionPipeline(
        **pipeline.components | {"scheduler": DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)},
        requires_safety_checker=False,
    )
    sampler.set_progress_bar_config(disable=True)
    unet = pipeline.unet
    size = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    seeds = [1_000_000 * (seed + 1) + number for number in range(len(triples))]
    noise = torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(s)) for s in seeds])
    images = []
    for start in range(0, len(triples), batch_size):
        images += sampler(
            [caption(*triple) for triple in triples[start : start + batch_size]],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            latents=noise[start : start + batch_size].to(unet.device, unet.dtype),
        ).images
    return images


# ---------------------------------------------------------------------------------------------------------------------
# Images and shards
# ---------------------------------------------------------------------------------------------------------------------


def _draw_array(task: tuple[Triple, int]) -> np.ndarray:
    triple, seed = task
    return np.asarray(draw(*triple, random.Random(seed)))


def draw_many(triples: Sequence[Triple], first_seed: int) -> np.ndarray:
    """One image for each triple, uint8 [n, 64, 64, 3], drawn on all cores; image i has the seed first_seed + i."""
    tasks = [(triple, first_seed + number) for number, triple in enumerate(triples)]
    with ProcessPoolExecutor() as pool:
        return np.stack(list(pool.map(_draw_array, tasks, chunksize=500)))


def write_shards(folder: Path, triples: Sequence[Triple], first_seed: int, per_shard: int) -> None:
    """Write one captioned image for each triple as `00000.tar`, `00001.tar`, ..., the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, len(triples), per_shard)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, triple in enumerate(triples[start : start + per_shard]):
                jpeg = io.BytesIO()
                image = draw(*triple, random.Random(first_seed + start + number))
                image.save(jpeg, "JPEG", quality=95, subsampling=0)
                for suffix, data in (("jpg", jpeg.getvalue()), ("txt", caption(*triple).encode())):
                    member = tarfile.TarInfo(f"{shard:05d}{number:04d}.{suffix}")  # mtime 0, no owner
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


# ---------------------------------------------------------------------------------------------------------------------
# The models
# ---------------------------------------------------------------------------------------------------------------------


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer over 26 letters and the words of the world; any other word falls into shorter pieces.

    So does "green": the pair "re" of "red" is merged first, and g, re, e, n are left. Harmless: 9 tokens become 12.
    """
    words = ["a", "on", "background", *SHAPES, *COLORS]
    letters = [chr(ord("a") + i) for i in range(26)]
    merges, tokens = [], [*letters, *(letter + "</w>" for letter in letters)]
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
                tokens.append(parts[0] + parts[1])
            parts[:2] = [parts[0] + parts[1]]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True, exist_ok=True)
    # As published tokenizers have them; transformers 5 writes tokenizer.json alone, which transformers 4 cannot read.
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        force_upcast=False,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=UNET_CHANNELS,
        layers_per_block=2,
        cross_attention_dim=64,
        attention_head_dim=4,  # the number of heads, as everywhere in Stable Diffusion 1.x
        norm_num_groups=8,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(
    models: Sequence[torch.nn.Module],
    loss_function: Callable[[], torch.Tensor],
    steps: int,
    learning_rate: float,
    description: str,
) -> None:
    """Train `models` on `loss_function()` with AdamW over one learning rate cycle; they end as their moving average.

    On a GPU the whole step, the drawing of the batch included, is one CUDA graph: at this size a step is bound by the
    launching of its kernels.
    """
    parameters = [parameter for model in models for parameter in model.parameters()]
    device = parameters[0].device
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        parameters,
        lr=torch.tensor(learning_rate, device=device),
        betas=(0.9, 0.99),
        weight_decay=1e-3,
        capturable=on_gpu,
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, steps, pct_start=0.1, cycle_momentum=False
    )
    averages = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98)) for model in models]

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_function()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach()

    replay = _as_cuda_graph(step, parameters, optimizer) if on_gpu else step
    progress = tqdm(range(steps), desc=description, mininterval=5)
    for number in progress:
        loss = replay()
        scheduler.step()
        if number % 10 == 9:  # every tenth step is enough, and much cheaper
            for average, model in zip(averages, models, strict=True):
                average.update_parameters(model)
        if number % 500 == 499 or number == steps - 1:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    for average, model in zip(averages, models, strict=True):
        model.load_state_dict(average.module.state_dict())


def _as_cuda_graph(
    step: Callable[[], torch.Tensor], parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> Callable[[], torch.Tensor]:
    """Record `step` as a CUDA graph; the three warm-up steps that this takes are undone."""
    before = [parameter.detach().clone() for parameter in parameters]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad():
        torch._foreach_copy_(list(parameters), before)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return loss

    return replay


def train_vae(vae: AutoencoderKL, images: torch.Tensor, steps: int, batch_size: int) -> None:
    """Train the autoencoder on images, uint8 [n, 3, 64, 64]: absolute and squared error and a little KL."""

    def loss_function() -> torch.Tensor:
        index = torch.randint(len(images), (batch_size,), device=images.device)
        batch = images[index].float() / 127.5 - 1
        posterior = vae.encode(batch).latent_dist
        error = vae.decode(posterior.sample()).sample - batch
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean()

    train([vae], loss_function, steps, 2e-3, "autoencoder")


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents of images, uint8 [n, 3, 64, 64]: twice [n, 4, 8, 8], unscaled."""
    posteriors = [vae.encode(lot.float() / 127.5 - 1).latent_dist for lot in images.split(500)]
    return torch.cat([p.mean for p in posteriors]).contiguous(), torch.cat([p.std for p in posteriors]).contiguous()


@torch.no_grad()
def reconstruction_accuracy(vae: AutoencoderKL, triples: Sequence[Triple], first_seed: int) -> float:
    """How often the judge reads an image right after it went through the autoencoder."""
    drawn = np.stack([_draw_array((triple, first_seed + number)) for number, triple in enumerate(triples)])
    latents, _ = encode(vae, torch.from_numpy(drawn).permute(0, 3, 1, 2).to(vae.device))
    decoded = torch.cat([vae.decode(lot).sample for lot in latents.split(100)])
    arrays = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return float(np.mean([judge(Image.fromarray(a)) == t for a, t in zip(arrays, triples, strict=True)]))


def train_diffusion(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    latents: tuple[torch.Tensor, torch.Tensor],
    captions: Sequence[str],
    noise_scheduler: DPMSolverMultistepScheduler,
    steps: int,
    batch_size: int,
) -> None:
    """Train U-Net and text encoder to predict the noise, one caption in ten left empty for guidance.

    `latents` are mean and standard deviation, scaled, each [n, 4, 8, 8]; `captions` the n captions.
    """
    mean, std = latents
    device = mean.device
    distinct = ["", *dict.fromkeys(captions)]
    ids = tokenizer(distinct, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids.to(device)
    number_of = torch.tensor([distinct.index(text) for text in captions], device=device)
    alphas = noise_scheduler.alphas_cumprod.to(device)

    def loss_function() -> torch.Tensor:
        index = torch.randint(len(mean), (batch_size,), device=device)
        clean = mean[index] + std[index] * torch.randn_like(mean[index])
        noise = torch.randn_like(clean)
        timesteps = torch.randint(len(alphas), (batch_size,), device=device)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        number = number_of[index] * (torch.rand(batch_size, device=device) >= 0.1)
        # All captions go through the text encoder once and are picked by a product: its gradient, unlike that of
        # indexing, is summed in a fixed order.
        chosen = torch.nn.functional.one_hot(number, len(distinct)).to(clean.dtype)
        embeddings = text_encoder(ids).last_hidden_state
        hidden = (chosen @ embeddings.flatten(1)).view(batch_size, *embeddings.shape[1:])
        prediction = unet(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, timesteps, hidden).sample
        return torch.nn.functional.mse_loss(prediction, noise)

    train([unet, text_encoder], loss_function, steps, 2e-3, "U-Net and text encoder")


# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--output_dir", type=Path, default=Path(__file__).parent, help="Where tiny-sd/ and shapes/ go."
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--pictures", type=int, default=40_000, help="Number of images to train on.")
    parser.add_argument("--vae_steps", type=int, default=4_000, help="Steps of 64 images for the autoencoder.")
    parser.add_argument(
        "--unet_steps", type=int, default=4_000, help="Steps of 512 latents for text encoder and U-Net."
    )
    args = parser.parse_args(argv)
    for flag, least in (("pictures", 128), ("vae_steps", 20), ("unet_steps", 20)):
        if getattr(args, flag) < least:
            parser.error(f"--{flag} must be at least {least}, not {getattr(args, flag)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device was found; --device cpu works, slowly")
    return args


def main(args: argparse.Namespace) -> None:
    start = time.monotonic()
    folder, shapes = args.output_dir / "tiny-sd", args.output_dir / "shapes"
    print(
        f"Draws {args.pictures} images, trains an autoencoder for {args.vae_steps} steps and a text encoder and a "
        f"U-Net for {args.unet_steps} steps on {args.device}, and writes {folder} and {shapes}.",
        flush=True,
    )

    # 1. The same numbers every time on the same hardware.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("high")

    # 2. The shards that are committed, and the images that only this script sees; each has seeds of its own.
    train_triples, held_out = training_triples(), evaluation_prompts()
    random.Random(SEED).shuffle(train_triples)
    write_shards(shapes / "train", repeat(train_triples, 800), first_seed=1_000_000, per_shard=200)
    write_shards(shapes / "eval", repeat(held_out, 192), first_seed=2_000_000, per_shard=192)
    triples = repeat(train_triples, args.pictures)
    images = torch.from_numpy(draw_many(triples, first_seed=3_000_000)).permute(0, 3, 1, 2).to(args.device)

    # 3. The autoencoder; rounded to what is stored before anything is built on its latents.
    vae = build_vae().to(args.device)
    train_vae(vae, images, args.vae_steps, batch_size=64)
    round_to_half(vae.eval())
    mean, std = encode(vae, images)
    scale = 1 / (mean + std * torch.randn_like(mean)).std().item()  # of samples, as the U-Net sees them
    vae.register_to_config(scaling_factor=scale)

    # 4. The U-Net and the text encoder.
    tokenizer = build_tokenizer(folder / "tokenizer")
    text_encoder = build_text_encoder(tokenizer).to(args.device)
    unet = build_unet().to(args.device)
    # Stable Diffusion 1.x has PNDM, which at 25 steps and guidance 7.5 paints nothing readable in this world.
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    captions = [caption(*triple) for triple in triples]
    latents = (mean * scale, std * scale)
    train_diffusion(unet, text_encoder, tokenizer, latents, captions, scheduler, args.unet_steps, batch_size=512)

    # 5. Save: U-Net and autoencoder in half precision, the text encoder in single.
    StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    as_published(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"Wrote {folder} ({size / 1e6:.2f} MB) and {shapes} after {time.monotonic() - start:.0f} s.", flush=True)

    # 6. What was saved, as everyone else will load it, in the eyes of the judge.
    pipeline = StableDiffusionPipeline.from_pretrained(folder).to(args.device)
    for name, chosen in (("held-out", held_out), ("training", train_triples[:HELD_OUT])):
        print(
            f"Autoencoder, {name} triples: {reconstruction_accuracy(pipeline.vae, chosen, 4_000_000):.1%} read right"
        )
        for seed in range(3):
            fractions = caption_accuracy(pipeline, chosen, seed)
            print(f"Pipeline, {len(chosen)} {name} triples, seed {seed}: " + report(fractions), flush=True)
    print(f"Done after {time.monotonic() - start:.0f} s.")


def as_published(folder: Path) -> None:
    """Name what transformers 5 saved as published pipelines have it, which transformers 4 wrote: the text encoder's
    tensors under `text_model.`, the tokenizer in vocab.json and merges.txt (see `build_tokenizer`) alone.
    """
    path = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    special = {key: config[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    kept = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "model_max_length": config["model_max_length"]}
    path.write_text(json.dumps(special | kept, indent=2) + "\n")
    path.with_name("special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def repeat(triples: Sequence[Triple], length: int) -> list[Triple]:
    """The triples over and over, `length` in all."""
    return [triples[number % len(triples)] for number in range(length)]


def round_to_half(model: torch.nn.Module) -> None:
    """Round the parameters to what half precision can hold; they stay float32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())


def report(fractions: dict[str, float]) -> str:
    return ", ".join(f"{name} {fraction:.1%}" for name, fraction in fractions.items())


if __name__ == "__main__":
    main(parse_args())
