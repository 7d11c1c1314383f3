"""A selection as `select` made it, with the scores and the pool that it was made of."""

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.harness.machine import Machine
from pipeline.stages.select import Select
from pipeline.store import artifact, manifest
from pipeline.store.manifest import Manifest
from pipeline.store.ranking import Taken, ranked, shared_out
from pipeline.store.scores import LOGSUMEXP, Scores, names_of, of_pool


class Selection(NamedTuple):
    """`rows`: (S,) of the pool, ascending. `teacher`: the model directory whose scores these are."""

    params: Select
    pool: Manifest
    scored: Scores
    rows: np.ndarray
    teacher: Path


class Ranks(NamedTuple):
    """The images of a class, the surest first: those that it took, and the next that it did not take. int64 rows of the pool."""

    taken: np.ndarray
    outside: np.ndarray
    last: float
    """log p of the last one that it took; nan where it took none"""


def opened(folder: Path) -> Selection:
    """The selection in `folder`. Raises UserError unless its scores and its pool are still those that it was made of."""
    selected = manifest.read(folder)
    record = artifact.record(folder)
    if record.get("stage") != "select":
        raise UserError(f"{folder} is no selection: name what `select` has made (data/select/<entry>).")
    scores, pool = (_unchanged(folder, record["inputs"][name]) for name in ("scores", "pool"))
    images = manifest.read(pool)
    scored = of_pool(artifact.verify(scores), pool, len(images))
    places = pc.index_in(selected.table["id"], value_set=images.table["id"]).combine_chunks()
    return Selection(Select.model_validate(record["params"]), images, scored, np.asarray(places, np.int64), teacher_of(scores))


def teacher_of(scores: Path) -> Path:
    """The model directory that gave `scores`. Raises UserError unless it is still that one."""
    record = artifact.record(scores)
    if record.get("stage") != "score":
        raise UserError(f"{scores} holds no scores: name what `score` has made (data/score/<entry>).")
    return _unchanged(scores, record["inputs"]["teacher"])


def _unchanged(made: Path, of: dict[str, str]) -> Path:
    path = Path(of["path"])
    if not path.exists() or artifact.identity(path) != of["identity"]:
        raise UserError(f"{path} is not what {made} was made of any more: run `dvc repro`, from the folder that holds dvc.yaml.")
    return path


def ranks(of: Selection, beyond: int, machine: Machine) -> list[Ranks]:
    """For each class its images in order; of those that it did not take the first `beyond`.

    A class of the rules `balanced`, `random` and `all` has the images whose first class it is.
    """
    params, scored = of.params, of.scored
    members, until = params.members(scored), params.skip + params.k
    if params.rule in ("top", "band"):
        with tempfile.TemporaryDirectory() as temp:
            pairs, _ = ranked(scored, members, until + beyond, Path(temp), machine.cores(machine.threads), machine.memory_gb)
        pairs = _in_order(pairs)
        if params.several or members == 1:
            taken = Taken(*(column[_places(pairs.classes) < until] for column in pairs))
        else:
            taken, _ = shared_out(scored, members, until)
        pairs, taken = pairs.after(params.skip), taken.after(params.skip)
    else:
        logit, logsumexp = scored.matrix(["logit_0", LOGSUMEXP]).T
        first = scored.matrix(names_of("class", 1))[:, 0].astype(np.int64)
        pairs = Taken(np.arange(scored.rows), first, np.maximum(logsumexp - logit, np.float32(0)))
        taken = Taken(*(column[of.rows] for column in pairs))
    pairs, taken = _in_order(pairs), _in_order(taken)
    numbers = [t.classes * scored.rows + t.images for t in (pairs, taken)]
    left = Taken(*(column[~np.isin(*numbers)] for column in pairs))
    return [
        Ranks(mine.images, others.images[:beyond], -float(mine.surprisals[-1]) if len(mine.images) else float("nan"))
        for mine, others in zip(_by_class(taken, scored), _by_class(left, scored), strict=True)
    ]


def _in_order(pairs: Taken) -> Taken:
    """Class by class, each from its highest log p down, ties by row."""
    order = np.lexsort((pairs.images, pairs.surprisals, pairs.classes))
    return Taken(*(column[order] for column in pairs))


def _places(classes: np.ndarray) -> np.ndarray:
    """(T,) the place of each pair, in order, in its class."""
    return np.arange(len(classes)) - np.searchsorted(classes, classes)


def _by_class(pairs: Taken, scored: Scores) -> list[Taken]:
    ends = np.searchsorted(pairs.classes, np.arange(len(scored.classes) + 1))
    return [Taken(*(column[a:b] for column in pairs)) for a, b in pairwise(ends)]
