"""The format of a comparison: comparison.json, as `compare` writes it and all others read it. Free of torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from pipeline.errors import UserError
from pipeline.report import pairs
from pipeline.report.choice import Choice, choose
from pipeline.report.entries import Entry
from pipeline.report.evaluation import Evaluation
from pipeline.report.pairs import OfClass, Versus
from pipeline.report.statistics import Difference

FILE = "comparison.json"


class Compared(Evaluation):
    """An evaluation beside the others. `delta`: top-1 over the baseline, -1..1, with its interval; null of the baseline itself.

    `agreement`: see `Entry`. `history`: of the training of the model.
    """

    delta: float | None
    delta_low: float | None
    delta_high: float | None
    agreement: float | None
    history: dict[str, Any]


class Comparison(BaseModel):
    """comparison.json. `best`: the candidate that was chosen, see `choice`; null without candidates.

    `margin`: differences that surely lie within it are none. `pairs`: all of them, on the validation images. `classes`: `best`
    against the baseline, class by class.
    """

    title: str
    baseline: str
    best: str | None
    choice: Choice | None
    margin: float
    pairs: list[Versus]
    classes: list[OfClass]
    entries: dict[str, Compared]


def difference_of(entry: Entry) -> dict[str, float | None]:
    d = entry.difference
    return {"delta": d and d.value, "delta_low": d and d.low, "delta_high": d and d.high}


def of_entries(title: str, baseline: str, entries: Sequence[Entry], margin: float) -> Comparison:
    """The comparison of `entries`, which were measured on the same images; one of them is the `baseline`."""
    chosen = choose(entries, margin)
    names = [e.name for e in entries]
    found = pairs.every_pair(np.stack([e.right for e in entries]))
    named = {(names[i], names[j]): pair for (i, j), pair in found.items()}
    by_name = {e.name: e for e in entries}
    classes = _classes(by_name[chosen.best], by_name[baseline], margin) if chosen else []
    beside = {e.name: {**difference_of(e), "agreement": e.agreement, "history": dict(e.history)} for e in entries}
    compared = {e.name: Compared.model_validate({**dict(e.evaluation), **beside[e.name]}) for e in entries}
    return Comparison(
        title=title,
        baseline=baseline,
        best=chosen.best if chosen else None,
        choice=chosen,
        margin=margin,
        pairs=pairs.versus(named, margin),
        classes=classes,
        entries=compared,
    )


def _classes(best: Entry, base: Entry, margin: float) -> list[OfClass]:
    names = dict(zip(np.unique(base.labels).tolist(), base.evaluation.val.per_class, strict=True))
    rows = pairs.by_class(base.labels, names, best.right, base.right)
    return [OfClass(name=row.name, **pairs.statistics(row.pair, row.p, margin)) for row in rows]


def entries_of(comparison: Comparison) -> list[Entry]:
    """The entries as far as the file has them: without predictions, and without lineage."""
    nothing = np.empty(0, bool)
    entries = []
    for name, e in comparison.entries.items():
        measured = None
        if e.delta is not None and e.delta_low is not None and e.delta_high is not None:
            measured = Difference(e.delta, e.delta_low, e.delta_high)
        entries.append(Entry(name, e, nothing, nothing, nothing, nothing, nothing, e.history, {}, measured, e.agreement))
    return entries


def write(folder: Path, comparison: Comparison) -> None:
    (folder / FILE).write_text(json.dumps(comparison.model_dump(mode="json"), indent=1) + "\n")


def read(folder: Path) -> Comparison:
    """The comparison in `folder`. Raises UserError if there is none."""
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"{file} is not there. Run `dvc repro`, which makes it.")
    return Comparison.model_validate_json(file.read_text())
