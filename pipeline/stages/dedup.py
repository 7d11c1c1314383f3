"""The leak check: which images are copies of validation images, proof for each, and the pool and labelled set without them."""

import base64
import csv
import functools
import html
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from pipeline import artifact, manifest, progress, shards, sift, stage
from pipeline.decode import ImageRefused, decode
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.params import Machine, Section

SHARD = 1024  # images; a killed run loses the shards in work, and memory does not grow with the pool
BATCH = 32  # images whose features are searched for at once
TRAIN_SHARDS = 64  # at most so many gallery shards, evenly spread, train the index

FINDINGS = pa.schema(
    [
        ("row", pa.int64()),  # of the image in its manifest
        ("match", pa.int64()),  # of the image it was found in; null if unverifiable
        ("outcome", pa.string()),  # removed, review, unverifiable or alike
        ("rule", pa.string()),
        ("inliers", pa.int32()),
        ("mirrored", pa.bool_()),
        ("transform", pa.list_(pa.float64())),  # 3 x 3, row by row, from the match's coordinates to the image's
        ("zncc", pa.float32()),
        ("local", pa.float32()),
        ("cover_image", pa.float32()),
        ("cover_match", pa.float32()),
        ("score", pa.float32()),
    ]
)


class Dedup(Section):
    """What happens to what the leak check finds; every finding is in `leaks.parquet` whatever is set here.

    `strictness`, for the question whether look-alikes of validation images are a fair choice: `none` removes nothing that the
    check finds, `leaks` removes copies, `near` and `nearer` also images that correlate with a validation image (or its mirror
    image) by at least ALIKE as grey thumbnails of 16 x 16 pixels.
    `review`: images that share features with a validation image but not enough pixels for certainty.
    `unverifiable`: images with too few features to be checked, or that cannot be decoded.
    `train`: look for validation images among the labelled ones too, and `report` them, or `remove` them by the same rules as
    those of the pool (but for look-alikes, which are looked for in the pool only).
    `duplicates`: copies within the pool: `keep` does not look for them, `collapse` keeps the largest of each group.
    """

    strictness: Literal["none", "leaks", "near", "nearer"] = "leaks"
    review: Literal["keep", "remove"] = "keep"
    unverifiable: Literal["keep", "remove"] = "keep"
    train: Literal["report", "skip", "remove"] = "report"
    duplicates: Literal["keep", "collapse"] = "keep"


ALIKE = {"near": 0.9, "nearer": 0.8}

Row = dict[str, Any]


def run(
    params: Dedup,
    *,
    pool: Path,
    val: Path,
    train: Path,
    overrides: Path,
    pool_out: Path,
    train_out: Path,
    leaks_out: Path,
    gallery_out: Path,
    scratch: Path,
    machine: Machine,
) -> stage.Metrics:
    """Remove from the pool every image that is a copy of a validation image.

    `train_out`: the labelled images, without copies of validation images if `params.train` asks for it; where none goes it
    is the artifact `train` byte for byte, so that nothing trained on it is stale when only the pool's findings change.
    `leaks_out`: `leaks.parquet`, one row per finding (docs/dedup.md). `gallery_out`: the findings as a page to look at.
    `overrides`: a CSV of id, action (keep or remove) and reason, by which a person has the last word.
    """
    sets = {"pool": manifest.read(pool), "train": manifest.read(train), "val": manifest.read(val)}
    decisions = read_overrides(overrides, sets)
    search = Search(sets, scratch, machine)
    collapse = params.duplicates == "collapse"
    if collapse:
        search.describe("pool")
    audits = [search.find("pool", "val", ALIKE.get(params.strictness))]
    if params.train != "skip":
        audits.append(search.find("train", "val"))
    if collapse:
        audits.append(_one_per_copy(search.find("pool", "pool"), sets["pool"]))
    audit = decide(pa.concat_tables([*audits, search.unverifiable("val")]), params, decisions)
    kept = {name: _kept(sets[name], audit, name) for name in ("pool", "train")}
    with artifact.writing(pool_out) as tmp:
        manifest.write(tmp, kept["pool"].table, sets["pool"].classes)
    if len(kept["train"]) == len(sets["train"]):
        artifact.copy(train, train_out)
    else:
        _check_classes(sets["train"], kept["train"])
        with artifact.writing(train_out) as tmp:
            manifest.write(tmp, kept["train"].table, sets["train"].classes)
    with artifact.writing(leaks_out) as tmp:
        pq.write_table(audit, tmp / "leaks.parquet", compression="zstd")
    with artifact.writing(gallery_out) as tmp:
        (tmp / "index.html").write_text(page(audit, sets))
    return _metrics(audit, len(sets["pool"]), len(kept["pool"]), len(sets["train"]) - len(kept["train"]))


