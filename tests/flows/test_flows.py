"""The flow on small DVC projects of shell commands: what runs, what is cached, what is tried again, and what is left behind."""

import asyncio
import gc
import http.server
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import TaskRun
from prefect.testing.utilities import prefect_test_harness

from flows import attempt, child, dag, plan, sweep, tasks, tracking, variant, worktree
from flows.adapter import dvc, prefect
from flows.winnow import winnow
from tests.tiny import leaned_on

pytestmark = [pytest.mark.flows, pytest.mark.filterwarnings("ignore")]  # Prefect's own warnings

DVC_YAML = """
stages:
  make:
    cmd: sh make.sh && printf '%s' ${make.text} > data/made
    params:
      - make
    deps:
      - make.sh
    outs:
      - data/made
  use:
    foreach: ${use}
    do:
      cmd: mkdir -p data/use/${key} && cat data/made > data/use/${key}/it && echo '{"n":1}' > data/use/${key}.json
      params:
        - use.${key}
      deps:
        - data/made
      outs:
        - data/use/${key}
      metrics:
        - data/use/${key}.json:
            cache: false
  last:
    cmd: cat data/use/a/it data/use/b/it > data/last
    deps:
      - data/use/a
      - data/use/b
    outs:
      - data/last
"""
PARAMS = "make: {text: hello, n: 1}  # a comment\nuse: {a: {by: 1}, b: {by: 2}}\n"

CACHED = {"make": "Cached", "use@a": "Cached", "use@b": "Cached", "last": "Cached"}
ESTIMATE = {
    "cores": 2,
    "cpu": "a processor",
    "stages": {name: {"seconds": 60.0, "cpu": 30.0, "by": "probe"} for name in ("make", "use@a", "use@b", "last")},
}


def sh(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, env=dag.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "params.yaml").write_text(PARAMS)
    (folder / "make.sh").write_text("mkdir -p data\n")
    (folder / ".gitignore").write_text("/data/\n/.scratch/\n")
    sh(folder, "git", "init", "-q", ".")
    sh(folder, "git", "config", "user.name", "n")
    sh(folder, "git", "config", "user.email", "n@example.org")
    sh(folder, "dvc", "init", "-q")
    sh(folder, "git", "add", "-A")
    sh(folder, "git", "commit", "-qm", "all")
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    sh(tmp_path, "git", "clone", "-q", str(template), str(folder))
    sh(folder, "git", "config", "user.name", "n")
    sh(folder, "git", "config", "user.email", "n@example.org")
    monkeypatch.chdir(folder)
    for asks_of_winnow in ("check", "scan"):  # these projects have none of its params,
        monkeypatch.setattr(f"flows.variant.{asks_of_winnow}", nothing)
    monkeypatch.setattr(plan, "estimating", lambda *_: ["echo", json.dumps(ESTIMATE)])  # nor has it heard of their stages,
    for sends_to_mlflow in ("flush", "compared", "linked"):  # and nothing to tell it
        monkeypatch.setattr(tracking, sends_to_mlflow, nothing)
    return folder


async def nothing(*_: Any) -> None: ...


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield
    with warnings.catch_warnings():  # Prefect leaves connections to the server open, and says so when they are collected
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def play(**parameters: Any) -> dict[str, str]:
    """Run the flow to its end; the final state of each stage, by name."""
    return asyncio.run(_play(parameters))


async def _play(parameters: dict[str, Any]) -> dict[str, str]:
    await winnow(return_state=True, **{"elsewhere": False, **parameters})
    return {r.name: r.state_name or "" for r in await task_runs()}


async def task_runs() -> list[TaskRun]:
    """Those of the latest flow run."""
    async with get_client() as client:
        runs = await client.read_flow_runs(limit=200)
        latest = max(runs, key=lambda r: r.created or 0)
        await asyncio.sleep(1.0)  # task runs arrive as events
        return [r for r in await client.read_task_runs(limit=200) if r.flow_run_id == latest.id]


async def plan_and_log() -> tuple[str, str]:
    """The artifact with the plan of the latest flow run, and its log."""
    async with get_client() as client:
        run = max(await client.read_flow_runs(limit=200), key=lambda r: r.created or 0)
        (artifact,) = [a for a in await client.read_artifacts() if a.key == "winnow-plan" and a.flow_run_id == run.id]
        of_run = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
        for _ in range(100):  # logs arrive in batches
            said = "\n".join(log.message for log in await client.read_logs(of_run))
            if "stages in" in said:
                break
            await asyncio.sleep(0.1)
        return str(artifact.data), said


