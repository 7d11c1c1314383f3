"""Predictions as a table that grows batch by batch: CSV or Parquet."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from pipeline.errors import UserError
from pipeline.store import artifact

ROWS = 1 << 16  # gathered before they are written


def top_of(probabilities: np.ndarray, k: int) -> np.ndarray:
    """(B, k) int64: the classes of the k highest of (B, C) probabilities, the highest first, of equal ones the first."""
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :k]


def schema(k: int) -> pa.Schema:
    """`class` and `probability` are the answer; `class_2`, `probability_2` and so on the next; `error` says why there is none."""
    ranks = ["", *(f"_{i}" for i in range(2, k + 1))]
    columns = [field for rank in ranks for field in ((f"class{rank}", pa.string()), (f"probability{rank}", pa.float32()))]
    return pa.schema([("id", pa.string()), *columns, ("error", pa.string())])


def rows(
    ids: Sequence[str], errors: Sequence[str | None], probabilities: np.ndarray, top: np.ndarray, classes: Sequence[str]
) -> pa.RecordBatch:
    """The rows of a batch, as `schema` has them. `probabilities`, `top`: (n, C) and (n, k) of those of `ids` without an error."""
    good = np.array([error is None for error in errors], bool)
    place = pa.array(np.where(good, np.cumsum(good) - 1, 0), mask=~good)
    names = pa.array(classes, pa.string())
    columns: list[Any] = [pa.array(ids, pa.string())]
    for rank in range(top.shape[1]):
        shares = np.take_along_axis(probabilities, top[:, rank : rank + 1], 1)[:, 0]
        columns += [names.take(pa.array(top[:, rank])).take(place), pa.array(shares.astype(np.float32)).take(place)]
    return pa.RecordBatch.from_arrays([*columns, pa.array(errors, pa.string())], schema=schema(top.shape[1]))


class Table:
    """Rows on their way to a file."""

    def __init__(self, writer: csv.CSVWriter | pq.ParquetWriter) -> None:
        self.writer = writer
        self.waiting: list[pa.RecordBatch] = []

    def add(self, batch: pa.RecordBatch) -> None:
        self.waiting.append(batch)
        if sum(map(len, self.waiting)) >= ROWS:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            self.writer.write_table(pa.Table.from_batches(self.waiting))
            self.waiting = []


def expect_kind(out: Path) -> None:
    """Raises UserError for a file that is neither CSV nor Parquet by its name."""
    if out.suffix.lower() not in (".csv", ".parquet"):
        raise UserError(f"--out {out}: the name must end in .csv or .parquet, which says what is written.")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file.")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--out {out}: {folder} is no folder that you can write to. Name a file in another.")


@contextmanager
def writing(out: Path, k: int) -> Iterator[Table]:
    """A table of `schema(k)` that becomes `out` when it is whole."""
    with artifact.writing_file(out) as tmp:
        made = csv.CSVWriter if out.suffix.lower() == ".csv" else pq.ParquetWriter
        with made(tmp, schema(k)) as writer:
            table = Table(writer)
            yield table
            table.flush()
