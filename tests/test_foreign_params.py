"""A params file that others wrote: nothing in it becomes a command, and no name in it leads out of its folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import dag
from pipeline.harness import stage
from pipeline.store import params

ROOT = Path(__file__).parent.parent
COMMANDS = ["x; touch F", "$(touch F)", "`touch F`", "x' ; touch F; '", 'x" ; touch F; "', "x\ntouch F", "x | touch F", "x\x00"]
PLACES = ["../x", "..", ".", "a/b", "/etc", "", "-rf", "--help", "~", "*", "a b", "é", "x" * 101, "x\n"]
GOOD = ["x", "ssld", "0", "a-b_c", "X" * 100]


def tree_with(key: Any = "x", **named: Any) -> dict[str, Any]:
    needed: dict[str, Any] = {name: {} for name in params.NEEDED}
    return needed | {"seed": 0, "prepare": {"root": "data/raw"}, "score": {key: {"teacher": "raw/model.th", **named}}}


@pytest.mark.parametrize("key", [*COMMANDS, *PLACES, 1, True, None, 1.5])
def test_a_key_that_is_no_name_is_refused(key: Any) -> None:
    (said,) = params.unsafe(tree_with(key))
    assert said.startswith("`score.")
    assert said.isprintable()
    assert len(said) < 250
    assert params.unsafe({"models": {key: {}}}) != []


@pytest.mark.parametrize("key", GOOD)
def test_a_name_is_taken(key: str) -> None:
    assert params.unsafe(tree_with(key)) == []


@pytest.mark.parametrize("path", [*COMMANDS, "../x", "teach/../../x", "/etc", "", "a//b", "a b", "x\n"])
def test_what_an_entry_names_lies_below_data(path: str) -> None:
    (said,) = params.unsafe(tree_with(teacher=path))
    assert "must be a path below data/" in said


@pytest.mark.parametrize("root", ["", " ", "a\nb", "a\x00"])
def test_a_root_that_is_no_path_is_refused(root: str) -> None:
    (said,) = params.unsafe({"prepare": {"root": root}})
    assert said.startswith("`prepare.root`")


def test_every_reader_refuses_it_before_it_does_anything(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(tree_with("../x")))
    with pytest.raises(params.ParamsError, match=r"`score\.\.\./x`"):
        params.load(file, stage.Machine, ("machine",))
    command = [sys.executable, "-m", "pipeline", "check", "--names", "--params", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "`score.../x`: a name has letters" in done.stderr


@pytest.mark.parametrize("change", ["seed=${oc.env:HOME}", "+prepare.root=${prepare.seed}"])
def test_a_change_for_one_run_reads_no_environment(change: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    with pytest.raises(dag.DVCError, match="nothing is put in for"):
        dag.override(tmp_path, [change])
    assert (tmp_path / "params.yaml").read_text() == "seed: 0\n"


@pytest.mark.whole
def test_dvc_repro_runs_nothing_that_a_params_file_holds(tmp_path: Path) -> None:
    """The real dvc.yaml, with names of which each would make a file; `python` only notes what it was given."""
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    hostile = [key for key in COMMANDS if "\n" not in key and "\x00" not in key]
    tree = tree_with(teacher="raw/$(touch F)") | {"draw": {key: {} for key in hostile}}
    tree["prepare"]["root"] = "data/$(touch F)`touch F`'\"; touch F; '\""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (tree["prepare"]["root"], "data/raw/$(touch F)", "data/remote"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" "$DVC_STAGE" >> {tmp_path}/given\nexit 1\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SHELL": "/bin/sh", "DVC_NO_ANALYTICS": "1"}

    def dvc(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "dvc", *args], cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert dvc("init", "-q", "--no-scm").returncode == 0
    done = dvc("repro", "--keep-going", "draw", "prepare")
    given = (tmp_path / "given").read_text()
    assert given.count("pipeline.stages.draw\n") == len(hostile), done.stderr
    assert given.count("pipeline.stages.prepare\n") == 1, done.stderr
    assert all(f"draw@{key}\n" in given for key in hostile)
    assert list(tmp_path.rglob("F")) == []
