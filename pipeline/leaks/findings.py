"""The format of findings: one row for each image found in another."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FILE = "leaks.parquet"

FINDINGS = pa.schema(
    [
        ("row", pa.int64()),  # of the image in its manifest
        ("match", pa.int64()),  # of the image it was found in; null if unverifiable
        ("outcome", pa.string()),  # removed, review, unverifiable or alike
        ("rule", pa.string()),
        ("inliers", pa.int32()),
        ("mirrored", pa.bool_()),
        ("transform", pa.list_(pa.float64())),  # 3 x 3, row by row, from the match's coordinates to the image's
        ("zncc", pa.float32()),
        ("local", pa.float32()),
        ("cover_image", pa.float32()),
        ("cover_match", pa.float32()),
        ("score", pa.float32()),
    ]
)

Row = dict[str, Any]


def write(folder: Path, audit: pa.Table) -> None:
    """Write the decided findings into the artifact being made at `folder`."""
    pq.write_table(audit, folder / FILE, compression="zstd")


def read(folder: Path) -> pa.Table:
    """The decided findings of the artifact `folder`."""
    return pq.read_table(folder / FILE)


TOO_FEW, UNDECODABLE = "too few features", "cannot be decoded"


def unverifiable_row(row: int, reason: str) -> Row:
    return {"row": row, "outcome": "unverifiable", "rule": reason}
