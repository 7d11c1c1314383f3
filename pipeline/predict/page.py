"""A page of the pictures whose answer is least sure: to look at, and to label next."""

import base64
import heapq
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jinja2
import numpy as np

TEMPLATE = Path(__file__).with_name("page.html.jinja")
NEXT = 3  # classes shown of a picture


class Doubt(NamedTuple):
    """A picture with the classes that come first, and their probabilities."""

    id: str
    thumbnail: str  # base64 of a WebP file
    width: int
    height: int
    answers: list[tuple[str, float]]


class LeastSure:
    """The `limit` pictures of the lowest probability among all that are shown to it; of equal ones the first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.heap: list[tuple[float, int, Doubt]] = []  # the surest of them on top
        self.number = count()

    def add(
        self,
        ids: Sequence[str],
        thumbnails: Sequence[np.ndarray],
        probabilities: np.ndarray,
        top: np.ndarray,
        classes: Sequence[str],
    ) -> None:
        """A batch: n names, n thumbnails (h, w, 3), (n, C) probabilities and their (n, k) highest classes."""
        best = probabilities.max(1)
        for row in np.argsort(best, kind="stable"):
            key = (-float(best[row]), -next(self.number))
            if len(self.heap) == self.limit and key < self.heap[0][:2]:
                break
            answers = [(classes[i], float(probabilities[row, i])) for i in top[row, :NEXT]]
            height, width = thumbnails[row].shape[:2]
            doubt = (*key, Doubt(ids[row], _webp(thumbnails[row]), width, height, answers))
            (heapq.heappush if len(self.heap) < self.limit else heapq.heapreplace)(self.heap, doubt)

    def sorted(self) -> list[Doubt]:
        """The least sure first."""
        return [doubt for *_, doubt in sorted(self.heap, key=lambda entry: entry[:2], reverse=True)]


def render(doubts: Sequence[Doubt], model: str, out: str, images: int, skipped: Mapping[str, int], calibrated: str) -> str:
    """One HTML page, complete in itself. `skipped`: pictures without an answer by reason; `calibrated`: a sentence on that."""
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    shown: dict[str, Any] = {"doubts": doubts, "model": model, "out": out, "images": images}
    return template.from_string(TEMPLATE.read_text()).render(**shown, skipped=skipped, calibrated=calibrated)


def _webp(image: np.ndarray) -> str:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return base64.b64encode(cv2.imencode(".webp", bgr, [cv2.IMWRITE_WEBP_QUALITY, 75])[1].tobytes()).decode()
