"""What is no stage: what can be said of params.yaml without running one, a trained model's answers, and a look at a selection.

python -m pipeline check [--params FILE]     the mistakes in keys, values and names, all at once; exit status 2 if there is one;
                                             a dvc.lock that a kill left broken is put back; --names: the names alone
python -m pipeline scan [--params FILE]      what DVC cannot watch in `prepare.root` and in files that entries name: exit status 2
python -m pipeline schema                    write params.schema.json, by which editors complete and check
python -m pipeline reference                 write docs/params.md: every key, its type, default and meaning
python -m pipeline bundle FOLDER --out OUT   put the files of a folder into tars (`bundle --help`)
python -m pipeline predict MODEL IMAGES...   classify pictures (`predict --help` says what it takes)
python -m pipeline estimate STAGE...         how long stages will take, as JSON: what `make plan` shows as a table
python -m pipeline forecast SCORES           before a student is trained: how pure selections will be, which k, whether it pays
python -m pipeline gallery SELECTION         a page of what was selected, and of labels that may be wrong
"""

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic.json_schema import models_json_schema

from pipeline.advice import arguments as advising
from pipeline.harness import lockfile, scan
from pipeline.harness.machine import Machine
from pipeline.harness.reference import Row, rows, summary, told
from pipeline.harness.stage import PARAMS_FILE, WORK, exit_codes, is_out
from pipeline.planning import arguments as estimating
from pipeline.predict import arguments as predicting
from pipeline.report.evaluation import not_a_baseline
from pipeline.sources import bundle as bundling
from pipeline.store import params
from pipeline.store.params import KEY, NEEDED, SHELVES, SINGLE, STAGES, Names, ParamsError, Section

SCHEMA, REFERENCE = Path("params.schema.json"), Path("docs", "params.md")
SEED = "The random choices of training, labelling and selection derive from it; `prepare` and `draw` have seeds of their own."


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="do", required=True, metavar="COMMAND")
    checking, scanning = commands.add_parser("check"), commands.add_parser("scan")
    for reading in (checking, scanning):
        reading.add_argument("--params", type=Path, default=PARAMS_FILE, metavar="FILE")
    checking.add_argument("--names", action="store_true", help="only whether the names are safe: before DVC reads the file")
    commands.add_parser("schema")
    commands.add_parser("reference")
    bundling.add_arguments(commands.add_parser("bundle", description=bundling.DESCRIPTION))
    predicting.add_arguments(commands.add_parser("predict", description=predicting.DESCRIPTION))
    estimating.add_arguments(commands.add_parser("estimate", description=estimating.DESCRIPTION))
    advising.add_forecast(commands.add_parser("forecast", description=advising.FORECAST))
    advising.add_gallery(commands.add_parser("gallery", description=advising.GALLERY))
    args = parser.parse_args()
    with exit_codes("it goes on where it stopped" if args.do == "bundle" else "it begins anew"):
        if args.do == "schema":
            SCHEMA.write_text(schema())
        elif args.do == "reference":
            REFERENCE.write_text(reference())
        elif args.do == "bundle":
            sys.stderr.write(f"{bundling.bundle(args.folder, args.out, args.megabytes)}\n")
        elif args.do == "scan":
            scan.expect_watchable(params.parsed(args.params))
        elif args.do == "predict":
            from pipeline.predict import command  # torch, and only here

            sys.stderr.write(f"{command.run(args)}\n")
        elif args.do == "forecast":
            from pipeline.advice import forecast

            sys.stdout.write(f"{forecast.run(args)}\n")
        elif args.do == "gallery":
            from pipeline.advice import gallery

            sys.stderr.write(f"{gallery.run(args)}\n")
        elif args.do == "estimate":
            params.read(args.params)  # a mistake is told before torch is imported
            from pipeline.planning import command as planning

            sys.stdout.write(f"{planning.run(args)}\n")
        elif args.names:
            params.read(args.params)
        else:
            if told_of_lock := lockfile.mend(WORK):
                sys.stderr.write(f"{told_of_lock}\n")
            check(args.params)


def sections() -> dict[str, type[Section]]:
    """The type of the section of each stage, or of its entries."""
    return {stage: get_type_hints(_run(stage))["params"] for stage in STAGES}


