"""Shards of latents: what is in them, when they are made anew, and what a run reads out of them, cached or given."""

import argparse
import functools
import gc
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from filelock import FileLock
from helpers import (
    assert_equal,
    assert_same_batches,
    components_of,
    data_args,
    dataset_of,
    flags,
    make_tokenizer,
    train,
    unet_weights,
    watched,
    write_tar,
)
from launcher import Launcher
from PIL import Image
from torch._dynamo.testing import CompileCounter
from transformers import CLIPTokenizer

import data
import distill_training as dt

SIDE = 16  # pixels of the images, which have 2 x 2 latents then


def png(number: int, side: int = SIDE, width: int | None = None) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, width or side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def samples(count: int, side: int = SIDE) -> list[dict[str, bytes]]:
    """Images with one to four captions each."""
    captions = [[f"{'abcdefghij'[i % 10]} {word}" for word in "wxyz"[: 1 + i % 4]] for i in range(count)]
    records = [{"text": texts, "url": f"http://x.invalid/{i}"} for i, texts in enumerate(captions)]
    return [{"png": png(i, side), "json": json.dumps(records[i]).encode()} for i in range(count)]


def cache_args(teacher: Path, folder: Path, cache: Path, **settings: Any) -> argparse.Namespace:
    args = data_args(teacher, train_data_dir=folder, **{"resolution": SIDE, **settings})
    args.latents_cache_dir = str(cache)
    return args


def load_vae(teacher: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(teacher, subfolder="vae").requires_grad_(False).eval()


def cached(
    args: argparse.Namespace, vae: AutoencoderKL, dataset: dt.DistillationDataset | None = None
) -> dt.DistillationDataset:
    return dt.cache_latents(dataset or dataset_of(args), vae, args, Accelerator(cpu=True))


def batches_of(dataset: dt.DistillationDataset, args: argparse.Namespace, count: int) -> list[dict[str, torch.Tensor]]:
    return list(itertools.islice(dt.make_dataloader(dataset, args, Accelerator(cpu=True), 0), count))


def place_of(dataset: dt.DistillationDataset) -> Path:
    """The folder of its shards."""
    return dataset.rows.paths[0].parent


def contents(dataset: dt.DistillationDataset) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place_of(dataset).glob("*.tar")}


