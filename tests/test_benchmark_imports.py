"""The leak check's benchmarks ask for a peer's package only where they compare with it."""

import subprocess
import sys


def test_speed_and_logos_need_no_peer() -> None:
    code = "import sys; sys.modules.update(imagehash=None, imagededup=None); import benchmarks.dedup.__main__"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
