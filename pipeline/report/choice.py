"""Which candidate is chosen: the best on held-out images, or the cheaper one where nobody can tell them apart."""

import math
from collections.abc import Sequence

from pydantic import BaseModel

from pipeline.report import pairs
from pipeline.report.entries import Entry
from pipeline.report.pairs import Versus

RULE = (
    "Chosen is the candidate with the best holdout accuracy. Where the held-out images do not separate it from others (McNemar's "
    "test, corrected by Holm), it is the one of them that costs least: compute of a prediction, then of training, then "
    "parameters, then the order in params.yaml."
)


class Choice(BaseModel):
    """`best`: the candidate that was chosen. `first`: the most accurate on holdout. `rivals`: `first` against each other
    candidate on the held-out images, corrected for their number."""

    best: str
    first: str
    rivals: list[Versus]

    @property
    def tied(self) -> list[Versus]:
        """The rivals that are not separable from `first`."""
        return [rival for rival in self.rivals if rival.outcome != "better"]


def choose(entries: Sequence[Entry], margin: float) -> Choice | None:
    """The choice by `RULE`; None without candidates."""
    candidates = {e.name: e for e in entries if e.evaluation.role == "candidate"}
    if not candidates:
        return None
    first = max(candidates.values(), key=lambda e: e.held_right.mean())
    others = [e for e in candidates.values() if e is not first]
    found = {(first.name, e.name): pairs.compare(first.held_right, e.held_right) for e in others}
    choice = Choice(best=first.name, first=first.name, rivals=pairs.versus(found, margin))
    group = {first.name, *(rival.other for rival in choice.tied)}
    cheapest = min((e for name, e in candidates.items() if name in group), key=_cost)
    return choice.model_copy(update={"best": cheapest.name})


def _cost(entry: Entry) -> tuple[float, float, int]:
    """Multiply-accumulates of a prediction and of the training, and parameters; what was not counted costs most."""
    model, training = entry.evaluation.model, entry.evaluation.training
    macs = [math.inf if counted is None else counted for counted in (model.macs, training.macs)]
    return macs[0], macs[1], model.parameters
