"""Every file of a role's sources, before any image is read."""

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
from pydantic import Field

from pipeline.harness import progress
from pipeline.sources.folder import Folder
from pipeline.sources.parquet import Parquet
from pipeline.sources.source import LISTED, Request, Role
from pipeline.sources.tar import Tar
from pipeline.sources.tars import Tars
from pipeline.sources.torchvision import Torchvision

CHUNK = 1024  # files of a batch of a listing


Source = Annotated[Folder | Tar | Torchvision | Parquet, Field(discriminator="kind")]


class Listing(NamedTuple):
    """What the sources of one role hold."""

    role: Role
    table: pa.Table  # LISTED
    classes: frozenset[str]  # of the images, and of class folders without any
    moved: Mapping[str, str]  # tars still in the artifact's temporary folder: what manifests will say -> where they lie


def list_files(sources: Sequence[Source], role: Role, root: Path, tars: Tars) -> Listing:
    """Every file of a role's sources, in no particular order; images that lie in tables become members of `tars`.

    Paths begin with `root`, ids are relative to it. Raises SourceError where a source is missing, of another kind, or
    without the labels that its role needs.
    """
    batches: list[pa.RecordBatch] = []
    classes: set[str] = set()
    request = Request(role, root, tars, classes)
    files = chain.from_iterable(source.files(request) for source in sources)
    with tars, progress.bar(None, "files", f"prepare: listing {role}") as shown:
        while chunk := list(islice(files, CHUNK)):
            batches.append(batch(chunk, LISTED))
            shown.update(len(chunk))
    table = pa.Table.from_batches(batches, LISTED).unify_dictionaries()
    return Listing(role, table, frozenset(classes), tars.moved)


def batch(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.RecordBatch:
    """`rows` as columns: Python objects live no longer than their chunk."""
    return pa.RecordBatch.from_arrays(
        [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), schema, strict=True)], schema=schema
    )
