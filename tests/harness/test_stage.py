"""A stage's command: what it injects, what it writes, how it fails."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.store import artifact, params
from tests.disks import disk_of

ROOT = Path(__file__).parents[2]
STAGE = '''
"""A stage for tests."""
import os, shutil, time
from pathlib import Path
import numpy as np
import safetensors.numpy
from pipeline.harness import stage
from pipeline.harness.machine import Machine
from pipeline.store import artifact
from pipeline.store.params import Section

class Distil(Section):
    text: str
    do: str = ""

def run(
    params: Distil, *, source: Path, out: Path, seed: int, workdir: Path, journal: stage.Journal, machine: Machine
) -> stage.Metrics:
    """Copy a text."""
    (workdir / "resumed").open("a").write("x")
    if params.do == "sleep":
        print("ready", flush=True)
        time.sleep(60)
    if params.do == "tidy":
        shutil.rmtree = lambda folder, **_: Path(folder).exists() and os.kill(os.getpid(), 9)
    if params.do == "full":
        with artifact.writing(out) as tmp:
            safetensors.numpy.save_file({"weights": np.zeros(4_000_000, np.uint8)}, tmp / "weights")
    if params.do == "defect":
        raise KeyError("a defect")
    with artifact.writing(out) as tmp:
        (tmp / "text").write_text(params.text + source.read_text() + str(seed))
    journal.log(step=1, value=2.0)
    return {"length": len(params.text), "times": len((workdir / "resumed").read_text())}

if __name__ == "__main__":
    stage.main(run)
'''


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "distil.py").write_text(STAGE)
    (tmp_path / "source").write_text("-")
    return tmp_path


def command(house: Path, do: str = "", text: str = "hello") -> list[str]:
    needed: dict[str, object] = {key: {} for key in params.NEEDED}  # by DVC
    (house / "params.yaml").write_text(json.dumps({**needed, "seed": 7, "distil": {"x": {"text": text, "do": do}}}))
    return [sys.executable, "distil.py", "x", "--source", "source", "--out", "data/distil/x"]


def run(
    house: Path, do: str = "", text: str = "hello", limit: int = resource.RLIM_INFINITY, **env: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WINNOW_TRACKING": "off", **env}
    limited = ["prlimit", f"--fsize={limit}", *command(house, do, text)] if limit >= 0 else command(house, do, text)
    return subprocess.run(limited, capture_output=True, text=True, env=environment, timeout=60)


def test_writes_artifact_and_metrics(house: Path) -> None:
    done = run(house)
    assert done.returncode == 0, done.stderr
    assert (artifact.verify(house / "data/distil/x") / "text").read_text() == "hello-7"
    assert json.loads((house / "data/distil/x.json").read_text()) == {"length": 5, "times": 1}
    record = artifact.record(house / "data/distil/x")
    assert (record["stage"], record["entry"], record["seed"], record["params"]["text"]) == ("distil", "x", 7, "hello")
    assert not list((house / ".scratch").glob("distil.x/*"))


def test_the_key_is_the_content_of_the_inputs_not_their_time(house: Path) -> None:
    keys = []
    for text, source in (("a", "-"), ("a", "-"), ("b", "-"), ("a", "+")):
        (house / "source").write_text(source)
        run(house, text=text)
        keys.append(artifact.record(house / "data/distil/x")["key"])
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_a_full_disk_is_named_and_the_next_run_finds_its_workdir(house: Path) -> None:
    (house / "data").mkdir()
    with disk_of("1m", house / "data"):
        failed = run(house, do="full")
        assert failed.stderr.endswith(
            "error: the disk is full (data/distil/x). Free space and repeat the command: it goes on where it stopped.\n"
        )
        assert "Traceback" not in failed.stderr
        assert failed.returncode == 75
        assert not list((house / "data/distil").iterdir())
    assert len(list((house / ".scratch/distil.x").rglob("resumed"))) == 1


def test_a_limit_on_the_size_of_files_is_named(house: Path) -> None:
    failed = run(house, do="full", limit=1_000_000)
    assert "error: a file may not grow further (data/distil/x). Raise the limit (`ulimit -f`) and repeat" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert failed.returncode == 75


def test_under_dvc_a_section_that_a_later_stage_needs_is_missed_at_once(house: Path) -> None:
    start = command(house)
    tree = json.loads((house / "params.yaml").read_text())
    (house / "params.yaml").write_text(json.dumps({k: v for k, v in tree.items() if k != "dedup"}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WINNOW_TRACKING": "off", "DVC_ROOT": str(house)}
    done = subprocess.run(start, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: params.yaml: `dedup` is missing. Write `dedup: {}`.\n")
    assert not (house / "data").exists()


def test_under_dvc_the_entry_and_what_it_names_come_from_no_shell(house: Path) -> None:
    start = [sys.executable, "distil.py", "--source", "{text}", "--out", "data/distil/{entry}"]
    command(house, text="source")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WINNOW_TRACKING": "off", "DVC_STAGE": "../dvc.yaml:distil@x"}
    done = subprocess.run(start, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (house / "data/distil/x/text").read_text() == "source-7"
    del environment["DVC_STAGE"]
    done = subprocess.run(start, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, "which entry of `distil`?" in done.stderr) == (2, True)


def test_help_describes_the_keys_of_the_section(house: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pipeline.stages.select", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert "  k: integer ≥ 1, ≤ 999999; required\n      Images of each class.\n" in done.stdout


def test_a_defect_keeps_its_traceback(house: Path) -> None:
    failed = run(house, do="defect")
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr


def test_a_missing_input_is_named(house: Path) -> None:
    (house / "source").unlink()
    failed = run(house)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: --source: source is not there.")


def test_two_at_once_are_refused_and_a_killed_one_leaves_no_lock(house: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WINNOW_TRACKING": "off"}
    first = subprocess.Popen(command(house, do="sleep"), stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "ready\n"
        second = run(house)
        assert "another process is running the stage distil.x" in second.stderr
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert run(house).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death signal is Linux's")
def test_a_kill_while_it_tidies_up_leaves_nothing_to_resume_from(house: Path) -> None:
    assert run(house, do="tidy").returncode == -signal.SIGKILL
    assert [path.name for path in (house / ".scratch").glob("distil.x*/*/resumed")] == ["resumed"]
    assert not (house / ".scratch/distil.x").exists()
    assert run(house).returncode == 0
    assert not list((house / ".scratch").glob("distil.x*/"))


@pytest.mark.whole
def test_a_stage_dies_with_the_dvc_that_started_it(house: Path) -> None:
    script = house / "dvc.sh"
    script.write_text(" ".join(command(house, do="sleep")) + "\n")  # a shell that waits, as DVC's does
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WINNOW_TRACKING": "off", "DVC_ROOT": str(house)}
    shell = subprocess.Popen(["sh", "-c", f"{script.read_text()}; true"], stdout=subprocess.PIPE, text=True, env=environment)
    assert shell.stdout is not None
    assert shell.stdout.readline() == "ready\n"
    child = int(Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()[0])
    shell.kill()
    shell.communicate()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
