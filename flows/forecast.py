"""The plan of a flow run, as an artifact of it."""

import asyncio
import json
import os
from collections.abc import Mapping, Sequence, Set
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import acreate_markdown_artifact

from flows import child, dag, plan
from flows.attempt import artifact_key, run_title
from flows.variant import Variant

WIDTH = 110  # of a log on the page of a run at 1280 pixels, in characters


async def show(
    variants: Sequence[Variant], shared: Mapping[str, tuple[str, Variant]], elsewhere: Set[str]
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Make the plan of what is to do an artifact, and show it in the log, which needs no click.

    Returns the seconds that are expected of each stage, and for each label the stages that DVC would restore. `shared`: what an
    earlier variant does, see `variant.shared`. `elsewhere`: the verbs that another machine does, of which nothing is known here.
    A plan or a time that cannot be told stops no run. With WINNOW_PROBE=off nothing is measured for it.
    """
    planned, restored, parts, sentences = dict[str, float](), dict[str, list[str]](), list[str](), list[str]()
    for v in variants:
        if not v.todo:
            continue
        try:
            found = await asyncio.to_thread(plan.looked, v.where.folder, v.graph, v.wanted, v.changes, v.where.force)
        except Exception as error:  # it asks DVC what no command of DVC says, in ways that an update may change
            get_run_logger().warning("there is no plan of this run: %r", error)
            return {}, {}
        there = {s: shared[v.where.named(s)][0] for s in found.runs if v.where.named(s) in shared}
        asked = [s for s in found.runs if s.partition("@")[0] not in elsewhere and s not in there]
        made = plan.together(found, await _estimate(v, asked), elsewhere, there)
        planned |= {v.where.named(row.stage): row.seconds for row in made.rows if row.seconds is not None}
        restored[v.where.label] = [s for s in found.todo if s in found.restored]
        parts += [*([f"### {v.where.label}"] if v.where.label else []), made.markdown()]
        sentences.append("\n".join([*([f"{v.where.label}:"] if v.where.label else []), made.text(WIDTH)]))
    if parts:
        text = f"What {run_title()} does, why, and for how long"
        await acreate_markdown_artifact("\n\n".join(parts), key=artifact_key("plan"), description=text)
        get_run_logger().info("\n".join(sentences))
    return planned, restored


async def _estimate(variant: Variant, stages: Sequence[str]) -> dict[str, Any]:
    """What is expected of the stages; nothing where it cannot be told."""
    if not stages:
        return {}
    where, probing = variant.where, ["--no-probe"] if os.environ.get("WINNOW_PROBE") == "off" else []
    ended = await child.run(plan.estimating(stages, *probing), cwd=where.folder, env={**dag.environment(), **where.env})
    if ended.code:
        get_run_logger().warning("nobody knows how long the stages take: %s", ended.lines[-1] if ended.lines else ended.code)
        return {}
    return dict(json.loads(ended.lines[-1]))
