"""Labels that may be wrong, by confident learning (Northcutt, Jiang and Chuang 2021, "Confident Learning")."""

from typing import NamedTuple

import numpy as np


class Suspects(NamedTuple):
    """`rows`: (S,) of the images, the most doubtful first. `better`: (S,) the class that each seems to hold."""

    rows: np.ndarray
    better: np.ndarray


def suspects(probabilities: np.ndarray, labels: np.ndarray) -> Suspects:
    """The images that are confidently of another class than (N,) `labels` say.

    `probabilities`: (N, C), of a model that has not learned these labels: one that has repeats them. A class counts for an image
    if its probability is at least the mean that images labelled with it have (equation 2 of the paper); of those that count the
    most probable is taken (equation 1). Order: by the probability of the label less that of the other class.
    """
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    usual = np.bincount(labels, own, len(counts)) / np.maximum(counts, 1)
    counting = np.where((probabilities >= usual) & (counts > 0), probabilities, -1.0)
    better = counting.argmax(1)
    rows = np.flatnonzero((counting.max(1) >= 0) & (better != labels))
    rows = rows[np.argsort(own[rows] - probabilities[rows, better[rows]], kind="stable")]
    return Suspects(rows, better[rows])


def parts(labels: np.ndarray, folds: int) -> np.ndarray:
    """(N,) in which of `folds` parts each image is; each class is spread evenly over them, by chance that is always the same."""
    drawn = np.random.default_rng(0).permutation(len(labels))
    drawn = drawn[np.argsort(labels[drawn], kind="stable")]
    part = np.empty(len(labels), np.int64)
    part[drawn] = np.arange(len(labels)) % folds
    return part
