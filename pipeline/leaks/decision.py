"""From findings to decisions: which image goes, by which rule or by whose word."""

import csv
import io
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.leaks import geometry
from pipeline.leaks.findings import ALIKE, FOUND, VAL_COPIES, Row
from pipeline.leaks.verdict import WHOLE_RULES
from pipeline.store.manifest import Manifest
from pipeline.store.params import Section


class Dedup(Section):
    """What happens to what the leak check found; every finding is in `leaks.parquet` whatever is set here."""

    strictness: Literal["none", "leaks", "near", "nearer"] = "leaks"
    """`none` removes nothing that was found, here or below, but for `duplicates` and what `overrides.csv` names; `leaks` removes
    copies; `near` and `nearer` also pool images whose thumbnail correlates with that of a validation image, or its mirror image,
    by 0.9 or 0.8. For the question whether look-alikes of validation images are a fair choice."""
    review: Literal["keep", "remove"] = "keep"
    """Images that share features with another but not enough pixels for certainty, or that match several by the same part."""
    unverifiable: Literal["keep", "remove"] = "keep"
    """Images with too few features to be checked, or that cannot be decoded."""
    pool_train: Literal["remove", "keep"] = "remove"
    """Copies of labelled images in the pool. Kept, the surest images of a class are its labelled ones once more."""
    train: Literal["report", "remove"] = "report"
    """Copies of validation or held-out images among the labelled ones: report them, or take them out of training."""
    holdout: Literal["report", "remove"] = "report"
    """Copies of validation images among the held-out ones, on which choices are made: report them, or do not choose on them."""
    duplicates: Literal["keep", "collapse"] = "keep"
    """Copies within the pool: keep them, or only the largest of each group. `search.duplicates` looks for them."""


class Override(NamedTuple):
    """A person's word on an image of the pool, the labelled or the held-out set (`of`)."""

    of: str
    action: str
    reason: str


REMOVABLE = ("pool", "train", "holdout")


HEADER = ["id", "action", "reason"]
"""The columns of data/overrides.csv."""


def read_overrides(file: Path, sets: Mapping[str, Manifest]) -> dict[str, Override]:
    """{id: Override}, in the file's order, of a CSV with the columns id, action (keep or remove) and reason.

    What a spreadsheet writes is understood, too: a byte-order mark, and semicolons for commas. Raises UserError, naming the line,
    for anything else, for a missing reason, for text that is not UTF-8, and for an id in neither pool, train nor holdout.
    """
    lines = _csv(file)
    _, header = next(lines, (1, []))
    if header != HEADER:
        raise UserError(f"{file}: the first line must be `id,action,reason`; it is `{','.join(header)}`.")
    found: dict[str, tuple[str, str]] = {}
    for number, line in lines:
        where = f"{file}, line {number}"
        if len(line) != 3 or line[1] not in ("keep", "remove") or not line[2].strip():
            raise UserError(f"{where}: `{','.join(line)}` must be an id, `keep` or `remove`, and a reason (quote commas).")
        if line[0] in found:
            raise UserError(f"{where}: the image {line[0]} is decided on twice. Keep one of the two lines.")
        found[line[0]] = (line[1], line[2].strip())
    of = set_of(found, sets)
    for image in found:
        if image not in of:
            raise UserError(
                f"{file}: neither the pool nor the labelled nor the held-out images have one with the id {image}. "
                "Correct or remove the line."
            )
    return {image: Override(of[image], *said) for image, said in found.items()}


