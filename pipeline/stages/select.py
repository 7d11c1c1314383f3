"""Select the pool images that the student learns from: the teacher's surest k of each class, or a control."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveInt

from pipeline.errors import UserError
from pipeline.harness import stage
from pipeline.harness.machine import Machine
from pipeline.store import artifact, manifest
from pipeline.store.params import Made, Section
from pipeline.store.scores import LOGSUMEXP, Scores, names_of, open_scores

SELECTION = "selection.json"
HEAPS = 0.5
"""Share of the memory for the best images so far, 8 bytes each."""
NAMED = 20
"""Short classes named on the terminal; the metrics and selection.json name all."""


class Select(Section):
    """Which images of the pool are selected (SSLD's documentation).

    Without `several`, the pairs of image and class are gone through from the highest log p down (ties: first image first, then
    first class first). A pair is taken when its image is still free and its class has fewer than `k`.
    """

    scores: Made
    """The scores to select by: an entry of `score`."""
    rule: Literal["top", "random", "all"]
    """`top` takes the `k` images of each class that have the highest log p; `random` takes as many images as `top` would, drawn
    by the seed; `all` takes the pool."""
    k: PositiveInt = Field(le=999_999)
    """Images of each class."""
    membership: Literal["argmax", "top_p", "any"] = "argmax"
    """An image belongs to its first class, to its first `p` (Yalniz et al. 2019), or to each class that its scores hold."""
    p: PositiveInt = 10
    """How many of its first classes `top_p` counts; at most `m` of the scores."""
    several: bool = True
    """Whether more than one class may take the same image."""


class Taken(NamedTuple):
    """Pairs of an image and a class that takes it: three arrays of shape (T,)."""

    images: np.ndarray
    """int64, rows of the pool; an image that several classes take occurs several times."""
    classes: np.ndarray
    """int64"""
    surprisals: np.ndarray
    """float32, -log p >= 0; -1 where the class took the image unranked"""


def run(params: Select, *, scores: Path, pool: Path, out: Path, seed: int, workdir: Path, machine: Machine) -> stage.Metrics:
    """Keep the pool images that the teacher is surest of, the same number of each class.

    `scores`: an artifact of `score`, made from the manifest `pool`. `out`: a manifest of the selected images, without labels,
    whose classes are the teacher's. The file selection.json beside it says for each class how many images it took, how many
    were available, and the log p of the last. For the rules `random` and `all`, an image counts for its first class, and there
    is no last log p.

    The result does not depend on threads, memory or row groups. Raises UserError if the scores are of another pool.
    """
    images = manifest.read(pool)
    scored = _open(artifact.verify(scores), pool, len(images))
    classes = scored.classes
    rows = np.arange(len(images))
    if params.rule != "all":
        members = _members(params, scored)
        if params.several or members == 1:
            taken, available = _top(scored, members, params.k, workdir / "duckdb", machine)
        else:
            taken, available = _shared_out(scored, members, params.k)
        rows = np.unique(taken.images)
    if params.rule == "random":
        rows = np.sort(np.random.default_rng(seed).permutation(len(images))[: len(rows)])
    if params.rule != "top":
        taken, available = _by_first_class(scored, rows)
    per_class = _per_class(taken, available, classes)
    short = {c["class"]: c["taken"] for c in per_class if c["taken"] < params.k} if params.rule == "top" else {}
    _warn(short, params.k, len(classes))
    metrics = {
        "images": len(rows),
        "pool": len(images),
        "in_several_classes": int((np.bincount(taken.images) > 1).sum()),
        "classes_short": len(short),
        "short": short,
    }
    with artifact.writing(out) as tmp:
        chosen = images.take(rows).table.drop("label")
        manifest.write(tmp, chosen.append_column("label", pa.nulls(len(rows))), classes)
        selection = {**params.model_dump(), **metrics, "classes": per_class}
        (tmp / SELECTION).write_text(json.dumps(selection, indent=1) + "\n")
    return metrics


def _open(scores: Path, pool: Path, images: int) -> Scores:
    """Raises UserError unless the scores' rows are the images of `pool`."""
    scored = open_scores(scores)
    if scored.manifest != artifact.identity(pool) or scored.rows != images:
        raise UserError(
            f"{scores} holds the scores of another manifest than {pool}, so its rows are other images. "
            "Run `dvc repro`, which scores the pool that is there now."
        )
    if not images:
        raise UserError(f"{pool} has no image to select from. Name more sources under `prepare.pool`.")
    return scored


def _members(params: Select, scored: Scores) -> int:
    """How many of an image's classes, from its first, it may be taken by."""
    if params.membership == "top_p" and params.p > scored.m:
        raise UserError(
            f"`select`: `p` is {params.p}, but {scored.file.parent} holds the first {scored.m} classes of each image only. "
            f"Lower `p` to {scored.m}, or let `score` store more."
        )
    return {"argmax": 1, "top_p": params.p, "any": scored.m}[params.membership]


@contextlib.contextmanager
def _database(temp: Path, machine: Machine) -> Iterator[duckdb.DuckDBPyConnection]:
    settings: dict[str, str | bool | int | float | list[str]] = {
        "threads": machine.cores(machine.threads),
        "memory_limit": f"{machine.memory_gb * 1000:.0f}MB",
        "temp_directory": str(temp),
        "preserve_insertion_order": False,
        "autoinstall_known_extensions": False,
    }
    try:
        with duckdb.connect(config=settings) as db:
            yield db
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"the selection does not fit into `machine.memory_gb` = {machine.memory_gb:g}. Raise it, or lower `k`. ({error})"
        ) from None


