"""The plan of a run in words: what changed, what that takes, and what of it is left. No DVC is asked, and no server."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import dag, plan
from flows.adapter import dvc
from flows.dag import Dag
from flows.plan import ABSENT, Plan, Row
from pipeline.harness import durations

GRAPH = Dag({"teach@a": frozenset(), "score@a": frozenset({"teach@a"}), "compare": frozenset({"score@a"})})
NOW = {"teach": {"a": {"steps": 300, "view": {"kind": "crop"}}}, "score": {"a": {"m": 10}}}
BEFORE = {"teach.a": {"steps": 200, "view": {"kind": "crop", "pad": 4}}}


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (1, 1, []),
        (1, 2, ["k: 1 -> 2"]),
        ({"a": 1, "b": [1]}, {"a": 1, "b": [1, 2]}, ["k.b: [1] -> [1, 2]"]),
        ({"a": 1}, {"c": "x"}, ["k.a is gone (it was 1)", 'k.c: "x" is new']),
        (ABSENT, True, ["k: true is new"]),
        ("x" * 100, 0, [f'k: "{"x" * 36}... -> 0']),
    ],
)
def test_a_change_of_params_is_told_by_its_key_and_values(before: Any, now: Any, told: list[str]) -> None:
    assert list(plan.differences("k", before, now)) == told


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stages = {
        "teach@a": {"cmd": "x", "params": {"params.yaml": BEFORE}, "outs": [{"path": "data/teach/a", "md5": "1"}]},
        "score@a": {"cmd": "x", "outs": [{"path": "data/score/a", "md5": "2"}]},
    }
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(NOW))
    (tmp_path / "pipeline" / "models").mkdir(parents=True)
    for name, text in (("network.py", "new"), ("exits.py", "old")):
        (tmp_path / "pipeline" / "models" / name).write_text(text)
    return tmp_path


def why(folder: Path, **changes: Any) -> dict[str, str]:
    """`changes`: what `dvc status --json` says of a stage."""
    changed = dvc.changes(json.dumps({name.replace("_", "@"): [what] for name, what in changes.items()}))
    stale = GRAPH.affected(changed)
    return plan.reasons(folder, GRAPH, stale, stale, changed)


def test_each_stage_has_its_reason(folder: Path) -> None:
    deps = {"params.yaml": {"teach.a": "modified"}, "pipeline/models": "modified"}
    assert why(folder, teach_a={"changed deps": deps}) == {
        "teach@a": "teach.a.steps: 200 -> 300; teach.a.view.pad is gone (it was 4); and 1 more",
        "score@a": "needs teach@a, made anew",
        "compare": "has not run here yet",
    }
    raw = {"data/raw": "modified", "data/overrides.csv": "deleted", "data/teach/a": "deleted"}
    assert why(folder, score_a={"changed deps": raw})["score@a"] == "data/raw is another; data/overrides.csv is not there"
    assert why(folder, score_a={"changed outs": {"data/score/a": "deleted"}})["score@a"] == "its output is not there"
    assert why(folder, score_a={"changed outs": {"data/score/a": "modified"}})["score@a"] == "its output was changed by hand"


def test_a_changed_folder_of_code_is_told_by_its_files(folder: Path) -> None:
    """By the hashes that the stage's last run left."""
    change = {"changed deps": {"pipeline/models": "modified"}}
    assert why(folder, teach_a=change)["teach@a"] == "code: pipeline/models"
    sha_of_old = "cba06b5736fa"
    code = {"pipeline.models.network": sha_of_old, "pipeline.models.exits": sha_of_old, "pipeline.report.page": sha_of_old}
    durations.keep(folder / ".scratch", name="teach.a", wall=1.0, cpu=1.0, code=code)
    assert why(folder, teach_a=change)["teach@a"] == "code: pipeline/models/network.py"


def test_a_stage_that_looks_each_time_is_told_and_what_needs_it_is_taken_to_be_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = dvc.changes(json.dumps({"teach@a": ["always changed"]}))
    assert dag.looking(changes) == ["teach@a"]
    told = ["always changed", {"changed outs": {"data/teach/a": "deleted"}}]
    assert dag.looking(dvc.changes(json.dumps({"teach@a": told}))) == []
    monkeypatch.setattr(dvc, "restorable", lambda *_: dict.fromkeys(GRAPH.needs, True))
    found = plan.looked(folder, GRAPH, list(GRAPH.needs), changes, False)
    assert (found.todo, found.runs, found.current) == (["teach@a"], ["teach@a"], 2)
    assert found.why["teach@a"].startswith("looks at its address anew each time")


LONG = "distil@honest_balanced_finetune"
PLAN = Plan(
    [
        Row("prepare", "its output is not there; DVC has its result", 1.0, 1.0, "cache"),
        Row(LONG, f"{LONG.replace('@', '.')}.loss.temperature: 1.0 -> 4.0", 3725, 7000, "probe"),
        Row("evaluate@ssld", f"needs {LONG}, made anew", None, None, "a GPU worker"),
    ],
    current=23,
    machine="2 cores of a processor",
)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_the_terminal_and_loses_nothing(width: int) -> None:
    text = PLAN.text(width)
    assert max(map(len, text.splitlines())) <= width
    together = "".join(text.split())
    for words in (LONG, "1:02:05", "23stagesareuptodate", "1.0->4.0", "116.7core-minutes"):
        assert words in together or width == 60
    assert "Not counted, as nobody knows how long they take: evaluate@ssld." in " ".join(text.split())


def test_a_plan_of_nothing_is_a_sentence() -> None:
    assert Plan([], current=26).text(80) == "Nothing to do: 26 stages are up to date.\n"
    assert Plan([], current=1).markdown().strip() == "Nothing to do: 1 stage is up to date."


def test_the_flow_and_the_stages_count_what_is_left_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert PLAN.planned() == {"distil.honest_balanced_finetune": 3725}
    planned, done = {"a": 10.0, "b": 20.0, "c": 300.0}, {"a": 20.0}
    rest = durations.left(planned, done)
    assert plan.left(planned, done) == f"1 of 3 stages have run, about {plan.clock(rest)} left"
    assert plan.left(planned, done, at_once=2) == f"1 of 3 stages have run, about {plan.clock(rest / 2)} left"
