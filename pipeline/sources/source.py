"""What all kinds of source share: paths, rows of a listing, errors."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import pyarrow as pa
from pydantic import AfterValidator

from pipeline.errors import UserError
from pipeline.sources.remote import Listed
from pipeline.sources.tars import Tars
from pipeline.store.params import Names
from pipeline.store.remote import Object, is_remote

LISTED = pa.schema(
    [
        ("id", pa.large_string()),
        ("path", pa.dictionary(pa.int32(), pa.large_string())),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("class", pa.dictionary(pa.int32(), pa.string())),  # null in the pool
        ("reason", pa.string()),  # why the file is not even read; null for an image to check
    ]
)


class SourceError(UserError):
    """A source named in params, or what it holds, does not make a data set."""


def expect_whole(path: str) -> str:
    """`path`; raises ValueError where a shell would have to complete it: DVC takes it as it stands."""
    if path.startswith("~"):
        raise ValueError("DVC does not know what `~` is; write the whole path")
    return path


def _inside(path: str) -> str:
    if is_remote(path):
        raise ValueError(
            "an address stands in the section `remote`, `remote: {<name>: {url: ...}}`, and beside this `path: remote: <name>`"
        )
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError("must lie below `prepare.root`, the folder that DVC watches; give it relative to that")
    return path


InsideRoot = Annotated[str, AfterValidator(expect_whole), AfterValidator(_inside)]
"""A path relative to `root`; may be a glob pattern."""
RemoteEntry = Annotated[str | None, Names("remote")]
"""An entry of `remote`, below whose address a source lies; null: below `root`."""

PREPARE = "prepare"
Role = Literal["labelled", "val", "pool"]


class Request(NamedTuple):
    """What a kind of source is asked for: the files of one role below `root`.

    Images that are no files become members of `tars`; the classes that a source has are added to `classes`. `command`: who asks;
    only `prepare` has params that messages can name. `remote`: what was listed below an address, in the place of `root`.
    """

    role: Role
    root: Path
    tars: Tars
    classes: set[str]
    command: str = PREPARE
    remote: Listed | None = None

    def stored(self, pattern: str) -> list[Path] | list[Object]:
        """The files that a path or a glob pattern names, here or below an address. Raises SourceError if that is nothing."""
        if self.remote is not None:
            return self.remote.matching(pattern, f"prepare.{self.role}" if self.command == PREPARE else self.command)
        return self.matching(pattern)

    def matching(self, pattern: str) -> list[Path]:
        """What a path or a glob pattern names below `root`. Raises SourceError if that is nothing."""
        whole = self.root / pattern
        try:
            named = [whole] if whole.exists() else sorted(p for p in self.root.glob(pattern) if p.name[0] != ".")
        except (ValueError, OSError) as error:  # `**a`, or a name that is too long
            raise SourceError(f"prepare.{self.role}: `{pattern[:200]}` is no path or pattern ({error}). Correct it.") from None
        if not named and not self.root.is_dir():
            raise SourceError(f"{self.root}, the folder of prepare.root, is not a folder. Name the folder of the sources.")
        if not named:
            near = difflib.get_close_matches(pattern, [p.name for p in self.root.iterdir()], n=1)
            hint = f" (did you mean `{near[0]}`?)" if near else ""
            raise SourceError(
                f"prepare.{self.role}: nothing matches `{pattern}`{hint} in {self.root}, the folder of prepare.root. Correct the "
                "path, or put the data there."
            )
        for path in named:
            for part in [path, *path.parents][: len(path.parts) - len(self.root.parts)]:
                self.expect_watched(part)
        return named

    def expect_watched(self, path: Path) -> None:
        """Raises SourceError if `prepare` meets a link to a folder, behind which DVC does not look."""
        if self.command == PREPARE and path.is_symlink() and path.is_dir():
            raise SourceError(
                f"prepare.{self.role}: {path} is a link to a folder. DVC does not look behind it, so what changes there makes "
                f'nothing stale. Put a folder of links to the files in its place: `cp -rs "$(realpath {path})" NEW && '
                f"rm {path} && mv NEW {path}`."
            )

    def told(self, file: Path | Object) -> str:
        """How messages call a file."""
        return f"prepare.{self.role}: {file}" if self.command == PREPARE else str(file)

    def option(self, key: str) -> str:
        """How a column of a table is named to a source."""
        return f"`{key}: <column>`" if self.command == PREPARE else f"`--{key} <column>`"

    def prefix(self, path: Path | Object) -> str:
        """What the ids of the images in `path` begin with."""
        if isinstance(path, Object):
            assert self.remote is not None
            return self.remote.prefix(path)
        return "" if path == self.root else path.relative_to(self.root).as_posix() + "/"


class File(NamedTuple):
    """A row of LISTED."""

    id: str
    path: str
    offset: int
    size: int
    label: str | None
    reason: str | None


class Member(NamedTuple):
    """A file of a folder or tar; a folder has a name that ends in a slash."""

    name: str  # within the source
    size: int
    offset: int = 0
    reason: str | None = None  # why it cannot be an image


class Record(NamedTuple):
    """An image that is no file: a row of a table."""

    id: str
    data: bytes
    label: str | None
    reason: str | None = None


def with_class_folders(members: Iterable[Member], path: Path | Object, request: Request, *, in_tar: bool) -> Iterator[File]:
    """The files of one folder or tar. Raises SourceError if labels are wanted and it has no class folders."""
    labelled, seen = request.role != "pool", dict[str, str]()
    prefix, inside = request.prefix(path), path.as_posix()
    for member in members:
        name = _utf8(member.name)
        visible = not any(part.startswith(".") for part in name.split("/"))
        top, slash, _ = name.partition("/")
        label = top if labelled and slash else None
        if label is not None and visible:
            if not label:
                raise SourceError(
                    f"prepare.{request.role}: {path} holds {name}, whose name begins with `/`, so that its class cannot be told. "
                    "Make the tar from inside the folder of the class folders: `tar -cf FILE -C FOLDER .`."
                )
            if seen.setdefault(label, raw := member.name.partition("/")[0]) != raw:
                raise SourceError(f"prepare.{request.role}: {path} has two class folders that are written `{label}`. Rename one.")
        if name.endswith("/"):
            continue
        reason = member.reason
        if reason is None and not visible:
            reason = "hidden file"
        elif reason is None and labelled and not slash:
            reason = "outside of the class folders"
        elif reason is None and not in_tar and name != member.name:
            reason = "file name is not UTF-8"
        file = inside if in_tar else f"{inside}/{name}"
        yield File(prefix + name, file, member.offset, member.size, label, reason)
    if labelled and not seen:
        raise SourceError(
            f"prepare.{request.role}: {path} has no class folders. Labelled images are expected as <class>/<image>, one folder "
            "for each class."
        )
    request.classes.update(seen.keys())


def _utf8(name: str) -> str:
    """A name as Parquet can hold it: bytes that are not UTF-8 become escapes."""
    return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def unpacked(records: Iterable[Record], request: Request) -> Iterator[File]:
    """Images that are no files, as members of the request's tars."""
    for record in records:
        path, offset = request.tars.add(record.id, record.data)
        if record.label is not None:
            request.classes.add(record.label)
        yield File(record.id, path, offset, len(record.data), record.label, record.reason)


def record_of(image: str, data: bytes, label: str | int | None, names: Sequence[str] | None, role: Role) -> Record:
    """`label` is the class's name, or its number in `names`; below 0 it means, by custom, that there is none."""
    if role == "pool":
        return Record(image, data, None)
    if isinstance(label, int):
        known = range(len(names)) if names is not None else range(label + 1)
        label = None if label not in known else names[label] if names is not None else str(label)
    return Record(image, data, label, None if label is not None else "no label")


def distinct(names: Sequence[str], where: str) -> tuple[str, ...]:
    """`names`, the classes by their numbers. Raises SourceError if two numbers have one name: they would become one class."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise SourceError(
            f"{where}: {some(repeated)} names more than one class number, so that two classes would become one. Give each number "
            "a name of its own."
        )
    return tuple(names)


def some(names: Sequence[str]) -> str:
    """The first ten of `names`, for a message."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"
