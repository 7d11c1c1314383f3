"""Put all evaluations side by side: one table, and one report that opens from disk.

python -m pipeline.stages.compare --show data/compare/results       # the table once more, and where to look next
"""

import csv
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib as mpl
import numpy as np
import pyarrow.parquet as pq
import rich.box
import rich.console
import rich.table
from markupsafe import Markup
from matplotlib.figure import Figure
from pydantic import BaseModel

from pipeline import artifact, stage
from pipeline.errors import UserError
from pipeline.params import Section

TEMPLATE = Path(__file__).with_name("compare.html.jinja")
MLFLOW = ".venv/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db"
Z95 = 1.959964
HEAT_CLASSES = 40
"""Classes that the heat table shows: of more, those whose accuracy differs most between the entries."""
MATRIX_CLASSES = 20
"""Up to so many classes the report shows who is taken for whom as a matrix."""
MISTAKES = 10
SHOWN_ITEMS = 6
"""Items of a metric that is itself a mapping; data/<stage>/<entry>.json has all."""

WORK = {
    "draw": "Winnow draws the built-in images, so that it runs on a machine without any.",
    "prepare": "Every image is indexed and checked; what cannot be read goes to quarantine with a reason.",
    "dedup": "Pool images that SIFT matches to a validation image are removed: they would leak the test.",
    "pretrain": "A network learns from images alone, contrastively.",
    "teach": "A network learns from labels: a teacher, or the baseline.",
    "score": "The teacher scores each image that is left in the pool.",
    "select": "The images of each class that the teacher is surest of are kept; controls are drawn beside them.",
    "distil": "A student learns the teacher's soft labels, and no others.",
    "self_distil": "A network with several exits learns from its own deepest one.",
}
"""The stages in the order of their work, as the report tells it."""


class Compare(Section):
    """`title` of the report; `baseline`: the entry of `evaluate` that the others are compared with."""

    title: str = "Comparison"
    baseline: str


class Model(BaseModel):
    """`macs`: multiply-accumulates of a prediction. `exit`: which part of a network with several exits answers."""

    arch: str
    parameters: int
    macs: int | None
    input: int
    exit: int | str | None = None


class Training(BaseModel):
    """How the model came about. `labelled` counts the images whose labels were read, by it or by its teacher; `macs` the
    multiply-accumulates of its training and of those it started from."""

    stage: str | None
    entry: str | None
    init: str | None
    teacher: str | None
    steps: int
    batch: int
    labelled: int
    unlabelled: int
    note: str | None
    macs: int | None = None


class Measured(BaseModel):
    """Shares lie in 0..1; `top1_low` and `top1_high` are the 95 % interval; `nll` is in nats.

    `reliability`: for each bin of confidence the number of images, their mean confidence and their accuracy.
    """

    n: int
    top1: float
    top1_low: float
    top1_high: float
    top5: float
    nll: float
    ece: float
    per_class: dict[str, float]
    reliability: list[tuple[int, float, float]] = []


class Way(BaseModel):
    """A way to use a network with several exits: one of them by its number, their `ensemble`, or `early`."""

    exit: str
    parameters: int
    macs: int
    holdout_top1: float
    val_top1: float


class Point(BaseModel):
    """Early exits at a threshold of confidence; `macs` is the mean over the validation images."""

    threshold: float
    macs: int
    holdout_top1: float
    val_top1: float


class Exits(BaseModel):
    """`threshold` was chosen on the held-out images; `leaving` is the share of the validation images that leaves at each exit."""

    rows: list[Way]
    threshold: float
    leaving: list[float]
    curve: list[Point]


class Corruptions(BaseModel):
    """Top-1 accuracy by corruption, at each of the severities."""

    severities: list[int]
    holdout: dict[str, list[float]]
    val: dict[str, list[float]]


class Speed(BaseModel):
    """Measured on one machine; `images_per_second` of the `whole` network, or of each way to use one with exits."""

    device: str
    dtype: str
    threads: int
    batch: int
    images_per_second: dict[str, float]


