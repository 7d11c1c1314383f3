"""The leak check on arrays: the mirror property, transforms of known copies, and an exhaustive matcher as the oracle."""

from collections.abc import Sequence

import cv2
import numpy as np
import pytest
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from pipeline.leaks import features, geometry, index, search
from pipeline.leaks.index import VotingIndex
from pipeline.leaks.verdict import Likeness, Verdict, compare, examine, judge
from tests.photographs import COPIES, badged, captioned, cropped, mirrored, photograph, recoded, smaller

Found = set[tuple[int, int]]


def index_of(gallery: Sequence[features.Picture]) -> VotingIndex:
    bag = features.bag([picture.features for picture in gallery])
    return VotingIndex.build(len(bag.owner), [bag], bag.descriptors, np.ones(len(gallery), bool))


def verdict(a: features.Picture, b: features.Picture, mirror: bool = False) -> Verdict:
    seen = examine(a, b, mirror)
    return seen[2] if seen else Verdict(None, "")


def removed(index: VotingIndex, gallery: Sequence[features.Picture], queries: Sequence[features.Picture]) -> Found:
    candidates = index.shortlist(features.bag([picture.features for picture in queries]))
    found = search.verified(queries, candidates, gallery)
    return {(row["row"], row["match"]) for row in found if row["outcome"] == "copy"}