def _kept(images: Manifest, audit: pa.Table, name: str) -> Manifest:
    gone = audit.filter(pc.and_(pc.starts_with(audit["relation"], f"{name}-"), pc.invert(audit["kept"])))["id"]
    stays = pc.invert(pc.is_in(images.table["id"], gone.combine_chunks()))
    return Manifest(images.table.filter(stays), images.classes)


def _check_classes(before: Manifest, after: Manifest) -> None:
    """A class whose every labelled image goes would be lost in silence."""
    counts = [np.bincount(images.labels(), minlength=len(before.classes)) for images in (before, after)]
    lost = [before.classes[i] for i in np.flatnonzero((counts[0] > 0) & (counts[1] == 0))]
    if lost:
        raise UserError(
            f"dedup.train is `remove`, and every labelled image of {', '.join(lost)} would go. Set `dedup.train: report`, look "
            "at data/dedup/gallery/index.html, and give those that shall stay a line in data/overrides.csv."
        )


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
        rows = [_unverifiable(row, reason) for row, reason in Store(self.scratch / name, len(self.sets[name])).unverifiable()]
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

    def __getitem__(self, row: int) -> sift.Picture | None: ...


class Store:
    """Pictures of `count` images on disk, read one by one: `store[row]`; None where the image could not be decoded."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self._shard = functools.lru_cache(maxsize=None)(self._open)

    def __getitem__(self, row: int) -> sift.Picture | None:
        file, starts, pixels, shapes, extents = self._shard(row // SHARD)
        i = row % SHARD
        if not shapes[i].all():
            return None
        points, descriptors = (file.get_slice(name)[starts[i] : starts[i + 1]] for name in ("points", "descriptors"))
        grey = file.get_slice("grey")[pixels[i] : pixels[i + 1]].reshape(shapes[i])
        return sift.Picture(sift.Features(points, descriptors), grey, extents[i])

    def _open(self, shard: int) -> tuple[Any, list[int], list[int], np.ndarray, np.ndarray]:
        file = safe_open(self.folder / f"{shard:06}.safetensors", framework="numpy")
        shapes, starts = file.get_tensor("shapes"), file.get_tensor("starts")
        pixels = np.r_[0, np.cumsum(shapes.prod(1))]
        return file, starts.tolist(), pixels.tolist(), shapes, file.get_tensor("extents")

    def shards(self) -> range:
        return range((self.count + SHARD - 1) // SHARD)

    def bag(self, shard: int) -> sift.Bag:
        """The features of a shard, without its pixels."""
        file, starts = self._shard(shard)[:2]
        owner = np.repeat(np.arange(len(starts) - 1, dtype=np.int32) + shard * SHARD, np.diff(starts))
        return sift.Bag(owner, file.get_tensor("points"), file.get_tensor("descriptors"))

    def features(self) -> int:
        """How many there are in all."""
        return sum(self._shard(shard)[1][-1] for shard in self.shards())

    def unverifiable(self) -> Iterator[tuple[int, str]]:
        """Rows, with the reason."""
        for shard in self.shards():
            _, starts, _, shapes, _ = self._shard(shard)
            for i, features in enumerate(np.diff(starts)):
                if features < sift.VERIFIABLE:
                    yield shard * SHARD + i, TOO_FEW if shapes[i].all() else UNDECODABLE


_one_thread = threadpool_limits.wrap(limits=1)
"""The processes share out the cores; and threads that wait for each other on a busy machine cost more than they bring."""

TOO_FEW, UNDECODABLE = "too few features", "cannot be decoded"


@_one_thread
def describe_shard(shard: Shard) -> int:
    """Write the Pictures of a shard as a file of a Store; returns the number of images."""
    pictures = list(_pictures(shard))
    nothing = sift.Picture(sift.NO_FEATURES, np.zeros((0, 0), np.uint8), np.ones(2, np.float32))
    whole = [picture or nothing for picture in pictures]
    bag = sift.bag([picture.features for picture in whole])
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


def _pictures(shard: Shard) -> Iterator[sift.Picture | None]:
    images = _unpack(shard.images)
    if shard.stored is not None:
        store = Store(shard.stored, shard.first + len(images))
        yield from (store[shard.first + i] for i in range(len(images)))
        return
    for data in manifest.image_bytes(images, range(len(images))):
        try:
            yield sift.extract(decode(data))
        except ImageRefused:
            yield None


@_one_thread
def _build_index(store: Store, out: Path) -> None:
    shards = store.shards()
    spread = list(shards)[:: max(1, len(shards) // TRAIN_SHARDS)]
    sample = np.concatenate([np.zeros((0, 128), np.uint8), *(store.bag(shard).descriptors for shard in spread)])
    index = sift.VotingIndex.build(store.features(), map(store.bag, shards), sample)
    with artifact.writing(out) as tmp:
        index.save(tmp)


@functools.lru_cache(maxsize=1)
def _opened(gallery: Path, count: int) -> tuple[sift.VotingIndex, Store]:
    return sift.VotingIndex.load(gallery / "index"), Store(gallery, count)


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
    pictures: Iterator[sift.Picture | None],
    index: sift.VotingIndex,
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
        queries = sift.bag([picture.features if picture else sift.NO_FEATURES for picture in batch])
        candidates = index.shortlist(queries, np.arange(first, first + len(batch)) if itself else None)
        found = verified(batch, candidates, gallery)
        removed = {row["row"] for row in found if row["outcome"] == "removed"}
        for i, picture in enumerate(batch):
            if (picture is None or len(picture.features) < sift.VERIFIABLE) and i not in removed:
                found.append(_unverifiable(i, UNDECODABLE if picture is None else TOO_FEW))
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

    def of(self, row: int, picture: sift.Picture) -> list[Row]:
        """The most alike gallery image, if it is alike enough."""
        alike = sift.thumbnail(picture) @ self.thumbnails
        best = int(alike.argmax()) if len(alike) else 0
        if not len(alike) or alike[best] < self.least:
            return []
        score = float(alike[best])
        measured = {"mirrored": best % 2 == 1, "zncc": score, "score": score}
        return [{"row": row, "match": best // 2, "outcome": "alike", "rule": "thumbnails"} | measured]


@functools.lru_cache(maxsize=1)
def _thumbnails(gallery: Path, count: int) -> np.ndarray:
    store = Store(gallery, count)
    blank = np.zeros(sift.THUMBNAIL**2, np.float32)
    both = [sift.thumbnail(p, mirror) if (p := store[row]) else blank for row in range(count) for mirror in (False, True)]
    return np.array(both, np.float32).reshape(-1, sift.THUMBNAIL**2).T.copy()


def _batches(pictures: Iterator[sift.Picture | None]) -> Iterator[list[sift.Picture | None]]:
    while batch := list(itertools.islice(pictures, BATCH)):
        yield batch


def verified(batch: Sequence[sift.Picture | None], candidates: sift.Candidates, gallery: Gallery) -> list[Row]:
    """A row per pair of a query of the batch and a gallery image that is more than chance."""
    found: dict[tuple[int, int], Row] = {}
    for query, row, mirror in zip(*(column.tolist() for column in candidates), strict=True):
        a, b = gallery[row], batch[query]
        seen = sift.examine(a, b, mirror) if a and b else None
        if seen and seen[2].outcome:
            new = _row(query, row, *seen)
            found[query, row] = max(new, found.get((query, row), new), key=lambda r: (r["outcome"] == "removed", r["score"]))
    return list(found.values())


def _row(query: int, row: int, match: sift.Match, likeness: sift.Likeness, verdict: sift.Verdict) -> Row:
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


def _unverifiable(row: int, reason: str) -> Row:
    return {"row": row, "outcome": "unverifiable", "rule": reason}


class Override(NamedTuple):
    """A person's word on an image of the pool or of the labelled set (`of`: pool or train)."""

    of: str
    action: str
    reason: str


