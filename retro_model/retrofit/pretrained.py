"""Save and load the adapters. Users call `Retrofit.save_pretrained` and `Retrofit.from_pretrained`.

A model is a folder: `adapters.safetensors` holds every new weight, and `config.json` the settings, and name, number
type and sha256 of the base. If the base was trained too, it is in the folder `base`. config.json is written last, so a
folder that has one is complete.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from retro_model.core.errors import ConfigError, DamagedArtifactError, MismatchError, SourceError
from retro_model.network.pretrained import CONFIG_NAME, load_tensors, read_config, save_folder
from retro_model.retrofit.bases import load_base, weights_digest
from retro_model.retrofit.config import AdapterConfig

if TYPE_CHECKING:
    from retro_model.retrofit.model import Retrofit

WEIGHTS_NAME = "adapters.safetensors"
BASE_FOLDER = "base"
_BASE_KEYS = {"name", "dtype", "sha256"}


def save(model: "Retrofit", folder: str | os.PathLike[str], with_base: bool) -> None:
    """Write the adapters and their config, and with `with_base` the base."""
    base = {
        "name": model.base.name_or_path,
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "sha256": weights_digest(model.base),
    }
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(model.settings).items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / CONFIG_NAME).unlink(missing_ok=True)
    if with_base:
        model.base.save_pretrained(Path(folder) / BASE_FOLDER)
    save_folder(folder, {"base": base, **values}, model.adapter_state_dict(), WEIGHTS_NAME)


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
    made_for = values.pop("base", None)
    if not (
        isinstance(made_for, dict)
        and made_for.keys() == _BASE_KEYS
        and all(isinstance(value, str) for value in made_for.values())
        and isinstance(getattr(torch, made_for["dtype"], None), torch.dtype)
    ):
        raise DamagedArtifactError(f"{path} does not say which base its adapters are for; is it a Retrofit's folder?")
    config = _parse(values, path)
    if chunk_size not in (None, config.chunk_size):
        raise MismatchError(
            f"{folder}: adapters for chunks of {config.chunk_size} tokens, expected {chunk_size}; use chunks of that "
            "size, or train other adapters"
        )
    loaded = base if isinstance(base, PreTrainedModel) else _load_base(Path(folder), base, made_for)
    found = weights_digest(loaded)
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


def _parse(values: dict[str, Any], path: Path) -> AdapterConfig:
    try:
        return AdapterConfig.parse(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _load_base(folder: Path, base: str | os.PathLike[str] | None, made_for: dict[str, str]) -> PreTrainedModel:
    """The base that was named, or the one beside the adapters, or the one of the recorded name."""
    if base is None:
        base = folder / BASE_FOLDER if (folder / BASE_FOLDER).is_dir() else made_for["name"]
    if not base:
        raise SourceError(f"{folder}: the base of these adapters has no name; pass it: from_pretrained(folder, base)")
    return load_base(base, getattr(torch, made_for["dtype"]))
