"""A network as params describe it or as a model directory holds it: what training starts from and what inference loads."""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline import checkpoint, images, models
from pipeline.checkpoint import CheckpointError, Description
from pipeline.params import Section

SCRATCH = "scratch"


class Network(Section):
    """An architecture of `models.create` with its options, its input, and the weights it starts from.

    `checkpoint`: a file (safetensors, or a .pth/.th that holds only tensors), `timm` or `torchvision` (the published weights of
    `arch`); null: random weights. `checkpoint_classes`: the checkpoint's class names in its order, or `train` if they are the
    training set's in alphabetical order; null replaces its classifier layer by a new one.
    """

    arch: str
    input: images.Input
    options: dict[str, Any] = Field(default_factory=dict)
    checkpoint: str | None = None
    checkpoint_classes: Literal["train"] | tuple[str, ...] | None = None


def start(network: Network | None, init: Path, classes: tuple[str, ...], seed: int) -> tuple[nn.Module, Description]:
    """The network at the start of training: that of the model directory `init`, or, where `init` is data/scratch, `network`'s.

    The classifier has the order of `classes`. From a model of other classes everything but the classifier layer is taken over.
    Raises CheckpointError, ModelError or ArtifactError.
    """
    torch.manual_seed(seed)
    if init.is_dir():
        if network is not None:
            raise CheckpointError(f"`model` must be left out where training starts from {init}: that model is trained on.")
        found = checkpoint.describe(init)
        model = models.create(found.arch, len(classes), found.options)
        order = found.classes if set(found.classes) == set(classes) else None
        _take_over(model, checkpoint.weights(init), str(init), order, classes)
        return model, Description(found.arch, classes, found.input, found.options)
    if network is None:
        raise CheckpointError("`model` is required where `init` is scratch.")
    return _create(network, classes), Description(
        network.arch, classes, network.input.model_dump(mode="json"), dict(network.options)
    )


def load(folder: Path, classes: tuple[str, ...]) -> tuple[nn.Module, Description, images.Input]:
    """The trained network of a model directory. Raises CheckpointError if it does not tell `classes` apart, in that order."""
    found = checkpoint.describe(folder)
    if found.classes != classes:
        raise CheckpointError(
            f"{folder} knows the classes {_some(found.classes)}, the images the classes {_some(classes)}. "
            "A teacher and its student, a model and its validation images must have the same."
        )
    model = models.create(found.arch, len(classes), found.options)
    checkpoint.fill(model, checkpoint.weights(folder), str(folder))
    return model, found, images.Input.model_validate(found.input)


def _create(network: Network, classes: tuple[str, ...]) -> nn.Module:
    if network.checkpoint is None:
        return models.create(network.arch, len(classes), network.options)
    if network.checkpoint_classes == "train":
        order: tuple[str, ...] | None = classes
    else:
        order = network.checkpoint_classes
        if order is not None and set(order) != set(classes):
            raise CheckpointError(
                f"`checkpoint_classes` are {_some(order)}, the training images' {_some(classes)}. "
                "Leave them out to put a new classifier layer on the checkpoint."
            )
    if network.checkpoint == "timm":
        source = models.create(network.arch, len(order) if order else len(classes), network.options, pretrained=True)
        state = source.state_dict()
    elif network.checkpoint == "torchvision":
        state = models.torchvision_weights(network.arch)
    else:
        state = checkpoint.read_foreign(Path(network.checkpoint))
    model = models.create(network.arch, len(classes), network.options)
    _take_over(model, state, network.checkpoint, order, classes)
    return model


def _take_over(
    model: nn.Module, state: dict[str, Tensor], source: str, order: tuple[str, ...] | None, classes: tuple[str, ...]
) -> None:
    """Fill `model` from `state`, whose classifier has the rows `order` (None: it is left behind), put into the order of `classes`."""
    head = models.head_prefix(model)
    if order is None:
        checkpoint.fill(model, state, source, skip=(head,))
        return
    rows = torch.tensor([order.index(name) for name in classes])
    width = len(order)
    state = {k: v[rows] if k.startswith(head) and len(v) == width else v for k, v in state.items()}
    checkpoint.fill(model, state, source)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (f", ... ({len(names)})" if len(names) > 6 else "")
