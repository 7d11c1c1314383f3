"""python -m flows plan [STAGE...]     what a run would do now: each stage, why, and for how long (`plan --help`)"""

import argparse
import sys
from pathlib import Path

from flows import dag, plan

DESCRIPTION = """What a run would do now: each stage that would run or be restored from DVC's cache, why, and how long it will
take on this machine. Other options are those of `python -m pipeline estimate`: --fresh, --no-probe, --params FILE, and for data
that are not there yet --images N --val N, --labelled, --classes, --size, --gpu-macs (docs/operations.md)."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flows", description=__doc__)
    of_plan = parser.add_subparsers(dest="do", required=True, metavar="{plan}").add_parser("plan", description=DESCRIPTION)
    of_plan.add_argument("stages", nargs="*", metavar="STAGE", help="`distil@ssld`, or `distil` for all its entries; none: all")
    of_plan.add_argument("--force", action="store_true", help="as if every stage were to run")
    of_plan.add_argument("--width", type=int, metavar="COLUMNS", help="default: the terminal's; 100 where there is none")
    of_plan.add_argument("--save", type=Path, metavar="FILE", help="write the seconds for the stages, which tell what is left")
    args, more = parser.parse_known_args()
    try:
        if any(option.startswith("--images") for option in more):
            sys.stdout.write(plan.ahead(Path.cwd(), more, args.width))
            return
        made = plan.of_folder(Path.cwd(), args.stages, args.force, more)
    except dag.DVCError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(made.text(args.width))
    if args.save:
        made.save(args.save)


if __name__ == "__main__":
    main()
