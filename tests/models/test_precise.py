"""Classifier layers are float32 under bfloat16 autocast: logits of distinct images do not tie."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.models import architectures, exits, prediction
from pipeline.models.device import Device
from pipeline.models.inputs import InMemory, Input

ON = Device(torch.device("cpu"), torch.bfloat16)
NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("resnet8", {"width": 4}),
    ("resnet8", {"width": 4, "head_layers": 2}),
    ("resnet8", {"width": 4, "exits": 1}),
    ("resnet18_3x3", {"channels": [8, 8, 16, 16]}),
    ("deit_tiny_distilled_patch16_224", {"img_size": 32, "embed_dim": 48, "depth": 1}),
    ("test_convnext", {}),
    ("mobilenetv3_small_050", {}),
    ("resnetv2_18", {"width_factor": 0.125}),
]


@pytest.mark.parametrize(("arch", "options"), NETWORKS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
@pytest.mark.parametrize("folded", [False, True])
def test_logits_are_those_of_a_float32_layer_on_the_same_features(arch: str, options: dict[str, Any], folded: bool) -> None:
    torch.manual_seed(0)
    model = architectures.create(arch, 5, options).eval()
    heads = architectures.heads(model)
    layers = [model.get_submodule(name.removesuffix(".")) for name in heads]
    expected = [torch.empty(0)] * len(layers)

    def keep(i: int) -> Any:
        def hook(layer: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            assert out.dtype == torch.float32
            weight, bias = layer.weight.double().flatten(1), layer.bias.double()  # type: ignore[operator]
            expected[i] = F.linear(args[0].double().flatten(1), weight, bias)  # type: ignore[arg-type]

        return hook

    for i, layer in enumerate(layers):
        layer.register_forward_hook(keep(i))
    whole = prediction.folded(model) if folded else model
    with torch.no_grad():
        logits = prediction.forward(whole, 255 * torch.rand(8, 3, 32, 32), Input(size=32), ON)
    assert torch.allclose(logits.double(), torch.stack(expected).mean(0), rtol=1e-5, atol=1e-6)


def test_all_exits_are_float32() -> None:
    model = architectures.create("resnet8", 5, {"width": 4, "exits": "all"}).eval()
    with ON.autocast():
        assert [s.dtype for s in model(torch.rand(2, 3, 16, 16)).logits] == [torch.float32] * 3
        assert exits.Early(model, 2.0)(torch.rand(2, 3, 16, 16)).dtype == torch.float32  # type: ignore[arg-type]


def test_folding_still_removes_the_normalisation() -> None:
    folded = prediction.folded(architectures.create("resnet8", 5, {"width": 4}))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


def test_scores_of_distinct_images_do_not_tie() -> None:
    """With a bfloat16 classifier the best logits of these 512 images had 106 values."""
    torch.manual_seed(0)
    model = architectures.create("resnet8", 10, {"width": 16})
    pixels = InMemory(torch.randint(0, 256, (512, 16, 16, 3), dtype=torch.uint8).numpy())
    logits = torch.cat([s for _, s in prediction.logits(model, pixels, Input(size=16), ON)])
    best = logits.topk(2, 1).values
    assert not (best[:, 0] == best[:, 1]).any()
    assert len(best[:, 0].unique()) > 505
