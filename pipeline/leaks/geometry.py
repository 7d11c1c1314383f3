"""How one image lies in another: one transform fitted to the features they share."""

from typing import NamedTuple

import cv2
import numpy as np

from pipeline.leaks.features import LOOK, Picture, mirrored, resize


class Match(NamedTuple):
    """How the reference image a lies in the image b.

    `transform`: (3, 3), a homography from a's coordinates to b's. `inliers`: pairs at distinct places that agree with it.
    `pairs`: (inliers, 2) keypoint rows of a and b. `mirrored`: whether the transform turns a over. `even`: how evenly the pairs
    lie that roughly agree, 0..1 (see `_even`).
    """

    transform: np.ndarray
    pairs: np.ndarray
    mirrored: bool
    even: float

    @property
    def inliers(self) -> int:
        return len(self.pairs)


RATIO = 0.9  # a match must be this much nearer than the second nearest
LOOSE, TIGHT = 0.05, 0.02  # distance of an inlier from its place, in units of the longest side, before and after refinement
MIN_INLIERS = 4
SMALLEST = 0.15  # one image shown smaller than this within the other is a logo, not a copy


def align(a: Picture, b: Picture, mirror: bool) -> Match | None:
    """Fit the transform from `a` (or from its mirror image) to `b` that most feature pairs agree with.

    A SIFT keypoint has place, size and angle, so each pair alone proposes a similarity (Philbin et al. 2007): all are
    tried, none drawn by chance. The best is refined to an affine map, then to a homography. None if fewer than
    MIN_INLIERS agree.
    """
    width = float(a.extent[0])
    features = mirrored(a.features, width) if mirror else a.features
    pairs = _pairs(features.descriptors, b.features.descriptors)
    if len(pairs) < MIN_INLIERS:
        return None
    p, q = features.points[pairs[:, 0]], b.features.points[pairs[:, 1]]
    similarity = _best_similarity(p, q)
    if similarity is None:
        return None
    transform, inside = _refine(p, q, similarity)
    distinct = _distinct(pairs[inside], p[inside], q[inside])
    if len(distinct) < MIN_INLIERS or not _plausible(transform, a):
        return None
    rough = _roughly(p, q, transform)
    even = _even(project(transform, features.points[:, :2]), q[rough, :2], a, b, transform)
    return Match(transform @ _turn_over(a) if mirror else transform, distinct, mirror, even)


def _turn_over(picture: Picture) -> np.ndarray:
    """(3, 3), to the coordinates of the mirror image and back."""
    return np.array([[-1, 0, picture.extent[0]], [0, 1, 0], [0, 0, 1]], np.float64)


