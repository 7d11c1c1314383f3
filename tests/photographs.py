"""Drawn stand-ins for photographs: texture at every scale, so that SIFT finds as much in them as in real ones."""

import cv2
import numpy as np


def photograph(seed: int, width: int = 160, height: int = 120) -> np.ndarray:
    """(height, width, 3) uint8 RGB; no two seeds share a shape or a texture."""
    random = np.random.default_rng([seed, 99])
    image = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 6):
        coarse = random.normal(0, 60 / octave, (2**octave, 2**octave, 3)).astype(np.float32)
        image += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    image = np.clip(image + 128, 0, 255).astype(np.uint8)
    for _ in range(45):
        corners = random.integers(0, [width, height], 2) + random.integers(-width // 7, width // 7 + 1, (4, 2))
        cv2.fillConvexPoly(image, cv2.convexHull(corners.astype(np.int32)), random.integers(0, 256, 3).tolist(), cv2.LINE_AA)
    return image


def mirrored(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image[:, ::-1])


def cropped(image: np.ndarray, share: float = 0.5) -> np.ndarray:
    """The lower right part, `share` of each side."""
    height, width = image.shape[:2]
    return np.ascontiguousarray(image[round(height * (1 - share)) :, round(width * (1 - share)) :])


def rotated(image: np.ndarray, degrees: float = 15) -> np.ndarray:
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1.0)
    return cv2.warpAffine(image, turn, (width, height))


def brighter(image: np.ndarray) -> np.ndarray:
    return np.clip(image * 0.8 + 50, 0, 255).astype(np.uint8)


def recoded(image: np.ndarray, quality: int = 30) -> np.ndarray:
    return np.asarray(cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR))


def smaller(image: np.ndarray, scale: float = 0.5) -> np.ndarray:
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def bordered(image: np.ndarray) -> np.ndarray:
    return cv2.copyMakeBorder(image, 15, 15, 20, 20, cv2.BORDER_CONSTANT, value=(200, 30, 90))


def captioned(image: np.ndarray) -> np.ndarray:
    """Covered in its lower fifth by a bar with a text."""
    height, width = image.shape[:2]
    out = image.copy()
    out[-height // 5 :] = 255
    cv2.putText(out, "ORIOLE 1987", (4, height - 6), cv2.FONT_HERSHEY_DUPLEX, width / 240, (0, 0, 0), 1, cv2.LINE_AA)
    return out


def badged(image: np.ndarray, seed: int = 9999) -> np.ndarray:
    """With a detailed badge in a corner: two photographs of the same badge share many keypoints."""
    side = min(image.shape[:2]) // 3
    out = image.copy()
    out[-side - 3 : -3, -side - 3 : -3] = cv2.resize(photograph(seed, 96, 96), (side, side), interpolation=cv2.INTER_AREA)
    return out


COPIES = {
    "as it is": lambda image: image,
    "mirrored": mirrored,
    "cropped": cropped,
    "rotated": rotated,
    "turned": lambda image: np.ascontiguousarray(np.rot90(image)),
    "brighter": brighter,
    "recoded": recoded,
    "smaller": smaller,
    "bordered": bordered,
    "captioned": captioned,
    "badged": badged,
    "grey": lambda image: np.repeat(image.mean(2, keepdims=True).astype(np.uint8), 3, axis=2),
}
