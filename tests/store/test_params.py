from pathlib import Path

import pytest

from pipeline.learning.loop.optimisers import Training
from pipeline.learning.views import View
from pipeline.models.inputs import Wanted
from pipeline.models.network import Network
from pipeline.stages.distil import Distil
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.prepare import Prepare
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


GOOD = """
models: {small: {arch: resnet8, input: {size: 8}}}
views: {plain: {kind: none}}
trainings: {brief: {steps: 3}}
distil:
  ssld: {init: scratch, teacher: teach/t, images: select/top, model: small, view: plain, training: brief, loss: {weight: 1}}
"""


def test_a_good_section(tmp_path: Path) -> None:
    section = params.load(written(tmp_path, GOOD), Distil, ("distil", "ssld"))
    assert section.training == Training(steps=3)
    assert section.model == Network(arch="resnet8", input=Wanted(size=8))
    assert section.view == View(kind="none")
    assert section.loss.name == "sym_kl"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps: 3", "step: 3"), "`trainings.brief.steps` is required but missing"),
        (("steps: 3", "step: 3"), "`trainings.brief.step` is not a known key (did you mean `steps`?)"),
        (("size: 8", "size: 8, cavas: 2"), "`models.small.input.cavas` is not a known key (did you mean `canvas`?)"),
        (("weight: 1", "wieght: 1"), "`distil.ssld.loss.wieght` is not a known key (did you mean `weight`?)"),
        (("steps: 3", "steps: many"), "`trainings.brief.steps` is 'many'"),
        (("steps: 3", "steps: 0"), "`distil.ssld.training`: `steps: 0` learns nothing; only `teach` can"),
        (("steps: 3", "steps: 3, rates: {conv1: x}"), "`trainings.brief.rates.conv1` is 'x'"),
        (("size: 8}", "size: 8}, source_classes: 3"), "`models.small.source_classes` is 3: Input should be 'train'. Or:"),
        (("init: scratch", "init: scratch, teacher_nb: eval"), "did you mean `teacher_bn`"),
        (("model: small", "model: smal"), "`distil.ssld.model` is 'smal': there is no `models.smal` (did you mean `small`?)"),
        (("view: plain", "view: {kind: none}"), "`distil.ssld.view` is {'kind': 'none'}: it must be the name of one of `views`"),
        (("view: plain, ", ""), "`distil.ssld.view` is missing: it must be the name of one of `views`. Write `views: {<name>:"),
        (("\n  ssld", "\n  sslt"), "there is no `distil.ssld` (did you mean `sslt`?)"),
        (("\ndistil:", "\ndistill:"), "nothing reads the key `distill` (did you mean `distil`?)"),
        (("\ndistil:", "\ndistil: ["), "not valid YAML"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert message in refused(tmp_path, GOOD.replace(*change))


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (
            "{kind: folders, path: a}",
            "0.kind` is 'folders' (did you mean `folder`?): it must be one of folder, tar, torchvision, parquet.",
        ),
        ("{path: a}", "0.kind` is required but missing."),
        ("{kind: tar, path: a, imgae: b}", "0.imgae` is not a known key. Remove or correct it."),
        ("{kind: parquet, path: a, imgae: b}", "0.imgae` is not a known key (did you mean `image`?). Remove or correct it."),
        ("{kind: tar, path: ~/a}", "0.path` is '~/a': DVC does not know what `~` is; write the whole path."),
    ],
)
def test_a_source_that_cannot_be_is_complained_of_once(tmp_path: Path, source: str, complaint: str) -> None:
    good = "{kind: tar, path: a}"
    file = written(tmp_path, f"prepare: {{root: x, labelled: [{source}], val: [{good}]}}")
    with pytest.raises(params.ParamsError) as error:
        params.load(file, Prepare, ("prepare",))
    assert str(error.value) == f"{file}: `prepare.labelled.{complaint}"


def test_a_home_folder_is_refused_as_dvc_would_not_find_it(tmp_path: Path) -> None:
    sources = "labelled: [{kind: tar, path: a}], val: [{kind: tar, path: a}]"
    with pytest.raises(params.ParamsError, match=r"`prepare\.root` is '~/images': DVC does not know what `~` is"):
        params.load(written(tmp_path, f"prepare: {{root: ~/images, {sources}}}"), Prepare, ("prepare",))


def test_a_path_named_model_is_no_name_on_a_shelf(tmp_path: Path) -> None:
    file = written(tmp_path, "evaluate: {x: {role: teacher, model: teach/x}}")
    assert params.load(file, Evaluate, ("evaluate", "x")).model == "teach/x"


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


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"seed: 0\n# caf\xe9\n", "params.yaml, line 2: this is not UTF-8. Save the file as UTF-8."),
        (b"seed: 0\nseed: 1\n", "params.yaml: line 2: the key `seed` stands there twice. Remove one."),
        (b"teach: {a: {}, a: {}}\n", "params.yaml: line 1: the key `a` stands there twice. Remove one."),
        (b"a: &x [1]\nb: *x\n", "params.yaml: line 2: the alias `*x`."),
        (b"[" * 10_000, "params.yaml is not valid YAML: "),
        (b"seed: 2026-13-45", "params.yaml is not valid YAML: month must be in 1..12"),
    ],
)
def test_a_file_that_is_none_or_says_two_things_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "params.yaml").write_bytes(data)
    with pytest.raises(params.ParamsError) as error:
        params.parsed(tmp_path / "params.yaml")
    assert message in str(error.value)


def test_no_key_means_infinity(tmp_path: Path) -> None:
    assert "`trainings.brief.lr`" in refused(tmp_path, GOOD.replace("steps: 3", "steps: 3, lr: .inf"))
