"""How long and how fast to learn: schedule, optimiser, decay."""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from pipeline.errors import UserError
from pipeline.store.params import Section


class Training(Section):
    """How long and how fast to learn: linear warm-up over a share of the steps, then cosine to zero."""

    steps: NonNegativeInt
    """How many batches to learn from. 0 keeps a model as it comes, which only `teach` can do."""
    batch: PositiveInt = 256
    """Images of a step, of all processes together."""
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"
    """`sgd` with Nesterov's step; `adamw`; `lars` (You et al. 2017; momentum without Nesterov's step, trust coefficient 0.001),
    which adapts the rate of each tensor, but not of biases and normalisation."""
    lr: PositiveFloat = 0.1
    """The learning rate at its peak, see `lr_scaling`."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """`linear`: `lr` is for 256 images and grows with the batch (SimCLR: 0.3). `sqrt`: it is multiplied by the square root of
    the batch (SimCLR: 0.075)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """The momentum of `sgd` and `lars`."""
    weight_decay: NonNegativeFloat = 5e-4
    """Decay of the weights; biases and normalisation are left alone."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """The share of the steps over which the rate rises to its peak."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of a moving average of the weights, which then is the result; 0: off."""
    clip: NonNegativeFloat = 0.0
    """Bound of the gradient's norm; 0: off."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing, where labels are read."""
    accumulate: PositiveInt = 1
    """Pass each batch in so many pieces, which take their own batch statistics, to save memory."""
    rates: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Multiples of the learning rate by the beginning of parameter names (`{conv1: 0.1, layer1: 0.2}`), the longest that fits:
    for transfer."""

    def rate(self, step: int) -> float:
        """The learning rate of a step in 0..steps-1."""
        peak = self.lr * {"none": 1.0, "linear": self.batch / 256, "sqrt": math.sqrt(self.batch)}[self.lr_scaling]
        warm = round(self.warmup * self.steps)
        if step < warm:
            return peak * (step + 1) / warm
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


def _expect_steps(training: Training) -> Training:
    if not training.steps:
        raise ValueError("`steps: 0` learns nothing; only `teach` can keep a model as it comes")
    return training


Steps = Annotated[Training, AfterValidator(_expect_steps)]
"""A training of at least one step."""


class TrainingError(UserError):
    """Training cannot go on, or cannot be resumed."""


def build_optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
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
