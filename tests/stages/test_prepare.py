"""`prepare`: what it makes of good sources, what it refuses, and what it says of bad ones."""

import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline.harness.machine import Machine
from pipeline.sources.source import SourceError
from pipeline.stages import prepare
from pipeline.store import artifact, decode, manifest
from tests.tiny import encoded, folder_of, jpeg, jpegs, picture, tar_of

OUTS = ("train", "holdout", "val", "pool", "quarantine")
CLASSES = {"cat": 6, "dog": 5, "eel": 4}


class Prepared:
    """The outs of one run."""

    def __init__(self, folder: Path, params: Mapping[str, Any], workers: int = 2) -> None:
        self.folder = folder
        self.metrics = prepare.run(
            prepare.Prepare.model_validate(params),
            root=Path(params["root"]),
            **{f"{name}_out": folder / name for name in OUTS},
            machine=Machine(workers=workers),
        )
        self.train, self.holdout, self.val, self.pool = (manifest.read(folder / name) for name in OUTS[:4])

    def refused(self) -> dict[str, str]:
        """Reason by id."""
        artifact.verify(self.folder / "quarantine")
        table = pq.read_table(self.folder / "quarantine" / "quarantine.parquet")
        return dict(zip(table["id"].to_pylist(), table["reason"].to_pylist(), strict=True))

    def files(self) -> dict[str, bytes]:
        return {
            f"{name}/{f.name}": f.read_bytes()
            for name in OUTS
            for f in (self.folder / name).iterdir()
            if f.name != artifact.CHECKSUMS
        }


def ids(*parts: manifest.Manifest) -> list[str]:
    return sorted(image for part in parts for image in part.table["id"].to_pylist())


