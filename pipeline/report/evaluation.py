"""The schema of an evaluation: evaluation.json, as `evaluate` writes it and all others read it."""

from pydantic import BaseModel


class Model(BaseModel):
    """`macs`: multiply-accumulates of a prediction. `exit`: which part of a network with several exits answers."""

    arch: str
    parameters: int
    macs: int | None
    input: int
    exit: int | str | None = None


class Training(BaseModel):
    """How the model came about. `labelled` counts the images whose labels were read, by it or by its teacher; `macs` the
    multiply-accumulates of its training and of those it started from."""

    stage: str | None
    entry: str | None
    init: str | None
    teacher: str | None
    steps: int
    batch: int
    labelled: int
    unlabelled: int
    note: str | None
    macs: int | None = None


class Measured(BaseModel):
    """Shares lie in 0..1; `top1_low` and `top1_high` are the 95 % interval; `nll` is in nats.

    `reliability`: for each bin of confidence the number of images, their mean confidence and their accuracy.
    """

    n: int
    top1: float
    top1_low: float
    top1_high: float
    top5: float
    nll: float
    ece: float
    per_class: dict[str, float]
    reliability: list[tuple[int, float, float]] = []


class Way(BaseModel):
    """A way to use a network with several exits: one of them by its number, their `ensemble`, or `early`."""

    exit: str
    parameters: int
    macs: int
    holdout_top1: float
    val_top1: float


class Point(BaseModel):
    """Early exits at a threshold of confidence; `macs` is the mean over the validation images."""

    threshold: float
    macs: int
    holdout_top1: float
    val_top1: float


class Exits(BaseModel):
    """`threshold` was chosen on the held-out images; `leaving` is the share of the validation images that leaves at each exit."""

    rows: list[Way]
    threshold: float
    leaving: list[float]
    curve: list[Point]


class Corruptions(BaseModel):
    """Top-1 accuracy by corruption, at each of the severities."""

    severities: list[int]
    holdout: dict[str, list[float]]
    val: dict[str, list[float]]


class Speed(BaseModel):
    """Measured on one machine; `images_per_second` of the `whole` network, or of each way to use one with exits."""

    device: str
    dtype: str
    threads: int
    batch: int
    images_per_second: dict[str, float]


class Evaluation(BaseModel):
    """evaluation.json, as `evaluate` writes it."""

    model: Model
    training: Training
    val: Measured
    holdout: Measured
    exits: Exits | None = None
    corruptions: Corruptions | None = None
    speed: Speed | None = None
