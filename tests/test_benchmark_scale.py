"""The stages against the number of images: what is measured, what is kept, and the shards that are made of others."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import scale
from benchmarks.scale import Piece, Used
from pipeline.leaks import search
from pipeline.leaks.findings import FINDINGS, unverifiable_row
from pipeline.learning import labels
from pipeline.stages import pack
from pipeline.store import artifact, manifest, scores

IDS = pa.chunked_array([["p/2.jpg", "p/3.jpg"]], pa.large_string())


@pytest.mark.whole
@pytest.mark.timeout(900)
def test_stages_run_once_at_a_few_hundred_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("CLASSES", 4), ("LABELLED", 5), ("VAL", 2), ("DISTINCT", 64), ("MEMBERS", 128)):
        monkeypatch.setattr(scale, name, value)
    stages = ["--stages", "prepare", "search", "dedup", "select"]
    command = ["scale", "--images", "200", *stages, "--folder", str(tmp_path), "--out", str(tmp_path / "table.md")]
    monkeypatch.setattr(sys, "argv", command)
    scale.main()
    assert "200 select@top: left out, data/score/teacher is not there" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())["200"]
    assert set(rows) == {"prepare", "search", "dedup"}
    for row in rows.values():
        assert row["problem"] is None
        assert row["cpu"] > 0
        assert 0.01 < row["memory"] < 2  # GB
        assert row["written"] > 0
    assert len(manifest.read(tmp_path / "200" / "data" / "dedup" / "pool")) == 200
    assert (tmp_path / "table.md").read_text().count("| 200 |") == 3
    scale.main()
    assert json.loads((tmp_path / "results.json").read_text())["200"] == rows  # nothing ran again


def test_a_command_has_its_limit_and_its_problem(tmp_path: Path) -> None:
    assert scale.ran([sys.executable, "-c", "pass"], tmp_path, 60).problem is None
    slow = scale.ran([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, 0.1)
    assert slow.problem == "did not end in 0 s"
    assert slow.wall < 30
    assert scale.ran([sys.executable, "-c", "raise SystemExit('error: no')"], tmp_path, 60).problem == "error: no"


def test_every_piece_is_a_command_with_paths() -> None:
    assert len({piece.name for piece in scale.PIECES}) == len(scale.PIECES) >= 16
    cached = scale.Command(Piece("distil", "cached"))
    assert cached.line[1:4] == ["-m", "pipeline.stages.distil", "cached"]
    assert cached.inputs == ["data/dedup/train", "data/dedup/holdout", "data/scratch", "data/label/all", "data/dedup/pool"]
    assert cached.outs == ["data/distil/cached"]


def test_shards_of_the_same_images_get_their_own_ids_and_rows(tmp_path: Path) -> None:
    ids = pa.chunked_array([["p/0.jpg", "p/1.jpg"]], pa.large_string())
    later = {name: tmp_path / name / "000000000002" for name in scale.SHARDED}
    for name, sharded in scale.SHARDED.items():
        first = later[name].with_name("000000000000")
        with artifact.writing(first) as tmp:
            if name == "label":
                kept = labels.Kept(np.ones((1, 2, 1), np.uint16), np.zeros((1, 2, 1), np.float16), None)
                labels.write_part(tmp, ids, kept)
            elif name == "pack":
                columns = {name: [7, 7] for name in manifest.SCHEMA.names} | {"id": ids, "label": [None, None]}
                columns["path"] = [f"data/pack/all-tars/{first.name}/images-00000.tar"] * 2
                pq.write_table(pa.table(columns, schema=manifest.SCHEMA), tmp / pack.ROWS)
                (tmp / "images-00000.tar").write_bytes(b"tar")
            elif name == "search":
                rows = [{**unverifiable_row(1, "too few features"), "row": 1}]
                pq.write_table(pa.Table.from_pylist(rows, FINDINGS), tmp / search.ROWS)
            else:
                (tmp / scores.FILE).write_bytes(b"scores")
        sharded.again(first, later[name], 2, IDS)
        artifact.verify(later[name])
    assert pq.read_table(later["label"] / labels.FILE)["id"].to_pylist() == IDS.to_pylist()
    assert np.load(later["label"] / labels.CLASSES).tolist() == [[[1], [1]]]
    packed = pq.read_table(later["pack"] / pack.ROWS)
    assert packed["id"].to_pylist() == IDS.to_pylist()
    assert set(packed["path"].to_pylist()) == {"data/pack/all-tars/000000000002/images-00000.tar"}
    assert (later["pack"] / "images-00000.tar").read_bytes() == b"tar"
    assert pq.read_table(later["search"] / search.ROWS)["row"].to_pylist() == [3]
    assert (later["score"] / scores.FILE).read_bytes() == b"scores"


def test_what_was_seen_of_some_shards_stands_for_all(tmp_path: Path) -> None:
    """The start and the first shard take 5 s, each further one 2 s: 3 + 10 x 2 s, and 4 s for the command that finds them."""
    watch = scale.Watch(tmp_path, scale.SHARDED["pack"])
    watch.seen, watch.memory = [(1, 5.0, 10.0), (2, 7.1, 14.0), (3, 9.0, 18.0)], 0.5
    used = watch.extrapolated(Used(cpu=4.0, wall=8.0, memory=0.3, written=9), 10 * pack.SHARD)
    assert used.cpu == pytest.approx(3 + 10 * 2 + 4)
    assert used.wall == pytest.approx(6 + 10 * 4 + 8)
    assert used == replace(used, memory=0.5, written=9, done=3 * pack.SHARD, rest=4.0, problem=None)


STAGE = """
import pathlib, sys, time
here = pathlib.Path(".scratch/score.teacher/key")
here.mkdir(parents=True, exist_ok=True)
for first in range(0, 100, 10):
    if not (to := here / f"{first:012}").exists():
        time.sleep(0.15)
        to.mkdir()
        (to / "scores").write_text(str(first))
