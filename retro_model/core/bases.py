"""Which model of transformers can be a base for adapters: found out from its config and the names of its files.

check_base("models/smollm2")     # reads no weights, so a stage can ask before hours of work

The library loads bases in retro_model/retrofit/bases.py, with the same errors.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from retro_model.core.errors import ConfigError, SourceError
from retro_model.core.hub import first_line, quiet_transformers

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

SUPPORTED = "Bloom, Gemma 2, GPT-2, GPT-NeoX, Llama, Mistral, OPT, Phi, Qwen2 and Qwen3"
LAYER_NAMES = ("layers", "h")  # the attributes under which decoders keep their layers
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # one of them is there if weights are safetensors


def check_base(place: str) -> None:
    """Raise SourceError unless the model of that folder or name on the hub can be a base.

    Takes seconds: it builds the model without memory for its weights, and downloads none.
    """
    import torch  # as transformers, only needed if there is a base
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.hub import has_file

    try:
        with quiet_transformers(show_downloads=False):
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
            if config.is_encoder_decoder:
                raise SourceError(_two_parts(config.model_type))
            with torch.device("meta"):
                base = cast("Any", AutoModelForCausalLM).from_config(config, trust_remote_code=False)
            has_weights = any(has_file(place, name) for name in WEIGHTS)
    except SourceError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise unusable_base(place, first_line(error)) from error
    if not has_weights:
        raise unusable_base(place, f"found none of {' and '.join(WEIGHTS)}")
    decoder_layers(base, None)
    check_widths(base)


def unusable_base(place: str, reason: str) -> SourceError:
    """The error for a base that cannot be loaded."""
    tried = f"folder {place}" if Path(place).is_dir() else "no such folder, and not on the hub"
    return SourceError(
        f"base: {place} cannot be loaded ({tried}): {reason}; name a causal language model with config.json and its "
        "weights as safetensors (no pickle)"
    )


def decoder_layers(base: "PreTrainedModel", name: str | None) -> "Sequence[nn.Module]":
    """The decoder layers of a model; `name` says where they are, for example "transformer.blocks".

    Raises SourceError for an encoder-decoder model, or if the layers are not found.
    """
    from torch import nn

    title = type(base).__name__
    if base.config.is_encoder_decoder:
        raise SourceError(_two_parts(title))
    depth = base.config.get_text_config(decoder=True).num_hidden_layers
    if name is not None:
        found = dict(base.named_modules()).get(name)
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


def check_widths(base: "PreTrainedModel") -> None:
    """Raise SourceError if the model has no output embeddings, or if embeddings do not fit its hidden width."""
    width = base.config.get_text_config(decoder=True).hidden_size
    model = cast("Any", base)  # transformers types hardly any of this
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is None:
        raise SourceError(f"base: {type(base).__name__} has no output embeddings, expected a causal language model")
    widths = {embedding.weight.shape[1], output.weight.shape[1]}
    if widths != {width}:
        raise SourceError(
            f"base: {type(base).__name__} has embeddings of width {', '.join(map(str, sorted(widths)))}, expected its "
            f"hidden width {width}"
        )


def _two_parts(title: str) -> str:
    return f"base: {title} has an encoder and a decoder, expected a decoder alone such as {SUPPORTED}"
