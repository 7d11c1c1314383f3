"""The tree of a comparison in MLflow: one child run for every stage it was made from."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.harness.journal import run_name
from pipeline.tracking.experiment import Experiment, milliseconds, shortened

TAG_LIMIT = 5000
Row = dict[str, Any]
"""A stage of a comparison: its name (`stage`), `status`, `seconds` (None where it was restored), `run_id`, `link` and `key`."""


def complete(experiment: Experiment, parent: str, lineage: Mapping[str, Any], end: Mapping[str, Any], table: Path) -> list[Row]:
    """Give a comparison one child run for every stage it was made from, all their params and metrics, and a table of them.

    Returns the table, which is also written to `table`.

    Executed: its run since the last comparison becomes the child. Unchanged: DVC had nothing to do; the child is a copy
    that names the run it stands for (winnow.source). Restored: no run is known, since DVC took the outcome from its cache
    or the database is new. The child is then made from the artifact's record and the metrics file.
    """
    children = {run.data.tags.get("winnow.key"): run for run in experiment.search("mlflow.parentRunId", parent)}
    names = Counter(run_name(record) for record in lineage.values())
    rows, all_params, all_metrics = list[Row](), dict[str, Any](), dict[str, float]()
    for key, record in sorted(lineage.items(), key=lambda item: run_name(item[1])):
        metrics = numbers_of(end.get("compared", {}).get(key, {}))
        child = children.get(key)
        if child is None or child.info.status != "FINISHED":
            child = _child(experiment, parent, record, metrics, end["time"], unfinished=child)
        name = run_name(record)
        if names[name] > 1:  # a stage was repeated, but not all that follow it: `dvc repro --single-item`
            name += f":{key[:8]}"
        all_params |= {f"{name}.{k}": v for k, v in params_of(record).items()}
        all_metrics |= {f"{name}.{k}": v for k, v in metrics.items()}
        link = f"#/experiments/{experiment.experiment_id}/runs/{child.info.run_id}"
        status = child.data.tags["winnow.status"]
        seconds = (child.info.end_time - child.info.start_time) / 1000 if status != "restored" else None
        rows.append({"stage": name, "status": status, "seconds": seconds, "run_id": child.info.run_id, "link": link, "key": key})
    experiment.log(parent, all_params, [(name, value, end["time"], 0) for name, value in all_metrics.items()])
    table.parent.mkdir(exist_ok=True)
    table.write_text(json.dumps(rows, indent=1) + "\n")
    experiment.client.set_tag(parent, "mlflow.note.content", _note(rows))
    return rows


def _note(rows: list[Row]) -> str:
    """What MLflow shows as the description of a comparison: its stages, with links to their runs."""
    counts = Counter(row["status"] for row in rows)
    summary = f"{len(rows)} stages: " + ", ".join(f"{counts[s]} {s}" for s in ("executed", "unchanged", "restored"))
    table = "".join(f"\n| [{row['stage']}]({row['link']}) | {row['status']} |" for row in rows)
    note = f"{summary}\n\n| stage | status |\n| --- | --- |{table}"
    return note if len(note) <= TAG_LIMIT else f"{summary}; runs.json lists them."


def _child(
    experiment: Experiment, parent: str, record: Mapping[str, Any], metrics: dict[str, float], now: float, unfinished: Any
) -> Any:
    """The run of a stage under a comparison; see `complete`. `unfinished`: a mirror was killed while it made it."""
    client, source = experiment.client, next(iter(originals(experiment, record["key"])), None)
    start = end = now
    tags = tags_of(record, "restored")
    if source is not None:
        if unfinished is None and "mlflow.parentRunId" not in source.data.tags:
            client.set_tag(source.info.run_id, "mlflow.parentRunId", parent)
            return source
        start, end = source.info.start_time / 1000, source.info.end_time / 1000
        tags = {**tags_of(record, "unchanged"), "winnow.source": source.info.run_id}
    tags["mlflow.parentRunId"] = parent
    run_id = unfinished.info.run_id if unfinished is not None else experiment.create(run_name(record), start, tags)
    known = metrics or (source.data.metrics if source else {})
    experiment.log(run_id, params_of(record), [(name, value, end, 0) for name, value in known.items()])
    client.set_terminated(run_id, "FINISHED", end_time=milliseconds(end))
    return client.get_run(run_id)


def originals(experiment: Experiment, key: str) -> list[Any]:
    """The finished runs of this key that are no copies, the newest first."""
    runs = experiment.search("winnow.key", key)
    return [r for r in runs if r.info.status == "FINISHED" and r.data.tags.get("winnow.status") != "unchanged"]


def tags_of(record: Mapping[str, Any], status: str) -> dict[str, str]:
    inputs = {name: {"path": i["path"], "identity": i["identity"]} for name, i in record["inputs"].items()}
    text = json.dumps(inputs)
    if len(text) > TAG_LIMIT:
        text = json.dumps({i["path"]: i["identity"][:12] for i in inputs.values()})
    return {
        "winnow.stage": record["stage"],
        **({"winnow.entry": record["entry"]} if record["entry"] else {}),
        "winnow.key": record["key"],
        "winnow.inputs": shortened(text, TAG_LIMIT),
        "winnow.status": status,
        "mlflow.source.name": " ".join(filter(None, (f"python -m pipeline.stages.{record['stage']}", record["entry"]))),
        "mlflow.source.type": "LOCAL",
    }


def params_of(record: Mapping[str, Any]) -> dict[str, Any]:
    seed = {"seed": record["seed"]} if "seed" in record else {}
    return {**_flat(record["params"]), **seed}


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow can take as a metric; metrics.json among the artifacts has the rest."""
    return {name: float(value) for name, value in _flat(metrics).items() if isinstance(value, int | float)}


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{inner}": v for inner, v in _flat(value).items()})
        else:
            flat[name] = value
    return flat
