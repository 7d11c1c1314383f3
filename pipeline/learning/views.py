"""The views that training sees: cut from canvases, batched on the device, each a function of (seed, pass, row)."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor

from pipeline.learning import crops
from pipeline.store.params import Section

Views = Callable[[torch.Tensor, np.ndarray, np.ndarray], torch.Tensor]
"""From canvases, (B, 3, side, side) uint8 on the device, their (B,) row numbers and (B,) passes, to what the loss takes."""


class View(Section):
    """How a training view is cut from a canvas, batched on the device."""

    kind: Literal["shift", "crop", "none"] = "shift"
    """`shift`: moved by up to `pad` pixels (CIFAR's crop). `crop`: random resized crop of the whole image,
    antialiased, for photographs. `none`: the centre. All but `crop` see the central square of an image alone."""
    pad: NonNegativeInt = 4
    """The largest move of `shift` in each direction, in pixels, reflected at the border."""
    scale: tuple[float, float] = (0.35, 1.0)
    """The smallest and the largest share of the image's area that `crop` takes."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """The narrowest and the widest crop, width over height."""
    flip: bool | Literal["alternating"] = True
    """Mirror half of the views: by a coin each time, or `alternating`, each image in every other pass
    (Jordan 2024, section 3.6)."""
    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Scale it by 1 ± up to this much."""
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Scale it by 1 ± up to this much."""
    saturation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Scale it by 1 ± up to this much."""
    cutout: NonNegativeInt = 0
    """Side, in pixels, of a grey square around a random place (DeVries and Taylor 2017); 0: none."""
    randaugment: NonNegativeInt = 0
    """How many operations of RandAugment, one after the other, each drawn for each image (Cubuk et al. 2020); 0: none."""
    magnitude: Annotated[float, Field(ge=0, le=1)] = 0.3
    """How strong RandAugment's operations are: 0..1."""

    @property
    def whole(self) -> bool:
        """Whether views are cut from whole images, squeezed into their canvases, or from their central squares."""
        return self.kind == "crop"


class Mix(Section):
    """Mixing of the views of neighbours in a batch, which are shuffled. With both, a coin is thrown for each pair.

    No label is mixed: a teacher looks at the mixed view.
    """

    mixup: NonNegativeFloat = 0.0
    """alpha: blend two views, by a share from Beta(alpha, alpha) (Zhang et al. 2018); 0: off."""
    cutmix: NonNegativeFloat = 0.0
    """alpha: paste a rectangle of one view into the other, of a share of the area from Beta(alpha, alpha) (Yun et al. 2019); 0:
    off."""

    def __bool__(self) -> bool:
        return bool(self.mixup or self.cutmix)


class Draws:
    """Random numbers of images, each a function of (seed, pass, row, how many were drawn before) alone.

    The view of an image therefore does not depend on the batch, the process or (but for mixing and RandAugment) the library
    version it is made in, and can be made again. A library's generators give streams, not values by key; the mixing is
    SplitMix64's (Steele et al. 2014).
    """

    def __init__(self, seed: int, passes: np.ndarray, rows: np.ndarray) -> None:
        """`passes` and `rows`: (B,) integers; `seed`: 0 or more."""
        key = _mixed(np.full(len(rows), seed, np.uint64))
        for part in (passes, rows):
            key = _mixed(key + _GOLDEN * (part.astype(np.uint64) + np.uint64(1)))
        self.key, self.drawn = key, 0
        self.seed, self.passes, self.rows = seed, passes, rows

    def uniform(self, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """(B,) float32 in low..high on the CPU: the next draw of each image."""
        self.drawn += 1
        bits = _mixed(self.key + _GOLDEN * np.full(1, self.drawn, np.uint64))  # arrays wrap around; scalars warn
        return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32)) * (2**-24 * (high - low)) + low

    def integers(self, low: int, high: int) -> torch.Tensor:
        """(B,) int64 in low..high - 1 on the CPU: the next draw of each image."""
        return (self.uniform() * (high - low)).long().clamp_(max=high - low - 1) + low

    def alternates(self) -> torch.Tensor:
        """(B,) bool on the CPU: of each image another one in each pass than in the one before, by a coin in its first."""
        first = Draws(self.seed, np.zeros_like(self.passes), self.rows).uniform() < 0.5
        return first ^ torch.from_numpy(self.passes % 2 == 1)

    def of(self, part: slice) -> "Draws":
        """The draws to come of some of the images."""
        draws = copy.copy(self)
        draws.key, draws.passes, draws.rows = self.key[part], self.passes[part], self.rows[part]
        return draws

    def beta(self, alpha: float) -> torch.Tensor:
        """(B,) float32 from Beta(alpha, alpha) on the CPU: the next draw of each image."""
        self.drawn += 1
        seeds = _mixed(self.key + _GOLDEN * np.full(1, self.drawn, np.uint64))
        return torch.tensor([np.random.default_rng(seed).beta(alpha, alpha) for seed in seeds], dtype=torch.float32)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def viewer(size: int, view: View, seed: int, aspects: np.ndarray | None = None, mix: Mix | None = None) -> Views:
    """Make the views of an ordinary training: one of `size` pixels of each canvas, another one in each pass.

    `aspects`: (N,) width over height of all images, where canvases hold whole images (`View.whole`); None: they are square.
    """

    def views(raw: torch.Tensor, rows: np.ndarray, passes: np.ndarray) -> torch.Tensor:
        draws = Draws(seed, passes, rows)
        made = augment(raw, size, view, draws, None if aspects is None else torch.from_numpy(aspects[rows]).float())
        return mixed(made, mix, draws) if mix else made

    return views


