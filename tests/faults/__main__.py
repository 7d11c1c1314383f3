"""Kill every stage at random moments and flip bits in what it reads; a table, and exit status 1 if anything went wrong.

python -m tests.faults --kills 600 --seed 1
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.faults.harness import House, adopt_orphans, commands, flip, kill


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Kill stages at random moments.")
    parser.add_argument("--kills", type=int, default=60, help="in all, spread over the stages")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the bits")
    args = parser.parse_args()
    random = np.random.default_rng(args.seed)
    wrong: list[str] = []
    met = flips = stuck = left = 0
    adopt_orphans()
    with tempfile.TemporaryDirectory() as folder:
        house, todo = House(Path(folder)), commands()
        print("| stage | seconds | kills | other bytes | stuck | processes left | flipped bits | unnoticed |", end="\n| --- |")
        print(" ---: |" * 7)
        for i, command in enumerate(todo):
            status, _ = house.run(command)
            if status:
                print(house.log(), file=sys.stderr)
                return 1
            house.warm()
            house.forget(command)
            _, seconds = house.run(command)  # the first run of a kind of stage imports and fills caches
            share = args.kills * (i + 1) // len(todo) - args.kills * i // len(todo)
            came = kill(house, command, share, random, seconds)
            if came.stuck:
                house.forget(command)
                house.run(command)  # what follows reads its artifacts
            unnoticed = flip(house, command, random)
            read = len(list(house.artifacts_read(command)))
            figures = (came.met, len(came.differing), len(came.stuck), came.left, read, len(unnoticed))
            print(f"| {command.name} | {seconds:.2f} | {' | '.join(map(str, figures))} |", flush=True)
            wrong += came.differing + came.stuck + unnoticed
            met, flips, stuck, left = met + came.met, flips + read, stuck + len(came.stuck), left + came.left
    print(
        f"\n{met} kills, {stuck} stuck, {left} processes left, {flips} flipped bits, {len(wrong)} gone wrong (seed {args.seed})."
    )
    for line in wrong:
        print(line, file=sys.stderr)
    return bool(wrong) or left > 0 or met < args.kills


if __name__ == "__main__":
    sys.exit(main())
