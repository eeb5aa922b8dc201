"""Save and load the adapters. Users call `Retrofit.save_pretrained` and `Retrofit.from_pretrained`.

A model is a folder: `adapters.safetensors` holds every new weight, and `config.json` the settings and what identifies
the base. If the base was trained too, it is in the folder `base`. config.json is written last, so a folder that has
one is complete.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from retro_model.core.errors import ConfigError, DamagedArtifactError, MismatchError, SourceError
from retro_model.network.pretrained import CONFIG_NAME, load_tensors, read_config, save_folder
from retro_model.retrofit.bases import load_base, save_base, weights_digest
from retro_model.retrofit.config import WEIGHTS_NAME, AdapterConfig

if TYPE_CHECKING:
    from retro_model.retrofit.model import Retrofit

BASE_FOLDER = "base"
_BASE_KEYS = {"name", "revision", "dtype", "sha256"}


def save(model: "Retrofit", folder: str | os.PathLike[str], weights: Mapping[str, Tensor], with_base: bool) -> None:
    """Write the adapters and their config, and with `with_base` the base.

    `weights` are `own_weights` of this model. What they lack of the base is the model's.
    """
    adapters, of_base = (_without_prefix(weights, prefix) for prefix in ("adapters.", "base."))
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(model.settings).items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / CONFIG_NAME).unlink(missing_ok=True)
    if with_base:
        parameters = {name for name, _ in model.base.named_parameters(remove_duplicate=False)}  # tied ones twice
        buffers = {name: tensor for name, tensor in model.base.state_dict().items() if name not in parameters}
        state = {**buffers, **dict(model.base.named_parameters()), **of_base}
        save_base(model.base, Path(folder) / BASE_FOLDER, state)
    config = {"base": describe_base(model, of_base), **values}
    save_folder(folder, config, adapters, WEIGHTS_NAME)


def describe_base(model: "Retrofit", weights: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """What identifies a model's base: name, revision on the hub, number type, and the sha256 of its weights.

    `weights` are those that replace the base's.
    """
    return {
        "name": model.base_name,
        "revision": getattr(model.base.config, "_commit_hash", None),
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "sha256": weights_digest({**dict(model.base.named_parameters()), **(weights or {})}),
    }


def _without_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def load(
    kind: type["Retrofit"],
    folder: str | os.PathLike[str],
    base: PreTrainedModel | str | os.PathLike[str] | None,
    chunk_size: int | None,
    freeze: bool,
) -> "Retrofit":
    """Load the adapters in `folder` onto their base: see `Retrofit.from_pretrained`."""
    path = Path(folder) / CONFIG_NAME
    values = read_config(folder)
    made_for = _base_of(values.pop("base", None), path)
    config = _parse({"retrieval": True, **values}, path)  # the first folders did not have it
    if chunk_size not in (None, config.chunk_size):
        raise MismatchError(
            f"{folder}: adapters for chunks of {config.chunk_size} tokens, expected {chunk_size}; use chunks of that "
            "size, or train other adapters"
        )
    loaded = base if isinstance(base, PreTrainedModel) else _load_base(Path(folder), base, made_for)
    found = weights_digest(dict(loaded.named_parameters()))
    if found != made_for["sha256"]:
        raise MismatchError(
            f"{folder}: adapters for {made_for['name'] or 'a base'} in {made_for['dtype']} (sha256 "
            f"{made_for['sha256'][:12]}), found {loaded.name_or_path or 'a base'} in "
            f"{str(loaded.dtype).removeprefix('torch.')} ({found[:12]}); load the base that they were trained with"
        )
    model = kind(loaded, freeze=freeze, **vars(config))
    weights = load_tensors(Path(folder) / WEIGHTS_NAME, model.adapter_state_dict())
    device = model.embedding.weight.device
    model.adapters.load_state_dict({name: tensor.to(device) for name, tensor in weights.items()}, assign=True)
    return model.eval()


def _base_of(found: Any, path: Path) -> dict[str, Any]:
    """The description of the base in config.json, checked; the first folders had no revision."""
    made_for = {"revision": None, **found} if isinstance(found, dict) else None
    if not (
        made_for is not None
        and made_for.keys() == _BASE_KEYS
        and all(isinstance(value, str) for name, value in made_for.items() if name != "revision")
        and isinstance(made_for["revision"], str | None)
        and isinstance(getattr(torch, made_for["dtype"], None), torch.dtype)
    ):
        raise DamagedArtifactError(f"{path} does not say which base its adapters are for; is it a Retrofit's folder?")
    return made_for


def _parse(values: dict[str, Any], path: Path) -> AdapterConfig:
    try:
        return AdapterConfig.parse(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _load_base(folder: Path, base: str | os.PathLike[str] | None, made_for: Mapping[str, Any]) -> PreTrainedModel:
    """The base that was named, or the one beside the adapters, or the one of the recorded name."""
    dtype = getattr(torch, made_for["dtype"])
    if base is not None:
        return load_base(base, dtype)
    if (folder / BASE_FOLDER).is_dir():
        return load_base(folder / BASE_FOLDER, dtype)
    if not made_for["name"]:
        raise SourceError(f"{folder}: the base of these adapters has no name; pass it: from_pretrained(folder, base)")
    return load_base(made_for["name"], dtype, made_for["revision"])
