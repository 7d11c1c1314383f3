"""The mirror: sends the journals of the stages to MLflow. The only module that imports mlflow, and no stage waits for it.

    .scratch/journal/*.jsonl, *.files/    what the stages wrote (`pipeline.journal`); removed once MLflow has it all
    .scratch/journal/*.state              how far the mirror came
    .scratch/journal/refused/             what a healthy server would not take
    .scratch/journal/mirror.log           what was sent, and the reason for what was not

One mirror runs per folder; the first journal starts it, and it ends when it has been idle for a while.
`python -m pipeline.tracking flush` waits until everything is sent. The store is `sqlite:///mlflow.db`, or MLFLOW_TRACKING_URI.

When `compare` ends, the stages it was made from become children of its run, also those that DVC skipped or restored: see
`complete`. So a comparison in MLflow is as complete as the one on disk.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.journal import (
    COMPARISON,
    DEFAULT_URI,
    has_ended,
    mirror_command,
    run_name,
    start_mirror,
    try_lock,
)

JOURNALS = Path(".scratch", "journal")
WORKTREES = Path(".scratch", "worktrees")  # of flows/worktree.py

POLL_SECONDS = 1.0
IDLE_SECONDS = 20.0
GIVE_UP_SECONDS = 120.0
LONGEST_WAIT_SECONDS = 60.0
STRIKES = 3
TAG_LIMIT = 5000

MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "DO_NOT_TRACK": "true",
}


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
        self.state = self._unsent(self.begin["uri"])
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
        if self.end is None or self.record["stage"] != COMPARISON or self.state.dvc_lock is not None:
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


class Store:
    """An experiment of an MLflow store. Opened when first used; after a failure it rests for a growing time."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri, self._experiment = uri, experiment
        self._client: Any = None
        self._database = Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None
        self._inode = 0
        self._rest = 0.0
        self.resting_until = 0.0

    @property
    def client(self) -> Any:
        """The MlflowClient; the database and the experiment exist."""
        if self._client is None:
            for name, value in MLFLOW_SETTINGS.items():
                os.environ.setdefault(name, value)
            from mlflow.tracking import MlflowClient

            with _one_at_a_time(self._database):
                client = MlflowClient(self.uri)
                self.experiment_id = _experiment_id(client, self._experiment, self._database)
            self._inode = _inode(self._database) if self._database else 0
            self._client = client
        return self._client

    def healthy(self) -> bool:
        """Whether it answers; if not, it is left alone for twice as long as the last time."""
        try:
            self.client.get_experiment(self.experiment_id)
        except Exception as error:
            self._rest = min(2 * self._rest or 1.0, LONGEST_WAIT_SECONDS)
            self.resting_until = time.monotonic() + self._rest
            _say(f"{self.uri} does not answer, next try in {self._rest:.0f} s: {error!r}")
            return False
        self._rest = 0.0
        return True

    def create(self, name: str, start: float, tags: Mapping[str, str]) -> str:
        run = self.client.create_run(self.experiment_id, start_time=_ms(start), run_name=name, tags=dict(tags))
        return str(run.info.run_id)

    def log(self, run_id: str, params: Mapping[str, Any], metrics: Sequence[tuple[str, float, float, int]]) -> None:
        """Params by name, and metrics as (name, value, time, step), in as few requests as MLflow's limits allow."""
        from mlflow.entities import Metric, Param

        client = self.client
        all_params = [Param(_legal(name), _text(value, 6000)) for name, value in params.items()]
        all_metrics = [Metric(_legal(name), value, _ms(at), step) for name, value, at, step in metrics]
        for some, others in itertools.zip_longest(_chunks(all_params, 100), _chunks(all_metrics, 900), fillvalue=()):
            client.log_batch(run_id, params=some, metrics=others)

    def search(self, tag: str, value: str) -> list[Any]:
        """The runs with this tag, the newest first."""
        query, order = f"tags.`{tag}` = '{value}'", ["attributes.start_time DESC"]
        return list(self.client.search_runs([self.experiment_id], query, order_by=order, max_results=10_000))

    def has(self, run_id: str) -> bool:
        try:
            return bool(self.client.get_run(run_id))
        except Exception:
            return False

    def was_removed(self) -> bool:
        """Whether the database file was removed or replaced: an open connection would go on writing into the removed one."""
        return self._client is not None and self._database is not None and _inode(self._database) != self._inode


