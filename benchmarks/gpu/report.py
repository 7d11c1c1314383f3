"""The figures of a folder as Markdown."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.setting import WORK, Row
from pipeline.errors import UserError


def text(folder: Path, pieces: Sequence[str]) -> str:
    """A table for each piece that has rows, whole or in part. Raises UserError where there are none."""
    parts = []
    for name in pieces:
        whole, rows = folder / f"{name}.json", sorted((folder / WORK / name).glob("*.json"))
        if whole.is_file():
            found = json.loads(whole.read_text())
            parts.append(f"### {name}\n\n{facts(found)}\n\n{table(found['rows'])}")
        elif rows:
            read = [json.loads(file.read_text()) for file in rows]
            parts.append(f"### {name} (unfinished)\n\n{facts(read[0])}\n\n{table([one['row'] for one in read])}")
    if not parts:
        raise UserError(f"{folder} has no figures yet: measure first, without `report`.")
    return "\n\n".join(parts)


def facts(found: Row) -> str:
    """The line above a table."""
    host = "" if found["host"] == found["device"] else f" in a machine with {found['host']}"
    cuda = f", CUDA {found['cuda']}, cuDNN {found['cudnn']}" if found["cuda"] else ""
    tiny = " Tiny: no figure means anything." if found["tiny"] else ""
    versions = f"torch {found['torch']}{cuda}, Python {found['python']}"
    return (
        f"{found['device']}{host}; {found['precision']} where no precision is named; {versions}; commit {found['commit']}.{tiny}"
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown, with a column for each heading that a row has."""
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    headings = [heading for heading in headings if any(row.get(heading) is not None for row in rows)]
    lines = [f"| {' | '.join(headings)} |", f"| {' | '.join('---' for _ in headings)} |"]
    lines += [f"| {' | '.join(cell(heading, row.get(heading)) for heading in headings)} |" for row in rows]
    return "\n".join(lines)


def cell(heading: str, value: Any) -> str:
    """A figure as it is printed: shares in percent, rates with thousands, small numbers with three digits."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " / ".join(f"{one:.3f}" for one in value)
    if isinstance(value, float):
        if heading.endswith("%"):
            return f"{100 * value:.2f}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and heading not in ("seed",) else str(value)
