"""Train a model on labels, or bring in a published one: teachers, baselines, fine-tunes."""

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, NonNegativeInt
from torch import Tensor, nn

from pipeline.harness import stage
from pipeline.learning import views
from pipeline.learning.loop import fit, optimisers
from pipeline.learning.loop.trained import Counts
from pipeline.models import device, inputs, network, prediction
from pipeline.store import artifact, manifest
from pipeline.store.params import MadeModel, Section


def _if_any(training: optimisers.Training | None) -> optimisers.Training | None:
    return training if training and training.steps else None


class Teach(Section):
    """What the model starts from, and how it learns from labels."""

    init: MadeModel
    """`scratch`, or the model directory to start from (`teach/teacher`), or a checkpoint file (`raw/teachers/it.pth`)."""
    model: network.Network | None = None
    """The network, by its name in `models`; where `init` is a model directory, the one that it holds."""
    exit: int | None = None
    """Where an `init` with several exits ends; null: at the deepest. Without training that exit becomes a model directory of its
    own."""
    view: views.View = views.View()
    """How views are cut, by a name in `views`."""
    training: Annotated[optimisers.Training | None, AfterValidator(_if_any)] = None
    """How long and how fast, by a name in `trainings`; `steps: 0` keeps the model as it comes."""
    labels: manifest.Amount | None = None
    """Learn from so few labelled images, a number (50) or a share (0.01) of each class, drawn by the seed; null: all.
    `labels.txt` in the model directory names them."""
    from_layer: NonNegativeInt | None = None
    """After which layer of the projection head the classifier stands, where `init` is from `pretrain`: 1 in SimCLRv2, 0 (on the
    encoder) where all labels are there."""
    note: str | None = None
    """A remark that stands below the table."""


def run(params: Teach, *, train: Path, holdout: Path, init: Path, out: Path, job: stage.Job) -> stage.Metrics:
    """Minimise the cross entropy of `train`'s labels, starting from `init`, and write the model directory `out`.

    The held-out images are measured ten times in a run, never trained on. Raises TrainingError, CheckpointError, ModelError.
    """
    labelled, held_out = manifest.read(train), manifest.read(holdout)
    if params.labels is not None:
        labelled = manifest.balanced(labelled, params.labels, job.seed)
    on = device.pick(job.machine)
    model, description = network.start(params.model, init, labelled.classes, job.seed, params.exit, params.from_layer)
    if params.training is not None:
        description = network.trained_at(description, 1)
    input_spec, temperature = description.input, description.temperature
    measured_on = inputs.load(held_out, input_spec.side, job.machine, "holdout")
    check = prediction.checker(measured_on, held_out.labels(), input_spec, on, temperature)
    if params.training is None:
        trained = fit.as_it_comes(on.place(model), check)
    else:
        labels, smoothing = torch.from_numpy(labelled.labels()), params.training.smoothing

        def cross_entropy(model: nn.Module, batch: views.Batch) -> Tensor:
            y = labels[batch.rows].to(on.device)  # N
            return F.cross_entropy(model(inputs.normalise(batch.views, input_spec)).float(), y, label_smoothing=smoothing)

        whole = params.view.whole
        pixels = inputs.load(labelled, input_spec.canvas_of(whole), job.machine, "train", whole)
        viewer = views.viewer(input_spec.size, params.view, job.seed, inputs.aspects(labelled))
        network.whiten(model, pixels, input_spec, job.seed)
        trained = fit.fit(model, cross_entropy, pixels, viewer, params.training, check, job=job, device=on, label="training")
    with artifact.writing(out) as tmp:
        if params.labels is not None:
            (tmp / "labels.txt").write_text("".join(f"{name}\n" for name in labelled.table["id"].to_pylist()))
        return trained.save(tmp, description, Counts(len(labelled), 0 if params.training is None else len(labelled)), params.note)


if __name__ == "__main__":
    stage.main(run, parallel=True)
