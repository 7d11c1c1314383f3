"""What a scene can show: outlines of objects by category, and the grounds they stand on."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

MAIN, SECOND, DARK, LIGHT, HOLE = range(5)
"""Paints of an object's palette; `HOLE` cuts through to what lies behind."""


class Part(NamedTuple):
    """One painted outline of an object.

    Attributes:
        outline: float (n, 2), in object units: x to the right, y down, the whole object within about [-1, 1].
        paint: Index into the palette.
        width: 0 fills the closed outline; a positive value strokes the open line with that width, in object units.
    """

    outline: np.ndarray
    paint: int
    width: float = 0.0


Parts = list[Part]
Rng = np.random.Generator


# Outlines -------------------------------------------------------------------------------------------------------------

_ANGLES = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


def moved(points: np.ndarray, angle: float, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    """Turn the points around the origin, then shift them by (x, y)."""
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]]) + np.array([x, y])


def disc(x: float, y: float, rx: float, ry: float | None = None, angle: float = 0.0) -> np.ndarray:
    points = _CIRCLE * (rx, rx if ry is None else ry)
    return moved(points, angle, x, y) if angle else points + np.array([x, y])


def box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def _line(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=float)


def _polar(radii: np.ndarray) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]


def lump(rng: Rng, x: float, y: float, radius: float) -> np.ndarray:
    """An uneven closed outline, such as a stone or a tuft of leaves."""
    phases = rng.uniform(0, 2 * np.pi, 3)
    bumps = sum(np.sin(k * _ANGLES + phase) / k for k, phase in zip((2, 3, 5), phases, strict=True))
    return _CIRCLE * (radius * (1 + 0.18 * bumps))[:, None] + (x, y)


def _around(count: int, start: float = 0.0) -> Iterator[float]:
    """`count` equally spaced angles, the first at `start`, in radians."""
    return (start + 2 * np.pi * k / count for k in range(count))


def _at(angle: float, radius: float) -> tuple[float, float]:
    return radius * float(np.cos(angle)), radius * float(np.sin(angle))


# Labelled categories --------------------------------------------------------------------------------------------------


def _wheel(rng: Rng) -> Parts:
    rim, hub = rng.uniform(0.68, 0.86), rng.uniform(0.12, 0.28)
    parts = [Part(disc(0, 0, 1), MAIN), Part(disc(0, 0, rim), HOLE)]
    width = rng.uniform(0.06, 0.14)
    parts += [Part(_line((0, 0), _at(angle, 0.9 * rim + 0.1)), SECOND, width) for angle in _around(int(rng.integers(4, 11)))]
    return [*parts, Part(disc(0, 0, hub), DARK)]


def _flower(rng: Rng) -> Parts:
    count = int(rng.integers(5, 10))
    centre, breadth = rng.uniform(0.2, 0.36), rng.uniform(0.8, 1.25) * 1.5 / count
    parts = []
    if rng.random() < 0.5:
        parts += [Part(_line((0, 0), (rng.uniform(-0.3, 0.3), 1.6)), DARK, 0.12)]
    parts += [
        Part(disc(*_at(angle, 0.6), 0.4, breadth * 0.42, angle), MAIN if k % 2 else LIGHT)
        for k, angle in enumerate(_around(count))
    ]
    return [*parts, Part(disc(0, 0, centre), SECOND)]


def _starfish(rng: Rng) -> Parts:
    waist, blunt = rng.uniform(0.3, 0.45), rng.uniform(0.8, 1.6)
    reach = np.repeat(rng.uniform(0.8, 1.1, 5), 8)
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radii = waist + (reach - waist) * ((1 + np.cos(5 * angles)) / 2) ** blunt
    parts = [Part(_polar(np.roll(radii, 4)), MAIN)]
    for angle in _around(5, 2 * np.pi * 4 / 40):
        parts += [Part(disc(*_at(angle, r), 0.07), LIGHT) for r in (0.25, 0.48, 0.7)]
    return parts


