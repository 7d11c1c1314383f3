"""The scan: what DVC cannot watch is found before DVC is started."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.harness import scan
from tests.tiny import folder_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with sources that are in order: files, folders, links to files."""
    folder_of(tmp_path, {"raw/cat/a.jpg": b"a", "raw/ä/b.jpg": b"b", "elsewhere/c.jpg": b"c", "data/overrides.csv": b""})
    (tmp_path / "raw" / "cat" / "link.jpg").symlink_to(tmp_path / "elsewhere" / "c.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(tree: dict[str, object]) -> str:
    with pytest.raises(scan.ScanError) as error:
        scan.expect_watchable(tree)
    return str(error.value)


def sources(root: str = "raw") -> dict[str, object]:
    return {"prepare": {"root": root}}


def test_files_folders_and_links_to_files_are_in_order(house: Path) -> None:
    assert scan.expect_watchable(sources()) == 6  # two folders, three files, and the overrides


def test_the_root_may_be_a_link_since_dvc_follows_that_one(house: Path) -> None:
    (house / "link").symlink_to("raw")
    assert scan.expect_watchable(sources("link")) == 6


def test_what_is_not_there_is_not_the_scan_s_to_complain_about(house: Path) -> None:
    assert scan.expect_watchable(sources("data/draw/scenes")) == 1
    assert scan.expect_watchable({"prepare": None, "teach": {"a": {"init": "raw/none.pth"}, "b": 3}, "distil": "x"}) == 1


def linked(path: Path) -> None:
    path.symlink_to(path.parents[2] / "elsewhere")


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (linked, "links to folders (1): raw/cat/x. DVC does not look behind them"),
        (os.mkfifo, "pipes (1): raw/cat/x. DVC would wait for ever"),
        (bound, "sockets (1): raw/cat/x."),
        (lambda path: path.symlink_to("/dev/zero"), "devices (1): raw/cat/x."),
        (lambda path: path.symlink_to("nowhere"), "links to nothing (1): raw/cat/x."),
        (lambda path: path.symlink_to("x"), "links to nothing (1): raw/cat/x."),
        (lambda path: folder_of(path, {".dvc/config": b""}), "repositories of their own (a folder `.dvc`) (1): raw/cat/x."),
        (lambda path: folder_of(path, {".dvcignore": b"*.jpg"}), "files named .dvcignore (1): raw/cat/x/.dvcignore."),
        (lambda path: path.with_name("k\udcf6tt.jpg").touch(), r"names that are not UTF-8 (1): raw/cat/k\xf6tt.jpg."),
    ],
)
def test_what_dvc_cannot_watch_is_named_with_what_to_do(house: Path, make: object, what: str) -> None:
    make(house / "raw" / "cat" / "x")  # type: ignore[operator]
    assert f"\n{what}" in told(sources())


def test_a_pipe_behind_a_link_is_a_pipe(house: Path) -> None:
    os.mkfifo(house / "elsewhere" / "pipe")
    (house / "raw" / "x.jpg").symlink_to(house / "elsewhere" / "pipe")
    assert "pipes (1): raw/x.jpg." in told(sources())


def test_all_kinds_are_told_at_once_and_of_many_only_some(house: Path) -> None:
    for i in range(7):
        os.mkfifo(house / "raw" / f"{i}.jpg")
    (house / "raw" / "x").symlink_to("nowhere")
    lines = told(sources()).split("\n")
    assert lines[0] == "DVC cannot watch all that params.yaml names. Nothing was run."
    assert [line.split(":")[0] for line in lines[1:]] == ["links to nothing (1)", "pipes (7)"]
    assert "and 2 more. DVC would" in lines[2]


def test_what_entries_name_and_no_stage_makes_is_looked_at_too(house: Path) -> None:
    os.mkfifo(house / "data" / "net.pth")
    assert "pipes (1): data/net.pth." in told({"teach": {"a": {"init": "net.pth", "model": "../raw"}}})
    (house / "data" / "teach").mkdir()
    os.mkfifo(house / "data" / "teach" / "made")
    assert scan.expect_watchable({"distil": {"a": {"init": "teach/made"}}}) == 1


def test_a_folder_that_cannot_be_read_is_not_passed_over(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.scandir

    def refused(folder: str) -> object:
        if folder.endswith("cat"):
            raise PermissionError(13, "Permission denied", folder)
        return listed(folder)

    monkeypatch.setattr("os.scandir", refused)
    assert "folders that cannot be read (1): raw/cat." in told(sources())


def test_files_are_not_asked_for_their_kind_one_by_one(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million calls of stat take longer than the lists of their folders."""
    asked: list[object] = []
    kind = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **how: asked.append(path) or kind(path, **how))  # type: ignore[func-returns-value]
    monkeypatch.setattr(stat, "S_ISREG", lambda mode: asked.append(mode) or False)  # type: ignore[func-returns-value]
    list(scan.unwatched(Path("raw")))
    assert asked[0] == Path("raw")
    assert len(asked) == 2  # the root, and the one link


def test_the_command_ends_with_2_without_torch_and_before_dvc(house: Path) -> None:
    (house / "params.yaml").write_text("prepare: {root: raw}\n")
    os.mkfifo(house / "raw" / "pipe")
    code = (
        "import sys; from pipeline import __main__ as m\n"
        "sys.argv = ['', 'scan']\n"
        "try: m.main()\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert "error: DVC cannot watch all that params.yaml names" in done.stderr
    recipe = (ROOT / "Makefile").read_text().partition("\nrun:")[2].partition("\n\n")[0]
    assert 0 < recipe.index("pipeline scan") < recipe.index("dvc repro")
