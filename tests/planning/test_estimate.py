"""Earlier runs come before probes, and are scaled by the work that is in them."""

from pathlib import Path

import pytest

from pipeline.planning.estimate import START, Estimate, Rates, Run, estimated
from pipeline.planning.probe import Rate
from pipeline.planning.work import Kind, PlanError, Recipe, Work, kind
from tests.tiny import MACHINE

STEP, DECODE, OTHER = kind("step", net="a"), kind("decode", side=32), kind("step", net="b")


class Known(Rates):
    """A step takes 2 s of 1 core, a decoded image 0.1 s; nothing else is known."""

    def __init__(self) -> None:
        super().__init__(Recipe(Path("params.yaml"), {}, MACHINE), Path("nowhere"), probing=False)

    def of(self, kind: Kind) -> Rate:
        if kind not in (STEP, DECODE):
            raise PlanError("not measured here yet")
        return Rate(2.0, 2.0) if kind == STEP else Rate(0.1, 0.1)


def run(work: Work, wall: float, name: str = "distil@ssld") -> Run:
    return Run(name, name.partition("@")[0], wall, 2 * wall, work)


WORK = {STEP: 100.0, DECODE: 50.0}  # 205 s by the rates


def test_without_an_earlier_run_the_rates_say_it() -> None:
    assert estimated("distil@ssld", WORK, [], Known()) == Estimate(START + 205, START + 205, "probe")


def test_the_same_work_takes_what_it_took() -> None:
    runs = [run(WORK, 300), run(WORK, 320), run(WORK, 1000), run({**WORK, DECODE: 80.0}, 7)]
    assert estimated("distil@ssld", WORK, runs, Known()) == Estimate(START + 320, START + 640, "an earlier run")
    # another entry with the same work will do, and rates need not be known then
    of_other = {OTHER: 10.0}
    found = estimated("distil@random", of_other, [run(of_other, 40)], Known())
    assert found == Estimate(START + 40, START + 80, "an earlier run")


def test_more_of_the_same_work_is_scaled_by_what_it_is_worth() -> None:
    twice_the_steps = {STEP: 200.0, DECODE: 50.0}  # 405 s by the rates; the earlier run took 1.5 times what they say
    found = estimated("distil@ssld", twice_the_steps, [run(WORK, 307.5)], Known())
    assert found.seconds == pytest.approx(START + 607.5)
    assert found.by == "an earlier run, scaled"


def test_other_work_is_no_earlier_run() -> None:
    assert estimated("distil@ssld", WORK, [run({OTHER: 100.0}, 1)], Known()).by == "probe"
    assert estimated("distil@ssld", WORK, [run(WORK, 1, name="teach@ssld")], Known()).by == "probe"


def test_what_nobody_can_tell_is_said() -> None:
    assert estimated("distil@ssld", {OTHER: 1.0}, [], Known()) == Estimate(None, None, "not measured here yet")
    why = PlanError("its work is not described.")
    assert estimated("union@both", why, [], Known()) == Estimate(None, None, "its work is not described")
    assert estimated("union@both", why, [run({}, 9, "union@both")], Known()).seconds == START + 9
