"""Prefect's part: when and where the stages of dvc.yaml run. DVC alone says what they are, and which are stale.

    winnow    the whole pipeline, or some targets of it, with the params as they are or changed for this run
    stage     one stage on a worker that has a GPU, for a `winnow` that runs elsewhere

`winnow` starts a stage as soon as all it needs is up to date, as a task that runs `dvc repro --single-item`. A stage that failed
holds up those that need it and no others.
"""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import yaml
from prefect import flow, get_client, get_run_logger, runtime, task
from prefect.artifacts import (
    acreate_link_artifact,
    acreate_markdown_artifact,
    acreate_progress_artifact,
    acreate_table_artifact,
    aupdate_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, State
from prefect.task_engine import TaskRunTimeoutError

from flows import child, dag, worktree
from flows.dag import Dag

POOLS = Path(__file__).with_name("pools.yaml")
TABLE = Path("data", "compare", "results", "table.md")
RETRY_SECONDS = [10.0, 60.0, 300.0]
OUTCOME = "outcome"

# Exit codes of a stage (pipeline/stage.py) that no repetition will change: its own message says what to mend.
WRONG_INPUT, DEFECT, INTERRUPTED = 2, 1, 130

_EXITED = re.compile(r"failed to run: .*, exited with (-?\d+)", re.S)
_ROOT_CAUSE = re.compile(r"Root Cause.*?exitcode *: (-?\d+)", re.S)  # torchrun's report; its own exit code is always 1
_PROGRESS = re.compile(r"^(?P<label>.+?): (?P<n>[\d,]+) of (?P<total>[\d,]+) ")
_BUSY = re.compile(r"is busy, it is being blocked by|Unable to acquire lock|another process is running the stage")


class StageFailed(Exception):
    """A stage did not end well; `again`: whether a repetition may help (its process was killed, a lock, a disk, the network)."""

    def __init__(self, message: str, again: bool) -> None:
        super().__init__(message)
        self.again = again


class WrongParams(Exception):
    """params.yaml has mistakes: all of them."""


class NotAllDone(Exception):
    """Some stages failed: which, and what was held up by them."""


@dataclass(frozen=True)
class Where:
    """The folder a run works in, and what its stages get from the run."""

    folder: Path
    workspace: Path
    force: bool
    env: dict[str, str] = field(default_factory=dict)
    share: bool = False  # push what a stage made to the DVC remote, and pull what the lock knows


def verdict(ended: child.Ended) -> StageFailed:
    """Why `dvc repro` of a stage failed, from its last lines: DVC's own exit code is always 255."""
    exited = _ROOT_CAUSE.search(ended.text) or _EXITED.search(ended.text)
    code = int(exited.group(1)) if exited else None
    said = next((line for line in reversed(ended.lines) if line.startswith("error: ")), "").removeprefix("error: ")
    if _BUSY.search(ended.text):
        return StageFailed("another process works on this stage or waits for it", again=True)
    if code is None:  # DVC itself: killed, or out of reach of its lock, its cache, its remote
        return StageFailed(f"dvc ended with {ended.code}: {ended.lines[-1] if ended.lines else 'no word'}", again=True)
    if code in (WRONG_INPUT, DEFECT, INTERRUPTED):
        return StageFailed(said or f"the stage ended with {code}", again=False)
    return StageFailed(said or f"the stage was killed or could not go on ({code})", again=True)


def may_retry(_: Any, __: Any, state: State) -> bool:
    """Prefect asks after each failed attempt; `state.data` is what was raised."""
    why = state.data
    if isinstance(why, StageFailed):
        return why.again
    return not isinstance(why, dag.DVCError | worktree.WorktreeError | TaskRunTimeoutError)


class Listener:
    """Hears the lines of a stage. Each goes to the run's log; `scoring: 10 of 80 images` moves a progress artifact.

    `outcome`: Cached until DVC says that it runs the stage (Completed) or takes it from its cache (Restored).
    """

    def __init__(self, stage: str) -> None:
        self.stage, self.log, self.outcome = stage, get_run_logger(), "Cached"
        self.artifact: UUID | None = None

    async def hear(self, line: str) -> None:
        self.log.info(line)
        if line.startswith(f"Running stage '{self.stage}'"):
            self.outcome = "Completed"
        elif line.startswith(f"Stage '{self.stage}' is cached"):
            self.outcome = "Restored"
        elif found := _PROGRESS.match(line):
            n, total = (int(found[group].replace(",", "")) for group in ("n", "total"))
            await self.show(100 * n / max(total, 1), line)

    async def show(self, percent: float, line: str) -> None:
        try:
            if self.artifact is None:
                self.artifact = await acreate_progress_artifact(
                    percent, key=artifact_key(self.stage, "progress"), description=line
                )
            else:
                await aupdate_progress_artifact(self.artifact, percent, description=line)
        except httpx.HTTPError as error:  # the server is away for a moment: no reason to stop a training
            self.log.warning("progress is not shown: %r", error)


def artifact_key(*words: str) -> str:
    """A key for this flow run: keys are shared by all of them, and may hold lower-case letters, digits and dashes."""
    run = str(runtime.flow_run.id or "none")
    return re.sub(r"[^a-z0-9]+", "-", "-".join(["winnow", *words, run[-12:]]).lower())


async def repro(stage: str, where: Where) -> str:
    """Bring a stage up to date in this folder; returns what happened: Completed, Restored (from DVC's cache) or Cached.

    Raises StageFailed.
    """
    listener = Listener(stage)
    env = {**dag.environment(), **where.env}
    ended = await child.run(dag.repro(stage, where.force), cwd=where.folder, env=env, line=listener.hear)
    if ended.code:
        raise verdict(ended)
    if listener.artifact is not None:
        await listener.show(100.0, f"{stage}: done")
    return listener.outcome


async def exchange(what: str, stages: Sequence[str], where: Where, *, strict: bool = True) -> None:
    """`dvc push` or `dvc pull` of some stages. `strict`: a remote that cannot be reached fails the task, and is tried again."""
    if not (stages and where.share):
        return
    ended = await child.run(dag.command(what, *stages), cwd=where.folder, env={**dag.environment(), **where.env})
    if ended.code and strict:
        raise StageFailed(f"dvc {what} {' '.join(stages)}: {ended.lines[-1] if ended.lines else ended.code}", again=True)
    if ended.code:
        get_run_logger().warning("dvc %s: %s", what, ended.text)


@task(cache_policy=NO_CACHE, persist_result=False)
async def run_stage(stage: str, where: Where, pull: Sequence[str] = (), strict: bool = True) -> State:
    """Bring one stage up to date in this folder, with what it needs from the remote and for it; see `repro` for the states."""
    await exchange("pull", pull, where, strict=strict)
    outcome = await repro(stage, where)
    await exchange("push", [stage], where)  # whatever the outcome: an attempt before this one may have failed to
    return Completed(name=outcome, message=stage)


@task(cache_policy=NO_CACHE, persist_result=False)
async def run_stage_elsewhere(
    stage: str, where: Where, needs: Sequence[str], deployment: str, limits: Mapping[str, Any]
) -> State:
    """Have a worker of another pool run the stage, and take over what it made."""
    await exchange("push", needs, where)
    return Completed(name=await run_elsewhere(stage, where, deployment, limits), message=stage)


@task(cache_policy=NO_CACHE, persist_result=False)
async def up_to_date(stage: str) -> State:
    """A stage with nothing to do."""
    return Completed(name="Cached", message=f"{stage}: nothing changed since it ran")


async def run_elsewhere(stage: str, where: Where, deployment: str, limits: Mapping[str, Any]) -> str:
    """A run of the flow `stage`, and its outcome."""
    token = where.folder / ".scratch" / "flows" / f"{runtime.flow_run.id}.{stage}"
    token.parent.mkdir(parents=True, exist_ok=True)
    token.write_text("a worker that sees this file has the same disk\n")
    try:
        parameters = {
            "name": stage,
            "workspace": str(where.workspace),
            "folder": str(where.folder),
            "token": str(token),
            "commit": worktree.git(where.folder, "rev-parse", "HEAD"),
            "changed": worktree.changed(where.folder),
            "params": (where.folder / "params.yaml").read_text(),
            "lock": (where.folder / "dvc.lock").read_text() if (where.folder / "dvc.lock").is_file() else "",
            "force": where.force,
            **limits,
            "tags": json.loads(where.env.get("WINNOW_TAGS", "{}")),
        }
        get_run_logger().info("%s: waiting for a worker of %s", stage, deployment)
        run = await arun_deployment(deployment, parameters=parameters, flow_run_name=stage, poll_interval=1)
    finally:
        token.unlink(missing_ok=True)
    state = run.state
    if state is None or not state.is_completed():
        crashed = state is None or state.is_crashed()
        raise StageFailed(
            f"{run.name} on {deployment}: {state.message if state else 'lost'}", again=crashed
        )  # it tried again itself
    async with get_client() as client:
        found = await client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]), key=ArtifactFilterKey(like_=f"%-{OUTCOME}-%")
            )
        )
    facts = {row["what"]: row["content"] for row in json.loads(str(found[0].data))}
    if "dvc.lock" in facts:  # it worked in another clone
        entry = yaml.safe_load(facts.pop("dvc.lock"))
        what = facts.pop("outcome")
        await asyncio.to_thread(dag.adopt, where.folder, stage, entry, facts)
        return what
    return facts["outcome"]


