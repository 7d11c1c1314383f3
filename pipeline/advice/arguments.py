"""The command lines of `forecast` and `gallery`, apart from what needs torch: `python -m pipeline` loads them always."""

import argparse
from pathlib import Path

EACH, CLASSES, LISTED = 8, 40, 60
GALLERY = """Write a page of a selection, complete in itself: of each class the surest images, the last ones in, and those just
outside; where teacher and student disagree most; and labels that may be wrong. It reads what the stages have made, and makes
nothing stale."""


FORECAST = """Say, before a student is trained, how pure a selection of the k surest images of each class will be, which classes
will have fewer, which k to choose, and whether SSLD is expected to gain over distilling on the labelled images alone. It reads
what the teacher said of the pool and of the held-out images."""


def add_forecast(parser: argparse.ArgumentParser) -> None:
    """What `forecast` takes."""
    add = parser.add_argument
    add("scores", type=Path, metavar="SCORES", help="what `score` has made (data/score/teacher)")
    add("--k", type=_positive, nargs="+", default=[], metavar="K", help="which k to look at (default: 1, 2, 5, 10, ... of them)")
    add(
        "--data",
        type=Path,
        default=Path("data/dedup"),
        metavar="FOLDER",
        help="where pool, train and holdout are (default: data/dedup)",
    )
    add("--csv", type=Path, metavar="FILE", help="also write a row for each class and k")


def add_gallery(parser: argparse.ArgumentParser) -> None:
    """What `gallery` takes."""
    add = parser.add_argument
    add("selection", type=Path, metavar="SELECTION", help="what `select` has made (data/select/top)")
    add("--out", type=Path, required=True, metavar="FILE", help="the page to write (.html)")
    add(
        "--student",
        type=Path,
        metavar="MODEL",
        help="a model directory (data/distil/ssld): where does it disagree with the teacher?",
    )
    add(
        "--data",
        type=Path,
        default=Path("data/dedup"),
        metavar="FOLDER",
        help="where train and holdout are (default: data/dedup)",
    )
    add(
        "--folds",
        type=_folds,
        default=0,
        metavar="N",
        help="train the teacher N times, each without a part of the labelled images: checks all labels, not only the holdout's",
    )
    add("--suspects", type=Path, metavar="FILE", help="also write the labels that may be wrong as lines for data/overrides.csv")
    add(
        "--class",
        dest="classes",
        action="append",
        default=[],
        metavar="NAME",
        help=f"a class to show; may be repeated (default: all, or the {CLASSES} whose last image is least sure)",
    )
    add("--each", type=_positive, default=EACH, metavar="N", help=f"images of each kind and class (default: {EACH})")
    add("--listed", type=_positive, default=LISTED, metavar="N", help=f"disagreements, and suspects, at most (default: {LISTED})")
    add("--device", default="auto", help="cpu, cuda, or auto: cuda where there is one")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _folds(text: str) -> int:
    number = int(text)
    if number == 1 or number < 0:
        raise argparse.ArgumentTypeError(f"{number} is neither 0 nor at least 2")
    return number
