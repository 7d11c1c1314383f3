"""What stands for a stage in a flow run: a task that runs it here, has it run elsewhere, or says that there is nothing to do."""

import asyncio
import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from prefect import get_client, get_run_logger, runtime, task
from prefect.assets import Asset, AssetProperties, add_asset_metadata, materialize
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.deployments import arun_deployment
from prefect.states import Completed, State

from flows import attempt, dag, worktree
from flows.adapter import dvc, prefect
from flows.attempt import StageFailed, Where

RETRY_SECONDS = [10.0, 60.0, 300.0]
OUTCOME = "outcome"
NOTHING = dvc.Read((), (), "")


async def run_stage(stage: str, where: Where, pull: Sequence[str] = (), strict: bool = True) -> State:
    """Bring one stage up to date in this folder, with what it needs from the remote and for it; see `repro` for the states."""
    await attempt.exchange("pull", pull, where, strict=strict)
    outcome = await attempt.share(stage, await attempt.repro(stage, where), where)
    _describe(stage, where)
    return Completed(name=outcome, message=stage)


async def run_stage_elsewhere(
    stage: str, where: Where, needs: Sequence[str], deployment: str, limits: Mapping[str, Any]
) -> State:
    """Have a worker of another pool run the stage, and take over what it made."""
    await attempt.exchange("push", needs, where)
    outcome = await run_elsewhere(stage, where, deployment, limits)
    _describe(stage, where)
    return Completed(name=outcome, message=stage)


async def take_over(stage: str, where: Where, other: Where) -> State:
    """Take what another variant of the sweep made of the same params and inputs. Raises DVCError where they are not the same."""
    entry, files = dag.lock_entry(other.folder, stage), dag.loose_files(other.folder, stage)
    await asyncio.to_thread(dag.adopt, where.folder, stage, entry, files, "checkout")
    await attempt.share(stage, "Cached", where)
    return Completed(name="Restored", message=f"{stage}: as in {other.label}")


async def push_again(stage: str, where: Where) -> State:
    """Push what an earlier run made and could not push."""
    await attempt.share(stage, "Cached", where)
    return Completed(name="Pushed", message=f"{stage}: an earlier run made it and could not push it")


@task(cache_policy=NO_CACHE, persist_result=False)
async def restore(where: Where, stages: Sequence[str], pull: Sequence[str]) -> State:
    """Take what DVC has from its cache, and from the remote, before anything runs or waits for a worker: one command for all."""
    await attempt.exchange("pull", pull, where, strict=False)
    restored = await attempt.restore(stages, where) if stages else []
    return Completed(message=", ".join(restored) or "nothing")


@task(cache_policy=NO_CACHE, persist_result=False)
async def up_to_date(stage: str, outcome: str = "Cached") -> State:
    """A stage with nothing to do."""
    why = "taken from DVC's cache" if outcome == "Restored" else "nothing changed since it ran"
    return Completed(name=outcome, message=f"{stage}: {why}")


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
        run = await arun_deployment(deployment, parameters=parameters, flow_run_name=where.named(stage), poll_interval=1)
    finally:
        token.unlink(missing_ok=True)
    state = run.state
    if state is None or not state.is_completed():
        crashed = state is None or state.is_crashed()
        raise StageFailed(
            f"{run.name} on {deployment}: {state.message if state else 'lost'}", again=crashed
        )  # it tried again itself
    async with get_client() as client:
        artifacts = await client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]), key=ArtifactFilterKey(like_=f"%-{OUTCOME}-%")
            )
        )
    facts = {row["what"]: row["content"] for row in json.loads(str(artifacts[0].data))}
    outcome = str(facts.pop("outcome"))
    if "dvc.lock" in facts:  # it worked in another clone
        entry = yaml.safe_load(facts.pop("dvc.lock"))
        outcome = attempt.remembered(stage, outcome, where)
        try:
            await asyncio.to_thread(dag.adopt, where.folder, stage, entry, facts)
        except dag.Unreachable as error:  # it was made: the next attempt finds it there, and has only to pull it
            raise StageFailed(str(error), again=True) from error
        attempt.delivered(stage, where)
    return outcome


def asset(path: str) -> Asset:
    """An artifact as Prefect's lineage knows it: by its path, whichever run made it."""
    return Asset(key=asset_key(path), properties=AssetProperties(name=path.removeprefix("data/")))


def asset_key(path: str) -> str:
    """`dvc://data/distil/ssld`; Prefect takes few characters."""
    return "dvc://" + re.sub(r"[^A-Za-z0-9._/-]", "_", path)


def _describe(stage: str, where: Where) -> None:
    """Tell the content of the artifacts that a stage made, which their keys do not."""
    of = {"stage": stage, **({"variant": where.label} if where.label else {})}
    for out in dvc.locked(where.folder).get(stage, {}).get("outs") or []:
        with contextlib.suppress(ValueError):  # its metrics, which are no assets
            add_asset_metadata(asset_key(out["path"]), {"md5": out["md5"], "bytes": out["size"], **of})


def may_retry(_: Any, __: Any, state: State) -> bool:
    """Prefect asks after each failed attempt."""
    why = prefect.raised(state)
    if isinstance(why, StageFailed):
        return why.again
    return not (prefect.timed_out(why) or isinstance(why, dag.DVCError | worktree.WorktreeError))


def limited(what: Any, stage: str, hours: float | None, retries: int, read: dvc.Read = NOTHING) -> Any:
    """The function `what` as a task with the name of the stage and its time limit, tried again where that may help.

    `read`: the paths of the stage, whose outputs it materialises.
    """
    options: Any = {
        "name": stage, "task_run_name": stage, "cache_policy": NO_CACHE, "persist_result": False, "retries": retries,
        "retry_delay_seconds": RETRY_SECONDS, "retry_condition_fn": may_retry, "timeout_seconds": hours and hours * 3600,
        "asset_deps": [asset(path) for path in read.deps if path.startswith("data/")],
    }  # fmt: skip
    made = [asset(path) for path in read.outs]
    return materialize(*made, by="dvc", **options)(what) if made else task(**options)(what)
