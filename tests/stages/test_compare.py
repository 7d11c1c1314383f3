"""`compare` on made-up evaluations: its statistics, its tables, and a page that needs nothing but itself."""

import csv
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser

from pipeline.errors import UserError
from pipeline.report import page, pairs
from pipeline.report.choice import RULE
from pipeline.report.plots import PAGE_COLOURS
from pipeline.report.table import COLUMNS
from pipeline.stages import compare
from pipeline.stages.compare import Compare
from pipeline.store import artifact
from tests.browser import WIDTHS, is_cut, opened

N, HELD = 400, 200
ENTRIES = ("teacher", "baseline", "ssld", "finetune")
ROLES = {"teacher": "teacher", "baseline": "baseline", "random": "control"}  # of the others: candidate
SHARES = {"teacher": 0.85, "baseline": 0.6, "ssld": 0.7, "finetune": 0.6}
NOTE = "The teacher saw the pool's labels."
Write = Callable[..., Path]


def measured(right: np.ndarray, labels: np.ndarray, classes: list[str]) -> dict[str, Any]:
    return {
        "n": len(right),
        "top1": float(right.mean()),
        "top1_low": float(right.mean()) - 0.04,
        "top1_high": float(right.mean()) + 0.04,
        "top5": 0.97,
        "nll": 0.9,
        "ece": 0.0321,
        "per_class": {name: float(right[labels == c].mean()) for c, name in enumerate(classes)},
        "reliability": [[0, 0.0, 0.0]] * 13 + [[100, 0.9, 0.5], [300, 0.99, 0.75]],
    }


