"""Is one picture a copy of another? SIFT features, an index that votes, a fitted transform, and a look at the pixels.

The chain, from cheap to certain: `extract` describes an image by local features; `VotingIndex` finds the few gallery
images that share features with it, mirrored ones too; `align` fits one transform to the shared features; `compare` lays
one image over the other and correlates; `judge` decides; `examine` does the last three. Matched features alone are no proof:
any two photographs with the same logo have them.

Coordinates are in units of an image's longest side, so that they do not depend on the size an image happens to have.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

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

Outcome = Literal["removed", "review", "unverifiable"]


def _sift(contrast: float) -> Any:
    create = getattr(cv2, "SIFT_create")  # noqa: B009 - OpenCV 5's type stubs have lost it
    return create(KEYPOINTS, 3, contrast, 10, 1.6, enable_precise_upscale=True)


_SIFT: Any = _sift(contrast=0.01)
_SENSITIVE: Any = _sift(contrast=0.001)
_BITS = 512.0  # RootSIFT entries lie in 0..0.5 but for a flat patch: one byte each

# Mirroring an image turns its SIFT descriptors around the keypoint's axis: rows of the 4 x 4 grid and signs of the 8 directions.
MIRROR = np.arange(128).reshape(4, 4, 8)[::-1][:, :, -np.arange(8) % 8].reshape(128)


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


class Match(NamedTuple):
    """How the gallery image a lies in the image b.

    `transform`: (3, 3), a homography from a's coordinates to b's. `inliers`: pairs at distinct places that agree with it.
    `pairs`: (inliers, 2) keypoint rows of a and b. `mirrored`: whether the transform turns a over.
    """

    transform: np.ndarray
    pairs: np.ndarray
    mirrored: bool

    @property
    def inliers(self) -> int:
        return len(self.pairs)


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
    pairs = _distinct(pairs[inside], p[inside], q[inside])
    if len(pairs) < MIN_INLIERS or not _plausible(transform, a):
        return None
    if mirror:
        transform = transform @ _turn_over(a)
    return Match(transform, pairs, mirror)


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
    scale = (abs(_area(quad)) / (width * height)) ** 0.5
    return bool((turns > 0).all() and SMALLEST < scale < 1 / SMALLEST)


def _area(polygon: np.ndarray) -> float:
    x, y = polygon[:, 0], polygon[:, 1]
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


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
    area_a, area_b = abs(_area(in_a)), abs(_area(overlap))
    cover_a = min(1.0, area_a / abs(_area(corners(a))))
    cover_b = min(1.0, area_b / abs(_area(corners(b))))
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
    return polygon if len(polygon) >= 3 and abs(_area(polygon)) > 1e-4 else None


def _warp(a: Picture, transform: np.ndarray, b: Picture, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """`a` as it lies in `b`, in a frame of `shape` (height, width), and the mask of its pixels."""
    grey = resize(a.grey, LOOK)
    h = np.linalg.inv(_to_units(b.extent, shape)) @ transform @ _to_units(a.extent, grey.shape)
    size = (shape[1], shape[0])
    warped = cv2.warpPerspective(grey, h, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return warped, cv2.warpPerspective(np.ones(grey.shape, np.uint8), h, size, flags=cv2.INTER_NEAREST)


def _to_units(extent: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(3, 3), from pixels, whose centres are at whole numbers, to units of the longest side."""
    x, y = float(extent[0]) / shape[1], float(extent[1]) / shape[0]
    return np.array([[x, 0, x / 2], [0, y, y / 2], [0, 0, 1]])


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


STEPS, CONVERGED = 30, 1e-4  # of `register`: at most so many, until the correlation grows by less
COARSE = 64  # longest side in pixels at which images are registered


def register(a: Picture, b: Picture, transform: np.ndarray) -> np.ndarray | None:
    """The affine transform near `transform` at which the pixels of `a` and `b` correlate best (Evangelidis and Psarakis 2008).

    For images with few pixels: their few keypoints stand in wrong places by a pixel or two, which is much of such an image.
    None where nothing is found, or nothing plausible.
    """
    small_a, small_b = (cv2.GaussianBlur(resize(picture.grey, COARSE), (0, 0), 1.0) for picture in (a, b))
    units_a, units_b = _to_units(a.extent, small_a.shape), _to_units(b.extent, small_b.shape)
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


SMALL = 64
"""Originals up to this many pixels have few independent keypoints and little detail: the rules for them ask for more."""
ENOUGH_OVERLAP = 0.5
SMALL_SAME_PIXELS = "small, same pixels"


class Verdict(NamedTuple):
    """`outcome` is None for an unrelated pair; `rule` names the line of the table in docs/dedup.md that decided."""

    outcome: Outcome | None
    rule: str