def by_class(images: manifest.Manifest) -> Counter[str]:
    return Counter(images.classes[label] for label in images.table["label"].to_pylist())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three small tars: labelled, val, pool."""
    folder = tmp_path / "root"
    tar_of(folder / "labelled.tar", jpegs(CLASSES, seed=1))
    tar_of(folder / "val.tar", jpegs({"cat": 2, "dog": 2, "eel": 2}, seed=2))
    tar_of(folder / "pool-0.tar", jpegs({"n01": 4, "n02": 3}, seed=3))
    tar_of(folder / "pool-1.tar", jpegs({"n03": 5}, seed=4))
    return folder


def params(root: Path, **changed: Any) -> dict[str, Any]:
    return {
        "root": str(root),
        "labelled": [{"kind": "tar", "path": "labelled.tar"}],
        "val": [{"kind": "tar", "path": "val.tar"}],
        "pool": [{"kind": "tar", "path": "pool-*.tar"}],
        **changed,
    }


def error_of(root: Path, **changed: Any) -> str:
    with pytest.raises(SourceError) as error:
        Prepared(root.parent / "out", params(root, **changed))
    assert not list((root.parent / "out").iterdir()), "a failed run leaves nothing"
    return str(error.value)


# What comes of good sources -------------------------------------------------------------------------------------------


def test_every_image_has_its_row_and_its_bytes(root, tmp_path):
    got = Prepared(tmp_path / "out", params(root))
    drawn = {f"labelled.tar/{name}": data for name, data in jpegs(CLASSES, seed=1).items()}
    assert ids(got.train, got.holdout) == sorted(drawn)
    for part in (got.train, got.holdout):
        assert part.classes == ("cat", "dog", "eel")
        assert [part.classes[label] for label in part.labels()] == [image.split("/")[1] for image in ids(part)]
        assert list(manifest.image_bytes(part, range(len(part)))) == [drawn[image] for image in ids(part)]
    assert ids(got.val) == sorted(f"val.tar/{name}" for name in jpegs({"cat": 2, "dog": 2, "eel": 2}))
    assert ids(got.pool)[:2] == ["pool-0.tar/n01/0000.jpg", "pool-0.tar/n01/0001.jpg"]
    assert got.pool.table["label"].null_count == len(got.pool) == 12
    assert got.pool.classes == ()
    assert set(got.train.table["path"].to_pylist()) == {(root / "labelled.tar").as_posix()}
    assert got.metrics == {
        "classes": 3,
        "train": 12,
        "holdout": 3,
        "val": 6,
        "pool": 12,
        "dropped": 0,
        "quarantine": 0,
        "reasons": {},
        "repeated": 0,
        "warnings": None,
    }


def test_the_holdout_has_its_share_of_every_class_and_at_least_one_image(root, tmp_path):
    got = Prepared(tmp_path / "a", params(root, holdout=0.4))
    assert by_class(got.holdout) == {"cat": 2, "dog": 2, "eel": 2}
    assert by_class(got.train) == {"cat": 4, "dog": 3, "eel": 2}
    assert by_class(Prepared(tmp_path / "b", params(root, holdout=0.01)).holdout) == {"cat": 1, "dog": 1, "eel": 1}


def test_the_seed_draws_the_holdout_and_the_budget(root, tmp_path):
    draws = [Prepared(tmp_path / str(seed), params(root, per_class=3, holdout=0.3, seed=seed)) for seed in range(4)]
    assert len({tuple(ids(d.holdout)) for d in draws}) > 1
    assert len({tuple(ids(d.train, d.holdout)) for d in draws}) > 1
    for draw in draws:
        assert by_class(draw.train) == {"cat": 2, "dog": 2, "eel": 2}
        assert by_class(draw.holdout) == {"cat": 1, "dog": 1, "eel": 1}


def test_images_beyond_the_budget_go_to_the_pool_without_labels_or_nowhere(root, tmp_path):
    everything = Prepared(tmp_path / "all", params(root))
    pooled = Prepared(tmp_path / "pool", params(root, per_class=3))
    assert ids(pooled.train, pooled.holdout, pooled.pool) == ids(everything.train, everything.holdout, everything.pool)
    assert pooled.pool.table["label"].null_count == len(pooled.pool) == 12 + 6
    dropped = Prepared(tmp_path / "drop", params(root, per_class=3, rest="drop"))
    assert ids(dropped.pool) == ids(everything.pool)
    assert ids(dropped.train) == ids(pooled.train)
    assert dropped.metrics["dropped"] == 6


def test_a_larger_budget_holds_the_smaller_one(root, tmp_path):
    small, large = (Prepared(tmp_path / str(n), params(root, per_class=n)) for n in (2, 4))
    assert set(ids(small.train, small.holdout)) < set(ids(large.train, large.holdout))


def test_classes_may_have_an_order_of_their_own(root, tmp_path):
    plain = Prepared(tmp_path / "a", params(root))
    other = Prepared(tmp_path / "b", params(root, classes=["eel", "cat", "dog"]))
    assert other.train.classes == other.holdout.classes == other.val.classes == ("eel", "cat", "dog")
    assert by_class(other.train) == by_class(plain.train)
    assert ids(other.train) == ids(plain.train)


def test_workers_and_the_order_of_files_change_no_byte(root, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.sources.listing.CHUNK", 4)
    folder_of(root / "loose", {"a.jpg": jpeg(90), "b/c.jpg": jpeg(91), "bad.jpg": b"x", "awful.jpg": b"", "c.txt": b"x"})
    folder_of(root / "photos", jpegs(CLASSES, seed=6))
    source: dict[str, Any] = {
        "labelled": [{"kind": "folder", "path": "photos"}],
        "pool": [{"kind": "folder", "path": "loose"}, {"kind": "tar", "path": "pool-*.tar"}],
        "per_class": 3,
    }
    first = Prepared(tmp_path / "0", params(root, **source), workers=1).files()
    listing = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: reversed(list(listing(folder))))
    monkeypatch.setattr("pipeline.sources.listing.CHUNK", 3)
    source["pool"].reverse()
    assert Prepared(tmp_path / "1", params(root, **source), workers=4).files() == first


def test_a_folder_is_read_like_a_tar(root, tmp_path):
    folder_of(root / "photos", jpegs(CLASSES, seed=1))
    folder_of(root / "more", {"x/y/z.jpg": jpeg(70), "top.jpg": jpeg(71)})
    folders = {"labelled": [{"kind": "folder", "path": "photos"}], "pool": [{"kind": "folder", "path": "more"}]}
    got = Prepared(tmp_path / "out", params(root, **folders))
    tars = Prepared(tmp_path / "tars", params(root))
    assert [i.removeprefix("photos/") for i in ids(got.train, got.holdout)] == [
        i.removeprefix("labelled.tar/") for i in ids(tars.train, tars.holdout)
    ]
    assert ids(got.pool) == ["more/top.jpg", "more/x/y/z.jpg"]
    assert list(manifest.image_bytes(got.pool, [1, 0])) == [jpeg(70), jpeg(71)]


def test_the_root_itself_may_be_the_folder(tmp_path):
    folder_of(tmp_path / "root" / "train", jpegs(CLASSES))
    tar_of(tmp_path / "root" / "train" / "cat" / "val.tar", jpegs({"cat": 1}, seed=5))
    source = params(
        tmp_path / "root" / "train",
        labelled=[{"kind": "folder", "path": "."}],
        val=[{"kind": "tar", "path": "cat/val.tar"}],
        pool=[],
    )
    got = Prepared(tmp_path / "out", source)
    assert ids(got.train, got.holdout)[0] == "cat/0000.jpg"
    assert got.refused() == {"cat/val.tar": "not an image"}
    assert len(got.pool) == 0


def test_images_inside_tables_move_into_the_artifacts(root, tmp_path):
    drawn = jpegs(CLASSES, seed=1)
    table = pa.table({"image": list(drawn.values()), "label": [name.split("/")[0] for name in drawn]})
    pq.write_table(table, root / "labelled.parquet")
    pq.write_table(pa.table({"image": [jpeg(1), b"text", jpeg(2), None]}), root / "pool.parquet")
    tables = {"labelled": [{"kind": "parquet", "path": "labelled.parquet"}], "pool": [{"kind": "parquet", "path": "*l.parquet"}]}
    got = Prepared(tmp_path / "out", params(root, **tables, per_class=3))
    assert set(ids(got.train, got.holdout)) < {f"labelled.parquet/{i:08}" for i in range(15)}
    by_id = {f"labelled.parquet/{i:08}": data for i, data in enumerate(drawn.values())} | {
        "pool.parquet/00000000": jpeg(1),
        "pool.parquet/00000002": jpeg(2),
    }
    for part in (got.train, got.holdout, got.pool):
        assert list(manifest.image_bytes(part, range(len(part)))) == [by_id[image] for image in ids(part)]
    assert set(got.holdout.table["path"].to_pylist()) == {(tmp_path / "out" / "train" / "images-00000.tar").as_posix()}
    assert got.refused() == {"pool.parquet/00000001": "not an image", "pool.parquet/00000003": "empty file"}
    again = Prepared(tmp_path / "again", params(root, **tables, per_class=3))
    assert (tmp_path / "again/train/images-00000.tar").read_bytes() == (tmp_path / "out/train/images-00000.tar").read_bytes()
    assert again.metrics == got.metrics


def test_links_to_files_are_followed(root, tmp_path):
    elsewhere = folder_of(tmp_path / "elsewhere", {"one.jpg": jpeg(80)})
    pool = root / "linked"
    pool.mkdir()
    (pool / "file.jpg").symlink_to(elsewhere / "one.jpg")
    (pool / "gone.jpg").symlink_to(elsewhere / "nothing.jpg")
    (pool / "loop.jpg").symlink_to("loop.jpg")
    got = Prepared(tmp_path / "out", params(root, pool=[{"kind": "folder", "path": "linked"}]))
    assert ids(got.pool) == ["linked/file.jpg"]
    assert got.refused() == {"linked/gone.jpg": "link to nothing", "linked/loop.jpg": "link to nothing"}


@pytest.mark.parametrize(
    ("at", "source"),
    [
        ("photos/folder", {"kind": "folder", "path": "photos"}),
        ("folder", {"kind": "folder", "path": "folder"}),
        ("folder", {"kind": "tar", "path": "folder/*.tar"}),
        ("folder", {"kind": "torchvision", "name": "MNIST"}),
    ],
)
def test_a_link_to_a_folder_is_refused_since_dvc_does_not_look_behind_it(root, tmp_path, at, source):
    folder_of(root / "photos", {"one.jpg": jpeg(80)})
    tar_of(tmp_path / "elsewhere" / "a.tar", {"two.jpg": jpeg(81)})
    (root / at).symlink_to(tmp_path / "elsewhere")
    assert f"prepare.pool: {root / at} is a link to a folder. DVC does not look behind it" in error_of(root, pool=[source])


def test_the_root_may_be_a_link_which_dvc_follows(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert len(Prepared(tmp_path / "out", params(tmp_path / "link")).pool) == 12


def test_a_class_that_val_lacks_is_told_loudly(root, tmp_path, capsys):
    tar_of(root / "val.tar", jpegs({"cat": 2, "dog": 1}, seed=2))
    got = Prepared(tmp_path / "out", params(root))
    (sentence,) = got.metrics["warnings"]
    assert sentence.startswith("1 of 3 classes have no image in val: eel. Each figure of val is measured on the other 2 alone.")
    assert f"GAP: {sentence}" in capsys.readouterr().err


def test_a_root_that_is_a_file(root):
    assert "is not a folder. Name the folder of the sources" in error_of(root / "val.tar")


def test_width_and_height_are_those_of_the_decoded_image(root, tmp_path):
    exif = Image.Exif()
    exif[decode.ORIENTATION] = 6
    tar_of(root / "pool-2.tar", {"turned.jpg": encoded(picture(1, (48, 20)), "JPEG", exif=exif)})
    for check in ("decode", "header"):
        got = Prepared(tmp_path / check, params(root, check=check))
        row = got.pool.table.filter(pc.equal(got.pool.table["id"], "pool-2.tar/turned.jpg")).to_pylist()[0]
        assert (row["width"], row["height"]) == (20, 48)


def test_repeated_images_are_counted(root, tmp_path):
    tar_of(root / "pool-2.tar", {"a.jpg": jpeg(100_000), "b.jpg": jpeg(55), "c.jpg": jpeg(55)})  # a: labelled.tar's first
    assert Prepared(tmp_path / "out", params(root)).metrics["repeated"] == 2


# What is refused ------------------------------------------------------------------------------------------------------


def broken() -> dict[str, tuple[bytes, str]]:
    """Files by name, with the reason that each must be given."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = encoded(noise, "JPEG")
    middle = len(whole) // 2
    return {
        "empty.jpg": (b"", "empty file"),
        "list.txt": (b"cat,dog\n", "not an image"),
        "cut.jpg": (whole[:middle], "damaged: "),
        "hole.jpg": (whole[:middle] + bytes(64) + whole[middle + 64 :], "damaged: "),
        "cut.png": (encoded(noise, "PNG")[:500], "damaged: "),
        "large.jpg": (jpeg(1, (101, 100)), "oversized: 101 x 100 pixels by its header"),
        ".hidden.jpg": (jpeg(2), "hidden file"),
        "._cat.jpg": (b"\x00\x05\x16\x07", "hidden file"),
        ".thumbs/a.jpg": (jpeg(3), "hidden file"),
    }


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_what_cannot_be_used_goes_to_the_quarantine_with_its_reason(root, tmp_path, kind):
    files = {name: data for name, (data, _) in broken().items()} | {"good.jpg": jpeg(4, (100, 100))}
    tar_of(root / "odd.tar", files) if kind == "tar" else folder_of(root / "odd.tar", files)
    got = Prepared(tmp_path / "out", params(root, pool=[{"kind": kind, "path": "odd.tar"}], max_pixels=10_000))
    refused = got.refused()
    assert set(refused) == {f"odd.tar/{name}" for name in broken()}
    for name, (_, reason) in broken().items():
        assert refused[f"odd.tar/{name}"].startswith(reason), name
    assert ids(got.pool) == ["odd.tar/good.jpg"]
    assert got.metrics["quarantine"] == 9
    assert got.metrics["reasons"] == {"damaged": 3, "hidden file": 3, "empty file": 1, "not an image": 1, "oversized": 1}
    table = pq.read_table(tmp_path / "out" / "quarantine" / "quarantine.parquet")
    assert table.column_names == ["id", "path", "offset", "size", "role", "reason"]
    assert set(table["role"].to_pylist()) == {"pool"}


