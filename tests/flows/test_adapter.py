"""What winnow leans on and DVC does not promise, tried on the installed DVC: one test a part, whose failure names the release.

Prefect's parts are tried in test_flows.py, which has a server.
"""

import ast
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dvc.repo
import pytest
import yaml

from flows import dag
from flows.adapter import dvc as adapter
from pipeline.harness import dvc as harness
from tests.tiny import leaned_on

pytestmark = [pytest.mark.flows, pytest.mark.filterwarnings("ignore")]  # DVC's own warnings
FLOWS = Path(dag.__file__).parent
DVC_YAML = """
stages:
  first:
    cmd: mkdir -p data/first && echo ${first.text} > data/first/it && env > data/seen
    params: [first]
    deps: [source]
    outs: [data/first]
  second:
    foreach: ${second}
    do:
      cmd: test ${key} != broken && cp data/first/it data/${key}
      params: ["second.${key}"]
      deps: [data/first]
      outs: ["data/${key}"]
"""
PARAMS: dict[str, Any] = {"first": {"text": "hello"}, "second": {"a": {"n": 1, "sizes": [1, 2]}, "broken": {"n": 1}}}
PUBLIC = {
    "prefect", "prefect.artifacts", "prefect.assets", "prefect.automations", "prefect.blocks.webhook", "prefect.cache_policies",
    "prefect.client.schemas.filters", "prefect.deployments", "prefect.exceptions", "prefect.states",
}  # fmt: skip
"""Modules of Prefect that its documentation names."""


def part(name: str) -> AbstractContextManager[None]:
    return leaned_on("dvc", adapter.KNOWN, f"{name} (flows/adapter/dvc.py)")