def shelves() -> dict[str, type[Section]]:
    """The type of what stands on each shelf."""
    found = {SHELVES[name]: inner for section in sections().values() for name, inner in params.on_shelves(section).items()}
    return {shelf: found[shelf] for shelf in SHELVES.values()}


def _run(stage: str) -> Any:
    return importlib.import_module(f"pipeline.stages.{stage}").run


# check ----------------------------------------------------------------------------------------------------------------


def check(file: Path) -> None:
    """Raises ParamsError with all that is wrong in a params file for the data in this folder; unsafe names alone come first."""
    tree = params.parsed(file)
    if wrong := params.unsafe(tree):
        raise ParamsError(f"{file}: " + "\n".join(wrong))
    wrong = [*params.strangers(tree), *params.lacking(tree), *params.wrong_seed(tree)]
    types = sections()
    wrong += params.resolve(tree, Machine, ("machine",), tree.get("machine"))[1]
    for name, section in (shelves() | types).items():
        body = tree.get(name, {})
        if name in SINGLE:
            wrong += params.resolve(tree, section, (name,), body)[1] if name in tree else []
            wrong += _references(tree, section, name, body)
        elif not isinstance(body, dict):
            wrong.append(f"`{name}` is {body!r}: it must be a mapping of names. Write `{name}: {{}}`, or leave it out.")
        else:
            for key, value in body.items():
                wrong += params.resolve(tree, section, (name, str(key)), value)[1]
                wrong += _references(tree, section, f"{name}.{key}", value)
    if isinstance(tree.get("prepare"), dict) and isinstance(root := tree["prepare"].get("root"), str):
        there = not _made(tree, root.removeprefix("data/")) if root.startswith("data/") else _there(Path(root))
        if not there and not root.startswith("~"):
            wrong.append(f"`prepare.root` is {root!r}, which is not there. Correct it, or put the images there.")
    wrong += _baseline(tree)
    if wrong:
        raise ParamsError(f"{file}: " + "\n".join(dict.fromkeys(wrong)))


def _baseline(tree: Mapping[str, Any]) -> list[str]:
    """A complaint about `compare.baseline` if it names an entry of another role."""
    compare, entries = tree.get("compare"), tree.get("evaluate")
    name = compare.get("baseline") if isinstance(compare, dict) else None
    if not isinstance(name, str) or not isinstance(entries, dict) or name not in entries:
        return []
    roles = {key: entry.get("role") for key, entry in entries.items() if isinstance(entry, dict)}
    wrong = not_a_baseline(name, roles)
    return [wrong] if wrong else []


def _references(tree: Mapping[str, Any], section: type[Section], key: str, value: Any) -> Iterator[str]:
    """A complaint about each key that names what is not there and what no stage makes, or what is of another kind."""
    for name, field in section.model_fields.items():
        marks = [mark for mark in field.metadata if isinstance(mark, Names)]
        named = value.get(name) if isinstance(value, dict) else None
        if marks and isinstance(named, str) and (why := _made(tree, "/".join(filter(None, (marks[0].section, named))))):
            yield f"`{key}.{name}` is {named!r}: {why}. Correct it."
        elif marks and isinstance(named, str) and (stage := named.partition("/")[0]) in set(STAGES) - set(marks[0].of or STAGES):
            yield f"`{key}.{name}` is {named!r}, but `{stage}` makes no {marks[0].what}: {', '.join(marks[0].of)} do."
        for number, inner in enumerate(named if isinstance(named, list) else ()):
            for kind in params.sections_in(field.annotation):
                if isinstance(inner, dict) and "kind" in kind.model_fields and inner.get("kind") in _kinds(kind):
                    yield from _references(tree, kind, f"{key}.{name}.{number}", inner)


def _kinds(section: type[Section]) -> tuple[Any, ...]:
    return get_args(section.model_fields["kind"].annotation)


def _made(tree: Mapping[str, Any], path: str) -> str:
    """Why there will be no data/<path>; an empty text if it is there, or if a stage makes it."""
    stage, _, entry = path.partition("/")
    known: Any = tree.get(stage)
    if stage in SINGLE:
        known = [name.removesuffix("_out") for name in inspect.signature(_run(stage)).parameters if is_out(name)]
    if stage in STAGES:
        if isinstance(known, dict | list) and entry in known:
            return ""
        return f"there is no `{entry}` in `{stage}`{params.similar(entry, known)}"
    return "" if _there(Path("data", path)) else f"no stage makes it, and data/{path} is not there{params.similar(stage, STAGES)}"


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


