"""Hand a model over to people without winnow: safetensors in timm's layout, ONNX, torch.export, a card and an example."""

import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.harness import stage
from pipeline.harness.machine import Machine
from pipeline.models import architectures, checkpoint, inputs, network
from pipeline.report import handover
from pipeline.report.evaluation import of_model, read_predictions
from pipeline.report.handover import CALIBRATION, CARD, EXAMPLE, plain, template
from pipeline.store import artifact, manifest
from pipeline.store.decode import FORMATS
from pipeline.store.params import MadeEvaluation, MadeModel, Section

BATCHES = (1, 3)  # whose logits are compared: any number of images must do
TOLERANCE = 1e-3  # of the largest logit
SAMPLE = 64  # validation images whose answers are compared
ONNX, PROGRAM = "model.onnx", "model.pt2"


class Export(Section):
    """What is handed over."""

    model: MadeModel
    """The model directory to hand over."""
    evaluation: MadeEvaluation
    """The measurement that the card quotes: an entry of `evaluate`, of the same exit."""
    exit: PositiveInt | None = None
    """The exit to end at, of a network with exits; null: the deepest."""
    name: str = "student"
    """The model's name on the card."""
    licence: str | None = None
    """The licence on the card: an SPDX identifier; null: none is stated."""


class Classifier(nn.Module):
    """From pixels to logits: (B, 3, S, S) of 0..255, RGB -> (B, C), with the normalisation inside."""

    mean: Tensor
    scale: Tensor

    def __init__(self, model: nn.Module, input_spec: inputs.Input) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", 255 * torch.tensor(input_spec.mean).view(1, 3, 1, 1))
        self.register_buffer("scale", 1 / (255 * torch.tensor(input_spec.std).view(1, 3, 1, 1)))

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.model((pixels - self.mean) * self.scale)
        return logits


Logits = Callable[[Tensor], Tensor]
"""(B, 3, S, S) pixels -> (B, C)."""


def run(params: Export, *, model: Path, evaluation: Path, val: Path, out: Path, machine: Machine) -> stage.Metrics:
    """Write a folder that stands alone, and that winnow reads as a model directory too.

    `model.onnx` and `model.pt2` take `pixels`, (B, 3, S, S) float32 of 0..255 in RGB, and give `logits`, (B, C). `config.json`
    stands beside `model.safetensors` where timm has the architecture, so that `timm.create_model("local-dir:...")` loads it.
    `example.py` classifies image files with onnxruntime, with winnow's decoding and canvas. `calibration.json` has the
    temperature that `evaluation` fitted on the held-out images, if it did: what logits are divided by before the softmax. Raises
    UserError if `evaluation` is of another model, if a written file gives other logits than torch, or if a written file or the
    example does not give the answers of `evaluation` on images of `val`.
    """
    classes = checkpoint.describe(model).classes
    classifier, description, input_spec = network.load(model, classes, params.exit)
    measured = of_model(evaluation, {artifact.identity(model)}, str(model), params.exit, input_spec.size)
    temperature = measured.calibration.temperature if measured.calibration else None
    whole = Classifier(classifier, input_spec).eval()
    with artifact.writing(out) as tmp:
        checkpoint.save(tmp, classifier, description, json.loads((model / checkpoint.HISTORY).read_text()))
        known_to_timm = _timm_config(tmp, classifier, description, input_spec)
        written = {ONNX: _onnx(tmp / ONNX, whole, input_spec.size), PROGRAM: _program(tmp / PROGRAM, whole, input_spec.size)}
        gaps = {name: _gap(whole, input_spec.size, logits, name) for name, logits in written.items()}
        facts = {"description": description, "input_spec": input_spec, "formats": ("JPEG", *FORMATS), "temperature": temperature}
        (tmp / EXAMPLE).write_text(template(EXAMPLE).render(facts), encoding="utf-8")
        if measured.calibration:
            (tmp / CALIBRATION).write_text(json.dumps(measured.calibration.model_dump(), indent=1) + "\n")
        images = manifest.read(val)
        images = images.take(np.unique(np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).round().astype(int)))
        ties = _compare(images, evaluation, whole, written, tmp / EXAMPLE, input_spec, machine)
        facts |= {
            "params": params,
            "parameters": architectures.parameters_of(classifier),
            "macs": architectures.macs(classifier, input_spec.size),
            "val": measured.val,
            "held_out": measured.holdout.n,
            "calibration": measured.calibration,
            "training": measured.training,
            "timm": known_to_timm,
            "compared": len(images),
            "ties": ties,
        }
        (tmp / CARD).write_text(template(CARD, plain).render(facts), encoding="utf-8")
        size = (tmp / checkpoint.WEIGHTS).stat().st_size
    return {
        "parameters": facts["parameters"],
        "bytes": size,
        "onnx_gap": gaps[ONNX],
        "program_gap": gaps[PROGRAM],
        "compared": len(images),
        "ties": ties,
    }


