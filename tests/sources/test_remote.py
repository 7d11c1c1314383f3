"""Tars and tables in an object store: `prepare` makes of them what it makes of the same files on a disk, or names what it cannot
read."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import UserError
from pipeline.harness.machine import Machine
from pipeline.sources import listing
from pipeline.sources import remote as remotes
from pipeline.sources.remote import Listed, ListingError, Remote
from pipeline.sources.source import SourceError
from pipeline.stages import prepare
from pipeline.stages import remote as stage
from pipeline.store import artifact, manifest, remote
from pipeline.store.artifact import ArtifactError
from pipeline.store.remote import Object
from tests import servers
from tests.servers import BUCKET, Faulty, Web, serving
from tests.tiny import jpegs, tar_of

CLASSES = {"ant": 4, "bee": 4}


def table_of(files: dict[str, bytes]) -> bytes:
    stored = io.BytesIO()
    columns = {"image": [{"bytes": data} for data in files.values()], "label": [name.partition("/")[0] for name in files]}
    pq.write_table(pa.table(columns), stored, row_group_size=5)
    return stored.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a data set, by name."""
    folder = tmp_path_factory.mktemp("files")
    pool = jpegs({"x": 40}, seed=2)
    broken = list(pool)[7]
    pool[broken] = pool[broken][:200]
    tars = {
        "labelled.tar": jpegs(CLASSES),
        "crawl/0.tar": dict(list(pool.items())[:25]),
        "crawl/1.tar": dict(list(pool.items())[25:]),
    }
    packed = {name: tar_of(folder / name, held).read_bytes() for name, held in tars.items()}
    return packed | {"val.parquet": table_of(jpegs(CLASSES, seed=1)), "crawl/.hidden.tar": b"", "notes.txt": b"no image"}


@pytest.fixture(scope="module")
def store(files: dict[str, bytes]) -> Iterator[Faulty]:
    """A server that speaks S3, and drops one request in ten and cuts one answer in twenty short."""
    app = Faulty(servers.s3())
    with serving(app) as address, pytest.MonkeyPatch.context() as patch:
        servers.put(address, {f"birds/{name}": data for name, data in files.items()})
        for name, value in {**servers.KEYS, "AWS_ENDPOINT_URL": address}.items():
            patch.setenv(name, value)
        patch.setattr(remote, "PAUSE", 0.01)
        remote._filesystem_of.cache_clear()
        app.drop, app.cut = 0.1, 0.05
        yield app
        remote._filesystem_of.cache_clear()


def prepared(out: Path, root: Path, lists: Path = Path("none"), **sources: Any) -> dict[str, manifest.Manifest]:
    params = prepare.Prepare.model_validate(
        {
            "root": str(root),
            "labelled": [{"kind": "tar", "path": "labelled.tar"}],
            "val": [{"kind": "parquet", "path": "val.parquet"}],
            "pool": [{"kind": "tar", "path": "crawl/*.tar"}],
            "holdout": 0.25,
            **sources,
        }
    )
    outs = {f"{name}_out": out / name for name in ("train", "holdout", "val", "pool", "quarantine")}
    prepare.run(params, root=root, remote=lists, machine=Machine(workers=2), **outs)
    return {name: manifest.read(out / name) for name in ("train", "holdout", "val", "pool")}


def contents(part: manifest.Manifest) -> dict[str, bytes]:
    return dict(zip(part.table["id"].to_pylist(), manifest.image_bytes(part, range(len(part))), strict=True))


