"""Train a network with exits that learn from its deepest one (Zhang et al. 2019, "Be Your Own Teacher", section 3)."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from pipeline.harness import stage
from pipeline.learning import losses, views
from pipeline.learning.loop import fit, optimisers
from pipeline.learning.loop.trained import Counts
from pipeline.learning.teachers import read
from pipeline.models import device, exits, inputs, network, prediction
from pipeline.models.exits import Exited
from pipeline.store import artifact, manifest
from pipeline.store.params import MadeImages, MadeModel, MadeTeacher, Section

LABELS = "labels"
"""The `teacher` of an entry that learns from labels; data/labels stands in dvc.yaml where a model directory would."""


class SelfDistil(Section):
    """What the network with exits starts from, whom its exits learn from, on which images, and how.

    `alpha` and `lambda` apply to the exits before the deepest. Both 0 is deep supervision, the control.
    """

    init: MadeModel
    """`scratch`, or the model directory to start from, or a checkpoint file."""
    teacher: MadeTeacher
    """`labels`: the paper's method, on labelled `images`. With a model directory or cached labels (see `distil`) the exits
    learn its soft labels by `loss` instead: a student of SSLD that also teaches itself."""
    images: MadeImages
    """The images to learn on (a manifest: `dedup/train`)."""
    model: network.Network | None = None
    """The network without exits, by its name in `models`; where `init` is a model directory, the one that it holds."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Weighs the deepest exit's probabilities against the labels. Published code has 0.1 and 0.3."""
    lambda_: NonNegativeFloat = Field(1e-4, alias="lambda")
    """Weighs the deepest exit's features: squared distances, summed over channels, averaged over positions and images. Published
    code has 1e-6 on pooled features, summed over a batch of 128: 1.28e-4 for the mean over a batch. Pooled features are never
    further apart than maps are by this average, and mostly much nearer."""
    temperature: Annotated[float, Field(gt=0)] = 3.0
    """T of the deepest exit's probabilities. Published code has 3."""
    labelled: bool = True
    """With a teacher: add the labelled images, their labels unread, to `images`."""
    loss: losses.SoftLoss = losses.SoftLoss()
    """With a teacher: how far an exit is from it."""
    view: views.View | None = None
    """How views are cut, by a name in `views`; with cached labels, as these were made."""
    training: optimisers.Steps
    """How long and how fast, by a name in `trainings`."""


Target = Callable[[Tensor], Tensor]
"""What an exit learns from outside: its (B, C) logits -> the mean over the batch of cross entropy or of a divergence."""


def run(
    params: SelfDistil,
    *,
    train: Path,
    holdout: Path,
    init: Path,
    teacher: Path,
    chosen: Path,
    out: Path,
    job: stage.Job,
) -> stage.Metrics:
    """Minimise, over exits i = 1..C, the sum of `objective`, and write the network with all its exits.

    Every stage that takes a model directory sees its deepest exit, an ordinary classifier, unless it names another.
    Raises TrainingError, CheckpointError, ModelError, ExitError; ManifestError if labels are needed and there are none.
    """
    from_labels = teacher.name == LABELS and teacher.is_file()  # a folder is an entry of that name
    seen, labelled, unlabelled = manifest.to_learn(chosen, train, params.labelled and not from_labels)
    held_out = manifest.read(holdout)
    on = device.pick(job.machine)
    student, description = network.start_exits(params.model, init, labelled.classes, job.seed)
    description = network.trained_at(description, 1 if from_labels else params.loss.read_at)
    input_spec, temperature = description.input, description.temperature
    aspects, size, frozen = inputs.aspects(seen), input_spec.size, list[tuple[nn.Module, int]]()
    if from_labels:
        labels, smoothing = torch.from_numpy(seen.labels()), params.training.smoothing
        origin: dict[str, Any] = {"labelled": len(seen)}
        view = params.view or views.View()
        side, viewer = input_spec.canvas_of(view.whole), views.viewer(size, view, job.seed, aspects)

        def target(batch: views.Batch) -> Target:
            y = labels[batch.rows].to(on.device)  # B
            return lambda s: F.cross_entropy(s.float(), y, label_smoothing=smoothing)
    else:
        taught_by = read(teacher, labelled.classes, seen, on, params.loss)
        view = params.view or taught_by.view
        side, frozen, origin = taught_by.canvas(input_spec, view.whole), taught_by.networks, taught_by.training
        viewer = taught_by.viewer(max(size, taught_by.size), view, job.seed, aspects)

        def target(batch: views.Batch) -> Target:
            t = taught_by.answers(batch)
            return lambda s: params.loss(s, t)

    def loss(model: nn.Module, batch: views.Batch) -> Tensor:
        exited = model(inputs.normalise(batch.views, input_spec))
        return objective(exited, target(batch), params.alpha, params.lambda_, params.temperature)

    pixels = inputs.load(seen, side, job.machine, "images", view.whole)
    network.whiten(student, pixels, input_spec, job.seed)
    measured_on = inputs.load(held_out, input_spec.side, job.machine, "holdout")
    check = checker(measured_on, held_out.labels(), input_spec, on, temperature)
    trained = fit.fit(student, loss, pixels, viewer, params.training, check, job=job, device=on, label="self-distilling")
    counts = Counts(len(seen), origin.get("labelled", 0), 0 if from_labels else unlabelled)
    note = origin.get("note")
    with artifact.writing(out) as tmp:
        return trained.save(tmp, description, counts, note, frozen=frozen)


def objective(exited: Exited, target: Target, alpha: float, lambda_: float, temperature: float) -> Tensor:
    """Sum over exits i of (1 - alpha) target(s_i) + alpha T^2 KL(q_C || q_i) + lambda ||F_i - F_C||^2.

    q = softmax(s / T) of an exit's logits, F its features before the pool, C the deepest exit. That one has neither of the last
    two terms, its first has the weight 1, and no gradient reaches it through those of the others. Each term is the mean over the
    batch of a sum over classes, or of a sum over channels that is averaged over the H x W positions, in float32.
    """
    *shallow, deepest = exited.logits
    *maps, deepest_map = (f.float() for f in exited.features)
    from_deepest = losses.SoftLoss(name="kl", temperature=temperature)
    total = target(deepest)
    for s, f in zip(shallow, maps, strict=True):
        total = total + (1 - alpha) * target(s)
        if alpha:
            total = total + alpha * from_deepest(s, deepest.detach())
        if lambda_:
            total = total + lambda_ * (f - deepest_map.detach()).square().sum(1).mean()
    return total


def checker(
    pixels: inputs.Pixels, labels: np.ndarray, input_spec: inputs.Input, on: device.Device, temperature: float = 1.0
) -> Callable[[nn.Module], dict[str, float]]:
    """A function that measures all exits: `top1` (0..1) and `nll` (nats) of the deepest, `top1_exit1` ... of those before it.

    `temperature`: at which their logits are probabilities.
    """
    wanted = torch.from_numpy(labels)

    def check(model: nn.Module) -> dict[str, float]:
        out = torch.cat([batch for _, batch in prediction.logits(exits.Stacked(model), pixels, input_spec, on)])  # N, exits, C
        right = (out.argmax(2) == wanted[:, None]).double().mean(0)
        *before, top1 = right.tolist()
        nll = float(F.cross_entropy(out[:, -1] / temperature, wanted))
        return {"top1": top1, "nll": nll, **{f"top1_exit{i}": share for i, share in enumerate(before, 1)}}

    return check


if __name__ == "__main__":
    stage.main(run, parallel=True)
