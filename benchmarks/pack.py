"""What packing gains: canvases a second from the original photographs and from packed ones, in alternating rounds.

    python -m benchmarks.pack data/raw/imagenet-samples-300.tar [--side 256] [--threads 1] [--rounds 7]

Both go through the same reader as training (`inputs.OnDisk`: read, check the CRC, decode, resize, crop). The
bare decode of the original files by OpenCV, from memory and without resizing, stands beside them.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from benchmarks.seeds import machine
from benchmarks.throughput import clock
from pipeline.harness.machine import Machine
from pipeline.models.inputs import OnDisk
from pipeline.sources.folder import Folder
from pipeline.sources.tar import Tar
from pipeline.stages import pack, prepare
from pipeline.store import manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tar", type=Path, help="photographs, as <class>/<file> in an uncompressed tar")
    parser.add_argument("--side", type=int, default=256, help="short side of the packed images and of the canvases, in pixels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    photographs = args.tar.resolve()
    with tempfile.TemporaryDirectory() as tmp:
        os.chdir(tmp)
        Path("photographs.tar").symlink_to(photographs)
        for split in ("train", "val"):  # prepare wants some images with labels
            for name in ("a/0", "a/1", "b/0", "b/1"):
                Path(split, name).parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(f"{split}/{name}.png", np.zeros((8, 8, 3), np.uint8))
        outs = {f"{name}_out": Path("made", name) for name in ("train", "holdout", "val", "pool", "quarantine")}
        sources = {"labelled": (Folder(kind="folder", path="train"),), "val": (Folder(kind="folder", path="val"),)}
        params = prepare.Prepare(root=tmp, pool=(Tar(kind="tar", path="photographs.tar"),), holdout=0.5, **sources)  # type: ignore[arg-type]
        prepare.run(params, root=Path(tmp), machine=Machine(), **outs)
        original = manifest.read(Path("made/pool"))
        wanted = pack.Pack(images="-", labelled=False, side=args.side)
        start = time.monotonic()
        inputs = {"chosen": Path("made/pool"), "train": Path("made/train")}
        to = {"out": Path("packed"), "tars_out": Path("tars"), "workdir": Path("workdir")}
        sizes = pack.run(wanted, **inputs, **to, machine=Machine(workers=args.threads))
        packing = time.monotonic() - start
        packed = manifest.read(Path("packed"))
        rows = np.arange(len(original))
        files = [np.frombuffer(data, np.uint8) for data in manifest.image_bytes(original, rows)]
        cv2.setNumThreads(1)

        def canvases(of: manifest.Manifest) -> Callable[[], object]:
            reader = OnDisk(of, args.side, args.threads)
            return lambda: reader.gather(rows)

        work = {
            "original files": canvases(original),
            "packed": canvases(packed),
            "bare decode of the original files, one thread": lambda: [cv2.imdecode(f, cv2.IMREAD_COLOR) for f in files],
        }
        times = [{name: clock(do) for name, do in work.items()} for _ in range(args.rounds + 1)][1:]
    count, before, after = len(rows), sizes["bytes_before"], sizes["bytes_after"]
    print(f"{machine()}, {args.threads} threads; {count} images; {args.rounds} rounds after one to warm up.")
    print(f"Packing at {args.side} px: {packing:.1f} s, {before / 1e6:.1f} MB to {after / 1e6:.1f} MB.\n")
    print("| | images/s, median | of the original files' | range |\n| --- | ---: | ---: | --- |")
    for name in work:
        ratios = [t["original files"] / t[name] for t in times]
        rate = count / statistics.median(t[name] for t in times)
        print(f"| {name} | {rate:,.0f} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |")


if __name__ == "__main__":
    main()
