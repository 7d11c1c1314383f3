"""What a network takes: square canvases of a manifest's images, in memory or decoded on demand, normalised."""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt

from pipeline.errors import UserError
from pipeline.harness import progress
from pipeline.harness.machine import Machine
from pipeline.store import manifest
from pipeline.store.decode import ImageRefused, decode
from pipeline.store.params import Section

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


def load(images: manifest.Manifest, side: int, machine: Machine, label: str) -> Pixels:
    """The images as square canvases of `side` pixels: in memory if `machine` lets them, else decoded on demand.

    `label` stands before the progress. Raises ManifestError or ImageRefused, naming the image, if one cannot be read any more.
    """
    workers = machine.cores(machine.workers)
    if len(images) * side * side * 3 > machine.memory_gb * 1e9:
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


class Wanted(Section):
    """What a network takes, as params say it: a square, cut from a square canvas, normalised per channel.

    What is left out is that of `pretrained` weights: another mean, std, or crop makes a bad classifier of them in silence.
    """

    size: PositiveInt
    """Side of the square, in pixels."""
    canvas: NonNegativeInt | None = None
    """Side of the canvases that views are cut from, in pixels; 0: `size`. null: 0, or with `pretrained` the weights' share."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from RGB scaled to 0..1. null: that of the `pretrained` weights, else ImageNet's."""
    std: tuple[float, float, float] | None = None
    """What RGB scaled to 0..1, less `mean`, is divided by. null: that of the `pretrained` weights, else ImageNet's."""

    def fitted(self, weights: "Input | None", whole: bool) -> "Input":
        """The input of a network that starts from published `weights` that take this one (None: from none).

        `whole`: with their classifier. Raises UserError where `mean` or `std` differ from the weights', or, if `whole`, `size` or
        `canvas`; to a new classifier the size is free, and the canvas grows with it.
        """
        said = self.model_dump(exclude_none=True)
        if weights is None:
            return Input(**said)
        canvas = round(self.size * weights.side / weights.size)
        theirs: dict[str, tuple[float, ...]] = {"mean": weights.mean, "std": weights.std}
        if whole:
            canvas = weights.side
            theirs |= {"size": (weights.size,), "canvas": (weights.side,)}
            if self.canvas == 0:
                said["canvas"] = self.size
        for name, values in theirs.items():
            mine = np.atleast_1d(said.get(name, values))
            if not np.allclose(mine, values, rtol=0, atol=1e-4):
                raise UserError(
                    f"`input.{name}` is {_plain(mine)}, but the pretrained weights take {_plain(values)}: "
                    + ("say that." if name == "size" else "leave it out (null) to take theirs.")
                )
        return Input(**{"canvas": canvas, **said, "mean": weights.mean, "std": weights.std})


def _plain(values: Sequence[float] | np.ndarray) -> str:
    return ", ".join(f"{value:g}" for value in values)


class Input(Wanted):
    """What a network takes, with nothing left out."""

    canvas: NonNegativeInt = 0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @property
    def side(self) -> int:
        return self.canvas or self.size


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
