"""An experiment of an MLflow store: its runs, searched and written in few requests."""

import contextlib
import fcntl
import itertools
import json
import os
import posixpath
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.harness import credentials

LONGEST_WAIT_SECONDS = 60.0

MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "DO_NOT_TRACK": "true",
}


class Experiment:
    """An experiment of an MLflow store. Opened when first used; after a failure it rests for a growing time.

    `uri`: as in MLFLOW_TRACKING_URI, or as `credentials.masked` leaves it, where that variable has the whole.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri, self._experiment = credentials.whole(uri), experiment
        self._client: Any = None
        self._database = database_of(self.uri)
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
            say(f"{self.uri} does not answer, next try in {self._rest:.0f} s: {error!r}")
            return False
        self._rest = 0.0
        return True

    def create(self, name: str, start: float, tags: Mapping[str, str]) -> str:
        run = self.client.create_run(self.experiment_id, start_time=milliseconds(start), run_name=name, tags=dict(tags))
        return str(run.info.run_id)

    def log(
        self,
        run_id: str,
        params: Mapping[str, Any],
        metrics: Sequence[tuple[str, float, float, int]],
        model_id: str | None = None,
    ) -> None:
        """Params by name, and metrics as (name, value, time, step), in as few requests as MLflow's limits allow.

        `model_id`: of the logged model whose metrics they are, too.
        """
        from mlflow.entities import Metric, Param

        client = self.client
        all_params = [Param(_legal(name), shortened(value, 6000)) for name, value in params.items()]
        all_metrics = [
            Metric(_legal(name), value, milliseconds(at), step, model_id=model_id) for name, value, at, step in metrics
        ]
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


def database_of(uri: str) -> Path | None:
    """The file of an SQLite store; None for another kind of store."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


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


def _legal(name: str) -> str:
    """A name that MLflow accepts: letters, digits and `_-. /:`, at most 250, and nothing like `a//b` or `../a`."""
    name = "".join(c if c.isalnum() or c in "_-. /:" else "_" for c in name)[:250]
    is_a_plain_path = posixpath.normpath(name) == name and not name.startswith(("/", "..")) and name != "."
    return name if is_a_plain_path else re.sub(r"/|\.\.|^\.?$", "_", name)


def shortened(value: Any, limit: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def say(message: str) -> None:
    sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {credentials.masked(message)}\n")
    sys.stderr.flush()
