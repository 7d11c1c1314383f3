"""The one training loop: resumable to the bit, because data, views and dropout are functions of (seed, step)."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import safetensors.torch
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline import artifact, group, images, progress
from pipeline.device import Device
from pipeline.errors import UserError
from pipeline.params import Section

CHECKS = 10  # measurements on the held-out images in a run
NAN_STEPS = 20  # a look at the loss makes a GPU wait: not at every step


class Training(Section):
    """How long and how fast to learn: `steps` of `batch` images, linear warm-up over a share of the steps, then cosine to zero.

    `weight_decay` leaves biases and normalisation alone. `ema`: decay of a moving average of the weights, which then is the
    result (0: off). `clip`: bound of the gradient's norm (0: off). `smoothing`: label smoothing where labels are read.
    `accumulate`: pass each batch in so many pieces, which take their own batch statistics, to save memory. `rates`: multiples of
    the learning rate by the beginning of parameter names (`{conv1: 0.1, layer1: 0.2}`), the longest that fits: for transfer.

    `lars` (You et al. 2017; momentum without Nesterov's step, trust coefficient 0.001) adapts the rate of each tensor, but not of
    biases and normalisation. `lr_scaling`: `lr` is for 256 images and grows with the batch (linear; SimCLR 0.3), or is
    multiplied by the square root of the batch (sqrt; SimCLR 0.075).
    """

    steps: PositiveInt
    batch: PositiveInt = 256
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"
    lr: PositiveFloat = 0.1
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegativeFloat = 5e-4
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip: NonNegativeFloat = 0.0
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    accumulate: PositiveInt = 1
    rates: dict[str, PositiveFloat] = Field(default_factory=dict)

    def rate(self, step: int) -> float:
        """The learning rate of a step in 0..steps-1."""
        peak = self.lr * {"none": 1.0, "linear": self.batch / 256, "sqrt": math.sqrt(self.batch)}[self.lr_scaling]
        warm = round(self.warmup * self.steps)
        if step < warm:
            return peak * (step + 1) / warm
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


class TrainingError(UserError):
    """Training cannot go on, or cannot be resumed."""


class Log(Protocol):
    def log(self, step: int | None = None, **values: float) -> None: ...


@dataclass(frozen=True)
class Batch:
    """What a loss sees of one step."""

    views: Tensor  # what `views` made of the canvases; mostly (B, 3, size, size) of 0..255 on the device
    rows: np.ndarray  # (B,) row numbers
    passes: np.ndarray  # (B,) how many times each image was seen before


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
    pixels: images.Pixels,
    views: images.Views,
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
    optimizer = _optimizer(model, training)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(training.ema), use_buffers=True) if training.ema else None
    result = model if average is None else average.module
    state = _State(scratch / "checkpoint", model, optimizer, average)
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
        for step, raw in zip(steps, images.ahead(lambda s: pixels.gather(order.at(s)[0][own]), steps), strict=True):
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
            save = time.monotonic() - saved > 60 * checkpoint_minutes and done.step < training.steps and group.rank() == 0
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


@dataclass
class _Done:
    """How far a run has come: what a checkpoint holds beside tensors."""

    step: int = 0
    saved: int = 0
    losses: list[Tensor] = field(default_factory=list)  # since the last check; on the device, so that no step waits for them
    history: dict[str, Any] = field(default_factory=lambda: {"train": [], "holdout": []})

    def refuse_nan(self, training: Training) -> None:
        """Raise TrainingError at the first loss that is not finite: before a checkpoint could keep what it did to the weights."""
        losses = torch.stack(self.losses) if self.losses else torch.zeros(1)
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            step = self.step - len(self.losses) + int(bad[0])
            raise TrainingError(
                f"the loss is {float(losses[bad[0]])} at step {step + 1} of {training.steps} "
                f"(learning rate {training.rate(step):.3g}). "
                "Lower `training.lr`, lengthen `training.warmup` or set `training.clip`. "
                f"The last good state, of step {self.saved}, is kept."
            )

    def note(self, rate: float, measured: Mapping[str, float]) -> dict[str, float]:
        loss = float(torch.stack(self.losses).float().mean())
        self.losses = []
        self.history["train"].append({"step": self.step, "loss": loss, "lr": rate})
        self.history["holdout"].append({"step": self.step, **measured})
        return {"loss": loss, "lr": rate, **{f"holdout_{name}": value for name, value in measured.items()}}


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
    torch.manual_seed(int(np.random.SeedSequence((seed, step, group.rank())).generate_state(1, np.uint64)[0]))


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    unused = set(training.rates)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fitting = [start for start in training.rates if name.startswith(start)]
            unused.difference_update(fitting)
            multiple = training.rates[max(fitting, key=len)] if fitting else 1.0
            groups.setdefault((parameter.ndim > 1, multiple), []).append(parameter)
    if unused:
        raise TrainingError(
            f"`training.rates` names {', '.join(sorted(unused))}, with which no parameter of the model begins. "
            f"They begin with {', '.join(sorted({name.split('.')[0] for name, _ in model.named_parameters()}))}."
        )
    parts: list[dict[str, Any]] = [
        {"params": group, "weight_decay": training.weight_decay if decays else 0.0, "multiple": multiple}
        for (decays, multiple), group in groups.items()
    ]
    if training.optimizer == "sgd":
        return torch.optim.SGD(parts, lr=training.lr, momentum=training.momentum, nesterov=training.momentum > 0)
    if training.optimizer == "lars":
        from timm.optim import Lars  # a second of import time that the others need not pay

        # By default timm's adapts where there is decay: a decay of 0 would make it plain SGD.
        parts = [part | {"always_adapt": decays} for part, (decays, _) in zip(parts, groups, strict=True)]
        return Lars(parts, lr=training.lr, momentum=training.momentum)
    return torch.optim.AdamW(parts, lr=training.lr)


class _State:
    """The resumable state as one artifact: tensors in safetensors, the rest in JSON."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel | None) -> None:
        self.folder, self.optimizer = folder, optimizer
        self.modules = {"model": model} | ({"average": average} if average is not None else {})

    def save(self, done: _Done) -> None:
        done.saved = done.step
        tensors = {f"{kind}.{name}": t for kind, module in self.modules.items() for name, t in module.state_dict().items()}
        for i, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{slot}": t for slot, t in slots.items() if isinstance(t, Tensor)}
        if done.losses:
            tensors["losses"] = torch.stack(done.losses)
        with artifact.writing(self.folder) as tmp:
            whole = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
            safetensors.torch.save_file(whole, tmp / "state.safetensors")
            (tmp / "done.json").write_text(json.dumps({"step": done.step, "history": done.history}))

    def resume(self) -> _Done:
        """Restore the modules and the optimiser in place. Raises ArtifactError for a damaged checkpoint."""
        if not self.folder.exists():
            return _Done()
        artifact.verify(self.folder)
        tensors = safetensors.torch.load_file(self.folder / "state.safetensors")
        for kind, module in self.modules.items():
            module.load_state_dict({n.removeprefix(f"{kind}."): t for n, t in tensors.items() if n.startswith(f"{kind}.")})
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, i, slot = name.split(".")
                slots.setdefault(int(i), {})[slot] = tensor
        # SGD without a step yet has no momentum; load_state_dict moves the tensors to the parameters' device.
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        raw = json.loads((self.folder / "done.json").read_text())
        return _Done(raw["step"], raw["step"], list(tensors["losses"]) if "losses" in tensors else [], raw["history"])
