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
import pyarrow as pa

from pipeline.store.scores import LOGSUMEXP, Scores, names_of

FOLDS = 5  # held-out images are scored by a classifier that has not seen them
SAMPLE = 20_000  # images of the pool that a classifier learns from
FEW = 50  # classes up to which their names count as evidence: of more there are too few held-out images each
RIDGE = 20.0  # of the coefficients, on standardised evidence
SURE = 0.1  # the probability with which the bound of the best bin may fail
WIDTH = 0.08  # of the kernel that smooths densities over ranks in 0..1
ROWS = 1 << 18  # images at a time
GRID = 201  # ranks at which a density is kept


class Answers(NamedTuple):
    """Of N images: (N, m) float32 logits of the best classes, best first; (N,) the first class; (N,) logsumexp of all logits."""

    logits: np.ndarray
    first: np.ndarray
    logsumexp: np.ndarray

    @classmethod
    def of_table(cls, said: pa.Table, m: int) -> "Answers":
        """Of rows of scores (`pipeline.store.scores`)."""
        logits = np.stack([said[name].to_numpy() for name in names_of("logit", m)], axis=1)
        return cls(logits, said["class_0"].to_numpy().astype(np.int64), said[LOGSUMEXP].to_numpy())

    def log_p(self) -> np.ndarray:
        """(N,) float32, of the first class; at most 0."""
        return np.asarray(np.minimum(self.logits[:, 0] - self.logsumexp, np.float32(0)))

    def take(self, rows: np.ndarray | slice) -> "Answers":
        return Answers(*(column[rows] for column in self))


class Estimate(NamedTuple):
    """Of N images, (N,) in 0..1: that each belongs to a class, and that its first class is right if it does; and the share of the
    pool that belongs to a class."""

    own: np.ndarray
    right: np.ndarray
    share: float

    @property
    def pure(self) -> np.ndarray:
        """(N,) the probability that an image holds its first class."""
        return np.asarray(self.own * self.right)


class Fold(NamedTuple):
    """A classifier of held-out images against the pool: what standardises the evidence, its weights, and its scores of the pool's
    sample, ascending."""

    mean: np.ndarray
    sd: np.ndarray
    weights: np.ndarray
    ordered: np.ndarray

    def rank(self, evidence: np.ndarray) -> np.ndarray:
        """(N,) the share of the pool that looks at least as much like held-out images."""
        scores = (evidence - self.mean) / self.sd @ self.weights[1:]
        return np.asarray(1 - np.searchsorted(self.ordered, scores) / len(self.ordered))


class Purity(NamedTuple):
    """What was learned of the pool and the held-out images. `own`: (GRID,) by rank in 0..1, that an image belongs to a class;
    `right`: mean, standard deviation and weights of the evidence that its first class is right if it does."""

    folds: tuple[Fold, ...]
    share: float
    own: np.ndarray
    right: tuple[float, float, np.ndarray]
    classes: int

    def of(self, said: Answers) -> Estimate:
        """Of any images of the pool."""
        rank = np.zeros(len(said.first))
        for first in range(0, len(rank), ROWS):
            part = evidence(said.take(slice(first, first + ROWS)), self.classes)
            rank[first : first + ROWS] = np.mean([fold.rank(part) for fold in self.folds], axis=0)
        mean, sd, weights = self.right
        is_right = expit((_gap(said) - mean) / sd * weights[1] + weights[0])
        return Estimate(np.interp(rank, np.linspace(0, 1, GRID), self.own), is_right, self.share)


def held_out(scored: Scores) -> tuple[Answers, np.ndarray]:
    """What the teacher says of the held-out images, and (n,) bool, of which of them it names the class. Raises UserError."""
    held = scored.held()
    said = Answers.of_table(held, scored.m)
    return said, said.first == held["label"].to_numpy()


def estimate(pool: Answers, holdout: Answers, is_right: np.ndarray, classes: int) -> Estimate:
    """Of each image of the pool. `is_right`: (n,) whether the teacher's first class is that of the held-out image."""
    return learn(pool.take(sample(len(pool.first))), holdout, is_right, classes).of(pool)


def sample(images: int) -> np.ndarray:
    """The rows of the pool that `learn` is to see, ascending: by chance, the same each time."""
    return np.sort(np.random.default_rng(0).permutation(images)[:SAMPLE])


def learn(pool: Answers, holdout: Answers, is_right: np.ndarray, classes: int) -> Purity:
    """From a `sample` of the pool, and at least FOLDS held-out images."""
    held, part = evidence(holdout, classes), np.random.default_rng(0).permutation(len(holdout.first)) % FOLDS
    seen, rank, folds = evidence(pool, classes), np.zeros(len(held)), list[Fold]()
    for number in range(FOLDS):
        learned = held[part != number]
        x = np.concatenate([learned, seen])
        mean, sd = x.mean(0), x.std(0) + 1e-6
        y = np.arange(len(x)) < len(learned)
        weight = np.where(y, 1.0, len(learned) / len(seen))  # both sides weigh the same
        weights = logistic((x - mean) / sd, y, weight, RIDGE)
        folds.append(Fold(mean, sd, weights, np.sort((seen - mean) / sd @ weights[1:])))
        rank[part == number] = folds[-1].rank(held[part == number])
    share = best_bin(rank)
    own = np.clip(share * density(rank, np.linspace(0, 1, GRID)), 0, 1)
    gap = _gap(holdout)
    mean, sd = float(gap.mean()), float(gap.std()) + 1e-6
    weights = logistic(((gap - mean) / sd)[:, None], is_right, np.ones(len(held)), ridge=0.1)
    return Purity(tuple(folds), share, own, (mean, sd, weights), classes)


def _gap(said: Answers) -> np.ndarray:
    """(N,) how far the first class stands before the second."""
    return np.asarray(np.sqrt(said.logits[:, 0] - said.logits[:, 1]))


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
