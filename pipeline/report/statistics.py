"""Intervals and paired differences of accuracies."""

import math
from typing import NamedTuple

import numpy as np

Z95 = 1.959964
BINS = 15  # of the calibration error, as in Guo et al. 2017


class Difference(NamedTuple):
    """The difference of two top-1 accuracies on the same images, -1..1, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def bonett_price(gained: int, lost: int, n: int, z: float) -> tuple[float, float]:
    """The adjusted Wald interval of a paired difference of proportions, at z standard errors (Bonett and Price 2012).

    Only the images that one of the two names right and the other wrong count, which makes it narrower than that of two
    independent samples.
    """
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return max(p - q - half, -1.0), min(p - q + half, 1.0)


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `right` in `n`."""
    share, z2 = right / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return centre - half, centre + half


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[tuple[int, float, float]]:
    """Count, mean confidence and accuracy (0 where empty) by bin of equal width, of (N,) confidences and whether they were right.

    The expected calibration error is the mean over images of the gap of their bin.
    """
    bin_of = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(bin_of, minlength=BINS)
    means = [np.bincount(bin_of, values, BINS) / np.maximum(count, 1) for values in (confidence, right)]
    return [(int(n), float(c), float(a)) for n, c, a in zip(count, *means, strict=True)]
