"""How close a student is to its teacher: the measures, what they are taken on, the best student, `--evaluate`.

Students whose measures are known by hand; real runs, real signals, a real second process.
"""

import json
import math
import multiprocessing
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DConditionModel
from helpers import (
    assert_equal,
    data_args,
    dataset_of,
    flags,
    make_tokenizer,
    same_tensors,
    scalars,
    toy_images,
    train,
    unet_weights,
    watched,
    write_shards,
)
from launcher import Launcher
from PIL import Image

import distill_training as dt

SETTINGS = {"distill_level": "sd_tiny", "fidelity_samples": 2, "validation_steps": 2, "validation_guidance_scale": 3}
SETTINGS["train_batch_size"] = 10


def rows_of(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "fidelity.json").read_text())["rows"]


def evaluate(monkeypatch: pytest.MonkeyPatch, output: Path, *line: object) -> dict[str, Any]:
    """The report of --evaluate; processes of their own are forked, which saves their imports."""
    spawn = multiprocessing.get_context
    monkeypatch.setattr(dt.multiprocessing, "get_context", lambda _: spawn("fork"))
    dt.main(dt.parse_args([*map(str, line), "--output_dir", str(output)]))
    return json.loads((output / "report.json").read_text())


def student_of(teacher: Path, folder: Path, factor: float) -> Path:
    """The teacher itself, with the last layer of its U-Net scaled: whatever it predicts is `factor` times as much."""
    shutil.copytree(teacher, folder)
    unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.weight *= factor
        unet.conv_out.bias *= factor
    unet.save_pretrained(folder / "unet")
    return folder


# ----------------------------------------------------------------------------------------------------------------
# Measures that are known.


