"""What every test gets."""

from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files come first, or one worker would still be at the last of them when the others have ended."""
    items.sort(key=lambda item: not any(item.get_closest_marker(name) for name in ("flows", "whole")))


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A stage that runs as a function sets the number of threads of this process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
