"""The leak check: which images are copies of validation images, proof for each, and the pool and labelled set without them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.harness import stage
from pipeline.harness.machine import Machine
from pipeline.leaks import findings
from pipeline.leaks.decision import ALIKE, Dedup, decide, one_per_copy, read_overrides
from pipeline.leaks.findings import Row
from pipeline.leaks.gallery import page
from pipeline.leaks.search import Search
from pipeline.store import artifact, manifest
from pipeline.store.manifest import Manifest


def run(
    params: Dedup,
    *,
    pool: Path,
    val: Path,
    train: Path,
    overrides: Path,
    pool_out: Path,
    train_out: Path,
    leaks_out: Path,
    gallery_out: Path,
    workdir: Path,
    machine: Machine,
) -> stage.Metrics:
    """Remove from the pool every image that is a copy of a validation image.

    `train_out`: the labelled images, without copies of validation images if `params.train` asks for it. Where none goes it
    is the artifact `train` byte for byte, so that nothing trained on it is stale when only the pool's findings change.
    `leaks_out`: `leaks.parquet`, one row per finding (docs/dedup.md). `gallery_out`: the findings as a page to look at.
    `overrides`: a CSV of id, action (keep or remove) and reason, by which a person has the last word.
    """
    sets = {"pool": manifest.read(pool), "train": manifest.read(train), "val": manifest.read(val)}
    decisions = read_overrides(overrides, sets)
    search = Search(sets, workdir, machine)
    collapse = params.duplicates == "collapse"
    if collapse:
        search.describe("pool")
    audits = [search.find("pool", "val", ALIKE.get(params.strictness))]
    if params.train != "skip":
        audits.append(search.find("train", "val"))
    if collapse:
        audits.append(one_per_copy(search.find("pool", "pool"), sets["pool"]))
    audit = decide(pa.concat_tables([*audits, search.unverifiable("val")]), params, decisions)
    kept = {name: _kept(sets[name], audit, name) for name in ("pool", "train")}
    with artifact.writing(pool_out) as tmp:
        manifest.write(tmp, kept["pool"].table, sets["pool"].classes)
    if len(kept["train"]) == len(sets["train"]):
        artifact.copy(train, train_out)
    else:
        _check_classes(sets["train"], kept["train"])
        with artifact.writing(train_out) as tmp:
            manifest.write(tmp, kept["train"].table, sets["train"].classes)
    with artifact.writing(leaks_out) as tmp:
        findings.write(tmp, audit)
    with artifact.writing(gallery_out) as tmp:
        (tmp / "index.html").write_text(page(audit, sets))
    return _metrics(audit, len(sets["pool"]), len(kept["pool"]), len(sets["train"]) - len(kept["train"]))


def _kept(images: Manifest, audit: pa.Table, name: str) -> Manifest:
    gone = audit.filter(pc.and_(pc.starts_with(audit["relation"], f"{name}-"), pc.invert(audit["kept"])))["id"]
    stays = pc.invert(pc.is_in(images.table["id"], gone.combine_chunks()))
    return Manifest(images.table.filter(stays), images.classes)


def _check_classes(before: Manifest, after: Manifest) -> None:
    """A class whose every labelled image goes would be lost in silence."""
    counts = [np.bincount(images.labels(), minlength=len(before.classes)) for images in (before, after)]
    lost = [before.classes[i] for i in np.flatnonzero((counts[0] > 0) & (counts[1] == 0))]
    if lost:
        raise UserError(
            f"dedup.train is `remove`, and every labelled image of {', '.join(lost)} would go. Set `dedup.train: report`, look "
            "at data/dedup/gallery/index.html, and give those that shall stay a line in data/overrides.csv."
        )


def _metrics(audit: pa.Table, images: int, kept: int, train_removed: int) -> Row:
    """Distinct images by outcome; an image counts once, by its strongest outcome."""

    def distinct(relation: str, outcome: str, without: Sequence[str] = ()) -> set[str]:
        where = pc.and_(pc.equal(audit["relation"], relation), pc.equal(audit["outcome"], outcome))
        return set(audit["id"].filter(where).to_pylist()).difference(*(distinct(relation, other) for other in without))

    leaks = audit.filter(pc.and_(pc.equal(audit["relation"], "pool-val"), pc.equal(audit["outcome"], "removed")))
    return {
        "pool": images,
        "kept": kept,
        "removed": len(distinct("pool-val", "removed")),
        "review": len(distinct("pool-val", "review", ["removed"])),
        "unverifiable": len(distinct("pool-val", "unverifiable", ["removed", "review"])),
        "alike": len(distinct("pool-val", "alike", ["removed"])),
        "duplicates": len(distinct("pool-pool", "removed")),
        "overrides": len(set(audit["id"].filter(pc.is_valid(audit["override"])).to_pylist())),
        "val_with_a_leak": len(set(leaks["match_id"].drop_null().to_pylist())),
        "val_unverifiable": len(distinct("val", "unverifiable")),
        "train_copies": len(distinct("train-val", "removed")),
        "train_review": len(distinct("train-val", "review", ["removed"])),
        "train_removed": train_removed,
    }


if __name__ == "__main__":
    stage.main(run)
