"""Memory that the processes of a group share on one machine, so that it is there once and each fills a part of it."""

import itertools
import mmap
import os
import sys
import tempfile
import time
from pathlib import Path

from pipeline.harness import ranks

POLL_SECONDS = 0.02

_numbers = itertools.count()


def is_possible() -> bool:
    """Whether this process is one of several on this machine that can share memory: on Linux."""
    return ranks.launched() and ranks.on_this_machine() > 1 and sys.platform == "linux"


class Memory:
    """`size` bytes that are the same in all processes of the group on this machine, zeros at first.

    All of them make their memories in the same order. The kernel takes a memory back with the last process that has it, however
    the processes end. If one of them dies early, the launcher ends those that wait for it.
    """

    def __init__(self, size: int) -> None:
        self.size, self.processes = size, ranks.on_this_machine()
        name = f"winnow-{os.environ.get('TORCHELASTIC_RUN_ID', 'none')}-{os.getppid()}-{next(_numbers)}"
        self.note = Path(tempfile.gettempdir(), name)  # says to the others where the first one has it
        file = self._made() if ranks.local_rank() == 0 else self._found()
        try:
            self.bytes = mmap.mmap(file, size + self.processes)  # the last ones say who has come to `meet`
        finally:
            os.close(file)

    def _made(self) -> int:
        file = os.memfd_create(self.note.name)
        os.ftruncate(file, self.size + self.processes)
        kept = os.dup(file)
        tmp = self.note.with_name(f".{self.note.name}.tmp")
        tmp.write_text(f"/proc/{os.getpid()}/fd/{kept}")
        tmp.rename(self.note)
        self.kept: int | None = kept
        return file

    def _found(self) -> int:
        while not self.note.exists():
            time.sleep(POLL_SECONDS)
        self.kept = None
        return os.open(self.note.read_text(), os.O_RDWR)

    def meet(self) -> None:
        """Wait until all processes have come here."""
        self.bytes[self.size + ranks.local_rank()] = 1
        while any(self.bytes[self.size + process] == 0 for process in range(self.processes)):
            time.sleep(POLL_SECONDS)
        if self.kept is not None:
            self.note.unlink()
            os.close(self.kept)
            self.kept = None
