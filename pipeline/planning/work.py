"""The work of each stage, counted from its params: so many steps of this network, so many images through that one.

A stage is a sum of kinds of work, each with an amount. What one unit of a kind takes is probed (`pipeline.planning.probe`), or
assumed (`ASSUMED`); earlier runs of the stage correct the sum.
"""

import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from pipeline.errors import UserError
from pipeline.harness.machine import Machine
from pipeline.leaks.index import EXACT
from pipeline.leaks.search import Search
from pipeline.learning.loop.fit import CHECKS
from pipeline.learning.views import View
from pipeline.models import checkpoint
from pipeline.models.inputs import Input
from pipeline.models.network import Network
from pipeline.report import corruptions
from pipeline.report.measure import ROUNDS, TIMED
from pipeline.stages.distil import Distil
from pipeline.stages.draw import Draw
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.label import Label
from pipeline.stages.pack import Pack
from pipeline.stages.pretrain import MONITORED, Pretrain
from pipeline.stages.self_distil import LABELS, SelfDistil
from pipeline.stages.teach import Teach
from pipeline.store import params
from pipeline.store.params import SINGLE, Section

ENTRIES = 600  # of an image in the index of the leak check: 300 keypoints, and each mirrored
TORCH = ("pretrain", "teach", "ensemble", "score", "label", "distil", "self_distil", "evaluate", "export")
"""The stages that import torch, which takes seconds."""

ASSUMED = {
    "dedup": 3.7,  # seconds, whatever there is to decide
    "export": 9.0,  # two exporters, onnxruntime, the example
    "compare": 0.5,  # plots and the page
    "compared": 0.05,  # seconds an entry
    "rows": 2e-6,  # seconds a row of a table that is read, ranked and written
    "described": 0.8e-3,  # seconds an image of the gallery
    "answers": 1.6,  # a network is read, and its first batch
}
"""Seconds of one core that are not probed, measured on 2 cores of a shared AMD EPYC."""


class Kind(NamedTuple):
    """A kind of work: equal kinds take equally long a unit on one machine."""

    name: str
    spec: str  # JSON

    @property
    def details(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.spec)
        return found

    def told(self) -> str:
        """One unit in words."""
        d = self.details
        net = d.get("net") or {}
        if self.name == "step":
            return f"a step of {net['arch']} with {d['batch']} images of {net['size']} px, learning from {LEARNED[d['loss']]}"
        if self.name == "forward":
            of = f"{net['arch']}, {net['size']} px" if net else f"an ensemble of {len(d['parts'])}"
            return f"an image through {of}{', in float32' if d['precision'] == 'float32' else ''}"
        if self.name == "start":
            return f"the start of Python{' with torch' * d['torch']}{', and what optimisers import' * d['trains']}"
        if self.name == "decode":
            return f"an image decoded{' and brought to {} px'.format(d['side']) if d['side'] else ''}"
        return UNITS[self.name].format(**d)


def kind(name: str, **spec: Any) -> Kind:
    return Kind(name, json.dumps(spec, sort_keys=True))


LEARNED = {"labels": "labels", "soft": "soft labels", "exits": "labels at each exit", "contrast": "two views"}
UNITS = {
    "draw": "a scene drawn",
    "header": "the header of an image",
    "pack": "an image packed at {side} px",
    "corrupt": "an image of {side} px made worse",
    "view": "a view of {size} px cut",
    "sift": "the features of an image",
    "index": "a feature entered into an index",
    "vote": "an image searched and compared, by its part that does not grow with the index",
    "alike": "two thumbnails compared",
}
Work = dict[Kind, float]
"""Units of each kind: images, steps, processes."""


class PlanError(UserError):
    """The work of a stage cannot be counted."""


@dataclass(frozen=True)
class Net:
    """A network as far as its speed goes. `parts`: the members of an ensemble."""

    arch: str
    options: Mapping[str, Any]
    input: Input
    parts: tuple["Net", ...] = ()

    def spec(self, size: int | None = None) -> dict[str, Any]:
        return {"arch": self.arch, "options": dict(self.options), "size": size or self.input.size}