@flow(name="stage", flow_run_name="{name}", persist_result=False)
async def stage(
    name: str,
    workspace: str,
    folder: str,
    token: str,
    commit: str,
    changed: list[str],
    params: str,
    lock: str,
    force: bool = False,
    hours: float = 48.0,
    retries: int = 2,
    tags: dict[str, str] | None = None,
) -> State:
    """One stage of dvc.yaml for a `winnow` that runs elsewhere.

    A worker that was started in the folder of that run (on one machine, or at the same path of a shared disk) works there. Any
    other makes a worktree of its own clone at the same commit, pulls what the stage needs from the DVC remote, pushes what it
    made, and hands back the entry of dvc.lock and the metrics.
    """
    here = Path.cwd()
    env = {"WINNOW_TAGS": json.dumps(tags or {}), "MLFLOW_TRACKING_URI": tracking_uri(here)}
    same = here == Path(workspace) and Path(token).is_file()
    pull: list[str] = []
    if same:
        where = Where(Path(folder), here, force, env)
    else:
        if changed:
            raise StageFailed(
                f"a worker elsewhere cannot see the uncommitted changes of {', '.join(changed)}. Commit, push, repeat.",
                again=False,
            )
        if not dag.has_remote(here):
            raise StageFailed(
                f"the clone of this worker, {here}, is not the run's and has no DVC remote. `dvc remote add --default` one.",
                again=False,
            )
        place = worktree.make(here, commit, key=[name, params], params=params, lock=lock)
        above = dag.read(place).upstream([name])  # all of it: manifests name images in the sources that `prepare` has read
        worktree.link_sources(here, place, dag.missing_sources(place, dag.stale(place, above)))
        where = Where(place, here, force, env, share=True)
        pull = [s for s in above if s != name]
    state = await limited(run_stage, name, hours, retries)(name, where, pull, return_state=True)
    if not state.is_completed():
        return state
    rows = [{"what": "outcome", "content": state.name}]
    if not same:
        rows += [
            {"what": "dvc.lock", "content": yaml.safe_dump(dag.lock_entry(where.folder, name), sort_keys=False)},
            *({"what": path, "content": text} for path, text in dag.loose_files(where.folder, name).items()),
        ]
        await flush(where)
        worktree.remove(here, where.folder)
    await acreate_table_artifact(rows, key=artifact_key(OUTCOME, name), description=f"What {name} hands back to the run")
    return Completed(name=state.name, message=name)


