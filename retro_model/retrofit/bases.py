"""Base models: load them from safetensors, take their sizes, and identify their weights.

Code that comes with a model is never run, and weights are never unpickled.
"""

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from retro_model.core.bases import check_widths, unusable_base
from retro_model.core.errors import SourceError
from retro_model.core.hub import first_line, quiet_transformers
from retro_model.retrofit.config import BaseSizes

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
        raise unusable_base(place, first_line(error)) from error
    if missing := sorted(info["missing_keys"]):
        raise SourceError(f"base: {place} lacks {len(missing)} of its weights, {missing[0]} among them")
    return cast("PreTrainedModel", model.eval())


def base_sizes(base: PreTrainedModel, depth: int) -> BaseSizes:
    """The sizes of a model with `depth` decoder layers. Raises SourceError if its embeddings do not fit its width."""
    check_widths(base)
    config = base.config.get_text_config(decoder=True)
    return BaseSizes(
        vocab_size=cast("Any", base).get_input_embeddings().weight.shape[0],
        width=config.hidden_size,
        depth=depth,
        max_seq_len=getattr(config, "max_position_embeddings", None) or NO_LIMIT,
        pad_id=config.pad_token_id,
    )


def save_base(base: PreTrainedModel, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write a model as a folder that `load_base` reads; `weights` (None: the model's) are its whole state dict."""
    base.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
    mode = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)  # safetensors lets only the owner read what it writes


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """The sha256 of a model's named parameters with their names, types and shapes; tied weights count once."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
