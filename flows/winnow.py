"""The flow of the whole pipeline, or of some targets of it, with the params as they are or changed for this run.

DVC alone says what the stages are, and which are stale. This flow starts a stage as soon as all it needs is up to date, as a task
that runs `dvc repro --single-item`. A stage that failed holds up those that need it and no others.
"""

import asyncio
import json
import re
import time
from datetime import timedelta
from pathlib import Path

import yaml
from prefect import flow, get_client, get_run_logger, runtime
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, State

from flows import child, dag, forecast, plan, tracking, worktree
from flows.attempt import OUTCOMES, Where
from flows.order import in_order
from flows.tasks import limited, run_stage, run_stage_elsewhere, up_to_date

POOLS = Path(__file__).with_name("pools.yaml")


class WrongParams(Exception):
    """params.yaml has mistakes: all of them."""


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
    targets: list[str] | None = None,
    set_params: list[str] | None = None,
    force: bool = False,
    at_once: int = 1,
    hours: float = 48.0,
    retries: int = 2,
    elsewhere: bool = True,
) -> State:
    """Bring the pipeline up to date.

    `targets`: stages (`distil@ssld`, or `distil` for all its entries) with all they need; none: every stage.
    `set_params`: changes of params.yaml for this run, as `dvc exp run -S` takes them; it then works in a folder of its own and
    is kept as a DVC experiment. `force`: run every stage, stale or not. `at_once`: how many stages may run here at a time.
    `hours`: the time limit of one stage. `retries`: of a stage that was killed, or lost its lock, disk or network.
    `elsewhere`: give the stages of pools.yaml to its deployment, where Prefect has one.
    """
    log, workspace = get_run_logger(), Path.cwd()
    folder = workspace
    if set_params:
        folder = await asyncio.to_thread(variant, workspace, set_params)
        log.info("working in %s", folder)
    await check(folder)
    env = {"WINNOW_TAGS": json.dumps(tracking.tags()), "MLFLOW_TRACKING_URI": tracking.uri(workspace)}
    await scan(folder)
    graph = await asyncio.to_thread(dag.read, folder)
    wanted = graph.upstream(targets or [])
    changes = await asyncio.to_thread(dag.stale, folder, wanted)
    if folder != workspace:
        await asyncio.to_thread(worktree.link_sources, workspace, folder, dag.missing_sources(folder, changes))
        await scan(folder)
    where = Where(folder, workspace, force, env, share=await asyncio.to_thread(dag.has_remote, folder))
    todo = [s for s in wanted if force or s in graph.affected(changes)]
    log.info("%d of %d stages are up to date, to do: %s", len(wanted) - len(todo), len(wanted), ", ".join(todo) or "nothing")
    await asyncio.gather(*(up_to_date.with_options(name=s, task_run_name=s)(s) for s in wanted if s not in todo))
    deployment, theirs = await gpu_deployment() if elsewhere else (None, frozenset[str]())
    planned, ended = await forecast.show(where, graph, wanted, todo, changes, theirs), dict[str, float]()

    async def start(s: str) -> None:
        began = time.monotonic()
        await run(s)
        ended[s] = time.monotonic() - began
        if planned:
            log.info("%s: %s", s, plan.left(planned, ended, at_once))

    async def run(s: str) -> None:
        if s.partition("@")[0] in theirs:
            limits = {"hours": hours, "retries": retries}
            above = [n for n in graph.upstream([s]) if n != s]
            await limited(run_stage_elsewhere, s, None, retries)(s, where, above, deployment, limits)
        else:
            pull = [s] if changes.get(s, plan.UNCHANGED).only_missing else []
            await limited(run_stage, s, hours, retries)(s, where, pull, strict=False)

    began = time.monotonic()
    failed = await in_order(graph, todo, start, at_once, theirs)
    log.info("%d stages in %s", len(todo), timedelta(seconds=round(time.monotonic() - began)))
    await tracking.flush(where)
    affected = graph.affected(failed)
    await tracking.report(where, [s for s in wanted if s not in affected])
    if failed:
        held = [s for s in todo if s in affected and s not in failed]
        why = "; ".join(f"{s}: {error}" for s, error in failed.items())
        raise NotAllDone(why + (f". Not run: {', '.join(held)}" if held else ""))
    if folder != workspace:
        name = re.sub(r"[^A-Za-z0-9]+", "-", " ".join(set_params or []))[:60].strip("-")
        save = ("exp", "save", "--force", "--name", f"{name}-{folder.name[:6]}", *wanted)  # without names it wants every output
        saved = await asyncio.to_thread(dag.call, folder, *save)
        log.info(saved.strip())
        worktree.remove(workspace, folder)
    return Completed(message=OUTCOMES.told(cached=len(wanted) - len(todo)))


async def check(folder: Path, *args: str) -> None:
    """Raises WrongParams with all that is wrong in params.yaml: a stage would say so only when DVC has removed its old output.

    With `--names` of its names alone, which is what has to be known before DVC reads a file that comes from elsewhere.
    """
    ended = await child.run(["python", "-m", "pipeline", "check", *args], cwd=folder, env=dag.environment())
    if ended.code:
        raise WrongParams(ended.text.partition("error: ")[2] or ended.text)


async def scan(folder: Path) -> None:
    """Raises WrongParams with what DVC cannot watch: at a pipe it would wait for ever."""
    ended = await child.run(["python", "-m", "pipeline", "scan"], cwd=folder, env=dag.environment())
    if ended.code:
        raise WrongParams(ended.text.partition("error: ")[2] or ended.text)


def variant(workspace: Path, set_params: list[str]) -> Path:
    """A worktree with the tracked files as they are now, and the changed params."""
    head, tree = worktree.git(workspace, "rev-parse", "HEAD"), worktree.tree(workspace)
    folder = worktree.make(workspace, head, key=[tree, *set_params], tree=tree)
    worktree.git(folder, "checkout", "--quiet", tree, "--", "params.yaml")
    dag.override(folder, set_params)
    return folder


async def gpu_deployment() -> tuple[str | None, frozenset[str]]:
    """The deployment of pools.yaml if Prefect has it, and the stages that go there."""
    table = yaml.safe_load(POOLS.read_text())
    try:
        async with get_client() as client:
            await client.read_deployment_by_name(table["deployment"])
    except ObjectNotFound:
        return None, frozenset()
    return table["deployment"], frozenset(table["stages"])
