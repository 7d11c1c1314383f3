"""Search a set of images for copies of another set's, shard by shard."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from pipeline.harness import progress, shards
from pipeline.harness.machine import Machine
from pipeline.leaks import features, geometry, index, verdict
from pipeline.leaks.findings import FINDINGS, TOO_FEW, UNDECODABLE, Row, unverifiable_row
from pipeline.leaks.index import VotingIndex
from pipeline.leaks.verdict import Likeness, Verdict
from pipeline.store import artifact, manifest
from pipeline.store.decode import ImageRefused, decode
from pipeline.store.manifest import Manifest

SHARD = 1024  # images; a killed run loses the shards in work, and memory does not grow with the pool
BATCH = 32  # images whose features are searched for at once
TRAIN_SHARDS = 64  # at most so many gallery shards, evenly spread, train the index


class Search:
    """The images of one set found in another, shard by shard, by worker processes; finished shards stay in `scratch`."""

    def __init__(self, sets: Mapping[str, Manifest], scratch: Path, machine: Machine) -> None:
        self.sets, self.scratch, self.machine = sets, scratch.absolute(), machine

    def describe(self, name: str) -> Path:
        """Features and small grey copies of a whole set, kept in its folder."""
        folder = self.scratch / name
        self._run(describe_shard, name, folder, ".safetensors", f"dedup: features of {name}")
        return folder

    def find(self, name: str, gallery: str, alike: float | None = None) -> pa.Table:
        """Findings, as in FINDINGS, of the images of `name` that are copies of images of `gallery`, with ids and the relation.

        `alike`: the correlation of thumbnails from which on an image is found as a look-alike; None does not look for them.
        """
        described = self.describe(gallery)
        if not (described / "index").exists():
            _build_index(Store(described, len(self.sets[gallery])), described / "index")
        folder = self.scratch / f"{name}-{gallery}"
        work = functools.partial(
            match_shard, gallery=described, count=len(self.sets[gallery]), itself=name == gallery, alike=alike
        )
        files = self._run(work, name, folder, ".parquet", f"dedup: {name} against {gallery}")
        found = pa.concat_tables([FINDINGS.empty_table(), *(pq.read_table(file, schema=FINDINGS) for file in files)])
        return self._named(found, f"{name}-{gallery}", name, gallery)

    def unverifiable(self, name: str) -> pa.Table:
        """Findings for images of a described set that nothing can be compared with: their copies would go unseen."""
        rows = [unverifiable_row(row, reason) for row, reason in Store(self.scratch / name, len(self.sets[name])).unverifiable()]
        return self._named(pa.Table.from_pylist(rows, FINDINGS), name, name, name)

    def _named(self, found: pa.Table, relation: str, name: str, gallery: str) -> pa.Table:
        found = found.sort_by([("row", "ascending"), ("match", "ascending")])
        columns = {
            "relation": pa.array([relation] * len(found), pa.string()),
            "id": self.sets[name].table["id"].take(found["row"]),
            "match_id": self.sets[gallery].table["id"].take(found["match"]),
        }
        return pa.table(columns | {c: found[c] for c in FINDINGS.names})

    def _run(self, work: "Callable[[Shard], int]", name: str, folder: Path, suffix: str, label: str) -> list[Path]:
        """Do the shards of a set whose file is not there yet; returns all files, in order of the images."""
        folder.mkdir(parents=True, exist_ok=True)
        images, stored = self.sets[name], self.scratch / name if suffix == ".parquet" else None
        starts = range(0, len(images), SHARD)
        files = [folder / f"{first // SHARD:06}{suffix}" for first in starts]
        missing = [(first, file) for first, file in zip(starts, files, strict=True) if not file.exists()]
        done = len(images) - sum(min(SHARD, len(images) - first) for first, _ in missing)
        stored = stored if stored is not None and stored.exists() else None
        work_left = (Shard(_pack(images.table.slice(first, SHARD)), first, file, stored) for first, file in missing)
        if not missing:
            return files
        with progress.bar(len(images), "images", label, done) as shown:
            workers = min(self.machine.cores(self.machine.workers), len(missing))
            for count in shards.done(work, work_left, workers, self.machine.executor):
                shown.update(count)
        return files


class Shard(NamedTuple):
    """A piece of work for a process: a slice of a manifest in Arrow's IPC format, the row it starts at, the file to write.

    `stored`: the folder of a Store that already has the features of the set.
    """

    images: bytes
    first: int
    file: Path
    stored: Path | None


def _pack(table: pa.Table) -> bytes:
    paths = table["path"].cast(pa.string())  # a slice of the dictionary column would carry the paths of all images
    table = table.set_column(table.schema.get_field_index("path"), "path", paths)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _unpack(data: bytes) -> Manifest:
    return Manifest(pa.ipc.open_stream(data).read_all().cast(manifest.SCHEMA), ())


class Gallery(Protocol):
    """Pictures by row; None where the image could not be decoded."""

    def __getitem__(self, row: int) -> features.Picture | None: ...


class Store:
    """Pictures of `count` images on disk, read one by one: `store[row]`; None where the image could not be decoded."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self._shard = functools.lru_cache(maxsize=None)(self._open)

    def __getitem__(self, row: int) -> features.Picture | None:
        file, starts, pixels, shapes, extents = self._shard(row // SHARD)
        i = row % SHARD
        if not shapes[i].all():
            return None
        points, descriptors = (file.get_slice(name)[starts[i] : starts[i + 1]] for name in ("points", "descriptors"))
        grey = file.get_slice("grey")[pixels[i] : pixels[i + 1]].reshape(shapes[i])
        return features.Picture(features.Features(points, descriptors), grey, extents[i])

    def _open(self, shard: int) -> tuple[Any, list[int], list[int], np.ndarray, np.ndarray]:
        file = safe_open(self.folder / f"{shard:06}.safetensors", framework="numpy")
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

    def features(self) -> int:
        """How many there are in all."""
        return sum(self._shard(shard)[1][-1] for shard in self.shards())

    def unverifiable(self) -> Iterator[tuple[int, str]]:
        """Rows, with the reason."""
        for shard in self.shards():
            _, starts, _, shapes, _ = self._shard(shard)
            for i, count in enumerate(np.diff(starts)):
                if count < features.VERIFIABLE:
                    yield shard * SHARD + i, TOO_FEW if shapes[i].all() else UNDECODABLE


_one_thread = threadpool_limits.wrap(limits=1)
"""The processes share out the cores; and threads that wait for each other on a busy machine cost more than they bring."""


@_one_thread
def describe_shard(shard: Shard) -> int:
    """Write the Pictures of a shard as a file of a Store; returns the number of images."""
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
    with artifact.writing_file(shard.file) as tmp:
        save_file(tensors, tmp)
    return len(pictures)


def _pictures(shard: Shard) -> Iterator[features.Picture | None]:
    images = _unpack(shard.images)
    if shard.stored is not None:
        store = Store(shard.stored, shard.first + len(images))
        yield from (store[shard.first + i] for i in range(len(images)))
        return
    for data in manifest.image_bytes(images, range(len(images))):
        try:
            yield features.extract(decode(data))
        except ImageRefused:
            yield None


@_one_thread
def _build_index(store: Store, out: Path) -> None:
    shards = store.shards()
    spread = list(shards)[:: max(1, len(shards) // TRAIN_SHARDS)]
    sample = np.concatenate([np.zeros((0, 128), np.uint8), *(store.bag(shard).descriptors for shard in spread)])
    index = VotingIndex.build(store.features(), map(store.bag, shards), sample)
    with artifact.writing(out) as tmp:
        index.save(tmp)


@functools.lru_cache(maxsize=1)
def _opened(gallery: Path, count: int) -> tuple[VotingIndex, Store]:
    return VotingIndex.load(gallery / "index"), Store(gallery, count)


@_one_thread
def match_shard(shard: Shard, gallery: Path, count: int, itself: bool, alike: float | None) -> int:
    """Write the findings of a shard against a described gallery of `count` images; returns the number of images."""
    index, store = _opened(gallery, count)
    images = len(_unpack(shard.images))
    look_alikes = LookAlikes(_thumbnails(gallery, count), alike) if alike is not None else None
    rows = findings(_pictures(shard), index, store, shard.first, itself, look_alikes)
    with artifact.writing_file(shard.file) as tmp:
        pq.write_table(pa.Table.from_pylist(rows, FINDINGS), tmp)
    return images


def findings(
    pictures: Iterator[features.Picture | None],
    index: VotingIndex,
    gallery: Gallery,
    first: int = 0,
    itself: bool = False,
    look_alikes: "LookAlikes | None" = None,
) -> list[Row]:
    """The images that are copies of gallery images, and those that cannot be checked, as rows of FINDINGS.

    `first`: the row of the first image; `itself`: the gallery is the set that the images are from, so none shall find itself.
    """
    rows: list[Row] = []
    for batch in _batches(pictures):
        queries = features.bag([picture.features if picture else features.NO_FEATURES for picture in batch])
        candidates = index.shortlist(queries, np.arange(first, first + len(batch)) if itself else None)
        found = verified(batch, candidates, gallery)
        removed = {row["row"] for row in found if row["outcome"] == "removed"}
        for i, picture in enumerate(batch):
            if (picture is None or len(picture.features) < features.VERIFIABLE) and i not in removed:
                found.append(unverifiable_row(i, UNDECODABLE if picture is None else TOO_FEW))
            if picture is not None and look_alikes is not None and i not in removed:
                found += look_alikes.of(i, picture)
        rows += [row | {"row": first + row["row"]} for row in found]
        first += len(batch)
    return rows


class LookAlikes(NamedTuple):
    """Gallery images that correlate with an image by `least` or more.

    `thumbnails`: (256, 2 n) float32, of n gallery images, each followed by its mirror image.
    """

    thumbnails: np.ndarray
    least: float

    def of(self, row: int, picture: features.Picture) -> list[Row]:
        """The most alike gallery image, if it is alike enough."""
        alike = features.thumbnail(picture) @ self.thumbnails
        best = int(alike.argmax()) if len(alike) else 0
        if not len(alike) or alike[best] < self.least:
            return []
        score = float(alike[best])
        measured = {"mirrored": best % 2 == 1, "zncc": score, "score": score}
        return [{"row": row, "match": best // 2, "outcome": "alike", "rule": "thumbnails"} | measured]


@functools.lru_cache(maxsize=1)
def _thumbnails(gallery: Path, count: int) -> np.ndarray:
    store = Store(gallery, count)
    blank = np.zeros(features.THUMBNAIL**2, np.float32)
    both = [features.thumbnail(p, mirror) if (p := store[row]) else blank for row in range(count) for mirror in (False, True)]
    return np.array(both, np.float32).reshape(-1, features.THUMBNAIL**2).T.copy()


def _batches(pictures: Iterator[features.Picture | None]) -> Iterator[list[features.Picture | None]]:
    while batch := list(itertools.islice(pictures, BATCH)):
        yield batch


def verified(batch: Sequence[features.Picture | None], candidates: index.Candidates, gallery: Gallery) -> list[Row]:
    """A row per pair of a query of the batch and a gallery image that is more than chance."""
    found: dict[tuple[int, int], Row] = {}
    for query, row, mirror in zip(*(column.tolist() for column in candidates), strict=True):
        a, b = gallery[row], batch[query]
        seen = verdict.examine(a, b, mirror) if a and b else None
        if seen and seen[2].outcome:
            new = _row(query, row, *seen)
            found[query, row] = max(new, found.get((query, row), new), key=lambda r: (r["outcome"] == "removed", r["score"]))
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
