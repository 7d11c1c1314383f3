"""Train a model on labels, or bring in a published one: teachers, baselines, fine-tunes."""

from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt
from torch import Tensor, nn

from pipeline.harness import stage
from pipeline.learning import views
from pipeline.learning.loop import fit, optimisers
from pipeline.learning.loop.trained import Counts
from pipeline.models import device, inputs, network, prediction
from pipeline.store import artifact, manifest
from pipeline.store.params import Section


class Teach(Section):
    """`init`: `scratch`, or the model directory to start from (`teach/teacher`). `training: null` keeps the model as it comes.

    `exit`: of an `init` with several exits, where the model ends (null: at the deepest); with `training: null` that exit becomes
    a model directory of its own.

    `labels`: learn from so few labelled images, a number (50) or a share (0.01) of each class, drawn by the seed; `labels.txt` in
    the model directory names them, and the table counts them alone. `from_layer`: of a model from `pretrain`, after which layer
    of its projection head the classifier stands: 1 in SimCLRv2, 0 (on the encoder) where all labels are there.
    `note` stands below the table.
    """

    init: str
    model: network.Network | None = None
    exit: int | None = None
    view: views.View = views.View()
    training: optimisers.Training | None = None
    labels: manifest.Amount | None = None
    from_layer: NonNegativeInt | None = None
    note: str | None = None


def run(params: Teach, *, train: Path, holdout: Path, init: Path, out: Path, job: stage.Job) -> stage.Metrics:
    """Minimise the cross entropy of `train`'s labels, starting from `init`, and write the model directory `out`.

    The held-out images are measured ten times in a run, never trained on. Raises TrainingError, CheckpointError, ModelError.
    """
    labelled, held_out = manifest.read(train), manifest.read(holdout)
    known = len(labelled) + len(held_out)
    if params.labels is not None:
        labelled = manifest.balanced(labelled, params.labels, job.seed)
        known = len(labelled)
    on = device.pick(job.machine)
    model, description = network.start(params.model, init, labelled.classes, job.seed, params.exit, params.from_layer)
    input_spec = description.input
    check = prediction.checker(inputs.load(held_out, input_spec.side, job.machine, "holdout"), held_out.labels(), input_spec, on)
    if params.training is None:
        trained = fit.as_it_comes(on.place(model), check)
    else:
        labels, smoothing = torch.from_numpy(labelled.labels()), params.training.smoothing

        def cross_entropy(model: nn.Module, batch: views.Batch) -> Tensor:
            y = labels[batch.rows].to(on.device)  # N
            return F.cross_entropy(model(inputs.normalise(batch.views, input_spec)).float(), y, label_smoothing=smoothing)

        pixels = inputs.load(labelled, input_spec.side, job.machine, "train")
        viewer = views.viewer(input_spec.size, params.view, job.seed)
        trained = fit.fit(model, cross_entropy, pixels, viewer, params.training, check, job=job, device=on, label="training")
    with artifact.writing(out) as tmp:
        if params.labels is not None:
            (tmp / "labels.txt").write_text("".join(f"{name}\n" for name in labelled.table["id"].to_pylist()))
        return trained.save(tmp, description, Counts(len(labelled), known), params.note)


if __name__ == "__main__":
    stage.main(run, parallel=True)
