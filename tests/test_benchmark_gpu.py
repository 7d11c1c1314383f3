"""The figures that need a GPU: every piece on next to nothing, without winnow's larger packages; what is kept, and skipped."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cifar, learning, report, setting, speed, synthetic
from pipeline.errors import UserError
from pipeline.models import architectures
from tests.tiny import encoded, picture, tar_of

ROOT = Path(__file__).parent.parent
NOT_THERE = (
    *("dvc", "prefect", "mlflow", "faiss", "duckdb", "dask", "distributed", "onnx", "onnxscript", "onnxruntime", "threadpoolctl"),
    *("fastapi", "jinja2", "matplotlib", "rich", "pytest", "sklearn"),
)
"""What a bare machine lacks: winnow's packages but for those that the command says it needs."""


def data_in(folder: Path) -> Path:
    for name, seeds in (("cifar10-train-00.tar", (0, 1)), ("cifar10-train-01.tar", (2, 3)), ("cifar10-val-00.tar", (4, 5))):
        files = {f"{kind}/{seed:04}.png": encoded(picture(10 * seed + i), "PNG") for i, kind in enumerate("ab") for seed in seeds}
        tar_of(folder / name, files)
    (folder / "teachers").mkdir()
    torch.save(architectures.create("resnet56", 2).state_dict(), folder / "teachers" / "cifar10-resnet56-0.th")
    return folder


def run(*args: object, without: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, filter(None, (without, ROOT))))
    line = [sys.executable, "-m", "benchmarks.gpu", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.whole
@pytest.mark.timeout(900)  # seconds; a minute on two idle cores
def test_every_piece_runs_on_a_bare_machine_once(tmp_path: Path) -> None:
    bare = tmp_path / "bare" / "sitecustomize.py"  # read by the processes that the command starts, too
    bare.parent.mkdir()
    bare.write_text(f"import sys\nsys.modules.update(dict.fromkeys({NOT_THERE}))\n")
    args = ("--out", tmp_path / "rows", "--device", "cpu", "--tiny", "--data", data_in(tmp_path / "data"))
    done = run(*args, without=bare.parent)
    assert done.returncode == 0, done.stderr
    found = {name: json.loads((tmp_path / "rows" / f"{name}.json").read_text()) for name in command.PIECES}
    assert {p.name for p in (tmp_path / "rows").glob("*.json")} == {f"{name}.json" for name in command.PIECES}
    assert [row["same loss"] for row in found["processes"]["rows"]] == ["yes", "yes"]
    (resumed,) = found["resume"]["rows"]
    assert resumed["resumed"] == "the same bits"
    assert 0 < resumed["killed after the checkpoint of step"] < resumed["steps"]
    for row in found["scoring"]["rows"]:
        assert row["ours / bare, compiled, %"] == pytest.approx(row["ours, images/s"] / row["bare, compiled, images/s"], rel=1e-6)
    assert [len(row["loss, ten times"]) for row in found["large-batch"]["rows"]] == [8] * 6  # of 16 steps two a time, of 8 one
    assert [(row["labels"], row["images"]) for row in found["cifar"]["rows"]] == [(8, "png")] * 4
    assert [row["network"] for row in found["cifar"]["rows"]] == list(cifar.PLANS)
    assert found["cifar"]["rows"][1]["parameters"] == 1_467_610 - 8 * 129  # two classes instead of ten
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").rglob("*.json")}
    assert run(*args).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").rglob("*.json")} == written  # a finished piece is not made again
    shown = run("report", "--out", tmp_path / "rows").stdout
    assert all(f"### {name}\n" in shown for name in command.PIECES)
    assert f"torch {torch.__version__}" in shown


def given(out: Path, **changes: object) -> setting.Setting:
    return replace(setting.begin(out, "cpu", 9, True, None, "abc"), **changes)  # type: ignore[arg-type]


def test_a_row_that_fails_is_tried_again_and_the_others_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[str] = []

    def row(name: str, broken: bool = False) -> Callable[[Path], setting.Row]:
        def make(folder: Path) -> setting.Row:
            made.append(name)
            if broken:
                raise RuntimeError("no such kernel")
            return {"network": name}

        return make

    assert not setting.finish("piece", {"a": row("a"), "b": row("b", broken=True), "c": row("c")}, given(tmp_path), True)
    assert "no such kernel" in capsys.readouterr().err
    assert "| a | " in report.text(tmp_path, ["piece"])  # what is there is shown
    assert not (tmp_path / "piece.json").exists()
    rows = {"a": row("a"), "b": row("b"), "c": row("c")}
    assert setting.finish("piece", rows, given(tmp_path), True)
    assert setting.finish("piece", rows, given(tmp_path), True)
    assert made == ["a", "b", "c", "b"]
    assert [r["network"] for r in json.loads((tmp_path / "piece.json").read_text())["rows"]] == ["a", "b", "c"]
    assert not (tmp_path / "work" / "piece").exists()


@pytest.mark.parametrize(("long", "left", "begun"), [(True, 0.3, []), (True, 0.4, ["a"]), (False, 0.3, ["a"]), (False, -0.1, [])])
def test_no_row_begins_that_may_not_come_to_its_end(tmp_path: Path, long: bool, left: float, begun: list[str]) -> None:
    seen: list[str] = []

    def make(folder: Path) -> setting.Row:
        seen.append("a")
        return {}

    late = given(tmp_path, began=time.monotonic() - 540 * (1 - left))
    assert setting.finish("piece", {"a": make}, late, long) == bool(begun)
    assert seen == begun


def test_figures_of_another_device_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "scoring.json").write_text(json.dumps({"device": "another", "tiny": True}))
    with pytest.raises(UserError, match=r"measured on another \(tiny\).* another folder"):
        setting.finish("training", {}, given(tmp_path), True)


