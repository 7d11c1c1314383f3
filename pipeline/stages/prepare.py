"""Index the images of every source, refuse what cannot be used, and split the labelled ones.

A source is first listed (cheap: names, offsets and sizes), so that a missing path or a class without images stops the
stage before the long part; then every image is read once, checked and measured. Images inside tables are unpacked into
uncompressed tars on the way, so that everything behind this stage sees files and tar members only.
"""

import difflib
import stat
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from pipeline import artifact, images, manifest, progress, stage
from pipeline.errors import UserError
from pipeline.params import Machine, Section
from pipeline.stage import Metrics

CHUNK = 1024  # images
BYTES_PER_PIXEL = 16  # more than any format needs: a file larger than this times `max_pixels` is not read at all

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
QUARANTINE = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("role", pa.string()),  # labelled, val or pool
        ("reason", pa.string()),  # "<kind>" or "<kind>: <detail>"
    ]
)


class SourceError(UserError):
    """A source named in params, or what it holds, is not what `prepare` needs."""


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


Source = Annotated[Folder | Tar, Field(discriminator="kind")]


class Prepare(Section):
    """Where the images come from, and how the labelled ones are divided.

    `per_class`: the label budget, so many images of each class drawn by `seed` (null: all). `rest`: where the others
    go, into the pool without their labels or nowhere. `holdout`: the share of each class, at least one image, on which
    every choice is made. `classes`: the order of the classes, if another than that of their names is wanted (a
    published checkpoint's). `check`: `decode` every image, or trust its `header`. `max_pixels`: larger images are
    refused by their header.
    """

    root: str
    labelled: tuple[Source, ...] = Field(min_length=1)
    val: tuple[Source, ...] = Field(min_length=1)
    pool: tuple[Source, ...] = ()
    per_class: PositiveInt | None = None
    rest: Literal["pool", "drop"] = "pool"
    holdout: float = Field(0.1, gt=0, lt=1)
    classes: tuple[str, ...] | None = None
    seed: NonNegativeInt = 0
    check: Literal["decode", "header"] = "decode"
    max_pixels: PositiveInt = images.MAX_PIXELS


# The stage ------------------------------------------------------------------------------------------------------------


def run(
    params: Prepare,
    *,
    root: Path,
    train_out: Path,
    holdout_out: Path,
    val_out: Path,
    pool_out: Path,
    quarantine_out: Path,
    machine: Machine,
) -> Metrics:
    """Index all images: manifests `train`, `holdout`, `val`, `pool`, and `quarantine` for what was refused.

    Raises SourceError, before any image is decoded where that is possible, when the sources do not make a data set.
    """
    with ExitStack() as stack:
        outs = (train_out, holdout_out, val_out, pool_out, quarantine_out)
        train_to, holdout_to, val_to, pool_to, quarantine_to = (stack.enter_context(artifact.writing(out)) for out in outs)
        labelled = _listed(params.labelled, "labelled", root)
        val = _listed(params.val, "val", root)
        pool = _listed(params.pool, "pool", root)
        _no_image_twice([labelled, val, pool])
        classes = _class_order(labelled, val, params.classes)

        check = _Check(params.check == "decode", params.max_pixels)
        workers = machine.cores(machine.workers)
        labelled_images = _checked(labelled, classes, check, workers)
        val_images = _checked(val, classes, check, workers)
        pool_images = _checked(pool, (), check, workers)

        budget, rest = _drawn(labelled_images.good, classes, params.per_class, params.seed)
        train, holdout = _split(budget, classes, params.holdout, params.seed)
        pool_table = pa.concat_tables([pool_images.good, _unlabelled(rest)]) if params.rest == "pool" else pool_images.good
        manifest.write(train_to, train, classes)
        manifest.write(holdout_to, holdout, classes)
        manifest.write(val_to, val_images.good, classes)
        manifest.write(pool_to, pool_table, ())
        refused = pa.concat_tables([i.refused for i in (labelled_images, val_images, pool_images)]).sort_by("id")
        pq.write_table(refused.combine_chunks(), quarantine_to / "quarantine.parquet", compression="zstd")
    return {
        "classes": len(classes),
        "train": len(train),
        "holdout": len(holdout),
        "val": len(val_images.good),
        "pool": len(pool_table),
        "dropped": len(rest) if params.rest == "drop" else 0,
        "quarantine": len(refused),
        "reasons": _reasons(refused),
        "repeated": _repeated([labelled_images.good, val_images.good, pool_images.good]),
    }


