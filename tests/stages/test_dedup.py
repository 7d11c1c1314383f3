"""The leak check as two stages: outcomes, overrides, relations, resuming, and independence of the number of workers."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.leaks import decision, features, findings, search
from pipeline.store import artifact, manifest
from tests.leaks.bench import COPY, DOUBTFUL, ORIGINALS, OTHERS, PLAIN, Bench, bench, manifest_of, png
from tests.photographs import cropped, mirrored, photograph, recoded
from tests.tiny import bytes_of


def test_copies_leave_the_pool_with_a_full_record_and_the_rest_stays(tmp_path: Path):
    work = bench(tmp_path)
    metrics = work.run()
    assert work.kept() == set(OTHERS)
    rows = {row["id"]: row for row in work.audit() if row["relation"] == "pool-val"}
    assert {name: rows[name]["match_id"] for name in rows} == {"copy of v0": "v0", "copy of v2": "v2"}
    crop = rows["copy of v2"]
    assert (crop["outcome"], crop["kept"], crop["mirrored"]) == ("copy", False, False)
    assert (crop["cover_image"], crop["cover_match"]) == pytest.approx((1.0, 0.49), abs=0.03)
    assert crop["inliers"] >= 12
    assert rows["copy of v0"]["mirrored"]
    assert rows["copy of v0"]["score"] > 0.9
    assert (metrics["pool_val_copies"], metrics["kept"], metrics["val_with_a_leak"]) == (2, 4, 2)


@pytest.mark.parametrize(
    ("train", "strictness", "kept", "stays"),
    [
        ("report", "leaks", True, {"t0", "t1"}),
        ("remove", "leaks", False, {"t1"}),
        ("remove", "none", True, {"t0", "t1"}),
    ],
)
def test_a_labelled_copy_is_reported_or_removed(tmp_path: Path, train: str, strictness: str, kept: bool, stays: set[str]):
    work = bench(tmp_path)
    metrics = work.run(train=train, strictness=strictness)
    found = [(row["id"], row["match_id"], row["kept"]) for row in work.audit() if row["relation"] == "train-val"]
    assert found == [("t0", "v3", kept)]
    assert (metrics["train_val_copies"], metrics["train_removed"]) == (1, 2 - len(stays))
    assert work.kept("train") == stays
    same = artifact.identity(work.folder / "out" / "train") == artifact.identity(work.inputs["train"])
    assert same == (len(stays) == 2), "nothing that was trained on the labelled images is stale if they are the same"


def related(folder: Path) -> Bench:
    """The pool holds a copy of an image of each set, train and holdout copies of val, train one of holdout, val one of val."""
    held = {"h0": photograph(300), "h1": recoded(ORIGINALS["v1"]), "h2": photograph(302)}
    train = {"t0": ORIGINALS["v3"], "t1": photograph(200), "t2": cropped(held["h0"], 0.8)}
    pool = OTHERS | {"of val": recoded(ORIGINALS["v0"]), "of holdout": mirrored(held["h2"]), "of train": recoded(train["t1"])}
    return Bench(folder, pool=pool, val=ORIGINALS | {"v9": recoded(ORIGINALS["v2"])}, train=train, holdout=held)


RELATED = {
    "pool-val": {("of val", "v0")},
    "pool-holdout": {("of holdout", "h2")},
    "pool-train": {("of train", "t1")},
    "train-val": {("t0", "v3")},
    "train-holdout": {("t2", "h0")},
    "holdout-val": {("h1", "v1")},
    "val-val": {("v9", "v2")},
}


def test_every_set_is_searched_for_copies_of_those_that_measure(tmp_path: Path):
    work = related(tmp_path)
    metrics = work.run()
    found = {relation: set[tuple[str, str]]() for relation in RELATED}
    for row in work.audit():
        found[row["relation"]].add((row["id"], row["match_id"]))
        assert row["outcome"] == "copy"
    assert found == RELATED
    assert {relation: metrics[f"{relation.replace('-', '_')}_copies"] for relation in RELATED} == dict.fromkeys(RELATED, 1)
    assert work.kept() == set(OTHERS)
    assert work.kept("train") == {"t0", "t1", "t2"}
    assert artifact.identity(tmp_path / "out" / "holdout") == artifact.identity(work.inputs["holdout"])


def test_params_say_which_set_a_copy_leaves(tmp_path: Path):
    work = related(tmp_path)
    work.run(pool_train="keep", train="remove", holdout="remove")
    assert work.kept() == {*OTHERS, "of train"}
    assert work.kept("train") == {"t1"}
    assert work.kept("holdout") == {"h0", "h2"}
    work.decide(strictness="none", train="remove", holdout="remove")
    assert work.kept("train") == {"t0", "t1", "t2"}
    assert len(work.kept()) == 7


def test_copies_of_val_are_listed_with_the_set_they_are_in(tmp_path: Path):
    work = related(tmp_path)
    work.run(train="remove")
    rows = pq.read_table(tmp_path / "out" / "leaks" / "val_copies.parquet").to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("v0", "pool", "of val", "copy", False),
        ("v1", "holdout", "h1", "copy", True),
        ("v2", "val", "v9", "copy", True),
        ("v3", "train", "t0", "copy", False),
        ("v9", "val", "v2", "copy", True),
    ]


def test_copies_among_the_labelled_images_are_said_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    work = related(tmp_path)
    work.run()
    said = capsys.readouterr().err
    sentence = "1 of 3 training images are copies of val images; `dedup.train: remove` takes them out."
    for text in (sentence, "1 of 3 held-out images are copies of val images", "1 of 3 training images are copies of held-out"):
        assert f"LEAK: {text}" in said
    assert f'<p class="warning">{sentence}</p>' in work.page()
    assert {"stays in train (dedup.train: report)", "goes from pool"} <= fates(work)
    work.decide(train="remove")
    assert "1 of 3 training images are copies of val images; they were removed." in capsys.readouterr().err
    assert not any("stays in train" in fate for fate in fates(work))


def fates(work: Bench) -> set[str]:
    """What the gallery says of its images."""
    script = (work.folder / "out" / "gallery" / "findings.js").read_text()
    data = json.loads(script.removeprefix("gallery.open(").removesuffix(");\n"))
    return set(data["findings"]["fate"]["names"])


def test_the_labelled_images_are_left_alone_where_the_search_skips_them(tmp_path: Path):
    work = related(tmp_path)
    work.search(train=False)
    assert work.decide()["pool_train_copies"] == 0
    assert {row["relation"] for row in work.audit()} == {"pool-val", "pool-holdout", "holdout-val", "val-val"}
    with pytest.raises(UserError, match=r"`search\.train: true`"):
        work.decide(train="remove")
    with pytest.raises(UserError, match=r"`search\.duplicates: true`"):
        work.decide(duplicates="collapse")


def test_plain_copies_byte_for_byte_are_found_without_features(tmp_path: Path):
    plain = {name: png(np.full((90, 120, 3), grey, np.uint8)) for name, grey in (("v", 90), ("t", 91), ("other", 92))}
    sets = {"pool": {"p": plain["v"], "q": plain["t"], "r": plain["other"]}, "val": {"v": plain["v"]}, "train": {"t": plain["t"]}}
    work = Bench(tmp_path, **sets, holdout={"h": plain["v"]})
    work.run()
    found = {(row["relation"], row["id"], row["match_id"]): row["rule"] for row in work.audit() if row["outcome"] == "copy"}
    pairs = [("holdout-val", "h", "v"), ("pool-holdout", "p", "h"), ("pool-train", "q", "t"), ("pool-val", "p", "v")]
    assert found == dict.fromkeys(pairs, findings.SAME_BYTES)
    assert work.kept() == {"r"}
    assert {row["id"] for row in work.audit() if row["outcome"] == "unverifiable"} == {"r", "t", "v"}


def test_equal_checksums_are_no_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "_crc_and_size", lambda table: np.zeros(len(table), np.uint64))
    images = manifest.read(manifest_of(tmp_path / "a", {"a": b"one", "b": b"two"}))
    known = manifest.read(manifest_of(tmp_path / "b", {"c": b"two", "d": b"six", "e": b"two"}))
    assert [(row["row"], row["match"]) for row in search.same_bytes(images, known, False)] == [(1, 0), (1, 2)]
    assert [(row["row"], row["match"]) for row in search.same_bytes(known, known, True)] == [(2, 0)]


def test_a_change_of_mind_does_not_search_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Strictness, review and overrides are decided on what was found once, and as if it had been found for them."""
    work = Bench(tmp_path, pool=OTHERS | COPY | DOUBTFUL | {"alike": mirrored(shifted(ORIGINALS["v1"]))}, val=ORIGINALS)
    work.search()
    monkeypatch.setattr(search, "verified", None)
    kept = {}
    for params in ({"strictness": "none"}, {}, {"strictness": "near"}, {"review": "remove"}):
        work.decide(**params)
        kept[" ".join(params.values())] = work.kept() - set(OTHERS)
    assert kept == {"none": {*COPY, "alike", "doubtful"}, "": {"alike", "doubtful"}, "near": {"doubtful"}, "remove": {"alike"}}
    work.overrides.write_text("id,action,reason\ncopy of v0,keep,a reprint\n")
    work.decide()
    assert "copy of v0" in work.kept()


