"""The flow of the whole pipeline, or of some targets of it, with the params as they are or changed for this run.

DVC alone says what the stages are, and which are stale. This flow starts a stage as soon as all it needs is up to date, as a task
that runs `dvc repro --single-item`. A stage that failed holds up those that need it and no others.
"""

import asyncio
import re
import time
from collections.abc import Mapping, Set
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import yaml
from prefect import flow, get_client, get_run_logger, runtime
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, State
from pydantic import Field

from flows import attempt, dag, forecast, plan, sweep, tracking, worktree
from flows.form import Targets
from flows.order import in_order
from flows.tasks import NOTHING, limited, push_again, restore, run_stage, run_stage_elsewhere, take_over, up_to_date
from flows.variant import Variant, ask, check_all, combinations, prepared, shared

POOLS = Path(__file__).with_name("pools.yaml")
EVERYTHING: list[str] = []
AS_THEY_ARE: list[str] = []


class NotAllDone(Exception):
    """Some stages failed: which, and what was held up by them."""


def title() -> str:
    """The name of a run tells what it runs: `distil@ssld (distil.ssld.loss.name=js)`."""
    asked = runtime.flow_run.parameters
    words = " ".join(asked.get("targets") or ["everything"])
    changes = " ".join(asked.get("set_params") or [])
    return words + (f" ({changes})" if changes else "") + (" forced" if asked.get("force") else "")


@flow(name="winnow", flow_run_name=title, persist_result=False)
async def winnow(
    targets: Targets = EVERYTHING,
    set_params: Annotated[list[str], Field(examples=[["distil.ssld.loss.name=js,sym_kl"]])] = AS_THEY_ARE,
    force: bool = False,
    at_once: Annotated[int, Field(ge=1)] = 1,
    hours: Annotated[float, Field(gt=0)] = 48.0,
    retries: Annotated[int, Field(ge=0)] = 2,
    elsewhere: bool = True,
    at_most: Annotated[int, Field(ge=1)] = 16,
) -> State:
    """Bring the pipeline up to date: what DVC says is stale runs, all else is left as it is.

    The form of a run shows the following; Prefect takes it from nowhere else.

    Args:
        targets: Stages, with all they need: `distil@ssld`, or `distil` for all its entries. None: everything.
        set_params: Changes of params.yaml for this run, as `dvc exp run -S` takes them: `distil.ssld.loss.name=js`; `+` before a
            key that is not there yet, `~` to remove one. It then works in a folder of its own, and is kept as a DVC experiment.
            Several values, `seed=1,2,3`, make a sweep: every combination, and one comparison at the end. A value that is a list
            is written `[1,2]`.
        force: Run every stage, also those that are up to date.
        at_once: How many stages may run beside each other on the machine of the flow.
        hours: The time limit of one stage; a stage that takes longer is not tried again.
        retries: Of a stage that was killed, or lost its lock, disk or network. A mistake is not tried again.
        elsewhere: Give the stages of flows/pools.yaml to the GPU workers, where Prefect has the deployment `stage/gpu`.
        at_most: How many combinations a sweep may have; one that has more is refused before anything runs.
    """
    log, workspace = get_run_logger(), Path.cwd()
    found = combinations(set_params or [], at_most)
    await check_all(workspace, found)
    variants = [await prepared(workspace, one, targets or [], force) for one in found]
    states = dict[str, State]()
    for v in variants:
        states |= await looked(v, hours, retries)
    deployment, theirs = await gpu_deployment() if elsewhere else (None, frozenset[str]())
    planned, restorable = await forecast.show(variants, shared(variants), theirs)
    before = {v.where.named(s) for v in variants for s in v.todo}
    for v in variants:
        await restored(v, restorable.get(v.where.label, []))
    todo, same = {v.where.named(s): (v, s) for v in variants for s in v.todo}, shared(variants)
    needs = {name: needed(v, s, todo) | ({same[name][0]} if name in same else set()) for name, (v, s) in todo.items()}
    count = sum(len(v.wanted) for v in variants)
    log.info("%d of %d stages are up to date, to do: %s", count - len(todo), count, ", ".join(todo) or "nothing")
    states |= await no_work(variants, {*todo, *states}, before)
    ended = dict[str, float]()

    async def start(name: str) -> None:
        began = time.monotonic()
        states[name] = state = await run(name)
        if not state.is_completed():
            await state.aresult()  # raises what the task raised
        ended[name] = time.monotonic() - began
        if planned:
            log.info("%s: %s", name, plan.left(planned, ended, at_once))

    async def run(name: str) -> State:
        v, s = todo[name]
        after = {"wait_for": [states[n] for n in (*(v.where.named(n) for n in v.graph.needs[s]), *same.get(name, [])[:1])]}
        if name in same:
            state: State = await limited(take_over, name, hours, 0, v.reads.get(s, NOTHING))(
                s, v.where, same[name][1].where, **after, return_state=True
            )
            if state.is_completed():
                return state
            log.warning("%s is run: what %s made does not fit", name, same[name][0])
        if s.partition("@")[0] in theirs:
            limits = {"hours": hours, "retries": retries}
            above = [n for n in v.graph.upstream([s]) if n != s]
            task = limited(run_stage_elsewhere, name, None, retries, v.reads.get(s, NOTHING))
            state = await task(s, v.where, above, deployment, limits, **after, return_state=True)
        else:
            state = await limited(run_stage, name, hours, retries, v.reads.get(s, NOTHING))(
                s, v.where, **after, return_state=True
            )
        return state

    began = time.monotonic()
    failed = await in_order(needs, start, at_once, {name for name, (_, s) in todo.items() if s.partition("@")[0] in theirs})
    log.info("%d stages in %s", len(todo), timedelta(seconds=round(time.monotonic() - began)))
    undone = dag.Dag({name: frozenset(above) for name, above in needs.items()}).affected(failed)
    await told(variants, undone, workspace)
    if failed:
        held = [name for name in undone if name not in failed]
        for name in held:  # Prefect shows it as NotReady
            v, s = todo[name]
            after = {"wait_for": [states[n] for n in needs[name]]}
            states[name] = await limited(run_stage, name, hours, 0)(s, v.where, **after, return_state=True)
        why = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise NotAllDone(why + (f". Not run: {', '.join(held)}" if held else ""))
    return Completed(message=attempt.told(str(state.name) for state in states.values()))


