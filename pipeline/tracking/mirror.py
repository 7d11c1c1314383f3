"""The mirror: sends the journals of the stages to MLflow while they run, and no stage waits for it.

    .scratch/journal/*.jsonl, *.files/    what the stages wrote (`pipeline.harness.journal`); removed once MLflow has it all
    .scratch/journal/*.state              how far the mirror came
    .scratch/journal/refused/             what a healthy server would not take
    .scratch/journal/mirror.log           what was sent, and the reason for what was not

One mirror runs per folder; the first journal starts it, and it ends when it has been idle for a while.
"""

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from pipeline.harness import credentials
from pipeline.harness.journal import mirror_command, run_name, try_lock
from pipeline.tracking import leaderboard, stages
from pipeline.tracking.comparison import TAG_LIMIT, complete, numbers_of, originals, params_of, tags_of
from pipeline.tracking.experiment import Experiment, milliseconds, say, shortened
from pipeline.tracking.waiting import Waiting, journal_files, set_aside

POLL_SECONDS = 1.0
IDLE_SECONDS = 20.0
GIVE_UP_SECONDS = 120.0
STRIKES = 3


class Mirror:
    """Sends the journals of a folder to MLflow until nothing more comes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._journals: dict[Path, Waiting] = {}
        self._experiments: dict[tuple[str, str], Experiment] = {}
        self._locked_out: set[str] = set()  # stores of which this process lacks the credentials

    def follow(self) -> None:
        """Run until idle, or until nothing can be reached any more. Only one mirror of a folder runs at a time."""
        while self.folder.is_dir() and (lock := try_lock(self.folder / "mirror.lock")) is not None:
            with lock:
                gave_up = self._follow(lock)
            # A stage that began just now saw the lock and started no mirror: look once more.
            if gave_up or not journal_files(self.folder):
                return

    def _follow(self, lock: IO[bytes]) -> bool:
        useful = time.monotonic()
        # The lock file is gone when someone removed the folder; the next stage starts another mirror.
        while os.fstat(lock.fileno()).st_nlink:
            if any(experiment.was_removed() for experiment in self._experiments.values()):
                say("the database was removed: starting again")
                os.execv(sys.executable, mirror_command(self.folder))  # MLflow keeps the old one open as long as it lives
            before = journal_files(self.folder)
            alive = self.poll()
            if credentials.lacking(self._told_by_flush()):
                say("`flush` names a store of which this process lacks the credentials: its own mirror takes over")
                return True
            left = journal_files(self.folder)
            if alive or len(left) < len(before):
                useful = time.monotonic()
            if time.monotonic() - useful > (GIVE_UP_SECONDS if left else IDLE_SECONDS):
                return bool(left)
            time.sleep(POLL_SECONDS)
        return True

    def poll(self) -> bool:
        """Send what is new in every journal, the oldest first; whether a stage is still at work."""
        self._journals = {file: journal for file in journal_files(self.folder) if (journal := self._load(file))}
        for journal in self._journals.values():
            journal.read()
        self._obey_flush()
        for journal in self._journals.values():
            if credentials.lacking(journal.state.uri):
                self._lock_out(journal.state.uri)
                continue
            experiment = self._experiment(journal)
            patient = journal.strikes < STRIKES or not journal.alive
            if patient and journal.lock_is_settled() and time.monotonic() >= experiment.resting_until:
                self._try(journal, experiment)
        return any(journal.alive for journal in self._journals.values())

    def _lock_out(self, uri: str) -> None:
        if uri not in self._locked_out:
            say(f"{uri} wants credentials. `flush` sends what waits for it, with MLFLOW_TRACKING_URI as the stage had it")
            self._locked_out.add(uri)

    def _told_by_flush(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "flush").read_text()
        return ""

    def _load(self, file: Path) -> Waiting | None:
        try:
            return self._journals.get(file) or Waiting(file)
        except (ValueError, KeyError, TypeError) as error:
            say(f"{file.name} is damaged and was set aside: {error!r}")
            set_aside(file)
            return None

    def _obey_flush(self) -> None:
        """Try again at once what was resting; `flush` may also name another store for everything that has ended."""
        marker = self.folder / "flush"
        if not marker.exists() or credentials.lacking(uri := marker.read_text()):
            return
        marker.unlink()
        for experiment in self._experiments.values():
            experiment.resting_until = 0.0
        for journal in self._journals.values():
            if uri not in ("", journal.state.uri) and not journal.alive:
                journal.restart(uri)
                journal.read()

    def _try(self, journal: Waiting, experiment: Experiment) -> None:
        """Send; after a failure find out whose fault it is: the server's, the database's, or the journal's."""
        try:
            self._send(journal, experiment)
            journal.strikes = 0
        except Exception as error:
            say(f"{journal.path.name}: {error!r}")
            if not experiment.healthy():
                return
            if journal.state.run_id is not None and not experiment.has(journal.state.run_id):
                journal.restart(journal.state.uri)
            journal.strikes += 1
            if journal.strikes >= STRIKES and not journal.alive:
                self._refuse(journal, experiment)

    def _refuse(self, journal: Waiting, experiment: Experiment) -> None:
        say(f"{journal.path.name}: set aside in {self.folder / 'refused'}")
        set_aside(journal.path)
        run_id = journal.state.run_id
        with contextlib.suppress(Exception):  # a courtesy; what is wrong with this run may also refuse it
            if experiment.client.get_run(run_id).info.status == "RUNNING":
                experiment.client.set_terminated(run_id, "FAILED", end_time=milliseconds(journal.state.last_time))

    def _experiment(self, journal: Waiting, suffix: str = "") -> Experiment:
        where = journal.state.uri, journal.begin["experiment"] + suffix
        return self._experiments.setdefault(where, Experiment(*where))

    def _send(self, journal: Waiting, experiment: Experiment) -> None:
        if journal.state.run_id is None:
            self._begin(journal, experiment)
        run_id = journal.state.run_id
        assert run_id is not None
        if not journal.unsent:
            return
        told = [e for e in journal.unsent if e["event"] == "metrics"]
        metrics = [(name, value, e["time"], e["step"] or 0) for e in told for name, value in e["values"].items()]
        last = journal.state.last_step = max([journal.state.last_step, *(step for _, _, _, step in metrics)])
        end = journal.end
        if end is None:
            experiment.log(run_id, {}, metrics)
            journal.sent()
        else:
            # On the last step of the curves: MLflow shows the value of the highest step as a run's metric.
            # A millisecond later: of two values of one step and one millisecond MLflow takes the larger for the latest.
            final = [(name, value, end["time"] + 0.001, last) for name, value in numbers_of(end["metrics"]).items()]
            experiment.log(run_id, {}, metrics + final)
            self._end(journal, experiment, run_id, end)

    def _begin(self, journal: Waiting, experiment: Experiment) -> None:
        """Create the run, or find the one that a mirror created just before it was killed."""
        record, name = journal.record, journal.path.stem
        runs = experiment.search("winnow.journal", name) if journal.known else []
        if runs:
            run_id = runs[0].info.run_id
        else:
            journal.save()
            tags = {**tags_of(record, "executed"), **journal.begin["tags"], "winnow.journal": name}
            earlier = originals(experiment, record["key"])
            if earlier:
                tags["winnow.repeat"] = earlier[0].info.run_id
            run_id = experiment.create(run_name(record), journal.begin["time"], tags)
        experiment.log(run_id, params_of(record), [])
        journal.state.run_id = run_id
        journal.save()

    def _end(self, journal: Waiting, experiment: Experiment, run_id: str, end: dict[str, Any]) -> None:
        client, record = experiment.client, journal.record
        if end.get("error"):
            client.set_tag(run_id, "winnow.error", shortened(end["error"], TAG_LIMIT))
        if journal.state.dvc_lock:
            client.set_tag(run_id, "winnow.dvc_lock", journal.state.dvc_lock)
        files = journal.path.with_suffix(".files")
        if end["status"] == "FINISHED" and journal.begin["gathers"]:
            rows = complete(experiment, run_id, record["lineage"], end, files / "runs.json")
            stages.write(record, rows, end["time"] - journal.begin["time"], files)
            board = self._experiment(journal, leaderboard.SUFFIX)
            leaderboard.write(board, experiment, record, end)
        client.set_terminated(run_id, end["status"], end_time=milliseconds(end["time"]))
        # After the numbers: a server whose artifact store is out of reach shall not keep the run open.
        if files.is_dir():
            client.log_artifacts(run_id, str(files))
        journal.remove()
        say(f"{run_name(record)}: {end['status']}, run {run_id}")