def test_removal_takes_no_class_away(tmp_path: Path):
    work = Bench(tmp_path, pool=OTHERS, val=ORIGINALS, train={"t0": ORIGINALS["v3"]})
    with pytest.raises(UserError, match="every training image of thing would go"):
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
    assert [rows["t1"][key] for key in ("relation", "rule", "kept")] == ["train", "by hand", False]


def test_review_and_unverifiable_are_listed_and_a_param_removes_them(tmp_path: Path):
    work = Bench(
        tmp_path, pool=OTHERS | DOUBTFUL | {"plain": PLAIN, "broken": b"no image"}, val=ORIGINALS | {"vplain": PLAIN[1:]}
    )
    metrics = work.run()
    found = {(row["relation"], row["id"]): (row["outcome"], row["rule"], row["kept"]) for row in work.audit()}
    assert found == {
        ("pool-val", "doubtful"): ("review", "shared features", True),
        ("pool", "plain"): ("unverifiable", findings.TOO_FEW, True),
        ("pool", "broken"): ("unverifiable", findings.UNDECODABLE, True),
        ("val", "vplain"): ("unverifiable", findings.TOO_FEW, True),
    }
    assert (metrics["pool_val_copies"], metrics["review"], metrics["unverifiable"]) == (0, 1, 2)
    assert metrics["val_unverifiable"] == 1
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
        metrics = work.run(strictness=strictness)
        kept[strictness] = work.kept()
        assert metrics["pool_val_copies"] == 2, "found, whatever happens to it"
    assert kept == {"none": set(OTHERS) | set(COPY) | {"alike"}, "leaks": set(OTHERS) | {"alike"}, "near": set(OTHERS)}
    row = next(row for row in work.audit() if row["id"] == "alike")
    assert (row["match_id"], row["outcome"], row["mirrored"], row["kept"]) == ("v1", "alike", True, False)
    assert row["score"] >= findings.ALIKE["near"]