def test_students_whose_measures_are_known(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is no distance from itself; one whose last layer is scaled is as far as the formula says."""
    scaled = student_of(teacher, tmp_path / "scaled", 1.1)
    line = ["--pretrained_model_name_or_path", teacher, "--train_data_dir", shards, "--resolution", 64]
    line += ["--evaluate", teacher, scaled, "--fidelity_samples", 2, "--validation_guidance_scale", 3]
    line += ["--student_num_inference_steps", dt.PATH_STEPS]
    record = evaluate(monkeypatch, tmp_path / "report", *line, "--train_batch_size", 10)
    itself, other = (record["averages"][str(name)] for name in (teacher, scaled))
    for name in [*dt.MEASURES, *(name for name in itself if name.startswith("drift"))]:
        assert itself[name] == [0, 0, 0], name
    assert itself["PSNR"] == [100] * 3 and itself["SSIM"] == pytest.approx([1] * 3)

    (file,) = tmp_path.glob("report/fidelity-*/teacher.npy")
    places = np.load(file).astype(np.float64)  # (samples, places, 3, C, h, w)
    assert places.shape == (2, 20, 3, 4, 8, 8)
    caption, empty = places[:, :, 1], places[:, :, 2]
    guided = empty + 3 * (caption - empty)
    for name, theirs, where in (
        ("prediction_error", caption, slice(0, 10)),
        ("empty_prompt_error", empty, slice(0, 10)),
        ("guidance_gap_error", caption - empty, slice(0, 10)),
        ("guided_path_error", guided, slice(10, 20)),
    ):
        errors = [0.01 * (theirs[:, at] ** 2).mean() / theirs[:, at].var(ddof=1) for at in range(20)[where]]
        assert other[name][0] == pytest.approx(math.exp(np.mean(np.log(errors))), rel=1e-4), name
        assert other[name][1] <= other[name][0] <= other[name][2]
    assert other["drift at 100%"][0] > other["drift at 25%"][0] > 0 and other["PSNR"][0] < 100
    differences = record["differences"][f"{teacher} - {scaled}"]
    for name in dt.MEASURES:  # paired with zeros
        assert differences[name] == pytest.approx([-other[name][at] for at in (0, 2, 1)], rel=1e-4), name


def test_what_the_teacher_is_measured_on(tmp_path: Path, teacher: Path, shards: Path) -> None:
    """Posterior means with the noise of the middle of ten bins, then ten states of a sampled path."""
    train(teacher, shards, tmp_path / "out", **SETTINGS, max_train_steps=1)
    (folder,) = (tmp_path / "out").glob("fidelity-*")
    samples, places = json.loads((folder / "samples.json").read_text()), np.load(folder / "teacher.npy")
    assert samples["timesteps"][:10] == list(range(50, 1000, 100))
    assert samples["timesteps"][10:] == sorted(samples["timesteps"][10:], reverse=True)
    args = data_args(teacher, train_data_dir=shards, resolution=64, seed=11, fidelity_samples=2, center_crop=False)
    _, measured = dt.hold_out(args, dataset_of(args), None)
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    for number, example in enumerate(measured.__getitems__(range(2))):
        assert samples["captions"][number] == example["captions"][0]
        mean = dt.encode_images(pipeline.vae, example["pixel_values"][None])[0][0]
        seed = dt.derived_seed(11, "fidelity", number)
        noise = torch.randn(11, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        clean, times = mean.expand(10, -1, -1, -1) * pipeline.vae.config.scaling_factor, torch.arange(50, 1000, 100)
        torch.testing.assert_close(
            torch.tensor(places[number, :10, 0]), pipeline.scheduler.add_noise(clean, noise[:10], times)
        )
        torch.testing.assert_close(torch.tensor(places[number, 10, 0]), noise[10])  # where the path begins


def test_bootstrap_by_hand() -> None:
    values = torch.tensor([[1.0, 4.0], [3.0, 12.0]])  # (samples, places)
    average, low, high = dt.bootstrap(values)
    assert average == pytest.approx(math.sqrt(2 * 8))
    assert low == pytest.approx(2) and high == pytest.approx(6)  # one sample drawn twice
    assert dt.bootstrap(values, values) == [0, 0, 0]
    assert dt.bootstrap(torch.tensor([-1.0, 2.0]))[0] == pytest.approx(0.5)
    assert dt.bootstrap(torch.zeros(3, 2)) == [0, 0, 0]


# ----------------------------------------------------------------------------------------------------------------
# What is measured on.


def texts(rows: Any) -> list[str]:
    return [rows[number]["text"] for number in range(len(rows))]


def test_samples_are_held_out_by_the_seed(tmp_path: Path, teacher: Path) -> None:
    shards = write_shards(
        tmp_path / "shards", [(image, f"caption {n}") for n, (image, _) in enumerate(toy_images(40))]
    )
    args = data_args(teacher, train_data_dir=shards, fidelity_samples=3)
    dataset, measured = dt.hold_out(args, dataset_of(args), None)
    chosen = texts(measured.rows)
    assert len(chosen) == 3 and sorted(chosen + texts(dataset.rows)) == sorted(f"caption {n}" for n in range(40))
    assert texts(dataset.rows) == sorted(texts(dataset.rows), key=lambda text: int(text.split()[1]))
    more = data_args(teacher, train_data_dir=shards, fidelity_samples=16)  # at most a tenth
    assert texts(dt.hold_out(more, dataset_of(more), None)[1].rows)[:3] == chosen
    assert len(dt.hold_out(more, dataset_of(more), None)[1]) == 4 == dt.held_out(more, dataset_of(more))
    other = data_args(teacher, train_data_dir=shards, fidelity_samples=3, seed=4)
    assert texts(dt.hold_out(other, dataset_of(other), None)[1].rows) != chosen
    none = data_args(teacher, train_data_dir=shards, fidelity_samples=0)
    assert dt.hold_out(none, whole := dataset_of(none), None) == (whole, None)


def test_the_cache_is_of_all_samples_and_the_same_are_held_out(tmp_path: Path, teacher: Path) -> None:
    shards = write_shards(tmp_path / "shards", toy_images(20))
    settings = {"train_data_dir": shards, "center_crop": True, "latents_cache_dir": tmp_path / "cache"}
    found = {}
    cached = {"cache_latents": True}
    for name, more in {"plain": {}, "cached": cached, "none": cached | {"fidelity_samples": 0}}.items():
        args = data_args(teacher, **settings | {"fidelity_samples": 2, "resolution": 64} | more)
        dataset = dataset_of(args)
        if name != "plain":
            vae = DiffusionPipeline.from_pretrained(teacher).vae
            dataset = dt.cache_latents(dataset, vae, args, Accelerator(cpu=True))
        found[name] = dt.hold_out(args, dataset, None)
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 1  # with the meter and without
    assert texts(found["cached"][1].rows) == [[text] for text in texts(found["plain"][1].rows)]
    assert (len(found["cached"][0]), len(found["none"][0])) == (18, 20)


def test_what_max_train_samples_leaves_over_is_taken_first(tmp_path: Path, teacher: Path) -> None:
    shards = write_shards(
        tmp_path / "shards", [(image, f"caption {n}") for n, (image, _) in enumerate(toy_images(30))]
    )
    args = data_args(teacher, train_data_dir=shards, max_train_samples=20, fidelity_samples=16)
    dataset, measured = dt.hold_out(args, dataset_of(args), None)
    without = dataset_of(data_args(teacher, train_data_dir=shards, max_train_samples=20, fidelity_samples=0))
    assert texts(dataset.rows) == texts(without.rows) and dt.held_out(args, dataset_of(args)) == 0
    assert len(measured) == 2 and not set(texts(measured.rows)) & set(texts(dataset.rows))


def test_too_few_samples_are_measured_and_trained_on(
    tmp_path: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = write_shards(tmp_path / "shards", toy_images(9))
    args = data_args(teacher, train_data_dir=shards, fidelity_samples=4)
    dataset, measured = dt.hold_out(args, dataset_of(args), None)
    assert (len(dataset), len(measured)) == (9, 4)
    assert "Fidelity is measured on samples that are trained on" in caplog.text


def test_a_broken_sample_is_left_out_of_what_is_measured(
    tmp_path: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = [(image if number % 2 else b"broken", text) for number, (image, text) in enumerate(toy_images(40))]
    shards = write_shards(tmp_path / "shards", images)
    train(teacher, shards, tmp_path / "out", **{**SETTINGS, "fidelity_samples": 4}, max_train_steps=1)
    (folder,) = (tmp_path / "out").glob("fidelity-*")
    left = len(json.loads((folder / "samples.json").read_text())["captions"])
    assert 0 < left < 4 and f"{4 - left} of the 4 samples for fidelity have a broken image" in caplog.text


# ----------------------------------------------------------------------------------------------------------------
# In training.


def test_a_resumed_run_has_the_rows_of_the_uninterrupted_one(tmp_path: Path, teacher: Path, shards: Path) -> None:
    """Rows, and the best student, of steps after the checkpoint are set aside; the rest is bit-equal."""
    settings = {**SETTINGS, "checkpointing_steps": 2, "use_ema": True, "load_best_model_at_end": True}
    settings |= {"report_to": "tensorboard", "max_train_steps": 5}
    train(teacher, shards, tmp_path / "whole", **settings)
    rows = rows_of(tmp_path / "whole")
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    train(teacher, shards, tmp_path / "parts", **settings)
    (tmp_path / "parts" / "model_index.json").unlink()
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    train(teacher, shards, tmp_path / "parts", **settings, resume_from_checkpoint="latest")
    record = json.loads((tmp_path / "parts" / "fidelity.json").read_text())
    assert record["rows"] == rows and [row["step"] for row in record["set_aside"]] == [4, 5]
    assert json.loads((tmp_path / "parts" / "best-set-aside-0" / "fidelity.json").read_text())["step"] in (4, 5)
    best = min(rows, key=lambda row: row["guided_path_error"])
    for output in (tmp_path / "whole", tmp_path / "parts"):
        assert json.loads((output / "best" / "fidelity.json").read_text()) == best
        assert_equal(unet_weights(output / "best" / "unet"), unet_weights(output / "unet"))
    assert (tmp_path / "whole" / "validation" / "fidelity.png").stat().st_size > 10_000
    logged = scalars(tmp_path / "whole")
    for name in dt.MEASURES:
        assert logged[f"fidelity/{name}"] == {row["step"]: pytest.approx(row[name]) for row in rows}


def test_the_best_student_is_what_is_saved(tmp_path: Path, teacher: Path, shards: Path) -> None:
    """A run that gets worse: what comes out is the student of the step with the smallest error, not the last one."""
    settings = {**SETTINGS, "checkpointing_steps": 1, "validation_steps": 1, "learning_rate": 0.05}
    train(teacher, shards, tmp_path / "last", **settings, max_train_steps=4)
    train(teacher, shards, tmp_path / "best", **settings, max_train_steps=4, load_best_model_at_end=True)
    rows = rows_of(tmp_path / "best")
    assert rows == rows_of(tmp_path / "last")
    best = min(rows, key=lambda row: row["guided_path_error"])["step"]
    assert best < 4, [row["guided_path_error"] for row in rows]
    pruned = dt.build_student(UNet2DConditionModel.from_pretrained(teacher, subfolder="unet"), "sd_tiny")
    at = tmp_path / "last" / f"checkpoint-{best}" / "unet"
    expected = unet_weights(at) if best else pruned.state_dict()
    assert_equal(unet_weights(tmp_path / "best" / "unet"), dict(expected))
    assert not (tmp_path / "last" / "best").exists()
    card = (tmp_path / "best" / "README.md").read_text()
    assert f"| Best step | {best}: guided path error" in card


@pytest.mark.parametrize("at", [0, 2])
def test_a_signal_gives_a_measurement_up_and_it_is_the_first_thing_on_resume(
    tmp_path: Path, teacher: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    settings = {**SETTINGS, "max_train_steps": 3, "checkpointing_steps": 100}
    train(teacher, shards, tmp_path / "whole", **settings)
    predict, measured = dt.predict_places, []

    def stop(run: dt.Distillation, unet: Any, *args: Any) -> Any:
        if unet is not run.teacher_unet and run.state.global_step == at and not measured:
            measured.append(at)
            signal.raise_signal(signal.SIGTERM)
        return predict(run, unet, *args)

    monkeypatch.setattr(dt, "predict_places", stop)
    with pytest.raises(SystemExit) as end:
        train(teacher, shards, tmp_path / "cut", **settings)
    assert end.value.code == 143
    assert [path.name for path in dt.list_checkpoints(tmp_path / "cut")] == [f"checkpoint-{at}"]
    with watched(monkeypatch, lambda run: len(rows_of(tmp_path / "cut"))) as seen:
        train(teacher, shards, tmp_path / "cut", **settings, resume_from_checkpoint="latest")
    assert seen[0] == 1 + (at > 0)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert_equal(*(unet_weights(tmp_path / name / "unet") for name in ("whole", "cut")))


def test_two_processes_measure_what_one_does(tmp_path: Path, teacher: Path, shards: Path, launcher: Launcher) -> None:
    rows = {}
    for ranks in (1, 2):
        settings = {
            **SETTINGS,
            "max_train_steps": 1,
            "train_batch_size": 10 // ranks,
            "latents_cache_dir": tmp_path / "c",
        }
        line = flags(teacher, shards, tmp_path / str(ranks), **settings)
        run = launcher.start(line, tmp_path / f"log-{ranks}", ranks=ranks)
        assert run.wait() == [0] * ranks, run.log()
        rows[ranks] = rows_of(tmp_path / str(ranks))
    assert len(list((tmp_path / "c").glob("fidelity-*/teacher.npy"))) == 1
    for name in dt.MEASURES:  # at the start: what is trained after that depends on the ranks' noise
        assert rows[1][0][name] == pytest.approx(rows[2][0][name], rel=1e-4) != rows[1][1][name], name


def test_without_a_teacher_there_is_no_meter(
    tmp_path: Path, teacher: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**SETTINGS, "output_weight": 0, "feature_weight": 0, "max_train_steps": 1}
    train(teacher, shards, tmp_path / "out", **settings)
    assert "Fidelity is not measured: no teacher is loaded" in caplog.text
    assert not (tmp_path / "out" / "fidelity.json").exists()
    with pytest.raises(dt.UserError, match="--load_best_model_at_end needs fidelity, which is not measured"):
        train(teacher, shards, tmp_path / "best", **settings, load_best_model_at_end=True)


def test_a_checkpoint_from_before_goes_on_without(
    tmp_path: Path, teacher: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"distill_level": "sd_tiny", "checkpointing_steps": 1}
    train(teacher, shards, tmp_path / "whole", **settings, max_train_steps=3)
    train(teacher, shards, tmp_path / "old", **settings, max_train_steps=2)
    state = tmp_path / "old" / "checkpoint-2" / "trainer_state.json"
    content = json.loads(state.read_text())
    del content["settings"]["fidelity_samples"]
    state.write_text(json.dumps(content))
    (tmp_path / "old" / "model_index.json").unlink()
    resumed = {"resume_from_checkpoint": "latest", "fidelity_samples": 16}
    train(teacher, shards, tmp_path / "old", **settings, **resumed, max_train_steps=3)
    assert "checkpoint-2 was made without, on all samples" in caplog.text
    (tmp_path / "old" / "model_index.json").unlink()
    train(teacher, shards, tmp_path / "old", **settings, **resumed, max_train_steps=4)  # and again
    assert "checkpoint-3 was made without, on all samples" in caplog.text
    train(teacher, shards, tmp_path / "whole", **settings, max_train_steps=4, resume_from_checkpoint="latest")
    assert_equal(*(unet_weights(tmp_path / name / "unet") for name in ("whole", "old")))


def test_another_number_of_samples_is_another_run(tmp_path: Path, teacher: Path, shards: Path) -> None:
    train(teacher, shards, tmp_path / "out", **SETTINGS, max_train_steps=1, checkpointing_steps=1)
    (tmp_path / "out" / "model_index.json").unlink()
    more = {**SETTINGS, "fidelity_samples": 1, "max_train_steps": 2, "resume_from_checkpoint": "latest"}
    with pytest.raises(dt.UserError, match="fidelity_samples 2 -> 1"):
        train(teacher, shards, tmp_path / "out", **more)


def test_a_stream_is_measured_on_its_first_rows(tmp_path: Path, teacher: Path, shards: Path) -> None:
    """Which are trained on too; whatever the number of processes that share it."""
    import datasets

    columns = {
        "image": [{"bytes": image, "path": None} for image, _ in toy_images(8)],
        "text": [text for _, text in toy_images(8)],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "table" / "train.parquet")
    settings = {**SETTINGS, "dataset_name": tmp_path / "table", "streaming": True, "fidelity_samples": 3}
    train(teacher, None, tmp_path / "out", **settings, max_train_steps=1, cache_dir=tmp_path / "cache")
    (folder,) = (tmp_path / "out").glob("fidelity-*")
    assert json.loads((folder / "samples.json").read_text())["captions"] == columns["text"][:3]


def test_captions_alone_are_measured_beside_those_that_are_trained_on(tmp_path: Path, teacher: Path) -> None:
    pool = tmp_path / "captions.txt"
    pool.write_text("".join(f"a red circle {letter}\n" for letter in "abcdefghijklmnopqrstuvwx"))
    settings = {**SETTINGS, "teacher_latents": 20, "caption_pool": pool, "teacher_latents_steps": 1}
    train(teacher, None, tmp_path / "out", **settings, max_train_steps=1)
    (folder,) = (tmp_path / "out-latents").glob("fidelity-*")
    measured = json.loads((folder / "samples.json").read_text())["captions"]
    (made,) = (path.parent for path in (tmp_path / "out-latents").glob("*/manifest.json"))
    rows = dt.data.ShardFolder(made)
    assert len(measured) == 2 and len(rows) == 20
    assert not set(measured) & {row["text"][0] for row in rows}


# ----------------------------------------------------------------------------------------------------------------
# --evaluate.


def make_clip(folder: Path) -> Path:
    """A tiny CLIP model, as transformers saves it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"text_config": text | {"vocab_size": 54, "max_position_embeddings": 16, "eos_token_id": 1},
              "vision_config": text | {"image_size": 32, "patch_size": 16}, "projection_dim": 8}  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(**config)).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**sizes), make_tokenizer()).save_pretrained(folder)
    return folder


