"""The whole DAG on tiny images, through the real `dvc repro` and the real MLflow."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import timm
import torch
import yaml
from dvc.utils.hydra import apply_overrides
from PIL import Image
from playwright.sync_api import Browser

from pipeline import notebook
from pipeline.errors import UserError
from pipeline.learning.loop.optimisers import freeze
from pipeline.models import architectures
from pipeline.models.inputs import Wanted
from pipeline.store import artifact, manifest
from tests.browser import WIDTHS, is_cut, opened
from tests.servers import Web, serving
from tests.tiny import PARAMS, jpegs, tar_of

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.whole, pytest.mark.timeout(1500)]  # seconds; on two idle cores all of it takes about one minute


class House:
    """A copy of the repository with tiny params."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, tracked.split("\0")):
            if name.startswith(("pipeline/", ".dvc", "dvc.yaml", "data/")) and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        (folder / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")
        self.params(PARAMS)

    def copy(self, folder: Path) -> "House":
        """The house with all it has made, in another place: a test that changes something leaves this one as it was."""
        self.flush()
        shutil.copytree(self.folder, folder, symlinks=True, dirs_exist_ok=True)
        return House(folder)

    def flush(self) -> None:
        self.run(sys.executable, "-m", "pipeline.tracking", "flush")

    def params(self, params: dict[str, Any]) -> None:
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    def run(self, *command: str, ok: bool = True) -> str:
        """The output of a command; fails the test on another exit status than expected."""
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, env=environment, timeout=1200)
        output = done.stdout + done.stderr
        assert (done.returncode == 0) == ok, output[-5000:]
        return output

    def repro(self, *targets: str, ok: bool = True) -> tuple[list[str], str]:
        """The stages that `dvc repro` ran, and its output."""
        output = self.run("dvc", "repro", *targets, ok=ok)
        return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage ")], output


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    house = House(tmp_path_factory.mktemp("house"))
    house.ran, house.output = house.repro()  # type: ignore[attr-defined]
    return house


EVALUATED = ["evaluate@baseline", "evaluate@ssld", "evaluate@spread", "evaluate@finetune", "evaluate@byot"]
SIMCLR = {"pretrain@base", "teach@few", "distil@spread"}
ALL = {
    "draw@scenes",
    "prepare",
    "search",
    "dedup",
    "teach@teacher",
    "score@teacher",
    "select@top",
    "distil@ssld",
    "distil@finetune",
    "self_distil@byot",
} | SIMCLR


def test_every_stage_runs_once_and_leaves_whole_artifacts(house: House) -> None:
    assert sorted(house.ran) == sorted([*ALL, *EVALUATED, "export@student", "compare"])  # type: ignore[attr-defined]
    for checksums in (house.folder / "data").rglob(artifact.CHECKSUMS):
        artifact.verify(checksums.parent)
    table = (house.folder / "data/compare/results/table.md").read_text()
    assert all(f"| {entry} " in table for entry in ("ssld", "spread", "byot"))  # the three papers side by side
    assert "<html" in (house.folder / "data/compare/results/report.html").read_text()


def test_leaks_are_removed_and_broken_files_kept_with_a_reason(house: House) -> None:
    truth = pq.read_table(house.folder / "data/draw/scenes-truth/truth.parquet").to_pylist()
    named = {f"{row['tar']}/{row['member']}": row for row in truth}
    pool = manifest.read(house.folder / "data/prepare/pool").table["id"].to_pylist()
    kept = manifest.read(house.folder / "data/dedup/pool").table["id"].to_pylist()
    quarantined = pq.read_table(house.folder / "data/prepare/quarantine/quarantine.parquet").to_pylist()
    assert sorted(q["id"] for q in quarantined) == sorted(i for i, row in named.items() if row["kind"] == "broken")
    assert all(q["reason"] for q in quarantined)
    removed = set(pool) - set(kept)
    assert all(named[i]["kind"] == "leak" for i in removed)
    assert len(removed) >= 8  # of 9


def test_a_second_repro_does_nothing(house: House) -> None:
    assert house.repro()[0] == []


