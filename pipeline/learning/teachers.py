"""Where soft labels come from: a network that looks at each view, or a table of what it said about views that can be made again.

The table is an artifact of the stage `label`; `labels` has its format.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.learning import labels, views
from pipeline.learning.views import Batch
from pipeline.models import inputs, network, prediction
from pipeline.models.device import Device
from pipeline.store import artifact, manifest


class LabelsError(UserError):
    """Cached soft labels are of other images or other classes, or were made for other views."""


def read(
    folder: Path, classes: tuple[str, ...], seen: manifest.Manifest, on: Device, statistics: Literal["eval", "batch"] = "eval"
) -> "Online | Cached":
    """The teacher of `folder`, a model directory or cached labels of the images `seen`.

    `statistics`: what a network normalises with, its own or those of each batch. Raises CheckpointError, ArtifactError,
    LabelsError.
    """
    if (folder / labels.FILE).is_file():
        artifact.verify(folder)
        return Cached(folder, classes, seen, on, statistics)
    return Online(folder, classes, on, statistics)


class Online:
    """A network in the loop, in memory only: no parent's `.train()` reaches it, and nothing of it is saved.

    `size` is that of the views it needs, `training` says how it came about, `networks` (each with its input
    size) run beside the student. `view` is the one to train on where params name none.
    """

    def __init__(self, folder: Path, classes: tuple[str, ...], on: Device, statistics: str = "eval") -> None:
        model, description, self.input_spec = network.load(folder, classes)
        self.size, self.training = self.input_spec.size, description.training
        self.model, self.on = on.place(_frozen(model, statistics)), on
        self.networks, self.view = [(self.model, self.size)], views.View()

    def canvas(self, student: inputs.Input, whole: bool) -> int:
        """The side of the canvases that the views are cut from; `whole`: see `inputs.load`."""
        return max(student.canvas_of(whole), self.input_spec.canvas_of(whole))

    def viewer(self, size: int, view: views.View, seed: int, aspects: np.ndarray, mix: views.Mix | None = None) -> views.Views:
        """The views of `size` pixels of a training; `aspects`: (N,) width over height of the images."""
        return views.viewer(size, view, seed, aspects, mix)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """(B, C) float32 on the device, without gradient; their softmax is what the student is taught."""
        return prediction.forward(self.model, batch.views, self.input_spec, self.on)


class Cached:
    """What a teacher said about V views of each image: training goes through them in turn and meets no other.

    Attributes as `Online`'s; no network runs, so the compute of labelling counts for no student.
    """

    def __init__(self, folder: Path, classes: tuple[str, ...], seen: manifest.Manifest, on: Device, statistics: str) -> None:
        kept = labels.read(folder)
        facts = kept.facts
        if facts.classes != classes:
            raise LabelsError(f"{folder} has labels of other classes than the training images. Remake it: `dvc repro`.")
        if not kept.ids.equals(seen.table["id"]):
            raise LabelsError(
                f"{folder} has labels of {len(kept.ids):,} images, which are not the {len(seen):,} to learn on. "
                "Its entry of `label` must name the same `images`, and the same `labelled`."
            )
        if statistics != "eval":
            raise LabelsError(f"`teacher_bn: {statistics}` needs a teacher in the loop, but {folder} holds cached labels.")
        self.side, self.size, self.training = facts.side, facts.size, facts.training
        self.seed, self.view, self.views = facts.seed, facts.view, facts.views
        self.count, self.folder, self.on = len(classes), folder, on
        self.networks: list[tuple[nn.Module, int]] = []
        self.classes, self.log_p = kept.classes, kept.log_p  # N, V, m

    def canvas(self, student: inputs.Input, whole: bool) -> int:
        """Always that of the labels: from another one the same draws make other views."""
        return self.side

    def viewer(self, size: int, view: views.View, seed: int, aspects: np.ndarray, mix: views.Mix | None = None) -> views.Views:
        """The labelled views, in turns (see `Online.viewer`). Raises LabelsError for any others."""
        if view != self.view:
            raise LabelsError(f"`view` is not the one that {self.folder} was made for: name that one.")
        if mix:
            raise LabelsError(f"`mix` makes views that nobody has labelled: {self.folder} holds labels of single images.")
        if size != self.size:
            raise LabelsError(f"the student takes {size} pixels, the labels of {self.folder} are of views of {self.size}.")
        inner = views.viewer(size, self.view, self.seed, aspects)
        return lambda raw, rows, passes: inner(raw, rows, passes % self.views)

    def logits(self, batch: Batch) -> Tensor:
        """Log-probabilities; what the m best classes leave is spread evenly over the others."""
        view = batch.passes % self.views
        log_p = torch.from_numpy(self.log_p[batch.rows, view]).float()  # B, m
        best = torch.from_numpy(self.classes[batch.rows, view].astype(np.int64))
        left = (1 - log_p.exp().sum(1, keepdim=True)).clamp_min(1e-9) / max(1, self.count - log_p.shape[1])
        return left.log().repeat(1, self.count).scatter_(1, best, log_p).to(self.on.device)


def _frozen(model: nn.Module, statistics: str) -> nn.Module:
    model.eval().requires_grad_(False)
    if statistics == "eval":
        return prediction.folded(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_var = None  # torch then uses the batch's, also in eval mode
    return model
