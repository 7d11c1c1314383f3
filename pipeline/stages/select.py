"""Select the pool images that the student learns from: the teacher's surest k of each class, or a control."""

import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipeline.errors import UserError
from pipeline.harness import stage
from pipeline.harness.machine import Machine
from pipeline.report import purity
from pipeline.report.purity import Answers
from pipeline.store import artifact, manifest
from pipeline.store.params import MadeScores, Section
from pipeline.store.ranking import Taken, ranked, shared_out
from pipeline.store.scores import Scores, names_of, of_pool

SELECTION = "selection.json"
LARGEST = 999_999
"""The largest number of images that DuckDB keeps of a class."""
NAMED = 20
"""Short classes named on the terminal; the metrics and selection.json name all."""
LOOKED_AT = 256
"""Images of a class, spread evenly over its ranks, whose purity is estimated."""
IMPURE = 0.7
"""Classes of a lower expected purity are named in the metrics."""


class Select(Section):
    """Which images of the pool are selected (SSLD's documentation).

    Without `several`, the pairs of image and class are gone through from the highest log p down (ties: first image first, then
    first class first). A pair is taken when its image is still free and its class has fewer than `k`.
    """

    scores: MadeScores
    """The scores to select by: an entry of `score`."""
    rule: Literal["top", "band", "balanced", "random", "all"]
    """`top` takes the `k` images of each class that have the highest log p, and `band` the `k` after the first `skip` of them.
    The controls are drawn by the seed: `balanced` takes as many images of each class as `top` would, of those whose first class
    it is (all where these are fewer); `random` as many images as `top` would. `all` takes the pool."""
    k: PositiveInt = Field(le=LARGEST)
    """Images of each class."""
    skip: NonNegativeInt = 0
    """With `band`: how many of the first images of each class are passed over."""
    membership: Literal["argmax", "top_p", "any"] = "argmax"
    """An image belongs to its first class, to its first `p` (Yalniz et al. 2019), or to each class that its scores hold."""
    p: PositiveInt = 10
    """How many of its first classes `top_p` counts; at most `m` of the scores."""
    several: bool = True
    """Whether more than one class may take the same image."""

    @model_validator(mode="after")
    def _skip_belongs_to_band(self) -> "Select":
        if (self.rule == "band") != (self.skip > 0):
            raise ValueError("`rule: band` needs a `skip` above 0, which no other rule has")
        if self.skip + self.k > LARGEST:
            raise ValueError(f"`skip` and `k` together may be {LARGEST:,} at most")
        return self

    def members(self, scored: Scores) -> int:
        """How many of an image's classes, from its first, may take it. Raises UserError if its scores hold fewer."""
        if self.membership == "top_p" and self.p > scored.m:
            raise UserError(
                f"`select`: `p` is {self.p}, but {scored.file.parent} holds the first {scored.m} classes of each image only. "
                f"Lower `p` to {scored.m}, or let `score` store more."
            )
        return {"argmax": 1, "top_p": self.p, "any": scored.m}[self.membership]


def run(params: Select, *, scores: Path, pool: Path, out: Path, seed: int, workdir: Path, machine: Machine) -> stage.Metrics:
    """Keep the pool images that the teacher is surest of, the same number of each class.

    `scores`: an artifact of `score`, made from the manifest `pool`. `out`: a manifest of the selected images, without labels,
    whose classes are the teacher's. The file selection.json beside it says for each class how many images it took, how many
    were available, and the log p of the last. For the rules `balanced`, `random` and `all`, an image counts for its first class,
    and there is no last log p.

    The result does not depend on threads, memory or row groups. Raises UserError if the scores are of another pool.
    """
    images = manifest.count(pool)
    scored = of_pool(artifact.verify(scores), pool, images)
    classes = scored.classes
    rows = np.arange(images) if params.rule == "all" else np.empty(0, np.int64)
    if params.rule != "all":
        members = params.members(scored)
        if params.several or members == 1:
            taken, available = ranked(
                scored, members, params.skip + params.k, workdir / "duckdb", machine.cores(machine.threads), machine.memory_gb
            )
        else:
            taken, available = shared_out(scored, members, params.skip + params.k)
        taken = taken.after(params.skip)
        rows = np.flatnonzero(np.bincount(taken.images, minlength=images))  # np.unique takes a third of the time of the query
    if params.rule in ("balanced", "random", "all"):
        first = scored.matrix(names_of("class", 1))[:, 0].astype(np.int64)
        if params.rule == "balanced":
            rows = _balanced(first, np.bincount(taken.classes, minlength=len(classes)), seed)
        elif params.rule == "random":
            rows = np.sort(np.random.default_rng(seed).permutation(images)[: len(rows)])
        taken, available = (
            Taken(rows, first[rows], np.full(len(rows), -1, np.float32)),
            np.bincount(first, minlength=len(classes)),
        )
    per_class = _per_class(taken, available, classes)
    by_class = params.rule in ("top", "band", "balanced")
    short = {c["class"]: c["taken"] for c in per_class if c["taken"] < params.k} if by_class else {}
    _warn(short, params.k, len(classes))
    metrics = {
        "images": len(rows),
        "pool": images,
        "in_several_classes": int((np.bincount(taken.images) > 1).sum()),
        "classes_short": len(short),
        "short": short,
        **_expected(params, scored, taken, per_class),
    }
    with artifact.writing(out) as tmp:
        _write(tmp, pool, rows, classes)
        selection = {**params.model_dump(), **metrics, "classes": per_class}
        (tmp / SELECTION).write_text(json.dumps(selection, indent=1) + "\n")
    return metrics


