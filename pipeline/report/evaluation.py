"""The format of an evaluation, as `evaluate` writes it and all others read it. Free of torch, for those that only read."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv
from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer

from pipeline.errors import UserError
from pipeline.store import artifact

FILE, CONFUSION, HISTORY = "evaluation.json", "confusion.csv", "history.json"
Split = Literal["val", "holdout"]
PREDICTIONS: dict[Split, str] = {"val": "predictions.parquet", "holdout": "predictions-holdout.parquet"}
PREDICTED = pa.schema({"id": pa.string(), "label": pa.int32(), "predicted": pa.int32(), "confidence": pa.float32()})
"""A row for each image of a split, in the manifest's order: numbers of classes, and the probability of the one predicted."""

Role = Literal["teacher", "baseline", "control", "candidate"]


def not_a_baseline(name: str, roles: Mapping[str, str | None]) -> str:
    """Why the entry `name` cannot be what others are compared with; an empty text if it can. `roles`: of all entries, by name."""
    baselines = [entry for entry, role in roles.items() if role == "baseline"]
    if name in baselines:
        return ""
    return (
        f"`compare.baseline` is {name!r}, whose role is {roles.get(name) or 'missing'}. Name an entry of `evaluate` with "
        f"`role: baseline` (there is {', '.join(baselines) or 'none'})."
    )


class Model(BaseModel):
    """`macs`: multiply-accumulates of a prediction. `exit`: which part of a network with several exits answers. `mirror`: whether
    an answer is the mean over an image and its mirror image."""

    arch: str
    parameters: int
    macs: int | None
    input: int
    exit: int | str | None = None
    mirror: bool = False


class TrainingFacts(BaseModel):
    """How the model came about. `labelled` counts the images whose labels it or its teacher learned; those that choices were made
    on are `holdout.n`. `macs`: the multiply-accumulates of its training and of those it started from; `macs_all`: of all
    that winnow computed for it, its teachers' trainings, scoring and labelling included."""

    stage: str | None
    entry: str | None
    init: str | None
    teacher: str | None
    steps: int
    batch: int
    labelled: int
    unlabelled: int
    note: str | None
    macs: int | None = None
    macs_all: int | None = None


class Measured(BaseModel):
    """Shares lie in 0..1; `top1_low` and `top1_high` are the 95 % interval; `nll` is in nats.

    `reliability`: for each bin of confidence the number of images, their mean confidence and their accuracy.
    """

    n: int
    top1: float
    top1_low: float
    top1_high: float
    top5: float
    nll: float
    ece: float
    per_class: dict[str, float]
    reliability: list[tuple[int, float, float]] = []


class Calibration(BaseModel):
    """`temperature`: fitted on holdout's nll; `val`'s figures where the logits are divided by it."""

    temperature: float
    val_ece: float
    val_nll: float


class Clean(BaseModel):
    """Top-1 on the `n` validation images without a copy in the pool or the labelled set, as these were left to learn from.

    What a published checkpoint had learned from is not known, and not in it.
    """

    n: int
    top1: float
    top1_low: float
    top1_high: float


class Way(BaseModel):
    """A way to use a network with several exits: one of them by its number, their `ensemble`, or `early`."""

    exit: str
    parameters: int
    macs: int
    holdout_top1: float
    val_top1: float


class Point(BaseModel):
    """Early exits at a threshold of confidence; `macs` is the mean over the validation images."""

    threshold: float
    macs: int
    holdout_top1: float
    val_top1: float


class ExitComparison(BaseModel):
    """`threshold` was chosen on the held-out images; `leaving` is the share of the validation images that leaves at each exit."""

    rows: list[Way]
    threshold: float
    leaving: list[float]
    curve: list[Point]


class Corruptions(BaseModel):
    """Top-1 accuracy by corruption, at each of the severities."""

    severities: list[int]
    holdout: dict[str, list[float]]
    val: dict[str, list[float]]