def test_the_same_params_give_the_same_bits_in_another_place(house: House, tmp_path: Path) -> None:
    other = House(tmp_path)
    shutil.copytree(house.folder / "data/draw", other.folder / "data/draw", dirs_exist_ok=True)
    shutil.copytree(house.folder / "data/prepare", other.folder / "data/prepare", dirs_exist_ok=True)
    shutil.copytree(house.folder / "data/search", other.folder / "data/search", dirs_exist_ok=True)
    shutil.copytree(house.folder / "data/dedup", other.folder / "data/dedup", dirs_exist_ok=True)
    other.run("dvc", "repro", "--single-item", "teach@teacher", "score@teacher", "select@top", "distil@ssld")
    for made in ("teach/teacher", "score/teacher", "select/top", "distil/ssld"):
        assert artifact.identity(other.folder / "data" / made) == artifact.identity(house.folder / "data" / made), made


def test_a_change_of_one_entry_reruns_it_and_what_follows_and_mlflow_has_the_others_too(house: House, tmp_path: Path) -> None:
    changed = house.copy(tmp_path)
    params = json.loads(json.dumps(PARAMS))
    params["distil"]["finetune"]["loss"] = {"name": "js"}
    changed.params(params)
    assert sorted(changed.repro()[0]) == ["compare", "distil@finetune", "evaluate@finetune", "export@student"]
    changed.flush()
    script = (
        "import mlflow, json; mlflow.set_tracking_uri('sqlite:///mlflow.db');"
        "runs = mlflow.search_runs(search_all_experiments=True, output_format='list');"
        "print(json.dumps([[r.info.run_name, r.info.status, r.data.metrics, r.data.tags.get('winnow.stage')] for r in runs]))"
    )
    runs = json.loads(changed.run(sys.executable, "-W", "ignore", "-c", script).splitlines()[-1])
    finished = [name for name, status, _, _ in runs if status == "FINISHED"]
    assert {"teach.teacher", "distil.ssld", "distil.finetune", "select.top", "evaluate.ssld"} <= set(finished)
    assert finished.count("compare") == 2
    for name, _, metrics, stage in runs:
        if stage == "compare" and name == "compare":
            assert any(key.startswith("evaluate.ssld.") for key in metrics), metrics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dedupe": {}, "compare": {"title": "other", "baseline": "ssld"}},
            "nothing reads the key `dedupe` (did you mean `dedup`?)",
        ),
        ({"prepare": {**PARAMS["prepare"], "holdout": "much"}}, "`prepare.holdout` is 'much'"),
        ({"prepare": {**PARAMS["prepare"], "val": [{"kind": "tar", "path": "nowhere.tar"}]}}, "nowhere.tar"),
    ],
    ids=["unknown key", "wrong type", "missing path"],
)
def test_a_mistake_in_params_is_explained(house: House, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    mistaken = house.copy(tmp_path)  # DVC removes the outputs of a stage before it runs it
    mistaken.params({**PARAMS, **change})
    _, output = mistaken.repro(ok=False)
    assert message in output
    assert "Traceback" not in output


IN_ONE_PROCESS = """
import json, sys
from dvc.cli import main
for command in json.loads(sys.argv[1]):
    status = main(command)
    print(f"ENDED {status}", flush=True)
"""


@pytest.fixture(scope="module")
def repository(house: House, tmp_path_factory: pytest.TempPathFactory) -> House:
    """The house with all it has made, as a commit of a git repository that a user works on."""
    mine = house.copy(tmp_path_factory.mktemp("repository"))
    (mine.folder / ".dvc" / "config.local").unlink()
    shutil.copy(ROOT / ".gitignore", mine.folder)
    name = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    for command in (
        ("init", "-q"),
        ("add", "-A"),
        (*name, "commit", "-qm", "a run"),
        (*name, "tag", "-am", "-", "student@v1.0.0"),
    ):
        mine.run("git", *command)
    return mine


def dvc(repository: House, *commands: str) -> list[str]:
    """What each command of DVC says; in one process, as DVC takes a second to start. Fails where one fails."""
    split = json.dumps([command.split() for command in commands])
    output = repository.run(sys.executable, "-W", "ignore", "-c", IN_ONE_PROCESS, split)
    *said, _ = output.split("ENDED 0\n")
    assert len(said) == len(commands), output
    return said


def test_dvc_shows_ten_figures_and_its_pages_work_offline(repository: House, browser: Browser) -> None:
    shown, experiments, *_ = dvc(
        repository,
        "metrics show data/compare/metrics.json --json",
        "exp show --csv",
        "plots show",
        "plots diff HEAD workspace --out differences",
        "artifacts get . student --out mine",
    )
    comparison = json.loads((repository.folder / "data/compare/results/comparison.json").read_text())
    [figures] = [of["data"] for of in json.loads(shown)[""]["data"].values()]
    assert len(figures) == 10
    assert (figures["chosen"], figures["val_top1"]) == (
        comparison["best"],
        comparison["entries"][comparison["best"]]["val"]["top1"],
    )
    columns = {column.rpartition(":")[2] for column in experiments.splitlines()[0].split(",")}
    assert set(figures) <= columns
    assert artifact.identity(repository.folder / "mine") == artifact.identity(repository.folder / "data/export/student")
    titles = {plot["title"] for declared in declared_plots(repository) for plot in declared.values()}
    assert "live: training loss" in titles
    for page in ("dvc_plots", "differences"):
        for width in WIDTHS:
            with opened(browser, repository.folder / page / "index.html", width) as shown_page:
                shown_page.wait_for_function(f"document.querySelectorAll('svg.marks').length == {len(titles)}")
                assert not is_cut(shown_page)
                texts = shown_page.locator("svg.marks .role-title-text text").all_text_contents()
                assert titles <= set(texts)  # beside them the names of revisions
                marks = "[...document.querySelectorAll('svg.marks')].map(e => e.querySelectorAll('.role-mark path').length)"
                assert min(shown_page.evaluate(marks)) > 0


def declared_plots(house: House) -> list[dict[str, Any]]:
    files = (house.folder / "dvc.yaml", house.folder / "data/live/dvc.yaml")
    return [plot for file in files for plot in yaml.safe_load(file.read_text())["plots"]]


def test_the_notebook_runs(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(house.folder)
    cells = json.loads((ROOT / "docs/notebook.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    shown = []
    for code in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
        tree = ast.parse(code)
        value: ast.expr = ast.Constant(None)
        if isinstance(last := tree.body[-1], ast.Expr):  # which Jupyter shows
            value, tree.body = last.value, tree.body[:-1]
        exec(compile(tree, "a cell", "exec"), names)
        shown.append(eval(compile(ast.fix_missing_locations(ast.Expression(value)), "a cell", "eval"), names))
    pictures = [value for value in shown if isinstance(value, Image.Image)]
    assert len(pictures) == 2
    truth = pq.read_table(house.folder / "data/draw/scenes-truth/truth.parquet").to_pylist()
    leaks = {f"{row['tar']}/{row['member']}" for row in truth if row["kind"] == "leak"}
    assert {finding.id for finding in names["copies"]} <= leaks
    left, right = np.asarray(pictures[1])[:, : notebook.SIDE], np.asarray(pictures[1])[:, -notebook.SIDE :]
    copied = notebook.picture(notebook.manifest("data/prepare/pool"), names["copies"][0].id)
    assert (left == np.asarray(copied.resize((notebook.SIDE, notebook.SIDE), Image.Resampling.BICUBIC))).all()
    assert (right == notebook.OUTLINE).all(2).any()
    assert [row["entry"] for row in notebook.table().to_pylist()] == list(names["result"].entries)
    alone = pq.read_table(house.folder / "data/evaluate/ssld/predictions.parquet").slice(0, 20).to_pylist()
    classes = names["val"].classes
    assert [answer.label for answer in names["answers"]] == [classes[row["predicted"]] for row in alone]
    with pytest.raises(UserError, match="there is no image 'nowhere'"):
        notebook.picture(names["pool"], "nowhere")
    with pytest.raises(UserError, match="Run `dvc repro`"):
        notebook.findings("nowhere")


RECIPE = ROOT / "recipes" / "imagenet.yaml"
MEASURED = ("resnet50d", "ssld_resnet50d_fix", "ssld_mobilenet_finetune")
"""The evaluations of the recipe that are made: they are all alike."""


def smaller(recipe: dict[str, Any]) -> list[str]:
    """Overrides that leave of the recipe all but its sizes, the published weights, which need a network, and most evaluations."""
    sizes: dict[str, Any] = {"machine.compile": False, "+machine.threads": 1, "+machine.workers": 1, "prepare.holdout": 0.25}
    sizes |= {f"models.{name}.arch": "resnet8" for name in recipe["models"]} | {"models.teacher.pretrained": "null"}
    sizes |= {"models.teacher.input.size": 32, "models.resnet50d_320.input.size": 48, "models.resnet50d_320.input.canvas": 56}
    sizes |= {f"models.{name}.input.{key}": n for name in ("resnet50d", "mobilenet") for key, n in (("size", 32), ("canvas", 40))}
    sizes |= {"select.top.k": 3, "pack.top.side": 40, "pack.train.side": 56, "label.top.views": 2}
    for name, training in recipe["trainings"].items():
        if training["steps"]:
            sizes |= {f"trainings.{name}.steps": 2, f"trainings.{name}.batch": 8}
    return [f"{key}={value}" for key, value in sizes.items()] + [
        f"~evaluate.{e}" for e in recipe["evaluate"] if e not in MEASURED
    ]


def test_the_recipe_for_imagenet_runs_at_a_smaller_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_TRACKING", "off")
    house = House(tmp_path)
    shutil.copy(RECIPE, tmp_path / "params.yaml")
    apply_overrides(tmp_path / "params.yaml", smaller(yaml.safe_load(RECIPE.read_text())))
    two, size = ("n01440764", "n01443537"), (80, 64)
    tar_of(tmp_path / "data/raw/imagenet1k-train-000.tar", jpegs(dict.fromkeys(two, 8), size))
    tar_of(tmp_path / "data/raw/imagenet1k-val-000.tar", jpegs(dict.fromkeys(two, 3), size, seed=1))
    tar_of(tmp_path / "data/raw/imagenet22k-000.tar", jpegs({"n00004475": 6, "n00005787": 6}, size, seed=2))
    house.repro()
    table = (tmp_path / "data/compare/results/table.md").read_text()
    assert all(f"| {entry} " in table for entry in MEASURED)
    packed = manifest.read(tmp_path / "data/pack/top")
    assert set(packed.table["height"].to_pylist()) == {40}
    assert len(packed) == 12 + len(manifest.read(tmp_path / "data/select/top"))
    finetuned, fixed = (tmp_path / "data/distil" / name for name in ("resnet50d_finetune", "resnet50d_fix"))
    assert json.loads((fixed / "model.json").read_text())["input"]["size"] == 48
    before, after = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (finetuned, fixed))
    assert {name for name in before if not before[name].equal(after[name])} == {"linear.weight", "linear.bias"}


def test_the_networks_of_the_recipe_for_imagenet_are_timms() -> None:
    recipe = yaml.safe_load(RECIPE.read_text())
    teacher = recipe["models"]["teacher"]
    assert teacher["arch"] in timm.list_pretrained()
    with torch.device("meta"):
        made = {name: architectures.create(network["arch"], 1000) for name, network in recipe["models"].items()}
    published = architectures.timm_input(made["teacher"])
    assert published is not None
    assert Wanted(**teacher["input"]).fitted(published, True).side == 256
    freeze(made["resnet50d_320"], tuple(recipe["trainings"]["fix"]["frozen"]))
    assert {n for n, p in made["resnet50d_320"].named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}


def test_what_changes_at_an_address_makes_prepare_stale_and_its_password_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSSPEC_HTTP", json.dumps({"headers": {"Authorization": "Bearer hunter2"}}))
    monkeypatch.setenv("WINNOW_TRACKING", "off")  # a mirror would outlive the test
    house, raw = House(tmp_path), tmp_path / "data" / "raw"
    tar_of(raw / "labelled.tar", jpegs({"ant": 4, "bee": 4}))
    tar_of(raw / "val.tar", jpegs({"ant": 2, "bee": 2}, seed=1))
    pools = [tar_of(tmp_path / name, jpegs({"x": n}, seed=2)).read_bytes() for n, name in ((3, "old.tar"), (4, "new.tar"))]
    web = Web({"pool.tar": pools[0]}, token="hunter2")
    with serving(web) as at:
        house.params(
            {
                **PARAMS,
                "draw": {},
                "remote": {"web": {"url": at, "files": ["pool.tar"]}},
                "prepare": {
                    **PARAMS["prepare"],
                    "root": "data/raw",
                    "pool": [{"kind": "tar", "path": "*.tar", "remote": "web"}],
                },
            }
        )
        assert house.repro("prepare")[0] == ["remote@web", "prepare"]
        assert house.repro("prepare")[0] == ["remote@web"]  # it looks each time, and finds the same
        web.files["pool.tar"] = pools[1]
        assert house.repro("prepare")[0] == ["remote@web", "prepare"]
        assert len(manifest.read(tmp_path / "data/prepare/pool")) == 4
    for file in (file for file in tmp_path.rglob("*") if file.is_file()):
        assert b"hunter2" not in file.read_bytes(), file
