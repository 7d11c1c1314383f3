"""What an evaluation says of one classifier, and of a network with several exits."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.harness.journal import Journal
from pipeline.harness.machine import Machine
from pipeline.models import architectures, exits, inputs, network
from pipeline.models.exits import ExitError
from pipeline.report import corruptions, measure, statistics
from pipeline.report.evaluation import Evaluation, read
from pipeline.stages import evaluate, score
from pipeline.store import artifact, manifest
from tests.tiny import MACHINE, leaks_of, self_distilled, taught

CLASSES = ("ant", "bee", "cat")


def evaluated(
    data: Path, model: Path, out: Path, leaks: Path | None = None, **params: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics and evaluation.json."""
    metrics = evaluate.run(
        evaluate.Evaluate.model_validate({"role": "candidate", "model": "-", **params}),
        train=data / "train",
        val=data / "val",
        holdout=data / "holdout",
        leaks=leaks or data / "leaks",
        model=model,
        out=out,
        journal=Journal(),
        machine=MACHINE,
    )
    return dict(metrics), json.loads((out / "evaluation.json").read_text())


def test_clean_val_leaves_out_the_images_with_a_copy_that_was_learned_from(data: Path, tmp_path: Path) -> None:
    model = taught(data, tmp_path / "model")
    ids = manifest.read(data / "val").table["id"].to_pylist()
    copies = [
        (ids[0], "train", "t", "copy", True),
        (ids[1], "pool", "p", "copy", True),
        (ids[2], "pool", "q", "copy", False),  # it was taken out of the pool
        (ids[3], "train", "u", "review", True),  # it may be none
        (ids[4], "val", ids[5], "copy", True),  # nobody learned from it
    ]
    _, evaluation = evaluated(data, model, tmp_path / "out", leaks_of(tmp_path / "leaks", copies))
    said = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    right = [row["label"] == row["predicted"] for row in said if row["id"] not in ids[:2]]
    assert (evaluation["clean"]["n"], evaluation["clean"]["top1"]) == (7, pytest.approx(sum(right) / 7))
    unknown = leaks_of(tmp_path / "unknown", [], searched="pool-val")  # the labelled images were not searched
    assert "clean" not in evaluated(data, model, tmp_path / "other", unknown)[1]


