"""Scheduling: each stage as soon as all it needs is done."""

import asyncio
from collections.abc import Awaitable, Callable

from flows.dag import Dag


async def in_order(
    graph: Dag, todo: list[str], start: Callable[[str], Awaitable[None]], at_once: int, unlimited: frozenset[str]
) -> dict[str, Exception]:
    """Start each stage when those it needs are done; returns the stages that failed. What needs one of those is not started.

    At most `at_once` run at a time, not counting the `unlimited` ones: their work pool limits them.
    """
    here, failed = asyncio.Semaphore(max(at_once, 1)), dict[str, Exception]()
    done = {s: asyncio.get_running_loop().create_future() for s in todo}

    async def visit(s: str) -> None:
        needed = [await done[n] for n in graph.needs[s] if n in done]
        ok = all(needed)
        try:
            if ok and s.partition("@")[0] in unlimited:
                await start(s)
            elif ok:
                async with here:
                    await start(s)
        except Exception as error:
            failed[s], ok = error, False
        finally:
            if not done[s].done():
                done[s].set_result(ok)

    async with asyncio.TaskGroup() as group:
        for s in todo:
            group.create_task(visit(s))
    return failed
