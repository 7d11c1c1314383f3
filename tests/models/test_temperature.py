"""A model trained at a low temperature is read at it, wherever it is read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.models import architectures, checkpoint, inputs, network, prediction
from pipeline.models.checkpoint import CheckpointError, Description
from pipeline.models.device import Device
from pipeline.report.measure import calibrate
from pipeline.stages import ensemble
from pipeline.store import artifact

CLASSES = ("ant", "bee", "cat")
COLD = 0.1


def saved(folder: Path, options: dict[str, Any], temperature: float) -> Path:
    torch.manual_seed(1)
    model = architectures.create("resnet8", 3, options)
    description = Description("resnet8", CLASSES, inputs.Input(size=16), options, temperature=temperature)
    with artifact.writing(folder) as tmp:
        checkpoint.save(tmp, model, description, {})
    return folder


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("options", [{"width": 4}, {"width": 4, "head_layers": 1}, {"width": 4, "exits": 1}])
def test_a_loaded_network_answers_at_temperature_one(tmp_path: Path, options: dict[str, Any], x: torch.Tensor) -> None:
    plain, _, _ = network.load(saved(tmp_path / "a", options, 1.0), CLASSES)
    cold, description, _ = network.load(saved(tmp_path / "b", options, COLD), CLASSES)
    assert torch.allclose(cold.eval()(x), plain.eval()(x) / COLD, rtol=1e-4)
    assert description.temperature == 1


@torch.no_grad()
def test_every_exit_answers_at_temperature_one(tmp_path: Path, x: torch.Tensor) -> None:
    plain, cold = (network.load_exits(saved(tmp_path / str(t), {"width": 4, "exits": "all"}, t), CLASSES) for t in (1.0, COLD))
    assert plain is not None
    assert cold is not None
    for a, b in zip(plain.eval()(x).logits, cold.eval()(x).logits, strict=True):
        assert torch.allclose(a / COLD, b, rtol=1e-4)


def test_training_goes_on_from_the_stored_logits(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", {"width": 4}, COLD)
    model, description = network.start(None, folder, CLASSES, 0)
    assert torch.equal(model.state_dict()["linear.weight"], checkpoint.weights(folder)["linear.weight"])
    assert description.temperature == COLD
    assert network.start(None, folder, ("x", "y"), 0)[1].temperature == 1  # another classifier


@torch.no_grad()
def test_an_ensemble_is_the_mean_of_what_its_members_say_at_their_temperatures(tmp_path: Path, x: torch.Tensor) -> None:
    members = [saved(tmp_path / str(t), {"width": 4}, t) for t in (1.0, COLD)]
    out = tmp_path / "both"
    ensemble.run(ensemble.Ensemble(first="-", second="-"), first=members[0], second=members[1], out=out)
    both, _, _ = network.load(out, CLASSES)
    given = inputs.Input(size=16)
    first, second = (network.load(m, CLASSES)[0].eval()(inputs.normalise(255 * x, given)).softmax(1) for m in members)
    assert torch.allclose(both.eval()(x).exp(), (first + second) / 2, atol=1e-5)
    assert json.loads((out / "model.json").read_text())["temperature"] == 1


def test_the_temperature_of_a_training() -> None:
    before = Description("resnet8", CLASSES, inputs.Input(size=16), temperature=0.5)
    assert [network.trained_at(before, t).temperature for t in (0.1, 1.0, 4.0)] == [0.1, 1.0, 1.0]
    with pytest.raises(CheckpointError, match="an ensemble can only be trained at 1"):
        network.trained_at(replace(before, arch="ensemble"), 0.1)


def test_the_check_of_a_training_reads_at_the_temperature() -> None:
    torch.manual_seed(0)
    model = architectures.create("resnet8", 3, {"width": 4})
    pixels = inputs.InMemory(torch.randint(0, 256, (9, 16, 16, 3), dtype=torch.uint8).numpy())
    labels, given, on = np.arange(9) % 3, inputs.Input(size=16), Device(torch.device("cpu"), torch.float32)
    measured = prediction.checker(pixels, labels, given, on, COLD)(model)
    ((_, logits),) = prediction.logits(model, pixels, given, on)
    wanted = torch.nn.functional.cross_entropy(logits / COLD, torch.from_numpy(labels))
    assert measured["nll"] == pytest.approx(float(wanted))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_calibration_finds_the_temperature_that_labels_were_drawn_at(temperature: float) -> None:
    random = torch.Generator().manual_seed(0)
    logits = {name: 2 * torch.randn(20_000, 5, generator=random) for name in ("val", "holdout")}
    labels = {name: s.softmax(1).multinomial(1, generator=random)[:, 0] for name, s in logits.items()}
    found = calibrate({name: temperature * s for name, s in logits.items()}, labels, tuple("abcde"))
    assert found.temperature == pytest.approx(temperature, rel=0.03)
    assert found.val_ece < 0.02
    assert found.val_nll == pytest.approx(float(torch.nn.functional.cross_entropy(logits["val"], labels["val"])), rel=0.01)
