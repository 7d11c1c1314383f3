"""Writing uncompressed tars of images."""

import io
import tarfile
from pathlib import Path

TAR_BYTES = 512 << 20


class Tars:
    """Uncompressed tars `images-00000.tar`, ... in an artifact that is being written."""

    def __init__(self, folder: Path, final: Path) -> None:
        self.folder, self.final = folder, final
        self.tar: tarfile.TarFile | None = None
        self.path = ""
        self.moved: dict[str, str] = {}

    def __enter__(self) -> "Tars":
        return self

    def __exit__(self, *_: object) -> None:
        if self.tar is not None:
            self.tar.close()

    def add(self, name: str, data: bytes) -> tuple[str, int]:
        """The path and offset at which manifests will find `data`."""
        if self.tar is None or self.tar.offset >= TAR_BYTES:
            self.__exit__()
            name_of_tar = f"images-{len(self.moved):05}.tar"
            self.tar = tarfile.open(self.folder / name_of_tar, "w")  # noqa: SIM115
            self.path = (self.final / name_of_tar).as_posix()
            self.moved[self.path] = str(self.folder / name_of_tar)
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self.tar.addfile(member, io.BytesIO(data))
        self.tar.members.clear()  # type: ignore[attr-defined]
        blocks = -(-len(data) // tarfile.BLOCKSIZE)
        return self.path, self.tar.offset - blocks * tarfile.BLOCKSIZE
