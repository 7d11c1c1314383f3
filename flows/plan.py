"""What a run would do before it does it: each stage, why, and for how long. `python -m flows plan`; no server is asked.

DVC says what is stale (`flows.dag`), params.yaml and dvc.lock say what changed, and `python -m pipeline estimate` how long it
takes.
"""

import hashlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from flows import dag
from flows.adapter import dvc
from flows.adapter.dvc import Changes
from flows.worktree import DURATIONS

RESTORING = 1.0  # seconds to take a stage from DVC's cache, its start included
CAUSES = 2  # that are told of a stage; the others are counted
DOUBT = 0.1  # see `left`
UNCHANGED = Changes()


@dataclass(frozen=True)
class Row:
    """A stage that a run would touch. `by`: where the seconds come from; `cache`: it would be restored, not run."""

    stage: str
    why: str
    seconds: float | None
    cpu: float | None
    by: str


@dataclass(frozen=True)
class Plan:
    """What a run would do, in its order. `current`: how many stages are up to date; `probed`: the seconds of the probes."""

    rows: Sequence[Row]
    current: int
    machine: str = ""
    probed: float = 0.0
    at: float = field(default_factory=time.time)

    def planned(self) -> dict[str, float]:
        """Seconds of the stages that would run, where they are known, by the names of their journals (`distil.ssld`)."""
        return {r.stage.replace("@", "."): r.seconds for r in self.rows if r.seconds is not None and r.by != "cache"}

    def save(self, file: Path) -> None:
        """Write the plan for the stages, which tell how much of it is left (pipeline/harness/durations.py)."""
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new")
        new.write_text(json.dumps({"at": self.at, "stages": self.planned()}) + "\n")
        new.replace(file)

    def cells(self) -> Iterator[tuple[str, str, str, str]]:
        """The table's rows: stage, time, where that comes from, why."""
        for r in self.rows:
            yield r.stage, "?" if r.seconds is None else clock(r.seconds), r.by, r.why

    def sentence(self) -> str:
        """What all of it comes to."""
        up_to_date = f"{self.current} stages are up to date" if self.current != 1 else "1 stage is up to date"
        if not self.rows:
            return f"Nothing to do: {up_to_date}."
        runs = [r for r in self.rows if r.by != "cache"]
        known, unknown = [r for r in self.rows if r.seconds is not None], [r for r in self.rows if r.seconds is None]
        seconds, cpu = sum(r.seconds or 0 for r in known), sum(r.cpu or 0 for r in known)
        parts = [f"{len(runs)} to run, {len(self.rows) - len(runs)} from DVC's cache, {up_to_date}."]
        if known:
            parts.append(f"About {clock(seconds)} on {self.machine or 'this machine'}, {cpu / 60:,.1f} core-minutes.")
        if self.probed >= 1:
            parts.append(f"Probes took {self.probed:.0f} s; they are kept.")
        if unknown:
            parts.append(f"Not counted, as nobody knows how long they take: {', '.join(r.stage for r in unknown)}.")
        return " ".join(parts)

    def text(self, width: int | None = None) -> str:
        """The plan for a terminal of `width` columns (None: this one's, or 100)."""
        table = Table("stage", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("time", justify="right", no_wrap=True)
        table.add_column("from", max_width=14)
        table.add_column("why", overflow="fold")
        for cells in self.cells():
            table.add_row(*cells)
        return shown([table] if self.rows else [], self.sentence(), width)

    def markdown(self) -> str:
        """The plan as Prefect shows it."""
        lines = ["| stage | time | from | why |", "| --- | ---: | --- | --- |"]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in self.cells()]
        return "\n".join([*(lines if self.rows else []), "", self.sentence()])


def shown(tables: Sequence[Table], sentence: str, width: int | None) -> str:
    """Tables and a sentence as text, whatever the terminal can show: no colours."""
    out = io.StringIO()
    console = Console(file=out, width=width or (None if sys.stdout.isatty() else 100), highlight=False, no_color=True)
    for table in tables:
        console.print(table)
    console.print(sentence, markup=False)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `3:05:00`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


# Why ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Looked:
    """What DVC says of a run: the stages that it would touch, why, those of them that it would take from its cache, and how many
    it would leave alone."""

    todo: Sequence[str]
    why: Mapping[str, str]
    restored: Set[str]
    current: int

    @property
    def runs(self) -> list[str]:
        return [stage for stage in self.todo if stage not in self.restored]