def _fish(rng: Rng) -> Parts:
    depth, tail = rng.uniform(0.34, 0.6), rng.uniform(0.3, 0.5)
    parts = [
        Part(_line((0.5, 0), (1, -tail), (0.88, 0), (1, tail)), SECOND),
        Part(_line((-0.2, -depth * 0.8), (0.25, -depth - 0.22), (0.4, -depth * 0.4)), SECOND),
        Part(disc(-0.15, 0, 0.8, depth), MAIN),
    ]
    for x in np.linspace(-0.25, 0.4, int(rng.integers(0, 5))):
        half = 0.8 * depth * np.sqrt(1 - (x + 0.15) ** 2)
        parts += [Part(_line((x, -half), (x + 0.07, 0), (x, half)), DARK, 0.09)]
    return [*parts, Part(disc(-0.62, -0.1, 0.11), LIGHT), Part(disc(-0.63, -0.1, 0.06), DARK)]


def _butterfly(rng: Rng) -> Parts:
    upper, lower, spread = rng.uniform(0.34, 0.5), rng.uniform(0.26, 0.4), rng.uniform(0.5, 0.9)
    parts = []
    for side in (-1, 1):
        parts += [
            Part(disc(side * 0.42, 0.4, lower + 0.1, lower, side * spread), SECOND),
            Part(disc(side * 0.52, -0.32, upper + 0.15, upper, -side * spread), MAIN),
            Part(disc(side * 0.58, -0.38, upper * 0.4), LIGHT),
            Part(disc(side * 0.45, 0.42, lower * 0.4), DARK),
            Part(_line((0, -0.5), (side * 0.25, -0.95)), DARK, 0.05),
        ]
    return [*parts, Part(disc(0, 0, 0.09, 0.6), DARK)]


def _mushroom(rng: Rng) -> Parts:
    height, stem = rng.uniform(0.6, 1.0), rng.uniform(0.16, 0.34)
    cap = np.concatenate([_CIRCLE[12:] * (1, height), [[1, 0]]])
    parts = [
        Part(_line((-stem, -0.1), (stem, -0.1), (stem * 1.3, 0.95), (-stem * 1.3, 0.95)), LIGHT),
        Part(cap, MAIN),
        Part(disc(0, 0, 1, 0.16), DARK),
    ]
    for x in np.linspace(-0.6, 0.6, int(rng.integers(2, 6))):
        y = -height * rng.uniform(0.3, 0.7) * np.sqrt(1 - x * x)
        parts += [Part(disc(x, y, rng.uniform(0.07, 0.16)), SECOND)]
    return parts


def _tree(rng: Rng) -> Parts:
    trunk, lean = rng.uniform(0.07, 0.16), rng.uniform(-0.2, 0.2)
    parts = [Part(_line((-trunk * 1.5, 1), (trunk * 1.5, 1), (lean + trunk, -0.2), (lean - trunk, -0.2)), DARK)]
    for side in (-1, 1):
        parts += [Part(_line((lean * 0.4, 0.35), (lean + side * 0.5, -0.2)), DARK, trunk)]
    for k in range(int(rng.integers(5, 10))):
        x, y = rng.uniform(-0.55, 0.55), rng.uniform(-0.75, 0.05)
        parts += [Part(lump(rng, x + lean, y, rng.uniform(0.24, 0.42)), (MAIN, SECOND)[k % 2])]
    return parts


def _boat(rng: Rng) -> Parts:
    mast, deck = rng.uniform(-0.25, 0.2), rng.uniform(0.35, 0.55)
    parts = [
        Part(_line((-1, deck), (1, deck), (0.65, 0.95), (-0.7, 0.95)), MAIN),
        Part(_line((-0.95, deck + 0.1), (0.95, deck + 0.1)), LIGHT, 0.08),
        Part(_line((mast, deck), (mast, -1)), DARK, 0.08),
        Part(_line((mast + 0.08, -0.95), (mast + 0.08, deck - 0.15), (rng.uniform(0.6, 0.95), deck - 0.15)), LIGHT),
    ]
    if rng.random() < 0.7:
        left = rng.uniform(-0.9, -0.55)
        parts += [Part(_line((mast - 0.08, -0.8), (mast - 0.08, deck - 0.15), (left, deck - 0.15)), SECOND)]
    return parts


