#!/usr/bin/env python
"""How close the tiny student comes to its teacher, by recipe: on captions that it saw, and on ones that it did not.

    python tests/measure_quality.py --output_dir quality

trains a student for every one of `RECIPES` and every seed, with the README's quickstart's flags (same steps, schedule
and noise; the same seed draws alike in all recipes). From images, latents and captions everything is held out that
`triples` calls unseen: some pairs of shape and colour, one whole shape and one whole colour. Only the caption pool of
random conditioning has them. Then `compared` measures each student, on seen captions, on unseen pairs and on unseen
concepts, and `quality/quality.json` and the tables of tests/RESULTS.md are written.
"""

import argparse
import json
import math
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline
from make_tiny_sd import Triple, all_triples, caption, caption_accuracy, repeat, training_triples, write_shards
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import distill_training  # noqa: E402

UNSEEN_SHAPE, UNSEEN_COLOR = "star", "magenta"
UNSEEN_PAIRS = {"circle": ("green", "white"), "square": ("blue", "black"), "triangle": ("red", "yellow")}
SAMPLES = 512  # images, or latents made by the teacher
IMAGES, LATENTS = ["--train_data_dir", "images", "--cache_latents"], ["--train_data_dir", "latents"]
POOL = ["--caption_pool", "captions.txt", "--random_conditioning", "5"]
STRONG = ["--output_weight", "1.5"]
RECIPES = {
    "images (task 1, output 0.5)": IMAGES,
    "images, random conditioning": IMAGES + POOL,
    "teacher's latents (task 0, output 0.5)": LATENTS,
    "teacher's latents, random conditioning": LATENTS + POOL,
    "teacher's latents (task 0, output 1.5)": LATENTS + STRONG,
    "teacher's latents (output 1.5), random conditioning": LATENTS + STRONG + POOL,
    "images, task alone": [*IMAGES, "--output_weight", "0", "--feature_weight", "0"],
    "images, no empty prompts": [*IMAGES, "--proportion_empty_prompts", "0"],
}
MEASURES = ("prediction error", "guided error", "drift", "accuracy")


def triples() -> dict[str, list[Triple]]:
    """All triples by what a student sees of them in images or latents; "seen" ones the teacher saw too."""

    def kind(triple: Triple) -> str:
        shape, color, _ = triple
        if shape == UNSEEN_SHAPE or UNSEEN_COLOR in triple:
            return "unseen concepts"
        return "unseen pairs" if color in UNSEEN_PAIRS[shape] else "seen"

    found: dict[str, list[Triple]] = {"seen": [], "unseen pairs": [], "unseen concepts": []}
    for triple in all_triples():
        found[kind(triple)].append(triple)
    found["seen"] = [triple for triple in found["seen"] if triple in training_triples()]
    return found


