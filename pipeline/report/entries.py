"""The evaluated models side by side, as read from the artifacts of `evaluate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import UserError
from pipeline.report import evaluation, pairs
from pipeline.report.evaluation import Evaluation
from pipeline.report.statistics import Difference
from pipeline.store import artifact


@dataclass(frozen=True)
class Entry:
    """One evaluated model.

    `labels` and `predicted`: (N,) classes of the validation images, in the order of `ids`; `held_ids` and `held_right`: (H,) ids
    of the held-out images, and whether it names them right. `lineage`: the records of its evaluation and all before it, by key.
    """

    name: str
    evaluation: Evaluation
    ids: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    held_ids: np.ndarray
    held_right: np.ndarray
    history: Mapping[str, Any]
    lineage: Mapping[str, Mapping[str, Any]] = field(repr=False)
    difference: Difference | None = None
    """To the baseline; None for the baseline itself."""
    agreement: float | None = None
    """Share of the validation images that it names as its teacher does; None where no entry measures its teacher."""

    @property
    def right(self) -> np.ndarray:
        """(N,) bool."""
        return np.asarray(self.labels == self.predicted)

    @property
    def origin(self) -> str:
        training = self.evaluation.training
        return f"{training.stage}/{training.entry}" if training.entry else training.stage or "brought in"


def read_entry(name: str, folder: Path) -> Entry:
    record = artifact.record(folder)
    own = {record["key"]: {name: value for name, value in record.items() if name != "lineage"}} if record else {}
    predictions, held = evaluation.read_predictions(folder), evaluation.read_predictions(folder, "holdout")
    return Entry(
        name,
        evaluation.read(folder),
        predictions["id"].to_numpy(),
        predictions["label"].to_numpy(),
        predictions["predicted"].to_numpy(),
        held["id"].to_numpy(),
        held["label"].to_numpy() == held["predicted"].to_numpy(),
        evaluation.read_history(folder),
        {**record.get("lineage", {}), **own},
    )


def against(baseline: str, entries: list[Entry]) -> list[Entry]:
    base = next(e for e in entries if e.name == baseline)
    for e in entries:
        if not np.array_equal(e.ids, base.ids) or not np.array_equal(e.held_ids, base.held_ids):
            raise UserError(
                f"`evaluate.{e.name}` and `evaluate.{baseline}` were measured on different images. Run `dvc repro`, "
                "which measures both on data/prepare/val and data/dedup/holdout."
            )
    return [e if e is base else replace(e, difference=pairs.compare(e.right, base.right).difference) for e in entries]


def with_agreement(entries: list[Entry]) -> list[Entry]:
    """The entries with the share of images on which they agree with their teacher, where one of them is the whole teacher."""
    teachers = {e.origin: e for e in reversed(entries) if e.evaluation.model.exit is None and not e.evaluation.model.mirror}
    with_teachers = []
    for e in entries:
        teacher = teachers.get(e.evaluation.training.teacher or "")
        with_teachers.append(replace(e, agreement=float((e.predicted == teacher.predicted).mean())) if teacher else e)
    return with_teachers


class Data(NamedTuple):
    """The data that entries came from: what to call them, and their licence if winnow knows it."""

    name: str
    licence: str | None


def data_of(entries: Sequence[Entry]) -> Data:
    """The data of `prepare.root`, as the lineage of the entries names it: those that winnow drew, or a folder."""
    records = {key: record for e in entries for key, record in e.lineage.items()}
    if any(record["stage"] == "draw" for record in records.values()):
        return Data("the built-in scenes", "drawn by winnow; no rights of others")
    roots = [record["params"].get("root") for record in records.values() if record["stage"] == "prepare"]
    return Data(next(filter(None, roots), "images"), None)
