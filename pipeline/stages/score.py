"""Let a teacher look at every image of the pool: its m best classes, with float32 logits."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import PositiveInt
from torch import nn

from pipeline import artifact, device, images, manifest, network, predict, progress, stage
from pipeline.errors import UserError
from pipeline.params import Machine, Section

SHARD = 64 * predict.BATCH  # images; a killed run loses at most one shard


class Score(Section):
    """`teacher`: a model directory (read by dvc.yaml). `m`: how many classes to keep of each image, at most all."""

    teacher: str
    m: PositiveInt = 10


def run(params: Score, *, pool: Path, train: Path, teacher: Path, out: Path, scratch: Path, machine: Machine) -> stage.Metrics:
    """Write `scores.parquet`, row for row the pool's manifest: `class_i` uint16, `logit_i` float32 (best first), `logsumexp`
    float32.

    logit_i - logsumexp is the log-probability; it still tells images apart whose probabilities both round to 1. Shards that a
    killed run has finished are not scored again. Raises CheckpointError if the teacher's classes are not the training set's.
    """
    unlabelled, classes = manifest.read(pool), manifest.read(train).classes
    if not len(unlabelled):
        raise UserError(
            f"{pool} holds no image: there is nothing to score. Look into data/prepare/quarantine and data/dedup/leaks."
        )
    on = device.pick(machine)
    model, _, given = network.load(teacher, classes)
    model = on.place(predict.folded(model))
    pixels = images.OnDisk(unlabelled, given.side, machine.cores(machine.workers))
    shards = []
    with progress.bar(len(unlabelled), "images", "scoring") as shown:
        for first in range(0, len(unlabelled), SHARD):
            rows = np.arange(first, min(first + SHARD, len(unlabelled)))
            shards.append(scratch / f"{first:012}")
            if not shards[-1].exists():
                table = _shard(model, pixels, given, on, rows, min(params.m, len(classes)))
                with artifact.writing(shards[-1]) as tmp:
                    pq.write_table(table, tmp / "scores.parquet")
            shown.update(len(rows))
    facts = {"classes": json.dumps(classes), "manifest": artifact.identity(pool)}
    sure = 0.0
    with artifact.writing(out) as tmp:
        schema = pq.read_schema(shards[0] / "scores.parquet").with_metadata(facts)
        with pq.ParquetWriter(tmp / "scores.parquet", schema, compression="zstd") as writer:
            for shard in shards:
                table = pq.read_table(artifact.verify(shard) / "scores.parquet")
                sure += float(np.exp(table["logit_0"].to_numpy() - table["logsumexp"].to_numpy()).sum(dtype=np.float64))
                writer.write_table(table.replace_schema_metadata(facts))
    return {"images": len(unlabelled), "classes": len(classes), "mean_top_probability": sure / len(unlabelled)}


def _shard(model: nn.Module, pixels: images.Pixels, given: images.Input, on: device.Device, rows: np.ndarray, m: int) -> pa.Table:
    logits = torch.cat([batch for _, batch in predict.logits(model, pixels, given, on, rows)])
    best, order = logits.sort(dim=1, descending=True, stable=True)  # stable: of equal logits the lower class first
    columns = {f"class_{i}": order[:, i].numpy().astype(np.uint16) for i in range(m)}
    columns |= {f"logit_{i}": best[:, i].numpy() for i in range(m)}
    return pa.table({**columns, "logsumexp": logits.logsumexp(1).numpy()})


if __name__ == "__main__":
    stage.main(run)
