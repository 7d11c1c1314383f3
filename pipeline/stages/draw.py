"""Draw the built-in data set: labelled and validation scenes, and a pool that hides what a real pool hides."""

import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.harness import progress, stage
from pipeline.harness.machine import Machine
from pipeline.scenes.dataset import LABELLED, TRUTH, VAL, Draw, File, draw_all, pictures_of, pool_contents, truth_row, write_tar
from pipeline.store import artifact


def run(params: Draw, *, out: Path, truth_out: Path, machine: Machine) -> stage.Metrics:
    """Draw the built-in data set: `labelled.tar`, `val.tar`, `pool-00.tar`, ... and, apart from them, the truth."""
    labelled = [File("labelled.tar", *row) for row in pictures_of(LABELLED, params.labelled)]
    val = [File("val.tar", *row) for row in pictures_of(VAL, params.val)]
    contents = enumerate(pool_contents(params))
    pool = [File(f"pool-{i // params.members:02d}.tar", f"img/{i:06d}.jpg", content) for i, content in contents]
    files = labelled + val + pool
    with artifact.writing(truth_out) as truth_tmp, artifact.writing(out) as tmp:
        pq.write_table(pa.Table.from_pylist([truth_row(file) for file in pool], TRUTH), truth_tmp / "truth.parquet")
        drawn = draw_all(files, params, machine.cores(machine.workers))
        shown = progress.track(drawn, total=len(files), unit="images", label="draw")
        for tar, members in itertools.groupby(shown, key=lambda row: row[0].tar):
            write_tar(tmp / tar, ((file.member, data) for file, data in members))
    return {"labelled": len(labelled), "val": len(val), "pool": len(pool)}


if __name__ == "__main__":
    stage.main(run)
