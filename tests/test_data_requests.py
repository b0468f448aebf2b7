"""data.py: what a request for data may be, and what a run says and leaves behind when it cannot be met.

pytest tests/test_data_requests.py
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import HubServer, run_data
from test_data_script import fetch_from, images_of, options, write_captions

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
    ],
)
def test_a_table_that_cannot_be_used_is_one_sentence_and_leaves_nothing(tmp_path, capsys, make, message):
    """Never "the disk", never "the same command goes on": exit code 2, and no empty folder."""
    path = make(tmp_path)
    folder = tmp_path / "new" / "out"
    assert data.run(data.parse_args(["--caption_file", str(path), "--output_dir", str(folder)])) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "disk" not in error and "goes on" not in error
    assert not folder.parent.exists()
