"""The run of the whole pipeline and its champion, in a real MLflow on SQLite."""

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.harness.journal import open_journal
from pipeline.report import comparison
from pipeline.report.comparison import Comparison
from pipeline.store import artifact
from pipeline.tracking import champion
from pipeline.tracking.experiment import Experiment
from tests import evaluations
from tests.tracking.journals import FOLDER, execute, record, runs, send, write

pytestmark = pytest.mark.filterwarnings("ignore")
TAGS = {"prefect.flow_run_id": "f1", "prefect.flow_run_name": "distil@ssld"}


def compared(best: str | None) -> None:
    """data/compare/results and data/evaluate, as far as the registry reads them."""
    evaluated("ssld")
    entries = {"baseline": evaluations.compared(0.6), "ssld": evaluations.compared(0.7)}
    figures: dict[str, Any] = {"title": "-", "baseline": "baseline", "choice": None, "margin": 0.01, "pairs": [], "classes": []}
    token = artifact.provenance.set({"lineage": {"evaluation 1 of ssld": {}}})
    with artifact.writing(Path("data/compare/results")) as tmp:
        comparison.write(tmp, Comparison(**figures, best=best, entries=entries))
    artifact.provenance.reset(token)


def evaluated(name: str, version: str = "1") -> None:
    folder = Path("data/distil", name)
    if not folder.exists():
        model(f"distil.{name}")
    of = {"path": str(folder), "identity": artifact.identity(folder)}
    token = artifact.provenance.set(
        {"key": f"evaluation {version} of {name}", "inputs": {"model": of, "holdout": {"identity": "h"}}}
    )
    with artifact.writing(Path("data/evaluate", name)) as tmp:
        (tmp / "evaluation.json").write_text("{}")
    artifact.provenance.reset(token)


def model(name: str) -> dict[str, Any]:
    """A model directory of two tensors; its record."""
    r = record(name)
    token = artifact.provenance.set(r)
    with artifact.writing(Path("data", *name.split("."))) as tmp:
        save_file({"w": np.arange(3.0)}, tmp / "model.safetensors")
        (tmp / "model.json").write_text(json.dumps({"arch": "resnet8", "classes": ["ant", "bee"], "input": {"size": 32}}))
    artifact.provenance.reset(token)
    return r


