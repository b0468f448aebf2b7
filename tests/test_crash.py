"""Kills, full disks and signals: what is lost, and whether what goes on is the same run.

`DISTILL_SD_KILLS=30 pytest tests/test_crash.py -k random_moments` kills 30 times, where a plain run of the tests does
it 4 times. All runs here are real processes (see launcher.py) with the same settings, so that one uninterrupted run
serves them all for comparison.
"""

import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from helpers import SCRIPT, assert_equal, assert_same_checkpoint, flags, train, unet_weights
from launcher import Launcher, Run
from safetensors.torch import load_file

import distill_training as dt

pytestmark = pytest.mark.xdist_group("crashes")  # one process for all, which share the undisturbed run
KILLS = int(os.environ.get("DISTILL_SD_KILLS", "4"))
STEPS = max(16, 3 * KILLS)
SETTINGS: dict[str, Any] = {
    "resolution": 32,
    "distill_level": "sd_tiny",
    "train_batch_size": 1,
    "random_flip": True,
    "use_ema": True,
}
PARTS = {
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "unet_ema/config.json", "unet_ema/diffusion_pytorch_model.safetensors",
    "optimizer.bin", "scheduler.bin", "random_states_0.pkl",
}  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, teacher: Path, shards: Path) -> Path:
    """A run that nothing disturbs, with a checkpoint after every step."""
    output = tmp_path_factory.mktemp("reference") / "out"
    train(teacher, shards, output, **SETTINGS, max_train_steps=STEPS, checkpointing_steps=1)
    return output


SOUND: set[bytes] = set()  # digests of files that were read before


def is_whole(checkpoint: Path) -> bool:
    """All its files are there and can be read to their end."""
    files = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if path.is_file()}
    assert files.keys() >= PARTS | {"trainer_state.json"}
    read = {".json": lambda path: json.loads(path.read_text()), ".safetensors": load_file}
    for path in files.values():
        digest = hashlib.sha256(path.suffix.encode() + path.read_bytes()).digest()
        if digest not in SOUND:
            read.get(path.suffix, functools.partial(torch.load, weights_only=False))(path)
        SOUND.add(digest)
    return True


def whole_checkpoints(output: Path) -> list[int]:
    """Steps of all that bears a checkpoint's name, each of which must be whole."""
    folders = list(output.glob("checkpoint-*"))
    for folder in folders:
        assert is_whole(folder), folder
    return sorted(int(folder.name.partition("-")[2]) for folder in folders)


def leftovers(output: Path) -> list[Path]:
    return sorted(path for path in output.glob(".*") if path.name != ".lock")


# ----------------------------------------------------------------------------------------------------------------
# SIGKILL.


