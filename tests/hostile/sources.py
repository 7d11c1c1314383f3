"""Hostile sources: tars, tables, folders, images, data sets of torchvision.

What is refused stops `prepare`; what works has a row, or a reason in the quarantine, for each of its files.
"""

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import TypeAdapter

from pipeline.models.inputs import canvas
from pipeline.sources.checking import check_images, refused_of
from pipeline.sources.listing import Source, list_files
from pipeline.sources.source import Role
from pipeline.sources.tars import Tars
from pipeline.store import decode
from tests.hostile.case import RAN, Case, Promise
from tests.tiny import encoded, folder_of, jpeg, jpegs, picture, tar_of

GOOD = jpegs({"cat": 2, "dog": 2})
ADAPTER: TypeAdapter[Any] = TypeAdapter(Source)


def read(folder: Path, role: Role, **source: Any) -> tuple[dict[str, str | None], set[str]]:
    """What `prepare` does first with a source: {id: reason of refusal, or None}, and the classes."""
    (folder / "out").mkdir()
    try:
        section = ADAPTER.validate_python(source)
    except ValueError as error:  # what `params.load` says in other words
        raise decode.ImageRefused(f"params: {error}") from error
    listing = check_images(list_files([section], role, folder, Tars(folder / "out", Path("out"))), size_of, 1)
    rows = listing.table.select(["id", "reason"]).to_pylist()
    assert len(refused_of(listing)) == sum(row["reason"] is not None for row in rows)
    return {row["id"]: row["reason"] for row in rows}, set(listing.classes)


def size_of(data: bytes) -> tuple[int, int]:
    height, width, _ = decode.decode(data).shape
    return width, height


def case(
    kind: str, name: str, promise: Promise, make: Callable[[Path], Any], source: dict[str, Any], told: str = "", **expected: Any
) -> Case:
    """`expected`: `good` images, `bad` ones, `classes`, where the case works."""

    def call(folder: Path) -> bool:
        found, classes = read(folder, source.get("role", "labelled"), **{k: v for k, v in source.items() if k != "role"})
        got = {"good": sum(r is None for r in found.values()), "bad": sum(r is not None for r in found.values())}
        return all((classes if key == "classes" else got[key]) == value for key, value in expected.items())

    return Case(kind, name, promise, make, call, told)


def all_of(seed: int) -> Iterator[Case]:
    yield from tars(seed)
    yield from tables(seed)
    yield from folders()
    yield from images(seed)
    yield from datasets()


# Tars -----------------------------------------------------------------------------------------------------------------


def block(name: bytes = b"cat/a.jpg", size: int = 0, kind: bytes = b"0", data: bytes = b"", raw_size: bytes = b"") -> bytes:
    """A header with the right checksum, whatever stands in it, and its data in whole blocks."""
    head = bytearray(512)
    head[:100] = name[:100].ljust(100, b"\0")
    head[100:124] = b"0000644\0" + b"0000000\0" + b"0000000\0"
    head[124:136] = raw_size or b"%011o\0" % (size or len(data))
    head[136:148] = b"%011o\0" % 0
    head[156:157] = kind
    head[257:265] = b"ustar\x0000"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + data + bytes(-len(data) % 512)


def pax(**fields: str | bytes) -> bytes:
    lines = b""
    for key, value in fields.items():
        text = b" " + key.replace("__", ".").encode() + b"=" + (value if isinstance(value, bytes) else value.encode()) + b"\n"
        size = len(text) + 1
        while len(b"%d" % size) + len(text) != size:
            size += 1
        lines += b"%d" % size + text
    return block(b"pax", kind=b"x", data=lines)


