"""How much damage of an image file `decode` finds, by format.

    python -m benchmarks.damage --images 20

Each image is a smooth picture with noise, 160 x 120 pixels, written in each format. `cut`: the file ends too early. `byte`: one
byte has another value. `block`: 64 bytes are zeros. The place is uniform over the file. Printed is the share that was refused,
and behind the slash the share that was accepted though its pixels changed; what is left of 100 % changed no pixel. `good` counts
refusals of files without damage.
"""

import argparse
import io
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from pipeline.store.decode import ImageRefused, decode

FILES: dict[str, tuple[str, dict[str, object]]] = {
    "JPEG": ("JPEG", {"quality": 90}),
    "JPEG, progressive": ("JPEG", {"quality": 90, "progressive": True}),
    "PNG": ("PNG", {}),
    "GIF": ("GIF", {}),
    "WebP": ("WEBP", {}),
    "WebP, lossless": ("WEBP", {"lossless": True}),
    "AVIF": ("AVIF", {}),
    "JPEG 2000": ("JPEG2000", {"quality_mode": "rates", "quality_layers": [8]}),
    "BMP": ("BMP", {}),
    "PPM": ("PPM", {}),
    "TIFF": ("TIFF", {}),
    "TIFF, deflate": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "TIFF, LZW": ("TIFF", {"compression": "tiff_lzw"}),
    "TIFF, JPEG": ("TIFF", {"compression": "jpeg"}),
}
TRIES = 10  # of each kind of damage, for each file


def cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(1, len(data)))]


def byte(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data)))
    return data[:at] + bytes([data[at] ^ int(rng.integers(1, 256))]) + data[at + 1 :]


def block(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data) - 64))
    return data[:at] + bytes(64) + data[at + 64 :]


DAMAGES: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {f.__name__: f for f in (cut, byte, block)}


def photograph(rng: np.random.Generator) -> Image.Image:
    smooth = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (160, 120), interpolation=cv2.INTER_CUBIC)
    return Image.fromarray(np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20, help="of each format")
    args = parser.parse_args()
    print(f"| format | good | {' | '.join(DAMAGES)} |\n| --- | ---: |{' ---: |' * len(DAMAGES)}")
    for name, (kind, options) in FILES.items():
        rng = np.random.default_rng(0)
        counts = {damage: np.zeros(2, int) for damage in DAMAGES}
        refused = 0
        for _ in range(args.images):
            stored = io.BytesIO()
            photograph(rng).save(stored, kind, **options)
            data = stored.getvalue()
            try:
                whole = decode(data)
            except ImageRefused:
                refused += 1
                continue
            for damage, harm in DAMAGES.items():
                for _ in range(TRIES):
                    counts[damage] += outcome(harm(data, rng), whole)
        shares = (f"{found:.0%} / {missed:.0%}" for found, missed in (c / args.images / TRIES for c in counts.values()))
        print(f"| {name} | {refused} | {' | '.join(shares)} |", flush=True)


def outcome(data: bytes, whole: np.ndarray) -> tuple[bool, bool]:
    """Whether the file is refused, and whether it is accepted with other pixels."""
    try:
        pixels = decode(data)
    except ImageRefused:
        return True, False
    return False, not np.array_equal(pixels, whole)


if __name__ == "__main__":
    main()