def _mug(rng: Rng) -> Parts:
    half, top, taper = rng.uniform(0.42, 0.62), rng.uniform(-0.8, -0.5), rng.uniform(0.75, 1.05)
    parts = [
        Part(disc(half, 0.1, 0.42, rng.uniform(0.38, 0.55)), SECOND),
        Part(disc(half, 0.1, 0.25, 0.3), HOLE),
        Part(_line((-half, top), (half, top), (half * taper, 0.85), (-half * taper, 0.85)), MAIN),
        Part(disc(0, 0.85, half * taper, 0.14), MAIN),
        Part(disc(0, top, half, 0.17), LIGHT),
        Part(disc(0, top + 0.02, half * 0.85, 0.12), DARK),
    ]
    for y in np.linspace(-0.2, 0.6, int(rng.integers(0, 4))):
        parts += [Part(_line((-half * 0.9, y), (half * 0.9, y)), SECOND, 0.1)]
    return parts


def _house(rng: Rng) -> Parts:
    eaves, ridge, half = rng.uniform(-0.3, 0.1), rng.uniform(-0.5, 0.5), rng.uniform(0.6, 0.85)
    chimney = rng.uniform(-0.5, 0.4)
    parts = [
        Part(box(chimney, -0.95, chimney + 0.2, eaves), DARK),
        Part(box(-half, eaves, half, 0.95), MAIN),
        Part(_line((-half - 0.15, eaves), (half + 0.15, eaves), (ridge * 0.8, -0.95)), SECOND),
    ]
    columns = int(rng.integers(2, 4))
    door = int(rng.integers(columns))
    for k, x in enumerate(np.linspace(-half, half, 2 * columns + 1)[1::2]):
        w = 0.55 * half / columns
        parts += [Part(box(x - w, 0.45, x + w, 0.95), DARK) if k == door else Part(box(x - w, 0.4, x + w, 0.7), LIGHT)]
    return parts


# Categories that only the pool has: most are cousins of a labelled one ------------------------------------------------


def _gear(rng: Rng) -> Parts:
    teeth = int(rng.integers(8, 14))
    parts = [
        Part(_polar(np.tile([1.0, 1.0, 0.78, 0.78], teeth)), MAIN),
        Part(disc(0, 0, rng.uniform(0.45, 0.6)), SECOND),
    ]
    parts += [Part(disc(*_at(angle, 0.45), 0.12), HOLE) for angle in _around(int(rng.integers(3, 6)))]
    return [*parts, Part(disc(0, 0, rng.uniform(0.12, 0.22)), HOLE)]


def _windmill(rng: Rng) -> Parts:
    parts = [Part(_line((-0.18, -0.3), (0.18, -0.3), (0.34, 1), (-0.34, 1)), MAIN)]
    for angle in _around(4, rng.uniform(0, np.pi / 2)):
        blade = moved(box(0.15, -0.02, 0.85, 0.24), angle, 0, -0.3)
        parts += [Part(blade, LIGHT), Part(_line((0, -0.3), tuple(blade[1])), DARK, 0.06)]
    return [*parts, Part(disc(0, -0.3, 0.1), SECOND)]


def _crab(rng: Rng) -> Parts:
    parts = []
    for side in (-1, 1):
        for y in (-0.15, 0.1, 0.35, 0.6):
            knee = rng.uniform(0.1, 0.3)
            parts += [Part(_line((0, y * 0.6), (side * 0.7, y - knee), (side * 0.98, y + 0.15)), SECOND, 0.09)]
        parts += [Part(_line((0, -0.1), (side * 0.6, -0.5)), SECOND, 0.12), Part(disc(side * 0.62, -0.68, 0.24), MAIN)]
        parts += [Part(_line((side * 0.62, -0.68), (side * 0.5, -0.98), (side * 0.76, -0.95)), HOLE)]
    parts += [Part(disc(0, 0.1, rng.uniform(0.45, 0.6), rng.uniform(0.32, 0.45)), MAIN)]
    return [*parts, Part(disc(-0.15, -0.1, 0.07), LIGHT), Part(disc(0.15, -0.1, 0.07), LIGHT)]


