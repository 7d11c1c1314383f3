"""The demo's printed table is what docs/demo.json, the figures of its run, makes."""

import json
import re

import pytest
import yaml

from benchmarks import docs
from pipeline.errors import UserError
from pipeline.report import comparison

RUN = docs.ROOT / "data" / "compare" / "results"


def printed() -> dict[str, list[str]]:
    """The cells of each row between the markers, by entry."""
    text = docs.DOCUMENT.read_text().split("<!-- demo: begin -->")[1].split("<!-- demo: end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


def test_the_document_is_what_its_figures_render() -> None:
    document = docs.DOCUMENT.read_text()
    assert docs.placed(document, "demo", docs.demo(json.loads(docs.FIGURES.read_text()))) == document


def test_printed_figures_are_those_of_the_run() -> None:
    """Read back from the cells, so that a mistake of the renderer shows."""
    rows = json.loads(docs.FIGURES.read_text())["rows"]
    cells = printed()
    assert cells.keys() == rows.keys()
    for name, row in rows.items():
        figures = [float(n) for n in re.findall(r"[\d.]+", cells[name][0])]
        assert figures == pytest.approx([100 * share for share in row["val"]], abs=0.0501)
        assert float(cells[name][2]) == pytest.approx(100 * row["holdout"], abs=0.0501)
        assert int(cells[name][5].replace(",", "")) == row["learned"]


def test_the_last_run_has_the_printed_figures() -> None:
    """Where one is there, of the demo's params and on the same machine: on another the last digits, and so answers, differ."""
    facts = json.loads(docs.FIGURES.read_text())
    is_demo = yaml.safe_load((docs.ROOT / "params.yaml").read_text()) == yaml.safe_load(
        (docs.ROOT / "recipes/demo.yaml").read_text()
    )
    if not is_demo or docs.machine() != facts["machine"] or not (RUN / comparison.FILE).is_file():
        pytest.skip("no run of the demo on the machine of docs/demo.json")
    assert docs.figures(RUN)["rows"] == facts["rows"], "say `make docs`, which prints the figures of today's code"


def test_a_document_without_the_markers_is_refused() -> None:
    with pytest.raises(UserError, match="demo: begin"):
        docs.placed("nothing here", "demo", "text")
    assert docs.placed("a <!-- x: begin -->old<!-- x: end --> b", "x", r"new \1") == (
        "a <!-- x: begin -->\nnew \\1\n<!-- x: end --> b"
    )