class Evaluation(BaseModel):
    """evaluation.json, as `evaluate` writes it."""

    model: Model
    training: Training
    val: Measured
    holdout: Measured
    exits: Exits | None = None
    corruptions: Corruptions | None = None
    speed: Speed | None = None


class Difference(NamedTuple):
    """Of two top-1 accuracies on the same images, -1..1, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Entry:
    """One evaluated model. `labels` and `predicted`: (N,) classes of the validation images, in the order of `ids`."""

    name: str
    evaluation: Evaluation
    ids: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    history: Mapping[str, Any]
    lineage: Mapping[str, Mapping[str, Any]] = field(repr=False)
    difference: Difference | None = None
    """To the baseline; None for the baseline itself."""
    agreement: float | None = None
    """Share of the validation images that it names as its teacher does; None where no entry measures its teacher."""

    @property
    def right(self) -> np.ndarray:
        """(N,) bool."""
        return np.asarray(self.labels == self.predicted)

    @property
    def origin(self) -> str:
        training = self.evaluation.training
        return f"{training.stage}/{training.entry}" if training.entry else training.stage or "brought in"


def run(params: Compare, *, evaluations: Path, out: Path, entries: tuple[str, ...]) -> stage.Metrics:
    """Write table.csv, table.md, comparison.json and report.html from the artifacts of `evaluate`, in the order of `entries`.

    Other folders in `evaluations`, left by entries that params.yaml no longer has, are not looked at.
    Raises UserError if an entry is missing or was measured on other images than the baseline.
    """
    if params.baseline not in entries:
        raise UserError(f"`compare.baseline` is {params.baseline!r}, but `evaluate` has the entries {', '.join(entries)}.")
    read = [_entry(name, artifact.verify(evaluations / name)) for name in entries]
    compared = _with_agreement(_against(params.baseline, read))
    notes = _notes(compared)
    with artifact.writing(out) as tmp:
        (tmp / "table.csv").write_text(_csv(compared))
        (tmp / "table.md").write_text(_markdown(compared, notes))
        (tmp / "comparison.json").write_text(json.dumps(_json(params, compared), indent=1) + "\n")
        (tmp / "report.html").write_text(_html(params, compared, notes, evaluations.parent, out))
    _print(params.title, compared)
    return {
        e.name: {"top1": e.evaluation.val.top1, "holdout_top1": e.evaluation.holdout.top1, **_difference(e)} for e in compared
    }


def show(out: Path) -> None:
    """Print the table of the artifact `out`, and where to look next. Raises UserError if there is none."""
    file = out / "comparison.json"
    if not file.is_file():
        raise UserError(f"{file} is not there. Run `dvc repro`, which makes it.")
    saved = json.loads(file.read_text())
    nothing = np.empty(0, bool)
    entries = []
    for name, e in saved["entries"].items():
        difference = None if e["delta"] is None else Difference(e["delta"], e["delta_low"], e["delta_high"])
        evaluation = Evaluation.model_validate(e)
        entries.append(Entry(name, evaluation, nothing, nothing, nothing, e["history"], {}, difference, e["agreement"]))
    _print(saved["title"], entries)
    gallery = _gallery(out.parents[1])
    sys.stderr.write(f"\nreport   {out / 'report.html'}\n")
    sys.stderr.write(f"gallery  {gallery}: what was removed from the pool, and why\n" if gallery.exists() else "")
    sys.stderr.write(f"runs     {MLFLOW}\n")


# Reading and comparing ------------------------------------------------------------------------------------------------


def _entry(name: str, folder: Path) -> Entry:
    predictions = pq.read_table(folder / "predictions.parquet", columns=["id", "label", "predicted"])
    return Entry(
        name,
        Evaluation.model_validate_json((folder / "evaluation.json").read_text()),
        predictions["id"].to_numpy(),
        predictions["label"].to_numpy(),
        predictions["predicted"].to_numpy(),
        json.loads((folder / "history.json").read_text()),
        artifact.record(folder).get("lineage", {}),
    )


def _against(baseline: str, entries: list[Entry]) -> list[Entry]:
    base = next(e for e in entries if e.name == baseline)
    for e in entries:
        if not np.array_equal(e.ids, base.ids):
            raise UserError(
                f"`evaluate.{e.name}` and `evaluate.{baseline}` were measured on different images. Run `dvc repro`, "
                "which measures both on data/prepare/val."
            )
    return [e if e is base else replace(e, difference=paired_difference(e.right, base.right)) for e in entries]


def _with_agreement(entries: list[Entry]) -> list[Entry]:
    """The entries with the share of images on which they agree with their teacher, where one of them is the whole teacher."""
    teachers = {e.origin: e for e in reversed(entries) if e.evaluation.model.exit is None}
    found = []
    for e in entries:
        teacher = teachers.get(e.evaluation.training.teacher or "")
        found.append(replace(e, agreement=float((e.predicted == teacher.predicted).mean())) if teacher else e)
    return found


def paired_difference(right: np.ndarray, base: np.ndarray) -> Difference:
    """Accuracy of (N,) `right` minus that of (N,) `base`, both bool and of the same images.

    The interval is Bonett and Price's adjusted Wald interval for paired proportions (2012): only the images that one of
    the two names right and the other wrong count, which makes it narrower than that of two independent samples.
    """
    n = len(right)
    gained, lost = int((right & ~base).sum()), int((~right & base).sum())
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z95 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return Difference((gained - lost) / n, max(p - q - half, -1.0), min(p - q + half, 1.0))


# The table ------------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    title: str
    meaning: str
    cell: Callable[[Entry], str]
    on_terminal: bool = True


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _gain(entry: Entry) -> str:
    d = entry.difference
    return f"{points(d.value)} [{points(d.low)}, {points(d.high)}]" if d else "–"


COLUMNS = (
    Column(
        "val top-1 %",
        "Share of the validation images whose first answer is right, with Wilson's 95 % interval.",
        lambda e: "{} [{}, {}]".format(*(percent(getattr(e.evaluation.val, k)) for k in ("top1", "top1_low", "top1_high"))),
    ),
    Column(
        "vs baseline",
        "Difference in points to the baseline on the same images, with its 95 % interval (paired: Bonett and Price 2012).",
        _gain,
    ),
    Column("top-5 %", "Share whose right class is among the first five.", lambda e: percent(e.evaluation.val.top5), False),
    Column(
        "ECE %",
        "Expected calibration error: how far confidence and accuracy lie apart; 0 is perfect.",
        lambda e: percent(e.evaluation.val.ece),
    ),
    Column(
        "holdout %",
        "Top-1 on the held-out labelled images, where choices are made.",
        lambda e: percent(e.evaluation.holdout.top1),
    ),
    Column(
        "as teacher %",
        "Share of the validation images that it names as its teacher does, where the teacher has a row too.",
        lambda e: "–" if e.agreement is None else percent(e.agreement),
        False,
    ),
    Column(
        "labels",
        "Images whose labels were read in training, by the model or by its teacher.",
        lambda e: f"{e.evaluation.training.labelled:,}",
    ),
    Column(
        "unlabelled",
        "Pool images that its own training saw; a fine-tune starts from a model that saw others.",
        lambda e: f"{e.evaluation.training.unlabelled:,}",
    ),
    Column(
        "steps", "Optimisation steps of its training, its start's included.", lambda e: f"{e.evaluation.training.steps:,}", False
    ),
    Column(
        "training TMACs",
        "Compute of its training, its start's included, in 10^12 multiply-accumulates: three forward passes for each image it "
        "learned from and one of each network that taught it. What a teacher's own training took is not in it.",
        lambda e: _scaled(e.evaluation.training.macs, 1e12),
    ),
    Column(
        "MMACs",
        "Compute of a prediction, in 10^6 multiply-accumulates; of early exits the mean over the validation images.",
        lambda e: _scaled(e.evaluation.model.macs, 1e6),
    ),
    Column("parameters", "Weights of the network.", lambda e: f"{e.evaluation.model.parameters:,}"),
)


def _scaled(count: int | None, unit: float) -> str:
    """Three digits of a count in its unit."""
    return "–" if count is None else f"{count / unit:,.0f}" if count >= 100 * unit else f"{count / unit:.3g}"


def _notes(entries: Sequence[Entry]) -> list[str]:
    """The distinct notes; that of an entry is footnote 1 + its place here."""
    return list(dict.fromkeys(e.evaluation.training.note for e in entries if e.evaluation.training.note))


def _mark(entry: Entry, notes: Sequence[str]) -> int | None:
    note = entry.evaluation.training.note
    return notes.index(note) + 1 if note else None


def _marked(entry: Entry, notes: Sequence[str]) -> str:
    mark = _mark(entry, notes)
    return f"{entry.name} [{mark}]" if mark else entry.name


def _markdown(entries: Sequence[Entry], notes: Sequence[str]) -> str:
    rows = [["entry", *(c.title for c in COLUMNS)], *([_marked(e, notes), *(c.cell(e) for c in COLUMNS)] for e in entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    lines = [_line([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]
    lines.insert(1, _line(["-" * first, *("-" * (width - 1) + ":" for width in others)]))
    footnotes = [f"[{i}] {note}" for i, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", *footnotes, _caution(entries)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _difference(entry: Entry) -> dict[str, float | None]:
    d = entry.difference
    return {"delta": d and d.value, "delta_low": d and d.low, "delta_high": d and d.high}


def _csv(entries: Sequence[Entry]) -> str:
    rows = []
    for e in entries:
        measured = {
            f"{split}_{key}": value
            for split, of in (("val", e.evaluation.val), ("holdout", e.evaluation.holdout))
            for key, value in of.model_dump(exclude={"per_class", "reliability"}).items()
        }
        rows.append(
            {
                "entry": e.name,
                **measured,
                **_difference(e),
                "agreement": e.agreement,
                **{("training_macs" if k == "macs" else k): v for k, v in e.evaluation.training.model_dump().items()},
                **e.evaluation.model.model_dump(),
            }
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _json(params: Compare, entries: Sequence[Entry]) -> dict[str, Any]:
    best = _best(entries, params.baseline)
    return {
        **params.model_dump(),
        "best": best and best.name,
        "entries": {
            e.name: {
                **{part: value for part, value in e.evaluation.model_dump(mode="json").items() if value is not None},
                **_difference(e),
                "agreement": e.agreement,
                "history": e.history,
            }
            for e in entries
        },
    }


def _print(title: str, entries: Sequence[Entry]) -> None:
    """The table on stderr, for the one who waited for it; where the terminal is too narrow, lines wrap but nothing is cut."""
    notes = _notes(entries)
    columns = [c for c in COLUMNS if c.on_terminal]
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("entry", no_wrap=True)
    for c in columns:
        table.add_column(c.title, justify="right", no_wrap=True)
    for e in entries:
        table.add_row(_marked(e, notes), *(c.cell(e) for c in columns))
    console = rich.console.Console(stderr=True, highlight=False, markup=False)
    wide = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)
    for i, note in enumerate(notes, 1):
        console.print(f"[{i}] {note}")
    console.print(_caution(entries))


def _caution(entries: Sequence[Entry]) -> str:
    n = entries[0].evaluation.val.n
    return f"Intervals: 95 %, for {n:,} validation images and one training run each; another seed moves the results too."


# The report -----------------------------------------------------------------------------------------------------------


def _html(params: Compare, entries: Sequence[Entry], notes: Sequence[str], data: Path, out: Path) -> str:
    """One page without outside references, except a link to the gallery that `dedup` drew, if it did."""
    gallery = _gallery(data)
    steps = _steps(entries, data)
    best = _best(entries, params.baseline)
    shown = best or next(e for e in entries if e.name == params.baseline)
    told = [e for e in entries if e.evaluation.val.reliability and e.name in (shown.name, params.baseline)]
    with_exits = [e for e in entries if e.evaluation.exits]
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return template.from_string(TEMPLATE.read_text()).render(
        params=params,
        entries=entries,
        columns=COLUMNS,
        notes=notes,
        mark=lambda e: _mark(e, notes),
        caution=_caution(entries),
        best=best,
        shown=shown,
        reliability=_svg(_draw_reliability, told) if told else None,
        confusion=_confusion(shown),
        with_exits=with_exits,
        exits=_svg(_draw_exits, with_exits) if with_exits else None,
        speed=next((e.evaluation.speed for e in with_exits if e.evaluation.speed), None),
        scaled=_scaled,
        corrupted=[e for e in entries if e.evaluation.corruptions],
        mean=lambda shares: sum(shares) / len(shares),
        percent=percent,
        points=points,
        counts=_counts(steps),
        steps=steps,
        figures=_figures,
        accuracies=_svg(_draw_accuracies, entries),
        curves=_svg(_draw_curves, entries) if any(_checks(e) for e in entries) else None,
        heat=_heat(entries),
        classes=len(entries[0].evaluation.val.per_class),
        mlflow=MLFLOW,
        gallery=Path(os.path.relpath(gallery, out)).as_posix() if gallery.exists() else None,
    )


def _gallery(data: Path) -> Path:
    return data / "dedup" / "gallery" / "index.html"


def _best(entries: Sequence[Entry], baseline: str) -> Entry | None:
    """Of the entries with the baseline's network, the best on held-out images, unless that is the baseline."""
    base = next(e for e in entries if e.name == baseline)
    peers = [e for e in entries if e.evaluation.model == base.evaluation.model]
    best = max(peers, key=lambda e: e.evaluation.holdout.top1)
    return best if best.difference else None


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
    records = {key: record for e in entries for key, record in e.lineage.items()}
    stages = [*WORK, *sorted({r["stage"] for r in records.values()} - WORK.keys())]
    steps = []
    for name in stages:
        runs = [_run(r, data) for r in records.values() if r["stage"] == name]
        if runs:
            steps.append(Step(name, WORK.get(name, ""), runs))
    return steps