def _bird(rng: Rng) -> Parts:
    tilt = rng.uniform(-0.3, 0.3)
    return [
        Part(_line((0.3, 0.0), (1, -0.2 + tilt), (0.95, 0.2 + tilt)), SECOND),
        Part(_line((-0.05, 0.4), (-0.1, 0.95)), DARK, 0.06),
        Part(_line((0.15, 0.4), (0.15, 0.95)), DARK, 0.06),
        Part(_line((-0.75, -0.5), (-1, -0.36), (-0.72, -0.3)), LIGHT),
        Part(disc(0, 0.1, 0.58, rng.uniform(0.32, 0.44)), MAIN),
        Part(disc(-0.55, -0.38, rng.uniform(0.22, 0.3)), MAIN),
        Part(disc(0.12, 0.02, 0.36, 0.2, tilt), SECOND),
        Part(disc(-0.62, -0.43, 0.05), DARK),
    ]


def _dragonfly(rng: Rng) -> Parts:
    sweep, length = rng.uniform(0.0, 0.4), rng.uniform(0.5, 0.62)
    parts = []
    for side in (-1, 1):
        parts += [
            Part(disc(side * 0.5, -0.42, length, 0.12, -side * sweep), LIGHT),
            Part(disc(side * 0.46, -0.12, length * 0.9, 0.12, side * sweep), SECOND),
        ]
    parts += [Part(disc(0, y, 0.09, 0.13), (MAIN, DARK)[k % 2]) for k, y in enumerate(np.linspace(-0.5, 0.95, 8))]
    return [*parts, Part(disc(0, -0.72, 0.16), MAIN)]


def _umbrella(rng: Rng) -> Parts:
    height, ribs = rng.uniform(0.6, 0.85), int(rng.integers(3, 6))
    dome = np.concatenate([_CIRCLE[12:] * (1, height), [[1, 0]]])
    parts = [Part(dome, MAIN)]
    edges = np.linspace(-1, 1, ribs + 1)
    for left, right in itertools.pairwise(edges):
        parts += [Part(disc((left + right) / 2, 0.02, (right - left) / 2, 0.13), HOLE)]
        parts += [Part(_line((left, 0), (left * 0.5, -0.75 * height), (0, -height)), SECOND, 0.05)]
    hook = _line((0, -height - 0.1), (0, 0.85), (0.08, 0.96), (0.2, 0.96), (0.27, 0.82))
    return [*parts, Part(hook, DARK, 0.08)]


def _cactus(rng: Rng) -> Parts:
    width = rng.uniform(0.26, 0.4)
    parts = [Part(_line((0, 0.9), (0, -0.75)), MAIN, width)]
    for side in (-1, 1)[: int(rng.integers(1, 3))]:
        y, x = rng.uniform(-0.1, 0.35), side * rng.uniform(0.5, 0.7)
        parts += [Part(_line((0, y), (x, y), (x, y - rng.uniform(0.3, 0.6))), MAIN, width * 0.7)]
    parts += [Part(_line((x, 0.9), (x, -0.75)), SECOND, 0.04) for x in (-width / 4, width / 4)]
    return [*parts, Part(box(-0.4, 0.6, 0.4, 0.98), DARK)]


def _tent(rng: Rng) -> Parts:
    peak, side = rng.uniform(-0.3, 0.1), rng.uniform(0.35, 0.6)
    return [
        Part(_line((peak, -0.7), (peak + side, -0.6), (1, 0.8), (0.4, 0.9)), SECOND),
        Part(_line((peak, -0.7), (0.45, 0.9), (-0.9, 0.9)), MAIN),
        Part(_line((peak, -0.5), (0.1, 0.9), (-0.4, 0.9)), DARK),
        Part(_line((peak, -0.7), (-1, 0.6)), LIGHT, 0.04),
        Part(_line((peak + side, -0.6), (1, 0.4)), LIGHT, 0.04),
    ]


def _bottle(rng: Rng) -> Parts:
    half, shoulder, neck = rng.uniform(0.28, 0.44), rng.uniform(-0.35, -0.05), rng.uniform(0.1, 0.16)
    return [
        Part(_line((-neck, -0.9), (neck, -0.9), (neck, shoulder - 0.15), (half, shoulder + 0.15), (half, 0.95),
                   (-half, 0.95), (-half, shoulder + 0.15), (-neck, shoulder - 0.15)), MAIN),
        Part(box(-half, 0.2, half, rng.uniform(0.5, 0.75)), LIGHT),
        Part(box(-neck - 0.04, -1, neck + 0.04, -0.85), SECOND),
        Part(_line((-half * 0.6, shoulder + 0.25), (-half * 0.6, 0.85)), LIGHT, 0.06),
    ]  # fmt: skip


