"""The plots of the page, as SVG in the page's own colours."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from pipeline.report.entries import Entry
from pipeline.report.table import percent

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
WIDTH = 4.2  # inches: so narrow that letters stay legible on a phone of 390 pixels
LEGEND = 44  # letters that fit into the width


def draw_accuracies(entries: Sequence[Entry]) -> Figure:
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


def checks_of(entry: Entry) -> list[Mapping[str, float]]:
    return [c for c in entry.history.get("holdout", []) if "top1" in c]


def draw_curves(entries: Sequence[Entry]) -> Figure:
    columns = max(1, LEGEND // (max(len(e.name) for e in entries) + 6))
    figure = Figure(figsize=(WIDTH, 3.0 + 0.22 * math.ceil(len(entries) / columns)))
    axes = figure.subplots()
    axes.grid(axis="y")
    for i, e in enumerate(entries):
        checks = checks_of(e)
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


def draw_reliability(entries: Sequence[Entry]) -> Figure:
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


def draw_exits(entries: Sequence[Entry]) -> Figure:
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


def svg_of(draw: Callable[[Sequence[Entry]], Figure], entries: Sequence[Entry]) -> Markup:
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
