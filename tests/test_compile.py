"""`--compile`: the same features, gradients and files, and compiled only once."""

import functools
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from diffusers import DiffusionPipeline, UNet2DConditionModel
from helpers import UNET_CONFIG, train, unet_weights, watched
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import distill_training as dt

# Four levels with one attention: inductor needs a minute and a half for these, and many more for whole nets.
LIGHT = {
    **UNET_CONFIG,
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D"),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
}
# What halves inductor's time: a graph is one file of plain loops, translated without optimising, instead of dozens.
QUICK = {
    "cpp_wrapper": True,
    "cpp_cache_precompile_headers": False,
    "cpp.simdlen": 1,
    "aot_inductor.debug_compile": True,
    "compile_threads": 1,  # its pool of processes does not outlive a test runner's
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.skipif(
    shutil.which((os.environ.get("CXX") or "g++").split()[0]) is None,
    reason="inductor needs a C++ compiler on a CPU; without one the next test counts the graphs of a whole run",
)
def test_compiled_nets_give_the_same_features_and_gradients() -> None:
    """With inductor; the hooks are in the graphs, and the second step compiles nothing anew."""
    torch.manual_seed(0)
    teacher, student = UNet2DConditionModel(**LIGHT).requires_grad_(False), UNet2DConditionModel(**LIGHT)
    names = [f"down_blocks.{i}" for i in range(4)] + [f"up_blocks.{i}" for i in range(4)]
    taps = [dt.FeatureTap(net, names) for net in (teacher, student)]
    steps = [(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 16, 16)) for _ in range(2)]

    def run(loss: Any) -> list[torch.Tensor]:
        seen = []
        for inputs in steps:
            student.zero_grad()
            with torch.no_grad():
                prediction = teacher(*inputs, return_dict=False)[0]
            mine = student(*inputs, return_dict=False)[0]
            features = [tap.pop() for tap in taps]
            weights = {"output_weight": 0.5, "feature_weight": 0.5}
            losses = loss(mine, prediction, inputs[0], features[1], features[0], **weights)
            losses["loss"].backward()
            seen += [*features[0], *features[1], losses["feature_losses"], *(p.grad for p in student.parameters())]
        return [tensor.detach().clone() for tensor in seen]

    eager = run(dt.distillation_loss)
    counter = CompileCounterWithBackend("inductor")
    for net in (teacher, student):
        net.compile(dynamic=False, backend=counter)
    with torch._inductor.config.patch(QUICK):
        compiled = run(torch.compile(dt.distillation_loss, dynamic=False, backend=counter))
    assert counter.frame_count == 3  # teacher, student and loss
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_run_compiles_in_its_first_step_only(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole `--compile` run, traced but not translated, so that no compiler is needed."""
    counter, frames, step = CompileCounter(), [], dt.training_step

    def count(*args: Any) -> Any:
        result = step(*args)
        frames.append(counter.frame_count)
        return result

    settings = {"max_train_steps": 4, "gradient_accumulation_steps": 2, "cache_latents": True, "use_ema": True}
    settings |= {"validation_prompts": ["a red circle"], "validation_steps": 2, "checkpointing_steps": 2}
    settings |= {"distill_level": "sd_tiny"}
    train(teacher, shards, tmp_path / "eager", **settings)
    with monkeypatch.context() as patch:
        for compiler in ("CC", "CXX"):
            patch.setenv(compiler, sys.executable)
        patch.setattr(dt, "training_step", count)
        patch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=counter))
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
        train(teacher, shards, tmp_path / "compiled", compile=True, **settings)
    assert frames == [4] * 8  # VAE encoder before the first step; teacher, student and loss in it
    eager, compiled = (unet_weights(tmp_path / name / "checkpoint-4" / "unet") for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()  # clean names
    start = dt.build_student(UNet2DConditionModel.from_pretrained(teacher, subfolder="unet"), "sd_tiny").state_dict()
    moved = sum((eager[name] - start[name]).abs().sum() for name in eager)
    apart = sum((eager[name] - compiled[name]).abs().sum() for name in eager)
    assert apart < 0.01 * moved
    assert DiffusionPipeline.from_pretrained(tmp_path / "compiled").unet.config.layers_per_block == 1


def test_what_is_compiled_and_what_is_timed(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What `main` asks for, and when; nothing is really compiled. The clock says that the first step took long."""
    asked: list[tuple[str, int, dict[str, Any]]] = []
    seconds, step = [0.0], dt.training_step

    def compile_net(net: torch.nn.Module, **options: Any) -> None:
        asked.append((type(net).__name__, sum(len(module._forward_hooks) for module in net.modules()), options))

    def compile_function(function: Callable, **options: Any) -> Callable:
        asked.append((function.__name__, 0, options))
        return function

    def slow_step(run: dt.Distillation, batch: dict[str, torch.Tensor], micro_batch: int) -> Any:
        seconds[0] += 1 if micro_batch else 100
        return step(run, batch, micro_batch)

    for compiler in ("CC", "CXX"):
        monkeypatch.setenv(compiler, sys.executable)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_net)
    monkeypatch.setattr(torch, "compile", compile_function)
    monkeypatch.setattr(dt, "training_step", slow_step)
    monkeypatch.setattr(dt, "time", SimpleNamespace(perf_counter=lambda: seconds[0], monotonic=time.monotonic))
    train(teacher, shards, tmp_path / "out", distill_level="sd_tiny", compile=True, max_train_steps=4)
    fixed, taps = {"dynamic": False}, len(dt.DISTILL_LEVELS["sd_tiny"].feature_pairs)
    nets = [("UNet2DConditionModel", taps, fixed)] * 2  # student and teacher, hooks in place
    assert asked == [("Encoder", 0, fixed), *nets, ("distillation_loss", 0, fixed)]
    assert "Steps per second = 1.000" in caplog.text
    assert re.search(r"Peak memory = \d+\.\d\d GiB of the host's memory", caplog.text)