def looked(folder: Path, graph: dag.Dag, wanted: Sequence[str], changes: Mapping[str, Changes], force: bool) -> Looked:
    """What a run of the stages `wanted` would touch. `changes`: what `dag.stale` says of them."""
    stale = [stage for stage in wanted if force or stage in graph.affected(changes)]
    known = dvc.restorable(folder, wanted, stale) if stale and not force else {}
    # Where all above is restored as it was, a stage that has not changed itself is up to date.
    untouched = {stage for stage, as_locked in known.items() if as_locked and stage not in changes}
    looks = {stage for stage, change in changes.items() if change.always}
    todo = [stage for stage in stale if stage not in untouched]
    runs = [stage for stage in todo if stage not in known or stage in looks]
    why = reasons(folder, graph, todo, [stage for stage in runs if stage not in looks], changes, force)
    return Looked(todo, why, known.keys() & set(todo) - looks, len(wanted) - len(todo))


def reasons(
    folder: Path, graph: dag.Dag, todo: Sequence[str], runs: Sequence[str], changes: Mapping[str, Changes], force: bool = False
) -> dict[str, str]:
    """Why DVC would touch each stage of `todo`, in words. `runs`: those that it would run."""
    lock = dvc.locked(folder)
    tree = yaml.safe_load((folder / "params.yaml").read_text())
    code = _code(folder)
    told = {}
    for stage in todo:
        entry = lock.get(stage)
        if entry is None:
            told[stage] = "has not run here yet"
            continue
        above = [name for name in graph.needs[stage] if name in runs]
        of_code = code.get(stage.replace("@", "."), {})
        causes = [*_causes(changes.get(stage, UNCHANGED), entry, tree, of_code, folder, made(lock))]
        if above and not any(cause for cause in causes if "output" not in cause):
            causes = [f"needs {_some(sorted(above, key=list(graph.needs).index))}, made anew", *causes]
        told[stage] = _some(causes or ["forced"] if force else causes or ["its inputs changed"], "; ")
    return told


def made(lock: Mapping[str, Any]) -> set[str]:
    """The paths that stages write."""
    return {out["path"] for entry in lock.values() for out in entry.get("outs") or []}


def _some(words: Sequence[str], between: str = ", ") -> str:
    more = len(words) - CAUSES
    return between.join(words[:CAUSES]) + (f"{between}and {more} more" if more > 0 else "")


def _causes(
    changed: Changes, entry: Mapping[str, Any], tree: Any, code: Mapping[str, str], folder: Path, outputs: set[str]
) -> Iterator[str]:
    """What changed, the params first. `code`: the hashes of the modules with which the stage ran last."""
    for file, keys in changed.params.items():
        before = (entry.get("params") or {}).get(file, {})
        for key in keys:
            yield from differences(key, before.get(key, ABSENT), at(tree, key))
    if changed.always:
        yield "looks at its address anew each time; what needs it is taken to find nothing new"
    if changed.command:
        yield "its command in dvc.yaml"
    for path, state in changed.deps.items():
        if path.startswith("pipeline/"):
            modules = _changed_modules(path, code, folder)
            yield f"code: {_some(modules or [path])}"
        elif not _within(path, outputs):
            yield f"{path} is {'not there' if state == 'deleted' else 'new' if state == 'new' else 'another'}"
    if "modified" in changed.outs.values():
        yield "its output was changed by hand"
    elif changed.outs:
        yield "its output is not there"


def _within(path: str, outputs: set[str]) -> bool:
    return path in outputs or any(out.startswith(f"{path}/") for out in outputs)


ABSENT = object()


def at(tree: Any, key: str) -> Any:
    """The value of a dotted key, or ABSENT."""
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return ABSENT
        tree = tree[part]
    return tree


def differences(key: str, before: Any, now: Any) -> Iterator[str]:
    """`select.top.k: 150 -> 300` for each value below a key that is another now."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*before, *now]):
            yield from differences(f"{key}.{name}", before.get(name, ABSENT), now.get(name, ABSENT))
    elif before is ABSENT and now is not ABSENT:
        yield f"{key}: {_short(now)} is new"
    elif now is ABSENT and before is not ABSENT:
        yield f"{key} is gone (it was {_short(before)})"
    elif before != now:
        yield f"{key}: {_short(before)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _code(folder: Path) -> dict[str, Mapping[str, str]]:
    """The hashes of the modules with which each stage ran last, by the stage; the last run's, as far as one is remembered."""
    found: dict[str, Mapping[str, str]] = {}
    file = folder / DURATIONS
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            run = json.loads(line)
            found[run["name"]] = run["code"]
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _changed_modules(path: str, code: Mapping[str, str], folder: Path) -> list[str]:
    """The files at or below `path` that are not those of the last run."""
    changed = []
    for module, digest in code.items():
        name = module.replace(".", "/")
        file = next((f for f in (folder / f"{name}.py", folder / name / "__init__.py") if f.is_file()), None)
        if (f"{name}.py" == path or name.startswith(path)) and (
            file is None or hashlib.sha256(file.read_bytes()).hexdigest()[:12] != digest
        ):
            changed.append(f"{name}.py" if file is None else file.relative_to(folder).as_posix())
    return sorted(changed)


