#!/usr/bin/env python
"""What a training step, an image, a run's memory and its growth cost, measured against bare floors.

    python tests/benchmark.py all --output_dir benchmark

measures on the Stable Diffusion 1.x architecture with random weights, so nothing is downloaded, and writes a JSON
file, a markdown table and a chart for each of

    training    the trainer's loop on shards and on cached latents, against the bare teacher and student on ready
                tensors, and against a plain step as other trainers write it
    inference   parameters, MACs, latency and memory of the teacher and of every student
    memory      what fits cards of 12 and 24 GB: arithmetic, and on a GPU the measured peak
    growth      start-up and memory for up to 100,000 samples, steps per second of 1 and 2 processes

All variants of a measurement take turns in one process, so that what else the machine does hits them alike; a ratio is
the median of the rounds' own ratios. `--toy` does the same at toy width, to see that it runs.

    python tests/benchmark.py gpu --output_dir gpu

runs all that needs a GPU, in parts of at most 8 minutes. As soon as a part ends, its row is added to gpu.jsonl and, as
tests/RESULTS.md has it, to gpu.md; the same command again goes on with the parts that have no row yet.

    python tests/benchmark.py compare --against CHECKOUT

prints how the speed of the trainer's loop compares with that in another checkout, from paired toy runs on the CPU.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import importlib.util
import io
import itertools
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.config
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import distill_training as dt  # noqa: E402

SD_UNET = {"sample_size": 64, "cross_attention_dim": 768}  # the rest of Stable Diffusion 1.x are diffusers' defaults
SD_UNET_PARAMETERS = 859_520_964
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
SD_TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
SD_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}

GIB = 2**30
VARIANTS = ("floor", "cached", "recipe", "random conditioning", "latents")
VARIANTS += ("floor with VAE", "shards", "plain", "plain float32")
# What the README's real recipe asks of the loop.
RECIPE = {"use_ema": True, "offload_ema": True, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
LATENTS_STEPS = 25  # of a latent that the teacher makes, each of two passes
# Whose time is divided by whose.
RATIOS = (
    "cached / floor",
    "recipe / cached",
    "random conditioning / cached",
    "latents / cached",
    "shards / floor with VAE",
    "shards / cached",
    "plain / cached",
    "plain float32 / cached",
)


# ----------------------------------------------------------------------------------------------------------------
# The models and the data.


def make_parts(toy: bool, device: torch.device, seed: int = 0) -> dict[str, Any]:
    """The pipeline's components in float32 with random weights, built on `device` (`meta` for none at all)."""
    torch.manual_seed(seed)
    if toy:
        from helpers import make_pipeline  # the tests' own

        with tempfile.TemporaryDirectory() as folder:
            parts = StableDiffusionPipeline.from_pretrained(make_pipeline(Path(folder))).components
        return {key: part.to(device) if isinstance(part, nn.Module) else part for key, part in parts.items()}
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    with device:
        unet = UNet2DConditionModel(**SD_UNET)
        vae, text_encoder = AutoencoderKL(**SD_VAE), CLIPTextModel(CLIPTextConfig(**SD_TEXT_ENCODER))
    assert dt.count_parameters(unet) == SD_UNET_PARAMETERS, dt.count_parameters(unet)
    return {
        "unet": unet,
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77),
        "scheduler": DDPMScheduler(**SD_SCHEDULER),
    }


def make_unets(teacher: UNet2DConditionModel, levels: Sequence[str]) -> dict[str, UNet2DConditionModel]:
    """The teacher and a student of every level, on the teacher's device."""
    with teacher.device:
        return {"teacher": teacher} | {level: dt.build_student(teacher, level) for level in levels}


def make_jpegs(count: int, width: int, height: int) -> list[bytes]:
    """Noise of many scales, which takes as long to decode as photographs do."""
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(count):
        image = np.zeros((height, width, 3), np.float32)
        for cells in (4, 16, 64, 256):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            image += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 4
        buffer = io.BytesIO()
        Image.fromarray(image.astype(np.uint8)).save(buffer, "JPEG", quality=92)
        jpegs.append(buffer.getvalue())
    return jpegs


def write_folder(folder: Path, samples: Iterator[tuple[str, dict[str, bytes]]], per_shard: int, **head: Any) -> Path:
    """(key, {suffix: content}) samples in shards and with the manifest that `data.py` writes."""
    folder.mkdir(parents=True)
    entries: list[str] = []
    while rows := list(itertools.islice(samples, per_shard)):
        entries.append(json.dumps(data.write_shard(folder, data.shard_name(len(entries)), rows)))
    data.write_manifest(folder, {"format": data.FORMAT, "complete": True, **head}, entries)
    return folder


def write_shards(folder: Path, jpegs: Sequence[bytes], count: int, per_shard: int = 1000) -> Path:
    """`count` captioned samples of those images in turn."""
    captions = (f"an image of number {number} in many colours".encode() for number in range(count))
    samples = zip(itertools.cycle(jpegs), captions, strict=False)
    members = ((f"{n:09d}", {".jpg": jpeg, ".txt": caption}) for n, (jpeg, caption) in enumerate(samples))
    return write_folder(folder, members, per_shard)


def write_cache(folder: Path, count: int, resolution: int, vae: AutoencoderKL) -> Path:
    """A latents cache of `count` samples, all alike: what it costs to read one does not depend on what is in it."""
    side, buffer = resolution // dt.vae_factor(vae.config), io.BytesIO()
    np.save(buffer, np.zeros((2, 2, vae.config.latent_channels, side, side), np.float16))
    members = {".npy": buffer.getvalue(), ".json": b'{"captions": ["an image"], "enlarged": false}'}
    latents = {"maker": "none: zeros", "vae": "none", "scaling_factor": vae.config.scaling_factor}
    latents |= {"resolution": resolution, "variants": 2, "crop": "in the centre", "settings": {}}
    samples = ((f"{number:09d}", members) for number in range(count))
    return write_folder(folder, samples, dt.LATENTS_PER_SHARD, latents=latents)


def trainer_args(shards: Path, resolution: int, **flags: Any) -> argparse.Namespace:
    """The trainer's own settings: its defaults with these flags (True for a flag without a value)."""
    flags = {
        "pretrained_model_name_or_path": "random-weights",
        "train_data_dir": shards,
        "output_dir": shards / "unused",
        "resolution": resolution,
        "learning_rate": 1e-6,
        "max_train_steps": 10**6,
        "random_flip": True,
        "seed": 0,
        "report_to": "none",
        **flags,
    }
    given = [(f"--{name}", value) for name, value in flags.items() if value is not None and value is not False]
    words = [[name] if value is True else [name, str(value)] for name, value in given]
    return dt.parse_args(list(itertools.chain(*words)))


def make_accelerator(args: argparse.Namespace, device: torch.device) -> Accelerator:
    """The trainer's own, on this device."""
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision is kept between two of them otherwise
    PartialState(cpu=device.type == "cpu")
    return dt.make_accelerator(args)


@torch.compiler.set_stance("force_eager")  # a teacher that is compiled already would miss the taps of the next run
def make_run(
    parts: Mapping[str, Any], args: argparse.Namespace, device: torch.device, encodes: bool = True
) -> dt.Distillation:
    """The trainer's own, of the student of a random teacher."""
    with device:
        student = dt.build_student(parts["unet"], args.distill_level)
    components = dt.Components(
        tokenizer=parts["tokenizer"],
        noise_scheduler=parts["scheduler"],
        text_encoder=parts["text_encoder"],
        vae=parts["vae"],
        unet=student,
        teacher_unet=parts["unet"],
    )
    return dt.make_run(args, make_accelerator(args, device), components, dt.RunState(), encodes=encodes)


# ----------------------------------------------------------------------------------------------------------------
# Clocks and counters.


