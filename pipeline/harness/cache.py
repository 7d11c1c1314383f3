"""Where DVC's cache has a file of an artifact. A damaged one comes back from there, whatever is done to the folder alone."""

import configparser
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.harness.lockfile import LOCK
from pipeline.store.artifact import ArtifactError

CONFIGS = ("config", "config.local")


def advice(error: UserError) -> str:
    """The commands that mend the artifact which an error is about; an empty text where DVC knows nothing of it."""
    if not isinstance(error, ArtifactError) or error.artifact is None or error.file is None:
        return ""
    folder = error.artifact
    copies = [copy for copy in _copies(folder, error.file) if copy.is_file()]
    if not copies:
        return ""
    damaged = [copy for copy in copies if not _is_whole(copy)]
    if damaged:
        return f" DVC's copy is damaged, too. Say: `rm -rf {folder} {' '.join(map(str, damaged))} && dvc repro`."
    return f" DVC's copy is whole. Say: `rm -rf {folder} && dvc checkout {folder}`."


def _copies(folder: Path, name: str) -> list[Path]:
    """The list of a folder's files in the cache, and the file itself; none of what dvc.lock does not name, or cannot tell."""
    try:
        cache = _cache()
        out = next(out for out in _outs() if out["path"] == _relative(folder))
        listed = _place(cache, str(out["md5"]))
        files = {str(file["relpath"]): str(file["md5"]) for file in json.loads(listed.read_bytes())} if listed.is_file() else {}
        return [listed, *([_place(cache, files[name])] if name in files else [])]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, StopIteration, yaml.YAMLError, configparser.Error):
        return []  # whatever is wrong with DVC's files, it is the artifact that the reader has to hear of


def _outs() -> list[dict[str, Any]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    stages = yaml.load((_project() / LOCK).read_bytes(), Loader=loader)["stages"]
    return [out for stage in stages.values() for out in stage.get("outs") or []]


def _project() -> Path:
    return Path(os.environ.get("DVC_ROOT", "")).absolute()


def _relative(folder: Path) -> str:
    return Path(os.path.relpath(folder, _project())).as_posix()


def _cache() -> Path:
    """DVC's cache folder; a relative one is relative to the file that names it."""
    settings = _project() / ".dvc"
    config = configparser.ConfigParser(interpolation=None)
    config.read([settings / name for name in CONFIGS])
    return Path(os.path.relpath(settings / config.get("cache", "dir", fallback="cache")))


def _place(cache: Path, md5: str) -> Path:
    return cache / "files" / "md5" / md5[:2] / md5[2:]


def _is_whole(copy: Path) -> bool:
    with copy.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest() == copy.parent.name + copy.name.removesuffix(".dir")