def read_overrides(file: Path, sets: Mapping[str, Manifest]) -> dict[str, Override]:
    """{id: Override} of a CSV with the columns id, action (keep or remove) and reason.

    Raises UserError, naming the line, for anything else, for a missing reason, and for an id in neither pool nor train.
    """
    with file.open(newline="") as f:
        lines = csv.reader(f)
        header = next(lines, [])
        if header != ["id", "action", "reason"]:
            raise UserError(f"{file}: the first line must be `id,action,reason`; it is `{','.join(header)}`.")
        found: dict[str, tuple[str, str]] = {}
        for number, line in enumerate(lines, 2):
            where = f"{file}, line {number}"
            if len(line) != 3 or line[1] not in ("keep", "remove") or not line[2].strip():
                raise UserError(f"{where}: `{','.join(line)}` must be an id, `keep` or `remove`, and a reason (quote commas).")
            if line[0] in found:
                raise UserError(f"{where}: the image {line[0]} is decided on twice. Keep one of the two lines.")
            found[line[0]] = (line[1], line[2].strip())
    ids = pa.array(list(found), pa.string())
    there = {
        name: set(ids.filter(pc.is_in(ids, sets[name].table["id"].combine_chunks())).to_pylist()) for name in ("pool", "train")
    }
    for image in found:
        if not any(image in images for images in there.values()):
            raise UserError(
                f"{file}: neither the pool nor the labelled images have one with the id {image}. Correct or remove the line."
            )
    return {image: Override("pool" if image in there["pool"] else "train", *said) for image, said in found.items()}


