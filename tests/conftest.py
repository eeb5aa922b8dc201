"""What all tests share: no network, no calls home, few threads."""

import os

# Set before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as stages/__init__.py does
os.environ["OMP_NUM_THREADS"] = "1"  # pytest's workers share the cores, and so little work only loses by threads
os.environ["TOKENIZERS_PARALLELISM"] = "true"
for name in ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "RETRO_BERT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
    os.environ.pop(name, None)

import signal  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from retro_model.core.printable import print_log  # noqa: E402

# A shell starts what runs in its background deaf to Ctrl-C, and the children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def printed_log() -> None:
    """Tests read on standard output what the library logs, as users of the stages do."""
    print_log()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage has run once (tests/support/stagewise.py); to be copied, never changed."""
    from made_once import made_once
    from stagewise import run_all

    return made_once(tmp_path_factory, "pipeline", run_all)
