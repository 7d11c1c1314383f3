"""How a stage runs on this machine: the section `machine`, for which nothing is made again."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.harness import ranks
from pipeline.store.params import Section


class Machine(Section):
    """How to run: no stage is stale because this section changed, though `precision` and `processes` change digits."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto`: cuda where there is one."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """The autocast type of training and inference; classifier layers and `evaluate` are float32 always. `auto` is bfloat16 on a
    GPU and on CPUs that multiply it in hardware, else float32. What is float32 is exact: no TF32."""
    threads: NonNegativeInt = 0
    """Threads of a process that computes; 0: one per usable core."""
    workers: NonNegativeInt = 0
    """Threads that decode, or processes that do shards; 0: one per usable core."""
    memory_gb: PositiveFloat = 4.0
    """Decoded images up to this size stay in memory, in gigabytes, once for all processes that train together on a machine;
    larger sets are decoded batch by batch. `select` sorts within it, too."""
    checkpoint_minutes: PositiveFloat = 5.0
    """How much work a killed training may lose, in minutes."""
    processes: PositiveInt = 1
    """How many train together, each on its share of every batch: one per GPU. torchrun starts them. A training that was stopped
    goes on with any other number."""
    compile: bool = False
    """Translate the networks with torch.compile: worth its start-up time on a GPU and in long runs."""
    executor: str = Field(default="local", pattern=r"^(local|dask://[^/:]+:\d+)$")
    """Who does the shards of `search`, `score`, `label` and `pack`: `local`, this machine, or `dask://HOST:PORT`, the workers of
    a cluster that sees the same folder (docs/operations.md)."""

    def cores(self, wanted: int) -> int:
        """`wanted`, or this process's share of the usable cores if it is 0."""
        return wanted or max(1, len(os.sched_getaffinity(0)) // ranks.on_this_machine())


def processor() -> str:
    """The processor's name as the kernel says it; empty where it does not."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
