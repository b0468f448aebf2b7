"""Captions without images: the pool, random conditioning, and latents that the teacher makes."""

import json
import math
import re
import signal
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from helpers import (
    ROOT,
    assert_equal,
    assert_same_checkpoint,
    data_args,
    dataset_of,
    flags,
    make_pipeline,
    make_tokenizer,
    new_run,
    toy_images,
    train,
    unet_weights,
    write_imagefolder,
    write_shards,
    write_tar,
)
from launcher import Launcher
from servers import finish_data

import distill_training as dt

TINY_SD = ROOT / "tests" / "tiny-sd"
CAPTIONS = [
    f"{letter} {colour} {shape}" for letter in "abcdefghij" for colour in ("red", "blue") for shape in ("oval", "star")
]


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captions") / "captions.txt"
    path.write_text("\n".join(CAPTIONS) + "\n")
    return path


def pool_of(args: Any, tokenizer: Any = None) -> dt.CaptionPool:
    dataset = None if args.caption_pool else dataset_of(args)
    dataset = dataset or dt.DistillationDataset(range(4), ("image", "text"), 0)
    return dt.make_caption_pool(args, dataset, tokenizer or make_tokenizer(), Accelerator(cpu=True))


def token_ids(texts: list[str]) -> np.ndarray:
    tokenizer = make_tokenizer()
    settings = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    return np.array(tokenizer(texts, **settings).input_ids)


# ----------------------------------------------------------------------------------------------------------------
# The pool.


def write_pool(kind: str, folder: Path) -> tuple[Path, list[str]]:
    """A source of captions of this kind, and the captions that can be used of it in order."""
    images = toy_images(6)
    texts = [text for _, text in images]
    if kind == "text file":
        path = folder / "pool.txt"
        path.write_bytes("\ufeffa red circle\n\n  \r\nun carr\u00e9 bleu\r\na\0b\n".encode())
        return path, ["a red circle", "un carr\u00e9 bleu"]
    if kind == "shards":
        return write_shards(folder / "shards", images, per_shard=4), texts
    if kind == "captions alone":
        write_tar(folder / "alone" / "00000.tar", [{"txt": text.encode()} for text in texts])
        write_tar(folder / "alone" / "00001.tar", [{"json": json.dumps({"caption": ["a cat", "a dog"]}).encode()}])
        return folder / "alone", [*texts, "a cat", "a dog"]
    return write_imagefolder(folder / "images", images), texts


