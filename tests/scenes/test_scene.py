"""The drawn scenes: reproducible, textured, all different."""

import cv2
import numpy as np
import pytest

from pipeline.scenes.categories import CLASSES, OTHERS
from pipeline.scenes.scene import draw


def scene(category: str, number: int, size: int = 96) -> np.ndarray:
    return draw(category, np.random.default_rng([3, number]), size)


@pytest.fixture(scope="module")
def many() -> np.ndarray:
    """(N, 96, 96, 3): every category, a few scenes each."""
    categories = CLASSES + OTHERS
    return np.stack([scene(category, 10 * c + i) for c, category in enumerate(categories) for i in range(5)])


@pytest.mark.parametrize("category", CLASSES + OTHERS)
def test_a_scene_is_an_rgb_picture_that_its_seed_fixes(category: str) -> None:
    image = scene(category, 0, size=100)
    assert image.shape == (100, 100, 3)
    assert image.dtype == np.uint8
    np.random.seed(1)  # noqa: NPY002 - the global state must not matter
    assert np.array_equal(image, scene(category, 0, size=100))
    assert not np.array_equal(image, scene(category, 1, size=100))


def test_classes_and_others_are_sorted_and_disjoint() -> None:
    assert len(CLASSES) >= 8
    assert list(CLASSES) == sorted(set(CLASSES))
    assert list(OTHERS) == sorted(set(OTHERS))
    assert not set(CLASSES) & set(OTHERS)


def test_the_category_decides_what_is_drawn() -> None:
    """From the same seed, the ground and the light are those of every category, but the object is another."""
    pictures = [scene(category, 7).tobytes() for category in CLASSES + OTHERS]
    assert len(set(pictures)) == len(pictures)


def test_scenes_have_enough_texture_for_sift(many: np.ndarray) -> None:
    sift = cv2.SIFT.create()
    grey = (cv2.cvtColor(cv2.resize(image, (200, 200), interpolation=cv2.INTER_CUBIC), cv2.COLOR_RGB2GRAY) for image in many)
    found = np.array([len(sift.detect(image, None)) for image in grey])
    assert np.mean(found >= 40) >= 0.98


def test_scenes_are_well_exposed(many: np.ndarray) -> None:
    means = many.mean((1, 2, 3))
    assert means.min() > 60
    assert means.max() < 170
    assert np.mean((many == 0) | (many == 255)) < 0.1


def test_no_two_scenes_look_alike(many: np.ndarray) -> None:
    """Thumbnails, which survive every re-encoding, correlate for copies of a scene and for nothing else."""

    def thumbnails(images: np.ndarray) -> np.ndarray:
        small = np.stack([cv2.resize(image, (12, 12), interpolation=cv2.INTER_AREA).ravel() for image in images])
        centred = small - small.mean(1, keepdims=True)
        return centred / np.linalg.norm(centred, axis=1, keepdims=True)

    between = thumbnails(many) @ thumbnails(many).T
    np.fill_diagonal(between, 0)
    blurred = np.stack([cv2.GaussianBlur(image, (0, 0), 1.5) for image in many])
    copies = (thumbnails(many) * thumbnails(blurred)).sum(1)
    assert between.max() < 0.9 < copies.min()


def test_bad_requests_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"no such scene category: 'unicorn'; there are .*boat"):
        draw("unicorn", rng, 96)
    with pytest.raises(ValueError, match="96 pixels or more, not 64"):
        draw("boat", rng, 64)
