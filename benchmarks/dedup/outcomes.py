"""What the leak check decides on copies of photographs, and on different photographs under one layout; no peer is needed."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.dedup import families
from benchmarks.dedup.layouts import LAYOUTS
from benchmarks.dedup.quality import photographs
from pipeline.harness import progress
from pipeline.leaks import decision, features, index, search
from pipeline.leaks.findings import FOUND
from pipeline.store import manifest
from pipeline.store.manifest import Manifest

PAGES = 50  # of the pool, for each layout


class Check:
    """The leak check as the two stages run it, on val and pool images in memory."""

    def __init__(self, val: Sequence[np.ndarray]) -> None:
        self.val = [features.extract(image) for image in val]
        bag = features.bag([picture.features for picture in self.val])
        large = np.array([picture.is_large for picture in self.val])
        self.index = index.VotingIndex.build(len(bag.owner), [bag], bag.descriptors, large)
        among = search.findings(iter(self.val), self.index, self.val, itself=True)
        self.among = [row for row in among if row.get("match") is not None and row["row"] > row["match"]]

    def outcomes(self, pool: Sequence[np.ndarray]) -> list[dict[int, str]]:
        """For each image of the pool the outcome by val image that it was found in."""
        pictures = [features.extract(image) for image in pool]
        rows = search.findings(iter(pictures), self.index, self.val)
        named = [("pool-val", row) for row in rows if row.get("match") is not None] + [("val-val", row) for row in self.among]
        found = [row | {"relation": r, "id": f"{row['row']:06}", "match_id": f"{row['match']:06}"} for r, row in named]
        sets = {"pool": sizes(pictures), "val": sizes(self.val)}
        judged = decision.one_layout_in_review(pa.Table.from_pylist(found, FOUND), sets)
        by_image: list[dict[int, str]] = [{} for _ in pictures]
        for row in judged.to_pylist():
            if row["relation"] == "pool-val":
                by_image[row["row"]][row["match"]] = row["outcome"]
        return by_image


def sizes(pictures: Sequence[features.Picture]) -> Manifest:
    """A manifest that knows the shapes of images and nothing else."""
    rows = [
        {"id": f"{row:06}", "width": round(1000 * width), "height": round(1000 * height)}
        for row, (width, height) in enumerate(picture.extent.tolist() for picture in pictures)
    ]
    return Manifest(pa.Table.from_pylist(rows, manifest.SCHEMA), ())


def copies(images: Path, count: int, seed: int) -> str:
    """A table of outcomes by family: `count` photographs as val, copied once by each family, and all others as clean images."""
    photos = photographs(images, seed)
    val, others = photos[:count], photos[count:]
    check = Check(val)
    clean = Counter(outcome for found in check.outcomes(others) for outcome in found.values())
    lines = ["| copies | removed | and review | missed |", "| --- | ---: | ---: | ---: |"]
    groups = {"plain": families.families(others), "hard": families.hard_families(others)}
    means, wrong = [], Counter[str]()
    for group, kinds in groups.items():
        shares = []
        for kind, family in progress.track(kinds.items(), len(kinds), "families", f"copies: {group}"):
            made = [np.ascontiguousarray(family(image, np.random.default_rng([seed, i]))) for i, image in enumerate(val)]
            found = check.outcomes(made)
            right = [by.pop(i, "missed") for i, by in enumerate(found)]
            wrong.update(outcome for by in found for outcome in by.values())
            removed, review = right.count("copy") / count, 1 - right.count("missed") / count
            shares.append((removed, review))
            lines.append(f"| {kind} | {removed:.2f} | {review:.2f} | {1 - review:.2f} |")
        means.append((f"mean of the {len(kinds)} {group} families", np.mean(shares, 0), len(kinds)))
    whole = np.average([share for _, share, _ in means], axis=0, weights=[n for *_, n in means])
    for name, share, _ in [*means, ("mean of all families", whole, 0)]:
        lines.append(f"| {name} | {share[0]:.3f} | {share[1]:.3f} | {1 - share[1]:.3f} |")
    note = f"{count} photographs as val, each copied once by each family; {len(others)} other photographs, seed {seed}. "
    note += f"Of the others {clean['copy']} are removed and {clean['review']} go to review; of the copies "
    note += f"{wrong['copy']} are taken for copies of another photograph, and {wrong['review']} are found like one."
    return "\n".join([*lines, "", note])


def layouts(images: Path, count: int, seed: int) -> str:
    """A table of outcomes for different photographs under one layout, with 1, 2 and 10 pages of it in val."""
    photos = photographs(images, seed)
    val, pool = photos[:count], photos[count : count + PAGES]
    lines = ["| layout | pages in val | removed | review | neither |", "| --- " + "| ---: " * 4 + "|"]
    total = Counter[tuple[int, str]]()
    for name, layout in progress.track(LAYOUTS.items(), len(LAYOUTS), "layouts", "layouts"):
        pages = [layout(image, np.random.default_rng([seed, 1, i])) for i, image in enumerate(val)]
        made = [layout(image, np.random.default_rng([seed, 2, i])) for i, image in enumerate(pool)]
        for known in (1, 2, 10):
            found = [set(by.values()) for by in Check([*pages[:known], *val[known:]]).outcomes(made)]
            said = Counter("removed" if "copy" in by else "review" if by else "neither" for by in found)
            total.update({(known, outcome): n for outcome, n in said.items()})
            lines.append(f"| {name} | {known} | {said['removed']} | {said['review']} | {said['neither']} |")
    shown = [
        f"| all | {known} | {' | '.join(str(total[known, o]) for o in ('removed', 'review', 'neither'))} |"
        for known in (1, 2, 10)
    ]
    return "\n".join([*lines, *shown, "", f"{len(pool)} pages of each layout as the pool, {count} val images, seed {seed}."])
