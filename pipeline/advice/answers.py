"""What a model directory answers about the images of a manifest."""

from pathlib import Path

import numpy as np
import torch

from pipeline.harness.machine import Machine
from pipeline.models import device, inputs, network, prediction
from pipeline.store.manifest import Manifest


def logits(model: Path, classes: tuple[str, ...], images: Manifest, machine: Machine, label: str) -> np.ndarray:
    """(N, C) float32, in float32 and at temperature 1, of the central squares. Raises CheckpointError for other classes."""
    on = device.pick(machine.model_copy(update={"precision": "float32"}))
    net, _, given = network.load(model, classes)
    pixels = inputs.load(images, given.side, machine, label)
    answers = [batch for _, batch in prediction.logits(on.place(net), pixels, given, on)]
    return torch.cat(answers).numpy() if answers else np.zeros((0, len(classes)), np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    """(N, C) probabilities, float32."""
    return torch.from_numpy(logits).softmax(1).numpy()
