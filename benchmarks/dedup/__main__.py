"""The leak check measured: python -m benchmarks.dedup quality|copies|layouts|logos|speed --images PHOTOGRAPHS.tar (uncompressed).

Only `quality` compares it with peers, and needs them installed.
"""

import argparse
from pathlib import Path

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from benchmarks.dedup import outcomes, quality, speed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dedup", description=__doc__)
    parser.add_argument("what", choices=["quality", "copies", "layouts", "logos", "speed"])
    parser.add_argument("--images", type=Path, required=True, help="an uncompressed tar of photographs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--val", type=int, nargs="+", default=[100], help="images that are searched in; several for speed")
    parser.add_argument("--count", type=int, default=100, help="copies per family, photographs of logos, pool images of speed")
    args = parser.parse_args()
    with threadpool_limits(1):
        if args.what == "quality":
            print(quality.recall(args.images, args.val[0], args.count, args.seed))
        elif args.what == "copies":
            print(outcomes.copies(args.images, args.val[0], args.seed))
        elif args.what == "layouts":
            print(outcomes.layouts(args.images, args.val[0], args.seed))
        elif args.what == "logos":
            print(quality.logos(args.images, args.count, args.seed))
        else:
            print(speed.measure(args.images, args.val, args.count, args.seed))


if __name__ == "__main__":
    main()
