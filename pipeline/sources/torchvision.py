"""The data sets of torchvision."""

import difflib
import inspect
import io
import operator
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from pipeline.harness import scan
from pipeline.sources.source import File, Record, Request, Role, SourceError, distinct, record_of, some, unpacked
from pipeline.store.decode import ImageRefused, decode
from pipeline.store.manifest import MAX_BYTES
from pipeline.store.params import Section

FOLDERS = "takes the whole of prepare.root for images. Say `kind: folder`, with a path."
UNPICKLES = "runs code from a file that lies beside its data. Put its images into folders: `kind: folder`."
NO_DATA_SETS = {
    "ImageFolder": FOLDERS,
    "DatasetFolder": FOLDERS,
    "VisionDataset": "is no data set. Name one of those in torchvision.datasets.__all__.",
    "FakeData": "is noise. Name a data set.",
    "LSUN": UNPICKLES,
    "LSUNClass": UNPICKLES,
}


class Torchvision(Section):
    """A classification set of torchvision, downloaded into `prepare.root` if it is not there, kept as PNG."""

    kind: Literal["torchvision"]
    """A data set of torchvision."""
    name: str
    """Its name in torchvision.datasets: `CIFAR10`."""
    split: str = "train"
    """Its part: `train`, `test`, or what else it has."""

    def files(self, request: Request) -> Iterator[File]:
        """Every image, unpacked. Raises SourceError for a set that torchvision lacks or cannot fetch."""
        for path in _links_to_folders(request.root):
            request.expect_watched(path)
        yield from unpacked(_records(self, request.role, request), request)


def _records(source: Torchvision, role: Role, request: Request) -> Iterator[Record]:
    dataset = _dataset(source, role, request.root)
    where = f"prepare.{role}: torchvision's {source.name}"
    names = distinct([_name(label) for label in getattr(dataset, "classes", ())], where) if role != "pool" else ()
    for row in range(len(dataset)):
        image_id = f"{source.name}/{source.split}/{row:08}"
        try:
            with _one_decoder():
                given = dataset[row]
        except (MemoryError, SourceError):
            raise
        except Exception as error:  # whatever a damaged file makes a data set raise
            yield Record(image_id, b"", None, str(error) if isinstance(error, ImageRefused) else f"damaged: {_told(error)}")
            continue
        if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Image.Image)):
            raise SourceError(f"{where} does not give images with a class each. Put its images into folders: `kind: folder`.")
        image, target = given
        try:
            label = operator.index(target) if role != "pool" else None
        except TypeError:
            raise SourceError(
                f"{where} gives {type(target).__name__} targets, but an image needs one class number. It can only serve as a "
                "pool."
            ) from None
        yield record_of(image_id, _png(image), label, names or None, role)


def _dataset(source: Torchvision, role: Role, root: Path) -> Any:
    import torchvision.datasets as known  # seconds, and only here

    if why := NO_DATA_SETS.get(source.name):
        raise SourceError(f"prepare.{role}: torchvision's {source.name} {why}")
    where = f"prepare.{role}: torchvision's {source.name}"
    options = inspect.signature(getattr(known, source.name)).parameters if source.name in known.__all__ else {}
    if "root" not in options:
        near = difflib.get_close_matches(source.name, known.__all__, n=1)
        hint = f" (did you mean `{near[0]}`?)" if near else ""
        raise SourceError(
            f"prepare.{role}: torchvision has no data set `{source.name}`{hint}. Its list: torchvision.datasets.__all__."
        )
    asked = [n for n, o in options.items() if o.default is o.empty and o.kind not in (o.VAR_KEYWORD, o.VAR_POSITIONAL)]
    if unknown := sorted(set(asked) - {"root", "split", "image_set"}):
        raise SourceError(
            f"{where} wants {some(unknown)} too, which winnow does not know. Put its images into folders: `kind: folder`."
        )
    chosen: dict[str, Any] = {}
    if "split" in options or "image_set" in options:
        chosen["split" if "split" in options else "image_set"] = source.split
    elif "train" in options:
        if source.split not in ("train", "test"):
            raise SourceError(f"{where} has the splits train and test, not `{source.split}`.")
        chosen["train"] = source.split == "train"
    if "download" in options or any(o.kind is inspect.Parameter.VAR_KEYWORD for o in options.values()):
        chosen["download"] = True
    try:
        with _impatient(), _one_decoder():
            return getattr(known, source.name)(str(root), **chosen)
    except ValueError as error:  # a split that it does not have
        raise SourceError(f"{where}: {error}. Correct `split`, or remove damaged files of the set from {root}.") from None
    except (OSError, RuntimeError, ImportError) as error:
        call = ", ".join(["'FOLDER'", *(f"{k}={v!r}" for k, v in chosen.items())])
        raise SourceError(
            f"{where} is not in {root} (prepare.root) and could not be downloaded: {error}. On a machine with a network, "
            f'run `python -c "import torchvision.datasets as d; d.{source.name}({call})"` and copy what FOLDER then holds '
            f"to {root}."
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # what stands in a damaged file
        raise SourceError(
            f"{where} in {root} cannot be read ({_told(error)}). Remove its files there, and fetch them anew."
        ) from None


def _links_to_folders(root: Path) -> Iterator[Path]:
    yield from (Path(path) for what, path in scan.unwatched(root) if what == scan.LINKED)


def _name(label: Any) -> str:
    """ImageNet's classes are tuples of synonyms."""
    return ", ".join(map(str, label)) if isinstance(label, tuple | list) else str(label)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


@contextmanager
def _one_decoder() -> Iterator[None]:
    """Image files are decoded as everywhere: Pillow alone would start Ghostscript for some, and has no limit of pixels here."""
    opened = Image.open
    Image.open = _decoded  # type: ignore[assignment]
    try:
        yield
    finally:
        Image.open = opened


def _decoded(file: Any, *_: Any, **__: Any) -> Image.Image:
    """Stands for Image.open. Raises ImageRefused."""
    if hasattr(file, "read"):
        data = file.read(MAX_BYTES + 1)
    else:
        if not Path(file).is_file():
            raise ImageRefused("not a regular file")
        with Path(file).open("rb") as f:
            data = f.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageRefused(f"oversized: more than {MAX_BYTES} bytes")
    return Image.fromarray(decode(data))


@contextmanager
def _impatient() -> Iterator[None]:
    """Downloads without an answer fail after a minute; torchvision would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _png(image: Image.Image) -> bytes:
    stored = io.BytesIO()
    (image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else image.convert("RGB")).save(stored, "PNG", compress_level=1)
    return stored.getvalue()
