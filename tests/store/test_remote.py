"""Files at addresses: every byte right, or an error that names the file, whatever the network does."""

import contextlib
import multiprocessing
import os
import random
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import Unavailable
from pipeline.harness.stage import TRY_AGAIN, exit_codes
from pipeline.sources.remote import Remote
from pipeline.store import manifest, params, remote
from pipeline.store.manifest import ManifestError
from pipeline.store.remote import RemoteError
from tests.servers import Faulty, Web, serving
from tests.tiny import jpegs, tar_of

DATA = np.random.default_rng(0).bytes(3_000_000)


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.001)


@pytest.fixture
def web() -> Web:
    return Web({"a.bin": DATA, "few.bin": DATA[:100]})


@contextlib.contextmanager
def unreliable(web: Web, drop: float = 0.1, cut: float = 0.01) -> Iterator[tuple[str, Faulty]]:
    app = Faulty(web, drop, cut)
    with serving(app) as address:
        yield address, app


def test_every_range_is_right_where_answers_are_dropped_and_cut_short(web: Web) -> None:
    order = random.Random(1)
    with unreliable(web, cut=0.05) as (address, app):
        places = [(f"{address}/a.bin", order.randrange(2_900_000), order.randrange(1, 9000)) for _ in range(300)]
        assert [zlib.crc32(data) for data in remote.read(places)] == [zlib.crc32(DATA[at : at + n]) for _, at, n in places]
        assert app.done["dropped"] > 10
        assert app.done["cut"] > 5


def test_neighbours_are_asked_for_together_and_in_order(web: Web) -> None:
    with unreliable(web, 0, 0) as (address, app):
        places = [(f"{address}/a.bin", at, 900) for at in range(0, 2_000_000, 1000)]
        places[7] = (f"{address}/a.bin", 7000, 0)
        read = remote.read(places)
        assert list(read) == [DATA[at : at + n] for _, at, n in places]
        assert [asked for *_, asked in app.seen] == ["bytes=0-1999899"]
        apart = [(f"{address}/a.bin", at, 900) for at in (0, 900 + remote.GAP, 900, 900 + remote.GAP + 901 + remote.GAP)]
        assert list(remote.read(apart)) == [DATA[at : at + n] for _, at, n in apart]
        assert len(app.seen) == 1 + 3


