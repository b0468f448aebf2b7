"""Steps in fp16, steps that are skipped, and when the host hears of them; on CUDA what only CUDA can reach.

fp16 needs a GPU, but its loss scaler does not: here it is put into runs in float32, where a scale that is huge
overflows just as well.
"""

import copy
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from helpers import (
    UNET_CONFIG,
    assert_equal,
    assert_same_checkpoint,
    assert_same_nested,
    data_args,
    dataset_of,
    flags,
    new_run,
    scalars,
    train,
    unet_weights,
    watched,
)
from launcher import Launcher

import distill_training as dt

SETTINGS: dict[str, Any] = {"resolution": 32, "distill_level": "sd_tiny", "lr_warmup_steps": 0}
SETTINGS |= {"proportion_empty_prompts": 0}
HUGE = 2.0**127  # gradients overflow
BACK = {"backoff_factor": 2.0**-20}  # and after one step they do not
STUCK = {"backoff_factor": 0.999}  # nor is a way down found in a few steps


ON_GPU = [  # marks of a test that only CUDA can reach
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA reaches this: `pytest -m gpu` with a GPU"),
]


def on_gpu(test: Callable) -> Callable:
    """Mark a test that only CUDA can reach."""
    for mark in ON_GPU:
        test = mark(test)
    return test


def scaling(**options: Any) -> type[Accelerator]:
    """accelerate in float32, with fp16's loss scaler."""

    class ScalingAccelerator(Accelerator):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.scaler = torch.amp.GradScaler("cpu", **options)

    return ScalingAccelerator


