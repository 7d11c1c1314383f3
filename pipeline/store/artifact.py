"""Artifacts: directories that are written whole or not at all, and that prove their content when read.

DVC hands back a damaged cache entry as "up to date"; the checksums here are what turns a flipped bit into an error.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

CHECKSUMS = "checksums.json"
RECORD = "record.json"

provenance: ContextVar[dict[str, Any] | None] = ContextVar("provenance", default=None)
"""The record of the stage at work: every artifact it writes carries it as `record.json`."""


def spent(macs: int) -> None:
    """Note in the record of the stage at work the multiply-accumulates that its networks took, no other stage's included."""
    if record := provenance.get():
        record["macs"] = macs


discard: ContextVar[bool] = ContextVar("discard", default=False)
"""Set in all processes of a group but the first: what they write goes nowhere."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The numbers of an OSError that mean: no more bytes go there. EFBIG is a limit on the size of a file."""


class ArtifactError(UserError):
    """An artifact is missing, incomplete, or its bytes are not those that were written. `artifact` is its folder, where there is
    one, and `file` the name of what is wrong there."""

    def __init__(self, message: str, artifact: Path | None = None, file: str | None = None) -> None:
        super().__init__(message)
        self.artifact, self.file = artifact, file


@contextlib.contextmanager
def writing(out: Path) -> Iterator[Path]:
    """Give a temporary directory beside `out`; on a clean exit checksum it, sync it to disk and rename it to `out`.

    If the block raises, `out` is left as it was and the temporary directory is removed. A previous `out` is replaced. Raises
    OSError with a number of FULL where the disk is full, whatever the library that wrote calls it.
    """
    with _replacing(out) as tmp:
        yield tmp
        record = provenance.get()
        if record is not None:
            (tmp / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        files = {name: _facts(tmp / name) for name in _files(tmp)}
        (tmp / CHECKSUMS).write_text(json.dumps({"files": files}, indent=1, sort_keys=True) + "\n")
        mode = (tmp / CHECKSUMS).stat().st_mode
        for name in files:
            (tmp / name).chmod(mode)  # safetensors writes files that only their owner can read


def copy(source: Path, out: Path) -> None:
    """Write the artifact `source` to `out` byte for byte, its record included: a stage that changed nothing passes it on.

    Readers of either see one identity, so nothing that was made from one is stale for the other.
    """
    verify(source)
    with _replacing(out) as tmp:
        shutil.copytree(source, tmp, dirs_exist_ok=True)


def link(source: Path, to: Path) -> None:
    """Give a finished file its second name, or copy it where that is on another disk."""
    try:
        os.link(source, to)
    except OSError:
        shutil.copyfile(source, to)


@contextlib.contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    if discard.get():
        with tempfile.TemporaryDirectory() as nowhere:
            yield Path(nowhere)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    for left_by_a_killed_run in out.parent.glob(f".{out.name}.tmp-*"):
        shutil.rmtree(left_by_a_killed_run)
    tmp = out.parent / f".{out.name}.tmp-{os.getpid()}"
    tmp.mkdir()
    try:
        with _full_disks_named(out):
            yield tmp
        for name in _files(tmp):
            sync(tmp / name)
        sync(tmp)
        if out.exists():
            _exchange(tmp, out)
            sync(out.parent)
            shutil.rmtree(tmp)
        else:
            tmp.rename(out)
            sync(out.parent)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def _exchange(a: Path, b: Path) -> None:
    """Swap two directories, so that no moment has neither: a process killed between two renames would leave none."""
    at_fdcwd, rename_exchange = -100, 2
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None or swap(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange):
        aside = b.with_name(f"{a.name}-old")  # not Linux, or a file system that cannot swap
        b.rename(aside)
        a.rename(b)
        aside.rename(a)


@contextlib.contextmanager
def writing_file(path: Path) -> Iterator[Path]:
    """A temporary name for one file (a metrics file, a checkpoint), synced and renamed on a clean exit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with _full_disks_named(path):
            yield tmp
        sync(tmp)
        tmp.rename(path)
        sync(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def _full_disks_named(out: Path) -> Iterator[None]:
    """Raise an OSError that names `out` where a full disk stops what is done inside.

    safetensors and faiss raise errors of their own then, which have the system's message but not its number.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for number in FULL:
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(out)) from error
        raise


def verify(path: Path) -> Path:
    """Check every file of the artifact against its checksums and return `path`.

    Raises ArtifactError naming the file that is missing, added or altered.
    """
    expected = _checksums(path)
    present = set(_files(path)) - {CHECKSUMS}
    for name in sorted(expected.keys() | present):
        if name not in present:
            raise ArtifactError(f"{path / name} is missing. {_remake(path)}", path, name)
        if name not in expected:
            raise ArtifactError(f"{path / name} does not belong to the artifact {path}. Remove it, or {_remake(path)}")
        if _facts(path / name) != expected[name]:
            raise _altered(path, name)
    return path


def identity(path: Path) -> str:
    """The identity of an input, as a SHA-256 hex digest: of an artifact or a file, its content.

    A plain folder (a user's data, or a folder of artifacts) is known by the names and sizes of its files and by the content of
    the artifacts in it. Whoever reads it more closely, as `prepare` does, has to check what it reads.
    """
    if path.is_file():
        return _sha256(path)
    if (path / CHECKSUMS).is_file():
        return _sha256(path / CHECKSUMS)
    if not path.is_dir():
        _checksums(path)
    digest = hashlib.sha256()
    for name in _files(path):
        known = _sha256(path / name) if Path(name).name == CHECKSUMS else (path / name).stat().st_size
        digest.update(f"{name}\0{known}\n".encode())
    return digest.hexdigest()


def record(path: Path) -> dict[str, Any]:
    """The record of the stage that wrote the artifact; empty for a plain file or an artifact written by hand.

    Raises ArtifactError if it is not the one that was written.
    """
    file = path / RECORD
    if not file.is_file():
        return {}
    if (path / CHECKSUMS).is_file() and _facts(file) != _checksums(path).get(RECORD):
        raise _altered(path, RECORD)
    try:
        known = json.loads(file.read_text())
    except (ValueError, RecursionError):
        known = None
    if not isinstance(known, dict) or not isinstance(known.get("lineage", {}), dict):
        raise ArtifactError(f"{file} is no record of a stage. {_remake(path)}", path, RECORD)
    return known


def _altered(path: Path, name: str) -> ArtifactError:
    return ArtifactError(f"{path / name} was altered after it was written (checksum mismatch). {_remake(path)}", path, name)


def _facts(file: Path) -> dict[str, Any]:
    return {"sha256": _sha256(file), "size": file.stat().st_size}


def _checksums(path: Path) -> dict[str, dict[str, Any]]:
    """The facts of each file by its name."""
    if not path.is_dir():
        raise ArtifactError(f"{path} is not there. {_remake(path)}")
    try:
        return dict(json.loads((path / CHECKSUMS).read_text())["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is not a whole artifact: its {CHECKSUMS} cannot be read. {_remake(path)}", path, CHECKSUMS
        ) from error


def _remake(path: Path) -> str:
    return f"Remake it: remove {path} and its entry in the DVC cache, then run `dvc repro`."


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file's bytes, or a directory's names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