def test_no_more_is_asked_for_ahead_than_a_reader_may_hold(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITING", 10_000)
    with unreliable(web, 0, 0) as (address, app):
        read = remote.read((f"{address}/a.bin", at, 1000) for at in range(0, 3_000_000, 100_000))
        assert next(read) == DATA[:1000]
        read.close()
        assert len(app.seen) <= 11


def test_a_file_is_read_like_one_of_the_disk(web: Web, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "BLOCK", 1000)
    local = tar_of(tmp_path / "a.tar", jpegs({"ant": 9, "bee": 9}))
    web.files["a.tar"] = local.read_bytes()
    with unreliable(web) as (address, app), remote.look(f"{address}/a.tar").open() as file:
        with tarfile.open(local) as here, tarfile.open(fileobj=file) as there:
            assert [(m.name, m.offset_data, m.size) for m in there] == [(m.name, m.offset_data, m.size) for m in here]
        data, order = local.read_bytes(), random.Random(0)
        for _ in range(50):
            at, size = order.randrange(len(data) + 10), order.randrange(5000)
            assert file.seek(at) == at
            assert file.read(size) == data[at : at + size]
        file.seek(-10, os.SEEK_END)
        assert file.read() == data[-10:]
        assert app.done["dropped"]


def test_a_file_that_is_skipped_through_is_not_all_read(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK", 1000)
    with unreliable(web, 0, 0) as (address, app), remote.File(f"{address}/a.bin", len(DATA)) as file:
        for at in range(0, 1_000_000, 100_000):
            file.seek(at)
            assert file.read(10) == DATA[at : at + 10]
        assert len(app.seen) == 10


def test_what_no_repetition_mends_is_told_at_once(web: Web) -> None:
    with unreliable(web, 0, 0) as (address, app):
        with pytest.raises(RemoteError, match=f"{address}/none.bin is not there"):
            remote.look(f"{address}/none.bin")
        with pytest.raises(RemoteError, match=r"few.bin ends at byte 100, but 200 are expected"):
            remote.fetch(f"{address}/few.bin", 50, 200)
        with pytest.raises(RemoteError, match=r"few.bin cannot be read: the server answers .*416"):
            remote.fetch(f"{address}/few.bin", 150, 200)
        web.ranges, asked = False, len(app.seen)
        for ask in (lambda: remote.look(f"{address}/a.bin"), lambda: remote.fetch(f"{address}/a.bin", 5, 10)):
            with pytest.raises(RemoteError, match=r"a.bin: the server answers a range with the whole file"):
                ask()
        web.status = 403
        with pytest.raises(RemoteError, match=r"a.bin may not be read .*403.* Credentials come from the environment"):
            remote.look(f"{address}/a.bin")
        assert len(app.seen) == asked + 3


def test_a_file_is_not_taken_to_end_where_answers_do(web: Web) -> None:
    with unreliable(web, 0, 1) as (address, app):

        def patched(environ: Any, start: Any) -> Any:
            app.cut = len(app.seen) < 8
            return web(environ, start)

        app.app = patched
        assert remote.fetch(f"{address}/a.bin", 0, 5000) == DATA[:5000]
        assert app.done["cut"] > 4


def test_who_does_not_answer_is_named_and_the_command_may_be_repeated(
    web: Web, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    web.status = 503
    with unreliable(web, 0, 0) as (address, app):
        with pytest.raises(SystemExit) as end, exit_codes("it begins anew"):
            remote.fetch(f"{address}/a.bin", 0, 10)
        assert len(app.seen) == 3
    assert end.value.code == TRY_AGAIN
    assert f"error: {address}/a.bin did not answer as it should, 3 times in a row" in capsys.readouterr().err
    with pytest.raises(Unavailable, match=f"{address}/a.bin did not answer"):  # nobody is there any more
        remote.look(f"{address}/a.bin")


def _sum(places: list[tuple[str, int, int]]) -> int:
    return zlib.crc32(b"".join(remote.read(places)))


def _child(places: list[tuple[str, int, int]], answers: "multiprocessing.SimpleQueue[int]") -> None:
    answers.put(_sum(places))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 warns of every fork
def test_a_forked_process_reads_what_its_parent_reads_at_the_same_time(web: Web) -> None:
    with unreliable(web) as (address, _):
        places = [(f"{address}/a.bin", at, 5000) for at in range(0, 2_900_000, 100_000)]
        wanted = _sum(places)  # the parent has its loop, its connections and its threads
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        children = [context.Process(target=_child, args=(places, answers)) for _ in range(2)]
        for child in children:
            child.start()
        assert _sum(places) == wanted == zlib.crc32(b"".join(DATA[at : at + n] for _, at, n in places))
        assert [answers.get() for _ in children] == [wanted] * 2
        for child in children:
            child.join()


@pytest.mark.timeout(60)
def test_a_process_that_ends_waits_for_no_attempt_that_nobody_wants(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 1000.0)
    monkeypatch.setattr(remote, "LONGEST", 1000.0)
    busy = Web({})
    busy.status = 503
    with unreliable(web, 0, 0) as (address, app):
        app.app = lambda environ, start: (busy if "a.bin" in environ["PATH_INFO"] else web)(environ, start)
        read = remote.read([(f"{address}/few.bin", 0, 10), (f"{address}/a.bin", 0, 10)])
        assert next(read) == DATA[:10]
        read.close()
        remote._threads().shutdown(wait=True)
        remote._threads_of.cache_clear()


# Manifests ------------------------------------------------------------------------------------------------------------


def images_of(*places: tuple[str, int, bytes]) -> manifest.Manifest:
    paths, offsets, files = zip(*places, strict=True)
    columns = {
        "id": [f"{i:03}" for i in range(len(paths))],
        "path": paths,
        "offset": offsets,
        "size": [len(data) for data in files],
        "crc32": [zlib.crc32(data) for data in files],
    }
    rest = dict.fromkeys(("width", "height", "label"), pa.nulls(len(paths), pa.int32()))
    return manifest.Manifest(pa.table({**columns, **rest}).select(manifest.SCHEMA.names).cast(manifest.SCHEMA), ())


def test_a_manifest_may_name_files_here_and_there(web: Web, tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(DATA)
    with unreliable(web) as (address, _):
        both = [
            (path, at, DATA[at : at + 700])
            for at in range(0, 90_000, 900)
            for path in (str(tmp_path / "here"), f"{address}/a.bin")
        ]
        images = images_of(*both)
        order = np.random.default_rng(0).permutation(len(images))
        assert list(manifest.image_bytes(images, order)) == [both[row][2] for row in order]


def test_a_wrong_byte_is_asked_for_again_and_an_image_that_stays_wrong_is_named(web: Web) -> None:
    with unreliable(web, 0, 0) as (address, app):
        images = images_of(*((f"{address}/a.bin", at, DATA[at : at + 700]) for at in (0, 300_000)))
        answers = iter([DATA[:699] + b"?", DATA])
        app.app = lambda environ, start: Web({"a.bin": next(answers, DATA)})(environ, start)
        assert list(manifest.image_bytes(images, [0])) == [DATA[:700]]
        app.app = web
        web.files["a.bin"] = DATA[:300_000] + b"?" + DATA[300_001:]
        with pytest.raises(ManifestError, match=f"{address}/a.bin: the image 001 is not the one that `prepare` indexed"):
            list(manifest.image_bytes(images, [0, 1]))


# Addresses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://host/a", "must begin with one of s3://, gs://, https://, http://"),
        ("bucket/a", "must begin with one of"),
        ("https://me:hunter2@host/a", "credentials stand in the address"),
        ("s3://key@bucket/a", "credentials stand in the address"),
        ("https://host/a?X-Amz-Signature=hunter2", "what signs it would be written down"),
        ("s3://", "a whole address"),
        ("s3:///a", "a whole address"),
        ("s3://bucket/../a", "a whole address"),
        ("s3://bucket/a\n", "a whole address"),
    ],
)
def test_what_is_no_address_or_holds_credentials_is_refused(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        remote.expect_address(url)


def test_an_address_has_no_slash_at_its_end() -> None:
    assert [remote.expect_address(url) for url in ("s3://b", "s3://b/a/", "https://h:8080/a")] == [
        "s3://b",
        "s3://b/a",
        "https://h:8080/a",
    ]


def test_what_is_refused_is_told_without_its_password() -> None:
    given = {"url": "https://me:hunter2@host/a", "files": ["a.tar?X-Amz-Signature=hunter2"]}
    told = "\n".join(params.resolve({}, Remote, ("remote", "web"), given)[1])
    assert "`remote.web.url` is 'https://host/a': credentials stand in the address" in told
    assert "`remote.web.files.0` is 'a.tar'" in told
    assert "hunter2" not in told
    [told] = params.unsafe({"prepare": {"root": "https://me:hunter2@host/a"}})
    assert told.startswith("`prepare.root` is 'https://host/a': an address stands in `remote:")


def test_what_logs_in_is_not_shown() -> None:
    told = "could not reach https://me:hunter2@host/a?X-Amz-Signature=hunter2&b=hunter2 (why?) and s3://b/a"
    assert remote.masked(told) == "could not reach https://host/a (why?) and s3://b/a"


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(RemoteError, match=r"gs:// is read by the package gcsfs, .* `pip install gcsfs`"):
        remote.look("gs://bucket/a.tar")


def test_files_of_the_disk_are_read_without_fsspec(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    script = (
        "import sys; from pipeline.store import manifest\n"
        f"assert manifest.Opened().read({str(tmp_path / 'a')!r}, 5, 10) == {DATA[5:15]!r}\n"
        "assert not {'fsspec', 'aiohttp', 'asyncio'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
