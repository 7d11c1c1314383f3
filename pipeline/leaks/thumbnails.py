"""Small copies of images for the gallery, in script files that a page on disk may load."""

import base64
import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg

from pipeline.harness import progress
from pipeline.leaks import features
from pipeline.leaks.decision import Image
from pipeline.leaks.features import Picture
from pipeline.store import manifest
from pipeline.store.decode import ImageRefused, decode
from pipeline.store.manifest import Manifest

IN_FILE = 64
SIDE, QUALITY = 192, 75  # pixels of the longest side at most, and JPEG


def write(
    folder: Path, images: Mapping[Image, int], sets: Mapping[str, Manifest], described: Collection[Image], workers: int
) -> dict[Image, Picture]:
    """Write thumbnails of `images`, IN_FILE a file, and return the features of those that are `described` and can be decoded.

    `images`: each with its row in the manifest of its set, in the order in which they are written.
    File n, `0000n.js`, calls `gallery.thumbnails(n, [...])` with the data URI of each image, or null where it cannot be decoded.
    Each image is decoded once, by one of `workers` threads; memory does not grow with their number.
    """
    folder.mkdir()
    order, found = list(images), dict[Image, Picture]()
    with ThreadPoolExecutor(workers) as pool, progress.bar(len(images), "images", "dedup: thumbnails for the gallery") as shown:
        for first in range(0, len(images), IN_FILE):
            part = order[first : first + IN_FILE]
            done = list(pool.map(_small, _read(part, sets, images), [image in described for image in part]))
            # One thread at a time: whether several may share OpenCV's SIFT, it does not say.
            found |= {image: features.extract(grey) for image, (_, grey) in zip(part, done, strict=True) if grey is not None}
            number = first // IN_FILE
            uris = [uri for uri, _ in done]
            (folder / f"{number:05}.js").write_text(f"gallery.thumbnails({number}, {json.dumps(uris, indent=0)});\n")
            shown.update(len(part))
    return found


def rows_of(images: Sequence[Image], sets: Mapping[str, Manifest]) -> dict[Image, int]:
    """The row of each image in the manifest of its set, in the order of `images`."""
    rows: dict[Image, int] = {}
    for name in {name for name, _ in images}:
        ids = sets[name].table["id"]
        there = pc.is_in(ids, pa.array([image for of, image in images if of == name], pa.string()))
        found = np.flatnonzero(there.to_numpy()).tolist()
        rows |= {(name, image): row for image, row in zip(ids.filter(there).to_pylist(), found, strict=True)}
    return {image: rows[image] for image in images}


def _read(images: Sequence[Image], sets: Mapping[str, Manifest], rows: Mapping[Image, int]) -> list[bytes]:
    """The encoded bytes of each image, read in the order in which they lie on the disk."""
    by_set: dict[str, list[Image]] = defaultdict(list)
    for image in sorted(images, key=lambda image: rows[image]):
        by_set[image[0]].append(image)
    data: dict[Image, bytes] = {}
    for name, those in by_set.items():
        data |= zip(those, manifest.image_bytes(sets[name], [rows[image] for image in those]), strict=True)
    return [data[image] for image in images]


def _small(data: bytes, described: bool) -> tuple[str | None, np.ndarray | None]:
    """The image as a data URI, and grey in the size at which features are computed if it is to be described."""
    try:
        pixels = decode(data)
    except ImageRefused:
        return None, None
    small = features.resize(pixels, SIDE) if max(pixels.shape[:2]) > SIDE else pixels
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(small), QUALITY, "RGB", "420")
    uri = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    return uri, features.resize(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), features.SIDE) if described else None
