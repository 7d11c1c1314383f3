"""Tars as they come, Parquet tables, torchvision's data sets: what is listed, and what is said of a bad one."""

import bz2
import gzip
import io
import json
import lzma
import struct
import subprocess
import tarfile
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import TypeAdapter

from pipeline.sources import tars
from pipeline.sources.listing import Listing, Source, list_files
from pipeline.sources.source import Role, SourceError
from pipeline.sources.tars import Tars
from pipeline.store.decode import decode
from tests.tiny import folder_of, jpeg, jpegs, picture, tar_of


def listed(root: Path, source: dict[str, Any], role: Role = "pool") -> Listing:
    (root / "out").mkdir(exist_ok=True)
    checked: Source = TypeAdapter(Source).validate_python(source)
    return list_files([checked], role, root, Tars(root / "out", Path("data/prepare/pool")))


def ids(listing: Listing) -> list[str]:
    return sorted(listing.table["id"].to_pylist())


def reasons(listing: Listing) -> dict[str, str]:
    rows = listing.table.select(["id", "reason"]).to_pylist()
    return {row["id"]: row["reason"] for row in rows if row["reason"] is not None}


def contents(listing: Listing) -> dict[str, bytes]:
    """The bytes of each id, read where the listing says."""
    found = {}
    for row in listing.table.to_pylist():
        with Path(listing.moved.get(row["path"], row["path"])).open("rb") as file:
            file.seek(row["offset"])
            found[row["id"]] = file.read(row["size"])
    return found


# Tars -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_every_dialect_lie_where_the_listing_says(tmp_path, dialect):
    files = {"cat/a.jpg": b"1" * 700, "cat/b.jpg": b"", "dog/" + "x" * 60 + "/" + "y" * 60 + ".jpg": b"3" * 512}
    if dialect != tarfile.USTAR_FORMAT:
        files |= {"dog/" + "z" * 300 + ".jpg": b"4", "dog/ä.jpg": b"5"}
    with tarfile.open(tmp_path / "a.tar", "w", format=dialect) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    listing = listed(tmp_path, {"kind": "tar", "path": "a.tar"}, "labelled")
    assert contents(listing) == {f"a.tar/{name}": data for name, data in files.items()}
    assert listing.classes == {"cat", "dog"}
    assert reasons(listing) == {}


def test_the_tar_command_s_own_archives(tmp_path):
    """With `./` in front of names, entries of folders, links, and a pipe."""
    folder = folder_of(tmp_path / "photos", {"cat/a.jpg": b"1", "dog/b.jpg": b"2"})
    (folder / "fox").mkdir()
    (folder / "cat" / "again.jpg").hardlink_to(folder / "cat" / "a.jpg")
    (folder / "cat" / "link.jpg").symlink_to("a.jpg")
    subprocess.run(["mkfifo", folder / "cat" / "pipe"], check=True)
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "a.tar", "-C", folder, "."], check=True)
    listing = listed(tmp_path, {"kind": "tar", "path": "a.tar"}, "labelled")
    assert ids(listing) == [f"a.tar/cat/{name}" for name in ("a.jpg", "again.jpg", "link.jpg", "pipe")] + ["a.tar/dog/b.jpg"]
    assert reasons(listing) == {
        "a.tar/cat/again.jpg": "link inside a tar",
        "a.tar/cat/link.jpg": "link inside a tar",
        "a.tar/cat/pipe": "not a regular file",
    }
    assert listing.classes == {"cat", "dog", "fox"}


def test_a_name_that_is_not_utf8_is_escaped(tmp_path):
    tar_of(tmp_path / "a.tar", {"n/k\udcf6tt.jpg": b"1"})
    listing = listed(tmp_path, {"kind": "tar", "path": "a.tar"})
    assert contents(listing) == {"a.tar/n/k\\xf6tt.jpg": b"1"}
    assert reasons(listing) == {}


