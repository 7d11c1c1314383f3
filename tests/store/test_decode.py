"""The one decode function: what every kind of image becomes, and what is refused."""

import io
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.store import decode as decoding
from pipeline.store.decode import ImageRefused, decode, size_of
from tests.tiny import encoded, jpeg, picture

ORIENTATION = 0x0112
WIDE = picture(1, (60, 40))
GREY = picture(2, (60, 40))[:, :, 0]


def close(a: np.ndarray, b: np.ndarray, by: float = 3.0) -> bool:
    return a.shape == b.shape and float(np.abs(a.astype(int) - b.astype(int)).max()) <= by


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """What a viewer shows: EXIF 2.3's table of row 0 and column 0, spelled out."""
    return {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: np.swapaxes(a, 0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.swapaxes(np.rot90(a, 2), 0, 1),
        8: lambda a: np.rot90(a, 1),
    }[orientation](image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("PNG", {}),
        ("TIFF", {}),
        ("WEBP", {"lossless": True}),
        ("AVIF", {"quality": 100}),
    ],
)
def test_exif_orientation_is_applied(kind, options, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(WIDE, kind, exif=exif, **options)
    pixels = decode(data)
    expected = turned(WIDE, orientation)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).mean() < 3
    assert size_of(data) == (pixels.shape[1], pixels.shape[0])
    assert pixels.flags.c_contiguous


def with_segment(data: bytes, marker: int, content: bytes) -> bytes:
    """A JPEG with one more segment behind its start."""
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + data[2:]


def test_exif_is_found_behind_large_and_damaged_segments():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encoded(WIDE, "JPEG", exif=exif, quality=100, subsampling=0)
    for _ in range(3):
        data = with_segment(data, 0xE2, b"ICC_PROFILE\0" + bytes(60_000))  # no profile: libjpeg warns of it
    assert close(decode(data), turned(WIDE, 6), by=6)
    assert size_of(data) == (40, 60)


def test_exif_is_found_behind_the_pixels_of_a_png():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(content)) + b"eXIf" + content + struct.pack(">I", zlib.crc32(b"eXIf" + content))
    plain = encoded(WIDE, "PNG")
    data = plain[:-12] + chunk + plain[-12:]
    assert np.array_equal(decode(data), turned(WIDE, 6))
    assert size_of(data) == (40, 60)


def test_the_header_is_read_without_the_pixels(monkeypatch):
    for decoder in ("PIL.ImageFile.ImageFile.load", "simplejpeg.decode_jpeg"):
        monkeypatch.setattr(decoder, lambda *_, **__: pytest.fail("unpacked"))
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"):
        assert size_of(encoded(WIDE, kind)) == (60, 40), kind


