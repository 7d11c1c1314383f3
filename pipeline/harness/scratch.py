"""What a killed run has left to go on from. A kill at any moment leaves it whole, or nothing under its name."""

import contextlib
import os
import shutil
import sys
from pathlib import Path

from pipeline.store import artifact


def remove(folder: Path) -> None:
    """Remove a folder, and what a kill left of an earlier removal. Renamed first: half a checkpoint would be refused.

    What cannot be removed stays, without a word: it is whole, and whoever finds it looks at it first.
    """
    _tidy(folder)
    with contextlib.suppress(OSError):
        folder.rename(folder.with_name(f"{folder.name}.gone-{os.getpid()}"))
    _tidy(folder)


def _tidy(folder: Path) -> None:
    for gone in folder.parent.glob(f"{folder.name}.gone-*"):
        shutil.rmtree(gone, ignore_errors=True)


def usable(folder: Path) -> bool:
    """Whether the artifact `folder` is there and proves its bytes. A damaged one is named on stderr, and removed."""
    if not folder.exists():
        return False
    try:
        artifact.verify(folder)
    except (artifact.ArtifactError, OSError) as error:
        said = str(error).partition(". ")[0]
        sys.stderr.write(f"warning: of the work that a killed run left, this is done again: {said}.\n")
        remove(folder)
        return False
    return True
