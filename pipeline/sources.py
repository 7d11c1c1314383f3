"""Where images come from: folders, uncompressed tars, Parquet tables, torchvision's data sets.

To add a kind of source, add its section to `Source` and its branch to `_files`.
"""

import difflib
import inspect
import io
import json
import operator
import socket
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import AfterValidator, Field

from pipeline import progress
from pipeline.errors import UserError
from pipeline.params import Section

CHUNK = 1024  # files of a batch of a listing
RECORDS = 64  # of a table, with their bytes, in memory at once
SHARD_BYTES = 512 << 20

LISTED = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.dictionary(pa.int32(), pa.string())),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("class", pa.dictionary(pa.int32(), pa.string())),  # null in the pool
        ("reason", pa.string()),  # why the file is not even read; null for an image to check
    ]
)


class SourceError(UserError):
    """A source named in params, or what it holds, does not make a data set."""


# Params ---------------------------------------------------------------------------------------------------------------


def _inside(path: str) -> str:
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError("must lie below `prepare.root`, the folder that DVC watches; give it relative to that")
    return path


InsideRoot = Annotated[str, AfterValidator(_inside)]
"""A path relative to `root`; may be a glob pattern."""


class Folder(Section):
    """Image files; where labels are wanted, `<class>/...`: the first folder below `path` names the class."""

    kind: Literal["folder"]
    path: InsideRoot


class Tar(Section):
    """Uncompressed tars, read in place; where labels are wanted, the first folder of a member's name is its class."""

    kind: Literal["tar"]
    path: InsideRoot


class Torchvision(Section):
    """A classification set of torchvision by name (`CIFAR10`), downloaded into `root` if it is not there, kept as PNG."""

    kind: Literal["torchvision"]
    name: str
    split: str = "train"


class Parquet(Section):
    """Tables of encoded images, as Hugging Face stores them.

    `image`: the column of bytes, or of structs with a field `bytes`. `label`: the column of class names, or of class
    numbers; their names stand in the file's Hugging Face metadata or in `classes`, number 0 first.
    """

    kind: Literal["parquet"]
    path: InsideRoot
    image: str = "image"
    label: str = "label"
    classes: tuple[str, ...] | None = None


Source = Annotated[Folder | Tar | Torchvision | Parquet, Field(discriminator="kind")]
Role = Literal["labelled", "val", "pool"]


# Listing --------------------------------------------------------------------------------------------------------------


class Listing(NamedTuple):
    """What the sources of one role hold."""

    role: Role
    table: pa.Table  # LISTED
    classes: frozenset[str]  # of the images, and of class folders without any
    moved: Mapping[str, str]  # shards still in the artifact's temporary folder: what manifests will say -> where they lie


class _File(NamedTuple):
    """A row of LISTED."""

    id: str
    path: str
    offset: int
    size: int
    label: str | None
    reason: str | None


class _Member(NamedTuple):
    """A file of a folder or tar; a folder has a name that ends in a slash."""

    name: str  # within the source
    size: int
    offset: int = 0
    reason: str | None = None  # why it cannot be an image


class _Record(NamedTuple):
    """An image that is no file: a row of a table."""

    id: str
    data: bytes
    label: str | None
    reason: str | None = None


class Shards:
    """Uncompressed tars `images-00000.tar`, ... in an artifact that is being written."""

    def __init__(self, folder: Path, final: Path) -> None:
        self.folder, self.final = folder, final
        self.tar: tarfile.TarFile | None = None
        self.path = ""
        self.moved: dict[str, str] = {}

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_: object) -> None:
        if self.tar is not None:
            self.tar.close()

    def add(self, name: str, data: bytes) -> tuple[str, int]:
        """The path and offset at which manifests will find `data`."""
        if self.tar is None or self.tar.offset >= SHARD_BYTES:
            self.__exit__()
            shard = f"images-{len(self.moved):05}.tar"
            self.tar = tarfile.open(self.folder / shard, "w")  # noqa: SIM115
            self.path = (self.final / shard).as_posix()
            self.moved[self.path] = str(self.folder / shard)
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self.tar.addfile(member, io.BytesIO(data))
        self.tar.members.clear()  # type: ignore[attr-defined]
        blocks = -(-len(data) // tarfile.BLOCKSIZE)
        return self.path, self.tar.offset - blocks * tarfile.BLOCKSIZE


def listed(sources: Sequence[Source], role: Role, root: Path, shards: Shards) -> Listing:
    """Every file of a role's sources, in no particular order; images that lie in tables become members of `shards`.

    Paths begin with `root`, ids are relative to it. Raises SourceError where a source is missing, of another kind, or
    without the labels that its role needs.
    """
    batches: list[pa.RecordBatch] = []
    classes: set[str] = set()
    files = chain.from_iterable(_files(source, role, root, shards, classes) for source in sources)
    with shards, progress.bar(None, "files", f"prepare: listing {role}") as shown:
        while chunk := list(islice(files, CHUNK)):
            batches.append(batch(chunk, LISTED))
            shown.update(len(chunk))
    table = pa.Table.from_batches(batches, LISTED).unify_dictionaries()
    return Listing(role, table, frozenset(classes), shards.moved)


def batch(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.RecordBatch:
    """`rows` as columns: Python objects live no longer than their chunk."""
    return pa.RecordBatch.from_arrays(
        [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), schema, strict=True)], schema=schema
    )


