"""Train a student on a teacher's soft labels only (SSLD, arXiv 2103.05959, section 3)."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline import artifact, checkpoint, device, fit, images, losses, manifest, models, network, predict, stage
from pipeline.images import View
from pipeline.params import Machine, Section


class Distil(Section):
    """`init`, `teacher` and `images` are read by dvc.yaml: what to start from, whom to learn from, which images to learn on.

    `labelled`: add the labelled images, their labels unread, to `images`. `teacher_bn`: the statistics that the teacher
    normalises with, `eval` its own or `batch` those of each batch (as SSLD's published code has it); either way its weights
    stay as they are.
    """

    init: str
    teacher: str
    images: str
    model: network.Network | None = None
    labelled: bool = True
    loss: losses.SoftLoss = losses.SoftLoss()
    teacher_bn: Literal["eval", "batch"] = "eval"
    view: View = View()
    training: fit.Training
    note: str | None = None


def run(
    params: Distil,
    *,
    train: Path,
    holdout: Path,
    init: Path,
    teacher: Path,
    chosen: Path,
    out: Path,
    seed: int,
    scratch: Path,
    journal: stage.Journal,
    machine: Machine,
) -> stage.Metrics:
    """Minimise a divergence between the teacher's and the student's class probabilities on the same view of each image.

    No label is read but the held-out ones, for the measurements. Raises TrainingError, CheckpointError, ModelError.
    """
    labelled, held_out, unlabelled = manifest.read(train), manifest.read(holdout), manifest.read(chosen)
    only_labelled = artifact.identity(chosen) == artifact.identity(train)
    seen = manifest.concat([unlabelled, labelled]) if params.labelled and not only_labelled else unlabelled
    on = device.pick(machine)
    student, description = network.start(params.model, init, labelled.classes, seed)
    student = on.place(student)
    given = images.Input.model_validate(description.input)
    expert, expert_description, expert_input = network.load(teacher, labelled.classes)
    expert = _frozen(expert, params.teacher_bn, on)
    cores = machine.cores(machine.workers)

    def divergence(model: nn.Module, batch: fit.Batch) -> Tensor:
        with torch.no_grad():
            t = predict.forward(expert, batch.views, expert_input, on)  # N, C
        return params.loss(model(images.normalise(batch.views, given)), t)

    side = max(given.side, expert_input.side)
    model, history = fit.fit(
        student,
        divergence,
        images.load(seen, side, cores, machine.memory_gb, "images"),
        images.viewer(max(given.size, expert_input.size), params.view, seed),
        params.training,
        seed=seed,
        device=on,
        scratch=scratch,
        journal=journal,
        label="distilling",
        check=(
            check := predict.checker(
                images.load(held_out, given.side, cores, machine.memory_gb, "holdout"), held_out.labels(), given, on
            )
        ),
        checkpoint_minutes=machine.checkpoint_minutes,
    )
    taught_by = expert_description.training
    described = description.trained(
        params.training.steps,
        params.training.batch,
        taught_by.get("labelled", 0),
        0 if only_labelled else len(unlabelled),
        params.note or taught_by.get("note"),
        macs=models.macs_of_training(model, given.size, (expert, expert_input.size)),
    )
    with artifact.writing(out) as tmp:
        checkpoint.save(tmp, model, described, history)
    measured = {f"holdout_{name}": value for name, value in check(model).items()}
    return {"steps": params.training.steps, "images": len(seen), "parameters": models.parameters_of(model), **measured}


def _frozen(teacher: nn.Module, statistics: str, on: device.Device) -> nn.Module:
    """The teacher for inference, in memory only: no parent's `.train()` reaches it, and nothing of it is saved."""
    teacher.eval().requires_grad_(False)
    if statistics == "eval":
        return on.place(predict.folded(teacher))
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_var = None  # torch then uses the batch's, also in eval mode
    return on.place(teacher)


if __name__ == "__main__":
    stage.main(run, parallel=True)