@dataclass(frozen=True)
class Recipe:
    """A params file, and the networks that it names."""

    file: Path
    tree: Mapping[str, Any]
    machine: Machine

    @classmethod
    def read(cls, file: Path) -> "Recipe":
        """Raises ParamsError."""
        tree = params.read(file)
        if wrong := [*params.lacking(tree), *params.wrong_seed(tree)]:
            raise params.ParamsError(f"{file}: " + "\n".join(wrong))
        machine = params.load(file, Machine, ("machine",)) if "machine" in tree else Machine()
        return cls(file, tree, machine)

    def entries(self, stage: str) -> list[str]:
        """The names of the entries of a section; of one that is missing, none."""
        return list(self.tree.get(stage) or {})

    def stages(self) -> list[str]:
        """All stages as DVC names them: `prepare`, `distil@ssld`."""
        found = []
        for stage in ORDER:
            found += [stage] if stage in SINGLE else [f"{stage}@{entry}" for entry in self.entries(stage)]
        return found

    def section(self, stage: str, entry: str | None, value: Any = None) -> Section:
        """The typed params of a stage; `value` in the place of what the file says. Raises ParamsError."""
        kind_of: type[Section] = get_type_hints(importlib.import_module(f"pipeline.stages.{stage}").run)["params"]
        keys = tuple(filter(None, (stage, entry)))
        if value is not None:  # as a record has it: by the names of the fields, one of which is no word of Python
            aliases = {name: field.alias or name for name, field in kind_of.model_fields.items()}
            return kind_of.model_validate({aliases.get(name, name): of_field for name, of_field in value.items()})
        said = self.tree.get(stage) if entry is None else (self.tree.get(stage) or {}).get(entry)
        found, wrong = params.resolve(self.tree, kind_of, keys, said)
        if found is None:
            raise params.ParamsError(f"{self.file}: " + "\n".join(wrong))
        return found

    def net(self, name: str, given: Network | None = None) -> Net:
        """The network of `teach/teacher`, of a model directory below data/, or `given`. Raises PlanError, ParamsError."""
        if given is not None:
            return Net(given.arch, given.options, given.input.fitted(None, False))
        stage, _, entry = name.partition("/")
        section = (self.tree.get(stage) or {}).get(entry) if stage in params.STAGES and stage not in SINGLE else None
        if section is not None:
            if stage == "ensemble":
                members = tuple(self.net(section[which]) for which in ("first", "second"))
                return Net("ensemble", {}, max((m.input for m in members), key=lambda i: i.size), members)
            if named := (section.get("model") if stage in TRAINS else None):
                wanted, wrong = params.resolve(self.tree, Network, ("models", named), (self.tree.get("models") or {}).get(named))
                if wanted is None:
                    raise params.ParamsError(f"{self.file}: " + "\n".join(wrong))
                return self.net(name, wanted)
            return self.net(section[{"export": "model", "label": "teacher"}.get(stage, "init")])
        folder = Path("data", name)
        if not (folder / checkpoint.DESCRIPTION).is_file():
            raise PlanError(f"the network of data/{name} is not known.")
        found = checkpoint.parsed(folder)
        return Net(found.arch, {k: v for k, v in found.options.items() if k != "exits"}, found.input)


TRAINS = ("pretrain", "teach", "distil", "self_distil")
ORDER = (
    "draw", "prepare", "search", "dedup", "pretrain", "teach", "ensemble", "score", "select", "pack", "label", "distil",
    "self_distil", "evaluate", "export", "compare",
)  # fmt: skip
"""The stages of a params file where DVC is not asked for their order; one that is not among them is not known here."""


