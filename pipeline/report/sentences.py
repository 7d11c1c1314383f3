"""What the statistics of a comparison say, in words."""

from pipeline.report.choice import RULE
from pipeline.report.comparison import Comparison
from pipeline.report.pairs import Outcome, Statistics, Versus
from pipeline.report.table import percent, points

VERBS: dict[Outcome, str] = {
    "better": "is better than",
    "worse": "is worse than",
    "equivalent": "is equivalent to",
    "not separable": "is not separable from",
}


def interval(s: Statistics) -> str:
    return f"{points(s.difference)} [{points(s.low)}, {points(s.high)}]"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def verdict(v: Versus) -> str:
    p = p_value(v.corrected)
    counts = f"{v.gained:,} images gained, {v.lost:,} lost, corrected p {p}"
    return f"{v.entry} {VERBS[v.outcome]} {v.other}: {interval(v)} points, {counts}."


def verdicts(comparison: Comparison) -> list[str]:
    """The chosen entry against the baseline, and against each control; nothing without one."""
    wanted = {name for name, e in comparison.entries.items() if e.role == "control"} | {comparison.baseline}
    of_best = [v if v.entry == comparison.best else v.turned() for v in comparison.pairs if comparison.best in (v.entry, v.other)]
    found = [v for v in of_best if v.other in wanted]
    return [verdict(v) for v in sorted(found, key=lambda v: v.other != comparison.baseline)]


def choice(comparison: Comparison) -> str:
    """Which candidate was chosen, and why."""
    chosen = comparison.choice
    if chosen is None:
        return "No entry has the role of a candidate, so none is chosen."
    top1 = percent(comparison.entries[chosen.first].holdout.top1)
    best = f"{chosen.first} does best on the held-out images ({top1} %)"
    if not chosen.tied:
        return f"{best} and is chosen." if not chosen.rivals else f"{best}, separably, and is chosen."
    tied = ", ".join(f"{v.other} ({interval(v)} points, corrected p {p_value(v.corrected)})" for v in chosen.tied)
    return f"{best}, not separable from {tied}: the cheapest of them is chosen, {chosen.best}."


def told(comparison: Comparison) -> list[str]:
    """What stands under the table: the choice, its rule, and the verdicts."""
    return [choice(comparison), RULE, *verdicts(comparison)]
