"""DVC's words, files and private parts: what its command line does not tell, or tells in prose."""

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

KNOWN = "3.67.1"
"""The release of DVC on which all of this was tried."""


class DVCError(Exception):
    """DVC refused; its own words."""


class AnotherDVC(DVCError):
    """The installed DVC lacks a private part that winnow uses."""


@contextlib.contextmanager
def leaning(on: str) -> Iterator[None]:
    """Turn what a changed private part raises into AnotherDVC, which names the releases. `on`: the part."""
    try:
        yield
    except (ImportError, AttributeError, TypeError) as error:
        raise AnotherDVC(
            f"DVC {version('dvc')} is installed, which has no {on} as DVC {KNOWN} had: {error}. `pip install dvc=={KNOWN}`."
        ) from error


# What `dvc` prints ----------------------------------------------------------------------------------------------------

_RUNS = re.compile(r"Running stage '([^']+)'")
_RESTORES = re.compile(r"Stage '([^']+)' is cached")
_EXITED = re.compile(r"failed to run: .*, exited with (-?\d+)", re.S)
_BUSY = re.compile(r"is busy, it is being blocked by|Unable to acquire lock")
COMMAND, ALWAYS = "changed command", "always changed"  # in the answer of `dvc status`
_NODE, _EDGE = re.compile(r'^"([^"]+)";', re.M), re.compile(r'^"([^"]+)" -> "([^"]+)";', re.M)


def outcome(line: str) -> tuple[str, str] | None:
    """(stage, outcome) of a line with which `dvc repro` begins a stage: Completed if it runs, Restored if DVC has its result."""
    for said, what in ((_RUNS, "Completed"), (_RESTORES, "Restored")):
        if match := said.match(line):
            return match[1], what
    return None


def exit_code(text: str) -> int | None:
    """The exit code of the stage that failed (-n: signal n), in the output of `dvc repro`, whose own code is always 255."""
    exited = _EXITED.search(text)
    return int(exited[1]) if exited else None


def is_busy(text: str) -> bool:
    """Whether `dvc` ended because another one has the lock of the repository, or of a path."""
    return bool(_BUSY.search(text))


