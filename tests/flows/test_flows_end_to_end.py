"""A Prefect server, a worker for each pool in a clone of its own, a DVC remote between them, and the pipeline on tiny images.

All of it on loopback, on free ports, in temporary folders; everything that is started here is ended here, by its process id.
"""

import contextlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from pipeline.store import artifact
from tests.tiny import PARAMS

DROPPED: dict[str, list[str]] = {"pretrain": [], "self_distil": [], "export": []}
KEPT = {**DROPPED, "teach": ["teacher"], "distil": ["ssld"], "evaluate": ["baseline", "ssld"]}
SMALLER = {name: {k: v for k, v in body.items() if k in KEPT[name]} if name in KEPT else body for name, body in PARAMS.items()}
"""One entry of each stage that SSLD needs."""

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.flows, pytest.mark.timeout(600)]  # seconds; on one idle core all of it takes a minute and a half


class Site:
    """A server, two clones, and the processes that run there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cpu, self.gpu = folder / "cpu", folder / "gpu"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "MLFLOW", "PYTHONPATH", "WINNOW"))},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "1",
            "WINNOW_PROBE": "off",  # seconds for each kind of work, and nothing depends on them
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "DVC_NO_ANALYTICS": "1",
        }

    def start(self, name: str, *command: str, cwd: Path, **env: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**self.env, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def worker(self, pool: str) -> subprocess.Popen[bytes]:
        clone = self.folder / pool
        command = ("prefect", "worker", "start", "--pool", pool, "--name", pool, "--type", "process", "--limit", "1")
        return self.start(pool, *command, cwd=clone, WINNOW_HOME=str(clone))

    def sh(self, cwd: Path, *command: str) -> str:
        done = subprocess.run(command, cwd=cwd, env=self.env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, path: str, **body: Any) -> Any:
        for _ in range(20):
            answer = httpx.post(f"{self.api}/{path}", json=body, timeout=30)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:  # its database is locked: ask again, as its own client does
                break
            time.sleep(1)
        assert answer.is_success, answer.text
        return answer.json()

    def run(self, **parameters: Any) -> str:
        """The id of a new run of the deployment winnow/cpu."""
        deployment = httpx.get(f"{self.api}/deployments/name/winnow/cpu", timeout=30).json()["id"]
        created = self.ask(f"deployments/{deployment}/create_flow_run", parameters=parameters, state={"type": "SCHEDULED"})
        return str(created["id"])

    def state(self, run: str) -> str:
        return str(httpx.get(f"{self.api}/flow_runs/{run}", timeout=30).json()["state"]["name"])

    def finished(self, run: str, seconds: float = 400) -> str:
        self.until(lambda: self.state(run) in ("Completed", "Failed", "Crashed", "Cancelled"), seconds)
        return self.state(run)

    def stages(self, run: str) -> dict[str, str]:
        time.sleep(1)  # task runs arrive as events
        tasks = self.ask("task_runs/filter", flow_runs={"id": {"any_": [run]}})
        tasks.sort(key=lambda t: t["created"])  # of a stage that was begun twice the second counts
        return {t["name"]: t["state_name"] for t in tasks if not t["task_key"].startswith("prefect.deployments")}

    def artifacts(self, run: str) -> dict[str, Any]:
        found = self.ask("artifacts/filter", artifacts={"flow_run_id": {"any_": [run]}})
        return {a["key"].removeprefix("winnow-"): a for a in found if a["key"]}

    def log(self, run: str) -> str:
        lines: list[str] = []
        while page := self.ask("logs/filter", logs={"flow_run_id": {"any_": [run]}}, limit=200, offset=len(lines)):
            lines += [line["message"] for line in page]
        return "\n".join(lines)

    def until(self, true: Callable[[], Any], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.3)

    def logs(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))

    def end(self) -> None:
        """Kill each process with all it has started: a worker and a server that are asked take 20 seconds each."""
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def clone(site: Site) -> None:
    """Two clones of this working tree with tiny params, and a folder as the remote of both."""
    origin = site.folder / "origin"
    tracked = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True)
    for name in filter(None, tracked.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/", "benchmarks/", "requirements.lock")):
            (origin / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, origin / name)
    (origin / "params.yaml").write_text(yaml.safe_dump(SMALLER, sort_keys=False))
    table = yaml.safe_load((origin / "flows/pools.yaml").read_text())
    (origin / "flows/pools.yaml").write_text(yaml.safe_dump({**table, "stages": ["score"]}))
    site.sh(origin, "git", "init", "-q", ".")
    site.sh(origin, "git", "add", "-A")
    site.sh(origin, "git", "-c", "user.name=n", "-c", "user.email=n@example.org", "commit", "-qm", "all")
    (site.folder / "remote").mkdir()
    (site.folder / "remote" / ".winnow").touch()
    for folder in (site.cpu, site.gpu):
        site.sh(site.folder, "git", "clone", "-q", str(origin), str(folder))
        site.sh(folder, "dvc", "remote", "add", "--local", "--default", "shared", str(site.folder / "remote"))
        site.sh(folder, "git", "config", "user.name", "n")
        site.sh(folder, "git", "config", "user.email", "n@example.org")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    try:
        site.start("server", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(site.port), cwd=site.folder)
        clone(site)
        site.until(lambda: answers(f"{site.api}/health"), 120)
        for pool in ("cpu", "gpu"):
            site.ask("work_pools/", name=pool, type="process", concurrency_limit=1)
        site.sh(site.cpu, "prefect", "--no-prompt", "deploy", "--all")
        site.worker("cpu")
        site.worker("gpu")
        yield site
    finally:
        site.end()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False


def working_in(folder: Path, word: str) -> list[int]:
    """The processes with `word` in their command line that work in `folder` or below it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if word in (process / "cmdline").read_text() and (process / "cwd").resolve().is_relative_to(folder):
                found.append(int(process.name))
        except OSError:
            continue
    return found


