import pytest
import torch

from pipeline import models, predict


@pytest.mark.parametrize(
    ("arch", "parameters"),
    # He et al. 2016, table 6, gives 0.27, 0.46, 0.66, 0.85 and 1.7 M; the digits are those of the common option-A implementation.
    [("resnet20", 269_722), ("resnet32", 464_154), ("resnet44", 658_586), ("resnet56", 853_018), ("resnet110", 1_727_962)],
)
def test_small_resnets_have_the_published_sizes(arch: str, parameters: int) -> None:
    assert models.parameters_of(models.create(arch, 10)) == parameters


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_small_resnet_shapes(shortcut: str) -> None:
    model = models.create("resnet8", 7, {"width": 8, "shortcut": shortcut, "stem_stride": 2})
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 7)
    assert model.forward_features(x).shape == (2, 32, 4, 4)  # type: ignore[operator]


def test_option_a_shortcut_pads_channels_on_both_sides_and_strides() -> None:
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).view(1, 2, 4, 4)
    y = models.PaddedIdentity(2, 2)(x)
    assert y.shape == (1, 4, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3]].any()


def test_3x3_stem_keeps_the_resolution_of_small_images() -> None:
    model = models.create("resnet18_3x3", 10)
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 512, 4, 4)  # type: ignore[operator]
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_timm_models_are_there_by_name() -> None:
    assert models.create("mobilenetv3_small_050", 5)(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_unknown_architecture_names_the_close_ones() -> None:
    with pytest.raises(models.ModelError, match="resnet56"):
        models.create("resnet_56", 10)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(models.ModelError, match="wide"):
        models.create("resnet20", 10, {"wide": 2})
    with pytest.raises(models.ModelError, match="must be A or B"):
        models.create("resnet20", 10, {"shortcut": "C"})


def test_macs_of_resnet20() -> None:
    assert models.macs(models.create("resnet20", 10), 32) == pytest.approx(41e6, rel=0.02)  # as the literature counts them


@pytest.mark.parametrize(("arch", "options"), [("resnet8", {"shortcut": "B"}), ("resnet18_3x3", {})])
def test_folding_batch_normalisation_changes_no_output(arch: str, options: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = models.create(arch, 10, options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in ((module.running_mean, -1, 1), (module.running_var, 0.5, 2), (module.weight, 0.5, 2)):
                assert tensor is not None
                torch.nn.init.uniform_(tensor, low, high)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        before = model.eval()(x)
        folded = predict.folded(model)
        after = folded(x)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
