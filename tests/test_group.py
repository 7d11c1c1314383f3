"""Two processes train what one trains and write it once; they go with their launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline import artifact, group
from pipeline.errors import UserError
from tests.conftest import prepared

ROOT = Path(__file__).parent.parent
MODEL = {"arch": "resnet8", "options": {"width": 4}, "input": {"size": 16}}
TRAINING = {"steps": 6, "batch": 12, "lr": 0.05, "ema": 0.5, "clip": 1.0, "rates": {"conv1": 0.5}, "accumulate": 2}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("house")
    prepared(root, {"ant": 10, "bee": 10}, pool=2, holdout=0.2)
    (root / "data/scratch").touch()
    return root


def command(house: Path, entry: str, processes: int, **training: Any) -> tuple[list[str], dict[str, str]]:
    machine = {"device": "cpu", "precision": "float32", "threads": 1, "workers": 1, "processes": processes}
    section = {"init": "scratch", "model": MODEL, "training": {**TRAINING, **training}}
    (house / f"{entry}.yaml").write_text(json.dumps({"seed": 1, "machine": machine, "teach": {entry: section}}))
    inputs = ["--train", "data/prepare/train", "--holdout", "data/prepare/holdout", "--init", "data/scratch"]
    args = [entry, *inputs, "--out", f"data/teach/{entry}", "--params", f"{entry}.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WINNOW_TRACKING": "off"}
    return [sys.executable, "-m", "pipeline.stages.teach", *args], environment


def test_two_processes_train_what_one_trains(house: Path) -> None:
    for entry, processes in (("alone", 1), ("together", 2)):
        args, environment = command(house, entry, processes, accumulate=1)
        done = subprocess.run(args, env=environment, cwd=house, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("done in") == 1
    alone, together = (safetensors.torch.load_file(house / f"data/teach/{e}/model.safetensors") for e in ("alone", "together"))
    for name, tensor in alone.items():
        assert torch.allclose(tensor.float(), together[name].float(), rtol=1e-3, atol=1e-4), name
    artifact.verify(house / "data/teach/together")
    losses = [json.loads((house / f"data/teach/{e}/history.json").read_text())["train"] for e in ("alone", "together")]
    assert [row["loss"] for row in losses[0]] == pytest.approx([row["loss"] for row in losses[1]], abs=1e-4)
    assert not (house / ".scratch" / "teach.together").exists()


def test_the_group_ends_with_its_launcher(house: Path) -> None:
    args, environment = command(house, "long", 2, steps=100_000)
    launcher = subprocess.Popen(args, env=environment, cwd=house, stderr=subprocess.PIPE, text=True)
    try:
        assert launcher.stderr is not None
        while "training:" not in launcher.stderr.readline():
            assert launcher.poll() is None
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        assert len(children) >= 2
    finally:
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
        launcher.stderr.close()  # type: ignore[union-attr]
    end = time.monotonic() + 20
    while any(running(pid) for pid in children):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not (house / "data/teach/long").exists()


def running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert group.part(12) == slice(4, 8)
    with pytest.raises(UserError, match="multiple of 3"):
        group.part(16)
