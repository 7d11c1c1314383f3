"""Publish what the leak check found in CIFAR-10: each pair of a training or test image and the test image that it shows.

    python -m benchmarks.copies data/dedup/leaks --out docs/cifar10-copies.csv

An image is named `<train or val>/<class>/<number>`, where numbers count a class's images in CIFAR-10's own order. `judged` says
what a person saw in the pair: `same` picture, or `other`; it is kept from an earlier file, and empty where nobody looked.
`transform` is the homography from the match to the image, row by row, in units of the longest side of each.
"""

import argparse
import csv
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.store import artifact

RELATIONS = ("pool-val", "train-val", "holdout-val", "val-val")
IMAGE = re.compile(r"cifar10-(train|val)-\d+\.tar/([a-z]+/\d+)\.\w+")
COLUMNS = ("image", "match", "outcome", "rule", "inliers", "mirrored", "negative", "zncc", "local", "transform", "judged")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("leaks", type=Path, help="the artifact of `dedup`")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    judged = _judged(args.out) if args.out.exists() else {}
    found = pairs(args.leaks, judged)
    with artifact.writing_file(args.out) as tmp, tmp.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    copies = [row for row in found if row["outcome"] == "copy"]
    seen = [row["judged"] for row in copies if row["judged"]]
    images = len({row["image"] for row in copies})
    print(f"{len(copies):,} pairs are copies, of {images:,} images; {len(found) - len(copies):,} more are for review.")
    print(f"{len(seen):,} of the copies were looked at, and {seen.count('other'):,} were other pictures.")


def pairs(leaks: Path, judged: dict[tuple[str, str], str]) -> list[dict[str, str]]:
    """The copies and the pairs for review between images of CIFAR-10, sorted; `judged`: by image and match."""
    table = pq.read_table(artifact.verify(leaks) / "leaks.parquet")
    found = pc.and_(pc.is_in(table["relation"], pa.array(RELATIONS)), pc.is_in(table["outcome"], pa.array(["copy", "review"])))
    rows = []
    for row in table.filter(found).to_pylist():
        image, match = _name(row["id"]), _name(row["match_id"])
        if image and match:
            figures = {name: f"{row[name]:.3f}" for name in ("zncc", "local")}
            kept = {name: str(row[name]) for name in ("outcome", "rule", "inliers")}
            flags = {name: str(int(row[name])) for name in ("mirrored", "negative")}
            transform = " ".join(f"{x:.3f}" for x in row["transform"])
            rows.append(
                {"image": image, "match": match, **kept, **flags, **figures, "transform": transform}
                | {"judged": judged.get((image, match), "")}
            )
    return sorted(rows, key=lambda row: (row["image"], row["match"]))


def _name(id: str) -> str | None:
    """None for an image of another set."""
    found = IMAGE.fullmatch(id)
    return f"{found[1]}/{found[2]}" if found else None


def _judged(file: Path) -> dict[tuple[str, str], str]:
    with file.open(newline="") as lines:
        return {(row["image"], row["match"]): row["judged"] for row in csv.DictReader(lines)}


if __name__ == "__main__":
    main()
