"""Different photographs under one layout: what shares much of its pixels with a validation image, and is no copy of it.

A layout maps (H, W, 3) uint8 RGB and a generator, from which comes what differs between two pages of it, to a page.
"""

from collections.abc import Callable

import cv2
import numpy as np

from benchmarks.dedup import families

Layout = Callable[[np.ndarray, np.random.Generator], np.ndarray]

INK, PAPER, ACCENT = (28, 30, 36), (246, 246, 242), (196, 64, 48)
LETTERS = list("abcdefghijklmnoprstuvwyz     ")


def words(count: int, random: np.random.Generator) -> str:
    """So many letters and spaces."""
    return "".join(random.choice(LETTERS, count)).strip() or "a"


def always(count: int, number: int = 0) -> str:
    """The same words on every page."""
    return words(count, np.random.default_rng([count, number]))


def fitted(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """The middle of an image, `width` x `height` pixels."""
    scale = max(width / image.shape[1], height / image.shape[0])
    big = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    y, x = max(0, big.shape[0] - height) // 2, max(0, big.shape[1] - width) // 2
    return cv2.resize(big[y : y + height, x : x + width], (width, height))


def write(page: np.ndarray, text: str, x: int, y: int, size: float, colour: tuple[int, int, int] = INK, bold: int = 1) -> None:
    cv2.putText(page, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, colour, bold, cv2.LINE_AA)


def blank(width: int, height: int) -> np.ndarray:
    return np.full((height, width, 3), PAPER, np.uint8)


def _app(page: np.ndarray, left: int) -> None:
    """A title bar, a sidebar of icons and labels, a button."""
    cv2.rectangle(page, (0, 0), (page.shape[1], 34), (58, 88, 140), -1)
    write(page, always(24), 12, 23, 0.6, (255, 255, 255), 2)
    random = np.random.default_rng(5)
    for i in range(8):
        y = 60 + 30 * i
        cv2.circle(page, (16, y), 8, tuple(int(c) for c in random.integers(0, 200, 3)), -1)
        cv2.rectangle(page, (11, y - 3), (16, y + 4), tuple(int(c) for c in random.integers(100, 255, 3)), -1)
        write(page, always(10, i), 30, y + 5, 0.4)
    cv2.line(page, (left - 8, 34), (left - 8, page.shape[0]), (180, 180, 180), 1)
    cv2.rectangle(page, (page.shape[1] - 90, page.shape[0] - 34), (page.shape[1] - 10, page.shape[0] - 10), ACCENT, -1)
    write(page, always(8, 3), page.shape[1] - 82, page.shape[0] - 17, 0.4, (255, 255, 255))


def screenshot(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """A small picture within an app, all words the same."""
    page = blank(400, 300)
    _app(page, 120)
    page[50:150, 130:270] = fitted(image, 140, 100)
    for i in range(6):
        write(page, always(34, 20 + i), 130, 172 + 16 * i, 0.4)
    return page


def own_text(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The app again, a larger picture, and lines of the page's own."""
    page = blank(400, 300)
    _app(page, 120)
    page[44:194, 128:328] = fitted(image, 200, 150)
    for i in range(4):
        write(page, words(34, random), 130, 212 + 16 * i, 0.4)
    return page


def poster(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    page = blank(300, 400)
    page[60:230, 20:280] = fitted(image, 260, 170)
    write(page, always(11, 1).upper(), 14, 46, 1.1, ACCENT, 3)
    for i in range(7):
        write(page, always(30, 40 + i), 20, 256 + 18 * i, 0.5)
    cv2.rectangle(page, (6, 6), (293, 393), INK, 3)
    return page


def banner(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """A wide picture on the left, the same advertisement on the right."""
    page = blank(480, 160)
    page[:, :180] = fitted(image, 180, 160)
    for i, size in enumerate((1.0, 0.7, 0.5, 0.5)):
        write(page, always(round(18 / size), 60 + i), 192, 36 + 34 * i, size, ACCENT if i == 0 else INK, 2)
    cv2.rectangle(page, (380, 124), (470, 152), ACCENT, -1)
    write(page, "BUY NOW", 388, 144, 0.5, (255, 255, 255), 2)
    return page


def _lines(image: np.ndarray, lines: list[str], heights: list[float]) -> np.ndarray:
    page = fitted(image, 400, 300)
    for line, at in zip(lines, heights, strict=True):
        size = 0.94 * 400 / cv2.getTextSize(line, cv2.FONT_HERSHEY_DUPLEX, 1.0, 2)[0][0]
        for colour, thick in ((0, 5), (255, 2)):
            cv2.putText(page, line, (10, round(300 * at)), cv2.FONT_HERSHEY_DUPLEX, size, (colour,) * 3, thick, cv2.LINE_AA)
    return page


def meme(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return _lines(image, [always(16, 1).upper(), always(18, 2).upper()], [0.14, 0.95])


def six_lines(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return _lines(image, [always(20, 80 + i) for i in range(6)], [0.13 + 0.16 * i for i in range(6)])


def watermark(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """A word all over the picture, half transparent."""
    page = fitted(image, 400, 300)
    marks = page.copy()
    for i in range(6):
        for j in range(3):
            write(marks, "PREVIEW copy", 10 + 150 * j - 30 * (i % 2), 40 + 48 * i, 0.7, (255, 255, 255), 2)
    return cv2.addWeighted(page, 0.5, marks, 0.5, 0)


def broadcast(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A channel's lower third, clock and logo, and a headline of its own."""
    page = families.draw_logo(fitted(image, 400, 300)[::-1], 0.2)[::-1].copy()
    cv2.rectangle(page, (0, 220), (400, 262), (20, 40, 120), -1)
    cv2.rectangle(page, (0, 262), (400, 300), PAPER, -1)
    write(page, words(26, random), 8, 247, 0.7, (255, 255, 255), 2)
    write(page, always(44, 7), 8, 286, 0.5)
    return page


def wallpaper(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """A print that lies on a patterned table, two thirds of the page's sides."""
    random = np.random.default_rng(17)
    page = np.full((300, 400, 3), (150, 110, 70), np.uint8)
    for _i in range(260):
        x, y = (int(v) for v in random.integers(0, [400, 300]))
        to = (x + int(random.integers(-30, 30)), y + int(random.integers(-30, 30)))
        cv2.line(page, (x, y), to, tuple(int(c) for c in random.integers(40, 220, 3)), int(random.integers(1, 5)))
    page[40:252, 60:340] = 250
    page[50:242, 70:330] = fitted(image, 260, 192)
    return page


def catalogue(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """A page of six products of which one differs."""
    page = blank(400, 300)
    random = np.random.default_rng(23)
    for i in range(6):
        x, y = 8 + 132 * (i % 3), 8 + 146 * (i // 3)
        tile = cv2.resize(random.integers(0, 256, (5, 6, 3), dtype=np.uint8), (120, 100), interpolation=cv2.INTER_CUBIC)
        page[y : y + 100, x : x + 120] = fitted(image, 120, 100) if i == 4 else families.draw_logo(tile, 0.8, i)
        write(page, always(14, i), x, y + 120, 0.4)
    return page


LAYOUTS: dict[str, Layout] = {
    "app's screenshot, small picture": screenshot,
    "app's screenshot, own text": own_text,
    "poster": poster,
    "banner": banner,
    "meme, two lines": meme,
    "six lines of text": six_lines,
    "watermark all over": watermark,
    "broadcast, own headline": broadcast,
    "print on a patterned table": wallpaper,
    "catalogue, one of six differs": catalogue,
}