def test_evaluate_reports_what_the_predictions_say(data: Path, tmp_path: Path) -> None:
    metrics, evaluation = evaluated(data, taught(data, tmp_path / "model"), tmp_path / "out")
    predictions = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pandas()
    right = predictions["label"] == predictions["predicted"]
    assert metrics["val_top1"] == pytest.approx(right.mean())
    assert predictions["id"].tolist() == manifest.read(data / "val").table["id"].to_pylist()
    assert evaluation["val"]["per_class"] == {
        n: pytest.approx(right[predictions["label"] == i].mean()) for i, n in enumerate(CLASSES)
    }
    assert (evaluation["val"]["n"], evaluation["holdout"]["n"], evaluation["training"]["labelled"]) == (9, 6, 18)
    held = pq.read_table(tmp_path / "out" / "predictions-holdout.parquet").to_pandas()
    assert evaluation["holdout"]["top1"] == pytest.approx((held["label"] == held["predicted"]).mean())
    assert held["id"].tolist() == manifest.read(data / "holdout").table["id"].to_pylist()
    with (tmp_path / "out" / "confusion.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        pairs = (predictions["label"] == CLASSES.index(row["class"])) & (predictions["predicted"] == CLASSES.index(row["named"]))
        assert int(row["images"]) == pairs.sum()
    assert sum(int(row["images"]) for row in rows) == 9
    mistakes = [int(row["images"]) for row in rows if row["class"] != row["named"]]
    assert mistakes == sorted(mistakes, reverse=True)


def test_all_compute_counts_each_run_above_the_model_once(data: Path, tmp_path: Path) -> None:
    scored = {"stage": "score", "key": "s", "macs": 700}
    drawn = {"stage": "draw", "key": "d"}
    token = artifact.provenance.set({"stage": "teach", "key": "t", "lineage": {"s": scored, "d": drawn}})
    model = taught(data, tmp_path / "model")
    artifact.provenance.reset(token)
    training = evaluated(data, model, tmp_path / "out")[1]["training"]
    assert training["macs"] > 0
    assert training["macs_all"] == training["macs"] + 700
    again = evaluated(data, taught(data, tmp_path / "by hand"), tmp_path / "again")[1]["training"]
    assert again["macs_all"] is None, "no record, no compute that is known"


def test_calibration_error_and_interval_follow_their_formulas() -> None:
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(500, 10, generator=random)
    labels = torch.randint(0, 10, (500,), generator=random)
    measured = measure.measure(logits, labels, tuple("abcdefghij"))
    sure, said = logits.softmax(1).max(1)
    right = (said == labels).float()
    expected = 0.0
    for i in range(15):  # Guo et al. (2017): the gap of each bin of confidence, weighted with the images in it
        expected += abs(sum(float(sure[n] - right[n]) for n in range(500) if i / 15 < sure[n] <= (i + 1) / 15)) / 500
    assert measured.ece == pytest.approx(expected, abs=1e-5)
    # Wilson's interval for 81 of 263, worked by hand from his formula (1927).
    assert statistics.wilson(81, 263) == pytest.approx((0.25529, 0.36620), abs=1e-5)
    assert statistics.wilson(0, 10)[0] == pytest.approx(0, abs=1e-9)


def test_reliability_counts_each_image_in_its_bin() -> None:
    bins = statistics.reliability(np.array([0.0, 0.05, 0.5, 0.99, 1.0]), np.array([True, False, True, True, False]))
    assert len(bins) == 15
    assert bins[0] == (2, 0.025, 0.5)
    assert bins[7] == (1, 0.5, 1.0)
    assert bins[14] == (2, 0.995, 0.5)
    assert sum(n for n, _, _ in bins) == 5


def test_every_exit_is_measured_beside_its_compute(data: Path, tmp_path: Path) -> None:
    self_distilled(data, tmp_path / "byot", training={"steps": 12, "batch": 8, "lr": 0.05})
    metrics, evaluation = evaluated(data, tmp_path / "byot", tmp_path / "out")
    rows = {row["exit"]: row for row in evaluation["exits"]["rows"]}
    assert list(rows) == ["1", "2", "3", "ensemble", "early"]
    for name, exit in (("1", 1), ("2", 2), ("3", 3), ("ensemble", "ensemble"), ("early", "early")):
        _, alone = evaluated(data, tmp_path / "byot", tmp_path / name, exit=exit)
        assert rows[name]["val_top1"] == alone["val"]["top1"]
        assert rows[name]["holdout_top1"] == alone["holdout"]["top1"]
        assert rows[name]["macs"] == alone["model"]["macs"]
        assert rows[name]["parameters"] == alone["model"]["parameters"]
    assert rows["1"]["macs"] < rows["2"]["macs"] < rows["3"]["macs"] < rows["ensemble"]["macs"]
    assert evaluation["val"]["top1"] == rows["3"]["val_top1"] == metrics["exits"]["3"]
    assert evaluation["model"]["macs"] == architectures.macs(architectures.create("resnet8", 3, {"width": 4}), 16)
    assert sum(evaluation["exits"]["leaving"]) == pytest.approx(1)
    assert rows["early"]["holdout_top1"] >= rows["3"]["holdout_top1"]
    costs = [point["macs"] for point in evaluation["exits"]["curve"]]
    assert costs == sorted(costs)


def test_an_exit_of_an_ordinary_network_is_refused(data: Path, tmp_path: Path) -> None:
    model = taught(data, tmp_path / "model")
    for exit in (1, "ensemble", "early"):
        with pytest.raises(ExitError, match="has no exits"):
            evaluated(data, model, tmp_path / "out", exit=exit)


def undecided(seed: int = 0, n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 3, 4) logits, later exits surer and better, and (N,) labels."""
    torch.manual_seed(seed)
    labels = torch.randint(0, 4, (n,))
    strength = torch.tensor([0.8, 1.2, 1.6]).view(1, 3, 1)
    return torch.randn(n, 3, 4) + 2 * strength * torch.nn.functional.one_hot(labels, 4)[:, None], labels


@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.9, 1.01])
def test_an_image_leaves_at_the_first_exit_that_is_sure(threshold: float) -> None:
    logits, _ = undecided()
    probabilities = logits.softmax(2)
    for image, at in zip(probabilities, exits.leaving(logits, threshold).tolist(), strict=True):
        sure = [i for i in range(3) if float(image[i].max()) >= threshold]
        assert at == (sure[0] if sure else 2)


def test_early_exits_compute_what_the_whole_network_would_have_said() -> None:
    torch.manual_seed(0)
    whole = architectures.create("resnet8", 10, {"width": 4, "exits": "all"}).eval()
    assert isinstance(whole, exits.Exits)
    x = 3 * torch.randn(64, 3, 16, 16)
    with torch.no_grad():
        whole.branches["2"].linear.weight *= 3  # type: ignore[operator,union-attr]  # surer than its neighbours
        stacked = exits.Stacked(whole)(x)
        for threshold in (0.0, float(stacked.softmax(2).amax(2).median()), 1.01):
            at = exits.leaving(stacked, threshold)
            assert torch.allclose(exits.Early(whole, threshold)(x), stacked[torch.arange(64), at], atol=1e-4)
            if 0 < threshold < 1:
                assert len(at.unique()) == 3


def test_the_ensemble_is_the_mean_of_probabilities() -> None:
    logits, _ = undecided()
    assert torch.allclose(exits.mean_probability(logits).softmax(1), logits.softmax(2).mean(1), atol=1e-6)


def test_the_cheapest_threshold_loses_nothing_on_the_images_it_is_chosen_on() -> None:
    logits, labels = undecided(n=400)
    costs = [10, 25, 60]
    chosen = measure.cheapest(logits, labels, costs)

    def share(threshold: float) -> float:
        at = exits.leaving(logits, threshold)
        return float((logits[torch.arange(400), at].argmax(1) == labels).double().mean())

    def cost(threshold: float) -> float:
        return float(np.mean([costs[i] for i in exits.leaving(logits, threshold).tolist()]))

    assert share(chosen) >= share(1.01)
    assert all(share(t) < share(1.01) for t in measure.THRESHOLDS if cost(t) < cost(chosen) - 1)
    assert measure.mean_cost(exits.leaving(logits, chosen), costs) == round(cost(chosen))


def test_a_larger_input_costs_more_and_the_canvas_grows_with_it(data: Path, tmp_path: Path) -> None:
    model = taught(
        data, tmp_path / "model", model={"arch": "resnet8", "options": {"width": 4}, "input": {"size": 12, "crop": 0.75}}
    )
    _, plain = evaluated(data, model, tmp_path / "a")
    _, larger = evaluated(data, model, tmp_path / "b", size=24)
    assert (plain["model"]["input"], larger["model"]["input"]) == (12, 24)
    assert larger["model"]["macs"] > 3 * plain["model"]["macs"]
    assert larger["val"]["nll"] != plain["val"]["nll"]


def test_corruptions_and_times_are_there_when_asked_for(data: Path, tmp_path: Path) -> None:
    model = taught(data, tmp_path / "model")
    metrics, plain = evaluated(data, model, tmp_path / "a")
    assert not {"corruptions", "speed"} & plain.keys()
    asked, full = evaluated(data, model, tmp_path / "b", corruptions=True, timing=True)
    assert {k: v for k, v in asked.items() if "corrupted" not in k} == metrics  # no time in the metrics
    shares = full["corruptions"]["val"]
    assert list(shares) == list(corruptions.CORRUPTIONS)
    assert all(len(s) == 3 for s in shares.values())
    assert asked["val_corrupted_top1"] == pytest.approx(np.mean(list(shares.values())))
    assert full["speed"]["images_per_second"]["whole"] > 0
    assert (full["speed"]["device"], full["speed"]["threads"]) == ("cpu", 1)


def test_without_times_an_evaluation_has_the_same_bits_again(data: Path, tmp_path: Path) -> None:
    self_distilled(data, tmp_path / "byot")
    identities = []
    for name in "ab":
        evaluated(data, tmp_path / "byot", tmp_path / name, corruptions=True)
        identities.append(artifact.identity(tmp_path / name))
    assert identities[0] == identities[1]
    _, timed = evaluated(data, tmp_path / "byot", tmp_path / "c", timing=True)
    assert list(timed["speed"]["images_per_second"]) == ["1", "2", "3", "ensemble", "early"]
    assert network.load_exits(tmp_path / "byot", CLASSES) is not None


def test_records_say_the_dtype_and_evaluation_is_float32(data: Path, tmp_path: Path) -> None:
    half_precision = MACHINE.model_copy(update={"precision": "bfloat16"})
    model = taught(data, tmp_path / "model")
    paths = {"pool": data / "pool", "train": data / "train", "holdout": data / "holdout", "teacher": model}
    score.run(score.Score(teacher="-"), **paths, out=tmp_path / "scores", workdir=tmp_path / "w", machine=half_precision)
    about = pq.read_schema(tmp_path / "scores" / "scores.parquet").metadata
    assert about[b"precision"] == b"bfloat16"

    def measured(machine: Machine, out: Path) -> Evaluation:
        paths = {
            "train": data / "train",
            "val": data / "val",
            "holdout": data / "holdout",
            "leaks": data / "leaks",
            "model": model,
            "out": out,
        }
        evaluate.run(evaluate.Evaluate(model="-", role="candidate"), **paths, journal=Journal(), machine=machine)
        return read(out)

    half, single = measured(half_precision, tmp_path / "a"), measured(MACHINE, tmp_path / "b")
    assert half == single
    assert half.dtype == "float32"


def test_mirror_answers_with_the_mean_over_both_images(data: Path, tmp_path: Path) -> None:
    model = taught(data, tmp_path / "model")
    _, plain = evaluated(data, model, tmp_path / "plain")
    _, both = evaluated(data, model, tmp_path / "both", mirror=True)
    assert (plain["model"]["mirror"], both["model"]["mirror"]) == (False, True)
    assert both["model"]["macs"] == 2 * plain["model"]["macs"]
    assert both["model"]["parameters"] == plain["model"]["parameters"]
    classifier, _, input_spec = network.load(model, CLASSES)
    images = manifest.read(data / "val")
    x = inputs.normalise(inputs.load(images, input_spec.side, MACHINE, "val").gather(np.arange(len(images))), input_spec)
    with torch.no_grad():
        logits = (classifier.eval()(x) + classifier(x.flip(3))) / 2
    said = pq.read_table(tmp_path / "both" / "predictions.parquet")
    assert np.allclose(said["confidence"].to_numpy(), logits.softmax(1).max(1).values.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="early"):
        evaluate.Evaluate.model_validate({"role": "candidate", "model": "-", "mirror": True, "exit": "early"})


def test_a_class_that_val_lacks_is_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "holdout", "leaks"):
        (tmp_path / name).symlink_to(data / name)
    whole = manifest.read(data / "val")
    with artifact.writing(tmp_path / "val") as tmp:
        manifest.write(tmp, whole.take(np.flatnonzero(whole.labels() != 2)).table, whole.classes)
    evaluated(tmp_path, taught(data, tmp_path / "model"), tmp_path / "out")
    assert f"GAP: val has no image of {list(CLASSES)[2]}: its figures" in capsys.readouterr().err
