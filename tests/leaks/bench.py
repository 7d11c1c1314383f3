"""A folder in which the leak check runs: the inputs of its two stages and their outputs."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.harness.machine import Machine
from pipeline.leaks import decision, findings, search
from pipeline.stages import dedup
from pipeline.stages import search as searching
from pipeline.store import artifact, manifest
from tests.photographs import cropped, mirrored, photograph, recoded
from tests.tiny import encoded

PLAIN = np.full((120, 160, 3), 90, np.uint8)


def png(image: np.ndarray) -> bytes:
    return encoded(image, "PNG")


def manifest_of(
    folder: Path, images: Mapping[str, bytes | np.ndarray], label: int | None = None, classes: Sequence[str] = ()
) -> Path:
    """A manifest artifact of images that lie one after another in one file."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    file = folder.with_suffix(".bin")
    with file.open("wb") as f:
        for name in sorted(images):
            image = images[name]
            data = image if isinstance(image, bytes) else png(image)
            height, width = (1, 1) if isinstance(image, bytes) else image.shape[:2]
            place = {"path": str(file), "offset": f.tell(), "size": len(data), "crc32": zlib.crc32(data)}
            rows.append({"id": name, "width": width, "height": height, "label": label} | place)
            f.write(data)
    with artifact.writing(folder) as tmp:
        manifest.write(tmp, pa.Table.from_pylist(rows, manifest.SCHEMA), classes)
    return folder


class Bench:
    """A folder with the inputs of the two stages, and their outputs after `run`."""

    def __init__(self, folder: Path, **sets: Mapping[str, bytes | np.ndarray]) -> None:
        self.folder = folder
        self.inputs = {name: manifest_of(folder / name, sets.get(name, {})) for name in ("pool", "val")}
        for name in ("holdout", "train"):
            self.inputs[name] = manifest_of(folder / name, sets.get(name, {}), 0, ["thing"])
        self.overrides = folder / "overrides.csv"
        self.overrides.write_text("id,action,reason\n")
        self.scratch = folder / "scratch"

    def run(self, workers: int = 1, machine: Machine | None = None, **params: Any) -> Mapping[str, Any]:
        """Search and decide; returns what the decision says of itself."""
        self.search(workers, machine, duplicates=params.get("duplicates") == "collapse")
        return self.decide(**params)

    def search(self, workers: int = 1, machine: Machine | None = None, **params: Any) -> Mapping[str, Any]:
        self.scratch.mkdir(exist_ok=True)
        places = {"out": self.folder / "found", "workdir": self.scratch}
        return searching.run(search.Search(**params), **self.inputs, **places, machine=machine or Machine(workers=workers))

    def decide(self, **params: Any) -> Mapping[str, Any]:
        outs = {f"{name}_out": self.folder / "out" / name for name in ("pool", "holdout", "train", "leaks", "gallery")}
        found, overrides = self.folder / "found", self.overrides
        places = {**self.inputs, **outs, "found": found, "overrides": overrides}
        return dedup.run(decision.Dedup(**params), **places, machine=Machine(workers=1))

    def audit(self) -> list[dict[str, Any]]:
        return findings.read(artifact.verify(self.folder / "out" / "leaks")).to_pylist()

    def kept(self, name: str = "pool") -> set[str]:
        return set(manifest.read(self.folder / "out" / name).table["id"].to_pylist())

    def page(self) -> str:
        return (self.folder / "out" / "gallery" / "index.html").read_text()


ORIGINALS = {f"v{i}": photograph(i) for i in range(4)}
COPY = {"copy of v0": recoded(mirrored(ORIGINALS["v0"])), "copy of v2": cropped(ORIGINALS["v2"], 0.7)}
OTHERS = {f"p{i}": photograph(100 + i) for i in range(4)}
DOUBTFUL = {"doubtful": np.concatenate([ORIGINALS["v1"][:, :70], photograph(500)[:, 70:]], axis=1)}


def bench(folder: Path) -> Bench:
    return Bench(folder, pool=OTHERS | COPY, val=ORIGINALS, train={"t0": ORIGINALS["v3"], "t1": photograph(200)})
