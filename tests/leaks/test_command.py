"""The leak check alone: the findings of the two stages, from every kind of source, with an exit code, without torch and DVC."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.leaks import __main__ as command
from pipeline.store import artifact
from tests.leaks.bench import COPY, DOUBTFUL, ORIGINALS, OTHERS, PLAIN, Bench, png
from tests.servers import Web, serving
from tests.tiny import folder_of, tar_of

ROOT = Path(__file__).parents[2]
FIRST = {name: ORIGINALS[name] for name in ("v0", "v2")}
CANDIDATES = {**OTHERS, **COPY, **DOUBTFUL, "plain": PLAIN}


def files(images: Mapping[str, Any]) -> dict[str, bytes]:
    return {f"{name}.png": png(image) for name, image in images.items()}


def check(*given: Path | str, **options: Any) -> int:
    """How many candidates would go."""
    said = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return command.run(command._parsed([*map(str, given), "--workers", "1", *said]))


def test_the_findings_are_those_of_the_two_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    val, pool = ({f"{name}.png": image for name, image in images.items()} for images in (ORIGINALS, CANDIDATES))
    work = Bench(tmp_path / "stages", pool=pool, val=val)
    work.run()
    reference, candidates = folder_of(tmp_path / "a", files(ORIGINALS)), folder_of(tmp_path / "b", files(CANDIDATES))
    going = check(reference, candidates, out=tmp_path / "out")
    assert pq.read_table(artifact.verify(tmp_path / "out") / "leaks.parquet").to_pylist() == work.audit()
    gone = set(CANDIDATES) - {name.removesuffix(".png") for name in work.kept()}
    assert going == len(gone) == 2
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["copy"], summary["review"], summary["unverifiable"], summary["going"]) == (2, 1, 1, 2)
    page = (tmp_path / "out" / "index.html").read_text() + (tmp_path / "out" / "findings.js").read_text()
    assert "copy of v0.png" in page
    assert "give --overrides that file" in page
    assert "dvc repro" not in page
    said = capsys.readouterr().out
    for line in (f"{len(CANDIDATES)} candidates", "2  copies", "1  for review"):
        assert line in said
    assert "copy of v2.png shows v2.png" in said


def test_every_kind_of_source_and_a_pattern(tmp_path: Path) -> None:
    sides = {"ref": files(FIRST), "cand": files({**COPY, "p0": OTHERS["p0"]})}
    ways = []
    for kind in ("folder", "tar", "parquet", "pattern"):
        paths = []
        for side, images in sides.items():
            at = tmp_path / kind / side
            at.mkdir(parents=True)
            if kind == "folder":
                paths.append(folder_of(at, images))
            elif kind == "tar":
                paths.append(tar_of(at / "x.tar", images))
            elif kind == "parquet":
                pq.write_table(pa.table({"picture": [{"bytes": data} for data in images.values()]}), at / "x.parquet")
                paths.append(at / "x.parquet")
            else:
                for i, (name, data) in enumerate(images.items()):
                    tar_of(at / f"{i}.tar", {name: data})
                paths.append(at / "*.tar")
        ways.append(paths)
    with serving(Web({f"{side}.tar": (tmp_path / "tar" / side / "x.tar").read_bytes() for side in sides})) as address:
        assert check(*(f"{address}/{side}.tar" for side in sides)) == 2
    assert [check(*paths, image="picture") for paths in ways] == [2] * 4


def test_what_counts_as_a_copy_is_chosen(tmp_path: Path) -> None:
    reference = folder_of(tmp_path / "a", files(ORIGINALS))
    doubtful = folder_of(tmp_path / "b", files(DOUBTFUL))
    copy = folder_of(tmp_path / "c", files({"x": COPY["copy of v0"]}))
    assert check(reference, doubtful) == 0
    assert check(reference, doubtful, review="remove") == 1
    assert check(reference, copy) == 1
    (tmp_path / "o.csv").write_text("id,action,reason\nx.png,keep,known\n")
    assert check(reference, copy, overrides=tmp_path / "o.csv") == 0


def test_what_is_there_is_not_replaced_unless_it_is_ours(tmp_path: Path) -> None:
    reference, clean = folder_of(tmp_path / "a", files(FIRST)), folder_of(tmp_path / "b", files(OTHERS))
    mine = folder_of(tmp_path / "mine", {"thesis.tex": b"x"})
    with pytest.raises(UserError, match=r"mine is there, and was not written by a leak check"):
        check(reference, clean, out=mine)
    assert (mine / "thesis.tex").exists()
    (tmp_path / "out").mkdir()
    assert [check(reference, clean, out=tmp_path / "out") for _ in range(2)] == [0, 0]


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "timm", "dvc", "prefect", "mlflow", "onnx", "onnxruntime", "matplotlib", "duckdb", "rich"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from pipeline.leaks.__main__ import main
main()
"""  # noqa: E501


