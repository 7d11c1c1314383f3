"""Images in tars that lie elsewhere: how fast they are read beside the disk's, and whether each comes right through faults.

    python -m benchmarks.remote [--images 4000] [--side 128] [--drop 0.1] [--cut 0.01] [--processes 2] [--repeats 3]

Servers of this machine, each a process of its own, hold the tars: a plain one, and moto, which speaks S3 (the extra `dev`). First
they are read through the manifest, by one process in both orders; rows take turns, the least of the repeats counts. CPU time is
that of the reader alone. Then each server drops one request in ten and cuts one answer in a hundred short, `prepare` makes the
manifest anew, and several processes read every image, shuffled, and compare it with the original.
"""

import argparse
import functools
import multiprocessing
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from benchmarks import seeds
from pipeline.harness import shards
from pipeline.harness.machine import Machine
from pipeline.sources.remote import Remote
from pipeline.stages import prepare
from pipeline.stages import remote as stage
from pipeline.store import manifest
from pipeline.store.manifest import Manifest
from tests import servers
from tests.tiny import tar_of

TARS = 4
CLASSES = 4
TIMEOUT = 300.0  # seconds to wait for a server's word


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000, help="of the pool")
    parser.add_argument("--side", type=int, default=128, metavar="PIXELS", help="of the images, which are noise")
    parser.add_argument("--drop", type=float, default=0.1, help="the share of requests that get no answer")
    parser.add_argument("--cut", type=float, default=0.01, help="the share of answers that are cut short")
    parser.add_argument("--processes", type=int, default=2, help="that read every image in the end")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="winnow-remote-") as temporary, ExitStack() as ends:
        folder = Path(temporary)
        draw(folder / "raw", args.images, args.side)
        files = {file.name: file.read_bytes() for file in sorted((folder / "raw").iterdir())}
        local = prepared(folder / "local", folder / "raw")
        size = sum(local.table["size"].to_pylist())
        sys.stdout.write(f"{len(local):,} images of {size / len(local) / 1000:.1f} kB in {TARS} tars; {seeds.machine()}\n\n")
        at = {kind: ends.enter_context(Server(kind, files)) for kind in ("web", "s3")}
        os.environ.update({**servers.KEYS, "AWS_ENDPOINT_URL": at["s3"].address})
        urls = {"web": at["web"].address, "s3": f"s3://{servers.BUCKET}"}
        far = {kind: prepared(folder / kind, folder / "lists", url, list(files)) for kind, url in urls.items()}
        speed({"disk": local, **far}, at, size, args.repeats)
        for kind, server in at.items():
            server.ask("faults", args.drop, args.cut)
            start = time.monotonic()
            again = prepared(folder / f"{kind}-again", folder / "lists", urls[kind], list(files))
            right = compared(local, again, args.processes)
            done, asked = server.ask("counts")
            told = f"{done['dropped']} dropped, {done['cut']} cut short"
            sys.stdout.write(
                f"{kind}: {right:,} of {len(local):,} images right after {asked:,} requests, of which {told}; prepared once and "
                f"read once by {args.processes} processes in {time.monotonic() - start:.1f} s\n"
            )
            if right != len(local):
                sys.exit(f"{len(local) - right} images are wrong.")