class Speed(BaseModel):
    """Measured on one machine; `images_per_second` of the `whole` network, or of each way to use one with exits."""

    device: str
    dtype: str
    threads: int
    batch: int
    images_per_second: dict[str, float]


class Evaluation(BaseModel):
    """evaluation.json. What was not measured is left out of it. `dtype`: in which the network's products were computed."""

    role: Role
    model: Model
    training: TrainingFacts
    val: Measured
    holdout: Measured
    clean: Clean | None = None
    """None where the labelled images were not searched for copies."""
    exits: ExitComparison | None = None
    corruptions: Corruptions | None = None
    speed: Speed | None = None
    calibration: Calibration | None = None
    dtype: str | None = None

    @model_serializer(mode="wrap")
    def _what_was_measured(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        absent = {
            name for name in ("clean", "exits", "corruptions", "speed", "calibration", "dtype") if getattr(self, name) is None
        }
        return {name: value for name, value in handler(self).items() if name not in absent}

    def figures(self) -> dict[str, float]:
        """The numbers by `val_top1`, `holdout_nll`, ..., those of `calibration` by `calibrated_val_ece`, ...,
        and those on clean val by `clean_val_top1`, ..."""
        calibrated = self.calibration.model_dump() if self.calibration else {}
        clean = self.clean.model_dump() if self.clean else {}
        return (
            {
                f"{split}_{name}": value
                for split, measured in (("val", self.val), ("holdout", self.holdout))
                for name, value in measured.model_dump(exclude={"per_class", "reliability"}).items()
            }
            | {f"calibrated_{n}": v for n, v in calibrated.items()}
            | {f"clean_val_{n}": v for n, v in clean.items()}
        )


def write(
    folder: Path, evaluation: Evaluation, predictions: Mapping[Split, pa.Table], confusion: pa.Table, history: bytes
) -> None:
    """Write the files into the artifact being made at `folder`. `predictions`: of `PREDICTED`; `confusion`: class, named, images.

    `history`: that of the model, as its directory has it."""
    (folder / FILE).write_text(json.dumps(evaluation.model_dump(mode="json"), indent=1) + "\n")
    for split, table in predictions.items():
        pq.write_table(table, folder / PREDICTIONS[split])
    csv.write_csv(confusion, folder / CONFUSION)
    (folder / HISTORY).write_bytes(history)


def read(folder: Path) -> Evaluation:
    try:
        return Evaluation.model_validate_json((folder / FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / FILE} is no evaluation ({_first(error)}). Make it anew: remove {folder}.") from None


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def of_model(folder: Path, identities: Collection[str], model: str, exit: int | None, size: int) -> Evaluation:
    """The evaluation `folder` of the model `model`, which has one of `identities`, as it answers about an image as it is.

    Raises UserError if it is of another model, exit or input size, or of means over mirror images; ArtifactError if it is
    damaged.
    """
    evaluation = read(artifact.verify(folder))
    of = artifact.record(folder).get("inputs", {}).get("model", {})
    if of.get("identity") not in identities:
        raise UserError(f"{folder} measured {of.get('path')}, not {model}: its figures are of another model.")
    measured = evaluation.model
    if (measured.exit, measured.input) != (exit, size):
        raise UserError(
            f"{folder} measured exit {measured.exit} at {measured.input} pixels, and this is exit {exit} at {size}: name an "
            "entry of `evaluate` that measures the same."
        )
    if measured.mirror:
        raise UserError(
            f"{folder} measured means over mirror images, and this answers about an image as it is: name an entry of `evaluate` "
            "without `mirror`."
        )
    return evaluation


def read_predictions(folder: Path, split: Split = "val") -> pa.Table:
    """A table of `PREDICTED`."""
    return pq.read_table(folder / PREDICTIONS[split])


def read_history(folder: Path) -> dict[str, Any]:
    """By `train` and `holdout`, a list of the figures at each measurement during the model's training."""
    try:
        history: dict[str, Any] = json.loads((folder / HISTORY).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / HISTORY} cannot be read ({_first(error)}). Make it anew: remove {folder}.") from None
    return history
