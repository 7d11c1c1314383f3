"""Groups of any size train what one process trains, also one after the other, and write it once; they go with their launcher."""

import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.harness import ranks
from pipeline.harness.job import Job
from pipeline.harness.journal import Journal
from pipeline.harness.machine import Machine
from pipeline.learning import views
from pipeline.learning.loop import fit, group, optimisers
from pipeline.models import device, inputs
from pipeline.store import artifact
from tests.learning import forked
from tests.tiny import is_gone, prepared, waited

ROOT = Path(__file__).parents[2]
MODEL = {"arch": "resnet8", "options": {"width": 4}, "input": {"size": 16}}
TRAINING = {"steps": 60, "batch": 12, "lr": 0.05, "ema": 0.5, "clip": 1.0, "accumulate": 2}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("forked")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.learning.forked", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr
    read: dict[str, Any] = json.loads((out / "found.json").read_text())
    return read


@pytest.mark.whole
@pytest.mark.parametrize("training", ["labels", "contrast", "distilled"])
def test_a_training_goes_on_with_another_number_of_processes(found: dict[str, Any], training: str) -> None:
    """Also uneven shares of a batch, with dropout, mixed views, and losses and statistics of all its images."""
    whole, changing = (found[f"{training}-{name}"] for name in ("whole", "changing"))
    assert len(whole["losses"]) == forked.STEPS
    assert changing["losses"] == pytest.approx(whole["losses"], abs=1e-4)
    order = fit.Order(forked.IMAGES, forked.BATCH, forked.SEED)
    for run in (whole, changing):
        seen: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for step, rows, passes in run["seen"]:
            seen[step] += zip(rows, passes, strict=True)
        assert sorted(seen) == list(range(forked.STEPS))
        for step, images in seen.items():
            assert sorted(images) == sorted(zip(*(of_all.tolist() for of_all in order.at(step)), strict=True))


@pytest.mark.whole
def test_a_killed_process_ends_the_others(found: dict[str, Any]) -> None:
    """`forked` has looked at their exit codes; what they took does not hang on the load of the machine."""
    seconds = found["labels-changing"]["seconds"]
    assert len(seconds) == len(forked.CHANGES)
    assert max(seconds[:-1]) < 60  # where they hung, it would be gloo's half hour


@pytest.mark.whole
def test_processes_that_would_go_on_from_different_steps_notice(found: dict[str, Any]) -> None:
    assert found["disagree-changing"]["losses"] == [1.0]


def command(house: Path, processes: int) -> tuple[list[str], dict[str, str]]:
    machine = {"device": "cpu", "precision": "float32", "threads": 1, "workers": 1, "checkpoint_minutes": 1e-9}
    shelves = {"models": {"it": MODEL}, "views": {"it": {}}, "trainings": {"it": TRAINING}}
    section = {"init": "scratch", "model": "it", "view": "it", "training": "it"}
    tree = {"seed": 1, "machine": {**machine, "processes": processes}, **shelves, "teach": {"it": section}}
    (house / "params.yaml").write_text(json.dumps(tree))
    inputs = ["--train", "data/prepare/train", "--holdout", "data/prepare/holdout", "--init", "data/scratch"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WINNOW_TRACKING": "off"}
    return [sys.executable, "-m", "pipeline.stages.teach", "it", *inputs, "--out", "data/teach/it"], environment


@pytest.mark.whole
@pytest.mark.timeout(1500)  # four starts of Python with torch, on a busy machine
def test_a_stage_whose_process_was_killed_goes_on_with_one(tmp_path: Path) -> None:
    """The group under torchrun ends by itself, and leaves a checkpoint that a single process takes up."""
    prepared(tmp_path, {"ant": 10, "bee": 10}, pool=2, holdout=0.2)
    (tmp_path / "data/scratch").touch()
    args, environment = command(tmp_path, 2)
    with (tmp_path / "said").open("w") as said:
        launcher = subprocess.Popen(args, env=environment, cwd=tmp_path, stderr=said)
    try:
        assert waited(lambda: any(tmp_path.glob(".scratch/teach.it/*/checkpoint/done.json")) or launcher.poll() is not None, 500)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        assert len(children) == 2, (tmp_path / "said").read_text()
        os.kill(int(children[1]), signal.SIGKILL)
        assert launcher.wait(timeout=200) == 1
    finally:
        launcher.kill()
        launcher.wait()
    assert all(is_gone(int(pid)) for pid in children)
    assert not (tmp_path / "data/teach/it").exists()
    (checkpoint,) = tmp_path.glob(".scratch/teach.it/*/checkpoint")
    begun = json.loads((checkpoint / "done.json").read_text())
    assert 0 < begun["step"] < TRAINING["steps"]
    args, environment = command(tmp_path, 1)
    done = subprocess.run(args, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done in") == 1
    artifact.verify(tmp_path / "data/teach/it")
    history = json.loads((tmp_path / "data/teach/it/history.json").read_text())
    assert [row["step"] for row in history["train"]] == list(range(6, 61, 6))
    assert history["train"][: len(begun["history"]["train"])] == begun["history"]["train"]
    assert not (tmp_path / ".scratch" / "teach.it").exists()


WAITS = """
import os, pathlib, time
from pipeline.harness import parent
parent.end_with_starter()
pathlib.Path(f"waits-{os.getpid()}").touch()
time.sleep(100)
"""


@pytest.mark.whole
def test_the_group_ends_with_its_launcher(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    begin = [sys.executable, "-c", "from pipeline.harness import ranks; ranks.launch(2, 'waits', [])"]
    launcher = subprocess.Popen(begin, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        assert waited(lambda: len(list(tmp_path.glob("waits-*"))) == 2 or launcher.poll() is not None, 200)
    finally:
        launcher.kill()
        launcher.wait()
    children = [int(note.name.removeprefix("waits-")) for note in tmp_path.glob("waits-*")]
    assert len(children) == 2
    assert waited(lambda: all(map(is_gone, children)), 20)


@pytest.mark.parametrize(
    ("processes", "batch", "pieces"), [(1, 10, 2), (3, 10, 2), (4, 256, 1), (3, 256, 1), (5, 10, 1), (2, 18, 3)]
)
def test_shares_are_all_of_a_batch_and_keep_its_pairs(
    monkeypatch: pytest.MonkeyPatch, processes: int, batch: int, pieces: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    dealt = []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        dealt.append(group.shares(batch, pieces))
    for shares in zip(*dealt, strict=True):
        images = [np.arange(share.first, share.last) for share in shares]
        assert np.concatenate(images).tolist() == list(range(batch // pieces))
        assert sum(share.weight for share in shares) == pytest.approx(processes)
        sizes = [len(own) for own in images]
        assert min(sizes) > 0
        assert max(sizes) - min(sizes) <= 2
        if batch // pieces >= 2 * processes:
            assert all((share.start + share.first) % 2 == 0 for share in shares[1:])


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert ranks.size() == 3
    with pytest.raises(UserError, match=r"3 processes cannot share pieces .* of 2 images. Set `machine.processes` to 2"):
        group.shares(8, 4)


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
