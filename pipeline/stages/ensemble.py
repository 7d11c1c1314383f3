"""Several models as one whose probabilities are the mean of theirs: a teacher made of teachers."""

from pathlib import Path
from typing import Any

from torch import nn

from pipeline.harness import stage
from pipeline.models import architectures, checkpoint, inputs, network
from pipeline.models.checkpoint import Description
from pipeline.store import artifact
from pipeline.store.params import MadeModel, Section


class Ensemble(Section):
    """Two models. All members of an ensemble count alike: three models are one with the ensemble of two."""

    first: MadeModel
    """A model directory."""
    second: MadeModel
    """Another."""


def run(params: Ensemble, *, first: Path, second: Path, out: Path) -> stage.Metrics:
    """Write a model directory that can be evaluated, score, teach and be exported as any other.

    Each member sees the view at its own size, normalised in its own way. Raises CheckpointError if the two do not tell the same
    classes apart.
    """
    classes = checkpoint.describe(first).classes
    loaded = [network.load(folder, classes) for folder in (first, second)]
    members: list[dict[str, Any]] = []
    trained: list[nn.Module] = []
    for model, described, input_spec in loaded:
        if isinstance(model, architectures.EnsembleNetwork):
            members += model.described
            trained += model.members
        else:
            shape = input_spec.model_dump(mode="json", include={"size", "mean", "std"})
            members.append({"arch": described.arch, "options": described.options, **shape})
            trained.append(model)
    size, side, canvas = (max(getattr(input_spec, name) for _, _, input_spec in loaded) for name in ("size", "side", "canvas"))
    options = {"members": members, "size": size}
    whole = architectures.create(architectures.ENSEMBLE, len(classes), options)
    assert isinstance(whole, architectures.EnsembleNetwork)
    for member, model in zip(whole.members, trained, strict=True):
        member.load_state_dict(model.state_dict())
    seen = inputs.Input(size=size, crop=size / side, canvas=canvas, mean=(0, 0, 0), std=(1, 1, 1))
    description = Description(architectures.ENSEMBLE, classes, seen, options, _together(loaded[0][1], loaded[1][1]))
    with artifact.writing(out) as tmp:
        checkpoint.save(tmp, whole, description, {"train": [], "holdout": []})
    return {"members": len(members), "parameters": architectures.parameters_of(whole)}


def _together(first: Description, second: Description) -> dict[str, Any]:
    """What went into the training of both: compute and steps add up; of the images, the larger number were seen by either."""
    a, b = first.training, second.training
    return {
        **{name: a.get(name, 0) + b.get(name, 0) for name in ("steps", "macs")},
        **{name: max(a.get(name, 0), b.get(name, 0)) for name in ("batch", "labelled", "unlabelled")},
        "note": "; ".join(dict.fromkeys(filter(None, (a.get("note"), b.get("note"))))) or None,
    }


if __name__ == "__main__":
    stage.main(run)
