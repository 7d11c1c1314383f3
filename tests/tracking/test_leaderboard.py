"""The experiment of the models: one run for each entry of the newest comparison, with the figures that decide."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.store import artifact
from pipeline.tracking import __main__ as command
from pipeline.tracking import leaderboard
from pipeline.tracking.experiment import Experiment
from tests.tracking.journals import execute, record, send

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")


@pytest.fixture
def board(store: Experiment) -> Experiment:
    return Experiment(store.uri, f"winnow{leaderboard.SUFFIX}")


DEDUP, PREPARE, SELECT = record("dedup"), record("prepare"), record("select.top")


def manifest(path: str, made_by: dict[str, Any] | None) -> dict[str, Any]:
    return {"path": path, "identity": "ab" * 32, "key": made_by and made_by["key"]}


def model(name: str, version: str = "1", images: str = "dedup/pool", **metrics: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A student and its evaluation, both executed. `images`: what it learned from beside the labelled ones."""
    trained, measured = record(f"distil.{name}", version), record(f"evaluate.{name}", version)
    made_by = {"dedup/pool": DEDUP, "select/top": SELECT}.get(images)
    trained["inputs"] = {"chosen": manifest(f"data/{images}", made_by), "train": manifest("data/dedup/train", DEDUP)}
    trained["params"] = {"loss": {"name": "js"}, "training": {"steps": 10}, "note": "x", "view": {"kind": "shift"}}
    measured["params"] = {"role": "candidate", "model": f"distil/{name}"}
    of = {"path": f"data/distil/{name}", "identity": trained["key"], "key": trained["key"]}
    measured["inputs"] = {"model": of, "val": manifest("data/prepare/val", PREPARE)}
    measured["lineage"] = {trained["key"]: {k: v for k, v in trained.items() if k != "lineage"}}
    execute(trained, parameters=78_042, steps=10)
    execute(measured, **metrics)
    return trained, measured


def compare(version: str, *pairs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """A comparison whose baseline is `kd`."""
    execute(DEDUP, pool=8063, kept=8000, train=400, train_removed=3, holdout=200, holdout_removed=0)
    execute(PREPARE, val=1000, pool=8070)
    execute(SELECT, images=1500, pool=8000)
    of = record("compare", version, made_of=(DEDUP, PREPARE, SELECT, *(measured for _, measured in pairs)))
    of["params"] = {"baseline": "kd"}
    execute(of, chosen="ssld", over_baseline=0.1)
    send()


def models(board: Experiment) -> dict[str, Any]:
    return {run.info.run_name: run for run in board.search(leaderboard.LATEST, "yes")}


def test_each_entry_is_a_run_with_the_figures_that_decide(board: Experiment) -> None:
    compare("1", model("ssld", val_top1=0.8, clean_val_top1=0.79, holdout_top1=0.7, val_nll=0.5), model("kd", val_top1=0.7))
    found = models(board)
    assert found.keys() == {"ssld", "kd"}
    ssld = found["ssld"]
    assert ssld.info.status == "FINISHED"
    figures = {
        "val_top1": 0.8,
        "clean_val_top1": 0.79,
        "holdout_top1": 0.7,
        "over_baseline": pytest.approx(0.1),
        "parameters": 78_042,
        "steps": 10,
    }
    assert ssld.data.metrics == {**figures, "learning.loss": 1.0}
    assert ssld.data.params == {"role": "candidate", "loss.name": "js", "training.steps": "10", "view.kind": "shift"}
    curve = board.client.get_metric_history(ssld.info.run_id, "learning.loss")
    assert [(point.step, point.value) for point in curve] == [(1, 2.0), (2, 1.0)]


def test_the_data_of_a_model_are_counted_as_they_were_learned_from(board: Experiment) -> None:
    learned_from = {
        "dedup/pool": {"rows": 8000, "leaks_removed": 63},
        "select/top": {"rows": 1500},
        "mine": {},  # which no stage has made
    }
    compare("1", *(model(f"m{i}", images=images) for i, images in enumerate(learned_from)))
    for i, (images, profile) in enumerate(learned_from.items()):
        inputs = models(board)[f"m{i}"].inputs.dataset_inputs
        data = {i.dataset.name: (i.tags[0].value, json.loads(i.dataset.profile or "{}")) for i in inputs}
        assert data == {
            images: ("training", profile),
            "dedup/train": ("training", {"rows": 397, "leaks_removed": 3}),
            "prepare/val": ("evaluation", {"rows": 1000}),
        }


def test_the_model_of_an_entry_is_a_logged_model_with_its_figures(board: Experiment) -> None:
    trained, measured = model("ssld", val_top1=0.8)
    folder = Path("data/distil/ssld")
    token = artifact.provenance.set(trained)
    with artifact.writing(folder) as tmp:
        save_file({"w": np.arange(3.0)}, tmp / "model.safetensors")
        (tmp / "model.json").write_text(json.dumps({"arch": "resnet8", "classes": ["ant", "bee"], "input": {"size": 32}}))
    artifact.provenance.reset(token)
    measured["inputs"]["model"]["identity"] = artifact.identity(folder)
    replaced = model("kd", val_top1=0.7)  # by the time the mirror comes, its folder holds another model, or none
    for version in ("1", "2"):
        compare(version, (trained, measured), replaced)
    [found] = board.client.search_logged_models([board.experiment_id])
    run = models(board)["ssld"]
    assert (found.name, found.source_run_id, str(found.status)) == ("ssld", run.info.run_id, "READY")
    assert [output.model_id for output in run.outputs.model_outputs] == [found.model_id]
    told = {metric.key: metric.value for metric in found.metrics}
    assert told == {"val_top1": 0.8, "over_baseline": pytest.approx(0.1), "parameters": 78_042, "steps": 10}
    files = Path(mlflow.artifacts.download_artifacts(f"models:/{found.model_id}", tracking_uri=board.uri))
    assert load_file(files / "model.safetensors")["w"].tolist() == [0.0, 1.0, 2.0]
    assert not (outputs := models(board)["kd"].outputs) or not outputs.model_outputs


def test_only_the_newest_comparison_is_shown_and_nothing_is_doubled(board: Experiment) -> None:
    ssld, kd = model("ssld", val_top1=0.8), model("kd", val_top1=0.7)
    compare("1", ssld, kd)
    compare("2", ssld, model("kd", "2", val_top1=0.75))
    found = models(board)
    assert {name: run.data.metrics["val_top1"] for name, run in found.items()} == {"ssld": 0.8, "kd": 0.75}
    assert found["ssld"].data.metrics["over_baseline"] == pytest.approx(0.05)
    assert "over_baseline" not in found["kd"].data.metrics
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
