"""Write the tars that the recipes on CIFAR-10 and Tiny-ImageNet read, below data/raw.

    python -m benchmarks.data cifar10 --root data/raw                       # torchvision downloads the set, where it is not there
    python -m benchmarks.data tiny-imagenet --from tiny-imagenet-200/train --root data/raw

Images are stored as PNG, so none is compressed a second time. `cifar10-train-00.tar`, `-01.tar` and `cifar10-val-00.tar` hold
`<class>/NNNN.png`, numbered in the order of the set, even and odd numbers apart. `tinyimagenet32-pool-00.tar` and `-01.tar` hold
the first 250 images of each class (by number, dealt in turns) as `<wnid>/images/NAME.png`, each the means of 2 x 2 pixels.
"""

import argparse
import io
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from PIL import Image

from pipeline.errors import UserError
from pipeline.store.artifact import writing_file

PER_CLASS = 250  # of the 500 training images of a class of Tiny-ImageNet
SIZE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cifar10", "tiny-imagenet"])
    parser.add_argument("--root", type=Path, default=Path("data/raw"), help="where the tars go")
    parser.add_argument("--from", dest="source", type=Path, help="where torchvision's files or Tiny-ImageNet's class folders are")
    args = parser.parse_args()
    try:
        if args.what == "cifar10":
            cifar10(args.source or args.root, args.root)
        elif args.source is None:
            parser.error("tiny-imagenet needs --from: the folder `train` of the unpacked set")
        else:
            tiny_imagenet(args.source, args.root)
    except UserError as error:
        sys.exit(f"error: {error}")


def cifar10(source: Path, root: Path) -> None:
    """Write CIFAR-10's three tars. Raises UserError if the set is neither in `source` nor can be downloaded to it."""
    from torchvision.datasets import CIFAR10

    for train, tars in ((True, ("cifar10-train-00.tar", "cifar10-train-01.tar")), (False, ("cifar10-val-00.tar",))):
        try:
            images = CIFAR10(str(source), train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"CIFAR-10 is not in {source} and cannot be downloaded: {error}. Copy torchvision's folder "
                "`cifar-10-batches-py` there, from a machine with a network."
            ) from None
        write(root, tars, _numbered(images))


def _numbered(images: Iterable[tuple[Image.Image, int]]) -> Iterator[tuple[int, str, Image.Image]]:
    """(number within the class, name in the tar, image) of a classification set of torchvision."""
    seen = Counter[str]()
    classes: tuple[str, ...] = tuple(images.classes)  # type: ignore[attr-defined]
    for image, label in images:
        name = classes[label]
        yield seen[name], f"{name}/{seen[name]:04}.png", image
        seen[name] += 1


def tiny_imagenet(source: Path, root: Path) -> None:
    """Write two tars of `source`/<wnid>/images/*.JPEG at half the size. Raises UserError for another layout or size."""
    write(root, ("tinyimagenet32-pool-00.tar", "tinyimagenet32-pool-01.tar"), _halved(source))


def _halved(source: Path) -> Iterator[tuple[int, str, Image.Image]]:
    folders = sorted(source.glob("n*/images"))
    if not folders:
        raise UserError(f"{source} has no folders n*/images: name the folder `train` of Tiny-ImageNet, as it was unpacked.")
    for folder in folders:
        files = sorted(folder.glob("*.JPEG"), key=_in_order)
        if len(files) < PER_CLASS:
            raise UserError(f"{folder} has {len(files)} images (*.JPEG), and {PER_CLASS} are needed: unpack the set again.")
        for number, file in enumerate(files[:PER_CLASS]):
            with Image.open(file) as image:
                if image.size != (2 * SIZE, 2 * SIZE):
                    raise UserError(f"{file} is {image.width} x {image.height} pixels; Tiny-ImageNet's images are of 64 x 64.")
                yield number, f"{folder.parent.name}/images/{file.stem}.png", image.convert("RGB").reduce(2)


def _in_order(file: Path) -> tuple[int, str]:
    """The number at the end of a name first, so that 2 comes before 10."""
    number = re.search(r"(\d+)$", file.stem)
    return int(number[1]) if number else 0, file.name


def write(root: Path, tars: tuple[str, ...], images: Iterable[tuple[int, str, Image.Image]]) -> None:
    """Deal the images to the tars by their number; a tar is there whole or not at all."""
    with ExitStack() as stack:
        files = [stack.enter_context(writing_file(root / name)) for name in tars]
        opened = [stack.enter_context(tarfile.open(file, "w")) for file in files]
        for number, name, image in images:
            stored = io.BytesIO()
            image.save(stored, "PNG")
            member = tarfile.TarInfo(name)
            member.size = stored.tell()
            stored.seek(0)
            opened[number % len(tars)].addfile(member, stored)
    print(*(root / name for name in tars), sep="\n")


if __name__ == "__main__":
    main()
