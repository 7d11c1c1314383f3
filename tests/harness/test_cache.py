"""What is said of a damaged artifact: the commands that mend it, with the file of DVC's cache where that is damaged, too."""

import hashlib
import json
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.harness import cache, stage
from pipeline.store import artifact


def kept(folder: Path, data: bytes, suffix: str = "") -> tuple[str, Path]:
    """A file of DVC's cache by its content, as DVC 3 lays it out."""
    md5 = hashlib.md5(data).hexdigest()
    file = folder / "files" / "md5" / md5[:2] / (md5[2:] + suffix)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return md5 + suffix, file


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact, data/a, with its copy in DVC's cache, which the local config puts at store/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    with artifact.writing(Path("data/a")) as tmp:
        (tmp / "x").write_text("whole")
    files = [(name, kept(tmp_path / "store", (tmp_path / "data/a" / name).read_bytes())[0]) for name in ("x", artifact.CHECKSUMS)]
    listed, _ = kept(tmp_path / "store", json.dumps([{"md5": md5, "relpath": name} for name, md5 in files]).encode(), ".dir")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    (tmp_path / ".dvc" / "config.local").write_text("[cache]\n    dir = ../store\n")
    (tmp_path / "dvc.lock").write_text(f"stages:\n  a:\n    cmd: x\n    outs:\n    - path: data/a\n      md5: {listed}\n")
    return tmp_path


def error() -> UserError:
    with pytest.raises(artifact.ArtifactError) as raised:
        artifact.verify(Path("data/a"))
    return raised.value


def test_a_whole_copy_is_to_be_checked_out(house: Path) -> None:
    (house / "data/a/x").write_text("broke")
    assert cache.advice(error()) == " DVC's copy is whole. Say: `rm -rf data/a && dvc checkout data/a`."


def test_a_damaged_copy_is_named(house: Path) -> None:
    md5 = hashlib.md5(b"whole").hexdigest()
    copy = Path("store", "files", "md5", md5[:2], md5[2:])
    for file in (house / "data/a/x", copy):
        file.write_text("broke")
    assert cache.advice(error()) == f" DVC's copy is damaged, too. Say: `rm -rf data/a {copy} && dvc repro`."


def test_a_stage_ends_with_the_advice(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (house / "data/a/x").write_text("broke")
    with pytest.raises(SystemExit) as end, stage.exit_codes("it begins anew"):
        artifact.verify(Path("data/a"))
    assert end.value.code == stage.WRONG_INPUT
    assert capsys.readouterr().err.endswith("DVC's copy is whole. Say: `rm -rf data/a && dvc checkout data/a`.\n")


def test_nothing_is_said_where_dvc_knows_nothing(house: Path) -> None:
    (house / "data/a/x").write_text("broke")
    damaged = error()
    for text in ("", "stages: 3", "stages: {a: {outs: [{path: data/b, md5: x}]}}", "stages: {a: {outs: [{path: data/a}]}}", "["):
        (house / "dvc.lock").write_text(text)
        assert cache.advice(damaged) == ""
    (house / "dvc.lock").unlink()
    assert cache.advice(damaged) == ""
    assert cache.advice(UserError("another")) == ""
