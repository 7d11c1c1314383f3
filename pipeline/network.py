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
    """An architecture of `models.create` with its options, its input, and whose weights it starts from.

    `pretrained`: the weights that timm or torchvision publish for `arch`. `source_classes`: what the classifier of such
    weights, or of a checkpoint file given as `init`, tells apart: the class names in its order, or `train` for the training
    set's in alphabetical order; null leaves that classifier behind and starts a new one.
    """

    arch: str
    input: images.Input
    options: dict[str, Any] = Field(default_factory=dict)
    pretrained: Literal["timm", "torchvision"] | None = None
    source_classes: Literal["train"] | tuple[str, ...] | None = None


def start(network: Network | None, init: Path, classes: tuple[str, ...], seed: int) -> tuple[nn.Module, Description]:
    """The network at the start of training, with a classifier in the order of `classes`.

    `init` is a model directory, which brings its own architecture; a checkpoint file for `network` (safetensors, or a .pth/.th
    that holds only tensors); or data/scratch. A classifier of other classes is left behind. Raises CheckpointError, ModelError
    or ArtifactError.
    """
    torch.manual_seed(seed)
    if init.is_dir():
        if network is not None:
            raise CheckpointError(f"`model` must be left out where training starts from {init}: that model is trained on.")
        found = checkpoint.describe(init)
        model = models.create(found.arch, len(classes), found.options)
        order = found.classes if set(found.classes) == set(classes) else None
        _take_over(model, checkpoint.weights(init), str(init), order, classes)
        return model, Description(found.arch, classes, found.input, found.options, found.training)
    if network is None:
        raise CheckpointError(f"`model` is required where `init` is not a model directory but {init}.")
    model = models.create(network.arch, len(classes), network.options)
    foreign = _foreign(network, init, classes)
    if foreign is not None:
        _take_over(
            model, foreign, str(init) if init.name != SCRATCH else str(network.pretrained), _order(network, classes), classes
        )
    return model, Description(network.arch, classes, network.input.model_dump(mode="json"), dict(network.options))


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


def _foreign(network: Network, init: Path, classes: tuple[str, ...]) -> dict[str, Tensor] | None:
    """The weights to start from that winnow has not written itself."""
    if init.name != SCRATCH:
        if network.pretrained is not None:
            raise CheckpointError(f"`pretrained` and `init` ({init}) both name weights to start from: leave one out.")
        return checkpoint.read_foreign(init)
    if network.pretrained == "timm":
        count = len(_order(network, classes) or classes)
        return models.create(network.arch, count, network.options, pretrained=True).state_dict()
    return models.torchvision_weights(network.arch) if network.pretrained else None


def _order(network: Network, classes: tuple[str, ...]) -> tuple[str, ...] | None:
    """The class names of the foreign classifier in its order; None where it is left behind."""
    if network.source_classes == "train":
        return tuple(sorted(classes))
    if network.source_classes is not None and set(network.source_classes) != set(classes):
        raise CheckpointError(
            f"`source_classes` are {_some(network.source_classes)}, the training images' {_some(classes)}. "
            "Leave them out to put a new classifier on these weights."
        )
    return network.source_classes


def _take_over(
    model: nn.Module, state: dict[str, Tensor], source: str, order: tuple[str, ...] | None, classes: tuple[str, ...]
) -> None:
    """Fill `model` from `state`, whose classifier has the rows `order` (None: left behind), brought to the order of `classes`."""
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