def needed(variant: Variant, stage: str, todo: Mapping[str, object]) -> set[str]:
    """What is to do before a stage, as the run calls it."""
    return {name for n in variant.graph.needs[stage] if (name := variant.where.named(n)) in todo}


async def restored(variant: Variant, stages: list[str]) -> None:
    """Take what DVC has of `stages` from its cache or from the remote, so that none of them queues for a worker."""
    where = variant.where
    pull = [s for s in variant.todo if variant.changes.get(s, plan.UNCHANGED).only_missing] if where.share else []
    if where.force or not (pull or stages):
        return
    name = where.named("restore")
    task: Any = restore.with_options(name=name, task_run_name=name)
    await task(where, stages, [s for s in pull if s not in stages], return_state=True)
    await ask(variant)


async def looked(variant: Variant, hours: float, retries: int) -> dict[str, State]:
    """The states of the stages that look at what DVC cannot watch, by name: what they find decides what is stale. One that cannot
    look is still to do, and holds up those that need it."""
    states = dict[str, State]()
    for s in [] if variant.where.force else dag.looking(variant.changes):
        name = variant.where.named(s)
        task = limited(run_stage, name, hours, retries, variant.reads.get(s, NOTHING))
        state: State = await task(s, variant.where, return_state=True)
        if state.is_completed():
            variant.looked.add(s)
            states[name] = state
        else:
            get_run_logger().warning("%s: %s", name, state.message)
    if states:
        await ask(variant)
    return states


async def no_work(variants: list[Variant], others: Set[str], before: Set[str]) -> dict[str, State]:
    """The states of the stages that are up to date, by name; those of `before` were restored. What an earlier run could not push
    is pushed now. `others`: those that are to do, or are done."""
    here = {v.where.named(s): (v, s) for v in variants for s in v.wanted if v.where.named(s) not in others}

    async def of(name: str) -> State:
        v, s = here[name]
        task: Any
        args: tuple[Any, ...]
        if v.where.share and attempt.unpushed(s, v.where).is_file():
            task, args = limited(push_again, name, None, 2), (s, v.where)
        else:
            task = up_to_date.with_options(name=name, task_run_name=name)
            args = (s, "Restored" if name in before else "Cached")
        state: State = await task(*args, return_state=True)
        return state

    return dict(zip(here, await asyncio.gather(*map(of, here)), strict=True))


async def told(variants: list[Variant], undone: list[str], workspace: Path) -> None:
    """Tell MLflow and Prefect what was made, and keep each variant that is done as an experiment of DVC.

    `undone`: the stages that failed, and those that were not run because of them.
    """
    for v in variants:
        await tracking.flush(v.where)
    current = {v.where.label: [s for s in v.wanted if v.where.named(s) not in undone] for v in variants}
    if variants[0].where.label:
        await sweep.show(variants, {v.where.label: _end(v, undone) for v in variants}, workspace)
    elif "compare" in current[""]:
        await tracking.compared(variants[0].where)
    for v in variants:
        await tracking.linked(v.where, current[v.where.label])
        if v.where.folder != workspace and len(current[v.where.label]) == len(v.wanted):
            await asyncio.to_thread(keep, v, workspace)


def _end(variant: Variant, undone: list[str]) -> str:
    missing = [s for s in variant.wanted if variant.where.named(s) in undone]
    return f"without {', '.join(missing[:2])}{' ...' if missing[2:] else ''}" if missing else "done"


def keep(variant: Variant, workspace: Path) -> None:
    """Save what a variant made as an experiment of DVC, and remove its folder."""
    folder, changes = variant.where.folder, " ".join(variant.combination.set_params)
    name = re.sub(r"[^A-Za-z0-9]+", "-", changes)[:60].strip("-")
    dag.call(
        folder, "exp", "save", "--force", "--name", f"{name}-{folder.name[:6]}", *variant.wanted
    )  # else it wants every output
    worktree.remove(workspace, folder)


async def gpu_deployment() -> tuple[str | None, frozenset[str]]:
    """The deployment of pools.yaml if Prefect has it, and the stages that go there."""
    table = yaml.safe_load(POOLS.read_text())
    try:
        async with get_client() as client:
            await client.read_deployment_by_name(table["deployment"])
    except ObjectNotFound:
        return None, frozenset()
    return table["deployment"], frozenset(table["stages"])