def _files(source: Source, role: Role, root: Path, shards: Shards, classes: set[str]) -> Iterator[_File]:
    """Every file of a source; the classes it has are added to `classes`."""
    if source.kind == "torchvision":
        yield from _unpacked(_torchvision_records(source, role, root), shards, classes)
        return
    for path in _matches(source.path, role, root):
        if source.kind == "parquet":
            yield from _unpacked(_parquet_records(source, path, role, root), shards, classes)
        else:
            yield from _files_below(path, source, role, root, classes)


def _matches(pattern: str, role: Role, root: Path) -> list[Path]:
    found = [root / pattern] if (root / pattern).exists() else sorted(p for p in root.glob(pattern) if p.name[0] != ".")
    if not found:
        near = difflib.get_close_matches(pattern, [p.name for p in root.iterdir()], n=1)
        hint = f" (did you mean `{near[0]}`?)" if near else ""
        raise SourceError(
            f"prepare.{role}: nothing matches `{pattern}`{hint} in {root}, the folder of prepare.root. Correct the path, "
            "or put the data there."
        )
    return found


def _prefix(path: Path, root: Path) -> str:
    """What the ids of a source's images begin with."""
    return "" if path == root else path.relative_to(root).as_posix() + "/"


def _utf8(name: str) -> str:
    """A name as Parquet can hold it: bytes that are not UTF-8 become escapes."""
    return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _files_below(path: Path, source: Folder | Tar, role: Role, root: Path, classes: set[str]) -> Iterator[_File]:
    """The files of one folder or tar. Raises SourceError if labels are wanted and it has no class folders."""
    labelled, seen = role != "pool", set[str]()
    prefix, inside = _prefix(path, root), path.as_posix()
    for member in _tar_members(path) if source.kind == "tar" else _folder_members(path):
        name = _utf8(member.name)
        visible = not any(part.startswith(".") for part in name.split("/"))
        top, slash, _ = name.partition("/")
        label = top if labelled and slash else None
        if label is not None and visible:
            seen.add(label)
        if name.endswith("/"):
            continue
        reason = member.reason
        if reason is None and not visible:
            reason = "hidden file"
        elif reason is None and labelled and not slash:
            reason = "outside of the class folders"
        elif reason is None and source.kind == "folder" and name != member.name:
            reason = "file name is not UTF-8"
        file = inside if source.kind == "tar" else f"{inside}/{name}"
        yield _File(prefix + name, file, member.offset, member.size, label, reason)
    if labelled and not seen:
        raise SourceError(
            f"prepare.{role}: {path} has no class folders. Labelled images are expected as <class>/<image>, one folder "
            "for each class."
        )
    classes |= seen


def _unpacked(records: Iterator[_Record], shards: Shards, classes: set[str]) -> Iterator[_File]:
    for record in records:
        path, offset = shards.add(record.id, record.data)
        if record.label is not None:
            classes.add(record.label)
        yield _File(record.id, path, offset, len(record.data), record.label, record.reason)


# Folders and tars -----------------------------------------------------------------------------------------------------


def _folder_members(folder: Path) -> Iterator[_Member]:
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder. For a tar, say `kind: tar`.")
    yield from _below(folder, "", frozenset())


