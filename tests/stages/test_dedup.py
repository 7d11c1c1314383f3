"""The leak check as a stage: outcomes, overrides, relations, resuming, and independence of the number of workers."""

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.leaks import decision, features, findings, gallery, search
from pipeline.store import artifact, manifest
from tests.leaks.bench import COPY, DOUBTFUL, ORIGINALS, OTHERS, PLAIN, Bench, bench, manifest_of
from tests.photographs import COPIES, cropped, mirrored, photograph, recoded
from tests.tiny import bytes_of


def test_copies_leave_the_pool_with_a_full_record_and_the_rest_stays(tmp_path: Path):
    work = bench(tmp_path)
    metrics = work.run()
    assert work.kept() == set(OTHERS)
    rows = {row["id"]: row for row in work.audit() if row["relation"] == "pool-val"}
    assert {name: rows[name]["match_id"] for name in rows} == {"copy of v0": "v0", "copy of v2": "v2"}
    crop = rows["copy of v2"]
    assert (crop["outcome"], crop["kept"], crop["mirrored"]) == ("removed", False, False)
    assert (crop["cover_image"], crop["cover_match"]) == pytest.approx((1.0, 0.49), abs=0.03)
    assert crop["inliers"] >= 12
    assert rows["copy of v0"]["mirrored"]
    assert rows["copy of v0"]["score"] > 0.9
    assert (metrics["removed"], metrics["kept"], metrics["val_with_a_leak"]) == (2, 4, 2)


@pytest.mark.parametrize(
    ("train", "strictness", "found", "stays"),
    [
        ("skip", "leaks", [], {"t0", "t1"}),
        ("report", "leaks", [("t0", "v3", True)], {"t0", "t1"}),
        ("remove", "leaks", [("t0", "v3", False)], {"t1"}),
        ("remove", "none", [("t0", "v3", True)], {"t0", "t1"}),
    ],
)
def test_a_labelled_copy_is_skipped_reported_or_removed(
    tmp_path: Path, train: str, strictness: str, found: list[tuple[str, str, bool]], stays: set[str]
):
    work = bench(tmp_path)
    metrics = work.run(train=train, strictness=strictness)
    assert [(row["id"], row["match_id"], row["kept"]) for row in work.audit() if row["relation"] == "train-val"] == found
    assert (metrics["train_copies"], metrics["train_removed"]) == (len(found), 2 - len(stays))
    assert work.kept("train") == stays
    same = artifact.identity(work.folder / "out" / "train") == artifact.identity(work.inputs["train"])
    assert same == (len(stays) == 2), "nothing that was trained on the labelled images is stale if they are the same"


def test_removal_takes_no_class_away(tmp_path: Path):
    work = Bench(tmp_path, pool=OTHERS, val=ORIGINALS, train={"t0": ORIGINALS["v3"]})
    with pytest.raises(UserError, match="every labelled image of thing would go"):
        work.run(train="remove")
    work.overrides.write_text("id,action,reason\nt0,keep,the only one\n")
    work.run(train="remove")
    assert work.kept("train") == {"t0"}


def test_a_labelled_image_can_be_removed_by_hand(tmp_path: Path):
    work = bench(tmp_path)
    work.overrides.write_text("id,action,reason\nt1,remove,seen by eye\n")
    assert work.run()["train_removed"] == 1
    assert work.kept("train") == {"t0"}
    rows = {row["id"]: row for row in work.audit()}
    assert [rows["t1"][key] for key in ("relation", "rule", "kept")] == ["train-val", "by hand", False]


def test_review_and_unverifiable_are_listed_and_a_param_removes_them(tmp_path: Path):
    work = Bench(tmp_path, pool=OTHERS | DOUBTFUL | {"plain": PLAIN, "broken": b"no image"}, val=ORIGINALS | {"vplain": PLAIN})
    metrics = work.run()
    found = {(row["relation"], row["id"]): (row["outcome"], row["rule"], row["kept"]) for row in work.audit()}
    assert found == {
        ("pool-val", "doubtful"): ("review", "shared features", True),
        ("pool-val", "plain"): ("unverifiable", findings.TOO_FEW, True),
        ("pool-val", "broken"): ("unverifiable", findings.UNDECODABLE, True),
        ("val", "vplain"): ("unverifiable", findings.TOO_FEW, True),
    }
    assert (metrics["removed"], metrics["review"], metrics["unverifiable"], metrics["val_unverifiable"]) == (0, 1, 2, 1)
    work.run(review="remove")
    assert work.kept() == set(OTHERS) | {"plain", "broken"}
    work.run(unverifiable="remove")
    assert work.kept() == set(OTHERS) | {"doubtful"}


