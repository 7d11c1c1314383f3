"""params.yaml as typed sections: a mistyped key or value stops the run before any work is done."""

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import UserError

S = TypeVar("S", bound=BaseModel)
STAGES = tuple(sorted(p.stem for p in (Path(__file__).parents[1] / "stages").glob("[a-z]*.py")))


class Section(BaseModel):
    """A section of params.yaml: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ParamsError(UserError):
    """params.yaml cannot be used as it stands."""


def load(file: Path, section: type[S], keys: tuple[str, ...]) -> S:
    """The section at `keys` (such as ("distil", "ssld")) of a params file, validated.

    Raises ParamsError that names the file, the dotted key, and what is wrong there.
    """
    tree = read(file)
    where: Any = tree
    for depth, key in enumerate(keys):
        if not isinstance(where, dict) or key not in where:
            raise ParamsError(f"{file}: there is no `{'.'.join(keys[: depth + 1])}`{_similar(key, where)}. Add it.")
        where = where[key]
    return validate(file, section, keys, where)


def validate(file: Path, section: type[S], keys: tuple[str, ...], value: Any) -> S:
    """`value` as a `section`; raises ParamsError listing every key that is wrong."""
    try:
        return section.model_validate({} if value is None else value)
    except ValidationError as error:
        lines = [_explain(section, ".".join(keys), e) for e in error.errors()]
        raise ParamsError(f"{file}: " + "\n".join(lines)) from None


def read(file: Path) -> dict[str, Any]:
    """The whole file; raises ParamsError when it is missing, not YAML, or has a top-level key that nothing reads."""
    try:
        tree = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise ParamsError(f"{file} is not there. Copy one of recipes/*.yaml to it.") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ParamsError(f"{file} must be a mapping with the sections {', '.join(STAGES)}.")
    known = [*STAGES, "seed", "machine"]
    for key in tree:
        if key not in known:
            raise ParamsError(f"{file}: nothing reads the key `{key}`{_similar(str(key), known)}. Known: {', '.join(known)}.")
    return tree


def _explain(section: type[BaseModel], prefix: str, error: Any) -> str:
    key = ".".join([prefix, *(str(part) for part in error["loc"])])
    if error["type"] == "extra_forbidden":
        names = list(section.model_fields) if len(error["loc"]) == 1 else []
        return f"`{key}` is not a known key{_similar(str(error['loc'][-1]), names)}. Remove or correct it."
    if error["type"] == "missing":
        return f"`{key}` is required but missing."
    return f"`{key}` is {error['input']!r}: {error['msg']}."


def _similar(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, [str(k) for k in known] if known else [], n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def load_seed(file: Path) -> int:
    """The top-level `seed`: every random choice of a run derives from it."""
    seed = read(file).get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ParamsError(f"{file}: `seed` is {seed!r}: it must be an integer of at least 0.")
    return seed
