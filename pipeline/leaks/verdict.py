"""Is one picture a copy of another? One image is laid over the other, and the pixels decide.

Matched features alone are no proof: any two photographs with the same logo have them.
"""

from typing import Literal, NamedTuple

import cv2
import numpy as np

from pipeline.leaks.features import LOOK, Picture, resize
from pipeline.leaks.findings import SAME_BYTES
from pipeline.leaks.geometry import Match, align, area, corners, project, register, to_units

Outcome = Literal["copy", "review"]


class Likeness(NamedTuple):
    """Pixels of a laid over b. All in 0..1 but `zncc`, which is in -1..1.

    `zncc`: zero-mean normalised cross-correlation of the overlap. `local`: share of the windows with texture that
    correlate by more than 0.6. `half`: the same share in that half of the overlap (left, right, top, bottom) where it is
    highest; a text or a logo may hide the other. `texture`: share of all windows that have texture. `cover_a`, `cover_b`: share
    of each image that the overlap covers.
    """

    zncc: float
    local: float
    half: float
    texture: float
    cover_a: float
    cover_b: float


WINDOW = 15  # pixels at LOOK
TEXTURE = 5.0  # standard deviation in grey levels above which a window has texture
WOVEN = 0.3  # of a half's windows that must have texture
SOFTER = 1.25  # the sharper image is softened if it has this much more detail than the other


