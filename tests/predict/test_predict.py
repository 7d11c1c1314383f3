"""`python -m pipeline predict`: the answers of `evaluate`, from every kind of source and model; bad pictures keep a row."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import csv

from pipeline.errors import UserError
from pipeline.harness.journal import Journal
from pipeline.models import inputs, network
from pipeline.predict import arguments, command, page, pictures
from pipeline.sources.source import SourceError
from pipeline.stages import evaluate, export
from pipeline.store import artifact, manifest
from pipeline.store.decode import decode
from tests.servers import Web, serving
from tests.tiny import CLASSES, MACHINE, encoded, folder_of, jpegs, picture, prepared, tar_of, taught

pytestmark = pytest.mark.whole
ROOT = Path(__file__).parents[2]
NAMES = tuple(CLASSES)


def made(stage: str, params: dict[str, Any], **of: Path) -> Any:
    """What `stage.main` records of a run, as far as `predict` reads it."""
    inputs_ = {name: {"path": str(path), "identity": artifact.identity(path), "key": None} for name, path in of.items()}
    return {"stage": stage, "params": params, "inputs": inputs_}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with a model, its evaluation and its export under data/."""
    root = tmp_path_factory.mktemp("world")
    prepare = prepared(root, CLASSES)
    data, model = root / "data", taught(prepare, root / "data" / "distil" / "ssld")
    sets = {name: prepare / name for name in ("train", "val", "holdout", "leaks")}
    other = taught(prepare, root / "data" / "distil" / "other", seed=1)
    for name, of in (("a-other", other), ("ssld", model)):
        token = artifact.provenance.set(made("evaluate", {}, model=of))
        section = evaluate.Evaluate.model_validate({"role": "candidate", "model": "-"})
        evaluate.run(section, **sets, model=of, out=data / "evaluate" / name, journal=Journal(), machine=MACHINE)
        artifact.provenance.reset(token)
    token = artifact.provenance.set(made("export", {"exit": None}, model=model))
    handed = export.Export(model="-", evaluation="-")
    places = {"evaluation": data / "evaluate" / "ssld", "val": prepare / "val", "out": data / "export" / "student"}
    export.run(handed, model=model, **places, machine=MACHINE)
    artifact.provenance.reset(token)
    return root


def predicted(model: Path, *images: Path | str, out: Path, **options: Any) -> list[dict[str, Any]]:
    """The rows of the table; raises what the command would tell."""
    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    command.run(parser.parse_args([str(model), *map(str, images), "--out", str(out), "--device", "cpu", *given]))
    return (csv.read_csv(out) if out.suffix == ".csv" else pq.read_table(out)).to_pylist()


def temperature_of(world: Path) -> float:
    found = json.loads((world / "data" / "evaluate" / "ssld" / "evaluation.json").read_text())["calibration"]["temperature"]
    assert abs(found - 1) > 0.05, "a test of calibration needs another temperature"
    return float(found)


def expected(world: Path, data: bytes, temperature: float = 1.0) -> np.ndarray:
    """(C,) probabilities of one image file, by the plain formula."""
    net, _, given = network.load(world / "data" / "distil" / "ssld", NAMES)
    canvas = torch.from_numpy(inputs.canvas(decode(data), given.side)).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = net.eval()(inputs.normalise(inputs.centre(canvas, given.size), given))[0].double()
    return np.asarray((logits / temperature).softmax(0))


@pytest.mark.parametrize("model", ["distil/ssld", "export/student", "export/student/model.onnx", "export/student/model.pt2"])
def test_val_gets_the_answers_of_evaluate(world: Path, tmp_path: Path, model: str) -> None:
    said = pq.read_table(world / "data" / "evaluate" / "ssld" / "predictions.parquet").to_pylist()
    temperature = temperature_of(world)
    rows = predicted(world / "data" / model, world / "val", out=tmp_path / "x.parquet")
    assert [row["id"] for row in rows] == [f"{world}/{row['id']}" for row in said]
    assert [row["class"] for row in rows] == [NAMES[row["predicted"]] for row in said]
    assert len({row["class"] for row in rows}) > 1
    for row in rows:
        p = expected(world, Path(row["id"]).read_bytes(), temperature)
        assert row["probability"] == pytest.approx(p.max(), abs=1e-4)
        ranked = np.argsort(-p)
        assert [row["class"], row["class_2"], row["class_3"]] == [NAMES[i] for i in ranked]
        assert [row["probability_2"], row["probability_3"]] == pytest.approx(p[ranked[1:]], abs=1e-4)
        assert row["error"] is None