def test_a_run_without_a_comparison_has_a_run_of_its_own(store: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = record("teach.teacher")
    write(teacher, {"accuracy": 0.5})  # DVC had it; nothing was told about it
    monkeypatch.setenv("WINNOW_TAGS", json.dumps(TAGS))
    execute(record("distil.ssld", made_of=(teacher,)), accuracy=0.75)
    Path("dvc.lock").write_text("stages: {}\n")
    send()
    run_id = champion.summarise(store, ["teach.teacher", "distil.ssld"], TAGS)
    whole = store.client.get_run(run_id)
    assert (whole.info.run_name, whole.info.status) == ("distil@ssld", "FINISHED")
    assert whole.data.metrics == {"teach.teacher.accuracy": 0.5, "distil.ssld.accuracy": 0.75}
    assert whole.data.params["distil.ssld.loss.name"] == "js"
    assert whole.data.tags["winnow.dvc_lock"] == champion.lock_hash()
    assert whole.data.tags["prefect.flow_run_id"] == "f1"
    children = {r.info.run_name: r.data.tags for r in runs(store) if r.data.tags.get("mlflow.parentRunId") == run_id}
    assert {name: tags["winnow.status"] for name, tags in children.items()} == {
        "teach.teacher": "restored",
        "distil.ssld": "executed",
    }
    assert children["distil.ssld"]["prefect.flow_run_id"] == "f1"
    # Asked again, it is the same run; for another flow run, or a variant of it, it is another, of unchanged stages.
    assert champion.summarise(store, ["distil.ssld"], TAGS) == run_id
    other = champion.summarise(store, ["distil.ssld"], {**TAGS, "prefect.flow_run_id": "f2"})
    assert other != run_id
    of_a_variant = champion.summarise(store, ["distil.ssld"], {**TAGS, champion.VARIANT: "js"})
    assert of_a_variant not in (run_id, other)
    assert champion.summarise(store, ["distil.ssld"], TAGS) == run_id
    statuses = [r.data.tags["winnow.status"] for r in runs(store) if r.data.tags.get("mlflow.parentRunId") == other]
    assert statuses == ["unchanged", "unchanged"]


def test_a_comparison_is_the_run_of_its_flow_run(store: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_TAGS", json.dumps(TAGS))
    execute(record("compare", made_of=(record("teach.teacher"),)), best=0.75)
    send()
    found = store.client.get_run(champion.summarise(store, ["compare"], TAGS))
    assert found.info.run_name == "compare"
    assert len([r for r in runs(store) if "mlflow.parentRunId" not in r.data.tags]) == 1


def test_the_champion_is_the_one_that_the_comparison_calls_best(project: Path) -> None:
    assert champion.best() is None
    compared(None)
    assert champion.best() is None
    compared("ssld")
    assert champion.best() == ("ssld", Path("data/distil/ssld"), evaluations.compared(0.7), "h")
    evaluated("ssld", version="2")  # which no comparison has seen
    assert champion.best() is None
    compared("ssld")
    assert champion.best() is not None
    with artifact.writing(Path("data/distil/ssld")) as tmp:  # which no evaluation has seen
        (tmp / "model.json").write_text("{}")
    assert champion.best() is None


def test_the_champion_is_a_version_with_weights_signature_and_metrics(store: Experiment) -> None:
    r = model("distil.ssld")
    execute_only_the_journal(r)
    evaluation = evaluations.evaluated(val=0.7, holdout=0.75)
    version = champion.register(store, Path("data/distil/ssld"), evaluation, TAGS)
    found = store.client.get_model_version_by_alias("winnow", "champion")
    assert str(found.version) == version == "1"
    assert found.tags["winnow.key"] == r["key"]
    assert found.tags["prefect.flow_run_id"] == "f1"
    assert found.tags["holdout_top1"] == "0.75"
    assert found.run_id == runs(store)[0].info.run_id
    mlflow.set_tracking_uri(store.uri)
    takes = mlflow.models.get_model_info("models:/winnow@champion").signature
    assert takes.inputs.inputs[0].shape == (-1, 3, 32, 32)
    assert takes.outputs.inputs[0].shape == (-1, 2)
    folder = Path(mlflow.artifacts.download_artifacts("models:/winnow@champion"))
    assert load_file(folder / "model.safetensors")["w"].tolist() == [0.0, 1.0, 2.0]
    logged = store.client.get_logged_model(found.source.removeprefix("models:/"))
    assert {m.key: m.value for m in logged.metrics} == {f"champion.{k}": v for k, v in evaluation.figures().items()}
    assert champion.register(store, Path("data/distil/ssld"), evaluation, TAGS) == "1"
    model("distil.other")
    assert champion.register(store, Path("data/distil/other"), evaluations.evaluated(holdout=0.96), TAGS) == "2"
    assert str(store.client.get_model_version_by_alias("winnow", "champion").version) == "2"
    assert champion.links(store, "r", "2")["champion"].endswith("/#/models/winnow/versions/2")


def test_a_student_that_is_not_surely_better_does_not_take_the_title_on_the_same_held_out_images(store: Experiment) -> None:
    def champion_after(name: str, top1: float, holdout: str) -> str:
        model(f"distil.{name}")
        evaluation = evaluations.evaluated(holdout=top1)
        champion.register(store, Path("data/distil", name), evaluation, {"winnow.holdout": holdout})
        return str(store.client.get_model_version_by_alias("winnow", "champion").version)

    found = [
        champion_after(*new)
        for new in (("a", 0.6, "h"), ("b", 0.3, "h"), ("c", 0.79, "h"), ("d", 0.81, "h"), ("e", 0.5, "other"), ("a", 0.6, "h"))
    ]
    assert found == ["1", "1", "1", "4", "5", "1"]  # intervals of 0.1 to either side
    assert "version 1 stays" in store.client.get_model_version("winnow", "3").tags["winnow.against"]
    assert "winnow.against" not in store.client.get_model_version("winnow", "4").tags


def execute_only_the_journal(r: dict[str, Any]) -> None:
    open_journal(r, FOLDER, gathers=r["stage"] == "compare").finish("FINISHED", {}, [])
    send()