def decide(audit: pa.Table, params: Dedup, overrides: Mapping[str, Override]) -> pa.Table:
    """The audit with the last word on each image: `kept`, and the `override` and its `reason` where a person had it.

    Findings in `val` are reports, and so are those in `train` unless `params.train` is `remove`. An image removed by hand for
    which nothing was found gets a row of its own.
    """
    found = set(zip(_of(audit), audit["id"].to_pylist(), strict=True))
    by_hand = {(said.of, image) for image, said in overrides.items() if said.action == "remove"}
    audit = pa.concat_tables([audit, _rows_by_hand(sorted(by_hand - found), audit.schema)])
    removing = {("pool-pool", "removed")}
    if params.strictness != "none":
        outcomes = ["removed", "alike", *(o for o in ("review", "unverifiable") if getattr(params, o) == "remove")]
        relations = ["pool-val", *(["train-val"] if params.train == "remove" else [])]
        removing |= set(itertools.product(relations, outcomes))
    images = list(zip(_of(audit), audit["id"].to_pylist(), strict=True))
    reasons = zip(audit["relation"].to_pylist(), audit["outcome"].to_pylist(), strict=True)
    dropped = {image for image, reason in zip(images, reasons, strict=True) if reason in removing} | by_hand
    dropped -= {(said.of, image) for image, said in overrides.items() if said.action == "keep"}
    words = [said if (said := overrides.get(image)) and said.of == of else None for of, image in images]
    audit = audit.append_column("kept", pa.array([image not in dropped for image in images], pa.bool_()))
    audit = audit.append_column("override", pa.array([word and word.action for word in words], pa.string()))
    audit = audit.append_column("reason", pa.array([word and word.reason for word in words], pa.string()))
    return audit.drop_columns(["row", "match"]).sort_by([(name, "ascending") for name in ("relation", "id", "match_id")])


def _of(audit: pa.Table) -> list[str]:
    """The set that each finding is about."""
    return [relation.partition("-")[0] for relation in audit["relation"].to_pylist()]


def _rows_by_hand(images: list[tuple[str, str]], schema: pa.Schema) -> pa.Table:
    rows = [{"relation": f"{of}-val", "id": image, "outcome": "removed", "rule": "by hand"} for of, image in images]
    return pa.Table.from_pylist(rows, schema)


def _one_per_copy(audit: pa.Table, pool: Manifest) -> pa.Table:
    """Of the copies within the pool, the rows of those that go: all but the largest of each group (of equals, the first)."""
    pairs = audit.filter(pc.equal(audit["outcome"], "removed"))
    rows, matches = pairs["row"].to_numpy(), pairs["match"].to_numpy()
    leader = _groups(rows, matches, pool)
    goes = pa.array([leader[int(row)] != row for row in rows], pa.bool_())
    best = pairs.filter(goes).sort_by([("row", "ascending"), ("score", "descending"), ("match", "ascending")])
    row = best["row"].to_numpy()
    return best.filter(pa.array(np.r_[True, row[1:] != row[:-1]][: len(row)], pa.bool_()))


