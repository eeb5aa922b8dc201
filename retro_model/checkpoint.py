"""Models on disk, and retrieval for a decoder that was trained without it.

A model is a folder of two files: `model.safetensors`, every parameter under its name in the network,
and `config.json`, every argument of RETROConfig. config.json is written last, so a folder that has one
is whole. Readers refuse what they do not know.
"""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from retro_model.errors import ConfigError, DamagedArtifactError, MismatchError, MissingArtifactError
from retro_model.model import RETRO, RETROConfig

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


def save_pretrained(model: RETRO, folder: str | os.PathLike[str]) -> None:
    """Write a model's weights and config into `folder`, which is made if it is not there.

    Equal weights give equal bytes. Each file appears whole or not at all.
    """
    folder = Path(folder)
    config = json.dumps(model.config.to_dict(), indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).unlink(missing_ok=True)  # what is there is no model until the end
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(weights, folder / f"{WEIGHTS_NAME}.part", metadata={"format": "pt"})
    os.replace(folder / f"{WEIGHTS_NAME}.part", folder / WEIGHTS_NAME)
    (folder / f"{CONFIG_NAME}.part").write_text(config, encoding="utf-8")
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


def from_pretrained(
    folder: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> RETRO:
    """The model that `save_pretrained` wrote, in eval mode; in the dtype it was saved with unless told.

    Every tensor of the network must be there in its shape, and no other.
    """
    folder = Path(folder)
    config = load_config(folder)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise MissingArtifactError(f"{path} is not there, though {CONFIG_NAME} is; save the model again")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise DamagedArtifactError(f"{path} cannot be read: {error}; save the model again") from error
    model = _empty(config)
    expected = model.state_dict()
    _check_names(set(weights), set(expected), str(path))
    _check_shapes(weights, expected, str(path))
    model.load_state_dict(weights, assign=True)  # assign keeps the saved dtype
    for parameter in model.parameters():
        parameter.requires_grad_()
    return model.to(device=device, dtype=dtype).eval()


def retrofit(base: RETRO, *, freeze: bool = True, **overrides: Any) -> RETRO:
    """A model with retrieval around a decoder that was trained without (RETROfit, section 4.2.3).

    `overrides` are the fields of RETROConfig that belong to retrieval: those of the encoder and of
    cross-attention, and dropout. Encoder and cross-attention are new, the rest is a copy of `base`; without
    neighbors the logits are exactly those of `base`. With `freeze` only what is new is trained.
    """
    if base.config.retrieval:
        raise ConfigError("retrofit needs a model with retrieval=False: this one has retrieval already")
    for name in overrides:
        if not name.startswith("enc_") and name not in (
            "dec_cross_attn_layers",
            "copy_tokens",
            "cross_attn_sink",
            "dec_attn_dropout",
            "dec_ff_dropout",
        ):
            raise ConfigError(f"retrofit cannot change {name}: it belongs to the decoder that is there")
    model = RETRO.from_config(replace(base.config, retrieval=True, **overrides))
    reference = base.embedding.weight
    model.to(device=reference.device, dtype=reference.dtype)
    state = model.state_dict()
    copied = base.state_dict()
    _check_names(set(copied), set(copied) & set(state), "the base model")
    model.load_state_dict({**state, **copied})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not freeze or name not in copied)
    return model


def _empty(config: RETROConfig) -> RETRO:
    """A network whose weights take no memory yet."""
    with torch.device("meta"):
        return RETRO.from_config(config)


def _check_names(found: set[str], expected: set[str], where: str) -> None:
    if missing := sorted(expected - found):
        raise MismatchError(f"{where} lacks {len(missing)} tensors of the network, the first is {missing[0]}")
    if extra := sorted(found - expected):
        raise MismatchError(f"{where} has {len(extra)} tensors that the network lacks, the first is {extra[0]}")


def _check_shapes(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    for name in sorted(expected):
        if found[name].shape != expected[name].shape:
            raise MismatchError(
                f"{where}: {name} must have the shape {tuple(expected[name].shape)} by {CONFIG_NAME}: "
                f"{tuple(found[name].shape)}"
            )
