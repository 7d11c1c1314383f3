"""The command `gallery`: a page of what was selected, for a person who wants to know whether it is any good.

It is no stage, and no output of one: `select` would read pixels, and all students be trained anew for a change of the page.
"""

import argparse
import base64
import csv
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jinja2
import numpy as np

from pipeline.advice import answers, selection
from pipeline.advice.arguments import CLASSES
from pipeline.advice.selection import Ranks, Selection
from pipeline.advice.suspects import parts, suspects
from pipeline.errors import UserError
from pipeline.harness import progress
from pipeline.harness.job import Job
from pipeline.harness.journal import Journal
from pipeline.harness.machine import Machine
from pipeline.harness.stage import WORK
from pipeline.stages import teach
from pipeline.store import artifact, manifest
from pipeline.store.decode import decode
from pipeline.store.manifest import Manifest
from pipeline.store.scores import LOGSUMEXP, names_of

TEMPLATE = Path(__file__).with_name("gallery.html.jinja")
SIDE, QUALITY = 160, 75  # of a thumbnail: pixels of its longest side at most, and WebP
ASKED = 5_000  # selected images that the student is asked about, evenly over the pool


class Card(NamedTuple):
    """An image of the manifest `of`, and what is said about it, each with a share in 0..1 that is drawn as a bar."""

    of: Manifest
    row: int
    told: list[tuple[str, float]]

    @property
    def id(self) -> str:
        return str(self.of.table["id"][self.row])


class Shown(NamedTuple):
    """A class on the page. `last`: p of the last image that it took."""

    name: str
    taken: int
    last: float
    groups: list[tuple[str, list[Card]]]


class Suspect(NamedTuple):
    """An image of `set` whose label is doubted."""

    set: str
    card: Card
    label: str
    better: str
    margin: float


def run(args: argparse.Namespace) -> str:
    """Write the page; returns a line that says what was done. Raises UserError for what cannot be used."""
    if args.out.suffix != ".html":
        raise UserError(f"--out {args.out}: a page is written, so the name must end in .html.")
    machine = Machine(device=args.device)
    chosen = selection.opened(args.selection)
    names = chosen.scored.classes
    if strange := [name for name in args.classes if name not in names]:
        raise UserError(f"--class {strange[0]}: the teacher has no such class. It has {', '.join(names[:20])}.")
    ranks = selection.ranks(chosen, args.each, machine)
    classes = [_class(chosen, ranks[c], c, args.each) for c in _shown(ranks, [names.index(name) for name in args.classes])]
    differing, asked = _disagreements(chosen, args.student, args.listed, machine) if args.student else ([], 0)
    doubted, told = _suspects(chosen, args.data, args.folds, machine)
    listed = doubted[: args.listed]
    cards = [card for shown in classes for _, group in shown.groups for card in group]
    small = _thumbnails([*cards, *differing, *(suspect.card for suspect in listed)], machine)
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    text = template.from_string(TEMPLATE.read_text()).render(
        selection=str(args.selection),
        params=chosen.params,
        teacher=str(chosen.teacher),
        student=str(args.student) if args.student else None,
        images=len(chosen.rows),
        pool=len(chosen.pool),
        classes=classes,
        every=len(names),
        differing=differing,
        asked=asked,
        suspects=listed,
        doubted=len(doubted),
        told=told,
        folds=args.folds,
        small=lambda card: small[id(card.of), card.row],
        written=str(args.suspects) if args.suspects else None,
    )
    with artifact.writing_file(args.out) as tmp:
        tmp.write_text(text, encoding="utf-8")
    if args.suspects:
        _write_lines(args.suspects, doubted)
    more = f" Lines for data/overrides.csv: {args.suspects}." if args.suspects else ""
    counts = f"{len(classes)} of {len(names)} classes, {len(small)} pictures, {len(doubted)} suspects"
    return f"gallery: {counts}. Page: {args.out}.{more}"


# The classes ----------------------------------------------------------------------------------------------------------


def _shown(ranks: Sequence[Ranks], wanted: Sequence[int]) -> list[int]:
    """The classes on the page: `wanted`, or all, or of many those whose last image is least sure."""
    if wanted:
        return list(dict.fromkeys(wanted))
    last = np.array([r.last for r in ranks])
    return sorted(np.argsort(last, kind="stable")[:CLASSES].tolist())  # nan, of a class that took nothing, comes last


