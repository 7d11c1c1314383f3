"""The pieces `processes` and `resume`: several processes train what one trains; a killed training ends as an undisturbed one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import safetensors.torch
import torch

from benchmarks.gpu import learning
from benchmarks.gpu.setting import Row, Rows, Setting
from benchmarks.gpu.worker import HISTORY, WEIGHTS, Order
from benchmarks.seeds import ROOT
from pipeline.store import artifact

SECONDS = 150.0  # a process that takes longer hangs
ALONE = [sys.executable, "-m", "benchmarks.gpu.worker"]
TOLERANCE = 1e-3  # of a loss, between one process and several; in float32, where only the order of sums differs


def processes(setting: Setting) -> Rows:
    cuda = setting.on.device.type == "cuda"
    rows = {"one-in-a-group": partial(_processes, setting, 1, "nccl" if cuda else "gloo", setting.asked)}
    rows["two-on-one-device"] = partial(_processes, setting, 2, "gloo", f"cuda:{setting.on.device.index or 0}" if cuda else "cpu")
    if torch.cuda.device_count() >= 2 and cuda:
        rows["two-devices"] = partial(_processes, setting, 2, "", "cuda")
    return rows


def _processes(setting: Setting, count: int, group: str, device: str, folder: Path) -> Row:
    """Twenty steps in float32 by one process, and by a group."""
    steps, batch, images = (4, 16, 64) if setting.tiny else (20, 512, 8192)
    plain = _order(setting, folder, "alone", steps, batch, images, "float32")
    shared = replace(plain, out=str(folder / "group"), workdir=str(folder / "group-checkpoints"), device=device, group=group)
    _emptied(folder)
    _run(ALONE, plain, folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    _run([*torchrun, "-m", "benchmarks.gpu.worker"], shared, folder)
    alone, together = (_losses(Path(order.out)) for order in (plain, shared))
    gap = max(abs(a - b) for a, b in zip(alone, together, strict=True))
    return {
        "processes": count,
        "over": group or "nccl",
        "device": device,
        "network": _network(setting),
        "steps": steps,
        "batch": batch,
        "largest difference of a loss": gap,
        "largest difference of a weight": _gap(Path(plain.out), Path(shared.out)),
        "same loss": "yes" if gap <= TOLERANCE else "NO",
    }


def resume(setting: Setting) -> Rows:
    precisions = ("float32",) if setting.tiny else ("bfloat16", "float32")
    return {precision: partial(_resume, setting, precision) for precision in precisions}


def _resume(setting: Setting, precision: str, folder: Path) -> Row:
    """A training killed by SIGKILL in its middle and started again, beside one that nothing disturbed.

    Where they differ, another undisturbed one says whether the device's kernels ever give the same bits.
    """
    steps, batch, images = (60, 16, 128) if setting.tiny else (600, 512, 16384)
    _emptied(folder)
    plain, killed, again = (
        _order(setting, folder, name, steps, batch, images, precision) for name in ("plain", "killed", "again")
    )
    often = 0.0005 if setting.tiny else 0.03  # minutes
    at = _killed_at(ALONE, replace(killed, checkpoint_minutes=often), folder)
    for order in (killed, plain):
        _run(ALONE, order, folder)
    row = {"network": _network(setting), "precision": precision, "steps": steps, "killed after the checkpoint of step": at}
    gap = _gap(Path(plain.out), Path(killed.out))
    row["largest difference of a weight"] = gap
    if gap == 0:
        return row | {"resumed": "the same bits"}
    _run(ALONE, again, folder)
    undisturbed = _gap(Path(plain.out), Path(again.out))
    if undisturbed == 0:
        verdict = "DIFFERENT, though two undisturbed trainings are the same"
    else:
        verdict = "different, as two undisturbed trainings are: the device's kernels add in no fixed order"
    return row | {"of two undisturbed": undisturbed, "resumed": verdict}


def _order(setting: Setting, folder: Path, name: str, steps: int, batch: int, images: int, precision: str) -> Order:
    return Order(
        out=str(folder / name),
        workdir=str(folder / f"{name}-checkpoints"),
        device=setting.asked,
        precision=precision,
        network=1,
        tiny=setting.tiny,
        steps=steps,
        batch=batch,
        images=images,
        checkpoint_minutes=60,
    )


def _network(setting: Setting) -> str:
    return (learning.TINY if setting.tiny else learning.NETWORKS)[1].arch


def _run(command: list[str], order: Order, folder: Path) -> None:
    """Raises RuntimeError with the process's last lines if it fails, TimeoutExpired if it hangs."""
    file = order.write(folder / f"{Path(order.out).name}.order.json")
    done = subprocess.run([*command, str(file)], env=_environment(), cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def _killed_at(command: list[str], order: Order, folder: Path) -> int:
    """Start a training, kill it after a checkpoint past a third of it; returns the step of the last one that it wrote.

    Raises RuntimeError if it ended before.
    """
    file, log = order.write(folder / "killed.order.json"), folder / "killed.log"
    with log.open("w") as to:
        process = subprocess.Popen([*command, str(file)], env=_environment(), cwd=ROOT, stdout=to, stderr=to)
        end = time.monotonic() + SECONDS
        try:
            while _kept_step(order) < order.steps // 3 and process.poll() is None and time.monotonic() < end:
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    if Path(order.out).exists() or not _kept_step(order):
        raise RuntimeError(f"the training ended, or hung, before it could be killed:\n{log.read_text()[-3000:]}")
    artifact.verify(Path(order.workdir) / "checkpoint")
    return _kept_step(order)


def _kept_step(order: Order) -> int:
    """The step of the checkpoint; 0 where there is none."""
    try:
        return int(json.loads((Path(order.workdir) / "checkpoint" / "done.json").read_text())["step"])
    except FileNotFoundError:
        return 0


def _environment() -> dict[str, str]:
    quiet = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**quiet, **os.environ, "PYTHONPATH": path}


def _losses(folder: Path) -> list[float]:
    return [row["loss"] for row in json.loads((folder / HISTORY).read_text())["train"]]


def _gap(one: Path, other: Path) -> float:
    """The largest difference of a number in the weights; 0 where every bit is the same."""
    a, b = (safetensors.torch.load_file(folder / WEIGHTS) for folder in (one, other))
    if a.keys() != b.keys():
        raise RuntimeError(f"{one} and {other} hold other tensors")
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
