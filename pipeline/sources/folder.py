"""Image files in folders."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pipeline.sources.source import File, InsideRoot, Member, Request, SourceError, with_class_folders
from pipeline.store.params import Section


class Folder(Section):
    """Image files in folders."""

    kind: Literal["folder"]
    """A folder of image files."""
    path: InsideRoot
    """A path below `prepare.root`, or a glob pattern. Where labels are wanted, `<class>/...`: the first folder below it names
    the class."""

    def files(self, request: Request) -> Iterator[File]:
        """Every file below the folders, hidden and unreadable ones with their reason."""
        for folder in request.matching(self.path):
            yield from with_class_folders(members(folder, request), folder, request, in_tar=False)


def members(folder: Path, request: Request | None = None) -> Iterator[Member]:
    """All that lies below a folder, sorted by name in each. Raises SourceError for what is no folder, or has no end, and, for the
    `request` of `prepare`, for links to folders."""
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder. For a tar, say `kind: tar`.")
    yield from _below(folder, "", frozenset(), request)


def _below(folder: Path, prefix: str, above: frozenset[tuple[int, int]], request: Request | None) -> Iterator[Member]:
    """Links to files are followed: image sets are often assembled of them. Those to folders, where nobody has to watch these."""
    here = folder.stat()
    if (here.st_dev, here.st_ino) in above:
        raise SourceError(f"{folder} is a link to a folder that holds it, so it has no end. Remove the link.")
    for entry in sorted(os.listdir(folder)):  # noqa: PTH208 - names alone, as a folder may hold millions
        name, path = prefix + entry, folder / entry
        try:
            kind = path.stat()
        except OSError:  # nothing there, or a link that leads back to itself
            yield Member(name, 0, reason="link to nothing")
            continue
        if stat.S_ISDIR(kind.st_mode):
            if request is not None:
                request.expect_watched(path)
            yield Member(name + "/", 0)
            yield from _below(path, name + "/", above | {(here.st_dev, here.st_ino)}, request)
        else:
            yield Member(name, kind.st_size, reason=None if stat.S_ISREG(kind.st_mode) else "not a regular file")
