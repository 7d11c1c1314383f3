"""What is handed over gives the logits of the model, by every road, without winnow."""

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from PIL import Image

from pipeline.errors import UserError
from pipeline.models import checkpoint, inputs, network
from pipeline.models.checkpoint import Description
from pipeline.report import evaluation, handover
from pipeline.stages import export
from pipeline.store import artifact, manifest
from pipeline.store.decode import decode
from tests.evaluations import evaluated
from tests.leaks.bench import manifest_of
from tests.tiny import MACHINE, encoded, picture

pytestmark = pytest.mark.whole
CLASSES = ("ant", "bee", "cat")


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def kinds() -> dict[str, bytes]:
    """Image files of many kinds, some larger and some smaller than the canvas."""
    wide, tall, small = picture(1, (90, 60)), picture(2, (47, 131)), picture(3, (20, 27))
    grey, alpha = wide[:, :, 0], np.linspace(0, 255, 90 * 60).astype(np.uint8).reshape(60, 90)
    palette = Image.fromarray(wide).quantize(16)
    return {
        "cmyk.jpg": encoded(Image.fromarray(wide).convert("CMYK"), "JPEG"),
        "several.jpg": encoded(Image.fromarray(wide), "MPO", save_all=True, append_images=[Image.fromarray(tall)]),
        "grey.jpg": encoded(grey, "JPEG"),
        "progressive.jpg": encoded(tall, "JPEG", progressive=True),
        **{f"turned-{i}.jpg": encoded(wide, "JPEG", exif=turned(i)) for i in range(1, 9)},
        **{f"turned-{kind}": encoded(wide, kind, exif=turned(6)) for kind in ("PNG", "TIFF", "WEBP", "AVIF")},
        "square.png": encoded(picture(4, 40), "PNG"),
        "small.png": encoded(small, "PNG"),
        "alpha.png": encoded(np.dstack([wide, alpha]), "PNG"),
        "grey-alpha.png": encoded(np.dstack([grey, alpha]), "PNG"),
        "palette.png": encoded(palette, "PNG", transparency=3),
        "palette.gif": encoded(palette, "GIF", transparency=3),
        "bits.png": encoded(Image.fromarray(grey > 128), "PNG"),
        "16-bit.png": encoded(Image.fromarray(grey.astype(np.uint16) * 200), "PNG"),
        "16-bit.tif": encoded(Image.fromarray(grey.astype(np.uint16) * 200), "TIFF"),
        "tall.bmp": encoded(tall, "BMP"),
        "tall.ppm": encoded(tall, "PPM"),
        "tall.webp": encoded(tall, "WEBP"),
        "tall.jp2": encoded(tall, "JPEG2000"),
    }


def val_of(folder: Path, images: Mapping[str, bytes] | None = None) -> Path:
    return manifest_of(folder, images or {f"{i:02}.png": encoded(picture(i, (60, 40)), "PNG") for i in range(9)}, 0, CLASSES)


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


def evaluation_of(folder: Path, model: Path, exit_: int | None = None, val: Path | None = None) -> Path:
    """What `evaluate` writes about `model`, as far as `export` reads it."""
    classifier, _, given = network.load(model, CLASSES, exit_ if network.load_exits(model, CLASSES) else None)
    images = manifest.read(val or val_of(folder.with_name("val")))
    shown = [inputs.canvas(decode(data), given.side) for data in manifest.image_bytes(images, range(len(images)))]
    batch = inputs.centre(torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2), given.size)
    with torch.no_grad():
        predicted = classifier.eval()(inputs.normalise(batch, given)).argmax(1).tolist()
    rows = {"id": images.table["id"], "label": images.table["label"], "predicted": predicted, "confidence": [0.5] * len(images)}
    token = artifact.provenance.set({"inputs": {"model": {"path": str(model), "identity": artifact.identity(model)}}})
    with artifact.writing(folder) as tmp:
        predictions: dict[evaluation.Split, pa.Table] = {"val": pa.table(rows).cast(evaluation.PREDICTED)}
        evaluation.write(tmp, evaluated(exit=exit_), predictions, pa.table({"class": []}), b"{}")
    artifact.provenance.reset(token)
    return folder


