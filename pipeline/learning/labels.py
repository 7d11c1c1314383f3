"""The format of cached soft labels: what a teacher said about V views of each of N images, as the stage `label` writes it.

`labels.parquet` has the `id` of each image, and the facts. Beside it lie NumPy's own files, which every process that trains
maps into its memory, so that all of a machine share one copy: `classes.npy` (uint16) and `log_p.npy` (float16), V x N x m, the
m best classes and their log-probabilities, the best first. Where m is less than all, `log_rest.npy` (float32), V x N, says what
the other classes have together at temperature T: the logarithm of the sum of p^(1/T). A pass needs one view of each image:
these lie side by side. A view is a function of (seed, number of the view, row of the label): the facts are all that is kept
of it.
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

from pipeline.errors import UserError
from pipeline.learning.views import View

FILE = "labels.parquet"
CLASSES, LOG_P, LOG_REST = "classes.npy", "log_p.npy", "log_rest.npy"


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


class Kept(NamedTuple):
    """`classes` and `log_p`: (V, N, m), uint16 and float16; `log_rest`: (V, N) float32, None where all classes are kept."""

    classes: np.ndarray
    log_p: np.ndarray
    log_rest: np.ndarray | None


class Labels(NamedTuple):
    """`ids`: (N,); `kept`: read-only, mapped from their files."""

    ids: pa.ChunkedArray
    kept: Kept
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


def kept(logits: Sequence[Tensor], m: int, temperature: float) -> Kept:
    """What is kept of the (N, C) float32 logits of each view."""
    every = torch.stack(list(logits)).log_softmax(2)  # V, N, C
    log_p, best = every.topk(m)  # V, N, m
    rest = (every / temperature).scatter(2, best, -torch.inf).logsumexp(2).numpy() if m < every.shape[2] else None  # V, N
    return Kept(best.numpy().astype(np.uint16), log_p.numpy().astype(np.float16), rest)


def write_part(folder: Path, ids: pa.ChunkedArray, part: Kept) -> None:
    """Write the labels of some of the images into the artifact being made at `folder`."""
    pq.write_table(pa.table({"id": ids}), folder / FILE, compression="zstd", use_dictionary=False)
    for name, values in zip((CLASSES, LOG_P, LOG_REST), part, strict=True):
        if values is not None:
            np.save(folder / name, values)


def write(folder: Path, parts: Sequence[Path], facts: Facts) -> None:
    """Write the labels of all parts, folders of `write_part`, into the artifact being made at `folder`."""
    about = {"facts": json.dumps(facts.model_dump(mode="json"))}
    schema = pq.read_schema(parts[0] / FILE).with_metadata(about)
    images = 0
    with pq.ParquetWriter(folder / FILE, schema, compression="zstd", use_dictionary=False) as writer:
        for part in parts:
            ids = pq.read_table(part / FILE)
            images += len(ids)
            writer.write_table(ids)
    for name in (CLASSES, LOG_P, LOG_REST):
        if (parts[0] / name).exists():
            _join(folder / name, [part / name for part in parts], images)


def _join(to: Path, parts: Sequence[Path], images: int) -> None:
    """Write one array of V x N from those of V x n; few are open at a time, and one view of one part is in memory."""
    first = np.load(parts[0], mmap_mode="r")
    shape = (first.shape[0], images, *first.shape[2:])
    with to.open("wb") as file:
        described = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, described)
        for view in range(len(first)):
            for part in parts:
                file.write(np.ascontiguousarray(np.load(part, mmap_mode="r")[view]).data)


def read(folder: Path) -> Labels:
    """Raises UserError for labels of an older version."""
    stored = pq.read_table(folder / FILE, columns=["id"])
    if not (folder / CLASSES).is_file():
        raise UserError(f"{folder} holds labels as an older version of winnow wrote them. Remake it: `dvc repro`.")
    facts = Facts.model_validate_json(stored.schema.metadata[b"facts"])
    # np.memmap itself would look for its file again with every slice
    mapped = [np.asarray(np.load(folder / name, mmap_mode="r")) for name in (CLASSES, LOG_P)]
    log_rest = np.asarray(np.load(folder / LOG_REST, mmap_mode="r")) if (folder / LOG_REST).exists() else None
    return Labels(stored["id"], Kept(mapped[0], mapped[1], log_rest), facts)
