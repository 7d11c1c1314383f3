"""Draw the built-in data set: labelled and validation scenes, and a pool that hides what a real pool hides.

The pool holds scenes of the labelled classes, scenes of other categories, re-encoded copies of validation images
(leaks) and files that are no image. Its member names and their order tell nothing; what is what stands in a truth
table that only tests, benchmarks and the report may read.
"""

import io
import itertools
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import cv2
import numpy as np
import pyarrow as pa
from pydantic import NonNegativeInt, PositiveInt, model_validator

from pipeline.harness import shards
from pipeline.scenes import scene
from pipeline.scenes.categories import CLASSES, OTHERS
from pipeline.store.params import Section

LABELLED, VAL, POOL, LEAK, BROKEN, ORDER = range(6)
"""Streams of randomness: an image's pixels follow from (seed, stream, number) alone, whoever draws it and when."""

BLOCK = 50
"""Labelled images of a class that are numbered in a row: more of each class leave the first ones as they are."""

SIZE = 96
"""Side of a scene in pixels."""

CHUNK = 64
"""Images that a worker draws at a time."""

TRUTH = pa.schema(
    [
        ("tar", pa.string()),
        ("member", pa.string()),
        ("kind", pa.string()),  # in_class | out_of_class | leak | broken
        ("category", pa.string()),  # what is drawn; null for a broken file
        ("label", pa.string()),  # the hidden class; null for what belongs to no class
        ("leak_of", pa.string()),  # member of val.tar
        ("transform", pa.string()),  # key of TRANSFORMS
        ("breakage", pa.string()),  # key of BREAKAGES
    ]
)


class Draw(Section):
    """How much to draw, in scenes of 96 pixels."""

    seed: NonNegativeInt
    """From which every scene follows."""
    labelled: PositiveInt = 50
    """Labelled images of each class, of which there are ten."""
    val: PositiveInt = 100
    """Validation images of each class."""
    in_class: PositiveInt = 3_000
    """Images of the pool that belong to a class."""
    out_of_class: PositiveInt = 5_000
    """Images of the pool that belong to none: at least half of it."""
    leaks: NonNegativeInt = 63
    """Images of the pool that are copies of validation images; at most as many as there are of these."""
    broken: NonNegativeInt = 18
    """Files of the pool that are no image."""
    members: PositiveInt = 4_096
    """Most members of one tar of the pool."""

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if 2 * self.out_of_class < self.in_class + self.out_of_class + self.leaks + self.broken:
            raise ValueError(f"out_of_class: {self.out_of_class} is less than half of the pool; raise it")
        if self.leaks > self.val * len(CLASSES):
            raise ValueError(f"leaks: {self.leaks} are more than the {self.val * len(CLASSES)} validation images")
        return self


class Scene(NamedTuple):
    """A scene in a JPEG file."""

    category: str
    stream: int
    number: int


class Leak(NamedTuple):
    """A picture of the validation set that was published once more, transformed."""

    of_member: str
    of: Scene
    transform: str
    number: int


class Broken(NamedTuple):
    """A file that is named like an image and is none."""

    breakage: str
    number: int


class File(NamedTuple):
    """A file to be drawn, and its place."""

    tar: str
    member: str
    content: Scene | Leak | Broken


# What is drawn where --------------------------------------------------------------------------------------------------


