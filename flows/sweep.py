"""The comparison at the end of a sweep: what was measured in each of its variants, side by side, and once."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from prefect import get_run_logger
from prefect.artifacts import acreate_markdown_artifact

from flows import child, dag
from flows.adapter import dvc
from flows.attempt import artifact_key, run_title
from flows.tracking import TABLE
from flows.variant import Variant, figures, params_of

SWEEPS = Path(".scratch", "sweeps")
EVALUATIONS = Path("data", "evaluate")
COLUMNS = 5  # that fit the page of an artifact at 1280 pixels


def table(variants: Sequence[Variant], ended: Mapping[str, str]) -> str:
    """A line for each variant in Markdown: its values, how it ended, and the figures in which the variants differ."""
    measured = {v.where.label: figures(v) if ended[v.where.label] == "done" else {} for v in variants}
    names = [name for name in dict.fromkeys(name for of_one in measured.values() for name in of_one) if _differ(name, measured)]
    keys = list(variants[0].combination.values)
    head = [*(f"`{key}`" for key in keys), "", *names[:COLUMNS]]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join([*('---' for _ in keys), '---', *('---:' for _ in names[:COLUMNS])])} |"]
    for v in variants:
        of_one = measured[v.where.label]
        cells = [*v.combination.values.values(), ended[v.where.label], *(_number(of_one.get(name)) for name in names[:COLUMNS])]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def _differ(name: str, measured: Mapping[str, Mapping[str, float]]) -> bool:
    return len({of_one.get(name) for of_one in measured.values() if of_one}) > 1


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def entries(variants: Sequence[Variant]) -> dict[str, tuple[Variant, str]]:
    """The evaluations of all variants by a name of their own: `ssld--js`, or `teacher` where it is the same in all of them."""
    found: dict[str, dict[str, Variant]] = {}
    for v in variants:
        lock = dvc.locked(v.where.folder)
        for stage in v.wanted:
            verb, _, entry = stage.partition("@")
            if verb == EVALUATIONS.name and stage in lock:
                content = next(out["md5"] for out in lock[stage]["outs"] if out["path"] == f"{EVALUATIONS}/{entry}")
                found.setdefault(entry, {}).setdefault(content, v)
    return {
        entry if len(by_content) == 1 else f"{entry}--{v.where.label.replace('.', '-')}": (v, entry)
        for entry, by_content in found.items()
        for v in by_content.values()
    }


async def together(variants: Sequence[Variant], workspace: Path) -> Path | None:
    """The folder of winnow's comparison of the evaluations of all variants; None where there are none that can be compared."""
    named = entries(variants)
    first = params_of(variants[0].where.folder)
    compare: Any = first.get("compare")
    if not named or not isinstance(compare, dict):
        return None
    place = (workspace / SWEEPS / variants[0].where.folder.name).absolute()
    shutil.rmtree(place, ignore_errors=True)
    (place / EVALUATIONS).mkdir(parents=True)
    for name, (v, entry) in named.items():
        (place / EVALUATIONS / name).symlink_to((v.where.folder / EVALUATIONS / entry).absolute())
    for metrics in (Path("data", stage, "metrics.json") for stage in ("prepare", "dedup")):  # their warnings stand in the report
        if (variants[0].where.folder / metrics).is_file():
            (place / metrics).parent.mkdir()
            shutil.copyfile(variants[0].where.folder / metrics, place / metrics)
    of_entry: Any = {name: params_of(v.where.folder)["evaluate"] for name, (v, _) in named.items()}
    baseline = next((n for n, (_, entry) in named.items() if entry == compare.get("baseline")), compare.get("baseline"))
    params = {
        **first,
        "evaluate": {name: of_entry[name][entry] for name, (_, entry) in named.items()},
        "compare": {**compare, "baseline": baseline},
    }
    (place / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    command = ["python", "-m", "pipeline.stages.compare", "--evaluations", str(EVALUATIONS), "--out", str(TABLE.parent)]
    # MLflow has the comparison of each variant; the evaluations have other names here than there.
    paths = os.pathsep.join(filter(None, [str(workspace.absolute()), os.environ.get("PYTHONPATH")]))
    ended = await child.run(command, cwd=place, env={**dag.environment(), "WINNOW_TRACKING": "off", "PYTHONPATH": paths})
    shutil.rmtree(place / EVALUATIONS)
    if ended.code:
        get_run_logger().warning("the evaluations of the variants cannot be put side by side: %s", ended.text)
        return None
    return place / TABLE.parent


async def show(variants: Sequence[Variant], ended: Mapping[str, str], workspace: Path) -> None:
    """The comparison of a sweep, as an artifact of the run. `ended`: `done`, or why not, by label."""
    parts = [table(variants, ended)]
    done = [v for v in variants if ended[v.where.label] == "done"]
    results = await together(done, workspace) if done else None
    if results is not None:
        parts += [
            (results / TABLE.name).read_text(),
            f"With tests of every pair: `{(results / 'report.html').relative_to(workspace.absolute())}`",
        ]
    text = "\n\n".join(parts)
    await acreate_markdown_artifact(text, key=artifact_key("comparison"), description=f"The variants of {run_title()}")
    get_run_logger().info("%s", parts[0])