def _csv(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV, each with the number of its last line. Empty lines are left out."""
    if not file.is_file():
        raise UserError(f"{file} is not a file. Expected: a table of decisions, with the columns {', '.join(HEADER)}.")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}, line {line}: this is not UTF-8. Save the table as `CSV UTF-8`.") from None
    records = csv.reader(io.StringIO(text, newline=""), delimiter=";" if text.startswith(";".join(HEADER)) else ",", strict=True)
    try:
        for record in records:
            if record:
                yield records.line_num, record
    except csv.Error as error:
        raise UserError(f"{file}, line {records.line_num}: {error}. Is a quote missing? One inside a field is doubled.") from None


def set_of(images: Iterable[str], sets: Mapping[str, Manifest]) -> dict[str, str]:
    """{id: set} of those images on which a person can decide: of the pool, else of train, else of holdout."""
    ids = pa.array(images, pa.string())
    of: dict[str, str] = {}
    for name in reversed(REMOVABLE):
        # The ids are what is looked for in the pool, not the other way round: the pool may be large.
        table = sets[name].table["id"]
        of |= dict.fromkeys(table.filter(pc.is_in(table, ids)).to_pylist(), name)
    return of


REPORTED = ("pool-val", "pool-holdout", "pool-train", "train-val", "train-holdout", "holdout-val", "val-val")
"""What is told of; copies within train or holdout only help to tell different photographs apart."""


def decide(found: pa.Table, params: Dedup, overrides: Mapping[str, Override], sets: Mapping[str, Manifest]) -> pa.Table:
    """The audit: findings with the last word on each image: `kept`, and the `override` and its `reason` where a person had it.

    `found`: rows of FOUND. A look-alike is listed where `params.strictness` asks for it. An image removed by hand for which
    nothing was found gets a row of its own.
    """
    found = one_layout_in_review(found, sets)
    pairs = found.filter(pc.is_in(found["relation"], pa.array(REPORTED)))
    copies = set(zip(*(pairs.filter(pc.equal(pairs["outcome"], "copy"))[c].to_pylist() for c in ("relation", "id")), strict=True))
    least = ALIKE.get(params.strictness, 2.0)
    alike = [
        outcome != "alike" or (score >= least and (relation, image) not in copies)
        for relation, image, outcome, score in zip(
            *(pairs[c].to_pylist() for c in ("relation", "id", "outcome", "score")), strict=True
        )
    ]
    convicted = {(relation.partition("-")[0], image) for relation, image in copies}
    alone = found.filter(pc.invert(pc.match_substring(found["relation"], "-")))
    unseen = [
        (of, image) not in convicted for of, image in zip(alone["relation"].to_pylist(), alone["id"].to_pylist(), strict=True)
    ]
    parts = [pairs.filter(pa.array(alike, pa.bool_())), alone.filter(pa.array(unseen, pa.bool_()))]
    if params.duplicates == "collapse":
        parts.append(one_per_copy(found.filter(pc.equal(found["relation"], "pool-pool")), sets["pool"]))
    audit = pa.concat_tables(parts)
    listed = set(_images(audit))
    by_hand = {(said.of, image) for image, said in overrides.items() if said.action == "remove"}
    rows = [{"relation": of, "id": image, "outcome": "by hand", "rule": "by hand"} for of, image in sorted(by_hand - listed)]
    audit = pa.concat_tables([audit, pa.Table.from_pylist(rows, FOUND)])
    removing = removed_by(params)
    images = _images(audit)
    reasons = zip(audit["relation"].to_pylist(), audit["outcome"].to_pylist(), strict=True)
    dropped = {image for image, reason in zip(images, reasons, strict=True) if reason in removing} | by_hand
    dropped -= {(said.of, image) for image, said in overrides.items() if said.action == "keep"}
    words = [said if (said := overrides.get(image)) and said.of == of else None for of, image in images]
    audit = audit.append_column("kept", pa.array([image not in dropped for image in images], pa.bool_()))
    audit = audit.append_column("override", pa.array([word and word.action for word in words], pa.string()))
    audit = audit.append_column("reason", pa.array([word and word.reason for word in words], pa.string()))
    return audit.drop_columns(["row", "match"]).sort_by([(name, "ascending") for name in ("relation", "id", "match_id")])


def removed_by(params: Dedup) -> set[tuple[str, str]]:
    """The relations and outcomes for which an image goes."""
    going = {("pool-pool", "copy")}
    if params.strictness == "none":
        return going
    outcomes = ["copy", "alike", *(o for o in ("review", "unverifiable") if getattr(params, o) == "remove")]
    relations = {"pool": ["pool", "pool-val", "pool-holdout"], "train": ["train", "train-val", "train-holdout"]}
    relations["holdout"] = ["holdout", "holdout-val"]
    relations["pool"] += ["pool-train"] if params.pool_train == "remove" else []
    of = ["pool", *(name for name in ("train", "holdout") if getattr(params, name) == "remove")]
    return going | set(itertools.product(itertools.chain.from_iterable(relations[name] for name in of), outcomes))


def kept_by(relation: str, outcome: str, params: Dedup) -> str | None:
    """The param that keeps such a finding's image, as `dedup.train: report`; None for an image of val."""
    of = relation.partition("-")[0]
    if of == "val":
        return None
    names = {"pool-train": "pool_train", "pool-pool": "duplicates"}
    name = names.get(relation, of if of != "pool" else "strictness")
    if outcome in ("review", "unverifiable") and params.strictness != "none" and getattr(params, outcome) == "keep":
        name = outcome
    elif params.strictness == "none" and relation != "pool-pool":
        name = "strictness"
    return f"dedup.{name}: {getattr(params, name)}"


def _images(audit: pa.Table) -> list[tuple[str, str]]:
    """The set and the id of the image that each finding is about."""
    return list(map(image_of, audit["relation"].to_pylist(), audit["id"].to_pylist()))


Image = tuple[str, str]
"""The set and the id."""
SAME_PART = 0.5
"""Two boxes in an image are one part of it where they share this much of the smaller."""


def one_layout_in_review(found: pa.Table, sets: Mapping[str, Manifest]) -> pa.Table:
    """The findings, with those put in review that may come from a layout: the image matches different photographs by one part.

    This is about findings by rules that allow part of the picture to disagree. The partners of a pool image are reference images
    (or, for copies within the pool, pool images), those of a reference image all that it was found in or that were found in it.
    Partners that are copies of each other by a rule of the whole picture count as one, and so do those in different parts.
    """
    copy, whole = pc.equal(found["outcome"], "copy"), pc.is_in(found["rule"], pa.array(WHOLE_RULES))
    partial = pc.and_(copy, pc.invert(whole))
    asked = pa.concat_arrays(
        [*found["id"].filter(partial).chunks, *found["match_id"].filter(partial).chunks, pa.array([], pa.string())]
    )
    near = pc.and_(
        pc.or_(pc.is_in(found["id"], asked), pc.is_in(found["match_id"], asked)), pc.not_equal(found["outcome"], "alike")
    )
    rows = found.filter(pc.and_(near, pc.is_valid(found["match_id"]))).to_pylist()
    same = found.filter(pc.and_(copy, whole)).select(["relation", "id", "match_id"]).to_pylist()
    leader = _leaders((ends(row) for row in same if row["relation"].startswith("pool-") == (row["relation"] == "pool-pool")), str)
    extent = extents({end for row in rows for end in ends(row)}, sets)
    partners: dict[tuple[bool, Image], dict[Image, np.ndarray]] = defaultdict(dict)  # the box in which each lies
    for row in rows:
        (image, match), crowd = ends(row), row["relation"] == "pool-pool"
        forth = np.reshape(row["transform"] or np.eye(3), (3, 3))
        partners[crowd, image][match] = _box(forth, extent[match], extent[image])
        if crowd or image[0] != "pool":
            partners[crowd, match][image] = _box(np.linalg.inv(forth), extent[image], extent[match])

    def crowded(at: tuple[bool, Image], partner: Image) -> bool:
        box = partners[at][partner]
        return any(leader.get(o, o) != leader.get(partner, partner) and _one_part(box, b) for o, b in partners[at].items())

    doubtful = set()
    for row in rows:
        image, match = ends(row)
        crowd = row["relation"] == "pool-pool"
        is_both = crowd or image[0] != "pool"
        if crowded((crowd, image), match) or (is_both and crowded((crowd, match), image)):
            doubtful.add((row["relation"], row["id"], row["match_id"]))
    doubt = [key in doubtful for key in zip(*(found[c].to_pylist() for c in ("relation", "id", "match_id")), strict=True)]
    review = pc.and_(partial, pa.array(doubt, pa.bool_()))
    return found.set_column(found.column_names.index("outcome"), "outcome", pc.if_else(review, "review", found["outcome"]))


def image_of(relation: str, image: str) -> Image:
    return relation.partition("-")[0], image


def ends(row: Row) -> tuple[Image, Image]:
    """The image that a finding is about, and its match."""
    of, _, other = row["relation"].partition("-")
    return (of, row["id"]), (other, row["match_id"])


def extents(images: set[Image], sets: Mapping[str, Manifest]) -> dict[Image, np.ndarray]:
    """Width and height in units of the longest side."""
    found: dict[Image, np.ndarray] = {}
    for name in {name for name, _ in images}:
        table = sets[name].table
        # The ids are looked for in one pass through the set, which may be large.
        sides = table.filter(pc.is_in(table["id"], pa.array([image for of, image in images if of == name], pa.string())))
        both = np.stack([sides[side].to_numpy() for side in ("width", "height")], 1)
        found |= {(name, image): side / max(side) for image, side in zip(sides["id"].to_pylist(), both, strict=True)}
    return found


def _box(transform: np.ndarray, inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """(2, 2): the upper left and the lower right corner of the box that a transformed image takes within another."""
    width, height = inner
    corners = geometry.project(transform, np.array([[0, 0], [width, 0], [width, height], [0, height]]))
    return np.stack([np.clip(corners.min(0), 0, outer), np.clip(corners.max(0), 0, outer)])


def _one_part(a: np.ndarray, b: np.ndarray) -> bool:
    shared, *sizes = (
        float(np.prod(np.maximum(box[1] - box[0], 0)))
        for box in (np.stack([np.maximum(a[0], b[0]), np.minimum(a[1], b[1])]), a, b)
    )
    return shared >= SAME_PART * min(sizes)


K = TypeVar("K", bound=Hashable)


def _leaders(pairs: Iterable[tuple[K, K]], rank: Callable[[K], Any]) -> dict[K, K]:
    """For each member of a pair the member of its group, which pairs hold together, of the lowest rank."""
    leader: dict[K, K] = {}

    def lead(member: K) -> K:
        while leader.setdefault(member, member) != member:
            member = leader[member]
        return member

    for a, b in pairs:
        stays, goes = sorted((lead(a), lead(b)), key=rank)
        leader[goes] = stays
    return {member: lead(member) for member in leader}


def both_ways(pairs: pa.Table) -> pa.Table:
    """The pairs of a set in itself, each as a finding on either image."""
    turned = [
        row
        | {"id": row["match_id"], "match_id": row["id"], "row": row["match"], "match": row["row"]}
        | {"cover_image": row["cover_match"], "cover_match": row["cover_image"]}
        | {"transform": row["transform"] and np.linalg.inv(np.reshape(row["transform"], (3, 3))).ravel().tolist()}
        for row in pairs.to_pylist()
    ]
    return pa.concat_tables([pairs, pa.Table.from_pylist(turned, pairs.schema)])


def one_per_copy(pairs: pa.Table, pool: Manifest) -> pa.Table:
    """Of the copies within the pool, the rows of those that go: all but the largest of each group (of equals, the first)."""
    pairs = both_ways(pairs.filter(pc.equal(pairs["outcome"], "copy")))
    area = pc.multiply(pool.table["width"].cast(pa.int64()), pool.table["height"].cast(pa.int64()))
    ends = zip(pairs["row"].to_pylist(), pairs["match"].to_pylist(), strict=True)
    leader = _leaders(ends, lambda row: (-area[row].as_py(), row))
    goes = pa.array([leader[row] != row for row in pairs["row"].to_pylist()], pa.bool_())
    best = pairs.filter(goes).sort_by([("row", "ascending"), ("score", "descending"), ("match", "ascending")])
    row = best["row"].to_numpy()
    return best.filter(pa.array(np.r_[True, row[1:] != row[:-1]][: len(row)], pa.bool_()))


def val_copies(audit: pa.Table) -> pa.Table:
    """Where copies of validation images are, or were: for an accuracy on those that nothing learned from. Rows of VAL_COPIES."""
    found = audit.filter(
        pc.and_(pc.ends_with(audit["relation"], "-val"), pc.is_in(audit["outcome"], pa.array(["copy", "review"])))
    )
    columns = (found[name].to_pylist() for name in ("relation", "id", "match_id", "outcome", "kept"))
    rows = set()
    for relation, image, match, outcome, kept in zip(*columns, strict=True):
        of = relation.partition("-")[0]
        rows |= {(match, of, image, outcome, kept)} | ({(image, of, match, outcome, kept)} if of == "val" else set())
    return pa.Table.from_pylist([dict(zip(VAL_COPIES.names, row, strict=True)) for row in sorted(rows)], VAL_COPIES)


NAMES = {"val": "val", "holdout": "held-out", "train": "training", "pool": "pool"}


def warnings(metrics: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    """What a reader of any accuracy has to know: sentences on copies among images that models learn from or are chosen by."""
    said = []
    for relation in ("train-val", "holdout-val", "train-holdout"):
        of, other = relation.split("-")
        copies, removes = metrics.get(f"{of}_{other}_copies", 0), params[of] == "remove" and params["strictness"] != "none"
        if copies:
            what = f"{copies:,} of {metrics[of]:,} {NAMES[of]} images are copies of {NAMES[other]} images"
            how = "they were removed" if removes else f"`dedup.{of}: remove` takes them out"
            said.append(f"{what}; {how}.")
    return said
