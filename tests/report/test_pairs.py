"""Paired statistics against values from the literature and against simulation."""

import itertools
import math
import time

import numpy as np
import pytest

from pipeline.report import pairs
from pipeline.report.pairs import Pair


def pair(gained: int, lost: int, n: int) -> Pair:
    right = np.arange(n) < gained
    other = (np.arange(n) >= gained) & (np.arange(n) < gained + lost)
    return pairs.compare(right, other)


def naive_mid_p(gained: int, lost: int) -> float:
    """Every sequence of fair coins of that length, those that fall as unevenly counted half."""
    n, seen = gained + lost, abs(gained - lost)
    uneven = [abs(2 * sum(coins) - n) for coins in itertools.product((0, 1), repeat=n)]
    return sum(1.0 if u > seen else 0.5 if u == seen else 0.0 for u in uneven) / 2**n


@pytest.mark.parametrize(("gained", "lost"), [(1, 0), (7, 1), (5, 2), (0, 9), (6, 3)])
def test_mcnemar_counts_coins(gained: int, lost: int) -> None:
    assert pairs.mcnemar(gained, lost) == pytest.approx(naive_mid_p(gained, lost), abs=1e-12)


def test_mcnemar_of_fagerlands_example() -> None:
    """Airway hyper-responsiveness before and after stem cell transplantation: 7 and 1 of 21, mid-p 0.039."""
    assert pairs.mcnemar(1, 7) == pytest.approx(0.0391, abs=5e-5)


def test_mcnemar_of_thousands_is_the_normal_one() -> None:
    z = (3000 - 2800) / math.sqrt(5800)
    assert pairs.mcnemar(3000, 2800) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)
    assert pairs.mcnemar(0, 0) == 1
    assert pairs.mcnemar(40, 40) == pytest.approx(1)


def test_every_pair_is_what_each_comparison_says() -> None:
    right = np.random.default_rng(0).random((7, 300)) < 0.6
    found = pairs.every_pair(right)
    assert found == {(i, j): pairs.compare(right[i], right[j]) for i in range(7) for j in range(i + 1, 7)}


def test_a_pair_turned_is_the_other_way_round() -> None:
    names = {("a", "b"): pair(60, 20, 1000)}
    [there] = pairs.versus(names, 0.01)
    [back] = pairs.versus({("b", "a"): pair(20, 60, 1000)}, 0.01)
    assert there.turned() == back.model_copy(update={"p": there.p, "corrected": there.corrected})
    assert (there.outcome, back.outcome) == ("better", "worse")
    assert back.low == pytest.approx(-there.high)


def test_sixty_entries_of_ten_thousand_images_take_seconds() -> None:
    right = np.random.default_rng(0).random((60, 10_000)) < 0.6
    start = time.monotonic()
    assert len(pairs.versus({(str(i), str(j)): p for (i, j), p in pairs.every_pair(right).items()}, 0.01)) == 1770
    assert time.monotonic() - start < 10


def test_outcomes() -> None:
    assert pair(60, 20, 1000).outcome() == "better"
    assert pair(20, 60, 1000).outcome() == "worse"
    assert pair(25, 20, 1000).outcome() == "not separable"
    assert pair(25, 20, 10_000).outcome() == "equivalent"
    assert pair(0, 0, 50).outcome() == "not separable"  # too few images to call anything equal


def test_holm_corrects_step_by_step() -> None:
    assert pairs.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert pairs.holm([]) == []
    assert pair(60, 30, 1000).outcome() == "better"
    p = pair(60, 30, 1000).p
    assert pair(60, 30, 1000).outcome(pairs.holm([p] * 60)[0]) == "not separable"


def test_the_bootstrap_of_one_seed_is_the_interval_over_images() -> None:
    found = pair(90, 50, 1000)
    low, high = pairs.bootstrap([found], np.random.default_rng(0))
    assert (low, high) == pytest.approx((found.difference.low, found.difference.high), abs=2e-3)


def test_seeds_that_disagree_widen_the_bootstrap() -> None:
    alike, torn = [pair(60, 40, 1000)] * 3, [pair(90, 10, 1000), pair(60, 40, 1000), pair(30, 70, 1000)]
    (low, high), (lower, higher) = (pairs.bootstrap(seeds, np.random.default_rng(0)) for seeds in (alike, torn))
    assert low > 0 > lower
    assert higher - lower > 2 * (high - low)


def test_classes_are_compared_on_their_own_images() -> None:
    labels = np.repeat([0, 2], 100)
    right = np.r_[np.ones(100, bool), np.arange(100) < 50]
    other = np.r_[np.arange(100) < 70, np.arange(100) < 52]
    first, second = pairs.by_class(labels, {0: "ant", 1: "bee", 2: "cat"}, right, other)
    assert (first.name, first.pair.difference.value, first.pair.outcome(first.p)) == ("ant", 0.3, "better")
    assert (second.name, second.pair.gained, second.pair.lost) == ("cat", 0, 2)
