"""What the leak check is compared with: exhaustive SIFT matching, and perceptual hashes of two libraries.

imagededup's CNN is not among them: it downloads its weights when it is made.
"""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import imagehash  # type: ignore[import-untyped,import-not-found,unused-ignore]
import numpy as np
from imagededup.methods import PHash as ImagededupPHash  # type: ignore[import-untyped,import-not-found,unused-ignore]
from PIL import Image

from pipeline.leaks import features

RATIO = 0.8  # Lowe 2004
REPROJECTION = 0.02  # RANSAC's tolerance, in units of the longest side


class Exhaustive:
    """Each query matched with each reference image and its mirror image; the score is RANSAC's inliers of a homography."""

    def __init__(self, reference: Sequence[features.Picture]) -> None:
        both = [f for p in reference for f in (p.features, features.mirrored(p.features, float(p.extent[0])))]
        self.starts = np.r_[0, np.cumsum([len(f) for f in both])]
        self.points = np.concatenate([f.points for f in both])[:, :2]
        self.descriptors = np.concatenate([f.descriptors for f in both]).astype(np.float32)
        self.norms = (self.descriptors**2).sum(1)

    def scores(self, query: features.Picture) -> np.ndarray:
        """(reference images,) inliers."""
        q = query.features.descriptors.astype(np.float32)
        distance = self.norms - 2 * q @ self.descriptors.T + (q**2).sum(1)[:, None]
        nearest = np.minimum.reduceat(distance, self.starts[:-1], axis=1)
        inliers = []
        for i, (start, end) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            segment = distance[:, start:end]
            rows = segment.argmin(1)
            segment[np.arange(len(q)), rows] = np.inf
            good = nearest[:, i] < RATIO**2 * segment.min(1)
            inliers.append(self._agree(self.points[start + rows[good]], query.features.points[good, :2]))
        return np.array(inliers).reshape(-1, 2).max(1)

    @staticmethod
    def _agree(a: np.ndarray, b: np.ndarray) -> int:
        if len(a) < 4:
            return 0
        mask = cv2.findHomography(a.astype(np.float64), b.astype(np.float64), cv2.RANSAC, REPROJECTION)[1]
        return 0 if mask is None else int(mask.sum())


class Hashes:
    """A perceptual hash of 64 bits; the score is the number of those that agree."""

    def __init__(self, bits: Callable[[np.ndarray], np.ndarray], reference: Sequence[np.ndarray]) -> None:
        self.bits, self.reference = bits, np.stack([bits(image) for image in reference])

    def scores(self, query: np.ndarray) -> np.ndarray:
        return (self.reference == self.bits(query)).sum(1)


def imagehash_bits(image: np.ndarray) -> np.ndarray:
    """(64,) bool of an (H, W, 3) image."""
    hashed: Any = imagehash.phash(Image.fromarray(image))
    return np.asarray(hashed.hash).ravel()


def imagededup_bits(image: np.ndarray) -> np.ndarray:
    """(64,) bool of an (H, W, 3) image."""
    number = int(_IMAGEDEDUP.encode_image(image_array=image), 16)
    return np.array([number >> bit & 1 for bit in range(64)], bool)


_IMAGEDEDUP = ImagededupPHash(verbose=False)