@pytest.mark.parametrize("kind", ["text file", "shards", "captions alone", "images"])
def test_a_pool_holds_the_captions_as_tokens(
    tmp_path: Path, teacher: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, texts = write_pool(kind, tmp_path)
    args = data_args(
        teacher, teacher_latents=2, caption_pool=source, latents_cache_dir=tmp_path / "cache", center_crop=False
    )
    with caplog.at_level("INFO"):
        pool = pool_of(args)
    assert np.array_equal(torch.stack([pool[i] for i in range(len(pool))]).numpy(), token_ids(texts))
    assert pool.path.stat().st_size == len(texts) * 2 * 16
    left_out = 3 if kind == "text file" else 0
    assert f"The pool has {len(texts)} captions; left out: {left_out} samples" in caplog.text
    made = pool.path.stat().st_mtime_ns
    assert pool_of(args).path == pool.path and pool.path.stat().st_mtime_ns == made  # the second time it is there


@pytest.mark.parametrize("kind", ["shards", "images"])
def test_without_a_pool_it_is_the_captions_of_the_data(tmp_path: Path, teacher: Path, kind: str) -> None:
    source, texts = write_pool(kind, tmp_path)
    settings = {"train_data_dir": source, "latents_cache_dir": tmp_path / "cache", "random_conditioning": 5}
    pool = pool_of(data_args(teacher, **settings))
    assert np.array_equal(torch.stack([pool[i] for i in range(len(pool))]).numpy(), token_ids(texts))
    fewer = data_args(teacher, **settings, max_train_samples=3)
    rows = dataset_of(fewer).rows
    pool = pool_of(fewer)
    wanted = token_ids([rows.caption(i) for i in range(3)])
    assert np.array_equal(torch.stack([pool[i] for i in range(len(pool))]).numpy(), wanted)


def test_another_content_or_tokenizer_is_another_pool(tmp_path: Path, teacher: Path) -> None:
    path = tmp_path / "pool.txt"
    path.write_text("a cat\na dog\n")
    settings = {"teacher_latents": 2, "caption_pool": path, "latents_cache_dir": tmp_path / "c", "center_crop": False}
    args = data_args(teacher, **settings)
    first = pool_of(args)
    path.write_text("a cow\na dog\n")
    second = pool_of(args)
    assert second.path != first.path and second.fingerprint() != first.fingerprint()
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["cow"])
    assert pool_of(args, tokenizer).path not in (first.path, second.path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_tokenising_goes_on_after_a_kill(tmp_path: Path, teacher: Path, launcher: Launcher, ranks: int) -> None:
    source = tmp_path / "pool.txt"
    source.write_text("".join(f"a {'abcdefghij'[i % 10]} {'abcdefghij'[i // 10 % 10]}\n" for i in range(400)))
    settings = {"teacher_latents": 2, "caption_pool": source, "train_batch_size": 2, "max_train_steps": 1}
    settings |= {"teacher_latents_steps": 1, "latents_cache_dir": tmp_path / "cache", "distill_level": "sd_tiny"}
    slow = "import time\ndt.TOKENIZED_AT_ONCE = 7\nwhole = dt.tokenize_captions\n"
    slow += "def slowly(*args):\n    time.sleep(0.05)\n    return whole(*args)\ndt.tokenize_captions = slowly\n"
    line = flags(teacher, None, tmp_path / "out", **settings)
    run = launcher.start(line, tmp_path / "log", ranks=ranks, before=slow)
    run.wait_for(lambda: [path for path in (tmp_path / "cache").rglob("*.part") if path.stat().st_size > 2000])
    run.kill_group()
    assert run.wait() == [-signal.SIGKILL] * ranks
    (partial,) = (tmp_path / "cache").rglob("*.part")
    with open(partial, "ab") as file:
        file.write(b"half")  # of a row, as a full disk leaves it
    kept = partial.read_bytes()[: partial.stat().st_size // 32 * 32]
    assert 0 < len(kept) < 400 * 32
    again = launcher.start(line, tmp_path / "log2", ranks=ranks)
    assert again.wait() == [0] * ranks, again.log()
    (path,) = (tmp_path / "cache").rglob(dt.TOKENS)
    assert path.read_bytes() == token_ids(source.read_text().splitlines()).astype(np.uint16).tobytes()
    assert f"{len(kept) // 32} captions" in again.log() or f" {len(kept) // 32}" in again.log()


# ----------------------------------------------------------------------------------------------------------------
# data.py --captions_only.


def caption_table(path: Path, captions: list[str | None]) -> Path:
    """A table without URLs."""
    pq.write_table(pa.table({"TEXT": captions, "score": list(range(len(captions)))}), path)
    return path


def write_alone(folder: Path, table: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    line = ["--captions_only", "--caption_file", table, "--caption_column", "TEXT", "--output_dir", folder, *flags]
    return finish_data(*line)


def read_alone(folder: Path) -> list[str]:
    return list(dt.data.read_captions(folder, "text", None))


def test_captions_alone_are_the_rows_that_images_would_be_fetched_for(tmp_path: Path) -> None:
    texts = [f"caption {i} \u00e9" for i in range(50)]
    table = caption_table(tmp_path / "t.parquet", [*texts, texts[3], None, "  "])
    folder = tmp_path / "captions"
    done = write_alone(folder, table, "--filter", "score<51", "--number_sample_per_shard", 20, "--max_samples", 45)
    assert done.returncode == 0, done.stderr
    for line in ("dropped, duplicate caption: 1", "Rows chosen: 45, in 3 shards of 20", "Disk space: about"):
        assert line in done.stdout
    order = np.random.default_rng(0).permutation(np.arange(50))[:45]
    assert read_alone(folder) == [texts[row] for row in order]
    with tarfile.open(folder / "00002.tar") as tar:  # by the reader that everybody has
        assert tar.getnames() == [f"{position:09d}.txt" for position in range(40, 45)]
    done = finish_data("--check", folder)
    assert done.returncode == 0 and "45 captions are there." in done.stdout, done.stderr


def test_captions_alone_go_on_grow_and_are_mended(tmp_path: Path) -> None:
    table = caption_table(tmp_path / "t.parquet", [f"caption {i}" for i in range(60)])
    folder, settings = tmp_path / "captions", ("--number_sample_per_shard", 20, "--max_samples")
    assert write_alone(folder, table, *settings, 45).returncode == 0
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.tar")}
    (folder / "00001.tar").write_bytes(b"damaged")
    done = finish_data("--check", folder)
    assert done.returncode == 1 and "00001.tar has 7 bytes instead of" in done.stdout
    done = write_alone(folder, table, *settings, 60)
    assert done.returncode == 0, done.stderr
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.tar")}
    assert after["00000.tar"] == before["00000.tar"] and after["00001.tar"][0] == before["00001.tar"][0]
    assert sorted(read_alone(folder)) == sorted(f"caption {i}" for i in range(60))
    done = write_alone(folder, table, *settings, 60, "--seed", 1)
    assert done.returncode == 2 and "seed was 0, is 1" in done.stderr
    line = ["--caption_file", table, "--caption_column", "TEXT", "--url_column", "TEXT"]
    done = finish_data(*line, "--output_dir", folder)
    assert done.returncode == 2 and "was made with --captions_only" in done.stderr


def test_a_pool_is_what_its_manifest_says(tmp_path: Path, teacher: Path) -> None:
    """Neither what another run left half done, nor what is missing, is taken for it."""
    table = caption_table(tmp_path / "c.parquet", [f"caption {number}" for number in range(9)])
    alone = tmp_path / "alone"
    done = write_alone(alone, table, "--number_sample_per_shard", "4")
    assert done.returncode == 0, done.stderr
    texts = sorted(dt.data.read_captions(alone, "text", None))
    assert texts == [f"caption {number}" for number in range(9)]
    write_tar(alone / "00003.tar", [{"txt": b"of a run that has not ended"}])
    assert sorted(dt.data.read_captions(alone, "text", None)) == texts
    manifest = json.loads((alone / "manifest.json").read_text())
    (alone / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(dt.UserError, match="says that it is not finished; the command that made the folder goes on"):
        list(dt.data.read_captions(alone, "text", None))
    (alone / "manifest.json").write_text(json.dumps(manifest))
    (alone / "00001.tar").unlink()
    with pytest.raises(dt.UserError, match="alone: 00001.tar is missing; the command"):
        list(dt.data.read_captions(alone, "text", None))


def test_a_sample_with_a_text_and_a_json_has_one_caption(tmp_path: Path) -> None:
    """As img2dataset writes them; the entry that training reads, and nothing called "captions"."""
    fact = json.dumps({"captions": ["other"], "blip": "a cat", "url": "http://h"}).encode()
    write_tar(tmp_path / "a" / "00000.tar", [{"json": fact, "txt": b"one"}, {"txt": b"two", "json": fact}])
    assert list(dt.data.read_captions(tmp_path / "a", "text", None)) == ["one", "two"]
    write_tar(tmp_path / "b" / "00000.tar", [{"json": fact}])
    assert list(dt.data.read_captions(tmp_path / "b", "blip", None)) == ["a cat"]


def test_a_pool_is_known_by_every_caption_and_its_padding(tmp_path: Path, teacher: Path) -> None:
    """One of a thousand, which a sample of 256 would miss; and a tokenizer that pads otherwise."""
    pools = []
    for text in ("a cat", "a dog"):
        lines = ["a red circle"] * 1000
        lines[501] = text
        (tmp_path / "pool.txt").write_text("\n".join(lines))
        settings = {"caption_pool": tmp_path / "pool.txt", "teacher_latents": 4, "center_crop": False}
        args = data_args(teacher, **settings)
        args.latents_cache_dir = str(tmp_path / "cache")
        pools.append(pool_of(args))
    assert pools[0].fingerprint() != pools[1].fingerprint() and pools[0].fingerprint().startswith("1000 captions (")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "a</w>"
    padded = pool_of(args, tokenizer)
    assert padded.path.parent != pools[1].path.parent and padded[0][-1] != pools[1][0][-1]


def test_a_pool_that_cannot_be_kept_is_one_sentence(tmp_path: Path, teacher: Path, launcher: Launcher) -> None:
    """A limit on the size of files stands for a full disk."""
    (tmp_path / "pool.txt").write_text("a red circle\n" * 40_000)
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
    line = teacher_run(teacher, tmp_path / "out", tmp_path / "pool.txt")
    run = launcher.start(line, tmp_path / "log", before=limit)
    assert run.wait() == [1] and "Traceback" not in run.log(), run.log()
    assert "error: Captions cannot be read, or kept in " in run.log()
    assert "make room, and the same command goes on" in run.log()


def test_flags_on_images_do_not_go_with_captions_only(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--image_size", "256", "--retries", "3", "--retry_failed", "--url_column", "URL", "--enable_wandb"]
    with pytest.raises(SystemExit, match="2"):
        dt.data.parse_args(["--captions_only", *flags])
    said = "leave out --image_size, --retries, --retry_failed, --enable_wandb, --url_column"
    assert said in capsys.readouterr().err


def test_captions_alone_are_no_training_data(tmp_path: Path, teacher: Path) -> None:
    table = caption_table(tmp_path / "t.parquet", ["a cat", "a dog"])
    assert write_alone(tmp_path / "captions", table).returncode == 0
    with pytest.raises(dt.UserError, match="holds captions without images: --caption_pool reads them"):
        dataset_of(data_args(teacher, train_data_dir=tmp_path / "captions"))
    args = data_args(teacher, teacher_latents=2, caption_pool=tmp_path / "captions", center_crop=False)
    args.latents_cache_dir = str(tmp_path / "cache")
    assert len(pool_of(args)) == 2


# ----------------------------------------------------------------------------------------------------------------
# Random conditioning.


def batch_of(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    mean = torch.randn(size, 4, 4, 4, generator=generator).half()
    ids = torch.full((size, 16), 3), torch.full((size, 16), 4)
    return {"latent_mean": mean, "latent_std": mean.abs(), "input_ids": ids[0], "pool_input_ids": ids[1]}


def test_captions_are_swapped_by_the_noise_and_alike_for_both(teacher: Path) -> None:
    """p(t) = exp(-lambda (1 - t / T)); student and teacher see the same text, the task term only its own."""
    run = new_run(teacher, random_conditioning=5)
    seen: dict[str, Any] = {}
    run.text_encoder.register_forward_pre_hook(lambda _, args: seen.update(ids=args[0]))
    for name in ("unet", "teacher_unet"):
        keep = lambda _, args, name=name: seen.update({name: args})  # noqa: E731
        getattr(run, name).register_forward_pre_hook(keep)
    times, swapped = [], []
    for number in range(40):
        losses = dt.losses_of(run, batch_of(64), torch.Generator().manual_seed(number))
        assert all(torch.equal(*pair) for pair in zip(seen["unet"], seen["teacher_unet"], strict=True))
        assert set(map(tuple, seen["ids"].tolist())) <= {(3,) * 16, (4,) * 16}
        times.append(seen["unet"][1])
        swapped.append(seen["ids"][:, 0] == 4)
    share, chance = torch.cat(swapped).float(), torch.exp(-5 * (1 - torch.cat(times) / 1000))
    for low in range(0, 1000, 250):
        part = (torch.cat(times) >= low) & (torch.cat(times) < low + 250)
        spread = math.sqrt((chance[part] * (1 - chance[part])).sum()) / part.sum()
        assert abs(share[part].mean() - chance[part].mean()) < 4 * spread, low
    assert 0.1 < share.mean() < 0.3  # 0.199
    del losses


def test_a_swapped_sample_has_no_task_term() -> None:
    prediction = torch.arange(12.0).reshape(3, 1, 2, 2)
    target, teacher_pred = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    swapped = torch.tensor([False, True, False])
    losses = dt.distillation_loss(
        prediction,
        teacher_pred,
        target,
        [],
        [],
        task_weight=2.0,
        output_weight=1.0,
        feature_weight=0.0,
        swapped=swapped,
    )
    # Squares of 0 to 3 and 8 to 11, over all twelve numbers.
    assert losses["task_loss"].item() == pytest.approx((0 + 1 + 4 + 9 + 64 + 81 + 100 + 121) / 12)
    assert losses["output_loss"].item() == pytest.approx(sum((n - 1) ** 2 for n in range(12)) / 12)
    assert losses["loss"].item() == pytest.approx(2 * losses["task_loss"].item() + losses["output_loss"].item())


def test_nothing_is_drawn_without_random_conditioning(teacher: Path) -> None:
    """0 is off, not exp(0): no caption is swapped, and the noise is that of a run that knows no pool."""
    losses = [
        dt.losses_of(new_run(teacher, **settings), batch_of(4), torch.Generator().manual_seed(0))["loss"]
        for settings in ({}, {"random_conditioning": 0})
    ]
    assert torch.equal(*losses)


def test_the_pools_caption_follows_from_seed_epoch_and_sample(tmp_path: Path, teacher: Path, captions: Path) -> None:
    shards = write_shards(tmp_path / "shards", toy_images(8))
    settings = {"train_data_dir": shards, "caption_pool": captions, "latents_cache_dir": tmp_path / "cache"}
    args = data_args(teacher, **settings, random_conditioning=5, proportion_empty_prompts=0.4)
    datasets = []
    for _ in range(2):
        dataset = dataset_of(args)
        dt.make_caption_pool(args, dataset, make_tokenizer(), Accelerator(cpu=True))
        datasets.append(dataset)
    known = set(map(tuple, token_ids(CAPTIONS).tolist()))
    empty = tuple(token_ids([""])[0].tolist())
    drawn = set()
    for epoch in range(4):
        for row in range(8):
            one, other = (dataset[epoch, row] for dataset in datasets)
            assert_equal(one, other)
            own, swapped = (tuple(one[name].tolist()) for name in ("input_ids", "pool_input_ids"))
            assert (own == empty) == (swapped == empty)  # what is left empty is so either way
            assert swapped == empty or swapped in known
            drawn.add(swapped)
    assert empty in drawn and len(drawn) > 10


# ----------------------------------------------------------------------------------------------------------------
# Latents that the teacher makes.


@pytest.fixture(scope="module")
def scaled_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose latents are scaled as Stable Diffusion's are, by 0.18215."""
    folder = make_pipeline(tmp_path_factory.mktemp("scaled") / "teacher")
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] == 0.18215
    return folder


def teacher_run(teacher: Path, output: Path, captions: Path, **settings: Any) -> list[str]:
    defaults: dict[str, Any] = {"teacher_latents": 6, "caption_pool": captions, "teacher_latents_steps": 2}
    defaults |= {"distill_level": "sd_tiny", "max_train_steps": 2}
    return flags(teacher, None, output, **(defaults | settings))


def test_the_teachers_latents_decode_to_its_images(tmp_path: Path, scaled_teacher: Path, captions: Path) -> None:
    """Both ways: the pipeline's own image of the same noise and caption, and ours decoded as a mean of the VAE's."""
    dt.main(dt.parse_args(teacher_run(scaled_teacher, tmp_path / "out", captions)))
    (manifest,) = (tmp_path / "out-latents").glob("*/manifest.json")
    rows = dt.data.ShardFolder(manifest.parent)
    assert len(rows) == 6
    pipeline = StableDiffusionPipeline.from_pretrained(scaled_teacher, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    drawn = set()
    for number, row in enumerate(rows):
        (caption,) = row["text"]
        drawn.add(caption)
        mean, std = torch.from_numpy(row["latents"][0].astype(np.float32))
        assert not std.any()
        generator = torch.Generator().manual_seed(dt.derived_seed(0, "latent", number))
        noise = torch.randn((4, 8, 8), generator=generator)[None]
        wanted = pipeline(caption, latents=noise, num_inference_steps=2, guidance_scale=7.5, output_type="pt").images
        decoded = (pipeline.vae.decode(mean[None]).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(decoded, wanted, rtol=0, atol=2e-3)
    assert len(drawn) == 6 and drawn <= set(CAPTIONS)


def test_task_has_no_weight_on_the_teachers_latents(
    tmp_path: Path, teacher: Path, captions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        dt.main(dt.parse_args(teacher_run(teacher, tmp_path / "out", captions)))
    assert "Loss = 0 * task + 0.5 * output + 0.5 * feature" in caplog.text
    assert "made with guidance: the task term weighs 0" in caplog.text
    (manifest,) = (tmp_path / "out-latents").glob("*/manifest.json")
    # The folder serves another run: the same student comes out, with the same default.
    settings = {"max_train_steps": 2, "distill_level": "sd_tiny"}
    train(teacher, manifest.parent, tmp_path / "again", **settings)
    assert_equal(*(unet_weights(tmp_path / name / "unet") for name in ("out", "again")))
    card = (tmp_path / "again" / "README.md").read_text()
    assert "on latents that the teacher made of 6 captions (2 steps, guidance 7.5), without any image" in card
    assert "teacher_latents_steps" not in card  # what the run did not make
    assert "`loss = 0 * task + 0.5 * output + 0.5 * feature`" in card
    assert dt.parse_args(flags(teacher, manifest.parent, tmp_path / "x", task_weight=1)).task_weight == 1


@pytest.mark.parametrize("killed", [1, 2])
def test_any_processes_make_the_same_shards_and_a_kill_costs_a_shard(
    tmp_path: Path, teacher: Path, captions: Path, launcher: Launcher, killed: int
) -> None:
    small = "dt.LATENTS_PER_SHARD = 3"
    settings = {"teacher_latents": 14, "latents_cache_dir": tmp_path / "one"}
    run = launcher.start(teacher_run(teacher, tmp_path / "a", captions, **settings), tmp_path / "log", before=small)
    assert run.wait() == [0], run.log()
    expected = {path.name: path.read_bytes() for path in (tmp_path / "one").rglob("*.tar")}
    assert len(expected) == 5
    slow = small + "\nimport time\npaint = dt.paint_latents\n"
    slow += "def slowly(*args):\n    time.sleep(0.3)\n    return paint(*args)\ndt.paint_latents = slowly\n"
    settings["latents_cache_dir"] = tmp_path / "two"
    line = teacher_run(teacher, tmp_path / "b", captions, **settings)
    run = launcher.start(line, tmp_path / "log2", ranks=killed, before=slow)
    run.wait_for(lambda: len(list((tmp_path / "two").rglob("0*.tar"))) >= 2)
    run.kill_group()
    run.wait()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("0*.tar")}
    assert 2 <= len(made) < 5
    run = launcher.start(line, tmp_path / "log3", before=small, ranks=2)
    assert run.wait() == [0, 0], run.log() + run.log(1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").rglob("*.tar")} == expected
    assert all(path.stat().st_mtime_ns == changed for path, changed in made.items())
    assert re.search(r"Making latents of \d+ of 14 images", run.log()) and "Painting will take about" in run.log()


def test_latents_that_are_not_finite(
    tmp_path: Path, teacher: Path, captions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in 200 is replaced and counted like a broken image; more than 1 % stop the run."""
    whole = dt.paint_latents

    def broken(pipeline: Any, texts: Any, rows: range, args: Any) -> torch.Tensor:
        latents = whole(pipeline, texts, rows, args)
        latents[[row in bad for row in rows]] = float("nan")
        return latents

    monkeypatch.setattr(dt, "paint_latents", broken)
    monkeypatch.setattr(dt, "choose_captions", lambda args, size, rows: (CAPTIONS * 4)[: len(rows)])
    path = tmp_path / "many.txt"
    path.write_text("\n".join(CAPTIONS * 5))
    bad = {100}
    settings = {"teacher_latents": 150, "teacher_latents_steps": 1, "train_batch_size": 50, "max_train_steps": 3}
    dt.main(dt.parse_args(teacher_run(teacher, tmp_path / "out", path, **settings)))
    (manifest,) = (tmp_path / "out-latents").glob("*/manifest.json")
    assert [row["fault"] for row in dt.data.ShardFolder(manifest.parent)].count("broken_image") == 1
    bad = {3, 4}
    with pytest.raises(dt.TrainingError, match="2 of the teacher's latents are not finite, even in float32"):
        dt.main(dt.parse_args(teacher_run(teacher, tmp_path / "other", path, **settings)))
    # Nor by many tries, each of which leaves a shard with one of them.
    monkeypatch.setattr(dt, "LATENTS_PER_SHARD", 50)
    bad = {10, 60, 110}
    for _ in range(3):
        with pytest.raises(dt.TrainingError, match="of the teacher's (150 )?latents are not finite"):
            dt.main(dt.parse_args(teacher_run(teacher, tmp_path / "third", path, **settings)))


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, teacher: Path, captions: Path) -> None:
    settings = {"random_conditioning": 5, "latents_cache_dir": tmp_path / "cache", "checkpointing_steps": 2}
    for name, steps in (("whole", 4), ("cut", 2)):
        line = teacher_run(teacher, tmp_path / name, captions, **settings, max_train_steps=steps)
        dt.main(dt.parse_args(line))
    for path in (tmp_path / "cut").iterdir():
        if path.name == "model_index.json":
            path.unlink()
    line = teacher_run(teacher, tmp_path / "cut", captions, **settings, max_train_steps=4)
    dt.main(dt.parse_args([*line, "--resume_from_checkpoint", "latest"]))
    assert_equal(*(unet_weights(tmp_path / name / "unet") for name in ("whole", "cut")))
    other = tmp_path / "other.txt"
    other.write_text("\n".join(CAPTIONS[::-1]))
    changed = teacher_run(teacher, tmp_path / "cut", other, **settings, max_train_steps=6)
    with pytest.raises(dt.UserError, match="caption pool 40 captions .* -> 40 captions "):
        dt.main(dt.parse_args([*changed, "--resume_from_checkpoint", "latest"]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_while_captions_are_swapped(
    tmp_path: Path, teacher: Path, captions: Path, launcher: Launcher, ranks: int
) -> None:
    """Every rank draws timesteps, noise, swaps and captions of its own, and draws the same again."""
    settings = {"random_conditioning": 5, "latents_cache_dir": tmp_path / "cache", "checkpointing_steps": 1}
    settings |= {"max_train_steps": 6, "resume_from_checkpoint": "latest"}
    lines = {name: teacher_run(teacher, tmp_path / name, captions, **settings) for name in ("whole", "cut")}
    whole = launcher.start(lines["whole"], tmp_path / "log", ranks=ranks)
    assert whole.wait() == [0] * ranks, whole.log()
    cut = launcher.start(lines["cut"], tmp_path / "cut-log", ranks=ranks)
    cut.wait_for(lambda: (tmp_path / "cut" / "checkpoint-2").exists())
    cut.kill_group()
    assert cut.wait() == [-signal.SIGKILL] * ranks
    again = launcher.start(lines["cut"], tmp_path / "again-log", ranks=ranks)
    assert again.wait() == [0] * ranks, again.log()
    assert re.search(r"Optimiser steps = 6, going on after [2-5]", again.log())
    assert_same_checkpoint(*(tmp_path / name / "checkpoint-6" for name in ("whole", "cut")))


# ----------------------------------------------------------------------------------------------------------------
# What is refused.


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"caption_pool": None}, "--teacher_latents needs --caption_pool here."),
        ({"random_flip": True}, "--random_flip has no meaning with --teacher_latents."),
        ({"streaming": True}, "--streaming has no meaning with --teacher_latents."),
        ({"max_train_samples": 3}, "--max_train_samples has no meaning with --teacher_latents."),
        ({"cache_latents": True}, "--cache_latents has no meaning with --teacher_latents."),
        (
            {"train_data_dir": "{shards}"},
            "Give exactly one of --dataset_name, --train_data_dir and --teacher_latents.",
        ),
        ({"teacher_latents": None, "train_data_dir": "{shards}"}, "--caption_pool is read with --teacher_latents or"),
        ({"caption_pool": "{root}/none"}, "none is neither a folder of shards or images nor a .txt file of captions."),
        (
            {"random_conditioning": 5, "output_weight": 0, "feature_weight": 0},
            "--random_conditioning needs --output_w",
        ),
        ({"task_weight": 0, "output_weight": 0, "feature_weight": 0}, "are all 0: nothing would be trained."),
        (
            {"teacher_latents": None, "dataset_name": "a/b", "streaming": True, "random_conditioning": 1}
            | {"caption_pool": None},
            "--random_conditioning needs --caption_pool here.",
        ),
    ],
)
def test_flags_that_do_not_go_together(
    tmp_path: Path, teacher: Path, shards: Path, captions: Path, settings: dict[str, Any], sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"shards": shards, "root": tmp_path}
    settings = {name: value.format(**places) if isinstance(value, str) else value for name, value in settings.items()}
    with pytest.raises(SystemExit, match="2"):
        dt.parse_args(teacher_run(teacher, tmp_path / "out", captions, **settings))
    assert sentence in capsys.readouterr().err


def test_more_latents_than_captions(tmp_path: Path, teacher: Path, captions: Path, launcher: Launcher) -> None:
    done = launcher.finish(teacher_run(teacher, tmp_path / "out", captions, teacher_latents=41), tmp_path / "log")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("--teacher_latents 41 is more than --caption_pool has: 40.")
    assert not (tmp_path / "out").exists()
