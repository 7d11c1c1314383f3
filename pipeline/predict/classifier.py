"""What MODEL names: a model directory, a folder of `export`, or one of its files; and the temperature that calibrates it."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.harness.machine import Machine
from pipeline.models import checkpoint, device, inputs, network, prediction
from pipeline.models.inputs import Input
from pipeline.report import evaluation, handover
from pipeline.store import artifact

ONNX, PROGRAM = ".onnx", ".pt2"
Logits = Callable[[np.ndarray], np.ndarray]
"""(B, side, side, 3) uint8 canvases -> (B, C) float32."""


class Classifier(NamedTuple):
    """`logits` are at temperature 1: their softmax is what was trained."""

    classes: tuple[str, ...]
    input: Input
    logits: Logits


class Temperature(NamedTuple):
    """What logits are divided by before the softmax; `origin`: who measured it, None where nobody did."""

    value: float
    origin: str | None


def load(model: Path, exit: int | None, machine: Machine) -> Classifier:
    """The classifier in float32, as `evaluate` measures it: a directory on `machine.device`, an exported file on the CPU.

    `exit`: of a network with several exits; None: the deepest. Raises UserError for what is no model, and for a device or an exit
    that an exported file does not have.
    """
    if not model.exists():
        raise UserError(
            f"{model} is not there. Name a model directory (data/distil/...), a folder of `export`, or its .onnx or .pt2."
        )
    if model.is_dir():
        on = device.pick(machine.model_copy(update={"precision": "float32"}))
        classes = checkpoint.describe(model).classes
        net, _, given = network.load(model, classes, exit)
        return Classifier(classes, given, _torch(on.place(net).eval(), given, on))
    if model.suffix not in (ONNX, PROGRAM):
        raise UserError(f"{model} is no model: name the folder it lies in, or a file that `export` wrote (.onnx, .pt2).")
    if exit is not None or machine.device not in ("auto", "cpu"):
        raise UserError(f"{model} ends at one exit and runs on the CPU: for --exit or --device name a model directory.")
    described = _beside(model)
    run = _onnx(model, machine) if model.suffix == ONNX else _program(model, machine)

    def logits(canvases: np.ndarray) -> np.ndarray:
        return run(inputs.centre(_tensor(canvases), described.input.size).float().contiguous())

    return Classifier(described.classes, described.input, logits)


def _tensor(canvases: np.ndarray) -> torch.Tensor:
    """(B, 3, side, side) of the same values."""
    return torch.from_numpy(canvases).permute(0, 3, 1, 2)


def _torch(net: torch.nn.Module, given: Input, on: device.Device) -> Logits:
    @torch.inference_mode()
    def logits(canvases: np.ndarray) -> np.ndarray:
        views = inputs.centre(on.batch(_tensor(canvases)), given.size)
        return prediction.forward(net, views, given, on).cpu().numpy()

    return logits


def _beside(file: Path) -> checkpoint.Description:
    """The description beside an exported file. A folder of which files were left behind cannot be verified, and may be used."""
    if (file.parent / artifact.CHECKSUMS).is_file():
        return checkpoint.describe(file.parent)
    if not (file.parent / checkpoint.DESCRIPTION).is_file():
        raise UserError(
            f"{file} stands alone: {checkpoint.DESCRIPTION} of the folder that `export` wrote must lie beside it, which names "
            "the classes and the input."
        )
    return checkpoint.parsed(file.parent)


def _onnx(file: Path, machine: Machine) -> Callable[[torch.Tensor], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = machine.cores(machine.threads)
    with _readable(file):
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda pixels: np.asarray(session.run(None, {"pixels": pixels.numpy()})[0])


def _program(file: Path, machine: Machine) -> Callable[[torch.Tensor], np.ndarray]:
    torch.set_num_threads(machine.cores(machine.threads))
    with _readable(file):
        program = torch.export.load(file).module()

    @torch.no_grad()
    def run(pixels: torch.Tensor) -> np.ndarray:
        return np.asarray(program(pixels).numpy())

    return run


@contextlib.contextmanager
def _readable(file: Path) -> Any:
    """onnxruntime and torch have errors of many types for a file that is none of theirs."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        told = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"{file} cannot be loaded ({told}). Export the model again.") from error


# Calibration ----------------------------------------------------------------------------------------------------------


def temperature(model: Path, exit: int | None, size: int, measured: Path | None) -> Temperature:
    """The temperature that `evaluate` fitted on held-out images.

    It stands in `measured` if that is given; else in the folder that `export` wrote; else in an evaluation of this very model
    in `evaluate` beside the stage that made it (data/evaluate for data/distil/ssld). Raises UserError if `measured` is of another
    model or exit, or has no temperature.
    """
    folder = (model if model.is_dir() else model.parent).absolute()
    identities, exit = _origins(folder, exit)
    if measured is not None:
        found = evaluation.of_model(measured, identities, str(model), exit, size).calibration
        if found is None:
            raise UserError(f"{measured} has no calibration: it was made by an older winnow. Run `dvc repro` of it.")
        return Temperature(found.temperature, str(measured))
    written = folder / handover.CALIBRATION
    if written.is_file():
        return Temperature(_written(written), str(written))
    for candidate in sorted(folder.parents[1].glob("evaluate/*/")) if identities and len(folder.parents) > 1 else []:
        with contextlib.suppress(UserError, OSError, ValueError):
            found = evaluation.of_model(candidate, identities, str(model), exit, size).calibration
            if found is not None:
                return Temperature(found.temperature, str(candidate))
    return Temperature(1.0, None)


def _written(file: Path) -> float:
    try:
        value = float(json.loads(file.read_text())["temperature"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} holds no temperature ({error}). Export the model again, or remove the file.") from None
    if not 0 < value < float("inf"):
        raise UserError(f"{file}: the temperature is {value}, and must be above 0. Export the model again, or remove the file.")
    return value


def _origins(folder: Path, exit: int | None) -> tuple[set[str], int | None]:
    """The identities by which an evaluation may know the model, and the exit that it must have measured.

    What was exported is known by the model directory that it was made from.
    """
    if not (folder / artifact.CHECKSUMS).is_file():
        return set(), exit
    known, record = {artifact.identity(folder)}, artifact.record(folder)
    if record.get("stage") == "export":
        known.add(record["inputs"]["model"]["identity"])
        exit = exit or record["params"]["exit"]
    return known, exit