def work_of(recipe: Recipe, stage: str, section: Section, rows: Mapping[str, int], classes: int) -> Work:
    """The work of one run. `rows`: of the tables that it reads and writes, by the names of their paths.

    Raises PlanError for a stage whose work nobody has described, KeyError where `rows` lacks one of its tables.
    """
    if stage not in WORKS:
        raise PlanError(f"what `{stage}` does is not described in pipeline/planning/work.py.")
    own = (kind("start", torch=stage in TORCH, trains=stage in TRAINS), 1.0)
    work: Work = {}
    for what, amount in (own, *WORKS[stage](Facts(recipe, section, rows, classes))):
        if amount > 0:
            work[what] = work.get(what, 0.0) + amount
    return work


HOLD_TRAIN = ("dedup/train", "prepare/train")


class Facts(NamedTuple):
    """What the work of a stage is counted from."""

    recipe: Recipe
    params: Section
    rows: Mapping[str, int]
    classes: int

    @property
    def machine(self) -> Machine:
        return self.recipe.machine

    def seen(self, labelled: bool, name: str) -> int:
        """Images that are learned on: those of the manifest `name`, and the labelled ones where they are not among them."""
        packed = (self.recipe.tree.get("pack") or {}).get(name.removeprefix("pack/"), {}) if name.startswith("pack/") else {}
        there = name in HOLD_TRAIN or (bool(packed) and (packed.get("labelled", True) or packed.get("images") in HOLD_TRAIN))
        return self.rows["chosen"] + (self.rows["train"] if labelled and not there else 0)


Parts = list[tuple[Kind, float]]


def _assumed(name: str, units: float = 1.0) -> tuple[Kind, float]:
    return kind("assumed", of=name), ASSUMED[name] * units


def _draw(facts: Facts) -> Parts:
    assert isinstance(facts.params, Draw)
    p, each = facts.params, 10
    images = each * (p.labelled + p.val) + p.in_class + p.out_of_class + p.leaks + p.broken
    return [(kind("draw"), images), _processes(facts)]


def _processes(facts: Facts) -> tuple[Kind, float]:
    """Worker processes start beside each other, after the stage."""
    return kind("start", torch=False, trains=False), float(facts.machine.cores(facts.machine.workers) > 1)


def _prepare(facts: Facts) -> Parts:
    images = sum(facts.rows[f"{name}_out"] for name in ("train", "holdout", "val", "pool"))
    header = getattr(facts.params, "check", "decode") == "header"
    return [(kind("header") if header else kind("decode", side=0), images), _assumed("rows", 12 * images)]


def _search(facts: Facts) -> Parts:
    assert isinstance(facts.params, Search)
    pool = facts.rows["pool"]
    reference = facts.rows["val"] + facts.rows["holdout"] + (facts.rows["train"] if facts.params.train else 0)
    start, own = _processes(facts)
    parts = [
        (start, 3 * own),  # to describe the reference, to search the pool, to search the reference
        (kind("decode", side=0), pool + reference),
        (kind("sift"), pool + reference),
        (kind("index"), ENTRIES * reference),
        (kind("vote"), (pool + reference) * votes(ENTRIES * reference)),
        (kind("alike"), pool * facts.rows["val"]),
    ]
    if facts.params.duplicates:
        parts += [(kind("index"), ENTRIES * pool), (kind("vote"), pool * votes(ENTRIES * pool))]
    return parts


def votes(entries: float) -> float:
    """What it costs to search an index of so many entries for an image's features and to look at what was found, by docs/dedup.md
    (measured for 0.5, 5.3 and 26.4 million; ms of one core). Its shape is used, not its unit."""
    return 1.72 + 1.18e-3 * math.sqrt(max(entries, EXACT))


def _dedup(facts: Facts) -> Parts:
    tables = sum(facts.rows[name] for name in ("train", "holdout", "val", "pool"))
    shown = facts.rows["leaks_out"]  # findings: about as many as images in them
    return [_assumed("dedup"), _assumed("rows", tables), _assumed("described", shown), (kind("decode", side=0), shown)]


