"""Images resized once and packed in tars, so that a long training decodes small ones."""

import functools
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import PositiveInt

from pipeline.harness import shards, stage
from pipeline.harness.machine import Machine
from pipeline.sources.tars import Tars
from pipeline.store import artifact, manifest
from pipeline.store.decode import ImageRefused, decode
from pipeline.store.manifest import Manifest
from pipeline.store.params import MadeImages, Section

SHARD = 8192  # images; a killed run loses at most one shard
CHUNK = 64  # images that a thread takes at a time
ROWS = "rows.parquet"
QUALITY = 90  # of the JPEG files
LONGEST = 65_500  # pixels of a side of a JPEG file; a longer strip keeps its file

cv2.setNumThreads(1)  # the threads below share the cores already


class Pack(Section):
    """What is resized. Nothing that a model of `canvas` pixels sees is lost but to JPEG if `side` is at least that."""

    images: MadeImages
    """A manifest: `select/top`."""
    labelled: bool = True
    """Pack the labelled images too."""
    side: PositiveInt = 256
    """The short side, in pixels, to which larger images are reduced; an image that is no larger keeps its file."""


def run(params: Pack, *, chosen: Path, train: Path, out: Path, tars_out: Path, workdir: Path, machine: Machine) -> stage.Metrics:
    """Write `out`, a manifest with the ids and labels of `chosen`, whose images lie in uncompressed tars in `tars_out`.

    With those of `train` in it, a training on `out` reads all its images from there.

    Shards that a killed run has finished are not packed again. Raises ManifestError or ImageRefused, naming the image, if one
    cannot be read any more.
    """
    identities = (artifact.identity(chosen), artifact.identity(train))
    packing = Packing(chosen, train, identities, tars_out, params, machine)
    listed = packing.listed()
    folders = shards.finished(packing, len(listed), SHARD, workdir, machine.executor, "images", "packing")
    tables = [pq.read_table(artifact.verify(folder) / ROWS) for folder in folders]
    with artifact.writing(tars_out) as to, artifact.writing(out) as tmp:
        for folder in folders:
            (to / folder.name).mkdir()
            for tar in folder.glob("*.tar"):
                artifact.link(tar, to / folder.name / tar.name)
        table = pa.concat_tables(tables)
        manifest.write(tmp, table, listed.classes)
    before, after = (int(np.sum(part["size"].to_numpy())) for part in (listed.table, table))
    return {"images": len(listed), "bytes_before": before, "bytes_after": after}


@dataclass(frozen=True)
class Packing:
    """What a process needs to pack a shard. Threads decode and encode: both release the GIL."""

    chosen: Path
    train: Path
    identities: tuple[str, str]
    final: Path
    params: Pack
    machine: Machine

    def listed(self) -> Manifest:
        return _listed(self.chosen, self.train, self.params.labelled, self.identities)

    def __call__(self, shard: shards.Rows) -> int:
        """Write the tars and the rows of a shard; returns the number of its images."""
        listed = self.listed()
        rows = np.arange(shard.first, shard.last)
        with ThreadPoolExecutor(self.machine.cores(self.machine.workers)) as threads, artifact.writing(shard.folder) as tmp:
            packed = _packed(listed, rows, self.params, threads)
            pq.write_table(_shard(listed, rows, packed, tmp, self.final / shard.folder.name), tmp / ROWS)
        return len(rows)


@functools.lru_cache(maxsize=1)
def _listed(chosen: Path, train: Path, labelled: bool, identities: tuple[str, str]) -> Manifest:
    """The manifest, once in a process; the identities tell a worker that outlives a run whether it is still that one."""
    return manifest.to_learn(chosen, train, labelled).seen


def _packed(listed: Manifest, rows: np.ndarray, params: Pack, threads: ThreadPoolExecutor) -> Iterator[tuple[bytes, int, int]]:
    """File, width and height of each of `rows`, in order."""

    def small(chunk: np.ndarray) -> list[tuple[bytes, int, int]]:
        files = manifest.image_bytes(listed, chunk)
        return [_reduced(listed, int(row), data, params) for row, data in zip(chunk, files, strict=True)]

    for part in threads.map(small, np.array_split(rows, -(-len(rows) // CHUNK))):
        yield from part


def _reduced(listed: Manifest, row: int, data: bytes, params: Pack) -> tuple[bytes, int, int]:
    width, height = (listed.table[name][row].as_py() for name in ("width", "height"))
    scale = params.side / min(width, height)
    if scale >= 1 or max(width, height) * scale > LONGEST:
        return data, width, height
    try:
        image = decode(data)
    except ImageRefused as refusal:
        raise ImageRefused(f"{listed.table['id'][row]}: {refusal}. `prepare` let it pass: set `prepare.check: decode`.") from None
    size = (max(params.side, round(width * scale)), max(params.side, round(height * scale)))
    reduced = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", reduced, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes(), *size


def _shard(listed: Manifest, rows: np.ndarray, packed: Iterator[tuple[bytes, int, int]], folder: Path, final: Path) -> pa.Table:
    """Write the tars of a shard to `folder`; its rows of the manifest, as if they lay in `final`."""
    columns: dict[str, list[object]] = {name: [] for name in ("path", "offset", "size", "width", "height", "crc32")}
    with Tars(folder, final) as tars:
        for number, (data, width, height) in enumerate(packed):
            path, offset = tars.add(f"{number:06}.jpg", data)
            for name, value in zip(columns, (path, offset, len(data), width, height, zlib.crc32(data)), strict=True):
                columns[name].append(value)
    kept = listed.table.slice(int(rows[0]), len(rows))
    return pa.table({"id": kept["id"], **columns, "label": kept["label"]}, schema=manifest.SCHEMA)


if __name__ == "__main__":
    stage.main(run)
