"""Trainings by groups of processes that are forked from one: torch is imported once, which costs more than all they do here.

python -m tests.learning.forked FOLDER
"""

import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # DistributedDataParallel imports it, in every child
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.harness import ranks, stage
from pipeline.harness.job import Job
from pipeline.harness.journal import Journal
from pipeline.harness.machine import Machine
from pipeline.learning import contrastive, views
from pipeline.learning.loop import fit, group, optimisers
from pipeline.learning.losses import SoftLoss
from pipeline.models import architectures, inputs
from pipeline.models.device import Device

IMAGES, BATCH, STEPS, SEED = 23, 10, 8, 3  # 3.5 passes, each step measured
CHANGES = ((2, 2), (1, 3), (4, 6), (3, STEPS))
"""Processes, and the step at which one of them is killed; the last group comes to the end."""
Seen = Callable[[views.Batch], None]
Training = Callable[[Path, Seen], Sequence[float]]
CPU = Device(torch.device("cpu"), torch.float32)
INPUT = inputs.Input(size=8)
LABELS = torch.arange(IMAGES) % 3


class DropPath(nn.Module):
    """Stochastic depth, as timm draws it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(0.8) if self.training else x


def network(*end: nn.Module) -> nn.Sequential:
    layers = [nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *end)


def labels(folder: Path, seen: Seen) -> Sequence[float]:
    """Dropout, views mixed with their neighbours, an average of the weights, pieces of five images."""

    def loss(model: nn.Module, batch: views.Batch) -> Tensor:
        seen(batch)
        return F.cross_entropy(model(inputs.normalise(batch.views, INPUT)), LABELS[batch.rows])

    training = optimisers.Training(steps=STEPS, batch=BATCH, lr=0.02, ema=0.9, clip=1.0, accumulate=2)
    viewer = views.viewer(8, views.View(pad=2, brightness=0.2), SEED, mix=views.Mix(mixup=0.5, cutmix=1.0))
    return fitted(network(nn.Dropout(0.3), DropPath(), nn.Linear(6, 3)), loss, viewer, training, folder)


def contrast(folder: Path, seen: Seen) -> Sequence[float]:
    """Each view among those of the whole piece, and of a memory."""
    encoder = network()
    encoder.num_features = 6  # type: ignore[assignment]
    model = contrastive.Contrastive(architectures.Projected(encoder, 2, 8), contrastive.Memory(size=16, ema=0.9), 2)

    def loss(model: nn.Module, batch: views.Batch) -> Tensor:
        seen(batch)
        projected, memory = model(inputs.normalise(batch.views.transpose(0, 1).flatten(0, 1), INPUT))
        return contrastive.nt_xent(projected, 0.5, memory)

    training = optimisers.Training(steps=STEPS, batch=BATCH, lr=0.02, accumulate=2)
    return fitted(model, loss, contrastive.two_views(8, contrastive.TwoViews(), SEED, np.ones(IMAGES)), training, folder)


def distilled(folder: Path, seen: Seen) -> Sequence[float]:
    """A loss over the classes of a whole batch, and a teacher that normalises with the statistics of it."""
    teacher = network(nn.Linear(6, 3)).eval().requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    if ranks.size() > 1:
        group.synchronise(teacher)

    def loss(model: nn.Module, batch: views.Batch) -> Tensor:
        seen(batch)
        x = inputs.normalise(batch.views, INPUT)
        return SoftLoss(name="dist")(model(x), teacher(x))

    viewer = views.viewer(8, views.View(pad=1), SEED)
    return fitted(network(nn.Linear(6, 3)), loss, viewer, optimisers.Training(steps=STEPS, batch=BATCH, lr=0.02), folder)


def fitted(model: nn.Module, loss: fit.Loss, viewer: views.Views, training: optimisers.Training, folder: Path) -> Sequence[float]:
    pixels = inputs.InMemory(np.random.default_rng(0).integers(0, 256, (IMAGES, 10, 10, 3), dtype=np.uint8))
    often = Machine(checkpoint_minutes=1e-9)  # after every step
    job = Job(SEED, folder / "work", Journal(), often)
    trained = fit.fit(model, loss, pixels, viewer, training, lambda _: {}, job=job, device=CPU, label="training")
    return [row["loss"] for row in trained.history["train"]]


def disagree(folder: Path, seen: Seen) -> Sequence[float]:
    """Processes that would go on from different steps: 1 where they notice."""
    same, other = (group.agreed(step, CPU.device) for step in (7, 7 * ranks.rank()))
    return [float(same and not other)]


TRIED: dict[Training, Sequence[tuple[int, int]]] = {
    labels: CHANGES,
    contrast: ((3, STEPS),),
    distilled: ((3, STEPS),),
    disagree: ((2, STEPS),),
}


PIECES: dict[Training, int] = {labels: 2, contrast: 2, distilled: 1, disagree: 1}


class Witness:
    """Notes the images of each step of this process, and kills it where it is to be killed."""

    def __init__(self, file: Path, step: int, pieces: int, killed_at: int) -> None:
        self.file, self.step, self.pieces, self.killed_at = file, step, pieces, killed_at
        self.piece = 0

    def __call__(self, batch: views.Batch) -> None:
        if self.step == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with self.file.open("a") as file:
            file.write(json.dumps([self.step, batch.rows.tolist(), batch.passes.tolist()]) + "\n")
        self.piece += 1
        self.step += self.piece % self.pieces == 0


def together(training: Training, folder: Path, processes: int, first: int, last: int) -> float:
    """Steps `first` to `last` - 1 by so many processes, then one is killed: how many seconds later the others have ended."""
    ranks_of = {_forked(training, folder, processes, rank, first, last): rank for rank in range(processes)}
    ended = []
    for _ in range(processes):
        child, status = os.wait()
        ended.append(time.monotonic())
        is_killed = last < STEPS and ranks_of[child] == processes - 1
        expected = -signal.SIGKILL if is_killed else 0 if last == STEPS else stage.TRY_AGAIN
        if os.waitstatus_to_exitcode(status) != expected:
            sys.exit(f"{training.__name__}, step {first}: process {ranks_of[child]} of {processes} ended with {status}")
    return ended[-1] - ended[0]


def _forked(training: Training, folder: Path, processes: int, rank: int, first: int, last: int) -> int:
    if child := os.fork():
        return child
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes)}
    killed_at = last if rank == processes - 1 else STEPS
    witness = Witness(folder / f"seen-{first}-{rank}", first, PIECES[training], killed_at)
    torch.manual_seed(0)
    code = 1
    try:
        if processes > 1:
            dist.init_process_group("gloo", f"file://{folder}/meet-{first}", rank=rank, world_size=processes)
        losses = training(folder, witness)
        if rank == 0:
            (folder / "losses.json").write_text(json.dumps(losses))
        code = 0
    except BrokenExecutor:
        code = stage.TRY_AGAIN
    except Exception:
        traceback.print_exc()
    os._exit(code)


def main(out: Path) -> None:
    """Each training by one process, and by groups that take over from each other; `found.json` has what they saw."""
    found = {}
    gc.freeze()  # or the collector would touch, and so copy, every page of the parent in each child
    for training, changes in TRIED.items():
        for name, groups in (("whole", ((1, STEPS),)), ("changing", changes)):
            folder = out / f"{training.__name__}-{name}"
            folder.mkdir()
            firsts = [0, *(last for _, last in groups[:-1])]
            seconds = [together(training, folder, n, first, last) for first, (n, last) in zip(firsts, groups, strict=True)]
            seen = [
                noted
                for first, (_, last) in zip(firsts, groups, strict=True)
                for file in folder.glob(f"seen-{first}-*")
                for noted in map(json.loads, file.read_text().splitlines())
                if noted[0] < last  # the others began the step at which one was killed
            ]
            losses = json.loads((folder / "losses.json").read_text())
            found[folder.name] = {"losses": losses, "seen": seen, "seconds": seconds}
    (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
