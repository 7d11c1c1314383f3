"""A comparison as the few figures and the small tables that DVC shows: `dvc metrics show`, `dvc exp show`, `dvc plots show`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.report.comparison import Comparison

FOLDER = "plots"
HEAT_CLASSES = 40
"""Classes that a heat map shows: of more, those whose accuracy differs most between the entries."""


def summary(comparison: Comparison) -> dict[str, Any]:
    """Ten figures of the chosen entry, or, without candidates, of the baseline; the names are short, as columns of a terminal.

    Shares lie in 0..1. `val_top1`, `clean_top1`, `ece`: on the validation images, `clean_top1` without those that have copies.
    `gain`: over the top-1 of the `baseline`, with its 95 % interval `low`..`high`. `tmacs`: the compute of all that led to the
    entry, in 10^12 multiply-accumulates. None: not measured, or of the baseline itself.
    """
    shown = comparison.entries[comparison.best or comparison.baseline]
    macs = shown.training.macs_all
    return {
        "chosen": comparison.best,
        "val_top1": shown.val.top1,
        "clean_top1": shown.clean.top1 if shown.clean else None,
        "holdout_top1": shown.holdout.top1,
        "gain": shown.delta,
        "low": shown.delta_low,
        "high": shown.delta_high,
        "ece": shown.val.ece,
        "baseline": comparison.entries[comparison.baseline].val.top1,
        "tmacs": None if macs is None else macs / 1e12,
    }


def write(folder: Path, comparison: Comparison) -> None:
    """Write the tables behind the plots of dvc.yaml into `folder`: JSON lists, which may be empty."""
    folder.mkdir()
    entries = comparison.entries
    told = {comparison.best or comparison.baseline, comparison.baseline}
    curves = [
        {"entry": name, "step": check["step"], "holdout_top1": check["top1"]}
        for name, e in entries.items()
        for check in e.history.get("holdout", [])
        if "top1" in check
    ]
    reliability = [
        {"entry": name, "confidence": confidence, "accuracy": accuracy, "images": images}
        for name, e in entries.items()
        if name in told
        for images, confidence, accuracy in e.val.reliability
        if images
    ]
    names = list(entries[comparison.baseline].val.per_class)
    table = np.array([[e.val.per_class[name] for e in entries.values()] for name in names])
    classes = [
        {"class": names[i], "entry": name, "accuracy": e.val.per_class[names[i]]}
        for i in differing(table)
        for name, e in entries.items()
    ]
    compute = [
        {"entry": name, "tmacs": macs / 1e12, "val_top1": e.val.top1, "low": e.val.top1_low, "high": e.val.top1_high}
        for name, e in entries.items()
        if (macs := e.training.macs_all) is not None
    ]
    for name, rows in {"curves": curves, "reliability": reliability, "classes": classes, "compute": compute}.items():
        _write(folder / f"{name}.json", rows)


def differing(table: np.ndarray) -> list[int]:
    """The rows of a (C, E) table of accuracies that a heat map shows, in their order."""
    if len(table) <= HEAT_CLASSES:
        return list(range(len(table)))
    return [int(i) for i in np.sort(np.argsort(-np.ptp(table, axis=1), kind="stable")[:HEAT_CLASSES])]


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON, as DVC plots the numbers of a CSV file as texts."""
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