def limited(what: Any, stage: str, hours: float | None, retries: int) -> Any:
    """The task `what` under the name of the stage, with its time limit, tried again where that may help."""
    return what.with_options(
        name=stage, task_run_name=stage, retries=retries, retry_delay_seconds=RETRY_SECONDS, retry_condition_fn=may_retry,
        timeout_seconds=hours and hours * 3600,
    )  # fmt: skip


def title() -> str:
    """The name of a run tells what it runs: `distil@ssld (distil.ssld.loss.name=js)`."""
    given = runtime.flow_run.parameters
    words = " ".join(given.get("targets") or ["everything"])
    changes = " ".join(given.get("set_params") or [])
    return words + (f" ({changes})" if changes else "") + (" forced" if given.get("force") else "")


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
    env = {"WINNOW_TAGS": json.dumps(run_tags()), "MLFLOW_TRACKING_URI": tracking_uri(workspace)}
    graph = await asyncio.to_thread(dag.read, folder)
    plan = graph.upstream(targets or [])
    changes = await asyncio.to_thread(dag.stale, folder, plan)
    if folder != workspace:
        await asyncio.to_thread(worktree.link_sources, workspace, folder, dag.missing_sources(folder, changes))
    where = Where(folder, workspace, force, env, share=await asyncio.to_thread(dag.has_remote, folder))
    todo = [s for s in plan if force or s in graph.affected(changes)]
    log.info("%d of %d stages are up to date, to do: %s", len(plan) - len(todo), len(plan), ", ".join(todo) or "nothing")
    await asyncio.gather(*(up_to_date.with_options(name=s, task_run_name=s)(s) for s in plan if s not in todo))
    deployment, theirs = await gpu_deployment() if elsewhere else (None, frozenset[str]())

    async def start(s: str) -> None:
        if s.partition("@")[0] in theirs:
            limits = {"hours": hours, "retries": retries}
            above = [n for n in graph.upstream([s]) if n != s]
            await limited(run_stage_elsewhere, s, None, retries)(s, where, above, deployment, limits)
        else:
            pull = [s] if dag.only_outputs_missing(changes.get(s, [])) else []
            await limited(run_stage, s, hours, retries)(s, where, pull, strict=False)

    began = time.monotonic()
    failed = await in_order(graph, todo, start, at_once, theirs)
    log.info("%d stages in %s", len(todo), timedelta(seconds=round(time.monotonic() - began)))
    await flush(where)
    affected = graph.affected(failed)
    await report(where, [s for s in plan if s not in affected])
    if failed:
        held = [s for s in todo if s in affected and s not in failed]
        why = "; ".join(f"{s}: {error}" for s, error in failed.items())
        raise NotAllDone(why + (f". Not run: {', '.join(held)}" if held else ""))
    if folder != workspace:
        name = re.sub(r"[^A-Za-z0-9]+", "-", " ".join(set_params or []))[:60].strip("-")
        save = ("exp", "save", "--force", "--name", f"{name}-{folder.name[:6]}", *plan)  # without names it wants every output
        saved = await asyncio.to_thread(dag.call, folder, *save)
        log.info(saved.strip())
        worktree.remove(workspace, folder)
    return Completed(message=f"{len(todo)} stages run, {len(plan) - len(todo)} cached" if todo else f"{len(plan)} stages cached")