# Listing --------------------------------------------------------------------------------------------------------------


class _Listing(NamedTuple):
    """What the sources of one role hold."""

    role: str
    table: pa.Table  # LISTED
    classes: frozenset[str]  # of class folders, even empty ones


class _Member(NamedTuple):
    """A file of a folder or tar; a folder has a name that ends in a slash."""

    name: str  # within the source
    size: int
    offset: int = 0
    reason: str | None = None  # why it cannot be an image


def _listed(sources: Sequence[Source], role: str, root: Path) -> _Listing:
    """List the files of a role's sources. Raises SourceError for a path that is missing or of another kind."""
    batches: list[pa.RecordBatch] = []
    classes: set[str] = set()
    with progress.bar(None, "files", f"prepare: listing {role}") as shown:
        for source in sources:
            for path in _matches(source.path, role, root):
                here = set[str]()
                for batch in _batches(path, source, root, here if role != "pool" else None):
                    batches.append(batch)
                    shown.update(len(batch))
                if role != "pool" and not here:
                    raise SourceError(
                        f"prepare.{role}: {path} has no class folders. Labelled images are expected as "
                        "<class>/<image>, one folder for each class."
                    )
                classes |= here
    return _Listing(role, pa.Table.from_batches(batches, LISTED), frozenset(classes))


def _matches(pattern: str, role: str, root: Path) -> list[Path]:
    found = [root / pattern] if (root / pattern).exists() else sorted(root.glob(pattern))
    if not found:
        near = difflib.get_close_matches(pattern, [p.name for p in root.iterdir()], n=3, cutoff=0.5)
        there = f" (did you mean `{'`, `'.join(near)}`?)" if near else ""
        raise SourceError(
            f"prepare.{role}: nothing matches `{pattern}`{there} in {root}, the folder of prepare.root. Correct the path, "
            "or put the data there."
        )
    return found


def _batches(path: Path, source: Source, root: Path, classes: set[str] | None) -> Iterator[pa.RecordBatch]:
    """The files of one folder or tar as LISTED batches; adds the class folders met to `classes` (None: labels are not
    wanted)."""
    members = _tar_members(path) if source.kind == "tar" else _folder_members(path)
    prefix = path.relative_to(root).as_posix() + "/" if path != root else ""
    files: list[_Member] = []
    labels: list[str | None] = []
    for member in members:
        visible = not any(part.startswith(".") for part in member.name.split("/"))
        top, slash, _ = member.name.partition("/")
        if classes is not None and slash and visible:
            classes.add(top)
        if member.name.endswith("/"):
            continue
        if member.reason is None:
            if not visible:
                member = member._replace(reason="hidden file")
            elif classes is not None and not slash:
                member = member._replace(reason="outside of the class folders")
        files.append(member)
        labels.append(top if classes is not None and slash else None)
        if len(files) == CHUNK:
            yield _batch(path, prefix, source.kind == "tar", files, labels)
            files, labels = [], []
    if files:
        yield _batch(path, prefix, source.kind == "tar", files, labels)


def _batch(path: Path, prefix: str, one_file: bool, files: list[_Member], labels: list[str | None]) -> pa.RecordBatch:
    inside = path.as_posix()
    if one_file:
        paths = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(files), np.int32)), pa.array([inside]))
    else:
        paths = pa.array([f"{inside}/{f.name}" for f in files]).dictionary_encode()
    columns = [
        pa.array([prefix + f.name for f in files]),
        paths,
        pa.array([f.offset for f in files], pa.int64()),
        pa.array([f.size for f in files], pa.int64()),
        pa.array(labels, pa.string()).dictionary_encode(),
        pa.array([f.reason for f in files], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=LISTED)


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
        if not _is_utf8(path.name):
            yield _Member(_escaped(name), 0, reason="file name is not UTF-8")
            continue
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
    name = _escaped(member.name.removeprefix("./"))
    if member.isdir():
        return _Member("" if name in (".", "") else name + "/", 0)
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
    """A tar ends with blocks of zeros: tarfile also stops, without a word, at a cut between two members or before a
    second archive."""
    with file.open("rb") as f:
        f.seek(end)
        rest = f.read(tarfile.BLOCKSIZE)
        if len(rest) < tarfile.BLOCKSIZE:
            raise SourceError(f"{file} has no end mark: it was cut short. Copy or make it anew.")
        while rest:
            if rest.strip(b"\0"):
                raise SourceError(
                    f"{file} goes on behind its end mark (tars joined by `cat`?). Join them with `tar -A`, or list them "
                    "one by one."
                )
            rest = f.read(1 << 20)


def _is_utf8(name: str) -> bool:
    return name.isascii() or not any("\udc80" <= c <= "\udcff" for c in name)


def _escaped(name: str) -> str:
    return name if _is_utf8(name) else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _no_image_twice(listings: Sequence[_Listing]) -> None:
    ids = pa.chunked_array([chunk for listing in listings for chunk in listing.table["id"].chunks], pa.string())
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0].as_py()
    roles = [listing.role for listing in listings if pc.is_in(pa.scalar(twice), listing.table["id"]).as_py()]
    raise SourceError(
        f"the image {twice} occurs twice (in {' and '.join(f'prepare.{role}' for role in roles)}). An image may come from "
        "one source only, and a name may occur once in a tar."
    )


