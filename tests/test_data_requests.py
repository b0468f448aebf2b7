"""data.py: what a request for data may be, and what a run says and leaves behind when it cannot be met.

pytest tests/test_data_requests.py
"""

import contextlib
import csv
import http.client
import json
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import Future
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import write_shards
from servers import HubServer, data_command, encode, photo, run_data
from test_data_script import (
    fetch_from,
    images_of,
    options,
    processes_of,
    statuses,
    wait_until,
    write_captions,
    write_rows,
)

import data


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "repo"
    (folder / "data").mkdir(parents=True)
    write_captions(folder / "data" / "one.parquet", ["http://h/1"])
    server = HubServer(folder)
    yield server
    server.close()


# ---------------------------------------------------------------------------------------------------------------------
# The Hub


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("part", ["/revision/", "/tree/", "HEAD /datasets", "GET /datasets"])
def test_a_passing_error_of_the_hub_is_tried_again(hub, tmp_path, part, status):
    hub.failing = {part: [status]}
    (commit, files), done = fetch_from(hub, tmp_path, hub.REPO, None)
    assert commit == hub.COMMIT and len(files) == 1, done.stdout
    assert hub.failing == {part: []}


def test_the_wait_that_the_hub_asks_for_is_kept(hub, tmp_path, monkeypatch):
    hub.failing = {"/revision/": [429]}
    hub.retry_after = "3"
    fetch_from(hub, tmp_path, hub.REPO, None)
    assert hub.times[1] - hub.times[0] >= 3


@pytest.mark.parametrize(("status", "code"), [(503, 1), (429, 1), (403, 2), (400, 2)])
def test_a_lasting_error_is_named_as_what_it_is(hub, tmp_path, status, code):
    hub.failing = {"/revision/": [status] * 99}
    (found, sentence), done = fetch_from(hub, tmp_path, hub.REPO, None)
    assert found == code
    assert f"the Hub answered {status} to /api/datasets/owner/captions/revision/main" in sentence
    assert "\n" not in sentence and "Traceback" not in done.stderr


def test_a_commit_that_was_deleted_is_taken_from_the_cache(hub, tmp_path):
    """A folder that was begun goes on, whatever became of its dataset."""
    (commit, files), _ = fetch_from(hub, tmp_path, hub.REPO, None)
    hub.commits = ["f" * 40]
    assert fetch_from(hub, tmp_path, hub.REPO, commit)[0] == [commit, files]
    (code, sentence), _ = fetch_from(hub, tmp_path, hub.REPO, "a" * 40)
    assert code == 2 and "it has no --revision aaaa" in sentence


@pytest.mark.parametrize("way", ["no network", "HF_HUB_OFFLINE"])
def test_a_complete_cache_needs_no_network(hub, image_server, tmp_path, way):
    hub.files["data/one.parquet"] = write_captions(
        tmp_path / "c.parquet", [f"{image_server.url}/ok/1.jpg"]
    ).read_bytes()
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    done = run_data(tmp_path / "first", "--dataset_name", hub.REPO, environment=environment)
    assert done.returncode == 0, done.stderr
    hub.close()
    environment["HF_HUB_OFFLINE"] = str(int(way == "HF_HUB_OFFLINE"))
    done = run_data(tmp_path / "second", "--dataset_name", hub.REPO, environment=environment)
    assert done.returncode == 0 and "The captions come from the local cache: " in done.stdout, done.stderr
    assert images_of(tmp_path / "second") == images_of(tmp_path / "first") != {}
    # what the cache does not hold can't be had: a new try may help only where there may be a network
    done = run_data(tmp_path / "third", "--dataset_name", "owner/other", environment=environment)
    assert done.returncode == (2 if way == "HF_HUB_OFFLINE" else 1)
    assert "the local cache does not hold it all" in done.stderr and done.stderr.strip().count("data.py: ") == 1
    assert not (tmp_path / "third").exists()


