"""The format of scores: what a teacher says of each image of the pool, row for row its manifest, and of the held-out images, as
`score` writes it.

`class_0`, `class_1`, ... (uint16) are the best classes of an image, the best first, `logit_0`, ... (float32) their logits, and
`logsumexp` (float32) is that of all its logits: logit - logsumexp is a log-probability. It still tells images apart whose
probabilities both round to 1.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.store import artifact

FILE, HELD, LOGSUMEXP = "scores.parquet", "holdout.parquet", "logsumexp"


def names_of(kind: str, m: int) -> list[str]:
    """The columns of the first m classes: `class_0`, ... for `class`, and so for `logit`."""
    return [f"{kind}_{i}" for i in range(m)]


def schema(m: int) -> pa.Schema:
    """The columns of scores with m classes of each image."""
    classes, logits = dict.fromkeys(names_of("class", m), pa.uint16()), dict.fromkeys(names_of("logit", m), pa.float32())
    return pa.schema({**classes, **logits, LOGSUMEXP: pa.float32()})


def table(classes: np.ndarray, logits: np.ndarray, logsumexp: np.ndarray) -> pa.Table:
    """Scores of N images from (N, m) numbers of classes, their (N, m) float32 logits, the best first, and (N,) logsumexp."""
    columns = [*classes.astype(np.uint16).T.copy(), *logits.T.copy(), logsumexp]
    return pa.table(columns, schema=schema(classes.shape[1]))


def writer(folder: Path, m: int, classes: Sequence[str], manifest: str, precision: str) -> pq.ParquetWriter:
    """What writes tables of scores into the artifact being made at `folder`.

    `classes`: the teacher's. `manifest`: the identity of the one whose images are scored. `precision`: in which the network ran
    before its classifier, which is float32 always.
    """
    about = {"classes": json.dumps(classes), "manifest": manifest, "precision": precision}
    return pq.ParquetWriter(folder / FILE, schema(m).with_metadata(about), compression="zstd")


def write_held(folder: Path, said: pa.Table, labels: np.ndarray) -> None:
    """Scores of the (n,) held-out images, with their labels, into the artifact being made at `folder`."""
    pq.write_table(said.append_column("label", pa.array(labels, pa.int32())), folder / HELD, compression="zstd")


class Scores(NamedTuple):
    """What stands beside the rows: the teacher's classes, the identity of the manifest, and how many classes an image has."""

    file: Path
    rows: int
    classes: tuple[str, ...]
    manifest: str
    m: int

    def matrix(self, columns: list[str]) -> np.ndarray:
        """(N, len(columns))"""
        stored = pq.read_table(self.file, columns=columns)
        return np.stack([stored[name].to_numpy() for name in columns], axis=1)

    def rows_of(self, chosen: np.ndarray) -> pa.Table:
        """All columns of some images, ascending row numbers: one row group is in memory at a time."""
        file, parts, first = pq.ParquetFile(self.file), [schema(self.m).empty_table()], 0
        for group in range(file.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            start, end = np.searchsorted(chosen, (first, last))
            if start < end:
                parts.append(file.read_row_group(group).replace_schema_metadata().take(pa.array(chosen[start:end] - first)))
            first = last
        return pa.concat_tables(parts)

    def held(self) -> pa.Table:
        """What the teacher says of the held-out images, and their labels. Raises UserError for scores of before it was asked."""
        file = self.file.with_name(HELD)
        if not file.exists():
            raise UserError(f"{self.file.parent} says nothing of the held-out images: `dvc repro` makes these scores anew.")
        return pq.read_table(file)


def of_pool(folder: Path, pool: Path, images: int) -> Scores:
    """The scores in `folder`. Raises UserError unless their rows are the `images` images of the manifest `pool`."""
    scored = open_scores(folder)
    if scored.manifest != artifact.identity(pool) or scored.rows != images:
        raise UserError(
            f"{folder} holds the scores of another manifest than {pool}, so its rows are other images. "
            "Run `dvc repro`, which scores the pool that is there now."
        )
    if not images:
        raise UserError(f"{pool} has no image to select from. Name more sources under `prepare.pool`.")
    return scored


def open_scores(folder: Path) -> Scores:
    """The scores in `folder`, none of them read yet."""
    file = pq.ParquetFile(folder / FILE)
    about = file.schema_arrow.metadata or {}
    m = sum(name.startswith("class_") for name in file.schema_arrow.names)
    classes = tuple(json.loads(about.get(b"classes", b"[]")))
    return Scores(folder / FILE, file.metadata.num_rows, classes, about.get(b"manifest", b"").decode(), m)
