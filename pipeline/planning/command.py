"""`python -m pipeline estimate`: what `python -m flows plan` asks of the pipeline, answered as one line of JSON on stdout."""

import argparse
import json
import sys
from typing import Any

from pipeline.errors import UserError
from pipeline.harness.durations import machine_of
from pipeline.harness.dvc import project_folder
from pipeline.harness.stage import WORK
from pipeline.planning import ahead, estimate
from pipeline.planning.counts import Given
from pipeline.planning.work import Recipe


def run(args: argparse.Namespace) -> str:
    """The line. Raises ParamsError, and UserError where numbers of images are missing or do not fit."""
    recipe = Recipe.read(args.params)
    folder = project_folder() / WORK
    here = machine_of(recipe.machine)
    answer: dict[str, Any] = {"cores": here["cores"], "cpu": here["cpu"]}
    if args.images is None:
        found, seconds = estimate.estimates(recipe, args.stages, folder, not args.no_probe, args.fresh)
        answer["stages"] = {name: of._asdict() for name, of in found.items()}
    else:
        given, assumed = images_of(args)
        sys.stderr.write("counting and probing; the images are drawn\n")
        hours, seconds = ahead.hours(recipe, given, args.size, args.gpu_macs, folder)
        answer |= {"given": given._asdict(), "assumed": assumed, "size": args.size, "gpu_macs": args.gpu_macs}
        answer["stages"] = {name: of._asdict() for name, of in hours.items()}
    return json.dumps(answer | {"probed": seconds})


def images_of(args: argparse.Namespace) -> tuple[Given, list[str]]:
    """The numbers of images, and which of them nobody gave. Raises UserError."""
    if args.val is None:
        raise UserError("--images needs --val, the number of validation images.")
    assumed = []
    classes, labelled = args.classes, args.labelled
    if classes is None:
        classes = max(2, round(args.val / 50))
        assumed.append(f"{classes:,} classes, 50 validation images each (--classes)")
    if labelled is None:
        labelled = max(2 * classes, round(args.images / 10))
        assumed.append(f"{labelled:,} labelled images, a tenth of the pool (--labelled)")
    if min(args.images, args.val, labelled) < 1 or classes < 2 or labelled < 2 * classes or args.size < 16 or args.gpu_macs <= 0:
        raise UserError(
            "--images, --val and --labelled must be at least 1, --classes 2, --size 16, --gpu-macs above 0, and there must be "
            f"two labelled images of each class: these are {args.images}, {args.val}, {labelled}, {classes}, {args.size}, "
            f"{args.gpu_macs:g}."
        )
    return Given(labelled, args.val, args.images, classes), assumed
