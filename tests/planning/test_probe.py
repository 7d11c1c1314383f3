"""Every kind of work that a stage may have can be probed, on the images that are there."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.planning import counts, probe
from pipeline.planning.counts import Given
from pipeline.planning.estimate import works_of
from pipeline.planning.probe import Prober
from pipeline.planning.work import Recipe
from tests.tiny import PARAMS, jpegs, tar_of

STAGES: dict[str, Any] = {
    **PARAMS,
    "machine": {"threads": 1, "workers": 1, "precision": "float32"},
    "models": {"small": {"arch": "resnet8", "options": {"width": 4, "stem_stride": 2}, "input": {"size": 16}}},
    "pack": {"top": {"images": "select/top", "side": 16}},
    "label": {"top": {"teacher": "teach/teacher", "images": "pack/top", "view": "shifted"}},
    "ensemble": {"two": {"first": "teach/teacher", "second": "teach/few"}},
    "score": {"teacher": {"teacher": "ensemble/two"}},
    "evaluate": {"baseline": {"role": "baseline", "model": "teach/teacher", "corruptions": True, "timing": True}},
    "export": {},
}


def of(folder: Path, **changes: Any) -> Recipe:
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump({**STAGES, **changes}))
    return Recipe.read(file)


@pytest.mark.whole
def test_each_kind_of_work_takes_some_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "SECONDS", 0.0)
    monkeypatch.setattr(probe.Prober, "_start", lambda *_, **__: probe.Rate(1.0, 1.0))  # seconds, of imports
    recipe = of(tmp_path)
    works = works_of(recipe, recipe.stages(), counts.counted(recipe, Given(60, 40, 109, 10)))
    kinds = {kind for work in works.values() for kind in work if kind.name != "assumed"}  # type: ignore[union-attr]
    described = {name.removeprefix("_") for name in vars(Prober) if name.startswith("_")}
    assert {kind.name for kind in kinds} == {
        "start", "draw", "decode", "sift", "index", "vote", "alike", "pack", "view", "forward", "step", "corrupt",
    } <= described  # fmt: skip
    prober = Prober(recipe, size=48)
    for kind in kinds:
        rate = prober.rate(kind)
        assert 0 < rate.wall < math.inf, kind
        assert 0 <= rate.cpu < math.inf, kind


def test_images_are_those_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = jpegs({"x": 5}, 20)
    tar_of(tmp_path / "raw" / "pool.tar", {**files, "x/broken.jpg": b"\xff\xd8\xff no image"})
    tar_of(tmp_path / "raw" / "labelled.tar", {})
    prepare = {"root": "raw", **{role: [{"kind": "tar", "path": f"{role}.tar"}] for role in ("labelled", "val", "pool")}}
    assert Prober(of(tmp_path, prepare=prepare)).images == list(files.values())
