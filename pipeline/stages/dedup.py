"""The decisions of the leak check: which of the images that `search` found go, and the pool and the other sets without them."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.harness import stage
from pipeline.harness.machine import Machine
from pipeline.leaks import decision, findings, gallery
from pipeline.leaks.decision import Dedup
from pipeline.leaks.findings import Row
from pipeline.store import artifact, manifest
from pipeline.store.manifest import Manifest


def run(
    params: Dedup,
    *,
    found: Path,
    pool: Path,
    val: Path,
    holdout: Path,
    train: Path,
    overrides: Path,
    pool_out: Path,
    holdout_out: Path,
    train_out: Path,
    leaks_out: Path,
    gallery_out: Path,
    machine: Machine,
) -> stage.Metrics:
    """Remove from the pool every image that is a copy of a validation, held-out or labelled image.

    `train_out`, `holdout_out`: those images, without copies of images that measure if the params ask for it. Where none goes it
    is the artifact `train` or `holdout` byte for byte: nothing made from it is stale when only the pool's findings change.
    `leaks_out`: `leaks.parquet`, one row per finding, and `val_copies.parquet`, where the copies of validation images are
    (docs/dedup.md). `gallery_out`: a page in which a person decides about the findings. `overrides`: a CSV of
    id, action (keep or remove) and reason, by which a person has the last word.
    """
    sources = {"pool": pool, "train": train, "holdout": holdout, "val": val}
    sets = {name: manifest.read(source) for name, source in sources.items()}
    decisions = decision.read_overrides(overrides, sets)
    rows, searched = findings.read_found(artifact.verify(found))
    _check_searched(params, searched)
    audit = decision.decide(rows, params, decisions, sets)
    kept = {name: _kept(sets[name], audit, name) for name in decision.REMOVABLE}
    for name, out in (("pool", pool_out), ("train", train_out), ("holdout", holdout_out)):
        if name != "pool" and len(kept[name]) == len(sets[name]):
            artifact.copy(sources[name], out)
            continue
        if name != "pool":
            _check_classes(name, sets[name], kept[name])
        with artifact.writing(out) as tmp:
            manifest.write(tmp, kept[name].table, sets[name].classes)
    metrics = _metrics(audit, sets, kept)
    warnings = decision.warnings(metrics, params.model_dump())
    with artifact.writing(leaks_out) as tmp:
        findings.write(tmp, audit)
        findings.write_val_copies(tmp, decision.val_copies(audit), searched)
    with artifact.writing(gallery_out) as tmp:
        search, workers = artifact.identity(found), machine.cores(machine.workers)
        gallery.write(tmp, audit, sets, params, decisions, warnings, search, workers)
    for sentence in warnings:
        sys.stderr.write(f"LEAK: {sentence}\n")
    return metrics | {"warnings": warnings or None}


def _check_searched(params: Dedup, searched: set[str]) -> None:
    for param, wanted, needs in (("duplicates", "collapse", "pool-pool"), ("train", "remove", "train-val")):
        if getattr(params, param) == wanted and needs not in searched:
            raise UserError(f"`dedup.{param}` is `{wanted}`, but nothing looked for such copies. Set `search.{param}: true`.")


def _kept(images: Manifest, audit: pa.Table, name: str) -> Manifest:
    of = pc.or_(pc.equal(audit["relation"], name), pc.starts_with(audit["relation"], f"{name}-"))
    gone = audit.filter(pc.and_(of, pc.invert(audit["kept"])))["id"]
    stays = pc.invert(pc.is_in(images.table["id"], gone.combine_chunks()))
    return Manifest(images.table.filter(stays), images.classes)


def _check_classes(name: str, before: Manifest, after: Manifest) -> None:
    """A class whose every labelled image goes would be lost in silence."""
    counts = [np.bincount(images.labels(), minlength=len(before.classes)) for images in (before, after)]
    lost = [before.classes[i] for i in np.flatnonzero((counts[0] > 0) & (counts[1] == 0))]
    if lost:
        raise UserError(
            f"dedup.{name} is `remove`, and every {decision.NAMES[name]} image of {', '.join(lost)} would go. Set "
            f"`dedup.{name}: report`, look at data/dedup/gallery/index.html, and give those that shall stay a line in "
            "data/overrides.csv."
        )


def _metrics(audit: pa.Table, sets: dict[str, Manifest], kept: dict[str, Manifest]) -> Row:
    """Images by outcome, as `findings.counts` counts them."""
    images = findings.counts(audit)
    copies = {f"{relation.replace('-', '_')}_copies": images[relation, "copy"] for relation in decision.REPORTED}
    of_val = audit.filter(pc.and_(pc.equal(audit["relation"], "pool-val"), pc.equal(audit["outcome"], "copy")))
    return {
        **{name: len(images) for name, images in sets.items()},
        "kept": len(kept["pool"]),
        "train_removed": len(sets["train"]) - len(kept["train"]),
        "holdout_removed": len(sets["holdout"]) - len(kept["holdout"]),
        **copies,
        "review": images["pool-val", "review"],
        "train_review": images["train-val", "review"],
        "alike": images["pool-val", "alike"],
        "unverifiable": images["pool", "unverifiable"],
        "val_unverifiable": images["val", "unverifiable"],
        "duplicates": images["pool-pool", "copy"],
        "overrides": len(set(audit["id"].filter(pc.is_valid(audit["override"])).to_pylist())),
        "val_with_a_leak": len(set(of_val["match_id"].drop_null().to_pylist())),
    }


if __name__ == "__main__":
    stage.main(run)