def test_hidden_tars_do_not_match_a_pattern(tmp_path):
    tar_of(tmp_path / "a.tar", {"a.jpg": b"1"})
    (tmp_path / "._a.tar").write_bytes(b"AppleDouble")
    assert ids(listed(tmp_path, {"kind": "tar", "path": "*.tar"})) == ["a.tar/a.jpg"]


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("gzip", gzip.compress),
        ("xz", lzma.compress),
        ("bzip2", bz2.compress),
        ("zstd", lambda data: pa.Codec("zstd").compress(data, asbytes=True)),
    ],
)
def test_a_compressed_tar(tmp_path, name, pack):
    data = tar_of(tmp_path / "plain.tar", jpegs({"cat": 2})).read_bytes()
    (tmp_path / "a.tar").write_bytes(pack(data))
    with pytest.raises(SourceError, match=rf"a\.tar is compressed \({name}\), but images are read in place .* Unpack it once: `"):
        listed(tmp_path, {"kind": "tar", "path": "a.tar"})


def test_a_tar_that_is_none(tmp_path):
    for data in (b"", b"text", b"text" * 1000):
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(SourceError, match=r"a\.tar cannot be read as a tar"):
            listed(tmp_path, {"kind": "tar", "path": "a.tar"})


def test_every_cut_of_a_tar_is_noticed(tmp_path):
    data = tar_of(tmp_path / "whole.tar", {"a.jpg": b"1" * 600, "b.jpg": b"2" * 512, "c.jpg": b"3"}).read_bytes()
    end = 3 * 512 + 1024 + 512 + 512  # three headers and their blocks; the end mark follows
    for cut in [*range(1, end, 100), 512 + 1024, 512 + 1024 + 1024, end, end + 511]:
        (tmp_path / "a.tar").write_bytes(data[:cut])
        with pytest.raises(SourceError, match=r"a\.tar (is cut short|cannot be read as a tar)"):
            listed(tmp_path, {"kind": "tar", "path": "a.tar"})


def test_a_tar_damaged_between_members(tmp_path):
    data = bytearray(tar_of(tmp_path / "a.tar", {"a.jpg": b"1", "b.jpg": b"2"}).read_bytes())
    data[1024 + 10] ^= 1  # in the name of b.jpg
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(SourceError, match=r"a\.tar is damaged at byte 1024"):
        listed(tmp_path, {"kind": "tar", "path": "a.tar"})


def test_tars_joined_by_cat_lose_nothing(tmp_path):
    parts = [tar_of(tmp_path / f"{i}.tar", {f"{i}.jpg": b"1"}).read_bytes() for i in range(2)]
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    with pytest.raises(SourceError, match=r"a\.tar goes on behind its end mark"):
        listed(tmp_path, {"kind": "tar", "path": "a.tar"})


# Parquet --------------------------------------------------------------------------------------------------------------