def test_an_incomplete_cache_of_an_older_library_is_noticed(hub, tmp_path):
    """It kept no list of a commit's files: only their names tell that one is missing."""
    content = hub.files.pop("data/one.parquet")
    hub.files |= {f"data/train-0000{part}-of-00002.parquet": content + bytes(part) for part in range(2)}
    (commit, files), _ = fetch_from(hub, tmp_path, hub.REPO, None)
    assert len(files) == 2
    hub.close()
    for trees in (tmp_path / "hf").rglob("trees"):
        shutil.rmtree(trees)
    assert fetch_from(hub, tmp_path, hub.REPO, None, HF_HUB_OFFLINE="1")[0] == [commit, files]
    next((tmp_path / "hf").rglob("train-00001-of-00002.parquet")).unlink()
    (code, sentence), _ = fetch_from(hub, tmp_path, hub.REPO, None, HF_HUB_OFFLINE="1")
    assert code == 1 and "the local cache lacks data/train-00001-of-00002.parquet" in sentence


# ---------------------------------------------------------------------------------------------------------------------
# Tables

ROWS = [(f"http://h/{i}", f'say "{i}", ä\u00a0tab', i / 2, ["en", "de"][i % 2]) for i in range(9)]
COLUMNS = ["url", "generated_caption", "score", "lang"]


def write_table(folder: Path, kind: str) -> Path:
    """The same rows as each kind of table, as pandas writes them."""
    import pandas

    frame, path = pandas.DataFrame(ROWS, columns=COLUMNS), folder / f"table.{kind}"
    if kind.startswith("csv"):
        frame.to_csv(path, index=False, encoding="utf-16" if kind == "csv.gz" else "utf-8-sig")
    elif kind == "tsv":
        frame.to_csv(path, index=False, sep="\t")
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif kind == "json":
        frame.to_json(path, orient="records", indent=1)
    elif kind == "txt":
        path.write_text("".join(f"{url}\t{caption}\n" for url, caption, *_ in ROWS))
    else:
        frame.to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "csv.gz", "tsv", "jsonl", "json", "txt"])
def test_captions_come_from_tables_of_every_kind(tmp_path, kind):
    files = data.local_captions(str(write_table(tmp_path, kind)))
    filters = [] if kind == "txt" else ["--filter", "score>1", 'lang=="en"']
    args = options(tmp_path, *filters)
    order, total, dropped = data.select_rows(files, args)
    data.write_shard_inputs(files, order, tmp_path, args, None)
    written = pa.ipc.open_file(tmp_path / "00000.arrow").read_all().to_pylist()
    kept = [row for row in ROWS if kind == "txt" or (row[2] > 1 and row[3] == "en")]
    assert total == 9 and sorted((row["url"], row["caption"]) for row in written) == [row[:2] for row in kept]


def test_a_folder_of_tables_is_of_one_kind(tmp_path):
    write_table(tmp_path, "csv"), write_table(tmp_path, "tsv")
    with pytest.raises(data.UserError, match=r"holds \.csv, \.tsv: name one of the files"):
        data.local_captions(str(tmp_path))
    write_table(tmp_path, "parquet")  # shards' tables beside notes, say
    assert [name for name, _ in data.local_captions(str(tmp_path))] == ["table.parquet"]


def damaged_page(folder: Path) -> Path:
    path = folder / "page.parquet"
    pq.write_table(pa.table({"url": [f"http://h/{i}" for i in range(5000)], "generated_caption": ["c"] * 5000}), path)
    content = bytearray(path.read_bytes())
    content[200:1200] = b"\xff" * 1000
    path.write_bytes(content)
    return path


