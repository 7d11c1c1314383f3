"""Measure a model on the validation images, once, and on the held-out images, where choices are made."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from pyarrow import csv
from pydantic import PositiveInt
from torch import Tensor, nn

from pipeline import artifact, checkpoint, corruptions, device, exits, images, manifest, models, network, predict, stage
from pipeline.exits import ExitError
from pipeline.images import Input, Pixels
from pipeline.params import Machine, Section

BINS = 15  # of the calibration error, as in Guo et al. 2017
Z95 = 1.959964
THRESHOLDS = (0.0, *(i / 20 for i in range(2, 20)), 0.97, 0.98, 0.99, 0.995, 0.999, 1.01)
"""Confidences at which an image may leave; at the last none does before the deepest exit."""
ROUNDS = 5  # of a measurement of time; the fastest counts, as other work on the machine can only slow one down
TIMED = 8 * predict.BATCH  # images of a round


class Evaluate(Section):
    """`model`: the model directory to measure (read by dvc.yaml).

    `exit`: of a network with exits, the number of one, all as an `ensemble`, or `early`: the first that is sure enough, at the
    threshold that costs least among those with which the held-out images lose nothing against the deepest exit. null: the
    deepest, with a table of all of these beside it.

    `size`: measure at another input size, with a canvas enlarged in proportion (Touvron et al. 2019, "FixRes": networks trained
    on crops see larger objects than they meet when tested). `corruptions`: also on worse images. `timing`: also the images per
    second of this machine, which makes the evaluation another one each time it is done.
    """

    model: str
    exit: int | Literal["ensemble", "early"] | None = None
    size: PositiveInt | None = None
    corruptions: bool = False
    timing: bool = False


def run(
    params: Evaluate,
    *,
    train: Path,
    val: Path,
    holdout: Path,
    model: Path,
    out: Path,
    journal: stage.Journal,
    machine: Machine,
) -> stage.Metrics:
    """Write `evaluation.json`, `confusion.csv` and the predictions on `val`, and the model's learning history.

    Accuracies lie in 0..1, with Wilson's 95 % interval; `nll` is in nats; `ece` is the expected calibration error over 15 bins
    of equal width. Raises CheckpointError if the model's classes are not the training set's, ExitError if it has no such exit.
    """
    classes = manifest.read(train).classes
    on = device.pick(machine)
    cores = machine.cores(machine.workers)
    number = params.exit if isinstance(params.exit, int) else None
    classifier, description, given = network.load(model, classes, number)
    whole = network.load_exits(model, classes)
    if isinstance(params.exit, str) and whole is None:
        raise ExitError(f"`exit` is {params.exit}, but {model} has no exits: they come with `self_distil`.")
    if params.size is not None:
        canvas = max(params.size, round(given.side * params.size / given.size))
        given = given.model_copy(update={"size": params.size, "canvas": canvas})
    tables = {name: manifest.read(folder) for name, folder in (("holdout", holdout), ("val", val))}
    pixels = {name: images.load(t, given.side, cores, machine.memory_gb, name) for name, t in tables.items()}
    labels = {name: torch.from_numpy(t.labels()) for name, t in tables.items()}
    every = whole if params.exit in (None, "early") else None  # only these two look at what each exit says
    costs = [models.macs(exits.Stacked(every, i + 1), given.size) for i in range(len(every))] if every else []
    stacked = {name: _logits(exits.Stacked(on.place(every)), p, given, on) for name, p in pixels.items()} if every else {}
    macs = None
    if whole and params.exit == "ensemble":
        classifier = exits.Ensemble(whole)
    elif whole and params.exit == "early":
        threshold = cheapest(stacked["holdout"], labels["holdout"], costs)
        classifier, macs = exits.Early(whole, threshold), mean_cost(exits.leaving(stacked["val"], threshold), costs)
    on.place(classifier)
    logits = {name: _logits(classifier, p, given, on) for name, p in pixels.items()}
    measured = {name: measure(logits[name], labels[name], classes) for name in tables}
    origin = artifact.record(model)
    evaluation: dict[str, Any] = {
        "model": {
            "arch": description.arch,
            "parameters": models.parameters_of(classifier),
            "macs": models.macs(classifier, given.size) if macs is None else macs,
            "input": given.size,
            "exit": params.exit,
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
    shown = ("top1", "top1_low", "top1_high", "top5", "nll", "ece")
    metrics: dict[str, Any] = {"n": measured["val"]["n"]}
    metrics |= {f"{name}_{key}": measured[name][key] for name in ("val", "holdout") for key in shown}
    timed = {"whole": classifier}
    if whole and params.exit is None:
        ways = {str(i): network.load(model, classes, i)[0] for i in range(1, len(whole) + 1)} | {
            "ensemble": exits.Ensemble(whole)
        }
        evaluation["exits"] = compared = compare_exits(stacked, labels, ways, costs, given.size)
        metrics["exits"] = {row["exit"]: row["val_top1"] for row in compared["rows"]}
        timed = {**ways, "early": exits.Early(whole, compared["threshold"])}
    if params.corruptions:
        harmed = {name: corrupted(classifier, pixels[name], labels[name], given, on) for name in tables}
        evaluation["corruptions"] = {"severities": corruptions.SEVERITIES, **harmed}
        metrics |= {f"{name}_corrupted_top1": float(np.mean(list(shares.values()))) for name, shares in harmed.items()}
    if params.timing:
        speeds = images_per_second({name: on.place(m) for name, m in timed.items()}, pixels["val"], given, on)
        journal.log(None, **{f"images_per_second_{name}": speed for name, speed in speeds.items()})
        how = {"device": str(on.device), "dtype": str(on.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
        evaluation["speed"] = {**how, "batch": predict.BATCH, "images_per_second": speeds}
    with artifact.writing(out) as tmp:
        (tmp / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n")
        (tmp / checkpoint.HISTORY).write_bytes((model / checkpoint.HISTORY).read_bytes())
        pq.write_table(_predictions(tables["val"], logits["val"]), tmp / "predictions.parquet")
        csv.write_csv(confusion(logits["val"].argmax(1), labels["val"], classes), tmp / "confusion.csv")
    return metrics


# One classifier -------------------------------------------------------------------------------------------------------


def measure(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Accuracies and calibration of (N, C) logits against (N,) labels; see `run`.

    `reliability`: for each of 15 bins of confidence the number of images, their mean confidence and their accuracy.
    """
    n = len(labels)
    p, predicted = logits.softmax(1).max(1)
    right = predicted == labels
    top5 = (logits.topk(min(5, len(classes))).indices == labels[:, None]).any(1)
    low, high = wilson(int(right.sum()), n)
    per_class = {name: float(right[labels == i].double().mean()) for i, name in enumerate(classes) if bool((labels == i).any())}
    bins = reliability(p.double().numpy(), right.numpy())
    return {
        "n": n,
        "top1": float(right.double().mean()),
        "top1_low": low,
        "top1_high": high,
        "top5": float(top5.double().mean()),
        "nll": float(F.cross_entropy(logits, labels)),
        "ece": sum(count * abs(confidence - accuracy) for count, confidence, accuracy in bins) / n,
        "per_class": per_class,
        "reliability": bins,
    }


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `right` in `n`."""
    share, z2 = right / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return centre - half, centre + half


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[tuple[int, float, float]]:
    """Of (N,) confidences and whether they were right, per bin of equal width: count, mean confidence, accuracy (0 where empty).

    The expected calibration error is the mean over images of the gap of their bin. torchmetrics has it too, at two seconds of
    import in each of many short stages; a test compares the two.
    """
    bin_of = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(bin_of, minlength=BINS)
    means = [np.bincount(bin_of, values, BINS) / np.maximum(count, 1) for values in (confidence, right)]
    return [(int(n), float(c), float(a)) for n, c, a in zip(count, *means, strict=True)]


def confusion(predicted: Tensor, labels: Tensor, classes: tuple[str, ...]) -> pa.Table:
    """How often each class was named for each class, the most frequent mistakes first; pairs that did not occur are left out."""
    counts = torch.bincount(labels * len(classes) + predicted, minlength=len(classes) ** 2)
    pairs = counts.nonzero()[:, 0]
    of, named = pairs // len(classes), pairs % len(classes)
    order = np.lexsort((pairs.numpy(), -counts[pairs].numpy(), (of == named).numpy()))
    columns = {"class": of, "named": named}
    table = {name: [classes[i] for i in numbers.numpy()[order]] for name, numbers in columns.items()}
    return pa.table({**table, "images": counts[pairs].numpy()[order]})


def corrupted(model: nn.Module, pixels: Pixels, labels: Tensor, given: Input, on: device.Device) -> dict[str, list[float]]:
    """Top-1 accuracy for each corruption, at each of `corruptions.SEVERITIES`."""
    return {
        name: [
            float((_logits(model, corruptions.Corrupted(pixels, name, s), given, on).argmax(1) == labels).double().mean())
            for s in corruptions.SEVERITIES
        ]
        for name in corruptions.CORRUPTIONS
    }


def images_per_second(ways: Mapping[str, nn.Module], pixels: Pixels, given: Input, on: device.Device) -> dict[str, float]:
    """How fast each network answers on decoded images, in batches of 256, batch normalisation unfolded; taken in turns.

    The images are the same for all, from all over the set, as those of an early exit take different times.
    """
    rows = np.linspace(0, len(pixels) - 1, min(len(pixels), TIMED)).astype(int)
    batches = [
        images.centre(on.batch(pixels.gather(part)), given.size) for part in np.array_split(rows, -(-len(rows) // predict.BATCH))
    ]
    best = dict.fromkeys(ways, math.inf)
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, model in ways.items():
                model.eval()
                start = time.perf_counter()
                for batch in batches:
                    predict.forward(model, batch, given, on).argmax(1).cpu()
                best[name] = min(best[name], time.perf_counter() - start)
    return {name: len(rows) / seconds for name, seconds in best.items()}


# Several exits --------------------------------------------------------------------------------------------------------


def compare_exits(
    logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], ways: Mapping[str, nn.Module], costs: list[int], size: int
) -> dict[str, Any]:
    """Each exit by itself, the ensemble and early exits at several thresholds: accuracy against multiply-accumulates per image.

    `logits`: (N, exits, C) and `labels`: (N,), of `val` and `holdout`. `ways`: the classifier of each exit and the ensemble.
    `costs`: see `mean_cost`. `threshold` is the one chosen on `holdout`; `leaving` the share of `val` that leaves at each exit.
    """
    rows = []
    for i, (name, model) in enumerate(ways.items()):
        found = {split: s[:, i] if i < s.shape[1] else exits.mean_probability(s) for split, s in logits.items()}
        rows.append(
            {"exit": name, "parameters": models.parameters_of(model), "macs": models.macs(model, size), **_top1(found, labels)}
        )
    threshold = cheapest(logits["holdout"], labels["holdout"], costs)
    curve = []
    for t in THRESHOLDS:
        at = {split: exits.leaving(s, t) for split, s in logits.items()}
        found = {split: s[torch.arange(len(s)), at[split]] for split, s in logits.items()}
        curve.append({"threshold": t, "macs": mean_cost(at["val"], costs), **_top1(found, labels)})
    chosen = curve[THRESHOLDS.index(threshold)]
    rows.append({"exit": "early", "parameters": rows[-1]["parameters"], **{k: v for k, v in chosen.items() if k != "threshold"}})
    left = exits.leaving(logits["val"], threshold)
    shares = [float((left == i).double().mean()) for i in range(len(costs))]
    return {"rows": rows, "threshold": threshold, "leaving": shares, "curve": curve}


def cheapest(logits: Tensor, labels: Tensor, costs: list[int]) -> float:
    """The threshold that costs least among those with which (N, exits, C) logits are right as often as the deepest exit's."""
    enough = int((logits[:, -1].argmax(1) == labels).sum())
    possible = []
    for threshold in THRESHOLDS:
        at = exits.leaving(logits, threshold)
        if int((logits[torch.arange(len(at)), at].argmax(1) == labels).sum()) >= enough:
            possible.append((mean_cost(at, costs), threshold))
    return min(possible)[1]  # the last threshold, at which no image leaves early, is always possible


def mean_cost(leaving: Tensor, costs: list[int]) -> int:
    """Multiply-accumulates per image; `costs`: those of an image that leaves at each exit, the exits before it included."""
    return round(float(torch.tensor(costs, dtype=torch.float64)[leaving].mean()))


def _top1(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, float]:
    return {f"{split}_top1": float((s.argmax(1) == labels[split]).double().mean()) for split, s in logits.items()}


def _logits(model: nn.Module, pixels: Pixels, given: Input, on: device.Device) -> Tensor:
    return torch.cat([batch for _, batch in predict.logits(model, pixels, given, on)])


def _predictions(labelled: manifest.Manifest, logits: Tensor) -> pa.Table:
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