def errors(lines: Sequence[str]) -> list[str]:
    """What `dvc` says went wrong, each once; the last is only a count (`3 files failed to upload`)."""
    return list(dict.fromkeys(line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")))


def graph(dot: str) -> dict[str, frozenset[str]]:
    """The nodes in the output of `dvc dag --dot`, and what each of them needs directly."""
    edges = _EDGE.findall(dot)
    return {node: frozenset(a for a, b in edges if b == node) for node in dict.fromkeys(_NODE.findall(dot))}


@dataclass(frozen=True)
class Changes:
    """What `dvc status` says of a stage, by path: deleted, modified, new, not in cache.

    `params`: keys by file. `command`: whether its line in dvc.yaml is another one. `always`: whether it runs each time. `others`:
    what else was said.
    """

    deps: Mapping[str, str] = field(default_factory=dict)
    outs: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Sequence[str]] = field(default_factory=dict)
    command: bool = False
    always: bool = False
    others: Sequence[str] = ()

    @property
    def only_missing(self) -> bool:
        """Whether nothing changed, but outputs are not in the workspace: a fresh clone."""
        return (
            bool(self.outs)
            and all(state in ("deleted", "not in cache") for state in self.outs.values())
            and not (self.deps or self.params or self.command or self.always or self.others)
        )


def changes(status: str) -> dict[str, Changes]:
    """The answer of `dvc status --json`, by stage."""
    with leaning("`dvc status --json`"):
        return {stage: _changes(told) for stage, told in json.loads(status or "{}").items()}


def _changes(told: Sequence[Any]) -> Changes:
    kinds = {kind: what for change in told if isinstance(change, Mapping) for kind, what in change.items()}
    deps = kinds.pop("changed deps", {})
    outs = kinds.pop("changed outs", {})
    said = [change for change in told if isinstance(change, str)]
    return Changes(
        deps={path: state for path, state in deps.items() if isinstance(state, str)},
        outs=dict(outs),
        params={file: list(keys) for file, keys in deps.items() if isinstance(keys, Mapping)},
        command=COMMAND in said,
        always=ALWAYS in said,
        others=(*kinds, *(word for word in said if word not in (COMMAND, ALWAYS))),
    )


# dvc.lock -------------------------------------------------------------------------------------------------------------


def locked(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of dvc.lock by stage: its `cmd`, `deps`, `params`, and `outs` (each with `path`, `md5`, `size`)."""
    return dict(_lock(folder)["stages"])


def enter(folder: Path, stage: str, entry: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Put the entry of a stage into dvc.lock, or take it out (None), under DVC's own lock; returns the one that was there."""
    with leaning("`Repo.lock`"):
        from dvc.repo import Repo

        with Repo(str(folder), _wait_for_lock=True) as repo, repo.lock:
            lock = _lock(folder)
            before: Mapping[str, Any] | None = lock["stages"].pop(stage, None)
            if entry is not None:
                lock["stages"][stage] = dict(entry)
            new = folder / "dvc.lock.new"
            new.write_text(yaml.safe_dump(lock, sort_keys=False))
            new.rename(folder / "dvc.lock")
    return before


def _lock(folder: Path) -> dict[str, Any]:
    file = folder / "dvc.lock"
    return (yaml.safe_load(file.read_text()) if file.is_file() else None) or {"schema": "2.0", "stages": {}}


# What it would restore ------------------------------------------------------------------------------------------------


def restorable(folder: Path, order: Sequence[str], stale: Sequence[str]) -> dict[str, bool]:
    """Those of the `stale` stages whose result DVC has, so that it would restore them and not run them; True where that result is
    the one that dvc.lock names.

    `order`: these and all that they need, in order. A stage that needs one which will run is not among them: its inputs are not
    known yet. Raises AnotherDVC.
    """
    with leaning("`Repo.index` and `Repo.stage_cache`"):
        from dvc.repo import Repo

        lock = locked(folder)
        found: dict[str, bool] = {}
        with Repo(str(folder)) as repo:
            stages = _stages(repo)
            maker = {out.def_path: name for name, stage in stages.items() for out in stage.outs}
            known = {out["path"]: out for name in order if name not in stale for out in lock.get(name, {}).get("outs") or []}
            for name in (name for name in order if name in stale):
                if outs := _result(stages[name], lock.get(name), known, maker, repo):
                    known |= {out["path"]: out for out in outs}
                    found[name] = outs == lock.get(name, {}).get("outs")
        return found


def _stages(repo: Any) -> dict[str, Any]:
    """Not by `addressing`, which begins with a path where this process works in another folder; a .dvc file has no name."""
    return {stage.name: stage for stage in repo.index.stages if hasattr(stage, "name")}


def _result(stage: Any, entry: Any, known: Mapping[str, Any], maker: Mapping[str, str], repo: Any) -> list[Any] | None:
    """The outputs that DVC would give a stage without running it; None if it would run it. `known`: the outputs above it."""
    from dvc.exceptions import DvcException
    from dvc.stage.cache import _get_cache_hash
    from dvc.stage.serialize import to_single_stage_lockfile
    from dvc_data.hashfile.hash_info import HashInfo

    recorded = {dep["path"]: dep for dep in (entry or {}).get("deps") or []}
    try:
        for dep in stage.deps:
            inside = [path for path in maker if path.startswith(f"{dep.def_path}/")]
            if dep.def_path in maker or inside:
                if any(path not in known for path in ([dep.def_path] if dep.def_path in maker else inside)):
                    return None
                # A folder of several outputs: where all of them are known it is taken to be the one that was recorded.
                same = known[dep.def_path] if dep.def_path in maker else recorded[dep.def_path]
                dep.hash_info = HashInfo("md5", same["md5"])
            else:
                dep.save()
        key = _get_cache_hash(to_single_stage_lockfile(stage), key=True)
        if entry is None or _get_cache_hash(dict(entry), key=True) != key:
            folder = Path(repo.stage_cache._get_cache_dir(key))
            entry = repo.stage_cache._load_cache(key, max(folder.iterdir(), key=lambda file: file.stat().st_mtime).name)
        elif stage.always_changed:  # DVC keeps no run of it; what it will find is taken to be what it found
            return list(entry["outs"])
        if not entry or not _with_outs(entry, stage, repo).outs_cached():
            return None
    except (DvcException, KeyError, OSError, ValueError):  # a dependency that is not there, a cache without an entry
        return None
    return list(entry["outs"])


def _with_outs(entry: Mapping[str, Any], stage: Any, repo: Any) -> Any:
    """The stage with the outputs of a lock entry. (`repo.stage_cache._create_stage` works only in the folder of the project.)"""
    from dvc.stage import PipelineStage, create_stage
    from dvc.stage.loader import StageLoader

    outs = [out["path"] for out in entry["outs"]]
    made = create_stage(PipelineStage, repo=repo, path=stage.path, cmd=entry["cmd"], wdir=stage.wdir, outs=outs)
    StageLoader.fill_from_lock(made, entry)
    return made


@dataclass(frozen=True)
class Read:
    """A stage as DVC has read it: the paths that it reads and that it writes into DVC's cache, and what decides its result.

    `decides`: of its command, its params, and the same of all it needs; not of code and sources. Equal in two folders with the
    same files where params.yaml differs in nothing that the stage, or one above it, reads.
    """

    deps: Sequence[str]
    outs: Sequence[str]
    decides: str


def stages(folder: Path) -> dict[str, Read]:
    """The stages of dvc.yaml in `folder`, by name. Raises AnotherDVC."""
    with leaning("`Repo.index` and `ParamsDependency`"):
        from dvc.dependency import ParamsDependency
        from dvc.repo import Repo

        found: dict[str, Read] = {}
        with Repo(str(folder)) as repo:
            named = _stages(repo)
            maker = {out.def_path: name for name, stage in named.items() for out in stage.outs}

            def read(name: str) -> Read:
                if name not in found:
                    stage = named[name]
                    params = [dep.read_params() for dep in stage.deps if isinstance(dep, ParamsDependency)]
                    deps = [dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)]
                    above = sorted({n for dep in deps for out, n in maker.items() if f"{out}/".startswith(f"{dep}/")})
                    decides = json.dumps([stage.cmd, params, deps, [read(n).decides for n in above]], sort_keys=True, default=str)
                    outs = [out.def_path for out in stage.outs if out.use_cache]
                    found[name] = Read(deps, outs, hashlib.sha256(decides.encode()).hexdigest())
                return found[name]

            for name in named:
                read(name)
        return found


# Changes of params ----------------------------------------------------------------------------------------------------


def apply(file: Path, overrides: Sequence[str]) -> None:
    """Change a params file as `dvc exp run -S OVERRIDE` would. Raises DVCError with why it cannot."""
    with leaning("`dvc.utils.hydra.apply_overrides`"):
        from dvc.exceptions import DvcException
        from dvc.utils.hydra import apply_overrides

        try:
            apply_overrides(file, list(overrides))
        except DvcException as error:
            raise DVCError(f"params: {', '.join(overrides)}: {error.__cause__ or error}") from error


def choices(overrides: Sequence[str], most: int) -> list[list[str]]:
    """For each override the ones it stands for: `seed=1,2` and `seed=range(1,3)` for two, any other for itself; those after the
    first `most` + 1 are left out. Raises DVCError for one that does not parse, or that stands for no list."""
    with leaning("`dvc.utils.hydra.to_hydra_overrides`"):
        from dvc.utils.hydra import to_hydra_overrides
        from hydra.errors import HydraException

        try:
            parsed = to_hydra_overrides(list(overrides))
        except HydraException as error:
            raise DVCError(f"params: {', '.join(overrides)}: {error}") from error
        found = []
        for text, override in zip(overrides, parsed, strict=True):
            if not override.is_sweep_override():
                found.append([text])
            elif override.is_discrete_sweep():
                values = itertools.islice(override.sweep_string_iterator(), most + 1)
                found.append([f"{override.get_key_element()}={value}" for value in values])
            else:
                raise DVCError(f"params: {text}: no list of values. Write them: `{override.get_key_element()}=1,2,3`.")
    return found
