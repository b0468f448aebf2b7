"""Two real HTTP servers on 127.0.0.1 for the tests of data.py: one of images, with every failure that the web has, and
a stand-in for the part of the Hub's API that huggingface_hub uses to download a dataset. At the end the fixtures that
start them, and `data_folder`: what a run of data.py made of both.
"""

import atexit
import collections
import functools
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from launcher import Launcher
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    output = io.BytesIO()
    image.save(output, kind, **options)
    return output.getvalue()


def photo(number: int = 0, width: int = 80, height: int = 64) -> Image.Image:
    """A smooth image, different for each number."""
    y, x = np.mgrid[0:height, 0:width]
    bands = [(x * 2 + number * 37) % 256, (y * 3 + number * 11) % 256, (x + y + number * 5) % 256]
    return Image.fromarray(np.stack(bands, -1).astype(np.uint8))


def quadrants(width: int = 96, height: int = 64) -> Image.Image:
    """Red, green / blue, white: shows every turn, flip and swap."""
    image = Image.new("RGB", (width, height), "white")
    for colour, box in (("red", (0, 0)), ((0, 255, 0), (width // 2, 0)), ("blue", (0, height // 2))):
        image.paste(colour, (*box, box[0] + width // 2, box[1] + height // 2))
    return image


def with_orientation(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, exif=exif, quality=95, subsampling=0)


def bomb(side: int) -> bytes:
    """A PNG of `side` x `side` white pixels, small as a file."""
    return encode(Image.new("1", (side, side), 1), "PNG", compress_level=9)


def multi_scan_jpeg(side: int) -> bytes:
    """The JPEG that takes the most memory to decode: all coefficients of three full planes are kept."""
    return encode(Image.new("RGB", (side, side), "teal"), progressive=True, subsampling=0, quality=30)


def bodies() -> dict[str, bytes]:
    """Everything that is answered with 200 and a body, by path."""
    shades = np.linspace(0, 65535, 80 * 80).reshape(80, 80).astype(np.uint16)
    clear = photo(1, 80, 80).convert("RGBA")
    clear.putalpha(Image.fromarray((np.indices((80, 80))[1] >= 40).astype(np.uint8) * 255))
    frames = [Image.new("P", (80, 80), 1), Image.new("P", (80, 80), 2)]
    for frame in frames:
        frame.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    jpeg = encode(photo(2, 400, 400))
    return {
        "exif6.jpg": with_orientation(quadrants(), 6),
        "gray16.png": encode(Image.fromarray(shades), "PNG"),
        "alpha.png": encode(clear, "PNG"),
        "cmyk.jpg": encode(Image.new("CMYK", (80, 80), (0, 255, 255, 0))),
        "palette.png": encode(photo(3, 80, 80).quantize(16), "PNG"),
        "animated.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "gray.jpg": encode(photo(4, 80, 80).convert("L")),
        "wide.png": encode(photo(5, 1000, 70), "PNG"),
        "tiny.jpg": encode(photo(6, 20, 20)),
        "thread.png": encode(photo(7, 5000, 1), "PNG"),
        "one.png": encode(photo(8, 1, 1), "PNG"),
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "page.html": b"<!doctype html><title>Not found</title>" * 50,
        "packed.jpg": gzip.compress(jpeg),
        "empty.jpg": b"",
        "bomb.png": bomb(12000),
    }


class Server:
    """Answers in a thread for each request until `close`. `hits` counts requests by path."""

    def __init__(self) -> None:
        self.hits: collections.Counter[str] = collections.Counter()
        self.agents: set[str] = set()
        self.times: list[float] = []  # of all requests
        self.closing = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner.hits[self.path.split("?")[0]] += 1
                owner.times.append(time.monotonic())
                owner.agents.add(self.headers.get("User-Agent", ""))
                try:
                    owner.answer(self)
                except OSError:
                    pass  # the client had enough
                self.close_connection = True

            do_HEAD = do_GET

            def log_message(self, *_) -> None:
                pass

        ThreadingHTTPServer.request_queue_size = 256
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        raise NotImplementedError

    def send(self, request, status: int = 200, body: bytes = b"", **headers: str) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            request.send_header("Content-Length", str(len(body)))
        request.send_header("Connection", "close")  # else a client may send its next request into a closing socket
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


TWO_ROBOTS = "otherbot: noai\r\nX-Robots-Tag: nofollow, distill-sd: noml"  # the second header decides


class ImageServer(Server):
    """`/ok/N.jpg` is an image; see `bodies` and `answer` for all that isn't."""

    def __init__(self) -> None:
        self.bodies = bodies()
        self.gate = threading.Event()  # requests for /ok/ wait while it is not set
        self.gate.set()
        self.delay = 0.0
        self.gone: set[str] = set()  # paths that are 404 for now
        self.changed: dict[str, bytes] = {}  # paths that are something else now
        super().__init__()

    def answer(self, request) -> None:
        path = urllib.parse.unquote(request.path.lstrip("/").split("?")[0])
        kind, _, rest = path.partition("/")
        special: dict[str, Callable] = {
            "slow": lambda: self.closing.wait(60),
            "drip": lambda: self.stream(request, 10_000, piece=b"\xff", pause=0.1),
            "endless": lambda: self.stream(request, None, piece=bytes(MIB)),
            "crawl": lambda: self.stream(request, None, piece=bytes(64 * 1024), pause=0.1),
            "huge": lambda: self.stream(request, 250 * MIB, piece=bytes(MIB)),
            "unfinished": lambda: self.send(request, 200, b"\xff\xd8\xff" * 99, Content_Length="5000"),
            "unsized": lambda: request.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + encode(photo(1, 200, 200))),
            "headers": lambda: self.flood(request),
            "head": lambda: self.drip_headers(request),
            "optout": lambda: self.send(request, 200, encode(photo(9)), X_Robots_Tag=rest.replace("_", " ")),
            "optouts": lambda: self.send(request, 200, encode(photo(9)), X_Robots_Tag=TWO_ROBOTS),
            "later": lambda: (
                self.send(request, 429, Retry_After=rest) if self.hits[request.path] < 2 else self.image(request, 3)
            ),
            "ok": lambda: self.image(request, int(rest.split(".")[0])),
            "ünïcode pfad": lambda: self.image(request, 1),
            "twice503": lambda: self.send(request, 503) if self.hits[request.path] < 3 else self.image(request, 2),
        }
        if path in self.gone:
            self.send(request, 404)
        elif path in self.changed:
            self.send(request, 200, self.changed[path])
        elif kind in ("404", "429", "500"):
            self.send(request, int(kind))
        elif kind == "to":  # /to/<where>: a redirect
            places = {
                "file": "file:///etc/hostname",
                "ftp": "ftp://127.0.0.1/x.jpg",
                "loop": "/to/loop",
                "ok": "/ok/7.jpg",
            }
            target = places.get(rest, f"http://{rest}")  # anything else is a host and a path
            self.send(request, 302, Location=target)
        elif kind in special:
            special[kind]()
        elif path in self.bodies:
            self.send(request, 200, self.bodies[path])
        else:
            self.send(request, 404)

    def image(self, request, number: int) -> None:
        self.gate.wait(60)
        time.sleep(self.delay)
        self.send(request, 200, encode(photo(number)), Content_Type="image/jpeg")

    def stream(self, request, length: int | None, piece: bytes, pause: float = 0) -> None:
        request.send_response(200)
        if length:
            request.send_header("Content-Length", str(length))
        request.end_headers()
        sent = 0
        while not self.closing.wait(pause) and (length is None or sent < length):
            request.wfile.write(piece)
            sent += len(piece)

    def flood(self, request) -> None:
        request.send_response(200)
        for number in range(99):
            request.send_header(f"X-{number}", "x" * 60_000)
        request.end_headers()

    def drip_headers(self, request) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not self.closing.wait(0.1):
            request.wfile.write(b"x")


class HubServer(Server):
    """One dataset, `owner/captions`, with one commit.

    `corrupt` answers have a flipped byte; `failing` has, for a part of a path, the statuses that come first.
    """

    REPO = "owner/captions"
    COMMIT = "e6c521268541ec449e3d367ad0912f2bf7dadd48"

    def __init__(self, folder: Path) -> None:
        self.files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        self.corrupt = 0
        self.failing: dict[str, list[int]] = {}
        self.retry_after = "0"
        self.commits = [self.COMMIT]
        super().__init__()

    def answer(self, request) -> None:
        path = request.path.split("?")[0].lstrip("/")
        commit, asked = self.commits[-1], f"{request.command} /{path}"
        failures = next((statuses for part, statuses in self.failing.items() if part in asked and statuses), [])
        if failures:
            self.send(request, failures.pop(0), Retry_After=self.retry_after)
        elif path.startswith("api/datasets/owner/gated"):
            self.send(request, 403, X_Error_Code="GatedRepo")
        elif not (path.startswith(f"api/datasets/{self.REPO}/") or path.startswith(f"datasets/{self.REPO}/resolve/")):
            self.send(request, 404, X_Error_Code="RepoNotFound")
        elif not any(f"/{known}" in path for known in ["main", *self.commits]):
            self.send(request, 404, X_Error_Code="RevisionNotFound")
        elif "/revision/" in path:
            if not path.endswith("main"):
                commit = path.rsplit("/", 1)[1]
            siblings = [{"rfilename": name} for name in self.files]
            self.json(request, {"id": self.REPO, "sha": commit, "siblings": siblings, "private": False, "tags": []})
        elif "/tree/" in path:
            self.json(request, [self.entry(name) for name in self.files])
        else:
            name = path.split("/resolve/")[1].split("/", 1)[1]
            commit = path.split("/resolve/")[1].split("/", 1)[0].replace("main", commit)
            body = self.files[name]
            headers = {
                "X_Repo_Commit": commit,
                "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
                "Accept_Ranges": "bytes",
            }
            if request.command == "GET" and self.corrupt:
                self.corrupt -= 1
                body = body[:100] + bytes([body[100] ^ 1]) + body[101:]
            self.send(request, 200, body, **headers)

    def entry(self, name: str) -> dict:
        body = self.files[name]
        lfs = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
        return {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest(), "lfs": lfs}

    def json(self, request, answer: object) -> None:
        self.send(request, 200, json.dumps(answer).encode(), Content_Type="application/json")


GOOD = 40  # images of the test dataset that nothing is wrong with
HOSTILE = {  # the others of its rows, and what becomes of them
    "404/a": "http_404",
    "500/a": "http_500",
    "slow": "timeout",
    "drip": "deadline",
    "endless": "too_large",
    "headers": "too_large",
    "unfinished": "incomplete",
    "to/ok": "ok",
    "to/file": "bad_scheme",
    "to/loop": "too_many_redirects",
    "optout/noai": "opt_out",
    "exif6.jpg": "ok",
    "gray16.png": "ok",
    "alpha.png": "ok",
    "cmyk.jpg": "ok",
    "palette.png": "ok",
    "animated.gif": "ok",
    "wide.png": "ok",
    "tiny.jpg": "too_small",
    "thread.png": "too_small",
    "truncated.jpg": "broken_image",
    "page.html": "not_an_image",
    "packed.jpg": "not_an_image",
    "empty.jpg": "empty",
    "bomb.png": "too_many_pixels",
}


def captions_table(url: str) -> pa.Table:
    """The rows of the test dataset: good and hostile ones, and six that must be dropped."""
    paths = [f"ok/{number}.jpg" for number in range(GOOD)] + list(HOSTILE)
    rows = [(f"{url}/{path}", f"a red circle on blue background {number}", 6.0) for number, path in enumerate(paths)]
    rows += [(None, "a", 6.0), ("ftp://127.0.0.1/a.jpg", "a", 6.0), ("data:image/png;base64,AAAA", "a", 6.0)]
    rows += [(f"{url}/skipped/1.jpg", None, 6.0), (f"{url}/skipped/2.jpg", "a", 5.0), (rows[0][0], "again", 6.0)]
    names = ["url", "generated_caption", "AESTHETIC_SCORE"]
    return pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def data_command(folder: Path, *flags: str, allow_private: bool = True) -> list[str]:
    """The command line of a small run of data.py into `folder`."""
    small = "--image_size 64 --processes_count 1 --timeout 2 --deadline 4 --retries 0".split()
    home = ["--allow_private_addresses"] if allow_private else []
    return [sys.executable, str(ROOT / "data.py"), "--output_dir", str(folder), *small, *home, *map(str, flags)]


@functools.cache
def data_launcher() -> Launcher:
    """One for all tests of this process."""
    launcher = Launcher("data")
    atexit.register(launcher.close)
    return launcher


def finish_data(*line: object, before: str = "", environment: dict | None = None) -> subprocess.CompletedProcess[str]:
    """Run data.py with this command line to its end, or Python code that knows it instead."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"out": f"{folder}/out", "before": before, **os.environ, **(environment or {})}
        return data_launcher().finish(line, Path(folder) / "log", **settings)


def run_data(folder: Path, *flags: str, allow_private: bool = True, environment: dict | None = None):
    """A small run of data.py into `folder`, to its end."""
    _, _, *line = data_command(folder, *flags, allow_private=allow_private)
    return finish_data(*line, environment=environment)


@pytest.fixture(scope="session")
def image_server() -> Iterator[ImageServer]:
    server = ImageServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def hub_server(image_server, tmp_path_factory) -> Iterator[HubServer]:
    folder = tmp_path_factory.mktemp("repository")
    (folder / "data").mkdir()
    table = captions_table(image_server.url)
    pq.write_table(table.slice(0, 30), folder / "data" / "part-0.parquet")
    pq.write_table(table.slice(30), folder / "data" / "part-1.parquet")
    (folder / "captions.faiss").write_bytes(b"8 GB")
    server = HubServer(folder)
    yield server
    server.close()


@pytest.fixture(scope="session")
def data_folder(image_server, hub_server, tmp_path_factory) -> SimpleNamespace:
    """One whole run, from the Hub to shards of 64x64 images: `path`, the process `done`, and how to run it again."""
    folder = tmp_path_factory.mktemp("data_script")
    environment = {"HF_ENDPOINT": hub_server.url, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "0"}
    flags = ("--dataset_name", hub_server.REPO, "--filter", "AESTHETIC_SCORE>5", "--number_sample_per_shard", "20")
    image_server.agents.clear()
    done = run_data(folder / "images", *flags, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    command = (folder / "images", *flags)
    agents = set(image_server.agents)
    return SimpleNamespace(path=folder / "images", done=done, command=command, environment=environment, agents=agents)
