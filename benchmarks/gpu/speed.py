"""The pieces `scoring` and `training`: what the pipeline adds to the bare compiled step of the same network."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu import synthetic
from benchmarks.gpu.setting import Row, Rows, Setting, median, spread, translated
from pipeline.harness.job import Job
from pipeline.harness.journal import Journal
from pipeline.harness.machine import Machine
from pipeline.learning import views
from pipeline.learning.loop import fit, optimisers
from pipeline.models import architectures, inputs, prediction

OURS, COMPILED, READING, EAGER, BARE = "ours", "ours, compiled", "reading alone", "bare, eager", "bare, compiled"
CLASSES = 1000


class Work(NamedTuple):
    """A network and the work that one round gives it."""

    arch: str
    input: inputs.Input
    photographs: int
    size: tuple[int, int]  # of a photograph: width, height
    batches: int  # of prediction.BATCH images, a round of scoring
    batch: int  # of training
    steps: int  # a round of training
    options: dict[str, Any]


PHOTOGRAPHS = {"input": inputs.Input(size=224, crop=0.875), "photographs": 2048, "size": (500, 375), "options": {}}
FULL = [
    Work("resnet50", batches=64, batch=256, steps=20, **PHOTOGRAPHS),  # type: ignore[arg-type]
    Work("resnet50d", batches=64, batch=256, steps=20, **PHOTOGRAPHS),  # type: ignore[arg-type]
    Work("airbench", inputs.Input(size=32), 16384, (32, 32), 256, 1024, 60, {}),
    Work("resnext101_32x16d", batches=16, batch=128, steps=10, **PHOTOGRAPHS),  # type: ignore[arg-type]
]
TINY = [
    Work("resnet8", inputs.Input(size=32, crop=0.875), 40, (60, 48), 1, 8, 1, {"stem_stride": 2}),
    Work("airbench", inputs.Input(size=32), 40, (32, 32), 1, 8, 1, {"widths": [8, 8, 8]}),
]


def scoring(setting: Setting) -> Rows:
    return {work.arch: partial(_scoring, work, setting) for work in (TINY if setting.tiny else FULL)}


def training(setting: Setting) -> Rows:
    return {work.arch: partial(_training, work, setting) for work in (TINY if setting.tiny else FULL)}


def _scoring(work: Work, setting: Setting, folder: Path) -> Row:
    """`prediction.logits`, as the stage `score` calls it, on packed JPEG files; the bare forward on a batch that lies ready."""
    on, side = setting.on, work.input.side
    images = _photographs(work, folder)
    pixels = inputs.OnDisk(images, side, Machine().cores(0))
    rows = np.resize(np.arange(len(images)), work.batches * prediction.BATCH)
    torch.manual_seed(0)
    model = on.place(prediction.folded(architectures.create(work.arch, CLASSES, work.options)))
    ready = _ready(setting, prediction.BATCH, work.input.size)

    @torch.inference_mode()
    def forward(model: nn.Module) -> None:
        with on.autocast():
            model(ready)

    compiled, how = translated(model, setting, forward)

    def bare(model: nn.Module) -> Callable[[], None]:
        def repeated() -> None:
            for _ in range(work.batches):
                forward(model)

        return repeated

    def score(model: nn.Module) -> Callable[[], None]:
        def all_of_them() -> None:
            for _ in prediction.logits(model, pixels, work.input, on, rows):
                pass

        return all_of_them

    def read() -> None:
        for _ in inputs.ahead(lambda i: pixels.gather(rows[i : i + prediction.BATCH]), range(0, len(rows), prediction.BATCH)):
            pass

    turns = {OURS: score(model), COMPILED: score(compiled), READING: read, EAGER: bare(model), BARE: bare(compiled)}
    rounds = 2 if setting.tiny else 6
    times = [{name: setting.clock(do) for name, do in turns.items()} for _ in range(rounds)][1:]
    rates = {f"{name}, images/s": len(rows) / median([t[name] for t in times]) for name in turns}
    shares = {name: [t[BARE] / t[name] for t in times] for name in (OURS, COMPILED)}
    return {
        **_named(work, how, rounds - 1),
        "images a round": len(rows),
        "KB an image": round(float(np.mean(images.table["size"].to_numpy())) / 1000, 1),
        **rates,
        "ours / bare, compiled, %": median(shares[OURS]),
        "range": spread(shares[OURS]),
        "ours, compiled / bare, compiled, %": median(shares[COMPILED]),
        "range, compiled": spread(shares[COMPILED]),
    }


def _training(work: Work, setting: Setting, folder: Path) -> Row:
    """`fit.fit` with its reader, views, schedule and checks; in its turns the bare step on a batch that lies ready."""
    on, view = setting.on, views.View(kind="crop") if work.input.size > 32 else views.View()
    images = _photographs(work, folder)
    canvas = work.input.canvas_of(view.whole)
    pixels = inputs.load(images, canvas, Machine(memory_gb=1e-6 if view.whole else 4), work.arch, view.whole)
    labels = torch.randint(0, CLASSES, (len(images),), generator=torch.Generator().manual_seed(0)).to(on.device)
    torch.manual_seed(0)
    model, ours = (on.place(architectures.create(work.arch, CLASSES, work.options)).train() for _ in range(2))
    rounds = 1 if setting.tiny else 5
    plan = optimisers.Training(steps=1, batch=work.batch, lr=0.01)
    optimizer = optimisers.build_optimizer(model, plan)
    ready, wanted = _ready(setting, work.batch, work.input.size), torch.arange(work.batch, device=on.device) % CLASSES

    def step(model: nn.Module) -> None:
        optimizer.zero_grad(set_to_none=True)
        with on.autocast():
            loss = F.cross_entropy(model(ready).float(), wanted)
        loss.backward()
        optimizer.step()

    compiled, how = translated(model, setting, step)

    def repeated(steps: int) -> None:
        for _ in range(steps):
            step(compiled)

    turns = Turns(setting, work.steps, rounds, lambda: repeated(work.steps))

    def loss(model: nn.Module, batch: views.Batch) -> Tensor:
        y = labels[torch.from_numpy(batch.rows).to(on.device)]
        return F.cross_entropy(model(inputs.normalise(batch.views, work.input)).float(), y)

    viewer = views.viewer(work.input.size, view, 0, inputs.aspects(images))

    def viewed(raw: Tensor, rows: np.ndarray, passes: np.ndarray) -> Tensor:
        turns.next()  # not in `loss`, where autocast would keep the bare step's weights in its cache
        return viewer(raw, rows, passes)

    fit.fit(
        *(ours, loss, pixels, viewed),
        *(plan.model_copy(update={"steps": turns.steps}), lambda _: {}),
        job=Job(0, _emptied(folder / "checkpoints"), Journal(), Machine()),
        device=replace(on, compile=how == "torch.compile"),
        label=work.arch,
    )
    shares = [b / a for a, b in zip(turns.ours, turns.bare, strict=True)]
    done = work.batch * work.steps
    return {
        **_named(work, how, rounds),
        "batch": work.batch,
        "steps a round": work.steps,
        "ours, images/s": done / median(turns.ours),
        "bare, images/s": done / median(turns.bare),
        "ours / bare, %": median(shares),
        "range": spread(shares),
        "peak memory, GB": setting.peak_gb(),
    }


class Turns:
    """The clock inside of a training: every `counted` steps the bare step gets its turn, on the same device.

    While it has it, the reader runs ahead, so the first steps after it (`SETTLE`) do not count; nor do the first of all.
    """

    SETTLE, WARM = 4, 8

    def __init__(self, setting: Setting, counted: int, rounds: int, bare: Callable[[], object]) -> None:
        self.setting, self.counted, self.run = setting, counted, bare
        self.round = self.SETTLE + counted
        self.steps = self.WARM + rounds * self.round + 1
        self.step, self.start = 0, 0.0
        self.ours: list[float] = []
        self.bare: list[float] = []

    def next(self) -> None:
        """For the beginning of each step."""
        done, within = divmod(self.step - self.WARM, self.round)
        self.step += 1
        if done >= 0 and within == self.SETTLE:
            self.setting.wait()
            self.start = time.perf_counter()
        elif done >= 0 and within == 0:
            self.setting.wait()
            if done:
                self.ours.append(time.perf_counter() - self.start)
                self.bare.append(self.setting.clock(self.run))


def _photographs(work: Work, folder: Path) -> Any:
    return synthetic.packed(_emptied(folder / "photographs"), work.photographs, work.size, work.input.side)


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _ready(setting: Setting, batch: int, size: int) -> Tensor:
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return setting.on.batch(images.to(memory_format=torch.channels_last))


def _named(work: Work, how: str, rounds: int) -> Row:
    return {"network": work.arch, "px": work.input.size, "compiled by": how, "rounds": rounds}