@pytest.mark.parametrize(("precision", "last"), [("bf16", True), ("no", False)])
def test_channels_last_on_a_cpu_in_bf16_only(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, precision: str, last: bool
) -> None:
    """On a GPU, where it goes by --compile: `test_step.py`."""

    def formats(run: dt.Distillation) -> set[bool]:
        weights = [net.conv_in.weight for net in (run.unet, run.teacher_unet, run.vae.encoder)]
        return {weight.is_contiguous(memory_format=torch.channels_last) for weight in weights}

    with watched(monkeypatch, formats) as found:
        train(teacher, shards, tmp_path / "out", distill_level="sd_tiny", max_train_steps=1, mixed_precision=precision)
    assert found == [{last}]


def test_8bit_adam_finds_the_student_as_it_leaves_it(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes makes weights contiguous in its first step; its 8 bits need a GPU and do not matter here."""
    (tmp_path / "bitsandbytes.py").write_text("import torch\nclass optim:\n    AdamW8bit = torch.optim.AdamW\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes")  # undone in this order: nothing is left of it
    monkeypatch.setattr(dt, "use_channels_last", lambda *_, **__: True)

    def contiguous(run: dt.Distillation) -> tuple[bool, bool]:
        return run.unet.conv_in.weight.is_contiguous(), run.teacher_unet.conv_in.weight.is_contiguous()

    with watched(monkeypatch, contiguous) as formats:
        train(teacher, shards, tmp_path / "out", distill_level="sd_tiny", max_train_steps=1, use_8bit_adam=True)
    assert formats == [(True, False)]


def test_hooks_after_the_first_call_would_be_ignored() -> None:
    """Why the taps are registered before: a compiled net does not look for new hooks."""
    net = UNet2DConditionModel(**LIGHT)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 16, 16)
    net.compile(dynamic=False, backend="eager")
    with torch.no_grad():
        net(*inputs)
        late = dt.FeatureTap(net, ["down_blocks.1"])
        net(*inputs)
    with pytest.raises(RuntimeError, match="No output was captured from down_blocks.1"):
        late.pop()
