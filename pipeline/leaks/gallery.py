"""The findings as a page in which a person decides about them. It opens from disk, without a server.

`index.html` and `gallery.js` are the page, `findings.js` is what was found, in the order in which it is first shown, and
`thumbnails/` holds the images, which the page loads as they are looked at.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa

from pipeline.leaks import features, findings, geometry, thumbnails
from pipeline.leaks.decision import REMOVABLE, Dedup, Image, Override, ends, extents, image_of, kept_by, set_of
from pipeline.leaks.features import Picture
from pipeline.leaks.findings import STRENGTH, Row
from pipeline.store.manifest import Manifest

SHOWN = 50_000  # findings on the page at most, the most doubtful; all are in leaks.parquet
MATCHED = 200  # of them, the first, have their features matched once more, to draw lines
LINES = 20  # drawn of a pair, or they would hide it
DOUBT = 0.65  # the score about which a finding could be decided either way
FIRST = ("review", "unverifiable", "alike", "copy", "by hand")  # the outcomes in the order in which a person looks at them
FAR = 9.0  # in units of the longest side: an outline that reaches farther is cut off

THEN = "put it into data/ in place of the old one, and run: dvc repro dedup"

TEMPLATE, SCRIPT = (Path(__file__).with_name(name) for name in ("gallery.html.jinja", "gallery.js"))


def write(
    folder: Path,
    audit: pa.Table,
    sets: Mapping[str, Manifest],
    params: Dedup,
    overrides: Mapping[str, Override],
    warnings: Sequence[str],
    search: str,
    workers: int,
    then: str = THEN,
) -> None:
    """Write the page into the artifact being made at `folder`.

    `audit`: as `decide` gives it. `overrides`: the lines of data/overrides.csv, which the file that the page offers repeats.
    `search`: the identity of the search, by which a browser keeps the decisions. `workers`: threads that decode.
    `then`: what to do with the file of decisions.
    """
    rows = by_doubt(audit)
    images = thumbnails.rows_of(list(dict.fromkeys(end for row in rows for end in _images(row))), sets)
    extent = extents(set(images), sets)
    matched = {at: row for at, row in enumerate(rows[:MATCHED]) if row["transform"]}
    seen = thumbnails.write(
        folder / "thumbnails", images, sets, {end for row in matched.values() for end in _images(row)}, workers
    )
    data = {
        "search": search,
        "overrides": [[image, said.action, said.reason] for image, said in overrides.items()],
        "inFile": thumbnails.IN_FILE,
        "then": then,
        "images": _columns_of_images(images, sets, extent),
        "findings": _columns_of_findings(rows, list(images), extent, params),
        "lines": {at: _lines(row, seen) for at, row in matched.items()},
    }
    (folder / "findings.js").write_text(f"gallery.open({json.dumps(data, separators=(',', ':'))});\n")
    shutil.copyfile(SCRIPT, folder / SCRIPT.name)
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    counts = sorted(findings.counts(audit).items(), key=lambda item: (item[0][0], FIRST.index(item[0][1])))
    html = template.from_string(TEMPLATE.read_text()).render(
        shown=len(rows), findings=len(audit), counts=[(*key, count) for key, count in counts], warnings=warnings, then=then
    )
    (folder / "index.html").write_text(html)


def by_doubt(audit: pa.Table) -> list[Row]:
    """The findings that the page shows: those on one image together, the image that a person should look at first in front.

    Images go by their strongest outcome, in the order FIRST, and then by doubt; the findings on an image by outcome and score.
    """
    columns = (audit[name].to_pylist() for name in ("relation", "id", "outcome", "score"))
    of: dict[Image, list[tuple[int, float, int]]] = defaultdict(list)
    for at, (relation, image, outcome, score) in enumerate(zip(*columns, strict=True)):
        of[image_of(relation, image)].append((STRENGTH.index(outcome), -(score or 0.0), at))

    def first(image: Image) -> tuple[int, float, Image]:
        return FIRST.index(STRENGTH[min(of[image])[0]]), min(abs(-score - DOUBT) for _, score, _ in of[image]), image

    order: list[int] = []
    for image in sorted(of, key=first):
        if order and len(order) + len(of[image]) > SHOWN:
            break
        order += [at for _, _, at in sorted(of[image])]
    strongest = pa.array(findings.strongest(audit), pa.string())
    return audit.append_column("strongest", strongest).take(pa.array(order, pa.int64())).to_pylist()


def _images(row: Row) -> tuple[Image, ...]:
    """The image, and its match if it has one."""
    return ends(row) if row["match_id"] is not None else ends(row)[:1]


def _columns_of_images(
    images: Mapping[Image, int], sets: Mapping[str, Manifest], extent: Mapping[Image, np.ndarray]
) -> dict[str, Any]:
    """`decidable`: whether a line of overrides.csv with this id is about this image."""
    of = set_of([image for name, image in images if name in REMOVABLE], sets)
    return {
        "id": [image for _, image in images],
        "set": _coded([name for name, _ in images]),
        "class": _coded([_class(sets[name], row) for (name, _), row in images.items()]),
        "decidable": [int(of.get(image) == name) for name, image in images],
        "extent": [_rounded(extent[image]) for image in images],
    }


def _class(images: Manifest, row: int) -> str | None:
    label = images.table["label"][row].as_py()
    return None if label is None else images.classes[label]


def _columns_of_findings(
    rows: Sequence[Row], images: Sequence[Image], extent: Mapping[Image, np.ndarray], params: Dedup
) -> dict[str, Any]:
    place = {image: at for at, image in enumerate(images)}
    of = [[place[end] for end in _images(row)] for row in rows]
    plain = {name: [row[name] for row in rows] for name in ("inliers", "mirrored", "negative")}
    measured = {
        name: [None if row[name] is None else round(row[name], 3) for row in rows]
        for name in ("zncc", "local", "cover_image", "cover_match", "score")
    }
    return {
        "image": [pair[0] for pair in of],
        "match": [pair[1] if len(pair) == 2 else None for pair in of],
        **{name: _coded([row[name] for row in rows]) for name in ("relation", "outcome", "strongest", "rule")},
        "fate": _coded([_fate(row, params) for row in rows]),
        **plain,
        **measured,
        "outline": [_outline(row, extent) for row in rows],
    }


def _coded(values: Sequence[str | None]) -> dict[str, list[Any]]:
    """Texts that repeat: each once, and for each value its place among them, or null."""
    names = sorted({value for value in values if value is not None})
    place = {name: at for at, name in enumerate(names)}
    return {"names": names, "at": [None if value is None else place[value] for value in values]}


def _fate(row: Row, params: Dedup) -> str:
    """What happens to the image, which is another thing than what was found."""
    name = row["relation"].partition("-")[0]
    if row["override"]:
        return f"{row['override']} by hand: {row['reason']}"
    if not row["kept"]:
        return f"goes from {name}"
    reason = kept_by(row["relation"], row["outcome"], params)
    return f"stays in {name} ({reason})" if reason else f"stays in {name}"


def _outline(row: Row, extent: Mapping[Image, np.ndarray]) -> list[list[float]] | None:
    """Where the image lies in its match: four corners, in units of the match's longest side."""
    if not row["transform"]:
        return None
    back = np.linalg.inv(np.reshape(row["transform"], (3, 3)))
    width, height = extent[ends(row)[0]]
    corners = geometry.project(back, np.array([[0, 0], [width, 0], [width, height], [0, height]]))
    return [_rounded(corner) for corner in np.clip(corners, -FAR, FAR)]


def _lines(row: Row, seen: Mapping[Image, Picture]) -> list[list[float]]:
    """Of up to LINES features that agree the place in the image and in its match, in units of the longest side of each."""
    image, match = ends(row)
    if image not in seen or match not in seen:
        return []
    a, b = seen[match], seen[image]
    a = features.negative(a) if row["negative"] else a
    found = geometry.align(a, b, row["mirrored"])
    pairs = np.zeros((0, 2), int) if found is None else found.pairs[:: max(1, found.inliers // LINES)]
    places = np.hstack([b.features.points[pairs[:, 1], :2], a.features.points[pairs[:, 0], :2]])
    return [_rounded(place) for place in places]


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(float(value), 4) for value in values]