class Mirror:
    """Sends the journals of a folder to MLflow until nothing more comes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._journals: dict[Path, Waiting] = {}
        self._stores: dict[tuple[str, str], Store] = {}

    def follow(self) -> None:
        """Run until idle, or until nothing can be reached any more. Only one mirror of a folder runs at a time."""
        while self.folder.is_dir() and (lock := try_lock(self.folder / "mirror.lock")) is not None:
            with lock:
                gave_up = self._follow(lock)
            # A stage that began just now saw the lock and started no mirror: look once more.
            if gave_up or not _journal_files(self.folder):
                return

    def _follow(self, lock: IO[bytes]) -> bool:
        useful = time.monotonic()
        # The lock file is gone when someone removed the folder; the next stage starts another mirror.
        while os.fstat(lock.fileno()).st_nlink:
            if any(store.was_removed() for store in self._stores.values()):
                _say("the database was removed: starting again")
                os.execv(sys.executable, mirror_command(self.folder))  # MLflow keeps the old one open as long as it lives
            before = _journal_files(self.folder)
            alive = self.poll()
            left = _journal_files(self.folder)
            if alive or len(left) < len(before):
                useful = time.monotonic()
            if time.monotonic() - useful > (GIVE_UP_SECONDS if left else IDLE_SECONDS):
                return bool(left)
            time.sleep(POLL_SECONDS)
        return True

    def poll(self) -> bool:
        """Send what is new in every journal, the oldest first; whether a stage is still at work."""
        self._journals = {file: journal for file in _journal_files(self.folder) if (journal := self._load(file))}
        for journal in self._journals.values():
            journal.read()
        self._obey_flush()
        for journal in self._journals.values():
            store = self._store(journal)
            patient = journal.strikes < STRIKES or not journal.alive
            if patient and journal.lock_is_settled() and time.monotonic() >= store.resting_until:
                self._try(journal, store)
        return any(journal.alive for journal in self._journals.values())

    def _load(self, file: Path) -> Waiting | None:
        try:
            return self._journals.get(file) or Waiting(file)
        except (ValueError, KeyError, TypeError) as error:
            _say(f"{file.name} is damaged and was set aside: {error!r}")
            _set_aside(file)
            return None

    def _obey_flush(self) -> None:
        """Try again at once what was resting; `flush` may also name another store for everything that has ended."""
        marker = self.folder / "flush"
        if not marker.exists():
            return
        uri = marker.read_text()
        marker.unlink()
        for store in self._stores.values():
            store.resting_until = 0.0
        for journal in self._journals.values():
            if uri not in ("", journal.state.uri) and not journal.alive:
                journal.restart(uri)
                journal.read()

    def _try(self, journal: Waiting, store: Store) -> None:
        """Send; after a failure find out whose fault it is: the server's, the database's, or the journal's."""
        try:
            self._send(journal, store)
            journal.strikes = 0
        except Exception as error:
            _say(f"{journal.path.name}: {error!r}")
            if not store.healthy():
                return
            if journal.state.run_id is not None and not store.has(journal.state.run_id):
                journal.restart(store.uri)
            journal.strikes += 1
            if journal.strikes >= STRIKES and not journal.alive:
                self._refuse(journal, store)

    def _refuse(self, journal: Waiting, store: Store) -> None:
        _say(f"{journal.path.name}: set aside in {self.folder / 'refused'}")
        _set_aside(journal.path)
        run_id = journal.state.run_id
        with contextlib.suppress(Exception):  # a courtesy; what is wrong with this run may also refuse it
            if store.client.get_run(run_id).info.status == "RUNNING":
                store.client.set_terminated(run_id, "FAILED", end_time=_ms(journal.state.last_time))

    def _store(self, journal: Waiting) -> Store:
        where = journal.state.uri, journal.begin["experiment"]
        return self._stores.setdefault(where, Store(*where))

    def _send(self, journal: Waiting, store: Store) -> None:
        if journal.state.run_id is None:
            self._begin(journal, store)
        run_id = journal.state.run_id
        assert run_id is not None
        if not journal.unsent:
            return
        told = [e for e in journal.unsent if e["event"] == "metrics"]
        metrics = [(name, value, e["time"], e["step"] or 0) for e in told for name, value in e["values"].items()]
        last = journal.state.last_step = max([journal.state.last_step, *(step for _, _, _, step in metrics)])
        end = journal.end
        if end is None:
            store.log(run_id, {}, metrics)
            journal.sent()
        else:
            # On the last step of the curves: MLflow shows the value of the highest step as a run's metric.
            # A millisecond later: of two values of one step and one millisecond MLflow takes the larger for the latest.
            final = [(name, value, end["time"] + 0.001, last) for name, value in _numbers(end["metrics"]).items()]
            store.log(run_id, {}, metrics + final)
            self._end(journal, store, run_id, end)

    def _begin(self, journal: Waiting, store: Store) -> None:
        """Create the run, or find the one that a mirror created just before it was killed."""
        record, name = journal.record, journal.path.stem
        found = store.search("winnow.journal", name) if journal.known else []
        if found:
            run_id = found[0].info.run_id
        else:
            journal.save()
            tags = {**_tags(record, "executed"), **journal.begin["tags"], "winnow.journal": name}
            earlier = _originals(store, record["key"])
            if earlier:
                tags["winnow.repeat"] = earlier[0].info.run_id
            run_id = store.create(run_name(record), journal.begin["time"], tags)
        store.log(run_id, _params(record), [])
        journal.state.run_id = run_id
        journal.save()

    def _end(self, journal: Waiting, store: Store, run_id: str, end: dict[str, Any]) -> None:
        client, record = store.client, journal.record
        if end.get("error"):
            client.set_tag(run_id, "winnow.error", _text(end["error"], TAG_LIMIT))
        if journal.state.dvc_lock:
            client.set_tag(run_id, "winnow.dvc_lock", journal.state.dvc_lock)
        files = journal.path.with_suffix(".files")
        if end["status"] == "FINISHED" and record["stage"] == COMPARISON:
            complete(store, run_id, record["lineage"], end, files / "runs.json")
        client.set_terminated(run_id, end["status"], end_time=_ms(end["time"]))
        # After the numbers: a server whose artifact store is out of reach shall not keep the run open.
        if files.is_dir():
            client.log_artifacts(run_id, str(files))
        journal.remove()
        _say(f"{run_name(record)}: {end['status']}, run {run_id}")


