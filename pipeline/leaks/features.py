"""What the leak check keeps of an image: SIFT features and a small grey copy.

Coordinates are in units of an image's longest side, so that they do not depend on the size an image happens to have.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

SIDE = 200
"""Longest side in pixels at which features are computed. Small images are enlarged to it: nothing else makes up for that."""
LOOK = 160
"""Longest side in pixels at which images are compared."""
KEYPOINTS = 300
FEW = 40
"""With fewer keypoints than this an image is looked at again with a lower contrast threshold."""
VERIFIABLE = 12
"""With fewer than this even then, an image can be neither cleared nor convicted."""


def _sift(contrast: float) -> Any:
    create = getattr(cv2, "SIFT_create")  # noqa: B009 - OpenCV 5's type stubs have lost it
    return create(KEYPOINTS, 3, contrast, 10, 1.6, enable_precise_upscale=True)


_SIFT: Any = _sift(contrast=0.01)
_SENSITIVE: Any = _sift(contrast=0.001)
_BITS = 512.0  # RootSIFT entries lie in 0..0.5 but for a flat patch: one byte each

# Mirroring an image turns its SIFT descriptors around the keypoint's axis: rows of the 4 x 4 grid and signs of the 8 directions.
MIRROR = np.arange(128).reshape(4, 4, 8)[::-1][:, :, -np.arange(8) % 8].reshape(128)

# The negative has every keypoint at its place, turned by 180 degrees: the same directions in a grid that stands on its head.
NEGATIVE = np.arange(128).reshape(4, 4, 8)[::-1, ::-1].reshape(128)
# Changes its sign with NEGATIVE, and is of what does so the part that varies most (close to the first principal component).
_POLARITY = np.tile(np.outer([1, 1, -1, -1], np.cos(np.arange(8) * np.pi / 4)), (4, 1)).reshape(128).astype(np.float32)


class Features(NamedTuple):
    """n keypoints of one image.

    `points`: (n, 4) float32, x and y and diameter in units of the longest side, angle in radians (clockwise, as y points down).
    `descriptors`: (n, 128) uint8, RootSIFT (Arandjelovic and Zisserman 2012) scaled to bytes.
    """

    points: np.ndarray
    descriptors: np.ndarray

    def __len__(self) -> int:
        return len(self.points)


NO_FEATURES = Features(np.zeros((0, 4), np.float32), np.zeros((0, 128), np.uint8))


class Picture(NamedTuple):
    """What the leak check keeps of an image.

    `grey`: (h, w) uint8, no longer than LOOK. `extent`: (2,) float32, width and height in units of the longest side.
    """

    features: Features
    grey: np.ndarray
    extent: np.ndarray

    @property
    def detail(self) -> int:
        """The longest side in pixels that carry information: that of the original, where that is less than LOOK."""
        return max(self.grey.shape)

    @property
    def is_large(self) -> bool:
        """Whether it has at least LOOK pixels: of a smaller image few features are found again in a copy."""
        return self.detail >= LOOK


def extract(image: np.ndarray) -> Picture:
    """Features and a small grey copy of (H, W, 3) uint8 RGB, or (H, W) grey."""
    grey = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    extent = np.array(grey.shape[::-1], np.float32) / max(grey.shape)
    at_side = resize(grey, SIDE)
    keypoints, descriptors = _SIFT.detectAndCompute(at_side, None)
    if len(keypoints) < FEW:
        keypoints, descriptors = _SENSITIVE.detectAndCompute(at_side, None)
    if not keypoints:
        descriptors = np.zeros((0, 128), np.float32)
    points = _points(keypoints, extent / np.array(at_side.shape[::-1]))
    return Picture(Features(points, _root(descriptors)), resize(grey, min(LOOK, max(grey.shape))), extent)


def resize(grey: np.ndarray, longest: int) -> np.ndarray:
    """(h, w) to a longest side of `longest` pixels, averaging down or cubic up."""
    scale = longest / max(grey.shape)
    if scale == 1:
        return grey
    to = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    return cv2.resize(grey, to, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


THUMBNAIL = 16


def thumbnail(picture: Picture, mirror: bool = False) -> np.ndarray:
    """(256,) float32 of mean 0 and length 1, so that the dot product of two is the correlation of the images as thumbnails."""
    small = cv2.resize(picture.grey, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float32)
    centred = (small[:, ::-1] if mirror else small).ravel() - small.mean()
    length: np.ndarray = centred / max(float(np.linalg.norm(centred)), 1e-6)
    return length


def _points(keypoints: Sequence[Any], pixel: np.ndarray) -> np.ndarray:
    raw = np.array([(*k.pt, k.size, k.angle) for k in keypoints], np.float32).reshape(-1, 4)
    raw[:, :2] = (raw[:, :2] + 0.5) * pixel  # OpenCV puts the origin at the centre of the first pixel
    raw[:, 2] /= SIDE
    raw[:, 3] = np.deg2rad(raw[:, 3])
    return raw


def _root(descriptors: np.ndarray) -> np.ndarray:
    share = descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1e-6)
    return np.clip(np.rint(np.sqrt(share) * _BITS), 0, 255).astype(np.uint8)


def mirrored(features: Features, width: float) -> Features:
    """The features of the mirror image, without extracting them again; `width` in units of the longest side."""
    points = features.points.copy()
    points[:, 0] = width - points[:, 0]
    points[:, 3] = np.pi - points[:, 3]
    return Features(points, features.descriptors[:, MIRROR])


def negative(picture: Picture) -> Picture:
    """The negative of an image, without extracting its features again."""
    points = picture.features.points.copy()
    points[:, 3] += np.pi
    own = Features(points, picture.features.descriptors[:, NEGATIVE])
    return picture._replace(features=own, grey=255 - picture.grey)


def either_polarity(descriptors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 128) uint8, of each descriptor and its NEGATIVE one of the two, whichever was given; (n,) bool, whether the other was.

    Noise turns 3.4 % of them, those near the border: such a feature has one vote less.
    """
    turned = descriptors @ _POLARITY < 0
    return np.where(turned[:, None], descriptors[:, NEGATIVE], descriptors), turned


class Bag(NamedTuple):
    """The features of many images, one after another: `owner` (n,) int32 ascending is the row of the image each belongs to."""

    owner: np.ndarray
    points: np.ndarray
    descriptors: np.ndarray


def bag(features: Sequence[Features], first: int = 0) -> Bag:
    """The features of images `first`, `first` + 1, ..."""
    owner = np.repeat(np.arange(first, first + len(features), dtype=np.int32), [len(f) for f in features])
    return Bag(owner, np.concatenate([f.points for f in features]), np.concatenate([f.descriptors for f in features]))
