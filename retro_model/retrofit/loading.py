"""Open trained models, whatever kind they are: RETRO, or a Retrofit around its base.

model = open_model(Artifact.open("models/retro", "model"))
models = open_models({"baseline": one, "retro": another}, base="models/smollm2")
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from retro_model.core.artifacts import Artifact
from retro_model.network.language_model import LanguageModel
from retro_model.network.model import RETRO
from retro_model.network.pretrained import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_model(artifact: Artifact, base: str = "", device: torch.device | str = "cpu") -> LanguageModel:
    """Load the model of an artifact, in eval mode.

    `base` is the folder or hub name of the base that its adapters were trained with; "": the recorded name. A base
    that was trained too is in the artifact. A RETRO has none.

    Raises the errors of `RETRO.from_pretrained` and `Retrofit.from_pretrained`.
    """
    return open_models({"model": artifact}, base, device)["model"]


def open_models(
    artifacts: Mapping[str, Artifact], base: str = "", device: torch.device | str = "cpu"
) -> dict[str, LanguageModel]:
    """Load several models as `open_model` does; those with the same base share it."""
    loaded: dict[str, PreTrainedModel] = {}  # by the sha256 of its weights
    return {name: _open(artifact, base, device, loaded) for name, artifact in artifacts.items()}


def _open(
    artifact: Artifact, base: str, device: torch.device | str, loaded: dict[str, "PreTrainedModel"]
) -> LanguageModel:
    if not artifact.facts.get("base"):
        return RETRO.from_pretrained(artifact.folder, device=device)
    from retro_model.retrofit.model import Retrofit  # transformers takes seconds, and RETRO needs none of it

    digest = read_config(artifact.folder)["base"]["sha256"]
    named = None if not base or (artifact.folder / "base").is_dir() else base
    model = Retrofit.from_pretrained(
        artifact.folder, loaded.get(digest, named), chunk_size=artifact.facts["chunk_size"]
    ).to(device)
    loaded[digest] = model.base
    return model