def test_a_person_has_the_last_word_and_the_audit_says_so(tmp_path: Path):
    work = bench(tmp_path)
    work.overrides.write_text('id,action,reason\ncopy of v0,keep,"a reprint, not a copy"\np1,remove,seen by eye\n')
    metrics = work.run()
    assert work.kept() == (set(OTHERS) | {"copy of v0"}) - {"p1"}
    rows = {row["id"]: row for row in work.audit()}
    assert [rows["copy of v0"][key] for key in ("outcome", "kept", "override", "reason")] == [
        "copy",
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
        ('id,action,reason\n\np0,keep,"two\nlines"\np0,remove,b\n', "line 5: .* decided on twice"),
        ('id,action,reason\np0,keep,"a\n', "line 2: .* quote missing"),
        ("id;action;reason\np0;keep\n", "line 2: .* must be an id"),
        ("id,action,reason\nnobody,keep,a\n", "have one with the id nobody"),
    ],
)
def test_a_wrong_override_stops_the_run_and_names_the_line(tmp_path: Path, text: str, message: str):
    pool = manifest.read(manifest_of(tmp_path / "pool", {"p0": b"x"}))
    file = tmp_path / "overrides.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        decision.read_overrides(file, {"pool": pool, "train": pool, "holdout": pool})


@pytest.mark.parametrize("comma", [",", ";"])
def test_overrides_from_a_spreadsheet_are_understood(tmp_path: Path, comma: str):
    pool = manifest.read(manifest_of(tmp_path / "pool", {"größe, 1": b"x", "p": b"y"}))
    file = tmp_path / "overrides.csv"
    rows = [["id", "action", "reason"], ['"größe, 1"', "keep", '"says ""copy""\nbut; is none "'], ["p", "remove", "ja"]]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(comma.join, rows)).encode() + b"\r\n\r\n")
    read = decision.read_overrides(file, {"pool": pool, "train": pool, "holdout": pool})
    assert read == {"größe, 1": ("pool", "keep", 'says "copy"\nbut; is none'), "p": ("pool", "remove", "ja")}
    assert list(read) == ["größe, 1", "p"]


