"""Photograph-like scenes, drawn from a seed: the built-in data set of winnow.

A scene is one object of a category on a textured ground, among litter, often half hidden, under one light, seen by a
noisy camera. The category fixes what the object is made of; its pose, proportions, colours, ground and light are
drawn anew for every scene, so colour tells nothing and no two scenes share a pixel of texture.

    image = draw("fish", np.random.default_rng(7), size=96)   # uint8 (96, 96, 3), RGB
"""

import colorsys

import cv2
import numpy as np

from pipeline.scenes.categories import (
    DARK,
    GROUNDS,
    KINDS,
    MAIN,
    SECOND,
    Part,
    Parts,
    Rng,
    box,
    disc,
    lump,
    moved,
    scatter,
)

SUBPIXEL_BITS = 4
"""OpenCV draws from fixed-point coordinates with this many fractional bits."""


TYPICAL = 0.7
"""Share of the scenes that lie on the ground usual for their category; the others lie on any."""

OCCLUDED = 0.25
"""Share of the scenes with something between the camera and the object."""

# Around the object ----------------------------------------------------------------------------------------------------


def _litter(rng: Rng) -> Parts:
    """A few things larger than the ground's grain and smaller than the object: sticks, lumps and slabs."""
    parts = []
    for x, y, length, breadth, angle, paint in scatter(rng, int(rng.integers(0, 5)), (0.12, 0.35), (0.05, 0.2)):
        outline = (
            lump(rng, x, y, 0.5 * length),
            disc(x, y, length, breadth, angle),
            moved(box(-length, -breadth, length, breadth), angle, x, y),
        )[rng.integers(3)]
        parts.append(Part(outline, int(paint)))
    return parts


def _occluder(rng: Rng) -> Parts:
    """Something between the camera and the object: a branch with leaves, or a post, entering from one edge."""
    angle = rng.uniform(0, 2 * np.pi)
    offset = rng.uniform(-0.5, 0.5)
    start, end = np.array([1.5, offset]), np.array([rng.uniform(-0.3, 0.5), offset + rng.uniform(-0.4, 0.4)])
    parts = [Part(np.stack([start, end]), DARK, rng.uniform(0.04, 0.16))]
    for along in rng.uniform(0, 1, int(rng.integers(0, 6))):
        x, y = start + along * (end - start) + rng.uniform(-0.12, 0.12, 2)
        parts.append(Part(disc(x, y, rng.uniform(0.1, 0.22), rng.uniform(0.05, 0.1), rng.uniform(0, np.pi)), MAIN))
    return [part._replace(outline=moved(part.outline, angle)) for part in parts]


# Paint, light and camera ----------------------------------------------------------------------------------------------


def _noise(rng: Rng, size: int, coarsest: int, fade: float) -> np.ndarray:
    """Multi-octave value noise, float32 (size, size), within [0, 1]: a grid of `coarsest` cells, halved down to pixels.

    Each octave weighs `fade` times the one before.
    """
    field = np.zeros((size, size), np.float32)
    weight, cells = 1.0, coarsest
    while cells < size:
        grid = rng.random((cells, cells), dtype=np.float32)
        field += weight * cv2.resize(grid, (size, size), interpolation=cv2.INTER_LINEAR)
        weight, cells = weight * fade, cells * 2
    return cv2.normalize(field, None, 0.0, 1.0, cv2.NORM_MINMAX)


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, min(saturation, 1), min(value, 1)))


def _palette(rng: Rng, hue: float, saturation: float, contrast: float) -> np.ndarray:
    """Colours (5, 4) RGBA, 0..255, indexed by paint; `contrast` in [0, 1] spreads the first four apart."""
    value = rng.uniform(0.4, 0.8)
    other = hue + contrast * rng.uniform(-0.4, 0.4)
    colours = (
        _colour(hue, saturation, value),
        _colour(other, saturation * rng.uniform(0.3, 1.3), value + contrast * rng.uniform(-0.35, 0.35)),
        _colour(hue, saturation, value * (1 - 0.6 * contrast)),
        _colour(other, saturation * (1 - 0.6 * contrast), value + (1 - value) * 0.8 * contrast),
    )
    palette = np.zeros((5, 4))
    palette[:4, :3] = colours
    palette[:4, 3] = 255
    return palette


def _paint(parts: Parts, placement: np.ndarray, palette: np.ndarray, size: int) -> np.ndarray:
    """Paint the parts in order on a transparent layer.

    Args:
        placement: float (3, 2); (x, y, 1) @ placement maps object units to pixels.

    Returns:
        uint8 (size, size, 4), colours premultiplied by the alpha channel.
    """
    layer = np.zeros((size, size, 4), np.uint8)
    if not parts:
        return layer
    points = np.concatenate([part.outline for part in parts]) @ placement[:2] + placement[2]
    fixed = np.rint(points * (1 << SUBPIXEL_BITS)).astype(np.int32)
    scale = float(np.sqrt(abs(np.linalg.det(placement[:2]))))
    colours = palette.tolist()
    start = 0
    for part in parts:
        outline = fixed[start : start + len(part.outline)]
        start += len(part.outline)
        if part.width:
            thickness = max(1, round(part.width * scale))
            cv2.polylines(layer, [outline], False, colours[part.paint], thickness, cv2.LINE_AA, SUBPIXEL_BITS)
        else:
            cv2.fillPoly(layer, [outline], colours[part.paint], cv2.LINE_AA, SUBPIXEL_BITS)
    return layer


