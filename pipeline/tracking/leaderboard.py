"""The models of a comparison as an experiment of their own: one run for each entry, with the few figures that decide.

The experiment of the stages has a run for each stage and hundreds of numbers; whoever asks which model is best opens this one.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.tracking import logged
from pipeline.tracking.comparison import numbers_of, originals, params_of
from pipeline.tracking.experiment import Experiment, milliseconds

SUFFIX = " models"
LATEST = "winnow.latest"
FIGURES = ("val_top1", "clean_val_top1", "holdout_top1", "val_ece", "calibrated_val_ece")
OF_TRAINING = ("parameters", "steps", "images")
PARAMS = ("init", "teacher", "images", "model.arch", "view.kind", "training.steps", "training.batch", "training.lr", "loss.name")
CURVES = {"holdout_top1": "learning.holdout_top1", "loss": "learning.loss"}
"""The curves of a training, and their names here: of one name MLflow would show the last point as the figure."""
VIEW = "winnow"
SHARED_VIEW = f"mlflow.sharedViewState.{VIEW}"
"""The tag under which MLflow 3.17 keeps a view of an experiment that was shared: what its page shows, and in which order."""
COLUMNS = [
    *(f"metrics.`{name}`" for name in ("clean_val_top1", "holdout_top1", "over_baseline", "val_top1")),
    *("params.`role`", "params.`teacher`"),
]


def write(board: Experiment, stages: Experiment, record: Mapping[str, Any], end: Mapping[str, Any]) -> None:
    """A finished run for each evaluation of a comparison, named for its entry; one that is there is written once more.

    `board`: the experiment of the models. `stages`: that of the runs of all stages, where the learning curves are. `record`: that
    of the comparison. `end`: its last event.
    """
    lineage, baseline = record["lineage"], record["params"].get("baseline")
    compared, now = end.get("compared", {}), end["time"]
    order = {"searchFilter": f"tags.`{LATEST}` = 'yes'", "orderByKey": "metrics.`val_top1`", "orderByAsc": False}
    board.client.set_experiment_tag(board.experiment_id, SHARED_VIEW, json.dumps({**order, "selectedColumns": COLUMNS}))
    known = {run.data.tags.get("winnow.key"): run for run in board.search(LATEST, "yes") + board.search(LATEST, "no")}
    shown = {key: evaluated for key, evaluated in lineage.items() if evaluated["stage"] == "evaluate"}
    base = next((compared.get(key, {}).get("val_top1") for key, one in shown.items() if one["entry"] == baseline), None)
    for key, run in known.items():
        if key not in shown and run.data.tags[LATEST] == "yes":
            board.client.set_tag(run.info.run_id, LATEST, "no")
    for key, evaluated in shown.items():
        entry, trained_by = evaluated["entry"], evaluated["inputs"].get("model", {}).get("key")
        training = lineage.get(trained_by, {})
        measured, trained = compared.get(key, {}), compared.get(trained_by, {})
        top1 = measured.get("val_top1")
        gain = top1 - base if top1 is not None and base is not None and entry != baseline else None
        figures = {name: measured.get(name) for name in FIGURES} | {name: trained.get(name) for name in OF_TRAINING}
        told = [(name, value, now, 0) for name, value in numbers_of({"over_baseline": gain, **figures}).items()]
        run = known.get(key)
        run_id = run.info.run_id if run else board.create(entry, now, _tags(key, evaluated, training))
        board.client.set_tag(run_id, LATEST, "yes")
        params = {name: value for name, value in params_of(training).items() if name in PARAMS} if training else {}
        board.log(run_id, {"role": evaluated["params"].get("role"), **params}, list(_curves(stages, trained_by)))
        board.log(run_id, {}, told, _model(board, run_id, evaluated))
        _log_data(board, run_id, evaluated, training, lineage, compared)
        board.client.set_terminated(run_id, "FINISHED", end_time=milliseconds(now))


def address(experiment_id: str) -> str:
    """The path of the page that shows the newest models, the best on val first."""
    return f"/#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}&workflowType=machine_learning"


def _tags(key: str, record: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, str]:
    model = record["inputs"].get("model", {}).get("path", "")
    return {
        "winnow.key": key,
        "winnow.role": str(record["params"].get("role")),
        "winnow.model": model,
        "mlflow.source.name": f"dvc repro {training['stage']}@{training['entry']}" if training else model,
        "mlflow.source.type": "LOCAL",
    }


def _curves(stages: Experiment, key: str | None) -> Iterator[tuple[str, float, float, int]]:
    """The learning curves of the newest run of a training; none where DVC took it from its cache."""
    for run in originals(stages, key)[:1] if key else ():
        for name, here in CURVES.items():
            for point in stages.client.get_metric_history(run.info.run_id, name):
                yield here, point.value, point.timestamp / 1000, point.step


def _log_data(
    board: Experiment,
    run_id: str,
    record: Mapping[str, Any],
    training: Mapping[str, Any],
    lineage: Mapping[str, Any],
    compared: Mapping[str, Any],
) -> None:
    """The manifests that a model learned from and was measured on: name, digest, rows, and what the leak check removed."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    found: dict[str, Any] = {}
    for role, given in (("training", training.get("inputs", {})), ("evaluation", record["inputs"])):
        names = ("chosen", "train") if role == "training" else ("val", "holdout")
        found |= {given[name]["path"]: (role, given[name]) for name in names if name in given}
    inputs = []
    for path, (role, given) in found.items():
        profile = _profile(lineage.get(given["key"], {}), path, compared.get(given["key"], {}))
        dataset = Dataset(
            name=path.removeprefix("data/"),
            digest=given["identity"][:16],
            source_type="local",
            source=json.dumps({"uri": path}),
            profile=json.dumps(profile) if profile else None,
        )
        inputs.append(DatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", role)]))
    board.client.log_inputs(run_id, datasets=inputs)


def _profile(made_by: Mapping[str, Any], path: str, metrics: Mapping[str, Any]) -> dict[str, int]:
    """The rows of a manifest, and what the leak check took out of it, from the record and the metrics of the stage that wrote it;
    nothing of what is not known."""
    name = path.rpartition("/")[2]
    if made_by.get("stage") == "dedup":
        before, removed = metrics.get(name), metrics.get(f"{name}_removed")
        if name == "pool" and before is not None and "kept" in metrics:
            removed = before - metrics["kept"]
        return {"rows": before - removed, "leaks_removed": removed} if before is not None and removed is not None else {}
    rows = metrics.get(name if made_by.get("stage") == "prepare" else "images")
    return {"rows": rows} if isinstance(rows, int) else {}


def _model(board: Experiment, run_id: str, record: Mapping[str, Any]) -> str | None:
    """The id of the logged model of an entry, made if it is new; None where its folder holds another by now, or no model."""
    from mlflow.entities import LoggedModelOutput

    entry, given = record["entry"], record["inputs"].get("model")
    model_id = logged.find(board, entry, record["key"])
    if model_id is None and given and logged.is_there(Path(given["path"]), given):
        tags = {"winnow.key": record["key"], "winnow.model": given["path"]}
        model_id = logged.log(board, Path(given["path"]), entry, run_id, tags)
    outputs = board.client.get_run(run_id).outputs
    if model_id is not None and not (outputs and outputs.model_outputs):
        board.client.log_outputs(run_id, models=[LoggedModelOutput(model_id, 0)])
    return model_id
