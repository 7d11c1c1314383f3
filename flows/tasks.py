"""What stands for a stage in a flow run: a task that runs it here, has it run elsewhere, or says that there is nothing to do."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from prefect import get_client, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.deployments import arun_deployment
from prefect.states import Completed, State

from flows import attempt, dag, worktree
from flows.adapter import prefect
from flows.attempt import StageFailed, Where

RETRY_SECONDS = [10.0, 60.0, 300.0]
OUTCOME = "outcome"


@task(cache_policy=NO_CACHE, persist_result=False)
async def run_stage(stage: str, where: Where, pull: Sequence[str] = (), strict: bool = True) -> State:
    """Bring one stage up to date in this folder, with what it needs from the remote and for it; see `repro` for the states."""
    await attempt.exchange("pull", pull, where, strict=strict)
    outcome = attempt.OUTCOMES.keep(stage, await attempt.repro(stage, where))
    await attempt.exchange("push", [stage], where)  # whatever the outcome: an attempt before this one may have failed to
    return Completed(name=outcome, message=stage)


@task(cache_policy=NO_CACHE, persist_result=False)
async def run_stage_elsewhere(
    stage: str, where: Where, needs: Sequence[str], deployment: str, limits: Mapping[str, Any]
) -> State:
    """Have a worker of another pool run the stage, and take over what it made."""
    await attempt.exchange("push", needs, where)
    outcome = attempt.OUTCOMES.keep(stage, await run_elsewhere(stage, where, deployment, limits))
    return Completed(name=outcome, message=stage)


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
        artifacts = await client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]), key=ArtifactFilterKey(like_=f"%-{OUTCOME}-%")
            )
        )
    facts = {row["what"]: row["content"] for row in json.loads(str(artifacts[0].data))}
    if "dvc.lock" in facts:  # it worked in another clone
        entry = yaml.safe_load(facts.pop("dvc.lock"))
        what = facts.pop("outcome")
        try:
            await asyncio.to_thread(dag.adopt, where.folder, stage, entry, facts)
        except dag.Unreachable as error:  # it was made: the next attempt finds it there, and has only to pull it
            raise StageFailed(str(error), again=True) from error
        return what
    return facts["outcome"]


def may_retry(_: Any, __: Any, state: State) -> bool:
    """Prefect asks after each failed attempt."""
    why = prefect.raised(state)
    if isinstance(why, StageFailed):
        return why.again
    return not (prefect.timed_out(why) or isinstance(why, dag.DVCError | worktree.WorktreeError))


def limited(what: Any, stage: str, hours: float | None, retries: int) -> Any:
    """The task `what` under the name of the stage, with its time limit, tried again where that may help."""
    return what.with_options(
        name=stage, task_run_name=stage, retries=retries, retry_delay_seconds=RETRY_SECONDS, retry_condition_fn=may_retry,
        timeout_seconds=hours and hours * 3600,
    )  # fmt: skip
