"""Scheduling: each stage as soon as all it needs is done."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Set


async def in_order(
    needs: Mapping[str, Set[str]], start: Callable[[str], Awaitable[None]], at_once: int, unlimited: Set[str] = frozenset()
) -> dict[str, Exception]:
    """Start each stage of `needs` when those it needs are done; returns the stages that failed. What needs one of those is not
    started.

    At most `at_once` run at a time, not counting the `unlimited` ones: their work pool limits them. (dev/LOG.md has what
    Prefect's own `submit(wait_for=...)` would lose.)
    """
    here, failed = asyncio.Semaphore(max(at_once, 1)), dict[str, Exception]()
    done = {s: asyncio.get_running_loop().create_future() for s in needs}

    async def visit(s: str) -> None:
        needed = [await done[n] for n in needs[s] if n in done]
        ok = all(needed)
        try:
            if ok and s in unlimited:
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
        for s in needs:
            group.create_task(visit(s))
    return failed
