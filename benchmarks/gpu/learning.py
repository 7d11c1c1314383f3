"""The pieces `precision` and `large-batch`: trainings on small images that the benchmark draws, which can be learned in part."""

import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu import synthetic
from benchmarks.gpu.setting import Row, Rows, Setting
from pipeline.harness.job import Job
from pipeline.learning import views
from pipeline.learning.loop import fit, optimisers
from pipeline.learning.loop.trained import Trained
from pipeline.models import architectures, inputs, network, prediction
from pipeline.models.device import Device

VIEW = views.View(pad=1, flip=False)  # mirrored patterns would be another class's as soon as their own


class Small(NamedTuple):
    """A small network, and how it is taught."""

    arch: str
    options: dict[str, Any]
    training: dict[str, Any]


AIRBENCH = {"momentum": 0.85, "lr": 1.5, "weight_decay": 2e-3 / 1.5, "bias_rate": 64, "warmup": 0.23, "schedule": "linear"}
NETWORKS = [Small("airbench", {}, {**AIRBENCH, "smoothing": 0.2}), Small("resnet18_3x3", {}, {"lr": 0.1})]
TINY = [Small("airbench", {"widths": [8, 8, 8]}, {**AIRBENCH, "smoothing": 0.2}), Small("resnet8", {"width": 4}, {"lr": 0.05})]
BATCHES, TINY_BATCHES = (1024, 2048, 4096), (16, 32)


def taught(
    small: Small,
    plan: optimisers.Training,
    setting: Setting,
    *,
    images: int,
    job: Job,
    on: Device,
    each_step: Callable[[], None] = lambda: None,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Trained:
    """Train a small network on so many drawn images; it is measured on 4,096 others (64 in tiny).

    `each_step` is called at the beginning of each step, `wrap` once, with the network as it starts.
    """
    pixels, labels = images_to(images, job.seed)
    held_out = images_to(64 if setting.tiny else 4096, -1)
    torch.manual_seed(job.seed)
    model = architectures.create(small.arch, synthetic.CLASSES, small.options)
    network.whiten(model, pixels, synthetic.LEARNED, job.seed)
    wanted = torch.from_numpy(labels).to(on.device)

    def loss(model: nn.Module, batch: views.Batch) -> Tensor:
        each_step()
        answered = model(inputs.normalise(batch.views, synthetic.LEARNED)).float()
        y = wanted[torch.from_numpy(batch.rows).to(on.device)]
        return F.cross_entropy(answered, y, label_smoothing=plan.smoothing)

    check = prediction.checker(*held_out, synthetic.LEARNED, on)
    viewer = views.viewer(32, VIEW, job.seed)
    return fit.fit(wrap(model), loss, pixels, viewer, plan, check, job=job, device=on, label=small.arch)


def images_to(count: int, seed: int) -> tuple[inputs.InMemory, np.ndarray]:
    """Drawn images in memory, and their labels; others for each seed (-1: to measure on)."""
    images, labels = synthetic.learnable(count, seed + 1)
    return inputs.InMemory(images), labels


def precision(setting: Setting) -> Rows:
    seeds = range(1 if setting.tiny else 3)
    networks = TINY if setting.tiny else NETWORKS
    each = itertools.product(networks, seeds)
    return {f"{small.arch}-{seed}": partial(_precision, small, seed, setting) for small, seed in each}


def _precision(small: Small, seed: int, setting: Setting, folder: Path) -> Row:
    """One network trained in both precisions; and what bfloat16 does to the answers of the one trained in float32."""
    steps, batch, images = (4, 16, 128) if setting.tiny else (300, 512, 16384)
    plan = optimisers.Training(steps=steps, batch=batch, **small.training)
    row: Row = {"network": small.arch, "seed": seed, "steps": steps, "batch": batch}
    trained = {}
    for name in ("float32", "bfloat16"):
        on, job = setting.precise(name), setting.job(seed, folder / name)
        trained[name] = taught(small, plan, setting, images=images, job=job, on=on, each_step=setting.go_on)
        row[f"{name}, top-1 %"] = trained[name].measured["top1"]
        row[f"{name}, loss"] = trained[name].history["train"][-1]["loss"]
    pixels, _ = images_to(64 if setting.tiny else 4096, -1)
    exact, rounded = (_logits(trained["float32"].model, pixels, setting.precise(name)) for name in ("float32", "bfloat16"))
    return row | {
        "largest difference of a logit": float((exact - rounded).abs().max()),
        "spread of the logits": float(exact.std()),
        "same answer, %": float((exact.argmax(1) == rounded.argmax(1)).double().mean()),
    }


def _logits(model: nn.Module, pixels: inputs.Pixels, on: Device) -> Tensor:
    return torch.cat([part for _, part in prediction.logits(model, pixels, synthetic.LEARNED, on)])


def large_batch(setting: Setting) -> Rows:
    batches = TINY_BATCHES if setting.tiny else BATCHES
    rows = {}
    for small in TINY if setting.tiny else NETWORKS:
        rows[f"{small.arch}-sgd"] = partial(_large_batch, small, batches[0], small.training, setting)
        for batch in batches:
            lars = {"optimizer": "lars", "lr": 0.075, "lr_scaling": "sqrt", "weight_decay": 1e-4, "warmup": 0.1}
            lars["smoothing"] = small.training.get("smoothing", 0.0)
            rows[f"{small.arch}-{batch}"] = partial(_large_batch, small, batch, lars, setting)
    return rows


def _large_batch(small: Small, batch: int, given: dict[str, Any], setting: Setting, folder: Path) -> Row:
    """The same number of images at each batch; the first tenth of the steps is not in the rate."""
    passes, images = (2, 128) if setting.tiny else (12, 40960)
    plan = optimisers.Training(steps=passes * images // batch, batch=batch, **given)
    begun: list[float] = []

    def each_step() -> None:
        setting.go_on()
        if len(begun) == plan.steps // 10:
            setting.wait()
        begun.append(time.perf_counter())

    setting.peak_gb()
    trained = taught(small, plan, setting, images=images, job=setting.job(0, folder), on=setting.on, each_step=each_step)
    setting.wait()
    counted = begun[min(plan.steps // 10, len(begun) - 1) :]  # fewer steps where this call went on with a training
    return {
        "network": small.arch,
        "optimizer": plan.optimizer,
        "batch": batch,
        "steps": plan.steps,
        "images/s": batch * len(counted) / (time.perf_counter() - counted[0]),
        "peak memory, GB": setting.peak_gb(),
        "loss, ten times": [row["loss"] for row in trained.history["train"]],
        "top-1 %": trained.measured["top1"],
    }
