"""What a log shows of long work."""

import pytest

from pipeline.harness import progress


def test_work_that_goes_on_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    for done in (0, 1200):
        with progress.bar(4000, "steps", "teach.teacher", done=done) as shown:
            shown.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        "teach.teacher: 1 of 4,000 steps",
        "teach.teacher: goes on at 1,200 of 4,000 steps",
        "teach.teacher: 1,201 of 4,000 steps",
    ]
