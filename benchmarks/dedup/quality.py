"""Recall per family of copies beside exhaustive matching and pHash; and what a shared overlay does to different photographs."""

import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np

from benchmarks.dedup import families
from pipeline.harness import progress
from pipeline.leaks import features, index, search, verdict
from pipeline.store.decode import decode

Score = Callable[[np.ndarray, features.Picture], np.ndarray]


def photographs(tar: Path, seed: int) -> list[np.ndarray]:
    """The images of an uncompressed tar, decoded, in an order drawn by `seed`."""
    with tarfile.open(tar) as archive:
        members = sorted((m for m in archive if m.isfile()), key=lambda m: m.name)
        data = [archive.extractfile(m).read() for m in members]  # type: ignore[union-attr]
    return [decode(data[i]) for i in np.random.default_rng(seed).permutation(len(data))]


class Ours:
    """The leak check as the stage runs it, on images in memory."""

    def __init__(self, reference: list[features.Picture]) -> None:
        bag = features.bag([picture.features for picture in reference])
        self.reference = reference
        self.index = index.VotingIndex.build(len(bag.owner), [bag], bag.descriptors)

    def scores(self, query: features.Picture) -> np.ndarray:
        """(reference images,) 2 removed, 1 review, 0 nothing."""
        scores = np.zeros(len(self.reference))
        for row in search.findings(iter([query]), self.index, self.reference):
            if row.get("match") is not None:
                scores[row["match"]] = 2 if row["outcome"] == "copy" else 1
        return scores


def same_rule_without_index(reference: list[features.Picture], query: features.Picture) -> np.ndarray:
    """As `Ours.scores`, with every reference image a candidate, mirrored and negative too: what the index may lose at most."""
    n = len(reference)
    same = (np.zeros(4 * n, int), np.repeat(np.arange(n), 4), np.tile([False, True], 2 * n), np.tile([0, 0, 1, 1], n) > 0)
    every = index.Candidates(*same)
    scores = np.zeros(len(reference))
    for row in search.verified([query], every, reference):
        scores[row["match"]] = 2 if row["outcome"] == "copy" else 1
    return scores


class Tally:
    """Scores of right pairs by method and family, the highest of a wrong pair by method, and distractors that ours flags."""

    def __init__(self, methods: dict[str, Score]) -> None:
        self.methods = methods
        self.right: dict[str, dict[str, list[float]]] = {method: {} for method in methods}
        self.wrong = dict.fromkeys(methods, 0.0)
        self.removed = self.review = 0

    def distractor(self, image: np.ndarray) -> None:
        picture = features.extract(image)
        for method, scores in self.methods.items():
            best = scores(image, picture).max()
            self.wrong[method] = max(self.wrong[method], best)
            if method == OURS:
                self.removed += best == REMOVED
                self.review += best == REVIEW

    def copy(self, kind: str, image: np.ndarray, original: int) -> None:
        picture = features.extract(image)
        for method, scores in self.methods.items():
            of = scores(image, picture)
            self.right[method].setdefault(kind, []).append(of[original])
            self.wrong[method] = max(self.wrong[method], np.delete(of, original).max())

    def table(self) -> str:
        """Recall at zero false positives: a peer's threshold lies just above its highest score for any wrong pair."""
        needed = {method: top + 1 for method, top in self.wrong.items()} | {OURS: REMOVED, UNINDEXED: REMOVED}
        peers = (UNINDEXED, EXHAUSTIVE, IMAGEHASH, IMAGEDEDUP)
        lines = [f"| copies | ours removed | and review | {' | '.join(peers)} |", "| --- " + "| ---: " * 6 + "|"]
        for kind in self.right[OURS]:
            share = {m: float(np.mean(np.array(self.right[m][kind]) >= needed[m])) for m in self.methods}
            review = float(np.mean(np.array(self.right[OURS][kind]) >= REVIEW))
            rest = " | ".join(f"{share[m]:.3f}" for m in peers)
            lines.append(f"| {kind} | {share[OURS]:.3f} | {review:.3f} | {rest} |")
        return "\n".join(lines)


OURS, UNINDEXED, EXHAUSTIVE = "ours", "same rule, every pair", "exhaustive SIFT"
IMAGEHASH, IMAGEDEDUP = "pHash (imagehash)", "pHash (imagededup)"
REMOVED, REVIEW = 2.0, 1.0


