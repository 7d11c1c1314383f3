"""The one training loop."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pipeline.harness import progress, ranks
from pipeline.harness.job import Job
from pipeline.learning import views
from pipeline.learning.loop import group
from pipeline.learning.loop.optimisers import Training, TrainingError, build_optimizer, freeze, warmed_up
from pipeline.learning.loop.state import State
from pipeline.learning.loop.trained import Trained
from pipeline.learning.views import Batch
from pipeline.models import inputs
from pipeline.models.device import Device

CHECKS = 10  # measurements on the held-out images in a run
NAN_STEPS = 20  # a look at the loss makes a GPU wait: not at every step


Check = Callable[[nn.Module], Mapping[str, float]]
"""A model -> what it does on the held-out images, by name."""
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
    check: Check,
    *,
    job: Job,
    device: Device,
    label: str,
) -> Trained:
    """Train `model` in place; returns it (or its moving average) with the history of losses and held-out checks.

    `views` makes of canvases what `loss` takes. `check` measures the model ten times in a run. `label` stands before the
    progress. A killed run goes on from its last checkpoint in `job.workdir` and ends with the same bits as an undisturbed one;
    whatever must survive for that is a parameter or a buffer of `model`. In a group of processes each takes its share of every
    batch; all return the same model, and a group of another size can go on. Raises TrainingError when the loss is no longer
    finite, keeping the last good state.
    """
    if training.batch % training.accumulate:
        raise TrainingError(
            f"`training.accumulate` is {training.accumulate}, which does not divide the {training.batch} images of a batch."
        )
    shares = group.shares(training.batch, training.accumulate)
    own = np.concatenate([np.arange(share.start + share.first, share.start + share.last) for share in shares])
    viewed = np.union1d(own, np.minimum(own ^ 1, training.batch - 1))  # with the neighbours that views are mixed with
    group.join(device.device)
    model = device.place(model).train()
    frozen, still = freeze(model, training.frozen)
    called = group.wrapped(model, device.device)
    optimizer = build_optimizer(model, training)
    average = AveragedModel(model, multi_avg_fn=warmed_up(training.ema), use_buffers=True) if training.ema else None
    result = model if average is None else average.module
    state = State(job.workdir / "checkpoint", model, optimizer, average)
    done = state.resume()
    if not group.agreed(done.step, device.device):
        raise TrainingError(
            f"the processes would go on from different steps, this one from {done.step}: those on other machines do not see "
            f"the checkpoint in {job.workdir}. Put that folder on a shared disk, copy it to each machine, or delete it on all."
        )
    order = Order(len(pixels), training.batch, job.seed)
    if device.compile:
        called = torch.compile(called)  # type: ignore[assignment]
    every = math.ceil(training.steps / CHECKS)
    steps = range(done.step, training.steps)
    saved = time.monotonic()
    with progress.bar(training.steps, "steps", label, done=done.step) as shown, group.unbroken():
        for step, raw in zip(steps, inputs.ahead(lambda s: pixels.gather(order.at(s)[0][viewed]), steps), strict=True):
            _seed_dropout(job.seed, step)
            for name in still:
                model.get_submodule(name).eval()  # `check` puts the whole model back into training mode
            for parameters in optimizer.param_groups:
                parameters["lr"] = training.rate(step) * parameters["multiple"]
            rows, passes = order.at(step)
            optimizer.zero_grad(set_to_none=True)
            made = views(device.batch(raw), rows[viewed], passes[viewed])
            if len(viewed) > len(own):
                made = made[np.isin(viewed, own)]
            value = _backward(called, loss, Batch(made, rows[own], passes[own]), shares, device)
            if training.clip:
                nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            optimizer.step()
            if average is not None:
                average.update_parameters(model)
            done.losses.append(value)
            done.step = step + 1
            is_due = time.monotonic() - saved > 60 * job.machine.checkpoint_minutes
            save = is_due and done.step < training.steps and ranks.is_first()
            note = done.step % every == 0 or done.step == training.steps
            if save or note or done.step % NAN_STEPS == 0:
                done.refuse_nan(training)
            if note:
                figures = done.note(training.rate(step), check(result))
                job.journal.log(done.step, **figures)
                shown.update(0, **figures)
            if save:
                state.save(done)
                saved = time.monotonic()
            shown.update(1)
    for name in frozen:
        result.get_parameter(name).requires_grad_()
    measured = {name: value for name, value in done.history["holdout"][-1].items() if name != "step"}
    return Trained(result, done.history, measured, training.steps, training.batch)


def as_it_comes(model: nn.Module, check: Check) -> Trained:
    """A model without any training, measured once."""
    return Trained(model, {"train": [], "holdout": []}, check(model))


def _backward(called: nn.Module, loss: Loss, batch: Batch, shares: Sequence[group.Share], device: Device) -> Tensor:
    """Leave the gradient of the batch's mean loss in the parameters; returns that loss, of all processes.

    `batch`: this process's `shares` of its pieces, one after the other.
    """
    total = torch.zeros((), device=device.device)
    views_of_each = batch.views.shape[1] if batch.views.ndim == 5 else 1
    end = 0
    for i, share in enumerate(shares):
        start, end = end, end + share.last - share.first
        piece = Batch(batch.views[start:end], batch.rows[start:end], batch.passes[start:end])
        waits = hasattr(called, "no_sync") and i < len(shares) - 1  # processes exchange gradients once
        with called.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            with device.autocast(), group.at_work(share, views_of_each):
                value = loss(called, piece) / len(shares) * share.weight
            value.backward()
        total += value.detach()
    return group.mean(total)


def _seed_dropout(seed: int, step: int) -> None:
    """Dropout draws from torch's own generators, the same numbers in all processes; views have draws of their own."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, 0)).generate_state(1, np.uint64)[0]))