def test_without_a_temperature_probabilities_are_those_of_evaluate(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "data" / "distil" / "ssld", tmp_path / "alone")
    said = pq.read_table(world / "data" / "evaluate" / "ssld" / "predictions.parquet")["confidence"].to_pylist()
    rows = predicted(tmp_path / "alone", world / "val", out=tmp_path / "x.csv")
    assert [row["probability"] for row in rows] == pytest.approx(said, abs=1e-6)


def test_the_temperature_is_found_named_or_refused(world: Path, tmp_path: Path) -> None:
    measured, model = world / "data" / "evaluate", world / "data" / "distil" / "ssld"
    image, out = world / "val" / "ant" / "0000.jpg", tmp_path / "x.csv"
    calibrated, plain = (expected(world, image.read_bytes(), t).max() for t in (temperature_of(world), 1.0))
    copy = shutil.copytree(model, tmp_path / "copy")
    assert predicted(copy, image, out=out)[0]["probability"] == pytest.approx(plain, abs=1e-5)
    assert predicted(copy, image, out=out, evaluation=measured / "ssld")[0]["probability"] == pytest.approx(calibrated, abs=1e-5)
    lone = tmp_path / "lone"
    lone.mkdir()
    for name in ("model.onnx", "model.json"):
        shutil.copy(world / "data" / "export" / "student" / name, lone)
    assert predicted(lone / "model.onnx", image, out=out)[0]["probability"] == pytest.approx(plain, abs=1e-4)
    (lone / "calibration.json").write_text('{"temperature": 0}')
    with pytest.raises(UserError, match=r"calibration\.json: the temperature is 0\.0, and must be above 0"):
        predicted(lone / "model.onnx", image, out=out)
    with pytest.raises(UserError, match=r"a-other measured .*distil/other, not .*copy: its figures are of another model"):
        predicted(copy, image, out=out, evaluation=measured / "a-other")
    (lone / "model.json").unlink()
    with pytest.raises(UserError, match=r"model\.onnx stands alone: model\.json"):
        predicted(lone / "model.onnx", image, out=out)


def test_the_example_that_is_handed_over_is_calibrated_too(world: Path) -> None:
    image = world / "val" / "ant" / "0000.jpg"
    folder = world / "data" / "export" / "student"
    done = subprocess.run([sys.executable, folder / "example.py", image], capture_output=True, text=True, timeout=60, check=True)
    p = expected(world, image.read_bytes(), temperature_of(world))
    assert float(done.stdout.split("\t")[2]) == pytest.approx(p.max(), abs=1e-4)
    assert (
        f"Divided by the temperature {temperature_of(world):.4g}, fitted on 6 held-out images"
        in (folder / "README.md").read_text()
    )


FILES = {"a/0.jpg": b"", "b.png": encoded(picture(2, (50, 30)), "PNG"), "notes.txt": b"no image"} | {
    f"c/{name}": data for name, data in jpegs({"x": 40}, 20).items()
}
FILES["c/x/0003.jpg"] = FILES["c/x/0003.jpg"][:-60]
BAD = {"a/0.jpg": "empty file", "notes.txt": "not an image", "c/x/0003.jpg": "damaged: "}