def batch_of_latents(size: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    latents = {"latent_mean": torch.randn(size, 4, 8, 8, generator=generator).half()}
    ids = torch.randint(2, 20, (size, 16), generator=generator)
    return latents | {"latent_std": latents["latent_mean"].abs(), "input_ids": ids}


def take_step(run: dt.Distillation, wait: bool = True) -> list[int]:
    """One micro-batch, and an optimiser step where it is time; the bad steps that are read after it."""
    _, grad_norm = dt.training_step(run, batch_of_latents(), run.state.samples_seen // 2)
    run.state.samples_seen += 2
    if grad_norm is None:
        return []
    run.state.global_step += 1
    return list(run.health.read(run.state, wait))


def everything(run: dt.Distillation) -> dict[str, Any]:
    """Student, average and the optimiser's memory, with its count of steps."""
    found: dict[str, Any] = {"unet": run.unet.state_dict(), "optimizer": run.optimizer.optimizer.state_dict()["state"]}
    if run.ema_unet is not None:
        found |= {"average": list(run.ema_unet.shadow_params), "average's steps": run.ema_unet.optimization_step}
    return copy.deepcopy(found)


def counts(state: dt.RunState) -> tuple[int, int, int]:
    """(sound, skipped, skipped by the loss scaler), which are all steps there were."""
    assert state.global_step == state.sound_steps + state.skipped_steps + state.scaler_skips
    return state.sound_steps, state.skipped_steps, state.scaler_skips


def spoil_gradient(run: dt.Distillation) -> None:
    """One gradient of the next micro-batch is infinite; its loss is not."""

    def once(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return gradient * float("inf")

    handle = next(run.unet.parameters()).register_hook(once)


def spoil_loss(run: dt.Distillation) -> None:
    """The next micro-batch's loss is infinite; its gradients are not."""
    loss_function = run.loss_function

    def once(*args: Any, **weights: Any) -> dict[str, torch.Tensor]:
        run.loss_function = loss_function
        losses = loss_function(*args, **weights)
        return losses | {"loss": losses["loss"] + float("inf")}

    run.loss_function = once


# --- the loss scaler ------------------------------------------------------------------------------------------


def test_an_overflow_is_the_loss_scalers(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It takes nothing but a step of the schedule, and is counted apart from steps that are not finite."""
    monkeypatch.setattr(dt, "Accelerator", scaling(init_scale=HUGE, backoff_factor=2.0**-2))
    settings = {**SETTINGS, "use_ema": True, "lr_scheduler": "linear", "report_to": "tensorboard"}
    settings |= {"checkpointing_steps": 8, "max_train_steps": 8}
    with watched(monkeypatch, lambda run: (everything(run), run.accelerator.scaler.get_scale())) as seen:
        train(teacher, shards, tmp_path / "out", **settings)
    logged = scalars(tmp_path / "out")
    skipped = [step for step, norm in logged["grad_norm"].items() if not -1e30 < norm < 1e30]
    assert skipped == list(range(1, len(skipped) + 1)) and 1 <= len(skipped) < 6
    for step in range(1, 8):  # states and scales before this step, and before the next
        (before, scale), (after, next_scale) = seen[step - 1], seen[step]
        if step in skipped:
            if step > 1:  # before the first the optimiser remembers nothing
                assert_same_nested(before, after)
            assert_same_nested(before["unet"], after["unet"])
            assert_same_nested(before["average"], after["average"])
            assert all(memory["step"] == 0 for memory in after["optimizer"].values())
            assert before["average's steps"] == after["average's steps"] == 0
            assert next_scale == scale / 4
        else:
            assert after["average's steps"] == before["average's steps"] + 1 and next_scale == scale
            assert any(not torch.equal(tensor, before["unet"][name]) for name, tensor in after["unet"].items())
    checkpoint = tmp_path / "out" / "checkpoint-8"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    found = [state[name] for name in ("sound_steps", "skipped_steps", "scaler_skips", "bad_in_a_row")]
    assert found == [8 - len(skipped), 0, len(skipped), 0]
    assert torch.load(checkpoint / "scaler.pt", weights_only=True)["scale"] == HUGE / 4 ** len(skipped)
    assert f"Steps skipped = 0, and {len(skipped)} by the loss scaler" in caplog.text
    assert "is skipped" not in caplog.text
    assert [logged["lr"][step] for step in (1, 2, 8)] == pytest.approx([1e-3, 1e-3 * 7 / 8, 1e-3 / 8])
    assert (tmp_path / "out" / "model_index.json").is_file()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_are_unscaled_before_they_are_clipped(teacher: Path, accumulation: int) -> None:
    """With powers of two for scales: to the last bit."""
    found = []
    for scale in (None, 1.0, 2.0**16):
        make = Accelerator if scale is None else scaling(init_scale=scale)
        run = new_run(teacher, make(cpu=True, gradient_accumulation_steps=accumulation), max_grad_norm=0.01)
        norms = [dt.training_step(run, batch_of_latents(), number)[1] for number in range(3 * accumulation)]
        norms = [norm.item() for norm in norms if norm is not None]
        assert len(norms) == 3 and min(norms) > 0.1  # they are clipped
        found.append((norms, everything(run)))
    for norms, state in found[1:]:
        assert norms == found[0][0]
        assert_same_nested(state, found[0][1])


def test_counters_and_scale_go_on_after_resuming(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dt, "Accelerator", scaling(init_scale=HUGE, growth_interval=2, **BACK))
    settings = {**SETTINGS, "use_ema": True, "checkpointing_steps": 3}
    train(teacher, shards, tmp_path / "whole", **settings, max_train_steps=6)
    with monkeypatch.context() as patch:
        step = dt.training_step

        def interrupted(run: dt.Distillation, batch: Any, micro_batch: int) -> Any:
            if micro_batch == 3:
                raise KeyboardInterrupt
            return step(run, batch, micro_batch)

        patch.setattr(dt, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(teacher, shards, tmp_path / "parts", **settings, max_train_steps=6)
    state = json.loads((tmp_path / "parts" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [state[name] for name in ("sound_steps", "skipped_steps", "scaler_skips")] == [2, 0, 1]
    caplog.clear()
    train(teacher, shards, tmp_path / "parts", **settings, max_train_steps=6, resume_from_checkpoint="latest")
    assert "Steps skipped = 0, and 1 by the loss scaler" in caplog.text
    checkpoints = [tmp_path / name / "checkpoint-6" for name in ("whole", "parts")]
    assert_same_checkpoint(*checkpoints)
    scalers = [torch.load(path / "scaler.pt", weights_only=True) for path in checkpoints]
    assert scalers[0] == scalers[1]
    assert scalers[0]["scale"] == HUGE * 2.0**-20 * 2**2 and scalers[0]["_growth_tracker"] == 1  # 5 sound steps


def test_a_checkpoint_of_another_precision_starts_a_scaler_anew(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And a run that had a sound step once is worth saving, whatever became of the later ones."""
    train(teacher, shards, tmp_path / "out", **SETTINGS, max_train_steps=1, checkpointing_steps=1)
    (tmp_path / "out" / "model_index.json").unlink()
    before = unet_weights(tmp_path / "out" / "unet")
    monkeypatch.setattr(dt, "Accelerator", scaling(init_scale=HUGE, **STUCK))
    settings = {**SETTINGS, "max_train_steps": 3, "resume_from_checkpoint": "latest"}
    train(teacher, shards, tmp_path / "out", **settings)
    assert "Steps skipped = 0, and 2 by the loss scaler" in caplog.text
    assert_equal(before, unet_weights(tmp_path / "out" / "unet"))


PUT_SCALER_IN = f"""
import torch
class ScalingAccelerator(dt.Accelerator):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scaler = torch.amp.GradScaler("cpu", init_scale={HUGE}, **{STUCK})
dt.Accelerator = ScalingAccelerator
"""


def test_a_run_without_a_sound_step_saves_nothing(
    tmp_path: Path, teacher: Path, shards: Path, launcher: Launcher
) -> None:
    """Also one that was resumed in between."""
    output, settings = tmp_path / "out", {**SETTINGS, "checkpointing_steps": 2}
    line = flags(teacher, shards, output, **settings, max_train_steps=2)
    run = launcher.start(line, tmp_path / "1", before=PUT_SCALER_IN)
    assert run.wait() == [1], run.log()
    assert re.search(r"None of the 2 steps was sound \(2 .*skipped by the loss scaler\)", run.log().splitlines()[-1])
    settings |= {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    run = launcher.start(flags(teacher, shards, output, **settings), tmp_path / "2", before=PUT_SCALER_IN)
    assert run.wait() == [1], run.log()
    errors = [line for line in run.log().splitlines() if "error:" in line]
    assert errors == run.log().splitlines()[-1:] and "Traceback" not in run.log()
    assert re.search(r"None of the 3 steps was sound \(3 .*skipped by the loss scaler\)", errors[0])
    assert not [name for name in ("model_index.json", "unet", "README.md") if (output / name).exists()]
    state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    assert [state[name] for name in ("sound_steps", "skipped_steps", "scaler_skips")] == [0, 0, 2]


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize(("scale", "bad"), [(0.25, True), (2.0**10, False)])
def test_below_a_scale_of_one_an_overflow_is_a_bad_step(teacher: Path, scale: float, bad: bool, wait: bool) -> None:
    """A gradient that is infinite without being scaled up has no way down."""
    run = new_run(teacher, scaling(init_scale=scale)(cpu=True), use_ema=True)
    take_step(run)
    before = everything(run)
    spoil_gradient(run)
    found = take_step(run, wait)
    assert_same_nested(everything(run), before)
    found += take_step(run)
    assert found == ([2] if bad else [])
    assert counts(run.state) == ((2, 1, 0) if bad else (2, 0, 1)) and run.accelerator.scaler.get_scale() == scale / 2


def test_a_scale_counts_as_it_was_in_its_step(teacher: Path) -> None:
    """However late it is read, so that a resumed run counts as one that was never interrupted."""
    for wait in (False, True):
        run = new_run(teacher, scaling(init_scale=2.0)(cpu=True))
        for _ in range(3):  # at scales of 2, 1 and one half
            spoil_gradient(run)
            take_step(run, wait)
        take_step(run)
        assert counts(run.state) == (1, 1, 2), f"wait={wait}"


# --- steps that are skipped -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("spoiled", [0, 1])
def test_one_bad_micro_batch_is_enough(teacher: Path, spoiled: int, scaler: bool) -> None:
    """An infinite loss whose gradients are finite, in the first or the second half of a step."""
    make = scaling(init_scale=2.0**10) if scaler else Accelerator
    run = new_run(teacher, make(cpu=True, gradient_accumulation_steps=2), use_ema=True)
    assert take_step(run) + take_step(run) == []
    before = everything(run)
    found = []
    for half in range(2):
        if half == spoiled:
            spoil_loss(run)
        found += take_step(run)
    assert found == [2] and counts(run.state) == (1, 1, 0) and run.state.bad_in_a_row == 1
    assert_same_nested(everything(run), before)
    assert take_step(run) + take_step(run) == []  # it is forgotten with its step
    assert counts(run.state) == (2, 1, 0) and run.state.bad_in_a_row == 0


@pytest.fixture
def optimizer_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether AdamW is fused."""
    make_optimizer = dt.make_optimizer

    def not_fused(*args: Any) -> torch.optim.Optimizer:
        optimizer = make_optimizer(*args)
        settings = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
        return torch.optim.AdamW(optimizer.param_groups[0]["params"], **settings, fused=False)

    if not request.param:
        monkeypatch.setattr(dt, "make_optimizer", not_fused)
    return request.param


@pytest.mark.parametrize("spoil", [spoil_gradient, spoil_loss])
@pytest.mark.parametrize("optimizer_kind", [True, False], indirect=True, ids=["fused", "not-fused"])
def test_a_skipped_step_leaves_the_optimizer_as_it_was(
    teacher: Path, optimizer_kind: bool, spoil: Callable[[dt.Distillation], None]
) -> None:
    """Its moments and its count of steps; and the first step that is taken is as if there had been none before."""
    run, untouched = new_run(teacher, use_ema=True), new_run(teacher, use_ema=True)
    assert bool(run.optimizer.optimizer.param_groups[0]["fused"]) == optimizer_kind
    start = copy.deepcopy(run.unet.state_dict())
    spoil(run)
    assert take_step(run) == [1]
    assert_same_nested(run.unet.state_dict(), start)
    assert not any(tensor.any() for memory in everything(run)["optimizer"].values() for tensor in memory.values())
    for number in range(3):
        before = everything(run)
        if number == 1:
            spoil(run)
            assert take_step(run) == [3]
            assert_same_nested(everything(run), before)
        assert take_step(run) == []
        steps = {memory["step"].item() for memory in everything(run)["optimizer"].values()}
        assert steps == {number + 1} and run.ema_unet.optimization_step == number + 1
    assert counts(run.state) == (3, 2, 0)
    # Beside a run that was never spoiled, on the same micro-batches.
    for micro_batch in (1, 3, 4):
        dt.training_step(untouched, batch_of_latents(), micro_batch)
    assert_same_nested(everything(run), everything(untouched))


# --- when the host hears of it --------------------------------------------------------------------------------


def test_health_is_read_one_step_late_and_at_once_when_told_to_wait(teacher: Path) -> None:
    run = new_run(teacher)
    assert take_step(run, wait=False) == [] and run.state.sound_steps == 0
    spoil_loss(run)
    assert take_step(run, wait=False) == [] and (run.state.sound_steps, run.state.skipped_steps) == (1, 0)
    assert not run.health.bad
    assert take_step(run, wait=False) == [2] and (run.state.sound_steps, run.state.skipped_steps) == (1, 1)
    assert run.health.bad and run.state.bad_in_a_row == 1
    spoil_loss(run)
    assert take_step(run, wait=True) == [4]  # step 3 before it
    assert counts(run.state) == (2, 2, 0) and run.state.bad_in_a_row == 1
    assert list(run.health.read(run.state, wait=True)) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_read_one_step_late(teacher: Path, number: signal.Signals) -> None:
    run = new_run(teacher)
    take_step(run, wait=False)
    run.health.received = number
    take_step(run, wait=False)
    assert run.health.stop_signal == 0
    take_step(run, wait=False)
    assert run.health.stop_signal == number
    other = new_run(teacher)
    other.health.received = number
    take_step(other, wait=True)
    assert other.health.stop_signal == number


@pytest.mark.parametrize(
    ("settings", "stopped"),
    [
        ({}, 4),
        ({"checkpointing_steps": 3}, 3),
        ({"checkpointing_steps": 4}, 4),
        ({"validation_prompts": ["a"], "validation_steps": 3}, 3),
        ({"max_train_steps": 3}, 3),
    ],
    ids=["nothing-due", "checkpoint-due", "checkpoint-due-later", "validation-due", "last-step"],
)
def test_too_many_bad_steps_end_a_run_at_most_one_step_late(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, stopped: int
) -> None:
    """At once where the step saves, validates or ends the run; the sentence names the step that was bad."""

    def spoil_third(run: dt.Distillation) -> dt.Distillation:
        if len(seen) == 2:
            spoil_loss(run)
        return run

    monkeypatch.setattr(dt, "validate", lambda *_: None)
    settings = {**SETTINGS, "max_train_steps": 9, "max_bad_steps": 0, **settings}
    with watched(monkeypatch, spoil_third) as seen, pytest.raises(dt.TrainingError, match="^Stopped at step 3, "):
        train(teacher, shards, tmp_path / "out", **settings)
    assert len(seen) == stopped
    saved = [path.name for path in dt.list_checkpoints(tmp_path / "out")]
    assert saved == []  # not what a step that is not finite may have left


# --- on CUDA alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_an_offloaded_average_is_the_same(device: str) -> None:
    """Bit for bit, while the student changes as soon as `join` lets it; on CUDA by way of a stream of its own."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET_CONFIG).to(device)
    kept, offloaded = (dt.StudentEMA(unet, 0.99, offload) for offload in (False, True))
    assert (offloaded.stream is not None) == (device == "cuda")
    with torch.no_grad():
        for step in range(30):
            for average in (kept, offloaded):
                average.join()
            for parameter in unet.parameters():
                parameter.add_(torch.randn_like(parameter))
            skipped = torch.tensor(float(step % 7 == 3), device=device)
            for average in (kept, offloaded):
                average.update(unet.parameters(), skipped)
    offloaded.join()
    if device == "cuda":
        torch.cuda.synchronize()
        assert all(shadow.is_pinned() for shadow in offloaded.shadow_params)
    assert kept.optimization_step == offloaded.optimization_step == 26
    start = next(UNet2DConditionModel(**UNET_CONFIG).parameters())
    assert not torch.equal(offloaded.shadow_params[0], start)
    for one, other in zip(kept.shadow_params, offloaded.shadow_params, strict=True):
        assert one.device.type == device and other.device.type == "cpu"
        assert torch.equal(one.cpu(), other)


@on_gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_in_pinned_memory(teacher: Path, shards: Path, workers: int) -> None:
    args = data_args(teacher, train_data_dir=shards, dataloader_num_workers=workers)
    batches = dt.make_dataloader(dataset_of(args), args, Accelerator(), 0)
    for _ in range(3):
        assert all(tensor.is_pinned() for tensor in next(batches).values())
    batches.close()


@on_gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_channels_last_only_when_compiled(teacher: Path, compiled: bool) -> None:
    """The nets lie in memory as they are run, and the first step gives what contiguous ones in float32 give."""
    run = new_run(teacher, Accelerator(mixed_precision="bf16"), encodes=True, compile=compiled)
    for model in (run.accelerator.unwrap_model(run.unet, keep_torch_compile=False), run.teacher_unet, run.vae):
        weights = [tensor for tensor in model.parameters() if tensor.ndim == 4 and min(tensor.shape[1:]) > 1]
        assert weights
        for weight in weights:
            assert weight.is_contiguous(memory_format=torch.channels_last) == compiled
            assert weight.is_contiguous() != compiled
    terms = [dt.training_step(run, batch_of_latents(), 0)[0] for _ in range(2)][0]
    plain = new_run(teacher, Accelerator(mixed_precision="bf16"), encodes=True)
    expected, _ = dt.training_step(plain, batch_of_latents(), 0)
    torch.testing.assert_close(terms, expected, rtol=0.05, atol=0.01)


@on_gpu
def test_the_vae_goes_to_the_host_and_back(teacher: Path) -> None:
    """With latents from shards it is on the device only while images are made."""
    run = new_run(teacher, Accelerator())
    assert run.vae.device.type == "cpu" and run.teacher_unet.device.type == run.text_encoder.device.type == "cuda"
    with dt.vae_at_hand(run):
        assert run.vae.device.type == "cuda"
    assert run.vae.device.type == "cpu"
    run.args.validation_prompts = ["a red circle"]
    assert len(dt.make_teacher_images(run)) == 1 and run.vae.device.type == "cpu"
    assert new_run(teacher, Accelerator(), encodes=True).vae.device.type == "cuda"


@on_gpu
def test_a_run_in_fp16(tmp_path: Path, teacher: Path, shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the scaler that accelerate makes."""
    settings = {**SETTINGS, "mixed_precision": "fp16", "use_ema": True, "checkpointing_steps": 30}
    train(teacher, shards, tmp_path / "out", **settings, max_train_steps=30)
    state = json.loads((tmp_path / "out" / "checkpoint-30" / "trainer_state.json").read_text())
    assert state["sound_steps"] >= 10 and state["sound_steps"] + state["scaler_skips"] == 30
    assert state["skipped_steps"] == 0 and "is skipped" not in caplog.text
    scaler = torch.load(tmp_path / "out" / "checkpoint-30" / "scaler.pt", weights_only=True)
    assert scaler["scale"] == 65536.0 / 2 ** state["scaler_skips"]


@on_gpu
def test_an_optimizer_step_does_not_wait_for_the_device(teacher: Path) -> None:
    run = new_run(teacher, Accelerator(), use_ema=True, offload_ema=True)
    assert run.optimizer.optimizer.param_groups[0]["fused"]
    for number in range(6):
        for parameter in run.unet.parameters():
            parameter.grad = torch.randn_like(parameter)
        run.window_loss = torch.ones((), device="cuda") * (float("nan") if number == 4 else 1.0)
        torch.cuda.set_sync_debug_mode("error" if number >= 3 else "default")  # once everything is allocated
        try:
            dt.optimizer_step(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        run.state.global_step += 1
    assert list(run.health.read(run.state, wait=True)) == [5] and counts(run.state) == (5, 1, 0)
    assert run.ema_unet.optimization_step == 5
