"""The format of cached soft labels: what a teacher said about V views of each of N images, as the stage `label` writes it.

A row per image: `id`; `classes` (uint16) and `log_p` (float16), its m best classes and their log-probabilities, V x m of each,
the best first in each view. Where m is less than all, `log_rest` (float32), V of them, says what the other classes have together
at temperature T: the logarithm of the sum of p^(1/T). A view is a function of (seed, number of the view, row of the label): the
facts beside the rows are all that is kept of it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor

from pipeline.learning.views import View

FILE = "labels.parquet"


class Facts(BaseModel):
    """What makes the views again: `views` of each image, drawn by `seed` from canvases of `side` pixels, `size` pixels each.

    `training`: how the teacher came about. `temperature`: T of `log_rest`. `precision`: in which the teacher ran before its
    classifier, which is float32 always.
    """

    classes: tuple[str, ...]
    views: int
    view: View
    seed: int
    side: int
    size: int
    training: dict[str, Any]
    temperature: float
    precision: str


class Labels(NamedTuple):
    """`classes` and `log_p`: (N, V, m); `log_rest`: (N, V), None where all classes are kept."""

    ids: pa.ChunkedArray
    classes: np.ndarray
    log_p: np.ndarray
    log_rest: np.ndarray | None
    facts: Facts


class Best(NamedTuple):
    """What is kept of a teacher's answers p about N images: its m best classes, and one figure for all others.

    `classes`: (N, m) int64. `log_p`: (N, m), at temperature 1. `log_rest`: (N,), the logarithm of the sum of p^(1/T) over the
    other classes. `temperature`: T; the answers are known at this and at no other but 1.
    """

    classes: Tensor
    log_p: Tensor
    log_rest: Tensor
    temperature: float

    def cells(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) logits -> two (N, m + 1) log-probabilities at T, the teacher's and theirs: the best classes, and all others
        as one."""
        known = torch.cat([self.log_p / self.temperature, self.log_rest[:, None]], 1).log_softmax(1)
        log_q = F.log_softmax(logits.float() / self.temperature, dim=1)
        rest = log_q.scatter(1, self.classes, -torch.inf).logsumexp(1, keepdim=True)
        return known, torch.cat([log_q.gather(1, self.classes), rest], 1)


def table(ids: pa.ChunkedArray, logits: Sequence[Tensor], m: int, temperature: float) -> pa.Table:
    """The labels of N images from the (N, C) float32 logits of each view."""
    every = torch.stack(list(logits), 1).log_softmax(2)  # N, V, C
    log_p, best = every.topk(m)  # N, V, m
    columns = {"id": ids, "classes": _lists(best, np.uint16, m), "log_p": _lists(log_p, np.float16, m)}
    if m < every.shape[2]:
        rest = (every / temperature).scatter(2, best, -torch.inf).logsumexp(2)  # N, V
        columns["log_rest"] = _lists(rest, np.float32, 1)
    return pa.table(columns)


def write(folder: Path, parts: Sequence[Path], facts: Facts) -> None:
    """Write the labels of all parts, folders with a table each, into the artifact being made at `folder`."""
    about = {"facts": json.dumps(facts.model_dump(mode="json"))}
    schema = pq.read_schema(parts[0] / FILE).with_metadata(about)
    with pq.ParquetWriter(folder / FILE, schema, compression="zstd") as writer:
        for part in parts:
            writer.write_table(pq.read_table(part / FILE))


def read(folder: Path) -> Labels:
    stored = pq.read_table(folder / FILE)
    facts = Facts.model_validate_json(stored.schema.metadata[b"facts"])
    shape = (len(stored), facts.views, -1)
    log_rest = flat(stored["log_rest"]).reshape(shape[:2]) if "log_rest" in stored.column_names else None
    return Labels(stored["id"], flat(stored["classes"]).reshape(shape), flat(stored["log_p"]).reshape(shape), log_rest, facts)


def _lists(values: Tensor, kind: Any, m: int) -> pa.FixedSizeListArray:
    """(N, V, ...) with m values of each view -> a list for each image."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.numpy().astype(kind).ravel()), values.shape[1] * m)


def flat(column: pa.ChunkedArray) -> np.ndarray:
    """The values of all lists of a column, one after another."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