def _top(scored: Scores, members: int, k: int, temp: Path, machine: Machine) -> tuple[Taken, np.ndarray]:
    """The `k` images of highest log p of each class, ties by row, all of a class that has fewer; and how many it has, (C,)."""
    classes, table = len(scored.classes), [str(scored.file)]
    numbers = ", ".join(names_of("class", members))
    surprisals = ", ".join(f"{LOGSUMEXP} - {logit}" for logit in names_of("logit", members))
    pairs = f"""
        SELECT unnest([{numbers}]) AS class, unnest([{surprisals}]) AS surprisal, file_row_number AS image
        FROM read_parquet(?, file_row_number => true)
    """
    with _database(temp, machine) as db:
        # Each thread allocates a heap for each class at its full size. Where these are more than fit, the classes
        # are counted first, and no heap is larger than its class.
        heaps = np.full(classes, min(k, scored.rows))
        room = HEAPS * machine.memory_gb * 1e9 / 8
        if heaps.sum() > room:
            counted = db.execute(f"SELECT class, count(*) FROM ({pairs}) GROUP BY class", table).fetchall()
            sizes = dict(counted)
            heaps = np.minimum(heaps, [sizes.get(c, 1) for c in range(classes)])
        db.execute(f"SET threads = {min(machine.cores(machine.threads), max(1, int(room / heaps.sum())))}")
        db.execute("SET VARIABLE heaps = ?", [heaps.tolist()])
        # One integer ranks a pair within its class: the bits of a float32 that is not negative sort as the number does, and
        # below them stands the row. A log p above 0 is rounding noise.
        best = db.sql(
            f"""
            SELECT class, count(*) AS available, max(abs(surprisal)) AS largest,
                min((greatest(surprisal, 0::FLOAT)::BIT::INTEGER::BIGINT << 32) | image, getvariable('heaps')[class + 1]) AS keys
            FROM ({pairs})
            GROUP BY class
            """,
            params=table,
        ).to_arrow_table()
    _refuse_nan(best["largest"].to_numpy(), scored)
    number = best["class"].to_numpy().astype(np.int64)
    available = np.zeros(classes, np.int64)
    available[number] = best["available"].to_numpy()
    keys = best["keys"].combine_chunks()
    key = keys.flatten().to_numpy()
    takers = np.repeat(number, keys.value_lengths().to_numpy())
    return Taken(key & 0xFFFFFFFF, takers, (key >> 32).astype(np.int32).view(np.float32)), available


def _shared_out(scored: Scores, members: int, k: int) -> tuple[Taken, np.ndarray]:
    """What `_top` returns, with each image taken at most once, in the order that `Select` states.

    Found without sorting all pairs, as a stable matching (Gale and Shapley 1962). Each image asks its first class. A
    class keeps the best k that ever asked; whom it turns down asks the next class. Both sides rank by the same log p,
    so there is one stable matching, and it is that of the greedy order. Holds all pairs in memory, 6 bytes each.
    """
    of = scored.matrix(names_of("class", members))  # N, P
    logits = scored.matrix(names_of("logit", members))
    surprisal = scored.matrix([LOGSUMEXP]) - logits
    _refuse_nan(surprisal, scored)
    surprisal = np.maximum(surprisal, np.float32(0))
    asks = np.zeros(len(of), np.uint16)  # the position of the class that the image asks, or is held by
    held, asking = np.empty(0, np.int64), np.arange(len(of))
    while asking.size:
        contested = np.isin(of[held, asks[held]], of[asking, asks[asking]])
        rivals = np.concatenate([held[contested], asking])
        rivals = rivals[np.lexsort((rivals, surprisal[rivals, asks[rivals]], of[rivals, asks[rivals]]))]
        wanted = of[rivals, asks[rivals]]
        wins = np.arange(len(rivals)) - np.searchsorted(wanted, wanted) < k
        held = np.concatenate([held[~contested], rivals[wins]])
        turned_down = rivals[~wins]
        asks[turned_down] += 1
        asking = turned_down[asks[turned_down] < members]
    available = np.bincount(of.ravel(), minlength=len(scored.classes))
    return Taken(held, of[held, asks[held]].astype(np.int64), surprisal[held, asks[held]]), available


def _by_first_class(scored: Scores, rows: np.ndarray) -> tuple[Taken, np.ndarray]:
    first = scored.matrix(names_of("class", 1))[:, 0].astype(np.int64)
    return Taken(rows, first[rows], np.full(len(rows), -1, np.float32)), np.bincount(first, minlength=len(scored.classes))


def _refuse_nan(surprisals: np.ndarray, scored: Scores) -> None:
    if not np.isfinite(surprisals).all():
        raise UserError(f"{scored.file} holds logits that are NaN or infinite: their teacher is broken. Look at its training.")


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
