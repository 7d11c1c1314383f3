"""Where a network's weights come from, and what is refused."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from pipeline.errors import UserError
from pipeline.models import architectures, checkpoint, inputs, network
from pipeline.models.checkpoint import CheckpointError
from pipeline.store import artifact

CLASSES = ("ant", "bee", "cat")
OPTIONS = {"width": 4}
SCRATCH = Path("data/scratch")


def small(**more: Any) -> network.Network:
    return network.Network.model_validate({"arch": "resnet8", "options": OPTIONS, "input": {"size": 8}, **more})


def saved(folder: Path, classes: tuple[str, ...] = CLASSES, seed: int = 1) -> Path:
    torch.manual_seed(seed)
    model = architectures.create("resnet8", len(classes), OPTIONS)
    given = inputs.Input(size=8)
    with artifact.writing(folder) as tmp:
        checkpoint.save(tmp, model, checkpoint.Description("resnet8", classes, given, OPTIONS), {"train": [], "holdout": []})
    return folder


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_scratch_is_a_function_of_the_seed() -> None:
    first, second, other = (network.start(small(), SCRATCH, CLASSES, seed)[0] for seed in (0, 0, 1))
    assert same(first, second)
    assert not same(first, other)


def test_a_model_directory_is_loaded_whole(tmp_path: Path) -> None:
    model, description, given = network.load(saved(tmp_path / "m"), CLASSES)
    torch.manual_seed(1)
    assert same(model, architectures.create("resnet8", 3, OPTIONS))
    assert (description.arch, given.size) == ("resnet8", 8)


def test_it_loads_as_an_ordinary_classifier_without_winnows_code(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    raw = json.loads((folder / "model.json").read_text())
    assert raw["classes"] == list(CLASSES)
    assert "linear.weight" in safetensors.torch.load_file(folder / "model.safetensors")


def test_a_start_from_a_model_of_the_same_classes_keeps_the_classifier(tmp_path: Path) -> None:
    model, _ = network.start(None, saved(tmp_path / "m"), CLASSES, seed=9)
    assert same(model, network.load(tmp_path / "m", CLASSES)[0])


def test_a_start_from_a_model_of_other_classes_makes_a_new_classifier(tmp_path: Path) -> None:
    model, description = network.start(None, saved(tmp_path / "m", ("x", "y")), CLASSES, seed=9)
    source = network.load(tmp_path / "m", ("x", "y"))[0]
    assert torch.equal(model.conv1.weight, source.conv1.weight)  # type: ignore[union-attr,arg-type]
    assert model.linear.out_features == 3  # type: ignore[union-attr]
    assert description.classes == CLASSES


def test_a_model_beside_a_model_directory_must_be_the_one_in_it(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    named, _ = network.start(small(source_classes="train", input={"size": 8, "crop": 1}), folder, CLASSES, 0)
    assert same(named, network.start(None, folder, CLASSES, 0)[0])
    for other in ({"arch": "resnet14"}, {"options": {"width": 8}}, {"input": {"size": 8, "mean": [0, 0, 0]}}):
        with pytest.raises(CheckpointError, match=r"`model` is another network than that of .*m, .*options: \{'width': 4\}"):
            network.start(small(**other), folder, CLASSES, 0)


def test_a_start_at_another_resolution_has_the_weights_and_the_new_input(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    model, description = network.start(small(input={"size": 12, "canvas": 14}), folder, CLASSES, 0)
    assert same(model, network.load(folder, CLASSES)[0])
    assert (description.input.size, description.input.canvas) == (12, 14)
    assert network.start(None, folder, CLASSES, 0)[1].input.size == 8
    assert model(torch.zeros(2, 3, 12, 12)).shape == (2, 3)


def test_a_network_of_one_size_is_refused_at_another(tmp_path: Path) -> None:
    options = {"img_size": 32, "embed_dim": 12, "depth": 1}
    vit = network.Network(arch="vit_tiny_patch16_224", options=options, input=inputs.Input(size=32))
    model, description = network.start(vit, SCRATCH, CLASSES, 0)
    with artifact.writing(tmp_path / "m") as tmp:
        checkpoint.save(tmp, model, description, {})
    larger = vit.model_copy(update={"input": inputs.Input(size=48)})
    with pytest.raises(CheckpointError, match=r"takes no images of 48 pixels"):
        network.start(larger, tmp_path / "m", CLASSES, 0)


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="knows the classes ant, bee, cat, the images the classes ant, bee, dog"):
        network.load(saved(tmp_path / "m"), ("ant", "bee", "dog"))


def test_a_foreign_checkpoint_brings_its_classifier_in_its_own_order(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = architectures.create("resnet8", 3, OPTIONS)
    state = {f"module.{k}": v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "theirs.th")
    model, _ = network.start(small(source_classes=["cat", "ant", "bee"]), tmp_path / "theirs.th", CLASSES, 0)
    x = torch.randn(5, 3, 8, 8)
    assert torch.allclose(model.eval()(x), source.eval()(x)[:, [1, 2, 0]])


def test_safetensors_are_read_too(tmp_path: Path) -> None:
    source = architectures.create("resnet8", 3, OPTIONS)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "theirs.safetensors")
    model, _ = network.start(small(source_classes="train"), tmp_path / "theirs.safetensors", CLASSES, 0)
    assert same(model, source)


def test_source_classes_must_be_the_training_sets(tmp_path: Path) -> None:
    torch.save(architectures.create("resnet8", 3, OPTIONS).state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError, match="`source_classes` are ant, bee, dog"):
        network.start(small(source_classes=["ant", "bee", "dog"]), tmp_path / "theirs.pth", CLASSES, 0)


def test_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(architectures.create("resnet8", 3, {"width": 8}).state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError, match=r"bn1.bias is \(8,\), the model's \(4,\)"):
        network.start(small(source_classes="train"), tmp_path / "theirs.pth", CLASSES, 0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_whole_numbers_in_place_of_weights_are_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    state = architectures.create("resnet8", 3, OPTIONS).state_dict()
    state["layer1.0.conv1.weight"] = (127 * state["layer1.0.conv1.weight"]).to(dtype)
    torch.save(state, tmp_path / "theirs.pth")
    said = rf"of whole numbers: layer1\.0\.conv1\.weight is {str(dtype).removeprefix('torch.')}"
    with pytest.raises(CheckpointError, match=said):
        network.start(small(source_classes="train"), tmp_path / "theirs.pth", CLASSES, 0)
    with artifact.writing(tmp_path / "ours") as tmp:
        model = nn.ParameterDict({"unused": nn.Parameter(torch.zeros(1))})
        checkpoint.save(tmp, model, checkpoint.Description("resnet8", CLASSES, inputs.Input(size=8), OPTIONS), {})
        safetensors.torch.save_file(state, tmp / checkpoint.WEIGHTS)
    with pytest.raises(CheckpointError, match=said):
        network.load(tmp_path / "ours", CLASSES)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path, value: float) -> None:
    model = architectures.create("resnet8", 3, OPTIONS)
    model.get_buffer("bn1.running_var")[2] = value
    with artifact.writing(tmp_path / "ours") as tmp:
        checkpoint.save(tmp, model, checkpoint.Description("resnet8", CLASSES, inputs.Input(size=8), OPTIONS), {})
    for read in (lambda: network.load(tmp_path / "ours", CLASSES), lambda: network.start(None, tmp_path / "ours", CLASSES, 0)):
        with pytest.raises(CheckpointError, match=r"NaN or infinite: bn1\.running_var"):
            read()


def test_another_architecture_is_refused_by_its_missing_parameters(tmp_path: Path) -> None:
    torch.save(architectures.create("resnet8", 3, OPTIONS).state_dict(), tmp_path / "theirs.pth")
    deeper = small(arch="resnet14", source_classes="train")
    with pytest.raises(CheckpointError, match=r"missing: layer1\.1"):
        network.start(deeper, tmp_path / "theirs.pth", CLASSES, 0)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm-was-done",)


@pytest.mark.parametrize("save", [torch.save, lambda tree, file: file.write_bytes(pickle.dumps(tree))], ids=["torch", "pickle"])
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Any) -> None:
    monkeypatch.chdir(tmp_path)
    save({"state_dict": Harmful()}, tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError, match="never runs code from a checkpoint"):
        checkpoint.read_foreign(tmp_path / "theirs.pth")
    assert not (tmp_path / "harm-was-done").exists()


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError, match="holds no state_dict"):
        checkpoint.read_foreign(tmp_path / "theirs.pth")


def test_two_sources_of_weights_are_refused(tmp_path: Path) -> None:
    torch.save(architectures.create("resnet8", 3, OPTIONS).state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError, match="both name weights"):
        network.start(small(pretrained="timm"), tmp_path / "theirs.pth", CLASSES, 0)


def pretrained(folder: Path) -> tuple[Path, architectures.Projected]:
    torch.manual_seed(2)
    model = architectures.Projected(architectures.create("resnet8", 0, OPTIONS), layers=3, out=5)
    given = inputs.Input(size=8)
    description = checkpoint.Description("resnet8", (), given, OPTIONS, {"steps": 7}, {"layers": 3, "out": 5})
    with artifact.writing(folder) as tmp:
        checkpoint.save(tmp, model, description, {})
    return folder, model


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_classifier_stands_on_the_chosen_layer_of_a_projection_head(tmp_path: Path, layer: int) -> None:
    folder, source = pretrained(tmp_path / "pretrain")
    model, description = network.start(small(), folder, CLASSES, seed=0, from_layer=layer)
    assert description.training == {"steps": 7}
    x = torch.randn(4, 3, 8, 8)
    assert not model.eval()(x).any()
    nn.init.eye_(model.linear.weight)  # type: ignore[arg-type, union-attr]
    features = source.eval().head[:layer](source.encoder(x))
    assert torch.allclose(model(x), features[:, :3], atol=1e-6)
    with artifact.writing(tmp_path / "teach") as tmp:
        checkpoint.save(tmp, model, description, {})
    assert same(network.load(tmp_path / "teach", CLASSES)[0], model)
    assert same(network.start(small(), tmp_path / "teach", CLASSES, seed=0)[0], model)


@pytest.mark.parametrize("layer", [None, 3, -1])
def test_a_start_from_a_pre_trained_model_says_from_which_layer(tmp_path: Path, layer: int | None) -> None:
    with pytest.raises(CheckpointError, match=rf"`from_layer` is {layer}: it must say after which of its layers 0 to 2"):
        network.start(None, pretrained(tmp_path / "p")[0], CLASSES, 0, from_layer=layer)


def test_only_a_pre_trained_model_has_layers_to_start_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="but data/scratch has none"):
        network.start(small(), SCRATCH, CLASSES, 0, from_layer=1)
    with pytest.raises(CheckpointError, match="has none: leave it out"):
        network.start(None, saved(tmp_path / "m"), CLASSES, 0, from_layer=1)


def test_a_pre_trained_model_is_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was pre-trained without labels: it has a projection head but no classifier"):
        network.load(pretrained(tmp_path / "p")[0], CLASSES)


VIT = "vit_tiny_patch16_224"  # its weights: mean and std 0.5, 224 pixels of 248
HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's networks with the config of their published weights, but random weights."""
    honest = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: honest(name, pretrained=False, **options))
    monkeypatch.setattr(
        architectures, "torchvision_weights", lambda arch: torchvision.models.get_model(arch, num_classes=3).state_dict()
    )


