#!/usr/bin/env python
"""How well the tiny student paints what the caption says, and what distilling adds to training alone.

    python tests/measure_quality.py --output_dir quality

runs the README's quickstart once for every seed, and once more with the task loss alone (same steps, schedule, data
order and noise), lets the judge of `make_tiny_sd.py` read the images of teacher, pruned student and both trained
students (the held-out prompts, 20 steps of DPM-Solver++, the same noise for all), and writes
`quality/quality.json` and the table in tests/RESULTS.md.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from make_tiny_sd import caption_accuracy, evaluation_prompts
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import distill_training  # noqa: E402

VARIANTS = {
    "distilled (task + output + feature)": [],
    "task loss alone": ["--output_weight", "0", "--feature_weight", "0"],
}


def quickstart_flags() -> list[str]:
    """The flags of `distill_training.py` in the README's quickstart."""
    block = re.search(r"<!-- quickstart -->\s*```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    words = shlex.split(block.replace("\\\n", " "))
    return words[words.index("distill_training.py") + 1 :]


def train(flags: Sequence[str], output_dir: Path) -> float:
    """One run in a process of its own, without images; returns its seconds."""
    started = time.perf_counter()
    line = [sys.executable, "distill_training.py", *quickstart_flags(), *flags, "--output_dir", str(output_dir)]
    log = output_dir.with_suffix(".log")
    with open(log, "w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        sys.exit(f"{shlex.join(line)} failed, see {log}")
    return time.perf_counter() - started


def pruned_student(teacher: StableDiffusionPipeline, level: str) -> StableDiffusionPipeline:
    parts = teacher.components | {"unet": distill_training.build_student(teacher.unet, level)}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def markdown(results: dict[str, dict[int, float]]) -> str:
    """Means over the seeds with the lowest and the highest, as a table."""
    lines = ["| | caption accuracy, mean | lowest to highest |", "|---|---|---|"]
    for name, by_seed in results.items():
        values = list(by_seed.values())
        lines.append(f"| {name} | {statistics.mean(values):.1%} | {min(values):.1%} to {max(values):.1%} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir).resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    settings = distill_training.parse_args([*quickstart_flags(), "--output_dir", str(output_dir / "unused")])
    prompts = evaluation_prompts()
    names = ["teacher", "pruned, not trained", *VARIANTS]
    print(
        f"{len(args.seeds)} seeds x {len(VARIANTS)} runs of {settings.max_train_steps} steps, {len(prompts)} prompts"
    )
    results: dict[str, dict[int, float]] = {name: {} for name in names}
    seconds: dict[str, dict[int, float]] = {name: {} for name in VARIANTS}

    # 1. Teacher and pruned student.
    teacher = DiffusionPipeline.from_pretrained(ROOT / settings.pretrained_model_name_or_path)
    teacher.set_progress_bar_config(disable=True)
    pruned = pruned_student(teacher, settings.distill_level)
    for seed in args.seeds:
        results["teacher"][seed] = caption_accuracy(teacher, prompts, seed)["all"]
        results["pruned, not trained"][seed] = caption_accuracy(pruned, prompts, seed)["all"]

    # 2. The trained students.
    for seed, (name, flags) in tqdm([(seed, variant) for seed in args.seeds for variant in VARIANTS.items()]):
        folder = output_dir / f"{'distilled' if not flags else 'task-only'}-{seed}"
        seconds[name][seed] = train([*flags, "--seed", str(seed)], folder)
        results[name][seed] = caption_accuracy(DiffusionPipeline.from_pretrained(folder), prompts, seed)["all"]
        print(f"\n{name}, seed {seed}: {results[name][seed]:.1%} in {seconds[name][seed]:.0f} s", flush=True)

    # 3. What came out.
    record = {
        "results": results,
        "seconds": seconds,
        "steps": settings.max_train_steps,
        "prompts": len(prompts),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }
    (output_dir / "quality.json").write_text(json.dumps(record, indent=2))
    print(markdown(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Caption accuracy of teacher and students.")
    parser.add_argument("--output_dir", default="quality", help="Where the trained students and quality.json go.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds of training and of painting.")
    main(parser.parse_args())
