"""The format of cached soft labels: what a teacher said about V views of each of N images, as the stage `label` writes it.

A row per image: `id`; `classes` (uint16) and `log_p` (float16), its m best classes and their log-probabilities, V x m of each,
the best first in each view. A view is a function of (seed, number of the view, row): the facts beside the rows are all that is
kept of it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel
from torch import Tensor

from pipeline.learning.views import View

FILE = "labels.parquet"


class Facts(BaseModel):
    """What makes the views again: `views` of each image, drawn by `seed` from canvases of `side` pixels, `size` pixels each.

    `training`: how the teacher came about.
    """

    classes: tuple[str, ...]
    views: int
    view: View
    seed: int
    side: int
    size: int
    training: dict[str, Any]


class Labels(NamedTuple):
    """`classes` and `log_p`: (N, V, m)."""

    ids: pa.ChunkedArray
    classes: np.ndarray
    log_p: np.ndarray
    facts: Facts


def table(ids: pa.ChunkedArray, logits: Sequence[Tensor], m: int) -> pa.Table:
    """The labels of N images from the (N, C) float32 logits of each view."""
    log_p, best = torch.stack(list(logits), 1).log_softmax(2).topk(m)  # N, V, m
    width = len(logits) * m
    classes = pa.FixedSizeListArray.from_arrays(pa.array(best.numpy().astype(np.uint16).ravel()), width)
    halves = pa.FixedSizeListArray.from_arrays(pa.array(log_p.numpy().astype(np.float16).ravel()), width)
    return pa.table({"id": ids, "classes": classes, "log_p": halves})


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
    return Labels(stored["id"], _flat(stored["classes"]).reshape(shape), _flat(stored["log_p"]).reshape(shape), facts)


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
