"""Pre-train an encoder without labels: SimCLRv2's contrastive task (arXiv 2006.10029, section 2; SimCLR: 2002.05709)."""

from pathlib import Path
from typing import Annotated

import torch
import torch.distributed
import torch.distributed.nn.functional
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from pipeline.harness import stage
from pipeline.learning import views
from pipeline.learning.contrastive import Contrastive, Memory, TwoViews, nt_xent, two_views
from pipeline.learning.loop import fit, optimisers
from pipeline.learning.loop.trained import Counts
from pipeline.models import architectures, checkpoint, device, inputs, network
from pipeline.report.probe import monitor
from pipeline.store import artifact, manifest
from pipeline.store.params import MadeImages, Section

MONITORED = 10_000  # images that the k-nearest neighbours and the linear probe learn from, at most
NEIGHBOURS = 20


class Pretrain(Section):
    """What the encoder learns from, and how. The negatives of a view are those of its whole batch, on all processes."""

    images: MadeImages
    """The images to learn from (a manifest: `dedup/pool`); the labelled ones are added, their labels unread."""
    model: network.Network
    """The encoder, by its name in `models`."""
    two_views: TwoViews = TwoViews()
    """How the two views of an image are drawn."""
    head_layers: Annotated[int, Field(ge=2, le=3)] = 3
    """Layers of the projection head: 3 in SimCLRv2, 2 in SimCLR."""
    head_out: PositiveInt = 128
    """Outputs of the projection head."""
    temperature: PositiveFloat = 0.1
    """The temperature of NT-Xent: 0.1 for ImageNet, 0.5 for CIFAR."""
    memory: Memory | None = None
    """Further negatives of every view; null: none."""
    training: optimisers.Steps
    """How long and how fast, by a name in `trainings`; with `accumulate` the negatives are those of a piece of the batch."""


def run(params: Pretrain, *, train: Path, holdout: Path, chosen: Path, out: Path, job: stage.Job) -> stage.Metrics:
    """Minimise NT-Xent between the views of each image; write the encoder with its projection head as the model directory `out`.

    No label trains anything: those of `train` and `holdout` serve the monitor alone, which says ten times in a run how well
    the k nearest neighbours and a linear probe on `train`'s features classify `holdout`. Raises TrainingError, ModelError.
    """
    seen, labelled, _ = manifest.to_learn(chosen, train, True)
    held_out = manifest.read(holdout)
    on = device.pick(job.machine)
    torch.manual_seed(job.seed)
    plain = _encoder(params.model)
    input_spec = params.model.input.fitted(architectures.timm_input(plain) if params.model.pretrained else None, False)
    encoder = architectures.Projected(plain, params.head_layers, params.head_out)
    model = Contrastive(encoder, params.memory, params.training.accumulate)

    def contrast(model: nn.Module, batch: views.Batch) -> Tensor:
        both = batch.views.transpose(0, 1).flatten(0, 1)  # 2B, 3, S, S
        projected, memory = model(inputs.normalise(both, input_spec))
        return nt_xent(projected, params.temperature, memory)

    known = manifest.balanced(labelled, MONITORED / len(labelled), 0) if len(labelled) > MONITORED else labelled
    check = monitor(
        inputs.load(known, input_spec.side, job.machine, "monitor"),
        known.labels(),
        inputs.load(held_out, input_spec.side, job.machine, "holdout"),
        held_out.labels(),
        NEIGHBOURS,
        input_spec,
        on,
    )
    pixels = inputs.load(seen, input_spec.canvas_of(True), job.machine, "images", whole=True)
    network.whiten(model, pixels, input_spec, job.seed)
    viewer = two_views(input_spec.size, params.two_views, job.seed, inputs.aspects(seen))
    trained = fit.fit(model, contrast, pixels, viewer, params.training, check, job=job, device=on, label="pre-training")
    assert isinstance(trained.model, Contrastive)
    projected, memory = trained.model.projected, trained.model.memory
    cost = 2 * architectures.macs_of_training(projected, input_spec.size)
    if memory is not None:
        cost += architectures.macs(memory.average, input_spec.size)
    head = {"layers": params.head_layers, "out": params.head_out}
    description = checkpoint.Description(params.model.arch, (), input_spec, dict(params.model.options), projection=head)
    counts = Counts(len(seen), 0, len(seen))
    with artifact.writing(out) as tmp:
        return trained.save(tmp, description, counts, None, macs=cost, part=projected)


def _encoder(wanted: network.Network) -> nn.Module:
    if wanted.pretrained == "torchvision" or wanted.source_classes is not None:
        raise architectures.ModelError(
            "an encoder of `pretrain` starts at random or from `pretrained: timm`, without `source_classes`."
        )
    if added := {"exits", "head_layers"} & set(wanted.options):
        raise architectures.ModelError(f"`{added.pop()}` is no option of an encoder: leave it out of `pretrain`.")
    return architectures.create(wanted.arch, 0, wanted.options, wanted.pretrained == "timm")


if __name__ == "__main__":
    stage.main(run, parallel=True)