def assert_latents_of(example: dict[str, torch.Tensor], pixel_values: torch.Tensor, vae: AutoencoderKL) -> None:
    """They are this image's but for rounding, which lies far below what tells toy images apart."""
    mean, std = dt.encode_images(vae, pixel_values[None])
    torch.testing.assert_close(example["latent_mean"].float(), mean[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(example["latent_std"].float(), std[0], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def vae(teacher: Path) -> AutoencoderKL:
    return load_vae(teacher)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tar(tmp_path_factory.mktemp("data") / "00000.tar", samples(12)).parent


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dt, "LATENTS_PER_SHARD", 5)


# --- what a step makes of it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_and_deviation_sample_as_the_vae_does(teacher: Path, dtype: torch.dtype) -> None:
    vae = load_vae(teacher).to(dtype)
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        posterior = DiagonalGaussianDistribution(vae.encode(images.to(dtype)).latent_dist.parameters.float())
    expected = posterior.sample(torch.Generator().manual_seed(5))
    mean, std = dt.encode_images(vae, images)
    assert mean.dtype == std.dtype == torch.float32 and mean.shape == std.shape == (3, 4, 8, 8)
    assert torch.equal(mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(5)), expected)


def new_run(teacher: Path, args: argparse.Namespace, vae: AutoencoderKL) -> dt.Distillation:
    args.max_train_steps = 100
    return dt.make_run(args, Accelerator(cpu=True), components_of(teacher, vae=vae), dt.RunState())


def test_a_step_from_the_cache_is_the_same_step(
    tmp_path: Path, teacher: Path, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tar(tmp_path / "data" / "00000.tar", samples(12, side=64)).parent
    args = cache_args(teacher, folder, tmp_path / "cache", resolution=64, distill_level="sd_tiny", random_flip=True)
    pixels = batches_of(dataset_of(args), args, 6)
    latents = batches_of(cached(args, vae), args, 6)
    from_cache, from_pixels, from_rounded = (new_run(teacher, args, vae) for _ in range(3))
    sampled: list[torch.Tensor] = []
    add_noise = from_pixels.noise_scheduler.add_noise
    monkeypatch.setattr(
        from_pixels.noise_scheduler,
        "add_noise",
        lambda latents, *rest: sampled.append(latents) or add_noise(latents, *rest),
    )
    for number, (with_pixels, with_latents) in enumerate(zip(pixels, latents, strict=True)):
        assert with_latents.keys() == {"latent_mean", "latent_std", "input_ids", "counts"}
        assert with_latents["latent_mean"].dtype == with_latents["latent_std"].dtype == torch.float16
        assert with_latents["latent_mean"].shape == with_latents["latent_std"].shape == (4, 4, 8, 8)
        assert torch.equal(with_latents["input_ids"], with_pixels["input_ids"])
        terms, _ = dt.training_step(from_cache, with_latents, number)
        uncached, _ = dt.training_step(from_pixels, with_pixels, number)
        generator = torch.Generator().manual_seed(dt.derived_seed(args.seed, "noise", number, 0))
        with torch.no_grad():
            posterior = vae.encode(with_pixels["pixel_values"]).latent_dist
        assert torch.equal(sampled[-1], posterior.sample(generator) * vae.config.scaling_factor)
        half = tuple(with_latents[name].float() for name in ("latent_mean", "latent_std"))
        with monkeypatch.context() as patch:
            patch.setattr(dt, "encode_images", lambda *_, half=half: half)
            rounded, _ = dt.training_step(from_rounded, with_pixels, number)
        assert torch.equal(terms, rounded)
        torch.testing.assert_close(terms, uncached, rtol=1e-3, atol=0)
    for one, other in zip(from_cache.unet.parameters(), from_rounded.unet.parameters(), strict=True):
        assert torch.equal(one, other)


# --- what is in it --------------------------------------------------------------------------------------------


def test_both_variants_of_a_flip_are_read(tmp_path: Path, teacher: Path, folder: Path, vae: AutoencoderKL) -> None:
    args = cache_args(teacher, folder, tmp_path, random_flip=True)
    whole = dataset_of(cache_args(teacher, folder, tmp_path))  # without --random_flip
    mirrored, dataset, uncached = Counter(), cached(args, vae), dataset_of(args)
    for epoch, row in itertools.product(range(8), range(12)):
        image, seen = whole[(0, row)]["pixel_values"], uncached[(epoch, row)]["pixel_values"]
        flipped = torch.equal(seen, image.flip(-1))
        assert flipped or torch.equal(seen, image)
        assert_latents_of(dataset[(epoch, row)], seen, vae)
        mirrored[row] += flipped
    assert len(mirrored) == 12 and all(0 < count < 8 for count in mirrored.values())


def test_a_random_crop_is_that_of_the_first_epoch(tmp_path: Path, teacher: Path, vae: AutoencoderKL) -> None:
    wide = [{"png": png(i, 64, 96), "txt": b"a"} for i in range(6)]
    folder = write_tar(tmp_path / "data" / "00000.tar", wide).parent
    args = cache_args(teacher, folder, tmp_path / "cache", center_crop=False, resolution=64)
    dataset, uncached = cached(args, vae), dataset_of(args)
    for epoch, row in itertools.product(range(3), range(6)):
        assert_latents_of(dataset[(epoch, row)], uncached[(0, row)]["pixel_values"], vae)
    assert any(not torch.equal(uncached[(0, i)]["pixel_values"], uncached[(1, i)]["pixel_values"]) for i in range(6))


def test_captions_are_drawn_as_without_it(tmp_path: Path, teacher: Path, folder: Path, vae: AutoencoderKL) -> None:
    args = cache_args(teacher, folder, tmp_path, proportion_empty_prompts=0.3)
    dataset, uncached = cached(args, vae), dataset_of(args)
    empty = dt.tokenize_captions([""], make_tokenizer(), random.Random(0))[0]
    drawn: dict[int, set[tuple[int, ...]]] = {row: set() for row in range(12)}
    empties = 0
    for epoch, row in itertools.product(range(12), range(12)):
        ids = dataset[(epoch, row)]["input_ids"]
        assert ids.dtype == torch.int64 and torch.equal(ids, uncached[(epoch, row)]["input_ids"])
        drawn[row].add(tuple(ids.tolist()))
        empties += torch.equal(ids, empty)
    assert 20 < empties < 70
    assert [len(drawn[row]) > 2 for row in range(4)] == [False, True, True, True]  # the first has one caption


@pytest.mark.parametrize("words", [400, 70_000])
def test_large_vocabularies_are_kept(tmp_path: Path, teacher: Path, vae: AutoencoderKL, words: int) -> None:
    folder = write_tar(tmp_path / "data" / "00000.tar", samples(4)).parent
    args = cache_args(teacher, folder, tmp_path / "cache")
    known = list(make_tokenizer().get_vocab())
    tokens = [*known[:2], *(f"filler{i}" for i in range(words)), *known[2:]]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)
    uncached = dt.make_train_dataset(args, tokenizer, Accelerator(cpu=True))
    dataset = cached(args, vae, uncached)
    for row in range(4):
        assert dataset[row]["input_ids"].max() > words
        assert torch.equal(dataset[row]["input_ids"], uncached[row]["input_ids"])


def test_unusable_rows_are_replaced_as_without_it(
    tmp_path: Path, teacher: Path, folder: Path, vae: AutoencoderKL
) -> None:
    rows = [{"image": {"bytes": png(i), "path": None}, "text": f"{'abcdefghij'[i]} x"} for i in range(10)]
    rows[1]["image"] = {"bytes": b"no image", "path": None}
    rows[4]["text"] = " "
    rows[8]["image"] = {"bytes": png(8, side=8), "path": None}
    args = cache_args(teacher, folder, tmp_path, train_batch_size=3)
    preparation = {"transform": dt.image_transforms(SIDE, True, False), "tokenizer": make_tokenizer()}
    uncached = dt.DistillationDataset(
        datasets.Dataset.from_list(rows), ("image", "text"), 3, proportion_empty_prompts=0.0, **preparation
    )
    dataset = cached(args, vae, uncached)
    for epoch, row in itertools.product(range(4), range(10)):
        expected, found = uncached[(epoch, row)], dataset[(epoch, row)]
        assert torch.equal(found["counts"], expected["counts"])
        assert torch.equal(found["input_ids"], expected["input_ids"])
        assert_latents_of(found, expected["pixel_values"], vae)
    counts = sum(batch["counts"] for batch in batches_of(dataset, args, 20))
    assert torch.equal(counts, sum(batch["counts"] for batch in batches_of(uncached, args, 20)))
    assert [bool(count) for count in counts] == [True, True, False, True]
    with pytest.raises(dt.UserError, match="None of the 1 training samples can be used: 1 with a broken image"):
        bad = dt.DistillationDataset(
            datasets.Dataset.from_list(rows[1:2]), ("image", "text"), 3, proportion_empty_prompts=0.0, **preparation
        )
        cached(args, vae, bad)[0]


def test_what_cannot_be_read_now_is_not_left_out_for_good(
    tmp_path: Path, teacher: Path, folder: Path, vae: AutoencoderKL
) -> None:
    rows = [{"image": {"bytes": None, "path": str(tmp_path / f"{i}.png")}, "text": "a x"} for i in range(8)]
    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    args = cache_args(teacher, folder, tmp_path, train_batch_size=2)
    preparation = {"transform": dt.image_transforms(SIDE, True, False), "tokenizer": make_tokenizer()}
    table = datasets.Dataset.from_list(rows)
    uncached = dt.DistillationDataset(table, ("image", "text"), 3, proportion_empty_prompts=0.0, **preparation)
    with pytest.raises(dt.TrainingError, match="Sample 7 cannot be read"):
        cached(args, vae, uncached)
    (tmp_path / "7.png").write_bytes(png(7))
    assert cached(args, vae, uncached)[7]["counts"].sum() == 0


@pytest.mark.parametrize("flip", [False, True])
def test_workers_change_nothing(tmp_path: Path, teacher: Path, folder: Path, vae: AutoencoderKL, flip: bool) -> None:
    plain = cache_args(teacher, folder, tmp_path / "0", random_flip=flip)
    parallel = cache_args(teacher, folder, tmp_path / "2", random_flip=flip, dataloader_num_workers=2)
    alone, shared = cached(plain, vae), cached(parallel, vae)
    assert contents(alone) == contents(shared) and len(contents(alone)) == 3
    assert_same_batches(batches_of(alone, plain, 5), batches_of(shared, parallel, 5))


def test_half_precision_holds_every_deviation() -> None:
    logvar = torch.tensor([-30.0, 20.0])  # the bounds that diffusers sets
    std = DiagonalGaussianDistribution(torch.stack([logvar, logvar]).reshape(1, 2, 1, 2)).std.half()
    assert std.isfinite().all() and (std > 0).all()


def test_latents_that_are_not_finite_are_refused(tmp_path: Path, teacher: Path, folder: Path) -> None:
    vae = load_vae(teacher)
    vae.quant_conv.bias[0] = 1e5  # more than half precision can hold
    with pytest.raises(dt.TrainingError, match="samples 0 to 3 are not finite in .*float16"):
        cached(cache_args(teacher, folder, tmp_path), vae)
    assert not list(tmp_path.rglob("*.tar"))


# --- when it is made anew -------------------------------------------------------------------------------------


def test_a_cache_is_found_by_what_it_is_made_of(tmp_path: Path, teacher: Path, vae: AutoencoderKL) -> None:
    plain, other = samples(4), samples(5)
    cache = tmp_path / "cache"

    def key(
        name: str,
        content: list[dict[str, bytes]] = plain,
        vae: AutoencoderKL = vae,
        tokenizer: CLIPTokenizer | None = None,
        **settings: Any,
    ) -> str:
        folder = tmp_path / name
        if not folder.exists():
            write_tar(folder / "00000.tar", content)
            os.utime(folder / "00000.tar", ns=(10**18, 10**18 + (content is not plain)))
        args = cache_args(teacher, folder, cache, **settings)
        dataset = dt.make_train_dataset(args, tokenizer or make_tokenizer(), Accelerator(cpu=True))
        folder = place_of(cached(args, vae, dataset))
        assert folder.parent == cache
        latents = json.loads((folder / "manifest.json").read_text())["latents"]
        assert (latents["resolution"], latents["variants"]) == (args.resolution, 1 + args.random_flip)
        return folder.name

    heavier, edged = load_vae(teacher), AutoencoderKL.from_config({**vae.config, "act_fn": "relu"})
    next(heavier.parameters())[0] += 0.01
    edged.load_state_dict(vae.state_dict())
    used, short, added = make_tokenizer(), make_tokenizer(), make_tokenizer()
    used(["a b"], max_length=3, padding="max_length", truncation=True)
    short.model_max_length = 12
    added.add_tokens(["wx"])
    caption = [{**plain[0], "json": plain[1]["json"]}, *plain[1:]]
    image = [*plain[:3], {**plain[3], "png": png(99)}]
    first = key("data")
    assert len(list(cache.iterdir())) == 1
    same = {
        "again": key("data"),
        "copy": key("copy"),
        "seed": key("data", seed=4),
        "batch size": key("data", train_batch_size=1),
        "workers": key("data", dataloader_num_workers=1),
        "empty prompts": key("data", proportion_empty_prompts=0.5),
        "tokenizer in use": key("data", tokenizer=used),
        "learning rate": key("data", learning_rate=1),
        "all samples": key("data", max_train_samples=4),
        "tokens": key("data", tokenizer=short),  # captions are kept as they are written
        "vocabulary": key("data", tokenizer=added),
    }
    assert set(same.values()) == {first} and len(list(cache.iterdir())) == 1
    changed = {
        "weights": key("data", vae=heavier),
        "VAE config": key("data", vae=edged.eval()),
        "rounded weights": key("data", vae=load_vae(teacher).to(torch.bfloat16)),
        "resolution": key("data", resolution=32),
        "crop": key("data", center_crop=False),
        "crop's seed": key("data", center_crop=False, seed=4),
        "flip": key("data", random_flip=True),
        "interpolation": key("data", image_interpolation_mode="bilinear"),
        "image": key("image", image),
        "caption": key("caption", caption),
        "added": key("added", other),
        "fewer": key("data", max_train_samples=3),
        "other": key("data", max_train_samples=3, seed=4),
        "caption column": key("data", caption_column="url"),
    }
    assert len({first, *changed.values()}) == 1 + len(changed)


def test_a_table_is_known_again(tmp_path: Path, teacher: Path, vae: AutoencoderKL) -> None:
    def key(captions: list[str], number: int = 1, **settings: Any) -> str:
        rows = {"image": [{"bytes": png(i), "path": None} for i in (0, number)], "text": captions, "more": captions}
        features = datasets.Features(
            {"image": datasets.Image(), "text": datasets.Value("string"), "more": datasets.Value("string")}
        )
        table = datasets.Dataset.from_dict(rows, features=features)
        path = tmp_path / "table" / "data" / "train-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or datasets.Dataset.from_parquet(str(path)).to_dict() != table.to_dict():
            table.to_parquet(path)
        args = data_args(teacher, dataset_name=tmp_path / "table", resolution=SIDE, **settings)
        args.latents_cache_dir = str(tmp_path / "cache")
        return place_of(cached(args, vae)).name

    first = key(["a", "b"], cache_dir=tmp_path / "hub")
    assert key(["a", "b"], cache_dir=tmp_path / "hub") == first
    others = [
        key(["a", "b"], cache_dir=tmp_path / "hub", caption_column="more"),
        key(["a", "c"], cache_dir=tmp_path / "hub"),
        key(["a", "c"], 2, cache_dir=tmp_path / "hub"),
        key(["a", "c"], 2, cache_dir=tmp_path / "hub", max_train_samples=1),
    ]
    assert len({first, *others}) == 5


def test_a_damaged_shard_is_made_again(tmp_path: Path, teacher: Path, folder: Path, vae: AutoencoderKL) -> None:
    args = cache_args(teacher, folder, tmp_path)
    dataset = cached(args, vae)
    whole, files = contents(dataset), place_of(dataset)
    times = {path.name: path.stat().st_mtime_ns for path in files.glob("*.tar")}
    (files / "notes.txt").write_text("mine")
    good = dataset[(0, 9)]
    last = dataset.rows.places[9]
    end = int(last["caption"] + last["caption_bytes"])  # what comes after that is of no sample
    for damaged in (whole["00001.tar"][: end - 1], whole["00001.tar"][:50], b"", whole["00002.tar"][:4096]):
        (files / "00001.tar").write_bytes(damaged)
        found = dataset[(0, 9)]  # a run that is under way leaves it out, and says so
        assert found["counts"][dt.UNREADABLE] > 0 and not torch.equal(found["latent_mean"], good["latent_mean"])
        assert contents(cached(args, vae)) == whole
        assert_same_batches([dataset[(0, 9)]], [good])
    assert {path.name: path.stat().st_mtime_ns for path in files.glob("0000[02].tar")} == {
        name: times[name] for name in ("00000.tar", "00002.tar")
    }
    assert {path.name for path in files.iterdir()} == {*whole, "manifest.json", "notes.txt", ".lock"}


def test_bytes_that_were_damaged_are_left_out(tmp_path: Path, teacher: Path, folder: Path, vae: AutoencoderKL) -> None:
    """Latents or captions that cannot be read out of a shard that has its size."""
    args = cache_args(teacher, folder, tmp_path)
    dataset = cached(args, vae)
    path, good = dataset.rows.paths[0], dataset[(0, 1)]
    whole = path.read_bytes()
    for member in ("image", "caption"):
        start = int(dataset.rows.places[1][member])
        path.write_bytes(whole[:start] + bytes(100) + whole[start + 100 :])
        found = dataset[(0, 1)]
        assert found["counts"][dt.UNREADABLE] + found["counts"][dt.BROKEN_IMAGE] > 0
        assert not torch.equal(found["latent_mean"], good["latent_mean"])
    path.write_bytes(whole)
    assert_same_batches([dataset[(0, 1)]], [good])


DRIVER = """
import sys
from accelerate import Accelerator
from helpers import make_tokenizer
from diffusers import AutoencoderKL

dt.LATENTS_PER_SHARD = 4
args = dt.parse_args(sys.argv[3:])
args.latents_cache_dir, accelerator = sys.argv[1], Accelerator(cpu=True)
vae = AutoencoderKL.from_pretrained(sys.argv[2], subfolder="vae").requires_grad_(False).eval()
dataset = dt.make_train_dataset(args, make_tokenizer(), accelerator)
dt.cache_latents(dataset, vae, args, accelerator)
accelerator.end_training()
sys.exit(0)
"""


def test_killed_while_it_is_made_then_made_whole_by_two_processes(
    tmp_path: Path, teacher: Path, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, launcher: Launcher
) -> None:
    monkeypatch.setattr(dt, "LATENTS_PER_SHARD", 4)
    folder = write_tar(tmp_path / "data" / "00000.tar", samples(82, side=64)).parent
    args = cache_args(teacher, folder, tmp_path / "uninterrupted", resolution=64, train_batch_size=3)
    expected = contents(cached(args, vae))
    assert len(expected) == 21
    cache = tmp_path / "cache"
    args.latents_cache_dir = str(cache)
    process = multiprocessing.get_context("fork").Process(target=cached, args=(args, vae))
    process.start()
    while len(list(cache.rglob("*.tar"))) < 3 and process.is_alive():
        time.sleep(0.002)
    process.kill()
    process.join()
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("*.tar")}
    assert process.exitcode == -signal.SIGKILL and 3 <= len(made) < 21
    flags = ["--pretrained_model_name_or_path", teacher, "--train_data_dir", folder, "--resolution", 64]
    flags += ["--train_batch_size", 3, "--center_crop", "--seed", 3, "--output_dir", tmp_path / "output"]
    line = [*map(str, (cache, teacher, *flags))]
    run = launcher.start(line, tmp_path / "log", ranks=2, before=DRIVER)
    assert run.wait() == [0, 0], run.log() + run.log(1)
    missing = [name for name in sorted(expected) if name not in {path.name for path in made}]
    share = sum(2 if name == "00020.tar" else 4 for name in missing[::2])  # each process has encoded every other one
    assert f" {share}/{share} " in run.log()
    assert {path.name: path.read_bytes() for path in cache.rglob("*.tar")} == expected
    assert all(path.stat().st_mtime_ns == changed for path, changed in made.items())
    assert {path.name for path in cache.rglob("*.*")} == {*expected, "manifest.json", ".lock"}