def _rocket(rng: Rng) -> Parts:
    half, fin = rng.uniform(0.24, 0.36), rng.uniform(0.3, 0.5)
    return [
        Part(_line((-0.15, 0.6), (0.15, 0.6), (0, 1.1)), LIGHT),
        Part(_line((-half, 0.2), (-half - fin, 0.75), (-half * 0.7, 0.65)), SECOND),
        Part(_line((half, 0.2), (half + fin, 0.75), (half * 0.7, 0.65)), SECOND),
        Part(disc(0, -0.15, half, 0.85), MAIN),
        Part(_line((0, -1), (half * 0.75, -0.6), (-half * 0.75, -0.6)), SECOND),
        Part(disc(0, -0.2, half * 0.45), DARK),
    ]


def _ladder(rng: Rng) -> Parts:
    half, width = rng.uniform(0.25, 0.45), rng.uniform(0.08, 0.14)
    parts = [Part(_line((-half, y), (half, y)), SECOND, width * 0.8) for y in np.linspace(-0.8, 0.8, int(rng.integers(4, 8)))]
    return [*parts, *(Part(_line((x, -1), (x, 1)), MAIN, width) for x in (-half, half))]


def _stones(rng: Rng) -> Parts:
    parts = []
    for y, count in ((0.6, 3), (0.05, 2), (-0.5, 1)):
        for x in (np.arange(count) - (count - 1) / 2) * 0.62:
            parts += [Part(lump(rng, x, y, rng.uniform(0.26, 0.38)), int(rng.integers(4)))]
    return parts


def _nothing(rng: Rng) -> Parts:
    return []


# Grounds: what the object stands on, in scene units (the picture spans [-1, 1]) --------------------------------------


def scatter(rng: Rng, count: int, lengths: tuple[float, float], breadths: tuple[float, float]) -> np.ndarray:
    """Rows of (x, y, length, breadth, angle, paint) for `count` things strewn over the picture, far ones first."""
    rows = rng.random((count, 6))
    low = (-1.1, -1.1, lengths[0], breadths[0], 0.0, 0.0)
    high = (1.1, 1.1, lengths[1], breadths[1], np.pi, 4.0)
    return low + rows * np.subtract(high, low)


def _pebbles(rng: Rng) -> Parts:
    radius = rng.uniform(0.06, 0.2)
    return [
        Part(disc(x, y, radius * r, radius * q, a), int(p))
        for x, y, r, q, a, p in scatter(rng, int(min(50, 4 / radius)), (0.6, 1.3), (0.5, 1.1))
    ]


def _leaf_litter(rng: Rng) -> Parts:
    radius = rng.uniform(0.1, 0.25)
    leaf = np.array([[-1.0, 0], [-0.3, -0.45], [0.4, -0.35], [1, 0], [0.4, 0.35], [-0.3, 0.45]])
    return [
        Part(moved(leaf * (radius * r, radius * q), a, x, y), int(p))
        for x, y, r, q, a, p in scatter(rng, int(min(50, 5 / radius)), (0.6, 1.4), (0.5, 1.3))
    ]


def _grass(rng: Rng) -> Parts:
    lean, length = rng.uniform(-0.5, 0.5), rng.uniform(0.15, 0.5)
    return [
        Part(_line((x, y), (x + length * (lean + q - 0.5) * 0.6, y - length * r)), int(p), 0.03)
        for x, y, r, q, _, p in scatter(rng, 55, (0.5, 1.3), (0.0, 1.0))
    ]


def _water(rng: Rng) -> Parts:
    length, height = rng.uniform(0.15, 0.4), rng.uniform(0.01, 0.06)
    ripple = np.array([[-1.0, 0], [-0.5, -1], [0, 0], [0.5, 1], [1, 0]])
    return [
        Part(ripple * (length * r, height * q) + np.array([x, y]), int(p), 0.03)
        for x, y, r, q, _, p in scatter(rng, 40, (0.5, 1.4), (0.3, 1.5))
    ]


