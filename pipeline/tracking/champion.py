"""One run in MLflow for a whole run of the pipeline, and its champion in the model registry.

    python -m pipeline.tracking.champion STAGE... `prepare distil.ssld ...`: the stages that were run or found up to date

The comparison's own run is that of the pipeline where a comparison was made (`tracking.mirror`). Where none was, because the run
had other targets or because DVC had nothing to do, a run is made here, with such children, params, metrics and tags. The tags
given by WINNOW_TAGS, the git commit and the hash of dvc.lock tie it to its flow run, its code and its data.

The student that the comparison calls best becomes a version of the registered model `winnow`, with its weights as safetensors,
its signature and its metrics. (Best: see pipeline.report.choice.) It takes the alias `champion`, unless the version that has it
was measured on the same held-out images and this one is not surely better there; its tag `winnow.against` says so. Prints, as
JSON, the links to the run and to the version.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError
from pipeline.harness import credentials
from pipeline.harness.journal import DEFAULT_URI, experiment_name, given_tags, metrics_on_disk, tags_of_now
from pipeline.report import comparison
from pipeline.report.evaluation import Evaluation
from pipeline.store import artifact
from pipeline.tracking import logged
from pipeline.tracking.comparison import complete
from pipeline.tracking.experiment import Experiment

MODEL, CHAMPION = "winnow", "champion"
VARIANT = "winnow.variant"  # of a sweep in one flow run; given in WINNOW_TAGS
COMPARISON = "compare"  # the stage whose results name the best student
DATA = Path("data")


def records(stages: Sequence[str], data: Path = DATA) -> dict[str, dict[str, Any]]:
    """The records of the artifacts of `stages` (`distil.ssld`) and of all they were made from, by key."""
    by_key: dict[str, dict[str, Any]] = {}
    for name in stages:
        stage, _, entry = name.partition(".")
        for folder in sorted((data / stage).glob(entry or "*")):
            record = artifact.record(folder)
            if record and record["stage"] == stage and (record["entry"] or "") == entry:
                by_key |= record["lineage"]
                by_key[record["key"]] = {k: v for k, v in record.items() if k != "lineage"}
    return by_key


def summarise(experiment: Experiment, stages: Sequence[str], tags: Mapping[str, str]) -> str:
    """The id of the run of this run of the pipeline; made if no comparison made it."""
    flow_run = tags.get("prefect.flow_run_id")
    own = experiment.search("prefect.flow_run_id", flow_run) if flow_run else []
    for run in own:
        made_here = run.data.tags.get("winnow.stage") in (COMPARISON, "pipeline")
        same = run.data.tags.get(VARIANT) == tags.get(VARIANT)
        if made_here and same and run.info.status == "FINISHED" and "mlflow.parentRunId" not in run.data.tags:
            experiment.client.set_tag(run.info.run_id, "winnow.dvc_lock", lock_hash())
            return str(run.info.run_id)
    lineage, now = records(stages), time.time()
    name = tags.get("prefect.flow_run_name", "pipeline")
    all_tags = {"winnow.stage": "pipeline", "winnow.dvc_lock": lock_hash(), **tags_of_now(), **tags}
    run_id = experiment.create(name, now, all_tags)
    with tempfile.TemporaryDirectory() as folder:
        complete(experiment, run_id, lineage, {"time": now, "compared": metrics_on_disk(lineage)}, Path(folder) / "runs.json")
        experiment.client.log_artifacts(run_id, folder)
    experiment.client.set_terminated(run_id, "FINISHED")
    return run_id


def lock_hash() -> str:
    """The SHA-256 of dvc.lock, which names every input and output of every stage; empty where there is none."""
    lock = Path("dvc.lock")
    return hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else ""


class Best(NamedTuple):
    """An entry of `evaluate`, its model directory, its evaluation, and the identity of the held-out images."""

    name: str
    model: Path
    evaluation: Evaluation
    holdout: str


def best(data: Path = DATA) -> Best | None:
    """The entry that the comparison calls best.

    None without a comparison, where it has no candidate, and where the model or its evaluation was made anew since.
    """
    folder = data / COMPARISON / "results"
    if not folder.is_dir():
        return None
    compared = comparison.read(artifact.verify(folder))
    name = compared.best
    if name is None:
        return None
    evaluation = artifact.record(data / "evaluate" / name)
    measured = evaluation["inputs"]["model"]
    model = Path(measured["path"])
    is_compared = evaluation["key"] in artifact.record(folder)["lineage"]
    if not is_compared or not model.is_dir() or artifact.identity(model) != measured["identity"]:
        return None
    return Best(name, model, compared.entries[name], evaluation["inputs"]["holdout"]["identity"])


def register(experiment: Experiment, folder: Path, evaluation: Evaluation, tags: Mapping[str, str]) -> str:
    """Make the model directory `folder` a version, and the champion if none is better; returns the version.

    One that already is a version is not copied again. `tags`: of a new version; those that are measured on the same held-out
    images have the same `winnow.holdout`.
    """
    from mlflow.exceptions import MlflowException

    client = experiment.client
    record = artifact.record(folder)
    key = record["key"]
    known = [v for v in client.search_model_versions(f"name = '{MODEL}'") if v.tags.get("winnow.key") == key]
    if known:
        version = str(known[0].version)
    else:
        try:
            client.create_registered_model(MODEL, description="The best student of each comparison; see the alias `champion`.")
        except MlflowException:  # it is there
            client.get_registered_model(MODEL)
        run = next(iter(experiment.search("winnow.key", key)), None)
        metrics = {name: float(value) for name, value in evaluation.figures().items()}
        facts = {"winnow.key": key, "winnow.stage": record["stage"], "winnow.entry": record["entry"] or "", **tags}
        version = _new_version(experiment, folder, run.info.run_id if run else None, metrics, facts)
    champion = client.get_registered_model(MODEL).aliases.get(CHAMPION)
    if not _is_beaten(client.get_model_version(MODEL, version), champion, client):
        client.set_registered_model_alias(MODEL, CHAMPION, version)
    elif str(champion) != version:
        why = f"version {champion} stays: this one is not surely better on the same held-out images (95 % intervals)"
        client.set_model_version_tag(MODEL, version, "winnow.against", why)
    return version


def _is_beaten(new: Any, champion: str | None, client: Any) -> bool:
    """Whether the present champion was measured on the same held-out images, and `new` is not surely better there.

    A version carries no predictions, so that they cannot be paired: Wilson's intervals of the two must not overlap.
    """
    if champion is None:
        return False
    there = client.get_model_version(MODEL, champion).tags
    on_the_same = there.get("winnow.holdout") == new.tags.get("winnow.holdout")
    return on_the_same and float(there["holdout_top1_high"]) >= float(new.tags["holdout_top1_low"])


def _new_version(
    experiment: Experiment, folder: Path, run_id: str | None, metrics: Mapping[str, float], tags: Mapping[str, str]
) -> str:
    client = experiment.client
    model_id = logged.log(experiment, folder, MODEL, run_id, tags)
    if run_id is not None:
        for name, value in metrics.items():
            client.log_metric(run_id, f"champion.{name}", value, model_id=model_id)
    made = client.create_model_version(
        MODEL, f"models:/{model_id}", run_id=run_id, model_id=model_id, await_creation_for=0,
        tags={**tags, **{name: f"{value:.6g}" for name, value in metrics.items()}},
    )  # fmt: skip
    return str(made.version)


def links(experiment: Experiment, run_id: str, version: str | None) -> dict[str, str]:
    """Where to look: pages of the server, or those that `mlflow ui` on the database would show."""
    server = credentials.link(experiment.uri) if experiment.uri.startswith("http") else "http://127.0.0.1:5000"
    pages = {"run": f"{server}/#/experiments/{experiment.experiment_id}/runs/{run_id}"}
    if version is not None:
        is_champion = str(experiment.client.get_registered_model(MODEL).aliases.get(CHAMPION)) == version
        pages[CHAMPION if is_champion else "student"] = f"{server}/#/models/{MODEL}/versions/{version}"
    return pages


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.tracking.champion", description="The run of the pipeline, and its champion."
    )
    parser.add_argument("stages", nargs="*", help="such as `prepare` or `distil.ssld`")
    args = parser.parse_args()
    credentials.mask_output()
    tags = given_tags()
    experiment = Experiment(os.environ.get("MLFLOW_TRACKING_URI", DEFAULT_URI), experiment_name())
    try:
        run_id = summarise(experiment, args.stages, tags)
        champion = best()
        version = None
        if champion is not None:
            facts = {**tags, "winnow.evaluation": champion.name, "winnow.holdout": champion.holdout}
            version = register(experiment, champion.model, champion.evaluation, facts)
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(json.dumps(links(experiment, run_id, version)) + "\n")


if __name__ == "__main__":
    main()
