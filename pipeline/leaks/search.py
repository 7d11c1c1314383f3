"""Search a set of images for copies of another set's, shard by shard."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from pipeline.harness import progress, scratch, shards
from pipeline.harness.machine import Machine
from pipeline.leaks import features, geometry, index, verdict
from pipeline.leaks.findings import (
    FINDINGS,
    FOUND,
    LEAST_ALIKE,
    TOO_FEW,
    UNDECODABLE,
    Row,
    lookalike_row,
    same_bytes_row,
    unverifiable_row,
)
from pipeline.leaks.index import VotingIndex
from pipeline.leaks.verdict import Likeness, Verdict
from pipeline.store import artifact, manifest
from pipeline.store.decode import ImageRefused, decode
from pipeline.store.manifest import Manifest
from pipeline.store.params import Section

SHARD = 1024  # images; a killed run loses the shards in work, and memory does not grow with the pool
BATCH = 32  # images whose features are searched for at once
PICTURES, ROWS = "pictures.safetensors", "rows.parquet"
TRAIN_SHARDS = 64  # at most so many shards of the reference, evenly spread, train the index


class Search(Section):
    """What the leak check looks for; what happens to what it finds is the section `dedup`."""

    train: bool = True
    """Look for copies of labelled images, and among them. Without it the index holds val and holdout alone: it takes 24 bytes an
    entry, about 600 entries an image, in every worker process."""
    duplicates: bool = False
    """Look for copies within the pool, which `dedup.duplicates: collapse` needs. It indexes the pool, so it is for pools of up to
    some hundred thousand images."""


class Reference(NamedTuple):
    """The images that others are compared with: val, then holdout, then train, one after another."""

    images: Manifest
    names: np.ndarray  # (images,) str: the set of each row

    @classmethod
    def of(cls, sets: Mapping[str, Manifest]) -> "Reference":
        table = pa.concat_tables([images.table for images in sets.values()]).unify_dictionaries().combine_chunks()
        return cls(Manifest(table, ()), np.repeat(np.array(list(sets)), [len(images) for images in sets.values()]))


def search(pool: Manifest, reference: Mapping[str, Manifest], duplicates: bool, workdir: Path, machine: Machine) -> pa.Table:
    """All that `dedup` decides on, as rows of FOUND: pool images in the reference, reference images in each other, images that
    nothing can be compared with, and pool images that look like one of `val`, sorted.

    `reference`: val, holdout and train by name, in this order, or some of them. Of two of its sets, or of two images of one, the
    later is the one that was found in the earlier. `duplicates`: pool images in each other, too.
    """
    known = Reference.of(reference)
    work = Searcher({"pool": pool, "reference": known.images}, workdir, machine)
    if duplicates:
        work.describe("pool")
    names = {"pool": np.repeat("pool", len(pool)), "reference": known.names}
    pairs = [("pool", "reference"), ("reference", "reference"), *([("pool", "pool")] if duplicates else [])]
    found = [_named(work.find(name, other, len(reference["val"])), work.sets, names, name, other) for name, other in pairs]
    return pa.concat_tables(found).sort_by([(name, "ascending") for name in ("relation", "id", "match_id", "outcome")])


def _named(found: pa.Table, sets: Mapping[str, Manifest], names: Mapping[str, np.ndarray], name: str, other: str) -> pa.Table:
    """The findings as rows of FOUND."""
    of = names[name][found["row"].to_numpy()]
    matched = pc.is_valid(found["match"]).to_numpy()
    match = np.full(len(found), "", object)
    match[matched] = names[other][found["match"].drop_null().to_numpy()]
    relation = [f"{a}-{b}" if b else str(a) for a, b in zip(of, match, strict=True)]
    columns = {
        "relation": pa.array(relation, pa.string()),
        "id": sets[name].table["id"].take(found["row"]),
        "match_id": sets[other].table["id"].take(found["match"]),
    }
    return pa.table(columns | {c: found[c] for c in FINDINGS.names}).cast(FOUND)


class Searcher:
    """The images of one set found in another, shard by shard, by worker processes; finished shards stay in `workdir`."""

    def __init__(self, sets: Mapping[str, Manifest], workdir: Path, machine: Machine) -> None:
        self.sets, self.workdir, self.machine = sets, workdir.absolute(), machine
        self._whole: set[Path] = set()

    def describe(self, name: str) -> Path:
        """Features and small grey copies of a whole set, kept in its folder."""
        folder = self.workdir / name
        self._run(describe_shard, name, folder, f"search: features of {name}")
        return folder

    def find(self, name: str, reference: str, lookalikes: int = 0) -> pa.Table:
        """Findings, as in FINDINGS, of the images of `name` that are copies of images of `reference`; of a set in itself, each
        pair once.

        `lookalikes`: so many images of the reference, the first, are also compared as thumbnails; not of a set in itself.
        """
        described, count, itself = self.describe(reference), len(self.sets[reference]), name == reference
        if not self._is_whole(described / "index"):
            _build_index(Pictures(described, count), described / "index")
        folder = self.workdir / f"{name}-{reference}"
        work = functools.partial(
            match_shard, reference=described, count=count, itself=itself, lookalikes=0 if itself else lookalikes
        )
        parts = self._run(work, name, folder, f"search: {name} against {reference}", self.workdir / name)
        found = pa.concat_tables([FINDINGS.empty_table(), *(pq.read_table(part / ROWS, schema=FINDINGS) for part in parts)])
        same = same_bytes(self.sets[name], self.sets[reference], itself)
        seen, alike = ({(row["row"], row["match"]) for row in same}, {row["row"] for row in same})
        pairs = zip(found["row"].to_pylist(), found["match"].to_pylist(), found["outcome"].to_pylist(), strict=True)
        rest = [
            (row, match) not in seen and not (outcome == "unverifiable" and row in alike) and not (itself and (match or -1) > row)
            for row, match, outcome in pairs
        ]
        return pa.concat_tables([found.filter(pa.array(rest, pa.bool_())), pa.Table.from_pylist(same, FINDINGS)])

    def _run(self, work: "Callable[[Shard], int]", name: str, folder: Path, label: str, stored: Path | None = None) -> list[Path]:
        """Do the shards of a set that are not there yet, or damaged; returns the artifacts of all, in order of the images."""
        images = self.sets[name]
        starts = range(0, len(images), SHARD)
        parts = [folder / f"{first // SHARD:06}" for first in starts]
        missing = [(first, part) for first, part in zip(starts, parts, strict=True) if not self._is_whole(part)]
        done = len(images) - sum(min(SHARD, len(images) - first) for first, _ in missing)
        stored = stored if stored is not None and stored.exists() else None
        work_left = (Shard(_pack(images.table.slice(first, SHARD)), first, part, stored) for first, part in missing)
        if not missing:
            return parts
        with progress.bar(len(images), "images", label, done) as shown:
            workers = min(self.machine.cores(self.machine.workers), len(missing))
            for count in shards.done(work, work_left, workers, self.machine.executor):
                shown.update(count)
        self._whole.update(parts)
        return parts

    def _is_whole(self, part: Path) -> bool:
        """Whether a finished part is there; what an earlier run has left is read once, to see that it is undamaged."""
        if part not in self._whole and not scratch.usable(part):
            return False
        self._whole.add(part)
        return True


def same_bytes(images: Manifest, reference: Manifest, itself: bool) -> list[Row]:
    """Copies byte for byte, whatever features they have, at most SHORTLIST for each image; of a set in itself, each pair once."""
    keys, known = (_crc_and_size(table) for table in (images.table, reference.table))
    order = np.argsort(known, kind="stable")
    first, last = (np.searchsorted(known[order], keys, side) for side in ("left", "right"))
    if itself:
        last = np.minimum(last, np.argsort(order))  # those before it
    count = np.minimum(last - first, index.SHORTLIST)
    rows, matches = np.repeat(np.arange(len(keys)), count), order[index.ranges(first, count)]
    pairs = zip(manifest.image_bytes(images, rows), manifest.image_bytes(reference, matches), strict=True)
    equal = [a == b for a, b in pairs]
    return [same_bytes_row(row, match) for row, match, same in zip(rows.tolist(), matches.tolist(), equal, strict=True) if same]


def _crc_and_size(table: pa.Table) -> np.ndarray:
    """(images,) uint64, equal for equal bytes."""
    crc, size = (table[name].to_numpy().astype(np.uint64) for name in ("crc32", "size"))
    return np.asarray(crc << np.uint64(32) | size)


class Shard(NamedTuple):
    """A piece of work for a process: a slice of a manifest in Arrow's IPC format, the row it starts at, the artifact to write.

    `stored`: the folder of the Pictures of the set, where it was described.
    """

    images: bytes
    first: int
    folder: Path
    stored: Path | None


def _pack(table: pa.Table) -> bytes:
    table = table.cast(manifest.STORED)  # a slice of the dictionary column would carry the paths of all images
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _unpack(data: bytes) -> Manifest:
    return Manifest(pa.ipc.open_stream(data).read_all().cast(manifest.SCHEMA), ())


class ByRow(Protocol):
    """Pictures by row; None where the image could not be decoded."""

    def __getitem__(self, row: int) -> features.Picture | None: ...


class Pictures:
    """What is kept of `count` images, on disk, read one by one: `pictures[row]`; None where the image could not be decoded."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self._shard = functools.lru_cache(maxsize=None)(self._open)

    def __getitem__(self, row: int) -> features.Picture | None:
        file, starts, pixels, shapes, extents = self._shard(row // SHARD)
        i = row % SHARD
        if not shapes[i].all():
            return None
        own = features.NO_FEATURES  # safetensors refuses an empty slice at the end
        if starts[i] < starts[i + 1]:
            own = features.Features(*(file.get_slice(name)[starts[i] : starts[i + 1]] for name in ("points", "descriptors")))
        grey = file.get_slice("grey")[pixels[i] : pixels[i + 1]].reshape(shapes[i])
        return features.Picture(own, grey, extents[i])

    def _open(self, shard: int) -> tuple[Any, list[int], list[int], np.ndarray, np.ndarray]:
        file = safe_open(self.folder / f"{shard:06}" / PICTURES, framework="numpy")
        shapes, starts = file.get_tensor("shapes"), file.get_tensor("starts")
        pixels = np.r_[0, np.cumsum(shapes.prod(1))]
        return file, starts.tolist(), pixels.tolist(), shapes, file.get_tensor("extents")

    def shards(self) -> range:
        return range((self.count + SHARD - 1) // SHARD)

    def bag(self, shard: int) -> features.Bag:
        """The features of a shard, without its pixels."""
        file, starts = self._shard(shard)[:2]
        owner = np.repeat(np.arange(len(starts) - 1, dtype=np.int32) + shard * SHARD, np.diff(starts))
        return features.Bag(owner, file.get_tensor("points"), file.get_tensor("descriptors"))

    def large(self, shard: int) -> np.ndarray:
        """(n,) bool: the images of a shard that have at least `features.LOOK` pixels."""
        return np.asarray(self._shard(shard)[3].max(1) >= features.LOOK)

    def features(self) -> int:
        """How many there are in all."""
        return sum(self._shard(shard)[1][-1] for shard in self.shards())


_one_thread = threadpool_limits.wrap(limits=1)
"""The processes share out the cores; and threads that wait for each other on a busy machine cost more than they bring."""


@_one_thread
def describe_shard(shard: Shard) -> int:
    """Write the Pictures of a shard as an artifact; returns the number of images."""
    pictures = list(_pictures(shard))
    nothing = features.Picture(features.NO_FEATURES, np.zeros((0, 0), np.uint8), np.ones(2, np.float32))
    whole = [picture or nothing for picture in pictures]
    bag = features.bag([picture.features for picture in whole])
    tensors = {
        "points": bag.points,
        "descriptors": bag.descriptors,
        "starts": np.r_[0, np.cumsum([len(picture.features) for picture in whole])],
        "grey": np.concatenate([picture.grey.ravel() for picture in whole]),
        "shapes": np.array([picture.grey.shape for picture in whole], np.int64),
        "extents": np.stack([picture.extent for picture in whole]),
    }
    with artifact.writing(shard.folder) as tmp:
        save_file(tensors, tmp / PICTURES)
    return len(pictures)


def _pictures(shard: Shard) -> Iterator[features.Picture | None]:
    images = _unpack(shard.images)
    if shard.stored is not None:
        described = Pictures(shard.stored, shard.first + len(images))
        yield from (described[shard.first + i] for i in range(len(images)))
        return
    for data in manifest.image_bytes(images, range(len(images))):
        try:
            yield features.extract(decode(data))
        except ImageRefused:
            yield None


@_one_thread
def _build_index(described: Pictures, out: Path) -> None:
    shards = described.shards()
    spread = list(shards)[:: max(1, len(shards) // TRAIN_SHARDS)]
    sample = np.concatenate([np.zeros((0, 128), np.uint8), *(described.bag(shard).descriptors for shard in spread)])
    large = np.concatenate([np.zeros(0, bool), *map(described.large, shards)])
    index = VotingIndex.build(described.features(), map(described.bag, shards), sample, large)
    with artifact.writing(out) as tmp:
        index.save(tmp)


@functools.lru_cache(maxsize=1)
def _opened(reference: Path, count: int, lookalikes: int) -> tuple[VotingIndex, Pictures, "LookAlikes"]:
    pictures = Pictures(reference, count)
    return VotingIndex.load(reference / "index"), pictures, LookAlikes.of(pictures, lookalikes)


@_one_thread
def match_shard(shard: Shard, reference: Path, count: int, itself: bool, lookalikes: int) -> int:
    """Write the findings of a shard against a described reference of `count` images; returns the number of images."""
    index, pictures, look_alikes = _opened(reference, count, lookalikes)
    images = len(_unpack(shard.images))
    rows = findings(_pictures(shard), index, pictures, shard.first, itself, look_alikes)
    with artifact.writing(shard.folder) as tmp:
        pq.write_table(pa.Table.from_pylist(rows, FINDINGS), tmp / ROWS)
    return images


def findings(
    pictures: Iterator[features.Picture | None],
    index: VotingIndex,
    reference: ByRow,
    first: int = 0,
    itself: bool = False,
    look_alikes: "LookAlikes | None" = None,
) -> list[Row]:
    """The images that are copies of reference images, and those that cannot be checked, as rows of FINDINGS.

    `first`: the row of the first image; `itself`: the reference is the set that the images are from, so none shall find itself.
    """
    rows: list[Row] = []
    for batch in _batches(pictures):
        queries = features.bag([picture.features if picture else features.NO_FEATURES for picture in batch])
        large = np.array([picture is not None and picture.is_large for picture in batch])
        candidates = index.shortlist(queries, np.arange(first, first + len(batch)) if itself else None, large)
        found = verified(batch, candidates, reference)
        for i, picture in enumerate(batch):
            if picture is None or len(picture.features) < features.VERIFIABLE:
                found.append(unverifiable_row(i, UNDECODABLE if picture is None else TOO_FEW))
        found += look_alikes.among(batch) if look_alikes else []
        rows += [row | {"row": first + row["row"]} for row in found]
        first += len(batch)
    return rows


class LookAlikes(NamedTuple):
    """Reference images as thumbnails.

    `even`, `odd`: (256, n) float32 each, the halves of a thumbnail that mirroring keeps and turns over: the correlation with an
    image is the sum of the two products, that with its mirror image their difference.
    """

    even: np.ndarray
    odd: np.ndarray

    @classmethod
    def of(cls, reference: ByRow, count: int) -> "LookAlikes":
        """Of the first `count` images."""
        both = np.zeros((2, count, features.THUMBNAIL**2), np.float32)
        for row in range(count):
            if picture := reference[row]:
                both[:, row] = features.thumbnail(picture), features.thumbnail(picture, mirror=True)
        return cls(*(np.ascontiguousarray(half.T) for half in ((both[0] + both[1]) / 2, (both[0] - both[1]) / 2)))

    def among(self, batch: Sequence[features.Picture | None]) -> list[Row]:
        """For each image of the batch the most alike reference image, if it is at all alike (LEAST_ALIKE)."""
        there = [i for i, picture in enumerate(batch) if picture is not None]
        if not there or not self.even.size:
            return []
        images = np.stack([features.thumbnail(batch[i]) for i in there])  # type: ignore[arg-type]
        odd = images @ self.odd
        alike = images @ self.even + np.abs(odd)
        best = alike.argmax(1)
        rows = zip(there, best.tolist(), alike.max(1).tolist(), (odd[np.arange(len(best)), best] < 0).tolist(), strict=True)
        return [lookalike_row(*row) for row in rows if row[2] >= LEAST_ALIKE]


def _batches(pictures: Iterator[features.Picture | None]) -> Iterator[list[features.Picture | None]]:
    while batch := list(itertools.islice(pictures, BATCH)):
        yield batch


def verified(batch: Sequence[features.Picture | None], candidates: index.Candidates, reference: ByRow) -> list[Row]:
    """A row per pair of a query of the batch and a reference image that is more than chance."""
    found: dict[tuple[int, int], Row] = {}
    for query, row, mirror, negative in zip(*(column.tolist() for column in candidates), strict=True):
        a, b = reference[row], batch[query]
        seen = verdict.examine(features.negative(a) if negative else a, b, mirror) if a and b else None
        if seen and seen[2].outcome:
            new = _row(query, row, *seen) | {"negative": negative}
            found[query, row] = max(new, found.get((query, row), new), key=lambda r: (r["outcome"] == "copy", r["score"]))
    return list(found.values())


def _row(query: int, row: int, match: geometry.Match, likeness: Likeness, verdict: Verdict) -> Row:
    return {
        "row": query,
        "match": row,
        "outcome": verdict.outcome,
        "rule": verdict.rule,
        "inliers": match.inliers,
        "mirrored": match.mirrored,
        "transform": match.transform.ravel().tolist(),
        "zncc": likeness.zncc,
        "local": likeness.local,
        "cover_image": likeness.cover_b,
        "cover_match": likeness.cover_a,
        "score": (max(likeness.zncc, 0.0) + likeness.local) / 2,
    }
