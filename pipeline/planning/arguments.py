"""What `python -m pipeline estimate` takes on its command line."""

import argparse
from pathlib import Path

from pipeline.harness.stage import PARAMS_FILE

GPU_MACS = 1e14
"""Multiply-accumulates a second that a GPU is assumed to do: a quarter of what an H200 could at most. Nothing measured it."""

DESCRIPTION = """How long stages will take: one line of JSON, for `python -m flows plan`, which makes a table of it.

Seconds come from earlier runs on this machine (.scratch/durations.jsonl) where there are some, else from probes of a second or
two for each kind of work, which are kept in .scratch/probes.json. With --images the answer is for data that are not there yet, in
hours of a core and of a GPU; what GPUs do is counted and divided by an assumed rate."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="as DVC names them: `distil@ssld`")
    parser.add_argument("--params", type=Path, default=PARAMS_FILE, metavar="FILE")
    parser.add_argument("--fresh", action="store_true", help="probe again what was probed before")
    parser.add_argument("--no-probe", action="store_true", help="know only what earlier runs took and earlier probes found")
    later = parser.add_argument_group("for data that are not there yet")
    later.add_argument("--images", type=int, metavar="N", help="images of the pool: 14_000_000")
    later.add_argument("--val", type=int, metavar="N", help="validation images")
    later.add_argument("--labelled", type=int, metavar="N", help="images with labels; default: a tenth of the pool")
    later.add_argument("--classes", type=int, metavar="N", help="default: one for 50 validation images")
    later.add_argument(
        "--size", type=int, default=400, metavar="PIXELS", help="side of the images, which are drawn; default: 400"
    )
    later.add_argument(
        "--gpu-macs",
        type=float,
        default=GPU_MACS,
        metavar="RATE",
        help=f"multiply-accumulates that a GPU does a second: an assumption; default: {GPU_MACS:g}",
    )
