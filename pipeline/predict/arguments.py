"""The command line of `predict`, apart from what needs torch: `python -m pipeline` loads it for every command."""

import argparse
from pathlib import Path

SHOWN = 200
DESCRIPTION = """Classify pictures with a trained model, and write a table: id, class, probability, the next classes with
theirs, and `error` for a picture that was skipped. Probabilities are calibrated where a temperature is known."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `predict` takes."""
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a model directory (data/distil/ssld), a folder of `export`, its .onnx or .pt2")
    add(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="folders, uncompressed tars, Parquet tables with image bytes, lists of paths (.txt, .lst: one a line), image files",
    )
    add("--out", type=Path, required=True, metavar="FILE", help="the table to write: .csv or .parquet")
    add(
        "--evaluation",
        type=Path,
        metavar="FOLDER",
        help="the evaluation that fitted a temperature; else looked for in data/evaluate",
    )
    add("--exit", type=int, metavar="N", help="end at this exit of a network that has several")
    add("--page", type=Path, metavar="FILE", help="also write a page of the pictures that the model is least sure of (.html)")
    add("--shown", type=_positive, default=SHOWN, metavar="N", help=f"pictures on the page (default: {SHOWN})")
    add("--image", default="image", metavar="COLUMN", help="the column of image bytes of Parquet tables (default: image)")
    add("--device", default="auto", help="cpu, cuda, or auto: cuda where there is one (an exported file runs on the CPU)")
    add("--batch", type=_positive, default=256, metavar="N", help="pictures classified at once, about (default: 256)")
    add("--workers", type=int, default=0, metavar="N", help="threads that decode (default: one for each core)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number
