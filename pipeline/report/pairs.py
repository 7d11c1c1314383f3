"""Two models on the same images: is the one better, are they as good as each other, or can nobody tell?

All that counts are the images on which one is right and the other wrong: `gained` and `lost`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel

from pipeline.report.statistics import Z95, Difference, bonett_price

ALPHA = 0.05
MARGIN = 0.01
"""Two models whose accuracies differ by less than a point, for certain, are equivalent."""
Z90 = 1.644854
ROUNDS = 10_000  # of a bootstrap

Outcome = Literal["better", "worse", "equivalent", "not separable"]


class Pair(NamedTuple):
    """A model against another on the same N images."""

    gained: int
    """Images that it names right and the other wrong."""
    lost: int
    n: int
    difference: Difference
    """Of the accuracies, with the 95 % interval of Bonett and Price (2012)."""
    p: float
    """Of McNemar's test."""

    def outcome(self, p: float | None = None, margin: float = MARGIN) -> Outcome:
        """What the test says; `p`: corrected for the number of pairs that are looked at.

        Equivalent: the 90 % interval lies within the margin, which is two one-sided tests at 5 % (Schuirmann 1987).
        """
        if (self.p if p is None else p) < ALPHA:
            return "better" if self.gained > self.lost else "worse"
        low, high = bonett_price(self.gained, self.lost, self.n, Z90)
        return "equivalent" if -margin < low and high < margin else "not separable"


def compare(right: np.ndarray, other: np.ndarray) -> Pair:
    """(N,) bool each, of the same images in the same order: whether each model is right."""
    return of_counts(int((right & ~other).sum()), int((~right & other).sum()), len(right))


def of_counts(gained: int, lost: int, n: int) -> Pair:
    difference = Difference((gained - lost) / n, *bonett_price(gained, lost, n, Z95))
    return Pair(gained, lost, n, difference, mcnemar(gained, lost))


def every_pair(right: np.ndarray) -> dict[tuple[int, int], Pair]:
    """(E, N) bool: each of the E models against each one after it, by their numbers."""
    hits = right.astype(np.float64)
    gained = np.rint(hits @ (1 - hits).T).astype(int)  # E, E: images that a model of the row names right, of the column wrong
    models = range(len(right))
    return {(i, j): of_counts(int(gained[i, j]), int(gained[j, i]), right.shape[1]) for i in models for j in models[i + 1 :]}


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided mid-p value of McNemar's test: how often a fair coin would fall at least as unevenly.

    The exact test is too cautious and the one with chi-squared too bold for few images; the mid-p value is neither (Fagerland,
    Lydersen and Laake 2013).
    """
    n, k = gained + lost, min(gained, lost)
    log_half = n * math.log(0.5)
    last = math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + log_half)  # of k heads in n throws
    i = np.arange(k, 0, -1)
    before = np.cumprod(i / (n - i + 1))  # of k - 1 heads, k - 2, ..., 0, as shares of the last
    return min(1.0, last * (1 + 2 * float(before.sum())))


def holm(p: Sequence[float]) -> list[float]:
    """The p values, corrected so that one false alarm among all of them is as rare as it would be of one (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate([(len(p) - i) * p[j] for i, j in enumerate(order)])
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in corrected]


def bootstrap(seeds: Sequence[Pair], random: np.random.Generator) -> tuple[float, float]:
    """The 95 % interval of a difference, by drawing seeds with replacement, and in each of them images with replacement.

    One seed: images alone. To draw N images is to draw how many of them are gained, lost and neither.
    """
    drawn = random.integers(0, len(seeds), (ROUNDS, len(seeds)))
    means = np.empty((len(seeds), ROUNDS, len(seeds)))
    for i, pair in enumerate(seeds):
        shares = np.array([pair.gained, pair.lost, pair.n - pair.gained - pair.lost]) / pair.n
        counts = random.multinomial(pair.n, shares, (ROUNDS, len(seeds)))
        means[i] = (counts[..., 0] - counts[..., 1]) / pair.n
    rounds = np.take_along_axis(means, drawn[None], 0)[0].mean(1)
    low, high = np.quantile(rounds, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


class Statistics(BaseModel):
    """A pair as comparison.json has it. `difference`: of the accuracies, -1..1, with its 95 % interval; `p`: of McNemar's test;
    `corrected`: for the number of pairs it was looked at among; `outcome`: what the corrected test says."""

    n: int
    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p: float
    corrected: float
    outcome: Outcome


class Versus(Statistics):
    """`entry` against `other`."""

    entry: str
    other: str

    def turned(self) -> "Versus":
        """`other` against `entry`."""
        word: dict[Outcome, Outcome] = {"better": "worse", "worse": "better"}
        turned = {"entry": self.other, "other": self.entry, "gained": self.lost, "lost": self.gained}
        ends = {"difference": -self.difference, "low": -self.high, "high": -self.low}
        return self.model_copy(update={**turned, **ends, "outcome": word.get(self.outcome, self.outcome)})


class OfClass(Statistics):
    """On the images of the class `name`."""

    name: str


def versus(found: Mapping[tuple[str, str], Pair], margin: float) -> list[Versus]:
    """Each pair by its names, corrected for their number."""
    corrected = holm([pair.p for pair in found.values()])
    return [
        Versus(entry=entry, other=other, **statistics(pair, p, margin))
        for ((entry, other), pair), p in zip(found.items(), corrected, strict=True)
    ]


def statistics(pair: Pair, corrected: float, margin: float) -> dict[str, Any]:
    """The fields of `Statistics`."""
    value, low, high = pair.difference
    counts = {"n": pair.n, "gained": pair.gained, "lost": pair.lost, "difference": value, "low": low, "high": high}
    return {**counts, "p": pair.p, "corrected": corrected, "outcome": pair.outcome(corrected, margin)}


class ClassDifference(NamedTuple):
    """Of a model against another on the images of one class."""

    name: str
    pair: Pair
    p: float
    """Corrected for the number of classes."""


def by_class(labels: np.ndarray, names: Mapping[int, str], right: np.ndarray, other: np.ndarray) -> list[ClassDifference]:
    """The classes of (N,) `labels` that have images, the largest difference first."""
    pairs = {c: compare(right[labels == c], other[labels == c]) for c in np.unique(labels).tolist()}
    corrected = holm([pair.p for pair in pairs.values()])
    rows = [ClassDifference(names[c], pair, p) for (c, pair), p in zip(pairs.items(), corrected, strict=True)]
    return sorted(rows, key=lambda row: -abs(row.pair.difference.value))
