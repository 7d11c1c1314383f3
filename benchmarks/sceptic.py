"""Does the student gain from pool images that look like the test set? Accuracy against the strictness of the leak check.

    python -m benchmarks.sceptic recipes/demo.yaml --entry ssld --seeds 0 1 --out docs/sceptic-demo

The pool is searched once. For each strictness and seed it is cleaned, scored, selected from and distilled on, and `--entry` of
`evaluate` is measured, in a folder of its own under .scratch/sceptic/ (see benchmarks.seeds). Validation images of which the
check found a copy in the pool are counted apart. Writes a table (.md) and a plot (.svg). A repeated command goes on where the
last one stopped.
"""

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from benchmarks import seeds
from pipeline.leaks import findings
from pipeline.leaks.decision import Dedup
from pipeline.report import evaluation

LEVELS: tuple[str, ...] = get_args(get_type_hints(Dedup)["strictness"])


class Point(NamedTuple):
    """A strictness with one seed: size of the cleaned pool, and accuracies in percent by group of validation images."""

    kept: int
    top1: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--entry", required=True, help="of `evaluate`: the student to measure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, sharing the cores")
    parser.add_argument("--commit", default="HEAD", help="the code to run")
    parser.add_argument("--out", type=Path, required=True, help="the table and the plot, without the ending")
    args = parser.parse_args()
    params = yaml.safe_load(args.recipe.read_text())
    if args.entry not in params["evaluate"]:
        sys.exit(f"{args.recipe} has no `evaluate.{args.entry}`; it has {', '.join(params['evaluate'])}.")
    cores = seeds.usable_cores()
    folders = {
        (level, seed): seeds.workspace(
            f"sceptic/{args.recipe.stem}-{level}-{seed}",
            params | {"seed": seed, "dedup": {**params["dedup"], "strictness": level}},
            max(1, cores // args.jobs),
            args.commit,
        )
        for seed in args.seeds
        for level in LEVELS
    }
    start = time.monotonic()
    seeds.reproduce(folders[LEVELS[0], args.seeds[0]], "search")  # it depends on neither: the other runs find it in the cache
    for level in LEVELS:  # nor does this on the seed
        seeds.reproduce(folders[level, args.seeds[0]], "dedup")
    for seed in args.seeds:  # the teacher does not depend on the strictness
        seeds.reproduce(folders[LEVELS[0], seed], f"evaluate@{args.entry}")
    with ThreadPoolExecutor(args.jobs) as jobs:
        list(jobs.map(lambda folder: seeds.reproduce(folder, f"evaluate@{args.entry}"), folders.values()))
    leaked = with_a_leak(folders[LEVELS[0], args.seeds[0]])
    points = {at: measured(folder, args.entry, leaked) for at, folder in folders.items()}
    command = f"python -m benchmarks.sceptic {args.recipe} --entry {args.entry} --seeds {' '.join(map(str, args.seeds))}"
    head = f"`{command}`\n\n{len(leaked):,} validation images had a copy in the pool. {seeds.machine()}; "
    text = f"{head}{time.monotonic() - start:,.0f} s in all.\n\n{table(points, args.seeds)}"
    print(text)
    args.out.with_suffix(".md").write_text(text)
    plot(points, args.seeds, f"{args.recipe.stem}: {args.entry}", args.out.with_suffix(".svg"))


def with_a_leak(folder: Path) -> pa.Array:
    """Ids of the validation images of which a copy was in the pool: the findings are the same at every strictness."""
    audit = findings.read(folder / "data" / "dedup" / "leaks")
    where = pc.and_(pc.equal(audit["relation"], "pool-val"), pc.equal(audit["outcome"], "copy"))
    return audit["match_id"].filter(where).drop_null().unique()


def measured(folder: Path, entry: str, leaked: pa.Array) -> Point:
    predictions = evaluation.read_predictions(folder / "data" / "evaluate" / entry)
    right = pc.equal(predictions["label"], predictions["predicted"]).cast(pa.float64())
    copied = pc.is_in(predictions["id"], leaked)
    groups = {"all": right, "with a leak": right.filter(copied), "without": right.filter(pc.invert(copied))}
    kept = json.loads((folder / "data" / "dedup" / "metrics.json").read_text())["kept"]
    return Point(kept, {name: 100 * pc.mean(of).as_py() for name, of in groups.items() if len(of)})


def table(points: dict[tuple[str, int], Point], of_seeds: list[int]) -> str:
    """Markdown: a row per strictness; accuracies in percent as mean ± sample standard deviation over the seeds."""
    groups = list(next(iter(points.values())).top1)
    heads = ["strictness", "pool", *(f"val top-1 %, {group}" for group in groups)]
    lines = [f"| {' | '.join(heads)} |", "| --- " + "| ---: " * (len(heads) - 1) + "|"]
    for level in LEVELS:
        at = [points[level, seed] for seed in of_seeds]
        lines.append(f"| {level} | {at[0].kept:,} | {' | '.join(seeds.spread([p.top1[g] for p in at]) for g in groups)} |")
    return "\n".join(lines) + "\n"


def plot(points: dict[tuple[str, int], Point], of_seeds: list[int], title: str, file: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for group in next(iter(points.values())).top1:
        values = [[points[level, seed].top1[group] for seed in of_seeds] for level in LEVELS]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        axes.errorbar(LEVELS, [statistics.mean(v) for v in values], spread, marker="o", capsize=3, label=group)
    axes.set(xlabel="strictness of the leak check", ylabel="val top-1 %", title=title)
    axes.legend(title="validation images")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
