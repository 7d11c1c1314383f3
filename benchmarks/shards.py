"""A stage in shards with 1, 2 and 4 workers, on this machine and on a Dask cluster, and with a worker killed in the middle.

    python -m benchmarks.shards --images 4096 --workers 1 2 4

Checks the first images of the built-in pool for leaks (`search`), each time from nothing, in a folder under .scratch/shards/.
The cluster's scheduler and workers are those of docs/operations.md, on this machine. The findings of every run are compared
with those of the first.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from benchmarks import seeds
from benchmarks.flow import free_port
from pipeline.store import artifact, manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096, help="of the pool")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--commit", default="HEAD", help="the code to run")
    args = parser.parse_args()
    params = yaml.safe_load((seeds.ROOT / "recipes" / "demo.yaml").read_text())
    folder = seeds.workspace("shards", params, 1, args.commit)
    seeds.reproduce(folder, "prepare")
    pool = manifest.read(folder / "data" / "prepare" / "pool").take(np.arange(args.images))
    with artifact.writing(folder / "part") as tmp:
        manifest.write(tmp, pool.table, pool.classes)
    print(f"{args.images:,} images against {len(manifest.read(folder / 'data' / 'prepare' / 'val')):,}; {seeds.machine()}\n")
    print("| where | workers | killed | seconds | of one local worker's | findings |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    first: tuple[float, str] | None = None
    for where in ("local", "dask"):
        for workers, kill in [*((n, False) for n in args.workers), (2, True)]:
            took, made = run(folder, where, workers, kill)
            first = first or (took, made)
            same = "the same" if made == first[1] else "OTHERS"
            print(f"| {where} | {workers} | {int(kill)} | {took:.1f} | {took / first[0]:.2f} | {same} |", flush=True)


def run(folder: Path, where: str, workers: int, kill: bool) -> tuple[float, str]:
    """Seconds of the stage, and the identity of its findings."""
    started = cluster(folder, workers) if where == "dask" else contextlib.nullcontext(("local", list[int]()))
    with started as (executor, processes):
        machine = {"threads": 1, "workers": workers, "executor": executor}
        (folder / "machine.yaml").write_text(yaml.safe_dump({"machine": machine, "search": {}}))
        command = [sys.executable, "-m", "pipeline.stages.search", "--params", "machine.yaml", "--pool", "part"]
        for name in ("val", "holdout", "train"):
            command += [f"--{name}", f"data/prepare/{name}"]
        command += ["--out", "made/findings"]
        start = time.monotonic()
        with (folder / "log.txt").open("a") as log:
            stage = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env={**os.environ, "WINNOW_TRACKING": "off"})
            if kill:
                while not list(folder.glob(".scratch/search/*/pool-reference/*/rows.parquet")):  # its first shard
                    if stage.poll() is not None:
                        sys.exit(f"the stage ended before a worker could be killed; see {folder / 'log.txt'}")
                    time.sleep(0.05)
                os.kill((processes or children(stage.pid))[0], signal.SIGKILL)
            if stage.wait():
                sys.exit(f"the stage failed; see {folder / 'log.txt'}")
        return time.monotonic() - start, artifact.identity(folder / "made" / "findings")


@contextlib.contextmanager
def cluster(folder: Path, workers: int) -> Iterator[tuple[str, list[int]]]:
    """A scheduler and so many workers of one thread; the executor, and the processes of the workers."""
    port = free_port()
    bin = Path(sys.executable).parent
    quiet = {**os.environ, "WINNOW_TRACKING": "off"}
    with contextlib.ExitStack() as ends, (folder / "dask.txt").open("a") as log:

        def begin(*command: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen([bin / "dask", *command], cwd=folder, stdout=log, stderr=log, env=quiet)
            ends.callback(process.wait)
            ends.callback(process.terminate)
            return process

        begin("scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
        nanny = begin("worker", f"tcp://127.0.0.1:{port}", "--nworkers", str(workers), "--nthreads", "1", "--no-dashboard")
        from distributed import Client

        with Client(f"tcp://127.0.0.1:{port}", timeout=60) as client:
            client.wait_for_workers(workers, timeout=60)
            pids = list(client.run(os.getpid).values())
        assert nanny.poll() is None
        yield f"dask://127.0.0.1:{port}", pids


def children(pid: int) -> list[int]:
    """The worker processes of a stage, without multiprocessing's resource tracker."""
    found = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [process for process in found if "spawn_main" in Path(f"/proc/{process}/cmdline").read_text()]


if __name__ == "__main__":
    main()
