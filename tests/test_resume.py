"""A resumed run is the run that never stopped: same settings, another machine, other settings.

Whole runs at toy width. Every pair of the settings in `FACTORS` occurs in one of them; runs on two processes are real
ones (see launcher.py).
"""

import dataclasses
import hashlib
import itertools
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator
from helpers import (
    QUICK_STREAMS,
    assert_equal,
    assert_same_checkpoint,
    assert_same_nested,
    flags,
    make_tokenizer,
    scalars,
    toy_images,
    train,
    unet_weights,
    watched,
    write_imagefolder,
    write_shards,
    write_tar,
)
from launcher import Launcher
from safetensors.torch import load_file, save_file

import data
import distill_training as dt

# What must not matter for a resumed run. Every pair of values occurs in a row, but for cached latents of a stream.
FACTORS: dict[str, tuple[Any, ...]] = {
    "source": ("shards", "imagefolder", "stream"),
    "several_captions": (False, True),
    "center_crop": (False, True),
    "random_flip": (False, True),
    "gradient_accumulation_steps": (1, 2),
    "dataloader_num_workers": (0, 2),
    "distill_level": ("sd_tiny", "sd_small"),
    "processes": (1, 2),
    "cache_latents": (False, True),
}
ROWS = [
    ("shards", False, True, False, 1, 0, "sd_small", 1, False),
    ("shards", True, False, True, 2, 2, "sd_tiny", 2, True),
    ("imagefolder", False, False, False, 1, 0, "sd_tiny", 1, True),
    ("imagefolder", False, True, True, 2, 2, "sd_small", 1, True),
    ("imagefolder", True, True, False, 1, 0, "sd_tiny", 2, False),
    ("stream", True, False, False, 2, 0, "sd_small", 1, False),
    ("stream", True, False, False, 1, 2, "sd_tiny", 1, False),
    ("stream", False, True, True, 1, 0, "sd_small", 2, False),
]
ARRAY = [dict(zip(FACTORS, row, strict=True)) for row in ROWS]


def test_every_pair_of_settings_is_covered() -> None:
    found = {(one, row[one], other, row[other]) for row in ARRAY for one in FACTORS for other in FACTORS}
    for one, other in itertools.combinations(FACTORS, 2):
        for left, right in itertools.product(FACTORS[one], FACTORS[other]):
            if (one, left, other, right) != ("source", "stream", "cache_latents", True):
                assert (one, left, other, right) in found, f"{one}={left} never goes with {other}={right}"


# ----------------------------------------------------------------------------------------------------------------
# The same samples from every source: images larger than they are trained on and no squares, so that crops differ.


