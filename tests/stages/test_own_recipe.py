"""recipes/own.yaml from its first stage to its report, at a smaller size, in one process; then what its header says to ask."""

import argparse
import importlib
import shutil
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from pipeline.__main__ import check
from pipeline.advice import arguments, forecast, gallery
from pipeline.harness import stage
from pipeline.models import architectures
from pipeline.store import manifest
from pipeline.store.params import SINGLE
from tests.tiny import CLASSES, folder_of, jpegs

pytestmark = pytest.mark.whole
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "own.yaml"


def smaller(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with all its entries, but for its sizes and the published weights, which need a network."""
    recipe["prepare"]["holdout"] = 0.5  # of 24 images
    recipe["machine"] = {"threads": 1, "workers": 1, "device": "cpu"}
    for network in recipe["models"].values():
        network |= {"arch": "resnet8", "pretrained": None, "options": {"width": 4}, "input": {"size": 24, "canvas": 32}}
    for training in recipe["trainings"].values():
        training |= {"steps": 1, "batch": 8}
    recipe["select"]["top"]["k"] = recipe["select"]["random"]["k"] = 4
    recipe["pack"]["top"]["side"], recipe["label"]["top"]["views"] = 32, 1
    for entry in ("small_labels", "published_labels", "small", "tiny_kd", "tiny_random"):  # measured as the others are
        del recipe["evaluate"][entry]
    del recipe["export"]  # the exporter takes longer than all others together
    return recipe


def run_all(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage of dvc.yaml, in its order, as DVC calls it."""
    for name, stanza in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items():
        for key in [None] if name in SINGLE else recipe.get(name, {}):
            monkeypatch.setenv("DVC_STAGE", f"dvc.yaml:{name}" if key is None else f"dvc.yaml:{name}@{key}")
            cmd = stanza["cmd"] if key is None else stanza["do"]["cmd"]
            run = importlib.import_module(f"pipeline.stages.{name}").run
            gathers = "evaluate" if name == "compare" else None
            copy_context().run(stage._main, run, cmd.split()[3:], False, gathers)  # which names the stage at work


def test_the_recipe_for_own_photographs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_TRACKING", "off")
    monkeypatch.chdir(tmp_path)
    recipe = smaller(yaml.safe_load(RECIPE.read_text()))
    Path("params.yaml").write_text(yaml.safe_dump(recipe))
    for file in ("scratch", "overrides.csv"):
        Path("data").mkdir(exist_ok=True)
        shutil.copy(ROOT / "data" / file, Path("data", file))
    shutil.copytree(ROOT / "data" / "remote", Path("data", "remote"))
    size = (56, 48)
    folder_of(Path("data/raw/labelled"), jpegs(dict.fromkeys(CLASSES, 8), size))
    folder_of(Path("data/raw/val"), jpegs(dict.fromkeys(CLASSES, 2), size, seed=1))
    folder_of(Path("data/raw/pool"), jpegs({"a": 12, "b/c": 12}, size, seed=2))
    check(Path("params.yaml"))
    run_all(recipe, monkeypatch)
    assert "<title>Small classifiers for our photographs" in Path("data/compare/results/report.html").read_text()
    table = Path("data/compare/results/table.md").read_text()
    assert all(f"| {entry} " in table for entry in recipe["evaluate"])
    assert set(manifest.read(Path("data/pack/top")).table["height"].to_pylist()) == {32}
    for add, run, given in (
        (arguments.add_forecast, forecast.run, ["data/score/teacher"]),
        (
            arguments.add_gallery,
            gallery.run,
            ["data/select/top", "--student", "data/distil/tiny", "--out", "selection.html", "--device", "cpu"],
        ),
    ):
        parser = argparse.ArgumentParser()
        add(parser)
        assert run(parser.parse_args(given))
    assert "data/distil/tiny" in Path("selection.html").read_text()


def test_its_networks_and_published_weights_are_timms() -> None:
    models = yaml.safe_load(RECIPE.read_text())["models"]
    for network in models.values():
        assert network["arch"] in timm.list_models() + timm.list_pretrained()
        assert "pretrained" not in network or network["arch"] in timm.list_pretrained()
        with torch.device("meta"):
            made = architectures.create(network["arch"], 10)
        published = architectures.timm_input(made)
        assert published is not None
        assert network["input"]["canvas"] >= network["input"]["size"] / (network["input"].get("crop") or published.crop)