def tars(seed: int) -> Iterator[Case]:
    member, end, picture_ = block(data=jpeg(1)), bytes(1024), jpeg(1)
    base256 = (1 << 40).to_bytes(11, "big")
    lying = {
        "a pax size of 10^30": pax(size="1" + "0" * 30) + member,
        "a pax size of 2^63 - 513": pax(size=str(2**63 - 513)) + member,
        "a negative pax size": pax(size="-512") + member,
        "a pax size that is no number": pax(size="many") + member,
        "a pax size of 4,000 digits": pax(size="9" * 150) + member,
        "a name of a million digits": block(kind=b"x", data=b"1" * 200_000) + member,
        "pax attributes of 2 MB": pax(comment="x" * (2 << 20)) + member,
        "a pax record longer than its header": block(kind=b"x", data=b"99999 path=x\n") + member,
        "a pax record of length 0": block(kind=b"x", data=b"0 path=x\n") + member,
        "a pax path with a zero byte": pax(path="cat/a\0b.jpg") + member,
        "a pax path that is not UTF-8": pax(path=b"cat/k\xf6tt.jpg") + member,
        "a pax mtime of infinity": pax(mtime="inf") + member,
        "a pax mtime that is no number": pax(mtime="nan, or so") + member,
        "a sparse map of text": pax(GNU__sparse__map="a,b", GNU__sparse__size="3") + member,
        "a sparse size of text": pax(GNU__sparse__size="x", GNU__sparse__offset="y") + member,
        "sparse 1.0 without its numbers": pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize="9") + member,
        "a negative size in base 256": block(raw_size=b"\xff" * 12) + member,
        "a size of 2^88 in base 256": block(raw_size=b"\x80" + b"\xff" * 11) + member,
        "a terabyte in base 256": block(raw_size=b"\x80" + base256) + member,
        "a size of letters": block(raw_size=b"elevenlong!\0") + member,
        "5,000 long names in a row": block(b"././@LongLink", kind=b"L", data=b"x\0") * 5000 + member,
        "5,000 pax headers in a row": pax(path="a") * 5000 + member,
        "a global header alone": block(kind=b"g", data=b"12 path=abc\n"),
        "a long name of 8 GB": block(b"././@LongLink", kind=b"L", raw_size=b"\x80" + (8 << 30).to_bytes(11, "big")) + member,
        "an unknown kind of member": block(kind=b"Z", data=picture_) + member,
        "a device": block(kind=b"3") + member,
        "a link to /etc/passwd": block(kind=b"2") + member,
        "a hard link to itself": block(kind=b"1") + member,
        "a continuous file": block(kind=b"7", data=picture_) + member,
        "an old GNU sparse file": block(kind=b"S", data=picture_) + member,
        "a multi-volume part": block(kind=b"M", data=picture_) + member,
        "a name of no letters": block(name=b"") + member,
        "two dots": block(name=b"../../etc/passwd", data=picture_) + member,
    }
    for name, data in lying.items():
        yield case("tar", name, "either", writes("a.tar", data + end), {"kind": "tar", "path": "a.tar"})
    absolute = {"/data/cat/1.jpg": picture_, "/data/dog/2.jpg": picture_}
    yield case(
        "tar", "names that begin with /", "refused", lambda f: tar_of(f / "a.tar", absolute), {"kind": "tar", "path": "a.tar"},
        "begins with `/`",
    )  # fmt: skip
    twice = {"k\udcf6/1.jpg": picture_, "k\\xf6/2.jpg": picture_}
    yield case(
        "tar", "two classes of one spelling", "refused", lambda f: tar_of(f / "a.tar", twice), {"kind": "tar", "path": "a.tar"},
        "two class folders",
    )  # fmt: skip
    yield case("tar", "a pipe", "refused", lambda f: os.mkfifo(f / "a.tar"), {"kind": "tar", "path": "a.tar"}, "not a file")
    yield case("tar", "a name that is none", "refused", lambda f: None, {"kind": "tar", "path": "x" * 5000}, "path")
    yield case("tar", "a pattern that is none", "refused", lambda f: None, {"kind": "tar", "path": "**a/b.tar"}, "path")
    rng = np.random.default_rng([seed, 1])
    whole = tar_bytes()
    for i in range(20):
        broken = bytearray(whole)
        for at in rng.integers(0, 512, 3):
            broken[int(rng.integers(0, 4)) * 1536 + int(at)] = int(rng.integers(0, 256))
        cut = len(broken) if i % 2 else int(rng.integers(1, len(broken)))
        yield case("tar", f"bytes changed, {i}", "either", writes("a.tar", bytes(broken[:cut])), {"kind": "tar", "path": "a.tar"})


def tar_bytes() -> bytes:
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode="w") as tar:
        for name, data in GOOD.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stored.getvalue()


