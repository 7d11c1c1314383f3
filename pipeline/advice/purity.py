"""How pure a selection will be, from what a teacher says of the pool and of held-out images.

A calibrated teacher knows how often it is right on images like the held-out ones. It does not know how many images of the pool
belong to no class, for which it names a class as well, often surely. So two things are estimated apart:

- the probability that the first class of an image is right, if the image belongs to any (logistic, on the held-out images);
- the probability that it belongs to any: a classifier learns to tell held-out images from pool images by the teacher's logits
  (learning from positive and unlabelled images, Elkan and Noto 2008), and the share of own images in the pool is taken where
  held-out images are most frequent among the pool's (best bin estimation, Garg et al. 2021). If foreign images stand even there,
  the share, and with it the purity, comes out too high: the scores alone cannot tell.
"""

from typing import NamedTuple

import numpy as np

FOLDS = 5  # held-out images are scored by a classifier that has not seen them
SAMPLE = 20_000  # images of the pool that a classifier learns from
FEW = 50  # classes up to which their names count as evidence: of more there are too few held-out images each
RIDGE = 20.0  # of the coefficients, on standardised evidence
SURE = 0.1  # the probability with which the bound of the best bin may fail
WIDTH = 0.08  # of the kernel that smooths densities over ranks in 0..1
ROWS = 1 << 18  # of the pool at a time


class Answers(NamedTuple):
    """Of N images: (N, m) float32 logits of the best classes, best first; (N,) the first class; (N,) logsumexp of all logits."""

    logits: np.ndarray
    first: np.ndarray
    logsumexp: np.ndarray

    def log_p(self) -> np.ndarray:
        """(N,) float32, of the first class; at most 0."""
        return np.asarray(np.minimum(self.logits[:, 0] - self.logsumexp, np.float32(0)))


class Estimate(NamedTuple):
    """Of each image of the pool, (N,) in 0..1: that it belongs to a class, and that its first class is right if it does; and the
    share of the pool that belongs to a class."""

    own: np.ndarray
    right: np.ndarray
    share: float

    @property
    def pure(self) -> np.ndarray:
        """(N,) the probability that an image holds its first class."""
        return np.asarray(self.own * self.right)


def estimate(pool: Answers, holdout: Answers, is_right: np.ndarray, classes: int) -> Estimate:
    """`is_right`: (n,) whether the teacher's first class is that of the held-out image. At least FOLDS held-out images."""
    rank_held, rank_pool = _ranks(pool, holdout, classes)
    share = best_bin(rank_held)
    grid = np.linspace(0, 1, 201)
    own = np.interp(rank_pool, grid, np.clip(share * density(rank_held, grid), 0, 1))
    evidence = [np.sqrt(a.logits[:, :1] - a.logits[:, 1:2]) for a in (holdout, pool)]
    mean, sd = evidence[0].mean(), evidence[0].std() + 1e-6
    held, all_of_pool = ((e - mean) / sd for e in evidence)
    weights = logistic(held, is_right, np.ones(len(held)), ridge=0.1)
    return Estimate(own, expit(all_of_pool @ weights[1:] + weights[0]), share)


def best_bin(ranks: np.ndarray) -> float:
    """The share of the pool that is like the held-out images, in 0..1 (Garg et al. 2021, algorithm 1).

    `ranks`: (n,) the share of the pool that looks at least as much like a held-out image as each of these does. If own images and
    no others stand at the front, the front u of the pool has a share u/share of them; the front is taken where that is surest.
    """
    u = np.sort(ranks)
    held = np.arange(1, len(u) + 1) / len(u)
    at = np.argmin((u + np.sqrt(np.log(1 / SURE) / (2 * len(u)))) / held)
    above = 1 + np.sqrt((1 - held[at]) / (len(u) * held[at]))  # the least of many is too low: one standard error more
    return float(min(1.0, max(u[at], 1e-6) / held[at] * above))


def density(ranks: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Of (n,) values in 0..1, smoothed, reflected at both ends; the pool's own ranks have density 1 everywhere."""
    mirrored = np.concatenate([ranks, -ranks, 2 - ranks])
    apart = (at[:, None] - mirrored) / WIDTH
    return np.asarray(np.exp(-(apart**2) / 2).sum(1) / (WIDTH * np.sqrt(2 * np.pi) * len(ranks)))


def _ranks(pool: Answers, holdout: Answers, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """For (n,) held-out images and (N,) of the pool the share of the pool that looks at least as much like held-out ones."""
    rng = np.random.default_rng(0)
    held, part = evidence(holdout, classes), rng.permutation(len(holdout.first)) % FOLDS
    sample = np.sort(rng.permutation(len(pool.first))[:SAMPLE])
    seen = evidence(_take(pool, sample), classes)
    rank_held, rank_pool = np.zeros(len(held)), np.zeros(len(pool.first))
    for fold in range(FOLDS):
        learned = held[part != fold]
        x = np.concatenate([learned, seen])
        mean, sd = x.mean(0), x.std(0) + 1e-6
        y = np.arange(len(x)) < len(learned)
        weight = np.where(y, 1.0, len(learned) / len(seen))  # both sides weigh the same
        w = logistic((x - mean) / sd, y, weight, RIDGE)

        def score(x: np.ndarray, mean: np.ndarray = mean, sd: np.ndarray = sd, w: np.ndarray = w) -> np.ndarray:
            return np.asarray((x - mean) / sd @ w[1:])

        ordered = np.sort(score(seen))

        def rank(scores: np.ndarray, ordered: np.ndarray = ordered) -> np.ndarray:
            return np.asarray(1 - np.searchsorted(ordered, scores) / len(ordered))

        rank_held[part == fold] = rank(score(held[part == fold]))
        for first in range(0, len(rank_pool), ROWS):
            rows = slice(first, first + ROWS)
            rank_pool[rows] += rank(score(evidence(_take(pool, rows), classes))) / FOLDS
    return rank_held, rank_pool


def _take(answers: Answers, rows: np.ndarray | slice) -> Answers:
    return Answers(*(column[rows] for column in answers))


def evidence(answers: Answers, classes: int) -> np.ndarray:
    """(N, F) float64: the logits against their mean, how peaked they are, and, of few classes, which comes first."""
    logits = answers.logits.astype(np.float64)
    mean = logits.mean(1, keepdims=True)
    gaps = -np.diff(logits[:, :3], axis=1)
    columns = [
        logits - mean,
        (answers.logsumexp[:, None] - mean),
        gaps,
        np.sqrt(gaps),
        ((logits - mean) ** 2).mean(1, keepdims=True),
    ]
    columns.append(np.exp(logits[:, :3] - answers.logsumexp[:, None]))
    if classes <= FEW:
        columns.append(np.eye(classes)[answers.first])
    return np.concatenate(columns, axis=1)


def logistic(x: np.ndarray, y: np.ndarray, weight: np.ndarray, ridge: float) -> np.ndarray:
    """(1 + F,) coefficients, the constant first, of (N, F) evidence for (N,) bool, by Newton's method; `ridge` is not on the
    constant."""
    x = np.hstack([np.ones((len(x), 1)), x])
    penalty = np.full(x.shape[1], ridge)
    penalty[0] = 1e-6
    w = np.zeros(x.shape[1])
    for _ in range(25):
        p = expit(x @ w)
        gradient = x.T @ (weight * (y - p)) - penalty * w
        curvature = (x * (weight * np.maximum(p * (1 - p), 1e-6))[:, None]).T @ x + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        w += step
        if np.abs(step).max() < 1e-6:
            break
    return w


def expit(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))
