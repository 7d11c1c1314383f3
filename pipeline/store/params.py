"""params.yaml as typed sections: a mistyped key or value stops the run before any work is done."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import UserError
from pipeline.store.remote import is_remote, masked

S = TypeVar("S", bound=BaseModel)
STAGES = tuple(sorted(p.stem for p in (Path(__file__).parents[1] / "stages").glob("[a-z]*.py")))
SHELVES = {"model": "models", "view": "views", "training": "trainings"}
"""Where an entry's field names what it wants, `model: student` for `models.student`, so that DVC knows who uses what."""
SINGLE = ("prepare", "search", "dedup", "compare")
"""Stages without entries: their section is one mapping of keys."""
NEEDED = {
    "seed": "seed: 0",
    "prepare": "prepare: {root: ..., labelled: [...], val: [...]}",
    "search": "search: {}",
    "dedup": "dedup: {}",
    "evaluate": "evaluate: {<entry>: {role: ..., model: ...}}",
    "compare": "compare: {baseline: <entry of evaluate whose role is baseline>}",
}
"""What DVC wants to find in params.yaml, and how to write it. Every other section that is missing is empty."""
KEY = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}"
"""What the name of an entry may be: DVC makes paths of it, in which it removes what was there."""
PATHS = ("init", "teacher", "images", "scores", "model", "first", "second", "evaluation")
"""The keys of entries that name what lies below data/."""


