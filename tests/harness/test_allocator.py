"""Freed memory is kept: what a network asks for layer after layer is not cleared by the kernel each time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import ctypes, resource, sys
from pipeline.harness import allocator
print(allocator.keep_freed() if sys.argv[1] == "keep" else "as it is")
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for turn in range(5):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = c.malloc(50 << 20)
    ctypes.memset(block, 1, 50 << 20)
    c.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="only the GNU C library is told how")
def test_a_freed_block_is_used_again_without_a_page_fault() -> None:
    def told(what: str, **environment: str) -> tuple[str, int]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        done = subprocess.run(
            [sys.executable, "-c", CODE, what],
            env={**clean, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        said, faults = done.stdout.split()[:-1], int(done.stdout.split()[-1])
        return " ".join(said), faults

    assert told("keep")[0] == "True"
    assert told("keep")[1] < 100
    assert told("leave")[1] > 100
    assert told("keep", MALLOC_MMAP_THRESHOLD_="131072")[0] == "False"
