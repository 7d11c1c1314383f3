"""The command `bundle`: a folder of loose files becomes tars, which a manifest and DVC can hold millions of images in."""

import argparse
import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.harness import progress
from pipeline.sources.folder import members
from pipeline.sources.source import Member, SourceError
from pipeline.store import artifact

MEGABYTES = 512
DESCRIPTION = """Write the files of a folder into uncompressed tars, which `prepare` reads in place (`kind: tar`). Names stay, so
the folder of a class is still its class. The same folder makes the same bytes. A command that was killed goes on where it
stopped, and OUT is there only when it is whole, with a checksum of each tar."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `bundle` takes."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder of images, with or without class folders")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="the folder of tars to make")
    parser.add_argument(
        "--megabytes", type=int, default=MEGABYTES, metavar="N", help=f"size at which a tar ends (default: {MEGABYTES})"
    )


def bundle(folder: Path, out: Path, megabytes: int = MEGABYTES) -> str:
    """Write the tars; returns a line that says what was done. The folder itself stays as it is.

    Raises SourceError for a folder that holds no file, and for a file that changes meanwhile; UserError for an `out` that is
    there.
    """
    if megabytes < 1:
        raise UserError(f"--megabytes is {megabytes}: it must be at least 1.")
    if out.exists():
        raise UserError(f"--out {out} is there already. Name another folder, or remove it.")
    if out.absolute().resolve().is_relative_to(folder.absolute().resolve()):
        raise UserError(f"--out {out} lies in {folder}, which it is made from. Name a folder outside.")
    work = out.parent / f".{out.name}.parts"
    skipped, done, size, parts = Counter[str](), 0, 0, list[Path]()
    total = sum(1 for member in members(folder) if not _reason(member))
    if not total:
        raise SourceError(f"{folder} holds no file to put into a tar.")
    with progress.bar(total, "files", f"bundle: {folder}") as shown:
        for number, part in enumerate(_parts(folder, megabytes * 1_000_000, skipped)):
            parts.append(_finished(folder, part, work, f"images-{number:05}.tar"))
            files = [member for member in part if not member.name.endswith("/")]
            done, size = done + len(files), size + sum(member.size for member in files)
            shown.update(len(files))
    with artifact.writing(out) as tmp:
        for made in parts:
            tar = next(made.glob("*.tar"))
            artifact.link(tar, tmp / tar.name)
    shutil.rmtree(work)
    told = ", ".join(f"{n:,} x {reason}" for reason, n in skipped.most_common())
    left_out = f" Left out: {told}." if told else ""
    return f"bundle: {done:,} files of {size / 1e9:,.3g} GB in {len(parts):,} tars in {out}.{left_out}"


def _reason(member: Member) -> str | None:
    """Why something of a folder does not go into a tar; a class folder does, so that one without images is still known."""
    if member.reason is not None:
        return member.reason
    if any(part.startswith(".") for part in member.name.split("/")):
        return "hidden file"
    return "folder" if member.name.endswith("/") else None


def _parts(folder: Path, most: int, skipped: Counter[str]) -> Iterator[list[Member]]:
    """What goes into each tar, in the order of the names of each folder; reasons of what is left out are counted."""
    part, size = list[Member](), 0
    for member in members(folder):
        reason = _reason(member)
        if reason is not None and reason != "folder":
            skipped.update([] if member.name.endswith("/") else [reason])
            continue
        part.append(member)
        size += member.size
        if size >= most:
            yield part
            part, size = [], 0
    if part:
        yield part


def _finished(folder: Path, part: Sequence[Member], work: Path, name: str) -> Path:
    """The artifact with the tar of a part: one that an earlier run made of the same files, or a new one."""
    stats = [(folder / member.name).stat() for member in part]
    facts = [
        [member.name.encode(errors="surrogateescape").hex(), stat.st_size, stat.st_mtime_ns]
        for member, stat in zip(part, stats, strict=True)
    ]
    made = work / f"{name}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"
    if made.exists():
        return artifact.verify(made)
    with artifact.writing(made) as tmp, tarfile.open(tmp / name, "w") as tar:
        for member in part:
            info = tarfile.TarInfo(member.name.removesuffix("/"))  # no time, no owner: equal folders make equal bytes
            if member.name.endswith("/"):
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                data = _read(folder / member.name, member.size)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            tar.members.clear()  # type: ignore[attr-defined]  # or it would keep an object of every member
    return made


def _read(file: Path, size: int) -> bytes:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise SourceError(f"{file} cannot be read ({error.strerror}). Mend or remove it, and repeat the command.") from error
    if len(data) != size:
        raise SourceError(f"{file} has changed since it was listed ({len(data)} of {size} bytes). Repeat the command.")
    return data
