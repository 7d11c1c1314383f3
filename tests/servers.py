"""Servers on this machine that hold images for a test: one that speaks S3, a plain one that knows ranges or does not; and a layer
before either that drops and cuts answers."""

import contextlib
import logging
import random
import socket
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from wsgiref.types import WSGIApplication

from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

KEYS = {"AWS_ACCESS_KEY_ID": "winnow", "AWS_SECRET_ACCESS_KEY": "only-for-tests", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "images"


class Faulty:
    """Answers as `app` does, but for the requests that are dropped, and the answers that are cut short: half of these end in the
    middle, the others say the wrong length. `done` counts both; `seen` holds what was asked for."""

    def __init__(self, app: WSGIApplication, drop: float = 0, cut: float = 0, seed: int = 0) -> None:
        self.app, self.drop, self.cut = app, drop, cut
        self.done, self.seen = Counter[str](), list[tuple[str, str, str]]()
        self._chance, self._lock = random.Random(seed), threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            chance, lies = self._chance.random(), self._chance.random() < 0.5
            asked = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", "")
            self.seen.append(asked)
        if chance < self.drop:
            self.done["dropped"] += 1
            return self._hang_up(environ, start)
        given: dict[str, Any] = {}

        def keep(status: str, headers: list[tuple[str, str]], error: Any = None) -> Callable[[bytes], object]:
            given.update(status=status, headers=headers)
            return lambda data: None

        body = b"".join(self.app(environ, keep))
        if asked[0] == "GET" and len(body) > 1 and chance < self.drop + self.cut:
            self.done["cut"] += 1
            half, headers = body[: len(body) // 2], given["headers"]
            if lies:
                start(given["status"], [(k, v if k.lower() != "content-length" else str(len(half))) for k, v in headers])
                return [half]
            start(given["status"], headers)
            return self._broken_off(environ, half)
        start(given["status"], given["headers"])
        return [body]

    def _broken_off(self, environ: dict[str, Any], half: bytes) -> Iterator[bytes]:
        yield half
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)

    def _hang_up(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        start("200 OK", [])
        return []


class Web:
    """A plain server of files; `ranges`: whether it knows them. A file has an ETag made of its bytes, unless `etags` says no;
    `token`: what a request must prove itself with."""

    def __init__(self, files: Mapping[str, bytes], ranges: bool = True, etags: bool = True, token: str = "") -> None:
        self.files, self.ranges, self.etags, self.token, self.status = dict(files), ranges, etags, token, 0

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        data = self.files.get(environ["PATH_INFO"].lstrip("/"))
        status = 401 if self.token not in environ.get("HTTP_AUTHORIZATION", "") else self.status or (404 if data is None else 0)
        if data is None or status:
            start(f"{status} as the test wants it", [("Content-Length", "0")])
            return []
        headers = [("ETag", f'"{hash(data):x}"')] if self.etags else []
        asked = environ.get("HTTP_RANGE", "").removeprefix("bytes=")
        if not asked or not self.ranges:
            start("200 OK", [*headers, ("Content-Length", str(len(data)))])
            return [data]
        first, last = int(asked.split("-")[0]), min(int(asked.split("-")[1]), len(data) - 1)
        if first >= len(data):
            start("416 Range Not Satisfiable", [("Content-Length", "0")])
            return []
        part = data[first : last + 1]
        span = ("Content-Range", f"bytes {first}-{last}/{len(data)}")
        start("206 Partial Content", [*headers, span, ("Content-Length", str(len(part)))])
        return [part]


class _Handler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, as those of an object store

    def log(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving(app: WSGIApplication) -> Iterator[str]:
    """The address at which `app` answers."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server: BaseWSGIServer = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Handler)
    server.daemon_threads = True  # type: ignore[attr-defined]
    server.block_on_close = False  # type: ignore[attr-defined]  # a client keeps its connections
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def s3() -> WSGIApplication:
    """A server that speaks S3, empty; it takes any credentials."""
    from moto.server import DomainDispatcherApplication, create_backend_app

    app: WSGIApplication = DomainDispatcherApplication(create_backend_app)
    return app


def put(address: str, files: Mapping[str, bytes]) -> None:
    """Put files into the bucket of a server that speaks S3."""
    for path, data in {BUCKET: b"", **{f"{BUCKET}/{name}": data for name, data in files.items()}}.items():
        kind = {"Content-Type": "application/x-tar"}
        with urllib.request.urlopen(urllib.request.Request(f"{address}/{path}", data, kind, method="PUT")):
            pass