@pytest.fixture(autouse=True)
def quick_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library sleeps for five seconds whenever it has read a stream of several files to its end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], dict[str, Any]]:
    root = tmp_path_factory.mktemp("sources")
    images = toy_images(12, size=(52, 40))
    found: dict[tuple[str, bool], dict[str, Any]] = {}
    for several in (False, True):
        captions: list[Any] = [[text, f"{text} again", "b"] if several else text for _, text in images]
        name = "several" if several else "one"
        folder = root / "shards" / name
        for start in (0, 6):
            samples = [
                {"png": data, "json": json.dumps({"caption": caption}).encode()}
                if several
                else {"png": data, "txt": caption.encode()}
                for (data, _), caption in list(zip(images, captions, strict=True))[start : start + 6]
            ]
            write_tar(folder / f"{start}.tar", samples, start)
        found["shards", several] = {"train_data_dir": folder}

        folder = write_imagefolder(root / "imagefolder" / name, images)
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        lines = [json.dumps(line | {"text": caption}) for line, caption in zip(lines, captions, strict=True)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        found["imagefolder", several] = {"train_data_dir": folder, "cache_dir": root / "cache"}

        folder = root / "table" / name
        for start in range(0, 12, 3):  # four files: one for each worker of each of two processes
            columns = {
                "image": [{"bytes": data, "path": None} for data, _ in images[start : start + 3]],
                "text": captions[start : start + 3],
            }
            text = datasets.Value("string")
            features = {"image": datasets.Image(), "text": datasets.List(text) if several else text}
            table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
            table.to_parquet(folder / f"train-{start:05d}.parquet")
        found["table", several] = {"train_data_dir": None, "dataset_name": folder, "cache_dir": root / "cache"}
        found["stream", several] = {**found["table", several], "streaming": True}
    return found


def test_lists_of_captions_are_read_from_shards(sources: dict[tuple[str, bool], dict[str, Any]]) -> None:
    rows = data.ShardFolder(sources["shards", True]["train_data_dir"], "text")
    assert [row["text"] for row in rows] == [[text, f"{text} again", "b"] for _, text in toy_images(12)]


# ----------------------------------------------------------------------------------------------------------------
# What is compared.


def assert_same_end(whole: Path, parts: Path, resumed_at: int, steps: int) -> None:
    """The last checkpoint, the pipeline, and all that was logged after step `resumed_at`."""
    assert_same_checkpoint(whole / f"checkpoint-{steps}", parts / f"checkpoint-{steps}")
    assert_equal(unet_weights(whole / "unet"), unet_weights(parts / "unet"))
    uninterrupted, logged = scalars(whole), scalars(parts)
    assert logged.keys() == uninterrupted.keys() >= {"loss", "task_loss", "grad_norm", "lr"}
    for tag in logged:
        assert logged[tag] == {step: uninterrupted[tag][step] for step in range(resumed_at + 1, steps + 1)}, tag


COMMON: dict[str, Any] = {
    "resolution": 32,
    "use_ema": True,
    "report_to": "tensorboard",
    "lr_scheduler": "cosine",
    "proportion_empty_prompts": 0.3,
    "noise_offset": 0.1,
    "input_perturbation": 0.1,
}


@pytest.mark.parametrize("row", ARRAY, ids=["-".join(map(str, row)) for row in ROWS])
def test_resumed_is_uninterrupted(
    tmp_path: Path,
    teacher: Path,
    sources: dict[tuple[str, bool], dict[str, Any]],
    launcher: Launcher,
    row: dict[str, Any],
) -> None:
    # Twelve samples: the first step of some rows and the second of all others goes on into the next epoch.
    settings = {**COMMON, "max_train_steps": 2, "checkpointing_steps": 1, "train_batch_size": 7, **row}
    processes = settings.pop("processes")
    settings |= sources[settings.pop("source"), settings.pop("several_captions")]

    def run(output: Path, **more: Any) -> None:
        if processes == 1:
            train(teacher, None, output, **settings, **more)
        else:
            line = flags(teacher, None, output, **settings, **more)
            started = launcher.start(line, output.with_suffix(".log"), ranks=processes, before=QUICK_STREAMS)
            assert started.wait() == [0] * processes, started.log() + started.log(1)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole)
    shutil.copytree(whole / "checkpoint-1", parts / "checkpoint-1")
    run(parts, resume_from_checkpoint="latest")
    ranks = {path.name for path in (parts / "checkpoint-2").glob("random_states_*")}
    assert ranks == {f"random_states_{rank}.pkl" for rank in range(processes)}
    assert_same_end(whole, parts, 1, 2)
    with pytest.raises(AssertionError):  # a step makes a difference to what is compared
        assert_equal(unet_weights(whole / "checkpoint-1" / "unet"), unet_weights(whole / "checkpoint-2" / "unet"))


def test_it_may_stop_after_any_step(tmp_path: Path, teacher: Path, shards: Path, monkeypatch: Any) -> None:
    settings = {**COMMON, "gradient_accumulation_steps": 2, "train_batch_size": 1, "random_flip": True}
    settings |= {"max_train_steps": 4, "checkpointing_steps": 1, "distill_level": "sd_tiny"}
    whole = tmp_path / "whole"
    train(teacher, shards, whole, **settings)
    decode, decoded = data.decode_image, []
    monkeypatch.setattr(data, "decode_image", lambda content: decoded.append(content) or decode(content))
    for step in range(1, 4):
        parts = tmp_path / f"from-{step}"
        shutil.copytree(whole / f"checkpoint-{step}", parts / f"checkpoint-{step}")
        decoded.clear()
        later = {"checkpointing_steps": 4, "resume_from_checkpoint": f"checkpoint-{step}"}
        train(teacher, shards, parts, **{**settings, **later})
        assert_same_end(whole, parts, step, 4)
        assert len(decoded) == 2 * (4 - step)