async def artifacts(key: str) -> list[str]:
    """What the latest flow run shows under a key."""
    async with get_client() as client:
        run = max(await client.read_flow_runs(limit=200), key=lambda r: r.created or 0)
        return [str(a.data) for a in await client.read_artifacts() if a.key == key and a.flow_run_id == run.id]


def processes_with(word: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# DVC


def test_the_graph_is_that_of_dvc_yaml(project: Path) -> None:
    graph = dag.read(project)
    assert list(graph.needs) == ["make", "use@a", "use@b", "last"]
    assert graph.needs["last"] == {"use@a", "use@b"}
    assert graph.upstream(["use@b"]) == ["make", "use@b"]
    assert graph.upstream(["use"]) == ["make", "use@a", "use@b"]
    assert graph.affected({"use@a": []}) == ["use@a", "last"]
    with pytest.raises(dag.DVCError, match="there is no stage 'us'"):
        graph.upstream(["us"])


def test_a_change_reaches_only_its_own_key(project: Path) -> None:
    dag.override(project, ["make.text=bye", "use.a.by=7"])
    tree = yaml.safe_load((project / "params.yaml").read_text())
    assert tree == {"make": {"text": "bye", "n": 1}, "use": {"a": {"by": 7}, "b": {"by": 2}}}
    with pytest.raises(dag.DVCError, match="nothing"):
        dag.override(project, ["make.nothing=1"])


@pytest.mark.parametrize(
    ("code", "lines", "again"),
    [
        (255, ["error: there is no `k`", "ERROR: failed to reproduce 'x': failed to run: python -m x, exited with 2"], False),
        (255, ["KeyError: 1", "ERROR: failed to reproduce 'x': failed to run: python -m x, exited with 1"], False),
        (255, ["error: the disk is full", "ERROR: failed to reproduce 'x': failed to run: python -m x, exited with 75"], True),
        (255, ["ERROR: failed to reproduce 'x': failed to run: python -m x, exited with -9"], True),
        (255, ["ERROR: failed to reproduce 'x': failed to run: python -m x, exited with 137"], True),
        (255, ["ERROR: 'data/x' is busy, it is being blocked by:"], True),
        (137, [], True),
        (
            255,
            ["Root Cause (first observed failure):", "  exitcode  : -9 (pid: 7)", "ERROR: failed to run: python, exited with 1"],
            True,
        ),
    ],
)
def test_what_may_be_tried_again(code: int, lines: list[str], again: bool) -> None:
    assert attempt.verdict(child.Ended(code, lines)).again is again


def test_the_plan_says_what_would_run_and_what_dvc_has(project: Path) -> None:
    sh(project, "dvc", "repro", "-q")
    (project / "params.yaml").write_text(PARAMS.replace("by: 2", "by: 5"))
    shutil.rmtree(project / "data/use/a")
    (project / "data/made").unlink()
    made = plan.of_folder(project, [], False, [])
    assert [(row.stage, row.why, row.seconds, row.by) for row in made.rows] == [
        ("make", "its output is not there; DVC has its result", 1.0, "cache"),
        ("use@a", "its output is not there; DVC has its result", 1.0, "cache"),
        ("use@b", "use.b.by: 2 -> 5", 60.0, "probe"),
        ("last", "needs use@b, made anew", 60.0, "probe"),
    ]


# Processes


def test_lines_arrive_while_the_command_runs(tmp_path: Path) -> None:
    heard = []

    async def line(text: str) -> None:
        heard.append((text, (tmp_path / "done").exists()))

    ended = asyncio.run(
        child.run(["sh", "-c", "echo one; sleep 0.5; printf 'a\\rb\\n' >&2; touch done; exit 3"], cwd=tmp_path, line=line)
    )
    assert heard[0] == ("one", False)
    assert [text for text, _ in heard] == ["one", "a", "b"]
    assert (ended.code, ended.lines) == (3, ["one", "a", "b"])


def test_a_cancelled_command_ends_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "GRACE_SECONDS", 0.5)  # for what does not listen
    script = "trap '' TERM; sleep 4321.5 & sh -c 'sleep 4321.5; true' & wait; sleep 4321.5"

    async def cancel() -> None:
        started = asyncio.create_task(child.run(["sh", "-c", script], cwd=tmp_path))
        await asyncio.to_thread(until, lambda: len(processes_with("sleep\x004321.5")) == 2)
        started.cancel()
        with pytest.raises(asyncio.CancelledError):
            await started

    asyncio.run(cancel())
    assert processes_with("sleep\x004321.5") == []
    assert processes_with("sleep 4321.5; true") == []