def with_exits() -> dict[str, Any]:
    """The parts of an evaluation that a network with exits has."""
    rows = [
        {"exit": name, "parameters": 1_000 * i, "macs": 1_000_000 * i, "holdout_top1": 0.5 + i / 100, "val_top1": 0.51 + i / 100}
        for i, name in enumerate(("1", "2", "ensemble", "early"), 1)
    ]
    curve = [
        {"threshold": t, "macs": int(1e6 * (1 + t)), "holdout_top1": 0.5, "val_top1": 0.5 + t / 10} for t in (0.0, 0.5, 1.01)
    ]
    return {
        "exits": {"rows": rows, "threshold": 0.5, "leaving": [0.75, 0.25], "curve": curve},
        "speed": {
            "device": "cpu",
            "dtype": "bfloat16",
            "threads": 1,
            "batch": 256,
            "images_per_second": {row["exit"]: 1_234.0 * i for i, row in enumerate(rows, 1)},
        },
    }


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write the evaluation of one entry into <tmp>/data/evaluate."""
    monkeypatch.setattr(artifact, "sync", lambda path: None)  # these tests end no power cut, and write much

    def write(
        name: str,
        classes: int = 8,
        ids: str = "val",
        held_ids: str = "held",
        history: bool = True,
        class_name: str = "class",
        held_right: np.ndarray | None = None,
        **parts: Any,
    ) -> Path:
        names = [f"{class_name} {c}" for c in range(classes)]
        labels = np.arange(N) % classes
        # The images go from easy to hard, so that a better model is mostly right where a worse one is.
        chance = np.random.default_rng(sum(map(ord, name))).normal(0, 0.05, N)
        right = np.random.default_rng(0).random(N) + chance < SHARES.get(name, 0.5)
        origin = {
            "stage": "distil",
            "entry": "ssld",
            "params": {"loss": "sym_kl"},
            "inputs": {"images": {"path": "data/select/top", "identity": "i", "key": "k"}},
            "key": f"key of {name}",
        }
        selected = {**origin, "stage": "select", "entry": "top", "params": {"rule": "top"}, "key": "key of select"}
        prepared = {**origin, "stage": "prepare", "entry": None, "params": {}, "inputs": {}, "key": "key of prepare"}
        lineage = {r["key"]: r for r in (origin, selected, prepared)}
        evaluation = {
            "role": ROLES.get(name, "candidate"),
            "model": {
                "arch": "resnet8",
                "parameters": 78_042 * (1 + (name == "teacher")),
                "macs": 12_281_088,
                "input": 32,
                "exit": None,
                "mirror": False,
            },
            "training": {
                "stage": "teach" if name in ("teacher", "baseline") else "distil",
                "entry": f"trained_{name}",
                "init": "scratch",
                "teacher": "teach/trained_teacher" if name in ("ssld", "finetune") else None,
                "macs": 5_658_720_000_000,
                "macs_all": 9_000_000_000_000,
                "steps": 1_200,
                "batch": 128,
                "labelled": 5_000,
                "unlabelled": 2_000 * (name == "ssld"),
                "note": NOTE if name in ("ssld", "finetune") else None,
            },
            "val": measured(right, labels, names),
            "holdout": measured(right, labels, names),
            **parts,
        }
        checks = [{"step": s, "top1": 0.5 + s / 4_000, "loss": 1.0} for s in (400, 800, 1_200)] if history else []
        predictions = {
            "id": [f"{ids}/{i:04}" for i in range(N)],
            "label": labels.astype(np.int32),
            "predicted": np.where(right, labels, (labels + 1) % classes).astype(np.int32),
            "confidence": np.ones(N, np.float32),
        }
        of = {"model": {"path": "data/distil/ssld", "identity": "i", "key": origin["key"]}}
        evaluated = {"stage": "evaluate", "entry": name, "key": f"evaluation of {name}", "inputs": of}
        token = artifact.provenance.set({**evaluated, "lineage": lineage})
        with artifact.writing(tmp_path / "data" / "evaluate" / name) as tmp:
            (tmp / "evaluation.json").write_text(json.dumps(evaluation))
            (tmp / "history.json").write_text(json.dumps({"train": [], "holdout": checks}))
            pq.write_table(pa.table(predictions), tmp / "predictions.parquet")
            held = np.random.default_rng(1).random(HELD) < 0.5 if held_right is None else held_right
            answers = {"id": [f"{held_ids}/{i}" for i in range(HELD)], "label": np.ones(HELD, np.int32)}
            pq.write_table(pa.table({**answers, "predicted": held.astype(np.int32)}), tmp / "predictions-holdout.parquet")
        artifact.provenance.reset(token)
        return tmp_path / "data" / "evaluate" / name

    return write


@pytest.fixture
def four(write: Write, tmp_path: Path) -> Path:
    """The folder of four evaluations, with the metrics of the stages before them."""
    for name in ENTRIES:
        write(name)
    for stage, metrics in {
        "prepare/metrics": {"train": 5_000, "pool": 95_123, "reasons": {"damaged": 7, "empty": 2}},
        "select/top": {"images": 20_001, "pool": 94_567, "short": {f"class {i}": i for i in range(9)}},
    }.items():
        file = tmp_path / "data" / f"{stage}.json"
        file.parent.mkdir()
        file.write_text(json.dumps(metrics))
    return tmp_path / "data" / "evaluate"


def run(evaluations: Path, entries: tuple[str, ...] = ENTRIES, **params: Any) -> tuple[Path, Mapping[str, Any]]:
    out = evaluations.parent / "compare" / "results"
    return out, compare.run(Compare(**{"baseline": "baseline", **params}), evaluations=evaluations, out=out, entries=entries)


def right_of(evaluations: Path, name: str) -> np.ndarray:
    table = pq.read_table(evaluations / name / "predictions.parquet")
    return table["label"].to_numpy() == table["predicted"].to_numpy()


# The difference -------------------------------------------------------------------------------------------------------


def test_paired_interval_is_that_of_a_bootstrap_over_images() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(2_000) < 0.6
    right = np.where(rng.random(2_000) < 0.85, base, rng.random(2_000) < 0.8)
    drawn = rng.integers(0, 2_000, (4_000, 2_000))
    low, high = np.percentile(right[drawn].mean(1) - base[drawn].mean(1), [2.5, 97.5])
    found = pairs.compare(right, base).difference
    assert found.value == pytest.approx(right.mean() - base.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.0015)
    assert found.is_clear
    back = pairs.compare(base, right).difference
    assert back == pytest.approx((-found.value, -found.high, -found.low))


def test_paired_interval_covers_the_truth_on_few_images() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(2_000):
        outcome = rng.choice(4, 60, p=[0.5, 0.15, 0.05, 0.3])  # both right, first only, second only, neither
        found = pairs.compare(outcome <= 1, (outcome == 0) | (outcome == 2)).difference
        covered += found.low <= 0.10 <= found.high
    assert 0.94 <= covered / 2_000 <= 0.98


def test_paired_interval_is_narrow_where_almost_every_image_tells() -> None:
    found = pairs.compare(np.ones(50, bool), np.arange(50) < 1).difference
    assert found.value == 0.98
    assert 0.85 < found.low < 0.98 < found.high == 1


def test_two_models_that_agree_everywhere_are_not_surely_equal() -> None:
    right = np.arange(50) % 3 > 0
    found = pairs.compare(right, right).difference
    assert found.value == 0
    assert found.low < 0 < found.high
    assert not found.is_clear


# The tables -----------------------------------------------------------------------------------------------------------


def test_table_holds_every_entry_in_order_with_its_figures(four: Path) -> None:
    out, _ = run(four)
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert tuple(row["entry"] for row in rows) == ENTRIES
    base = right_of(four, "baseline")
    for row in rows:
        right = right_of(four, row["entry"])
        assert float(row["val_top1"]) == right.mean()
        if row["entry"] == "baseline":
            assert row["delta"] == ""
        else:
            difference = pairs.compare(right, base).difference
            assert tuple(float(row[f"delta{end}"]) for end in ("", "_low", "_high")) == difference
    assert [row["unlabelled"] for row in rows] == ["0", "0", "2000", "0"]
    assert {row["note"] for row in rows} == {"", NOTE}


def test_the_metrics_are_ten_figures_of_the_chosen_entry(four: Path) -> None:
    _, metrics = run(four)
    right, base = right_of(four, "ssld"), right_of(four, "baseline")
    value, low, high = pairs.compare(right, base).difference
    assert metrics == {
        "chosen": "ssld",
        "val_top1": right.mean(),
        "clean_top1": None,
        "holdout_top1": right.mean(),
        "gain": value,
        "low": low,
        "high": high,
        "ece": 0.0321,
        "baseline": base.mean(),
        "tmacs": 9.0,
    }
    _, without = run(four, ("teacher", "baseline"))
    assert (without["chosen"], without["val_top1"], without["gain"]) == (None, base.mean(), None)


def test_the_tables_behind_the_plots_of_dvc_have_the_figures_of_the_evaluations(four: Path, write: Write) -> None:
    write("teacher", history=False, classes=8)
    out, _ = run(four)
    tables = {file.stem: json.loads(file.read_text()) for file in (out / "plots").iterdir()}
    assert {(row["entry"], row["step"], row["holdout_top1"]) for row in tables["curves"]} == {
        (name, step, 0.5 + step / 4_000) for name in ENTRIES[1:] for step in (400, 800, 1_200)
    }
    assert [row for row in tables["reliability"] if row["entry"] == "ssld"] == [
        {"entry": "ssld", "confidence": 0.9, "accuracy": 0.5, "images": 100},
        {"entry": "ssld", "confidence": 0.99, "accuracy": 0.75, "images": 300},
    ]
    assert {row["entry"] for row in tables["reliability"]} == {"ssld", "baseline"}
    assert {(row["entry"], row["tmacs"], row["val_top1"]) for row in tables["compute"]} == {
        (name, 9.0, right_of(four, name).mean()) for name in ENTRIES
    }
    of_ssld = {row["class"]: row["accuracy"] for row in tables["classes"] if row["entry"] == "ssld"}
    assert of_ssld == {f"class {c}": right_of(four, "ssld")[c::8].mean() for c in range(8)}


def test_the_report_does_not_claim_that_val_was_never_looked_at(four: Path) -> None:
    out, _ = run(four)
    page = " ".join((out / "report.html").read_text().split())
    assert "No choice was made" not in page
    assert "winnow cannot know how often the validation images were looked at" in page


def test_markdown_is_one_aligned_table_with_each_note_once(four: Path) -> None:
    out, _ = run(four)
    lines = (out / "table.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(ENTRIES)
    assert len({len(line) for line in table}) == 1
    assert {line.count("|") for line in table} == {len(COLUMNS) + 2}
    assert "ssld [1]" in table[4]
    assert "finetune [1]" in table[5]
    assert lines.count(f"[1] {NOTE}") == 1


def test_the_terminal_shows_the_whole_table_however_narrow_it_is(
    four: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out, _ = run(four, title="A [/bold] title")
    said = capsys.readouterr().err
    for line in (out / "table.md").read_text().splitlines()[2 : 2 + len(ENTRIES)]:
        name, top1, gain, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        assert any(name in row and top1 in row and gain in row for row in said.splitlines())
    assert "…" not in said
    assert "A [/bold] title" in said


def test_show_prints_the_same_table_again_and_where_to_look_next(four: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(four, title="Scenes")
    first = capsys.readouterr().err
    compare.show(out)
    again = capsys.readouterr().err
    assert again.startswith(first)
    assert str(out / "report.html") in again
    assert "mlflow ui" in again
    assert "gallery" not in again
    with pytest.raises(UserError, match=r"nowhere/comparison\.json is not there"):
        compare.show(four / "nowhere")


def test_comparison_json_has_all_that_the_evaluations_say(four: Path) -> None:
    out, _ = run(four)
    entries = json.loads((out / "comparison.json").read_text())["entries"]
    for name in ENTRIES:
        evaluation = json.loads((four / name / "evaluation.json").read_text())
        assert {key: entries[name][key] for key in evaluation} == evaluation


# The choice, and the pairs --------------------------------------------------------------------------------------------


def held(right: int) -> np.ndarray:
    """The held-out images, of which the first `right` are named right."""
    return np.arange(HELD) < right


def parts(macs: int = 100, training: int | None = 100, parameters: int = 100) -> dict[str, Any]:
    """The costs of an entry, as parts of its evaluation."""
    model = {"arch": "resnet8", "parameters": parameters, "macs": macs, "input": 32, "exit": None}
    nothing = dict.fromkeys(("stage", "entry", "init", "teacher", "note"))
    counts = dict.fromkeys(("steps", "batch", "labelled", "unlabelled"), 1)
    return {"model": model, "training": {**nothing, **counts, "macs": training}}


def saved(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return found


def test_a_control_is_never_chosen_however_good(four: Path, write: Write) -> None:
    for name, right in (("random", 200), ("teacher", 200), ("baseline", 190), ("ssld", 150), ("finetune", 100)):
        write(name, held_right=held(right))
    out, _ = run(four, (*ENTRIES, "random"))
    assert saved(out)["best"] == saved(out)["choice"]["first"] == "ssld"
    without, _ = run(four, ("baseline", "random"))
    assert (saved(without)["best"], saved(without)["choice"], saved(without)["classes"]) == (None, None, [])
    assert "No entry has the role of a candidate" in Page((without / "report.html").read_text()).text


@pytest.mark.parametrize(
    ("right", "ssld", "finetune", "best"),
    [
        (150, {}, {"macs": 1, "training": 1}, "ssld"),  # clearly better: costs do not count
        (102, {}, {}, "ssld"),  # nobody can tell: the order
        (102, {}, {"parameters": 99}, "finetune"),
        (102, {"parameters": 99}, {"training": 99}, "finetune"),
        (102, {"training": 1, "parameters": 1}, {"macs": 99}, "finetune"),
        (102, {"training": None}, {}, "finetune"),  # not counted
        (102, {"macs": 99}, {"training": 1}, "ssld"),
    ],
)
def test_of_candidates_that_holdout_cannot_separate_the_cheaper_is_chosen(
    four: Path, write: Write, right: int, ssld: dict[str, Any], finetune: dict[str, Any], best: str
) -> None:
    write("ssld", held_right=held(right), **parts(**ssld))
    write("finetune", held_right=held(100), **parts(**finetune))
    out, _ = run(four)
    found = saved(out)
    assert (found["best"], found["choice"]["first"]) == (best, "ssld")
    [rival] = found["choice"]["rivals"]
    assert (rival["gained"], rival["lost"], rival["n"]) == (right - 100, 0, HELD)
    text = Page((out / "report.html").read_text()).text
    assert (f"the cheapest of them is chosen, {best}" in text) == (right == 102)


def test_rivals_are_corrected_for_their_number(four: Path, write: Write) -> None:
    """106 against 100 has a p value of 0.03 if it is the only pair, and no outcome among four."""
    names = ("a", "b", "c", "d")
    write("ssld", held_right=held(106))
    for i, name in enumerate(names):
        write(name, held_right=held(100), **parts(macs=50 - i))
    alone, _ = run(four, ("baseline", "ssld", "a"))
    assert saved(alone)["best"] == "ssld"
    among, _ = run(four, ("baseline", "ssld", *names))
    assert saved(among)["best"] == "d"


def test_every_pair_has_its_statistics(four: Path, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("random")
    entries = (*ENTRIES, "random")
    out, _ = run(four, entries)
    rows = {(row["entry"], row["other"]): row for row in saved(out)["pairs"]}
    assert len(rows) == 10
    found = {names: pairs.compare(right_of(four, names[0]), right_of(four, names[1])) for names in rows}
    for (names, pair), corrected in zip(found.items(), pairs.holm([p.p for p in found.values()]), strict=True):
        row = rows[names]
        assert (row["gained"], row["lost"], row["difference"], row["p"]) == (
            pair.gained, pair.lost, pair.difference.value, pair.p,
        )  # fmt: skip
        assert (row["corrected"], row["outcome"]) == (pytest.approx(corrected), pair.outcome(corrected))
    listed = list(csv.DictReader((out / "pairs.csv").read_text().splitlines()))
    assert [(row["entry"], row["other"], row["outcome"]) for row in listed] == [(*k, row["outcome"]) for k, row in rows.items()]
    table = {row["entry"]: row for row in csv.DictReader((out / "table.csv").read_text().splitlines())}
    above = rows["teacher", "baseline"]
    assert (table["teacher"]["role"], table["teacher"]["gained"]) == ("teacher", str(above["gained"]))
    below = rows["baseline", "ssld"]
    assert (table["ssld"]["gained"], table["ssld"]["lost"]) == (str(below["lost"]), str(below["gained"]))
    text, said = Page((out / "report.html").read_text()).text, capsys.readouterr().err
    for other, (gained, lost) in {
        "baseline": (below["lost"], below["gained"]),
        "random": found_of(rows, "ssld", "random"),
    }.items():
        sentence = rf"ssld is (better than|not separable from) {other}: .* {gained} images gained, {lost} lost, corrected p "
        assert re.search(sentence, text)
        assert re.search(sentence, said)
    assert "ssld is better than teacher" not in text


def found_of(rows: Mapping[tuple[str, str], Mapping[str, Any]], entry: str, other: str) -> tuple[int, int]:
    row = rows[entry, other]
    return row["gained"], row["lost"]


def test_classes_of_the_chosen_entry_are_compared_with_the_baseline(four: Path) -> None:
    out, _ = run(four)
    labels = pq.read_table(four / "ssld" / "predictions.parquet")["label"].to_numpy()
    right, base = right_of(four, "ssld"), right_of(four, "baseline")
    classes = saved(out)["classes"]
    assert len(classes) == 8
    for row in classes:
        of = labels == int(row["name"].split()[-1])
        assert row["difference"] == pytest.approx(right[of].mean() - base[of].mean())
        assert row["corrected"] >= row["p"]
    assert "ssld against baseline, class by class" in Page((out / "report.html").read_text()).text


def test_the_margin_says_what_is_equivalent(four: Path) -> None:
    def outcomes(margin: float) -> set[str]:
        out, _ = run(four, margin=margin)
        return {row["outcome"] for row in saved(out)["pairs"]}

    assert "equivalent" not in outcomes(0.001)
    assert "not separable" not in outcomes(0.5)


# What is refused ------------------------------------------------------------------------------------------------------


def test_entries_that_params_no_longer_has_are_not_read(four: Path, write: Write) -> None:
    (write("stale") / "evaluation.json").write_text("damaged")
    out, metrics = run(four)
    assert "stale" not in metrics
    assert "stale" not in (out / "report.html").read_text()


def test_a_missing_or_damaged_evaluation_is_named(four: Path) -> None:
    with pytest.raises(UserError, match="evaluate/kd is not there"):
        run(four, entries=(*ENTRIES, "kd"))
    (four / "ssld" / "history.json").write_text("{}")
    with pytest.raises(UserError, match=r"evaluate/ssld/history\.json was altered"):
        run(four)


def test_an_unknown_baseline_is_named(four: Path) -> None:
    with pytest.raises(UserError, match=r"`compare.baseline` is 'base', but .* teacher, baseline, ssld"):
        run(four, baseline="base")
    with pytest.raises(UserError, match=r"`compare.baseline` is 'ssld', whose role is candidate.*\(there is baseline\)"):
        run(four, baseline="ssld")


def test_models_measured_on_other_images_are_not_compared(four: Path, write: Write) -> None:
    write("ssld", ids="other")
    with pytest.raises(UserError, match=r"`evaluate\.ssld` and `evaluate\.baseline` were measured on different images"):
        run(four)
    write("ssld", held_ids="other")
    with pytest.raises(UserError, match=r"`evaluate\.ssld` and `evaluate\.baseline` were measured on different images"):
        run(four)
    assert not (four.parent / "compare").exists()


# The page -------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would load, link and show; fails on tags that do not match."""

    VOID = ("meta", "br", "link", "img", "hr", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "src", "xlink:href", "data", "srcset", "aria-labelledby"):
                self.references.append(f"#{value}" if name == "aria-labelledby" else value or "")
            self.references += re.findall(r"url\((.*?)\)", value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data


def test_the_page_stands_alone(four: Path) -> None:
    out, _ = run(four)
    html = (out / "report.html").read_text()
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    inner = {r for r in page.references if r.startswith("#")}
    assert {r[1:] for r in inner} <= set(page.ids)
    assert set(page.references) - inner == {"table.csv", "pairs.csv", "comparison.json"}
    assert all((out / file).is_file() for file in set(page.references) - inner)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "@import" not in html
    plots = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(plots) == 4
    for plot in plots:
        ET.fromstring(plot)
        assert not any(stand_in in plot for stand_in in PAGE_COLOURS)


def test_the_page_tells_the_comparison_and_where_it_came_from(four: Path) -> None:
    out, _ = run(four, title="Scenes")
    text = Page((out / "report.html").read_text()).text
    ssld = json.loads((out / "comparison.json").read_text())["entries"]["ssld"]
    assert "Scenes" in text
    assert f"Of the candidates, ssld1 is chosen by the held-out images. It names {100 * ssld['val']['top1']:.1f} % of 400" in text
    assert "ssld does best on the held-out images" in text
    assert RULE in text
    assert all(name in text for name in (*ENTRIES, "class 7", NOTE, "sym_kl"))
    assert "95,123 images in the pool" in text.replace("95,123images", "95,123 images")
    assert "94,567" in text
    assert "damaged 7, empty 2" in text
    assert "class 5 5, and 3 more" in text


def test_the_gallery_is_linked_where_dedup_drew_one(four: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gallery = four.parent / "dedup" / "gallery" / "index.html"
    gallery.parent.mkdir(parents=True)
    gallery.write_text("<!doctype html>")
    out, _ = run(four)
    [link] = [r for r in Page((out / "report.html").read_text()).references if "gallery" in r]
    assert (out / link).resolve() == gallery.resolve()
    capsys.readouterr()
    compare.show(out)
    assert str(gallery) in capsys.readouterr().err


def test_classes_that_nothing_measures_are_told_at_the_head(four: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = "1 of 3 classes have no image in val: eel."
    metrics = four.parent / "prepare" / "metrics.json"
    metrics.write_text(json.dumps({**json.loads(metrics.read_text()), "warnings": [sentence]}))
    out, _ = run(four)
    assert f"GAP: {sentence}" in capsys.readouterr().err
    text = Page((out / "report.html").read_text()).text
    assert text.index(sentence) < text.index("Results")
    metrics.write_text("{")
    with pytest.raises(UserError, match=r"prepare/metrics.json does not hold the metrics of a stage. Run `dvc repro --force"):
        compare.show(out)


def test_copies_of_val_among_the_labelled_images_are_told_at_the_head(four: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = "5 of 1,000 training images are copies of val images; `dedup.train: remove` takes them out."
    metrics = four.parent / "dedup" / "metrics.json"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(json.dumps({"warnings": [sentence]}))
    out, _ = run(four)
    assert f"LEAK: {sentence}" in capsys.readouterr().err
    text = Page((out / "report.html").read_text()).text
    assert text.index(sentence) < text.index("Results")
    compare.show(out)
    assert f"LEAK: {sentence}" in capsys.readouterr().err
    metrics.write_text(json.dumps({"warnings": None}))
    run(four)
    assert "LEAK" not in capsys.readouterr().err


def test_names_from_outside_cannot_break_the_page(write: Write, tmp_path: Path) -> None:
    for name in ENTRIES:
        write(name, class_name="<b>&$x^2$")
    out, _ = run(tmp_path / "data" / "evaluate", title="<script>alert(1)</script>")
    page = Page((out / "report.html").read_text())
    assert "script" not in page.tags
    assert "<b>&$x^2$ 3" in page.text


def test_every_column_and_every_pair_is_on_the_page(four: Path) -> None:
    out, _ = run(four)
    html = (out / "report.html").read_text()
    first = [row.split("</tr>", 1)[0] for row in html.split('<th scope="row">ssld')[1:3]]
    titles = [title for row in first for title in re.findall(r'data-label="([^"]+)"', row)]
    assert sorted(titles) == sorted(c.title for c in COLUMNS)
    listed = re.findall(r'<tr><th scope="row">(\w+)</th><td data-label="against">(\w+)</td>', html)
    candidates = [(a, b) for a in ("ssld", "finetune") for b in ENTRIES if a != b]
    assert sorted(map(sorted, listed)) == sorted(map(sorted, {*map(frozenset, candidates), frozenset(("teacher", "baseline"))}))
    assert listed[0] == ("ssld", "baseline")


def test_the_other_pairs_are_folded_away(four: Path, write: Write) -> None:
    write("random")
    out, _ = run(four, (*ENTRIES, "random"))
    html = (out / "report.html").read_text()
    listed, folded = html[html.index('id="pairs"') :].split("All 10 pairs</summary>")
    assert ("random", "teacher") not in re.findall(r'<th scope="row">(\w+)</th><td data-label="against">(\w+)</td>', listed)
    assert len(re.findall(r'data-label="against"', folded.split("</details>")[0])) == 10


def test_the_data_card_says_where_the_images_came_from_and_what_became_of_them(four: Path) -> None:
    out, _ = run(four)
    text = Page((out / "report.html").read_text()).text
    assert "licencenot said" in text
    said, _ = run(four, licence="research only")
    assert "licenceresearch only" in Page((said / "report.html").read_text()).text


def test_of_many_classes_those_are_shown_on_which_entries_differ_most(write: Write, tmp_path: Path) -> None:
    for name in ENTRIES:
        write(name, classes=100)
    out, _ = run(tmp_path / "data" / "evaluate")
    entries = json.loads((out / "comparison.json").read_text())["entries"]
    table = np.array([list(entries[name]["val"]["per_class"].values()) for name in ENTRIES])
    spread = table.max(0) - table.min(0)
    html = (out / "report.html").read_text()
    heat = re.findall(
        r'<tr><th scope="row">class (\d+)</th>', html[html.index('<table class="heat">') : html.index('id="differing"')]
    )
    assert f"These are {page.HEAT_CLASSES} of them." in html
    shown = np.array([int(c) for c in heat])
    assert len(shown) == page.HEAT_CLASSES
    assert list(shown) == sorted(shown)
    assert spread[shown].min() >= np.delete(spread, shown).max()


def test_without_histories_there_are_no_curves(write: Write, tmp_path: Path) -> None:
    for name in ENTRIES:
        write(name, history=False)
    out, _ = run(tmp_path / "data" / "evaluate")
    html = (out / "report.html").read_text()
    assert html.count("<svg") == 3
    assert "Learning" not in html


def test_agreement_is_that_with_the_row_of_the_teacher(four: Path) -> None:
    out, _ = run(four)
    rows = {row["entry"]: row for row in csv.DictReader((out / "table.csv").read_text().splitlines())}
    predicted = {name: pq.read_table(four / name / "predictions.parquet")["predicted"].to_numpy() for name in ENTRIES}
    assert float(rows["ssld"]["agreement"]) == (predicted["ssld"] == predicted["teacher"]).mean()
    assert rows["baseline"]["agreement"] == ""
    without, _ = run(four, ("baseline", "ssld"))
    assert json.loads((without / "comparison.json").read_text())["entries"]["ssld"]["agreement"] is None


def test_the_colour_is_in_the_column_of_the_differences(four: Path) -> None:
    out, _ = run(four)
    row = (out / "report.html").read_text().split('<th scope="row">ssld', 1)[1].split("</tr>", 1)[0]
    cells = dict(re.findall(r'<td data-label="([^"]+)"( class="better")?>', row))
    assert cells.keys() < {c.title for c in COLUMNS}
    assert [title for title, coloured in cells.items() if coloured] == ["vs baseline"]


def test_compute_is_counted_of_the_training_and_of_a_prediction(four: Path) -> None:
    out, _ = run(four)
    header, _, first, *_ = (out / "table.md").read_text().splitlines()
    cells = dict(zip((c.strip() for c in header.split("|")), (c.strip() for c in first.split("|")), strict=True))
    assert (cells["training TMACs"], cells["MMACs"], cells["ECE %"], cells["parameters"]) == ("5.66", "12.3", "3.2", "156,084")


def test_the_page_shows_who_is_taken_for_whom(four: Path) -> None:
    out, _ = run(four)
    text = Page((out / "report.html").read_text()).text
    table = pq.read_table(four / "ssld" / "predictions.parquet")
    pairs = list(zip(table["label"].to_pylist(), table["predicted"].to_pylist(), strict=True))
    worst = max({p: pairs.count(p) for p in pairs if p[0] != p[1]}.items(), key=lambda item: (item[1], -item[0][0]))
    assert "How far to trust ssld" in text
    (label, named), images = worst
    assert f"Its most frequent mistakes: class {label} taken for class {named} ({images})," in text


def test_exits_have_a_table_and_a_plot_where_there_are_any(four: Path, write: Write) -> None:
    out, _ = run(four)
    assert 'id="exits"' not in (out / "report.html").read_text()
    write("ssld", **with_exits())
    out, _ = run(four)
    html = (out / "report.html").read_text()
    text = Page(html).text
    assert html.count("<svg") == 5
    assert "early" in text
    assert "at 0.5; 75 / 25 % leave" in text
    assert "2,468" in text  # images/s of exit 2
    assert "with 1 thread, bfloat16" in text


def test_corruptions_have_a_table_where_they_were_measured(four: Path, write: Write) -> None:
    out, _ = run(four)
    assert "On worse images" not in (out / "report.html").read_text()
    shares = {"noise": [0.5, 0.4, 0.3], "jpeg": [0.6, 0.5, 0.4]}
    write("ssld", corruptions={"severities": [1, 3, 5], "holdout": shares, "val": shares})
    out, _ = run(four)
    text = Page((out / "report.html").read_text()).text
    assert re.search(r"ssld\s*40\.0\s*50\.0\s*45\.0", text)


def test_the_same_evaluations_give_the_same_bytes(four: Path) -> None:
    out, _ = run(four)
    first = artifact.identity(out)
    run(four)
    assert artifact.identity(out) == first


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_on_a_screen_or_on_paper(four: Path, write: Write, browser: Browser, width: int, scheme: Any) -> None:
    names = (*ENTRIES, *(f"{name}_with_a_long_name" for name in ("another", "further", "last", "widest", "random")))
    for name in names[len(ENTRIES) :]:
        write(name)
    write("ssld", **with_exits())
    out, _ = run(four, names)
    with opened(browser, out / "report.html", width, color_scheme=scheme) as shown:
        assert not is_cut(shown)
        inner = (
            "[...document.querySelectorAll('.wide')].filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1).length"
        )
        tables = shown.evaluate(inner)
        assert tables <= (1 if width < 1000 else 0)  # class by entry: of nine entries it may scroll on a phone
        letters = "[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)"
        assert min(shown.evaluate(letters)) > 10
        shown.emulate_media(media="print")
        shown.set_viewport_size({"width": 718, "height": 1000})  # A4 without its margins, at 96 pixels an inch
        assert not is_cut(shown)