def test_a_training_out_of_time_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setting, "CHECKPOINT_MINUTES", 1e-9)
    steps: list[int] = []

    class Short(setting.Setting):
        def go_on(self) -> None:
            steps.append(1)
            if len(steps) == 6:
                raise setting.OutOfTime

    it = given(tmp_path)
    short = Short(**{name: getattr(it, name) for name in it.__dataclass_fields__})
    (name, make), *_ = learning.large_batch(short).items()
    assert not setting.finish("large-batch", {name: make}, short, False)
    assert setting.finish("large-batch", {name: make}, short, False)
    assert len(steps) == 6 + 11  # of 16 steps five were done when the time was over
    (row,) = json.loads((tmp_path / "large-batch.json").read_text())["rows"]
    alone = learning.large_batch(it)[name](tmp_path / "alone")
    assert row["loss, ten times"] == alone["loss, ten times"]


def test_the_bare_step_gets_its_turns_between_whole_rounds(tmp_path: Path) -> None:
    log: list[str] = []
    turns = speed.Turns(given(tmp_path), 3, 2, lambda: log.append("bare"))
    for _ in range(turns.steps):
        turns.next()
        log.append("step")
        time.sleep(0.02)
    rounds, one = turns.SETTLE + 3, ["step"] * (turns.SETTLE + 3)
    assert log == ["step"] * (turns.WARM + rounds) + ["bare", *one, "bare", "step"]
    assert len(turns.ours) == len(turns.bare) == 2
    assert turns.ours == pytest.approx([0.06, 0.06], abs=0.03)  # three steps, not those that settle


def test_a_network_that_cannot_be_compiled_is_taken_as_it_is_and_the_reason_kept(tmp_path: Path) -> None:
    def no_compiler(model: torch.nn.Module) -> None:
        raise RuntimeError("no C compiler\nand more")

    model = torch.nn.Linear(2, 2)
    assert setting.translated(model, given(tmp_path), no_compiler) == (model, "not compiled: RuntimeError: no C compiler")


def test_what_is_to_be_learned_can_be_learned_in_part() -> None:
    """By the nearest class mean, which knows nothing of the patterns."""
    (x, y), (seen, wanted) = (synthetic.learnable(2000, seed) for seed in (1, 2))
    means = np.stack([x[y == c].mean(0, dtype=np.float64).ravel() for c in range(10)])
    far = ((seen.reshape(2000, -1)[:, None, ::7] - means[None, :, ::7]) ** 2).sum(2)
    assert 0.6 < (far.argmin(1) == wanted).mean() < 0.97


def test_photographs_are_packed_as_the_stage_packs(tmp_path: Path) -> None:
    images = synthetic.packed(tmp_path, 6, (60, 48), 32)
    assert len(images) == 6
    assert set(images.table["height"].to_pylist()) == {32}
    assert all(Path(path).suffix == ".tar" for path in images.table["path"].to_pylist())


def test_real_images_are_read_and_drawn(tmp_path: Path) -> None:
    images = cifar.read(data_in(tmp_path), cifar.TARS["train"])
    assert (images.classes, images.labels.tolist(), images.kind) == (("a", "b"), [0] * 4 + [1] * 4, "png")
    assert np.array_equal(images.pixels[5], picture(11))  # b/0001
    few = cifar.drawn(images, 2, 0)
    assert np.bincount(few.labels).tolist() == [2, 2]
    with pytest.raises(UserError, match="class a has 4 images, and 5"):
        cifar.drawn(images, 5, 0)
    tar_of(tmp_path / "cifar10-val-01.tar", {"a/x/1.png": encoded(picture(0), "PNG")})
    with pytest.raises(UserError, match="members must be <class>/<file>"):
        cifar.read(tmp_path, cifar.TARS["val"])


def test_without_its_teacher_the_distilled_rows_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_in(tmp_path)
    every = cifar.cifar(given(tmp_path, data=data))
    (data / "teachers" / "cifar10-resnet56-0.th").unlink()
    some = cifar.cifar(given(tmp_path, data=data))
    assert every is not None
    assert some is not None
    assert every.keys() - some.keys() == {"resnet20-all-labels-distilled-0"}
    assert "teachers/cifar10-resnet56-*.th" in capsys.readouterr().err


def test_without_images_the_piece_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cifar.cifar(given(tmp_path)) is None
    assert "--data FOLDER with cifar10-train-*.tar" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"has no cifar10-train-.*benchmarks.data cifar10"):
        cifar.cifar(given(tmp_path, data=tmp_path))


def test_figures_are_printed_as_their_heading_says() -> None:
    row = {
        "network": "x",
        "top-1 %": 0.9376,
        "images/s": 12345.6,
        "gap": 0.00012345,
        "loss": [2.5, 0.25],
        "steps": 1500,
        "no": None,
    }
    assert report.table([row, {"network": "y"}]).splitlines() == [
        "| network | top-1 % | images/s | gap | loss | steps |",
        "| --- | --- | --- | --- | --- | --- |",
        "| x | 93.76 | 12,346 | 0.000123 | 2.500 / 0.250 | 1,500 |",
        "| y |  |  |  |  |  |",
    ]
