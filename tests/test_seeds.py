"""The table of differences over several seeds."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from benchmarks import seeds
from pipeline.report import evaluation
from tests.evaluations import evaluated

ROLES = {"baseline": "baseline", "kd": "control", "ssld": "candidate"}


def seed_of(folder: Path, right: dict[str, int], clean: evaluation.Clean | None = None) -> Path:
    """A seed's workspace with 100 validation images, of which each entry names the first ones right."""
    entries = {name: {"role": role, "model": "-"} for name, role in ROLES.items()}
    folder.mkdir()
    (folder / "params.yaml").write_text(yaml.safe_dump({"evaluate": entries, "compare": {"baseline": "baseline"}}))
    for name, count in right.items():
        out = folder / "data" / "evaluate" / name
        out.mkdir(parents=True)
        columns = {
            "id": [str(i) for i in range(100)],
            "label": [1] * 100,
            "predicted": (np.arange(100) < count).astype(int).tolist(),
        }
        table = pa.table({**columns, "confidence": [0.5] * 100}, schema=evaluation.PREDICTED)
        of_role = evaluated().model_copy(update={"role": ROLES[name], "clean": clean})
        evaluation.write(out, of_role, {"val": table}, pa.table({"class": ["a"]}), b"{}")
    return folder


def test_each_entry_is_paired_with_the_baseline_and_each_candidate_with_each_control(tmp_path: Path) -> None:
    folders = [
        seed_of(tmp_path / "0", {"baseline": 50, "kd": 60, "ssld": 90}),
        seed_of(tmp_path / "1", {"baseline": 50, "kd": 60, "ssld": 40}),
    ]
    lines = seeds.differences(folders).splitlines()
    rows = {tuple(cells[:2]): cells for line in lines[5:] if (cells := [c.strip() for c in line.strip("|").split("|")])}
    assert list(rows) == [("kd", "baseline"), ("ssld", "baseline"), ("ssld", "kd")]
    assert rows["kd", "baseline"][2:3] + rows["kd", "baseline"][4:] == ["+10.0", "+10.0 / +10.0", "10 / 10", "0 / 0"]
    assert rows["ssld", "kd"][2:3] + rows["ssld", "kd"][4:] == ["+5.0", "+30.0 / -20.0", "30 / 0", "0 / 20"]
    low, high = (float(end) for end in rows["ssld", "kd"][3].split(" to "))
    assert low < -20 + 10
    assert high > 30 - 10


def test_clean_val_stands_beside_val_where_it_is_known(tmp_path: Path) -> None:
    right = {"baseline": 50, "kd": 60, "ssld": 90}
    known = [evaluation.Clean(n=80, top1=top1, top1_low=0.3, top1_high=0.6) for top1 in (0.4, 0.5)]
    text = seeds.table([seed_of(tmp_path / str(i), right, clean) for i, clean in enumerate(known)])
    assert "| baseline | 50.0 ± 0.0 | 50.0 / 50.0 | 45.0 ± 7.1 |" in text
    assert "Clean val has 80 of 90 images." in text
    unknown = seeds.table([seed_of(tmp_path / "unknown", right)])
    assert "| baseline | 50.0 | 50.0 | – |" in unknown
    assert "Clean val" not in unknown
