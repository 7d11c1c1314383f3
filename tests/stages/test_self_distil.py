"""The objective against the paper's formula, term by term, and the stage on twenty-four tiny images."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from pipeline.models import architectures, checkpoint, network
from pipeline.models.checkpoint import CheckpointError
from pipeline.models.exits import Exited
from pipeline.stages import self_distil
from pipeline.store import artifact, manifest
from tests.tiny import SCRATCH, SMALL, distilled, scored, self_distilled, taught

CLASSES = ("ant", "bee", "cat")
EXITS, B, C, T = 4, 5, 7, 3.0


def batch() -> tuple[Exited, torch.Tensor]:
    torch.manual_seed(0)
    logits = tuple((3 * torch.randn(B, C)).requires_grad_() for _ in range(EXITS))
    features = tuple(torch.randn(B, 6, 2, 3).requires_grad_() for _ in range(EXITS))
    return Exited(logits, features), torch.randint(0, C, (B,))


def probabilities(logits: torch.Tensor, temperature: float) -> list[float]:
    powers = [math.exp(v / temperature) for v in logits.tolist()]
    return [p / sum(powers) for p in powers]


def cross_entropies(found: Exited, y: torch.Tensor) -> list[float]:
    """CE(q_i, y) of each exit."""
    return [sum(-math.log(probabilities(exit[b], 1)[y[b]]) for b in range(B)) / B for exit in found.logits]


def divergences(found: Exited) -> list[float]:
    """T^2 KL(q_C || q_i) of each exit but the deepest."""
    total = []
    for exit in found.logits[:-1]:
        pairs = [(probabilities(found.logits[-1][b], T), probabilities(exit[b], T)) for b in range(B)]
        total.append(T**2 * sum(p * math.log(p / q) for ps, qs in pairs for p, q in zip(ps, qs, strict=True)) / B)
    return total


def distances(found: Exited) -> list[float]:
    """||F_i - F_C||^2 at a position, averaged over the 2 x 3 positions, of each exit but the deepest."""
    deepest = found.features[-1]
    return [sum(((f[b] - deepest[b]) ** 2).sum().item() for b in range(B)) / B / 6 for f in found.features[:-1]]


def target(y: torch.Tensor) -> self_distil.Target:
    return lambda s: F.cross_entropy(s, y)


@pytest.mark.parametrize(("alpha", "lambda_"), [(0.0, 0.0), (0.3, 0.0), (1.0, 0.0), (0.0, 0.01), (0.3, 0.01)])
def test_objective_is_the_papers_sum_of_ten_terms(alpha: float, lambda_: float) -> None:
    found, y = batch()
    ce, kl, hints = cross_entropies(found, y), divergences(found), distances(found)
    assert (len(ce), len(kl), len(hints)) == (4, 3, 3)
    expected = ce[3] + sum((1 - alpha) * ce[i] + alpha * kl[i] + lambda_ * hints[i] for i in range(3))
    assert self_distil.objective(found, target(y), alpha, lambda_, T).item() == pytest.approx(expected, rel=1e-5)


def test_the_deepest_exit_learns_from_its_target_alone() -> None:
    found, y = batch()
    self_distil.objective(found, target(y), 0.3, 0.01, T).backward()
    assert found.features[-1].grad is None
    with_all = found.logits[-1].grad
    alone = found.logits[-1].detach().requires_grad_()
    target(y)(alone).backward()
    assert with_all is not None
    assert alone.grad is not None
    assert torch.equal(with_all, alone.grad)


def test_terms_do_not_grow_with_the_batch() -> None:
    found, y = batch()
    twice = Exited(tuple(torch.cat([s, s]) for s in found.logits), tuple(torch.cat([f, f]) for f in found.features))
    once = self_distil.objective(found, target(y), 0.3, 0.01, T)
    assert self_distil.objective(twice, target(torch.cat([y, y])), 0.3, 0.01, T).item() == pytest.approx(once.item(), rel=1e-5)


def test_terms_do_not_grow_with_the_resolution() -> None:
    found, y = batch()
    larger = Exited(found.logits, tuple(f.repeat_interleave(4, 2).repeat_interleave(4, 3) for f in found.features))
    once = self_distil.objective(found, target(y), 0.3, 0.01, T)
    assert self_distil.objective(larger, target(y), 0.3, 0.01, T).item() == pytest.approx(once.item(), rel=1e-5)


def test_it_learns_every_exit_and_is_a_function_of_params_and_seed(data: Path, tmp_path: Path) -> None:
    metrics = self_distilled(data, tmp_path / "a")
    self_distilled(data, tmp_path / "b")
    assert artifact.identity(tmp_path / "a") == artifact.identity(tmp_path / "b")
    assert {"holdout_top1", "holdout_top1_exit1", "holdout_top1_exit2"} < metrics.keys()
    start, _ = network.start_exits(network.Network.model_validate(SMALL), SCRATCH, CLASSES, 0)
    after = checkpoint.weights(tmp_path / "a")
    moved = {name for name, tensor in start.state_dict().items() if not torch.equal(tensor, after[name])}
    assert {"trunk.linear.weight", "branches.1.linear.weight", "branches.2.linear.weight"} < moved
    training = checkpoint.describe(tmp_path / "a").training
    assert (training["steps"], training["labelled"], training["unlabelled"]) == (4, 18, 0)


@pytest.mark.parametrize("change", [{"alpha": 0.0}, {"lambda": 0.0}, {"temperature": 1.0}])
def test_each_weight_changes_the_result(data: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    params: dict[str, Any] = {"alpha": 0.3, "lambda": 0.1, "temperature": 3.0}
    self_distilled(data, tmp_path / "a", **params)
    self_distilled(data, tmp_path / "b", **{**params, **change})
    assert artifact.identity(tmp_path / "a") != artifact.identity(tmp_path / "b")


def test_every_other_stage_sees_an_ordinary_classifier(data: Path, tmp_path: Path) -> None:
    self_distilled(data, tmp_path / "byot")
    scored(data, tmp_path / "byot", tmp_path / "scores")
    distilled(data, tmp_path / "student", tmp_path / "byot")
    distilled(data, tmp_path / "finetuned", tmp_path / "byot", init_path=tmp_path / "byot")
    taught(data, tmp_path / "taught", init_path=tmp_path / "byot", model=None)
    for made in ("student", "finetuned", "taught"):
        assert checkpoint.describe(tmp_path / made).options == {"width": 4}
    assert checkpoint.describe(tmp_path / "taught").training["steps"] == 8


def test_an_exit_becomes_a_model_directory_of_its_own(data: Path, tmp_path: Path) -> None:
    self_distilled(data, tmp_path / "byot")
    taught(data, tmp_path / "cut", init_path=tmp_path / "byot", model=None, exit=1, training=None)
    assert checkpoint.describe(tmp_path / "cut").options == {"width": 4, "exits": 1}
    x = torch.randn(2, 3, 16, 16)
    whole = network.load_exits(tmp_path / "byot", CLASSES)
    assert whole is not None
    with torch.no_grad():
        assert torch.equal(network.load(tmp_path / "cut", CLASSES)[0].eval()(x), whole.eval()(x).logits[0])
    distilled(data, tmp_path / "student", tmp_path / "cut")  # and it can teach


def test_a_self_distilled_network_is_a_student_of_ssld(data: Path, tmp_path: Path) -> None:
    teacher = taught(data, tmp_path / "teacher")
    before = artifact.identity(teacher)
    metrics = self_distilled(data, tmp_path / "a", teacher, chosen=data / "pool")
    assert metrics["images"] == 20 + 18
    assert artifact.identity(artifact.verify(teacher)) == before
    training = checkpoint.describe(tmp_path / "a").training
    assert (training["labelled"], training["unlabelled"]) == (18, 20)
    whole = architectures.create("resnet8", 3, {"width": 4, "exits": "all"})
    plain = architectures.create("resnet8", 3, {"width": 4})
    assert training["macs"] == 4 * 8 * (3 * architectures.macs(whole, 16) + architectures.macs(plain, 16))
    assert self_distilled(data, tmp_path / "b", teacher, chosen=data / "pool", labelled=False)["images"] == 20


def test_with_a_teacher_no_label_is_read(data: Path, tmp_path: Path) -> None:
    teacher = taught(data, tmp_path / "teacher")
    train = manifest.read(data / "train")
    column = train.table.schema.get_field_index("label")
    labels = np.random.default_rng(0).permutation(train.labels()).astype(np.int32)
    with artifact.writing(tmp_path / "data" / "train") as tmp:
        manifest.write(tmp, train.table.set_column(column, "label", pa.array(labels)), train.classes)
    (tmp_path / "data" / "holdout").symlink_to(data / "holdout")
    self_distilled(data, tmp_path / "a", teacher, chosen=data / "pool")
    self_distilled(tmp_path / "data", tmp_path / "b", teacher, chosen=data / "pool")
    a, b = (checkpoint.weights(tmp_path / name) for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_labels_are_needed_where_nobody_teaches(data: Path, tmp_path: Path) -> None:
    with pytest.raises(manifest.ManifestError, match="20 of 20 images have no label"):
        self_distilled(data, tmp_path / "a", chosen=data / "pool")


def test_a_teacher_that_is_no_model_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, artifact.ArtifactError)):
        self_distilled(data, tmp_path / "a", SCRATCH)


def test_it_goes_on_from_a_self_distilled_network(data: Path, tmp_path: Path) -> None:
    self_distilled(data, tmp_path / "a")
    self_distilled(data, tmp_path / "b", init_path=tmp_path / "a")
    history = json.loads((tmp_path / "b" / "history.json").read_text())
    assert checkpoint.describe(tmp_path / "b").training["steps"] == 8
    assert "top1_exit1" in history["holdout"][0]
