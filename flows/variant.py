"""The params of a run: those of params.yaml, or some combinations of changes of them, each in a folder of its own."""

import asyncio
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import yaml
from prefect import get_run_logger

from flows import child, dag, tracking, worktree
from flows.adapter import dvc
from flows.attempt import Where

LONGEST = 40  # characters of a label


class WrongParams(Exception):
    """params.yaml, or a change of it, has mistakes: all of them."""


@dataclass(frozen=True)
class Combination:
    """Changes of params.yaml, and what tells them from the others of a sweep: a label, and the value of each key that varies."""

    set_params: Sequence[str] = ()
    label: str = ""
    values: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Variant:
    """A combination on its way: its folder, its stages, and what of them is to do."""

    combination: Combination
    where: Where
    graph: dag.Dag
    wanted: Sequence[str]
    changes: dict[str, dvc.Changes]
    reads: Mapping[str, dvc.Read]
    looked: set[str] = field(default_factory=set)
    """The stages that have looked at what DVC cannot watch; it takes them for changed for ever."""

    @property
    def todo(self) -> list[str]:
        stale = self.graph.affected(self.changes)
        return [s for s in self.wanted if self.where.force or s in stale]

    @property
    def ends(self) -> list[str]:
        """The wanted stages that no other of them needs."""
        needed = frozenset[str]().union(*(self.graph.needs[s] for s in self.wanted))
        return [s for s in self.wanted if s not in needed]


def combinations(set_params: Sequence[str], at_most: int) -> list[Combination]:
    """Every combination of the values in `set_params` (`seed=1,2`); one without a label where none has several.

    Raises WrongParams for what does not parse and for more than `at_most`.
    """
    try:
        choices = dvc.choices(set_params, at_most)
    except dvc.DVCError as error:
        raise WrongParams(str(error)) from None
    several = [of_one for of_one in choices if len(of_one) > 1]
    if math.prod(map(len, several)) > at_most:
        sizes = " x ".join(f"{'more than ' if len(one) > at_most else ''}{min(len(one), at_most)}" for one in several)
        keys = ", ".join(one[0].partition("=")[0] for one in several)
        raise WrongParams(
            f"set_params: {sizes} values of {keys} are more than {at_most} combinations. Give fewer, or raise `at_most`. "
            "(A value that is a list is written [1,2].)"
        )
    found = list(product(*choices))
    if not several:
        return [Combination(list(one)) for one in found]
    values = [
        dict(change.lstrip("+").split("=", 1) for change, of_one in zip(one, choices, strict=True) if len(of_one) > 1)
        for one in found
    ]
    labels = [re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(of_one.values())).strip("-")[:LONGEST] for of_one in values]
    twice = Counter(labels)
    names = [label if label and twice[label] == 1 else f"{label}-{i + 1}".strip("-") for i, label in enumerate(labels)]
    return [Combination(list(one), name, value) for one, name, value in zip(found, names, values, strict=True)]


async def check(folder: Path, *args: str) -> None:
    """Raises WrongParams with all that is wrong in params.yaml: a stage would say so only when DVC has removed its old output.

    With `--names` of its names alone, which is what has to be known before DVC reads a file that comes from elsewhere.
    """
    ended = await child.run(["python", "-m", "pipeline", "check", *args], cwd=folder, env=dag.environment())
    if ended.code:
        raise WrongParams(ended.text.partition("error: ")[2] or ended.text)


async def scan(folder: Path) -> None:
    """Raises WrongParams with what DVC cannot watch: at a pipe it would wait for ever."""
    ended = await child.run(["python", "-m", "pipeline", "scan"], cwd=folder, env=dag.environment())
    if ended.code:
        raise WrongParams(ended.text.partition("error: ")[2] or ended.text)