def writes(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: folder_of(folder, {name: data})


# Tables ---------------------------------------------------------------------------------------------------------------


def table(metadata: bytes | None = None, labels: pa.Array | None = None, cells: pa.Array | None = None, **options: Any) -> Any:
    """Writes a.parquet: four images, with numbers for labels, and what its Hugging Face metadata say."""
    pictures = [{"bytes": data, "path": name} for name, data in GOOD.items()]
    columns = {
        "image": pa.array(pictures) if cells is None else cells,
        "label": pa.array([0, 0, 1, 1]) if labels is None else labels,
    }
    written = pa.table(columns).replace_schema_metadata({b"huggingface": metadata} if metadata is not None else None)
    return lambda folder: pq.write_table(written, folder / "a.parquet", **options)


def names(of: Any) -> bytes:
    return json.dumps({"info": {"features": {"label": {"names": of}}}}).encode()


def tables(seed: int) -> Iterator[Case]:
    numbered = {"kind": "parquet", "path": "a.parquet"}
    damaged = {
        "no JSON": b"{", "not UTF-8": b"\xff\xfe{}", "a list": b"[]", "a number": b"3", "null": b"null", "text": b'"x"',
        "info is a list": b'{"info": []}', "features are a list": b'{"info": {"features": ["label"]}}',
        "names are text": names("cat"), "names are numbers": names([0, 1]), "names are a mapping": names({"0": "cat"}),
        "no names": names([]), "nested 100,000 deep": b"[" * 100_000, "null names": names([None, None]),
    }  # fmt: skip
    for name, data in damaged.items():
        yield case("table", f"Hugging Face metadata: {name}", "refused", table(data), numbered, "classes: [...]")
    yield case("table", "metadata that repeat a name", "refused", table(names(["cat", "cat"])), numbered, "names more than one")
    repeated = {**numbered, "classes": ["cat", "dog", "cat"]}
    yield case("table", "params that repeat a name", "refused", table(), repeated, "more than once")
    few = {**numbered, "classes": ["cat"]}
    yield case("table", "numbers without a name", "works", table(), few, good=2, bad=2, classes={"cat"})
    huge = table(names(["cat", "dog"]), pa.array([2**62, -(2**62), 0, 1]))
    yield case("table", "labels of 2^62", "works", huge, numbered, good=2, bad=2, classes={"cat", "dog"})
    latin = pa.Array.from_buffers(
        pa.string(), 4, [None, pa.py_buffer(struct.pack("5i", 0, 1, 2, 3, 4)), pa.py_buffer(b"\xf6abc")]
    )
    yield case("table", "labels that are not UTF-8", "refused", table(labels=latin), numbered, "cannot be read as Parquet")
    nested = pa.array([{"bytes": {"bytes": b"x"}}] * 4)
    yield case("table", "bytes within bytes", "refused", table(cells=nested), numbered, "does not hold image files")
    yield case(
        "table", "images of null", "works", table(names(["a", "b"]), cells=pa.array([None] * 4, pa.binary())), numbered, bad=4
    )
    text = pa.array([b"text"] * 4)
    yield case("table", "text for images", "works", table(names(["a", "b"]), cells=text), numbered, good=0, bad=4)

    def twins(folder: Path) -> None:
        column = pa.array(list(GOOD.values()))
        pq.write_table(
            pa.Table.from_arrays([column, column, pa.array(["a"] * 4)], ["image", "image", "label"]), folder / "a.parquet"
        )

    yield case("table", "two columns of one name", "refused", twins, numbered, "2 columns called")
    yield case("table", "a folder", "refused", lambda f: (f / "a.parquet").mkdir(), numbered, "Parquet")
    yield case("table", "a pipe", "refused", lambda f: os.mkfifo(f / "a.parquet"), numbered, "not a file")

    def bomb(rows: int, size: int) -> Callable[[Path], Any]:
        def make(folder: Path) -> None:
            cells = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([bytes(size)], pa.binary()))
            facts = pa.table({"image": cells, "label": pa.array(["a"] * rows)})
            pq.write_table(facts, folder / "a.parquet", compression="zstd", store_schema=False)

        return make

    said = "times the size of the file"
    yield case("table", "8 rows of 64 MB in 4 kB", "refused", bomb(8, 64 << 20), numbered, said)
    yield case("table", "500 rows of 1 MB in 4 kB", "refused", bomb(500, 1 << 20), {**numbered, "role": "pool"}, said)
    whole = io.BytesIO()
    pq.write_table(pa.table({"image": list(GOOD.values()), "label": ["a", "a", "b", "b"]}), whole)
    rng = np.random.default_rng([seed, 2])
    for i in range(25):
        broken = bytearray(whole.getvalue())
        start = 0 if i % 2 else len(broken) - 800  # every other one hits the footer
        for at in rng.integers(start, len(broken), 4):
            broken[int(at)] ^= 1 << int(rng.integers(8))
        yield case("table", f"bits flipped, {i}", "either", writes("a.parquet", bytes(broken)), numbered)