def test_every_kind_of_source_gives_the_same_rows_and_loses_no_picture(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = world / "data" / "distil" / "ssld"
    folder = folder_of(Path("photos"), FILES)
    names = sorted(FILES)
    tar_of(Path("photos.tar"), {name: FILES[name] for name in names})
    cells = pa.array([{"bytes": FILES[name], "path": name} for name in names])
    pq.write_table(pa.table({"picture": cells}), "photos.parquet", row_group_size=10)
    Path("photos.lst").write_text("\n".join(f"photos/{name}" for name in names) + "\n")
    ways: dict[str, tuple[list[Any], list[str]]] = {
        "folder": ([folder], [f"photos/{name}" for name in names]),
        "tar": ([Path("photos.tar")], [f"photos.tar/{name}" for name in names]),
        "parquet": ([Path("photos.parquet")], [f"photos.parquet/{i:08}" for i in range(len(names))]),
        "list": ([Path("photos.lst")], [f"photos/{name}" for name in names]),
        "files": ([folder / n for n in names if n != "notes.txt"], [f"photos/{n}" for n in names if n != "notes.txt"]),
    }
    stored = {
        file.name: file.read_bytes()
        for file in (Path("photos.tar"), Path("photos.parquet"), Path("photos.lst"), folder / "b.png")
    }
    with serving(Web(stored)) as at:
        far = [f"{at}/{name}" for name in ("photos.tar", "photos.parquet", "b.png")]
        ids = [*(f"{far[0]}/{name}" for name in names), *(f"{far[1]}/{i:08}" for i in range(len(names))), far[2]]
        ways["addresses"] = far, ids
        tables = {}
        for kind, (given, ids) in ways.items():
            rows = predicted(model, *given, out=tmp_path / f"{kind}.parquet", image="picture", batch=64, workers=3)
            assert [row["id"] for row in rows] == ids
            tables[kind] = [{k: v for k, v in row.items() if k != "id"} for row in rows]
        with pytest.raises(SourceError, match="a list of paths is read from a disk"):
            predicted(model, f"{at}/photos.lst", out=tmp_path / "list.parquet")
    assert tables["folder"] == tables["tar"] == tables["parquet"] == tables["list"]
    assert tables["addresses"] == [*tables["folder"], *tables["folder"], tables["folder"][names.index("b.png")]]
    for name, row in zip(names, tables["folder"], strict=True):
        assert (row["error"] or "").startswith(BAD.get(name, "")), name
        assert (row["error"] is None) == (name not in BAD)
        assert [row[column] for column in ("class", "probability", "class_3")] == [None] * 3 or name not in BAD
        if name not in BAD:
            p = expected(world, FILES[name], temperature_of(world))
            assert (row["class"], row["probability"]) == (NAMES[p.argmax()], pytest.approx(p.max(), abs=1e-5)), name
    both = predicted(model, *ways["folder"][0], *ways["tar"][0], out=tmp_path / "both.csv")
    assert [row["id"] for row in both] == ways["folder"][1] + ways["tar"][1]


def test_what_a_list_names_wrongly_keeps_a_row(world: Path, tmp_path: Path) -> None:
    good = world / "val" / "ant" / "0000.jpg"
    (tmp_path / "list.txt").write_text(f"{tmp_path}\n{good}\r\n{tmp_path}/gone.jpg\n\n")
    rows = predicted(world / "data" / "distil" / "ssld", tmp_path / "list.txt", out=tmp_path / "x.csv")
    assert [(row["id"], row["error"]) for row in rows] == [
        (str(tmp_path), "not a regular file"),
        (str(good), ""),
        (f"{tmp_path}/gone.jpg", "not there"),
    ]


def test_a_file_that_goes_while_it_waits_is_a_row(world: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", {"a.jpg": FILES["c/x/0001.jpg"], "b.jpg": FILES["c/x/0002.jpg"]})
    lots = pictures.lots([str(folder)], "image")
    (folder / "a.jpg").unlink()
    (loaded,) = pictures.loaded(lots, 16, 1, thumbnails=False)
    assert [error and re.sub(r".*/", "", error) for error in loaded.errors] == [
        "a.jpg cannot be opened (No such file or directory). Images are read from it.",
        None,
    ]


def test_pictures_are_loaded_a_few_chunks_ahead_and_no_more() -> None:
    taken: list[int] = []

    def items() -> Any:
        for i in range(1000):
            taken.append(i)
            yield i

    results = inputs.ahead(lambda i: 2 * i, items(), threads=2)
    assert [next(results) for _ in range(3)] == [0, 2, 4]
    assert len(taken) <= 3 + 5
    assert list(results) == [2 * i for i in range(3, 1000)]


def test_the_page_shows_the_least_sure_first_and_holds_no_more_than_asked(world: Path, tmp_path: Path) -> None:
    rows = predicted(
        world / "data" / "distil" / "ssld", world / "pool", folder_of(tmp_path / "<b>", {"x.jpg": b""}),
        out=tmp_path / "x.parquet", page=tmp_path / "page.html", shown=7, batch=4,
    )  # fmt: skip
    text = (tmp_path / "page.html").read_text()
    least = sorted((row for row in rows if row["error"] is None), key=lambda row: row["probability"])[:7]
    assert re.findall(r'<p class="id">(.*)</p>', text) == [row["id"] for row in least]
    shares = re.findall(r"<dt>(\w+)</dt><dd>([\d.]+) %</dd>", text)[::3]
    assert shares == [(row["class"], f"{100 * row['probability']:.1f}") for row in least]
    assert text.count("data:image/webp;base64,") == 7
    assert "1 × empty file." in text
    assert not re.search(r"""(src|href)=["']?(?!["']?data:)|url\(|@import""", text), "the page loads nothing"
    assert f"calibrated at temperature {temperature_of(world):.4g}" in text


def test_the_least_sure_are_kept_whatever_the_order() -> None:
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(4), 300)
    p[100:120] = p[0]  # ties: the first stay
    kept = page.LeastSure(50)
    for rows in np.array_split(np.arange(300), 17):
        part = p[rows]
        shown = [np.full((2, 3, 3), 7, np.uint8)] * len(rows)
        kept.add([f"{i:03}" for i in rows], shown, part, np.argsort(-part, 1, kind="stable"), "abcd")
    wanted = sorted(range(300), key=lambda i: (p[i].max(), i))[:50]
    assert [doubt.id for doubt in kept.sorted()] == [f"{i:03}" for i in wanted]
    assert all(doubt.answers[0] == ("abcd"[p[int(doubt.id)].argmax()], p[int(doubt.id)].max()) for doubt in kept.sorted())


def called(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command_ = [sys.executable, "-m", "pipeline", "predict", *map(str, args)]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command_, capture_output=True, text=True, cwd=cwd, env=env, timeout=120)


def test_skips_are_reported_with_exit_code_0_and_misuse_with_2(world: Path, tmp_path: Path) -> None:
    folder_of(tmp_path / "photos", {name: FILES[name] for name in ("b.png", "notes.txt", "a/0.jpg")})
    model = world / "data" / "distil" / "ssld"
    done = called(model, "photos", "--out", "new/x.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "predict: 1 of 3 pictures classified" in done.stderr
    assert "2 skipped (1 x empty file, 1 x not an image; see the column `error`)" in done.stderr
    assert f"calibrated at temperature {temperature_of(world):.4g} ({world}/data/evaluate/ssld)" in done.stderr
    assert (tmp_path / "new" / "x.csv").read_text().splitlines()[0] == (
        '"id","class","probability","class_2","probability_2","class_3","probability_3","error"'
    )
    wrong = called(model, "photos", "--out", "x.txt", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: --out x.txt: the name must end in .csv or .parquet, which says what is written.\n",
    )
    assert called(model, "photos", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize(
    ("model", "images", "options", "message"),
    [
        ("gone", "val", {}, r"gone is not there\. Name a model directory"),
        ("../val/ant/0000.jpg", "val", {}, r"0000\.jpg is no model"),
        ("export/student/model.onnx", "val", {"exit": 1}, r"for --exit or --device name a model directory"),
        ("distil/ssld", "val", {"exit": 1}, r"`exit` is 1, but .*ssld has no exits"),
        ("distil/ssld", "gone", {}, r"gone is not there\. Expected: a folder of images"),
        ("distil/ssld", "empty", {}, r"there is no picture in .*empty"),
        ("distil/ssld", "x.tar.gz", {}, r"x\.tar\.gz is compressed \(gzip\)"),
        ("distil/ssld", "x.parquet", {}, r"x\.parquet has no column `image`; it has a\. Name the right one: `--image <column>`"),
        ("distil/ssld", "bad.parquet", {}, r"^\S*bad\.parquet cannot be read as Parquet"),
    ],
)
def test_what_cannot_be_used_is_said(
    world: Path, tmp_path: Path, model: str, images: str, options: dict[str, Any], message: str
) -> None:
    (world / "empty").mkdir(exist_ok=True)
    (world / "x.tar.gz").write_bytes(b"\x1f\x8b" + b"0" * 600)
    (world / "bad.parquet").write_bytes(b"no table")
    pq.write_table(pa.table({"a": [1]}), world / "x.parquet")
    (world / "file").touch()
    with pytest.raises(UserError, match=r"--out .*file/x\.csv: .*file is no folder that you can write to"):
        predicted(world / "data" / "distil" / "ssld", world / "val", out=world / "file" / "x.csv")
    with pytest.raises((UserError, SourceError), match=message):
        predicted(world / "data" / model, world / images, out=tmp_path / "x.csv", **options)
    assert not list(tmp_path.iterdir())


def test_manifests_of_val_are_what_was_predicted(world: Path) -> None:
    """The ids above are those of the manifest, below the folder that was given."""
    assert manifest.read(world / "data" / "prepare" / "val").table["id"][0].as_py() == "val/ant/0000.jpg"
