#!/usr/bin/env python
# Copyright 2026 The distill-sd authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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

import argparse
import errno
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import secrets
import shutil
import signal
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    SCALER_NAME,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    parse_flag_from_env,
    set_seed,
)
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
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchvision.transforms import InterpolationMode, v2
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

logger = get_logger(__name__, log_level="INFO")


PREDICTION_TYPES = ("epsilon", "v_prediction")
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class UserError(ValueError):
    """A mistake in the flags, the models or the data: shown as one sentence, exit code 2."""

    def __init__(self, message: str) -> None:
        # A loader's worker wraps its traceback round the sentence, which is all that the user needs.
        super().__init__(message.rsplit("UserError: ", 1)[-1].strip())


class TrainingError(RuntimeError):
    """The run cannot go on (a loss is no longer finite): shown as one sentence, exit code 1."""


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


DOWN_BLOCKS = tuple(f"down_blocks.{i}" for i in range(4))
UP_BLOCKS = tuple(f"up_blocks.{i}" for i in range(4))

DISTILL_LEVELS: dict[str, DistillLevel] = {
    "sd_small": DistillLevel(
        paper_name="BK-SDM-Base",
        keeps_mid_block=True,
        removed_levels=0,
        feature_pairs=tuple((name, name) for name in (*DOWN_BLOCKS, "mid_block", *UP_BLOCKS)),
    ),
    "bk_small": DistillLevel(
        paper_name="BK-SDM-Small",
        keeps_mid_block=False,
        removed_levels=0,
        feature_pairs=tuple((name, name) for name in (*DOWN_BLOCKS, *UP_BLOCKS)),
    ),
    "sd_tiny": DistillLevel(
        paper_name="BK-SDM-Tiny",
        keeps_mid_block=False,
        removed_levels=1,
        # The student's last down block stands where the teacher's first up block hands over to the second.
        feature_pairs=tuple(zip((*DOWN_BLOCKS[:2], *UP_BLOCKS), (*DOWN_BLOCKS[:3], *UP_BLOCKS[:3]), strict=True)),
    ),
}

# Entries of a U-Net config that may hold one value per resolution, outermost first.
PER_LEVEL_KEYS = (
    "block_out_channels",
    "down_block_types",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "only_cross_attention",
    "transformer_layers_per_block",
)


