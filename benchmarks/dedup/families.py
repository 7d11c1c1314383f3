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


def vignette(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Dark towards the corners, black in them."""
    return np.rint(image * np.clip(1.35 - 1.35 * _radius(image)[..., None] ** 2, 0, 1)).astype(np.uint8)


def _radius(image: np.ndarray) -> np.ndarray:
    """(H, W), 0 in the middle and 1 in the corners."""
    y, x = np.indices(image.shape[:2], np.float32)
    h, w = image.shape[:2]
    radius: np.ndarray = np.hypot((x / (w - 1) - 0.5) * 2, (y / (h - 1) - 0.5) * 2) / 2**0.5
    return radius


def black_corners(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Black outside of an ellipse, as of a peephole."""
    return np.where(_radius(image)[..., None] < 0.72, image, 0).astype(np.uint8)


def radial(strength: float) -> Family:
    """Barrel distortion (positive) or pincushion; nothing leaves the frame of a barrel."""

    def apply(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
        h, w = image.shape[:2]
        y, x = np.indices((h, w), np.float32)
        grow = (1 + strength * _radius(image) ** 2) / (1 + max(strength, 0))
        return _remap(image, w / 2 + (x - w / 2) * grow, h / 2 + (y - h / 2) * grow)

    return apply


def _remap(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return cv2.remap(image, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def swirl(degrees: float) -> Family:
    """The middle is turned, by less and less to three quarters of the way to the corners."""

    def apply(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        h, w = image.shape[:2]
        y, x = np.indices((h, w), np.float32)
        turn = np.deg2rad(degrees) * random.choice([-1, 1]) * np.clip(1 - _radius(image) / 0.75, 0, 1)
        dx, dy = x - w / 2, y - h / 2
        return _remap(image, w / 2 + dx * np.cos(turn) - dy * np.sin(turn), h / 2 + dx * np.sin(turn) + dy * np.cos(turn))

    return apply


def wave(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Rows and columns shifted by a sine of 2 % of the longest side."""
    y, x = np.indices(image.shape[:2], np.float32)
    side = max(image.shape)
    a, b = random.uniform(0, 2 * np.pi, 2)
    shift = 0.02 * side
    return _remap(image, x + shift * np.sin(y * 12 / side + a), y + shift * np.sin(x * 12 / side + b))


def stickers(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Six discs and stars, each a quarter of the short side wide."""
    out = image.copy()
    h, w = out.shape[:2]
    r = min(h, w) // 8
    for _ in range(6):
        x, y = int(random.integers(r, w - r)), int(random.integers(r, h - r))
        fill, line = ([int(c) for c in random.integers(0, 256, 3)] for _ in range(2))
        cv2.circle(out, (x, y), r, fill, -1, cv2.LINE_AA)
        angles = np.arange(10) * np.pi / 5 + random.uniform(0, 6)
        star = np.stack([np.cos(angles), np.sin(angles)], 1) * (r * np.where(np.arange(10) % 2, 0.4, 0.9))[:, None]
        cv2.fillPoly(out, [np.rint(star + np.array([x, y])).astype(np.int32)], line, cv2.LINE_AA)
    return out


def erased(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Four plain boxes of a third of each side."""
    out = image.copy()
    h, w = out.shape[:2]
    for _ in range(4):
        y, x = int(random.integers(h - h // 3)), int(random.integers(w - w // 3))
        out[y : y + h // 3, x : x + w // 3] = random.integers(0, 256, 3)
    return out


def blend(share: float, others: list[np.ndarray]) -> Family:
    """`share` of the photograph, the rest another one that shows through."""

    def apply(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        other = others[int(random.integers(len(others)))]
        other = cv2.resize(other, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_AREA)
        return cv2.addWeighted(image, share, other, 1 - share, 0)

    return apply


def screen(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A photograph of a screen: a grid of dark lines, a slant, a reflection, too much contrast."""
    out = image.astype(np.float32)
    out[::3] *= 0.6
    out[:, ::3] *= 0.8
    x = np.arange(image.shape[1], dtype=np.float32)
    out += 90 * np.exp(-(((x / image.shape[1] - random.uniform(0.2, 0.8)) * 4) ** 2))[:, None]
    out = np.clip((out - 128) * 1.3 + 118, 0, 255)
    return perspective(0.12)(out.astype(np.uint8), random)


def posterize(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return (image // 64 * 85).astype(np.uint8)


def solarize(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return np.where(image < 128, image, 255 - image).astype(np.uint8)


def negative(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return 255 - image


def marked(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A word of its own all over the picture, half transparent."""
    word = "".join(random.choice(list("ABCDEFGHKLMNPRSTUVXYZ"), 7))
    marks, (h, w) = image.copy(), image.shape[:2]
    size = _fit(word, w // 2)
    for i in range(6):
        for j in (0, 1):
            at = (round(w * j / 2), round(h * (i + 0.7) / 6))
            cv2.putText(marks, word, at, cv2.FONT_HERSHEY_DUPLEX, size, (255,) * 3, max(1, round(2 * size)), cv2.LINE_AA)
    return cv2.addWeighted(image, 0.5, marks, 0.5, 0)


def pixelate(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Blocks of a sixtieth of the longest side."""
    h, w = image.shape[:2]
    small = cv2.resize(image, (max(1, w * 60 // max(h, w)), max(1, h * 60 // max(h, w))), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (w, h), interpolation=cv2.INTER_NEAREST)


def in_order(*steps: Family) -> Family:
    def apply(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        for step in steps:
            image = np.ascontiguousarray(step(image, random))
        return image

    return apply


def hard_families(others: list[np.ndarray]) -> dict[str, Family]:
    """Copies that are changed in part, or bent, so that many features agree and many pixels do not."""
    return {
        "vignette": vignette,
        "black corners": black_corners,
        "barrel, 0.3": radial(0.3),
        "barrel, 0.6": radial(0.6),
        "pincushion, 0.3": radial(-0.3),
        "swirl, 45 degrees": swirl(45),
        "swirl, 90 degrees": swirl(90),
        "wave, 2 %": wave,
        "six stickers": stickers,
        "four erased boxes": erased,
        "blend, 70 %": blend(0.7, others),
        "blend, 50 %": blend(0.5, others),
        "photograph of a screen": screen,
        "posterized, 4 levels": posterize,
        "solarized": solarize,
        "negative": negative,
        "own watermark all over": marked,
        "pixelated to 60": pixelate,
        "mirrored and stickers": in_order(mirror, stickers),
        "crop, 50 %, and text": in_order(crop(0.5), text),
        "border and vignette": in_order(vignette, border(0.15)),
        "JPEG 10 and erased boxes": in_order(erased, jpeg(10)),
    }
