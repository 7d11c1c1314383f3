"""A folder of its own for a run that must not touch the workspace: a variant of the params, or a stage for another machine.

It is a git worktree below `.scratch/worktrees/`, with its own params.yaml, dvc.lock and data/, and with DVC's cache and the
MLflow store of the workspace. As long as it is there, a stage that was killed in it goes on where it stopped.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from flows import dag

WORKTREES = Path(".scratch", "worktrees")
LOCAL_CONFIG = Path(".dvc", "config.local")
WHOLE = Path(".dvc", "tmp", "whole")  # in a worktree that was made to its end, and whose removal has not begun
DURATIONS = Path(".scratch", "durations.jsonl")


class WorktreeError(Exception):
    """The folder cannot be made: what to do about it."""


def git(folder: Path, *args: str) -> str:
    """The output of `git ARGS`. Raises WorktreeError if it fails."""
    done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise WorktreeError(f"git {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout.strip()


def tree(folder: Path) -> str:
    """The git tree of the tracked files as they are now; the same for the same content."""
    return git(folder, "rev-parse", f"{git(folder, 'stash', 'create') or 'HEAD'}^{{tree}}")


def changed(folder: Path) -> list[str]:
    """The tracked files that differ from HEAD, but for the params and what the stages write: others elsewhere cannot see them."""
    names = git(folder, "diff", "--name-only", "HEAD").splitlines()
    return [name for name in names if name not in ("params.yaml", "dvc.lock") and not name.startswith("data/")]


def make(
    workspace: Path, at: str, *, key: Sequence[str], tree: str = "", params: str | None = None, lock: str | None = None
) -> Path:
    """The worktree for `key`, at the commit `at`: the one that an interrupted run has left, or a new one.

    `tree`: the git tree whose files a new one gets, where they are not those of the commit. `params` and `lock` are the contents
    of params.yaml and dvc.lock; by default those of the commit, and of the workspace.
    Data that no stage makes and git does not hold (`data/raw`, a teacher of your own) is linked from the workspace.
    Raises WorktreeError if the commit is not in this clone.
    """
    name = hashlib.sha256("\0".join([at, *key]).encode()).hexdigest()[:12]
    folder = (workspace / WORKTREES / name).absolute()
    if not (folder / WHOLE).is_file():
        _fetch(workspace, at)
        shutil.rmtree(folder, ignore_errors=True)
        git(workspace, "worktree", "prune")
        git(workspace, "worktree", "add", "--detach", "--force", str(folder), at)
        if tree:
            git(folder, "read-tree", "--reset", "-u", tree)
        _same_cache(workspace, folder)
        (folder / WHOLE).parent.mkdir(parents=True, exist_ok=True)
        (folder / WHOLE).touch()
        _same_memory(workspace, folder)
    if params is not None:
        (folder / "params.yaml").write_text(params)
    if lock is None and (workspace / "dvc.lock").is_file() and not (folder / "dvc.lock").is_file():
        lock = (workspace / "dvc.lock").read_text()
    if lock is not None:
        (folder / "dvc.lock").write_text(lock)
    return folder


def _fetch(workspace: Path, at: str) -> None:
    known = ["git", "cat-file", "-e", f"{at}^{{commit}}"]
    if subprocess.run(known, cwd=workspace, capture_output=True).returncode:
        if git(workspace, "remote"):
            git(workspace, "fetch", "--quiet")
        if subprocess.run(known, cwd=workspace, capture_output=True).returncode:
            raise WorktreeError(
                f"{workspace} does not have the commit {at[:12]} that the flow runs. Push it, then repeat the run."
            )


def _same_cache(workspace: Path, folder: Path) -> None:
    mine = workspace / LOCAL_CONFIG
    if mine.is_file():
        shutil.copyfile(mine, folder / LOCAL_CONFIG)
    cache = dag.call(workspace, "cache", "dir").strip()
    dag.call(folder, "config", "--local", "cache.dir", str((workspace / cache).resolve()))


def _same_memory(workspace: Path, folder: Path) -> None:
    """What stages take in the worktree is remembered in the workspace, from where plans are made (`flows.plan`)."""
    here = folder / DURATIONS
    here.parent.mkdir(parents=True, exist_ok=True)
    (workspace / DURATIONS).parent.mkdir(parents=True, exist_ok=True)
    here.symlink_to(workspace.absolute() / DURATIONS)


def link_sources(workspace: Path, folder: Path, sources: Sequence[str]) -> None:
    """Give the worktree the `sources` that it lacks and the workspace has."""
    for source in sources:
        there, here = workspace / source, folder / source
        if there.exists() and not here.exists() and not Path(source).is_absolute():
            here.parent.mkdir(parents=True, exist_ok=True)
            here.symlink_to(os.path.relpath(there, here.parent))


def remove(workspace: Path, folder: Path) -> bool:
    """Remove a worktree that has done its work; not while journals are there that MLflow has not taken."""
    if any((folder / ".scratch" / "journal").rglob("*.jsonl")):
        return False
    (folder / WHOLE).unlink(missing_ok=True)  # first: after a kill, half a worktree would pass for a whole one
    git(workspace, "worktree", "remove", "--force", str(folder))
    return True
