"""The findings as a page to look at."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.leaks import features, geometry
from pipeline.leaks.decision import Dedup, kept_by
from pipeline.leaks.findings import Row
from pipeline.store import manifest
from pipeline.store.decode import ImageRefused, decode
from pipeline.store.manifest import Manifest

SHOWN = 200  # findings on the page; all are in leaks.parquet
LINES = 20  # drawn of a pair, or they would hide it
HEIGHT, GAP = 220, 8  # pixels of an image on the page, and between two
DOUBT = 0.65  # the score about which a finding could be decided either way

OVERRULE = "add its line to data/overrides.csv with your reason, and run `dvc repro` again"

TEMPLATE = Path(__file__).with_name("gallery.html.jinja")


def page(audit: pa.Table, sets: Mapping[str, Manifest], params: Dedup, warnings: Sequence[str], overrule: str = OVERRULE) -> str:
    """An HTML page, complete in itself, with the SHOWN most doubtful findings: images side by side, and what was measured.

    `overrule`: where a person's word goes.
    """
    score = pc.fill_null(pc.abs(pc.subtract(audit["score"], DOUBT)), 2.0)
    shown = audit.append_column("doubt", score).sort_by([(name, "ascending") for name in ("doubt", "relation", "id", "match_id")])
    groups = audit.group_by(["relation", "outcome"]).aggregate([("id", "count_distinct")])
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return template.from_string(TEMPLATE.read_text()).render(
        shown=f"{min(len(audit), SHOWN):,}",
        findings=f"{len(audit):,}",
        counts=groups.sort_by([("relation", "ascending"), ("outcome", "ascending")]).to_pylist(),
        warnings=warnings,
        overrule=overrule,
        figures=(_figure(row, sets, params) for row in shown.slice(0, SHOWN).to_pylist()),
    )


def _figure(row: Row, sets: Mapping[str, Manifest], params: Dedup) -> dict[str, str | None]:
    """What the template shows of a finding."""
    name, _, other = row["relation"].partition("-")
    image = _image(row["id"], sets[name])
    match = _image(row["match_id"], sets[other]) if row["match_id"] is not None else None
    picture = image if image is None or match is None else _pair(image, match, row)
    measured = "" if row["score"] is None else f"correlation {row['zncc']:.2f}"
    if row["inliers"] is not None:
        measured += f", {row['inliers']} features, {row['local']:.0%} of the windows agree, "
        measured += f"covers {row['cover_image']:.0%} of it and {row['cover_match']:.0%} of its match"
    opposite = "remove" if row["kept"] else "keep"
    return {
        "picture": None if picture is None else _webp(picture),
        "outcome": row["outcome"],
        "rule": row["rule"],
        "word": _word(row, name, params),
        "pair": row["id"] + (f" in {row['match_id']}" if row["match_id"] is not None else ""),
        "measured": measured,
        "overrule": f'{row["id"]},{opposite},"..."' if name != "val" else None,
    }


def _word(row: Row, name: str, params: Dedup) -> str:
    """What happens to the image, which is another thing than what was found."""
    if row["override"]:
        return f"{row['override']} by hand: {row['reason']}"
    if not row["kept"]:
        return f"goes from {name}"
    reason = kept_by(row["relation"], row["outcome"], params)
    return f"stays in {name} ({reason})" if reason else f"stays in {name}"


def _image(image: str, images: Manifest) -> np.ndarray | None:
    row = pc.index(images.table["id"], image).as_py()
    try:
        return decode(next(manifest.image_bytes(images, [row])))
    except ImageRefused:
        return None


def _pair(image: np.ndarray, match: np.ndarray, row: Row) -> np.ndarray:
    """Both images at HEIGHT beside each other (height, width, 3), with the inliers and the outline drawn."""
    left, right = (_at_height(pixels) for pixels in (image, match))
    canvas = np.concatenate([left, np.full((HEIGHT, GAP, 3), 128, np.uint8), right], axis=1)
    if not row["transform"]:
        return canvas
    shift = np.array([left.shape[1] + GAP, 0.0])
    a, b = features.extract(match), features.extract(image)
    a = features.negative(a) if row["negative"] else a
    found = geometry.align(a, b, row["mirrored"])
    pairs = np.zeros((0, 2), int) if found is None else found.pairs[:: max(1, found.inliers // LINES)]
    places = a.features.points[pairs[:, 0], :2] * max(right.shape) + shift
    for start, end in zip(b.features.points[pairs[:, 1], :2] * max(left.shape), places, strict=True):
        cv2.line(canvas, _pixel(start), _pixel(end), (60, 220, 120), 1, cv2.LINE_AA)
    back = np.linalg.inv(np.reshape(row["transform"], (3, 3)))
    outline = geometry.project(back, geometry.corners(b)) * max(right.shape) + shift
    cv2.polylines(canvas, [np.array([_pixel(corner) for corner in outline])], True, (255, 170, 0), 2, cv2.LINE_AA)
    return canvas


def _at_height(image: np.ndarray) -> np.ndarray:
    width = max(1, round(image.shape[1] * HEIGHT / image.shape[0]))
    shrinks = image.shape[0] > HEIGHT
    return cv2.resize(image, (width, HEIGHT), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _pixel(point: np.ndarray) -> tuple[int, int]:
    x, y = np.clip(np.rint(point), -9999, 9999).astype(int)
    return int(x), int(y)


def _webp(image: np.ndarray) -> str:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return base64.b64encode(cv2.imencode(".webp", bgr, [cv2.IMWRITE_WEBP_QUALITY, 70])[1].tobytes()).decode()
