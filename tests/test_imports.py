"""A test file is read alone: what two of them need lies in tests/tiny.py or a conftest.py."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent


def imported(file: Path) -> Iterator[str]:
    """Each module and each name that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def test_no_test_file_imports_from_another() -> None:
    files = {file.stem for file in TESTS.rglob("test_*.py")}
    found = {file: {part for name in imported(file) for part in name.split(".")} & files for file in TESTS.rglob("*.py")}
    assert {str(file.relative_to(TESTS)): names for file, names in found.items() if names} == {}
