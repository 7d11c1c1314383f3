"""Hand a model over to people without winnow: safetensors in timm's layout, ONNX, torch.export, a card and an example."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import PositiveInt
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.harness import stage
from pipeline.models import architectures, checkpoint, inputs, network
from pipeline.report.evaluation import Evaluation, read
from pipeline.store import artifact
from pipeline.store.params import Made, Section

BATCHES = (1, 3)  # whose logits are compared: any number of images must do
TOLERANCE = 1e-3  # of the largest logit
ONNX, PROGRAM, EXAMPLE, CARD = "model.onnx", "model.pt2", "example.py", "README.md"


class Export(Section):
    """What is handed over."""

    model: Made
    """The model directory to hand over."""
    evaluation: Made
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


def run(params: Export, *, model: Path, evaluation: Path, out: Path) -> stage.Metrics:
    """Write a folder that stands alone, and that winnow reads as a model directory too.

    `model.onnx` and `model.pt2` take `pixels`, (B, 3, S, S) float32 of 0..255 in RGB, and give `logits`, (B, C). `config.json`
    stands beside `model.safetensors` where timm has the architecture, so that `timm.create_model("local-dir:...")` loads it.
    `example.py` classifies a picture with onnxruntime. Raises UserError if `evaluation` is of another model, or if onnxruntime,
    or the program loaded again, gives other logits than torch.
    """
    classes = checkpoint.describe(model).classes
    classifier, description, input_spec = network.load(model, classes, params.exit)
    measured = _measured(evaluation, model, params.exit, input_spec.size)
    whole = Classifier(classifier, input_spec).eval()
    with artifact.writing(out) as tmp:
        checkpoint.save(tmp, classifier, description, json.loads((model / checkpoint.HISTORY).read_text()))
        known_to_timm = _timm_config(tmp, classifier, description, input_spec)
        gaps = {"onnx": _onnx(tmp / ONNX, whole, input_spec.size), "program": _program(tmp / PROGRAM, whole, input_spec.size)}
        facts = {
            "params": params,
            "description": description,
            "input_spec": input_spec,
            "parameters": architectures.parameters_of(classifier),
            "macs": architectures.macs(classifier, input_spec.size),
            "val": measured.val,
            "training": measured.training,
            "timm": known_to_timm,
        }
        for name in (EXAMPLE, CARD):
            (tmp / name).write_text(_template(f"export.{name}.jinja").render(facts))
        size = (tmp / checkpoint.WEIGHTS).stat().st_size
    return {"parameters": facts["parameters"], "bytes": size, **{f"{name}_gap": gap for name, gap in gaps.items()}}


def _measured(folder: Path, model: Path, exit: int | None, size: int) -> Evaluation:
    """The evaluation that the card quotes. Raises UserError if it is of another model, exit or input size."""
    evaluation = read(artifact.verify(folder))
    of = artifact.record(folder)["inputs"]["model"]
    if of["identity"] != artifact.identity(model):
        raise UserError(f"{folder} measured {of['path']}, not {model}: the card would show figures of another model.")
    measured = evaluation.model
    if (measured.exit, measured.input) != (exit, size):
        raise UserError(
            f"{folder} measured exit {measured.exit} at {measured.input} pixels, and this exports exit {exit} at {size}: "
            "name an entry of `evaluate` that measures the same."
        )
    return evaluation


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


def _onnx(file: Path, classifier: nn.Module, size: int) -> float:
    """Write the model and return the largest difference of a logit between onnxruntime and torch, over the largest logit."""
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
    return _gap(classifier, size, lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0]), file)


def _program(file: Path, classifier: nn.Module, size: int) -> float:
    """Write the program of torch.export, and return what `_onnx` returns."""
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(classifier, (torch.zeros(2, 3, size, size),), dynamic_shapes=shapes), file)
    return _gap(classifier, size, torch.export.load(file).module(), file)


@torch.no_grad()
def _gap(classifier: nn.Module, size: int, other: Any, file: Path) -> float:
    random = np.random.default_rng(0)
    gap = 0.0
    for batch in BATCHES:
        pixels = torch.from_numpy(random.uniform(0, 255, (batch, 3, size, size)).astype(np.float32))
        expected = classifier(pixels)
        gap = max(gap, float((other(pixels) - expected).abs().max() / expected.abs().max()))
    if not gap <= TOLERANCE:
        raise UserError(f"{file.name} gives other logits than the model: they differ by {gap:.2g} of the largest one.")
    return gap


def _template(name: str) -> Any:
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False).get_template(name)


if __name__ == "__main__":
    stage.main(run)
