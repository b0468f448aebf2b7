"""The samples' format: writer, reader, decoder and the rows of flags that both scripts share.

pytest tests/test_shards.py
"""

import argparse
import gc
import io
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, toy_images, write_shards, write_tar
from PIL import Image

import data


def file_bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def images() -> list[tuple[bytes, str]]:
    return toy_images(12, size=(48, 40))


def test_every_mode_arrives_as_correct_rgb() -> None:
    red = (200, 30, 40)
    palette = Image.new("RGB", (8, 8), red).quantize(4)
    rgba = Image.new("RGBA", (8, 8), (*red, 255))
    rgba.putpixel((0, 0), (0, 0, 0, 0))
    rgba.putpixel((1, 0), (0, 0, 0, 51))
    sixteen = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
    frames = [Image.new("RGB", (8, 8), red), Image.new("RGB", (8, 8), "blue")]
    transparent_palette = Image.new("P", (8, 8), 1)
    transparent_palette.putpalette([9, 9, 9, *red])
    transparent_palette.putpixel((0, 0), 0)
    cases = {
        "rgb": (file_bytes(Image.new("RGB", (8, 8), red)), red),
        "grayscale": (file_bytes(Image.new("L", (8, 8), 77)), (77, 77, 77)),
        "grayscale with alpha": (file_bytes(Image.new("LA", (8, 8), (77, 255))), (77, 77, 77)),
        "bilevel": (file_bytes(Image.new("1", (8, 8), 1)), (255, 255, 255)),
        "rgba": (file_bytes(rgba), red),
        "palette": (file_bytes(palette), red),
        "palette with transparency": (file_bytes(transparent_palette, transparency=0), red),
        "cmyk": (file_bytes(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        "16 bits": (file_bytes(sixteen), (156, 156, 156)),
        "animation": (file_bytes(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), red),
    }
    for name, (content, expected) in cases.items():
        image = data.decode_image(content)
        assert image.mode == "RGB" and image.size == (8, 8), name
        assert image.getpixel((5, 5)) == expected, name
    assert data.decode_image(cases["rgba"][0]).getpixel((0, 0)) == (255, 255, 255)
    assert data.decode_image(cases["rgba"][0]).getpixel((1, 0)) == (204, 204, 204)
    assert data.decode_image(cases["palette with transparency"][0]).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (20, 10), "black")
    image.paste("white", (0, 0, 10, 10))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the left side is up
    shown = data.decode_image(file_bytes(image, "JPEG", exif=exif, quality=95))
    assert shown.size == (10, 20)
    assert min(shown.getpixel((5, 2))) > 240 and max(shown.getpixel((5, 17))) < 15


def test_shards_are_read_in_place(tmp_path: Path, images: list[tuple[bytes, str]]) -> None:
    rows = data.ShardFolder(write_shards(tmp_path, images, per_shard=5))
    assert [(row["image"]["bytes"], row["text"]) for row in rows] == images
    assert rows.places.nbytes <= 30 * 12


def test_shards_with_json_captions_and_strangers(tmp_path: Path, images: list[tuple[bytes, str]]) -> None:
    image = images[0][0]
    samples = [
        {"json": json.dumps({"caption": "from json"}).encode(), "PNG": image},
        {"png": image, "json": json.dumps({"text": ["one", "two"], "caption": "no"}).encode()},
        {"png": image, "txt": b"from txt", "json": b"{}"},
        {"png": image},  # no caption: not a sample
        {"txt": b"no image"},
        {"png": image, "json": b"{broken"},
        {"png": image, "json": b"[1]"},
    ]
    write_tar(tmp_path / "a.tar", samples)
    texts = [row["text"] for row in data.ShardFolder(tmp_path)]
    assert texts == ["from json", ["one", "two"], "from txt", None, None]
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for suffix, content in (("jpg", image), ("txt", "ünïcode".encode())):
            member = tarfile.TarInfo(f"deep/{'x' * 120}.{suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert data.ShardFolder(tmp_path)[5] == {"image": {"bytes": image}, "text": "ünïcode"}


def write_manifest(folder: Path, images: list[tuple[bytes, str]]) -> dict:
    write_shards(folder, images, per_shard=5)
    shards = []
    for number, path in enumerate(sorted(folder.glob("*.tar"))):
        part = images[5 * number : 5 * number + 5]
        sizes = {
            "image_bytes": [len(content) for content, _ in part],
            "caption_bytes": [len(text) for _, text in part],
        }
        entry = {"name": path.name, "bytes": path.stat().st_size, "sha256": data.file_sha256(path), "count": len(part)}
        shards.append(entry | sizes)
    (folder / "manifest.json").write_text(json.dumps({"shards": shards}))
    return {"shards": shards}


def test_a_manifest_gives_the_same_samples(tmp_path: Path, images: list[tuple[bytes, str]]) -> None:
    write_manifest(tmp_path, images)
    write_tar(tmp_path / "unfinished.tar", [{"png": b"not named by the manifest", "txt": b"x"}])
    rows = data.ShardFolder(tmp_path)
    assert [(row["image"]["bytes"], row["text"]) for row in rows] == images


@pytest.mark.parametrize("damage", ["gone", "longer", "counts"])
def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path, images: list[tuple[bytes, str]], damage: str) -> None:
    manifest = write_manifest(tmp_path, images)
    if damage == "gone":
        (tmp_path / "00001.tar").unlink()
    elif damage == "longer":
        with open(tmp_path / "00001.tar", "ab") as tar:
            tar.write(bytes(512))
    else:
        manifest["shards"][1]["image_bytes"][0] += 10**6
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(data.UserError, match=r"00001\.tar"):
        data.ShardFolder(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 700, "header", "no end"])
