"""What a stage tells about itself: JSON lines on the local disk, which a process of its own mirrors to MLflow.

    .scratch/journal/<stage>.<entry>-<key>-<time>.jsonl     begin, metrics ..., end
    .scratch/journal/<the same>.files/                      the small files of the artifacts, as they were when the stage ended
    data/live/                                              its curves, for DVC and editors (`pipeline.harness.live`)

A line costs microseconds and needs no server. The first journal starts the mirror (`pipeline.tracking`): importing mlflow would
cost every stage seconds, and a call to a dead server can block for minutes. WINNOW_TRACKING=off switches all of this off.
"""

import contextlib
import errno
import fcntl
import getpass
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.harness import credentials, dvc, live

DEFAULT_URI = "sqlite:///mlflow.db"

SMALL_FILES = {".json", ".html", ".csv", ".md", ".txt", ".png", ".jpg", ".svg"}
SMALL = 1_000_000
SMALL_TOGETHER = 20_000_000


class Journal:
    """What one run of a stage tells about itself, one JSON line at a time, each handed to the system at once.

    The file is locked as long as the stage lives: that is how the mirror tells a dead writer from a silent one. An error of the
    disk, or a damaged file of another stage, is said once on stderr and never stops this one.
    """

    def __init__(self, path: Path | None = None, begin: Mapping[str, Any] | None = None) -> None:
        self._path, self._begin = path, begin or {}
        self._file: IO[bytes] | None = None
        self._complained = False
        if path is not None:
            with self._never_fatal():
                self._file = _begin_file(path, self._begin)
        record = self._begin.get("record")
        self._curves = live.Curves(run_name(record), record["key"]) if record else None

    def log(self, step: int | None = None, **values: float) -> None:
        """Note values of now: a loss, a learning rate, a duration; `step` puts them on a curve, which DVC plots at once."""
        self._write("metrics", step=step, values={name: float(value) for name, value in values.items()})
        if self._curves is not None and step is not None:
            self._curves.add(step, values)

    def finish(self, status: str, metrics: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        """End the run as FINISHED, FAILED or KILLED, with its final metrics and the artifacts it wrote."""
        if self._curves is not None:
            self._curves.write()
        if self._file is None or self._path is None:
            return
        extra: dict[str, Any] = {"error": credentials.masked(repr(sys.exception()))} if status == "FAILED" else {}
        if status == "FINISHED":
            with self._never_fatal():
                _keep_small_files(artifacts, metrics, self._path.with_suffix(".files"))
                if self._begin["gathers"]:
                    extra["compared"] = metrics_on_disk(self._begin["record"]["lineage"])
        self._write("end", status=status, metrics=dict(metrics), **extra)
        self._file.close()
        self._file = None

    def _write(self, event: str, **content: Any) -> None:
        if self._file is None:
            return
        with self._never_fatal():
            # A line torn by a full disk must not swallow the next one.
            _put(self._file, (b"\n" if self._complained else b"") + _line(event, content))

    @contextlib.contextmanager
    def _never_fatal(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError) as error:
            if not self._complained:
                sys.stderr.write(
                    f"warning: the journal {self._path} is incomplete, and so will be its run in MLflow: {error!r}\n"
                )
            self._complained = True


def _begin_file(path: Path, begin: Mapping[str, Any]) -> IO[bytes]:
    """A journal, begun and locked. Until then it has another name, or the mirror would take it for that of a dead stage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_suffix(".new")
    file = hidden.open("ab", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        _put(file, _line("begin", begin))
        hidden.rename(path)
    except OSError:
        file.close()
        hidden.unlink()
        raise
    return file


def _put(file: IO[bytes], data: bytes) -> None:
    if file.write(data) != len(data):  # a disk that is almost full takes a part, without an error
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _line(event: str, content: Mapping[str, Any]) -> bytes:
    return json.dumps({"event": event, "time": time.time(), **content}).encode() + b"\n"


def experiment_name() -> str:
    """The experiment of MLflow in which the runs of the stages are."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME", "winnow")


