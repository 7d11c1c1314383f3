"""Repeat a recipe with several seeds and print the mean and the spread of each row.

    python -m benchmarks.seeds recipes/cifar10.yaml --seeds 0 1 2 --jobs 2 --out docs/cifar10-seeds.md

Each seed runs in a folder of its own under .scratch/seeds/, with the files of the last commit and this repository's DVC cache:
what does not depend on the seed (prepare, search, dedup) runs once. A repeated command goes on where the last one stopped.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.harness.machine import processor
from pipeline.report import evaluation, pairs
from pipeline.report.evaluation import Evaluation

ROOT = Path(__file__).resolve().parent.parent
UNSEEDED = ("prepare", "search", "dedup")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("recipe", type=Path)
    args = parser.parse_args()
    start = time.monotonic()
    folders = repeat(args.recipe, args.seeds, args.jobs, args.commit)
    how = f"Seeds {', '.join(map(str, args.seeds))}; {machine()}; {time.monotonic() - start:,.0f} s in all."
    text = f"{how}\n\n{table(folders)}{exits(folders)}{differences(folders)}"
    print(text)
    if args.out:
        command = f"python -m benchmarks.seeds {args.recipe} --seeds {' '.join(map(str, args.seeds))}"
        args.out.write_text(f"`{command}`\n\n{text}")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The arguments of a benchmark that repeats a recipe, and writes what it finds as Markdown."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="seeds that run at the same time, sharing the cores")
    parser.add_argument("--commit", default="HEAD", help="the code to run")
    parser.add_argument("--out", type=Path, help="also write what is printed to this Markdown file")
    return parser


def tell(name: str, description: str | None, measure: Callable[[argparse.Namespace], str]) -> None:
    """The command `python -m benchmarks.<name>`: print what `measure` found, as Markdown below the command, the machine and the
    time, and write it to `--out`."""
    args = arguments(description).parse_args()
    start = time.monotonic()
    found = measure(args)
    command = f"python -m benchmarks.{name} --seeds {' '.join(map(str, args.seeds))}"
    text = f"`{command}`\n\n{machine()}; {time.monotonic() - start:,.0f} s in all.\n\n{found}"
    print(text)
    if args.out:
        args.out.write_text(text)


def repeat(recipe: Path, seeds: list[int], jobs: int, commit: str) -> list[Path]:
    """Run the recipe once with each seed, `jobs` at a time; returns their folders."""
    threads = max(1, usable_cores() // jobs)
    params = yaml.safe_load(recipe.read_text())
    folders = [workspace(f"seeds/{recipe.stem}-{s}", params | {"seed": s}, threads, commit) for s in seeds]
    shared = [name for name in UNSEEDED if name in params]
    reproduce(folders[0], *shared)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(reproduce, folders))
    return folders


def workspace(name: str, params: dict[str, Any], threads: int, commit: str) -> Path:
    """.scratch/<name> with the files of a commit and the given params; DVC's cache is shared."""
    folder = ROOT / ".scratch" / name
    folder.mkdir(parents=True, exist_ok=True)
    committed = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=committed, check=True)  # tarfile's filters came with Python 3.11.4
    raw = folder / "data" / "raw"
    if (ROOT / "data" / "raw").exists() and not raw.is_symlink():
        raw.symlink_to((ROOT / "data" / "raw").resolve())
    machine = {**(params.get("machine") or {}), "threads": threads}
    (folder / "params.yaml").write_text(yaml.safe_dump(params | {"machine": machine}, sort_keys=False))
    local = f'[core]\n    no_scm = true\n[cache]\n    dir = "{ROOT / ".dvc" / "cache"}"\n'
    (folder / ".dvc" / "config.local").write_text(local)
    return folder


def reproduce(folder: Path, *stages: str) -> None:
    """`dvc repro` in the workspace, its output to `log.txt` there."""
    print(f"{folder.name}: dvc repro {' '.join(stages)}; see {folder.relative_to(ROOT)}/log.txt", file=sys.stderr, flush=True)
    with (folder / "log.txt").open("a") as log:
        command = ["dvc", "--wait-for-lock", "repro", *stages]
        environment = {**os.environ, "WINNOW_TRACKING": "off"}
        status = subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if status:
        sys.exit(f"{folder.name}: dvc repro failed:\n{''.join((folder / 'log.txt').read_text().splitlines(True)[-15:])}")


