"""Two processes train what one trains and write it once; they go with their launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.errors import UserError
from pipeline.harness.job import Job
from pipeline.harness.journal import Journal
from pipeline.harness.machine import Machine
from pipeline.learning import views
from pipeline.learning.loop import fit, group, optimisers
from pipeline.models import device, inputs
from pipeline.store import artifact
from tests.tiny import prepared

ROOT = Path(__file__).parents[2]
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
    shelves = {"models": {"it": MODEL}, "views": {"it": {}}, "trainings": {"it": {**TRAINING, **training}}}
    section = {"init": "scratch", "model": "it", "view": "it", "training": "it"}
    (house / f"{entry}.yaml").write_text(json.dumps({"seed": 1, "machine": machine, **shelves, "teach": {entry: section}}))
    inputs = ["--train", "data/prepare/train", "--holdout", "data/prepare/holdout", "--init", "data/scratch"]
    args = [entry, *inputs, "--out", f"data/teach/{entry}", "--params", f"{entry}.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WINNOW_TRACKING": "off"}
    return [sys.executable, "-m", "pipeline.stages.teach", *args], environment


@pytest.mark.whole
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


@pytest.mark.whole
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


AGREED = """
import os, sys, torch, torch.distributed as dist
from pipeline.learning.loop import group
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=rank, world_size=2)
cpu = torch.device("cpu")
assert group.agreed(7, cpu)
assert not group.agreed(7 * rank, cpu)
dist.destroy_process_group()
"""


@pytest.mark.whole
def test_processes_that_would_go_on_from_different_steps_notice(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", AGREED, str(tmp_path)]
    ranks = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in (0, 1)]
    assert [process.wait(timeout=100) for process in ranks] == [0, 0]


def test_a_group_whose_processes_resume_at_different_steps_does_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "agreed", lambda step, _: step != 0)
    pixels = inputs.InMemory(np.zeros((8, 8, 8, 3), np.uint8))
    with pytest.raises(optimisers.TrainingError, match="different steps, this one from 0"):
        fit.fit(
            torch.nn.Conv2d(3, 1, 1),
            lambda model, batch: model(batch.views.float()).mean(),
            pixels,
            views.viewer(8, views.View(), 0),
            optimisers.Training(steps=2, batch=4),
            lambda _: {},
            job=Job(0, tmp_path, Journal(), Machine()),
            device=device.pick(Machine(device="cpu")),
            label="training",
        )