def _class_order(labelled: _Listing, val: _Listing, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The classes in the order of their labels. Raises SourceError where val or `prepare.classes` has others than
    `labelled`."""
    unknown = sorted(val.classes - labelled.classes)
    if unknown:
        raise SourceError(
            f"prepare.val has classes that prepare.labelled lacks: {_some(unknown)}. No model can learn them: add labelled "
            f"images, or take them out of val. prepare.labelled has: {_some(sorted(labelled.classes))}."
        )
    if wanted is None:
        return tuple(sorted(labelled.classes))
    if set(wanted) != labelled.classes or len(set(wanted)) != len(wanted):
        missing, unknown = sorted(labelled.classes - set(wanted)), sorted(set(wanted) - labelled.classes)
        repeated = sorted(name for name, n in Counter(wanted).items() if n > 1)
        raise SourceError(
            "prepare.classes must name every class of prepare.labelled once. "
            f"Missing: {_some(missing)}. Not there: {_some(unknown)}. Repeated: {_some(repeated)}."
        )
    return tuple(wanted)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"


# Checking -------------------------------------------------------------------------------------------------------------


class _Check(NamedTuple):
    """How an image is checked."""

    decode: bool
    max_pixels: int

    def __call__(self, data: bytes) -> tuple[int, int]:
        """(width, height); raises ImageRefused."""
        if not self.decode:
            return images.size_of(data, self.max_pixels)
        height, width, _ = images.decode(data, self.max_pixels).shape
        return width, height


class _Checked(NamedTuple):
    good: pa.Table  # manifest.SCHEMA, sorted by id
    refused: pa.Table  # QUARANTINE


def _checked(listing: _Listing, classes: Sequence[str], check: _Check, workers: int) -> _Checked:
    """Read and check every image of a role. Raises SourceError where a class, or the whole role, has no usable
    image."""
    table, role = listing.table, listing.role
    chunks = [table.slice(at, CHUNK) for at in range(0, len(table), CHUNK)]
    threads = ThreadPoolExecutor(workers)
    sizes = []
    try:
        with progress.bar(len(table), "images", f"prepare: checking {role}") as shown:
            for part in threads.map(lambda chunk: _check_chunk(chunk, check), chunks):
                sizes.append(part)
                shown.update(len(part))
    finally:
        threads.shutdown(cancel_futures=True)
    table = pa.Table.from_arrays(
        [*table.columns[:5], *(pa.chunked_array([p.column(i) for p in sizes], f.type) for i, f in enumerate(MEASURED))],
        schema=pa.schema([*list(LISTED)[:5], *MEASURED]),
    )
    is_good = pc.is_null(table["reason"])
    refused = table.filter(pc.invert(is_good))
    good = table.filter(is_good)
    _expect_images(listing, good, refused, classes)
    label = pc.index_in(good["class"].cast(pa.string()), pa.array(classes, pa.string()))
    good = good.append_column("label", label).select(manifest.SCHEMA.names).cast(manifest.SCHEMA).sort_by("id")
    role_column = pa.array([role]).take(pa.array(np.zeros(len(refused), np.int32)))
    return _Checked(good, refused.append_column("role", role_column).select(QUARANTINE.names).cast(QUARANTINE))


MEASURED = pa.schema([("width", pa.int32()), ("height", pa.int32()), ("crc32", pa.uint32()), ("reason", pa.string())])


def _check_chunk(chunk: pa.Table, check: _Check) -> pa.RecordBatch:
    rows: list[tuple[int | None, int | None, int | None, str | None]] = []
    columns = chunk.select(["path", "offset", "size", "reason"]).to_pydict().values()
    with manifest.Opened() as opened:
        for path, offset, size, reason in zip(*columns, strict=True):
            if reason is None and size > check.max_pixels * BYTES_PER_PIXEL:
                reason = f"oversized: {size} bytes"
            if reason is not None:
                rows.append((None, None, None, reason))
                continue
            data = opened.read(path, offset, size)
            try:
                width, height = check(data)
            except images.ImageRefused as refusal:
                rows.append((None, None, None, str(refusal)))
            else:
                rows.append((width, height, zlib.crc32(data), None))
    arrays = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), MEASURED, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=MEASURED)


def _expect_images(listing: _Listing, good: pa.Table, refused: pa.Table, classes: Sequence[str]) -> None:
    if not len(good) and (len(refused) or listing.role != "pool"):
        raise SourceError(f"prepare.{listing.role} has no readable image: {_told(refused)}.")
    if not classes:
        return
    empty = sorted(listing.classes - set(pc.unique(good["class"].cast(pa.string())).to_pylist()))
    if empty:
        there = {name: refused.filter(pc.equal(refused["class"].cast(pa.string()), name)) for name in empty[:10]}
        raise SourceError(
            f"prepare.{listing.role} has classes without a readable image: "
            + "; ".join(f"{name} ({_told(files)})" for name, files in there.items())
            + (f"; and {len(empty) - 10} more" if len(empty) > 10 else "")
            + ". Add images, or remove the class folder."
        )


def _told(refused: pa.Table) -> str:
    return ", ".join(f"{n} x {reason}" for reason, n in _reasons(refused).items()) or "it holds no files"


def _reasons(refused: pa.Table) -> dict[str, int]:
    """How many were refused for each kind of reason, the most frequent first."""
    kinds = pc.list_element(pc.split_pattern(refused["reason"], ":", max_splits=1), 0)
    counts = {pair["values"]: pair["counts"] for pair in pc.value_counts(kinds).to_pylist()}
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _repeated(tables: Sequence[pa.Table]) -> int:
    """How many images are byte for byte (by CRC-32 and size) another one of the data set."""
    content = pa.concat_tables([t.select(["crc32", "size"]) for t in tables])
    return len(content) - len(content.group_by(["crc32", "size"]).aggregate([]))


# Dividing -------------------------------------------------------------------------------------------------------------


def _by_class(table: pa.Table, classes: Sequence[str], seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Each class with its row numbers, shuffled: a draw of more images contains the draw of fewer, and no class moves
    another's."""
    labels = table["label"].to_numpy()
    order = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[order], np.arange(len(classes) + 1))
    for label, name in enumerate(classes):
        rows = order[ends[label] : ends[label + 1]]
        yield name, np.random.default_rng([seed, *name.encode()]).permutation(rows)


