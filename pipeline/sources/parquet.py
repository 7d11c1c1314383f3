"""Parquet tables with images inside, as Hugging Face stores them."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.source import File, InsideRoot, Record, Request, SourceError, record_of, some, unpacked
from pipeline.store.params import Section

ENCODED = "image files (binary, or a struct with `bytes`)"
RECORDS = 64  # of a table, with their bytes, in memory at once


class Parquet(Section):
    """Tables of encoded images, as Hugging Face stores them."""

    kind: Literal["parquet"]
    """Parquet tables."""
    path: InsideRoot
    """A path below `prepare.root`, or a glob pattern."""
    image: str = "image"
    """The column of bytes, or of structs with a field `bytes`."""
    label: str = "label"
    """The column of class names, or of class numbers."""
    classes: tuple[str, ...] | None = None
    """The names of class numbers, number 0 first; null: as the file's Hugging Face metadata have them."""

    def files(self, request: Request) -> Iterator[File]:
        """Every row, its image unpacked. Raises SourceError for a damaged file and for columns that hold something else."""
        yield from unpacked(self.records(request), request)

    def records(self, request: Request) -> Iterator[Record]:
        """Every row with its bytes, as it is read. Raises SourceError like `files`."""
        for file in request.matching(self.path):
            yield from _records(self, file, request)


def rows_of(file: Path, request: Request) -> int:
    """How many rows a table has. Raises SourceError if it cannot be read."""
    with _parquet(file, request) as table:
        return int(table.metadata.num_rows)


def _records(source: Parquet, file: Path, request: Request) -> Iterator[Record]:
    role, prefix = request.role, request.prefix(file)
    with _parquet(file, request) as table:
        schema = table.schema_arrow
        _expect_column(schema, "image", source.image, file, request, _holds_bytes, ENCODED)
        columns = [source.image]
        names: Sequence[str] | None = None
        if role != "pool":
            _expect_column(schema, "label", source.label, file, request, _holds_labels, "class names or numbers")
            columns.append(source.label)
            names = _class_names(source, schema, request.told(file))
        row = 0
        for part in table.iter_batches(RECORDS, columns=columns):
            cells = part.column(source.image)
            encoded = cells.field("bytes") if pa.types.is_struct(cells.type) else cells
            labels = part.column(source.label).to_pylist() if role != "pool" else [None] * len(part)
            for data, label in zip(encoded.to_pylist(), labels, strict=True):
                yield record_of(f"{prefix}{row:08}", data or b"", label, names, role)
                row += 1


@contextmanager
def _parquet(file: Path, request: Request) -> Iterator[pq.ParquetFile]:
    """Whatever Arrow says of a damaged file, at its footer or in the middle, names the file."""
    try:
        with pq.ParquetFile(file) as table:
            yield table
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{request.told(file)} cannot be read as Parquet ({error}). Copy or make it anew.") from None


def _expect_column(
    schema: pa.Schema, key: str, name: str, file: Path, request: Request, fits: Callable[[pa.DataType], bool], what: str
) -> None:
    where, option = request.told(file), request.option(key)
    if name not in schema.names:
        raise SourceError(f"{where} has no column `{name}`; it has {some(schema.names)}. Name the right one: {option}.")
    kind = schema.field(name).type
    if not fits(kind):
        raise SourceError(f"{where}: the column `{name}` ({kind}) does not hold {what}. Name another: {option}.")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in kind.names and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _holds_labels(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _class_names(source: Parquet, schema: pa.Schema, where: str) -> Sequence[str] | None:
    """The names of class numbers: from params, else as Hugging Face writes them into the file; None for a column of names."""
    if not pa.types.is_integer(schema.field(source.label).type):
        return None
    if source.classes is not None:
        return source.classes
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = written.get("info", {}).get("features", {}).get(source.label, {}).get("names")
    if not names:
        raise SourceError(
            f"{where}: the column `{source.label}` holds class numbers, and the file does not say their names. List them, "
            "number 0 first: `classes: [...]` beside the path."
        )
    return tuple(names)
