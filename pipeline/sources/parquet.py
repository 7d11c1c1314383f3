"""Parquet tables with images inside, as Hugging Face stores them."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator

from pipeline.sources.source import (
    File,
    InsideRoot,
    Record,
    RemoteEntry,
    Request,
    SourceError,
    distinct,
    record_of,
    some,
    unpacked,
)
from pipeline.store.params import Section
from pipeline.store.remote import Object

ENCODED = "image files (binary, or a struct with `bytes`)"
RECORDS = 64  # of a table, with their bytes, in memory at once
BYTES = 128 << 20  # as many records as may take so much
GROWTH, GROWN = 100, 256 << 20
"""Images hardly shrink when a table is compressed. What holds more than GROWN bytes and so many times its own size is no table of
images: 4 kB can say that a billion bytes stand in each of its rows."""


def _expect_distinct(classes: tuple[str, ...]) -> tuple[str, ...]:
    repeated = sorted({name for name in classes if classes.count(name) > 1})
    if repeated:
        raise ValueError(f"{some(repeated)} stands there more than once, so that two numbers would become one class")
    return classes


class Parquet(Section):
    """Tables of encoded images, as Hugging Face stores them."""

    kind: Literal["parquet"]
    """Parquet tables."""
    path: InsideRoot
    """A path below `prepare.root`, or a glob pattern."""
    remote: RemoteEntry = None
    """The entry of `remote` that lists them: `path` is then below its address."""
    image: str = "image"
    """The column of bytes, or of structs with a field `bytes`."""
    label: str = "label"
    """The column of class names, or of class numbers."""
    classes: Annotated[tuple[str, ...], AfterValidator(_expect_distinct)] | None = None
    """The names of class numbers, number 0 first; null: as the file's Hugging Face metadata have them."""

    def files(self, request: Request) -> Iterator[File]:
        """Every row, its image unpacked. Raises SourceError for a damaged file and for columns that hold something else."""
        yield from unpacked(self.records(request), request)

    def records(self, request: Request) -> Iterator[Record]:
        """Every row with its bytes, as it is read. Raises SourceError like `files`."""
        for file in request.stored(self.path):
            yield from _records(self, file, request)


def rows_of(file: Path | Object, request: Request) -> int:
    """How many rows a table has. Raises SourceError if it cannot be read."""
    with _parquet(file, request) as table:
        return int(table.metadata.num_rows)


def _records(source: Parquet, file: Path | Object, request: Request) -> Iterator[Record]:
    role, prefix = request.role, request.prefix(file)
    size = file.size if isinstance(file, Object) else file.stat().st_size if file.is_file() else 0
    with _parquet(file, request) as table:
        schema = table.schema_arrow
        _expect_column(schema, "image", source.image, file, request, _holds_bytes, ENCODED)
        columns = [source.image]
        names: Sequence[str] | None = None
        if role != "pool":
            _expect_column(schema, "label", source.label, file, request, _holds_labels, "class names or numbers")
            columns.append(source.label)
            names = _class_names(source, schema, request.told(file))
        row, unpacked = 0, 0
        for part in _batches(table, columns, source.image):
            cells = part.column(source.image)
            encoded = cells.field("bytes") if pa.types.is_struct(cells.type) else cells
            unpacked += encoded.nbytes
            if unpacked > max(GROWN, GROWTH * size):
                raise SourceError(
                    f"{request.told(file)}: the column `{source.image}` holds more than {GROWTH} times the size of the file, as "
                    "image files never do. Look at what wrote it."
                )
            labels = part.column(source.label).to_pylist() if role != "pool" else [None] * len(part)
            for data, label in zip(encoded.to_pylist(), labels, strict=True):
                yield record_of(f"{prefix}{row:08}", data or b"", label, names, role)
                row += 1


def _batches(table: pq.ParquetFile, columns: list[str], image: str) -> Iterator[pa.RecordBatch]:
    """Some rows at a time: fewer where a dictionary repeats its entries, each of which may be as large as the whole column."""
    for group in range(table.num_row_groups):
        facts = table.metadata.row_group(group)
        chunks = [facts.column(i) for i in range(facts.num_columns)]
        size = max((c.total_uncompressed_size for c in chunks if c.path_in_schema.startswith(image)), default=0)
        at_once = min(RECORDS, max(1, BYTES // max(1, size)))
        yield from table.iter_batches(at_once, row_groups=[group], columns=columns)


@contextmanager
def _parquet(file: Path | Object, request: Request) -> Iterator[pq.ParquetFile]:
    """Whatever Arrow says of a damaged file, at its footer or in the middle, names the file."""
    if isinstance(file, Path) and not file.is_file():
        raise SourceError(f"{request.told(file)} is not a file, and cannot be read as Parquet.")
    try:
        with pq.ParquetFile(file.open() if isinstance(file, Object) else file) as table:
            yield table
    except (pa.ArrowMemoryError, MemoryError) as error:
        raise SourceError(
            f"{request.told(file)} asks for more memory than there is ({error}). Its rows hold more than image files, or its row "
            "groups are too large: look at what wrote it, or write it in smaller row groups."
        ) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{request.told(file)} cannot be read as Parquet ({error}). Copy or make it anew.") from None


def _expect_column(
    schema: pa.Schema, key: str, name: str, file: Path | Object, request: Request, fits: Callable[[pa.DataType], bool], what: str
) -> None:
    where, option = request.told(file), request.option(key)
    if schema.names.count(name) > 1:
        raise SourceError(
            f"{where} has {schema.names.count(name)} columns called `{name}`. Name another: {option}, or rename them."
        )
    if name not in schema.names:
        raise SourceError(f"{where} has no column `{name}`; it has {some(schema.names)}. Name the right one: {option}.")
    kind = schema.field(name).type
    if not fits(kind):
        raise SourceError(f"{where}: the column `{name}` ({kind}) does not hold {what}. Name another: {option}.")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.names.count("bytes") == 1 and _are_bytes(kind.field("bytes").type)
    return _are_bytes(kind)


def _are_bytes(kind: pa.DataType) -> bool:
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
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][source.label]["names"]
    except (ValueError, LookupError, TypeError, RecursionError):  # none there, or damaged
        names = None
    if not names or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SourceError(
            f"{where}: the column `{source.label}` holds class numbers, and the file does not say their names. List them, "
            "number 0 first: `classes: [...]` beside the path."
        )
    return distinct(names, where)