def draw(folder: Path, images: int, side: int) -> None:
    """Noise as JPEG files: a few labelled ones, and the pool."""
    chance = np.random.default_rng(0)

    def noise(name: str) -> tuple[str, bytes]:
        pixels = cv2.resize(chance.integers(0, 256, (side // 4, side // 4, 3), np.uint8), (side, side))
        return name, cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()

    for role in ("labelled", "val"):
        tar_of(folder / f"{role}.tar", dict(noise(f"{n % CLASSES}/{n}.jpg") for n in range(4 * CLASSES)))
    for number in range(TARS):
        tar_of(folder / f"pool-{number}.tar", dict(noise(f"{n:06}.jpg") for n in range(number, images, TARS)))


def prepared(out: Path, root: Path, url: str = "", files: list[str] | None = None) -> Manifest:
    """The manifest of the pool, which lies in the folder `root`; with a `url` below that, of which `root` gets the list."""
    if url:
        stage.run(Remote(url=url, files=tuple(files or ())), out=root / out.name)
        root = root / out.name
    tars = {role: [{"kind": "tar", "path": f"{role}*.tar"}] for role in ("labelled", "val", "pool")}
    params = prepare.Prepare.model_validate({"root": str(root), "holdout": 0.25, **tars})
    outs: dict[str, Any] = {f"{name}_out": out / name for name in ("train", "holdout", "val", "pool", "quarantine")}
    prepare.run(params, root=root, machine=Machine(), **outs)
    return manifest.read(out / "pool")


class Read(NamedTuple):
    """Of all images once: seconds, CPU seconds of the reader, requests."""

    wall: float
    cpu: float
    asked: int


def speed(pools: dict[str, Manifest], at: dict[str, "Server"], size: int, repeats: int) -> None:
    """Write the table."""
    rows = [(order, where) for order in ("in order", "shuffled") for where in pools]
    best: dict[tuple[str, str], Read] = {}
    for _ in range(repeats):
        for order, where in rows:
            pool = pools[where]
            chosen = np.arange(len(pool)) if order == "in order" else np.random.default_rng(0).permutation(len(pool))
            if where in at:
                at[where].ask("counts")
            wall, cpu = time.perf_counter(), time.process_time()
            for _data in manifest.image_bytes(pool, chosen):
                pass
            took = Read(time.perf_counter() - wall, time.process_time() - cpu, at[where].ask("counts")[1] if where in at else 0)
            best[order, where] = min(best.get((order, where), took), took)
    sys.stdout.write("| order | where | images/s | MB/s | of the disk's | CPU us an image | requests |\n")
    sys.stdout.write("| --- | --- | ---: | ---: | ---: | ---: | ---: |\n")
    for (order, where), took in best.items():
        count, ratio = len(pools[where]), best[order, "disk"].wall / took.wall
        sys.stdout.write(
            f"| {order} | {where} | {count / took.wall:,.0f} | {size / took.wall / 1e6:,.0f} | {ratio:.2f} | "
            f"{took.cpu / count * 1e6:.0f} | {took.asked or ''} |\n"
        )
    sys.stdout.write("\n")


def compared(local: Manifest, far: Manifest, processes: int) -> int:
    """How many images are, byte for byte, what they are on the disk, as several processes read them."""
    if not local.table.drop_columns("path").equals(far.table.drop_columns("path")):
        return 0
    order = np.random.default_rng(0).permutation(len(far))
    wanted = [zlib.adler32(data) for data in manifest.image_bytes(local, order)]
    parts = [part.tolist() for part in np.array_split(order, 4 * processes)]
    sums = shards.in_order(functools.partial(_sums, far), parts, processes, 1, _nothing)
    return sum(a == b for a, b in zip(wanted, (one for part in sums for one in part), strict=True))


def _nothing() -> None:
    """What a reader needs before it begins."""


def _sums(images: Manifest, rows: list[int]) -> list[int]:
    return [zlib.adler32(data) for data in manifest.image_bytes(images, rows)]


# Servers --------------------------------------------------------------------------------------------------------------


class Server:
    """A process that serves files; `kind`: `web` or `s3`."""

    def __init__(self, kind: str, files: dict[str, bytes]) -> None:
        context = multiprocessing.get_context("spawn")
        self.ours, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(kind, files, theirs), daemon=True)

    def __enter__(self) -> "Server":
        self.process.start()
        self.address: str = self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.send(None)
        self.process.join(TIMEOUT)

    def ask(self, what: str, *args: float) -> Any:
        """`counts`: of what was dropped and cut, and of all requests, since the last time. `faults`: their shares from now on."""
        self.ours.send((what, *args))
        return self._answer()

    def _answer(self) -> Any:
        if not self.ours.poll(TIMEOUT):
            sys.exit("a server does not answer.")
        return self.ours.recv()


def _serve(kind: str, files: dict[str, bytes], asked: Connection) -> None:
    inner: Callable[..., Any] = servers.s3() if kind == "s3" else servers.Web(files)
    app = servers.Faulty(inner)
    with servers.serving(app) as address:
        if kind == "s3":
            servers.put(address, files)
        asked.send(address)
        while word := asked.recv():
            if word[0] == "faults":
                app.drop, app.cut = word[1:]
            asked.send((dict(app.done, **{n: app.done[n] for n in ("dropped", "cut")}), len(app.seen)))
            app.done.clear()
            app.seen.clear()


if __name__ == "__main__":
    main()
