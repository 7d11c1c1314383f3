"""Files in object stores and on web servers, read in ranges: `s3://`, `gs://`, `https://`, `http://`, by fsspec.

What was dropped or came short is asked for again, after growing pauses. A range has the length that was asked for; what stands
in it is checked by who knows a checksum. Credentials come from the environment, as fsspec's packages read them: an address holds
none.

fsspec is imported where an address is read, and nowhere else. Its loop belongs to one process, so each process has its own file
systems and threads, also one that was forked.
"""

import errno
import functools
import io
import itertools
import os
import random
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from pipeline.errors import Unavailable, UserError

PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "https": ("aiohttp", "web"), "http": ("aiohttp", "web")}
"""What reads each kind of address: a package, and the extra of winnow that installs it."""
ATTEMPTS = 12
PAUSE, LONGEST = 0.1, 10.0  # seconds: the first pause, which doubles, and the longest; less than a minute in all
DOUBTFUL = 3  # short answers after which the file is asked for its size
CONNECT_SECONDS, READ_SECONDS = 10, 30  # without an answer

CONNECTIONS = 16  # of a process
BLOCK = 4 << 20  # bytes of a file that is read from end to end are asked for at a time
AHEAD = 4  # blocks before they are needed
GAP = 64 << 10  # bytes between two images that are read with them: less than another request takes
MERGED = 8 << 20  # bytes of neighbouring images that one request asks for
WAITING = 32 << 20  # bytes that one reader asks for before they are needed

OF_NETWORKS = ("aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google", "requests", "urllib3", "s3fs")
"""Packages whose errors are about a network or a server."""
NO_LOGIN = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound", "RefreshError")
PASSING = (408, 425, 429)
"""Among the 4xx answers of HTTP those that a later request may not get."""

T = TypeVar("T")
_LOGIN = re.compile(r"(?<=://)[^/\s'\"]*@")
_QUERY = re.compile(r"\?[^\s'\"=]*=[^\s'\"]*")
_CHANCE = random.Random()  # the pauses take nothing from the random numbers of a stage


class RemoteError(UserError):
    """An address cannot be read: it is wrong, nothing is there, a package or the right to read it is missing."""


class Object(NamedTuple):
    """A file at an address. `etag`: what the store says of its content; `modified`: its time, where there is no ETag."""

    url: str
    size: int
    etag: str | None = None
    modified: str | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def as_posix(self) -> str:
        """How a manifest names it."""
        return self.url

    def __str__(self) -> str:
        return self.url

    def open(self) -> "File":
        return File(self.url, self.size)


def is_remote(path: str) -> bool:
    """Whether a path of a manifest is an address."""
    return "://" in path


def masked(text: str) -> str:
    """The text without what logs in: the user and password of addresses, and their queries."""
    return _QUERY.sub("", _LOGIN.sub("", text))


def expect_address(url: str) -> str:
    """`url` without a slash at its end. Raises ValueError for what is no address that can be read, or holds credentials."""
    kind, found, rest = url.partition("://")
    if not found or kind not in PACKAGES:
        raise ValueError(f"must begin with one of {', '.join(f'{kind}://' for kind in PACKAGES)}")
    if "@" in rest.partition("/")[0]:
        raise ValueError("credentials stand in the address, and would be written down with it; leave them to the environment")
    if set("?#") & set(rest):
        raise ValueError("an address has no `?` or `#` here: what signs it would be written down with it")
    rest = rest.rstrip("/")
    if not rest or rest.startswith("/") or not rest.isprintable() or " " in rest or {"", ".", ".."} & set(rest.split("/")):
        raise ValueError("must be a whole address, of a bucket or a server, with or without a folder in it")
    return f"{kind}://{rest}"


# Asking ---------------------------------------------------------------------------------------------------------------


def fetch(url: str, start: int, end: int, given_up: threading.Event | None = None) -> bytes:
    """Bytes `start` to `end` - 1 of a file: so many, or an error. `given_up`: set where nobody waits for them any more.

    Raises RemoteError for what will not be there the next time either, Unavailable if no answer comes.
    """
    if start >= end:
        return b""
    fs, short = _filesystem(url), itertools.count(1)

    def ask() -> bytes:
        data: bytes = fs.cat_file(url, start=start, end=end)
        if len(data) > end - start:
            raise RemoteError(f"{url}: {_WHOLE}")
        if len(data) < end - start:
            if next(short) >= DOUBTFUL and (size := look(url).size) < end:
                raise RemoteError(
                    f"{url} ends at byte {size:,}, but {end:,} are expected: it was cut short or replaced. Put it back, or run "
                    "`dvc repro`, which looks at it anew."
                )
            raise OSError(f"{len(data):,} of {end - start:,} bytes came")
        return data

    return patiently(url, ask, given_up)