@dataclass
class Variant:
    """One of those that take turns: `prepare` runs off the clock, before every block of `step`s."""

    step: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    micro_batches: float = 1  # of a step, which is what seconds are counted by


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident(device: torch.device, name: str = "VmRSS") -> int | None:
    """Bytes in use now on the device or, on a CPU, by this process (`VmHWM`: their peak); None where not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if name == "VmHWM" else torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    return None


def timed_block(step: Callable[[], Any], count: int, device: torch.device) -> tuple[float, int | None]:
    """Seconds per call, and the peak of memory during the block in bytes (None where the system does not tell)."""
    known = True
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
        except OSError:
            known = False
    synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return (time.perf_counter() - started) / count, resident(device, "VmHWM") if known else None


def take_turns(
    variants: Mapping[str, Variant], rounds: int, block: int, device: torch.device, label: str
) -> dict[str, dict[str, Any]]:
    """Every variant's `seconds` per micro-batch, one of each round, with their median, and `peak_bytes`.

    Every other round goes backwards, so that a machine that slows down or speeds up does not favour one of them.
    """
    results = {name: {"seconds": [], "peak_bytes": None} for name in variants}
    order = list(variants)
    turns = [name for number in range(rounds) for name in order[:: 1 if number % 2 == 0 else -1]]
    for name in tqdm(turns, desc=label):
        variants[name].prepare()
        seconds, peak = timed_block(variants[name].step, block, device)
        results[name]["seconds"].append(seconds / variants[name].micro_batches)
        results[name]["peak_bytes"] = max(peak, results[name]["peak_bytes"] or 0) if peak else None
    for row in results.values():
        row["median_seconds"] = statistics.median(row["seconds"])
    return results


def paired_ratio(left: Sequence[float], right: Sequence[float]) -> dict[str, Any]:
    pairs = [a / b for a, b in zip(left, right, strict=True)]
    return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs), "pairs": pairs}


def show_ratio(ratio: Mapping[str, Any] | None) -> str:
    return f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})" if ratio else "not measured"


def matmul_peak(device: torch.device, dtype: torch.dtype, toy: bool) -> float:
    """FLOP/s of the fastest product of two square matrices, of growing size as long as one takes no 0.2 s."""
    best, limit = 0.0, 0.002 if toy else 0.2
    for size in (256, 512, 1024, 2048, 4096, 8192):
        left, right = torch.randn(2, size, size, device=device).to(dtype)
        seconds = min(timed_block(lambda a=left, b=right: a @ b, 3, device)[0] for _ in range(4))
        best = max(best, 2 * size**3 / seconds)
        if seconds > limit:
            break
    return best


def count_flops(call: Callable[[], Any]) -> dict[str, int]:
    """FLOPs (two for each multiply-accumulate) by operator, attention's matrix products included."""
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}


def meta_inputs(parts: Mapping[str, Any], resolution: int) -> dict[str, Tensor]:
    """One image's inputs of all networks on the meta device."""
    side = resolution // 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    tokens = parts["tokenizer"].model_max_length
    with torch.device("meta"):
        return {
            "pixels": torch.zeros(1, 3, resolution, resolution),
            "latents": torch.zeros(1, parts["unet"].config.in_channels, side, side),
            "timesteps": torch.zeros(1, dtype=torch.int64),
            "text": torch.zeros(1, tokens, parts["unet"].config.cross_attention_dim),
            "ids": torch.zeros(1, tokens, dtype=torch.int64),
        }


def step_flops(parts: Mapping[str, Any], student: nn.Module, resolution: int) -> dict[str, int]:
    """FLOPs per image of every part of a training step; the models are on the meta device."""
    inputs = meta_inputs(parts, resolution)
    sample = inputs["latents"], inputs["timesteps"], inputs["text"]
    with torch.no_grad():
        flops = {
            "teacher forward": count_flops(lambda: parts["unet"](*sample)),
            "VAE encode": count_flops(lambda: parts["vae"].encode(inputs["pixels"])),
            "text encoder": count_flops(lambda: parts["text_encoder"](inputs["ids"])),
        }
    flops["student forward and backward"] = count_flops(lambda: student(*sample)[0].sum().backward())
    return {name: sum(counts.values()) for name, counts in flops.items()}


# ----------------------------------------------------------------------------------------------------------------
# Training.


def floor_step(run: dt.Distillation, optimizer: torch.optim.Optimizer, ready: Mapping[str, Tensor], vae: bool) -> None:
    """The arithmetic that a step cannot do without, on tensors that are on the device already."""
    with torch.no_grad():
        if vae:
            run.vae.encode(ready["pixels"])
        text = run.text_encoder(ready["ids"])[0]
    student_pred = run.unet(ready["noisy"], ready["timesteps"], text, return_dict=False)[0]
    with torch.no_grad():
        noisy = ready["noisy"].to(run.weight_dtype)
        teacher_pred = run.teacher_unet(noisy, ready["timesteps"], text, return_dict=False)[0]
    losses = run.loss_function(
        student_pred,
        teacher_pred,
        ready["noise"],
        run.student_tap.pop(),
        run.teacher_tap.pop(),
        output_weight=run.args.output_weight,
        feature_weight=run.args.feature_weight,
    )
    losses["loss"].backward()
    nn.utils.clip_grad_norm_(run.unet.parameters(), run.args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.compiler.set_stance("force_eager")
def plain_step(
    run: dt.Distillation, optimizer: torch.optim.Optimizer, batches: Iterator[Mapping[str, Tensor]], half: bool
) -> None:
    """A step as other trainers write it, eager; with `half`, student and teacher run under bf16 autocast.

    All networks keep the memory format that is the trainer's choice.
    """
    device, weight_dtype, batch = run.accelerator.device, next(run.vae.parameters()).dtype, next(batches)
    student = getattr(run.unet, "_original_forward", run.unet.forward)  # without accelerate's own autocast
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
    with torch.no_grad():
        pixel_values = batch["pixel_values"].to(device, weight_dtype)
        latents = run.vae.encode(pixel_values).latent_dist.sample() * run.vae.config.scaling_factor
        text = run.text_encoder(batch["input_ids"].to(device))[0]
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, run.noise_scheduler.config.num_train_timesteps, latents.shape[:1], device=device)
    noisy = run.noise_scheduler.add_noise(latents, noise, timesteps)
    with autocast:
        student_pred = student(noisy, timesteps, text, return_dict=False)[0]
    with torch.no_grad(), autocast:
        teacher_pred = run.teacher_unet(noisy, timesteps, text, return_dict=False)[0]
    task = F.mse_loss(student_pred.float(), noise.float())
    output = F.mse_loss(student_pred.float(), teacher_pred.float())
    pairs = zip(run.student_tap.pop(), run.teacher_tap.pop(), strict=True)
    feature = sum(F.mse_loss(mine, theirs) for mine, theirs in pairs)
    loss = task + run.args.output_weight * output + run.args.feature_weight * feature
    loss.backward()
    nn.utils.clip_grad_norm_(run.unet.parameters(), run.args.max_grad_norm)
    optimizer.step()
    run.lr_scheduler.step()
    optimizer.zero_grad()
    for term in (loss, task, output, feature):
        term.item()


def place(run: dt.Distillation, teacher: torch.dtype, others: torch.dtype, vae: bool, fused: bool) -> None:
    """Make the one set of models and the one optimiser state what a variant needs. Not on the clock."""
    device = run.accelerator.device
    run.teacher_unet.to(dtype=teacher)
    run.text_encoder.to(dtype=others)
    run.vae.to(device if vae else "cpu", dtype=others)
    optimizer = run.optimizer.optimizer
    optimizer.found_inf = None  # the trainer's step leaves it behind, and only fused kernels take it
    for group in optimizer.param_groups:
        group["fused"] = fused or None
    for state in optimizer.state.values():  # where each kind keeps its step count: elsewhere it would wait for it
        state["step"] = state["step"].to(device if fused else "cpu")
    student, checkpointing = run.accelerator.unwrap_model(run.unet), run.args.gradient_checkpointing
    (student.enable_gradient_checkpointing if checkpointing else student.disable_gradient_checkpointing)()
    run.accelerator.gradient_accumulation_steps = run.args.gradient_accumulation_steps
    run.accelerator.step = 0  # micro-batches so far: of a window that others began, none is left


def trainer_step(run: dt.Distillation, batches: Iterator[Mapping[str, Tensor]], number: Iterator[int]) -> None:
    """An optimiser step as the trainer's loop takes it, its health read one step later."""
    for _ in range(run.args.gradient_accumulation_steps):
        dt.training_step(run, next(batches), next(number))
    list(run.health.read(run.state, wait=False))


