"""teach, score, distil and evaluate on twenty-four tiny images, called as functions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.harness.journal import Journal
from pipeline.learning import losses
from pipeline.learning import teachers as soft_labels
from pipeline.models import architectures, checkpoint, device, inputs, network, prediction
from pipeline.models.checkpoint import CheckpointError
from pipeline.report import evaluation
from pipeline.stages import distil, evaluate, score
from pipeline.store import artifact, manifest
from pipeline.store.decode import decode
from tests.tiny import MACHINE, SMALL, TRAINING, distilled, scored, self_distilled, taught


def test_teach_is_a_function_of_params_and_seed(data: Path, tmp_path: Path) -> None:
    first, again, other = (taught(data, tmp_path / str(i), seed, tmp_path / f"s{i}") for i, seed in enumerate((0, 0, 1)))
    assert artifact.identity(first) == artifact.identity(again)
    assert artifact.identity(first) != artifact.identity(other)
    history = json.loads((first / "history.json").read_text())
    assert [entry["step"] for entry in history["holdout"]] == [1, 2, 3, 4]


def test_teach_without_training_brings_a_model_in_unchanged(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    theirs = architectures.create("resnet8", 3, {"width": 4})
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model = {**SMALL, "source_classes": ["cat", "bee", "ant"]}
    out = taught(data, tmp_path / "out", init_path=tmp_path / "theirs.pth", model=model, training=None)
    ours = network.load(out, ("ant", "bee", "cat"))[0].eval()
    x = torch.randn(4, 3, 16, 16)
    assert torch.allclose(ours(x), theirs.eval()(x)[:, [2, 1, 0]], atol=1e-6)


def test_a_student_at_a_low_temperature_is_read_at_it(data: Path, tmp_path: Path) -> None:
    teacher, cold = taught(data, tmp_path / "teacher"), {"name": "soft_ce", "temperature": 0.1}
    distilled(data, tmp_path / "student", teacher, loss=cold, alpha=0.5)
    assert checkpoint.describe(tmp_path / "student").temperature == 0.1
    during = json.loads((tmp_path / "student" / "history.json").read_text())["holdout"][-1]["nll"]
    paths = {
        "train": data / "train",
        "val": data / "val",
        "holdout": data / "holdout",
        "leaks": data / "leaks",
        "model": tmp_path / "student",
    }
    evaluate.run(evaluate.Evaluate(model="-", role="candidate"), **paths, out=tmp_path / "e", journal=Journal(), machine=MACHINE)
    assert evaluation.read(tmp_path / "e").holdout.nll == pytest.approx(during, abs=1e-5)
    kept = taught(data, tmp_path / "kept", init_path=tmp_path / "student", model=None, training=None)
    tuned = taught(data, tmp_path / "tuned", init_path=tmp_path / "student", model=None)
    self_distilled(data, tmp_path / "exits", teacher, loss=cold)
    assert [checkpoint.describe(m).temperature for m in (kept, tuned, tmp_path / "exits")] == [0.1, 1, 0.1]


def test_distil_reads_no_label_of_the_images_it_trains_on(data: Path, tmp_path: Path) -> None:
    teacher = taught(data, tmp_path / "teacher")
    distilled(data, tmp_path / "a", teacher)
    shuffled = tmp_path / "shuffled"
    train = manifest.read(data / "train")
    column = train.table.schema.get_field_index("label")
    labels = np.random.default_rng(0).permutation(train.labels()).astype(np.int32)
    with artifact.writing(shuffled / "train") as tmp:
        manifest.write(tmp, train.table.set_column(column, "label", pa.array(labels)), train.classes)
    (shuffled / "holdout").symlink_to(data / "holdout")
    (shuffled / "pool").symlink_to(data / "pool")
    distilled(shuffled, tmp_path / "b", teacher)
    a, b = (checkpoint.weights(tmp_path / name) for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_hard_labels_are_smoothed_as_the_training_says() -> None:
    """With labels of two of three images; the third adds nothing, and N counts it."""
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0], [9.0, 0.0, 0.0]])
    log_q = logits.log_softmax(1)
    soft = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    value = distil.cross_entropy(logits, torch.tensor([0, 2, distil.UNKNOWN]), 0.3)
    assert value.item() == pytest.approx(-(soft * log_q[:2]).sum().item() / 3)


def test_smoothing_changes_what_is_learned_where_labels_are_read(data: Path, tmp_path: Path) -> None:
    teacher = taught(data, tmp_path / "teacher")
    for name, alpha, smoothing in (("hard", 0.5, 0), ("soft", 0.5, 0.3), ("none", 1.0, 0), ("none-soft", 1.0, 0.3)):
        distilled(data, tmp_path / name, teacher, alpha=alpha, training={**TRAINING, "smoothing": smoothing})
    weights = {name: checkpoint.weights(tmp_path / name)["linear.weight"] for name in ("hard", "soft", "none", "none-soft")}
    assert not torch.equal(weights["hard"], weights["soft"])
    assert torch.equal(weights["none"], weights["none-soft"])


FIX = {**TRAINING, "frozen": ["conv1", "bn1", "layer1", "layer2", "layer3.0.conv", "layer3.0.bn1"]}
LARGER = {**SMALL, "input": {"size": 20, "canvas": 24}}


@pytest.mark.parametrize("stage", ["teach", "distil"])
def test_a_fine_tune_of_the_head_at_a_larger_input(data: Path, tmp_path: Path, stage: str) -> None:
    """The Fix step (Touvron et al. 2019): the classifier and the last normalisation learn, on larger images."""
    teacher = taught(data, tmp_path / "teacher")
    out = tmp_path / "fixed"
    if stage == "teach":
        taught(data, out, scratch=tmp_path / "s-fix", init_path=teacher, model=LARGER, training=FIX)
    else:
        distilled(data, out, teacher, init_path=teacher, model=LARGER, training=FIX)
    before, after = checkpoint.weights(teacher), checkpoint.weights(out)
    moved = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"layer3.0.bn2", "linear"}
    description = checkpoint.describe(out)
    assert (description.input.size, description.input.canvas) == (20, 24)
    larger = architectures.macs(network.load(out, ("ant", "bee", "cat"))[0], 20)
    seen = description.training["macs"] - checkpoint.describe(teacher).training["macs"]
    assert seen >= 4 * 8 * 3 * larger
    scored(data, out, tmp_path / "scores")


def test_distil_adds_the_labelled_images_once(data: Path, tmp_path: Path) -> None:
    teacher = taught(data, tmp_path / "teacher")
    assert distilled(data, tmp_path / "a", teacher)["images"] == 20 + 18
    assert distilled(data, tmp_path / "b", teacher, labelled=False)["images"] == 20
    assert distilled(data, tmp_path / "c", teacher, chosen=data / "train")["images"] == 18


def test_a_fine_tune_has_seen_what_its_start_had_seen(data: Path, tmp_path: Path) -> None:
    teacher = taught(data, tmp_path / "teacher")
    distilled(data, tmp_path / "ssld", teacher)
    distilled(data, tmp_path / "finetune", teacher, chosen=data / "train", init_path=tmp_path / "ssld")
    training = checkpoint.describe(tmp_path / "finetune").training
    assert (training["steps"], training["labelled"], training["unlabelled"]) == (8, 18, 20)


def test_the_compute_of_a_training_includes_the_teachers_passes_and_the_starts(data: Path, tmp_path: Path) -> None:
    teacher = taught(data, tmp_path / "teacher", model={**SMALL, "options": {"width": 8}})
    distilled(data, tmp_path / "ssld", teacher)
    distilled(data, tmp_path / "finetune", teacher, chosen=data / "train", init_path=tmp_path / "ssld")
    small, large = (architectures.macs(architectures.create("resnet8", 3, {"width": w}), 16) for w in (4, 8))
    assert checkpoint.describe(teacher).training["macs"] == 4 * 8 * 3 * large
    assert checkpoint.describe(tmp_path / "finetune").training["macs"] == 2 * 4 * 8 * (3 * small + large)


def test_teacher_and_student_see_the_same_view_each_with_its_own_normalisation(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = taught(data, tmp_path / "teacher", model={**SMALL, "input": {"size": 16, "mean": [0, 0, 0], "std": [1, 1, 1]}})
    seen: list[tuple[torch.Tensor, inputs.Input]] = []
    plain = inputs.normalise

    def recorded(batch: torch.Tensor, to: inputs.Input) -> torch.Tensor:
        seen.append((batch, to))
        return plain(batch, to)

    monkeypatch.setattr(inputs, "normalise", recorded)
    distilled(data, tmp_path / "a", teacher, training={**TRAINING, "steps": 1})
    (first, teachers), (second, students) = seen[:2]
    assert first is second
    assert (teachers.mean, students.mean) == ((0, 0, 0), inputs.Input(size=16).mean)


@pytest.mark.parametrize("statistics", ["eval", "batch"])
def test_the_teachers_statistics_are_chosen_and_never_change(data: Path, tmp_path: Path, statistics: str) -> None:
    taught(data, tmp_path / "teacher")
    model, _, given = network.load(tmp_path / "teacher", ("ant", "bee", "cat"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reference = network.load(tmp_path / "teacher", ("ant", "bee", "cat"))[0]
    reference.train(statistics == "batch")
    frozen = device.pick(MACHINE).place(soft_labels._frozen(model, statistics))
    views = 255 * torch.rand(8, 3, 16, 16)
    with torch.no_grad():
        got = prediction.forward(frozen, views, given, device.pick(MACHINE))
        expected = reference(inputs.normalise(views, given))
    assert torch.allclose(got, expected, atol=1e-4)
    on_disk = network.load(tmp_path / "teacher", ("ant", "bee", "cat"))[0].state_dict()
    assert all(torch.equal(before[name], on_disk[name]) for name in before)


def test_distilling_leaves_the_teacher_on_disk_untouched(data: Path, tmp_path: Path) -> None:
    teacher = taught(data, tmp_path / "teacher")
    identity = artifact.identity(teacher)
    distilled(data, tmp_path / "a", teacher, teacher_bn="batch")
    assert artifact.identity(artifact.verify(teacher)) == identity


def test_scores_are_the_teachers_best_classes_in_the_pools_order(data: Path, tmp_path: Path) -> None:
    teacher = taught(data, tmp_path / "teacher")
    table = pq.read_table(scored(data, teacher, tmp_path / "out") / "scores.parquet")
    model, _, given = network.load(teacher, ("ant", "bee", "cat"))
    pool = manifest.read(data / "pool")
    decoded = [inputs.canvas(decode(raw), 16) for raw in manifest.image_bytes(pool, range(len(pool)))]
    with torch.no_grad():
        logits = model.eval()(inputs.normalise(torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2), given))
    best = logits.sort(1, descending=True)
    assert table["class_0"].to_pylist() == best.indices[:, 0].tolist()
    assert table["class_1"].to_pylist() == best.indices[:, 1].tolist()
    assert np.allclose(table["logit_1"], best.values[:, 1], atol=1e-4)
    assert np.allclose(table["logsumexp"], logits.logsumexp(1), atol=1e-4)
    assert table.schema.metadata[b"manifest"].decode() == artifact.identity(data / "pool")


def test_scores_do_not_depend_on_shards_or_on_a_kill(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = taught(data, tmp_path / "teacher")
    whole = pq.read_table(scored(data, teacher, tmp_path / "a" / "out") / "scores.parquet")
    monkeypatch.setattr(prediction, "BATCH", 4)
    monkeypatch.setattr(score, "SHARD", 8)
    shards, calls = score._scores, []

    def dies(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return shards(*args)

    monkeypatch.setattr(score, "_scores", dies)
    with pytest.raises(KeyboardInterrupt):
        scored(data, teacher, tmp_path / "b" / "out")
    assert not (tmp_path / "b" / "out").exists()
    resumed = pq.read_table(scored(data, teacher, tmp_path / "b" / "out") / "scores.parquet")
    assert len(calls) == 5  # one shard was done, one died, two were left; and the held-out images
    assert resumed["class_0"] == whole["class_0"]
    assert np.allclose(resumed["logit_0"], whole["logit_0"], atol=1e-4)


def test_a_teacher_of_other_classes_is_refused(data: Path, tmp_path: Path) -> None:
    model = architectures.create("resnet8", 2, {"width": 4})
    given = inputs.Input(size=16)
    with artifact.writing(tmp_path / "teacher") as tmp:
        checkpoint.save(tmp, model, checkpoint.Description("resnet8", ("ant", "dog"), given, {"width": 4}), {})
    with pytest.raises(CheckpointError, match="knows the classes ant, dog, the images the classes ant, bee, cat"):
        scored(data, tmp_path / "teacher", tmp_path / "out")


def test_hard_labels_are_added_where_they_are_known(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step on all images: alpha times the mean divergence, 1 - alpha times the sum of the known cross entropies over all."""
    teacher = taught(data, tmp_path / "teacher")
    terms: dict[str, torch.Tensor] = {}
    soft, hard = losses.SoftLoss.__call__, distil.cross_entropy

    def softly(self: losses.SoftLoss, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        terms["soft"] = soft(self, s, t).detach()
        return soft(self, s, t)

    def recorded(logits: torch.Tensor, y: torch.Tensor, smoothing: float) -> torch.Tensor:
        terms["logits"], terms["y"] = logits.detach(), y
        return hard(logits, y, smoothing)

    monkeypatch.setattr(losses.SoftLoss, "__call__", softly)
    monkeypatch.setattr(distil, "cross_entropy", recorded)
    training = {**TRAINING, "steps": 1, "batch": 38}
    distilled(data, tmp_path / "a", teacher, alpha=0.75, labels=2, training=training)
    y, log_q = terms["y"].tolist(), terms["logits"].log_softmax(1)
    assert sorted(y) == [-1] * 32 + [0, 0, 1, 1, 2, 2]
    naive = -sum(float(log_q[i, c]) for i, c in enumerate(y) if c >= 0) / 38
    loss = json.loads((tmp_path / "a" / "history.json").read_text())["train"][0]["loss"]
    assert loss == pytest.approx(0.75 * float(terms["soft"]) + 0.25 * naive, rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 0.5, "labelled": False}, "takes labels from the labelled images"),
        ({"labels": 3}, "only where `alpha` is below 1"),
        ({"alpha": 0.5, "mix": {"mixup": 1}}, "one label each"),
    ],
)
def test_hard_labels_that_cannot_be_read_are_refused(wrong: dict[str, Any], message: str) -> None:
    section = {"init": "-", "teacher": "-", "images": "-", "training": TRAINING, **wrong}
    with pytest.raises(ValueError, match=message):
        distil.Distil.model_validate(section)


def test_a_manifest_knows_the_labels_of_others_by_their_ids(data: Path) -> None:
    train, pool = manifest.read(data / "train"), manifest.read(data / "pool")
    some = train.take(np.array([3, 5, 11]))
    found = some.labels_of(manifest.concat([pool, train]), -1)
    assert sorted(found[found >= 0]) == sorted(some.labels())
    assert (found >= 0).sum() == 3
