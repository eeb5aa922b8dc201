"""Training that starts from a trained model's weights: RETROfit (section 4.2.3), or simply going on.

    start_from(model, Artifact.open("models/baseline", "model"), freeze="decoder")

A plain decoder gives its weights to the decoder of a model with retrieval, whose encoder and
cross-attention stay new; a model with retrieval gives all of them. With the decoder frozen, only encoder
and cross-attention are trained, and without neighbors the model stays exactly what it started from.
"""

from dataclasses import replace
from pathlib import Path

import torch

from retro_model.artifacts import Artifact
from retro_model.checkpoint import from_pretrained
from retro_model.config import optional_path
from retro_model.errors import MismatchError
from retro_model.model import RETRO, RETROConfig


def trained_model(folder: str) -> Artifact | None:
    """The model to start from; None, which stands for new weights, for no folder and for an empty one.

    Raises ConfigError where there is no such folder, MissingArtifactError where it holds no finished model.
    """
    path = optional_path("train.init_from", folder)
    return None if path is None else Artifact.open(path, "model")


def start_from(model: RETRO, start: Artifact, freeze: str) -> None:
    """Gives `model` the weights of `start`, and freezes ("decoder") those that a plain decoder has, too.

    Raises MismatchError, with the key of the settings, where the two are networks of different shapes.
    """
    base = from_pretrained(start.folder)
    if base.config.retrieval and not model.config.retrieval:
        raise MismatchError(f"{start.folder}: a model with retrieval, expected a plain decoder for a plain decoder")
    _check_shapes(model.config, base.config, start.folder)
    model.load_state_dict({**model.state_dict(), **base.state_dict()})
    if freeze == "decoder":
        frozen = _decoder_names(model.config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)


def _check_shapes(config: RETROConfig, base: RETROConfig, folder: Path) -> None:
    """All that gives a weight its shape or a decoder its function must be the same."""
    of_retrieval = {"enc_dim", "enc_depth", "enc_cross_attn_layers", "dec_cross_attn_layers", "enc_scale_residual"}
    free = {"retrieval", "max_seq_len", *(name for name in vars(config) if name.endswith("dropout"))}
    for name, found in vars(base).items():
        expected = getattr(config, name)
        if name in free or (name in of_retrieval and not base.retrieval) or found == expected:
            continue
        raise MismatchError(
            f"{folder}: made with {name} {found}, expected {expected}; set {_key(name)} to {found}, or start from "
            "another model (train.init_from)"
        )


def _key(name: str) -> str:
    elsewhere = {"num_tokens": "the tokenizer's vocabulary", "pad_id": "the tokenizer's padding"}
    return elsewhere.get(name, name if name == "chunk_size" else f"model.{name}")


def _decoder_names(config: RETROConfig) -> set[str]:
    """The weights of the plain decoder of this shape."""
    with torch.device("meta"):
        return set(RETRO.from_config(replace(config, retrieval=False)).state_dict())