def training_variants(
    run: dt.Distillation, dataset: Any, cached: Any, args: argparse.Namespace
) -> tuple[dict[str, Variant], float]:
    """The variants of one configuration, all on the same models, optimiser state and images.

    `run` is the one of `RECIPE`; all but `recipe` do without what that adds, and have these `args`. With the variants
    come the images per second that the loader gives on its own: where it works ahead in other processes, it could
    otherwise catch up during the turns of variants that do not need it.
    """
    recipe, run = run, dataclasses.replace(run, args=args, ema_unet=None)
    device, optimizer = run.accelerator.device, run.optimizer.optimizer
    batches = dt.make_dataloader(dataset, args, run.accelerator, 0)
    first, size = next(batches), args.train_batch_size
    count = 8 * args.dataloader_num_workers or 2
    loader_rate = size / timed_block(lambda: next(batches), count, device)[0]
    half = run.weight_dtype is torch.bfloat16
    place(run, run.weight_dtype, run.weight_dtype, vae=True, fused=True)  # as a batch size before may not have left it
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # once: compiling the encoder takes longer
        pixels = first["pixel_values"].to(device, run.weight_dtype)
        encoded = run.vae.encode(pixels).latent_dist.mode().float() * run.vae.config.scaling_factor
    noise, timesteps = torch.randn_like(encoded), torch.randint(0, 1000, encoded.shape[:1], device=device)
    noisy = run.noise_scheduler.add_noise(encoded, noise, timesteps)
    ready = {"pixels": pixels, "ids": first["input_ids"].to(device), "noisy": noisy, "noise": noise}
    ready["timesteps"] = timesteps

    number = itertools.count()
    place_ours = functools.partial(place, teacher=run.weight_dtype, others=run.weight_dtype, fused=True)
    ours = functools.partial(place_ours, run)
    latents = dt.make_dataloader(cached, args, run.accelerator, 0)
    settings = {"random_conditioning": 5.0, "teacher_latents_steps": 25 if device.type == "cuda" else 2}
    conditioned = dataclasses.replace(run, args=argparse.Namespace(**vars(args) | settings))
    prepare = cached.prepare | {"pool": caption_pool(Path(args.train_data_dir).parent, run.tokenizer)}
    pooled = dt.DistillationDataset(cached.rows, cached.columns, args.seed, **prepare)
    swapped = dt.make_dataloader(pooled, conditioned.args, run.accelerator, 0)
    pipeline = dt.sampling_pipeline(run, run.teacher_unet)

    def paint() -> None:
        dt.paint_latents(pipeline, ["an image"] * size, range(size), conditioned.args)
        run.teacher_tap.pop()

    variants = {
        "floor": Variant(lambda: floor_step(run, optimizer, ready, False), lambda: ours(vae=False)),
        "cached": Variant(lambda: trainer_step(run, latents, number), lambda: ours(vae=False)),
        "recipe": Variant(
            lambda: trainer_step(recipe, latents, number),
            lambda: place_ours(recipe, vae=False),
            recipe.args.gradient_accumulation_steps,
        ),
        "random conditioning": Variant(lambda: trainer_step(conditioned, swapped, number), lambda: ours(vae=False)),
        # In the time of the default 25 steps, however many are taken.
        "latents": Variant(paint, lambda: ours(vae=False), settings["teacher_latents_steps"] / LATENTS_STEPS),
        "floor with VAE": Variant(lambda: floor_step(run, optimizer, ready, True), lambda: ours(vae=True)),
        "shards": Variant(lambda: trainer_step(run, batches, number), lambda: ours(vae=True)),
        "plain": Variant(
            lambda: plain_step(run, optimizer, batches, half),
            lambda: place(run, torch.float32, run.weight_dtype, vae=True, fused=False),
        ),
    }
    if half:
        variants["plain float32"] = Variant(
            lambda: plain_step(run, optimizer, batches, False),
            lambda: place(run, torch.float32, torch.float32, vae=True, fused=False),
        )
    return variants, loader_rate


def caption_pool(folder: Path, tokenizer: CLIPTokenizer) -> dt.CaptionPool:
    """Ten thousand captions, tokenised."""
    if not list(folder.glob(dt.TOKENS)):
        dt.tokenize_pool((f"a view of number {number}" for number in range(10_000)), tokenizer, folder)
    return dt.CaptionPool(next(folder.glob(dt.TOKENS)), tokenizer.model_max_length)


def warm_up(variants: Mapping[str, Variant], run: dt.Distillation, steps: int) -> dict[str, Variant]:
    """Run every variant off the clock; those that fit in memory come back."""
    fitting = {}
    for name, variant in variants.items():
        try:
            variant.prepare()
            for _ in range(steps):
                variant.step()
            fitting[name] = variant
        except torch.OutOfMemoryError:
            pass
        if name not in fitting:  # outside of the handler, whose traceback holds on to the tensors
            run.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
    return fitting


def steps_of_a_second(variant: Variant, device: torch.device) -> int:
    """Steps of a turn of about a second, on a GPU, which starts and ends a turn without work; 1 on a CPU."""
    if device.type == "cpu":
        return 1
    variant.prepare()
    return min(max(round(1 / timed_block(variant.step, 2, device)[0]), 1), 10)