def recall(images: Path, val: int, copies: int, seed: int) -> str:
    """The table of recalls per family of copies; the photographs that are not among the `val` first are the distractors."""
    from benchmarks.dedup.peers import Exhaustive, Hashes, imagededup_bits, imagehash_bits  # packages that nothing else needs

    photos = photographs(images, seed)
    originals, others = photos[:val], photos[val:]
    reference = [features.extract(image) for image in originals]
    ours, exhaustive = Ours(reference), Exhaustive(reference)
    hashes, other_hashes = (Hashes(bits, originals) for bits in (imagehash_bits, imagededup_bits))
    tally = Tally(
        {
            OURS: lambda _, picture: ours.scores(picture),
            UNINDEXED: lambda _, picture: same_rule_without_index(reference, picture),
            EXHAUSTIVE: lambda _, picture: exhaustive.scores(picture),
            IMAGEHASH: lambda image, _: hashes.scores(image),
            IMAGEDEDUP: lambda image, _: other_hashes.scores(image),
        }
    )
    kinds = families.families(others)
    with progress.bar(len(kinds) * copies + len(others), "images", "quality") as shown:
        for image in others:
            tally.distractor(image)
            shown.update(1)
        for kind, family in kinds.items():
            for i in range(copies):
                tally.copy(kind, np.ascontiguousarray(family(originals[i], np.random.default_rng([seed, i]))), i)
                shown.update(1)
    note = (
        f"{val} photographs as val, {copies} copies per family, {len(others)} distractors, seed {seed}. "
        f"Of the distractors ours removes {tally.removed} and puts {tally.review} up for review. Highest score of a wrong pair: "
        f"exhaustive {tally.wrong[EXHAUSTIVE]:.0f} inliers, {IMAGEHASH} {tally.wrong[IMAGEHASH]:.0f} and "
        f"{IMAGEDEDUP} {tally.wrong[IMAGEDEDUP]:.0f} of 64 bits, ours "
        f"{('nothing', 'review', 'removed')[int(tally.wrong[OURS])]}."
    )
    return f"{tally.table()}\n\n{note}"


WORDS = "VRMFGABADVRYMP"
OVERLAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "nothing": lambda image: image,
    "logo, 0.3 of the short side": families.draw_logo,
    "logo, 0.5 of the short side": lambda image: families.draw_logo(image, 0.5),
    "caption bar, 1/5 of the height": lambda image: families.draw_caption(image, WORDS),
    "caption bar, 2/5 of the height": lambda image: families.draw_caption(image, WORDS, 0.4),
    "two lines of text": lambda image: families.draw_text(image, [WORDS, WORDS[::-1]]),
    "a frame and a caption bar": lambda image: families.draw_caption(
        cv2.copyMakeBorder(image, 40, 40, 40, 40, cv2.BORDER_CONSTANT, value=(30, 90, 60)), WORDS
    ),
}


def logos(images: Path, count: int, seed: int) -> str:
    """Pairs of different photographs, 4:3, with the same overlay: what inlier counts would do, and what the rule does."""
    photos = [cv2.resize(image, (400, 300), interpolation=cv2.INTER_AREA) for image in photographs(images, seed)[:count]]
    lines = ["| overlay | pairs | at least 8 inliers | most inliers | removed | review |", "| --- " + "| ---: " * 5 + "|"]
    for name, overlay in OVERLAYS.items():
        pictures = [features.extract(overlay(image)) for image in photos]
        pairs = [(a, b) for i, a in enumerate(pictures) for b in pictures[:i]]
        seen = list(_judged(progress.track(pairs, len(pairs), "pairs", f"logos: {name}")))
        inliers = np.array([n for n, _ in seen])
        outcomes = [outcome for _, outcome in seen]
        counts = f"{outcomes.count('copy')} | {outcomes.count('review')}"
        lines.append(f"| {name} | {len(pairs):,} | {np.mean(inliers >= 8):.1%} | {inliers.max()} | {counts} |")
    return "\n".join([*lines, "", f"{count} photographs, every pair of them, seed {seed}."])


def _judged(pairs: Iterable[tuple[features.Picture, features.Picture]]) -> Iterable[tuple[int, str | None]]:
    for a, b in pairs:
        seen = verdict.examine(a, b, False)
        yield (seen[0].inliers, seen[2].outcome) if seen else (0, None)