def test_a_command_ends_when_the_flow_is_killed(tmp_path: Path) -> None:
    code = (
        "import asyncio; from pathlib import Path; from flows import child;"
        "asyncio.run(child.run(['sh', '-c', 'sleep 4322.5; true'], cwd=Path('.')))"
    )
    flow = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    until(lambda: processes_with("sleep\x004322.5"))
    flow.send_signal(signal.SIGKILL)
    flow.wait()
    until(lambda: not processes_with("4322.5"))


# The flow


def test_only_what_is_stale_runs(project: Path, server: None) -> None:
    assert play() == {"make": "Completed", "use@a": "Completed", "use@b": "Completed", "last": "Completed"}
    assert (project / "data/last").read_text() == "hellohello"
    lock = (project / "dvc.lock").read_text()
    shown, said = asyncio.run(plan_and_log())
    assert "| use@a | 1:00 | probe | has not run here yet |" in shown
    told = " ".join(said.split())
    assert "use@a 1:00 probe has not run here yet" in told
    assert "4 to run, 0 from DVC's cache, 0 stages are up to date. About 4:00 on 2 cores of a processor" in told
    assert re.search(r"last: 4 of 4 stages have run, none is left", said)
    assert set(play().values()) == {"Cached"}
    (project / "params.yaml").write_text(PARAMS.replace("by: 1", "by: 3"))
    assert play() == {"make": "Cached", "use@a": "Completed", "use@b": "Cached", "last": "Cached"}
    (project / "params.yaml").write_text(PARAMS)
    (project / "data/last").unlink()
    assert play(targets=["last"]) == {**CACHED, "restore": "Completed", "use@a": "Restored", "last": "Restored"}
    assert (project / "dvc.lock").read_text() == lock
    assert play(targets=["use@b"], force=True) == {"make": "Completed", "use@b": "Completed"}


def test_a_stage_that_looks_each_time_decides_what_is_stale(project: Path, server: None) -> None:
    tree = yaml.safe_load(DVC_YAML)
    tree["stages"]["look"] = {
        "cmd": "mkdir -p data && cat world > data/look && echo 1 > data/look.json",
        "always_changed": True,
        "outs": ["data/look"],
        "metrics": [{"data/look.json": {"cache": False}}],
    }
    tree["stages"]["make"]["deps"].append("data/look")
    (project / "dvc.yaml").write_text(yaml.safe_dump(tree))
    (project / "world").write_text("old")
    sh(project, "dvc", "repro", "-q")
    made = plan.of_folder(project, [], False, [])
    assert [(row.stage, row.by) for row in made.rows] == [("look", "not known")]
    assert made.current == 4
    rest = dict.fromkeys(("use@a", "use@b", "last"), "Cached")
    assert play() == {"look": "Completed", "make": "Cached", **rest}
    (project / "world").write_text("new")
    assert play()["make"] == "Completed"


def test_a_failure_holds_up_what_needs_it_and_nothing_else(project: Path, server: None) -> None:
    text = DVC_YAML.replace("cat data/made > data/use/${key}/it", "test ${key} != a && cat data/made > data/use/${key}/it")
    (project / "dvc.yaml").write_text(text)
    assert play() == {"make": "Completed", "use@a": "Failed", "use@b": "Completed", "last": "NotReady"}


def test_a_killed_stage_is_tried_again(project: Path, server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "RETRY_SECONDS", [0, 0, 0])
    (project / "make.sh").write_text(
        "mkdir -p data; test -e .scratch/again || { mkdir .scratch; touch .scratch/again; kill -9 $$; }\n"
    )
    assert play(targets=["make"], retries=1) == {"make": "Completed"}
    runs = asyncio.run(task_runs())
    assert [r.run_count for r in runs] == [2]


