"""What the stages take from DVC and no release of it promises: variables it gives them, and how its cache and its config lie.

`flows/adapter/dvc.py` has what the flows use. tests/flows/test_adapter.py tries both on the installed DVC, and names the release
that broke a part. `pipeline` imports nothing of DVC.
"""

import configparser
import json
import os
from pathlib import Path

CONFIGS = ("config", "config.local")


def runs_this() -> bool:
    """Whether DVC started this process, or one that it comes from."""
    return "DVC_ROOT" in os.environ


def project_folder() -> Path:
    """The folder of the project, also for a queued `dvc exp run`, which works in a temporary copy of it; else this one."""
    return Path(os.environ.get("DVC_ROOT", "")).absolute()


def stage() -> tuple[str, str]:
    """The stage and the entry that DVC runs: `distil`, `ssld`. Empty texts where it runs none, or the stage has no entries."""
    name, _, entry = os.environ.get("DVC_STAGE", "").rpartition(":")[2].partition("@")
    return name, entry


def experiment() -> str | None:
    """The name of the experiment, in a `dvc exp run`."""
    return os.environ.get("DVC_EXP_NAME")


def cache_folder() -> Path:
    """DVC's cache, as seen from here; a relative one is relative to the file that names it. Raises configparser.Error."""
    settings = project_folder() / ".dvc"
    config = configparser.ConfigParser(interpolation=None)
    config.read([settings / name for name in CONFIGS])
    return Path(os.path.relpath(settings / config.get("cache", "dir", fallback="cache")))


def in_cache(cache: Path, md5: str) -> Path:
    """Where the cache has the content of a hash; that of a folder ends with `.dir`."""
    return cache / "files" / "md5" / md5[:2] / md5[2:]


def md5_of(file: Path) -> str:
    """The hash that a file of the cache is named for."""
    return file.parent.name + file.name.removesuffix(".dir")


def listed(file: Path) -> dict[str, str]:
    """The hashes of the files of a folder, by path in it. `file`: that of the folder in the cache. Raises ValueError."""
    return {str(one["relpath"]): str(one["md5"]) for one in json.loads(file.read_bytes())}
