"""Where DVC's cache has a file of an artifact. A damaged one comes back from there, whatever is done to the folder alone."""

import configparser
import hashlib
import os
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.harness import dvc
from pipeline.harness.lockfile import LOCK
from pipeline.store.artifact import ArtifactError


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
        cache = dvc.cache_folder()
        out = next(out for out in _outs() if out["path"] == _relative(folder))
        listed = dvc.in_cache(cache, str(out["md5"]))
        files = dvc.listed(listed) if listed.is_file() else {}
        return [listed, *([dvc.in_cache(cache, files[name])] if name in files else [])]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, StopIteration, yaml.YAMLError, configparser.Error):
        return []  # whatever is wrong with DVC's files, it is the artifact that the reader has to hear of


def _outs() -> list[dict[str, Any]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    stages = yaml.load((dvc.project_folder() / LOCK).read_bytes(), Loader=loader)["stages"]
    return [out for stage in stages.values() for out in stage.get("outs") or []]


def _relative(folder: Path) -> str:
    return Path(os.path.relpath(folder, dvc.project_folder())).as_posix()


def _is_whole(copy: Path) -> bool:
    with copy.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest() == dvc.md5_of(copy)