def pictures_of(stream: int, per_class: int) -> list[tuple[str, Scene]]:
    """Members of a labelled tar: (class/number, what it shows)."""
    block = BLOCK if stream == LABELLED else per_class
    places = itertools.product(enumerate(CLASSES), range(per_class))
    numbered = [(name, i, (i // block * len(CLASSES) + c) * block + i % block) for (c, name), i in places]
    return [(f"{name}/{i:04d}.jpg", Scene(name, stream, number)) for name, i, number in numbered]


def pool_contents(params: Draw) -> list[Scene | Leak | Broken]:
    """The contents of the pool, in an order that tells nothing."""
    rng = np.random.default_rng([params.seed, ORDER])
    categories = [CLASSES[i % len(CLASSES)] for i in range(params.in_class)]
    categories += [OTHERS[i % len(OTHERS)] for i in range(params.out_of_class)]
    contents: list[Scene | Leak | Broken] = [Scene(category, POOL, i) for i, category in enumerate(categories)]
    val, transforms, breakages = pictures_of(VAL, params.val), tuple(TRANSFORMS), tuple(BREAKAGES)
    for i, original in enumerate(rng.choice(len(val), params.leaks, replace=False)):
        member, picture = val[original]
        contents.append(Leak(member, picture, transforms[i % len(transforms)], i))
    contents += [Broken(breakages[i % len(breakages)], i) for i in range(params.broken)]
    return [contents[i] for i in rng.permutation(len(contents))]


def truth_row(file: File) -> dict[str, str | None]:
    """A row of `TRUTH`; what it leaves out is null."""
    row: dict[str, str | None] = {"tar": file.tar, "member": file.member}
    match file.content:
        case Scene(category) if category in CLASSES:
            return row | {"kind": "in_class", "category": category, "label": category}
        case Scene(category):
            return row | {"kind": "out_of_class", "category": category}
        case Leak(member, Scene(category), transform):
            return row | {
                "kind": "leak",
                "category": category,
                "label": category,
                "leak_of": member,
                "transform": transform,
            }
        case Broken(breakage):
            return row | {"kind": "broken", "breakage": breakage}


# Drawing --------------------------------------------------------------------------------------------------------------


def draw_all(files: Sequence[File], params: Draw, workers: int) -> Iterator[tuple[File, bytes]]:
    """Each file with its bytes, in the order given, however many processes draw."""
    make = partial(_bytes, seed=params.seed, size=SIZE)
    contents = [file.content for file in files]
    yield from zip(files, shards.in_order(make, contents, workers, CHUNK, partial(cv2.setNumThreads, 1)), strict=True)


def _bytes(content: Scene | Leak | Broken, *, seed: int, size: int) -> bytes:
    match content:
        case Scene(category, stream, number):
            rng = np.random.default_rng([seed, stream, number])
            return _jpeg(scene.draw(category, rng, size), int(rng.integers(75, 96)))
        case Leak(_, original, transform, number):
            rng = np.random.default_rng([seed, LEAK, number])
            image = _pixels(_bytes(original, seed=seed, size=size))
            quality = rng.integers(12, 40) if transform == "jpeg" else rng.integers(70, 96)
            return _jpeg(TRANSFORMS[transform](image, rng), int(quality))
        case Broken(breakage, number):
            rng = np.random.default_rng([seed, BROKEN, number])
            category = str(rng.choice(CLASSES))
            return BREAKAGES[breakage](_bytes(Scene(category, BROKEN, number), seed=seed, size=size), rng)


def _jpeg(image: np.ndarray, quality: int) -> bytes:
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return data.tobytes()


def _pixels(jpeg: bytes) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert image is not None
    return image


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """An uncompressed tar whose bytes depend on names and contents alone."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)  # modification time 0, owner 0
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


# How a validation image comes back: (image, rng) -> image, both uint8 (H, W, 3), still the same picture to the eye ----


def _crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    share = np.sqrt(rng.uniform(0.5, 0.85))
    height, width = (round(side * share) for side in image.shape[:2])
    top, left = rng.integers(image.shape[0] - height + 1), rng.integers(image.shape[1] - width + 1)
    return image[top : top + height, left : left + width]


def _resize(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    factor = rng.uniform(0.7, 0.85) if rng.random() < 0.5 else rng.uniform(1.2, 2)
    width = round(image.shape[1] * factor * rng.uniform(0.92, 1.08))
    height = round(image.shape[0] * factor)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)


def _unchanged(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image


def _rotation(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.4:
        return np.rot90(image, int(rng.integers(1, 4)))
    height, width = image.shape[:2]
    angle = rng.uniform(4, 15) * rng.choice([-1, 1])
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1.0)
    corners = rng.integers(0, 256, 3).tolist()
    return cv2.warpAffine(image, turn, (width, height), flags=cv2.INTER_CUBIC, borderValue=corners)


def _flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image[::-1] if rng.random() < 0.25 else image[:, ::-1]


def _brightness(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    gain = rng.uniform(0.5, 0.75) if rng.random() < 0.5 else rng.uniform(1.25, 1.6)
    return cv2.convertScaleAbs(image, alpha=gain, beta=rng.uniform(0, 20))


def _blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), rng.uniform(0.6, 1.3) * image.shape[0] / 96)


def _border(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    top, bottom, left, right = (round(image.shape[0] * share) for share in rng.uniform(0.04, 0.16, 4))
    colour = rng.integers(0, 256, 3).tolist()
    return cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=colour)


def _text(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    colour = rng.integers(0, 256, 3).tolist()
    written = image.copy()
    for line in rng.uniform(0.15, 0.95, rng.integers(1, 3)):
        words = "".join(rng.choice(list("abcdefghik lmnorstuvw"), 12))
        at = (round(width * rng.uniform(0, 0.3)), round(height * line))
        cv2.putText(written, words, at, cv2.FONT_HERSHEY_SIMPLEX, height / 96 * rng.uniform(0.3, 0.5), colour, 1, cv2.LINE_AA)
    return written


TRANSFORMS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "crop": _crop,
    "resize": _resize,
    "jpeg": _unchanged,  # its file is encoded at a low quality
    "rotation": _rotation,
    "flip": _flip,
    "brightness": _brightness,
    "blur": _blur,
    "border": _border,
    "text": _text,
}


# What else lies in a pool: (a good JPEG file, rng) -> a file that must be refused -------------------------------------


def _empty(jpeg: bytes, rng: np.random.Generator) -> bytes:
    return b""


def _truncated(jpeg: bytes, rng: np.random.Generator) -> bytes:
    return jpeg[: int(len(jpeg) * rng.uniform(0.3, 0.8))]


def _damaged(jpeg: bytes, rng: np.random.Generator) -> bytes:
    """A block in the middle was overwritten with the start of a JPEG: most decoders show garbage, and no error."""
    middle = int(len(jpeg) * rng.uniform(0.4, 0.7))
    return jpeg[:middle] + jpeg[:128] + jpeg[middle + 128 :]


def _plain_text(jpeg: bytes, rng: np.random.Generator) -> bytes:
    return f"image {rng.integers(10**9)} is no longer available\n".encode()


def _html(jpeg: bytes, rng: np.random.Generator) -> bytes:
    return f"<!DOCTYPE html><title>404</title><p>Not found: {rng.integers(10**9)}</p>\n".encode()


def _oversized(jpeg: bytes, rng: np.random.Generator) -> bytes:
    """A PNG of a few bytes whose header claims 60,000 x 60,000 pixels: 10 GB to whoever decodes it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    eight_bit_rgb = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(rng.bytes(64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", eight_bit_rgb) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BREAKAGES: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "empty": _empty,
    "truncated": _truncated,
    "damaged": _damaged,
    "plain_text": _plain_text,
    "html": _html,
    "oversized": _oversized,
}
