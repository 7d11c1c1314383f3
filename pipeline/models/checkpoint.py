"""Model directories: `model.safetensors` and `model.json`. Nothing is ever pickled."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from pipeline.errors import UserError
from pipeline.models.inputs import Input
from pipeline.store import artifact

WEIGHTS, DESCRIPTION, HISTORY = "model.safetensors", "model.json", "history.json"


FITS: dict[str, Callable[[Any], bool]] = {
    "arch": lambda value: isinstance(value, str),
    "classes": lambda value: all(isinstance(name, str) for name in value),
    "options": lambda value: isinstance(value, dict),
    "training": lambda value: isinstance(value, dict),
    "projection": lambda value: value is None or (isinstance(value, dict) and value.keys() == {"layers", "out"}),
    "temperature": lambda value: isinstance(value, int | float) and 0 < value < float("inf"),
}
"""What each value of a description must be."""


class CheckpointError(UserError):
    """A checkpoint does not fit the model, or is not one that can be read without running code."""


@dataclass(frozen=True)
class Description:
    """What stands in model.json: all that is needed to use the weights.

    `arch` and `options` make the network (`architectures.create`), `input` is what it takes, `training` says how it came about.
    `temperature`: that at which the softmax of the stored network's logits is its probabilities; `network.load` divides by it.
    A model pre-trained without labels has no `classes`: it is an encoder with the `projection` head of so many `layers` and
    `out`puts.
    """

    arch: str
    classes: tuple[str, ...]
    input: Input
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    projection: dict[str, int] | None = None
    temperature: float = 1.0

    def trained(self, steps: int, batch: int, labelled: int, unlabelled: int, note: str | None, *, macs: int) -> "Description":
        """The description after further training: steps and compute add up, and images seen in an earlier training stay seen.

        `macs`: the multiply-accumulates that an image of a step costs (`architectures.macs_of_training`).
        """
        before = self.training
        facts = {
            "steps": before.get("steps", 0) + steps,
            "macs": before.get("macs", 0) + steps * batch * macs,
            "batch": batch,
            "labelled": max(before.get("labelled", 0), labelled),
            "unlabelled": max(before.get("unlabelled", 0), unlabelled),
            "note": note or before.get("note"),
        }
        return replace(self, training=facts)


def save(folder: Path, model: torch.nn.Module, description: Description, history: dict[str, Any]) -> None:
    """Write the files of a model directory into the artifact being written at `folder`."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / WEIGHTS)
    stored = {**asdict(description), "input": description.input.model_dump(mode="json")}
    (folder / DESCRIPTION).write_text(json.dumps(stored, indent=1) + "\n")
    (folder / HISTORY).write_text(json.dumps(history) + "\n")


def describe(folder: Path) -> Description:
    """Read and verify a model directory; returns its description. Raises ArtifactError or CheckpointError."""
    artifact.verify(folder)
    return parsed(folder)


def parsed(folder: Path) -> Description:
    """The description in a folder that is no whole artifact, such as one to which single files were copied."""
    try:
        raw = json.loads((folder / DESCRIPTION).read_text())
        described = Description(**{**raw, "classes": tuple(raw["classes"]), "input": Input.model_validate(raw["input"])})
        if wrong := [name for name, fits in FITS.items() if not fits(getattr(described, name))]:
            raise ValueError(f"{', '.join(wrong)} cannot be what is written there")
        return described
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{folder} is not a model directory: {DESCRIPTION} cannot be used ({error}).") from error


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model directory that `describe` has verified."""
    return _tensors(folder / WEIGHTS)


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """Raises CheckpointError for a file whose header does not fit its bytes."""
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load_file(file)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} cannot be read as safetensors ({error}). It may be cut short: copy or make it anew."
        ) from None
    return tensors


def read_foreign(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of somebody else's checkpoint: .safetensors, or a .pth/.th/.pt/.bin that holds nothing but tensors.

    A `state_dict`, `model` or `model_state_dict` inside a larger dictionary is found; the `module.` prefix of DataParallel is
    removed. Raises CheckpointError where loading would have to run code from the file, or where no tensors are found.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is not there: `init` must name a checkpoint file or a model directory under data/.")
    if file.suffix == ".safetensors":
        return _tensors(file)
    try:
        tree = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and version errors of many types mean the same to the reader
        raise CheckpointError(
            f"{file} cannot be loaded as plain tensors, and winnow never runs code from a checkpoint "
            f"({type(error).__name__}). Save its state_dict as .safetensors and name that file."
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
            break
    if not isinstance(tree, dict) or not tree or not all(isinstance(v, torch.Tensor) for v in tree.values()):
        raise CheckpointError(f"{file} holds no state_dict: expected a mapping from parameter names to tensors.")
    return {name.removeprefix("module."): tensor for name, tensor in tree.items()}


def fill(model: torch.nn.Module, state: dict[str, torch.Tensor], source: str, skip: tuple[str, ...] = ()) -> None:
    """Load `state` into `model`; parameters under the prefixes `skip` (a new head) keep their values.

    Raises CheckpointError naming the parameters that are missing, left over, of another shape, of whole numbers (quantised
    weights need their scales), NaN or infinite. Counters of the model (`num_batches_tracked`) are whole numbers anyway.
    """
    wanted = {k: v for k, v in model.state_dict().items() if not k.startswith(skip) or not skip}
    kept = {k: v for k, v in state.items() if not k.startswith(skip) or not skip}
    optional = {k for k in wanted if k.endswith("num_batches_tracked")}
    missing = sorted(wanted.keys() - kept.keys() - optional)
    extra = sorted(kept.keys() - wanted.keys())
    shapes = [
        f"{k} is {tuple(kept[k].shape)}, the model's {tuple(wanted[k].shape)}"
        for k in sorted(wanted.keys() & kept.keys())
        if kept[k].shape != wanted[k].shape
    ]
    common = [(k, kept[k]) for k in sorted(wanted.keys() & kept.keys()) if wanted[k].is_floating_point()]
    whole = [f"{k} is {str(v.dtype).removeprefix('torch.')}" for k, v in common if not v.is_floating_point()]
    broken = [k for k, v in common if v.is_floating_point() and not v.isfinite().all()]
    problems = [
        f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in (
            ("missing", missing),
            ("left over", extra),
            ("of another shape", shapes),
            ("of whole numbers", whole),
            ("that are NaN or infinite", broken),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source} does not fit the model. Parameters {'; '.join(problems)}. "
            "Name the architecture and options it was trained with, and weights in floating point."
        )
    model.load_state_dict(kept, strict=False)
