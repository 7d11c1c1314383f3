"""The published list of CIFAR-10's copies: what is taken from the audit, and what a person judged stays."""

import csv
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import copies
from pipeline.leaks import findings
from pipeline.store import artifact

PUBLISHED = Path(__file__).parents[1] / "docs" / "cifar10-copies.csv"
TRANSFORM = [1.0, 0.0, 0.25, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def found(relation: str, id: str, match: str, outcome: str = "copy") -> dict[str, Any]:
    figures = {"rule": "small", "inliers": 12, "mirrored": True, "negative": False, "zncc": 0.9, "local": 0.8}
    return {"relation": relation, "id": id, "match_id": match, "outcome": outcome, "transform": TRANSFORM, **figures}


def test_pairs_of_the_set_are_named_by_their_numbers_and_keep_their_judgement(tmp_path: Path) -> None:
    val = "cifar10-val-00.tar/cat/0007.png"
    rows = [
        found("pool-val", "cifar10-train-01.tar/dog/0011.png", val),
        found("train-val", "cifar10-train-00.tar/cat/0002.jpg", val, "review"),
        found("pool-val", "tinyimagenet32-pool-00.tar/n01/images/n01_3.JPEG", val),  # of another set
        found("pool-train", "cifar10-train-01.tar/dog/0013.png", "cifar10-train-00.tar/cat/0002.jpg"),  # nothing of val
        found("pool-val", "cifar10-train-01.tar/dog/0015.png", val, "alike"),
    ]
    with artifact.writing(tmp_path / "leaks") as tmp:
        pq.write_table(pa.Table.from_pylist(rows, findings.FOUND), tmp / findings.FILE)
    listed = copies.pairs(tmp_path / "leaks", {("train/dog/0011", "val/cat/0007"): "other"})
    assert [(row["image"], row["match"], row["outcome"], row["judged"]) for row in listed] == [
        ("train/cat/0002", "val/cat/0007", "review", ""),
        ("train/dog/0011", "val/cat/0007", "copy", "other"),
    ]
    assert (listed[0]["transform"].split()[2], listed[0]["mirrored"], listed[0]["zncc"]) == ("0.250", "1", "0.900")


def test_the_published_list_has_the_figures_of_the_docs() -> None:
    with PUBLISHED.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["outcome"] == "copy"]
    train = [row for row in rows if row["image"].startswith("train/")]
    text = (PUBLISHED.parent / "dedup.md").read_text()
    images, matches = ({row[key] for row in train} for key in ("image", "match"))
    assert f"{len(train):,} pairs of {len(images):,} training and {len(matches):,} test images" in text
    judged = [row["judged"] for row in rows if row["judged"]]
    assert f"{len(judged):,} pairs were looked at, and {judged.count('other')} show other pictures" in text
    assert set(judged) == {"same", "other"}
