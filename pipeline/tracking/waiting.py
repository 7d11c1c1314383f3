"""A journal on its way to MLflow."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

from pipeline.harness import credentials
from pipeline.harness.journal import has_ended


@dataclasses.dataclass
class State:
    """How far a journal was sent. Written after each step; a step that is repeated after a crash changes nothing in MLflow."""

    uri: str
    run_id: str | None = None
    offset: int = 0
    last_step: int = 0
    last_time: float = 0.0
    dvc_lock: str | None = None


class Waiting:
    """A journal on its way: what was read of it and what was sent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as f:
            self.begin: dict[str, Any] = json.loads(f.readline())
            self._start = f.tell()
        self.record: dict[str, Any] = self.begin["record"]
        self._state_file = path.with_suffix(".state")
        self.known = self._state_file.exists()
        self.state = self._unsent(credentials.masked(self.begin["uri"]))
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):  # none yet, or damaged when the machine went down
            self.state = State(**json.loads(self._state_file.read_text()))
        self._read_to = self.state.offset
        self.unsent: list[dict[str, Any]] = []
        self.strikes = 0
        self.alive = True

    def _unsent(self, uri: str) -> State:
        return State(uri, offset=self._start, last_time=self.begin["time"])

    def read(self) -> None:
        """Take in what the stage has written since, at most some megabytes at a time."""
        # First the lock, then the lines: the other way round, the last words of a stage that ends in between would be missed.
        self.alive = not has_ended(self.path)
        if len(self.unsent) > 10_000:
            return
        with self.path.open("rb") as f:
            f.seek(self._read_to)
            block = f.read(1 << 26)
        whole = block[: block.rfind(b"\n") + 1]
        self._read_to += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):  # a line that a full disk tore apart
                self.unsent.append(json.loads(line))
        if self.unsent:
            self.state.last_time = self.unsent[-1]["time"]
        if not self.alive and not whole and self.end is None:
            self.unsent.append({"event": "end", "time": self.state.last_time, "status": "KILLED", "metrics": {}})

    @property
    def end(self) -> dict[str, Any] | None:
        """The last word, once it was read."""
        return self.unsent[-1] if self.unsent and self.unsent[-1]["event"] == "end" else None

    def lock_is_settled(self) -> bool:
        """Whether dvc.lock holds the comparison: DVC writes it after the stage has ended. Notes its hash, while it is fresh."""
        if self.end is None or not self.begin["gathers"] or self.state.dvc_lock is not None:
            return True
        file, now = Path(self.begin["workspace"], "dvc.lock"), time.time()
        written, age = file.stat().st_mtime if file.is_file() else 0.0, now - self.end["time"]
        # Not at once when it was written: DVC empties the file before it fills it.
        if self.begin["dvc"] and age < 30 and not self.end["time"] <= written < now - 1:
            return False
        self.state.dvc_lock = hashlib.sha256(file.read_bytes()).hexdigest() if written and age < 60 else ""
        self.save()
        return True

    def restart(self, uri: str) -> None:
        """Send it from the start: to another store, or to a database that has lost its run."""
        self.state = dataclasses.replace(self._unsent(uri), dvc_lock=self.state.dvc_lock)
        self._read_to, self.unsent = self._start, []
        self.save()

    def sent(self) -> None:
        """All that was read is in MLflow."""
        self.unsent, self.state.offset = [], self._read_to
        self.save()

    def save(self) -> None:
        tmp = self._state_file.with_suffix(".state-new")
        tmp.write_text(json.dumps(dataclasses.asdict(self.state)))
        tmp.rename(self._state_file)
        self.known = True

    def remove(self) -> None:
        # The journal last: whatever is left of it after a crash is sent again, and found to be there.
        shutil.rmtree(self.path.with_suffix(".files"), ignore_errors=True)
        self.path.unlink()
        self._state_file.unlink(missing_ok=True)


def journal_files(folder: Path) -> list[Path]:
    """The journals, the first begun first: their names end with the time."""
    return sorted(folder.glob("*.jsonl"), key=lambda file: file.stem.rpartition("-")[2])


def set_aside(journal: Path) -> None:
    refused = journal.parent / "refused"
    refused.mkdir(exist_ok=True)
    for path in (journal.with_suffix(".state"), journal.with_suffix(".files"), journal):
        if path.exists():
            path.rename(refused / path.name)