def test_a_second_run_waits_for_the_first(
    tmp_path: Path, teacher: Path, folder: Path, vae: AutoencoderKL, caplog: pytest.LogCaptureFixture
) -> None:
    args = cache_args(teacher, folder, tmp_path)
    shards = cached(args, vae).rows
    lock = shards.paths[1].with_name(".lock")
    waits = f"Waiting for another run, which works in {lock.parent}"
    shards.paths[1].unlink()
    done = threading.Event()

    def second() -> None:
        cached(args, vae)
        done.set()

    with FileLock(lock):
        thread = threading.Thread(target=second)
        thread.start()
        deadline = time.monotonic() + 30
        while waits not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        assert waits in caplog.text
        assert not done.wait(0.5)
    assert done.wait(30)
    thread.join()


def test_a_whole_cache_is_only_read(
    tmp_path: Path, teacher: Path, folder: Path, vae: AutoencoderKL, caplog: pytest.LogCaptureFixture
) -> None:
    """Someone else's will do, where nothing may be written."""
    args = cache_args(teacher, folder, tmp_path)
    place = place_of(cached(args, vae))
    assert f"Making latents of 12 of 12 images in {place}, which will take" in caplog.text
    (place / ".lock").unlink(missing_ok=True)
    left = {path.name: path.stat().st_mtime_ns for path in place.iterdir()}
    assert left.keys() == {"00000.tar", "00001.tar", "00002.tar", "manifest.json"}
    cached(args, vae)
    assert {path.name: path.stat().st_mtime_ns for path in place.iterdir()} == left


