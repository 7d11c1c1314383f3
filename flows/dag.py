"""What DVC knows: the stages, who needs whom, what is stale. The only module that speaks to DVC.

It speaks to the command line, `dvc`, wherever that can say it. It cannot change a parameter without a run, nor take over a lock
entry from another machine: the functions at the end do.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LOOSE_FILE_BYTES = 1_000_000
ALWAYS = "always changed"  # as `dvc status` calls it
MARKER = ".winnow"  # in a new remote that is a folder
NO_PHONING_HOME = {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


class DVCError(Exception):
    """DVC refused; its own words."""


class Unreachable(DVCError):
    """The remote did not give what another machine had pushed to it."""


@dataclass(frozen=True)
class Dag:
    """The stages of dvc.yaml (`distil@ssld`), each after all it needs, and the stages each needs directly."""

    needs: Mapping[str, frozenset[str]]

    def upstream(self, targets: Sequence[str]) -> list[str]:
        """`targets` and everything they need, in an order that can be run. A name without entry (`distil`) means all entries.

        No targets: every stage. Raises DVCError for a target that is not there.
        """
        wanted: set[str] = set()
        waiting = [stage for target in targets for stage in self._matching(target)] if targets else list(self.needs)
        while waiting:
            stage = waiting.pop()
            if stage not in wanted:
                wanted.add(stage)
                waiting += self.needs[stage]
        return [stage for stage in self.needs if stage in wanted]

    def _matching(self, target: str) -> list[str]:
        named = [stage for stage in self.needs if stage == target or stage.startswith(f"{target}@")]
        if not named:
            raise DVCError(f"there is no stage {target!r} in dvc.yaml. There are: {', '.join(self.needs)}.")
        return named

    def affected(self, changed: Mapping[str, Any]) -> list[str]:
        """The stages that may have to run: those of `changed`, and whatever is downstream of them, in order."""
        affected: set[str] = set()
        for stage in self.needs:
            if stage in changed or self.needs[stage] & affected:
                affected.add(stage)
        return [stage for stage in self.needs if stage in affected]


def environment() -> dict[str, str]:
    """This process's environment with the `dvc` and the `python` of its interpreter first in PATH."""
    bin_folder = str(Path(sys.executable).parent)
    return {**os.environ, **NO_PHONING_HOME, "PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", "")])}


