"""How often the report would call two models different that are not.

    python -m benchmarks.statistics

Pairs of models are drawn that are the same model twice: each image has a difficulty, and both models are right on it with the
same probability. Each way to decide is asked 1,000 times whether the two differ; at 0.05 it may say so 50 times. The last row is
about all pairs of ten such models, corrected for their number: how often is any of the 45 called different?
"""

import argparse
import itertools

import numpy as np

from pipeline.report import pairs

ENTRIES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| way to decide, at 0.05 |" + "".join(f" {n:,} images |" for n in args.images))
    print("| --- |" + " ---: |" * len(args.images))
    columns = [false_alarms(n, args.pairs, args.seed) for n in args.images]
    for name in columns[0]:
        print(f"| {name} |" + "".join(f" {column[name]:.1%} |" for column in columns))
    print(f"\n{args.pairs:,} pairs of the same model twice, seed {args.seed}; accuracies between 60 and 95 %.")


def false_alarms(images: int, count: int, seed: int) -> dict[str, float]:
    """The share of `count` draws in which each way to decide sees a difference."""
    random = np.random.default_rng(seed)
    alarms = {
        "McNemar, mid-p": 0,
        "95 % interval (Bonett and Price)": 0,
        "bootstrap over images": 0,
        f"all pairs of {ENTRIES}": 0,
    }
    for _ in range(count):
        ease = random.beta(2, random.uniform(0.1, 1.3), images)
        models = random.random((ENTRIES, images)) < ease
        pair = pairs.compare(models[0], models[1])
        low, high = pairs.bootstrap([pair], random)
        every = [pairs.compare(a, b).p for a, b in itertools.combinations(models, 2)]
        seen = (pair.p < pairs.ALPHA, pair.difference.is_clear, low > 0 or high < 0, min(pairs.holm(every)) < pairs.ALPHA)
        alarms = {name: n + was for (name, n), was in zip(alarms.items(), seen, strict=True)}
    return {name: n / count for name, n in alarms.items()}


if __name__ == "__main__":
    main()