def test_without_a_seed_the_cache_is_found_again(
    tmp_path: Path, teacher: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Crops at random and the choice of samples follow from the seed, which must not be another in every start."""
    settings = {"resolution": SIDE, "cache_latents": True, "latents_cache_dir": tmp_path / "cache", "seed": None}
    settings |= {"max_train_steps": 1, "max_train_samples": 6}
    for name in ("one", "two"):
        train(teacher, folder, tmp_path / name, **settings)
    assert caplog.text.count("Making latents of 6 of 6 images") == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_an_error_while_encoding_ends_the_process(
    tmp_path: Path, teacher: Path, folder: Path, launcher: Launcher
) -> None:
    """Its workers ignore signals, and must not be left to the interpreter's exit, which would wait for them."""
    broken = """
def broken(*_):
    raise RuntimeError("no room")
dt.load_pixels = broken
"""
    settings = {"resolution": SIDE, "cache_latents": True, "dataloader_num_workers": 2, "max_train_steps": 1}
    line = flags(teacher, folder, tmp_path / "out", **settings)
    run = launcher.start(line, tmp_path / "log", before=broken)
    assert run.wait(100) == [1] and "RuntimeError: no room" in run.log()


# --- by itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [False, True])
def test_its_folder_gives_the_same_batches_by_itself(
    tmp_path: Path, teacher: Path, vae: AutoencoderKL, crop: bool
) -> None:
    """Bit for bit those of the run that made it, whatever is drawn or left out on the way."""
    contents = samples(13)
    contents[2]["png"], contents[7]["json"], contents[9]["png"] = b"no image", b'{"text": " "}', png(9, side=8)
    folder = write_tar(tmp_path / "data" / "00000.tar", contents).parent
    settings = {"random_flip": True, "proportion_empty_prompts": 0.3, "dataloader_num_workers": 0}
    made_by = cache_args(teacher, folder, tmp_path / "cache", center_crop=crop, **settings)
    made = cached(made_by, vae)
    args = data_args(teacher, train_data_dir=place_of(made), resolution=SIDE, center_crop=False, **settings)
    alone = dataset_of(args)
    batches = batches_of(alone, args, 12)
    assert_same_batches(batches, batches_of(made, made_by, 12))
    assert "pixel_values" not in batches[0] and all(sum(batch["counts"] for batch in batches)[[0, 1, 3]] > 0)
    assert len({alone[(epoch, 0)]["latent_mean"].numpy().tobytes() for epoch in range(8)}) == 2
    unmirrored = data_args(teacher, train_data_dir=place_of(made), resolution=SIDE, center_crop=False)
    assert dataset_of(unmirrored)[0]["latent_mean"].shape == (4, 2, 2)  # a second variant is no duty


def test_a_run_on_its_folder_trains_the_same(
    tmp_path: Path, teacher: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"resolution": SIDE, "random_flip": True, "distill_level": "sd_tiny", "max_train_steps": 3}
    cache = {"cache_latents": True, "latents_cache_dir": tmp_path / "cache", "center_crop": True}
    train(teacher, folder, tmp_path / "cached", **settings, **cache)
    (made,) = (tmp_path / "cache").iterdir()
    before = {path: path.read_bytes() for path in made.iterdir()}
    monkeypatch.setattr(dt, "encode_images", None)
    train(teacher, made, tmp_path / "alone", **settings)
    assert_equal(*(unet_weights(tmp_path / name / "unet") for name in ("cached", "alone")))
    assert {path: path.read_bytes() for path in made.iterdir()} == before


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory, teacher: Path, folder: Path, vae: AutoencoderKL) -> Path:
    """A folder of latents without mirrored variants."""
    return place_of(cached(cache_args(teacher, folder, tmp_path_factory.mktemp("latents")), vae))


