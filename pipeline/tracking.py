"""Runs in MLflow, without MLflow in a stage: a stage writes a journal, a process of its own mirrors it.

A stage appends JSON lines to `.scratch/journal/<stage>.<entry>-<key>-<time>.jsonl`, which costs microseconds and needs no server.
"""

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

OFF = "WINNOW_TRACKING"


class Journal:
    """What one run of a stage tells about itself, one JSON line at a time, flushed at once.

    The file stays locked while the stage lives, so that a reader can tell a dead writer from a silent one. An error of the disk is
    said once on stderr and never reaches the stage.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._complained = False
        if path is None:
            return
        with self._never_fatal():
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab", buffering=0)
            fcntl.flock(file, fcntl.LOCK_EX)
            self._file = file

    def log(self, step: int | None = None, **values: float) -> None:
        """Note values of now: a loss, a learning rate, a duration; `step` puts them on a curve."""
        self._write("metrics", step=step, values={name: float(value) for name, value in values.items()})

    def finish(self, status: str, metrics: Mapping[str, Any], artifacts: list[Path]) -> None:
        """End the run as FINISHED, FAILED or KILLED, with its final metrics and the artifacts it wrote."""
        self._write("end", status=status, metrics=dict(metrics), artifacts=[str(path) for path in artifacts])
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, event: str, **content: Any) -> None:
        if self._file is None:
            return
        line = json.dumps({"event": event, "time": time.time(), **content}) + "\n"
        with self._never_fatal():
            self._file.write(line.encode())

    @contextlib.contextmanager
    def _never_fatal(self) -> Any:
        try:
            yield
        except OSError as error:
            if not self._complained:
                sys.stderr.write(
                    f"warning: the journal {self._path} cannot be written ({error}); MLflow will lack this run.\n"
                )
            self._complained = True


def open_journal(record: Mapping[str, Any], folder: Path) -> Journal:
    """Begin the journal of the run that `record` (stage, entry, params, inputs, seed, key, lineage) describes."""
    if os.environ.get(OFF) == "off":
        return Journal(None)
    name = ".".join(filter(None, (record["stage"], record["entry"])))
    journal = Journal(folder / f"{name}-{record['key'][:16]}-{time.time_ns()}.jsonl")
    journal._write("begin", record=dict(record))
    return journal
