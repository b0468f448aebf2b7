#!/usr/bin/env python
"""Fetch captions from the Hub and the images behind their URLs, into shards that `distill_training.py` trains on.

    python data.py --output_dir laion_art                        # 250,000 rows of the default dataset
    python data.py --output_dir laion_art                        # the same again: goes on where it stopped
    python data.py --caption_file captions.parquet --url_column URL --caption_column TEXT --output_dir mine
    python data.py --check laion_art                             # read everything back, say what is wrong

The folder holds `NNNNN.tar` (`<key>.jpg`, `<key>.txt`, ... in row order), `NNNNN.parquet` (every row with its
outcome) and `manifest.json`. img2dataset hands the shards to workers, in a process group of its own that this script
watches over; a worker fetches URLs (`fetch`), reads images (`square_jpeg`) and writes them (`Shard`). All that needs a
POSIX system. What the trainer shares does not, and comes first: rows of flags, images to RGB, files into place, shards
written and read.
"""

import argparse
import collections
import contextlib
import errno
import functools
import hashlib
import http.client
import importlib.util
import io
import ipaddress
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
import traceback
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from multiprocessing import active_children
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

FORMAT = "distill-sd data.py 1"
ROBOT_NAME = "distill-sd"  # the name that an X-Robots-Tag header may address us by
USER_AGENT = f"Mozilla/5.0 (compatible; {ROBOT_NAME}%s)"  # with the contact of --user_agent
OPT_OUTS = {"noai", "noimageai", "noindex", "noimageindex", "noml", "none"}  # "none" is short for noindex, nofollow
VALUED_DIRECTIVES = {"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"}  # not robots' names
PASSING = ("timeout", "network", "incomplete", "http_408", "http_429")  # with all http_5xx: a second try may go better
PASSING_LATER = ("deadline", "dns", "busy", *PASSING)  # what --retry_failed asks for again, in another run
MIB = 2**20

# What a folder is made with. Of two runs into one, the first must agree, the second choose the same rows of the same
# tables, or more after them. How the rows are fetched (threads, time limits) may change.
IMAGE_SETTINGS = (
    "url_column caption_column image_size min_image_size encode_quality number_sample_per_shard max_bytes max_pixels "
    "honor_opt_outs"
).split()
ROW_SETTINGS = "dataset_name filter max_samples seed verify_hash".split()


class UserError(ValueError):
    """A mistake in the flags, the models or the data: shown as one sentence, exit code 2."""

    def __init__(self, message: str) -> None:
        # A loader's worker wraps its traceback round the sentence, which is all that the user needs.
        super().__init__(message.rsplit("UserError: ", 1)[-1].strip())


class DataError(Exception):
    """Ends a download that failed: shown as one sentence, exit code 1."""


KEPT = "Finished shards are kept; the same command goes on from there."


class Refused(Exception):
    """A row that does not become an image: `reason` is what the tables count, `detail` is for a person.

    `wait` are the seconds after which the server says that it may be asked again.
    """

    def __init__(self, reason: str, detail: str = "", wait: float = 0) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.wait = reason, detail, wait


def progress_bar(*args: Any, **settings: Any) -> Any:
    """tqdm's bar, imported where one is shown: workers import this file too, and need none of it."""
    from tqdm import tqdm

    return tqdm(*args, dynamic_ncols=True, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# Flags, for both scripts: one row is all there is of a flag.


class Bound(NamedTuple):
    """What a number may be, in words and as a test. NaN passes none."""

    text: str
    holds: Callable[[Any], bool]


def at_least(lowest: float) -> Bound:
    """Numbers from `lowest` on, infinity not among them."""
    return Bound(f"at least {lowest}", lambda value: lowest <= value < math.inf)


def between(lowest: float, highest: float) -> Bound:
    """Numbers from `lowest` to `highest`, both among them."""
    return Bound(f"from {lowest} to {highest}", lambda value: lowest <= value <= highest)


AT_LEAST_0 = at_least(0)
AT_LEAST_1 = at_least(1)
MORE_THAN_0 = Bound("more than 0", lambda value: 0 < value < math.inf)
FROM_0_TO_1 = between(0, 1)
FROM_0_TO_BELOW_1 = Bound("from 0 to below 1", lambda value: 0 <= value < 1)


@dataclass(frozen=True)
class Flag:
    """A flag of the command line. `resume` and `before` are the trainer's."""

    name: str  # without dashes
    type: type  # bool makes a switch
    default: Any
    allowed: Bound | Sequence[str] | None  # a bound, or the choices
    help: str
    resume: str = "same"  # "same", "free" or "never": whether it may change when a run is resumed
    before: Any = ...  # the value that a checkpoint from before the flag stands for; if not given, the default
    nargs: str | None = None
    metavar: str | None = None
    action: str | None = None
    required: bool = False
    aliases: tuple[str, ...] = ()  # further spellings, with their dashes
    negatable: bool = False  # a switch that is turned off by --no-NAME

    def __post_init__(self) -> None:
        if self.before is ...:
            object.__setattr__(self, "before", self.default)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default but those that say no more than that nothing was given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = action.default is None or action.default is False or action.default == []
        return action.help if unset else super()._get_help_string(action)


def make_parser(groups: Mapping[str, Sequence[Flag]], description: str, usage: str) -> argparse.ArgumentParser:
    """A parser of these flags, by the title of their group. `bound_problems` says which bounds do not hold."""
    parser = argparse.ArgumentParser(
        description=description, usage=usage, allow_abbrev=False, formatter_class=HelpFormatter
    )
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            settings: dict[str, Any] = {"default": flag.default, "help": flag.help, "required": flag.required}
            if flag.type is bool:
                settings["action"] = argparse.BooleanOptionalAction if flag.negatable else "store_true"
            else:
                choices = None if isinstance(flag.allowed, Bound) else flag.allowed
                more = {"choices": choices, "nargs": flag.nargs, "metavar": flag.metavar, "action": flag.action}
                settings |= {"type": flag.type} | {key: value for key, value in more.items() if value is not None}
            group.add_argument(f"--{flag.name}", *flag.aliases, **settings)
    return parser


def bound_problems(flags: Iterable[Flag], args: argparse.Namespace) -> list[str]:
    """A sentence for every bound that does not hold; what is None was not given."""
    values = [(flag, getattr(args, flag.name)) for flag in flags if isinstance(flag.allowed, Bound)]
    return [
        f"--{flag.name} must be {flag.allowed.text}, got {value}."
        for flag, value in values
        if value is not None and not flag.allowed.holds(value)
    ]


def check_wandb(flag: str) -> None:
    """Raise UserError where wandb, which `flag` asks for, has no login; on a terminal it asks for one."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    import wandb

    try:
        logged_in = wandb.login(verify=True)
    except Exception as error:  # wandb raises several kinds, requests' own among them
        raise UserError(f"{flag}: can't log in to wandb: {str(error).splitlines()[0]}") from None
    if not logged_in:
        raise UserError(f"{flag}: not logged in to wandb; run `wandb login`, or set WANDB_MODE=offline")


# ---------------------------------------------------------------------------------------------------------------------
# Images, for both scripts.

IMAGE_SUFFIXES = frozenset(  # what Pillow reads and people keep images in
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .gif .bmp .dib .tif .tiff .avif .jp2 .j2k .ppm .pgm .pbm .pnm .tga"
    " .ico .pcx .dds .sgi .qoi".split()
)
UNREAD_SUFFIXES = frozenset(".heic .heif .jxl .svg .psd .dng .cr2 .nef .arw .raw".split())  # and what it does not
PNG_TEXT_BYTES = 64 * MIB  # workflows of image generators, say: Pillow's own limit is 1 MiB a text


def check_range(image: Image.Image) -> None:
    """Raise ValueError for pixels of 32 bits. For an image as it was opened: a crop no longer knows its format."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # 16 bits in these two
        raise ValueError(f"a {image.format} with pixels of 32 bits, whose range is not known")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16 bits scaled to 8, transparency over white. Raises ValueError where there is no way."""
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255, which paints 16-bit images white
        values = (np.asarray(image).astype(np.int64) + 128) // 257
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_image(data: bytes) -> Image.Image:
    """Bytes of an image file to RGB as it is meant to be seen: EXIF orientation applied, of an animation the first
    frame, see `to_rgb`. Raises what Pillow raises on a broken file.
    """
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = PNG_TEXT_BYTES
    image = Image.open(io.BytesIO(data))
    check_range(image)
    image.load()
    return to_rgb(ImageOps.exif_transpose(image))


# ---------------------------------------------------------------------------------------------------------------------
# Into place, for both scripts.


def put_in_place(new: Path, path: Path, old: Path | None = None) -> None:
    """Rename a finished `new` to `path` once all of it is on the disk, whatever happens to the machine then.

    What was at `path` is renamed to `old`; a file needs none, and is replaced.
    """
    for entry in [*new.rglob("*"), new]:
        sync(entry)
    if old is not None and path.exists():
        path.rename(old)
    try:
        new.replace(path)
    except OSError:
        if old is not None and old.exists():
            old.rename(path)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return  # which Windows does not open
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)  # nor does it sync what may only be read
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Shards, for both scripts: tars of two members for each sample, `<key>.jpg` and `<key>.txt`, or `<key>.npy` and
# `<key>.json` for latents. Their sizes, from which the place of every sample follows, are in manifest.json.


def shard_name(number: int) -> str:
    return f"{number:05d}"


def hidden(path: Path) -> Path:
    """The name under which a file is written until it is whole."""
    return path.with_name(f".{path.name}.part")


def data_offsets(image_bytes: Sequence[int], caption_bytes: Sequence[int]) -> np.ndarray:
    """Where the data of each sample's two members start in their tar: (samples, 2), int64.

    A member takes 512 bytes of header, and its data up to a multiple of 512.
    """
    sizes = np.stack([image_bytes, caption_bytes], axis=1).astype(np.int64)
    taken = 512 + (sizes + 511) // 512 * 512
    return np.cumsum(taken).reshape(sizes.shape) - taken + 512


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> dict[str, Any]:
    """Write (key, {suffix: content}) samples, an image or latents first and captions second, until it is on the disk.

    Returns the shard's entry in the manifest, by its final name if `path` is a `hidden` one.
    """
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for suffix, content in members.items():
                header = tarfile.TarInfo(f"{key}{suffix}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
            tar.members.clear()  # tarfile would keep a kilobyte for every member
    sync(path)
    return entry_of(path) | {"name": path.name.removeprefix(".").removesuffix(".part")}


def write_shard(folder: Path, name: str, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> dict[str, Any]:
    """Write `NAME.tar`, see `write_tar`. Where the disk does not take it, nothing of it is left."""
    path = folder / f"{name}.tar"
    try:
        entry = write_tar(hidden(path), samples)
        put_in_place(hidden(path), path)
    except OSError:
        hidden(path).unlink(missing_ok=True)
        raise
    return entry


def write_manifest(folder: Path, head: dict[str, Any], entries: Sequence[str]) -> None:
    """Replace manifest.json in one step; `entries` are the shards' own, as JSON texts."""
    path = folder / "manifest.json"
    start = json.dumps(head, indent=1).removesuffix("\n}")
    hidden(path).write_text(start + ',\n "shards": [\n  ' + ",\n  ".join(entries) + "\n ]\n}\n")
    put_in_place(hidden(path), path)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What manifest.json says, None if there is none. Raises UserError if it is damaged or something else."""

    def compact(record: dict[str, Any]) -> dict[str, Any]:
        # As each shard's record is read: Python's own lists would take 80 bytes for every sample of them all.
        return {key: np.array(v, "u4") if key in ("image_bytes", "caption_bytes") else v for key, v in record.items()}

    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(), object_hook=compact)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OverflowError, OSError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {error}") from None
    shards, latents = (manifest.get(key) if isinstance(manifest, dict) else None for key in ("shards", "latents"))
    facts = {"vae", "scaling_factor", "resolution", "variants"}
    known = latents is None or (isinstance(latents, dict) and facts <= latents.keys())
    if not isinstance(shards, list) or not known or not all(is_entry(shard, manifest) for shard in shards):
        raise UserError(f"{path} is not one that data.py wrote: without it, training reads every *.tar beside it.")
    return manifest


def is_entry(shard: Any, manifest: Mapping[str, Any]) -> bool:
    """Whether this is an entry of a manifest, from which the places of a shard's samples follow, if it has some."""
    types = {"name": str, "bytes": int, "sha256": str, "count": int}
    if not isinstance(shard, dict) or not all(isinstance(shard.get(key), kind) for key, kind in types.items()):
        return False
    images, captions = (np.shape(shard.get(key)) for key in ("image_bytes", "caption_bytes"))
    return bool(manifest.get("captions_only")) or (len(images) == 1 and images == captions)


def latents_of(folder: Path) -> dict[str, Any] | None:
    """What the manifest of a folder says of its latents; None if they are images, or if it can't be read."""
    try:
        return (read_manifest(folder) or {}).get("latents")
    except UserError:
        return None


COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}


def walk_tar(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield each file's name, and where its data start and their size.

    Raises UserError for a tar that is empty, cut, or goes on after its end.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            while member := tar.next():
                tar.members.clear()  # tarfile would keep a kilobyte for every member
                if not member.isdir():
                    yield member.name, member.offset_data, member.size
            tar.fileobj.seek(tar.offset)
            rest = iter(functools.partial(tar.fileobj.read, MIB), b"")
            whole = next(rest, b"").startswith(bytes(512))  # an archive ends in blocks of zeros
            tar.fileobj.seek(tar.offset)
            goes_on = any(block.strip(b"\0") for block in rest)
    except (tarfile.TarError, EOFError) as error:
        with open(path, "rb") as file:
            start = file.read(6)
        if kind := next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None):
            compressed = f"{path} is compressed ({kind}), so no sample of it can be found: decompress it first."
            raise UserError(compressed) from None
        raise UserError(f"{path} is empty or cut short ({error}): fetch it again or remove it.") from None
    if not whole:
        raise UserError(f"{path} is cut short (its end is missing): fetch it again or remove it.")
    if goes_on:  # what comes there is seen by no reader of tars
        why = "two tars joined, or damaged"
        raise UserError(f"{path} goes on after its end ({why}): make one tar of it, or two files.")