@pytest.mark.parametrize(("encoding", "line"), [("latin-1", 3), ("utf-16", 1)])
def test_overrides_in_another_encoding_are_refused_with_the_line(tmp_path: Path, encoding: str, line: int):
    pool = manifest.read(manifest_of(tmp_path / "pool", {"p": b"x"}))
    file = tmp_path / "overrides.csv"
    file.write_bytes("id,action,reason\np,keep,a\nq,keep,größe\n".encode(encoding))
    with pytest.raises(UserError, match=f"overrides.csv, line {line}: this is not UTF-8. Save the table as `CSV UTF-8`"):
        decision.read_overrides(file, {"pool": pool, "train": pool, "holdout": pool})


def test_an_image_counts_once_in_a_relation_by_its_strongest_outcome():
    rows = [
        ("pool-val", "a", "v0", "review"),
        ("pool-val", "a", "v1", "copy"),
        ("pool-val", "b", "v0", "review"),
        ("pool-val", "b", "v1", "review"),
        ("pool-val", "b", "v2", "alike"),
        ("pool-train", "a", "t0", "review"),
        ("val", "b", None, "unverifiable"),
    ]
    audit = pa.Table.from_pylist([dict(zip(("relation", "id", "match_id", "outcome"), row, strict=True)) for row in rows])
    assert findings.strongest(audit) == ["copy", "copy", "review", "review", "review", "review", "unverifiable"]
    counted = {("pool-val", "copy"): 1, ("pool-val", "review"): 1, ("pool-train", "review"): 1, ("val", "unverifiable"): 1}
    assert findings.counts(audit) == counted


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
        done.append(shard.folder)
        return match_shard(shard, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(search, "match_shard", killed_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            work.run()
    stamp = done[0].stat().st_mtime_ns
    work.run()
    assert done[0].stat().st_mtime_ns == stamp, "the finished shard was done again"
    assert bytes_of(tmp_path / "out") == whole


@pytest.mark.whole
def test_two_processes_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    work = bench(tmp_path)
    monkeypatch.setattr(search, "SHARD", len(ORIGINALS) + 2)  # all of the reference in one: the processes have the real SHARD
    work.inputs["pool"] = manifest_of(tmp_path / "more", OTHERS | COPY | {f"q{i}": photograph(400 + i) for i in range(4)})
    work.run()
    one = bytes_of(tmp_path / "out")
    work.scratch = tmp_path / "again"
    work.run(workers=2)
    assert len(list((tmp_path / "again" / "pool-reference").iterdir())) == 2
    assert bytes_of(tmp_path / "out") == one


def test_pictures_come_back_as_they_were_extracted(tmp_path: Path):
    images = manifest.read(manifest_of(tmp_path / "pool", {"a": photograph(1), "b": b"broken", "c": photograph(2, 40, 30)}))
    shard = search.Shard(search._pack(images.table), 0, tmp_path / "store" / "000000", None)
    assert search.describe_shard(shard) == 3
    store = search.Pictures(tmp_path / "store", 3)
    for row, image in ((0, photograph(1)), (2, photograph(2, 40, 30))):
        kept, fresh = store[row], features.extract(image)
        assert kept is not None
        assert (kept.grey == fresh.grey).all()
        assert (kept.features.points == fresh.features.points).all()
        assert (kept.features.descriptors == fresh.features.descriptors).all()
    assert store[1] is None


def test_empty_inputs_leave_the_pool_as_it_was(tmp_path: Path):
    work = Bench(tmp_path, pool=OTHERS)
    assert work.run()["kept"] == len(OTHERS)
    assert work.kept() == set(OTHERS)


def test_damaged_scratch_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = Bench(tmp_path, pool=COPY, val=ORIGINALS)
    work.search()
    before = bytes_of(tmp_path / "found")
    kept = [file for file in work.scratch.rglob("*") if file.suffix in (".safetensors", ".parquet")]
    assert len(kept) == 4  # pictures, the index, pool against reference, reference against itself
    for file in kept:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    work.search()
    assert bytes_of(tmp_path / "found") == before
    assert capsys.readouterr().err.count("this is done again") == 4
