"""The curves of trainings while they run: whose points are kept, and what DVC is told of them."""

import json
from pathlib import Path

import pytest
import yaml

from pipeline.harness import live
from pipeline.harness.journal import open_journal


def points(folder: Path, figure: str = "loss") -> list[tuple[str, int, float]]:
    return [(p["entry"], p["step"], p[figure]) for p in json.loads((folder / f"{figure}.json").read_text())]


def test_a_repeated_training_begins_its_curve_anew_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    for run, step in (("a" * 64, 10), ("a" * 64, 20), ("a" * 64, 30)):
        live.note("distil.ssld", run, step, {"loss": step / 10, "lr": 0.1}, tmp_path)
    live.note("teach.teacher", "c" * 64, 5, {"loss": 9.0}, tmp_path)
    live.note("distil.ssld", "a" * 64, 20, {"loss": 2.5}, tmp_path)  # killed after step 30, and its checkpoint is of step 10
    assert points(tmp_path) == [("distil.ssld", 10, 1.0), ("teach.teacher", 5, 9.0), ("distil.ssld", 20, 2.5)]
    live.note("distil.ssld", "b" * 64, 15, {"loss": 0.5}, tmp_path)
    assert points(tmp_path) == [("teach.teacher", 5, 9.0), ("distil.ssld", 15, 0.5)]


def test_a_file_that_cannot_be_read_is_begun_anew(tmp_path: Path) -> None:
    for broken in ("<<<<<<< HEAD\n[]", "{}", '[{"step": 1}]'):
        (tmp_path / "loss.json").write_text(broken)
        live.note("distil.ssld", "a" * 64, 10, {"loss": 1.0}, tmp_path)
        assert points(tmp_path) == [("distil.ssld", 10, 1.0)]


def test_dvc_is_told_of_the_figures_that_are_there(tmp_path: Path) -> None:
    live.note("distil.ssld", "a" * 64, 10, {"loss": 1.0, "lr": 0.1}, tmp_path)
    live.note("pretrain.base", "a" * 64, 10, {"holdout_knn": 0.5}, tmp_path)
    plots = yaml.safe_load((tmp_path / "dvc.yaml").read_text())["plots"]
    assert [plot["y"] for declared in plots for plot in declared.values()] == [
        {"holdout_knn.json": "holdout_knn"},
        {"loss.json": "loss"},
    ]
    assert all((tmp_path / file).is_file() for declared in plots for plot in declared.values() for file in plot["y"])


def test_a_journal_feeds_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.harness.journal.start_mirror", lambda folder: None)
    monkeypatch.delenv("WINNOW_TRACKING", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    record = {"stage": "distil", "entry": "ssld", "key": "k" * 64, "lineage": {}}
    with_journal = open_journal(record, Path(".scratch/journal"))
    with_journal.log(100, loss=1.5, holdout_top1=0.25)
    with_journal.log(seconds=3.0)
    with_journal.finish("FINISHED", {}, [])
    assert points(live.FOLDER) == [("distil.ssld", 100, 1.5)]
    assert points(live.FOLDER, "holdout_top1") == [("distil.ssld", 100, 0.25)]
