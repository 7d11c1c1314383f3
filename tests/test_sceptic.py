"""The sceptic's curve: which validation images had a leak, and the accuracies of both groups."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import sceptic


def run_folder(folder: Path, predicted: list[int]) -> Path:
    """Four validation images of class 0; `a` has two copies in the pool, `b` a doubtful one and one in the labelled set."""
    audit = {
        "relation": ["pool-val", "pool-val", "pool-val", "train-val", "pool-val"],
        "outcome": ["copy", "copy", "review", "copy", "by hand"],
        "match_id": ["a", "a", "b", "b", None],  # the last was removed by hand
    }
    predictions = {"id": list("abcd"), "label": [0] * 4, "predicted": predicted}
    for name, table in (("dedup/leaks/leaks", audit), ("evaluate/ssld/predictions", predictions)):
        file = folder / "data" / f"{name}.parquet"
        file.parent.mkdir(parents=True)
        pq.write_table(pa.table(table), file)
    (folder / "data" / "dedup" / "metrics.json").write_text(json.dumps({"kept": 1234}))
    return folder


def test_accuracies_of_images_with_and_without_a_leak(tmp_path: Path):
    folder = run_folder(tmp_path, [0, 0, 1, 1])
    leaked = sceptic.with_a_leak(folder)
    assert leaked.to_pylist() == ["a"]
    point = sceptic.measured(folder, "ssld", leaked)
    assert point.kept == 1234
    assert {name: round(value, 1) for name, value in point.top1.items()} == {"all": 50.0, "with a leak": 100.0, "without": 33.3}


def test_a_row_per_strictness_with_the_spread_over_seeds(tmp_path: Path):
    points = {(level, seed): sceptic.Point(10, {"all": 50.0 + 2 * seed}) for level in sceptic.LEVELS for seed in (0, 1)}
    lines = sceptic.table(points, [0, 1]).splitlines()
    assert lines[2:] == [f"| {level} | 10 | 51.0 ± 1.4 |" for level in ("none", "leaks", "near", "nearer")]
    sceptic.plot(points, [0, 1], "title", tmp_path / "plot.svg")
    assert "<!-- nearer -->" in (tmp_path / "plot.svg").read_text()
