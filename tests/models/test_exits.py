"""Exits: their shapes, the ordinary classifiers they are cut into, and how a network gets them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.models import architectures, checkpoint, exits, inputs, network, prediction
from pipeline.models.checkpoint import CheckpointError
from pipeline.models.exits import ExitError, Exits
from pipeline.store import artifact

CLASSES = ("ant", "bee", "cat")
SCRATCH = Path("data/scratch")
SMALL = network.Network.model_validate({"arch": "resnet8", "options": {"width": 4}, "input": {"size": 16}})


def with_exits(arch: str = "resnet8", **options: object) -> Exits:
    torch.manual_seed(0)
    model = architectures.create(arch, 3, {**options, "exits": "all"})
    assert isinstance(model, Exits)
    for module in model.modules():  # statistics that tell one branch from another
        if isinstance(module, nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
    return model.eval()


def saved(folder: Path, model: Exits, classes: tuple[str, ...] = CLASSES) -> Path:
    description = checkpoint.Description("resnet8", classes, inputs.Input(size=16), {"width": 4, "exits": "all"}, {"steps": 7})
    with artifact.writing(folder) as tmp:
        checkpoint.save(tmp, model, description, {"train": [], "holdout": []})
    return folder


@pytest.mark.parametrize(
    ("arch", "options", "side"),
    [
        ("resnet8", {"width": 4}, 30),
        ("resnet8", {"width": 4, "stem_stride": 2}, 33),
        ("resnet18_3x3", {}, 20),
        ("resnet26d", {}, 72),
    ],
)
def test_every_exit_has_the_last_stages_shape_and_the_deepest_is_the_trunks(
    arch: str, options: dict[str, int], side: int
) -> None:
    model = with_exits(arch, **options)
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        found = model(x)
        features = model.trunk.forward_features(x)  # type: ignore[operator]
        logits = model.trunk(x)
    assert len(found.logits) == len(found.features) == len(model) == (3 if arch == "resnet8" else 4)
    assert {f.shape for f in found.features} == {features.shape}
    assert {s.shape for s in found.logits} == {(2, 3)}
    assert torch.equal(found.features[-1], features)
    assert torch.equal(found.logits[-1], logits)


def test_an_exit_has_a_bottleneck_for_each_stage_it_skips() -> None:
    model = with_exits("resnet18_3x3")
    assert [len(branch.bottlenecks) for branch in model.branches.values()] == [3, 2, 1]  # type: ignore[arg-type]
    assert [b[-3].out_channels for b in model.branches["1"].bottlenecks] == [128, 256, 512]  # type: ignore[union-attr]
    assert [b[3].stride for b in model.branches["1"].bottlenecks] == [(2, 2)] * 3  # type: ignore[union-attr]


def test_making_exits_leaves_the_trunk_as_it_was() -> None:
    torch.manual_seed(0)
    alone = architectures.create("resnet8", 3, {"width": 4})
    before = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    whole = Exits(alone, 3)
    assert whole.training
    assert all(torch.equal(before[name], tensor) for name, tensor in whole.trunk.state_dict().items())


@pytest.mark.parametrize("number", [1, 2])
def test_a_cut_is_a_smaller_classifier_with_the_answers_of_its_exit(tmp_path: Path, number: int) -> None:
    model = with_exits(width=4)
    cut, description, _ = network.load(saved(tmp_path / "m", model), CLASSES, number)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x).logits[number - 1]
        assert torch.equal(cut.eval()(x), expected)
        assert torch.allclose(prediction.folded(cut)(x), expected, atol=1e-4)
    assert architectures.parameters_of(cut) < architectures.parameters_of(model)
    assert architectures.macs(cut, 16) < architectures.macs(exits.Stacked(model), 16)
    assert description.options == {"width": 4, "exits": number}
    again = architectures.create(description.arch, 3, description.options)
    assert again.state_dict().keys() == cut.state_dict().keys() < model.state_dict().keys()


def test_the_deepest_exit_is_an_ordinary_classifier(tmp_path: Path) -> None:
    model = with_exits(width=4)
    plain, description, _ = network.load(saved(tmp_path / "m", model), CLASSES)
    ordinary = architectures.create("resnet8", 3, {"width": 4})
    assert plain.state_dict().keys() == ordinary.state_dict().keys()
    assert description.options == {"width": 4}
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), model(x).logits[-1])
        assert torch.equal(network.load(tmp_path / "m", CLASSES, 3)[0].eval()(x), model(x).logits[-1])
        whole = network.load_exits(tmp_path / "m", CLASSES)
        assert whole is not None
        assert torch.equal(torch.stack(model(x).logits, 1), exits.Stacked(whole.eval())(x))


def test_an_exit_that_is_not_there_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "m", with_exits(width=4))
    with pytest.raises(ExitError, match="has the exits 1 to 3"):
        network.load(tmp_path / "m", CLASSES, 4)
    cut, description = network.start(SMALL, tmp_path / "m", CLASSES, 0, 2)
    with artifact.writing(tmp_path / "cut") as tmp:
        checkpoint.save(tmp, cut, description, {})
    with pytest.raises(ExitError, match="has no exits"):
        network.load(tmp_path / "cut", CLASSES, 1)
    assert network.load_exits(tmp_path / "cut", CLASSES) is None
    with pytest.raises(CheckpointError, match="is one exit of a network"):
        network.start_exits(None, tmp_path / "cut", CLASSES, 0)


@pytest.mark.parametrize(
    ("arch", "option", "message"),
    [
        ("resnet8", 3, "exits 1 to 2 before its own end"),
        ("resnet8", "some", "must be `all` or the number"),
        ("mobilenetv3_small_050", "all", "cannot have exits"),
    ],
)
def test_impossible_exits_are_explained(arch: str, option: object, message: str) -> None:
    with pytest.raises(ExitError, match=message):
        architectures.create(arch, 3, {"exits": option})


def test_with_exits_the_trunk_starts_as_the_plain_network_does() -> None:
    plain, _ = network.start(SMALL, SCRATCH, CLASSES, 5)
    whole, description = network.start_exits(SMALL, SCRATCH, CLASSES, 5)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), whole.trunk.state_dict().values(), strict=True))
    assert description.options == {"width": 4, "exits": "all"}


def test_all_exits_go_on_from_a_model_that_has_them(tmp_path: Path) -> None:
    model = with_exits(width=4)
    again, description = network.start_exits(SMALL, saved(tmp_path / "m", model), CLASSES, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert description.training == {"steps": 7}


def test_with_other_classes_every_exit_gets_a_new_classifier(tmp_path: Path) -> None:
    model = with_exits(width=4)
    again, _ = network.start_exits(None, saved(tmp_path / "m", model), ("x", "y"), 1)
    before = model.state_dict()
    kept = {name for name, t in again.state_dict().items() if t.shape == before[name].shape and torch.equal(t, before[name])}
    assert before.keys() - kept == {
        f"{head}.{kind}" for head in ("trunk.linear", "branches.1.linear", "branches.2.linear") for kind in ("weight", "bias")
    }


def test_classifiers_follow_the_order_of_the_classes(tmp_path: Path) -> None:
    model = with_exits(width=4)
    again, _ = network.start_exits(None, saved(tmp_path / "m", model, ("cat", "ant", "bee")), CLASSES, 1)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for ours, theirs in zip(again.eval()(x).logits, model(x).logits, strict=True):
            assert torch.allclose(ours, theirs[:, [1, 2, 0]])


def test_exits_by_hand_are_left_to_the_stage_that_trains_them() -> None:
    by_hand = SMALL.model_copy(update={"options": {"width": 4, "exits": "all"}})
    with pytest.raises(CheckpointError, match="what `self_distil` adds by itself"):
        network.start(by_hand, SCRATCH, CLASSES, 0)