def complete(store: Store, parent: str, lineage: Mapping[str, Any], end: Mapping[str, Any], table: Path) -> None:
    """Give a comparison one child run for every stage it was made from, all their params and metrics, and a table of them.

    executed: its run since the last comparison becomes the child. unchanged: DVC had nothing to do; the child is a copy
    that names the run it stands for (winnow.source). restored: no run is known, since DVC took the outcome from its cache
    or the database is new; the child is made from the artifact's record and the metrics file.
    """
    children = {run.data.tags.get("winnow.key"): run for run in store.search("mlflow.parentRunId", parent)}
    names = Counter(run_name(record) for record in lineage.values())
    rows, all_params, all_metrics = [], dict[str, Any](), dict[str, float]()
    for key, record in sorted(lineage.items(), key=lambda item: run_name(item[1])):
        metrics = _numbers(end.get("compared", {}).get(key, {}))
        child = children.get(key)
        if child is None or child.info.status != "FINISHED":
            child = _child(store, parent, record, metrics, end["time"], unfinished=child)
        name = run_name(record)
        if names[name] > 1:  # a stage was repeated, but not all that follow it: `dvc repro --single-item`
            name += f":{key[:8]}"
        all_params |= {f"{name}.{k}": v for k, v in _params(record).items()}
        all_metrics |= {f"{name}.{k}": v for k, v in metrics.items()}
        link = f"#/experiments/{store.experiment_id}/runs/{child.info.run_id}"
        status = child.data.tags["winnow.status"]
        rows.append({"stage": name, "status": status, "run_id": child.info.run_id, "link": link, "key": key})
    store.log(parent, all_params, [(name, value, end["time"], 0) for name, value in all_metrics.items()])
    table.parent.mkdir(exist_ok=True)
    table.write_text(json.dumps(rows, indent=1) + "\n")
    store.client.set_tag(parent, "mlflow.note.content", _note(rows))