pathlib.Path("out").mkdir(exist_ok=True)
pathlib.Path("out/made").write_text(" ".join(file.read_text() for file in sorted(here.glob("*/scores"))))
"""


def test_some_shards_are_measured_and_the_rest_is_done_at_full_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = SimpleNamespace(line=[sys.executable, "-c", STAGE], outs=["out"])
    ids = pa.chunked_array([[str(i) for i in range(100)]], pa.large_string())
    monkeypatch.setattr(scale, "Command", lambda piece: command)
    monkeypatch.setattr(scale.manifest, "read", lambda folder: SimpleNamespace(table={"id": ids}))
    monkeypatch.setitem(scale.SHARDED, "score", scale.SHARDED["score"]._replace(size=10, whole=0))
    monkeypatch.setattr(scale, "POLL_SECONDS", 0.01)
    left = tmp_path / ".scratch" / "score.teacher" / "key" / "000000000050"  # by a command that was interrupted
    left.mkdir(parents=True)
    used = scale.measured(Piece("score", "teacher"), tmp_path, 100, 60)
    assert used.problem is None
    assert used.done == scale.SAMPLE * 10
    assert used.wall > 0.15 * 10
    made = (tmp_path / "out" / "made").read_text().split()
    assert made == ["0", "10", "20", *["0"] * 6, "90"]  # three were measured, the last one is the command's own
    assert used.written == sum(map(len, made)) + 9


def test_the_table_says_how_time_grows_and_what_is_extrapolated(tmp_path: Path) -> None:
    results, piece = scale.Results(tmp_path), Piece("score", "teacher")
    results.keep(1_000, piece, Used(10.0, 20.0, 0.5, 2_000_000))
    results.keep(4_000, piece, Used(40.0, 80.0, 1.5, 8_000_000, done=1_000, rest=7.0))
    results.keep(8_000, piece, Used(1.0, 60.0, 1.5, problem="did not end in 60 s"))
    assert results.has(1_000, piece)
    assert not results.has(8_000, piece)
    rows = [line for line in scale.table(scale.Results(tmp_path)).splitlines() if line.startswith("| `score")]
    assert rows == [
        "| `score@teacher` | 1,000 | 10.0 | 10,000.0 |  | 20 | 0.50 | 2.0 |  |",
        "| `score@teacher` | 4,000 | 40.0 | 10,000.0 | N^1.00 | 80 | 1.50 | 8.0 | "
        "extrapolated from 1,000 images; 7 s at full size |",
        "| `score@teacher` | 8,000 | | | | 60 | 1.50 | | did not end in 60 s |",
    ]


def test_the_pool_is_one_tar_under_many_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "DISTINCT", 4)
    monkeypatch.setattr(scale, "MEMBERS", 8)
    monkeypatch.setattr(scale, "CLASSES", 2)
    scale.draw(tmp_path, 20)
    files = sorted((tmp_path / "data" / "raw").glob("pool-*.tar"))
    assert [file.stat().st_ino == files[0].stat().st_ino for file in files] == [True, True, False]
