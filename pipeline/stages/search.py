"""The costly half of the leak check: which images are copies of which, with the evidence; `dedup` decides what goes."""

from pathlib import Path

import pyarrow.compute as pc

from pipeline.harness import stage
from pipeline.harness.machine import Machine
from pipeline.leaks import findings
from pipeline.leaks.search import Search, search
from pipeline.store import artifact, manifest


def run(
    params: Search, *, pool: Path, val: Path, holdout: Path, train: Path, out: Path, workdir: Path, machine: Machine
) -> stage.Metrics:
    """Search the pool for copies of validation, held-out and labelled images, and these for copies of each other.

    `out`: `findings.parquet`, one row for each pair that may be one, with what was measured (docs/dedup.md). Nothing is decided
    here, so a change of mind, of strictness or of `overrides.csv` does not repeat the search.
    """
    sets = {"val": manifest.read(val), "holdout": manifest.read(holdout)}
    sets |= {"train": manifest.read(train)} if params.train else {}
    images = manifest.read(pool)
    found = search(images, sets, params.duplicates, workdir, machine)
    names = list(sets)
    relations = [f"{name}-{other}" for i, name in enumerate(names) for other in names[: i + 1]]
    relations += [f"pool-{name}" for name in [*names, *(["pool"] if params.duplicates else [])]]
    with artifact.writing(out) as tmp:
        findings.write_found(tmp, found, relations)
    outcomes = pc.value_counts(found["outcome"]).to_pylist()
    counts = {"images": len(images), "reference": sum(map(len, sets.values()))}
    return counts | dict.fromkeys(("copy", "review", "alike", "unverifiable"), 0) | {o["values"]: o["counts"] for o in outcomes}


if __name__ == "__main__":
    stage.main(run)
