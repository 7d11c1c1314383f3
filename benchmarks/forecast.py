"""How near the purity that `forecast` expects is to the true one, and that of the teacher's own probabilities beside it.

    python -m benchmarks.forecast data/score/teacher --data data/dedup --truth data/draw/scenes-truth/truth.parquet
    python -m benchmarks.forecast data/score/honest data/score/strong --same n02123045=cat n02085620=dog --shares 0.1 0.3 0.85

The truth comes from a table or from folder names, as in `benchmarks.purity`; no stage reads it. `--shares` thins the pool, by
chance, until this share of it belongs to a class, and forecasts again: other pools of the same teacher. k are 2, 5, 10, 20 and
40 % of the pool, divided by the number of classes. A cell has the expected purity, and in brackets the true one.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.purity import NONE, from_folders, from_table
from pipeline.advice import forecast
from pipeline.report import purity
from pipeline.report.purity import Answers
from pipeline.store import artifact, manifest
from pipeline.store.scores import of_pool

PARTS = (0.02, 0.05, 0.1, 0.2, 0.4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path, nargs="+", help="what `score` has made")
    parser.add_argument("--data", type=Path, default=Path("data/dedup"), help="where pool and holdout are")
    parser.add_argument("--truth", type=Path, help="a Parquet table with the columns tar, member, label")
    parser.add_argument("--same", nargs="+", default=[], metavar="FOLDER=CLASS", help="folders that mean a class")
    parser.add_argument("--shares", type=float, nargs="+", default=[], help="of images that belong to a class, in thinned pools")
    parser.add_argument("--most", type=int, default=15_000, help="images of a thinned pool")
    args = parser.parse_args()
    ids = manifest.read(args.data / "pool").table["id"].to_pylist()
    names = [f"k = {part:.0%}" for part in PARTS]
    print(f"| scores | own share | estimated | {' | '.join(names)} | the teacher's probabilities |")
    print("| --- | ---: | ---: |" + " --- |" * len(PARTS) + " --- |")
    for folder in args.scores:
        scored = of_pool(artifact.verify(folder), args.data / "pool", len(ids))
        classes = scored.classes
        held = from_table(args.truth, ids, classes) if args.truth else from_folders(ids, classes, args.same)
        (asked, is_right), pool = purity.held_out(scored), forecast.of_scores(scored)
        for share in (None, *args.shares):
            rows = np.arange(len(ids)) if share is None else thinned(held, share, args.most)
            print(f"| {folder.name} | {row(pool.take(rows), asked, is_right, held[rows], len(classes))} |", flush=True)


def thinned(held: np.ndarray, share: float, most: int) -> np.ndarray:
    """Sorted rows of a pool of which `share` belongs to a class: as many as there are, `most` at most."""
    rng = np.random.default_rng(0)
    own, foreign = (rng.permutation(np.flatnonzero(which)) for which in (held != NONE, held == NONE))
    count = min(most, int(len(own) / share), int(len(foreign) / max(1 - share, 1e-9)))
    cut = round(share * count)
    return np.sort(np.concatenate([own[:cut], foreign[: count - cut]]))


def row(pool: Answers, asked: Answers, is_right: np.ndarray, held: np.ndarray, classes: int) -> str:
    """Of each k the expected purity and the true one in %, and the errors of the teacher's probabilities in points."""
    estimate = purity.estimate(pool, asked, is_right, classes)
    ks = [max(1, round(part * len(held) / classes)) for part in PARTS]
    true = forecast.selections(pool, (held == pool.first).astype(float), classes, ks)
    found = forecast.selections(pool, estimate.pure, classes, ks)
    pairs = [f"{100 * f.purity:.0f} ({100 * t.purity:.0f})" for f, t in zip(found, true, strict=True)]
    naive = ", ".join(f"{100 * (t.naive - t.purity):+.0f}" for t in true)
    return f"{np.mean(held != NONE):.2f} | {estimate.share:.2f} | {' | '.join(pairs)} | {naive}"


if __name__ == "__main__":
    main()
