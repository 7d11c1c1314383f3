"""A folder becomes tars: each file once, whole or not at all, and a killed command goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.sources import bundle
from pipeline.sources.bundle import bundle as bundled
from pipeline.sources.folder import Folder
from pipeline.sources.listing import list_files
from pipeline.sources.tar import Tar
from pipeline.sources.tars import Tars
from pipeline.store import artifact
from tests.tiny import folder_of

ROOT = Path(__file__).parents[2]
FILES = {f"{name}/{i:02}.jpg": bytes([i]) * 300_000 for i in range(5) for name in ("ant", "bee")}  # 3 MB


def listed(root: Path, source: Folder | Tar) -> dict[str, tuple[str, bytes]]:
    """The class and the bytes of each image, by the end of its id."""
    listing = list_files([source], "labelled", root, Tars(root, root))
    found = {}
    for row in listing.table.to_pylist():
        assert row["reason"] is None
        data = Path(row["path"]).read_bytes()[row["offset"] : row["offset"] + row["size"]]
        found["/".join(row["id"].split("/")[-2:])] = (row["class"], data)
    return found


def test_tars_hold_what_the_folder_held(tmp_path: Path) -> None:
    folder_of(tmp_path / "photos", FILES)
    told = bundled(tmp_path / "photos", tmp_path / "tars", megabytes=1)
    assert told == f"bundle: 10 files of 0.003 GB in 3 tars in {tmp_path / 'tars'}."
    artifact.verify(tmp_path / "tars")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "tars"]
    folder, tar = Folder(kind="folder", path="photos"), Tar(kind="tar", path="tars/*.tar")
    assert listed(tmp_path, tar) == listed(tmp_path, folder)
    assert len(listed(tmp_path, tar)) == len(FILES)


def test_equal_folders_make_equal_bytes(tmp_path: Path) -> None:
    for copy, names in (("a", list(FILES)), ("b", list(FILES)[::-1])):
        folder_of(tmp_path / copy, {name: FILES[name] for name in names})
        bundled(tmp_path / copy, tmp_path / f"{copy}-tars", megabytes=1)
    assert (tmp_path / "a-tars/checksums.json").read_bytes() == (tmp_path / "b-tars/checksums.json").read_bytes()


def test_a_killed_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "photos", FILES)
    honest, read = bundle._read, list[str]()

    def reading(file: Path, size: int) -> bytes:
        read.append(file.name)
        if len(read) == 7:
            raise KeyboardInterrupt
        return honest(file, size)

    monkeypatch.setattr(bundle, "_read", reading)
    with pytest.raises(KeyboardInterrupt):
        bundled(tmp_path / "photos", tmp_path / "tars", megabytes=1)
    assert not (tmp_path / "tars").exists()
    bundled(tmp_path / "photos", tmp_path / "tars", megabytes=1)
    assert len(read) == 7 + 6  # the first four files lie in a finished tar
    assert listed(tmp_path, Tar(kind="tar", path="tars/*.tar")) == {name: (name[:3], data) for name, data in FILES.items()}


def test_a_file_that_was_replaced_after_a_kill_is_read_again(tmp_path: Path) -> None:
    photos = folder_of(tmp_path / "photos", FILES)
    part = next(bundle._parts(photos, 10**6, bundle.Counter()))
    first = bundle._finished(photos, part, tmp_path / "work", "images-00000.tar")
    (photos / "ant/00.jpg").write_bytes(b"9" * 300_000)  # of the same size
    again = bundle._finished(photos, part, tmp_path / "work", "images-00000.tar")
    assert again != first
    assert b"9" * 300_000 in (again / "images-00000.tar").read_bytes()


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    folder_of(tmp_path / "photos", {"a/1.jpg": b"1", "a/.hidden": b"2", ".git/x": b"3"})
    (tmp_path / "photos/gone.jpg").symlink_to("nowhere")
    (tmp_path / "photos/empty").mkdir()
    told = bundled(tmp_path / "photos", tmp_path / "tars")
    assert told.endswith("Left out: 2 x hidden file, 1 x link to nothing.")
    with pytest.raises(UserError, match=r"is there already"):
        bundled(tmp_path / "photos", tmp_path / "tars")
    with pytest.raises(UserError, match=r"lies in .*photos, which it is made from"):
        bundled(tmp_path / "photos", tmp_path / "photos" / "tars")
    with pytest.raises(UserError, match=r"empty holds no file"):
        bundled(tmp_path / "photos/empty", tmp_path / "none")
    with pytest.raises(UserError, match=r"gone is not a folder"):
        bundled(tmp_path / "gone", tmp_path / "none")


def test_a_file_that_changes_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "photos", {"a/1.jpg": b"1"})
    honest = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: honest(self) + b"more" * (self.suffix == ".jpg"))
    with pytest.raises(UserError, match=r"1\.jpg has changed since it was listed \(5 of 1 bytes\)"):
        bundled(tmp_path / "photos", tmp_path / "tars")


def test_the_command(tmp_path: Path) -> None:
    folder_of(tmp_path / "photos", {"a/1.jpg": b"1"})
    command = [sys.executable, "-m", "pipeline", "bundle", "photos", "--out", "tars"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("bundle: 1 files of 1e-09 GB in 1 tars in tars.\n")
