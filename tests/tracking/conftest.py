"""A real MLflow on SQLite."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from mlflow.tracking import MlflowClient

from pipeline.harness import journal
from pipeline.tracking.experiment import Experiment
from tests.tracking.journals import FOLDER, open_store


@pytest.fixture(scope="module", autouse=True)
def quick_databases() -> Iterator[None]:
    """SQLite need not wait for the disk here, nor keep connections to files that tests replace."""

    def hurry(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", hurry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
        yield
    sqlalchemy.event.remove(sqlalchemy.engine.Engine, "connect", hurry)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, which take it more than a second to create."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}")
    return file


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, where stages start mirrors; those end when the folder of the journals is gone."""
    for name in ("WINNOW_TRACKING", "DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shutil.rmtree(FOLDER, ignore_errors=True)


@pytest.fixture
def store(project: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """A database in the project, and no mirror but the one that the test drives itself."""
    shutil.copy(empty_database, project / "mlflow.db")
    # With the whole path: MLflow keeps one connection per address, and would give each test that of the first.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    monkeypatch.setattr(journal, "start_mirror", lambda folder: None)
    return open_store(project)
