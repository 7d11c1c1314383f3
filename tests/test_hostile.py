"""The short form of `python -m tests.hostile`, and its judge."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from tests.hostile.case import RAN, Case, judged
from tests.hostile.catalogue import PROMISED, cases, short

ALL = list(cases(0))


@pytest.mark.parametrize("case", short(ALL), ids=lambda case: f"{case.kind}: {case.name}"[:80])
def test_it_ends_as_promised(case: Case) -> None:
    assert judged(case) == ""


def test_there_are_three_hundred_of_every_kind_and_each_has_a_name_of_its_own() -> None:
    assert len(ALL) >= 300
    assert {case.kind for case in ALL} == set(PROMISED)
    assert len({(case.kind, case.name) for case in ALL}) == len(ALL)


def test_a_seed_draws_the_same_again_and_another_one_others() -> None:
    assert [case.name for case in cases(1)] == [case.name for case in cases(1)]
    assert [case.name for case in cases(1)] != [case.name for case in ALL]


# The judge ------------------------------------------------------------------------------------------------------------


def refuse(folder: Path) -> None:
    raise UserError("this cannot be used: take another")


def lose(folder: Path) -> None:
    (folder / "a").unlink()
    refuse(folder)


@pytest.mark.parametrize(
    ("promise", "call", "why"),
    [
        ("refused", lambda folder: None, "taken, and ought to be refused"),
        ("works", refuse, "refused, and ought to work: this"),
        ("works", lambda folder: False, "a wrong result"),
        ("either", lambda folder: dict[str, int]()["x"], "traceback: KeyError: 'x'"),
        ("either", lambda folder: exec("raise SystemExit"), "traceback: SystemExit"),
        ("either", lambda folder: time.sleep(9), "hangs"),
        ("either", lambda folder: bytearray(1 << 40), "traceback: MemoryError"),
        ("either", lambda folder: (folder / RAN).touch(), "foreign code was run"),
        ("either", lambda folder: os.system("gs x"), "foreign code was run"),
        ("refused", lose, "lost or changed: a"),
        ("refused", refuse, "does not say `that`"),
    ],
)
def test_the_judge_notices(promise: Any, call: Callable[[Path], Any], why: str) -> None:
    told = "that" if "that" in why else ""
    case = Case("any", "it", promise, lambda folder: (folder / "a").write_text("a"), call, told)
    assert judged(case, seconds=0.5 if why == "hangs" else 60).startswith(why)


def test_the_judge_leaves_everything_as_it_was() -> None:
    before = (Path.cwd(), os.environ["PATH"])
    assert judged(Case("any", "it", "refused", lambda folder: None, refuse)) == ""
    assert (Path.cwd(), os.environ["PATH"]) == before
