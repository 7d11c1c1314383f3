"""The work of a recipe for data that are not there, against figures that were counted by hand."""

import argparse
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.planning import ahead, counts
from pipeline.planning.arguments import add_arguments
from pipeline.planning.command import images_of
from pipeline.planning.counts import Given
from pipeline.planning.estimate import works_of
from pipeline.planning.work import Recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.whole
def test_the_compute_of_imagenet_is_that_of_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/labs.md, *Compute*, in 10^18 multiply-accumulates."""
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.read(ROOT / "recipes" / "imagenet.yaml")
    works = works_of(recipe, recipe.stages(), counts.counted(recipe, Given(1_281_167, 50_000, 13_000_000, 1000)))

    def compute(stage: str) -> float:
        work = works[stage]
        assert isinstance(work, dict)
        return sum(units * ahead.macs(kind) for kind, units in work.items() if kind.name in ("step", "forward")) / 1e18

    page = {"score@teacher": 0.47, "label@top": 3.0, "teach@resnet50d": 2.0, "distil@resnet50d": 93, "distil@mobilenet": 1.2}
    assert {stage: compute(stage) for stage in page} == {stage: pytest.approx(value, rel=0.03) for stage, value in page.items()}


def asked(*words: str) -> tuple[Given, list[str]]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return images_of(parser.parse_args(words))


def test_what_nobody_gave_is_assumed_and_said() -> None:
    given, assumed = asked("--images", "14_000_000", "--val", "50_000")
    assert given == Given(1_400_000, 50_000, 14_000_000, 1000)
    assert [words.split(",")[0] for words in assumed] == ["1", "1"]
    assert asked("--images", "900", "--val", "50", "--labelled", "100", "--classes", "10") == (Given(100, 50, 900, 10), [])
    with pytest.raises(UserError, match="--images needs --val"):
        asked("--images", "14_000_000")
    with pytest.raises(UserError, match="two labelled images of each class: these are 900, 50, 10, 10"):
        asked("--images", "900", "--val", "50", "--labelled", "10", "--classes", "10")