def test_exif_in_the_pixels_of_a_jpeg_is_no_orientation():
    data = encoded(WIDE, "JPEG", quality=100, comment=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0")
    assert decode(data).shape == (40, 60, 3)


def test_damaged_exif_leaves_the_image_as_it_is_stored():
    plain = encoded(WIDE, "JPEG")
    data = with_segment(plain, 0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert np.array_equal(decode(data), decode(plain))


def test_grey_is_repeated():
    for data in (encoded(GREY, "PNG"), encoded(GREY, "JPEG", quality=100)):
        assert close(decode(data), np.repeat(GREY[:, :, None], 3, axis=2), by=2)


def test_black_and_white():
    bits = GREY > 128
    assert np.array_equal(decode(encoded(Image.fromarray(bits), "PNG")), np.repeat(bits[:, :, None] * np.uint8(255), 3, axis=2))


def test_a_palette_is_looked_up():
    indexed = Image.fromarray(WIDE).quantize(16)
    for kind in ("PNG", "GIF", "BMP"):
        assert np.array_equal(decode(encoded(indexed, kind)), np.asarray(indexed.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_converted(kind):
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(Image.fromarray(WIDE).convert("CMYK"), kind, **options)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert close(decode(data), WIDE, by=8)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_sixteen_bits_keep_the_upper_eight_even_in_the_dark(dtype):
    for scale in (257, 3):  # 3: a night picture, whose brightest value is 765 of 65535
        values = GREY.astype(np.uint16) * scale
        data = encoded(Image.fromarray(values), "PNG" if dtype == ">u2" else "TIFF")
        assert np.array_equal(decode(data), np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def png(ihdr: bytes, lines: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG from its parts, for what Pillow cannot write."""
    parts = [(b"IHDR", ihdr), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in parts
    )


def test_sixteen_bit_colour_and_grey_agree():
    grey = (GREY.astype(np.uint16) * 200).astype(">u2")
    colour = np.repeat(grey[:, :, None], 3, axis=2)
    lines = b"".join(b"\0" + row.tobytes() for row in colour)
    data = png(struct.pack(">IIBBBBB", 60, 40, 16, 2, 0, 0, 0), lines)
    assert np.array_equal(decode(data), decode(encoded(Image.fromarray(GREY.astype(np.uint16) * 200), "PNG")))


def test_the_transparent_value_of_sixteen_bit_grey_is_white():
    values = np.array([[1000, 40000]], ">u2")
    header = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)
    data = png(header, b"\0" + values.tobytes(), (b"tRNS", struct.pack(">H", 1000)))
    assert decode(data)[0, :, 0].tolist() == [255, 40000 >> 8]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparent_pixels_lie_on_white(kind):
    alpha = np.zeros((40, 60), np.uint8)
    alpha[:, 20:40] = 128
    alpha[:, 40:] = 255
    data = encoded(np.dstack([WIDE, alpha]), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    expected = WIDE.astype(float) * (alpha / 255)[:, :, None] + 255 * (1 - alpha / 255)[:, :, None]
    assert close(decode(data), expected.round(), by=1)


def test_a_transparent_palette_entry_is_white():
    indexed = Image.fromarray(WIDE).quantize(16)
    expected = np.asarray(indexed.convert("RGB")).copy()
    expected[np.asarray(indexed) == 3] = 255
    for kind in ("PNG", "GIF"):
        assert np.array_equal(decode(encoded(indexed, kind, transparency=3)), expected)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind):
    first, second = (Image.fromarray(picture(s, (60, 40))).quantize(64) for s in (5, 6))
    options = {"lossless": True} if kind == "WEBP" else {}
    frames = [first, second] if kind == "GIF" else [first.convert("RGB"), second.convert("RGB")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
    assert close(decode(data), np.asarray(first.convert("RGB")), by=1)


def test_the_adobe_segment_tells_the_colour_space_of_a_jpeg():
    data = bytearray(encoded(WIDE, "JPEG", quality=100, subsampling=0, keep_rgb=True))
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    for i in range(3):  # components named 1, 2, 3 would mean YCbCr by themselves
        data[frame + 10 + 3 * i] = data[scan + 5 + 2 * i] = i + 1
    assert b"Adobe" in data
    assert close(decode(bytes(data)), WIDE, by=6)


def test_of_a_multi_picture_jpeg_the_first_picture_counts():
    first, second = Image.fromarray(WIDE), Image.fromarray(picture(9, (60, 40)))
    data = encoded(first, "MPO", save_all=True, append_images=[second], quality=100, subsampling=0)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert close(decode(data), WIDE, by=6)


def test_a_jpeg_is_what_pillow_makes_of_it():
    data = jpeg(3, (50, 30))
    assert close(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), by=2)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("PPM", {}),
        ("AVIF", {}),
        ("JPEG2000", {}),
    ],
)
def test_a_truncated_file_is_refused(kind, options):
    data = encoded(picture(4, (96, 64)), kind, **options)
    assert decode(data).shape == (64, 96, 3)
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(ImageRefused):
            decode(data[: int(len(data) * share)])


def noisy() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_a_jpeg_damaged_in_the_middle_is_refused_though_pillow_opens_it():
    data = bytearray(encoded(noisy(), "JPEG"))
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    Image.open(io.BytesIO(data)).load()  # garbage, without a word
    with pytest.raises(ImageRefused, match=r"^damaged: "):
        decode(bytes(data))


def test_a_cmyk_jpeg_damaged_in_the_middle_is_refused():
    data = bytearray(encoded(Image.fromarray(noisy()).convert("CMYK"), "JPEG"))
    middle = len(data) // 2
    data[middle : middle + 64] = b"\xff\x00" * 32
    with pytest.raises(ImageRefused, match=r"^damaged: "):
        decode(bytes(data))


def test_every_flipped_bit_of_a_png_is_noticed():
    data = encoded(noisy(), "PNG")
    random = np.random.default_rng(1)
    for at in random.integers(8, len(data) - 12, 50):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(random.integers(8))
        with pytest.raises(ImageRefused):
            decode(bytes(flipped))


def test_damage_in_a_deflated_tiff_is_noticed():
    random = np.random.default_rng(1)
    for seed in range(30):
        data = encoded(picture(seed, (90, 70)) + random.integers(0, 9, (70, 90, 3), np.uint8), "TIFF", compression="tiff_deflate")
        tags = Image.open(io.BytesIO(data)).tag_v2  # type: ignore[attr-defined]
        for at, size in zip(tags[273], tags[279], strict=True):
            start = at + int(random.integers(2, size - 64))
            with pytest.raises(ImageRefused, match=r"^damaged: "):
                decode(data[:start] + bytes(64) + data[start + 64 :])


def good_tiffs() -> Iterator[bytes]:
    for seed in range(20):
        image = picture(seed, (40 + 13 * seed, 300 - 11 * seed))
        for mode in ("RGB", "L", "RGBA", "P", "1", "CMYK"):
            for compression in ("tiff_adobe_deflate", "tiff_deflate", "tiff_lzw", "packbits", "raw"):
                yield encoded(
                    Image.fromarray(image).convert(mode), "TIFF", **({"compression": compression} if compression else {})
                )
        for code in (1, 5, 8, 32946):
            yield cv2.imencode(".tif", image, [cv2.IMWRITE_TIFF_COMPRESSION, code, cv2.IMWRITE_TIFF_ROWSPERSTRIP, 1 + seed])[
                1
            ].tobytes()


def test_no_good_tiff_is_refused():
    assert len([decode(data) for data in good_tiffs()]) == 20 * (6 * 5 + 4)


@pytest.mark.parametrize("measure", [decode, size_of])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"class,name\n0,cat\n" * 20, "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),  # Pillow would start Ghostscript
        (b"\x00\x05\x16\x07" + bytes(200), "not an image"),  # AppleDouble
        (b"\xff\xd8\xff\xe0" + bytes(100), "unreadable header: "),
        (jpeg(1)[:20], "unreadable header: "),
    ],
)
def test_what_is_no_image_is_refused(measure, data, reason):
    with pytest.raises(ImageRefused) as refusal:
        measure(data)
    assert str(refusal.value).startswith(reason)


def large_png(width: int, height: int) -> bytes:
    return png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"\0" * 1000)


@pytest.mark.parametrize("measure", [decode, size_of])
def test_an_oversized_header_is_refused_before_memory_is_taken(measure, monkeypatch):
    for decoder in ("PIL.ImageFile.ImageFile.load", "simplejpeg.decode_jpeg"):
        monkeypatch.setattr(decoder, lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(ImageRefused, match=r"^oversized: 60000 x 50000 pixels by its header$"):
        measure(large_png(60_000, 50_000))
    jpeg_header = bytearray(jpeg(1, 16))
    at = jpeg_header.index(b"\xff\xc0") + 5
    jpeg_header[at : at + 4] = struct.pack(">HH", 50_000, 60_000)
    with pytest.raises(ImageRefused, match=r"^oversized: 60000 x 50000 "):
        measure(bytes(jpeg_header))
    with pytest.raises(ImageRefused, match=r"^oversized: 32 x 32 "):
        measure(jpeg(1, 32), 1023)
    assert size_of(jpeg(1, 32), 1024) == (32, 32)


@pytest.mark.parametrize("values", [GREY.astype(np.float32), GREY.astype(np.int32)])
def test_pixels_without_a_range_are_refused(values):
    with pytest.raises(ImageRefused, match=r"^unsupported: (float|32-bit) pixels"):
        decode(encoded(Image.fromarray(values), "TIFF"))


def test_too_little_memory_is_not_the_images_fault(monkeypatch):
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("simplejpeg.decode_jpeg", no_memory)
    with pytest.raises(MemoryError):
        decode(jpeg(1))


def test_threads_see_the_same_pixels():
    files = [encoded(picture(s), kind) for s in range(50) for kind in ("JPEG", "PNG", "WEBP")]
    alone = [decode(data) for data in files]
    with ThreadPoolExecutor(8) as threads:
        assert all(np.array_equal(a, b) for a, b in zip(alone, threads.map(decode, files), strict=True))


def test_pillow_agrees_on_every_orientation_it_knows():
    """`turned` above is this file's own reading of EXIF; Pillow's is another."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        image = Image.open(io.BytesIO(encoded(WIDE, "PNG", exif=exif)))
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(image)), turned(WIDE, orientation))


# HEIC -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_heic_is_refused_by_name_where_nothing_reads_it(brand: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + b"mif1heic" + b"\0" * 100
    monkeypatch.setattr(decoding, "HEIF", ())
    with pytest.raises(ImageRefused, match=r"^HEIC or HEIF, read where pillow-heif is installed: `pip install pillow-heif`$"):
        decode(data)


def test_heic_is_read_and_turned_where_pillow_heif_is_installed() -> None:
    pytest.importorskip("pillow_heif", reason="pillow-heif is not installed: pip install -e '.[heif]'")
    image = picture(1, (64, 48))
    turn = Image.Exif()
    turn[ORIENTATION] = 6
    held = Image.fromarray(image)
    held.info["exif"] = turn.tobytes()  # which pillow-heif writes as a turn of the container, as cameras do
    for given, wanted in ((Image.fromarray(image), image), (held, turned(image, 6))):
        data = encoded(given, "HEIF", quality=95)
        pixels = decode(data)
        assert pixels.shape == wanted.shape
        assert np.abs(pixels.astype(int) - wanted).mean() < 4
        assert decoding.size_of(data) == (wanted.shape[1], wanted.shape[0])
        with pytest.raises(ImageRefused):
            decode(data[: len(data) // 2])
