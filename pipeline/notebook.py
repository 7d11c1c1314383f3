"""What winnow has made, in a few lines of a notebook (docs/notebook.ipynb; docs/notebook.md says more).

    from pipeline import notebook as winnow

    pool = winnow.manifest("data/dedup/pool")          # a table of images: pool.table, pool.classes
    winnow.picture(pool, 0)                            # a picture
    student = winnow.model("data/distil/ssld")
    student.answer(winnow.picture(pool, 0))            # a class and its probability
    found = winnow.findings("data")                    # of the leak check
    found[0].view()                                    # an image beside the one it was found in
    result = winnow.comparison("data/compare/results") # result.best, result.entries["ssld"].val.top1

These names stay; those of other modules may change.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageOps
from pyarrow import csv

from pipeline.errors import UserError
from pipeline.leaks import findings as format
from pipeline.leaks import geometry
from pipeline.leaks.decision import ends
from pipeline.report import comparison as compared
from pipeline.report.comparison import Comparison
from pipeline.store import artifact
from pipeline.store import manifest as manifests
from pipeline.store.decode import decode
from pipeline.store.manifest import Manifest

if TYPE_CHECKING:
    from pipeline.predict.classifier import Classifier

SIDE, GAP, OUTLINE = 320, 8, (235, 87, 60)
"""Of a view of a finding: the longest side of its two pictures, the pixels between them, the colour of the outline."""

__all__ = [
    "Answer",
    "Comparison",
    "Finding",
    "Manifest",
    "Model",
    "comparison",
    "findings",
    "manifest",
    "model",
    "picture",
    "table",
]


def manifest(folder: str | Path) -> Manifest:
    """The images of an artifact of `prepare`, `dedup`, `select` or `pack`: `table` (a row an image, sorted by id) and `classes`.

    Raises UserError if there is none, or if it is damaged.
    """
    return manifests.read(_there(folder))


def picture(images: Manifest, which: int | str) -> Image.Image:
    """The image of a row number or of an id, in RGB as winnow sees it. Raises UserError for an id that is not there."""
    row = which if isinstance(which, int) else pc.index(images.table["id"], which).as_py()
    if not 0 <= row < len(images):
        raise UserError(f"there is no image {which!r} among these {len(images):,}: name a row number or an id of `table`.")
    [data] = manifests.image_bytes(images, [row])
    return Image.fromarray(decode(data))


class Answer(NamedTuple):
    """What a model says of a picture: the class it is surest of, its probability, and those of all classes, 0..1."""

    label: str
    probability: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Model:
    """A trained model. `temperature`: fitted by `evaluate`, 1 where nobody did; probabilities are calibrated by it."""

    classes: tuple[str, ...]
    temperature: float
    _classifier: "Classifier" = field(repr=False)

    def answer(self, image: Image.Image | np.ndarray | str | Path) -> Answer:
        """The answer about one picture: a PIL image, (H, W, 3) uint8 RGB, or a file. Raises UserError if it cannot be read."""
        return self.answers([image])[0]

    def answers(self, images: list[Image.Image | np.ndarray | str | Path]) -> list[Answer]:
        """The answers about several pictures, which go through the network together."""
        from pipeline.models import inputs
        from pipeline.predict.command import softmax

        canvases = np.stack([inputs.canvas(_pixels(image), self._classifier.input.side) for image in images])
        answers = []
        for row in softmax(self._classifier.logits(canvases) / self.temperature):
            best = int(row.argmax())
            answers.append(Answer(self.classes[best], float(row[best]), dict(zip(self.classes, row.tolist(), strict=True))))
        return answers


def model(path: str | Path, exit: int | None = None) -> Model:
    """The model of a model directory (data/distil/ssld), of a folder of `export`, or of its .onnx or .pt2, on the CPU.

    `exit`: of a network with several exits; None: the deepest. Raises UserError for what is no model.
    """
    from pipeline.harness.machine import Machine
    from pipeline.predict import classifier  # torch: seconds that a look at a manifest need not wait for

    loaded = classifier.load(Path(path), exit, Machine(device="cpu"))
    temperature = classifier.temperature(Path(path), exit, loaded.input.size, None)
    return Model(loaded.classes, temperature.value, loaded)


@dataclass(frozen=True)
class Finding:
    """One finding of the leak check: `id`, an image of the set `of`, was found in `match_id` of the set `among`.

    `outcome`: copy, review, unverifiable, alike, or by hand; `rule`: why. `kept`: whether the image is still in its set. `score`:
    how surely they agree, 0..1. `row`: all columns of leaks.parquet (docs/dedup.md). Without a match `match_id` is None.
    """

    of: str
    id: str
    among: str
    match_id: str | None
    outcome: str
    rule: str
    kept: bool
    score: float | None
    row: Mapping[str, object] = field(repr=False)
    _sets: Mapping[str, Manifest] = field(repr=False)

    def view(self) -> Image.Image:
        """The image and, to its right, its match, with an outline of where the image lies in it."""
        image = picture(self._sets[self.of], self.id)
        if self.match_id is None:
            return _fitted(image)
        match = picture(self._sets[self.among], self.match_id)
        left, right = _fitted(image), _fitted(match)
        if self.row["transform"]:
            back = np.linalg.inv(np.reshape(np.asarray(self.row["transform"], float), (3, 3)))
            width, height = np.array(image.size) / max(image.size)  # transforms are in units of the longest side
            corners = geometry.project(back, np.array([[0, 0], [width, 0], [width, height], [0, height]]))
            outline = [tuple(corner) for corner in (corners * max(right.size)).tolist()]
            ImageDraw.Draw(right).line([*outline, outline[0]], fill=OUTLINE, width=3)
        both = Image.new("RGB", (left.width + GAP + right.width, max(left.height, right.height)), "white")
        both.paste(left, (0, 0))
        both.paste(right, (left.width + GAP, 0))
        return both


def findings(data: str | Path = "data", outcome: str | None = None) -> list[Finding]:
    """What `dedup` decided about, in the folder `data` of a run; only findings of one `outcome` if it is given.

    Raises UserError if `dedup` has not run, or its artifact is damaged.
    """
    leaks = artifact.verify(_there(Path(data, "dedup", "leaks")))
    sets = {name: manifest(Path(data, "prepare", name)) for name in ("pool", "train", "holdout", "val")}
    found = []
    for row in pq.read_table(leaks / format.FILE).to_pylist():
        if outcome in (None, row["outcome"]):
            (of, image), (among, match) = ends(row)
            told = (row["outcome"], row["rule"], row["kept"], row["score"])
            found.append(Finding(of, image, among, match, *told, row, sets))
    return found


def comparison(folder: str | Path = "data/compare/results") -> Comparison:
    """The comparison: `best`, `entries` by name with their figures, `pairs` with statistics. Raises UserError without one."""
    return compared.read(artifact.verify(_there(folder)))


def table(folder: str | Path = "data/compare/results") -> pa.Table:
    """The comparison as a table, a row an entry; `.to_pandas()` makes a data frame of it."""
    return csv.read_csv(artifact.verify(_there(folder)) / "table.csv")


def _there(folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not there. Run `dvc repro`, which makes it, or start in the folder of the project.")
    return Path(folder)


def _pixels(image: Image.Image | np.ndarray | str | Path) -> np.ndarray:
    if isinstance(image, str | Path):
        return decode(Path(image).read_bytes())
    return np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else image


def _fitted(image: Image.Image) -> Image.Image:
    return ImageOps.contain(image, (SIDE, SIDE))
