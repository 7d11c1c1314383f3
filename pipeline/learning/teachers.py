"""Where soft labels come from: a network that looks at each view, or a table of what it said about views that can be made again.

The table is an artifact of the stage `label`; `labels` has its format.
"""

from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.learning import labels, views
from pipeline.learning.labels import Best
from pipeline.learning.views import Batch
from pipeline.models import inputs, network, prediction
from pipeline.models.device import Device
from pipeline.store import artifact, manifest


class LabelsError(UserError):
    """Cached soft labels lack images, are of other classes, or were made for other views."""


class Loss(Protocol):
    """What a loss asks of a teacher's answers: a `losses.SoftLoss`, whose formulas make no labels stale."""

    @property
    def name(self) -> str: ...
    @property
    def temperature(self) -> float: ...
    @property
    def standardise(self) -> bool: ...


def read(
    folder: Path,
    classes: tuple[str, ...],
    seen: manifest.Manifest,
    on: Device,
    loss: "Loss",
    statistics: Literal["eval", "batch"] = "eval",
) -> "Online | Cached":
    """The teacher of `folder`, a model directory or cached labels of the images `seen`.

    `loss`: what the answers are for. `statistics`: what a network normalises with, its own or those of each batch. Raises
    CheckpointError, ArtifactError, LabelsError.
    """
    if (folder / labels.FILE).is_file():
        artifact.verify(folder)
        cached = Cached(folder, classes, seen, on, statistics)
        cached.must_do_for(loss)
        return cached
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
    def answers(self, batch: Batch) -> Tensor:
        """(B, C) float32 logits on the device, without gradient; their softmax is what the student is taught."""
        return prediction.forward(self.model, batch.views, self.input_spec, self.on)


class Cached:
    """What a teacher said about V views of each image: training goes through them in turn and meets no other.

    The labels may be of more images than are learned on, as those of a whole pool are for each selection from it. Attributes as
    `Online`'s; no network runs, so the compute of labelling counts for no student.
    """

    def __init__(self, folder: Path, classes: tuple[str, ...], seen: manifest.Manifest, on: Device, statistics: str) -> None:
        ids, kept, facts = labels.read(folder)
        if facts.classes != classes:
            raise LabelsError(f"{folder} has labels of other classes than the training images. Remake it: `dvc repro`.")
        self.at = _places(ids, seen.table["id"])  # N
        if missing := int((self.at < 0).sum()):
            raise LabelsError(
                f"{folder} has labels of {len(ids):,} images, but none of {missing:,} of the {len(seen):,} to learn on. "
                "Its entry of `label` must name `images` that hold them all, and have `labelled` where this one has."
            )
        if statistics != "eval":
            raise LabelsError(f"`teacher_bn: {statistics}` needs a teacher in the loop, but {folder} holds cached labels.")
        self.side, self.size, self.training = facts.side, facts.size, facts.training
        self.seed, self.view, self.views = facts.seed, facts.view, facts.views
        self.count, self.folder, self.on = len(classes), folder, on
        self.networks: list[tuple[nn.Module, int]] = []
        self.classes, self.log_p, self.log_rest = kept  # V, N, m; V, N, m; V, N
        self.temperature, self.m = facts.temperature, kept.log_p.shape[2]
        if self.log_rest is None and self.m < self.count:
            raise LabelsError(f"{folder} does not say what the classes have that it left out. Remake it: `dvc repro`.")

    def must_do_for(self, loss: "Loss") -> None:
        """Raise LabelsError for a loss that needs more than is kept."""
        if self.log_rest is None:
            return
        kept = f"{self.folder} keeps {self.m} of {self.count} classes"
        if loss.temperature != self.temperature:
            raise LabelsError(
                f"`loss.temperature` is {loss.temperature}, but {kept}, and what the others have together is known at "
                f"{self.temperature} alone. Set `temperature: {loss.temperature}` in its entry of `label`."
            )
        if loss.name == "dist" or loss.standardise:
            what = "standardise: true" if loss.standardise else "name: dist"
            raise LabelsError(
                f"`loss: {{{what}}}` looks at all classes, but {kept}. Set `m: {self.count}` in its entry of `label`."
            )

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
        everywhere = np.ones(int(self.at.max(initial=-1)) + 1)  # by the rows of the labels, from which views are drawn
        everywhere[self.at] = aspects
        inner = views.viewer(size, self.view, self.seed, everywhere)
        return lambda raw, rows, passes: inner(raw, self.at[rows], passes % self.views)

    def answers(self, batch: Batch) -> Tensor | Best:
        """(B, C) log-probabilities where all classes are kept, else the best of them."""
        view, rows = batch.passes % self.views, self.at[batch.rows]
        log_p = torch.from_numpy(self.log_p[view, rows]).float().to(self.on.device)  # B, m
        best = torch.from_numpy(self.classes[view, rows].astype(np.int64)).to(self.on.device)
        if self.log_rest is None:
            return torch.empty_like(log_p).scatter_(1, best, log_p)
        return Best(best, log_p, torch.from_numpy(self.log_rest[view, rows]).to(self.on.device), self.temperature)


def _places(labelled: pa.ChunkedArray, seen: pa.ChunkedArray) -> np.ndarray:
    """(N,) int64: where each of the ids `seen` stands among those `labelled`; -1 where it does not."""
    if labelled.equals(seen):
        return np.arange(len(seen))
    return np.asarray(pc.fill_null(pc.index_in(seen, value_set=labelled), -1).to_numpy().astype(np.int64))


def _frozen(model: nn.Module, statistics: str) -> nn.Module:
    model.eval().requires_grad_(False)
    if statistics == "eval":
        return prediction.folded(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_var = None  # torch then uses the batch's, also in eval mode
    return model