def _groups(rows: np.ndarray, matches: np.ndarray, pool: Manifest) -> dict[int, int]:
    """For each row that occurs, the row of its group that stays."""
    area = pc.multiply(pool.table["width"].cast(pa.int64()), pool.table["height"].cast(pa.int64()))
    leader: dict[int, int] = {}

    def lead(row: int) -> int:
        while leader.setdefault(row, row) != row:
            row = leader[row]
        return row

    for a, b in zip(rows.tolist(), matches.tolist(), strict=True):
        stays, goes = sorted((lead(a), lead(b)), key=lambda row: (-area[row].as_py(), row))
        leader[goes] = stays
    return {row: lead(row) for row in leader}


def _metrics(audit: pa.Table, images: int, kept: int, train_removed: int) -> Row:
    """Distinct images by outcome; an image counts once, by its strongest outcome."""

    def distinct(relation: str, outcome: str, without: Sequence[str] = ()) -> set[str]:
        where = pc.and_(pc.equal(audit["relation"], relation), pc.equal(audit["outcome"], outcome))
        return set(audit["id"].filter(where).to_pylist()).difference(*(distinct(relation, other) for other in without))

    leaks = audit.filter(pc.and_(pc.equal(audit["relation"], "pool-val"), pc.equal(audit["outcome"], "removed")))
    return {
        "pool": images,
        "kept": kept,
        "removed": len(distinct("pool-val", "removed")),
        "review": len(distinct("pool-val", "review", ["removed"])),
        "unverifiable": len(distinct("pool-val", "unverifiable", ["removed", "review"])),
        "alike": len(distinct("pool-val", "alike", ["removed"])),
        "duplicates": len(distinct("pool-pool", "removed")),
        "overrides": len(set(audit["id"].filter(pc.is_valid(audit["override"])).to_pylist())),
        "val_with_a_leak": len(set(leaks["match_id"].drop_null().to_pylist())),
        "val_unverifiable": len(distinct("val", "unverifiable")),
        "train_copies": len(distinct("train-val", "removed")),
        "train_review": len(distinct("train-val", "review", ["removed"])),
        "train_removed": train_removed,
    }


