"""How long stages took on this machine, one JSON line a run, and how long a planned run has still to go.

    .scratch/durations.jsonl     what `python -m flows plan` takes its best predictions from
    .scratch/plan.json           the seconds that it expects of each stage; WINNOW_PLAN names it to the stages of that run

Nothing here can stop a stage: a file that cannot be written or read is a run that nobody learns from.
"""

import contextlib
import json
import os
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.harness import progress
from pipeline.harness.machine import Machine, processor
from pipeline.store import artifact

FILE, PLAN = Path("durations.jsonl"), Path("plan.json")
LIMIT = 8_000_000  # bytes of the file; then its older half goes
DOUBT = 0.1
"""The pace of a run counts as seen over this share of the plan before its first stage has ended: one stage is no pace."""


def usage() -> tuple[float, float]:
    """Wall seconds since this process started (Linux: its imports included), and its CPU seconds with those of its children."""
    cpu = sum(r.ru_utime + r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started, cpu
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time(), cpu


def machine_of(machine: Machine) -> dict[str, Any]:
    """What of a machine decides how long work takes: durations are compared where this is equal."""
    how = machine.model_dump(mode="json", exclude={"memory_gb", "checkpoint_minutes"})
    return {"cpu": processor(), "cores": len(os.sched_getaffinity(0)), **how}


def rows_of(paths: Mapping[str, Path]) -> dict[str, int]:
    """How many rows the tables have that a stage reads and writes: by the name of the path, of the first table there."""
    rows = {}
    for name, path in paths.items():
        tables = sorted(path.glob("*.parquet")) if path.is_dir() else []
        with contextlib.suppress(OSError, ValueError):  # Arrow's, of a damaged file, are ValueErrors
            if tables:
                rows[name] = int(pq.read_metadata(tables[0]).num_rows)
    return rows


def keep(folder: Path, **facts: Any) -> None:
    """Add a run to the file in `folder`, with the time of now."""
    with contextlib.suppress(OSError):
        file = folder / FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file() and file.stat().st_size > LIMIT:
            lines = file.read_bytes().splitlines(keepends=True)
            with artifact.writing_file(file) as tmp:
                tmp.write_bytes(b"".join(lines[len(lines) // 2 :]))
        with file.open("ab", buffering=0) as f:
            f.write(json.dumps({"ended": time.time(), **facts}).encode() + b"\n")


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """The runs in the file of `folder`, the oldest first; a line that a kill or a full disk cut off is passed over."""
    file = folder / FILE
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            run = json.loads(line)
            if isinstance(run, dict) and {"name", "wall", "cpu", "ended"} <= run.keys():
                yield run


def told(folder: Path) -> str | None:
    """`7 of 26 stages have run, about 4:30 left` of the run whose plan WINNOW_PLAN names; None where there is none."""
    named = os.environ.get("WINNOW_PLAN")
    if not named:
        return None
    try:
        plan = json.loads(Path(named).read_text())
        planned = {str(name): float(seconds) for name, seconds in plan["stages"].items()}
        done = {run["name"]: float(run["wall"]) for run in read(folder) if run["ended"] > plan["at"] and run["name"] in planned}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not done:
        return None
    rest = left(planned, done)
    return f"{len(done)} of {len(planned)} stages have run, {f'about {progress.clock(rest)} left' if rest else 'none is left'}"


def left(planned: Mapping[str, float], done: Mapping[str, float]) -> float:
    """Seconds that the stages of a plan which are not yet done will take, at the pace of those that are."""
    doubt = DOUBT * sum(planned.values())
    pace = (sum(done.values()) + doubt) / max(sum(planned[name] for name in done) + doubt, 1e-9)
    return pace * sum(seconds for name, seconds in planned.items() if name not in done)
