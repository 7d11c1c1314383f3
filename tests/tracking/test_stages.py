"""The page of a comparison's stages: with times, and with what ran and what DVC had already."""

import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from pipeline.store import artifact
from pipeline.tracking import stages
from pipeline.tracking.experiment import Experiment
from tests.browser import WIDTHS, is_cut, opened
from tests.tracking.journals import execute, record, send, write

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")


def titles(page: str) -> dict[str, str]:
    """What the page says of each stage, by its name and entry."""
    marks = re.findall(r'<g class="(\w+)"><title>(\S+(?: \S+)?)(?: reads [^<]*)?</title>', page)
    return {name: state for state, name in marks}


def test_the_page_is_that_of_the_comparison_on_the_disk(store: Experiment) -> None:
    teacher, student, lost = record("teach.teacher"), record("distil.ssld"), record("distil.lost")
    execute(teacher, accuracy=0.9)
    execute(record("compare", made_of=(teacher,)))
    send()
    execute(student, accuracy=0.8)
    write(lost, {"accuracy": 0.6})
    of = record("compare", "2", made_of=(teacher, student, lost))
    token = artifact.provenance.set(of)
    with artifact.writing(stages.PAGE.with_name("results")) as tmp:
        (tmp / "comparison.json").write_text("{}")
    artifact.provenance.reset(token)
    assert not stages.PAGE.exists()  # the first comparison is not that of the folder
    execute(of)
    send()
    page = stages.PAGE.read_text()
    assert titles(page) == {
        "teach teacher": "unchanged",
        "distil ssld": "executed",
        "distil lost": "restored",
        "compare": "executed",
    }
    text = " ".join(page.split())
    assert "2 of 4 stages ran" in text
    assert "1 was up to date, 1 was restored" in text
    run = next(run for run in store.search("winnow.stage", "compare") if run.data.tags["winnow.key"] == of["key"])
    assert Path(store.client.download_artifacts(run.info.run_id, "stages.html")).read_text() == page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_and_letters_are_legible(tmp_path: Path, browser: Browser, scheme: Any) -> None:
    made = [record("prepare")]
    for i in range(9):
        made.append(record(f"distil.another_with_a_long_name_{i}", made_of=(made[0],)))
        made.append(record(f"evaluate.another_with_a_long_name_{i}", made_of=(made[0], made[-1])))
    rows = [{"key": r["key"], "status": "executed", "seconds": 3_725.0} for r in made]
    file = tmp_path / "stages.html"
    file.write_text(stages.render(record("compare", made_of=tuple(made)), rows, 2.0))
    for width in WIDTHS:
        with opened(browser, file, width, color_scheme=scheme) as page:
            assert not is_cut(page)
            letters = page.evaluate("[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)")
            assert len(letters) == 2 * (len(made) + 1)
            assert min(letters) > 10
