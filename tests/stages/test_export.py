"""What is handed over gives the logits of the model, by every road, without winnow."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
import timm
import torch

from pipeline.errors import UserError
from pipeline.models import checkpoint, inputs, network
from pipeline.models.checkpoint import Description
from pipeline.report import evaluation
from pipeline.stages import export
from pipeline.store import artifact
from tests.evaluations import evaluated
from tests.tiny import encoded, picture

pytestmark = pytest.mark.whole
CLASSES = ("ant", "bee", "cat")


def model_of(folder: Path, arch: str, options: dict[str, Any], canvas: int = 40) -> Path:
    """A model directory with weights and statistics as if trained."""
    given = inputs.Input(size=32, crop=32 / canvas, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    section = network.Network(arch=arch, input=given, options=options)
    model, description = network.start(section, Path("scratch"), CLASSES, seed=0)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    with artifact.writing(folder) as tmp:
        checkpoint.save(tmp, model, description, {"train": [], "holdout": []})
    return folder


def evaluation_of(folder: Path, model: Path, exit_: int | None = None) -> Path:
    """What `evaluate` writes about `model`, as far as `export` reads it."""
    token = artifact.provenance.set({"inputs": {"model": {"path": str(model), "identity": artifact.identity(model)}}})
    with artifact.writing(folder) as tmp:
        evaluation.write(tmp, evaluated(exit=exit_), {"val": evaluation.PREDICTED.empty_table()}, pa.table({"class": []}), b"{}")
    artifact.provenance.reset(token)
    return folder


def exported(tmp_path: Path, arch: str, options: dict[str, Any], canvas: int = 40, **params: Any) -> Path:
    model = model_of(tmp_path / "model", arch, options, canvas)
    measured = evaluation_of(tmp_path / "evaluation", model)
    section = export.Export(model="-", evaluation="-", **params)
    metrics = export.run(section, model=model, evaluation=measured, out=tmp_path / "out")
    assert 0 <= metrics["onnx_gap"] < 1e-4
    assert 0 <= metrics["program_gap"] < 1e-6
    return artifact.verify(tmp_path / "out")


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).uniform(0, 255, (4, 3, 32, 32)).astype(np.float32))


def logits_of(model: Path, pixels: torch.Tensor) -> torch.Tensor:
    classifier, _, given = network.load(model, CLASSES)
    with torch.no_grad():
        return classifier.eval()(inputs.normalise(pixels, given))


@pytest.mark.parametrize(
    ("arch", "options"), [("test_resnet", {}), ("resnet8", {"width": 8}), ("resnet18_3x3", {})], ids=["timm", "small", "3x3"]
)
def test_every_road_gives_the_logits_of_the_model(
    tmp_path: Path, pixels: torch.Tensor, arch: str, options: dict[str, Any]
) -> None:
    out = exported(tmp_path, arch, options)
    expected = logits_of(tmp_path / "model", pixels)

    def close(got: torch.Tensor) -> bool:
        return torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))

    assert torch.allclose(logits_of(out, pixels), expected)
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    assert close(torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0]))
    program = torch.export.load(out / "model.pt2").module()
    assert close(program(pixels))
    assert (out / "config.json").exists() == (arch == "test_resnet")
    if arch == "test_resnet":
        theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        config = timm.data.resolve_model_data_config(theirs)
        normalised = (pixels / 255 - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)
        with torch.no_grad():
            assert close(theirs(normalised))
        assert (config["input_size"], config["crop_pct"]) == ((3, 32, 32), 0.8)
        assert theirs.pretrained_cfg["label_names"] == list(CLASSES)


def test_the_example_classifies_a_picture_as_winnow_does(tmp_path: Path) -> None:
    out = exported(tmp_path, "resnet8", {"width": 8})
    shown = picture(3, (60, 40))
    (tmp_path / "picture.png").write_bytes(encoded(shown, "PNG"))
    done = subprocess.run([sys.executable, out / "example.py", tmp_path / "picture.png"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    canvas = torch.from_numpy(inputs.canvas(shown, 40)).permute(2, 0, 1)[None]
    p = logits_of(tmp_path / "model", inputs.centre(canvas, 32)).softmax(1)[0]
    assert CLASSES[p.argmax()] in done.stdout
    said = float(done.stdout.split("(")[1].split("%")[0]) / 100
    assert said == pytest.approx(float(p.max()), abs=0.03)  # Pillow resizes a little differently


def test_the_card_says_what_was_measured_and_how_the_model_came_about(tmp_path: Path) -> None:
    card = (exported(tmp_path, "resnet8", {"width": 8}, name="birds", licence="cc-by-4.0") / "README.md").read_text()
    for text in (
        "# birds",
        "license: cc-by-4.0",
        "top-1 50.0 %",
        "40.0 % to 60.0 %",
        "| ant | 25.0 % |",
        "`distil@ssld`",
        "`teach/big`",
    ):
        assert text.replace(" %", "%") in card.replace(" %", "%"), text
    assert "20,000 unlabelled ones" in card
    assert "a remark" in card
    assert "short side at 40" in card


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    first = artifact.identity(exported(tmp_path, "resnet8", {"width": 8}))
    assert artifact.identity(exported(tmp_path, "resnet8", {"width": 8})) == first


def test_one_exit_of_a_network_is_an_ordinary_smaller_classifier(tmp_path: Path, pixels: torch.Tensor) -> None:
    section = network.Network(arch="resnet8", input=inputs.Input(size=32), options={"width": 8})
    model, description = network.start_exits(section, Path("scratch"), CLASSES, seed=0)
    with artifact.writing(tmp_path / "exits") as tmp:
        checkpoint.save(tmp, model, description, {"train": [], "holdout": []})
    sizes = {}
    for exit_ in (1, None):
        params = export.Export(model="-", evaluation="-", exit=exit_)
        out = tmp_path / f"exit{exit_}"
        measured = evaluation_of(tmp_path / "evaluation", tmp_path / "exits", exit_)
        sizes[exit_] = export.run(params, model=tmp_path / "exits", evaluation=measured, out=out)["parameters"]
        expected = network.load(tmp_path / "exits", CLASSES, exit_)[0].eval()(inputs.normalise(pixels, inputs.Input(size=32)))
        assert torch.allclose(logits_of(out, pixels), expected)
        assert isinstance(checkpoint.describe(out), Description)
    assert sizes[1] != sizes[None]


def test_figures_of_another_model_or_exit_are_refused(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", "resnet8", {"width": 8})
    other = model_of(tmp_path / "other", "resnet8", {"width": 4})
    for measured, message in (
        (evaluation_of(tmp_path / "a", other), r"a measured .*other, not .*model: the card would show"),
        (evaluation_of(tmp_path / "b", model, 1), r"b measured exit 1 at 32 pixels, and this exports exit None"),
    ):
        with pytest.raises(UserError, match=message):
            export.run(export.Export(model="-", evaluation="-"), model=model, evaluation=measured, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_gives_other_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match=r"model\.onnx gives other logits"):
        exported(tmp_path, "resnet8", {"width": 8})
    assert not (tmp_path / "out").exists()