def open_journal(record: Mapping[str, Any], folder: Path, gathers: bool = False) -> Journal:
    """Begin the journal of the run that `record` (stage, entry, params, inputs, seed, key, lineage) describes.

    `gathers`: the run stands for all that it was made from, and carries the metrics of each. Starts the mirror if none runs.
    Never raises an OSError, never waits for a server.
    """
    if os.environ.get("WINNOW_TRACKING") == "off":
        return Journal()
    path = dvc.project_folder() / folder / f"{run_name(record)}-{record['key'][:16]}-{time.time_ns()}.jsonl"
    begin = {
        "record": record,
        "gathers": gathers,
        "uri": credentials.masked(os.environ.get("MLFLOW_TRACKING_URI", DEFAULT_URI)),
        "experiment": experiment_name(),
        "workspace": str(Path.cwd()),
        "dvc": dvc.runs_this(),
        "tags": {**tags_of_now(), **given_tags()},
    }
    journal = Journal(path, begin)
    if path.exists():
        start_mirror(path.parent)
    return journal


def run_name(record: Mapping[str, Any]) -> str:
    """`teach.baseline`: the word that is also the section of params.yaml, the folder below data/ and the name in dvc.yaml."""
    return ".".join(filter(None, (record["stage"], record["entry"])))


def tags_of_now() -> dict[str, str]:
    """Who runs which commit, for which DVC experiment; as MLflow names these tags."""
    return {**_user(), **_git(), **_dvc_experiment()}


def given_tags() -> dict[str, str]:
    """What the starter of a run wants its MLflow run to say (WINNOW_TAGS, a JSON object): the id of a Prefect flow run."""
    try:
        tags = json.loads(os.environ.get("WINNOW_TAGS", "{}"))
    except ValueError:
        return {}
    return {str(name): str(value) for name, value in tags.items()} if isinstance(tags, dict) else {}


def _user() -> dict[str, str]:
    try:
        return {"mlflow.user": getpass.getuser()}
    except (KeyError, OSError):  # a container whose user has no name
        return {}


def _git() -> dict[str, str]:
    """The commit, and whether code or params differ from it; empty outside of a git repository."""
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--", "pipeline", "params.yaml", "dvc.yaml"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    commit = next((line.split()[2] for line in lines if line.startswith("# branch.oid ")), "(initial)")
    dirty = any(not line.startswith("#") for line in lines)
    return {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": str(dirty).lower()}


def _dvc_experiment() -> dict[str, str]:
    name = dvc.experiment()
    return {"dvc.exp_name": name} if name else {}


def _keep_small_files(artifacts: Sequence[Path], metrics: Mapping[str, Any], folder: Path) -> None:
    """Copy what MLflow shall show: by the time a dead server is back, the next run may have replaced the artifacts.

    A file that is too large, or beyond the limit of all together, is named with size and hash in its artifact's checksums.json.
    """
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    room = SMALL_TOGETHER
    for artifact in artifacts:
        for file in sorted(p for p in artifact.rglob("*") if p.suffix.lower() in SMALL_FILES):
            size = file.stat().st_size
            if size <= min(SMALL, room):
                room -= size
                copy = folder / artifact.name / file.relative_to(artifact)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


def metrics_on_disk(lineage: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of every stage in the lineage, by key; none for one that was repeated since, whose file is another run's."""
    metrics = {}
    for key, record in lineage.items():
        folder, file = Path("data", record["stage"]), f"{record['entry'] or 'metrics'}.json"
        artifacts = folder.glob(f"{record['entry'] or '*'}/record.json")
        if (folder / file).is_file() and any(json.loads(a.read_text())["key"] == key for a in artifacts):
            metrics[key] = json.loads((folder / file).read_text())
    return metrics


def start_mirror(folder: Path) -> None:
    """Start the process that mirrors `folder`, if there is none; it shares no pipe, lock or terminal with this one."""
    with contextlib.suppress(OSError):
        lock = try_lock(folder / "mirror.lock")
        if lock is None:
            return
        lock.close()
        with (folder / "mirror.log").open("ab") as log:
            package_root = str(Path(__file__).resolve().parents[2])
            mirror = subprocess.Popen(
                mirror_command(folder),
                cwd=dvc.project_folder(),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        # It outlives this process on purpose; without this line Python would warn that nobody waited for it.
        mirror.returncode = 0


def mirror_command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "pipeline.tracking", "follow", "--folder", str(folder.absolute())]


def try_lock(file: Path, kind: int = fcntl.LOCK_EX) -> IO[bytes] | None:
    """The file, open and locked, or None where another process has the lock."""
    handle = file.open("ab" if kind == fcntl.LOCK_EX else "rb")
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return handle


def has_ended(journal: Path) -> bool:
    """Whether its stage has finished or died: nothing holds its lock any more."""
    lock = try_lock(journal, fcntl.LOCK_SH)
    if lock is None:
        return False
    lock.close()
    return True