def augment(batch: torch.Tensor, size: int, view: View, draws: Draws, aspects: torch.Tensor | None = None) -> torch.Tensor:
    """Make a training view of each canvas: (B, 3, S, S) uint8 to (B, 3, size, size) of 0..255.

    `aspects`: (B,) width over height of the images that the canvases were squeezed from; None: square.

    The view is made before any model sees it, so teacher and student get the same pixels.
    """
    n, device = len(batch), batch.device
    if view.flip == "alternating":
        flip = draws.alternates()
    else:
        flip = draws.uniform() < 0.5 if view.flip else torch.zeros(n, dtype=torch.bool)
    if view.kind == "crop":
        found = crops.boxes(draws, torch.ones(n) if aspects is None else aspects, view.scale, view.ratio)
        out = crops.resampled(batch, found, size, flip)
    else:
        out = _shifted(batch, size, view.pad if view.kind == "shift" else 0, flip.to(device), draws)
    if view.randaugment:
        out = _randaugment(out, view.randaugment, view.magnitude, draws)
    out = _colour(out, view, draws)
    return _cut_out(out, view.cutout, draws) if view.cutout else out


def mixed(views: torch.Tensor, mix: Mix, draws: Draws) -> torch.Tensor:
    """(B, 3, S, S) of 0..255, each view mixed with its neighbour's (0 with 1, 2 with 3, ...); an odd last one stays as it is."""
    n, side, device = len(views) // 2 * 2, views.shape[-1], views.device
    pairs = draws.of(slice(0, n, 2))
    blended, uncut = (pairs.beta(alpha) if alpha else pairs.uniform() for alpha in (mix.mixup, mix.cutmix))
    y, x, coin = pairs.uniform(0, side), pairs.uniform(0, side), pairs.uniform()

    def of_pairs(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(2)[:, None, None, None].to(device)

    first = views[:n].float()
    partner = first.view(-1, 2, *views.shape[1:]).flip(1).view_as(first)
    half = side * of_pairs((1 - uncut).sqrt()) / 2  # of the edge of the rectangle
    at = torch.arange(side, device=device)
    inside = ((at[:, None] + 0.5 - of_pairs(y)).abs() < half) & ((at + 0.5 - of_pairs(x)).abs() < half)
    share = of_pairs(blended)
    cut = of_pairs(coin) < 0.5 if mix.mixup and mix.cutmix else torch.tensor(bool(mix.cutmix), device=device)
    out = torch.where(cut, torch.where(inside, partner, first), share * first + (1 - share) * partner)
    return torch.cat([out, views[n:].float()])


def _randaugment(batch: torch.Tensor, rounds: int, magnitude: float, draws: Draws) -> torch.Tensor:
    """torchvision's operations and ranges, each applied at once to all images that drew it; its own draws one for a batch."""
    import torchvision.transforms.v2.functional as tv  # a second of import that other views need not pay

    def affine(x: torch.Tensor, angle: float = 0.0, right: float = 0.0, down: float = 0.0) -> torch.Tensor:
        return tv.affine(x, angle, [round(right), round(down)], 1.0, [0.0, 0.0], interpolation=tv.InterpolationMode.BILINEAR)

    def sheared(x: torch.Tensor, along_x: float = 0.0, along_y: float = 0.0) -> torch.Tensor:
        corner = [0.0, 0.0]  # from where AutoAugment shears
        bilinear = tv.InterpolationMode.BILINEAR
        return tv.affine(x, 0.0, [0, 0], 1.0, [along_x, along_y], interpolation=bilinear, center=corner)

    side, m = batch.shape[-1], magnitude
    degrees = math.degrees(math.atan(0.3 * m))
    operations: list[Callable[[torch.Tensor, float], torch.Tensor]] = [
        lambda x, sign: x,
        lambda x, sign: sheared(x, along_x=sign * degrees),
        lambda x, sign: sheared(x, along_y=sign * degrees),
        lambda x, sign: affine(x, right=sign * 150 / 331 * side * m),
        lambda x, sign: affine(x, down=sign * 150 / 331 * side * m),
        lambda x, sign: affine(x, angle=sign * 30 * m),
        lambda x, sign: tv.adjust_brightness(x, 1 + sign * 0.9 * m),
        lambda x, sign: tv.adjust_saturation(x, 1 + sign * 0.9 * m),
        lambda x, sign: tv.adjust_contrast(x, 1 + sign * 0.9 * m),
        lambda x, sign: tv.adjust_sharpness(x, 1 + sign * 0.9 * m),
        lambda x, sign: tv.posterize(x, 8 - round(4 * m)),
        lambda x, sign: tv.solarize(x, round(255 * (1 - m))),
        lambda x, sign: tv.autocontrast(x),
        lambda x, sign: tv.equalize(x),
    ]
    batch = batch.round().clamp(0, 255).to(torch.uint8) if batch.is_floating_point() else batch.clone()
    for _ in range(rounds):
        chosen, up = draws.integers(0, len(operations)), draws.uniform() < 0.5
        for number, operation in enumerate(operations):
            for sign, signed in ((1.0, up), (-1.0, ~up)):
                rows = ((chosen == number) & signed).nonzero()[:, 0].to(batch.device)
                if len(rows):
                    batch[rows] = operation(batch[rows], sign)
    return batch


def _shifted(batch: torch.Tensor, size: int, pad: int, flip: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Every shift as one gather of rows and columns, with the reflection and the flip in the index."""
    n, side = len(batch), batch.shape[-1]
    edge = (side - size) // 2
    shift = torch.stack([draws.integers(-pad, pad + 1) for _ in range(2)]) + edge  # 2, N
    index = (torch.arange(size) + shift[..., None]).to(batch.device)  # 2, N, size
    index = (side - 1 - (side - 1 - index).abs()).abs()  # reflect at 0 and at side - 1
    rows, columns = index[0], torch.where(flip[:, None], index[1].flip(1), index[1])
    lines = batch.permute(0, 2, 3, 1)  # N, H, W, C
    picked = lines[torch.arange(n, device=batch.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def _cut_out(batch: torch.Tensor, side: int, draws: Draws) -> torch.Tensor:
    """A square of `side` pixels, or what of it lies inside, in the middle grey."""
    height, width = batch.shape[2:]
    at = [draws.integers(0, n)[:, None] - side // 2 for n in (height, width)]
    y, x = ((torch.arange(n) >= a) & (torch.arange(n) < a + side) for n, a in zip((height, width), at, strict=True))
    return batch.float().masked_fill((y[:, :, None] & x[:, None, :])[:, None].to(batch.device), 127.5)


def _colour(batch: torch.Tensor, view: View, draws: Draws) -> torch.Tensor:
    """Brightness, contrast around the mean grey, saturation around the pixel's grey, each by its own factor per image."""
    if not (view.brightness or view.contrast or view.saturation):
        return batch
    batch = batch.float()

    def factor(strength: float) -> torch.Tensor:
        return draws.uniform(1 - strength, 1 + strength).view(-1, 1, 1, 1).to(batch.device)

    batch = batch * factor(view.brightness)
    luma = torch.tensor([0.299, 0.587, 0.114], device=batch.device).view(1, 3, 1, 1)
    grey = (batch * luma).sum(1, keepdim=True)
    batch = torch.lerp(grey, batch, factor(view.saturation))
    mean = (batch * luma).sum((1, 2, 3), keepdim=True) / batch[0, 0].numel()
    return torch.lerp(mean, batch, factor(view.contrast)).clamp_(0, 255)


@dataclass(frozen=True)
class Batch:
    """What a loss sees of one step."""

    views: Tensor  # what `views` made of the canvases; mostly (B, 3, size, size) of 0..255 on the device
    rows: np.ndarray  # (B,) row numbers
    passes: np.ndarray  # (B,) how many times each image was seen before
