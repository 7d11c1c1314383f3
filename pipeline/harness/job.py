"""What a stage that trains needs beside its params and paths."""

from pathlib import Path
from typing import NamedTuple

from pipeline.harness.journal import Journal
from pipeline.harness.machine import Machine


class Job(NamedTuple):
    """One run of such a stage: a `run` that asks for a `job` depends on the seed, and its unfinished work is kept."""

    seed: int
    workdir: Path
    """Where checkpoints wait for a killed run; one folder for each set of inputs."""
    journal: Journal
    machine: Machine
