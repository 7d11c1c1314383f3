"""A network as params describe it or as a model directory holds it: what training starts from and what inference loads."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.models import airbench, architectures, checkpoint, exits, inputs
from pipeline.models.checkpoint import CheckpointError, Description
from pipeline.store.params import Section

SCRATCH = "scratch"
WHITENED = 5000  # images


class Network(Section):
    """An architecture with its options, its input, and whose weights it starts from.

    Where training starts from a model directory, the directory must hold this network; its weights are taken then. The input's
    `size`, `crop` and `canvas` alone may differ: training goes on at another resolution (Touvron et al. 2019).
    """

    arch: str
    """`airbench`, `resnet8`, 14, 20, 32, 44, 56 or 110, `wrn28_2` and the like (for 32 px), `resnet18_3x3` and the like, or any
    name of timm."""
    input: inputs.Wanted
    """What it takes."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What the architecture takes: `airbench` `widths`, the small ResNets `width`, `shortcut` (A or B) and `stem_stride`, others
    timm's options."""
    pretrained: Literal["timm", "torchvision"] | None = None
    """Start from the weights that timm or torchvision publish for `arch`, with their mean, std and crop (see `input`).
    Images are made smaller by averaging areas, whichever interpolation the weights were measured with."""
    source_classes: Literal["train"] | tuple[str, ...] | None = None
    """What the classifier of such weights, or of a checkpoint file given as `init`, tells apart: the class names in its order,
    or `train` for the training set's in alphabetical order. null leaves that classifier behind and starts a new one."""


def start(
    network: Network | None,
    init: Path,
    classes: tuple[str, ...],
    seed: int,
    exit: int | None = None,
    from_layer: int | None = None,
) -> tuple[nn.Module, Description]:
    """The network at the start of training, with a classifier in the order of `classes`.

    `init` is a model directory, whose network `network` must be, but for the size, the crop and the canvas of its input (None:
    whatever it is); a checkpoint file for `network` (safetensors, or a .pth/.th that holds only tensors); or data/scratch. A
    classifier of other classes is left behind. Of a network with several exits the part up to `exit` is taken, by default the
    deepest. `from_layer`: after which layer of a pre-trained model's projection head the classifier stands, 0 for the encoder
    alone; it starts at zero. Logits stay as they are stored, at the temperature of the description. Raises CheckpointError,
    ModelError, ExitError or ArtifactError.
    """
    torch.manual_seed(seed)
    if init.is_dir():
        described = checkpoint.describe(init)
        if network is not None:
            _expect_network(network, described, init)
            described = replace(described, input=inputs.Input(**{**described.input.model_dump(), **_said(network)}))
        if described.projection is not None:
            return _on_projection(described, init, classes, from_layer)
        _refuse_layer(from_layer, init)
        description, state = _up_to(exit, described, checkpoint.weights(init), init)
        model = architectures.create(description.arch, len(classes), description.options)
        _take_over(model, state, str(init), _same(description, classes), classes)
        temperature = description.temperature if _same(description, classes) else 1.0
        _expect_size(model, description.input.size, init)
        return model, replace(description, classes=classes, temperature=temperature)
    _refuse_layer(from_layer, init)
    if network is None:
        raise CheckpointError(f"`model` is required where `init` is not a model directory but {init}.")
    if exit is not None:
        raise CheckpointError(f"`exit` is {exit}, but `init` ({init}) is not a model directory whose exits could be chosen from.")
    if exits.are_all(network.options):
        raise CheckpointError("`model.options.exits: all` is what `self_distil` adds by itself: leave it out.")
    model = architectures.create(network.arch, len(classes), network.options)
    foreign, published = _foreign(network, init, classes)
    order = _order(network, classes)
    if foreign is not None:
        _take_over(model, foreign, str(init) if init.name != SCRATCH else str(network.pretrained), order, classes)
    given = network.input.fitted(published, order is not None)
    return model, Description(network.arch, classes, given, dict(network.options))


def start_exits(network: Network | None, init: Path, classes: tuple[str, ...], seed: int) -> tuple[exits.Exits, Description]:
    """What `start` returns, with an exit after each stage; where the network has none yet, the new ones start at random.

    The trunk starts with the weights that `start` gives the plain network for the same seed.
    """
    trunk, description = start(network, init, classes, seed)
    if exits.OPTION in description.options:
        raise CheckpointError(
            f"`{exits.OPTION}: {description.options[exits.OPTION]}` is one exit of a network: self-distillation starts from "
            "a network without exits, or from one with all of them."
        )
    model = exits.Exits(trunk, len(classes))
    if init.is_dir():
        before = checkpoint.describe(init)
        if exits.are_all(before.options):
            _take_over(model, checkpoint.weights(init), str(init), _same(before, classes), classes)
    return model, replace(description, options={**description.options, exits.OPTION: "all"})


