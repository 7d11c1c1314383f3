"""`select` against plain loops over the rule's own words, with many ties."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import purity
from pipeline.errors import UserError
from pipeline.harness.machine import Machine
from pipeline.report import purity as expected
from pipeline.report.purity import Answers
from pipeline.stages import select
from pipeline.stages.select import Select
from pipeline.store import artifact, manifest, ranking, scores
from pipeline.store.scores import open_scores

CLASSES = ("ant", "bee", "cow", "dog", "elk", "fox")
MEMBERSHIPS = [("argmax", 1), ("top_p", 2), ("any", 4)]


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "sync", lambda path: None)  # these tests end no power cut, and write much


class Pool:
    """A pool manifest and scores of it: `m` classes stored of each image, log p on a coarse grid, so that most tie."""

    def __init__(self, folder: Path, n: int, m: int = 4, seed: int = 0, row_group: int = 97, held: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.ids = [f"pool-{row // 50:02}.tar/{row:04}.jpg" for row in range(n)]
        self.manifest, self.scores = folder / "pool", folder / "scores"
        with artifact.writing(self.manifest) as tmp:
            columns = {
                "id": self.ids,
                "path": [i.split("/")[0] for i in self.ids],
                "label": rng.integers(0, 9, n),
                **{name: np.arange(n) for name in ("offset", "size", "width", "height", "crc32")},
            }
            manifest.write(tmp, pa.table({name: columns[name] for name in manifest.SCHEMA.names}), ())
        self.classes = np.argsort(rng.random((n, len(CLASSES))) + 0.5 * (np.arange(len(CLASSES)) == 5))[:, :m]
        self.logits = -np.sort(-rng.integers(-4, 5, (n, m)) / 4, axis=1).astype(np.float32)
        self.logsumexp = (self.logits[:, 0] + rng.integers(0, 3, n) / 8).astype(np.float32)
        self.held = held
        self.write(row_group)

    def write(self, row_group: int = 97, logits: np.ndarray | None = None) -> None:
        logits = self.logits if logits is None else logits
        m = logits.shape[1]
        table = scores.table(self.classes[:, :m], logits, self.logsumexp)
        about = {"classes": json.dumps(CLASSES), "manifest": artifact.identity(self.manifest)}
        with artifact.writing(self.scores) as tmp:
            pq.write_table(table.replace_schema_metadata(about), tmp / scores.FILE, row_group_size=row_group)
            scores.write_held(tmp, table.slice(0, self.held), self.classes[: self.held, 0] * (np.arange(self.held) % 4 > 0))

    def pairs(self, members: int) -> list[tuple[float, int, int, int]]:
        """(-log p, row, position, class), best first."""
        surprisals = self.logsumexp[:, None] - self.logits
        return sorted(
            (float(surprisals[row, j]), row, j, int(self.classes[row, j])) for row in range(len(self.ids)) for j in range(members)
        )

    def run(self, out: Path, threads: int = 1, seed: int = 0, memory_gb: float = 1.0, **params: object) -> dict:
        return dict(
            select.run(
                Select.model_validate({"scores": "score/teacher", "rule": "top", **params}),
                scores=self.scores,
                pool=self.manifest,
                out=out,
                seed=seed,
                workdir=out.parent / "scratch",
                machine=Machine(threads=threads, memory_gb=memory_gb),
            )
        )


def greedy(pool: Pool, members: int, k: int, several: bool) -> dict[int, list[int]]:
    taken: dict[int, list[int]] = {c: [] for c in range(len(CLASSES))}
    used: set[int] = set()
    for _, row, _, c in pool.pairs(members):
        if len(taken[c]) < k and (several or row not in used):
            taken[c].append(row)
            used.add(row)
    return taken


def selected(out: Path) -> list[str]:
    return manifest.read(out).table["id"].to_pylist()


@pytest.mark.parametrize("rule", ["top", "balanced", "all"])
def test_the_expected_purity_is_that_of_the_selected_images(tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(tmp_path, 400, held=80)
    metrics = pool.run(tmp_path / "out", k=30, rule=rule)
    scored = open_scores(pool.scores)
    said, held = (Answers.of_table(table, scored.m) for table in (scored.rows_of(np.arange(400)), scored.held()))
    is_right = held.first == scored.held()["label"].to_numpy()
    pure = expected.estimate(said, held, is_right, len(CLASSES)).pure
    rows = np.flatnonzero(np.isin(pool.ids, selected(tmp_path / "out")))
    assert metrics["expected_purity"] == pytest.approx(pure[rows].mean(), abs=1e-3)  # equal ranks, rounded either way
    by_class = {name: pure[rows][said.first[rows] == c].mean() for c, name in enumerate(CLASSES) if (said.first[rows] == c).any()}
    assert metrics["impure"] == pytest.approx(
        {name: share for name, share in by_class.items() if share < select.IMPURE}, abs=5e-3
    )
    assert metrics["impure"]

    monkeypatch.setattr(select, "LOOKED_AT", 10)  # of each class
    assert pool.run(tmp_path / "fewer", k=30, rule=rule)["expected_purity"] == pytest.approx(metrics["expected_purity"], abs=0.05)
    assert "expected_purity" not in pool.run(tmp_path / "any", k=30, rule=rule, membership="any")


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize(("membership", "members"), MEMBERSHIPS)
@pytest.mark.parametrize("k", [1, 7, 60])
def test_top_is_the_greedy_loop(tmp_path: Path, membership: str, members: int, k: int, several: bool) -> None:
    pool = Pool(tmp_path, 300)
    metrics = pool.run(tmp_path / "out", k=k, membership=membership, p=2, several=several)

    taken = greedy(pool, members, k, several)
    rows = sorted({row for of_class in taken.values() for row in of_class})
    assert selected(tmp_path / "out") == [pool.ids[row] for row in rows]
    log_p = {(row, c): -surprisal for surprisal, row, _, c in pool.pairs(members)}
    report = json.loads((tmp_path / "out" / select.SELECTION).read_text())
    assert report["classes"] == [
        {
            "class": name,
            "taken": len(taken[c]),
            "available": sum(pair[3] == c for pair in pool.pairs(members)),
            "cut_off": min((log_p[row, c] for row in taken[c]), default=None),
        }
        for c, name in enumerate(CLASSES)
    ]
    everything = [row for of_class in taken.values() for row in of_class]
    assert metrics["images"] == len(rows)
    assert metrics["in_several_classes"] == sum(everything.count(row) > 1 for row in rows)
    assert metrics["short"] == {CLASSES[c]: len(rows) for c, rows in taken.items() if len(rows) < k}


def test_the_cases_above_hold_ties_shared_images_and_short_classes(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 300)
    pairs = pool.pairs(4)
    assert len({(surprisal, c) for surprisal, _, _, c in pairs}) < len(pairs) / 4
    assert pool.run(tmp_path / "out", k=60, membership="any")["in_several_classes"] > 10
    assert pool.run(tmp_path / "out", k=60)["classes_short"] > 0
    assert greedy(pool, 4, 60, several=True) != greedy(pool, 4, 60, several=False)


def test_a_selection_is_the_same_whatever_the_threads_memory_and_row_groups(tmp_path: Path) -> None:
    identities = set()
    for threads, memory_gb, row_group in [(1, 1.0, 100_000), (2, 1.0, 2_000), (4, 0.1, 500)]:
        pool = Pool(tmp_path, 40_000, row_group=row_group)
        pool.run(tmp_path / "out", threads=threads, memory_gb=memory_gb, k=900, membership="any")
        identities.add(artifact.identity(tmp_path / "out"))
    assert len(identities) == 1


def test_the_same_where_the_heaps_of_all_classes_would_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(tmp_path, 300)
    pool.classes[pool.classes == 0] = 5  # a class without any image
    pool.write()
    for k in (7, 999_999):
        pool.run(tmp_path / "fits", k=k, membership="any")
        with monkeypatch.context() as patch:
            patch.setattr(ranking, "HEAPS", 1e-9)
            pool.run(tmp_path / "counted", k=k, membership="any")
        assert artifact.identity(tmp_path / "counted") == artifact.identity(tmp_path / "fits")


def test_the_manifest_has_the_pools_images_no_labels_and_the_teachers_classes(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 50)
    pool.run(tmp_path / "out", k=3)
    chosen, whole = manifest.read(tmp_path / "out"), manifest.read(pool.manifest)
    rows = np.flatnonzero(np.isin(pool.ids, chosen.table["id"].to_pylist()))
    assert chosen.classes == CLASSES
    assert chosen.table["label"].null_count == len(chosen)
    assert chosen.table.drop("label").equals(whole.take(rows).table.drop("label"))


def test_random_is_as_many_images_as_top_drawn_by_the_seed(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 600)
    top = pool.run(tmp_path / "top", k=40, membership="any")
    drawn = {}
    for seed in (0, 1):
        metrics = pool.run(tmp_path / "out", k=40, membership="any", rule="random", seed=seed)
        drawn[seed] = selected(tmp_path / "out")
        assert metrics["images"] == top["images"] == len(drawn[seed]) < 600
        report = json.loads((tmp_path / "out" / select.SELECTION).read_text())
        first = [CLASSES[pool.classes[pool.ids.index(image), 0]] for image in drawn[seed]]
        assert {c["class"]: c["taken"] for c in report["classes"]} == {c: first.count(c) for c in CLASSES}
        assert [c["available"] for c in report["classes"]] == np.bincount(pool.classes[:, 0], minlength=6).tolist()
        assert {c["cut_off"] for c in report["classes"]} == {None}
    assert len(set(drawn[0]) & set(drawn[1])) < 0.9 * len(drawn[0])
    pool.run(tmp_path / "again", k=40, membership="any", rule="random", seed=0)
    assert selected(tmp_path / "again") == drawn[0]


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize(("membership", "members"), MEMBERSHIPS)
@pytest.mark.parametrize(("skip", "k"), [(1, 1), (5, 7), (40, 60)])
def test_a_band_is_what_the_greedy_loop_takes_after_the_first(
    tmp_path: Path, membership: str, members: int, skip: int, k: int, several: bool
) -> None:
    pool = Pool(tmp_path, 300)
    metrics = pool.run(tmp_path / "out", rule="band", skip=skip, k=k, membership=membership, p=2, several=several)
    taken = {c: rows[skip:] for c, rows in greedy(pool, members, skip + k, several).items()}
    rows = sorted({row for of_class in taken.values() for row in of_class})
    assert selected(tmp_path / "out") == [pool.ids[row] for row in rows]
    log_p = {(row, c): -surprisal for surprisal, row, _, c in pool.pairs(members)}
    report = json.loads((tmp_path / "out" / select.SELECTION).read_text())
    assert (report["rule"], report["skip"], report["k"]) == ("band", skip, k)
    assert [c["taken"] for c in report["classes"]] == [len(taken[c]) for c in range(len(CLASSES))]
    lowest = [min((log_p[row, c] for row in taken[c]), default=None) for c in range(len(CLASSES))]
    assert [c["cut_off"] for c in report["classes"]] == lowest
    assert metrics["short"] == {CLASSES[c]: len(rows) for c, rows in taken.items() if len(rows) < k}


def test_balanced_is_as_many_of_each_first_class_as_top_drawn_by_the_seed(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 600)
    first = {image: CLASSES[c] for image, c in zip(pool.ids, pool.classes[:, 0], strict=True)}
    for k in (40, 90):  # 90: some classes have fewer
        top = pool.run(tmp_path / "top", k=k)
        wanted = json.loads((tmp_path / "top" / select.SELECTION).read_text())["classes"]
        drawn = {}
        for seed in (0, 1):
            metrics = pool.run(tmp_path / "out", k=k, rule="balanced", seed=seed)
            drawn[seed] = selected(tmp_path / "out")
            said = json.loads((tmp_path / "out" / select.SELECTION).read_text())["classes"]
            assert (metrics["images"], metrics["short"]) == (top["images"], top["short"])
            of_class = [first[image] for image in drawn[seed]]
            assert [of_class.count(name) for name in CLASSES] == [c["taken"] for c in said] == [c["taken"] for c in wanted]
            assert [c["available"] for c in said] == [c["available"] for c in wanted]
            assert {c["cut_off"] for c in said} == {None}
        assert len(set(drawn[0]) & set(drawn[1])) < 0.95 * len(drawn[0])
        assert drawn[0] != selected(tmp_path / "top")
        pool.run(tmp_path / "again", k=k, rule="balanced", seed=0)
        assert selected(tmp_path / "again") == drawn[0]


def test_balanced_takes_all_of_a_class_that_is_the_first_of_fewer_than_top_takes(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 300)
    pool.run(tmp_path / "top", k=60, membership="any")
    taken = [c["taken"] for c in json.loads((tmp_path / "top" / select.SELECTION).read_text())["classes"]]
    pool.run(tmp_path / "out", k=60, membership="any", rule="balanced")
    report = json.loads((tmp_path / "out" / select.SELECTION).read_text())["classes"]
    firsts = np.bincount(pool.classes[:, 0], minlength=len(CLASSES))
    assert [c["taken"] for c in report] == np.minimum(taken, firsts).tolist()
    assert any(firsts < taken)


def test_balanced_is_uniform_within_a_class(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 4_900)
    pool.run(tmp_path / "out", k=300, rule="balanced")
    drawn = np.isin(pool.ids, selected(tmp_path / "out"))
    for c in range(len(CLASSES)):
        of_class = np.flatnonzero(pool.classes[:, 0] == c)
        share = min(1.0, 300 / len(of_class))
        for part in (of_class // 490, pool.logits[of_class, 0]):
            groups = [drawn[of_class[part == value]] for value in np.unique(part)]
            assert all(abs(g.mean() - share) <= 4.5 * np.sqrt(share * (1 - share) / len(g)) for g in groups)


@pytest.mark.parametrize("rule", [{"rule": "band", "skip": 50}, {"rule": "balanced"}])
def test_the_controls_are_the_same_whatever_the_threads_memory_and_row_groups(tmp_path: Path, rule: dict[str, Any]) -> None:
    identities = set()
    for threads, memory_gb, row_group in [(1, 1.0, 100_000), (4, 0.1, 500)]:
        pool = Pool(tmp_path, 40_000, row_group=row_group)
        pool.run(tmp_path / "out", threads=threads, memory_gb=memory_gb, k=900, membership="any", **rule)
        identities.add(artifact.identity(tmp_path / "out"))
    assert len(identities) == 1


@pytest.mark.parametrize("wrong", [{"rule": "band"}, {"rule": "top", "skip": 3}, {"rule": "band", "skip": 999_999}])
def test_skip_belongs_to_band(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"`skip`"):
        Select.model_validate({"scores": "score/teacher", "k": 7, **wrong})


def test_random_is_uniform_over_the_rows(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 20_000, row_group=5_000)
    share = pool.run(tmp_path / "out", k=1_000, rule="random")["images"] / 20_000
    drawn = np.isin(pool.ids, selected(tmp_path / "out"))
    assert 0.2 < share < 0.4
    for part in (np.arange(20_000) // 1_000, np.arange(20_000) % 20, pool.classes[:, 0], pool.logits[:, 0]):
        groups = [drawn[part == value] for value in np.unique(part)]
        assert all(abs(g.mean() - share) < 4.5 * np.sqrt(share * (1 - share) / len(g)) for g in groups)


def test_all_is_the_whole_pool(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 80)
    metrics = pool.run(tmp_path / "out", k=1, rule="all")
    assert selected(tmp_path / "out") == pool.ids
    assert metrics["images"] == metrics["pool"] == 80
    assert metrics["short"] == {}


def test_short_classes_are_said_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = Pool(tmp_path, 300)
    metrics = pool.run(tmp_path / "out", k=60)
    said = capsys.readouterr().err
    assert metrics["classes_short"] > 0
    assert all(f"{name} {taken}" in said for name, taken in metrics["short"].items())
    pool.run(tmp_path / "out", k=1)
    assert capsys.readouterr().err == ""


def test_a_certain_teacher_ties_at_log_p_0_and_rows_decide(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 300)
    pool.logsumexp = pool.logits[:, 0] - np.where(np.arange(300) % 2, np.float32(1e-7), 0).astype(np.float32)
    pool.write()
    pool.run(tmp_path / "out", k=5)
    first = {row for c in range(len(CLASSES)) for row in np.flatnonzero(pool.classes[:, 0] == c)[:5]}
    assert selected(tmp_path / "out") == [pool.ids[row] for row in sorted(first)]


def test_scores_of_another_pool_are_refused(tmp_path: Path) -> None:
    pool, other = Pool(tmp_path / "a", 30), Pool(tmp_path / "b", 30, seed=1)
    pool.scores = other.scores
    with pytest.raises(UserError, match=r"b/scores holds the scores of another manifest than .*a/pool"):
        pool.run(tmp_path / "out", k=1)
    assert not (tmp_path / "out").exists()


def test_top_p_beyond_the_stored_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`p` is 10, but .* the first 4 classes"):
        Pool(tmp_path, 30).run(tmp_path / "out", k=1, membership="top_p")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    pool = Pool(tmp_path, 30)
    pool.logits[17, 0] = value
    pool.write()
    with pytest.raises(UserError, match="logits that are NaN or infinite"):
        pool.run(tmp_path / "out", k=1)


def test_an_empty_pool_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image to select from"):
        Pool(tmp_path, 0).run(tmp_path / "out", k=1)


def test_too_little_memory_says_what_to_raise(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 40_000)
    with pytest.raises(UserError, match=r"machine\.memory_gb"):
        pool.run(tmp_path / "out", k=900, membership="any", memory_gb=0.001)


def test_purity_counts_the_images_that_select_takes(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 300)
    held = np.where(np.arange(300) % 3 == 0, purity.NONE, np.arange(300) % len(CLASSES))
    rows = purity.purity(open_scores(pool.scores), held, [7, 60]).splitlines()[2:]
    for k, line in zip([7, 60], rows, strict=True):
        metrics = pool.run(tmp_path / "out", k=k)
        taken = [pool.ids.index(image) for image in selected(tmp_path / "out")]
        _, said_k, images, pure, other, none, _, short, _ = (cell.strip() for cell in line.split("|"))
        assert (int(said_k), int(images), int(short)) == (k, len(taken), metrics["classes_short"])
        assert float(pure) == pytest.approx(100 * np.mean(pool.classes[taken, 0] == held[taken]), abs=0.05)
        assert float(none) == pytest.approx(100 * np.mean(held[taken] == purity.NONE), abs=0.05)
        assert float(pure) + float(other) + float(none) == pytest.approx(100, abs=0.15)


def test_hidden_labels_come_from_a_table_or_from_folders(tmp_path: Path) -> None:
    truth = {"tar": ["a.tar", "a.tar", "b.tar"], "member": ["img/1.jpg", "img/2.jpg", "img/1.jpg"], "label": ["bee", None, "ant"]}
    pq.write_table(pa.table(truth), tmp_path / "truth.parquet")
    ids = ["a.tar/img/1.jpg", "a.tar/img/2.jpg", "b.tar/img/1.jpg"]
    assert list(purity.from_table(tmp_path / "truth.parquet", ids, CLASSES)) == [1, purity.NONE, 0]
    assert list(purity.from_folders(["t.tar/fox/1.jpg", "t.tar/n01/images/fox.jpg"], CLASSES)) == [5, purity.NONE]
    assert list(purity.from_folders(["t.tar/n01/images/fox.jpg"], CLASSES, ["n01=dog"])) == [3]


def test_it_starts_without_torch() -> None:
    heavy = "print({'torch', 'timm', 'mlflow', 'matplotlib'} & set(sys.modules) or 'light')"
    command = [sys.executable, "-c", f"import sys, pipeline.stages.select; {heavy}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "light"


def test_the_pool_goes_through_memory_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it took 2.4 GB at 14 M images. What is written is what the whole in memory would give."""
    monkeypatch.setattr(manifest, "GROUP", 16)
    pool = Pool(tmp_path, 300)
    whole = manifest.read(pool.manifest)
    with monkeypatch.context() as patched:
        patched.setattr(manifest, "read", lambda folder: pytest.fail(f"{folder} was read whole"))
        for rule in ("top", "random", "all"):
            pool.run(tmp_path / rule, k=20, rule=rule)
    for rule in ("top", "random", "all"):
        chosen = whole.take(np.flatnonzero(np.isin(pool.ids, manifest.read(tmp_path / rule).table["id"].to_pylist()))).table
        unlabelled = chosen.set_column(7, "label", pa.nulls(len(chosen), pa.int32()))
        with artifact.writing(tmp_path / "expected") as tmp:
            manifest.write(tmp, unlabelled, CLASSES)
        files = [(tmp_path / name / manifest.FILE).read_bytes() for name in (rule, "expected")]
        assert files[0] == files[1]
        assert len(chosen) == (300 if rule == "all" else len(manifest.read(tmp_path / "top")))
