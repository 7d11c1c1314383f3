"""Common corruptions after Hendrycks and Dietterich (ICLR 2019): how much of an accuracy is left on worse images.

Six of their nineteen at three of their five strengths, computed on the fly; the strengths are CIFAR-10-C's, with the blur in
proportion to the image. Figures are therefore comparable with each other, not with published ones.
"""

from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
import torch

from pipeline.models.inputs import Pixels

SEVERITIES = (1, 3, 5)

Corruption = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
"""(H, W, 3) uint8, one of SEVERITIES, the image's own random numbers -> (H, W, 3) uint8."""


def noise(image: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    """Gaussian noise."""
    sigma = 255 * {1: 0.04, 3: 0.08, 5: 0.10}[severity]
    return _bytes(image + random.normal(0, sigma, image.shape))


def blur(image: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    """Gaussian blur, its radius in proportion to the image: of a 32 px image 0.4, 0.7 or 1 pixel."""
    sigma = {1: 0.4, 3: 0.7, 5: 1.0}[severity] * image.shape[0] / 32
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)


def contrast(image: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    """Every channel drawn to its mean."""
    kept = {1: 0.75, 3: 0.4, 5: 0.15}[severity]
    mean = image.mean((0, 1))
    return _bytes(mean + kept * (image - mean))


def brightness(image: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    """Lighter: the same amount added to the largest channel of each pixel, hue and saturation kept."""
    added = 255 * {1: 0.05, 3: 0.15, 5: 0.3}[severity]
    value = image.max(2, keepdims=True).astype(np.float64)
    brighter = np.minimum(value + added, 255)
    return _bytes(np.where(value > 0, image * (brighter / np.maximum(value, 1)), brighter))


def jpeg(image: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    """Compressed at a low quality."""
    quality = {1: 80, 3: 58, 5: 40}[severity]
    return simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, colorsubsampling="420"))


def pixelate(image: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    """Made smaller, and large again."""
    height, width = image.shape[:2]
    scale = {1: 0.95, 3: 0.85, 5: 0.65}[severity]
    small = cv2.resize(image, (int(width * scale), int(height * scale)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)


CORRUPTIONS: dict[str, Corruption] = {f.__name__: f for f in (noise, blur, contrast, brightness, jpeg, pixelate)}


class Corrupted:
    """Decoded images, each with a corruption of its own random numbers: a function of its row number and the severity."""

    def __init__(self, pixels: Pixels, corruption: str, severity: int) -> None:
        self.pixels, self.corrupt, self.severity = pixels, CORRUPTIONS[corruption], severity

    def __len__(self) -> int:
        return len(self.pixels)

    def gather(self, rows: np.ndarray) -> torch.Tensor:
        """(B, 3, side, side) uint8 of the given rows, in that order."""
        whole = self.pixels.gather(rows).permute(0, 2, 3, 1).numpy().copy()  # B, H, W, C
        for i, row in enumerate(rows):
            whole[i] = self.corrupt(whole[i], self.severity, np.random.default_rng((self.severity, int(row))))
        return torch.from_numpy(whole).permute(0, 3, 1, 2)


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(np.round(image), 0, 255).astype(np.uint8)
