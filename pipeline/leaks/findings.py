"""The format of findings: one row for each image found in another, as the search measures it and `dedup` decides on it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FILE, FOUND_FILE = "leaks.parquet", "findings.parquet"
FINDINGS = pa.schema(
    [
        ("row", pa.int64()),  # of the image in its manifest
        ("match", pa.int64()),  # of the image it was found in; null if unverifiable
        ("outcome", pa.string()),  # copy, review, unverifiable or alike
        ("rule", pa.string()),
        ("inliers", pa.int32()),
        ("mirrored", pa.bool_()),
        ("negative", pa.bool_()),
        ("transform", pa.list_(pa.float64())),  # 3 x 3, row by row, from the match's coordinates to the image's
        ("zncc", pa.float32()),
        ("local", pa.float32()),
        ("cover_image", pa.float32()),
        ("cover_match", pa.float32()),
        ("score", pa.float32()),
    ]
)
FOUND = pa.schema(
    [
        ("relation", pa.string()),  # <set of the image>-<set of its match>; of an unverifiable image its set alone
        ("id", pa.string()),
        ("match_id", pa.string()),
        *FINDINGS,
    ]
)

VAL_COPIES_FILE = "val_copies.parquet"
VAL_COPIES = pa.schema(
    [
        ("id", pa.string()),  # of a validation image
        ("set", pa.string()),  # that its copy is in: pool, train, holdout or val
        ("copy", pa.string()),  # its id
        ("outcome", pa.string()),  # copy or review
        ("kept", pa.bool_()),  # whether it is still in that set
    ]
)

Row = dict[str, Any]

TOO_FEW, UNDECODABLE = "too few features", "cannot be decoded"
SAME_BYTES = "same bytes"
ALIKE = {"near": 0.9, "nearer": 0.8}
"""The correlation of thumbnails from which on an image is a look-alike, by strictness."""
LEAST_ALIKE = min(ALIKE.values())


STRENGTH = ("copy", "by hand", "review", "unverifiable", "alike")
"""The outcomes of an audit: of those that an image has in one relation the first counts."""


def strongest(audit: pa.Table) -> list[str]:
    """For each row of an audit the outcome by which its image counts in its relation."""
    images = list(zip(audit["relation"].to_pylist(), audit["id"].to_pylist(), strict=True))
    ranks = [STRENGTH.index(outcome) for outcome in audit["outcome"].to_pylist()]
    best: dict[tuple[str, str], int] = {}
    for image, rank in zip(images, ranks, strict=True):
        best[image] = min(rank, best.get(image, rank))
    return [STRENGTH[best[image]] for image in images]


def counts(audit: pa.Table) -> Counter[tuple[str, str]]:
    """Images by (relation, outcome): what the console, the report and the gallery say. An image counts once in a relation."""
    columns = (audit["relation"].to_pylist(), strongest(audit), audit["id"].to_pylist())
    return Counter((relation, outcome) for relation, outcome, _ in set(zip(*columns, strict=True)))


def unverifiable_row(row: int, reason: str) -> Row:
    return {"row": row, "outcome": "unverifiable", "rule": reason}


def lookalike_row(row: int, match: int, score: float, mirrored: bool) -> Row:
    measured = {"mirrored": mirrored, "zncc": score, "score": score}
    return {"row": row, "match": match, "outcome": "alike", "rule": "thumbnails"} | measured


def same_bytes_row(row: int, match: int) -> Row:
    measured = dict.fromkeys(("zncc", "local", "cover_image", "cover_match", "score"), 1.0)
    return {"row": row, "match": match, "outcome": "copy", "rule": SAME_BYTES, "mirrored": False} | measured


def write_found(folder: Path, found: pa.Table, searched: Sequence[str]) -> None:
    """Write rows of FOUND into the artifact being made at `folder`; `searched`: the relations that were looked for."""
    table = found.replace_schema_metadata({"searched": " ".join(searched)})
    pq.write_table(table, folder / FOUND_FILE, compression="zstd")


def read_found(folder: Path) -> tuple[pa.Table, set[str]]:
    """The rows of the artifact `folder`, and the relations that were looked for, with findings or without."""
    table = pq.read_table(folder / FOUND_FILE)
    return table, set(table.schema.metadata[b"searched"].decode().split())


def write(folder: Path, audit: pa.Table) -> None:
    """Write the decided findings into the artifact being made at `folder`."""
    pq.write_table(audit, folder / FILE, compression="zstd")


def read(folder: Path) -> pa.Table:
    """The decided findings of the artifact `folder`."""
    return pq.read_table(folder / FILE)


def write_val_copies(folder: Path, copies: pa.Table, searched: Iterable[str]) -> None:
    """Write rows of VAL_COPIES into the artifact being made at `folder`; `searched`: the relations that were looked for."""
    table = copies.replace_schema_metadata({"searched": " ".join(sorted(searched))})
    pq.write_table(table, folder / VAL_COPIES_FILE, compression="zstd")


def val_with_a_copy(folder: Path, sets: Sequence[str]) -> set[str] | None:
    """The validation images with a copy that is still in one of `sets` (pool, train), by the artifact `folder` of `dedup`.

    None where not all of these were searched.
    """
    table = pq.read_table(folder / VAL_COPIES_FILE)
    if not {f"{name}-val" for name in sets} <= set(table.schema.metadata[b"searched"].decode().split()):
        return None
    there = zip(*(table[name].to_pylist() for name in ("id", "set", "outcome", "kept")), strict=True)
    return {image for image, of, outcome, kept in there if of in sets and outcome == "copy" and kept}
