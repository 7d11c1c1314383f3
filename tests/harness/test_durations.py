"""What stages remember of their time, and what is left of a planned run."""

import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.harness import durations


def test_a_torn_line_costs_one_run_and_no_more(tmp_path: Path) -> None:
    durations.keep(tmp_path, name="a", wall=1.0, cpu=2.0)
    with (tmp_path / durations.FILE).open("a") as file:
        file.write('{"name": "b", "wall"\n["not", "a", "run"]\n')
    durations.keep(tmp_path, name="c", wall=3.0, cpu=4.0)
    assert [(run["name"], run["wall"], run["cpu"]) for run in durations.read(tmp_path)] == [("a", 1, 2), ("c", 3, 4)]
    assert list(durations.read(tmp_path / "nowhere")) == []


def test_the_older_half_goes_where_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(8):
        durations.keep(tmp_path, name=str(number), wall=1.0, cpu=1.0)
    monkeypatch.setattr(durations, "LIMIT", 1)
    durations.keep(tmp_path, name="8", wall=1.0, cpu=1.0)
    assert [run["name"] for run in durations.read(tmp_path)] == ["4", "5", "6", "7", "8"]


def test_rows_are_those_of_the_tables_that_a_stage_reads_and_writes(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    pq.write_table(pa.table({"id": [1, 2, 3]}), tmp_path / "pool" / "manifest.parquet")
    (tmp_path / "model").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.parquet").write_text("no table")
    paths = {name: tmp_path / name for name in ("pool", "model", "damaged", "not-there")}
    assert durations.rows_of(paths) == {"pool": 3}


def test_what_is_left_goes_at_the_pace_of_what_is_done() -> None:
    planned = {"a": 10.0, "b": 20.0, "c": 30.0}
    assert durations.left(planned, {}) == pytest.approx(60)
    # a took twice as long; a tenth of the plan, 6 s, counts as seen at the planned pace: (20 + 6) / (10 + 6) x 50
    assert durations.left(planned, {"a": 20.0}) == pytest.approx(81.25)
    assert durations.left(planned, {"a": 10.0, "b": 20.0, "c": 30.0}) == 0


def test_stages_tell_what_is_left_of_the_run_that_they_belong_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WINNOW_PLAN", raising=False)
    durations.keep(tmp_path, name="a", wall=99.0, cpu=1.0)  # of another run, before this one was planned
    assert durations.told(tmp_path) is None
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"at": time.time(), "stages": {"a": 60.0, "b": 60.0}}))
    monkeypatch.setenv("WINNOW_PLAN", str(plan))
    assert durations.told(tmp_path) is None
    durations.keep(tmp_path, name="a", wall=60.0, cpu=1.0)
    assert durations.told(tmp_path) == "1 of 2 stages have run, about 1:00 left"
    durations.keep(tmp_path, name="b", wall=60.0, cpu=1.0)
    assert durations.told(tmp_path) == "2 of 2 stages have run, none is left"
    plan.write_text("{")
    assert durations.told(tmp_path) is None