def text_file(name: str, content: str):
    def write(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return write


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (damaged_page, "page.parquet can't be read, it is damaged or another kind of file"),
        (lambda folder: write_captions(folder / "none.parquet", []), "none of the 0 rows is left to fetch"),
        (text_file("head.csv", "url,generated_caption\n"), "none of the 0 rows is left to fetch"),
        (text_file("nothing.csv", ""), "nothing.csv can't be read"),
        (text_file("nothing.jsonl", ""), "nothing.jsonl can't be read"),
        (text_file("columns.csv", "url,text\nhttp://h/1,a\n"), "--caption_column: columns.csv has no column"),
        (text_file("wide.csv", "url,generated_caption\nhttp://h/1,a,b\n"), "wide.csv can't be read"),
        (text_file("cut.json", '[{"url": "http://h/1", "generated_cap'), "cut.json can't be read"),
        (text_file("bad.jsonl", '{"url": "http://h/1", "generated_caption": 5}\n'), "bad.jsonl can't be read"),
        (text_file("list.txt", "http://h/1\nhttp://h/2\n"), "--caption_column: list.txt has no column"),
        (text_file("notes.md", "http://h/1"), "notes.md: no such kind of table"),
        (text_file("three.txt", "http://h/1\ta\t0.5\n"), "three.txt has 3 columns: give it a first line of names"),
        (
            text_file("open.tsv", 'url\tgenerated_caption\nhttp://h/1\t"a\nhttp://h/2\tb\nhttp://h/3\t"c"\n'),
            "open.tsv: a quotation mark takes in the rows after it, from 'a\\nhttp://h/2",
        ),
    ],  # fmt: skip
)
def test_a_table_that_cannot_be_used_is_one_sentence_and_leaves_nothing(tmp_path, capsys, make, message):
    """Never "the disk", never "the same command goes on": exit code 2, and no empty folder."""
    path = make(tmp_path)
    folder = tmp_path / "new" / "out"
    assert data.run(data.parse_args(["--caption_file", str(path), "--output_dir", str(folder)])) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "disk" not in error and "goes on" not in error
    assert not folder.parent.exists()


# ---------------------------------------------------------------------------------------------------------------------
# The same folder again


def contents(folder: Path) -> dict[str, object]:
    """What a folder holds for its users: members of shards, rows of tables, entries of the manifest."""
    tables = {path.name: pq.read_table(path).to_pylist() for path in sorted(folder.glob("*.parquet"))}
    manifest = json.loads((folder / "manifest.json").read_text())
    return images_of(folder) | tables | {"shards": manifest["shards"], "complete": manifest["complete"]}


@pytest.fixture
def captions(image_server, tmp_path):
    """A table of 30 images and a score for each."""
    urls = [f"{image_server.url}/ok/{i}.jpg" for i in range(5000, 5030)]
    return write_captions(tmp_path / "c.parquet", urls, score=[i / 10 for i in range(30)])


def run_on(folder: Path, captions: Path, *flags: str, code: int = 0) -> str:
    """What a run of six rows a shard writes to its output, or to its errors if it ends with `code`."""
    done = run_data(folder, "--caption_file", str(captions), "--number_sample_per_shard", "6", *flags)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stderr.splitlines()[-1] if code else done.stdout