_WHOLE = (
    "the server answers a range with the whole file, so images cannot be read in place. Use one that knows ranges "
    "(`Accept-Ranges: bytes`), such as nginx, Apache or an object store, or download the files."
)


def look(url: str) -> Object:
    """What is known of one file now. Raises RemoteError, also for a web server that does not know ranges; Unavailable."""
    fs = _filesystem(url)
    if url.startswith("http"):
        from fsspec.asyn import sync

        return patiently(url, lambda: sync(fs.loop, _look, fs, url))
    info = patiently(url, lambda: fs.info(url))
    if info.get("type") != "file":
        raise RemoteError(f"{url} is not a file.")
    return _object(url, info)


async def _look(fs: Any, url: str) -> Object:
    """One byte is asked for: with it come the size of the file, its ETag and time, and whether the server knows ranges."""
    session = await fs.set_session()
    options = {**fs.kwargs, "headers": {**fs.kwargs.get("headers", {}), "Range": "bytes=0-0"}}
    async with session.get(fs.encode_url(url), **options) as answer:
        if answer.status == 416:
            raise RemoteError(f"{url} is empty.")
        answer.raise_for_status()
        size = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if answer.status != 206 or not size.isdecimal():
            raise RemoteError(f"{url}: {_WHOLE}")
        return _object(url, {**answer.headers, "size": int(size)})


def listing(url: str) -> list[Object]:
    """Every file below an address of an object store, by name. Raises RemoteError, Unavailable."""
    fs = _filesystem(url)
    root = fs._strip_protocol(url).rstrip("/")
    found = patiently(url, lambda: fs.find(root, detail=True))
    inside = {name.removeprefix(f"{root}/"): info for name, info in found.items() if name.startswith(f"{root}/")}
    return [
        _object(f"{url}/{name}", info)
        for name, info in sorted(inside.items())
        if name and not name.endswith("/") and info.get("type") == "file"  # a folder may be an empty file with a slash
    ]


def _object(url: str, info: dict[str, Any]) -> Object:
    facts = {name.lower().replace("-", ""): value for name, value in info.items()}
    etag = facts.get("etag") or facts.get("md5hash")
    time_ = next((facts[key] for key in ("lastmodified", "updated", "mtime") if facts.get(key)), None)
    return Object(url, int(facts["size"]), str(etag) if etag else None, str(time_) if time_ and not etag else None)


def patiently(url: str, ask: Callable[[], T], given_up: threading.Event | None = None) -> T:
    """What `ask` answers, which is asked again after what may pass, until `given_up`. Raises RemoteError or Unavailable, which
    name `url`."""
    ended = given_up or threading.Event()
    for attempt in itertools.count(1):
        try:
            return ask()
        except Exception as error:
            if final := _final(url, error):
                raise final from None
            if attempt == ATTEMPTS or ended.wait(min(PAUSE * 2 ** (attempt - 1), LONGEST) * _CHANCE.uniform(0.5, 1)):
                raise Unavailable(
                    f"{url} did not answer as it should, {attempt} times in a row (the last time: {_said(error)}). Look at the "
                    "network and the server, and repeat the command."
                ) from None
    raise AssertionError  # for mypy: the count has no end


def _final(url: str, error: Exception) -> Exception | None:
    """The error for who reads it, if a repetition brings nothing; None if it may."""
    status = getattr(error, "status", None)
    if isinstance(error, RemoteError):
        return error
    if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in NO_LOGIN:
        return RemoteError(
            f"{url} may not be read ({_said(error)}). Credentials come from the environment, as the package "
            f"{PACKAGES[url.partition('://')[0]][0]} reads them: docs/data.md."
        )
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return RemoteError(f"{url} is not there. Correct the address, or put the file back.")
    is_refused = isinstance(status, int) and 400 <= status < 500 and status not in PASSING
    if is_refused or getattr(error, "errno", None) == errno.EINVAL:  # which s3fs makes of a range that is not in the file
        return RemoteError(f"{url} cannot be read: the server answers {_said(error)}.")
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in OF_NETWORKS:  # TimeoutError is an OSError
        return None
    return error


def _said(error: Exception) -> str:
    return masked(f"{type(error).__name__}: {error}".strip(": ").splitlines()[0][:300])


# What a process holds -------------------------------------------------------------------------------------------------


def _filesystem(url: str) -> Any:
    return _filesystem_of(os.getpid(), url.partition("://")[0])


