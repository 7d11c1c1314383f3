"""The curves of trainings while they run: whose points are kept, and what DVC is told of them."""

import json
from pathlib import Path

import pytest
import yaml

from pipeline.harness import live
from pipeline.harness.journal import open_journal


def noted(folder: Path, entry: str, run: str, step: int, **values: float) -> None:
    curves = live.Curves(entry, run * 64, folder)
    curves.add(step, values)


def points(folder: Path, figure: str = "loss") -> list[tuple[str, int, float]]:
    return [(p["entry"], p["step"], p[figure]) for p in json.loads((folder / f"{figure}.json").read_text())]


def test_a_repeated_training_begins_its_curve_anew_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        noted(tmp_path, "distil.ssld", "a", step, loss=step / 10, lr=0.1)
    noted(tmp_path, "teach.teacher", "c", 5, loss=9.0)
    noted(tmp_path, "distil.ssld", "a", 20, loss=2.5)  # killed after step 30, and its checkpoint is of step 10
    assert points(tmp_path) == [("distil.ssld", 10, 1.0), ("teach.teacher", 5, 9.0), ("distil.ssld", 20, 2.5)]
    noted(tmp_path, "distil.ssld", "b", 15, loss=0.5)
    assert points(tmp_path) == [("teach.teacher", 5, 9.0), ("distil.ssld", 15, 0.5)]


def test_a_file_that_cannot_be_read_is_begun_anew(tmp_path: Path) -> None:
    for broken in ("<<<<<<< HEAD\n[]", "{}", '[{"step": 1}]'):
        (tmp_path / "loss.json").write_text(broken)
        noted(tmp_path, "distil.ssld", "a", 10, loss=1.0)
        assert points(tmp_path) == [("distil.ssld", 10, 1.0)]


def test_dvc_is_told_of_the_figures_that_are_there(tmp_path: Path) -> None:
    noted(tmp_path, "distil.ssld", "a", 10, loss=1.0, lr=0.1)
    noted(tmp_path, "pretrain.base", "a", 10, holdout_knn=0.5)
    plots = yaml.safe_load((tmp_path / "dvc.yaml").read_text())["plots"]
    assert [plot["y"] for declared in plots for plot in declared.values()] == [
        {"holdout_knn.json": "holdout_knn"},
        {"loss.json": "loss"},
    ]
    assert all((tmp_path / file).is_file() for declared in plots for plot in declared.values() for file in plot["y"])


def test_many_points_are_written_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "EVERY", 3600.0)
    curves = live.Curves("distil.ssld", "a" * 64, tmp_path)
    for step in range(1, 1001):
        curves.add(step, {"loss": 1 / step})
    assert points(tmp_path) == [("distil.ssld", 1, 1.0)]
    curves.write()
    assert points(tmp_path) == [("distil.ssld", step, 1 / step) for step in range(1, 1001)]


def test_a_disk_that_cannot_take_a_curve_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "live").write_text("not a folder")
    noted(tmp_path / "live", "distil.ssld", "a", 10, loss=1.0)


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
