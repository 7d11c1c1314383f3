import numpy as np
import pytest
import torch

from pipeline.models import inputs
from pipeline.report.corruptions import CORRUPTIONS, SEVERITIES, Corrupted
from tests.photographs import photograph


@pytest.mark.parametrize("name", sorted(CORRUPTIONS.keys() - {"pixelate"}))
def test_harm_grows_with_severity(name: str) -> None:
    image = photograph(0, 64, 64)
    harmed = [CORRUPTIONS[name](image, severity, np.random.default_rng(0)) for severity in SEVERITIES]
    distances = [float(np.abs(h.astype(float) - image).mean()) for h in harmed]
    assert all(h.shape == image.shape and h.dtype == np.uint8 for h in harmed)
    assert 0 < distances[0] < distances[1] < distances[2]


def test_pixelated_images_have_fewer_pixels_the_severer_the_fewer() -> None:
    image = photograph(0, 64, 64)
    harmed = [CORRUPTIONS["pixelate"](image, severity, np.random.default_rng(0)) for severity in SEVERITIES]
    for axis in (0, 1):
        changes = [(np.diff(h.astype(int), axis=axis) != 0).any((1 - axis, 2)).sum() for h in harmed]
        assert changes == [60 - 1, 54 - 1, 41 - 1]
    assert all(h.shape == image.shape for h in harmed)


def test_contrast_keeps_the_mean_and_scales_around_it() -> None:
    image = photograph(1, 32, 32)
    harmed = CORRUPTIONS["contrast"](image, 3, np.random.default_rng(0)).astype(float)
    assert np.allclose(harmed.mean((0, 1)), image.mean((0, 1)), atol=0.3)
    assert np.allclose(harmed.std((0, 1)), 0.4 * image.std((0, 1)), atol=1)


def test_brightness_adds_to_the_value_and_keeps_the_hue() -> None:
    image = np.full((2, 2, 3), (100, 50, 25), np.uint8)
    assert CORRUPTIONS["brightness"](image, 3, np.random.default_rng(0))[0, 0].tolist() == [138, 69, 35]
    black = np.zeros((2, 2, 3), np.uint8)
    assert CORRUPTIONS["brightness"](black, 1, np.random.default_rng(0))[0, 0].tolist() == [13, 13, 13]


def test_noise_has_its_sigma() -> None:
    grey = np.full((100, 100, 3), 128, np.uint8)
    assert CORRUPTIONS["noise"](grey, 5, np.random.default_rng(0)).astype(float).std() == pytest.approx(25.5, rel=0.02)


def test_blur_keeps_its_proportion_to_the_image() -> None:
    def edge(side: int) -> np.ndarray:
        image = np.zeros((side, side, 3), np.uint8)
        image[:, side // 2 :] = 255
        return CORRUPTIONS["blur"](image, 5, np.random.default_rng(0))[side // 2, :, 0].astype(float)

    assert (edge(128).reshape(32, 4).mean(1) - edge(32)).max() < 30


def test_a_corrupted_image_depends_on_its_row_alone_and_the_original_stays() -> None:
    stored = np.stack([photograph(i, 16, 16) for i in range(6)])
    pixels = inputs.InMemory(stored.copy())
    harmed = Corrupted(pixels, "noise", 3)
    whole = harmed.gather(np.arange(6))
    assert torch.equal(harmed.gather(np.array([4, 1])), whole[[4, 1]])
    assert not torch.equal(
        whole[0].float() - torch.from_numpy(stored[0]).permute(2, 0, 1), whole[1].float() - pixels.gather(np.array([1]))[0]
    )
    assert np.array_equal(pixels.images.numpy(), stored)
    assert len(harmed) == 6