def _blend(scene: np.ndarray, layer: np.ndarray, grain: np.ndarray, light: np.ndarray, height: float) -> np.ndarray:
    """Lay a painted layer over the scene: it throws a shadow, its edges catch the light, its surface has a grain.

    Args:
        scene: float32 (size, size, 3), 0..255.
        layer: From `_paint`.
        grain: float32 (size, size), a factor on the layer's brightness.
        light: (2,), direction in which shadows fall; its length in [0, 1] is how hard they are.
        height: How far the layer stands off what lies behind, in pixels.
    """
    alpha = layer[..., 3].astype(np.float32) / 255
    soft = cv2.GaussianBlur(alpha, (0, 0), max(0.6, height * 0.6))
    shift = np.array([[1, 0, light[0] * height], [0, 1, light[1] * height]], np.float32)
    shadow = cv2.warpAffine(soft, shift, soft.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
    relief = grain * (1 + 0.9 * (shadow - soft))
    behind = (1 - alpha) * (1 - 0.55 * shadow)
    return scene * behind[..., None] + layer[..., :3] * relief[..., None]


def _expose(scene: np.ndarray, rng: Rng) -> np.ndarray:
    """What the camera adds: uneven light, exposure, a colour cast, blur, sensor noise, 8 bits."""
    size = scene.shape[0]
    lamps = rng.uniform(0.6, 1.4, (3, 3)).astype(np.float32)
    lighting = cv2.resize(lamps, (size, size), interpolation=cv2.INTER_CUBIC)
    exposure = rng.uniform(85, 135) / max(float(scene[::4, ::4].mean()), 20.0)
    cast = (rng.uniform(0.85, 1.15, 3) * exposure).astype(np.float32)
    scene = scene * (lighting[..., None] * cast)
    scene = cv2.GaussianBlur(scene, (0, 0), size / 96 * rng.uniform(0.3, 0.7))
    noise = rng.standard_normal((size, size), dtype=np.float32) * np.float32(rng.uniform(3, 10))
    return cv2.convertScaleAbs(np.maximum(scene + noise[..., None], 0))


def draw(category: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw one scene.

    Args:
        category: One of `CLASSES` or `OTHERS`.
        rng: The only source of chance; the same state draws the same image.
        size: Height and width in pixels, at least 96.

    Returns:
        uint8 (size, size, 3), RGB.

    Raises:
        ValueError: Unknown category, or a size too small to recognise anything in.
    """
    if category not in KINDS:
        raise ValueError(f"no such scene category: {category!r}; there are {', '.join(KINDS)}")
    if size < 96:
        raise ValueError(f"scenes are drawn at 96 pixels or more, not {size}")
    kind = KINDS[category]
    direction, hardness = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1)
    light = hardness * np.array([np.cos(direction), np.sin(direction)])
    unit = size / 96
    whole = np.array([[size / 2, 0], [0, size / 2], [size / 2, size / 2]])

    soil = _palette(rng, rng.random(), rng.uniform(0.05, 0.55), contrast=rng.uniform(0.4, 0.9))
    wash = _noise(rng, size, int(rng.integers(2, 7)), rng.uniform(0.6, 0.9))[..., None]
    scene = (soil[MAIN, :3] * wash + soil[SECOND, :3] * (1 - wash)).astype(np.float32)
    grain = 0.45 + 0.95 * _noise(rng, size, int(rng.integers(6, 16)), 0.9)

    ground = kind.ground if rng.random() < TYPICAL else GROUNDS[rng.integers(len(GROUNDS))]
    scene = _blend(scene, _paint(ground(rng), whole, soil, size), grain, light, 1.5 * unit)
    odds = _palette(rng, rng.random(), rng.uniform(0.05, 0.7), 0.8)
    scene = _blend(scene, _paint(_litter(rng), whole, odds, size), grain, light, 2.5 * unit)

    if parts := kind.build(rng):
        hue = kind.hue + rng.uniform(-kind.hue_spread, kind.hue_spread)
        colours = _palette(rng, hue, rng.uniform(0.2, 0.95), rng.uniform(0.5, 1))
        surface = 0.5 + 0.9 * _noise(rng, size, int(rng.integers(4, 20)), rng.uniform(0.6, 0.95))
        layer = _paint(parts, _pose(rng, kind.turn, size), colours, size)
        scene = _blend(scene, layer, surface, light, rng.uniform(2, 5) * unit)
    if rng.random() < OCCLUDED:
        scene = _blend(scene, _paint(_occluder(rng), whole, odds, size), grain, light, 4 * unit)
    return _expose(scene, rng)


def _pose(rng: Rng, turn: float, size: int) -> np.ndarray:
    """A random placement for `_paint`: mirrored or not, turned, foreshortened, somewhere in the picture."""
    angle, shear = rng.uniform(-turn, turn), rng.uniform(-0.25, 0.25)
    extent = size * rng.uniform(0.34, 0.47)
    stretch = np.exp(rng.uniform(-0.2, 0.2))
    c, s = np.cos(angle), np.sin(angle)
    mirrored = rng.choice([-1.0, 1.0])
    linear = np.array([[mirrored * stretch, 0], [shear, 1 / stretch]]) @ np.array([[c, s], [-s, c]]) * extent
    slack = size / 2 - 0.75 * extent
    return np.vstack([linear, size / 2 + rng.uniform(-slack, slack, 2)])
