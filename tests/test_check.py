"""`python -m pipeline` (check, schema, reference), and every params file that is shipped."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from dvc.repo import Repo
from dvc.utils.hydra import apply_overrides

from pipeline import __main__ as command
from pipeline.harness.reference import rows
from pipeline.store.params import NEEDED, ParamsError

ROOT = Path(__file__).parent.parent
SHIPPED = [ROOT / "params.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))]
SCHEMA = json.loads((ROOT / "params.schema.json").read_text())
shipped = pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}-{file.stem}")


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that shipped params name, for params.yaml."""
    for file in ("scratch", "labels", "raw/teachers/cifar10-resnet56-4bfd9763.th"):
        (tmp_path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / file).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("file", "text"), [(command.SCHEMA, command.schema), (command.REFERENCE, command.reference)])
def test_what_the_code_says_of_itself_is_committed(file: Path, text: Any) -> None:
    assert (ROOT / file).read_text() == text(), f"`python -m pipeline {text.__name__}` writes {file} anew"


def test_every_key_has_its_description() -> None:
    def all_of(section: type[Any]) -> Iterator[tuple[str, str]]:
        for row in rows(section):
            yield f"{section.__name__}.{row.key}", row.description
            for inner in row.inner:
                yield from all_of(inner)

    described = [row for section in [*command.sections().values(), *command.shelves().values()] for row in all_of(section)]
    assert len(described) > 100
    assert [key for key, description in described if len(description) < 8] == []


# Shipped params -------------------------------------------------------------------------------------------------------


@shipped
def test_shipped_params_pass_the_check_and_the_schema(file: Path, house: Path) -> None:
    command.check(file)
    jsonschema.Draft202012Validator(SCHEMA).validate(yaml.safe_load(file.read_text()))
    named = file.read_text().split("\n")[0].removeprefix("# yaml-language-server: $schema=")
    assert (file.parent / named).resolve() == ROOT / "params.schema.json"


@pytest.mark.parametrize("change", [{"trainings": {"it": {"step": 3}}}, {"pool": {}}, {"models": {"a b": {}}}, {"seed": -1}])
def test_the_schema_refuses_what_the_check_refuses(change: dict[str, Any]) -> None:
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid({**tree, **change})


@shipped
def test_an_override_of_each_leaf_changes_this_leaf_and_nothing_else(file: Path, tmp_path: Path) -> None:
    text = file.read_text()
    assert overridden(text, tmp_path) == with_other_leaves(yaml.safe_load(text))


def test_below_an_alias_an_override_would_be_lost(tmp_path: Path) -> None:
    text = "distil: {a: &shared {k: 1}, b: *shared}\n"
    assert overridden(text, tmp_path) != with_other_leaves(yaml.safe_load(text))


def overridden(text: str, folder: Path) -> Any:
    """The tree after an override of each leaf, as `dvc exp run -S` does it. No two leaves get one value: none hides another's."""
    (folder / "params.yaml").write_text(text)
    changes = [f"{'.'.join(keys)}={value}" for keys, value in leaves(with_other_leaves(yaml.safe_load(text)))]
    assert len(changes) > 1
    apply_overrides(folder / "params.yaml", changes)
    return yaml.safe_load((folder / "params.yaml").read_text())


def with_other_leaves(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """A tree of the same keys, each of whose leaves holds its own name."""
    return {
        key: with_other_leaves(value, f"{above}{key}-") if isinstance(value, dict) else f"{above}{key}"
        for key, value in tree.items()
    }


def leaves(tree: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*above, key))
        else:
            yield (*above, key), value