def handed_over(params: dict[str, Any], model: Path, measured: Path, out: Path) -> dict[str, Any]:
    section = export.Export(model="-", evaluation="-", **params)
    return dict(export.run(section, model=model, evaluation=measured, val=measured.with_name("val"), out=out, machine=MACHINE))


def exported(tmp_path: Path, arch: str, options: dict[str, Any], canvas: int = 40, **params: Any) -> Path:
    model = model_of(tmp_path / "model", arch, options, canvas)
    metrics = handed_over(params, model, evaluation_of(tmp_path / "evaluation", model), tmp_path / "out")
    assert 0 <= metrics["onnx_gap"] < 1e-4
    assert 0 <= metrics["program_gap"] < 1e-6
    assert (metrics["compared"], metrics["ties"]) == (9, 0)
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


def example_of(out: Path) -> Any:
    spec = importlib.util.spec_from_file_location("example", out / "example.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_has_the_pixels_of_winnow(tmp_path: Path) -> None:
    example = example_of(exported(tmp_path, "resnet8", {"width": 8}))
    for name, data in kinds().items():
        (tmp_path / name).write_bytes(data)
        ours = torch.from_numpy(inputs.canvas(decode(data), 40).copy()).permute(2, 0, 1)
        assert np.array_equal(example.cut(example.decode(tmp_path / name)), inputs.centre(ours, 32).float().numpy()), name


def ask(out: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, out / "example.py", *args], capture_output=True, text=True, timeout=60)


def test_the_example_takes_files_and_folders_and_skips_what_is_no_image(tmp_path: Path) -> None:
    out = exported(tmp_path, "resnet8", {"width": 8})
    shown = [picture(i, (60, 40)) for i in range(3)]
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    files = [tmp_path / "one.png", tmp_path / "pictures" / "a.jpg", tmp_path / "pictures" / "deep" / "b.png"]
    for file, image in zip(files, shown, strict=True):
        file.write_bytes(encoded(image, "PNG"))
    (tmp_path / "pictures" / "notes.txt").write_text("no image")
    for batch in ("1", "2", "3", "32"):
        done = ask(out, "--batch", batch, files[0], tmp_path / "pictures", tmp_path / "gone.png")
        assert done.returncode == 0, done.stderr
        lines = [line.split("\t") for line in done.stdout.splitlines()]
        assert [line[0] for line in lines] == [str(file) for file in files]
        for (_, name, said), image in zip(lines, shown, strict=True):
            canvas = torch.from_numpy(inputs.canvas(image, 40)).permute(2, 0, 1)[None]
            p = logits_of(tmp_path / "model", inputs.centre(canvas, 32)).softmax(1)[0]
            assert name == CLASSES[p.argmax()]
            assert float(said) == pytest.approx(float(p.max()), abs=1e-4)
        skipped = done.stderr.splitlines()
        assert [line.partition(": skipped (")[0] for line in skipped] == [
            str(tmp_path / "pictures" / "notes.txt"),
            str(tmp_path / "gone.png"),
        ]


def test_the_example_says_how_to_call_it(tmp_path: Path) -> None:
    out = exported(tmp_path, "resnet8", {"width": 8})
    asked, bare = ask(out, "--help"), ask(out)
    assert asked.returncode == 0
    assert "usage: example.py [-h] [--batch N] FILE_OR_FOLDER" in asked.stdout
    assert "pip install onnxruntime numpy pillow opencv-python-headless" in asked.stdout
    assert (bare.returncode, bare.stdout) == (2, "")
    assert "usage: example.py" in bare.stderr


def other_answers(evaluation_: Path, row: int) -> None:
    """Let the evaluation say another class of one image."""
    file = evaluation_ / evaluation.PREDICTIONS["val"]
    table = pq.read_table(file).to_pylist()
    table[row]["predicted"] = (table[row]["predicted"] + 1) % len(CLASSES)
    record = artifact.record(evaluation_)
    kept = {f.name: f.read_bytes() for f in evaluation_.iterdir() if f.name not in (artifact.CHECKSUMS, artifact.RECORD)}
    token = artifact.provenance.set(record)
    with artifact.writing(evaluation_) as tmp:
        for name, data in kept.items():
            (tmp / name).write_bytes(data)
        pq.write_table(pa.Table.from_pylist(table, evaluation.PREDICTED), tmp / evaluation.PREDICTIONS["val"])
    artifact.provenance.reset(token)


