"""What DVC does not look at, or cannot hash, in the folders that a user gives it: found before DVC hangs, fails without a name,
or says that nothing changed.

DVC 3.67 waits for ever at a pipe, and does not look behind a link to a folder or into a folder that is a repository of its own. A
socket, a link to nothing or a name that is not UTF-8 ends it with an error of Python.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.harness import progress
from pipeline.store.params import SINGLE, STAGES

STEP = 10_000  # files between two looks at the clock
SHOWN = 5
LINKED = "links to folders"
ADVICE = {
    LINKED: "DVC does not look behind them, so what changes there makes nothing stale. Put folders of links to the files "
    'in their place: `cp -rs "$(realpath LINK)" NEW && rm LINK && mv NEW LINK`',
    "pipes": "DVC would wait for ever for what they say. Remove them",
    "devices": "they are no files, and may have no end. Remove them",
    "sockets": "they are no files. Remove them",
    "links to nothing": "Remove them, or put back what they name",
    "names that are not UTF-8": "DVC cannot write them down. Rename them: `convmv -f latin1 -t utf8 -r --notest FOLDER`",
    "folders that cannot be read": "DVC passes over them without a word. Change their permissions, or take them away",
    "repositories of their own (a folder `.dvc`)": "DVC does not look into them, so what changes there makes nothing stale. "
    "Remove their folder `.dvc`, or take them away",
    "files named .dvcignore": "DVC refuses a folder that holds one. Remove them",
}
"""What is wrong with some files, and what to do about it."""


class ScanError(UserError):
    """DVC cannot watch what params.yaml names."""


def expect_watchable(tree: Mapping[str, Any]) -> int:
    """Look at `prepare.root` and all that a params file names below data/; the number of files seen.

    Opens no file, and asks for the kind of those only that the folder's own list does not tell. Raises ScanError with all that
    DVC cannot watch. What is not there yet, as what a stage makes, is passed over.
    """
    counts, first = Counter[str](), dict[str, list[str]]()
    with progress.bar(None, "files", "scan") as bar:
        seen = _Seen(bar)
        for path in named(tree):
            for what, where in unwatched(path, seen):
                counts[what] += 1
                if counts[what] <= SHOWN:
                    first.setdefault(what, []).append(where)
    if counts:
        lines = [f"{what} ({n:,}): {_told(first[what], n)}. {ADVICE[what]}." for what, n in sorted(counts.items())]
        raise ScanError("DVC cannot watch all that params.yaml names. Nothing was run.\n" + "\n".join(lines))
    return seen.files


def named(tree: Mapping[str, Any]) -> list[Path]:
    """The files and folders that DVC hashes and no stage makes: the root of the sources, and what entries name below data/."""
    prepare = tree.get("prepare")
    root = prepare.get("root") if isinstance(prepare, dict) else None
    paths = [Path(root)] if isinstance(root, str) and root else []
    values = [
        value
        for stage in STAGES
        if stage not in SINGLE and isinstance(tree.get(stage), dict)
        for entry in tree[stage].values()
        if isinstance(entry, dict)
        for value in entry.values()
    ]
    outside = [v for v in values if isinstance(v, str) and v and v.partition("/")[0] not in STAGES]
    paths += [Path("data", v) for v in outside if not Path(v).is_absolute() and ".." not in Path(v).parts]
    return [path for path in dict.fromkeys([*paths, Path("data", "overrides.csv")]) if os.path.lexists(path)]


class _Seen:
    """Counts files, and passes their number on now and then: a call for each would take as long as the scan."""

    def __init__(self, bar: progress.Bar | None = None) -> None:
        self.bar, self.files = bar, 0

    def add(self, files: int) -> None:
        self.files += files
        if self.bar is not None:
            self.bar.update(files)


def unwatched(path: Path, seen: _Seen | None = None) -> Iterator[tuple[str, str]]:
    """(a key of ADVICE, the path) of each thing at or below `path` that DVC cannot watch. Links are not followed."""
    seen = seen or _Seen()
    try:
        kind = path.stat().st_mode
    except OSError:
        yield "links to nothing", _shown(str(path))
        return
    if not stat.S_ISDIR(kind):
        if what := _special(kind):
            yield what, _shown(str(path))
        seen.add(1)
        return
    waiting = [str(path)]
    while waiting:
        folder, count = waiting.pop(), 0
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    count += 1
                    if count == STEP:
                        seen.add(count)
                        count = 0
                    if not entry.name.isascii() and not _is_utf8(entry.name):
                        yield "names that are not UTF-8", _shown(entry.path)
                    if entry.is_file(follow_symlinks=False):
                        if entry.name == ".dvcignore":
                            yield "files named .dvcignore", _shown(entry.path)
                    elif entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                        if entry.name == ".dvc":
                            yield "repositories of their own (a folder `.dvc`)", _shown(folder)
                    elif what := _wrong(entry):
                        yield what, _shown(entry.path)
        except OSError:
            yield "folders that cannot be read", _shown(folder)
        seen.add(count)


def _wrong(entry: os.DirEntry[str]) -> str:
    """What a link or a special file is; an empty text for a link to a file."""
    try:
        kind = entry.stat().st_mode
    except OSError:  # gone, or a link that leads back to itself
        return "links to nothing"
    return LINKED if stat.S_ISDIR(kind) else _special(kind)


def _special(kind: int) -> str:
    if stat.S_ISREG(kind):
        return ""
    return "pipes" if stat.S_ISFIFO(kind) else "sockets" if stat.S_ISSOCK(kind) else "devices"


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(path: str) -> str:
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _told(first: list[str], count: int) -> str:
    return ", ".join(sorted(first)) + (f" and {count - len(first):,} more" if count > len(first) else "")
