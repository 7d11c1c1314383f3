"""The flow asks winnow's own command whether params.yaml can be run, before any stage."""

import asyncio
import inspect
import os
from pathlib import Path

import pytest

from flows import variant, winnow

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")  # Prefect's own warnings


def test_a_mistake_in_params_fails_the_run_with_what_the_check_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "params.yaml").write_text((ROOT / "recipes" / "demo.yaml").read_text().replace("teach/teacher", "teach/teecher"))
    with pytest.raises(variant.WrongParams, match=r"^params.yaml: `.*\n.*`distil\.kd\.teacher` is 'teach/teecher'"):
        asyncio.run(variant.check(tmp_path))


def test_what_dvc_cannot_watch_fails_the_run_before_dvc_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "params.yaml").write_text("prepare: {root: raw}\n")
    (tmp_path / "raw").mkdir()
    os.mkfifo(tmp_path / "raw" / "pipe")
    with pytest.raises(variant.WrongParams, match=r"^DVC cannot watch all .*\npipes \(1\): raw/pipe\. DVC would wait for ever"):
        asyncio.run(variant.scan(tmp_path))
    told = inspect.getsource(variant.prepared)
    assert 0 < told.index("await scan(folder)") < told.index("dag.read")
    told = inspect.getsource(winnow.winnow.fn)
    assert 0 < told.index("await check_all(") < told.index("await prepared(")