def test_refused_bytes_can_be_found_again(root, tmp_path):
    tar_of(root / "odd.tar", {"good.jpg": jpeg(1), "list.txt": b"cat,dog\n"})
    Prepared(tmp_path / "out", params(root, pool=[{"kind": "tar", "path": "odd.tar"}]))
    row = pq.read_table(tmp_path / "out" / "quarantine" / "quarantine.parquet").to_pylist()[0]
    with Path(row["path"]).open("rb") as file:
        file.seek(row["offset"])
        assert file.read(row["size"]) == b"cat,dog\n"


def test_the_header_check_trusts_the_pixels(root, tmp_path):
    files = {name: data for name, (data, _) in broken().items()}
    tar_of(root / "odd.tar", files)
    got = Prepared(tmp_path / "out", params(root, pool=[{"kind": "tar", "path": "odd.tar"}], check="header"))
    assert ids(got.pool) == [f"odd.tar/{name}" for name in ("cut.jpg", "cut.png", "hole.jpg", "large.jpg")]


def test_labelled_files_outside_of_the_class_folders_are_refused(root, tmp_path):
    tar_of(root / "labelled.tar", {"stray.jpg": jpeg(1), "README": b"text", **jpegs(CLASSES, seed=1)})
    got = Prepared(tmp_path / "out", params(root))
    assert got.refused() == dict.fromkeys(("labelled.tar/README", "labelled.tar/stray.jpg"), "outside of the class folders")
    assert len(got.train) + len(got.holdout) == 15


