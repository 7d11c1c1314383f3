"""Images that the benchmark makes itself: photographs to decode, and small images that can be learned."""

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa

from pipeline.harness.machine import Machine
from pipeline.models import inputs
from pipeline.stages import pack
from pipeline.store import artifact, manifest

CLASSES = 10
LEARNED = inputs.Input(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def photograph(size: tuple[int, int], seed: int) -> np.ndarray:
    """(height, width, 3) uint8; `size`: (width, height). Noise at every scale, finer weaker, as in photographs: its JPEG is as
    large as theirs."""
    width, height = size
    random, out = np.random.default_rng(seed), np.full((height, width, 3), 128, np.float32)
    cell = max(size)
    while cell >= 2:
        coarse = random.normal(0, 8 * np.sqrt(cell / 8), (max(1, height // cell), max(1, width // cell), 3)).astype(np.float32)
        out += cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)
        cell //= 2
    return out.clip(0, 255).astype(np.uint8)


def packed(folder: Path, count: int, size: tuple[int, int], side: int) -> manifest.Manifest:
    """So many photographs in JPEG files, brought to tars by the stage `pack` at a short side of `side` pixels."""
    (folder / "files").mkdir(parents=True)

    def row(number: int) -> tuple[object, ...]:
        data = cv2.imencode(".jpg", photograph(size, number), [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        path = folder / "files" / f"{number:06}.jpg"
        path.write_bytes(data)
        return path.name, str(path), 0, len(data), *size, zlib.crc32(data), 0

    with ThreadPoolExecutor(Machine().cores(0)) as threads:
        rows = list(threads.map(row, range(count)))
    columns = dict(zip(manifest.SCHEMA.names, map(list, zip(*rows, strict=True)), strict=True))
    with artifact.writing(folder / "listed") as tmp:
        manifest.write(tmp, pa.table(columns).cast(manifest.SCHEMA), ("it",))
    wanted = pack.Pack(images="-", labelled=False, side=side)
    paths = {"chosen": folder / "listed", "train": folder / "listed", "out": folder / "packed", "tars_out": folder / "tars"}
    pack.run(wanted, **paths, workdir=folder / "workdir", machine=Machine())
    return manifest.read(folder / "packed")


def learnable(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 32, 32, 3) uint8 and (N,) int64 in 0..9: a pattern of each class under noise as smooth as the pattern, which hides
    some; so a perfect network errs, too, and accuracies can be compared."""
    patterns = np.random.default_rng(0).normal(0, 1, (CLASSES, 4, 4, 3))
    random = np.random.default_rng((1, seed))
    labels = random.integers(0, CLASSES, count)
    coarse = (0.5 * patterns[labels] + random.normal(0, 1, (count, 4, 4, 3))).astype(np.float32)
    images = np.stack([cv2.resize(one, (32, 32), interpolation=cv2.INTER_CUBIC) for one in coarse])
    images += random.normal(0, 0.3, images.shape).astype(np.float32)
    return (128 + 48 * images).clip(0, 255).astype(np.uint8), labels
