"""What a network takes: square canvases of a manifest's images, in memory or decoded on demand, normalised."""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Protocol, TypeVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt

from pipeline.errors import UserError
from pipeline.harness import progress, ranks, shared
from pipeline.harness.machine import Machine
from pipeline.store import manifest
from pipeline.store.decode import ImageRefused, decode
from pipeline.store.params import Section

T = TypeVar("T")
R = TypeVar("R")

cv2.setNumThreads(1)  # the callers' worker threads share the cores already


STRIP = 64
"""So many times as long as wide: of a longer image the ends, which no view shows, are cut off before it is resized."""


def canvas(image: np.ndarray, side: int) -> np.ndarray:
    """Resize the short side of (H, W, 3) uint8 to `side` and cut the central square: (side, side, 3)."""
    height, width = image.shape[:2]
    if max(height, width) > STRIP * min(height, width):
        image = _middle(image, STRIP * min(height, width))
        height, width = image.shape[:2]
    if (height, width) != (side, side):
        scale = side / min(height, width)
        to = (max(side, round(width * scale)), max(side, round(height * scale)))
        image = cv2.resize(image, to, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        image = image[top : top + side, left : left + side]
    return image


def _middle(image: np.ndarray, length: int) -> np.ndarray:
    """The middle of a strip, so many pixels long: all of one of 1 x 60,000 would take 9 GB at a side of 224."""
    height, width = image.shape[:2]
    top, left = max(0, (height - length) // 2), max(0, (width - length) // 2)
    return image[top : top + length, left : left + length]


def squeezed(image: np.ndarray, side: int) -> np.ndarray:
    """Resize all of (H, W, 3) uint8 to (side, side, 3), whatever its proportions: from it crops are cut."""
    height, width = image.shape[:2]
    if max(height, width) > side:  # shrink first: one call that shrinks one side and enlarges the other does not average
        to = (min(width, side), min(height, side))
        image = cv2.resize(image, to, interpolation=cv2.INTER_AREA)
    return image if image.shape[:2] == (side, side) else cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC)


def aspects(images: manifest.Manifest) -> np.ndarray:
    """(N,) float64, width over height."""
    width, height = (images.table[name].to_numpy() for name in ("width", "height"))
    return np.asarray(width / height)


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

    def __init__(self, images: manifest.Manifest, side: int, workers: int, whole: bool = False) -> None:
        self.manifest, self.side, self.whole = images, side, whole
        self.threads = ThreadPoolExecutor(workers)
        self.workers = workers

    def __len__(self) -> int:
        return len(self.manifest)

    def gather(self, rows: np.ndarray) -> torch.Tensor:
        parts = np.array_split(rows, min(self.workers, len(rows)))
        done = self.threads.map(lambda part: _decode_rows(self.manifest, part, self.side, self.whole), parts)
        return torch.from_numpy(np.concatenate(list(done))).permute(0, 3, 1, 2)


def load(images: manifest.Manifest, side: int, machine: Machine, label: str, whole: bool = False) -> Pixels:
    """Decode images to square canvases of `side` pixels: in memory if `machine` lets them, else on demand.

    The processes of a group on one machine decode a part each and share the memory; all of them have to call this. `whole`:
    canvases hold the whole image, squeezed, to cut crops from; otherwise its central square. `label` stands before the
    progress. Raises ManifestError or ImageRefused, naming the image, if one cannot be read any more.
    """
    workers = machine.cores(machine.workers)
    if len(images) * side * side * 3 > machine.memory_gb * 1e9:
        return OnDisk(images, side, workers, whole)
    shape = (len(images), side, side, 3)
    common = shared.Memory(math.prod(shape)) if shared.is_possible() else None
    turns = ranks.on_this_machine() if common is not None else 1
    chunks = np.array_split(np.arange(len(images)), max(turns, len(images) // 256))
    if common is not None:
        chunks = chunks[ranks.local_rank() :: turns]
    decoded = np.empty(shape, np.uint8) if common is None else np.frombuffer(common.bytes, np.uint8, common.size).reshape(shape)
    with ThreadPoolExecutor(workers) as threads, progress.bar(sum(map(len, chunks)), "images", f"{label}: decoding") as shown:
        for chunk, part in zip(chunks, threads.map(lambda c: _decode_rows(images, c, side, whole), chunks), strict=True):
            decoded[chunk] = part
            shown.update(len(chunk))
    if common is not None:
        common.meet()
    return InMemory(decoded)


def _decode_rows(images: manifest.Manifest, rows: np.ndarray, side: int, whole: bool) -> np.ndarray:
    canvas_of = squeezed if whole else canvas
    batch = np.empty((len(rows), side, side, 3), np.uint8)
    for i, data in enumerate(manifest.image_bytes(images, rows)):
        try:
            batch[i] = canvas_of(decode(data), side)
        except ImageRefused as refusal:
            name = images.table["id"][int(rows[i])].as_py()
            raise ImageRefused(f"{name}: {refusal}. `prepare` let it pass: set `prepare.check: decode`.") from None
    return batch


def ahead(make: Callable[[T], R], items: Iterable[T], threads: int = 1) -> Iterator[R]:
    """`make(item)` for each item in order, by threads; at most two items for each thread are taken ahead."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque[Future[R]]()
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Wanted(Section):
    """What a network takes, as params say it: a square of an image, normalised per channel.

    What is left out is that of `pretrained` weights: another mean, std, or crop makes a bad classifier of them in silence.
    """

    size: PositiveInt
    """Side of the square, in pixels."""
    crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """How much of an image's short side the central square covers, where no view of `kind: crop` is drawn. The short side is
    resized to `size` / `crop` pixels; timm calls it crop_pct. null: 1, or that of the `pretrained` weights."""
    canvas: NonNegativeInt = 0
    """Side, in pixels, to which whole images are squeezed before random crops are cut from them; at least `size` / `crop`. More
    keeps more detail of small crops, and takes more memory."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from RGB scaled to 0..1. null: that of the `pretrained` weights, else ImageNet's."""
    std: tuple[float, float, float] | None = None
    """What RGB scaled to 0..1, less `mean`, is divided by. null: that of the `pretrained` weights, else ImageNet's."""

    def fitted(self, weights: "Input | None", whole: bool) -> "Input":
        """The input of a network that starts from published `weights` that take this one (None: from none).

        `whole`: with their classifier. Raises UserError where `mean` or `std` differ from the weights', or, if `whole`, `size` or
        `crop`; to a new classifier the size is free.
        """
        said = self.model_dump(exclude_none=True)
        if weights is None:
            return Input(**said)
        theirs: dict[str, tuple[float, ...]] = {"mean": weights.mean, "std": weights.std}
        if whole:
            theirs |= {"size": (weights.size,), "crop": (weights.crop,)}
        for name, values in theirs.items():
            mine = np.atleast_1d(said.get(name, values))
            exact = 5e-3 if name == "crop" else 1e-4  # 224 / 0.9 is no whole number of pixels
            if not np.allclose(mine, values, rtol=0, atol=exact):
                raise UserError(
                    f"`input.{name}` is {_plain(mine)}, but the pretrained weights take {_plain(values)}: "
                    + ("say that." if name == "size" else "leave it out (null) to take theirs.")
                )
        return Input(**{**said, "crop": said.get("crop", weights.crop), "mean": weights.mean, "std": weights.std})


def _plain(values: Sequence[float] | np.ndarray) -> str:
    return ", ".join(f"{value:g}" for value in values)


class Input(Wanted):
    """What a network takes, with nothing left out."""

    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @property
    def side(self) -> int:
        """Pixels of the short side that the central square is cut from."""
        return round(self.size / self.crop)

    def canvas_of(self, whole: bool) -> int:
        """Side of the canvases that training views are cut from: of whole images, or of their central squares."""
        return max(self.canvas, self.side) if whole else self.side


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
