"""The network of the fastest published trainings on CIFAR-10 (Jordan 2024, arXiv 2404.00498, section 3)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models import precise

EPS = 5e-4  # added to the variance of a principal component, so that the least of them is not blown up to noise
SCALE = 1 / 9  # of the logits, as published: the features are maxima and large


class PatchStatistics(NamedTuple):
    """The sum of x x^T over 2x2 patches, (12, 12) float64, and their number."""

    products: Tensor
    patches: int


class Whitening(nn.Conv2d):
    """A 2x2 convolution (B, 3, S, S) -> (B, 24, S - 1, S - 1): the patches' principal components at unit variance, each with
    both signs. Its weights are never learned, its bias is.

    They are random until `whiten` takes them from images; the buffer `whitened` says which, and is stored with them.
    """

    whitened: Tensor

    def __init__(self) -> None:
        super().__init__(3, 24, 2)
        self.weight.requires_grad_(False)
        assert self.bias is not None
        nn.init.zeros_(self.bias)
        self.register_buffer("whitened", torch.zeros(1))

    def whiten(self, of: PatchStatistics) -> None:
        """Set the weights from the statistics of normalised images."""
        variances, directions = torch.linalg.eigh(of.products / of.patches)
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        components = (directions * largest.sign() / (variances + EPS).sqrt()).T.reshape(12, 3, 2, 2)  # a library picks the signs
        with torch.no_grad():
            self.weight.copy_(torch.cat([components, -components]))
            self.whitened.fill_(1)


def patch_statistics(images: Tensor) -> PatchStatistics:
    """Of all 2x2 patches of (B, 3, S, S) normalised images."""
    patches = F.unfold(images.double().cpu(), 2).transpose(1, 2).flatten(0, 1)  # B (S - 1)^2, 12
    return PatchStatistics(patches.T @ patches, len(patches))


def unwhitened(model: nn.Module) -> list[Whitening]:
    """The whitening layers of a network that have seen no image yet."""
    return [module for module in model.modules() if isinstance(module, Whitening) and not module.whitened]


class Airbench(nn.Module):
    """A classifier (B, 3, S, S) -> (B, classes) for images of some 32 pixels: whitened patches, then three groups of two 3x3
    convolutions, each of which halves the sides by pooling, the maximum over all positions, and a linear layer without bias.

    `widths`: channels of the groups; 64, 256, 256 as published for 94 %. Normalisation has no scale, forgets fast (momentum 0.4),
    and its shifts learn at a rate of their own (`training.bias_rate`). Convolutions start as the identity on the channels that
    they are given.
    """

    halves_by_pooling = True

    def __init__(self, classes: int, *, widths: Sequence[int] = (64, 256, 256)) -> None:
        super().__init__()
        if len(widths) != 3 or not all(isinstance(width, int) and width > 0 for width in widths):
            raise TypeError(f"widths are {widths!r}: they must be three positive numbers of channels")
        self.num_features, self.scale = widths[-1], SCALE if classes else 1.0
        self.conv1 = Whitening()
        self.act1 = nn.GELU()
        for i, (channels, out) in enumerate(pairwise((self.conv1.out_channels, *widths)), 1):
            self.add_module(f"layer{i}", Group(channels, out))
        self.linear = precise.Float32Linear(widths[-1], classes, bias=False) if classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, widths[2], S', S')."""
        x = self.act1(self.conv1(x))
        for name in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(name)(x)
        return x

    def forward_head(self, features: Tensor) -> Tensor:
        """(B, widths[2], S', S') -> (B, classes)."""
        logits: Tensor = self.linear(features.amax((2, 3)))
        return logits * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Group(nn.Module):
    """Convolution, pooling to half the sides, normalisation, GELU; convolution, normalisation, GELU."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(channels, out), _normalisation(out)
        self.conv2, self.bn2 = _convolution(out, out), _normalisation(out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.bn2(self.conv2(x)))


def _convolution(channels: int, out: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, out, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight[:channels])
    return convolution


def _normalisation(channels: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    layer.weight.requires_grad_(False)
    return layer
