"""Nothing outlives what started it: a stage its DVC, a worker its stage, also where a kill comes at the very start."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.store import params
from tests.tiny import PARAMS, is_gone, waited

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the parent's death signal is Linux's")

ASKED_TOO_LATE = """
import os, signal, sys
from pipeline.harness import parent
read, write = os.pipe()
starter = os.getpid()
if os.fork():
    os.read(read, 1)
    os._exit(0)
os.write(write, b"x")
while os.getppid() == starter:
    pass
parent.end_with(signal.SIGKILL, lambda: os.getppid() == starter)
print("lives", flush=True)
"""
SLOW_IMPORT = "import pathlib, os, time\npathlib.Path('importing').write_text(str(os.getpid()))\ntime.sleep(60)\n"
SLOW_START = """
import os, pathlib, time
starter, end = os.getppid(), time.monotonic() + 30
pathlib.Path('starting').write_text(str(os.getpid()))
while os.getppid() == starter and time.monotonic() < end:
    time.sleep(0.01)
"""


def environment(folder: Path, **more: str) -> dict[str, str]:
    paths = os.pathsep.join(map(str, (folder / "modules", ROOT)))
    return {**os.environ, "PYTHONPATH": paths, "WINNOW_TRACKING": "off", "DVC_ROOT": str(folder), **more}


def test_who_asks_when_the_parent_is_dead_already_ends_at_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASKED_TOO_LATE], env=environment(tmp_path), capture_output=True, text=True, timeout=60
    )
    assert "lives" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("module", "code", "mark"),
    [("pyarrow", SLOW_IMPORT, "importing"), ("sitecustomize", SLOW_START, "starting")],
    ids=["imports", "starts"],
)
def test_a_stage_whose_dvc_is_killed_before_it_has_begun_ends(tmp_path: Path, module: str, code: str, mark: str) -> None:
    """While it imports, and before its first line."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "pyarrow.py").write_text(SLOW_IMPORT)
    (tmp_path / "modules" / f"{module}.py").write_text(code)
    command = f"{sys.executable} -m pipeline.stages.draw scenes --out out --truth-out truth; true"
    dvc = subprocess.Popen(["sh", "-c", command], cwd=tmp_path, env=environment(tmp_path), start_new_session=True)
    try:
        assert waited(lambda: (tmp_path / mark).is_file() and (tmp_path / mark).read_text() != "")
        stage = int((tmp_path / mark).read_text())
        dvc.kill()
        dvc.wait()
        assert waited(lambda: is_gone(stage), 10.0)
    finally:
        os.killpg(dvc.pid, signal.SIGKILL) if not is_gone(int((tmp_path / mark).read_text())) else None


@pytest.mark.whole
def test_the_workers_of_draw_end_with_it(tmp_path: Path) -> None:
    needed: dict[str, object] = {key: {} for key in params.NEEDED}
    tree = needed | {
        "seed": 0,
        "machine": {"workers": 2},
        "draw": {"scenes": {**PARAMS["draw"]["scenes"], "out_of_class": 20_000}},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "pipeline.stages.draw", "scenes", "--out", "out", "--truth-out", "truth"]
    stage = subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.DEVNULL)

    def workers() -> list[int]:
        children = Path(f"/proc/{stage.pid}/task/{stage.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    try:
        assert waited(lambda: len(workers()) == 2, 60.0)
        assert waited(lambda: any(tmp_path.glob(".out.tmp-*/*.tar")), 60.0)  # they draw
        left = workers()
    finally:
        stage.kill()
        stage.wait()
    assert waited(lambda: all(map(is_gone, left)), 20.0)
