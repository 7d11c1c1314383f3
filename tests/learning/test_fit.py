"""The training loop: resumed runs end with the same bits, bad losses stop it, the schedule is what it says."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.harness.job import Job
from pipeline.harness.journal import Journal
from pipeline.harness.machine import Machine
from pipeline.learning import views
from pipeline.learning.loop import fit, optimisers, state
from pipeline.models import architectures, inputs
from pipeline.models.device import Device

CPU = Device(torch.device("cpu"), torch.float32)
INPUT = inputs.Input(size=8)


class Killed(Exception):
    pass


def train(
    scratch: Path, training: optimisers.Training, die_at: int | None = None, spoil: Callable[[int, Tensor], Tensor] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(architectures.create("resnet8", 3, {"width": 4}), nn.Dropout(0.2), nn.Linear(3, 3))
    pixels = inputs.InMemory(np.random.default_rng(0).integers(0, 256, (50, 10, 10, 3), dtype=np.uint8))
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, 3, 50))
    steps = iter(range(10**6))

    def loss(model: nn.Module, batch: views.Batch) -> Tensor:
        step = next(steps)
        if step == die_at:
            raise Killed
        value = F.cross_entropy(model(inputs.normalise(batch.views, INPUT)), labels[batch.rows])
        return spoil(step, value) if spoil else value

    trained = fit.fit(
        model,
        loss,
        pixels,
        views.viewer(8, views.View(kind="shift", pad=2, brightness=0.2), seed=3),
        training,
        lambda m: {"top1": float(next(m.parameters()).detach().sum())},
        job=Job(3, scratch, Journal(), Machine(checkpoint_minutes=1e-9)),  # after every step
        device=CPU,
        label="test",
    )
    return trained.model, trained.history


@pytest.mark.parametrize(
    "training",
    [
        optimisers.Training(steps=23, batch=16, lr=0.05, clip=1.0),
        optimisers.Training(steps=23, batch=16, optimizer="adamw", lr=0.01, ema=0.9),
        optimisers.Training(steps=23, batch=16, momentum=0.0, accumulate=2, rates={"0.conv1": 0.1}),
        optimisers.Training(steps=23, batch=16, optimizer="lars", lr=1.0),
    ],
    ids=["sgd", "adamw-ema", "plain-sgd-in-pieces", "lars"],
)
@pytest.mark.whole
@pytest.mark.parametrize("die_at", [1, 13, 22])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, training: optimisers.Training, die_at: int) -> None:
    whole, history = train(tmp_path / "whole", training)
    with pytest.raises(Killed):
        train(tmp_path / "killed", training, die_at=die_at)
    resumed, resumed_history = train(tmp_path / "killed", training)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert resumed_history == history


def flipped(checkpoint: Path) -> None:
    state = checkpoint / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[-5] ^= 1
    state.write_bytes(data)


@pytest.mark.parametrize("damage", [flipped, lambda checkpoint: (checkpoint / "done.json").unlink()])
def test_a_damaged_checkpoint_is_as_none(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = optimisers.Training(steps=10, batch=16)
    whole, history = train(tmp_path / "whole", training)
    with pytest.raises(Killed):
        train(tmp_path / "killed", training, die_at=5)
    damage(tmp_path / "killed" / "checkpoint")
    again, again_history = train(tmp_path / "killed", training)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert again_history == history
    assert "this is done again" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    training = optimisers.Training(steps=40, batch=16)
    with pytest.raises(optimisers.TrainingError, match=r"nan at step 8 of 40.*step 7, is kept"):
        train(tmp_path, training, spoil=lambda step, value: value * float("nan") if step == 7 else value)
    resumed, _ = train(tmp_path, training)
    assert all(torch.isfinite(p).all() for p in resumed.parameters())


def test_each_loss_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All losses since the last check were stacked every 20 steps: 26 ms late in a check of 5,000 steps."""
    honest, looked = torch.isfinite, list[int]()

    def looking(losses: Tensor) -> Tensor:
        looked.append(losses.numel())
        return honest(losses)

    monkeypatch.setattr(torch, "isfinite", looking)
    training, done = optimisers.Training(steps=100), state._Done()

    def go_on(steps: int, spoiled: int | None = None) -> None:
        for _ in range(steps):
            done.losses.append(torch.tensor(math.inf if done.step == spoiled else 1.0))
            done.step += 1
        done.refuse_nan(training)

    go_on(20)
    go_on(20)
    go_on(0)
    assert looked == [20, 20]
    assert done.note(0.1, {})["loss"] == 1.0
    go_on(20)
    with pytest.raises(optimisers.TrainingError, match="the loss is inf at step 66 of 100"):
        go_on(20, spoiled=65)
    assert looked == [20, 20, 20, 20]


