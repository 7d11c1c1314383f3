"""Every file of a role's sources, before any image is read."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field

from pipeline.harness import progress
from pipeline.sources import remote as remotes
from pipeline.sources.folder import Folder
from pipeline.sources.parquet import Parquet
from pipeline.sources.remote import Listed
from pipeline.sources.source import LISTED, PREPARE, File, Request, Role, SourceError
from pipeline.sources.tar import Tar
from pipeline.sources.tars import Tars
from pipeline.sources.torchvision import Torchvision
from pipeline.store import remote
from pipeline.store.remote import Object

CHUNK = 1024  # files of a batch of a listing
LISTS = (".txt", ".lst")
TABLES = (".parquet", ".pq")
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")


REMOTE = Path("data", "remote")
"""Where the stage `remote` writes its lists."""
Source = Annotated[Folder | Tar | Torchvision | Parquet, Field(discriminator="kind")]


Kind = Literal["folder", "tar", "parquet", "list", "file"]


class Listing(NamedTuple):
    """What the sources of one role hold."""

    role: Role
    table: pa.Table  # LISTED
    classes: frozenset[str]  # of the images, and of class folders without any
    moved: Mapping[str, str]  # tars still in the artifact's temporary folder: what manifests will say -> where they lie
    remote: tuple[Listed, ...] = ()  # the lists of files below addresses that were read


def list_files(
    sources: Sequence[Source],
    role: Role,
    root: Path,
    tars: Tars,
    command: str = PREPARE,
    lists: Path = REMOTE,
    elsewhere: Listed | None = None,
) -> Listing:
    """Every file of a role's sources, in no particular order; images that lie in tables become members of `tars`.

    Paths begin with `root`, ids are relative to it; `command` stands before the progress; `lists`: what `remote` made;
    `elsewhere`: files at an address, in the place of `root`. Raises SourceError where a source is
    missing, of another kind, or without the labels that its role needs; as RemoteError and Unavailable for what lies elsewhere.
    """
    classes: set[str] = set()
    requests = [request_of(source, Request(role, root, tars, classes, command, elsewhere), lists) for source in sources]
    files = chain.from_iterable(source.files(request) for source, request in zip(sources, requests, strict=True))
    with tars:
        table = gathered(files, f"{command}: listing {role}" if command == PREPARE else f"{command}: listing")
    return Listing(role, table, frozenset(classes), tars.moved, tuple(r.remote for r in requests if r.remote is not None))


def request_of(source: Source, request: Request, lists: Path = REMOTE) -> Request:
    """The request for one source: below `root`, or below the address that an entry of `remote` lists, as `root` may be, too.

    Raises SourceError where that entry has listed nothing yet, or where a kind of source knows no addresses.
    """
    if request.remote is not None:
        return request
    entry = getattr(source, "remote", None)
    folder = lists / entry if entry else request.root
    if not (folder / remotes.OBJECTS).is_file():
        if entry:
            raise SourceError(
                f"prepare.{request.role}: {folder} is not there, the list of the files. Run `dvc repro`, which makes it."
            )
        return request
    if not isinstance(source, Tar | Parquet):
        raise SourceError(
            f"prepare.{request.role}: `kind: {source.kind}` is read from a disk, and {folder} lists what lies below an address. "
            "Put the images into tars there: `python -m pipeline bundle` makes them."
        )
    return request._replace(remote=remotes.read(folder, f"{entry}/" if entry else ""))


def gathered(files: Iterable[File], label: str) -> pa.Table:
    """`files` as a table of LISTED, in their order; `label` stands before the progress."""
    batches: list[pa.RecordBatch] = []
    waiting = iter(files)
    with progress.bar(None, "files", label) as shown:
        while chunk := list(islice(waiting, CHUNK)):
            batches.append(batch(chunk, LISTED))
            shown.update(len(chunk))
    return pa.Table.from_batches(batches, LISTED).unify_dictionaries()


def kind_of(path: Path | Object) -> Kind:
    """What a path on a command line names, by its look: a folder, a tar, a Parquet table, a list of paths, or else one file.

    A compressed tar is a tar, too: who reads it says how to unpack it. Raises SourceError if nothing is there.
    """
    if isinstance(path, Object):
        return _by_name(path.name)
    if path.is_dir():
        return "folder"
    if not path.exists():
        raise SourceError(f"{path} is not there. Expected: a folder of images, an uncompressed tar, a Parquet table, an image.")
    return _by_name(path.name)


def _by_name(name: str) -> Kind:
    suffix = Path(name).suffix.lower()
    if suffix == ".tar" or suffix in COMPRESSED:
        return "tar"
    return "parquet" if suffix in TABLES else "list" if suffix in LISTS else "file"


def at_address(url: str) -> Listed:
    """One file at an address that a command line names; ids begin with it. Raises SourceError, RemoteError and Unavailable."""
    try:
        url = remote.expect_address(url)
    except ValueError as error:
        raise SourceError(f"{remote.masked(url)} {error}.") from None
    file = remote.look(url)
    folder = url.rpartition("/")[0]
    return Listed(folder, {file.name: file}, f"{folder}/")


def batch(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.RecordBatch:
    """`rows` as columns: Python objects live no longer than their chunk."""
    return pa.RecordBatch.from_arrays(
        [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), schema, strict=True)], schema=schema
    )