def test_a_folder_grows(captions, image_server, tmp_path):
    """After 20 rows 30: the first ones stay what they are, the last shard is filled, the whole is as made at once."""
    run_on(tmp_path / "a", captions, "--max_samples", "20")
    early = images_of(tmp_path / "a")
    image_server.hits.clear()
    out = run_on(tmp_path / "a", captions, "--max_samples", "30")
    assert "Rows to fetch now: 10 (20 are done)" in out and image_server.hits.total() == 10
    late = images_of(tmp_path / "a")
    assert list(late.items())[: len(early)] == list(early.items()) and len(late) == 60
    run_on(tmp_path / "b", captions)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert "max_samples was 30, is 20" in run_on(tmp_path / "a", captions, "--max_samples", "20", code=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_same_rows_are_the_same_request(captions, image_server, tmp_path):
    """However they are asked for; other rows, captions or images are refused, and it is said what differs."""
    run_on(tmp_path / "a", captions, "--filter", "score>1.0", "score<=2")
    before, image_server.hits = contents(tmp_path / "a"), type(image_server.hits)()
    renamed = captions.rename(tmp_path / "renamed.parquet")
    for flags in (["--filter", " score > 1 ", "score <= 2.0"], ["--filter", "score>=1.1", "score<2.1"]):
        assert "Rows to fetch now: 0 (10 are done)" in run_on(tmp_path / "a", renamed, *flags)
    assert image_server.hits.total() == 0 and contents(tmp_path / "a") == before
    same = ["--filter", "score>1", "score<=2"]
    other = run_on(tmp_path / "a", renamed, "--filter", "score>2.5", code=2)
    assert "filter was ['score>=1.1', 'score<2.1'], is ['score>2.5']" in other
    assert "seed was 0, is 1" in run_on(tmp_path / "a", renamed, *same, "--seed", "1", code=2)
    assert "image_size was 64, is 32" in run_on(tmp_path / "a", renamed, *same, "--image_size", "32", code=2)
    table = pq.read_table(renamed)
    column = table.schema.names.index("generated_caption")
    pq.write_table(table.set_column(column, "generated_caption", pa.array(["other"] * 30)), captions)
    error = run_on(tmp_path / "a", captions, "--filter", "score>1.0", "score<=2", code=2)
    assert "files was ['renamed.parquet (" in error and "Use another folder" in error
    assert contents(tmp_path / "a") == before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[700:1000] = bytes(300)
    path.write_bytes(content)


def flip_page(path: Path) -> None:
    """Change a value in a parquet file, which decodes all the same: only the page's checksum tells."""
    content = path.read_bytes()
    assert content.count(b"http://") >= 1
    path.write_bytes(content.replace(b"http://", b"http:/!", 1))


DAMAGES = {
    "a flipped byte": (lambda folder: flip(folder / "00001.tar"), "00001.tar differs from its SHA-256", 6),
    "a cut tar": (lambda folder: os.truncate(folder / "00002.tar", 3000), "00002.tar has 3000 bytes instead of ", 6),
    "a lost tar": (lambda folder: (folder / "00003.tar").unlink(), "00003.tar is missing", 6),
    "a lost table": (lambda folder: (folder / "00004.parquet").unlink(), "00004.tar has no sound table", 6),
    "a damaged table": (lambda folder: flip_page(folder / "00000.parquet"), "00000.tar has no sound table", 6),
    "a damaged manifest": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json", 0),
    "a lost manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is lost", 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_check_names_damage_and_the_same_command_mends_it(captions, image_server, tmp_path, capfd, damage):
    folder = tmp_path / "a"
    run_on(folder, captions)
    before = contents(folder)
    spoil, words, rows = DAMAGES[damage]
    spoil(folder)
    assert data.run(data.parse_args(["--check", str(folder)])) == 1
    said = capfd.readouterr().out
    assert (words if rows != 6 or "table" not in damage else words[:9]) in said and "everything is" not in said
    image_server.hits.clear()
    out = run_on(folder, captions)
    assert f"Rows to fetch now: {rows}" in out and image_server.hits.total() == rows
    assert words in out and ("rows are fetched again" in out) == bool(rows)
    assert out.index(words) < out.index("Rows to fetch now")
    assert contents(folder) == before
    capfd.readouterr()
    assert data.run(data.parse_args(["--check", str(folder)])) == 0
    assert "30 images are there, 30 samples are used." in capfd.readouterr().out


def test_a_lost_manifest_still_guards_its_folder(captions, tmp_path):
    """The tables know what the shards were made with."""
    run_on(tmp_path / "a", captions)
    (tmp_path / "a" / "manifest.json").unlink()
    assert "image_size was 64, is 48" in run_on(tmp_path / "a", captions, "--image_size", "48", code=2)


def test_another_dataset_is_not_asked_for_the_commit_of_the_first(hub, tmp_path):
    hub.files["data/one.parquet"] = write_captions(tmp_path / "c.parquet", ["http://127.0.0.1:9/a.jpg"]).read_bytes()
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    for name, revision in ((hub.REPO, "main"), (hub.REPO, hub.COMMIT), ("owner/other", "main")):
        done = run_data(tmp_path / "a", "--dataset_name", name, "--min_success", "0", environment=environment)
        assert f"Captions: {name} from the Hub, revision {revision}." in done.stdout, done.stderr
        assert done.returncode == (2 if name == "owner/other" else 0)


def test_a_manifest_without_settings_is_not_ours(captions, tmp_path):
    run_on(tmp_path / "a", captions, "--max_samples", "6")
    path = tmp_path / "a" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]
    path.write_text(json.dumps(manifest))
    assert "was not written by this version of data.py" in run_on(tmp_path / "a", captions, code=2)


def test_a_damaged_manifest_stays_where_other_settings_are_refused(captions, tmp_path):
    run_on(tmp_path / "a", captions, "--max_samples", "6")
    (tmp_path / "a" / "manifest.json").write_text("{")
    before = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "seed was 0, is 1" in run_on(tmp_path / "a", captions, "--max_samples", "6", "--seed", "1", code=2)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == before
    assert (tmp_path / "a" / "manifest.json").read_text() == "{"


def test_trouble_of_the_disk_is_no_damage(tmp_path):
    """A table that can't be opened just now is not removed."""
    (tmp_path / "00000.tar").touch()
    (tmp_path / "00000.parquet").symlink_to("00000.parquet")
    with pytest.raises(OSError, match="symbolic link"):
        data.forget_damaged(tmp_path, ["00000"])
    assert (tmp_path / "00000.parquet").is_symlink()


def test_check_of_a_folder_without_a_manifest(tmp_path, capsys):
    """It says what a training run says at its start, and opens every image."""
    photo(1).save(tmp_path / "a.jpg")
    photo(2).save(tmp_path / "b.png")
    photo(3).save(tmp_path / "c.jpg")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    members = "3 images are there, 2 samples are used. Left out: 1 without a caption (c.jpg)."
    assert data.run(data.parse_args(["--check", str(tmp_path)])) == 0
    assert members in capsys.readouterr().out
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:100])
    assert data.run(data.parse_args(["--check", str(tmp_path)])) == 1
    out = capsys.readouterr().out
    assert "a.jpg: sample 0 has no caption that can be read" in out and "b.png: sample 1 can't be decoded" in out
    assert members in out
    assert data.run(data.parse_args(["--check", str(tmp_path / "nowhere")])) == 2