class Section(BaseModel):
    """A section of params.yaml: frozen, and unknown keys are refused. The text under a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True)
class Names:
    """Marks a string that names an entry: of `section`, or, without one, of any of the stages `of` (`teach/teacher`), which make
    `what`, or else a path below data/ that no stage makes."""

    section: str = ""
    what: str = ""
    of: tuple[str, ...] = ()


MODELS = ("pretrain", "teach", "ensemble", "distil", "self_distil", "export")

# What a stage has made, or a path below data/. dvc.yaml reads it.
MadeModel = Annotated[str, Names(what="models", of=MODELS)]
MadeTeacher = Annotated[str, Names(what="models or cached labels", of=(*MODELS, "label"))]
MadeImages = Annotated[str, Names(what="images", of=("prepare", "dedup", "select", "pack"))]
MadeScores = Annotated[str, Names(what="scores", of=("score",))]
MadeEvaluation = Annotated[str, Names(what="evaluations", of=("evaluate",))]


class ParamsError(UserError):
    """params.yaml cannot be used as it stands."""


def load(file: Path, section: type[S], keys: tuple[str, ...]) -> S:
    """The section at `keys` (such as ("distil", "ssld")) of a params file, validated, with what it names on the shelves.

    Raises ParamsError that names the file, the dotted key, and what is wrong there.
    """
    tree = read(file)
    where: Any = tree
    for depth, key in enumerate(keys):
        if not isinstance(where, dict) or key not in where:
            raise ParamsError(f"{file}: there is no `{'.'.join(keys[: depth + 1])}`{similar(key, where)}. Add it.")
        where = where[key]
    found, wrong = resolve(tree, section, keys, where)
    if found is None:
        raise ParamsError(f"{file}: " + "\n".join(wrong))
    return found


def resolve(tree: Mapping[str, Any], section: type[S], keys: tuple[str, ...], value: Any) -> tuple[S | None, list[str]]:
    """`value`, which stands at `keys` of `tree`, as a `section`; or None, and every complaint about it."""
    value, wrong = {} if value is None else value, list[str]()
    named = on_shelves(section) if isinstance(value, dict) else {}
    for name, inner in named.items():
        found, complaints = _from_shelf(tree, inner, SHELVES[name], f"{'.'.join(keys)}.{name}", value.get(name))
        value = {**value, name: found}
        wrong += complaints
    try:
        whole = section.model_validate(value)
    except ValidationError as error:
        return None, wrong + _explained(
            section, keys, [e for e in error.errors() if e["input"] is not None or e["loc"][0] not in named]
        )
    return (None if wrong else whole), wrong


def _from_shelf(tree: Mapping[str, Any], section: type[S], shelf: str, key: str, name: Any) -> tuple[S | None, list[str]]:
    things = tree.get(shelf) or {}
    if not isinstance(name, str):
        return None, [
            f"`{key}` is {'missing' if name is None else repr(name)}: it must be the name of one of `{shelf}`. "
            f"Write `{shelf}: {{<name>: {{...}}}}` at the top of the file, and here `{key.rpartition('.')[2]}: <name>`."
        ]
    if not isinstance(things, dict) or name not in things:
        return None, [f"`{key}` is {name!r}: there is no `{shelf}.{name}`{similar(name, things)}. Add or correct it."]
    return resolve(tree, section, (shelf, name), things[name])


def on_shelves(section: type[BaseModel]) -> dict[str, type[Section]]:
    """The fields of a section that name something on a shelf, and what it is. (`model` of `evaluate` is a path.)"""
    fields = {name: sections_in(section.model_fields[name].annotation) for name in SHELVES if name in section.model_fields}
    return {name: found[0] for name, found in fields.items() if found}


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections in the type of a field: one, several in a union or in a list of one, or none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def read(file: Path) -> dict[str, Any]:
    """The whole file; raises ParamsError when it is missing, not YAML, has a key that nothing reads, or unsafe names."""
    tree = parsed(file)
    if wrong := [*strangers(tree), *unsafe(tree)]:
        raise ParamsError(f"{file}: " + "\n".join(wrong))
    return tree


def parsed(file: Path) -> dict[str, Any]:
    """The whole file, whatever its keys; raises ParamsError when it is missing, or not a YAML mapping."""
    try:
        if not file.is_file() and file.exists():
            raise ParamsError("this is no file. Copy one of recipes/*.yaml to it.")
        tree = yaml.load(file.read_bytes().decode("utf-8-sig"), Loader=_Loader)
    except ParamsError as error:
        raise ParamsError(f"{file}: {error}") from None
    except FileNotFoundError:
        raise ParamsError(f"{file} is not there. Copy one of recipes/*.yaml to it.") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ParamsError(f"{file}, line {line}: this is not UTF-8. Save the file as UTF-8.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date of month 13
        raise ParamsError(f"{file} is not valid YAML: {str(error) or 'nested too deep'}") from None
    if not isinstance(tree, dict):
        raise ParamsError(f"{file} must be a mapping with the sections {', '.join(STAGES)}.")
    return tree


class _Loader(yaml.SafeLoader):
    """YAML without keys that stand twice in a mapping, of which the second would win, or aliases, which can make billions."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ParamsError(
                f"line {event.start_mark.line + 1}: the alias `*{event.anchor}`. `dvc exp run -S` loses changes of what aliases "
                f"share, without a word. Name what is shared in {', '.join(f'`{shelf}`' for shelf in SHELVES.values())}."
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ParamsError(f"line {key.start_mark.line + 1}: the key `{key.value}` stands there twice. Remove one.")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def strangers(tree: Mapping[str, Any]) -> list[str]:
    """A complaint about each top-level key that nothing reads."""
    known = ["seed", "machine", *SHELVES.values(), *STAGES]
    return [
        f"nothing reads the key `{key}`{similar(str(key), known)}. Known: {', '.join(known)}." for key in tree if key not in known
    ]


def unsafe(tree: Mapping[str, Any]) -> list[str]:
    """A complaint about each name that could lead out of its folder, or that a shell could take for a command.

    Whoever runs a params file that others wrote has to ask this before DVC does: the first thing that DVC does with a stage is to
    remove its old output, whose path holds the name.
    """
    wrong = []
    for section in (*SHELVES.values(), *(stage for stage in STAGES if stage not in SINGLE)):
        entries = tree.get(section)
        for key, entry in entries.items() if isinstance(entries, dict) else ():
            if not isinstance(key, str):
                wrong.append(f"`{section}.{key}`: {key!r} is no text for YAML. Write the name in quotes.")
            elif not re.fullmatch(KEY, key):
                wrong.append(
                    f"`{section}.{_shown(key)}`: a name has letters, digits, `_` and `-` only, no `-` first, and at most "
                    "100 of them. Rename it."
                )
            for name in PATHS if isinstance(entry, dict) and section in STAGES else ():
                path = entry.get(name)
                if isinstance(path, str) and (not re.fullmatch(r"[\w.+=@,/-]+", path) or {"", "..", "."} & set(path.split("/"))):
                    wrong.append(
                        f"`{section}.{_shown(key)}.{name}` is {path!r}: it must be a path below data/, of letters, digits and "
                        "`_ . + = @ , - /`, without `..`. Correct it."
                    )
    root = tree["prepare"].get("root") if isinstance(tree.get("prepare"), dict) else None
    if isinstance(root, str) and (not root.strip() or not root.isprintable()):
        wrong.append(f"`prepare.root` is {root!r}: it must be the path of a folder, in printable characters. Correct it.")
    if isinstance(root, str) and is_remote(root):
        wrong.append(
            f"`prepare.root` is {masked(root)!r}: an address stands in `remote: {{<name>: {{url: ...}}}}`. Write "
            "data/remote/<name> here, or `remote: <name>` beside the `path` of a source."
        )
    return wrong