def split_member(name: str) -> tuple[str, str]:
    """(key, suffix) of a member, split at the last dot: keys may have dots of their own (`shop_4.04.jpg`)."""
    key, suffix = os.path.splitext(name)
    return key, suffix.lower()


def codec_of(start: bytes) -> str:
    """The encoding of a text file, by its mark; UTF-8 where it has none."""
    marks = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    return next((codec for mark, codec in marks.items() if start.startswith(mark)), "utf-8-sig")


def decode_text(content: bytes) -> str | None:
    """A text file's content without its marks; None where it cannot be decoded."""
    try:
        return content.decode(codec_of(content)).lstrip("\ufeff")
    except UnicodeDecodeError:
        return None


def record_of(content: bytes) -> dict[str, Any]:
    """What a .json file holds; nothing where it is damaged, or no record."""
    try:
        record = json.loads(decode_text(content) or "null")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def caption_entries(caption_column: str) -> tuple[str, ...]:
    """The entries of .json files that may hold the caption: img2dataset's too, where no other is asked for."""
    return ("text", "caption") if caption_column == "text" else (caption_column,)


def caption_in(content: bytes, is_json: bool, entries: Sequence[str]) -> Any:
    """The caption, or the list of them, in a .txt or .json file; None where there is none."""
    if not is_json:
        return decode_text(content)
    record = record_of(content)
    return next((record[entry] for entry in entries if entry in record), None)


def entry_of(path: Path) -> dict[str, Any]:
    """The manifest's entry of a shard. Raises UserError where it is cut, or none that `write_tar` wrote."""
    starts, sizes = np.array([place for _, *place in walk_tar(path)], np.int64).reshape(-1, 2).T.tolist()
    entry = {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path), "count": len(sizes) // 2}
    entry |= {"image_bytes": sizes[::2], "caption_bytes": sizes[1::2]}
    if len(sizes) % 2 or starts != data_offsets(sizes[::2], sizes[1::2]).flatten().tolist():
        raise UserError(f"{path} is not a shard of images, or latents, and captions in turn: move it away.")
    return entry


