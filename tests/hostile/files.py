"""Hostile file systems: what `python -m pipeline scan` says of the folders that DVC would hash."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.harness import scan
from tests.hostile.case import Case
from tests.tiny import folder_of


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)


def linked_to(target: str) -> Callable[[Path], Any]:
    return lambda path: path.symlink_to(target)


def pipe_behind_a_link(path: Path) -> None:
    os.mkfifo("pipe")
    path.symlink_to(Path("pipe").absolute())


ODD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pipe": (os.mkfifo, "pipes"),
    "a pipe behind a link": (pipe_behind_a_link, "pipes"),
    "a socket": (lambda path: in_folder(path, bound), "sockets"),
    "/dev/zero": (linked_to("/dev/zero"), "devices"),
    "/dev/tty": (linked_to("/dev/tty"), "devices"),
    "a link to nothing": (linked_to("nowhere"), "links to nothing"),
    "a link to itself": (linked_to("x"), "links to nothing"),
    "a link through a file": (linked_to("a.jpg/b"), "links to nothing"),
    "a link to the folder above": (linked_to(".."), "links to folders"),
    "a link to /": (linked_to("/"), "links to folders"),
    "a link to /proc": (linked_to("/proc/self"), "links to folders"),
    "a name of Latin-1": (lambda path: path.with_name("k\udcf6").touch(), "not UTF-8"),
    "a folder of Latin-1": (lambda path: path.with_name("k\udcf6").mkdir(), "not UTF-8"),
    "a repository": (lambda path: folder_of(path, {".dvc/config": b""}), "repositories"),
    "a .dvcignore": (lambda path: folder_of(path, {".dvcignore": b"*"}), ".dvcignore"),
    "a pipe in a hidden folder": (lambda path: os.mkfifo(folder_of(path, {".git/HEAD": b""}) / ".git" / "p"), "pipes"),
}


def in_folder(path: Path, make: Callable[[Path], Any]) -> None:
    """From within: the whole path may be too long for a socket."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        make(path)
    finally:
        os.chdir(before)


def all_of(_: int) -> Iterator[Case]:
    for place in ("raw/cat", "data"):
        tree = {"prepare": {"root": "raw"}} if place == "raw/cat" else {"teach": {"a": {"init": "x"}}}
        for name, (make, told) in ODD.items():
            if place == "data" and told in (
                "not UTF-8",
                "links to folders",
            ):  # there the name is params', and DVC follows the link
                continue

            def call(_: Path, tree: Any = tree) -> None:
                scan.expect_watchable(tree)

            def made(folder: Path, make: Callable[[Path], Any] = make, place: str = place) -> None:
                folder_of(folder / place, {"a.jpg": b"a"})
                make(folder / place / "x")

            yield Case("file system", f"{name} in {place}", "refused", made, call, told)
    fine: dict[str, Callable[[Path], Any]] = {
        "a link to a file": linked_to("a.jpg"),
        "a name of line ends": lambda path: path.with_name("a\nb").touch(),
        "a name of Greek": lambda path: path.with_name("αβγ").touch(),
        "a name of 255 bytes": lambda path: path.with_name("x" * 255).touch(),
        "an empty folder": lambda path: path.mkdir(),
        "1,000 files": lambda path: folder_of(path, {f"{i}": b"" for i in range(1000)}),
    }
    for name, make in fine.items():

        def works(_: Path) -> bool:
            return scan.expect_watchable({"prepare": {"root": "raw"}}) >= 2

        def put(folder: Path, make: Callable[[Path], Any] = make) -> None:
            folder_of(folder / "raw" / "cat", {"a.jpg": b"a"})
            make(folder / "raw" / "cat" / "x")

        yield Case("file system", name, "works", put, works)
