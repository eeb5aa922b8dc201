"""Models on disk; `RETRO.save_pretrained` and `RETRO.from_pretrained` are what users call.

A model is a folder of two files: `model.safetensors`, every parameter under its name in the network,
and `config.json`, every argument of RETROConfig. config.json is written last, so a folder that has one
is whole. Readers refuse what they do not know.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from retro_model.core.errors import ConfigError, DamagedArtifactError, MismatchError, MissingArtifactError
from retro_model.network.config import RETROConfig

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


def save_model(folder: str | os.PathLike[str], config: RETROConfig, weights: Mapping[str, Tensor]) -> None:
    """Write a model's weights and config into `folder`, which is made if it is not there.

    Equal weights give equal bytes. Each file appears whole or not at all.
    """
    folder = Path(folder)
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).unlink(missing_ok=True)  # without it the folder holds no model, until all is written
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_tensors(tensors, folder / f"{WEIGHTS_NAME}.part", metadata={"format": "pt"})
    os.replace(folder / f"{WEIGHTS_NAME}.part", folder / WEIGHTS_NAME)
    (folder / f"{CONFIG_NAME}.part").write_text(text, encoding="utf-8")
    os.replace(folder / f"{CONFIG_NAME}.part", folder / CONFIG_NAME)


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file; a full disk is the OSError that it is for any other file."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def load_config(folder: str | os.PathLike[str]) -> RETROConfig:
    """The config of the model in `folder`."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise MissingArtifactError(f"{path} is not there: no model was saved in this folder, or not to its end")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedArtifactError(f"{path} is not JSON: {error}; save the model again") from error
    if not isinstance(values, dict):
        raise DamagedArtifactError(f"{path} must hold an object with a model's config: {type(values).__name__}")
    try:
        return RETROConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def load_weights(folder: str | os.PathLike[str], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the model in `folder`, by their names in the network; `expected` says which, and their shapes."""
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise MissingArtifactError(f"{path} is not there, though {CONFIG_NAME} is; save the model again")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise DamagedArtifactError(f"{path} cannot be read: {error}; save the model again") from error
    check_names(set(weights), set(expected), str(path))
    _check_shapes(weights, expected, str(path))
    return weights


def check_names(found: set[str], expected: set[str], where: str) -> None:
    """Raise MismatchError unless the tensors found are those of the network."""
    if missing := sorted(expected - found):
        raise MismatchError(f"{where} lacks {len(missing)} tensors of the network, the first is {missing[0]}")
    if extra := sorted(found - expected):
        raise MismatchError(f"{where} has {len(extra)} tensors that the network lacks, the first is {extra[0]}")


def _check_shapes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    for name in sorted(expected):
        if found[name].shape != expected[name].shape:
            raise MismatchError(
                f"{where}: {name} must have the shape {tuple(expected[name].shape)} by {CONFIG_NAME}: "
                f"{tuple(found[name].shape)}"
            )
