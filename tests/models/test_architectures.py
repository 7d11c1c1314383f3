import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models import architectures, prediction


@pytest.mark.parametrize(
    ("arch", "parameters"),
    # He et al. 2016, table 6, gives 0.27, 0.46, 0.66, 0.85 and 1.7 M; the digits are those of the common option-A implementation.
    [("resnet20", 269_722), ("resnet32", 464_154), ("resnet44", 658_586), ("resnet56", 853_018), ("resnet110", 1_727_962)],
)
def test_small_resnets_have_the_published_sizes(arch: str, parameters: int) -> None:
    assert architectures.parameters_of(architectures.create(arch, 10)) == parameters


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_small_resnet_shapes(shortcut: str) -> None:
    model = architectures.create("resnet8", 7, {"width": 8, "shortcut": shortcut, "stem_stride": 2})
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 7)
    assert model.forward_features(x).shape == (2, 32, 4, 4)  # type: ignore[operator]


def test_option_a_shortcut_pads_channels_on_both_sides_and_strides() -> None:
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).view(1, 2, 4, 4)
    y = architectures.PaddedIdentity(2, 2)(x)
    assert y.shape == (1, 4, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3]].any()


def test_3x3_stem_keeps_the_resolution_of_small_images() -> None:
    model = architectures.create("resnet18_3x3", 10)
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 512, 4, 4)  # type: ignore[operator]
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_timm_models_are_there_by_name() -> None:
    assert architectures.create("mobilenetv3_small_050", 5)(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_unknown_architecture_names_the_close_ones() -> None:
    with pytest.raises(architectures.ModelError, match="resnet56"):
        architectures.create("resnet_56", 10)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(architectures.ModelError, match="wide"):
        architectures.create("resnet20", 10, {"wide": 2})
    with pytest.raises(architectures.ModelError, match="must be A or B"):
        architectures.create("resnet20", 10, {"shortcut": "C"})


def test_macs_of_resnet20() -> None:
    assert architectures.macs(architectures.create("resnet20", 10), 32) == pytest.approx(
        41e6, rel=0.02
    )  # as the literature counts them


@pytest.mark.parametrize(
    ("arch", "options", "size"),
    [("airbench", {"widths": [4, 8, 8]}, 32), ("resnet8", {"exits": "all"}, 16), ("vit_tiny_patch16_224", {"depth": 1}, 224)],
)
def test_macs_are_those_of_torchs_counter(arch: str, options: dict[str, Any], size: int) -> None:
    model = architectures.create(arch, 10, options).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size))
    assert architectures.macs(model, size) == counter.get_total_flops() // 2 > 0


def test_counting_does_not_import_torchs_compiler() -> None:
    code = "import sys; from pipeline.models import architectures as a; a.macs(a.create('resnet8', 10), 32)"
    loaded = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch._dynamo' in sys.modules)"], capture_output=True, text=True
    )
    assert loaded.stdout == "False\n", f"{loaded.stderr}: torch has another way to say that a mode is not for the compiler"


@pytest.mark.parametrize(("arch", "options"), [("resnet8", {"shortcut": "B"}), ("resnet18_3x3", {})])
def test_folding_batch_normalisation_changes_no_output(arch: str, options: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = architectures.create(arch, 10, options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in ((module.running_mean, -1, 1), (module.running_var, 0.5, 2), (module.weight, 0.5, 2)):
                assert tensor is not None
                torch.nn.init.uniform_(tensor, low, high)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        before = model.eval()(x)
        folded = prediction.folded(model)
        after = folded(x)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


def test_the_projection_head_is_the_published_one() -> None:
    """Linear without bias and batch normalisation in each layer, ReLU in all but the last, which has no shift."""
    torch.manual_seed(0)
    head = architectures.projection_layers(6, 3, 4).eval()
    x = torch.randn(5, 6)
    expected = x
    for i, layer in enumerate(head):
        linear, norm, *rest = layer.children()
        assert isinstance(linear, nn.Linear)
        assert isinstance(norm, nn.BatchNorm1d)
        assert linear.bias is None
        assert norm.bias.requires_grad == (i < 2)
        assert not norm.bias.any()
        expected = expected @ linear.weight.T / (1 + norm.eps) ** 0.5  # fresh statistics: mean 0, variance 1
        assert len(rest) == (i < 2)
        expected = expected.relu() if i < 2 else expected
    assert [tuple(next(layer.parameters()).shape) for layer in head] == [(6, 6), (6, 6), (4, 6)]
    assert torch.allclose(head(x), expected, atol=1e-5)
    assert head.train()(x).mean(0).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("arch", "options", "features"),
    [
        ("resnet8", {"width": 8}, 32),
        ("skresnet18", {}, 512),
        ("skresnet18_3x3", {"channels": [32, 64, 128, 256]}, 256),
        ("resnet18_3x3", {"channels": [128, 256, 512, 1024]}, 1024),
        ("mobilenetv3_small_050", {}, 1024),
    ],
)
def test_encoders_of_any_width_and_selective_kernels_carry_a_head(arch: str, options: dict[str, Any], features: int) -> None:
    encoder = architectures.create(arch, 0, options)
    assert architectures.features_of(encoder) == features
    x = torch.randn(2, 3, 32, 32)
    assert encoder(x).shape == (2, features)
    model = architectures.create(arch, 5, {**options, "head_layers": 2})
    assert model(x).shape == (2, 5)
    assert set(dict(model.named_parameters())) > {f"encoder.{name}" for name, _ in encoder.named_parameters()}


@pytest.mark.parametrize(("arch", "options"), [("resnet8", {}), ("resnet8", {"head_layers": 1}), ("resnet18", {})])
def test_a_zero_classifier_finds_all_classes_equally_likely(arch: str, options: dict[str, Any]) -> None:
    model = architectures.create(arch, 5, options)
    architectures.zero_classifier(model)
    assert not model(torch.randn(2, 3, 32, 32)).any()
