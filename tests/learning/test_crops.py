"""Random resized crops: the boxes by their distribution, the pixels beside torchvision's."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torchvision.transforms.v2 import RandomResizedCrop

from pipeline.learning import crops
from pipeline.learning.views import Draws
from pipeline.models import inputs
from tests.tiny import picture


def draws(n: int, seed: int = 0) -> Draws:
    return Draws(seed, np.zeros(n, np.int64), np.arange(n))


@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 500), (900, 120)])
def test_boxes_are_distributed_as_torchvisions(width: int, height: int) -> None:
    """Area, aspect in pixels and place, of 4,000 boxes each."""
    n, scale, ratio = 4000, (0.2, 1.0), (3 / 4, 4 / 3)
    ours = crops.boxes(draws(n), torch.full((n,), width / height), scale, ratio).numpy() * [width, height, width, height]
    torch.manual_seed(0)
    transform, image = RandomResizedCrop(10, scale, ratio), torch.zeros(3, height, width)
    made = [transform.make_params([image]) for _ in range(n)]
    theirs = np.array([[p["left"], p["top"], p["width"], p["height"]] for p in made], float)
    for measure in (lambda b: b[:, 2] * b[:, 3] / (width * height), lambda b: np.log(b[:, 2] / b[:, 3])):
        assert np.quantile(measure(ours), [0.1, 0.5, 0.9]) == pytest.approx(
            np.quantile(measure(theirs), [0.1, 0.5, 0.9]), abs=0.02
        )
    assert (abs(ours.mean(0) - theirs.mean(0)) < 0.015 * np.array([width, height, width, height])).all()
    assert (ours >= -1e-3).all()
    assert (ours[:, :2] + ours[:, 2:] <= np.array([width, height]) + 1e-3).all()


@pytest.mark.parametrize("size", [8, 24, 40])
def test_pixels_are_torchvisions_on_the_same_boxes(size: int) -> None:
    """Smaller, about as large, and larger than the crop; the torchvision call crops and resizes with antialiasing."""
    canvases = torch.from_numpy(np.stack([picture(i, 48) for i in range(4)])).permute(0, 3, 1, 2)
    found = torch.tensor([[0, 0, 48, 48], [5, 9, 30, 24], [20, 1, 13, 40], [40, 40, 8, 8]])
    ours = crops.resampled(canvases, found / 48, size, torch.tensor([False, True, False, True]))
    for i, (left, top, width, height) in enumerate(found.tolist()):
        theirs = tv.resized_crop(canvases[i].float(), top, left, height, width, [size, size], antialias=True)
        assert torch.allclose(ours[i], tv.horizontal_flip(theirs) if i % 2 else theirs, atol=0.05)


def test_fine_stripes_become_grey_and_not_other_stripes() -> None:
    """What antialiasing is for: at a third of the size stripes of one pixel have no place."""
    stripes = (torch.arange(96) % 2 * 255).to(torch.uint8).expand(1, 3, 96, 96)
    out = crops.resampled(stripes, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 32, torch.tensor([False]))
    assert out.std() < 15
    assert stripes[..., 1::3].float().std() > 120  # what sampling without it sees


def test_a_view_of_a_photograph_is_the_crop_of_the_photograph() -> None:
    """Squeezed and cut again, against torchvision on the original: the same place in the same proportions."""
    image = picture(3, (300, 200))
    canvas = torch.from_numpy(inputs.squeezed(image, 128)).permute(2, 0, 1)[None]
    box = torch.tensor([[90, 20, 120, 160]])
    ours = crops.resampled(canvas, box / torch.tensor([300, 200, 300, 200]), 64, torch.tensor([False]))
    original = torch.from_numpy(image).permute(2, 0, 1).float()
    theirs = tv.resized_crop(original, 20, 90, 160, 120, [64, 64], antialias=True)
    assert (ours[0] - theirs).abs().mean() < 1.5


def test_no_part_of_a_photograph_is_out_of_reach() -> None:
    """A wide photograph's ends are seen, as those of its central square alone would not be."""
    found = crops.boxes(draws(500), torch.full((500,), 2.0), (0.1, 1.0), (3 / 4, 4 / 3))
    assert found[:, 0].min() < 0.02
    assert (found[:, 0] + found[:, 2]).max() > 0.98