@pytest.fixture(scope="module")
def here(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same files on a disk."""
    root = tmp_path_factory.mktemp("here")
    for name, data in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_prepare_makes_the_same_of_a_bucket_as_of_a_folder(store: Faulty, here: Path, tmp_path: Path) -> None:
    lists = tmp_path / "remote"
    found = stage.run(Remote(url=f"s3://{BUCKET}/birds/"), out=lists / "birds")
    assert found["files"] == 6
    wanted, got = prepared(tmp_path / "a", here), prepared(tmp_path / "b", lists / "birds", lists)
    for name, part in wanted.items():
        there = got[name]
        assert there.table.drop_columns("path").equals(part.table.drop_columns("path")), name
        assert contents(there) == contents(part), name
    assert set(got["pool"].table["path"].to_pylist()) == {f"s3://{BUCKET}/birds/crawl/{n}.tar" for n in (0, 1)}
    refused = [pq.read_table(tmp_path / run / "quarantine" / "quarantine.parquet").drop_columns("path") for run in ("a", "b")]
    assert refused[0].equals(refused[1])
    assert len(refused[0]) == 1
    assert store.done["dropped"]
    assert store.done["cut"]


def test_labelled_images_lie_here_and_the_pool_in_a_bucket(store: Faulty, here: Path, tmp_path: Path) -> None:
    lists = tmp_path / "remote"
    stage.run(Remote(url=f"s3://{BUCKET}/birds/crawl", files=("{0..1}.tar",)), out=lists / "crawl")
    got = prepared(tmp_path / "out", here, lists, pool=[{"kind": "tar", "path": "*.tar", "remote": "crawl"}])
    local = prepared(tmp_path / "local", here)
    assert got["train"].table.equals(local["train"].table)
    assert contents(got["pool"]) == contents(local["pool"])  # the ids too: `crawl` is the entry here, and the folder there


def test_the_list_is_the_same_until_a_file_is_another(store: Faulty, tmp_path: Path) -> None:
    params = Remote(url=f"s3://{BUCKET}/birds", files=("labelled.tar", "notes.txt"))
    for name in ("a", "b"):
        stage.run(params, out=tmp_path / name)
    assert artifact.identity(tmp_path / "a") == artifact.identity(tmp_path / "b")
    everything = {file.url: file for file in remote.listing(f"s3://{BUCKET}/birds")}
    listed = remotes.read(tmp_path / "a")
    assert all(everything[file.url] == file for file in listed.objects.values())  # one by one, and in a list of the store
    listed.objects["notes.txt"] = listed.objects["notes.txt"]._replace(etag='"another"')
    assert [file.name for file in listed.matching("l*.tar", "x")] == ["labelled.tar"]
    listed.expect_unchanged()
    with pytest.raises(ListingError, match=r"birds/notes.txt has changed since it was listed. Run `dvc repro`"):
        listed.matching("*.txt", "x")


def test_what_is_not_in_a_bucket_is_named(store: Faulty, tmp_path: Path) -> None:
    with pytest.raises(ListingError, match=rf"s3://{BUCKET}/cats: nothing lies below this address"):
        stage.run(Remote(url=f"s3://{BUCKET}/cats"), out=tmp_path / "out")
    with pytest.raises(UserError, match=rf"s3://{BUCKET}/birds/9.tar is not there"):
        stage.run(Remote(url=f"s3://{BUCKET}/birds", files=("9.tar",)), out=tmp_path / "out")
    with pytest.raises(UserError, match=r"s3://nowhere/birds is not there|s3://nowhere/birds: nothing lies below"):
        stage.run(Remote(url="s3://nowhere/birds"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Without a bucket -----------------------------------------------------------------------------------------------------


def test_a_web_server_names_no_files_and_may_tell_no_etag(
    files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web = Web(files, etags=False)
    with serving(web) as address:
        with pytest.raises(ListingError, match=r"a web server has no list of its files. Name them: `files: "):
            remotes.look(Remote(url=address))
        stage.run(Remote(url=address, files=("crawl/{0..1}.tar",)), out=tmp_path / "web")
        assert f"GAP: of 2 of 2 files below {address} the server tells neither an ETag nor a time" in capsys.readouterr().err
        [first, _] = remotes.read(tmp_path / "web").matching("crawl/*", "x")
        assert first == Object(f"{address}/crawl/0.tar", len(files["crawl/0.tar"]))


def test_a_tar_that_changes_while_it_is_read_stops_prepare(
    files: dict[str, bytes], here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = Web(files)
    with serving(web) as address:
        stage.run(Remote(url=f"{address}/crawl", files=("0.tar",)), out=tmp_path / "remote" / "web")
        check = prepare.check_images

        def late(*args: Any) -> listing.Listing:
            web.files["crawl/0.tar"] = web.files["crawl/0.tar"] + bytes(10240)
            return check(*args)

        monkeypatch.setattr(prepare, "check_images", late)
        with pytest.raises(ListingError, match=f"{address}/crawl/0.tar has changed since it was listed"):
            prepared(tmp_path / "out", here, tmp_path / "remote", pool=[{"kind": "tar", "path": "*.tar", "remote": "web"}])
    assert not (tmp_path / "out" / "pool").exists()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x1f\x8b" + bytes(2000), r"0.tar is compressed \(gzip\)"),
        (b"no tar" * 1000, "0.tar cannot be read as a tar"),
    ],
)
def test_a_tar_elsewhere_that_is_none_is_named(data: bytes, why: str, here: Path, tmp_path: Path) -> None:
    with serving(Web({"0.tar": data})) as address:
        stage.run(Remote(url=address, files=("0.tar",)), out=tmp_path / "remote" / "web")
        with pytest.raises(SourceError, match=why):
            prepared(tmp_path / "out", here, tmp_path / "remote", pool=[{"kind": "tar", "path": "*.tar", "remote": "web"}])


def test_a_table_elsewhere_that_is_none_is_named(here: Path, tmp_path: Path) -> None:
    with serving(Web({"0.parquet": b"no table" * 1000})) as address:
        stage.run(Remote(url=address, files=("0.parquet",)), out=tmp_path / "remote" / "web")
        with pytest.raises(SourceError, match=r"0.parquet cannot be read as Parquet"):
            prepared(tmp_path / "out", here, tmp_path / "remote", pool=[{"kind": "parquet", "path": "*", "remote": "web"}])


def test_an_entry_that_has_listed_nothing_and_a_kind_that_knows_no_address_are_told(here: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"remote/web is not there, the list of the files. Run `dvc repro`"):
        prepared(tmp_path / "out", here, tmp_path / "remote", pool=[{"kind": "tar", "path": "*.tar", "remote": "web"}])
    with artifact.writing(tmp_path / "remote" / "web") as tmp:
        remotes.write(tmp, Remote(url="s3://b"), [Object("s3://b/0.tar", 5)])
    with pytest.raises(
        SourceError, match=r"`kind: folder` is read from a disk, and .*remote/web lists what lies below an address"
    ):
        prepared(tmp_path / "out", tmp_path / "remote" / "web", pool=[{"kind": "folder", "path": "x"}], labelled=[FOLDER])
    (tmp_path / "remote" / "web" / remotes.OBJECTS).write_text("{}")
    with pytest.raises(ArtifactError, match=f"{remotes.OBJECTS} was altered"):
        remotes.read(tmp_path / "remote" / "web")
    with artifact.writing(tmp_path / "remote" / "odd") as tmp:
        (tmp / remotes.OBJECTS).write_text("{}")
    with pytest.raises(ListingError, match="is no list of remote files"):
        remotes.read(tmp_path / "remote" / "odd")


FOLDER = {"kind": "folder", "path": "y"}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("*.tar", ["a.tar", "b.tar"]),
        ("**/*.tar", ["a.tar", "b.tar", "x/a.tar", "x/y/a.tar"]),
        ("x/*", ["x/a.tar"]),
        ("[b-z].tar", ["b.tar"]),
    ],
)
def test_patterns_mean_what_they_mean_in_a_folder(
    pattern: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = ["a.tar", "b.tar", ".c.tar", "x/a.tar", "x/y/a.tar"]
    for name in every:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    objects = {name: Object(f"s3://b/{name}", 0) for name in every}
    monkeypatch.setattr(remote, "looked", iter)
    assert [file.url.removeprefix("s3://b/") for file in Listed("s3://b", objects).matching(pattern, "x")] == names
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob(pattern) if p.is_file() and p.name[0] != ".") == names
    with pytest.raises(ListingError, match=r"prepare.pool: nothing matches `q` below s3://b, where there are: a.tar"):
        Listed("s3://b", objects).matching("q", "prepare.pool")


def test_numbers_stand_for_many_names() -> None:
    assert remotes._numbered("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert remotes._numbered("{0..1}/{0..1}") == ["0/0", "0/1", "1/0", "1/1"]
    for name in ("{9..1}.tar", "{0..9999}-{0..9999}.tar", "../a.tar", "/a.tar", "*.tar", "a.tar?sig=1"):
        with pytest.raises(ValidationError):
            Remote(url="s3://b", files=(name,))


def test_an_address_in_the_place_of_a_path_is_sent_to_its_section() -> None:
    with pytest.raises(ValidationError, match=re.escape("an address stands in the section `remote`")):
        TypeAdapter(listing.Source).validate_python({"kind": "tar", "path": "s3://bucket/a.tar"})
