"""Kill every stage at random moments and flip bits in what it reads; a table, and exit status 1 if anything went wrong.

python -m tests.faults --kills 600 --seed 1
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.faults.harness import House, commands, flip, kill


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Kill stages at random moments.")
    parser.add_argument("--kills", type=int, default=60, help="in all, spread over the stages")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the bits")
    args = parser.parse_args()
    random = np.random.default_rng(args.seed)
    wrong: list[str] = []
    met = flips = 0
    with tempfile.TemporaryDirectory() as folder:
        house, todo = House(Path(folder)), commands()
        print("| stage | seconds | kills | other bytes | flipped bits | unnoticed |\n| --- | ---: | ---: | ---: | ---: | ---: |")
        for i, command in enumerate(todo):
            status, _ = house.run(command)
            if status:
                print(house.log(), file=sys.stderr)
                return 1
            house.warm()
            house.forget(command)
            _, seconds = house.run(command)  # the first run of a kind of stage imports and fills caches
            share = args.kills * (i + 1) // len(todo) - args.kills * i // len(todo)
            kills, differing = kill(house, command, share, random, seconds)
            unnoticed = flip(house, command, random)
            read = len(list(house.artifacts_read(command)))
            print(f"| {command.name} | {seconds:.2f} | {kills} | {len(differing)} | {read} | {len(unnoticed)} |", flush=True)
            wrong += differing + unnoticed
            met, flips = met + kills, flips + read
    print(f"\n{met} kills, {flips} flipped bits, {len(wrong)} gone wrong (seed {args.seed}).")
    for line in wrong:
        print(line, file=sys.stderr)
    return bool(wrong) or met < args.kills


if __name__ == "__main__":
    sys.exit(main())
