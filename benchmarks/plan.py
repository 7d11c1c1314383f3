"""How good are the times of `make plan`? What probes alone say of the stages that this folder has run, beside what they took.

    make plan && make run && python -m benchmarks.plan

Each stage counts with its latest run that `.scratch/durations.jsonl` remembers for this machine and section `machine`. The probes
are those that the plan has kept; what it did not need is probed now. On a machine that others share, compare the CPU seconds.
"""

import argparse
from pathlib import Path

from benchmarks.seeds import machine
from pipeline.harness.durations import FILE
from pipeline.harness.stage import PARAMS_FILE, WORK
from pipeline.planning import estimate
from pipeline.planning.estimate import START, Rates, Run
from pipeline.planning.work import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=PARAMS_FILE)
    parser.add_argument("--out", type=Path, help="also write what is printed to this Markdown file")
    args = parser.parse_args()
    recipe = Recipe.read(args.params)
    runs: dict[str, Run] = {}
    for run in estimate.earlier(recipe, WORK, len(recipe.tree.get("classes") or ()) or 10):
        runs.setdefault(run.name, run)  # the latest first
    if not runs:
        raise SystemExit(f"{WORK / FILE} remembers no run on this machine with this section `machine`. Run `make run` first.")
    rates = Rates(recipe, WORK, probing=True)
    text = table(runs, rates)
    rates.keep()
    print(text)
    if args.out:
        args.out.write_text(text)


def table(runs: dict[str, Run], rates: Rates) -> str:
    """Markdown: a row per stage, seconds by the probes alone and as they were."""
    lines = [
        f"{machine()}.\n",
        "| stage | predicted, s | took, s | off | predicted, CPU s | took, CPU s | off |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    sums = [0.0] * 4
    for name, run in runs.items():
        if run.work:
            wall, cpu = (START + seconds for seconds in rates.sum(run.work))
            lines.append(row(f"`{name}`", wall, run.wall, cpu, run.cpu))
            sums = [a + b for a, b in zip(sums, (wall, run.wall, cpu, run.cpu), strict=True)]
    return "\n".join([*lines, row("together", *sums)]) + "\n"


def row(name: str, wall: float, took: float, cpu: float, spent: float) -> str:
    return f"| {name} | {wall:,.1f} | {took:,.1f} | {wall / took - 1:+.0%} | {cpu:,.1f} | {spent:,.1f} | {cpu / spent - 1:+.0%} |"


if __name__ == "__main__":
    main()