@dataclass(frozen=True)
class First:
    """The first run of the deployment, and what MLflow had when it had ended: name, id, tags, metrics, params of each run."""

    run: str
    mlflow: list[Any]


@pytest.fixture(scope="module")
def first(site: Site) -> First:
    run = site.run(at_once=2)
    assert site.finished(run) == "Completed", site.log(run) + site.logs()
    script = (
        "import mlflow, json; mlflow.set_tracking_uri('sqlite:///mlflow.db');"
        "runs = mlflow.search_runs(search_all_experiments=True, output_format='list');"
        "print(json.dumps([[r.info.run_name, r.info.run_id, r.data.tags, r.data.metrics, r.data.params] for r in runs]))"
    )
    said = site.sh(site.folder, sys.executable, "-W", "ignore", "-c", script)
    return First(run, json.loads(said.splitlines()[-1]))


def test_the_whole_pipeline_over_two_pools(site: Site, first: First) -> None:
    stages = site.stages(first.run)
    assert sorted(stages) == sorted(site.sh(site.cpu, "dvc", "stage", "list", "--name-only").split())
    assert set(stages.values()) == {"Completed"}
    for checksums in (site.cpu / "data").rglob(artifact.CHECKSUMS):
        artifact.verify(checksums.parent)
    # score ran in the other clone, from the remote, and came back the same way.
    assert (site.gpu / ".dvc/cache").is_dir()
    assert not (site.gpu / "data/score/teacher").exists()
    assert site.sh(site.gpu, "git", "status", "--porcelain") == ""
    assert (site.cpu / "data/score/teacher/scores.parquet").is_file()
    assert "Data and pipelines are up to date" in site.sh(site.cpu, "dvc", "status")
    made = site.artifacts(first.run)
    assert "| ssld " in made["comparison"]["data"]
    assert "| distil@ssld |" in made["plan"]["data"]
    assert "/runs/" in made["mlflow-run"]["data"]
    assert (made["mlflow-run"]["type"], "mlflow ui --backend" in made["mlflow-run"]["data"]) == ("markdown", True)  # none listens


def test_mlflow_has_one_run_for_all_of_it_and_one_for_each_model(first: First) -> None:
    models = [run for run in first.mlflow if "winnow.latest" in run[2]]
    assert sorted(run[0] for run in models) == ["baseline", "ssld"]
    parents = [run for run in first.mlflow if "mlflow.parentRunId" not in run[2] and run not in models]
    assert [run[0] for run in parents] == ["compare"]
    _, parent, tags, metrics, params = parents[0]
    assert tags["prefect.flow_run_id"] == first.run
    assert len(tags["winnow.dvc_lock"]) == 64
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert "evaluate.ssld.val_top1" in metrics
    assert params["distil.ssld.training.steps"] == "6"
    children = {run[0] for run in first.mlflow if run[2].get("mlflow.parentRunId") == parent}
    assert {"draw.scenes", "prepare", "dedup", "teach.teacher", "score.teacher", "select.top", "distil.ssld"} <= children


def test_the_next_run_finds_everything_cached(site: Site, first: First) -> None:
    again = site.run()
    assert site.finished(again) == "Completed", site.log(again)
    assert set(site.stages(again).values()) == {"Cached"}


