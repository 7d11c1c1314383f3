"""The command `forecast`: before a student is trained, how pure selections will be, which k to choose, and whether it pays."""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from pipeline.advice import selection
from pipeline.errors import UserError
from pipeline.report import purity
from pipeline.report.purity import Answers
from pipeline.store import artifact, manifest
from pipeline.store.scores import Scores, of_pool

PURE, DOUBTFUL = 0.8, 0.7
"""The expected purity, of a selection with at least as many images of each class as are labelled, from which SSLD is expected to
gain over distilling on the labelled images alone, and below which it is not; and so of the share of held-out images that the
teacher names right: of a weak one fewer images are pure than it seems. Rules of thumb; docs/choosing.md says of what."""
FEWEST = 100  # held-out images below which the forecast says how rough it is
NAMED = 8  # classes named in a sentence


class At(NamedTuple):
    """A selection of the k surest images of each class. `expected`: (C,) the share of its images that hold their class, nan for
    a class without images; `taken`: (C,)."""

    k: int
    taken: np.ndarray
    expected: np.ndarray
    naive: float
    """The mean probability of the selected images, as the teacher gives it"""

    @property
    def short(self) -> int:
        """How many classes have fewer than k images."""
        return int((self.taken < self.k).sum())

    @property
    def purity(self) -> float:
        return float(np.nansum(self.expected * self.taken) / max(1, self.taken.sum()))


def run(args: argparse.Namespace) -> str:
    """The forecast as text. Raises UserError for what cannot be used."""
    teacher = selection.teacher_of(artifact.verify(args.scores))
    scored = of_pool(args.scores, args.data / "pool", len(manifest.read(args.data / "pool")))
    (asked, is_right), train = purity.held_out(scored), manifest.read(args.data / "train")
    if len(is_right) < 2 * purity.FOLDS:
        raise UserError(f"the scores have {len(is_right)} held-out images: too few to say anything. Raise `prepare.holdout`.")
    if scored.m < 2:
        raise UserError(f"{args.scores} holds one class of each image: how far the second stands behind is needed. Raise `m`.")
    classes = scored.classes
    pool = of_scores(scored)
    estimate = purity.estimate(pool, asked, is_right, len(classes))
    labelled = max(1, round(len(train) / len(classes)))
    found = selections(pool, estimate.pure, len(classes), args.k or ladder(np.bincount(pool.first).max()))
    if args.csv:
        _write(args.csv, found, classes)
    head = (
        f"{len(pool.first):,} images of the pool, scored by {teacher}, which names {is_right.mean():.1%} of {len(is_right):,} "
        f"held-out images right.\nAbout {estimate.share:.0%} of the pool seem to belong to one of the {len(classes):,} classes.\n"
    )
    return "\n".join([head, table(found), "", *advice(found, labelled, float(is_right.mean()), classes, len(is_right))])


def of_scores(scored: Scores) -> Answers:
    """What the teacher says of the pool."""
    return Answers.of_table(pq.read_table(scored.file), scored.m)


def ladder(largest: int) -> list[int]:
    """10, 20, 50, 100, ... below the size of the largest class."""
    return [step * 10**power for power in range(1, 9) for step in (1, 2, 5) if step * 10**power < largest] or [int(largest)]


def selections(pool: Answers, pure: np.ndarray, classes: int, ks: Sequence[int]) -> list[At]:
    """For each k the k images of highest log p of each class, an image belonging to its first class, as `select` takes them by
    the rule `top`. `pure`: (N,) the probability that an image holds its first class."""
    log_p = pool.log_p()
    order = np.lexsort((-log_p, pool.first))
    first = pool.first[order]
    place = np.arange(len(first)) - np.searchsorted(first, first)
    found = []
    for k in sorted(set(ks)):
        rows = order[place < k]
        taken = np.bincount(pool.first[rows], minlength=classes)
        total = np.bincount(pool.first[rows], pure[rows], classes)
        expected = np.where(taken, total / np.maximum(taken, 1), np.nan)
        found.append(At(k, taken, expected, float(np.exp(log_p[rows]).mean())))
    return found