def shifted(image: np.ndarray) -> np.ndarray:
    """Alike from afar, but no pixel of the texture is the same."""
    coarse = cv2.resize(image, (12, 9), interpolation=cv2.INTER_AREA)
    coarse = cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC).astype(int)
    return np.clip(coarse + (photograph(900).astype(int) - 128) // 8, 0, 255).astype(np.uint8)


def test_look_alikes_go_only_where_the_strictness_asks_for_it(tmp_path: Path):
    work = Bench(tmp_path, pool=OTHERS | COPY | {"alike": mirrored(shifted(ORIGINALS["v1"]))}, val=ORIGINALS)
    kept = {}
    for strictness in ("none", "leaks", "near"):
        work.scratch = tmp_path / strictness
        metrics = work.run(strictness=strictness)
        kept[strictness] = work.kept()
        assert metrics["removed"] == 2, "found, whatever happens to it"
    assert kept == {"none": set(OTHERS) | set(COPY) | {"alike"}, "leaks": set(OTHERS) | {"alike"}, "near": set(OTHERS)}
    row = next(row for row in work.audit() if row["id"] == "alike")
    assert (row["match_id"], row["outcome"], row["mirrored"], row["kept"]) == ("v1", "alike", True, False)
    assert row["score"] >= decision.ALIKE["near"]


def test_a_person_has_the_last_word_and_the_audit_says_so(tmp_path: Path):
    work = bench(tmp_path)
    work.overrides.write_text('id,action,reason\ncopy of v0,keep,"a reprint, not a copy"\np1,remove,seen by eye\n')
    metrics = work.run()
    assert work.kept() == (set(OTHERS) | {"copy of v0"}) - {"p1"}
    rows = {row["id"]: row for row in work.audit()}
    assert [rows["copy of v0"][key] for key in ("outcome", "kept", "override", "reason")] == [
        "removed",
        True,
        "keep",
        "a reprint, not a copy",
    ]
    assert [rows["p1"][key] for key in ("rule", "kept", "override", "match_id")] == ["by hand", False, "remove", None]
    assert metrics["overrides"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,action\n", "the first line must be"),
        ("", "the first line must be"),
        ("id,action,reason\np0,drop,x\n", "line 2: .* must be an id, `keep` or `remove`"),
        ("id,action,reason\np0,keep, \n", "line 2: .* a reason"),
        ("id,action,reason\np0,keep,a\np0,remove,b\n", "line 3: .* decided on twice"),
        ("id,action,reason\nnobody,keep,a\n", "have one with the id nobody"),
    ],
)
def test_a_wrong_override_stops_the_run_and_names_the_line(tmp_path: Path, text: str, message: str):
    pool = manifest.read(manifest_of(tmp_path / "pool", {"p0": b"x"}))
    file = tmp_path / "overrides.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        decision.read_overrides(file, {"pool": pool, "train": pool})


def test_copies_within_the_pool_collapse_to_the_largest(tmp_path: Path):
    twins = {"twin a": cropped(photograph(7), 0.8), "twin b": photograph(7), "twin c": recoded(photograph(7))}
    work = Bench(tmp_path, pool=OTHERS | twins, val=ORIGINALS)
    assert work.run()["duplicates"] == 0
    assert work.run(duplicates="collapse")["duplicates"] == 2
    assert work.kept() == set(OTHERS) | {"twin b"}
    gone = {row["id"]: row["relation"] for row in work.audit()}
    assert gone == {"twin a": "pool-pool", "twin c": "pool-pool"}


def test_a_killed_run_goes_on_after_its_last_whole_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same bytes from one shard, and from three with a crash after the first."""
    work = bench(tmp_path)
    work.run()  # one shard
    whole = bytes_of(tmp_path / "out")
    monkeypatch.setattr(search, "SHARD", 2)
    work.scratch = tmp_path / "killed"
    done: list[Path] = []
    match_shard = search.match_shard

    def killed_in_the_second(shard: search.Shard, **rest: Any) -> int:
        if done:
            raise KeyboardInterrupt
        done.append(shard.file)
        return match_shard(shard, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(search, "match_shard", killed_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            work.run()
    stamp = done[0].stat().st_mtime_ns
    work.run()
    assert done[0].stat().st_mtime_ns == stamp, "the finished shard was done again"
    assert bytes_of(tmp_path / "out") == whole


def test_two_processes_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    work = bench(tmp_path)
    work.run(train="skip")
    one = bytes_of(tmp_path / "out")
    monkeypatch.setattr(search, "SHARD", len(ORIGINALS))
    work.scratch = tmp_path / "again"
    work.run(workers=2, train="skip")
    assert len(list((tmp_path / "again" / "pool-val").iterdir())) == 2
    assert bytes_of(tmp_path / "out") == one


def test_the_page_is_complete_in_itself_and_shows_the_most_doubtful_first(tmp_path: Path):
    names = list(COPIES)
    copies = {f"<b>{name}": COPIES[name](ORIGINALS["v0"]) for name in names} | DOUBTFUL
    work = Bench(tmp_path, pool=copies, val=ORIGINALS)
    work.run()
    page = work.page()
    assert page.count("<figure>") == len(names) + 1
    assert page.count("data:image/webp;base64,") == len(names) + 1
    assert not re.search(r'(src|href)="(?!data:)', page), "the page must not load anything"
    assert "<b>" not in page
    rows = sorted(work.audit(), key=lambda row: abs(row["score"] - gallery.DOUBT))
    shown = re.findall(r"<small>([^<]*) in v", page)
    assert shown == [row["id"].replace("<", "&lt;").replace(">", "&gt;") for row in rows]


def test_a_store_gives_back_what_was_extracted(tmp_path: Path):
    images = manifest.read(manifest_of(tmp_path / "pool", {"a": photograph(1), "b": b"broken", "c": photograph(2, 40, 30)}))
    shard = search.Shard(search._pack(images.table), 0, tmp_path / "store" / "000000.safetensors", None)
    assert search.describe_shard(shard) == 3
    store = search.Store(tmp_path / "store", 3)
    for row, image in ((0, photograph(1)), (2, photograph(2, 40, 30))):
        kept, fresh = store[row], features.extract(image)
        assert kept is not None
        assert (kept.grey == fresh.grey).all()
        assert (kept.features.points == fresh.features.points).all()
        assert (kept.features.descriptors == fresh.features.descriptors).all()
    assert store[1] is None
    assert list(store.unverifiable()) == [(1, findings.UNDECODABLE)]


def test_empty_inputs_leave_the_pool_as_it_was(tmp_path: Path):
    work = Bench(tmp_path, pool=OTHERS)
    assert work.run()["kept"] == len(OTHERS)
    assert work.kept() == set(OTHERS)
