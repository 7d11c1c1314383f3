"""Tiny images, drawn from a seed, and the ways in which they are kept: folders, tars."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from pipeline.harness.machine import Machine
from pipeline.sources.folder import Folder
from pipeline.stages import prepare


def picture(seed: int, size: int | tuple[int, int] = 32) -> np.ndarray:
    """(height, width, 3) uint8 RGB: smooth coloured noise, another for each seed, that survives JPEG; `size`: (width, height)."""
    width, height = (size, size) if isinstance(size, int) else size
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def encoded(image: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file of a Pillow format (`JPEG`, `PNG`, ...)."""
    stored = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stored, kind, **options)
    return stored.getvalue()


def jpeg(seed: int, size: int | tuple[int, int] = 32) -> bytes:
    return encoded(picture(seed, size), "JPEG", quality=95)


def jpegs(classes: Mapping[str, int], size: int | tuple[int, int] = 32, seed: int = 0) -> dict[str, bytes]:
    """So many images of each class, by `<class>/<number>.jpg`; no two are alike."""
    names = [f"{name}/{i:04}.jpg" for name, n in classes.items() for i in range(n)]
    return {name: jpeg(seed * 100_000 + i, size) for i, name in enumerate(names)}


def folder_of(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def tar_of(file: Path, files: Mapping[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file


def prepared(root: Path, classes: Mapping[str, int], *, pool: int = 20, holdout: float = 0.25) -> Path:
    """The manifests of `prepare` for so many labelled images of 16 pixels of each class and a pool of 20 pixels; 3 of each class
    measure. The images and the manifests lie below `root`; returns the manifests' folder."""
    folder_of(root / "labelled", jpegs(classes, 16))
    folder_of(root / "val", jpegs(dict.fromkeys(classes, 3), 16, seed=1))
    folder_of(root / "pool", jpegs({"x": pool}, 20, seed=2))
    sources = {name: (Folder(kind="folder", path=name),) for name in ("labelled", "val", "pool")}
    params = prepare.Prepare(root=str(root), holdout=holdout, **sources)  # type: ignore[arg-type]
    found = root / "data" / "prepare"
    outs = {f"{name}_out": found / name for name in ("train", "holdout", "val", "pool", "quarantine")}
    prepare.run(params, root=root, machine=Machine(workers=1), **outs)
    return found
