"""The stages behind a comparison as one drawing: who reads from whom and, where it is known, how long each took and if it ran."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup, escape

ROW, LANE, LETTER = 24, 9, 7.2
"""Heights and widths in units of the drawing, which is drawn at one pixel a unit at the most; a letter is 12 units high."""
MARKS = {"executed": "ran", "unchanged": "cached", "restored": "restored"}
"""The states of `tracking.comparison`, in a word."""
STYLE = """
.dag text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink); }
.dag .entry { font-weight: 600; }
.dag .stage, .dag .facts { fill: var(--quiet); font-variant-numeric: tabular-nums; }
.dag path { fill: none; stroke: var(--quiet); stroke-opacity: .55; stroke-width: 1.3; }
.dag circle { fill: var(--card); stroke: var(--accent); stroke-width: 2; }
.dag .executed circle { fill: var(--accent); }
.dag .restored circle { stroke-dasharray: 2.6 2.1; }
"""


class Node(NamedTuple):
    """A stage with its entry. `needs`: the keys of the nodes it reads from. `state`: of `MARKS`; None if nobody knows."""

    key: str
    stage: str
    entry: str | None
    needs: frozenset[str]
    seconds: float | None = None
    state: str | None = None

    @property
    def name(self) -> str:
        return f"{self.stage} {self.entry}" if self.entry else self.stage


def nodes(
    lineage: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float] | None = None,
    states: Mapping[str, str] | None = None,
) -> list[Node]:
    """The stages of the records `lineage`, by key, and the comparison of the evaluations among them, in the order of the drawing.

    `seconds`, `states`: by key, as far as they are known; those of the comparison under the key `compare`.
    """
    seconds, states = seconds or {}, states or {}
    found = {
        key: Node(
            key,
            record["stage"],
            record["entry"],
            frozenset(given["key"] for given in record["inputs"].values() if given["key"] in lineage),
            seconds.get(key),
            states.get(key),
        )
        for key, record in lineage.items()
    }
    evaluations = frozenset(key for key, node in found.items() if node.stage == "evaluate")
    found["compare"] = Node("compare", "compare", None, evaluations, seconds.get("compare"), states.get("compare"))
    return _in_order(found)


def _in_order(found: Mapping[str, Node]) -> list[Node]:
    """Each after all it needs, and as close to the last of them as can be: a student and its evaluation stand together."""
    place: dict[str, int] = {}
    while len(place) < len(found):
        ready = [node for key, node in found.items() if key not in place and node.needs <= place.keys()]
        # Of those that follow the same node, what nobody needs further comes first: the evaluation, before the next student.
        chosen = min(ready, key=lambda n: (-max((place[key] for key in n.needs), default=-1), n.stage != "evaluate"))
        place[chosen.key] = len(place)
    return [found[key] for key in place]


def _direct(ordered: Sequence[Node]) -> dict[str, frozenset[str]]:
    """What each needs and does not need by way of another: a line for the rest would say nothing."""
    above: dict[str, frozenset[str]] = {}
    direct = {}
    for node in ordered:
        by_others = frozenset().union(*(above[key] for key in node.needs))
        direct[node.key] = node.needs - by_others
        above[node.key] = node.needs | by_others
    return direct


def _lanes(spans: Sequence[tuple[int, int]]) -> list[int]:
    """A lane for each span of rows, so that no two in a lane overlap; short ones are nearest to the names, lane 0."""
    taken: list[list[tuple[int, int]]] = []
    lanes = [0] * len(spans)
    for i in sorted(range(len(spans)), key=lambda i: spans[i][1] - spans[i][0]):
        first, last = spans[i]
        free = next((n for n, lane in enumerate(taken) if all(last <= a or b <= first for a, b in lane)), len(taken))
        taken[free : free + 1] = [[*(taken[free] if free < len(taken) else []), spans[i]]]
        lanes[i] = free
    return lanes


def svg(ordered: Sequence[Node]) -> Markup:
    """The drawing as an element for a page that has the colours --ink, --quiet, --accent and --card."""
    row = {node.key: i for i, node in enumerate(ordered)}
    readers: dict[str, list[int]] = {}
    for key, needed in _direct(ordered).items():
        for source in sorted(needed, key=row.__getitem__):  # a set has another order in each process
            readers.setdefault(source, []).append(row[key])
    buses: dict[tuple[int, ...], list[int]] = {}  # sources with the same readers share a line
    for source, rows in readers.items():
        buses.setdefault(tuple(sorted(rows)), []).append(row[source])
    spans = [(min(sources), max(rows)) for rows, sources in buses.items()]
    lanes = _lanes(spans)
    left = LANE * (max(lanes, default=0) + 1) + 12
    names = max(LETTER * len(node.name) for node in ordered)
    facts = {node.key: _facts(node) for node in ordered}
    width = round(left + 14 + names + max(6.6 * len(text) for text in facts.values()) + 12)
    height = ROW * len(ordered) + 6
    parts = [
        f'<svg class="dag" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="the stages and what each reads"><style>{STYLE}</style>'
    ]
    for (below, sources), lane in zip(buses.items(), lanes, strict=True):
        x = left - LANE * (lane + 1)
        top, bottom = min(sources), max(below)
        turns = [f"M{left} {_y(i)}H{x + 4}Q{x} {_y(i)} {x} {_y(i) + 4}" for i in sources]
        ends = [f"M{x} {_y(i) - 4}Q{x} {_y(i)} {x + 4} {_y(i)}H{left}" for i in below]
        parts.append(f'<path d="{"".join(turns)}M{x} {_y(top) + 4}V{_y(bottom) - 4}{"".join(ends)}"/>')
    for i, node in enumerate(ordered):
        y = _y(i)
        entry = f' <tspan class="entry">{escape(node.entry)}</tspan>' if node.entry else ""
        stage = "stage" if node.entry else "entry"
        told = facts[node.key]
        end = f'<text class="facts" x="{width - 2}" y="{y + 4}" text-anchor="end">{told}</text>' if told else ""
        parts.append(
            f'<g class="{node.state or "unknown"}"><title>{_told(node, ordered)}</title><circle cx="{left}" cy="{y}" r="4.5"/>'
            f'<text x="{left + 12}" y="{y + 4}"><tspan class="{stage}">{escape(node.stage)}</tspan>{entry}</text>{end}</g>'
        )
    return Markup("\n".join([*parts, "</svg>"]))


def _y(i: int) -> int:
    return ROW * i + ROW // 2 + 3


def _facts(node: Node) -> str:
    shown = [] if node.seconds is None else [clock(node.seconds)]
    return ", ".join([*shown, *([MARKS[node.state]] if node.state else [])])


def clock(seconds: float) -> str:
    """`8.3 s`, `4 min 10 s`, `3 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"


def _told(node: Node, ordered: Sequence[Node]) -> Markup:
    names = {other.key: other.name for other in ordered}
    reads = ", ".join(sorted(names[key] for key in node.needs))
    return escape(f"{node.name} reads {reads}" if reads else node.name)
