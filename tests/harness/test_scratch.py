"""Scratch that a kill left half removed, or that is damaged, is as if it were not there."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline.harness import scratch, shards
from pipeline.store import artifact


class Killed(BaseException):
    pass


def part(folder: Path, *files: str) -> Path:
    with artifact.writing(folder) as tmp:
        for name in files:
            (tmp / name).write_text(name)
    return folder


def test_a_kill_within_a_removal_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = part(tmp_path / "part", "a", "b"), os.unlink

    def dies(*args: object, **kwargs: object) -> None:
        real(*args, **kwargs)  # type: ignore[arg-type]
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", dies)
        with pytest.raises(Killed):
            scratch.remove(folder)
    assert not folder.exists()
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2  # of three: one was removed before the kill
    part(folder, "a")
    scratch.remove(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "altered", "added", "unproven"])
def test_a_damaged_part_is_not_there(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = part(tmp_path / "part", "a", "b")
    assert scratch.usable(folder)
    if damage == "missing":
        (folder / "a").unlink()
    elif damage == "altered":
        (folder / "a").write_text("b")
    elif damage == "added":
        (folder / "c").touch()
    else:
        (folder / artifact.CHECKSUMS).unlink()
    assert not scratch.usable(folder)
    assert not folder.exists()
    assert "this is done again" in capsys.readouterr().err


def test_damaged_shards_are_done_again_and_no_others(tmp_path: Path) -> None:
    done: list[int] = []

    def work(rows: shards.Rows) -> int:
        done.append(rows.first)
        part(rows.folder, "a")
        return rows.last - rows.first

    def finish() -> list[Path]:
        return shards.finished(work, 10, 3, tmp_path, shards.LOCAL, "images", "testing")

    folders = finish()
    (folders[1] / "a").write_text("other")
    (folders[2] / "a").unlink()
    shutil.rmtree(folders[3])
    assert finish() == folders
    assert done == [0, 3, 6, 9, 3, 6, 9]
    assert all(map(artifact.verify, folders))
