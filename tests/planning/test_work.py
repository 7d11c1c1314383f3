"""The work of a stage follows from its params and the numbers of images."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.planning import counts
from pipeline.planning.counts import Given
from pipeline.planning.estimate import works_of
from pipeline.planning.work import Recipe, votes
from tests.tiny import PARAMS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def recipe(folder: Path, **changes: Any) -> Recipe:
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump({**PARAMS, **changes}))
    return Recipe.read(file)


def units(work: Any, name: str) -> dict[str, float]:
    """The units of each kind of that name, by what tells them apart."""
    assert isinstance(work, dict), work
    return {what.spec: amount for what, amount in work.items() if what.name == name}


def only(work: Any, name: str) -> float:
    (amount,) = units(work, name).values()
    return amount


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_work_of_every_stage_of_every_recipe_is_known(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # without any data
    of = Recipe.read(file)
    works = works_of(of, of.stages(), counts.counted(of, Given(50_000, 10_000, 100_000, 10)))
    assert {name: work for name, work in works.items() if not isinstance(work, dict)} == {}
    assert all(amount > 0 for work in works.values() for amount in work.values())  # type: ignore[union-attr]


def test_images_are_counted_as_the_stages_divide_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo = Recipe.read(ROOT / "recipes" / "demo.yaml")
    found = counts.counted(demo, None)  # drawn: 60 labelled and 100 val of each of 10 classes; 3,000 + 5,000 + 63 in the pool
    assert {name: found.images[f"prepare/{name}"] for name in ("train", "holdout", "val", "pool")} == {
        "train": 400, "holdout": 200, "val": 1000, "pool": 8063,
    }  # fmt: skip
    assert (found.images["select/top"], found.images["select/all"]) == (1500, 8063)
    cifar = Recipe.read(ROOT / "recipes" / "cifar10.yaml")
    found = counts.counted(cifar, Given(50_000, 10_000, 50_000, 10))  # 500 of a class are labelled, a tenth of them held out
    assert (found.images["prepare/train"], found.images["prepare/holdout"], found.images["prepare/pool"]) == (4500, 500, 95_000)


def test_a_student_takes_its_steps_and_its_teacher_looks_at_each_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo = Recipe.read(ROOT / "recipes" / "demo.yaml")
    (work,) = works_of(demo, ["distil@ssld"], counts.counted(demo, None)).values()
    assert only(work, "step") == 300
    assert sum(units(work, "decode").values()) == 1500 + 400 + 200  # selected and labelled images, then the held-out ones
    looks = units(work, "forward")
    teacher = next(amount for spec, amount in looks.items() if '"width": 32' in spec)
    student = next(amount for spec, amount in looks.items() if '"width": 16' in spec)
    assert (teacher, student) == (300 * 128, 10 * 200)  # ten measurements on the held-out images


def test_images_beyond_the_memory_are_decoded_at_each_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    of = recipe(tmp_path, machine={"memory_gb": 1e-6})
    works = works_of(of, ["distil@ssld", "distil@finetune"], counts.counted(of, Given(60, 40, 109, 10)))
    # 6 steps of 32, and the held-out images once
    assert sum(units(works["distil@ssld"], "decode").values()) == 6 * 32 + 10
    # `dedup/train` holds the labelled images already
    of = recipe(tmp_path)
    works = works_of(of, ["distil@finetune"], counts.counted(of, Given(60, 40, 109, 10)))
    assert sum(units(works["distil@finetune"], "decode").values()) == 50 + 10


def test_kept_labels_save_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    student = {**PARAMS["distil"]["ssld"], "teacher": "label/top"}
    label = {"top": {"teacher": "teach/teacher", "images": "select/top", "view": "shifted", "views": 3}}
    of = recipe(tmp_path, label=label, distil={"ssld": student}, evaluate={}, export={})
    works = works_of(of, ["label@top", "distil@ssld"], counts.counted(of, Given(60, 40, 109, 10)))
    assert only(works["label@top"], "forward") == 3 * (40 + 50)
    assert only(works["distil@ssld"], "forward") == 6 * 10  # the student alone, on the held-out images


def test_a_larger_index_costs_by_its_root() -> None:
    """docs/dedup.md: 2.6, 4.5 and 7.8 ms an image above bare extraction, for 0.5, 5.3 and 26.4 million entries."""
    for entries, ms in ((0.5e6, 2.56), (5.3e6, 4.45), (26.4e6, 7.8)):
        assert votes(entries) == pytest.approx(ms, rel=0.05)


def test_a_stage_of_ones_own_has_no_described_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    of = recipe(tmp_path)
    (why,) = works_of(of, ["union@both"], counts.counted(of, Given(60, 40, 109, 10))).values()
    assert not isinstance(why, dict)


def test_what_a_run_has_recorded_reads_as_its_params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record holds params by the names of their fields: `lambda_`, where the file says `lambda`."""
    monkeypatch.chdir(tmp_path)
    of = recipe(tmp_path)
    for name in of.stages():
        stage, _, entry = name.partition("@")
        section = of.section(stage, entry or None)
        assert of.section(stage, entry or None, section.model_dump(mode="json")) == section, name