def test_a_cancelled_run_leaves_no_process_and_no_trace_in_the_clone(site: Site, first: First) -> None:
    before = (site.cpu / "params.yaml").read_bytes(), (site.cpu / "dvc.lock").read_bytes()
    run = site.run(targets=["teach@teacher"], set_params=["trainings.brief.steps=1000000"])
    site.until(lambda: working_in(site.cpu, "pipeline.stages.teach"), 60)
    site.ask(f"flow_runs/{run}/set_state", state={"type": "CANCELLING"})
    assert site.finished(run, 60) == "Cancelled"
    site.until(lambda: not working_in(site.cpu, "pipeline.stages"), 20)
    assert not working_in(site.cpu, "dvc")
    assert ((site.cpu / "params.yaml").read_bytes(), (site.cpu / "dvc.lock").read_bytes()) == before


def test_another_worker_goes_on_at_the_checkpoint_of_one_that_was_killed(site: Site, first: First) -> None:
    """A machine that is taken away in the middle of a training, and a worker on another one that sees its disk."""
    changes = ["trainings.brief.steps=300", "+machine.checkpoint_minutes=0.002"]
    run = site.run(targets=["teach@teacher"], set_params=changes)
    checkpoint = ".scratch/worktrees/*/.scratch/teach.teacher/*/checkpoint/done.json"
    site.until(lambda: list(site.cpu.glob(checkpoint)), 120)
    while processes := working_in(site.cpu, ""):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)
    step = json.loads(next(site.cpu.glob(checkpoint)).read_text())["step"]
    lost = yaml.safe_load((ROOT / "flows/lost_runs.yaml").read_text())["automations"][0]["actions"][0]
    for state in ({"type": lost["state"]}, {"type": "SCHEDULED", "name": "AwaitingRetry"}):  # by the automation; Retry in the UI
        answer = site.ask(f"flow_runs/{run}/set_state", state={**state, "message": lost["message"]}, force=False)
        assert answer["status"] == "ACCEPT", answer
    site.worker("cpu")
    assert site.finished(run) == "Completed", site.log(run) + site.logs()
    assert f"training: goes on at {step:,} of 300 steps" in site.log(run)
    assert site.stages(run)["teach@teacher"] == "Completed"


def test_a_run_that_fails_is_told_to_a_webhook(site: Site) -> None:
    received: list[dict[str, str]] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for _ in range(2):  # the second takes the place of the first
            site.sh(site.cpu, sys.executable, "-m", "flows", "notify", f"http://127.0.0.1:{server.server_port}/hook")
        for flow, name in (("stage", "teach@teacher"), ("winnow", 'everything "quoted"')):
            known = site.ask("flows/", name=flow)["id"]
            made = site.ask("flow_runs/", flow_id=known, name=name, state={"type": "PENDING"})["id"]
            site.ask(f"flow_runs/{made}/set_state", state={"type": "FAILED", "message": "teach@teacher:\nno room"}, force=True)
        site.until(lambda: received, 30)
        server.shutdown()
    (told,) = received
    assert told["text"].startswith('winnow: everything "quoted": Failed. teach@teacher:\nno room')


def test_what_is_made_is_an_asset_of_what_it_was_made_of(site: Site, first: First) -> None:
    name = "prefect.asset.materialization.succeeded"
    about = {"id": ["dvc://data/distil/ssld"]}
    found = site.ask("events/filter", filter={"event": {"name": [name]}, "resource": about, "any_resource": about}, limit=10)
    (made,) = [e for e in found["events"] if any(first.run in str(r.values()) for r in e["related"])]
    of = {r["prefect.resource.id"] for r in made["related"] if r.get("prefect.resource.role") == "asset"}
    assert of >= {"dvc://data/dedup/train", "dvc://data/teach/teacher", "dvc://data/select/top", "dvc://data/scratch"}
    (out,) = yaml.safe_load((site.cpu / "dvc.lock").read_text())["stages"]["distil@ssld"]["outs"][:1]
    assert (made["payload"]["md5"], made["payload"]["stage"]) == (out["md5"], "distil@ssld")


def test_the_form_of_a_run_has_choices_and_descriptions(site: Site) -> None:
    form = httpx.get(f"{site.api}/deployments/name/winnow/cpu", timeout=30).json()["parameter_openapi_schema"]["properties"]
    assert all(field["description"] for field in form.values())
    chosen = form["targets"]["items"]["enum"]
    assert {"distil", "distil@ssld", "compare"} <= set(chosen)
    assert form["at_once"]["minimum"] == 1
    run = site.run(targets=["nothing"])
    assert site.finished(run) == "Failed"
    assert "there is no stage 'nothing' in dvc.yaml. There are: draw@scenes, " in site.log(run)


def test_the_deployment_has_a_schedule_that_is_off(site: Site) -> None:
    deployment = httpx.get(f"{site.api}/deployments/name/winnow/cpu", timeout=30).json()
    assert [(s["active"], s["schedule"]["cron"]) for s in deployment["schedules"]] == [(False, "0 2 * * *")]
    assert deployment["global_concurrency_limit"]["limit"] == 1
