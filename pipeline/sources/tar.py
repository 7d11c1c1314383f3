"""Uncompressed tars, read in place."""

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal, Self

from pipeline.sources.source import File, InsideRoot, Member, RemoteEntry, Request, SourceError, with_class_folders
from pipeline.store.params import Section
from pipeline.store.remote import Object

LIES = (tarfile.TarError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError)
"""What tarfile raises for headers that are damaged, or made to deceive."""
ABOUT_THE_NEXT = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
ATTRIBUTES = 1 << 20  # bytes of a member's pax attributes; a path has at most 4096
NUMBER = re.compile(rb"[0-9]{200}")


class Tar(Section):
    """Uncompressed tars, read in place."""

    kind: Literal["tar"]
    """Uncompressed tars."""
    path: InsideRoot
    """A path below `prepare.root`, or a glob pattern. Where labels are wanted, the first folder of a member's name is its
    class."""
    remote: RemoteEntry = None
    """The entry of `remote` that lists them: `path` is then below its address."""

    def files(self, request: Request) -> Iterator[File]:
        """Every member of the tars. Raises SourceError for a tar that is compressed, cut short or damaged."""
        for file in request.stored(self.path):
            yield from with_class_folders(_members(file), file, request, in_tar=True)


def _members(file: Path | Object) -> Iterator[Member]:
    if isinstance(file, Path) and not file.is_file():
        raise SourceError(f"{file} is not a file. For a folder of images, say `kind: folder`.")
    size, end = file.size if isinstance(file, Object) else file.stat().st_size, -1
    with file.open("rb") if isinstance(file, Path) else file.open() as stored_at:
        _refuse_compressed(file, stored_at.read(6))
        stored_at.seek(0)
        try:
            with tarfile.open(fileobj=stored_at, mode="r:", tarinfo=_Header) as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # or it would keep an object of every member
                    stored = member.size if member.isreg() and not member.issparse() else 0
                    if tar.offset <= end or member.size < 0 or member.offset_data + stored > size:
                        raise tarfile.ReadError(f"a member at byte {member.offset} has an impossible size, {member.size}")
                    end = tar.offset
                    yield _member(member)
                end = tar.offset
        except LIES as error:
            raise SourceError(
                f"{file} cannot be read as a tar ({error}). It may be cut short or damaged: copy or make it anew."
            ) from None
        _expect_the_end(file, stored_at, end)


class _Header(tarfile.TarInfo):
    """What stands before a member; raises HeaderError where its name or its attributes are no such thing.

    Python before 3.11.10 looks for a number in them in a time that grows with the square of the number's digits.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        file = tarfile_.fileobj
        assert file is not None
        before = file.tell()
        head = file.read(tarfile.BLOCKSIZE)
        if head[156:157] in ABOUT_THE_NEXT:
            size = cls.frombuf(head, tarfile_.encoding, tarfile_.errors).size
            if size > ATTRIBUTES or NUMBER.search(file.read(max(0, size))):
                raise tarfile.ReadError(f"the attributes at byte {before} are no attributes of a file")
        file.seek(before)
        return super().fromtarfile(tarfile_)


def _member(member: tarfile.TarInfo) -> Member:
    name = member.name.removeprefix("./")
    if member.isdir():
        return Member(name + "/", 0)
    if member.islnk() or member.issym():
        return Member(name, 0, member.offset_data, "link inside a tar")
    if not member.isreg() or member.issparse():
        return Member(name, member.size, member.offset_data, "not a regular file")
    return Member(name, member.size, member.offset_data)


def _refuse_compressed(file: Path | Object, head: bytes) -> None:
    for magic, name, unpack in (
        (b"\x1f\x8b", "gzip", "gunzip -k"),
        (b"BZh", "bzip2", "bunzip2 -k"),
        (b"\xfd7zXZ", "xz", "unxz -k"),
        (b"\x28\xb5\x2f\xfd", "zstd", "zstd -d"),
        (b"PK\x03\x04", "zip", "unzip, then tar -cf"),
    ):
        if head.startswith(magic):
            raise SourceError(
                f"{file} is compressed ({name}), but images are read in place from uncompressed tars. Unpack it once: "
                f"`{unpack} {file}`."
            )


def _expect_the_end(file: Path | Object, f: IO[bytes] | io.RawIOBase, end: int) -> None:
    """A tar ends with zeros; tarfile also stops, without a word, where it is cut, damaged, or followed by another tar."""
    f.seek(end)
    mark = f.read(tarfile.BLOCKSIZE) or b""
    if len(mark) < tarfile.BLOCKSIZE:
        raise SourceError(f"{file} is cut short: the end mark of a tar is missing. Copy or make it anew.")
    if mark.strip(b"\0"):
        raise SourceError(f"{file} is damaged at byte {end}: no member of a tar begins there. Copy or make it anew.")
    while rest := f.read(1 << 20):
        if rest.strip(b"\0"):
            raise SourceError(
                f"{file} goes on behind its end mark, as tars joined by `cat` do, and what follows would be lost. "
                "Keep them apart, or join them with `tar -A`."
            )