def _below(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[_Member]:
    """Links to files and folders are followed: image sets are often assembled of them."""
    here = folder.stat()
    if (here.st_dev, here.st_ino) in above:
        raise SourceError(f"{folder} is a link to a folder that holds it, so it has no end. Remove the link.")
    for path in folder.iterdir():
        name = prefix + path.name
        try:
            kind = path.stat()
        except FileNotFoundError:
            yield _Member(name, 0, reason="link to nothing")
            continue
        if stat.S_ISDIR(kind.st_mode):
            yield _Member(name + "/", 0)
            yield from _below(path, name + "/", above | {(here.st_dev, here.st_ino)})
        else:
            yield _Member(name, kind.st_size, reason=None if stat.S_ISREG(kind.st_mode) else "not a regular file")


def _tar_members(file: Path) -> Iterator[_Member]:
    _refuse_compressed(file)
    try:
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it would keep an object of every member
                yield _tar_member(member)
            end = tar.offset
    except tarfile.TarError as error:
        raise SourceError(
            f"{file} cannot be read as a tar ({error}). It may be cut short or damaged: copy or make it anew."
        ) from None
    _expect_the_end(file, end)


def _tar_member(member: tarfile.TarInfo) -> _Member:
    name = member.name.removeprefix("./")
    if member.isdir():
        return _Member(name + "/", 0)
    if member.islnk() or member.issym():
        return _Member(name, 0, member.offset_data, "link inside a tar")
    if not member.isreg() or member.issparse():
        return _Member(name, member.size, member.offset_data, "not a regular file")
    return _Member(name, member.size, member.offset_data)


def _refuse_compressed(file: Path) -> None:
    if not file.is_file():
        raise SourceError(f"{file} is not a file. For a folder of images, say `kind: folder`.")
    with file.open("rb") as f:
        head = f.read(6)
    for magic, name, unpack in (
        (b"\x1f\x8b", "gzip", "gunzip -k"),
        (b"BZh", "bzip2", "bunzip2 -k"),
        (b"\xfd7zXZ", "xz", "unxz -k"),
        (b"\x28\xb5\x2f\xfd", "zstd", "zstd -d"),
        (b"PK\x03\x04", "zip", "unzip, then tar -cf"),
    ):
        if head.startswith(magic):
            raise SourceError(
                f"{file} is compressed ({name}), but images are read in place from uncompressed tars. Unpack it once: "
                f"`{unpack} {file}`."
            )


def _expect_the_end(file: Path, end: int) -> None:
    """A tar ends with zeros; tarfile also stops, without a word, where it is cut, damaged, or followed by another tar."""
    with file.open("rb") as f:
        f.seek(end)
        mark = f.read(tarfile.BLOCKSIZE)
        if len(mark) < tarfile.BLOCKSIZE:
            raise SourceError(f"{file} is cut short: the end mark of a tar is missing. Copy or make it anew.")
        if mark.strip(b"\0"):
            raise SourceError(f"{file} is damaged at byte {end}: no member of a tar begins there. Copy or make it anew.")
        while rest := f.read(1 << 20):
            if rest.strip(b"\0"):
                raise SourceError(
                    f"{file} goes on behind its end mark, as tars joined by `cat` do, and what follows would be lost. "
                    "Keep them apart, or join them with `tar -A`."
                )


# Tables with images inside --------------------------------------------------------------------------------------------


def _parquet_records(source: Parquet, file: Path, role: Role, root: Path) -> Iterator[_Record]:
    with _parquet(file, role) as table:
        schema, where = table.schema_arrow, f"prepare.{role}: {file}"
        _expect_column(schema, "image", source.image, where, _holds_bytes, "image files (binary, or a struct with `bytes`)")
        columns = [source.image]
        names: Sequence[str] | None = None
        if role != "pool":
            _expect_column(schema, "label", source.label, where, _holds_labels, "class names or numbers")
            columns.append(source.label)
            names = _class_names(source, schema, where)
        row = 0
        for part in table.iter_batches(RECORDS, columns=columns):
            cells = part.column(source.image)
            encoded = cells.field("bytes") if pa.types.is_struct(cells.type) else cells
            labels = part.column(source.label).to_pylist() if role != "pool" else [None] * len(part)
            for data, label in zip(encoded.to_pylist(), labels, strict=True):
                yield _record(f"{_prefix(file, root)}{row:08}", data or b"", label, names, role)
                row += 1


@contextmanager
def _parquet(file: Path, role: Role) -> Iterator[pq.ParquetFile]:
    """Whatever Arrow says of a damaged file, at its footer or in the middle, names the file."""
    try:
        with pq.ParquetFile(file) as table:
            yield table
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"prepare.{role}: {file} cannot be read as Parquet ({error}). Copy or make it anew.") from None