SHOWN = 200  # findings on the page; all are in leaks.parquet
LINES = 20  # drawn of a pair, or they would hide it
HEIGHT, GAP = 220, 8  # pixels of an image on the page, and between two
DOUBT = 0.65  # the score about which a finding could be decided either way

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Leak check</title>
<style>
:root {{ color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .25rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ border-bottom: 1px solid var(--line); padding: .2rem 1rem .2rem 0; text-align: left; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
main {{ display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); }}
figure {{ border: 1px solid var(--line); border-radius: .4rem; margin: 0; overflow: hidden; }}
figure img {{ background: #808080; display: block; height: auto; width: 100%; }}
figcaption {{ overflow-wrap: anywhere; padding: .6rem .8rem .8rem; }}
.outcome {{ border-radius: .2rem; color: #fff; font-weight: 600; padding: .05rem .4rem; }}
.removed {{ background: #b3261e; }} .review {{ background: #8a5a00; }} .unverifiable {{ background: #51606e; }}
.alike {{ background: #2b5f8a; }}
small {{ display: block; opacity: .8; }}
code {{ font-size: .85em; }}
</style>
<h1>Leak check</h1>
<p>{summary} Of a pair, the found image is on the left and its match on the right; lines join the features that agree on one
transform, and the outline is where the left image lies in the right one. The most doubtful come first.
To overrule a finding, add its line to <code>data/overrides.csv</code> with your reason, and run <code>dvc repro</code> again.</p>
<table><tr><th>relation<th>outcome<th>images</tr>{counts}</table>
<main>
{figures}
</main>
</html>
"""


def page(audit: pa.Table, sets: Mapping[str, Manifest]) -> str:
    """An HTML page, complete in itself, with the SHOWN most doubtful findings: images side by side, and what was measured."""
    score = pc.fill_null(pc.abs(pc.subtract(audit["score"], DOUBT)), 2.0)
    shown = audit.append_column("doubt", score).sort_by([(name, "ascending") for name in ("doubt", "relation", "id", "match_id")])
    figures = "\n".join(_figure(row, sets) for row in shown.slice(0, SHOWN).to_pylist())
    groups = audit.group_by(["relation", "outcome"]).aggregate([("id", "count_distinct")])
    groups = groups.sort_by([("relation", "ascending"), ("outcome", "ascending")])
    counts = "".join(
        f"<tr><td>{row['relation'].replace('-', ' in ')}<td>{row['outcome']}<td class=number>{row['id_count_distinct']:,}</tr>"
        for row in groups.to_pylist()
    )
    summary = f"{min(len(audit), SHOWN):,} of {len(audit):,} findings; all are in <code>leaks.parquet</code>."
    return PAGE.format(summary=summary, counts=counts, figures=figures)


def _figure(row: Row, sets: Mapping[str, Manifest]) -> str:
    name, _, gallery = row["relation"].partition("-")
    image = _image(row["id"], sets[name])
    match = _image(row["match_id"], sets[gallery]) if row["match_id"] is not None else None
    picture = image if image is None or match is None else _pair(image, match, row)
    shown = "" if picture is None else f'<img alt="" loading="lazy" src="data:image/webp;base64,{_webp(picture)}">'
    measured = "" if row["score"] is None else f"correlation {row['zncc']:.2f}"
    if row["inliers"] is not None:
        measured += f", {row['inliers']} features, {row['local']:.0%} of the windows agree, "
        measured += f"covers {row['cover_image']:.0%} of it and {row['cover_match']:.0%} of its match"
    word = f"{row['override']} by hand: {html.escape(row['reason'])}" if row["override"] else "stays" if row["kept"] else "goes"
    opposite = "remove" if row["kept"] else "keep"
    overrule = f'<small><code>{html.escape(row["id"])},{opposite},"..."</code></small>' if name != "val" else ""
    pair = html.escape(row["id"]) + (f" in {html.escape(row['match_id'])}" if match is not None else "")
    badge = f"<span class='outcome {row['outcome']}'>{row['outcome']}</span> {html.escape(row['rule'])}; {word}"
    return f"<figure>{shown}<figcaption>{badge}<small>{pair}</small><small>{measured}</small>{overrule}</figcaption></figure>"


def _image(image: str, images: Manifest) -> np.ndarray | None:
    row = pc.index(images.table["id"], image).as_py()
    try:
        return decode(next(manifest.image_bytes(images, [row])))
    except ImageRefused:
        return None


def _pair(image: np.ndarray, match: np.ndarray, row: Row) -> np.ndarray:
    """Both images at HEIGHT beside each other (height, width, 3), with the inliers and the outline drawn."""
    left, right = (_at_height(pixels) for pixels in (image, match))
    canvas = np.concatenate([left, np.full((HEIGHT, GAP, 3), 128, np.uint8), right], axis=1)
    if not row["transform"]:
        return canvas
    shift = np.array([left.shape[1] + GAP, 0.0])
    a, b = sift.extract(match), sift.extract(image)
    found = sift.align(a, b, row["mirrored"])
    pairs = np.zeros((0, 2), int) if found is None else found.pairs[:: max(1, found.inliers // LINES)]
    places = a.features.points[pairs[:, 0], :2] * max(right.shape) + shift
    for start, end in zip(b.features.points[pairs[:, 1], :2] * max(left.shape), places, strict=True):
        cv2.line(canvas, _pixel(start), _pixel(end), (60, 220, 120), 1, cv2.LINE_AA)
    back = np.linalg.inv(np.reshape(row["transform"], (3, 3)))
    outline = sift.project(back, sift.corners(b)) * max(right.shape) + shift
    cv2.polylines(canvas, [np.array([_pixel(corner) for corner in outline])], True, (255, 170, 0), 2, cv2.LINE_AA)
    return canvas


def _at_height(image: np.ndarray) -> np.ndarray:
    width = max(1, round(image.shape[1] * HEIGHT / image.shape[0]))
    shrinks = image.shape[0] > HEIGHT
    return cv2.resize(image, (width, HEIGHT), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _pixel(point: np.ndarray) -> tuple[int, int]:
    x, y = np.clip(np.rint(point), -9999, 9999).astype(int)
    return int(x), int(y)


def _webp(image: np.ndarray) -> str:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return base64.b64encode(cv2.imencode(".webp", bgr, [cv2.IMWRITE_WEBP_QUALITY, 70])[1].tobytes()).decode()


if __name__ == "__main__":
    stage.main(run)