def called(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """In a process in which nothing of the extra `train` can be imported."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *map(str, args), "--workers", "1"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip


def test_it_runs_without_torch_and_dvc_and_says_by_its_exit_code_what_was_found(tmp_path: Path) -> None:
    reference = folder_of(tmp_path / "a", files(FIRST))
    leaking = folder_of(tmp_path / "b", files({"x": COPY["copy of v2"], **OTHERS}) | {"bad.png": b"no image"})
    clean = folder_of(tmp_path / "c", files(OTHERS))
    found, nothing = called(reference, leaking, "--out", tmp_path / "out"), called(reference, clean)
    assert (found.returncode, nothing.returncode) == (1, 0), found.stderr + nothing.stderr
    assert "x.png shows v2.png" in found.stdout
    assert "1  of candidates not checked: not an image" in found.stdout
    assert "1 candidates leak." in found.stdout
    assert nothing.stdout.endswith("No candidate leaks.\n")


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ("gone", r"gone is not there\. Expected: a folder"),
        ("*.tar", r"\*\.tar is not there"),
        ("one.png", r"one\.png is neither a folder nor a tar nor a Parquet table"),
        ("empty", r"empty has no readable image: it holds no files"),
        ("bad", r"bad has no readable image: 1 x not an image"),
        ("x.tar.gz", r"x\.tar\.gz is compressed \(gzip\)"),
        ("x.parquet", r"x\.parquet has no column `image`; it has a\. Name the right one: `--image <column>`"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path: Path, candidates: str, message: str) -> None:
    folder_of(tmp_path, {"one.png": png(PLAIN), "bad/x.png": b"no image", "x.tar.gz": b"\x1f\x8b" + b"0" * 600})
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    reference = folder_of(tmp_path / "a", files({"v0": ORIGINALS["v0"]}))
    with pytest.raises(UserError, match=message):
        check(reference, tmp_path / candidates)


def test_misuse_and_defects_have_exit_codes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def code(*argv: str | Path) -> Any:
        monkeypatch.setattr(sys, "argv", ["winnow-leaks", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            command.main()
        return end.value.code

    assert code(tmp_path / "a", tmp_path / "b") == 2
    assert "a is not there" in capsys.readouterr().err
    assert code(tmp_path / "a") == 2
    monkeypatch.setattr(command, "run", lambda args: 1 / 0)
    assert code("a", "b") == 3
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_distribution_without_extras_has_what_the_leak_check_imports() -> None:
    """And nothing of the extra `train`: the lock of `make` names both."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base, train = (
        {re.split(r"[<>=; ]", line)[0] for line in lines}
        for lines in (project["dependencies"], project["optional-dependencies"]["train"])
    )
    assert not base & train
    assert {"torch", "dvc", "prefect", "mlflow"} <= train
    locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    assert base | train <= locked
    module, _, function = project["scripts"]["winnow-leaks"].partition(":")
    assert module == command.__name__
    assert callable(getattr(command, function))