def test_a_wrong_input_is_not_tried_again(project: Path, server: None) -> None:
    (project / "make.sh").write_text("echo run >> count; echo 'error: params.yaml: no' >&2; exit 2\n")
    assert play(targets=["make"], retries=2) == {"make": "Failed"}
    assert (project / "count").read_text() == "run\n"


def test_a_stage_beyond_its_time_limit_is_ended(project: Path, server: None) -> None:
    (project / "make.sh").write_text("sleep 4323.5\n")
    assert play(targets=["make"], retries=2, hours=3 / 3600) == {"make": "TimedOut"}
    assert [r.run_count for r in asyncio.run(task_runs())] == [1]
    assert processes_with("4323.5") == []


def test_what_prefect_shows_to_a_retry_condition(server: None) -> None:
    seen = []

    def condition(_: Any, __: Any, state: Any) -> bool:
        seen.append(prefect.raised(state))
        return False

    @task(retries=1, retry_condition_fn=condition)
    async def fails() -> None:
        raise attempt.StageFailed("killed", again=True)

    @task(retries=1, retry_condition_fn=condition, timeout_seconds=0.1)
    async def sleeps() -> None:
        await asyncio.sleep(60)

    @flow
    async def both() -> None:
        for attempted in (fails, sleeps):
            state: Any = attempted(return_state=True)
            await state

    part = "`state.data` in a retry_condition_fn, and TaskRunTimeoutError (flows/adapter/prefect.py)"
    with leaned_on("prefect", prefect.KNOWN, part):
        asyncio.run(both())
        assert sorted((type(why).__name__, prefect.timed_out(why)) for why in seen) == [
            ("StageFailed", False),
            ("TaskRunTimeoutError", True),
        ]


def test_what_dvc_has_does_not_wait_for_a_worker(project: Path, server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sh(project, "dvc", "repro", "-q")
    shutil.rmtree(project / "data/use/a")
    (project / "data/last").unlink()
    (project / "params.yaml").write_text(PARAMS.replace("by: 2", "by: 5"))
    asked = []

    async def deployment() -> tuple[str, frozenset[str]]:
        return "stage/gpu", frozenset({"use"})

    async def elsewhere(stage: str, *_: Any) -> str:
        asked.append(stage)
        raise attempt.StageFailed("no worker is there", again=False)

    monkeypatch.setattr("flows.winnow.gpu_deployment", deployment)
    monkeypatch.setattr(tasks, "run_elsewhere", elsewhere)
    ended = {"make": "Cached", "restore": "Completed", "use@a": "Restored", "use@b": "Failed", "last": "NotReady"}
    assert play(elsewhere=True) == ended
    assert asked == ["use@b"]
    assert (project / "data/use/a/it").read_text() == "hello"


def test_nothing_is_run_while_restoring(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "make.sh").write_text("sleep 4324.5\n")
    monkeypatch.setattr(attempt, "get_run_logger", lambda: logging.getLogger("test"))
    assert asyncio.run(attempt.restore(["make"], attempt.Where(project, project, force=False))) == []
    assert processes_with("4324.5") == []


def test_an_mlflow_is_linked_where_one_answers() -> None:
    class MLflow(http.server.BaseHTTPRequestHandler):
        said = b"OK"

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.said if self.path == "/health" else b"")

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), MLflow) as there:
        threading.Thread(target=there.serve_forever, daemon=True).start()
        link = f"http://127.0.0.1:{there.server_port}/#/experiments/1"
        assert asyncio.run(tracking.listens(link))
        MLflow.said = b"another program"
        assert not asyncio.run(tracking.listens(link))
        there.shutdown()
    assert not asyncio.run(tracking.listens(link))


def test_a_variant_leaves_the_workspace_alone(project: Path, server: None) -> None:
    play()
    before = {p: p.read_bytes() for p in (project / "params.yaml", project / "dvc.lock", project / "data/last")}
    assert play(set_params=["use.a.by=9"]) == {
        "restore": "Completed",
        "make": "Restored",
        "use@a": "Completed",
        "use@b": "Restored",
        "last": "Restored",
    }
    planned, _ = asyncio.run(plan_and_log())  # of the folder of the variant, which is not the one that the flow works in
    assert "use.a.by: " in planned
    assert {p: p.read_bytes() for p in before} == before
    assert list((project / worktree.WORKTREES).iterdir()) == []
    shown = json.loads(sh(project, "dvc", "exp", "show", "--json"))
    names = [e.get("name") for rev in shown for group in rev["experiments"] or [] for e in group["revs"]]
    assert len(names) == 1
    assert names[0].startswith("use-a-by-9-")


