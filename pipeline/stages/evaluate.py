"""Measure a model on the validation images, once, and on the held-out images, where choices are made."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from pipeline import artifact, checkpoint, device, images, manifest, models, network, predict, stage
from pipeline.params import Machine, Section

BINS = 15  # of the calibration error, as in Guo et al. 2017
Z95 = 1.959964


class Evaluate(Section):
    """`model`: the model directory to measure (read by dvc.yaml)."""

    model: str


def run(params: Evaluate, *, train: Path, val: Path, holdout: Path, model: Path, out: Path, machine: Machine) -> stage.Metrics:
    """Write `evaluation.json`, the predictions on `val`, and the model's learning history.

    Accuracies lie in 0..1, with Wilson's 95 % interval; `nll` is in nats; `ece` is the expected calibration error over 15 bins
    of equal width. Raises CheckpointError if the model's classes are not the training set's.
    """
    classes = manifest.read(train).classes
    on = device.pick(machine)
    network_, description, given = network.load(model, classes)
    on.place(network_)
    origin = artifact.record(model)
    compute = models.macs(network_, given.size)
    cores = machine.cores(machine.workers)
    measured: dict[str, dict[str, Any]] = {}
    predictions = None
    for name, folder in (("holdout", holdout), ("val", val)):
        labelled = manifest.read(folder)
        pixels = images.load(labelled, given.side, cores, machine.memory_gb, name)
        logits = torch.cat([batch for _, batch in predict.logits(network_, pixels, given, on)])
        labels = torch.from_numpy(labelled.labels())
        measured[name] = measure(logits, labels, classes)
        predictions = _predictions(labelled, logits)
    evaluation = {
        "model": {
            "arch": description.arch,
            "parameters": models.parameters_of(network_),
            "macs": compute,
            "input": given.size,
        },
        "training": {
            "stage": origin.get("stage"),
            "entry": origin.get("entry"),
            "init": _name(origin, "init"),
            "teacher": _name(origin, "teacher"),
            **description.training,
        },
        **measured,
    }
    with artifact.writing(out) as tmp:
        (tmp / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n")
        (tmp / checkpoint.HISTORY).write_bytes((model / checkpoint.HISTORY).read_bytes())
        pq.write_table(predictions, tmp / "predictions.parquet")
    shown = ("top1", "top1_low", "top1_high", "top5", "nll", "ece")
    return {"n": measured["val"]["n"]} | {f"{name}_{key}": measured[name][key] for name in ("val", "holdout") for key in shown}


def measure(logits: torch.Tensor, labels: torch.Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Accuracies and calibration of (N, C) logits against (N,) labels; see `run`."""
    n = len(labels)
    p, predicted = logits.softmax(1).max(1)
    right = predicted == labels
    top5 = (logits.topk(min(5, len(classes))).indices == labels[:, None]).any(1)
    low, high = wilson(int(right.sum()), n)
    per_class = {name: float(right[labels == i].double().mean()) for i, name in enumerate(classes) if bool((labels == i).any())}
    return {
        "n": n,
        "top1": float(right.double().mean()),
        "top1_low": low,
        "top1_high": high,
        "top5": float(top5.double().mean()),
        "nll": float(F.cross_entropy(logits, labels)),
        "ece": calibration_error(p.double().numpy(), right.numpy()),
        "per_class": per_class,
    }


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `right` in `n`."""
    share, z2 = right / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return centre - half, centre + half


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: the mean over images of |confidence - accuracy| of their bin.

    torchmetrics has it too, at two seconds of import in each of many short stages; a test compares the two.
    """
    bin_of = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gap = np.bincount(bin_of, confidence, BINS) - np.bincount(bin_of, right, BINS)
    return float(np.abs(gap).sum() / len(confidence))


def _predictions(labelled: manifest.Manifest, logits: torch.Tensor) -> pa.Table:
    confidence, predicted = logits.softmax(1).max(1)
    return pa.table(
        {
            "id": labelled.table["id"],
            "label": labelled.table["label"],
            "predicted": pa.array(predicted.numpy().astype(np.int32)),
            "confidence": pa.array(confidence.numpy()),
        }
    )


def _name(origin: dict[str, Any], role: str) -> str | None:
    """The `teach/teacher` of the input data/teach/teacher that a model was made with."""
    path = origin.get("inputs", {}).get(role, {}).get("path")
    return path.removeprefix("data/") if path else None


if __name__ == "__main__":
    stage.main(run)
