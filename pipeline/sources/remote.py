"""What lies below an address, as the stage `remote` lists it: files that `tar` and `parquet` read like those of a folder."""

import fnmatch
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from pipeline.errors import UserError
from pipeline.store import artifact, remote
from pipeline.store.params import Section
from pipeline.store.remote import Object

OBJECTS = "objects.json"
NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST = 1_000_000  # names that one pattern of numbers may stand for


class ListingError(UserError):
    """What lies below an address makes no list of files, or is not what was listed."""


def _expect_name(name: str) -> str:
    if not name.isprintable() or set("?#\\*[") & set(name) or {"", ".", ".."} & set(name.split("/")):
        raise ValueError("must be the name of a file below `url`; `{000..127}` stands for numbers, there are no other patterns")
    if math.prod(max(0, int(last) - int(first) + 1) for first, last in NUMBERS.findall(name)) not in range(1, MOST + 1):
        raise ValueError(f"stands for no name, or for more than {MOST:,}")
    return name


class Remote(Section):
    """Files below an address, which each `dvc repro` looks at anew: their names, sizes, and ETags or times."""

    url: Annotated[str, AfterValidator(remote.expect_address)]
    """`s3://bucket/folder`, `gs://bucket/folder`, `https://server/folder`, without credentials: the environment has those."""
    files: tuple[Annotated[str, AfterValidator(_expect_name)], ...] | None = None
    """The files below it; `part-{000..127}.tar` stands for 128. null: all that the store lists. A web server lists none."""


def look(params: Remote) -> list[Object]:
    """The files as they are now, by name. Raises ListingError if there is none, RemoteError and Unavailable."""
    if params.files is not None:
        names = sorted({name for pattern in params.files for name in _numbered(pattern)})
        return list(remote.looked([Object(f"{params.url}/{name}", 0) for name in names]))
    if params.url.startswith("http"):
        raise ListingError(f'{params.url}: a web server has no list of its files. Name them: `files: ["part-{{000..127}}.tar"]`.')
    found = remote.listing(params.url)
    if not found:
        raise ListingError(f"{params.url}: nothing lies below this address. Correct it, or put the files there.")
    return found


def _numbered(pattern: str) -> list[str]:
    """`a-{08..10}.tar` as `a-08.tar`, `a-09.tar`, `a-10.tar`; each number has as many digits as the first, or more."""
    parts = NUMBERS.split(pattern)
    texts = [[text] for text in parts[::3]]
    numbers = [
        [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
        for first, last in zip(parts[1::3], parts[2::3], strict=True)
    ]
    choices = [choice for pair in zip(texts, [*numbers, [""]], strict=True) for choice in pair]
    return ["".join(chosen) for chosen in product(*choices)]


def write(folder: Path, params: Remote, objects: Sequence[Object]) -> None:
    """The list, in an artifact being written: the same bytes for the same files, in whatever order they were found."""
    rows = [
        {"name": file.url.removeprefix(f"{params.url}/"), "size": file.size, "etag": file.etag, "modified": file.modified}
        for file in sorted(objects)
    ]
    (folder / OBJECTS).write_text(json.dumps({"url": params.url, "objects": rows}, indent=1) + "\n")


@dataclass(frozen=True)
class Listed:
    """The list of an entry of `remote`. `ids` stands before the ids of its images; `used`: the files that a source named."""

    url: str
    objects: dict[str, Object]
    ids: str = ""
    used: dict[str, Object] = field(default_factory=dict)

    def matching(self, pattern: str, where: str) -> list[Object]:
        """The files of a name or a glob pattern, as they were listed. `where`: what messages call the source.

        Raises ListingError if there is none, or if one is not what it was.
        """
        named = [pattern] if pattern in self.objects else [n for n in self.objects if _matches(n, pattern)]
        if not named:
            shown = ", ".join(list(self.objects)[:5])
            raise ListingError(
                f"{where}: nothing matches `{pattern}` below {self.url}, where there are: {shown}. Correct the path."
            )
        found = {name: self.objects[name] for name in named}
        self.used.update(found)
        _expect_unchanged(list(found.values()))
        return list(found.values())

    def expect_unchanged(self) -> None:
        """Raises ListingError if a file that a source named is not what it was when it was listed."""
        _expect_unchanged(list(self.used.values()))

    def prefix(self, file: Object) -> str:
        """What the ids of the images in `file` begin with."""
        return f"{self.ids}{file.url.removeprefix(f'{self.url}/')}/"


def _matches(name: str, pattern: str) -> bool:
    """As a glob pattern below a folder: `*` stays within a folder, `**` does not; hidden files are not meant."""
    if Path(name).name[0] == ".":
        return False
    parts, wanted = name.split("/"), pattern.split("/")
    return _matching(parts, wanted)


def _matching(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return any(_matching(parts[n:], wanted[1:]) for n in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], wanted[0]) and _matching(parts[1:], wanted[1:])


def _expect_unchanged(objects: Sequence[Object]) -> None:
    for before, now in zip(objects, remote.looked(objects), strict=True):
        if before != now:
            raise ListingError(f"{before} has changed since it was listed. Run `dvc repro`, which lists and reads it anew.")


def read(folder: Path, ids: str = "") -> Listed:
    """The list in the artifact of an entry of `remote`. Raises ArtifactError, or ListingError for what is no such list."""
    artifact.verify(folder)
    try:
        tree: dict[str, Any] = json.loads((folder / OBJECTS).read_text())
        url = str(tree["url"])
        rows = [(str(row["name"]), int(row["size"]), row["etag"], row["modified"]) for row in tree["objects"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ListingError(
            f"{folder / OBJECTS} is no list of remote files ({error}). Remove {folder} and run `dvc repro`."
        ) from None
    return Listed(url, {name: Object(f"{url}/{name}", *facts) for name, *facts in rows}, ids)
