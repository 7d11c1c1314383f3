"""What the documents name is there: links, files, modules, make's targets, rooms, and which change makes which stage stale."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = {folder.parent.name for folder in (ROOT / "pipeline").glob("*/__init__.py")}
CODE = re.compile(r"```.*?```|`[^`]+`", re.DOTALL)
OURS = re.compile(r"(?:pipeline|flows|tests|benchmarks|recipes|docs|dev|\.github|\.ci)/[\w./*-]*")
ALONE = re.compile(r"\.?\w[\w.-]*\.(?:md|toml|lock|cff|json)|(?:dvc|params|prefect|\.pre-commit-config)\.yaml|Makefile")
WRITTEN = re.compile(r"--out \S+")
"""What a command is to write, and what stages write into artifacts, is no file of the repository."""
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))


def code(document: Path) -> str:
    """The text between backticks, with a stage or a source in the place of `x`."""
    text = "\n".join(CODE.findall(document.read_text()))
    text = re.sub(r"\b(pipeline/sources/)x\b", r"\1tar", WRITTEN.sub("", text))
    return re.sub(r"\b(pipeline[./]stages[./])x\b", r"\1teach", text)


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", document.read_text()))
    inside = [link.partition("#")[0] for link in links if not re.match(r"\w+:", link)]
    assert [link for link in inside if not (document.parent / link).exists()] == []


@each_document
def test_files_are_there(document: Path) -> None:
    named = {path.rstrip(".") for path in OURS.findall(code(document))}
    assert sorted(path for path in named if not any(ROOT.glob(path))) == []


def test_files_at_the_top_are_there() -> None:
    named = {span.strip("`") for file in DOCUMENTS[:2] for span in CODE.findall(file.read_text())}
    assert sorted(name for name in named if ALONE.fullmatch(name) and not (ROOT / name).exists()) == []


@each_document
def test_modules_can_be_run(document: Path) -> None:
    missing = []
    for module in set(re.findall(r"python -m ([\w.]+)", code(document))):
        is_package = (spec := importlib.util.find_spec(module)) is not None and spec.submodule_search_locations is not None
        if (importlib.util.find_spec(f"{module}.__main__") if is_package else spec) is None:
            missing.append(module)
    assert missing == []


@each_document
def test_make_knows_its_targets(document: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:^|`)make ([a-z]+)\b", code(document), re.MULTILINE)
    assert sorted(set(named) - set(targets)) == []


def test_every_room_is_in_the_tree_and_on_the_map() -> None:
    """And neither shows a room that is none."""
    tree = re.search(r"^pipeline/\n((?:  .+\n)+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert tree is not None
    assert set(re.findall(r"^  (\w+)/ +\S", tree[1], re.MULTILINE)) == ROOMS
    shown = re.findall(r"^\| `pipeline/(\w+)/` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(ROOMS)


def test_the_table_of_changes_is_what_dvc_yaml_says() -> None:
    """A stage that the table does not name, such as a new one, is left out of the comparison."""
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Which change reruns what")[1].split("## ")[0]
    rows = [
        [re.findall(r"`([^`]+)`", cell) or cell.strip() for cell in row.split("|")[2:4]]
        for row in re.findall(r"^\|.+`.+\|$", table, re.M)
    ]
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    deps = {name: [dep for dep in body.get("do", body)["deps"] if dep.startswith("pipeline/")] for name, body in stages.items()}
    named = {stage for _, stale in rows if isinstance(stale, list) for stage in stale}
    for paths, stale in rows:
        for path in paths:
            found = {name for name in deps if any(f"{path.rstrip('/')}/".startswith(f"{dep}/") for dep in deps[name])}
            if stale == "every stage":
                assert found == set(deps), path
            else:
                assert found & named == (set() if stale == "no stage" else set(stale)), path
    assert {path.split("/")[1] for paths, _ in rows for path in paths if path.startswith("pipeline/")} == ROOMS


def test_no_document_installs_winnow_from_an_index() -> None:
    """The name is somebody else's there."""
    texts = {file.name: file.read_text() for file in DOCUMENTS}
    assert [name for name, text in texts.items() if re.search(r"pip install [^\n]*\bwinnow", text)] == []
