"""Core-hours and GPU-hours of a params file for data that are not there: work counted from numbers of images that are given.

What cores do (decoding, the leak check, tables) is probed on this machine. What GPUs do is counted in multiply-accumulates and
divided by a rate that is assumed, not measured.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.errors import UserError
from pipeline.models import architectures, exits
from pipeline.planning import counts
from pipeline.planning.counts import Given
from pipeline.planning.estimate import Rates, works_of
from pipeline.planning.work import Kind, Recipe, Work

PASSES = 3  # forward passes that a step of training is worth: the backward pass takes about two


class Hours(NamedTuple):
    """What a stage takes: hours of one core of this machine, hours of one GPU; None and the reason where that is not known."""

    cores: float | None
    gpus: float | None
    by: str


def hours(recipe: Recipe, given: Given, size: int, gpu_macs: float, folder: Path) -> tuple[dict[str, Hours], float]:
    """Each stage of the recipe for so many images of `size` x `size` pixels; and the seconds that the probes took."""
    rates = Rates(recipe, folder, True, size=size)
    works = works_of(recipe, recipe.stages(), counts.counted(recipe, given))
    found = {}
    for name, work in works.items():
        if isinstance(work, UserError):
            found[name] = Hours(None, None, str(work))
            continue
        on_gpu = {kind: units for kind, units in work.items() if kind.name in ("step", "forward")}
        on_cores: Work = {kind: units for kind, units in work.items() if kind not in on_gpu and kind.name != "view"}
        cores = sum(units * rates.of(kind).cpu for kind, units in on_cores.items())
        gpus = sum(units * macs(kind) for kind, units in on_gpu.items()) / gpu_macs
        by = "probe" if not on_gpu else "assumed" if gpus > cores else "both"
        found[name] = Hours(cores / 3600, gpus / 3600, by)
    rates.keep()
    return found, rates.seconds


def macs(kind: Kind) -> float:
    """Multiply-accumulates of a unit: of an image that a network looks at, or of a step of training, its teacher not included."""
    spec = kind.details
    nets: Iterable[Mapping[str, Any]] = spec.get("parts") or [spec["net"]]
    once = sum(_macs(json.dumps(net, sort_keys=True), spec["classes"], spec.get("loss") == "exits") for net in nets)
    views = 2 if spec.get("loss") == "contrast" else 1
    return once if kind.name == "forward" else PASSES * views * spec["batch"] * once


@cache
def _macs(net: str, classes: int, with_exits: bool) -> int:
    described = json.loads(net)
    with FakeTensorMode():  # shapes alone: no memory, no time
        model = architectures.create(described["arch"], classes, described["options"])
        whole = exits.Stacked(exits.Exits(model, classes)) if with_exits else model
        return architectures.macs(whole, described["size"])
