"""Which loss: students of equal steps and equal soft labels, each loss with the weight that the holdout prefers.

    python -m benchmarks.losses --seeds 0 1 2 --jobs 2 --out docs/losses.md

Runs recipes/losses.yaml as benchmarks.seeds runs a recipe. Its entries are named LOSS_WEIGHT; of the weights of a loss the one
with the best mean on the holdout is taken, and its accuracy on val is what the table compares.
"""

import argparse
import statistics

from benchmarks import seeds
from pipeline.report.evaluation import Evaluation

RECIPE = seeds.ROOT / "recipes" / "losses.yaml"
LOSSES = {
    "symkl": "`sym_kl`, SSLD's own",
    "js": "`js`, Jensen-Shannon",
    "kl": "`kl` at T = 1",
    "kl4": "`kl` at T = 4",
    "dist": "`dist` (Huang et al. 2022)",
    "std": "`kl` at T = 2, `standardise` (Sun et al. 2024)",
}
Evaluations = dict[str, Evaluation]  # by entry


def main() -> None:
    seeds.tell("losses", __doc__, measured)


def measured(args: argparse.Namespace) -> str:
    folders = seeds.repeat(RECIPE, args.seeds, args.jobs, args.commit)
    return table([seeds.evaluations(folder) for folder in folders])


def weights(evaluations: list[Evaluations], loss: str) -> dict[str, float]:
    """Of each entry of a loss the mean top-1 on the holdout, in percent."""
    entries = [entry for entry in evaluations[0] if entry.rpartition("_")[0] == loss]
    return {entry: statistics.mean(100 * of_seed[entry].holdout.top1 for of_seed in evaluations) for entry in entries}


def table(evaluations: list[Evaluations]) -> str:
    """Markdown: a row for each loss, with the weight that was chosen, the one with the best mean on val first."""
    rows = []
    for loss, what in LOSSES.items():
        held = weights(evaluations, loss)
        best = max(held, key=lambda entry: held[entry])
        val = [100 * of_seed[best].val.top1 for of_seed in evaluations]
        tried = ", ".join(f"{weight_of(entry)}: {mean:.1f}" for entry, mean in held.items())
        rows.append((statistics.mean(val), loss, what, best, val, tried))
    own = next(val for _, loss, _, _, val, _ in rows if loss == "symkl")
    lines = [
        "| loss | weight | val top-1 % | each seed | over `sym_kl` | clean val % | ECE % | holdout top-1 % of each weight |",
        "| --- | ---: | --- | --- | --- | --- | --- | --- |",
    ]
    for _, loss, what, best, val, tried in sorted(rows, key=lambda row: -row[0]):
        over = "" if loss == "symkl" else seeds.signed([a - b for a, b in zip(val, own, strict=True)])
        clean = [100 * on.top1 for of_seed in evaluations if (on := of_seed[best].clean)]
        ece = [100 * of_seed[best].val.ece for of_seed in evaluations]
        lines.append(
            f"| {what} | {weight_of(best)} | {seeds.spread(val)} | {' / '.join(f'{v:.1f}' for v in val)} | {over} "
            f"| {seeds.spread(clean) if clean else '–'} | {seeds.spread(ece)} | {tried} |"
        )
    return "\n".join(lines) + "\n"


def weight_of(entry: str) -> str:
    """`kl_05` -> 0.5: the weights are written without a point, a leading zero stands for one."""
    digits = entry.rpartition("_")[2]
    return f"0.{digits[1:]}" if digits.startswith("0") else digits


if __name__ == "__main__":
    main()
