"""Wide residual networks: their published size, their order of layers by hand, their exits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models import architectures, exits, wide


def test_it_has_the_published_size() -> None:
    """Oliver et al. 2018 give 1.5 M for WRN-28-2; Zagoruyko and Komodakis 2016, table 4, 36.5 M for WRN-28-10."""
    blocks = sum(
        9 * (c * out + out * out) + 2 * (c + out) + (c * out if c != out else 0) + 3 * (18 * out * out + 4 * out)
        for c, out in ((16, 32), (32, 64), (64, 128))
    )
    assert architectures.parameters_of(architectures.create("wrn28_2", 10)) == 432 + blocks + 256 + 1290 == 1_467_610
    assert round(architectures.parameters_of(architectures.create("wrn28_10", 10)) / 1e6, 1) == 36.5


def test_it_computes_the_formulas() -> None:
    torch.manual_seed(0)
    model = architectures.create("wrn10_1", 5).eval()
    assert isinstance(model, wide.WideResNet)
    state, x = model.state_dict(), torch.randn(2, 3, 16, 16)

    def active(z: Tensor, name: str) -> Tensor:
        return (z * state[f"{name}.weight"].view(1, -1, 1, 1) / (1 + 1e-5) ** 0.5).clamp(min=0)  # statistics are 0 and 1 yet

    z = F.conv2d(x, state["conv1.weight"], padding=1)
    for i, stride in ((1, 1), (2, 2), (3, 2)):
        block = f"layer{i}.0"
        a = active(z, f"{block}.bn1")
        b = active(F.conv2d(a, state[f"{block}.conv1.weight"], stride=stride, padding=1), f"{block}.bn2")
        same = z if i == 1 else F.conv2d(a, state[f"{block}.shortcut.weight"], stride=stride)
        z = same + F.conv2d(b, state[f"{block}.conv2.weight"], padding=1)
    logits = active(z, "norm").mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]
    assert torch.allclose(model(x), logits, atol=1e-5)


def test_its_exits_and_its_encoder_fit() -> None:
    exited = architectures.create("wrn10_1", 5, {"exits": "all"})
    assert isinstance(exited, exits.Exits)
    out = exited.eval()(torch.randn(2, 3, 16, 16))
    assert len({f.shape for f in out.features}) == 1
    assert architectures.create("wrn10_1", 0)(torch.randn(2, 3, 16, 16)).shape == (2, 64)


@pytest.mark.parametrize(("arch", "said"), [("wrn27_2", "no wide ResNet of 27 layers"), ("wrn4_2", "of 4 layers")])
def test_depths_that_do_not_exist_are_refused(arch: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        architectures.create(arch, 10)


def test_options_and_published_weights_are_refused() -> None:
    with pytest.raises(UserError, match="does not take these options"):
        architectures.create("wrn28_2", 10, {"width": 3})
    with pytest.raises(UserError, match="no published weights"):
        architectures.create("wrn28_2", 10, pretrained=True)
