"""Random resized crops of whole images (Szegedy et al. 2015), a batch at once, antialiased.

A canvas holds the whole image, squeezed into a square (`inputs.squeezed`). A crop is drawn in the image's own proportions, so
squeezing costs resolution along the longer side and nothing else.
"""

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

TRIES = 10  # of a box that fits into the image, as torchvision has it


class Uniform(Protocol):
    """Draws of (B,) numbers, one for each image."""

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor: ...


def boxes(draws: Uniform, aspects: Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> Tensor:
    """(B, 4): x, y, width, height of a crop in 0..1 of its image; `aspects`: (B,) width over height of the images.

    The area is uniform in `scale`, the aspect log-uniform in `ratio`, the place uniform. Where no try fits, the largest central
    box of an allowed aspect is taken. The distribution is torchvision's but for its rounding to pixels.
    """
    sizes = torch.zeros(len(aspects), 2)
    open_ = torch.ones(len(aspects), dtype=torch.bool)
    for _ in range(TRIES):
        area, wanted = draws.uniform(*scale), draws.uniform(*np.log(ratio)).exp()
        tried = torch.stack([(area * wanted / aspects).sqrt(), (area * aspects / wanted).sqrt()], 1)
        fits = open_ & (tried <= 1).all(1)
        sizes[fits], open_ = tried[fits], open_ & ~fits
    nearest = aspects.clamp(*ratio)
    fallback = torch.stack([(nearest / aspects).clamp(max=1), (aspects / nearest).clamp(max=1)], 1)
    sizes = torch.where(open_[:, None], fallback, sizes)
    places = torch.stack([draws.uniform(), draws.uniform()], 1)
    corners = torch.where(open_[:, None], 0.5, places) * (1 - sizes)
    return torch.cat([corners, sizes], 1)


def resampled(batch: Tensor, crops: Tensor, size: int, flip: Tensor) -> Tensor:
    """(B, 3, S, S) canvases -> (B, 3, size, size) float32: each crop, bilinear with antialiasing, mirrored where `flip` says so.

    `crops`: (B, 4) as from `boxes`. Two matrix products: output rows are weighted means of the crop's rows, columns of columns.
    """
    x, y, width, height = crops.to(batch.device).unbind(1)
    rows = _weights(y, height, batch.shape[-2], size)
    columns = _weights(x, width, batch.shape[-1], size)
    columns = torch.where(flip.to(batch.device)[:, None, None], columns.flip(1), columns)
    return rows[:, None] @ batch.float() @ columns.transpose(1, 2)[:, None]


def _weights(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """(B, size, pixels): how much each input pixel counts for each output pixel; pixels outside of the crop do not."""
    scale = (length * pixels / size)[:, None, None]  # input pixels for one output pixel
    wide = scale.clamp(min=1)  # the triangle grows with the scale: that is the antialiasing
    centres = (start * pixels)[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    at = torch.arange(pixels, device=start.device) + 0.5
    weights = (1 - (at - centres).abs() / wide).clamp(min=0)
    edge = 1e-3  # of a pixel: rounding must not lose the pixel at the edge
    first, last = (start * pixels)[:, None, None] - edge, ((start + length) * pixels)[:, None, None] + edge
    inside = weights * ((at > first) & (at < last))
    kept = torch.where(inside.sum(2, keepdim=True) > 0, inside, weights)  # a crop narrower than a pixel has none inside
    return kept / kept.sum(2, keepdim=True).clamp(min=math.ulp(1.0))