@pytest.mark.parametrize("source", ["shards", "imagefolder", "table", "stream"])
def test_skipping_reads_no_image(
    tmp_path: Path,
    teacher: Path,
    sources: dict[tuple[str, bool], dict[str, Any]],
    source: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {**sources[source, False], "max_train_steps": 1000, "resolution": 32}
    args = dt.parse_args(flags(teacher, None, tmp_path / "out", **settings))
    accelerator = Accelerator(cpu=True)
    dataset = dt.make_train_dataset(args, make_tokenizer(), accelerator)
    seen = {"rows": 0, "decoded": 0}

    def count(owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            seen[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    if source != "stream":
        count(type(dataset.rows), "__getitem__", "rows")
    count(data, "decode_image", "decoded")
    first = 500 if source != "stream" else 40
    batch = next(iter(dt.make_dataloader(dataset, args, accelerator, first)))
    assert seen == {"rows": 0 if source == "stream" else 2, "decoded": 2}
    plain = dt.make_train_dataset(args, make_tokenizer(), accelerator)
    wanted = next(itertools.islice(dt.make_dataloader(plain, args, accelerator, first - 20), 20, None))
    assert_same_nested(batch, wanted)
    assert seen["decoded"] == 2 + 21 * 2


# ----------------------------------------------------------------------------------------------------------------
# A change of machine.

RECORD = """
import json, os
step = dt.training_step
def record(run, batch, micro_batch):
    seen = [
        [batch["pixel_values"][i].double().sum().item(), batch["input_ids"][i].tolist()]
        for i in range(len(batch["input_ids"]))
    ]
    rank = run.accelerator.process_index
    with open(f"{os.environ['SEEN']}-{rank}", "a") as file:
        file.write(json.dumps([micro_batch, rank, seen]) + "\\n")
    return step(run, batch, micro_batch)
dt.training_step = record
"""


def samples_seen(prefix: Path) -> list[Any]:
    """All samples in the order in which they count, whoever trained on them."""
    lines = [
        json.loads(line) for path in prefix.parent.glob(f"{prefix.name}-*") for line in path.read_text().splitlines()
    ]
    return [sample for _, _, samples in sorted(lines, key=lambda line: line[:2]) for sample in samples]


def test_another_number_of_processes_goes_on_with_the_same_data(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    launcher: Launcher,
) -> None:
    settings = {"resolution": 32, "distill_level": "sd_tiny", "train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings |= {"checkpointing_steps": 1, "random_flip": True, "proportion_empty_prompts": 0.3, "use_ema": True}

    def run(name: str, ranks: int, steps: int, resumed: Path | None = None, **more: Any) -> Any:
        output = tmp_path / name
        if resumed is not None:
            shutil.copytree(resumed, output / resumed.name)
            more["resume_from_checkpoint"] = "latest"
        line = flags(teacher, shards, output, **{**settings, **more}, max_train_steps=steps)
        started = launcher.start(
            line, tmp_path / f"{name}.log", ranks=ranks, before=RECORD, SEEN=tmp_path / f"{name}.seen"
        )
        return started

    def ends_well(started: Any) -> str:
        assert set(started.wait()) == {0}, started.log()
        return started.log()

    ends_well(run("alone", 1, 3))
    # The same images per optimiser step on twice the processes, or in micro-batches of twice the size.
    log = ends_well(run("shared", 2, 2, tmp_path / "alone" / "checkpoint-1", gradient_accumulation_steps=1))
    assert "was made on 1 processes with --train_batch_size 2" in log and "the noise is another" in log
    log = ends_well(run("again", 1, 3, tmp_path / "shared" / "checkpoint-2"))
    assert "was made on 2 processes with --train_batch_size 2" in log and "the noise is another" in log
    alone = samples_seen(tmp_path / "alone.seen")
    assert len(alone) == 12
    assert samples_seen(tmp_path / "shared.seen") == alone[4:8]
    assert samples_seen(tmp_path / "again.seen") == alone[8:]
    state = json.loads((tmp_path / "again" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3 and state["samples_seen"] == 12
    wide = {"train_batch_size": 4, "gradient_accumulation_steps": 1}
    log = ends_well(run("wide", 1, 2, tmp_path / "alone" / "checkpoint-1", **wide))
    assert "was made on 1 processes with --train_batch_size 2" in log and "the noise is another" in log
    assert samples_seen(tmp_path / "wide.seen") == alone[4:8]
    # The same command once more, as a scheduler restarts it: nothing to complain of.
    log = ends_well(run("wider", 1, 3, tmp_path / "wide" / "checkpoint-2", **wide))
    assert "was made" not in log
    assert samples_seen(tmp_path / "wider.seen") == alone[8:]
    # Other images per optimiser step are refused, with the flags that decide them.
    for name, ranks, changed, total in (("more", 2, {}, 8), ("odd", 2, {"train_batch_size": 3}, 12)):
        impossible = run(name, ranks, 3, tmp_path / "alone" / "checkpoint-1", **changed)
        assert impossible.wait() == [2, 2]
        errors = [line for line in impossible.log().splitlines() if "error:" in line]
        assert len(errors) == 1 and f"images per optimiser step 4 -> {total}" in errors[0]
        assert "--train_batch_size" in errors[0] and "--gradient_accumulation_steps" in errors[0]
        assert "Traceback" not in impossible.log() + impossible.log(1)
        assert not samples_seen(tmp_path / f"{name}.seen")


# ----------------------------------------------------------------------------------------------------------------
# Other settings.


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory, teacher: Path, shards: Path) -> Path:
    """A run of two steps, with a checkpoint after each."""
    output = tmp_path_factory.mktemp("two-steps") / "out"
    train(teacher, shards, output, **SETTINGS, max_train_steps=2)
    return output


SETTINGS: dict[str, Any] = {
    "resolution": 32,
    "distill_level": "sd_tiny",
    "checkpointing_steps": 1,
    "report_to": "tensorboard",
    "use_ema": True,
}

# Another value for every flag that changes what is trained, given as the new one.
CHANGES: dict[str, Any] = {
    "resolution": 64,
    "center_crop": True,
    "random_flip": True,
    "image_interpolation_mode": "bilinear",
    "proportion_empty_prompts": 0.5,
    "random_conditioning": 2.5,
    "task_weight": 0.5,
    "output_weight": 0.25,
    "feature_weight": 0.75,
    "learning_rate": 2e-3,
    "lr_scheduler": "linear",
    "lr_warmup_steps": 7,
    "scale_lr": True,
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "adam_weight_decay": 0.5,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.5,
    "ema_decay": 0.5,
    "noise_offset": 0.1,
    "input_perturbation": 0.1,
    "prediction_type": "v_prediction",
    "mixed_precision": "bf16",
    "seed": 12,
    "max_train_samples": 10,
    "gradient_accumulation_steps": 3,
}
LISTED_AS = {"max_train_samples": "data", "gradient_accumulation_steps": "images per optimiser step"}
# All else: what is only said, shown or kept, and how fast it goes.
FREE: dict[str, Any] = {
    "logging_steps": 1,
    "logging_dir": "elsewhere",
    "validation_steps": 2,
    "validation_prompts": ["a circle"],
    "num_validation_images": 2,
    "validation_guidance_scale": 3,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 1,
    "report_to": "none",
    "tracker_project_name": "other",
    "gradient_checkpointing": True,
    "dataloader_num_workers": 2,
    "offload_ema": True,
    "max_bad_steps": 3,
    "allow_tf32": True,
    "local_rank": 0,
    "num_train_epochs": 7,
}
NOT_COMPARED = {
    "pretrained_model_name_or_path", "revision", "variant", "student_model_name_or_path", "cache_dir",
    "dataset_name", "dataset_config_name", "streaming", "train_data_dir", "image_column", "caption_column",
    "caption_extension", "train_batch_size", "max_train_steps", "output_dir", "resume_from_checkpoint",
    "allow_changed_settings", "push_to_hub", "hub_token", "hub_model_id", "use_8bit_adam", "distill_level",
    "use_ema", "foreach_ema", "cache_latents", "latents_cache_dir", "compile", "single_file_config", "export",
    "export_from", "caption_pool", "teacher_latents", "teacher_latents_steps", "teacher_latents_guidance_scale",
    "teacher_latents_seed", "fidelity_samples", "load_best_model_at_end", "evaluate", "student_num_inference_steps",
    "student_guidance_scale", "clip_model_name_or_path",
}  # fmt: skip


def test_every_flag_is_known_here(teacher: Path, shards: Path, tmp_path: Path) -> None:
    """A new flag must be thought about: does it change what is trained?"""
    args = vars(dt.parse_args(flags(teacher, shards, tmp_path / "out")))
    assert args.keys() - CHANGES.keys() - FREE.keys() - NOT_COMPARED == set()


def resume(teacher: Path, data: Path | None, run: Path, output: Path, step: int = 1, **changed: Any) -> None:
    shutil.copytree(run / f"checkpoint-{step}", output / f"checkpoint-{step}")
    settings = {**SETTINGS, "max_train_steps": 2, "resume_from_checkpoint": "latest", **changed}
    train(teacher, data, output, **settings)


def sentence_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    sentence = str(error.value)
    assert "\n" not in sentence and len(sentence) < 4000
    return sentence


def test_every_changed_setting_is_listed(tmp_path: Path, teacher: Path, shards: Path, two_steps: Path) -> None:
    listed: set[str] = set()
    # What is compared first hides what is compared later: first the flags, then the data.
    for number, names in enumerate((CHANGES.keys() - {"max_train_samples"}, {"max_train_samples"})):
        changed = {name: CHANGES[name] for name in names}
        with pytest.raises(dt.UserError) as error:
            resume(teacher, shards, two_steps, tmp_path / str(number), **changed)
        sentence = sentence_of(error)
        assert "checkpoint-1" in sentence and "--allow_changed_settings" in sentence
        for name in names:
            if name in LISTED_AS:
                assert f"{LISTED_AS[name]} " in sentence, name
            else:
                assert f"{name} " in sentence and f"-> {CHANGES[name]}" in sentence, name
            listed.add(name)
        # ... and nothing else.
        assert sentence.count(" -> ") == len(names)
        assert [path.name for path in (tmp_path / str(number)).iterdir()] == ["checkpoint-1"]
    assert listed == CHANGES.keys()


@pytest.mark.parametrize("name", ["adam_weight_decay", "lr_scheduler", "seed"])
def test_one_changed_setting_is_enough(
    tmp_path: Path, teacher: Path, shards: Path, two_steps: Path, name: str
) -> None:
    with pytest.raises(dt.UserError) as error:
        resume(teacher, shards, two_steps, tmp_path / "out", **{name: CHANGES[name]})
    assert sentence_of(error).count(" -> ") == 1 and f"{name} " in sentence_of(error)


@pytest.mark.parametrize("changed", [{"distill_level": "sd_small"}])
def test_what_can_never_change(
    tmp_path: Path, teacher: Path, shards: Path, two_steps: Path, changed: dict[str, Any]
) -> None:
    for number, allow in enumerate((False, True)):
        with pytest.raises(dt.UserError) as error:
            resume(teacher, shards, two_steps, tmp_path / str(number), allow_changed_settings=allow, **changed)
        assert "distill_level sd_tiny -> sd_small" in sentence_of(error)
        assert "or --allow_changed_settings" not in sentence_of(error)


def test_changed_settings_take_effect_when_allowed(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    two_steps: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changed = {name: CHANGES[name] for name in CHANGES if name not in ("mixed_precision", "lr_scheduler", "scale_lr")}
    with watched(monkeypatch) as runs:
        resume(teacher, shards, two_steps, tmp_path / "out", allow_changed_settings=True, **changed)
    assert (
        "checkpoint-1 was made with other settings" in caplog.text and "adam_weight_decay 0.01 -> 0.5" in caplog.text
    )
    (group,) = runs[-1].optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (2e-3, (0.8, 0.99), 0.5, 1e-6)
    assert runs[-1].ema_unet.decay == 0.5
    assert len(runs) == 3 and len(runs[-1].accelerator.unwrap_model(runs[-1].unet).down_blocks) == 3
    logged = scalars(tmp_path / "out")
    assert {round(value, 9) for value in logged["lr"].values()} == {2e-3} and set(logged["lr"]) == {2}
    value = {tag: logged[tag][2] for tag in logged}
    total = 0.5 * value["task_loss"] + 0.25 * value["output_loss"] + 0.75 * value["feature_loss"]
    assert value["loss"] == pytest.approx(total, rel=1e-6)
    state = torch.load(tmp_path / "out" / "checkpoint-2" / "optimizer.bin", weights_only=True)
    assert {int(value["step"]) for value in state["state"].values()} == {2}  # the optimiser's memory is the old one
    assert state["param_groups"][0]["weight_decay"] == 0.5


def test_a_changed_schedule_goes_on_at_its_step(
    tmp_path: Path, teacher: Path, shards: Path, two_steps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = {"lr_scheduler": "linear", "lr_warmup_steps": 0, "allow_changed_settings": True}
    resume(teacher, shards, two_steps, tmp_path / "out", **changed)
    logged = scalars(tmp_path / "out")["lr"]
    assert logged == {2: pytest.approx(0.5e-3)}


def test_free_settings_change_nothing(tmp_path: Path, teacher: Path, shards: Path, two_steps: Path) -> None:
    output = tmp_path / "out"
    resume(teacher, shards, two_steps, output, **FREE)
    assert_same_checkpoint(two_steps / "checkpoint-2", output / "checkpoint-2")
    assert_equal(unet_weights(two_steps / "unet"), unet_weights(output / "unet"))
    assert [path.name for path in dt.list_checkpoints(output)] == ["checkpoint-2"]
    assert {path.name for path in (output / "validation").iterdir()} == {"step-2.png"}
    assert not list(output.rglob("events.out*"))


def test_more_steps_just_work(tmp_path: Path, teacher: Path, shards: Path, two_steps: Path) -> None:
    train(teacher, shards, tmp_path / "whole", **SETTINGS, max_train_steps=3)
    resume(teacher, shards, two_steps, tmp_path / "out", step=2, max_train_steps=3)
    assert_same_end(tmp_path / "whole", tmp_path / "out", 2, 3)


@pytest.mark.parametrize("channels_last", [False, True])
def test_moments_follow_the_weights_in_memory(
    tmp_path: Path, teacher: Path, shards: Path, two_steps: Path, monkeypatch: pytest.MonkeyPatch, channels_last: bool
) -> None:
    """A checkpoint keeps strides; a fused optimiser would give weights that lie otherwise each other's moments."""
    start = two_steps
    if not channels_last:
        with monkeypatch.context() as patch:
            patch.setattr(dt, "use_channels_last", lambda *_, **__: True)
            start = tmp_path / "start"
            train(teacher, shards, start, **SETTINGS, max_train_steps=2)
    monkeypatch.setattr(dt, "use_channels_last", lambda *_, **__: channels_last)

    def follow(run: dt.Distillation) -> bool:
        return all(
            moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == parameter.stride()
            for parameter, moments in run.optimizer.state.items()
        )

    with watched(monkeypatch, follow) as followed:
        resume(teacher, shards, start, tmp_path / "out")
    assert followed == [True]
    before, after = (unet_weights(two_steps / f"checkpoint-{step}" / "unet") for step in (1, 2))
    found = unet_weights(tmp_path / "out" / "checkpoint-2" / "unet")
    moved = sum((after[name] - before[name]).abs().sum() for name in after)
    apart = sum((after[name] - found[name]).abs().sum() for name in after)
    assert apart < 0.01 * moved


def test_a_loss_scaler_that_was_not_there_starts_anew(
    tmp_path: Path, teacher: Path, shards: Path, two_steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when fp16 follows on bf16; a checkpoint with a scaler gives it back."""

    class Scaled(Accelerator):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)

    monkeypatch.setattr(dt, "Accelerator", Scaled)
    with watched(monkeypatch, lambda run: run.accelerator.scaler.get_scale()) as scales:
        resume(teacher, shards, two_steps, tmp_path / "out")
        train(teacher, shards, tmp_path / "out", **SETTINGS, max_train_steps=3, resume_from_checkpoint="latest")
    assert scales == [64.0, 128.0]


def test_a_resumed_average_remembers_nothing(
    tmp_path: Path, teacher: Path, shards: Path, two_steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied with its history, it would keep the weights it was read from, and on a GPU every later copy."""
    with watched(monkeypatch) as runs:
        resume(teacher, shards, two_steps, tmp_path / "out")
    shadows = runs[0].ema_unet.shadow_params
    assert shadows and not any(shadow.requires_grad for shadow in shadows)


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints of earlier versions.


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """What commit 022e9b0 made: teacher, data, its checkpoint-1, and student and average of its checkpoint-2."""
    with tarfile.open(Path(__file__).with_name("run_of_022e9b0.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run_of_022e9b0"


def test_a_checkpoint_of_022e9b0_is_resumed_bit_for_bit(tmp_path: Path, old_run: Path) -> None:
    """Another kind of CPU, or another torch, may round otherwise, and so would 022e9b0's own code there.

    So weights are compared to the last bit where a new run's first step is also that of 022e9b0 to the last bit, and
    else within 1e-5. (Its learning rate is 0, so that it is the optimiser's moments which show how it was rounded.)
    """
    settings = {**COMMON, "lr_warmup_steps": 1, "distill_level": "sd_tiny", "random_flip": True, "report_to": "none"}
    settings |= {"gradient_accumulation_steps": 2, "max_train_steps": 2, "checkpointing_steps": 1}
    settings |= {"input_perturbation": 0}
    new, resumed = tmp_path / "new", tmp_path / "resumed"
    train(old_run / "teacher", old_run / "data", new, **settings)
    shutil.copytree(old_run / "checkpoint-1", resumed / "checkpoint-1")
    train(old_run / "teacher", old_run / "data", resumed, **settings, resume_from_checkpoint="latest")
    moments = [torch.load(run / "checkpoint-1" / "optimizer.bin", weights_only=True) for run in (old_run, new)]
    assert_equal(*(unet_weights(run / "checkpoint-1" / "unet") for run in (old_run, new)))
    try:
        assert_same_nested(moments[0]["state"], moments[1]["state"])
        tolerance = 0.0
    except AssertionError:
        tolerance = 1e-5
    for name in ("unet", "unet_ema"):
        wanted = unet_weights(old_run / "checkpoint-2" / name)
        before = unet_weights(old_run / "checkpoint-1" / name)
        assert max((wanted[key] - before[key]).abs().max() for key in wanted) > 1e-4  # more than the tolerance
        for run in (new, resumed):
            found = unet_weights(run / "checkpoint-2" / name)
            assert found.keys() == wanted.keys()
            for key in wanted:
                torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=tolerance, msg=f"{run.name} {key}")


def test_a_checkpoint_of_the_old_share_of_empty_prompts_names_it(
    tmp_path: Path, teacher: Path, shards: Path, two_steps: Path
) -> None:
    """Their default was 0 once: under the new one a run must not go on as if nothing was."""
    start = tmp_path / "start"
    shutil.copytree(two_steps / "checkpoint-1", start / "checkpoint-1")
    path = start / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["settings"]["proportion_empty_prompts"] = 0.0
    path.write_text(json.dumps(state))
    with pytest.raises(dt.UserError, match="was made with other settings: proportion_empty_prompts 0.0 -> 0.1. Give"):
        resume(teacher, shards, start, tmp_path / "out")


@pytest.mark.parametrize(("name", "other"), [("input_perturbation", 0.5), ("noise_offset", 0.1)])
def test_a_flag_that_is_younger_than_the_checkpoint(
    tmp_path: Path,
    teacher: Path,
    shards: Path,
    two_steps: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    other: float,
) -> None:
    """It stands for the value that its row says, which is not always the default."""
    start = tmp_path / "start"
    shutil.copytree(two_steps / "checkpoint-1", start / "checkpoint-1")
    path = start / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["settings"][name]
    path.write_text(json.dumps(state))
    resume(teacher, shards, start, tmp_path / "equal")
    assert_same_checkpoint(two_steps / "checkpoint-2", tmp_path / "equal" / "checkpoint-2")
    with pytest.raises(dt.UserError, match=f"checkpoint-1 was made with other settings: {name} 0.0 -> {other}. "):
        resume(teacher, shards, start, tmp_path / "changed", **{name: other})
    monkeypatch.setitem(dt.FLAGS, name, dataclasses.replace(dt.FLAGS[name], before=other))
    with pytest.raises(dt.UserError, match=f"checkpoint-1 was made with other settings: {name} {other} -> 0.0. "):
        resume(teacher, shards, start, tmp_path / "default")
    resume(teacher, shards, start, tmp_path / "before", **{name: other})
    assert [path.name for path in dt.list_checkpoints(tmp_path / "before")] == ["checkpoint-1", "checkpoint-2"]


# ----------------------------------------------------------------------------------------------------------------
# Another teacher, other data.


def moved_data(shards: Path, target: Path, change: str) -> Path:
    if change == "nothing":
        return Path(shutil.copytree(shards, target))
    images = [(row["image"]["bytes"], row["text"]) for row in data.ShardFolder(shards, "text")]
    if change == "a caption":
        images[7] = (images[7][0], images[7][1][:-1] + "z")  # as long as before
    elif change == "an image":
        images[7] = (toy_images(30)[-1][0], images[7][1])
    elif change == "one more":
        images.append(images[0])
    else:
        images = images[::-1]
    return write_shards(target, images)


@pytest.mark.parametrize("change", ["nothing", "a caption", "an image", "one more", "order"])
def test_other_data_is_noticed(tmp_path: Path, teacher: Path, shards: Path, two_steps: Path, change: str) -> None:
    data = moved_data(shards, tmp_path / "moved", change)
    if change == "nothing":
        resume(teacher, data, two_steps, tmp_path / "out")
        assert_same_checkpoint(two_steps / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    else:
        with pytest.raises(dt.UserError, match="checkpoint-1 was made with other settings: data .* -> ") as error:
            resume(teacher, data, two_steps, tmp_path / "out")
        assert sentence_of(error).count(" -> ") == 1


def test_other_data_may_be_allowed(tmp_path: Path, teacher: Path, shards: Path, two_steps: Path) -> None:
    data = moved_data(shards, tmp_path / "moved", "one more")
    resume(teacher, data, two_steps, tmp_path / "out", allow_changed_settings=True)
    settings = [
        json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())["settings"]
        for run in (two_steps, tmp_path / "out")
    ]
    assert settings[0]["data"] != settings[1]["data"] and "21 samples" in settings[1]["data"]


@pytest.mark.parametrize("part", ["nothing", "unet", "vae", "text_encoder"])
def test_another_teacher_is_noticed(tmp_path: Path, teacher: Path, shards: Path, two_steps: Path, part: str) -> None:
    moved = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    if part == "nothing":
        resume(moved, shards, two_steps, tmp_path / "out")
        assert_same_checkpoint(two_steps / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
        return
    (file,) = (moved / part).glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[len(weights) // 2]
    weights[name].view(-1)[0] += 1e-3  # a single number
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(dt.UserError, match="checkpoint-1 was made with other settings: teacher") as error:
        resume(moved, shards, two_steps, tmp_path / "out")
    assert sentence_of(error).count(" -> ") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-1"]


def hashes(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_refusal_touches_nothing(tmp_path: Path, teacher: Path, shards: Path, two_steps: Path) -> None:
    shutil.copytree(two_steps, tmp_path / "out")
    before = list(hashes(tmp_path / "out"))
    with pytest.raises(dt.UserError):
        train(
            teacher, shards, tmp_path / "out", **SETTINGS, max_train_steps=6, seed=5, resume_from_checkpoint="latest"
        )
    assert list(hashes(tmp_path / "out")) == before
