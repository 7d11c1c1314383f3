"""What is handed over beside a model's files: a card and an example, and what the example answers."""

import html
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from pipeline.errors import UserError
from pipeline.store import manifest

EXAMPLE, CARD, CALIBRATION = "example.py", "README.md", "calibration.json"


def answers(example: Path, images: manifest.Manifest) -> list[int]:
    """The class that `example` prints for each image. Raises UserError where it prints none."""
    with tempfile.TemporaryDirectory() as folder:
        for i, data in enumerate(manifest.image_bytes(images, range(len(images)))):
            (Path(folder) / f"{i:06}").write_bytes(data)
        command = [sys.executable, "-X", "utf8", str(example), folder]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise UserError(f"{EXAMPLE} fails, with exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    lines = [line.rsplit("\t", 2) for line in done.stdout.splitlines()]
    said = {Path(line[0]).name: line[1] for line in lines if len(line) == 3}
    answers = [said.get(f"{i:06}") for i in range(len(images))]
    if not set(answers) <= set(images.classes):
        row = next(i for i, name in enumerate(answers) if name not in images.classes)
        raise UserError(f"{EXAMPLE} has no answer for {images.table['id'][row]}: {done.stderr.strip()[-500:]}")
    return [images.classes.index(str(name)) for name in answers]


def plain(value: Any) -> Any:
    """A text as Markdown that shows it as it is, on one line; whatever is no text, as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return re.sub(r"[\\`*_\[\]|~$#]", r"\\\g<0>", html.escape(" ".join(value.split()), quote=False))


def code(value: str) -> Markup:
    """A text as a code span of Markdown, also in a table."""
    text = " ".join(value.split())
    return Markup(f"<code>{plain(text)}</code>" if "`" in text or "|" in text else f"`{text}`")


def template(name: str, shown: Callable[[Any], Any] | None = None) -> Template:
    """The template of a file; `shown` is applied to each value in it, but for Markup."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
        finalize=shown,
    )
    environment.filters["code"] = code
    return environment.get_template(f"{name}.jinja")
