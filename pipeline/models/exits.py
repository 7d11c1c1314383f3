"""Exits after the stages of a ResNet: one network, several classifiers (Zhang et al. 2019, "Be Your Own Teacher", section 3)."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models import precise

OPTION = "exits"
"""The key of a model's options: `all` makes an `Exits`, a number the `Cut` at that exit; without it the network is ordinary."""


class ExitError(UserError):
    """No such exit, or a network that cannot have any."""


class Exited(NamedTuple):
    """What a batch gives at each exit, the shallowest first. `features` are what an exit pools; all have the deepest's shape."""

    logits: tuple[Tensor, ...]  # (B, C) each
    features: tuple[Tensor, ...]  # (B, F, H, W) each


class Shape(NamedTuple):
    """The size of a stage's output, for an image of 64 pixels."""

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
        shapes, pools = _shapes(trunk), _pools(trunk)
        self.branches = nn.ModuleDict({str(i): Branch(shapes[i - 1 :], classes, pools) for i in range(1, len(shapes))})

    def __len__(self) -> int:
        return len(self.branches) + 1

    def forward(self, x: Tensor, last: int | None = None) -> Exited:
        """`last`: how many exits to compute (null: all)."""
        x = _stem(self.trunk, x)
        logits, features = [], []
        for number, stage in enumerate(_stages(self.trunk)[:last], 1):
            x = stage(x)
            s, f = self.at(number, x)
            logits.append(s)
            features.append(f)
        return Exited(tuple(logits), tuple(features))

    def at(self, number: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and features (B, F, H, W) of an exit, from the output of its stage."""
        if number == len(self):
            return self.trunk.forward_head(x), x  # type: ignore[operator]
        branch = self.branches[str(number)]
        features = branch.bottlenecks(x)  # type: ignore[operator]
        return branch.classify(features), features  # type: ignore[operator]


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
        self.branches = nn.ModuleDict({str(number): Branch(shapes[number - 1 :], classes, _pools(trunk))})

    def forward(self, x: Tensor) -> Tensor:
        x = _stem(self.trunk, x)
        for stage in _stages(self.trunk):
            x = stage(x)
        (branch,) = self.branches.values()
        logits: Tensor = branch.classify(branch.bottlenecks(x))  # type: ignore[operator]
        return logits


class Stacked(nn.Module):
    """The first `last` exits (null: all) as inference wants them: (B, 3, S, S) -> (B, exits, classes) logits."""

    def __init__(self, whole: nn.Module, last: int | None = None) -> None:
        super().__init__()
        self.whole, self.last = whole, last

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.whole(x, self.last).logits, 1)


class ExitEnsemble(nn.Module):
    """All exits as one classifier: (B, 3, S, S) -> (B, classes) logarithms of the mean of their probabilities."""

    def __init__(self, whole: Exits) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        return mean_probability(torch.stack(self.whole(x).logits, 1))


class Early(nn.Module):
    """A classifier (B, 3, S, S) -> (B, classes) that gives each image the first exit whose confidence reaches `threshold`.

    Later stages see only the images that are still in doubt. Confidence is the largest probability of an exit, 0..1.
    """

    def __init__(self, whole: Exits, threshold: float) -> None:
        super().__init__()
        self.whole, self.threshold = whole, threshold

    def forward(self, x: Tensor) -> Tensor:
        x = _stem(self.whole.trunk, x)
        doubtful = torch.arange(len(x), device=x.device)
        out: Tensor | None = None
        for number, stage in enumerate(_stages(self.whole.trunk), 1):
            x = stage(x)
            logits = self.whole.at(number, x)[0]
            out = logits if out is None else out.index_copy(0, doubtful, logits)
            left = logits.float().softmax(1).amax(1) < self.threshold
            x, doubtful = x[left], doubtful[left]
            if not len(doubtful):
                break
        assert out is not None
        return out


def mean_probability(logits: Tensor) -> Tensor:
    """(B, exits, C) -> (B, C): the logarithm of the exits' mean probability."""
    return logits.float().log_softmax(2).logsumexp(1) - math.log(logits.shape[1])


def leaving(logits: Tensor, threshold: float) -> Tensor:
    """(B, exits, C) -> (B,): the exit, 0 for the first, at which `Early` lets each image go."""
    sure = logits.float().softmax(2).amax(2) >= threshold
    sure[:, -1] = True
    return sure.int().argmax(1)


class Branch(nn.Module):
    """An exit: `shapes` are those of its stage and of all after it; `pools`: whether these halve sides by pooling."""

    def __init__(self, shapes: Sequence[Shape], classes: int, pools: bool = False) -> None:
        super().__init__()
        self.bottlenecks = nn.Sequential(
            *(bottleneck(a.channels, b.channels, a.side // b.side, pools) for a, b in pairwise(shapes))
        )
        self.linear = precise.Float32Linear(shapes[-1].channels, classes)

    def classify(self, features: Tensor) -> Tensor:
        """(B, F, H, W) -> (B, classes)."""
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


def bottleneck(channels: int, out: int, stride: int, pools: bool = False) -> nn.Sequential:
    """1x1 to a quarter of `out`, 3x3 with the stride, 1x1 to `out`; each followed by BN and ReLU.

    `pools`: the maximum of `stride` x `stride` places instead of the stride: of odd sides one rounds the half down, one up.
    """
    middle = max(1, out // 4)
    convolutions = (
        nn.Conv2d(channels, middle, 1, bias=False),
        nn.Conv2d(middle, middle, 3, 1 if pools else stride, 1, bias=False),
        nn.Conv2d(middle, out, 1, bias=False),
    )
    layers: list[nn.Module] = []
    for convolution in convolutions:
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers += [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()]
    if pools and stride > 1:
        layers.insert(4, nn.MaxPool2d(stride))
    return nn.Sequential(*layers)


def with_exits(trunk: nn.Module, classes: int, option: Any) -> nn.Module:
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
    """The parameters of the trunk of an `Exits`, by the names they have there: an ordinary classifier."""
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


def _pools(trunk: nn.Module) -> bool:
    return bool(getattr(trunk, "halves_by_pooling", False))


def _shapes(trunk: nn.Module) -> list[Shape]:
    """The shapes of the stages' outputs. Raises ExitError for a network that is not built as timm builds ResNets."""
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
