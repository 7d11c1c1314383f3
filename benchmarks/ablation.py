"""SSLD's ablation beside the paper's, and soft labels from a file beside a teacher in the loop, over several seeds.

    python -m benchmarks.ablation --seeds 0 1 2 --jobs 2 --out docs/ablation.md

Runs recipes/ablation.yaml as benchmarks.seeds runs a recipe. Times are those of the stages, which a seed ran one after another.
"""

import argparse
import re
import statistics
from pathlib import Path

from benchmarks import seeds
from pipeline.report.evaluation import Evaluation

RECIPE = seeds.ROOT / "recipes" / "ablation.yaml"
LADDER = (  # arXiv 2103.05959, MobileNetV3-large on ImageNet, top-1 in percent
    ("weak_teacher", "distilled on the labelled images, briefly", 75.60),
    ("better_teacher", "a better teacher", 76.00),
    ("symmetric", "the symmetric loss", 76.20),
    ("longer", "a longer schedule", 77.10),
    ("selected", "selected images of the pool", 78.50),
    ("finetune", "a fine-tune on the labelled images", 78.90),
)
CACHED = ("cached_1", "cached_4")
ONLINE = "selected"
Evaluations = dict[str, Evaluation]  # by entry


def main() -> None:
    seeds.tell("ablation", __doc__, measured)


def measured(args: argparse.Namespace) -> str:
    folders = seeds.repeat(RECIPE, args.seeds, args.jobs, args.commit)
    found = [seeds.evaluations(folder) for folder in folders]
    return f"{ladder(found)}\n{cached(found, [seconds(folder) for folder in folders])}\n{seeds.table(folders)}"


def top1(evaluations: list[Evaluations], entry: str) -> list[float]:
    """Percent of the validation images, of each seed."""
    return [100 * of_seed[entry].val.top1 for of_seed in evaluations]


def ladder(evaluations: list[Evaluations]) -> str:
    """Markdown: each step of the ablation, its gain over the step before, and the paper's."""
    lines = [
        "| entry | what changes | val top-1 % | each seed | over the row before | paper: top-1 % | over the row before |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    before: tuple[list[float], float] | None = None
    for entry, change, published in LADDER:
        found = top1(evaluations, entry)
        gains = seeds.signed([a - b for a, b in zip(found, before[0], strict=True)]) if before else ""
        theirs = f"{published - before[1]:+.2f}" if before else ""
        each = " / ".join(f"{v:.1f}" for v in found)
        lines.append(f"| {entry} | {change} | {seeds.spread(found)} | {each} | {gains} | {published:.2f} | {theirs} |")
        before = found, published
    return "\n".join(lines) + "\n"


def cached(evaluations: list[Evaluations], times: list[dict[str, float]]) -> str:
    """Markdown: accuracy and time of students of kept labels beside the student whose teacher runs with it."""
    lines = [
        "| entry | views kept of each image | val top-1 % | over online | labelling, s | training, s | both / online |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    online = top1(evaluations, ONLINE)
    training = [t[f"distil.{ONLINE}"] for t in times]
    lines.append(f"| {ONLINE} | online | {seeds.spread(online)} | | | {statistics.mean(training):,.0f} | |")
    for entry in CACHED:
        views = f"views_{entry.removeprefix('cached_')}"
        labelling, learning = [t[f"label.{views}"] for t in times], [t[f"distil.{entry}"] for t in times]
        ratios = [(a + b) / c for a, b, c in zip(labelling, learning, training, strict=True)]
        found = top1(evaluations, entry)
        gaps = seeds.signed([a - b for a, b in zip(found, online, strict=True)])
        lines.append(
            f"| {entry} | {views.removeprefix('views_')} | {seeds.spread(found)} | {gaps} | {statistics.mean(labelling):,.0f} "
            f"| {statistics.mean(learning):,.0f} | {statistics.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    return "\n".join(lines) + "\n"


def seconds(folder: Path) -> dict[str, float]:
    """The time of each stage, `distil.selected`, from the log of the seed's runs; of a stage that was resumed, its last part."""
    return {name: float(s) for name, s in re.findall(r"^(\S+): done in ([0-9.]+) s\.", (folder / "log.txt").read_text(), re.M)}


if __name__ == "__main__":
    main()
