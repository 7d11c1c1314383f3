"""How many planted wrong labels the gallery's confident learning finds, beside the package cleanlab.

    python -m benchmarks.wrong_labels data/teach/teacher --share 0.1 --save .scratch/wrong.npz
    python -m benchmarks.wrong_labels --read .scratch/wrong.npz          # where cleanlab is installed: pip install cleanlab

The first plants wrong labels, each drawn evenly from the other classes, among the held-out images, which the teacher checks; with
`--folds`, among the training images, and trains the teacher without each part, as `gallery --folds` does. The second compares who
finds them in the same probabilities: precision is the share of the suspects that were planted, recall the share of the planted
that are suspects. Images whose own label is wrong from the start count against the precision of both. The second needs numpy and
cleanlab, and nothing else of winnow.
"""

import argparse
from pathlib import Path

import numpy as np

from pipeline.advice.suspects import suspects

FILTERS = ("confident_learning", "prune_by_noise_rate", "prune_by_class", "both")
"""cleanlab's ways (`filter_by`), of which the second is its default."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, nargs="?", help="what `teach` has trained (data/teach/teacher)")
    parser.add_argument("--data", type=Path, default=Path("data/dedup"), help="where train and holdout are")
    parser.add_argument("--share", type=float, default=0.1, help="of the labels, to be made wrong")
    parser.add_argument("--folds", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="keep the probabilities here")
    parser.add_argument("--read", type=Path, help="compare on what --save kept")
    args = parser.parse_args()
    if args.read:
        kept = np.load(args.read)
        p, labels, is_wrong = kept["p"], kept["labels"], kept["is_wrong"]
    else:
        p, labels, is_wrong = planted(args.teacher, args.data, args.share, args.folds, args.seed)
        if args.save:
            np.savez(args.save, p=p, labels=labels, is_wrong=is_wrong)
    truth = np.where(is_wrong, -1, labels)
    right = float((p.argmax(1)[~is_wrong] == truth[~is_wrong]).mean())
    print(f"{len(labels):,} labels, {is_wrong.sum():,} of them wrong; the networks name {right:.1%} of the right ones\n")
    print("| | suspects | precision % | recall % | precision of the first half % |\n| --- | ---: | ---: | ---: | ---: |")
    found = {"winnow": suspects(p, labels).rows} | (peers(p, labels) if args.read else {})
    for name, rows in found.items():
        hit, half = is_wrong[rows], is_wrong[rows[: max(1, len(rows) // 2)]]
        shares = (hit.mean(), hit.sum() / is_wrong.sum(), half.mean())
        print(f"| {name} | {len(rows)} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |")


def planted(teacher: Path, data: Path, share: float, folds: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, C) probabilities by networks that have not seen the image, (N,) labels of which a share is wrong, and (N,) which."""
    import pyarrow as pa

    from pipeline.advice import answers, gallery
    from pipeline.harness.machine import Machine
    from pipeline.store import artifact, manifest

    images, rng = manifest.read(data / ("train" if folds else "holdout")), np.random.default_rng(seed)
    labels, classes = images.labels(), len(images.classes)
    is_wrong = np.zeros(len(labels), bool)
    is_wrong[rng.permutation(len(labels))[: round(share * len(labels))]] = True
    labels = np.where(is_wrong, (labels + rng.integers(1, classes, len(labels))) % classes, labels)
    if not folds:
        said = answers.logits(teacher, images.classes, images, Machine(), "holdout")
        return answers.softmax(said), labels, is_wrong
    table = images.table.set_column(images.table.schema.get_field_index("label"), "label", pa.array(labels, pa.int32()))
    changed = Path(".scratch", "wrong_labels", f"{share}-{seed}")
    with artifact.writing(changed / "train") as tmp:
        manifest.write(tmp, table, images.classes)
    artifact.copy(data / "holdout", changed / "holdout")
    return gallery.crossed(teacher, changed, manifest.read(changed / "train"), folds, Machine()), labels, is_wrong


def peers(p: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Rows that cleanlab suspects, by each of its ways, ranked by normalised margin as ours are."""
    from cleanlab.filter import find_label_issues

    ranked = {"return_indices_ranked_by": "normalized_margin", "n_jobs": 1}
    return {f"cleanlab, {name}": find_label_issues(labels, p, filter_by=name, **ranked) for name in FILTERS}


if __name__ == "__main__":
    main()