def command(*args: str) -> list[str]:
    """`dvc ARGS`, which waits for another command that holds the lock of the repository."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", *args]


def call(folder: Path, *args: str) -> str:
    """The output of `dvc ARGS`. Raises DVCError if it fails."""
    done = subprocess.run(command(*args), cwd=folder, env=environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise DVCError(f"dvc {' '.join(args)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def read(folder: Path) -> Dag:
    """The DAG of dvc.yaml and params.yaml in `folder`. Raises DVCError if they are not valid."""
    dot = call(folder, "dag", "--dot")
    edges = re.findall(r'^"([^"]+)" -> "([^"]+)";', dot, re.M)
    nodes = re.findall(r'^"([^"]+)";', dot, re.M)
    # DVC prints the pipelines of unconnected stages as graphs of their own; the order is that of dvc.yaml within each.
    needs = {node: frozenset(a for a, b in edges if b == node) for node in dict.fromkeys(nodes)}
    return Dag({stage: needs[stage] for stage in _sorted(needs)})


def _sorted(needs: Mapping[str, frozenset[str]]) -> list[str]:
    order: list[str] = []
    while len(order) < len(needs):
        order += [stage for stage, needed in needs.items() if stage not in order and needed <= set(order)]
    return order


def stale(folder: Path, stages: Sequence[str]) -> dict[str, Any]:
    """Those of `stages` whose own code, params, inputs or outputs changed, with what changed.

    Not transitive: a stage whose inputs will be made anew by a stale stage may be missing (`Dag.affected`).
    """
    answer = json.loads(call(folder, "status", "--json", *stages) or "{}")
    return {stage: answer[stage] for stage in stages if stage in answer}


def looking(changes: Mapping[str, Any]) -> list[str]:
    """The stages in an answer of `stale` that have nothing new but run each time, to look at what DVC cannot watch."""
    return [stage for stage, change in changes.items() if list(change) == [ALWAYS]]


def missing_sources(folder: Path, changes: Mapping[str, Any]) -> list[str]:
    """The dependencies in an answer of `stale` that are not there and that no stage makes."""
    made = set(re.findall(r'^"([^"]+)";', call(folder, "dag", "--outs", "--dot"), re.M))
    deps = {
        path: state
        for of_stage in changes.values() for change in of_stage if isinstance(change, Mapping)
        for path, state in change.get("changed deps", {}).items() if isinstance(state, str)
    }  # fmt: skip
    return [path for path, state in deps.items() if state == "deleted" and path not in made]


def only_outputs_missing(changes: Any) -> bool:
    """Whether the outcome of a stage is known, but not in the workspace: a fresh clone."""
    kinds = {kind for change in changes if isinstance(change, Mapping) for kind in change}
    return kinds == {"changed outs"} and all(
        state in ("deleted", "not in cache") for change in changes for state in change["changed outs"].values()
    )


def restorable(folder: Path, order: Sequence[str], stale: Sequence[str]) -> dict[str, bool]:
    """Those of the `stale` stages whose result DVC has, so that it would restore them and not run them; True where that result is
    the one that dvc.lock names.

    `order`: these and all that they need, in order. A stage that needs one which will run is not among them: its inputs are not
    known yet.
    """
    from dvc.repo import Repo

    lock = locked(folder)
    found: dict[str, bool] = {}
    with Repo(str(folder)) as repo:
        # Not `addressing`, which begins with a path where this process works in another folder; a .dvc file has no name.
        stages = {stage.name: stage for stage in repo.index.stages if hasattr(stage, "name")}
        maker = {out.def_path: name for name, stage in stages.items() for out in stage.outs}
        known = {out["path"]: out for name in order if name not in stale for out in lock.get(name, {}).get("outs") or []}
        for name in (name for name in order if name in stale):
            if outs := _result(stages[name], lock.get(name), known, maker, repo):
                known |= {out["path"]: out for out in outs}
                found[name] = outs == lock.get(name, {}).get("outs")
    return found


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
        if not entry or not repo.stage_cache._create_stage(entry, wdir=stage.wdir).outs_cached():
            return None
    except (DvcException, KeyError, OSError, ValueError):  # a dependency that is not there, a cache without an entry
        return None
    return list(entry["outs"])


def repro(stage: str, force: bool = False) -> list[str]:
    """The command that brings one stage up to date and no other."""
    return command("repro", "--single-item", *(["--force"] if force else []), stage)


def has_remote(folder: Path) -> bool:
    """Whether a default remote is configured, through which machines share artifacts.

    Raises DVCError where it is a folder that is not there, or that is empty and without a file MARKER: DVC would make it anew, on
    the disk below a share that is not mounted, and nobody else would see what is pushed.
    """
    name = _configured(folder, "core.remote")
    url = _configured(folder, f"remote.{name}.url") if name else ""
    if name and "://" not in url:
        place = (folder / ".dvc" / url).resolve()  # a relative one is kept as it is seen from the configuration
        new = f"For a new one: `mkdir -p {place} && touch {place / MARKER}`."
        if not place.is_dir():
            raise DVCError(f"the DVC remote `{name}` is the folder {place}, which is not there. Mount it. {new}")
        if not any(place.iterdir()):
            raise DVCError(f"the DVC remote `{name}` is the folder {place}, which is empty. Is it mounted? {new}")
    return bool(name)


def _configured(folder: Path, key: str) -> str:
    return subprocess.run(
        command("config", key), cwd=folder, env=environment(), capture_output=True, text=True
    ).stdout.strip()  # fmt: skip


def override(folder: Path, changes: Sequence[str]) -> None:
    """Change params.yaml in `folder` as `dvc exp run -S CHANGE` would: `distil.ssld.loss.name=js`, `+a.b=1`, `~a.b`.

    Raises DVCError for a change that does not parse or fit, or that has `${...}`: who may start a run may not read this process's
    environment, which OmegaConf would put in for `${oc.env:NAME}`.
    """
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import apply_overrides

    if strange := [change for change in changes if "${" in change]:
        raise DVCError(f"params: {', '.join(strange)}: nothing is put in for `${{...}}` here. Write the value itself.")
    try:
        apply_overrides(folder / "params.yaml", list(changes))
    except DvcException as error:
        raise DVCError(f"params: {', '.join(changes)}: {error.__cause__ or error}") from error


def locked(folder: Path) -> dict[str, Any]:
    """What dvc.lock says about each stage that has run."""
    return dict(_lock(folder)["stages"])


def lock_entry(folder: Path, stage: str) -> dict[str, Any]:
    """What dvc.lock says about a stage that has run. Raises DVCError if it has not."""
    try:
        return dict(_lock(folder)["stages"][stage])
    except KeyError:
        raise DVCError(f"dvc.lock has no entry for {stage}") from None


def loose_files(folder: Path, stage: str) -> dict[str, str]:
    """The outputs of a stage that are files, not folders, by path: its metrics, which lie in git and not on the remote."""
    outs = [out for out in lock_entry(folder, stage)["outs"] if not str(out.get("md5", ".dir")).endswith(".dir")]
    return {out["path"]: (folder / out["path"]).read_text() for out in outs if out["size"] <= LOOSE_FILE_BYTES}


def adopt(folder: Path, stage: str, entry: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Take over what another machine made: its lock entry and metrics from there, its artifacts from the remote.

    Raises Unreachable if the artifacts cannot be pulled, DVCError if they do not fit the code, params and inputs of `folder`;
    dvc.lock and the metrics are then as they were.
    """
    before = {path: (folder / path).read_text() if (folder / path).is_file() else None for path in files}
    known = _enter(folder, stage, entry)
    try:
        _write(folder, files)
        try:
            call(folder, "pull", stage)
        except DVCError as error:
            raise Unreachable(str(error)) from None
        changes = stale(folder, [stage])
        if changes:
            raise DVCError(f"{stage} was made by other code, params or inputs than those here: {json.dumps(changes[stage])}")
    except BaseException:
        _write(folder, before)
        _enter(folder, stage, known)
        raise


def _enter(folder: Path, stage: str, entry: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Put the entry of a stage into dvc.lock, or take it out; returns the one that was there."""
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


def _write(folder: Path, files: Mapping[str, str | None]) -> None:
    """Give files their contents; None: none is to be there."""
    for path, text in files.items():
        if text is None:
            (folder / path).unlink(missing_ok=True)
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)


def _lock(folder: Path) -> dict[str, Any]:
    file = folder / "dvc.lock"
    return (yaml.safe_load(file.read_text()) if file.is_file() else None) or {"schema": "2.0", "stages": {}}
