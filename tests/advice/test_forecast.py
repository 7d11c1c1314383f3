"""`python -m pipeline forecast`: the estimate of purity holds where its assumption does, and the advice follows the rule."""

import argparse
import csv
from pathlib import Path

import numpy as np
import pytest

from pipeline.advice import arguments, forecast
from pipeline.advice.forecast import At, chosen
from pipeline.errors import UserError
from pipeline.report import purity
from pipeline.report.purity import Answers
from pipeline.store import artifact, scores
from tests.tiny import CLASSES, prepared, scored, taught

C = 4


def answers(rng: np.random.Generator, own: int, foreign: int) -> tuple[Answers, np.ndarray]:
    """Logits of images that belong to a class, and of others, for which none stands out as much; and the label, -1 of these."""
    labels = np.concatenate([rng.integers(0, C, own), np.full(foreign, -1)])
    logits = rng.normal(0, 1, (own + foreign, C))
    logits[np.arange(own), labels[:own]] += rng.normal(4, 1.5, own)
    logits[own:] += rng.normal(0.8, 0.8, (foreign, C)) * (rng.integers(0, C, foreign)[:, None] == np.arange(C))
    order = np.argsort(-logits, axis=1)
    best = np.take_along_axis(logits, order, 1).astype(np.float32)
    return Answers.of_table(scores.table(order, best, np.log(np.exp(best).sum(1))), C), labels


@pytest.mark.parametrize("own", [1500, 3000, 5000])
def test_expected_purity_is_near_the_true_one_whatever_the_share_of_foreign_images(own: int) -> None:
    rng = np.random.default_rng(own)
    pool, truth = answers(rng, own, 6000 - own)
    held, labels = answers(rng, 500, 0)
    estimate = purity.estimate(pool, held, held.first == labels, C)
    assert estimate.share == pytest.approx(own / 6000, abs=0.1)
    naive = []
    for at in forecast.selections(pool, estimate.pure, C, [100, 400, 1000]):
        true = np.mean([true_of(pool, truth, c, at.k) for c in range(C)])
        assert at.purity == pytest.approx(true, abs=0.06)
        naive.append(at.naive - true)
    assert own > 3000 or max(naive) > 0.1, "the teacher alone must be wrong, or the test shows nothing"


def true_of(pool: Answers, truth: np.ndarray, c: int, k: int) -> float:
    rows = np.flatnonzero(pool.first == c)
    return float((truth[rows[np.argsort(-pool.log_p()[rows], kind="stable")[:k]]] == c).mean())


def test_logistic_finds_the_minimum_of_its_loss() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(200, 3)), rng.uniform(0.5, 2, 200)
    y = rng.random(200) < purity.expit(x @ [1.0, -2.0, 0.0] + 0.3)
    w = purity.logistic(x, y, weight, 2.0)

    def loss(w: np.ndarray) -> float:
        score = np.where(y, 1, -1) * (x @ w[1:] + w[0])
        return float((weight * np.log1p(np.exp(-score))).sum() + (w[1:] ** 2).sum())

    for step in np.vstack([np.eye(4), -np.eye(4)]) * 0.01:
        assert loss(w) < loss(w + step)


def at(k: int, pure: float) -> At:
    return At(k, np.full(C, k), np.full(C, pure), 0.99)


@pytest.mark.parametrize(
    ("purities", "accuracy", "k", "verdict"),
    [
        ({10: 0.95, 50: 0.9, 100: 0.82, 200: 0.75, 500: 0.5}, 0.9, 100, "gain"),
        ({10: 0.95, 50: 0.9, 100: 0.82, 200: 0.75, 500: 0.5}, 0.75, 100, "perhaps"),
        ({10: 0.95, 50: 0.9, 100: 0.82, 200: 0.75, 500: 0.5}, 0.6, 100, "none"),
        ({10: 0.95, 50: 0.78, 100: 0.72, 200: 0.6}, 0.9, 100, "perhaps"),
        ({10: 0.95, 50: 0.78, 100: 0.72, 200: 0.6}, 0.75, 100, "perhaps"),
        ({10: 0.95, 50: 0.6, 100: 0.5}, 0.9, 50, "none"),
        ({10: 0.95, 20: 0.9}, 0.9, 20, "none"),  # fewer than are labelled
    ],
)
def test_the_largest_pure_k_is_chosen_if_it_adds_as_much_as_is_labelled(
    purities: dict[int, float], accuracy: float, k: int, verdict: str
) -> None:
    found, said = chosen([at(k, pure) for k, pure in purities.items()], 50, accuracy)
    assert (found.k, said) == (k, verdict)


def test_the_command_tells_and_writes_it(tmp_path: Path) -> None:
    data = prepared(tmp_path, dict.fromkeys(CLASSES, 24), pool=60, holdout=0.5)
    teacher = taught(data, data / "teacher")
    record = {"stage": "score", "inputs": {"teacher": {"path": str(teacher), "identity": artifact.identity(teacher)}}}
    token = artifact.provenance.set(record)
    scored(data, teacher, data / "score", m=3)
    artifact.provenance.reset(token)
    parser = argparse.ArgumentParser()
    arguments.add_forecast(parser)
    given = ["--data", str(data)]
    text = forecast.run(parser.parse_args([str(data / "score"), "--k", "50", "5", *given, "--csv", str(tmp_path / "f.csv")]))
    assert "60 images of the pool, scored by " in text
    assert "36 held-out images are few" in text
    rows = [line.split() for line in text.split("\n\n")[1].splitlines()[1:]]
    assert [row[0] for row in rows] == ["5", "50"]
    with (tmp_path / "f.csv").open() as f:
        written = list(csv.DictReader(f))
    assert [(row["class"], row["k"]) for row in written] == [(name, k) for k in ("5", "50") for name in CLASSES]
    for k, images, pure, *_ in rows:
        of = [(int(r["taken"]), float(r["expected_purity"])) for r in written if r["k"] == k and int(r["taken"])]
        assert int(images) == sum(n for n, _ in of)
        assert pure == f"{sum(n * p for n, p in of) / sum(n for n, _ in of):.0%}"
    with pytest.raises(UserError, match=r"pool holds no scores: name what `score` has made"):
        forecast.run(parser.parse_args([str(data / "pool"), *given]))
