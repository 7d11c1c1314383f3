"""The curves of a training while it runs, as DVC and the extensions of editors plot them.

    data/live/<figure>.json   run, entry, step and the figure: the points of every training that ran in this folder
    data/live/dvc.yaml        the plots, found by DVC because of its name

A training's points replace those of an earlier one of the same entry; one that goes on after a kill goes on with its curve.
"""

import contextlib
import fcntl
import json
import time
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
EVERY = 1.0  # seconds between two writes: each writes the whole curve


class Curves:
    """The curves of the training `entry` (`distil.ssld`), the run with the key `run`."""

    def __init__(self, entry: str, run: str, folder: Path = FOLDER) -> None:
        self.entry, self.run, self.folder = entry, run[:8], folder
        self._points: list[tuple[int, Mapping[str, float]]] = []
        self._written = -EVERY

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Note the figures at `step`, which are on the disk a second later at the latest if more come, or with `write`."""
        known = {name: value for name, value in values.items() if name in FIGURES}
        if known:
            self._points.append((step, known))
            if time.monotonic() - self._written >= EVERY:
                self.write()

    def write(self) -> None:
        """Write what was noted. A disk that cannot take it keeps nobody from training: there is a curve less to see."""
        points, self._points = self._points, []
        if points:
            with contextlib.suppress(OSError):
                self._write(points)
            self._written = time.monotonic()

    def _write(self, points: list[tuple[int, Mapping[str, float]]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # stages may train side by side
            for name in {name: None for _, values in points for name in values}:
                self._add(name, [(step, values[name]) for step, values in points if name in values])
            _declare(self.folder)

    def _add(self, name: str, points: list[tuple[int, float]]) -> None:
        file, first = self.folder / f"{name}.json", points[0][0]
        kept: list[Mapping[str, Any]] = []
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # none yet, or one that somebody has edited
            there = json.loads(file.read_text())
            kept = [p for p in there if p["entry"] != self.entry or (p["run"] == self.run and p["step"] < first)]
        new = [{"run": self.run, "entry": self.entry, "step": step, name: value} for step, value in points]
        with artifact.writing_file(file) as tmp:
            tmp.write_text("[\n" + ",\n".join(json.dumps(p) for p in [*kept, *new]) + "\n]\n")


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