# How long -------------------------------------------------------------------------------------------------------------


def estimating(stages: Sequence[str], *more: str) -> list[str]:
    """The command that says how long stages take."""
    return [sys.executable, "-m", "pipeline", "estimate", *stages, *more]


def together(
    found: Looked, answer: Mapping[str, Any], elsewhere: Set[str] = frozenset(), shared: Mapping[str, str] | None = None
) -> Plan:
    """The plan, from what DVC knows and what the estimate says. `elsewhere`: stages that another machine does. `shared`: those
    that an earlier variant of the sweep does, and its name for them."""
    why = found.why
    rows = []
    for stage in found.todo:
        expected = (answer.get("stages") or {}).get(stage) or {"seconds": None, "by": "no estimate"}
        if stage in found.restored:
            rows.append(Row(stage, f"{why[stage]}; DVC has its result", RESTORING, RESTORING, "cache"))
        elif shared and stage in shared:
            rows.append(Row(stage, f"{why[stage]}; the same as {shared[stage]}", RESTORING, RESTORING, "cache"))
        elif stage.partition("@")[0] in elsewhere:
            rows.append(Row(stage, why[stage], None, None, "a GPU worker"))
        elif expected["seconds"] is None:
            rows.append(Row(stage, f"{why[stage]} ({expected['by']})", None, None, "not known"))
        else:
            rows.append(Row(stage, why[stage], expected["seconds"], expected["cpu"], expected["by"]))
    machine = f"{answer['cores']} cores of {answer['cpu'] or 'this machine'}" if "cores" in answer else ""
    return Plan(rows, found.current, machine, float(answer.get("probed", 0.0)))


def left(planned: Mapping[str, float], done: Mapping[str, float], at_once: int = 1) -> str:
    """`3 of 12 stages have run, about 4:30 left`: the rest of the plan at the pace of what is done.

    As in pipeline/harness/durations.py, that pace counts as seen over DOUBT of the plan before a stage has ended.
    """
    known = {stage: seconds for stage, seconds in done.items() if stage in planned}
    doubt = DOUBT * sum(planned.values())
    pace = (sum(known.values()) + doubt) / max(sum(planned[stage] for stage in known) + doubt, 1e-9)
    rest = pace * sum(seconds for stage, seconds in planned.items() if stage not in done) / max(at_once, 1)
    return f"{len(known)} of {len(planned)} stages have run, " + (f"about {clock(rest)} left" if rest else "none is left")


def of_folder(folder: Path, targets: Sequence[str], force: bool, more: Sequence[str]) -> Plan:
    """What a run in `folder` would do now. `more`: options of `python -m pipeline estimate`. Raises DVCError."""
    graph = dag.read(folder)
    wanted = graph.upstream(targets)
    found = looked(folder, graph, wanted, dag.stale(folder, wanted), force)
    answer: dict[str, Any] = {}
    if found.runs:
        done = subprocess.run(estimating(found.runs, *more), cwd=folder, env=dag.environment(), stdout=subprocess.PIPE, text=True)
        answer = json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {}
    return together(found, answer)


# Data that are not there ----------------------------------------------------------------------------------------------


def ahead(folder: Path, more: Sequence[str], width: int | None) -> str:
    """The table of hours of a params file for numbers of images. Raises DVCError with what the estimate says against them."""
    done = subprocess.run(estimating([], *more), cwd=folder, env=dag.environment(), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    answer = json.loads(done.stdout.splitlines()[-1])
    table = Table("stage", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("core-hours", "GPU-hours"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    sums = [0.0, 0.0]
    for stage, row in answer["stages"].items():
        known = row["cores"] is not None
        sums = [sums[0] + (row["cores"] or 0), sums[1] + (row["gpus"] or 0)]
        cells = (_hours(row["cores"]), _hours(row["gpus"])) if known else ("?", "?")
        table.add_row(stage, *cells, "" if known else row["by"])
    table.add_section()
    table.add_row("together", _hours(sums[0]), _hours(sums[1]), "")
    given = answer["given"]
    sentences = [
        f"{given['pool']:,} images of the pool, {given['val']:,} of validation, {given['labelled']:,} labelled, "
        f"{given['classes']:,} classes, {answer['size']} x {answer['size']} pixels.",
        f"Core-hours: probed on {answer['cores']} cores of {answer['cpu']}, one core each.",
        f"GPU-hours: an assumption, no measurement: {answer['gpu_macs']:.3g} multiply-accumulates a second (--gpu-macs).",
        *(f"Assumed: {what}." for what in answer["assumed"]),
    ]
    return shown([table], "\n".join(sentences), width)


def _hours(hours: float) -> str:
    if hours == 0:
        return ""
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}" if hours >= 0.1 else f"{hours:.3f}" if hours >= 1e-3 else "<0.001"
