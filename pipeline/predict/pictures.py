"""The pictures that a command line names, loaded by threads in the order given; a bad one becomes a reason."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow as pa

from pipeline.errors import UserError
from pipeline.models import inputs
from pipeline.sources import listing
from pipeline.sources.folder import Folder
from pipeline.sources.listing import at_address, kind_of
from pipeline.sources.parquet import Parquet, rows_of
from pipeline.sources.source import File, Request, SourceError
from pipeline.sources.tar import Tar
from pipeline.sources.tars import Tars
from pipeline.store.decode import ImageRefused, decode
from pipeline.store.manifest import MAX_BYTES, ManifestError, Opened
from pipeline.store.remote import Object, RemoteError, is_remote

CHUNK = 32  # pictures that a thread loads at once
THUMBNAIL = 224  # pixels of the longest side
UNKNOWN = -1  # the size of a file that was only named: all of it is read
COMMAND = "predict"
NOWHERE = Tars(Path(), Path())  # nothing is unpacked


class Picture(NamedTuple):
    """One to be loaded: `data`, or else the bytes at `path`; `reason` says why it cannot be an image."""

    id: str
    path: str
    offset: int
    size: int
    reason: str | None
    data: bytes | None = None


class Lot(NamedTuple):
    """What one or several arguments name: how many pictures, and they, in chunks."""

    total: int
    chunks: Callable[[], Iterator[list[Picture]]]


class Loaded(NamedTuple):
    """A chunk: `errors` has None for each picture that could be decoded; only these have a canvas and a thumbnail, in order.

    `canvases`: (n, side, side, 3) uint8. `thumbnails`: n of (h, w, 3) uint8, or none where nobody asked for them.
    """

    ids: list[str]
    errors: list[str | None]
    canvases: list[np.ndarray]
    thumbnails: list[np.ndarray]


def lots(paths: Sequence[str], column: str) -> list[Lot]:
    """All pictures that `paths` name: folders, uncompressed tars, Parquet tables, lists of paths (.txt, .lst), files.

    Ids are the paths as given, with the name inside; those of a table end in the row's number. Only names, offsets and sizes are
    gathered here, in Arrow tables. Raises SourceError for what is not there or cannot be read as what it is.
    """
    found: list[Lot] = []
    files: list[Path | Object] = []
    for given in paths:
        elsewhere = at_address(given) if is_remote(given) else None
        path = Path(given) if elsewhere is None else next(iter(elsewhere.objects.values()))
        kind, request = kind_of(path), Request("pool", Path(given), NOWHERE, set(), COMMAND, elsewhere)
        if kind == "file":
            files.append(path)
            continue
        found += _of_files(files)
        files = []
        if kind == "parquet":
            found.append(_of_table(path, column, request))
        elif kind == "tar":
            found.append(_of_listing(_listed(_inside(Tar(kind="tar", path=_below(path)), path, request), path)))
        elif isinstance(path, Object):
            raise SourceError(f"{path}: a list of paths is read from a disk. Download it.")
        elif kind == "list":
            found.append(_of_listing(_listed(_named(path), path)))
        else:
            found.append(_of_listing(_listed(_inside(Folder(kind="folder", path="."), path, request), path).sort_by("id")))
    return found + _of_files(files)


def _of_files(paths: Sequence[Path | Object]) -> list[Lot]:
    rows = (File(str(path), str(path), 0, path.size if isinstance(path, Object) else UNKNOWN, None, None) for path in paths)
    return [_of_listing(_listed(rows, paths[0]))] if paths else []


def _inside(source: Folder | Tar, path: Path | Object, request: Request) -> Iterator[File]:
    for file in source.files(request):
        yield file._replace(id=_id(path, file.id))


def _below(path: Path | Object) -> str:
    """How a source names the file that its request is about."""
    return path.name if isinstance(path, Object) else "."


def _id(path: Path | Object, image: str) -> str:
    return image if isinstance(path, Object) else f"{path.as_posix()}/{image}"


def _named(path: Path) -> Iterator[File]:
    """The files of a list, one a line, relative to the current folder. Raises UserError for a line that is not UTF-8."""
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if name := line.rstrip("\r\n"):
                    yield File(name, name, 0, UNKNOWN, None, None)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a list of paths in UTF-8, one a line ({error.reason}).") from None


def _listed(files: Iterable[File], path: Path | Object) -> pa.Table:
    return listing.gathered(files, f"{COMMAND}: listing {path}")


def _of_listing(table: pa.Table) -> Lot:
    """`table`: LISTED."""
    columns = ["id", "path", "offset", "size", "reason"]

    def chunks() -> Iterator[list[Picture]]:
        for part in table.select(columns).to_batches(CHUNK):
            yield [Picture(*row) for row in zip(*part.to_pydict().values(), strict=True)]

    return Lot(len(table), chunks)


def _of_table(path: Path | Object, column: str, request: Request) -> Lot:
    source = Parquet(kind="parquet", path=_below(path), image=column)

    def chunks() -> Iterator[list[Picture]]:
        records = source.records(request)
        while chunk := list(islice(records, CHUNK)):
            yield [Picture(_id(path, r.id), "", 0, len(r.data), r.reason, r.data) for r in chunk]

    return Lot(rows_of(path, request), chunks)


def loaded(found: Sequence[Lot], side: int, workers: int, thumbnails: bool) -> Iterator[Loaded]:
    """Every chunk of every lot, in order, decoded by `workers` threads a few chunks ahead."""
    chunks = chain.from_iterable(lot.chunks() for lot in found)
    yield from inputs.ahead(lambda chunk: _load(chunk, side, thumbnails), chunks, workers)


def _load(chunk: Sequence[Picture], side: int, thumbnails: bool) -> Loaded:
    out = Loaded([picture.id for picture in chunk], [], [], [])
    with Opened() as opened:
        for picture in chunk:
            try:
                image = decode(_bytes_of(picture, opened))
            except ImageRefused as refusal:
                out.errors.append(str(refusal))
                continue
            except (ManifestError, RemoteError, OSError) as error:
                out.errors.append(f"unreadable: {error}")
                continue
            out.errors.append(None)
            out.canvases.append(inputs.canvas(image, side))
            if thumbnails:
                out.thumbnails.append(_thumbnail(image))
    return out


def _bytes_of(picture: Picture, opened: Opened) -> bytes:
    if picture.reason is not None:
        raise ImageRefused(picture.reason)
    if picture.size > MAX_BYTES or (picture.size == UNKNOWN and _size_of(picture.path) > MAX_BYTES):
        raise ImageRefused("oversized: more than 1 GiB")
    if picture.data is not None:
        return picture.data
    data = opened.read(picture.path, picture.offset, picture.size)
    if picture.size not in (UNKNOWN, len(data)):
        raise ImageRefused(f"cut short: {len(data)} of {picture.size} bytes could be read")
    return data


def _size_of(path: str) -> int:
    """Raises ImageRefused for what is no file: a folder in a list, a pipe that nobody fills."""
    if not Path(path).exists():
        raise ImageRefused("not there")
    if not Path(path).is_file():
        raise ImageRefused("not a regular file")
    return Path(path).stat().st_size


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """At most THUMBNAIL pixels; small pictures stay as they are, for the page enlarges them without blurring."""
    height, width = image.shape[:2]
    scale = THUMBNAIL / max(height, width)
    if scale >= 1:
        return image
    return cv2.resize(image, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA)
