"""What several tests start from: tiny images and the ways in which they are kept, tiny params, stages called as functions."""

import io
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.harness.job import Job
from pipeline.harness.journal import Journal
from pipeline.harness.machine import Machine
from pipeline.leaks import findings
from pipeline.sources.folder import Folder
from pipeline.stages import distil, prepare, score, self_distil, teach
from pipeline.store import artifact
from pipeline.store.params import Section

MACHINE = Machine(device="cpu", precision="float32", threads=1, workers=2)
SMALL = {"arch": "resnet8", "options": {"width": 4}, "input": {"size": 16}}
TRAINING = {"steps": 4, "batch": 8, "lr": 0.05}
CLASSES = {"ant": 8, "bee": 8, "cat": 8}
SCRATCH = Path(__file__).parents[1] / "data" / "scratch"
LABELS = SCRATCH.with_name("labels")

NETWORK = {"arch": "resnet8", "options": {"width": 8, "stem_stride": 2}, "input": {"size": 32}}
NAMED = {"model": "small", "view": "shifted", "training": "brief"}
STUDENT = {"init": "scratch", "teacher": "teach/teacher", **NAMED}
PARAMS: dict[str, Any] = {
    "seed": 0,
    "machine": {"threads": 1, "workers": 2},
    "draw": {"scenes": {"seed": 0, "labelled": 6, "val": 4, "in_class": 40, "out_of_class": 60, "leaks": 9, "broken": 9}},
    "prepare": {
        "root": "data/draw/scenes",
        "labelled": [{"kind": "tar", "path": "labelled.tar"}],
        "val": [{"kind": "tar", "path": "val.tar"}],
        "pool": [{"kind": "tar", "path": "pool-*.tar"}],
        "holdout": 0.2,
    },
    "search": {},
    "dedup": {},
    "models": {"small": NETWORK},
    "views": {"shifted": {}},
    "trainings": {"brief": {"steps": 6, "batch": 32, "lr": 0.05}},
    "pretrain": {"base": {"images": "dedup/pool", "model": "small", "head_out": 16, "training": "brief"}},
    "teach": {
        "teacher": {"init": "scratch", **NAMED},
        "few": {"init": "pretrain/base", "from_layer": 1, "labels": 2, **NAMED},
    },
    "score": {"teacher": {"teacher": "teach/teacher"}},
    "select": {"top": {"scores": "score/teacher", "rule": "top", "k": 4}},
    "distil": {
        "ssld": {**STUDENT, "images": "select/top"},
        "spread": {**STUDENT, "teacher": "teach/few", "images": "dedup/pool", "loss": {"name": "soft_ce", "temperature": 0.1}},
        "finetune": {**STUDENT, "init": "distil/ssld", "images": "dedup/train"},
    },
    "self_distil": {
        "byot": {**STUDENT, "teacher": "labels", "images": "dedup/train"},
    },
    "evaluate": {
        "baseline": {"role": "baseline", "model": "teach/teacher"},
        "ssld": {"role": "candidate", "model": "distil/ssld"},
        "spread": {"role": "control", "model": "distil/spread"},
        "finetune": {"role": "candidate", "model": "distil/finetune"},
        "byot": {"role": "candidate", "model": "self_distil/byot"},
    },
    "export": {"student": {"model": "distil/finetune", "evaluation": "evaluate/finetune"}},
    "compare": {"title": "tiny", "baseline": "baseline"},
}
"""A params.yaml of the whole DAG on tiny scenes."""


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
    leaks_of(found / "leaks", [])
    return found


def leaks_of(folder: Path, copies: Sequence[tuple[str, str, str, str, bool]], searched: str = "pool-val train-val") -> Path:
    """What `dedup` says of validation images and their copies: rows of VAL_COPIES."""
    rows = [dict(zip(findings.VAL_COPIES.names, row, strict=True)) for row in copies]
    with artifact.writing(folder) as tmp:
        findings.write_val_copies(tmp, pa.Table.from_pylist(rows, findings.VAL_COPIES), searched.split())
    return folder


def taught(data: Path, out: Path, seed: int = 0, scratch: Path | None = None, init_path: Path = SCRATCH, **params: Any) -> Path:
    section = teach.Teach.model_validate({"init": "-", "model": SMALL, "training": TRAINING, **params})
    paths = {"train": data / "train", "holdout": data / "holdout", "init": init_path, "out": out}
    teach.run(section, **paths, job=Job(seed, scratch or out.parent / "s", Journal(), MACHINE))
    return out


def distilled(
    data: Path, out: Path, teacher: Path, chosen: Path | None = None, init_path: Path = SCRATCH, **params: Any
) -> dict[str, Any]:
    return _student(distil.run, distil.Distil, data, out, teacher, chosen or data / "pool", init_path, params)


def self_distilled(
    data: Path, out: Path, teacher: Path = LABELS, chosen: Path | None = None, init_path: Path = SCRATCH, **params: Any
) -> dict[str, Any]:
    return _student(self_distil.run, self_distil.SelfDistil, data, out, teacher, chosen or data / "train", init_path, params)


def _student(
    run: Callable[..., Mapping[str, Any]],
    section: type[Section],
    data: Path,
    out: Path,
    teacher: Path,
    chosen: Path,
    init_path: Path,
    params: dict[str, Any],
) -> dict[str, Any]:
    named = {"init": "-", "teacher": "-", "images": "-", "model": SMALL if init_path == SCRATCH else None}
    paths = {"init": init_path, "teacher": teacher, "chosen": chosen, "out": out}
    return dict(
        run(
            section.model_validate({**named, "training": TRAINING, **params}),
            train=data / "train",
            holdout=data / "holdout",
            **paths,
            job=Job(0, out.parent / f"{out.name}-scratch", Journal(), MACHINE),
        )
    )


def scored(data: Path, teacher: Path, out: Path, m: int = 2) -> Path:
    score.run(
        score.Score(teacher="-", m=m),
        pool=data / "pool",
        train=data / "train",
        holdout=data / "holdout",
        teacher=teacher,
        out=out,
        workdir=out.parent / "scratch",
        machine=MACHINE,
    )
    return out


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def waited(until: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether something has come true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not until() and time.monotonic() < deadline:
        time.sleep(0.02)
    return until()


def is_gone(pid: int) -> bool:
    """Whether a process has ended, also where nobody has asked for its exit status yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextmanager
def leaned_on(library: str, known: str, part: str) -> Iterator[None]:
    """Have a failure say which release of `library` broke `part`, which no documentation promises. `known`: one that had it."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        pytest.fail(f"{library} {version(library)} broke what winnow leans on: {part}. {library} {known} had it.\n{error}")
