"""Exits after the stages of a ResNet: one network, several classifiers (Zhang et al. 2019, "Be Your Own Teacher", section 3)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import UserError

OPTION = "exits"
"""The key of a model's options: `all` makes an `Exits`, a number the `Cut` at that exit; without it the network is ordinary."""


class ExitError(UserError):
    """No such exit, or a network that cannot have any."""


class Exited(NamedTuple):
    """What a batch gives at each exit, the shallowest first. `features` are what an exit pools; all have the deepest's shape."""

    logits: tuple[Tensor, ...]  # (B, C) each
    features: tuple[Tensor, ...]  # (B, F, H, W) each


class Shape(NamedTuple):
    """Of a stage's output, for an image of 64 pixels."""

    channels: int
    side: int


class Exits(nn.Module):
    """A ResNet `trunk` with an exit after each stage: (B, 3, S, S) -> `Exited`.

    The deepest exit is the trunk's own classifier. An exit before it brings its stage to the width and the resolution of the
    last one, by one bottleneck for each stage that it skips, and then classifies as the trunk does: pool, linear.
    """

    def __init__(self, trunk: nn.Module, classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        shapes = _shapes(trunk)
        self.branches = nn.ModuleDict({str(i): Branch(shapes[i - 1 :], classes) for i in range(1, len(shapes))})

    def __len__(self) -> int:
        return len(self.branches) + 1

    def forward(self, x: Tensor) -> Exited:
        x = _stem(self.trunk, x)
        logits, features = [], []
        *before, last = _stages(self.trunk)
        for stage, branch in zip(before, self.branches.values(), strict=True):
            x = stage(x)
            features.append(branch.bottlenecks(x))  # type: ignore[operator]  # B, F, H, W
            logits.append(branch.classify(features[-1]))  # type: ignore[operator]
        features.append(last(x))
        logits.append(self.trunk.forward_head(features[-1]))  # type: ignore[operator]
        return Exited(tuple(logits), tuple(features))


class Cut(nn.Module):
    """The part of an `Exits` that exit `number` needs: a smaller classifier (B, 3, S, S) -> (B, classes).

    Its parameters bear the names they have in the `Exits`. The deepest exit needs none of this: it is the trunk itself.
    """

    def __init__(self, trunk: nn.Module, classes: int, number: int) -> None:
        super().__init__()
        shapes = _shapes(trunk)
        if not 1 <= number < len(shapes):
            raise ExitError(f"`{OPTION}` is {number!r}: this network has the exits 1 to {len(shapes) - 1} before its own end.")
        names = list(dict(trunk.named_children()))
        for name in names[names.index(f"layer{number}") + 1 :]:
            delattr(trunk, name)
        self.trunk = trunk
        self.branches = nn.ModuleDict({str(number): Branch(shapes[number - 1 :], classes)})

    def forward(self, x: Tensor) -> Tensor:
        x = _stem(self.trunk, x)
        for stage in _stages(self.trunk):
            x = stage(x)
        (branch,) = self.branches.values()
        logits: Tensor = branch.classify(branch.bottlenecks(x))  # type: ignore[operator]
        return logits


class Stacked(nn.Module):
    """An `Exits` as inference wants it: (B, 3, S, S) -> (B, exits, classes) logits."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.whole(x).logits, 1)


class Branch(nn.Module):
    """An exit: `shapes` are those of its stage and of all after it."""

    def __init__(self, shapes: Sequence[Shape], classes: int) -> None:
        super().__init__()
        self.bottlenecks = nn.Sequential(*(bottleneck(a.channels, b.channels, a.side // b.side) for a, b in pairwise(shapes)))
        self.linear = nn.Linear(shapes[-1].channels, classes)

    def classify(self, features: Tensor) -> Tensor:
        """(B, F, H, W) -> (B, classes)."""
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


def bottleneck(channels: int, out: int, stride: int) -> nn.Sequential:
    """1x1 to a quarter of `out`, 3x3 with the stride, 1x1 to `out`; each followed by BN and ReLU."""
    middle = max(1, out // 4)
    convolutions = (
        nn.Conv2d(channels, middle, 1, bias=False),
        nn.Conv2d(middle, middle, 3, stride, 1, bias=False),
        nn.Conv2d(middle, out, 1, bias=False),
    )
    layers: list[nn.Module] = []
    for convolution in convolutions:
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers += [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()]
    return nn.Sequential(*layers)


def given(trunk: nn.Module, classes: int, option: Any) -> nn.Module:
    """`trunk` with the exits that the option asks for. Raises ExitError."""
    if option == "all":
        return Exits(trunk, classes)
    if isinstance(option, int) and not isinstance(option, bool):
        return Cut(trunk, classes, option)
    raise ExitError(f"`{OPTION}` is {option!r}: it must be `all` or the number of one exit.")


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the network without exits."""
    return {name: value for name, value in options.items() if name != OPTION}


def are_all(options: dict[str, Any]) -> bool:
    """Whether a network of these options is an `Exits`."""
    return options.get(OPTION) == "all"


def deepest(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the parameters of an `Exits`, those of its trunk, by the names they have there: an ordinary classifier."""
    return {name.removeprefix("trunk."): tensor for name, tensor in state.items() if name.startswith("trunk.")}


def count(state: dict[str, Tensor]) -> int:
    """How many exits the `Exits` of these parameters has."""
    return len({name.split(".")[1] for name in state if name.startswith("branches.")}) + 1


def _stem(trunk: nn.Module, x: Tensor) -> Tensor:
    """All that stands before the first stage."""
    for name, child in trunk.named_children():
        if name == "layer1":
            break
        x = child(x)
    return x


def _stages(trunk: nn.Module) -> list[nn.Module]:
    return [child for name, child in trunk.named_children() if name.startswith("layer")]


def _shapes(trunk: nn.Module) -> list[Shape]:
    """Of the stages' outputs. Raises ExitError for a network that is not built as timm builds ResNets."""
    names = [name for name, _ in trunk.named_children()]
    if "layer2" not in names or "conv1" not in names or not hasattr(trunk, "forward_head"):
        raise ExitError(
            f"{type(trunk).__name__} cannot have exits: they need a ResNet's stem and stages (conv1, ..., layer1, layer2, ...)."
        )
    was_training, shapes = trunk.training, []
    trunk.eval()  # batch normalisation learns nothing from the blank image
    with torch.no_grad():
        x = _stem(trunk, torch.zeros(1, 3, 64, 64))
        for stage in _stages(trunk):
            x = stage(x)
            shapes.append(Shape(x.shape[1], x.shape[-1]))
    trunk.train(was_training)
    return shapes
