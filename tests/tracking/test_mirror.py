"""Journals and their mirror, against a real MLflow on SQLite, dead and silent servers, and crashes at every step."""

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from pipeline.harness import journal
from pipeline.harness.journal import Journal, open_journal
from pipeline.tracking import __main__, experiment
from pipeline.tracking.__main__ import flush
from pipeline.tracking.experiment import Experiment
from pipeline.tracking.mirror import STRIKES, Mirror
from tests.tracking.journals import FOLDER, execute, open_store, record, runs, send, write

# MLflow's own use of SQLAlchemy, which it will have to mend itself.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
ROOT = Path(__file__).resolve().parents[2]


def the_run(store: Experiment) -> Any:
    (run,) = runs(store)
    return run


def history(store: Experiment, run: Any, metric: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in store.client.get_metric_history(run.info.run_id, metric)]


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return value


def forked(work: Callable[[], None]) -> int:
    """Do it in a fork of this process, which has mlflow loaded; its pid.

    The fork ends at once: what other tests have left for the end of this process is not its business.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_a_process(work: Callable[[], None]) -> int:
    return exit_code(forked(work))


def test_a_stage_needs_no_mlflow() -> None:
    code = "import sys, pipeline.harness.stage; print('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


def test_the_final_value_wins_also_within_one_millisecond(store: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as stopped:
        stopped.setattr(time, "time", lambda: 1_800_000_000.0)
        execute(record("distil.ssld"), loss=0.5)
    send()
    assert the_run(store).data.metrics["loss"] == 0.5


def test_a_run_carries_all_that_the_stage_told(store: Experiment) -> None:
    r = record("distil.ssld", made_of=(record("teach.teacher"),))
    execute(r, accuracy=0.75, loss=0.5, per_class={"an ant!": 1, "bee": None, "../a//b": 2}, rule="top")
    send()
    run = the_run(store)
    assert run.info.run_name == "distil.ssld"
    assert run.info.status == "FINISHED"
    expected = {"loss.name": "js", "loss.T": "4.0", "steps": "10", "init": "null", "view": "[0.5, 1.0]", "seed": "3"}
    assert run.data.params == expected
    # The final loss wins over the curve of the same name, which ends on a higher value.
    assert run.data.metrics == {"accuracy": 0.75, "loss": 0.5, "per_class.an ant_": 1.0, "per_class_._a__b": 2.0}
    assert history(store, run, "loss") == [(1, 2.0), (2, 1.0), (2, 0.5)]
    tags = run.data.tags
    assert (tags["winnow.stage"], tags["winnow.entry"], tags["winnow.key"]) == ("distil", "ssld", r["key"])
    assert json.loads(tags["winnow.inputs"])["teach"] == {
        "path": "data/teach/teacher",
        "identity": record("teach.teacher")["key"],
    }
    assert tags["winnow.status"] == "executed"
    assert "winnow.repeat" not in tags
    assert not list(FOLDER.glob("*.*l*e*")), "the journal, its files and its state are gone once sent"


def test_small_files_are_kept_as_they_were_when_the_stage_ended(store: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SMALL_TOGETHER", 1_500_000)
    out = Path("data/compare/out")
    (out / "plots").mkdir(parents=True)
    (out / "report.html").write_text("first")
    (out / "plots" / "a.png").write_bytes(b"x" * 900_000)
    (out / "plots" / "beyond-the-limit-of-all.png").write_bytes(b"x" * 900_000)
    (out / "large.csv").write_bytes(b"x" * 1_000_001)
    (out / "model.safetensors").write_bytes(b"weights")
    kept = open_journal(record("compare"), FOLDER, gathers=True)
    kept.finish("FINISHED", {"note": "text"}, [out])
    (out / "report.html").write_text("second")
    send()
    got = Path(store.client.download_artifacts(the_run(store).info.run_id, ""))
    files = {p.relative_to(got).as_posix() for p in got.rglob("*") if p.is_file()}
    assert files == {"metrics.json", "out/report.html", "out/plots/a.png", "runs.json", "stages.html"}
    assert (got / "out/report.html").read_text() == "first"
    assert json.loads((got / "metrics.json").read_text()) == {"note": "text"}


def test_the_commit_and_whether_the_code_differs_from_it(store: Experiment) -> None:
    def git(*args: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
        return subprocess.run(["git", *identity, *args], check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    Path("params.yaml").write_text("seed: 0\n")
    git("add", "params.yaml")
    git("commit", "-m", "first")
    execute(record("draw", "clean"))
    Path("params.yaml").write_text("seed: 1\n")
    execute(record("draw", "dirty"))
    send()
    tags = [run.data.tags for run in runs(store)]
    assert [t["mlflow.source.git.dirty"] for t in tags] == ["false", "true"]
    assert {t["mlflow.source.git.commit"] for t in tags} == {git("rev-parse", "HEAD")}


def test_a_killed_stage_loses_nothing_it_told(store: Experiment) -> None:
    def stage() -> None:
        kept = open_journal(record("teach.teacher"), FOLDER)
        for step in range(50):
            kept.log(step=step, loss=1 / (step + 1))
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_process(stage) == -signal.SIGKILL
    send()
    run = the_run(store)
    assert run.info.status == "KILLED"
    assert history(store, run, "loss") == [(step, 1 / (step + 1)) for step in range(50)]
    assert not list(FOLDER.glob("*.jsonl"))


def test_a_silent_stage_is_not_taken_for_a_dead_one(store: Experiment) -> None:
    kept = open_journal(record("teach.teacher"), FOLDER)
    send()
    assert the_run(store).info.status == "RUNNING"
    kept.finish("FINISHED", {}, [])
    send()
    assert the_run(store).info.status == "FINISHED"


def test_a_failed_stage_names_its_error(store: Experiment) -> None:
    kept = open_journal(record("teach.teacher"), FOLDER)
    try:
        raise ValueError("the loss is NaN")
    except ValueError:
        kept.finish("FAILED", {}, [])
    send()
    run = the_run(store)
    assert (run.info.status, run.data.tags["winnow.error"]) == ("FAILED", "ValueError('the loss is NaN')")


def test_a_repeated_run_is_a_new_one_that_names_the_first(store: Experiment) -> None:
    execute(record("select.top"), images=9)
    execute(record("select.top"), images=9)
    execute(record("select.top", "2"), images=8)
    send()
    first, second, other = runs(store)
    assert second.data.tags["winnow.repeat"] == first.info.run_id
    assert not {"winnow.repeat"} & (first.data.tags.keys() | other.data.tags.keys())


def test_switched_off(store: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_TRACKING", "off")
    execute(record("select.top"), images=9)
    assert not Path(".scratch").exists()


def test_a_full_disk_is_told_once_and_stops_nothing(store: Experiment, capfd: pytest.CaptureFixture[str]) -> None:
    def stage() -> None:
        kept = open_journal(record("teach.teacher"), FOLDER)
        (file,) = FOLDER.glob("*.jsonl")
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        for first, lines, room in ((0, 1, 10), (2, 3, 0)):  # a line torn apart, then three lines without any room
            resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + room, most))
            for step in range(first, first + lines):
                kept.log(step=step, loss=1.0)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            kept.log(step=first + lines, loss=1.0)
        kept.finish("FINISHED", {"accuracy": 0.5}, [])

    assert in_a_process(stage) == 0
    assert capfd.readouterr().err.count("warning: the journal") == 1
    send()
    run = the_run(store)
    assert [step for step, _ in history(store, run, "loss")] == [1, 5]
    assert (run.info.status, run.data.metrics["accuracy"]) == ("FINISHED", 0.5)


def test_a_line_that_is_still_being_written_is_waited_for(store: Experiment) -> None:
    kept = open_journal(record("teach.teacher"), FOLDER)
    (file,) = FOLDER.glob("*.jsonl")
    mirror = Mirror(FOLDER)
    for part in ('{"event": "metrics", "time": 1.0, "st', 'ep": 4, "values": {"loss": 2.0}}\n'):
        with file.open("a") as f:
            f.write(part)
        mirror.poll()
    assert history(store, the_run(store), "loss") == [(4, 2.0)]
    kept.finish("FINISHED", {}, [])


def test_a_damaged_metrics_file_does_not_stop_the_comparison(store: Experiment, capfd: pytest.CaptureFixture[str]) -> None:
    teacher = record("teach.teacher")
    execute(teacher, accuracy=0.5)
    Path("data/teach/teacher.json").write_text('{"accuracy": ')
    execute(record("compare", made_of=(teacher,)), models=1)
    assert capfd.readouterr().err.count("warning: the journal") == 1
    send()
    assert {run.info.status for run in runs(store)} == {"FINISHED"}


def test_no_place_for_a_journal_stops_nothing(store: Experiment, capfd: pytest.CaptureFixture[str]) -> None:
    Path(".scratch").write_text("not a folder")
    execute(record("select.top"), images=9)
    assert capfd.readouterr().err.count("warning: the journal") == 1


class Crash(BaseException):
    """What a kill -9 is to a process, a BaseException is to a mirror in a test: nothing is tidied up."""


def crash_at(monkeypatch: pytest.MonkeyPatch, call: int, done: bool, end: type[BaseException] = Crash) -> list[str]:
    """Crash in the n-th request that changes something in MLflow: before it is done, or after."""
    calls: list[str] = []

    def guarded(name: str) -> Callable[..., Any]:
        method = getattr(MlflowClient, name)

        def wrapped(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == call and not done:
                raise end
            value = method(self, *args, **kwargs)
            if len(calls) == call:
                raise end
            return value

        return wrapped

    for name in ("create_run", "log_batch", "set_tag", "set_terminated", "log_artifacts"):
        monkeypatch.setattr(MlflowClient, name, guarded(name))
    return calls


def picture() -> Any:
    """Everything in the database, read past MLflow (a tenth of the time), without what differs from one time to the next."""
    with contextlib.closing(sqlite3.connect("mlflow.db")) as database:
        names = dict(database.execute("SELECT run_uuid, name FROM runs"))
        seen = []
        for run, name, status in database.execute("SELECT run_uuid, name, status FROM runs").fetchall():
            params = set(database.execute("SELECT key, value FROM params WHERE run_uuid = ?", [run]))
            metrics = sorted(database.execute("SELECT key, step, timestamp, value FROM metrics WHERE run_uuid = ?", [run]))
            tags = database.execute("SELECT key, value FROM tags WHERE run_uuid = ?", [run])
            told = {key: re.sub("[0-9a-f]{32}", lambda id_: names.get(id_[0], id_[0]), value) for key, value in tags}
            files = sorted(file.name for file in Path("mlartifacts", run).rglob("*"))
            seen.append((name, told["winnow.status"], status, params, metrics, told, files))
    return sorted(seen, key=lambda run: run[:2])


@pytest.mark.whole
def test_a_mirror_killed_at_any_step_repeats_nothing(store: Experiment, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, lost = record("teach.old"), record("teach.new"), record("teach.lost")
    execute(old, accuracy=0.1)
    execute(record("compare", made_of=(old,)))
    execute(new, accuracy=0.2)
    send()
    write(lost, {"accuracy": 0.3})
    execute(record("compare", "2", made_of=(old, new, lost)), models=3)
    shutil.copytree(FOLDER, "journals")
    shutil.copyfile("mlflow.db", "database")

    def scene(call: int, done: bool) -> tuple[Any, list[str]]:
        """A comparison of an executed, an unchanged and a restored stage, mirrored with one crash."""
        shutil.rmtree(FOLDER)
        shutil.copytree("journals", FOLDER)
        shutil.copyfile("database", "mlflow.db")
        with monkeypatch.context() as patch:
            calls = crash_at(patch, call, done)
            with contextlib.suppress(Crash):
                send()
        send()
        assert not list(FOLDER.glob("*.jsonl"))
        return picture(), calls

    undisturbed, calls = scene(0, done=False)
    assert [run[1] for run in undisturbed] == [
        "executed",
        "executed",
        "restored",
        "executed",
        "executed",
        "unchanged",
    ]
    assert len(calls) == 14
    for call, name in enumerate(calls, start=1):
        assert scene(call, done=True)[0] == undisturbed, call
        if name == "create_run":
            assert scene(call, done=False)[0] == undisturbed, call


@pytest.mark.parametrize("end", [Crash, TimeoutError])
def test_a_run_is_not_created_twice(end: type[BaseException], store: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Created, but the answer never came: the mirror was killed, or the server was too slow and the same mirror tries again."""
    execute(record("teach.teacher"), accuracy=0.5)
    mirror = Mirror(FOLDER)
    with monkeypatch.context() as patch, contextlib.suppress(Crash):
        crash_at(patch, 1, done=True, end=end)
        mirror.poll()
    if end is Crash:
        mirror = Mirror(FOLDER)
    mirror.poll()
    assert the_run(store).data.metrics == {"accuracy": 0.5, "loss": 1.0}