def _shown(key: Any) -> str:
    """A key as one short line: it may be anything."""
    text = str(key)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def lacking(tree: Mapping[str, Any]) -> list[str]:
    """A complaint about each key that DVC needs and that is not there."""
    return [f"`{key}` is missing. Write `{example}`." for key, example in NEEDED.items() if key not in tree]


def _explained(section: type[BaseModel], keys: tuple[str, ...], errors: list[Any]) -> list[str]:
    """A complaint about each wrong key; what is said for each member of a union stands in one."""
    said: dict[str, str] = {}
    blamed = {error["loc"][:depth] for error in errors for depth in range(len(error["loc"]))}
    for error in errors:
        if error["loc"] in blamed:  # a list is called too short where its members are wrong
            continue
        path, known = _place(section, error["loc"], error["type"] == "extra_forbidden")
        key = ".".join([*keys, *path])
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            what = f"`{key}` is not a known key{similar(path[-1], known)}. Remove or correct it."
        elif error["type"] == "missing":
            what = f"`{key}` is required but missing."
        elif error["type"] == "union_tag_not_found":
            what = f"`{key}.kind` is required but missing."
        elif error["type"] == "union_tag_invalid":
            tag, tags = error["ctx"]["tag"], error["ctx"]["expected_tags"].replace("'", "").split(", ")
            what = f"`{key}.kind` is {tag!r}{similar(tag, tags)}: it must be one of {', '.join(tags)}."
        elif isinstance(error["input"], dict | BaseModel):
            what = f"`{key}`: {message}."
        else:
            said_there = masked(error["input"]) if isinstance(error["input"], str) else error["input"]
            what = f"`{key}` is {said_there!r}: {message}."
        said[key] = f"{said[key]} Or: {message}." if key in said else what
    return list(said.values())


def _place(section: type[BaseModel], loc: tuple[int | str, ...], is_unknown: bool) -> tuple[list[str], list[str]]:
    """The keys of the file that lead to an error, without what pydantic adds for members of unions; and the keys known
    there."""
    path: list[str] = []
    here: Sequence[type[BaseModel]] = [section]
    annotation: Any = None
    for depth, part in enumerate(loc):
        fields = {field.alias or name: field.annotation for s in here for name, field in s.model_fields.items()}
        tagged = [s for s in here if "kind" in s.model_fields and part in get_args(s.model_fields["kind"].annotation)]
        if part in fields:
            annotation = fields[str(part)]
            here = sections_in(annotation)
        elif tagged and len(here) > 1:
            here = tagged
            continue
        elif not isinstance(part, int) and get_origin(annotation) is not dict and not (is_unknown and depth == len(loc) - 1):
            continue
        path.append(str(part))
    return path, [field.alias or name for s in here for name, field in s.model_fields.items()]


def similar(key: str, known: Any) -> str:
    """` (did you mean ...?)` if one of the `known` names is close to `key`."""
    close = difflib.get_close_matches(key, [str(k) for k in known] if known else [], n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def load_seed(file: Path) -> int:
    """The top-level `seed`: the random choices of training, labelling and selection derive from it; `prepare` and
    `draw` have seeds of their own."""
    tree = read(file)
    if wrong := wrong_seed(tree):
        raise ParamsError(f"{file}: {wrong[0]}")
    return int(tree["seed"])


def wrong_seed(tree: Mapping[str, Any]) -> list[str]:
    """A complaint about the `seed` if it cannot be used."""
    seed = tree.get("seed")
    is_good = isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0
    return [] if is_good else [f"`seed` is {seed!r}: it must be an integer of at least 0."]