def _class(chosen: Selection, ranks: Ranks, c: int, each: int) -> Shown:
    taken = ranks.taken
    groups = {"the surest": taken[:each], "the last ones in": taken[each:][-each:], "just outside": ranks.outside}
    if chosen.params.rule not in ("top", "band"):
        groups = {
            "the surest": taken[:each],
            "the least sure": taken[each:][-each:],
            "the surest that were not taken": ranks.outside,
        }
    cards = [(title, _cards(chosen, rows)) for title, rows in groups.items() if len(rows)]
    return Shown(chosen.scored.classes[c], len(taken), float(np.exp(ranks.last)), cards)


def _cards(chosen: Selection, rows: np.ndarray) -> list[Card]:
    """With the teacher's first two classes."""
    first, p = _teacher(chosen, rows, min(2, chosen.scored.m))
    names = chosen.scored.classes
    return [
        Card(chosen.pool, row, [(names[c], share) for c, share in zip(of, shares, strict=True)])
        for row, of, shares in zip(rows.tolist(), first.tolist(), p.tolist(), strict=True)
    ]


def _teacher(chosen: Selection, rows: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """The first m classes of the given rows, (n, m), and their probabilities."""
    scored = chosen.scored
    logits = scored.matrix(names_of("logit", m))[rows] - scored.matrix([LOGSUMEXP])[rows]
    return scored.matrix(names_of("class", m))[rows].astype(np.int64), np.exp(logits)


# Teacher and student --------------------------------------------------------------------------------------------------


def _disagreements(chosen: Selection, student: Path, most: int, machine: Machine) -> tuple[list[Card], int]:
    """The selected images on which the two differ most, of those that have another first class for each; and how many were
    looked at."""
    count = len(chosen.rows)
    rows = chosen.rows[np.linspace(0, count - 1, min(count, ASKED)).astype(int)]
    names = chosen.scored.classes
    q = answers.softmax(answers.logits(student, names, chosen.pool.take(rows), machine, "student"))
    first, p = _teacher(chosen, rows, chosen.scored.m)
    apart = divergence(p, np.take_along_axis(q, first, 1))
    theirs = q.argmax(1)
    order = [i for i in np.argsort(-apart, kind="stable") if theirs[i] != first[i, 0]][:most]
    return [
        Card(
            chosen.pool,
            int(rows[i]),
            [(f"teacher: {names[first[i, 0]]}", float(p[i, 0])), (f"student: {names[theirs[i]]}", float(q[i, theirs[i]]))],
        )
        for i in order
    ], len(rows)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(N,) Jensen-Shannon divergence in nats, 0..ln 2, of (N, m) probabilities of the same m classes; the rest counts as one."""
    p, q = (np.hstack([x, np.maximum(0, 1 - x.sum(1, keepdims=True))]).astype(np.float64) for x in (p, q))
    middle = (p + q) / 2

    def from_middle(x: np.ndarray) -> np.ndarray:
        return np.asarray(np.sum(x * np.log(np.where(x > 0, x, 1) / np.where(x > 0, middle, 1)), axis=1))

    return (from_middle(p) + from_middle(q)) / 2


# Labels ---------------------------------------------------------------------------------------------------------------


def _suspects(chosen: Selection, data: Path, folds: int, machine: Machine) -> tuple[list[Suspect], list[str]]:
    """The labels that may be wrong, the most doubtful first; and sentences on who checked which."""
    names = chosen.scored.classes
    train, holdout = (manifest.read(data / name) for name in ("train", "holdout"))
    found = _of_set("holdout", holdout, answers.softmax(answers.logits(chosen.teacher, names, holdout, machine, "holdout")))
    told = [f"The teacher checked the {len(holdout):,} labels of the holdout, from which winnow did not let it learn."]
    if chosen_start := _start(chosen.teacher):
        told.append(f"It started from {chosen_start}, which may have seen these labels; then it repeats them, mistakes included.")
    if folds:
        found += _of_set("train", train, crossed(chosen.teacher, data, train, folds, machine))
        others = f"the other {folds - 1} of {folds} parts"
        told.append(f"Each of the {len(train):,} training labels was checked by a network trained like it on {others}.")
    else:
        told.append(f"The {len(train):,} training labels were not checked: the teacher has learned them.")
    return sorted(found, key=lambda suspect: suspect.margin), told


def _of_set(name: str, images: Manifest, probabilities: np.ndarray) -> list[Suspect]:
    labels, names = images.labels(), images.classes
    found = suspects(probabilities, labels)
    return [
        Suspect(
            name,
            Card(images, row, [(f"label: {names[label]}", float(p[label])), (f"like: {names[better]}", float(p[better]))]),
            names[label],
            names[better],
            float(p[label] - p[better]),
        )
        for row, better, label, p in zip(
            found.rows.tolist(), found.better.tolist(), labels[found.rows].tolist(), probabilities[found.rows], strict=True
        )
    ]


def _start(model: Path) -> str | None:
    """Whose weights a model started from; None: from none."""
    record = artifact.record(model)
    if record.get("stage") != "teach":
        return str(record.get("stage") or "weights that winnow did not make")
    network = record["params"].get("model") or {}
    init = record["inputs"]["init"]["path"]
    return network.get("pretrained") or (None if init == "data/scratch" else str(init))


def crossed(teacher: Path, data: Path, train: Manifest, folds: int, machine: Machine) -> np.ndarray:
    """(N, C) probabilities of networks that are trained like `teacher`, each image by one that has not seen it.

    What is finished stays in .scratch/folds, so a killed command goes on. Raises UserError unless `teach` has trained `teacher`.
    """
    record = artifact.record(teacher)
    if record.get("stage") != "teach" or not (record["params"]["training"] or {}).get("steps"):
        why = f"{teacher} was not trained by `teach`, so it cannot be trained again without a part of the labels"
        raise UserError(f"--folds: {why}. Leave --folds out.")
    labels = train.labels()
    if fewest := [name for c, name in enumerate(train.classes) if (labels == c).sum() < folds]:
        raise UserError(f"--folds {folds}: the class {fewest[0]} has fewer training images. Name fewer parts.")
    params = teach.Teach.model_validate({**record["params"], "labels": None})
    key = hashlib.sha256(f"{record['key']} {artifact.identity(data / 'train')} {folds}".encode()).hexdigest()[:16]
    work, part = WORK / "folds" / key, parts(labels, folds)
    out = np.zeros((len(train), len(train.classes)), np.float32)
    for fold in range(folds):
        folder = work / str(fold)
        if not (folder / "model").exists():
            with artifact.writing(folder / "train") as tmp:
                manifest.write(tmp, train.take(np.flatnonzero(part != fold)).table, train.classes)
            job = Job(record["seed"], folder / "work", Journal(), machine)
            init = Path(record["inputs"]["init"]["path"])
            teach.run(params, train=folder / "train", holdout=data / "holdout", init=init, out=folder / "model", job=job)
        rows = np.flatnonzero(part == fold)
        said = answers.logits(folder / "model", train.classes, train.take(rows), machine, f"part {fold + 1} of {folds}")
        out[rows] = answers.softmax(said)
    return out


def _write_lines(file: Path, doubted: Sequence[Suspect]) -> None:
    """id, action, reason: as data/overrides.csv has them, to be read before they are put there."""
    with artifact.writing_file(file) as tmp, tmp.open("w", newline="", encoding="utf-8") as f:
        lines = csv.writer(f)
        lines.writerow(["id", "action", "reason"])
        lines.writerows([s.card.id, "remove", f"labelled {s.label}, looks like {s.better}"] for s in doubted)


# Pictures -------------------------------------------------------------------------------------------------------------


def _thumbnails(cards: Sequence[Card], machine: Machine) -> Mapping[tuple[int, int], dict[str, Any]]:
    """Of each image, by its manifest and row: width, height and the base64 of a WebP file."""
    of = {id(card.of): card.of for card in cards}
    wanted = sorted({(id(card.of), card.row) for card in cards})
    rows: dict[int, list[int]] = {key: [row for k, row in wanted if k == key] for key in of}
    small: dict[tuple[int, int], dict[str, Any]] = {}
    with ThreadPoolExecutor(machine.cores(machine.workers)) as pool, progress.bar(len(wanted), "images", "gallery") as shown:
        for key, images in of.items():
            for row, done in zip(rows[key], pool.map(_small, manifest.image_bytes(images, rows[key])), strict=True):
                small[key, row] = done
                shown.update(1)
    return small


def _small(data: bytes) -> dict[str, Any]:
    image = decode(data)
    scale = min(1.0, SIDE / max(image.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    if scale < 1:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    webp = cv2.imencode(".webp", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_WEBP_QUALITY, QUALITY])[1]
    return {"width": width, "height": height, "webp": base64.b64encode(webp.tobytes()).decode()}