def test_killed_at_random_moments(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    reference: Path,
    launcher: Launcher,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = random.Random(KILLS)
    output = tmp_path / "out"
    settings = {**SETTINGS, "checkpointing_steps": 1, "checkpoints_total_limit": 2, "resume_from_checkpoint": "latest"}
    line = flags(teacher, shards, output, **settings, max_train_steps=STEPS)
    inside = []
    for number in range(KILLS):
        began, kept = time.time_ns(), whole_checkpoints(output)

        def is_saving(began: int = began) -> bool:
            for path in [*output.glob(".checkpoint-*.partial"), *output.glob(".checkpoint-*.removed")]:
                try:
                    if path.stat().st_mtime_ns > began:
                        return True
                except FileNotFoundError:
                    continue
            return False

        run = launcher.start(line, tmp_path / f"log-{number}")
        for _ in range(rng.randint(0, 1)):  # perhaps not the first save
            run.wait_for(is_saving)
            run.wait_for(lambda: not is_saving())
        if 2 * sum(inside) <= number:
            run.wait_for(is_saving)
            time.sleep(rng.uniform(0, 0.1))
        else:
            time.sleep(rng.uniform(0, 2))
        run.kill()
        assert run.wait() == [-signal.SIGKILL], run.log()
        inside.append(is_saving())
        found = whole_checkpoints(output)
        assert not kept or found and found[-1] >= kept[-1]
        for step in found:
            name = f"checkpoint-{step}"
            assert_equal(unet_weights(output / name / "unet"), unet_weights(reference / name / "unet"))
    with capsys.disabled():
        print(f"\n{KILLS} kills, {sum(inside)} of them inside a save; {max([0, *found])} of {STEPS} steps were saved")
    assert sum(inside) >= math.ceil(KILLS / 3)
    run = launcher.start(line, tmp_path / "log-last")
    assert run.wait(600) == [0], run.log()
    assert whole_checkpoints(output) == [STEPS - 1, STEPS] and not leftovers(output)
    assert_same_checkpoint(output / f"checkpoint-{STEPS}", reference / f"checkpoint-{STEPS}")
    assert_equal(unet_weights(output / "unet"), unet_weights(reference / "unet"))


def test_a_folder_belongs_to_one_run_at_a_time(
    tmp_path: Path, teacher: Path, shards: Path, launcher: Launcher
) -> None:
    """A second run is refused while the first lives, and no longer, though a killed one's workers outlive it."""
    output = tmp_path / "out"
    settings = {**SETTINGS, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    line = flags(teacher, shards, output, **settings, dataloader_num_workers=2, max_train_steps=100_000)
    run = launcher.start(line, tmp_path / "log")
    run.wait_for(lambda: "Saved " in run.log())
    with pytest.raises(dt.UserError, match=f"{output} is in use by another run"):
        train(teacher, shards, output, **settings, max_train_steps=whole_checkpoints(output)[-1] + 100)
    saved = run.log().count("Saved ")
    run.wait_for(lambda: run.log().count("Saved ") > saved)
    assert "could not be saved" not in run.log()
    run.kill()
    run.wait()
    assert not run.group_is_gone()
    step = whole_checkpoints(output)[-1]
    train(teacher, shards, output, **settings, max_train_steps=step + 1)
    assert whole_checkpoints(output)[-1] == step + 1


def test_all_ranks_say_that_a_folder_is_taken(tmp_path: Path, teacher: Path, shards: Path, launcher: Launcher) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with FileLock(output / ".lock"):
        run = launcher.start(flags(teacher, shards, output, **SETTINGS, max_train_steps=1), tmp_path / "log", ranks=2)
        assert run.wait() == [2, 2], run.log() + run.log(1)
    for rank in (0, 1):
        assert f"{output} is in use by another run (it holds {output}/.lock)" in run.log(rank)
        assert "Traceback" not in run.log(rank)
    assert [path.name for path in output.iterdir()] == [".lock"]


@pytest.mark.parametrize("resumes", [False, True])
def test_ranks_with_disks_of_their_own_are_refused(
    tmp_path: Path, teacher: Path, shards: Path, reference: Path, launcher: Launcher, resumes: bool
) -> None:
    """As on two machines: each would write its part of a checkpoint to a folder that the other one never sees."""
    for rank in (0, 1):
        (tmp_path / f"disk-{rank}").mkdir()
    settings = {**SETTINGS, "max_train_steps": 2, "checkpointing_steps": 1, "cache_latents": True}
    if resumes:
        shutil.copytree(reference / "checkpoint-1", tmp_path / "disk-0" / "out" / "checkpoint-1")
        settings |= {"resume_from_checkpoint": "latest", "allow_changed_settings": True}
    before = sorted(tmp_path.glob("disk-*/**/*"))
    line = flags(teacher, shards, Path("out"), **settings)
    own_disk = "import os; os.chdir(f\"{os.environ['DISK']}-{os.environ['RANK']}\"); dt.SHARED_DISK_SECONDS = 1"
    run = launcher.start(line, tmp_path / "log", ranks=2, before=own_disk, DISK=tmp_path / "disk")
    assert run.wait() == [2, 2], run.log() + run.log(1)
    for rank in (0, 1):
        errors = [line for line in run.log(rank).splitlines() if "error:" in line]
        assert len(errors) == 1 and "--output_dir out is not on a disk that all machines share" in errors[0]
        assert "Traceback" not in run.log(rank)
    out = tmp_path / "disk-0" / "out"
    assert set(tmp_path.glob("disk-*/**/*")) - {*before, out, out / ".lock"} == set()  # the lock stays, as always
    assert not (tmp_path / "disk-1" / "out").exists()


@pytest.mark.parametrize("resumes", [False, True])
def test_what_came_in_between_is_kept(
    tmp_path: Path, teacher: Path, shards: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, resumes: bool
) -> None:
    """Another run ends, or saves for the last time, while this one still loads its models."""
    output, load = tmp_path / "out", dt.load_components
    settings = {**SETTINGS, "max_train_steps": STEPS} | ({"resume_from_checkpoint": "latest"} if resumes else {})
    if resumes:
        shutil.copytree(reference / "checkpoint-1", output / "checkpoint-1")

    def load_slowly(*args: object) -> object:
        if resumes:
            shutil.copytree(reference / "checkpoint-2", output / "checkpoint-2")
        else:
            output.mkdir()
            (output / "model_index.json").write_text("{}")
        return load(*args)

    monkeypatch.setattr(dt, "load_components", load_slowly)
    with pytest.raises(dt.UserError, match=f"Another run has written to --output_dir {output} since this one began"):
        train(teacher, shards, output, **settings)
    assert {path.name for path in output.iterdir()} - {".lock"} == (
        {"checkpoint-1", "checkpoint-2"} if resumes else {"model_index.json"}
    )


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    train(teacher, shards, tmp_path / "out", **SETTINGS, max_train_steps=1, cache_latents=True)
    assert caplog.text.count(f"cannot be locked ([Errno {number}]") == 2  # the folder, and the cache


# The save of step 3, in forks of the run that are killed right before one change of the file system each: the first
# fork before the first change, and so on, until one comes through. Each works on its own copy of the output folder.
KILLED_EVERYWHERE = """
import itertools, json, os, shutil, signal, sys
from pathlib import Path

save = dt.save_checkpoint
# Where the step was saved before, all is alike up to the renaming.
CHANGES = {
    "new": ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"),
    "again": ("os.rename", "os.remove", "os.rmdir"),
}

def kill_before(moment, changes):
    left = [moment]
    def count(event, arguments):
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes and "open" in changes or event != "open" and event in changes:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
    sys.addaudithook(count)

def fork_and_save(output, moment, changes, run):
    child = os.fork()
    if child == 0:
        run.args.output_dir = str(output)
        if moment is not None:
            kill_before(moment, changes)
        save(run)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def everywhere(run):
    if run.state.global_step < 3:
        return save(run)
    output, codes = Path(run.args.output_dir), {}
    for kind in ("new", "again"):
        codes[kind] = []
        for moment in itertools.count():
            copy = output.with_name(f"{kind}-{moment}")
            shutil.copytree(output, copy)
            left = copy / ".checkpoint-1.partial"  # of an earlier kill
            shutil.copytree(copy / "checkpoint-1", left)
            (left / "optimizer.bin").unlink()
            if kind == "again":  # the step was saved before the run went back to an earlier one
                shutil.copytree(copy / "checkpoint-2", copy / "checkpoint-3")
            codes[kind].append(fork_and_save(copy, moment, CHANGES[kind], run))
            if codes[kind][-1] == 0:
                break
            if moment % 8 == 0:  # what is left must not be in the next save's way
                shutil.copytree(copy, copy.with_name(f"{kind}-{moment}-saved"))
                assert fork_and_save(copy.with_name(f"{kind}-{moment}-saved"), None, (), run) == 0
    output.with_name("codes.json").write_text(json.dumps(codes))
    os._exit(0)

dt.save_checkpoint = everywhere
"""


def test_killed_before_every_change_of_the_file_system(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    reference: Path,
    launcher: Launcher,
) -> None:
    settings = {**SETTINGS, "checkpointing_steps": 1, "checkpoints_total_limit": 2, "max_train_steps": 3}
    run = launcher.start(
        flags(teacher, shards, tmp_path / "out", **settings), tmp_path / "log", before=KILLED_EVERYWHERE
    )
    assert run.wait(300) == [0], run.log()
    codes = json.loads((tmp_path / "codes.json").read_text())
    for kind, least in (("new", 20), ("again", 20)):
        assert codes[kind] == [-signal.SIGKILL] * (len(codes[kind]) - 1) + [0] and len(codes[kind]) > least
        latest = []
        for moment in range(len(codes[kind])):
            output = tmp_path / f"{kind}-{moment}"
            found = whole_checkpoints(output)
            latest.append(found[-1])
            assert dt.find_checkpoint(output, "latest") == output / f"checkpoint-{found[-1]}"
            assert found in ([1, 2], [1, 2, 3], [2, 3])
        assert set(latest) == {2, 3}
        if kind == "new":
            assert latest == sorted(latest)
        ends = [f"{kind}-{len(codes[kind]) - 1}", *(path.name for path in tmp_path.glob(f"{kind}-*-saved"))]
        assert len(ends) > 3
        for name in ends:
            assert whole_checkpoints(tmp_path / name) == [2, 3] and not leftovers(tmp_path / name)
            weights = [unet_weights(root / "checkpoint-3" / "unet") for root in (tmp_path / name, reference)]
            assert_equal(*weights)


# ----------------------------------------------------------------------------------------------------------------
# Damaged checkpoints, and what is left beside them.


@pytest.fixture
def three(tmp_path: Path, reference: Path) -> Path:
    """An output folder with the first three checkpoints."""
    for step in (1, 2, 3):
        shutil.copytree(reference / f"checkpoint-{step}", tmp_path / "three" / f"checkpoint-{step}")
    return tmp_path / "three"


def damage(checkpoint: Path, how: str) -> None:
    action, _, name = how.partition(" ")
    path = checkpoint / name
    if action == "without":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif action == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif action == "empty" and name:
        os.truncate(path, 0)
    else:
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()


@pytest.mark.parametrize("how", ["without trainer_state.json", "empty"])
def test_a_folder_without_its_state_is_no_checkpoint(three: Path, how: str) -> None:
    damage(three / "checkpoint-3", how)
    assert [path.name for path in dt.list_checkpoints(three)] == ["checkpoint-1", "checkpoint-2"]
    assert dt.find_checkpoint(three, "latest") == three / "checkpoint-2"
    with pytest.raises(FileNotFoundError, match="checkpoint-3 does not exist.* are: checkpoint-1, checkpoint-2"):
        dt.find_checkpoint(three, "checkpoint-3")
    before = sorted(three.rglob("*"))
    assert dt.prune_checkpoints(three, 2) == []  # it does not count for the limit
    assert sorted(three.rglob("*")) == before
    assert dt.prune_checkpoints(three, 1) == [three / "checkpoint-1"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("without optimizer.bin", "checkpoint-3 cannot be loaded: .*optimizer.bin"),
        ("without unet", "checkpoint-3 cannot be loaded: "),
        ("without unet_ema/config.json", "checkpoint-3 cannot be loaded: "),
        ("without unet_ema", "checkpoint-3 .*unet_ema"),
        ("cut optimizer.bin", "checkpoint-3 cannot be loaded: "),
        ("cut unet/diffusion_pytorch_model.safetensors", "checkpoint-3 cannot be loaded: "),
        ("cut trainer_state.json", "checkpoint-3/trainer_state.json cannot be read"),
        ("empty trainer_state.json", "checkpoint-3/trainer_state.json cannot be read"),
        ("empty scheduler.bin", "checkpoint-3 cannot be loaded: "),
    ],
)
def test_a_damaged_checkpoint_is_refused_when_it_is_loaded(
    teacher: Path, shards: Path, three: Path, how: str, message: str
) -> None:
    damage(three / "checkpoint-3", how)
    (three / ".lock").touch()  # it stays, as always
    before = {path: path.stat().st_mtime_ns for path in three.rglob("[!.]*")}
    with pytest.raises(dt.UserError, match=message) as error:
        train(teacher, shards, three, **SETTINGS, max_train_steps=4, resume_from_checkpoint="latest")
    assert "\n" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in three.rglob("[!.]*")} == before
    assert not leftovers(three)


