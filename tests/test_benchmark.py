"""The benchmark runs at toy width and writes what it should; the figures themselves are not looked at."""

import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import benchmark
import pytest
import torch
from helpers import ROOT, make_tokenizer
from launcher import Launcher
from PIL import Image

import distill_training as dt

pytestmark = pytest.mark.xdist_group("benchmark")  # one process for all, which share the real architecture
WITHOUT_VAE = ("floor", "cached", "recipe", "random conditioning")
META = torch.device("meta")
PUBLISHED = {"teacher": 859_520_964, "sd_small": 579_384_964, "bk_small": 482_346_884, "sd_tiny": 323_384_964}
FLAGS = "--toy --device cpu --threads 1 --rounds 2 --level sd_tiny --precision no bf16 --output_dir".split()


def run_benchmark(
    what: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict:
    """What `benchmark.py <what> --toy` writes, measured in this process."""
    line = [what, *FLAGS, str(folder)]
    monkeypatch.setattr(sys, "argv", ["tests/benchmark.py", *line])
    monkeypatch.chdir(ROOT)
    benchmark.main(benchmark.parse_args(line))
    return read_benchmark(what, folder, capsys.readouterr().out)


def read_benchmark(what: str, folder: Path, printed: str) -> dict:
    record = json.loads((folder / f"{what}.json").read_text())
    text = (folder / f"{what}.md").read_text()
    for fact in (f"python tests/benchmark.py {what} --toy", torch.__version__, record["date"], record["device"]):
        assert fact in text
    assert "1 threads" in text and text in printed
    image = Image.open(folder / f"{what}.png")
    assert image.width == 1000 and len(image.getcolors(100_000)) > 2
    return record | {"text": text}


@pytest.fixture(scope="module")
def real_parts() -> dict:
    return benchmark.make_parts(False, META)


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    training = run_benchmark("training", tmp_path, monkeypatch, capsys)
    plain, half = training["results"]
    assert (plain["precision"], half["precision"]) == ("no", "bf16")
    assert set(benchmark.VARIANTS) - {"plain float32"} == plain["variants"].keys()
    assert "plain float32" in half["variants"] and "plain float32" not in plain["variants"]
    for result in (plain, half):
        flops = result["flops_per_image"]
        for name, row in result["variants"].items():
            assert len(row["seconds"]) == 2 and row["median_seconds"] == statistics.median(row["seconds"])
            assert row["images_per_second"] == pytest.approx(2 / row["median_seconds"])
            work = sum(flops.values()) - (flops["VAE encode"] if name in WITHOUT_VAE else 0)
            work = 50 * flops["teacher forward"] if name == "latents" else work
            precision = "no" if name == "plain float32" else result["precision"]
            achieved = row["share_of_matmul_peak"] * result["matmul_flops_per_second"][precision]
            assert achieved == pytest.approx(work * row["images_per_second"])
        for name in benchmark.RATIOS:
            left, right = name.split(" / ")
            if left in result["variants"] and right in result["variants"]:
                times = [result["variants"][side]["seconds"] for side in (left, right)]
                expected = [above / below for above, below in zip(*times, strict=True)]
                ratio = result["ratios"][name]
                assert ratio["pairs"] == pytest.approx(expected)
                assert ratio["min"] == min(ratio["pairs"]) <= ratio["median"] <= ratio["max"] == max(ratio["pairs"])
    assert benchmark.show_ratio(half["ratios"]["shards / floor with VAE"]) in training["text"]


def test_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record = run_benchmark("inference", tmp_path, monkeypatch, capsys)
    assert list(record["models"]) == list(PUBLISHED)
    for model in record["models"].values():
        assert 0 < model["macs_conv_linear"] < model["macs_with_attention"]
        for key in ("unet_batch_1", "unet_batch_2", "pipeline"):
            times = record["models"]["teacher"][key]["seconds"], model[key]["seconds"]
            pairs = [teacher / mine for teacher, mine in zip(*times, strict=True)]
            assert model[key]["times_as_fast_as_teacher"]["pairs"] == pytest.approx(pairs)
    assert [figure.partition(":")[0] for figure in benchmark.key_figures("inference", record)] == list(PUBLISHED)


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record = run_benchmark("memory", tmp_path, monkeypatch, capsys)
    assert len(record["rows"]) == len(benchmark.MEMORY_SETTINGS)
    assert {row["measured"] for row in record["rows"]} == {"not measured"}
    assert record["text"].count("not measured |") == len(record["rows"])
    figures = benchmark.key_figures("memory", record)
    assert len(figures) == len(record["rows"]) and all(figure.endswith(": not measured") for figure in figures)


def test_growth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], launcher: Launcher
) -> None:
    run_process = subprocess.run

    def fork(line: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        """The trainer's runs with the same flags and ranks, without the half minute that their imports take."""
        script = str(ROOT / "distill_training.py")
        if script not in line:
            return run_process(line, **settings)
        ranks, on_cpu = 2 if "torch.distributed.run" in line else 1, settings["env"]["ACCELERATE_USE_CPU"]
        flags = line[line.index(script) + 1 :]
        run = launcher.start(flags, tmp_path / f"log-{ranks}", ranks=ranks, ACCELERATE_USE_CPU=on_cpu)
        return subprocess.CompletedProcess(line, max(run.wait()), stdout="", stderr=run.log())

    monkeypatch.setattr(benchmark.subprocess, "run", fork)
    record = run_benchmark("growth", tmp_path, monkeypatch, capsys)
    assert {row["samples"] for row in record["starts"]} == {20, 40}
    assert all(len(rates) == 1 and rates[0] > 0 for rates in record["steps_per_second"].values())
    assert list(record["steps_per_second"]) == ["1", "2"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["training", "--rounds", "0"], "--rounds must be at least 1, got 0."),
        (["training", "--resolution", "100"], "--resolution must be a multiple of 64, got 100."),
        (["training", "--batch_size", "4", "0"], "--batch_size must be at least 1, got 0."),
        (["training", "--device", "cpu", "--profile"], "--profile looks at a GPU's kernels"),
        (["training", "--conv_1x1_as_mm"], "--conv_1x1_as_mm needs --compile."),
        (["gpu", "--device", "cpu"], "gpu needs --device cuda; --toy --device cpu shows that it runs."),
        (["compare", "--against", "none"], "needs --against with a folder that holds distill_training.py, got none."),
    ],
)
def test_bad_flags(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        benchmark.parse_args([*flags, "--output_dir", str(tmp_path)])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_all_is_each_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    code = 0

    def note(line: list[str]) -> subprocess.CompletedProcess:
        lines.append(line[1:])
        return subprocess.CompletedProcess(line, code)

    monkeypatch.setattr(benchmark.subprocess, "run", note)
    flags = [*FLAGS, str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["tests/benchmark.py", "all", *flags])
    benchmark.main(benchmark.parse_args(["all", *flags]))
    assert lines == [[benchmark.__file__, name, *flags] for name in ("training", "inference", "memory", "growth")]
    code = 3
    with pytest.raises(SystemExit) as caught:
        benchmark.main(benchmark.parse_args(["all", *flags]))
    assert caught.value.code == 3 and len(lines) == 5


def test_commands_of_the_gpu_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert list(benchmark.GPU_PARTS)[-1] == "pytest"
    for command in list(benchmark.GPU_PARTS.values())[:-1]:
        script, *words = shlex.split(command)
        args = benchmark.parse_args([*words, "--device", "cuda", "--output_dir", str(tmp_path)])
        assert script == "tests/benchmark.py" and args.what in benchmark.BENCHMARKS
        assert args.what != "training" or (args.compile and args.precision == ["bf16"] and "cached" in args.variants)


def test_gpu_parts_are_rows_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training part, one that fails, and tests, each in a real process."""
    broken = shlex.join(["-c", "raise ValueError('in two | parts')"])
    parts = {name: benchmark.GPU_PARTS[name] for name in ("recipe-16", "pytest")}
    (tmp_path / "test_gpu.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_it(): pytest.skip('no GPU')\n")
    parts["pytest"] = parts["pytest"].removesuffix("tests") + str(tmp_path / "test_gpu.py")
    monkeypatch.setattr(benchmark, "GPU_PARTS", {"recipe-16": parts["recipe-16"], "broken": broken, **parts})
    line = ["gpu", "--toy", "--device", "cpu", "--threads", "1", "--output_dir", str(tmp_path)]
    benchmark.main(benchmark.parse_args(line))
    rows = [json.loads(text) for text in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [row["part"] for row in rows] == ["recipe-16", "broken", "pytest"]
    training, failed, tests = (row["figures"] for row in rows)
    label = "sd_small, float32, batch 16"
    assert [figure.partition(": ")[0] for figure in training[:2]] == [f"{label}, cached", f"{label}, recipe"]
    assert [training[2].partition(": ")[0]] == ["time of recipe / cached"] and len(training) == 3
    assert rows[0]["record"]["results"][0]["variants"].keys() == {"cached", "recipe"}
    assert failed == ["exit code 1: ValueError: in two | parts"]
    assert tests[0].startswith("exit code 0: 1 skipped") and "no GPU" in tests[1]
    header, rule, *written = (tmp_path / "gpu.md").read_text().splitlines()
    assert header == "| date | commit | device | command | figures |" and len(written) == 3
    for row, text in zip(rows, written, strict=True):
        shown = [row["date"], row["commit"], row["device"], f"`{row['command']}`", "<br>".join(row["figures"])]
        assert [cell.strip() for cell in text.split("|")[1:-1]] == [cell.replace("|", "/") for cell in shown]
    before = [(tmp_path / name).read_bytes() for name in ("gpu.jsonl", "gpu.md")]
    capsys.readouterr()
    monkeypatch.setattr(benchmark, "measure_part", lambda command: pytest.fail(f"{command} ran again"))
    benchmark.main(benchmark.parse_args(line))
    assert capsys.readouterr().out.count("has its row.") == 3
    assert [(tmp_path / name).read_bytes() for name in ("gpu.jsonl", "gpu.md")] == before


def test_a_gpu_part_out_of_time_or_memory_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = shlex.join(["-c", "import os, time; os.fork(); time.sleep(90)"])
    large = shlex.join(["-c", "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')"])
    monkeypatch.setattr(benchmark, "GPU_PARTS", {"left out": "-c 1", "slow": slow, "large": large})
    line = ["gpu", "--toy", "--device", "cpu", "--output_dir", str(tmp_path), "--parts"]
    monkeypatch.setattr(benchmark, "PART_SECONDS", 1)
    monkeypatch.setattr(benchmark, "git_commit", lambda: "unknown")
    started = time.monotonic()
    benchmark.main(benchmark.parse_args([*line, "slow"]))
    assert time.monotonic() - started < 60
    monkeypatch.setattr(benchmark, "PART_SECONDS", 120)
    benchmark.main(benchmark.parse_args([*line, "slow", "large"]))
    rows = [json.loads(text) for text in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    found = {row["part"]: row["figures"] for row in rows}
    assert found == {"slow": ["out of time: ended after 1 s"], "large": ["out of memory"]} and len(rows) == 2
    nothing = {"results": []}  # where not even the first batch could be made
    assert benchmark.key_figures("training", nothing) == ["out of memory"]


def test_git_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert benchmark.git_commit() == "unknown"
    commit = "-c user.name=a -c user.email=a@b commit --quiet --allow-empty -m first".split()
    for line in (["init", "--quiet"], commit):
        subprocess.run(["git", *line], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert head.stdout.startswith(benchmark.git_commit()) and len(benchmark.git_commit()) >= 7


def test_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two checkouts take turns, in runs of their own with a cache of their own."""
    script = """import sys
from pathlib import Path

folder = Path(__file__).parent
runs = folder.parent / "runs"
with runs.open("a") as file:
    print(folder.name, *sys.argv[1:], file=file)
print("Steps per second =", RATE * len(runs.read_text().splitlines()))
"""
    for name, rate in (("here", 3), ("there", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "distill_training.py").write_text(script.replace("RATE", str(rate)))
    monkeypatch.setattr(benchmark, "ROOT", tmp_path / "here")
    line = ["compare", "--against", str(tmp_path / "there"), "--rounds", "3", "--steps", "7"]
    benchmark.main(benchmark.parse_args(line))
    runs = (tmp_path / "runs").read_text().splitlines()
    assert [run.split()[0] for run in runs] == ["here", "there", "there", "here", "here", "there"]
    caches = [
        {run.split("--latents_cache_dir ")[1] for run in runs if run.startswith(name)} for name in ("here", "there")
    ]
    assert [len(found) for found in caches] == [1, 1] and caches[0] != caches[1]
    assert all("--cache_latents" in run and "--max_train_steps 7 " in run for run in runs)
    # 3 * 1 / 2, 3 * 4 / 3 and 3 * 5 / 6.
    assert "Here / there, median (lowest to highest): 2.500 (1.500 to 4.000)" in capsys.readouterr().out
    assert benchmark.parse_args(line[:3]).rounds == 15


def test_results_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "memory.json").write_text("{}")
    assert benchmark.parse_args(["growth", "--output_dir", str(tmp_path)]).what == "growth"
    for what in ("memory", "all"):
        with pytest.raises(SystemExit):
            benchmark.parse_args([what, "--output_dir", str(tmp_path)])
        assert "holds memory.json already" in capsys.readouterr().err


def test_the_real_architecture(real_parts: dict) -> None:
    unets = benchmark.make_unets(real_parts["unet"], dt.DISTILL_LEVELS)
    assert {name: dt.count_parameters(unet) for name, unet in unets.items()} == PUBLISHED
    assert dt.count_parameters(real_parts["vae"]) == 83_653_863
    assert dt.count_parameters(real_parts["text_encoder"]) == 123_060_480
    assert real_parts["tokenizer"].model_max_length == 77


def test_flops_of_the_real_architecture(real_parts: dict) -> None:
    student = benchmark.make_unets(real_parts["unet"], ["sd_small"])["sd_small"]
    flops = {name: count / 1e9 for name, count in benchmark.step_flops(real_parts, student, 512).items()}
    assert flops["teacher forward"] == pytest.approx(803.27, abs=0.01)
    assert flops["student forward and backward"] == pytest.approx(1566.99, abs=0.01)
    assert flops["VAE encode"] == pytest.approx(1116.66, abs=0.01)
    assert flops["text encoder"] == pytest.approx(13.08, abs=0.25)  # published without attention's own products


def test_memory_arithmetic_of_the_real_architecture(real_parts: dict) -> None:
    settings = benchmark.MemorySettings(24, "sd_small", 4)
    estimate = benchmark.estimate_memory(settings, real_parts, 512)
    fixed = estimate["fixed"]
    assert fixed["student, float32"] == fixed["gradients"] == 4 * PUBLISHED["sd_small"]
    assert fixed["Adam's moments"] == 8 * PUBLISHED["sd_small"] and fixed["VAE, bf16"] == 0
    assert fixed["teacher, bf16"] == 2 * PUBLISHED["teacher"]
    # Autocast keeps a bf16 copy of nearly all weights for the backward pass, however many images there are.
    assert 0.9 < fixed["student's bf16 copies"] / (2 * PUBLISHED["sd_small"]) < 1
    assert estimate["total_bytes"] == estimate["fixed_bytes"] + 4 * estimate["image_bytes"]

    lean = benchmark.MemorySettings(24, "sd_small", 4, checkpointing=True, adam_8bit=True, cached=False)
    leaner = benchmark.estimate_memory(lean, real_parts, 512)
    assert leaner["image_bytes"] < 0.5 * estimate["image_bytes"]
    assert fixed["Adam's moments"] / leaner["fixed"]["Adam's moments"] == pytest.approx(4, rel=0.02)
    assert leaner["fixed"]["VAE, bf16"] == 2 * 83_653_863


def test_named_settings_fit_their_cards(real_parts: dict) -> None:
    for settings in benchmark.MEMORY_SETTINGS:
        estimate = benchmark.estimate_memory(settings, real_parts, 512)
        assert estimate["total_bytes"] < settings.card * benchmark.GIB - benchmark.CONTEXT_BYTES, settings


def test_saved_bytes_are_those_of_a_real_forward_pass(teacher: Path) -> None:
    config = benchmark.UNet2DConditionModel.load_config(teacher, subfolder="unet")
    config = dt.student_unet_config(config, "sd_small")
    student = benchmark.UNet2DConditionModel.from_config(config).train()
    known = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tap = dt.FeatureTap(student, [name for _, name in dt.DISTILL_LEVELS["sd_small"].feature_pairs])
    latents, text = torch.randn(3, 4, 8, 8), torch.randn(3, 16, 16, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            prediction = student(latents, torch.zeros(3, dtype=torch.int64), text).sample
        mine = tap.pop()
        dt.distillation_loss(
            prediction, latents, latents, mine, [torch.zeros_like(f) for f in mine], output_weight=1, feature_weight=1
        )
    real = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    counted, _ = benchmark.saved_bytes(json.dumps(config), "sd_small", 8, 16, 3, False)
    assert counted == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", "matmul"),
        ("sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "conv"),
        ("cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float>", "copies"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x80", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer, clipping"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies"),
        ("triton_poi_fused__to_copy_convolution_add_3", "norm, elementwise"),
        ("void at::native::RowwiseMomentsCUDAKernel<float>", "norm, elementwise"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("something new", "other"),
    ],
)
def test_kernel_kind(kernel: str, kind: str) -> None:
    assert benchmark.kernel_kind(kernel) == kind


def test_busy_time() -> None:
    assert benchmark.busy_time([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_take_turns() -> None:
    order = []
    variants = {
        name: benchmark.Variant(lambda name=name: order.append(name), lambda name=name: order.append(f"before {name}"))
        for name in "ab"
    }
    rows = benchmark.take_turns(variants, 2, 2, torch.device("cpu"), "turns")
    there, back = ["before a", "a", "a"], ["before b", "b", "b"]
    assert order == [*there, *back, *back, *there]
    assert {name: len(row["seconds"]) for name, row in rows.items()} == {"a": 2, "b": 2}


def test_shards_are_those_of_the_trainer(tmp_path: Path) -> None:
    shards = benchmark.write_shards(tmp_path / "shards", benchmark.make_jpegs(2, 40, 32), 5, per_shard=2)
    with_manifest = dt.data.ShardFolder(shards)
    (shards / "manifest.json").unlink()
    without = dt.data.ShardFolder(shards)
    assert len(with_manifest) == 5 and (with_manifest.places == without.places).all()
    assert without[4]["text"].startswith("an image of number 4")


def test_held_bytes_see_numpy_and_torch(tmp_path: Path) -> None:
    held, _ = benchmark.held_bytes(lambda: [torch.zeros(1000, 1000), bytes(10**6)])
    assert held == pytest.approx(5e6, rel=0.01)
    shards = benchmark.write_shards(tmp_path / "shards", benchmark.make_jpegs(1, 40, 32), 5)
    args = benchmark.trainer_args(shards, 32, train_batch_size=2, mixed_precision="no")
    accelerator = benchmark.make_accelerator(args, torch.device("cpu"))
    kept = benchmark.first_batch(args, make_tokenizer(), accelerator)
    assert kept[-1]["pixel_values"].shape == (2, 3, 32, 32)


def test_the_optimiser_serves_all_variants(tmp_path: Path) -> None:
    """A floor step, one of the trainer and a plain one in turn, on one optimiser state of which each takes a step."""
    parts = benchmark.make_parts(True, torch.device("cpu"))
    shards = benchmark.write_shards(tmp_path / "shards", benchmark.make_jpegs(4, 96, 72), 8)
    flags = {"distill_level": "sd_tiny", "mixed_precision": "bf16", "train_batch_size": 2}
    args = benchmark.trainer_args(shards, 64, **flags)
    run = benchmark.make_run(
        parts, benchmark.trainer_args(shards, 64, **flags, **benchmark.RECIPE), torch.device("cpu")
    )
    dataset = dt.make_train_dataset(args, parts["tokenizer"], run.accelerator)
    cached = dt.cache_latents(dataset, parts["vae"], args, run.accelerator)
    variants, _ = benchmark.training_variants(run, dataset, cached, args)
    steps = 0
    for name, variant in variants.items():
        before = [parameter.detach().clone() for parameter in run.unet.parameters()]
        averaged = run.ema_unet.optimization_step
        variant.prepare()
        variant.step()
        steps += name != "latents"
        trained = any(not torch.equal(a, b) for a, b in zip(before, run.unet.parameters(), strict=True))
        assert trained == (name != "latents")
        assert {int(state["step"]) for state in run.optimizer.optimizer.state.values()} == {steps}
        assert run.accelerator.sync_gradients  # nothing is left of a window
        is_recipe = name == "recipe"
        assert run.ema_unet.optimization_step == averaged + is_recipe
        assert run.unet.down_blocks[0].gradient_checkpointing == is_recipe
        assert variant.micro_batches == {"recipe": 4, "latents": 2 / 25}.get(name, 1)
    variants["plain float32"].prepare()
    assert run.teacher_unet.dtype is run.vae.dtype is torch.float32
    assert not run.optimizer.optimizer.param_groups[0]["fused"]
    variants["floor"].prepare()
    assert run.teacher_unet.dtype is run.vae.dtype is torch.bfloat16
    assert run.optimizer.optimizer.param_groups[0]["fused"]
    variants["plain float32"].prepare()
    benchmark.training_variants(run, dataset, cached, args)  # the next batch size, whatever the last turn left behind
    benchmark.drop(run)
