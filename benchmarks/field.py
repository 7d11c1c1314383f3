"""Few labels of CIFAR-10: winnow's rows beside the published ones of semi-supervised learning (USB, Wang et al. 2022).

    python -m benchmarks.field --seeds 0 1 2 --jobs 2 --out docs/field.md

Runs recipes/usb.yaml with 4, 25 and 400 labels a class to learn from, each as benchmarks.seeds runs a recipe. One more image a
class, or three, or 44, make the holdout that the stages ask for; nothing is chosen on it.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import yaml

from benchmarks import seeds
from pipeline.report.evaluation import Evaluation

RECIPE = seeds.ROOT / "recipes" / "usb.yaml"
LABELS = {4: 5, 25: 28, 400: 444}
"""Labels of a class to learn from: those that are drawn."""
OURS = (
    ("baseline", "labels alone, the student (33 MMACs)"),
    ("first", "labels alone, the wide network (118 MMACs)"),
    ("elder", "the wide network, on what `first` says about the images that it is surest of"),
    ("ssld", "the student, on what `elder` says about the images that it is surest of"),
)
PUBLISHED = (  # USB's table of CIFAR-10, as its authors give it: 100 minus the error in percent, at 40, 250 and 4,000 labels
    ("supervised", ("22.4", "44.0", "84.5")),
    ("FixMatch", ("91.7", "95.0", "95.7")),
    ("FreeMatch", ("95.0", "95.2", "95.9")),
)
DIFFERS = "WRN-28-2, 214 MMACs; 1,048,576 steps of 64 labelled and, but for `supervised`, 448 other images; PNGs"


def main() -> None:
    seeds.tell("field", __doc__, measured)


def measured(args: argparse.Namespace) -> str:
    return table({labels: [seeds.evaluations(folder) for folder in runs(labels, args)] for labels in LABELS})


def runs(labels: int, args: argparse.Namespace) -> list[Path]:
    """The recipe with so many labels of each class to learn from, once with each seed; returns the folders."""
    params = yaml.safe_load(RECIPE.read_text())
    drawn = LABELS[labels]
    params["prepare"] |= {"per_class": drawn, "holdout": (drawn - labels) / drawn}
    folder = seeds.ROOT / ".scratch" / "field"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / f"usb-{labels}.yaml"
    recipe.write_text(yaml.safe_dump(params, sort_keys=False))
    return seeds.repeat(recipe, args.seeds, args.jobs, args.commit)


def table(found: dict[int, list[dict[str, Evaluation]]]) -> str:
    """Markdown: a row per method, published or ours, val top-1 in percent for each number of labels; ours on clean val, too."""
    counts = [10 * labels for labels in found]
    lines = [
        f"| method | {' | '.join(f'{count:,} labels' for count in counts)} | what differs |",
        f"| --- | {' | '.join('---:' for _ in counts)} | --- |",
    ]
    lines += [f"| {name} (published) | {' | '.join(cells)} | {DIFFERS} |" for name, cells in PUBLISHED]
    for entry, what in OURS:
        cells = [of(of_seed[entry] for of_seed in of_count) for of_count in found.values()]
        lines.append(f"| `{entry}` | {' | '.join(cells)} | {what} |")
    return "\n".join(lines) + "\n\nOurs: val top-1 in percent, in brackets on clean val.\n"


def of(evaluations: Iterable[Evaluation]) -> str:
    measured = list(evaluations)
    clean = [100 * e.clean.top1 for e in measured if e.clean]
    return seeds.spread([100 * e.val.top1 for e in measured]) + (f" ({seeds.spread(clean)})" if clean else "")


if __name__ == "__main__":
    main()
