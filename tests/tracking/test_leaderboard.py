"""The experiment of the models: one run for each entry of the newest comparison, with the figures that decide."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking import __main__ as command
from pipeline.tracking import leaderboard
from pipeline.tracking.experiment import Experiment
from tests.tracking.journals import execute, record, send

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")


@pytest.fixture
def board(store: Experiment) -> Experiment:
    return Experiment(store.uri, f"winnow{leaderboard.SUFFIX}")


def model(name: str, version: str = "1", **metrics: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A student and its evaluation, both executed."""
    trained, measured = record(f"distil.{name}", version), record(f"evaluate.{name}", version)
    trained["inputs"] = {"chosen": {"path": "data/dedup/pool", "identity": "ab" * 32, "key": None}}
    trained["params"] = {"loss": {"name": "js"}, "training": {"steps": 10}, "note": "x", "view": {"kind": "shift"}}
    measured["params"] = {"role": "candidate", "model": f"distil/{name}"}
    of = {"path": f"data/distil/{name}", "identity": trained["key"], "key": trained["key"]}
    measured["inputs"] = {"model": of, "val": {"path": "data/prepare/val", "identity": "cd" * 32, "key": None}}
    measured["lineage"] = {trained["key"]: {k: v for k, v in trained.items() if k != "lineage"}}
    execute(trained, parameters=78_042, steps=10)
    execute(measured, **metrics)
    return trained, measured


def compare(version: str, *pairs: tuple[dict[str, Any], dict[str, Any]], **delta: float) -> None:
    made = record("dedup", "1"), record("prepare", "1")
    execute(made[0], pool=8063, kept=8000)
    execute(made[1], val=1000)
    of = record("compare", version, made_of=(*made, *(measured for _, measured in pairs)))
    execute(of, **{name: {"delta": value} for name, value in delta.items()})
    send()


def models(board: Experiment) -> dict[str, Any]:
    return {run.info.run_name: run for run in board.search(leaderboard.LATEST, "yes")}


def test_each_entry_is_a_run_with_the_figures_that_decide(board: Experiment) -> None:
    compare(
        "1", model("ssld", val_top1=0.8, clean_val_top1=0.79, holdout_top1=0.7, val_nll=0.5), model("kd", val_top1=0.7), ssld=0.1
    )
    found = models(board)
    assert found.keys() == {"ssld", "kd"}
    ssld = found["ssld"]
    assert ssld.info.status == "FINISHED"
    figures = {
        "val_top1": 0.8,
        "clean_val_top1": 0.79,
        "holdout_top1": 0.7,
        "over_baseline": 0.1,
        "parameters": 78_042,
        "steps": 10,
    }
    assert ssld.data.metrics == {**figures, "learning.loss": 1.0}
    assert ssld.data.params == {"role": "candidate", "loss.name": "js", "training.steps": "10", "view.kind": "shift"}
    curve = board.client.get_metric_history(ssld.info.run_id, "learning.loss")
    assert [(point.step, point.value) for point in curve] == [(1, 2.0), (2, 1.0)]
    data = {i.dataset.name: (i.tags[0].value, json.loads(i.dataset.profile or "{}")) for i in ssld.inputs.dataset_inputs}
    assert data == {
        "dedup/pool": ("training", {"rows": 8063, "leaks_removed": 63}),
        "prepare/val": ("evaluation", {"rows": 1000}),
    }


def test_only_the_newest_comparison_is_shown_and_nothing_is_doubled(board: Experiment) -> None:
    ssld, kd = model("ssld", val_top1=0.8), model("kd", val_top1=0.7)
    compare("1", ssld, kd, ssld=0.1)
    compare("2", ssld, model("kd", "2", val_top1=0.75), ssld=0.05)
    found = models(board)
    assert {name: run.data.metrics["val_top1"] for name, run in found.items()} == {"ssld": 0.8, "kd": 0.75}
    assert found["ssld"].data.metrics["over_baseline"] == 0.05
    assert [run.info.run_name for run in board.search(leaderboard.LATEST, "no")] == ["kd"]


def test_the_address_that_is_printed_is_that_of_the_models(board: Experiment, project: Path) -> None:
    assert "/#/experiments/1/runs" in command._where_to_look()  # nothing was compared yet
    compare("1", model("ssld", val_top1=0.8))
    told = command._where_to_look()
    [(number,)] = sqlite3.connect(project / "mlflow.db").execute(
        "select experiment_id from experiments where name = ?", (f"winnow{leaderboard.SUFFIX}",)
    )
    assert f"http://127.0.0.1:5000/#/experiments/{number}/runs?viewStateShareKey=winnow" in told
    view = json.loads(board.client.get_experiment(board.experiment_id).tags[leaderboard.SHARED_VIEW])
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`val_top1`", False)
    shown = [column.split("`")[1] for column in view["selectedColumns"] if column.startswith("metrics")]
    assert {"val_top1", "over_baseline"} <= set(shown) <= {"over_baseline", *leaderboard.FIGURES, *leaderboard.OF_TRAINING}
