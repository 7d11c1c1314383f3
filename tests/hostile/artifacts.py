"""Hostile artifacts: manifests, records, models, checkpoints, overrides. What was altered is refused by name."""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from pipeline.harness import stage
from pipeline.leaks import decision
from pipeline.models import checkpoint, network
from pipeline.models.inputs import Wanted
from pipeline.models.network import Network
from pipeline.report import evaluation
from pipeline.store import artifact, manifest
from tests.hostile.case import RAN, Case, Promise
from tests.tiny import folder_of, jpeg

CLASSES = ("ant", "bee")


def all_of(seed: int) -> Iterator[Case]:
    yield from manifests(seed)
    yield from records(seed)
    yield from checkpoints(seed)
    yield from models(seed)
    yield from overrides(seed)


def flipped(data: bytes, rng: np.random.Generator, bits: int = 1) -> bytes:
    broken = bytearray(data)
    for at in rng.integers(0, len(data), bits):
        broken[int(at)] ^= 1 << int(rng.integers(8))
    return bytes(broken)


# Manifests ------------------------------------------------------------------------------------------------------------


def rows(folder: Path, **changed: Any) -> pa.Table:
    """Three images in one file, a column of which may be another."""
    data = jpeg(1)
    folder_of(folder, {"images.bin": data * 3})
    columns: dict[str, Any] = {
        "id": ["a", "b", "c"], "path": [str(folder / "images.bin")] * 3, "offset": [0, len(data), 2 * len(data)],
        "size": [len(data)] * 3, "width": [32] * 3, "height": [32] * 3, "crc32": [0] * 3, "label": [0, 1, 1],
    }  # fmt: skip
    return pa.table({**columns, **changed})


def manifests(seed: int) -> Iterator[Case]:
    def case(name: str, told: str = "", **changed: Any) -> Case:
        """Whole by its checksums: somebody wrote it by hand."""

        def make(folder: Path) -> None:
            table = rows(folder, **changed).replace_schema_metadata({"classes": json.dumps(CLASSES)})
            with artifact.writing(folder / "m") as tmp:
                pq.write_table(table, tmp / manifest.FILE)

        return Case("manifest", name, "refused", make, read, told)

    def read(folder: Path) -> None:
        images = manifest.read(folder / "m")
        list(manifest.image_bytes(images, range(len(images))))

    numbers = {"10^12": 10**12, "2^62": 2**62, "-1": -1}
    for name, number in numbers.items():
        yield case(f"an offset of {name}", offset=[number] * 3)
        yield case(f"a size of {name}", size=[number] * 3)
    yield case("a label of a class that is not there", "`label`", label=[0, 1, 2])
    yield case("a label of -1", "`label`", label=[0, 1, -1])
    yield case("a width of text", "no manifest", width=["x"] * 3)
    yield case("a checksum of 2^40", "no manifest", crc32=[2**40] * 3)
    yield case("bytes that are others", "is not the one that `prepare` indexed")
    for path in ("/dev/zero", "/dev/null", "nowhere", "/", "", "a\0b", "x" * 5000):
        yield case(f"images in {path[:20]!r}", path=[path] * 3)

    def pipe(folder: Path) -> None:
        os.mkfifo(folder / "pipe")
        with artifact.writing(folder / "m") as tmp:
            manifest.write(tmp, rows(folder, path=[str(folder / "pipe")] * 3), CLASSES)

    yield Case("manifest", "images in a pipe", "refused", pipe, read, "not a regular file")
    for name, data in {"no Parquet": b"text", "nothing": b"", "zero bytes": bytes(5000)}.items():

        def hand(folder: Path, data: bytes = data) -> None:
            with artifact.writing(folder / "m") as tmp:
                (tmp / manifest.FILE).write_bytes(data)

        yield Case("manifest", name, "refused", hand, read, "no manifest")
    rng = np.random.default_rng([seed, 5])
    for i in range(10):
        state = rng.bit_generator.state

        def make(folder: Path, state: Any = state) -> None:
            random = np.random.default_rng(0)
            random.bit_generator.state = state
            with artifact.writing(folder / "m") as tmp:
                manifest.write(tmp, rows(folder), CLASSES)
            file = folder / "m" / str(random.choice([manifest.FILE, artifact.CHECKSUMS]))
            file.write_bytes(flipped(file.read_bytes(), random, 3))

        rng.integers(2**30)
        yield Case("manifest", f"bits flipped, {i}", "refused", make, read)


