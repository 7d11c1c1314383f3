"""Who am I in a group of processes that train together? What torchrun says in the environment, without torch."""

import os
import sys
from collections.abc import Sequence

from pipeline.harness import parent


def rank() -> int:
    """The number of this process: 0 writes, and is all there is outside of torchrun."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """The number of processes in the group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_this_machine() -> int:
    """The number of processes of the group on this machine, which share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """The number of this process among those on this machine: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this process writes, and tells how far the group has come."""
    return rank() == 0


def launched() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ


def launch(processes: int, module: str, argv: Sequence[str]) -> None:
    """Become torchrun with `processes` copies of `python -m module argv...` on this machine; does not return."""
    if sys.platform == "linux":  # one machine: nothing listens on its network
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun would set it and say so; `machine.threads` rules after all
    os.environ[parent.LAUNCHER] = str(os.getpid())
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", module, *argv]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *command])
