"""Cached labels: students trained on them see what they would have seen with the teacher in the loop."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from pipeline.errors import UserError
from pipeline.learning import labels, teachers, views
from pipeline.learning.labels import Best
from pipeline.learning.losses import SoftLoss
from pipeline.learning.views import Batch
from pipeline.models import device, inputs
from pipeline.stages import label
from pipeline.store import artifact, manifest
from tests.tiny import MACHINE, TRAINING, distilled, self_distilled, taught

VIEW = {"kind": "shift", "pad": 2, "brightness": 0.2}


@pytest.fixture(scope="module")
def expert(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught(data, tmp_path_factory.mktemp("expert") / "model")


def labelled(data: Path, expert: Path, out: Path, **params: Any) -> dict[str, Any]:
    section = label.Label.model_validate({"teacher": "-", "images": "-", "m": 3, "view": VIEW, **params})
    paths = {"train": data / "train", "teacher": expert, "chosen": data / "pool", "out": out}
    return dict(label.run(section, **paths, seed=0, workdir=out.parent / f"{out.name}-scratch", machine=MACHINE))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def test_a_student_learns_from_cached_labels_what_it_learns_online(data: Path, expert: Path, tmp_path: Path) -> None:
    metrics = labelled(data, expert, tmp_path / "labels", views=3)
    assert 0 < metrics["largest_gap"] < 1e-2
    training = {**TRAINING, "steps": 10}  # 80 of 38 images: three passes
    distilled(data, tmp_path / "online", expert, training=training, view=VIEW)
    distilled(data, tmp_path / "cached", tmp_path / "labels", training=training)
    online, cached = weights(tmp_path / "online"), weights(tmp_path / "cached")
    assert all(torch.allclose(online[name].float(), cached[name].float(), atol=3e-3) for name in online)
    distilled(data, tmp_path / "other", expert, training=training, view={**VIEW, "brightness": 0.0})
    other = weights(tmp_path / "other")
    assert any(not torch.allclose(online[name].float(), other[name].float(), atol=3e-3) for name in online)


def test_labels_of_the_pool_serve_every_selection_from_it(data: Path, expert: Path, tmp_path: Path) -> None:
    labelled(data, expert, tmp_path / "labels", views=3)
    pool, classes = manifest.read(data / "pool"), manifest.read(data / "train").classes
    with artifact.writing(tmp_path / "chosen") as tmp:
        manifest.write(tmp, pool.take(np.array([2, 3, 11, 17])).table, classes)
    seen, _, _ = manifest.to_learn(tmp_path / "chosen", data / "train", True)
    on = device.pick(MACHINE)
    online = teachers.Online(expert, classes, on)
    cached = teachers.Cached(tmp_path / "labels", classes, seen, on, "eval")
    pixels = inputs.load(seen, 16, MACHINE, "test")
    rows, passes = np.arange(len(seen)), np.arange(len(seen)) % 5
    batch = Batch(cached.viewer(16, cached.view, 7, inputs.aspects(seen))(pixels.gather(rows), rows, passes), rows, passes)
    said, again = cached.answers(batch), online.answers(batch)
    assert isinstance(said, torch.Tensor)
    assert torch.allclose(said.softmax(1), again.softmax(1), atol=1e-2)
    distilled(data, tmp_path / "student", tmp_path / "labels", chosen=tmp_path / "chosen", labelled=False)


def test_views_repeat_after_the_last(data: Path, expert: Path, tmp_path: Path) -> None:
    labelled(data, expert, tmp_path / "labels", views=2)
    seen = manifest.concat([manifest.read(data / "pool"), manifest.read(data / "train")])
    on = device.pick(MACHINE)
    cached = teachers.Cached(tmp_path / "labels", manifest.read(data / "train").classes, seen, on, "eval")
    raw = inputs.load(seen, 16, MACHINE, "test").gather(np.arange(5))
    make = cached.viewer(16, cached.view, 0, inputs.aspects(seen))
    rows = np.arange(5)
    for passes, same in ((np.full(5, 2), True), (np.full(5, 1), False)):
        first = Batch(make(raw, rows, np.zeros(5, int)), rows, np.zeros(5, int))
        later = Batch(make(raw, rows, passes), rows, passes)
        assert torch.equal(first.views, later.views) == same
        said, again = cached.answers(first), cached.answers(later)
        assert isinstance(said, torch.Tensor)
        assert isinstance(again, torch.Tensor)
        assert torch.equal(said, again) == same


def test_what_the_best_classes_leave_is_one_class_at_the_temperature(data: Path, expert: Path, tmp_path: Path) -> None:
    labelled(data, expert, tmp_path / "labels", m=1, views=1, temperature=4.0)
    seen = manifest.concat([manifest.read(data / "pool"), manifest.read(data / "train")])
    classes, on = manifest.read(data / "train").classes, device.pick(MACHINE)
    cached = teachers.Cached(tmp_path / "labels", classes, seen, on, "eval")
    rows, passes = np.arange(len(seen)), np.zeros(len(seen), int)
    raw = inputs.load(seen, 16, MACHINE, "test").gather(rows)
    batch = Batch(cached.viewer(16, cached.view, 0, inputs.aspects(seen))(raw, rows, passes), rows, passes)
    said = cached.answers(batch)
    assert isinstance(said, Best)
    logits = teachers.Online(expert, classes, on).answers(batch)
    log_p, log_q = said.cells(logits)
    best = (logits / 4).softmax(1).amax(1)
    assert torch.allclose(log_p.exp(), torch.stack([best, 1 - best], 1), atol=2e-3)
    assert torch.allclose(log_q.exp(), torch.stack([best, 1 - best], 1), atol=1e-5)
    assert SoftLoss(name="kl", temperature=4.0)(logits, said).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"temperature": 2.0}, r"`loss.temperature` is 2.0, but .* keeps 2 of 3 classes, .* is known at 4.0 alone"),
        ({"standardise": True, "temperature": 4.0}, r"`loss: {standardise: true}` looks at all classes"),
        ({"name": "dist", "temperature": 4.0}, r"looks at all classes, but .* keeps 2 of 3 classes. Set `m: 3`"),
    ],
)
def test_a_loss_that_needs_more_than_is_kept_is_refused(
    data: Path, expert: Path, tmp_path: Path, loss: dict[str, Any], message: str
) -> None:
    labelled(data, expert, tmp_path / "labels", m=2, views=1, temperature=4.0)
    for train in (distilled, self_distilled):
        with pytest.raises(teachers.LabelsError, match=message):
            train(data, tmp_path / "student", tmp_path / "labels", chosen=data / "pool", loss=loss)
    labelled(data, expert, tmp_path / "all", m=3, views=1, temperature=4.0)
    distilled(data, tmp_path / "student", tmp_path / "all", loss=loss)


def test_finished_shards_are_not_labelled_again(
    data: Path, expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled(data, expert, tmp_path / "whole")
    monkeypatch.setattr(label, "SHARD", 16)
    labelled(data, expert, tmp_path / "shards")
    done = sorted((tmp_path / "shards-scratch").iterdir())
    assert len(done) == 3
    first, *rest = done
    marked = first.stat().st_mtime_ns
    for shard in rest:
        for file in shard.iterdir():
            file.unlink()
        shard.rmdir()
    labelled(data, expert, tmp_path / "shards")
    assert first.stat().st_mtime_ns == marked
    whole, shards = (labels.read(tmp_path / name) for name in ("whole", "shards"))
    assert whole.ids.equals(shards.ids)
    assert whole.kept.classes.shape == (4, 38, 3)
    for a, b in zip(whole.kept[:2], shards.kept[:2], strict=True):
        assert np.array_equal(a, b)


def test_labels_are_mapped_from_their_files_not_copied(data: Path, expert: Path, tmp_path: Path) -> None:
    """Every process of a group held all of them, twice while it read; above 2^31 entries reading failed."""
    labelled(data, expert, tmp_path / "labels", m=2, views=1)
    seen = manifest.concat([manifest.read(data / "pool"), manifest.read(data / "train")])
    cached = teachers.Cached(tmp_path / "labels", manifest.read(data / "train").classes, seen, device.pick(MACHINE), "eval")
    mapped = Path("/proc/self/maps").read_text()
    for name, array in ((labels.CLASSES, cached.classes), (labels.LOG_P, cached.log_p), (labels.LOG_REST, cached.log_rest)):
        assert array is not None
        assert str(tmp_path / "labels" / name) in mapped
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_labels_of_an_older_version_are_refused(data: Path, expert: Path, tmp_path: Path) -> None:
    labelled(data, expert, tmp_path / "labels", views=1)
    with artifact.writing(tmp_path / "old") as tmp:
        pq.write_table(pq.read_table(tmp_path / "labels" / labels.FILE), tmp / labels.FILE)
    with pytest.raises(UserError, match="as an older version of winnow wrote them"):
        distilled(data, tmp_path / "student", tmp_path / "old")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"view": {"kind": "none"}}, "`view` is not the one"),
        ({}, "none of 18 of the 38 to learn on"),
        ({"mix": {"mixup": 0.2}}, "views that nobody has labelled"),
        ({"teacher_bn": "batch"}, "needs a teacher in the loop"),
        ({"model": {"arch": "resnet8", "options": {"width": 4}, "input": {"size": 20}}}, "student takes 20 pixels"),
    ],
)
def test_labels_of_something_else_are_refused(
    data: Path, expert: Path, tmp_path: Path, params: dict[str, Any], message: str
) -> None:
    labelled(data, expert, tmp_path / "labels", views=1, labelled=bool(params))
    with pytest.raises(teachers.LabelsError, match=message):
        distilled(data, tmp_path / "student", tmp_path / "labels", **params)


def test_labels_that_do_not_fit_their_views_are_found(
    data: Path, expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label, "TOLERANCE", 1e-2)
    strong = {"kind": "crop", "scale": [0.1, 0.3], "brightness": 0.9}
    assert labelled(data, expert, tmp_path / "labels", view=strong)["largest_gap"] < 1e-2
    honest = views.viewer
    calls = iter(range(10**6))
    monkeypatch.setattr(views, "viewer", lambda size, view, seed, *more: honest(size, view, seed + next(calls), *more))
    with pytest.raises(UserError, match="made again, differ"):
        labelled(data, expert, tmp_path / "others", view=strong)
    assert not (tmp_path / "others").exists()
    assert not list((tmp_path / "others-scratch").iterdir())


def test_a_student_with_a_larger_canvas_replays_the_same_views(data: Path, expert: Path, tmp_path: Path) -> None:
    labelled(data, expert, tmp_path / "labels", views=2)
    for side in (16, 20):
        model = {"arch": "resnet8", "options": {"width": 4}, "input": {"size": 16, "canvas": side}}
        distilled(data, tmp_path / str(side), tmp_path / "labels", model=model)
    small, large = weights(tmp_path / "16"), weights(tmp_path / "20")
    assert all(torch.equal(small[name], large[name]) for name in small)
