"""Contrastive pre-training: the loss against the paper's loops, in one process and in two; views, memory, monitor, the stage."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor

from pipeline.harness.job import Job
from pipeline.harness.journal import Journal
from pipeline.harness.machine import Machine
from pipeline.learning import contrastive, views
from pipeline.models import architectures, checkpoint
from pipeline.report import probe
from pipeline.stages import pretrain, teach
from pipeline.store import artifact, manifest
from tests.tiny import prepared

ROOT = Path(__file__).parents[2]
MACHINE = Machine(device="cpu", precision="float32", threads=1, workers=2)
MODEL = {"arch": "resnet8", "options": {"width": 4}, "input": {"size": 16}}
TRAINING = {"steps": 4, "batch": 8, "lr": 0.05}
ENTRY = {"images": "dedup/pool", "model": MODEL, "head_out": 8, "training": TRAINING}
MEMORY = {"size": 20, "ema": 0.5}


def naive(projected: list[list[float]], temperature: float, memory: list[list[float]]) -> float:
    """SimCLR, algorithm 1, with the views 2k-1 and 2k of the paper at k and k + B; `memory` are further negatives."""

    def similarity(a: list[float], b: list[float]) -> float:
        size = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / size / temperature

    n, total = len(projected), 0.0
    for i in range(n):
        partner = (i + n // 2) % n
        others = [projected[k] for k in range(n) if k != i] + memory
        denominator = sum(math.exp(similarity(projected[i], other)) for other in others)
        total -= math.log(math.exp(similarity(projected[i], projected[partner])) / denominator)
    return total / n


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("memory", [0, 7])
def test_nt_xent_is_the_papers_algorithm(temperature: float, memory: int) -> None:
    z, keys = torch.randn(12, 5), torch.nn.functional.normalize(torch.randn(memory, 5), dim=1)
    expected = naive(z.double().tolist(), temperature, keys.double().tolist())
    assert contrastive.nt_xent(z, temperature, keys).item() == pytest.approx(expected, rel=1e-4)


def test_a_view_is_no_candidate_of_its_own() -> None:
    """With two views of one image nothing is left to mistake the partner for: the loss is 0, and so is its gradient."""
    z = torch.randn(2, 5, requires_grad=True)
    loss = contrastive.nt_xent(z, 0.1)
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert not z.grad.any()


def test_the_gradient_is_that_of_the_naive_loop() -> None:
    z = torch.randn(6, 4, dtype=torch.float64)
    ours = z.float().requires_grad_()
    contrastive.nt_xent(ours, 0.5).backward()
    assert ours.grad is not None
    for i in range(6):
        for j in range(4):
            shift = torch.zeros_like(z)
            shift[i, j] = 1e-5
            slope = (naive((z + shift).tolist(), 0.5, []) - naive((z - shift).tolist(), 0.5, [])) / 2e-5
            assert ours.grad[i, j].item() == pytest.approx(slope, abs=1e-4)


def test_similarities_are_float32_under_autocast() -> None:
    z = torch.randn(8, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert contrastive.nt_xent(z, 0.1).item() == contrastive.nt_xent(z, 0.1).item()
        loss = contrastive.nt_xent(z.bfloat16(), 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(contrastive.nt_xent(z.bfloat16().float(), 0.1).item(), rel=1e-6)


def draws(n: int, seed: int = 0) -> views.Draws:
    return views.Draws(seed, np.zeros(n, np.int64), np.arange(n))


def pictures(n: int, side: int = 20) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, side, side), dtype=np.uint8))


PLAIN = {"scale": (1, 1), "ratio": (1, 1), "flip": False, "jitter": 0, "grey": 0}


def test_a_view_of_the_whole_image_is_the_image() -> None:
    out = contrastive.view(pictures(4), 20, contrastive.TwoViews.model_validate(PLAIN), draws(4), torch.ones(4))
    assert torch.allclose(out, pictures(4).float(), atol=0.01)


def test_crops_keep_to_the_image_and_vary_in_size_aspect_and_place() -> None:
    """On ramps along x and y the corners of a view say which crop it is."""
    ramp = (torch.arange(64) * 4).to(torch.uint8).expand(64, 64)
    raw = torch.stack([ramp, ramp.T, ramp]).repeat(300, 1, 1, 1)
    params = contrastive.TwoViews.model_validate({**PLAIN, "scale": (0.1, 0.6), "ratio": (0.75, 4 / 3)})
    out = contrastive.view(raw, 32, params, draws(300), torch.ones(300))
    # From the inner pixels: the outer ones look at no pixel beyond their crop, which pulls them in. Shares of the side.
    width = (out[:, 0, 0, 24] - out[:, 0, 0, 8]) / 256 * 32 / 16
    height = (out[:, 1, 24, 0] - out[:, 1, 8, 0]) / 256 * 32 / 16
    area, aspect = width * height, width / height
    assert 0.09 < area.min() < 0.15
    assert 0.5 < area.max() < 0.63
    assert 0.7 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.4
    assert out[:, 0].mean((1, 2)).std() > 20
    assert out[:, 1].mean((1, 2)).std() > 20


def test_both_views_are_functions_of_the_image_and_its_pass() -> None:
    make, raw = contrastive.two_views(16, contrastive.TwoViews(blur=0.5), 3, np.ones(6)), pictures(6)
    rows, passes = np.arange(6), np.array([0, 1, 2, 0, 1, 2])
    whole = make(raw, rows, passes)
    assert whole.shape == (6, 2, 3, 16, 16)
    assert torch.allclose(make(raw[4:], rows[4:], passes[4:]), whole[4:], atol=1e-3)
    assert not torch.allclose(whole[:, 0], whole[:, 1], atol=5)
    assert not torch.allclose(make(raw, rows, passes + 1), whole, atol=5)


def test_the_jitter_is_its_steps_one_after_the_other() -> None:
    """Each step as torchvision computes it, for colours far enough from the bounds that none of its clamps acts."""
    batch = 100 + 50 * torch.rand(40, 3, 8, 8)
    params = contrastive.TwoViews(strength=0.25, jitter=1, grey=0.3)
    out, again = contrastive.jittered(batch, params, draws(40)), draws(40)
    again.uniform()
    brightness, contrast, saturation = (again.uniform(0.8, 1.2) for _ in range(3))
    turn, grey = again.uniform(-0.05, 0.05) * 2 * math.pi, again.uniform() < 0.3
    assert 5 < grey.sum() < 20
    for i in range(40):
        x = batch[i] * brightness[i]
        x = contrast[i] * x + (1 - contrast[i]) * tv.rgb_to_grayscale(x).mean()
        x = saturation[i] * x + (1 - saturation[i]) * tv.rgb_to_grayscale(x)
        y, c = contrastive.YIQ @ x.flatten(1), complex(math.cos(turn[i]), math.sin(turn[i]))
        chroma = torch.complex(y[1], y[2]) * c
        x = (torch.linalg.inv(contrastive.YIQ) @ torch.stack([y[0], chroma.real, chroma.imag])).view_as(x)
        expected = tv.rgb_to_grayscale(x, 3) if grey[i] else x
        assert torch.allclose(out[i], expected, atol=0.3), i


def test_jitter_and_grey_leave_the_others_alone() -> None:
    batch = 255 * torch.rand(500, 3, 4, 4)
    params = contrastive.TwoViews(strength=1, jitter=0.3, grey=0)
    out = contrastive.jittered(batch, params, draws(500))
    untouched = (out - batch).abs().amax((1, 2, 3)) < 0.01
    assert 0.6 < untouched.float().mean() < 0.8


def test_blur_is_torchvisions() -> None:
    batch, sigma = 255 * torch.rand(3, 3, 40, 40), torch.tensor([0.0, 0.7, 2.0])
    out = contrastive.blurred(batch, sigma)
    assert torch.allclose(out[0], batch[0], atol=1e-3)
    for i in (1, 2):
        assert torch.allclose(out[i], tv.gaussian_blur(batch[i], [5, 5], [float(sigma[i])] * 2), atol=1e-3)


def test_the_average_moves_once_in_a_step_of_several_pieces() -> None:
    torch.manual_seed(0)
    projected = architectures.Projected(architectures.create("resnet8", 0, {"width": 4}), 2, 3)
    keys = contrastive.Keys(projected, contrastive.Memory(size=5, ema=0.9), pieces=3)
    expected = [p.detach().clone() for p in keys.average.parameters()]
    x = torch.randn(4, 3, 8, 8)
    for _ in range(2):  # steps
        with torch.no_grad():
            for p in projected.parameters():
                p.add_(1.0)
        expected = [0.9 * e + 0.1 * p for e, p in zip(expected, projected.parameters(), strict=True)]
        for _ in range(3):
            keys(projected, x)
            assert all(torch.allclose(p, e, atol=1e-6) for p, e in zip(keys.average.parameters(), expected, strict=True))
    model = contrastive.Contrastive(projected, contrastive.Memory(), pieces=3)
    assert model.memory is not None
    assert model.memory.pieces == 3


def test_the_memory_holds_the_last_keys_of_a_moving_average() -> None:
    torch.manual_seed(0)
    projected = architectures.Projected(architectures.create("resnet8", 0, {"width": 4}), 2, 3)
    keys = contrastive.Keys(projected, contrastive.Memory(size=5, ema=0.9))
    before = [p.clone() for p in keys.average.parameters()]
    with torch.no_grad():
        for p in projected.parameters():
            p.add_(1.0)
    x = torch.randn(3, 8, 3, 8, 8)
    assert len(keys(projected, x[0])) == 0
    assert all(torch.allclose(p, b + 0.1, atol=1e-6) for p, b in zip(keys.average.parameters(), before, strict=True))
    one = keys(projected, x[1])
    assert one.shape == (4, 3)
    assert torch.allclose(one.norm(dim=1), torch.ones(4), atol=1e-5)
    two = keys(projected, x[2])
    assert two.shape == (5, 3)
    assert torch.equal(two[3], one[3])  # the fifth place and then the first three were written
    assert not torch.equal(two[0], one[0])
    assert not any(p.requires_grad for p in keys.parameters())


def test_nearest_neighbours_vote_by_similarity() -> None:
    bank, labels = torch.randn(60, 4), torch.randint(0, 3, (60,))
    queries = torch.randn(20, 4)
    for query, got in zip(queries, probe.nearest(bank, labels, queries, 7), strict=True):
        cosine = torch.stack([torch.dot(query, b) / query.norm() / b.norm() for b in bank])
        votes = [0.0, 0.0, 0.0]
        for i in sorted(range(60), key=lambda i: -float(cosine[i]))[:7]:
            votes[int(labels[i])] += math.exp(float(cosine[i]) / 0.07)
        assert got == votes.index(max(votes))


def test_the_probe_is_the_regularised_minimum() -> None:
    """At the minimum of the convex problem the gradient vanishes; far from it, on separable classes, all are told apart."""
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(30)
    bank = torch.nn.functional.one_hot(labels, 5).float() * 3 + torch.randn(90, 5) * 0.3
    assert torch.equal(probe.probed(bank * 1000 + 7, labels, bank * 1000 + 7), labels)
    with torch.inference_mode():
        assert torch.equal(probe.probed(bank, labels, bank), labels)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("data"), {"ant": 8, "bee": 8})


def pretrained(data: Path, out: Path, scratch: Path | None = None, machine: Machine = MACHINE, **params: Any) -> dict[str, Any]:
    threads = torch.get_num_threads()
    try:
        return dict(
            pretrain.run(
                pretrain.Pretrain.model_validate({**ENTRY, **params}),
                train=data / "train",
                holdout=data / "holdout",
                chosen=data / "pool",
                out=out,
                job=Job(0, scratch or out.parent / f"{out.name}-scratch", Journal(), machine),
            )
        )
    finally:
        torch.set_num_threads(threads)


def test_no_label_trains_anything(data: Path, tmp_path: Path) -> None:
    metrics = pretrained(data, tmp_path / "a")
    assert metrics["images"] == 32
    train = manifest.read(data / "train")
    labels = pa.array(np.roll(train.labels(), 3).astype(np.int32))
    with artifact.writing(tmp_path / "other" / "train") as tmp:
        column = train.table.schema.get_field_index("label")
        manifest.write(tmp, train.table.set_column(column, "label", labels), train.classes)
    for name in ("holdout", "pool"):
        (tmp_path / "other" / name).symlink_to(data / name)
    pretrained(tmp_path / "other", tmp_path / "b")
    a, b = (checkpoint.weights(tmp_path / name) for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_monitor_measures_at_each_check(data: Path, tmp_path: Path) -> None:
    metrics = pretrained(data, tmp_path / "out")
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert [set(entry) for entry in history["holdout"]] == [{"step", "knn", "probe"}] * 4
    assert metrics["holdout_probe"] == history["holdout"][-1]["probe"]


@pytest.mark.parametrize("memory", [None, MEMORY], ids=["batch", "memory"])
def test_a_killed_run_ends_with_the_same_bits(
    data: Path, tmp_path: Path, memory: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = MACHINE.model_copy(update={"checkpoint_minutes": 1e-9})
    params: dict[str, Any] = {"memory": memory, "training": {**TRAINING, "steps": 7, "optimizer": "lars", "lr_scaling": "sqrt"}}
    pretrained(data, tmp_path / "whole", **params)
    loss, calls = contrastive.nt_xent, []

    def dies(*args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(pretrain, "nt_xent", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrained(data, tmp_path / "killed", tmp_path / "s", machine=often, **params)
    pretrained(data, tmp_path / "killed", tmp_path / "s", machine=often, **params)
    assert len(calls) == 5 + 3  # four steps were done, one died, three were left
    whole, killed = (checkpoint.weights(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pretrained": "torchvision"}, "at random or from `pretrained: timm`"),
        ({"options": {"head_layers": 1}}, "no option of an encoder"),
    ],
)
def test_what_is_no_encoder_is_refused(data: Path, tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(architectures.ModelError, match=message):
        pretrained(data, tmp_path / "out", model={**MODEL, **wrong})


@pytest.mark.parametrize("layer", [0, 1])
def test_a_classifier_starts_from_a_layer_of_the_head_with_few_labels(data: Path, tmp_path: Path, layer: int) -> None:
    pretrained(data, tmp_path / "pretrained")
    teach.run(
        teach.Teach.model_validate({"init": "-", "from_layer": layer, "labels": 2, "training": TRAINING}),
        train=data / "train",
        holdout=data / "holdout",
        init=tmp_path / "pretrained",
        out=tmp_path / "out",
        job=Job(0, tmp_path / "s", Journal(), MACHINE),
    )
    found = checkpoint.describe(tmp_path / "out")
    assert found.options == {"width": 4, **({"head_layers": layer} if layer else {})}
    assert (found.training["labelled"], found.training["unlabelled"], found.training["steps"]) == (4, 32, 8)
    named = (tmp_path / "out" / "labels.txt").read_text().split()
    train = manifest.read(data / "train")
    assert named == manifest.balanced(train, 2, 0).table["id"].to_pylist()
    assert sorted(name.split("/")[-2] for name in named) == ["ant", "ant", "bee", "bee"]
