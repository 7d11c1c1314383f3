"""What DVC knows: the stages, who needs whom, what is stale, through its command line. What that cannot say, or says in prose, is
read by `flows.adapter.dvc`.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.adapter import dvc
from flows.adapter.dvc import Changes, DVCError

LOOSE_FILE_BYTES = 1_000_000
MARKER = ".winnow"  # in a new remote that is a folder
NO_PHONING_HOME = {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


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
    # DVC prints the pipelines of unconnected stages as graphs of their own; the order is that of dvc.yaml within each.
    needs = dvc.graph(call(folder, "dag", "--dot"))
    return Dag({stage: needs[stage] for stage in _sorted(needs)})


def _sorted(needs: Mapping[str, frozenset[str]]) -> list[str]:
    order: list[str] = []
    while len(order) < len(needs):
        order += [stage for stage, needed in needs.items() if stage not in order and needed <= set(order)]
    return order


def stale(folder: Path, stages: Sequence[str]) -> dict[str, Changes]:
    """Those of `stages` whose own code, params, inputs or outputs changed, with what changed.

    Not transitive: a stage whose inputs will be made anew by a stale stage may be missing (`Dag.affected`).
    """
    answer = dvc.changes(call(folder, "status", "--json", *stages))
    return {stage: answer[stage] for stage in stages if stage in answer}


def looking(changes: Mapping[str, Changes]) -> list[str]:
    """The stages in an answer of `stale` that have nothing new but run each time, to look at what DVC cannot watch."""
    return [stage for stage, change in changes.items() if change == Changes(always=True)]


def missing_sources(folder: Path, changes: Mapping[str, Changes]) -> list[str]:
    """The dependencies in an answer of `stale` that are not there and that no stage makes."""
    made = dvc.graph(call(folder, "dag", "--outs", "--dot"))
    deps = {path: state for of_stage in changes.values() for path, state in of_stage.deps.items()}
    return [path for path, state in deps.items() if state == "deleted" and path not in made]


def repro(*stages: str, force: bool = False) -> list[str]:
    """The command that brings these stages up to date and no others."""
    return command("repro", "--single-item", *(["--force"] if force else []), *stages)


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
    if strange := [change for change in changes if "${" in change]:
        raise DVCError(f"params: {', '.join(strange)}: nothing is put in for `${{...}}` here. Write the value itself.")
    dvc.apply(folder / "params.yaml", changes)


def lock_entry(folder: Path, stage: str) -> dict[str, Any]:
    """What dvc.lock says about a stage that has run. Raises DVCError if it has not."""
    try:
        return dvc.locked(folder)[stage]
    except KeyError:
        raise DVCError(f"dvc.lock has no entry for {stage}") from None


def loose_files(folder: Path, stage: str) -> dict[str, str]:
    """The outputs of a stage that are files, not folders, by path: its metrics, which lie in git and not on the remote."""
    outs = [out for out in lock_entry(folder, stage)["outs"] if not str(out.get("md5", ".dir")).endswith(".dir")]
    return {out["path"]: (folder / out["path"]).read_text() for out in outs if out["size"] <= LOOSE_FILE_BYTES}


def adopt(folder: Path, stage: str, entry: Mapping[str, Any], files: Mapping[str, str], how: str = "pull") -> None:
    """Take over what another machine made: its lock entry and metrics from there, its artifacts from the remote; or, with
    `checkout`, what was made in another folder of this one, from the cache.

    Raises Unreachable if the artifacts cannot be had, DVCError if they do not fit the code, params and inputs of `folder`;
    dvc.lock and the metrics are then as they were.
    """
    before = {path: (folder / path).read_text() if (folder / path).is_file() else None for path in files}
    known = dvc.enter(folder, stage, entry)
    try:
        _write(folder, files)
        try:
            call(folder, how, stage)
        except DVCError as error:
            raise Unreachable(str(error)) from None
        changes = stale(folder, [stage])
        if changes:
            raise DVCError(f"{stage} was made by other code, params or inputs than those here: {changes[stage]}")
    except BaseException:
        _write(folder, before)
        dvc.enter(folder, stage, known)
        raise


def _write(folder: Path, files: Mapping[str, str | None]) -> None:
    """Give files their contents; None: none is to be there."""
    for path, text in files.items():
        if text is None:
            (folder / path).unlink(missing_ok=True)
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
