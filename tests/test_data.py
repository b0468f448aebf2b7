"""What the trainer makes of shards, image folders, hub tables and of images in every mode."""

import argparse
import contextlib
import io
import itertools
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator
from helpers import (
    assert_same_batches,
    data_args,
    dataset_of,
    make_tokenizer,
    toy_images,
    write_imagefolder,
    write_shards,
)
from PIL import Image

import distill_training as dt


def file_bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def batches_of(args: argparse.Namespace, count: int, first: int = 0) -> list[dict[str, torch.Tensor]]:
    loader = dt.make_dataloader(dataset_of(args), args, Accelerator(cpu=True), first)
    return list(itertools.islice(loader, count))


@pytest.fixture(scope="module")
def images() -> list[tuple[bytes, str]]:
    return toy_images(12, size=(48, 40))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, images: list[tuple[bytes, str]]) -> Path:
    """The same images as a dataset repository of two parquet files."""
    folder = tmp_path_factory.mktemp("table")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for part, rows in enumerate((images[:6], images[6:])):
        columns = {"image": [{"bytes": data, "path": None} for data, _ in rows], "text": [text for _, text in rows]}
        path = folder / "data" / f"train-0000{part}-of-00002.parquet"
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return folder


# --- images ---------------------------------------------------------------------------------------------------


def test_transforms_keep_the_aspect_ratio_and_the_range() -> None:
    image = Image.new("RGB", (100, 50))
    image.paste((255, 255, 255), (50, 0, 100, 50))
    centre = dt.image_transforms(32, center_crop=True, random_flip=False)(image)
    assert centre.shape == (3, 32, 32) and centre.dtype == torch.float32
    # Resized to 64 x 32 the edge is at column 32, so a crop of the middle has it at 16: no squeezing to 8 or 24.
    assert centre[:, :, :13].max() < -0.9 and centre[:, :, 19:].min() > 0.9
    enlarged = dt.image_transforms(32, center_crop=False, random_flip=True)(Image.new("RGB", (5, 9)))
    assert enlarged.shape == (3, 32, 32)
    crops = {float(dt.image_transforms(32, False, False)(image).mean()) for _ in range(20)}
    assert len(crops) > 3


def test_a_caption_may_be_a_list_and_is_padded() -> None:
    tokenizer = make_tokenizer()
    ids = dt.tokenize_captions(["a b", ["c", "d", "e"]], tokenizer, random.Random(0))
    assert ids.shape == (2, 16) and ids.dtype == torch.int64
    drawn = {
        tuple(dt.tokenize_captions([["c", "d", "e"]], tokenizer, random.Random(i))[0].tolist()) for i in range(30)
    }
    assert drawn == {tuple(dt.tokenize_captions([text], tokenizer, random.Random(0))[0].tolist()) for text in "cde"}
    with pytest.raises(ValueError, match="list of strings, got"):
        dt.tokenize_captions([[3]], tokenizer, random.Random(0))


# --- the same samples from every source -----------------------------------------------------------------------


def test_every_source_gives_the_same_batches(
    tmp_path: Path, teacher: Path, images: list[tuple[bytes, str]], table: Path
) -> None:
    cache = tmp_path / "cache"
    sources = {
        "shards": {"train_data_dir": write_shards(tmp_path / "shards", images, per_shard=5)},
        "imagefolder": {"train_data_dir": write_imagefolder(tmp_path / "folder", images), "cache_dir": cache},
        "table": {"dataset_name": table, "cache_dir": cache},
        "stream": {"dataset_name": table, "streaming": True, "max_train_steps": 1, "cache_dir": cache},
    }
    random_crop = {"center_crop": False, "random_flip": True}
    in_order = {
        name: list(itertools.islice(iter(dataset_of(data_args(teacher, **source, **random_crop))), 12))
        for name, source in sources.items()
    }
    shuffled = {
        name: batches_of(data_args(teacher, **source, **random_crop), 7)
        for name, source in sources.items()
        if name != "stream"
    }
    for examples in in_order.values():
        assert len(examples) == 12
    for name in ("imagefolder", "table"):
        assert_same_batches(in_order["shards"], in_order[name])
        assert_same_batches(shuffled["shards"], shuffled[name])
    centre = [dataset_of(data_args(teacher, **sources[name])) for name in ("shards", "stream")]
    assert_same_batches(*([dt.collate_fn(list(itertools.islice(iter(source), 12)))] for source in centre))
    assert not torch.equal(shuffled["shards"][0]["pixel_values"], shuffled["shards"][3]["pixel_values"])


@pytest.mark.parametrize("workers", [0, 2])
def test_shuffled_batches_start_anywhere(
    tmp_path: Path, teacher: Path, table: Path, shards: Path, workers: int
) -> None:
    local = {"train_data_dir": shards, "random_flip": True, "center_crop": False, "dataloader_num_workers": workers}
    stream = {"dataset_name": table, "streaming": True, "max_train_steps": 1, "dataloader_num_workers": workers}
    for source in (local, stream):
        args = data_args(teacher, cache_dir=tmp_path, **source)
        whole = batches_of(args, 9)
        assert_same_batches(whole[5:], batches_of(args, 4, first=5))
    assert_same_batches(batches_of(data_args(teacher, **local), 7), batches_of(data_args(teacher, **local), 7))


