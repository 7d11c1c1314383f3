"""What MLflow gets to know of a flow run, and what the flow run shows of MLflow."""

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from prefect import get_run_logger, runtime
from prefect.artifacts import acreate_link_artifact, acreate_markdown_artifact

from flows import child, dag
from flows.attempt import Where, artifact_key, run_title

TABLE = Path("data", "compare", "results", "table.md")


def tags() -> dict[str, str]:
    """What a run in MLflow says about the flow run that made it."""
    return {"prefect.flow_run_id": str(runtime.flow_run.id), "prefect.flow_run_name": str(runtime.flow_run.name)}


def uri(workspace: Path) -> str:
    """MLFLOW_TRACKING_URI, or the database of the workspace."""
    return dag.environment().get("MLFLOW_TRACKING_URI", f"sqlite:///{workspace / 'mlflow.db'}")


async def flush(where: Where) -> None:
    """Wait until MLflow has what the stages told; a server that is away is no failure."""
    command = ["python", "-m", "pipeline.tracking", "flush"]
    ended = await child.run(command, cwd=where.folder, env={**dag.environment(), **where.env})
    get_run_logger().info(ended.text)


async def compared(where: Where) -> None:
    """The comparison as an artifact of the run."""
    table = where.folder / TABLE
    if table.is_file():
        text = f"All models, measured, in {run_title()}"
        get_run_logger().info("%s", table.read_text())
        await acreate_markdown_artifact(table.read_text(), key=artifact_key("comparison"), description=text)


async def linked(where: Where, current: Sequence[str]) -> None:
    """Links to the run in MLflow and to the champion there, as artifacts of the run.

    `current`: the stages of this run that are up to date. Where no MLflow listens the artifact says how to start one.
    """
    command = ["python", "-m", "pipeline.tracking.champion", *(s.replace("@", ".") for s in current)]
    ended = await child.run(command, cwd=where.folder, env={**dag.environment(), **where.env})
    if ended.code:
        get_run_logger().warning("MLflow has no run of this whole run: %s", ended.text)
        return
    for what, link in json.loads(ended.lines[-1]).items():
        key, text = artifact_key("mlflow", what, where.label), f"MLflow: {what} of {run_title()}"
        if await listens(link):
            await acreate_link_artifact(link, link_text=f"{what} in MLflow", key=key, description=text)
        else:
            start = f"`mlflow ui --backend-store-uri sqlite:///mlflow.db` in {where.workspace}"
            page = urlsplit(link).fragment
            await acreate_markdown_artifact(
                f"No MLflow listens there now. Say {start}, then open\n\n`{link}`\n\n({page})", key=key, description=text
            )


async def listens(link: str) -> bool:
    """Whether an MLflow answers at the address of a link."""
    address = urlsplit(link)
    try:
        async with httpx.AsyncClient(timeout=3.0) as client:
            return (await client.get(f"{address.scheme}://{address.netloc}/health")).text.strip() == "OK"
    except httpx.HTTPError:
        return False