def test_check_says_what_is_not_used_of_a_folder_with_a_manifest(captions, tmp_path, capsys):
    run_on(tmp_path / "a", captions, "--max_samples", "6")
    photo(1).save(tmp_path / "a" / "mine.jpg")
    assert data.run(data.parse_args(["--check", str(tmp_path / "a")])) == 0
    sentence = "7 images are there, 6 samples are used. Left out: 1 images beside the shards (mine.jpg)."
    assert sentence in capsys.readouterr().out


def test_a_folder_of_a_thousand_tables(image_server, tmp_path):
    for number in range(1200):
        url = f"{image_server.url}/ok/{number}.jpg"
        (tmp_path / f"table-{number:05d}-of-01200.csv").write_text(f"url,generated_caption\n{url},a\n")
    assert "6 of 6 rows became images" in run_on(tmp_path / "out", tmp_path, "--max_samples", "6")


# ---------------------------------------------------------------------------------------------------------------------
# Failures of rows


def test_retry_failed_asks_for_what_may_pass(image_server, tmp_path):
    """Time-outs, 5xx and 429 by --retry_failed, the others only by --retry_failed all."""
    paths = {"ok/1.jpg": "ok", "500/a": "http_500", "429/a": "http_429", "drip": "deadline", "404/a": "http_404"}
    paths |= {"page.html": "not_an_image", "optout/noai": "opt_out"}
    captions = write_captions(tmp_path / "c.parquet", [f"{image_server.url}/{path}" for path in paths])
    run_on(tmp_path / "a", captions, "--min_success", "0", "--deadline", "1")
    assert statuses(tmp_path / "a") == {f"/{path}": status for path, status in paths.items()}
    for flags, asked in (
        (["--retry_failed"], {"/500/a", "/429/a", "/drip"}),
        (["--retry_failed", "all"], {f"/{path}" for path in paths} - {"/ok/1.jpg"}),
    ):
        image_server.hits.clear()
        run_on(tmp_path / "a", captions, "--min_success", "0", "--deadline", "1", *flags)
        assert set(image_server.hits) == asked