def table(folders: list[Path]) -> str:
    """Markdown: a row per entry of `evaluate`, accuracies in percent as mean ± sample standard deviation over the workspaces.

    Clean val: the validation images without a copy in the pool or the labelled set, as these were left to learn from.
    """
    found = [evaluations(folder) for folder in folders]
    lines = [
        "| entry | val top-1 % | each seed | clean val % | over baseline | holdout top-1 % "
        "| labels learned | to choose | unlabelled | steps |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry, first in found[0].items():
        clean = [100 * on.top1 for f in found if (on := f[entry].clean)]
        val = [100 * f[entry].val.top1 for f in found]
        held = [100 * f[entry].holdout.top1 for f in found]
        gains = [v - 100 * f["baseline"].val.top1 for v, f in zip(val, found, strict=True)]
        training = first.training
        lines.append(
            f"| {entry} | {spread(val)} | {' / '.join(f'{v:.1f}' for v in val)} "
            f"| {spread(clean) if clean else '–'} "
            f"| {spread(gains)} | {spread(held)} "
            f"| {training.labelled:,} | {first.holdout.n:,} | {training.unlabelled:,} | {training.steps:,} |"
        )
    counts = {f"{on.n:,}" for f in found for of_entry in f.values() if (on := of_entry.clean)}
    sizes = (
        f"\nClean val has {' or '.join(sorted(counts))} of {next(iter(found[0].values())).val.n:,} images.\n" if counts else ""
    )
    return "\n".join(lines) + "\n" + sizes


def exits(folders: list[Path]) -> str:
    """Markdown: for networks with exits a row per way to use them, speeds of the first seed; empty where there are none."""
    found = [evaluations(folder) for folder in folders]
    lines = [
        "| entry | exit | val top-1 % | each seed | over baseline | MMACs an image | parameters | images/s |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: |",
    ]
    for entry, first in found[0].items():
        for i, row in enumerate(first.exits.rows if first.exits else []):
            same = [of_seed.exits.rows[i] for f in found if (of_seed := f[entry]).exits]
            val = [100 * way.val_top1 for way in same]
            gains = [v - 100 * f["baseline"].val.top1 for v, f in zip(val, found, strict=True)]
            macs = statistics.mean(way.macs for way in same) / 1e6
            speed = first.speed and first.speed.images_per_second.get(row.exit)
            lines.append(
                f"| {entry} | {row.exit} | {spread(val)} | {' / '.join(f'{v:.1f}' for v in val)} | {spread(gains)} "
                f"| {macs:.2f} | {row.parameters:,} | {f'{speed:,.0f}' if speed else ''} |"
            )
    return "\n" + "\n".join(lines) + "\n" if len(lines) > 2 else ""


def differences(folders: list[Path]) -> str:
    """Markdown: each entry against the baseline, and each candidate against each control, paired over images and seeds."""
    found = evaluations(folders[0])
    params = yaml.safe_load((folders[0] / "params.yaml").read_text())
    baseline = params["compare"]["baseline"]
    roles = {name: e.role for name, e in found.items()}
    wanted = [(entry, baseline) for entry in found if entry != baseline]
    wanted += [(a, b) for a in found for b in found if (roles[a], roles[b]) == ("candidate", "control")]
    right = [{entry: right_of(folder, entry) for entry in found} for folder in folders]
    lines = [
        "| entry | against | difference, points | 95 % interval | each seed | gained | lost |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for entry, other in wanted:
        of_seeds = [pairs.compare(of_seed[entry], of_seed[other]) for of_seed in right]
        values = [100 * pair.difference.value for pair in of_seeds]
        low, high = pairs.bootstrap(of_seeds, np.random.default_rng(0))
        gained, lost = (" / ".join(str(count) for count in counts) for counts in zip(*(p[:2] for p in of_seeds), strict=True))
        lines.append(
            f"| {entry} | {other} | {statistics.mean(values):+.1f} | {100 * low:+.1f} to {100 * high:+.1f} "
            f"| {' / '.join(f'{v:+.1f}' for v in values)} | {gained} | {lost} |"
        )
    how = f"Bootstrap over {len(folders)} seeds and their validation images; not corrected for the number of rows."
    return f"\n{how}\n\n" + "\n".join(lines) + "\n"


def right_of(folder: Path, entry: str) -> np.ndarray:
    """(N,) bool: the validation images that the entry names right."""
    predictions = evaluation.read_predictions(folder / "data" / "evaluate" / entry)
    return np.asarray(predictions["label"].to_numpy() == predictions["predicted"].to_numpy())


def evaluations(folder: Path) -> dict[str, Evaluation]:
    entries = yaml.safe_load((folder / "params.yaml").read_text())["evaluate"]
    return {e: evaluation.read(folder / "data" / "evaluate" / e) for e in entries}


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def signed(differences: list[float]) -> str:
    """`spread` with the sign of the mean."""
    return f"{'+' if statistics.mean(differences) >= 0 else ''}{spread(differences)}"


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def machine() -> str:
    """The processor's name and the number of usable cores."""
    name = processor() or platform.processor()
    return f"{usable_cores()} cores of a shared {name}"


if __name__ == "__main__":
    main()