def _note(rows: list[dict[str, str]]) -> str:
    """What MLflow shows as the description of a comparison: its stages, with links to their runs."""
    counts = Counter(row["status"] for row in rows)
    summary = f"{len(rows)} stages: " + ", ".join(f"{counts[s]} {s}" for s in ("executed", "unchanged", "restored"))
    table = "".join(f"\n| [{row['stage']}]({row['link']}) | {row['status']} |" for row in rows)
    note = f"{summary}\n\n| stage | status |\n| --- | --- |{table}"
    return note if len(note) <= TAG_LIMIT else f"{summary}; runs.json lists them."


def _child(store: Store, parent: str, record: Mapping[str, Any], metrics: dict[str, float], now: float, unfinished: Any) -> Any:
    """The run of a stage under a comparison; see `complete`. `unfinished`: a mirror was killed while it made it."""
    client, source = store.client, next(iter(_originals(store, record["key"])), None)
    start = end = now
    tags = _tags(record, "restored")
    if source is not None:
        if unfinished is None and "mlflow.parentRunId" not in source.data.tags:
            client.set_tag(source.info.run_id, "mlflow.parentRunId", parent)
            return source
        start, end = source.info.start_time / 1000, source.info.end_time / 1000
        tags = {**_tags(record, "unchanged"), "winnow.source": source.info.run_id}
    tags["mlflow.parentRunId"] = parent
    run_id = unfinished.info.run_id if unfinished is not None else store.create(run_name(record), start, tags)
    known = metrics or (source.data.metrics if source else {})
    store.log(run_id, _params(record), [(name, value, end, 0) for name, value in known.items()])
    client.set_terminated(run_id, "FINISHED", end_time=_ms(end))
    return client.get_run(run_id)


def _originals(store: Store, key: str) -> list[Any]:
    """The finished runs of this key that are no copies, the newest first."""
    runs = store.search("winnow.key", key)
    return [r for r in runs if r.info.status == "FINISHED" and r.data.tags.get("winnow.status") != "unchanged"]


@contextlib.contextmanager
def _one_at_a_time(database: Path | None) -> Iterator[None]:
    """Let one process create a new SQLite database while others wait: MLflow's own creation fails in all but one."""
    if database is None:
        yield
        return
    with Path(f"{database}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _inode(file: Path) -> int:
    return file.stat().st_ino if file.exists() else 0


def _experiment_id(client: Any, name: str, database: Path | None) -> str:
    """The experiment of this name, made if it is new; `database`: the file of the store, None for a server."""
    from mlflow.exceptions import MlflowException

    # MLflow would put the files into ./mlruns of whoever comes first, which may be a worktree that is removed after its run.
    where = (database.parent / "mlartifacts").absolute().as_uri() if database is not None else None
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=where))
        except MlflowException:  # another process was faster
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def _tags(record: Mapping[str, Any], status: str) -> dict[str, str]:
    inputs = {name: {"path": i["path"], "identity": i["identity"]} for name, i in record["inputs"].items()}
    text = json.dumps(inputs)
    if len(text) > TAG_LIMIT:
        text = json.dumps({i["path"]: i["identity"][:12] for i in inputs.values()})
    return {
        "winnow.stage": record["stage"],
        **({"winnow.entry": record["entry"]} if record["entry"] else {}),
        "winnow.key": record["key"],
        "winnow.inputs": _text(text, TAG_LIMIT),
        "winnow.status": status,
        "mlflow.source.name": " ".join(filter(None, (f"python -m pipeline.stages.{record['stage']}", record["entry"]))),
        "mlflow.source.type": "LOCAL",
    }


