"""How pure selections of the built-in scenes are, by the hidden labels that no stage reads."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.store import artifact, manifest
from pipeline.store.scores import open_scores


def of_root(root: str) -> Path | None:
    """The table of hidden labels beside images that winnow drew; None beside any others."""
    table = Path(root).with_name(f"{Path(root).name}-truth") / "truth.parquet"
    return table if table.is_file() else None


def labels(truth: Path, ids: Sequence[str]) -> list[str | None]:
    """The class that each image holds; None where it belongs to none. Raises KeyError for an image that is not in the table."""
    columns = pq.read_table(truth, columns=["tar", "member", "label"]).to_pydict()
    known = {f"{tar}/{member}": label for tar, member, label in zip(*columns.values(), strict=True)}
    return [known[image] for image in ids]


def purity(selection: Path, truth: Path) -> float | None:
    """The share, in 0..1, of the images in `selection` that hold the class that the teacher named first. None where the
    selection, its pool or its scores are not there, or are of another run."""
    inputs = artifact.record(selection).get("inputs", {}) if selection.exists() else {}
    places = {name: Path(inputs[name]["path"]) for name in ("pool", "scores") if name in inputs}
    if len(places) < 2 or any(not p.exists() or artifact.identity(p) != inputs[n]["identity"] for n, p in places.items()):
        return None
    pool, scored = manifest.read(places["pool"]).table["id"], open_scores(places["scores"])
    ids = manifest.read(selection).table["id"]
    rows = np.asarray(pc.index_in(ids, value_set=pool.combine_chunks()))
    first = scored.matrix(["class_0"])[rows, 0].tolist()
    try:
        held = labels(truth, ids.to_pylist())
    except KeyError:  # of another draw
        return None
    return float(np.mean([scored.classes[c] == name for c, name in zip(first, held, strict=True)])) if held else None