def _run(record: Mapping[str, Any], data: Path) -> Run:
    file = data / record["stage"] / f"{record['entry'] or 'metrics'}.json"
    metrics = json.loads(file.read_text()) if file.is_file() else {}
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
    if len(names) > HEAT_CLASSES:
        differing = np.sort(np.argsort(-np.ptp(table, axis=1), kind="stable")[:HEAT_CLASSES])
        names, table = [names[i] for i in differing], table[differing]
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


# Plots: colours that stand for the page's own, so that they follow its dark mode

INK, LINE, ACCENT, QUIET = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
PAGE_COLOURS = {INK: "var(--ink)", LINE: "var(--line)", ACCENT: "var(--accent)", QUIET: "var(--quiet)"}
HUES = ("#3b7dbf", "#c8682f", "#2f9478", "#b0639b", "#b08a22", "#7f7f7f", "#7568c4", "#4aa3c7")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "winnow",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,
}
WIDTH = 5.8  # inches: small, so that letters stay legible when a phone shrinks the plot
LEGEND = 66  # letters that fit into the width


def _draw_accuracies(entries: Sequence[Entry]) -> Figure:
    figure = Figure(figsize=(WIDTH, 0.5 + 0.34 * len(entries)))
    axes = figure.subplots()
    axes.grid(axis="x")
    for y, e in enumerate(entries):
        val = e.evaluation.val
        colour = ACCENT if e.difference else QUIET
        axes.plot([100 * val.top1_low, 100 * val.top1_high], [y, y], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot([100 * val.top1], [y], marker="o", markersize=7, color=colour)
        axes.annotate(percent(val.top1), (100 * val.top1_high, y), xytext=(6, 0), textcoords="offset points", va="center")
        if not e.difference:
            axes.axvline(100 * val.top1, color=QUIET, linewidth=1, linestyle=(0, (3, 3)))
    axes.set_yticks(range(len(entries)), [e.name for e in entries])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("val top-1 accuracy, %")
    return figure


def _checks(entry: Entry) -> list[Mapping[str, float]]:
    return [c for c in entry.history.get("holdout", []) if "top1" in c]


def _draw_curves(entries: Sequence[Entry]) -> Figure:
    columns = max(1, LEGEND // (max(len(e.name) for e in entries) + 6))
    figure = Figure(figsize=(WIDTH, 3.0 + 0.22 * math.ceil(len(entries) / columns)))
    axes = figure.subplots()
    axes.grid(axis="y")
    for i, e in enumerate(entries):
        checks = _checks(e)
        style = ("-", "--", ":")[i // len(HUES) % 3]
        if checks:
            axes.plot(
                [c["step"] for c in checks],
                [100 * c["top1"] for c in checks],
                color=HUES[i % len(HUES)],
                linestyle=style,
                marker="o",
                markersize=3,
                label=e.name,
            )
    axes.set_xlabel("optimisation step")
    axes.set_ylabel("holdout top-1 accuracy, %")
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _draw_reliability(entries: Sequence[Entry]) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.4))
    axes = figure.subplots()
    axes.grid()
    axes.plot([0, 100], [0, 100], color=QUIET, linewidth=1, linestyle=(0, (3, 3)))
    for i, e in enumerate(entries):
        count, confidence, accuracy = np.array([b for b in e.evaluation.val.reliability if b[0]]).T
        colour, label = HUES[i % len(HUES)], f"{e.name} (ECE {percent(e.evaluation.val.ece)} %)"
        axes.plot(100 * confidence, 100 * accuracy, color=colour, linewidth=1, label=label)
        axes.scatter(100 * confidence, 100 * accuracy, s=4 + 120 * count / count.sum(), color=colour)
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("accuracy, %")
    axes.tick_params(axis="both", length=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_exits(entries: Sequence[Entry]) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.4))
    axes = figure.subplots()
    axes.grid()
    for i, e in enumerate(entries):
        exits, colour = e.evaluation.exits, HUES[i % len(HUES)]
        assert exits is not None
        curve = [(p.macs / 1e6, 100 * p.val_top1) for p in exits.curve]
        axes.plot(*zip(*curve, strict=True), color=colour, linewidth=1.5, label=e.name)
        for way in exits.rows:
            marker = {"ensemble": "s", "early": "D"}.get(way.exit, "o")
            axes.plot([way.macs / 1e6], [100 * way.val_top1], color=colour, marker=marker, markersize=6)
    axes.set_xlabel("compute of a prediction, 10^6 multiply-accumulates")
    axes.set_ylabel("val top-1 accuracy, %")
    axes.tick_params(axis="both", length=0)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _svg(draw: Callable[[Sequence[Entry]], Figure], entries: Sequence[Entry]) -> Markup:
    """The plot as an element of the page: the same bytes for the same figures, ids that no other plot uses, page colours."""
    text = io.StringIO()
    with mpl.rc_context(STYLE):
        draw(entries).savefig(text, format="svg", transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{draw.__name__}-", svg)
    svg = re.sub(
        r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg xmlns:xlink="http://www.w3.org/1999/xlink" \1 aria-hidden="true">', svg
    )
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for stand_in, colour in PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return Markup(svg)


def main() -> None:
    if sys.argv[1:2] != ["--show"]:
        stage.main(run)
        return
    try:
        show(Path(sys.argv[2] if len(sys.argv) > 2 else "data/compare/results"))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
