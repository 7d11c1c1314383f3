"""The curves of a training while it runs, as DVC and the extensions of editors plot them.

    data/live/<figure>.json   run, entry, step and the figure: the points of every training that ran in this folder
    data/live/dvc.yaml        the plots, found by DVC because of its name

A training's points replace those of an earlier one of the same entry; one that goes on after a kill goes on with its curve.
"""

import contextlib
import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.store import artifact

FOLDER = Path("data", "live")
FIGURES = {
    "holdout_top1": "live: held-out accuracy",
    "holdout_knn": "live: nearest neighbours, held-out accuracy",
    "holdout_probe": "live: linear probe, held-out accuracy",
    "loss": "live: training loss",
}
"""What is plotted, and under which title."""


def note(entry: str, run: str, step: int, values: Mapping[str, float], folder: Path = FOLDER) -> None:
    """Add the point at `step` of the training `entry` (`distil.ssld`), the run with the key `run`, to each figure's curves."""
    known = {name: value for name, value in values.items() if name in FIGURES}
    if not known:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # stages may train side by side
        for name, value in known.items():
            _add(folder / f"{name}.json", {"run": run[:8], "entry": entry, "step": step, name: value})
        _declare(folder)


def _add(file: Path, point: Mapping[str, Any]) -> None:
    kept: list[Mapping[str, Any]] = []
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # none yet, or one that somebody has edited
        points = json.loads(file.read_text())
        kept = [p for p in points if p["entry"] != point["entry"] or (p["run"] == point["run"] and p["step"] < point["step"])]
    with artifact.writing_file(file) as tmp:
        tmp.write_text("[\n" + ",\n".join(json.dumps(p) for p in [*kept, point]) + "\n]\n")


def _declare(folder: Path) -> None:
    """Write the plots of the figures that are there, where they are not declared yet: DVC takes a missing file for a fault."""
    there = {name: title for name, title in FIGURES.items() if (folder / f"{name}.json").is_file()}
    plots = [
        {title: {"template": "curves", "title": title, "x": "step", "y": {f"{name}.json": name}}} for name, title in there.items()
    ]
    text, file = yaml.safe_dump({"plots": plots}, sort_keys=False), folder / "dvc.yaml"
    if not file.is_file() or file.read_text() != text:
        with artifact.writing_file(file) as tmp:
            tmp.write_text(text)
