"""The one training loop."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.harness import progress, ranks
from pipeline.learning import views
from pipeline.learning.loop import group
from pipeline.learning.loop.optimisers import Training, TrainingError, build_optimizer
from pipeline.learning.loop.state import State
from pipeline.learning.views import Batch
from pipeline.models import inputs
from pipeline.models.device import Device

CHECKS = 10  # measurements on the held-out images in a run
NAN_STEPS = 20  # a look at the loss makes a GPU wait: not at every step


class Log(Protocol):
    def log(self, step: int | None = None, **values: float) -> None: ...


Loss = Callable[[nn.Module, Batch], Tensor]
"""The model as it is to be called, which may be wrapped, and a batch -> the mean over the batch."""


class Order:
    """Which images a step sees: consecutive pieces of one shuffled pass after another over `n` images."""

    def __init__(self, n: int, batch: int, seed: int) -> None:
        self.n, self.batch, self.seed = n, batch, seed
        self.shuffled: dict[int, np.ndarray] = {}

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(batch,) row numbers and (batch,) passes; the same for the same (seed, step)."""
        passes, within = np.divmod(np.arange(step * self.batch, (step + 1) * self.batch), self.n)
        return np.concatenate([self._pass(p)[within[passes == p]] for p in np.unique(passes)]), passes

    def _pass(self, number: int) -> np.ndarray:
        if number not in self.shuffled:
            self.shuffled = {p: rows for p, rows in self.shuffled.items() if p >= number - 2}
            self.shuffled[number] = np.random.default_rng((self.seed, number)).permutation(self.n)
        return self.shuffled[number]


def fit(
    model: nn.Module,
    loss: Loss,
    pixels: inputs.Pixels,
    views: views.Views,
    training: Training,
    *,
    seed: int,
    device: Device,
    scratch: Path,
    journal: Log,
    label: str,
    check: Callable[[nn.Module], Mapping[str, float]],
    checkpoint_minutes: float = 5.0,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train `model` in place; returns it (or its moving average) and the history of losses and held-out checks.

    `views` makes of canvases what `loss` takes. `check` measures the model on the held-out images, ten times in a run. A killed
    run goes on from its last checkpoint in `scratch` and ends with the same bits as an undisturbed one; whatever must survive
    for that is a parameter or a buffer of `model`. In a group of processes each takes its part of every batch; all return the
    same model. Raises TrainingError when the loss is no longer finite, keeping the last good state.
    """
    own = group.part(training.batch)
    if (own.stop - own.start) % training.accumulate:
        raise TrainingError(
            f"`training.accumulate` is {training.accumulate}, which does not divide the {own.stop - own.start} images of a batch."
        )
    group.join(device.device)
    model = device.place(model).train()
    called = group.wrapped(model, device.device)
    optimizer = build_optimizer(model, training)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(training.ema), use_buffers=True) if training.ema else None
    result = model if average is None else average.module
    state = State(scratch / "checkpoint", model, optimizer, average)
    done = state.resume()
    if not group.agreed(done.step, device.device):
        raise TrainingError(
            f"the processes would go on from different steps, this one from {done.step}: those on other machines do not see "
            f"the checkpoint in {scratch}. Put that folder on a shared disk, copy it to each machine, or delete it everywhere."
        )
    order = Order(len(pixels), training.batch, seed)
    if device.compile:
        called = torch.compile(called)  # type: ignore[assignment]
    every = math.ceil(training.steps / CHECKS)
    steps = range(done.step, training.steps)
    saved = time.monotonic()
    with progress.bar(training.steps, "steps", label, done=done.step) as shown:
        for step, raw in zip(steps, inputs.ahead(lambda s: pixels.gather(order.at(s)[0][own]), steps), strict=True):
            _seed_dropout(seed, step)
            for parameters in optimizer.param_groups:
                parameters["lr"] = training.rate(step) * parameters["multiple"]
            rows, passes = (of_all[own] for of_all in order.at(step))
            optimizer.zero_grad(set_to_none=True)
            batch = Batch(views(device.batch(raw), rows, passes), rows, passes)
            value = _backward(called, loss, batch, training.accumulate, device)
            if training.clip:
                nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            optimizer.step()
            if average is not None:
                average.update_parameters(model)
            done.losses.append(value)
            done.step = step + 1
            save = time.monotonic() - saved > 60 * checkpoint_minutes and done.step < training.steps and ranks.rank() == 0
            note = done.step % every == 0 or done.step == training.steps
            if save or note or done.step % NAN_STEPS == 0:
                done.refuse_nan(training)
            if note:
                figures = done.note(training.rate(step), check(result))
                journal.log(done.step, **figures)
                shown.update(0, **figures)
            if save:
                state.save(done)
                saved = time.monotonic()
            shown.update(1)
    return result, done.history


def final(history: Mapping[str, Any]) -> dict[str, float]:
    """What `check` said of the result, as a stage's metrics: `holdout_top1`, ..."""
    return {f"holdout_{name}": value for name, value in history["holdout"][-1].items() if name != "step"}


def _backward(called: nn.Module, loss: Loss, batch: Batch, pieces: int, device: Device) -> Tensor:
    """Leave the gradient of the batch's mean loss in the parameters; returns that loss, of all processes."""
    total = torch.zeros((), device=device.device)
    parts = [np.array_split(of_all, pieces) for of_all in (batch.rows, batch.passes)]
    for i, piece in enumerate(batch.views.chunk(pieces)):
        waits = hasattr(called, "no_sync") and i < pieces - 1  # processes exchange gradients once
        with called.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            with device.autocast():
                value = loss(called, Batch(piece, parts[0][i], parts[1][i])) / pieces
            value.backward()
        total += value.detach()
    return group.mean(total)


def _seed_dropout(seed: int, step: int) -> None:
    """Dropout draws from torch's own generators; views have draws of their own."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, ranks.rank())).generate_state(1, np.uint64)[0]))