def test_a_giant_file_is_not_read(root, tmp_path):
    (root / "loose").mkdir()
    with (root / "loose" / "film.mp4").open("wb") as film:
        film.truncate(manifest.MAX_BYTES + 1)
    (root / "loose" / "a.jpg").write_bytes(jpeg(1))
    got = Prepared(tmp_path / "out", params(root, pool=[{"kind": "folder", "path": "loose"}]))
    assert got.refused() == {"loose/film.mp4": f"oversized: {manifest.MAX_BYTES + 1} bytes"}


def test_pipes_and_odd_names_are_refused(root, tmp_path):
    (root / "loose").mkdir()
    os.mkfifo(root / "loose" / "pipe.jpg")
    (root / "loose" / "a.jpg").write_bytes(jpeg(1))
    (root / "loose" / "kött.jpg").write_bytes(jpeg(2))
    Path(os.fsdecode(os.fsencode(root) + b"/loose/k\xf6tt.jpg")).write_bytes(jpeg(3))
    got = Prepared(tmp_path / "out", params(root, pool=[{"kind": "folder", "path": "loose"}]))
    assert ids(got.pool) == ["loose/a.jpg", "loose/kött.jpg"]
    assert got.refused() == {"loose/pipe.jpg": "not a regular file", "loose/k\\xf6tt.jpg": "file name is not UTF-8"}