def _complete_unet_config(config: Mapping[str, Any]) -> dict[str, Any]:
    # Published configs leave keys out. `from_pretrained` notes those in the hidden `_use_default_values`, and
    # `from_config` then ignores what one sets for them, so hidden keys go and every default is spelled out.
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(UNet2DConditionModel.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return defaults | {key: value for key, value in config.items() if not key.startswith("_")}


def check_prunable(teacher_config: Mapping[str, Any]) -> None:
    """Raise `UserError` unless the config is that of a whole Stable Diffusion 1.x or 2.x U-Net."""
    config = _complete_unet_config(teacher_config)
    if config["addition_embed_type"] or config["class_embed_type"] or config["encoder_hid_dim_type"]:
        raise UserError(
            "The teacher's U-Net takes more than a timestep and a caption (Stable Diffusion XL and its kin do); "
            "only Stable Diffusion 1.x and 2.x can be distilled."
        )
    layers = config["layers_per_block"]
    if any(count != 2 for count in (layers if isinstance(layers, (list, tuple)) else [layers])):
        raise UserError(
            f"The teacher's U-Net has layers_per_block={layers} where Stable Diffusion has 2: it is already pruned, "
            "so name it with --student_model_name_or_path and its own teacher with --pretrained_model_name_or_path."
        )
    expected = {
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    for key, value in expected.items():
        found = list(config[key]) if isinstance(config[key], (list, tuple)) else config[key]
        if found != value:
            raise UserError(
                f"The teacher's U-Net has {key}={found}; a Stable Diffusion 1.x or 2.x teacher has {value}."
            )


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
    block, rest = int(match[1]), match[2]
    rest = re.sub(r"^(resnets|attentions)\.1\.", r"\1.2.", rest)
    return f"up_blocks.{block + DISTILL_LEVELS[level].removed_levels}.{rest}"


def build_student(teacher: UNet2DConditionModel, level: str) -> UNet2DConditionModel:
    """The pruned U-Net in float32, each of its tensors bit-equal to the teacher's that it comes from.

    Raises `UserError` where the teacher cannot be pruned at this level.
    """
    student = UNet2DConditionModel.from_config(student_unet_config(teacher.config, level))
    weights = teacher.state_dict()
    student.load_state_dict({key: weights[teacher_key(key, level)] for key in student.state_dict()}, strict=True)
    return student


def check_student(student: UNet2DConditionModel, teacher_config: Mapping[str, Any], level: str) -> None:
    """Raise `UserError` unless `student` has the architecture that pruning this teacher at this level gives."""
    with torch.device("meta"):
        expected = UNet2DConditionModel.from_config(student_unet_config(teacher_config, level))
    wanted = {key: tuple(value.shape) for key, value in expected.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in student.state_dict().items()}
    differing = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    if differing:
        key = differing[0]
        raise UserError(
            f"--student_model_name_or_path holds no {level} student of this teacher: {len(differing)} tensors "
            f"differ, the first being {key} ({found.get(key, 'absent')} instead of {wanted.get(key, 'absent')})."
        )
    levels = len(expected.config.block_out_channels)
    # No tensor's shape depends on these.
    for key in ("attention_head_dim", "norm_num_groups", "norm_eps", "act_fn", "flip_sin_to_cos", "freq_shift"):
        mine, theirs = (np.broadcast_to(net.config[key], levels).tolist() for net in (student, expected))
        if mine != theirs:
            raise UserError(
                f"--student_model_name_or_path has {key}={student.config[key]}; a {level} student of this teacher "
                f"has {expected.config[key]}."
            )


def feature_pairs(level: str) -> list[tuple[str, str]]:
    """(teacher's module path, student's module path) of every block pair that the feature loss compares."""
    return list(DISTILL_LEVELS[level].feature_pairs)


# ----------------------------------------------------------------------------------------------------------------
# Distillation loss (BK-SDM, equations 1 to 3): task, output and feature terms, all of them in float32.


class FeatureTap:
    """Keeps what the named blocks of `model` last put out, by forward hooks.

    Register before the first call of a compiled model: hooks that come later are silently ignored by it. While
    `enabled` is false the hooks let everything pass, so that pictures can be made in between.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.names = list(names)
        self.enabled = True
        self._features: list[Tensor | None] = [None] * len(self.names)  # filled from the start: one compiled graph
        self._handles = [
            model.get_submodule(name).register_forward_hook(self._make_hook(slot))
            for slot, name in enumerate(self.names)
        ]

    def _make_hook(self, slot: int) -> Callable[..., None]:
        def keep(_module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
            if self.enabled:  # down blocks also return their skip connections, after the hidden states
                self._features[slot] = output[0] if isinstance(output, tuple) else output

        return keep

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
    output_weight: float,
    feature_weight: float,
) -> dict[str, Tensor]:
    """Weighted sum and unweighted terms of the loss (BK-SDM, equations 1 to 3), in float32 whatever comes in.

    Predictions and target are (B, C, H, W); features are two equally long lists, pair by pair of one shape.
    `teacher_pred` may be None (no teacher): the output term is then 0, as the feature term is without features.
    Returns scalars `loss`, `task_loss`, `output_loss`, `feature_loss`, and `feature_losses` (pairs,), which
    `feature_loss` is the sum of. Raises `ValueError` where a pair differs in shape or one list is longer.
    """
    student_pred = student_pred.float()
    task_loss = F.mse_loss(student_pred, target.float())
    output_loss = (
        torch.zeros_like(task_loss) if teacher_pred is None else F.mse_loss(student_pred, teacher_pred.float())
    )
    pair_losses = []
    for student_feature, teacher_feature in zip(student_features, teacher_features, strict=True):
        if student_feature.shape != teacher_feature.shape:  # mse_loss would broadcast, with a mere warning
            raise ValueError(f"Feature shapes differ: {tuple(student_feature.shape)}, {tuple(teacher_feature.shape)}.")
        # Half precision overflows here: a difference of 300 squares to more than float16 can hold.
        pair_losses.append(F.mse_loss(student_feature.float(), teacher_feature.float()))
    feature_losses = torch.stack(pair_losses) if pair_losses else task_loss.new_zeros(0)
    feature_loss = feature_losses.sum()
    return {
        "loss": task_loss + output_weight * output_loss + feature_weight * feature_loss,
        "task_loss": task_loss,
        "output_loss": output_loss,
        "feature_loss": feature_loss,
        "feature_losses": feature_losses,
    }


# ----------------------------------------------------------------------------------------------------------------
# Data. Whatever is random about a sample follows from (seed, epoch, sample) and the order from (seed, epoch), not
# from what was drawn before, so the place in the data is one number and a resumed run sees what it would have seen.

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
BROKEN_IMAGE, EMPTY_CAPTION, UNREADABLE, ENLARGED = range(4)  # what is counted about samples, see `collate_fn`


def derived_seed(*parts: int | str) -> int:
    """A seed of 63 bits that follows from `parts` alone."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def decode_image(data: bytes) -> Image.Image:
    """Bytes of a picture file to RGB as it is meant to be seen. Raises what Pillow raises on a broken file.

    EXIF orientation is applied, transparency goes on white, 16 bits are scaled to 8, animations give their first
    frame.
    """
    image = Image.open(io.BytesIO(data))
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255, which paints 16-bit pictures white
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 65535 * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_transforms(
    resolution: int, center_crop: bool, random_flip: bool, interpolation: str = "lanczos"
) -> Callable[[Image.Image], Tensor]:
    """Picture to a float32 tensor (3, resolution, resolution) in [-1, 1]; draws from torch's global generator.

    The shorter side is resized to `resolution` pixels, then the picture is cropped, at random or in the centre.
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
    texts = []
    for caption in captions:
        text = caption if isinstance(caption, str) else rng.choice(list(caption) or [""])
        if not isinstance(text, str):
            raise ValueError(f"A caption must be a string or a list of strings, got {caption!r}.")
        texts.append(text)
    return tokenizer(
        texts, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids


# Where a sample's image and caption lie: 29 bytes for each.
PLACE = np.dtype(
    [
        ("shard", "u4"),
        ("image", "i8"),
        ("image_bytes", "u4"),
        ("caption", "i8"),
        ("caption_bytes", "u4"),
        ("json", "?"),
    ]
)


class TarShards(Sequence):
    """WebDataset shards read in place: pictures and captions of `*.tar`, found by their offsets.

    `shards[i]` is `{"image": {"bytes": ...}, "text": caption}`, as `datasets` gives an undecoded row. With a
    `manifest.json` (as data.py writes it) the offsets are computed from it and checked against each tar's size;
    else every tar is walked once. Raises `UserError` for an empty, cut or missing tar.
    """

    def __init__(self, folder: Path, caption_column: str) -> None:
        self.caption_column = caption_column
        manifest = folder / "manifest.json"
        if manifest.is_file():
            content = json.loads(manifest.read_text(), object_hook=self._compact)
            if "shards" not in content:
                raise UserError(f"{manifest} is not one that data.py wrote: remove it to read all *.tar beside it.")
            if not content.get("complete", True):
                warnings.warn(f"{manifest} is of an unfinished download: training on what is there.", stacklevel=2)
            shards = content["shards"]
            self.paths = [folder / shard["name"] for shard in shards]
            tables = [self._from_manifest(path, shard) for path, shard in zip(self.paths, shards, strict=True)]
        else:
            self.paths = sorted(folder.glob("*.tar"))
            progress = tqdm(self.paths, desc="Indexing shards", unit="shard", disable=len(self.paths) < 10)
            tables = [self._from_tar(path) for path in progress]
        for number, table in enumerate(tables):
            table["shard"] = number
        self.places = np.concatenate([np.zeros(0, PLACE), *tables])

    @staticmethod
    def _compact(record: dict[str, Any]) -> dict[str, Any]:
        # As each shard's record is read: Python's own lists would take 80 bytes for every image of them all.
        return {key: np.array(value, "u4") if key.endswith("_bytes") else value for key, value in record.items()}

    @staticmethod
    def _from_manifest(path: Path, shard: Mapping[str, Any]) -> np.ndarray:
        # Members alternate image, caption; each is a header of 512 bytes and data padded to 512.
        sizes = np.stack([shard["image_bytes"], shard["caption_bytes"]], axis=1).astype(np.int64).reshape(-1)
        padded = (sizes + 511) // 512 * 512
        ends = np.cumsum(512 + padded)
        found = path.stat().st_size if path.is_file() else None
        if found != shard["bytes"] or (len(ends) and ends[-1] > found):
            raise UserError(f"{path} has {found} bytes where manifest.json says {shard['bytes']}: fetch it again.")
        starts = ends - padded
        table = np.zeros(len(sizes) // 2, PLACE)
        table["image"], table["caption"] = starts[::2], starts[1::2]
        table["image_bytes"], table["caption_bytes"] = sizes[::2], sizes[1::2]
        return table

    def _from_tar(self, path: Path) -> np.ndarray:
        rows: list[tuple[int, int, int, int, int, bool]] = []
        key, members = None, {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    tar.members = []  # tarfile would keep a kilobyte for every member
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    if (folder, stem) != key:
                        rows += self._sample(members)
                        key, members = (folder, stem), {}
                    members[f".{suffix.lower()}"] = (member.offset_data, member.size)
                rows += self._sample(members)
                tar.fileobj.seek(tar.offset)
                whole = tar.fileobj.read(512) == bytes(512)  # an archive ends in blocks of zeros
        except (tarfile.ReadError, EOFError) as error:
            raise UserError(f"{path} is empty or cut short ({error}): fetch it again or remove it.") from None
        if not whole:
            raise UserError(f"{path} is cut short (its end is missing): fetch it again or remove it.")
        return np.array(rows, PLACE)

    @staticmethod
    def _sample(members: Mapping[str, tuple[int, int]]) -> list[tuple[int, int, int, int, int, bool]]:
        images = [place for suffix, place in members.items() if suffix in IMAGE_SUFFIXES]
        captions = [(*members[suffix], suffix == ".json") for suffix in (".txt", ".json") if suffix in members]
        return [(0, *images[0], *captions[0])] if images and captions else []

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self.places[index]
        # Opened anew for each sample: nothing to share with workers and no limit on the number of shards.
        with open(self.paths[place["shard"]], "rb", buffering=0) as shard:
            image, caption = (self._read(shard, place[name], place[f"{name}_bytes"]) for name in ("image", "caption"))
        text: Any = caption.decode("utf-8", errors="replace")
        if place["json"]:
            try:
                record = json.loads(text)
            except ValueError:
                record = None
            text = record.get(self.caption_column, record.get("caption")) if isinstance(record, dict) else None
        return {"image": {"bytes": image}, "text": text}

    def select(self, indices: Sequence[int]) -> "TarShards":
        """Keep these samples only, in this order."""
        self.places = self.places[indices]
        return self

    @staticmethod
    def _read(shard: io.FileIO, offset: int, size: int) -> bytes:
        shard.seek(int(offset))
        return shard.read(int(size))


def prepare_example(
    example: Mapping[str, Any],
    columns: tuple[str, str],
    transform: Callable[[Image.Image], Tensor],
    tokenizer: CLIPTokenizer,
    proportion_empty_prompts: float | None,
    seed: int,
) -> dict[str, Any] | int:
    """One training example from an undecoded row, or the reason why it cannot be had (BROKEN_IMAGE, ...).

    `columns` names image and caption. The caption, its dropout, the crop and the flip follow from `seed` alone.
    Without a `proportion_empty_prompts` no caption is drawn: `input_ids` are those of all, (captions, tokens).
    """
    rng = random.Random(seed)
    try:
        source = example[columns[0]]
        if source["bytes"] is None:
            try:
                with xopen(source["path"], "rb") as file:  # a path may lie on the hub, or in a zip
                    source = {"bytes": file.read()}
            except OSError:
                return UNREADABLE
        image = decode_image(source["bytes"])
        longest = 16 * min(image.size)  # resizing a thin strip before it is cropped would take gigabytes
        if max(image.size) > longest:
            image = v2.functional.center_crop(image, [min(side, longest) for side in image.size[::-1]])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pixel_values = transform(image)
    except Exception:  # Pillow's plugins raise nearly anything on a broken file
        return BROKEN_IMAGE
    captions = example[columns[1]]
    captions = captions if isinstance(captions, (list, tuple)) else [captions]
    captions = [text for text in captions if isinstance(text, str) and text.strip()]
    captions = [text.encode("utf-8", "replace").decode() for text in captions]  # half a surrogate pair, from JSON
    if not captions:
        return EMPTY_CAPTION
    counts = torch.zeros(4, dtype=torch.int64)
    counts[ENLARGED] = min(image.size) < pixel_values.shape[-1]
    if proportion_empty_prompts is None:
        input_ids = tokenize_captions(captions, tokenizer, rng)
    else:
        drawn = [""] if rng.random() < proportion_empty_prompts else captions
        input_ids = tokenize_captions([drawn], tokenizer, rng)[0]
    return {"pixel_values": pixel_values, "input_ids": input_ids, "counts": counts}


class DistillationDataset(Dataset):
    """Map-style training data. `dataset[i]` is row i in file order, `dataset[(epoch, i)]` the same as of `epoch`.

    An example is what `prepare` makes of a row: `pixel_values` (3, H, W) in [-1, 1], `input_ids` (tokens,) and
    `counts` (see `collate_fn`). A row that is broken is replaced by the next good one in an order that follows from
    (seed, epoch, row); `UserError` is raised only where all are broken.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        columns: tuple[str, str],
        seed: int,
        prepare: Callable[..., dict[str, Any] | int] = prepare_example,
        **preparation: Any,
    ) -> None:
        self.rows = rows
        self.columns = columns
        self.seed = seed
        self.prepare = prepare
        self.preparation = preparation  # transform, tokenizer, proportion_empty_prompts

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not -len(self) <= index < len(self):
            raise IndexError(index)  # also what ends a plain `for example in dataset`
        counts = torch.zeros(4, dtype=torch.int64)
        for candidate in self._candidates(epoch, index):
            example = self.example(epoch, candidate)
            if not isinstance(example, int):
                example["counts"] += counts
                return example
            counts[example] += 1
        raise UserError(f"None of the {len(self)} training samples can be used: {describe_counts(counts)}.")

    def example(self, epoch: int, row: int) -> dict[str, Any] | int:
        """What `prepare` makes of this very row in `epoch`, or the reason why it cannot be used."""
        seed = derived_seed(self.seed, "sample", epoch, row)
        try:
            return self.prepare(self.rows[row], self.columns, seed=seed, **self.preparation)
        except OSError:  # a shard that vanished in mid-run
            return UNREADABLE

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        yield index
        rng = random.Random(derived_seed(self.seed, "replacement", epoch, index))
        size = len(self)
        stride = rng.randrange(1, size) if size > 1 else 1
        while math.gcd(stride, size) != 1:  # a stride without common divisor comes past every row
            stride = rng.randrange(1, size)
        yield from ((index + stride * step) % size for step in range(1, size))


class StreamingDataset(IterableDataset):
    """Training data read from the hub as it goes, without end: epoch follows epoch.

    The place of a row in the stream is its number. A broken row's place is taken by the next good one, so that
    `skip` counts rows and needs to decode none of them. Every process reads its own part of the stream, and every
    worker its own part of that.
    """

    def __init__(
        self, rows: datasets.IterableDataset, columns: tuple[str, str], seed: int, rank: int, **preparation: Any
    ) -> None:
        self.rows = rows
        self.columns = columns
        self.seed = seed
        self.rank = rank
        self.shuffled = False
        self.skip = 0  # rows that every worker reads past
        self.preparation = preparation

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        worker_id = worker.id if worker else 0
        to_skip, epoch = self.skip, 0
        counts = torch.zeros(4, dtype=torch.int64)
        vacant = 0  # places of broken rows, waiting for the next good one
        while True:
            order = derived_seed(self.seed, "order", epoch) % 2**32
            rows = self.rows.shuffle(seed=order) if self.shuffled else self.rows
            position = -1
            for position, row in enumerate(self._read(rows)):
                if to_skip > 0:
                    to_skip -= 1
                    continue
                seed = derived_seed(self.seed, "sample", epoch, position, self.rank, worker_id)
                example = prepare_example(row, self.columns, seed=seed, **self.preparation)
                if isinstance(example, int):
                    counts[example] += 1
                    vacant += 1
                    continue
                yield {**example, "counts": example["counts"] + counts}
                counts.zero_()
                for _ in range(vacant):
                    yield example
                vacant = 0
            if position < 0:
                raise UserError("The stream has fewer samples than there are processes and workers to share them.")
            if vacant > position:
                raise UserError(f"No sample of the stream can be used: {describe_counts(counts)}.")
            epoch += 1

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
        orders: dict[int, Tensor] = {}
        for micro_batch in itertools.count(self.first):
            start = (micro_batch * self.processes + self.rank) * self.batch_size
            batch = []
            for place in range(start, start + self.batch_size):
                epoch, offset = divmod(place, self.size)
                if epoch not in orders:
                    orders = {key: order for key, order in orders.items() if key == epoch - 1}
                    generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
                    orders[epoch] = torch.randperm(self.size, generator=generator)
                batch.append((epoch, int(orders[epoch][offset])))
            yield batch


def collate_fn(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A batch: `pixel_values` (B, 3, H, W) float32, `input_ids` (B, tokens), `counts` (4,) summed over the batch.

    With cached latents `latent_mean` and `latent_std` (B, C, h, w), float16, stand for `pixel_values`.

    `counts` are rows replaced for a broken image, for an empty caption, for a file that could not be read, and images
    enlarged. They travel with the batch so that they count what was trained on, whatever workers have read ahead.
    """
    batch = {name: torch.stack([example[name] for example in examples]).contiguous() for name in examples[0]}
    return {**batch, "counts": batch["counts"].sum(0)}


def data_fingerprint(dataset: DistillationDataset | StreamingDataset, args: argparse.Namespace, processes: int) -> str:
    """What tells whether a resumed run has the same samples in the same order, wherever they now lie.

    The number of samples with a digest of 256 of them, evenly spread, and of all sizes where those are at hand.
    """
    if isinstance(dataset, StreamingDataset):  # its order depends on who shares it
        source = " ".join(filter(None, (args.dataset_name, args.dataset_config_name)))
        shared = f"{processes} processes with {args.dataloader_num_workers} workers, {args.train_batch_size} at a time"
        return f"{source} for {shared}"
    digest = hashlib.blake2b(digest_size=8)
    for index in np.linspace(0, len(dataset) - 1, min(len(dataset), 256)).astype(int).tolist():
        row = dataset.rows[index]
        image, caption = (row[column] for column in dataset.columns)
        path = Path(image.get("path") or "") if image else Path()
        content = (image or {}).get("bytes") or (path.read_bytes() if path.is_file() else b"")
        digest.update(repr((path.name, hashlib.blake2b(content).digest(), caption)).encode())
    if isinstance(dataset.rows, TarShards):
        digest.update(dataset.rows.places[["image_bytes", "caption_bytes"]].tobytes())
    return f"{len(dataset)} samples ({digest.hexdigest()})"


def describe_counts(counts: Tensor) -> str:
    return (
        f"{counts[BROKEN_IMAGE]} with a broken image, {counts[EMPTY_CAPTION]} with an empty caption, "
        f"{counts[UNREADABLE]} that could not be read"
    )


def list_images(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def load_rows(args: argparse.Namespace) -> datasets.Dataset | datasets.IterableDataset:
    """The undecoded rows of a dataset or an image folder. Raises `UserError` where they cannot be had."""
    try:
        if args.dataset_name is not None:
            rows = datasets.load_dataset(
                args.dataset_name,
                args.dataset_config_name,
                split="train",
                cache_dir=args.cache_dir,
                streaming=args.streaming,
            )
        else:
            rows = datasets.load_dataset(
                "imagefolder", data_dir=args.train_data_dir, split="train", cache_dir=args.cache_dir
            )
        if rows.features is None:  # a stream of a format without a schema: its first rows tell
            rows = rows._resolve_features()
    except Exception as error:  # no network, no such dataset, no such split, files of mixed types, ...
        source = (
            f"--dataset_name {args.dataset_name}" if args.dataset_name else f"--train_data_dir {args.train_data_dir}"
        )
        hint = unless_local(args.train_data_dir or args.dataset_name)
        raise UserError(f"{source} cannot be read{hint}: {first_line(error)}") from error
    for flag in ("image_column", "caption_column"):
        if getattr(args, flag) not in rows.column_names:
            raise UserError(
                f"--{flag} {getattr(args, flag)} is not there; the columns are {', '.join(rows.column_names)}."
            )
    rows = rows.select_columns([args.image_column, args.caption_column])
    caption_type = rows.features[args.caption_column]
    texts = getattr(caption_type, "feature", caption_type)  # a list of strings, or a string
    if getattr(texts, "dtype", None) not in ("string", "large_string"):
        raise UserError(
            f"--caption_column {args.caption_column} holds {caption_type}; text or lists of it are needed."
        )
    try:
        return rows.cast_column(args.image_column, datasets.Image(decode=False))
    except Exception as error:
        raise UserError(
            f"--image_column {args.image_column} holds {rows.features[args.image_column]}; images are needed."
        ) from error


def make_train_dataset(
    args: argparse.Namespace, tokenizer: CLIPTokenizer, accelerator: Accelerator
) -> DistillationDataset | StreamingDataset:
    """The training data in file order (shuffling is the loader's). Raises `UserError` where it cannot be read."""
    if args.train_data_dir is not None and any(Path(args.train_data_dir).glob("*.tar")):
        rows, columns = TarShards(Path(args.train_data_dir), args.caption_column), ("image", "text")
    else:
        with accelerator.main_process_first():  # the others find the first one's cache
            rows, columns = load_rows(args), (args.image_column, args.caption_column)
    preparation = {
        "transform": image_transforms(
            args.resolution, args.center_crop, args.random_flip, args.image_interpolation_mode
        ),
        "tokenizer": tokenizer,
        "proportion_empty_prompts": args.proportion_empty_prompts,
    }
    if isinstance(rows, datasets.IterableDataset):
        if args.max_train_samples is not None:
            rows = rows.take(args.max_train_samples)
        rows = split_dataset_by_node(rows, accelerator.process_index, accelerator.num_processes)
        return StreamingDataset(rows, columns, args.seed, accelerator.process_index, **preparation)
    if len(rows) == 0:
        raise UserError(f"{args.train_data_dir or args.dataset_name} holds no image with a caption.")
    if args.max_train_samples is not None and args.max_train_samples < len(rows):
        chosen = random.Random(args.seed).sample(range(len(rows)), args.max_train_samples)
        rows = rows.select(chosen)
    return DistillationDataset(rows, columns, args.seed, **preparation)


def make_dataloader(
    dataset: DistillationDataset | StreamingDataset, args: argparse.Namespace, accelerator: Accelerator, first: int
) -> Iterator[dict[str, Tensor]]:
    """Endless shuffled micro-batches of this process, from micro-batch number `first` (per process) on."""
    workers, discard = args.dataloader_num_workers, 0
    if isinstance(dataset, StreamingDataset):
        workers = min(workers, dataset.rows.num_shards)  # a worker without a shard would wait for ever
        dataset.shuffled = True
        rounds, discard = divmod(first, max(workers, 1))  # workers take turns, batch by batch
        dataset.skip = rounds * args.train_batch_size
        order: dict[str, Any] = {"batch_size": args.train_batch_size}
    else:
        order = {
            "batch_sampler": SeededBatches(
                len(dataset),
                args.train_batch_size,
                args.seed,
                accelerator.process_index,
                accelerator.num_processes,
                first,
            )
        }
    loader = DataLoader(
        dataset,
        collate_fn=collate_fn,
        num_workers=workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=ignore_signals,
        **order,
    )
    with closing(batches_of(loader)) as batches:
        for _ in range(discard):
            next(batches)
        yield from batches


def batches_of(loader: DataLoader) -> Iterator[Any]:
    """What `loader` yields. Its workers end when this generator does, by exhaustion, an error or `close`."""
    iterator = iter(loader)
    try:
        yield from iterator
    finally:
        # Workers ignore signals: those that an error's traceback keeps would be waited for at exit, for ever.
        if loader.num_workers > 0:
            iterator._shutdown_workers()


def ignore_signals(_worker: int) -> None:
    """What asks a process group to stop reaches the workers too, whose batches the last step still needs."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ----------------------------------------------------------------------------------------------------------------
# Models. Only the student is trained, prepared and checkpointed; all others are frozen and cast.


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_component(component: type, source: str, flag: str, args: argparse.Namespace, **kwargs: Any) -> Any:
    """`component.from_pretrained(source)` in float32. Raises `UserError` naming `flag` where that fails.

    The dtype is explicit since transformers otherwise keeps the file's; missing tensors are an error since diffusers
    otherwise goes on with a warning. Weights are read from safetensors only: loading a pickle can run any code.
    """
    is_teacher_source = source == args.pretrained_model_name_or_path
    kwargs |= {"revision": args.revision} if is_teacher_source else {}
    if is_teacher_source and issubclass(component, (nn.Module, DiffusionPipeline)):
        kwargs |= {"variant": args.variant}
    if issubclass(component, (nn.Module, DiffusionPipeline)):
        kwargs |= {"use_safetensors": True}
    if issubclass(component, nn.Module):
        kwargs |= {"dtype": torch.float32, "output_loading_info": True}
    try:
        loaded = component.from_pretrained(source, cache_dir=args.cache_dir, **kwargs)
    except Exception as error:  # absent, not reachable, cut short, of another class, ...
        where = f"{source} ({kwargs['subfolder']})" if kwargs.get("subfolder") else source
        message = f"--{flag} {where} cannot be loaded{unless_local(source)}: {first_line(error)}"
        if re.search(r"no file named .*\.safetensors|use_safetensors|does not appear to have a file named", message):
            message += (
                ". Only safetensors are read; if it has .bin weights and you trust them, convert them once: "
                f"python -c \"import diffusers; diffusers.DiffusionPipeline.from_pretrained('{source}')"
                ".save_pretrained('converted')\""
            )
        raise UserError(message) from error
    if not issubclass(component, nn.Module):
        return loaded
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(
            f"--{flag} {source}: {len(info['missing_keys'])} tensors are missing from its {component.__name__}."
        )
    return model


def load_config(component: type, source: str, flag: str, args: argparse.Namespace, **kwargs: Any) -> dict[str, Any]:
    """A component's config alone. Raises `UserError` naming `flag` where it cannot be had."""
    revision = args.revision if source == args.pretrained_model_name_or_path else None
    try:
        return component.load_config(source, revision=revision, cache_dir=args.cache_dir, **kwargs)
    except Exception as error:
        raise UserError(f"--{flag} {source} cannot be loaded{unless_local(source)}: {first_line(error)}") from error


def unless_local(source: str) -> str:
    return "" if Path(source).exists() else " (it is no folder here, and the hub does not have it or is out of reach)"


def check_teacher(args: argparse.Namespace) -> dict[str, Any]:
    """The teacher's U-Net config. Raises `UserError` where configs alone show that it cannot be distilled."""
    source, flag = args.pretrained_model_name_or_path, "pretrained_model_name_or_path"
    pipeline_class = load_config(DiffusionPipeline, source, flag, args).get("_class_name")
    if pipeline_class != StableDiffusionPipeline.__name__:
        raise UserError(f"--{flag} {source} is a {pipeline_class}; a {StableDiffusionPipeline.__name__} is needed.")
    unet_config = load_config(UNet2DConditionModel, source, flag, args, subfolder="unet")
    vae_config = load_config(AutoencoderKL, source, flag, args, subfolder="vae")
    check_prunable(unet_config)
    in_channels, latent_channels = unet_config.get("in_channels", 4), vae_config.get("latent_channels", 4)
    if in_channels != latent_channels:
        raise UserError(
            f"The teacher's U-Net takes {in_channels} channels where its VAE gives {latent_channels}: an inpainting "
            "or depth model cannot be distilled by this script."
        )
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    if args.resolution % factor:
        raise UserError(f"--resolution must be a multiple of {factor}, the VAE's factor, got {args.resolution}.")
    return unet_config


def weights_hash(model: nn.Module) -> str:
    """Digest of all names and values, to tell whether a model is still the one that a run began with."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_features(taps: Sequence[tuple[nn.Module, FeatureTap]]) -> None:
    """Run each U-Net once on noise: raise `UserError` for features that are not finite, warn of constant ones."""
    generator = torch.Generator().manual_seed(0)
    for model, tap in taps:
        parameter, config = next(model.parameters()), model.config
        side = 2 ** len(config.block_out_channels)
        sample = torch.randn(1, config.in_channels, side, side, generator=generator).to(parameter)
        text = torch.randn(1, 8, config.cross_attention_dim, generator=generator).to(parameter)
        with torch.no_grad():
            model(sample, 500, text)
        for name, feature in zip(tap.names, tap.pop(), strict=True):
            spread = feature.float().std()
            if not spread.isfinite():
                raise UserError(f"{name} of a U-Net puts out numbers that are not finite: are its weights whole?")
            if spread == 0:
                logger.warning(f"{name} of a U-Net puts out a constant: its feature loss teaches nothing.")


def freeze(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return model.requires_grad_(False).eval().to(device, dtype=dtype)


# ----------------------------------------------------------------------------------------------------------------
# Latents cache: of every image the mean and the standard deviation of its latents, in half precision (the least
# deviation of a VAE, exp(-15), is not yet zero there), and the token ids of its captions. Its folder is named by a
# digest of all that it follows from, so that a cache of anything else is never read.

LATENTS_PER_SHARD = 512  # 32 MiB at 512 pixels; no more than this is encoded again after a kill
USABLE = -1  # in the place of BROKEN_IMAGE and its like


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of images (B, 3, H, W): (B, C, h, w) each, float32."""
    pixel_values = pixel_values.to(vae.device, dtype=vae.dtype, non_blocking=True)
    posterior = DiagonalGaussianDistribution(vae.encode(pixel_values).latent_dist.parameters.float())
    return posterior.mean.contiguous(), posterior.std.contiguous()  # as they come out of the cache


class LatentShards(Sequence):
    """The rows of a cache, in files `00000.npy`, ... of LATENTS_PER_SHARD records (see `record_type`) each.

    Files are memory-mapped for one row at a time: workers share a path and no more, whatever the number of images.
    Raises `OSError` for a row whose file is gone or cut short.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> np.void:
        shard, row = divmod(index % self.size, LATENTS_PER_SHARD)
        return self._open(shard)[row]

    def _open(self, shard: int) -> np.memmap:
        try:
            records = np.load(self.path(shard), mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise OSError(f"{self.path(shard)} is cut short: {error}") from None
        if len(records) != len(self.rows(shard)):
            raise OSError(f"{self.path(shard)} has {len(records)} rows instead of {len(self.rows(shard))}.")
        return records

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.npy"

    def rows(self, shard: int) -> range:
        """Numbers of the rows that this shard holds."""
        return range(shard * LATENTS_PER_SHARD, min((shard + 1) * LATENTS_PER_SHARD, self.size))

    def missing(self) -> list[int]:
        """The shards that are not there, or not whole."""
        missing = []
        for shard in range(math.ceil(self.size / LATENTS_PER_SHARD)):
            try:
                self._open(shard)
            except OSError:
                missing.append(shard)
        return missing

    def write(self, shard: int, rows: Sequence[tuple[np.ndarray, bool, np.ndarray] | int], record: np.dtype) -> None:
        """Keep a shard: of each row token ids (captions, tokens), whether it was enlarged and latents, or the reason
        why it has none. Raises `TrainingError` where the disk does not take it.
        """
        records = np.zeros(len(rows), record)
        for entry, row in zip(records, rows, strict=True):
            if isinstance(row, int):
                entry["reason"] = row
            else:
                entry["reason"], entry["captions"] = USABLE, len(row[0])
                entry["input_ids"][: len(row[0])], entry["enlarged"], entry["latents"] = row
        partial = self.folder / f".{shard:05d}.npy.partial"
        try:
            with open(partial, "wb") as file:
                np.save(file, records, allow_pickle=False)
            put_in_place(partial, self.path(shard))
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise TrainingError(
                f"{self.path(shard)} cannot be written ({first_line(error)}): make room, and the same command goes "
                "on with what is cached by now; or choose another --latents_cache_dir."
            ) from error


def record_type(args: argparse.Namespace, vae: AutoencoderKL, tokenizer: CLIPTokenizer, captions: int) -> np.dtype:
    """What a shard holds of a row, if none of its rows has more than this many captions."""
    side = args.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    return np.dtype(
        [
            ("reason", "i1"),
            ("enlarged", "?"),
            ("captions", "u4"),
            ("input_ids", "u2" if len(tokenizer) <= 2**16 else "i4", (captions, tokenizer.model_max_length)),
            # As it is and, with --random_flip, mirrored; of each the mean and the standard deviation.
            ("latents", "f2", (1 + args.random_flip, 2, vae.config.latent_channels, side, side)),
        ]
    )


def cached_example(
    record: np.void, columns: tuple[str, str], empty_ids: Tensor, proportion_empty_prompts: float, seed: int
) -> dict[str, Any] | int:
    """`prepare_example` of a record: `latent_mean` and `latent_std` for the pixels, the same draws from `seed`."""
    if record["reason"] != USABLE:
        return int(record["reason"])
    variants, captions = record[columns[0]], record[columns[1]][: record["captions"]]
    # As RandomHorizontalFlip draws it: with a crop in the centre the same images are mirrored as without a cache.
    mirrored = len(variants) > 1 and torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() < 0.5
    mean, std = torch.from_numpy(np.array(variants[int(mirrored)]))
    rng = random.Random(seed)
    empty = rng.random() < proportion_empty_prompts
    input_ids = empty_ids if empty else torch.from_numpy(rng.choice(captions).astype(np.int64))
    counts = torch.zeros(4, dtype=torch.int64)
    counts[ENLARGED] = int(record["enlarged"])
    return {"latent_mean": mean, "latent_std": std, "input_ids": input_ids, "counts": counts}


def cache_settings(dataset: DistillationDataset, vae: AutoencoderKL, args: argparse.Namespace) -> dict[str, Any]:
    """All that the content of a cache follows from."""
    tokenizer, rows = dataset.preparation["tokenizer"], dataset.rows
    if isinstance(rows, TarShards):
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in rows.paths]
        data = hashlib.blake2b(repr((files, rows.caption_column)).encode() + rows.places.tobytes()).hexdigest()
    else:
        data = rows._fingerprint
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}  # left by calls
    state = repr((state, tokenizer.model_max_length, tokenizer.pad_token_id))
    return {
        "about": "Encoded images and captions, kept by --cache_latents. May be deleted: they are then made again.",
        "format": 1,
        "rows_per_shard": LATENTS_PER_SHARD,
        "vae": weights_hash(vae),
        "vae_config": public_config(vae.config),
        "dtype": str(vae.dtype),
        **{name: getattr(args, name) for name in ("resolution", "image_interpolation_mode", "random_flip")},
        "crop": "in the centre" if args.center_crop else f"at random, by seed {args.seed}",
        "tokenizer": hashlib.blake2b(state.encode()).hexdigest(),
        "images": len(dataset),
        "data": data,
    }


class RawRows(Dataset):
    """The rows of a `DistillationDataset` with a fixed crop and all captions, broken ones not replaced."""

    def __init__(self, dataset: DistillationDataset, args: argparse.Namespace) -> None:
        transform = image_transforms(args.resolution, args.center_crop, False, args.image_interpolation_mode)
        preparation = {**dataset.preparation, "transform": transform, "proportion_empty_prompts": None}
        self.dataset = DistillationDataset(dataset.rows, dataset.columns, dataset.seed, **preparation)

    def __getitem__(self, row: int) -> dict[str, Any] | int:
        return self.dataset.example(0, row)  # the crop is that of epoch 0


def collate_rows(examples: Sequence[dict[str, Any] | int]) -> tuple[list[Tensor], list[tuple[np.ndarray, bool] | int]]:
    """The usable rows' images as one batch, [(usable, 3, H, W)] or []; and of every row what is kept beside it."""
    usable = [example for example in examples if not isinstance(example, int)]
    images = [torch.stack([example["pixel_values"] for example in usable]).contiguous()] if usable else []
    return images, [
        example if isinstance(example, int) else (example["input_ids"].numpy(), bool(example["counts"][ENLARGED]))
        for example in examples
    ]


def encode_variants(vae: AutoencoderKL, pixel_values: Tensor, args: argparse.Namespace) -> Tensor:
    """Mean and deviation of images (B, 3, H, W) and their mirrorings: (B or more, variants, 2, C, h, w), float16."""
    pixel_values = pixel_values.to(vae.device, non_blocking=True)
    if args.compile:  # one shape: rows that cannot be used would have the encoder compiled anew
        pixel_values = F.pad(pixel_values, (0, 0) * 3 + (0, args.train_batch_size - len(pixel_values)))
    variants = [pixel_values, pixel_values.flip(-1)][: 1 + args.random_flip]
    return torch.stack([torch.stack(encode_images(vae, variant), 1) for variant in variants], 1).half()


def encode_shards(
    shards: LatentShards,
    numbers: Sequence[int],
    dataset: DistillationDataset,
    vae: AutoencoderKL,
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> None:
    """Make these shards. A batch ends with its shard, so that it does not matter which process makes which."""
    places = [shards.rows(number) for number in numbers]
    size = args.train_batch_size
    loader = DataLoader(
        RawRows(dataset, args),
        batch_sampler=(rows[start : start + size] for rows in places for start in range(0, len(rows), size)),
        collate_fn=collate_rows,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    progress = tqdm(
        total=sum(map(len, places)), desc="Encoding", unit=" images", disable=not accelerator.is_main_process
    )
    with closing(batches_of(loader)) as batches, closing(progress):
        for number, wanted in zip(numbers, places, strict=True):
            encoded: list[tuple[np.ndarray, bool, np.ndarray] | int] = []
            while len(encoded) < len(wanted):
                images, rows = next(batches)
                batch = wanted[len(encoded) : len(encoded) + len(rows)]
                if UNREADABLE in rows:  # it may be back tomorrow: nothing to be kept for good
                    raise TrainingError(
                        f"Sample {batch[rows.index(UNREADABLE)]} cannot be read (its file is gone or out of reach): "
                        "put that right, then the same command goes on."
                    )
                moments = encode_variants(vae, images[0], args) if images else torch.zeros(0)
                if not moments.isfinite().all():
                    raise TrainingError(
                        f"Latents of an image among samples {batch[0]} to {batch[-1]} are not finite in {vae.dtype} "
                        "or float16."
                    )
                latents = iter(moments.cpu().numpy())
                encoded += [row if isinstance(row, int) else (*row, next(latents)) for row in rows]
                progress.update(len(rows))
            captions = max((len(row[0]) for row in encoded if not isinstance(row, int)), default=1)
            shards.write(number, encoded, record_type(args, vae, dataset.preparation["tokenizer"], captions))


def lock_cache(folder: Path) -> AbstractContextManager[Any]:
    """Two runs may well begin on one cache: the later one waits for the other."""
    lock = FileLock(folder / ".lock", fallback_to_soft=False)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        logger.info(f"Waiting for another run, which is encoding into {folder}")
        return lock.acquire()
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({first_line(error)}): let no other run encode into it.")
        return nullcontext()


def complete_cache(
    shards: LatentShards,
    dataset: DistillationDataset,
    vae: AutoencoderKL,
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> None:
    """Make the shards that are missing, each process its part. Raises as `cache_latents` does."""
    folder, known = shards.folder, [[], 0]
    if accelerator.is_main_process:
        known = [shards.missing(), shutil.disk_usage(folder).free]
    missing, free = broadcast_object_list(known)
    if not missing:
        return
    images = sum(len(shards.rows(number)) for number in missing)
    needed = images * record_type(args, vae, dataset.preparation["tokenizer"], 1).itemsize
    if needed > free:
        raise UserError(
            f"--cache_latents needs {tqdm.format_sizeof(needed, 'B')} in {folder} for {images:,} images, where "
            f"{tqdm.format_sizeof(free, 'B')} are free: make room or choose another --latents_cache_dir."
        )
    size = tqdm.format_sizeof(needed, "B")
    logger.info(f"Encoding {images:,} of {len(dataset):,} images into {folder}, which will take {size}")
    mine, started = missing[accelerator.process_index :: accelerator.num_processes], time.perf_counter()
    encode_shards(shards, mine, dataset, vae, args, accelerator)
    accelerator.wait_for_everyone()
    seconds = time.perf_counter() - started
    logger.info(f"Encoded {images:,} images in {seconds:.0f} s, {images / seconds:.1f} images per second")


def cache_latents(
    dataset: DistillationDataset, vae: AutoencoderKL, args: argparse.Namespace, accelerator: Accelerator
) -> DistillationDataset:
    """The same samples with `latent_mean` and `latent_std` for `pixel_values`, read from their cache.

    Where it is not whole, all processes make what is missing first; to be called by each. Raises `UserError` where
    there is no room for it, and `TrainingError` where it cannot be written.
    """
    settings, tokenizer = cache_settings(dataset, vae, args), dataset.preparation["tokenizer"]
    key = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
    folder = Path(args.latents_cache_dir or f"{Path(args.output_dir).resolve()}-latents") / key
    shards = LatentShards(folder, len(dataset))
    # The main process alone looks before anything is made: a network's file system remembers what was not there.
    if broadcast_object_list([accelerator.is_main_process and bool(shards.missing())])[0]:
        if accelerator.is_main_process:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "settings.json").write_text(json.dumps(settings, indent=2))
            except OSError as error:
                raise UserError(f"--latents_cache_dir: {folder} cannot be made ({first_line(error)}).") from error
        with lock_cache(folder) if accelerator.is_main_process else nullcontext():
            complete_cache(shards, dataset, vae, args, accelerator)
    if any_process(accelerator, bool(shards.missing())):
        raise TrainingError(f"{folder} is not whole everywhere: all machines must share it (--latents_cache_dir).")
    empty_ids = tokenize_captions([""], tokenizer, random.Random())[0]
    draws = {"empty_ids": empty_ids, "proportion_empty_prompts": args.proportion_empty_prompts}
    return DistillationDataset(shards, ("latents", "input_ids"), args.seed, prepare=cached_example, **draws)


# ----------------------------------------------------------------------------------------------------------------
# The training step.


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class PicturesInterrupted(BaseException):
    """A signal came while validation pictures were made, which nothing is lost by giving up."""


@dataclass
class StepHealth:
    """What all processes agree on at every optimiser step: whether it was sound, and whether to stop."""

    bad: bool = False  # the last step's loss or gradient norm was not finite
    bad_in_a_row: int = 0
    skipped_steps: int = 0
    stop_signal: int = 0  # that some process was sent; 0 for none
    received: int = 0  # of that, what this very process was sent
    making_pictures: bool = False
    last_checkpoint: Path | None = None
    last_good_checkpoint: Path | None = None  # one whose next step was sound

    def agree(self, accelerator: Accelerator, loss: Tensor, grad_norm: Tensor) -> bool:
        """Whether to take the step. To be called by every process; reads one small tensor from the device."""
        bad = (~torch.stack([loss.float(), grad_norm.float()]).isfinite()).float()
        asked = [bad.new_full((1,), self.received == number) for number in STOP_SIGNALS]  # a copy would be waited for
        flags = accelerator.reduce(torch.cat([bad, *asked])).tolist()
        loss_is_bad, norm_is_bad, *asked = (flag > 0 for flag in flags)
        # With fp16 a gradient norm that overflows is the loss scaler's business, as long as it has a way down.
        scaler = accelerator.scaler
        self.bad = loss_is_bad or (norm_is_bad and (scaler is None or scaler.get_scale() < 1))
        self.bad_in_a_row = self.bad_in_a_row + 1 if self.bad else 0
        self.skipped_steps += self.bad
        self.stop_signal = next((int(number) for number, flag in zip(STOP_SIGNALS, asked, strict=True) if flag), 0)
        sound = not (loss_is_bad or norm_is_bad)
        if sound:
            self.last_good_checkpoint = self.last_checkpoint
        return sound

    def goes_on(self) -> str:
        """Where to go on from, for messages."""
        good = self.last_good_checkpoint if self.bad_in_a_row else self.last_checkpoint
        return f"the last good checkpoint is {good}" if good else "there is no good checkpoint yet"


@contextmanager
def stop_signals(health: StepHealth) -> Iterator[None]:
    """Take SIGTERM and SIGINT as the wish to save and stop after this step; the second one stops at once."""
    # Where a whole group is signalled, systemd and torchrun send their processes the same signal once more.
    same_for = 5.0 if "TORCHELASTIC_RUN_ID" in os.environ else 1.0
    first = math.inf

    def note(number: int, _frame: Any) -> None:
        nonlocal first
        first = min(first, time.monotonic())
        if health.received and number == signal.SIGTERM and time.monotonic() - first < same_for:
            return
        if health.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        health.received = number
        if health.making_pictures:
            raise PicturesInterrupted

    previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass
class Distillation:
    """All that a training step works with. `teacher_unet` and the taps are None where no loss term needs them."""

    args: argparse.Namespace
    accelerator: Accelerator
    weight_dtype: torch.dtype
    noise_scheduler: DDPMScheduler
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    teacher_unet: UNet2DConditionModel | None
    unet: nn.Module  # the student, prepared
    student_tap: FeatureTap | None
    teacher_tap: FeatureTap | None
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    ema_unet: EMAModel | None
    settings: Mapping[str, Any] = field(default_factory=dict)  # what decides the weights, see `run_settings`
    health: StepHealth = field(default_factory=StepHealth)
    window_loss: Tensor | float = 0.0  # summed over the micro-batches of this optimiser step
    accumulation_flag: int = 1  # --gradient_accumulation_steps as given, see `keep_total_batch`
    compiled_loss: Callable | None = None  # `distillation_loss`, with --compile

    def metric_names(self) -> list[str]:
        """Names of what `training_step` returns, in its order."""
        pairs = feature_pairs(self.args.distill_level) if self.student_tap else []
        return ["loss", "task_loss", "output_loss", "feature_loss"] + [f"feature_loss/{t}-{s}" for t, s in pairs]


def training_step(run: Distillation, batch: Mapping[str, Tensor], micro_batch: int) -> tuple[Tensor, Tensor | None]:
    """Forward and backward of one micro-batch, and the optimiser's step where the accumulation is complete.

    `batch` is `collate_fn`'s; `micro_batch` counts from the run's start, and with the seed and the rank it decides
    all noise. Returns the unweighted terms (see `Distillation.metric_names`) and the gradient norm before clipping
    (None between optimiser steps), both left on the device. Where a loss or the norm is not finite on any process,
    weights, optimiser and EMA stay as they were on all of them, and `run.health` says so.
    """
    args, accelerator, noise_scheduler = run.args, run.accelerator, run.noise_scheduler
    device = accelerator.device
    seed = derived_seed(args.seed, "noise", micro_batch, accelerator.process_index)
    generator = torch.Generator(device).manual_seed(seed)
    with accelerator.accumulate(run.unet):
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
            input_noise = noise + args.input_perturbation * torch.randn(
                noise.shape, generator=generator, device=device
            )
        steps = noise_scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, latents.shape[:1], generator=generator, device=device)
        noisy_latents = noise_scheduler.add_noise(latents, input_noise, timesteps)
        target = prediction_target(noise_scheduler, latents, noise, timesteps)
        # 3. Text.
        with torch.no_grad():
            encoder_hidden_states = run.text_encoder(batch["input_ids"].to(device, non_blocking=True))[0]
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
        losses = (run.compiled_loss or distillation_loss)(
            student_pred,
            teacher_pred,
            target,
            run.student_tap.pop() if run.student_tap else [],
            run.teacher_tap.pop() if run.teacher_tap else [],
            output_weight=args.output_weight,
            feature_weight=args.feature_weight,
        )
        # 7. Backward, and a step of the optimiser once every gradient_accumulation_steps.
        accelerator.backward(losses["loss"])
        run.window_loss = run.window_loss + losses["loss"].detach()
        grad_norm = None
        if accelerator.sync_gradients:
            grad_norm = accelerator.clip_grad_norm_(run.unet.parameters(), args.max_grad_norm)
            sound = run.health.agree(accelerator, run.window_loss, grad_norm)
            run.window_loss = 0.0
            if sound or accelerator.scaler is not None:  # the scaler skips by itself, and must see why
                run.optimizer.step()
            run.lr_scheduler.step()
            run.optimizer.zero_grad(set_to_none=True)  # before the average, which takes the memory that this frees
            if sound and run.ema_unet is not None:
                update_ema(run.ema_unet, run.unet)
    scalars = torch.stack([losses[name] for name in ("loss", "task_loss", "output_loss", "feature_loss")])
    return torch.cat([scalars, losses["feature_losses"]]).detach(), grad_norm


@torch.no_grad()
def update_ema(ema_unet: EMAModel, unet: nn.Module) -> None:
    """One step of the moving average. An average in the host's (pinned) memory is updated on the device and put back.

    What is put back is not there before the device is synchronised.
    """
    kept = ema_unet.shadow_params
    ema_unet.shadow_params = [
        shadow.to(parameter.device, non_blocking=True)
        for shadow, parameter in zip(kept, unet.parameters(), strict=True)
    ]
    ema_unet.step(unet.parameters())
    for shadow, updated in zip(kept, ema_unet.shadow_params, strict=True):
        if shadow is not updated:
            shadow.copy_(updated, non_blocking=True)
    ema_unet.shadow_params = kept


class MetricLog:
    """Metrics of every optimiser step, kept on the device and fetched together, so that no step waits for them."""

    def __init__(self, accelerator: Accelerator, names: Sequence[str]) -> None:
        self.accelerator = accelerator
        self.names = [*names, "grad_norm"]
        self.last: dict[str, float] = {}
        self._pending: list[tuple[int, float, Tensor]] = []
        self._tracks = True  # a tracker that failed does not come back: TensorBoard's writer is dead after a full disk

    def add(self, step: int, learning_rate: float, terms: Tensor, grad_norm: Tensor) -> None:
        """Keep the terms (len(names) - 1,) of optimiser step `step`, averaged over its micro-batches already."""
        grad_norm = torch.as_tensor(grad_norm, dtype=terms.dtype, device=terms.device)
        self._pending.append((step, learning_rate, torch.cat([terms, grad_norm.reshape(1)])))

    def write(self) -> dict[str, float]:
        """Average over processes, hand every kept step to the trackers under its number, return the last one.

        To be called by every process.
        """
        if not self._pending:
            return self.last
        values = self.accelerator.reduce(torch.stack([terms for _, _, terms in self._pending]), reduction="mean")
        for (step, learning_rate, _), row in zip(self._pending, values.cpu().tolist(), strict=True):
            self.last = dict(zip(self.names, row, strict=True)) | {"lr": learning_rate}
            if self._tracks:
                with survives(f"Logging step {step}, and with it all that follow,"):
                    self._tracks = False
                    self.accelerator.log(self.last, step=step)
                    self._tracks = True
        self._pending.clear()
        return self.last


@contextmanager
def survives(what: str) -> Iterator[None]:
    """What a run can do without must not end it: a full disk, or a tracker that is out of reach."""
    try:
        yield
    except Exception as error:
        logger.warning(f"{what} failed ({first_line(error)}): the run goes on.")


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints: student, EMA, optimiser, schedule, and the random state of every process.


CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
LEFTOVER_NAME = re.compile(r"\.checkpoint-\d+\.(partial|removed)")
STATE_FILE = "trainer_state.json"

# What may differ between a run and its continuation: it changes no sample, no loss and no update; or, as for data,
# teacher and batch size, its effect is compared instead. All other flags must stay, new ones too unless listed here.
FREE_SETTINGS = frozenset(
    (
        "pretrained_model_name_or_path", "revision", "variant", "student_model_name_or_path", "cache_dir",
        "dataset_name", "dataset_config_name", "train_data_dir", "image_column", "caption_column", "max_train_samples",
        "dataloader_num_workers", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
        "max_train_steps", "offload_ema", "foreach_ema", "gradient_checkpointing", "mixed_precision", "allow_tf32",
        "compile", "latents_cache_dir", "local_rank", "max_bad_steps", "output_dir", "logging_dir", "logging_steps",
        "report_to", "tracker_project_name", "validation_prompts", "validation_steps", "num_validation_images",
        "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "allow_changed_settings",
        "push_to_hub", "hub_token", "hub_model_id",
    )
)  # fmt: skip
FIXED_SETTINGS = ("distill_level", "use_8bit_adam")  # what a checkpoint holds has no other shape


def is_cut(checkpoint: Path) -> bool:
    """Whether a file that the checkpoint's `trainer_state.json` lists is absent or has another size."""
    try:
        files = json.loads((checkpoint / STATE_FILE).read_text()).get("files", {})
        return any((checkpoint / name).stat().st_size != size for name, size in files.items())
    except (OSError, ValueError, AttributeError):
        return any(checkpoint.iterdir())


def list_checkpoints(output_dir: Path, cut_too: bool = False) -> list[Path]:
    """The whole checkpoints `checkpoint-N` in `output_dir`, by rising N; whatever else lies there is ignored."""
    found = [(CHECKPOINT_NAME.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    folders = sorted((int(match[1]), path) for match, path in found if match and path.is_dir())
    whole = [path for _, path in folders if cut_too or not is_cut(path)]
    return [path for path in whole if any(path.iterdir())] or whole  # an empty one is the last that could be meant


def find_checkpoint(output_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: None for none, or for `latest` where there is none.

    A name is looked for in `output_dir`, then as a path. Raises `FileNotFoundError`, with the list of those that are
    there, where it is absent or cut short.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume is None:
        return None
    if resume == "latest":
        return checkpoints[-1] if checkpoints else None
    problem = "does not exist"
    for path in (Path(output_dir) / resume, Path(resume)):
        if path.is_dir() and CHECKPOINT_NAME.fullmatch(path.name):
            if not is_cut(path):
                return path
            problem = "is cut short (a file is missing or has another size)"
    there = ", ".join(path.name for path in checkpoints) or "none"
    raise FileNotFoundError(
        f"--resume_from_checkpoint {resume} {problem}; the checkpoints in {output_dir} are: {there}."
    )


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
        if LEFTOVER_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            if (path / STATE_FILE).is_file() or not any(path.iterdir()):
                remove_checkpoint(path)


def prune_checkpoints(output_dir: Path, keep: int, newest: int | None = None) -> list[Path]:
    """Delete all but the newest `keep` checkpoints, of those up to step `newest`; returns the deleted ones."""
    checkpoints = [
        path
        for path in list_checkpoints(output_dir)
        if newest is None or int(CHECKPOINT_NAME.fullmatch(path.name)[1]) <= newest
    ]
    surplus = checkpoints[: max(len(checkpoints) - keep, 0)]
    for path in surplus:
        remove_checkpoint(path)
    return surplus


def put_in_place(new: Path, path: Path, old: Path | None = None) -> None:
    """Rename a finished `new` to `path` once all of it is on the disk, whatever happens to the machine then.

    What was at `path` is renamed to `old`; a file needs none, and is replaced.
    """
    for entry in [*new.rglob("*"), new]:
        _sync(entry)
    if old is not None and path.exists():
        path.rename(old)
    try:
        new.replace(path)
    except OSError:
        if old is not None and old.exists():
            old.rename(path)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
                    torch.cuda.synchronize()  # an offloaded average may be on its way, see `update_ema`
                ema_unet.save_pretrained(Path(output_dir) / "unet_ema")
        weights.clear()  # accelerate then writes no copy of its own

    @torch.no_grad()  # else the average would remember that it was copied, and every copy after that
    def load(models: list[nn.Module], input_dir: str) -> None:
        student = UNet2DConditionModel.from_pretrained(input_dir, subfolder="unet", use_safetensors=True)
        accelerator.unwrap_model(models.pop(), keep_torch_compile=False).load_state_dict(
            student.state_dict(), strict=True
        )
        if ema_unet is None:
            return
        average = student
        if (Path(input_dir) / "unet_ema").is_dir():  # else --use_ema is new (--allow_changed_settings)
            average = UNet2DConditionModel.from_pretrained(input_dir, subfolder="unet_ema", use_safetensors=True)
            ema_unet.optimization_step = average.config["optimization_step"]
        for shadow, parameter in zip(ema_unet.shadow_params, average.parameters(), strict=True):
            shadow.copy_(parameter)

    return save, load


def run_settings(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """What the flags decide about the weights that come out; a checkpoint keeps it, with data and teacher."""
    settings = {name: value for name, value in public_args(args).items() if name not in FREE_SETTINGS}
    return settings | {
        "mixed_precision": accelerator.mixed_precision,
        "images per optimiser step": total_batch_size(args, accelerator),
    }


def check_unchanged(
    checkpoint: Path, saved: Mapping[str, Any], settings: Mapping[str, Any], args: argparse.Namespace
) -> None:
    """Raise `UserError` naming all of `settings` that differ from `saved`, or warn with --allow_changed_settings."""
    # Through JSON and back, as what is compared with: tuples become lists.
    settings = json.loads(json.dumps(settings))
    changed = [name for name in settings if name in saved and saved[name] != settings[name]]
    if not changed:
        return
    message = f"{checkpoint} was made with other settings: "
    message += "; ".join(f"{name} {saved[name]} -> {settings[name]}" for name in changed)
    fixed = [name for name in changed if name in FIXED_SETTINGS]
    if fixed:
        raise UserError(f"{message}. With {' and '.join(fixed)} changed it cannot be gone on from at all.")
    if not args.allow_changed_settings:
        raise UserError(f"{message}. Give the same ones, or --allow_changed_settings to go on all the same.")
    logger.warning(f"{message} (--allow_changed_settings).")


def read_trainer_state(checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What `save_checkpoint` noted. Raises `UserError` where it is damaged or past --max_train_steps."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text())
        missing = {
            "global_step",
            "samples_seen",
            "bad_in_a_row",
            "skipped_steps",
            "settings",
            "batch",
            "accumulation_flag",
        } - set(state)
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint}/{STATE_FILE} cannot be read ({first_line(error)}).") from None
    if missing:
        raise UserError(f"{checkpoint}/{STATE_FILE} lacks {', '.join(sorted(missing))}: it is not this script's.")
    if args.max_train_steps is not None and state["global_step"] > args.max_train_steps:
        raise UserError(f"{checkpoint} is already past --max_train_steps {args.max_train_steps}.")
    return state


def keep_total_batch(
    checkpoint: Path, state: Mapping[str, Any], args: argparse.Namespace, accelerator: Accelerator
) -> None:
    """On other processes, or with another micro-batch, adjust the accumulation so that the total batch stays.

    The data order is then kept too. Raises `UserError` where it cannot stay and --allow_changed_settings is not given.
    """
    batch, total = [args.train_batch_size, accelerator.num_processes], state["settings"]["images per optimiser step"]
    if batch == state["batch"]:
        if args.gradient_accumulation_steps == state["accumulation_flag"]:  # the same command, adjusted once before
            args.gradient_accumulation_steps = accelerator.gradient_accumulation_steps = total // math.prod(batch)
        return
    if total % math.prod(batch) == 0:
        args.gradient_accumulation_steps = accelerator.gradient_accumulation_steps = total // math.prod(batch)
        logger.warning(
            f"{checkpoint} was made on {state['batch'][1]} processes with --train_batch_size {state['batch'][0]}; on "
            f"{batch[1]} with {batch[0]}, --gradient_accumulation_steps is now {args.gradient_accumulation_steps}, so "
            f"that a step keeps its {total} images in the same order (but for a stream). The noise is another."
        )
    elif not args.allow_changed_settings:
        raise UserError(
            f"{checkpoint} was made with {total} images per optimiser step, which --train_batch_size {batch[0]} on "
            f"{batch[1]} processes cannot add up to: choose a batch size that divides {total} / {batch[1]}, or give "
            "--allow_changed_settings."
        )


def check_finite(model: nn.Module, health: StepHealth) -> None:
    """Raise `TrainingError` where the weights are lost: they must not be saved as if they were good."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise TrainingError(f"Stopped, since the weights are not finite; {health.goes_on()}.")


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is true in some process. To be called by every process."""
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)) > 0)


def save_checkpoint(run: Distillation, step: int, samples_seen: int) -> Path | None:
    """Write `checkpoint-<step>` beside its place and move it there once whole. To be called by every process.

    Where any of them fails, on a full disk say, it is given up with a warning, and None is returned.
    """
    args, accelerator, health = run.args, run.accelerator, run.health
    path = Path(args.output_dir) / f"checkpoint-{step}"
    partial = path.with_name(f".{path.name}.partial")
    state = {
        "global_step": step,
        "samples_seen": samples_seen,
        "bad_in_a_row": health.bad_in_a_row,
        "skipped_steps": health.skipped_steps,
        "max_train_steps": args.max_train_steps,
        "batch": [args.train_batch_size, accelerator.num_processes],
        "accumulation_flag": run.accumulation_flag,
        "settings": run.settings,
    }

    def begin() -> None:
        if accelerator.is_main_process:
            remove_leftovers(args.output_dir)
            partial.mkdir()
            (partial / STATE_FILE).write_text(json.dumps(state))

    def finish() -> None:
        if accelerator.is_main_process:
            files = {str(file.relative_to(partial)): file.stat().st_size for file in partial.rglob("*")}
            files = {name: size for name, size in files.items() if name != STATE_FILE and (partial / name).is_file()}
            (partial / STATE_FILE).write_text(json.dumps(state | {"files": files}, indent=2))
            put_in_place(partial, path, path.with_name(f".{path.name}.removed"))
            remove_leftovers(args.output_dir)

    for part in (begin, lambda: accelerator.save_state(str(partial)), finish):
        problem = None
        try:
            part()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors do not raise OSError
            problem = error
            if not accelerator.is_main_process:
                logger.warning(f"Saving failed here: {first_line(error)}", main_process_only=False)
        if any_process(accelerator, problem is not None):
            logger.warning(
                f"{path} could not be saved ({first_line(problem) if problem else 'in another process'}; is the disk "
                f"full?): training goes on, and the next interval tries again; {health.goes_on()}."
            )
            if accelerator.is_main_process:
                with survives("Removing what was written of it"):
                    remove_leftovers(args.output_dir)
            return None
    logger.info(f"Saved {path}")
    if accelerator.is_main_process and args.checkpoints_total_limit is not None:
        with survives("Removing old checkpoints"):
            for old in prune_checkpoints(args.output_dir, args.checkpoints_total_limit, newest=step):
                logger.info(f"Removed {old} (--checkpoints_total_limit {args.checkpoints_total_limit})")
    accelerator.wait_for_everyone()
    health.last_checkpoint = path
    return path


def load_checkpoint(run: Distillation, checkpoint: Path, state: Mapping[str, Any], learning_rate: float) -> None:
    """Put `run` where `checkpoint` left off; learning rate, betas and so on are what the flags now say.

    `state` is `read_trainer_state`'s. To be called by every process. Raises `UserError` where it is damaged.
    """
    args, accelerator, optimizer, lr_scheduler = run.args, run.accelerator, run.optimizer, run.lr_scheduler
    flags_say = [dict(group, params=None) for group in optimizer.param_groups]
    scaler = accelerator.scaler
    if not (checkpoint / SCALER_NAME).exists():  # it was made in another precision: the loss scaler starts anew
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
    for group, wanted in zip(optimizer.param_groups, flags_say, strict=True):
        group.update({key: value for key, value in wanted.items() if key != "params"})
    lr_scheduler.scheduler.base_lrs = [learning_rate]  # the schedule is a function of the step alone
    lr_scheduler.scheduler.last_epoch = state["global_step"] - 1
    lr_scheduler.scheduler.step()
    if args.max_train_steps != state.get("max_train_steps") and not args.lr_scheduler.startswith("constant"):
        logger.warning(
            f"--lr_scheduler {args.lr_scheduler} now ends at step {args.max_train_steps} instead of "
            f"{state.get('max_train_steps')}: the learning rate is another from here on."
        )
    if list_checkpoints(args.output_dir)[-1:] not in ([], [checkpoint]):
        logger.warning(f"{args.output_dir} holds newer checkpoints than {checkpoint.name}; 'latest' will mean those.")


@contextmanager
def sole_run(args: argparse.Namespace, accelerator: Accelerator, checkpoint: Path | None) -> Iterator[None]:
    """Keep other runs out of --output_dir, who would take each other's half-written checkpoints for leftovers.

    To be called by every process. Raises `UserError` where another one is at work there, or was since `checkpoint` was
    looked for. Where the file system has no locks there is a warning.
    """
    output_dir, problem = Path(args.output_dir), None
    lock = FileLock(output_dir / ".lock", fallback_to_soft=False)  # a soft lock would outlive a killed run
    if accelerator.is_main_process:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            problem = f"--output_dir {output_dir} is in use by another run (it holds {lock.lock_file}): stop that one."
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                logger.warning(f"{output_dir} cannot be locked ({first_line(error)}): let no other run write there.")
            else:
                problem = f"--output_dir {output_dir} cannot be written to: {first_line(error)}."
        else:
            if output_problems(args) or find_checkpoint(output_dir, args.resume_from_checkpoint) != checkpoint:
                problem = f"Another run has written to --output_dir {output_dir} since this one began: start it again."
    try:
        problem = broadcast_object_list([problem])[0]
        if problem:
            raise UserError(problem)
        yield
    finally:
        lock.release()


def total_batch_size(args: argparse.Namespace, accelerator: Accelerator) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


# ----------------------------------------------------------------------------------------------------------------
# Validation, the saved pipeline and its model card.


def generate_images(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: nn.Module,
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> list[Image.Image]:
    """`num_validation_images` pictures of every validation prompt, in 25 steps of DPM-Solver++.

    The noise depends on the seed and the picture's number alone, so that any two U-Nets start from the same.
    """
    overrides = {"prediction_type": args.prediction_type} if args.prediction_type else {}
    scheduler = DPMSolverMultistepScheduler.from_pretrained(
        args.pretrained_model_name_or_path,
        subfolder="scheduler",
        revision=args.revision,
        cache_dir=args.cache_dir,
        local_files_only=True,  # it was read at the start; nothing in the loop waits for the hub
        **overrides,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=accelerator.unwrap_model(unet, keep_torch_compile=False),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for prompt in args.validation_prompts:
        for _ in range(args.num_validation_images):
            seed = derived_seed(args.seed, "validation", len(images))
            with torch.no_grad(), accelerator.autocast():
                images += pipeline(
                    prompt,
                    height=args.resolution,
                    width=args.resolution,
                    num_inference_steps=25,
                    generator=torch.Generator(accelerator.device).manual_seed(seed),
                ).images
    return images


def log_validation(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: nn.Module,
    args: argparse.Namespace,
    accelerator: Accelerator,
    weight_dtype: torch.dtype,
    step: int,
    teacher_images: Sequence[Image.Image] = (),
) -> list[Image.Image]:
    """Paint the validation prompts with the student, below the teacher's pictures of the same noise where given.

    The grid goes to `output_dir/validation/step-N.png` and to every tracker that takes pictures. Returns the
    student's pictures. For the main process alone.
    """
    logger.info(f"Validation at step {step}: {len(args.validation_prompts) * args.num_validation_images} pictures")
    images = generate_images(vae, text_encoder, tokenizer, unet, args, accelerator)
    columns = min(len(images), 8)
    rows = []
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
    return images


def make_teacher_images(run: Distillation, tokenizer: CLIPTokenizer) -> list[Image.Image]:
    """The teacher's pictures of the validation prompts; none where it is not loaded. They do not change in a run."""
    images: list[Image.Image] = []
    if run.args.validation_prompts and run.teacher_unet is not None and run.accelerator.is_main_process:
        with survives("Painting the teacher's pictures"), making_pictures(run):
            images = generate_images(run.vae, run.text_encoder, tokenizer, run.teacher_unet, run.args, run.accelerator)
    return images


def validate(run: Distillation, tokenizer: CLIPTokenizer, teacher_images: Sequence[Image.Image], step: int) -> None:
    """`log_validation` of the student as it would be saved now, in the main process while the others wait."""
    accelerator, ema_unet = run.accelerator, run.ema_unet
    if accelerator.is_main_process:
        if ema_unet is not None:
            ema_unet.store(run.unet.parameters())
            ema_unet.copy_to(run.unet.parameters())
        run.unet.eval()
        with survives("Validation"), making_pictures(run):
            log_validation(
                run.vae,
                run.text_encoder,
                tokenizer,
                run.unet,
                run.args,
                accelerator,
                run.weight_dtype,
                step,
                teacher_images,
            )
        run.unet.train()
        if ema_unet is not None:
            ema_unet.restore(run.unet.parameters())
    accelerator.wait_for_everyone()


@contextmanager
def making_pictures(run: Distillation) -> Iterator[None]:
    """No features are captured, which would keep them in memory; and a signal ends it, since nothing is lost."""
    taps = [tap for tap in (run.student_tap, run.teacher_tap) if tap is not None]
    for tap in taps:
        tap.enabled = False
    try:
        run.health.making_pictures = True
        run.vae.to(run.accelerator.device)  # with cached latents it is not there
        with torch.compiler.set_stance("force_eager"):  # other shapes: minutes of compiling for a picture
            yield
    except PicturesInterrupted:
        logger.info("The validation pictures are given up, to stop")
    finally:
        run.health.making_pictures = False
        if run.args.cache_latents:
            run.vae.to("cpu")
        for tap in taps:
            tap.enabled = True


def save_pipeline(args: argparse.Namespace, unet: UNet2DConditionModel) -> None:
    """Write the whole pipeline in float32, load it back and compare: keys, tensors and one pass of the U-Net.

    It is written to a hidden folder and moved in place after that, `model_index.json` last. Raises `TrainingError`
    where what was read back differs. For the main process alone.
    """
    unet = unet.to("cpu", dtype=torch.float32, memory_format=torch.contiguous_format)
    pipeline = StableDiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        unet=unet,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        dtype=torch.float32,
        use_safetensors=True,
    )
    if args.prediction_type is not None:
        pipeline.scheduler.register_to_config(prediction_type=args.prediction_type)
    for model in pipeline.components.values():
        if isinstance(model, nn.Module):
            for tensor in model.state_dict(keep_vars=True).values():
                tensor.data = tensor.data.contiguous()
    sample = torch.randn(1, unet.config.in_channels, 8, 8)
    text = torch.randn(1, 4, pipeline.text_encoder.config.hidden_size)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = unet.eval()(sample, 500, text, return_dict=False)[0]
    if not expected.isfinite().all():
        raise TrainingError("The student's prediction is not finite: nothing is saved.")
    partial = Path(args.output_dir) / ".pipeline.partial"
    if partial.exists():
        shutil.rmtree(partial)  # a killed run's
    pipeline.save_pretrained(partial)
    loaded = DiffusionPipeline.from_pretrained(partial, dtype=torch.float32, use_safetensors=True)
    for name, model in pipeline.components.items():
        if isinstance(model, nn.Module):
            saved, read = model.state_dict(), getattr(loaded, name).state_dict()
            if saved.keys() != read.keys() or any(not torch.equal(saved[key], read[key]) for key in saved):
                raise TrainingError(f"{args.output_dir}/{name} does not hold what was saved: is the disk sound?")
    with torch.no_grad():
        found = loaded.unet.eval()(sample, 500, text, return_dict=False)[0]
    if not torch.allclose(expected, found, rtol=1e-4, atol=1e-5):  # rounding depends on where in memory weights lie
        raise TrainingError(f"{args.output_dir}/unet computes something else than the trained student.")
    for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == "model_index.json"):
        put_in_place(entry, Path(args.output_dir) / entry.name, partial / f"{entry.name}.removed")
    shutil.rmtree(partial)


def save_model_card(
    args: argparse.Namespace,
    repo_id: str,
    images: list[Image.Image] | None = None,
    repo_folder: str | None = None,
    facts: Mapping[str, Any] | None = None,
    license: str = "creativeml-openrail-m",
) -> None:
    """Write `repo_folder/README.md`: what the model is, how it was made, how to load it.

    `images` go in as one grid; `facts` (parameter counts, final losses, ...) as a table.
    """
    folder = Path(repo_folder or args.output_dir)
    row = DISTILL_LEVELS[args.distill_level]
    picture = ""
    if images:
        make_image_grid(images, rows=1, cols=len(images)).save(folder / "val_imgs_grid.png")
        prompts = "; ".join(args.validation_prompts or [])
        picture = f"\n![Pictures of the validation prompts](./val_imgs_grid.png)\n\nPrompts: {prompts}\n"
    data = args.dataset_name or "a local folder of captioned images"
    table = "\n".join(f"| {key} | {value} |" for key, value in (facts or {}).items())
    local = ("pretrained_model_name_or_path", "student_model_name_or_path", "train_data_dir", "dataset_name")
    places = {name: Path(value).name for name in local if (value := getattr(args, name)) and Path(value).exists()}
    settings = "\n".join(
        f"- `{key}`: {value}"
        for key, value in sorted({**public_args(args), **places}.items())
        if value is not None and key not in ("output_dir", "cache_dir", "logging_dir")
    )
    teacher = places.get("pretrained_model_name_or_path", args.pretrained_model_name_or_path)
    card = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=None if Path(args.pretrained_model_name_or_path).exists() else args.pretrained_model_name_or_path,
        datasets=[args.dataset_name] if args.dataset_name and not Path(args.dataset_name).exists() else None,
        tags=["stable-diffusion", "text-to-image", "diffusers", "diffusers-training", "knowledge-distillation"],
    )
    text = f"""---
{card.to_yaml()}
---

# {repo_id}

A Stable Diffusion pipeline whose U-Net was pruned ({args.distill_level}, {row.paper_name} in the BK-SDM paper) and
distilled from **{teacher}** on {data}, with
`loss = task + {args.output_weight} * output + {args.feature_weight} * feature`.
{picture}
| | |
|---|---|
{table}

## Use

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo_id}", dtype=torch.float16).to("cuda")
image = pipeline({json.dumps((args.validation_prompts or ["a photo of a cat"])[0])}).images[0]
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
    ModelCard(text).save(folder / "README.md")


# ----------------------------------------------------------------------------------------------------------------
# Command line.

REFUSED_FLAGS = {
    "--snr_gamma": "was removed: the distillation terms are not weighted by the signal-to-noise ratio",
    "--validation_epochs": "is replaced by --validation_steps, which counts optimiser steps",
    "--enable_xformers_memory_efficient_attention": "is not needed: PyTorch's own SDPA attention is always on",
    "--non_ema_revision": "was removed: name the student's weights with --student_model_name_or_path",
    "--dream_training": "is not supported: --output_weight and --feature_weight are what guides the student",
    "--dream_detail_preservation": "is not supported, like --dream_training",
    "--prepare_unet": "was removed: the student is always built from the teacher's config",
}


class RefusedFlag(argparse.Action):
    """Takes a flag that other training scripts have, to answer with its replacement."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.refused = [*getattr(namespace, "refused", []), f"{option_string} {REFUSED_FLAGS[option_string]}."]


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a run. Every mistake that the flags alone show is printed, and the exit code is 2."""
    parser = argparse.ArgumentParser(
        description="Distil a Stable Diffusion pipeline into a smaller one.",
        usage="accelerate launch distill_training.py --pretrained_model_name_or_path MODEL [options]",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument_group("models").add_argument
    flag("--pretrained_model_name_or_path", required=True, help="The teacher: a Stable Diffusion 1.x or 2.x pipeline.")
    flag("--revision", help="Revision of the teacher on the hub.")
    flag("--variant", help="Variant of the teacher's files, such as fp16.")
    flag("--student_model_name_or_path", help="Go on from this distilled student instead of pruning the teacher.")
    flag("--cache_dir", help="Where downloaded models and datasets are kept.")

    flag = parser.add_argument_group("distillation").add_argument
    flag("--distill_level", choices=DISTILL_LEVELS, default="sd_small", help="What is pruned; see the README.")
    flag("--output_weight", type=float, default=0.5, help="Weight of the output distillation term.")
    flag("--feature_weight", "--feature-weight", type=float, default=0.5, help="Weight of the feature term.")

    flag = parser.add_argument_group("data").add_argument
    flag("--dataset_name", help="Dataset on the hub, or a local folder that datasets can load.")
    flag("--dataset_config_name", help="Configuration of that dataset.")
    flag("--streaming", action="store_true", help="Read --dataset_name as it goes, without storing it.")
    flag("--train_data_dir", help="Folder with *.tar shards, or with images and a metadata.jsonl or .csv.")
    flag("--image_column", default="image", help="Column that holds the images.")
    flag("--caption_column", default="text", help="Column that holds a caption or a list of captions.")
    flag("--max_train_samples", type=int, help="Use no more samples than this.")
    flag("--resolution", type=int, default=512, help="Side of the training images in pixels.")
    flag("--center_crop", action="store_true", help="Crop in the centre instead of at random.")
    flag("--random_flip", action="store_true", help="Mirror half of the images.")
    interpolations = [mode.name.lower() for mode in InterpolationMode]
    flag("--image_interpolation_mode", choices=interpolations, default="lanczos", help="How images are resized.")
    flag("--cache_latents", action="store_true", help="Encode every image once, before training; one crop for each.")
    flag("--latents_cache_dir", help="Where; default: --output_dir with -latents behind it.")
    flag("--proportion_empty_prompts", type=float, default=0.0, help="Share of captions that are left empty.")
    flag("--dataloader_num_workers", type=int, default=0, help="Processes that load data; 0 loads in the main one.")

    flag = parser.add_argument_group("optimisation").add_argument
    flag("--train_batch_size", type=int, default=16, help="Images per process and micro-batch.")
    flag("--gradient_accumulation_steps", type=int, default=1, help="Micro-batches per optimiser step.")
    flag("--num_train_epochs", type=int, default=100, help="Passes over the data; --max_train_steps overrides it.")
    flag("--max_train_steps", type=int, help="Optimiser steps in all.")
    flag("--learning_rate", type=float, default=1e-4, help="Learning rate after warm-up.")
    flag("--scale_lr", action="store_true", help="Multiply the learning rate by the total batch size.")
    schedules = [schedule.value for schedule in SchedulerType if schedule is not SchedulerType.PIECEWISE_CONSTANT]
    flag("--lr_scheduler", choices=schedules, default="constant", help="Learning-rate schedule.")
    flag("--lr_warmup_steps", type=int, default=500, help="Optimiser steps of warm-up, where the schedule has one.")
    flag("--use_8bit_adam", action="store_true", help="8-bit Adam from bitsandbytes.")
    flag("--adam_beta1", type=float, default=0.9, help="Adam's beta1.")
    flag("--adam_beta2", type=float, default=0.999, help="Adam's beta2.")
    flag("--adam_weight_decay", type=float, default=1e-2, help="AdamW's weight decay.")
    flag("--adam_epsilon", type=float, default=1e-8, help="Adam's epsilon.")
    flag("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to this norm.")
    flag("--use_ema", action="store_true", help="Keep a moving average of the student; the saved pipeline holds it.")
    flag("--ema_decay", type=float, default=0.9999, help="Decay of that average, reached after a warm-up.")
    flag("--offload_ema", action="store_true", help="Keep the average in the host's memory.")
    flag("--foreach_ema", action="store_true", help="Accepted; the average is always updated by foreach operations.")
    flag("--noise_offset", type=float, default=0.0, help="Scale of the noise offset.")
    flag("--input_perturbation", type=float, default=0.0, help="Scale of the input perturbation (0.1 recommended).")
    flag(
        "--prediction_type", choices=PREDICTION_TYPES, help="What the U-Net predicts, if not what the scheduler says."
    )
    flag("--gradient_checkpointing", action="store_true", help="Less memory for a slower student.")
    flag("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: what accelerate is configured for.")
    flag(
        "--compile",
        action="store_true",
        help="Compile the nets with torch.compile: minutes at the start, then faster on a GPU.",
    )
    flag("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and newer.")
    flag("--seed", type=int, help="Seed of everything random; else drawn and printed (0 with --cache_latents).")
    flag("--local_rank", type=int, default=-1, help="Accepted for launchers that pass it; accelerate finds it itself.")

    flag = parser.add_argument_group("logging, validation and saving (all counts are optimiser steps)").add_argument
    flag("--output_dir", default="sd-model-distilled", help="Where the pipeline and everything else is written.")
    flag("--logging_dir", default="logs", help="Trackers' folder within --output_dir.")
    flag("--logging_steps", type=int, default=10, help="Steps between two fetches of the metrics; all are logged.")
    flag("--report_to", default="tensorboard", help="Tracker that accelerate knows, 'all', or 'none'.")
    flag("--tracker_project_name", default="distill-sd", help="Project name for the trackers.")
    flag("--validation_prompts", nargs="+", help="Prompts to paint during training.")
    flag("--validation_steps", type=int, default=500, help="Steps between two validations.")
    flag("--num_validation_images", type=int, default=1, help="Pictures per prompt.")
    flag("--checkpointing_steps", type=int, default=500, help="Steps between two checkpoints.")
    flag("--checkpoints_total_limit", type=int, help="Keep no more checkpoints than this.")
    flag("--allow_changed_settings", action="store_true", help="Resume although settings, data or teacher changed.")
    flag("--max_bad_steps", type=int, default=10, help="Stop after more than this many non-finite steps in a row.")
    flag("--resume_from_checkpoint", help="'latest', or a checkpoint's name or path.")
    flag("--push_to_hub", action="store_true", help="Upload the result to the hub.")
    flag("--hub_token", help="Token for that; better log in with `hf auth login`.")
    flag("--hub_model_id", help="Repository to upload to; default: the name of --output_dir.")

    parser.set_defaults(refused=[])
    for name in REFUSED_FLAGS:
        parser.add_argument(name, action=RefusedFlag, nargs="?", dest="refused", help=argparse.SUPPRESS)

    args = parser.parse_args(input_args)
    problems = args.refused + validate_args(args)
    del args.refused
    if problems:
        parser.error("\n  " + "\n  ".join(problems))
    return args


# (flag, what is allowed, test): the bounds of every number.
BOUNDS: list[tuple[str, str, Callable[[float], bool]]] = [
    *((name, "at least 0", lambda value: 0 <= value < math.inf) for name in (
        "output_weight", "feature_weight", "noise_offset", "input_perturbation", "dataloader_num_workers",
        "lr_warmup_steps", "adam_weight_decay", "max_bad_steps",
    )),
    *((name, "at least 1", lambda value: value >= 1) for name in (
        "max_train_samples", "resolution", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
        "max_train_steps", "logging_steps", "validation_steps", "num_validation_images", "checkpointing_steps",
        "checkpoints_total_limit",
    )),
    *((name, "more than 0", lambda value: 0 < value < math.inf) for name in (
        "learning_rate", "adam_epsilon", "max_grad_norm",
    )),
    *((name, "from 0 to below 1", lambda value: 0 <= value < 1) for name in ("adam_beta1", "adam_beta2", "ema_decay")),
    ("seed", "from 0 to 4294967295", lambda value: 0 <= value < 2**32),
    ("proportion_empty_prompts", "from 0 to 1", lambda value: 0 <= value <= 1),
]  # fmt: skip


def validate_args(args: argparse.Namespace) -> list[str]:
    """What is wrong with the settings, one sentence each, without loading or downloading anything."""
    problems = [
        f"--{name} must be {allowed}, got {getattr(args, name)}."
        for name, allowed, holds in BOUNDS
        if getattr(args, name) is not None and not holds(getattr(args, name))
    ]
    if args.resolution >= 1 and args.resolution % 8:
        problems.append(f"--resolution must be a multiple of 8, the VAE's factor, got {args.resolution}.")
    for name in ("pretrained_model_name_or_path", "student_model_name_or_path"):
        problems += model_path_problems(name, getattr(args, name))
    problems += data_problems(args)
    problems += output_problems(args)
    if args.allow_changed_settings and args.resume_from_checkpoint is None:
        problems.append("--allow_changed_settings needs --resume_from_checkpoint.")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        problems.append("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.")
    variable, compilers = "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        variable, compilers = "CC", ["gcc", "clang"]
    compilers = os.environ.get(variable, "").split()[:1] or compilers
    if args.compile and not any(map(shutil.which, compilers)):
        missing = " or ".join(compilers)
        problems.append(f"--compile needs a compiler: {missing} is not there; install it or name one in {variable}.")
    if not args.use_ema:
        problems += [f"--{name} needs --use_ema." for name in ("offload_ema", "foreach_ema") if getattr(args, name)]
    if args.report_to not in ("all", "none"):
        if args.report_to not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            problems.append(f"--report_to must be one of {known}, all, none; got {args.report_to}.")
        elif args.report_to not in [str(tracker) for tracker in get_available_trackers()]:
            problems.append(f"--report_to {args.report_to} is not installed: pip install it, or choose another.")
    if args.hub_token is not None and args.report_to not in ("tensorboard", "none"):
        problems.append(f"--hub_token could be shown by {args.report_to}: log in with `hf auth login` instead.")
    return problems


def model_path_problems(name: str, source: str | None) -> list[str]:
    """What is wrong with a model's name or path, so far as can be told without the hub."""
    if source is None or Path(source).is_dir():
        if source and name.startswith("pretrained") and not (Path(source) / "model_index.json").is_file():
            return [f"--{name} {source} holds no model_index.json: a folder must hold a whole pipeline."]
        return []
    if Path(source).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        return [f"--{name} {source} is neither a folder nor a name on the hub."]
    return []


def data_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the choice of training data."""
    problems = []
    if (args.dataset_name is None) == (args.train_data_dir is None):
        problems.append("Give either --dataset_name or --train_data_dir, and not both.")
    if args.streaming and args.train_data_dir is not None:
        problems.append("--streaming goes with --dataset_name only: local data is read in place anyway.")
    elif args.streaming and args.max_train_steps is None:
        problems.append("--streaming needs --max_train_steps: the length of a stream is not known.")
    if args.streaming and args.cache_latents:
        problems.append("--cache_latents does not go with --streaming: what it caches is the whole data.")
    if args.latents_cache_dir is not None and not args.cache_latents:
        problems.append("--latents_cache_dir needs --cache_latents.")
    if args.latents_cache_dir is not None and Path(args.latents_cache_dir).is_file():
        problems.append(f"--latents_cache_dir {args.latents_cache_dir} is a file, not a folder.")
    if args.train_data_dir is not None:
        folder = Path(args.train_data_dir)
        if not folder.is_dir():
            problems.append(f"--train_data_dir {folder} is not a folder.")
        elif not any(folder.glob("*.tar")) and next(list_images(folder), None) is None:
            problems.append(f"--train_data_dir {folder} holds neither *.tar shards nor images.")
    return problems


def output_problems(args: argparse.Namespace) -> list[str]:
    """Why `--output_dir` cannot be written to without losing something that is there."""
    folder = Path(args.output_dir)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        return [f"--output_dir {folder} is not a folder."]
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        return [f"--output_dir {folder} cannot be written to: {nearest} is not a folder that you may write in."]
    try:
        resumed = find_checkpoint(folder, args.resume_from_checkpoint)
    except FileNotFoundError as error:
        return [str(error)]
    checkpoints = list_checkpoints(folder, cut_too=True)
    if resumed is not None and resumed.resolve().parent == folder.resolve():
        return []
    if checkpoints and args.resume_from_checkpoint == "latest":
        return [f"--output_dir {folder} holds no whole checkpoint, {checkpoints[-1].name} is cut: move it away."]
    if checkpoints:
        return [
            f"--output_dir {folder} holds another run's checkpoints ({checkpoints[-1].name}): go on with "
            "--resume_from_checkpoint latest, or choose another folder."
        ]
    if (folder / "model_index.json").exists():
        return [f"--output_dir {folder} holds a finished pipeline: choose another folder."]
    settings = folder / "args.json"
    if not (settings.is_file() and '"distill_level"' in settings.read_text()):  # else it is a run's that stopped early
        written = ("README.md", "args.json", "val_imgs_grid.png", "validation", "unet", "vae", "text_encoder")
        for name in (*written, "tokenizer", "scheduler", "safety_checker", "feature_extractor"):
            if (folder / name).exists():
                return [f"--output_dir {folder} holds {name}, which is not from a run of this script: choose another."]
    return []


def public_args(args: argparse.Namespace) -> dict[str, Any]:
    """The settings without secrets, for files, trackers and the model card."""
    return {key: value for key, value in vars(args).items() if key != "hub_token"}


# ----------------------------------------------------------------------------------------------------------------
# Training.


def make_optimizer(args: argparse.Namespace, unet: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW over the student's parameters, fused where the device has it, or in 8 bits."""
    settings = {
        "lr": learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(unet.parameters(), **settings)
    fused = next(unet.parameters()).device.type in ("cuda", "cpu")
    return torch.optim.AdamW(unet.parameters(), fused=fused, **settings)


def load_unets(
    args: argparse.Namespace, teacher_config: Mapping[str, Any]
) -> tuple[UNet2DConditionModel, UNet2DConditionModel | None]:
    """Student and teacher in float32; the teacher is None where neither a loss term nor pruning needs it."""
    source, flag = args.pretrained_model_name_or_path, "pretrained_model_name_or_path"
    distils = args.output_weight > 0 or args.feature_weight > 0
    teacher = None
    if distils or args.student_model_name_or_path is None:
        teacher = load_component(UNet2DConditionModel, source, flag, args, subfolder="unet")
    if args.student_model_name_or_path is None:
        return build_student(teacher, args.distill_level), teacher if distils else None
    flag = "student_model_name_or_path"
    student = load_component(UNet2DConditionModel, args.student_model_name_or_path, flag, args, subfolder="unet")
    check_student(student, teacher_config, args.distill_level)
    return student, teacher


def use_channels_last(device: torch.device, dtype: torch.dtype, compiled: bool) -> bool:
    """Whether the nets are faster with channels last: on a GPU only when compiled, on a CPU only in bf16."""
    return compiled if device.type == "cuda" else dtype == torch.bfloat16


def choose_memory_format(
    args: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    vae: AutoencoderKL,
    teacher_unet: UNet2DConditionModel | None,
    unet: UNet2DConditionModel,
) -> None:
    """Lay the nets out as they are fastest."""
    if use_channels_last(device, dtype, args.compile):
        frozen = filter(None, (vae, teacher_unet))
        # Not the student with 8-bit Adam, whose first step would put it back, to be compiled anew.
        for model in frozen if args.use_8bit_adam else (*frozen, unet):
            model.to(memory_format=torch.channels_last)


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}  # no versions, no paths


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return f"{kibibytes / 2**20:.2f} GiB of the host's memory"


def report(lines: Mapping[str, Any]) -> None:
    for name, value in lines.items():
        logger.info(f"  {name} = {value}")


def train(
    run: Distillation,
    tokenizer: CLIPTokenizer,
    dataset: DistillationDataset | StreamingDataset,
    first_step: int,
    samples_seen: int,
) -> tuple[dict[str, float], Tensor, float]:
    """The training loop, from optimiser step `first_step` on: the last metrics, `counts`, and steps per second.

    It ends early where `run.health` has a signal to stop. Raises `TrainingError` where too many steps are skipped.
    """
    args, accelerator, health = run.args, run.accelerator, run.health
    metrics = MetricLog(accelerator, run.metric_names())
    counts = torch.zeros(4, dtype=torch.int64)
    micro_batch = samples_seen // (args.train_batch_size * accelerator.num_processes)
    seconds, timed_steps = 0.0, 0
    progress = tqdm(
        total=args.max_train_steps, initial=first_step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    with closing(make_dataloader(dataset, args, accelerator, micro_batch)) as batches, closing(progress):
        teacher_images = make_teacher_images(run, tokenizer)
        if args.validation_prompts and first_step == 0:
            validate(run, tokenizer, teacher_images, first_step)
        started = time.perf_counter()
        for step in range(first_step + 1, args.max_train_steps + 1):
            learning_rate = run.lr_scheduler.get_last_lr()[0]
            terms = 0.0
            for _ in range(args.gradient_accumulation_steps):
                batch = next(batches)
                if batch["counts"][UNREADABLE] and not counts[UNREADABLE]:
                    logger.warning("Training data can no longer be read: other samples take its place.")
                counts += batch["counts"]
                micro_terms, grad_norm = training_step(run, batch, micro_batch)
                terms += micro_terms / args.gradient_accumulation_steps
                micro_batch += 1
            metrics.add(step, learning_rate, terms, grad_norm)
            progress.update()
            timed_steps += 1
            if args.compile and step == first_step + 1 < args.max_train_steps:  # compiling is no training
                started, timed_steps = time.perf_counter(), 0
            ends = step == args.max_train_steps
            saves = bool(health.stop_signal) or (step % args.checkpointing_steps == 0 and not health.bad)
            validates = bool(args.validation_prompts) and (ends or step % args.validation_steps == 0)
            if ends or saves or validates or health.bad or step % args.logging_steps == 0:
                last = metrics.write()
                progress.set_postfix({name: f"{last[name]:.3g}" for name in ("loss", "task_loss", "lr")})
            if health.bad:
                broken = ", ".join(f"{name} is {value}" for name, value in last.items() if not math.isfinite(value))
                logger.warning(f"Step {step} is skipped: {broken}")
                if health.bad_in_a_row > args.max_bad_steps:
                    raise TrainingError(
                        f"Stopped at step {step}, after {health.bad_in_a_row} in a row whose numbers are not finite "
                        f"({broken}; --max_bad_steps {args.max_bad_steps}); {health.goes_on()}."
                    )
            if saves or validates:
                seconds += time.perf_counter() - started
                if saves:
                    check_finite(run.unet, health)
                    saved = save_checkpoint(run, step, micro_batch * args.train_batch_size * accelerator.num_processes)
                if health.stop_signal:
                    logger.info(
                        f"Stopped by {signal.Signals(health.stop_signal).name} after step {step}: "
                        + (f"saved {saved}" if saved else f"not saved; {health.goes_on()}")
                        + "; go on with --resume_from_checkpoint latest"
                    )
                    break
                if validates:
                    validate(run, tokenizer, teacher_images, step)
                started = time.perf_counter()
        seconds += time.perf_counter() - started
    return metrics.last, counts, timed_steps / seconds


def main(args: argparse.Namespace) -> None:  # noqa: C901
    """One run: build or resume the student, train it, save the pipeline. `args` are `parse_args`'s.

    Raises `UserError` and `TrainingError` (see there).
    """
    output_dir = Path(args.output_dir)
    # 1. Accelerator, logging and seed.
    project = ProjectConfiguration(project_dir=args.output_dir, logging_dir=str(output_dir / args.logging_dir))
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=project,
        step_scheduler_with_optimizer=False,  # else it would be stepped once for every process
        # The others wait while the main process downloads, paints or saves; ten minutes are not enough for that.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))],
    )
    if accelerator.mixed_precision not in WEIGHT_DTYPES:
        raise UserError(
            f"--mixed_precision must be one of {', '.join(WEIGHT_DTYPES)}; accelerate is configured for "
            f"{accelerator.mixed_precision}."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU: choose bf16 or no on a CPU.")
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO
    )
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()  # what they warn of (tensors missing, dtypes mixed) is an error here
        library.disable_progress_bar()
    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
    state = read_trainer_state(checkpoint, args) if checkpoint else {}
    saved_settings = state.get("settings", {})
    if args.seed is None:
        # What is cached depends on the seed (crops, the choice of samples): a drawn one would never find it again.
        seed = 0 if args.cache_latents else secrets.randbelow(2**31)
        args.seed = broadcast_object_list([saved_settings.get("seed", seed)])[0]
        origin = "as in the checkpoint" if state else "of --cache_latents" if args.cache_latents else "drawn"
        logger.info(f"Seed {args.seed} ({origin})")
    accumulation_flag = args.gradient_accumulation_steps
    if checkpoint is not None:
        keep_total_batch(checkpoint, state, args, accelerator)
    settings = run_settings(args, accelerator)
    check_unchanged(checkpoint, saved_settings, settings, args)
    set_seed(args.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True

    # 2. What is read before any weights: configs, tokenizer, data.
    source, flag = args.pretrained_model_name_or_path, "pretrained_model_name_or_path"
    teacher_config = check_teacher(args)
    tokenizer = load_component(CLIPTokenizer, source, flag, args, subfolder="tokenizer")
    noise_scheduler = load_component(DDPMScheduler, source, flag, args, subfolder="scheduler")
    if args.prediction_type is not None:
        noise_scheduler.register_to_config(prediction_type=args.prediction_type)
    if noise_scheduler.config.prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"The teacher's scheduler has prediction_type {noise_scheduler.config.prediction_type}; known are "
            f"{' and '.join(PREDICTION_TYPES)}: say which it is with --prediction_type."
        )
    dataset = make_train_dataset(args, tokenizer, accelerator)

    repo_id = args.hub_model_id or output_dir.resolve().name
    if args.push_to_hub and accelerator.is_main_process:
        try:
            repo_id = create_repo(repo_id, exist_ok=True, token=args.hub_token).repo_id
        except Exception as error:  # not logged in, out of reach, no such user, ...
            raise UserError(f"--push_to_hub: {repo_id} cannot be made on the hub: {first_line(error)}") from error

    # 3. Text encoder, VAE, teacher and student. The rest is read too, so that saving it can't fail after days.
    text_encoder = load_component(CLIPTextModel, source, flag, args, subfolder="text_encoder")
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    vae = load_component(AutoencoderKL, source, flag, args, subfolder="vae")
    unet, teacher_unet = load_unets(args, teacher_config)
    used_above = dict.fromkeys(("unet", "vae", "text_encoder", "tokenizer"))
    load_component(StableDiffusionPipeline, source, flag, args, **used_above)
    with torch.device("meta"):
        teacher_parameters = count_parameters(UNet2DConditionModel.from_config(_complete_unet_config(teacher_config)))
    student_parameters = count_parameters(unet)
    if student_parameters >= teacher_parameters:
        raise UserError(
            f"The student has {student_parameters:,} parameters, no fewer than its teacher: nothing is pruned."
        )
    contents = {"data": data_fingerprint(dataset, args, accelerator.num_processes)}
    for name, model in {"U-Net": teacher_unet, "VAE": vae, "text encoder": text_encoder}.items():
        contents |= {f"teacher's {name}": weights_hash(model)} if model is not None else {}
    configs = [sorted(public_config(part).items()) for part in (teacher_config, vae.config, noise_scheduler.config)]
    contents["teacher's configs"] = hashlib.blake2b(repr(configs).encode(), digest_size=8).hexdigest()
    check_unchanged(checkpoint, saved_settings, contents, args)

    # 4. Freeze, cast and place all but the student. They stay unprepared: accelerate would checkpoint them over it.
    weight_dtype = WEIGHT_DTYPES[accelerator.mixed_precision]
    text_encoder = freeze(text_encoder, accelerator.device, weight_dtype)
    vae = freeze(vae, accelerator.device, weight_dtype)
    if teacher_unet is not None:
        teacher_unet = freeze(teacher_unet, accelerator.device, weight_dtype)
    unet.train().to(accelerator.device)
    choose_memory_format(args, accelerator.device, weight_dtype, vae, teacher_unet, unet)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.compile:  # in place, so that state dicts keep their names
        vae.encoder.compile(dynamic=False)
    if args.cache_latents:
        dataset = cache_latents(dataset, vae, args, accelerator)
        vae.to("cpu")  # validation pictures bring it back

    # 5. EMA of the student.
    ema_unet = None
    if args.use_ema:
        ema_unet = EMAModel(
            unet.parameters(),
            decay=args.ema_decay,
            foreach=True,
            model_cls=UNet2DConditionModel,
            model_config=unet.config,
        )
        ema_unet.to("cpu" if args.offload_ema else accelerator.device)
        if args.offload_ema and accelerator.device.type == "cuda":
            ema_unet.pin_memory()

    # 6. Optimiser and schedule.
    total_batch = total_batch_size(args, accelerator)
    learning_rate = args.learning_rate * (total_batch if args.scale_lr else 1)
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(dataset) / total_batch)
    if state and state["global_step"] > args.max_train_steps:
        raise UserError(f"{checkpoint} is already past --num_train_epochs {args.num_train_epochs}.")
    optimizer = make_optimizer(args, unet, learning_rate)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )

    # 7. Feature taps, registered before the first call of either U-Net.
    student_tap = teacher_tap = None
    if args.feature_weight > 0:
        teacher_names, student_names = zip(*feature_pairs(args.distill_level), strict=True)
        teacher_tap, student_tap = FeatureTap(teacher_unet, teacher_names), FeatureTap(unet, student_names)
        check_features([(teacher_unet, teacher_tap), (unet, student_tap)])
    if args.compile:  # after the taps, and with shapes kept apart: block by block they differ
        # What save_pretrained adds to a config: added later, it would have the student compiled anew.
        unet.register_to_config(_class_name=type(unet).__name__, _diffusers_version=diffusers.__version__)
        for model in filter(None, (unet, teacher_unet)):
            model.compile(dynamic=False)

    # 8. Prepare, and resume.
    unet, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    save_hook, load_hook = checkpoint_hooks(accelerator, ema_unet)
    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)
    run = Distillation(
        args=args,
        accelerator=accelerator,
        weight_dtype=weight_dtype,
        noise_scheduler=noise_scheduler,
        vae=vae,
        text_encoder=text_encoder,
        teacher_unet=teacher_unet,
        unet=unet,
        student_tap=student_tap,
        teacher_tap=teacher_tap,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        ema_unet=ema_unet,
        settings=settings | contents,
        accumulation_flag=accumulation_flag,
        health=StepHealth(
            bad_in_a_row=state.get("bad_in_a_row", 0),
            skipped_steps=state.get("skipped_steps", 0),
            last_checkpoint=checkpoint,
        ),
        compiled_loss=torch.compile(distillation_loss, dynamic=False) if args.compile else None,
    )
    global_step, samples_seen = state.get("global_step", 0), state.get("samples_seen", 0)
    if checkpoint is not None:
        load_checkpoint(run, checkpoint, state, learning_rate)

    # 9. Say what is about to happen, and write down the settings.
    logger.info("***** Running training *****")
    report(
        {
            "Teacher": f"{source}, {teacher_parameters:,} parameters in its U-Net",
            "Student": f"{args.distill_level}, {student_parameters:,} parameters "
            f"({1 - student_parameters / teacher_parameters:.1%} fewer)",
            "Loss": f"task + {args.output_weight} * output + {args.feature_weight} * feature",
            "Feature pairs (teacher-student)": ", ".join(name.partition("/")[2] for name in run.metric_names()[4:])
            or "none",
            "Training samples": "a stream" if isinstance(dataset, StreamingDataset) else f"{len(dataset):,}",
            "Images per process and micro-batch": args.train_batch_size,
            "Images per optimiser step (with accumulation and all processes)": total_batch,
            "Optimiser steps": f"{args.max_train_steps:,}"
            + (f", going on after {global_step:,}" if checkpoint else ""),
            "Precision": f"{accelerator.mixed_precision} on {accelerator.num_processes} x {accelerator.device.type}",
            "Output": output_dir,
        }
    )
    with ExitStack() as context:
        context.enter_context(sole_run(args, accelerator, checkpoint))
        if accelerator.is_main_process:
            (output_dir / "args.json").write_text(json.dumps(public_args(args), indent=2))
        if args.report_to != "none":
            settings = {key: value for key, value in public_args(args).items() if isinstance(value, (int, float, str))}
            accelerator.init_trackers(args.tracker_project_name, config=settings)

        # 10. Train.
        context.enter_context(stop_signals(run.health))
        last, counts, steps_per_second = train(run, tokenizer, dataset, global_step, samples_seen)
        for tap in (student_tap, teacher_tap):
            if tap is not None:
                tap.close()
        if run.health.stop_signal:
            with survives("Closing the trackers"):
                accelerator.end_training()
            sys.exit(128 + run.health.stop_signal)

        # 11. Save the pipeline, check it, describe it, share it.
        counts = accelerator.reduce(counts.to(accelerator.device), reduction="sum").cpu()
        check_finite(unet, run.health)
        if accelerator.is_main_process:
            student = accelerator.unwrap_model(unet, keep_fp32_wrapper=False, keep_torch_compile=False)
            if ema_unet is not None:
                ema_unet.copy_to(student.parameters())
            try:
                save_pipeline(args, student)
            except TrainingError:
                raise
            except (OSError, RuntimeError, SafetensorError) as error:
                raise TrainingError(
                    f"The pipeline cannot be saved in {output_dir} ({first_line(error)}); {run.health.goes_on()}."
                ) from error
            facts = {
                "Teacher's U-Net": f"{teacher_parameters:,} parameters",
                "Student's U-Net": f"{student_parameters:,} parameters",
                "Optimiser steps": f"{args.max_train_steps:,} of {total_batch} images",
                **{f"Final {name}": f"{value:.6g}" for name, value in last.items()},
            }
            grid = output_dir / "validation" / f"step-{args.max_train_steps}.png"
            images = [Image.open(grid)] if grid.exists() else None
            # Stable Diffusion 2.x, known by its text encoder's width, came under another licence.
            licence = {1024: "openrail++"}.get(student.config.cross_attention_dim, "creativeml-openrail-m")
            save_model_card(args, repo_id, images, args.output_dir, facts, licence)
        accelerator.wait_for_everyone()
    if args.push_to_hub and accelerator.is_main_process:
        parts = [f"{name}/*" for name in json.loads((output_dir / "model_index.json").read_text()) if name[0] != "_"]
        upload_folder(
            repo_id=repo_id,
            folder_path=output_dir,
            commit_message="End of training",
            allow_patterns=[
                "README.md",
                "val_imgs_grid.png",
                "model_index.json",
                *parts,
            ],  # no more than the run wrote
            token=args.hub_token,
        )
    steps = args.max_train_steps - global_step
    logger.info("***** Training is done *****")
    report(
        {
            **{name: f"{value:.6g}" for name, value in last.items()},
            "Steps per second": f"{steps_per_second:.3f} ({steps_per_second * total_batch:.2f} images per second)",
            "Peak memory": peak_memory(accelerator.device),
            "Samples replaced": describe_counts(counts) + (f" (since step {global_step})" if checkpoint else ""),
            "Steps skipped": run.health.skipped_steps,
            "Output": f"{output_dir}, loaded back and equal to what was trained",
        }
    )
    if counts[ENLARGED]:
        images_seen = steps * total_batch
        logger.warning(f"{counts[ENLARGED]} of {images_seen} images were smaller than --resolution and were enlarged.")
    with survives("Closing the trackers"):
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