def test_a_cut_shard_is_one_sentence(tmp_path: Path, images: list[tuple[bytes, str]], keep: int | str) -> None:
    write_shards(tmp_path, images, per_shard=12)
    path = tmp_path / "00000.tar"
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    lengths = {"header": last.offset + 200, "no end": last.offset_data + 512}
    path.write_bytes(content[: lengths.get(keep, keep)])
    with pytest.raises(data.UserError, match=r"00000\.tar is (empty or )?cut short"):
        data.ShardFolder(tmp_path)


def test_a_manifest_of_something_else_is_named(tmp_path: Path, images: list[tuple[bytes, str]]) -> None:
    (write_shards(tmp_path, images) / "manifest.json").write_text("{}")
    with pytest.raises(data.UserError, match="manifest.json is not one that data.py wrote"):
        data.ShardFolder(tmp_path)


# --- written and read back ------------------------------------------------------------------------------------


def test_a_tar_stays_the_same_byte_for_byte(tmp_path: Path) -> None:
    samples = [
        ("000000000", {".jpg": b"image", ".txt": "ü".encode()}),
        ("000000001", {".jpg": bytes(512), ".txt": b""}),
    ]
    entry = data.write_tar(tmp_path / "a.tar", samples)
    assert (
        entry["bytes"] == 10240
        and entry["sha256"] == "e0b854053838fb5b7192a0a12f39dde5abec2f8f1d2f174cbecd245425ca0f2c"
    )


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


LATENTS = {"vae": "0123456789abcdef", "scaling_factor": 0.18215, "resolution": 24, "variants": 2}


def write_latents(folder: Path, complete: bool = True, variants: int = 2) -> list[np.ndarray]:
    """Two shards: usable, broken, with two captions; and one more."""
    latents = [np.random.default_rng(i).normal(size=(2, 2, 4, 3, 3)).astype(np.float16) for i in range(3)]
    records = [
        (npy(latents[0]), {"captions": ["a red circle"], "enlarged": False}),
        (b"", {"captions": ["ünïcode"], "fault": "broken_image"}),
        (npy(latents[1]), {"captions": ["one", "two"], "enlarged": True}),
        (npy(latents[2]), {"captions": ["last"], "enlarged": False}),
    ]
    samples = [
        (f"{number:09d}", {".npy": image, ".json": json.dumps(record).encode()})
        for number, (image, record) in enumerate(records)
    ]
    entries = [data.write_shard(folder, data.shard_name(0), samples[:3])]
    entries.append(data.write_shard(folder, data.shard_name(1), iter(samples[3:])))
    head = {"format": data.FORMAT, "complete": complete, "latents": LATENTS | {"variants": variants}}
    data.write_manifest(folder, head, [json.dumps(entry) for entry in entries])
    return latents


