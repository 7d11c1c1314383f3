"""What every test gets."""

from collections.abc import Iterator

import pytest
import torch
from playwright.sync_api import Browser

from tests.browser import started


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files come first, or one worker would still be at the last of them when the others have ended."""
    long = {item.path for item in items if item.get_closest_marker("flows") or item.get_closest_marker("whole")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A stage that runs as a function sets the number of threads of this process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For one file of tests: while it is open, its thread has an event loop, which asyncio.run of other files would refuse."""
    with started() as browser:
        yield browser
