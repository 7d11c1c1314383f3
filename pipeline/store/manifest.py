"""The table of images: one row per image, saying where its bytes lie.

Readers and trainers know manifests only, never data sets by name. Rows are sorted by id, so a row number orders images
as ids do.
"""

import json
import stat
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, PositiveInt

from pipeline.errors import UserError
from pipeline.store import artifact, remote

FILE = "manifest.parquet"
MAX_BYTES = 1 << 30  # of a file: a larger one is no image, and is not read
SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),  # unique and stable: <file of the source>/<name within it>; more than 2 GiB of them in all
        # Relative to the working directory of the stages, or an address (`s3://...`, see `remote`).
        ("path", pa.dictionary(pa.int32(), pa.large_string())),
        ("offset", pa.int64()),  # of the image's first byte: 0 for a file of its own, else inside an uncompressed tar
        ("size", pa.int64()),  # bytes
        ("width", pa.int32()),  # pixels, after EXIF orientation
        ("height", pa.int32()),
        ("crc32", pa.uint32()),  # of the encoded bytes: an image replaced in place changes the manifest
        ("label", pa.int32()),  # index into `classes`; null in the pool
    ]
)
STORED = SCHEMA.set(SCHEMA.get_field_index("path"), pa.field("path", pa.large_string()))
"""The columns in the file. Parquet would repeat the dictionary of all paths in each row group: with a file for each image, the
size would grow as the square of their number."""
GROUP = 1 << 18
"""Rows of a row group, which is what a reader and a writer that go through a manifest hold at a time."""
REPEATING = ["path", "width", "height", "label"]
"""The columns whose values repeat; for the others Parquet's own dictionaries take time and bring nothing."""


Amount = PositiveInt | Annotated[float, Field(gt=0, le=1)]
"""A number of images of each class, or a share of them: 50, 0.01."""


class ManifestError(UserError):
    """A manifest, or an image it points to, is not what it says."""


@dataclass(frozen=True)
class Manifest:
    """`table` has SCHEMA's columns, sorted by id; `classes` names the labels (empty where no image has one)."""

    table: pa.Table
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return self.table.num_rows

    def labels(self) -> np.ndarray:
        """(N,) int64. Raises ManifestError if any image has no label."""
        column = self.table["label"]
        if column.null_count:
            raise ManifestError(f"{column.null_count} of {len(self)} images have no label, but labels are needed here.")
        return column.to_numpy().astype(np.int64)

    def labels_of(self, images: "Manifest", otherwise: int) -> np.ndarray:
        """(M,) int64: of each of `images` the label that it has here, by its id, or `otherwise`."""
        places = pc.index_in(images.table["id"], value_set=self.table["id"]).combine_chunks()
        rows = places.fill_null(-1).to_numpy(zero_copy_only=False)
        return np.where(rows < 0, otherwise, self.labels()[rows])

    def take(self, rows: np.ndarray) -> "Manifest":
        """The images of the given row numbers, in ascending order of row."""
        return Manifest(self.table.take(pa.array(np.sort(rows))), self.classes)


def read(folder: Path) -> Manifest:
    """Read and verify a manifest artifact. Raises ArtifactError or ManifestError."""
    artifact.verify(folder)
    _expect_one(folder)
    try:
        table = pq.read_table(folder / FILE, read_dictionary=["path"])
        classes = _classes(table.schema)
        # One chunk: to take a few rows of a string column in many chunks, pyarrow goes through all of it.
        images = Manifest(table.cast(SCHEMA).unify_dictionaries().combine_chunks(), classes)
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        raise ManifestError(f"{folder / FILE} is no manifest of images ({error}). Make it anew: remove {folder}.") from None
    for name, low, high in (("offset", 0, 1 << 50), ("size", 0, MAX_BYTES), ("label", 0, len(classes) - 1 if classes else None)):
        span = pc.min_max(images.table[name]).as_py()
        if span["min"] is not None and (span["min"] < low or (high is not None and span["max"] > high)):
            raise ManifestError(
                f"{folder / FILE}: the column `{name}` holds {span}, which cannot be. Make it anew: remove {folder}."
            )
    return images


def _classes(schema: pa.Schema) -> tuple[str, ...]:
    return tuple(json.loads((schema.metadata or {}).get(b"classes", b"[]")))


