"""What a training leaves behind: a network, its history, and the model directory made of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from pipeline.models import architectures, checkpoint
from pipeline.models.checkpoint import Description
from pipeline.store import artifact


class Counts(NamedTuple):
    """The images that a training went through; how many of them, or of its teacher's, taught their label; how many had none.

    The held-out images, on which choices are made, are in none of these numbers.
    """

    images: int
    labelled: int
    unlabelled: int = 0


@dataclass(frozen=True)
class Trained:
    """A network after `steps` of `batch` images, as it is measured on the held-out images: `top1` in 0..1 and others.

    `history`: by `train` and `holdout`, a list of the figures at each measurement.
    """

    model: nn.Module
    history: dict[str, Any]
    measured: Mapping[str, float]
    steps: int = 0
    batch: int = 0

    def save(
        self,
        folder: Path,
        description: Description,
        counts: Counts,
        note: str | None,
        *,
        frozen: Sequence[tuple[nn.Module, int]] = (),
        macs: int | None = None,
        part: nn.Module | None = None,
    ) -> dict[str, Any]:
        """Write the model directory into the artifact being written at `folder`; returns the metrics of the stage.

        `description`: of the network at its start. `frozen`: the networks that ran beside it, with their input sizes. `macs`: of
        an image of a step, where that does not follow from them. `part`: what to write, if not all of the network.
        """
        if macs is None:
            macs = architectures.macs_of_training(self.model, description.input.size, *frozen)
        artifact.spent(self.steps * self.batch * macs)
        after = description.trained(self.steps, self.batch, counts.labelled, counts.unlabelled, note, macs=macs)
        checkpoint.save(folder, part or self.model, after, self.history)
        facts = {"steps": self.steps, "images": counts.images, "parameters": architectures.parameters_of(self.model)}
        return facts | {f"holdout_{name}": value for name, value in self.measured.items()}
