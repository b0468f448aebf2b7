#!/usr/bin/env python
"""How well the tiny student paints what the caption says, and what distilling adds to training alone.

    python tests/measure_quality.py --output_dir quality

runs the README's quickstart once for every seed, and once more for each of `VARIANTS` (same steps, schedule, data
order and noise), lets the judge of `make_tiny_sd.py` read the images of teacher, pruned student and all trained
students (the held-out prompts, 20 steps of DPM-Solver++, the same noise for all), compares their predictions with the
teacher's (`guided_errors`), and writes `quality/quality.json` and the table in tests/RESULTS.md.
"""

import argparse
import json
import math
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
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline
from make_tiny_sd import caption, caption_accuracy, evaluation_prompts
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import distill_training  # noqa: E402

VARIANTS = {
    "distilled (task + output + feature)": [],
    "task loss alone": ["--output_weight", "0", "--feature_weight", "0"],
    "distilled, no empty prompts": ["--proportion_empty_prompts", "0"],
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


@torch.no_grad()
def guided_errors(
    teacher: StableDiffusionPipeline, student: StableDiffusionPipeline, prompts: Sequence[str], seed: int
) -> dict[str, float]:
    """How far a student is from its teacher under guidance 3, in 20 steps of DPM-Solver++ from the same noise.

    `guided error`: of the guided prediction on the teacher's own states, over the teacher's variance, the geometric
    mean over the states. `drift`: |z_student - z_teacher| / |z_teacher| of the final latents, each on its own path.
    """
    tokens = teacher.tokenizer([*[""] * len(prompts), *prompts], padding="max_length", truncation=True)
    text = teacher.text_encoder(torch.tensor(tokens.input_ids))[0]
    noise = torch.randn((len(prompts), 4, 8, 8), generator=torch.Generator().manual_seed(seed))

    def guided(unet: torch.nn.Module, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        empty, caption = unet(torch.cat([latents, latents]), timestep, text).sample.chunk(2)
        return empty + 3 * (caption - empty)

    finals, errors = [], []
    for unet in (teacher.unet, student.unet):
        scheduler = DPMSolverMultistepScheduler.from_config(teacher.scheduler.config)
        scheduler.set_timesteps(20)
        latents = noise
        for timestep in scheduler.timesteps:
            prediction = guided(unet, latents, timestep)
            if unet is teacher.unet:
                error = (guided(student.unet, latents, timestep) - prediction).square().mean() / prediction.var()
                errors.append(float(error))
            latents = scheduler.step(prediction, timestep, latents).prev_sample
        finals.append(latents.flatten(1))
    drift = (finals[1] - finals[0]).norm(dim=1) / finals[0].norm(dim=1)
    # The geometric mean, since the plain one is ruled by the last states; of the teacher itself it is 0.
    geometric = math.exp(statistics.mean(map(math.log, errors))) if min(errors) > 0 else 0.0
    return {"guided error": geometric, "drift": float(drift.mean())}


def judged(teacher: StableDiffusionPipeline, student: StableDiffusionPipeline, seed: int) -> dict[str, float]:
    """Caption accuracy on the held-out prompts, and `guided_errors`."""
    triples = evaluation_prompts()
    student.set_progress_bar_config(disable=True)
    errors = guided_errors(teacher, student, [caption(*triple) for triple in triples], seed)
    return {"accuracy": caption_accuracy(student, triples, seed)["all"]} | errors


def markdown(results: dict[str, dict[int, dict[str, float]]]) -> str:
    """Means over the seeds with the lowest and the highest, as a table."""
    lines = ["| | caption accuracy | guided error | drift |", "|---|---|---|---|"]
    for name, by_seed in results.items():
        cells = []
        for measure in ("accuracy", "guided error", "drift"):
            values = [found[measure] for found in by_seed.values()]
            cells.append(f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir).resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    settings = distill_training.parse_args([*quickstart_flags(), "--output_dir", str(output_dir / "unused")])
    names = ["teacher", "pruned, not trained", *VARIANTS]
    print(f"{len(args.seeds)} seeds x {len(VARIANTS)} runs of {settings.max_train_steps} steps")
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    seconds: dict[str, dict[int, float]] = {name: {} for name in VARIANTS}

    # 1. Teacher and pruned student.
    teacher = DiffusionPipeline.from_pretrained(ROOT / settings.pretrained_model_name_or_path)
    teacher.set_progress_bar_config(disable=True)
    pruned = pruned_student(teacher, settings.distill_level)
    for seed in args.seeds:
        results["pruned, not trained"][seed] = judged(teacher, pruned, seed)
        results["teacher"][seed] = judged(teacher, teacher, seed)

    # 2. The trained students.
    for seed, (name, flags) in tqdm([(seed, variant) for seed in args.seeds for variant in VARIANTS.items()]):
        folder = output_dir / f"{re.sub(r'[^a-z]+', '-', name)}-{seed}"
        seconds[name][seed] = train([*flags, "--seed", str(seed)], folder)
        results[name][seed] = judged(teacher, DiffusionPipeline.from_pretrained(folder), seed)
        print(f"\n{name}, seed {seed}: {results[name][seed]} in {seconds[name][seed]:.0f} s", flush=True)

    # 3. What came out.
    record = {
        "results": results,
        "seconds": seconds,
        "steps": settings.max_train_steps,
        "prompts": len(evaluation_prompts()),
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
