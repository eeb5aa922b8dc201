"""RETRO (Borgeaud et al. 2022): retrieval-enhanced language models. `from retro_model import RETRO`.

Public names are imported on first use, so that `import retro_model` is fast.
"""

import importlib
from typing import Any

# name -> the module that defines it
_PUBLIC = {
    "RETRO": "retro_model.network.model",
    "RETROConfig": "retro_model.network.config",
    "RETRODataset": "retro_model.memmaps.files",
    "Retrofit": "retro_model.retrofit.model",
    "Retriever": "retro_model.inference.retriever",
    "TrainingWrapper": "retro_model.memmaps.wrapper",
    "generate": "retro_model.inference.generation",
}

__all__ = ["RETRO", "RETROConfig", "RETRODataset", "Retriever", "Retrofit", "TrainingWrapper", "generate"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'retro_model' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