def _params(record: Mapping[str, Any]) -> dict[str, Any]:
    seed = {"seed": record["seed"]} if "seed" in record else {}
    return {**_flat(record["params"]), **seed}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow can take as a metric; metrics.json among the artifacts has the rest."""
    return {name: float(value) for name, value in _flat(metrics).items() if isinstance(value, int | float)}


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{inner}": v for inner, v in _flat(value).items()})
        else:
            flat[name] = value
    return flat


def _legal(name: str) -> str:
    """A name that MLflow accepts: letters, digits and `_-. /:`, at most 250, and nothing like `a//b` or `../a`."""
    name = "".join(c if c.isalnum() or c in "_-. /:" else "_" for c in name)[:250]
    is_a_plain_path = posixpath.normpath(name) == name and not name.startswith(("/", "..")) and name != "."
    return name if is_a_plain_path else re.sub(r"/|\.\.|^\.?$", "_", name)


def _text(value: Any, limit: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _journal_files(folder: Path) -> list[Path]:
    """The journals, the first begun first: their names end with the time."""
    return sorted(folder.glob("*.jsonl"), key=lambda file: file.stem.rpartition("-")[2])


def _set_aside(journal: Path) -> None:
    refused = journal.parent / "refused"
    refused.mkdir(exist_ok=True)
    for path in (journal.with_suffix(".state"), journal.with_suffix(".files"), journal):
        if path.exists():
            path.rename(refused / path.name)


def _say(message: str) -> None:
    sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
    sys.stderr.flush()


# The commands.


def flush(folder: Path, timeout: float) -> str:
    """Wait until all runs that have ended are in MLflow, at most `timeout` seconds; return what to tell the user.

    Tries again what was refused. With MLFLOW_TRACKING_URI set, what waits for another store is sent there.
    """
    refused = folder / "refused"
    for path in sorted(refused.glob("*"), key=lambda p: p.suffix == ".jsonl"):
        path.rename(folder / path.name)
    ended = waiting = [file for file in _journal_files(folder) if has_ended(file)]
    if waiting:
        (folder / "flush").write_text(os.environ.get("MLFLOW_TRACKING_URI", ""))
    deadline = time.monotonic() + timeout
    while waiting and time.monotonic() < deadline:
        start_mirror(folder)
        time.sleep(min(0.5, timeout))
        waiting = [file for file in waiting if file.exists()]
    lost = sum((refused / file.name).exists() for file in ended)
    sent = len(ended) - len(waiting) - lost
    message = f"tracking: {sent} runs sent now (others while they ran), {len(waiting)} waiting; {_where_to_look()}"
    if waiting:
        message += f"\n  The store does not answer ({folder}/mirror.log). The next stage tries again, or the same command."
    if lost:
        message += f"\n  {lost} runs were refused ({folder}/mirror.log says why). The same command tries again."
    return message


def _flush_in(worktree: Path, timeout: float) -> str:
    """`flush` of a flow's worktree, kept for its journals; in its folder, as they name files from there."""
    command = [sys.executable, "-m", "pipeline.tracking", "flush", "--timeout", str(timeout)]
    done = subprocess.run(command, cwd=worktree, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stdout.strip() or done.stderr.strip()


def _where_to_look() -> str:
    uri = os.environ.get("MLFLOW_TRACKING_URI", DEFAULT_URI)
    if uri.startswith("http"):
        return f"see them at {uri}"
    # The first page of MLflow 3 speaks of prompts and traces; this one lists the runs.
    return f"see them with .venv/bin/mlflow ui --backend-store-uri {uri} at http://127.0.0.1:5000/#/experiments/1/runs"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.tracking", description="Send the journals of the stages to MLflow.")
    parser.add_argument("command", choices=["flush", "follow"], help="flush: send what waits; follow: what the stages start")
    parser.add_argument("--folder", type=Path, default=JOURNALS, help="the folder of the journals")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="how long flush waits")
    args = parser.parse_args()
    if args.command == "flush":
        sys.stdout.write(flush(args.folder, args.timeout) + "\n")
        for worktree in sorted(WORKTREES.glob("*")):
            if any((worktree / JOURNALS).rglob("*.jsonl")):
                sys.stdout.write(f"{worktree}: {_flush_in(worktree, args.timeout)}\n")
    else:
        os.nice(5)
        Mirror(args.folder).follow()


if __name__ == "__main__":
    main()
