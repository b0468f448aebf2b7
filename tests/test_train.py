"""Whole runs at toy width: what is trained, logged, saved and resumed."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline, UNet2DConditionModel
from helpers import (
    SCRIPT,
    assert_equal,
    flags,
    make_pipeline,
    scalars,
    toy_images,
    train,
    unet_weights,
    watched,
    write_tar,
)
from launcher import Launcher
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

import distill_training as dt


@pytest.mark.parametrize(("precision", "prediction_type"), [("no", "epsilon"), ("bf16", "v_prediction")])
@pytest.mark.parametrize("level", dt.DISTILL_LEVELS)
def test_every_level_trains_and_loads(
    tmp_path: Path, shards: Path, level: str, precision: str, prediction_type: str
) -> None:
    teacher = make_pipeline(tmp_path / "teacher", prediction_type=prediction_type)
    output = tmp_path / "out"
    train(teacher, shards, output, distill_level=level, mixed_precision=precision, max_train_steps=2)
    pipeline = DiffusionPipeline.from_pretrained(output)  # plainly, as a user would
    assert all(part.dtype == torch.float32 for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder))
    assert pipeline.scheduler.config.prediction_type == prediction_type
    pruned = dt.build_student(UNet2DConditionModel.from_pretrained(teacher, subfolder="unet"), level)
    assert dt.count_parameters(pipeline.unet) == dt.count_parameters(pruned)
    moved = [
        not torch.equal(one, other) for one, other in zip(pipeline.unet.parameters(), pruned.parameters(), strict=True)
    ]
    assert sum(moved) > 0.9 * len(moved)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red circle", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)
    assert {path.name for path in output.iterdir()} == {
        ".lock", "README.md", "args.json", "model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae",
    }  # fmt: skip


def test_only_the_student_is_trained_and_kept(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    trained: list[dict[str, torch.Tensor]] = []
    save = dt.save_checkpoint

    def keep(run: dt.Distillation) -> Path | None:
        trained.append({name: tensor.clone() for name, tensor in run.unet.state_dict().items()})
        return save(run)

    monkeypatch.setattr(dt, "save_checkpoint", keep)
    with watched(monkeypatch) as runs:
        train(
            teacher, shards, output, distill_level="sd_small", max_train_steps=4, checkpointing_steps=2, use_ema=True
        )
    run = runs[0]
    original = DiffusionPipeline.from_pretrained(teacher)
    for mine, part in ((run.teacher_unet, "unet"), (run.vae, "vae"), (run.text_encoder, "text_encoder")):
        assert_equal(mine.state_dict(), getattr(original, part).state_dict())
        assert not mine.training and not any(parameter.requires_grad for parameter in mine.parameters())
        assert all(parameter.grad is None for parameter in mine.parameters())
    student = run.accelerator.unwrap_model(run.unet)
    optimised = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    assert optimised == {id(parameter) for parameter in student.parameters()}
    assert run.accelerator._models == [run.unet]
    checkpoints = {path.name: {part.name for part in path.iterdir()} for path in output.glob("checkpoint-*")}
    parts = {"unet", "unet_ema", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "trainer_state.json"}
    assert checkpoints == {"checkpoint-2": parts, "checkpoint-4": parts}
    loaded = UNet2DConditionModel.from_pretrained(output / "checkpoint-4", subfolder="unet")
    assert_equal(loaded.state_dict(), trained[1])
    assert_equal(unet_weights(output / "checkpoint-2" / "unet"), trained[0])
    assert loaded.config.layers_per_block == 1
    assert not any(torch.equal(tensor, other) for tensor, other in zip(
        unet_weights(output / "checkpoint-2" / "unet").values(),
        unet_weights(output / "checkpoint-4" / "unet").values(),
        strict=True,
    ))  # fmt: skip
    # The pipeline holds the average.
    averages = [unet_weights(output / f"checkpoint-{step}" / "unet_ema") for step in (2, 4)]
    assert_equal(unet_weights(output / "unet"), averages[1])
    with pytest.raises(AssertionError):
        assert_equal(averages[1], unet_weights(output / "checkpoint-4" / "unet"))


def test_ema_is_the_average_by_hand(tmp_path: Path, teacher: Path, shards: Path) -> None:
    output = tmp_path / "out"
    train(
        teacher,
        shards,
        output,
        max_train_steps=3,
        checkpointing_steps=1,
        use_ema=True,
        ema_decay=0.15,
        foreach_ema=True,
    )
    students = [unet_weights(output / f"checkpoint-{step}" / "unet") for step in (1, 2, 3)]
    for key, saved in unet_weights(output / "unet").items():
        average = students[0][key]  # the first update takes the student as it is
        for student in students[1:]:
            average = 0.15 * average + 0.85 * student[key]  # (1 + 1) / (10 + 1) is above 0.15 already
        torch.testing.assert_close(saved, average, rtol=1e-5, atol=1e-7)


class CountCopies(TorchDispatchMode):
    """How often one tensor is copied into another."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.copies += function is torch.ops.aten.copy_.default
        return function(*args, **(kwargs or {}))


