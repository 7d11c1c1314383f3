"""Send the journals of the stages to MLflow: `python -m pipeline.tracking flush`."""

import argparse
import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from pipeline.harness import credentials
from pipeline.harness.journal import DEFAULT_URI, experiment_name, has_ended, start_mirror
from pipeline.tracking import leaderboard
from pipeline.tracking.experiment import database_of
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.waiting import journal_files

JOURNALS = Path(".scratch", "journal")
WORKTREES = Path(".scratch", "worktrees")  # of flows/worktree.py


def flush(folder: Path, timeout: float) -> str:
    """Wait until all runs that have ended are in MLflow, at most `timeout` seconds; return what to tell the user.

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
    sent = len(ended) - len(waiting) - lost
    message = f"tracking: {sent} runs sent now (others while they ran), {len(waiting)} waiting; {_where_to_look()}"
    if waiting:
        message += f"\n  The store does not answer ({folder}/mirror.log). The next stage tries again, or the same command."
    if lost:
        message += f"\n  {lost} runs were refused ({folder}/mirror.log says why). The same command tries again."
    return message


def _flush_in(worktree: Path, timeout: float) -> str:
    """`flush` of a flow's worktree, kept for its journals; in its folder, as they name files from there."""
    command = [sys.executable, "-m", "pipeline.tracking", "flush", "--timeout", str(timeout)]
    done = subprocess.run(command, cwd=worktree, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stdout.strip() or done.stderr.strip()


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
    args = parser.parse_args()
    credentials.mask_output()
    if args.command == "flush":
        sys.stdout.write(flush(args.folder, args.timeout) + "\n")
        for worktree in sorted(WORKTREES.glob("*")):
            if any((worktree / JOURNALS).rglob("*.jsonl")):
                sys.stdout.write(f"{worktree}: {_flush_in(worktree, args.timeout)}\n")
    else:
        os.nice(5)
        Mirror(args.folder).follow()


if __name__ == "__main__":
    main()
