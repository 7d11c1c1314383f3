"""Work for shards. A new process imports this file alone, not the tests, which need torch."""

import os
import signal
import time
from pathlib import Path

from pipeline.errors import UserError
from pipeline.store import artifact


def square(folder: Path, n: int) -> int:
    with artifact.writing_file(folder / f"{n}.txt") as tmp:
        tmp.write_text(f"{n * n}\n")
    return n


def killed_once(folder: Path, n: int) -> int:
    """The process of the fourth shard is killed the first time, before it has written anything."""
    if n == 3 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return square(folder, n)


def killed(folder: Path, n: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return n


def refused(folder: Path, n: int) -> int:
    raise UserError("an image is damaged")


def slow(folder: Path, n: int) -> int:
    (folder / f"{n}.pid").write_text(str(os.getpid()))
    time.sleep(0.5)
    return square(folder, n)
