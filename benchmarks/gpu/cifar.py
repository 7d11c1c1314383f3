"""The piece `cifar`: accuracy on CIFAR-10 with all of its training labels, with 4,000 of them on the network of USB, and of a
ResNet-20 with and without a ResNet-56 to learn from (published: 91.9 % and 93.1 %)."""

import sys
import tarfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.setting import Row, Rows, Setting
from pipeline.errors import UserError
from pipeline.learning import losses, views
from pipeline.learning.loop import fit, optimisers
from pipeline.models import architectures, inputs, network, prediction
from pipeline.models.device import Device
from pipeline.store.decode import decode

TEACHER = "teachers/cifar10-resnet56-*.th"
TARS = {"train": "cifar10-train-*.tar", "val": "cifar10-val-*.tar"}
INPUT = inputs.Input(size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


class Plan(NamedTuple):
    """A network and its training on so many labels of each class (0: all).

    `distilled`: 0.9 KL to the teacher's answers at a temperature of 4, and 0.1 cross entropy of the labels (Hinton et al. 2015).
    """

    arch: str
    options: dict[str, Any]
    per_class: int
    passes: int
    view: views.View
    training: dict[str, Any]
    distilled: bool = False


AIRBENCH = Plan(
    *("airbench", {"widths": [64, 256, 256]}, 0, 10, views.View(pad=2, flip="alternating")),
    {
        "batch": 1024,
        "lr": 1.5,
        "momentum": 0.85,
        "weight_decay": 2e-3 / 1.5,
        "bias_rate": 64,
        "warmup": 0.23,
        "schedule": "linear",
        "smoothing": 0.2,
    },
)
WRN = Plan(
    *("wrn28_2", {}, 400, 640, views.View(), {"batch": 512, "lr": 0.2, "weight_decay": 5e-4})  # 5,000 steps
)
RESNET = Plan("resnet20", {}, 0, 200, views.View(), {"batch": 512, "lr": 0.4, "weight_decay": 5e-4})
PLANS = {
    "airbench, all labels": AIRBENCH,
    "wrn28_2, 4,000 labels": WRN,
    "resnet20, all labels": RESNET,
    "resnet20, all labels, distilled": RESNET._replace(distilled=True),
}
KD = losses.SoftLoss(name="kl", temperature=4.0, weight=0.9)


class Images(NamedTuple):
    """(N, 32, 32, 3) uint8, (N,) int64 and the classes' names."""

    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    kind: str  # of the files: png, or jpg, whose pixels are not the published ones


def cifar(setting: Setting) -> Rows | None:
    """None, with a word on stderr, where there are no images."""
    if setting.data is None:
        tars = " and ".join(TARS.values())
        print(f"cifar: skipped. It needs --data FOLDER with {tars} (python -m benchmarks.data)", file=sys.stderr)
        return None
    for pattern in TARS.values():
        if not any(setting.data.glob(pattern)):
            command = f"python -m benchmarks.data cifar10 --root {setting.data}"
            raise UserError(f"{setting.data} has no {pattern}: `{command}` writes it.")
    if not (taught := any(setting.data.glob(TEACHER))):
        print(f"cifar: the distilled rows are skipped. They need {setting.data / TEACHER} (docs/data.md)", file=sys.stderr)
    return {
        f"{name.replace(',', '').replace(' ', '-')}-{seed}": partial(_cifar, name, seed, setting)
        for name, plan in PLANS.items()
        if taught or not plan.distilled
        for seed in range(1 if setting.tiny else 3)
    }


def _cifar(name: str, seed: int, setting: Setting, folder: Path) -> Row:
    """Trained on the training images, measured once on the test images, as they are and averaged with their mirror images."""
    assert setting.data is not None
    plan, on = PLANS[name], setting.on
    train, val = (read(setting.data, TARS[part], 100 if setting.tiny else 0) for part in ("train", "val"))
    if train.classes != val.classes:
        raise UserError(f"the tars in {setting.data} hold other classes to train on ({train.classes}) than to measure on.")
    if plan.per_class and not setting.tiny:
        train = drawn(train, plan.per_class, seed)
    tiny = {"batch": 4} if setting.tiny else {}
    passes = 1 if setting.tiny else plan.passes
    given = {**plan.training, **tiny}
    training = optimisers.Training(steps=passes * len(train.labels) // given["batch"], **given)
    torch.manual_seed(seed)
    options = {"widths": [8, 8, 8]} if setting.tiny and plan.arch == "airbench" else plan.options
    model = architectures.create(plan.arch, len(train.classes), options)
    pixels, measured_on = inputs.InMemory(train.pixels), inputs.InMemory(val.pixels)
    network.whiten(model, pixels, INPUT, seed)
    wanted = torch.from_numpy(train.labels).to(on.device)
    teacher = teacher_of(setting.data, train.classes, on) if plan.distilled else None

    def loss(model: torch.nn.Module, batch: views.Batch) -> Tensor:
        setting.go_on()
        answered = model(inputs.normalise(batch.views, INPUT)).float()
        labels = wanted[torch.from_numpy(batch.rows).to(on.device)]
        supervised = F.cross_entropy(answered, labels, label_smoothing=training.smoothing)
        if teacher is None:
            return supervised
        with torch.no_grad():
            said = prediction.forward(teacher, batch.views, INPUT, on)
        return (1 - KD.weight) * supervised + KD(answered, said)

    trained = fit.fit(
        *(model, loss, pixels, views.viewer(32, plan.view, seed), training, lambda _: {}),
        job=setting.job(seed, folder),
        device=on,
        label=name,
    )
    check = prediction.checker(measured_on, val.labels, INPUT, setting.precise("float32"))
    return {
        "network": name,
        "seed": seed,
        "labels": len(train.labels),
        "images": train.kind,
        "steps": training.steps,
        "batch": training.batch,
        "parameters": architectures.parameters_of(model),
        "test top-1 %": check(trained.model)["top1"],
        "with mirror images, %": check(prediction.Mirrored(trained.model))["top1"],
    }


def teacher_of(data: Path, classes: tuple[str, ...], on: Device) -> torch.nn.Module:
    """The published ResNet-56, whose classifier has the classes in the order of their names."""
    wanted = network.Network(arch="resnet56", input=INPUT, source_classes="train")
    model, _ = network.start(wanted, next(data.glob(TEACHER)), classes, 0)
    return prediction.folded(on.place(model.eval().requires_grad_(False)))


def read(folder: Path, pattern: str, first: int = 0) -> Images:
    """All images of tars of `<class>/<file>`, in the order of their names; `first`: at most so many (0: all).

    Raises UserError for another layout, another size, or a tar that cannot be read.
    """
    found = {}
    for file in sorted(folder.glob(pattern)):
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    if member.isfile() and (data := tar.extractfile(member)):
                        found[member.name.removeprefix("./")] = data.read()
        except tarfile.TarError as error:
            raise UserError(f"{file} cannot be read as an uncompressed tar ({error}): write it anew.") from None
    names = sorted(found)
    if first:
        names = names[:: max(1, len(names) // first)][:first]
    if bad := next((name for name in names if name.count("/") != 1), None):
        raise UserError(f"{folder / pattern}: members must be <class>/<file>, but one is {bad}.")
    images = [decode(found[name]) for name in names]
    if bad := next((n for n, image in zip(names, images, strict=True) if image.shape != (32, 32, 3)), None):
        raise UserError(f"{folder / pattern}: {bad} is not an image of 32 x 32 pixels.")
    classes = tuple(sorted({name.split("/")[0] for name in found}))
    labels = np.array([classes.index(name.split("/")[0]) for name in names])
    return Images(np.stack(images), labels, classes, "/".join(sorted({name.rpartition(".")[2] for name in names})))


def drawn(images: Images, per_class: int, seed: int) -> Images:
    """So many images of each class. Raises UserError if a class has fewer."""
    random, rows = np.random.default_rng(seed), []
    for number, name in enumerate(images.classes):
        own = np.flatnonzero(images.labels == number)
        if len(own) < per_class:
            raise UserError(f"the class {name} has {len(own)} images, and {per_class} of each are wanted.")
        rows.append(random.choice(own, per_class, replace=False))
    kept = np.sort(np.concatenate(rows))
    return images._replace(pixels=images.pixels[kept], labels=images.labels[kept])
