"""How large the gallery of the leak check is, and how long it takes to make, to open and to decide in.

    python -m benchmarks.gallery --findings 10000 --out .scratch/gallery

Drawn JPEGs of 500 x 375 pixels, of which 200 differ; each finding has a pool image of its own, and every second a validation
image. Nine in ten findings are for review. Made by `--workers` threads; opened from disk by the system's Chromium (with the
extra `dev`), which decides on 20 images.
"""

import argparse
import os
import resource
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import simplejpeg
from playwright.sync_api import sync_playwright

from pipeline.leaks import decision, findings, gallery
from pipeline.store import manifest
from pipeline.store.manifest import Manifest

WIDTH, HEIGHT, DIFFERENT = 500, 375, 200


def drawn(file: Path, rng: np.random.Generator) -> list[dict[str, object]]:
    """Write DIFFERENT images one after another, and where each lies."""
    places: list[dict[str, object]] = []
    with file.open("wb") as f:
        for _ in range(DIFFERENT):
            image = sum(
                cv2.resize(rng.normal(0, 60 / octave, (2**octave, 2**octave, 3)), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
                for octave in range(1, 8)
            )
            data = simplejpeg.encode_jpeg(np.clip(image + 128, 0, 255).astype(np.uint8), 90, "RGB", "420")
            places.append({"path": str(file), "offset": f.tell(), "size": len(data), "crc32": zlib.crc32(data)})
            f.write(data)
    return places


def images(name: str, count: int, places: list[dict[str, object]], label: int | None) -> Manifest:
    rows = [
        {"id": f"{name}-00.tar/img/{at:06}.jpg", "width": WIDTH, "height": HEIGHT, "label": label} | places[at % DIFFERENT]
        for at in range(count)
    ]
    return Manifest(pa.Table.from_pylist(rows, manifest.SCHEMA), () if label is None else ("thing",))


def found(count: int, sets: dict[str, Manifest], rng: np.random.Generator) -> pa.Table:
    """Rows of FOUND."""
    pool, val = (sets[name].table["id"].to_pylist() for name in ("pool", "val"))
    rows = []
    for at in range(count):
        is_copy, score = at % 10 == 0, float(rng.uniform(0.3, 1))
        row = {"relation": "pool-val", "row": at, "match": at % len(val), "id": pool[at], "match_id": val[at % len(val)]}
        row |= {"outcome": "copy" if is_copy else "review", "rule": "same pixels" if is_copy else "shared features"}
        row |= dict.fromkeys(("zncc", "local", "cover_image", "cover_match", "score"), score)
        row |= {"inliers": 20, "mirrored": False, "negative": False, "transform": [0.9, 0, 0.1, 0, 0.9, 0.1, 0, 0, 1]}
        rows.append(row)
    return pa.Table.from_pylist(rows, findings.FOUND)


def opened(page_file: Path) -> tuple[float, float]:
    """Seconds until the first thumbnails are there, and of a decision."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page()
        start = time.perf_counter()
        page.goto(page_file.resolve().as_uri())
        page.wait_for_function("document.querySelectorAll('svg image[href]').length >= 48")
        there = time.perf_counter()
        for _ in range(20):
            page.keyboard.press("r")
        decided = time.perf_counter()
        browser.close()
    return there - start, (decided - there) / 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--findings", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="a folder to be made")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    rng = np.random.default_rng(0)
    places = drawn(args.out / "images.bin", rng)
    sets = {"pool": images("pool", args.findings, places, None), "val": images("val", max(1, args.findings // 2), places, 0)}
    sets |= {name: images(name, 0, places, 0) for name in ("train", "holdout")}
    params = decision.Dedup()
    audit = decision.decide(found(args.findings, sets, rng), params, {}, sets)
    before, start, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), time.process_time()
    folder = args.out / "gallery"
    folder.mkdir()
    gallery.write(folder, audit, sets, params, {}, [], "benchmark", args.workers)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    thumbnails = sorted((folder / "thumbnails").iterdir())
    print(f"{args.findings:,} findings: {seconds:.1f} s, {cpu:.1f} s of CPU time, {more:.0f} MB more memory at the most")
    for name in ("index.html", "gallery.js", "findings.js"):
        print(f"{name:12} {(folder / name).stat().st_size / 1e3:>10,.0f} kB")
    size = sum(file.stat().st_size for file in thumbnails)
    print(f"{'thumbnails':12} {size / 1e3:>10,.0f} kB in {len(thumbnails)} files")
    there, each = opened(folder / "index.html")
    print(f"first thumbnails after {there:.2f} s, a decision takes {each * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
