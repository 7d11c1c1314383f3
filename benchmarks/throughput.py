"""Scoring and training beside the bare model step, on the same work, in one run.

    python -m benchmarks.throughput [--threads 1] [--rounds 7]

Scoring: images of a manifest (JPEG files on disk) to logits, as the stage `score` does it, against the bare forward of the same
network on one tensor that is ready in memory. Training: `fit.fit` with crops, flips, schedule, optimiser and checks, against
bare forward, backward and optimiser step on a ready tensor. Rounds alternate, so that a busy neighbour slows both alike; the
median of the rounds' ratios is printed with its range.
"""

import argparse
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.seeds import machine
from pipeline.harness.job import Job
from pipeline.harness.journal import Journal
from pipeline.harness.machine import Machine
from pipeline.learning import views
from pipeline.learning.loop import fit, optimisers
from pipeline.models import architectures, device, inputs, prediction
from pipeline.store import manifest

TRAINED: list[tuple[str, dict[str, object], int]] = [
    ("resnet8", {"width": 32, "shortcut": "B", "stem_stride": 2}, 20),
    ("resnet18_3x3", {}, 3),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    on = device.pick(Machine(threads=args.threads))
    print(f"{machine()}, {args.threads} threads, {on.dtype}, {args.rounds} rounds after one to warm up\n")
    print("| work | ours, images/s | bare, images/s | ours / bare | range |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for arch, side, batches in (("resnet56", 32, 4), ("resnet18", 224, 1)):
            ours, bare, folded = scoring(Path(folder), arch, side, batches, on, args.threads)
            count = batches * prediction.BATCH
            report(f"scoring, {arch}, {side} px", ours, bare, count, args.rounds)
            report(f"scoring, {arch}, {side} px, bare forward with folded BN", ours, folded, count, args.rounds)
    for arch, options, steps in TRAINED:
        ours, bare = training(arch, options, steps, on)
        report(f"training, {arch}, 32 px", ours, bare, 128 * steps, args.rounds)


def report(name: str, ours: Callable[[], None], bare: Callable[[], None], count: int, rounds: int) -> None:
    times = [(clock(ours), clock(bare)) for _ in range(rounds + 1)][1:]
    ratios = [b / a for a, b in times]
    a, b = (count / statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"| {name} | {a:,.0f} | {b:,.0f} | {statistics.median(ratios):.0%} | {min(ratios):.0%} to {max(ratios):.0%} |", flush=True
    )


def clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def scoring(folder: Path, arch: str, side: int, batches: int, on: device.Device, threads: int) -> tuple[Callable[[], None], ...]:
    pool = pictures(folder / str(side), batches * prediction.BATCH, side)
    given = inputs.Input(size=side)
    plain = on.place(architectures.create(arch, 1000)).eval()
    folded = on.place(prediction.folded(architectures.create(arch, 1000)))
    ready = on.batch(torch.randn(prediction.BATCH, 3, side, side).to(memory_format=torch.channels_last))

    def ours() -> None:
        pixels = inputs.OnDisk(pool, side, threads)
        for _ in prediction.logits(folded, pixels, given, on):
            pass

    def bare(model: nn.Module) -> Callable[[], None]:
        @torch.inference_mode()
        def forward() -> None:
            for _ in range(batches):
                with on.autocast():
                    model(ready)

        return forward

    return ours, bare(plain), bare(folded)


def training(
    arch: str, options: dict[str, object], steps: int, on: device.Device
) -> tuple[Callable[[], None], Callable[[], None]]:
    batch = 128
    given = inputs.Input(size=32)
    labels = torch.randint(0, 10, (4096,))
    pixels = inputs.InMemory(np.random.default_rng(0).integers(0, 256, (4096, 32, 32, 3), dtype=np.uint8))
    plan = optimisers.Training(steps=steps, batch=batch)

    def ours() -> None:
        model = architectures.create(arch, 10, options)

        def loss(model: nn.Module, batch: views.Batch) -> Tensor:
            return F.cross_entropy(model(inputs.normalise(batch.views, given)).float(), labels[batch.rows].to(on.device))

        with tempfile.TemporaryDirectory() as scratch:
            fit.fit(
                *(model, loss, pixels, views.viewer(32, views.View(), 0), plan, lambda model: {}),
                job=Job(0, Path(scratch), Journal(), Machine()),
                device=on,
                label=arch,
            )

    def bare() -> None:
        model = on.place(architectures.create(arch, 10, options)).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
        x = on.batch(torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last))
        y = labels[:batch].to(on.device)
        for _ in range(steps):
            with on.autocast():
                loss = F.cross_entropy(model(x).float(), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return ours, bare


def pictures(folder: Path, count: int, side: int) -> manifest.Manifest:
    """JPEG files of smooth noise: of `side` pixels if that is small, else of photographs' usual 500 x 375."""
    folder.mkdir()
    random = np.random.default_rng(0)
    size = (side, side) if side < 64 else (500, 375)
    rows = []
    for i in range(count):
        picture = cv2.resize(random.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8), size)
        data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        path = folder / f"{i:06}.jpg"
        path.write_bytes(data)
        rows.append((path.name, str(path), 0, len(data), *size, zlib.crc32(data), None))
    columns = dict(zip(manifest.SCHEMA.names, map(list, zip(*rows, strict=True)), strict=True))
    return manifest.Manifest(pa.table(columns).cast(manifest.SCHEMA), ())


if __name__ == "__main__":
    main()
