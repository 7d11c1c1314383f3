"""An ensemble is the mean of its members' probabilities, wherever a model can stand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.models import checkpoint, inputs, network
from pipeline.stages import ensemble
from pipeline.store import artifact
from tests.tiny import distilled

CLASSES = ("ant", "bee", "cat")
ARCHS: list[tuple[str, dict[str, Any], inputs.Input]] = [
    ("resnet8", {"width": 4}, inputs.Input(size=16, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))),
    ("resnet14", {"width": 4, "shortcut": "B"}, inputs.Input(size=16, canvas=20)),
    ("resnet8", {"width": 6}, inputs.Input(size=24)),
]


@pytest.fixture
def members(tmp_path: Path) -> list[Path]:
    folders = []
    for i, (arch, options, given) in enumerate(ARCHS):
        section = network.Network(arch=arch, input=given, options=options)
        model, description = network.start(section, Path("scratch"), CLASSES, seed=i)
        with artifact.writing(tmp_path / f"m{i}") as tmp:
            checkpoint.save(tmp, model, description.trained(10, 8, 100, 50 * i, "a" if i else None, macs=7), {})
        folders.append(tmp_path / f"m{i}")
    return folders


def of_two(first: Path, second: Path, out: Path) -> Path:
    ensemble.run(ensemble.Ensemble(first="-", second="-"), first=first, second=second, out=out)
    return out


@torch.no_grad()
def probabilities(folder: Path, views: torch.Tensor) -> torch.Tensor:
    model, _, given = network.load(folder, CLASSES)
    return model.eval()(inputs.normalise(views, given)).softmax(1)


def test_three_models_count_the_same(members: list[Path], tmp_path: Path) -> None:
    three = of_two(members[0], of_two(members[1], members[2], tmp_path / "two"), tmp_path / "three")
    views = 255 * torch.rand(5, 3, 24, 24)
    expected = torch.stack([probabilities(folder, views) for folder in members]).mean(0)
    assert torch.allclose(probabilities(three, views), expected, atol=1e-4)
    found = checkpoint.describe(three)
    assert found.training == {"steps": 30, "macs": 3 * 560, "batch": 8, "labelled": 100, "unlabelled": 100, "note": "a"}
    assert (found.input.size, found.input.side, found.input.canvas) == (24, 24, 20)


def test_an_ensemble_can_teach(members: list[Path], data: Path, tmp_path: Path) -> None:
    two = of_two(members[0], members[1], tmp_path / "two")
    metrics = distilled(data, tmp_path / "student", two)
    assert metrics["steps"] == 4


def test_members_of_other_classes_are_refused(members: list[Path], tmp_path: Path) -> None:
    section = network.Network(arch="resnet8", input=inputs.Input(size=16))
    model, description = network.start(section, Path("scratch"), ("x", "y"), seed=0)
    with artifact.writing(tmp_path / "other") as tmp:
        checkpoint.save(tmp, model, description, {})
    with pytest.raises(checkpoint.CheckpointError, match="knows the classes x, y"):
        of_two(members[0], tmp_path / "other", tmp_path / "out")
