"""Killed stages end with the bytes of undisturbed ones, and a flipped bit is an error: see tests/faults."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.whole
@pytest.mark.timeout(1500)  # seconds; about one minute on an idle core
def test_sixty_kills_and_a_flipped_bit_in_every_artifact() -> None:
    """In a process of its own: a fork must not copy the locks of the threads that earlier tests have started."""
    command = [sys.executable, "-m", "tests.faults", "--kills", "60"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 gone wrong" in done.stdout
