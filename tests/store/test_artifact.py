"""Artifacts: whole or not at all, and every altered byte is noticed."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from pipeline.store import artifact
from pipeline.store.artifact import ArtifactError
from tests.disks import disk_of

FILES = {"a.bin": bytes(range(256)), "deep/b.txt": b"text", "empty": b""}


def written(out: Path, files: dict[str, bytes] = FILES) -> Path:
    with artifact.writing(out) as tmp:
        for name, data in files.items():
            (tmp / name).parent.mkdir(exist_ok=True)
            (tmp / name).write_bytes(data)
    return out


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def test_a_whole_artifact_verifies(tmp_path):
    out = written(tmp_path / "new" / "out")
    assert artifact.verify(out) == out
    assert {name: (out / name).read_bytes() for name in FILES} == FILES
    assert beside(out) == ["out"]


@pytest.mark.parametrize("name", ["a.bin", "deep/b.txt"])
def test_every_flipped_bit_is_noticed_and_its_file_named(tmp_path, name):
    out = written(tmp_path / "out")
    whole = (out / name).read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole) * 8, 20):
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << (at % 8)
        (out / name).write_bytes(flipped)
        with pytest.raises(ArtifactError, match=rf"{name} was altered after it was written.*dvc repro"):
            artifact.verify(out)
    (out / name).write_bytes(whole)
    artifact.verify(out)


def test_a_file_cut_added_or_removed(tmp_path):
    out = written(tmp_path / "out")
    (out / "a.bin").write_bytes(FILES["a.bin"][:-1])
    with pytest.raises(ArtifactError, match=r"a\.bin was altered"):
        artifact.verify(out)
    (out / "a.bin").unlink()
    with pytest.raises(ArtifactError, match=r"a\.bin is missing"):
        artifact.verify(out)
    written(out)
    (out / "deep" / "new").write_text("x")
    with pytest.raises(ArtifactError, match=r"deep/new does not belong to the artifact"):
        artifact.verify(out)


@pytest.mark.parametrize("checksums", [None, "", "{", "[]"])
def test_damaged_checksums(tmp_path, checksums):
    out = written(tmp_path / "out")
    (out / artifact.CHECKSUMS).unlink()
    if checksums is not None:
        (out / artifact.CHECKSUMS).write_text(checksums)
    with pytest.raises(ArtifactError, match=r"out is not a whole artifact|out/.* does not belong"):
        artifact.verify(out)


def test_an_artifact_that_is_not_there(tmp_path):
    with pytest.raises(ArtifactError, match="out is not there"):
        artifact.verify(tmp_path / "out")
    with pytest.raises(ArtifactError, match="out is not there"):
        artifact.identity(tmp_path / "out")


class Interrupted(Exception):
    pass


def interrupted(out: Path) -> None:
    with artifact.writing(out) as tmp:
        (tmp / "half").write_bytes(b"x")
        raise Interrupted


def interrupted_file(file: Path) -> None:
    with artifact.writing_file(file) as tmp:
        tmp.write_text("2")
        raise Interrupted


def test_a_failure_leaves_what_was_there(tmp_path):
    out = written(tmp_path / "out")
    before = artifact.identity(out)
    with pytest.raises(Interrupted):
        interrupted(out)
    assert artifact.identity(artifact.verify(out)) == before
    assert beside(out) == ["out"]


def write_faiss(file: Path) -> None:
    index = faiss.IndexFlatL2(64)
    index.add(np.zeros((4096, 64), np.float32))
    faiss.write_index(index, str(file))


WRITERS: dict[str, Callable[[Path], object]] = {
    "python": lambda file: file.write_bytes(bytes(1 << 20)),
    "arrow": lambda file: pq.write_table(pa.table({"x": np.random.default_rng(0).random(1 << 17)}), file),
    "safetensors of torch": lambda file: safetensors.torch.save_file({"x": torch.zeros(1 << 18)}, file),
    "safetensors of numpy": lambda file: safetensors.numpy.save_file({"x": np.zeros(1 << 18)}, file),
    "faiss": write_faiss,
}


def fill_artifact(out: Path, write: Callable[[Path], object]) -> None:
    with artifact.writing(out) as tmp:
        write(tmp / "file")


def fill_file(file: Path, write: Callable[[Path], object]) -> None:
    with artifact.writing_file(file) as tmp:
        write(tmp)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("fill", [fill_artifact, fill_file])
def test_a_full_disk_is_an_os_error_that_names_what_was_written(
    tmp_path: Path, fill: Callable[[Path, Callable[[Path], object]], None], write: Callable[[Path], object]
) -> None:
    with disk_of("512k", tmp_path):
        with pytest.raises(OSError, match="No space left on device") as full:
            fill(tmp_path / "out", write)
        assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(tmp_path / "out"))
        assert not list(tmp_path.iterdir())


def test_whoever_may_read_one_file_of_an_artifact_may_read_all(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            with artifact.writing(tmp_path / "out") as tmp:
                (tmp / "text").write_text("text")
                safetensors.numpy.save_file({"x": np.zeros(3)}, tmp / "tensors")
        finally:
            os.umask(before)
        assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {mode}


def test_a_new_artifact_replaces_all_of_the_old(tmp_path):
    out = written(tmp_path / "out")
    written(out, {"other": b"1"})
    assert sorted(path.name for path in artifact.verify(out).iterdir()) == [artifact.CHECKSUMS, "other"]


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.store import artifact

with artifact.writing(Path(sys.argv[1])) as tmp:
    (tmp / "half").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_what_was_there_and_the_next_run_cleans_up(tmp_path):
    out = written(tmp_path / "out")
    path = str(Path(artifact.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], env=os.environ | {"PYTHONPATH": path}, check=False)
    assert done.returncode == -9
    assert len(beside(out)) == 2
    artifact.verify(out)
    written(out)
    assert beside(out) == ["out"]


def test_identity_is_that_of_the_content(tmp_path):
    one, two = written(tmp_path / "one"), written(tmp_path / "two")
    other = written(tmp_path / "other", FILES | {"a.bin": bytes(256)})
    assert artifact.identity(one) == artifact.identity(two) != artifact.identity(other)
    assert artifact.identity(one / "a.bin") == artifact.identity(two / "a.bin") != artifact.identity(other / "a.bin")


def test_a_copy_is_the_same_artifact(tmp_path):
    out = written(tmp_path / "out")
    written(tmp_path / "copy", {"old.txt": b"what stood there"})
    token = artifact.provenance.set({"stage": "another", "key": "k"})
    try:
        artifact.copy(out, tmp_path / "copy")
    finally:
        artifact.provenance.reset(token)
    artifact.verify(tmp_path / "copy")
    assert artifact.identity(tmp_path / "copy") == artifact.identity(out)
    assert beside(out) == ["copy", "out"]
    (out / "a.bin").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"a\.bin was altered"):
        artifact.copy(out, tmp_path / "copy")
    artifact.verify(tmp_path / "copy")


def test_identity_of_a_plain_folder(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.tar").write_bytes(b"123")
    same = artifact.identity(tmp_path / "one")
    assert same == artifact.identity(tmp_path / "two")
    (tmp_path / "two" / "a.tar").write_bytes(b"1234")
    assert same != artifact.identity(tmp_path / "two")


def test_the_record_of_the_stage_at_work_is_part_of_the_artifact(tmp_path):
    token = artifact.provenance.set({"stage": "score", "key": "k"})
    try:
        out = written(tmp_path / "out")
    finally:
        artifact.provenance.reset(token)
    assert artifact.record(artifact.verify(out)) == {"stage": "score", "key": "k"}
    assert artifact.record(written(tmp_path / "plain")) == {}


def test_one_file(tmp_path):
    file = tmp_path / "new" / "metrics.json"
    with artifact.writing_file(file) as tmp:
        tmp.write_text("1")
        assert not file.exists()
    with pytest.raises(Interrupted):
        interrupted_file(file)
    assert file.read_text() == "1"
    assert beside(file) == ["metrics.json"]


def test_every_flipped_bit_of_the_checksums_is_noticed(tmp_path):
    out = tmp_path / "out"
    with artifact.writing(out) as tmp:
        (tmp / "text").write_text("text")
    whole = (out / artifact.CHECKSUMS).read_bytes()
    for at in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << (at % 8)
        (out / artifact.CHECKSUMS).write_bytes(flipped)
        with pytest.raises(ArtifactError):
            artifact.verify(out)


def test_replacing_never_leaves_neither_the_old_nor_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    for text in ("old", "new"):
        if text == "new":  # killed where the old one is being removed: the slowest part
            monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with contextlib.suppress(KeyboardInterrupt), artifact.writing(out) as tmp:
            (tmp / "text").write_text(text)
    monkeypatch.undo()
    assert (artifact.verify(out) / "text").read_text() == "new"
    with artifact.writing(out) as tmp:
        (tmp / "text").write_text("newest")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (artifact.verify(out) / "text").read_text() == "newest"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"lineage": 3}', b"\xff", b"{}"])
def test_a_damaged_record_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    token = artifact.provenance.set({"stage": "teach", "key": "k", "lineage": {}})
    try:
        with artifact.writing(tmp_path / "a"):
            pass
    finally:
        artifact.provenance.reset(token)
    assert artifact.record(tmp_path / "a")["stage"] == "teach"
    (tmp_path / "a" / artifact.RECORD).write_bytes(data)
    with pytest.raises(artifact.ArtifactError, match=r"a/record\.json was altered after it was written"):
        artifact.record(tmp_path / "a")
