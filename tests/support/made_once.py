"""Folders that tests of several files read: made by the first worker of pytest that needs one, for all of them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from retro_model.core.artifacts import one_at_a_time


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder of that name, which `make` has filled once in this run of pytest; to be read, never changed."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    whole = folder.with_suffix(".whole")
    with one_at_a_time(whole):
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker in which `make` failed
            folder.mkdir()
            make(folder)
            whole.touch()
    return folder
