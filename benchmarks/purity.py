"""How pure a selection is: the share of the selected images that hold the class they were selected for, against k.

    python -m benchmarks.purity data/score/teacher --truth data/draw/scenes-truth/truth.parquet
    python -m benchmarks.purity data/score/teacher --k 500 2000 8000        # a pool made of folders that bear class names

Each image belongs to its teacher's first class (`membership: argmax`), and the k of highest log p of each class are
taken, as `select` does. The truth is a table with the columns tar, member and label (null: of no class), or else the
folder names in the ids: an image in a folder that no class is named after counts as one of no class, unless --same
says what the folder means (n02123045=cat). No stage reads either.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.report.truth import labels
from pipeline.store import artifact, manifest
from pipeline.store.scores import LOGSUMEXP, Scores, of_pool

NONE = -1  # the number of "no class"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path, help="an artifact of the stage score")
    parser.add_argument("--pool", type=Path, default=Path("data/dedup/pool"), help="the manifest that was scored")
    parser.add_argument("--truth", type=Path, help="a Parquet table with the columns tar, member, label")
    parser.add_argument("--k", type=int, nargs="+", default=[50, 100, 200, 300, 500, 1000, 2000])
    parser.add_argument("--same", nargs="+", default=[], metavar="FOLDER=CLASS", help="folders that mean a class")
    args = parser.parse_args()
    pool = manifest.read(args.pool)
    scored = of_pool(artifact.verify(args.scores), args.pool, len(pool))
    classes = scored.classes
    ids = pool.table["id"].to_pylist()
    held = from_table(args.truth, ids, classes) if args.truth else from_folders(ids, classes, args.same)
    print(f"{len(ids):,} pool images, {np.mean(held != NONE):.1%} of them of the {len(classes)} classes\n")
    print(purity(scored, held, args.k))


def from_table(truth: Path, ids: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """(N,) the class that each image holds, or NONE. Every id must be in the table."""
    number = {name: i for i, name in enumerate(classes)}
    return np.array([NONE if name is None else number[name] for name in labels(truth, ids)])


def from_folders(ids: Sequence[str], classes: Sequence[str], same: Sequence[str] = ()) -> np.ndarray:
    """(N,) the class that a folder of each image's id is named after, or means by `same` ("folder=class"), or NONE."""
    number = {name: i for i, name in enumerate(classes)}
    number |= {folder: number[name] for folder, name in (pair.split("=") for pair in same)}
    return np.array([next((number[f] for f in image.split("/")[:-1] if f in number), NONE) for image in ids])


def purity(scored: Scores, held: np.ndarray, ks: Sequence[int]) -> str:
    """A Markdown table with a row for each k."""
    classes, taker = scored.classes, scored.matrix(["class_0"])[:, 0].astype(np.int64)
    logit, logsumexp = scored.matrix(["logit_0", LOGSUMEXP]).T
    surprisal = np.maximum(logsumexp - logit, np.float32(0))
    order = np.lexsort((surprisal, taker))  # stable: ties stay in the order of rows
    taker, held = taker[order], held[order]
    rank = np.arange(len(taker)) - np.searchsorted(taker, taker)
    lines = [
        "| k | images | purity % | of another class % | of no class % | purest and least pure class % | classes short |",
        "| ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for k in ks:
        t, h = taker[rank < k], held[rank < k]
        counts = np.bincount(t, minlength=len(classes))
        share = np.bincount(t, t == h, len(classes)) / np.maximum(counts, 1)
        taking = np.flatnonzero(counts)
        best, worst = taking[share[taking].argmax()], taking[share[taking].argmin()]
        shares = (np.mean(t == h), np.mean((t != h) & (h != NONE)), np.mean(h == NONE))
        figures = " | ".join(f"{100 * share:.1f}" for share in shares)
        extremes = f"{classes[best]} {100 * share[best]:.0f}, {classes[worst]} {100 * share[worst]:.0f}"
        lines.append(f"| {k:,} | {len(t):,} | {figures} | {extremes} | {(counts < k).sum()} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
