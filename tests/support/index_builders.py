"""autofaiss, which requirements-next.lock leaves out: tests of it are skipped where it is not installed."""

import importlib.util
from typing import Any

import pytest
from paths import ROOT

from stages.common.params import read_yaml

INSTALLED = importlib.util.find_spec("autofaiss") is not None
needs_autofaiss = pytest.mark.skipif(not INSTALLED, reason="autofaiss is not installed (requirements-next.lock)")
BUILDERS = [pytest.param("autofaiss", marks=needs_autofaiss), "faiss"]  # for pytest.mark.parametrize


def committed_params() -> dict[str, Any]:
    """The content of params.yaml; index.builder is faiss where autofaiss is not installed."""
    content = dict(read_yaml(ROOT / "params.yaml"))
    if not INSTALLED:
        content["index"] = {**content["index"], "builder": "faiss"}
    return content
