"""The batched views against torchvision and against what their names promise."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as tv2
import torchvision.transforms.v2.functional as tv

from pipeline.learning.views import Draws, Mix, View, augment, mixed, viewer
from pipeline.models import inputs


def batch(n: int = 6, side: int = 12) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, side, side), dtype=np.uint8))


def draw(n: int = 6, seed: int = 0, first_pass: int = 0) -> Draws:
    return Draws(seed, np.full(n, first_pass), np.arange(n))


def test_shift_is_a_crop_of_the_reflected_image_and_its_mirror() -> None:
    pictures = batch(64)
    views = augment(pictures, 12, View(kind="shift", pad=3), draw(64))
    padded = tv.pad(pictures, [3, 3, 3, 3], padding_mode="reflect")
    found, mirrored = set(), 0
    for picture, view in zip(padded, views, strict=True):
        hits = [
            (y, x, flip)
            for y in range(7)
            for x in range(7)
            for flip in (False, True)
            if torch.equal(tv.horizontal_flip(view) if flip else view, picture[:, y : y + 12, x : x + 12])
        ]
        assert len(hits) == 1
        found.add(hits[0][:2])
        mirrored += hits[0][2]
    assert len(found) > 25
    assert 16 < mirrored < 48


def test_without_augmentation_the_view_is_the_centre() -> None:
    pictures = batch(side=16)
    views = augment(pictures, 12, View(kind="none", flip=False), draw())
    assert torch.equal(views, pictures[:, :, 2:14, 2:14])
    assert torch.equal(views, inputs.centre(pictures, 12))


def test_crop_of_the_whole_area_is_the_image() -> None:
    pictures = batch()
    views = augment(pictures, 12, View(kind="crop", scale=(1, 1), flip=False), draw())
    assert torch.allclose(views, pictures.float(), atol=0.01)


def test_crop_magnifies_within_the_image() -> None:
    ramp = torch.linspace(0, 255, 32).expand(1, 3, 32, 32).to(torch.uint8).repeat(200, 1, 1, 1)
    views = augment(ramp, 32, View(kind="crop", scale=(0.25, 0.25), flip=False), draw(200))
    widths = (views[:, 0, 0, -1] - views[:, 0, 0, 0]) / 255
    assert widths.mean() == pytest.approx(0.5, abs=0.04)
    centres = views[:, 0].mean((1, 2))
    assert centres.min() < 80
    assert centres.max() > 175


def test_colour_factors_follow_torchvision() -> None:
    picture = batch(1).float()
    grey = tv.rgb_to_grayscale(picture)
    for name, expected in (
        ("brightness", lambda f: picture * f),
        ("saturation", lambda f: grey + f * (picture - grey)),
        ("contrast", lambda f: grey.mean() + f * (picture - grey.mean())),
    ):
        view = View.model_validate({"kind": "none", "flip": False, name: 0.5})
        got = augment(picture, 12, view, draw(1, seed=1))
        errors = [(got - expected(f).clamp(0, 255)).abs().max() for f in torch.linspace(0.5, 1.5, 2001)]
        assert min(errors) < 0.6, name


def test_a_view_depends_on_seed_pass_and_row_and_not_on_its_batch() -> None:
    view = View(kind="crop", brightness=0.3)
    views = viewer(12, view, seed=5)
    rows, passes = np.array([4, 0, 3, 1, 5, 2]), np.array([0, 0, 1, 1, 2, 2])
    together = views(batch(), rows, passes)
    for i in range(6):
        assert torch.equal(together[i], views(batch()[i : i + 1], rows[i : i + 1], passes[i : i + 1])[0])
    assert not torch.equal(together, views(batch(), rows, passes + 1))
    assert not torch.equal(together, views(batch(), rows + 1, passes))
    assert not torch.equal(together, viewer(12, view, seed=6)(batch(), rows, passes))


def test_draws_are_uniform_and_independent() -> None:
    draws = Draws(0, np.repeat(np.arange(50), 200), np.tile(np.arange(200), 50))
    first, second, third = draws.uniform().double(), draws.uniform(-1, 1).double(), draws.integers(2, 7)
    assert 0 <= first.min() < 0.001 < 0.999 < first.max() < 1
    assert torch.histc(first, 10, 0, 1).sub(1000).abs().max() < 130  # more than four standard deviations
    assert second.min() < -0.99 < 0.99 < second.max() < 1
    assert third.bincount().tolist()[:2] == [0, 0]
    assert third.bincount()[2:].sub(2000).abs().max() < 170
    next_pass, next_row = first.view(50, 200)[1:], first.view(50, 200)[:, 1:]
    pairs = [(first, second), (first.view(50, 200)[:-1], next_pass), (first.view(50, 200)[:, :-1], next_row)]
    assert all(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.04 for a, b in pairs)


def test_normalise_equals_torchvision() -> None:
    given = inputs.Input(size=12)
    expected = tv.normalize(batch().float() / 255, list(given.mean), list(given.std))
    assert torch.allclose(inputs.normalise(batch(), given), expected, atol=1e-5)


def test_normalise_resizes_to_the_model() -> None:
    assert inputs.normalise(batch(side=16), inputs.Input(size=8)).shape == (6, 3, 8, 8)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (10, 100), (32, 32)])
def test_canvas_is_the_centre_at_the_short_side(height: int, width: int) -> None:
    picture = np.zeros((height, width, 3), np.uint8)
    picture[height // 2 - 2 : height // 2 + 2, width // 2 - 2 : width // 2 + 2] = 255
    square = inputs.canvas(picture, 32)
    assert square.shape == (32, 32, 3)
    y, x = np.nonzero(square[:, :, 0] > 128)
    assert y.mean() == pytest.approx(15.5, abs=1)
    assert x.mean() == pytest.approx(15.5, abs=1)


def test_randaugment_draws_torchvisions_operations_for_each_image() -> None:
    picture = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (3, 6, 6), dtype=np.uint8))
    picture = tv.resize(picture, [32, 32], antialias=True)
    torch.manual_seed(0)
    theirs = tv2.RandAugment(1, magnitude=9, num_magnitude_bins=31, interpolation=tv.InterpolationMode.BILINEAR)
    known = torch.stack([theirs(picture) for _ in range(500)]).unique(dim=0).float()
    view = View(kind="none", flip=False, randaugment=1, magnitude=0.3)
    ours = augment(picture.repeat(300, 1, 1, 1), 32, view, draw(300)).float()
    distances = (ours[:, None] - known).abs().mean((2, 3, 4))  # 300, K
    assert distances.min(1).values.max() < 1  # of 255
    assert len(known) > 15
    assert distances.min(0).values.max() < 1  # each of theirs was drawn
    twice = augment(picture.repeat(50, 1, 1, 1), 32, view.model_copy(update={"randaugment": 2}), draw(50)).float()
    assert len(twice.unique(dim=0)) > 25


def test_mixup_blends_neighbours_by_one_share() -> None:
    views = batch(5).float()
    out = mixed(views, Mix(mixup=1.0), draw(5))
    for i, j in ((0, 1), (1, 0), (2, 3), (3, 2)):
        share = ((out[i] - views[j]) / (views[i] - views[j]))[views[i] != views[j]]
        assert share.std() < 1e-3
        assert 0 <= share.mean() <= 1
    assert torch.equal(out[4], views[4])
    assert torch.allclose(out[0] + out[1], views[0] + views[1], atol=1e-3)


def test_cutmix_swaps_one_rectangle() -> None:
    views = batch(200, 16).float()
    out = mixed(views, Mix(cutmix=1.0), draw(200))
    areas = []
    for i in range(0, 200, 2):
        swapped = (out[i] == views[i + 1]).all(0) & (out[i + 1] == views[i]).all(0)
        kept = (out[i] == views[i]).all(0) & (out[i + 1] == views[i + 1]).all(0)
        assert (swapped ^ kept).all()
        y, x = swapped.nonzero().T
        if len(y):
            assert swapped[y.min() : y.max() + 1, x.min() : x.max() + 1].all()
        areas.append(float(swapped.float().mean()))
    assert 0.2 < np.mean(areas) < 0.5  # half, less what falls outside
    both = mixed(views, Mix(mixup=1.0, cutmix=1.0), draw(200))
    from_one = (both == views).all(1) | (both == views.view(-1, 2, 3, 16, 16).flip(1).view_as(views)).all(1)
    assert 60 < int(from_one.all(2).all(1).sum()) < 140  # a coin for each pair


def test_beta_draws_have_its_moments() -> None:
    share = draw(4000).beta(0.4).double()
    assert share.mean() == pytest.approx(0.5, abs=0.02)
    assert share.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)


def test_alternating_flips_show_each_image_both_ways_in_any_two_passes() -> None:
    pictures, view = batch(64), View(kind="none", flip="alternating")
    first, second, third = (augment(pictures, 12, view, draw(64, first_pass=n)) for n in range(3))
    assert torch.equal(first, tv.horizontal_flip(second))
    assert torch.equal(first, third)
    straight = sum(torch.equal(a, b) for a, b in zip(pictures, first, strict=True))
    assert 16 < straight < 48
    part = draw(64).of(slice(1, None, 2))
    assert torch.equal(part.alternates(), draw(64).alternates()[1::2])


def test_cutout_greys_a_square_around_any_place() -> None:
    pictures = torch.zeros(400, 3, 12, 12, dtype=torch.uint8)
    views = augment(pictures, 12, View(kind="none", flip=False, cutout=4), draw(400))
    assert set(views.unique().tolist()) == {0.0, 127.5}
    assert torch.equal(views[:, 0], views[:, 1])
    rows, columns = (views[:, 0] > 0).any(2).sum(1), (views[:, 0] > 0).any(1).sum(1)
    assert torch.equal((views[:, 0] > 0).sum((1, 2)), rows * columns)
    assert rows.min() == 2  # the place is a pixel of the image; the square may reach over its edge
    assert rows.max() == 4
    assert ((views[:, 0] > 0).any(0)).all()
