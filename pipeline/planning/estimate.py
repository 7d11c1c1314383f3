"""How long each stage will take: its work at probed rates, corrected by earlier runs of the same kind of work on this machine."""

import json
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError
from pipeline.harness import durations
from pipeline.planning import counts
from pipeline.planning.counts import Counts
from pipeline.planning.probe import Prober, Rate
from pipeline.planning.work import Kind, PlanError, Recipe, Work, work_of
from pipeline.store import artifact
from pipeline.store.params import Section

PROBES = Path("probes.json")
LATEST = 5
"""How many earlier runs of a stage are looked at, the latest; the median of them counts."""
START = 0.4
"""Seconds that DVC takes around a stage: it hashes what the stage reads and writes. Measured on 2 cores of a shared AMD EPYC."""


class Estimate(NamedTuple):
    """What is expected of a stage: `seconds` on the clock, `cpu` seconds of all cores; None where `by` says why not."""

    seconds: float | None
    cpu: float | None
    by: str


@dataclass(frozen=True)
class Run:
    """An earlier run: what it took, and the work that was in it."""

    name: str
    stage: str
    wall: float
    cpu: float
    work: Work


class Rates:
    """Seconds a unit of each kind, probed once and kept in `folder` for the next plan of the same machine."""

    def __init__(self, recipe: Recipe, folder: Path, probing: bool, fresh: bool = False, size: int | None = None) -> None:
        self.prober, self.file, self.probing = Prober(recipe, size), folder / PROBES, probing
        self.machine = json.dumps([durations.machine_of(recipe.machine), size], sort_keys=True)
        self.kept: dict[str, Any] = {}
        try:
            self.kept = {} if fresh else json.loads(self.file.read_text())[self.machine]
        except (OSError, ValueError, KeyError, TypeError):
            self.kept = {}
        self.seconds = 0.0

    def of(self, kind: Kind) -> Rate:
        """Raises PlanError where it is not known and may not be probed."""
        if kind.name == "assumed":
            return Rate(1.0, 1.0)  # its units are seconds
        name = f"{kind.name} {kind.spec}"
        if name not in self.kept:
            if not self.probing:
                raise PlanError("a kind of its work was never probed here")
            began = time.monotonic()
            try:
                rate = self.prober.rate(kind)
            except (RuntimeError, MemoryError) as error:  # torch's, of a GPU without enough memory
                raise PlanError(f"its probe failed: {error}") from error
            self.kept[name] = list(rate)
            self.seconds += time.monotonic() - began
            sys.stderr.write(f"probe: {kind.told()}: {_small(rate.wall)}, {_small(rate.cpu)} of CPU time\n")
        return Rate(*self.kept[name])

    def sum(self, work: Work) -> Rate:
        """Wall and CPU seconds of some work. On a GPU, images are decoded while the network works."""
        parts = [(kind, self.of(kind), units) for kind, units in work.items()]
        cpu = sum(units * rate.cpu for _, rate, units in parts)
        wall = [(kind.name in ("step", "forward", "view"), units * rate.wall) for kind, rate, units in parts]
        network = sum(seconds for of_network, seconds in wall if of_network)
        if network and self.prober.on.device.type != "cpu":
            beside = sum(units * rate.wall for kind, rate, units in parts if kind.name == "decode")
            return Rate(sum(s for _, s in wall) - min(network, beside), cpu)
        return Rate(sum(seconds for _, seconds in wall), cpu)

    def keep(self) -> None:
        """Write what was probed for the next plan."""
        if not self.seconds:
            return
        try:
            known = json.loads(self.file.read_text())
        except (OSError, ValueError):
            known = {}
        known = known if isinstance(known, dict) else {}
        with artifact.writing_file(self.file) as tmp:
            tmp.write_text(json.dumps({**known, self.machine: self.kept}, indent=1) + "\n")


def _small(seconds: float) -> str:
    unit, factor = next(((u, f) for u, f in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)) if seconds * f >= 1), ("ns", 1e9))
    return f"{seconds * factor:.3g} {unit}"