def _expected(params: Select, scored: Scores, taken: Taken, per_class: list[dict[str, Any]]) -> dict[str, Any]:
    """The expected purity of the selection, and the impure classes; nothing where images are taken by other classes than their
    first, or held-out images are too few to tell."""
    asked, is_right = purity.held_out(scored)
    if params.membership != "argmax" or len(is_right) < 2 * purity.FOLDS or scored.m < 2 or not len(taken.images):
        return {}
    sample, looked_at = purity.sample(scored.rows), _spread(taken)
    rows = np.union1d(sample, looked_at.images)
    said = Answers.of_table(scored.rows_of(rows), scored.m)
    learned = purity.learn(said.take(np.searchsorted(rows, sample)), asked, is_right, len(scored.classes))
    pure = learned.of(said.take(np.searchsorted(rows, looked_at.images))).pure
    counts = np.bincount(looked_at.classes, minlength=len(per_class))
    shares = np.bincount(looked_at.classes, pure, len(per_class)) / np.maximum(counts, 1)
    images = np.array([c["taken"] for c in per_class])
    least = [c for c in np.argsort(shares, kind="stable") if counts[c] and shares[c] < IMPURE]
    impure = {per_class[c]["class"]: float(shares[c]) for c in least}
    return {"expected_purity": float((shares * images).sum() / images.sum()), "impure": impure}


def _spread(taken: Taken) -> Taken:
    """Of each class LOOKED_AT of its images at most, spread evenly over its ranks."""
    order = np.lexsort((taken.images, taken.surprisals, taken.classes))
    classes = taken.classes[order]
    first, last = np.searchsorted(classes, classes), np.searchsorted(classes, classes, "right")
    count, place = last - first, np.arange(len(classes)) - first
    steps = np.minimum(count, LOOKED_AT)
    kept = (place * steps) // count != ((place - 1) * steps) // count  # the first place of each step
    return Taken(*(column[order[kept]] for column in taken))


def _write(folder: Path, pool: Path, rows: np.ndarray, classes: tuple[str, ...]) -> None:
    """The given rows of `pool`, ascending, without labels: its row groups go through memory one by one."""
    with manifest.Writer(folder, classes) as writer:
        first = 0
        for group in manifest.groups(pool):
            start, end = np.searchsorted(rows, (first, first + len(group)))
            first += len(group)
            chosen = group.drop("label").take(pa.array(rows[start:end] - (first - len(group))))
            writer.add(chosen.append_column("label", pa.nulls(len(chosen), pa.int32())))


def _balanced(first: np.ndarray, wanted: np.ndarray, seed: int) -> np.ndarray:
    """Sorted rows drawn from the (N,) first classes of all images: (C,) `wanted` of each class, or all that it has."""
    drawn = np.random.default_rng(seed).permutation(len(first))
    drawn = drawn[np.argsort(first[drawn], kind="stable")]  # class by class, each in the order of the draw
    taker = first[drawn]
    place = np.arange(len(drawn)) - np.searchsorted(taker, taker)
    return np.sort(drawn[place < wanted[taker]])


def _per_class(taken: Taken, available: np.ndarray, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    counts = np.bincount(taken.classes, minlength=len(classes))
    last = np.full(len(classes), -1, np.float32)
    np.maximum.at(last, taken.classes, taken.surprisals)
    return [
        {
            "class": name,
            "taken": int(counts[c]),
            "available": int(available[c]),
            "cut_off": 0.0 - float(last[c]) if last[c] >= 0 else None,
        }
        for c, name in enumerate(classes)
    ]


def _warn(short: dict[str, int], k: int, classes: int) -> None:
    if short:
        rarest = sorted(short.items(), key=lambda item: item[1])[:NAMED]
        named = ", ".join(f"{name} {count:,}" for name, count in rarest) + (", ..." if len(short) > NAMED else "")
        sys.stderr.write(f"select: {len(short):,} of {classes:,} classes have fewer than k = {k:,} images: {named}\n")


if __name__ == "__main__":
    stage.main(run)
