"""What a section of params.yaml says of itself: a row for each key, for `--help` and for docs/params.md."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from pipeline.store.params import SHELVES, on_shelves, sections_in


class Row(NamedTuple):
    """A key of a section."""

    key: str
    kind: str
    default: str  # as YAML; "required" where there is none
    description: str
    inner: tuple[type[BaseModel], ...]  # the sections that may stand there; none where a name does


def rows(section: type[BaseModel]) -> list[Row]:
    """The keys of a section in their order."""
    schema = section.model_json_schema()
    shelved = on_shelves(section)
    found = []
    for name, field in section.model_fields.items():
        key = field.alias or name
        inner = () if name in shelved else tuple(sections_in(field.annotation))
        kind = f"a name in `{SHELVES[name]}`" if name in shelved else _type(schema["properties"][key])
        required = name in shelved or field.is_required()
        default = "required" if required else _yaml(field.get_default(call_default_factory=True))
        found.append(Row(key, kind, default, told(field.description), inner))
    return found


def told(description: str | None) -> str:
    """A description in one line."""
    return " ".join((description or "").split())


def summary(section: type[BaseModel]) -> str:
    """What a section says of itself as a whole."""
    return told(section.__doc__)


def text(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Lines for a terminal; keys of inner sections follow with their dotted names."""
    for row in rows(section):
        kind = re.sub(r"`|\(#.*?\)", "", row.kind)
        yield f"{prefix}{row.key}: {kind}; {row.default.replace('`', '')}"
        yield f"    {row.description}"
        for inner in row.inner:
            yield from text(inner, f"{prefix}{row.key}.")


def _yaml(value: Any) -> str:
    return f"`{value if isinstance(value, str) else '{}' if isinstance(value, BaseModel) else json.dumps(value)}`"


def _type(schema: Mapping[str, Any]) -> str:
    """The type of a value, in words."""
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(option) for option in options))
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if values := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{value}`" for value in values)
    kind = schema.get("type", "anything")
    if kind == "array":
        parts = [_type(part) for part in schema.get("prefixItems", ())]
        return f"[{', '.join(parts)}]" if parts else f"list of {_type(schema['items'])}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"mapping of names to {_type(inner)}" if isinstance(inner, Mapping) else "mapping"
    if kind == "boolean":
        return "`true`, `false`"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    if kind == "integer" and "exclusiveMinimum" in schema:
        schema = {**schema, "minimum": schema["exclusiveMinimum"] + 1, "exclusiveMinimum": None}
    bounds = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if schema.get(name) is not None]
    return " ".join([{"string": "text"}.get(kind, kind), ", ".join(bounds)]).strip()
