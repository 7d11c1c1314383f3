"""How the images of a pool rank within their classes, by the log p of their scores."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np

from pipeline.errors import UserError
from pipeline.store.scores import LOGSUMEXP, Scores, names_of

HEAPS = 0.5
"""Share of the memory for the best images so far, 8 bytes each."""


class Taken(NamedTuple):
    """Pairs of an image and a class that takes it: three arrays of shape (T,)."""

    images: np.ndarray
    """int64, rows of the pool; an image that several classes take occurs several times."""
    classes: np.ndarray
    """int64"""
    surprisals: np.ndarray
    """float32, -log p >= 0; -1 where the class took the image unranked"""

    def after(self, skip: int) -> "Taken":
        """What is left of each class without its first `skip` images: the highest log p first, ties by row."""
        if not skip:
            return self
        images, classes, surprisals = self
        order = np.lexsort((images, surprisals, classes))
        place = np.arange(len(order)) - np.searchsorted(classes[order], classes[order])
        left = order[place >= skip]
        return Taken(images[left], classes[left], surprisals[left])


@contextlib.contextmanager
def _database(temp: Path, threads: int, memory_gb: float) -> Iterator[duckdb.DuckDBPyConnection]:
    settings: dict[str, str | bool | int | float | list[str]] = {
        "threads": threads,
        "memory_limit": f"{memory_gb * 1000:.0f}MB",
        "temp_directory": str(temp),
        "preserve_insertion_order": False,
        "autoinstall_known_extensions": False,
    }
    try:
        with duckdb.connect(config=settings) as db:
            yield db
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"the selection does not fit into `machine.memory_gb` = {memory_gb:g}. Raise it, or lower `k`. ({error})"
        ) from None


def ranked(scored: Scores, members: int, k: int, temp: Path, threads: int, memory_gb: float) -> tuple[Taken, np.ndarray]:
    """The `k` images of highest log p of each class, ties by row, all of a class that has fewer; and how many it has, (C,)."""
    classes, table = len(scored.classes), [str(scored.file)]
    numbers = ", ".join(names_of("class", members))
    surprisals = ", ".join(f"{LOGSUMEXP} - {logit}" for logit in names_of("logit", members))
    pairs = f"""
        SELECT unnest([{numbers}]) AS class, unnest([{surprisals}]) AS surprisal, file_row_number AS image
        FROM read_parquet(?, file_row_number => true)
    """
    with _database(temp, threads, memory_gb) as db:
        # Each thread allocates a heap for each class at its full size. Where these are more than fit, the classes
        # are counted first, and no heap is larger than its class.
        heaps = np.full(classes, min(k, scored.rows))
        room = HEAPS * memory_gb * 1e9 / 8
        if heaps.sum() > room:
            counted = db.execute(f"SELECT class, count(*) FROM ({pairs}) GROUP BY class", table).fetchall()
            sizes = dict(counted)
            heaps = np.minimum(heaps, [sizes.get(c, 1) for c in range(classes)])
        db.execute(f"SET threads = {min(threads, max(1, int(room / heaps.sum())))}")
        db.execute("SET VARIABLE heaps = ?", [heaps.tolist()])
        # To look the size up for each pair takes half as long as all the rest.
        heap = str(heaps.max()) if heaps.min() == heaps.max() else "getvariable('heaps')[class + 1]"
        # One integer ranks a pair within its class: the bits of a float32 that is not negative sort as the number does, and
        # below them stands the row. A log p above 0 is rounding noise, and becomes 0 by (x + |x|) / 2: `greatest` takes a quarter
        # of the time of all the rest.
        query = f"""
            SELECT class, count(*) AS available, max(abs(surprisal)) AS largest,
                min((((surprisal + abs(surprisal)) * 0.5::FLOAT)::BIT::INTEGER::BIGINT << 32) | image, {heap}) AS keys
            FROM ({pairs})
            GROUP BY class
        """
        try:
            best = db.sql(query, params=table).to_arrow_table()
        except duckdb.OutOfRangeException:  # the bits of a NaN whose sign is set cannot be shifted
            raise _broken(scored) from None
    _refuse_nan(best["largest"].to_numpy(), scored)
    number = best["class"].to_numpy().astype(np.int64)
    available = np.zeros(classes, np.int64)
    available[number] = best["available"].to_numpy()
    keys = best["keys"].combine_chunks()
    key = keys.flatten().to_numpy()
    takers = np.repeat(number, keys.value_lengths().to_numpy())
    return Taken(key & 0xFFFFFFFF, takers, (key >> 32).astype(np.int32).view(np.float32)), available


def shared_out(scored: Scores, members: int, k: int) -> tuple[Taken, np.ndarray]:
    """What `ranked` returns, with each image taken once at most: pairs from the highest log p down, ties by row, then by place.

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


def _refuse_nan(surprisals: np.ndarray, scored: Scores) -> None:
    if not np.isfinite(surprisals).all():
        raise _broken(scored)


def _broken(scored: Scores) -> UserError:
    return UserError(f"{scored.file} holds logits that are NaN or infinite: their teacher is broken. Look at its training.")
