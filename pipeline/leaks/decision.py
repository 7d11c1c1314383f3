"""From findings to decisions: which image goes, by which rule or by whose word."""

import csv
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.store.manifest import Manifest
from pipeline.store.params import Section


class Dedup(Section):
    """What happens to what the leak check finds; every finding is in `leaks.parquet` whatever is set here."""

    strictness: Literal["none", "leaks", "near", "nearer"] = "leaks"
    """`none` removes nothing that the check finds, `leaks` removes copies. `near` and `nearer` also remove images that
    correlate with a validation image (or its mirror image) by at least 0.9 and 0.8 as grey thumbnails of 16 x 16 pixels: for
    the question whether look-alikes are a fair choice."""
    review: Literal["keep", "remove"] = "keep"
    """Images that share features with a validation image, but not enough pixels for certainty."""
    unverifiable: Literal["keep", "remove"] = "keep"
    """Images with too few features to be checked, or that cannot be decoded."""
    train: Literal["report", "skip", "remove"] = "report"
    """Look for validation images among the labelled ones too, and report them, or remove them by the rules of the pool (but for
    look-alikes, which are looked for in the pool only)."""
    duplicates: Literal["keep", "collapse"] = "keep"
    """Copies within the pool: `keep` does not look for them, `collapse` keeps the largest of each group."""


ALIKE = {"near": 0.9, "nearer": 0.8}


class Override(NamedTuple):
    """A person's word on an image of the pool or of the labelled set (`of`: pool or train)."""

    of: str
    action: str
    reason: str


def read_overrides(file: Path, sets: Mapping[str, Manifest]) -> dict[str, Override]:
    """{id: Override} of a CSV with the columns id, action (keep or remove) and reason.

    Raises UserError, naming the line, for anything else, for a missing reason, and for an id in neither pool nor train.
    """
    with file.open(newline="") as f:
        lines = csv.reader(f)
        header = next(lines, [])
        if header != ["id", "action", "reason"]:
            raise UserError(f"{file}: the first line must be `id,action,reason`; it is `{','.join(header)}`.")
        found: dict[str, tuple[str, str]] = {}
        for number, line in enumerate(lines, 2):
            where = f"{file}, line {number}"
            if len(line) != 3 or line[1] not in ("keep", "remove") or not line[2].strip():
                raise UserError(f"{where}: `{','.join(line)}` must be an id, `keep` or `remove`, and a reason (quote commas).")
            if line[0] in found:
                raise UserError(f"{where}: the image {line[0]} is decided on twice. Keep one of the two lines.")
            found[line[0]] = (line[1], line[2].strip())
    ids = pa.array(list(found), pa.string())
    there = {
        name: set(ids.filter(pc.is_in(ids, sets[name].table["id"].combine_chunks())).to_pylist()) for name in ("pool", "train")
    }
    for image in found:
        if not any(image in images for images in there.values()):
            raise UserError(
                f"{file}: neither the pool nor the labelled images have one with the id {image}. Correct or remove the line."
            )
    return {image: Override("pool" if image in there["pool"] else "train", *said) for image, said in found.items()}


def decide(audit: pa.Table, params: Dedup, overrides: Mapping[str, Override]) -> pa.Table:
    """The audit with the last word on each image: `kept`, and the `override` and its `reason` where a person had it.

    Findings in `val` are reports, and so are those in `train` unless `params.train` is `remove`. An image removed by hand for
    which nothing was found gets a row of its own.
    """
    found = set(zip(_of(audit), audit["id"].to_pylist(), strict=True))
    by_hand = {(said.of, image) for image, said in overrides.items() if said.action == "remove"}
    audit = pa.concat_tables([audit, _rows_by_hand(sorted(by_hand - found), audit.schema)])
    removing = {("pool-pool", "removed")}
    if params.strictness != "none":
        outcomes = ["removed", "alike", *(o for o in ("review", "unverifiable") if getattr(params, o) == "remove")]
        relations = ["pool-val", *(["train-val"] if params.train == "remove" else [])]
        removing |= set(itertools.product(relations, outcomes))
    images = list(zip(_of(audit), audit["id"].to_pylist(), strict=True))
    reasons = zip(audit["relation"].to_pylist(), audit["outcome"].to_pylist(), strict=True)
    dropped = {image for image, reason in zip(images, reasons, strict=True) if reason in removing} | by_hand
    dropped -= {(said.of, image) for image, said in overrides.items() if said.action == "keep"}
    words = [said if (said := overrides.get(image)) and said.of == of else None for of, image in images]
    audit = audit.append_column("kept", pa.array([image not in dropped for image in images], pa.bool_()))
    audit = audit.append_column("override", pa.array([word and word.action for word in words], pa.string()))
    audit = audit.append_column("reason", pa.array([word and word.reason for word in words], pa.string()))
    return audit.drop_columns(["row", "match"]).sort_by([(name, "ascending") for name in ("relation", "id", "match_id")])


def _of(audit: pa.Table) -> list[str]:
    """The set that each finding is about."""
    return [relation.partition("-")[0] for relation in audit["relation"].to_pylist()]


def _rows_by_hand(images: list[tuple[str, str]], schema: pa.Schema) -> pa.Table:
    rows = [{"relation": f"{of}-val", "id": image, "outcome": "removed", "rule": "by hand"} for of, image in images]
    return pa.Table.from_pylist(rows, schema)


def one_per_copy(audit: pa.Table, pool: Manifest) -> pa.Table:
    """Of the copies within the pool, the rows of those that go: all but the largest of each group (of equals, the first)."""
    pairs = audit.filter(pc.equal(audit["outcome"], "removed"))
    rows, matches = pairs["row"].to_numpy(), pairs["match"].to_numpy()
    leader = _groups(rows, matches, pool)
    goes = pa.array([leader[int(row)] != row for row in rows], pa.bool_())
    best = pairs.filter(goes).sort_by([("row", "ascending"), ("score", "descending"), ("match", "ascending")])
    row = best["row"].to_numpy()
    return best.filter(pa.array(np.r_[True, row[1:] != row[:-1]][: len(row)], pa.bool_()))


def _groups(rows: np.ndarray, matches: np.ndarray, pool: Manifest) -> dict[int, int]:
    """For each row that occurs, the row of its group that stays."""
    area = pc.multiply(pool.table["width"].cast(pa.int64()), pool.table["height"].cast(pa.int64()))
    leader: dict[int, int] = {}

    def lead(row: int) -> int:
        while leader.setdefault(row, row) != row:
            row = leader[row]
        return row

    for a, b in zip(rows.tolist(), matches.tolist(), strict=True):
        stays, goes = sorted((lead(a), lead(b)), key=lambda row: (-area[row].as_py(), row))
        leader[goes] = stays
    return {row: lead(row) for row in leader}
