"""`python -m pipeline gallery`: what was taken, what was not, and labels checked by nobody who has learned them."""

import argparse
import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser

from pipeline.advice import arguments, gallery, selection
from pipeline.advice.suspects import parts, suspects
from pipeline.errors import UserError
from pipeline.stages import select, teach
from pipeline.store import artifact, manifest, scores
from tests.browser import WIDTHS, is_cut, opened
from tests.tiny import CLASSES, MACHINE, SCRATCH, SMALL, TRAINING, prepared, scored, taught

NAMES = tuple(CLASSES)


def made(stage: str, params: dict[str, Any], **of: Path) -> Any:
    """What `stage.main` records of a run, as far as the gallery reads it."""
    inputs = {name: {"path": str(path), "identity": artifact.identity(path)} for name, path in of.items()}
    return {"stage": stage, "params": params, "inputs": inputs, "seed": 0, "key": stage, "lineage": {}}


def selected(data: Path, name: str, **params: Any) -> Path:
    section = select.Select.model_validate({"scores": "-", "rule": "top", "k": 4, **params})
    paths = {"scores": data / "score", "pool": data / "pool"}
    token = artifact.provenance.set(made("select", section.model_dump(mode="json"), **paths))
    select.run(section, **paths, out=data / "select" / name, seed=0, workdir=data / "w", machine=MACHINE)
    artifact.provenance.reset(token)
    return data / "select" / name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its scores of a pool of 40, and a student."""
    data = prepared(tmp_path_factory.mktemp("world"), CLASSES, pool=40)
    section = teach.Teach.model_validate({"init": "scratch", "model": SMALL, "training": TRAINING})
    token = artifact.provenance.set(made("teach", section.model_dump(mode="json"), init=SCRATCH))
    teacher = taught(data, data / "teacher")
    artifact.provenance.set(made("score", {}, teacher=teacher))
    scored(data, teacher, data / "score", m=3)
    artifact.provenance.reset(token)
    taught(data, data / "student", seed=1)
    return data


def written(data: Path, chosen: Path, out: Path, *options: str) -> str:
    parser = argparse.ArgumentParser()
    arguments.add_gallery(parser)
    gallery.run(parser.parse_args([str(chosen), "--out", str(out), "--data", str(data), "--device", "cpu", *options]))
    return out.read_text()


def groups(page: str) -> dict[tuple[str, str], list[str]]:
    """The ids on the page by class and kind."""
    found = {}
    for section in re.findall(r"<section>(.*?)</section>", page, re.S)[:-2]:
        name = re.search(r"<h2[^>]*>(.*?)</h2>", section).group(1)  # type: ignore[union-attr]
        for title, listed in re.findall(r"<h3>(.*?)</h3>\s*<ol>(.*?)</ol>", section, re.S):
            found[name, title] = re.findall(r'<p class="id">(.*?)</p>', listed)
    return found


def ranked(data: Path, c: int) -> list[str]:
    """The ids of the images whose first class is c, the surest first, by the plain formula."""
    said, ids = scores.open_scores(data / "score"), manifest.read(data / "pool").table["id"].to_pylist()
    log_p = said.matrix(["logit_0"])[:, 0] - said.matrix(["logsumexp"])[:, 0]
    of = [row for row in np.argsort(-log_p, kind="stable") if said.matrix(["class_0"])[row, 0] == c]
    return [ids[row] for row in of]


def test_of_each_class_the_surest_the_last_ones_in_and_those_just_outside_are_shown(data: Path, tmp_path: Path) -> None:
    found = groups(written(data, selected(data, "top"), tmp_path / "top.html", "--each", "2"))
    assert found
    for c, name in enumerate(NAMES):
        order = ranked(data, c)
        expected = {"the surest": order[:2], "the last ones in": order[2:4], "just outside": order[4:6]}
        assert {title: ids for (of, title), ids in found.items() if of == name} == {t: ids for t, ids in expected.items() if ids}


@pytest.mark.parametrize(
    "params",
    [
        {"rule": "band", "skip": 2},
        {"membership": "any"},
        {"membership": "any", "several": False},
        {"rule": "random"},
        {"rule": "balanced", "k": 2},
        {"rule": "all"},
    ],
)
def test_what_is_said_to_be_taken_is_what_was_selected(data: Path, params: dict[str, Any]) -> None:
    chosen = selection.opened(selected(data, "other", **params))
    ranks = selection.ranks(chosen, 5, MACHINE)
    assert sorted({row for r in ranks for row in r.taken.tolist()}) == chosen.rows.tolist()
    assert all(not set(r.taken.tolist()) & set(r.outside.tolist()) for r in ranks)
    assert any(len(r.outside) for r in ranks) or params["rule"] == "all"


def test_a_selection_of_other_scores_is_refused(data: Path, tmp_path: Path) -> None:
    chosen = selected(data, "top")
    other = tmp_path / "score"
    scored(data, data / "student", other, m=3)
    (data / "score").rename(tmp_path / "aside")
    other.rename(data / "score")
    try:
        with pytest.raises(UserError, match=r"score is not what .*top was made of any more: run `dvc repro`"):
            written(data, chosen, tmp_path / "x.html")
    finally:
        (data / "score").rename(other)
        (tmp_path / "aside").rename(data / "score")
    with pytest.raises(UserError, match=r"pool is no selection: name what `select` has made"):
        written(data, data / "pool", tmp_path / "x.html")
    with pytest.raises(UserError, match=r"--class dog: the teacher has no such class\. It has ant, bee, cat"):
        written(data, chosen, tmp_path / "x.html", "--class", "dog")


def test_every_label_is_checked_by_a_network_that_has_not_learned_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, browser: Browser
) -> None:
    monkeypatch.chdir(tmp_path)
    learned: list[set[str]] = []
    train, run = manifest.read(data / "train"), teach.run

    def watched(params: teach.Teach, **paths: Any) -> Any:
        learned.append(set(manifest.read(paths["train"]).table["id"].to_pylist()))
        return run(params, **paths)

    monkeypatch.setattr(teach, "run", watched)
    p = gallery.crossed(data / "teacher", data, train, 3, MACHINE)
    ids = train.table["id"].to_pylist()
    for fold, known in enumerate(learned):
        assert known == {name for name, part in zip(ids, parts(train.labels(), 3), strict=True) if part != fold}
    assert p.sum(1) == pytest.approx(np.ones(len(ids)), abs=1e-5)
    page = written(
        data, data / "select" / "top", tmp_path / "p.html", "--folds", "3", "--suspects", "s.csv",
        "--student", str(data / "student"), "--listed", "5",
    )  # fmt: skip
    assert len(learned) == 3, "what was trained once is not trained again"
    assert "checked by a network trained like it on the other 2 of 3 parts" in page
    with (tmp_path / "s.csv").open() as f:
        lines = list(csv.reader(f))
    wrong = set(np.array(ids)[suspects(p, train.labels()).rows])
    holdout = set(manifest.read(data / "holdout").table["id"].to_pylist())
    assert lines[0] == ["id", "action", "reason"]
    assert wrong <= {line[0] for line in lines[1:]} <= wrong | holdout
    for width in WIDTHS:
        with opened(browser, tmp_path / "p.html", width) as shown:
            assert not is_cut(shown)
            assert shown.locator("#disagreements ~ ol li").count() <= 5
            assert shown.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_the_page_does_not_grow_with_the_classes() -> None:
    ranks = [selection.Ranks(np.zeros(1, int), np.zeros(1, int), last) for last in np.linspace(-1, -2, 100)]
    ranks.append(selection.Ranks(np.zeros(0, int), np.zeros(0, int), float("nan")))
    assert gallery._shown(ranks, []) == list(range(60, 100)), "those whose last image is least sure"
    assert gallery._shown(ranks, [3, 100, 3]) == [3, 100]


def test_confident_learning_is_that_of_the_paper() -> None:
    """A naive reading of equations 1 and 2 on random probabilities."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    p = rng.dirichlet(np.ones(4), 200) * 0.5 + 0.5 * np.eye(4)[np.where(rng.random(200) < 0.2, rng.integers(0, 4, 200), labels)]
    usual = [np.mean([p[i, j] for i in range(200) if labels[i] == j]) for j in range(4)]
    expected = {}
    for i in range(200):
        counting = [j for j in range(4) if p[i, j] >= usual[j]]
        best = max(counting, key=lambda j: p[i, j], default=labels[i])
        if best != labels[i]:
            expected[i] = best
    found = suspects(p, labels)
    assert dict(zip(found.rows.tolist(), found.better.tolist(), strict=True)) == expected
    margins = p[found.rows, labels[found.rows]] - p[found.rows, found.better]
    assert len(expected) > 10
    assert (np.diff(margins) >= 0).all()


def test_a_class_without_labels_is_nobodys_better_class() -> None:
    assert len(suspects(np.array([[0.1, 0.2, 0.7], [0.3, 0.6, 0.1]]), np.array([0, 1])).rows) == 0


@pytest.mark.parametrize("n", [(3, 7), (20, 20)])
def test_parts_are_even_in_each_class(n: tuple[int, int]) -> None:
    labels = np.repeat([0, 1], n)
    part = parts(labels, 3)
    for c in (0, 1):
        assert np.ptp(np.bincount(part[labels == c], minlength=3)) <= 1


def test_divergence_is_that_of_the_formula() -> None:
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(5), (2, 20))
    lumped = [np.hstack([x[:, :3], x[:, 3:].sum(1, keepdims=True)]) for x in (p, q)]
    middle = sum(lumped) / 2
    expected = sum((x * np.log(x / middle)).sum(1) for x in lumped) / 2
    assert gallery.divergence(p[:, :3], q[:, :3]) == pytest.approx(expected)
    assert gallery.divergence(np.array([[1.0, 0]]), np.array([[0.0, 1]]))[0] == pytest.approx(np.log(2))
