"""What MLflow gets to know of a flow run, and what the flow run shows of MLflow."""

import json
from pathlib import Path

from prefect import get_run_logger, runtime
from prefect.artifacts import acreate_link_artifact, acreate_markdown_artifact

from flows import child, dag
from flows.attempt import Where, artifact_key

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
