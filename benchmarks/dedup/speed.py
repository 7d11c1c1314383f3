"""Cost of the leak check per pool image, as a share of decoding and bare SIFT extraction of the same images in the same run."""

import resource
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from pipeline.harness import progress
from pipeline.leaks import features, search
from pipeline.leaks.index import EXACT, VotingIndex
from pipeline.store.decode import decode

ROUNDS = 3
PART = 250_000  # features entered at a time


class Made(NamedTuple):
    """A reference of made-up images: row i shows picture i modulo the number of real ones."""

    pictures: list[features.Picture]

    def __getitem__(self, row: int) -> features.Picture:  # type: ignore[override]
        return self.pictures[row % len(self.pictures)]


def bags(pictures: list[features.Picture], images: int, per_image: int, seed: int) -> Iterator[features.Bag]:
    """Features of `images` made-up images: real ones, jittered so that no two are alike, dealt out at random."""
    random = np.random.default_rng(seed)
    real = features.bag([picture.features for picture in pictures])
    for start in range(0, images * per_image, PART):
        count = min(PART, images * per_image - start)
        rows = random.integers(len(real.owner), size=count)
        noise = random.normal(0, 14, (count, 128)).astype(np.float32)
        descriptors = np.clip(real.descriptors[rows] + noise, 0, 255).astype(np.uint8)
        owner = ((start + np.arange(count)) // per_image).astype(np.int32)
        yield features.Bag(owner, real.points[random.integers(len(real.owner), size=count)], descriptors)


def bare(data: list[bytes]) -> None:
    """Decode, scale and extract with OpenCV, and nothing else."""
    detector = getattr(cv2, "SIFT_create")(features.KEYPOINTS, 3, 0.01, 10, 1.6)  # noqa: B009
    for encoded in data:
        detector.detectAndCompute(features.resize(cv2.cvtColor(decode(encoded), cv2.COLOR_RGB2GRAY), features.SIDE), None)


def measure(images: Path, sizes: list[int], count: int, seed: int) -> str:
    """A row per size of the reference; CPU time of one thread, the least of ROUNDS, the two kinds of work in turn."""
    with tarfile.open(images) as archive:
        data = [archive.extractfile(m).read() for m in archive if m.isfile()]  # type: ignore[union-attr]
    half = len(data) // 2
    pictures, queries = [features.extract(decode(encoded)) for encoded in data[:half]], data[half : half + count]
    per_image = round(np.mean([len(picture.features) for picture in pictures]))
    lines = [
        "| reference | index entries | index | build | bare | leak check | share | memory | 14 M images |",
        "| ---: " * 9 + "|",
    ]
    for size in sizes:
        start = time.process_time()
        sample = np.concatenate([bag.descriptors for bag in bags(pictures, max(1, size // 8), per_image, seed + 1)])
        parts = progress.track(bags(pictures, size, per_image, seed), None, "parts", f"speed: index of {size:,}")
        index = VotingIndex.build(size * per_image, parts, sample, np.ones(size, bool))
        built = time.process_time() - start
        costs: list[tuple[float, float]] = []
        for _ in range(ROUNDS):
            start = time.process_time()
            bare(queries)
            middle = time.process_time()
            search.findings((features.extract(decode(encoded)) for encoded in queries), index, Made(pictures))
            costs.append((middle - start, time.process_time() - middle))
        least, most = (1e3 * min(cost[i] for cost in costs) / len(queries) for i in (0, 1))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        entries = 2 * size * per_image
        stored = (16 + 8) * entries / 1e6 if entries > EXACT else 512 * entries / 1e6
        lines.append(
            f"| {size:,} | {entries / 1e6:.1f} M | {stored:,.0f} MB | {built:.0f} s "
            f"| {least:.2f} ms | {most:.2f} ms | {least / most:.0%} "
            f"| {peak:.1f} GB | {14e6 * most / 3.6e6:.0f} core-hours |"
        )
    return "\n".join(
        [*lines, "", f"{len(queries)} photographs as the pool, {per_image} features per reference image, seed {seed}."]
    )
