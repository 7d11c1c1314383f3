"""Measure a model on the validation images, once, and on the held-out images, where choices are made."""

import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from pipeline.harness import stage
from pipeline.harness.machine import Machine
from pipeline.leaks import findings
from pipeline.models import architectures, checkpoint, device, exits, inputs, network, prediction
from pipeline.models.exits import ExitError
from pipeline.report import corruptions
from pipeline.report.evaluation import PREDICTED, Clean, Corruptions, Evaluation, Model, Role, Speed, Split, TrainingFacts, write
from pipeline.report.measure import (
    calibrate,
    cheapest,
    compare_exits,
    confusion,
    corrupted,
    images_per_second,
    logits_of,
    mean_cost,
    measure,
)
from pipeline.report.statistics import wilson
from pipeline.store import artifact, manifest
from pipeline.store.params import MadeModel, Section


class Evaluate(Section):
    """What is measured, and how."""

    role: Role
    """What the entry is to the comparison. Of the `candidate`s one is chosen; a `control` shows what a part of the method is
    worth; a `baseline` is what the method must beat; a `teacher` is a row to read beside its students."""
    model: MadeModel
    """The model directory to measure."""
    exit: int | Literal["ensemble", "early"] | None = None
    """What to measure of a network with exits: the number of one, all as an `ensemble`, or `early`, the first that is sure
    enough, at the threshold that costs least among those with which the held-out images lose nothing against the deepest exit.
    null: the deepest, with a table of all of these beside it."""
    size: PositiveInt | None = None
    """Measure at another input size, in pixels, with the same crop (Touvron et al. 2019, "FixRes": networks
    trained on crops see larger objects than they meet when tested)."""
    mirror: bool = False
    """Answer with the mean logits of an image and its mirror image, at twice the compute (Jordan 2024, section 3.5). A table of
    exits shows each of them without."""
    corruptions: bool = False
    """Measure on worse images too."""
    timing: bool = False
    """Measure the images per second of this machine too, which makes the evaluation another one each time it is done."""

    @model_validator(mode="after")
    def _mirrors_have_one_cost(self) -> "Evaluate":
        if self.mirror and self.exit == "early":
            raise ValueError("`mirror` asks for both images to the same depth, which `exit: early` does not give: leave one out")
        return self


