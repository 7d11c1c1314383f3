"""A process that ends with the one that started it, also where that one was killed and could not say so.

Imports nothing that takes time: it is the first thing that a stage does.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.harness import dvc

LAUNCHER = "WINNOW_LAUNCHER"
"""The number of the torchrun that `ranks.launch` becomes, in the environment of the processes that it starts."""


def end_with_starter() -> None:
    """End with the DVC, or the torchrun, that started this stage, and at once if it has ended already."""
    if "RANK" in os.environ:
        launcher = os.environ.get(LAUNCHER)
        end_with(signal.SIGTERM, lambda: launcher is None or os.getppid() == int(launcher))
    elif dvc.runs_this():
        end_with(signal.SIGTERM, _is_dvcs_child)


def end_with(number: signal.Signals, is_alive: Callable[[], bool]) -> None:
    """Have the kernel send this process a signal when its parent ends. `is_alive`: whether the parent is still the starter."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(number))
        if not is_alive():  # of a parent that ended before it was asked, the kernel says nothing
            os.kill(os.getpid(), number)


def _is_dvcs_child() -> bool:
    """Whether the parent may still be DVC or its shell. Neither begins a session of its own for a stage; who adopts an orphan,
    the first process or a manager of the user's services, is of another session, or else the first process of a container."""
    parent = os.getppid()
    try:
        return os.getsid(parent) == os.getsid(0) and (parent != 1 or b"python" in Path("/proc/1/cmdline").read_bytes())
    except ProcessLookupError:
        return False
