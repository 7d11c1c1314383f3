"""Try hostile inputs by kind; a table, and exit status 1 if one of them did not end as promised.

python -m tests.hostile                      all of them
python -m tests.hostile --kind tar --seed 3  those of one kind, with other random ones
"""

import argparse
import sys
import time

from tests.hostile.case import judged
from tests.hostile.catalogue import PROMISED, cases


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description="Try hostile inputs.")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs that are changed at random")
    parser.add_argument("--kind", choices=PROMISED, help="this kind alone")
    args = parser.parse_args()
    wrong: list[str] = []
    tried = 0
    print("| kind | tried | held | promised | seconds |\n| --- | ---: | ---: | --- | ---: |")
    for kind, promised in PROMISED.items():
        if args.kind not in (None, kind):
            continue
        start, whys = time.monotonic(), {case.name: judged(case) for case in cases(args.seed) if case.kind == kind}
        failed = {name: why for name, why in whys.items() if why}
        wrong += [f"{kind}: {name}: {why}" for name, why in failed.items()]
        tried += len(whys)
        print(f"| {kind} | {len(whys)} | {len(whys) - len(failed)} | {promised} | {time.monotonic() - start:.1f} |", flush=True)
    print(f"\n{tried} cases, {tried - len(wrong)} held (seed {args.seed}).")
    for line in wrong:
        print(line, file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
