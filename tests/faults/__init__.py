"""Stages killed with SIGKILL at random moments, and artifacts with a flipped bit: `python -m tests.faults`."""