def test_a_server_that_asks_to_wait_is_waited_for(image_server, tmp_path):
    args = options(tmp_path, "--retries", "1", "--deadline", "5")
    image_server.hits.clear()
    started = time.monotonic()
    with data.fetch(f"{image_server.url}/later/2", args, data.ByteBudget(data.MIB)):
        assert time.monotonic() - started >= 2
    with pytest.raises(data.Refused, match="http_429"):  # an hour: another run may ask again
        data.fetch(f"{image_server.url}/later/3600", args, data.ByteBudget(data.MIB))
    assert image_server.hits["/later/2"] == 2 and image_server.hits["/later/3600"] == 1


def test_the_tables_details_are_the_same_from_run_to_run(image_server, tmp_path):
    """No object's address is in them; and an opt-out's is the header that decided, of several."""
    paths = ["page.html", "packed.jpg", "truncated.jpg", "bomb.png", "500/a", "unfinished", "optouts"]
    image_server.bodies |= {"cut.png": encode(photo(3), "PNG")[:100], "bad.tif": b"II*\0" + bytes(60)}
    paths += ["cut.png", "bad.tif"]
    captions = write_captions(tmp_path / "c.parquet", [f"{image_server.url}/{path}" for path in paths])
    details = []
    for name in "ab":
        run_on(tmp_path / name, captions, "--min_success", "0")
        rows = [row for path in sorted((tmp_path / name).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
        details.append({row["url"].rsplit("/", 1)[1]: row["detail"] for row in rows})
    assert details[0] == details[1] and not any(" at 0x" in str(detail) for detail in details[0].values())
    assert details[0]["optouts"] == "nofollow, distill-sd: noml"


def test_no_address_of_an_object_is_in_a_detail(tmp_path):
    """Whatever library raised it."""
    rows = [{"url": "http://h/1", "caption": "c", "input_row": 0, "position": 0}]
    write_rows(tmp_path / "00000.arrow", pa.Table.from_pylist(rows, data.ROW_SCHEMA))
    fetched = Future()
    fetched.set_exception(data.Refused("broken_image", f"cannot read {object()}"))
    with data.Shard(0, str(tmp_path / "00000.arrow"), options(tmp_path)) as shard:
        shard._keep(0, fetched)
    assert shard.outcomes[0]["detail"] == "cannot read <object>"


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@contextlib.contextmanager
def started(folder: Path, captions: Path, *flags: str):
    command = data_command(folder, "--caption_file", str(captions), "--number_sample_per_shard", "6", *flags)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"DATA_TEST": str(folder)}, **pipes) as child:
        yield child
        child.kill()


def test_finished_shards_are_known_at_once(captions, image_server, tmp_path):
    """After a SIGKILL, too: nothing is left to a time at which the manifest would be written."""
    image_server.delay = 0.2
    with started(tmp_path / "a", captions, "--thread_count", "1") as child:
        wait_until(lambda: (tmp_path / "a" / "00001.tar").exists())
        time.sleep(0.5)  # two looks at what workers have done
        child.kill()
        child.wait()
        manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    image_server.delay = 0
    wait_until(lambda: not processes_of(tmp_path / "a"))
    assert [entry["name"] for entry in manifest["shards"]][:2] == ["00000.tar", "00001.tar"]
    assert not manifest["complete"] and len(manifest["shards"]) < 5
    out = run_on(tmp_path / "a", captions)
    assert "Rows to fetch now: 30" not in out and data.check_folder(tmp_path / "a") == []


def test_a_worker_that_stands_still_is_noticed(captions, image_server, tmp_path):
    """Not before the deadline, and the run ends with code 1 and no process left."""
    image_server.gate.clear()
    try:
        with started(tmp_path / "a", captions, "--timeout", "9", "--deadline", "3") as child:
            work = tmp_path / "a" / ".unfinished"
            wait_until(lambda: list(work.glob("*.spool")))
            workers = [
                pid
                for pid in processes_of(tmp_path / "a")
                if b"multiprocessing.spawn" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ]
            for pid in workers:
                os.kill(pid, signal.SIGSTOP)
            begun = time.monotonic()
            _, error = child.communicate(timeout=60)
            took = time.monotonic() - begun
    finally:
        image_server.gate.set()
    assert child.returncode == 1 and "a worker has stood still for 1" in error and ", at shard 00000." in error
    assert 10 < took < 30 and "Traceback" not in error
    wait_until(lambda: not processes_of(tmp_path / "a"))


