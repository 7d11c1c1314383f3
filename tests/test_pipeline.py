"""The whole DAG on tiny images, through the real `dvc repro` and the real MLflow."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.store import artifact, manifest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(1500)  # seconds; on two idle cores all of it takes about one minute
SMALL = {"arch": "resnet8", "options": {"width": 8, "stem_stride": 2}, "input": {"size": 32}}
TRAINING = {"steps": 6, "batch": 32, "lr": 0.05}
STUDENT = {"init": "scratch", "model": SMALL, "teacher": "teach/teacher", "training": TRAINING}
PARAMS: dict[str, Any] = {
    "seed": 0,
    "machine": {"threads": 1, "workers": 2},
    "draw": {"scenes": {"seed": 0, "labelled": 6, "val": 4, "in_class": 40, "out_of_class": 60, "leaks": 9, "broken": 9}},
    "prepare": {
        "root": "data/draw/scenes",
        "labelled": [{"kind": "tar", "path": "labelled.tar"}],
        "val": [{"kind": "tar", "path": "val.tar"}],
        "pool": [{"kind": "tar", "path": "pool-*.tar"}],
        "holdout": 0.2,
    },
    "search": {},
    "dedup": {},
    "pretrain": {"base": {"images": "dedup/pool", "model": SMALL, "head_out": 16, "training": TRAINING}},
    "teach": {
        "teacher": {"init": "scratch", "model": SMALL, "training": TRAINING},
        "few": {"init": "pretrain/base", "from_layer": 1, "labels": 2, "training": TRAINING},
    },
    "ensemble": {},
    "score": {"teacher": {"teacher": "teach/teacher"}},
    "select": {"top": {"scores": "score/teacher", "rule": "top", "k": 4}},
    "pack": {},
    "label": {},
    "distil": {
        "ssld": {**STUDENT, "images": "select/top"},
        "spread": {**STUDENT, "teacher": "teach/few", "images": "dedup/pool", "loss": {"name": "soft_ce", "temperature": 0.1}},
        "finetune": {"init": "distil/ssld", "teacher": "teach/teacher", "images": "dedup/train", "training": TRAINING},
    },
    "self_distil": {
        "byot": {"init": "scratch", "model": SMALL, "teacher": "labels", "images": "dedup/train", "training": TRAINING},
    },
    "evaluate": {
        "baseline": {"model": "teach/teacher"},
        "ssld": {"model": "distil/ssld"},
        "few": {"model": "teach/few"},
        "spread": {"model": "distil/spread"},
        "finetune": {"model": "distil/finetune"},
        "byot": {"model": "self_distil/byot"},
    },
    "export": {"student": {"model": "distil/finetune", "evaluation": "evaluate/finetune"}},
    "compare": {"title": "tiny", "baseline": "baseline"},
}


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

    def repro(self, ok: bool = True) -> tuple[list[str], str]:
        """The stages that `dvc repro` ran, and its output."""
        output = self.run("dvc", "repro", ok=ok)
        return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage ")], output


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    house = House(tmp_path_factory.mktemp("house"))
    house.ran, house.output = house.repro()  # type: ignore[attr-defined]
    return house


EVALUATED = ["evaluate@baseline", "evaluate@ssld", "evaluate@few", "evaluate@spread", "evaluate@finetune", "evaluate@byot"]
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


def test_a_change_of_one_entry_reruns_it_and_what_follows(house: House) -> None:
    changed = json.loads(json.dumps(PARAMS))
    changed["distil"]["finetune"]["loss"] = {"name": "js"}
    house.params(changed)
    assert sorted(house.repro()[0]) == ["compare", "distil@finetune", "evaluate@finetune", "export@student"]


def test_the_same_params_give_the_same_bits_in_another_place(house: House, tmp_path: Path) -> None:
    other = House(tmp_path)
    shutil.copytree(house.folder / "data/draw", other.folder / "data/draw", dirs_exist_ok=True)
    shutil.copytree(house.folder / "data/prepare", other.folder / "data/prepare", dirs_exist_ok=True)
    shutil.copytree(house.folder / "data/search", other.folder / "data/search", dirs_exist_ok=True)
    shutil.copytree(house.folder / "data/dedup", other.folder / "data/dedup", dirs_exist_ok=True)
    for stage in ("teach@teacher", "score@teacher", "select@top", "distil@ssld"):
        other.run("dvc", "repro", "--single-item", stage)
    for made in ("teach/teacher", "score/teacher", "select/top", "distil/ssld"):
        assert artifact.identity(other.folder / "data" / made) == artifact.identity(house.folder / "data" / made), made


def test_mlflow_has_every_stage_also_those_that_dvc_skipped(house: House) -> None:
    house.run(sys.executable, "-m", "pipeline.tracking", "flush")
    script = (
        "import mlflow, json; mlflow.set_tracking_uri('sqlite:///mlflow.db');"
        "runs = mlflow.search_runs(search_all_experiments=True, output_format='list');"
        "print(json.dumps([[r.info.run_name, r.info.status, r.data.metrics, r.data.tags.get('winnow.stage')] for r in runs]))"
    )
    runs = json.loads(house.run(sys.executable, "-W", "ignore", "-c", script).splitlines()[-1])
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
def test_a_mistake_in_params_is_explained(house: House, change: dict[str, Any], message: str) -> None:
    house.params({**PARAMS, **change})
    _, output = house.repro(ok=False)
    assert message in output
    assert "Traceback" not in output
