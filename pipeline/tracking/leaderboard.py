"""The models of a comparison as an experiment of their own: one run for each entry, with the few figures that decide.

The experiment of the stages has a run for each stage and hundreds of numbers; whoever asks which model is best opens this one.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

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


def write(board: Experiment, stages: Experiment, lineage: Mapping[str, Any], end: Mapping[str, Any]) -> None:
    """A finished run for each evaluation of a comparison, named for its entry; one that is there is written once more.

    `board`: the experiment of the models. `stages`: that of the runs of all stages, where the learning curves are. `lineage`: the
    records of the comparison, by key. `end`: its last event.
    """
    compared, now = end.get("compared", {}), end["time"]
    order = {"searchFilter": f"tags.`{LATEST}` = 'yes'", "orderByKey": "metrics.`val_top1`", "orderByAsc": False}
    board.client.set_experiment_tag(board.experiment_id, SHARED_VIEW, json.dumps({**order, "selectedColumns": COLUMNS}))
    known = {run.data.tags.get("winnow.key"): run for run in board.search(LATEST, "yes") + board.search(LATEST, "no")}
    shown = {key: record for key, record in lineage.items() if record["stage"] == "evaluate"}
    for key, run in known.items():
        if key not in shown and run.data.tags[LATEST] == "yes":
            board.client.set_tag(run.info.run_id, LATEST, "no")
    for key, record in shown.items():
        entry, trained_by = record["entry"], record["inputs"].get("model", {}).get("key")
        training = lineage.get(trained_by, {})
        measured, trained = compared.get(key, {}), compared.get(trained_by, {})
        gain = (end["metrics"].get(entry) or {}).get("delta")
        figures = {name: measured.get(name) for name in FIGURES} | {name: trained.get(name) for name in OF_TRAINING}
        told = [(name, value, now, 0) for name, value in numbers_of({"over_baseline": gain, **figures}).items()]
        run = known.get(key)
        run_id = run.info.run_id if run else board.create(entry, now, _tags(key, record, training))
        board.client.set_tag(run_id, LATEST, "yes")
        params = {name: value for name, value in params_of(training).items() if name in PARAMS} if training else {}
        board.log(run_id, {"role": record["params"].get("role"), **params}, told + list(_curves(stages, trained_by)))
        _log_data(board, run_id, record, training, lineage, compared)
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

    counts = {
        f"data/{r['stage']}/{n}": v for k, r in lineage.items() for n, v in compared.get(k, {}).items() if isinstance(v, int)
    }
    found: dict[str, Any] = {}
    for role, given in (("training", training.get("inputs", {})), ("evaluation", record["inputs"])):
        names = ("chosen", "train") if role == "training" else ("val", "holdout")
        found |= {given[name]["path"]: (role, given[name]) for name in names if name in given}
    inputs = []
    for path, (role, given) in found.items():
        rows, pool = counts.get(path), counts.get("data/dedup/pool")
        kept = counts.get("data/dedup/kept")
        removed = pool - kept if path.startswith("data/dedup/pool") and pool is not None and kept is not None else None
        profile = {name: value for name, value in (("rows", rows), ("leaks_removed", removed)) if value is not None}
        dataset = Dataset(
            name=path.removeprefix("data/"),
            digest=given["identity"][:16],
            source_type="local",
            source=json.dumps({"uri": path}),
            profile=json.dumps(profile) if profile else None,
        )
        inputs.append(DatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", role)]))
    board.client.log_inputs(run_id, datasets=inputs)
