"""benchmarks.data writes what the recipes read."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets
import yaml
from PIL import Image

from benchmarks import data
from pipeline.errors import UserError
from tests.tiny import encoded, picture

ROOT = Path(__file__).parent.parent


class TwoClasses:
    """Stands in for torchvision's CIFAR10: five images of two classes."""

    classes = ("airplane", "automobile")

    def __init__(self, root: str, train: bool, download: bool) -> None:
        self.images = [(Image.fromarray(picture(i)), label) for i, label in enumerate((0, 1, 0, 0, 1) if train else (1, 0))]

    def __iter__(self) -> Any:
        return iter(self.images)


def members(file: Path) -> dict[str, bytes]:
    with tarfile.open(file, "r:") as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


def test_cifar10_keeps_every_pixel_and_every_recipe_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", TwoClasses)
    data.cifar10(tmp_path, tmp_path / "raw")
    even, odd, val = (members(tmp_path / "raw" / f"cifar10-{n}.tar") for n in ("train-00", "train-01", "val-00"))
    assert sorted(even) == ["airplane/0000.png", "airplane/0002.png", "automobile/0000.png"]
    assert sorted(odd) == ["airplane/0001.png", "automobile/0001.png"]
    assert sorted(val) == ["airplane/0000.png", "automobile/0000.png"]
    assert odd["airplane/0001.png"].startswith(b"\x89PNG")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(odd["airplane/0001.png"]))), picture(2))
    for recipe in ("cifar10", "simclr", "byot", "ablation"):
        sources = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())["prepare"]
        named = [s["path"] for s in (*sources["labelled"], *sources["val"]) if s["path"].startswith("cifar10")]
        assert named
        assert all(list((tmp_path / "raw").glob(path)) for path in named)


def test_a_set_that_cannot_be_had_says_what_to_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(UserError, match="cifar-10-batches-py"):
        data.cifar10(tmp_path, tmp_path / "raw")
    assert not list((tmp_path / "raw").glob("*"))


def test_tiny_imagenet_is_means_of_four_pixels_dealt_to_two_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PER_CLASS", 3)
    folder = tmp_path / "train" / "n01443537" / "images"
    folder.mkdir(parents=True)
    for i in (0, 2, 10, 11):
        (folder / f"n01443537_{i}.JPEG").write_bytes(encoded(picture(i, 64), "JPEG", quality=95))
    data.tiny_imagenet(tmp_path / "train", tmp_path / "raw")
    first, second = (members(tmp_path / "raw" / f"tinyimagenet32-pool-0{i}.tar") for i in (0, 1))
    assert list(first) == ["n01443537/images/n01443537_0.png", "n01443537/images/n01443537_10.png"]
    assert list(second) == ["n01443537/images/n01443537_2.png"]
    whole = np.asarray(Image.open(folder / "n01443537_0.JPEG")).astype(float)
    means = whole.reshape(32, 2, 32, 2, 3).mean((1, 3))
    small = np.asarray(Image.open(io.BytesIO(first["n01443537/images/n01443537_0.png"])))
    assert np.abs(small - means).max() <= 0.5


@pytest.mark.parametrize(("size", "images", "told"), [(64, 1, "has 1 images"), (63, 2, "64 x 64"), (64, 0, "no folders n")])
def test_another_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, images: int, told: str) -> None:
    monkeypatch.setattr(data, "PER_CLASS", 2)
    for i in range(images):
        file = tmp_path / "n1" / "images" / f"n1_{i}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(picture(i, size), "JPEG"))
    with pytest.raises(UserError, match=told):
        data.tiny_imagenet(tmp_path, tmp_path / "raw")
    assert not list((tmp_path / "raw").glob("*"))
