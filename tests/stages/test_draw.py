"""`draw`: the same files from the same seed, a truth that is true, leaks that are leaks, and broken files that are broken."""

import itertools
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipeline.harness.machine import Machine
from pipeline.scenes import categories, dataset
from pipeline.stages import draw
from pipeline.store import artifact
from pipeline.store.decode import ImageRefused, decode

SMALL = {"seed": 5, "labelled": 1, "val": 4, "in_class": 24, "out_of_class": 60, "leaks": 27, "broken": 6, "members": 60}


class Drawn:
    """The outs of one run."""

    def __init__(self, folder: Path, workers: int, **changed: Any) -> None:
        self.out, self.truth_out = folder / "out", folder / "truth"
        params = dataset.Draw.model_validate(SMALL | changed)
        self.metrics = draw.run(params, out=self.out, truth_out=self.truth_out, machine=Machine(workers=workers))
        self.truth = pq.read_table(self.truth_out / "truth.parquet").to_pylist()

    def members(self, name: str) -> dict[str, bytes]:
        with tarfile.open(self.out / name) as tar:
            return {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]

    def pool(self) -> dict[str, bytes]:
        tars = sorted(path.name for path in self.out.glob("pool-*.tar"))
        return {name: data for tar in tars for name, data in self.members(tar).items()}

    def files(self) -> dict[str, bytes]:
        return {f"{d.name}/{f.name}": f.read_bytes() for d in (self.out, self.truth_out) for f in d.iterdir()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return Drawn(tmp_path_factory.mktemp("drawn"), workers=1)


def test_the_same_seed_draws_the_same_bytes_whoever_draws(drawn: Drawn, tmp_path: Path) -> None:
    assert Drawn(tmp_path / "two", workers=2).files() == drawn.files()
    assert Drawn(tmp_path / "other", workers=1, seed=6).files() != drawn.files()


def test_the_sets_hold_what_params_ask_for(drawn: Drawn) -> None:
    artifact.verify(drawn.out)
    artifact.verify(drawn.truth_out)
    for tar, per_class in (("labelled.tar", 1), ("val.tar", 4)):
        expected = [f"{name}/{i:04d}.jpg" for name in categories.CLASSES for i in range(per_class)]
        assert list(drawn.members(tar)) == expected
    assert Counter(row["kind"] for row in drawn.truth) == {"in_class": 24, "out_of_class": 60, "leak": 27, "broken": 6}
    assert drawn.metrics == {"labelled": 10, "val": 40, "pool": 117}


def test_no_clean_file_is_drawn_twice(drawn: Drawn) -> None:
    files = [*drawn.members("labelled.tar").values(), *drawn.members("val.tar").values(), *drawn.pool().values()]
    assert len(set(files)) == len(files) - Counter(row["breakage"] for row in drawn.truth)["empty"] + 1


def test_the_truth_names_every_member_of_the_pool(drawn: Drawn) -> None:
    rows = [(row["tar"], row["member"]) for row in drawn.truth]
    tars = ("pool-00.tar", "pool-01.tar")
    assert rows == [(tar, member) for tar in tars for member in drawn.members(tar)]
    for row in drawn.truth:
        assert (row["label"] is not None) == (row["kind"] == "in_class" or row["kind"] == "leak")
        assert (row["leak_of"] in drawn.members("val.tar")) == (row["kind"] == "leak")
        assert (row["transform"] in dataset.TRANSFORMS) == (row["kind"] == "leak")
        assert (row["breakage"] in dataset.BREAKAGES) == (row["kind"] == "broken")


def test_the_place_in_the_pool_tells_nothing(drawn: Drawn) -> None:
    assert list(drawn.pool()) == [f"img/{i:06d}.jpg" for i in range(117)]
    kinds = [row["kind"] for row in drawn.truth]
    changes = sum(a != b for a, b in itertools.pairwise(kinds))
    assert changes > 40  # sorted by kind, there would be 3
    with tarfile.open(drawn.out / "pool-00.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in tar} == {(0, 0, 0, 0o644, "")}


def test_broken_files_are_refused_for_their_own_reason_and_all_others_decode(drawn: Drawn) -> None:
    files = drawn.pool()
    reasons = {
        "empty": "empty file",
        "truncated": "damaged: ",
        "damaged": "damaged: ",
        "plain_text": "not an image",
        "html": "not an image",
        "oversized": "oversized: 60000 x 60000",
    }
    for row in drawn.truth:
        if row["kind"] == "broken":
            with pytest.raises(ImageRefused, match=reasons[row["breakage"]]):
                decode(files[row["member"]])
            del reasons[row["breakage"]]
        else:
            assert min(decode(files[row["member"]]).shape[:2]) >= 64
    assert not reasons


def _shared_points(one: np.ndarray, other: np.ndarray) -> int:
    """SIFT matches that agree on one similarity transform, of the picture or of its mirror image."""
    sift, matcher = cv2.SIFT.create(contrastThreshold=0.02), cv2.BFMatcher()
    best = 0
    points, descriptors = sift.detectAndCompute(_large(one), None)
    for view in (other, other[:, ::-1]):
        view_points, view_descriptors = sift.detectAndCompute(_large(view), None)
        pairs = matcher.knnMatch(descriptors, view_descriptors, k=2)
        good = [a for a, b in pairs if a.distance < 0.8 * b.distance]
        if len(good) >= 3:
            source = np.array([points[m.queryIdx].pt for m in good], np.float32)
            target = np.array([view_points[m.trainIdx].pt for m in good], np.float32)
            inliers = cv2.estimateAffinePartial2D(source, target, ransacReprojThreshold=4)[1]
            best = max(best, int(inliers.sum()))
    return best


def _large(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.resize(image, (200, 200), interpolation=cv2.INTER_CUBIC), cv2.COLOR_RGB2GRAY)


@pytest.mark.whole
def test_a_leak_is_its_validation_picture_and_a_clean_picture_is_not(drawn: Drawn) -> None:
    pool, val = drawn.pool(), drawn.members("val.tar")
    leaks = [row for row in drawn.truth if row["kind"] == "leak"]
    clean = [row for row in drawn.truth if row["kind"] == "in_class"]
    assert set(Counter(row["transform"] for row in leaks).values()) == {3}
    assert len({row["leak_of"] for row in leaks}) == len(leaks)
    for leak, other in zip(leaks, clean, strict=False):
        original = decode(val[leak["leak_of"]])
        assert pool[leak["member"]] != val[leak["leak_of"]]
        assert _shared_points(decode(pool[leak["member"]]), original) >= 15, leak
        assert _shared_points(decode(pool[other["member"]]), original) < 8, (leak, other)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"out_of_class": 56}, "out_of_class: 56 is less than half of the pool"),
        ({"leaks": 41, "out_of_class": 99}, "leaks: 41 are more than the 40 validation images"),
        ({"labeled": 3}, "labeled"),
    ],
)
def test_params_that_cannot_be_drawn_are_refused(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        dataset.Draw.model_validate(SMALL | changed)


def test_more_labelled_images_leave_val_the_pool_and_the_first_ones_as_they_are() -> None:
    """Pixels follow from (seed, stream, number), so that equal scenes are equal files."""
    few, more = dict(dataset.pictures_of(dataset.LABELLED, 50)), dict(dataset.pictures_of(dataset.LABELLED, 60))
    assert few.items() <= more.items()
    numbers = [scene.number for scene in more.values()]
    assert len(set(numbers)) == len(numbers) == 600
    assert [scene.number for scene in few.values()] == list(range(500))  # as they always were
    assert [scene.number for _, scene in dataset.pictures_of(dataset.VAL, 100)] == list(range(1000))
    pools = [dataset.pool_contents(dataset.Draw(seed=0, labelled=labelled)) for labelled in (50, 60)]
    assert pools[0] == pools[1]
