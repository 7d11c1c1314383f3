"""The command `predict`: pictures in, a table of answers out."""

import argparse
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.harness import progress
from pipeline.harness.machine import Machine
from pipeline.predict import classifier, page, pictures, table
from pipeline.predict.classifier import Classifier, Temperature
from pipeline.predict.pictures import Loaded
from pipeline.store import artifact

TOP = 5


def run(args: argparse.Namespace) -> str:
    """Predict; returns a line that says what was done. Raises UserError for what cannot be used at all."""
    table.expect_kind(args.out)
    machine = Machine(device=args.device, precision="float32", workers=max(0, args.workers))
    model = classifier.load(args.model, args.exit, machine)
    calibration = classifier.temperature(args.model, args.exit, model.input.size, args.evaluation)
    found = pictures.lots(args.images, args.image)
    total = sum(lot.total for lot in found)
    if not total:
        raise UserError(f"there is no picture in {', '.join(args.images)}: name folders, tars, tables or files that hold some.")
    doubts = page.LeastSure(args.shown) if args.page else None
    loaded = pictures.loaded(found, model.input.side, machine.cores(machine.workers), doubts is not None)
    start = time.monotonic()
    with ExitStack() as stack:
        to = stack.enter_context(table.writing(args.out, min(TOP, len(model.classes))))
        shown = stack.enter_context(progress.bar(total, "images", "predict"))
        done, reasons = _predict(model, calibration.value, _grouped(loaded, args.batch), to, doubts, shown)
    seconds = time.monotonic() - start
    said = calibrated(calibration)
    if doubts is not None:
        with artifact.writing_file(args.page) as tmp:
            text = page.render(doubts.sorted(), str(args.model), str(args.out), done, reasons, said)
            tmp.write_text(text, encoding="utf-8")
    told = ", ".join(f"{n:,} x {reason}" for reason, n in reasons.items())
    skipped = f"{sum(reasons.values()):,} skipped" + (f" ({told}; see the column `error`)" if told else "")
    return f"predict: {done:,} of {total:,} pictures classified in {seconds:.1f} s, {skipped}. {said} Written: {args.out}." + (
        f" Page: {args.page}." if args.page else ""
    )


def _predict(
    model: Classifier,
    temperature: float,
    batches: Iterable[Sequence[Loaded]],
    to: table.Table,
    doubts: page.LeastSure | None,
    shown: progress.Bar,
) -> tuple[int, dict[str, int]]:
    """Writes the rows of all batches; returns how many pictures have an answer, and how many have none by kind of reason."""
    done, reasons, k = 0, Counter[str](), min(TOP, len(model.classes))
    for batch in batches:
        ids = [name for part in batch for name in part.ids]
        errors = [error for part in batch for error in part.errors]
        canvases = [canvas for part in batch for canvas in part.canvases]
        logits = model.logits(np.stack(canvases)) if canvases else np.zeros((0, len(model.classes)), np.float32)
        probabilities = softmax(logits / temperature)
        top = table.top_of(probabilities, k)
        to.add(table.rows(ids, errors, probabilities, top, model.classes))
        if doubts is not None and canvases:
            seen = [name for name, error in zip(ids, errors, strict=True) if error is None]
            thumbnails = [thumbnail for part in batch for thumbnail in part.thumbnails]
            doubts.add(seen, thumbnails, probabilities, top, model.classes)
        done += len(canvases)
        reasons.update(error.partition(":")[0] for error in errors if error is not None)
        shown.update(len(ids))
    return done, dict(reasons.most_common())


def softmax(logits: np.ndarray) -> np.ndarray:
    """(B, C) float64 probabilities."""
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True, initial=-np.inf))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def _grouped(loaded: Iterator[Loaded], size: int) -> Iterator[list[Loaded]]:
    """Chunks together, to about `size` pictures."""
    while group := list(islice(loaded, max(1, size // pictures.CHUNK))):
        yield group


def calibrated(temperature: Temperature) -> str:
    """A sentence on what the probabilities are worth."""
    if temperature.origin is None:
        return "Probabilities are as trained: no temperature is known for this model (--evaluation names one)."
    return f"Probabilities are calibrated at temperature {temperature.value:.4g} ({_near(temperature.origin)})."


def _near(path: str) -> str:
    """Relative to the current folder, where it lies below that."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path