def _timm_config(folder: Path, model: nn.Module, description: checkpoint.Description, input_spec: inputs.Input) -> bool:
    """Write timm's config.json if timm can make this network by itself; whether it can."""
    import timm

    if not timm.is_model(description.arch) or description.projection is not None or not hasattr(model, "pretrained_cfg"):
        return False
    timm.models._hub.save_config_for_hf(
        model,
        str(folder / "config.json"),
        {"label_names": list(description.classes)},
        model_args=dict(description.options),
        data_config={
            "input_size": (3, input_spec.size, input_spec.size),
            "mean": input_spec.mean,
            "std": input_spec.std,
            "crop_pct": input_spec.crop,
            "interpolation": "bicubic",
        },
    )
    return True


def _onnx(file: Path, classifier: nn.Module, size: int) -> Logits:
    """Write the model; returns what onnxruntime makes of the file."""
    import onnxruntime

    with warnings.catch_warnings():  # of the exporter's own making
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            classifier,
            (torch.zeros(2, 3, size, size),),
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(file, external_data=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


def _program(file: Path, classifier: nn.Module, size: int) -> Logits:
    """Write the program of torch.export; returns the file loaded again."""
    shapes = ({0: torch.export.Dim("batch")},)
    buffer = io.BytesIO()  # torch's own writer calls a full disk an "unexpected pos"
    torch.export.save(torch.export.export(classifier, (torch.zeros(2, 3, size, size),), dynamic_shapes=shapes), buffer)
    file.write_bytes(buffer.getvalue())
    return torch.export.load(file).module()


@torch.no_grad()
def _gap(classifier: nn.Module, size: int, other: Logits, name: str) -> float:
    """The largest difference of a logit from the classifier's, over its largest logit. Raises UserError above TOLERANCE."""
    random = np.random.default_rng(0)
    gap = 0.0
    for batch in BATCHES:
        pixels = torch.from_numpy(random.uniform(0, 255, (batch, 3, size, size)).astype(np.float32))
        expected = classifier(pixels)
        gap = max(gap, float((other(pixels) - expected).abs().max() / expected.abs().max()))
    if not gap <= TOLERANCE:
        raise UserError(f"{name} gives other logits than the model: they differ by {gap:.2g} of the largest one.")
    return gap


@torch.no_grad()
def _compare(
    images: manifest.Manifest,
    evaluation: Path,
    classifier: nn.Module,
    written: dict[str, Logits],
    example: Path,
    input_spec: inputs.Input,
    machine: Machine,
) -> int:
    """Compare the answers of the written files and of the example on `images` with those of the evaluation.

    Returns for how many images there was another answer with a logit within TOLERANCE of the evaluation's answer: rounding
    decides such a tie. Raises UserError for any other difference.
    """
    table = read_predictions(evaluation)
    known = dict(zip(table["id"].to_pylist(), table["predicted"].to_pylist(), strict=True))
    ids = images.table["id"].to_pylist()
    if unknown := [name for name in ids if name not in known]:
        raise UserError(f"{evaluation} has no answer for the validation image {unknown[0]}: it was measured on other images.")
    canvases = inputs.load(images, input_spec.side, machine, "val").gather(np.arange(len(images)))
    pixels = inputs.centre(canvases, input_spec.size).float().contiguous()
    logits = classifier(pixels)
    near = TOLERANCE * logits.abs().amax(1)
    answers = {name: other(pixels).argmax(1).tolist() for name, other in written.items()}
    answers[EXAMPLE] = handover.answers(example, images)
    ties = set()
    for name, given in answers.items():
        for row, (image, answer) in enumerate(zip(ids, given, strict=True)):
            expected = known[image]
            if answer == expected:
                continue
            if (logits[row, answer] - logits[row, expected]).abs() > near[row]:
                raise UserError(
                    f"{name} does not give the evaluation's answer for {image}: it says {images.classes[answer]}, and "
                    f"{evaluation} {images.classes[expected]}. The card would promise what the files do not hold."
                )
            ties.add(row)
    return len(ties)


if __name__ == "__main__":
    stage.main(run)