# What stops the run ---------------------------------------------------------------------------------------------------


def test_a_missing_path(root):
    told = error_of(root, labelled=[{"kind": "tar", "path": "labeled.tar"}])
    assert told.startswith("prepare.labelled: nothing matches `labeled.tar` (did you mean `labelled.tar`?) in ")
    assert "nothing matches `pile-*.tar`" in error_of(root, pool=[{"kind": "tar", "path": "pile-*.tar"}])


@pytest.mark.parametrize("path", ["/etc", "../elsewhere.tar"])
def test_a_path_outside_of_the_root(root, path):
    with pytest.raises(ValidationError, match=r"must lie below `prepare\.root`"):
        prepare.Prepare.model_validate(params(root, pool=[{"kind": "tar", "path": path}]))


def test_a_source_of_another_kind(root):
    folder_of(root / "folder", jpegs(CLASSES))
    assert "say `kind: folder`" in error_of(root, labelled=[{"kind": "tar", "path": "folder"}])
    assert "say `kind: tar`" in error_of(root, labelled=[{"kind": "folder", "path": "labelled.tar"}])
    with pytest.raises(ValidationError, match="'folder', 'tar', 'torchvision', 'parquet'"):
        prepare.Prepare.model_validate(params(root, pool=[{"kind": "lmdb", "path": "x"}]))


def test_no_labels(root):
    tar_of(root / "flat.tar", {"0.jpg": jpeg(0), "1.jpg": jpeg(1)})
    told = error_of(root, labelled=[{"kind": "tar", "path": "flat.tar"}])
    assert told.startswith("prepare.labelled: ")
    assert "flat.tar has no class folders. Labelled images are expected as <class>/<image>" in told


def test_a_val_class_that_cannot_be_learned(root):
    tar_of(root / "val.tar", jpegs({"cat": 2, "fox": 1}, seed=2))
    told = error_of(root)
    assert "prepare.val has classes that prepare.labelled lacks: fox." in told
    assert "prepare.labelled has: cat, dog, eel." in told


def test_an_empty_class_folder(root):
    folder_of(root / "photos", jpegs(CLASSES))
    (root / "photos" / "fox").mkdir()
    told = error_of(root, labelled=[{"kind": "folder", "path": "photos"}])
    assert "prepare.labelled has classes without a readable image: fox (it holds no files)." in told


@pytest.mark.parametrize("role", ["labelled", "val"])
def test_a_class_of_which_every_image_is_refused(root, role):
    good = jpegs(CLASSES, seed=7)
    bad = {"dog/x.jpg": b"", "dog/y.jpg": b"text", "dog/z.jpg": b"more text", "dog/.DS_Store": b"", "__MACOSX/cat/._1.jpg": b""}
    tar_of(root / f"{role}.tar", {name: data for name, data in good.items() if "dog" not in name} | bad)
    told = error_of(root)
    assert f"prepare.{role} has classes without a readable image: " in told
    assert "dog (2 x not an image, 1 x empty file, 1 x hidden file)" in told
    assert "MACOSX" not in told


