"""Prefect's private parts."""

from typing import Any

from prefect.client.schemas.objects import State

KNOWN = "3.8.8"
"""The release of Prefect on which all of this was tried."""


def raised(state: State[Any]) -> Any:
    """What a task raised, of the state that Prefect shows to a `retry_condition_fn`. The documented `state.result()` is a
    coroutine there, which a condition that is no coroutine cannot wait for."""
    return state.data


def timed_out(error: Any) -> bool:
    """Whether a task was ended because of its time limit."""
    from prefect.task_engine import TaskRunTimeoutError

    return isinstance(error, TaskRunTimeoutError)
