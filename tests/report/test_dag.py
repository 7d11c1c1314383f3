"""The drawing of the stages: its order, its lines, and what it says of each."""

import re
from typing import Any

from pipeline.report import dag


def record(stage: str, entry: str | None, *needs: str) -> dict[str, Any]:
    return {"stage": stage, "entry": entry, "inputs": {need: {"path": need, "key": need} for need in (*needs, "mine")}}


LINEAGE = {
    "e1": record("evaluate", "one", "m1", "pool"),
    "m2": record("distil", "<two>", "teacher", "top"),
    "pool": record("dedup", None),
    "e2": record("evaluate", "<two>", "m2", "pool"),
    "teacher": record("teach", "teacher", "pool"),
    "top": record("select", "top", "teacher", "pool"),
    "m1": record("distil", "one", "teacher", "top"),
}


def test_each_stands_below_what_it_reads_and_an_evaluation_under_its_model() -> None:
    ordered = dag.nodes(LINEAGE)
    place = {node.key: i for i, node in enumerate(ordered)}
    assert set(place) == {*LINEAGE, "compare"}
    assert all(place[need] < place[node.key] for node in ordered for need in node.needs)
    assert (place["e1"] - place["m1"], place["e2"] - place["m2"], place["compare"]) == (1, 1, len(LINEAGE))


def test_a_line_leads_to_direct_readers_alone() -> None:
    direct = dag._direct(dag.nodes(LINEAGE))
    assert direct["e1"] == {"m1"}  # the pool is above its model anyway
    assert direct["top"] == {"teacher"}
    assert direct["m1"] == {"top"}
    assert direct["compare"] == {"e1", "e2"}


def test_no_two_lines_share_a_place() -> None:
    spans = [(0, 9), (0, 2), (2, 4), (1, 3), (5, 9), (3, 8)]
    lanes = dag._lanes(spans)
    for i, (a, b) in enumerate(spans):
        for j, (c, d) in enumerate(spans):
            assert i == j or lanes[i] != lanes[j] or b <= c or d <= a
    assert lanes[0] == max(lanes)  # the longest is the farthest from the names


def test_the_drawing_says_how_long_a_stage_took_and_whether_it_ran() -> None:
    known = {"teacher": 62.4, "m1": 3.25, "top": 7_500.0}
    states = {"teacher": "executed", "m1": "unchanged", "top": "restored"}
    drawn = str(dag.svg(dag.nodes(LINEAGE, known, states)))
    facts = dict(re.findall(r"<title>(\S+ \S+)(?: reads [^<]*)?</title>.*text-anchor=\"end\">([^<]*)</text>", drawn))
    assert facts["teach teacher"] == "1 min 2 s, ran"
    assert facts["distil one"] == "3.2 s, cached"
    assert facts["select top"] == "2 h 5 min, restored"
    assert len(facts) == 3
    assert "distil one reads select top, teach teacher" in drawn
    assert "<two>" not in drawn
    assert "&lt;two&gt;" in drawn