def _record(image: str, data: bytes, label: str | int | None, names: Sequence[str] | None, role: Role) -> _Record:
    """`label` is the class's name, or its number in `names`; below 0 it means, by custom, that there is none."""
    if role == "pool":
        return _Record(image, data, None)
    if isinstance(label, int):
        known = range(len(names)) if names is not None else range(label + 1)
        label = None if label not in known else names[label] if names is not None else str(label)
    return _Record(image, data, label, None if label is not None else "no label")


def _expect_column(schema: pa.Schema, key: str, name: str, where: str, fits: Callable[[pa.DataType], bool], what: str) -> None:
    if name not in schema.names:
        raise SourceError(f"{where} has no column `{name}`; it has {some(schema.names)}. Name the right one: `{key}: <column>`.")
    kind = schema.field(name).type
    if not fits(kind):
        raise SourceError(f"{where}: the column `{name}` ({kind}) does not hold {what}. Name another: `{key}: <column>`.")


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


def _torchvision_records(source: Torchvision, role: Role, root: Path) -> Iterator[_Record]:
    dataset = _torchvision_dataset(source, role, root)
    names = tuple(getattr(dataset, "classes", ()))
    for row in range(len(dataset)):
        image_id = f"{source.name}/{source.split}/{row:08}"
        try:
            image, target = dataset[row]
        except (OSError, SyntaxError) as error:
            yield _Record(image_id, b"", None, f"damaged: {error}")
            continue
        try:
            label = operator.index(target) if role != "pool" else None
        except TypeError:
            raise SourceError(
                f"prepare.{role}: torchvision's {source.name} gives {type(target).__name__} targets, but an image needs one "
                "class number. It can only serve as a pool."
            ) from None
        yield _record(image_id, _png(image), label, names or None, role)


def _torchvision_dataset(source: Torchvision, role: Role, root: Path) -> Any:
    import torchvision.datasets as known  # seconds, and only here

    where = f"prepare.{role}: torchvision's {source.name}"
    options = inspect.signature(getattr(known, source.name)).parameters if source.name in known.__all__ else {}
    if "root" not in options:
        near = difflib.get_close_matches(source.name, known.__all__, n=1)
        hint = f" (did you mean `{near[0]}`?)" if near else ""
        raise SourceError(
            f"prepare.{role}: torchvision has no data set `{source.name}`{hint}. Its list: torchvision.datasets.__all__."
        )
    chosen: dict[str, Any] = {}
    if "split" in options or "image_set" in options:
        chosen["split" if "split" in options else "image_set"] = source.split
    elif "train" in options:
        if source.split not in ("train", "test"):
            raise SourceError(f"{where} has the splits train and test, not `{source.split}`.")
        chosen["train"] = source.split == "train"
    if "download" in options or any(o.kind is inspect.Parameter.VAR_KEYWORD for o in options.values()):
        chosen["download"] = True
    try:
        with _impatient():
            return getattr(known, source.name)(str(root), **chosen)
    except ValueError as error:  # a split that it does not have
        raise SourceError(f"{where}: {error}") from None
    except (OSError, RuntimeError, ImportError) as error:
        call = ", ".join(["'FOLDER'", *(f"{k}={v!r}" for k, v in chosen.items())])
        raise SourceError(
            f"{where} is not in {root} (prepare.root) and could not be downloaded: {error}. On a machine with a network, "
            f'run `python -c "import torchvision.datasets as d; d.{source.name}({call})"` and copy what FOLDER then holds '
            f"to {root}."
        ) from None


@contextmanager
def _impatient() -> Iterator[None]:
    """Downloads without an answer fail after a minute; torchvision would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _png(image: Image.Image) -> bytes:
    stored = io.BytesIO()
    (image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else image.convert("RGB")).save(stored, "PNG", compress_level=1)
    return stored.getvalue()


def some(names: Sequence[str]) -> str:
    """The first ten of `names`, for a message."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"
