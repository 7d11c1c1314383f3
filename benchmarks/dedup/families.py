"""Transformed copies of photographs: what a leak may look like.

A family maps (H, W, 3) uint8 RGB and a generator to a copy.
"""

from collections.abc import Callable

import cv2
import numpy as np

Family = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def jpeg(quality: int) -> Family:
    def apply(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
        data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))

    return apply


def resize(scale: float) -> Family:
    def apply(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
        return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)

    return apply


def thumbnail(side: int) -> Family:
    def apply(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
        return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)

    return apply


def crop(area: float) -> Family:
    def apply(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        h, w = image.shape[:2]
        ch, cw = round(h * area**0.5), round(w * area**0.5)
        y, x = random.integers(h - ch + 1), random.integers(w - cw + 1)
        return image[y : y + ch, x : x + cw]

    return apply


def corner_crop(area: float) -> Family:
    def apply(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        h, w = image.shape[:2]
        ch, cw = round(h * area**0.5), round(w * area**0.5)
        y, x = random.integers(2) * (h - ch), random.integers(2) * (w - cw)
        return image[y : y + ch, x : x + cw]

    return apply


def rotate(degrees: float) -> Family:
    def apply(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        if degrees == 90:
            return np.ascontiguousarray(np.rot90(image, 1 + 2 * int(random.integers(2))))
        h, w = image.shape[:2]
        turn = cv2.getRotationMatrix2D((w / 2, h / 2), degrees * random.choice([-1, 1]), 1.0)
        return cv2.warpAffine(image, turn, (w, h), flags=cv2.INTER_LINEAR)

    return apply


def mirror(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return np.ascontiguousarray(image[:, ::-1])


def affine_light(gain: float, offset: float) -> Family:
    def apply(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
        return np.clip((image.astype(np.float32) - 128) * gain + 128 + offset, 0, 255).astype(np.uint8)

    return apply


def gamma(power: float) -> Family:
    def apply(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
        return np.rint(255 * (image / 255.0) ** power).astype(np.uint8)

    return apply


def grayscale(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blur(sigma: float) -> Family:
    """`sigma` in pixels of an image whose longest side is 500."""

    def apply(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
        return cv2.GaussianBlur(image, (0, 0), sigma * max(image.shape) / 500)

    return apply


def noise(sigma: float) -> Family:
    def apply(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return np.clip(image + random.normal(0, sigma, image.shape), 0, 255).astype(np.uint8)

    return apply


def _fit(word: str, width: int) -> float:
    return 0.94 * width / float(cv2.getTextSize(word, cv2.FONT_HERSHEY_DUPLEX, 1.0, 2)[0][0])


def draw_text(image: np.ndarray, words: list[str]) -> np.ndarray:
    """Lines of white text with a dark outline, as wide as the picture, in its lower half."""
    out = image.copy()
    h, w = out.shape[:2]
    for i, word in enumerate(words):
        size, at = _fit(word, w), (round(w * 0.03), round(h * (0.65 + 0.25 * i / len(words))))
        for colour, thick in ((0, 5), (255, 2)):
            cv2.putText(out, word, at, cv2.FONT_HERSHEY_DUPLEX, size, (colour,) * 3, max(1, round(thick * size)), cv2.LINE_AA)
    return out


def text(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    letters = list("ABCDEFGHKLMNPRSTUVXYZ")
    return draw_text(image, ["".join(random.choice(letters, 14)) for _ in range(2)])


def draw_logo(image: np.ndarray, share: float = 0.3, seed: int = 7) -> np.ndarray:
    """A detailed badge in the lower right corner, `share` of the short side wide."""
    random = np.random.default_rng(seed)
    side = 96
    badge = np.full((side, side, 3), 255, np.uint8)
    for _ in range(24):
        colour = tuple(int(c) for c in random.integers(0, 255, 3))
        a, b = (tuple(int(v) for v in random.integers(4, side - 4, 2)) for _ in range(2))
        cv2.rectangle(badge, a, b, colour, int(random.integers(1, 4)))
        cv2.circle(badge, a, int(random.integers(3, 18)), colour, -1)
    cv2.putText(badge, "ACME", (6, 58), cv2.FONT_HERSHEY_DUPLEX, 1.0, (0, 0, 0), 2, cv2.LINE_AA)
    out = image.copy()
    h, w = out.shape[:2]
    to = round(min(h, w) * share)
    out[h - to - 5 : h - 5, w - to - 5 : w - 5] = cv2.resize(badge, (to, to), interpolation=cv2.INTER_AREA)
    return out


def logo(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return draw_logo(image, seed=int(random.integers(1 << 30)))


def draw_caption(image: np.ndarray, words: str, share: float = 0.2) -> np.ndarray:
    """A white bar with a line of text below the picture, `share` of its height."""
    h, w = image.shape[:2]
    bar = np.full((round(h * share), w, 3), 255, np.uint8)
    size = _fit(words, w)
    cv2.putText(
        bar, words, (5, round(len(bar) * 0.65)), cv2.FONT_HERSHEY_DUPLEX, size, (0, 0, 0), max(1, round(2 * size)), cv2.LINE_AA
    )
    return np.vstack([image, bar])


def caption(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return draw_caption(image, "".join(random.choice(list("ABCDEFGHKLMNPRSTUVXYZ"), 16)))


def aspect(ratio: float) -> Family:
    def apply(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
        h, w = image.shape[:2]
        return cv2.resize(image, (round(w * ratio), h), interpolation=cv2.INTER_AREA)

    return apply


def border(share: float) -> Family:
    def apply(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        h, w = image.shape[:2]
        y, x = round(h * share), round(w * share)
        colour = [int(c) for c in random.integers(0, 256, 3)]
        return cv2.copyMakeBorder(image, y, y, x, x, cv2.BORDER_CONSTANT, value=colour)

    return apply


def collage(others: list[np.ndarray]) -> Family:
    """The photograph is one quarter, three of `others` are the rest."""

    def apply(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        h, w = image.shape[0] // 2, image.shape[1] // 2
        tiles = [image, *(others[i] for i in random.choice(len(others), 3, replace=False))]
        tiles = [cv2.resize(tiles[i], (w, h), interpolation=cv2.INTER_AREA) for i in random.permutation(4)]
        return np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])

    return apply


def perspective(strength: float) -> Family:
    """Every corner moves by up to `strength` of the side."""

    def apply(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        h, w = image.shape[:2]
        square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
        inward = np.where(square == 0, 1, -1) * random.uniform(0, strength, (4, 2))
        moved = (square + inward).astype(np.float32) * np.array([w, h], np.float32)
        h_matrix = cv2.getPerspectiveTransform(square * np.array([w, h], np.float32), moved)
        return cv2.warpPerspective(image, h_matrix, (w, h), flags=cv2.INTER_LINEAR)

    return apply


def families(others: list[np.ndarray]) -> dict[str, Family]:
    """All families by name; `others` are photographs for the rest of a collage."""
    return {
        "JPEG 75": jpeg(75),
        "JPEG 30": jpeg(30),
        "JPEG 10": jpeg(10),
        "resized to 0.5": resize(0.5),
        "resized to 0.25": resize(0.25),
        "thumbnail, 32 px": thumbnail(32),
        "crop, 80 % of the area": crop(0.8),
        "crop, 50 %": crop(0.5),
        "crop, 25 %": crop(0.25),
        "corner, 25 %": corner_crop(0.25),
        "rotated 5 degrees": rotate(5),
        "rotated 15 degrees": rotate(15),
        "rotated 90 degrees": rotate(90),
        "mirrored": mirror,
        "brightness + 50": affine_light(1, 50),
        "contrast 0.5": affine_light(0.5, 0),
        "gamma 2": gamma(2.0),
        "grayscale": grayscale,
        "blur, 3 px": blur(3),
        "noise, 20 levels": noise(20),
        "text": text,
        "logo": logo,
        "caption bar": caption,
        "aspect 0.7": aspect(0.7),
        "border, 15 %": border(0.15),
        "a quarter of a collage": collage(others),
        "perspective, 30 %": perspective(0.3),
    }
