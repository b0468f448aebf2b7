"""data.py: captions from a stand-in for the Hub, images from a hostile web, both on 127.0.0.1; kills are real.

pytest tests/test_data_script.py
"""

import collections
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from servers import (
    GOOD,
    HOSTILE,
    ROOT,
    HubServer,
    bomb,
    data_command,
    encode,
    finish_data,
    multi_scan_jpeg,
    photo,
    quadrants,
    run_data,
    with_orientation,
)

import data

SCRIPT = [sys.executable, str(ROOT / "data.py")]


def options(tmp_path: Path, *flags: str):
    """Parsed flags of a run in process: small images, short time limits, addresses at home allowed."""
    limits = ["--image_size", "64", "--timeout", "1", "--deadline", "2", "--retries", "0"]
    return data.parse_args(["--output_dir", str(tmp_path / "out"), "--allow_private_addresses", *limits, *flags])


def write_captions(path: Path, urls: list[str], **columns: list) -> Path:
    pq.write_table(
        pa.table({"url": urls, "generated_caption": [f"caption of {url}" for url in urls], **columns}), path
    )
    return path


def write_rows(path: Path, table: pa.Table) -> None:
    """The rows of a shard, as a worker gets them."""
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def processes_of(folder: Path) -> list[int]:
    """The living processes that were started for an output folder, our own child and its children among them."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            environment, state = (
                (entry / "environ").read_bytes(),
                (entry / "stat").read_text().rsplit(")", 1)[1].split()[0],
            )
        except (OSError, IndexError):
            continue
        if f"DATA_TEST={folder}".encode() in environment.split(b"\0") and state != "Z":
            found.append(int(entry.name))
    return found


def tar_members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def images_of(folder: Path) -> dict[str, bytes]:
    """All members of all shards."""
    return {name: content for tar in sorted(folder.glob("*.tar")) for name, content in tar_members(tar).items()}


def statuses(folder: Path) -> dict[str, str]:
    """The outcome of each URL's path."""
    tables = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    rows = [row for table in tables for row in table.select(["url", "status"]).to_pylist()]
    return {"/" + row["url"].split("/", 3)[3]: row["status"] for row in rows}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_size", "0"], "--image_size must be from 8 to 65500, got 0"),
        (["--encode_quality", "101"], "--encode_quality must be from 1 to 100, got 101"),
        (["--min_success", "nan"], "--min_success must be from 0 to 1, got nan"),
        (["--thread_count", "0"], "--thread_count must be at least 1, got 0"),
        (["--filter", "punsafe"], "got 'punsafe'"),
        (["--filter", "punsafe<<1"], "got 'punsafe<<1'"),
        (["--filter", "a=1"], "got 'a=1'"),
        (["--user_agent", "me\r\nX-Evil: 1"], "--user_agent must be printable ASCII, got"),
        (["--retry_failed", "some"], "--retry_failed"),
        (["--revision", "main", "--caption_file", "x.parquet"], "--revision belongs to a Hub dataset"),
        (["--distributor", "dask"], "--distributor"),
        (["--max_sample", "3"], "--max_sample"),
    ],
)
def test_bad_flags_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        data.parse_args(flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_every_bad_flag_is_reported_at_once(capsys):
    with pytest.raises(SystemExit):
        data.parse_args(["--timeout", "0", "--max_samples", "0"])
    error = capsys.readouterr().err
    assert "--timeout" in error.split("error:")[1] and "--max_samples" in error.split("error:")[1]


def test_defaults():
    args = data.parse_args([])
    assert args.dataset_name == "recastai/LAION-art-EN-improved-captions" and args.max_samples == 250_000
    assert (args.image_size, args.min_image_size, args.max_pixels) == (512, 512, 25_000_000)
    assert (args.url_column, args.caption_column, args.min_success) == ("url", "generated_caption", 0.5)
    assert args.honor_opt_outs and not args.allow_private_addresses and not args.enable_wandb


def test_import_is_cheap():
    """Workers import data.py; img2dataset, torch and wandb must come only where they are used."""
    code = (
        "import sys, data; print([m for m in ('torch', 'img2dataset', 'wandb', 'pandas', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_img2dataset_has_the_names_that_are_used():
    """They are not documented for use by others: requirements.txt has a bound, and this says what is gone."""
    code = """
import inspect, sys, data
distributor = data.import_distributors()
for name in data.DISTRIBUTORS:
    function = getattr(distributor, f"{name}_distributor", None)
    takes = len(inspect.signature(function).parameters) if function else "not there"
    if takes != 5:
        print(f"{name}_distributor of img2dataset, which data.download calls with 5 arguments, takes: {takes}")
print([name for name in ("torch", "pandas", "albumentations", "wandb", "sentry_sdk") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"  # nor does it import what is large or calls home
    assert "img2dataset>=1.47,<2" in (ROOT / "requirements.txt").read_text().split()


def test_the_expected_space_covers_what_is_made(data_folder):
    args = data.parse_args(["--image_size", "64", "--processes_count", "1", "--number_sample_per_shard", "1"])
    made = sum(path.stat().st_size for path in data_folder.path.glob("*.tar"))
    images = len(images_of(data_folder.path)) // 2
    assert 0.2 < data.expected_bytes(images, args) / made < 5
    assert data.expected_bytes(1000, args) < data.expected_bytes(1000, data.parse_args([])) / 20


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def test_rows_are_dropped_counted_and_shuffled(tmp_path):
    rows = [(f"http://h/{i}", f"caption {i}", float(i), "en") for i in range(20)]
    rows += [(None, "c", 5.0, "en"), ("", "c", 5.0, "en"), ("  ", "c", 5.0, "en")]
    rows += [
        ("ftp://h/1", "c", 5.0, "en"),
        ("file:///etc/passwd", "c", 5.0, "en"),
        ("data:image/png;base64,xx", "c", 5.0, "en"),
    ]
    rows += [("http://h/x", None, 5.0, "en"), ("http://h/y", " \t", 5.0, "en")]
    rows += [("http://h/3", "again", 5.0, "en"), (" HTTP://h/z ", "kept", 5.0, "en"), ("http://h/n", "c", None, "en")]
    rows += [("http://h/de", "c", 5.0, "de")]
    columns = dict(zip(["url", "generated_caption", "score", "lang"], map(list, zip(*rows, strict=True)), strict=True))
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    table = pa.table(columns)
    pq.write_table(table.slice(0, 11), first)
    pq.write_table(table.slice(11), second)
    files = data.local_captions(str(tmp_path))
    assert [name for name, _ in files] == ["a.parquet", "b.parquet"]
    args = options(tmp_path, "--filter", "score>2", "score<=17.5", "--filter", 'lang=="en"', "--max_samples", "1000")

    order, total, dropped = data.select_rows(files, args)

    assert total == len(rows)
    assert dropped == {
        "no URL": 3,
        "URL is not http(s)": 3,
        "no caption": 2,
        "filter score>2": 4,  # 0, 1, 2 and the null
        "filter score<=17.5": 2,
        'filter lang=="en"': 1,
        "duplicate URL": 1,
    }
    kept = [*range(3, 18), 29]  # the first of the two with h/3, and the one in capitals
    assert sorted(order) == kept and list(order) != kept
    again, *_ = data.select_rows(files, args)
    assert list(again) == list(order)
    args.seed = 1
    assert list(data.select_rows(files, args)[0]) != list(order)
    args.seed, args.max_samples = 0, 4
    assert list(data.select_rows(files, args)[0]) == list(order[:4])

    args.max_samples, args.number_sample_per_shard = 1000, 7
    data.write_shard_inputs(files, order, tmp_path, args, None)
    assert sorted(path.name for path in tmp_path.glob("*.arrow")) == ["00000.arrow", "00001.arrow", "00002.arrow"]
    written = [pa.ipc.open_file(path).read_all() for path in sorted(tmp_path.glob("*.arrow"))]
    assert [len(table) for table in written] == [7, 7, 2]
    written = pa.concat_tables(written).to_pylist()
    assert [row["input_row"] for row in written] == list(order)
    assert [row["position"] for row in written] == list(range(16))
    assert all(row["url"] == rows[row["input_row"]][0].strip() for row in written)
    assert all(row["caption"] == rows[row["input_row"]][1] for row in written)


def test_a_filter_on_text_against_a_number_is_an_error(tmp_path):
    path = write_captions(tmp_path / "c.parquet", ["http://h/1"], lang=["en"])
    with pytest.raises(data.UserError, match="--filter lang>3: column 'lang' holds string"):
        data.select_rows(data.local_captions(str(path)), options(tmp_path, "--filter", "lang>3"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url_column", "URL"], "--url_column: c.parquet has no column 'URL'; it has url, generated_caption"),
        (
            ["--caption_column", "TEXT"],
            "--caption_column: c.parquet has no column 'TEXT'; it has url, generated_caption",
        ),
        (["--filter", "punsafe<0.1"], "--filter punsafe<0.1: c.parquet has no column 'punsafe'; it has url, gen"),
        (
            ["--verify_hash", "sha"],
            "--verify_hash (no such path, so taken for a column): c.parquet has no column 'sha'",
        ),
        (["--caption_file", "nowhere.parquet"], "--caption_file nowhere.parquet: no such parquet file"),
        (["--caption_file", "text.parquet"], "text.parquet can't be read, it is damaged or another kind of file"),
        (["--distributor", "ray"], "--distributor ray: that package is not installed"),
        (["--distributor", "pyspark"], "--distributor pyspark: that package is not installed"),
        (["--output_dir", "mine"], "holds notes.txt but no manifest.json: data.py did not make it"),
        (["--output_dir", "c.parquet"], "--output_dir c.parquet is a file"),
    ],
)
def test_requests_that_cannot_be_met_are_refused_first(tmp_path, monkeypatch, capsys, flags, message):
    """In a second, with one sentence and exit code 2; nothing of the user's is touched."""
    monkeypatch.chdir(tmp_path)
    real = data.importlib.util.find_spec
    monkeypatch.setattr(
        data.importlib.util, "find_spec", lambda name: None if name in ("ray", "pyspark") else real(name)
    )
    write_captions(tmp_path / "c.parquet", ["http://h/1"])
    (tmp_path / "text.parquet").write_text("not parquet")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert data.run(data.parse_args(["--caption_file", "c.parquet", "--output_dir", "out", *flags])) == 2
    error = capsys.readouterr().err
    assert message in error.replace(str(tmp_path) + "/", "") and error.count("\n") == 1
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_no_row_left_is_an_error(tmp_path, capsys):
    path = write_captions(tmp_path / "c.parquet", ["ftp://h/1", "gopher://h/2"])
    assert data.run(options(tmp_path, "--caption_file", str(path))) == 2
    assert "none of the 2 rows is left to fetch (URL is not http(s): 2)" in capsys.readouterr().err


def test_wandb_without_a_login_is_refused(tmp_path):
    path = write_captions(tmp_path / "c.parquet", ["http://h/1"])
    environment = {
        "HOME": str(tmp_path),
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": "",
        "NETRC": str(tmp_path / "none"),
    }
    done = run_data(tmp_path / "out", "--caption_file", str(path), "--enable_wandb", environment=environment)
    assert done.returncode == 2, done.stderr
    assert "--enable_wandb" in done.stderr and "wandb" in done.stderr and "Traceback" not in done.stderr


def test_memory_stays_flat_over_the_table(tmp_path):
    """Ten times the rows (180 MB of text) may not cost more than 16 bytes a row and some air."""
    code = """
import sys, data, pathlib, shutil
folder = pathlib.Path(sys.argv[1])
args = data.parse_args(["--output_dir", str(folder), "--max_samples", "10000000"])
files = data.local_captions(str(folder))
order, total, dropped = data.select_rows(files, args)
work = folder / "work"
work.mkdir()
data.write_shard_inputs(files, order, work, args, None)
print(len(order), [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")][0] // 1024)
"""
    peaks = []
    for rows in (40_000, 400_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        padding = "x" * 200
        with pq.ParquetWriter(
            folder / "c.parquet", pa.schema([("url", pa.string()), ("generated_caption", pa.string())])
        ) as writer:
            for start in range(0, rows, 20_000):
                numbers = range(start, start + 20_000)
                urls, captions = [f"http://h/{i}/{padding}" for i in numbers], [f"{i} {padding}" for i in numbers]
                writer.write_table(pa.table({"url": urls, "generated_caption": captions}))
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        count, peak = map(int, done.stdout.split())
        assert count == rows
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 80, peaks


# ---------------------------------------------------------------------------------------------------------------------
# The Hub


@pytest.fixture
def hub_folder(tmp_path):
    folder = tmp_path / "repo"
    (folder / "data").mkdir(parents=True)
    write_captions(folder / "data" / "one.parquet", ["http://h/1"])
    write_captions(folder / "data" / "two.parquet", ["http://h/2"])
    (folder / "big.faiss").write_bytes(b"8 GB")
    return folder


def fetch_from(
    hub: HubServer, tmp_path: Path, *arguments: str | None, **environment: str
) -> tuple[list, subprocess.CompletedProcess]:
    code = """
import json, sys, data
try:
    commit, files = data.fetch_captions(*json.loads(sys.argv[1]))
    print(json.dumps([commit, [[name, data.file_sha256(path)] for name, path in files]]))
except data.UserError as error:
    print(json.dumps([2, str(error)]))
except data.DataError as error:
    print(json.dumps([1, str(error)]))
sys.exit(0)
"""
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"} | environment
    done = finish_data(json.dumps(arguments), before=code, environment=home)
    return json.loads(done.stdout.splitlines()[-1]), done


def test_only_parquet_is_fetched_and_a_damaged_file_is_fetched_again(hub_folder, tmp_path):
    hub = HubServer(hub_folder)
    hub.corrupt = 1
    (commit, files), _ = fetch_from(hub, tmp_path, hub.REPO, None)
    hub.close()
    assert commit == hub.COMMIT
    names = ["data/one.parquet", "data/two.parquet"]
    assert files == [[name, hashlib.sha256((hub_folder / name).read_bytes()).hexdigest()] for name in names]
    assert not any("faiss" in path for path in hub.hits)
    assert sum(hub.hits[f"/datasets/{hub.REPO}/resolve/{hub.COMMIT}/{name}"] for name in names) == 6  # 3 x (HEAD, GET)
    # the server is gone: a run works from the cache
    (commit, again), _ = fetch_from(hub, tmp_path, hub.REPO, hub.COMMIT)
    assert (commit, again) == (hub.COMMIT, files)


def test_errors_of_the_hub_are_one_sentence(hub_folder, tmp_path):
    hub = HubServer(hub_folder)
    for arguments, code, message in (
        ((hub.REPO, "nosuch"), 2, "has no --revision nosuch"),
        (("owner/none", None), 2, "no such dataset is on the Hub"),
        (("owner/gated", None), 2, "is gated"),
        (("not a name", None), 2, "not a name"),
    ):
        (found, sentence), _ = fetch_from(hub, tmp_path, *arguments)
        assert found == code and message in sentence and "\n" not in sentence, sentence
    hub.corrupt = 99
    (code, sentence), _ = fetch_from(hub, tmp_path, hub.REPO, None)
    assert code == 1 and "arrived damaged twice" in sentence
    hub.close()
    (code, sentence), _ = fetch_from(hub, tmp_path, "owner/other", None)
    assert code == 1 and "can't be reached" in sentence and "the local cache does not hold it all" in sentence


# ---------------------------------------------------------------------------------------------------------------------
# Addresses

PUBLIC = ["93.184.216.34", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:8.8.8.8", "64:ff9b::808:808"]
PRIVATE = """127.0.0.1 0.0.0.0 10.1.2.3 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254 100.64.0.1 192.0.0.8
    192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 240.0.0.1 255.255.255.255 168.63.129.16 192.88.99.1 :: ::1
    ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:0:127.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1
    2002:7f00:1:: 2002:a00:1:: 2001::1 2001:db8::1 3fff::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1
    100::1 5f00::1""".split()


def test_public_addresses():
    assert [address for address in PUBLIC if not data.is_public(address)] == []
    assert [address for address in PRIVATE if data.is_public(address)] == []


class Internet:
    """Names and addresses for one test: what a name resolves to, answer after answer, and who was contacted."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.names: dict[str, list[list[str]]] = {}
        self.lookups: collections.Counter[str] = collections.Counter()
        self.contacted: list[str] = []

    def getaddrinfo(self, host, port, *_, **__):
        answers = self.names[host]
        found = answers[min(self.lookups[host], len(answers) - 1)]
        self.lookups[host] += 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]


@pytest.fixture
def internet(image_server, monkeypatch):
    """Every address leads to the image server, so that the rules alone decide who is contacted."""
    net = Internet(image_server.port)
    connect = socket.socket.connect

    def reroute(wire, address):
        net.contacted.append(address[0])
        connect(wire, ("127.0.0.1", net.port))

    monkeypatch.setattr(socket, "getaddrinfo", net.getaddrinfo)
    monkeypatch.setattr(data.PlainSocket, "connect", reroute)
    return net


def fetched(url: str, tmp_path: Path, *flags: str) -> str:
    """ "ok", or the reason why not."""
    args = options(tmp_path, *flags)
    try:
        with data.fetch(url, args, data.ByteBudget(48 * data.MIB)):
            return "ok"
    except data.Refused as refused:
        return refused.reason


@pytest.fixture
def public_only(monkeypatch, tmp_path):
    args = options(tmp_path)
    args.allow_private_addresses = False

    def get(url: str) -> str:
        try:
            with data.fetch(url, args, data.ByteBudget(data.MIB)):
                return "ok"
        except data.Refused as refused:
            return refused.reason

    return get


def test_one_private_answer_refuses_a_name(internet, public_only):
    internet.names = {"two.test": [["93.184.216.34", "127.0.0.1"]], "good.test": [["93.184.216.34", "8.8.8.8"]]}
    assert public_only("http://two.test/ok/1.jpg") == "private_address"
    assert internet.contacted == []
    assert public_only("http://good.test/ok/1.jpg") == "ok"
    assert internet.contacted == ["93.184.216.34"]


def test_the_address_that_was_checked_is_the_one_contacted(internet, public_only):
    """A name that answers differently each time gets no second lookup between the check and the connection."""
    internet.names = {"turn.test": [["93.184.216.34"], ["127.0.0.1"], ["127.0.0.1"]]}
    assert public_only("http://turn.test/ok/1.jpg") == "ok"
    assert internet.lookups["turn.test"] == 1 and internet.contacted == ["93.184.216.34"]
    assert public_only("http://turn.test/ok/1.jpg") == "private_address"
    assert internet.contacted == ["93.184.216.34"]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file", "bad_scheme"),
        ("ftp", "bad_scheme"),
        ("inside.test/ok/1.jpg", "private_address"),
        ("loop", "too_many_redirects"),
        ("ok", "ok"),
    ],
)
def test_every_redirect_is_checked(internet, public_only, place, reason):
    internet.names = {"a.test": [["93.184.216.34"]], "inside.test": [["10.0.0.1"]]}
    assert public_only(f"http://a.test/to/{place}") == reason
    assert set(internet.contacted) == {"93.184.216.34"}


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_private_hosts_in_every_spelling(image_server, public_only, host):
    before = image_server.hits.total()
    assert public_only(f"http://{host}:{image_server.port}/ok/1.jpg") == "private_address"
    assert image_server.hits.total() == before


def test_a_name_server_that_does_not_answer_is_not_waited_for(public_only, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(20))
    started = time.monotonic()
    assert public_only("http://slow.test/1.jpg") == "dns"
    assert time.monotonic() - started < 5


# ---------------------------------------------------------------------------------------------------------------------
# Fetching


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("ok/1.jpg", "ok"),
        ("404/x", "http_404"),
        ("500/x", "http_500"),
        ("slow", "timeout"),
        ("drip", "deadline"),
        ("head", "deadline"),
        ("crawl", "deadline"),
        ("endless", "too_large"),
        ("huge", "too_large"),
        ("headers", "too_large"),
        ("unfinished", "incomplete"),
        ("empty.jpg", "empty"),
        ("optout/noai", "opt_out"),
        ("ünïcode pfad?q=ä b", "ok"),
    ],
)
def test_what_becomes_of_each_answer(image_server, tmp_path, path, reason):
    started = time.monotonic()
    assert fetched(f"{image_server.url}/{path}", tmp_path) == reason
    assert time.monotonic() - started < 6  # the deadline is 2 s


def test_the_limit_on_bytes_counts_the_body(image_server, tmp_path):
    image_server.bodies["sized.jpg"] = encode(photo(1, 200, 200))
    for path in ("sized.jpg", "unsized"):  # with its length announced, and without
        size = len(image_server.bodies["sized.jpg"])
        assert fetched(f"{image_server.url}/{path}", tmp_path, "--max_bytes", str(size)) == "ok"
        assert fetched(f"{image_server.url}/{path}", tmp_path, "--max_bytes", str(size - 1)) == "too_large"


def test_retries_are_for_failures_that_may_pass(image_server, tmp_path):
    image_server.hits.clear()
    assert fetched(f"{image_server.url}/twice503/b", tmp_path, "--retries", "1") == "http_503"
    assert fetched(f"{image_server.url}/twice503/c", tmp_path, "--retries", "2") == "ok"
    assert fetched(f"{image_server.url}/404/c", tmp_path, "--retries", "2") == "http_404"
    assert fetched(f"{image_server.url}/twice503/d", tmp_path, "--retries", "2", "--deadline", "0.5") == "ok"
    assert [image_server.hits[f"/{path}"] for path in ("twice503/b", "twice503/c", "404/c")] == [2, 3, 1]


@pytest.mark.parametrize("url", ["http://", "http:///x.jpg", "http://h:99999/x", "http://a..b/x", "http://[::1/x"])
def test_bad_urls(url, tmp_path):
    assert fetched(url, tmp_path) == "bad_url"


def test_a_refused_connection_and_an_unknown_name(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert fetched(f"http://127.0.0.1:{port}/x.jpg", tmp_path) == "network"
    assert fetched("http://no-such-name.invalid/x.jpg", tmp_path) == "dns"


@pytest.mark.parametrize(
    ("header", "refused"),
    [
        ("noai", True),
        ("noimageai", True),
        ("noindex", True),
        ("NoImageIndex", True),
        ("noml", True),
        ("none", True),
        ("nofollow, noai", True),
        ("distill-sd: noai", True),
        ("*: noai", True),
        ("index, max-snippet:-1, max-image-preview: large, noai", True),
        ("distill-sd: nofollow, max-snippet:-1, noml", True),
        ("otherbot: max-snippet:-1, noai", False),
        ("otherbot: noai", False),
        ("otherbot: noai, noindex", False),
        ("noindex, otherbot: nofollow", True),
        ("nofollow", False),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST", False),
        ("noaid", False),
    ],
)
def test_opt_outs(image_server, tmp_path, header, refused):
    url = f"{image_server.url}/optout/{header.replace(' ', '_')}"
    assert fetched(url, tmp_path) == ("opt_out" if refused else "ok")
    assert fetched(url, tmp_path, "--no-honor_opt_outs") == "ok"


def test_we_say_who_we_are(image_server, tmp_path):
    """This tool's name, and what the user gives as a contact; no other project's page."""
    image_server.agents.clear()
    fetched(f"{image_server.url}/ok/1.jpg", tmp_path)
    assert image_server.agents == {"Mozilla/5.0 (compatible; distill-sd)"}
    image_server.agents.clear()
    fetched(f"{image_server.url}/ok/1.jpg", tmp_path, "--user_agent", "https://example.org/crawl me@example.org")
    assert image_server.agents == {"Mozilla/5.0 (compatible; distill-sd; +https://example.org/crawl me@example.org)"}


def test_a_certificate_that_cannot_be_trusted_is_refused(tls_server, tmp_path):
    port, certificate = tls_server
    assert fetched(f"https://127.0.0.1:{port}/x.jpg", tmp_path) == "tls"
    data.tls_context.cache_clear()
    context = data.tls_context()
    context.load_verify_locations(certificate)
    try:
        assert fetched(f"https://127.0.0.1:{port}/ok.jpg", tmp_path) == "ok"
        assert fetched(f"https://localhost:{port}/ok.jpg", tmp_path) == "tls"  # the certificate is for 127.0.0.1 alone
        assert fetched(f"https://127.0.0.1:{port}/drip.jpg", tmp_path) == "deadline"
    finally:
        data.tls_context.cache_clear()


@pytest.fixture
def tls_server(tmp_path, image_server):
    """An HTTPS server with a certificate of its own making; `/drip.jpg` never ends."""
    import ssl

    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    command = [
        *command.split(),
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(plain, server_side=True) as wire:
                    if b"/drip" in wire.recv(4096):
                        wire.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n")
                        for _ in range(100):
                            wire.sendall(b"x")
                            time.sleep(0.1)
                    wire.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            except OSError:
                pass

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1], certificate
    listener.close()


def test_the_budget_is_first_come_first_served_and_given_back():
    budget = data.ByteBudget(100)
    assert budget.take(80, 1) < 1
    order: list[str] = []

    def take(name: str, count: int) -> None:
        budget.take(count, 10)
        order.append(name)

    threads = [threading.Thread(target=take, args=("large", 90))]
    threads[0].start()
    while len(budget.line) < 1:
        time.sleep(0.01)
    threads.append(threading.Thread(target=take, args=("small", 10)))  # would fit now, but came later
    threads[1].start()
    time.sleep(0.1)
    assert order == []
    with pytest.raises(data.Refused, match="busy"):
        budget.take(50, 0.05)
    budget.give_back(80)
    for thread in threads:
        thread.join(5)
    assert order == ["large", "small"] and budget.used == 100


def test_a_body_returns_its_bytes_however_it_ends(image_server, tmp_path):
    budget = data.ByteBudget(32 * data.MIB)
    args = options(tmp_path)
    image_server.bodies["noise.png"] = np.random.default_rng(0).bytes(300_000)
    with data.fetch(f"{image_server.url}/noise.png", args, budget) as body:
        assert budget.used == 300_000 and body.getvalue() == image_server.bodies["noise.png"]
    assert budget.used == 0
    for path in ("endless", "crawl"):
        with pytest.raises(data.Refused):
            data.fetch(f"{image_server.url}/{path}", args, budget)
        assert budget.used == 0


# ---------------------------------------------------------------------------------------------------------------------
# Images


def square(content: bytes, tmp_path: Path, *flags: str) -> np.ndarray:
    """What an image becomes, as (height, width, 3) numbers."""
    jpeg, side, *_ = data.square_jpeg(io.BytesIO(content), options(tmp_path, *flags))
    image = Image.open(io.BytesIO(jpeg))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (side, side))
    assert not image.getexif()
    return np.asarray(image).astype(int)


def near(pixel, colour, tolerance=12) -> bool:
    return bool(np.abs(np.asarray(pixel) - colour).max() <= tolerance)


RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, tmp_path):
    from PIL import ImageOps

    content = with_orientation(quadrants(), orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    corners = [upright.getpixel((x, y)) for y in (10, upright.height - 10) for x in (10, upright.width - 10)]
    found = square(content, tmp_path)
    assert all(
        near(found[y, x], c, 25) for (y, x), c in zip([(5, 5), (5, 58), (58, 5), (58, 58)], corners, strict=True)
    )
    _, _, width, height = data.square_jpeg(io.BytesIO(content), options(tmp_path))
    assert (width, height) == upright.size


def test_every_kind_of_pixel_looks_as_it_should(image_server, tmp_path):
    bodies = image_server.bodies
    gray = square(bodies["gray16.png"], tmp_path)
    assert abs(gray.mean() - 127.5) < 2 and gray[2].mean() < 15 and gray[-2].mean() > 240  # not white, not clipped
    alpha = square(bodies["alpha.png"], tmp_path)
    assert near(alpha[:, :28].reshape(-1, 3).min(0), WHITE) and not near(alpha[:, 40:].reshape(-1, 3).min(0), WHITE)
    assert near(square(bodies["cmyk.jpg"], tmp_path)[32, 32], RED)
    palette = square(bodies["palette.png"], tmp_path)
    reference = np.asarray(photo(3, 80, 80).resize((64, 64), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(palette - reference).mean() < 20
    assert near(square(bodies["animated.gif"], tmp_path)[32, 32], RED)  # of red and blue, the first
    assert square(bodies["gray.jpg"], tmp_path).std(axis=2).max() == 0


def test_transparency_of_every_kind_is_over_white(tmp_path):
    half = Image.new("LA", (64, 64), (0, 128))
    assert near(square(encode(half, "PNG"), tmp_path)[9, 9], (127, 127, 127))
    clear = Image.new("RGBA", (64, 64), (10, 200, 10, 0))
    for kind in ("PNG", "WEBP", "TIFF"):
        assert near(square(encode(clear, kind), tmp_path)[9, 9], WHITE), kind
    palette = Image.new("P", (64, 64), 3)
    palette.putpalette([0] * 9 + [9, 9, 9])
    assert near(square(encode(palette, "PNG", transparency=3), tmp_path)[9, 9], WHITE)
    assert near(square(encode(palette, "GIF", transparency=3), tmp_path)[9, 9], WHITE)
    assert near(square(encode(Image.new("RGB", (64, 64), BLUE), "PNG", transparency=BLUE), tmp_path)[9, 9], WHITE)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled(kind, tmp_path):
    shades = Image.fromarray(np.full((64, 64), 0x4000, np.uint16))
    assert near(square(encode(shades, kind), tmp_path)[9, 9], (64, 64, 64), 2)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "WEBP", "AVIF", "PNG", "JPEG"])
def test_formats(kind, tmp_path):
    found = square(encode(quadrants(64, 64), kind), tmp_path)
    assert near(found[9, 9], RED, 20) and near(found[9, 54], GREEN, 20) and near(found[54, 9], BLUE, 20)


def test_centre_crop_never_padded_never_enlarged(tmp_path):
    wide = Image.new("RGB", (1000, 100), "white")
    wide.paste("red", (450, 0, 550, 100))
    assert near(square(encode(wide, "PNG"), tmp_path).reshape(-1, 3), RED)
    tall = wide.rotate(90, expand=True)
    assert near(square(encode(tall, "PNG"), tmp_path).reshape(-1, 3), RED)
    with pytest.raises(data.Refused, match="too_small"):
        square(encode(photo(0, 63, 500)), tmp_path)
    assert square(encode(photo(0, 63, 500)), tmp_path, "--min_image_size", "32").shape == (63, 63, 3)
    assert square(encode(photo(0, 640, 500)), tmp_path, "--min_image_size", "32").shape == (64, 64, 3)


def test_a_large_image_is_shrunk_smoothly(tmp_path):
    """The way in bands and steps gives what one Lanczos resize of the whole gives, without seams."""
    y, x = np.mgrid[0:1500, 0:1700]
    waves = (127 + 120 * np.sin(x / 90) * np.cos(y / 70)).astype(np.uint8)
    image = Image.fromarray(waves)
    reference = image.crop((100, 0, 1600, 1500)).resize((64, 64), Image.Resampling.LANCZOS)
    reference = np.asarray(reference).astype(int)[:, :, None]
    for kind in ("PNG", "JPEG"):
        found = square(encode(image, kind), tmp_path, "--encode_quality", "100")
        assert np.abs(found - reference).max() <= 8 and np.abs(found - reference).mean() <= 3, kind


def test_what_is_not_an_image_is_refused(image_server, tmp_path):
    for name, reason in (
        ("page.html", "not_an_image"),
        ("packed.jpg", "not_an_image"),
        ("truncated.jpg", "broken_image"),
        ("tiny.jpg", "too_small"),
        ("thread.png", "too_small"),
        ("one.png", "too_small"),
        ("bomb.png", "too_many_pixels"),
    ):
        with pytest.raises(data.Refused) as refused:
            square(image_server.bodies[name], tmp_path)
        assert refused.value.reason == reason, name


def test_bombs_are_judged_by_their_header(tmp_path):
    """In no time: nothing of them is decoded. The limit is of pixels, and of the memory that a decoder takes."""
    bombs = {
        "pixels": bomb(5001),
        "several scans": multi_scan_jpeg(4600),
        "webp": encode(Image.new("RGB", (3000, 3000)), "WEBP", method=0),
    }
    for name, content in bombs.items():
        started = time.monotonic()
        with pytest.raises(data.Refused, match="too_many_pixels"):
            square(content, tmp_path)
        assert time.monotonic() - started < 0.5, name
    with pytest.raises(data.Refused, match="too_many_pixels"):
        square(encode(photo(0, 100, 100)), tmp_path, "--max_pixels", "9999")
    assert square(encode(photo(0, 100, 100)), tmp_path, "--max_pixels", "10000").shape == (64, 64, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Shards on disk


def test_tars_are_plain_and_their_offsets_computable(tmp_path):
    samples = [("000000", b"a" * 511, "ü".encode()), ("000001", b"b" * 512, b"c"), ("000002", b"d" * 513, b"e" * 1025)]
    entry = data.write_tar(tmp_path / "x.tar", ((key, {".jpg": jpg, ".txt": text}) for key, jpg, text in samples))
    content = (tmp_path / "x.tar").read_bytes()
    assert entry == {
        "name": "x.tar",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "count": 3,
        "image_bytes": [511, 512, 513],
        "caption_bytes": [2, 1, 1025],
    }
    assert len(content) % tarfile.RECORDSIZE == 0
    offsets = data.data_offsets([511, 512, 513], [2, 1, 1025])
    assert offsets.shape == (3, 2) and data.data_offsets([], []).shape == (0, 2)
    with tarfile.open(tmp_path / "x.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [f"00000{i}.{kind}" for i in range(3) for kind in ("jpg", "txt")]
    assert [member.offset_data for member in members] == offsets.flatten().tolist()
    assert [member.offset_data - member.offset for member in members] == [512] * 6
    assert [content[start : start + len(s[1])] for (start, _), s in zip(offsets, samples, strict=True)] == [
        s[1] for s in samples
    ]


def commit_one(folder: Path, image: bytes) -> None:
    record = dict.fromkeys(data.RESULT_SCHEMA.names) | {
        "key": "000000",
        "status": "ok",
        "jpg_bytes": len(image),
        "caption_bytes": 1,
    }
    table = pa.Table.from_pylist([record], data.RESULT_SCHEMA)
    data.commit_shard(folder, "00000", table, iter([("000000", {".jpg": image, ".txt": b"c"})]))


def test_a_commit_that_was_cut_between_its_two_renames_is_finished(tmp_path, monkeypatch):
    """Even when the new tar has the size of the old one, as a shard that was tried again may."""
    commit_one(tmp_path, b"old")
    replace = Path.replace

    def crash(path, target):
        if path.name.endswith(".tar.part"):
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        commit_one(tmp_path, b"new")
    monkeypatch.undo()
    assert tar_members(tmp_path / "00000.tar")["000000.jpg"] == b"old"
    (tmp_path / ".00001.tar.part").write_bytes(b"half")
    (tmp_path / ".mine.part").write_bytes(b"not ours")
    data.clear_unfinished(tmp_path)
    assert tar_members(tmp_path / "00000.tar")["000000.jpg"] == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.part", "00000.parquet", "00000.tar"]


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs: the stand-in for the Hub, the real huggingface_hub, the real img2dataset


def test_a_whole_run(data_folder, image_server, hub_server):
    done, folder = data_folder.done, data_folder.path
    out = done.stdout

    # what it said first
    assert out.index("Disk space: up to about") < out.index("Outcomes:")
    for line in ("Rows read: ", "dropped, no URL: 1", "dropped, URL is not http(s): 2", "dropped, no caption: 1"):
        assert line in out
    assert "dropped, duplicate URL: 1" in out and "dropped, filter AESTHETIC_SCORE>5: 1" in out
    assert f"Rows chosen: {GOOD + len(HOSTILE)}, in 4 shards of 20" in out and "GB are free" in out
    assert "no hash is known" in out
    assert "images/s" in done.stderr and "% ok" in done.stderr

    # what came of each row
    found = statuses(folder)
    assert {path: found["/" + path] for path in HOSTILE} == HOSTILE
    assert sum(status == "ok" for status in found.values()) == GOOD + sum(v == "ok" for v in HOSTILE.values())
    for reason in set(HOSTILE.values()):
        assert f"  {reason:<20}" in out
    assert f"  {image_server.url[7:]:<40}" in out.split("Hosts that failed most:")[1]

    # what is there: nothing else, and nothing that was left behind
    names = [f"0000{i}.{kind}" for i in range(4) for kind in ("parquet", "tar")] + ["manifest.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"] and manifest["input"]["revision"] == hub_server.COMMIT
    for file in manifest["input"]["files"]:
        assert file["sha256"] == hashlib.sha256(hub_server.files[file["name"]]).hexdigest()
    assert manifest["settings"]["image_size"] == 64 and manifest["settings"]["filter"] == ["AESTHETIC_SCORE>5"]
    assert manifest["rows"]["dropped"]["URL is not http(s)"] == 2

    rows = []
    for entry in manifest["shards"]:
        tar = folder / entry["name"]
        assert entry["bytes"] == tar.stat().st_size and entry["sha256"] == hashlib.sha256(tar.read_bytes()).hexdigest()
        table = pq.read_table(tar.with_suffix(".parquet")).to_pylist()
        good = [row for row in table if row["status"] == "ok"]
        members = tar_members(tar)
        # jpg and txt in turn, in the order of the rows, not of their arrival
        assert list(members) == [f"{row['key']}.{kind}" for row in good for kind in ("jpg", "txt")]
        assert [row["key"] for row in table] == [f"{tar.stem}{i:02d}" for i in range(len(table))]
        assert entry["count"] == len(good)
        assert entry["image_bytes"] == [len(members[f"{row['key']}.jpg"]) for row in good]
        assert entry["caption_bytes"] == [len(members[f"{row['key']}.txt"]) for row in good]
        assert all(members[f"{row['key']}.txt"].decode() == row["caption"] for row in good)
        rows += table
    for row in rows:
        if "/ok/" in row["url"] and "/to/" not in row["url"]:
            original = encode(photo(int(row["url"].split("/")[-1][:-4])))
            assert row["sha256"] == hashlib.sha256(original).hexdigest() and row["downloaded_bytes"] == len(original)
            assert (row["original_width"], row["original_height"], row["width"]) == (80, 64, 64)
            jpg = next(t for t in [tar_members(folder / f"{row['key'][:5]}.tar")[f"{row['key']}.jpg"]])
            reference = photo(int(row["url"].split("/")[-1][:-4])).crop((8, 0, 72, 64))
            assert np.abs(np.asarray(Image.open(io.BytesIO(jpg))).astype(int) - np.asarray(reference)).mean() < 12
    assert [row["input_row"] for row in rows] != sorted(row["input_row"] for row in rows)  # shuffled

    # whom it asked
    assert not any("faiss" in path for path in hub_server.hits)
    assert data_folder.agents == {"Mozilla/5.0 (compatible; distill-sd)"}
    assert not any("/skipped/" in path for path in image_server.hits)


def test_the_same_command_again_does_nothing(data_folder, image_server):
    before = {path.name: path.read_bytes() for path in data_folder.path.iterdir()}
    hits = image_server.hits.total()
    done = run_data(*data_folder.command, environment=data_folder.environment)
    assert done.returncode == 0, done.stderr
    assert "Rows to fetch now: 0" in done.stdout and "Outcomes:" in done.stdout
    assert {path.name: path.read_bytes() for path in data_folder.path.iterdir()} == before
    assert image_server.hits.total() == hits


def test_another_request_for_the_same_folder_is_refused(data_folder, hub_server, tmp_path):
    before = {path.name: path.read_bytes() for path in data_folder.path.iterdir()}
    environment = data_folder.environment
    done = run_data(
        *data_folder.command, "--encode_quality", "80", "--number_sample_per_shard", "5", environment=environment
    )
    assert done.returncode == 2
    assert "encode_quality was 95, is 80" in done.stderr and "number_sample_per_shard was 20, is 5" in done.stderr
    done = run_data(*data_folder.command, "--thread_count", "3", "--timeout", "9", environment=environment)
    assert done.returncode == 0  # how the rows are fetched may change

    # the dataset has a new commit: the same command stays with the old one, asking for the new one is refused
    files = hub_server.files
    hub_server.commits.append("f" * 40)
    hub_server.files = files | {"data/part-1.parquet": files["data/part-0.parquet"]}
    try:
        done = run_data(*data_folder.command, environment=environment)
        assert done.returncode == 0 and f"of commit {hub_server.COMMIT}" in done.stdout
        done = run_data(*data_folder.command, "--revision", "main", environment=environment)
        assert done.returncode == 2 and f"revision was '{hub_server.COMMIT}', is '{'f' * 40}'" in done.stderr
    finally:
        hub_server.commits.pop()
        hub_server.files = files
    other = write_captions(tmp_path / "other.parquet", ["http://h/1"], AESTHETIC_SCORE=[9.0])
    done = run_data(*data_folder.command, "--caption_file", str(other), environment=environment)
    assert done.returncode == 2 and "dataset_name was 'owner/captions', is None" in done.stderr
    assert {path.name: path.read_bytes() for path in data_folder.path.iterdir()} == before


def test_check_finds_what_is_wrong(data_folder, tmp_path, capfd):
    done = finish_data("--check", data_folder.path)
    assert done.returncode == 0 and "every image opens" in done.stdout and "images" in done.stderr

    def problems(damage) -> str:
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(data_folder.path, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        damage(folder, manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert data.run(data.parse_args(["--check", str(folder)])) == 1
        return capfd.readouterr().out

    def flip(folder, manifest, at=700):
        content = bytearray((folder / "00001.tar").read_bytes())
        content[at : at + 300] = bytes(300)
        (folder / "00001.tar").write_bytes(content)

    def cut(folder, manifest):
        content = (folder / "00002.tar").read_bytes()
        (folder / "00002.tar").write_bytes(content[: len(content) // 2])

    def empty(folder, manifest):
        (folder / "00002.tar").write_bytes(b"")

    def swap(folder, manifest):
        manifest["shards"][0]["image_bytes"][0] += 600

    found = problems(flip)
    assert "00001.tar differs from its SHA-256" in found and "can't be decoded" in found
    assert "00002.tar has " in problems(cut)
    assert "00002.tar has 0 bytes" in problems(empty)
    assert "00000.tar its " in problems(swap)
    assert "00003.tar is missing" in problems(lambda folder, _: (folder / "00003.tar").unlink())
    assert "00003.tar is not in the manifest" in problems(lambda _, manifest: manifest["shards"].pop())
    assert "can't be read" in problems(lambda folder, _: (folder / "00003.parquet").write_bytes(b"PAR1"))
    assert "run did not finish" in problems(lambda _, manifest: manifest.update(complete=False))
    assert data.run(data.parse_args(["--check", str(tmp_path)])) == 2
    (tmp_path / "manifest.json").write_text("{")
    assert data.run(data.parse_args(["--check", str(tmp_path)])) == 1


def test_all_private_all_refused(image_server, tmp_path):
    """Without the flag for it nothing at home is contacted, and a run without images does not end well."""
    hits = image_server.hits.total()
    captions = write_captions(tmp_path / "c.parquet", [f"{image_server.url}/ok/{i}.jpg" for i in range(5)])
    started = time.monotonic()
    done = run_data(tmp_path / "out", "--caption_file", str(captions), allow_private=False)
    assert done.returncode == 1 and time.monotonic() - started < 60
    assert set(statuses(tmp_path / "out").values()) == {"private_address"} and image_server.hits.total() == hits
    assert "0.0% of the rows became images, --min_success asks for 50.0%" in done.stderr
    assert images_of(tmp_path / "out") == {}


def test_retry_failed_and_verify_hash(image_server, tmp_path):
    paths = [f"ok/{900 + i}.jpg" for i in range(12)]
    captions = write_captions(tmp_path / "c.parquet", [f"{image_server.url}/{path}" for path in paths])
    command = [tmp_path / "a", "--caption_file", str(captions), "--number_sample_per_shard", "5"]
    image_server.gone = {paths[2], paths[7], paths[8]}
    first = run_data(*command)
    assert first.returncode == 0, first.stderr
    early = images_of(tmp_path / "a")
    assert len(early) == 18
    image_server.gone = {paths[8]}
    image_server.hits.clear()
    again = run_data(*command, "--retry_failed", "all")
    assert again.returncode == 0 and "Rows to fetch now: 3 (9 are done)" in again.stdout, again.stderr
    assert sorted(image_server.hits) == sorted(f"/{paths[i]}" for i in (2, 7, 8))
    late = images_of(tmp_path / "a")
    assert len(late) == 22 and early.items() <= late.items()
    assert data.check_folder(tmp_path / "a") == []
    image_server.gone = set()

    # another run against the hashes of that one: an image that changed is refused, one without a hash passes
    hashed = [tmp_path / "b", *command[1:], "--verify_hash", str(tmp_path / "a")]
    image_server.changed = {paths[3]: encode(photo(77))}
    done = run_data(*hashed)
    image_server.changed = {}
    assert done.returncode == 0, done.stderr
    found = statuses(tmp_path / "b")
    assert found.pop(f"/{paths[3]}") == "hash_mismatch" and set(found.values()) == {"ok"}
    a, b = images_of(tmp_path / "a"), images_of(tmp_path / "b")
    assert len(b) == 22 and len(a.items() & b.items()) == 20
    assert "no hash is known" not in done.stdout


def test_verify_hash_against_a_column(tmp_path):
    urls = [f"http://h/{i}" for i in range(3)]
    hashes = ["A" * 64, None, "b" * 64]
    files = data.local_captions(str(write_captions(tmp_path / "c.parquet", urls, sha=hashes)))
    args = options(tmp_path, "--verify_hash", "sha")
    data.write_shard_inputs(files, np.array([2, 0, 1]), tmp_path, args, None)
    rows = pa.ipc.open_file(tmp_path / "00000.arrow").read_all().to_pylist()
    assert [row["expected_sha256"] for row in rows] == ["b" * 64, "a" * 64, None]
    files = data.local_captions(str(write_captions(tmp_path / "c.parquet", urls, sha=["b" * 64, "md5", None])))
    with pytest.raises(data.UserError, match="--verify_hash sha: 'md5' is not a SHA-256"):
        data.write_shard_inputs(files, np.array([2, 0, 1]), tmp_path, args, None)


# ---------------------------------------------------------------------------------------------------------------------
# Kills, a full disk, memory


def wait_until(condition, seconds: float = 60):
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def test_killed_and_interrupted_runs_go_on_to_the_same_images(image_server, tmp_path):
    """A worker killed, then everything killed, then Ctrl-C, then the end: byte for byte what one run makes."""
    folder = tmp_path / "out"
    urls = [f"{image_server.url}/ok/{i}.jpg" for i in range(2000, 2060)]
    captions = write_captions(tmp_path / "c.parquet", urls)
    flags = ["--caption_file", str(captions), "--number_sample_per_shard", "15", "--thread_count", "4"]
    workers_of = {}

    def start() -> subprocess.Popen:
        """Start a run and wait until its worker stands in the middle of a shard."""
        image_server.gate.set()
        served = image_server.hits.total()
        child = subprocess.Popen(
            data_command(folder, *flags),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"DATA_TEST": str(folder)},
            # As from a terminal, even where these tests run in a shell's background, which ignores Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        image_server.delay = 0.05
        wait_until(lambda: image_server.hits.total() >= served + 22)
        image_server.gate.clear()
        time.sleep(0.5)
        workers_of[child.pid] = [pid for pid in processes_of(folder) if is_pool_worker(pid)]
        assert workers_of[child.pid]
        return child

    def is_pool_worker(pid: int) -> bool:
        return b"multiprocessing.spawn" in Path(f"/proc/{pid}/cmdline").read_bytes()

    def no_trace() -> None:
        """No process, and no file under a final name that isn't whole."""
        wait_until(lambda: processes_of(folder) == [], 10)
        for tar in folder.glob("*.tar"):
            assert len(tar_members(tar)) == 30

    # 1. a worker is killed, as by the kernel for want of memory
    child = start()
    os.kill(workers_of[child.pid][0], signal.SIGKILL)
    started = time.monotonic()
    out, error = child.communicate(timeout=30)
    assert time.monotonic() - started < 15
    assert child.returncode == 1 and "a worker process was killed" in error and "Traceback" not in error
    no_trace()
    done_first = {path.name for path in folder.glob("*.tar")}
    assert 1 <= len(done_first) < 4
    named = {entry["name"] for entry in json.loads((folder / "manifest.json").read_text())["shards"]}
    assert named == done_first

    # 2. the script itself is killed: it can do nothing, its workers must notice
    child = start()
    child.kill()
    child.communicate()
    no_trace()
    assert (folder / ".unfinished").exists()

    # 3. Ctrl-C
    child = start()
    child.send_signal(signal.SIGINT)
    started = time.monotonic()
    out, error = child.communicate(timeout=30)
    assert time.monotonic() - started < 10
    assert child.returncode == 130 and "data.py: stopped." in error and "Traceback" not in error
    no_trace()
    assert not (folder / ".unfinished").exists() and not list(folder.glob(".*.part"))

    # 4. the end
    image_server.gate.set()
    image_server.delay = 0
    image_server.hits.clear()
    done = run_data(folder, *flags)
    assert done.returncode == 0, done.stderr
    assert max(image_server.hits.values()) == 1 and image_server.hits.total() < 60
    whole = run_data(tmp_path / "whole", *flags, "--thread_count", "9", "--processes_count", "2")
    assert whole.returncode == 0, whole.stderr
    assert len(images_of(folder)) == 120
    for path in sorted((tmp_path / "whole").iterdir()):
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_full_disk_ends_the_run_and_space_lets_it_go_on(image_server, tmp_path):
    """On a real file system of 1.2 MB, in a namespace of its own; it grows before the second try."""
    wanted = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && "$@"'
    namespace = ["unshare", "-rm"] if os.geteuid() else ["unshare", "-m"]
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run([*namespace, "sh", "-c", wanted, "sh", "1m", str(disk), "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a small file system in a namespace")
    urls = [f"{image_server.url}/ok/{i}.jpg" for i in range(3000, 3400)]
    captions = write_captions(tmp_path / "c.parquet", urls)
    flags = ["--caption_file", str(captions), "--number_sample_per_shard", "100", "--encode_quality", "100"]
    command = data_command(disk / "out", *flags)
    script = (
        'mount -t tmpfs -o size=1200k tmpfs "$1" || exit 9; shift\n'
        f'start=$(date +%s); "$@"; echo "first $? $(($(date +%s) - start))"; ls -A {disk}/out\n'
        f"mount -o remount,size=60m {disk}\n"
        f'"$@"; echo "second $?"; {" ".join(SCRIPT)} --check {disk}/out; echo "check $?"; ls -A {disk}/out'
    )
    done = subprocess.run(
        [*namespace, "sh", "-c", script, "sh", str(disk), *command], capture_output=True, text=True, env=os.environ
    )
    first, second = done.stdout.split("second ")
    assert "first 1 " in first, done.stdout + done.stderr
    assert int(first.split("first 1 ")[1].split()[0]) < 60
    assert done.stderr.count("the disk is full") == 1 or "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    left = first.split("first 1 ")[1].split()[1:]
    assert "manifest.json" in left and not any(name.startswith(".") for name in left), left
    assert sum(name.endswith(".tar") for name in left) < 4
    assert second.startswith("0\n") and "check 0" in second, done.stdout + done.stderr
    assert second.count(".tar\n") == 4


def test_a_write_that_fails_ends_the_shard_at_once(image_server, tmp_path):
    """The rows after it are not fetched any more, and the spool file takes no more room."""
    args = options(tmp_path, "--thread_count", "1")
    rows = [{"url": f"{image_server.url}/ok/{i}.jpg", "caption": "c", "input_row": i, "position": i} for i in range(9)]
    write_rows(tmp_path / "00000.arrow", pa.Table.from_pylist(rows, data.ROW_SCHEMA))
    hits = image_server.hits.total()
    with pytest.raises(OSError, match="No space left"), data.Shard(0, str(tmp_path / "00000.arrow"), args) as shard:
        shard.spool.close()
        shard.spool = open("/dev/full", "wb", buffering=0)
        shard.fetch_all()
    assert image_server.hits.total() <= hits + 4
    assert not list(tmp_path.glob("*.spool"))


def test_nothing_of_the_users_is_removed(tmp_path):
    """Leftovers are removed by exact name; what else lies in the folder stays."""
    commit_one(tmp_path, b"x")
    data.write_manifest(tmp_path, {"format": data.FORMAT, "settings": {}}, [])
    (tmp_path / "_tmp").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".unfinished").mkdir()
    data.clear_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000.parquet",
        "00000.tar",
        "_tmp",
        "manifest.json",
        "notes.txt",
    ]


def test_memory_of_a_worker_with_every_thread_on_a_hostile_url(image_server, tmp_path):
    """At the default number of threads: bodies without end, slow ones, and the largest images that are let in."""
    assert data.parse_args([]).thread_count == 128
    image_server.bodies["large.png"] = encode(
        Image.new("RGBA", (5000, 5000), (200, 0, 0, 90)), "PNG", compress_level=1
    )
    image_server.bodies["scans.jpg"] = multi_scan_jpeg(4470)
    image_server.bodies["large.webp"] = encode(Image.new("RGB", (2700, 2700), "teal"), "WEBP", method=0)
    image_server.bodies["large.avif"] = encode(Image.new("RGB", (3500, 3500), "teal"), "AVIF", speed=10)
    hostile = ["endless", "crawl", "drip", "huge", "headers", "bomb.png", "endless", "crawl"] * 15
    hostile += ["large.png", "scans.jpg", "large.webp", "large.avif"] * 2
    assert len(hostile) == 128
    code = """
import json, sys, data, pyarrow as pa
from pathlib import Path
args = data.parse_args(json.loads(sys.argv[1]))
work = Path(args.output_dir) / ".unfinished"
work.mkdir(parents=True)
def status(name):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))
def shard(number, urls):
    table = pa.table({"url": urls, "caption": ["c"] * len(urls), "input_row": list(range(len(urls))),
        "expected_sha256": [None] * len(urls), "position": list(range(len(urls)))}, schema=data.ROW_SCHEMA)
    with pa.ipc.new_file(work / f"{number:05d}.arrow", table.schema) as writer:
        writer.write_table(table)
    data.download_shard(args, (number, str(work / f"{number:05d}.arrow")))
urls = json.loads(sys.argv[2])
shard(0, urls[:1])
idle = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
shard(1, urls[1:])
print(json.dumps([idle, status("VmHWM")]))
"""
    urls = [f"{image_server.url}/{path}?{i}" for i, path in enumerate(["ok/1.jpg", *hostile])]
    flags = ["--output_dir", str(tmp_path / "out"), "--allow_private_addresses", "--timeout", "2", "--deadline", "4"]
    environment = os.environ | data.WORKER_ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([*flags, "--retries", "0"]), json.dumps(urls)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    idle, peak = json.loads(done.stdout.splitlines()[-1])
    outcomes = collections.Counter(pq.read_table(tmp_path / "out" / "00001.parquet")["status"].to_pylist())
    print(f"idle {idle:.0f} MB, peak {peak:.0f} MB, {time.monotonic() - started:.0f} s, {dict(outcomes)}")
    assert outcomes["ok"] == 8 and outcomes["too_many_pixels"] == 15 and outcomes["too_large"] >= 45, outcomes
    assert peak - idle < 250
    assert time.monotonic() - started < 90
