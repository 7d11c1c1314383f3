"""Whether `forecast` chooses a good k: the accuracy of students by k, on built-in scenes, beside the purity that it expected.

    python -m benchmarks.choice --seed 11 --labelled 60 --own 1500 --foreign 2500 --k 50 100 200 350 --out .scratch/choice/a

Small networks at 32 px and 200 steps of 64 images for every student; `kd` learns from the labelled images alone. No leaks and no
broken files are drawn, so the pool is not searched. What lies in `--out` from a run that was killed is not made again.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.purity import from_table
from pipeline.advice import answers, forecast
from pipeline.harness.job import Job
from pipeline.harness.journal import Journal
from pipeline.harness.machine import Machine
from pipeline.report import purity
from pipeline.stages import distil, draw, prepare, score, select, teach
from pipeline.store import manifest, scores

INPUT = {"size": 32, "canvas": 48, "crop": 0.875}
VIEW = {"kind": "crop", "scale": [0.5, 1.0], "brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
TEACHER = {"steps": 250, "batch": 64, "lr": 0.1, "weight_decay": 5e-3, "warmup": 0.1}
STUDENT = {"steps": 200, "batch": 64, "lr": 0.1, "weight_decay": 2e-3, "warmup": 0.1}
SCRATCH = Path("data/scratch")


def network(width: int) -> dict[str, Any]:
    return {"arch": "resnet8", "options": {"width": width, "shortcut": "B", "stem_stride": 2}, "input": INPUT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labelled", type=int, default=60, help="of each class, a third of which is held out")
    parser.add_argument("--own", type=int, default=1_500, help="images of the pool that belong to a class")
    parser.add_argument("--foreign", type=int, default=2_500, help="images of the pool that do not")
    parser.add_argument("--k", type=int, nargs="+", default=[50, 100, 200, 350])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    data, machine = args.out, Machine(threads=1)
    made(args, machine)
    pool, val = (manifest.read(data / name) for name in ("pool", "val"))
    scored = scores.open_scores(data / "score")
    said, (asked, is_right) = forecast.of_scores(scored), purity.held_out(scored)
    estimate = purity.estimate(said, asked, is_right, len(scored.classes))
    truth = from_table(data / "truth" / "truth.parquet", pool.table["id"].to_pylist(), scored.classes)
    expected = forecast.selections(said, estimate.pure, len(scored.classes), args.k)
    true = forecast.selections(said, (truth == said.first).astype(float), len(scored.classes), args.k)
    print("| learned from | expected purity % | true purity % | val top-1 % |\n| --- | ---: | ---: | ---: |")
    for name, model in (("labels (the teacher)", "teacher"), ("kd", "kd")):
        print(f"| {name} | | | {accuracy(data / model, val, machine):.1f} |")
    for e, t in zip(expected, true, strict=True):
        top1 = accuracy(data / f"k{e.k}", val, machine)
        print(f"| the {e.k} surest | {100 * e.purity:.0f} | {100 * t.purity:.0f} | {top1:.1f} |")
    labelled = max(1, round(len(manifest.read(data / "train")) / len(scored.classes)))
    at, verdict = forecast.chosen(expected, labelled, float(is_right.mean()))
    print(f"\nThe forecast: k = {at.k}, {verdict}.")


def made(args: argparse.Namespace, machine: Machine) -> None:
    """Draw, prepare, teach, score, select and distil, each where it is not there yet."""
    data: Path = args.out

    def job(name: str) -> Job:
        return Job(args.seed, data / "work" / name, Journal(), machine)

    if not (data / "draw").exists():
        sizes = {"in_class": args.own, "out_of_class": args.foreign, "leaks": 0, "broken": 0}
        params = draw.Draw(seed=args.seed, labelled=args.labelled, val=100, **sizes)
        draw.run(params, out=data / "draw", truth_out=data / "truth", machine=machine)
    if not (data / "quarantine").exists():
        sources = {name: [{"kind": "tar", "path": f"{name}*.tar"}] for name in ("labelled", "val", "pool")}
        split = prepare.Prepare.model_validate({"root": str(data / "draw"), "holdout": 0.3334, **sources})
        outs = {f"{name}_out": data / name for name in ("train", "holdout", "val", "pool", "quarantine")}
        prepare.run(split, root=data / "draw", machine=machine, **outs)
    sets = {"train": data / "train", "holdout": data / "holdout", "init": SCRATCH}
    if not (data / "teacher").exists():
        taught = teach.Teach.model_validate({"init": "-", "model": network(32), "view": VIEW, "training": TEACHER})
        teach.run(taught, **sets, out=data / "teacher", job=job("teacher"))
    if not (data / "score").exists():
        places = {name: data / name for name in ("pool", "train", "holdout", "teacher")} | {"out": data / "score"}
        score.run(score.Score(teacher="-"), **places, workdir=data / "work" / "score", machine=machine)
    chosen = {"kd": data / "train"} | {f"k{k}": data / "select" / str(k) for k in args.k}
    for name, images in chosen.items():
        if not images.exists():
            top = select.Select(scores="-", rule="top", k=int(name[1:]))
            places = {"scores": data / "score", "pool": data / "pool", "out": images}
            select.run(top, **places, seed=args.seed, workdir=data / "work" / name, machine=machine)
        if not (data / name).exists():
            named = {"init": "-", "teacher": "-", "images": "-", "model": network(16), "view": VIEW, "training": STUDENT}
            student = distil.Distil.model_validate(named)
            distil.run(student, **sets, teacher=data / "teacher", chosen=images, out=data / name, job=job(name))


def accuracy(model: Path, val: manifest.Manifest, machine: Machine) -> float:
    """In percent."""
    logits = answers.logits(model, val.classes, val, machine, model.name)
    return 100 * float(np.mean(logits.argmax(1) == val.labels()))


if __name__ == "__main__":
    main()