def test_an_offloaded_average_is_the_same_by_way_of_a_copy(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, too, the average is copied to where the student is and back: a lost way back shows."""
    copies: list[float] = []
    update = dt.StudentEMA.update

    def count(ema: dt.StudentEMA, *args: Any) -> None:
        with CountCopies() as counter:
            update(ema, *args)
        copies.append(counter.copies / len(ema.shadow_params))

    monkeypatch.setattr(dt.StudentEMA, "update", count)
    settings = {"distill_level": "sd_tiny", "max_train_steps": 3, "checkpointing_steps": 1, "use_ema": True}
    train(teacher, shards, tmp_path / "plain", **settings)
    train(teacher, shards, tmp_path / "offloaded", **settings, offload_ema=True)
    assert copies == [0, 0, 0, 2, 2, 2]
    for part in ("checkpoint-1/unet_ema", "checkpoint-2/unet_ema", "checkpoint-3/unet_ema", "unet"):
        assert_equal(unet_weights(tmp_path / "plain" / part), unet_weights(tmp_path / "offloaded" / part))
    with pytest.raises(AssertionError):  # the average moves
        assert_equal(*(unet_weights(tmp_path / "plain" / f"checkpoint-{step}" / "unet_ema") for step in (2, 3)))


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path, teacher: Path, shards: Path) -> None:
    """With an offloaded average; test_resume.py has all else."""
    settings = {
        "distill_level": "sd_tiny", "checkpointing_steps": 2, "gradient_accumulation_steps": 2, "random_flip": True,
        "lr_scheduler": "cosine", "lr_warmup_steps": 1, "use_ema": True, "offload_ema": True,
        "report_to": "tensorboard", "proportion_empty_prompts": 0.3,
        "noise_offset": 0.1, "input_perturbation": 0.1, "num_train_epochs": 1,
    }  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(teacher, shards, whole, max_train_steps=5, **settings)
    train(teacher, shards, parts, max_train_steps=5, **settings)
    shutil.rmtree(parts / "checkpoint-4")
    for name in ("unet", "logs"):  # as if it had been stopped after step 3
        shutil.rmtree(parts / name)
    resumed = {"resume_from_checkpoint": "latest", "seed": None}
    train(teacher, shards, parts, max_train_steps=5, **settings, **resumed)
    assert_equal(unet_weights(whole / "unet"), unet_weights(parts / "unet"))
    for name in ("unet", "unet_ema"):
        assert_equal(*(unet_weights(folder / "checkpoint-4" / name) for folder in (whole, parts)))
    states = [torch.load(folder / "checkpoint-4" / "optimizer.bin")["state"] for folder in (whole, parts)]
    for one, other in zip(states[0].values(), states[1].values(), strict=True):
        assert_equal(one, other)
    uninterrupted, logged = scalars(whole), scalars(parts)
    assert set(logged["loss"]) == {3, 4, 5}
    for tag in logged:
        assert logged[tag] == {step: uninterrupted[tag][step] for step in (3, 4, 5)}, tag


def test_everything_is_logged_for_every_step(tmp_path: Path, teacher: Path, shards: Path) -> None:
    output = tmp_path / "out"
    weights = {"output_weight": 0.7, "feature_weight": 0.3}
    settings = {"gradient_accumulation_steps": 2, "lr_scheduler": "linear", "lr_warmup_steps": 2, "logging_steps": 3}
    train(teacher, shards, output, max_train_steps=7, report_to="tensorboard", **weights, **settings)
    logged = scalars(output)
    pairs = [f"feature_loss/{name}-{name}" for name, _ in dt.DISTILL_LEVELS["sd_small"].feature_pairs]
    assert set(logged) == {"loss", "task_loss", "output_loss", "feature_loss", "grad_norm", "lr", *pairs}
    for step in range(1, 8):  # the last lot is not a full one
        value = {tag: logged[tag][step] for tag in logged}
        total = value["task_loss"] + 0.7 * value["output_loss"] + 0.3 * value["feature_loss"]
        assert math.isclose(value["loss"], total, rel_tol=1e-6)
        assert math.isclose(value["feature_loss"], sum(value[pair] for pair in pairs), rel_tol=1e-6)
        assert value["grad_norm"] > 0
        # Linear warm-up over 2 and decay to 7, in optimiser steps whatever the accumulation.
        factor = (step - 1) / 2 if step <= 2 else (7 - (step - 1)) / 5
        assert math.isclose(value["lr"], 1e-3 * factor, rel_tol=1e-6)


def final_metrics(text: str, separator: str) -> tuple[dict[str, float], int]:
    """Metric to its final value, and the number of steps that these are the means of."""
    rows = dict(re.findall(rf"Final (\S+){re.escape(separator)}(.*?)(?: \||$)", text, flags=re.MULTILINE))
    steps = re.fullmatch(r"means of the last (\d+) steps", rows.pop("values"))
    return {name: float(value) for name, value in rows.items()}, int(steps[1])


def test_final_metrics_are_the_means_of_the_logged_steps(
    tmp_path: Path, teacher: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    settings = {"max_train_steps": 5, "report_to": "tensorboard", "lr_scheduler": "linear", "lr_warmup_steps": 0}
    train(teacher, shards, output, distill_level="sd_tiny", logging_steps=2, **settings)
    logged = scalars(output)
    final, steps = final_metrics(caplog.text, " = ")
    assert final_metrics((output / "README.md").read_text(), " | ") == (final, steps)
    assert steps == 5 and final.keys() == logged.keys() - {"lr"} >= {"loss", "feature_loss", "grad_norm"}
    for name, value in final.items():
        assert set(logged[name]) == {1, 2, 3, 4, 5}
        assert value == pytest.approx(sum(logged[name].values()) / 5, rel=1e-5), name
    assert len({round(value, 6) for value in logged["loss"].values()}) == 5


def test_final_metrics_are_those_of_the_last_hundred_steps(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 130 steps that nothing is computed in; one of them is not finite."""

    def step(run: dt.Distillation, batch: dict[str, torch.Tensor], micro_batch: int) -> Any:
        run.state.sound_steps += 1
        loss = math.nan if micro_batch == 99 else float(micro_batch)
        return torch.full((len(run.metric_names()),), loss), torch.tensor(1.0)

    monkeypatch.setattr(dt, "training_step", step)
    settings = {"distill_level": "sd_tiny", "resolution": 32, "train_batch_size": 1, "max_train_steps": 130}
    train(teacher, shards, tmp_path / "out", **settings)
    final, steps = final_metrics(caplog.text, " = ")
    assert steps == 99 and final["loss"] == pytest.approx((sum(range(30, 130)) - 99) / 99, rel=1e-5)
    assert final_metrics((tmp_path / "out" / "README.md").read_text(), " | ") == (final, steps)


@pytest.mark.parametrize(("variable", "flag"), [("2", None), ("1", 2), ("2", 2)])
def test_the_flag_for_accumulation_wins_over_the_environment(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
    flag: int | None,
) -> None:
    """accelerate's own variable for it; the flag's default wins as well."""
    settings = {"max_train_steps": 3, "gradient_accumulation_steps": flag, "distill_level": "sd_tiny"}
    settings |= {"lr_scheduler": "linear", "lr_warmup_steps": 0, "report_to": "tensorboard"}
    train(teacher, shards, tmp_path / "plain", **settings)
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    assert name not in caplog.text
    monkeypatch.setenv(name, variable)
    with watched(monkeypatch, lambda run: run.state.global_step) as steps:
        train(teacher, shards, tmp_path / "out", **settings)
    count = flag or 1
    assert steps == [step for step in range(3) for _ in range(count)]
    logged = scalars(tmp_path / "out")
    assert logged == scalars(tmp_path / "plain") and set(logged["loss"]) == {1, 2, 3}
    assert logged["lr"] == {step: pytest.approx(1e-3 * (4 - step) / 3) for step in (1, 2, 3)}
    assert_equal(*(unet_weights(tmp_path / run / "unet") for run in ("plain", "out")))
    warnings = [record.getMessage() for record in caplog.records if name in record.getMessage()]
    if variable == str(count):
        assert warnings == []
    else:
        (warning,) = warnings
        assert f"{name}={variable} " in warning and f"--gradient_accumulation_steps is {count}" in warning


def test_the_warning_of_the_other_accumulation_is_shown(
    tmp_path: Path, teacher: Path, shards: Path, launcher: Launcher
) -> None:
    line = flags(teacher, shards, tmp_path / "out", max_train_steps=1, distill_level="sd_tiny")
    run = launcher.start(line, tmp_path / "log", ranks=2, ACCELERATE_GRADIENT_ACCUMULATION_STEPS=2)
    assert run.wait() == [0, 0], run.log() + run.log(1)
    assert (run.log() + run.log(1)).count("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=2 is ignored") == 1


def test_two_nodes_train_as_two_processes_of_one_do(
    tmp_path: Path, teacher: Path, shards: Path, launcher: Launcher
) -> None:
    """One torchrun for each of two machines, as the README has it, with its second command on 127.0.0.1 too."""
    settings = {"max_train_steps": 2, "distill_level": "sd_tiny", "validation_prompts": ["a red circle"]}
    run = launcher.start(flags(teacher, shards, tmp_path / "one", **settings), tmp_path / "log", ranks=2)
    assert run.wait() == [0, 0], run.log() + run.log(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    start += ["--master_addr", "127.0.0.1", "--master_port", port]
    line = [str(SCRIPT), *flags(teacher, shards, tmp_path / "two", **settings)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    logs = [tmp_path / f"node-{rank}" for rank in range(2)]
    nodes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            node = [*start, "--node_rank", str(rank), *line]
            nodes.append(subprocess.Popen(node, env=environment, stdout=file, stderr=file))
    try:
        codes = [node.wait(240) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    first, second = (log.read_text() for log in logs)
    assert codes == [0, 0], first[-3000:] + second[-3000:]
    assert "***** Running training *****" in first and "***** Running training *****" not in second
    assert_equal(*(unet_weights(tmp_path / name / "unet") for name in ("one", "two")))


def test_accumulated_terms_are_the_mean_of_the_micro_batches(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = []
    step = dt.training_step

    def keep(*args: Any) -> Any:
        terms.append(step(*args))
        return terms[-1]

    monkeypatch.setattr(dt, "training_step", keep)
    settings = {"gradient_accumulation_steps": 3, "max_train_steps": 2, "report_to": "tensorboard"}
    train(teacher, shards, tmp_path / "out", **settings)
    assert [norm is not None for _, norm in terms] == [False, False, True] * 2
    logged = scalars(tmp_path / "out")["loss"]
    for number in (1, 2):
        mean = torch.stack([value[0] for value, _ in terms[3 * number - 3 : 3 * number]]).mean()
        assert math.isclose(logged[number], float(mean), rel_tol=1e-6)


def test_gradient_checkpointing_and_workers_change_nothing(tmp_path: Path, teacher: Path, shards: Path) -> None:
    results = []
    for name, extra in {
        "plain": {},
        "checkpointing": {"gradient_checkpointing": True},
        "workers": {"dataloader_num_workers": 2},
    }.items():
        train(teacher, shards, tmp_path / name, distill_level="sd_tiny", max_train_steps=2, **extra)
        results.append(unet_weights(tmp_path / name / "unet"))
    for other in results[1:]:
        assert_equal(results[0], other)


def test_without_distillation_the_teacher_is_not_loaded(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make_pipeline(tmp_path / "teacher")
    student = tmp_path / "student"
    train(teacher, shards, student, distill_level="sd_tiny", max_train_steps=1)
    (teacher / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not to be read")
    model_index = json.loads((teacher / "model_index.json").read_text())
    with watched(monkeypatch) as runs, pytest.raises(ValueError):
        train(teacher, shards, tmp_path / "out", distill_level="sd_tiny", student_model_name_or_path=student)
    assert not runs and not (tmp_path / "out").exists()
    monkeypatch.setattr(dt, "save_pipeline", lambda *_: None)  # it reads the teacher's folder, unet replaced
    with watched(monkeypatch) as runs:
        settings = {
            "output_weight": 0,
            "feature_weight": 0,
            "student_model_name_or_path": student,
            "max_train_steps": 2,
        }
        train(teacher, shards, tmp_path / "out", distill_level="sd_tiny", validation_prompts=["a circle"], **settings)
    assert runs[0].teacher_unet is None and runs[0].student_tap is None
    assert not any(module._forward_hooks for module in runs[0].unet.modules())
    assert Image.open(tmp_path / "out" / "validation" / "step-2.png").size == (64, 64)
    assert model_index["_class_name"] == "StableDiffusionPipeline"


def test_a_width_for_every_level_is_one_width(tmp_path: Path, teacher: Path, shards: Path) -> None:
    """`cross_attention_dim` may be a list: what is trained, saved and exported is the same."""
    shutil.copytree(teacher, tmp_path / "list")
    path = tmp_path / "list" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": [16] * 4}))
    settings = {"max_train_steps": 1, "distill_level": "sd_tiny", "export": ["single_file"]}
    for name, source in (("of a list", tmp_path / "list"), ("of a number", teacher)):
        train(source, shards, tmp_path / name, **settings)
    assert_equal(*(unet_weights(tmp_path / name / "unet") for name in ("of a list", "of a number")))


def test_a_student_of_another_level_is_refused(tmp_path: Path, teacher: Path, shards: Path) -> None:
    train(teacher, shards, tmp_path / "tiny", distill_level="sd_tiny", max_train_steps=1)
    with pytest.raises(dt.UserError, match="--student_model_name_or_path holds no sd_small student of this teacher"):
        train(
            teacher, shards, tmp_path / "out", distill_level="sd_small", student_model_name_or_path=tmp_path / "tiny"
        )
    assert not (tmp_path / "out").exists()


def test_hooks_exist_only_for_the_feature_loss(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks: list[int] = []
    step, paint = dt.training_step, dt.generate_images

    def count(run: dt.Distillation, *args: Any) -> Any:
        nets = [net for net in (run.unet, run.teacher_unet) if net is not None]
        hooks.append(sum(len(module._forward_hooks) for net in nets for module in net.modules()))
        result = step(run, *args)
        taps = [tap for tap in (run.student_tap, run.teacher_tap) if tap is not None]
        kept.append([feature for tap in taps for feature in tap._features])
        taps_seen.extend(taps)
        return result

    def look(*args: Any) -> Any:
        images = paint(*args)
        kept.append([feature for tap in taps_seen for feature in tap._features])
        return images

    kept: list[list[Any]] = []
    taps_seen: list[dt.FeatureTap] = []
    monkeypatch.setattr(dt, "training_step", count)
    monkeypatch.setattr(dt, "generate_images", look)
    train(teacher, shards, tmp_path / "output-only", feature_weight=0, max_train_steps=1)
    assert hooks == [0]
    train(teacher, shards, tmp_path / "both", max_train_steps=1, validation_prompts=["a circle"])
    assert hooks == [0, 18]
    # Neither a step nor a validation leaves a feature behind.
    assert len(kept[-1]) == 18 and not any(feature is not None for features in kept for feature in features)


def test_a_half_precision_teacher_folder_gives_a_float32_student(tmp_path: Path, shards: Path) -> None:
    """What is not trained stays in the teacher's precision, see test_export.py."""
    teacher = make_pipeline(tmp_path / "teacher", half=True)
    train(teacher, shards, tmp_path / "out", max_train_steps=1, validation_prompts=["a circle"])
    precisions = {"unet": torch.float32, "vae": torch.float16, "text_encoder": torch.float16}
    for part, precision in precisions.items():
        (file,) = (tmp_path / "out" / part).glob("*.safetensors")
        assert all(tensor.dtype == precision for tensor in load_file(file).values() if tensor.is_floating_point())
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    pipeline("a", num_inference_steps=1, height=64, width=64)


def test_prediction_type_is_kept_in_the_saved_scheduler(tmp_path: Path, teacher: Path, shards: Path) -> None:
    train(teacher, shards, tmp_path / "out", max_train_steps=1, prediction_type="v_prediction")
    assert (
        json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    )


def test_validation_shows_teacher_and_student(tmp_path: Path, teacher: Path, shards: Path) -> None:
    output = tmp_path / "out"
    settings = {"validation_prompts": ["a circle", "a square"], "num_validation_images": 2, "validation_steps": 2}
    train(teacher, shards, output, max_train_steps=3, learning_rate=1e-2, report_to="tensorboard", **settings)
    grids = {path.name: Image.open(path) for path in (output / "validation").iterdir()}
    assert set(grids) == {"step-0.png", "step-2.png", "step-3.png"}
    assert all(grid.size == (4 * 64, 2 * 64) for grid in grids.values())
    rows = {name: [grid.crop((0, y, 256, y + 64)).tobytes() for y in (0, 64)] for name, grid in grids.items()}
    assert len({teacher_row for teacher_row, _ in rows.values()}) == 1
    assert len({student_row for _, student_row in rows.values()}) == 3
    events = EventAccumulator(str(next(output.rglob("events.out*")).parent)).Reload()
    assert [image.step for image in events.Images("validation")] == [0, 2, 3]
    card = (output / "README.md").read_text()
    assert "val_imgs_grid.png" in card and (output / "val_imgs_grid.png").exists()
    assert "a circle; a square" in card and "Final feature_loss" in card


def test_settings_and_a_drawn_seed_are_written(tmp_path: Path, teacher: Path, shards: Path) -> None:
    output = tmp_path / "out"
    train(teacher, shards, output, seed=None, max_train_steps=1, checkpointing_steps=1, hub_token="hf_secret")
    written = json.loads((output / "args.json").read_text())
    state = json.loads((output / "checkpoint-1" / "trainer_state.json").read_text())
    assert written["seed"] == state["settings"]["seed"] and isinstance(written["seed"], int)
    assert state["global_step"] == 1 and written["distill_level"] == "sd_small"
    assert not any(b"hf_secret" in path.read_bytes() for path in output.rglob("*") if path.is_file())
    assert f"`seed`: {written['seed']}" in (output / "README.md").read_text()


def test_checkpoints_are_rotated(tmp_path: Path, teacher: Path, shards: Path) -> None:
    settings = {"checkpointing_steps": 1, "checkpoints_total_limit": 2}
    train(teacher, shards, tmp_path / "out", max_train_steps=4, **settings)
    assert [path.name for path in dt.list_checkpoints(tmp_path / "out")] == ["checkpoint-3", "checkpoint-4"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, teacher: Path, shards: Path) -> None:
    settings = {"learning_rate": 1e30, "checkpointing_steps": 3, "max_train_steps": 9, "logging_steps": 50}
    with pytest.raises(
        dt.TrainingError, match=r"at step 4, .*task_loss is (nan|inf).*there is no good checkpoint yet"
    ):
        train(teacher, shards, tmp_path / "none", **settings, max_bad_steps=2)
    assert dt.list_checkpoints(tmp_path / "none") == []  # weights that are lost are not saved
    with pytest.raises(dt.TrainingError, match=r"at step 2, .*loss is (nan|inf).*there is no good checkpoint yet"):
        train(teacher, shards, tmp_path / "one", **{**settings, "checkpointing_steps": 1}, max_bad_steps=0)


def test_broken_samples_do_not_stop_a_run(tmp_path: Path, teacher: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = [{"png": data, "txt": text.encode()} for data, text in toy_images(6)]
    write_tar(
        tmp_path / "data" / "0.tar", [*good, {"png": b"broken", "txt": b"a"}, {"png": good[0]["png"], "txt": b" "}]
    )
    train(teacher, tmp_path / "data", tmp_path / "out", max_train_steps=4, dataloader_num_workers=2)
    assert "Samples replaced = 1 with a broken image, 1 with an empty caption, 0 that could not be read" in caplog.text


def test_gradients_are_gone_when_the_average_is_updated(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a small card there is no room for both."""
    held, update = [], dt.StudentEMA.update

    def watched(ema: dt.StudentEMA, parameters: Iterator[torch.nn.Parameter], skipped: torch.Tensor) -> None:
        parameters = list(parameters)
        held.append(sum(parameter.grad is not None for parameter in parameters))
        update(ema, parameters, skipped)

    monkeypatch.setattr(dt.StudentEMA, "update", watched)
    train(teacher, shards, tmp_path / "out", max_train_steps=2, gradient_accumulation_steps=2, use_ema=True)
    assert held == [0, 0]


NOTE = """
import hashlib, json, os, torch
targets, weights, losses = [], [], []
loss, step = dt.distillation_loss, dt.training_step
def keep_target(student, teacher, target, *args, **kwargs):
    targets.append(float(target.double().sum()))
    return loss(student, teacher, target, *args, **kwargs)
def keep_run(run, *args):
    result = step(run, *args)
    losses.append(float(result[0][0]))
    flat = torch.cat([parameter.detach().flatten() for parameter in run.unet.parameters()])
    weights.append(hashlib.sha256(flat.numpy().tobytes()).hexdigest())
    seen = {"targets": targets, "losses": losses, "weights": weights, "processes": run.accelerator.num_processes,
            "wrapped": type(run.unet).__name__, "teacher": type(run.teacher_unet).__name__}
    with open(os.path.join(os.environ["SEEN"], f"rank-{run.accelerator.process_index}.json"), "w") as file:
        json.dump(seen, file)
    return result
dt.distillation_loss, dt.training_step = keep_target, keep_run
"""


def test_two_processes_train_one_student(tmp_path: Path, teacher: Path, shards: Path, launcher: Launcher) -> None:
    output = tmp_path / "out"
    settings = {"max_train_steps": 4, "lr_scheduler": "linear", "lr_warmup_steps": 0, "gradient_accumulation_steps": 2}
    line = flags(teacher, shards, output, checkpointing_steps=2, report_to="tensorboard", use_ema=True, **settings)
    run = launcher.start(line, tmp_path / "log", ranks=2, before=NOTE, SEEN=tmp_path)
    assert run.wait(300) == [0, 0], run.log()[-3000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [seen["processes"] for seen in ranks] == [2, 2]
    assert ranks[0]["wrapped"] == "DistributedDataParallel" and ranks[0]["teacher"] == "UNet2DConditionModel"
    assert ranks[0]["weights"] == ranks[1]["weights"] and len(set(ranks[0]["weights"])) == 5
    noise = ranks[0]["targets"] + ranks[1]["targets"]
    assert len(noise) == 16 and len(set(noise)) == 16  # no rank and no step shares its noise with another
    logged = scalars(output)
    assert set(logged["loss"]) == {1, 2, 3, 4}
    for step in range(1, 5):  # the schedule counts optimiser steps, not processes times steps
        micro_batches = [loss for seen in ranks for loss in seen["losses"][2 * step - 2 : 2 * step]]
        assert math.isclose(logged["loss"][step], sum(micro_batches) / 4, rel_tol=1e-6)
        assert math.isclose(logged["lr"][step], 1e-3 * (5 - step) / 4, rel_tol=1e-6)
    checkpoint = output / "checkpoint-2"
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= {path.name for path in checkpoint.iterdir()}
    assert UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet").config.layers_per_block == 1


def test_the_example_of_the_first_document_runs(tmp_path: Path, teacher: Path, shards: Path) -> None:
    command = f"""accelerate launch --mixed_precision="no" {SCRIPT}
      --pretrained_model_name_or_path={teacher} --train_data_dir={shards} --use_ema
      --resolution=64 --center_crop --random_flip --train_batch_size=1 --gradient_accumulation_steps=4
      --gradient_checkpointing --max_train_steps=2 --distill_level=sd_small --output_weight=0.5 --feature-weight=0.5
      --learning_rate=1e-05 --max_grad_norm=1 --lr_scheduler=constant --lr_warmup_steps=0
      --output_dir={tmp_path / "out"}"""
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    line = command.replace('"', "").split()
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "loaded back and equal to what was trained" in done.stderr
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").unet.config.layers_per_block == 1


def test_streaming_trains(tmp_path: Path, teacher: Path) -> None:
    import datasets

    columns = {
        "image": [{"bytes": data, "path": None} for data, _ in toy_images(8)],
        "text": [[text, "another"] for _, text in toy_images(8)],
    }
    features = {"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(tmp_path / "table" / "train.parquet")
    settings = {"dataset_name": tmp_path / "table", "streaming": True, "dataloader_num_workers": 2}
    train(teacher, None, tmp_path / "out", max_train_steps=6, cache_dir=tmp_path / "cache", **settings)
    assert (tmp_path / "out" / "model_index.json").exists()


def test_a_compiled_run_saves_and_resumes_with_clean_names(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `accelerate launch --dynamo_backend` compiles it; traced only, so that no compiler is needed."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    settings = {"distill_level": "sd_tiny", "validation_prompts": ["a"], "checkpointing_steps": 1, "use_ema": True}
    train(teacher, shards, tmp_path / "out", max_train_steps=1, **settings)
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").unet.config.layers_per_block == 1
    train(teacher, shards, tmp_path / "out", max_train_steps=2, resume_from_checkpoint="latest", **settings)
    assert not any("_orig_mod" in key for key in unet_weights(tmp_path / "out" / "checkpoint-2" / "unet"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"distill_level": "sd_tiny"}, "made with other settings: distill_level sd_small -> sd_tiny"),
        ({"use_ema": True}, "made with other settings: use_ema False -> True"),
        ({"max_train_steps": 1}, "is already past --max_train_steps 1"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, teacher: Path, shards: Path, changed: dict[str, Any], message: str
) -> None:
    train(teacher, shards, tmp_path / "out", max_train_steps=2, checkpointing_steps=2)
    settings = {"max_train_steps": 3, "resume_from_checkpoint": "latest", **changed}
    with pytest.raises(dt.UserError, match=message):
        train(teacher, shards, tmp_path / "out", **settings)


def test_accumulation_may_change_when_resuming(tmp_path: Path, teacher: Path, shards: Path) -> None:
    settings = {"checkpointing_steps": 1, "train_batch_size": 1}
    train(teacher, shards, tmp_path / "out", max_train_steps=1, gradient_accumulation_steps=2, **settings)
    resumed = {"resume_from_checkpoint": "latest", "gradient_accumulation_steps": 3, "report_to": "tensorboard"}
    with pytest.raises(dt.UserError, match="images per optimiser step 2 -> 3"):
        train(teacher, shards, tmp_path / "out", max_train_steps=3, **settings, **resumed)
    resumed["allow_changed_settings"] = True
    train(teacher, shards, tmp_path / "out", max_train_steps=3, **settings, **resumed)
    assert set(scalars(tmp_path / "out")["loss"]) == {2, 3}


def test_going_back_keeps_the_new_checkpoint(tmp_path: Path, teacher: Path, shards: Path) -> None:
    output = tmp_path / "out"
    train(teacher, shards, output, max_train_steps=3, checkpointing_steps=1)
    settings = {"resume_from_checkpoint": "checkpoint-1", "checkpoints_total_limit": 1, "checkpointing_steps": 1}
    train(teacher, shards, output, max_train_steps=2, **settings)
    assert [path.name for path in dt.list_checkpoints(output)] == ["checkpoint-2", "checkpoint-3"]
    assert_equal(unet_weights(output / "checkpoint-2" / "unet"), unet_weights(output / "unet"))


def test_weights_that_are_lost_in_the_last_step_are_not_saved(tmp_path: Path, teacher: Path, shards: Path) -> None:
    with pytest.raises(dt.TrainingError, match="not finite"):
        train(teacher, shards, tmp_path / "out", max_train_steps=1, learning_rate=1e30)
    assert not (tmp_path / "out" / "model_index.json").exists()


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_an_engine_that_accelerate_is_configured_for_is_refused(
    tmp_path: Path, teacher: Path, shards: Path, launcher: Launcher, engine: str
) -> None:
    line = flags(teacher, shards, tmp_path / "out", max_train_steps=1)
    run = launcher.start(line, tmp_path / "log", **{f"ACCELERATE_USE_{engine}": "true"})
    assert run.wait() == [2], run.log()
    assert run.log().count("accelerate is configured for") == run.log().count("`accelerate config`") == 1
    assert run.log().count("error:") == 1 and "Traceback" not in run.log()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ["FSDP", "MEGATRON_LM", "XLA"])
def test_an_engine_that_accelerate_chose_is_refused(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    class Sharding(Accelerator):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.state.distributed_type = DistributedType[engine]

    monkeypatch.setattr(dt, "Accelerator", Sharding)
    with pytest.raises(dt.UserError, match="^accelerate is configured for .*`accelerate config`") as error:
        train(teacher, shards, tmp_path / "out", max_train_steps=1)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# Run distill_training.py as on Windows: what it and data.py import themselves does not find POSIX's modules.
WITHOUT_POSIX = """
import builtins, importlib, os, runpy, sys

folder, hidden = os.path.dirname(sys.argv[0]), {"resource", "fcntl", "pwd", "grp", "termios"}
ours = {os.path.join(folder, name) for name in ("distill_training.py", "data.py")}
import_name, import_module = builtins.__import__, importlib.import_module

def refuse(name, importer):
    if name.partition(".")[0] in hidden and importer.get("__file__") in ours:
        print("HIDDEN", name)
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def hiding(name, globals=None, *args, **kwargs):
    refuse(name, globals or {})
    return import_name(name, globals, *args, **kwargs)

def hiding_module(name, package=None):
    refuse(name, sys._getframe(1).f_globals)
    return import_module(name, package)

builtins.__import__, importlib.import_module = hiding, hiding_module
del sys.modules["data"], sys.modules["distill_training"]
runpy.run_path(sys.argv[0], run_name="__main__")
sys.exit(0)
"""


def test_no_module_that_only_posix_has_is_needed(
    tmp_path: Path, teacher: Path, shards: Path, launcher: Launcher
) -> None:
    """Libraries may need them; the trainer, and what it imports of data.py, must not."""
    settings = {"distill_level": "sd_tiny", "max_train_steps": 2, "checkpointing_steps": 1, "use_ema": True}
    line = flags(teacher, shards, tmp_path / "out", **settings, cache_latents=True)
    done = launcher.finish(line, tmp_path / "log", before=WITHOUT_POSIX)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "HIDDEN resource" in done.stderr and "Peak memory = not known" in done.stderr
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").is_file()
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_the_script_alone_says_what_it_lacks(tmp_path: Path, launcher: Launcher) -> None:
    alone = shutil.copy(SCRIPT, tmp_path)
    run_it = f"import runpy\nrunpy.run_path({str(alone)!r}, run_name='__main__')"
    done = launcher.finish(["--help"], tmp_path / "log", before=run_it)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "error: data.py is not beside it" in done.stderr


def test_a_teacher_of_which_a_part_is_damaged_is_refused_before_training(tmp_path: Path, shards: Path) -> None:
    teacher = make_pipeline(tmp_path / "teacher")
    index = json.loads((teacher / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (teacher / "model_index.json").write_text(json.dumps(index))
    (teacher / "feature_extractor").mkdir()  # were there no file, the part would be left out
    (teacher / "feature_extractor" / "preprocessor_config.json").write_text("{")
    with pytest.raises(dt.UserError, match="--pretrained_model_name_or_path .* cannot be loaded"):
        train(teacher, shards, tmp_path / "out", max_train_steps=1)
    assert not (tmp_path / "out").exists()
