#!/usr/bin/env python
"""Which weights, features and empty prompts bring the tiny student closest, and how well the meter tells them apart.

    python tests/measure_recipes.py --output_dir recipes --jobs 2

trains students with the flags of the README's quickstart, `CANDIDATES` and seeds, 300 steps each, and reads what the
trainer's own meter wrote every 75 steps. Same seed, same draws: recipes are compared with the first one by a paired
t-test over seeds, on the logarithm of the headline, with Holm's correction. `ruler` then says for each measure how far
recipes are apart against the spread of seeds, and how many samples tell two of them apart. What is no flag is a patch
of the trainer, in `PATCHES`. Both tables go to `recipes/recipes.md`.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from measure_quality import quickstart_flags
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import distill_training as dt  # noqa: E402

STEPS, EVERY, SAMPLES = 300, 75, 32
CANDIDATES: dict[str, list[str]] = {
    "task 1, output 0.5, feature 0.5 (default)": [],
    "task 0, output 1.5": ["--task_weight", "0", "--output_weight", "1.5"],
    "output 1": ["--output_weight", "1"],
    "feature 0.1": ["--feature_weight", "0.1"],
    "feature 2": ["--feature_weight", "2"],
    "0 % empty prompts": ["--proportion_empty_prompts", "0"],
    "20 % empty prompts": ["--proportion_empty_prompts", "0.2"],
    "35 % empty prompts": ["--proportion_empty_prompts", "0.35"],
    "guided term": ["--task_weight", "0", "--output_weight", "1.5"],
    "attention outputs as features": [],
    "features over the teacher's mean square, by channel": [],
    "output alone": ["--task_weight", "0", "--output_weight", "1", "--feature_weight", "0"],
    "task, hardly distilled": ["--output_weight", "0.001", "--feature_weight", "0"],
}
# What takes the place of a part of the trainer, which is known as `dt`.
PATCHES = {
    # Of a batch of 16 passes 8 latents with their captions, and the same with the empty one: the guided prediction's
    # error, w (s_c - t_c) - (w - 1) (s_u - t_u), beside the plain one.
    "guided term": """
import torch, random
whole, w = dt.losses_of, 3.0

def losses_of(run, batch, generator):
    half = len(batch["input_ids"]) // 2
    empty = dt.tokenize_captions([""], run.tokenizer, random.Random()).expand(half, -1)
    doubled = {name: torch.cat([part[:half], part[:half]]) for name, part in batch.items() if name != "counts"}
    doubled["input_ids"] = torch.cat([batch["input_ids"][:half], empty])
    randn, randint = torch.randn, torch.randint
    def twice(draw, shape, where):
        def drawn(*args, **settings):
            args = list(args)
            args[where] = (half, *shape(args)[1:])
            return draw(*args, **settings).repeat(2, *[1] * (len(args[where]) - 1))
        return drawn
    torch.randn = twice(randn, lambda args: tuple(args[0]), 0)
    torch.randint = twice(randint, lambda args: tuple(args[2]), 2)
    loss = run.loss_function
    def guided(student, teacher, *more, **weights):
        terms = loss(student, teacher, *more, **weights)
        apart = student.float() - teacher.float()
        caption, none = apart.chunk(2)
        term = (w * caption - (w - 1) * none).square().mean() / (w * w + (w - 1) ** 2)
        return terms | {"loss": terms["loss"] + weights["output_weight"] * term}
    run.loss_function = guided
    try:
        return whole(run, doubled, generator)
    finally:
        run.loss_function, torch.randn, torch.randint = loss, randn, randint

dt.losses_of = losses_of
""",
    "attention outputs as features": """
import dataclasses
row = dt.DISTILL_LEVELS[level]
pairs = [(f"down_blocks.{i}.attentions.0",) * 2 for i in range(3)]
for block in range(3):
    up, mine = f"up_blocks.{block + 1}.attentions", f"up_blocks.{block + 1 - row.removed_levels}.attentions"
    pairs += [(f"{up}.0", f"{mine}.0"), (f"{up}.2", f"{mine}.1")]
dt.DISTILL_LEVELS[level] = dataclasses.replace(row, feature_pairs=tuple(pairs))
""",
    "features over the teacher's mean square, by channel": """
whole = dt.distillation_loss

def normalised(student, teacher, target, mine, theirs, **weights):
    squares = [each.float().square().mean((0, 2, 3), keepdim=True) for each in theirs]
    scales = [each.clamp(min=0.1 * each.mean().item()).rsqrt() for each in squares]
    mine, theirs = ([each * scale for each, scale in zip(side, scales, strict=True)] for side in (mine, theirs))
    return whole(student, teacher, target, mine, theirs, **weights)

