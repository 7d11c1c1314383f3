"""Index the images of every source, refuse what cannot be used, and split the labelled ones.

A source is first listed (cheap: names, offsets and sizes), so that a missing path or a class without images stops the
stage before the long part. Then every image is read once, checked and measured. Images inside tables are unpacked into
uncompressed tars on the way, so that everything behind this stage sees files and tar members only.
"""

import functools
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations, starmap
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from pipeline.harness import stage
from pipeline.harness.machine import Machine
from pipeline.harness.stage import Metrics
from pipeline.sources.checking import check_images, reasons_of, refused_of
from pipeline.sources.listing import REMOTE, Listing, Source, list_files
from pipeline.sources.source import SourceError, expect_whole, some
from pipeline.sources.tars import Tars
from pipeline.store import artifact, decode, manifest
from pipeline.store.params import Section

TRAIN, HOLDOUT, REST = range(3)


class Prepare(Section):
    """Where the images come from, and how the labelled ones are divided."""

    root: Annotated[str, AfterValidator(expect_whole)]
    """The folder of all sources, which DVC watches: its whole path, or one relative to params.yaml."""
    labelled: tuple[Source, ...] = Field(min_length=1)
    """Sources of the images to learn from, with their classes."""
    val: tuple[Source, ...] = Field(min_length=1)
    """Sources of the validation images, with their classes: for the reported row alone."""
    pool: tuple[Source, ...] = ()
    """Sources of images without labels; labels that they have are not read."""
    per_class: PositiveInt | None = None
    """The label budget: so many images of each class, drawn by `seed`. null: all."""
    rest: Literal["pool", "drop"] = "pool"
    """Where the other labelled images go: into the pool without their labels, or nowhere."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """The share of each class, at least one image, on which every choice is made."""
    classes: tuple[str, ...] | None = None
    """The order of the classes, if another than that of their names is wanted (a published checkpoint's)."""
    seed: NonNegativeInt = 0
    """Draws the budget and the holdout, class by class."""
    check: Literal["decode", "header"] = "decode"
    """Decode every image, or trust its header."""
    max_pixels: PositiveInt = decode.MAX_PIXELS
    """Larger images are refused by their header."""


# The stage ------------------------------------------------------------------------------------------------------------


def run(
    params: Prepare,
    *,
    root: Path,
    remote: Path = REMOTE,
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
    if (root / artifact.CHECKSUMS).is_file():
        artifact.verify(root)  # drawn by winnow, so it can prove itself
    with ExitStack() as stack:
        outs = (train_out, holdout_out, val_out, pool_out, quarantine_out)
        train_to, holdout_to, val_to, pool_to, quarantine_to = [stack.enter_context(artifact.writing(out)) for out in outs]
        listed = [
            list_files(params.labelled, "labelled", root, Tars(train_to, train_out), lists=remote),
            list_files(params.val, "val", root, Tars(val_to, val_out), lists=remote),
            list_files(params.pool, "pool", root, Tars(pool_to, pool_out), lists=remote),
        ]
        _expect_no_image_twice(listed)
        classes = _class_order(listed[0], listed[1], params.classes)
        for listing in listed:
            _expect_images(listing, params)
        checked = [
            check_images(listing, functools.partial(_size_of, params), machine.cores(machine.workers)) for listing in listed
        ]
        for listing in checked:
            _expect_images(listing, params)
            for files in listing.remote:
                files.expect_unchanged()  # or what was read may be half of the old content and half of the new
        labelled, val, pool = (_images(listing, classes) for listing in checked)
        train, holdout, rest = _divided(labelled, classes, params)
        if params.rest == "pool":
            pool = pa.concat_tables([pool, _unlabelled(rest)])
        refused = pa.concat_tables([refused_of(listing) for listing in checked]).sort_by("id").combine_chunks()
        manifest.write(train_to, train, classes)
        manifest.write(holdout_to, holdout, classes)
        manifest.write(val_to, val, classes)
        manifest.write(pool_to, pool, ())
        pq.write_table(refused, quarantine_to / "quarantine.parquet", compression="zstd")
    warnings = _unmeasured(classes, val)
    for sentence in warnings:
        sys.stderr.write(f"GAP: {sentence}\n")
    return {
        "classes": len(classes),
        "train": len(train),
        "holdout": len(holdout),
        "val": len(val),
        "pool": len(pool),
        "dropped": len(rest) if params.rest == "drop" else 0,
        "quarantine": len(refused),
        "reasons": reasons_of(refused),
        "repeated": _repeated([train, holdout, val, pool]),
        "warnings": warnings or None,
    }


# What makes a data set ------------------------------------------------------------------------------------------------


def _expect_no_image_twice(listed: Sequence[Listing]) -> None:
    every = [listing.table["id"] for listing in listed]
    if all(map(_are_distinct, every)) and not any(starmap(_share, combinations(every, 2))):
        return
    ids = pa.chunked_array([chunk for column in every for chunk in column.chunks], pa.large_string())
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
    roles = [f"prepare.{listing.role}" for listing in listed if pc.is_in(twice, listing.table["id"]).as_py()]
    raise SourceError(
        f"the image {twice} occurs twice (in {' and '.join(roles)}). An image may come from one source only, and a name "
        "may occur once in a tar."
    )


def _are_distinct(ids: pa.ChunkedArray) -> bool:
    """Ids mostly come sorted, where a look at neighbours does: a table of all takes 90 bytes an image."""
    return manifest.are_sorted(ids) or pc.count_distinct(ids).as_py() == len(ids)


def _share(ids: pa.ChunkedArray, others: pa.ChunkedArray) -> bool:
    few, many = sorted((ids, others), key=len)
    return bool(len(few) and pc.any(pc.is_in(many, value_set=few)).as_py())


def _class_order(labelled: Listing, val: Listing, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The classes in the order of their labels. Raises SourceError where val or `prepare.classes` has other ones."""
    unknown = sorted(val.classes - labelled.classes)
    if unknown:
        raise SourceError(
            f"prepare.val has classes that prepare.labelled lacks: {some(unknown)}. No model can learn them: add labelled "
            f"images, or take them out of val. prepare.labelled has: {some(sorted(labelled.classes))}."
        )
    if wanted is None:
        return tuple(sorted(labelled.classes))
    if set(wanted) != labelled.classes or len(set(wanted)) != len(wanted):
        missing, unknown = sorted(labelled.classes - set(wanted)), sorted(set(wanted) - labelled.classes)
        repeated = sorted(name for name, n in Counter(wanted).items() if n > 1)
        raise SourceError(
            "prepare.classes must name every class of prepare.labelled once. "
            f"Missing: {some(missing)}. Not there: {some(unknown)}. Repeated: {some(repeated)}."
        )
    return tuple(wanted)


def _unmeasured(classes: Sequence[str], val: pa.Table) -> list[str]:
    """What has to be said of classes without an image in val: figures of val are those of the other classes."""
    seen = set(pc.unique(val["label"]).to_pylist())
    missing = [name for label, name in enumerate(classes) if label not in seen]
    if not missing:
        return []
    return [
        f"{len(missing)} of {len(classes)} classes have no image in val: {some(missing)}. Each figure of val is measured on the "
        f"other {len(seen)} alone. Add images of them to prepare.val, or take them out of prepare.labelled."
    ]


def _expect_images(listing: Listing, params: Prepare) -> None:
    """Raises SourceError unless, by what is known so far, the role and each of its classes has images, and enough of them."""
    role, good = listing.role, pc.is_null(listing.table["reason"])
    if len(listing.table) and not pc.any(good).as_py():
        raise SourceError(f"prepare.{role} has no readable image: {_told(listing.table)}.")
    if role == "pool":
        return
    counts = dict.fromkeys(sorted(listing.classes), 0)
    counts |= {pair["values"]: pair["counts"] for pair in pc.value_counts(listing.table.filter(good)["class"]).to_pylist()}
    empty = [name for name, n in counts.items() if n == 0]
    if empty:
        files = {name: listing.table.filter(pc.equal(listing.table["class"].cast(pa.string()), name)) for name in empty}
        told = some([f"{name} ({_told(files[name])})" for name in empty])
        raise SourceError(f"prepare.{role} has classes without a readable image: {told}. Add images, or remove the class.")
    if role == "labelled":
        _expect_enough(counts, params)


def _expect_enough(counts: Mapping[str, int], params: Prepare) -> None:
    """Every class must fill the label budget, and keep an image to train on beside the holdout."""
    short = {name: n for name, n in counts.items() if n < (params.per_class or 0)}
    if short:
        raise SourceError(
            f"prepare.per_class is {params.per_class}, but these classes have fewer readable labelled images: "
            f"{some([f'{name} {n}' for name, n in short.items()])}. Set it to {min(short.values())} or less, or to null for all."
        )
    for name, n in counts.items():
        budget = params.per_class or n
        if _holdout_size(budget, params.holdout) >= budget:
            raise SourceError(
                f"prepare.holdout ({params.holdout}) takes every labelled image of the class {name}, which has {budget}, and "
                "leaves none to train on. Lower it, raise prepare.per_class, or add images."
            )


def _told(files: pa.Table) -> str:
    return ", ".join(f"{n} x {reason}" for reason, n in reasons_of(files).items()) or "it holds no files"


def _size_of(params: Prepare, data: bytes) -> tuple[int, int]:
    if params.check == "header":
        return decode.size_of(data, params.max_pixels)
    height, width, _ = decode.decode(data, params.max_pixels).shape
    return width, height


def _images(listing: Listing, classes: Sequence[str]) -> pa.Table:
    """The images that passed, as manifest rows sorted by id."""
    reasons = listing.table["reason"]
    good = listing.table if reasons.null_count == len(reasons) else listing.table.filter(pc.is_null(reasons))
    label = pc.index_in(good["class"].cast(pa.string()), pa.array(classes, pa.string()))
    images = good.append_column("label", label).select(manifest.SCHEMA.names).cast(manifest.SCHEMA)
    return images if manifest.are_sorted(images["id"]) else images.sort_by("id")  # a copy less of a large pool


def _repeated(tables: Sequence[pa.Table]) -> int:
    """How many images are byte for byte (by CRC-32 and size) another one of the data set."""
    content = pa.concat_tables([t.select(["crc32", "size"]) for t in tables])
    return len(content) - len(content.group_by(["crc32", "size"]).aggregate([]))


# Dividing -------------------------------------------------------------------------------------------------------------


def _divided(labelled: pa.Table, classes: Sequence[str], params: Prepare) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Train, holdout and rest. A larger budget holds the images of a smaller one, and no class moves another's draw."""
    part = np.full(len(labelled), REST, np.int8)
    labels = labelled["label"].to_numpy()
    by_class = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[by_class], np.arange(len(classes) + 1))
    for name, start, end in zip(classes, ends, ends[1:], strict=False):
        shuffled = np.random.default_rng([params.seed, *name.encode()]).permutation(by_class[start:end])
        budget = shuffled[: params.per_class]
        part[budget] = TRAIN
        part[budget[: _holdout_size(len(budget), params.holdout)]] = HOLDOUT
    train, holdout, rest = (labelled.filter(pa.array(part == which)) for which in (TRAIN, HOLDOUT, REST))
    return train, holdout, rest


def _holdout_size(images: int, share: float) -> int:
    return max(1, round(share * images))


def _unlabelled(table: pa.Table) -> pa.Table:
    field = manifest.SCHEMA.field("label")
    return table.set_column(table.schema.get_field_index("label"), field, pa.nulls(len(table), field.type))


if __name__ == "__main__":
    stage.main(run)