# Records --------------------------------------------------------------------------------------------------------------

RECORD = {"stage": "teach", "entry": "a", "key": "k" * 64, "params": {}, "inputs": {}, "lineage": {}}


def records(seed: int) -> Iterator[Case]:
    """What a stage reads of those before it, and `predict` of an evaluation."""

    def written(folder: Path) -> Path:
        token = artifact.provenance.set(dict(RECORD))
        try:
            with artifact.writing(folder / "a") as tmp:
                (tmp / "x").write_text("x")
        finally:
            artifact.provenance.reset(token)
        return folder / "a" / artifact.RECORD

    def read(folder: Path) -> None:
        stage._record("distil", "b", {}, {"init": folder / "a"}, ())

    def altered(data: bytes) -> Callable[[Path], Any]:
        return lambda folder: written(folder).write_bytes(data)

    deep = b'{"lineage": ' * 50_000
    contents = (
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"{}",
        b"\xff\xfe",
        b'{"lineage": 3}',
        b'{"key": 3}',
        deep,
        b'"text"',
        b"\0" * 99,
    )
    for data in contents:
        yield Case("record", f"a record of {data[:20]!r}", "refused", altered(data), read, "altered after it was written")

        def alone(folder: Path, data: bytes = data) -> None:
            with artifact.writing(folder / "a") as tmp:
                (tmp / artifact.RECORD).write_bytes(data)

        promise: Promise = "refused" if data != b"{}" else "works"  # the record of nobody
        yield Case("record", f"one written by hand, of {data[:20]!r}", promise, alone, read, "record")
    for data in (b"", b"{", b"[]", b'{"files": 3}', b'{"files": {"x": 3}}', b"\xff", b"[" * 100_000):

        def checksums(folder: Path, data: bytes = data) -> None:
            written(folder)
            (folder / "a" / artifact.CHECKSUMS).write_bytes(data)

        yield Case("record", f"checksums of {data[:20]!r}", "refused", checksums, read)
    for name in ("evaluation.json", "history.json"):

        def hand(folder: Path, name: str = name) -> None:
            with artifact.writing(folder / "a") as tmp:
                (tmp / name).write_text('{"role": ')

        def call(folder: Path, name: str = name) -> None:
            (evaluation.read if name == evaluation.FILE else evaluation.read_history)(folder / "a")

        yield Case("record", f"a broken {name}", "refused", hand, call, name)


# Checkpoints ----------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {RAN}",)


