"""Decisions on findings: what one layout over different photographs looks like, and which param keeps an image."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.leaks import decision
from pipeline.leaks.decision import Dedup, decide, kept_by
from pipeline.leaks.findings import FOUND, Row
from pipeline.store import manifest
from pipeline.store.manifest import Manifest

WHOLE = np.eye(3).ravel().tolist()


def part(x: float, y: float, scale: float) -> list[float]:
    """Where a match lies in an image."""
    return [scale, 0, x, 0, scale, y, 0, 0, 1]


def pair(ends: str, rule: str = "partly covered", outcome: str = "copy", transform: list[float] = WHOLE, **more: Any) -> Row:
    """`ends`: as `pool:p1 val:v1`."""
    (of, image), (other, match) = (end.split(":") for end in ends.split())
    row = {"relation": f"{of}-{other}", "id": image, "match_id": match, "row": 0, "match": 0, "mirrored": False}
    return row | {"outcome": outcome, "rule": rule, "transform": transform, "score": 0.7} | more


def sets_of(rows: list[Row]) -> dict[str, Manifest]:
    """All images of 400 x 300 pixels."""
    ids: dict[str, set[str]] = {name: set() for name in ("pool", "val", "train", "holdout")}
    for row in rows:
        of, _, other = row["relation"].partition("-")
        ids[of].add(row["id"])
        ids[other].add(row["match_id"])
    tables = {n: [{"id": image, "width": 400, "height": 300} for image in sorted(found)] for n, found in ids.items()}
    return {name: Manifest(pa.Table.from_pylist(table, manifest.SCHEMA), ()) for name, table in tables.items()}


def outcomes(*rows: Row) -> dict[str, str]:
    found = pa.Table.from_pylist(list(rows), FOUND)
    judged = decision.one_layout_in_review(found, sets_of(list(rows))).to_pylist()
    return {f"{row['id']} {row['match_id']}": row["outcome"] for row in judged}


def test_an_image_that_matches_one_photograph_in_part_is_a_copy():
    assert outcomes(pair("pool:p val:v1"), pair("pool:q val:v2")) == {"p v1": "copy", "q v2": "copy"}


def test_an_image_that_matches_two_photographs_by_one_part_is_for_review():
    rows = [pair("pool:p val:v1"), pair("pool:p train:t1", "same texture"), pair("pool:q val:v1")]
    assert outcomes(*rows) == {"p v1": "review", "p t1": "review", "q v1": "copy"}


def test_a_finding_that_is_itself_for_review_counts():
    rows = [pair("pool:p val:v1"), pair("pool:p val:v2", "shared features", "review")]
    assert outcomes(*rows) == {"p v1": "review", "p v2": "review"}


def test_a_look_alike_is_no_second_photograph():
    assert outcomes(pair("pool:p val:v1"), pair("pool:p val:v2", "thumbnails", "alike", []))["p v1"] == "copy"


@pytest.mark.parametrize(("rule", "outcome"), [("same pixels", "copy"), ("same bytes", "copy"), ("half covered", "review")])
def test_copies_of_each_other_are_one_photograph(rule: str, outcome: str):
    rows = [pair("pool:p val:v1"), pair("pool:p val:v2"), pair("val:v2 val:v1", rule)]
    assert outcomes(*rows)["p v1"] == outcomes(*rows)["p v2"] == outcome


def test_a_finding_that_allows_no_part_to_disagree_stays():
    rows = [pair("pool:p val:v1", "same pixels"), pair("pool:p val:v2"), pair("pool:p val:v3", "small")]
    assert outcomes(*rows) == {"p v1": "copy", "p v2": "review", "p v3": "copy"}


def test_photographs_in_different_parts_of_a_collage_do_not_count():
    left, right = part(0, 0, 0.5), part(0.5, 0, 0.5)
    assert set(outcomes(pair("pool:p val:v1", transform=left), pair("pool:p val:v2", transform=right)).values()) == {"copy"}
    overlapping = part(0.1, 0, 0.5)
    assert outcomes(pair("pool:p val:v1", transform=left), pair("pool:p val:v2", transform=overlapping))["p v1"] == "review"


def test_a_labelled_image_also_counts_those_that_were_found_in_it():
    rows = [pair("train:t1 val:v1"), pair("train:t2 train:t1")]
    assert outcomes(*rows) == {"t1 v1": "review", "t2 t1": "review"}
    rows = [pair("pool:p1 val:v1"), pair("pool:p2 val:v1")]
    assert set(outcomes(*rows).values()) == {"copy"}, "nothing says whether p1 and p2 are copies of each other"


def test_an_unverifiable_or_alike_finding_is_dropped_where_the_image_is_a_copy():
    alone = {"match_id": None, "match": None, "relation": "pool", "transform": None, "outcome": "unverifiable"}
    rows = [pair("pool:p val:v1"), pair("pool:p val:v2", "thumbnails", "alike", [], score=0.95)]
    rows += [pair("pool:q val:v2", "thumbnails", "alike", [], score=0.95)]
    sets = sets_of(rows)
    found = pa.Table.from_pylist([*rows, pair("pool:p val:v1") | alone, pair("pool:r val:v1") | alone], FOUND)
    audit = decide(found, Dedup(strictness="near"), {}, sets).to_pylist()
    assert [(row["id"], row["outcome"], row["kept"]) for row in audit] == [
        ("r", "unverifiable", True),
        ("p", "copy", False),
        ("q", "alike", False),
    ]


@pytest.mark.parametrize(
    ("relation", "outcome", "params", "said"),
    [
        ("train-val", "copy", {}, "dedup.train: report"),
        ("holdout-val", "copy", {}, "dedup.holdout: report"),
        ("pool-train", "copy", {"pool_train": "keep"}, "dedup.pool_train: keep"),
        ("pool-val", "review", {}, "dedup.review: keep"),
        ("pool", "unverifiable", {}, "dedup.unverifiable: keep"),
        ("train-val", "review", {"review": "remove"}, "dedup.train: report"),
        ("pool-val", "copy", {"strictness": "none"}, "dedup.strictness: none"),
        ("train-val", "copy", {"strictness": "none", "train": "remove"}, "dedup.strictness: none"),
        ("val-val", "copy", {}, None),
    ],
)
def test_the_param_that_keeps_an_image_is_named(relation: str, outcome: str, params: dict[str, Any], said: str | None):
    assert kept_by(relation, outcome, Dedup(**params)) == said
    assert (relation, outcome) not in decision.removed_by(Dedup(**params))