def _pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, 2) rows of `a` and `b`: for each row of b the nearest row of a, where the second nearest is clearly farther."""
    if len(a) < 2 or not len(b):
        return np.zeros((0, 2), np.int64)
    fa, fb = a.astype(np.float32), b.astype(np.float32)
    distance = (fa * fa).sum(1) - 2 * (fb @ fa.T)  # len(b), len(a); each row lacks the constant |b|^2
    rows = np.arange(len(b))
    nearest = distance.argmin(1)
    first = distance[rows, nearest]
    distance[rows, nearest] = np.inf
    norm = (fb * fb).sum(1)
    clear = first + norm < RATIO**2 * (distance.min(1) + norm)
    return np.stack([nearest[clear], rows[clear]], 1)


def _best_similarity(p: np.ndarray, q: np.ndarray) -> np.ndarray | None:
    scale = q[:, 2] / p[:, 2]
    turn = scale * np.exp(1j * (q[:, 3] - p[:, 3]))  # n
    zp, zq = p[:, 0] + 1j * p[:, 1], q[:, 0] + 1j * q[:, 1]
    shift = zq - turn * zp
    off = np.abs(turn[:, None] * zp + shift[:, None] - zq)  # n hypotheses, n pairs
    votes = (off < LOOSE * np.minimum(scale, 1)[:, None]).sum(1)
    best = int(votes.argmax())
    if votes[best] < MIN_INLIERS:
        return None
    c, s, t = turn[best].real, turn[best].imag, shift[best]
    return np.array([[c, -s, t.real], [s, c, t.imag], [0, 0, 1]])


def _refine(p: np.ndarray, q: np.ndarray, transform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inside = _inside(p, q, transform, LOOSE)
    for step, tolerance in enumerate((LOOSE, LOOSE, TIGHT, TIGHT)):
        distinct = np.unique(p[inside, :2], axis=0)
        if len(distinct) < 3:
            break
        fitted = _homography(p[inside], q[inside]) if step and len(distinct) >= 8 else _affine(p[inside], q[inside])
        now = None if fitted is None else _inside(p, q, fitted, tolerance)
        if fitted is None or now is None or now.sum() < 3:
            break
        transform, inside = fitted, now
    return transform, inside


def _inside(p: np.ndarray, q: np.ndarray, transform: np.ndarray, tolerance: float) -> np.ndarray:
    scale = min(1.0, abs(float(np.linalg.det(transform[:2, :2]))) ** 0.5)
    return np.hypot(*(project(transform, p[:, :2]) - q[:, :2]).T) < tolerance * scale


def _affine(p: np.ndarray, q: np.ndarray) -> np.ndarray | None:
    x = np.c_[p[:, :2], np.ones(len(p))].astype(np.float64)
    solution, _, rank, _ = np.linalg.lstsq(x, q[:, :2].astype(np.float64), rcond=1e-5)
    return np.vstack([solution.T, [0, 0, 1]]) if rank == 3 else None


def _homography(p: np.ndarray, q: np.ndarray) -> np.ndarray | None:
    fitted: np.ndarray | None = cv2.findHomography(p[:, :2].astype(np.float64), q[:, :2].astype(np.float64), 0)[0]
    return fitted


def project(transform: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(n, 2) points through a (3, 3) homography; a point behind the horizon goes to infinity."""
    x = np.c_[points, np.ones(len(points))] @ transform.T
    depth = np.where(x[:, 2:] > 1e-9, x[:, 2:], 1e-9)
    return x[:, :2] / depth


ROUGH, TURN, GROWTH = 0.1, np.pi / 4, 1.6
"""Of a pair that agrees roughly: distance from its place in units of the longest side, and difference of angle and of size."""
GRID, CROWD, CELLS, SPAN = 5, 3, 6, 3
"""An image has GRID x GRID cells; those with CROWD features of either image count, if there are CELLS. Those that agree must
reach over SPAN rows and columns: two lines of text do not."""