def test_a_report_compares_students(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline and a checkpoint with an average, by captions alone, with everything that there is."""
    shards = write_shards(tmp_path / "shards", toy_images(20))
    train(
        teacher,
        shards,
        tmp_path / "out",
        distill_level="sd_tiny",
        max_train_steps=2,
        checkpointing_steps=1,
        use_ema=True,
    )
    pool = tmp_path / "captions.txt"
    pool.write_text("a red circle\na blue square\na green circle\n")
    students = [tmp_path / "out", tmp_path / "out" / "checkpoint-1"]
    line = ["--pretrained_model_name_or_path", teacher, "--caption_pool", pool, "--resolution", 64, "--evaluate"]
    line += [*students, "--clip_model_name_or_path", make_clip(tmp_path / "clip"), "--student_num_inference_steps", 8]
    record = evaluate(monkeypatch, tmp_path / "report", *line, "--student_guidance_scale", 2)
    costs = record["costs"]
    level = dt.build_student(UNet2DConditionModel.from_pretrained(teacher, subfolder="unet"), "sd_tiny")
    assert costs[str(students[0])]["parameters"] == dt.count_parameters(level) < costs["teacher"]["parameters"]
    assert costs[str(students[0])]["GMACs"] < costs["teacher"]["GMACs"] and costs[str(students[0])]["time"] > 0
    assert set(record["averages"]["teacher"]) == {"CLIP score"}
    named = {*dt.MEASURES, "PSNR", "SSIM", "CLIP score", *(f"drift at {share}%" for share in (25, 50, 75, 100))}
    for student in students:
        assert set(record["averages"][str(student)]) == named
        assert all(len(record["samples"][str(student)][name]) == 3 for name in named)
    assert list(record["differences"]) == [f"{students[0]} - {students[1]}"]
    text = (tmp_path / "report" / "report.md").read_text()
    assert "3 samples at 64 pixels" in text and "Paired differences" in text
    grid = Image.open(tmp_path / "report" / "grid.png")
    assert grid.size == (3 * 64, 3 * 64) and (tmp_path / "report" / "report.png").stat().st_size > 10_000
    # The checkpoint's student is its average.
    average = UNet2DConditionModel.from_pretrained(students[1], subfolder="unet_ema")
    args = dt.parse_args([*map(str, line), "--output_dir", str(tmp_path / "other")])
    assert same_tensors(dt.load_student(args, str(students[1])), average)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["--learning_rate", "1", "--use_ema"], "--learning_rate has no meaning with --evaluate."),
        (["--use_ema"], "--use_ema has no meaning with --evaluate."),
        (["--student_num_inference_steps", "0"], "--student_num_inference_steps must be at least 4, got 0."),
        (["--output_dir", "{here}"], "--output_dir {here} is there already: a report needs a new folder."),
        (["--fidelity_samples", "0"], "--evaluate needs --fidelity_samples."),
    ],
)
def test_what_evaluate_takes(
    tmp_path: Path, teacher: Path, shards: Path, capsys: pytest.CaptureFixture[str], line: list[str], sentence: str
) -> None:
    given = [
        "--pretrained_model_name_or_path",
        str(teacher),
        "--train_data_dir",
        str(shards),
        "--evaluate",
        str(teacher),
    ]
    (tmp_path / "notes.txt").write_text("a user's")
    with pytest.raises(SystemExit, match="2"):
        dt.parse_args([*given, "--output_dir", str(tmp_path / "new"), *(word.format(here=tmp_path) for word in line)])
    assert sentence.format(here=tmp_path) in capsys.readouterr().err


def test_a_bad_student_is_named_before_anything_is_measured(tmp_path: Path, teacher: Path, shards: Path) -> None:
    line = ["--pretrained_model_name_or_path", teacher, "--train_data_dir", shards, "--resolution", 64]
    wide = tmp_path / "wide"
    config = UNet2DConditionModel.load_config(teacher, subfolder="unet") | {"cross_attention_dim": 24}
    UNet2DConditionModel.from_config(config).save_pretrained(wide / "unet")
    (tmp_path / "empty").mkdir()
    for student, sentence in (
        (tmp_path / "empty", "--evaluate .*empty .unet. cannot be loaded"),
        (wide, "--evaluate .*wide takes 4 channels and 24 numbers a token, its teacher takes 4 channels and 16"),
        ("no/such", "--evaluate no/such"),
    ):
        args = dt.parse_args([*map(str, [*line, "--evaluate", teacher, student, "--output_dir", tmp_path / "report"])])
        with pytest.raises(dt.UserError, match=sentence):
            dt.main(args)
        assert not (tmp_path / "report").exists()


def test_flags_of_the_report_alone_are_refused_in_training(
    teacher: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        dt.parse_args([*flags(teacher, shards, Path("unused")), "--student_guidance_scale", "3"])
    assert "--student_guidance_scale has no meaning without --evaluate." in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        dt.parse_args([*flags(teacher, shards, Path("unused"), fidelity_samples=0), "--load_best_model_at_end"])
    assert "--load_best_model_at_end needs --fidelity_samples." in capsys.readouterr().err