def test_a_comparison_is_whole_whatever_dvc_skipped_or_restored(store: Experiment) -> None:
    teacher, student = record("teach.teacher"), record("distil.ssld")
    execute(teacher, accuracy=0.9)
    execute(student, accuracy=0.7)
    execute(record("compare", made_of=(teacher, student)), models=2)
    send()
    *_, first = runs(store)
    again, lost = record("distil.ssld", "2"), record("distil.lost")
    execute(again, accuracy=0.8)
    write(lost, {"accuracy": 0.6, "of": {"ant": 1}})
    execute(record("compare", "2", made_of=(teacher, again, lost)), models=3)
    send()
    parent = next(run for run in runs(store) if run.data.tags["winnow.key"] == record("compare", "2")["key"])

    def children(of: Any) -> dict[str, Any]:
        return {run.info.run_name: run for run in store.search("mlflow.parentRunId", of.info.run_id)}

    assert {name: run.data.tags["winnow.status"] for name, run in children(first).items()} == {
        "teach.teacher": "executed",
        "distil.ssld": "executed",
    }
    found = children(parent)
    assert {name: run.data.tags["winnow.status"] for name, run in found.items()} == {
        "teach.teacher": "unchanged",
        "distil.ssld": "executed",
        "distil.lost": "restored",
    }
    original = children(first)["teach.teacher"].info.run_id
    assert found["teach.teacher"].data.tags["winnow.source"] == original
    assert found["teach.teacher"].data.metrics["accuracy"] == 0.9
    assert found["distil.lost"].data.metrics == {"accuracy": 0.6, "of.ant": 1.0}
    assert found["distil.lost"].data.params["loss.name"] == "js"
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert parent.data.metrics == {
        "loss": 1.0,
        "models": 3.0,
        "teach.teacher.accuracy": 0.9,
        "distil.ssld.accuracy": 0.8,
        "distil.lost.accuracy": 0.6,
        "distil.lost.of.ant": 1.0,
    }
    assert parent.data.params["distil.lost.loss.T"] == "4.0"
    assert parent.data.params["teach.teacher.seed"] == "3"
    assert "3 stages: 1 executed, 1 unchanged, 1 restored" in parent.data.tags["mlflow.note.content"]
    table = json.loads(Path(store.client.download_artifacts(parent.info.run_id, "runs.json")).read_text())
    assert {row["stage"]: row["run_id"] for row in table} == {name: run.info.run_id for name, run in found.items()}

    execute(record("compare", "3", made_of=(teacher,)))
    send()
    third = next(run for run in runs(store) if run.data.tags["winnow.key"] == record("compare", "3")["key"])
    assert children(third)["teach.teacher"].data.tags["winnow.source"] == original, "not a copy of a copy"