def _trained(facts: Facts, net: Net, loss: str, images: int, canvas: int, whole: bool, spec: Mapping[str, Any]) -> Parts:
    """What all trainings do: decode, step, and measure the held-out images."""
    training = facts.params.training  # type: ignore[attr-defined]
    own = training.batch // facts.machine.processes
    how = {
        "optimizer": training.optimizer,
        "accumulate": training.accumulate,
        "ema": bool(training.ema),
        "clip": bool(training.clip),
        "frozen": list(training.frozen),
    }
    step = kind("step", net=net.spec(), loss=loss, canvas=canvas, whole=whole, batch=own, how=how, classes=facts.classes, **spec)
    held_out = facts.rows["holdout"]
    return [
        *_canvases(facts, images, canvas, whole, training.steps * training.batch),
        (step, training.steps),
        (kind("decode", side=net.input.side, whole=False), held_out),
        (_forward(net, facts), min(CHECKS, training.steps) * held_out),
    ]


def _canvases(facts: Facts, images: int, canvas: int, whole: bool, looked_at: float) -> Parts:
    """Images are decoded once where they fit into memory, else each time they are looked at."""
    fits = images * canvas * canvas * 3 <= facts.machine.memory_gb * 1e9
    name = getattr(facts.params, "images", "")
    packed = (facts.recipe.tree.get("pack") or {}).get(str(name).removeprefix("pack/")) if str(name).startswith("pack/") else None
    side = {"packed": packed.get("side", 256)} if packed else {}
    return [(kind("decode", side=canvas, whole=whole, **side), images if fits else looked_at)]


def _forward(net: Net, facts: Facts, size: int | None = None, precision: str | None = None) -> Kind:
    if net.parts:
        return kind("forward", parts=[p.spec() for p in net.parts], classes=facts.classes, precision=precision or "own")
    return kind("forward", net=net.spec(size), classes=facts.classes, precision=precision or "own")


def _pretrain(facts: Facts) -> Parts:
    p = facts.params
    assert isinstance(p, Pretrain)
    net = facts.recipe.net("", p.model)
    spec = {"views": p.two_views.model_dump(mode="json"), "head": [p.head_layers, p.head_out], "memory": bool(p.memory)}
    images = facts.seen(True, p.images)
    known = min(MONITORED, facts.rows["train"])
    looked = _forward(net, facts)
    return [
        *_trained(facts, net, "contrast", images, net.input.canvas_of(True), True, spec),
        (looked, min(CHECKS, p.training.steps) * known),
    ]


def _teach(facts: Facts) -> Parts:
    p = facts.params
    assert isinstance(p, Teach)
    net = facts.recipe.net(p.init, p.model)
    held_out = facts.rows["holdout"]
    if p.training is None:
        return [(kind("decode", side=net.input.side, whole=False), held_out), (_forward(net, facts), held_out)]
    view = p.view.model_dump(mode="json")
    return _trained(facts, net, "labels", facts.rows["train"], net.input.canvas_of(p.view.whole), p.view.whole, {"view": view})


def _teacher(facts: Facts, name: str, student: Net, view: View, looked_at: float) -> tuple[Parts, int]:
    """What a teacher in the loop does, and the side of the canvases that views are cut from."""
    teacher = facts.recipe.net(name)
    if name.startswith("label/"):
        return [], teacher.input.canvas_of(view.whole)
    canvas = max(student.input.canvas_of(view.whole), teacher.input.canvas_of(view.whole))
    return [(_forward(teacher, facts), looked_at)], canvas


def _view(facts: Facts, named: View | None, teacher: str) -> View:
    """The view that is learned on: with kept labels, by default theirs."""
    if named is None and teacher.startswith("label/"):
        label = facts.recipe.section("label", teacher.partition("/")[2])
        assert isinstance(label, Label)
        return label.view
    return named or View()


def _distil(facts: Facts) -> Parts:
    p = facts.params
    assert isinstance(p, Distil)
    net, view = facts.recipe.net(p.init, p.model), _view(facts, p.view, p.teacher)
    teaching, canvas = _teacher(facts, p.teacher, net, view, p.training.steps * p.training.batch)
    spec = {"view": view.model_dump(mode="json"), "mix": p.mix.model_dump(mode="json"), "divergence": p.loss.name}
    return [*_trained(facts, net, "soft", facts.seen(p.labelled, p.images), canvas, view.whole, spec), *teaching]