def test_the_schedule_warms_up_and_falls_to_zero() -> None:
    training = optimisers.Training(steps=100, lr=1.0, warmup=0.1)
    rates = [training.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(("scaling", "lr", "peak"), [("none", 0.1, 0.1), ("linear", 0.3, 4.8), ("sqrt", 0.075, 4.8)])
def test_the_learning_rate_scales_with_the_batch_as_simclr_says(scaling: str, lr: float, peak: float) -> None:
    """SimCLR, section B.1: 0.3 B / 256, or 0.075 sqrt(B); both are 4.8 at a batch of 4096."""
    training = optimisers.Training.model_validate({"steps": 10, "batch": 4096, "lr": lr, "lr_scaling": scaling, "warmup": 0})
    assert training.rate(0) == pytest.approx(peak)


@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_lars_follows_a_naive_step_and_leaves_norms_and_biases_to_plain_momentum(decay: float) -> None:
    """v <- m v + trust (g + decay w), w <- w - lr v, trust = 0.001 |w| / (|g| + decay |w|): You et al. 2017, algorithm 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    speed = {name: torch.zeros_like(p) for name, p in expected.items()}
    optimizer = optimisers.build_optimizer(
        model, optimisers.Training(steps=1, optimizer="lars", lr=2.0, momentum=0.9, weight_decay=decay)
    )
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 5, dtype=torch.float64)).square().mean().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            g, w = p.grad, expected[name]
            if name in ("0.weight", "3.weight"):
                trust = 0.001 * w.norm() / (g.norm() + decay * w.norm())
                g = trust * (g + decay * w)
            speed[name] = 0.9 * speed[name] + g
            expected[name] = w - 2.0 * speed[name]
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, expected[name], rtol=1e-6, atol=1e-9), name


def momentum(
    decay: float, nesterov: bool, optimizer: str, model: nn.Module, steps: int, lr: float = 0.1
) -> torch.optim.Optimizer:
    training = {"steps": steps, "optimizer": optimizer, "lr": lr, "weight_decay": decay, "nesterov": nesterov}
    return optimisers.build_optimizer(model, optimisers.Training.model_validate(training))


@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_a_zero_initialised_classifier_learns_under_lars_by_plain_momentum(decay: float) -> None:
    """SimCLR excludes `head_supervised`: a trust of 0.001 |w| / |g| would hold a classifier that starts at zero near zero."""
    torch.manual_seed(0)
    model = architectures.create("resnet8", 3, {"width": 4})
    architectures.zero_classifier(model)
    x, y = torch.randn(12, 3, 8, 8), torch.arange(12) % 3
    optimizer = momentum(decay, True, "lars", model, 2)
    weight = model.get_parameter("linear.weight")
    expected, speed = weight.detach().clone(), torch.zeros_like(weight)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        assert weight.grad is not None
        speed = 0.9 * speed + weight.grad + decay * expected
        expected = expected - 0.1 * speed
        optimizer.step()
        assert torch.allclose(weight, expected, atol=1e-7)
    assert F.cross_entropy(model(x), y).item() < 0.9 * math.log(3)
    assert {part["weight_decay"] for part in optimizer.param_groups} == {0.0, decay}


@pytest.mark.parametrize(("optimizer", "nesterov"), [("sgd", True), ("sgd", False), ("lars", True)])
def test_nesterovs_step_is_a_choice_of_sgd(optimizer: str, nesterov: bool) -> None:
    model = nn.BatchNorm1d(2)  # which lars does not adapt
    chosen = momentum(0.0, nesterov, optimizer, model, 2)
    model.weight.data.zero_()
    for _ in range(2):
        model.weight.grad = torch.ones(2)
        chosen.step()
    looks_ahead = nesterov and optimizer == "sgd"
    assert model.weight.tolist() == pytest.approx([-0.1 * (1.9 + 2.71 if looks_ahead else 1 + 1.9)] * 2)


def test_the_average_of_a_short_training_forgets_its_start(tmp_path: Path) -> None:
    """A parameter that is 1 at the first step and 0 after it: the average is what is left of the first step."""
    model = nn.Linear(1, 1)
    average = fit.AveragedModel(model, multi_avg_fn=optimisers.warmed_up(0.999))
    for step in range(400):
        nn.init.constant_(model.weight, float(step == 0))
        average.update_parameters(model)
    assert average.module.get_parameter("weight").item() < 1e-6  # 0.67 with 0.999 from the start
    long = fit.AveragedModel(model, multi_avg_fn=optimisers.warmed_up(0.5))
    for weight in (0.0,) * 20 + (1.0,):
        nn.init.constant_(model.weight, weight)
        long.update_parameters(model)
    assert long.module.get_parameter("weight").item() == pytest.approx(0.5)


def test_tokens_and_position_embeddings_do_not_decay() -> None:
    model = architectures.create("vit_tiny_patch16_224", 3, {"img_size": 32, "embed_dim": 12, "depth": 1})
    for network, prefix in ((model, ""), (nn.Sequential(model), "0.")):
        optimizer = momentum(0.1, True, "adamw", network, 1)
        free = {id(p) for part in optimizer.param_groups if not part["weight_decay"] for p in part["params"]}
        named = dict(network.named_parameters())
        wide = {name for name, p in named.items() if id(p) in free and p.ndim > 1}
        assert wide == {f"{prefix}cls_token", f"{prefix}pos_embed"}


@pytest.mark.parametrize("more", [{}, {"ema": 0.9}, {"optimizer": "adamw", "weight_decay": 0.5}], ids=["sgd", "ema", "adamw"])
def test_frozen_layers_keep_their_weights_and_statistics(tmp_path: Path, more: dict[str, Any]) -> None:
    """All but the last normalisation and the classifiers: what the Fix step trains. The checks put the model into eval mode."""
    torch.manual_seed(0)
    start = nn.Sequential(architectures.create("resnet8", 3, {"width": 4}), nn.Dropout(0.2), nn.Linear(3, 3)).state_dict()
    frozen = ("0.conv1", "0.bn1", "0.layer1", "0.layer2", "0.layer3.0.conv", "0.layer3.0.bn1")
    training = optimisers.Training.model_validate({"steps": 12, "batch": 16, "frozen": frozen, **more})
    model, _ = train(tmp_path, training)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    bn = "0.layer3.0.bn2"
    learned = {f"{bn}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert moved == learned | {"0.linear.weight", "0.linear.bias", "2.weight", "2.bias"}
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_layers_survive_a_kill(tmp_path: Path) -> None:
    training = optimisers.Training(steps=9, batch=16, frozen=("0.conv1", "0.bn1"))
    whole, history = train(tmp_path / "whole", training)
    with pytest.raises(Killed):
        train(tmp_path / "killed", training, die_at=5)
    resumed, resumed_history = train(tmp_path / "killed", training)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert resumed_history == history


def test_frozen_layers_must_be_there_and_leave_some(tmp_path: Path) -> None:
    with pytest.raises(
        optimisers.TrainingError, match=r"`training.frozen` names stage, with which no parameter.*They begin with 0, 2"
    ):
        train(tmp_path, optimisers.Training(steps=1, batch=16, frozen=("0.conv1", "stage")))
    with pytest.raises(optimisers.TrainingError, match=r"`training.frozen` \(0, 2\) leaves no parameter to learn"):
        train(tmp_path, optimisers.Training(steps=1, batch=16, frozen=("0", "2")))


def test_every_pass_sees_every_image_once_in_another_order() -> None:
    order = fit.Order(50, 16, seed=0)
    rows, passes = np.concatenate([order.at(step) for step in range(25)], axis=1)  # 400 draws: 8 passes
    assert all(sorted(seen) == list(range(50)) for seen in rows.reshape(8, 50))
    assert len({tuple(seen) for seen in rows.reshape(8, 50)}) == 8
    assert passes.tolist() == np.repeat(np.arange(8), 50).tolist()
    assert np.array_equal(fit.Order(50, 16, seed=0).at(20)[0], rows[320:336])


def test_norms_and_biases_do_not_decay(tmp_path: Path) -> None:
    model = architectures.create("resnet8", 3, {"width": 4})
    decayed, free = optimisers.build_optimizer(model, optimisers.Training(steps=1, weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_pieces_of_a_batch_add_up_to_its_gradient(tmp_path: Path) -> None:
    """Without batch statistics, which each piece takes for itself."""
    results = []
    labels = torch.arange(50) % 3
    for pieces in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        pixels = inputs.InMemory(np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8))
        trained = fit.fit(
            model,
            lambda model, batch: F.cross_entropy(model(inputs.normalise(batch.views, INPUT)), labels[batch.rows]),
            pixels,
            views.viewer(8, views.View(pad=1), 0),
            optimisers.Training(steps=10, batch=16, accumulate=pieces),
            lambda model: {},
            job=Job(0, tmp_path / str(pieces), Journal(), Machine()),
            device=CPU,
            label="test",
        )
        results.append((trained.model.state_dict(), trained.history))
    (whole, whole_history), (pieced, pieced_history) = results
    assert all(torch.allclose(whole[name], pieced[name], atol=1e-5) for name in whole)
    assert whole_history["train"][-1]["loss"] == pytest.approx(pieced_history["train"][-1]["loss"], abs=1e-5)


def test_pieces_must_divide_the_batch(tmp_path: Path) -> None:
    with pytest.raises(optimisers.TrainingError, match=r"`training.accumulate` is 3.*16 images"):
        train(tmp_path, optimisers.Training(steps=2, batch=16, accumulate=3))


def test_parameters_learn_at_their_own_rates() -> None:
    model = architectures.create("resnet8", 3, {"width": 4})
    optimizer = optimisers.build_optimizer(model, optimisers.Training(steps=1, rates={"layer": 0.5, "layer1": 0.1}))
    multiples = {id(p): part["multiple"] for part in optimizer.param_groups for p in part["params"]}
    expected = {"conv1": 1.0, "bn1": 1.0, "layer1": 0.1, "layer2": 0.5, "layer3": 0.5, "linear": 1.0}
    assert all(multiples[id(p)] == expected[name.split(".")[0]] for name, p in model.named_parameters())
    with pytest.raises(optimisers.TrainingError, match=r"names stage, with which no parameter.*conv1, layer1"):
        optimisers.build_optimizer(model, optimisers.Training(steps=1, rates={"stage": 0.5}))


def test_a_linear_schedule_is_a_triangle() -> None:
    training = optimisers.Training(steps=100, lr=2.0, warmup=0.2, schedule="linear")
    rates = [training.rate(step) for step in range(100)]
    assert rates[19] == rates[20] == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert np.allclose(np.diff(rates[20:]), -2.0 / 80)


def test_shifts_of_normalisation_learn_at_a_rate_of_their_own() -> None:
    model = architectures.create("resnet8", 3, {"width": 4})
    optimizer = optimisers.build_optimizer(model, optimisers.Training(steps=1, rates={"layer1": 0.5}, bias_rate=8))
    multiples = {id(p): group["multiple"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: multiples[id(p)] for name, p in model.named_parameters()}
    assert (found["bn1.bias"], found["layer1.0.bn1.bias"]) == (8, 4)
    assert (found["bn1.weight"], found["linear.bias"], found["layer1.0.conv1.weight"]) == (1, 1, 0.5)