def _drawn(table: pa.Table, classes: Sequence[str], per_class: int | None, seed: int) -> tuple[pa.Table, pa.Table]:
    """`per_class` images of each class, and the rest."""
    if per_class is None:
        return table, table.slice(0, 0)
    shuffled = dict(_by_class(table, classes, seed))
    short = {name: len(rows) for name, rows in shuffled.items() if len(rows) < per_class}
    if short:
        held = _some([f"{name} {n}" for name, n in short.items()])
        raise SourceError(
            f"prepare.per_class is {per_class}, but these classes have fewer readable labelled images: {held}. "
            f"Set it to {min(short.values())} or less, or to null for all."
        )
    return _parted(table, np.concatenate([rows[:per_class] for rows in shuffled.values()]))


def _split(table: pa.Table, classes: Sequence[str], share: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """Train and holdout."""
    held = []
    for name, rows in _by_class(table, classes, seed):
        n = max(1, round(share * len(rows)))
        if n >= len(rows):
            raise SourceError(
                f"prepare.holdout ({share}) leaves no training image of the class {name}, which has {len(rows)}. "
                "Lower it, raise prepare.per_class, or add images."
            )
        held.append(rows[:n])
    holdout, train = _parted(table, np.concatenate(held))
    return train, holdout


def _parted(table: pa.Table, rows: np.ndarray) -> tuple[pa.Table, pa.Table]:
    chosen = np.zeros(len(table), bool)
    chosen[rows] = True
    return table.filter(pa.array(chosen)), table.filter(pa.array(~chosen))


def _unlabelled(table: pa.Table) -> pa.Table:
    return table.set_column(
        table.schema.get_field_index("label"), manifest.SCHEMA.field("label"), pa.nulls(len(table), pa.int32())
    )


if __name__ == "__main__":
    stage.main(run)
