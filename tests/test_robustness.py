"""Broken data, broken numbers, files that must not be trusted, and what must not grow."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers import (
    assert_equal,
    flags,
    make_pipeline,
    scalars,
    toy_images,
    train,
    unet_weights,
    write_imagefolder,
    write_shards,
    write_tar,
)
from launcher import Launcher
from PIL import Image
from safetensors.torch import load_file, save_file

import distill_training as dt

SETTINGS: dict[str, Any] = {"resolution": 32, "distill_level": "sd_tiny"}


# ----------------------------------------------------------------------------------------------------------------
# Data.


def encoded(kind: str) -> bytes:
    image = Image.open(io.BytesIO(toy_images(1, size=(48, 40))[0][0]))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def broken_images() -> dict[str, bytes]:
    """Ten ways in which an image file is broken."""
    jpeg, png, webp = encoded("JPEG"), encoded("PNG"), encoded("WEBP")
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return {
        "empty": b"",
        "zeros": bytes(1000),
        "cut jpeg": jpeg[: len(jpeg) // 2],
        "cut png": png[: len(png) // 2],
        "cut webp": webp[: len(webp) // 2],
        "page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><circle r="9"/></svg>',
        "checksum": png[:29] + bytes(4) + png[33:],
        "magic": b"\x00NG\r" + png[4:],
        "bomb": b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b""),
    }


@pytest.mark.parametrize("way", broken_images())
def test_each_of_the_ten_is_broken(way: str) -> None:
    with pytest.raises(Exception) as error:
        dt.data.decode_image(broken_images()[way])
    assert error.value is not None


def hundred_samples() -> list[tuple[bytes, str]]:
    samples = toy_images(100, size=(48, 40))
    for number, data in enumerate(broken_images().values()):
        samples[10 * number + number] = (data, samples[0][1])
    for number, caption in enumerate(("", "   ", "\n\t")):
        samples[30 * number + 5] = (samples[5][0], caption)
    return samples


def replaced(log: str) -> list[int]:
    """With a broken image, with an empty caption, that could not be read."""
    (line,) = re.findall(r"Samples replaced = (.*)", log)
    return [int(number) for number in re.findall(r"\d+", line)]


def test_a_tenth_of_the_data_is_broken(tmp_path: Path, teacher: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = hundred_samples()
    sources = {
        "shards": write_shards(tmp_path / "data", samples, per_shard=30),
        "imagefolder": write_imagefolder(tmp_path / "folder", samples),
    }
    settings = {**SETTINGS, "train_batch_size": 20, "max_train_steps": 5, "cache_dir": tmp_path / "cache"}
    counted = {}
    for name, data in sources.items():
        caplog.clear()
        workers = 2 if name == "imagefolder" else 0
        train(teacher, data, tmp_path / name, **settings, dataloader_num_workers=workers)
        counted[name] = replaced(caplog.text)
    broken, empty, unreadable = counted["shards"]
    # An epoch meets each of them, and now and then one in the place of another.
    assert 10 <= broken <= 15 and 3 <= empty <= 5 and unreadable == 0
    assert counted["imagefolder"] == counted["shards"]
    assert_equal(*(unet_weights(tmp_path / name / "unet") for name in sources))


def test_only_one_of_two_ranks_meets_broken_data(tmp_path: Path, teacher: Path, launcher: Launcher) -> None:
    samples = toy_images(40, size=(48, 40))
    batches = iter(dt.SeededBatches(len(samples), 2, seed=11, rank=1, processes=2))
    hit = [row for _ in range(3) for _, row in next(batches)]  # what rank 1 gets in the first three steps
    ways = list(broken_images().values())
    for number, row in enumerate(hit):
        samples[row] = (ways[number], "a") if number % 2 else (samples[row][0], " ")
    data = write_shards(tmp_path / "data", samples)
    line = flags(teacher, data, tmp_path / "out", **SETTINGS, max_train_steps=4)
    run = launcher.start(line, tmp_path / "log", ranks=2)
    assert run.wait() == [0, 0], run.log() + run.log(1)
    broken, empty, unreadable = replaced(run.log())
    assert 3 <= broken <= 6 and 3 <= empty <= 6 and unreadable == 0


def during_step(
    monkeypatch: pytest.MonkeyPatch, action: Callable[[dt.Distillation, dict[str, torch.Tensor], int], None]
) -> None:
    """Call `action` with what a step is given, right before it."""
    step = dt.training_step

    def act(run: dt.Distillation, batch: dict[str, torch.Tensor], micro_batch: int) -> Any:
        action(run, batch, micro_batch)
        return step(run, batch, micro_batch)

    monkeypatch.setattr(dt, "training_step", act)


def test_a_shard_vanishes_in_mid_run(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_shards(tmp_path / "data", toy_images(16), per_shard=4)
    during_step(monkeypatch, lambda _run, _batch, micro: (data / "00002.tar").unlink(True) if micro == 1 else None)
    train(teacher, data, tmp_path / "out", **SETTINGS, max_train_steps=8)
    assert caplog.text.count("can no longer be read") == 1
    broken, empty, unreadable = replaced(caplog.text)
    assert broken == empty == 0 and unreadable >= 2
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_images_of_a_folder_vanish_in_mid_run(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_imagefolder(tmp_path / "data", toy_images(8))

    def remove(_run: Any, _batch: Any, micro_batch: int) -> None:
        for path in sorted(data.glob("*.png"))[:4] if micro_batch == 0 else []:
            path.unlink()

    during_step(monkeypatch, remove)
    train(teacher, data, tmp_path / "out", **SETTINGS, max_train_steps=5, cache_dir=tmp_path / "cache")
    assert caplog.text.count("can no longer be read") == 1
    broken, empty, unreadable = replaced(caplog.text)
    assert broken == empty == 0 and unreadable >= 2


def test_all_data_vanishes(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_shards(tmp_path / "data", toy_images(8), per_shard=4)
    during_step(monkeypatch, lambda _run, _batch, micro: shutil.rmtree(data) if micro == 1 else None)
    settings = {"max_train_steps": 9, "checkpointing_steps": 1, "dataloader_num_workers": 0}
    with pytest.raises(dt.UserError, match="^None of the 8 training samples can be used: .* 8 that could not be read"):
        train(teacher, data, tmp_path / "out", **SETTINGS, **settings)
    assert [path.name for path in dt.list_checkpoints(tmp_path / "out")] == ["checkpoint-1", "checkpoint-2"]


def test_captions_of_another_type_count_as_empty(
    tmp_path: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, _ = toy_images(1)[0]
    captions: list[Any] = ["a red circle", 5, None, {"en": "a"}, [], ["", " "], [7, "b"]]
    samples = [{"png": data, "json": json.dumps({"caption": caption}).encode()} for caption in captions]
    samples += [{"png": data, "json": b"[1]"}, {"png": data, "json": b"not json"}]
    write_tar(tmp_path / "data" / "0.tar", samples)
    train(teacher, tmp_path / "data", tmp_path / "out", **SETTINGS, train_batch_size=3, max_train_steps=3)
    broken, empty, unreadable = replaced(caplog.text)
    assert broken == unreadable == 0 and empty >= 7  # all but the first and the list that holds a "b"


# ----------------------------------------------------------------------------------------------------------------
# Numbers.


def state_of(run: dt.Distillation) -> dict[str, torch.Tensor]:
    """Student, average and the optimiser's memory."""
    found = {f"unet.{name}": tensor.clone() for name, tensor in run.unet.state_dict().items()}
    if run.ema_unet is not None:
        found |= {f"ema.{index}": tensor.clone() for index, tensor in enumerate(run.ema_unet.shadow_params)}
        found["ema steps"] = torch.tensor(run.ema_unet.optimization_step)
    for index, values in run.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": torch.as_tensor(value).clone() for name, value in values.items()}
    return found