def test_a_variant_takes_uncommitted_files_along_and_stands_on_the_last_commit(project: Path, server: None) -> None:
    (project / "make.sh").write_text("mkdir -p data; echo here > data/changed\n")
    (project / ".gitignore").unlink()
    head, tree = worktree.git(project, "rev-parse", "HEAD"), worktree.tree(project)
    time.sleep(1.1)
    assert worktree.tree(project) == tree != worktree.git(project, "rev-parse", "HEAD^{tree}")
    place = worktree.make(project, head, key=[tree], tree=tree)
    assert worktree.git(place, "rev-parse", "HEAD") == head
    assert (place / "make.sh").read_text() == (project / "make.sh").read_text()
    assert not (place / ".gitignore").exists()
    assert worktree.changed(place) == [".gitignore", "make.sh"]
    worktree.remove(project, place)
    worktree.git(project, "checkout", "--", ".gitignore")
    assert play(set_params=["make.n=7"], targets=["make"]) == {"make": "Completed"}
    assert "make-n-7-" in sh(project, "dvc", "exp", "list", "--name-only")


def test_a_variant_of_some_stages_is_an_experiment_too(project: Path, server: None) -> None:
    assert play(set_params=["use.a.by=8"], targets=["use@a"]) == {"make": "Completed", "use@a": "Completed"}
    assert "use-a-by-8-" in sh(project, "dvc", "exp", "list", "--name-only")
    assert not (project / "data").exists()


# Sweeps


def test_a_sweep_is_one_run_with_one_comparison(project: Path, server: None) -> None:
    changed = DVC_YAML.replace("""'{"n":1}'""", """'{"n":'${use.${key}.by}'}'""")
    (project / "dvc.yaml").write_text(changed.replace("${use.${key}.by}", "${item.by}"))
    assert play(set_params=["use.a.by=3,4", "make.n=7"], targets=["use@a"]) == {
        "make [3]": "Completed",
        "use@a [3]": "Completed",
        "make [4]": "Restored",  # the same as in the first variant
        "use@a [4]": "Completed",
    }
    (comparison,) = asyncio.run(artifacts("winnow-comparison"))
    assert comparison.splitlines()[:4] == [
        "| `use.a.by` |  | n |",
        "| --- | --- | ---: |",
        "| 3 | done | 3 |",
        "| 4 | done | 4 |",
    ]
    (planned,) = asyncio.run(artifacts("winnow-plan"))
    assert "### 4" in planned
    assert "; the same as make [3] |" in planned
    names = sh(project, "dvc", "exp", "list", "--name-only").split()
    assert sorted(name[: name.rindex("-")] for name in names) == ["use-a-by-3-make-n-7", "use-a-by-4-make-n-7"]
    assert list((project / worktree.WORKTREES).iterdir()) == []
    assert (project / "params.yaml").read_text() == PARAMS


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["use.a.by=1,2", "use.c.by=1,2"], r"(?s)params: .*use\.c.*In set_params: use\.a\.by=1 use\.c\.by=1\. Nothing was run\."),
        (["use.a.by=range(0,3)", "make.n=range(0,6)"], r"3 x 6 values of use\.a\.by, make\.n are more than 16 combinations"),
        (["use.a.by=range(0,1000000)"], r"more than 16 values of use\.a\.by are more than 16 combinations"),
        (["use.a.by==[1"], r"params: use\.a\.by==\[1: "),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_is_made(project: Path, changes: list[str], told: str) -> None:
    async def prepare() -> None:
        await variant.check_all(project, variant.combinations(changes, 16))

    with pytest.raises(variant.WrongParams, match=told):
        asyncio.run(prepare())
    assert not (project / ".scratch").exists()


