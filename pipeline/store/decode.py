"""The one decode function: what an image file's pixels are, for every stage alike."""

import contextlib
import io
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.errors import UserError

MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")  # no EPS: Pillow would run Ghostscript on it
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # bytes 8 to 11 of such a file
try:
    import pillow_heif
except ImportError:
    HEIF: tuple[str, ...] = ()
else:
    pillow_heif.register_heif_opener()
    HEIF = ("HEIF",)
Image.MAX_IMAGE_PIXELS = None  # `decode` has its own limit, checked on the header

SCANS = 100
"""A progressive JPEG has about ten. One of 20,000 takes minutes, and few bytes."""

ORIENTATION = 0x0112  # the EXIF tag
# EXIF orientation -> (transpose first, flip the rows, flip the columns)
TURNS = {2: (0, 0, 1), 3: (0, 1, 1), 4: (0, 1, 0), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)}


class ImageRefused(UserError):
    """The bytes are not an image that winnow can use; the message is the reason, as it stands in the quarantine."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8 RGB, the same pixels for every stage.

    JPEG (CMYK and multi-picture files too), PNG, GIF, WebP, BMP, TIFF, PPM, AVIF and JPEG 2000; HEIC and HEIF where pillow-heif
    is installed. EXIF orientation is applied. Grey is repeated, palettes are looked up, CMYK is converted, of 16 bits the upper 8
    are kept (never clipped), transparent pixels lie on white, of an animation the first frame counts. Colour profiles are not
    applied.

    Raises ImageRefused for empty, non-image, truncated or damaged data, as far as the format can tell: PNG and deflated TIFF
    have checksums, the others only notice what breaks their rules (`benchmarks.damage`). Also for pixels without a defined
    range (float, 32 bits), and for more than `max_pixels` by the header.
    """
    header = _header(data, max_pixels)
    try:
        pixels = _jpeg(data, header.mode) if header.image is None else _other(header.image, data)
    except (MemoryError, ImageRefused):  # memory is this machine's trouble: no image may end in the quarantine for it
        raise
    except Exception as error:  # Pillow's plugins raise struct.error, SyntaxError, KeyError, ... on damaged data
        raise ImageRefused(f"damaged: {_reason(error)}") from None
    if header.turn in TURNS:
        transpose, rows, columns = TURNS[header.turn]
        pixels = pixels.transpose(1, 0, 2) if transpose else pixels
        pixels = pixels[:: -1 if rows else 1, :: -1 if columns else 1]
    return np.ascontiguousarray(pixels)


