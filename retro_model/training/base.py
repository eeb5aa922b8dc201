"""Adapters around a base, a causal language model of transformers, in place of RETRO: `retrofit.base`.

model = around_base(RetrofitConfig(base="models/smollm2"), chunks.facts, 512, "float32", retrieval=True)
start_from_adapters(model, Artifact.open("models/retro", "model"))
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retro_model.core.artifacts import Artifact
from retro_model.core.devices import NumberType
from retro_model.core.errors import ConfigError, MismatchError
from retro_model.network.pretrained import load_tensors, read_config
from retro_model.retrofit.config import WEIGHTS_NAME, AdapterSizes
from retro_model.training.config import RetrofitConfig, TrainConfig

if TYPE_CHECKING:
    from retro_model.retrofit.model import Retrofit


def around_base(
    config: RetrofitConfig, facts: Mapping[str, Any], seq_len: int, number_type: NumberType, retrieval: bool
) -> "Retrofit":
    """A Retrofit with new adapters, or without `retrieval` the base alone, for chunks with the given facts.

    With the number type float32 the base is loaded in it, otherwise as it was saved.

    Raises SourceError if the base cannot be loaded or used, and ConfigError if settings or tokens do not fit it.
    """
    from retro_model.retrofit.bases import load_base  # transformers takes seconds, and RETRO needs none of it
    from retro_model.retrofit.model import Retrofit

    base = load_base(config.base, torch.float32 if number_type == "float32" else None)
    sizes = {field.name: getattr(config, field.name) for field in dataclasses.fields(AdapterSizes)}
    try:
        model = Retrofit(
            base,
            facts["chunk_size"],
            freeze=config.freeze == "decoder" or not retrieval,
            retrieval=retrieval,
            pad_id=facts["pad_id"],
            **sizes,
        )
    except ConfigError as error:
        raise ConfigError(f"retrofit.{error}") from error
    model.base_name = recorded_name(config.base)
    _check_tokens(model, facts, config.base)
    if seq_len > model.config.max_seq_len:
        allowed = f"at most {model.config.max_seq_len}, the longest text that {config.base} reads"
        raise ConfigError(f"seq_len: found {seq_len}, expected {allowed}")
    return model


def recorded_name(base: str) -> str:
    """How a base is named in what the pipeline writes: never by an absolute path."""
    return Path(base).name if Path(base).is_absolute() else base


def _check_tokens(model: "Retrofit", facts: Mapping[str, Any], base: str) -> None:
    """Raise ConfigError unless the base has an embedding for every token; padding needs none."""
    highest = facts["vocab_size"] - 1
    if facts["pad_id"] == highest:
        highest -= 1
    if highest >= model.vocab_size:
        raise ConfigError(
            f"tokenizer.name: token ids up to {highest}, expected at most {model.vocab_size - 1}, the last that "
            f"{base} knows; take its own tokenizer, and if that lacks begin or end, name tokens that it has as "
            "tokenizer.begin and tokenizer.end"
        )


def check_train_config(config: TrainConfig) -> None:
    """Raise ConfigError for training settings that work for RETRO alone."""
    for name in ("compile", "shard"):
        if getattr(config, name):
            raise ConfigError(f"train.{name}: found true, expected false with retrofit.base")


def start_from_adapters(model: "Retrofit", start: Artifact, base: Mapping[str, Any]) -> None:
    """Check that `start` has the base of `model`, which `base` describes; copy its adapters, if it has any.

    Raises MismatchError, which names the setting, for another base or adapters of other sizes.
    """
    config = read_config(start.folder)
    found = config.pop("base")
    if found["sha256"] != base["sha256"]:
        raise MismatchError(
            f"{start.folder}: made with the base {found['name']} (sha256 {found['sha256'][:12]}), expected "
            f"{base['name']} ({base['sha256'][:12]}); run `dvc repro`, or start from another model (retrofit.init_from)"
        )
    if not start.facts["retrieval"]:
        return
    for name, value in config.items():
        expected = getattr(model.settings, name)
        if value != (list(expected) if isinstance(expected, tuple) else expected):
            raise MismatchError(
                f"{start.folder}: adapters with {name} {value}, expected {expected}; set "
                f"{name if name == 'chunk_size' else f'retrofit.{name}'} to {value}, or start from another model "
                "(retrofit.init_from)"
            )
    weights = load_tensors(start.folder / WEIGHTS_NAME, model.adapter_state_dict())
    model.adapters.load_state_dict(weights)
