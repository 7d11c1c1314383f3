"""The comparison as one page that opens from disk."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from pipeline.errors import UserError
from pipeline.report import dag, sentences, truth
from pipeline.report.choice import RULE
from pipeline.report.comparison import Comparison
from pipeline.report.entries import Entry
from pipeline.report.pairs import Versus
from pipeline.report.plots import checks_of, draw_accuracies, draw_curves, draw_exits, draw_reliability, svg_of
from pipeline.report.series import HEAT_CLASSES, differing
from pipeline.report.table import COLUMNS, caution, mark_of, percent, points, scaled

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MLFLOW = ".venv/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db"
MATRIX_CLASSES = 20
"""Up to so many classes the report shows who is taken for whom as a matrix."""
MISTAKES = 10
TABLES = {"answers": "What each answers", "costs": "What each costs"}
SHOWN_ITEMS = 6
"""Items of a metric that is itself a mapping; data/<stage>/<entry>.json has all."""

WORK = {
    "draw": "Winnow draws the built-in images, so that it runs on a machine without any.",
    "prepare": "Every image is indexed and checked; what cannot be read goes to quarantine with a reason.",
    "search": "Copies of validation, held-out and labelled images are looked for in the pool, and among these images.",
    "dedup": "Pool images that are copies of them are removed: they would leak the test.",
    "pretrain": "A network learns from images alone, contrastively.",
    "teach": "A network learns from labels: a teacher, or the baseline.",
    "score": "The teacher scores each image that is left in the pool.",
    "select": "The images of each class that the teacher is surest of are kept; controls are drawn beside them.",
    "distil": "A student learns the teacher's soft labels, and no others.",
    "self_distil": "A network with several exits learns from its own deepest one.",
}
"""The stages in the order of their work, as the report tells it."""


def render(
    comparison: Comparison, entries: Sequence[Entry], notes: Sequence[str], data: Path, out: Path, licence: str | None = None
) -> str:
    """One page without outside references, except a link to the gallery that `dedup` drew, if it did."""
    gallery = gallery_of(data)
    steps = _steps(entries, data)
    pairs_told = _told(comparison)
    baseline, by_name = comparison.baseline, {e.name: e for e in entries}
    best = by_name[comparison.best] if comparison.best else None
    shown = best or by_name[baseline]
    told = [e for e in entries if e.evaluation.val.reliability and e.name in (shown.name, baseline)]
    with_exits = [e for e in entries if e.evaluation.exits]
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return template.from_string(TEMPLATE.read_text()).render(
        title=comparison.title,
        baseline=baseline,
        entries=entries,
        columns=COLUMNS,
        tables=[(title, [c for c in COLUMNS if c.on == on]) for on, title in TABLES.items()],
        notes=notes,
        mark=lambda e: mark_of(e, notes),
        caution=caution(entries),
        best=best,
        shown=shown,
        choice=sentences.choice(comparison),
        rule=RULE,
        verdicts=sentences.verdicts(comparison),
        pairs=_pairs(comparison),
        told=pairs_told,
        untold=len(comparison.pairs) - len(pairs_told),
        every=comparison.pairs,
        card=_card(steps, data, licence),
        differing=comparison.classes[:HEAT_CLASSES],
        interval=sentences.interval,
        p_value=sentences.p_value,
        margin=comparison.margin,
        reliability=svg_of(draw_reliability, told) if told else None,
        confusion=_confusion(shown),
        with_exits=with_exits,
        exits=svg_of(draw_exits, with_exits) if with_exits else None,
        speed=next((e.evaluation.speed for e in with_exits if e.evaluation.speed), None),
        scaled=scaled,
        corrupted=[e for e in entries if e.evaluation.corruptions],
        mean=lambda shares: sum(shares) / len(shares),
        percent=percent,
        points=points,
        counts=_counts(steps),
        steps=steps,
        drawing=dag.svg(dag.nodes({key: record for e in entries for key, record in e.lineage.items()})),
        figures=_figures,
        accuracies=svg_of(draw_accuracies, entries),
        curves=svg_of(draw_curves, entries) if any(checks_of(e) for e in entries) else None,
        heat=_heat(entries),
        classes=len(entries[0].evaluation.val.per_class),
        leaks=leaks_of(data),
        gaps=gaps_of(data),
        mlflow=MLFLOW,
        gallery=Path(os.path.relpath(gallery, out)).as_posix() if gallery.exists() else None,
    )


def gallery_of(data: Path) -> Path:
    return data / "dedup" / "gallery" / "index.html"


def leaks_of(data: Path) -> list[str]:
    """What `dedup` has to say about copies of images that measure among those that models learn from; empty if nothing."""
    return _metrics(data / "dedup" / "metrics.json").get("warnings") or []


def gaps_of(data: Path) -> list[str]:
    """What `prepare` has to say about classes that nothing measures; empty if nothing."""
    return _metrics(data / "prepare" / "metrics.json").get("warnings") or []


def _metrics(file: Path) -> dict[str, Any]:
    """The metrics that a stage has written; none where there is no such file. Raises UserError for a damaged one."""
    try:
        metrics = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError:
        metrics = None
    if not isinstance(metrics, dict):
        raise UserError(
            f"{file} does not hold the metrics of a stage. Run `dvc repro --force {file.parent.name}`, which writes it."
        )
    return metrics


def _pairs(comparison: Comparison) -> dict[tuple[str, str], Versus]:
    """Each pair of entries, both ways."""
    return {
        names: v
        for one in comparison.pairs
        for names, v in (((one.entry, one.other), one), ((one.other, one.entry), one.turned()))
    }


def _told(comparison: Comparison) -> list[Versus]:
    """The pairs that a reader looks for: each candidate against all others, and all others against the baseline."""
    rank = {"candidate": 0, "control": 1, "teacher": 2, "baseline": 3}
    role = {name: e.role for name, e in comparison.entries.items()}
    found = []
    for one in comparison.pairs:
        v = one if rank[role[one.entry]] <= rank[role[one.other]] else one.turned()
        if role[v.entry] == "candidate" or comparison.baseline in (v.entry, v.other):
            found.append(v)
    order = list(comparison.entries)
    return sorted(found, key=lambda v: (rank[role[v.entry]], order.index(v.entry), v.other != comparison.baseline))


def _card(steps: Sequence["Step"], data: Path, licence: str | None) -> list[tuple[str, str]]:
    """The data in a few lines: where it came from, what was refused and removed, what was selected, what it may be used for."""
    runs = {step.stage: step.runs for step in steps}
    lines: list[tuple[str, str]] = []
    if "prepare" in runs:
        prepared = runs["prepare"][0]
        metrics = prepared.metrics
        for role in ("labelled", "val", "pool"):
            named = ", ".join(str(source.get("path") or source.get("name")) for source in prepared.params.get(role) or [])
            lines.append((f"{role}, from", f"{named} below {prepared.params.get('root')}" if named else "none"))
        known = ("train", "holdout", "val", "pool")
        counts = ", ".join(f"{metrics[name]:,} {name}" for name in known if isinstance(metrics.get(name), int))
        lines.append(("images", counts or "not counted"))
        refused = metrics.get("quarantine")
        if isinstance(refused, int):
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in (metrics.get("reasons") or {}).items())
            lines.append(
                ("refused", f"{refused:,}{f' ({reasons})' if reasons else ''}; each is listed in data/prepare/quarantine")
            )
    if "dedup" in runs:
        metrics = runs["dedup"][0].metrics
        if {"pool", "kept"} <= metrics.keys():
            removed, doubtful = metrics["pool"] - metrics["kept"], metrics.get("review", 0)
            lines.append(
                (
                    "leaks",
                    f"{removed:,} images of the pool removed, {doubtful:,} that may be copies of validation images left for "
                    "review; the evidence lies in data/dedup/leaks",
                )
            )
    hidden = truth.of_root(str(runs["prepare"][0].params.get("root"))) if "prepare" in runs else None
    for run in runs.get("select", []):
        rule, taken = run.params.get("rule"), run.metrics.get("images")
        told = [f"{taken:,} images by the rule {rule}" if isinstance(taken, int) else str(rule)]
        if run.metrics.get("classes_short"):
            told.append(f"{run.metrics['classes_short']:,} classes short")
        if (expected := run.metrics.get("expected_purity")) is not None:
            told.append(f"expected to be {expected:.0%} pure")
        if hidden and (found := truth.purity(data / "select" / run.name, hidden)) is not None:
            told.append(f"by the hidden labels {found:.0%}")
        lines.append((f"selection {run.name}", ", ".join(told)))
    lines.append(("licence", licence or "not said (`compare.licence`)"))
    return lines


class Step(NamedTuple):
    """A stage with its runs."""

    stage: str
    work: str
    runs: list["Run"]


class Run(NamedTuple):
    name: str
    reads: list[str]
    params: Mapping[str, Any]
    metrics: Mapping[str, Any]


def _steps(entries: Sequence[Entry], data: Path) -> list[Step]:
    """All that led to the evaluations, from their lineage, in the order of the work."""
    records = {key: record for e in entries for key, record in e.lineage.items() if record["stage"] != "evaluate"}
    stages = [*WORK, *sorted({r["stage"] for r in records.values()} - WORK.keys())]
    steps = []
    for name in stages:
        runs = [_run(r, data) for r in records.values() if r["stage"] == name]
        if runs:
            steps.append(Step(name, WORK.get(name, ""), runs))
    return steps


def _run(record: Mapping[str, Any], data: Path) -> Run:
    file = data / record["stage"] / f"{record['entry'] or 'metrics'}.json"
    metrics = _metrics(file)
    reads = sorted({i["path"].removeprefix("data/") for i in record["inputs"].values() if i["key"]})
    return Run(record["entry"] or record["stage"], reads, record["params"], metrics)


def _figures(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in metrics.items():
        label = name.replace("_", " ")
        if isinstance(value, Mapping):
            items = [f"{k} {_figure(v)}" for k, v in value.items() if not isinstance(v, Mapping)]
            more = f", and {len(value) - SHOWN_ITEMS} more" if len(value) > SHOWN_ITEMS else ""
            if items:
                yield label, ", ".join(items[:SHOWN_ITEMS]) + more
        elif value is not None:
            yield label, _figure(value)


def _figure(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _counts(steps: Sequence[Step]) -> list[tuple[int, str]]:
    """The images on their way: as they came, without leaks, as selected."""
    runs = {step.stage: step.runs for step in steps}
    prepared = runs["prepare"][0].metrics if "prepare" in runs else {}
    selections = runs.get("select", [])
    counts = [
        (prepared.get("train"), "labelled images to learn from"),
        (prepared.get("pool"), "images in the pool"),
        *((run.metrics.get("pool"), "left after dedup") for run in selections[:1]),
        *((run.metrics.get("images"), f"selected as {run.name}") for run in selections if run.params["rule"] != "all"),
    ]
    return [(count, label) for count, label in counts if count is not None]


def _heat(entries: Sequence[Entry]) -> list[tuple[str, list[tuple[float, float]]]]:
    """Rows of the heat table: a class, and for each entry its accuracy and its shade, both 0..1."""
    names = list(entries[0].evaluation.val.per_class)
    table = np.array([[e.evaluation.val.per_class[name] for e in entries] for name in names])  # C, E
    rows = differing(table)
    names, table = [names[i] for i in rows], table[rows]
    shade = (table - table.min()) / max(np.ptp(table), 1e-9)
    return [
        (name, list(zip(values.tolist(), shades.tolist(), strict=True)))
        for name, values, shades in zip(names, table, shade, strict=True)
    ]


class Confusion(NamedTuple):
    """`matrix`: a row per class with the share of its images that was named as each, 0..1 (empty where classes are many);
    `mistakes`: (class, named, images), the most frequent first."""

    matrix: list[tuple[str, list[float]]]
    mistakes: list[tuple[str, str, int]]


def _confusion(entry: Entry) -> Confusion:
    names = list(entry.evaluation.val.per_class)
    present = np.unique(entry.labels)  # a class without validation images has no accuracy, and no name there
    of = dict(zip(present.tolist(), names, strict=True))
    counts = np.zeros((len(names), len(names)), int)
    seen = np.isin(entry.predicted, present)
    np.add.at(counts, (np.searchsorted(present, entry.labels[seen]), np.searchsorted(present, entry.predicted[seen])), 1)
    wrong = np.where(np.eye(len(names), dtype=bool), 0, counts)
    pairs = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
    mistakes = [
        (of[present[i]], of[present[j]], int(wrong[i, j])) for i, j in zip(*np.unravel_index(pairs, wrong.shape), strict=True)
    ]
    shares = counts / np.maximum(1, np.bincount(np.searchsorted(present, entry.labels), minlength=len(names)))[:, None]
    matrix = list(zip(names, shares.tolist(), strict=True)) if len(names) <= MATRIX_CLASSES else []
    return Confusion(matrix, [m for m in mistakes if m[2]])
