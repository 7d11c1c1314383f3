"""What the flow costs beside bare `dvc repro`, and what a killed run leaves behind.

    python -m benchmarks.flow overhead --pairs 3     # the same stages by dvc repro and by the flow, alternating, in fresh clones
    python -m benchmarks.flow fixed --pairs 3        # what a stage costs that does nothing, under either
    python -m benchmarks.flow killed                 # SIGKILL in the middle of training, run again: are the artifacts the same?

The clones are of the commit at HEAD, with params.yaml as it is here but for `--steps`. The Prefect server runs on a free port of
this machine and is ended afterwards; its start is not counted, that of the flow's process is.
"""

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
FLOW = "import asyncio; from flows.winnow import winnow; asyncio.run(winnow(elsewhere=False))"
UNCHECKED = (
    # its stages are not winnow's
    "from flows import variant as v; v.check = v.scan = lambda folder: __import__('asyncio').sleep(0); "
)


def clone(folder: Path, steps: int | None) -> Path:
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    if steps:
        params["draw"]["scenes"] |= {"in_class": 600, "out_of_class": 1000}
        for section, keep in (("teach", 2), ("select", 1), ("evaluate", 2)):
            params[section] = dict(list(params[section].items())[:keep])
        params["distil"] = {"ssld": params["distil"]["ssld"]}
        params["evaluate"] = {
            "teacher": {"role": "teacher", "model": "teach/teacher"},
            "baseline": {"role": "baseline", "model": "teach/baseline"},
            "ssld": {"role": "candidate", "model": "distil/ssld"},
        }
        for training in params["trainings"].values():
            training["steps"] = steps
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return folder


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    quiet = {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return {**os.environ, **quiet, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PATH": path, **more}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def server(folder: Path) -> Iterator[dict[str, str]]:
    """A Prefect server; the variables that name it."""
    port = free_port()
    env = {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment(**env), stdout=log, stderr=log, cwd=folder)
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{env['PREFECT_API_URL']}/health", timeout=5):
                break
            if time.monotonic() > deadline:
                sys.exit((folder / "server.log").read_text())
            time.sleep(0.5)
        yield env
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def timed(command: list[str], folder: Path, **env: str) -> float:
    start = time.monotonic()
    with (folder.parent / f"{folder.name}.log").open("wb") as log:
        done = subprocess.run(command, cwd=folder, env=environment(**env), stdout=log, stderr=log)
    if done.returncode:
        sys.exit((folder.parent / f"{folder.name}.log").read_text()[-5000:])
    return time.monotonic() - start


def artifacts(folder: Path) -> dict[str, str]:
    """The hash of every output, by path."""
    stages = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for entry in stages.values() for out in entry["outs"]}


def overhead(pairs: int, steps: int | None, keep: Path | None) -> None:
    with contextlib.nullcontext(keep) if keep else tempfile.TemporaryDirectory() as tmp, server(Path(tmp)) as env:
        ratios, differences = [], []
        for i in range(pairs):
            bare, flow = clone(Path(tmp, f"bare{i}"), steps), clone(Path(tmp, f"flow{i}"), steps)
            runs = [("bare", ["dvc", "repro"], bare, {}), ("flow", [sys.executable, "-c", FLOW], flow, env)]
            took = {name: timed(command, folder, **more) for name, command, folder, more in (runs if i % 2 == 0 else runs[::-1])}
            stages = len(yaml.safe_load((bare / "dvc.lock").read_text())["stages"])
            assert artifacts(bare) == artifacts(flow)
            ratios.append(took["flow"] / took["bare"])
            differences.append((took["flow"] - took["bare"]) / stages)
            print(f"pair {i}: {stages} stages, bare {took['bare']:.1f} s, flow {took['flow']:.1f} s, same artifacts")
        again = timed([sys.executable, "-c", FLOW], flow, **env)
        print(f"flow / bare: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")
        print(f"a stage: {statistics.median(differences):+.2f} s; a run with everything cached: {again:.1f} s")


def empty(folder: Path, stages: int = 12) -> Path:
    """A DVC project of stages that do nothing, each after the last."""
    folder.mkdir()
    body = {
        f"s{i:02}": {"cmd": f"echo {i} > o{i:02}", "outs": [f"o{i:02}"], **({"deps": [f"o{i - 1:02}"]} if i else {})}
        for i in range(stages)
    }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": body}, sort_keys=False))
    (folder / "params.yaml").write_text("{}\n")
    for command in (["git", "init", "-q", "."], ["dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, check=True, env=environment(), capture_output=True)
    return folder


def fixed(pairs: int) -> None:
    with tempfile.TemporaryDirectory() as tmp, server(Path(tmp)) as env:
        code = {"PYTHONPATH": str(ROOT), **env}
        costs, cached = [], []
        for i in range(pairs):
            bare, flow = empty(Path(tmp, f"bare{i}")), empty(Path(tmp, f"flow{i}"))
            runs = [("bare", ["dvc", "repro"], bare, {}), ("flow", [sys.executable, "-c", UNCHECKED + FLOW], flow, code)]
            took = {name: timed(command, folder, **more) for name, command, folder, more in (runs if i % 2 == 0 else runs[::-1])}
            cached.append(timed([sys.executable, "-c", UNCHECKED + FLOW], flow, **code))
            costs.append((took["flow"] - cached[-1], took["bare"]))
            print(f"pair {i}: bare {took['bare']:.1f} s, flow {took['flow']:.1f} s, all cached {cached[-1]:.1f} s")
        of_flow, of_dvc = (statistics.median(c[k] for c in costs) / 12 for k in (0, 1))
        print(f"a stage that does nothing: {of_dvc:.2f} s by dvc repro, {of_flow:.2f} s by the flow")
        print(f"a run of the flow with 12 stages, all cached: {statistics.median(cached):.1f} s")


def processes() -> list[str]:
    """The folder and the command line of every process that may be looked at."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found.append(f"{(process / 'cwd').readlink()} {(process / 'cmdline').read_text()}")
    return found


def killed(steps: int | None) -> None:
    with tempfile.TemporaryDirectory() as tmp, server(Path(tmp)) as env:
        whole, broken = clone(Path(tmp, "whole"), steps), clone(Path(tmp, "broken"), steps)
        params = yaml.safe_load((broken / "params.yaml").read_text())
        for folder in (whole, broken):
            (folder / "params.yaml").write_text(
                yaml.safe_dump({**params, "machine": {"checkpoint_minutes": 0.02}}, sort_keys=False)
            )
        timed(["dvc", "repro"], whole)
        log = Path(tmp, "killed.log")
        with log.open("wb") as f:
            flow = subprocess.Popen([sys.executable, "-c", FLOW], cwd=broken, env=environment(**env), stdout=f, stderr=f)
        while not list(broken.glob(".scratch/teach.*/*/*")):  # its first checkpoint
            assert flow.poll() is None, log.read_text()[-5000:]
            time.sleep(0.1)
        flow.kill()
        flow.wait()
        time.sleep(1)
        left = [line for line in processes() if str(broken) in line and "pipeline.stages" in line]
        timed([sys.executable, "-c", FLOW], broken, **env)
        same = artifacts(whole) == artifacts(broken)
        verdict = "the same as" if same else "OTHERS THAN"
        print(f"killed in training; processes of the stage left after 1 s: {len(left)}")
        print(f"run again: {len(artifacts(broken))} outputs, {verdict} those of an undisturbed dvc repro")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flow", description="What the flow costs, and survives.")
    parser.add_argument("what", choices=["overhead", "fixed", "killed"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=None, help="a smaller job: fewer entries, 1,600 images in the pool, so many training steps"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="put the clones of `overhead` here, and leave them")
    args = parser.parse_args()
    if args.what == "overhead":
        if args.keep:
            args.keep.mkdir(parents=True)
        overhead(args.pairs, args.steps, args.keep)
    elif args.what == "fixed":
        fixed(args.pairs)
    else:
        killed(args.steps)


if __name__ == "__main__":
    main()
