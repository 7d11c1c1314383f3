"""python -m flows plan [STAGE...]     what a run would do now: each stage, why, and for how long (`plan --help`)
python -m flows notify URL          have Prefect tell a webhook of every run that fails
"""

import argparse
import asyncio
import sys
from pathlib import Path

from flows import dag, plan

DESCRIPTION = """What a run would do now: each stage that would run or be restored from DVC's cache, why, and how long it will
take on this machine. With --images: core-hours and GPU-hours of a params file for data that are not there yet. docs/plan.md says
where the times come from."""
NOTIFY = """Have the Prefect that PREFECT_API_URL names tell a webhook, such as a chat's, of every run of winnow that fails: its
name, why, and a link. Once for each server; another URL takes the place of the first."""
AHEAD = {
    "--images": ("N", "images of the pool: 14_000_000"),
    "--val": ("N", "validation images"),
    "--labelled": ("N", "images with labels; default: a tenth of the pool"),
    "--classes": ("N", "default: one for 50 validation images"),
    "--size": ("PIXELS", "side of the images, which are drawn; default: 400"),
    "--gpu-macs": ("RATE", "multiply-accumulates that a GPU does a second: an assumption; default: 1e14"),
    "--params": ("FILE", "the recipe; default: params.yaml"),
}


def main() -> None:
    formatted = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m flows", description=__doc__, formatter_class=formatted)
    commands = parser.add_subparsers(dest="do", required=True, metavar="{plan,notify}")
    commands.add_parser("notify", description=NOTIFY).add_argument("url", metavar="URL", help="of a webhook that takes JSON")
    of_plan = commands.add_parser("plan", description=DESCRIPTION)
    of_plan.add_argument("stages", nargs="*", metavar="STAGE", help="`distil@ssld`, or `distil` for all its entries; none: all")
    of_plan.add_argument("--force", action="store_true", help="as if every stage were to run")
    of_plan.add_argument("--fresh", action="store_true", help="probe again what was probed before")
    of_plan.add_argument("--no-probe", action="store_true", help="know only what earlier runs took and earlier probes found")
    of_plan.add_argument("--width", type=int, metavar="COLUMNS", help="default: the terminal's; 100 where there is none")
    of_plan.add_argument("--save", type=Path, metavar="FILE", help="write the seconds for the stages, which tell what is left")
    later = of_plan.add_argument_group("for data that are not there yet")
    for name, (metavar, text) in AHEAD.items():
        later.add_argument(name, metavar=metavar, help=text)
    args = parser.parse_args()
    if args.do == "notify":
        notified(args.url)
        return
    given = {name: getattr(args, name.strip("-").replace("-", "_")) for name in AHEAD}
    numbers = [word for name, value in given.items() if value is not None for word in (name, value)]
    probing = [f"--{name.replace('_', '-')}" for name in ("fresh", "no_probe") if getattr(args, name)]
    if args.save:
        args.save.unlink(missing_ok=True)  # a plan that cannot be made leaves no old one behind
    try:
        if given["--images"] is not None:
            sys.stdout.write(plan.ahead(Path.cwd(), [*numbers, *probing], args.width))
            return
        if numbers:
            parser.error(f"{numbers[0]} goes with --images; without it the plan is of params.yaml and the data of this folder")
        made = plan.of_folder(Path.cwd(), args.stages, args.force, probing)
    except dag.DVCError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(made.text(args.width))
    if args.save:
        made.save(args.save)


def notified(url: str) -> None:
    from flows import notify  # a plan needs no Prefect

    try:
        sys.stdout.write(f"Prefect tells it of {asyncio.run(notify.tell(url))}\n")
    except notify.WrongAddress as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
