"""From a manifest to tensors: square canvases, in memory or decoded on demand, and the views that models see."""

import copy
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal, Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from pipeline import manifest, progress
from pipeline.decode import ImageRefused, decode
from pipeline.params import Section

Views = Callable[[torch.Tensor, np.ndarray, np.ndarray], torch.Tensor]
"""From canvases, (B, 3, side, side) uint8 on the device, their (B,) row numbers and (B,) passes, to what the loss takes."""

cv2.setNumThreads(1)  # the callers' worker threads share the cores already


def canvas(image: np.ndarray, side: int) -> np.ndarray:
    """Resize the short side of (H, W, 3) uint8 to `side` and cut the central square: (side, side, 3)."""
    height, width = image.shape[:2]
    if (height, width) != (side, side):
        scale = side / min(height, width)
        to = (max(side, round(width * scale)), max(side, round(height * scale)))
        image = cv2.resize(image, to, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        image = image[top : top + side, left : left + side]
    return image


class Pixels(Protocol):
    """Decoded images by row number."""

    def __len__(self) -> int: ...

    def gather(self, rows: np.ndarray) -> torch.Tensor:
        """(B, 3, side, side) uint8 of the given rows, in that order."""
        ...


class InMemory:
    """All images decoded once: (N, side, side, 3) uint8, so that a batch is one gather in memory."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = torch.from_numpy(images)

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, rows: np.ndarray) -> torch.Tensor:
        return self.images[torch.from_numpy(rows)].permute(0, 3, 1, 2)  # N, C, H, W in channels_last memory


class OnDisk:
    """Images decoded when asked for, by threads (the decoders release the GIL)."""

    def __init__(self, images: manifest.Manifest, side: int, workers: int) -> None:
        self.manifest, self.side = images, side
        self.threads = ThreadPoolExecutor(workers)
        self.workers = workers

    def __len__(self) -> int:
        return len(self.manifest)

    def gather(self, rows: np.ndarray) -> torch.Tensor:
        parts = np.array_split(rows, min(self.workers, len(rows)))
        done = self.threads.map(lambda part: _decode_rows(self.manifest, part, self.side), parts)
        return torch.from_numpy(np.concatenate(list(done))).permute(0, 3, 1, 2)


def load(images: manifest.Manifest, side: int, workers: int, memory_gb: float, label: str) -> Pixels:
    """The images as square canvases of `side` pixels: in memory if they need at most `memory_gb`, else decoded on demand.

    Raises ManifestError or ImageRefused, naming the image, if one cannot be read any more.
    """
    if len(images) * side * side * 3 > memory_gb * 1e9:
        return OnDisk(images, side, workers)
    decoded = np.empty((len(images), side, side, 3), np.uint8)
    chunks = np.array_split(np.arange(len(images)), max(1, len(images) // 256))
    with ThreadPoolExecutor(workers) as threads, progress.bar(len(images), "images", f"{label}: decoding") as shown:
        for chunk, part in zip(chunks, threads.map(lambda c: _decode_rows(images, c, side), chunks), strict=True):
            decoded[chunk] = part
            shown.update(len(chunk))
    return InMemory(decoded)


def _decode_rows(images: manifest.Manifest, rows: np.ndarray, side: int) -> np.ndarray:
    batch = np.empty((len(rows), side, side, 3), np.uint8)
    for i, data in enumerate(manifest.image_bytes(images, rows)):
        try:
            batch[i] = canvas(decode(data), side)
        except ImageRefused as refusal:
            name = images.table["id"][int(rows[i])].as_py()
            raise ImageRefused(f"{name}: {refusal}. `prepare` let it pass: set `prepare.check: decode`.") from None
    return batch


def ahead(make: Callable[[int], torch.Tensor], steps: Sequence[int] | range, depth: int = 2) -> Iterator[torch.Tensor]:
    """`make(step)` for each step in order, prepared `depth` steps ahead by one thread."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(make, step) for step in steps[:depth])
        for step in steps[depth:]:
            ready = waiting.popleft().result()
            waiting.append(thread.submit(make, step))
            yield ready
        while waiting:
            yield waiting.popleft().result()


class Input(Section):
    """What a model takes: a square of `size` pixels, cut from canvases of `canvas` pixels (0: `size`), normalised per channel.

    `mean` and `std` are of RGB scaled to 0..1.
    """

    size: PositiveInt
    canvas: NonNegativeInt = 0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @property
    def side(self) -> int:
        return self.canvas or self.size


class View(Section):
    """How a training view is cut from a canvas, batched on the device.

    `shift`: up to `pad` pixels in each direction, reflected at the border (CIFAR's crop). `crop`: a square of `scale` of the
    area at a random place, resized (random resized crop without aspect change). `none`: the centre. `flip`: mirror half of the
    views. `brightness`, `contrast`, `saturation`: each scaled by 1 +- up to this much. `randaugment`: so many of its operations,
    one after the other, each drawn for each image (Cubuk et al. 2020), at `magnitude` (0..1).
    """

    kind: Literal["shift", "crop", "none"] = "shift"
    pad: NonNegativeInt = 4
    scale: tuple[float, float] = (0.35, 1.0)
    flip: bool = True
    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.0
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0
    saturation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    randaugment: NonNegativeInt = 0
    magnitude: Annotated[float, Field(ge=0, le=1)] = 0.3


class Mix(Section):
    """Mixing of the views of neighbours in a batch, which are shuffled, by a share from Beta(alpha, alpha): 0 is off.

    `mixup` (Zhang et al. 2018) blends two views, `cutmix` (Yun et al. 2019) pastes a rectangle of one into the other; with both,
    a coin is thrown for each pair. No label is mixed: a teacher looks at the mixed view.
    """

    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0

    def __bool__(self) -> bool:
        return bool(self.mixup or self.cutmix)


def normalise(batch: torch.Tensor, to: Input) -> torch.Tensor:
    """(B, 3, H, W) of 0..255 to a model's input: resized to its size if need be, centred and scaled per channel, float32."""
    batch = batch.float()
    if batch.shape[-1] != to.size:
        batch = F.interpolate(batch, (to.size, to.size), mode="bilinear", antialias=True, align_corners=False)
    mean, std = _statistics(to.mean, to.std, batch.device)
    return torch.addcmul(mean, batch, std)


@functools.lru_cache(maxsize=8)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    m, s = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    return (-m / s).view(1, 3, 1, 1), (1 / (255 * s)).view(1, 3, 1, 1)


def centre(batch: torch.Tensor, size: int) -> torch.Tensor:
    """The central square of `size` pixels."""
    edge = (batch.shape[-1] - size) // 2
    return batch[..., edge : edge + size, edge : edge + size]


class Draws:
    """Random numbers of images, each a function of (seed, pass, row, how many were drawn before) alone.

    The view of an image therefore does not depend on the batch, the process or the library version it is made in, and can be
    made again. A library's generators give streams, not values by key; the mixing is SplitMix64's (Steele et al. 2014).
    """

    def __init__(self, seed: int, passes: np.ndarray, rows: np.ndarray) -> None:
        """`passes` and `rows`: (B,) integers; `seed`: 0 or more."""
        key = _mixed(np.full(len(rows), seed, np.uint64))
        for part in (passes, rows):
            key = _mixed(key + _GOLDEN * (part.astype(np.uint64) + np.uint64(1)))
        self.key, self.drawn = key, 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """(B,) float32 in low..high on the CPU: the next draw of each image."""
        self.drawn += 1
        bits = _mixed(self.key + _GOLDEN * np.full(1, self.drawn, np.uint64))  # arrays wrap around; scalars warn
        return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32)) * (2**-24 * (high - low)) + low

    def integers(self, low: int, high: int) -> torch.Tensor:
        """(B,) int64 in low..high - 1 on the CPU: the next draw of each image."""
        return (self.uniform() * (high - low)).long().clamp_(max=high - low - 1) + low

    def of(self, part: slice) -> "Draws":
        """The draws to come of some of the images."""
        found = copy.copy(self)
        found.key = self.key[part]
        return found

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


