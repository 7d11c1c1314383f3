"""A hostile case, and the judge: what it ends in, and whether that was promised."""

import contextlib
import hashlib
import io
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from pipeline.errors import UserError

SECONDS = 120.0  # of a case, which takes some hundredths; a loaded machine is no hang
MEMORY = 3 << 30  # bytes that a case may ask for
RAN = "foreign-code-ran"
"""What hostile code makes in its folder if it is run."""

Promise = Literal["refused", "works", "either"]
"""`refused`: a UserError that says what to do. `works`: it ends well, and `call` checks what came out. `either` of the two."""


@dataclass(frozen=True)
class Case:
    """`make` writes the input into an empty folder; `call` is what a command does with it there, and returns nothing, or whether
    what came out is right. `told`: what a refusal must say."""

    kind: str
    name: str
    promise: Promise
    make: Callable[[Path], Any]
    call: Callable[[Path], Any]
    told: str = ""


class Hang(BaseException):
    """A case takes longer than SECONDS."""


def judged(case: Case, seconds: float = SECONDS) -> str:
    """Why a case did not hold; an empty text if it did."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        folder, before = Path(name), Path.cwd()
        os.chdir(folder)
        try:
            case.make(folder)
            made = _files(folder)
            with _programs(folder), _bounded(seconds), contextlib.redirect_stderr(io.StringIO()):
                ended = _ended(case, folder)
            if (folder / RAN).exists():
                return "foreign code was run"
            if ended:
                return ended
            now = _files(folder)
            lost = [path for path in made if now.get(path) != made[path]]
            return f"lost or changed: {', '.join(lost)}" if lost else ""
        finally:
            os.chdir(before)


def _ended(case: Case, folder: Path) -> str:
    try:
        result = case.call(folder)
    except UserError as error:
        if case.promise == "works":
            return f"refused, and ought to work: {error}"
        return "" if case.told in str(error) and len(str(error)) > 10 else f"does not say `{case.told}`: {error}"
    except Hang:
        return "hangs"
    except BaseException as error:
        return f"traceback: {type(error).__name__}: {str(error)[:200]}"
    if case.promise == "refused":
        return "taken, and ought to be refused"
    return "" if result is None or result else "a wrong result"


def _files(folder: Path) -> dict[str, str]:
    """SHA-256 of each regular file by its path; links are not followed."""
    found = {}
    for top, _, names in os.walk(folder):
        for path in (Path(top, name) for name in names):
            if path.is_file() and not path.is_symlink():
                found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@contextlib.contextmanager
def _programs(folder: Path) -> Iterator[None]:
    """Programs that an image library may start come first in PATH, and tell that they were."""
    with tempfile.TemporaryDirectory() as bin_folder:
        for name in ("gs", "sh"):
            program = Path(bin_folder, name)
            program.write_text(f"#!/bin/bash\ntouch {folder / RAN}\n")
            program.chmod(0o755)
        path = os.environ["PATH"]
        os.environ["PATH"] = f"{bin_folder}:{path}"
        try:
            yield
        finally:
            os.environ["PATH"] = path


@contextlib.contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Raise Hang after so many seconds, and MemoryError for more than MEMORY on top of what the process has."""

    def late(_: int, __: FrameType | None) -> None:
        raise Hang

    handler, (rest, _) = signal.signal(signal.SIGALRM, late), signal.setitimer(signal.ITIMER_REAL, seconds)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, rest)
