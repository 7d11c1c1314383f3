from pathlib import Path

import pytest

from pipeline.learning.loop.optimisers import Training
from pipeline.stages.distil import Distil
from pipeline.store import params


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "params.yaml"
    file.write_text(text)
    return file


def refused(tmp_path: Path, text: str) -> str:
    file = written(tmp_path, text)
    with pytest.raises(params.ParamsError) as error:
        params.load(file, Distil, ("distil", "ssld"))
    assert str(file) in str(error.value)
    return str(error.value)


GOOD = "distil:\n  ssld: {init: scratch, teacher: teach/t, images: select/top, training: {steps: 3}}\n"


def test_a_good_section(tmp_path: Path) -> None:
    section = params.load(written(tmp_path, GOOD), Distil, ("distil", "ssld"))
    assert section.training == Training(steps=3)
    assert section.loss.name == "sym_kl"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps: 3", "stesp: 3"), "`distil.ssld.training.steps` is required but missing"),
        (("steps: 3", "steps: 3, bach: 2"), "`distil.ssld.training.bach` is not a known key"),
        (("steps: 3", "steps: many"), "`distil.ssld.training.steps` is 'many'"),
        (("steps: 3", "steps: 0"), "greater than 0"),
        (("init: scratch", "init: scratch, teacher_nb: eval"), "did you mean `teacher_bn`"),
        (("ssld", "sslt"), "there is no `distil.ssld` (did you mean `sslt`?)"),
        (("distil:", "distill:"), "nothing reads the key `distill` (did you mean `distil`?)"),
        (("distil:", "distil: ["), "not valid YAML"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert message in refused(tmp_path, GOOD.replace(*change))


def test_a_missing_file_says_where_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(params.ParamsError, match=r"Copy one of recipes"):
        params.read(tmp_path / "params.yaml")


@pytest.mark.parametrize("seed", ["-1", "yes", "1.5", "''"])
def test_seed_must_be_a_whole_number(tmp_path: Path, seed: str) -> None:
    with pytest.raises(params.ParamsError, match="`seed` is"):
        params.load_seed(written(tmp_path, f"seed: {seed}"))


def test_sections_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Training(steps=3).steps = 4