def lying(header: Any, data: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(shape: list[int], start: int, end: int, kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


def checkpoints(seed: int) -> Iterator[Case]:
    def case(name: str, file: str, data: bytes, promise: Any = "refused") -> Case:
        def call(folder: Path) -> None:
            state = checkpoint.read_foreign(folder / file)
            model = torch.nn.Linear(2, 2)
            checkpoint.fill(model, state, file)

        return Case("checkpoint", name, promise, lambda folder: (folder / file).write_bytes(data), call)

    lies = {
        "nothing": b"",
        "seven bytes": b"1234567",
        "text": b"hello, world",
        "a header of 2^63": lying({}, size=2**63),
        "a header of 2^64 - 1": lying({}, size=2**64 - 1),
        "a header longer than the file": lying({}, size=1000),
        "a header of 100 MB of blanks": lying(b"{}" + b" " * 1000, size=100_000_001),
        "no JSON": lying(b"{x"),
        "a list": lying([]),
        "not UTF-8": lying(b'{"\xff": 1}'),
        "nested 100,000 deep": lying(b"[" * 100_000),
        "no tensors": lying({}),
        "a kind that is none": lying({"a": tensor([1], 0, 4, "F99")}, bytes(4)),
        "offsets beyond": lying({"a": tensor([2], 0, 8)}),
        "negative offsets": lying({"a": tensor([1], -4, 0)}, bytes(4)),
        "an end before its start": lying({"a": tensor([1], 4, 0)}, bytes(4)),
        "tensors that overlap": lying({"a": tensor([1], 0, 4), "b": tensor([1], 0, 4)}, bytes(4)),
        "a hole": lying({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, bytes(12)),
        "a shape of 2^60": lying({"a": tensor([2**60], 0, 4)}, bytes(4)),
        "a shape of text": lying({"a": {**tensor([1], 0, 4), "shape": ["x"]}}, bytes(4)),
        "a shape that overflows": lying({"a": tensor([2**32, 2**32, 2**32], 0, 4)}, bytes(4)),
        "a negative shape": lying({"a": tensor([-1], 0, 4)}, bytes(4)),
        "metadata of numbers": lying({"__metadata__": {"a": 1}}),
    }
    for name, data in lies.items():
        yield case(f"safetensors: {name}", "a.safetensors", data)
    evil = pickle.dumps(Evil())
    for name, file in {
        "a pickle": "a.pth",
        "a pickle, .bin": "a.bin",
        "a pickle, .th": "a.th",
        "a pickle without a suffix": "a",
    }.items():
        yield case(name, file, evil)
    stored = Path("stored.zip")

    def zipped(folder: Path) -> None:
        with zipfile.ZipFile(folder / stored, "w") as archive:
            archive.writestr("archive/data.pkl", evil)
            archive.writestr("archive/version", "3")
        (folder / stored).rename(folder / "a.pth")

    yield Case("checkpoint", "a pickle within torch's zip", "refused", zipped, lambda f: checkpoint.read_foreign(f / "a.pth"))
    yield Case(
        "checkpoint", "a pipe", "refused", lambda f: os.mkfifo(f / "a.pth"), lambda f: checkpoint.read_foreign(f / "a.pth")
    )
    yield Case(
        "checkpoint", "a folder", "refused", lambda f: (f / "a.pth").mkdir(), lambda f: checkpoint.read_foreign(f / "a.pth")
    )
    whole = safetensors.torch.save({"weight": torch.ones(2, 2), "bias": torch.zeros(2)})
    yield case("safetensors: a good one", "a.safetensors", whole, "works")
    nan = safetensors.torch.save({"weight": torch.full((2, 2), torch.nan), "bias": torch.zeros(2)})
    yield case("safetensors: NaN", "a.safetensors", nan)
    rng = np.random.default_rng([seed, 6])
    for i in range(20):
        yield case(f"bits flipped in a header, {i}", "a.safetensors", flipped(whole[:130], rng, 2) + whole[130:], "either")


# Models ---------------------------------------------------------------------------------------------------------------


def models(seed: int) -> Iterator[Case]:
    """Model directories: whole by their checksums, and wrong in what they say."""
    good: dict[str, Any] = {"arch": "resnet8", "classes": ["ant", "bee"], "options": {"width": 4}, "input": {"size": 16},
                            "training": {}, "projection": None, "temperature": 1.0}  # fmt: skip

    def case(name: str, description: Any) -> Case:
        def make(folder: Path) -> None:
            with artifact.writing(folder / "m") as tmp:
                text = description if isinstance(description, bytes) else json.dumps(description).encode()
                (tmp / checkpoint.DESCRIPTION).write_bytes(text)
                safetensors.torch.save_file({"x": torch.zeros(1)}, tmp / checkpoint.WEIGHTS)

        return Case("model", name, "refused", make, lambda folder: network.load(folder / "m", CLASSES))

    for data in (b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b"{}"):
        yield case(f"a description of {data[:10]!r}", data)
    wrong: dict[str, list[Any]] = {
        "arch": ["os.system", "", 3, None, "hf-hub:some/model", "local-dir:/tmp", "x" * 5000, ["resnet8"], "wrn11_2"],
        "classes": [3, None, [1, 2], "ab", [], ["bee", "ant"], {"ant": 1}],
        "options": [3, {"width": -1}, {"width": 10**9}, {"no": 1}, None, {"exits": "all"}, {"head_layers": "x"}],
        "input": [{}, {"size": 0}, {"size": 10**9}, 3, {"size": "x"}, {"size": 16, "mean": ["a"]}],
        "temperature": [0, -1, "x", None, float("nan"), float("inf")],
        "projection": [3, {"layers": 1, "out": 2}, "x"],
        "extra": [1],
    }
    for key, values in wrong.items():
        for value in values:
            yield case(f"{key}: {str(value)[:30]}", {**good, key: value})
    wanted = Network(arch="resnet8", input=Wanted(size=16))
    for name in ("hf-hub:some/model", "../../x", "a\0b", ""):
        asked = wanted.model_copy(update={"arch": name})
        scratch = lambda folder: (folder / "scratch").touch()  # noqa: E731
        start = lambda folder, asked=asked: network.start(asked, folder / "scratch", CLASSES, 0)  # noqa: E731
        yield Case("model", f"arch of params: {name!r}", "refused", scratch, start, "architecture")


# Overrides ------------------------------------------------------------------------------------------------------------

HEAD = b"id,action,reason\n"


def overrides(seed: int) -> Iterator[Case]:
    def call(folder: Path) -> bool:
        images = manifest.Manifest(rows(folder).cast(manifest.SCHEMA), ())
        empty = manifest.Manifest(manifest.SCHEMA.empty_table(), ())
        found = decision.read_overrides(folder / "o.csv", {"pool": images, "train": empty, "holdout": empty})
        return all(said.action in ("keep", "remove") and said.reason for said in found.values())

    def case(name: str, data: bytes, promise: Any = "refused") -> Case:
        return Case("overrides", name, promise, lambda folder: (folder / "o.csv").write_bytes(data), call)

    contents = {
        "nothing": b"",
        "zero bytes": bytes(50),
        "a picture": jpeg(1),
        "UTF-16": "id,action,reason\n".encode("utf-16"),
        "Latin-1": HEAD + b"a,keep,caf\xe9\n",
        "another head": b"image,what,why\n",
        "an open quote": HEAD + b'a,keep,"x\n',
        "a zero byte": HEAD + b"a,keep,x\0y\n",
        "an unknown image": HEAD + b"z,keep,x\n",
        "another action": HEAD + b"a,drop,x\n",
        "no reason": HEAD + b"a,keep,\n",
        "blank reason": HEAD + b"a,keep,  \n",
        "twice": HEAD + b"a,keep,x\na,remove,y\n",
        "too few": HEAD + b"a,keep\n",
        "too many": HEAD + b"a,keep,x,y\n",
        "a field of 1 MB": HEAD + b"a,keep," + b"x" * 2**20,
        "a formula": HEAD + b"=cmd|' /C calc'!A0,keep,x\n",
        "half a quote": HEAD + b'a,keep,x"y"z\n',
        "line ends within": HEAD + b'"a\r",keep,x\n',
        "UTF-7": b"+AGk-d,action,reason\n",
    }
    for name, data in contents.items():
        yield case(name, data, "either" if name in ("half a quote", "a zero byte", "a field of 1 MB") else "refused")
    yield case("a good line", HEAD + b"a,keep,seen\n", "works")
    yield case("semicolons and a mark", b"\xef\xbb\xbfid;action;reason\r\na;remove;seen\r\n", "works")
    yield Case("overrides", "a folder", "refused", lambda f: (f / "o.csv").mkdir(), call)
    yield Case("overrides", "a pipe", "refused", lambda f: os.mkfifo(f / "o.csv"), call)
    rng = np.random.default_rng([seed, 7])
    for i in range(10):
        yield case(f"bits flipped, {i}", flipped(HEAD + b"a,keep,seen\nb,remove,seen\n", rng, 2), "either")
