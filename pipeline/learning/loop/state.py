"""The resumable state of a training."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pipeline.harness import scratch
from pipeline.learning.loop.optimisers import Training, TrainingError
from pipeline.store import artifact


@dataclass
class _Done:
    """How far a run has come: what a checkpoint holds beside tensors."""

    step: int = 0
    saved: int = 0
    losses: list[Tensor] = field(default_factory=list)  # since the last check; on the device, so that no step waits for them
    history: dict[str, Any] = field(default_factory=lambda: {"train": [], "holdout": []})
    finite: int = 0  # so many of `losses`, the first, were looked at

    def refuse_nan(self, training: Training) -> None:
        """Raise TrainingError at the first loss that is not finite: before a checkpoint could keep what it did to the weights."""
        if self.finite == len(self.losses):
            return
        losses = torch.stack(self.losses[self.finite :])
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            step = self.step - len(losses) + int(bad[0])
            raise TrainingError(
                f"the loss is {float(losses[bad[0]])} at step {step + 1} of {training.steps} "
                f"(learning rate {training.rate(step):.3g}). "
                "Lower `training.lr`, lengthen `training.warmup` or set `training.clip`. "
                f"The last good state, of step {self.saved}, is kept."
            )
        self.finite = len(self.losses)

    def note(self, rate: float, measured: Mapping[str, float]) -> dict[str, float]:
        loss = float(torch.stack(self.losses).float().mean())
        self.losses, self.finite = [], 0
        self.history["train"].append({"step": self.step, "loss": loss, "lr": rate})
        self.history["holdout"].append({"step": self.step, **measured})
        return {"loss": loss, "lr": rate, **{f"holdout_{name}": value for name, value in measured.items()}}


class State:
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
        """Restore the modules and the optimiser in place; from the start where no whole checkpoint is there."""
        if not scratch.usable(self.folder):
            return _Done()
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
