"""Pre-train an encoder without labels: SimCLRv2's contrastive task (arXiv 2006.10029, section 2; SimCLR: 2002.05709)."""

from pathlib import Path
from typing import Annotated

import torch
import torch.distributed
import torch.distributed.nn.functional
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from pipeline.harness import stage
from pipeline.harness.machine import Machine
from pipeline.learning import views
from pipeline.learning.contrastive import Contrastive, Memory, TwoViews, nt_xent, two_views
from pipeline.learning.loop import fit, optimisers
from pipeline.models import architectures, checkpoint, device, inputs, network
from pipeline.report.probe import monitor
from pipeline.store import artifact, manifest
from pipeline.store.params import Made, Section

MONITORED = 10_000  # images that the k-nearest neighbours and the linear probe learn from, at most
NEIGHBOURS = 20


class Pretrain(Section):
    """What the encoder learns from, and how. The negatives of a view are those of its whole batch, on all processes."""

    images: Made
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


def run(
    params: Pretrain,
    *,
    train: Path,
    holdout: Path,
    chosen: Path,
    out: Path,
    seed: int,
    scratch: Path,
    journal: stage.Journal,
    machine: Machine,
) -> stage.Metrics:
    """Minimise NT-Xent between the views of each image; write the encoder with its projection head as the model directory `out`.

    No label trains anything: those of `train` and `holdout` serve the monitor alone, which says ten times in a run how well
    the k nearest neighbours and a linear probe on `train`'s features classify `holdout`. Raises TrainingError, ModelError.
    """
    seen, labelled, _ = manifest.to_learn(chosen, train, True)
    held_out = manifest.read(holdout)
    on = device.pick(machine)
    given = params.model.input
    torch.manual_seed(seed)
    encoder = _encoder(params.model)
    model = on.place(Contrastive(architectures.Projected(encoder, params.head_layers, params.head_out), params.memory))
    cores = machine.cores(machine.workers)

    def contrast(model: nn.Module, batch: views.Batch) -> Tensor:
        both = batch.views.transpose(0, 1).flatten(0, 1)  # 2B, 3, S, S
        projected, memory = model(inputs.normalise(both, given))
        return nt_xent(projected, params.temperature, memory)

    known = manifest.balanced(labelled, MONITORED / len(labelled), 0) if len(labelled) > MONITORED else labelled
    check = monitor(
        inputs.load(known, given.side, cores, machine.memory_gb, "monitor"),
        known.labels(),
        inputs.load(held_out, given.side, cores, machine.memory_gb, "holdout"),
        held_out.labels(),
        NEIGHBOURS,
        given,
        on,
    )
    model, history = fit.fit(
        model,
        contrast,
        inputs.load(seen, given.side, cores, machine.memory_gb, "images"),
        two_views(given.size, params.two_views, seed),
        params.training,
        seed=seed,
        device=on,
        scratch=scratch,
        journal=journal,
        label="pre-training",
        check=check,
        checkpoint_minutes=machine.checkpoint_minutes,
    )
    assert isinstance(model, Contrastive)
    cost = 2 * architectures.macs_of_training(model.projected, given.size)
    if model.memory is not None:
        cost += architectures.macs(model.memory.average, given.size)
    description = checkpoint.Description(
        params.model.arch,
        (),
        given.model_dump(mode="json"),
        dict(params.model.options),
        projection={"layers": params.head_layers, "out": params.head_out},
    ).trained(params.training.steps, params.training.batch, 0, len(seen), None, macs=cost)
    with artifact.writing(out) as tmp:
        checkpoint.save(tmp, model.projected, description, history)
    facts = {"steps": params.training.steps, "images": len(seen), "parameters": architectures.parameters_of(model)}
    return facts | fit.final(history)


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