def test_models_that_are_the_same_in_all_variants_are_compared_once(tmp_path: Path) -> None:
    variants = []
    for label, of_ssld in (("js", "1"), ("0.5", "2"), ("1", "2")):
        (tmp_path / label).mkdir()
        outs = {"teacher": "0", "ssld": of_ssld}
        stages = {f"evaluate@{e}": {"cmd": "x", "outs": [{"path": f"data/evaluate/{e}", "md5": md5}]} for e, md5 in outs.items()}
        (tmp_path / label / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
        where = attempt.Where(tmp_path / label, tmp_path, force=False, label=label)
        graph = dag.Dag(dict.fromkeys(stages, frozenset[str]()))
        variants.append(variant.Variant(variant.Combination((), label), where, graph, list(stages), {}, {}))
    found = sweep.entries(variants)
    assert {name: (v.where.label, entry) for name, (v, entry) in found.items()} == {
        "teacher": ("js", "teacher"), "ssld--js": ("js", "ssld"), "ssld--0-5": ("0.5", "ssld"),
    }  # fmt: skip


def test_a_dvc_that_cannot_be_asked_costs_only_lineage(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def another(_: Path) -> dict[str, dvc.Read]:
        raise dvc.AnotherDVC("DVC 9.9 is installed")

    monkeypatch.setattr(dvc, "stages", another)
    monkeypatch.setattr(variant, "get_run_logger", lambda: logging.getLogger("test"))
    assert variant._reads(Path()) == {}
    assert "DVC 9.9 is installed" in caplog.text


def test_variants_are_told_apart_by_what_varies() -> None:
    of_two = variant.combinations(["a.b=js,sym_kl", "seed=1,2", "n=[1,2]"], 4)
    assert [one.label for one in of_two] == ["js-1", "js-2", "sym-kl-1", "sym-kl-2"]
    assert of_two[1].set_params == ["a.b=js", "seed=2", "n=[1,2]"]
    assert of_two[1].values == {"a.b": "js", "seed": "2"}
    assert [one.label for one in variant.combinations(["a='x y',x_y"], 4)] == ["x-y-1", "x-y-2"]
    assert variant.combinations(["n=[1,2]"], 1) == [variant.Combination(["n=[1,2]"])]
    assert variant.combinations([], 1) == [variant.Combination([])]


# Another machine


def test_what_could_not_be_pushed_is_pushed_by_the_next_attempt(
    project: Path, server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = []

    async def exchange(what: str, stages: list[str], *_: Any, **__: Any) -> None:
        if what == "push":
            pushed.extend(stages)
            if len(pushed) == 1:
                raise attempt.StageFailed("the remote is away", again=True)

    monkeypatch.setattr(attempt, "exchange", exchange)
    monkeypatch.setattr(dag, "has_remote", lambda _: True)
    monkeypatch.setattr(tasks, "RETRY_SECONDS", [0])
    assert play(targets=["make"], retries=1) == {"make": "Completed"}  # by the first attempt; the second one only pushed
    assert pushed == ["make", "make"]
    assert play(targets=["make"]) == {"make": "Cached"}
    pushed.clear()
    (project / "params.yaml").write_text(PARAMS.replace("hello", "bye"))
    assert play(targets=["make"], retries=0) == {"make": "Failed"}  # it was made, and nobody else has it
    assert (project / "data/made").read_text() == "bye"
    assert play(targets=["make"]) == {"make": "Pushed"}
    assert play(targets=["make"]) == {"make": "Cached"}
    assert pushed == ["make", "make"]


def test_a_failed_push_says_why() -> None:
    lines = [
        "Pushing",
        "ERROR: failed to transfer 'ab12' - [Errno 28] No space left on device",
        "ERROR: failed to push data: 3 files",
    ]
    said = attempt.why(child.Ended(255, lines))
    assert said == "failed to transfer 'ab12' - [Errno 28] No space left on device; failed to push data: 3 files"
    assert attempt.why(child.Ended(137, [])) == "137"


def test_outcomes_are_counted_by_what_happened() -> None:
    assert (
        attempt.told(["Completed", "Restored", "Cached", "Restored", "Pushed"]) == "1 stage run, 2 restored, 1 pushed, 1 cached"
    )
    assert attempt.told(["Cached"] * 4) == "4 stages cached"
    assert attempt.told([]) == "0 stages cached"


def test_a_remote_that_is_not_mounted_is_refused(project: Path, tmp_path: Path) -> None:
    assert not dag.has_remote(project)
    remote = tmp_path / "share" / "winnow"
    sh(project, "dvc", "remote", "add", "--local", "--default", "shared", str(remote))
    with pytest.raises(dag.DVCError, match="which is not there"):
        dag.has_remote(project)
    remote.mkdir(parents=True)
    with pytest.raises(dag.DVCError, match="which is empty"):
        dag.has_remote(project)
    (remote / dag.MARKER).touch()
    assert dag.has_remote(project)
    sh(project, "dvc", "remote", "add", "--local", "--default", "cloud", "s3://bucket/winnow")
    assert dag.has_remote(project)


def test_each_stage_that_waits_for_a_worker_shows_it_its_own_token(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    async def deployed(_: str, parameters: dict[str, Any], flow_run_name: str, **__: Any) -> Any:
        await asyncio.sleep(0.2 if flow_run_name == "use@b" else 0)  # its worker is free when the other one has ended
        seen[flow_run_name] = Path(parameters["token"]).is_file()
        return SimpleNamespace(name=flow_run_name, state=None)

    async def both() -> list[Any]:
        where = attempt.Where(project, project, force=False)
        return await asyncio.gather(
            *(tasks.run_elsewhere(s, where, "winnow/gpu", {}) for s in ("use@a", "use@b")), return_exceptions=True
        )

    monkeypatch.setattr(tasks, "arun_deployment", deployed)
    monkeypatch.setattr(tasks, "get_run_logger", lambda: logging.getLogger("test"))
    ends = asyncio.run(both())
    assert seen == {"use@a": True, "use@b": True}
    assert all(isinstance(end, attempt.StageFailed) and end.again for end in ends)
    assert list((project / ".scratch/flows").iterdir()) == []


def test_two_clones_share_a_stage_through_the_remote(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `run_elsewhere` and `stage` do, without Prefect between them."""

    def away(*_: object) -> str:
        raise dag.DVCError("dvc pull: the remote is away")

    other = tmp_path / "other"
    sh(tmp_path, "git", "clone", "-q", str(project), str(other))
    for clone in (project, other):
        sh(clone, "dvc", "remote", "add", "--local", "--default", "shared", str(tmp_path / "remote"))
    sh(project, *dag.repro("make"))
    sh(project, *dag.command("push", "make"))
    at = worktree.git(project, "rev-parse", "HEAD")
    params, lock = (project / "params.yaml").read_text(), (project / "dvc.lock").read_text()
    place = worktree.make(other, at, key=["use@a", params], params=params, lock=lock)
    sh(place, *dag.command("pull", "make"))
    sh(place, *dag.repro("use@a"))
    sh(place, *dag.command("push", "use@a"))
    dag.adopt(project, "use@a", dag.lock_entry(place, "use@a"), dag.loose_files(place, "use@a"))
    assert (project / "data/use/a/it").read_text() == "hello"
    assert (project / "data/use/a.json").read_text() == '{"n":1}\n'
    assert dag.stale(project, ["make", "use@a"]) == {}
    entry = {**dag.lock_entry(place, "use@a"), "cmd": "another"}
    known = dag.lock_entry(project, "use@a")
    with pytest.raises(dag.DVCError, match="other code, params or inputs"):
        dag.adopt(project, "use@a", entry, {"data/use/a.json": "{}", "data/new.json": "{}"})
    assert dag.lock_entry(project, "use@a") == known
    with monkeypatch.context() as patched:
        patched.setattr(dag, "call", away)
        with pytest.raises(dag.Unreachable, match="away"):  # worth another attempt
            dag.adopt(project, "use@a", known, {})
    assert dag.lock_entry(project, "use@a") == known
    assert (project / "data/use/a.json").read_text() == '{"n":1}\n'
    assert not (project / "data/new.json").exists()
    assert worktree.remove(other, place)
    assert sh(other, "git", "status", "--porcelain") == ""
    with pytest.raises(worktree.WorktreeError, match="does not have the commit"):
        worktree.make(other, "0" * 40, key=["use@a"])


def test_a_worktree_that_a_kill_left_half_made_or_half_removed_is_made_anew(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = worktree.git(project, "rev-parse", "HEAD")

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(worktree, "_same_cache", dies)
        with pytest.raises(KeyboardInterrupt):
            worktree.make(project, head, key=["x"])
    place = worktree.make(project, head, key=["x"])
    (place / "mine").touch()
    assert worktree.make(project, head, key=["x"]) == place
    assert (place / "mine").is_file()
    with monkeypatch.context() as patched:
        patched.setattr(worktree, "git", dies)
        with pytest.raises(KeyboardInterrupt):
            worktree.remove(project, place)
    assert not (worktree.make(project, head, key=["x"]) / "mine").exists()
