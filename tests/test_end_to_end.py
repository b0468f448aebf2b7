"""From captions on a hub to images, shards and training, over real HTTP on 127.0.0.1."""

import base64
import json
import os
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import datasets
import torch
from accelerate import Accelerator
from helpers import QUICK_STREAMS, ROOT, make_tokenizer, run_script, toy_images, write_shards
from servers import HubServer, Server

import distill_training as dt


def training_flags(teacher: Path, output: Path) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(teacher), "--output_dir", str(output), "--resolution", "64"),
        *("--train_batch_size", "2", "--max_train_steps", "2", "--seed", "5", "--report_to", "none"),
        *("--proportion_empty_prompts", "0"),  # which captions are empty depends on where they are read from
        *("--fidelity_samples", "0"),
    ]


def test_what_data_py_fetches_trains_as_it_is(
    tmp_path: Path,
    teacher: Path,
    data_folder: SimpleNamespace,
) -> None:
    args = dt.parse_args([*training_flags(teacher, tmp_path / "out"), "--train_data_dir", str(data_folder.path)])
    dataset = dt.make_train_dataset(args, make_tokenizer(), Accelerator(cpu=True))
    shards = json.loads((data_folder.path / "manifest.json").read_text())["shards"]
    assert len(dataset) == sum(shard["count"] for shard in shards) >= 40
    walked = tmp_path / "walked"  # the same shards without their manifest
    walked.mkdir()
    for shard in shards:
        (walked / shard["name"]).symlink_to(data_folder.path / shard["name"])
    assert list(dt.data.ShardFolder(walked, "text")) == list(dataset.rows)
    for example in dataset:
        assert example["counts"].sum() == 0  # nothing broken, nothing too small
    dt.main(args)
    assert (tmp_path / "out" / "model_index.json").exists()


class RangedHub(HubServer):
    """The stand-in for the hub, with what streaming asks for: parts of files, and 404 for those that are not there."""

    def answer(self, request) -> None:
        name = request.path.split("?")[0].partition("/resolve/")[2].partition("/")[2]
        if request.path.split("?")[0] == f"/api/datasets/{self.REPO}":
            request.path += "/revision/main"
        folder = urllib.parse.unquote(request.path.split("?")[0]).partition("/tree/")[2].partition("/")[2]
        if "/tree/" in request.path and folder in ("", "data"):
            directory = [{"type": "directory", "path": "data", "oid": "0" * 40, "size": 0}] if not folder else []
            self.json(request, directory + [self.entry(file) for file in self.files])
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        if name and name not in self.files:
            self.send(request, 404, X_Error_Code="EntryNotFound")
        elif name and wanted:
            body = self.files[name]
            first, last = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
            self.send(request, 206, body[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(body)}")
        else:
            super().answer(request)


STREAM = f"""
import sys
{QUICK_STREAMS}
sys.path[:0] = sys.argv[1:3]
import torch
from accelerate import Accelerator
from helpers import make_tokenizer
import distill_training as dt
args = dt.parse_args(sys.argv[4:])
stream = iter(dt.make_train_dataset(args, make_tokenizer(), Accelerator(cpu=True)))
torch.save(dt.collate_fn([next(stream) for _ in range(12)]), sys.argv[3])
dt.main(dt.parse_args(sys.argv[4:]))
"""


def test_a_stream_from_the_hub_gives_the_same_batch_and_trains(tmp_path: Path, teacher: Path) -> None:
    images = toy_images(12)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for part, rows in enumerate((images[:6], images[6:])):
        columns = {"image": [{"bytes": data, "path": None} for data, _ in rows], "text": [text for _, text in rows]}
        path = tmp_path / "repository" / "data" / f"train-0000{part}-of-00002.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    hub = RangedHub(tmp_path / "repository")
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    flags = [*training_flags(teacher, tmp_path / "out"), "--dataset_name", HubServer.REPO, "--streaming"]
    try:
        line = [sys.executable, "-c", STREAM, str(ROOT), str(ROOT / "tests"), str(tmp_path / "batch.pt"), *flags]
        done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    finally:
        hub.close()
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model_index.json").exists()
    shards = write_shards(tmp_path / "shards", images)
    args = dt.parse_args([*training_flags(teacher, tmp_path / "unused"), "--train_data_dir", str(shards)])
    dataset = dt.make_train_dataset(args, make_tokenizer(), Accelerator(cpu=True))
    streamed, local = torch.load(tmp_path / "batch.pt"), dt.collate_fn([dataset[i] for i in range(12)])
    for key in ("pixel_values", "input_ids", "counts"):
        assert torch.equal(streamed[key], local[key]), key


class UploadHub(Server):
    """Takes a new model repository and one commit, which `files` then holds: path to contents."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        super().__init__()
        self.server.RequestHandlerClass.do_POST = self.server.RequestHandlerClass.do_GET

    def answer(self, request) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.tokens.add(request.headers.get("Authorization", ""))
        answer: dict = {"id": "me/small", "sha": "0" * 40, "siblings": [], "private": False, "tags": []}
        if request.path == "/api/repos/create":
            answer = {"url": f"{self.url}/me/small", "name": "me/small"}
        elif request.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in request.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        elif "/commit/" in request.path:
            lines = [json.loads(line)["value"] for line in body.splitlines() if json.loads(line)["key"] == "file"]
            self.files = {line["path"]: base64.b64decode(line["content"]) for line in lines}
            answer = {"commitUrl": f"{self.url}/me/small/commit/{'1' * 40}", "commitOid": "1" * 40}
        self.send(request, 200, json.dumps(answer).encode(), Content_Type="application/json")


def test_the_result_is_pushed_without_checkpoints_or_secrets(tmp_path: Path, teacher: Path, shards: Path) -> None:
    hub = UploadHub()
    output = tmp_path / "out [1]"
    (output / "photos").mkdir(parents=True)
    for name in (".env", "photos/a.txt"):
        (output / name).write_text("the user's own")
    flags = [*training_flags(teacher, output), "--train_data_dir", str(shards), "--checkpointing_steps", "1"]
    flags += ["--push_to_hub", "--hub_model_id", "me/small", "--hub_token", "hf_secret", "--validation_prompts", "a"]
    flags += ["--export", "single_file", "fp16"]
    flags[flags.index("none")] = "tensorboard"
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    try:
        done = run_script(*flags, **environment)
    finally:
        hub.close()
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Bearer hf_secret" in hub.tokens
    parts = ("unet/", "vae/", "text_encoder/", "tokenizer/", "scheduler/")
    kept = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    single = {"README.md", "val_imgs_grid.png", "model_index.json", "out [1].safetensors"}
    assert set(hub.files) == single | {path for path in kept if path.startswith(parts)}
    assert {".env", "photos/a.txt", "args.json", "checkpoint-1/optimizer.bin"} <= kept
    assert not any(str(tmp_path).encode() in data for data in hub.files.values())
    assert {"README.md", "model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= set(hub.files)
    assert {"unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"} <= set(hub.files)
    assert hub.files["README.md"].startswith(b"---\n") and b"# me/small" in hub.files["README.md"]
    assert not any(b"hf_secret" in data for data in hub.files.values()) and "hf_secret" not in done.stderr
