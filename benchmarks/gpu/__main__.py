"""The figures that need a GPU, by one command that goes on where the last call stopped.

    python -m benchmarks.gpu [PIECE ...] --out FOLDER [--device auto] [--minutes 9] [--data FOLDER] [--tiny]
    python -m benchmarks.gpu report --out FOLDER

Pieces, all by default:

    scoring      images a second of the stage `score`, as a share of the bare compiled forward
    training     the same of `fit.fit`, as a share of the bare compiled step
    precision    bfloat16 against float32: accuracy after a short training, and the logits
    large-batch  LARS at batches of 1,024, 2,048 and 4,096
    processes    one process, one in a group, two: do they train the same?
    resume       a training killed and started again: are its bits those of an undisturbed one?
    cifar        accuracy on CIFAR-10; needs --data with the tars of `benchmarks.data`

A call ends within --minutes and then exits with 75 if something is left: give the same command again. Finished rows and pieces
are skipped, a training goes on from its checkpoint. A piece that is whole is one file, FOLDER/PIECE.json. `report` prints what is
there as Markdown. It needs torch, torchvision, timm, OpenCV, Pillow, numpy, pyarrow, safetensors, PyYAML, tqdm, pydantic and
simplejpeg, and none of winnow's other packages.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.gpu import cifar, learning, report, setting, speed, whole
from pipeline.errors import UserError

PIECES = {
    "scoring": (speed.scoring, True),
    "training": (speed.training, True),
    "precision": (learning.precision, False),
    "large-batch": (learning.large_batch, False),
    "processes": (whole.processes, True),
    "resume": (whole.resume, True),
    "cifar": (cifar.cifar, False),
}
"""By name: what makes its rows, and whether these cannot be interrupted."""
REPORT, UNFINISHED = "report", 75


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help="which pieces, or `report`")
    parser.add_argument("--out", type=Path, required=True, help="where the figures are kept")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: cuda where there is one")
    parser.add_argument("--minutes", type=float, default=9.0, help="when this call is to end")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as tars, as `benchmarks.data` writes them")
    parser.add_argument("--commit", help="of the code, where it is no git checkout")
    parser.add_argument("--tiny", action="store_true", help="try every piece in seconds; no figure means anything")
    args = parser.parse_args()
    if unknown := [name for name in args.pieces if name not in (*PIECES, REPORT)]:
        parser.error(f"no piece {', '.join(unknown)}: there are {', '.join(PIECES)}, and {REPORT}")
    try:
        if REPORT in args.pieces:
            print(report.text(args.out, list(PIECES)))
            return
        given = setting.begin(args.out, args.device, args.minutes, args.tiny, args.data, args.commit)
        left = []
        for name in args.pieces or PIECES:
            make, long = PIECES[name]
            rows = make(given)
            if rows is not None and not setting.finish(name, rows, given, long):
                left.append(name)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if left:
        print(f"not finished: {', '.join(left)}. Give the same command again.", file=sys.stderr)
        sys.exit(UNFINISHED)


if __name__ == "__main__":
    main()