def measure_training(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    device = args.device
    images = 16 if device.type == "cpu" else 64  # all have to be encoded first
    jpegs = make_jpegs(images, args.resolution * 3 // 2, args.resolution * 9 // 8)
    shards = write_shards(folder / "shards", jpegs, images)
    meta = make_parts(args.toy, torch.device("meta"))
    students = make_unets(meta["unet"], args.level)
    flops = {level: step_flops(meta, students[level], args.resolution) for level in args.level}
    precisions = args.precision or (["no", "bf16"] if device.type == "cpu" else ["bf16"])
    peaks = {name: matmul_peak(device, dt.WEIGHT_DTYPES[name], args.toy) for name in {"no", *precisions}}
    if args.precision is None and device.type == "cpu" and peaks["bf16"] < peaks["no"]:
        print(f"bf16 is left out: {peaks['bf16'] / 1e9:.1f} GFLOP/s here where float32 has {peaks['no'] / 1e9:.1f}.")
        precisions = ["no"]
    work = sum(sum(flops[level].values()) / peaks[name] for level in args.level for name in precisions)
    seconds = work * sum(args.batch_size or [4, 8, 16]) * 10 * (args.rounds + 1) / 0.6
    print(
        f"Training steps of {', '.join(args.level)} at {args.resolution} px in {', '.join(precisions)}, batch size "
        f"{args.batch_size or 'doubling from 4'}, {args.rounds} rounds: roughly {seconds / 60:.0f} minutes."
    )
    parts = make_parts(args.toy, device)
    common = functools.partial(
        trainer_args, shards, args.resolution, dataloader_num_workers=args.dataloader_num_workers
    )
    settings = common(mixed_precision="no", train_batch_size=4)
    accelerator = make_accelerator(settings, device)
    dataset = dt.make_train_dataset(settings, parts["tokenizer"], accelerator)
    cached = dt.cache_latents(dataset, parts["vae"], settings, accelerator)
    results = []
    for level, precision in itertools.product(args.level, precisions):
        settings = functools.partial(common, distill_level=level, mixed_precision=precision, compile=args.compile)
        run = make_run(parts, settings(**RECIPE), device)
        for batch_size in args.batch_size or (4 * 2**power for power in itertools.count()):
            if args.compile:
                torch.compiler.reset()  # else the second batch size would be compiled for any size
            label = f"{level}, {show_precision(precision)}, batch {batch_size}"
            try:
                everything, loader_rate = training_variants(
                    run, dataset, cached, settings(train_batch_size=batch_size)
                )
                everything = {name: variant for name, variant in everything.items() if name in args.variants}
                variants = warm_up(everything, run, 1 if device.type == "cpu" else 3)
            except torch.OutOfMemoryError:
                variants = {}
            if not variants:
                break
            block = args.steps_per_block or steps_of_a_second(next(iter(variants.values())), device)
            measured = take_turns(variants, args.rounds, block, device, label)
            result = {"label": label, "level": level, "precision": precision, "batch_size": batch_size}
            result |= {"steps_per_block": block, "matmul_flops_per_second": peaks, "flops_per_image": flops[level]}
            result |= summarize_training(result, everything, measured)
            result |= {"agreement_seconds": agreement_seconds(run), "loader_images_per_second": loader_rate}
            if args.profile and "cached" in variants:
                variants["cached"].prepare()
                result["profile"] = profile_gpu(variants["cached"].step, 5)
            results.append(result)
            del everything, variants
            gc.collect()
        drop(run)
        del run
        gc.collect()
        torch.cuda.empty_cache()
    return {"resolution": args.resolution, "compile": args.compile, "rounds": args.rounds, "results": results}


def summarize_training(
    setting: Mapping[str, Any], names: Sequence[str], measured: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Rates, shares of the matmul peak and ratios; None for a variant that did not fit in memory."""
    variants: dict[str, Any] = {name: None for name in names}
    flops, peaks = setting["flops_per_image"], setting["matmul_flops_per_second"]
    for name, row in measured.items():
        encodes = name not in ("floor", "cached", "recipe", "random conditioning")
        work = sum(count for part, count in flops.items() if encodes or part != "VAE encode")
        if name == "latents":
            work = 2 * LATENTS_STEPS * flops["teacher forward"]
        rate = setting["batch_size"] / row["median_seconds"]
        peak = peaks["no" if name == "plain float32" else setting["precision"]]
        variants[name] = row | {"images_per_second": rate, "share_of_matmul_peak": work * rate / peak}
    ratios = {}
    for name in RATIOS:
        left, right = name.split(" / ")
        if left in measured and right in measured:
            ratios[name] = paired_ratio(measured[left]["seconds"], measured[right]["seconds"])
    return {"variants": variants, "ratios": ratios}


def drop(run: dt.Distillation) -> None:
    """Take the taps off the models, which outlive the run."""
    for tap in (run.student_tap, run.teacher_tap):
        tap.close()


def agreement_seconds(run: dt.Distillation) -> float:
    """What the host pays for noting a step's flags and reading those of the step before, with work queued on a GPU."""
    device, health, seconds = run.accelerator.device, dt.StepHealth(), []
    loss, norm = torch.ones(2, device=device)
    queued = torch.ones(4096, 4096, device=device if device.type == "cuda" else "meta")
    for step in range(50):
        synchronize(device)
        queued @ queued
        started = time.perf_counter()
        health.note(run.accelerator, step, loss, norm)
        list(health.read(run.state, wait=False))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


KERNEL_KINDS = (
    ("norm, elementwise", r"^triton_(?!tem)"),
    ("copies", r"memcpy|memset|copy|nchwtonhwc|nhwctonchw|converttensor|transpose|catarray"),
    ("optimizer, clipping", r"adam|multi_tensor"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("conv", r"conv|fprop|dgrad|wgrad|winograd"),
    ("matmul", r"gemm|gemv|nvjet|cublas|cutlass|xmma|splitk|triton_tem"),
    ("norm, elementwise", r"norm|moments|elementwise|reduce|softmax|index|embedding|distribution|upsample|fused"),
)


def kernel_kind(name: str) -> str:
    return next((kind for kind, pattern in KERNEL_KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def busy_time(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of (start, end) spans."""
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return busy


def profile_gpu(step: Callable[[], Any], count: int) -> dict[str, Any]:
    """Where the GPU's time goes: milliseconds per step by kind of kernel, the idle share and the longest kernels."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    kernels = [
        event
        for event in profile.events()
        if event.device_type == cuda
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Optimizer.", "ProfilerStep"))
    ]
    spans = [(event.time_range.start, event.time_range.end) for event in kernels]
    kinds: dict[str, float] = {}
    names: dict[str, float] = {}
    for event, (start, end) in zip(kernels, spans, strict=True):
        for table, key in ((kinds, kernel_kind(event.name)), (names, event.name)):
            table[key] = table.get(key, 0.0) + (end - start) / 1000 / count
    window = max(end for _, end in spans) - min(start for start, _ in spans)
    longest = sorted(names.items(), key=lambda item: -item[1])[:20]
    return {
        "milliseconds_per_step": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "idle_share": 1 - busy_time(spans) / window,
        "longest_kernels": [{"kind": kernel_kind(name), "name": name, "milliseconds": ms} for name, ms in longest],
    }


def training_tables(record: Mapping[str, Any]) -> tuple[str, list[tuple[str, float]]]:
    rows, bars, notes = [], [], []
    for result in record["results"]:
        for name, row in result["variants"].items():
            cells = ["out of memory", "", "", ""]
            if row:
                cells = [f"{row['median_seconds']:.4g}", f"{row['images_per_second']:.4g}"]
                cells += [f"{row['share_of_matmul_peak']:.1%}", show_gib(row["peak_bytes"])]
                bars.append((f"{result['label']}: {name}", row["images_per_second"]))
            rows.append([result["label"], name, *cells])
        peak = result["matmul_flops_per_second"][result["precision"]]
        notes.append(
            f"- {result['label']}: matmul peak {peak / 1e9:,.0f} GFLOP/s; the loader alone gives "
            f"{result['loader_images_per_second']:.1f} images/s; whether a step is sound takes the host "
            f"{1e6 * result['agreement_seconds']:.0f} µs to note and to read one step later (a GPU has work queued)."
        )
        if "profile" in result:
            kinds = ", ".join(f"{k} {ms:.1f} ms" for k, ms in result["profile"]["milliseconds_per_step"].items())
            notes.append(f"  Kernels per step: {kinds}; the GPU is idle {result['profile']['idle_share']:.1%}.")
    flops = {f"`{result['level']}`": result["flops_per_image"] for result in record["results"]}
    parts = list(next(iter(flops.values()), []))
    sections = [
        table(
            ["student, precision, batch", "variant", "s/micro-batch", "images/s", "of matmul peak", "peak memory"],
            rows,
        ),
        "Time ratios of the same round, median (lowest to highest):",
        table(
            ["student, precision, batch", *RATIOS],
            [[r["label"], *(show_ratio(r["ratios"].get(name)) for name in RATIOS)] for r in record["results"]],
        ),
        f"GFLOP per image at {record['resolution']} px (two for each multiply-accumulate):",
        table(["student", *parts], [[k, *(f"{v[part] / 1e9:.1f}" for part in parts)] for k, v in flops.items()]),
        "\n".join(notes),
        "`recipe` is the README's real recipe on cached latents: 4 micro-batches a step, gradient checkpointing, an "
        "offloaded moving average. `random conditioning` is `cached` with a pool of 10,000 captions. `latents` has "
        "the teacher make a batch, in 25 steps with guidance (on a CPU 2 steps, counted as 25): its ratio to `cached` "
        "says how many training samples one costs. The others keep no average, but on a CPU its memory counts in all "
        "peaks. None writes to a tracker.",
    ]
    return "\n\n".join(sections), bars


# ----------------------------------------------------------------------------------------------------------------
# Inference.


@torch.no_grad()
def count_work(unet: UNet2DConditionModel, sample: Sequence[Tensor]) -> dict[str, Any]:
    """A U-Net's parameters and the multiply-accumulates of one pass, of its layers alone and in all."""
    flops = count_flops(functools.partial(unet, *sample))
    layers = sum(flops.get(f"aten.{operator}", 0) for operator in ("convolution", "addmm", "mm"))
    macs = {"macs_conv_linear": layers // 2, "macs_with_attention": sum(flops.values()) // 2}
    return {"parameters": dt.count_parameters(unet), **macs}


def measure_inference(args: argparse.Namespace, _folder: Path) -> dict[str, Any]:
    device, block = args.device, args.steps_per_block or (1 if args.device.type == "cpu" else 10)
    precision = (args.precision or ["no" if device.type == "cpu" else "bf16"])[0]
    dtype, rounds = dt.WEIGHT_DTYPES[precision], args.rounds
    pipeline_rounds = 1 if device.type == "cpu" else min(rounds, 3)  # minutes each, on a CPU
    meta = make_parts(args.toy, torch.device("meta"))
    inputs = meta_inputs(meta, args.resolution)
    sample = [inputs[name] for name in ("latents", "timesteps", "text")]
    models = {}
    for name, unet in make_unets(meta["unet"], dt.DISTILL_LEVELS).items():
        models[name] = count_work(unet, sample)
    work = sum(model["macs_with_attention"] * 2 for model in models.values())
    passes = 3 * (rounds + 1) * block + 6 + (2 * args.pipeline_steps + 4) * pipeline_rounds
    minutes = work * passes / matmul_peak(device, dtype, args.toy) / 0.6 / 60
    print(
        f"U-Nets of the teacher and {len(models) - 1} students at {args.resolution} px, {rounds} rounds, and images "
        f"in {args.pipeline_steps} steps: roughly {minutes:.0f} minutes."
    )
    parts = make_parts(args.toy, device)
    unets = make_unets(parts["unet"], dt.DISTILL_LEVELS)
    for net in (*unets.values(), parts["vae"], parts["text_encoder"]):
        dt.freeze(net, device, dtype)
    scheduler = DPMSolverMultistepScheduler.from_config(parts["scheduler"].config)
    parts |= {"scheduler": scheduler, "safety_checker": None, "feature_extractor": None}
    calls: dict[str, dict[str, Callable[[], Any]]] = {"unet_batch_1": {}, "unet_batch_2": {}, "pipeline": {}}
    for name, unet in unets.items():
        for batch in (1, 2):
            tensors = [torch.zeros((batch, *part.shape[1:]), dtype=part.dtype, device=device) for part in sample]
            tensors = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
            calls[f"unet_batch_{batch}"][name] = functools.partial(unet, *tensors)
        pipeline = StableDiffusionPipeline(**{**parts, "unet": unet, "requires_safety_checker": False})
        pipeline.set_progress_bar_config(disable=True)
        size = {"height": args.resolution, "width": args.resolution}
        calls["pipeline"][name] = functools.partial(
            pipeline, "a photo", num_inference_steps=args.pipeline_steps, **size
        )
    others = weight_bytes(parts["vae"]) + weight_bytes(parts["text_encoder"])
    for key, variants in calls.items():
        working = {}
        with torch.no_grad():
            for name, call in variants.items():  # which warms up, too
                once = functools.partial(call, num_inference_steps=1) if key == "pipeline" else call
                before, peak = resident(device), timed_block(once, 1, device)[1]
                working[name] = max(peak - before, 0) if peak and before else None
            turns = pipeline_rounds if key == "pipeline" else rounds
            measured = take_turns(
                {name: Variant(call) for name, call in variants.items()},
                turns,
                1 if key == "pipeline" else block,
                device,
                key,
            )
        for name, row in measured.items():
            weights = weight_bytes(unets[name]) + (others if key == "pipeline" else 0)
            row["peak_bytes"] = None if working[name] is None else weights + working[name]
            ratio = paired_ratio(measured["teacher"]["seconds"], row["seconds"])
            models[name][key] = row | {"times_as_fast_as_teacher": ratio}
    return {
        "resolution": args.resolution,
        "precision": precision,
        "pipeline_steps": args.pipeline_steps,
        "rounds": rounds,
        "pipeline_rounds": pipeline_rounds,
        "models": models,
    }


def weight_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def inference_tables(record: Mapping[str, Any]) -> tuple[str, list[tuple[str, float]]]:
    models, keys = record["models"], ("unet_batch_1", "unet_batch_2", "pipeline")
    rows = []
    for name, model in models.items():
        cells = [f"`{name}`", f"{model['parameters']:,}"]
        cells += [f"{model[key] / 1e9:.1f}" for key in ("macs_conv_linear", "macs_with_attention")]
        for key in keys:
            ratio = model[key]["times_as_fast_as_teacher"]["median"]
            cells.append(f"{model[key]['median_seconds']:.4g} s, {ratio:.2f}x")
        rows.append(cells + [show_gib(model[key]["peak_bytes"]) for key in ("unet_batch_1", "pipeline")])
    header = [f"U-Net at {record['resolution']} px, {show_precision(record['precision'])}", "parameters"]
    header += ["GMAC, conv and linear layers", "GMAC, with attention's products", "U-Net, batch 1", "batch 2"]
    header += [f"image in {record['pipeline_steps']} steps", "peak memory, U-Net", "peak memory, image"]
    spreads, work = [], []
    for name in list(models)[1:]:
        spreads.append(f"`{name}` {show_ratio(models[name]['unet_batch_1']['times_as_fast_as_teacher'])}")
        fewer = models["teacher"]["macs_with_attention"] / models[name]["macs_with_attention"]
        work.append(f"`{name}` {fewer:.2f}x")
    note = (
        f"x: the teacher's time divided by this one's, median of {record['rounds']} rounds (for images: "
        f"{record['pipeline_rounds']}). U-Net, batch 1, with its spread: {', '.join(spreads)}; by MACs "
        f"with attention: {', '.join(work)}. Memory: weights and what is used on top of them; an image needs "
        "guidance (batch 2), the VAE and the text encoder."
    )
    bars = [(f"{n}: batch {key[-1]}", models[n][key]["median_seconds"]) for key in keys[:2] for n in models]
    return f"{table(header, rows)}\n\n{note}", bars


# ----------------------------------------------------------------------------------------------------------------
# Memory.


@dataclass(frozen=True)
class MemorySettings:
    """A configuration in bf16 at 512 px that is meant to fit a card of `card` GB."""

    card: int
    level: str
    batch_size: int
    checkpointing: bool = False
    adam_8bit: bool = False
    ema: str = "offloaded"  # none, offloaded, on the device
    cached: bool = True

    def flags(self) -> str:
        ema = {"none": [], "offloaded": ["--use_ema --offload_ema"], "on the device": ["--use_ema"]}[self.ema]
        optional = (
            ("--cache_latents", self.cached),
            ("--gradient_checkpointing", self.checkpointing),
            ("--use_8bit_adam", self.adam_8bit),
        )
        words = [f"--distill_level {self.level} --train_batch_size {self.batch_size} --mixed_precision bf16"]
        return " ".join([*words, *(flag for flag, wanted in optional if wanted), *ema])


MEMORY_SETTINGS = (
    MemorySettings(12, "sd_small", 8, checkpointing=True, adam_8bit=True),
    MemorySettings(24, "sd_small", 8),
    MemorySettings(24, "sd_small", 8, cached=False),
    MemorySettings(24, "sd_small", 32, checkpointing=True),
    MemorySettings(12, "sd_tiny", 4),
    MemorySettings(12, "sd_tiny", 16, checkpointing=True),
    MemorySettings(24, "sd_tiny", 16, ema="on the device"),
)
CONTEXT_BYTES = 0.75 * GIB  # of a card that the driver, the CUDA context and a screen take


@functools.cache
def saved_bytes(config: str, level: str, side: int, tokens: int, batch: int, checkpointing: bool) -> tuple[int, int]:
    """Bytes that a bf16 step of `batch` images keeps for its backward pass, and those of the block that keeps most.

    Of the student of this config (JSON), its parameters apart, features and loss included. Counted by unique storages
    on fake tensors: nothing is computed. The blocks are those that checkpointing recomputes one by one.
    """
    unet_config = json.loads(config)
    seen: dict[int, Tensor] = {}
    total = largest = 0
    entered: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = tensor  # kept, so that no other storage gets its address
            total += storage.nbytes()
        return tensor

    def leave(*_: Any) -> None:
        nonlocal largest
        largest = max(largest, total - entered.pop())

    with FakeTensorMode():
        student = UNet2DConditionModel.from_config(unet_config).train()
        seen |= {parameter.untyped_storage()._cdata: parameter for parameter in student.parameters()}
        if checkpointing:
            student.enable_gradient_checkpointing()
        for module in student.modules():
            if isinstance(module, (ResnetBlock2D, BasicTransformerBlock)) and not checkpointing:
                module.register_forward_pre_hook(lambda *_: entered.append(total))
                module.register_forward_hook(leave)
        tap = dt.FeatureTap(student, [name for _, name in dt.DISTILL_LEVELS[level].feature_pairs])
        latents = torch.zeros(batch, unet_config["in_channels"], side, side)
        text = torch.zeros(batch, tokens, unet_config["cross_attention_dim"], dtype=torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16):
                prediction = student(latents, torch.zeros(batch, dtype=torch.int64), text, return_dict=False)[0]
            mine = tap.pop()
            theirs = [torch.zeros_like(feature) for feature in mine]
            dt.distillation_loss(prediction, latents, latents, mine, theirs, output_weight=0.5, feature_weight=0.5)
    return total, largest


def estimate_memory(settings: MemorySettings, parts: Mapping[str, Any], resolution: int) -> dict[str, Any]:
    """Bytes by what they hold, from the models' sizes alone (`parts` on the meta device)."""
    config = dt.student_unet_config(parts["unet"].config, settings.level)
    with torch.device("meta"):
        student = dt.count_parameters(UNet2DConditionModel.from_config(config))
    side, tokens = meta_inputs(parts, resolution)["latents"].shape[-1], parts["tokenizer"].model_max_length
    count = functools.partial(saved_bytes, json.dumps(config), settings.level, side, tokens)
    kept = [
        count(batch, True)[0] + count(batch, False)[1] if settings.checkpointing else count(batch, False)[0]
        for batch in (1, 2)
    ]
    per_image = kept[1] - kept[0]
    fixed = {
        "student, float32": 4 * student,
        "gradients": 4 * student,
        # In 8 bits, two bytes and two scales of four bytes for every 256 values.
        "Adam's moments": int((2 + 8 / 256) * student) if settings.adam_8bit else 8 * student,
        "average": 4 * student if settings.ema == "on the device" else 0,
        "teacher, bf16": 2 * dt.count_parameters(parts["unet"]),
        "text encoder, bf16": 2 * dt.count_parameters(parts["text_encoder"]),
        "VAE, bf16": 0 if settings.cached else 2 * dt.count_parameters(parts["vae"]),
        "student's bf16 copies": kept[0] - per_image,
    }
    # The average is updated when gradients and activations are gone, by way of a copy; an offloaded one comes along.
    update = {"none": 0, "on the device": 4, "offloaded": 8}[settings.ema] * student - fixed["gradients"]
    total = sum(fixed.values()) + max(settings.batch_size * per_image, update)
    return {"fixed": fixed, "fixed_bytes": sum(fixed.values()), "image_bytes": per_image, "total_bytes": total}


def measured_memory(
    settings: MemorySettings, parts: Mapping[str, Any], shards: Path, args: argparse.Namespace
) -> dict[str, Any] | str:
    """Peak of three real steps with no more memory than the card has, or why there is none."""
    device = args.device
    if device.type != "cuda":
        return "not measured"
    if settings.adam_8bit and importlib.util.find_spec("bitsandbytes") is None:
        return "not measured (bitsandbytes is not installed)"
    flags = {"distill_level": settings.level, "train_batch_size": settings.batch_size, "mixed_precision": "bf16"}
    flags |= {"gradient_checkpointing": settings.checkpointing, "use_8bit_adam": settings.adam_8bit}
    flags |= {"use_ema": settings.ema != "none", "offload_ema": settings.ema == "offloaded"}
    if settings.cached:  # the encoding has to fit, too: a cache for each
        cache = shards.parent / f"{settings.card}-{settings.level}-{settings.batch_size}"
        flags |= {"cache_latents": True, "latents_cache_dir": cache}
    run_args = trainer_args(shards, args.resolution, **flags)
    for name in ("unet", "vae", "text_encoder"):
        parts[name].to("cpu", torch.float32)  # where the trainer has them while it encodes
    gc.collect()
    torch.cuda.empty_cache()
    limit = settings.card * GIB - CONTEXT_BYTES
    torch.cuda.set_per_process_memory_fraction(min(limit / torch.cuda.get_device_properties(device).total_memory, 1.0))
    steps, run = itertools.count(), None
    result: dict[str, Any] | str = "out of memory"
    with contextlib.suppress(torch.OutOfMemoryError):
        accelerator = make_accelerator(run_args, device)
        dataset = dt.make_train_dataset(run_args, parts["tokenizer"], accelerator)
        if settings.cached:
            dataset = dt.cache_latents(dataset, parts["vae"], run_args, accelerator)
            parts["vae"].to("cpu")
        run = make_run(parts, run_args, device, encodes=not settings.cached)
        batches = itertools.repeat(next(dt.make_dataloader(dataset, run_args, accelerator, 0)))
        peak = timed_block(lambda: trainer_step(run, batches, steps), 3, device)[1]
        result = {"peak_bytes": peak, "reserved_bytes": torch.cuda.max_memory_reserved(), "limit_bytes": limit}
    torch.cuda.set_per_process_memory_fraction(1.0)
    if run is not None:
        drop(run)
    return result


def measure_memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    print(
        f"Memory of {len(MEMORY_SETTINGS)} settings at {args.resolution} px, by arithmetic"
        f"{' and measured' if args.device.type == 'cuda' else ''}: about a minute."
    )
    meta = make_parts(args.toy, torch.device("meta"))
    parts, shards = {}, folder / "shards"
    if args.device.type == "cuda":
        parts = make_parts(args.toy, args.device)
        write_shards(shards, make_jpegs(16, args.resolution * 3 // 2, args.resolution * 9 // 8), 64)
    rows = []
    for settings in tqdm(MEMORY_SETTINGS, desc="Settings"):
        row = {"card": settings.card, "flags": settings.flags(), "batch_size": settings.batch_size}
        row |= {"estimate": estimate_memory(settings, meta, args.resolution)}
        rows.append(row | {"measured": measured_memory(settings, parts, shards, args)})
        gc.collect()
        torch.cuda.empty_cache()
    return {"resolution": args.resolution, "rows": rows}


def memory_tables(record: Mapping[str, Any]) -> tuple[str, list[tuple[str, float]]]:
    rows, bars = [], []
    for row in record["rows"]:
        estimate = row["estimate"]
        sizes = [show_gib(estimate[key]) for key in ("fixed_bytes", "image_bytes", "total_bytes")]
        sizes[2] += f" at {row['batch_size']}"
        rows.append([f"{row['card']} GB", f"`{row['flags']}`", *sizes, show_measured(row["measured"])])
        bars.append((f"{row['card']} GB: {row['flags'].replace('--', '')}", estimate["total_bytes"] / GIB))
    settings = f"settings ({record['resolution']} px)"
    header = ["card", settings, "fixed part", "activations per image", "estimate at batch", "measured peak"]
    note = (
        "The estimate takes gradients and activations as if all were there at once, and leaves out what kernels need "
        f"while they run. A card is counted with {CONTEXT_BYTES / GIB} GiB less than its name says, and measured runs "
        "are held to that."
    )
    return f"{table(header, rows)}\n\n{note}", bars


# ----------------------------------------------------------------------------------------------------------------
# Growth.


def first_batch(args: argparse.Namespace, tokenizer: CLIPTokenizer, accelerator: Accelerator) -> list[Any]:
    """All that a run holds of its data, once it has its first batch."""
    dataset = dt.make_train_dataset(args, tokenizer, accelerator)
    batches = dt.make_dataloader(dataset, args, accelerator, 0)
    return [dataset, batches, next(batches)]


def tensor_bytes() -> int:
    """Bytes of all CPU tensors that live, which tracemalloc does not see."""
    tensors = [
        thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter) and thing.device.type == "cpu"
    ]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def held_bytes(call: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of Python, NumPy and torch that what `call` returns holds, and their peak on the way (torch's aside)."""
    gc.collect()
    before = tensor_bytes()
    tracemalloc.start()
    kept = call()
    gc.collect()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held += tensor_bytes() - before
    del kept
    return held, max(held, peak)


def training_rate(output: Path, steps: int, processes: int = 1, checkout: Path = ROOT, *flags: str) -> float:
    """Steps per second that a checkout's real toy run on the CPU reports, with one thread in each process."""
    launch = f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split() if processes > 1 else []
    line = f"""--distill_level sd_tiny --resolution 64 --train_batch_size 16 --learning_rate 1e-4 --lr_warmup_steps 0
        --seed 0 --report_to none --mixed_precision no --max_train_steps {steps}""".split()
    places = {"pretrained_model_name_or_path": ROOT / "tests/tiny-sd", "train_data_dir": ROOT / "tests/shapes/train"}
    for name, place in {**places, "output_dir": output}.items():
        line += [f"--{name}", str(place)]
    if "fidelity_samples" in (checkout / "distill_training.py").read_text():
        line += ["--fidelity_samples", "0"]  # an older one has no meter
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launch, str(checkout / "distill_training.py"), *line, *flags],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    match = re.search(r"Steps per second = ([\d.]+)", done.stdout + done.stderr)
    if done.returncode or match is None:
        sys.exit(f"The training run of {checkout} in {processes} processes failed:\n{done.stderr[-2000:]}")
    return float(match[1])


def measure_growth(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    counts = (20, 40) if args.toy else (1_000, 10_000, 100_000)
    steps, rounds = (2, 1) if args.toy else (100, min(args.rounds, 3))
    print(
        f"Start-up on {', '.join(f'{count:,}' for count in counts)} samples, and {rounds} runs of {steps} steps with "
        f"1 and with 2 processes: {'seconds' if args.toy else 'about ten minutes'}."
    )
    parts, jpegs, starts = make_parts(args.toy, torch.device("meta")), make_jpegs(16, 72, 64), []
    for count in counts:
        shards = write_shards(folder / f"shards-{count}", jpegs, count)
        cache = write_cache(folder / f"cache-{count}", count, 64, parts["vae"])
        for kind in ("latents cache", "shards with their manifest", "shards without it"):
            if kind == "shards without it":
                (shards / "manifest.json").unlink()
            source = cache if kind == "latents cache" else shards
            settings = trainer_args(source, 64, train_batch_size=4, mixed_precision="no")
            accelerator = make_accelerator(settings, torch.device("cpu"))
            begin = functools.partial(first_batch, settings, parts["tokenizer"], accelerator)
            seconds = [timed_block(begin, 1, torch.device("cpu"))[0] for _ in range(1 if args.toy else 3)]
            held, peak = held_bytes(begin)
            starts.append({"kind": kind, "samples": count, "seconds": seconds, "held_bytes": held, "peak_bytes": peak})
            print(f"{kind}, {count:,} samples: {min(seconds):.2f} s, {held / 1e6:.2f} MB held", flush=True)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for processes in rates:
            rates[processes].append(training_rate(folder / f"run-{number}-{processes}", steps, processes))
    return {"starts": starts, "steps": steps, "batch_size": 16, "steps_per_second": rates}


def growth_tables(record: Mapping[str, Any]) -> tuple[str, list[tuple[str, float]]]:
    rows, slopes = [], []
    for row in record["starts"]:
        sizes = [f"{row[key] / 1e6:.2f} MB" for key in ("held_bytes", "peak_bytes")]
        rows.append([row["kind"], f"{row['samples']:,}", f"{statistics.median(row['seconds']):.3g} s", *sizes])
    for kind in dict.fromkeys(row["kind"] for row in record["starts"]):
        first, *_, last = (row for row in record["starts"] if row["kind"] == kind)
        slope = (last["held_bytes"] - first["held_bytes"]) / (last["samples"] - first["samples"])
        slopes.append(f"{slope:.0f} bytes ({kind})")
    rates = []
    for processes, values in record["steps_per_second"].items():
        rate = statistics.median(values)
        spread = f"{rate:.3f} ({min(values):.3f} to {max(values):.3f})"
        rates.append([str(processes), spread, f"{rate * int(processes) * record['batch_size']:.1f}"])
    sections = [
        table(["data", "samples", "first batch after", "held", "at the peak"], rows),
        f"One sample more takes, in every process: {', '.join(slopes)}. A run on cached latents opens its data first, "
        "so that both times add up.",
        table(["processes on the CPU, one thread each", "steps/s", "images/s"], rates),
    ]
    bars = [(f"{row['kind']}: {row['samples']:,}", statistics.median(row["seconds"])) for row in record["starts"]]
    return "\n\n".join(sections), bars


# ----------------------------------------------------------------------------------------------------------------
# Two checkouts.


def compare(args: argparse.Namespace) -> None:
    """Print the ratio of the cached loop's speed here and in another checkout, in runs that take turns."""
    here: list[float] = []
    there: list[float] = []
    sides = [(ROOT, here), (Path(args.against).resolve(), there)]
    print(f"{args.rounds} pairs of runs of {args.steps} steps, steps per second here and there:", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for number in range(args.rounds):
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                checkout, rates = sides[side]
                output, cache = Path(name) / f"{side}-{number}", Path(name) / f"latents-{side}"
                flags = "--cache_latents", "--latents_cache_dir", str(cache)
                rates.append(training_rate(output, args.steps, 1, checkout, *flags))
            print(f"{here[-1]:.3f} {there[-1]:.3f}", flush=True)
    print(f"Here / there, median (lowest to highest): {show_ratio(paired_ratio(here, there))}")


# ----------------------------------------------------------------------------------------------------------------
# All that needs a GPU, part by part.

RECIPE_PART = "tests/benchmark.py training --level sd_small --precision bf16 --variants cached recipe --compile"
CAPTIONS_PART = RECIPE_PART.replace("cached recipe", "cached 'random conditioning' latents")
GPU_PARTS = {  # what `python` is given
    **{f"recipe-{size}": f"{RECIPE_PART} --batch_size {size}" for size in (16, 32, 64)},
    "recipe-32-cudnn-benchmark": f"{RECIPE_PART} --batch_size 32 --cudnn_benchmark",
    "recipe-32-conv-1x1-as-mm": f"{RECIPE_PART} --batch_size 32 --conv_1x1_as_mm",
    "captions-16": f"{CAPTIONS_PART} --batch_size 16",
    "memory": "tests/benchmark.py memory",
    "inference": "tests/benchmark.py inference --precision bf16",
    "pytest": "-m pytest -q -rfEs -m gpu tests",
}
PART_SECONDS = 480  # that a part may take


def run_within(seconds: float, line: Sequence[str]) -> tuple[int | None, str]:
    """The exit code of a command, None where it took longer and was ended with all its processes; what it printed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(line, cwd=ROOT, start_new_session=True, **pipes)
    code = None
    try:
        printed, _ = process.communicate(timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
    except BaseException:  # an interrupt reaches this process alone
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return code, printed


def key_figures(what: str, record: Mapping[str, Any]) -> list[str]:
    """A benchmark's record in a few words."""
    figures = []
    if what == "training":
        for result in record["results"]:
            for name, row in result["variants"].items():
                shown = "out of memory"
                if row:
                    shown = f"{row['median_seconds']:.4g} s/micro-batch, {row['images_per_second']:.4g} images/s"
                    shown += f", peak {show_gib(row['peak_bytes'])}"
                figures.append(f"{result['label']}, {name}: {shown}")
            figures += [f"time of {name}: {show_ratio(ratio)}" for name, ratio in result["ratios"].items()]
    elif what == "memory":
        for row in record["rows"]:
            figures.append(f"{row['card']} GB, {row['flags']}: {show_measured(row['measured'])}")
    else:
        for name, model in record["models"].items():
            times = []
            for key, shown in (("unet_batch_1", "U-Net"), ("unet_batch_2", "batch 2"), ("pipeline", "image")):
                faster = model[key]["times_as_fast_as_teacher"]["median"]
                times.append(f"{shown} {model[key]['median_seconds']:.4g} s ({faster:.2f}x)")
            figures.append(f"{name}: {', '.join(times)}, peak {show_gib(model['pipeline']['peak_bytes'])}")
    return figures or ["out of memory"]


def measure_part(command: str) -> tuple[list[str], dict[str, Any]]:
    """Run a part in a process of its own; its figures, or what became of it, and its record where it wrote one."""
    words = shlex.split(command)
    benchmarks = words[0] == "tests/benchmark.py"
    with tempfile.TemporaryDirectory() as folder:
        written = ["--output_dir", folder] if benchmarks else []
        code, printed = run_within(PART_SECONDS, [sys.executable, *words, *written])
        if code == 0 and benchmarks:
            record = json.loads((Path(folder) / f"{words[1]}.json").read_text())
            return key_figures(words[1], record), record
    lines = [line for line in printed.splitlines() if line.strip()] or ["it printed nothing"]
    if code is None:
        return [f"out of time: ended after {PART_SECONDS} s"], {}
    if "OutOfMemoryError" in lines[-1]:
        return ["out of memory"], {}
    of_tests = [line for line in lines if line.startswith(("SKIPPED", "FAILED", "ERROR"))]
    return [f"exit code {code}: {lines[-1]}", *of_tests], {}


def measure_gpu(args: argparse.Namespace) -> None:
    """Run the parts that have no row yet, and add their rows, one by one."""
    rows, page = Path(args.output_dir) / "gpu.jsonl", Path(args.output_dir) / "gpu.md"
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    header = ["date", "commit", "device", "command", "figures"]
    if not page.exists():
        page.write_text(table(header, []) + "\n")
    for name in args.parts or GPU_PARTS:
        command = GPU_PARTS[name]
        if command.startswith("tests/") and args.toy:
            command += f" --toy --rounds 1 --device {args.device.type} --threads {args.threads}"
            if args.device.type == "cpu":  # on which compiling takes minutes, and so does bf16
                command = re.sub(" --compile| --conv_1x1_as_mm", "", command).replace("bf16", "no")
        if any((row["part"], row["command"]) == (name, f"python {command}") for row in done):
            print(f"{name}: has its row.")
            continue
        print(f"{name}: at most {PART_SECONDS / 60:.0f} minutes.", flush=True)
        figures, record = measure_part(command)
        row = {"part": name, "date": datetime.date.today().isoformat(), "commit": git_commit()}
        row |= {"device": device_name(args.device), "command": f"python {command}", "figures": figures}
        with rows.open("a") as file:
            file.write(json.dumps(row | {"record": record}) + "\n")
        cells = [row["date"], row["commit"], row["device"], f"`{row['command']}`", "<br>".join(figures)]
        line = f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n"
        with page.open("a") as file:
            file.write(line)
        print(line, end="", flush=True)


def git_commit() -> str:
    """The short name of the commit that is checked out, 'unknown' where git does not tell."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        line = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


# ----------------------------------------------------------------------------------------------------------------
# What is written.


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show_gib(count: float | None) -> str:
    return "not measured" if count is None else f"{count / GIB:.2f} GiB"


def show_measured(memory: Mapping[str, Any] | str) -> str:
    return memory if isinstance(memory, str) else show_gib(memory["peak_bytes"])


def show_precision(name: str) -> str:
    return "float32" if name == "no" else name


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return match[1] if match else platform.machine()
    return platform.processor() or platform.machine()


def draw_chart(path: Path, title: str, bars: Sequence[tuple[str, float]], note: str) -> None:
    """Horizontal bars with their labels and values."""
    font, row, left, width = ImageFont.load_default(14), 24, 16, 1000
    image = Image.new("RGB", (width, row * (len(bars) + 3) + 16), "white")
    draw = ImageDraw.Draw(image)
    draw.text((left, 12), title, fill="black", font=ImageFont.load_default(18))
    start = left + max([draw.textlength(label, font) for label, _ in bars], default=0) + 12
    longest = max([value for _, value in bars], default=1.0) or 1.0
    for number, (label, value) in enumerate(bars):
        top = row * (number + 2)
        end = start + max((width - 90 - start) * value / longest, 1)
        draw.text((left, top), label, fill="black", font=font)
        draw.rectangle((start, top + 1, end, top + row - 6), fill="#3b75af")
        draw.text((end + 6, top), f"{value:.4g}", fill="black", font=font)
    draw.text((left, row * (len(bars) + 2) + 8), note, fill="#555555", font=ImageFont.load_default(12))
    image.save(path)


# How each measures, how its record becomes a table and bars, and what the bars show.
BENCHMARKS = {
    "training": (measure_training, training_tables, "Training, images per second"),
    "inference": (measure_inference, inference_tables, "One pass of the U-Net, seconds"),
    "memory": (measure_memory, memory_tables, "Memory of a training run by arithmetic, GiB"),
    "growth": (measure_growth, growth_tables, "Seconds to the first batch"),
}


def write_results(args: argparse.Namespace, record: Mapping[str, Any]) -> None:
    """`<what>.json`, `<what>.md` and `<what>.png`, each with what it was measured on."""
    _, tables, title = BENCHMARKS[args.what]
    stem = Path(args.output_dir) / args.what
    record = {
        "command": shlex.join(["python", "tests/benchmark.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "device": device_name(args.device),
        "threads": torch.get_num_threads(),
        "toy": args.toy,
        **record,
    }
    place = f"{record['device']}, {record['threads']} threads, torch {record['torch']}, {record['date']}"
    place += ", toy width" if args.toy else ""
    text, bars = tables(record)
    text += f"\n\nMeasured on {place}, by `{record['command']}`.\n"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1))
    stem.with_suffix(".md").write_text(text)
    draw_chart(stem.with_suffix(".png"), title, bars, f"{place}: {record['command']}")
    print(text)


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("what", choices=[*BENCHMARKS, "all", "gpu", "compare"], help="What to measure.")
    flag("--output_dir", default="benchmark", help="Where the results go.")
    flag("--toy", action="store_true", help="Toy width: shows that it runs, the figures mean nothing.")
    flag("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    flag("--threads", type=int, default=os.cpu_count(), help="Threads of torch; default: one for every core.")
    flag("--level", nargs="+", choices=dt.DISTILL_LEVELS, default=["sd_small", "sd_tiny"], help="Students to train.")
    flag("--resolution", type=int, help="Default: 256 px for training on a CPU, 512 px otherwise; toy: 64 px.")
    flag("--batch_size", type=int, nargs="+", help="Default: 4 and 1 on a CPU; on a GPU 4, 8, ... until it is full.")
    flag(
        "--precision",
        nargs="+",
        choices=["no", "bf16"],
        help="Default: bf16 on a GPU; on a CPU no, and bf16 to train.",
    )
    flag("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="Steps to compare; default: all.")
    flag("--rounds", type=int, help="How often all variants take their turn; default: 7, to compare: 15.")
    flag("--steps_per_block", type=int, help="Steps of one turn; default: 1 on a CPU, up to 10 on a GPU.")
    flag("--pipeline_steps", type=int, default=25, help="Steps of an image.")
    flag("--dataloader_num_workers", type=int, help="The trainer's; default: 0 on a CPU, 8 on a GPU.")
    flag("--compile", action="store_true", help="Compile teacher and student, for the floor too.")
    flag("--conv_1x1_as_mm", action="store_true", help="Compile convolutions of one pixel to matrix products.")
    flag("--cudnn_benchmark", action="store_true", help="Let cuDNN try its convolutions.")
    flag("--profile", action="store_true", help="Show where the GPU's time goes in a step on cached latents.")
    flag("--parts", nargs="+", choices=GPU_PARTS, help="Of gpu; default: all.")
    flag("--against", help="To compare: the other checkout.")
    flag("--steps", type=int, default=100, help="To compare: steps of every run.")
    args = parser.parse_args(input_args)

    args.device = torch.device(args.device)
    on_cpu = args.device.type == "cpu"
    large = 256 if on_cpu and args.what == "training" else 512
    defaults = {
        "resolution": 64 if args.toy else large,
        "batch_size": [2] if args.toy else [4, 1] if on_cpu else None,
        "dataloader_num_workers": 0 if on_cpu else 8,
        "rounds": 15 if args.what == "compare" else 7,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if problems := find_problems(args):
        parser.error("\n  " + "\n  ".join(problems))
    return args


def find_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags, one sentence each."""
    names, on_cpu = (
        ("threads", "resolution", "rounds", "steps_per_block", "pipeline_steps", "steps"),
        args.device.type == "cpu",
    )
    numbers = {name: getattr(args, name) for name in names}
    problems = [f"--{name} must be at least 1, got {n}." for name, n in numbers.items() if n is not None and n < 1]
    problems += [f"--batch_size must be at least 1, got {size}." for size in args.batch_size or [] if size < 1]
    if args.resolution % 64:
        problems.append(f"--resolution must be a multiple of 64, got {args.resolution}.")
    if not on_cpu and not torch.cuda.is_available():
        problems.append("--device cuda: torch sees no GPU.")
    if args.profile and (on_cpu or "cached" not in args.variants):
        problems.append("--profile looks at a GPU's kernels: it needs --device cuda and the variant cached.")
    if args.conv_1x1_as_mm and not args.compile:
        problems.append("--conv_1x1_as_mm needs --compile.")
    if args.what == "gpu" and on_cpu and not args.toy:
        problems.append("gpu needs --device cuda; --toy --device cpu shows that it runs.")
    if args.what == "compare" and not (Path(args.against or ROOT / "none") / "distill_training.py").is_file():
        problems.append(f"compare needs --against with a folder that holds distill_training.py, got {args.against}.")
    names = BENCHMARKS if args.what == "all" else [args.what]
    there = [path for name in names if (path := Path(args.output_dir) / f"{name}.json").exists()]
    return problems + [f"--output_dir {args.output_dir} holds {path.name} already: choose another." for path in there]


def main(args: argparse.Namespace) -> None:
    if args.what == "compare":
        compare(args)
        return
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    if args.what == "gpu":
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the part that runs ends, too
        try:
            measure_gpu(args)
        except KeyboardInterrupt:
            sys.exit("Stopped: the same command goes on with the part that was running.")
        return
    if args.what == "all":  # each in a process of its own, whose memory goes with it
        flags = sys.argv[1:]
        flags.remove("all")
        for name in BENCHMARKS:
            done = subprocess.run([sys.executable, __file__, name, *flags])
            if done.returncode:
                sys.exit(done.returncode)
        return
    diffusers_logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    torch._inductor.config.conv_1x1_as_mm = args.conv_1x1_as_mm
    with tempfile.TemporaryDirectory() as folder:
        record = BENCHMARKS[args.what][0](args, Path(folder))
    write_results(args, record)


if __name__ == "__main__":
    main(parse_args())
