"""Fixtures of the tests of the engine."""

from pathlib import Path

import pytest


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    """An empty folder in which jobs write down what they do."""
    (tmp_path / "diary").mkdir()
    return tmp_path / "diary"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes in all data stages, in small parts; to be read only."""
    from data_stages import quiet_run
    from made_once import made_once

    return made_once(tmp_path_factory, "data_stages", quiet_run)
