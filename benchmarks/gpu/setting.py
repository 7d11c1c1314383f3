"""What every piece is given, and how its rows are kept: one JSON file a row, then one a piece, each whole or not there."""

import json
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.seeds import ROOT, machine
from pipeline.errors import UserError
from pipeline.harness.job import Job
from pipeline.harness.journal import Journal
from pipeline.harness.machine import Machine
from pipeline.models import device
from pipeline.models.device import Device
from pipeline.store.artifact import writing_file

Row = dict[str, Any]
"""Figures by the heading of their column. A share of 1 stands under a heading that ends with `%`; a list is a curve."""
Make = Callable[[Path], Row]
"""Measures one row; the folder is for checkpoints, and there again if the last call did not come to the row's end."""
Rows = Mapping[str, Make]

WORK = "work"
LONG = 1 / 3  # of the time: a row that cannot be interrupted does not begin when less is left, and must not take longer
CHECKPOINT_MINUTES = 0.25


class OutOfTime(Exception):
    """The time is over; what is done is kept, and the same command goes on from there."""


@dataclass(frozen=True)
class Setting:
    """One call of the command: where it runs, where it writes, until when."""

    out: Path
    on: Device
    tiny: bool
    data: Path | None
    began: float  # by time.monotonic
    seconds: float
    asked: str  # the device, as the command was given it
    commit: str

    def left(self) -> float:
        """The share of the time that is left; at most 1, below 0 when it is over."""
        return 1 - (time.monotonic() - self.began) / self.seconds

    def go_on(self) -> None:
        """For each step of a training that has a checkpoint. Raises OutOfTime."""
        if self.left() <= 0:
            raise OutOfTime

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.on.device.type == "cuda":
            torch.cuda.synchronize(self.on.device)

    def precise(self, precision: str) -> Device:
        """The same device with another precision: `bfloat16` or `float32`."""
        return replace(self.on, dtype=getattr(torch, precision))

    def job(self, seed: int, folder: Path) -> Job:
        """A training whose checkpoints lie in `folder`."""
        return Job(seed, folder, Journal(), Machine(checkpoint_minutes=CHECKPOINT_MINUTES))

    def peak_gb(self) -> float | None:
        """The most memory that the GPU's tensors took since this was asked last; None on a CPU."""
        if self.on.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(self.on.device) / 1e9
        torch.cuda.reset_peak_memory_stats(self.on.device)
        return round(peak, 2)

    def clock(self, work: Callable[[], object]) -> float:
        """Seconds that `work` takes, the device's included."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        """What stands beside every figure."""
        cuda = self.on.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.on.device) if cuda else machine(),
            "devices": torch.cuda.device_count() if cuda else 0,
            "host": machine(),
            "precision": self.on.precision,
            "torch": torch.__version__,
            "cuda": torch.version.cuda if cuda else None,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
            "python": platform.python_version(),
            "commit": self.commit,
            "tiny": self.tiny,
        }


def begin(out: Path, asked: str, minutes: float, tiny: bool, data: Path | None, commit: str | None) -> Setting:
    """The setting of a call that begins now. Raises UserError for a device that is not there."""
    on = device.pick(Machine(device=asked, threads=1 if tiny else 0))
    return Setting(out.resolve(), on, tiny, data, time.monotonic(), 60 * minutes, asked, commit or commit_of(ROOT))


def commit_of(folder: Path) -> str:
    """The commit of a git checkout, marked where its code differs; `unknown` in a copy without git."""
    git = ["git", "--no-optional-locks", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "pipeline", "benchmarks"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (", changed" if changed.stdout else "")


def finish(name: str, rows: Rows, setting: Setting, long: bool) -> bool:
    """Measure the rows of a piece that are not there yet, and put them together; whether all of them are there now.

    `long`: its rows cannot be interrupted. A row that fails is told on stderr and tried again by the next call; the others go
    on. Raises UserError for a folder with figures of another device or size.
    """
    target, work = setting.out / f"{name}.json", setting.out / WORK / name
    _expect_the_same(setting)
    if target.is_file():
        print(f"{name}: done before", file=sys.stderr)
        return True
    for row, make in rows.items():
        file = work / f"{row}.json"
        if file.is_file():
            continue
        if setting.left() <= (LONG if long else 0):
            print(f"{name}: {row} is left for the next call", file=sys.stderr)
            return False
        print(f"{name}: {row}", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            figures = make(work / row)
        except OutOfTime:
            print(f"{name}: {row} is not finished; its checkpoint is kept", file=sys.stderr)
            return False
        except Exception as error:  # of any kind: the machine is lent for minutes, and no row depends on another
            print(f"error: {error}" if isinstance(error, UserError) else traceback.format_exc(), file=sys.stderr)
            print(f"{name}: {row} failed", file=sys.stderr, flush=True)
            continue
        finally:
            torch.compiler.reset()
        _write(file, {**setting.facts(), "row": {**figures, "seconds": round(time.monotonic() - start, 1)}})
        shutil.rmtree(work / row, ignore_errors=True)
    if not all((work / f"{row}.json").is_file() for row in rows):
        return False
    _write(target, {**setting.facts(), "piece": name, "rows": list(kept(work, rows))})
    shutil.rmtree(work)
    return True


def kept(work: Path, rows: Rows) -> Iterator[Row]:
    """The rows that are there, in their order."""
    for row in rows:
        if (work / f"{row}.json").is_file():
            yield json.loads((work / f"{row}.json").read_text())["row"]


def _expect_the_same(setting: Setting) -> None:
    facts = setting.facts()
    for file in [*setting.out.glob("*.json"), *(setting.out / WORK).glob("*/*.json")]:
        found = json.loads(file.read_text())
        if (found["device"], found["tiny"]) != (facts["device"], facts["tiny"]):
            raise UserError(
                f"{file} was measured on {found['device']}{' (tiny)' * found['tiny']}, and this is {facts['device']}"
                f"{' (tiny)' * facts['tiny']}: give another folder as --out."
            )


def _write(file: Path, content: Row) -> None:
    with writing_file(file) as tmp:
        tmp.write_text(json.dumps(content, indent=1) + "\n")


def translated(model: nn.Module, setting: Setting, attempt: Callable[[nn.Module], object]) -> tuple[nn.Module, str]:
    """`torch.compile` of a network on which `attempt` works, and what did it; the network as it is, and why, where none does."""
    backend = "eager" if setting.tiny else "inductor"  # `eager` traces only: seconds instead of minutes
    try:
        model_in_turn: nn.Module = torch.compile(model, backend=backend)  # type: ignore[assignment]
        attempt(model_in_turn)
    except Exception as error:  # no C compiler, no Triton, a network that cannot be traced: of many types
        return model, f"not compiled: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    return model_in_turn, "traced only (tiny)" if setting.tiny else "torch.compile"


def spread(ratios: list[float]) -> str:
    """The range of shares, in percent."""
    return f"{min(ratios):.1%} to {max(ratios):.1%}"


def median(values: list[float]) -> float:
    return float(np.median(values))
