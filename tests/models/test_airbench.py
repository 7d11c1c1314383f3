"""The fast network for small images: whitening, a step of its training by hand, its exits, its exported graph."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from pipeline.learning.loop import optimisers
from pipeline.models import airbench, architectures, exits


def made(**options: object) -> airbench.Airbench:
    torch.manual_seed(0)
    model = architectures.create("airbench", 5, {"widths": [8, 12, 12], **options})
    assert isinstance(model, airbench.Airbench)
    return model


def images(n: int = 40, side: int = 16) -> Tensor:
    """Neighbouring pixels and the colours are alike, as in photographs."""
    coarse = torch.from_numpy(np.random.default_rng(0).normal(size=(n, 3, 4, 4))).float()
    return F.interpolate(coarse + coarse.mean(1, keepdim=True), (side, side), mode="bilinear")


def test_it_has_the_published_size() -> None:
    model = architectures.create("airbench", 10)
    convolutions = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256)
    shifts = 24 + 2 * (64 + 256 + 256)
    assert architectures.parameters_of(model) == convolutions + shifts + 2560 == 1_971_352
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_whitened_patches_have_no_correlation_and_both_signs() -> None:
    layer, seen = airbench.Whitening(), images()
    layer.whiten(airbench.patch_statistics(seen))
    out = layer(seen).detach().transpose(0, 1).flatten(1)  # 24, B (S - 1)^2
    assert torch.allclose(out[:12], -out[12:])
    moments = (out[:12] @ out[:12].T / out.shape[1]).double()
    assert torch.allclose(moments - moments.diag().diag(), torch.zeros_like(moments), atol=1e-3)
    assert moments[-1, -1] == pytest.approx(1, abs=1e-3)  # the largest component, beside which EPS is nothing
    assert moments.diag().max() < 1.001


def test_statistics_of_parts_add_up() -> None:
    seen = images()
    whole, parts = airbench.patch_statistics(seen), [airbench.patch_statistics(part) for part in seen.split(15)]
    assert whole.patches == sum(part.patches for part in parts) == 40 * 15 * 15
    assert torch.allclose(whole.products, torch.stack([part.products for part in parts]).sum(0))


def test_a_step_of_training_is_that_of_the_formulas() -> None:
    """Forward, gradient and Nesterov's step written out on plain tensors."""
    model, x, y = made(), images(12), torch.arange(12) % 5
    for layer in airbench.unwhitened(model):
        layer.whiten(airbench.patch_statistics(x))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fixed = ("conv1.weight", *(name for name in before if name.endswith(("bn1.weight", "bn2.weight"))))
    own = {name: p.clone().requires_grad_() for name, p in before.items() if name not in fixed}

    def normalised(z: Tensor, name: str) -> Tensor:
        mean = z.mean((0, 2, 3), keepdim=True)
        variance = ((z - mean) ** 2).mean((0, 2, 3), keepdim=True)
        return (z - mean) / (variance + 1e-12).sqrt() + own[name].view(1, -1, 1, 1)

    def gelu(z: Tensor) -> Tensor:
        return z * 0.5 * (1 + torch.erf(z / 2**0.5))

    z = gelu(F.conv2d(x, before["conv1.weight"], own["conv1.bias"]))
    for group in ("layer1", "layer2", "layer3"):
        z = F.conv2d(z, own[f"{group}.conv1.weight"], padding=1)
        side = z.shape[-1] // 2
        z = z[..., : 2 * side, : 2 * side].unflatten(2, (side, 2)).unflatten(4, (side, 2)).amax((3, 5))
        z = gelu(normalised(z, f"{group}.bn1.bias"))
        z = gelu(normalised(F.conv2d(z, own[f"{group}.conv2.weight"], padding=1), f"{group}.bn2.bias"))
    logits = z.flatten(2).max(2).values @ own["linear.weight"].T / 9
    target = F.one_hot(y, 5) * 0.8 + 0.2 / 5
    loss = -(target * logits.log_softmax(1)).sum(1).mean()
    gradients = dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))

    training = optimisers.Training(
        steps=10, lr=0.5, momentum=0.85, weight_decay=0.01, bias_rate=16, warmup=0.2, schedule="linear", smoothing=0.2
    )
    optimizer = optimisers.build_optimizer(model, training)
    for parameters in optimizer.param_groups:
        parameters["lr"] = training.rate(0) * parameters["multiple"]
    answered = model.train()(x)
    assert torch.allclose(answered, logits, atol=1e-5)
    F.cross_entropy(answered, y, label_smoothing=0.2).backward()
    optimizer.step()

    for name, parameter in model.named_parameters():
        if name not in own:
            assert torch.equal(parameter, before[name]), name  # whitening and the scales of normalisation are not learned
            continue
        is_shift = name.endswith(("bn1.bias", "bn2.bias"))
        gradient = gradients[name] + (0.01 * before[name] if parameter.ndim > 1 else 0)
        rate = 0.5 * (1 / 2) * (16 if is_shift else 1)
        assert torch.allclose(parameter, before[name] - rate * (1 + 0.85) * gradient, atol=1e-5), name


def test_convolutions_start_as_the_identity_on_what_they_are_given() -> None:
    model = made()
    x = torch.randn(2, 8, 7, 7)
    assert torch.allclose(model.layer2.conv1(x)[:, :8], x)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("side", [16, 32, 37])
def test_its_exits_have_its_last_features_shape(side: int) -> None:
    exited = architectures.create("airbench", 5, {"widths": [8, 12, 12], "exits": "all"})
    assert isinstance(exited, exits.Exits)
    assert len({f.shape for f in exited.eval()(images(2, side)).features}) == 1
    cut = architectures.create("airbench", 5, {"widths": [8, 12, 12], "exits": 2}).eval()
    cut.load_state_dict({name: tensor for name, tensor in exited.state_dict().items() if name in cut.state_dict()})
    assert torch.allclose(cut(images(2, side)), exited(images(2, side)).logits[1])


@pytest.mark.filterwarnings("ignore")  # of the exporter's own making
def test_the_exported_graph_gives_its_answers(tmp_path: Path) -> None:
    model, x = made().eval(), images(6)
    for layer in airbench.unwhitened(model):
        layer.whiten(airbench.patch_statistics(x))
    program = torch.onnx.export(model, (x[:2],), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (answered,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.allclose(answered, model(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("widths", [[8, 8], [8, 8, 0], "wide"])
def test_widths_are_three_numbers(widths: object) -> None:
    with pytest.raises(UserError, match="three positive numbers"):
        architectures.create("airbench", 5, {"widths": widths})