def test_another_answer_than_the_evaluations_is_refused_unless_it_is_a_tie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tmp_path / "model", "resnet8", {"width": 8})
    measured = evaluation_of(tmp_path / "evaluation", model)
    other_answers(measured, 4)
    with pytest.raises(UserError, match=r"model\.onnx does not give the evaluation's answer for .*04\.png: it says"):
        handed_over({}, model, measured, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(export, "TOLERANCE", 2.0)  # no two logits are further apart than twice the largest one
    assert handed_over({}, model, measured, tmp_path / "out")["ties"] == 1
    assert "but for\n1 with two classes so close" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("shares.argmax()", "shares.argmin()"),
        ("return np.asarray(image.trans", "raise OSError\n    return np.asarray(image.trans"),
        ("def main():", "def main():\n    sys.exit(3)"),
    ],
)
def test_an_example_that_answers_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    template = export.template

    class Changed:
        def __init__(self, *given: Any) -> None:
            self.given = given

        def render(self, facts: dict[str, Any]) -> str:
            text = template(*self.given).render(facts)
            assert (right in text) == (self.given[0] == "example.py")
            return text.replace(right, wrong)

    monkeypatch.setattr(export, "template", lambda *given: Changed(*given))
    model = model_of(tmp_path / "model", "resnet8", {"width": 8})
    measured = evaluation_of(tmp_path / "evaluation", model)
    with pytest.raises(
        UserError, match=r"example\.py (does not give the evaluation's answer|has no answer|fails, with exit code 3)"
    ):
        handed_over({}, model, measured, tmp_path / "out")


def test_all_kinds_of_files_get_the_answer_of_the_evaluation(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", "resnet8", {"width": 8})
    measured = evaluation_of(tmp_path / "evaluation", model, val=val_of(tmp_path / "val", kinds()))
    assert handed_over({}, model, measured, tmp_path / "out")["compared"] == len(kinds())


def test_what_stands_on_the_card_is_no_markup(tmp_path: Path) -> None:
    name = "<script>alert(1)</script> | `a` *b*\n# c"
    card = (exported(tmp_path, "resnet8", {"width": 8}, name=name, licence="x: [y") / "README.md").read_text()
    assert "<script>" not in card
    assert "\n# &lt;script&gt;alert(1)&lt;/script&gt; \\| \\`a\\` \\*b\\* \\# c\n" in card
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "x: [y"
    assert handover.code("a_b") == "`a_b`"
    assert handover.code("a|`<b>") == "<code>a\\|\\`&lt;b&gt;</code>"


def test_the_card_says_what_was_measured_and_how_the_model_came_about(tmp_path: Path) -> None:
    card = (exported(tmp_path, "resnet8", {"width": 8}, name="birds", licence="cc-by-4.0") / "README.md").read_text()
    for text in (
        "# birds",
        'license: "cc-by-4.0"',
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
    assert "On 9 of the validation images" in card
    assert "were measured: all agree." in card


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
        out = tmp_path / f"exit{exit_}"
        measured = evaluation_of(tmp_path / "evaluation", tmp_path / "exits", exit_)
        sizes[exit_] = handed_over({"exit": exit_}, tmp_path / "exits", measured, out)["parameters"]
        expected = network.load(tmp_path / "exits", CLASSES, exit_)[0].eval()(inputs.normalise(pixels, inputs.Input(size=32)))
        assert torch.allclose(logits_of(out, pixels), expected)
        assert isinstance(checkpoint.describe(out), Description)
    assert sizes[1] != sizes[None]


def test_figures_of_another_model_or_exit_are_refused(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", "resnet8", {"width": 8})
    other = model_of(tmp_path / "other", "resnet8", {"width": 4})
    for measured, message in (
        (evaluation_of(tmp_path / "a", other), r"a measured .*other, not .*model: its figures are of another model"),
        (evaluation_of(tmp_path / "b", model, 1), r"b measured exit 1 at 32 pixels, and this is exit None at 32: name an"),
    ):
        with pytest.raises(UserError, match=message):
            handed_over({}, model, measured, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_gives_other_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match=r"model\.onnx gives other logits"):
        exported(tmp_path, "resnet8", {"width": 8})
    assert not (tmp_path / "out").exists()