def _masonry(rng: Rng) -> Parts:
    rows, jitter = int(rng.integers(4, 9)), rng.uniform(0.02, 0.08)
    step, parts = 2.2 / rows, []
    length = step * rng.uniform(1.2, 2.4)
    for row in range(rows):
        y, shift = -1.1 + row * step, rng.uniform(0, length)
        for x in np.arange(-1.1 - shift, 1.1, length):
            corners = box(x, y, x + length, y + step) + rng.uniform(-jitter, jitter, (4, 2)) * step * 2
            parts += [Part(corners * 0.94 + 0.06 * corners.mean(0), int(rng.integers(4)))]
    return parts


def _planks(rng: Rng) -> Parts:
    edges = np.cumsum(rng.uniform(0.2, 0.45, 9)) - rng.uniform(1.1, 1.4)
    tilt = rng.uniform(-0.4, 0.4)
    return [
        Part(moved(box(-1.6, top + 0.02, 1.6, bottom), tilt), int(rng.integers(4))) for top, bottom in itertools.pairwise(edges)
    ]


GROUNDS = (_pebbles, _leaf_litter, _grass, _water, _masonry, _planks)

# Which kinds there are ------------------------------------------------------------------------------------------------

ANY = 0.5
"""As the spread of a hue: every colour."""


class _Kind(NamedTuple):
    """A category: what its objects are made of, and where and how they are usually seen."""

    build: Callable[[Rng], Parts]
    turn: float
    """Largest rotation to either side, in radians: what stands upright in life does so here."""
    hue: float
    hue_spread: float
    ground: Callable[[Rng], Parts]


_CLASS_KINDS = {
    "boat": _Kind(_boat, 0.3, 0.6, ANY, _water),
    "butterfly": _Kind(_butterfly, np.pi, 0.1, 0.25, _leaf_litter),
    "fish": _Kind(_fish, 0.6, 0.55, 0.2, _water),
    "flower": _Kind(_flower, 0.5, 0.9, 0.2, _grass),
    "house": _Kind(_house, 0.2, 0.05, 0.1, _grass),
    "mug": _Kind(_mug, 0.3, 0.6, ANY, _planks),
    "mushroom": _Kind(_mushroom, 0.4, 0.03, 0.1, _leaf_litter),
    "starfish": _Kind(_starfish, np.pi, 0.06, 0.1, _pebbles),
    "tree": _Kind(_tree, 0.2, 0.3, 0.12, _grass),
    "wheel": _Kind(_wheel, np.pi, 0.1, 0.1, _masonry),
}
_OTHER_KINDS = {
    "bird": _Kind(_bird, 0.4, 0.6, ANY, _grass),
    "bottle": _Kind(_bottle, 0.5, 0.35, 0.2, _planks),
    "cactus": _Kind(_cactus, 0.2, 0.33, 0.1, _pebbles),
    "crab": _Kind(_crab, np.pi, 0.03, 0.1, _pebbles),
    "dragonfly": _Kind(_dragonfly, np.pi, 0.5, 0.25, _water),
    "gear": _Kind(_gear, np.pi, 0.1, 0.1, _masonry),
    "ladder": _Kind(_ladder, 0.8, 0.08, 0.1, _masonry),
    "nothing": _Kind(_nothing, 0.0, 0.0, ANY, _leaf_litter),
    "rocket": _Kind(_rocket, 0.8, 0.6, ANY, _planks),
    "stones": _Kind(_stones, 0.2, 0.1, 0.1, _water),
    "tent": _Kind(_tent, 0.2, 0.1, 0.3, _grass),
    "umbrella": _Kind(_umbrella, 0.6, 0.9, 0.3, _planks),
    "windmill": _Kind(_windmill, 0.2, 0.08, 0.15, _grass),
}
KINDS = _CLASS_KINDS | _OTHER_KINDS

CLASSES = tuple(_CLASS_KINDS)
"""Categories with a label, sorted."""

OTHERS = tuple(_OTHER_KINDS)
"""Categories without a label: they fill the rest of the pool. Sorted."""
