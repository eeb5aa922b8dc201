"""Save and load models. Users call `RETRO.save_pretrained` and `RETRO.from_pretrained`.

A model is a folder with two files: `model.safetensors` holds every parameter under its name in the network, and
`config.json` every argument of RETROConfig. config.json is written last, so a folder that has one is complete.
Loading refuses unknown tensors and config keys.
"""

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from retro_model.core.errors import ConfigError, DamagedArtifactError, MismatchError, MissingArtifactError
from retro_model.network.config import RETROConfig

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


class _SkipInitialization(TorchFunctionMode):
    """While it is entered, the functions of torch.nn.init leave their tensor as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_weights() -> Iterator[None]:
    """Networks that are built in this block have names and shapes, but no memory for weights."""
    # To draw random weights on the device meta, torch would import its compiler: as slow as `import torch`.
    with torch.device("meta"), _SkipInitialization():
        yield


def save_model(folder: str | os.PathLike[str], config: RETROConfig, weights: Mapping[str, Tensor]) -> None:
    """Write a model's weights and config to `folder`, creating it if needed."""
    save_folder(folder, config.to_dict(), weights, WEIGHTS_NAME)


def save_folder(
    folder: str | os.PathLike[str], config: Mapping[str, Any], weights: Mapping[str, Tensor], weights_name: str
) -> None:
    """Write weights and config.json to `folder`, creating it if needed.

    Equal weights give equal bytes. Each file is written atomically.
    """
    folder = Path(folder)
    text = json.dumps(config, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).unlink(missing_ok=True)  # marks the folder as incomplete until everything is written
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_tensors(tensors, folder / f"{weights_name}.part", metadata={"format": "pt"})
    os.replace(folder / f"{weights_name}.part", folder / weights_name)
    (folder / f"{CONFIG_NAME}.part").write_text(text, encoding="utf-8")
    os.replace(folder / f"{CONFIG_NAME}.part", folder / CONFIG_NAME)


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError for a full disk, as for any other file."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    path.chmod(stat.S_IMODE(mode))  # safetensors lets only the owner read what it writes


def load_config(folder: str | os.PathLike[str]) -> RETROConfig:
    """The config of the model in `folder`.

    Raises MissingArtifactError, DamagedArtifactError or ConfigError.
    """
    path, values = Path(folder) / CONFIG_NAME, read_config(folder)
    try:
        return RETROConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of config.json in `folder`. Raises MissingArtifactError or DamagedArtifactError."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise MissingArtifactError(f"{path} is not there: no model was saved in this folder, or not to its end")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedArtifactError(f"{path} is not JSON: {error}; save the model again") from error
    if not isinstance(values, dict):
        raise DamagedArtifactError(f"{path} must hold an object with a model's config: {type(values).__name__}")
    return values


def load_weights(folder: str | os.PathLike[str], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the model in `folder`: see `load_tensors`."""
    return load_tensors(Path(folder) / WEIGHTS_NAME, expected)


def load_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by name; they must have the names and shapes of `expected`.

    Raises MissingArtifactError, DamagedArtifactError or MismatchError.
    """
    if not path.is_file():
        raise MissingArtifactError(f"{path} is not there, though {CONFIG_NAME} is; save the model again")
    try:
        # Copied, because `load_file` maps the file: if that is changed or cut later, so are the weights, or a signal
        # ends the process.
        weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise DamagedArtifactError(f"{path} cannot be read: {error}; save the model again") from error
    check_names(set(weights), set(expected), str(path))
    _check_shapes(weights, expected, str(path))
    return weights


def check_names(found: set[str], expected: set[str], where: str) -> None:
    """Raise MismatchError unless the names found are exactly the expected ones."""
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
