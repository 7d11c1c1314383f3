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

from pipeline.sources.source import File, Record, Request, Role, SourceError, record_of, unpacked
from pipeline.store.params import Section


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
        yield from unpacked(_records(self, request.role, request.root), request)


def _records(source: Torchvision, role: Role, root: Path) -> Iterator[Record]:
    dataset = _dataset(source, role, root)
    names = tuple(getattr(dataset, "classes", ()))
    for row in range(len(dataset)):
        image_id = f"{source.name}/{source.split}/{row:08}"
        try:
            image, target = dataset[row]
        except (OSError, SyntaxError) as error:
            yield Record(image_id, b"", None, f"damaged: {error}")
            continue
        try:
            label = operator.index(target) if role != "pool" else None
        except TypeError:
            raise SourceError(
                f"prepare.{role}: torchvision's {source.name} gives {type(target).__name__} targets, but an image needs one "
                "class number. It can only serve as a pool."
            ) from None
        yield record_of(image_id, _png(image), label, names or None, role)


def _dataset(source: Torchvision, role: Role, root: Path) -> Any:
    import torchvision.datasets as known  # seconds, and only here

    where = f"prepare.{role}: torchvision's {source.name}"
    options = inspect.signature(getattr(known, source.name)).parameters if source.name in known.__all__ else {}
    if "root" not in options:
        near = difflib.get_close_matches(source.name, known.__all__, n=1)
        hint = f" (did you mean `{near[0]}`?)" if near else ""
        raise SourceError(
            f"prepare.{role}: torchvision has no data set `{source.name}`{hint}. Its list: torchvision.datasets.__all__."
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
        with _impatient():
            return getattr(known, source.name)(str(root), **chosen)
    except ValueError as error:  # a split that it does not have
        raise SourceError(f"{where}: {error}") from None
    except (OSError, RuntimeError, ImportError) as error:
        call = ", ".join(["'FOLDER'", *(f"{k}={v!r}" for k, v in chosen.items())])
        raise SourceError(
            f"{where} is not in {root} (prepare.root) and could not be downloaded: {error}. On a machine with a network, "
            f'run `python -c "import torchvision.datasets as d; d.{source.name}({call})"` and copy what FOLDER then holds '
            f"to {root}."
        ) from None


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
