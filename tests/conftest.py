"""What every test gets."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A stage that runs as a function sets the number of threads of this process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