def _self_distil(facts: Facts) -> Parts:
    p = facts.params
    assert isinstance(p, SelfDistil)
    net, view = facts.recipe.net(p.init, p.model), _view(facts, p.view, p.teacher)
    teaching, canvas = list[tuple[Kind, float]](), net.input.canvas_of(view.whole)
    images = facts.rows["chosen"]
    if p.teacher != LABELS:
        teaching, canvas = _teacher(facts, p.teacher, net, view, p.training.steps * p.training.batch)
        images = facts.seen(p.labelled, p.images)
    spec = {"view": view.model_dump(mode="json")}
    return [*_trained(facts, net, "exits", images, canvas, view.whole, spec), *teaching]


def _ensemble(facts: Facts) -> Parts:
    return []


def _score(facts: Facts) -> Parts:
    net = facts.recipe.net(getattr(facts.params, "teacher"))  # noqa: B009 - a field of Score
    pool = facts.rows["pool"]
    images = pool + facts.rows["holdout"]
    decoding = (kind("decode", side=net.input.side, whole=False), images)
    return [decoding, (_forward(net, facts), images), _assumed("answers"), _assumed("rows", 2 * pool)]


def _select(facts: Facts) -> Parts:
    return [_assumed("rows", 2 * facts.rows["pool"])]


def _pack(facts: Facts) -> Parts:
    assert isinstance(facts.params, Pack)
    images = facts.seen(facts.params.labelled, facts.params.images)
    return [(kind("pack", side=facts.params.side), images), _assumed("rows", 2 * images)]


def _label(facts: Facts) -> Parts:
    p = facts.params
    assert isinstance(p, Label)
    net, images = facts.recipe.net(p.teacher), facts.seen(p.labelled, p.images)
    canvas = net.input.canvas_of(p.view.whole)
    return [
        (kind("decode", side=canvas, whole=p.view.whole), images),
        (kind("view", view=p.view.model_dump(mode="json"), size=net.input.size, canvas=canvas), images * p.views),
        (_forward(net, facts), images * p.views),
        _assumed("answers"),
        _assumed("rows", 2 * images * p.views),
    ]


def _evaluate(facts: Facts) -> Parts:
    p = facts.params
    assert isinstance(p, Evaluate)
    net = facts.recipe.net(p.model)
    images = facts.rows["val"] + facts.rows["holdout"]
    side = round((p.size or net.input.size) / net.input.crop)
    answers = _forward(net, facts, p.size, "float32")
    exits = p.model.startswith("self_distil/") and p.exit in (None, "early")
    passes = (2 if p.mirror else 1) + (1 if exits else 0)
    parts = [
        (kind("decode", side=side, whole=False), images),
        (answers, passes * images),
        _assumed("answers"),
    ]
    if p.corruptions:
        worse = images * len(corruptions.CORRUPTIONS) * len(corruptions.SEVERITIES)
        parts += [(kind("corrupt", side=side), worse), (answers, worse * (2 if p.mirror else 1))]
    if p.timing:
        timed = ROUNDS * min(TIMED, facts.rows["val"])
        parts += [(_forward(net, facts, p.size), timed * (4 if exits else 1))]
    return parts


def _export(facts: Facts) -> Parts:
    return [_assumed("export")]


def _compare(facts: Facts) -> Parts:
    return [_assumed("compare"), _assumed("compared", len(facts.recipe.entries("evaluate")))]


WORKS: Mapping[str, Callable[[Facts], Parts]] = {
    "draw": _draw,
    "prepare": _prepare,
    "search": _search,
    "dedup": _dedup,
    "pretrain": _pretrain,
    "teach": _teach,
    "ensemble": _ensemble,
    "score": _score,
    "select": _select,
    "pack": _pack,
    "label": _label,
    "distil": _distil,
    "self_distil": _self_distil,
    "evaluate": _evaluate,
    "export": _export,
    "compare": _compare,
}
"""One that a stage of your own lacks is no mistake: its time is known once it has run."""
