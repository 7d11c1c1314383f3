"""The page of a comparison's stages: what each reads, how long it took, and whether it ran or DVC had its outcome already."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from pipeline.report import dag
from pipeline.store import artifact
from pipeline.tracking.comparison import Row

TEMPLATE = Path(__file__).with_name("stages.html.jinja")
PAGE = Path("data", "compare", "stages.html")


def write(record: Mapping[str, Any], rows: Sequence[Row], seconds: float, files: Path) -> None:
    """Write the page of the comparison `record` into the folder `files`, and to PAGE where it is the one on the disk.

    `rows`: its stages. `seconds`: how long the comparison itself took.
    """
    page = render(record, rows, seconds)
    (files / PAGE.name).write_text(page)
    results = PAGE.with_name("results")
    if results.is_dir() and artifact.record(results).get("key") == record["key"]:
        with artifact.writing_file(PAGE) as tmp:
            tmp.write_text(page)


def render(record: Mapping[str, Any], rows: Sequence[Row], seconds: float) -> str:
    """One page without outside references."""
    took = {row["key"]: row["seconds"] for row in rows if row["seconds"] is not None}
    states = {row["key"]: row["status"] for row in rows}
    ordered = dag.nodes(record["lineage"], {**took, "compare": seconds}, {**states, "compare": "executed"})
    ran = [node for node in ordered if node.state == "executed"]
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return template.from_string(TEMPLATE.read_text()).render(
        title=record["params"].get("title") or "The comparison",
        total=len(ordered),
        ran=len(ran),
        time=dag.clock(sum(node.seconds or 0 for node in ran)),
        cached=sum(node.state == "unchanged" for node in ordered),
        restored=sum(node.state == "restored" for node in ordered),
        drawing=dag.svg(ordered),
    )