def run(
    params: Evaluate,
    *,
    train: Path,
    val: Path,
    holdout: Path,
    leaks: Path,
    model: Path,
    out: Path,
    journal: stage.Journal,
    machine: Machine,
) -> stage.Metrics:
    """Write `evaluation.json`, `confusion.csv`, the predictions on `val` and on `holdout`, and the model's learning history.

    Accuracies lie in 0..1, with Wilson's 95 % interval; `nll` is in nats; `ece` is the expected calibration error over 15 bins
    of equal width. `leaks`: the artifact of `dedup` that says which validation images have a copy. The network runs in float32
    whatever `machine.precision`, but where it is timed. Raises CheckpointError if the model's classes are not the training
    set's, ExitError if it has no such exit.
    """
    classes = manifest.read(train).classes
    on = device.pick(machine.model_copy(update={"precision": "float32"}))
    number = params.exit if isinstance(params.exit, int) else None
    classifier, description, input_spec = network.load(model, classes, number)
    whole = network.load_exits(model, classes)
    if isinstance(params.exit, str) and whole is None:
        raise ExitError(f"`exit` is {params.exit}, but {model} has no exits: they come with `self_distil`.")
    if params.size is not None:
        input_spec = input_spec.model_copy(update={"size": params.size})
    tables = {name: manifest.read(folder) for name, folder in (("holdout", holdout), ("val", val))}
    pixels = {name: inputs.load(t, input_spec.side, machine, name) for name, t in tables.items()}
    labels = {name: torch.from_numpy(t.labels()) for name, t in tables.items()}
    every = whole if params.exit in (None, "early") else None  # only these two look at what each exit says
    costs = [architectures.macs(exits.Stacked(every, i + 1), input_spec.size) for i in range(len(every))] if every else []
    stacked = {name: logits_of(exits.Stacked(on.place(every)), p, input_spec, on) for name, p in pixels.items()} if every else {}
    macs = None
    if whole and params.exit == "ensemble":
        classifier = exits.ExitEnsemble(whole)
    elif whole and params.exit == "early":
        threshold = cheapest(stacked["holdout"], labels["holdout"], costs)
        classifier, macs = exits.Early(whole, threshold), mean_cost(exits.leaving(stacked["val"], threshold), costs)
    if params.mirror:
        classifier = prediction.Mirrored(classifier)
    on.place(classifier)
    logits = {name: logits_of(classifier, p, input_spec, on) for name, p in pixels.items()}
    measured = {name: measure(logits[name], labels[name], classes) for name in tables}
    if absent := [name for name in classes if name not in measured["val"].per_class]:
        told = ", ".join(absent[:10]) + (f" and {len(absent) - 10} more" if len(absent) > 10 else "")
        sys.stderr.write(f"GAP: val has no image of {told}: its figures are those of the other classes alone.\n")
    origin = artifact.record(model)
    macs = architectures.macs(classifier, input_spec.size) if macs is None else macs
    parameters = architectures.parameters_of(classifier)
    made_from: dict[str, Any] = {"stage": origin.get("stage"), "entry": origin.get("entry")}
    made_from |= {name: _name(origin, name) for name in ("init", "teacher")}
    made_from["macs_all"] = sum(run.get("macs", 0) for run in (origin, *origin["lineage"].values())) if origin else None
    evaluation = Evaluation(
        role=params.role,
        model=Model(
            arch=description.arch, parameters=parameters, macs=macs, input=input_spec.size, exit=params.exit, mirror=params.mirror
        ),
        training=TrainingFacts(**made_from, **description.training),
        val=measured["val"],
        holdout=measured["holdout"],
        clean=_clean(leaks, tables["val"], logits["val"]),
        calibration=calibrate(logits, labels, classes),
        dtype=on.precision,
    )
    metrics: dict[str, Any] = {"n": evaluation.val.n}
    metrics |= {name: value for name, value in evaluation.figures().items() if not name.endswith("_n")}
    timed = {"whole": classifier}
    if whole and params.exit is None:
        ways = {str(i): network.load(model, classes, i)[0] for i in range(1, len(whole) + 1)} | {
            "ensemble": exits.ExitEnsemble(whole)
        }
        evaluation.exits = compare_exits(stacked, labels, ways, costs, input_spec.size)
        metrics["exits"] = {row.exit: row.val_top1 for row in evaluation.exits.rows}
        timed = {**ways, "early": exits.Early(whole, evaluation.exits.threshold)}
    if params.corruptions:
        harmed = {name: corrupted(classifier, pixels[name], labels[name], input_spec, on) for name in tables}
        evaluation.corruptions = Corruptions(severities=list(corruptions.SEVERITIES), **harmed)
        metrics |= {f"{name}_corrupted_top1": float(np.mean(list(shares.values()))) for name, shares in harmed.items()}
    if params.timing:
        fast = device.pick(machine)
        speeds = images_per_second({name: fast.place(m) for name, m in timed.items()}, pixels["val"], input_spec, fast)
        journal.log(None, **{f"images_per_second_{name}": speed for name, speed in speeds.items()})
        threads, batch = torch.get_num_threads(), prediction.BATCH
        evaluation.speed = Speed(
            device=str(fast.device), dtype=fast.precision, threads=threads, batch=batch, images_per_second=speeds
        )
    with artifact.writing(out) as tmp:
        named = confusion(logits["val"].argmax(1), labels["val"], classes)
        history = (model / checkpoint.HISTORY).read_bytes()
        predictions: dict[Split, pa.Table] = {
            "val": _predictions(tables["val"], logits["val"]),
            "holdout": _predictions(tables["holdout"], logits["holdout"]),
        }
        write(tmp, evaluation, predictions, named, history)
    return metrics


def _clean(leaks: Path, val: manifest.Manifest, logits: Tensor) -> Clean | None:
    copied = findings.val_with_a_copy(artifact.verify(leaks), ("pool", "train"))
    if copied is None:
        return None
    clean = np.array([name not in copied for name in val.table["id"].to_pylist()], bool)
    right = int((logits.argmax(1).numpy() == val.labels())[clean].sum())
    n = int(clean.sum())
    if not n:
        return None
    low, high = wilson(right, n)
    return Clean(n=n, top1=right / n, top1_low=low, top1_high=high)


def _predictions(labelled: manifest.Manifest, logits: Tensor) -> pa.Table:
    confidence, predicted = logits.softmax(1).max(1)
    columns = [labelled.table["id"], labelled.table["label"], predicted.numpy().astype(np.int32), confidence.numpy()]
    return pa.table(columns, schema=PREDICTED)


def _name(origin: dict[str, Any], role: str) -> str | None:
    """The `teach/teacher` of the input data/teach/teacher that a model was made with."""
    path = origin.get("inputs", {}).get(role, {}).get("path")
    return path.removeprefix("data/") if path else None


if __name__ == "__main__":
    stage.main(run)