def judge(inliers: int, likeness: Likeness, detail: int) -> Verdict:
    """Decide on a pair by the measured rules of docs/dedup.md; `detail` is that of the less detailed image."""
    zncc, local, half, texture, *covers = likeness
    overlap = max(covers)
    if detail <= SMALL:
        if inliers >= 6 and zncc >= 0.97 and local >= 0.95 and texture >= 0.5 and overlap >= 0.85 and min(covers) >= 0.3:
            return Verdict("removed", SMALL_SAME_PIXELS)
        if inliers >= 12 and zncc >= 0.8 and local >= 0.8 and overlap >= 0.6:
            return Verdict("removed", "small")
    elif overlap >= ENOUGH_OVERLAP:
        if inliers >= 4 and zncc >= 0.9 and local >= 0.8:
            return Verdict("removed", "same pixels")
        if inliers >= 8 and zncc >= 0.5 and local >= 0.85:
            return Verdict("removed", "same texture")
        if inliers >= 20 and local >= 0.6:
            return Verdict("removed", "partly covered")
        if inliers >= 12 and half >= 0.9 and overlap >= 0.8:
            return Verdict("removed", "half covered")
    if inliers >= 16 or (inliers >= 8 and local >= 0.4):
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
    verdict = judge(match.inliers, likeness, detail)
    if verdict.outcome != "removed" and detail <= SMALL and likeness.zncc >= 0.5:
        registered = register(a, b, match.transform)
        again = likeness if registered is None else compare(a, b, registered)
        if registered is not None and judge(match.inliers, again, detail).rule == SMALL_SAME_PIXELS:
            return match._replace(transform=registered), again, Verdict("removed", SMALL_SAME_PIXELS)
    return match, likeness, verdict


class Candidates(NamedTuple):
    """The shortlist of a batch, (n,) each, sorted by query: rows of the query and the gallery, and whether mirrored."""

    query: np.ndarray
    gallery: np.ndarray
    mirror: np.ndarray


class Bag(NamedTuple):
    """The features of many images, one after another: `owner` (n,) int32 ascending is the row of the image each belongs to."""

    owner: np.ndarray
    points: np.ndarray
    descriptors: np.ndarray


def bag(features: Sequence[Features], first: int = 0) -> Bag:
    """The features of images `first`, `first` + 1, ..."""
    owner = np.repeat(np.arange(first, first + len(features), dtype=np.int32), [len(f) for f in features])
    return Bag(owner, np.concatenate([f.points for f in features]), np.concatenate([f.descriptors for f in features]))


EXACT = 20_000  # up to this many index entries a flat index is fast enough, and misses nothing
PROBES = 4
NEIGHBOURS = 8
VOTES = 3  # a candidate has at least this many, and this many of one accord about where the one image lies in the other
ACCORD = 0.07  # in units of the longest side
SHORTLIST = 10  # candidates per query image before they must be of one accord


class VotingIndex:
    """One index over the local features of all gallery images; each query feature votes for the images of its nearest neighbours.

    Every descriptor is entered twice, as it is and mirrored, so that one search finds copies and mirrored copies. Beyond
    EXACT entries the index is an inverted file of 4-bit product codes of 64 principal components: 16 bytes and an id
    per entry.
    """

    def __init__(self, index: Any, owner: np.ndarray, points: np.ndarray) -> None:
        """`owner`: (descriptors,) int32, the gallery row of each; `points`: (descriptors, 4) float16, as in Features.

        Entry 2 d of the index is descriptor d, entry 2 d + 1 its mirror image.
        """
        self.index, self.owner, self.points = index, owner, points

    @classmethod
    def build(cls, count: int, parts: Iterable[Bag], sample: np.ndarray) -> "VotingIndex":
        """`parts` holds `count` features in all; `sample`, (m, 128) of their descriptors, trains the codes."""
        index = _empty_index(2 * count, sample)
        owner, points = np.empty(count, np.int32), np.empty((count, 4), np.float16)
        n = 0
        for part in parts:
            both = np.stack([part.descriptors, part.descriptors[:, MIRROR]], 1).reshape(-1, 128)
            index.add(both.astype(np.float32))
            end = n + len(part.owner)
            owner[n:end], points[n:end] = part.owner, part.points
            n = end
        return cls(index, owner, points)

    def save(self, folder: Path) -> None:
        import faiss

        faiss.write_index(self.index, str(folder / "index.faiss"))
        np.save(folder / "owner.npy", self.owner)
        np.save(folder / "points.npy", self.points)

    @classmethod
    def load(cls, folder: Path) -> "VotingIndex":
        import faiss

        faiss.omp_set_num_threads(1)
        index = faiss.read_index(str(folder / "index.faiss"))
        return cls(index, np.load(folder / "owner.npy"), np.load(folder / "points.npy"))

    def shortlist(self, queries: Bag, exclude: np.ndarray | None = None) -> Candidates:
        """The gallery images that the queries share features with, at most SHORTLIST each, the likeliest first.

        `exclude`: the gallery row that each query row shall not find (itself), where queries and gallery are the same images.
        """
        votes = self._votes(queries)
        if exclude is not None:
            votes = votes.where(exclude[votes.query] != votes.gallery)
        votes = votes.where(_likeliest(votes))
        return _of_one_accord(votes, queries.points, self.points)

    def _votes(self, queries: Bag) -> "_Votes":
        if not len(queries.owner) or not len(self.owner):
            none = np.zeros(0, np.int64)
            return _Votes(none, none, none, none, none, np.zeros(0, np.float32))
        distance, entry = self.index.search(queries.descriptors.astype(np.float32), NEIGHBOURS + 1)
        weight = np.maximum(distance[:, -1:] - distance[:, :-1], 0)  # a neighbour no nearer than the others says nothing
        weight /= np.maximum(weight[:, :1], 1e-6)
        feature, rank = np.nonzero(entry[:, :-1] >= 0)
        entry = entry[feature, rank]
        query, gallery = queries.owner[feature].astype(np.int64), self.owner[entry >> 1].astype(np.int64)
        return _Votes(query, gallery, entry & 1, feature, entry >> 1, weight[feature, rank])