def dvc_says(folder: Path, *args: str) -> str:
    """What `dvc ARGS` prints, whether or not it fails."""
    command = [*dag.command(*args)]
    command.remove("--wait-for-lock")
    done = subprocess.run(command, cwd=folder, env=dag.environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose first stage has run, and `said`, the words of DVC while it ran."""
    folder = tmp_path_factory.mktemp("adapter")
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    (folder / "source").write_text("x")
    for command in (["git", "init", "-q", "."], ["dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, env=dag.environment(), check=True, stdin=subprocess.DEVNULL)
    (folder / "said").write_text(dvc_says(folder, "repro", "first", "second@a"))
    return folder


def test_the_graph_as_dot(project: Path) -> None:
    with part("`dvc dag --dot`"):
        assert adapter.graph(dvc_says(project, "dag", "--dot")) == {
            "first": frozenset(),
            "second@a": frozenset({"first"}),
            "second@broken": frozenset({"first"}),
        }


def test_how_a_run_a_restored_and_a_failed_stage_are_told(project: Path) -> None:
    with part("the prose of `dvc repro`"):
        assert [told for line in (project / "said").read_text().splitlines() if (told := adapter.outcome(line))] == [
            ("first", "Completed"),
            ("second@a", "Completed"),
        ]
        (project / "data/a").unlink()
        said = dvc_says(project, "repro", "--single-item", "second@a")
        assert ("second@a", "Restored") in map(adapter.outcome, said.splitlines())
        said = dvc_says(project, "repro", "--single-item", "second@broken")
        assert adapter.exit_code(said) == 1
        assert not adapter.is_busy(said)
        assert any("second@broken" in error for error in adapter.errors(said.splitlines()))


def test_what_status_says(project: Path) -> None:
    params = project / "params.yaml"
    before = params.read_text()
    with part("`dvc status --json`"):
        params.write_text(before.replace("n: 1", "n: 2", 1))
        (project / "source").write_text("y")
        told = adapter.changes(dvc_says(project, "status", "--json"))
        params.write_text(before)
        (project / "source").write_text("x")
        assert told["first"] == adapter.Changes(deps={"source": "modified"})
        assert told["second@a"] == adapter.Changes(params={"params.yaml": ["second.a"]})
        assert "data/first" in told["second@broken"].deps
        assert not told["second@broken"].only_missing
        (project / "data/a").unlink()
        told = adapter.changes(dvc_says(project, "status", "--json", "second@a"))
        assert told["second@a"].only_missing
        assert adapter.restorable(project, ["first", "second@a"], ["second@a"]) == {"second@a": True}
        dvc_says(project, "checkout", "second@a")


def test_a_lock_that_another_process_holds(project: Path) -> None:
    from dvc.rwlock import rwlock

    with part("`Repo.lock` and the words of a `dvc` that cannot have it"), dvc.repo.Repo(str(project)) as repo:
        with repo.lock:
            assert adapter.is_busy(dvc_says(project, "repro", "second@a"))
        with rwlock(repo.tmp_dir, repo.fs, "a test", [], [str(project / "data/broken")], False):
            assert adapter.is_busy(dvc_says(project, "repro", "--single-item", "second@broken"))


def test_the_lock_file(project: Path) -> None:
    with part("the format of dvc.lock"):
        entry = adapter.locked(project)["second@a"]
        assert [out["path"] for out in entry["outs"]] == ["data/a"]
        assert [set(dep) >= {"path", "md5", "size"} for dep in entry["deps"]] == [True]
        assert entry["params"] == {"params.yaml": {"second.a": PARAMS["second"]["a"]}}
        assert adapter.enter(project, "second@a", None) == entry
        assert list(adapter.locked(project)) == ["first"]
        assert adapter.enter(project, "second@a", entry) is None
        assert "second@a" not in adapter.changes(dvc_says(project, "status", "--json"))


def test_what_it_would_restore(project: Path) -> None:
    order = ["first", "second@a", "second@broken"]
    with part("`Repo.stage_cache`"):
        assert adapter.restorable(project, order, order) == {"first": True, "second@a": True}
        params = project / "params.yaml"
        before = params.read_text()
        params.write_text(before.replace("n: 1", "n: 3"))
        assert adapter.restorable(project, order, order) == {"first": True}
        params.write_text(before)
        lock = (project / "dvc.lock").read_text()
        (project / "dvc.lock").unlink()  # what another branch has run, say
        assert adapter.restorable(project, order, order) == {"first": False, "second@a": False}
        (project / "dvc.lock").write_text(lock)


def test_what_a_stage_reads_and_writes_and_what_decides_its_result(project: Path) -> None:
    params = project / "params.yaml"
    before = params.read_text()
    with part("`Repo.index` and `ParamsDependency`"):
        now = adapter.stages(project)
        assert [(name, read.deps, read.outs) for name, read in now.items()] == [
            ("first", ["source"], ["data/first"]),
            ("second@a", ["data/first"], ["data/a"]),
            ("second@broken", ["data/first"], ["data/broken"]),
        ]
        for text, differ in (
            (before.replace("sizes:", "# a comment\n    sizes:"), []),
            (before.replace("- 2", "- 3"), ["second@a"]),
            (before.replace("hello", "bye"), ["first", "second@a", "second@broken"]),
        ):
            params.write_text(text)
            then = adapter.stages(project)
            assert [name for name in now if then[name].decides != now[name].decides] == differ
        params.write_text(before)


def test_changes_of_params(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(PARAMS))
    with part("`dvc.utils.hydra`"):
        adapter.apply(file, ["first.text=bye", "+second.b.n=7", "~second.broken", "second.a.sizes=[3,4]"])
        assert yaml.safe_load(file.read_text()) == {
            "first": {"text": "bye"},
            "second": {"a": {"n": 1, "sizes": [3, 4]}, "b": {"n": 7}},
        }
        with pytest.raises(adapter.DVCError, match="nothing"):
            adapter.apply(file, ["nothing=1"])
        values = ["first.text=a,b", "+n=range(1,4)", "~second.a", "sizes=[1,2]", "x='a,b'"]
        assert adapter.choices(values, 9) == [
            ["first.text=a", "first.text=b"],
            ["+n=1", "+n=2", "+n=3"],
            *([v] for v in values[2:]),
        ]
        assert len(adapter.choices(["n=range(0,1000000000)"], 9)[0]) == 10
        with pytest.raises(adapter.DVCError, match=r"no list of values\. Write them: `n=1,2,3`"):
            adapter.choices(["n=interval(0,1)"], 9)
        with pytest.raises(adapter.DVCError, match="n=="):
            adapter.choices(["n==[1"], 9)


def test_what_a_stage_is_told(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of a command, as pipeline/harness/dvc.py reads them."""
    with leaned_on("dvc", adapter.KNOWN, "DVC_ROOT and DVC_STAGE (pipeline/harness/dvc.py)"):
        for line in (project / "data/seen").read_text().splitlines():
            if line.startswith("DVC_"):
                monkeypatch.setenv(*line.split("=", 1))
        assert harness.runs_this()
        assert harness.project_folder() == project
        assert harness.stage() == ("first", "")
        monkeypatch.setenv("DVC_STAGE", f"{os.environ['DVC_STAGE']}@x")
        assert harness.stage() == ("first", "x")


def test_where_the_cache_has_a_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    with leaned_on("dvc", adapter.KNOWN, "the layout of its cache (pipeline/harness/dvc.py)"):
        cache = harness.cache_folder()
        assert cache.resolve() == Path(dvc_says(project, "cache", "dir").strip()).resolve()
        (out,) = adapter.locked(project)["first"]["outs"]
        listed = harness.in_cache(cache, out["md5"])
        assert harness.md5_of(listed) == out["md5"].removesuffix(".dir")
        ((name, md5),) = harness.listed(listed).items()
        assert name == "it"
        assert harness.in_cache(cache, md5).read_text() == "hello\n"


def test_a_dvc_without_such_a_part_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dvc.repo, "Repo", lambda *_, **__: SimpleNamespace())
    with pytest.raises(adapter.AnotherDVC, match=rf"which has no `Repo.lock` as DVC {adapter.KNOWN} had.*`pip install dvc=="):
        adapter.enter(project, "first", None)


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def test_nothing_else_leans_on_them() -> None:
    for file in FLOWS.rglob("*.py"):
        if file.parent.name != "adapter":
            names = set(imported(file))
            assert not {name for name in names if name.partition(".")[0] == "dvc"}, file
            assert {name for name in names if name.partition(".")[0] == "prefect"} <= PUBLIC, file
            assert "'changed deps'" not in file.read_text().replace('"', "'"), f"{file}: of `dvc status`, see flows.adapter.dvc"


def test_an_answer_that_is_none_is_told() -> None:
    with pytest.raises(adapter.AnotherDVC, match="dvc status"):
        adapter.changes(json.dumps({"first": 1}))
