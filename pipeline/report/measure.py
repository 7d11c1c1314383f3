"""What a classifier answers on labelled images, measured: accuracy, calibration, exits, corruptions, speed."""

import math
import time
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models import architectures, device, exits, inputs, prediction
from pipeline.models.inputs import Input, Pixels
from pipeline.report import corruptions
from pipeline.report.evaluation import Calibration, ExitComparison, Measured, Point, Way
from pipeline.report.statistics import reliability, wilson

THRESHOLDS = (0.0, *(i / 20 for i in range(2, 20)), 0.97, 0.98, 0.99, 0.995, 0.999, 1.01)
"""Confidences at which an image may leave; at the last none does before the deepest exit."""
ROUNDS = 5  # of a measurement of time; the fastest counts, as other work on the machine can only slow one down
WIDEST = 20.0  # a temperature; holdout answered without a mistake would have none
TIMED = 8 * prediction.BATCH  # images of a round


# One classifier -------------------------------------------------------------------------------------------------------


def measure(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Measured:
    """Accuracies and calibration of (N, C) logits against (N,) labels; `reliability` has 15 bins."""
    n = len(labels)
    p, predicted = logits.softmax(1).max(1)
    right = predicted == labels
    top5 = (logits.topk(min(5, len(classes))).indices == labels[:, None]).any(1)
    low, high = wilson(int(right.sum()), n)
    per_class = {name: float(right[labels == i].double().mean()) for i, name in enumerate(classes) if bool((labels == i).any())}
    bins = reliability(p.double().numpy(), right.numpy())
    return Measured(
        n=n,
        top1=float(right.double().mean()),
        top1_low=low,
        top1_high=high,
        top5=float(top5.double().mean()),
        nll=float(F.cross_entropy(logits, labels)),
        ece=sum(count * abs(confidence - accuracy) for count, confidence, accuracy in bins) / n,
        per_class=per_class,
        reliability=bins,
    )


def calibrate(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], classes: tuple[str, ...]) -> Calibration:
    """`val`'s calibration at the temperature of 1/`WIDEST`..`WIDEST` that has the least nll on `holdout` ((N, C), (N,) each)."""
    held_out = logits["holdout"].double()

    def nll(log_t: float) -> float:
        return float(F.cross_entropy(held_out / math.exp(log_t), labels["holdout"]))

    low, high = -math.log(WIDEST), math.log(WIDEST)  # nll is convex in 1/T, so it has one minimum
    while high - low > 1e-4:
        a, b = low + 0.381966 * (high - low), high - 0.381966 * (high - low)
        low, high = (low, b) if nll(a) <= nll(b) else (a, high)
    temperature = math.exp((low + high) / 2)
    val = measure(logits["val"] / temperature, labels["val"], classes)
    return Calibration(temperature=temperature, val_ece=val.ece, val_nll=val.nll)


def confusion(predicted: Tensor, labels: Tensor, classes: tuple[str, ...]) -> pa.Table:
    """How often each class was named for each class, the most frequent mistakes first; pairs that did not occur are left out."""
    counts = torch.bincount(labels * len(classes) + predicted, minlength=len(classes) ** 2)
    pairs = counts.nonzero()[:, 0]
    of, named = pairs // len(classes), pairs % len(classes)
    order = np.lexsort((pairs.numpy(), -counts[pairs].numpy(), (of == named).numpy()))
    columns = {"class": of, "named": named}
    table = {name: [classes[i] for i in numbers.numpy()[order]] for name, numbers in columns.items()}
    return pa.table({**table, "images": counts[pairs].numpy()[order]})


def corrupted(model: nn.Module, pixels: Pixels, labels: Tensor, input_spec: Input, on: device.Device) -> dict[str, list[float]]:
    """Top-1 accuracy for each corruption, at each of `corruptions.SEVERITIES`."""
    return {
        name: [
            float((logits_of(model, corruptions.Corrupted(pixels, name, s), input_spec, on).argmax(1) == labels).double().mean())
            for s in corruptions.SEVERITIES
        ]
        for name in corruptions.CORRUPTIONS
    }


def images_per_second(ways: Mapping[str, nn.Module], pixels: Pixels, input_spec: Input, on: device.Device) -> dict[str, float]:
    """How fast each network answers on decoded images, in batches of 256, batch normalisation unfolded; taken in turns.

    The images are the same for all, from all over the set, as those of an early exit take different times.
    """
    rows = np.linspace(0, len(pixels) - 1, min(len(pixels), TIMED)).astype(int)
    batches = [
        inputs.centre(on.batch(pixels.gather(part)), input_spec.size)
        for part in np.array_split(rows, -(-len(rows) // prediction.BATCH))
    ]
    best = dict.fromkeys(ways, math.inf)
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, model in ways.items():
                model.eval()
                start = time.perf_counter()
                for batch in batches:
                    prediction.forward(model, batch, input_spec, on).argmax(1).cpu()
                best[name] = min(best[name], time.perf_counter() - start)
    return {name: len(rows) / seconds for name, seconds in best.items()}


# Several exits --------------------------------------------------------------------------------------------------------


def compare_exits(
    logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], ways: Mapping[str, nn.Module], costs: list[int], size: int
) -> ExitComparison:
    """Each exit by itself, the ensemble and early exits at several thresholds: accuracy against multiply-accumulates per image.

    `logits`: (N, exits, C) and `labels`: (N,), of `val` and `holdout`. `ways`: the classifier of each exit and the ensemble.
    `costs`: see `mean_cost`.
    """
    rows = []
    for i, (name, model) in enumerate(ways.items()):
        answers = {split: s[:, i] if i < s.shape[1] else exits.mean_probability(s) for split, s in logits.items()}
        parameters, cost = architectures.parameters_of(model), architectures.macs(model, size)
        rows.append(Way(exit=name, parameters=parameters, macs=cost, **_top1(answers, labels)))
    threshold = cheapest(logits["holdout"], labels["holdout"], costs)
    curve = []
    for t in THRESHOLDS:
        at = {split: exits.leaving(s, t) for split, s in logits.items()}
        answers = {split: s[torch.arange(len(s)), at[split]] for split, s in logits.items()}
        curve.append(Point(threshold=t, macs=mean_cost(at["val"], costs), **_top1(answers, labels)))
    chosen = curve[THRESHOLDS.index(threshold)]
    rows.append(Way(exit="early", parameters=rows[-1].parameters, **chosen.model_dump(exclude={"threshold"})))
    left = exits.leaving(logits["val"], threshold)
    shares = [float((left == i).double().mean()) for i in range(len(costs))]
    return ExitComparison(rows=rows, threshold=threshold, leaving=shares, curve=curve)


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


def logits_of(model: nn.Module, pixels: Pixels, input_spec: Input, on: device.Device) -> Tensor:
    return torch.cat([batch for _, batch in prediction.logits(model, pixels, input_spec, on)])