dt.distillation_loss = normalised
""",
}
RUN = """
import sys
sys.path.insert(0, {root!r})
import distill_training as dt
level = {level!r}
{patch}
dt.main(dt.parse_args(sys.argv[1:]))
"""


def train(name: str, seed: int, level: str, folder: Path) -> list[dict]:
    """The meter's rows of one run, in a process of its own; from its folder where it is done."""
    output = folder / f"{level}-{list(CANDIDATES).index(name)}-{seed}"
    if not (output / "model_index.json").exists():
        line = [*quickstart_flags(), "--pretrained_model_name_or_path", str(ROOT / "tests/tiny-sd"), *CANDIDATES[name]]
        line += ["--train_data_dir", str(ROOT / "tests/shapes/train"), "--cache_latents", "--report_to", "none"]
        line += ["--latents_cache_dir", str(folder / "latents"), "--distill_level", level, "--seed", str(seed)]
        line += ["--max_train_steps", str(STEPS), "--validation_steps", str(EVERY), "--output_dir", str(output)]
        line += ["--fidelity_samples", str(SAMPLES), "--checkpointing_steps", "1000"]
        at = line.index("--validation_prompts")
        del line[at : at + 5]
        code = RUN.format(root=str(ROOT), level=level, patch=PATCHES.get(name, ""))
        with open(output.with_suffix(".log"), "w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run([sys.executable, "-c", code, *line], stdout=log, stderr=log, env=environment)
        if done.returncode:
            sys.exit(f"{name}, seed {seed} failed, see {log.name}")
    return json.loads((output / "fidelity.json").read_text())["rows"]


def p_value(differences: Sequence[float]) -> float:
    """Two-sided, of a paired t-test: the area beyond |t| under Student's density."""
    if len(differences) < 2:
        return math.nan
    n, spread = len(differences), statistics.stdev(differences)
    t = abs(statistics.mean(differences)) / (spread / math.sqrt(n)) if spread else math.inf
    x, freedom = np.linspace(0, t if math.isfinite(t) else 1e6, 200_001), n - 1
    factor = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    return max(1 - 2 * float(np.trapezoid(factor * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x)), 0.0)


def holm(values: dict[str, float]) -> dict[str, float]:
    """Holm's correction of several p values."""
    found, highest = {}, 0.0
    for rank, (name, value) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        highest = max(highest, min(value * (len(values) - rank), 1.0))
        found[name] = highest
    return found


def recipe_table(rows: dict[str, dict[int, list[dict]]]) -> str:
    """A line for each recipe: the headline at the end, and how it stands to the first one's."""
    first, *others = rows
    ends = {name: {seed: found[-1] for seed, found in by_seed.items()} for name, by_seed in rows.items()}
    logs = {
        name: {seed: math.log(row[dt.HEADLINE]) for seed, row in by_seed.items()} for name, by_seed in ends.items()
    }
    apart = {name: [logs[name][seed] - logs[first][seed] for seed in logs[name]] for name in others}
    corrected = holm({name: p_value(each) for name, each in apart.items()})
    lines = [f"| recipe | {' | '.join(dt.MEASURES)} | {dt.HEADLINE} against the default | p (Holm) |", "|---|" * 3]
    lines[1] = "|---" * (len(dt.MEASURES) + 3) + "|"
    for name, by_seed in ends.items():
        cells = []
        for measure in dt.MEASURES:
            values = [row[measure] for row in by_seed.values()]
            cells.append(f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
        change = f"{math.expm1(statistics.mean(apart[name])):+.1%}" if name in apart else ""
        p = f"{p_value(apart[name]):.3g} ({corrected[name]:.3g})" if name in apart else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {change} | {p} |")
    return "\n".join(lines)


def ruler_table(rows: dict[str, dict[int, list[dict]]]) -> str:
    """For each measure and step: the spread of recipes' means over that of seeds, and samples that tell two apart."""
    lines = [
        "| measure | step | recipes' sd over seeds' sd | samples for p < 0.05, median of pairs |",
        "|---|---|---|---|",
    ]
    for measure, step in itertools.product(dt.MEASURES, (75, 150, 300)):
        found = {
            name: {seed: next(row for row in each if row["step"] == step) for seed, each in by_seed.items()}
            for name, by_seed in rows.items()
        }
        logs = {name: [math.log(row[measure]) for row in by_seed.values()] for name, by_seed in found.items()}
        of_seeds = math.sqrt(statistics.mean(statistics.variance(values) for values in logs.values()))
        of_recipes = statistics.stdev(statistics.mean(values) for values in logs.values())
        needed = []
        for one, other in itertools.combinations(found, 2):
            errors = [dt.of_measure(next(iter(found[name].values()))["errors"], measure) for name in (one, other)]
            for count in (2, 4, 8, 16, 32):
                _, low, high = dt.bootstrap(*(each[:count] for each in errors))
                if low > 0 or high < 0:
                    break
            else:
                count = 64  # more than there were
            needed.append(count)
        lines.append(f"| {measure} | {step} | {of_recipes / of_seeds:.1f} | {statistics.median(needed):g} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    folder = Path(args.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    os.chdir(ROOT)
    runs = [(name, seed) for seed in args.seeds for name in args.recipes]
    print(f"{len(runs)} runs of {STEPS} steps, {args.jobs} at a time")
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(tqdm(pool.map(lambda run: train(*run, args.level, folder), runs), total=len(runs)))
    rows: dict[str, dict[int, list[dict]]] = {name: {} for name in args.recipes}
    for (name, seed), each in zip(runs, found, strict=True):
        rows[name][seed] = each
    text = f"{recipe_table(rows)}\n\n{ruler_table(rows)}\n"
    (folder / f"recipes-{args.level}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Which recipe brings the tiny student closest to its teacher.")
    parser.add_argument("--output_dir", default="recipes", help="Where students and tables go.")
    parser.add_argument("--level", default="sd_tiny", choices=list(dt.DISTILL_LEVELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time, one core each.")
    main(parser.parse_args())
