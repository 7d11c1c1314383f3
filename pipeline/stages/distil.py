"""Train a student on a teacher's soft labels only (SSLD, arXiv 2103.05959, section 3)."""

from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor, nn

from pipeline.harness import ranks, stage
from pipeline.learning import losses, views
from pipeline.learning.loop import fit, group, optimisers
from pipeline.learning.loop.trained import Counts
from pipeline.learning.teachers import read
from pipeline.learning.views import Mix, View
from pipeline.models import device, inputs, network, prediction
from pipeline.store import artifact, manifest
from pipeline.store.params import MadeImages, MadeModel, MadeTeacher, Section

UNKNOWN = -1  # the label of an image that has none


class Distil(Section):
    """What the student starts from, whom it learns from, on which images, and how (SSLD, section 3)."""

    init: MadeModel
    """`scratch`, or the model directory to start from, or a checkpoint file."""
    teacher: MadeTeacher
    """Whom to learn from: a model directory, or `label/<entry>`, what a teacher said about the views kept there, which then are
    the views to learn on."""
    images: MadeImages
    """The images to learn on (a manifest: `select/top`)."""
    model: network.Network | None = None
    """The student, by its name in `models`; where `init` is a model directory, the network that it holds."""
    from_layer: NonNegativeInt | None = None
    """After which layer of the projection head the classifier stands, where `init` is from `pretrain`, as in `teach`."""
    labelled: bool = True
    """Add the labelled images, their labels unread, to `images`."""
    loss: losses.SoftLoss = losses.SoftLoss()
    """How far the student is from the teacher."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Below 1 adds hard labels, as SimCLRv2 does where there are many: alpha times the divergence on all images, and 1 - alpha
    times the cross entropy of the labelled ones (at the loss's temperature if below 1), both averaged over the batch."""
    labels: manifest.Amount | None = None
    """With `alpha` below 1: only so many of the labels, as in `teach`; null: all."""
    teacher_bn: Literal["eval", "batch"] = "eval"
    """The statistics that the teacher normalises with: its own, or those of each batch (as SSLD's published code has it). Its
    weights stay as they are either way."""
    view: View | None = None
    """How views are cut, by a name in `views`; with cached labels, as these were made."""
    mix: Mix = Mix()
    """Mixup and cutmix of the view that teacher and student share."""
    training: optimisers.Steps
    """How long and how fast, by a name in `trainings`."""

    @model_validator(mode="after")
    def _labels_are_there(self) -> "Distil":
        if self.alpha < 1 and not self.labelled:
            raise ValueError("`alpha` below 1 takes labels from the labelled images, which `labelled: false` leaves out")
        if self.alpha < 1 and self.mix:
            raise ValueError("`alpha` below 1 needs views with one label each, which `mix` does not leave")
        if self.alpha == 1 and self.labels is not None:
            raise ValueError("`labels` are read only where `alpha` is below 1")
        return self


def run(
    params: Distil,
    *,
    train: Path,
    holdout: Path,
    init: Path,
    teacher: Path,
    chosen: Path,
    out: Path,
    job: stage.Job,
) -> stage.Metrics:
    """Minimise a divergence between the teacher's and the student's class probabilities on the same view of each image.

    No label is read but the held-out ones, for the measurements, and those that `alpha` below 1 adds. Raises TrainingError,
    CheckpointError, ModelError.
    """
    seen, labelled, unlabelled = manifest.to_learn(chosen, train, params.labelled)
    held_out = manifest.read(holdout)
    on = device.pick(job.machine)
    student, description = network.start(params.model, init, labelled.classes, job.seed, from_layer=params.from_layer)
    description = network.trained_at(description, params.loss.read_at)
    input_spec, temperature = description.input, description.temperature
    taught_by = read(teacher, labelled.classes, seen, on, params.loss, params.teacher_bn)
    if params.teacher_bn == "batch" and ranks.size() > 1:
        for network_in_loop, _ in taught_by.networks:
            group.synchronise(network_in_loop)
    known = taught_by.training.get("labelled", 0)
    if params.alpha < 1:
        part = labelled if params.labels is None else manifest.balanced(labelled, params.labels, job.seed)
        hard = torch.from_numpy(part.labels_of(seen, UNKNOWN))
        known = max(known, len(part))

    def divergence(model: nn.Module, batch: views.Batch) -> Tensor:
        t = taught_by.answers(batch)
        s = model(inputs.normalise(batch.views, input_spec))
        value = params.loss(s, t)
        if params.alpha < 1:
            y = hard[batch.rows].to(on.device)  # B
            own = cross_entropy(s / temperature, y, params.training.smoothing)
            value = params.alpha * value + (1 - params.alpha) * own
        return value

    view = params.view or taught_by.view
    pixels = inputs.load(seen, taught_by.canvas(input_spec, view.whole), job.machine, "images", view.whole)
    network.whiten(student, pixels, input_spec, job.seed)
    viewer = taught_by.viewer(max(input_spec.size, taught_by.size), view, job.seed, inputs.aspects(seen), params.mix)
    measured_on = inputs.load(held_out, input_spec.side, job.machine, "holdout")
    check = prediction.checker(measured_on, held_out.labels(), input_spec, on, temperature)
    trained = fit.fit(student, divergence, pixels, viewer, params.training, check, job=job, device=on, label="distilling")
    counts = Counts(len(seen), known, unlabelled)
    note = taught_by.training.get("note")
    with artifact.writing(out) as tmp:
        return trained.save(tmp, description, counts, note, frozen=taught_by.networks)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """(N, C) logits, (N,) labels to smooth -> the sum over the images whose label is not UNKNOWN, divided by N."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=UNKNOWN, reduction="sum", label_smoothing=smoothing)
    return total / len(labels)


if __name__ == "__main__":
    stage.main(run, parallel=True)
