"""The comparison as a table: in a terminal, in Markdown, as CSV and as JSON."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import rich.box
import rich.console
import rich.table

from pipeline.report.comparison import Comparison, difference_of
from pipeline.report.entries import Entry
from pipeline.report.pairs import Versus


class Column(NamedTuple):
    """`on`: which of the report's two tables has it: what an entry `answers`, or what it `costs`."""

    title: str
    meaning: str
    cell: Callable[[Entry], str]
    on_terminal: bool = True
    on: Literal["answers", "costs"] = "answers"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _gain(entry: Entry) -> str:
    d = entry.difference
    return f"{points(d.value)} [{points(d.low)}, {points(d.high)}]" if d else "–"


COLUMNS = (
    Column("role", "What the entry is to the comparison; of the candidates one is chosen.", lambda e: e.evaluation.role),
    Column(
        "val top-1 %",
        "Share of the validation images whose first answer is right, with Wilson's 95 % interval.",
        lambda e: "{} [{}, {}]".format(*(percent(getattr(e.evaluation.val, k)) for k in ("top1", "top1_low", "top1_high"))),
    ),
    Column(
        "clean val %",
        "The share on the validation images without a copy in the pool or the labelled set, as these were left to learn from. "
        "What a published checkpoint had seen is not known.",
        lambda e: "–" if e.evaluation.clean is None else percent(e.evaluation.clean.top1),
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
        "calibrated ECE %",
        "ECE where logits are divided by the one temperature that fits the held-out images best.",
        lambda e: "–" if e.evaluation.calibration is None else percent(e.evaluation.calibration.val_ece),
        False,
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
        "labels learned",
        "Images whose labels were read to train the model, its start or its teacher.",
        lambda e: f"{e.evaluation.training.labelled:,}",
        on="costs",
    ),
    Column(
        "to choose",
        "Held-out images, whose labels are read for choices alone.",
        lambda e: f"{e.evaluation.holdout.n:,}",
        False,
        on="costs",
    ),
    Column(
        "unlabelled",
        "Pool images that its own training saw; a fine-tune starts from a model that saw others.",
        lambda e: f"{e.evaluation.training.unlabelled:,}",
        on="costs",
    ),
    Column(
        "steps",
        "Optimisation steps of its training, its start's included.",
        lambda e: f"{e.evaluation.training.steps:,}",
        False,
        on="costs",
    ),
    Column(
        "training TMACs",
        "Compute of its training, its start's included, in 10^12 multiply-accumulates: three forward passes for each image it "
        "learned from and one of each network that taught it. What a teacher's own training took is not in it.",
        lambda e: scaled(e.evaluation.training.macs, 1e12),
        on="costs",
    ),
    Column(
        "all TMACs",
        "Compute of all that winnow did for it: every training above it once (teachers', starts'), scoring, labelling. "
        "How a published checkpoint was trained is not known, and not in it.",
        lambda e: scaled(e.evaluation.training.macs_all, 1e12),
        on="costs",
    ),
    Column(
        "MMACs",
        "Compute of a prediction, in 10^6 multiply-accumulates; of early exits the mean over the validation images.",
        lambda e: scaled(e.evaluation.model.macs, 1e6),
        on="costs",
    ),
    Column("parameters", "Weights of the network.", lambda e: f"{e.evaluation.model.parameters:,}", on="costs"),
)


def scaled(count: int | None, unit: float) -> str:
    """Three digits of a count in its unit."""
    return "–" if count is None else f"{count / unit:,.0f}" if count >= 100 * unit else f"{count / unit:.3g}"


def footnotes(entries: Sequence[Entry]) -> list[str]:
    """The distinct notes; that of an entry is footnote 1 + its place here."""
    return list(dict.fromkeys(e.evaluation.training.note for e in entries if e.evaluation.training.note))


def mark_of(entry: Entry, notes: Sequence[str]) -> int | None:
    note = entry.evaluation.training.note
    return notes.index(note) + 1 if note else None


def _marked(entry: Entry, notes: Sequence[str]) -> str:
    mark = mark_of(entry, notes)
    return f"{entry.name} [{mark}]" if mark else entry.name


def as_markdown(entries: Sequence[Entry], notes: Sequence[str]) -> str:
    rows = [["entry", *(c.title for c in COLUMNS)], *([_marked(e, notes), *(c.cell(e) for c in COLUMNS)] for e in entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    lines = [_line([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]
    lines.insert(1, _line(["-" * first, *("-" * (width - 1) + ":" for width in others)]))
    footnotes = [f"[{i}] {note}" for i, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", *footnotes, caution(entries)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


TRAINING = {"macs": "training_macs", "entry": "training_entry"}
"""Figures of a training whose names in table.csv are others, as the model and the row have such names themselves."""


def as_csv(entries: Sequence[Entry], comparison: Comparison) -> str:
    """A row for each entry; `gained`, `lost`, `p`, `corrected` and `outcome` are against the baseline."""
    against = {v.other: v.turned() for v in comparison.pairs if v.entry == comparison.baseline}
    against |= {v.entry: v for v in comparison.pairs if v.other == comparison.baseline}
    tested = ("gained", "lost", "p", "corrected", "outcome")
    rows = [
        {
            "entry": e.name,
            "role": e.evaluation.role,
            **e.evaluation.figures(),
            **difference_of(e),
            **{name: getattr(against.get(e.name), name, None) for name in tested},
            "agreement": e.agreement,
            **{TRAINING.get(k, k): v for k, v in e.evaluation.training.model_dump().items()},
            **e.evaluation.model.model_dump(),
        }
        for e in entries
    ]
    return _csv(rows, list(rows[0]))


def pairs_as_csv(comparison: Comparison) -> str:
    names = [name for name in Versus.model_fields if name not in ("entry", "other")]
    return _csv([v.model_dump() for v in comparison.pairs], ["entry", "other", *names])


def _csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def print_table(title: str, entries: Sequence[Entry], told: Sequence[str]) -> None:
    """The table and what is `told` of it on stderr; where the terminal is too narrow, lines wrap but nothing is cut."""
    notes = footnotes(entries)
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
    for line in (caution(entries), *told):
        console.print(line)


def caution(entries: Sequence[Entry]) -> str:
    n = entries[0].evaluation.val.n
    return f"Intervals: 95 %, for {n:,} validation images and one training run each; another seed moves the results too."