COLUMNS = ("k", "images", "expected purity", "least pure class", "classes short", "as the teacher says")


def table(found: Sequence[At]) -> str:
    """A row for each k, under COLUMNS."""
    rows = [
        (
            f"{at.k:,}",
            f"{at.taken.sum():,}",
            f"{at.purity:.0%}",
            f"{np.nanmin(at.expected):.0%}",
            f"{at.short:,}",
            f"{at.naive:.0%}",
        )
        for at in found
    ]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (COLUMNS, *rows))


def chosen(found: Sequence[At], labelled: int, accuracy: float) -> tuple[At, str]:
    """The selection to take, and what to expect of it: `gain`, `perhaps`, or `none`.

    The largest k that is expected to be PURE; if that is smaller than `labelled`, the number of labelled images of a class, the
    largest that is not DOUBTFUL; if that is smaller, too, the first k from `labelled` on. `accuracy`: the teacher's, in 0..1, on
    held-out images: the same bounds hold for it.
    """
    verdicts = ("gain", "perhaps", "none")
    most = sum(accuracy < least for least in (PURE, DOUBTFUL))
    for rank, least in enumerate((PURE, DOUBTFUL)):
        good = [at for at in found if at.k >= labelled and at.purity >= least]
        if good:
            return good[-1], verdicts[max(rank, most)]
    return next((at for at in found if at.k >= labelled), found[-1]), "none"


def advice(found: Sequence[At], labelled: int, accuracy: float, classes: Sequence[str], held: int) -> list[str]:
    """Sentences: the k, what to expect, which classes are short or impure, and how far to trust it."""
    at, verdict = chosen(found, labelled, accuracy)
    over = "over distilling on the labelled images alone"
    told = {
        "gain": f"Choose k = {at.k:,}. SSLD is expected to gain {over}.",
        "perhaps": f"Choose k = {at.k:,}, if at all: SSLD may gain {over}, or not. Train both.",
        "none": f"SSLD is not expected to gain {over}. If you try it all the same: k = {at.k:,}.",
    }
    lines, seen = [told[verdict]], f"from {PURE:.0%} on a gain was seen"
    if accuracy < PURE:
        lines.append(f"The teacher names {accuracy:.0%} of the held-out images right; {seen}. A better one helps most.")
    if at.purity < PURE:
        few = f"{at.k:,} images of each class, of which about {labelled:,} are labelled,"
        lines.append(f"{few} are expected to be {at.purity:.0%} pure; {seen}. A pool with more of your classes helps.")
    if short := [f"{classes[c]} {at.taken[c]:,}" for c in np.argsort(at.taken, kind="stable") if at.taken[c] < at.k]:
        lines.append(f"Fewer than {at.k:,}: {_some(short)}.")
    if impure := [f"{classes[c]} {at.expected[c]:.0%}" for c in np.argsort(at.expected) if at.expected[c] < DOUBTFUL]:
        lines.append(f"Least pure at this k: {_some(impure)}. Look at them: python -m pipeline gallery.")
    lines.append(
        "An image of no class counts as wrong. Where such images look like yours to the teacher, purity comes out too high."
    )
    if held < FEWEST:
        lines.append(f"{held} held-out images are few: take the figures as a hint.")
    return lines


def _some(told: Sequence[str]) -> str:
    return ", ".join(told[:NAMED]) + (f", and {len(told) - NAMED} more" if len(told) > NAMED else "")


def _write(file: Path, found: Sequence[At], classes: Sequence[str]) -> None:
    with artifact.writing_file(file) as tmp, tmp.open("w", newline="", encoding="utf-8") as f:
        lines = csv.writer(f)
        lines.writerow(["class", "k", "taken", "expected_purity"])
        lines.writerows([name, at.k, int(at.taken[c]), f"{at.expected[c]:.4f}"] for at in found for c, name in enumerate(classes))
