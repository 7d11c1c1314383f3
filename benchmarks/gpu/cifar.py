"""The piece `cifar`: accuracy on CIFAR-10 with all of its training labels, and with 4,000 of them on the network of USB."""

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
from pipeline.learning import views
from pipeline.learning.loop import fit, optimisers
from pipeline.models import architectures, inputs, network, prediction
from pipeline.store.decode import decode

TARS = {"train": "cifar10-train-*.tar", "val": "cifar10-val-*.tar"}
INPUT = inputs.Input(size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


class Plan(NamedTuple):
    """A network and its training on so many labels of each class (0: all)."""

    arch: str
    options: dict[str, Any]
    per_class: int
    passes: int
    view: views.View
    training: dict[str, Any]


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
PLANS = {"airbench, all labels": AIRBENCH, "wrn28_2, 4,000 labels": WRN}


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
    return {
        f"{name.replace(',', '').replace(' ', '-')}-{seed}": partial(_cifar, name, seed, setting)
        for name in PLANS
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

    def loss(model: torch.nn.Module, batch: views.Batch) -> Tensor:
        setting.go_on()
        answered = model(inputs.normalise(batch.views, INPUT)).float()
        return F.cross_entropy(answered, wanted[torch.from_numpy(batch.rows).to(on.device)], label_smoothing=training.smoothing)

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
