"""Evaluations and comparisons as their stages write them, of invented figures."""

from typing import Any

from pipeline.report.comparison import Compared
from pipeline.report.evaluation import Evaluation, Measured, Model, TrainingFacts


def measured(top1: float, **figures: Any) -> Measured:
    known = {"n": 90, "top1_low": top1 - 0.1, "top1_high": top1 + 0.1, "top5": 1.0, "nll": 0.9, "ece": 0.1, "per_class": {}}
    return Measured(**{**known, "top1": top1, **figures})


def evaluated(val: float = 0.5, holdout: float = 0.5, exit: int | None = None) -> Evaluation:
    classes = {"ant": 0.25, "bee": 0.5, "cat": 0.75}
    return Evaluation(
        role="candidate",
        model=Model(arch="resnet8", parameters=78_042, macs=12_281_088, input=32, exit=exit),
        training=TrainingFacts(
            stage="distil", entry="ssld", init="scratch", teacher="teach/big",
            steps=400, batch=256, labelled=5000, unlabelled=20000, note="a remark",
        ),
        val=measured(val, per_class=classes),
        holdout=measured(holdout),
    )  # fmt: skip


def compared(holdout: float) -> Compared:
    beside = dict.fromkeys(("delta", "delta_low", "delta_high", "agreement")) | {"history": {"train": [], "holdout": []}}
    return Compared.model_validate({**dict(evaluated(holdout=holdout)), **beside})