def poison(run: dt.Distillation, batch: dict[str, torch.Tensor], how: str) -> None:
    if how == "nan in the batch":
        batch["pixel_values"][0, 0, 0, 0] = float("nan")
    else:  # the loss is finite, one gradient is not

        def once(gradient: torch.Tensor) -> torch.Tensor:
            handle.remove()
            return gradient * float("inf")

        handle = next(run.unet.parameters()).register_hook(once)


@pytest.mark.parametrize("how", ["nan in the batch", "infinite gradient"])
def test_a_step_that_is_not_finite_is_skipped(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    before: list[dict[str, torch.Tensor]] = []

    def watch(run: dt.Distillation, batch: dict[str, torch.Tensor], micro_batch: int) -> None:
        if micro_batch % 2 == 0:
            before.append(state_of(run))
        if micro_batch == 4:  # the first half of step 3
            poison(run, batch, how)

    during_step(monkeypatch, watch)
    settings = {**SETTINGS, "gradient_accumulation_steps": 2, "use_ema": True, "checkpointing_steps": 5}
    settings |= {"lr_scheduler": "linear", "lr_warmup_steps": 0, "report_to": "tensorboard", "train_batch_size": 1}
    train(teacher, shards, tmp_path / "out", **settings, max_train_steps=5)
    assert_equal(before[2], before[3])  # step 3 changed nothing
    for step in (2, 4):
        assert any(not torch.equal(before[step - 1][name], before[step][name]) for name in before[step - 1])
    warned = [record.getMessage() for record in caplog.records if "Step 3 is skipped" in record.getMessage()]
    named = "task_loss is nan" if how == "nan in the batch" else "grad_norm is"
    assert len(warned) == 1 and named in warned[0] and caplog.text.count("is skipped") == 1
    assert ("task_loss" in warned[0]) == (how == "nan in the batch")
    assert "Steps skipped = 1" in caplog.text
    logged = scalars(tmp_path / "out")
    assert set(logged["lr"]) == {1, 2, 3, 4, 5} and logged["lr"][4] == pytest.approx(1e-3 * 2 / 5)
    assert [step for step, value in logged["grad_norm"].items() if not -1e30 < value < 1e30] == [3]
    state = json.loads((tmp_path / "out" / "checkpoint-5" / "trainer_state.json").read_text())
    assert (state["skipped_steps"], state["bad_in_a_row"]) == (1, 0)


POISON_ONE_RANK = """
import hashlib, torch
step = dt.training_step
def poisoned(run, batch, micro_batch):
    if run.accelerator.process_index == 1 and micro_batch == 1:
        batch["pixel_values"][0, 0, 0, 0] = float("nan")
    result = step(run, batch, micro_batch)
    flat = torch.cat([parameter.detach().flatten() for parameter in run.unet.parameters()])
    print("WEIGHTS", hashlib.sha256(flat.numpy().tobytes()).hexdigest(), run.state.skipped_steps, flush=True)
    return result
dt.training_step = poisoned
"""


def test_a_bad_step_on_one_rank_is_skipped_on_both(
    tmp_path: Path, teacher: Path, shards: Path, launcher: Launcher
) -> None:
    line = flags(teacher, shards, tmp_path / "out", **SETTINGS, max_train_steps=4)
    run = launcher.start(line, tmp_path / "log", ranks=2, before=POISON_ONE_RANK)
    assert run.wait() == [0, 0], run.log() + run.log(1)
    steps = [re.findall(r"WEIGHTS (\w+) (\d+)", run.log(rank)) for rank in (0, 1)]
    # What is counted is that of the step before the last one, as it stood when this step began.
    assert steps[0] == steps[1] and [skipped for _, skipped in steps[0]] == ["0", "0", "0", "1"]
    weights = [digest for digest, _ in steps[0]]
    assert weights[0] == weights[1] != weights[2] != weights[3]
    assert "Step 2 is skipped" in run.log() and "Steps skipped = 1" in run.log()


def poison_from(monkeypatch: pytest.MonkeyPatch, first: int, more: Callable[[int], None] = lambda _: None) -> None:
    def act(run: dt.Distillation, batch: dict[str, torch.Tensor], micro_batch: int) -> None:
        if micro_batch >= first:
            poison(run, batch, "nan in the batch")
        more(micro_batch)

    during_step(monkeypatch, act)


@pytest.mark.parametrize(("limit", "last"), [(0, 4), (2, 6)])
def test_too_many_bad_steps_stop_the_run(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, limit: int, last: int
) -> None:
    poison_from(monkeypatch, 3)  # step 4 on
    output = tmp_path / "out"
    settings = {**SETTINGS, "checkpointing_steps": 1, "max_train_steps": 20, "max_bad_steps": limit}
    with pytest.raises(dt.TrainingError) as error:
        train(teacher, shards, output, **settings)
    message = str(error.value)
    assert f"at step {last}" in message and "task_loss is nan" in message and "\n" not in message
    # After checkpoint-3 comes a step that is bad: what it holds may be the cause.
    assert message.endswith(f"the last good checkpoint is {output / 'checkpoint-2'}.")
    assert [path.name for path in dt.list_checkpoints(output)] == [f"checkpoint-{step}" for step in (1, 2, 3)]
    assert not (output / "model_index.json").exists()


def test_the_script_ends_with_1_and_one_sentence(
    tmp_path: Path, teacher: Path, shards: Path, launcher: Launcher
) -> None:
    line = flags(teacher, shards, tmp_path / "out", **SETTINGS, max_train_steps=9, learning_rate=1e30, max_bad_steps=1)
    run = launcher.start(line, tmp_path / "log")
    assert run.wait() == [1], run.log()
    errors = [line for line in run.log().splitlines() if "error:" in line]
    assert len(errors) == 1 and "loss is" in errors[0] and "no good checkpoint" in errors[0]
    assert "Traceback" not in run.log()


def test_a_streak_goes_on_after_resuming(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    poison_from(monkeypatch, 1, lambda micro: os.kill(os.getpid(), signal.SIGTERM) if micro == 2 else None)
    with pytest.raises(SystemExit) as end:
        train(teacher, shards, output, **SETTINGS, max_train_steps=20, max_bad_steps=3)
    assert end.value.code == 143
    # The signal came before step 3, and acts one step later.
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    assert (state["bad_in_a_row"], state["skipped_steps"]) == (3, 3)
    settings = {**SETTINGS, "max_train_steps": 20, "max_bad_steps": 3, "resume_from_checkpoint": "latest"}
    with pytest.raises(dt.TrainingError, match="at step 5"):  # the fourth in a row
        train(teacher, shards, output, **settings)


# ----------------------------------------------------------------------------------------------------------------
# Models that teach nothing, or something else.


def edited(teacher: Path, target: Path, part: str, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(teacher, target)
    (file,) = (target / part).glob("*.safetensors")
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return target


def test_a_constant_feature_is_named_at_the_start(
    tmp_path: Path, teacher: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def silence(weights: dict[str, torch.Tensor]) -> None:
        for name in ("weight", "bias"):
            weights[f"down_blocks.0.downsamplers.0.conv.{name}"].zero_()

    train(teacher, shards, tmp_path / "sound", **SETTINGS, max_train_steps=1)
    assert "puts out a constant" not in caplog.text
    caplog.clear()
    silent = edited(teacher, tmp_path / "teacher", "unet", silence)
    train(silent, shards, tmp_path / "out", **SETTINGS, max_train_steps=1)
    messages = [record.getMessage() for record in caplog.records]
    warned = [number for number, message in enumerate(messages) if "puts out a constant" in message]
    assert warned and all("down_blocks.0" in messages[number] for number in warned)
    assert max(warned) < messages.index("[RANK 0] ***** Running training *****")


def test_a_teacher_that_is_not_finite_is_refused(tmp_path: Path, teacher: Path, shards: Path) -> None:
    def ruin(weights: dict[str, torch.Tensor]) -> None:
        weights["conv_in.weight"].view(-1)[3] = float("nan")

    ruined = edited(teacher, tmp_path / "teacher", "unet", ruin)
    with pytest.raises(dt.UserError, match="not finite"):
        train(ruined, shards, tmp_path / "out", **SETTINGS, max_train_steps=1)
    assert not (tmp_path / "out").exists()


def test_a_student_as_large_as_its_teacher_is_refused(tmp_path: Path, teacher: Path, shards: Path) -> None:
    with pytest.raises(dt.UserError, match="--student_model_name_or_path"):
        train(teacher, shards, tmp_path / "out", **SETTINGS, student_model_name_or_path=teacher, max_train_steps=1)
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------
# What must not be trusted, and what must not be told.


class Attack:
    """What runs code when it is unpickled carelessly."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


def to_bin(folder: Path, name: str) -> None:
    (file,) = folder.glob("*.safetensors")
    torch.save(load_file(file), folder / name)
    file.unlink()


@pytest.mark.parametrize("parts", [("unet",), ("vae",), ("text_encoder",), ("unet", "vae", "text_encoder")])
def test_weights_in_pickles_are_refused_with_the_way_out(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[str, ...]
) -> None:
    pickled = make_pipeline(tmp_path / "pickled")
    for part in parts:
        name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        to_bin(pickled / part, name)
    with pytest.raises(dt.UserError) as error:
        train(pickled, shards, tmp_path / "out", **SETTINGS, max_train_steps=1)
    message = str(error.value)
    assert "Only safetensors are read" in message and "\n" not in message
    assert not (tmp_path / "out").exists()
    (command,) = re.findall(r'python -c "(.*)"', message)
    monkeypatch.chdir(tmp_path)
    exec(command, {})  # what it says must work
    converted = tmp_path / "converted"
    assert not list(converted.rglob("*.bin"))
    original = diffusers.DiffusionPipeline.from_pretrained(pickled, use_safetensors=False if len(parts) == 3 else None)
    found = diffusers.DiffusionPipeline.from_pretrained(converted, use_safetensors=True)
    for part in ("unet", "vae", "text_encoder"):
        assert_equal(getattr(original, part).state_dict(), getattr(found, part).state_dict())


def test_a_pickle_beside_the_safetensors_is_not_read(tmp_path: Path, shards: Path) -> None:
    teacher = make_pipeline(tmp_path / "teacher")
    for part, name in (("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")):
        (teacher / part / name).write_bytes(pickle.dumps(Attack(tmp_path / "attacked")))
    train(teacher, shards, tmp_path / "out", **SETTINGS, max_train_steps=1)
    assert not (tmp_path / "attacked").exists()


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory, teacher: Path, shards: Path) -> Path:
    output = tmp_path_factory.mktemp("one-step") / "out"
    train(teacher, shards, output, **SETTINGS, max_train_steps=1, checkpointing_steps=1)
    return output


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("optimizer.bin", "torch"),
        ("optimizer.bin", "pickle"),
        ("scheduler.bin", "torch"),
        ("random_states_0.pkl", "torch"),
        ("random_states_0.pkl", "pickle"),
    ],
)
def test_an_evil_checkpoint_runs_nothing(
    tmp_path: Path, teacher: Path, shards: Path, one_step: Path, name: str, kind: str
) -> None:
    output, marker = tmp_path / "out", tmp_path / "attacked"
    checkpoint = Path(shutil.copytree(one_step / "checkpoint-1", output / "checkpoint-1"))
    if kind == "torch":
        torch.save({"state": Attack(marker)}, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(Attack(marker), protocol=2))
    settings = {**SETTINGS, "max_train_steps": 2, "resume_from_checkpoint": "latest"}
    if name == "random_states_0.pkl":  # accelerate does without it, as nothing here depends on it
        train(teacher, shards, output, **settings)
    else:
        with pytest.raises(dt.UserError, match="checkpoint-1 cannot be loaded") as error:
            train(teacher, shards, output, **settings)
        assert "\n" not in str(error.value)
    assert not marker.exists()


def test_the_attack_would_work(tmp_path: Path) -> None:
    torch.save({"state": Attack(tmp_path / "attacked")}, tmp_path / "evil.bin")
    torch.load(tmp_path / "evil.bin", weights_only=False)["state"].close()
    assert (tmp_path / "attacked").exists()


def test_tokens_are_told_to_no_one(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    settings = {**SETTINGS, "hub_token": "hf_of_the_flag", "report_to": "tensorboard", "checkpointing_steps": 1}
    train(teacher, shards, tmp_path / "out", **settings, max_train_steps=1)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 20
    said = "".join(capfd.readouterr()) + caplog.text
    for secret in ("hf_of_the_environment", "hf_of_the_flag"):
        assert not [path for path in files if secret.encode() in path.read_bytes()]
        assert secret not in said
    assert hashlib.sha256(b"hf_of_the_flag").hexdigest() not in (tmp_path / "out" / "args.json").read_text()


# ----------------------------------------------------------------------------------------------------------------
# Limits on the way.

WATCH = """
import gc, json, os
seen = []
step = dt.training_step
def watched(run, batch, micro_batch):
    result = step(run, batch, micro_batch)
    if micro_batch % 30 == 29:
        gc.collect()
        pages = int(open("/proc/self/statm").read().split()[1])
        seen.append([micro_batch + 1, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))])
        print("SEEN", json.dumps(seen), flush=True)
    return result
dt.training_step = watched
"""


def test_memory_and_handles_do_not_grow(tmp_path: Path, teacher: Path, shards: Path, launcher: Launcher) -> None:
    settings = {**SETTINGS, "resolution": 8, "train_batch_size": 1, "use_ema": True, "report_to": "tensorboard"}
    settings |= {"checkpointing_steps": 6, "checkpoints_total_limit": 2, "max_train_steps": 151}
    run = launcher.start(flags(teacher, shards, tmp_path / "out", **settings), tmp_path / "log", before=WATCH)
    assert run.wait(300) == [0], run.log()[-3000:]
    seen = json.loads(re.findall(r"SEEN (.*)", run.log())[-1])
    steps, mebibytes, handles = zip(*seen, strict=True)
    assert steps == tuple(range(30, 151, 30))
    assert mebibytes[-1] - mebibytes[1] < 8, mebibytes  # from step 60 to step 150; a checkpoint takes 2 MiB
    assert len(set(handles)) == 1, handles  # over 25 checkpoints
    assert run.log().count("Saved ") == 25
