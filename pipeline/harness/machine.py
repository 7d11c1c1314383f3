"""How a stage runs on this machine: the section `machine`, which never changes what is computed."""

import os
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.harness import ranks
from pipeline.store.params import Section


class Machine(Section):
    """How to run, never what to compute: no stage is stale because this section changed.

    `device`: cpu, cuda, cuda:1, or auto (cuda where there is one). `precision`: the autocast type of training and inference;
    auto is bfloat16 on a GPU and on CPUs that multiply it in hardware, else float32. `threads` and `workers` 0: one per usable
    core. `memory_gb`: decoded images up to this size stay in memory; larger sets are decoded batch by batch.
    `checkpoint_minutes`: how much work a killed training run may lose. `processes`: how many train together, each on its part of
    every batch (one per GPU; torchrun starts them). `compile`: translate the networks with torch.compile: worth its
    start-up time on a GPU and in long runs. `executor`: who does the shards of `search`, `score`, `label` and `pack`: `local`,
    this machine, or `dask://HOST:PORT`, the workers of a cluster that sees the same folder (docs/operations.md).
    """

    device: str = "auto"
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    threads: NonNegativeInt = 0
    workers: NonNegativeInt = 0
    memory_gb: PositiveFloat = 4.0
    checkpoint_minutes: PositiveFloat = 5.0
    processes: PositiveInt = 1
    compile: bool = False
    executor: str = Field(default="local", pattern=r"^(local|dask://[^/:]+:\d+)$")

    def cores(self, wanted: int) -> int:
        """`wanted`, or this process's share of the usable cores if it is 0."""
        return wanted or max(1, len(os.sched_getaffinity(0)) // ranks.on_this_machine())
