"""What is read of other people's folders and shards, and what is said of the rest: nothing is lost in silence."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from helpers import ROOT, data_args, dataset_of
from PIL import Image

import data
import distill_training as dt

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}


def image_bytes(colour: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 32), COLOURS[colour]).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path.parent


def write_files(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def jsonl(**captions: str) -> str:
    return "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in captions.items())


def pairs_of(rows: data.Rows) -> list[tuple[str, str]]:
    """(name of the colour, caption) of every row, as they are decoded."""
    found = []
    for row in rows:
        pixel = data.decode_image(row["image"]["bytes"]).getpixel((20, 16))
        colour = min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(pixel, COLOURS[name], strict=True)))
        found.append((colour, row["text"]))
    return found


RED, GREEN, BLUE = (image_bytes(colour, "JPEG") for colour in ("red", "green", "blue"))
PAIRS = [("red", "a red one"), ("green", "a green one")]


def test_keys_may_have_dots(tmp_path: Path) -> None:
    members = {"a.0.jpg": RED, "a.0.txt": b"a red one", "shop_4.04.jpg": GREEN, "shop_4.04.txt": b"a green one"}
    rows = data.ShardFolder(write_tar(tmp_path / "0.tar", members))
    assert pairs_of(rows) == PAIRS
    assert rows.describe() == ["2 images are there, 2 samples are used."]


def test_members_are_paired_by_key_in_any_order(tmp_path: Path) -> None:
    members = {"b.txt": b"a green one", "a.jpg": RED, "b.jpg": GREEN, "a.txt": b"a red one"}
    assert sorted(pairs_of(data.ShardFolder(write_tar(tmp_path / "0.tar", members)))) == sorted(PAIRS)


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    members = [("a.jpg", RED), ("a.txt", b"a red one"), ("a.jpg", GREEN), ("a.txt", b"a green one")]
    with pytest.raises(data.UserError, match=r"0\.tar holds a\.jpg twice"):
        data.ShardFolder(write_tar(tmp_path / "0.tar", members))


def test_a_macs_twins_are_no_samples(tmp_path: Path) -> None:
    members = {"./._a.jpg": b"\0\5", "./a.jpg": RED, "._a.txt": b"\0\5", "./a.txt": b"a red one"}
    rows = data.ShardFolder(write_tar(tmp_path / "0.tar", members))
    assert pairs_of(rows) == PAIRS[:1] and not rows.left_out


@pytest.mark.parametrize("suffix", ["gif", "bmp", "tiff", "tif", "jfif", "avif", "jp2", "ppm", "tga", "JPG", "Webp"])
def test_what_pillow_reads_is_an_image(tmp_path: Path, suffix: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 32), COLOURS["red"]).save(buffer, Image.registered_extensions()[f".{suffix.lower()}"])
    shards = write_tar(tmp_path / "shards" / "0.tar", {f"a.{suffix}": buffer.getvalue(), "a.txt": b"a red one"})
    folder = write_files(tmp_path / "folder", {f"a.{suffix}": buffer.getvalue(), "a.txt": b"a red one"})
    assert pairs_of(data.ShardFolder(shards)) == pairs_of(data.ImageFolder(folder)) == PAIRS[:1]


def test_what_a_shard_folder_leaves_out_is_counted(tmp_path: Path) -> None:
    members = {"a.jpg": RED, "a.png": image_bytes("red"), "a.txt": b"a red one", "b.jpg": GREEN, "c.txt": b"alone"}
    folder = write_tar(tmp_path / "0.tar", members | {"d.heic": b"x", "e.caption": b"x", "e.jpg": BLUE})
    (folder / "1.tar").mkdir()
    (folder / "loose.png").write_bytes(image_bytes("red"))
    rows = data.ShardFolder(folder, "prompt")
    assert pairs_of(rows) == PAIRS[:1] and rows.images == 5
    assert {kind: count for kind, (count, _) in rows.left_out.items()} == {
        "of a key that has another image": 1,
        "without .txt or .json": 1,
        "without .txt or .json (.caption is not read)": 1,
        "captions without an image": 1,
        "of a kind that Pillow does not read": 1,
        "images beside the shards": 1,
        "folders called like shards": 1,
    }
    counted, note = rows.describe()
    assert counted.startswith("5 images are there, 1 samples are used. Left out: ") and "0.tar: b.jpg" in counted
    assert note == "--caption_column prompt is not read: captions are .txt files."


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress])
def test_a_compressed_tar_is_named(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    folder = write_tar(tmp_path / "0.tar", {"a.jpg": RED, "a.txt": b"a"})
    (folder / "0.tar").write_bytes(compress((folder / "0.tar").read_bytes()))
    expected = r"0\.tar is compressed \(gzip\)" if compress is gzip.compress else r"0\.tar is empty or cut short"
    with pytest.raises(data.UserError, match=expected):
        data.ShardFolder(folder)


@pytest.mark.parametrize("text", ['{"shards": 5}', '{"shards": [{"name": "0.tar"}]}', '{"shards": [7]}', "[]", ""])
def test_a_manifest_that_is_not_ours_is_one_sentence(tmp_path: Path, text: str) -> None:
    folder = write_tar(tmp_path / "0.tar", {"a.jpg": RED, "a.txt": b"a"})
    (folder / "manifest.json").write_text(text)
    with pytest.raises(data.UserError, match=r"manifest\.json"):
        data.ShardFolder(folder)


def test_shards_that_the_manifest_does_not_name_are_counted(tmp_path: Path) -> None:
    entry = data.write_shard(tmp_path, "0", [("a", {".jpg": RED, ".txt": b"a red one"})])
    data.write_manifest(tmp_path, {"complete": True}, [json.dumps(entry)])
    write_tar(tmp_path / "1.tar", {"b.jpg": GREEN, "b.txt": b"a green one"})
    rows = data.ShardFolder(tmp_path)
    assert pairs_of(rows) == PAIRS[:1]
    assert rows.left_out == {"shards that manifest.json does not name": (1, "1.tar")}


def test_an_entry_of_json_that_is_not_there_is_named(tmp_path: Path) -> None:
    members = {"a.jpg": RED, "a.json": json.dumps({"prompt": "a red one", "url": "u"}).encode()}
    folder = write_tar(tmp_path / "0.tar", members)
    with pytest.raises(data.UserError, match=r"--caption_column text: .* they have prompt, url\."):
        data.ShardFolder(folder)
    assert pairs_of(data.ShardFolder(folder, "prompt")) == PAIRS[:1]


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_captions_are_decoded_by_their_mark(tmp_path: Path, codec: str) -> None:
    for text in ("grün", "a red one"):
        shards = write_tar(tmp_path / text / "0.tar", {"a.jpg": RED, "a.txt": text.encode(codec)})
        folder = write_files(tmp_path / f"{text} folder", {"a.jpg": RED, "a.txt": text.encode(codec)})
        assert pairs_of(data.ShardFolder(shards)) == pairs_of(data.ImageFolder(folder)) == [("red", text)]
    lines = write_files(tmp_path / "lines", {"a.jpg": RED, "metadata.jsonl": jsonl(**{"a.jpg": "grün"}).encode(codec)})
    assert pairs_of(data.ImageFolder(lines)) == [("red", "grün")]


def test_what_cannot_be_decoded_is_counted_and_never_trained_on(tmp_path: Path, teacher: Path) -> None:
    captions = ["grün".encode("latin-1"), "no mark".encode("utf-16-le"), "half \ufffd".encode(), b"a red one"]
    members = {}
    for number, caption in enumerate(captions):
        members |= {f"{number}.jpg": RED, f"{number}.txt": caption}
    dataset = dataset_of(data_args(teacher, train_data_dir=write_tar(tmp_path / "0.tar", members)))
    for row in range(3):
        with pytest.raises(dt.UnusableSample) as unusable:
            dataset.example(0, row)
        assert unusable.value.args == (dt.EMPTY_CAPTION,)
    assert dataset.example(0, 3)["caption"] == "a red one"


@pytest.mark.parametrize(
    "names",
    [
        ["photo.png", "steam-train-3.png"],
        ["train_0.png", "train_1.png"],
        ["test/0.png", "valid/1.png"],
        ["a[1].png", "b*.png"],
        ["c ?.png", "k::l.png"],
        ["e%20f.png", "ü 漢#.png"],
    ],
)
def test_names_mean_nothing(tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "[2024] train (1) #2"
    write_files(folder, {name: image_bytes(colour) for name, (colour, _) in zip(names, PAIRS, strict=True)})
    texts = {name: text for name, (_, text) in zip(names, PAIRS, strict=True)}
    write_files(folder, {"metadata.jsonl": jsonl(**texts)})
    assert sorted(pairs_of(data.ImageFolder(folder))) == sorted(PAIRS)


def test_every_folder_has_its_own_metadata(tmp_path: Path) -> None:
    files = {"ships/0.png": RED, "ships/metadata.jsonl": jsonl(**{"0.png": "a red one"})}
    files |= {"train/0.png": GREEN, "train/metadata.csv": "text,file_name\na green one,0.png\n"}
    assert pairs_of(data.ImageFolder(write_files(tmp_path, files))) == PAIRS


def test_an_image_folder_counts_what_it_leaves_out(tmp_path: Path) -> None:
    files = {"a.png": RED, "b.png": GREEN, "c.png": BLUE, "d.heic": b"x", ".hidden.png": RED, "__MACOSX/a.png": RED}
    files["metadata.jsonl"] = jsonl(**{"a.png": "a red one", "gone.png": "x"})
    rows = data.ImageFolder(write_files(tmp_path, files))
    assert pairs_of(rows) == PAIRS[:1] and rows.images == 3
    assert rows.left_out == {
        "captions whose image is not there": (1, "metadata.jsonl: gone.png"),
        "without a caption": (2, "b.png"),
        "of a kind that Pillow does not read": (1, "d.heic"),
    }


@pytest.mark.parametrize("extension", [".txt", ".caption", ".prompt"])
def test_text_files_beside_images_are_captions(tmp_path: Path, extension: str) -> None:
    files = {"10_person/0.png": RED, f"10_person/0{extension}": "a red one"}
    folder = write_files(tmp_path, files | {"10_person/1.jpg": GREEN, f"10_person/1{extension}": "a green one\r\n"})
    rows = data.ImageFolder(folder, caption_extension=None if extension != ".prompt" else extension)
    assert [(colour, text.strip()) for colour, text in pairs_of(rows)] == PAIRS
    assert rows.notes == ["The repeats in folders' names (10_person) are not applied."]


def test_metadata_wins_over_text_files(tmp_path: Path) -> None:
    files = {"a.png": RED, "a.txt": "not this", "metadata.jsonl": jsonl(**{"a.png": "a red one"})}
    rows = data.ImageFolder(write_files(tmp_path, files))
    assert pairs_of(rows) == PAIRS[:1]
    assert rows.notes == ["1 text files are not read, a.txt among them: metadata wins."]


@pytest.mark.parametrize("path", ["{folder}/sub/a.png", "sub\\a.png", "./sub/../sub/a.png"])
def test_metadata_names_images_in_many_ways(tmp_path: Path, path: str) -> None:
    text = jsonl(**{path.format(folder=tmp_path): "a red one"})
    assert pairs_of(data.ImageFolder(write_files(tmp_path, {"sub/a.png": RED, "metadata.jsonl": text}))) == PAIRS[:1]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", {"a.png": RED, "a.txt": "a red one"})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert pairs_of(data.ImageFolder(tmp_path / "link"))[0] == PAIRS[0]


def test_missing_captions_of_a_table_are_missing(tmp_path: Path) -> None:
    table = "file_name,text\na.png,NA\nb.png,a green one\n"
    rows = data.ImageFolder(write_files(tmp_path, {"a.png": RED, "b.png": GREEN, "metadata.csv": table}))
    assert pairs_of(rows) == PAIRS[1:] and rows.left_out == {"without a caption": (1, "a.png")}


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a.png": RED, "metadata.jsonl": jsonl(**{"a.png": "x"})[:-9]}, r"metadata\.jsonl, line 1, is no JSON"),
        ({"a.png": RED, "metadata.csv": b""}, r"metadata\.csv cannot be read"),
        ({"a.png": RED, "metadata.jsonl": "grün".encode("latin-1")}, r"metadata\.jsonl cannot be read"),
        ({"a.png": RED, "metadata.parquet": b"PAR1"}, r"metadata\.parquet cannot be read"),
        (
            {"a.png": RED, "metadata.jsonl": '{"file_name": "a.png"}'},
            "--caption_column text is not there; .*file_name",
        ),
        ({"a.png": RED, "metadata.jsonl": '{"path": "a.png", "text": "x"}'}, "file_name is not there; .* path, text"),
        (
            {"a.png": RED, "captions.jsonl": "{}"},
            r"metadata\.jsonl with .*; there is captions\.jsonl",
        ),
        ({"t/a.png": RED, "t/metadata.jsonl": jsonl(**{"t/a.png": "x"})}, r"image is not there .*t/a\.png"),
    ],
)
def test_metadata_that_cannot_be_used_is_named(tmp_path: Path, files: dict[str, bytes | str], sentence: str) -> None:
    with pytest.raises(data.UserError, match=sentence):
        data.ImageFolder(write_files(tmp_path, files))


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"train/00000.tar": b""}, "there are shards in train: name that folder"),
        ({"train-00000-of-00001.parquet": b""}, "but tables: --dataset_name .* reads them"),
        ({"data-00000-of-00001.arrow": b"", "state.json": "{}"}, "but tables: --dataset_name .* reads them"),
        ({"00000.tar.gz": b""}, r"a compressed archive \(00000\.tar\.gz\): decompress it first"),
        ({"notes.md": b""}, r"holds neither \*\.tar shards nor images\.$"),
    ],
)
def test_a_folder_of_something_else_names_the_way(
    tmp_path: Path, teacher: Path, files: dict[str, bytes | str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_files(tmp_path, files)
    with pytest.raises(SystemExit):
        data_args(teacher, train_data_dir=folder)
    (problem,) = data.why_no_images(folder)
    assert problem in capsys.readouterr().err
    assert re.search(sentence, problem)


def test_a_png_with_a_long_text_is_an_image() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    png = image_bytes("red")
    text = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b'{"node": 1}' * 300_000))
    assert data.decode_image(png[:33] + text + png[33:]).getpixel((0, 0)) == COLOURS["red"]


def test_an_image_folder_is_known_by_its_files(tmp_path: Path) -> None:
    folder = write_files(tmp_path, {"a.png": RED, "a.txt": "a red one", "b.png": GREEN, "b.txt": "a green one"})
    prints = {data.ImageFolder(folder).fingerprint(), data.ImageFolder(folder).fingerprint()}
    assert len(prints) == 1
    os.utime(folder / "a.txt", (1, 1))
    prints.add(data.ImageFolder(folder).fingerprint())
    prints.add(data.ImageFolder(folder).select([1]).fingerprint())
    assert len(prints) == 3 and pairs_of(data.ImageFolder(folder).select([1])) == PAIRS[1:]


def test_names_beyond_ascii_in_a_locale_of_ascii(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "дата", {"é.jpg": RED, "é.txt": "a red circle", "猫/b.jpg": BLUE})
    (folder / "猫" / "metadata.jsonl").write_text(jsonl(**{"b.jpg": "a blue circle"}))
    code = "import sys, data; from pathlib import Path; rows = data.ImageFolder(Path(sys.argv[1]))\n"
    code += "print(sorted(row['text'] for row in rows), rows.fingerprint(), rows.describe())"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    line = [sys.executable, "-c", code, folder]
    done = subprocess.run(line, env=os.environ | plain, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['a blue circle', 'a red circle'] ")
    assert data.ImageFolder(folder).fingerprint() in done.stdout


# ----------------------------------------------------------------------------------------------------------------
# Neighbours of these.


def joined(folder: Path) -> Path:
    """Two tars, one written behind the other, as `cat a.tar b.tar` does."""
    parts = [write_tar(folder / f"{n}.part", {f"{n}.jpg": RED, f"{n}.txt": b"a"}) / f"{n}.part" for n in "ab"]
    path = folder / "shards" / "0.tar"
    path.parent.mkdir()
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def test_a_tar_that_goes_on_after_its_end_is_refused(tmp_path: Path) -> None:
    path = joined(tmp_path)
    with pytest.raises(data.UserError, match=f"^{path} goes on after its end"):
        data.ShardFolder(path.parent)


def test_whatever_lies_beside_shards_is_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": RED, "a.txt": b"a red circle", "x.png/": b""})
    write_tar(tmp_path / "1.TAR", {"b.jpg": BLUE, "b.txt": b"a blue circle"})
    write_tar(tmp_path / "below" / "2.tar", {"c.jpg": GREEN, "c.txt": b"a green circle"})
    files = {"._0.tar": b"a Mac's", ".1.tar.part": b"", "3.tar.gz": b"", "below/d.png": RED, "0.parquet": b""}
    rows = data.ShardFolder(write_files(tmp_path, files))
    assert pairs_of(rows) == [("red", "a red circle"), ("blue", "a blue circle")]
    assert rows.describe() == [
        "3 images are there, 2 samples are used. Left out: 1 compressed archives (3.tar.gz), "
        "1 shards in folders below (below/2.tar), 1 images beside the shards (below/d.png)."
    ]


@pytest.mark.parametrize(
    "manifest",
    [
        {"latents": {"variants": 1}},
        {"latents": True},
        {"shards": [{"name": "0.tar", "bytes": "9", "sha256": "", "count": 0}]},
        {"shards": [{"name": "0.tar", "bytes": 9, "image_bytes": [], "caption_bytes": []}]},
    ],
)
def test_a_manifest_that_lacks_a_fact_is_none_of_ours(tmp_path: Path, manifest: dict) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": []} | manifest))
    with pytest.raises(data.UserError, match="manifest.json is not one that data.py wrote"):
        data.ShardFolder(tmp_path)
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(data.UserError, match="manifest.json can't be read"):
        data.ShardFolder(tmp_path)


def test_a_caption_column_of_ones_own_has_no_substitute(tmp_path: Path) -> None:
    record = json.dumps({"caption": "alt text", "long": "a red circle"}).encode()
    bare = json.dumps({"caption": "alt text"}).encode()
    folder = write_tar(tmp_path / "0.tar", {"a.jpg": RED, "a.json": record, "b.jpg": BLUE, "b.json": bare})
    assert [row["text"] for row in data.ShardFolder(folder, "long")] == ["a red circle", None]
    assert [row["text"] for row in data.ShardFolder(folder)] == ["alt text", "alt text"]
    with pytest.raises(
        data.UserError, match="^--caption_column promt: .* have no entry promt; they have caption, long"
    ):
        data.ShardFolder(folder, "promt")


def test_text_files_of_any_case_and_several_of_them(tmp_path: Path) -> None:
    files = {"a.jpg": RED, "a.TXT": "a red circle", "b.JPG": BLUE, "b.txt": "a blue circle", "b.caption": "other"}
    rows = data.ImageFolder(write_files(tmp_path, files))
    assert pairs_of(rows) == [("red", "a red circle"), ("blue", "a blue circle")]
    assert rows.notes == ["1 text files are not read, b.caption among them: of two beside an image one is."]


def test_captions_that_are_replaced_or_no_text_are_said(tmp_path: Path) -> None:
    lines = jsonl(**{"a.jpg": "first"}) + jsonl(**{"a.jpg": "a red circle"})
    lines += json.dumps({"file_name": "b.jpg", "text": 7}) + "\n"
    rows = data.ImageFolder(write_files(tmp_path, {"a.jpg": RED, "b.jpg": BLUE, "metadata.jsonl": lines}))
    assert pairs_of(rows) == [("red", "a red circle")]
    assert rows.notes == ["1 captions are replaced by later ones of the metadata (a.jpg)."]
    assert "1 captions that are no text (metadata.jsonl: b.jpg), 1 without a caption (b.jpg)" in rows.describe()[0]
    write_files(tmp_path, {"metadata.jsonl": json.dumps([{"file_name": "a.jpg", "text": "a"}])})
    with pytest.raises(data.UserError, match="metadata.jsonl, line 1, holds no record"):
        data.ImageFolder(tmp_path)


def test_a_folder_without_captions_names_what_is_there(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.jpg": RED, "metadata.tsv": "file_name\ttext"})
    with pytest.raises(data.UserError, match=r"or \.cap beside each image, has captions; there is metadata\.tsv\."):
        data.ImageFolder(tmp_path, "text", ".cap")


def test_absolute_paths_through_a_link(tmp_path: Path) -> None:
    folder = write_files(
        tmp_path / "real", {"a.jpg": RED, "gone.jpg": b"", "__set2/b.jpg": BLUE, "__MACOSX/c.jpg": RED}
    )
    (tmp_path / "link").symlink_to(folder)
    (folder / "gone.jpg").unlink()
    (folder / "gone.jpg").symlink_to(tmp_path / "nothing")
    lines = jsonl(
        **{str(tmp_path / "link" / "a.jpg"): "a red circle", "gone.jpg": "x", "__set2/b.jpg": "a blue circle"}
    )
    rows = data.ImageFolder(write_files(folder, {"metadata.jsonl": lines}))
    assert [rows.table["image"][i].as_py() for i in range(3)] == [b"__set2/b.jpg", b"a.jpg", b"gone.jpg"]
    assert rows.images == 3 and rows.fingerprint()  # a broken link is counted when it is read


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a.zip": b""}, "but a.zip: unpack it, or --dataset_name .* reads it"),
        ({"list.csv": b"", "a.jsonl": b""}, "but tables: --dataset_name .* reads them"),
        ({"a.heic": b""}, "but a.heic, of a kind that Pillow does not read"),
    ],
)
def test_a_folder_of_other_things_names_the_way(tmp_path: Path, files: dict[str, bytes], sentence: str) -> None:
    (problem,) = data.why_no_images(write_files(tmp_path, files))
    assert re.search(sentence, problem)


def test_a_dataset_whose_split_leaves_files_out_says_so(
    tmp_path: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train", "more"):
        rows = {"image": [{"bytes": RED, "path": None}], "text": [name]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "table" / f"{name}.parquet")
    with caplog.at_level("INFO"):
        args = data_args(teacher, dataset_name=tmp_path / "table", cache_dir=tmp_path / "cache")
        assert [row["text"] for row in dataset_of(args).rows] == ["train"]
    assert "1 files of" in caplog.text and "are not in its split train, more.parquet among them" in caplog.text


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        ("csv", "Expected 2 fields in line 3, saw 4"),
        ("dict", "it has no split train, but test, valid"),
        ("brackets", r"takes brackets, \* and \? in a folder's name for a pattern: rename it"),
        ("images", "A folder of images is for --train_data_dir"),
    ],
)
def test_a_dataset_that_cannot_be_read_names_the_cause(
    tmp_path: Path, teacher: Path, make: str, sentence: str
) -> None:
    folder = tmp_path / ("x[1]" if make == "brackets" else "x")
    rows = datasets.Dataset.from_dict({"image": ["a.jpg"], "text": ["a"]})
    if make == "csv":
        write_files(folder, {"a.csv": "image,text\na.jpg,a\nb.jpg,b,c,d\n"})
    elif make == "dict":
        datasets.DatasetDict({"test": rows, "valid": rows}).save_to_disk(folder)
    elif make == "brackets":
        rows.to_parquet(folder / "a.parquet")
    else:
        write_files(folder, {"a.jpg": RED, "a.txt": "a red circle"})
    with pytest.raises(data.UserError, match=sentence):
        dataset_of(data_args(teacher, dataset_name=folder, cache_dir=tmp_path / "cache"))


def test_flags_on_captions_that_nothing_reads(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tar(tmp_path / "0.tar", {"a.jpg": RED, "a.txt": b"a"})
    with pytest.raises(SystemExit, match="2"):
        data_args(teacher, train_data_dir=folder, caption_extension=".txt")
    assert "--caption_extension is of text files beside images" in capsys.readouterr().err
    with pytest.raises(data.UserError, match="--image_column picture is not there"):
        dataset_of(data_args(teacher, train_data_dir=folder, image_column="picture"))
