"""Send the journals of the stages to MLflow: `python -m pipeline.tracking flush`."""

import argparse
import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from pipeline.harness import credentials
from pipeline.harness.journal import DEFAULT_URI, experiment_name, has_ended, start_mirror
from pipeline.tracking import leaderboard
from pipeline.tracking.experiment import database_of
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.waiting import journal_files

JOURNALS = Path(".scratch", "journal")
WORKTREES = Path(".scratch", "worktrees")  # of flows/worktree.py


class Sent(NamedTuple):
    """Runs that have ended: sent to MLflow just now, waiting for a store that does not answer, refused by it."""

    now: int
    waiting: int
    refused: int


def flush(folder: Path, timeout: float) -> str:
    """Send what waits in the folder of journals, and in the worktrees of flows; return what to tell the user of all of it.

    At most `timeout` seconds for each.
    """
    found = {folder: send(folder, timeout)}
    for worktree in sorted(WORKTREES.glob("*")):
        if any((worktree / JOURNALS).rglob("*.jsonl")):
            found[worktree / JOURNALS] = _send_in(worktree, timeout)
    now, waiting = sum(sent.now for sent in found.values()), sum(sent.waiting for sent in found.values())
    others = sum(found[place].now > 0 for place in found if place != folder)
    where = f", of {others} other folder{'s' if others > 1 else ''}, too" if others else ""
    message = f"tracking: {now} runs sent now (others while they ran){where}, {waiting} waiting; {_where_to_look()}"
    for place, sent in found.items():
        if sent.waiting:
            message += f"\n  The store does not answer ({place}/mirror.log). The next stage tries again, or the same command."
        if sent.refused:
            message += f"\n  {sent.refused} runs were refused ({place}/mirror.log says why). The same command tries again."
    return message


def send(folder: Path, timeout: float) -> Sent:
    """Wait until all runs of a folder that have ended are in MLflow, at most `timeout` seconds.

    Tries again what was refused. With MLFLOW_TRACKING_URI set, what waits for another store is sent there.
    """
    refused = folder / "refused"
    for path in sorted(refused.glob("*"), key=lambda p: p.suffix == ".jsonl"):
        path.rename(folder / path.name)
    ended = waiting = [file for file in journal_files(folder) if has_ended(file)]
    if waiting:
        (folder / "flush").write_text(credentials.masked(os.environ.get("MLFLOW_TRACKING_URI", "")))
    deadline = time.monotonic() + timeout
    while waiting and time.monotonic() < deadline:
        start_mirror(folder)
        time.sleep(min(0.5, timeout))
        waiting = [file for file in waiting if file.exists()]
    lost = sum((refused / file.name).exists() for file in ended)
    return Sent(len(ended) - len(waiting) - lost, len(waiting), lost)


def _send_in(worktree: Path, timeout: float) -> Sent:
    """`send` of a flow's worktree, kept for its journals; in its folder, as they name files from there."""
    command = [sys.executable, "-m", "pipeline.tracking", "flush", "--count", "--timeout", str(timeout)]
    done = subprocess.run(command, cwd=worktree, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:  # its traceback is on stderr; a worktree of an older commit knows no --count
        return Sent(0, sum(1 for _ in (worktree / JOURNALS).rglob("*.jsonl")), 0)
    return Sent(*json.loads(done.stdout.splitlines()[-1]))


def _where_to_look() -> str:
    uri = os.environ.get("MLFLOW_TRACKING_URI", DEFAULT_URI)
    if uri.startswith("http"):
        return f"see them at {credentials.link(uri)}"
    # The first page of MLflow 3 speaks of prompts and traces; these list the models, or the runs of the stages.
    models = _experiment_of_models(database_of(uri))
    page = leaderboard.address(models) if models else "/#/experiments/1/runs"
    return f"see them with .venv/bin/mlflow ui --backend-store-uri {credentials.masked(uri)} at\n  http://127.0.0.1:5000{page}"


def _experiment_of_models(database: Path | None) -> str | None:
    """Its number; None where nothing was compared yet."""
    if database is None or not database.is_file():
        return None
    name = experiment_name() + leaderboard.SUFFIX
    with contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as opened:
        try:
            row = opened.execute("select experiment_id from experiments where name = ?", (name,)).fetchone()
        except sqlite3.Error:
            return None  # another kind of store, or one that is being made
    return str(row[0]) if row else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.tracking", description="Send the journals of the stages to MLflow.")
    parser.add_argument("command", choices=["flush", "follow"], help="flush: send what waits; follow: what the stages start")
    parser.add_argument("--folder", type=Path, default=JOURNALS, help="the folder of the journals")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="how long flush waits")
    parser.add_argument("--count", action="store_true", help="flush of this folder alone; [sent, waiting, refused] as JSON")
    args = parser.parse_args()
    credentials.mask_output()
    if args.command == "flush" and args.count:
        sys.stdout.write(json.dumps(send(args.folder, args.timeout)) + "\n")
    elif args.command == "flush":
        sys.stdout.write(flush(args.folder, args.timeout) + "\n")
    else:
        os.nice(5)
        Mirror(args.folder).follow()


if __name__ == "__main__":
    main()
