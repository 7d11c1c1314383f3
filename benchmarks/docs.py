"""Write the tables of docs/results.md that one run of the built-in data makes: `make docs`.

    python -m benchmarks.docs --run data/compare/results      # keeps the run's figures in docs/demo.json, and renders them
    python -m benchmarks.docs                                 # renders docs/demo.json again

A table stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`; nothing else of the document is touched.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.seeds import ROOT, machine
from pipeline.errors import UserError
from pipeline.report import comparison, table

DOCUMENT, FIGURES = ROOT / "docs" / "results.md", ROOT / "docs" / "demo.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the artifact of `compare` of a run of recipes/demo.yaml")
    parser.add_argument("--commit", help="the commit that made the run; by default this checkout's")
    parser.add_argument("--machine", default=machine(), help="the machine of the run; by default this one")
    args = parser.parse_args()
    try:
        if args.run:
            facts = {"commit": args.commit or checkout(), "machine": args.machine, **figures(args.run)}
            FIGURES.write_text(json.dumps(facts, indent=1) + "\n")
        DOCUMENT.write_text(placed(DOCUMENT.read_text(), "demo", demo(json.loads(FIGURES.read_text()))))
    except UserError as error:
        sys.exit(f"error: {error}")


def checkout() -> str:
    """The short hash of this checkout. Raises UserError where files outside of docs/ differ from it: no commit has that code."""
    if _git("status", "--porcelain", "-uno", "--", ".", ":!docs"):
        raise UserError("files differ from the last commit, so it did not make this run: commit them, or name --commit.")
    return _git("rev-parse", "--short=7", "HEAD")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True, text=True).stdout.strip()


def figures(run: Path) -> dict[str, Any]:
    """The figures of a comparison that the table shows, unrounded, by entry. Raises UserError if `run` is none."""
    found = comparison.read(run)
    rows = {
        name: {
            "val": [e.val.top1, e.val.top1_low, e.val.top1_high],
            "over_baseline": None if e.delta is None else [e.delta, e.delta_low, e.delta_high],
            "holdout": e.holdout.top1,
            "ece": e.val.ece,
            "as_teacher": e.agreement,
            "learned": e.training.labelled,
            "to_choose": e.holdout.n,
            "unlabelled": e.training.unlabelled,
            "steps": e.training.steps,
            "macs": e.training.macs,
            "macs_all": e.training.macs_all,
        }
        for name, e in found.entries.items()
    }
    return {"images": next(iter(found.entries.values())).val.n, "rows": rows}


def demo(facts: dict[str, Any]) -> str:
    """The table of the built-in data, seed 0."""
    made = f"`make run` (seed 0) at commit `{facts['commit']}`; {facts['machine']}"
    titles = "entry|val top-1 %|over baseline|holdout %|ECE %|as teacher %"
    titles += "|labels learned|to choose|unlabelled|steps|training TMACs|all TMACs"
    lines = [
        f"{made}. {facts['images']:,} validation images, 95 % intervals.",
        "",
        f"| {titles.replace('|', ' | ')} |",
        "| --- | --- | --- " + "| ---: " * 9 + "|",
    ]
    for name, row in facts["rows"].items():
        val, gain = _with_interval(row["val"], table.percent), _with_interval(row["over_baseline"], table.points)
        shares = [table.percent(row["holdout"]), table.percent(row["ece"])]
        shares.append("–" if row["as_teacher"] is None else table.percent(row["as_teacher"]))
        counts = [f"{row[name]:,}" for name in ("learned", "to_choose", "unlabelled", "steps")]
        compute = [table.scaled(row[name], 1e12) for name in ("macs", "macs_all")]
        cells = [name, val, gain, *shares, *counts, *compute]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_interval(shares: list[float] | None, shown: Callable[[float], str]) -> str:
    return "{} [{}, {}]".format(*map(shown, shares)) if shares else "–"


def placed(document: str, name: str, text: str) -> str:
    """The document with `text` between the markers of `name`. Raises UserError where they do not stand exactly once."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(document)) != 1:
        raise UserError(f"{DOCUMENT} needs `{begin}` and `{end}` once, around the table that is to be written.")
    return pattern.sub(lambda _: f"{begin}\n{text}\n{end}", document)


if __name__ == "__main__":
    main()