def test_stopping_while_rows_are_dealt_leaves_nothing_behind(tmp_path):
    urls = [f"http://h/{i}" for i in range(300_000)]
    captions = write_captions(tmp_path / "c.parquet", urls)
    with started(tmp_path / "new" / "a", captions, "--number_sample_per_shard", "5000") as child:
        wait_until(lambda: list((tmp_path / "new" / "a" / ".unfinished").glob("group*")))
        child.send_signal(signal.SIGTERM)  # a background shell has its children ignore SIGINT
        _, error = child.communicate(timeout=60)
    assert child.returncode == 130 and "stopped" in error and "Traceback" not in error
    assert not (tmp_path / "new").exists()


def test_a_bug_is_shown_as_one(captions, tmp_path, monkeypatch):
    """With where it is, and without the promise that the same command goes on."""
    lines = ["import sys", "if 'multiprocessing.spawn' in ' '.join(sys.orig_argv):"]
    lines += [f" sys.path.insert(0, {str(Path(data.__file__).parent)!r})", " import data", " data.data_offsets = None"]
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    error = run_data(tmp_path / "a", "--caption_file", str(captions), "--number_sample_per_shard", "6").stderr
    assert "data.py: a fault in data.py or img2dataset: TypeError: 'NoneType' object is not callable" in error
    assert "Traceback" in error and "goes on" not in error.splitlines()[-1]


@pytest.mark.skipif("DISTILL_SD_RAY" not in os.environ, reason="needs ray: set DISTILL_SD_RAY=1 after pip install ray")
def test_the_ray_distributor(captions, tmp_path):
    """On this machine: the same shards, to the byte, as from a pool of processes, and no process left."""
    environment = {"DATA_TEST": str(tmp_path), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    flags = ["--caption_file", str(captions), "--number_sample_per_shard", "6"]
    done = run_data(tmp_path / "ray", *flags, "--distributor", "ray", environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    run_on(tmp_path / "pool", captions)
    for path in sorted((tmp_path / "pool").iterdir()):
        assert (tmp_path / "ray" / path.name).read_bytes() == path.read_bytes()
    wait_until(lambda: not processes_of(tmp_path))


@pytest.mark.parametrize("value", ["Jan -0000 00:00:00 99999999999 -", "never", "", "-5", "9" * 400])
def test_a_wait_that_makes_no_sense_ends_no_run(value):
    headers = http.client.HTTPMessage()
    headers["Retry-After"] = value
    assert data.retry_after(headers) in (0, float("inf"))


def test_captions_of_several_lines_in_a_large_csv(tmp_path):
    path = tmp_path / "large.csv"
    rows = [(f"http://h/{i}", f"first line {i}\nsecond line, {'x' * 200}") for i in range(80_000)]  # above one block
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("url", "text"), *rows])
    batches = [batch for _, batch in data.read_batches([(path.name, path)], {"url": data.TEXT, "text": data.TEXT})]
    found = [(row["url"], row["text"]) for batch in batches for row in batch.to_pylist()]
    assert found == rows


def test_check_opens_the_last_of_many(tmp_path, capsys):
    good, broken = encode(photo(1, 8, 8), "JPEG"), encode(photo(1, 8, 8), "JPEG")[:-200]
    write_shards(tmp_path, [(good, "a")] * 2100 + [(broken, "b")], per_shard=5000)
    assert data.check_folder(tmp_path) == ["00000.tar: sample 2100 can't be decoded: OSError"]


def test_check_takes_a_list_of_captions(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(encode(photo(32, 32), "JPEG"))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.jpg", "text": ["one", "two"]}))
    assert data.check_folder(tmp_path) == []
