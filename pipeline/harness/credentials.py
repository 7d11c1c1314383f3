"""What may not be read by others: the user, password or token in the address of an MLflow store.

They stay in the environment (MLFLOW_TRACKING_URI, or better MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD). Files, logs
and links get the address without them, and who opens a store puts them in again.
"""

import os
import re
import sys
import urllib.parse
from typing import Any, TextIO

URI = "MLFLOW_TRACKING_URI"
HIDDEN = "***"
SECRET = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
SHORTEST = 4  # characters of a password that is hidden wherever it stands: of a shorter one every text would be full
_LOGIN = re.compile(r"(?<=://)[^/\s'\"][^\s'\"]*@")  # to the last @: SQLAlchemy takes passwords with / and @
_QUERY = re.compile(r"(?i)([?&][\w.-]*(?:passw|pwd|token|secret|api_?key|access_?key|signature)[\w.-]*=)[^&#\s'\"]+")


def masked(text: str) -> str:
    """The text with `***` for what logs in: in addresses, in their queries, and the passwords of the environment."""
    text = _QUERY.sub(rf"\1{HIDDEN}", _LOGIN.sub(f"{HIDDEN}@", text))
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return text


def _secrets() -> list[str]:
    login = _LOGIN.search(os.environ.get(URI, ""))
    password = login[0][:-1].partition(":")[2] if login else ""
    found = [password, urllib.parse.unquote(password), *(os.environ.get(name, "") for name in SECRET)]
    return [secret for secret in found if len(secret) >= SHORTEST]


def whole(uri: str) -> str:
    """A masked address with what MLFLOW_TRACKING_URI has in its place; any other as it is."""
    known = os.environ.get(URI, "")
    return known if masked(known) == uri else uri


def lacking(uri: str) -> bool:
    """Whether an address was masked, and this process does not know what was there."""
    return HIDDEN in whole(uri)


def link(uri: str) -> str:
    """The address of a server without login and query, for a person to open."""
    return _LOGIN.sub("", uri).partition("?")[0].rstrip("/")


def mask_output() -> None:
    """Mask what this process prints from now on, libraries and tracebacks included."""
    sys.stdout, sys.stderr = _Masking(sys.stdout), _Masking(sys.stderr)


class _Masking:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(masked(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