# Folders --------------------------------------------------------------------------------------------------------------


def folders() -> Iterator[Case]:
    source = {"kind": "folder", "path": "x"}

    def with_(add: Callable[[Path], Any]) -> Callable[[Path], Any]:
        return lambda folder: (folder_of(folder / "x", GOOD), add(folder / "x" / "cat" / "0002.jpg"))

    odd: dict[str, tuple[Callable[[Path], Any], int]] = {
        "a pipe": (os.mkfifo, 1),
        "a link to nothing": (lambda p: p.symlink_to("nowhere"), 1),
        "a link to itself": (lambda p: p.symlink_to(p.name), 1),
        "a link to a device": (lambda p: p.symlink_to("/dev/zero"), 1),
        "a name that is not UTF-8": (lambda p: p.with_name("k\udcf6.jpg").write_bytes(jpeg(1)), 1),
        "a name of 250 letters": (lambda p: p.with_name("x" * 250).write_bytes(b""), 1),
        "a name of line ends": (lambda p: p.with_name("a\nb\r.jpg").write_bytes(b"x"), 1),
        "a hidden file": (lambda p: p.with_name(".a.jpg").write_bytes(jpeg(1)), 1),
        "300 folders deep": (lambda p: deep(p.with_name("d"), 300), 1),
        "a shell's words for a name": (lambda p: p.with_name(f"$(touch {RAN});`touch {RAN}`.jpg").write_bytes(b"x"), 1),
    }
    for name, (add, bad) in odd.items():
        yield case("folder", name, "works", with_(add), source, good=4, bad=bad, classes={"cat", "dog"})
    linked = with_(lambda p: p.symlink_to(p.parents[1] / "dog"))
    yield case("folder", "a link to a folder", "refused", linked, source, "is a link to a folder")
    outside = {"kind": "folder", "path": "../x"}
    yield case("folder", "a path that leads out", "refused", with_(lambda p: None), outside, "below `prepare.root`")
    yield case("folder", "no class folders", "refused", writes("x/a.jpg", jpeg(1)), source, "no class folders")
    yield case("folder", "a path of zero bytes", "refused", lambda f: None, {"kind": "folder", "path": "a\0b"}, "nothing matches")