def test_random_states_are_not_missed(teacher: Path, shards: Path, three: Path, reference: Path) -> None:
    """accelerate goes on without them, and nothing in a run is drawn from the global generators."""
    damage(three / "checkpoint-3", "without random_states_0.pkl")
    settings = {"max_train_steps": 4, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    train(teacher, shards, three, **SETTINGS, **settings)
    for name in ("unet", "unet_ema"):
        assert_equal(*(unet_weights(root / "checkpoint-4" / name) for root in (three, reference)))


def test_no_more_than_damaged_checkpoints_is_no_reason_to_start_over(
    teacher: Path, shards: Path, three: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 3):
        damage(three / f"checkpoint-{step}", "without trainer_state.json")
    with pytest.raises(SystemExit) as end:
        train(teacher, shards, three, **SETTINGS, max_train_steps=4, resume_from_checkpoint="latest")
    assert end.value.code == 2 and "which is no whole checkpoint" in capsys.readouterr().err


def test_what_kills_left_is_cleaned_up_and_nothing_else(
    tmp_path: Path, teacher: Path, shards: Path, three: Path, reference: Path
) -> None:
    shutil.rmtree(three / "checkpoint-3")
    ours = [".checkpoint-3.partial", ".checkpoint-1.removed", ".checkpoint-9.partial"]
    for name in ours[:2]:
        shutil.copytree(three / "checkpoint-1", three / name)
    (three / ours[2]).mkdir()  # killed before anything was in it
    (three / ".checkpoint-8.partial").mkdir()
    (three / ".checkpoint-8.partial" / "notes.txt").write_text("mine")
    (three / ".checkpoint-7.partial").write_text("a file")
    (three / ".checkpoint-6.removed").symlink_to(three / "checkpoint-1")
    for name in (".checkpoint-best.partial", ".checkpoint-5.partial.bak", "checkpoint-3.partial"):
        shutil.copytree(three / "checkpoint-1", three / name)
    strangers = {".checkpoint-8.partial", ".checkpoint-7.partial", ".checkpoint-6.removed"}
    strangers |= {".checkpoint-best.partial", ".checkpoint-5.partial.bak", "checkpoint-3.partial"}
    settings = {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "resume_from_checkpoint": "latest"}
    train(teacher, shards, three, **SETTINGS, max_train_steps=4, **settings)
    assert {path.name for path in three.iterdir() if "checkpoint" in path.name} == strangers | {
        "checkpoint-3", "checkpoint-4",
    }  # fmt: skip
    assert (three / ".checkpoint-8.partial" / "notes.txt").read_text() == "mine"
    for step in (3, 4):
        assert_same_checkpoint(three / f"checkpoint-{step}", reference / f"checkpoint-{step}")


def test_a_stranger_in_the_way_is_left_and_the_run_goes_on(tmp_path: Path, teacher: Path, shards: Path) -> None:
    output = tmp_path / "out"
    (output / ".checkpoint-1.partial").mkdir(parents=True)
    (output / ".checkpoint-1.partial" / "notes.txt").write_text("mine")
    train(teacher, shards, output, **SETTINGS, max_train_steps=2, checkpointing_steps=1)
    assert (output / ".checkpoint-1.partial" / "notes.txt").read_text() == "mine"
    assert whole_checkpoints(output)[-1] == 2 and (output / "model_index.json").is_file()


# ----------------------------------------------------------------------------------------------------------------
# Full disks.

# No room between the first checkpoint and the fourth: `DISK` is filled to the last byte, or else no file may grow.
FILL = """
import os, resource
from pathlib import Path

step = dt.training_step
first, last, disk = int(os.environ["FIRST"]), int(os.environ["LAST"]), os.environ.get("DISK")
here = os.environ.get("RANK", "0") == os.environ.get("FULL_RANK", "0")

def fill(run, batch, micro_batch):
    number = micro_batch + 1
    if here and number == first:
        if disk:
            with open(f"{disk}/filler", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]), -1))
    if here and number == last:
        print("WHILE FULL", *sorted(os.listdir(run.args.output_dir)), flush=True)
        if disk:
            os.unlink(f"{disk}/filler")
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    return step(run, batch, micro_batch)

dt.training_step = fill
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, dict[str, object]]]:
    """A folder, and what `FILL` needs to know to leave no room in it: a small file system where one can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounts = shutil.which("mount") and os.geteuid() == 0
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    if mounts and subprocess.run(command, capture_output=True).returncode == 0:
        yield folder, {"DISK": folder}
        subprocess.run(["umount", "-l", str(folder)], check=True)
    else:  # no rights to mount: files may then not grow beyond a limit
        yield folder, {"LIMIT": 60_000}


def test_a_full_disk_does_not_end_a_run(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    reference: Path,
    disk: tuple[Path, dict[str, object]],
    launcher: Launcher,
) -> None:
    folder, environment = disk
    output = folder / "out"
    # Long enough that the tracker, too, runs out of room.
    settings = {**SETTINGS, "max_train_steps": 12, "checkpointing_steps": 3, "report_to": "tensorboard"}
    settings["logging_steps"] = 1
    line = flags(teacher, shards, output, **settings)
    run = launcher.start(line, tmp_path / "log", before=FILL, FIRST=4, LAST=12, **environment)
    assert run.wait() == [0], run.log()
    log = run.log()
    assert log.count("could not be saved") == 2 and "Logging step" in log
    assert log.count("Traceback") == log.count("Exception in thread")  # the tracker's own thread says so in its way
    for step in (6, 9):
        assert f"checkpoint-{step} could not be saved" in log
    assert "No space left" in log or "File too large" in log
    assert f"the last good checkpoint is {output}/checkpoint-3" in log
    assert "WHILE FULL .lock args.json checkpoint-3 logs\n" in log  # nothing of the attempts is left
    assert whole_checkpoints(output) == [3, 12] and not leftovers(output)
    assert_same_checkpoint(output / "checkpoint-12", reference / "checkpoint-12")
    assert_equal(unet_weights(output / "unet"), unet_weights(reference / "checkpoint-12" / "unet_ema"))


def test_no_room_for_the_pipeline_names_the_last_checkpoint(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    disk: tuple[Path, dict[str, object]],
    launcher: Launcher,
) -> None:
    folder, environment = disk
    output = folder / "out"
    line = flags(teacher, shards, output, **SETTINGS, max_train_steps=3, checkpointing_steps=2)
    run = launcher.start(line, tmp_path / "log", before=FILL, FIRST=3, LAST=9, **environment)
    assert run.wait() == [1], run.log()
    errors = [line for line in run.log().splitlines() if "error:" in line]
    assert len(errors) == 1 and f"{output}/checkpoint-2" in errors[0] and "Traceback" not in run.log()
    assert not (output / "model_index.json").exists() and whole_checkpoints(output) == [2]


def test_a_full_disk_of_another_rank(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    launcher: Launcher,
) -> None:
    output = tmp_path / "out"
    line = flags(teacher, shards, output, **SETTINGS, max_train_steps=4, checkpointing_steps=1)
    run = launcher.start(
        line, tmp_path / "log", ranks=2, before=FILL, FIRST=2, LAST=4, FULL_RANK=1, LIMIT=9000
    )  # a rank's random state takes 14,000 bytes
    assert run.wait() == [0, 0], run.log() + run.log(1)
    log = run.log()
    assert log.count("could not be saved") == 2 and "Traceback" not in log + run.log(1)
    assert "WHILE FULL" in run.log(1) and " checkpoint-2" not in run.log(1)
    assert whole_checkpoints(output) == [1, 4] and not leftovers(output)
    for step in (1, 4):
        assert (output / f"checkpoint-{step}" / "random_states_1.pkl").stat().st_size > 9000


# ----------------------------------------------------------------------------------------------------------------
# Signals.


def stopped_after(run: Run, output: Path, name: str) -> int:
    """The step that a stopped run names, having checked what it says and leaves."""
    (step,) = whole_checkpoints(output)
    assert f"Stopped by {name}" in run.log() and f"{output}/checkpoint-{step}" in run.log()
    assert "--resume_from_checkpoint latest" in run.log()
    assert not leftovers(output) and not (output / "model_index.json").exists()
    for rank in range(len(run.pids)):
        assert "Traceback" not in run.log(rank), run.log(rank)
    return step


@pytest.mark.parametrize(
    ("number", "code", "whole_group"),
    [(signal.SIGTERM, 143, False), (signal.SIGINT, 130, True)],
    ids=["SIGTERM", "SIGINT-to-the-group"],
)
def test_a_signal_saves_and_the_run_goes_on(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    reference: Path,
    launcher: Launcher,
    number: signal.Signals,
    code: int,
    whole_group: bool,
) -> None:
    output = tmp_path / "out"
    settings = {**SETTINGS, "dataloader_num_workers": 2 if whole_group else 0}
    run = launcher.start(flags(teacher, shards, output, **settings, max_train_steps=5000), tmp_path / "log")
    run.wait_for(lambda: run.steps() >= 3)
    sent = time.monotonic()
    run.kill_group(number) if whole_group else run.kill(number)
    assert run.wait(60) == [code], run.log()
    assert time.monotonic() - sent < 30  # "within seconds", on a busy machine
    step = stopped_after(run, output, number.name)
    deadline = time.monotonic() + 20
    while not run.group_is_gone():  # no worker stays behind
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert 3 <= step <= STEPS - 2, "the machine was too slow to see the steps go by"
    resumed = {"max_train_steps": step + 2, "checkpointing_steps": step + 2, "resume_from_checkpoint": "latest"}
    train(teacher, shards, output, **{**settings, **resumed})
    assert_same_checkpoint(output / f"checkpoint-{step}", reference / f"checkpoint-{step}")
    assert_same_checkpoint(output / f"checkpoint-{step + 2}", reference / f"checkpoint-{step + 2}")


SLOW_SAVE = """
import time
save = dt.UNet2DConditionModel.save_pretrained
def slow(self, *args, **kwargs):
    print("SAVING", flush=True)
    time.sleep(90)
    return save(self, *args, **kwargs)
dt.UNet2DConditionModel.save_pretrained = slow
"""


def test_the_second_signal_stops_at_once(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    launcher: Launcher,
) -> None:
    output = tmp_path / "out"
    line = flags(teacher, shards, output, **SETTINGS, max_train_steps=5000)
    run = launcher.start(line, tmp_path / "log", before=SLOW_SAVE)
    run.wait_for(lambda: run.steps() >= 1)
    run.kill(signal.SIGINT)
    run.wait_for(lambda: "SAVING" in run.log())
    time.sleep(2)
    assert run.codes() == [None]
    run.kill(signal.SIGINT)
    assert run.wait(30) in ([-signal.SIGINT], [130])
    assert not whole_checkpoints(output)


def test_a_signal_to_one_rank_stops_both_and_they_go_on(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    launcher: Launcher,
) -> None:
    output = tmp_path / "out"
    settings = {**SETTINGS, "dataloader_num_workers": 1}
    line = flags(teacher, shards, output, **settings, max_train_steps=5000)
    run = launcher.start(line, tmp_path / "log", ranks=2)
    run.wait_for(lambda: run.steps() >= 2)
    run.kill(signal.SIGTERM, rank=1)
    assert run.wait(60) == [143, 143], run.log() + run.log(1)
    step = stopped_after(run, output, "SIGTERM")
    ranks = {path.name for path in (output / f"checkpoint-{step}").glob("random_states_*")}
    assert ranks == {"random_states_0.pkl", "random_states_1.pkl"}
    resumed = {"max_train_steps": step + 1, "resume_from_checkpoint": "latest"}
    again = launcher.start(flags(teacher, shards, output, **settings, **resumed), tmp_path / "again", ranks=2)
    assert again.wait() == [0, 0], again.log() + again.log(1)
    assert f"going on after {step}" in again.log()


def descendants(pid: int) -> list[int]:
    """A process and all that it started, and they started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found


def test_a_signal_to_all_processes_under_torchrun(tmp_path: Path, teacher: Path, shards: Path) -> None:
    """As Slurm and systemd send it: to the launcher, to both ranks and their workers. The launcher sends its ranks,
    which are in sessions of their own, another one, which must not count as the second signal that stops at once."""
    output, log = tmp_path / "out", tmp_path / "log"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    line = flags(teacher, shards, output, **SETTINGS, dataloader_num_workers=1, max_train_steps=5000)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    with open(log, "wb") as file:
        process = subprocess.Popen([*launch, *line], stdout=file, stderr=file, env=environment)
    started: list[int] = []
    try:
        deadline = time.monotonic() + 200
        while " 3/5000" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
        started = descendants(process.pid)
        assert len(started) >= 5  # the launcher, two ranks, a worker each
        for pid in started:
            os.kill(pid, signal.SIGTERM)
        assert process.wait(60) != 0
    finally:
        for pid in [process.pid] if process.poll() is None else []:
            for each in descendants(pid)[::-1]:
                os.kill(each, signal.SIGKILL)
    (step,) = whole_checkpoints(output)
    assert step >= 3 and not leftovers(output)
    assert "Stopped by SIGTERM" in log.read_text() and f"checkpoint-{step}" in log.read_text()
    ranks = {path.name for path in (output / f"checkpoint-{step}").glob("random_states_*")}
    assert ranks == {"random_states_0.pkl", "random_states_1.pkl"}


def test_a_signal_gives_up_the_validation_images(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    launcher: Launcher,
) -> None:
    output = tmp_path / "out"
    settings = {**SETTINGS, "output_weight": 0, "feature_weight": 0, "num_validation_images": 500}
    line = flags(
        teacher, shards, output, **settings, max_train_steps=9, validation_steps=2, validation_prompts=["a circle"]
    )
    not_at_the_start = "validate = dt.validate\n"
    not_at_the_start += "dt.validate = lambda run, *more: validate(run, *more) if run.state.global_step else None"
    run = launcher.start(line, tmp_path / "log", before=not_at_the_start)
    run.wait_for(lambda: "Validation at step 2: 500 images" in run.log())
    time.sleep(1)
    run.kill(signal.SIGTERM)
    assert run.wait(30) == [143], run.log()
    assert stopped_after(run, output, "SIGTERM") == 2  # it is heeded before the next step


@pytest.mark.parametrize("moment", ["between two prompts", "within a prompt", "within the teacher's images"])
def test_validation_images_are_given_up_in_order(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    reference: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    moment: str,
) -> None:
    """By an ordinary exception where the pipeline calls back, not at whatever line the signal comes."""
    prompts: list[str] = []
    steps: list[int] = []  # the prompt's number for each denoising step that came to its end
    ended: list[type[BaseException] | None] = []
    pipeline, denoise, generate = (
        dt.StableDiffusionPipeline.__call__, dt.DPMSolverMultistepScheduler.step, dt.generate_images,
    )  # fmt: skip
    # Two prompts each: the teacher's images, the student's at the start, and after step 2.
    last = {"between two prompts": 5, "within a prompt": 6, "within the teacher's images": 2}[moment]

    def count_prompts(self: Any, prompt: str, **settings: Any) -> Any:
        prompts.append(prompt)
        images = pipeline(self, prompt, **settings)
        if moment == "between two prompts" and len(prompts) == last:
            signal.raise_signal(signal.SIGTERM)
        return images

    def count_steps(*args: Any, **settings: Any) -> Any:
        if "within" in moment and len(prompts) == last and steps.count(last) == 9:
            signal.raise_signal(signal.SIGTERM)
        result = denoise(*args, **settings)
        steps.append(len(prompts))
        return result

    def watch(*args: Any) -> Any:
        try:
            images = generate(*args)
        except BaseException as error:
            ended.append(type(error))
            raise
        ended.append(None)
        return images

    monkeypatch.setattr(dt.StableDiffusionPipeline, "__call__", count_prompts)
    monkeypatch.setattr(dt.DPMSolverMultistepScheduler, "step", count_steps)
    monkeypatch.setattr(dt, "generate_images", watch)
    output = tmp_path / "out"
    settings = {"max_train_steps": 9, "validation_steps": 2, "validation_prompts": ["a circle", "a square"]}
    with pytest.raises(SystemExit) as end:
        train(teacher, shards, output, **SETTINGS, **settings)
    assert end.value.code == 143 and issubclass(dt.GivenUp, Exception)
    assert "Making validation images is given up" in caplog.text and "Stopped by SIGTERM" in caplog.text
    assert len(prompts) == last and steps.count(last) == (12 if moment == "between two prompts" else 10)
    (step,) = whole_checkpoints(output)
    if "teacher" in moment:  # those of the student are not begun
        assert ended == [dt.GivenUp] * 2 and step == 0
        assert not (output / "validation").exists()
    else:
        assert ended == [None, None, dt.GivenUp] and step == 2
        assert [path.name for path in (output / "validation").iterdir()] == ["step-0.png"]
    assert not leftovers(output) and not (output / "model_index.json").exists()
    # Nothing is lost by it: the student is itself again, and not the average that images are made with.
    if step:
        assert_same_checkpoint(output / f"checkpoint-{step}", reference / f"checkpoint-{step}")
