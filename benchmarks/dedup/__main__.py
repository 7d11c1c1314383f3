"""The leak check beside its peers: python -m benchmarks.dedup quality|logos|speed --images PHOTOGRAPHS.tar (uncompressed)."""

import argparse
from pathlib import Path

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from benchmarks.dedup import quality, speed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dedup", description=__doc__)
    parser.add_argument("what", choices=["quality", "logos", "speed"])
    parser.add_argument("--images", type=Path, required=True, help="an uncompressed tar of photographs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gallery", type=int, nargs="+", default=[100], help="images of the gallery; several for speed")
    parser.add_argument("--count", type=int, default=100, help="copies per family, photographs of logos, pool images of speed")
    args = parser.parse_args()
    with threadpool_limits(1):
        if args.what == "quality":
            print(quality.recall(args.images, args.gallery[0], args.count, args.seed))
        elif args.what == "logos":
            print(quality.logos(args.images, args.count, args.seed))
        else:
            print(speed.measure(args.images, args.gallery, args.count, args.seed))


if __name__ == "__main__":
    main()