class _Votes(NamedTuple):
    """One row per vote: image rows of query and gallery, whether mirrored, feature rows of query and gallery, weight."""

    query: np.ndarray
    gallery: np.ndarray
    mirror: np.ndarray
    feature: np.ndarray
    voted: np.ndarray
    weight: np.ndarray

    def where(self, kept: np.ndarray) -> "_Votes":
        return _Votes(*(column[kept] for column in self))

    def pair(self) -> np.ndarray:
        """(n,) int64, one number for each (query, gallery, mirror)."""
        return (self.query * (int(self.gallery.max(initial=0)) + 1) + self.gallery) * 2 + self.mirror


def _empty_index(entries: int, sample: np.ndarray) -> Any:
    import faiss

    faiss.omp_set_num_threads(1)  # k-means and search give the same bits whatever the number of cores
    if entries <= EXACT:
        return faiss.IndexFlatL2(128)
    lists = round(entries**0.5)  # then finding the lists costs about as much as reading PROBES of them
    index = faiss.index_factory(128, f"PCA64,IVF{lists},PQ32x4fs")
    inverted: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    inverted.nprobe = PROBES
    inverted.cp.niter = 8
    inverted.cp.min_points_per_centroid = 1
    wanted = max(64 * lists, 20_000)
    step = max(1, len(sample) // wanted)
    index.train(sample[::step].astype(np.float32))
    return index


def _likeliest(votes: _Votes) -> np.ndarray:
    """The rows of the votes for the SHORTLIST best candidates of each query, candidate by candidate.

    A feature votes once for a candidate, with its nearest neighbour there; a candidate needs VOTES votes.
    """
    pair = votes.pair()
    order = np.argsort(pair, kind="stable")  # votes come by feature and then by distance, and stay so within a pair
    pair, feature = pair[order], votes.feature[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = (pair[1:] != pair[:-1]) | (feature[1:] != feature[:-1])
    order, pair = order[fresh], pair[fresh]
    start = np.flatnonzero(np.r_[True, pair[1:] != pair[:-1]]) if len(pair) else np.zeros(0, np.int64)
    count = np.diff(np.r_[start, len(pair)])
    weight = np.add.reduceat(votes.weight[order].astype(np.float64), start) if len(start) else np.zeros(0)
    enough = np.flatnonzero(count >= VOTES)
    query = votes.query[order[start[enough]]]
    ranked = np.lexsort((enough, -weight[enough], query))
    place = np.arange(len(ranked)) - np.searchsorted(query[ranked], query[ranked])
    chosen = enough[ranked[place < SHORTLIST]]
    return order[_ranges(start[chosen], count[chosen])]


def _ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... (count[0] of them), start[1], ..."""
    ends = np.cumsum(count)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(start - (ends - count), count)


def _of_one_accord(votes: _Votes, query_points: np.ndarray, gallery_points: np.ndarray) -> Candidates:
    """The candidates with VOTES votes that one similarity explains.

    Every vote proposes the similarity of its two keypoints, as in `align`; this throws out nearly all candidates that
    share no more than a texture.
    """
    pair = votes.pair()
    start = np.flatnonzero(np.r_[True, pair[1:] != pair[:-1]]) if len(pair) else np.zeros(0, np.int64)
    count = np.diff(np.r_[start, len(pair)])
    p, q = gallery_points[votes.voted].astype(np.float64), query_points[votes.feature].astype(np.float64)
    flip = np.where(votes.mirror, -1.0, 1.0)  # mirrored about x = 0: the shift makes up for the width
    zp, zq = flip * p[:, 0] + 1j * p[:, 1], q[:, 0] + 1j * q[:, 1]
    angle = np.where(votes.mirror, np.pi - p[:, 3], p[:, 3])
    scale = q[:, 2] / p[:, 2]
    turn = scale * np.exp(1j * (q[:, 3] - angle))
    i = np.repeat(np.arange(len(pair)), np.repeat(count, count))
    j = _ranges(np.repeat(start, count), np.repeat(count, count))
    off = np.abs(turn[i] * (zp[j] - zp[i]) - (zq[j] - zq[i]))
    support = np.bincount(i, off < ACCORD * np.minimum(scale, 1)[i], len(pair))
    best = np.maximum.reduceat(support, start) if len(start) else np.zeros(0)
    kept = start[best >= VOTES]
    return Candidates(votes.query[kept], votes.gallery[kept], votes.mirror[kept].astype(bool))