def compare(a: Picture, b: Picture, transform: np.ndarray) -> Likeness:
    """Lay `a` over `b` by `transform` and correlate the overlap.

    The image that is shown larger is warped onto the other, and the sharper is softened to the detail of the other, so that a
    thumbnail or a crop is compared at the resolution that both have.
    """
    overlap = _clip(project(transform, corners(a)), corners(b))
    if overlap is None:
        return Likeness(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    in_a = project(np.linalg.inv(transform), overlap)
    area_a, area_b = abs(area(in_a)), abs(area(overlap))
    cover_a = min(1.0, area_a / abs(area(corners(a))))
    cover_b = min(1.0, area_b / abs(area(corners(b))))
    if area_b > area_a:
        a, b, transform, area_a, area_b = b, a, np.linalg.inv(transform), area_b, area_a
    under = resize(b.grey, LOOK)
    over, mask = _warp(a, transform, b, under.shape)
    detail_a = min(LOOK, a.detail * (area_a / area_b) ** 0.5)
    common = min(detail_a, b.detail)
    return Likeness(*_correlate(_soften(over, detail_a, common), _soften(under, b.detail, common), mask), cover_a, cover_b)


def _clip(polygon: np.ndarray, rectangle: np.ndarray) -> np.ndarray | None:
    """The part of a convex polygon inside an upright rectangle (Sutherland-Hodgman). OpenCV's own fails on coinciding edges."""
    low, high = rectangle[0], rectangle[2]
    for axis in (0, 1):
        for sign, bound in ((1.0, low[axis]), (-1.0, -high[axis])):
            depth = sign * polygon[:, axis] - bound
            kept = []
            for i in range(len(polygon)):
                j = (i + 1) % len(polygon)
                if depth[i] >= 0:
                    kept.append(polygon[i])
                if (depth[i] < 0) != (depth[j] < 0):
                    kept.append(polygon[i] + depth[i] / (depth[i] - depth[j]) * (polygon[j] - polygon[i]))
            polygon = np.array(kept).reshape(-1, 2)
    return polygon if len(polygon) >= 3 and abs(area(polygon)) > 1e-4 else None


def _warp(a: Picture, transform: np.ndarray, b: Picture, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """`a` as it lies in `b`, in a frame of `shape` (height, width), and the mask of its pixels."""
    grey = resize(a.grey, LOOK)
    h = np.linalg.inv(to_units(b.extent, shape)) @ transform @ to_units(a.extent, grey.shape)
    size = (shape[1], shape[0])
    warped = cv2.warpPerspective(grey, h, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return warped, cv2.warpPerspective(np.ones(grey.shape, np.uint8), h, size, flags=cv2.INTER_NEAREST)


def _soften(grey: np.ndarray, detail: float, common: float) -> np.ndarray:
    if detail > SOFTER * common:
        size = (grey.shape[1], grey.shape[0])
        grey = cv2.resize(resize(grey, max(4, round(common))), size, interpolation=cv2.INTER_CUBIC)
    return cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 1.0)


def _correlate(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> tuple[float, float, float, float]:
    """zncc, local, half and texture of Likeness."""
    where = mask > 0
    x, y = a[where] - a[where].mean(), b[where] - b[where].mean()
    zncc = float((x * y).sum() / max(np.sqrt((x * x).sum() * (y * y).sum()), 1e-6))
    whole = cv2.boxFilter(mask.astype(np.float32), -1, (WINDOW, WINDOW), borderType=cv2.BORDER_CONSTANT) > 0.999
    ma, mb, aa, bb, ab = (cv2.boxFilter(v, -1, (WINDOW, WINDOW)) for v in (a, b, a * a, b * b, a * b))
    va, vb = np.maximum(aa - ma * ma, 1e-3), np.maximum(bb - mb * mb, 1e-3)
    textured = whole & (np.maximum(va, vb) > TEXTURE**2)
    agrees = textured & ((ab - ma * mb) / np.sqrt(va * vb) > 0.6)
    local = float(agrees.sum() / max(1, textured.sum()))
    half = max(_share(where[part], textured[part], agrees[part]) for part in _halves(where))
    return zncc, local, half, float(textured.sum() / max(1, where.sum()))


def _halves(mask: np.ndarray) -> list[tuple[slice, slice]]:
    """The left, right, top and bottom half of the smallest upright rectangle around the mask."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    rows, columns = slice(y, y + height), slice(x, x + width)
    middle_x, middle_y = x + width // 2, y + height // 2
    return [
        (rows, slice(x, middle_x)),
        (rows, slice(middle_x, x + width)),
        (slice(y, middle_y), columns),
        (slice(middle_y, y + height), columns),
    ]


def _share(mask: np.ndarray, textured: np.ndarray, agrees: np.ndarray) -> float:
    """Of the textured windows; 0 where there are too few to speak for a half."""
    windows = int(textured.sum())
    return float(agrees.sum() / windows) if windows and windows >= WOVEN * mask.sum() else 0.0


SMALL_DETAIL = 64
"""Originals up to this many pixels have few independent keypoints and little detail: the rules for them ask for more."""
ENOUGH_OVERLAP = 0.5
SAME_PIXELS, SMALL, SMALL_SAME_PIXELS = "same pixels", "small", "small, same pixels"
WHOLE_RULES = (SAME_BYTES, SAME_PIXELS, SMALL, SMALL_SAME_PIXELS)
"""The rules that allow no part of the picture to disagree. By the others only the layout may be copied: `dedup` looks whether an
image matches different photographs."""


class Verdict(NamedTuple):
    """`outcome` is None for an unrelated pair; `rule` names the line of the table in docs/dedup.md that decided."""

    outcome: Outcome | None
    rule: str


def judge(match: Match, likeness: Likeness, detail: int) -> Verdict:
    """Decide on a pair by the measured rules of docs/dedup.md; `detail` is that of the less detailed image."""
    zncc, local, half, texture, *covers = likeness
    inliers, overlap = match.inliers, max(covers)
    if detail <= SMALL_DETAIL:
        if inliers >= 6 and zncc >= 0.97 and local >= 0.95 and texture >= 0.5 and overlap >= 0.85 and min(covers) >= 0.3:
            return Verdict("copy", SMALL_SAME_PIXELS)
        if inliers >= 12 and zncc >= 0.8 and local >= 0.8 and overlap >= 0.6:
            return Verdict("copy", SMALL)
    elif overlap >= ENOUGH_OVERLAP:
        if inliers >= 4 and zncc >= 0.9 and local >= 0.8:
            return Verdict("copy", SAME_PIXELS if local >= 0.97 else "most pixels")
        if inliers >= 8 and zncc >= 0.5 and local >= 0.85:
            return Verdict("copy", "same texture")
        if inliers >= 20 and local >= 0.6:
            return Verdict("copy", "partly covered")
        if inliers >= 12 and half >= 0.9 and overlap >= 0.8:
            return Verdict("copy", "half covered")
        if inliers >= 16 and match.even >= 0.65 and local >= 0.25:
            return Verdict("copy", "features everywhere")
    if inliers >= 16 or (inliers >= 8 and (local >= 0.4 or detail > SMALL_DETAIL)):
        return Verdict("review", "shared features")
    return Verdict(None, "")


def examine(a: Picture, b: Picture, mirror: bool) -> tuple[Match, Likeness, Verdict] | None:
    """`align`, `compare` and `judge`; small images that are not convicted are registered and judged again.

    Registration looks for the highest correlation, so what it finds counts only if nearly all pixels agree.
    """
    match = align(a, b, mirror)
    if match is None:
        return None
    likeness = compare(a, b, match.transform)
    detail = min(a.detail, b.detail)
    verdict = judge(match, likeness, detail)
    if verdict.outcome != "copy" and detail <= SMALL_DETAIL and likeness.zncc >= 0.5:
        registered = register(a, b, match.transform)
        again = likeness if registered is None else compare(a, b, registered)
        if registered is not None and judge(match, again, detail).rule == SMALL_SAME_PIXELS:
            return match._replace(transform=registered), again, Verdict("copy", SMALL_SAME_PIXELS)
    return match, likeness, verdict
