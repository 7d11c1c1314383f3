"""Hostile params files: what `python -m pipeline check` says of them. What it takes, a stage can load."""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline import __main__ as command
from tests.hostile.case import RAN, Case, Promise

ROOT = Path(__file__).parents[2]
VALUES: tuple[Any, ...] = (
    *(float("nan"), float("inf"), -float("inf"), -1, 0, 10**30, 1e-320, True, None, [], {}, "", "x" * 5000, "a\0b"),
    *(f"$(touch {RAN})", "${oc.env:HOME}", "../../etc/passwd", "/dev/zero", [[]], {"kind": "x"}, "2026-01-01"),
)


def all_of(seed: int) -> Iterator[Case]:
    yield from files()
    yield from keys()
    yield from values(seed)


def check(_: Path) -> None:
    command.check(Path("params.yaml"))


def writes(data: bytes) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        (folder / "data").mkdir()
        for name in ("scratch", "labels"):
            (folder / "data" / name).touch()
        (folder / "params.yaml").write_bytes(data)

    return make


def demo() -> dict[str, Any]:
    return copy.deepcopy(_demo())


@functools.cache
def _demo() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    return tree


def files() -> Iterator[Case]:
    good = (ROOT / "recipes" / "demo.yaml").read_bytes()
    laughs = b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i + 1, i + 1, i, i) for i in range(60))
    broken = {
        "nothing": b"",
        "text": b"hello",
        "a list": b"[1, 2]",
        "a number": b"3",
        "two documents": b"a: 1\n---\nb: 2\n",
        "Latin-1": good + b"# caf\xe9\n",
        "UTF-16": good.decode().encode("utf-16"),
        "zero bytes": bytes(100),
        "a bell": b"a: \x07",
        "an open bracket": b"seed: [",
        "a tab": b"seed:\n\t- 1",
        "an unknown tag": b"seed: !thing 3",
        "a tag that runs code": b"seed: !!python/object/apply:os.system ['touch foreign-code-ran']",
        "a tag that makes a module": b"seed: !!python/module:os",
        "60 doublings of an alias": good + laughs,
        "an alias of itself": b"seed: &a [*a]",
        "a merge key": good + b"x: &x {a: 1}\ny: {<<: *x}",
        "2,000 brackets": b"[" * 2000,
        "a date of month 13": b"seed: 2026-13-45",
        "a key that is a list": b"? [a]\n: 1",
        "a key that is null": b"~: 1",
        "a key twice": good + b"\nseed: 1\n",
        "an entry twice": b"teach: {a: {init: x}, a: {init: y}}",
        "a comment of 100 kB": b"#" * 100_000,
    }
    for name, data in broken.items():
        yield Case("params", name, "refused", writes(data), check)
    yield Case("params", "a byte-order mark", "works", writes(b"\xef\xbb\xbf" + good), check)
    yield Case("params", "no file", "refused", lambda folder: None, check, "is not there")
    yield Case("params", "a folder", "refused", lambda folder: (folder / "params.yaml").mkdir(), check)


def keys() -> Iterator[Case]:
    """A key of an entry becomes a word of a command and a folder's name."""
    for key in (
        f"x; touch {RAN}",
        f"$(touch {RAN})",
        f"`touch {RAN}`",
        "../x",
        "",
        "a b",
        "a\nb",
        "é",
        "a.b",
        "x" * 300 + "/",
        3.5,
    ):

        def make(folder: Path, key: Any = key) -> None:
            tree = demo()
            tree["teach"][key] = tree["teach"]["teacher"]
            writes(yaml.dump(tree, Dumper=_Plain, allow_unicode=True).encode())(folder)

        yield Case("key", f"{str(key)[:40]!r}", "refused", make, check, "a name has letters, digits")


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def values(seed: int) -> Iterator[Case]:
    """One leaf of the demo's params after another gets a value that nobody would write."""
    rng = np.random.default_rng([seed, 4])
    leaves = list(_leaves(demo()))
    for i, leaf in enumerate(rng.permutation(len(leaves))[:60]):
        path, value = leaves[leaf], VALUES[i % len(VALUES)]

        def make(folder: Path, path: tuple[Any, ...] = path, value: Any = value) -> None:
            tree: Any = demo()
            above = tree
            for part in path[:-1]:
                above = above[part]
            above[path[-1]] = value
            writes(yaml.safe_dump(tree).encode())(folder)

        is_number = isinstance(value, float) and not math.isfinite(value)
        promise: Promise = "refused" if is_number and "options" not in path else "either"  # options are a network's own business
        yield Case("value", f"{'.'.join(map(str, path))}: {str(value)[:30]!r}", promise, make, check)


def _leaves(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        if isinstance(value, dict | list) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key)
