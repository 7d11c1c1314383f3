"""The plan of a flow run, as an artifact of it."""

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import acreate_markdown_artifact

from flows import child, dag, plan
from flows.adapter.dvc import Changes
from flows.attempt import Where, artifact_key


async def show(
    where: Where,
    graph: dag.Dag,
    wanted: Sequence[str],
    todo: Sequence[str],
    changes: Mapping[str, Changes],
    elsewhere: frozenset[str],
) -> dict[str, float]:
    """Make the plan of the stages `todo` an artifact, and say in the log what it comes to; the seconds that are expected of each.

    `elsewhere`: stages that another machine does, of which nothing is known here. A plan or a time that cannot be told stops no
    run. With WINNOW_PROBE=off nothing is measured for it.
    """
    if not todo:
        return {}
    try:
        found = await asyncio.to_thread(plan.looked, where.folder, graph, wanted, changes, where.force)
    except Exception as error:  # it asks DVC what no command of DVC says, in ways that an update may change
        get_run_logger().warning("there is no plan of this run: %r", error)
        return {}
    asked = [s for s in found.runs if s.partition("@")[0] not in elsewhere]
    answer: dict[str, Any] = {}
    if asked:
        probing = ["--no-probe"] if os.environ.get("WINNOW_PROBE") == "off" else []
        ended = await child.run(plan.estimating(asked, *probing), cwd=where.folder, env={**dag.environment(), **where.env})
        if ended.code:
            get_run_logger().warning("nobody knows how long the stages take: %s", ended.lines[-1] if ended.lines else ended.code)
        else:
            answer = json.loads(ended.lines[-1])
    made = plan.together(found, answer, elsewhere)
    await acreate_markdown_artifact(
        made.markdown(), key=artifact_key("plan"), description="What this run does, why, and for how long"
    )
    get_run_logger().info(made.sentence())
    return {row.stage: row.seconds for row in made.rows if row.seconds is not None}