def size_of(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of what `decode` gives, from the header alone. Raises ImageRefused."""
    header = _header(data, max_pixels)
    return (header.height, header.width) if header.turn in (5, 6, 7, 8) else (header.width, header.height)


class _Header(NamedTuple):
    width: int  # as stored, before `turn`
    height: int
    mode: str
    turn: int  # the EXIF orientation that is still to be applied
    image: Image.Image | None  # opened by Pillow; None for a JPEG


def _header(data: bytes, max_pixels: int) -> _Header:
    if not data:
        raise ImageRefused("empty file")
    try:
        header = _jpeg_header(data) if data.startswith(b"\xff\xd8\xff") else _other_header(data)
    except Image.UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS and not HEIF:
            raise ImageRefused("HEIC or HEIF, read where pillow-heif is installed: `pip install pillow-heif`") from None
        raise ImageRefused("not an image") from None
    except MemoryError:
        raise
    except Exception as error:
        raise ImageRefused(f"unreadable header: {_reason(error)}") from None
    if header.width * header.height > max_pixels:
        raise ImageRefused(f"oversized: {header.width} x {header.height} pixels by its header")
    return header


def _jpeg_header(data: bytes) -> _Header:
    height, width, mode, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    exif = next((data[start:end] for marker, start, end in _segments(data) if data[start : start + 6] == b"Exif\0\0"), b"")
    return _Header(width, height, mode, _exif_orientation(exif), None)


def _segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each APP segment; asking Pillow for them would take longer than decoding a small image."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == 0xDA:  # start of scan: only pixels follow
            return
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if 0xE0 <= marker <= 0xEF:
            yield marker, at + 4, end
        at = end


def _exif_orientation(exif: bytes) -> int:
    if not exif:
        return 1
    tags = Image.Exif()
    with contextlib.suppress(Exception):  # damaged metadata: the pixels are whole, and stand as they are stored
        tags.load(exif)
        return tags.get(ORIENTATION, 1)
    return 1


def _other_header(data: bytes) -> _Header:
    image = Image.open(io.BytesIO(data), formats=FORMATS + HEIF)
    exif = _png_exif(data) if image.format == "PNG" else image.info.get("exif", b"")
    turn = _exif_orientation(exif) if image.format != "TIFF" else 1  # which Pillow turns itself
    return _Header(*image.size, image.mode, turn, image)


def _png_exif(png: bytes) -> bytes:
    """The chunk may stand behind the pixels: to ask Pillow for it unpacks them, and 132 bytes can claim to be 10 GB."""
    at = 8
    while at + 8 <= len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] == b"eXIf":
            return png[at + 8 : at + 8 + length]
        at += 12 + length
    return b""


def _jpeg(data: bytes, mode: str) -> np.ndarray:
    """simplejpeg refuses what others, with garbage for pixels, only warn of: a stream that is damaged in the middle."""
    data = _without_metadata(data)
    end = data.find(b"\xff\xd9")
    if (scans := data.count(b"\xff\xda", 0, end if end >= 0 else len(data))) > SCANS:
        raise ImageRefused(f"damaged: {scans} scans, each of which goes through all pixels")
    if mode not in ("CMYK", "YCCK"):
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    inks = 255 - simplejpeg.decode_jpeg(data, colorspace="CMYK", strict=True)  # stored inverted, by Adobe's custom
    return np.asarray(Image.fromarray(inks, "CMYK").convert("RGB"))


def _without_metadata(jpeg: bytes) -> bytes:
    """Leave out what says nothing of the pixels: a damaged colour profile, say, is no reason to refuse them."""
    kept, at = [], 0
    for marker, start, end in _segments(jpeg):
        if marker not in (0xE0, 0xEE):  # JFIF and Adobe name the colour space
            kept.append(jpeg[at : start - 4])
            at = end
    return b"".join([*kept, jpeg[at:]]) if kept else jpeg


def _other(image: Image.Image, data: bytes) -> np.ndarray:
    if image.format == "PNG":  # Pillow checks the checksums of the pixel data only when asked to
        Image.open(io.BytesIO(data), formats=("PNG",)).verify()
    if image.format == "TIFF":
        _check_deflated(image, data)
    image.load()
    if image.mode.startswith("I;16") or (image.format in ("PNG", "PPM") and image.mode == "I"):
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        kind = "32-bit" if image.mode == "I" else "float"
        raise ImageRefused(f"unsupported: {kind} pixels, whose range nothing defines")
    if {"A", "a"} & set(image.getbands()) or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))


def _check_deflated(image: Image.Image, data: bytes) -> None:
    """Raise zlib.error if a checksum of a deflated TIFF is wrong: libtiff does not look at all of them."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if tags.get(259) not in (8, 32946):  # its compression
        return
    places, sizes = (273, 279) if 273 in tags else (324, 325)  # of strips, or of tiles
    for at, size in zip(tags[places], tags[sizes], strict=True):
        stream, left = zlib.decompressobj(), data[at : at + size]
        while left and not stream.eof:
            stream.decompress(left, 1 << 20)  # in pieces: a few bytes can claim to be gigabytes
            left = stream.unconsumed_tail
        if not stream.eof:
            raise zlib.error("a deflated strip ends early")


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__