def deep(folder: Path, levels: int) -> None:
    """Made step by step: the whole path is longer than the system takes at once."""
    here = os.open(folder.parent, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("bad.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


# Images ---------------------------------------------------------------------------------------------------------------


def png(width: int, height: int, pixels: bytes = b"", *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of any header; chunks stand before the pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", pixels or zlib.compress(bytes(1000))), (b"IEND", b"")]
    framed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n%%EOF\n"


def images(seed: int) -> Iterator[Case]:
    def call(folder: Path) -> bool:
        image = decode.decode((folder / "a.jpg").read_bytes())
        return image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and canvas(image, 64).shape == (64, 64, 3)

    scans = encoded(picture(0, 64), "JPEG", progressive=True)
    hostile = {
        "an EPS, for which Pillow starts Ghostscript": EPS,
        "a DOS EPS": struct.pack("<4sII", b"\xc5\xd0\xd3\xc6", 32, len(EPS)).ljust(32, b"\0") + EPS,
        "30,000 x 30,000 by its header": png(30_000, 30_000),
        "2^31 - 1 pixels wide": png(2**31 - 1, 1),
        "no pixels": png(0, 0),
        "a text of 20 MB in 20 kB": png(4, 4, b"", (b"zTXt", b"k\0\0" + zlib.compress(bytes(20 << 20)))),
        "a colour profile of 20 MB": png(4, 4, b"", (b"iCCP", b"k\0\0" + zlib.compress(bytes(20 << 20)))),
        "a TIFF whose directory is its own next": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
        "a TIFF of 4 billion entries": b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40,
        "a GIF cut in its palette": encoded(picture(0), "GIF")[:20],
        "a BMP of negative size": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, -5, -5, 1, 24, 0, 0, 0, 0, 0, 0),
        "a PPM of 10^9 pixels a side": b"P6 1000000000 1000000000 255\n",
        "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>',
        "a pickle": b"\x80\x04cposix\nsystem\n(X\x05\0\0\0touchtR.",
        "zero bytes": bytes(4096),
        "a JPEG of markers alone": b"\xff\xd8" + b"\xff\xe1\0\x02" * 1000 + b"\xff\xd9",
        "a JPEG that says it is 65,535 pixels a side": size_in_jpeg(65_535),
    }
    for name, data in hostile.items():
        yield Case("image", name, "refused", writes("a.jpg", data), call)
    exif = png(4, 4, b"", (b"eXIf", b"II*\0\x08\0\0\0\x01\0i\x87\x04\0\x01\0\0\0\x08\0\0\0\0\0\0\0"))
    yield Case("image", "an EXIF that points at itself", "works", writes("a.jpg", exif), call)
    strip = encoded(Image.new("RGB", (60_000, 1)), "PNG")
    yield Case("image", "a strip of 60,000 x 1", "works", writes("a.jpg", strip), call)
    yield Case("image", "a strip of 1 x 60,000", "works", writes("a.jpg", encoded(Image.new("L", (1, 60_000)), "PNG")), call)
    yield Case("image", "20,000 scans", "refused", writes("a.jpg", many_scans(scans, 20_000)), call)
    rng = np.random.default_rng([seed, 3])
    whole = [encoded(picture(7), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")]
    for i in range(40):
        broken = bytearray(whole[i % len(whole)])
        for at in rng.integers(0, min(len(broken), 400), 3):
            broken[int(at)] = int(rng.integers(256))
        yield Case("image", f"bytes changed in a header, {i}", "either", writes("a.jpg", bytes(broken)), call)


def size_in_jpeg(side: int) -> bytes:
    data = bytearray(jpeg(1))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(data)


def many_scans(data: bytes, scans: int) -> bytes:
    """A progressive JPEG whose last scan stands there very often: each goes through all pixels."""
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + data[-2:]


# torchvision ----------------------------------------------------------------------------------------------------------


def datasets() -> Iterator[Case]:
    def eurosat(data: bytes) -> Callable[[Path], Any]:
        return writes("eurosat/2750/Forest/a.jpg", data)

    generic = (
        "ImageFolder",
        "DatasetFolder",
        "VisionDataset",
        "FakeData",
        "LSUN",
        "LSUNClass",
        "CocoDetection",
        "Kinetics",
        "nn",
        "",
    )
    for name in generic:
        source = {"kind": "torchvision", "name": name, "role": "pool"}
        yield case("torchvision", f"name: {name or 'none'}", "refused", writes("x/a.jpg", EPS), source, "torchvision")
    source = {"kind": "torchvision", "name": "EuroSAT"}
    bad = {"an EPS": EPS, "30,000 x 30,000": png(30_000, 30_000), "text": b"x", "nothing": b""}
    for name, data in bad.items():
        yield case("torchvision", f"{name} in a set of files", "works", eurosat(data), source, good=0, bad=1)
    yield case("torchvision", "an image in a set of files", "works", eurosat(jpeg(3)), source, good=1, bad=0, classes={"Forest"})
    cut = {f"MNIST/raw/{part}-{what}": b"\0\0\x08\x03\xff\xff\xff\xff" for part in ("train", "t10k")
           for what in ("images-idx3-ubyte", "labels-idx1-ubyte")}  # fmt: skip
    mnist = {"kind": "torchvision", "name": "MNIST"}
    yield case("torchvision", "a set cut short", "refused", lambda f: folder_of(f, cut), mnist, "damaged files of the set")
