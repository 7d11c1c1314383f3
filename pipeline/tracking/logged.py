"""A model directory as a logged model of MLflow: its weights as safetensors, what they need, and what goes in and out."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.store import artifact
from pipeline.tracking.experiment import Experiment


def is_there(folder: Path, given: Mapping[str, Any]) -> bool:
    """Whether `folder` still is the model directory of which a record says `given` (its identity)."""
    return (folder / "model.json").is_file() and artifact.identity(folder) == given["identity"]


def find(experiment: Experiment, name: str, key: str) -> str | None:
    """The id of the logged model `name` of the run with this `winnow.key`; None if there is none.

    One that a mirror, killed, left unfinished is removed."""
    client, wanted = experiment.client, f"tags.`winnow.key` = '{key}' AND name = '{name}'"
    found = None
    for model in client.search_logged_models([experiment.experiment_id], filter_string=wanted):
        if str(model.status) == "READY":
            found = str(model.model_id)
        else:
            client.delete_logged_model(model.model_id)
    return found


def log(experiment: Experiment, folder: Path, name: str, run_id: str | None, tags: Mapping[str, str]) -> str:
    """Make the model directory `folder` the logged model `name` of a run; returns its id. Raises UserError if it is damaged."""
    import mlflow
    from mlflow.models import Model

    from pipeline.models import checkpoint  # imports torch: seconds that only a new model takes

    mlflow.set_tracking_uri(experiment.uri)  # where the registry looks for a logged model, whatever client it was asked by
    client, description = experiment.client, checkpoint.describe(folder)
    model = client.create_logged_model(
        experiment.experiment_id, name=name, source_run_id=run_id, tags=dict(tags), params={"arch": description.arch}
    )
    with tempfile.TemporaryDirectory() as copy:
        for file in folder.iterdir():
            (Path(copy) / file.name).symlink_to(file.absolute())
        how_to_load = {"weights": checkpoint.WEIGHTS, "description": checkpoint.DESCRIPTION}
        takes = signature(description.classes, description.input.size)
        described = Model(artifact_path=name, signature=takes, flavors={"winnow": how_to_load}, model_id=model.model_id)
        described.save(str(Path(copy) / "MLmodel"))
        client.log_model_artifacts(model.model_id, copy)
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def signature(classes: Sequence[str], size: int) -> Any:
    """What a network takes and gives: (N, 3, size, size) float32, normalised as model.json says, and (N, C) float32 logits."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    pixels = TensorSpec(np.dtype(np.float32), (-1, 3, size, size), "pixels")
    logits = TensorSpec(np.dtype(np.float32), (-1, len(classes)), "logits")
    return ModelSignature(inputs=Schema([pixels]), outputs=Schema([logits]))