def viewer(size: int, view: View, seed: int, mix: Mix | None = None) -> Views:
    """The views of an ordinary training: one of `size` pixels of each canvas, another one in each pass."""

    def views(raw: torch.Tensor, rows: np.ndarray, passes: np.ndarray) -> torch.Tensor:
        draws = Draws(seed, passes, rows)
        made = augment(raw, size, view, draws)
        return mixed(made, mix, draws) if mix else made

    return views


def augment(batch: torch.Tensor, size: int, view: View, draws: Draws) -> torch.Tensor:
    """One training view of each canvas: (B, 3, S, S) uint8 to (B, 3, size, size) of 0..255.

    The view is made before any model sees it, so teacher and student get the same pixels.
    """
    n, device = len(batch), batch.device
    flip = draws.uniform() < 0.5 if view.flip else torch.zeros(n, dtype=torch.bool)
    if view.kind == "crop":
        side = draws.uniform(*view.scale).sqrt()
        x, y = draws.uniform(-1, 1) * (1 - side), draws.uniform(-1, 1) * (1 - side)
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = torch.where(flip, -side, side), side
        theta[:, 0, 2], theta[:, 1, 2] = x, y
        grid = F.affine_grid(theta.to(device), [n, 3, size, size], align_corners=False)
        out = F.grid_sample(batch.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    else:
        out = _shifted(batch, size, view.pad if view.kind == "shift" else 0, flip.to(device), draws)
    if view.randaugment:
        out = _randaugment(out, view.randaugment, view.magnitude, draws)
    return _colour(out, view, draws)


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