@pytest.mark.parametrize("role", ["labelled", "val", "pool"])
def test_no_readable_image_at_all(root, role):
    name = "pool-0.tar" if role == "pool" else f"{role}.tar"
    (root / "pool-1.tar").unlink()
    tar_of(root / name, {f"{c}/{i}.jpg": data for c in CLASSES for i, data in enumerate((b"", b"text", b"text"))})
    assert error_of(root) == f"prepare.{role} has no readable image: 6 x not an image, 3 x empty file."


def test_a_budget_larger_than_a_class(root):
    told = error_of(root, per_class=5)
    assert "prepare.per_class is 5, but these classes have fewer readable labelled images: eel 4. Set it to 4 or less" in told
    tar_of(root / "labelled.tar", {**jpegs(CLASSES, seed=1), "eel/0000.jpg": b"broken"})
    assert "eel 3. Set it to 3 or less" in error_of(root, per_class=4)


def test_a_holdout_that_leaves_nothing_to_train_on(root):
    assert "prepare.holdout (0.9) takes every labelled image of the class eel, which has 4" in error_of(root, holdout=0.9)
    assert "the class cat, which has 1" in error_of(root, per_class=1)


def test_bad_news_comes_before_the_long_part(root, monkeypatch):
    """Whatever the listing can tell stops the run before an image is decoded."""
    monkeypatch.setattr(decode, "decode", lambda *_: pytest.fail("decoded"))
    for changed in ({"per_class": 9}, {"holdout": 0.9}, {"classes": ["cat"]}):
        error_of(root, **changed)


def test_a_class_order_with_other_classes(root):
    told = error_of(root, classes=["cat", "cat", "dgo", "eel"])
    assert "Missing: dog. Not there: dgo. Repeated: cat." in told


def test_an_image_that_occurs_twice(root):
    told = error_of(root, pool=[{"kind": "tar", "path": "val.tar"}])
    assert "val.tar/cat/0000.jpg occurs twice (in prepare.val and prepare.pool)" in told
    tar = root / "pool-0.tar"
    with tarfile.open(tar, "a") as archive:
        archive.addfile(tarfile.TarInfo("n01/0000.jpg"))
    assert "pool-0.tar/n01/0000.jpg occurs twice (in prepare.pool)" in error_of(root)


# Kills and changes ----------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
from pipeline.store import decode
from pipeline.harness.machine import Machine
from pipeline.stages import prepare

plain = decode.decode
decode.decode = lambda *args: (time.sleep(60), plain(*args))[1]
root, out, params = sys.argv[1:]
outs = {f"{name}_out": Path(out, name) for name in ("train", "holdout", "val", "pool", "quarantine")}
prepare.run(prepare.Prepare.model_validate_json(params), root=Path(root), **outs, machine=Machine(workers=1))
"""


def test_a_killed_run_leaves_no_artifact_and_the_next_one_is_whole(root, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOW, str(root), str(out), json.dumps(params(root))]
    path = str(Path(prepare.__file__).parents[2])
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True) as killed:
        assert killed.stderr is not None
        while "listing pool" not in (line := killed.stderr.readline()):
            assert line, "ended before it was killed"
        killed.kill()
    left = [name.name for name in out.iterdir()]
    assert len(left) == len(OUTS), "killed at work"
    assert all(name.startswith(".") for name in left)
    Prepared(out, params(root))
    assert sorted(name.name for name in out.iterdir()) == sorted(OUTS)


def test_an_image_changed_in_place_is_noticed_by_readers(root, tmp_path):
    got = Prepared(tmp_path / "out", params(root))
    row = got.val.table.slice(0, 1).to_pylist()[0]
    with Path(row["path"]).open("r+b") as file:
        file.seek(row["offset"] + row["size"] // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(manifest.ManifestError, match=rf"val\.tar: the image {row['id']} is not the one that `prepare` indexed"):
        list(manifest.image_bytes(got.val, range(len(got.val))))


def test_sources_that_winnow_has_drawn_are_verified(root, tmp_path):
    with artifact.writing(tmp_path / "drawn") as tmp:
        for file in root.iterdir():
            (tmp / file.name).write_bytes(file.read_bytes())
    Prepared(tmp_path / "out", params(tmp_path / "drawn"))
    tar = tmp_path / "drawn" / "val.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    with pytest.raises(artifact.ArtifactError, match=r"val\.tar was altered"):
        Prepared(tmp_path / "again", params(tmp_path / "drawn"))