def whiten(model: nn.Module, pixels: inputs.Pixels, input_spec: inputs.Input, seed: int) -> None:
    """Give the layers of a new network that whiten patches (`airbench`) the statistics of up to `WHITENED` of the images.

    A network that has seen images keeps what it has, and one without such layers is left alone.
    """
    layers = airbench.unwhitened(model)
    if not layers:
        return
    rows = np.sort(np.random.default_rng(seed).permutation(len(pixels))[:WHITENED])

    def statistics(part: np.ndarray) -> airbench.PatchStatistics:
        canvases = pixels.gather(part)
        if canvases.shape[-1] == input_spec.side:
            canvases = inputs.centre(canvases, input_spec.size)
        return airbench.patch_statistics(inputs.normalise(canvases, input_spec))

    parts = [statistics(part) for part in np.array_split(rows, -(-len(rows) // 256))]
    whole = airbench.PatchStatistics(torch.stack([part.products for part in parts]).sum(0), sum(part.patches for part in parts))
    for layer in layers:
        layer.whiten(whole)


def load(folder: Path, classes: tuple[str, ...], exit: int | None = None) -> tuple[nn.Module, Description, inputs.Input]:
    """The trained network of a model directory as an ordinary classifier; of one with exits, up to `exit` (null: the deepest).

    Its logits and its description are at temperature 1, whatever it was trained at: their softmax is its probabilities.
    Raises CheckpointError if it does not tell `classes` apart, in that order; ExitError if it has no such exit.
    """
    description, state = _up_to(exit, _of(folder, classes), checkpoint.weights(folder), folder)
    model = architectures.create(description.arch, len(classes), description.options)
    checkpoint.fill(model, state, str(folder))
    _cool(model, description.temperature)
    return model, replace(description, temperature=1.0), description.input


def load_exits(folder: Path, classes: tuple[str, ...]) -> exits.Exits | None:
    """The trained network of a model directory with all its exits, at temperature 1; None if it has no exits."""
    description = _of(folder, classes)
    if not exits.are_all(description.options):
        return None
    model = architectures.create(description.arch, len(classes), description.options)
    assert isinstance(model, exits.Exits)
    checkpoint.fill(model, checkpoint.weights(folder), str(folder))
    _cool(model, description.temperature)
    return model


def trained_at(description: Description, temperature: float) -> Description:
    """The description of a network after training with a loss that reads its logits at `temperature`.

    Below 1 the target is nearly one class, and a network fits it with logits as small as the temperature: they are its
    probabilities there. Above 1 the logits match the teacher's own, so they are read at 1, as is the custom. Raises
    CheckpointError for an ensemble below 1: a mean of probabilities has no layer to divide.
    """
    temperature = min(1.0, temperature)
    if temperature < 1 and description.arch == architectures.ENSEMBLE:
        raise CheckpointError(f"`loss.temperature` is {temperature}, but an ensemble can only be trained at 1 or more.")
    return replace(description, temperature=temperature)


def _cool(model: nn.Module, temperature: float) -> None:
    """Divide all logits of a classifier by `temperature`, in the parameters of its last layers."""
    if temperature != 1:
        heads = architectures.heads(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(heads):
                    parameter.div_(temperature)


def _of(folder: Path, classes: tuple[str, ...]) -> Description:
    """The description of a model that tells `classes` apart."""
    description = checkpoint.describe(folder)
    if description.projection is not None:
        raise CheckpointError(
            f"{folder} was pre-trained without labels: it has a projection head but no classifier. Fine-tune it first, by a "
            "`teach` entry with this `init` and `from_layer`, and name that entry."
        )
    if description.classes != classes:
        raise CheckpointError(
            f"{folder} knows the classes {_some(description.classes)}, the images the classes {_some(classes)}. "
            "A teacher and its student, a model and its validation images must have the same."
        )
    return description


def _up_to(
    exit: int | None, description: Description, state: dict[str, Tensor], folder: Path
) -> tuple[Description, dict[str, Tensor]]:
    """The description and the parameters of the ordinary classifier that ends at `exit`."""
    if not exits.are_all(description.options):
        if exit is not None:
            raise exits.ExitError(f"`exit` is {exit}, but {folder} has no exits: they come with `self_distil`.")
        return description, state
    last = exits.count(state)
    if exit is None or exit == last:
        return replace(description, options=exits.plain(description.options)), exits.deepest(state)
    if not 1 <= exit < last:
        raise exits.ExitError(f"`exit` is {exit}, but {folder} has the exits 1 to {last}.")
    description = replace(description, options={**description.options, exits.OPTION: exit})
    wanted = architectures.create(description.arch, len(description.classes), description.options).state_dict()
    return description, {name: tensor for name, tensor in state.items() if name in wanted}


def _same(description: Description, classes: tuple[str, ...]) -> tuple[str, ...] | None:
    """The class names of a model's classifier in its order, if they are `classes`; None where it is left behind."""
    return description.classes if set(description.classes) == set(classes) else None


def _on_projection(
    description: Description, init: Path, classes: tuple[str, ...], from_layer: int | None
) -> tuple[nn.Module, Description]:
    """A zero classifier after layer `from_layer` of the projection head that `init` was pre-trained with."""
    assert description.projection is not None
    layers = description.projection["layers"]
    if from_layer is None or not 0 <= from_layer < layers:
        raise CheckpointError(
            f"{init} has a projection head of {layers} layers, and `from_layer` is {from_layer}: it must say after which of its "
            f"layers 0 to {layers - 1} the classifier stands (0: on the encoder; 1: SimCLRv2's choice for few labels)."
        )
    state = checkpoint.weights(init)
    if from_layer:
        options = {**description.options, "head_layers": from_layer}
        unused = tuple(f"head.{i}." for i in range(from_layer, layers))
        state = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
    else:
        options = dict(description.options)
        state = {n.removeprefix("encoder."): tensor for n, tensor in state.items() if n.startswith("encoder.")}
    model = architectures.create(description.arch, len(classes), options)
    checkpoint.fill(model, state, str(init), skip=architectures.heads(model))
    architectures.zero_classifier(model)
    return model, Description(description.arch, classes, description.input, options, description.training)


def _expect_network(wanted: Network, found: Description, init: Path) -> None:
    """Raises CheckpointError unless a model directory holds the network that params name, at whatever input size.

    What the stages add to its options (exits, layers of a projection head, the members of an ensemble) may be left out.
    """
    given = inputs.Input.model_validate(found.input)
    added = set(found.options) if found.arch == architectures.ENSEMBLE else {exits.OPTION, "head_layers"}
    own = {name: value for name, value in found.options.items() if name not in added}
    said = _said(wanted)
    if (
        wanted.arch != found.arch
        or wanted.options not in (own, found.options)
        or any(getattr(given, name) != said[name] for name in ("mean", "std") if name in said)
    ):
        theirs = f"{{arch: {found.arch}, options: {own}, input: {given.model_dump(mode='json')}}}"
        raise CheckpointError(
            f"`model` is another network than that of {init}, from which training starts: it is "
            f"{{arch: {wanted.arch}, options: {wanted.options}, input: {wanted.input.model_dump(mode='json')}}}, not {theirs}. "
            "Name the model that the directory was made with; only `size`, `crop` and `canvas` of the input may differ."
        )


def _said(wanted: Network) -> dict[str, Any]:
    """What params say of the input; what they leave out of a network from published weights came from the weights."""
    return wanted.input.model_dump(exclude_none=True) if wanted.pretrained else wanted.input.fitted(None, False).model_dump()


def _expect_size(model: nn.Module, size: int, init: Path) -> None:
    """Raises CheckpointError if a network cannot take squares of `size` pixels, such as a ViT made for another size."""
    try:
        architectures.macs(model, size)
    except (AssertionError, RuntimeError) as error:
        raise CheckpointError(
            f"the network of {init} takes no images of {size} pixels ({error}): give `input.size` as it was."
        ) from None


def _refuse_layer(from_layer: int | None, init: Path) -> None:
    if from_layer is not None:
        raise CheckpointError(
            f"`from_layer` is {from_layer}, a layer of a projection head, but {init} has none: leave it out, or start from a "
            "`pretrain` entry."
        )


def _foreign(network: Network, init: Path, classes: tuple[str, ...]) -> tuple[dict[str, Tensor] | None, inputs.Input | None]:
    """The weights to start from that winnow has not written itself, and the input that they were published with."""
    if init.name != SCRATCH:
        if network.pretrained is not None:
            raise CheckpointError(f"`pretrained` and `init` ({init}) both name weights to start from: leave one out.")
        return checkpoint.read_foreign(init), None
    if network.pretrained == "timm":
        count = len(_order(network, classes) or classes)
        model = architectures.create(network.arch, count, network.options, pretrained=True)
        return model.state_dict(), architectures.timm_input(model)
    if network.pretrained == "torchvision":
        return architectures.torchvision_weights(network.arch), architectures.torchvision_input(network.arch)
    return None, None


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
    heads = architectures.heads(model)
    if order is None:
        checkpoint.fill(model, state, source, skip=heads)
        return
    rows = torch.tensor([order.index(name) for name in classes])
    width = len(order)
    state = {k: v[rows] if k.startswith(heads) and len(v) == width else v for k, v in state.items()}
    checkpoint.fill(model, state, source)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (f", ... ({len(names)})" if len(names) > 6 else "")