@functools.lru_cache(maxsize=2 * len(PACKAGES))
def _filesystem_of(process: int, kind: str) -> Any:
    """fsspec's file system for a kind of address, of this process. Raises RemoteError where its package is not installed."""
    package, extra = PACKAGES[kind]
    try:
        import fsspec
        from fsspec.config import conf

        if kind.startswith("http"):
            import aiohttp
        made = fsspec.get_filesystem_class(kind)
    except ImportError:
        raise RemoteError(
            f"{kind}:// is read by the package {package}, which is not installed. Say `pip install {package}`, or "
            f"`pip install -e '.[{extra}]'` in the clone."
        ) from None
    given = conf.get(kind, {})
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if kind == "s3":  # who asks again is `patiently`
        ours = {"retries": {"total_max_attempts": 1}, "max_pool_connections": CONNECTIONS}
        timeouts = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
        options["config_kwargs"] = {**timeouts, **ours, **given.get("config_kwargs", {})}
    if kind.startswith("http"):
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True, **given.get("client_kwargs", {})}
        options["headers"] = {"Accept-Encoding": "identity", **given.get("headers", {})}  # of a packed answer no range is known
    fs = made(**options)
    if kind == "s3":
        fs.retries = 1
    return fs


def _threads() -> ThreadPoolExecutor:
    return _threads_of(os.getpid())


@functools.lru_cache(maxsize=2)
def _threads_of(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(CONNECTIONS, "remote")


# Reading --------------------------------------------------------------------------------------------------------------


class _Range(NamedTuple):
    url: str
    start: int
    end: int
    parts: list[tuple[int, int]]  # start and end of each image, in the file


def read(places: Iterable[tuple[str, int, int]]) -> Generator[bytes, None, None]:
    """The bytes at each (address, offset, size), in order; what lies together is asked for together, and ahead.

    Raises RemoteError and Unavailable, as `fetch` does.
    """
    waiting, held, given_up = deque[tuple[_Range, Future[bytes]]](), 0, threading.Event()
    try:
        for asked in _merged(places):
            waiting.append((asked, _threads().submit(fetch, *asked[:3], given_up)))
            held += asked.end - asked.start
            while len(waiting) > 1 and (held > WAITING or len(waiting) > 2 * CONNECTIONS):
                held -= waiting[0][0].end - waiting[0][0].start
                yield from _cut(*waiting.popleft())
        while waiting:
            yield from _cut(*waiting.popleft())
    finally:
        given_up.set()  # or a process that ends would wait for the last attempts
        for _, answer in waiting:
            answer.cancel()


def _merged(places: Iterable[tuple[str, int, int]]) -> Iterator[_Range]:
    last: _Range | None = None
    for url, offset, size in places:
        end = offset + size
        if last and url == last.url and 0 <= offset - last.end <= GAP and end - last.start <= MERGED:
            last.parts.append((offset, end))
            last = last._replace(end=end)
            continue
        if last:
            yield last
        last = _Range(url, offset, end, [(offset, end)])
    if last:
        yield last


def _cut(asked: _Range, answer: Future[bytes]) -> Iterator[bytes]:
    data = answer.result()
    for start, end in asked.parts:
        yield data[start - asked.start : end - asked.start]


class File(io.RawIOBase):
    """A file at an address, for who reads much of it in order: blocks are asked for ahead while it goes on.

    Raises RemoteError and Unavailable, as `fetch` does.
    """

    def __init__(self, url: str, size: int) -> None:
        super().__init__()
        self.url, self.size = url, size
        self._at, self._last, self._given_up = 0, -1, threading.Event()
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self.size)[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = self.size if size is None or size < 0 else min(self.size, self._at + size)
        if self._at >= end:
            return b""
        parts, first, last = list[bytes](), self._at // BLOCK, (end - 1) // BLOCK
        for number in range(first, last + 1):
            block = self._block(number, last)
            parts.append(block[max(0, self._at - number * BLOCK) : end - number * BLOCK])
        self._at = end
        return b"".join(parts)

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._given_up.set()
        for answer in self._blocks.values():
            answer.cancel()
        self._blocks.clear()
        super().close()

    def _block(self, number: int, last: int) -> bytes:
        """A block. Those behind it are asked for, too: as far as `last`, or where the one before was the last that was read."""
        goes_on = number in (self._last, self._last + 1) and self._last >= 0
        for wanted in range(number, 1 + max(min(last, number + AHEAD), number + AHEAD if goes_on else number)):
            if wanted not in self._blocks and wanted * BLOCK < self.size:
                span = wanted * BLOCK, min(self.size, (wanted + 1) * BLOCK)
                self._blocks[wanted] = _threads().submit(fetch, self.url, *span, self._given_up)
        self._blocks.move_to_end(number)
        while len(self._blocks) > 2 * (AHEAD + 1):
            self._blocks.popitem(last=False)[1].cancel()
        self._last = number
        return self._blocks[number].result()


def looked(objects: Sequence[Object]) -> Iterator[Object]:
    """What is known now of each of the files, in order. Raises RemoteError and Unavailable, as `look` does."""
    yield from _threads().map(look, [file.url for file in objects])