@pytest.mark.usefixtures("offline")
def test_pretrained_weights_bring_their_normalisation_and_their_crop(tmp_path: Path) -> None:
    wanted = network.Network.model_validate(
        {"arch": VIT, "input": {"size": 224}, "pretrained": "timm", "source_classes": "train"}
    )
    model, description = network.start(wanted, SCRATCH, CLASSES, 0)
    given = description.input
    assert (given.size, given.side, given.mean, given.std) == (224, 248, HALF, HALF)
    with artifact.writing(tmp_path / "m") as tmp:
        checkpoint.save(tmp, model, description, {})
    assert network.start(wanted, tmp_path / "m", CLASSES, 0)[1].input == given  # the same params name what they have made
    theirs = wanted.model_copy(update={"arch": "resnet18", "pretrained": "torchvision", "source_classes": ("ant", "bee", "cat")})
    given = network.start(theirs, SCRATCH, CLASSES, 0)[1].input
    assert (given.side, given.mean, given.std) == (256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"size": 224, "mean": [0.485, 0.456, 0.406]}, r"`input.mean` is 0.485, 0.456, 0.406, but .* weights take 0.5, 0.5, 0.5"),
        ({"size": 224, "std": [1, 1, 1]}, r"`input.std` is 1, 1, 1, but .* take 0.5, 0.5, 0.5: leave it out"),
        ({"size": 192}, r"`input.size` is 192, but .* take 224: say that"),
        ({"size": 224, "crop": 1.0}, r"`input.crop` is 1, but .* take 0.90.*: leave it out"),
    ],
)
def test_another_input_than_that_of_the_weights_is_refused(said: dict[str, Any], message: str) -> None:
    options = {"img_size": said["size"]}
    wanted = {"arch": VIT, "options": options, "input": said, "pretrained": "timm", "source_classes": "train"}
    with pytest.raises(UserError, match=message):
        network.start(network.Network.model_validate(wanted), SCRATCH, CLASSES, 0)


@pytest.mark.usefixtures("offline")
def test_a_new_classifier_on_published_weights_takes_another_size(tmp_path: Path) -> None:
    wanted = network.Network.model_validate({"arch": "test_convnext", "input": {"size": 64}, "pretrained": "timm"})
    given = network.start(wanted, SCRATCH, CLASSES, 0)[1].input
    assert (given.size, given.side, given.mean) == (64, 67, HALF)  # their 160 of 168


def test_without_published_weights_the_input_is_imagenets() -> None:
    assert network.start(small(), SCRATCH, CLASSES, 0)[1].input == inputs.Input(size=8)


def test_weights_that_were_measured_on_squeezed_images_are_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    squeezed = timm.create_model("coat_lite_medium_384", pretrained=False)  # crop_mode: squash
    assert architectures.timm_input(squeezed) is not None
    assert "coat_lite_medium_384: the published weights were measured with timm's crop mode `squash`" in capsys.readouterr().err
    architectures.timm_input(timm.create_model("resnet18", pretrained=False))
    assert capsys.readouterr().err == ""