async def check_all(workspace: Path, combinations: Sequence[Combination]) -> None:
    """Raises WrongParams for the first combination of which params.yaml is not right, before a folder is made for any."""
    for one in combinations:
        if not one.set_params:
            await check(workspace)
            continue
        with tempfile.TemporaryDirectory() as place:
            changed = Path(place, "params.yaml")
            changed.write_bytes((workspace / "params.yaml").read_bytes())
            try:
                dag.override(changed.parent, one.set_params)
                await check(workspace, "--params", str(changed))
            except (WrongParams, dag.DVCError) as error:
                text = str(error).replace(str(changed), "params.yaml")
                raise WrongParams(f"{text}\nIn set_params: {' '.join(one.set_params)}. Nothing was run.") from None


async def prepared(workspace: Path, one: Combination, targets: Sequence[str], force: bool) -> Variant:
    """The folder of a combination (the workspace, where nothing is changed), and what DVC says of it."""
    folder = workspace
    if one.set_params:
        folder = await asyncio.to_thread(_folder, workspace, one.set_params)
        get_run_logger().info("%sworking in %s", f"{one.label}: " if one.label else "", folder)
    tags = {**tracking.tags(), **({"winnow.variant": one.label} if one.label else {})}
    env = {"WINNOW_TAGS": json.dumps(tags), "MLFLOW_TRACKING_URI": tracking.uri(workspace)}
    await scan(folder)
    graph = await asyncio.to_thread(dag.read, folder)
    wanted = graph.upstream(targets)
    changes = await asyncio.to_thread(dag.stale, folder, wanted)
    if folder != workspace:
        sources = await asyncio.to_thread(dag.missing_sources, folder, changes)
        worktree.link_sources(workspace, folder, sources)
        await scan(folder)
    where = Where(folder, workspace, force, env, await asyncio.to_thread(dag.has_remote, folder), one.label)
    return Variant(one, where, graph, wanted, changes, await asyncio.to_thread(_reads, folder))


async def ask(variant: Variant) -> None:
    """Ask DVC anew what of a variant is to do."""
    found = await asyncio.to_thread(dag.stale, variant.where.folder, variant.wanted)
    variant.changes = {s: change for s, change in found.items() if s not in variant.looked}


def _reads(folder: Path) -> dict[str, dvc.Read]:
    """What the stages read and write; nothing where another DVC cannot be asked: a run needs it for lineage and sharing only."""
    try:
        return dvc.stages(folder)
    except Exception as error:  # private parts of DVC, which an update may change
        get_run_logger().warning("no assets are told, and the variants of a sweep share nothing: %r", error)
        return {}


def _folder(workspace: Path, set_params: Sequence[str]) -> Path:
    """A worktree with the tracked files as they are now, and the changed params."""
    head, tree = worktree.git(workspace, "rev-parse", "HEAD"), worktree.tree(workspace)
    folder = worktree.make(workspace, head, key=[tree, *set_params], tree=tree)
    worktree.git(folder, "checkout", "--quiet", tree, "--", "params.yaml")
    dag.override(folder, set_params)
    return folder


def shared(variants: Sequence[Variant]) -> dict[str, tuple[str, Variant]]:
    """The stages, as the run calls them, that an earlier variant does with the same params and inputs: which one, and its name
    there."""
    first: dict[tuple[str, str], Variant] = {}
    found = {}
    for variant in variants:
        for stage in variant.todo:
            if stage not in variant.reads:
                continue
            earlier = first.setdefault((stage, variant.reads[stage].decides), variant)
            if earlier is not variant:
                found[variant.where.named(stage)] = earlier.where.named(stage), earlier
    return found


def figures(variant: Variant) -> dict[str, float]:
    """The numbers that the last stages of a variant have measured, by name; with the stage before it where there are several."""
    found: dict[str, float] = {}
    for stage in variant.ends:
        for path, text in dag.loose_files(variant.where.folder, stage).items():
            metrics = json.loads(text) if path.endswith(".json") else {}
            prefix = f"{stage} " if len(variant.ends) > 1 else ""
            found |= {f"{prefix}{k}": v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return found


def params_of(folder: Path) -> dict[str, object]:
    """params.yaml of a folder."""
    return dict(yaml.safe_load((folder / "params.yaml").read_text()))