async def check(folder: Path) -> None:
    """Raises WrongParams with all that is wrong in params.yaml: a stage would say so only when DVC has removed its old output."""
    ended = await child.run(["python", "-m", "pipeline", "check"], cwd=folder, env=dag.environment())
    if ended.code:
        raise WrongParams(ended.text.partition("error: ")[2] or ended.text)


def variant(workspace: Path, set_params: list[str]) -> Path:
    """A worktree with the tracked files as they are now, and the changed params."""
    head, tree = worktree.git(workspace, "rev-parse", "HEAD"), worktree.tree(workspace)
    folder = worktree.make(workspace, head, key=[tree, *set_params], tree=tree)
    worktree.git(folder, "checkout", "--quiet", tree, "--", "params.yaml")
    dag.override(folder, set_params)
    return folder


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


async def gpu_deployment() -> tuple[str | None, frozenset[str]]:
    """The deployment of pools.yaml if Prefect has it, and the stages that go there."""
    table = yaml.safe_load(POOLS.read_text())
    try:
        async with get_client() as client:
            await client.read_deployment_by_name(table["deployment"])
    except ObjectNotFound:
        return None, frozenset()
    return table["deployment"], frozenset(table["stages"])


def run_tags() -> dict[str, str]:
    """What a run in MLflow says about the flow run that made it."""
    return {"prefect.flow_run_id": str(runtime.flow_run.id), "prefect.flow_run_name": str(runtime.flow_run.name)}


def tracking_uri(workspace: Path) -> str:
    """MLFLOW_TRACKING_URI, or the database of the workspace."""
    return dag.environment().get("MLFLOW_TRACKING_URI", f"sqlite:///{workspace / 'mlflow.db'}")


async def flush(where: Where) -> None:
    """Wait until MLflow has what the stages told; a server that is away is no failure."""
    command = ["python", "-m", "pipeline.tracking", "flush"]
    ended = await child.run(command, cwd=where.folder, env={**dag.environment(), **where.env})
    get_run_logger().info(ended.text)


async def report(where: Where, current: list[str]) -> None:
    """The comparison, and links to the run in MLflow and to the champion there, as artifacts of the run.

    `current`: the stages of this run that are up to date.
    """
    table = where.folder / TABLE
    if "compare" in current and table.is_file():
        await acreate_markdown_artifact(table.read_text(), key=artifact_key("comparison"), description="All models, measured")
    command = ["python", "-m", "pipeline.tracking.champion", *(s.replace("@", ".") for s in current)]
    ended = await child.run(command, cwd=where.folder, env={**dag.environment(), **where.env})
    if ended.code:
        get_run_logger().warning("MLflow has no run of this whole run: %s", ended.text)
        return
    for what, link in json.loads(ended.lines[-1]).items():
        await acreate_link_artifact(
            link, link_text=f"{what} in MLflow", key=artifact_key("mlflow", what), description=f"MLflow: {what}"
        )