def test_latents_are_read_back(tmp_path: Path) -> None:
    latents = write_latents(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00001.tar", "manifest.json"]
    rows = data.ShardFolder(tmp_path)
    assert rows.latents == data.latents_of(tmp_path) == LATENTS
    assert [row["text"] for row in rows] == [["a red circle"], ["ünïcode"], ["one", "two"], ["last"]]
    assert [row["fault"] for row in rows] == [None, "broken_image", None, None]
    assert [row["enlarged"] for row in rows] == [False, False, True, False]
    assert rows[1]["latents"] is None and rows[1]["image"] == {"bytes": b""}
    for index, expected in zip((0, 2, 3), latents, strict=True):
        assert rows[index]["latents"].dtype == np.float16 and np.array_equal(rows[index]["latents"], expected)
        assert rows[index]["image"]["bytes"] == npy(expected)
    assert [row["text"] for row in rows.select([3, 0])] == [["last"], ["a red circle"]]


def test_latents_need_their_manifest(tmp_path: Path) -> None:
    write_latents(tmp_path)
    (tmp_path / "manifest.json").unlink()
    assert data.latents_of(tmp_path) is None
    with pytest.raises(data.UserError, match=r"00000\.tar holds latents, which need their manifest\.json"):
        data.ShardFolder(tmp_path)
    embedded = {"png": b"an image", "npy": b"an embedding"}
    write_tar(tmp_path / "images" / "a.tar", [embedded | {"txt": b"a"}, embedded])
    assert len(data.ShardFolder(tmp_path / "images")) == 1


@pytest.mark.parametrize("content", ["{", '["shards"]', '{"shards": [{"image_bytes": [-1]}]}', "{}"])
def test_a_broken_manifest_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    assert data.latents_of(tmp_path) is None
    with pytest.raises(data.UserError, match="manifest.json (can't be read|is not one that data.py wrote): "):
        data.ShardFolder(tmp_path)


def test_an_unfinished_folder_warns(tmp_path: Path) -> None:
    write_latents(tmp_path, complete=False)
    with pytest.warns(UserWarning, match="manifest.json is of an unfinished download: training on what is there"):
        assert len(data.ShardFolder(tmp_path)) == 4


@pytest.mark.parametrize("keep", [600, 1540])  # within the image, within the caption
def test_a_shard_that_is_cut_later_is_an_error(tmp_path: Path, keep: int) -> None:
    entry = data.write_shard(tmp_path, "00000", [("0", {".jpg": b"x" * 400, ".txt": b"y" * 50})])
    data.write_manifest(tmp_path, {"complete": True}, [json.dumps(entry)])
    rows = data.ShardFolder(tmp_path)
    with open(tmp_path / "00000.tar", "r+b") as tar:
        tar.truncate(keep)
    with pytest.raises(OSError, match=r"00000\.tar is cut short"):
        rows[0]


def test_the_entry_of_a_shard_that_is_there(tmp_path: Path, images: list[tuple[bytes, str]]) -> None:
    samples = [(f"{i:09d}", {".jpg": image, ".txt": text.encode()}) for i, (image, text) in enumerate(images)]
    entry = data.write_shard(tmp_path, "00007", samples)
    path = tmp_path / "00007.tar"
    assert data.entry_of(path) == entry and entry["name"] == "00007.tar" and entry["count"] == len(images)
    assert entry["image_bytes"] == [len(image) for image, _ in images]
    json.dumps(entry)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(data.UserError, match=r"00007\.tar is (empty or )?cut short"):
        data.entry_of(path)
    for stranger in ([{"jpg": b"1", "txt": b"2", "json": b"3"}], [{"jpg": b"1", f"{'x' * 120}.txt": b"2"}]):
        with pytest.raises(data.UserError, match=r"b\.tar is not a shard of images"):
            data.entry_of(write_tar(tmp_path / "b.tar", stranger))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    code = """
import resource, signal, sys, data
from pathlib import Path
folder = Path(sys.argv[1])
data.write_shard(folder, "00000", [("0", {".npy": b"", ".json": b"{}"})])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 5, 10 ** 5))
for name in ("00000", "00001"):
    try:
        data.write_shard(folder, name, ((str(i), {".npy": bytes(1000), ".json": b"{}"}) for i in range(1000)))
    except OSError as error:
        print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "File too large\n" * 2, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]
    assert data.entry_of(tmp_path / "00000.tar")["count"] == 1


def test_put_in_place_syncs_first_and_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    replace = Path.replace
    monkeypatch.setattr(data, "sync", lambda path: steps.append(path.name))
    monkeypatch.setattr(
        Path, "replace", lambda path, to: (steps.append(f"{path.name} -> {to.name}"), replace(path, to))
    )
    for name in ("new", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    data.put_in_place(tmp_path / "new", tmp_path / "there", tmp_path / "old")
    assert steps == ["file", "new", "new -> there", tmp_path.name]
    assert (tmp_path / "there" / "file").read_text() == "new" and (tmp_path / "old" / "file").read_text() == "there"


def test_folders_are_not_synced_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    opened = []
    real = os.open
    monkeypatch.setattr(data.os, "open", lambda path, flags: opened.append((path, flags)) or real(path, flags))
    paths = [tmp_path, tmp_path / "file"]
    for path in paths:
        data.sync(path)
    with monkeypatch.context() as windows:
        windows.setattr(data.os, "name", "nt")
        for path in paths:
            data.sync(path)
    assert opened == [(tmp_path, os.O_RDONLY), (tmp_path / "file", os.O_RDONLY), (tmp_path / "file", os.O_RDWR)]


def test_without_posix_shards_are_read_and_written_all_the_same(tmp_path: Path) -> None:
    code = """
import sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
import io, json, data
from pathlib import Path
from PIL import Image
folder, buffer = Path(sys.argv[1]), io.BytesIO()
Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
entry = data.write_shard(folder, "00000", [("0", {".png": buffer.getvalue(), ".txt": b"red"})])
assert data.entry_of(folder / "00000.tar") == entry
data.write_manifest(folder, {"complete": True}, [json.dumps(entry)])
for _ in range(2):
    row = data.ShardFolder(folder)[0]
    print(row["text"], data.decode_image(row["image"]["bytes"]).getpixel((0, 0)))
    (folder / "manifest.json").unlink(missing_ok=True)
assert "torch" not in sys.modules
args = data.parse_args(["--output_dir", str(folder / "out")])
data.importlib.util.find_spec = lambda name: None
sys.exit(data.run(args))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "red (255, 0, 0)\n" * 2 and done.returncode == 2, done.stderr
    assert done.stderr == "data.py: data.py needs a POSIX system to download (training reads its shards on any)\n"


def test_a_hundred_thousand_samples_take_little_memory(tmp_path: Path) -> None:
    per_shard, entries = 5000, []
    rng = np.random.default_rng(0)
    for number in range(20):
        images, captions = (rng.integers(*limits, per_shard) for limits in ((20_000, 90_000), (30, 300)))
        size = int(data.data_offsets(images, captions)[-1, 1]) + 10240
        with open(tmp_path / f"{number:05d}.tar", "wb") as tar:
            tar.truncate(size)  # a hole takes no room
        entry = {"name": tar.name.rsplit("/")[-1], "bytes": size, "sha256": "0" * 64, "count": per_shard}
        entries.append(json.dumps(entry | {"image_bytes": images.tolist(), "caption_bytes": captions.tolist()}))
    data.write_manifest(tmp_path, {"complete": True}, entries)
    del entries
    gc.collect()
    tracemalloc.start()
    try:
        rows = data.ShardFolder(tmp_path)
        gc.collect()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == 100_000
    assert held <= 40 * 100_000 and peak <= 100 * 100_000, (held, peak)


# --- numbers of 16 and 32 bits --------------------------------------------------------------------------------


def downloaded(content: bytes) -> np.ndarray:
    args = data.parse_args(["--image_size", "64", "--encode_quality", "100"])
    return np.asarray(Image.open(io.BytesIO(data.square_jpeg(io.BytesIO(content), args)[0])))


@pytest.mark.parametrize("side", [64, 1100])  # the second is converted in bands
@pytest.mark.parametrize(("kind", "mode"), [("PNG", "I;16"), ("PPM", "I"), ("TIFF", "I;16")])
def test_sixteen_bits_are_scaled_to_eight(kind: str, mode: str, side: int) -> None:
    shades = np.full((side, side), 40_000, np.uint16)
    shades[: side // 2] = 65_535
    shades[:, : side // 2] //= 2
    content = file_bytes(Image.fromarray(shades), kind)
    assert Image.open(io.BytesIO(content)).mode == mode
    seen = np.asarray(data.decode_image(content))
    assert np.array_equal(seen, np.repeat((shades / 65535 * 255).round().astype(np.uint8)[..., None], 3, -1))
    assert {int(downloaded(content)[y, x, 0]) for y in (8, 56) for x in (8, 56)} <= {127, 128, 255, 78, 77, 156, 155}


def test_every_shade_of_16_bits_is_rounded() -> None:
    shades = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    seen = np.asarray(data.decode_image(file_bytes(Image.fromarray(shades))))[..., 0]
    assert np.array_equal(seen, (shades / 65535 * 255).round())


@pytest.mark.parametrize("largest", [200, 70_000, -70_000])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_of_32_bits_are_refused(dtype: type, largest: int) -> None:
    content = file_bytes(Image.fromarray(np.full((64, 64), largest, dtype)), "TIFF")
    with pytest.raises(ValueError, match="TIFF with pixels of 32 bits, whose range is not known"):
        data.decode_image(content)
    with pytest.raises(data.Refused, match="broken_image.*pixels of 32 bits"):
        downloaded(content)


def test_numbers_beyond_16_bits_never_wrap() -> None:
    image = Image.fromarray(np.array([[70_000, 65_535, 0, -70_000]], np.int32))
    assert [data.to_rgb(image).getpixel((x, 0))[0] for x in range(4)] == [255, 255, 0, 0]


# --- flags ----------------------------------------------------------------------------------------------------

FLAGS = {
    "numbers": [
        data.Flag("count", int, 16, data.AT_LEAST_1, "How many.", resume="free", aliases=("--number", "-n")),
        data.Flag("share", float, 0.5, data.FROM_0_TO_1, "Which part.", before=0.25),
        data.Flag("decay", float, 0.9, data.FROM_0_TO_BELOW_1, "How fast."),
        data.Flag("rate", float, None, data.MORE_THAN_0, "How far.", before=None),
        data.Flag("steps", int, 0, data.AT_LEAST_0, "How long."),
    ],
    "others": [
        data.Flag("model", str, None, None, "Which model.", required=True),
        data.Flag("level", str, "small", ("small", "tiny"), "Which level."),
        data.Flag("fast", bool, False, None, "Be fast."),
        data.Flag("polite", bool, True, None, "Be polite.", negatable=True),
        data.Flag("words", str, [], None, "Words.", nargs="+", action="extend", metavar="WORD"),
    ],
}
ROWS = [flag for flags in FLAGS.values() for flag in flags]


def parsed(*line: str) -> argparse.Namespace:
    return data.make_parser(FLAGS, "About.", "run [flags]").parse_args(["--model", "m", *line])


def test_every_kind_of_flag_is_parsed() -> None:
    assert vars(parsed()) == {flag.name: flag.default for flag in ROWS} | {"model": "m"}
    args = parsed("-n", "3", "--level", "tiny", "--fast", "--no-polite", "--words", "a", "b", "--words", "c")
    assert (args.count, args.level, args.fast, args.polite, args.words) == (3, "tiny", True, False, ["a", "b", "c"])
    assert parsed("--number", "4").count == 4 and parsed().words == []
    assert [flag.before for flag in ROWS[:4]] == [16, 0.25, 0.9, None] and ROWS[6].before == "small"
    assert [flag.resume for flag in ROWS[:2]] == ["free", "same"]


@pytest.mark.parametrize("line", [["--level", "huge"], ["--count", "x"], ["--coun", "3"], ["--no-fast"], ["--words"]])
def test_what_argparse_refuses(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parsed(*line)
    assert stopped.value.code == 2 and line[0] in capsys.readouterr().err
    with pytest.raises(SystemExit):
        data.make_parser(FLAGS, "", "").parse_args([])
    assert "--model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (["--count", "0"], "--count must be at least 1, got 0."),
        (["--share", "1.5"], "--share must be from 0 to 1, got 1.5."),
        (["--share", "nan"], "--share must be from 0 to 1, got nan."),
        (["--decay", "1"], "--decay must be from 0 to below 1, got 1.0."),
        (["--rate", "0"], "--rate must be more than 0, got 0.0."),
        (["--rate", "inf"], "--rate must be more than 0, got inf."),
        (["--steps", "-1"], "--steps must be at least 0, got -1."),
    ],
)
def test_bounds_are_said(line: list[str], problem: str) -> None:
    assert data.bound_problems(ROWS, parsed(*line)) == [problem]


def test_bounds_that_hold_are_silent() -> None:
    assert data.bound_problems(ROWS, parsed()) == []
    assert data.bound_problems(ROWS, parsed("--share", "1", "--decay", "0", "--rate", "1e-9", "--count", "1")) == []


def test_the_help_names_groups_and_defaults() -> None:
    lines = data.make_parser(FLAGS, "About.", "run [flags]").format_help().splitlines()
    assert "usage: run [flags]" in lines and "About." in lines and {"numbers:", "others:"} <= set(lines)
    text = " ".join(" ".join(lines).split())
    assert "How many. (default: 16)" in text and "How long. (default: 0)" in text
    assert "Be polite. (default: True)" in text and "--no-polite" in text
    for unset in ("How far. ", "Be fast. ", "Which model. "):
        assert unset in text and f"{unset}(default" not in text
    assert text.endswith("Words.") and "--level {small,tiny}" in text


# --- the check of a folder of latents -------------------------------------------------------------------------


def check(folder: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = data.run(data.parse_args(["--check", str(folder)]))
    return code, capfd.readouterr().out


def test_a_folder_of_latents_is_checked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_latents(tmp_path)
    code, said = check(tmp_path, capfd)
    assert code == 0 and said.endswith("everything is as the manifest says, and every image's latents load.\n")
    with open(tmp_path / "00001.tar", "r+b") as tar:
        tar.seek(512)
        tar.write(b"no numpy")
    code, said = check(tmp_path, capfd)
    assert code == 1 and "00001.tar differs from its SHA-256" in said
    assert "00001.tar 000000003.npy can't be decoded: " in said and "parquet" not in said and "00000.tar" not in said
    (tmp_path / "00001.tar").unlink()
    code, said = check(tmp_path, capfd)
    assert code == 1 and said.endswith("00001.tar is missing\n")
    write_latents(tmp_path, variants=1)
    code, said = check(tmp_path, capfd)
    assert code == 1 and said.count("holds 2 variants, the manifest says 1") == 3
    write_latents(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0]["caption_bytes"][0] += 600
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    code, said = check(tmp_path, capfd)
    assert code == 1 and "00000.tar its 6 members are not the 6 that the manifest" in said


def test_latents_that_are_pickled_are_not_loaded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    samples = [("0", {".npy": buffer.getvalue(), ".json": b'{"captions": ["a"]}'})]
    entry = data.write_shard(tmp_path, "00000", samples)
    data.write_manifest(tmp_path, {"complete": True, "latents": LATENTS}, [json.dumps(entry)])
    with pytest.raises(OSError, match="00000.tar is damaged .*allow_pickle=False"):
        data.ShardFolder(tmp_path)[0]
    said = "1 images are there, 1 samples are used.\n00000.tar 0.npy can't be decoded: ValueError\n"
    assert check(tmp_path, capfd) == (1, said)


def test_a_folder_of_latents_is_not_downloaded_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latents").mkdir()
    write_latents(tmp_path / "latents")
    before = (tmp_path / "latents" / "manifest.json").read_bytes()
    assert data.run(data.parse_args(["--output_dir", str(tmp_path / "latents"), "--caption_file", "x.parquet"])) == 2
    assert "manifest.json was not written by this version of data.py" in capsys.readouterr().err
    assert (tmp_path / "latents" / "manifest.json").read_bytes() == before
