"""A good copy of dvc.lock. DVC empties that file before it writes it: a kill or a full disk then leaves half, or nothing."""

import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from pipeline.store import artifact

LOCK = Path("dvc.lock")
WRITING = 2.0  # seconds; DVC takes 0.3 to write the lock of 26 stages, and another run may be at it


def keep(copies: Path) -> None:
    """Copy dvc.lock into the folder `copies`, if it is whole and another one than is there."""
    copy, written = copies / LOCK.name, LOCK.read_bytes() if LOCK.is_file() else b""
    if not (copy.is_file() and copy.read_bytes() == written) and _is_lock(written):
        with artifact.writing_file(copy) as tmp:
            tmp.write_bytes(written)


def mend(copies: Path) -> str | None:
    """Put the copy back where dvc.lock is broken, or take it away if there is none; returns what was done, None if nothing."""
    if not LOCK.is_file() or is_whole(LOCK):
        return None
    time.sleep(WRITING)
    if not LOCK.is_file() or is_whole(LOCK):
        return None
    copy = copies / LOCK.name
    if copy.is_file() and is_whole(copy):
        with artifact.writing_file(LOCK) as tmp:
            shutil.copyfile(copy, tmp)
        return (
            "dvc.lock was broken, as by a kill while DVC wrote it. The copy of the last stage's start is put back; stages that "
            "ended later are found in DVC's cache, or run again."
        )
    broken = LOCK.with_name("dvc.lock.broken")
    LOCK.replace(broken)
    return f"dvc.lock was broken, as by a kill while DVC wrote it, and there is no copy: it is {broken} now; DVC has its cache."


def is_whole(file: Path) -> bool:
    """Whether a file can be DVC's lock."""
    return _is_lock(file.read_bytes())


def _is_lock(written: bytes) -> bool:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        tree = yaml.load(written, Loader=loader)  # both are safe; the one in C is ten times as fast
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    stages = tree.get("stages") if isinstance(tree, dict) else None
    return isinstance(stages, dict) and all(map(_is_stage, stages.values()))


def _is_stage(stage: Any) -> bool:
    if not isinstance(stage, dict) or not stage.get("cmd"):
        return False
    files = [*(stage.get("deps") or []), *(stage.get("outs") or [])]
    return all(isinstance(file, dict) and "path" in file and None not in file.values() for file in files)
