"""Packing: the same images under the same names, smaller; finished shards are kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.harness.machine import Machine
from pipeline.models import inputs
from pipeline.sources.tar import Tar
from pipeline.stages import pack, prepare
from pipeline.store import artifact, manifest
from pipeline.store.decode import decode
from tests.tiny import jpeg, jpegs, tar_of

MACHINE = Machine(workers=2)


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    files = jpegs({"ant": 5, "bee": 5}, (90, 60)) | {"ant/small.jpg": jpeg(77, 20), "bee/tall.jpg": jpeg(78, (50, 200))}
    tar_of(Path("root/labelled.tar"), files)
    tar_of(Path("root/val.tar"), jpegs({"ant": 1, "bee": 1}, seed=1))
    tar_of(Path("root/pool.tar"), jpegs({"x": 1}, seed=2))
    sources = {name: (Tar(kind="tar", path=f"{name}.tar"),) for name in ("labelled", "val", "pool")}
    outs = {f"{name}_out": Path("prepare") / name for name in ("train", "holdout", "val", "pool", "quarantine")}
    prepare.run(prepare.Prepare(root="root", holdout=0.1, **sources), root=Path("root"), machine=MACHINE, **outs)  # type: ignore[arg-type]
    return Path("prepare/train")


def packed(listed: Path, name: str = "out", **params: Any) -> tuple[manifest.Manifest, dict[str, Any]]:
    section = pack.Pack.model_validate({"images": "-", "side": 32, **params})
    paths = {
        "chosen": listed,
        "train": Path("prepare/train"),
        "out": Path(name),
        "tars_out": Path(f"{name}-tars"),
        "workdir": Path(f"{name}-workdir"),
    }
    metrics = pack.run(section, **paths, machine=MACHINE)
    artifact.verify(paths["tars_out"])
    return manifest.read(Path(name)), dict(metrics)


def test_the_same_images_at_the_short_side(listed: Path) -> None:
    before = manifest.read(listed)
    after, metrics = packed(listed)
    for name in ("id", "label"):
        assert after.table[name].equals(before.table[name])
    assert after.classes == before.classes
    rows = range(len(before))
    for old, new in zip(manifest.image_bytes(before, rows), manifest.image_bytes(after, rows), strict=True):
        whole, small = decode(old), decode(new)
        if min(whole.shape[:2]) <= 32:
            assert old == new
        else:
            assert min(small.shape[:2]) == 32
            assert small.shape[0] / small.shape[1] == pytest.approx(whole.shape[0] / whole.shape[1], rel=0.03)
            difference = inputs.canvas(whole, 32).astype(int) - inputs.canvas(small, 32)
            assert np.abs(difference).mean() < 4
    sizes = [decode(data).shape[:2] for data in manifest.image_bytes(after, rows)]
    assert [(h, w) for w, h in zip(*(after.table[n].to_pylist() for n in ("width", "height")), strict=True)] == sizes
    assert metrics["images"] == len(before)
    assert metrics["bytes_after"] == sum(after.table["size"].to_pylist())


def test_shards_of_a_killed_run_are_kept_and_change_nothing(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "SHARD", 4)
    packed(listed, "whole")
    real, made = pack._shard, []

    def dies(listed: manifest.Manifest, rows: np.ndarray, *rest: Any) -> Any:
        made.append(int(rows[0]))
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(listed, rows, *rest)

    monkeypatch.setattr(pack, "_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        packed(listed, "killed")
    assert not Path("killed").exists()
    packed(listed, "killed")
    assert made == [0, 4, 8, 8]
    files = [sorted(Path(f"{name}-tars").rglob("*.tar")) for name in ("whole", "killed")]
    assert len(files[0]) == 3
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_a_tar_that_was_damaged_is_found_when_an_image_is_read(listed: Path) -> None:
    after, _ = packed(listed)
    tar = next(Path("out-tars").rglob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[int(after.table["offset"][2].as_py()) + 50] ^= 1
    tar.write_bytes(data)
    with pytest.raises(manifest.ManifestError, match=str(after.table["id"][2])):
        list(manifest.image_bytes(after, [2]))


def test_the_labelled_images_go_along_unless_left_out(listed: Path) -> None:
    pool = Path("prepare/pool")
    train, alone = manifest.read(listed), manifest.read(pool)
    both, metrics = packed(pool, "both")
    assert metrics["images"] == len(both) == len(train) + len(alone)
    assert both.classes == train.classes
    assert packed(pool, "alone", labelled=False)[1]["images"] == len(alone)
    seen, _, unlabelled = manifest.to_learn(Path("both"), listed, True)
    assert (len(seen), unlabelled) == (len(both), len(alone))
    assert set(seen.table["path"].to_pylist()) <= {str(p) for p in Path("both-tars").glob("*/*.tar")}


def test_a_strip_that_no_jpeg_file_can_hold_keeps_its_file():
    table = pa.table({"id": ["a"], "width": [100_000], "height": [300]})
    found = pack._reduced(manifest.Manifest(table, ()), 0, b"the file", pack.Pack(images="-", side=256))
    assert found == (b"the file", 100_000, 300)
