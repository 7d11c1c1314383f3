"""Shards of a stage's work, done by processes of this machine, or by the workers of a Dask cluster on many.

A shard is a small, picklable piece of work that writes its result to a file of its own, under its final name only when it is
whole. So it does not matter where it was done, or how often. A worker that is lost costs the shards it had in hand, which
others do again. A stage that is killed goes on with those that are not there yet.

The workers of a cluster see the same folder as the stage, at the same path, and start in it (docs/operations.md).
"""

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple, TypeVar

from pipeline.errors import UserError
from pipeline.harness import parent, progress, scratch

LOCAL, DASK = "local", "dask://"
PATIENCE_SECONDS = 10.0
LOSSES = 3
"""How many workers may die in a row, without a shard done between them, before the shard itself must be to blame."""

S = TypeVar("S")
R = TypeVar("R")


class Rows(NamedTuple):
    """A shard of images, rows `first` to `last` - 1, whose result is the artifact `folder` once they are done."""

    folder: Path
    first: int
    last: int


def finished(
    work: Callable[[Rows], int], count: int, size: int, workdir: Path, executor: str, unit: str, label: str, each: int = 1
) -> list[Path]:
    """Do what is missing or damaged of `count` rows in shards of `size`; the artifacts of all shards, in order of the rows.

    `work` writes the artifact of a shard and returns the number of its rows, which progress shows as `each` units. On this
    machine one process does them, which may have a GPU and threads of its own.
    """
    starts = range(0, count, size)
    parts = [Rows(workdir / f"{first:012}", first, min(first + size, count)) for first in starts]
    missing = [part for part in parts if not scratch.usable(part.folder)]
    left = sum(part.last - part.first for part in missing)
    with progress.bar(count * each, unit, label, (count - left) * each) as shown:
        for rows in done(work, missing, 1, executor):
            shown.update(rows * each)
    return [part.folder for part in parts]


def done(work: Callable[[S], R], shards: Iterable[S], workers: int, executor: str = LOCAL) -> Iterator[R]:
    """`work` of each shard, in the order in which they end.

    `workers`: processes of this machine (none of their own if 1), where `executor` is `local`; `dask://HOST:PORT` names the
    scheduler of a cluster that has its own. At most two shards for each worker wait at a time, so `shards` may be made as they
    are asked for. Raises UserError if workers keep dying or the cluster is not there; what `work` raises is passed on.
    """
    if executor.startswith(DASK):
        return _on_dask(work, iter(shards), executor.removeprefix(DASK))
    return map(work, shards) if workers <= 1 else _in_processes(work, iter(shards), workers)


def in_order(work: Callable[[S], R], items: Iterable[S], workers: int, chunk: int, setup: Callable[[], object]) -> Iterator[R]:
    """`work` of each item, in the order of the items, by `workers` processes of this machine (none of their own if 1), which take
    `chunk` items at a time. `setup` is called once in each of them. What `work` raises is passed on."""
    if workers <= 1:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")  # a forked child would inherit the locks of the parent's threads
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(setup,)) as pool:
        yield from pool.map(work, items, chunksize=chunk)


def _in_processes(work: Callable[[S], R], shards: Iterator[S], workers: int) -> Iterator[R]:
    context = multiprocessing.get_context("spawn")  # a fork would copy OpenMP's locks
    in_hand, losses = list(itertools.islice(shards, 2 * workers)), 0
    while in_hand:
        with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
            waiting: dict[Future[R], S] = {}
            try:
                waiting |= {pool.submit(work, shard): shard for shard in in_hand}
                while waiting:
                    future = wait(waiting, return_when=FIRST_COMPLETED).done.pop()
                    result, losses = future.result(), 0
                    in_hand.remove(waiting.pop(future))
                    yield result
                    for shard in itertools.islice(shards, 1):
                        in_hand.append(shard)
                        waiting[pool.submit(work, shard)] = shard
            except BrokenProcessPool:  # one process died, and the pool ended the others: again, with what they had in hand
                losses += 1
                if losses == LOSSES:
                    raise UserError(
                        f"{losses} worker processes died one after the other, probably for lack of memory. "
                        "Lower `machine.workers` and repeat the command: finished shards are kept."
                    ) from None
            finally:
                for future in waiting:
                    future.cancel()


def _start_worker(setup: Callable[[], object] | None = None) -> None:
    """The workers end with the stage, even if it is killed; and Ctrl-C is for the stage to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stage = multiprocessing.parent_process()
    parent.end_with(signal.SIGKILL, lambda: stage is None or os.getppid() == stage.pid)
    if setup is not None:
        setup()


def _on_dask(work: Callable[[S], R], shards: Iterator[S], address: str) -> Iterator[R]:
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError:
        raise UserError(f"`machine.executor` is dask://{address}, and Dask is not here: pip install -e '.[dask]'.") from None
    try:
        client = Client(f"tcp://{address}", timeout=PATIENCE_SECONDS)
    except (OSError, TimeoutError) as error:
        raise UserError(
            f"`machine.executor`: no Dask scheduler answers at {address} ({error}). Start one, or take `local`."
        ) from error
    with client:
        threads = sum(client.nthreads().values())
        if not threads:
            raise UserError(f"`machine.executor`: the Dask scheduler at {address} has no workers. Start some, or take `local`.")

        def submit(shard: S) -> object:
            return client.submit(work, shard, pure=False)  # pure: equal calls would be done once, and their files be missing

        waiting = as_completed([submit(shard) for shard in itertools.islice(shards, 2 * threads)])
        for future in waiting:
            try:
                result = future.result()
            except KilledWorker as error:
                raise UserError(f"a shard has killed several Dask workers, probably for lack of memory: {error}") from error
            for shard in itertools.islice(shards, 1):
                waiting.add(submit(shard))
            yield result
