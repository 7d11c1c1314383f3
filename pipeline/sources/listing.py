"""Every file of a role's sources, before any image is read."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field

from pipeline.harness import progress
from pipeline.sources.folder import Folder
from pipeline.sources.parquet import Parquet
from pipeline.sources.source import LISTED, PREPARE, File, Request, Role, SourceError
from pipeline.sources.tar import Tar
from pipeline.sources.tars import Tars
from pipeline.sources.torchvision import Torchvision

CHUNK = 1024  # files of a batch of a listing
LISTS = (".txt", ".lst")
TABLES = (".parquet", ".pq")
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")


Source = Annotated[Folder | Tar | Torchvision | Parquet, Field(discriminator="kind")]


Kind = Literal["folder", "tar", "parquet", "list", "file"]


class Listing(NamedTuple):
    """What the sources of one role hold."""

    role: Role
    table: pa.Table  # LISTED
    classes: frozenset[str]  # of the images, and of class folders without any
    moved: Mapping[str, str]  # tars still in the artifact's temporary folder: what manifests will say -> where they lie


def list_files(sources: Sequence[Source], role: Role, root: Path, tars: Tars, command: str = PREPARE) -> Listing:
    """Every file of a role's sources, in no particular order; images that lie in tables become members of `tars`.

    Paths begin with `root`, ids are relative to it; `command` stands before the progress. Raises SourceError where a source is
    missing, of another kind, or without the labels that its role needs.
    """
    classes: set[str] = set()
    request = Request(role, root, tars, classes, command)
    files = chain.from_iterable(source.files(request) for source in sources)
    with tars:
        table = gathered(files, f"{command}: listing {role}" if command == PREPARE else f"{command}: listing")
    return Listing(role, table, frozenset(classes), tars.moved)


def gathered(files: Iterable[File], label: str) -> pa.Table:
    """`files` as a table of LISTED, in their order; `label` stands before the progress."""
    batches: list[pa.RecordBatch] = []
    waiting = iter(files)
    with progress.bar(None, "files", label) as shown:
        while chunk := list(islice(waiting, CHUNK)):
            batches.append(batch(chunk, LISTED))
            shown.update(len(chunk))
    return pa.Table.from_batches(batches, LISTED).unify_dictionaries()


def kind_of(path: Path) -> Kind:
    """What a path on a command line names, by its look: a folder, a tar, a Parquet table, a list of paths, or else one file.

    A compressed tar is a tar, too: who reads it says how to unpack it. Raises SourceError if nothing is there.
    """
    if path.is_dir():
        return "folder"
    if not path.exists():
        raise SourceError(f"{path} is not there. Expected: a folder of images, an uncompressed tar, a Parquet table, an image.")
    suffix = path.suffix.lower()
    if suffix == ".tar" or suffix in COMPRESSED:
        return "tar"
    return "parquet" if suffix in TABLES else "list" if suffix in LISTS else "file"


def batch(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.RecordBatch:
    """`rows` as columns: Python objects live no longer than their chunk."""
    return pa.RecordBatch.from_arrays(
        [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), schema, strict=True)], schema=schema
    )
