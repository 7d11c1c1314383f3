"""DVC empties dvc.lock before it writes it; what a kill leaves there is replaced by the last good copy."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.harness import lockfile

ENTRY = {
    "cmd": "true",
    "deps": [{"path": "a", "hash": "md5", "md5": "0" * 32, "size": 1}],
    "outs": [{"path": "b", "md5": "1" * 32}],
}
WHOLE = yaml.safe_dump({"schema": "2.0", "stages": {"one": ENTRY, "two@x": copy.deepcopy(ENTRY)}}, sort_keys=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lockfile, "WRITING", 0.0)
    (tmp_path / "dvc.lock").write_text(WHOLE)
    lockfile.keep(tmp_path / "copies")
    return tmp_path


@pytest.mark.parametrize(
    "broken", ["", "schema: '2.0'\nstages:\n", WHOLE.partition("path: a")[0], WHOLE.partition("'0000")[0], "\x00" * 50, "[]"]
)
def test_a_broken_lock_is_replaced_by_the_copy(here: Path, broken: str) -> None:
    (here / "dvc.lock").write_text(broken)
    assert "put back" in (lockfile.mend(here / "copies") or "")
    assert (here / "dvc.lock").read_text() == WHOLE


def test_a_whole_lock_stays(here: Path) -> None:
    other = WHOLE.replace("two@x", "three@x")
    (here / "dvc.lock").write_text(other)
    assert lockfile.mend(here / "copies") is None
    assert (here / "dvc.lock").read_text() == other
    (here / "dvc.lock").unlink()
    assert lockfile.mend(here / "copies") is None
    assert not (here / "dvc.lock").exists()


def test_without_a_copy_a_broken_lock_is_put_aside(here: Path) -> None:
    (here / "dvc.lock").write_bytes(b"")
    assert "there is no copy" in (lockfile.mend(here / "elsewhere") or "")
    assert not (here / "dvc.lock").exists()
    assert (here / "dvc.lock.broken").exists()


def test_a_broken_lock_is_never_kept(here: Path) -> None:
    (here / "dvc.lock").write_text(WHOLE.partition("path: a")[0])
    lockfile.keep(here / "copies")
    assert not (here / "copies" / "dvc.lock").is_file() or lockfile.is_whole(here / "copies" / "dvc.lock")
    assert (here / "copies" / "dvc.lock").read_text() == WHOLE  # the good one stays


@pytest.mark.whole
def test_dvc_goes_on_after_its_lock_was_emptied(tmp_path: Path) -> None:
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True)

    (tmp_path / "dvc.yaml").write_text("stages:\n  one: {cmd: echo 1 >> ran && cp in out, deps: [in], outs: [out]}\n")
    (tmp_path / "in").write_text("in")
    assert run("dvc", "init", "-q", "--no-scm").returncode == 0
    assert run("dvc", "repro", "-q").returncode == 0
    root = Path(__file__).parents[2]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from pathlib import Path; from pipeline.harness import lockfile; "
    keep, mend = (code + f"print(lockfile.{name}(Path('copies')))" for name in ("keep", "mend"))
    subprocess.run([sys.executable, "-c", keep], cwd=tmp_path, check=True)
    (tmp_path / "dvc.lock").write_bytes(b"")
    assert run("dvc", "repro", "-q").returncode != 0  # what this module is for: DVC itself does not get over it
    subprocess.run([sys.executable, "-c", mend], cwd=tmp_path, check=True)
    assert run("dvc", "repro", "-q").returncode == 0
    assert (tmp_path / "ran").read_text() == "1\n"