def works_of(recipe: Recipe, stages: Iterable[str], images: Counts) -> dict[str, Work | UserError]:
    """The work of each stage (`distil@ssld`), or why it cannot be counted."""
    found: dict[str, Work | UserError] = {}
    for name in stages:
        stage, _, entry = name.partition("@")
        try:
            section = recipe.section(stage, entry or None)
            found[name] = work_of(recipe, stage, section, images.rows(stage, section.model_dump()), images.classes)
        except (UserError, KeyError, ModuleNotFoundError) as error:
            found[name] = error if isinstance(error, UserError) else PlanError(f"its work cannot be counted: {error!r}")
    return found


def earlier(recipe: Recipe, folder: Path, classes: int) -> list[Run]:
    """The runs that this machine remembers, the latest first, with the work that their params and tables say."""
    here = durations.machine_of(recipe.machine)
    found = []
    for run in durations.read(folder):
        if run.get("machine") != here or not isinstance(run.get("rows"), dict):
            continue
        try:
            section: Section = recipe.section(run["stage"], run["entry"], run["params"])
            work = work_of(recipe, run["stage"], section, run["rows"], classes)
        except (UserError, KeyError, ValueError, ModuleNotFoundError, TypeError):  # of another version of winnow, or of params
            work = {}
        name = "@".join(filter(None, (run["stage"], run["entry"])))
        found.append(Run(name, run["stage"], float(run["wall"]), float(run["cpu"]), work))
    return found[::-1]


def estimated(name: str, work: Work | UserError, runs: Sequence[Run], rates: Rates) -> Estimate:
    """What to expect of a stage. Of a run with the same work, what that took; of one with the same kinds of it in other amounts,
    what these are worth at the probed rates; where there is none, the probed rates alone."""
    stage = name.partition("@")[0]
    if isinstance(work, UserError):
        own = [run for run in runs if run.name == name][:LATEST]
        if not own:
            return Estimate(None, None, str(work).removesuffix("."))
        return _after(own, 1.0, 1.0, "an earlier run")
    same = [run for run in runs if run.stage == stage and equal(run.work, work)]
    if same:
        return _after([run for run in same if run.name == name] or same, 1.0, 1.0, "an earlier run")
    alike = [run for run in runs if run.stage == stage and run.work.keys() == work.keys()]
    try:
        now = rates.sum(work)
        if alike:
            then = rates.sum(alike[0].work)
            return _after(alike[:1], now.wall / then.wall, now.cpu / then.cpu, "an earlier run, scaled")
    except UserError as error:
        return Estimate(None, None, str(error).removesuffix("."))
    return Estimate(START + now.wall, START + now.cpu, "probe")


def _after(runs: Sequence[Run], wall: float, cpu: float, by: str) -> Estimate:
    latest = runs[:LATEST]
    seconds = statistics.median(run.wall for run in latest), statistics.median(run.cpu for run in latest)
    return Estimate(START + wall * seconds[0], START + cpu * seconds[1], by)


def equal(one: Work, other: Work, within: float = 0.02) -> bool:
    """Whether two works have the same kinds, in amounts that differ by less than so much of them."""
    return one.keys() == other.keys() and all(abs(units - other[kind]) <= within * units for kind, units in one.items())


def estimates(
    recipe: Recipe, stages: Sequence[str], folder: Path, probing: bool, fresh: bool = False
) -> tuple[dict[str, Estimate], float]:
    """What to expect of the stages of this folder, by name; and the seconds that the probes took."""
    rates = Rates(recipe, folder, probing, fresh)
    try:
        images = counts.counted(recipe, None)
    except (UserError, OSError) as error:
        images = Counts({}, 1)
        works: Mapping[str, Work | UserError] = {name: PlanError(f"its images cannot be counted: {error}") for name in stages}
    else:
        works = works_of(recipe, stages, images)
    runs = earlier(recipe, folder, images.classes)
    found = {name: estimated(name, works[name], runs, rates) for name in stages}
    rates.keep()
    return found, rates.seconds