def count(folder: Path) -> int:
    """The number of images of a manifest artifact, which is verified but not read. Raises ArtifactError or ManifestError."""
    artifact.verify(folder)
    return _opened(folder).metadata.num_rows


def groups(folder: Path) -> Iterator[pa.Table]:
    """The rows of a manifest artifact, some hundred thousand at a time, with the columns of STORED; nothing is verified."""
    file = _opened(folder)
    for number in range(file.num_row_groups):
        yield file.read_row_group(number, use_threads=False).cast(STORED)


def _expect_one(folder: Path) -> None:
    if not (folder / FILE).is_file():
        raise ManifestError(f"{folder} has no {FILE}: images are expected here (an artifact of prepare, dedup or select).")


def _opened(folder: Path) -> pq.ParquetFile:
    _expect_one(folder)
    try:
        return pq.ParquetFile(folder / FILE)
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{folder / FILE} is no manifest of images ({error}). Make it anew: remove {folder}.") from None


def write(folder: Path, table: pa.Table, classes: Sequence[str]) -> None:
    """Write `table`, sorted by id, as the manifest of an artifact being written. Raises ManifestError on a repeated id.

    The file's bytes depend on the rows alone, not on their order or on how they were gathered in memory.
    """
    table = table.select(SCHEMA.names).cast(SCHEMA)
    if not are_sorted(table["id"]):
        table = table.unify_dictionaries().sort_by("id")
        again = pc.index(pc.equal(table["id"][:-1], table["id"][1:]), True).as_py()
        if again >= 0:
            raise ManifestError(f"the image id {table['id'][again]} occurs twice.")
    with Writer(folder, classes) as writer:
        for start in range(0, len(table), GROUP):
            writer.add(table.slice(start, GROUP))


def are_sorted(ids: pa.ChunkedArray) -> bool:
    """Whether each id is greater than the one before it, and so none occurs twice."""
    return len(ids) < 2 or bool(pc.all(pc.less(ids[:-1], ids[1:])).as_py())


class Writer:
    """Writes the manifest of an artifact being made at `folder`, from rows that come sorted by id.

    The bytes are those of `write` for the same rows, however many come at a time; it holds GROUP of them at most beside these.
    """

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        schema = STORED.with_metadata({"classes": json.dumps(list(classes))})
        self.file = pq.ParquetWriter(folder / FILE, schema, compression="zstd", use_dictionary=REPEATING)
        self.waiting: list[pa.Table] = []

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.waiting:
            self._write(pa.concat_tables(self.waiting))
        self.file.close()

    def add(self, table: pa.Table) -> None:
        """`table`: the columns of SCHEMA or of STORED."""
        self.waiting.append(table.select(STORED.names).cast(STORED))
        if sum(map(len, self.waiting)) >= GROUP:
            whole = pa.concat_tables(self.waiting)
            full = len(whole) // GROUP * GROUP
            for start in range(0, full, GROUP):
                self._write(whole.slice(start, GROUP))
            self.waiting = [whole.slice(full)] if full < len(whole) else []

    def _write(self, rows: pa.Table) -> None:
        # One chunk: Arrow ends a page where a chunk ends, once the page is large enough.
        self.file.write_table(rows.combine_chunks(), row_group_size=GROUP)


def concat(parts: Sequence[Manifest]) -> Manifest:
    """The union of manifests, sorted by id; the classes are those of the first that has any.

    Raises ManifestError if an image is in two of them.
    """
    classes = next((p.classes for p in parts if p.classes), ())
    table = pa.concat_tables([p.table for p in parts]).unify_dictionaries().sort_by("id")
    again = pc.index(pc.equal(table["id"][:-1], table["id"][1:]), True).as_py()
    if again >= 0:
        raise ManifestError(f"the image {table['id'][again]} is in two of the sets that are to be put together.")
    return Manifest(table, classes)


class ToLearn(NamedTuple):
    """`seen`: the images to learn on; `labelled`: the labelled ones; `unlabelled`: how many of `seen` are not among these."""

    seen: Manifest
    labelled: Manifest
    unlabelled: int