NO_MEANING = ", for which --{} has no meaning: leave it out."


@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        ({"resolution": 64}, f" of --resolution {SIDE}, not of 64."),
        ({"random_flip": True}, " that were not mirrored: --random_flip needs some made with --random_flip."),
        ({"center_crop": True}, NO_MEANING.format("center_crop")),
        ({"image_interpolation_mode": "bilinear"}, NO_MEANING.format("image_interpolation_mode")),
        ({"cache_latents": True}, NO_MEANING.format("cache_latents")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_flags_that_its_folder_cannot_follow(
    tmp_path: Path, teacher: Path, latents: Path, capsys: pytest.CaptureFixture[str], flag: dict, problem: str
) -> None:
    plain = {"resolution": SIDE}
    dt.parse_args(flags(teacher, latents, tmp_path / "out", **plain))
    with pytest.raises(SystemExit) as stop:
        dt.parse_args(flags(teacher, latents, tmp_path / "out", **(plain | flag)))
    said = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert stop.value.code == 2 and said[-1] == f"--train_data_dir {latents} holds latents{problem}"
    assert sum("--train_data_dir" in line for line in said) == 1


@pytest.mark.parametrize("change", ["weights", "scaling factor"])
def test_latents_of_another_vae_are_refused(tmp_path: Path, teacher: Path, latents: Path, change: str) -> None:
    other = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    vae = load_vae(other)
    if change == "weights":
        vae.encoder.conv_in.weight.view(-1)[0] += 0.01
    else:
        vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(other / "vae")
    settings = {"resolution": SIDE, "distill_level": "sd_tiny", "max_train_steps": 1}
    with pytest.raises(dt.UserError) as refused:
        train(other, latents, tmp_path / "out", **settings)
    message = str(refused.value)
    assert message.startswith(f"--train_data_dir {latents} holds latents of another VAE than that of ")
    assert "--pretrained_model_name_or_path" in message and "\n" not in message
    assert not (tmp_path / "out").exists()
    train(teacher, latents, tmp_path / "out", **settings)


# --- in float32, and what was made otherwise ------------------------------------------------------------------


def test_a_run_in_bf16_keeps_latents_in_float32(
    tmp_path: Path, teacher: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From float32 weights: what is kept for good is not rounded to what one run computes in."""
    encode_images, dtypes = dt.encode_images, []
    settings = {"resolution": SIDE, "cache_latents": True, "random_flip": True, "distill_level": "sd_tiny"}

    def watch(vae: AutoencoderKL, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtypes.append(vae.dtype)
        return encode_images(vae, pixel_values)

    monkeypatch.setattr(dt, "encode_images", watch)
    with watched(monkeypatch, lambda run: (run.vae.dtype, run.weight_dtype)) as seen:
        for precision in ("no", "bf16"):
            cache = {"latents_cache_dir": tmp_path / f"cache-{precision}", "mixed_precision": precision}
            train(teacher, folder, tmp_path / precision, **settings, **cache, max_train_steps=1)
    assert seen == [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]
    assert set(dtypes) == {torch.float32}
    found = [
        {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
        for root in (tmp_path / "cache-no", tmp_path / "cache-bf16")
    ]
    assert found[0] == found[1] and len(found[0]) == 5  # three shards, the manifest, the lock


def test_an_old_cache_is_neither_read_nor_deleted(
    tmp_path: Path, teacher: Path, folder: Path, vae: AutoencoderKL, caplog: pytest.LogCaptureFixture
) -> None:
    args = cache_args(teacher, folder, tmp_path / "cache")
    place = place_of(cached(args, vae))
    expected = contents(cached(args, vae))
    assert "earlier format" not in caplog.text
    shutil.rmtree(place)
    settings = json.dumps({"resolution": SIDE, "flip": False, "rows_per_shard": 5, "samples": 12})
    old = [place, place.with_name("0123456789abcdef")]  # of the same name by chance, too
    for path in old:
        path.mkdir()
        (path / "settings.json").write_text(settings)
        (path / "00000.npy").write_bytes(b"the latents of an earlier version")
    (place.parent / "mine").mkdir()
    (place.parent / "mine" / "settings.json").write_text("{}")  # is of something else
    dataset = cached(args, vae)
    assert contents(dataset) == expected
    warned = [record.getMessage() for record in caplog.records if "earlier format" in record.getMessage()]
    assert sorted(warned) == sorted(
        f"[RANK 0] {path} holds latents in an earlier format, made anew now: delete it." for path in old
    )
    for path in old:
        assert (path / "settings.json").read_text() == settings
        assert (path / "00000.npy").read_bytes() == b"the latents of an earlier version"
    assert {path.name for path in old[1].iterdir()} == {"settings.json", "00000.npy"}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_checkpoint_whose_latents_were_not_in_float32(
    tmp_path: Path, teacher: Path, folder: Path, precision: str
) -> None:
    """Latents used to be encoded in the precision of the run, which its checkpoints did not say."""
    settings = {"resolution": SIDE, "cache_latents": True, "latents_cache_dir": tmp_path / "cache"}
    settings |= {"mixed_precision": precision, "distill_level": "sd_tiny", "checkpointing_steps": 1}
    train(teacher, folder, tmp_path / "out", **settings, max_train_steps=1)
    path = tmp_path / "out" / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["settings"].pop("precision of cached latents") == "no"
    path.write_text(json.dumps(state))
    for name in ("model_index.json", "README.md"):
        (tmp_path / "out" / name).unlink()
    settings |= {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    if precision == "bf16":
        with pytest.raises(dt.UserError, match="precision of cached latents bf16 -> no") as refused:
            train(teacher, folder, tmp_path / "out", **settings)
        assert "--allow_changed_settings" in str(refused.value) and str(refused.value).count("->") == 1
        settings["allow_changed_settings"] = True
    train(teacher, folder, tmp_path / "out", **settings)
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["settings"]["precision of cached latents"] == "no"


# --- memory and disk ------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def write_latents(folder: Path, count: int) -> Path:
    """A folder of latents as the trainer writes them, without the time that encoding takes."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((1, 2, 4, 8, 8), np.float16))
    content = {".npy": buffer.getvalue(), ".json": b'{"captions": ["a red circle"], "enlarged": false}'}
    entries = []
    for number, start in enumerate(range(0, count, 512)):
        rows = range(start, min(start + 512, count))
        entry = data.write_shard(folder, data.shard_name(number), ((f"{row:09d}", content) for row in rows))
        entries.append(json.dumps(entry))
    facts = {"vae": "0", "scaling_factor": 1.0, "resolution": 64, "variants": 1}
    data.write_manifest(folder, {"format": data.FORMAT, "complete": True, "latents": facts}, entries)
    return folder


def test_it_is_read_where_it_lies(tmp_path: Path, teacher: Path) -> None:
    """A million samples cost at most 100 bytes each and process, with their order."""
    count = 20_000
    folder = write_latents(tmp_path, count)
    args = data_args(teacher, train_data_dir=folder, resolution=64, center_crop=False)
    for _ in range(2):  # what is loaded once is not counted
        gc.collect()
        tracemalloc.start()
        dataset = dataset_of(args)
        batches = iter(dt.SeededBatches(len(dataset), 4, 3, 0, 1, first=count // 4 - 1))
        orders = [next(batches), next(batches)]  # of this epoch and of the next
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    orders_in_torch = 2 * 8 * count
    assert len(dataset) == count and [epoch for batch in orders for epoch, _ in batch] == [0] * 4 + [1] * 4
    assert held + orders_in_torch < 100 * count
    assert len(pickle.dumps(dataset)) < 100 * count  # what a worker is sent where it is not forked
    assert pickle.loads(pickle.dumps(dataset))[19_999]["latent_std"].shape[0] == 4
    for index in range(0, count, 500):
        dataset[index]
    before = resident_bytes()
    for index in range(0, count, 7):  # every page of 49 MB
        dataset[index]
    assert resident_bytes() - before < 100 * count / 4
    tracemalloc.start()
    dataset[7_000]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000  # a row of its shard, which has 1.5 MB
    assert not [path for path in Path("/proc/self/fd").iterdir() if str(tmp_path) in os.path.realpath(path)]


def test_too_little_room_is_said_before_anything_is_encoded(
    tmp_path: Path, teacher: Path, folder: Path, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dt, "LATENTS_PER_SHARD", 512)
    rows = datasets.Dataset.from_dict({"image": [None] * 100_000, "text": [""] * 100_000})
    source = dt.DistillationDataset(rows, ("image", "text"), 3, tokenizer=make_tokenizer())
    args = cache_args(teacher, folder, tmp_path, resolution=2**16)
    with pytest.raises(
        dt.UserError, match=r"^--cache_latents needs 107TB in \S+ for 100,000 images, where \S+B are free: "
    ):
        cached(args, vae, source)


def test_a_disk_that_fills_up_is_one_sentence(tmp_path: Path, teacher: Path, vae: AutoencoderKL) -> None:
    plain = samples(12)
    many = json.dumps({"text": [f"a {i % 10} b" for i in range(2000)]}).encode()
    folder = write_tar(tmp_path / "data" / "00000.tar", [*plain[:7], {**plain[7], "json": many}, *plain[8:]]).parent
    args = cache_args(teacher, folder, tmp_path / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, limits[1]))
        with pytest.raises(
            dt.TrainingError, match=r"^Latents cannot be written to \S+/cache/\w+ \(.*\): make room, and"
        ):
            cached(args, vae)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in (tmp_path / "cache").rglob("*.*") if path.is_file()} == {
        "00000.tar", ".lock",
    }  # fmt: skip
    assert len(contents(cached(args, vae))) == 3


def test_a_folder_that_cannot_be_made_is_named(
    tmp_path: Path, teacher: Path, folder: Path, vae: AutoencoderKL
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(dt.UserError, match=r"^--latents_cache_dir \S+/file/\w+ cannot be written to: "):
        cached(cache_args(teacher, folder, tmp_path / "file"), vae)


def test_it_lies_beside_the_output(
    tmp_path: Path, teacher: Path, folder: Path, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = cache_args(teacher, folder, tmp_path)
    args.latents_cache_dir, args.output_dir = None, "runs/tiny/"
    assert place_of(cached(args, vae)).parent == tmp_path / "runs" / "tiny-latents"


# --- whole runs -----------------------------------------------------------------------------------------------


def test_a_run_from_the_cache_trains_the_same(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tar(tmp_path / "data" / "00000.tar", samples(12, side=64)).parent
    step, encode_images = dt.training_step, dt.encode_images
    terms: list[torch.Tensor] = []
    encoded: list[int] = []

    def watched_step(*args: Any) -> Any:
        result = step(*args)
        terms.append(result[0])
        return result

    def watched_encoding(vae: AutoencoderKL, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoded.append(len(pixel_values))
        return encode_images(vae, pixel_values)

    monkeypatch.setattr(dt, "training_step", watched_step)
    monkeypatch.setattr(dt, "encode_images", watched_encoding)
    settings = {"center_crop": True, "random_flip": True, "max_train_steps": 4, "train_batch_size": 3}
    cache = {"cache_latents": True, "latents_cache_dir": tmp_path / "cache"}
    train(teacher, folder, tmp_path / "uncached", distill_level="sd_tiny", **settings)
    assert sum(encoded) == 12
    train(teacher, folder, tmp_path / "cached", distill_level="sd_tiny", **settings, **cache)
    assert sum(encoded) == 12 + 2 * 12  # both variants
    torch.testing.assert_close(torch.stack(terms[4:]), torch.stack(terms[:4]), rtol=1e-3, atol=0)
    train(teacher, folder, tmp_path / "other", distill_level="sd_small", **settings, **cache)
    assert sum(encoded) == 12 + 2 * 12 and len(terms) == 12  # another student learns from the same cache


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache_latents", "--streaming", "--max_train_steps", "1"], "--cache_latents does not go with --streaming"),
        (
            ["--latents_cache_dir", "somewhere", "--fidelity_samples", "0"],
            "--latents_cache_dir needs --cache_latents, --teacher_latents, --random_conditioning or --fidelity",
        ),
        (["--cache_latents", "--latents_cache_dir", __file__], "is a file, not a folder"),
    ],
)
def test_flags_that_do_not_go_together(
    teacher: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        dt.parse_args(["--pretrained_model_name_or_path", str(teacher), "--dataset_name", "some/data", *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_compiled_encoder_sees_one_shape(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for compiler in ("CC", "CXX"):
        monkeypatch.setenv(compiler, sys.executable)  # nothing is translated
    plain = samples(22)
    for broken in (3, 9, 10, 17, 18, 19):
        plain[broken]["png"] = b"no image"
    folder = write_tar(tmp_path / "data" / "00000.tar", plain).parent
    counter, compile_net = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compile_net, backend=counter))
    args = cache_args(teacher, folder, tmp_path / "compiled", train_batch_size=4, compile=True)
    one = cached(args, load_vae(teacher))
    other = cached(cache_args(teacher, folder, tmp_path / "plain", train_batch_size=4), load_vae(teacher))
    assert counter.frame_count == 1
    for row in range(22):
        torch.testing.assert_close(one[row], other[row], rtol=1e-3, atol=1e-4)
