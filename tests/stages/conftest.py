"""Manifests that the tests of the stages read."""

from pathlib import Path

import pytest

from tests.tiny import CLASSES, prepared


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("data"), CLASSES)