@shipped
def test_dvc_finds_the_stages_of_shipped_params(file: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(file.read_text())
    entries = [f"{stage}@{entry}" for stage in command.STAGES if stage not in command.SINGLE for entry in tree.get(stage, ())]
    assert stages_in(tmp_path, tree) == sorted([*entries, *command.SINGLE])


def test_params_need_no_other_section_than_those_they_are_told_to_have(tmp_path: Path) -> None:
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert stages_in(tmp_path, {key: tree[key] for key in NEEDED} | {"evaluate": {}}) == sorted(command.SINGLE)


def stages_in(folder: Path, tree: dict[str, Any]) -> list[str]:
    shutil.copy(ROOT / "dvc.yaml", folder)
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text("[core]\n    no_scm = true\n")
    (folder / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    with Repo(str(folder)) as repo:
        return sorted(stage.name for stage in repo.index.stages)


# The check ------------------------------------------------------------------------------------------------------------


def complaints(house: Path, **changes: Any) -> list[str]:
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name, change in changes.items():
        tree[name] = {**tree.get(name, {}), **change} if isinstance(change, dict) else change
    (house / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    with pytest.raises(ParamsError) as error:
        command.check(Path("params.yaml"))
    return str(error.value).removeprefix("params.yaml: ").split("\n")


STUDENT = {"init": "scratch", "teacher": "teach/teacher", "images": "dedup/train"}
NAMED = {"model": "student", "view": "scene", "training": "equal"}


def test_all_mistakes_are_told_at_once(house: Path) -> None:
    told = complaints(
        house,
        seed=-1,
        machine={"devcie": "cpu"},
        prepare={"root": "data/draw/scene"},
        trainings={"long": {"step": 3}},
        distil={
            "far": {**STUDENT, **NAMED, "teacher": "teach/teecher"},
            "lost": {**STUDENT, **NAMED, "images": "dedup/tarin", "init": "teech/teacher"},
            "plain": {**STUDENT, **NAMED, "view": {"kind": "none"}, "training": "eqaul"},
        },
        evaluate={"far": {"model": "distil/fra"}},
        pack=None,
        compare={"baseline": "basline"},
    )
    assert told == [
        "`seed` is -1: it must be an integer of at least 0.",
        "`machine.devcie` is not a known key (did you mean `device`?). Remove or correct it.",
        "`trainings.long.steps` is required but missing.",
        "`trainings.long.step` is not a known key (did you mean `steps`?). Remove or correct it.",
        "`compare.baseline` is 'basline': there is no `basline` in `evaluate` (did you mean `baseline`?). Correct it.",
        "`distil.far.teacher` is 'teach/teecher': there is no `teecher` in `teach` (did you mean `teacher`?). Correct it.",
        "`distil.lost.init` is 'teech/teacher': no stage makes it, and data/teech/teacher is not there (did you mean `teach`?)."
        " Correct it.",
        "`distil.lost.images` is 'dedup/tarin': there is no `tarin` in `dedup` (did you mean `train`?). Correct it.",
        "`distil.plain.view` is {'kind': 'none'}: it must be the name of one of `views`. Write `views: {<name>: {...}}` at the "
        "top of the file, and here `view: <name>`.",
        "`distil.plain.training` is 'eqaul': there is no `trainings.eqaul` (did you mean `equal`?). Add or correct it.",
        "`evaluate.far.role` is required but missing.",
        "`evaluate.far.model` is 'distil/fra': there is no `fra` in `distil` (did you mean `far`?). Correct it.",
        "`pack` is None: it must be a mapping of names. Write `pack: {}`, or leave it out.",
        "`prepare.root` is 'data/draw/scene', which is not there. Correct it, or put the images there.",
    ]


def test_the_baseline_of_a_comparison_is_an_entry_of_that_role(house: Path) -> None:
    told = complaints(house, compare={"baseline": "kd"})
    assert told == [
        "`compare.baseline` is 'kd', whose role is control. Name an entry of `evaluate` with `role: baseline` "
        "(there is baseline)."
    ]


def test_what_dvc_needs_is_asked_for(house: Path) -> None:
    (house / "params.yaml").write_text("pols: {}\n")
    with pytest.raises(ParamsError) as error:
        command.check(Path("params.yaml"))
    assert all(f"`{key}` is missing. Write `{example}`." in str(error.value) for key, example in NEEDED.items())
    assert "nothing reads the key `pols`" in str(error.value)


def test_an_alias_is_refused_since_overrides_below_it_are_lost(house: Path) -> None:
    text = (ROOT / "params.yaml").read_text().replace("  teacher: {steps", "  teacher: &it {steps", 1)
    (house / "params.yaml").write_text(
        text.replace("  short: {steps: 60, batch: 128, lr: 1.0e-3, weight_decay: 2.0e-3, warmup: 0}", "  short: *it")
    )
    with pytest.raises(ParamsError, match=r"line \d+: the alias `\*it`"):
        command.check(Path("params.yaml"))


def test_only_teach_can_do_without_training(house: Path) -> None:
    shelf = {"as_it_is": {"steps": 0}}
    told = complaints(
        house,
        trainings=shelf,
        teach={"kept": {"init": "teach/teacher", **NAMED, "training": "as_it_is"}},
        distil={"kept": {**STUDENT, **NAMED, "training": "as_it_is"}},
    )
    assert told == ["`distil.kept.training`: `steps: 0` learns nothing; only `teach` can keep a model as it comes."]


def test_the_command_ends_with_2_and_starts_neither_dvc_nor_prefect_nor_mlflow(house: Path) -> None:
    shutil.copy(ROOT / "params.yaml", house / "params.yaml")
    (house / "bad.yaml").write_text("seed: [")
    code = (
        "import sys; from pipeline import __main__ as m\n"
        "sys.argv = ['', 'check']; m.main()\n"
        "print([name for name in ('dvc', 'prefect', 'mlflow') if name in sys.modules])\n"
        "sys.argv = ['', 'check', '--params', 'bad.yaml']; m.main()"
    )
    start = [sys.executable, "-c", code]
    done = subprocess.run(start, cwd=house, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr.startswith("error: bad.yaml is not valid YAML")
    assert "Traceback" not in done.stderr


def test_a_source_that_names_no_entry_of_remote_is_named(house: Path) -> None:
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    tree["remote"] = {"crawl": {"url": "s3://bucket/crawl"}}
    tree["prepare"]["pool"] = [{"kind": "tar", "remote": name, "path": "*.tar"} for name in ("crawl", "crawel")]
    (house / "params.yaml").write_text(yaml.safe_dump(tree))
    told = "`prepare.pool.1.remote` is 'crawel': there is no `crawel` in `remote` (did you mean `crawl`?)"
    with pytest.raises(ParamsError, match=re.escape(told)) as error:
        command.check(house / "params.yaml")
    assert "pool.0" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "entry", "key", "named", "what"),
    [
        ("distil", "ssld", "teacher", "select/top", "`select` makes no models or cached labels"),
        ("distil", "ssld", "images", "score/teacher", "`score` makes no images"),
        ("distil", "finetune", "init", "dedup/train", "`dedup` makes no models"),
        ("select", "top", "scores", "teach/teacher", "`teach` makes no scores"),
        ("evaluate", "ssld", "model", "select/top", "`select` makes no models"),
    ],
)
def test_a_reference_of_another_kind_is_named(house: Path, section: str, entry: str, key: str, named: str, what: str) -> None:
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    tree[section][entry][key] = named
    (house / "params.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ParamsError, match=f"`{section}.{entry}.{key}` is '{named}', but {what}: .* do[.]"):
        command.check(house / "params.yaml")
