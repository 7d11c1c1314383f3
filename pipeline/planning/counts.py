"""How many images each stage will meet: from its metrics where it has run, else from params and what the sources hold."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.planning.work import HOLD_TRAIN, Recipe
from pipeline.scenes.categories import CLASSES
from pipeline.scenes.dataset import Draw
from pipeline.sources.listing import request_of
from pipeline.sources.parquet import Parquet, rows_of
from pipeline.sources.source import Request, Role
from pipeline.sources.tars import Tars
from pipeline.sources.torchvision import Torchvision
from pipeline.stages.prepare import Prepare
from pipeline.store import manifest

FOUND = 0.04
"""Copies and doubtful pairs for each image of the pool where none has been counted yet: an assumption, as the built-in data and
CIFAR-10 have it."""
CLASSES_OF_TABLES = 10
"""Classes of labels that stand in a table which has not been read yet: an assumption."""


class CountError(UserError):
    """It cannot be known how many images there are."""


class Given(NamedTuple):
    """What there is to prepare: images with labels, of validation and of the pool, and how many classes."""

    labelled: int
    val: int
    pool: int
    classes: int


@dataclass(frozen=True)
class Counts:
    """Images by artifact, such as `dedup/train`, and the classes."""

    images: dict[str, int]
    classes: int

    def rows(self, stage: str, entry: Mapping[str, Any]) -> dict[str, int]:
        """The rows of the tables that a stage reads and writes, under the names that its `run` gives to their paths."""
        have = self.images
        if stage == "prepare":
            return {f"{name}_out": have[f"prepare/{name}"] for name in ("train", "holdout", "val", "pool")}
        if stage in ("search", "dedup"):
            sets = {name: have[f"prepare/{name}"] for name in ("train", "holdout", "val", "pool")}
            return sets | ({"leaks_out": have["dedup/leaks"]} if stage == "dedup" else {})
        if stage == "evaluate":
            return {"val": have["prepare/val"], "holdout": have["dedup/holdout"]}
        rows = {"train": have["dedup/train"], "holdout": have["dedup/holdout"], "pool": have["dedup/pool"]}
        images = entry.get("images")
        if images is not None:
            if images not in have:
                raise CountError(f"nobody knows yet how many images data/{images} has.")
            rows["chosen"] = have[images]
        return rows


def given(recipe: Recipe) -> Given:
    """What the sources hold, from their tables of contents. Raises CountError, SourceError, ParamsError."""
    root = recipe.tree["prepare"]["root"]
    drawn = root.removeprefix("data/draw/")
    if drawn in (recipe.tree.get("draw") or {}) and not Path(root).exists():
        draw = recipe.section("draw", drawn)
        assert isinstance(draw, Draw)
        each = len(CLASSES)
        return Given(each * draw.labelled, each * draw.val, draw.in_class + draw.out_of_class + draw.leaks, each)
    params = recipe.section("prepare", None)
    assert isinstance(params, Prepare)
    classes: set[str] = set()
    roles: dict[Role, Any] = {"labelled": params.labelled, "val": params.val, "pool": params.pool}
    nowhere = Tars(Path(), Path())  # tables are not unpacked to be counted
    held = {
        role: sum(_held(source, request_of(source, Request(role, Path(root), nowhere, classes))) for source in roles[role])
        for role in roles
    }
    named = params.classes or next((s.classes for s in params.labelled if isinstance(s, Parquet) and s.classes), ())
    return Given(held["labelled"], held["val"], held["pool"], len(classes) or len(named) or CLASSES_OF_TABLES)


def _held(source: Any, request: Request) -> int:
    if isinstance(source, Torchvision):
        raise CountError(f"torchvision's {source.name} is not counted before `prepare` has run. Say --images, --val, --labelled.")
    if isinstance(source, Parquet):
        return sum(rows_of(file, request) for file in request.stored(source.path))
    return sum(1 for file in source.files(request) if file.reason is None)


def counted(recipe: Recipe, sources: Given | None) -> Counts:
    """The images of every artifact that the recipe makes.

    `sources`: of data that are not there yet; None: those of this folder, by the metrics of `prepare` and `dedup` if they ran.
    """
    known = _metrics("prepare") if sources is None else {}
    if {"train", "holdout", "val", "pool", "classes"} <= known.keys():
        sets, classes = {name: int(known[name]) for name in ("train", "holdout", "val", "pool")}, int(known["classes"])
    else:
        sets, classes = _divided(recipe, sources or given(recipe))
    images = {f"prepare/{name}": n for name, n in sets.items()} | {f"dedup/{name}": n for name, n in sets.items()}
    images["dedup/leaks"] = round(FOUND * sets["pool"])
    if sources is None:
        decided = _metrics("dedup")
        images["dedup/pool"] = min(int(decided.get("kept", sets["pool"])), sets["pool"])
        for name in ("train", "holdout"):
            images[f"dedup/{name}"] = sets[name] - int(decided.get(f"{name}_removed", 0))
        found = _metrics("search")
        if found:
            images["dedup/leaks"] = sum(int(found.get(name, 0)) for name in ("copy", "review", "unverifiable"))
    for entry in recipe.entries("select"):
        select = recipe.tree["select"][entry]
        wanted = images["dedup/pool"] if select.get("rule") == "all" else int(select.get("k", 0)) * classes
        images[f"select/{entry}"] = min(wanted, images["dedup/pool"])
    for entry in recipe.entries("pack"):
        pack = recipe.tree["pack"][entry]
        chosen = images.get(pack.get("images"))
        if chosen is not None:
            added = pack.get("labelled", True) and pack["images"] not in HOLD_TRAIN
            images[f"pack/{entry}"] = chosen + (images["dedup/train"] if added else 0)
    for stage in ("pretrain", "label", "distil", "self_distil"):  # images of a folder that no stage makes
        for entry in recipe.entries(stage):
            name = str(recipe.tree[stage][entry].get("images"))
            if name not in images and (Path("data") / name / manifest.FILE).is_file():
                images[name] = int(pq.read_metadata(Path("data") / name / manifest.FILE).num_rows)
    return Counts(images, classes)


def _divided(recipe: Recipe, sources: Given) -> tuple[dict[str, int], int]:
    params = recipe.section("prepare", None)
    assert isinstance(params, Prepare)
    budget = min(sources.labelled, (params.per_class or sources.labelled) * sources.classes)
    holdout = sources.classes * max(1, round(params.holdout * budget / sources.classes))
    pool = sources.pool + (sources.labelled - budget if params.rest == "pool" else 0)
    return {"train": budget - holdout, "holdout": holdout, "val": sources.val, "pool": pool}, sources.classes


def _metrics(stage: str) -> dict[str, Any]:
    file = Path("data", stage, "metrics.json")
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
