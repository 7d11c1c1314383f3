"""What a student's gradient loses where only the m best classes of a teacher are kept, against the whole distribution.

    python -m benchmarks.labels

Teachers have normal logits whose spread makes them soft, sure or surest; a student is a new network (logits of spread 0.1) or one
that has learned much (four fifths of the teacher's logits, and noise). The loss is `kl` in float32. Three ways to use the m best:

- `spread`: what they leave at temperature 1 is divided evenly among the others, and tempered with them;
- `mass`: the others have together what they have at T, divided evenly;
- `lumped`: the others count as one class, of teacher and student, with what they have at T.
"""

import argparse

import numpy as np
import torch
from torch import Tensor

from pipeline.learning import labels
from pipeline.learning.labels import Best
from pipeline.learning.losses import SoftLoss

SPREADS = {"soft": 2.0, "sure": 4.0, "surest": 8.0}
STUDENTS = {"new": (0.0, 0.1), "taught": (0.8, 0.5)}
WAYS = ("spread", "mass", "lumped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, default=10, help="classes that are kept; of 10 classes, 3")
    parser.add_argument("--images", type=int, default=512)
    args = parser.parse_args()
    columns = [f"{student}: {way} %" for student in STUDENTS for way in WAYS]
    print(
        f"| C | m | T | teacher (mean best p) | {' | '.join(columns)} |\n| ---: | ---: | ---: | --- |{' ---: |' * len(columns)}"
    )
    for count in (10, 100, 1000):
        m = min(args.m, count // 3)
        for temperature in (1.0, 2.0, 4.0):
            for name, spread in SPREADS.items():
                random = torch.Generator().manual_seed(0)
                teacher = spread * torch.randn(args.images, count, generator=random)
                students = (
                    share * teacher + noise * torch.randn(teacher.shape, generator=random) for share, noise in STUDENTS.values()
                )
                found = [f"{100 * error(student, teacher, m, temperature, way):.1f}" for student in students for way in WAYS]
                sure = float(teacher.softmax(1).amax(1).mean())
                print(f"| {count} | {m} | {temperature:.0f} | {name} ({sure:.2f}) | {' | '.join(found)} |")


def error(student: Tensor, teacher: Tensor, m: int, temperature: float, way: str) -> float:
    """The norm of the gradient's error over that of the gradient, of (N, C) logits."""
    true = gradient(student, teacher, temperature)
    return float((gradient(student, known(teacher, m, temperature, way), temperature) - true).norm() / true.norm())


def gradient(student: Tensor, teacher: Tensor | Best, temperature: float) -> Tensor:
    student = student.clone().requires_grad_()
    SoftLoss(name="kl", temperature=temperature)(student, teacher).backward()
    assert student.grad is not None
    return student.grad


def known(teacher: Tensor, m: int, temperature: float, way: str) -> Tensor | Best:
    """What a student is told, as `label` keeps it."""
    kept = labels.kept([teacher], m, temperature)
    classes = torch.from_numpy(kept.classes[0].astype(np.int64))
    log_p = torch.from_numpy(kept.log_p[0].astype(np.float32))
    assert kept.log_rest is not None  # m is less than all
    log_rest = torch.from_numpy(kept.log_rest[0])
    if way == "lumped":
        return Best(classes, log_p, log_rest, temperature)
    others = teacher.shape[1] - m
    each = (1 - log_p.exp().sum(1)).clamp_min(1e-9).div(others).log()
    if way == "mass":
        each = temperature * (log_rest - np.log(others))
    return each[:, None].repeat(1, teacher.shape[1]).scatter(1, classes, log_p)


if __name__ == "__main__":
    main()
