"""All cases, by kind, and what is promised of each kind."""

from collections.abc import Iterator, Sequence

from tests.hostile import artifacts, files, params, sources
from tests.hostile.case import Case

REFUSED = "refused, by name and with what to do"
PROMISED = {
    "params": f"`pipeline check`: {REFUSED}",
    "key": f"`pipeline check`: {REFUSED}",
    "value": f"`pipeline check`: {REFUSED}, or a value that a stage can load; never NaN or infinity",
    "file system": "`pipeline scan`: refused by path before DVC hashes; links to files and odd names work",
    "tar": f"{REFUSED}, or a row or a reason for each member",
    "table": f"{REFUSED}, or a row or a reason for each record; memory is bounded",
    "folder": "a row or a reason for each file; linked folders are refused",
    "image": "pixels, or a reason for the quarantine; no other program is started",
    "torchvision": "known sets alone, each image through winnow's decoder",
    "manifest": REFUSED,
    "record": REFUSED,
    "checkpoint": f"{REFUSED}; no code in it is run",
    "model": REFUSED,
    "overrides": f"{REFUSED}, or each line as it was meant",
}


def cases(seed: int) -> Iterator[Case]:
    """Every case; `seed` draws those that are changed at random."""
    for room in (params, files, sources, artifacts):
        yield from room.all_of(seed)


LONG = ("table: 500 rows", "image: 20,000 scans", "model: arch", "torchvision: name")
"""Cases that take more than a tenth of a second."""
ALWAYS = frozenset(
    {
        "params: Latin-1",
        "params: a key twice",
        "params: 60 doublings of an alias",
        "tar: a negative pax size",
        "tar: a long name of 8 GB",
        "tar: a name of a million digits",
        "tar: 5,000 long names in a row",
        "tar: names that begin with /",
        "table: Hugging Face metadata: nested 100,000 deep",
        "table: metadata that repeat a name",
        "table: params that repeat a name",
        "table: labels that are not UTF-8",
        "table: 8 rows of 64 MB in 4 kB",
        "table: a pipe",
        "folder: a link to a folder",
        "image: 20,000 scans",
        "image: a strip of 60,000 x 1",
        "torchvision: name: ImageFolder",
        "torchvision: an EPS in a set of files",
        "manifest: images in a pipe",
        "manifest: a size of 2^62",
        "record: a record of b'{'",
        "record: checksums of b''",
        "record: a broken evaluation.json",
        "checkpoint: safetensors: a header of 2^63",
        "model: options: {'width': -1}",
        "model: classes: [1, 2]",
        "overrides: a pipe",
    }
)
"""Cases that ended in a traceback, a hang, foreign code or a wrong result once."""


def short(every: Sequence[Case]) -> list[Case]:
    """Some of each kind, the same each time, that take a few seconds in all."""
    names = {f"{case.kind}: {case.name}": case for case in every}
    quick = [name for name in names if not name.startswith(LONG)]
    chosen = ALWAYS.union(*([name for name in quick if names[name].kind == kind][::6] for kind in PROMISED))
    return [names[name] for name in sorted(chosen)]