# schema ---------------------------------------------------------------------------------------------------------------


def schema() -> str:
    """The JSON Schema (draft 2020-12) of a params file."""
    types, things, machine = sections(), shelves(), dict[str, type[Section]](machine=Machine)
    all_of_them = [(section, "validation") for section in {*types.values(), *things.values(), Machine}]
    refs, whole = models_json_schema(all_of_them, ref_template="#/$defs/{model}")  # type: ignore[arg-type]
    definitions = whole["$defs"]
    for section in types.values():
        for name in params.on_shelves(section):
            body = definitions[section.__name__]
            description = body["properties"][name]["description"]
            body["properties"][name] = {"type": "string", "description": description}
            body["required"] = [*body.get("required", ()), name]
    properties: dict[str, Any] = {"seed": {"type": "integer", "minimum": 0, "description": SEED}}
    for name, section in (machine | things | types).items():
        of = refs[section, "validation"]
        named = {"type": "object", "propertyNames": {"pattern": f"^{KEY}$"}, "additionalProperties": of}
        properties[name] = of if name == "machine" or name in SINGLE else named
    top = {"type": "object", "properties": properties, "required": list(NEEDED), "additionalProperties": False}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "params.yaml of winnow"}
    return json.dumps({**head, **_tidy(top), "$defs": _tidy(dict(sorted(definitions.items())))}, indent=1) + "\n"


def _tidy(node: Any) -> Any:
    """Without pydantic's titles, which repeat the keys, and with descriptions in one line."""
    if isinstance(node, list):
        return [_tidy(part) for part in node]
    if not isinstance(node, dict):
        return node
    kept = {k: v for k, v in node.items() if k != "discriminator" and not (k == "title" and isinstance(v, str))}
    return {k: told(v) if k == "description" and isinstance(v, str) else _tidy(v) for k, v in kept.items()}


# reference ------------------------------------------------------------------------------------------------------------

HEAD = f"""# params.yaml

`python -m pipeline reference` writes this page from the code; the same descriptions stand in params.schema.json, by which editors
complete and check, and in `python -m pipeline.stages.select --help`.

A stage `x` reads the section `x`; `<entry>` and `<name>` are names of your choice (letters, digits, `_`, `-`). A section that is
missing is empty; these must be there: {", ".join(f"`{key}`" for key in NEEDED)}.

Entries name what they share, which stands in `models`, `views` and `trainings`. So DVC knows who uses what, and
`dvc exp run -S models.student.options.width=8` changes it for all of them. Below a YAML alias that change would be lost without
a word, so aliases are refused.

`python -m pipeline check` finds, all at once, the mistakes that can be seen without data: keys, values, types, names. `make run`
and the flow check before they begin; `dvc repro` alone removes the old output of a stage before it says that its `teacher` is not
there.

`seed`, an integer of at least 0: {SEED[0].lower()}{SEED[1:]}
"""


def reference() -> str:
    """docs/params.md: a table for each section, and one for each kind of section that stands in others."""
    parts, inner, machine = [HEAD], dict[type[Any], None](), dict[str, type[Section]](machine=Machine)
    for name, section in (machine | shelves() | sections()).items():
        entry = "" if name == "machine" or name in SINGLE else ".<name>" if name in SHELVES.values() else ".<entry>"
        listed = rows(section)
        inner |= dict.fromkeys(s for row in listed for s in row.inner)
        parts.append(_table(f"{name}{entry}", summary(section), listed))
    parts += [_table(section.__name__, summary(section), rows(section)) for section in inner]
    return "\n".join(parts)


def _table(title: str, what: str, listed: list[Row]) -> str:
    lines = [f"## {title}\n", f"{what}\n", "| key | type | default | |", "| --- | --- | --- | --- |"]
    lines += [f"| `{row.key}` | {row.kind} | {row.default} | {row.description} |".replace("||", "\\|\\|") for row in listed]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
