"""dvc.yaml says what the code does: its deps are the import graph, its arguments are `run`'s, its params are read."""

import importlib
import inspect
import re
import subprocess
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from pipeline.harness.stage import is_out
from pipeline.store import params
from tests.deps import deps

ROOT = Path(__file__).parent.parent
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
STAGES = {name: body.get("do", body) for name, body in DVC.items()}


def test_every_stage_has_its_module_and_every_module_its_stage() -> None:
    assert set(STAGES) == set(params.STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_deps_name_the_code_that_the_stage_imports(stage: str) -> None:
    listed = [dep for dep in STAGES[stage]["deps"] if dep.startswith("pipeline/") and not dep.endswith(".jinja")]
    wanted = deps(stage)
    paste = "\n".join(f"        - {dep}" for dep in wanted)
    assert listed == wanted, f"the deps of {stage} in dvc.yaml are to be as `make deps` writes them:\n{paste}"


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_gives_run_its_paths_and_dvc_knows_each(stage: str) -> None:
    command = STAGES[stage]["cmd"]
    run = importlib.import_module(f"pipeline.stages.{stage}").run
    hints = get_type_hints(run)
    wanted = {n for n in inspect.signature(run).parameters if hints[n] is Path and n != "workdir"}
    assert "$" not in command, "a shell would read what a params file holds"
    of = {"entry": "${key}", "root": "${prepare.root}"}
    placed = re.sub(r"\{(\w+)\}", lambda named: of.get(named[1], f"${{item.{named[1]}}}"), command)
    given = {name.replace("-", "_"): path for name, path in re.findall(r"--([a-z-]+) (\S+)", placed)}
    assert set(given) == wanted
    assert re.match(rf"python -m pipeline\.stages\.{stage} ", command)
    for name, path in given.items():
        assert path in STAGES[stage]["outs" if is_out(name) else "deps"], name


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_stages_own_section_and_the_seed_where_it_is_read(stage: str) -> None:
    run = importlib.import_module(f"pipeline.stages.{stage}").run
    hints = get_type_hints(run)
    own = f"{stage}.${{key}}" if "foreach" in DVC[stage] else stage
    shelves = [f"{params.SHELVES[name]}.${{item.{name}}}" for name in params.on_shelves(hints["params"])]
    seeded = ["seed"] if {"seed", "job"} & hints.keys() else []
    expected = [own, *shelves, *seeded] + (["evaluate"] if "entries" in hints else [])
    assert STAGES[stage]["params"] == expected


def test_every_name_that_becomes_a_path_is_checked() -> None:
    text = (ROOT / "dvc.yaml").read_text()
    assert set(params.PATHS) == set(re.findall(r"data/\$\{item\.(\w+)\}", text))
    assert set(re.findall(r"\$\{item\.(\w+)\}", text)) == {*params.PATHS, *params.SHELVES}
    assert set(re.findall(r"\$\{([^}.]*\.?)", text)) == {"key", "item.", "prepare.", *(n for n in DVC if "foreach" in DVC[n])}


def test_a_section_that_is_missing_is_empty_or_said_to_be_needed() -> None:
    stages = {name for name, body in DVC.items() if "foreach" in body}
    (empty,) = yaml.safe_load((ROOT / "dvc.yaml").read_text())["vars"]
    assert empty == {stage: {} for stage in stages - set(params.NEEDED)}
    assert set(params.SINGLE) == set(DVC) - stages
    assert set(params.SINGLE) <= set(params.NEEDED)


def test_no_stage_reads_the_truth_of_the_built_in_data() -> None:
    readers = [dep for body in STAGES.values() for dep in body["deps"] if "truth" in dep]
    assert readers == []
    files = [p for p in (ROOT / "pipeline").rglob("*.py") if p.parent.name != "scenes" and p.name != "draw.py"]
    sources = {p.relative_to(ROOT / "pipeline").as_posix(): p.read_text() for p in files}
    assert [name for name, text in sources.items() if re.search(r"-truth|truth\.parquet", text)] == ["report/truth.py"]
    users = [name for name, text in sources.items() if re.search(r"import .*\btruth\b|report\.truth", text)]
    assert users == ["report/page.py"]  # the page says how pure selections were; nothing chooses by it


def test_the_demo_recipe_is_what_a_clone_starts_with() -> None:
    """As committed: a user's params.yaml holds what the user wants. The first line names the schema, from where the file lies."""
    shown = subprocess.run(["git", "show", "HEAD:params.yaml"], cwd=ROOT, capture_output=True, text=True)
    if shown.returncode:
        pytest.skip("not a git clone")
    assert shown.stdout.partition("\n")[2] == (ROOT / "recipes" / "demo.yaml").read_text().partition("\n")[2]
