"""Base models: load them from safetensors, find their decoder layers, and identify their weights.

Code that comes with a model is never run, and weights are never unpickled.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from retro_model.core.errors import ConfigError, SourceError
from retro_model.core.hub import first_line, quiet_transformers
from retro_model.retrofit.config import BaseSizes

SUPPORTED = "Bloom, Gemma 2, GPT-2, GPT-NeoX, Llama, Mistral, OPT, Phi, Qwen2 and Qwen3"
LAYER_NAMES = ("layers", "h")  # the attributes under which decoders keep their layers
NO_LIMIT = 2**30  # for models whose positions have no limit, such as Bloom


def load_base(
    source: str | os.PathLike[str], dtype: torch.dtype | None = None, revision: str | None = None
) -> PreTrainedModel:
    """Load a causal language model from a folder or by its name on the hub, in eval mode.

    `dtype` None: the one that it was saved in. `revision` None: the hub's main one. Raises SourceError.
    """
    place = os.fspath(source)
    local = Path(place).is_dir()
    try:
        with quiet_transformers(show_downloads=not local):
            model, info = cast("Any", AutoModelForCausalLM).from_pretrained(
                place,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=dtype or "auto",
                output_loading_info=True,
                **({} if revision is None else {"revision": revision}),
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        tried = f"folder {place}" if local else "no such folder, and not on the hub"
        raise SourceError(
            f"base: {place} cannot be loaded ({tried}): {first_line(error)}; name a causal language model with "
            "config.json and its weights as safetensors (no pickle)"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise SourceError(f"base: {place} lacks {len(missing)} of its weights, {missing[0]} among them")
    return cast("PreTrainedModel", model.eval())


def decoder_layers(base: PreTrainedModel, name: str | None) -> Sequence[nn.Module]:
    """The decoder layers of a model; `name` says where they are, for example "transformer.blocks".

    Raises SourceError for an encoder-decoder model, or if the layers are not found.
    """
    title = type(base).__name__
    if base.config.is_encoder_decoder:
        raise SourceError(f"base: {title} has an encoder and a decoder, expected a decoder alone such as {SUPPORTED}")
    depth = base.config.get_text_config(decoder=True).num_hidden_layers
    if name is not None:
        found = _submodule(base, name)
        if not isinstance(found, nn.ModuleList):
            raise ConfigError(f"layers: found {name!r}, expected the name of a ModuleList of {title}")
        return cast("Sequence[nn.Module]", found)
    decoder = cast("Any", base).get_decoder()
    for attribute in LAYER_NAMES:
        found = getattr(decoder, attribute, None)
        if isinstance(found, nn.ModuleList) and len(found) == depth:
            return cast("Sequence[nn.Module]", found)
    raise SourceError(
        f"base: {title} keeps its decoder layers in an unknown place; known are {SUPPORTED}; for another model name "
        "the place: Retrofit(base, layers='transformer.blocks')"
    )


def _submodule(base: nn.Module, name: str) -> nn.Module | None:
    return dict(base.named_modules()).get(name)


def base_sizes(base: PreTrainedModel, depth: int) -> BaseSizes:
    """The sizes of a model with `depth` decoder layers. Raises SourceError if its embeddings do not fit its width."""
    config = base.config.get_text_config(decoder=True)
    model = cast("Any", base)  # transformers types hardly any of this
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is None:
        raise SourceError(f"base: {type(base).__name__} has no output embeddings, expected a causal language model")
    widths = {embedding.weight.shape[1], output.weight.shape[1]}
    if widths != {config.hidden_size}:
        raise SourceError(
            f"base: {type(base).__name__} has embeddings of width {', '.join(map(str, sorted(widths)))}, expected its "
            f"hidden width {config.hidden_size}"
        )
    return BaseSizes(
        vocab_size=embedding.weight.shape[0],
        width=config.hidden_size,
        depth=depth,
        max_seq_len=getattr(config, "max_position_embeddings", None) or NO_LIMIT,
        pad_id=config.pad_token_id,
    )


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """The sha256 of a model's named parameters with their names, types and shapes; tied weights count once."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
