"""Let a teacher look at every image of the pool, and at the held-out ones: its m best classes, with float32 logits."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import PositiveInt
from torch import nn

from pipeline.errors import UserError
from pipeline.harness import shards, stage
from pipeline.harness.machine import Machine
from pipeline.models import architectures, device, inputs, network, prediction
from pipeline.store import artifact, manifest, scores
from pipeline.store.params import MadeModel, Section

SHARD = 64 * prediction.BATCH  # images; a killed run loses at most one shard


class Score(Section):
    """Who scores the pool."""

    teacher: MadeModel
    """A model directory."""
    m: PositiveInt = 10
    """How many classes to keep of each image, the best; at most all."""


def run(
    params: Score, *, pool: Path, train: Path, holdout: Path, teacher: Path, out: Path, workdir: Path, machine: Machine
) -> stage.Metrics:
    """Write the scores of the pool's images, row for row its manifest, and of the held-out ones (`pipeline.store.scores` has the
    format).

    Shards that a killed run has finished are not scored again. Raises CheckpointError if the teacher's classes are not the
    training set's.
    """
    classes = manifest.read(train).classes
    scoring = Scoring(pool, artifact.identity(pool), teacher, artifact.identity(teacher), classes, params.m, machine)
    model, pixels, input_spec, on = scoring.opened()  # a teacher that does not fit is found here, not by a worker
    count = len(pixels)
    if not count:
        raise UserError(
            f"{pool} holds no image: there is nothing to score. Look into data/prepare/quarantine and data/dedup/leaks."
        )
    folders = shards.finished(scoring, count, SHARD, workdir, machine.executor, "images", "scoring")
    sure = 0.0
    held = manifest.read(holdout)
    artifact.spent((count + len(held)) * architectures.macs(model, input_spec.size))
    seen = inputs.OnDisk(held, input_spec.side, machine.cores(machine.workers))
    with (
        artifact.writing(out) as tmp,
        scores.writer(tmp, scoring.stored, classes, scoring.pool_identity, on.precision) as writer,
    ):
        for folder in folders:
            table = pq.read_table(artifact.verify(folder) / scores.FILE)
            top = np.exp(table["logit_0"].to_numpy() - table[scores.LOGSUMEXP].to_numpy())
            sure += float(top.sum(dtype=np.float64))
            writer.write_table(table)
        scores.write_held(tmp, _scores(model, seen, input_spec, on, np.arange(len(held)), scoring.stored), held.labels())
    return {"images": count, "classes": len(classes), "mean_top_probability": sure / count}


@dataclass(frozen=True)
class Scoring:
    """What a process needs to score a shard. The identities tell a worker that outlives a run what it has loaded already."""

    pool: Path
    pool_identity: str
    teacher: Path
    teacher_identity: str
    classes: tuple[str, ...]
    m: int
    machine: Machine

    @property
    def stored(self) -> int:
        """How many classes of each image are kept."""
        return min(self.m, len(self.classes))

    def opened(self) -> tuple[nn.Module, inputs.Pixels, inputs.Input, device.Device]:
        return _opened(self)

    def __call__(self, shard: shards.Rows) -> int:
        """Write the scores of a shard; returns the number of its images."""
        model, pixels, input_spec, on = self.opened()
        rows = np.arange(shard.first, shard.last)
        with artifact.writing(shard.folder) as tmp:
            pq.write_table(_scores(model, pixels, input_spec, on, rows, self.stored), tmp / scores.FILE)
        return len(rows)


@functools.lru_cache(maxsize=1)
def _opened(scoring: Scoring) -> tuple[nn.Module, inputs.Pixels, inputs.Input, device.Device]:
    on = device.pick(scoring.machine)
    model, _, input_spec = network.load(scoring.teacher, scoring.classes)
    pixels = inputs.OnDisk(manifest.read(scoring.pool), input_spec.side, scoring.machine.cores(scoring.machine.workers))
    return on.place(prediction.folded(model)), pixels, input_spec, on


def _scores(
    model: nn.Module, pixels: inputs.Pixels, input_spec: inputs.Input, on: device.Device, rows: np.ndarray, m: int
) -> pa.Table:
    if not len(rows):
        return scores.schema(m).empty_table()
    logits = torch.cat([batch for _, batch in prediction.logits(model, pixels, input_spec, on, rows)])
    best, order = logits.sort(dim=1, descending=True, stable=True)  # stable: of equal logits the lower class first
    return scores.table(order[:, :m].numpy(), best[:, :m].numpy(), logits.logsumexp(1).numpy())


if __name__ == "__main__":
    stage.main(run)
