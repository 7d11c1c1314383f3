"""A network that whitens patches takes their statistics from the images that it is first trained on."""

from pathlib import Path

import torch

from pipeline.models import checkpoint, network
from tests.tiny import CLASSES, SCRATCH, distilled, self_distilled, taught

TINY = {"arch": "airbench", "options": {"widths": [8, 12, 12]}, "input": {"size": 16}}


def test_training_whitens_a_new_network_once(data: Path, tmp_path: Path) -> None:
    first = taught(data, tmp_path / "first", model=TINY)
    before = checkpoint.weights(first)
    assert before["conv1.whitened"] == 1
    model, _ = network.start(network.Network.model_validate(TINY), SCRATCH, tuple(CLASSES), 0)
    assert not torch.allclose(before["conv1.weight"], model.state_dict()["conv1.weight"])
    distilled(data, tmp_path / "tuned", first, init_path=first)  # other images, the pool's
    assert torch.equal(checkpoint.weights(tmp_path / "tuned")["conv1.weight"], before["conv1.weight"])
    again = taught(data, tmp_path / "again", model=TINY)
    assert all(torch.equal(tensor, before[name]) for name, tensor in checkpoint.weights(again).items())


def test_a_network_with_exits_is_whitened_too(data: Path, tmp_path: Path) -> None:
    metrics = self_distilled(data, tmp_path / "byot", model=TINY)
    assert {"holdout_top1", "holdout_top1_exit1", "holdout_top1_exit2"} <= metrics.keys()
    assert checkpoint.weights(tmp_path / "byot")["trunk.conv1.whitened"] == 1