def quickstart_flags() -> list[str]:
    """The flags of `distill_training.py` in the README's quickstart, but for what it trains on."""
    block = re.search(r"<!-- quickstart -->\s*```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    words = shlex.split(block.replace("\\\n", " "))
    flags = words[words.index("distill_training.py") + 1 :]
    del flags[(at := flags.index("--train_data_dir")) : at + 2]
    flags.remove("--cache_latents")
    return flags


def train(flags: Sequence[str], output_dir: Path) -> float:
    """One run in a process of its own, paths beside its output; returns its seconds."""
    started = time.perf_counter()
    teacher = ["--pretrained_model_name_or_path", str(ROOT / "tests/tiny-sd")]
    line = [sys.executable, str(ROOT / "distill_training.py"), *quickstart_flags(), *teacher, *flags]
    line += ["--output_dir", str(output_dir)]
    log = output_dir.with_suffix(".log")
    with open(log, "w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, cwd=output_dir.parent, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        sys.exit(f"{shlex.join(line)} failed, see {log}")
    return time.perf_counter() - started


def pruned_student(teacher: StableDiffusionPipeline, level: str) -> StableDiffusionPipeline:
    parts = teacher.components | {"unet": distill_training.build_student(teacher.unet, level)}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


@torch.no_grad()
def compared(
    teacher: StableDiffusionPipeline, student: StableDiffusionPipeline, prompts: Sequence[str], seed: int
) -> dict[str, float | list[float]]:
    """How far a student is from its teacher, with guidance 3, in 20 steps of DPM-Solver++ from the same noise.

    `guided error`: of the guided prediction on the teacher's own states, over the teacher's variance.
    `prediction error`: of the prediction for the caption, over the teacher's variance, on the teacher's final latents
    with noise of the middle of each of ten bins of timesteps. Both as geometric means (plain ones are ruled by the
    least noise), and by state and bin. `drift`: |z_student - z_teacher| / |z_teacher| of the final latents, each on
    its own path.
    """
    tokens = teacher.tokenizer([*[""] * len(prompts), *prompts], padding="max_length", truncation=True)
    text = teacher.text_encoder(torch.tensor(tokens.input_ids))[0]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((len(prompts), 4, 8, 8), generator=generator)

    def guided(unet: torch.nn.Module, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        empty, caption = unet(torch.cat([latents, latents]), timestep, text).sample.chunk(2)
        return empty + 3 * (caption - empty)

    def error(theirs: torch.Tensor, ours: torch.Tensor) -> float:
        return float((ours - theirs).square().mean() / theirs.var())

    finals, by_state, by_timestep = [], [], []
    for unet in (teacher.unet, student.unet):
        scheduler = DPMSolverMultistepScheduler.from_config(teacher.scheduler.config)
        scheduler.set_timesteps(20)
        latents = noise
        for timestep in scheduler.timesteps:
            prediction = guided(unet, latents, timestep)
            if unet is teacher.unet:
                by_state.append(error(prediction, guided(student.unet, latents, timestep)))
            latents = scheduler.step(prediction, timestep, latents).prev_sample
        finals.append(latents)
    noise_scheduler, captions = DDPMScheduler.from_config(teacher.scheduler.config), text[len(prompts) :]
    for middle in range(50, 1000, 100):
        timesteps = torch.full((len(prompts),), middle)
        noisy_latents = noise_scheduler.add_noise(finals[0], torch.randn(noise.shape, generator=generator), timesteps)
        predictions = [pipe.unet(noisy_latents, timesteps, captions).sample for pipe in (teacher, student)]
        by_timestep.append(error(*predictions))
    teachers, students = (latents.flatten(1) for latents in finals)

    def geometric(errors: Sequence[float]) -> float:
        return math.exp(statistics.mean(map(math.log, errors))) if min(errors) > 0 else 0.0  # of the teacher itself

    return {
        "prediction error": geometric(by_timestep),
        "guided error": geometric(by_state),
        "drift": float(((students - teachers).norm(dim=1) / teachers.norm(dim=1)).mean()),
        "by timestep": by_timestep,
        "by state": by_state,
    }


def judged(teacher: StableDiffusionPipeline, student: StableDiffusionPipeline, seed: int) -> dict[str, dict]:
    """`compared` and the caption accuracy, for up to 48 captions of each kind of `triples`, always the same ones."""
    student.set_progress_bar_config(disable=True)
    found = {}
    for kind, all_of_it in triples().items():
        chosen = random.Random(0).sample(all_of_it, min(48, len(all_of_it)))
        found[kind] = compared(teacher, student, [caption(*triple) for triple in chosen], seed)
        found[kind]["accuracy"] = caption_accuracy(student, chosen, seed)["all"]
    return found


def markdown(results: dict[str, dict[int, dict[str, dict]]]) -> str:
    """For each kind of captions a table: means over the seeds, with the lowest and the highest."""
    lines = []
    for kind in triples():
        lines += ["", f"| {kind} | {' | '.join(MEASURES)} |", "|---|---|---|---|---|"]
        for name, by_seed in results.items():
            cells = []
            for measure in MEASURES:
                values = [found[kind][measure] for found in by_seed.values()]
                cells.append(f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_sources(output_dir: Path) -> None:
    """The images of what is seen, latents that the teacher makes for the same captions, the pool of all captions."""
    seen = repeat(triples()["seen"], SAMPLES)
    if not (output_dir / "images").exists():
        write_shards(output_dir / "images", seen, 10**8, per_shard=128)
    (output_dir / "seen.txt").write_text("".join(f"{caption(*triple)}\n" for triple in seen))
    (output_dir / "captions.txt").write_text("".join(f"{caption(*triple)}\n" for triple in all_triples()))
    flags = ["--teacher_latents", str(SAMPLES), "--caption_pool", "seen.txt", "--teacher_latents_guidance_scale", "3"]
    flags += ["--latents_cache_dir", "made", "--max_train_steps", "1", "--lr_warmup_steps", "0"]
    if not (output_dir / "latents").exists():
        train(flags, output_dir / "maker")
        (made,) = (path.parent for path in (output_dir / "made").glob("*/manifest.json"))
        made.rename(output_dir / "latents")


def main(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir).resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    os.chdir(ROOT)
    settings = distill_training.parse_args([*quickstart_flags(), "--train_data_dir", "tests/shapes/train"])
    print(f"{len(args.seeds)} seeds x {len(args.recipes)} runs of {settings.max_train_steps} steps")
    results: dict[str, dict[int, dict[str, dict]]] = {"pruned, not trained": {}}
    seconds: dict[str, dict[int, float]] = {}

    # 1. What is trained on, and the student before it is trained.
    write_sources(output_dir)
    teacher = DiffusionPipeline.from_pretrained(ROOT / settings.pretrained_model_name_or_path)
    teacher.set_progress_bar_config(disable=True)
    pruned = pruned_student(teacher, settings.distill_level)
    for seed in args.seeds:
        results["pruned, not trained"][seed] = judged(teacher, pruned, seed)
    print({kind: caption_accuracy(teacher, of_it, 0)["all"] for kind, of_it in triples().items()}, flush=True)

    # 2. The trained students.
    for seed, name in tqdm([(seed, name) for seed in args.seeds for name in args.recipes]):
        folder = output_dir / f"{list(RECIPES).index(name)}-{seed}"
        took = train([*RECIPES[name], "--seed", str(seed)], folder)
        seconds.setdefault(name, {})[seed] = took
        results.setdefault(name, {})[seed] = judged(teacher, DiffusionPipeline.from_pretrained(folder), seed)
        print(f"\n{name}, seed {seed}: {results[name][seed]} in {took:.0f} s", flush=True)

        # 3. What came out so far.
        record = {
            "results": results,
            "seconds": seconds,
            "steps": settings.max_train_steps,
            "captions": {kind: len(of_it) for kind, of_it in triples().items()},
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
        }
        (output_dir / "quality.json").write_text(json.dumps(record, indent=2))
    print(markdown(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How close students come to their teacher, by recipe.")
    parser.add_argument("--output_dir", default="quality", help="Where the trained students and quality.json go.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds of training and of painting.")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES), help="Which of them.")
    main(parser.parse_args())