def to_learn(chosen: Path, train: Path, labelled: bool) -> ToLearn:
    """The images of `chosen`, and those of `train` too if `labelled` says so.

    An image of both, as where `train` was packed, is read from where `chosen` has it.
    """
    images, known = read(chosen), read(train)
    rest = known.take(np.flatnonzero(~_among(known, images)))
    seen = concat([images, rest]) if labelled and len(rest) else images
    return ToLearn(seen, known, len(images) - (len(known) - len(rest)))


def _among(images: Manifest, others: Manifest) -> np.ndarray:
    """(N,) bool: which of `images` are also in `others`."""
    return np.asarray(pc.is_in(images.table["id"], value_set=others.table["id"]).to_numpy(), bool)


def balanced(images: Manifest, amount: Amount, seed: int) -> Manifest:
    """`amount` images of each class, or that share of them and at least one.

    Drawn by `seed`; a larger amount holds the images of a smaller one, and no class moves another's draw. Raises ManifestError
    for a class with fewer images.
    """
    labels, kept = images.labels(), []
    for label, name in enumerate(images.classes):
        rows = np.flatnonzero(labels == label)
        wanted = amount if isinstance(amount, int) else max(1, round(amount * len(rows)))
        if not 0 < wanted <= len(rows):
            raise ManifestError(f"`labels` asks for {wanted} images of the class {name}, which has {len(rows)}.")
        kept.append(np.random.default_rng((seed, label)).permutation(rows)[:wanted])
    return images.take(np.concatenate(kept))


def image_bytes(images: Manifest, rows: Sequence[int] | np.ndarray) -> Iterator[bytes]:
    """The encoded bytes of the given rows, in that order.

    Raises ManifestError if a file is gone or its bytes are not those that `prepare` saw; of files at addresses RemoteError and
    Unavailable, too.
    """
    table = images.table.select(["path", "offset", "size", "crc32"]).take(pa.array(rows, pa.int64()))
    paths, offsets, sizes, sums = table.to_pydict().values()
    with Opened() as opened:
        files = opened.each(paths, offsets, sizes)
        for row, path, offset, size, crc, data in zip(rows, paths, offsets, sizes, sums, files, strict=True):
            is_it = len(data) == size and zlib.crc32(data) == crc
            if not is_it and remote.is_remote(path):  # what a network did to it once it hardly does again
                data = remote.fetch(path, offset, offset + size)
                is_it = zlib.crc32(data) == crc
            if not is_it:
                image = images.table["id"][int(row)].as_py()
                raise ManifestError(
                    f"{path}: the image {image} is not the one that `prepare` indexed ({len(data)} of {size} bytes "
                    "read). Put the file back, or run `dvc repro prepare` to index what is there now."
                )
            yield data


class Opened:
    """Files read by (offset, size); the last one stays open, as neighbours mostly share a tar."""

    def __init__(self) -> None:
        self.path: str | None = None
        self.file: BinaryIO | None = None
        self._far: Generator[bytes, None, None] | None = None

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if self._far is not None:
            self._far.close()

    def _close(self) -> None:
        if self.file is not None:
            self.file.close()
        self.path = self.file = None

    def each(self, paths: Sequence[str], offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[bytes]:
        """`read` of each place, in order; those at addresses are asked for ahead, as long as this is open."""
        if not any("://" in path for path in set(paths)):
            return map(self.read, paths, offsets, sizes)
        places = list(zip(paths, offsets, sizes, strict=True))
        self._far = far = remote.read([place for place in places if remote.is_remote(place[0])])
        return (next(far) if remote.is_remote(place[0]) else self.read(*place) for place in places)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Fewer than `size` bytes where the file ends; raises ManifestError if it cannot be opened. A file at an address comes as
        from `remote.fetch`."""
        if path != self.path or self.file is None:
            if remote.is_remote(path):
                return remote.fetch(path, offset, offset + size)
            self._close()
            try:
                if not stat.S_ISREG(Path(path).stat().st_mode):  # a pipe would be waited for
                    raise ManifestError(f"{path} is not a regular file. Images are read from it.")
                self.file = Path(path).open("rb")  # noqa: SIM115
            except (OSError, ValueError) as error:
                raise ManifestError(
                    f"{path} cannot be opened ({getattr(error, 'strerror', error)}). Images are read from it."
                ) from error
            self.path = path
        self.file.seek(offset)
        return self.file.read(size)