def hugging_face(names: list[str] | None) -> dict[bytes, bytes]:
    """The schema metadata that the `datasets` library writes."""
    label = {"names": names, "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    return {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}}).encode()}


def parquet_of(file: Path, pictures: list[bytes | None], label: pa.Array | None, names: list[str] | None = None) -> Path:
    cells = pa.array([{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(pictures)])
    table = pa.table({"image": cells} | ({"label": label} if label is not None else {}))
    pq.write_table(table.replace_schema_metadata(hugging_face(names)), file, row_group_size=3)
    return file


PICTURES: list[bytes | None] = [jpeg(i) for i in range(5)]


def test_the_hugging_face_layout(tmp_path):
    parquet_of(tmp_path / "a.parquet", PICTURES, pa.array([0, 1, 1, 0, 1]), ["dog", "cat"])
    listing = listed(tmp_path, {"kind": "parquet", "path": "*.parquet"}, "labelled")
    assert contents(listing) == {f"a.parquet/{i:08}": data for i, data in enumerate(PICTURES)}
    assert listing.table.sort_by("id")["class"].to_pylist() == ["dog", "cat", "cat", "dog", "cat"]
    assert listing.classes == {"dog", "cat"}
    assert set(listing.table["path"].to_pylist()) == {"data/prepare/pool/images-00000.tar"}


def test_plain_columns_of_bytes_and_class_names(tmp_path):
    table = pa.table({"img": pa.array(PICTURES, pa.large_binary()), "species": pa.array(["cat", "dog"] * 2 + [None])})
    pq.write_table(table, tmp_path / "a.parquet")
    source = {"kind": "parquet", "path": "a.parquet", "image": "img", "label": "species"}
    listing = listed(tmp_path, source, "val")
    assert listing.table.sort_by("id")["class"].to_pylist() == ["cat", "dog", "cat", "dog", None]
    assert reasons(listing) == {"a.parquet/00000004": "no label"}


def test_class_numbers_named_in_params(tmp_path):
    parquet_of(tmp_path / "a.parquet", PICTURES, pa.array([0, 1, -1, 2, None]))
    source = {"kind": "parquet", "path": "a.parquet"}
    with pytest.raises(
        SourceError, match=r"`label` holds class numbers, and the file does not say their names.*`classes: \[\.\.\.\]`"
    ):
        listed(tmp_path, source, "labelled")
    listing = listed(tmp_path, source | {"classes": ["cat", "dog"]}, "labelled")
    assert listing.table.sort_by("id")["class"].to_pylist() == ["cat", "dog", None, None, None]
    assert set(reasons(listing).values()) == {"no label"}


def test_a_pool_needs_no_labels(tmp_path):
    parquet_of(tmp_path / "a.parquet", PICTURES, None)
    listing = listed(tmp_path, {"kind": "parquet", "path": "a.parquet"})
    assert len(listing.table) == 5
    assert listing.classes == frozenset()


def test_a_row_without_bytes_is_kept_as_empty(tmp_path):
    parquet_of(tmp_path / "a.parquet", [*PICTURES, None, b""], None)
    assert list(contents(listed(tmp_path, {"kind": "parquet", "path": "a.parquet"})).values())[-2:] == [b"", b""]


def test_wrong_columns(tmp_path):
    parquet_of(tmp_path / "a.parquet", PICTURES, pa.array([0.5] * 5))
    source = {"kind": "parquet", "path": "a.parquet"}
    with pytest.raises(SourceError, match=r"has no column `img`; it has image, label\. Name the right one: `image: <column>`"):
        listed(tmp_path, source | {"image": "img"})
    with pytest.raises(SourceError, match=r"the column `label` \(double\) does not hold image files"):
        listed(tmp_path, source | {"image": "label"})
    with pytest.raises(SourceError, match=r"the column `label` \(double\) does not hold class names or numbers"):
        listed(tmp_path, source, "labelled")


def test_a_damaged_parquet_file(tmp_path):
    file = parquet_of(tmp_path / "a.parquet", PICTURES, None)
    whole = file.read_bytes()
    for data in (b"", b"text" * 10, whole[:-20], whole[:100] + bytes(600) + whole[700:]):
        file.write_bytes(data)
        with pytest.raises(SourceError, match=r"a\.parquet cannot be read as Parquet"):
            listed(tmp_path, {"kind": "parquet", "path": "a.parquet"})


def test_shards_are_ordinary_tars_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "TAR_BYTES", 4000)
    parquet_of(tmp_path / "a.parquet", PICTURES, None)
    listing = listed(tmp_path, {"kind": "parquet", "path": "a.parquet"})
    assert sorted(listing.moved) == sorted(f"data/prepare/pool/images-{i:05}.tar" for i in range(len(listing.moved)))
    assert len(listing.moved) > 1
    members: dict[str, bytes] = {}
    for shard in listing.moved.values():
        with tarfile.open(shard) as tar:
            members |= {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    assert members == contents(listing) == {f"a.parquet/{i:08}": data for i, data in enumerate(PICTURES)}


# torchvision ----------------------------------------------------------------------------------------------------------


def mnist_in(root: Path, part: str, pixels: np.ndarray, labels: list[int]) -> None:
    """The files of MNIST, as they lie unpacked in torchvision's folder."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for prefix in ("train", "t10k"):
        for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
            (raw / name).touch()
    (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, *pixels.shape) + pixels.tobytes())
    (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(labels)) + bytes(labels))


def test_a_data_set_that_is_already_there(tmp_path):
    pixels = np.stack([picture(i, 28)[:, :, 0] for i in range(3)])
    mnist_in(tmp_path, "t10k", pixels, [7, 0, 7])
    listing = listed(tmp_path, {"kind": "torchvision", "name": "MNIST", "split": "test"}, "val")
    assert ids(listing) == [f"MNIST/test/{i:08}" for i in range(3)]
    assert listing.table["class"].to_pylist() == ["7 - seven", "0 - zero", "7 - seven"]
    for data, expected in zip(contents(listing).values(), pixels, strict=True):
        assert np.array_equal(decode(data)[:, :, 0], expected)


def test_an_unknown_data_set(tmp_path):
    with pytest.raises(SourceError, match=r"torchvision has no data set `CIFAR-10` \(did you mean `CIFAR10`\?\)"):
        listed(tmp_path, {"kind": "torchvision", "name": "CIFAR-10"}, "labelled")


def test_no_network(tmp_path, monkeypatch):
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(SourceError) as error:
        listed(tmp_path, {"kind": "torchvision", "name": "CIFAR10"}, "labelled")
    told = str(error.value)
    assert f"prepare.labelled: torchvision's CIFAR10 is not in {tmp_path} (prepare.root) and could not be downloaded" in told
    assert "Temporary failure in name resolution" in told
    assert "d.CIFAR10('FOLDER', train=True, download=True)" in told
    assert f"copy what FOLDER then holds to {tmp_path}" in told


def test_a_split_that_it_does_not_have(tmp_path):
    with pytest.raises(SourceError, match=r"MNIST has the splits train and test, not `val`"):
        listed(tmp_path, {"kind": "torchvision", "name": "MNIST", "split": "val"})
    with pytest.raises(SourceError, match=r"SVHN: .*extra"):
        listed(tmp_path, {"kind": "torchvision", "name": "SVHN", "split": "val"})


def test_a_data_set_without_class_numbers(tmp_path, monkeypatch):
    class Captions:
        def __init__(self, root: str, download: bool = False) -> None:
            self.images = [(Image.fromarray(picture(0)), "a cat on a mat")]

        def __len__(self) -> int:
            return 1

        def __getitem__(self, row: int) -> tuple[Any, str]:
            return self.images[row]

    monkeypatch.setattr("torchvision.datasets.SBU", Captions)
    with pytest.raises(SourceError, match=r"SBU gives str targets, but .* It can only serve as a pool"):
        listed(tmp_path, {"kind": "torchvision", "name": "SBU"}, "labelled")
    assert ids(listed(tmp_path, {"kind": "torchvision", "name": "SBU"})) == ["SBU/train/00000000"]


# Links, where nobody has to watch -------------------------------------------------------------------------------------


def test_links_to_folders_are_followed_for_commands_that_dvc_does_not_watch(tmp_path):
    folder_of(tmp_path / "elsewhere", {"b.jpg": b"1"})
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    source: Source = TypeAdapter(Source).validate_python({"kind": "folder", "path": "a"})
    listing = list_files([source], "pool", tmp_path, Tars(tmp_path, tmp_path), "leaks")
    assert ids(listing) == ["a/link/b.jpg"]
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="is a link to a folder that holds it"):
        list_files([source], "pool", tmp_path, Tars(tmp_path, tmp_path), "leaks")
