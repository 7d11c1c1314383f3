"""Stages that have run, as far as their journals tell."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.harness.journal import open_journal
from pipeline.tracking.experiment import Experiment
from pipeline.tracking.mirror import Mirror

FOLDER = Path(".scratch", "journal")


def open_store(project: Path) -> Experiment:
    return Experiment(f"sqlite:///{project}/mlflow.db", "winnow")


def record(name: str, version: str = "1", made_of: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    """What pipeline.harness.stage says about a run; another version has another key."""
    stage, _, entry = name.partition(".")
    lineage: dict[str, Any] = {}
    for r in made_of:
        lineage |= {**r["lineage"], r["key"]: {k: v for k, v in r.items() if k != "lineage"}}
    inputs = {r["stage"]: {"path": f"data/{r['stage']}/{r['entry']}", "identity": r["key"], "key": r["key"]} for r in made_of}
    key = hashlib.sha256((name + version).encode()).hexdigest()
    params = {"loss": {"name": "js", "T": 4.0}, "steps": 10, "init": None, "view": [0.5, 1.0]}
    return {
        "stage": stage,
        "entry": entry or None,
        "params": params,
        "inputs": inputs,
        "code": "c0de",
        "lineage": lineage,
        "seed": 3,
        "key": key,
    }


def execute(r: dict[str, Any], **metrics: Any) -> None:
    """A stage, as pipeline.harness.stage runs it: it writes its artifact and its metrics file, and keeps a journal."""
    kept = open_journal(r, FOLDER, gathers=r["stage"] == "compare")
    kept.log(step=1, loss=2.0)
    kept.log(step=2, loss=1.0)
    kept.finish("FINISHED", metrics, [write(r, metrics)])


def write(r: dict[str, Any], metrics: dict[str, Any]) -> Path:
    """The files of a stage, as it or DVC puts them there."""
    out = Path("data", r["stage"], r["entry"] or "out")
    out.mkdir(parents=True, exist_ok=True)
    (out / "record.json").write_text(json.dumps(r))
    (out.parent / f"{r['entry'] or 'metrics'}.json").write_text(json.dumps(metrics))
    return out


def send() -> None:
    mirror = Mirror(FOLDER)
    for _ in range(2):
        mirror.poll()


def runs(store: Experiment) -> list[Any]:
    found = store.client.search_runs([store.experiment_id], order_by=["attributes.start_time ASC"])
    return list(found)
