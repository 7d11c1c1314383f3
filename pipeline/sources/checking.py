"""Every image is read once: checked, measured, and refused with a reason where it cannot be used."""

import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.harness import progress
from pipeline.sources.listing import Listing, batch
from pipeline.sources.source import PREPARE
from pipeline.store import decode, manifest
from pipeline.store.manifest import MAX_BYTES

MEASURED = pa.schema([("width", pa.int32()), ("height", pa.int32()), ("crc32", pa.uint32()), ("reason", pa.string())])
QUARANTINE = pa.schema(
    [
        ("id", pa.large_string()),
        ("path", pa.large_string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("role", pa.string()),  # labelled, val or pool
        ("reason", pa.string()),  # "<kind>" or "<kind>: <detail>"
    ]
)

SizeOf = Callable[[bytes], tuple[int, int]]
"""From an image file to its width and height; raises ImageRefused."""


def check_images(listing: Listing, size_of: SizeOf, workers: int, command: str = PREPARE) -> Listing:
    """Read every image: the columns of MEASURED are added, and a reason for each that `size_of` refused."""
    table = listing.table
    measured: list[pa.RecordBatch] = []
    label = f"{command}: checking {listing.role}" if command == PREPARE else f"{command}: checking"
    threads = ThreadPoolExecutor(workers)
    try:
        with progress.bar(len(table), "images", label) as shown:
            for part in threads.map(lambda chunk: _measured(chunk, size_of, listing.moved), table.to_batches()):
                measured.append(part)
                shown.update(len(part))
    finally:
        threads.shutdown(cancel_futures=True)
    columns = pa.Table.from_batches(measured, MEASURED)
    table = table.drop_columns("reason")
    for field in MEASURED:
        table = table.append_column(field, columns[field.name])
    return listing._replace(table=table)


def _measured(chunk: pa.RecordBatch, size_of: SizeOf, moved: Mapping[str, str]) -> pa.RecordBatch:
    rows: list[tuple[int | None, int | None, int | None, str | None]] = []
    columns = chunk.select(["path", "offset", "size", "reason"]).to_pydict().values()
    reasons = [_refused(size, reason) for *_, size, reason in zip(*columns, strict=True)]
    places = [
        (moved.get(path, path), offset, size)
        for (path, offset, size, _), reason in zip(zip(*columns, strict=True), reasons, strict=True)
        if reason is None
    ]
    with manifest.Opened() as opened:
        files = opened.each(*(zip(*places, strict=True) if places else ((), (), ())))
        for reason in reasons:
            if reason is not None:
                rows.append((None, None, None, reason))
                continue
            data = next(files)
            try:
                width, height = size_of(data)
            except decode.ImageRefused as refusal:
                rows.append((None, None, None, str(refusal)))
            else:
                rows.append((width, height, zlib.crc32(data), None))
    return batch(rows, MEASURED)


def _refused(size: int, reason: str | None) -> str | None:
    return reason or (f"oversized: {size} bytes" if size > MAX_BYTES else None)


def refused_of(listing: Listing) -> pa.Table:
    """The files that were refused, as rows of QUARANTINE."""
    refused = listing.table.filter(pc.is_valid(listing.table["reason"]))
    return refused.append_column("role", pa.repeat(listing.role, len(refused))).select(QUARANTINE.names).cast(QUARANTINE)


def reasons_of(files: pa.Table) -> dict[str, int]:
    """How many were refused for each kind of reason, the most frequent first."""
    kinds = pc.list_element(pc.split_pattern(files["reason"].drop_null(), ":", max_splits=1), 0)
    counts = {pair["values"]: pair["counts"] for pair in pc.value_counts(kinds).to_pylist()}
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
