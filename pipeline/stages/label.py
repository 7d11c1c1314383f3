"""Keep what a teacher says about a few views of each image, so that students train without it (as TinyViT, Wu et al. 2022)."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from pipeline.errors import UserError
from pipeline.harness import scratch, shards, stage
from pipeline.harness.machine import Machine
from pipeline.learning import labels
from pipeline.learning.labels import Best
from pipeline.learning.teachers import Cached, Online
from pipeline.learning.views import Batch, View
from pipeline.models import architectures, device, inputs, prediction
from pipeline.store import artifact, manifest
from pipeline.store.params import MadeImages, MadeModel, Section

SHARD = 16 * prediction.BATCH  # images; a killed run loses at most one shard
CHECKED = 256  # images, drawn by the seed, that are labelled again from the file alone, and compared
TOLERANCE = 0.05  # of a probability: far more than rounding, for devices and precisions whose logits differ a little


class Label(Section):
    """Who labels what."""

    teacher: MadeModel
    """A model directory."""
    images: MadeImages
    """The images to label (a manifest: `select/top`; with `dedup/pool` the labels serve every selection)."""
    labelled: bool = True
    """Label the labelled images too, their labels unread."""
    views: PositiveInt = 4
    """Views of each image; a training of more passes sees them again."""
    m: PositiveInt = 10
    """How many classes to keep of each, the best; at most all. The others count as one."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """The `loss.temperature` of the students, at which the classes that are not kept are summed; with all kept any will do."""
    view: View = View()
    """How views are cut, by a name in `views`; a student of these labels names an equal one."""


def run(
    params: Label,
    *,
    train: Path,
    teacher: Path,
    chosen: Path,
    out: Path,
    seed: int,
    workdir: Path,
    machine: Machine,
) -> stage.Metrics:
    """Write the teacher's labels of a few views of each image (`pipeline.learning.labels` has the format).

    A `distil` entry whose `teacher` is this artifact, and whose images are among these, replays exactly these views. Shards that
    a killed run has finished are not labelled again. `mean_rest` is what the classes that are not kept have together at the
    temperature, on a sample: where it is large, raise `m`. Raises CheckpointError; UserError, and labels all anew the next time,
    if the check finds another probability than the file holds.
    """
    identities = tuple(artifact.identity(path) for path in (chosen, train, teacher))
    labelling = Labelling(chosen, train, teacher, identities, params, seed, machine)
    expert, pixels, (seen, labelled, _) = labelling.opened()
    folders = shards.finished(labelling, len(seen), SHARD, workdir, machine.executor, "views", "labelling", params.views)
    facts = labels.Facts(
        classes=labelled.classes,
        views=params.views,
        view=params.view,
        seed=seed,
        side=expert.input_spec.canvas_of(params.view.whole),
        size=expert.size,
        training=expert.training,
        temperature=params.temperature,
        precision=expert.on.precision,
    )
    artifact.spent(len(seen) * params.views * architectures.macs(expert.model, expert.size))
    with artifact.writing(out) as tmp:
        labels.write(tmp, [artifact.verify(folder) for folder in folders], facts)
        gap, rest = _gap(expert, Cached(tmp, labelled.classes, seen, expert.on, "eval"), pixels, params, seed)
        if gap > TOLERANCE:
            for folder in folders:
                scratch.remove(folder)
            raise UserError(
                f"the labels of {min(CHECKED, len(seen))} images, made again, differ by up to {gap:.3f} in a probability "
                f"(more than the {TOLERANCE} that is allowed), as where a run is killed on one device and ends on another. "
                "All labels made so far are removed: run the stage again, to make them all in one way."
            )
    return {"images": len(seen), "views": params.views, "largest_gap": gap, "mean_rest": rest}


@dataclass(frozen=True)
class Labelling:
    """What a process needs to label a shard. The identities tell a worker that outlives a run what it has loaded already."""

    chosen: Path
    train: Path
    teacher: Path
    identities: tuple[str, ...]
    params: Label
    seed: int
    machine: Machine

    def opened(self) -> tuple[Online, inputs.OnDisk, manifest.ToLearn]:
        return _opened(self)

    def __call__(self, shard: shards.Rows) -> int:
        """Write the labels of a shard; returns the number of its images."""
        expert, pixels, (seen, labelled, _) = self.opened()
        rows = np.arange(shard.first, shard.last)
        ids, m = seen.table["id"].slice(shard.first, len(rows)), min(self.params.m, len(labelled.classes))
        kept = labels.kept(_logits(expert, pixels, rows, self.params, self.seed), m, self.params.temperature)
        with artifact.writing(shard.folder) as tmp:
            labels.write_part(tmp, ids, kept)
        return len(rows)


@functools.lru_cache(maxsize=1)
def _opened(labelling: Labelling) -> tuple[Online, inputs.OnDisk, manifest.ToLearn]:
    learned = manifest.to_learn(labelling.chosen, labelling.train, labelling.params.labelled)
    expert = Online(labelling.teacher, learned.labelled.classes, device.pick(labelling.machine))
    workers, whole = labelling.machine.cores(labelling.machine.workers), labelling.params.view.whole
    return expert, inputs.OnDisk(learned.seen, expert.input_spec.canvas_of(whole), workers, whole), learned


def _logits(expert: Online, pixels: inputs.OnDisk, rows: np.ndarray, params: Label, seed: int) -> list[Tensor]:
    """The (N, C) logits of each view of `rows`, in batches of one size."""
    views = expert.viewer(expert.size, params.view, seed, inputs.aspects(pixels.manifest))
    by_view: list[list[Tensor]] = [[] for _ in range(params.views)]
    parts = [rows[start : start + prediction.BATCH] for start in range(0, len(rows), prediction.BATCH)]
    full = [np.concatenate([part, np.full(prediction.BATCH - len(part), part[0])]) for part in parts]
    for part, whole, raw in zip(parts, full, inputs.ahead(lambda i: pixels.gather(full[i]), range(len(full))), strict=True):
        canvases = expert.on.batch(raw)
        for number in range(params.views):
            passes = np.full(len(whole), number)
            seen = Batch(views(canvases, whole, passes), whole, passes)
            by_view[number].append(expert.answers(seen)[: len(part)].cpu())
    return [torch.cat(batches) for batches in by_view]


def _gap(expert: Online, cached: Cached, pixels: inputs.OnDisk, params: Label, seed: int) -> tuple[float, float]:
    """The largest difference of a probability between the file and the teacher, at the temperature of the labels, on views made
    anew in another order, where the classes that are not kept count as one; and the mean of what these have."""
    count = min(CHECKED, len(pixels))
    random = np.random.default_rng(seed)
    rows, passes = random.permutation(len(pixels))[:count], random.integers(0, params.views, count)
    aspects = inputs.aspects(pixels.manifest)
    views = cached.viewer(expert.size, params.view, seed, aspects)(expert.on.batch(pixels.gather(rows)), rows, passes)
    batch = Batch(views, rows, passes)
    said, again = cached.answers(batch), expert.answers(batch)
    log_p, log_q = said.cells(again) if isinstance(said, Best) else (said, again.log_softmax(1))
    rest = float(log_p[:, -1].exp().mean()) if isinstance(said, Best) else 0.0
    return float((log_p.exp() - log_q.exp()).abs().max()), rest


if __name__ == "__main__":
    stage.main(run)