@functools.lru_cache(16)
def npy_layout(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type that the header of a .npy file gives; parsing it takes longer than reading the rest."""
    return np.lib.format.read_array_header_1_0(io.BytesIO(header[8:]))


def write_npy(values: np.ndarray) -> bytes:
    """The content of a .npy file of these values."""
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


def read_npy(content: bytes) -> np.ndarray:
    """What `np.save` wrote, in the order of C. Raises ValueError where it is damaged."""
    start = 10 + int.from_bytes(content[8:10], "little")
    shape, _, dtype = npy_layout(content[:start])
    if dtype.hasobject:  # pickled: loading them can run any code
        raise ValueError("it holds objects, which are not loaded (allow_pickle=False)")
    return np.frombuffer(content, dtype, offset=start).reshape(shape)


MEMBERS = IMAGE_SUFFIXES | {".npy", ".txt", ".json", ".caption"}  # .caption: to say that it is not read

# Where a sample's image and caption lie: 29 bytes for each.
PLACE = np.dtype(
    [("shard", "u4"), ("image", "i8"), ("image_bytes", "u4")]
    + [("caption", "i8"), ("caption_bytes", "u4"), ("json", "?")]
)


def shards_in(folder: Path) -> list[Path]:
    """The shards that lie in a folder, by name; a folder called like one is none, nor is a hidden file."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in paths if path.suffix.lower() == ".tar" and path.name[0] != "." and not path.is_dir()]


class Rows(Sequence):
    """Samples read in place, with an account of what is not used of the images that are there.

    `rows[i]` is `{"image": {"bytes": ...}, "text": caption}`, as `datasets` gives an undecoded row, and
    `rows.caption(i)` its caption alone, without reading the image.
    """

    def __init__(self) -> None:
        self.images = 0  # that are there
        self.left_out: dict[str, tuple[int, str]] = {}  # by kind: how many, and the name of one
        self.notes: list[str] = []  # what else a user may not expect, in sentences

    def leave_out(self, kind: str, name: str) -> None:
        """Count one of a kind that is not used."""
        count, example = self.left_out.get(kind, (0, name))
        self.left_out[kind] = count + 1, example

    def describe(self) -> list[str]:
        """How many images are there, how many are used and why the others are not, in sentences."""
        used = f"{self.images:,} images are there, {len(self):,} samples are used."
        return [f"{used} {self.describe_left_out()}".strip(), *self.notes]

    def describe_left_out(self) -> str:
        """What is not used, in a sentence; none where all is."""
        kinds = [f"{count:,} {kind} ({example})" for kind, (count, example) in self.left_out.items()]
        return f"Left out: {', '.join(kinds)}." if kinds else ""


class ShardFolder(Rows):
    """Shards read in place: the samples of `*.tar`, found by their offsets.

    Rows of latents have "latents", "enlarged" and "fault" too, and a list of captions. With a `manifest.json` the
    offsets are computed from it and checked against each tar's size; else every tar is walked once, and images and
    captions are paired by their key, in whatever order they come. Raises `UserError` for an empty, cut, compressed or
    missing tar and for a key that a tar has twice, and `OSError` for a sample whose tar was cut since.
    """

    def __init__(self, folder: Path, caption_column: str = "text") -> None:
        super().__init__()
        self.caption_column = caption_column
        self._entries = caption_entries(caption_column)
        manifest = read_manifest(folder)
        if manifest and manifest.get("captions_only"):
            raise UserError(f"{folder} holds captions without images: --caption_pool reads them.")
        self.latents: dict[str, Any] | None = manifest.get("latents") if manifest else None
        if manifest:
            if not manifest.get("complete", True):
                what = f"{folder / 'manifest.json'} is of an unfinished download: training on what is there."
                warnings.warn(what, stacklevel=2)
            self.paths = [folder / shard["name"] for shard in manifest["shards"]]
            tables = [self._computed(*pair) for pair in zip(self.paths, manifest["shards"], strict=True)]
            self.images = sum(map(len, tables))
            for path in sorted(set(shards_in(folder)) - set(self.paths)):
                self.leave_out("shards that manifest.json does not name", path.name)
        else:
            self.paths = shards_in(folder)
            progress = progress_bar(self.paths, desc="Indexing shards", unit="shard", disable=len(self.paths) < 10)
            tables = [self._walked(path) for path in progress]
        for number, table in enumerate(tables):
            table["shard"] = number
        self.places = np.concatenate([np.zeros(0, PLACE), *tables])
        for name in sorted(files_below(folder)):
            _, suffix = split_member(name)
            if suffix in IMAGE_SUFFIXES:
                self.images += 1
                self.leave_out("images beside the shards", name)
            elif suffix == ".tar" and os.path.dirname(name):
                self.leave_out("shards in folders below", name)
            elif name.lower().endswith(PACKED):
                self.leave_out("compressed archives", name)
        for path in sorted(folder.glob("*.tar/")):
            self.leave_out("folders called like shards", path.name)
        self._look_for_captions()

    def _look_for_captions(self) -> None:
        # Of a caption's entry in json that no sample has, nothing would be said until all samples were tried.
        in_json = np.flatnonzero(self.places["json"])
        if self.latents is not None or not len(in_json):
            if self.caption_column != "text" and len(self):
                self.notes.append(f"--caption_column {self.caption_column} is not read: captions are .txt files.")
            return
        tried = in_json[np.linspace(0, len(in_json) - 1, min(len(in_json), 16)).astype(int)]
        keys = set().union(*(record_of(*self._read(self.places[index], "caption")) for index in tried))
        if not keys & set(self._entries):
            found = ", ".join(sorted(keys)) or "nothing"
            where = f"the .json files of {self.paths[0].parent} have no entry {' or '.join(self._entries)}"
            raise UserError(f"--caption_column {self.caption_column}: {where}; they have {found}.")

    @staticmethod
    def _computed(path: Path, shard: Mapping[str, Any]) -> np.ndarray:
        offsets = data_offsets(shard["image_bytes"], shard["caption_bytes"])
        found = path.stat().st_size if path.is_file() else None
        if found != shard["bytes"] or (len(offsets) and offsets[-1, 1] + int(shard["caption_bytes"][-1]) > found):
            raise UserError(f"{path} has {found} bytes where manifest.json says {shard['bytes']}: fetch it again.")
        table = np.zeros(len(offsets), PLACE)
        table["image"], table["caption"] = offsets.T
        table["image_bytes"], table["caption_bytes"] = shard["image_bytes"], shard["caption_bytes"]
        return table

    def _walked(self, path: Path) -> np.ndarray:
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        for name, start, size in walk_tar(path):
            key, suffix = split_member(name)
            if suffix in UNREAD_SUFFIXES:
                self.leave_out("of a kind that Pillow does not read", f"{path.name}: {name}")
            if suffix not in MEMBERS or "/._" in f"/{name}":
                continue  # a Mac's `._` twins are no samples
            if suffix in samples.setdefault(key, {}):
                raise UserError(f"{path} holds {name} twice: give every sample of a shard a key of its own.")
            samples[key][suffix] = start, size
        rows: list[tuple[int, int, int, int, int, bool]] = []
        for key, members in samples.items():
            images = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
            captions = [(*members[suffix], suffix == ".json") for suffix in (".txt", ".json") if suffix in members]
            self.images += len(images)
            if ".npy" in members and not images:
                raise UserError(f"{path} holds latents, which need their manifest.json: it is not there.")
            if images and captions:
                rows.append((0, *members[images.pop(0)], *captions[0]))
            elif captions:
                self.leave_out("captions without an image", f"{path.name}: {key}")
            unread = " (.caption is not read)" if ".caption" in members else ""
            reason = "of a key that has another image" if captions else f"without .txt or .json{unread}"
            for suffix in images:
                self.leave_out(reason, f"{path.name}: {key}{suffix}")
        return np.array(rows, PLACE)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self.places[index]
        image, caption = self._read(place, "image", "caption")
        if self.latents is None:
            return {"image": {"bytes": image}, "text": caption_in(caption, place["json"], self._entries)}
        try:
            record = json.loads(caption)
            row = {"image": {"bytes": image}, "latents": read_npy(image) if image else None}
            facts = {"enlarged": record.get("enlarged", False), "fault": record.get("fault")}
            return row | facts | {"text": list(record["captions"])}
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            raise OSError(f"{self.paths[place['shard']]} is damaged ({type(error).__name__}: {error})") from None

    def caption(self, index: int) -> Any:
        """The caption, or the list of them, of a sample. Raises `OSError` as reading a sample does."""
        place = self.places[index]
        entries = self._entries if self.latents is None else ("captions",)
        return caption_in(*self._read(place, "caption"), place["json"] or self.latents, entries)

    def _read(self, place: np.void, *members: str) -> list[bytes]:
        # Opened anew for each sample: nothing to share with workers and no limit on the number of shards.
        path, contents = self.paths[place["shard"]], []
        with open(path, "rb", buffering=0) as shard:
            for member in members:
                shard.seek(int(place[member]))
                contents.append(shard.read(int(place[f"{member}_bytes"])))
                if len(contents[-1]) < place[f"{member}_bytes"]:
                    raise OSError(f"{path} is cut short")
        return contents

    def fingerprint(self) -> str:
        """A digest of which samples there are, and of the sizes and times of their files."""
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        return hashlib.blake2b(repr((files, self.caption_column)).encode() + self.places.tobytes()).hexdigest()

    def select(self, indices: Sequence[int]) -> "ShardFolder":
        """Keep these samples only, in this order."""
        self.places = self.places[indices]
        return self


PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def files_below(folder: Path) -> Iterator[str]:
    """All files below a folder, by their paths from it; links are followed. Raises UserError.

    What begins with a dot is left out, and a Mac's __MACOSX.
    """

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.")

    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        shown, here = [name for name in folders if name[0] != "." and name != "__MACOSX"], Path(place).resolve()
        folders[:] = [name for name in shown if not here.is_relative_to(Path(place, name).resolve())]  # no way back up
        inside = os.path.relpath(place, folder)
        yield from (os.path.normpath(os.path.join(inside, name)) for name in names if name[0] != ".")


def why_no_images(folder: Path) -> list[str]:
    """A sentence where a folder without shards holds no image either: what there is, and which flag reads it."""
    if any(split_member(name)[1] in IMAGE_SUFFIXES for name in files_below(folder)):  # no further than the first
        return []
    names, problem = sorted(files_below(folder)), f"--train_data_dir {folder} holds neither *.tar shards nor images"
    suffixes = {split_member(name)[1]: name for name in names}
    if ".tar" in suffixes:
        return [f"{problem}; there are shards in {os.path.dirname(suffixes['.tar'])}: name that folder."]
    if packed := [name for name in names if name.lower().endswith(PACKED)]:
        return [f"{problem}, but a compressed archive ({packed[0]}): decompress it first."]
    if unread := UNREAD_SUFFIXES & suffixes.keys():
        return [f"{problem}, but {suffixes[min(unread)]}, of a kind that Pillow does not read: convert such files."]
    if {".parquet", ".arrow", ".csv", ".jsonl"} & suffixes.keys():
        return [f"{problem}, but tables: --dataset_name {folder} reads them."]
    if ".zip" in suffixes:
        return [f"{problem}, but {suffixes['.zip']}: unpack it, or --dataset_name {folder} reads it."]
    return [f"{problem}."]


def read_metadata(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metadata file. Raises UserError, with the line, where it is cut or damaged."""
    with open(path, "rb") as file:
        codec = codec_of(file.read(4))
    try:
        if path.suffix == ".parquet":
            yield from pq.read_table(path).to_pylist()
        elif path.suffix == ".csv":
            import pandas

            for record in pandas.read_csv(path, dtype=str, encoding=codec).to_dict("records"):
                yield {key: value if isinstance(value, str) else None for key, value in record.items()}
        else:
            with open(path, encoding=codec) as file:
                for number, line in enumerate(file, 1):
                    try:
                        record = json.loads(line) if line.strip() else None
                    except ValueError as error:
                        raise UserError(f"{path}, line {number}, is no JSON: is the file whole? ({error})") from None
                    if isinstance(record, dict):
                        yield record
                    elif record is not None:
                        raise UserError(f'{path}, line {number}, holds no record, as {{"file_name": ...}} is one.')
    except UserError:
        raise
    except (OSError, ValueError) as error:  # of pandas, pyarrow and the decoder, too
        raise UserError(f"{path} cannot be read: {error}") from None


class ImageFolder(Rows):
    """Images below a folder, with captions from the nearest metadata file, or from a text file beside each image.

    A metadata file has a record for each image: `file_name`, from the file's own folder, and `caption_column`. Text
    files have the image's name with `caption_extension`, or with .txt or .caption. Nothing in a name makes a split.
    Raises `UserError` for a metadata file that cannot be used, and `OSError` for a file that has vanished since.
    """

    def __init__(self, folder: Path, caption_column: str = "text", caption_extension: str | None = None) -> None:
        super().__init__()
        self.folder, self.caption_column = folder, caption_column
        names = sorted(files_below(folder))
        there = {"".join(split_member(name)): name for name in names}  # .TXT is a text file too
        images = [name for name in names if split_member(name)[1] in IMAGE_SUFFIXES]
        self.images, captions = len(images), self._read_captions(names, set(images))
        extensions = [caption_extension] if caption_extension else [".txt", ".caption"]
        rows, ignored, repeats = [], [], set()
        for name in images:
            stem, _ = split_member(name)
            beside = [there[stem + extension] for extension in extensions if stem + extension in there]
            ignored += beside[name not in captions :]
            if name in captions:
                rows.append((os.fsencode(name), None, json.dumps(captions[name])))
            elif beside:
                rows.append((os.fsencode(name), os.fsencode(beside[0]), None))
                repeats |= {part for part in Path(name).parts[:-1] if re.fullmatch(r"\d+_.+", part)}
            else:
                self.leave_out("without a caption", name)
        for name in names:
            _, suffix = split_member(name)
            if suffix in UNREAD_SUFFIXES:
                self.leave_out("of a kind that Pillow does not read", name)
            elif suffix == ".tar":
                self.leave_out("shards in folders below", name)
            elif name.lower().endswith((".zip", *PACKED)):
                self.leave_out("archives", name)
        if ignored:
            first = f"{len(ignored):,} text files are not read, {ignored[0]} among them"
            self.notes.append(f"{first}: {'metadata wins' if captions else 'of two beside an image one is'}.")
        if repeats:
            self.notes.append(f"The repeats in folders' names ({min(repeats)}) are not applied.")
        if caption_column != "text" and not captions:
            self.notes.append(f"--caption_column {caption_column} is not read: there is no metadata file.")
        if images and not rows:
            beside = f"{' or '.join(extensions)} beside each image"
            wanted = f"a metadata.jsonl with file_name and {caption_column}, or {beside}, has captions"
            found = ", ".join([name for name in names if split_member(name)[1] not in IMAGE_SUFFIXES][:3])
            columns = f"--caption_column {caption_column} is not there; the columns are image"
            raise UserError(f"{columns}: {wanted}{found and f'; there is {found}'}. {self.describe_left_out()}")
        # Names as the system's bytes: in a locale of ASCII they hold what is no text.
        schema = pa.schema({"image": pa.large_binary(), "text_file": pa.large_binary(), "caption": TEXT})
        self.table = pa.table([[row[column] for row in rows] for column in range(3)], schema=schema)

    def _read_captions(self, names: Sequence[str], images: set[str]) -> dict[str, Any]:
        captions: dict[str, Any] = {}
        said_in: dict[str, str] = {}  # the folder whose metadata has an image's caption
        twice: list[str] = []
        metadata = [name for name in names if os.path.basename(name) in METADATA]
        for name in sorted(metadata, key=lambda name: name.count(os.sep)):  # the nearest to an image has the last word
            path = self.folder / name
            columns: dict[str, None] = {}  # a dict keeps their order
            for record in read_metadata(path):
                columns |= dict.fromkeys(record)
                file_name = str(record.get("file_name"))
                image = self._image_of(os.path.dirname(name), file_name, images)
                if image is None:
                    self.leave_out("captions whose image is not there", f"{name}: {file_name}")
                elif isinstance(caption := record.get(self.caption_column), (str, list)):
                    twice += [image] if said_in.get(image) == os.path.dirname(name) else []
                    captions[image], said_in[image] = caption, os.path.dirname(name)
                elif caption is not None:
                    self.leave_out("captions that are no text", f"{name}: {file_name}")
            for column, flag in (("file_name", ""), (self.caption_column, "--caption_column ")):
                if columns and column not in columns:
                    raise UserError(f"{flag}{column} is not there; the columns are {', '.join(columns)}, in {path}.")
        if twice:
            self.notes.append(f"{len(twice):,} captions are replaced by later ones of the metadata ({twice[0]}).")
        return captions

    def _image_of(self, place: str, file_name: str, images: set[str]) -> str | None:
        for name in (file_name, file_name.replace("\\", "/")):  # as Windows writes paths
            name = os.fsdecode(name.encode("utf-8", "surrogatepass"))
            real = os.path.isabs(name) and os.path.relpath(os.path.realpath(name), os.path.realpath(self.folder))
            if (path := os.path.normpath(real or os.path.join(place, name))) in images:
                return path
        return None

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.folder / os.fsdecode(self.table["image"][int(index)].as_py())
        return {"image": {"bytes": path.read_bytes(), "path": str(path)}, "text": self.caption(index)}

    def caption(self, index: int) -> Any:
        """The caption, or the list of them, of a sample. Raises `OSError` where its file has vanished."""
        _, text_file, caption = (column[int(index)].as_py() for column in self.table.columns)
        return decode_text((self.folder / os.fsdecode(text_file)).read_bytes()) if text_file else json.loads(caption)

    def select(self, indices: Sequence[int]) -> "ImageFolder":
        """Keep these samples only, in this order."""
        self.table = self.table.take(pa.array(indices)).combine_chunks()
        return self

    def fingerprint(self) -> str:
        """A digest of which samples there are, and of the sizes and times of their files."""
        digest = hashlib.blake2b(digest_size=16)
        for name, text_file, caption in zip(*(column.to_pylist() for column in self.table.columns), strict=True):
            paths = [self.folder / os.fsdecode(file) for file in (name, text_file) if file]
            files = [path.stat() for path in paths if path.exists()]  # a broken link is counted when it is read
            digest.update(repr((name, caption, [(file.st_size, file.st_mtime_ns) for file in files])).encode())
        return digest.hexdigest()


def read_captions(source: Path, caption_column: str, caption_extension: str | None) -> Iterator[Any]:
    """A caption, or a list of them, for every sample of shards, with or without images, of a folder of images, or for
    every line of a text file, in order. Raises as their readers do."""
    if source.is_file():
        with open(source, "rb") as file:
            codec = codec_of(file.read(4))
        with open(source, encoding=codec, errors="replace") as lines:
            yield from (line.rstrip("\n") for line in lines)
    elif shards := shards_in(source):
        entries = caption_entries(caption_column)
        if manifest := read_manifest(source):  # what it does not name is of a run that has not ended
            shards = [source / shard["name"] for shard in manifest["shards"]]
            found = [(shard["name"], tar_fault(source / shard["name"], shard, False)) for shard in manifest["shards"]]
            if manifest.get("captions_only") and not manifest.get("complete"):
                found.append(("manifest.json", "says that it is not finished"))
            if faults := [f"{name} {fault}" for name, fault in found if fault]:
                raise UserError(f"{source}: {faults[0]}; the command that made the folder goes on, and mends it.")
            entries = ("captions",) if "latents" in manifest else entries
        for path in shards:
            members: dict[str, tuple[int, int, bool]] = {}  # one caption for each key, as training reads them
            for name, start, size in walk_tar(path):
                key, suffix = split_member(name)
                if "/._" not in f"/{name}" and (suffix == ".txt" or (suffix == ".json" and key not in members)):
                    members[key] = start, size, suffix == ".json"
            with open(path, "rb") as shard:
                for start, size, is_json in members.values():
                    shard.seek(start)
                    yield caption_in(shard.read(size), is_json, entries)
    else:
        rows = ImageFolder(source, caption_column, caption_extension)
        yield from map(rows.caption, range(len(rows)))


def captions_fingerprint(source: Path, caption_column: str, caption_extension: str | None) -> str:
    """What tells whether `read_captions` gives the same: quick however many captions there are."""
    if source.is_file():
        size, lines = source.stat().st_size, []
        with open(source, "rb") as file:
            for start in np.linspace(0, size, 256, dtype=int).tolist():
                file.seek(start)
                lines.append(file.readline(4096))
        facts = size, source.stat().st_mtime_ns, lines
    elif manifest := read_manifest(source):
        facts = [shard.get("sha256") for shard in manifest["shards"]]
    elif shards := shards_in(source):
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards]
    else:
        facts = ImageFolder(source, caption_column, caption_extension).fingerprint()
    return hashlib.blake2b(repr((facts, caption_column)).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Captions: tables from the Hub or from the disk, read in batches, so that memory stays flat.

Files = list[tuple[str, Path]]  # name, as in the repository or folder, and local path


def fetch_captions(dataset_name: str, revision: str | None) -> tuple[str, Files]:
    """Download the parquet files of a Hub dataset. Returns its commit and (name in the repository, local file) pairs.

    Where the Hub can't be asked, a local cache that holds them all will do. Raises UserError if the Hub refuses,
    DataError for what may pass, and if a file differs from the hash that the Hub gave for it.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub as hub  # not at the top: workers import this file too, and need none of it
    from huggingface_hub import errors

    def refuse(what: str, kind: type[Exception] = UserError) -> NoReturn:
        raise kind(f"--dataset_name {dataset_name}: {what}") from None

    wanted = {"repo_id": dataset_name, "repo_type": "dataset", "allow_patterns": "*.parquet"}
    passing = errors.HTTPError, errors.HFValidationError, OSError, RuntimeError  # some do; the last is hf_xet's

    try:
        folder, listed = download_tables(wanted, revision, passing)
    except passing as error:
        what, kind = hub_problem(error, revision)
        # What was deleted, or closed to us, may be in the cache: a commit never changes.
        known = isinstance(error, errors.OfflineModeIsEnabled) or re.fullmatch("[0-9a-f]{40}", revision or "")
        if kind is UserError and not known:
            refuse(what)
        try:
            folder = Path(hub.snapshot_download(**wanted, revision=revision, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            refuse(f"{what}, and the local cache does not hold it all", kind)
        listed = rest_of(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))
        print(f"The captions come from the local cache: {what}.")
    commit = folder.name
    files = [(path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*.parquet"))]
    if missing := {name for name in listed if name.endswith(".parquet")} - {name for name, _ in files}:
        refuse(f"the local cache lacks {', '.join(sorted(missing))}, and the Hub did not give it", DataError)
    for name, path in files:
        if not matches_blob_name(path):  # plain HTTP downloads are not checked by huggingface_hub: once more
            try:
                hub.hf_hub_download(dataset_name, name, repo_type="dataset", revision=commit, force_download=True)
            except (errors.HTTPError, OSError, RuntimeError) as error:
                refuse(f"{name} is damaged in the local cache, and {hub_problem(error, revision)[0]}", DataError)
            if not matches_blob_name(path):
                refuse(f"{name} arrived damaged twice: its hash is not the Hub's", DataError)
    if not files:
        refuse(f"commit {commit} holds no parquet file")
    return commit, files


def download_tables(wanted: dict[str, str], revision: str | None, passing: tuple[type, ...]) -> tuple[Path, set[str]]:
    """Ask the Hub, and download what it has. Returns the cache's folder and the names of all files of its commit."""
    import huggingface_hub as hub
    from huggingface_hub import constants, utils

    utils.validate_repo_id(wanted["repo_id"])
    # The library's backoff waits until the Hub answers: its download asks this question once, without.
    branch = urllib.parse.quote(revision or "main", safe="")
    url = f"{constants.ENDPOINT}/api/datasets/{wanted['repo_id']}/revision/{branch}"
    response = utils.http_backoff("GET", url, headers=utils.build_hf_headers(), max_retries=3, timeout=10)
    utils.hf_raise_for_status(response)
    for last_try in (False, True):
        try:
            folder = Path(hub.snapshot_download(**wanted, revision=revision))
            if folder.name != response.json()["sha"]:  # it fell silent, and the cache had another commit
                folder = Path(hub.snapshot_download(**wanted, revision=response.json()["sha"]))
            return folder, {file["rfilename"] for file in response.json()["siblings"]}
        except passing as error:
            if last_try or hub_problem(error, revision)[1] is UserError:
                raise


def rest_of(names: Iterable[str]) -> set[str]:
    """The files that `00000-of-00004` in the names of some promises: an incomplete cache shows without the Hub."""
    parts = [re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.parquet)", name) for name in names]
    return {f"{part[1]}{number:05d}{part[2]}" for part in parts if part for number in range(int(part[3]))}


def hub_problem(error: Exception, revision: str | None) -> tuple[str, type[Exception]]:
    """What huggingface_hub raised in words, and what it ends a run as: DataError for what may pass, else UserError."""
    from huggingface_hub import errors

    if isinstance(error, OSError) and error.errno:
        raise error  # the disk's
    known = {
        errors.GatedRepoError: "this dataset is gated; ask for access on its page, then log in with `hf auth login`",
        errors.RepositoryNotFoundError: "no such dataset is on the Hub, or it is private and you are not logged in",
        errors.RevisionNotFoundError: f"it has no --revision {revision}",
        errors.HFValidationError: str(error).partition("\n")[0],
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set",
    }  # a subclass comes before its base
    if words := next((words for kind, words in known.items() if isinstance(error, kind)), None):
        return words, UserError
    while (response := getattr(error, "response", None)) is None and error.__cause__ is not None:
        error = error.__cause__  # "the cache lacks a file", it says, when the Hub did not give it: the cause says why
    if response is None:
        return f"the Hub can't be reached ({type(error).__name__})", DataError
    what = f"the Hub answered {response.status_code} to {urllib.parse.urlsplit(str(response.url)).path}"
    if response.status_code in (408, 429) or response.status_code >= 500:
        return what, DataError
    return f"{what}: {getattr(error, 'server_message', None) or 'it refuses'}", UserError


def matches_blob_name(path: Path) -> bool:
    """Whether a file of the Hub's cache is what the Hub said: its blob is named by its SHA-256, or git's SHA-1."""
    blob = path.resolve()
    if blob.parent.name != "blobs":
        raise DataError("the Hub's cache holds no links, so hashes are unknown; set HF_HOME to a disk that has them")
    if len(blob.name) == 40:
        content = blob.read_bytes()  # a file small enough to be kept in git itself
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == blob.name
    return file_sha256(blob) == blob.name


TABLE_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json", ".txt")


def table_kind(path: Path) -> str:
    """The suffix that says how a table is to be read, ".csv" of "a.CSV.gz" too."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def local_captions(caption_file: str) -> Files:
    """The (name, path) pairs of one table, or of those of one kind directly inside a folder, by name."""
    path = Path(caption_file)
    files = [file for file in sorted(path.iterdir()) if file.name[0] not in "._"] if path.is_dir() else [path]
    files = [file for file in files if file.is_file()]
    if not files:
        raise UserError(f"--caption_file {caption_file}: no such parquet file or other table, nor a folder of some")
    kinds = [kind for kind in TABLE_SUFFIXES if kind in set(map(table_kind, files))]
    if not kinds:
        raise UserError(f"--caption_file {caption_file}: no such kind of table; it reads {', '.join(TABLE_SUFFIXES)}")
    if len(kinds) > 1 and kinds[0] != ".parquet":  # beside parquet files lie others that are no tables
        raise UserError(f"--caption_file {caption_file} holds {', '.join(kinds)}: name one of the files")
    return [(file.name, file) for file in files if table_kind(file) == kinds[0]]


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


COMPARISONS = {">=": pc.greater_equal, "<=": pc.less_equal, "==": pc.equal, "!=": pc.not_equal}
COMPARISONS |= {">": pc.greater, "<": pc.less}  # after those that begin with them


def parse_filter(text: str) -> tuple[str, Callable, float | str]:
    """`"punsafe<0.1"` -> (column, pyarrow comparison, value). Text values are quoted. Raises ValueError."""
    match = re.fullmatch(rf"\s*([^<>=!]+?)\s*({'|'.join(COMPARISONS)})\s*(\S(?:.*\S)?)\s*", text)
    if match is None:
        raise ValueError(text)
    column, sign, value = match.groups()
    quoted = re.fullmatch(r"""(["'])(.*)\1""", value)
    return column, COMPARISONS[sign], quoted[2] if quoted else float(value)


TEXT = pa.large_string()
Types = Mapping[str, pa.DataType]  # of columns; tables of text don't say


def open_table(path: Path, columns: Sequence[str], types: Types | None = None) -> Any:
    """pyarrow's reader of batches of a csv, tsv, json, jsonl or txt table; without `types`, to look at its `schema`.

    A .txt has tabs between its columns, and needs no line of names: then they are the first of `columns`.
    """
    import pyarrow.csv
    import pyarrow.json

    kind, blocks = table_kind(path), {"use_threads": False, "block_size": 16 * MIB}
    with pa.input_stream(str(path)) as source:  # which unpacks .gz
        start = source.read(4096)
    codec = codec_of(start)
    source = pa.transcoding_input_stream(pa.input_stream(str(path)), codec, "utf8")
    if kind in (".json", ".jsonl"):
        if start.decode(codec, errors="ignore").lstrip().startswith("["):  # one array, which has to be read as a whole
            lines = (json.dumps(record).encode() for record in json.loads(source.read()))
            source = pa.BufferReader(b"\n".join(lines))
        schema = pa.schema(types.items()) if types else None
        parse = pyarrow.json.ParseOptions(schema, unexpected_field_behavior="ignore" if types else "infer")
        return pyarrow.json.open_json(source, pyarrow.json.ReadOptions(**blocks), parse)
    names = start.decode(codec, errors="ignore").partition("\n")[0].strip().split("\t")
    bare = kind == ".txt" and columns[0] not in names
    if bare and len(names) > len(columns):
        expected = ", ".join(columns)
        raise UserError(f"{path.name} has {len(names)} columns: give it a first line of names, or only {expected}")
    quotes, delimiter = kind != ".txt", "," if kind == ".csv" else "\t"
    read = pyarrow.csv.ReadOptions(**blocks, column_names=columns[: len(names)] if bare else None)
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, quote_char=quotes and '"', newlines_in_values=quotes)
    convert = pyarrow.csv.ConvertOptions(column_types=types, include_columns=list(types or []))
    return pyarrow.csv.open_csv(source, read, parse, convert)


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """What pyarrow raises for a damaged table as a sentence. An error of the disk has a number, and stays one."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError) or getattr(error, "errno", None):
            raise
        words = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        raise UserError(f"{name} can't be read, it is damaged or another kind of file: {words}") from None


def swallowed_row(batch: pa.RecordBatch) -> str | None:
    """The first value that holds a line with a tab: rows that stand behind a quotation mark without its partner."""
    columns = [column for column in batch.columns if pa.types.is_large_string(column.type)]
    found = (column.filter(pc.match_substring_regex(column, r"\n[^\n]*\t")) for column in columns)
    return next((value.as_py() for values in found for value in values), None)


def read_batches(files: Files, types: Types) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield (number of the first row, counted over all files; batch of these columns, some 32,768 rows or 16 MiB).

    A parquet file knows the types of its columns, in others they are taken to be `types`. Raises UserError.
    """
    first = 0
    for name, path in files:
        with readable(name), contextlib.ExitStack() as stack:
            if table_kind(path) == ".parquet":
                file = stack.enter_context(pq.ParquetFile(path, pre_buffer=False))
                batches = file.iter_batches(32768, columns=list(types), use_threads=False)
            else:
                batches = stack.enter_context(open_table(path, list(types), types))
            for batch in batches:
                if table_kind(path) == ".tsv" and (swallowed := swallowed_row(batch)):
                    raise UserError(
                        f"{name}: a quotation mark takes in the rows after it, from {swallowed[:60]!r} on. Where they "
                        "are not meant to quote anything, call it .txt: then they stay as they are"
                    )
                yield first, batch
                first += len(batch)


def check_columns(files: Files, wanted: dict[str, str]) -> None:
    """Every file must have every wanted column; `wanted` maps the column to the flag that asked for it."""
    for name, path in files:
        with readable(name):
            schema = pq.read_schema(path) if table_kind(path) == ".parquet" else open_table(path, list(wanted)).schema
        for column, flag in wanted.items():
            if column not in schema.names:
                raise UserError(f"{flag}: {name} has no column {column!r}; it has {', '.join(schema.names)}")


def texts(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column as text, white space around it removed. Raises UserError for a column that holds something else."""
    column = batch[name]
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type) or pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return pc.utf8_trim_whitespace(column.cast(TEXT))
    raise UserError(f"column {name!r} holds {column.type}, not text")


def url_hashes(urls: pa.Array) -> np.ndarray:
    """64-bit hashes of URLs, or captions: two of 2.7 million share one with a chance of 1 in 5 million."""
    from pandas.util import hash_array

    return hash_array(np.asarray(urls.to_pylist(), dtype=object), categorize=False)


def select_rows(files: Files, args: argparse.Namespace) -> tuple[np.ndarray, int, dict[str, int]]:
    """Choose the rows to fetch: drop the bad ones, shuffle by the seed, cut to `max_samples`.

    Returns the chosen row numbers (int64, in the order of the output), the number of rows read, and the number dropped
    by reason. Keeps 16 bytes per row in memory.
    """
    filters = [(text, *parse_filter(text)) for text in args.filter]
    dropped: dict[str, int] = {}
    rows, hashes, total = [np.empty(0, np.int64)], [np.empty(0, np.uint64)], 0
    columns = [args.caption_column if args.captions_only else args.url_column, args.caption_column]
    types = dict.fromkeys(columns, TEXT)
    for _, column, _, value in filters:
        types.setdefault(column, TEXT if isinstance(value, str) else pa.float64())
    for first, batch in read_batches(files, types):
        urls, captions = (texts(batch, column) for column in columns)
        on_the_web = pc.match_substring_regex(urls, r"(?i)^https?://[^/?#]")
        good = {} if args.captions_only else {"no URL": pc.not_equal(urls, ""), "URL is not http(s)": on_the_web}
        good["no caption"] = pc.not_equal(captions, "")
        for text, column, compare, value in filters:
            try:
                good[f"filter {text}"] = compare(batch[column], pa.scalar(value))
            except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
                raise UserError(f"--filter {text}: column {column!r} holds {batch[column].type}") from None
        keep = np.ones(len(batch), bool)
        for reason, passed in good.items():
            passes = pc.fill_null(passed, False).to_numpy(zero_copy_only=False)
            dropped[reason] = dropped.get(reason, 0) + int(np.count_nonzero(keep & ~passes))
            keep &= passes
        rows.append(first + np.flatnonzero(keep))
        hashes.append(url_hashes(urls.filter(pa.array(keep))))
        total += len(batch)
    _, firsts = np.unique(np.concatenate(hashes), return_index=True)
    good_rows = np.concatenate(rows)
    dropped["duplicate caption" if args.captions_only else "duplicate URL"] = len(good_rows) - len(firsts)
    chosen = np.random.default_rng(args.seed).permutation(good_rows[np.sort(firsts)])[: args.max_samples]
    return chosen, total, dropped


ROW_SCHEMA = pa.schema(
    {"url": TEXT, "caption": TEXT, "input_row": pa.int64(), "expected_sha256": pa.string(), "position": pa.int64()}
)


def write_shard_inputs(
    files: Files, order: np.ndarray, folder: Path, args: argparse.Namespace, expected: "Hashes | None"
) -> int:
    """Write the chosen rows, in their shuffled order, as `NNNNN.arrow`, one file for each shard. Returns their number.

    Those that `places_to_do` leaves out are not written. They are first dealt into files of about 50,000 that belong
    together, so that memory stays flat.
    """
    per_shard = args.number_sample_per_shard
    per_group = per_shard * max(1, 50_000 // per_shard)
    by_row = np.argsort(order)
    rows, to_do = order[by_row], 0
    group_files = [folder / f"group{number}" for number in range(math.ceil(len(order) / per_group))]
    with contextlib.ExitStack() as stack:
        groups = [stack.enter_context(pa.ipc.new_stream(file, ROW_SCHEMA)) for file in group_files]
        hash_column = [args.verify_hash] if args.verify_hash and expected is None else []
        columns = [*([] if args.captions_only else [args.url_column]), args.caption_column, *hash_column]
        for first, batch in read_batches(files, dict.fromkeys(columns, TEXT)):
            start, end = np.searchsorted(rows, [first, first + len(batch)])
            chosen = batch.take(pa.array(rows[start:end] - first))
            urls = pa.nulls(len(chosen), TEXT) if args.captions_only else texts(chosen, args.url_column)
            if hash_column:
                digests = pc.utf8_lower(texts(chosen, args.verify_hash)).cast(pa.string())
                wrong = digests.filter(pc.invert(pc.match_substring_regex(digests, "^([0-9a-f]{64})?$")))
                if len(wrong):
                    raise UserError(f"--verify_hash {args.verify_hash}: {wrong[0].as_py()!r} is not a SHA-256")
                digests = pc.if_else(pc.equal(digests, ""), None, digests)
            else:
                digests = expected.of(urls) if expected else [None] * len(chosen)
            positions = by_row[start:end]
            arrays = [urls, texts(chosen, args.caption_column), rows[start:end], digests, positions]
            table = pa.record_batch(arrays, schema=ROW_SCHEMA)
            for number in np.unique(positions // per_group):
                groups[number].write_batch(table.filter(pa.array(positions // per_group == number)))
    for number, group_file in enumerate(group_files):
        with pa.ipc.open_stream(group_file) as reader:
            table = reader.read_all().sort_by("position").combine_chunks()
        for start in range(0, len(table), per_shard):
            name, part = shard_name((number * per_group + start) // per_shard), table.slice(start, per_shard)
            places = places_to_do(Path(args.output_dir), name, len(part), args.retry_failed)
            if places:
                with pa.ipc.new_file(folder / f"{name}.arrow", ROW_SCHEMA) as writer:
                    writer.write_table(part.take(pa.array(places)))
            to_do += len(places)
        group_file.unlink()
    return to_do


def caption_tar(positions: Sequence[int], captions: Sequence[str]) -> bytes:
    """A tar of `<position>.txt` files. One header is patched for all: tarfile would take three times as long."""
    header = bytearray(tarfile.TarInfo(f"{0:09d}.txt").tobuf(tarfile.USTAR_FORMAT))
    pieces = []
    for position, caption in zip(positions, captions, strict=True):
        content = caption.encode()
        header[:9], header[124:135] = b"%09d" % position, b"%011o" % len(content)
        header[148:156] = b" " * 8  # the checksum counts itself as spaces
        header[148:156] = b"%06o\0 " % sum(header)
        pieces += [bytes(header), content, bytes(-len(content) % 512)]
    return b"".join(pieces) + bytes(10240)


def write_captions(work: Path, names: Sequence[str], args: argparse.Namespace) -> None:
    """Make shards of captions of the files of `write_shard_inputs`, and the manifest.

    A shard that is there and the same is left as it is: so a run goes on, a folder grows and damage is mended.
    """
    folder, entries = Path(args.output_dir), []
    for name in progress_bar(names, "Writing", unit=" shards"):
        with pa.ipc.open_file(work / f"{name}.arrow") as reader:
            table = reader.read_all()
        content = caption_tar(table["position"].to_pylist(), table["caption"].to_pylist())
        path, digest = folder / f"{name}.tar", hashlib.sha256(content).hexdigest()
        if not path.is_file() or file_sha256(path) != digest:
            hidden(path).write_bytes(content)
            put_in_place(hidden(path), path)
        entries.append(json.dumps({"name": path.name, "bytes": len(content), "sha256": digest, "count": len(table)}))
        (work / f"{name}.arrow").unlink()
    write_manifest(folder, args.request | {"complete": True}, entries)


class Hashes:
    """The SHA-256 of each image of an earlier run, looked up by URL: about 72 bytes of memory per image."""

    def __init__(self, path: Path) -> None:
        files = local_captions(str(path))
        check_columns(files, {"url": "--verify_hash", "sha256": "--verify_hash"})
        urls, digests = [np.empty(0, np.uint64)], [np.empty(0, "S64")]
        for _, batch in read_batches(files, {"url": TEXT, "sha256": pa.string()}):
            batch = batch.filter(pc.is_valid(batch["sha256"]))
            urls.append(url_hashes(texts(batch, "url")))
            digests.append(np.asarray(batch["sha256"].to_pylist(), "S64"))
        order = np.argsort(np.concatenate(urls), kind="stable")
        self.urls, self.digests = np.concatenate(urls)[order], np.concatenate(digests)[order]

    def of(self, urls: pa.Array) -> list[str | None]:
        wanted = url_hashes(urls)
        ends = (np.searchsorted(self.urls, wanted, side) for side in ("left", "right"))
        return [self.digests[start].decode() if start < end else None for start, end in zip(*ends, strict=True)]

    def fingerprint(self) -> str:
        return hashlib.sha256(self.urls.tobytes() + self.digests.tobytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Fetching one URL: only public addresses, a limit on everything that a server can stretch, opt-outs honoured.

REFUSED_NETWORKS = [
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # the host of an Azure machine: looks public, answers only inside
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "2001::/23",  # protocol assignments, Teredo among them: may lead to any IPv4 address
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: leads to the IPv4 address inside
        "3fff::/20",  # documentation
    )
]
GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")
DEFAULT_PORTS = {"http": 80, "https": 443}  # of the schemes that are fetched


def is_public(address: str) -> bool:
    """Whether an address is of the public internet. `ipaddress.is_global` alone is True for several that aren't."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if ip.version == 6 and (ip.ipv4_mapped or ip in NAT64):
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if any(ip in network for network in REFUSED_NETWORKS) or (ip.version == 6 and ip not in GLOBAL_IPV6):
        return False  # outside the global ones are local, mapped, compatible, multicast and unassigned ones
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def resolve(host: str, port: int, allow_private: bool, seconds: float) -> list[tuple]:
    """Look a name up, in at most `seconds`. Returns what `socket.getaddrinfo` does; one private answer refuses all."""
    answer: Future = Future()

    def look_up() -> None:
        try:
            answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answer.set_exception(Refused("dns", f"{host}: {error}"))

    threading.Thread(target=look_up, daemon=True).start()  # in a thread: getaddrinfo takes no time limit
    try:
        found = answer.result(max(0.01, seconds))
    except TimeoutError:
        raise Refused("dns", f"{host}: no answer in time") from None
    for *_, address in found:
        if not allow_private and not is_public(address[0]):
            raise Refused("private_address", f"{host} is {address[0]}")
    return found


class BoundedSocket:
    """Mixed into a socket: no read lasts beyond the request's deadline, nor brings more than `allowance` bytes."""

    deadline = math.inf
    patience = 10.0
    allowance = 0

    def recv_into(self, *args: Any) -> int:
        self.settimeout(max(0.001, min(self.patience, self.deadline - time.monotonic())))
        count = super().recv_into(*args)
        self.allowance -= count
        if self.allowance < 0:
            raise Refused("too_large", "more bytes on the wire than allowed")
        return count


class PlainSocket(BoundedSocket, socket.socket):
    pass


class TLSSocket(BoundedSocket, ssl.SSLSocket):
    pass


@functools.cache
def tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.sslsocket_class = TLSSocket
    return context


class ByteBudget:
    """The bytes that a worker may hold of bodies, beyond the first `FREE` of each. First come, first served.

    `take` waits; what it waited is given back to the request's deadline, since the server is not to blame. While
    somebody waits, no new request begins (`wait_for_calm`), so the number at work settles at what memory allows.
    """

    FREE = 64 * 1024

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self.changed = threading.Condition()
        self.line: collections.deque[object] = collections.deque()

    def take(self, count: int, patience: float) -> float:
        """Reserve `count` bytes. Returns the seconds that it took. Raises Refused("busy") after `patience`."""
        started, ticket = time.monotonic(), object()
        with self.changed:
            self.line.append(ticket)
            ready = self.changed.wait_for(lambda: self.line[0] is ticket and self.used + count <= self.total, patience)
            self.line.remove(ticket)
            self.used += count if ready else 0
            self.changed.notify_all()
        if not ready:
            raise Refused("busy", "no memory free in time for its body")
        return time.monotonic() - started

    def give_back(self, count: int) -> None:
        with self.changed:
            self.used -= count
            self.changed.notify_all()

    def wait_for_calm(self, patience: float) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not self.line, patience)


class Body(io.BytesIO):
    """The bytes of one response. Closing it (which img2dataset does after use) returns them to the budget."""

    def __init__(self, budget: ByteBudget) -> None:
        super().__init__()
        self.budget = budget
        self.claim = 0
        self.sha256 = hashlib.sha256()

    def close(self) -> None:
        self.budget.give_back(self.claim)
        self.claim = 0
        super().close()


def split_url(url: str) -> tuple[str, str, int, str]:
    """(scheme, host, port, target) of an http(s) URL, spaces and non-ASCII letters quoted. Raises Refused."""
    try:
        parts = urllib.parse.urlsplit(url.strip())
        host = (parts.hostname or "").encode("ascii" if ":" in (parts.hostname or "") else "idna").decode("ascii")
        port = parts.port or DEFAULT_PORTS.get(parts.scheme, 0)
    except ValueError as error:  # UnicodeError is one
        raise Refused("bad_url", str(error)) from None
    if parts.scheme not in DEFAULT_PORTS:
        raise Refused("bad_scheme", parts.scheme)
    if not host:
        raise Refused("bad_url", "no host")
    target = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    if parts.query:
        target += "?" + urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?[]|")
    return parts.scheme, host, port, target


def opt_out_of(headers: http.client.HTTPMessage) -> str | None:
    """The X-Robots-Tag header that forbids the use, to everyone or to us. `"otherbot: noai"` does not."""
    for value in headers.get_all("X-Robots-Tag", []):
        robot = "*"  # a name holds for what follows it in the same header
        for part in value.lower().split(","):
            *names, directive = (piece.strip() for piece in part.split(":"))
            robot = names[0] if names and names[0] not in VALUED_DIRECTIVES else robot
            if directive in OPT_OUTS and robot in ("*", ROBOT_NAME):
                return value
    return None


def retry_after(headers: http.client.HTTPMessage) -> float:
    """The seconds that a server asks to wait for: a number or a date in Retry-After, 0 without."""
    value = headers.get("Retry-After", "0").strip()
    with contextlib.suppress(ValueError, OverflowError):  # of a date that there cannot be
        return float(value) if value.isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    return 0


def open_socket(scheme: str, host: str, port: int, args: argparse.Namespace, deadline: float) -> socket.socket:
    """Connect to one of the addresses that were checked; the name is not looked up a second time."""

    def left() -> float:
        return max(0.001, min(args.timeout, deadline - time.monotonic()))

    trouble: Exception = OSError("no address")
    for family, kind, protocol, _, address in resolve(host, port, args.allow_private_addresses, left())[:4]:
        plain = PlainSocket(family, kind, protocol)
        try:
            plain.settimeout(left())
            plain.connect(address)
            plain.settimeout(left())
            wrapped = tls_context().wrap_socket(plain, server_hostname=host) if scheme == "https" else plain
            wrapped.deadline, wrapped.patience = deadline, args.timeout
            return wrapped
        except (OSError, ValueError) as error:
            plain.close()
            trouble = error
            if time.monotonic() > deadline:
                break
    raise trouble


def read_body(response: http.client.HTTPResponse, wire: Any, body: Body, args: argparse.Namespace) -> None:
    """Read a response into `body`: at most `max_bytes`, memory taken from the budget before it is used."""
    too_large = Refused("too_large", f"more than --max_bytes {args.max_bytes}")
    announced = response.length
    if announced is not None and announced > args.max_bytes:
        raise too_large
    wire.allowance = 2 * args.max_bytes + MIB  # chunked coding may be wordy
    size = 0
    while chunk := response.read1(32 * 1024):
        size += len(chunk)
        if size > args.max_bytes:
            raise too_large
        if size > body.budget.FREE and not body.claim:
            claim = args.max_bytes if announced is None else announced
            wire.deadline += body.budget.take(claim, args.deadline)
            body.claim = claim
        body.write(chunk)
        body.sha256.update(chunk)
        if time.monotonic() > wire.deadline:
            raise Refused("deadline", f"not finished within --deadline {args.deadline:g} s")
    if response.length:
        raise Refused("incomplete", f"{size} bytes, {response.length} missing")
    if not size:
        raise Refused("empty", "no bytes")
    if body.claim > size:
        body.budget.give_back(body.claim - size)
        body.claim = size


def request(url: str, body: Body, args: argparse.Namespace) -> None:
    """GET one URL into `body`, following up to five redirects, each checked like the first. Raises Refused."""
    deadline = time.monotonic() + args.deadline
    agent = USER_AGENT % (f"; +{args.user_agent}" if args.user_agent else "")
    try:
        for _ in range(6):
            scheme, host, port, target = split_url(url)
            with open_socket(scheme, host, port, args, deadline) as wire:
                connection = http.client.HTTPConnection(host, port)
                connection.sock, connection.default_port = wire, DEFAULT_PORTS[scheme]
                wire.allowance = 64 * 1024  # for all headers together; http.client alone would take 6 MB of them
                connection.request("GET", target, headers={"User-Agent": agent, "Accept": "image/*"})
                with connection.getresponse() as response:
                    if args.honor_opt_outs and (header := opt_out_of(response.headers)):
                        raise Refused("opt_out", header)
                    if response.status in (301, 302, 303, 307, 308) and response.headers["Location"]:
                        url = urllib.parse.urljoin(url, response.headers["Location"])
                        continue
                    if not 200 <= response.status < 300:
                        raise Refused(f"http_{response.status}", response.reason, retry_after(response.headers))
                    return read_body(response, wire, body, args)
        raise Refused("too_many_redirects")
    except TimeoutError:
        reason = "deadline" if time.monotonic() >= deadline else "timeout"
        raise Refused(reason, "the server was too slow") from None
    except ssl.SSLError as error:
        raise Refused("tls", error.reason or str(error)) from None
    except http.client.IncompleteRead:
        raise Refused("incomplete", "the body ended early") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Refused("network", f"{type(error).__name__}: {error}") from None


def fetch(url: str, args: argparse.Namespace, budget: ByteBudget) -> Body:
    """Fetch one URL, again after a passing failure (`--retries`). Raises Refused with the last reason."""
    failures = busy = 0
    while True:
        budget.wait_for_calm(args.deadline)
        body = Body(budget)
        try:
            request(url, body, args)
            return body
        except Refused as refused:
            body.close()
            passing = refused.reason.startswith(("http_5", *PASSING))
            failures += passing
            busy += refused.reason == "busy"
            again = (passing and failures <= args.retries) or (refused.reason == "busy" and busy <= 2)
            if not again or refused.wait > args.deadline:  # too long to stand still: --retry_failed asks again
                raise
            time.sleep(max(refused.wait, min(4, 0.5 * 2 ** (failures + busy))))


# ---------------------------------------------------------------------------------------------------------------------
# Reading one image: judged by its header before it is decoded, converted in bands, so that a large one is held once.

IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM")
BAND_PIXELS = 2**20
DECODER_BYTES = 125e6  # with the bodies of `ByteBudget`, what a worker may hold beyond what it needs when idle


def decoder_bytes(image: Image.Image, pixels: int) -> float:
    """What decoding takes at its peak, as measured on Pillow 13 (`pixels`: of the source, before any `draft`)."""
    if image.format in ("JPEG", "MPO"):
        areas = [across * down for _, across, down, _ in image.layer]
        coefficients = sum(areas) / max(areas)
        return 2 * coefficients * pixels + 4 * image.width * image.height  # kept whole if there are several scans
    # Of WebP two canvases, one copy and the image; a TIFF's strip, or a second one made to turn it, may be as large.
    return {"WEBP": 17, "AVIF": 10, "TIFF": 8}.get(image.format, 4) * pixels


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """The middle of a decoded image as RGB, `size` pixels wide, or as wide as the image is if that is less."""
    side = min(image.size)
    factor = max(1, side // (2 * size))  # a whole-number box filter first, then Lanczos from at least twice the size
    inside = side - side % factor
    left, top = (image.width - inside) // 2, (image.height - inside) // 2

    def band(y: int, rows: int) -> Image.Image:
        part = to_rgb(image.crop((left, top + y, left + inside, top + y + rows)))
        return part.reduce(factor) if factor > 1 else part

    if inside**2 <= BAND_PIXELS:
        small = band(0, inside)
    else:
        small = Image.new("RGB", (inside // factor, inside // factor))
        rows = factor * max(1, BAND_PIXELS // (inside * factor))
        for y in range(0, inside, rows):
            small.paste(band(y, min(rows, inside - y)), (0, y // factor))
    return small if small.width <= size else small.resize((size, size), Image.Resampling.LANCZOS)


def square_jpeg(stream: BinaryIO, args: argparse.Namespace) -> tuple[bytes, int, int, int]:
    """Decode an image of any kind. Returns (JPEG bytes, its width and height, the source's width, its height).

    Raises Refused: too_small, too_many_pixels, not_an_image, broken_image.
    """
    Image.MAX_IMAGE_PIXELS = None  # ours is stricter, and a refusal instead of a warning
    try:
        image = Image.open(stream, formats=IMAGE_FORMATS)
    except Exception as error:  # a header made to break the parser may raise anything
        words = "unknown format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise Refused("not_an_image", words) from None
    try:
        width, height = image.size
        if min(width, height) < args.min_image_size:
            raise Refused("too_small", f"{width}x{height}")
        if image.format in ("JPEG", "MPO"):
            image.draft(None, (2 * args.image_size, 2 * args.image_size))  # decodes at 1/2, 1/4 or 1/8
        memory = decoder_bytes(image, width * height)
        if width * height > args.max_pixels or memory > max(DECODER_BYTES, 5 * args.max_pixels):
            raise Refused("too_many_pixels", f"{width}x{height} {image.format}")
        check_range(image)
        image.load()
        orientation = None
        with contextlib.suppress(Exception):  # EXIF data that can't be read says nothing
            orientation = image.getexif().get(ExifTags.Base.Orientation)  # loading turns a TIFF, and clears this
        square = centre_square(image, args.image_size)
    except Refused:
        raise
    except Exception as error:
        raise Refused("broken_image", f"{type(error).__name__}: {error}") from None
    if orientation in range(2, 9):
        square.getexif()[ExifTags.Base.Orientation] = orientation  # which a crop forgets
        square = ImageOps.exif_transpose(square)
        width, height = (height, width) if orientation > 4 else (width, height)
    output = io.BytesIO()
    square.save(output, "JPEG", quality=args.encode_quality)
    return output.getvalue(), square.width, width, height


# ---------------------------------------------------------------------------------------------------------------------
# Shards on disk. A shard is done when its parquet is there and its tar has the size that the parquet records; both are
# written under hidden names and renamed, the parquet first. Everything in the manifest can be read back from them.

RESULT_SCHEMA = pa.schema(
    [("key", pa.string()), ("url", pa.large_string()), ("caption", pa.large_string()), ("input_row", pa.int64())]
    + [("status", pa.string()), ("detail", pa.string()), ("sha256", pa.string()), ("downloaded_bytes", pa.int64())]
    + [("original_width", pa.int32()), ("original_height", pa.int32()), ("width", pa.int32()), ("height", pa.int32())]
    + [("jpg_bytes", pa.int64()), ("caption_bytes", pa.int64())]
)


def notes_of(parquet: Path, whole: bool = False) -> dict[bytes, bytes]:
    """What a shard's table notes beside its rows (read too if `whole`); nothing where it is missing or damaged.

    Raises the disk's errors.
    """
    try:
        notes = pq.read_schema(parquet).metadata or {}
        if whole:
            pq.read_table(parquet, page_checksum_verification=True)
        return notes
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        if getattr(error, "errno", None) not in (None, errno.ENOENT):
            raise  # the disk's trouble: the table may be sound
        return {}


def recorded(parquet: Path, whole: bool = False) -> dict[str, Any] | None:
    """What a shard's parquet records of its tar (`name`, `bytes`, `sha256`), or None if it can't be read."""
    notes = notes_of(parquet, whole)
    try:
        digest = notes[b"tar_sha256"].decode()
        return {"name": f"{parquet.stem}.tar", "bytes": int(notes[b"tar_bytes"]), "sha256": digest}
    except (KeyError, ValueError):
        return None


def request_of(parquet: Path) -> dict[str, Any] | None:
    """The manifest's head at the time when a shard was written; None if the file can't be read, or isn't ours."""
    return json.loads(notes_of(parquet).get(b"request", "null"))


def rows_done(folder: Path, name: str, *columns: str) -> pa.Table:
    """Of a shard that is done, the rows (all columns if none is named); of another, none."""
    tar, entry = folder / f"{name}.tar", recorded(folder / f"{name}.parquet")
    if entry is None or not tar.is_file() or tar.stat().st_size != entry["bytes"]:
        return RESULT_SCHEMA.empty_table()
    return pq.read_table(folder / f"{name}.parquet", columns=list(columns) or None)


def commit_shard(folder: Path, name: str, table: pa.Table, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write a shard so that at no moment a part of it can be taken for the whole."""
    tar, parquet = folder / f"{name}.tar", folder / f"{name}.parquet"
    entry = write_tar(hidden(tar), samples)  # on the disk before the parquet that vouches for it has its name
    vouching = {"tar_bytes": str(entry["bytes"]), "tar_sha256": entry["sha256"]}
    table = table.replace_schema_metadata((table.schema.metadata or {}) | vouching)
    pq.write_table(table, hidden(parquet), write_page_checksum=True)
    put_in_place(hidden(parquet), parquet)
    put_in_place(hidden(tar), tar)


def shard_entry(folder: Path, name: str) -> str | None:
    """A shard's entry in the manifest, as JSON text: a quarter of the memory that its lists of sizes would take.

    None if it is not done.
    """
    rows = rows_done(folder, name, "status", "jpg_bytes", "caption_bytes")
    table = rows.filter(pc.equal(rows["status"], "ok"))
    sizes = {"image_bytes": table["jpg_bytes"].to_pylist(), "caption_bytes": table["caption_bytes"].to_pylist()}
    return json.dumps(recorded(folder / f"{name}.parquet") | {"count": len(table)} | sizes) if len(rows) else None


# ---------------------------------------------------------------------------------------------------------------------
# One shard at work, inside a worker.


def download_shard(args: argparse.Namespace, row: tuple[int, str]) -> tuple[bool, tuple[int, str]]:
    """What img2dataset's distributors call in a worker: for a shard's number and the file of its rows."""
    with Shard(*row, args) as shard:
        shard.fetch_all()
        shard.commit()
    return True, row  # "it went well", to them; an error is raised, and ends the run


class Shard(contextlib.AbstractContextManager):
    """Fetches, resizes and writes the rows of one shard; images wait in a spool file for `commit` to order them.

    While it is at work, the spool file is touched every second, see `Heartbeats`.
    """

    def __init__(self, number: int, rows_file: str, args: argparse.Namespace) -> None:
        self.args = args
        self.name = shard_name(number)
        self.folder = Path(args.output_dir)
        with pa.ipc.open_file(rows_file) as reader:
            self.rows = reader.read_all().to_pylist()
        self.outcomes: list[dict[str, Any]] = [{} for _ in self.rows]
        self.budget = ByteBudget(max(48 * MIB, args.max_bytes))
        self.spool_file = Path(rows_file).with_suffix(".spool")
        self.spool = open(self.spool_file, "wb+")
        self.progress = open(Path(rows_file).with_suffix(".progress"), "wb", buffering=0)
        self.over = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        self.progress.close()
        with contextlib.suppress(OSError):  # a full disk, which has been raised already
            self.spool.close()
        self.spool_file.unlink()

    def _beat(self) -> None:
        while not self.over.wait(1):
            with contextlib.suppress(OSError):  # one beat less: the next may go through, or the shard is finished
                os.utime(self.spool_file)

    def fetch_all(self) -> None:
        """Fetch the rows in threads, and decode what arrives here: one image at a time."""
        threads = ThreadPoolExecutor(self.args.thread_count)
        coming = iter(range(len(self.rows)))

        def submit(count: int) -> dict[Future, int]:
            rows = itertools.islice(coming, count)
            return {threads.submit(fetch, self.rows[row]["url"], self.args, self.budget): row for row in rows}

        try:
            waiting = submit(2 * self.args.thread_count)  # no more bodies than these are held
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    self._keep(waiting.pop(future), future)
                    waiting |= submit(1)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _keep(self, index: int, fetched: Future) -> None:
        outcome = self.outcomes[index]
        try:
            with fetched.result() as got:
                digest = got.sha256.hexdigest()
                outcome |= {"sha256": digest, "downloaded_bytes": got.tell()}
                if self.rows[index]["expected_sha256"] not in (None, digest):
                    raise Refused("hash_mismatch", "the image is not the one that the hash was taken of")
                got.seek(0)
                jpg, side, width, height = square_jpeg(got, self.args)
            outcome |= {"original_width": width, "original_height": height, "width": side, "height": side}
            outcome |= {"status": "ok", "jpg_bytes": len(jpg), "offset": self.spool.tell()}
            self.spool.write(jpg)
            self.progress.write(b"+")
        except Refused as refused:
            detail = re.sub(" object at 0x[0-9a-f]+", "", refused.detail)  # would be another in each run
            outcome |= {"status": refused.reason, "detail": detail[:200]}
            self.progress.write(b"-")

    def commit(self) -> None:
        """Put what came of the rows in order, beside what an earlier run had of this shard, under its final name."""
        per_shard = self.args.number_sample_per_shard
        digits = len(str(per_shard - 1))
        old = rows_done(self.folder, self.name).to_pylist()
        old_tar = open(self.folder / f"{self.name}.tar", "rb") if old else None
        records = dict(enumerate(old))
        kept = [record for record in old if record["status"] == "ok"]
        offsets = data_offsets([r["jpg_bytes"] for r in kept], [r["caption_bytes"] for r in kept])
        for record, (start, _) in zip(kept, offsets, strict=True):
            record |= {"source": old_tar, "offset": start}
        for row, outcome in zip(self.rows, self.outcomes, strict=True):
            place = row["position"] % per_shard
            added = {"key": f"{self.name}{place:0{digits}d}", "caption_bytes": len(row["caption"].encode())}
            records[place] = row | outcome | added
        ordered = [records[place] for place in sorted(records)]

        def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
            for record in ordered:
                if record["status"] == "ok":
                    source = record.get("source", self.spool)
                    source.seek(record["offset"])
                    jpg, caption = source.read(record["jpg_bytes"]), record["caption"].encode()
                    yield record["key"], {".jpg": jpg, ".txt": caption}

        self.spool.flush()
        table = pa.Table.from_pylist(ordered, RESULT_SCHEMA.with_metadata({"request": json.dumps(self.args.request)}))
        commit_shard(self.folder, self.name, table, samples())
        if old_tar:
            old_tar.close()


# ---------------------------------------------------------------------------------------------------------------------
# Supervision: img2dataset runs in a process group of its own, which ends when this process does, however that happens.
#
# Of it, `img2dataset.distributor`'s three functions are called as they are, which hand shards to workers: with
# `download_shard` for a Downloader and a list of shards for a Reader. Nothing is replaced inside of it. What else it
# has is left out, for the sake of
#
#   addresses   Downloader contacts private ones and opens file:// URLs
#   memory      Reader holds all rows, Downloader bodies of any size; Resizer decodes before it looks at the size;
#               LoggerProcess imports it all once more, to report what `Progress` knows
#   row order   the sample writers write images as they arrive, with the time of day
#   outcomes    Resizer paints 16 bits white and leaves EXIF's rotation out; Downloader prints what fails in a writer
#               and goes on, Reader tries a full disk for minutes, download() ends with 0 whatever became of the rows
#   resuming    download() knows a shard by its number, whatever the rows
#
# Its multiprocessing_distributor waits for ever for a worker that was killed (`watch_workers`), none of the three
# notices one that stands still (`Heartbeats`), and its ray_distributor does nothing without ray (`check_tools`).

VERDICT = "data.py verdict: "
DISTRIBUTORS = ("multiprocessing", "pyspark", "ray")
WORKER_ENVIRONMENT = {
    "NO_ALBUMENTATIONS_UPDATE": "1",  # for ray's workers, which import all of img2dataset: it would call home
    "MALLOC_ARENA_MAX": "2",  # glibc: give memory back, instead of keeping some for each of many threads
    "MALLOC_MMAP_THRESHOLD_": str(8 * MIB),
    "MALLOC_TRIM_THRESHOLD_": str(16 * MIB),
}


def download(config: dict[str, Any]) -> None:
    """Runs in the child: let img2dataset hand the shards to workers, and say in one line what ended it."""
    threading.Thread(target=die_with_parent, daemon=True).start()
    args = argparse.Namespace(**config)
    shards = sorted((int(path.stem), str(path)) for path in (Path(args.output_dir) / ".unfinished").glob("*.arrow"))
    try:
        distribute = getattr(import_distributors(), f"{args.distributor}_distributor")
        if args.distributor == "multiprocessing":
            threading.Thread(target=watch_workers, daemon=True).start()
        distribute(min(args.processes_count, len(shards)), functools.partial(download_shard, args), shards, 1000, 0)
    except Exception as error:
        text = str(error).strip()
        full = "No space left on device" in text or "Disk quota exceeded" in text
        if full or (isinstance(error, OSError) and error.errno):
            end_with("the disk is full" if full else text, may_pass=True)
        traceback.print_exc()
        end_with(f"{type(error).__name__}: {text.rpartition(chr(10))[2]}", may_pass=False)


def import_distributors() -> Any:
    """The one module of img2dataset that is used, without its package, which imports torch, pandas and much more."""
    spec = importlib.util.find_spec("img2dataset")
    sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    return importlib.import_module("img2dataset.distributor")


def end_with(words: str, may_pass: bool) -> NoReturn:
    """Tell the parent what ended the child, without waiting for workers: it ends the group."""
    print(VERDICT + json.dumps([words, may_pass]), flush=True)
    os._exit(1)


def watch_workers() -> None:
    """End the child when a process of its pool is killed: the pool would wait for the lost shard for ever."""
    workers: set[Any] = set()
    while True:
        workers.update(active_children())
        if any(worker.exitcode not in (None, 0, -signal.SIGTERM) for worker in workers):  # SIGTERM: the pool's own
            end_with("a worker process was killed, perhaps for want of memory", may_pass=True)
        time.sleep(0.5)


def die_with_parent() -> None:
    """Standard input is a pipe that only the parent holds: it closes when the parent ends, even by SIGKILL."""
    os.read(0, 1)
    end_group(0)


def end_group(group: int) -> None:
    """End every process of a group: by request, and after two seconds by force."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGTERM)  # multiprocessing's resource tracker ignores it, cleans up and ends by itself
        for _ in range(40):
            os.killpg(group, 0)
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)


class Heartbeats:
    """Notices a worker that stands still: stopped, swapped out, or on a machine that is gone.

    Only changes count, no clocks: those of the machines may differ.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.work = Path(args.output_dir) / ".unfinished"
        local = args.distributor == "multiprocessing"
        self.patience = args.deadline + (10 if local else 120)  # a shared disk shows a change after a while only
        self.start = self.patience + 60 if local else math.inf  # a cluster may let us wait until it has room
        self.beats: dict[Path | None, tuple[Any, float]] = {}

    def check(self) -> None:
        """Raise DataError if a shard at work, or if nothing at all, has changed for too long."""
        now, beats = time.monotonic(), {}
        for path in self.work.glob("*.spool"):
            with contextlib.suppress(FileNotFoundError):  # finished this moment
                beats[path] = path.stat().st_mtime_ns
        for path, beat in [*beats.items(), (None, sorted(beats.items()))]:
            if self.beats.get(path, ("",))[0] != beat:
                self.beats[path] = beat, now
            since = now - self.beats[path][1]
            if since > (self.patience if path else self.start):
                shard = f"at shard {path.stem}" if path else "before its next shard"
                raise DataError(f"a worker has stood still for {since:.0f} s, {shard}. {KEPT}")


def run_img2dataset(args: argparse.Namespace, while_running: Callable[[], None]) -> None:
    """Run `download` in a child, calling `while_running` five times a second. Raises DataError with what ended it."""
    here = str(Path(__file__).resolve().parent)
    code = "import sys, json; sys.path[0] = sys.argv[1]; import data; data.download(json.load(open(sys.argv[2])))"
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    environment = os.environ | WORKER_ENVIRONMENT | {"PYTHONPATH": path}
    heartbeats = Heartbeats(args)
    config = Path(args.output_dir) / ".unfinished" / "config.json"  # too long for an argument if tables are many
    config.write_text(json.dumps(vars(args)))
    command = [sys.executable, "-c", code, here, str(config)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
    child = subprocess.Popen(command, **pipes, env=environment, start_new_session=True)
    last_lines: collections.deque[str] = collections.deque(maxlen=40)
    reader = threading.Thread(target=lambda: last_lines.extend(child.stdout), daemon=True)
    reader.start()
    try:
        while child.poll() is None:
            while_running()
            heartbeats.check()
            time.sleep(0.2)
    finally:
        if child.poll() != 0:  # after a 0 no worker is left
            end_group(child.pid)
        child.wait()
        while_running()
    reader.join(2)
    if child.returncode < 0:
        raise DataError(f"img2dataset's process was killed by signal {-child.returncode}. {KEPT}")
    if child.returncode:
        verdicts = [line.removeprefix(VERDICT) for line in last_lines if line.startswith(VERDICT)]
        words, may_pass = json.loads(verdicts[0]) if verdicts else (f"exit code {child.returncode}", False)
        if may_pass:
            raise DataError(f"{words}. {KEPT}")
        sys.stderr.writelines(line for line in last_lines if not line.startswith(VERDICT))
        raise DataError(f"a fault in data.py or img2dataset: {words}")


class Progress:
    """The bar over all rows, and the manifest kept up to date, while workers are at it.

    A worker appends one byte for each row to a file of its shard, "+" for an image and "-" for none: this needs
    nothing but the file system that the shards need anyway, whichever distributor runs.
    """

    def __init__(self, args: argparse.Namespace, names: Sequence[str], rows: int, to_do: int) -> None:
        self.folder, self.head, self.names = Path(args.output_dir), args.request, names
        self.entries: dict[str, str | None] = {}
        self.seen: collections.Counter[str] = collections.Counter()  # bytes, by shard
        self.listed: set[str] = set()  # finished in this run, and in the manifest
        self.images = 0
        self.started = time.monotonic()
        self.bar = progress_bar(total=rows, initial=rows - to_do, unit=" rows", mininterval=0.5)
        self.wandb = None
        if args.enable_wandb:
            import wandb

            self.wandb = wandb.init(project="distill-sd-data", config=args.request)
        self.save(names)

    def look(self) -> None:
        """Read what workers have reported since, and list the shards that they have finished in the manifest."""
        work = self.folder / ".unfinished"
        for path in work.glob("*.progress"):
            with open(path, "rb") as file:
                file.seek(self.seen[path.stem])
                news = file.read()
            self.seen[path.stem] += len(news)
            self.images += news.count(b"+")
            self.bar.update(len(news))
        if rows := self.seen.total():
            speed = self.images / (time.monotonic() - self.started)
            self.bar.set_postfix_str(f"{speed:.1f} images/s, {self.images / rows:.0%} ok", refresh=False)
        finished = self.seen.keys() - self.listed - {path.stem for path in work.glob("*.spool")}
        if finished and time.monotonic() - self.saved > 10 * self.saving:  # a large manifest takes a second
            self.listed |= finished
            self.save(finished)

    def save(self, names: Iterable[str], at_end: bool = False) -> None:
        """Write the manifest, with these shards as they are now."""
        self.entries |= {name: shard_entry(self.folder, name) for name in names}
        entries = [self.entries[name] for name in self.names if self.entries[name]]
        started = time.monotonic()
        write_manifest(self.folder, self.head | {"complete": at_end and len(entries) == len(self.names)}, entries)
        self.saved = time.monotonic()
        self.saving = self.saved - started
        if self.wandb:
            self.wandb.log({"rows": self.seen.total(), "images": self.images, "shards": len(entries)})

    def close(self) -> None:
        """After the workers' end: the manifest as the shards are now."""
        self.bar.close()
        self.save(self.names, at_end=True)
        if self.wandb:
            self.wandb.finish()


# ---------------------------------------------------------------------------------------------------------------------
# Before and after: what is about to happen, what came of it, and whether a folder is sound.


@contextlib.contextmanager
def claim_folder(folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any] | None]:
    """Make or enter the output folder, and hold it until the end. Yields its manifest, None for a new one.

    Where no shard is finished by the end, nothing of ours is left. Raises UserError if the folder isn't ours.
    """
    import fcntl  # here: Windows has none, and reads shards without

    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.ExitStack() as at_the_end:
        for path in reversed(made):
            at_the_end.callback(remove_if_empty, path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
            at_the_end.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not on a file, which would be left there
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"--output_dir {folder} is a file") from None
        except BlockingIOError:
            raise UserError(f"--output_dir {folder}: another data.py is at work in it") from None
        manifest = our_manifest(folder, args)
        try:
            yield manifest
        finally:
            clear_unfinished(folder)
            if not holds_shards(folder):
                (folder / "manifest.json").unlink(missing_ok=True)


def remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def holds_shards(folder: Path) -> bool:
    """Whether there is a shard, or its parquet, which comes before its tar."""
    return any(folder.glob("*.parquet")) or any(folder.glob("*.tar"))


def our_manifest(folder: Path, args: argparse.Namespace) -> dict[str, Any] | None:
    """The folder's manifest, made anew if it was lost; None for a folder to begin in.

    Raises UserError for a folder that isn't ours, or was made with other settings.
    """
    path = folder / "manifest.json"
    try:
        manifest = read_manifest(folder)
    except UserError:
        manifest = None
        if not any(map(request_of, folder.glob("*.parquet"))):
            raise
    if manifest is None and (requests := list(filter(None, map(request_of, folder.glob("*.parquet"))))):
        print(f"{path} is lost or damaged: it is made anew from the tables of {len(requests)} shards.")
        manifest = max(requests, key=lambda request: request["rows"]["chosen"])  # of a folder that grew, the last
    if manifest is None:
        if strangers := sorted({path.name for path in folder.iterdir()} - {".manifest.json.part", ".unfinished"}):
            found = ", ".join(strangers[:3])
            raise UserError(f"--output_dir {folder} holds {found} but no manifest.json: data.py did not make it")
        return None
    parts = {"settings", "input", "rows"}
    if manifest.get("format") != FORMAT or "latents" in manifest or not parts <= manifest.keys():
        raise UserError(f"{path} was not written by this version of data.py ({FORMAT!r})")
    if manifest.get("captions_only", False) != args.captions_only:
        how = "without" if args.captions_only else "with"
        raise UserError(f"--output_dir {folder} was made {how} --captions_only")
    if not holds_shards(folder):
        return None  # nothing there that other settings could be mixed with
    refuse_difference(folder, manifest["settings"], {name: getattr(args, name) for name in IMAGE_SETTINGS})
    return manifest


def refuse_other_rows(folder: Path, then: dict[str, Any], now: dict[str, Any], order: np.ndarray) -> None:
    """Raise UserError unless the rows of a folder are the first ones of `order`: then more may follow.

    It names all that differs, though a filter in another spelling or a renamed table changes no row.
    """

    def decisive(request: dict[str, Any]) -> tuple[list[str], str | None]:
        source = request["input"]
        hashes = source["verify_hash_sha256"] or request["settings"]["verify_hash"]  # of a path, or a column
        return [file["sha256"] for file in source["files"]], hashes

    def described(request: dict[str, Any]) -> dict[str, Any]:
        source = request["input"]
        files = [f"{file['name']} ({file['sha256'][:8]})" for file in source["files"]]
        rows = {name: request["settings"][name] for name in ROW_SETTINGS}
        return rows | {"revision": source["revision"], "files": files, "hashes": source["verify_hash_sha256"]}

    digest = rows_digest(order[: then["rows"]["chosen"]])
    if digest != then["input"]["chosen_rows_sha256"] or decisive(then) != decisive(now):
        refuse_difference(folder, described(then), described(now))
        raise UserError(f"--output_dir {folder} was made of other rows. Use another folder")


def refuse_difference(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError that names everything in which a rerun differs from the run that made the folder."""
    differences = [f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in now if then.get(key) != now.get(key)]
    if differences:
        raise UserError(f"--output_dir {folder} was made otherwise: {'; '.join(differences)}. Use another folder")


def rows_digest(order: np.ndarray) -> str:
    return hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()


def forget_damaged(folder: Path, names: Sequence[str]) -> None:
    """Read the finished shards back. Of a damaged one the table is removed, so that all its rows are fetched again.

    Prints a sentence for each. Its tar stays until another is put in its place.
    """
    begun = [name for name in names if any((folder / f"{name}{suffix}").exists() for suffix in (".tar", ".parquet"))]

    def fault_of(name: str) -> str | None:
        return tar_fault(folder / f"{name}.tar", recorded(folder / f"{name}.parquet", whole=True))

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        bar = progress_bar(threads.map(fault_of, begun), "Reading back", len(begun), unit=" shards", disable=not begun)
        for name, fault in zip(begun, bar, strict=True):
            if fault is not None:
                (folder / f"{name}.parquet").unlink(missing_ok=True)
                bar.write(f"{name}.tar {fault}: its rows are fetched again.")


def tar_fault(tar: Path, entry: Mapping[str, Any] | None, by_hash: bool = True) -> str | None:
    """What is wrong with a shard by its recorded size and hash, or with the record. None: nothing."""
    if entry is None:
        return "has no sound table"
    if not tar.is_file():
        return "is missing"
    if tar.stat().st_size != entry["bytes"]:
        return f"has {tar.stat().st_size} bytes instead of {entry['bytes']}"
    return None if not by_hash or file_sha256(tar) == entry["sha256"] else "differs from its SHA-256"


def check_tools(args: argparse.Namespace) -> None:
    """Refuse at once what would fail later: a distributor that isn't installed, wandb without a login."""
    if importlib.util.find_spec("fcntl") is None:
        raise UserError("data.py needs a POSIX system to download (training reads its shards on any)")
    if args.captions_only:
        return
    needed = {args.distributor: f"--distributor {args.distributor}: that package", "img2dataset": "img2dataset"}
    for package, words in needed.items():
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{words} is not installed (pip install {package})")
    if args.enable_wandb:
        check_wandb("--enable_wandb")


def expected_bytes(rows: int, args: argparse.Namespace) -> int:
    """Disk space if every row becomes an image: 0.4 bytes per pixel at quality 95, half as much for 12 less.

    The images of the shards at work lie there twice, until they are put in order.
    """
    rows += min(rows, args.processes_count * args.number_sample_per_shard)
    return int(rows * (args.image_size**2 * 0.4 * 2 ** ((args.encode_quality - 95) / 12) + 1500))


def clear_unfinished(folder: Path) -> Path:
    """Complete a commit whose tar was whole, and remove what an interrupted run left of others.

    Returns the (absent) hidden folder for new ones.
    """
    for part in sorted(folder.glob(".*.part")):
        if match := re.fullmatch(r"\.(\d{5,})\.(tar|parquet)\.part", part.name):
            entry = recorded(folder / f"{match[1]}.parquet")
            if match[2] == "tar" and tar_fault(part, entry) is None:
                put_in_place(part, folder / f"{match[1]}.tar")
            else:
                part.unlink()
    hidden(folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder / ".unfinished", ignore_errors=True)
    return folder / ".unfinished"


def places_to_do(folder: Path, name: str, rows: int, retry: Sequence[str] | None) -> list[int]:
    """Which of a shard's rows are to be fetched: all, but of a finished shard the new ones, and those to try again.

    `retry` is None for no row, empty for those whose failure may pass, ["all"] for every row that failed.
    """
    begins = "" if retry else ("http_5", *PASSING_LATER)  # every status does with the former
    there = rows_done(folder, name, "status")["status"].to_pylist()
    again = [retry is not None and status != "ok" and status.startswith(begins) for status in there]
    return [place for place in range(rows) if place >= len(there) or again[place]]


def summarize(folder: Path, names: Sequence[str]) -> int:
    """Print the outcomes by reason, and the ten hosts that failed most, over the shards that are done.

    Returns the number of images.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    hosts: collections.Counter[str] = collections.Counter()
    for name in names:
        table = rows_done(folder, name, "status", "url")
        outcomes.update(table["status"].to_pylist())
        failed = table.filter(pc.not_equal(table["status"], "ok"))["url"].to_pylist()
        hosts.update(re.sub(r"^\w+://([^/?#]*@)?([^/?#]*).*$", r"\2", url, flags=re.S).lower() for url in failed)
    rows = outcomes.total()
    lines = [f"  {reason:<20}{count:>10,}  {count / rows:6.1%}" for reason, count in outcomes.most_common()]
    if hosts:
        lines += ["Hosts that failed most:", *(f"  {host:<40}{count:>10,}" for host, count in hosts.most_common(10))]
    print("Outcomes:", *lines, sep="\n")
    return outcomes["ok"]


def check_folder(folder: Path, caption_column: str = "text") -> list[str]:
    """Open every image or latent, and compare shards with the manifest, if there is one. Prints what the folder holds.

    Returns what is wrong, in sentences. Raises UserError for a folder that holds nothing.
    """
    shards = shards_in(folder)
    if not shards and not (folder / "manifest.json").exists() and (nothing := why_no_images(folder)):
        raise UserError(nothing[0].replace("--train_data_dir", "--check"))
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return [str(error)]
    try:
        rows = (ShardFolder if shards or manifest else ImageFolder)(folder, caption_column)
        print("\n".join(rows.describe()))
        problems = []
    except UserError as error:  # which follows from the problems below, if there are some
        rows, problems = (), [str(error)]
    captions_only = manifest is not None and manifest.get("captions_only", False)
    count = len(rows) if manifest is None else sum(entry["count"] for entry in manifest["shards"])
    bar = progress_bar(total=count, unit=" images", disable=captions_only)
    with bar, ThreadPoolExecutor(os.cpu_count()) as threads:
        if manifest is None:
            if any(map(request_of, folder.glob("*.parquet"))):
                problems.append("manifest.json is lost: the command that made the folder makes it anew")
            for start in range(0, count, 1000):  # `map` takes all at once, at 1.6 kB each
                part = range(start, min(start + 1000, count))
                problems += filter(None, threads.map(functools.partial(row_fault, rows), part))
                bar.update(len(part))
            return problems
        faults = [] if manifest.get("complete") else ["the run did not finish: run the same command again to go on"]
        named = {entry["name"] for entry in manifest["shards"]}
        faults += [f"{path.name} is not in the manifest" for path in shards if path.name not in named]
        if captions_only:
            print(f"{count:,} captions are there.")
            found = threads.map(lambda entry: tar_fault(folder / entry["name"], entry), manifest["shards"])
            pairs = zip(manifest["shards"], found, strict=True)
            return faults + [f"{entry['name']} {fault}" for entry, fault in pairs if fault]
        variants = manifest["latents"]["variants"] if "latents" in manifest else None
        for entry in manifest["shards"]:
            found = check_shard(folder / entry["name"], entry, variants, threads, bar)
            faults += [f"{entry['name']} {fault}" for fault in found]
    return faults or problems


def row_fault(rows: ShardFolder | ImageFolder, index: int) -> str | None:
    """What is wrong with a sample that no manifest speaks of. None: nothing."""
    shards = isinstance(rows, ShardFolder)
    file = rows.paths[rows.places[index]["shard"]].name if shards else os.fsdecode(rows.table["image"][index].as_py())
    try:
        row = rows[index]
        decode_image(row["image"]["bytes"])
    except Exception as error:
        return f"{file}: sample {index} can't be decoded: {type(error).__name__}"
    return None if isinstance(row["text"], (str, list)) else f"{file}: sample {index} has no caption that can be read"


def check_shard(path: Path, entry: dict, variants: int | None, threads: ThreadPoolExecutor, bar: Any) -> Iterator[str]:
    """Yield what is wrong with one shard, its entry in the manifest and, if it is of images, its parquet."""
    if fault := tar_fault(path, entry):
        yield fault
    if not path.is_file():
        return
    try:
        found = list(walk_tar(path))
        if variants is None:
            table = pq.read_table(path.with_suffix(".parquet"), page_checksum_verification=True)
            keys, suffixes = table.filter(pc.equal(table["status"], "ok"))["key"].to_pylist(), (".jpg", ".txt")
        else:
            keys, suffixes = [name.removesuffix(".npy") for name, *_ in found[::2]], (".npy", ".json")
    except (OSError, ValueError) as error:  # UserError and ArrowInvalid are a ValueError
        yield f"can't be read, it or its parquet: {error}"
        return
    images, captions = entry["image_bytes"], entry["caption_bytes"]
    if not entry["count"] == len(keys) == len(images) == len(captions):
        yield f"the manifest counts {entry['count']} images, {'the parquet' if variants is None else 'it'} {len(keys)}"
        return
    names = [f"{key}{suffix}" for key in keys for suffix in suffixes]
    sizes = np.stack([images, captions], axis=1).flatten()
    expected = list(zip(names, data_offsets(images, captions).flatten(), sizes, strict=True))
    if found != expected:
        yield f"its {len(found)} members are not the {len(expected)} that the manifest and the parquet list, in order"

    def open_image(member: tuple[str, int, int]) -> str | None:
        name, start, size = member
        with open(path, "rb") as file:
            file.seek(start)
            content = io.BytesIO(file.read(size))
        try:
            if variants is None:
                Image.open(content, formats=("JPEG",)).load()
            elif size and len(latents := np.load(content, allow_pickle=False)) != variants:
                return f"{name} holds {len(latents)} variants, the manifest says {variants}"
        except Exception as error:
            return f"{name} can't be decoded: {type(error).__name__}"
        return None

    for problem in threads.map(open_image, [member for member in found if member[0].endswith(suffixes[0])]):
        bar.update()
        if problem:
            yield problem


# ---------------------------------------------------------------------------------------------------------------------
# Command line.

CAPTION_COLUMN = "generated_caption"  # of the default dataset
FLAGS = {
    "captions": [
        Flag("dataset_name", str, "recastai/LAION-art-EN-improved-captions", None,
             "Hub dataset; only its parquet files"),
        Flag("revision", str, None, None,
             "commit, branch or tag; default: the commit that the folder was made from, or main"),
        Flag("caption_file", str, None, None,
             "a local parquet, csv, tsv, json, jsonl or txt table, or a folder of some, instead of a Hub dataset"),
        Flag("url_column", str, "url", None, "column with the URL of the image"),
        Flag("caption_column", str, CAPTION_COLUMN, None, "column with the caption"),
        Flag("captions_only", bool, False, None, "write captions alone, for --caption_pool; nothing else is fetched"),
        Flag("filter", str, [], None, 'rows to keep, as in "punsafe<0.1"', nargs="+", action="extend", metavar="TEST"),
        Flag("max_samples", int, 250_000, AT_LEAST_1, "rows to fetch, after the shuffle; a folder may grow by it"),
        Flag("seed", int, 0, AT_LEAST_0, "of the shuffle"),
    ],
    "images": [
        Flag("image_size", int, 512, between(8, 65500), "width and height; the middle of each image is kept"),
        Flag("min_image_size", int, None, AT_LEAST_1,
             "shorter sides are refused, never enlarged; default: --image_size"),
        Flag("encode_quality", int, 95, between(1, 100), "of the JPEG, 1 to 100"),
        Flag("max_bytes", int, 16 * MIB, at_least(1024), "of one response; larger ones are refused"),
        Flag("max_pixels", int, 25_000_000, at_least(64),
             "of one image by its header, before it is decoded; WebP, AVIF, TIFF and some JPEG take more memory to "
             "decode: 7 million and up for the same memory"),
        Flag("verify_hash", str, None, None,
             "refuse images whose bytes differ from the SHA-256 in this column, or in an earlier output folder or "
             "parquet of this script", metavar="COLUMN_OR_PATH"),
        Flag("honor_opt_outs", bool, True, None,
             "refuse what an X-Robots-Tag header (noai, noimageai, noindex, noimageindex, noml) keeps from us",
             negatable=True),
        Flag("allow_private_addresses", bool, False, None, "contact addresses that are not public: mirrors at home"),
    ],
    "download": [
        Flag("processes_count", int, min(8, os.cpu_count() or 1), AT_LEAST_1, "processes; each works on one shard"),
        Flag("thread_count", int, 128, AT_LEAST_1, "requests at a time in each process"),
        Flag("distributor", str, "multiprocessing", DISTRIBUTORS,
             "the last two need a file system that all machines share"),
        Flag("number_sample_per_shard", int, 5000, AT_LEAST_1, "rows in a shard"),
        Flag("timeout", float, 10, at_least(0.001), "seconds for the connection, and between two pieces of an answer"),
        Flag("deadline", float, 30, at_least(0.001), "seconds for a whole request, redirects included"),
        Flag("retries", int, 1, AT_LEAST_0, "more tries after a failure that may pass"),
        Flag("user_agent", str, None, None, "an address or page of yours, which servers are told beside distill-sd",
             metavar="CONTACT"),
    ],
    "output": [
        Flag("output_dir", str, "laion_art", None, "new, or made by the same command: then the run goes on"),
        Flag("min_success", float, 0.5, FROM_0_TO_1, "exit code 0 needs this share of the rows to become images"),
        Flag("retry_failed", str, None, ("all",),
             "try the rows again that failed in an earlier run, if that may pass (time-outs, 408, 429, 5xx, broken "
             "connections, names not found), or all that failed", nargs="*"),
        Flag("enable_wandb", bool, False, None, "report to wandb"),
        Flag("check", str, None, None, "read a folder back, open every image, say what it holds and what is wrong",
             metavar="DIR"),
    ],
}  # fmt: skip


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags; every problem is reported at once, with exit code 2."""
    usage = "python data.py [--output_dir DIR] [flags] | python data.py --check DIR"
    parser = make_parser(FLAGS, __doc__.splitlines()[0], usage)
    args = parser.parse_args(input_args)
    of_images = [flag for group in ("images", "download", "output") for flag in FLAGS[group]]
    kept = ("number_sample_per_shard", "output_dir", "check")
    given = [flag.name for flag in of_images if getattr(args, flag.name) != flag.default and flag.name not in kept]
    if args.min_image_size is None:
        args.min_image_size = args.image_size
    if args.caption_file:
        args.dataset_name = None
    problems = bound_problems(itertools.chain(*FLAGS.values()), args)
    for text in args.filter:
        try:
            parse_filter(text)
        except ValueError:
            signs, example = " ".join(COMPARISONS), """'punsafe<0.1' or 'LANGUAGE=="en"'"""
            problems.append(f"--filter must be a column, one of {signs}, a value, as {example}; got {text!r}")
    if args.captions_only and (given := given + (["url_column"] if args.url_column != "url" else [])):
        problems.append(f"--captions_only fetches no image: leave out {', '.join(f'--{name}' for name in given)}")
    if args.revision and args.caption_file:
        problems.append("--revision belongs to a Hub dataset, --caption_file is a local one: give one of them")
    if args.user_agent and not re.fullmatch(r"[!-~]([ -~]*[!-~])?", args.user_agent):
        problems.append(f"--user_agent must be printable ASCII, got {args.user_agent!r}")
    if problems:
        parser.error("\n  " + "\n  ".join(problems))
    args.request = None  # the manifest's head, which every shard's table keeps: `main` fills it in
    return args


def main(args: argparse.Namespace) -> int:
    """Returns the exit code. What it may raise is in `run`, which puts it in a sentence."""
    # 1. Only reading back
    if args.check:
        folder = Path(args.check)
        column = "text" if args.caption_column == CAPTION_COLUMN else args.caption_column
        if problems := check_folder(folder, column):
            print("\n".join(problems))
            return 1
        manifest = read_manifest(folder) or {}
        kinds = {"latents": "image's latents load", "captions_only": "shard of captions has its hash"}
        opened = next((words for key, words in kinds.items() if manifest.get(key)), "image opens")
        print(f"{folder}: {'everything is as the manifest says, and ' if manifest else ''}every {opened}.")
        return 0

    # 2. Refuse what can't work, before anything is downloaded
    check_tools(args)
    args.output_dir = str(Path(args.output_dir).absolute())
    folder = Path(args.output_dir)
    with claim_folder(folder, args) as manifest:
        # 3. Captions: the files, their hashes, the columns
        if args.caption_file:
            commit, files = None, local_captions(args.caption_file)
        else:
            made_of = manifest["input"] if manifest else {"dataset_name": None}
            revision = args.revision or (made_of["revision"] if made_of["dataset_name"] == args.dataset_name else None)
            print(f"Captions: {args.dataset_name} from the Hub, revision {revision or 'main'}.")
            commit, files = fetch_captions(args.dataset_name, revision)
        wanted = {} if args.captions_only else {args.url_column: "--url_column"}
        wanted[args.caption_column] = "--caption_column"
        wanted |= {parse_filter(text)[0]: f"--filter {text}" for text in args.filter}
        expected = Hashes(Path(args.verify_hash)) if args.verify_hash and Path(args.verify_hash).exists() else None
        if args.verify_hash and not expected:
            wanted[args.verify_hash] = "--verify_hash (no such path, so taken for a column)"
        check_columns(files, wanted)

        # 4. Choose the rows, the same ones each time
        order, total, dropped = select_rows(files, args)
        rows = len(order)
        if not rows:
            reasons = ", ".join(f"{reason}: {count:,}" for reason, count in dropped.items() if count) or "it is empty"
            raise UserError(f"none of the {total:,} rows is left to fetch ({reasons})")
        args.request = {
            "format": FORMAT,
            "settings": {name: getattr(args, name) for name in ROW_SETTINGS + IMAGE_SETTINGS},
            "input": {
                "dataset_name": args.dataset_name,
                "revision": commit,
                "files": [{"name": name, "sha256": file_sha256(path)} for name, path in files],
                "chosen_rows_sha256": rows_digest(order),
                "verify_hash_sha256": expected and expected.fingerprint(),
            },
            "rows": {"read": total, "dropped": dropped, "chosen": rows},
        } | ({"captions_only": True} if args.captions_only else {})
        if manifest:
            refuse_other_rows(folder, manifest, args.request, order)
        else:
            write_manifest(folder, args.request | {"complete": False}, [])  # from here on it is known as ours
        names = [shard_name(number) for number in range(math.ceil(rows / args.number_sample_per_shard))]
        work = clear_unfinished(folder)
        if not args.captions_only:
            forget_damaged(folder, names)

        # 5. Say what is about to happen
        print(f"Rows read: {total:,}" + (f", of commit {commit}" if commit else ""))
        for reason, count in dropped.items():
            print(f"  dropped, {reason}: {count:,}")
        print(f"Rows chosen: {rows:,}, in {len(names):,} shards of {args.number_sample_per_shard:,} in {folder}")
        work.mkdir()
        if args.captions_only:
            print(f"Disk space: about {rows * 1024 / 1e9:,.2f} GB, and a third of that while it is written.")
            write_shard_inputs(files, order, work, args, None)
            write_captions(work, names, args)
            print(f"{rows:,} captions are in {folder}")
            return 0
        to_do = write_shard_inputs(files, order, work, args, expected)
        del order, expected
        print(f"Rows to fetch now: {to_do:,}" + (f" ({rows - to_do:,} are done)" if to_do < rows else ""))
        need, free = expected_bytes(to_do, args) / 1e9, shutil.disk_usage(folder).free / 1e9
        print(f"Disk space: up to about {need:,.2f} GB if every row gives an image; {free:,.2f} GB are free.")
        if need > free:
            print("That may not fit. The run stops when the disk is full, and the same command goes on from there.")
        if not args.verify_hash:
            print("Images can't be compared with those that the captions were written for: no hash is known.")

        # 6. Download, shard by shard
        progress = Progress(args, names, rows, to_do)
        try:
            if to_do:
                run_img2dataset(args, progress.look)
        finally:
            clear_unfinished(folder)
            progress.close()
            images = summarize(folder, names)

    # 7. The truth
    share = f"{images / rows:.1%}"
    print(f"{images:,} of {rows:,} rows became images ({share}), in {folder}")
    if images < args.min_success * rows:
        raise DataError(f"{share} of the rows became images, --min_success asks for {args.min_success:.1%}")
    return 0


def run(args: argparse.Namespace) -> int:
    """`main`, with every foreseeable end put in one sentence. Returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which raises KeyboardInterrupt
    sys.stdout.reconfigure(line_buffering=True)
    try:
        return main(args)
    except (UserError, DataError) as error:
        sentence, code = str(error), 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        sentence, code = f"stopped. {KEPT}", 130
    except OSError as error:
        if error.errno is None:
            raise  # of a library, not of the system: a bug
        sentence, code = f"{error.filename or 'the system'}: {error.strerror}", 1
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            sentence = f"the disk is full. {KEPT}"
    print(f"data.py: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(run(parse_args()))