def test_ranks_share_every_epoch() -> None:
    def places(rank: int, processes: int, batch_size: int, count: int, first: int = 0) -> list[list[tuple[int, int]]]:
        sampler = dt.SeededBatches(10, batch_size, seed=7, rank=rank, processes=processes, first=first)
        return list(itertools.islice(iter(sampler), count))

    alone = sum(places(0, 1, 4, 10), [])
    for epoch in range(4):
        assert sorted(alone[10 * epoch : 10 * epoch + 10]) == [(epoch, row) for row in range(10)]
    orders = [[row for _, row in alone[10 * epoch : 10 * epoch + 10]] for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    ranks = zip(places(0, 2, 2, 10), places(1, 2, 2, 10), strict=True)
    assert sum((first + second for first, second in ranks), []) == alone  # the order does not depend on the processes
    assert places(1, 2, 2, 10)[6:] == places(1, 2, 2, 4, first=6)


# --- what cannot be used --------------------------------------------------------------------------------------


def damaged(images: list[tuple[bytes, str]]) -> list[tuple[bytes, str]]:
    samples = list(images)
    samples[1] = (samples[1][0][:200], samples[1][1])  # cut
    samples[4] = (b"<html>not found</html>", samples[4][1])
    samples[6] = (samples[6][0], "  \n")
    samples[9] = (b"", samples[9][1])
    return samples


def test_broken_samples_are_replaced_and_counted(
    tmp_path: Path, teacher: Path, images: list[tuple[bytes, str]]
) -> None:
    args = data_args(teacher, train_data_dir=write_shards(tmp_path, damaged(images)), resolution=16)
    whole = dataset_of(data_args(teacher, train_data_dir=write_shards(tmp_path / "whole", images), resolution=16))
    dataset = dataset_of(args)
    for index in range(12):
        example, again = dataset[(2, index)], dataset[(2, index)]
        assert_same_batches([example], [again])
        good = [i for i in range(12) if torch.equal(example["pixel_values"], whole[(2, i)]["pixel_values"])]
        assert len(good) == 1 and good[0] not in (1, 4, 6, 9)
        assert (good == [index]) == (example["counts"][:2].sum() == 0) == (index not in (1, 4, 6, 9))
    assert dataset[(2, 1)]["counts"][0] >= 1 and dataset[(2, 6)]["counts"][1] >= 1
    batches = batches_of(args, 6)  # two epochs of twelve
    assert all(len(batch["pixel_values"]) == 4 for batch in batches)
    counts = sum(batch["counts"] for batch in batches)
    assert counts[dt.BROKEN_IMAGE] >= 6 and counts[dt.EMPTY_CAPTION] >= 2 and counts[dt.ENLARGED] == 0
    assert torch.equal(counts, sum(batch["counts"] for batch in batches_of(args, 6)))


def test_a_stream_fills_the_place_of_a_broken_row(tmp_path: Path, teacher: Path, table: Path) -> None:
    rows = list(
        datasets.load_dataset(str(table), split="train", cache_dir=str(tmp_path)).cast_column(
            "image", datasets.Image(decode=False)
        )
    )
    rows[3] = {**rows[3], "text": ""}
    rows[4] = {**rows[4], "image": {"bytes": b"no", "path": None}}

    def stream(skip: int) -> list[torch.Tensor]:
        dataset = dt.StreamingDataset(
            datasets.Dataset.from_list(rows).to_iterable_dataset(),
            ("image", "text"),
            3,
            0,
            transform=dt.image_transforms(16, True, False),
            tokenizer=make_tokenizer(),
            proportion_empty_prompts=0.0,
        )
        dataset.skip = skip
        return [example["pixel_values"] for example in itertools.islice(iter(dataset), 24 - skip)]

    whole = stream(0)
    assert torch.equal(whole[3], whole[5]) and torch.equal(whole[4], whole[5]) and not torch.equal(whole[2], whole[3])
    for skip in (1, 4, 5, 13, 16):
        assert all(torch.equal(one, other) for one, other in zip(stream(skip), whole[skip:], strict=True))


def test_only_when_nothing_is_usable_is_it_fatal(tmp_path: Path, teacher: Path) -> None:
    samples = [(b"broken", "text")] * 3 + [(toy_images(1)[0][0], "")] * 2
    dataset = dataset_of(data_args(teacher, train_data_dir=write_shards(tmp_path, samples)))
    with pytest.raises(dt.UserError, match="None of the 5 .*: 3 with a broken image, 2 with an empty caption"):
        dataset[0]


def test_small_images_are_enlarged_and_counted(teacher: Path, shards: Path) -> None:
    batch = batches_of(data_args(teacher, train_data_dir=shards, resolution=128), 1)[0]
    assert batch["pixel_values"].shape == (4, 3, 128, 128) and batch["counts"][dt.ENLARGED] == 4


def test_caption_dropout_and_sample_limit(teacher: Path, shards: Path) -> None:
    empty = dt.tokenize_captions([""], make_tokenizer(), random.Random(0))[0]
    dropped = dataset_of(data_args(teacher, train_data_dir=shards, proportion_empty_prompts=0.5))
    share = [torch.equal(dropped[(epoch, i)]["input_ids"], empty) for epoch in range(10) for i in range(20)]
    assert 70 <= sum(share) <= 130
    limited = dataset_of(data_args(teacher, train_data_dir=shards, max_train_samples=7))
    assert len(limited) == 7 and len({limited.rows[i]["text"] + str(limited.rows[i]["image"]) for i in range(7)}) == 7


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_column": "picture"}, "--image_column picture is not there; the columns are image, text, number"),
        ({"caption_column": "label"}, "--caption_column label is not there"),
        ({"caption_column": "number"}, "--caption_column number holds"),
        ({"image_column": "number"}, "--image_column number holds"),
    ],
)
def test_wrong_columns_are_named(tmp_path: Path, teacher: Path, columns: dict[str, str], message: str) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "number": datasets.Value("int64")}
    )
    data = {"image": [{"bytes": toy_images(1)[0][0], "path": None}], "text": ["a"], "number": [1]}
    datasets.Dataset.from_dict(data, features=features).to_parquet(tmp_path / "table" / "train.parquet")
    with pytest.raises(dt.UserError, match=message):
        dataset_of(data_args(teacher, dataset_name=tmp_path / "table", cache_dir=tmp_path / "cache", **columns))