def _roughly(p: np.ndarray, q: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """(n,) bool: which pairs agree with the transform but for what a bent picture or another place in it explains."""
    linear = transform[:2, :2] / transform[2, 2]
    scale = abs(float(np.linalg.det(linear))) ** 0.5
    angle = np.arctan2(linear[1, 0] - linear[0, 1], linear[0, 0] + linear[1, 1])
    off = np.hypot(*(project(transform, p[:, :2]) - q[:, :2]).T)
    turn = np.abs(np.angle(np.exp(1j * (q[:, 3] - p[:, 3] - angle))))
    growth = np.abs(np.log(q[:, 2] / p[:, 2] / scale))
    return np.asarray((off < ROUGH * min(scale, 1.0)) & (turn < TURN) & (growth < np.log(GROWTH)))


def _even(in_b: np.ndarray, agreeing: np.ndarray, a: Picture, b: Picture, transform: np.ndarray) -> float:
    """The cells of b that have an agreeing pair, over as many as pairs thrown on the features by chance would reach; 0 where they
    are few or lie in a strip.

    A layout's features agree in their own cells only, however many there are; those of a copy that is bent, blended, or hidden
    in part agree all over. `in_b`: (n, 2) all features of a; `agreeing`: (m, 2) places in b.
    """
    own = b.features.points[:, :2]
    back = project(np.linalg.inv(transform), own)
    inside = ((back > 0) & (back < a.extent)).all(1)
    crowds = np.minimum(_per_cell(in_b, b.extent), _per_cell(own[inside], b.extent))
    crowds[crowds < CROWD] = 0
    if np.count_nonzero(crowds) < CELLS:
        return 0.0
    pairs = np.where(crowds > 0, _per_cell(agreeing, b.extent), 0)
    where = pairs.reshape(GRID, GRID) > 0
    if min(where.any(0).sum(), where.any(1).sum()) < SPAN:
        return 0.0
    expected = (1 - (1 - crowds / crowds.sum()) ** pairs.sum()).sum()
    return float(min(1.0, np.count_nonzero(pairs) / max(1.0, expected)))


def _per_cell(points: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """(GRID * GRID,) points that lie in each cell of an image."""
    cell = np.floor(points / extent * GRID)
    cell = cell[((cell >= 0) & (cell < GRID)).all(1)].astype(int)
    return np.bincount(cell @ [1, GRID], minlength=GRID * GRID)


def _distinct(pairs: np.ndarray, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """One pair for each place of either image: SIFT puts several keypoints of different angle or size at one place."""
    places = [np.rint(points[:, :2] * LOOK / 2) for points in (p, q)]
    for side in range(2):
        _, first = np.unique(places[side], axis=0, return_index=True)
        first.sort()
        pairs, places = pairs[first], [place[first] for place in places]
    return pairs


def corners(picture: Picture) -> np.ndarray:
    """(4, 2) float32, in units of the longest side."""
    width, height = picture.extent
    return np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)


def _plausible(transform: np.ndarray, a: Picture) -> bool:
    """The outline of `a` stays convex, keeps its orientation, and is neither tiny nor huge."""
    quad = project(transform, corners(a))
    edge = np.roll(quad, -1, axis=0) - quad
    turns = edge[:, 0] * np.roll(edge[:, 1], -1) - edge[:, 1] * np.roll(edge[:, 0], -1)
    width, height = corners(a)[2]
    scale = (abs(area(quad)) / (width * height)) ** 0.5
    return bool((turns > 0).all() and SMALLEST < scale < 1 / SMALLEST)


def area(polygon: np.ndarray) -> float:
    x, y = polygon[:, 0], polygon[:, 1]
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def to_units(extent: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(3, 3), from pixels, whose centres are at whole numbers, to units of the longest side."""
    x, y = float(extent[0]) / shape[1], float(extent[1]) / shape[0]
    return np.array([[x, 0, x / 2], [0, y, y / 2], [0, 0, 1]])


STEPS, CONVERGED = 30, 1e-4  # of `register`: at most so many, until the correlation grows by less
COARSE = 64  # longest side in pixels at which images are registered


def register(a: Picture, b: Picture, transform: np.ndarray) -> np.ndarray | None:
    """The affine transform near `transform` at which the pixels of `a` and `b` correlate best (Evangelidis and Psarakis 2008).

    For images with few pixels: their few keypoints stand in wrong places by a pixel or two, which is much of such an image.
    None where nothing is found, or nothing plausible.
    """
    small_a, small_b = (cv2.GaussianBlur(resize(picture.grey, COARSE), (0, 0), 1.0) for picture in (a, b))
    units_a, units_b = to_units(a.extent, small_a.shape), to_units(b.extent, small_b.shape)
    start = np.linalg.inv(units_a) @ np.linalg.inv(transform) @ units_b
    start = (start / start[2, 2])[:2].astype(np.float32)
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, STEPS, CONVERGED)
    try:
        _, found = cv2.findTransformECC(small_b, small_a, start, cv2.MOTION_AFFINE, criteria, np.ones_like(small_a), 1)
    except cv2.error:  # raised where it does not converge
        return None
    backward = units_a @ np.vstack([found, [0, 0, 1]]).astype(np.float64) @ np.linalg.inv(units_b)
    if abs(np.linalg.det(backward)) < 1e-6:
        return None
    forward = np.linalg.inv(backward)
    oriented = forward @ _turn_over(a) if np.linalg.det(transform[:2, :2]) < 0 else forward
    return forward if _plausible(oriented, a) else None
