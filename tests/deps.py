"""What code each stage of dvc.yaml depends on, from the import graph. `python -m tests.deps` writes it into dvc.yaml.

DVC does not follow imports, so dvc.yaml lists them: a whole room where a stage uses all of it, else the room's files, since a
folder would make the stage stale for nothing. `store` and `models` are whole for everybody, and so is every room for a stage that
takes seconds. What cannot change a result (`harness`, `tracking`, `errors`) is nobody's dependency.
"""

import re
from functools import cache
from pathlib import Path

import grimp

from pipeline.harness.stage import INERT

ROOT = Path(__file__).parents[1]
WHOLE = ("pipeline.store", "pipeline.models")
SECONDS = ("draw", "dedup", "select", "ensemble", "compare")  # the stages that take no longer
FOLDERS = ("pipeline.learning.loop",)  # rooms within a room


@cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("pipeline", cache_dir=None)


def imported(stage: str) -> set[str]:
    """The modules that a stage imports, directly or not, but for those that cannot change a result."""
    found: set[str] = set()
    waiting = [f"pipeline.stages.{stage}"]
    while waiting:
        module = waiting.pop()
        if module not in found and not module.startswith(INERT):
            found.add(module)
            waiting += graph().find_modules_directly_imported_by(module)
    return {m for m in found if m != "pipeline" and (ROOT / f"{m.replace('.', '/')}.py").is_file()}


def deps(stage: str) -> list[str]:
    """The lines of code that `stage` depends on, as dvc.yaml lists them: its own module first."""
    modules = imported(stage)
    own = f"pipeline.stages.{stage}"
    rooms = sorted({".".join(m.split(".")[:2]) for m in modules if m != own} | set(FOLDERS), key=lambda r: -r.count("."))
    whole: list[str] = []
    left = modules - {own}
    for room in rooms:
        inside = {m for m in left if m.startswith(f"{room}.")}
        everything = {m for m in graph().find_descendants(room) if not graph().find_children(m)}
        if inside and (inside == everything or room in WHOLE or stage in SECONDS):
            whole.append(room.replace(".", "/"))
            left -= inside
    return [f"{own.replace('.', '/')}.py", *sorted([*whole, *(f"{m.replace('.', '/')}.py" for m in left)])]


def written(text: str) -> str:
    """dvc.yaml with the code deps of each stage as they are to be; data, templates and all else stay."""
    stage, lines, is_done = "", list[str](), False
    for line in text.splitlines():
        if name := re.match(r"  ([a-z_]+):$", line):
            stage, is_done = name[1], False
        if re.match(r" +- pipeline/[a-z_/]+(\.py)?$", line):
            if not is_done:
                is_done = True
                indent = line[: len(line) - len(line.lstrip())]
                lines += [f"{indent}- {dep}" for dep in deps(stage)]
            continue
        lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    file = ROOT / "dvc.yaml"
    file.write_text(written(file.read_text()))