def test_an_image_folder_without_captions_names_its_columns(tmp_path: Path, teacher: Path) -> None:
    folder = write_imagefolder(tmp_path / "folder", toy_images(3))
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(dt.UserError, match="--caption_column text is not there; the columns are image"):
        dataset_of(data_args(teacher, train_data_dir=folder, cache_dir=tmp_path / "cache"))


def test_all_broken_is_one_sentence_from_a_worker_too(tmp_path: Path, teacher: Path) -> None:
    folder = write_shards(tmp_path, [(b"broken", "text")] * 3)
    with pytest.raises(dt.UserError, match="^None of the 3 training samples can be used: [^\n]*$"):
        batches_of(data_args(teacher, train_data_dir=folder, dataloader_num_workers=1), 1)


def test_a_strip_is_cropped_before_it_is_resized(tmp_path: Path, teacher: Path) -> None:
    strip = [(file_bytes(Image.new("RGB", (1, 60_000))), "a strip")]
    dataset = dataset_of(data_args(teacher, train_data_dir=write_shards(tmp_path, strip), resolution=64))
    sizes = []
    transform = dataset.prepare["transform"]
    dataset.prepare["transform"] = lambda image: sizes.append(image.size) or transform(image)
    assert dataset[0]["pixel_values"].shape == (3, 64, 64) and sizes == [(1, 16)]


def test_images_in_an_archive_are_read(tmp_path: Path, teacher: Path, images: list[tuple[bytes, str]]) -> None:
    folder = write_imagefolder(tmp_path / "folder", images)
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "train.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    args = data_args(teacher, dataset_name=tmp_path / "zipped", cache_dir=tmp_path / "cache")
    local = dataset_of(data_args(teacher, train_data_dir=folder, cache_dir=tmp_path / "cache"))
    for one, other in zip(dataset_of(args), local, strict=True):
        assert_same_batches([one], [other])


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_a_stream_is_shared_out(tmp_path: Path, teacher: Path, table: Path, ranks: int, workers: int) -> None:
    source = {"dataset_name": table, "streaming": True, "max_train_steps": 1, "cache_dir": tmp_path}
    args = data_args(teacher, dataloader_num_workers=workers, train_batch_size=1, **source)
    images = []
    for rank in range(ranks):
        accelerator = SimpleNamespace(
            process_index=rank,
            num_processes=ranks,
            device=torch.device("cpu"),
            main_process_first=contextlib.nullcontext,
        )
        dataset = dt.make_train_dataset(args, make_tokenizer(), accelerator)
        batches = dt.make_dataloader(dataset, args, accelerator, 0)
        images += [batch["pixel_values"] for batch in itertools.islice(batches, 12 // ranks)]
    assert len({image.numpy().tobytes() for image in images}) == 12


def test_a_stream_that_breaks_off_is_one_sentence() -> None:
    image, caption = toy_images(1)[0]

    def rows() -> Iterator[dict[str, Any]]:
        yield {"image": {"bytes": image, "path": None}, "text": caption}
        raise OSError("connection reset")

    preparation = {"transform": dt.image_transforms(64, True, False), "tokenizer": make_tokenizer()}
    stream = datasets.IterableDataset.from_generator(rows)
    dataset = iter(dt.StreamingDataset(stream, ("image", "text"), 3, 0, proportion_empty_prompts=0.0, **preparation))
    assert next(dataset)["pixel_values"].shape == (3, 64, 64)
    with pytest.raises(dt.UserError, match=r"The stream broke off \(.*\): go on with --resume_from_checkpoint latest"):
        next(dataset)
