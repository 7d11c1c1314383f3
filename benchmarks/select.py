"""Selection at the size of ImageNet-22k: time, peak memory and digest of `select` beside the bare queries it could be.

    python -m benchmarks.select [--images 14000000] [--top 5] [--classes 1000] [--k 4000] [--repeats 3] [--folder TMP]

Synthetic scores and a synthetic pool manifest are written to a temporary folder (14 M images: 1.2 GB). Each measurement
is a process of its own, with the rows of the table taking turns; the least of the repeats counts. On a machine that
others use, CPU seconds say more than seconds.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq

from pipeline.harness.machine import Machine
from pipeline.stages import select
from pipeline.store import artifact, manifest, ranking, scores

HELD = 500  # held-out images
BATCH = 1 << 18


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.select", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=14_000_000)
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--k", type=int, default=4_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to keep the synthetic data, to use it again")
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "THREADS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        method, threads = args.measure
        print(json.dumps(measured(METHODS[method], args.folder, args.top, args.k, int(threads))))
        return
    with tempfile.TemporaryDirectory(prefix="winnow-select-") as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "scores").exists():
            draw(folder, args.images, args.top, args.classes)
        report(folder, args)


def draw(folder: Path, images: int, top: int, classes: int) -> None:
    """A pool manifest of `images` rows and scores with the `top` classes of each."""
    rng = np.random.default_rng(0)
    with artifact.writing(folder / "pool") as tmp:
        rows = (
            duckdb.connect()
            .sql(
                f"""
            SELECT printf('pool-%05d.tar/%08d.jpg', i // 10000, i) AS id, printf('pool-%05d.tar', i // 10000) AS path,
                i AS offset, i AS size, 64 AS width, 64 AS height, 0 AS crc32, NULL::INTEGER AS label
            FROM range({images}) AS r(i)
            """
            )
            .to_arrow_table()
        )
        manifest.write(tmp, rows.set_column(1, "path", rows["path"].dictionary_encode()), ())
    names, identity = [f"class {c}" for c in range(classes)], artifact.identity(folder / "pool")
    with artifact.writing(folder / "scores") as tmp, scores.writer(tmp, top, names, identity, "float32") as writer:
        for first in range(0, images, BATCH):
            n = min(BATCH, images - first)
            step = rng.integers(1, max(2, classes // top), (n, top), dtype=np.int32)
            numbers = (rng.integers(0, classes, (n, 1), dtype=np.int32) + np.cumsum(step, axis=1)) % classes
            logits = -np.sort(-rng.normal(5, 3, (n, top)).astype(np.float32), axis=1)
            logsumexp = np.log(np.exp(logits).sum(1) + 100 * rng.random(n)).astype(np.float32)
            writer.write_table(table := scores.table(numbers, logits, logsumexp))
        held = table.slice(0, HELD)
        scores.write_held(tmp, held, np.where(rng.random(len(held)) < 0.8, held["class_0"].to_numpy(), 0))


def report(folder: Path, args: argparse.Namespace) -> None:
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {
        (method, threads): [] for threads in (1, 2) for method in METHODS if threads == 1 or method in ("query", "stage")
    }
    for _ in range(args.repeats):
        for (method, threads), results in runs.items():
            command = [sys.executable, "-m", "benchmarks.select", "--measure", method, str(threads), "--folder", str(folder)]
            command += ["--top", str(args.top), "--k", str(args.k)]
            results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    reference = min(r["cpu"] for r in runs["bare", 1])
    print(f"{args.images:,} images x top {args.top}, {args.classes:,} classes, k = {args.k:,}; least of {args.repeats}\n")
    print("| | threads | CPU s | ratio | s | peak GB | digest |\n| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for (method, threads), results in runs.items():
        cpu, seconds, memory = (min(r[key] for r in results) for key in ("cpu", "seconds", "memory"))
        digests = " ".join(sorted({r["digest"][:12] for r in results}))
        name = (METHODS[method].__doc__ or "").rstrip(".")
        print(f"| {name} | {threads} | {cpu:.1f} | {cpu / reference:.2f} | {seconds:.1f} | {memory:.2f} | {digests} |")


Method = Callable[[Path, int, int, int], np.ndarray]
"""(folder, top, k, threads) -> the (T,) rows of the selected images; one may occur several times."""


def measured(method: Method, folder: Path, top: int, k: int, threads: int) -> dict[str, float | str]:
    start, cpu = time.monotonic(), time.process_time()
    rows = method(folder, top, k, threads)
    used = {"seconds": time.monotonic() - start, "cpu": time.process_time() - cpu}
    peak = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]
    digest = hashlib.sha256(np.unique(rows).astype(np.int64).tobytes()).hexdigest()
    return {**used, "memory": int(peak) / 1e6, "digest": digest}


def bare(folder: Path, top: int, k: int, threads: int) -> np.ndarray:
    """The bare DuckDB query: `min(key, k)` of one integer key."""
    return _best(folder, top, threads, f"min((s::BIT::INTEGER::BIGINT << 32) | image, {k})") & 0xFFFFFFFF


def arg_min(folder: Path, top: int, k: int, threads: int) -> np.ndarray:
    """DuckDB `arg_min(image, -log p, k)`: ties fall as they like."""
    return _best(folder, top, threads, f"arg_min(image, s, {k})")


def window(folder: Path, top: int, k: int, threads: int) -> np.ndarray:
    """DuckDB `row_number` window."""
    with _database(threads) as db:
        ranked = f"SELECT image, row_number() OVER (PARTITION BY class ORDER BY s, image) AS rank FROM ({_pairs(top)})"
        found = db.sql(f"SELECT image FROM ({ranked}) WHERE rank <= {k}", params=[str(folder / "scores" / scores.FILE)])
        return found.to_arrow_table()["image"].to_numpy()


def query(folder: Path, top: int, k: int, threads: int) -> np.ndarray:
    """`select`'s query: the same, with its checks and counts."""
    scored = scores.open_scores(folder / "scores")
    taken, _ = ranking.ranked(scored, top, k, folder / "temporary", threads, Machine().memory_gb)
    return taken.images


def stage(folder: Path, top: int, k: int, threads: int) -> np.ndarray:
    """`select`, the whole stage: checksums, manifest in, manifest out."""
    params = select.Select(scores="", rule="top", k=k, membership="any")
    machine, out = Machine(threads=threads), folder / "selected"
    select.run(params, scores=folder / "scores", pool=folder / "pool", out=out, seed=0, workdir=folder, machine=machine)
    return pq.read_table(out / manifest.FILE, columns=["size"])["size"].to_numpy()  # `draw` put the row there


METHODS: dict[str, Method] = {"bare": bare, "query": query, "stage": stage, "arg_min": arg_min, "window": window}


def _best(folder: Path, top: int, threads: int, aggregate: str) -> np.ndarray:
    ranked = f"SELECT class, {aggregate} AS best FROM ({_pairs(top)}) GROUP BY class"
    with _database(threads) as db:
        best = db.sql(ranked, params=[str(folder / "scores" / scores.FILE)]).to_arrow_table()["best"]
        return best.combine_chunks().flatten().to_numpy()


def _pairs(top: int) -> str:
    classes = ", ".join(f"class_{j}" for j in range(top))
    surprisals = ", ".join(f"logsumexp - logit_{j}" for j in range(top))
    return (
        f"SELECT unnest([{classes}]) AS class, unnest([{surprisals}]) AS s, file_row_number AS image "
        "FROM read_parquet(?, file_row_number => true)"
    )


def _database(threads: int) -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"threads": threads, "preserve_insertion_order": False})


if __name__ == "__main__":
    main()