def exhaustive(gallery: Sequence[np.ndarray], queries: Sequence[np.ndarray]) -> Found:
    """Bare-bones SIFT matching of every pair, mirrored by extracting again: Lowe's ratio 0.75, a homography with 12 inliers."""
    detector = getattr(cv2, "SIFT_create")(300, 3, 0.01)  # noqa: B009
    matcher = cv2.BFMatcher()

    def described(image: np.ndarray) -> tuple:
        scale = 200 / max(image.shape[:2])
        grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        return detector.detectAndCompute(grey, None)

    def agree(a: tuple, b: tuple) -> bool:
        near = [m for m, n in matcher.knnMatch(a[1], b[1], k=2) if m.distance < 0.75 * n.distance]
        if len(near) < 12:
            return False
        source = np.array([a[0][m.queryIdx].pt for m in near], np.float32)
        target = np.array([b[0][m.trainIdx].pt for m in near], np.float32)
        inside = cv2.findHomography(source, target, cv2.RANSAC, 4.0)[1]
        return inside is not None and int(inside.sum()) >= 12

    theirs = [(described(image), described(mirrored(image))) for image in gallery]
    mine = [described(image) for image in queries]
    return {
        (q, g) for q, b in enumerate(mine) for g, (plain, flipped) in enumerate(theirs) if agree(plain, b) or agree(flipped, b)
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def originals() -> list[np.ndarray]:
    return [photograph(seed) for seed in range(12)]


@pytest.fixture(scope="module")
def gallery(originals: list[np.ndarray]) -> list[features.Picture]:
    return [features.extract(image) for image in originals]


def test_a_mirrored_descriptor_is_a_permutation():
    image = photograph(0, 200, 150)
    expected = features.extract(mirrored(image)).features
    turned = features.mirrored(features.extract(image).features, 1.0)
    off = np.abs(turned.points[:, None, :3] - expected.points[None, :, :3]).sum(2)
    off += np.abs(np.angle(np.exp(1j * (turned.points[:, None, 3] - expected.points[None, :, 3]))))
    twin, same = off.argmin(1), off.min(1) < 0.01
    assert same.mean() > 0.85  # mirrored pixels round differently, so a few keypoints come and go
    apart = np.linalg.norm(turned.descriptors[same].astype(float) - expected.descriptors[twin[same]], axis=1)
    assert np.median(apart) < 2.0  # of a length of 512: the same but for rounding


def test_the_negative_has_the_same_features_turned_over():
    image = photograph(0, 200, 150)
    expected, turned = features.extract(255 - image).features, features.negative(features.extract(image)).features
    off = np.abs(turned.points[:, None, :3] - expected.points[None, :, :3]).sum(2)
    off += np.abs(np.angle(np.exp(1j * (turned.points[:, None, 3] - expected.points[None, :, 3]))))
    twin, same = off.argmin(1), off.min(1) < 0.01
    assert same.mean() > 0.95
    apart = np.linalg.norm(turned.descriptors[same].astype(float) - expected.descriptors[twin[same]], axis=1)
    assert np.median(apart) < 2.0


def test_either_polarity_is_the_same_for_a_descriptor_and_its_negative():
    descriptors = features.extract(photograph(1)).features.descriptors
    one, turned = features.either_polarity(descriptors)
    other, back = features.either_polarity(descriptors[:, features.NEGATIVE])
    assert (one == other).all()
    assert (turned != back).all()
    assert 0.2 < turned.mean() < 0.8


@pytest.mark.parametrize("exact", [20_000, 0])
def test_negatives_are_found(originals, gallery, exact: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index, "EXACT", exact)
    queries = [features.extract(255 - recoded(image)) for image in originals[:4]]
    queries += [features.extract(255 - mirrored(cropped(image, 0.7))) for image in originals[4:8]]
    found = search.verified(queries, index_of(gallery).shortlist(features.bag([q.features for q in queries])), gallery)
    seen = [(r["row"], r["match"], r["negative"], r["mirrored"]) for r in found if r["outcome"] == "copy"]
    assert sorted(seen) == [(i, i, True, i >= 4) for i in range(8)]
    assert all(row["zncc"] > 0.9 for row in found)


def test_mirroring_twice_changes_nothing():
    assert (features.MIRROR[features.MIRROR] == np.arange(128)).all()
    assert features.MIRROR.tolist() != list(range(128))


@pytest.mark.parametrize("name", COPIES)
def test_every_kind_of_copy_is_removed(name: str, originals: list[np.ndarray], gallery: list[features.Picture]):
    queries = [features.extract(COPIES[name](image)) for image in originals[:6]]
    assert removed(index_of(gallery), gallery, queries) == {(i, i) for i in range(6)}


def test_finds_what_exhaustive_matching_finds_and_nothing_else(originals: list[np.ndarray], gallery: list[features.Picture]):
    copies = [copy(image) for copy, image in zip(COPIES.values(), originals, strict=True)]
    queries = copies[:8] + [photograph(seed) for seed in range(100, 104)]
    expected = exhaustive(originals[:8], queries)
    assert len(expected) >= 7
    assert expected <= {(i, i) for i in range(8)}
    assert removed(index_of(gallery), gallery, [features.extract(image) for image in queries]) == {(i, i) for i in range(8)}


def test_the_compressed_index_finds_the_same(originals: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, tmp_path):
    gallery = [features.extract(image) for image in originals + [photograph(seed) for seed in range(200, 212)]]
    queries = [features.extract(COPIES[name](originals[i])) for i, name in enumerate(list(COPIES)[:6])]
    exact = removed(index_of(gallery), gallery, queries)
    monkeypatch.setattr(index, "EXACT", 0)
    compressed = index_of(gallery)
    assert "IVF" in type(compressed.index).__name__ or compressed.index.chain.size() > 0
    compressed.save(tmp_path)
    assert removed(VotingIndex.load(tmp_path), gallery, queries) == exact == {(i, i) for i in range(6)}


def test_most_features_of_an_image_that_is_no_copy_are_not_searched_for(
    originals: list[np.ndarray], gallery: list[features.Picture], monkeypatch: pytest.MonkeyPatch
):
    copied = [features.extract(COPIES[name](originals[i])) for i, name in enumerate(list(COPIES)[:3])]
    bag = features.bag([picture.features for picture in [*copied, *(features.extract(photograph(s)) for s in range(300, 306))]])
    monkeypatch.setattr(index, "EXACT", 0)
    monkeypatch.setattr(index, "HINT", 5)  # among nine images two votes are of one accord by chance
    compressed = index_of(gallery)
    asked: list[int] = []
    search_for = compressed.index.search

    def counted(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append(len(x))
        return tuple(search_for(x, k))

    compressed.index.search = counted
    found = compressed.shortlist(bag, None, np.ones(9, bool))
    early, late = asked
    assert early == -(-np.bincount(bag.owner) // index.EVERY).sum()
    assert 0 < late < 0.5 * (len(bag.owner) - early)
    monkeypatch.setattr(index, "EXACT", 10**9)  # all at once
    whole = compressed.shortlist(bag, None, np.ones(9, bool))
    both, all_at_once = (set(zip(*(column.tolist() for column in c), strict=True)) for c in (found, whole))
    assert both <= all_at_once
    assert {row for row in all_at_once if row[0] < len(copied)} <= both

    monkeypatch.setattr(index, "EXACT", 0)
    for small_query, small_reference in ((True, False), (False, True)):  # of small images all is searched for
        asked.clear()
        compressed.large[:] = not small_reference
        found = compressed.shortlist(bag, None, np.full(9, not small_query))
        assert sum(asked) == len(bag.owner)
        assert set(zip(*(column.tolist() for column in found), strict=True)) == all_at_once


@pytest.mark.parametrize("overlay", [badged, captioned])
def test_different_photographs_with_the_same_overlay_stay(overlay):
    pictures = [features.extract(overlay(photograph(seed, 320, 240))) for seed in range(300, 308)]
    pairs = [(a, b) for a in pictures for b in pictures if a is not b]
    matches = [match for a, b in pairs if (match := geometry.align(a, b, False))]
    assert max(match.inliers for match in matches) >= 12, "the overlays must share features, or the test shows nothing"
    assert not [v for a, b in pairs if (v := verdict(a, b)).outcome == "copy"]


def test_the_transform_says_where_the_copy_lies(originals: list[np.ndarray], gallery: list[features.Picture]):
    match = geometry.align(gallery[0], features.extract(cropped(originals[0], 0.5)), False)
    assert match is not None
    # The crop's own unit is half as long, and its origin is the middle of the whole.
    assert geometry.project(match.transform, np.array([[0.5, 0.375], [1.0, 0.75]])) == pytest.approx(
        np.array([[0, 0], [1, 0.75]]), abs=0.01
    )
    likeness = compare(gallery[0], features.extract(cropped(originals[0], 0.5)), match.transform)
    assert (likeness.cover_a, likeness.cover_b) == pytest.approx((0.25, 1.0), abs=0.02)
    assert likeness.zncc > 0.95


def test_a_mirrored_copy_has_a_transform_that_turns_it_over(originals: list[np.ndarray], gallery: list[features.Picture]):
    copy = features.extract(mirrored(originals[1]))
    match = geometry.align(gallery[1], copy, True)
    assert match is not None
    assert np.linalg.det(match.transform[:2, :2]) < 0
    assert compare(gallery[1], copy, match.transform).zncc > 0.99
    assert geometry.align(gallery[1], copy, False) is None or verdict(gallery[1], copy).outcome is None


def test_small_images_are_enlarged_and_found(originals: list[np.ndarray]):
    small = [cv2.resize(image[:, :120], (32, 32), interpolation=cv2.INTER_AREA) for image in originals]
    gallery = [features.extract(image) for image in small]
    queries = [features.extract(recoded(image, 75)) for image in small]
    found = removed(index_of(gallery), gallery, queries)
    assert {(i, i) for i in range(12)} >= found
    assert len(found) >= 11


def test_a_thumbnail_is_compared_at_its_own_detail(originals: list[np.ndarray], gallery: list[features.Picture]):
    thumbnail = features.extract(smaller(originals[2], 0.4))
    assert thumbnail.detail == 64
    match = geometry.align(gallery[2], thumbnail, False)
    assert match is not None
    assert compare(gallery[2], thumbnail, match.transform).zncc > 0.97


def test_a_plain_image_has_no_features_to_verify():
    plain = features.extract(np.full((50, 70, 3), 128, np.uint8))
    assert len(plain.features) < features.VERIFIABLE
    assert geometry.align(plain, plain, False) is None


def test_a_faint_image_is_looked_at_again():
    faint = (128 + (photograph(3).astype(np.float32) - 128) * 0.03).astype(np.uint8)
    assert len(features.extract(faint).features) >= features.VERIFIABLE


def test_an_empty_gallery_matches_nothing():
    index = VotingIndex.build(0, [], np.zeros((0, 128), np.uint8))
    assert len(index.shortlist(features.bag([features.extract(photograph(0)).features])).query) == 0


def test_an_image_does_not_find_itself(gallery: list[features.Picture]):
    bag = features.bag([picture.features for picture in gallery])
    candidates = index_of(gallery).shortlist(bag, exclude=np.arange(len(gallery)))
    assert not (candidates.query == candidates.match).any()


def test_a_copy_half_hidden_is_seen_in_its_other_half(originals: list[np.ndarray], gallery: list[features.Picture]):
    hidden = originals[3].copy()
    hidden[60:] = photograph(700)[60:]
    copy = features.extract(hidden)
    match = geometry.align(gallery[3], copy, False)
    assert match is not None
    likeness = compare(gallery[3], copy, match.transform)
    assert likeness.local < 0.7
    assert likeness.half > 0.9


def swirled(image: np.ndarray) -> np.ndarray:
    """Turned by 45 degrees in the middle, by less and less towards the corners."""
    height, width = image.shape[:2]
    y, x = np.indices((height, width), np.float32)
    dx, dy = x - width / 2, y - height / 2
    turn = np.deg2rad(45) * np.clip(1 - np.hypot(dx / width, dy / height) / 0.55, 0, 1)
    x, y = width / 2 + dx * np.cos(turn) - dy * np.sin(turn), height / 2 + dx * np.sin(turn) + dy * np.cos(turn)
    return cv2.remap(image, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def test_features_that_agree_all_over_convict_where_pixels_differ(originals: list[np.ndarray], gallery: list[features.Picture]):
    seen = [examine(gallery[i], features.extract(swirled(originals[i])), False) for i in range(6)]
    rules = [s[2].rule for s in seen if s]
    assert rules.count("features everywhere") >= 4
    assert len(rules) == 6


def test_features_of_one_corner_are_not_all_over():
    pictures = [features.extract(badged(photograph(seed, 320, 240))) for seed in range(300, 304)]
    matches = [m for a in pictures for b in pictures if a is not b and (m := geometry.align(a, b, False)) and m.inliers >= 12]
    assert matches
    assert max(match.even for match in matches) < 0.5


@pytest.mark.parametrize("mirror", [False, True])
def test_registration_finds_the_place_of_a_small_image(originals: list[np.ndarray], mirror: bool):
    small = cv2.resize(originals[4], (32, 32), interpolation=cv2.INTER_AREA)  # another shape than the original's
    a, b = features.extract(originals[4]), features.extract(mirrored(small) if mirror else small)
    right = np.array([[-1, 0, 1], [0, 4 / 3, 0], [0, 0, 1]]) if mirror else np.diag([1, 4 / 3, 1])
    off = np.array([[1.05, 0.03, -0.04], [-0.02, 0.96, 0.03], [0, 0, 1]])
    found = geometry.register(a, b, off @ right)
    assert found is not None
    away = np.abs(geometry.project(found, geometry.corners(a)) - geometry.project(right, geometry.corners(a))).max()
    assert away < 0.01
    assert compare(a, b, found).zncc > 0.98 > compare(a, b, off @ right).zncc


def test_registration_of_a_plain_image_finds_nothing(gallery: list[features.Picture]):
    assert geometry.register(gallery[0], features.extract(np.full((24, 32, 3), 128, np.uint8)), np.eye(3)) is None


@pytest.mark.parametrize(
    ("inliers", "even", "likeness", "detail", "expected"),
    [
        (16, 0.65, {}, 160, "features everywhere"),
        (15, 0.65, {}, 160, "shared features"),
        (16, 0.64, {}, 160, "shared features"),
        (16, 0.7, {"local": 0.2}, 160, "shared features"),
        (16, 0.7, {"cover_a": 0.4, "cover_b": 0.4}, 160, "shared features"),
        (15, 1.0, {}, 64, ""),
    ],
)
def test_judgement_by_even_features(inliers: int, even: float, likeness: dict[str, float], detail: int, expected: str):
    pixels = Likeness(zncc=0.1, local=0.3, half=0.4, texture=0.9, cover_a=1.0, cover_b=1.0)._replace(**likeness)
    assert judge(geometry.Match(np.eye(3), np.zeros((inliers, 2), int), False, even), pixels, detail).rule == expected


SAME = Likeness(zncc=0.95, local=0.95, half=0.95, texture=0.9, cover_a=1.0, cover_b=1.0)
DIFFERENT = SAME._replace(zncc=0.3, local=0.2, half=0.4)


@pytest.mark.parametrize(
    ("inliers", "likeness", "detail", "expected"),
    [
        (4, SAME, 160, "copy"),
        (3, SAME, 160, None),
        (11, SAME, 32, "review"),
        (12, SAME, 32, "copy"),
        (6, SAME._replace(zncc=0.98), 32, "copy"),
        (6, SAME._replace(zncc=0.98, texture=0.4), 32, None),
        (11, SAME._replace(zncc=0.98, cover_b=0.2), 32, "review"),
        (30, DIFFERENT._replace(local=0.62), 160, "copy"),
        (12, DIFFERENT._replace(local=0.5, half=0.9), 160, "copy"),
        (11, DIFFERENT._replace(local=0.5, half=0.9), 160, "review"),
        (12, DIFFERENT._replace(local=0.5, half=0.89), 160, "review"),
        (30, DIFFERENT, 160, "review"),
        (300, SAME._replace(cover_a=0.1, cover_b=0.3), 160, "review"),
        (9, DIFFERENT, 160, "review"),
        (9, DIFFERENT, 32, None),
    ],
)
def test_judgement(inliers: int, likeness: Likeness, detail: int, expected: str | None):
    assert judge(geometry.Match(np.eye(3), np.zeros((inliers, 2), int), False, 0.0), likeness, detail).outcome == expected