def test_a_stage_repeated_alone_does_not_lend_its_metrics_to_the_older_run(store: Experiment) -> None:
    old, new = record("teach.teacher"), record("teach.teacher", "2")
    execute(old, accuracy=0.4)
    execute(new, accuracy=0.5)
    execute(record("compare", made_of=(old, new)))
    send()
    parent = store.search("winnow.stage", "compare")[0]
    accuracies = {name: value for name, value in parent.data.metrics.items() if name.endswith("accuracy")}
    assert accuracies == {f"teach.teacher:{new['key'][:8]}.accuracy": 0.5}
    assert {run.data.metrics["accuracy"] for run in store.search("mlflow.parentRunId", parent.info.run_id)} == {0.4, 0.5}


def test_the_hash_of_dvc_lock_is_that_of_the_file_dvc_writes_afterwards(
    store: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = Path("dvc.lock")
    lock.write_text("without compare")
    monkeypatch.setenv("DVC_ROOT", str(Path.cwd()))
    execute(record("compare"))
    mirror = Mirror(FOLDER)
    for text, age in (("without compare", 100), ("", -100)):  # DVC empties the file before it fills it
        lock.write_text(text)
        os.utime(lock, (0, time.time() - age))
        mirror.poll()
        assert list(FOLDER.glob("*.jsonl")), "the comparison waits for DVC"
    lock.write_text("with compare")
    time.sleep(1.1)
    mirror.poll()
    assert the_run(store).data.tags["winnow.dvc_lock"] == hashlib.sha256(b"with compare").hexdigest()


def test_what_a_healthy_server_refuses_holds_nothing_up_and_is_not_lost(store: Experiment) -> None:
    kept = open_journal(record("teach.refused"), FOLDER)
    send()
    store.client.delete_run(the_run(store).info.run_id)
    kept.log(step=1, loss=2.0)
    kept.finish("FINISHED", {"accuracy": 0.5}, [])
    execute(record("teach.fine"), accuracy=0.6)
    mirror = Mirror(FOLDER)
    for _ in range(STRIKES):
        mirror.poll()
    assert the_run(store).info.run_name == "teach.fine"
    (refused,) = (FOLDER / "refused").glob("*.jsonl")
    store.client.restore_run(json.loads(refused.with_suffix(".state").read_text())["run_id"])
    assert "1 waiting" in flush(FOLDER, timeout=0.1)
    send()
    again = next(run for run in runs(store) if run.info.run_name == "teach.refused")
    assert (again.info.status, again.data.metrics) == ("FINISHED", {"loss": 2.0, "accuracy": 0.5})


def test_a_damaged_journal_holds_nothing_up(store: Experiment) -> None:
    execute(record("teach.fine"), accuracy=0.6)
    (FOLDER / f"teach.damaged-{'0' * 16}-1.jsonl").write_bytes(b"\0\0\0\n")
    send()
    assert the_run(store).info.status == "FINISHED"
    assert [file.name[:13] for file in (FOLDER / "refused").iterdir()] == ["teach.damaged"]


@pytest.mark.whole
def test_six_mirrors_share_a_new_database(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/shared.db")
    monkeypatch.setattr(journal, "start_mirror", lambda folder: None)

    def clone(name: str) -> None:
        home = project / name
        home.mkdir()
        os.chdir(home)
        execute(record(f"teach.{name}"), accuracy=0.5)
        send()
        assert not list(FOLDER.glob("*.jsonl"))

    pids = [forked(partial(clone, str(n))) for n in range(6)]
    assert [exit_code(pid) for pid in pids] == [0] * 6
    shared = Experiment(f"sqlite:///{project}/shared.db", "winnow")
    assert {
        run.info.run_name for run in shared.client.search_runs([shared.client.get_experiment_by_name("winnow").experiment_id])
    } == {f"teach.{n}" for n in range(6)}


STAGE = """
import sys
from pathlib import Path
from pipeline.harness.journal import open_journal
kept = open_journal({**__import__("json").loads(sys.argv[1])}, Path(".scratch", "journal"))
kept.log(step=7, loss=0.25)
print("told", flush=True)
sys.stdin.readline()
kept.finish("FINISHED", {"accuracy": 0.5}, [])
"""


def start_stage(name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STAGE, json.dumps(record(name))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "told\n"
    return process


def end_stage(process: subprocess.Popen[str]) -> None:
    # The mirror it started lives on; if it held the pipe, this would wait for it.
    assert process.communicate("\n", timeout=5)[0] == ""
    assert process.returncode == 0


def mirrors(project: Path) -> list[int]:
    """The processes that mirror this project's journals."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"follow\0--folder\0{project / FOLDER}\0".encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


@pytest.mark.whole
def test_the_numbers_of_six_stages_are_seen_while_they_work(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS")  # as in a real mirror, which keeps its connection
    stages = [start_stage(f"teach.{n}") for n in range(6)]
    store = open_store(project)
    until(lambda: len(runs(store)) == 6)
    until(lambda: [run.data.metrics for run in runs(store)] == [{"loss": 0.25}] * 6)
    assert {run.info.status for run in runs(store)} == {"RUNNING"}
    assert len(mirrors(project)) == 1
    for stage in stages:
        end_stage(stage)
    assert "0 waiting; see them with .venv/bin/mlflow ui" in flush(FOLDER, timeout=60)
    assert {run.info.status for run in runs(store)} == {"FINISHED"}
    assert len(runs(store)) == 6

    # The mirror is still there, with the database open, when someone starts afresh.
    assert len(mirrors(project)) == 1
    for file in project.glob("mlflow.db*"):
        file.unlink()
    end_stage(start_stage("teach.afresh"))
    assert "0 waiting" in flush(FOLDER, timeout=60)
    (project / "mlflow.db").rename(project / "looked-at.db")
    assert the_run(Experiment(f"sqlite:///{project}/looked-at.db", "winnow")).info.run_name == "teach.afresh"

    shutil.rmtree(FOLDER)
    until(lambda: not mirrors(project))


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["dead", "silent"])
def test_a_server_that_does_not_answer_costs_a_stage_nothing(
    kind: str, project: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(empty_database, project / "mlflow.db")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if kind == "dead":
            server.close()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        start = time.monotonic()
        kept = open_journal(record("teach.teacher"), FOLDER)
        for step in range(1000):
            kept.log(step=step, loss=1.0)
        kept.finish("FINISHED", {"accuracy": 0.5}, [])
        assert time.monotonic() - start < 1.0
        until(lambda: "does not answer" in (FOLDER / "mirror.log").read_text())
        start = time.monotonic()
        assert "0 runs sent now (others while they ran), 1 waiting" in flush(FOLDER, timeout=0.5)
        assert time.monotonic() - start < 1.0
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
        assert "1 runs sent now (others while they ran), 0 waiting" in flush(FOLDER, timeout=60)
    store = open_store(project)
    run = the_run(store)
    assert (run.info.status, run.data.metrics["accuracy"]) == ("FINISHED", 0.5)
    assert len(history(store, run, "loss")) == 1000


def test_a_journal_of_nothing() -> None:
    kept = Journal()
    kept.log(step=1, loss=1.0)
    kept.finish("FINISHED", {}, [])


def test_files_lie_beside_the_database_wherever_a_run_works(
    store: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worktree").mkdir()
    monkeypatch.chdir(tmp_path / "worktree")
    made = experiment._experiment_id(store.client, "another", tmp_path / "mlflow.db")
    assert store.client.get_experiment(made).artifact_location == (tmp_path / "mlartifacts").as_uri()


def test_flush_counts_the_runs_of_worktrees_that_were_kept_for_their_journals(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, kept in (("a", "journal/x.jsonl"), ("b", "journal/refused/x.jsonl"), ("c", "journal/mirror.log")):
        file = project / ".scratch/worktrees" / name / ".scratch" / kept
        file.parent.mkdir(parents=True)
        file.touch()
    counts = {"a": __main__.Sent(2, 1, 0), "b": __main__.Sent(1, 0, 3)}
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", ["tracking", "flush"])
        patched.setattr(__main__, "send", lambda *_: __main__.Sent(4, 0, 0))
        patched.setattr(__main__, "_send_in", lambda folder, _: counts[folder.name])
        __main__.main()
    told, *more = [line for line in capsys.readouterr().out.splitlines() if "http" not in line]
    assert told.startswith("tracking: 7 runs sent now (others while they ran), of 2 other folders, too, 1 waiting; ")
    assert more == [
        "  The store does not answer (.scratch/worktrees/a/.scratch/journal/mirror.log). The next stage tries again, or the same "
        "command.",
        "  3 runs were refused (.scratch/worktrees/b/.scratch/journal/mirror.log says why). The same command tries again.",
    ]
    monkeypatch.setenv("PYTHONPATH", str(Path(__main__.__file__).parents[2]))
    assert __main__._send_in(project / ".scratch/worktrees/a", 0.0) == __main__.Sent(0, 1, 0)


def test_a_password_in_the_address_of_the_store_is_in_no_file_and_no_log(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(journal, "start_mirror", lambda folder: None)
    monkeypatch.setattr(__main__, "start_mirror", lambda folder: None)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    address = "http://me:s3cret-w0rd@127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    execute(record("teach.teacher"), accuracy=0.5)
    mirror = Mirror(FOLDER)
    mirror.poll()
    (waiting,) = mirror._journals.values()
    assert mirror._experiment(waiting).uri == address
    waiting.save()
    said = flush(FOLDER, timeout=0.0)
    assert "see them at http://127.0.0.1:9" in said
    assert (FOLDER / "flush").read_text() == "http://***@127.0.0.1:9"
    written = [said, *capfd.readouterr(), *(file.read_text() for file in project.rglob("*") if file.is_file())]
    assert any("does not answer" in text for text in written)
    assert [text for text in written if "s3cret" in text] == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    with (FOLDER / "mirror.lock").open("ab") as lock:
        assert Mirror(FOLDER)._follow(lock), "one without the password leaves the store to one that has it"
    assert "lacks the credentials" in capfd.readouterr().err
    assert list(FOLDER.glob("*.jsonl")) != []
