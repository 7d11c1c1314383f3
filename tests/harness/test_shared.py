"""Processes of a group share memory: each sees what the others wrote."""

import os
import subprocess
import sys
from pathlib import Path

from pipeline.harness import shared

ROOT = Path(__file__).parents[2]
CODE = """
import os
from pipeline.harness.shared import Memory
rank, sums = int(os.environ["LOCAL_RANK"]), []
for size in (10, 1000):
    memory = Memory(size)
    memory.bytes[rank:size:2] = bytes([rank + 1]) * (size // 2)
    memory.meet()
    sums.append(sum(memory.bytes[:size]))
print(sums)
"""


def test_each_process_sees_what_the_others_wrote(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "LOCAL_WORLD_SIZE": "2"}
    group = [
        subprocess.Popen(
            [sys.executable, "-c", CODE],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 0)
    ]
    assert [process.communicate(timeout=60)[0] for process in group] == ["[15, 1500]\n"] * 2
    assert not list(tmp_path.iterdir())


def test_a_process_alone_shares_nothing() -> None:
    assert not shared.is_possible()
