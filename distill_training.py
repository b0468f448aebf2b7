#!/usr/bin/env python
# Copyright 2026 The distill-sd authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Distil a Stable Diffusion pipeline into a smaller one (BK-SDM, https://arxiv.org/abs/2305.15798).

Blocks are pruned out of the teacher's U-Net, the rest keeps the teacher's weights, and the student is trained on

    loss = task_loss + output_weight * output_loss + feature_weight * feature_loss

    task_loss     MSE(student's prediction, the noise or velocity that was really there)
    output_loss   MSE(student's prediction, teacher's prediction)
    feature_loss  sum over block pairs of MSE(student's block output, teacher's block output)

The real recipe:

    accelerate launch --mixed_precision bf16 distill_training.py --distill_level sd_small \
        --pretrained_model_name_or_path SG161222/Realistic_Vision_V4.0 --train_data_dir laion_art --output_dir small-sd

On a CPU, in minutes:

    python distill_training.py --distill_level sd_tiny --pretrained_model_name_or_path tests/tiny-sd \
        --train_data_dir tests/shapes/train --resolution 64 --max_train_steps 100 --output_dir tiny-shapes
"""

import copy
import dataclasses
import errno
import functools
import glob
import hashlib
import importlib.util
import inspect
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import secrets
import shutil
import signal
import statistics
import sys
import time
from argparse import SUPPRESS, Namespace
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import diffusers
import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, PartialState
from accelerate import utils as accelerate_utils
from accelerate.logging import get_logger
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from datasets.distributed import split_dataset_by_node
from datasets.utils.file_utils import xopen
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode, v2
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

if not Path(__file__).with_name("data.py").is_file():
    print("distill_training.py: error: data.py is not beside it: keep the two scripts in one folder.", file=sys.stderr)
    sys.exit(2)

import data  # noqa: E402
from data import AT_LEAST_0, AT_LEAST_1, FROM_0_TO_1, FROM_0_TO_BELOW_1, MORE_THAN_0, Flag, UserError  # noqa: E402

logger = get_logger(__name__, log_level="INFO")

TEACHER, STUDENT = "pretrained_model_name_or_path", "student_model_name_or_path"  # flags
PREDICTION_TYPES = ("epsilon", "v_prediction")
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TrainingError(RuntimeError):
    """The run cannot go on (a loss is no longer finite): shown as one sentence, exit code 1."""


def first_line(error: BaseException) -> str:
    """What an error says first, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ----------------------------------------------------------------------------------------------------------------
# Student architectures. One table holds all that differs between the levels. The student's config is derived from
# the teacher's and its weights are copied by name, so saving, loading, EMA and resuming need no special case.


@dataclass(frozen=True)
class DistillLevel:
    """One row of the table. Every level also loses one residual/attention pair in each block."""

    paper_name: str
    keeps_mid_block: bool
    removed_levels: int  # innermost resolutions taken out: the last down block and the first up block
    feature_pairs: tuple[tuple[str, str], ...]  # (teacher's block, student's block), outputs of the same shape


DOWN_BLOCKS, UP_BLOCKS = (tuple(f"{kind}_blocks.{i}" for i in range(4)) for kind in ("down", "up"))
# The student's last down block stands where the teacher's first up block hands over to the second.
TINY_PAIRS = tuple(zip(DOWN_BLOCKS[:2] + UP_BLOCKS, DOWN_BLOCKS[:3] + UP_BLOCKS[:3], strict=True))

DISTILL_LEVELS: dict[str, DistillLevel] = {
    "sd_small": DistillLevel("BK-SDM-Base", True, 0, tuple((n, n) for n in (*DOWN_BLOCKS, "mid_block", *UP_BLOCKS))),
    "bk_small": DistillLevel("BK-SDM-Small", False, 0, tuple((name, name) for name in (*DOWN_BLOCKS, *UP_BLOCKS))),
    "sd_tiny": DistillLevel("BK-SDM-Tiny", False, 1, TINY_PAIRS),
}

# Entries of a U-Net config that may hold one value per resolution, outermost first.
PER_LEVEL_KEYS = (
    "block_out_channels down_block_types attention_head_dim num_attention_heads cross_attention_dim "
    "only_cross_attention transformer_layers_per_block"
).split()


def _complete_unet_config(config: Mapping[str, Any]) -> dict[str, Any]:
    # Published configs leave keys out. `from_pretrained` notes those in the hidden `_use_default_values`, and
    # `from_config` then ignores what one sets for them, so every default is spelled out, and all other keys go.
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters.items()
    defaults = {name: each.default for name, each in parameters if each.default is not each.empty}
    return defaults | {key: value for key, value in config.items() if key in defaults}


def check_prunable(teacher_config: Mapping[str, Any]) -> None:
    """Raise `UserError` unless the config is that of a whole Stable Diffusion 1.x or 2.x U-Net."""
    # As JSON, where tuples are lists too; the library's own defaults are Stable Diffusion's.
    config, expected = (json.loads(json.dumps(_complete_unet_config(given))) for given in (teacher_config, {}))
    if config["addition_embed_type"] or config["class_embed_type"] or config["encoder_hid_dim_type"]:
        kin = "takes more than a timestep and a caption (Stable Diffusion XL and its kin do)"
        raise UserError(f"The teacher's U-Net {kin}; only Stable Diffusion 1.x and 2.x can be distilled.")
    layers = config["layers_per_block"]
    if any(count != 2 for count in (layers if isinstance(layers, list) else [layers])):
        pruned = f"layers_per_block={layers} where Stable Diffusion has 2: it is already pruned"
        instead = f"name it with --{STUDENT} and its own teacher with --{TEACHER}"
        raise UserError(f"The teacher's U-Net has {pruned}, so {instead}.")
    for key in ("down_block_types", "mid_block_type", "up_block_types"):
        if config[key] != expected[key]:
            wanted = f"that of Stable Diffusion 1.x and 2.x has {expected[key]}"
            raise UserError(f"The teacher's U-Net has {key}={config[key]}; {wanted}.")


def student_unet_config(teacher_config: Mapping[str, Any], level: str) -> dict[str, Any]:
    """Config of the pruned U-Net, from the teacher's own (BK-SDM, section 3.1).

    Keys that the teacher's config leaves out are filled with the library's defaults. Raises `UserError` where the
    teacher is not a whole Stable Diffusion 1.x or 2.x U-Net.
    """
    check_prunable(teacher_config)
    row = DISTILL_LEVELS[level]
    config = _complete_unet_config(teacher_config)
    kept_levels = len(config["block_out_channels"]) - row.removed_levels
    widths = config["block_out_channels"][kept_levels - 1 :]
    if len(set(widths)) > 1 and row.removed_levels:  # what comes out of the innermost kept level takes its place
        raise UserError(f"The teacher's block_out_channels end in {list(widths)}; {level} needs those to be equal.")
    for key in PER_LEVEL_KEYS:
        if isinstance(config[key], (list, tuple)):
            config[key] = config[key][:kept_levels]
    for key in ("up_block_types", "reverse_transformer_layers_per_block"):  # these start at the innermost level
        if config[key] is not None:
            config[key] = config[key][row.removed_levels :]
    config["layers_per_block"] = 1
    if not row.keeps_mid_block:
        config["mid_block_type"] = None
    return config


def teacher_key(student_key: str, level: str) -> str:
    """Name in the teacher's state dict of what the student's `student_key` is copied from.

    Of an up block's three layers the first and the last stay, and up blocks count from the innermost level.
    """
    match = re.fullmatch(r"up_blocks\.(\d+)\.(.*)", student_key)
    if match is None:
        return student_key
    block, rest = int(match[1]), re.sub(r"^(resnets|attentions)\.1\.", r"\1.2.", match[2])
    return f"up_blocks.{block + DISTILL_LEVELS[level].removed_levels}.{rest}"


def build_student(teacher: UNet2DConditionModel, level: str) -> UNet2DConditionModel:
    """The pruned U-Net in float32, each of its tensors bit-equal to the teacher's that it comes from.

    Raises `UserError` where the teacher cannot be pruned at this level.
    """
    student = UNet2DConditionModel.from_config(student_unet_config(teacher.config, level))
    weights = teacher.state_dict()
    student.load_state_dict({key: weights[teacher_key(key, level)] for key in student.state_dict()}, strict=True)
    return student


def check_student(student_config: Mapping[str, Any], teacher_config: Mapping[str, Any], level: str) -> None:
    """Raise `UserError` unless this is the config that pruning this teacher at this level gives.

    Compared but for the size trained at and where attention is computed in float32. None, False and an absent key are
    one, and so are a value and a list of it for every level.
    """

    def normalised(config: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for key, value in _complete_unet_config(config).items():
            values = list(value) if isinstance(value, (list, tuple)) else [value]
            alike = values == values[:1] * len(values) and key not in ("block_out_channels", "down_block_types")
            found[key] = (values[0] if values and alike else values) or False
        return found

    found, wanted = normalised(student_config), normalised(student_unet_config(teacher_config, level))
    keys = (wanted.keys() | found.keys()) - {"sample_size", "upcast_attention"}
    if differing := sorted(key for key in keys if found.get(key, False) != wanted.get(key, False)):
        difference = ", ".join(f"{key}={found.get(key)} instead of {wanted.get(key)}" for key in differing)
        raise UserError(f"--student_model_name_or_path holds no {level} student of this teacher: it has {difference}.")


# ----------------------------------------------------------------------------------------------------------------
# Distillation loss (BK-SDM, equations 1 to 3): task, output and feature terms, all of them in float32.

WEIGHTS = ("task_weight", "output_weight", "feature_weight")  # of the terms, by the names of their flags


class FeatureTap:
    """Keeps what the named blocks of `model` last put out, by forward hooks.

    Register before the first call of a compiled model: hooks that come later are silently ignored by it. While
    `enabled` is false the hooks let everything pass, so that images can be made in between.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.names = list(names)
        self.enabled = True
        self._features: list[Tensor | None] = [None] * len(self.names)  # filled from the start: one compiled graph
        self._handles = [
            model.get_submodule(name).register_forward_hook(functools.partial(self._keep, slot))
            for slot, name in enumerate(self.names)
        ]

    def _keep(self, slot: int, _module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
        if self.enabled:  # down blocks also return their skip connections, after the hidden states
            self._features[slot] = output[0] if isinstance(output, tuple) else output

    def pop(self) -> list[Tensor]:
        """The captured tensors in the order of `names`; they are forgotten here, which frees their memory.

        Raises `RuntimeError` where a block has put out nothing since the last call.
        """
        missing = [name for name, feature in zip(self.names, self._features, strict=True) if feature is None]
        if missing:
            raise RuntimeError(f"No output was captured from {', '.join(missing)}: did the model run?")
        features = list(self._features)
        self._features[:] = [None] * len(self.names)
        return features

    def close(self) -> None:
        """Remove the hooks and drop what they hold."""
        for handle in self._handles:
            handle.remove()
        self._features[:] = [None] * len(self.names)


def prediction_target(noise_scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the U-Net has to predict, shaped as `latents` (B, C, H, W).

    The noise itself for `epsilon`, alpha_t * noise - sigma_t * latents for `v_prediction` (Salimans and Ho 2022,
    https://arxiv.org/abs/2202.00512, appendix D). Raises `UserError` for any other `prediction_type`.
    """
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    raise UserError(f"The scheduler's prediction_type is {prediction_type!r}; epsilon and v_prediction are known.")


def distillation_loss(
    student_pred: Tensor,
    teacher_pred: Tensor | None,
    target: Tensor,
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    *,
    task_weight: float = 1.0,
    output_weight: float,
    feature_weight: float,
    swapped: Tensor | None = None,
) -> dict[str, Tensor]:
    """Weighted sum and unweighted terms of the loss (BK-SDM, equations 1 to 3), in float32 whatever comes in.

    Predictions and target are (B, C, H, W); features are two equally long lists, pair by pair of one shape.
    `teacher_pred` may be None (no teacher): the output term is then 0, as the feature term is without features.
    `swapped` (B,) marks samples that another's caption conditions, which have no task term: the divisor stays that of
    the whole batch, so that all samples weigh the same in every batch and process.
    Returns scalars `loss`, `task_loss`, `output_loss`, `feature_loss`, and `feature_losses` (pairs,), which
    `feature_loss` is the sum of. Raises `ValueError` where a pair differs in shape or one list is longer.
    """
    student_pred = student_pred.float()
    if swapped is None:
        task_loss = F.mse_loss(student_pred, target.float())
    else:
        errors = F.mse_loss(student_pred, target.float(), reduction="none").mean((1, 2, 3))
        task_loss = (errors * ~swapped).mean()
    output_loss = task_loss.new_zeros(()) if teacher_pred is None else F.mse_loss(student_pred, teacher_pred.float())
    pair_losses = []
    for student_feature, teacher_feature in zip(student_features, teacher_features, strict=True):
        if student_feature.shape != teacher_feature.shape:  # mse_loss would broadcast, with a mere warning
            raise ValueError(f"Feature shapes differ: {tuple(student_feature.shape)}, {tuple(teacher_feature.shape)}.")
        # Half precision overflows here: a difference of 300 squares to more than float16 can hold.
        pair_losses.append(F.mse_loss(student_feature.float(), teacher_feature.float()))
    feature_losses = torch.stack(pair_losses) if pair_losses else task_loss.new_zeros(0)
    feature_loss = feature_losses.sum()
    return {
        "loss": task_weight * task_loss + output_weight * output_loss + feature_weight * feature_loss,
        "task_loss": task_loss,
        "output_loss": output_loss,
        "feature_loss": feature_loss,
        "feature_losses": feature_losses,
    }


# ----------------------------------------------------------------------------------------------------------------
# The training step: the loss of a micro-batch, the optimiser's step, the moving average. Nothing here waits for the
# device: what the host has to know of a step is copied behind its back and read one step later.

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class RunState:
    """How far a run has come: saved with every checkpoint, as `trainer_state.json`, and loaded from it."""

    global_step: int = 0  # optimiser steps, skipped ones too
    samples_seen: int = 0  # over all processes
    sound_steps: int = 0  # steps that changed the weights
    skipped_steps: int = 0  # steps left out since their loss or gradient norm was not finite
    scaler_skips: int = 0  # steps left out by fp16's loss scaler, on its way to a scale that fits
    bad_in_a_row: int = 0  # of the skipped steps, the latest ones
    max_train_steps: int = 0
    batch: list[int] = field(default_factory=list)  # --train_batch_size, processes
    settings: dict[str, Any] = field(default_factory=dict)  # what decides the weights, see `run_settings`


@dataclass(kw_only=True)
class Components:
    """The models of a run."""

    tokenizer: CLIPTokenizer
    noise_scheduler: DDPMScheduler
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: nn.Module  # the student; in a run prepared, in whatever that is wrapped
    teacher_unet: UNet2DConditionModel | None  # None where no loss term needs it


@dataclass(kw_only=True)
class Distillation(Components):
    """All that a training step works with. The taps are None where no loss term needs them."""

    args: Namespace
    accelerator: Accelerator
    state: RunState
    health: "StepHealth"
    weight_dtype: torch.dtype  # of all models but the student, which is in float32
    student_tap: FeatureTap | None
    teacher_tap: FeatureTap | None
    optimizer: Any  # accelerate's, round torch's
    lr_scheduler: Any
    ema_unet: "StudentEMA | None"
    loss_function: Callable[..., dict[str, Tensor]]  # `distillation_loss`, compiled with --compile
    window_loss: Tensor | float = 0.0  # summed over the micro-batches of this optimiser step

    def metric_names(self) -> list[str]:
        """Names of what `training_step` returns, in its order."""
        pairs = DISTILL_LEVELS[self.args.distill_level].feature_pairs if self.student_tap else ()
        return ["loss", "task_loss", "output_loss", "feature_loss"] + [f"feature_loss/{t}-{s}" for t, s in pairs]


def losses_of(run: Distillation, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Forward pass of one micro-batch: `distillation_loss` of student and teacher on the same noisy latents.

    `batch` is `collate_fn`'s; `generator`, on the run's device, decides latents, noise, timesteps and which samples
    are conditioned on another caption.
    """
    args, device, noise_scheduler = run.args, run.accelerator.device, run.noise_scheduler
    # 1. Latents, sampled from the posterior in float32.
    if "latent_mean" in batch:
        mean, std = (batch[name].to(device, non_blocking=True).float() for name in ("latent_mean", "latent_std"))
    else:
        mean, std = encode_images(run.vae, batch["pixel_values"])
    # Not randn_like, which would draw in the order in which `mean` lies in memory.
    deviation = std * torch.randn(mean.shape, generator=generator, device=device)
    latents = (mean + deviation) * run.vae.config.scaling_factor
    # 2. Noise and timesteps, in float32 too: in bf16 most of the 1,000 noise levels would fall together.
    noise = torch.randn(latents.shape, generator=generator, device=device)
    if args.noise_offset:
        # https://www.crosslabs.org/blog/diffusion-with-offset-noise
        noise += args.noise_offset * torch.randn((*latents.shape[:2], 1, 1), generator=generator, device=device)
    input_noise = noise
    if args.input_perturbation:  # https://arxiv.org/abs/2301.11706, algorithm 1
        input_noise = noise + args.input_perturbation * torch.randn(noise.shape, generator=generator, device=device)
    steps = noise_scheduler.config.num_train_timesteps
    timesteps = torch.randint(0, steps, latents.shape[:1], generator=generator, device=device)
    noisy_latents = noise_scheduler.add_noise(latents, input_noise, timesteps)
    target = prediction_target(noise_scheduler, latents, noise, timesteps)
    # 3. Text: of some samples, the more often the noisier they are, that of a caption from the pool. A fixed function,
    # the teacher is a target for any of them, the noise is not (random conditioning, https://arxiv.org/abs/2504.02011).
    input_ids, swapped = batch["input_ids"].to(device, non_blocking=True), None
    if args.random_conditioning:
        chance = torch.exp(-args.random_conditioning * (1 - timesteps / steps))
        swapped = torch.rand(chance.shape, generator=generator, device=device) < chance
        input_ids = torch.where(swapped[:, None], batch["pool_input_ids"].to(device, non_blocking=True), input_ids)
    with torch.no_grad():
        encoder_hidden_states = run.text_encoder(input_ids)[0]
    # 4. Student.
    student_pred = run.unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
    # 5. Teacher.
    teacher_pred = None
    if run.teacher_unet is not None:
        with torch.no_grad():  # not inference_mode: its tensors cannot be saved for the student's backward pass
            teacher_pred = run.teacher_unet(
                noisy_latents.to(run.weight_dtype), timesteps, encoder_hidden_states, return_dict=False
            )[0]
    # 6. Loss.
    features = [tap.pop() if tap else [] for tap in (run.student_tap, run.teacher_tap)]
    weights = {name: getattr(args, name) for name in WEIGHTS}
    return run.loss_function(student_pred, teacher_pred, target, *features, **weights, swapped=swapped)


def training_step(run: Distillation, batch: Mapping[str, Tensor], micro_batch: int) -> tuple[Tensor, Tensor | None]:
    """Forward and backward of one micro-batch, and the optimiser's step where the accumulation is complete.

    `micro_batch` counts from the run's start, and with the seed and the rank it decides all noise. Returns the
    unweighted terms (see `Distillation.metric_names`) and the gradient norm before clipping (None between optimiser
    steps), both left on the device.
    """
    accelerator = run.accelerator
    seed = derived_seed(run.args.seed, "noise", micro_batch, accelerator.process_index)
    generator = torch.Generator(accelerator.device).manual_seed(seed)
    with accelerator.accumulate(run.unet):
        losses = losses_of(run, batch, generator)
        accelerator.backward(losses["loss"])
        run.window_loss = run.window_loss + losses["loss"].detach()
        grad_norm = optimizer_step(run) if accelerator.sync_gradients else None
    return torch.cat([term.reshape(-1) for term in losses.values()]).detach(), grad_norm


def optimizer_step(run: Distillation) -> Tensor:
    """Clip, update student and average, step the schedule; returns the gradient norm before clipping.

    Where a loss or the norm is not finite on any process, weights, optimiser and average stay as they were on all of
    them. AdamW's fused kernels are told so on the device, as `GradScaler` tells them; other optimisers have to wait.
    """
    accelerator, optimizer = run.accelerator, run.optimizer.optimizer
    if accelerator.scaler is not None:
        accelerator.scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(run.unet.parameters(), run.args.max_grad_norm)
    skipped = run.health.note(accelerator, run.state.global_step + 1, run.window_loss, grad_norm)
    run.window_loss = 0.0
    if run.ema_unet is not None:
        run.ema_unet.join()  # it may still be reading the weights
    if optimizer.param_groups[0].get("fused"):
        optimizer.found_inf = skipped
        optimizer.step()
    elif not skipped:
        optimizer.step()
    if accelerator.scaler is not None:
        accelerator.scaler.update()
    run.lr_scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)  # before the average, which takes the memory that this frees
    if run.ema_unet is not None:
        run.ema_unet.update(run.unet.parameters(), skipped)
    return grad_norm


class StudentEMA(EMAModel):
    """diffusers' moving average of the student, updated without waiting for the device.

    The decay rises as diffusers' does, min(decay, (1 + n) / (10 + n)) after n + 1 sound steps. With `offload` the
    average lies in the host's memory, pinned where there is a GPU, and is updated by way of the device on a stream of
    its own, tensor by tensor, while training goes on.
    """

    def __init__(self, unet: UNet2DConditionModel, decay: float, offload: bool) -> None:
        self.offload, device = offload, next(unet.parameters()).device
        self.stream = torch.cuda.Stream(device) if offload and device.type == "cuda" else None
        self._steps = torch.zeros((), device=device)
        super().__init__(unet.parameters(), decay=decay, model_cls=UNet2DConditionModel, model_config=unet.config)
        self.to("cpu" if offload else device)
        if self.stream is not None:
            self.pin_memory()

    @property
    def optimization_step(self) -> int:
        """Sound steps so far. Waits for the device: for checkpoints alone."""
        return int(self._steps)

    @optimization_step.setter
    def optimization_step(self, value: int) -> None:
        self._steps.fill_(value)

    @torch.no_grad()
    def update(self, parameters: Iterator[nn.Parameter], skipped: Tensor) -> None:
        """One step of the average, or none where `skipped` (a scalar on the device) is 1."""
        self._steps += 1 - skipped
        # 1 - decay, and 1 in the first step. (A number over a tensor would be its reciprocal first: rounded twice.)
        weight = (torch.full_like(self._steps, 9) / (9 + self._steps)).clamp(min=1 - self.decay)
        weight = torch.where(self._steps > 1, weight, 1.0) * (1 - skipped)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
            weight.record_stream(self.stream)
        with torch.cuda.stream(self.stream):  # nothing where there is none
            for shadow, parameter in zip(self.shadow_params, parameters, strict=True):
                average = torch.empty_like(parameter).copy_(shadow, non_blocking=True) if self.offload else shadow
                average.addcmul_(average - parameter, weight, value=-1)
                if self.offload:
                    shadow.copy_(average, non_blocking=True)

    def join(self) -> None:
        """To be called before anything else reads the average or writes to the student."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)


class StepHealth:
    """What all processes agree on at every step, whether it was sound and whether to stop, read one step later."""

    def __init__(self) -> None:
        self.bad = False  # the last step that was read was not finite
        self.stop_signal = 0  # that some process was sent; 0 for none
        self.received = 0  # the signal that this very process was sent
        self.last_checkpoint: Path | None = None
        self.last_good_checkpoint: Path | None = None  # one whose next step was sound
        self._unread: list[tuple[int, Tensor, Any]] = []  # step, flags, and when they have arrived

    def note(self, accelerator: Accelerator, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 on the device where this step must be skipped, on all processes alike, else 0.0."""
        bad = (~torch.stack([loss.float(), grad_norm.float()]).isfinite()).float()
        scale = bad.new_zeros(1) if accelerator.scaler is None else accelerator.scaler.scale(bad.new_ones(1))
        signals = [bad.new_full((1,), self.received == number) for number in STOP_SIGNALS]  # a copy would wait
        flags = accelerator.reduce(torch.cat([bad, scale, *signals]), reduction="max")
        on_gpu = flags.device.type == "cuda"
        copy = torch.empty(flags.shape, pin_memory=on_gpu).copy_(flags, non_blocking=on_gpu)
        self._unread.append((step, copy, torch.cuda.current_stream().record_event() if on_gpu else None))
        return flags[:2].amax()

    def read(self, state: RunState, wait: bool) -> Iterator[int]:
        """Bring `state` up to the step before the last one, or to the last with `wait`; yields the bad steps."""
        while len(self._unread) > (0 if wait else 1):
            step, flags, arrived = self._unread.pop(0)
            if arrived is not None:
                arrived.synchronize()
            loss_is_bad, norm_is_bad, scale, *signals = flags.tolist()
            # With fp16 a gradient norm that overflows is the loss scaler's business, as long as it has a way down.
            by_scaler = bool(norm_is_bad) and not loss_is_bad and scale >= 1
            sound = not (loss_is_bad or norm_is_bad)
            self.bad = not (sound or by_scaler)
            state.sound_steps += sound
            state.scaler_skips += by_scaler
            state.skipped_steps += self.bad
            state.bad_in_a_row = state.bad_in_a_row + 1 if self.bad else 0
            self.stop_signal = next((int(n) for n, sent in zip(STOP_SIGNALS, signals, strict=True) if sent), 0)
            if sound:
                self.last_good_checkpoint = self.last_checkpoint
            if self.bad:
                yield step

    def give_up(self) -> None:
        """Raise `GivenUp` where this process was sent a signal to stop."""
        if self.received:
            raise GivenUp

    def where_to_resume(self) -> str:
        """The checkpoint to go on from, for messages."""
        good = self.last_good_checkpoint if self.bad else self.last_checkpoint
        return f"the last good checkpoint is {good}" if good else "there is no good checkpoint yet"


@contextmanager
def stop_signals(health: StepHealth) -> Iterator[None]:
    """Take SIGTERM and SIGINT as the wish to save and stop after this step; a second SIGINT stops at once.

    A second SIGTERM does not: where a whole group is signalled, torchrun and systemd send their processes one more.
    """

    def note(number: int, _frame: Any) -> None:
        if health.received and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        health.received = number

    previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class MetricLog:
    """Metrics of every optimiser step, kept on the device and fetched together, so that no step waits for them."""

    def __init__(self, accelerator: Accelerator, names: Sequence[str]) -> None:
        self.accelerator, self.names = accelerator, [*names, "grad_norm"]
        self.latest: deque[tuple[int, dict[str, float]]] = deque(maxlen=100)  # (step, its metrics), fetched ones
        self._pending: list[tuple[int, float, Tensor]] = []
        self._tracks = True  # a tracker that failed does not come back: TensorBoard's writer is dead after a full disk

    def add(self, step: int, learning_rate: float, terms: Tensor, grad_norm: Tensor) -> None:
        """Keep the terms (len(names) - 1,) of optimiser step `step`, averaged over its micro-batches already."""
        self._pending.append((step, learning_rate, torch.cat([terms, grad_norm.to(terms.dtype).reshape(1)])))

    def write(self) -> None:
        """Average over processes and hand every kept step to the trackers. To be called by every process."""
        if not self._pending:
            return
        values = self.accelerator.reduce(torch.stack([terms for *_, terms in self._pending]), reduction="mean")
        for (step, learning_rate, _), row in zip(self._pending, values.cpu().tolist(), strict=True):
            metrics = dict(zip(self.names, row, strict=True)) | {"lr": learning_rate}
            self.latest.append((step, metrics))
            if self._tracks:
                with warn_instead_of_failing(f"Logging step {step}, and with it all that follow,"):
                    self._tracks = False
                    self.accelerator.log(metrics, step=step)
                    self._tracks = True
        self._pending.clear()

    def not_finite(self, step: int) -> str:
        """What of this step, one of those fetched last, is not finite, for messages."""
        return ", ".join(f"{k} is {v}" for k, v in dict(self.latest).get(step, {}).items() if not math.isfinite(v))

    def means(self) -> tuple[dict[str, float], int]:
        """The mean of every metric over the last steps that were finite, at most 100, and how many those are."""
        rows = [row for _, row in self.latest if all(map(math.isfinite, row.values()))]
        return {name: sum(row[name] for row in rows) / len(rows) for name in self.names if rows}, len(rows)


class GivenUp(Exception):
    """A signal came during what nothing is lost by giving up: validation images, or a measurement."""


@contextmanager
def warn_instead_of_failing(what: str) -> Iterator[None]:
    """What a run can do without must not end it: a full disk, or a tracker that is out of reach."""
    try:
        yield
    except GivenUp:
        logger.info(f"{what} is given up, to stop")
    except Exception as error:
        logger.warning(f"{what} failed ({first_line(error)}): the run goes on.")


# ----------------------------------------------------------------------------------------------------------------
# Samples. Whatever is random about a sample follows from (seed, epoch, sample) and the order from (seed, epoch), not
# from what was drawn before, so the place in the data is one number and a resumed run sees what it would have seen.

COUNTED = ("broken_image", "empty_caption", "unreadable", "enlarged")  # what a batch counts, see `collate_fn`
BROKEN_IMAGE, EMPTY_CAPTION, UNREADABLE, ENLARGED = range(len(COUNTED))


class UnusableSample(Exception):
    """A row that cannot be trained on, with BROKEN_IMAGE, EMPTY_CAPTION or UNREADABLE as its argument."""


def derived_seed(*parts: int | str) -> int:
    """A seed of 63 bits that follows from `parts` alone."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def image_transforms(
    resolution: int, center_crop: bool, random_flip: bool, interpolation: str = "lanczos"
) -> Callable[[Image.Image], Tensor]:
    """Image to a float32 tensor (3, resolution, resolution) in [-1, 1]; draws from torch's global generator.

    The shorter side is resized to `resolution` pixels, then the image is cropped, at random or in the centre.
    """
    return v2.Compose(
        [
            v2.Resize(resolution, interpolation=InterpolationMode[interpolation.upper()]),
            v2.CenterCrop(resolution) if center_crop else v2.RandomCrop(resolution),
            v2.RandomHorizontalFlip() if random_flip else v2.Identity(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5], [0.5]),
        ]
    )


def tokenize_captions(captions: Sequence[str | Sequence[str]], tokenizer: CLIPTokenizer, rng: random.Random) -> Tensor:
    """Token ids (captions, model_max_length), int64. Of a caption that is a list, `rng` picks one.

    Raises `ValueError` for a caption that is neither a string nor a list of strings.
    """
    texts = [caption if isinstance(caption, str) else rng.choice(list(caption) or [""]) for caption in captions]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"A caption must be a string or a list of strings, got one of {captions!r}.")
    settings = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return tokenizer(texts, max_length=tokenizer.model_max_length, **settings).input_ids


def usable_captions(text: Any) -> list[str]:
    """Of a caption or a list of them what can be learnt: not empty, decoded, without a NUL of another encoding."""
    captions = [each for each in (text if isinstance(text, (list, tuple)) else [text]) if isinstance(each, str)]
    captions = [each for each in captions if each.strip() and "\ufffd" not in each and "\0" not in each]
    return [each.encode("utf-8", "replace").decode() for each in captions]  # half a surrogate pair, from JSON


def load_pixels(source: Mapping[str, Any], transform: Callable[..., Tensor], seed: int) -> tuple[Tensor, bool]:
    """An undecoded image as `transform` gives it, and whether it was enlarged. Raises `UnusableSample`."""
    try:
        content = source["bytes"]
        if content is None:
            with xopen(source["path"], "rb") as file:  # a path may lie on the hub, or in a zip
                content = file.read()
    except OSError:
        raise UnusableSample(UNREADABLE) from None
    except Exception:  # there is no image, or its address is none
        raise UnusableSample(BROKEN_IMAGE) from None
    try:
        image = data.decode_image(content)
        longest = 16 * min(image.size)  # resizing a thin strip before it is cropped would take gigabytes
        if max(image.size) > longest:
            image = v2.functional.center_crop(image, [min(side, longest) for side in image.size[::-1]])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pixel_values = transform(image)
    except Exception:  # Pillow's plugins raise nearly anything on a broken file
        raise UnusableSample(BROKEN_IMAGE) from None
    return pixel_values, min(image.size) < pixel_values.shape[-1]


def load_latents(row: Mapping[str, Any], mirrors: bool, seed: int) -> dict[str, Tensor]:
    """`latent_mean` and `latent_std` of a row of latents, mirrored or not. Raises `UnusableSample`."""
    if row["fault"] is not None:
        raise UnusableSample(COUNTED.index(row["fault"]))
    # As RandomHorizontalFlip draws it: with a crop in the centre the same images are mirrored as without a cache.
    mirrored = mirrors and torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() < 0.5
    mean, std = torch.from_numpy(np.array(row["latents"][int(mirrored)]))
    return {"latent_mean": mean, "latent_std": std}


class TrainingData:
    """What both kinds of training data are: rows, and how an example is made of one."""

    def __init__(self, rows: Any, columns: tuple[str, str], seed: int, **prepare: Any) -> None:
        self.rows, self.columns, self.seed = rows, columns, seed  # columns: of the image and of the caption
        self.prepare = prepare  # transform, tokenizer, proportion_empty_prompts, mirrors, pool, left_over

    def prepare_example(self, row: Mapping[str, Any], *place: int) -> dict[str, Any]:
        """One training example of an undecoded row, its `caption` not tokenised yet. Raises `UnusableSample`.

        The caption, its dropout, that from the pool, the crop and the flip follow from the seed and `place` alone.
        `mirrors` draws one of two variants of latents. Without a tokenizer the example has all `captions`, and whether
        it was `enlarged`, for shards of latents.
        """
        seed, prepare = derived_seed(self.seed, "sample", *place), self.prepare
        if {"latents", "fault"} <= row.keys():
            example, enlarged = load_latents(row, prepare.get("mirrors", False), seed), row["enlarged"]
        else:
            pixel_values, enlarged = load_pixels(row[self.columns[0]], prepare["transform"], seed)
            example = {"pixel_values": pixel_values}
        captions = usable_captions(row[self.columns[1]])
        if not captions:
            raise UnusableSample(EMPTY_CAPTION)
        if prepare["tokenizer"] is None:
            return {**example, "captions": captions, "enlarged": enlarged}
        rng, counts = random.Random(seed), torch.zeros(len(COUNTED), dtype=torch.int64)
        counts[ENLARGED] = enlarged
        caption = "" if rng.random() < prepare["proportion_empty_prompts"] else rng.choice(captions)
        if (pool := prepare.get("pool")) is not None:  # where the caption is left empty, so is the one from the pool
            example["pool_input_ids"] = pool[rng.randrange(len(pool))] if caption else None
        return {**example, "caption": caption, "counts": counts}

    def tokenize(self, examples: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """The examples with `input_ids` (tokens,) for `caption`; many at once, which takes a third of the time."""
        captions = [example.pop("caption") for example in examples]
        rows = tokenize_captions(captions, self.prepare["tokenizer"], random.Random())
        for example, input_ids in zip(examples, rows, strict=True):
            example["input_ids"] = input_ids
            if "pool_input_ids" in example and example["pool_input_ids"] is None:
                example["pool_input_ids"] = input_ids
        return examples


class DistillationDataset(TrainingData, Dataset):
    """Map-style training data. `dataset[i]` is row i in file order, `dataset[(epoch, i)]` the same as of `epoch`.

    An example has `pixel_values` (3, H, W) in [-1, 1], or `latent_mean` and `latent_std` (C, h, w) float16 of a row of
    latents; `input_ids` (tokens,), with a pool `pool_input_ids` too; and `counts` (see `collate_fn`). A row that is
    broken is replaced by the next good one in an order that follows from (seed, epoch, row); `UserError` is raised
    only where all are broken.
    """

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[dict[str, Tensor]]:
        """A batch, as `DataLoader` asks for it."""
        return self.tokenize([self._usable(key) for key in keys])

    def _usable(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not -len(self) <= index < len(self):
            raise IndexError(index)  # also what ends a plain `for example in dataset`
        counts = torch.zeros(len(COUNTED), dtype=torch.int64)
        for candidate in self._candidates(epoch, index):
            try:
                example = self.example(epoch, candidate)
                return {**example, "counts": example["counts"] + counts}
            except UnusableSample as unusable:
                counts[unusable.args[0]] += 1
        raise UserError(f"None of the {len(self)} training samples can be used: {describe_counts(counts)}.")

    def example(self, epoch: int, row: int) -> dict[str, Any]:
        """The example made of this very row in `epoch`, see `prepare_example`. Raises `UnusableSample`."""
        try:
            return self.prepare_example(self.rows[row], epoch, row)
        except OSError:  # a shard that vanished in mid-run
            raise UnusableSample(UNREADABLE) from None

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        yield index
        rng = random.Random(derived_seed(self.seed, "replacement", epoch, index))
        size = len(self)
        stride = rng.randrange(1, size) if size > 1 else 1
        while math.gcd(stride, size) != 1:  # a stride without common divisor comes past every row
            stride = rng.randrange(1, size)
        yield from ((index + stride * step) % size for step in range(1, size))


class StreamingDataset(TrainingData, IterableDataset):
    """Training data read from the hub as it goes, without end: epoch follows epoch.

    The place of a row in the stream is its number. A broken row's place is taken by the next good one, so that
    `skip` counts rows and needs to decode none of them. Every process reads its own part of the stream, and every
    worker its own part of that.
    """

    def __init__(
        self, rows: datasets.IterableDataset, columns: tuple[str, str], seed: int, rank: int, **prepare: Any
    ) -> None:
        super().__init__(rows, columns, seed, **prepare)
        self.rank, self.shuffled = rank, False
        self.skip = 0  # rows that every worker reads past

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, to_skip = getattr(get_worker_info(), "id", 0), self.skip
        counts = torch.zeros(len(COUNTED), dtype=torch.int64)
        vacant = 0  # places of broken rows, waiting for the next good one
        for epoch in itertools.count():
            order = derived_seed(self.seed, "order", epoch) % 2**32
            rows, position = self.rows.shuffle(seed=order) if self.shuffled else self.rows, -1
            for position, row in enumerate(self._read(rows)):
                if to_skip > 0:
                    to_skip -= 1
                    continue
                try:
                    (example,) = self.tokenize([self.prepare_example(row, epoch, position, self.rank, worker)])
                except UnusableSample as unusable:
                    counts[unusable.args[0]] += 1
                    vacant += 1
                    continue
                yield {**example, "counts": example["counts"] + counts}
                counts.zero_()
                yield from [example] * vacant
                vacant = 0
            if position < 0:
                raise UserError("The stream has fewer samples than there are processes and workers to share them.")
            if vacant > position:
                raise UserError(f"No sample of the stream can be used: {describe_counts(counts)}.")

    @staticmethod
    def _read(rows: datasets.IterableDataset) -> Iterator[Mapping[str, Any]]:
        try:
            yield from rows
        except Exception as error:  # the network is gone for longer than is tried again, a file is damaged, ...
            message = f"The stream broke off ({first_line(error)}): go on with --resume_from_checkpoint latest."
            raise UserError(message) from error


class SeededBatches(Sampler[list[tuple[int, int]]]):
    """Endless batches of (epoch, row) for one process, starting at any micro-batch without reading what precedes it.

    Epochs are permutations that follow from (seed, epoch), laid end to end, so that every batch is full. Micro-batch
    m of process r holds places (m * processes + r) * batch_size and on of that order.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int, processes: int, first: int = 0) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.processes, self.first = rank, processes, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order_of = functools.lru_cache(1)(self._order)  # places only rise: no epoch comes twice
        for micro_batch in itertools.count(self.first):
            start = (micro_batch * self.processes + self.rank) * self.batch_size
            places = (divmod(place, self.size) for place in range(start, start + self.batch_size))
            yield [(epoch, int(order_of(epoch)[offset])) for epoch, offset in places]

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
        return torch.randperm(self.size, generator=generator)


def collate_fn(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A batch: `pixel_values` (B, 3, H, W) float32, `input_ids` (B, tokens), `counts` (4,) summed over the batch.

    Of latents `latent_mean` and `latent_std` (B, C, h, w), float16, stand for `pixel_values`. `counts` are rows that
    were replaced for a broken image, for an empty caption or for a file that could not be read, and images enlarged.
    They travel with the batch so that they count what was trained on, whatever workers have read ahead.
    """
    batch = {name: torch.stack([example[name] for example in examples]).contiguous() for name in examples[0]}
    return {**batch, "counts": batch["counts"].sum(0)}


def describe_counts(counts: Tensor) -> str:
    """How many samples were replaced, by reason, for messages."""
    broken, empty, unreadable, _ = counts.tolist()
    return f"{broken} with a broken image, {empty} with an empty caption, {unreadable} that could not be read"


def data_fingerprint(dataset: TrainingData, args: Namespace, processes: int) -> str:
    """What tells whether a resumed run has the same samples in the same order, wherever they now lie.

    The number of samples with a digest of 256 of them, evenly spread, and of all sizes where those are at hand.
    """
    if isinstance(dataset, StreamingDataset):  # its order depends on who shares it
        source = " ".join(filter(None, (args.dataset_name, args.dataset_config_name)))
        shared = f"{processes} processes with {args.dataloader_num_workers} workers, {args.train_batch_size} at a time"
        return f"{source} for {shared}"
    if isinstance(dataset.rows, range):
        made = f"{args.teacher_latents_steps} steps, guidance {args.teacher_latents_guidance_scale}"
        return f"{len(dataset)} of the teacher's latents ({made}, seed {args.teacher_latents_seed})"
    digest = hashlib.blake2b(digest_size=8)
    for index in np.linspace(0, len(dataset) - 1, min(len(dataset), 256)).astype(int).tolist():
        try:
            row = dataset.rows[index]
        except OSError:  # damaged, which training counts and replaces
            row = {}
        image, caption = (row.get(column) for column in dataset.columns)
        path = Path(image.get("path") or "") if image else Path()
        content = (image or {}).get("bytes") or (path.read_bytes() if path.is_file() else b"")
        digest.update(repr((path.name, hashlib.blake2b(content).digest(), caption)).encode())
    if isinstance(dataset.rows, data.ShardFolder):
        digest.update(dataset.rows.places[["image_bytes", "caption_bytes"]].tobytes())
    return f"{len(dataset)} samples ({digest.hexdigest()})"


def dataset_error(args: Namespace, error: BaseException) -> str:
    """The sentence for a dataset that cannot be read: the cause, and which flag or file it is about."""
    source, folder = args.dataset_name, Path(args.dataset_name)
    named = r"among the available configs: (\[.*?\])|BuilderConfig .* Available: (\[.*\])"
    if choices := re.search(named, str(error)):
        several = f"--dataset_name {source} has several configurations: choose one with --dataset_config_name"
        return f"{several}, of {choices[1] or choices[2]}."
    while error.__cause__ is not None:  # "An error occurred while generating the dataset"
        error = error.__cause__
    message = loading_error("read", "dataset_name", source, error)
    if folder.is_dir() and re.search(r"[][*?]", str(folder.absolute())):
        message += " (datasets takes brackets, * and ? in a folder's name for a pattern: rename it)"
    cut = []
    for path in folder.rglob("*.parquet"):
        try:
            pq.read_schema(path)
        except (OSError, ValueError):
            cut.append(path.name)
    return f"{message} ({', '.join(cut)} is damaged or cut)" if cut else message


def load_rows(args: Namespace) -> datasets.Dataset | datasets.IterableDataset:
    """The undecoded rows of a dataset. Raises `UserError` where they cannot be had."""
    source, folder = args.dataset_name, Path(args.dataset_name)
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():  # by `save_to_disk`
            rows = datasets.load_from_disk(source)
            if isinstance(rows, datasets.DatasetDict):
                if "train" not in rows:
                    raise UserError(f"it has no split train, but {', '.join(rows)}")
                rows = rows["train"]
            rows = rows.to_iterable_dataset() if args.streaming else rows
        else:
            builder = datasets.load_dataset_builder(source, args.dataset_config_name, cache_dir=args.cache_dir)
            if args.streaming:
                rows = builder.as_streaming_dataset(split="train")
            else:
                builder.download_and_prepare()
                rows = builder.as_dataset(split="train")
            used = {os.path.realpath(file) for file in (builder.config.data_files or {}).get("train", ())}
            kinds = {os.path.splitext(file)[1] for file in used}  # what is like them, in another split or none
            names = sorted(data.files_below(folder)) if folder.is_dir() else []
            alike = [name for name in names if os.path.splitext(name)[1] in kinds]
            if unread := [name for name in alike if os.path.realpath(folder / name) not in used]:
                split = f"{len(unread)} files of {source} are not in its split train"
                logger.warning(f"Training data: {split}, {unread[0]} among them: they are not read.")
        if rows.features is None:  # a stream of a format without a schema: its first rows tell
            rows = rows._resolve_features()
    except Exception as error:  # no network, no such dataset, no such split, files of mixed types, ...
        raise UserError(dataset_error(args, error)) from error
    for flag in ("image_column", "caption_column"):
        if getattr(args, flag) not in rows.column_names:
            there = f"the columns are {', '.join(rows.column_names)}."
            if folder.is_dir() and not data.why_no_images(folder):
                there += " A folder of images is for --train_data_dir."
            raise UserError(f"--{flag} {getattr(args, flag)} is not there; {there}")
    rows = rows.select_columns([args.image_column, args.caption_column])
    captions, images = rows.features[args.caption_column], rows.features[args.image_column]
    texts = getattr(captions, "feature", captions)  # a list of strings, or a string
    if getattr(images, "dtype", None) in ("string", "large_string"):
        value = next((row[args.image_column] for row in rows.take(8) if row[args.image_column]), "")
        if "://" not in value and not os.path.isfile(value):  # Path's own raises for a name that is too long
            what = f"holds text that names no file here ({value[:40]!r}): images, or paths of theirs, are needed."
            raise UserError(f"--image_column {args.image_column} {what}")
    if getattr(texts, "dtype", None) not in ("string", "large_string"):
        raise UserError(f"--caption_column {args.caption_column} holds {captions}; text or lists of it are needed.")
    try:
        return rows.cast_column(args.image_column, datasets.Image(decode=False))
    except Exception as error:
        raise UserError(f"--image_column {args.image_column} holds {images}; images are needed.") from error


def make_train_dataset(args: Namespace, tokenizer: CLIPTokenizer, accelerator: Accelerator) -> TrainingData:
    """The training data in file order (shuffling is the loader's). Raises `UserError` where it cannot be read."""
    if args.random_conditioning and not args.proportion_empty_prompts:
        logger.warning("--random_conditioning without --proportion_empty_prompts: guidance needs empty captions too.")
    if args.teacher_latents is not None:
        rows, columns = range(args.teacher_latents), ("image", "text")  # until the teacher has made them
    elif args.train_data_dir is not None:
        folder, columns = Path(args.train_data_dir), ("image", "text")
        try:
            if args.image_column != "image":
                there = f"the columns are image, {args.caption_column}"
                raise UserError(f"--image_column {args.image_column} is not there; {there}.")
            if data.shards_in(folder):
                rows = data.ShardFolder(folder, args.caption_column)
            else:
                rows = data.ImageFolder(folder, args.caption_column, args.caption_extension)
        except OSError as error:
            raise UserError(f"--train_data_dir {folder} cannot be read: {error}.") from error
        for sentence in rows.describe():
            logger.info(f"Training data: {sentence}")
    else:
        with accelerator.main_process_first():  # the others find the first one's cache
            rows, columns = load_rows(args), (args.image_column, args.caption_column)
    if args.teacher_latents is not None or (getattr(rows, "latents", None) or {}).get("maker") == TEACHER_MADE:
        logger.info(f"The latents are the teacher's, made with guidance: the task term weighs {args.task_weight:g}")
    crop = args.resolution, args.center_crop, args.random_flip, args.image_interpolation_mode
    prepare = {"transform": image_transforms(*crop), "mirrors": args.random_flip, "tokenizer": tokenizer}
    prepare |= {"proportion_empty_prompts": args.proportion_empty_prompts}
    if isinstance(rows, datasets.IterableDataset):
        if args.max_train_samples is not None:
            rows = rows.take(args.max_train_samples)
        prepare["left_over"] = rows.take(args.fidelity_samples)  # not left over, but the same for all processes
        rows = split_dataset_by_node(rows, accelerator.process_index, accelerator.num_processes)
        return StreamingDataset(rows, columns, args.seed, accelerator.process_index, **prepare)
    if len(rows) == 0 and args.teacher_latents is None:
        why = rows.describe_left_out() if isinstance(rows, data.Rows) else ""
        raise UserError(f"{args.train_data_dir or args.dataset_name} holds no image with a caption. {why}".strip())
    if args.max_train_samples is not None and args.max_train_samples < len(rows):
        chosen = random.Random(args.seed).sample(range(len(rows)), args.max_train_samples)
        if most := min(args.fidelity_samples, len(chosen) // 10):
            is_left, order = torch.ones(len(rows), dtype=torch.bool), by_seed(args, len(rows))
            is_left[chosen] = False
            others = order[is_left[order]][:most].tolist()
            if len(others) == most:
                prepare["left_over"] = rows_to_encode(copy.copy(rows).select(others), columns, args)
        rows = rows.select(chosen)
    return DistillationDataset(rows, columns, args.seed, **prepare)


def make_dataloader(
    dataset: TrainingData, args: Namespace, accelerator: Accelerator, first: int
) -> Iterator[dict[str, Tensor]]:
    """Endless shuffled micro-batches of this process, from micro-batch number `first` (per process) on."""
    workers, discard, size = args.dataloader_num_workers, 0, args.train_batch_size
    if isinstance(dataset, StreamingDataset):
        workers = min(workers, dataset.rows.num_shards)  # a worker without a shard would wait for ever
        dataset.shuffled = True
        rounds, discard = divmod(first, max(workers, 1))  # workers take turns, batch by batch
        dataset.skip = rounds * size
        order: dict[str, Any] = {"batch_size": size}
    else:
        process = accelerator.process_index, accelerator.num_processes
        order = {"batch_sampler": SeededBatches(len(dataset), size, args.seed, *process, first)}
    with closing(batches_of(dataset, workers, collate_fn, accelerator.device, **order)) as batches:
        for _ in range(discard):
            next(batches)
        yield from batches


def batches_of(
    dataset: Dataset, workers: int, collate: Callable[[list[Any]], Any], device: torch.device, **order: Any
) -> Iterator[Any]:
    """What a `DataLoader` yields. Its workers end when this generator does, by exhaustion, an error or `close`."""
    order |= {"collate_fn": collate, "pin_memory": device.type == "cuda", "worker_init_fn": ignore_signals}
    iterator = iter(DataLoader(dataset, num_workers=workers, **order))
    try:
        yield from iterator
    finally:
        # Workers ignore signals: those that an error's traceback keeps would be waited for at exit, for ever.
        if workers > 0:
            iterator._shutdown_workers()


def ignore_signals(_worker: int) -> None:
    """For a loader's workers: a signal to the whole group asks for a last step, which still needs their batches."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ----------------------------------------------------------------------------------------------------------------
# The caption pool: captions without images, for random conditioning and for latents made by the teacher.

TOKENIZED_AT_ONCE, TOKENS = 4096, "tokens.*.uint16"  # a digest of its content in the name


class CaptionPool(Sequence):
    """Captions as token ids in a memory-mapped file, 2 bytes a token: `pool[i]` is (tokens,), int64."""

    def __init__(self, path: Path, tokens: int) -> None:
        self.path, self.ids = path, np.memmap(path, np.uint16, "r").reshape(-1, tokens)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.ids[index].astype(np.int64))

    def __reduce__(self) -> tuple[type, tuple[Path, int]]:  # a worker that is not forked maps the file too
        return CaptionPool, (self.path, self.ids.shape[1])

    def fingerprint(self) -> str:
        """Their number and digest: what tells whether a resumed run, or latents made of them, have the same ones."""
        return f"{len(self)} captions ({self.path.name.split('.')[1]})"


def make_caption_pool(
    args: Namespace, dataset: TrainingData, tokenizer: CLIPTokenizer, accelerator: Accelerator
) -> CaptionPool | None:
    """The captions of --caption_pool, or of the data, tokenised where that was not done before.

    None where nothing reads them. To be called by all processes. With --random_conditioning the samples have it from
    here on. Raises `UserError` where there are too few, and `TrainingError` where the file cannot be shared.
    """
    if args.teacher_latents is None and not args.random_conditioning:
        return None
    if args.caption_pool is not None:
        settings = Path(args.caption_pool), args.caption_column, args.caption_extension
        texts, fingerprint = data.read_captions(*settings), data.captions_fingerprint(*settings)
    elif isinstance(rows := dataset.rows, data.Rows):
        texts, fingerprint = map(rows.caption, range(len(rows))), rows.fingerprint()
    else:
        texts, fingerprint = iter(rows[dataset.columns[1]]), rows._fingerprint
    if len(tokenizer) > 2**16:
        raise UserError(f"--{TEACHER}: its tokenizer has {len(tokenizer):,} tokens; of captions 16 bits are kept.")
    probe = tokenize_captions(["", "Two cafés, 3 o'clock"], tokenizer, random.Random()).tolist()  # padding, spelling
    facts = fingerprint, sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length, probe
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()
    folder = latents_folder(args) / f"captions-{digest}"
    if accelerator.is_main_process:
        with folder_lock("latents_cache_dir", folder, True):
            if not list(folder.glob(TOKENS)):
                try:
                    tokenize_pool(texts, tokenizer, folder)
                except OSError as error:
                    goes_on = "where the disk was full, make room, and the same command goes on"
                    raise TrainingError(
                        f"Captions cannot be read, or kept in {folder}: {error}; {goes_on}."
                    ) from error
    accelerator.wait_for_everyone()
    found = list(folder.glob(TOKENS))
    check_shared(accelerator, folder, bool(found))
    pool = CaptionPool(found[0], tokenizer.model_max_length)
    if len(pool) < (args.teacher_latents or 1):
        raise UserError(f"--teacher_latents {args.teacher_latents} is more than --caption_pool has: {len(pool):,}.")
    dataset.prepare["pool"] = pool if args.random_conditioning else None
    return pool


def choose_captions(args: Namespace, size: int, rows: range) -> list[str]:
    """The texts of these of a pool of `size` captions, in the order that --teacher_latents_seed gives them."""
    generator = torch.Generator().manual_seed(derived_seed(args.teacher_latents_seed, "captions"))
    chosen = torch.randperm(size, generator=generator)[rows.start : rows.stop].tolist()
    wanted = set(chosen)
    pool = data.read_captions(Path(args.caption_pool), args.caption_column, args.caption_extension)
    usable = enumerate(caption for text in pool for caption in usable_captions(text))
    last, shown = max(wanted) + 1, {"unit": " captions", "disable": not PartialState().is_main_process}
    progress = tqdm(itertools.islice(usable, last), "Choosing", last, **shown)
    texts = {number: caption for number, caption in progress if number in wanted}
    return [texts[number] for number in chosen]


def tokenize_pool(texts: Iterator[Any], tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the token ids of all usable captions; what is there of an earlier try is gone on from."""
    partial, row, left_out = data.hidden(folder / "tokens"), 2 * tokenizer.model_max_length, 0
    done = partial.stat().st_size // row if partial.exists() else 0

    def captions() -> Iterator[str]:
        nonlocal left_out
        for text in texts:
            usable = usable_captions(text)
            left_out += not usable
            yield from usable

    logger.info(f"Tokenising captions into {folder}, {row} bytes for each")
    with open(partial, "ab") as file, tqdm(desc="Tokenising", unit=" captions", initial=done) as progress:
        file.truncate(done * row)
        remaining = itertools.islice(captions(), done, None)
        while chunk := list(itertools.islice(remaining, TOKENIZED_AT_ONCE)):
            file.write(tokenize_captions(chunk, tokenizer, random.Random()).numpy().astype(np.uint16).tobytes())
            progress.update(len(chunk))
        kept = file.tell() // row
    logger.info(f"The pool has {kept:,} captions; left out: {left_out:,} samples without one that can be used")
    if kept == 0:
        raise UserError("The caption pool holds no caption that can be used (--caption_pool).")
    data.put_in_place(partial, folder / TOKENS.replace("*", data.file_sha256(partial)[:16]))


# ----------------------------------------------------------------------------------------------------------------
# Latents: of every image the mean and the standard deviation, in half precision (the least deviation of a VAE,
# exp(-15), is not yet zero there), beside its captions, in shards as data.py writes them. Their folder is named by a
# digest of all that they follow from, so that latents of anything else are never read.

TEACHER_MADE = "the teacher, by DPM-Solver++"
LATENTS_PER_SHARD = 512  # 32 MiB at 512 pixels; no more than this is encoded again after a kill


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of images (B, 3, H, W): (B, C, h, w) each, float32."""
    pixel_values = pixel_values.to(vae.device, dtype=vae.dtype, non_blocking=True)
    posterior = DiagonalGaussianDistribution(vae.encode(pixel_values).latent_dist.parameters.float())
    return posterior.mean.contiguous(), posterior.std.contiguous()  # as they come out of shards


class RowsToEncode(DistillationDataset):
    """Rows with all captions and the crop of epoch 0. One that cannot be used says why, under `fault`."""

    def __getitems__(self, keys: Sequence[int]) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        for row in keys:
            try:
                records.append(self.example(0, row))
            except UnusableSample as unusable:
                records.append({"captions": [], "fault": COUNTED[unusable.args[0]]})
        return records


def rows_to_encode(rows: Any, columns: tuple[str, str], args: Namespace) -> RowsToEncode:
    """These rows as the flags crop them, not mirrored: in a cache that is a variant of its own."""
    crop = image_transforms(args.resolution, args.center_crop, False, args.image_interpolation_mode)
    return RowsToEncode(rows, columns, args.seed, transform=crop, tokenizer=None)


@dataclass
class LatentShards:
    """Shards of latents that are wanted."""

    facts: Mapping[str, Any]  # all that they follow from, as their manifest says it
    dataset: DistillationDataset  # the samples that they are of
    vae: AutoencoderKL
    make: Callable[[list[range]], Iterator[tuple[bytes, dict[str, Any]]]]  # of batches of rows, each row's two members


def open_latents(folder: Path, size: int) -> data.ShardFolder | None:
    """The whole latents of `size` samples; None where some are missing, or not all of a shard is there."""
    with suppress(UserError, OSError):
        rows = data.ShardFolder(folder) if (folder / "manifest.json").is_file() else ()  # it is written last
        return rows if len(rows) == size else None
    return None


def latents_shape(vae: AutoencoderKL, args: Namespace) -> tuple[int, int, int]:
    """(C, h, w) of the latents of one image."""
    side = args.resolution // vae_factor(vae.config)
    return vae.config.latent_channels, side, side


def latents_folder(args: Namespace) -> Path:
    """Where latents and token ids are kept, each in a folder named by what it follows from."""
    return Path(args.latents_cache_dir or f"{Path(args.output_dir).resolve()}-latents")


def complete_latents(folder: Path, wanted: LatentShards, args: Namespace, accelerator: Accelerator) -> None:
    """Make the shards that are missing, each process its part, then the manifest. Raises as `latents_dataset` does."""
    flag, desc = ("teacher_latents", "Painting") if args.teacher_latents else ("cache_latents", "Encoding")
    size, batch_size, entries, free = len(wanted.dataset), args.train_batch_size, {}, 0
    shards = {n: range(size)[at : at + LATENTS_PER_SHARD] for n, at in enumerate(range(0, size, LATENTS_PER_SHARD))}
    if accelerator.is_main_process:
        free = shutil.disk_usage(folder).free
        for number, rows in shards.items():  # as an earlier run left them
            with suppress(UserError, OSError):  # cut, or not there
                entry = data.entry_of(folder / f"{data.shard_name(number)}.tar")
                entries |= {number: json.dumps(entry)} if entry["count"] == len(rows) else {}
    entries, free = accelerate_utils.broadcast_object_list([entries, free])
    missing = {number: rows for number, rows in shards.items() if number not in entries}
    images, numbers = sum(map(len, missing.values())), math.prod(latents_shape(wanted.vae, args))
    needed = images * (wanted.facts["variants"] * 4 * numbers + 2048)  # mean and deviation; headers, captions
    takes, has = tqdm.format_sizeof(needed, "B"), tqdm.format_sizeof(free, "B")
    if needed > free:
        needs = f"--{flag} needs {takes} in {folder} for {images:,} images, where {has} are free"
        raise UserError(f"{needs}: make room or choose another --latents_cache_dir.")
    logger.info(f"Making latents of {images:,} of {size:,} images in {folder}, which will take {takes}")
    started = time.perf_counter()
    mine = dict(list(missing.items())[accelerator.process_index :: accelerator.num_processes])
    # A batch ends with its shard: so it matters not which process makes it.
    batches = [rows[at : at + batch_size] for rows in mine.values() for at in range(0, len(rows), batch_size)]
    shown = {"total": sum(map(len, batches)), "desc": desc, "disable": not accelerator.is_main_process}
    made: dict[int, str] = {}
    with closing(wanted.make(batches)) as members, tqdm(unit=" images", **shown) as progress:
        for number, rows in mine.items():
            samples = []
            for row in rows:
                npy, record = next(members)
                samples.append((f"{row:09d}", {".npy": npy, ".json": json.dumps(record).encode()}))
                progress.update()
            made[number] = json.dumps(data.write_shard(folder, data.shard_name(number), samples))
    entries |= dict(accelerate_utils.gather_object(list(made.items())))
    parts = entries.values() if args.teacher_latents else ()  # over all processes, and all runs that made a part
    if (broken := sum(json.loads(part)["image_bytes"].count(0) for part in parts)) > 0.01 * size:
        raise TrainingError(f"{broken} of the teacher's {size} latents are not finite, even in float32: stopped.")
    if accelerator.is_main_process:
        head = {"format": data.FORMAT, "complete": True, "latents": wanted.facts}
        data.write_manifest(folder, head, [entries[number] for number in shards])
    accelerator.wait_for_everyone()
    seconds = time.perf_counter() - started
    logger.info(f"Made latents of {images:,} images in {seconds:.0f} s, {images / seconds:.1f} images per second")


def latents_dataset(wanted: LatentShards, args: Namespace, accelerator: Accelerator) -> DistillationDataset:
    """The samples with latents, from a folder named by what these follow from; to be called by every process.

    Where they are not whole, all processes make what is missing first. Raises `UserError` where there is no room
    for them, and `TrainingError` where they cannot be made or written.
    """
    folder = latents_folder(args) / hashlib.blake2b(json.dumps(wanted.facts).encode(), digest_size=8).hexdigest()
    size = len(wanted.dataset)
    # The main process alone looks before anything is made: a network's file system remembers what was not there.
    rows = open_latents(folder, size) if accelerator.is_main_process else None
    if accelerate_utils.broadcast_object_list([accelerator.is_main_process and rows is None])[0]:
        with folder_lock("latents_cache_dir", folder, True) if accelerator.is_main_process else nullcontext():
            if accelerator.is_main_process:
                rows = open_latents(folder, size)  # another run may just have made them
                for old in folder.parent.glob("*/settings.json"):
                    if "rows_per_shard" in old.read_text(errors="replace"):
                        logger.warning(f"{old.parent} holds latents in an earlier format, made anew now: delete it.")
            if accelerate_utils.broadcast_object_list([accelerator.is_main_process and rows is None])[0]:
                try:
                    complete_latents(folder, wanted, args, accelerator)
                except OSError as error:
                    raise TrainingError(
                        f"Latents cannot be written to {folder} ({first_line(error)}): make room, and the same "
                        "command goes on with what is made by now; or choose another --latents_cache_dir."
                    ) from error
    rows = rows or open_latents(folder, size)
    check_shared(accelerator, folder, rows is not None)
    return DistillationDataset(rows, ("image", "text"), args.seed, **wanted.dataset.prepare)


def cache_latents(
    dataset: DistillationDataset, vae: AutoencoderKL, args: Namespace, accelerator: Accelerator
) -> DistillationDataset:
    """The same samples with `latent_mean` and `latent_std` for `pixel_values`. Raises as `latents_dataset` does."""

    def encode(batches: list[range]) -> Iterator[tuple[bytes, dict[str, Any]]]:
        freeze(vae, accelerator.device, torch.float32)  # what is kept for good is not rounded on the way
        if use_channels_last(accelerator.device, torch.float32, args.compile):
            vae.to(memory_format=torch.channels_last)
        if args.compile:
            vae.encoder.compile(dynamic=False)
        to_encode = rows_to_encode(dataset.rows, dataset.columns, args)
        loader = batches_of(to_encode, args.dataloader_num_workers, list, vae.device, batch_sampler=batches)
        # TF32 is on by default, with 10 bits of mantissa.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), closing(loader):
            for rows in batches:
                yield from encode_batch(vae, rows, next(loader), args)

    rows, config = dataset.rows, vae.config
    fingerprint = rows.fingerprint() if isinstance(rows, data.Rows) else getattr(rows, "_fingerprint", None)
    settings = {"vae_config": public_config(config), "image_interpolation_mode": args.image_interpolation_mode}
    settings |= {"rows_per_shard": LATENTS_PER_SHARD, "samples": len(dataset), "data": fingerprint}
    facts = {"maker": "the VAE's encoder, in float32", "vae": weights_hash(vae)}
    facts |= {"scaling_factor": config.scaling_factor, "resolution": args.resolution, "variants": 1 + args.random_flip}
    facts |= {"crop": "in the centre" if args.center_crop else f"at random, by seed {args.seed}", "settings": settings}
    return latents_dataset(LatentShards(facts, dataset, vae, encode), args, accelerator)


def encode_batch(
    vae: AutoencoderKL, rows: range, examples: Sequence[dict[str, Any]], args: Namespace
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Of each of these rows of `RowsToEncode` the .npy file and the record.

    The file holds mean and deviation, as it is and, with --random_flip, mirrored: (variants, 2, C, h, w), float16.
    Raises `TrainingError` where a latent is not finite, and for a file that is out of reach.
    """
    images, latents = [example.pop("pixel_values") for example in examples if "pixel_values" in example], iter(())
    if images:
        pixel_values = torch.stack(images).contiguous().to(vae.device, non_blocking=True)
        if args.compile:  # one shape: rows that cannot be used would have the encoder compiled anew
            pixel_values = F.pad(pixel_values, (0, 0) * 3 + (0, args.train_batch_size - len(images)))
        variants = [pixel_values, pixel_values.flip(-1)][: 1 + args.random_flip]
        latents = torch.stack([torch.stack(encode_images(vae, variant), 1) for variant in variants], 1).half()
        if not latents.isfinite().all():
            place = f"among samples {rows[0]} to {rows[-1]}"
            raise TrainingError(f"Latents of an image {place} are not finite in float16.")
        latents = iter(latents[: len(images)].cpu().numpy())
    for row, example in zip(rows, examples, strict=True):
        if example.get("fault") == COUNTED[UNREADABLE]:  # it may be back tomorrow: not to be kept for good
            gone = "cannot be read (its file is gone or out of reach)"
            raise TrainingError(f"Sample {row} {gone}: put that right, then the same command goes on.")
        yield b"" if "fault" in example else data.write_npy(next(latents)), example


def sampling_pipeline(components: Components, unet: nn.Module) -> StableDiffusionPipeline:
    """The pipeline with this U-Net and DPM-Solver++, which makes images and the teacher's latents."""
    config = components.noise_scheduler.config
    kind = {"prediction_type": config.prediction_type, "algorithm_type": "dpmsolver++"}  # which draws nothing itself
    scheduler = DPMSolverMultistepScheduler.from_config(config, **kind)
    parts = components.vae, components.text_encoder, components.tokenizer, unet, scheduler
    pipeline = StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)  # no checker, no extractor
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def paint_latents(pipeline: StableDiffusionPipeline, captions: Sequence[str], rows: range, args: Namespace) -> Tensor:
    """The teacher's latents of these samples, as the VAE's mean would be: (B, C, h, w), float32, on the host.

    The noise of a sample follows from --teacher_latents_seed and its number alone.
    """
    device, shape = pipeline.unet.device, latents_shape(pipeline.vae, args)
    seeds = [derived_seed(args.teacher_latents_seed, "latent", row) for row in rows]
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    settings = {"num_inference_steps": args.teacher_latents_steps, "height": args.resolution, "width": args.resolution}
    settings |= {"guidance_scale": args.teacher_latents_guidance_scale, "output_type": "latent"}
    full = args.train_batch_size if args.compile else len(captions)  # compiled, all batches are of one shape
    prompts = [*captions, *[""] * (full - len(captions))]
    latents = torch.stack(noise + [torch.zeros(shape)] * (full - len(captions)))
    latents = latents.to(device, pipeline.unet.dtype)
    painted = pipeline(prompts, latents=latents, **settings).images[: len(captions)]
    # The pipeline's are multiplied by the factor, which the training step does itself.
    return painted.float().cpu() / pipeline.vae.config.scaling_factor


def make_teacher_latents(
    dataset: DistillationDataset,
    pool: CaptionPool,
    components: Components,
    contents: Mapping[str, str],
    args: Namespace,
    accelerator: Accelerator,
) -> DistillationDataset:
    """The samples with latents that the teacher makes of captions. Raises as `latents_dataset` does.

    Latents that are not finite are made once more in float32, and count as broken images where that does not help.
    """

    def paint(batches: list[range]) -> Iterator[tuple[bytes, dict[str, Any]]]:
        unet = freeze(components.teacher_unet, accelerator.device, WEIGHT_DTYPES[accelerator.mixed_precision])
        freeze(components.text_encoder, accelerator.device, unet.dtype)
        pipeline = sampling_pipeline(components, torch.compile(unet, dynamic=False) if args.compile else unet)
        captions, size, broken = choose_captions(args, len(pool), dataset.rows), args.train_batch_size, 0
        for _ in range(2):  # the first batch compiles, or is slow otherwise
            started = time.perf_counter()
            paint_latents(pipeline, [""] * size, range(size), args)
        seconds = (time.perf_counter() - started) * len(batches)
        logger.info(f"Painting will take about {timedelta(seconds=round(seconds))}")
        for rows in batches:
            texts = [captions[row] for row in rows]
            latents = paint_latents(pipeline, texts, rows, args).half()
            if not latents.isfinite().all():
                models, dtype = (pipeline.unet, pipeline.text_encoder), unet.dtype
                for model in models:
                    model.float()
                latents = paint_latents(pipeline, texts, rows, args).half()
                for model in models:
                    model.to(dtype)
            for text, mean in zip(texts, latents, strict=True):
                if mean.isfinite().all():
                    both = torch.stack([mean, torch.zeros_like(mean)])[None]
                    yield data.write_npy(both.numpy()), {"captions": [text]}
                    continue
                broken += 1
                if broken > 0.01 * len(captions):
                    raise TrainingError(f"{broken} of the teacher's latents are not finite, even in float32: stopped.")
                yield b"", {"captions": [], "fault": COUNTED[BROKEN_IMAGE]}

    vae, precision = components.vae, accelerator.mixed_precision
    names = ("teacher_latents", "teacher_latents_seed", "teacher_latents_steps", "teacher_latents_guidance_scale")
    settings = {name: getattr(args, name) for name in (*names, "train_batch_size", "compile", "prediction_type")}
    settings |= {name: value for name, value in contents.items() if name.startswith("teacher's")}
    settings |= {"precision": precision, "captions": pool.fingerprint(), "rows_per_shard": LATENTS_PER_SHARD}
    facts = {"maker": TEACHER_MADE, "vae": contents["teacher's VAE"], "scaling_factor": vae.config.scaling_factor}
    facts |= {"resolution": args.resolution, "variants": 1, "crop": "none", "settings": settings}
    painted = latents_dataset(LatentShards(facts, dataset, vae, paint), args, accelerator)
    if args.compile:
        torch._dynamo.reset()  # hooks that are registered on the teacher now would be ignored otherwise
    return painted


# ----------------------------------------------------------------------------------------------------------------
# Models. Only the student is trained, prepared and checkpointed; all others are frozen and cast.


def loading_error(done: str, flag: str, source: str, error: BaseException, part: str | None = None) -> str:
    """The sentence for a model, a part of one or a dataset that cannot be loaded or read."""
    what = f"--{flag} {source} ({part}) cannot be {done}" if part else f"--{flag} {source} cannot be {done}"
    absent = "it is no folder here, and the hub does not have it or is out of reach"
    return f"{what}: {first_line(error)}" if Path(source).exists() else f"{what} ({absent}): {first_line(error)}"


def load_component(component: type, args: Namespace, flag: str = TEACHER, **kwargs: Any) -> Any:
    """`component.from_pretrained` of what `flag` names, in float32. Raises `UserError` where that fails.

    The dtype is explicit since transformers otherwise keeps the file's; missing tensors are an error since diffusers
    otherwise goes on with a warning. Weights are read from safetensors only: loading a pickle can run any code.
    """
    source, part_name = getattr(args, flag), kwargs.get("subfolder")
    if Path(source).is_file():
        pipeline = open_single_file(source, args.single_file_config, args.cache_dir)
        part = getattr(pipeline, part_name) if part_name else pipeline
        return part.config if component is CLIPTextConfig else part
    if flag == TEACHER:
        kwargs |= {"revision": args.revision}
    if issubclass(component, DiffusionPipeline):
        kwargs |= {"use_safetensors": True, "variant": args.variant}
    if issubclass(component, nn.Module):
        kwargs |= {"use_safetensors": True, "variant": weights_variant(args, part_name, flag)}
        kwargs |= {"dtype": torch.float32, "output_loading_info": True}
    try:
        loaded = component.from_pretrained(source, cache_dir=args.cache_dir, **kwargs)
    except Exception as error:  # absent, not reachable, cut short, of another class, ...
        raise UserError(loading_error("loaded", flag, source, error, part_name)) from error
    if issubclass(component, nn.Module):
        loaded, info = loaded
        if missing := info["missing_keys"]:
            raise UserError(f"--{flag} {source}: {len(missing)} tensors are missing from its {component.__name__}.")
    return loaded


def model_folder(source: str | Path, cache_dir: str | None, revision: str | None = None) -> Path | None:
    """A model's folder, or so much of it as was fetched from the hub; None for a single file and where none is."""
    if Path(source).exists():
        return Path(source) if Path(source).is_dir() else None
    cached = huggingface_hub.try_to_load_from_cache(source, "unet/config.json", cache_dir=cache_dir, revision=revision)
    return Path(cached).parents[1] if isinstance(cached, str) else None


@functools.lru_cache  # every part of a model asks
def files_on_hub(source: str, revision: str | None) -> list[str]:
    """Names of the files of a repository; none where it is out of reach."""
    with suppress(Exception):
        return huggingface_hub.list_repo_files(source, revision=revision)
    return []


def files_of(source: str | Path, cache_dir: str | None, revision: str | None = None) -> list[str]:
    """Names of the files of a model's parts, on the hub or in `model_folder`; none where they are not known."""
    if not Path(source).exists() and (listed := files_on_hub(str(source), revision)):
        return listed
    folder = model_folder(source, cache_dir, revision)
    return [path.relative_to(folder).as_posix() for path in folder.glob("*/*")] if folder else []


def weights_variant(args: Namespace, part: str, flag: str = TEACHER) -> str | None:
    """The variant that a part's weights are read of: --variant or, as in diffusers, none where no file is of that.

    Raises `UserError` where the names of its files show that there is neither.
    """
    source, is_teacher = getattr(args, flag), flag == TEACHER
    wanted, revision = (args.variant, args.revision) if is_teacher else (None, None)
    names = files_of(source, args.cache_dir, revision)
    pattern = re.compile(r"(\w+)/\w+(?:-\d+-of-\d+)?(?:\.([\w-]+?)(?:-\d+-of-\d+)?)?\.safetensors")
    found = {match.groups() for name in names if (match := pattern.fullmatch(name))}
    variants, of_part = {variant for _, variant in found}, {variant for name, variant in found if name == part}
    if names and wanted and wanted not in variants:
        there = ", ".join(sorted(filter(None, variants))) or "none"
        raise UserError(f"--variant {wanted}: --{flag} {source} has no *.safetensors of it (variants: {there}).")
    if wanted in of_part or not names:
        return wanted
    if None in of_part:
        return None
    advice = ""
    if of_part and is_teacher:
        advice = f" Its files are a variant's: say --variant {' or '.join(sorted(of_part))}."
    elif any(name.startswith(f"{part}/") and name.endswith(".bin") for name in names):
        convert = f"diffusers.DiffusionPipeline.from_pretrained('{source}').save_pretrained('converted')"
        advice = " Only safetensors are read; if you trust its .bin weights, convert them once: "
        advice += f'python -c "import diffusers; {convert}"'
    raise UserError(f"--{flag} {source} ({part}) cannot be loaded: it has no weights in *.safetensors.{advice}")


@functools.lru_cache(maxsize=1)  # until `load_components` forgets it: every part is asked for by itself
def open_single_file(path: str, config: str | None, cache_dir: str | None) -> StableDiffusionPipeline:
    """A pipeline in float32 from one file in the original layout. Raises `UserError` where that fails."""
    settings = {"config": config, "cache_dir": cache_dir, "dtype": torch.float32}
    try:
        if config:
            index = StableDiffusionPipeline.load_config(config, cache_dir=cache_dir)
            settings |= dict.fromkeys(absent_parts(index, files_of(config, cache_dir)))
        pipeline = StableDiffusionPipeline.from_single_file(path, **settings)
    except Exception as error:
        configs = f"--single_file_config {config}" if config else "the hub, or from --single_file_config FOLDER"
        why = "tensors are missing from it" if "meta tensor" in str(error) else first_line(error)
        raise UserError(f"--{TEACHER} {path} cannot be loaded: {why} (its configs come from {configs})") from error
    if pipeline.safety_checker is None and pipeline.config.requires_safety_checker:
        logger.warning("A single file holds no safety checker: it is left out.")
        pipeline.register_to_config(requires_safety_checker=False)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and any(tensor.is_meta for tensor in part.state_dict().values()):
            raise UserError(f"--{TEACHER} {path}: tensors are missing from its {name}.")
    return pipeline


# Parts that nobody needs, with the end of the name of a file that they cannot do without.
OPTIONAL_PARTS = {"safety_checker": ".safetensors", "feature_extractor": ".json", "image_encoder": ".safetensors"}


def absent_parts(index: Mapping[str, Any], files: Sequence[str]) -> list[str]:
    """Parts that a pipeline's index names and its files, where known, lack; a safety checker that nobody fetched, say.

    Warns of each. Raises `UserError` for a part that is needed.
    """
    parts = [name for name, kind in index.items() if files and isinstance(kind, (list, tuple)) and any(kind)]
    ends = {name: OPTIONAL_PARTS.get(name, "") for name in parts}
    found = {name: [file for file in files if file.startswith(f"{name}/")] for name in parts}
    absent = [name for name in parts if not any(file.endswith(ends[name]) for file in found[name])]
    if "safety_checker" in parts and "feature_extractor" not in set(parts) - set(absent):
        absent = list(dict.fromkeys([*absent, "safety_checker"]))  # which the library takes with the other only
    for name in absent:
        named = f"The teacher's {name} is named in its model_index.json and not there"
        if not ends[name]:
            raise UserError(named)
        logger.warning(f"{named}: it is left out.")
    return absent


def load_config(component: type, args: Namespace, flag: str = TEACHER, **kwargs: Any) -> dict[str, Any]:
    """A component's config alone. Raises `UserError` naming `flag` where it cannot be had."""
    source, revision = getattr(args, flag), args.revision if flag == TEACHER else None
    if Path(source).is_file():
        part = load_component(component, args, flag, **kwargs)
        return {"_class_name": type(part).__name__, **part.config}
    try:
        config = component.load_config(source, revision=revision, cache_dir=args.cache_dir, **kwargs)
        if not isinstance(config, dict):
            raise TypeError("its config is no JSON object")
        return config
    except Exception as error:
        raise UserError(loading_error("loaded", flag, source, error, kwargs.get("subfolder"))) from error


def vae_factor(vae_config: Mapping[str, Any]) -> int:
    """Pixels on each side of one of the VAE's latents."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def text_width(unet_config: Mapping[str, Any]) -> int:
    """Numbers a token that a U-Net attends to."""
    return int(np.max(unet_config.get("cross_attention_dim", 1280)))  # it may be a list, one for every level


def check_pipeline(args: Namespace, flag: str) -> None:
    """Raise `UserError` where a pipeline's index shows that it is of another class, or that --export cannot be met."""
    index, source, needed = load_config(DiffusionPipeline, args, flag), getattr(args, flag), "StableDiffusionPipeline"
    if (kind := index.get("_class_name")) != needed:
        raise UserError(f"--{flag} {source} is a {kind}; a {needed} is needed.")
    encoder = (index.get("text_encoder") or [None])[-1]
    if "single_file" in (args.export or []) and encoder != "CLIPTextModel":
        raise UserError(f"--export single_file takes a CLIPTextModel; the text encoder of {source} is a {encoder}.")


def check_teacher(args: Namespace) -> dict[str, Any]:
    """The teacher's U-Net config. Raises `UserError` where configs alone show that it cannot be distilled."""
    check_pipeline(args, TEACHER)
    unet_config = load_config(UNet2DConditionModel, args, subfolder="unet")
    vae_config = load_config(AutoencoderKL, args, subfolder="vae")
    try:
        check_prunable(unet_config)
        takes, gives = unet_config.get("in_channels", 4), vae_config.get("latent_channels", 4)
        factor = vae_factor(vae_config)
    except (AttributeError, KeyError, TypeError) as error:
        damaged = f"the config of its unet or vae is damaged ({type(error).__name__}: {first_line(error)})"
        raise UserError(f"--{TEACHER} {args.pretrained_model_name_or_path}: {damaged}.") from error
    if takes != gives:
        kind = "an inpainting or depth model cannot be distilled by this script"
        raise UserError(f"The teacher's U-Net takes {takes} channels where its VAE gives {gives}: {kind}.")
    if args.resolution % factor:
        raise UserError(f"--resolution must be a multiple of {factor}, the VAE's factor, got {args.resolution}.")
    return unet_config


def check_text_encoder(args: Namespace, tokenizer: CLIPTokenizer, unet_config: Mapping[str, Any]) -> None:
    """Raise `UserError` where the text encoder's config fits neither the tokenizer nor the U-Net."""
    source, config_file = args.pretrained_model_name_or_path, "text_encoder/config.json"
    if (files := files_of(source, args.cache_dir, args.revision)) and config_file not in files:
        raise UserError(f"--{TEACHER} {source} has no {config_file}.")
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes of an empty folder
        missing = "has no vocabulary: vocab.json and merges.txt, or tokenizer.json, are missing"
        raise UserError(f"--{TEACHER} {source} (tokenizer) {missing}.")
    config = load_component(CLIPTextConfig, args, subfolder="text_encoder")
    highest, width = max(tokenizer.get_vocab().values()), unet_config.get("cross_attention_dim", 1280)
    if highest >= config.vocab_size:
        added = f"its tokenizer has tokens up to number {highest}, its text encoder {config.vocab_size} of them"
        raise UserError(f"--{TEACHER} {source}: {added}: save the text encoder with the embeddings of added tokens.")
    if any(np.ravel(width) != config.hidden_size):
        other = f"its text encoder gives {config.hidden_size} numbers a token, its U-Net attends to {width}"
        raise UserError(f"--{TEACHER} {source}: {other}: the text encoder is that of another model.")


def load_noise_scheduler(args: Namespace) -> DDPMScheduler:
    """The teacher's noise schedule. Raises `UserError` where its prediction type is not known."""
    config = load_config(DDPMScheduler, args, subfolder="scheduler")
    if not {"beta_start", "beta_schedule"} <= config.keys():
        kin = f"({config.get('_class_name')}) has no beta_start and beta_schedule, as those of Stable Diffusion have"
        raise UserError(f"The teacher's scheduler {kin}.")
    scheduler = load_component(DDPMScheduler, args, subfolder="scheduler")  # of a single file, of any class
    noise_scheduler = DDPMScheduler.from_config(scheduler.config)
    if args.prediction_type is not None:
        noise_scheduler.register_to_config(prediction_type=args.prediction_type)
    kind, known = noise_scheduler.config.prediction_type, " and ".join(PREDICTION_TYPES)
    if kind not in PREDICTION_TYPES:
        has = f"The teacher's scheduler has prediction_type {kind}; known are {known}"
        raise UserError(f"{has}: say which it is with --prediction_type.")
    return noise_scheduler


def load_components(
    args: Namespace, teacher_config: Mapping[str, Any], tokenizer: CLIPTokenizer, scheduler: DDPMScheduler
) -> Components:
    """All models with weights in float32, beside what was read before. Raises `UserError` where one cannot be had.

    The teacher's U-Net is None where neither a loss term nor latents need it.
    """
    distils, prunes = args.output_weight > 0 or args.feature_weight > 0, args.student_model_name_or_path is None
    files = files_of(args.pretrained_model_name_or_path, args.cache_dir, args.revision)
    absent = absent_parts(load_config(DiffusionPipeline, args), files)
    for part in ("text_encoder", "vae", *(["unet"] if prunes else [])):
        weights_variant(args, part)
    text_encoder = load_component(CLIPTextModel, args, subfolder="text_encoder")
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    vae = load_component(AutoencoderKL, args, subfolder="vae")
    needed = distils or prunes or args.teacher_latents
    teacher_unet = load_component(UNet2DConditionModel, args, subfolder="unet") if needed else None
    unet = None
    if args.evaluate is None and prunes:
        unet = build_student(teacher_unet, args.distill_level)
    elif args.evaluate is None:
        unet = load_component(UNet2DConditionModel, args, STUDENT, subfolder="unet")
        check_student(unet.config, teacher_config, args.distill_level)
    teacher_unet = teacher_unet if distils or args.teacher_latents else None
    models = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "unet": unet}
    # All but the U-Net is read as the index says, as it will be when the result is loaded back: that must not fail
    # after days.
    load_component(StableDiffusionPipeline, args, unet=None, **dict.fromkeys(absent))
    open_single_file.cache_clear()
    return Components(noise_scheduler=scheduler, teacher_unet=teacher_unet, **models)


def describe_contents(
    dataset: Dataset,
    pool: "CaptionPool | None",
    components: Components,
    teacher_config: Mapping[str, Any],
    args: Namespace,
    processes: int,
) -> dict[str, str]:
    """Digests of data and teacher, by which a resumed run knows them again."""
    models = {"U-Net": components.teacher_unet, "VAE": components.vae, "text encoder": components.text_encoder}
    hashes = {f"teacher's {name}": weights_hash(model) for name, model in models.items() if model is not None}
    configs = (teacher_config, components.vae.config, components.noise_scheduler.config)
    text = repr([sorted(public_config(config).items()) for config in configs])
    hashes |= {"teacher's configs": hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}
    hashes |= {"caption pool": pool.fingerprint()} if pool is not None else {}
    return {"data": data_fingerprint(dataset, args, processes)} | hashes


def weights_hash(model: nn.Module) -> str:
    """Digest of all names and values, to tell whether a model is still the one that a run began with."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def predict_noise(model: UNet2DConditionModel) -> Tensor:
    """What a U-Net predicts of noise that is always the same, to see that it works and that two are one."""
    generator, weight, side = torch.Generator().manual_seed(0), model.conv_in.weight, 2 ** len(model.down_blocks)
    sample = torch.randn(1, model.config.in_channels, side, side, generator=generator).to(weight)
    text = torch.randn(1, 8, text_width(model.config), generator=generator).to(weight)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(sample, 500, text, return_dict=False)[0]


def check_features(model: nn.Module, tap: FeatureTap) -> None:
    """Run a U-Net once on noise: raise `UserError` for features that are not finite, warn of constant ones."""
    predict_noise(model)
    for name, feature in zip(tap.names, tap.pop(), strict=True):
        spread = feature.float().std()
        if not spread.isfinite():
            raise UserError(f"{name} of a U-Net puts out numbers that are not finite: are its weights whole?")
        if spread == 0:
            logger.warning(f"{name} of a U-Net puts out a constant: its feature loss teaches nothing.")


def freeze(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model without gradients, in evaluation mode, on the device in this precision."""
    return model.requires_grad_(False).eval().to(device, dtype=dtype)


def use_channels_last(device: torch.device, dtype: torch.dtype, compiled: bool) -> bool:
    """Whether the nets are faster with channels last: on a GPU only when compiled, on a CPU only in bf16."""
    return compiled if device.type == "cuda" else dtype == torch.bfloat16


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without its hidden entries, which hold versions and paths."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def meta_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A U-Net without the memory for its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(_complete_unet_config(config))


def count_parameters(model: nn.Module) -> int:
    """The number of a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints: student, EMA, optimiser, schedule, and the random state of every process. One is written beside its
# place and renamed when all of it is on the disk, so that whatever bears a checkpoint's name is whole.

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
LEFTOVER_NAME = re.compile(r"\.checkpoint-\d+\.(partial|removed)")
STATE_FILE = "trainer_state.json"  # shows that a folder is ours
SHARED_DISK_SECONDS = 60  # a network's file system remembers for so long what was not there
TOTAL_BATCH, LATENTS_PRECISION = "images per optimiser step", "precision of cached latents"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints `checkpoint-N` in `output_dir`, by rising N; whatever else lies there is ignored."""
    found = [(CHECKPOINT_NAME.fullmatch(path.parent.name), path) for path in Path(output_dir).glob(f"*/{STATE_FILE}")]
    return [path.parent for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def find_checkpoint(output_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: None for none, or for `latest` where there is none.

    A name is looked for in `output_dir`, then as a path. Raises `FileNotFoundError`, with the list of those that are
    there, where it is absent.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume is None:
        return None
    if resume == "latest":
        return checkpoints[-1] if checkpoints else None
    for path in (Path(output_dir) / resume, Path(resume)):
        if CHECKPOINT_NAME.fullmatch(path.name) and (path / STATE_FILE).is_file():
            return path
    there = f"the checkpoints in {output_dir} are: {', '.join(path.name for path in checkpoints) or 'none'}."
    raise FileNotFoundError(f"--resume_from_checkpoint {resume} does not exist; {there}")


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint or what was left of one, so that a kill on the way leaves nothing that looks whole."""
    if CHECKPOINT_NAME.fullmatch(path.name):
        path = path.rename(path.with_name(f".{path.name}.removed"))
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name == STATE_FILE):  # last what shows that it is ours
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    path.rmdir()


def remove_leftovers(output_dir: Path) -> None:
    """Delete what killed runs left of checkpoints in `output_dir`, and nothing that may be someone else's."""
    for path in Path(output_dir).glob(".checkpoint-*"):
        ours = LEFTOVER_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        if ours and ((path / STATE_FILE).is_file() or not any(path.iterdir())):
            remove_checkpoint(path)


def prune_checkpoints(output_dir: Path, keep: int, newest: int | None = None) -> list[Path]:
    """Delete all but the newest `keep` checkpoints, of those up to step `newest`; returns the deleted ones."""
    steps = {path: int(path.name.partition("-")[2]) for path in list_checkpoints(output_dir)}
    checkpoints = [path for path, step in steps.items() if newest is None or step <= newest]
    surplus = checkpoints[: max(len(checkpoints) - keep, 0)]
    for path in surplus:
        remove_checkpoint(path)
    return surplus


def checkpoint_hooks(accelerator: Accelerator, ema_unet: EMAModel | None) -> tuple[Callable, Callable]:
    """Hooks for `accelerator.save_state` and `load_state` that keep the student in diffusers' own format.

    The student is written to `unet/`, its moving average to `unet_ema/`; both load with `from_pretrained`.
    """

    def save(models: list[nn.Module], weights: list[Mapping[str, Tensor]], output_dir: str) -> None:
        if len(models) != 1:  # were the teacher prepared too, it would overwrite the student here
            raise ValueError(f"A checkpoint holds the student alone, got {len(models)} models.")
        if accelerator.is_main_process:
            accelerator.unwrap_model(models[0], keep_torch_compile=False).save_pretrained(Path(output_dir) / "unet")
            if ema_unet is not None:
                if accelerator.device.type == "cuda":
                    torch.cuda.synchronize()  # an offloaded average may be on its way to the host
                ema_unet.save_pretrained(Path(output_dir) / "unet_ema")
        weights.clear()  # accelerate then writes no copy of its own

    @torch.no_grad()  # else the average would remember that it was copied, and every copy after that
    def load(models: list[nn.Module], input_dir: str) -> None:
        student = average = UNet2DConditionModel.from_pretrained(input_dir, subfolder="unet", use_safetensors=True)
        unet = accelerator.unwrap_model(models.pop(), keep_torch_compile=False)
        unet.load_state_dict(student.state_dict(), strict=True)
        if ema_unet is None:
            return
        if (Path(input_dir) / "unet_ema").is_dir():  # else --use_ema is new (--allow_changed_settings)
            average = UNet2DConditionModel.from_pretrained(input_dir, subfolder="unet_ema", use_safetensors=True)
            ema_unet.optimization_step = average.config["optimization_step"]
        for shadow, parameter in zip(ema_unet.shadow_params, average.parameters(), strict=True):
            shadow.copy_(parameter)

    return save, load


def total_batch_size(args: Namespace, accelerator: Accelerator) -> int:
    """Images per optimiser step, with accumulation and over all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def peak_learning_rate(args: Namespace, accelerator: Accelerator) -> float:
    """The learning rate after warm-up, with --scale_lr."""
    return args.learning_rate * (total_batch_size(args, accelerator) if args.scale_lr else 1)


def run_settings(args: Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """What the flags decide about the weights that come out; a checkpoint keeps it, with data and teacher."""
    settings = {name: getattr(args, name) for name, flag in FLAGS.items() if flag.resume != "free"}
    settings |= {"mixed_precision": accelerator.mixed_precision, TOTAL_BATCH: total_batch_size(args, accelerator)}
    return settings | ({LATENTS_PRECISION: "no"} if args.cache_latents else {})


def check_unchanged(
    checkpoint: Path | None, saved: Mapping[str, Any], settings: Mapping[str, Any], args: Namespace
) -> None:
    """Raise `UserError` naming all of `settings` that differ from `saved`, or warn with --allow_changed_settings.

    A flag that the checkpoint was made before stands for the value that its row says.
    """
    settings = json.loads(json.dumps(settings))  # as what is compared with: tuples become lists
    before = {name: flag.before for name, flag in FLAGS.items()}
    # Latents used to be encoded in the precision of the run.
    before[LATENTS_PRECISION] = saved.get("mixed_precision") if saved.get("cache_latents") else "no"
    then = {name: saved.get(name, before.get(name)) for name in settings if name in saved or name in before}
    changed = [name for name, value in then.items() if value != settings[name]]
    if checkpoint is None or not changed:
        return
    message = f"{checkpoint} was made with other settings: "
    message += "; ".join(f"{name} {then[name]} -> {settings[name]}" for name in changed)
    if TOTAL_BATCH in changed:
        message += " (--train_batch_size * --gradient_accumulation_steps * processes: choose the two flags to fit)"
    fixed = [name for name in changed if name in FLAGS and FLAGS[name].resume == "never"]
    if fixed:
        raise UserError(f"{message}. With {' and '.join(fixed)} changed it cannot be gone on from at all.")
    if not args.allow_changed_settings:
        raise UserError(f"{message}. Give the same ones, or --allow_changed_settings to go on all the same.")
    logger.warning(f"{message} (--allow_changed_settings).")


def read_trainer_state(checkpoint: Path, args: Namespace) -> RunState:
    """What `save_checkpoint` noted. Raises `UserError` where it is damaged or past --max_train_steps."""
    try:
        saved = json.loads((checkpoint / STATE_FILE).read_text())
        missing = {"global_step", "samples_seen", "settings", "batch"} - set(saved)
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint}/{STATE_FILE} cannot be read ({first_line(error)}).") from None
    if missing:
        raise UserError(f"{checkpoint}/{STATE_FILE} lacks {', '.join(sorted(missing))}: it is not this script's.")
    state = RunState(**{name: value for name, value in saved.items() if name in RunState.__dataclass_fields__})
    if "sound_steps" not in saved:  # they were not counted once
        state.sound_steps = state.global_step - state.skipped_steps
    if args.max_train_steps is not None and state.global_step > args.max_train_steps:
        raise UserError(f"{checkpoint} is already past --max_train_steps {args.max_train_steps}.")
    return state


def check_finite(model: nn.Module, health: StepHealth) -> None:
    """Raise `TrainingError` where the weights are lost: they must not be saved as if they were good."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise TrainingError(f"Stopped, since the weights are not finite; {health.where_to_resume()}.")


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is true in some process. To be called by every process."""
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="max") > 0)


def check_shared(accelerator: Accelerator, folder: Path, whole: bool) -> None:
    """Raise `TrainingError` where what one process has written to `folder` is not `whole` for another."""
    if any_process(accelerator, not whole):
        raise TrainingError(f"{folder} is not whole everywhere: all machines must share it (--latents_cache_dir).")


def try_everywhere(accelerator: Accelerator, action: Callable[..., Any], *arguments: Any) -> str | None:
    """Do something in every process; why it failed in one of them, or None."""
    problem = None
    try:
        action(*arguments)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors do not raise OSError
        problem = first_line(error)
        if not accelerator.is_main_process:
            logger.warning(f"Saving failed here: {problem}", main_process_only=False)
    return (problem or "in another process") if any_process(accelerator, problem is not None) else None


def save_checkpoint(run: Distillation) -> Path | None:
    """Write `checkpoint-<step>` beside its place and move it there once whole. To be called by every process.

    Where any of them fails, on a full disk say, it is given up with a warning, and None is returned.
    """
    args, accelerator, step = run.args, run.accelerator, run.state.global_step
    path = Path(args.output_dir) / f"checkpoint-{step}"
    partial = path.with_name(f".{path.name}.partial")

    def begin() -> None:
        if accelerator.is_main_process:
            remove_leftovers(args.output_dir)
            partial.mkdir()
            (partial / STATE_FILE).write_text(json.dumps(dataclasses.asdict(run.state), indent=2))

    def finish() -> None:
        if accelerator.is_main_process:
            data.put_in_place(partial, path, path.with_name(f".{path.name}.removed"))
            remove_leftovers(args.output_dir)

    saved = try_everywhere(accelerator, begin) or try_everywhere(accelerator, accelerator.save_state, str(partial))
    if problem := saved or try_everywhere(accelerator, finish):
        again = f"training goes on, and the next interval tries again; {run.health.where_to_resume()}."
        logger.warning(f"{path} could not be saved ({problem}; is the disk full?): {again}")
        if accelerator.is_main_process:
            with warn_instead_of_failing("Removing what was written of it"):
                remove_leftovers(args.output_dir)
        return None
    logger.info(f"Saved {path}")
    if accelerator.is_main_process and args.checkpoints_total_limit is not None:
        with warn_instead_of_failing("Removing old checkpoints"):
            for old in prune_checkpoints(args.output_dir, args.checkpoints_total_limit, newest=step):
                logger.info(f"Removed {old} (--checkpoints_total_limit {args.checkpoints_total_limit})")
    accelerator.wait_for_everyone()
    run.health.last_checkpoint = path
    return path


def save_and_stop(run: Distillation, saved: Path | None) -> None:
    """At a signal: save a checkpoint where that was not just done, and say how to go on."""
    check_finite(run.unet, run.health)
    saved = saved or save_checkpoint(run)
    after = f"Stopped by {signal.Signals(run.health.stop_signal).name} after step {run.state.global_step}"
    kept = f"saved {saved}" if saved else f"not saved; {run.health.where_to_resume()}"
    logger.info(f"{after}: {kept}; go on with --resume_from_checkpoint latest")


def load_checkpoint(run: Distillation, checkpoint: Path, learning_rate: float) -> None:
    """Put `run` where `checkpoint` left off; learning rate, betas and so on are what the flags now say.

    To be called by every process. Raises `UserError` where it is damaged.
    """
    args, accelerator, optimizer, schedule = run.args, run.accelerator, run.optimizer, run.lr_scheduler.scheduler
    of_the_flags = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    saved = json.loads((checkpoint / STATE_FILE).read_text())["settings"]
    parts = {"unet_ema": saved.get("use_ema"), accelerate_utils.SCALER_NAME: saved.get("mixed_precision") == "fp16"}
    if missing := [name for name, there in parts.items() if there and not (checkpoint / name).exists()]:
        raise UserError(f"{checkpoint} is not whole: {' and '.join(missing)} is missing.")
    scaler = accelerator.scaler
    if not (checkpoint / accelerate_utils.SCALER_NAME).exists():  # made in another precision: the scaler starts anew
        accelerator.scaler = None
    try:
        accelerator.load_state(str(checkpoint))
    except Exception as error:  # damaged, or pickled with more than tensors and numbers in it
        raise UserError(f"{checkpoint} cannot be loaded: {first_line(error)}") from error
    accelerator.scaler = scaler
    for parameter, moments in optimizer.state.items():  # laid out like the weights, which fused kernels rely on
        for name, moment in moments.items():
            if torch.is_tensor(moment) and (moment.shape, moment.dtype) == (parameter.shape, parameter.dtype):
                moments[name] = torch.empty_like(parameter).copy_(moment)
    accelerator.step = 0  # a checkpoint lies between two optimiser steps, whatever the accumulation
    optimizer.param_groups[0].update(of_the_flags)
    schedule.base_lrs = [learning_rate]  # the schedule is a function of the step alone
    schedule.last_epoch = run.state.global_step - 1
    schedule.step()
    run.health.last_checkpoint = checkpoint
    ends, ended, name = args.max_train_steps, run.state.max_train_steps, args.lr_scheduler
    if ends != ended and not name.startswith("constant"):
        other = "the learning rate is another from here on."
        logger.warning(f"--lr_scheduler {name} now ends at step {ends} instead of {ended}: {other}")
    if run.state.batch != [args.train_batch_size, accelerator.num_processes]:
        was = f"on {run.state.batch[1]} processes with --train_batch_size {run.state.batch[0]}"
        same = "the images stay in the same order (but for a stream), the noise is another"
        logger.warning(f"{checkpoint} was made {was}: {same}.")
    if list_checkpoints(args.output_dir)[-1:] not in ([], [checkpoint]):
        logger.warning(f"{args.output_dir} holds newer checkpoints than {checkpoint.name}; 'latest' will mean those.")


@contextmanager
def folder_lock(flag: str, folder: Path, wait: bool) -> Iterator[None]:
    """Make a folder and hold its lock, which the system lets go of when its owner dies.

    Raises `UserError` where another run holds it and `wait` is false, or where the folder cannot be written to. Where
    the file system has no locks there is a warning.
    """
    lock = FileLock(folder / ".lock", fallback_to_soft=False)  # a soft lock would outlive a killed run
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            in_use = f"is in use by another run (it holds {lock.lock_file}): stop that one."
            raise UserError(f"--{flag} {folder} {in_use}") from None
        logger.info(f"Waiting for another run, which works in {folder}")
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise UserError(f"--{flag} {folder} cannot be written to: {first_line(error)}.") from error
        logger.warning(f"{folder} cannot be locked ({first_line(error)}): let no other run write there.")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def own_output_dir(args: Namespace, accelerator: Accelerator, checkpoint: Path | None) -> Iterator[None]:
    """Keep other runs out of --output_dir, who would take each other's half-written checkpoints for leftovers.

    To be called by every process. Raises `UserError` where another one is at work there, or was since `checkpoint` was
    looked for, and where not all machines see the same folder.
    """
    folder, problem, probe = Path(args.output_dir), None, f".shared-{secrets.token_hex(8)}"
    new = not folder.exists()
    with ExitStack() as lock:
        if accelerator.is_main_process:
            try:
                lock.enter_context(folder_lock("output_dir", folder, wait=False))
                if output_problems(args) or find_checkpoint(folder, args.resume_from_checkpoint) != checkpoint:
                    problem = f"Another run has written to --output_dir {folder} since this one began: start it again."
                (folder / probe).touch()
            except (UserError, OSError) as error:
                problem = str(error)
        problem, probe = accelerate_utils.broadcast_object_list([problem, probe])
        deadline = time.monotonic() + (0 if problem else SHARED_DISK_SECONDS)
        while not (folder / probe).exists() and time.monotonic() < deadline:
            time.sleep(0.5)
        apart = any_process(accelerator, not (folder / probe).exists())
        if accelerator.is_main_process:
            (folder / probe).unlink(missing_ok=True)
        if apart and not problem:  # each machine would write its part of a checkpoint to its own disk, for ever
            problem = f"--output_dir {folder} is not on a disk that all machines share: choose one that is."
        if problem:
            raise UserError(problem)
        try:
            yield
        except UserError:
            if accelerator.is_main_process and new:
                with suppress(OSError):  # something was written to it
                    (folder / ".lock").unlink()
                    folder.rmdir()
            raise


# ----------------------------------------------------------------------------------------------------------------
# Validation images, the saved pipeline and its model card.


def generate_images(run: Distillation, unet: nn.Module) -> list[Image.Image]:
    """`num_validation_images` images of every validation prompt, in 25 steps of DPM-Solver++.

    The noise depends on the seed and the image's number alone, so that any two U-Nets start from the same. Raises
    `GivenUp` after a signal to stop.
    """
    args, accelerator = run.args, run.accelerator
    pipeline = sampling_pipeline(run, accelerator.unwrap_model(unet, keep_torch_compile=False))

    def keep_on(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        run.health.give_up()
        return tensors

    settings = {"height": args.resolution, "width": args.resolution, "num_inference_steps": PATH_STEPS}
    settings |= {"guidance_scale": args.validation_guidance_scale, "callback_on_step_end": keep_on}
    images: list[Image.Image] = []
    for prompt in (prompt for prompt in args.validation_prompts for _ in range(args.num_validation_images)):
        run.health.give_up()
        seed = derived_seed(args.seed, "validation", len(images))
        generator = torch.Generator(accelerator.device).manual_seed(seed)
        with torch.no_grad(), accelerator.autocast():
            images += pipeline(prompt, generator=generator, **settings).images
    return images


def make_teacher_images(run: Distillation) -> list[Image.Image]:
    """The teacher's validation images; none where it is not loaded. They do not change in a run."""
    if run.args.validation_prompts and run.teacher_unet is not None and run.accelerator.is_main_process:
        with warn_instead_of_failing("Making validation images"), no_training(run), vae_at_hand(run):
            return generate_images(run, run.teacher_unet)
    return []


@contextmanager
def as_saved(run: Distillation) -> Iterator[nn.Module]:
    """The student as it would be saved now, in evaluation mode: with the average's weights where there is one."""
    unet, ema_unet = run.accelerator.unwrap_model(run.unet, keep_torch_compile=False), run.ema_unet
    if ema_unet is not None:
        ema_unet.join()
        ema_unet.store(unet.parameters())
        ema_unet.copy_to(unet.parameters())
    unet.eval()
    try:
        yield unet
    finally:
        unet.train()
        if ema_unet is not None:
            ema_unet.restore(unet.parameters())


def validate(run: Distillation, teacher_images: Sequence[Image.Image], meter: "FidelityMeter | None") -> None:
    """Make images of the student as it would be saved now, and measure it. To be called by every process.

    The grid, below the teacher's images of the same noise where given, goes to `output_dir/validation/step-N.png` and
    to every tracker that takes images. The main process makes them while the others wait. A signal gives all up, and
    all processes then know of it, as `run.health.stop_signal`.
    """
    args, step, accelerator = run.args, run.state.global_step, run.accelerator
    with as_saved(run) as unet, no_training(run):
        if accelerator.is_main_process and args.validation_prompts:
            logger.info(
                f"Validation at step {step}: {len(args.validation_prompts) * args.num_validation_images} images"
            )
            with warn_instead_of_failing("Making validation images"), vae_at_hand(run):
                images = generate_images(run, unet)
                columns, rows = min(len(images), 8), []
                for start in range(0, len(images), columns):
                    for part in (teacher_images[start : start + columns], images[start : start + columns]):
                        blanks = [Image.new("RGB", images[0].size, "white")] * (columns - len(part))
                        rows += [*part, *blanks] if part else []
                grid = make_image_grid(rows, rows=len(rows) // columns, cols=columns)
                path = Path(args.output_dir) / "validation" / f"step-{step}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                grid.save(path)
                for tracker in accelerator.trackers:
                    if hasattr(tracker, "log_images"):
                        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                        tracker.log_images({"validation": np.asarray(grid)[None]}, step=step, **layout)
        if meter is not None:
            meter.measure(run, unet)
    sent = torch.tensor(float(run.health.received), device=accelerator.device)
    run.health.stop_signal = int(accelerator.reduce(sent, reduction="max"))


@contextmanager
def no_training(run: Distillation) -> Iterator[None]:
    """Capture no features, which would keep them in memory, and compile nothing for other shapes: it takes minutes."""
    taps = [tap for tap in (run.student_tap, run.teacher_tap) if tap]
    for tap in taps:
        tap.enabled = False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for tap in taps:
            tap.enabled = True


@contextmanager
def vae_at_hand(run: Distillation) -> Iterator[None]:
    """Have the VAE on the device; with latents from shards it is in the host's memory."""
    place = run.vae.device
    try:
        run.vae.to(run.accelerator.device)
        yield
    finally:
        run.vae.to(place)


# ----------------------------------------------------------------------------------------------------------------
# Fidelity: how far a student is from its teacher on the same noise, without a network that judges images. Errors are
# over the teacher's variance; means over noise levels are geometric, since plain ones are ruled by the least noise.

HEADLINE, LEVELS, PATH_STEPS = "guided_path_error", 10, 25
# Which of the `quantities`, and where: a sample has ten levels of noise, then ten states of the teacher's own path.
MEASURES = {
    "prediction_error": (0, slice(0, LEVELS)),
    "empty_prompt_error": (1, slice(0, LEVELS)),
    "guidance_gap_error": (2, slice(0, LEVELS)),
    HEADLINE: (3, slice(LEVELS, None)),
}


def quantities(predictions: Tensor, guidance_scale: float) -> Tensor:
    """What is compared of predictions (B, 2, C, h, w) for the caption and for the empty one: (B, 4, C, h, w).

    Both, the gap between them, and the guided prediction (https://arxiv.org/abs/2207.12598, as diffusers weighs it).
    """
    caption, empty = predictions.unbind(1)
    return torch.stack([caption, empty, caption - empty, empty + guidance_scale * (caption - empty)], 1)


def bootstrap(values: Tensor, others: Tensor | None = None) -> list[float]:
    """The average of values (samples,) or (samples, places), or how far above that of `others`; its 95 % interval.

    The mean over samples, then the geometric mean over places. The interval is of 2,000 draws of the samples.
    """
    size, generator = len(values), torch.Generator().manual_seed(0)
    drawn = torch.cat([torch.arange(size)[None], torch.randint(size, (2000, size), generator=generator)])
    means = [each[drawn].mean(1) for each in (values, others) if each is not None]
    means = [each if each.ndim == 1 else each.log().mean(1).exp() for each in means]
    average = means[0] - sum(means[1:])
    return [average[0].item(), *average[1:].quantile(torch.tensor([0.025, 0.975])).tolist()]


def of_measure(errors: Any, name: str) -> Tensor:
    """What one of the `MEASURES` averages of errors (samples, places, 4)."""
    kind, at = MEASURES[name]
    return torch.as_tensor(errors)[:, at, kind]


def settle_fidelity(args: Namespace, checkpoint: Path | None, state: RunState) -> None:
    """Turn the meter off, and say so, where it has nothing to measure by or would change what is trained on."""
    unmeasured = "" if args.output_weight or args.feature_weight or args.teacher_latents else "no teacher is loaded"
    if checkpoint and not state.settings.get("fidelity_samples"):
        unmeasured = f"{checkpoint} was made without, on all samples"
    if args.fidelity_samples and unmeasured:
        if args.load_best_model_at_end:
            raise UserError(f"--load_best_model_at_end needs fidelity, which is not measured: {unmeasured}.")
        logger.info(f"Fidelity is not measured: {unmeasured}")
        args.fidelity_samples = 0


def by_seed(args: Namespace, size: int) -> Tensor:
    """The order in which rows are chosen to measure fidelity on: more of them are the same ones, and others."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(derived_seed(args.seed, "fidelity")))


def held_out(args: Namespace, dataset: TrainingData) -> int:
    """How many samples fidelity takes from training: at most a tenth, and none where there are others."""
    painted = args.teacher_latents is not None
    others = isinstance(dataset, StreamingDataset) or painted or "left_over" in dataset.prepare
    return 0 if others else min(args.fidelity_samples, len(dataset) // 10)


def hold_out(args: Namespace, dataset: TrainingData, pool: CaptionPool | None) -> tuple[TrainingData, Any]:
    """The data to train on, and what fidelity is measured on: rows, or more of the latents that the teacher makes."""
    columns, count, others = dataset.columns, args.fidelity_samples, dataset.prepare.get("left_over")
    if not count:
        return dataset, None
    if isinstance(dataset, StreamingDataset):
        return dataset, others
    rows, taken = dataset.rows, held_out(args, dataset)
    if args.teacher_latents is not None:  # to evaluate students it may be 0
        others = range(len(rows), len(pool))[: count if args.evaluate else min(count, len(rows) // 10)]
    if others:
        return dataset, others
    order = by_seed(args, len(rows))
    if taken:
        rest = copy.copy(rows).select(order[taken:].sort().values.numpy())
        dataset = DistillationDataset(rest, columns, dataset.seed, **dataset.prepare)
    else:
        logger.info(
            "Fidelity is measured on samples that are trained on: there are too few, or no captions beside them"
        )
    return dataset, rows_to_encode(copy.copy(rows).select(order[: taken or count].tolist()), columns, args)


@dataclass
class Reference:
    """What the teacher does on samples, by which students are judged."""

    name: str
    captions: list[str]
    guidance_scale: float
    timesteps: Tensor  # (places,)
    places: np.ndarray  # (samples, places, 3, C, h, w): latents, predictions for the caption and for the empty one

    @functools.cached_property
    def variance(self) -> Tensor:
        """Of every quantity at every place, over samples and elements: (places, 4)."""
        predictions = (torch.from_numpy(self.places[:, place, 1:]) for place in range(len(self.timesteps)))
        return torch.stack([quantities(each, self.guidance_scale).var((0, 2, 3, 4)) for each in predictions])

    def errors(self, run: Distillation, unet: nn.Module, guidance_scale: float | None = None) -> Tensor:
        """Mean squared errors over the variance: (samples, places, 4); those of other processes' samples are 0.

        `guidance_scale` is the student's, where that is not the teacher's.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        errors = torch.zeros(len(self.captions), *self.variance.shape)
        for sample in range(len(errors))[run.accelerator.process_index :: run.accelerator.num_processes]:
            latents, *teachers = torch.from_numpy(self.places[sample]).unbind(1)
            students = predict_places(run, unet, latents, self.timesteps, self.captions[sample])
            apart = quantities(students, scale) - quantities(torch.stack(teachers, 1), self.guidance_scale)
            errors[sample] = apart.square().mean((2, 3, 4)) / self.variance
        return errors

    def curve(self, errors: Any, measure: str) -> tuple[list[float], list[float]]:
        """A measure by timestep, of errors (samples, places, 4): timesteps, and means over samples."""
        return self.timesteps[MEASURES[measure][1]].tolist(), of_measure(errors, measure).mean(0).tolist()


@torch.no_grad()
def predict_places(run: Distillation, unet: nn.Module, latents: Tensor, timesteps: Tensor, caption: str) -> Tensor:
    """A U-Net's predictions for a caption and for the empty one: (places, 2, C, h, w), float32, on the host.

    Batches follow from --train_batch_size alone, not from the number of processes.
    """
    device, size, found = run.accelerator.device, run.args.train_batch_size, []
    input_ids = tokenize_captions([caption, ""], run.tokenizer, random.Random())
    text = run.text_encoder(input_ids.to(device))[0]
    for states, times in zip(latents.split(size), timesteps.split(size), strict=True):
        run.health.give_up()
        inputs = [each.repeat_interleave(2, 0).to(device) for each in (states.to(unet.dtype), times)]
        with run.accelerator.autocast():
            pairs = unet(*inputs, text.repeat(len(states), 1, 1), return_dict=False)[0]
        found.append(pairs.float().cpu().unflatten(0, (-1, 2)))
    return torch.cat(found)


@torch.no_grad()
def guided_path(
    run: Distillation, unet: nn.Module, captions: Sequence[str], noise: Tensor, steps: int, scale: float
) -> Tensor:
    """Latents before every step of guided sampling from `noise` (B, C, h, w), and at its end: (steps + 1, B, ...)."""
    pipeline, states = sampling_pipeline(run, unet), [noise]

    def keep(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        run.health.give_up()
        states.append(tensors["latents"].float().cpu())
        return tensors

    settings = {"height": run.args.resolution, "width": run.args.resolution, "num_inference_steps": steps}
    settings |= {"guidance_scale": scale, "output_type": "latent"}
    with run.accelerator.autocast():
        pipeline(captions, latents=noise.to(run.accelerator.device, unet.dtype), callback_on_step_end=keep, **settings)
    return torch.stack(states)


def measured_samples(run: Distillation, measured: Any, pool: CaptionPool | None) -> tuple[Tensor, list[str]]:
    """Latents as the VAE's mean, (samples, C, h, w), float32, and a caption of each; see `hold_out`."""
    args, size = run.args, run.args.train_batch_size
    if isinstance(measured, range):
        captions, pipeline = choose_captions(args, len(pool), measured), sampling_pipeline(run, run.teacher_unet)
        parts = [slice(at, at + size) for at in range(0, len(measured), size)]
        return torch.cat([paint_latents(pipeline, captions[part], measured[part], args) for part in parts]), captions
    if isinstance(measured, datasets.IterableDataset):
        rows = list(StreamingDataset._read(measured))
        measured = rows_to_encode(rows, (args.image_column, args.caption_column), args)
    usable = [example for example in measured.__getitems__(range(len(measured))) if "fault" not in example]
    if len(usable) < len(measured):
        some = f"{len(measured) - len(usable)} of the {len(measured)} samples for fidelity"
        logger.warning(f"{some} have a broken image or no caption: they are left out.")
    if not usable:
        raise UserError("None of the samples for fidelity can be used: choose other ones by --seed, or none.")
    means = [each.get("latent_mean") for each in usable]
    pixels = [each.get("pixel_values") for each in usable]
    means = [encode_images(run.vae, p[None])[0][0] if m is None else m for m, p in zip(means, pixels, strict=True)]
    return torch.stack([mean.float().cpu() for mean in means]), [each["captions"][0] for each in usable]


def fidelity_noise(run: Distillation, sample: int) -> Tensor:
    """The noise of a sample at each level, then that which its path begins with: (levels + 1, C, h, w)."""
    generator = torch.Generator().manual_seed(derived_seed(run.args.seed, "fidelity", sample))
    return torch.randn(LEVELS + 1, *latents_shape(run.vae, run.args), generator=generator)


def write_reference(run: Distillation, folder: Path, latents: Tensor, captions: list[str]) -> None:
    """Put what the teacher does on samples into `folder`."""
    size, steps = run.args.train_batch_size, run.noise_scheduler.config.num_train_timesteps
    scheduler = sampling_pipeline(run, run.teacher_unet).scheduler
    scheduler.set_timesteps(PATH_STEPS)
    visited = np.linspace(0, PATH_STEPS - 1, 10).round().astype(int)  # states of the path that are kept
    levels = (2 * torch.arange(LEVELS) + 1) * steps // (2 * LEVELS)  # the middle of each bin
    timesteps = torch.cat([levels, scheduler.timesteps[visited]])
    partial, shape = data.hidden(folder / "teacher.npy"), (len(captions), len(timesteps), 3, *latents.shape[1:])
    places = np.zeros(shape, np.float32)  # not mapped yet: a full disk would be a SIGBUS
    for at in tqdm(range(0, len(captions), size), "Measuring the teacher"):
        part = range(len(captions))[at : at + size]
        noise = torch.stack([fidelity_noise(run, sample) for sample in part])
        scale = run.args.validation_guidance_scale
        path = guided_path(run, run.teacher_unet, captions[at : at + size], noise[:, LEVELS], PATH_STEPS, scale)
        for number, sample in enumerate(part):
            clean = latents[sample].expand(LEVELS, -1, -1, -1) * run.vae.config.scaling_factor
            noisy = run.noise_scheduler.add_noise(clean, noise[number][:LEVELS], levels)
            states = torch.cat([noisy, path[visited, number]])
            places[sample, :, 0] = states
            places[sample, :, 1:] = predict_places(run, run.teacher_unet, states, timesteps, captions[sample])
    with open(partial, "wb") as file:
        np.save(file, places)
    (folder / "samples.json").write_text(json.dumps({"captions": captions, "timesteps": timesteps.tolist()}))
    data.put_in_place(partial, folder / "teacher.npy")


def make_reference(run: Distillation, measured: Any, pool: CaptionPool | None) -> Reference:
    """What the teacher does on these samples, from a file where it was written before. To be called by every process.

    Raises `UserError` or `TrainingError` where that file cannot be written or shared.
    """
    args, accelerator, known = run.args, run.accelerator, run.state.settings.items()
    facts = {name: value for name, value in known if name in ("data", "caption pool") or "teacher's" in name}
    names = "seed fidelity_samples max_train_samples resolution center_crop image_interpolation_mode cache_latents"
    names += " image_column caption_column teacher_latents prediction_type validation_guidance_scale"
    facts |= {name: getattr(args, name) for name in names.split()} | {"precision": accelerator.mixed_precision}
    facts |= {"evaluate": bool(args.evaluate), "levels": LEVELS, "steps": PATH_STEPS}
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
    cached = args.latents_cache_dir or args.cache_latents or args.teacher_latents or args.random_conditioning
    folder = (latents_folder(args) if cached else Path(args.output_dir)) / f"fidelity-{digest}"
    if accelerator.is_main_process:
        with folder_lock("latents_cache_dir", folder, True), no_training(run), vae_at_hand(run):
            if not (folder / "teacher.npy").exists():
                try:
                    write_reference(run, folder, *measured_samples(run, measured, pool))
                except OSError as error:
                    raise TrainingError(f"What fidelity compares with cannot be kept in {folder}: {error}.") from error
    accelerator.wait_for_everyone()
    check_shared(accelerator, folder, (folder / "teacher.npy").exists())
    samples, places = json.loads((folder / "samples.json").read_text()), np.load(folder / "teacher.npy", mmap_mode="c")
    scale, timesteps = max(args.validation_guidance_scale, 1.0), torch.tensor(samples["timesteps"])  # 1: no guidance
    return Reference(digest, samples["captions"], scale, timesteps, places)


class FidelityMeter:
    """Measures a run's student by a reference, and keeps account: `fidelity.json`, its figure and the best student.

    What was measured after the checkpoint that is gone on from, or on other samples, is set aside.
    """

    def __init__(self, run: Distillation, reference: Reference, resumed: bool) -> None:
        self.reference, self.folder = reference, Path(run.args.output_dir)
        self.best, path, removed = self.folder / "best", self.folder / "fidelity.json", self.folder / ".best.removed"
        kept = json.loads(path.read_text()) if path.exists() else {"rows": [], "set_aside": []}
        goes_on = resumed and kept.get("reference") == reference.name
        self.rows = [row for row in kept["rows"] if goes_on and row["step"] <= run.state.global_step]
        self.set_aside = kept["set_aside"] + kept["rows"][len(self.rows) :]
        if len(self.set_aside) > len(kept["set_aside"]):
            logger.info("Fidelity measured after the checkpoint, or on other samples or guidance, is set aside")
        if run.accelerator.is_main_process:
            if removed.exists() and not self.best.exists():  # killed while it was replaced
                removed.rename(self.best)
            if self.best.exists() and not (goes_on and self.best_row()["step"] <= run.state.global_step):
                aside = (self.best.with_name(f"best-set-aside-{number}") for number in itertools.count())
                self.best.rename(next(path for path in aside if not path.exists()))
                logger.info(f"{self.best} is of a step after the checkpoint, or of other samples: it is set aside")

    def best_row(self) -> dict[str, Any]:
        """The measurement of the student that is kept; one that any other is better than where there is none."""
        path = self.best / "fidelity.json"
        return json.loads(path.read_text()) if path.exists() else {"step": math.inf, HEADLINE: math.inf}

    def plan(self, args: Namespace, step: int) -> str:
        """What measuring takes from this step on, for messages."""
        samples, every, last = len(self.reference.captions), args.validation_steps, args.max_train_steps
        times = last // every - step // every + (last % every > 0) + self.lacks(step, args)
        passes = 2 * samples * len(self.reference.timesteps)
        return f"{samples} samples, {passes:,} of the student's passes at a time, {times} times"

    def lacks(self, step: int, args: Namespace) -> bool:
        """Whether a step that is to be measured was not, since a signal came."""
        due = step % args.validation_steps == 0 or step == args.max_train_steps
        return due and all(row["step"] != step for row in self.rows)

    def measure(self, run: Distillation, unet: nn.Module) -> None:
        """Measure the student, put down what came out, and keep the student where it is the best so far."""
        accelerator, step, errors, started = run.accelerator, run.state.global_step, None, time.perf_counter()
        with warn_instead_of_failing("Measuring fidelity"):
            errors = self.reference.errors(run, unet)
        if any_process(accelerator, errors is None):
            return
        errors = accelerator.reduce(errors.to(accelerator.device), reduction="sum").cpu()
        found = {name: bootstrap(of_measure(errors, name)) for name in MEASURES}
        measures, seconds = {name: value for name, (value, *_) in found.items()}, time.perf_counter() - started
        row = {"step": step, **measures, "interval": found[HEADLINE][1:], "errors": errors.tolist()}
        if not all(map(math.isfinite, measures.values())):
            logger.warning(f"Fidelity at step {step} is not finite: it is left out.")
            return
        self.rows.append(row)
        logger.info(f"Fidelity at step {step}: {describe_fidelity(row)}, measured in {seconds:.1f} s")
        with warn_instead_of_failing(f"Keeping the fidelity of step {step}"):
            if accelerator.is_main_process:
                if run.args.load_best_model_at_end and row[HEADLINE] < self.best_row()[HEADLINE]:
                    self.keep(unet, row)
                self.write()
        with warn_instead_of_failing("Logging fidelity"):
            accelerator.log({f"fidelity/{name}": value for name, value in measures.items()}, step=step)

    def keep(self, unet: nn.Module, row: Mapping[str, Any]) -> None:
        """Replace `best/` by this student and what was measured of it."""
        partial, removed = (self.folder / f".best.{state}" for state in ("partial", "removed"))
        for leftover in (partial, removed):
            shutil.rmtree(leftover, ignore_errors=True)
        unet.save_pretrained(partial / "unet")
        (partial / "fidelity.json").write_text(json.dumps(row))
        data.put_in_place(partial, self.best, removed)
        shutil.rmtree(removed, ignore_errors=True)

    def write(self) -> None:
        """Write `fidelity.json` and `validation/fidelity.png`."""
        reference, path, rows = self.reference, self.folder / "fidelity.json", self.rows
        record = {"reference": reference.name, "captions": reference.captions, "rows": rows}
        record |= {"timesteps": reference.timesteps.tolist(), "set_aside": self.set_aside}
        data.hidden(path).write_text(json.dumps(record))
        data.put_in_place(data.hidden(path), path)
        panels = {"by step": {name: ([row["step"] for row in rows], [row[name] for row in rows]) for name in MEASURES}}
        shown = {row["step"]: row for row in (rows[0], min(rows, key=lambda row: row[HEADLINE]), rows[-1])}
        for name in ("prediction_error", HEADLINE):
            curves = {f"step {step}": reference.curve(row["errors"], name) for step, row in shown.items()}
            panels[f"{name} by timestep"] = curves
        draw_curves(self.folder / "validation" / "fidelity.png", panels)

    def describe(self, args: Namespace) -> dict[str, str]:
        """What was measured of the student that is saved, and how sure it is that the best is better than the rest."""
        if not self.rows:
            return {}
        last, best = self.rows[-1], min(self.rows, key=lambda row: row[HEADLINE])
        if args.load_best_model_at_end and self.best.exists():
            best = last = self.best_row()
        facts = {"Fidelity": f"{describe_fidelity(last)}; 0 is what the teacher does, 1 as far from it as a constant"}
        others = [row for row in self.rows if row["step"] != best["step"]]
        if others:
            other = others[-1]
            less, low, high = bootstrap(*(of_measure(row["errors"], HEADLINE) for row in (other, best)))
            gained = f"{less:.4g} less than at step {other['step']:,} ({low:.4g} to {high:.4g})"
            facts["Best step"] = f"{best['step']:,}: guided path error {best[HEADLINE]:.4g}, {gained}"
        return facts


def describe_fidelity(row: Mapping[str, Any]) -> str:
    """What was measured, for messages and the card."""
    low, high = row["interval"]
    others = ", ".join(f"{name} {row[name]:.4g}" for name in MEASURES if name != HEADLINE)
    return f"{HEADLINE} {row[HEADLINE]:.4g} ({low:.4g} to {high:.4g}), {others}".replace("_", " ")


def draw_curves(path: Path, panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> None:
    """A panel for each title, of curves by label, errors on a logarithmic axis."""
    from matplotlib.figure import Figure  # here: it takes a second to import, and is not needed without fidelity

    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, curve in curves.items():
            axes.plot(*curve, marker=".", label=label)
        axes.set(title=title, yscale="log")
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


WEIGHTS_NAME = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def copy_part(source: Path, target: Path, variant: str | None) -> None:
    """Copy a part of a pipeline as it is: links are resolved, and weights come from safetensors alone.

    A variant's infix is dropped from the names of files and from the index, so that it is what is loaded.
    """
    infix = re.compile(rf"\.{re.escape(variant)}(?=[.-])" if variant else "$")
    names = {path: infix.sub("", path.name) for path in sorted(source.iterdir()) if path.is_file()}
    weights = [path for path, name in names.items() if WEIGHTS_NAME.fullmatch(name)]
    weights = [path for path in weights if path.name != names[path]] or weights
    texts = [path for path in names if path.suffix in (".json", ".txt") and ".index." not in path.name]
    target.mkdir(parents=True)
    for path in (*texts, *weights):
        shutil.copyfile(path, target / names[path])
        if ".index." in path.name:
            (target / names[path]).write_text(infix.sub("", path.read_text()))
    if left := [path.name for path in names if path not in (*texts, *weights)]:
        logger.info(f"Not handed on of the teacher's {source.name}: {', '.join(left)}")


def write_pipeline(args: Namespace, unet: UNet2DConditionModel, target: Path) -> None:
    """The teacher's pipeline with another U-Net; all other parts as the teacher has them, but for what a flag says."""
    if (folder := model_folder(args.pretrained_model_name_or_path, args.cache_dir, args.revision)) is None:
        pipeline = load_component(StableDiffusionPipeline, args)
        pipeline.register_modules(unet=unet)
        pipeline.save_pretrained(target)
    else:
        unet.save_pretrained(target / "unet")
        index = json.loads((folder / "model_index.json").read_text()) | {"_diffusers_version": diffusers.__version__}
        absent = absent_parts(index, files_of(folder, args.cache_dir))
        for name in [name for name, kind in index.items() if isinstance(kind, list) and name != "unet"]:
            if any(index[name]) and name not in absent:
                copy_part(folder / name, target / name, args.variant)
            else:
                index[name] = [None, None]
        if not index.get("safety_checker", [None])[0]:
            index["requires_safety_checker"] = False
        (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    path = target / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(path.read_text())
    if args.prediction_type not in (None, scheduler.get("prediction_type")):
        path.write_text(json.dumps(scheduler | {"prediction_type": args.prediction_type}, indent=2) + "\n")


def save_pipeline(args: Namespace, unet: UNet2DConditionModel) -> None:
    """Write the whole pipeline, its U-Net in float32, load it back and compare: the U-Net's tensors and one pass.

    It is written to a hidden folder and moved in place after that, `model_index.json` last. Raises `TrainingError`
    where what was read back differs. For the main process alone.
    """
    output_dir = Path(args.output_dir)
    unet = unet.to("cpu", dtype=torch.float32, memory_format=torch.contiguous_format)
    expected = predict_noise(unet.eval())
    if not expected.isfinite().all():
        raise TrainingError("The student's prediction is not finite: nothing is saved.")
    partial = output_dir / ".pipeline.partial"
    if partial.exists():
        shutil.rmtree(partial)  # a killed run's
    write_pipeline(args, unet, partial)
    loaded = DiffusionPipeline.from_pretrained(partial, dtype=torch.float32, use_safetensors=True)
    if not same_weights(unet, loaded.unet):
        raise TrainingError(f"{output_dir}/unet does not hold what was saved: is the disk sound?")
    # Not equal: rounding depends on where in memory weights lie.
    if not torch.allclose(expected, predict_noise(loaded.unet.eval()), rtol=1e-4, atol=1e-5):
        raise TrainingError(f"{output_dir}/unet computes something else than the trained student.")
    for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == "model_index.json"):
        data.put_in_place(entry, output_dir / entry.name, partial / f"{entry.name}.removed")
    shutil.rmtree(partial)


def same_weights(left: nn.Module, right: nn.Module) -> bool:
    """Whether two models have the same tensors under the same names."""
    one, other = left.state_dict(), right.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ----------------------------------------------------------------------------------------------------------------
# Exports: the pipeline once more in half precision, as other tools read it. Names are diffusers' and the original's.

EXPORTS = ("single_file", "fp16")
ORIGINAL_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ORIGINAL_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0",
    "conv_out": "out.2", "conv_in": "input_blocks.0.0", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
ORIGINAL_VAE = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm", "to_out.0": "proj_out", "to_": "", "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out", "_blocks": "", "resnets": "block", "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
}  # fmt: skip
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding", "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks", "layer_norm": "ln_", "fc1": "c_fc",
    "fc2": "c_proj", "self_attn.q_proj.": "attn.in_proj_", "self_attn": "attn",
}  # fmt: skip


def renamed(name: str, table: Mapping[str, str]) -> str:
    """A tensor's name with all of a table's replacements made, in its order."""
    return functools.reduce(lambda text, row: text.replace(*row), table.items(), name)


def original_unet_name(name: str, config: Mapping[str, Any]) -> str:
    """Name in the original layout, blocks numbered without gaps however many layers they have."""
    if "resnets" in name:
        name = renamed(name, ORIGINAL_RESNET)
    if (match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name)) is None:
        return renamed(name, ORIGINAL_UNET)
    way, block, kind, layer, rest = match.groups()
    layers, is_attention = config["layers_per_block"], kind == "attentions"
    number = (layers + 1) * int(block) + (layers if kind.endswith("samplers") else int(layer))
    if way == "down":
        return f"input_blocks.{number + 1}.{int(is_attention)}.{rest.replace('conv.', 'op.')}"
    attends = config["up_block_types"][int(block)].startswith("CrossAttn")
    last = 1 + attends if kind == "upsamplers" else int(is_attention)
    return f"output_blocks.{number}.{last}.{rest}"


def original_layout(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    """The weights of U-Net, VAE and text encoder as the original Stable Diffusion code names and shapes them."""
    unet, vae, encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    weights = {}
    for name, tensor in unet.state_dict().items():
        weights[f"model.diffusion_model.{original_unet_name(name, unet.config)}"] = tensor
    last = len(vae.decoder.up_blocks) - 1
    vae_names = {f"up_blocks.{i}": f"up.{last - i}" for i in range(last + 1)} | ORIGINAL_VAE  # outermost first there
    for name, tensor in vae.state_dict().items():
        if re.search(r"attentions\.0\.to_.*weight", name):
            tensor = tensor[..., None, None]  # a convolution there
        weights[f"first_stage_model.{renamed(name, vae_names)}"] = tensor
    text = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    if encoder.config.hidden_act == "quick_gelu":  # OpenAI's CLIP, Stable Diffusion 1.x
        return weights | {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in text.items()}
    for name, tensor in text.items():  # open_clip, Stable Diffusion 2.x
        if ".q_proj." in name:
            tensor = torch.cat([text[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        if ".k_proj." not in name and ".v_proj." not in name:
            weights[f"cond_stage_model.model.{renamed(name, OPEN_CLIP)}"] = tensor
    return weights


def model_spec(pipeline: StableDiffusionPipeline, title: str) -> dict[str, str]:
    """What a single file says of itself, by Stability AI's ModelSpec 1.0.0."""
    predicts, architecture = pipeline.scheduler.config.prediction_type, "stable-diffusion-v1"
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if pipeline.text_encoder.config.hidden_act != "quick_gelu":
        architecture = "stable-diffusion-v2-768-v" if predicts == "v_prediction" else "stable-diffusion-v2-512"
    spec = {"sai_model_spec": "1.0.0", "title": title, "architecture": architecture, "resolution": f"{side}x{side}"}
    # The code whose names the tensors have, not the one that wrote them.
    spec |= {"implementation": "sgm", "prediction_type": {"v_prediction": "v"}.get(predicts, predicts)}
    return {"format": "pt"} | {f"modelspec.{name}": value for name, value in spec.items()}


def export_problems(folder: Path, kinds: Sequence[str]) -> list[str]:
    """Exports that are there already: they are not overwritten, nor left beside another result."""
    paths = [folder / f"{folder.resolve().name}.safetensors"] if "single_file" in kinds else []
    paths += folder.glob("*/*.fp16.*") if "fp16" in kinds else []
    return [f"{path} is there, and no export is overwritten: move it away." for path in paths if os.path.lexists(path)]


def export_pipeline(folder: Path, kinds: Sequence[str]) -> None:
    """Make what --export names of a pipeline's folder, load it back and compare, and only then put it in its place.

    Raises `TrainingError` where that fails; the folder is as it was then, and a file that is there is never replaced.
    """
    partial, half = folder / ".export.partial", {"dtype": torch.float16, "use_safetensors": True}
    single, placed = partial / f"{folder.resolve().name}.safetensors", []
    try:
        if partial.exists():
            shutil.rmtree(partial)  # a killed run's
        pipeline = DiffusionPipeline.from_pretrained(folder, **half)
        partial.mkdir()
        loaded = {}
        if "single_file" in kinds:
            save_file(original_layout(pipeline), single, metadata=model_spec(pipeline, single.stem))
            settings = {"config": str(folder), "dtype": torch.float16}
            loaded["single_file"] = StableDiffusionPipeline.from_single_file(str(single), **settings)
        if "fp16" in kinds:
            pipeline.save_pretrained(partial, variant="fp16")
            loaded["fp16"] = DiffusionPipeline.from_pretrained(partial, variant="fp16", **half)
        for kind, exported in loaded.items():
            models = {name: part for name, part in exported.components.items() if isinstance(part, nn.Module)}
            for name, model in models.items():
                if not same_weights(model, getattr(pipeline, name)):
                    raise TrainingError(f"{name} of {kind} differs when it is loaded back")
                if not all(weight.isfinite().all() for weight in model.parameters()):
                    raise TrainingError(f"{name} has weights that half precision cannot hold")
        if problems := export_problems(folder, kinds):  # they came in between
            raise TrainingError(problems[0])
        for path in [*partial.glob("*.safetensors"), *partial.glob("*/*.fp16.*")]:
            data.put_in_place(path, folder / path.relative_to(partial))
            placed.append(folder / path.relative_to(partial))
        logger.info(f"Exported, loaded back and equal: {', '.join(map(str, placed))}")
    except Exception as error:
        for path in placed:
            path.unlink(missing_ok=True)
        raise TrainingError(f"--export: {folder} stays as it is: {first_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def loss_formula(args: Namespace) -> str:
    """The loss as it is weighted, for messages and the card."""
    return f"{args.task_weight:g} * task + {args.output_weight:g} * output + {args.feature_weight:g} * feature"


def save_model_card(
    args: Namespace,
    repo_id: str,
    images: list[Image.Image] | None = None,
    repo_folder: str | None = None,
    facts: Mapping[str, Any] | None = None,
    license: str = "creativeml-openrail-m",
) -> None:
    """Write `repo_folder/README.md`: what the model is, how it was made, how to load it.

    `images` go in as one grid; `facts` (parameter counts, final losses, ...) as a table.
    """
    folder, prompts, grid = Path(repo_folder or args.output_dir), args.validation_prompts or [], ""
    row = DISTILL_LEVELS[args.distill_level]
    source = args.dataset_name or "a local folder of captioned images"
    if is_teacher_made(args):
        made = vars(args) if args.teacher_latents else data.latents_of(Path(args.train_data_dir))["settings"]
        how = f"{made['teacher_latents_steps']} steps, guidance {made['teacher_latents_guidance_scale']:g}"
        source = f"latents that the teacher made of {made['teacher_latents']:,} captions ({how}), without any image"
    swapped = ""
    if args.random_conditioning:
        swapped = f"""
In training a caption was at times replaced by another, for teacher and student alike, most often where there is most
noise: [random conditioning](https://arxiv.org/abs/2504.02011), lambda {args.random_conditioning:g}.
"""
    if images:
        make_image_grid(images, rows=1, cols=len(images)).save(folder / "val_imgs_grid.png")
        grid = f"\n![Images of the validation prompts](./val_imgs_grid.png)\n\nPrompts: {'; '.join(prompts)}\n"
    local = (TEACHER, STUDENT, "single_file_config", "train_data_dir", "dataset_name", "caption_pool")
    places = {name: Path(value).name for name in local if (value := getattr(args, name)) and Path(value).exists()}
    shown = {name: value for name, value in sorted({**public_args(args), **places}.items()) if value is not None}
    unused = [name for name in FLAGS if name.startswith("teacher_latents_") and args.teacher_latents is None]
    hidden = ("output_dir", "cache_dir", "logging_dir", *EVALUATE_ALONE, *unused)
    header = huggingface_hub.ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=None if TEACHER in places else args.pretrained_model_name_or_path,
        datasets=[args.dataset_name] if args.dataset_name and "dataset_name" not in places else None,
        tags=["stable-diffusion", "text-to-image", "diffusers", "diffusers-training", "knowledge-distillation"],
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in (facts or {}).items())
    settings = "\n".join(f"- `{name}`: {value}" for name, value in shown.items() if name not in hidden)
    text = f"""---
{header.to_yaml()}
---

# {repo_id}

A Stable Diffusion pipeline whose U-Net was pruned ({args.distill_level}, {row.paper_name} in the BK-SDM paper) and
distilled from **{shown[TEACHER]}** on {source}, with
`loss = {loss_formula(args)}`.
{swapped}{grid}
| | |
|---|---|
{table}

## Use

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo_id}", dtype=torch.float16).to("cuda")
image = pipeline({json.dumps((prompts or ["a photo of a cat"])[0])}).images[0]
image.save("image.png")
```

## Licence

A distilled model stays under the licence of the model that it was distilled from: for Stable Diffusion 1.x that is
CreativeML Open RAIL-M, with its use restrictions.

## Settings

{settings}

## Method

[BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion](https://arxiv.org/abs/2305.15798)
"""
    huggingface_hub.ModelCard(text).save(folder / "README.md")


# ----------------------------------------------------------------------------------------------------------------
# --evaluate: students against their teacher and one another, without training.

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the sampling steps, after which latents are compared


def load_student(args: Namespace, source: str) -> UNet2DConditionModel:
    """The U-Net of a pipeline or checkpoint, its average where there is one. Raises `UserError` where it has none."""
    part, named = "unet_ema" if (Path(source) / "unet_ema").is_dir() else "unet", vars(args) | {"evaluate": source}
    return load_component(UNet2DConditionModel, Namespace(**named), "evaluate", subfolder=part)


def check_students(args: Namespace, accelerator: Accelerator, teacher_config: Mapping[str, Any]) -> None:
    """Raise `UserError` where --evaluate cannot be met: a student is missing, or takes other latents or captions."""
    if args.evaluate and accelerator.num_processes > 1:
        raise UserError("--evaluate takes one process: leave accelerate's --num_processes at 1.")
    if args.clip_model_name_or_path:
        load_clip(args)
    wanted = teacher_config.get("in_channels", 4), text_width(teacher_config)
    for source in args.evaluate or ():
        student = load_student(args, source)
        if (found := (student.config.in_channels, text_width(student.config))) != wanted:
            takes = "takes {} channels and {} numbers a token".format
            raise UserError(f"--evaluate {source} {takes(*found)}, its teacher {takes(*wanted)}.")
        try:
            if predict_noise(student).shape[1] != wanted[0]:
                raise ValueError("it gives another number of channels")
        except Exception as error:
            raise UserError(f"--evaluate {source} does not run as its teacher does: {first_line(error)}.") from error


@torch.no_grad()
def one_pass(unet: nn.Module, side: int) -> float:
    """Seconds of a pass on one latent of this side, with a caption of 77 tokens."""
    weight, config = unet.conv_in.weight, unet.config
    inputs = torch.zeros(1, config.in_channels, side, side), 500, torch.zeros(1, 77, text_width(config))
    inputs = [each.to(weight) if torch.is_tensor(each) else each for each in inputs]
    synchronize = torch.cuda.synchronize if weight.device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    unet(*inputs)
    synchronize()
    return time.perf_counter() - started


def memory_of_pass(args: Namespace, source: str | None, side: int, device: torch.device, dtype: torch.dtype) -> str:
    """What memory a U-Net and one pass of it take; for a process that does nothing else."""
    PartialState(cpu=device.type == "cpu")  # what is logged asks for it
    quiet_libraries()
    unet = load_student(args, source) if source else load_component(UNet2DConditionModel, args, subfolder="unet")
    one_pass(freeze(unet, device, dtype), side)
    return peak_memory(device)


def measure_cost(run: Distillation, source: str | None, unet: nn.Module) -> dict[str, Any]:
    """Parameters, multiply-adds, time and memory of one pass; the time is over the teacher's, both taken in turns."""
    side, place = latents_shape(run.vae, run.args)[1], (run.accelerator.device, run.weight_dtype)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # others are not counted on a CPU
        one_pass(unet, side)
    pairs = [[one_pass(net, side) for net in (unet, run.teacher_unet)] for _ in range(6)][1:]  # the first warms up
    # A spawned process would begin with the peak of this one, where the system keeps that over exec.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as alone:
        memory = alone.submit(memory_of_pass, run.args, source, side, *place).result()
    cost = {"parameters": count_parameters(unet), "GMACs": counter.get_total_flops() / 2e9}
    return cost | {"time": statistics.median(ours / theirs for ours, theirs in pairs), "peak memory": memory}


@torch.no_grad()
def sample_images(
    run: Distillation, unet: nn.Module, captions: list[str], steps: int, scale: float
) -> tuple[Tensor, Tensor]:
    """From noise that is the same for all U-Nets, latents (samples, 4, C, h, w) at `SHARES` of the steps, and images.

    These are (samples, 3, H, W), from 0 to 1.
    """
    size, latents, images = run.args.train_batch_size, [], []
    for at in tqdm(range(0, len(captions), size), "Sampling"):
        part = range(len(captions))[at : at + size]
        noise = torch.stack([fidelity_noise(run, sample)[LEVELS] for sample in part])
        path = guided_path(run, unet, captions[at : at + size], noise, steps, scale)
        latents.append(path[[round(share * steps) for share in SHARES]].transpose(0, 1))
        final = path[-1].to(run.accelerator.device, run.vae.dtype) / run.vae.config.scaling_factor
        images.append((run.vae.decode(final).sample.float().cpu() / 2 + 0.5).clamp(0, 1))
    return torch.cat(latents), torch.cat(images)


def load_clip(args: Namespace) -> tuple[nn.Module, Any]:
    """The model of --clip_model_name_or_path and what prepares its inputs. Raises `UserError` where it is none."""
    from transformers import CLIPModel, CLIPProcessor

    source, settings = args.clip_model_name_or_path, {"cache_dir": args.cache_dir}
    weights = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        model, info = CLIPModel.from_pretrained(source, **weights, **settings)
        if missing := info["missing_keys"]:
            raise ValueError(f"{len(missing)} of its tensors are missing")
        return model.eval(), CLIPProcessor.from_pretrained(source, **settings)
    except Exception as error:
        raise UserError(loading_error("loaded", "clip_model_name_or_path", source, error)) from error


@torch.no_grad()
def clip_scores(clip: tuple[nn.Module, Any], images: Tensor, captions: list[str]) -> Tensor:
    """100 times the cosine between every image and its caption: (samples,)."""
    (model, processor), scores = clip, []
    for image, caption in zip(images, captions, strict=True):
        settings = {"return_tensors": "pt", "padding": True, "truncation": True, "do_rescale": False}
        found = model(**processor(text=[caption], images=[image], **settings))
        scores.append(100 * F.cosine_similarity(found.image_embeds, found.text_embeds))
    return torch.cat(scores)


def evaluate(
    args: Namespace,
    accelerator: Accelerator,
    components: Components,
    state: RunState,
    measured: Any,
    pool: CaptionPool | None,
) -> None:
    """Compare the students of --evaluate with the teacher, and write the report into --output_dir."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    output_dir, place = Path(args.output_dir), (accelerator.device, WEIGHT_DTYPES[accelerator.mixed_precision])
    for model in (components.vae, components.text_encoder, components.teacher_unet):
        freeze(model, *place)
    untrained = dict.fromkeys(("student_tap", "teacher_tap", "optimizer", "lr_scheduler", "ema_unet", "loss_function"))
    known = {
        "args": args,
        "accelerator": accelerator,
        "state": state,
        "health": StepHealth(),
        "weight_dtype": place[1],
    }
    run = Distillation(**vars(components), **known, **untrained)
    reference = make_reference(run, measured, pool)
    captions, scale = reference.captions, args.student_guidance_scale
    scale = args.validation_guidance_scale if scale is None else scale
    of_teacher, images = sample_images(run, run.teacher_unet, captions, PATH_STEPS, args.validation_guidance_scale)
    costs, shown = {"teacher": measure_cost(run, None, run.teacher_unet)}, [images]
    panels: dict[str, Any] = {f"{name} by timestep": {} for name in ("prediction_error", HEADLINE)} | {"drift": {}}
    values: dict[str, dict[str, Tensor]] = {"teacher": {}}
    for source in args.evaluate:
        logger.info(f"Measuring {source}")
        unet = freeze(load_student(args, source), *place)
        costs[source], errors = measure_cost(run, source, unet), reference.errors(run, unet, max(scale, 1.0))
        steps = args.student_num_inference_steps
        latents, ours = sample_images(run, unet, captions, steps, scale)
        drift = (latents - of_teacher).flatten(2).norm(dim=2) / of_teacher.flatten(2).norm(dim=2)
        found = {name: of_measure(errors, name) for name in MEASURES}
        found |= {f"drift at {share:.0%}": drift[:, n] for n, share in enumerate(SHARES)}
        found["PSNR"] = peak_signal_noise_ratio(ours, images, 1.0, reduction="none", dim=(1, 2, 3)).clamp(max=100)
        found["SSIM"] = structural_similarity_index_measure(ours, images, data_range=1.0, reduction="none")
        values[source] = found
        shown.append(ours)
        for name in ("prediction_error", HEADLINE):
            panels[f"{name} by timestep"][source] = reference.curve(errors, name)
        panels["drift"][source] = SHARES, drift.mean(0).tolist()
    clip = load_clip(args) if args.clip_model_name_or_path else None
    for found, theirs in zip(values.values(), shown, strict=True):
        found |= {"CLIP score": clip_scores(clip, theirs, captions)} if clip else {}
    pairs = itertools.combinations(args.evaluate, 2)
    apart = {f"{a} - {b}": {name: bootstrap(values[a][name], values[b][name]) for name in values[a]} for a, b in pairs}
    averages = {source: {name: bootstrap(each) for name, each in found.items()} for source, found in values.items()}
    samples = {source: {name: each.tolist() for name, each in found.items()} for source, found in values.items()}
    settings = {name: getattr(args, name) for name in EVALUATE_FLAGS}
    record = {"settings": settings, "captions": captions, "timesteps": reference.timesteps.tolist()}
    record |= {"costs": costs, "averages": averages, "differences": apart, "samples": samples}
    (output_dir / "report.json").write_text(json.dumps(record, indent=2))
    (output_dir / "report.md").write_text(describe_students(record))
    draw_curves(output_dir / "report.png", panels)
    columns = min(len(captions), 8)
    rows = [v2.functional.to_pil_image(image) for of_net in shown for image in of_net[:columns]]
    make_image_grid(rows, rows=len(shown), cols=columns).save(output_dir / "grid.png")
    logger.info(f"Compared {len(args.evaluate)} students on {len(captions)} samples: see {output_dir}/report.md")


def describe_students(record: Mapping[str, Any]) -> str:
    """The report of `evaluate`, in Markdown."""

    def table(columns: Mapping[str, Mapping[str, Any]]) -> str:
        names = list(dict.fromkeys(name for column in columns.values() for name in column))
        lines = [["", *columns], ["---"] * (len(columns) + 1)]
        lines += [[name, *(show(column.get(name, "")) for column in columns.values())] for name in names]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def show(value: Any) -> str:
        if isinstance(value, list):
            return f"{value[0]:.4g} ({value[1]:.4g} to {value[2]:.4g})"
        return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"

    settings = record["settings"]
    columns = {name: cost | record["averages"][name] for name, cost in record["costs"].items()}
    text = f"""# Students of {settings[TEACHER]}

{len(record["captions"])} samples at {settings["resolution"]} pixels; in brackets 95 % of 2,000 draws of them.

{table(columns)}

- Errors are over the teacher's variance: 0 is what the teacher does, 1 is as far from it as a constant.
  `{HEADLINE}` is of the guided prediction on the teacher's path, guidance {settings["validation_guidance_scale"]:g}.
- Drift is how far latents sampled from the same noise are from the teacher's, over their length, at the step nearest
  to that share of all steps. PSNR and SSIM compare the finished images with the teacher's.
- Time is that of one pass for one image over the teacher's. Memory is of a process that does such a pass and no more.
"""
    differences = f"\n## Paired differences, on the same samples and noise\n\n{table(record['differences'])}\n"
    return text + (differences if record["differences"] else "")


# ----------------------------------------------------------------------------------------------------------------
# Command line. One row is all there is of a flag: name, type, default, what is allowed, help, and whether it may
# change when a run is resumed. "free": it changes no sample, no loss and no update; or, as for data, teacher and batch
# size, its effect is compared instead. "never": what a checkpoint holds would have another shape.

INTERPOLATIONS = [mode.name.lower() for mode in InterpolationMode]
SCHEDULES = [schedule.value for schedule in SchedulerType if schedule is not SchedulerType.PIECEWISE_CONSTANT]
TASK_WEIGHT = "Weight of the task term; default: 1, of latents that the teacher made 0."
EMPTY_PROMPTS = "Share of captions left empty; 0 only for use without guidance."
SEEDS = data.between(0, 2**32 - 1)
AT_LEAST_4 = data.at_least(4)

FLAG_GROUPS: dict[str, list[Flag]] = {
    "models": [
        Flag("pretrained_model_name_or_path", str, None, None, "Teacher: name, folder, file.", "free", required=True),
        Flag("revision", str, None, None, "Revision of the teacher on the hub.", "free"),
        Flag("variant", str, None, None, "Variant of the teacher's files, such as fp16.", "free"),
        Flag("single_file_config", str, None, None, "Configs, where the teacher is a .safetensors file.", "free"),
        Flag("student_model_name_or_path", str, None, None, "Distilled student to go on from.", "free"),
        Flag("cache_dir", str, None, None, "Where downloaded models and datasets are kept.", "free"),
    ],
    "distillation": [
        Flag("distill_level", str, "sd_small", list(DISTILL_LEVELS), "What is pruned, see the first table.", "never"),
        Flag("task_weight", float, None, AT_LEAST_0, TASK_WEIGHT, before=1.0),
        Flag("output_weight", float, 0.5, AT_LEAST_0, "Weight of the output distillation term."),
        Flag("feature_weight", float, 0.5, AT_LEAST_0, "Weight of the feature term.", aliases=("--feature-weight",)),
    ],
    "data": [
        Flag("dataset_name", str, None, None, "Dataset on the hub, or a local folder that datasets can load.", "free"),
        Flag("dataset_config_name", str, None, None, "Configuration of that dataset.", "free"),
        Flag("streaming", bool, False, None, "Read --dataset_name as it goes, without storing it."),
        Flag("train_data_dir", str, None, None, "Folder of *.tar shards, or of images and metadata.", "free"),
        Flag("teacher_latents", int, None, AT_LEAST_1, "Train on latents that the teacher makes of captions.", "free"),
        Flag("teacher_latents_steps", int, 25, AT_LEAST_1, "Steps of DPM-Solver++ for each of these.", "free"),
        Flag("teacher_latents_guidance_scale", float, 7.5, AT_LEAST_0, "Guidance of these.", "free"),
        Flag("teacher_latents_seed", int, 0, SEEDS, "Seed of their captions and noise.", "free"),
        Flag("caption_pool", str, None, None, "Captions for these and for --random_conditioning.", "free"),
        Flag("image_column", str, "image", None, "Column that holds the images.", "free"),
        Flag("caption_column", str, "text", None, "Column that holds a caption or a list of captions.", "free"),
        Flag("caption_extension", str, None, None, "Of text files beside images; else .txt or .caption.", "free"),
        Flag("max_train_samples", int, None, AT_LEAST_1, "Use no more samples than this.", "free"),
        Flag("resolution", int, 512, AT_LEAST_1, "Side of the training images in pixels."),
        Flag("center_crop", bool, False, None, "Crop in the centre instead of at random."),
        Flag("random_flip", bool, False, None, "Mirror half of the images."),
        Flag("image_interpolation_mode", str, "lanczos", INTERPOLATIONS, "How images are resized."),
        Flag("cache_latents", bool, False, None, "Encode every image once, before training; one crop for each."),
        Flag("latents_cache_dir", str, None, None, "Where; default: OUTPUT_DIR-latents.", "free"),
        Flag("proportion_empty_prompts", float, 0.1, FROM_0_TO_1, EMPTY_PROMPTS, before=0.0),
        Flag("random_conditioning", float, 0.0, AT_LEAST_0, "Lambda of swapped captions, 5 in the paper; 0: none."),
        Flag("dataloader_num_workers", int, 0, AT_LEAST_0, "Processes that load data; 0: the main one.", "free"),
    ],
    "comparing students, without training": [
        Flag("evaluate", str, None, None, "Students: folders, or names on the hub.", "free", nargs="+"),
        Flag("student_num_inference_steps", int, 25, AT_LEAST_4, "Their steps; the teacher takes 25.", "free"),
        Flag("student_guidance_scale", float, None, AT_LEAST_0, "If not --validation_guidance_scale.", "free"),
        Flag("clip_model_name_or_path", str, None, None, "CLIP model to score images with.", "free"),
    ],
    "optimisation": [
        Flag("train_batch_size", int, 16, AT_LEAST_1, "Images per process and micro-batch.", "free"),
        Flag("gradient_accumulation_steps", int, 1, AT_LEAST_1, "Micro-batches per optimiser step.", "free"),
        Flag("num_train_epochs", int, 100, AT_LEAST_1, "Passes over the data, without --max_train_steps.", "free"),
        Flag("max_train_steps", int, None, AT_LEAST_1, "Optimiser steps in all.", "free"),
        Flag("learning_rate", float, 1e-4, MORE_THAN_0, "Learning rate after warm-up."),
        Flag("scale_lr", bool, False, None, "Multiply the learning rate by the total batch size."),
        Flag("lr_scheduler", str, "constant", SCHEDULES, "Learning-rate schedule."),
        Flag("lr_warmup_steps", int, 500, AT_LEAST_0, "Optimiser steps of warm-up, where the schedule has one."),
        Flag("use_8bit_adam", bool, False, None, "8-bit Adam from bitsandbytes.", "never"),
        Flag("adam_beta1", float, 0.9, FROM_0_TO_BELOW_1, "Adam's beta1."),
        Flag("adam_beta2", float, 0.999, FROM_0_TO_BELOW_1, "Adam's beta2."),
        Flag("adam_weight_decay", float, 1e-2, AT_LEAST_0, "AdamW's weight decay."),
        Flag("adam_epsilon", float, 1e-8, MORE_THAN_0, "Adam's epsilon."),
        Flag("max_grad_norm", float, 1.0, MORE_THAN_0, "Gradients are clipped to this norm."),
        Flag("use_ema", bool, False, None, "Keep a moving average of the student; the saved pipeline holds it."),
        Flag("ema_decay", float, 0.9999, FROM_0_TO_BELOW_1, "Decay of that average, reached after a warm-up."),
        Flag("offload_ema", bool, False, None, "Keep the average in the host's memory.", "free"),
        Flag("foreach_ema", bool, False, None, "Accepted; changes nothing here.", "free"),
        Flag("noise_offset", float, 0.0, AT_LEAST_0, "Scale of the noise offset."),
        Flag("input_perturbation", float, 0.0, AT_LEAST_0, "Scale of the input perturbation (0.1 recommended)."),
        Flag("prediction_type", str, None, PREDICTION_TYPES, "If not what the scheduler says."),
        Flag("gradient_checkpointing", bool, False, None, "Less memory for a slower student.", "free"),
        Flag("mixed_precision", str, None, list(WEIGHT_DTYPES), "Default: what accelerate is configured for."),
        Flag("compile", bool, False, None, "Compile the nets: a slow start, then faster on a GPU.", "free"),
        Flag("allow_tf32", bool, False, None, "TF32 matrix products on Ampere GPUs and newer.", "free"),
        Flag("seed", int, None, SEEDS, "Seed of everything random; else drawn and printed (0 with --cache_latents)."),
        Flag("local_rank", int, -1, None, "Accepted; accelerate finds it itself.", "free"),
        Flag("max_bad_steps", int, 10, AT_LEAST_0, "Stop after more non-finite steps in a row.", "free"),
    ],
    "logging, validation and saving (all counts are optimiser steps)": [
        Flag("output_dir", str, "sd-model-distilled", None, "Where everything is written.", "free"),
        Flag("logging_dir", str, "logs", None, "Trackers' folder within --output_dir.", "free"),
        Flag("logging_steps", int, 10, AT_LEAST_1, "Steps between two fetches of the metrics.", "free"),
        Flag("report_to", str, "tensorboard", None, "Tracker that accelerate knows, 'all', or 'none'.", "free"),
        Flag("tracker_project_name", str, "distill-sd", None, "Project name for the trackers.", "free"),
        Flag("validation_prompts", str, None, None, "Prompts to make images of during training.", "free", nargs="+"),
        Flag("validation_steps", int, 500, AT_LEAST_1, "Steps between two validations.", "free"),
        Flag("num_validation_images", int, 1, AT_LEAST_1, "Images per prompt.", "free"),
        Flag("validation_guidance_scale", float, 7.5, AT_LEAST_0, "Guidance of images and fidelity.", "free"),
        Flag("fidelity_samples", int, 16, AT_LEAST_0, "Samples that fidelity is measured on; 0: none.", before=0),
        Flag("load_best_model_at_end", bool, False, None, "Save the student that fidelity calls best.", "free"),
        Flag("checkpointing_steps", int, 500, AT_LEAST_1, "Steps between two checkpoints.", "free"),
        Flag("checkpoints_total_limit", int, None, AT_LEAST_1, "Keep no more checkpoints than this.", "free"),
        Flag("resume_from_checkpoint", str, None, None, "'latest', or a checkpoint's name or path.", "free"),
        Flag("allow_changed_settings", bool, False, None, "Resume with other settings, data or teacher.", "free"),
        Flag("export", str, None, EXPORTS, "Make these of the result too, see Using the result.", "free", nargs="+"),
        Flag("export_from", str, None, None, "Export this pipeline's folder; nothing is trained.", "free"),
        Flag("push_to_hub", bool, False, None, "Upload the result to the hub.", "free"),
        Flag("hub_token", str, None, None, "Token for that; better log in with `hf auth login`.", "free"),
        Flag("hub_model_id", str, None, None, "Repository to upload to; default: the name of --output_dir.", "free"),
    ],
}  # fmt: skip
FLAGS = {flag.name: flag for group in FLAG_GROUPS.values() for flag in group}

# Flags that --evaluate reads, and what it takes for others' defaults.
EVALUATE_FLAGS = """
    pretrained_model_name_or_path revision variant single_file_config cache_dir dataset_name dataset_config_name
    streaming train_data_dir teacher_latents teacher_latents_steps teacher_latents_guidance_scale
    teacher_latents_seed caption_pool image_column caption_column caption_extension max_train_samples resolution
    center_crop image_interpolation_mode latents_cache_dir evaluate student_num_inference_steps
    student_guidance_scale clip_model_name_or_path prediction_type mixed_precision train_batch_size seed
    output_dir validation_guidance_scale fidelity_samples
""".split()
EVALUATE_DEFAULTS = {"fidelity_samples": 64, "output_dir": "fidelity", "seed": 0, "max_train_steps": 1}
EVALUATE_DEFAULTS |= {"report_to": "none"}
EVALUATE_ALONE = ("student_num_inference_steps", "student_guidance_scale", "clip_model_name_or_path")

REFUSED_FLAGS = {
    "--snr_gamma": "was removed: the distillation terms are not weighted by the signal-to-noise ratio",
    "--validation_epochs": "is replaced by --validation_steps, which counts optimiser steps",
    "--enable_xformers_memory_efficient_attention": "is not needed: PyTorch's own SDPA attention is always on",
    "--non_ema_revision": "was removed: name the student's weights with --student_model_name_or_path",
    "--dream_training": "is not supported: --output_weight and --feature_weight are what guides the student",
    "--dream_detail_preservation": "is not supported, like --dream_training",
    "--prepare_unet": "was removed: the student is always built from the teacher's config",
}


def parse_args(input_args: Sequence[str] | None = None) -> Namespace:
    """The settings of a run. Every mistake that the flags alone show is printed, and the exit code is 2."""
    usage = "accelerate launch distill_training.py --pretrained_model_name_or_path MODEL [options]"
    given = sys.argv[1:] if input_args is None else input_args
    names = [word.partition("=")[0] for word in given]
    if "--export_from" in names:
        return parse_export(given)
    evaluates = "--evaluate" in names
    parser = data.make_parser(FLAG_GROUPS, "Distil a Stable Diffusion pipeline into a smaller one.", usage)
    for name in REFUSED_FLAGS:
        parser.add_argument(name, nargs="?", dest="refused", help=SUPPRESS)
    parser.set_defaults(**(EVALUATE_DEFAULTS if evaluates else {}))
    args = parser.parse_args(given)
    alone = evaluates and args.caption_pool and not (args.train_data_dir or args.dataset_name or args.teacher_latents)
    args.teacher_latents = 1 if alone else args.teacher_latents
    read = EVALUATE_FLAGS if evaluates else [name for name in FLAGS if name not in EVALUATE_ALONE]
    unread = [name for name in names if name[:2] == "--" and name[2:] in set(FLAGS).difference(read)]
    problems = [f"{name} has no meaning {'with' if evaluates else 'without'} --evaluate." for name in unread]
    try:
        problems += [f"{name} {REFUSED_FLAGS[name]}." for name in names if name in REFUSED_FLAGS] + validate_args(args)
    except OSError as error:  # such as a name that is too long, in whatever flag
        problems = [f"A path cannot be used: {error}."]
    del args.refused
    if problems:
        parser.error("\n  " + "\n  ".join(problems))
    if args.task_weight is None:  # the noise in latents that guidance made would teach guidance a second time
        args.task_weight = 0.0 if is_teacher_made(args) else 1.0
    if alone:
        args.teacher_latents = 0  # no caption was trained on: all may be measured
    return args


def is_teacher_made(args: Namespace) -> bool:
    """Whether the training data are latents that the teacher made, now or for another run."""
    latents = data.latents_of(Path(args.train_data_dir)) if args.train_data_dir else None
    return args.teacher_latents is not None or (latents or {}).get("maker") == TEACHER_MADE


def parse_export(given: Sequence[str]) -> Namespace:
    """The two flags of a call that only exports. Ends as `parse_args` does."""
    usage = "python distill_training.py --export KIND [KIND] --export_from FOLDER"
    parser = data.make_parser({"export": [FLAGS["export"], FLAGS["export_from"]]}, "Export a saved pipeline.", usage)
    parser.set_defaults(cache_dir=None)
    args, training = parser.parse_known_args(given)
    folder, kinds = Path(args.export_from), args.export or []
    problems = [f"--export_from goes with --export alone: leave out {' '.join(training)}."] if training else []
    problems += [] if kinds else [f"--export_from needs --export {' or '.join(EXPORTS)}."]
    if not os.path.isfile(folder / "model_index.json"):
        problems.append(f"--export_from {folder} holds no model_index.json: a folder must hold a whole pipeline.")
    if problems := problems or export_problems(folder, kinds):
        parser.error("\n  " + "\n  ".join(problems))
    return args


def validate_args(args: Namespace) -> list[str]:
    """What is wrong with the settings, one sentence each, without loading or downloading anything."""
    problems = data.bound_problems(FLAGS.values(), args)
    if args.resolution >= 1 and args.resolution % 8:
        problems.append(f"--resolution must be a multiple of 8, the VAE's factor, got {args.resolution}.")
    for name in (TEACHER, STUDENT):
        problems += model_path_problems(name, getattr(args, name))
    single = Path(args.pretrained_model_name_or_path).is_file()
    fits = f"has no meaning where --{TEACHER} is {'a' if single else 'no'} single file: leave it out."
    unused = ("revision", "variant") if single else ("single_file_config",)
    problems += [f"--{name} {fits}" for name in unused if getattr(args, name)]
    if args.single_file_config and single:
        problems += model_path_problems("single_file_config", args.single_file_config)
    problems += data_problems(args) + output_problems(args) + export_problems(Path(args.output_dir), EXPORTS)
    needing = ("evaluate", "load_best_model_at_end") if args.fidelity_samples == 0 else ()
    problems += [f"--{name} needs --fidelity_samples." for name in needing if getattr(args, name)]
    there = os.listdir(args.output_dir) if args.evaluate and os.path.isdir(args.output_dir) else ()
    if any(name != ".lock" and not name.startswith("fidelity-") for name in there):
        problems.append(f"--output_dir {args.output_dir} is there already: a report needs a new folder.")
    if args.allow_changed_settings and args.resume_from_checkpoint is None:
        problems.append("--allow_changed_settings needs --resume_from_checkpoint.")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        problems.append("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.")
    on_gpu = torch.cuda.is_available() and not accelerate_utils.parse_flag_from_env("ACCELERATE_USE_CPU")
    variable, usual = ("CC", "gcc clang") if on_gpu else ("CXX", "clang++" if sys.platform == "darwin" else "g++")
    compilers = os.environ.get(variable, "").split()[:1] or usual.split()
    if args.compile and not any(map(shutil.which, compilers)):
        missing = " or ".join(compilers)
        problems.append(f"--compile needs a compiler: {missing} is not there; install it or name one in {variable}.")
    if not args.use_ema:
        problems += [f"--{name} needs --use_ema." for name in ("offload_ema", "foreach_ema") if getattr(args, name)]
    if (extension := args.caption_extension) is not None and not re.fullmatch(r"\.[^./\\]+", extension):
        problems.append(f"--caption_extension must be a dot and letters, as .txt; got {extension}.")
    known, tracker = [*LOGGER_TYPE_TO_CLASS, "all", "none"], args.report_to
    if tracker not in known:
        problems.append(f"--report_to must be one of {', '.join(known)}; got {tracker}.")
    elif tracker not in [*map(str, get_available_trackers()), "all", "none"]:
        problems.append(f"--report_to {tracker} is not installed: pip install it, or choose another.")
    if args.hub_token is not None and tracker not in ("tensorboard", "none"):
        problems.append(f"--hub_token could be shown by {tracker}: log in with `hf auth login` instead.")
    engines = [name for name in ENGINES if accelerate_utils.parse_flag_from_env(f"ACCELERATE_USE_{name}")]
    return problems + [ENGINE_REFUSED.format(name) for name in engines]


def model_path_problems(name: str, source: str | None) -> list[str]:
    """What is wrong with a model's name or path, so far as can be told without the hub."""
    if source is None or Path(source).is_dir():
        if source and name != STUDENT and not (Path(source) / "model_index.json").is_file():
            return [f"--{name} {source} holds no model_index.json: a folder must hold a whole pipeline."]
        return []
    if name == TEACHER and Path(source).is_file():
        only = f"--{name} {source}: of single files only .safetensors are read: loading a pickle can run any code."
        return [] if source.endswith(".safetensors") else [only]
    if Path(source).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        return [f"--{name} {source} is neither a folder nor a name on the hub."]
    return []


def data_problems(args: Namespace) -> list[str]:
    """What is wrong with the choice of training data."""
    problems, cache = pool_problems(args), args.latents_cache_dir
    if [args.dataset_name, args.train_data_dir, args.teacher_latents].count(None) != 2:
        problems.append("Give exactly one of --dataset_name, --train_data_dir and --teacher_latents.")
    if args.streaming and args.train_data_dir is not None:
        problems.append("--streaming goes with --dataset_name only: local data is read in place anyway.")
    elif args.streaming and args.max_train_steps is None:
        problems.append("--streaming needs --max_train_steps: the length of a stream is not known.")
    if args.streaming and args.cache_latents:
        problems.append("--cache_latents does not go with --streaming: what it caches is the whole data.")
    kept = args.cache_latents or args.teacher_latents or args.random_conditioning or args.fidelity_samples
    if cache is not None and not kept:
        flags = "--cache_latents, --teacher_latents, --random_conditioning or --fidelity_samples"
        problems.append(f"--latents_cache_dir needs {flags}.")
    if cache is not None and Path(cache).is_file():
        problems.append(f"--latents_cache_dir {cache} is a file, not a folder.")
    folder = Path(args.train_data_dir or ".")
    folders = [Path(path) for path in (args.train_data_dir, args.caption_pool) if path is not None]
    if args.caption_extension and not any(path.is_dir() and not data.shards_in(path) for path in folders):
        problems.append("--caption_extension is of text files beside images: neither shards nor datasets have them.")
    if not folder.is_dir():
        problems.append(f"--train_data_dir {folder} is not a folder.")
    elif args.train_data_dir is not None and not data.shards_in(folder):
        problems += data.why_no_images(folder)
    elif args.train_data_dir is not None and (latents := data.latents_of(folder)):
        holds, settled = f"--train_data_dir {folder} holds latents", ("center_crop", "image_interpolation_mode")
        changed = [name for name in (*settled, "cache_latents") if getattr(args, name) != FLAGS[name].default]
        problems += [f"{holds}, for which --{name} has no meaning: leave it out." for name in changed]
        if args.resolution != latents["resolution"]:
            problems.append(f"{holds} of --resolution {latents['resolution']}, not of {args.resolution}.")
        if args.random_flip and latents["variants"] < 2:
            problems.append(f"{holds} that were not mirrored: --random_flip needs some made with --random_flip.")
    return problems


def pool_problems(args: Namespace) -> list[str]:
    """What is wrong with the flags on captions without images, and with the weights that go with them."""
    painted, pool = args.teacher_latents is not None, Path(args.caption_pool or ".")
    of_images = "streaming max_train_samples cache_latents random_flip center_crop image_interpolation_mode".split()
    of_images += ["image_column"] + (["caption_column"] if pool.is_file() else [])
    of_latents = [name for name in FLAGS if name.startswith("teacher_latents_")]
    names, rule = (of_images, "has no meaning with") if painted else (of_latents, "needs")
    problems = [f"--{name} {rule} --teacher_latents." for name in names if getattr(args, name) != FLAGS[name].default]
    if args.caption_pool is None:
        if painted or (args.random_conditioning and args.streaming):
            problems.append(f"--{'teacher_latents' if painted else 'random_conditioning'} needs --caption_pool here.")
    elif not painted and not args.random_conditioning:
        problems.append("--caption_pool is read with --teacher_latents or --random_conditioning only.")
    elif pool.is_dir() and not data.shards_in(pool):
        problems += [line.replace("--train_data_dir", "--caption_pool", 1) for line in data.why_no_images(pool)]
    elif not pool.is_dir() and not (pool.is_file() and pool.suffix == ".txt"):
        problems.append(f"--caption_pool {pool} is neither a folder of shards or images nor a .txt file of captions.")
    if not args.output_weight and not args.feature_weight:
        if args.random_conditioning:
            problems.append("--random_conditioning needs --output_weight or --feature_weight: it has no task term.")
        if args.task_weight == 0 or (args.task_weight is None and is_teacher_made(args)):
            problems.append("--task_weight, --output_weight and --feature_weight are all 0: nothing would be trained.")
    return problems


def output_problems(args: Namespace) -> list[str]:
    """Why `--output_dir` cannot be written to without losing something that is there."""
    folder = Path(args.output_dir)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        return [f"--output_dir {folder} is not a folder."]
    logs = Path(os.path.normpath(f"{folder}/{args.logging_dir}")) if args.report_to != "none" else folder
    for name, path in {"output_dir": folder, "logging_dir": logs}.items():
        nearest = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
        if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
            return [f"--{name} {path} cannot be written to: {nearest} is not a folder that you may write in."]
    try:
        resumed = find_checkpoint(folder, args.resume_from_checkpoint)
    except FileNotFoundError as error:
        return [str(error)]
    if resumed is not None and resumed.resolve().parent == folder.resolve():
        return []
    if checkpoints := list_checkpoints(folder):
        go_on = "go on with --resume_from_checkpoint latest, or choose another folder."
        return [f"--output_dir {folder} holds another run's checkpoints ({checkpoints[-1].name}): {go_on}"]
    if cut := [path.name for path in folder.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]:
        return [f"--output_dir {folder} holds {cut[0]}, which is no whole checkpoint (no {STATE_FILE}): move it away."]
    if (folder / "model_index.json").exists():
        return [f"--output_dir {folder} holds a finished pipeline: choose another folder."]
    settings = folder / "args.json"
    if not (settings.is_file() and '"distill_level"' in settings.read_text()):  # else it is a run's that stopped early
        written = ("README.md", "args.json", "val_imgs_grid.png", "validation", "best", "fidelity.json", "unet", "vae")
        written += ("text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
        if name := next((name for name in written if (folder / name).exists()), None):
            return [f"--output_dir {folder} holds {name}, which is not from a run of this script: choose another."]
    return []


def public_args(args: Namespace) -> dict[str, Any]:
    """The settings without secrets, for files, trackers and the model card."""
    return {key: value for key, value in vars(args).items() if key != "hub_token"}


# ----------------------------------------------------------------------------------------------------------------
# One run: `make_run` builds what a step needs, `train` is the loop, `main` is all from flags to upload.

ENGINES = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")  # as accelerate's variables name them
ENGINE_REFUSED = (
    "accelerate is configured for {}, which this script does not support: choose plain data parallel training with "
    "`accelerate config` (a student of 0.6 billion parameters fits any card that can train it)."
)


def make_accelerator(args: Namespace) -> Accelerator:
    """accelerate as a run needs it. Raises `UserError` for what cannot be had, a tracker without a login among it."""
    name, flag = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", args.gradient_accumulation_steps
    accelerator = Accelerator(
        gradient_accumulation_plugin=accelerate_utils.GradientAccumulationPlugin(num_steps=flag),  # over the variable
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=accelerate_utils.ProjectConfiguration(args.output_dir, f"{args.output_dir}/{args.logging_dir}"),
        step_scheduler_with_optimizer=False,  # else it would be stepped once for every process
        # The others wait while the main process downloads, makes images or saves; ten minutes are not enough for that.
        kwargs_handlers=[accelerate_utils.InitProcessGroupKwargs(timeout=timedelta(hours=3))],
    )
    for size in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):  # accelerate knows these
        launched, seen = os.environ.get(size, "1"), accelerator.num_processes
        if launched.isdigit() and int(launched) > seen:  # each would take itself for the only one, in one folder
            alone = "on a machine without GPU set ACCELERATE_USE_CPU=true"
            raise UserError(f"{size} is {launched}, but accelerate sees {seen} process: {alone}, or unset {size}.")
    if os.environ.get(name, str(flag)) != str(flag):
        logger.warning(f"{name}={os.environ[name]} is ignored: --gradient_accumulation_steps is {flag}.")
    engine = accelerator.distributed_type.value
    if engine != "NO" and not engine.startswith("MULTI_"):
        raise UserError(ENGINE_REFUSED.format(engine))
    precision = accelerator.mixed_precision
    if precision not in WEIGHT_DTYPES:
        known = ", ".join(WEIGHT_DTYPES)
        raise UserError(f"--mixed_precision must be one of {known}; accelerate is configured for {precision}.")
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU: choose bf16 or no on a CPU.")
    if args.report_to in ("wandb", "all") and accelerator.is_main_process and importlib.util.find_spec("wandb"):
        data.check_wandb("--report_to wandb")
    return accelerator


def make_optimizer(args: Namespace, unet: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW over the student's parameters, fused where the device has it, or in 8 bits."""
    betas, decay = (args.adam_beta1, args.adam_beta2), args.adam_weight_decay
    settings = {"lr": learning_rate, "betas": betas, "weight_decay": decay, "eps": args.adam_epsilon}
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(unet.parameters(), **settings)
    fused = next(unet.parameters()).device.type in ("cuda", "cpu")
    return torch.optim.AdamW(unet.parameters(), fused=fused, **settings)


def make_schedule(args: Namespace, optimizer: torch.optim.Optimizer) -> Any:
    """The learning rate's schedule. Raises `UserError` where its library refuses it."""
    steps = args.max_train_steps or args.lr_warmup_steps + 1  # where it is not known yet
    try:
        schedule = get_scheduler(args.lr_scheduler, optimizer, None, args.lr_warmup_steps, steps)
        schedule.lr_lambdas[0](steps)  # as the last step will
        return schedule
    except ZeroDivisionError:
        equal = f"--lr_warmup_steps {args.lr_warmup_steps} must not be all of the {steps} steps"
        raise UserError(f"--lr_scheduler {args.lr_scheduler}: {equal}.") from None
    except ValueError as error:
        rate = optimizer.defaults["lr"]
        raise UserError(f"--lr_scheduler {args.lr_scheduler} with a learning rate of {rate}: {error}.") from None


def check_schedule(args: Namespace, accelerator: Accelerator) -> None:
    """Raise `UserError` for a schedule that its library refuses."""
    make_schedule(args, torch.optim.SGD([torch.zeros(1)], peak_learning_rate(args, accelerator)))


def start_trackers(args: Namespace, accelerator: Accelerator) -> None:
    """Start --report_to's trackers, if any. Raises `UserError` where one cannot be started."""
    config = {key: value for key, value in public_args(args).items() if isinstance(value, (int, float, str))}
    try:
        accelerator.init_trackers(args.tracker_project_name, config=config)
    except Exception as error:  # not logged in, out of reach, ...
        raise UserError(f"--report_to {args.report_to} cannot be started: {first_line(error)}") from error


def make_run(
    args: Namespace,
    accelerator: Accelerator,
    components: Components,
    state: RunState,
    checkpoint: Path | None = None,
    encodes: bool = True,
) -> Distillation:
    """All that `training_step` needs, of components in float32, the student put where `checkpoint` left off.

    Without `encodes` the VAE stays in the host's memory: the latents come from shards.
    """
    device, weight_dtype, host = accelerator.device, WEIGHT_DTYPES[accelerator.mixed_precision], torch.device("cpu")
    # 1. Freeze, cast and place all but the student. They stay unprepared: accelerate would checkpoint them over it.
    vae, teacher_unet = freeze(components.vae, device if encodes else host, weight_dtype), components.teacher_unet
    for model in filter(None, (components.text_encoder, teacher_unet)):
        freeze(model, device, weight_dtype)
    unet = components.unet.train().to(device)
    if use_channels_last(device, weight_dtype, args.compile):
        for model in filter(None, (vae, teacher_unet, None if args.use_8bit_adam else unet)):
            model.to(memory_format=torch.channels_last)  # 8-bit Adam's first step would put the student back
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    # 2. EMA and optimiser.
    ema_unet = StudentEMA(unet, args.ema_decay, args.offload_ema) if args.use_ema else None
    learning_rate, steps = peak_learning_rate(args, accelerator), args.max_train_steps
    optimizer = make_optimizer(args, unet, learning_rate)
    # 3. Feature taps, before the first call of either U-Net; then compile, in place, which leaves names as they are.
    student_tap = teacher_tap = None
    if args.feature_weight > 0:
        teacher_names, student_names = zip(*DISTILL_LEVELS[args.distill_level].feature_pairs, strict=True)
        teacher_tap, student_tap = FeatureTap(teacher_unet, teacher_names), FeatureTap(unet, student_names)
        check_features(teacher_unet, teacher_tap)
        check_features(unet, student_tap)
    loss_function = distillation_loss
    if args.compile:
        # What save_pretrained adds to a config: added later, it would have the student compiled anew.
        unet.register_to_config(_class_name=type(unet).__name__, _diffusers_version=diffusers.__version__)
        for model in filter(None, (vae.encoder if encodes else None, unet, teacher_unet)):
            model.compile(dynamic=False)  # shapes kept apart: from block to block they differ
        loss_function = torch.compile(distillation_loss, dynamic=False)
    # 4. The schedule; prepare, and resume.
    unet, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, make_schedule(args, optimizer))
    save_hook, load_hook = checkpoint_hooks(accelerator, ema_unet)
    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)
    run = Distillation(
        **(vars(components) | {"unet": unet, "optimizer": optimizer, "lr_scheduler": lr_scheduler}),
        args=args,
        accelerator=accelerator,
        state=state,
        health=StepHealth(),
        weight_dtype=weight_dtype,
        student_tap=student_tap,
        teacher_tap=teacher_tap,
        ema_unet=ema_unet,
        loss_function=loss_function,
    )
    if checkpoint is not None:
        load_checkpoint(run, checkpoint, learning_rate)
    state.max_train_steps, state.batch = steps, [args.train_batch_size, accelerator.num_processes]
    return run


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has held, for messages."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    with suppress(ImportError):
        import resource  # POSIX has it

        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
        return f"{kibibytes / 2**20:.2f} GiB of the host's memory"
    return "not known"


def quiet_libraries() -> None:
    """What they warn of (tensors missing, dtypes mixed) is an error here."""
    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def report(headline: str, facts: Mapping[str, Any]) -> None:
    """Log a headline and a table of facts."""
    logger.info(f"***** {headline} *****")
    for name, value in facts.items():
        logger.info(f"  {name} = {value}")


def read_health(run: Distillation, metrics: MetricLog, wait: bool) -> None:
    """Read how the last steps went; warn of bad ones. Raises `TrainingError` after too many in a row."""
    for step in run.health.read(run.state, wait):
        metrics.write()
        broken, limit, in_a_row = metrics.not_finite(step), run.args.max_bad_steps, run.state.bad_in_a_row
        logger.warning(f"Step {step} is skipped: {broken}")
        if in_a_row > limit:
            stopped = f"Stopped at step {step}, after {in_a_row} in a row whose numbers are not finite"
            raise TrainingError(f"{stopped} ({broken}; --max_bad_steps {limit}); {run.health.where_to_resume()}.")


def train(
    run: Distillation, dataset: TrainingData, meter: "FidelityMeter | None"
) -> tuple[dict[str, float], Tensor, float]:
    """The training loop: the last metrics (see `MetricLog.means`), `counts`, and steps per second.

    It ends early where `run.health` has a signal to stop. Raises `TrainingError` where too many steps are skipped.
    """
    args, accelerator, health, state = run.args, run.accelerator, run.health, run.state
    metrics, counts = MetricLog(accelerator, run.metric_names()), torch.zeros(len(COUNTED), dtype=torch.int64)
    per_micro_batch, first_step = args.train_batch_size * accelerator.num_processes, state.global_step
    micro_batch, seconds, timed_steps = state.samples_seen // per_micro_batch, 0.0, 0
    shown = {"desc": "Steps", "initial": first_step, "disable": not accelerator.is_local_main_process}
    batches = make_dataloader(dataset, args, accelerator, micro_batch)
    with closing(batches), tqdm(total=args.max_train_steps, **shown) as progress:
        teacher_images, steps = make_teacher_images(run), range(first_step + 1, args.max_train_steps + 1)
        if (args.validation_prompts and first_step == 0) or (meter is not None and meter.lacks(first_step, args)):
            validate(run, teacher_images, meter)
            if health.stop_signal:
                save_and_stop(run, None)
                steps = range(0)
        started = time.perf_counter()
        for step in steps:
            learning_rate, terms = run.lr_scheduler.get_last_lr()[0], 0.0
            for _ in range(args.gradient_accumulation_steps):
                batch = next(batches)
                if batch["counts"][UNREADABLE] and not counts[UNREADABLE]:
                    logger.warning("Training data can no longer be read: other samples take its place.")
                counts += batch["counts"]
                micro_terms, grad_norm = training_step(run, batch, micro_batch)
                terms += micro_terms / args.gradient_accumulation_steps
                micro_batch += 1
            state.global_step, state.samples_seen = step, micro_batch * per_micro_batch
            metrics.add(step, learning_rate, terms, grad_norm)
            progress.update()
            timed_steps += 1
            if args.compile and step == first_step + 1 < args.max_train_steps:  # compiling is no training
                started, timed_steps = time.perf_counter(), 0
            ends, saves = step == args.max_train_steps, step % args.checkpointing_steps == 0
            validates = bool(args.validation_prompts) or meter is not None
            validates = validates and (ends or step % args.validation_steps == 0)
            read_health(run, metrics, wait=ends or saves or validates)
            if health.stop_signal:
                read_health(run, metrics, wait=True)
            if ends or saves or validates or health.stop_signal or step % args.logging_steps == 0:
                metrics.write()
                last = metrics.latest[-1][1]
                progress.set_postfix({name: f"{last[name]:.3g}" for name in ("loss", "task_loss", "lr")})
            saves = bool(health.stop_signal) or (saves and not health.bad)
            if saves or validates:
                seconds += time.perf_counter() - started
                saved = None
                if saves:
                    check_finite(run.unet, health)
                    saved = save_checkpoint(run)
                if validates and not health.stop_signal:
                    validate(run, teacher_images, meter)
                if health.stop_signal:
                    save_and_stop(run, saved)
                    break
                started = time.perf_counter()
        seconds += time.perf_counter() - started
    means, averaged = metrics.means()
    final = {f"Final {name}": f"{value:.6g}" for name, value in means.items()}
    final |= {"Final values": f"means of the last {averaged} steps"}
    return final | (meter.describe(args) if meter is not None else {}), counts, timed_steps / seconds


def finish_run(run: Distillation, repo_id: str, facts: Mapping[str, Any]) -> None:
    """Save the pipeline, check it and describe it. Raises `TrainingError` where there is nothing to save."""
    args, accelerator, output_dir, state = run.args, run.accelerator, Path(run.args.output_dir), run.state
    if state.global_step > 0 and state.sound_steps == 0:
        advice = " Train longer, or in bf16." if state.scaler_skips else ""
        none = f"None of the {state.global_step} steps was sound ({state.scaler_skips} skipped by the loss scaler)"
        raise TrainingError(f"{none}: the student is as it was pruned, and nothing is saved.{advice}")
    check_finite(run.unet, run.health)
    if accelerator.is_main_process:
        student = accelerator.unwrap_model(run.unet, keep_fp32_wrapper=False, keep_torch_compile=False)
        best, step = output_dir / "best", args.max_train_steps
        loads_best = args.load_best_model_at_end and best.exists()
        if args.load_best_model_at_end and not loads_best:
            logger.warning(f"{best} is not there: the last student is saved.")
        if loads_best:
            step = json.loads((best / "fidelity.json").read_text())["step"]
            kept = UNet2DConditionModel.from_pretrained(best, subfolder="unet", use_safetensors=True)
            student.load_state_dict(kept.state_dict())
        elif run.ema_unet is not None:
            run.ema_unet.join()
            run.ema_unet.copy_to(student.parameters())
        try:
            save_pipeline(args, student)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            if isinstance(error, TrainingError):
                raise
            cannot = f"The pipeline cannot be saved in {output_dir} ({first_line(error)})"
            raise TrainingError(f"{cannot}; {run.health.where_to_resume()}.") from error
        grid = output_dir / "validation" / f"step-{step}.png"
        images = [Image.open(grid)] if grid.exists() else None
        # Stable Diffusion 2.x, known by its text encoder's width, came under another licence.
        licence = {1024: "openrail++"}.get(text_width(student.config), "creativeml-openrail-m")
        save_model_card(args, repo_id, images, args.output_dir, facts, licence)
        if args.export:
            export_pipeline(output_dir, args.export)
    accelerator.wait_for_everyone()


def make_hub_repo(args: Namespace, accelerator: Accelerator) -> str:
    """The repository's name; with --push_to_hub it is there then. Raises `UserError` where it cannot be made."""
    repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
    if args.push_to_hub and accelerator.is_main_process:
        try:
            repo_id = huggingface_hub.create_repo(repo_id, exist_ok=True, token=args.hub_token).repo_id
        except Exception as error:  # not logged in, out of reach, no such user, ...
            raise UserError(f"--push_to_hub: {repo_id} cannot be made on the hub: {first_line(error)}") from error
    return repo_id


def push_to_hub(args: Namespace, repo_id: str) -> None:
    """Upload the pipeline, its card and its exports, and nothing else of the output folder."""
    index = json.loads((Path(args.output_dir) / "model_index.json").read_text())
    parts = [f"{name}/*" for name in index if name[0] != "_"]
    written = ["README.md", "val_imgs_grid.png", "model_index.json", *parts]
    if "single_file" in (args.export or ()):
        written.append(f"{glob.escape(Path(args.output_dir).resolve().name)}.safetensors")
    upload = {"folder_path": args.output_dir, "commit_message": "End of training", "token": args.hub_token}
    huggingface_hub.upload_folder(repo_id=repo_id, allow_patterns=written, **upload)


def main(args: Namespace) -> None:
    """One run: build or resume the student, train it, save the pipeline. `args` are `parse_args`'s.

    Raises `UserError` and `TrainingError` (see there).
    """
    # 1. Accelerator and logging; what only exports needs no more.
    accelerator = PartialState(cpu=True) if args.export_from is not None else make_accelerator(args)
    line = "%(asctime)s - %(levelname)s - %(name)s - %(message)s"
    logging.basicConfig(format=line, datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    quiet_libraries()
    if args.export_from is not None:
        check_pipeline(args, "export_from")
        return accelerator.on_main_process(export_pipeline)(Path(args.export_from), args.export)

    # 2. The checkpoint that is resumed, the seed, and whether the flags are those that it was made with.
    output_dir = Path(args.output_dir)
    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
    state = read_trainer_state(checkpoint, args) if checkpoint else RunState()
    if args.seed is None:
        # What is cached depends on the seed (crops, the choice of samples): a drawn one would never find it again.
        seed = 0 if args.cache_latents else secrets.randbelow(2**31)
        args.seed = accelerate_utils.broadcast_object_list([state.settings.get("seed", seed)])[0]
        origin = "as in the checkpoint" if checkpoint else "of --cache_latents" if args.cache_latents else "drawn"
        logger.info(f"Seed {args.seed} ({origin})")
    settle_fidelity(args, checkpoint, state)
    settings = run_settings(args, accelerator)
    check_unchanged(checkpoint, state.settings, settings, args)
    accelerate_utils.set_seed(args.seed)

    # 3. What is read before any weights: configs, tokenizer, data; and the repository that is uploaded to.
    check_schedule(args, accelerator)
    teacher_config = check_teacher(args)
    tokenizer = load_component(CLIPTokenizer, args, subfolder="tokenizer")
    check_text_encoder(args, tokenizer, teacher_config)
    check_students(args, accelerator, teacher_config)
    noise_scheduler = load_noise_scheduler(args)
    dataset, total_batch = make_train_dataset(args, tokenizer, accelerator), total_batch_size(args, accelerator)
    if args.max_train_steps is None:
        trained_on = len(dataset) - held_out(args, dataset)
        args.max_train_steps = math.ceil(args.num_train_epochs * trained_on / total_batch)
        check_schedule(args, accelerator)
    repo_id = make_hub_repo(args, accelerator)

    # 4. The models, and whether data and teacher are those that the checkpoint was made with.
    components = load_components(args, teacher_config, tokenizer, noise_scheduler)
    vae = components.vae
    latents = getattr(dataset.rows, "latents", None)
    pool = make_caption_pool(args, dataset, tokenizer, accelerator)
    contents = describe_contents(dataset, pool, components, teacher_config, args, accelerator.num_processes)
    same_vae = (contents["teacher's VAE"], vae.config.scaling_factor)
    if latents and (latents["vae"], latents["scaling_factor"]) != same_vae:
        of_another = f"holds latents of another VAE than that of --{TEACHER}."
        raise UserError(f"--train_data_dir {args.train_data_dir} {of_another}")
    check_unchanged(checkpoint, state.settings, contents, args)
    state.settings = settings | contents
    if state.global_step > args.max_train_steps:
        raise UserError(f"{checkpoint} is already past --num_train_epochs {args.num_train_epochs}.")

    with own_output_dir(args, accelerator, checkpoint):
        # 5. Encode the images, before the VAE is cast, or have the teacher make latents, and build the run.
        if args.cache_latents:
            dataset = cache_latents(dataset, vae, args, accelerator)
        elif args.teacher_latents:
            dataset = make_teacher_latents(dataset, pool, components, contents, args, accelerator)
        encodes = not (latents or args.cache_latents or args.teacher_latents)
        dataset, measured = hold_out(args, dataset, pool)
        if args.evaluate:
            return evaluate(args, accelerator, components, state, measured, pool)
        run = make_run(args, accelerator, components, state, checkpoint, encodes)
        resumed = checkpoint is not None
        meter = FidelityMeter(run, make_reference(run, measured, pool), resumed) if measured is not None else None
        if args.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True  # not for latents, which are kept for good

        # 6. Say what is about to happen, and write down the settings.
        of_teacher = count_parameters(components.teacher_unet or meta_unet(teacher_config))
        of_student, first_step = count_parameters(components.unet), state.global_step
        fewer = 1 - of_student / of_teacher
        plan = {
            "Teacher": f"{args.pretrained_model_name_or_path}, {of_teacher:,} parameters in its U-Net",
            "Student": f"{args.distill_level}, {of_student:,} parameters ({fewer:.1%} fewer)",
            "Loss": loss_formula(args),
            "Feature pairs (teacher-student)": ", ".join(n.partition("/")[2] for n in run.metric_names()[4:])
            or "none",
            "Caption pool": f"{len(pool):,} captions, lambda {args.random_conditioning:g}" if pool else "none",
            "Training samples": "a stream" if isinstance(dataset, StreamingDataset) else f"{len(dataset):,}",
            "Fidelity": meter.plan(args, state.global_step) if meter else "not measured",
            "Images per process and micro-batch": args.train_batch_size,
            "Images per optimiser step (with accumulation and all processes)": total_batch,
            "Optimiser steps": f"{args.max_train_steps:,}"
            + (f", going on after {first_step:,}" if checkpoint else ""),
            "Precision": f"{accelerator.mixed_precision} on {accelerator.num_processes} x {accelerator.device.type}",
            "Output": output_dir,
        }
        report("Running training", plan)
        if accelerator.is_main_process:
            (output_dir / "args.json").write_text(json.dumps(public_args(args), indent=2))
        start_trackers(args, accelerator)

        # 7. Train.
        with stop_signals(run.health):
            final, counts, steps_per_second = train(run, dataset, meter)
            for tap in filter(None, (run.student_tap, run.teacher_tap)):
                tap.close()
            if run.health.stop_signal:
                with warn_instead_of_failing("Closing the trackers"):
                    accelerator.end_training()
                sys.exit(128 + run.health.stop_signal)

            # 8. Save the pipeline, check it, describe it, share it.
            counts = accelerator.reduce(counts.to(accelerator.device), reduction="sum").cpu()
            facts = {"Teacher's U-Net": f"{of_teacher:,} parameters", "Student's U-Net": f"{of_student:,} parameters"}
            facts |= {"Optimiser steps": f"{args.max_train_steps:,} of {total_batch} samples", **final}
            finish_run(run, repo_id, facts)
        if args.push_to_hub and accelerator.is_main_process:  # which a signal may end
            push_to_hub(args, repo_id)

    # 9. Say what was done.
    per_second = f"{steps_per_second:.3f} ({steps_per_second * total_batch:.2f} images per second)"
    done = {"Steps per second": per_second, "Peak memory": peak_memory(accelerator.device)}
    done |= {"Samples replaced": describe_counts(counts) + (f" (since step {first_step})" if checkpoint else "")}
    done |= {"Steps skipped": f"{state.skipped_steps}, and {state.scaler_skips} by the loss scaler"}
    report("Training is done", final | done | {"Output": f"{output_dir}, loaded back and equal to what was trained"})
    images_seen = (args.max_train_steps - first_step) * total_batch
    if counts[ENLARGED]:
        logger.warning(f"{counts[ENLARGED]} of {images_seen} images were smaller than --resolution and were enlarged.")
    with warn_instead_of_failing("Closing the trackers"):
        accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_args())
    except (UserError, FileNotFoundError, TrainingError) as problem:
        print(f"{Path(__file__).name}: error: {problem}", file=sys.stderr)
        sys.exit(1 if isinstance(problem, TrainingError) else 2)
    except KeyboardInterrupt:  # before or after training, which would save first, see `stop_signals`
        print(f"{Path(__file__).name}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
