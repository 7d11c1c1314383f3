"""How long and how fast to learn: schedule, optimiser, decay."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipeline.errors import UserError
from pipeline.learning.loop import group
from pipeline.models import architectures
from pipeline.store.params import Section


class Training(Section):
    """How long and how fast to learn: linear warm-up over a share of the steps, then down to zero."""

    steps: NonNegativeInt
    """How many batches to learn from. 0 keeps a model as it comes, which only `teach` can do."""
    batch: PositiveInt = 256
    """Images of a step, of all processes together."""
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"
    """`sgd`; `adamw`; `lars` (You et al. 2017; trust coefficient 0.001), which adapts the rate of each tensor, but, as
    SimCLR has it, not of biases, normalisation and the classifier."""
    lr: PositiveFloat = 0.1
    """The learning rate at its peak, see `lr_scaling`."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """`linear`: `lr` is for 256 images and grows with the batch (SimCLR: 0.3). `sqrt`: it is multiplied by the square root of
    the batch (SimCLR: 0.075)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """The momentum of `sgd` and `lars`."""
    nesterov: bool = True
    """Whether `sgd` takes Nesterov's step, which looks ahead along the momentum; `lars` never does."""
    weight_decay: NonNegativeFloat = 5e-4
    """Decay of the weights; biases, normalisation, and what a network of timm names (a ViT's class token and position embeddings)
    are left alone."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """The share of the steps over which the rate rises to its peak."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the rate falls from its peak to zero; `linear` with a warm-up is a triangle."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of a moving average of the weights, which then is the result; 0: off. After t steps it is at most (1 + t) / (10 + t),
    so that a short training forgets its start."""
    clip: NonNegativeFloat = 0.0
    """Bound of the gradient's norm; 0: off."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing, where labels are read: in `distil`, where `alpha` is below 1."""
    accumulate: PositiveInt = 1
    """Pass each batch in so many pieces, which take their own batch statistics, to save memory."""
    rates: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Multiples of the learning rate by the beginning of parameter names (`{conv1: 0.1, layer1: 0.2}`), the longest that fits:
    for transfer."""
    bias_rate: PositiveFloat = 1.0
    """A multiple of the learning rate for the shifts of batch normalisation, on top of `rates` (Page 2019: 64)."""
    frozen: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Layers that stay as they are, by the beginning of parameter names (`[conv1, bn1, layer]`): no gradient, no decay, and their
    normalisation keeps its statistics. Compute is counted as if they learned."""

    def rate(self, step: int) -> float:
        """The learning rate of a step in 0..steps-1."""
        peak = self.lr * {"none": 1.0, "linear": self.batch / 256, "sqrt": math.sqrt(self.batch)}[self.lr_scaling]
        warm = round(self.warmup * self.steps)
        if step < warm:
            return peak * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return peak * (1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def _expect_steps(training: Training) -> Training:
    if not training.steps:
        raise ValueError("`steps: 0` learns nothing; only `teach` can keep a model as it comes")
    return training


Steps = Annotated[Training, AfterValidator(_expect_steps)]
"""A training of at least one step."""


class TrainingError(UserError):
    """Training cannot go on, or cannot be resumed."""


def build_optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """The optimiser of the parameters that learn. Raises TrainingError for a beginning in `rates` that no parameter has."""
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    unused, undecayed, classifier = set(training.rates), _undecayed(model), architectures.heads(model)
    shifts = {f"{name}.bias" for name, module in model.named_modules() if isinstance(module, group.BatchNorm)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fitting = [start for start in training.rates if name.startswith(start)]
            unused.difference_update(fitting)
            multiple = training.rates[max(fitting, key=len)] if fitting else 1.0
            multiple *= training.bias_rate if name in shifts else 1.0
            decays = parameter.ndim > 1 and name not in undecayed
            adapts = training.optimizer == "lars" and decays and not name.startswith(classifier)
            groups.setdefault((decays, adapts, multiple), []).append(parameter)
    _refuse_unused("rates", unused, model)
    parts: list[dict[str, Any]] = [
        {"params": members, "weight_decay": training.weight_decay if decays else 0.0, "adapts": adapts, "multiple": multiple}
        for (decays, adapts, multiple), members in groups.items()
    ]
    if training.optimizer == "sgd":
        nesterov = training.nesterov and training.momentum > 0
        return torch.optim.SGD(parts, lr=training.lr, momentum=training.momentum, nesterov=nesterov)
    if training.optimizer == "lars":
        return Lars(parts, lr=training.lr, momentum=training.momentum)
    return torch.optim.AdamW(parts, lr=training.lr)


def freeze(model: nn.Module, beginnings: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Take the gradient from the parameters that begin so; returns their names, and those of the modules to keep in eval mode.

    Raises TrainingError for a beginning that no parameter has, and if nothing is left to learn.
    """
    if not beginnings:
        return [], []
    named = dict(model.named_parameters())
    _refuse_unused("frozen", {start for start in beginnings if not any(name.startswith(start) for name in named)}, model)
    taken = [name for name, p in named.items() if name.startswith(beginnings) and p.requires_grad]
    for name in taken:
        named[name].requires_grad_(False)
    if not any(p.requires_grad for p in named.values()):
        raise TrainingError(f"`training.frozen` ({', '.join(beginnings)}) leaves no parameter to learn. Take the classifier out.")
    return taken, [name for name, _ in model.named_modules() if f"{name}.".startswith(beginnings)]


def _refuse_unused(key: str, unused: set[str], model: nn.Module) -> None:
    if unused:
        raise TrainingError(
            f"`training.{key}` names {', '.join(sorted(unused))}, with which no parameter of the model begins. "
            f"They begin with {', '.join(sorted({name.split('.')[0] for name, _ in model.named_parameters()}))}."
        )


def _undecayed(model: nn.Module) -> set[str]:
    """The parameters that the network, or one inside it, says are not to decay."""
    found = set()
    for prefix, module in model.named_modules():
        if callable(names := getattr(module, "no_weight_decay", None)):
            found |= {f"{prefix}.{name}".removeprefix(".") for name in names()}
    return found


class Lars(torch.optim.SGD):
    """Momentum on gradients of the size of their weights: trust (g + decay w) with trust = 0.001 |w| / (|g| + decay |w|).

    You et al. 2017, algorithm 1, but for the rate, which stands outside of the momentum; for the groups that say so by `adapts`;
    the others keep their gradients. Where a norm is 0, trust is 1, as in SimCLR's code.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        decays = [part["weight_decay"] for part in self.param_groups]
        for part, decay in zip(self.param_groups, decays, strict=True):
            if part["adapts"]:
                for w in part["params"]:
                    if w.grad is not None:
                        w_norm, g_norm = w.norm(), w.grad.norm()
                        trust = 0.001 * w_norm / (g_norm + decay * w_norm)
                        w.grad.add_(w, alpha=decay).mul_(torch.where((w_norm > 0) & (g_norm > 0), trust, 1.0))
                part["weight_decay"] = 0.0  # it is in the gradient
        super().step(closure)
        for part, decay in zip(self.param_groups, decays, strict=True):
            part["weight_decay"] = decay


def warmed_up(ema: float) -> Callable[[Any, Any, Any], None]:
    """What makes an AveragedModel a moving average of decay min(ema, (1 + t) / (10 + t)) after t steps."""

    def update(averages: Any, weights: Any, steps: Any) -> None:
        t = int(steps)
        get_ema_multi_avg_fn(min(ema, (1 + t) / (10 + t)))(averages, weights, steps)

    return update
