"""A small network with random weights that all matter, and tokens for it.

model = make(use_deepnet=True)    # SMALL, and what is named here
seq = tokens(2, 3 * M)
retrieved = retrieved_for(seq)
"""

from typing import Any

import torch
from torch import Tensor

from retro_model.network.model import RETRO

M, R, K, V = 4, 6, 2, 23

SMALL: dict[str, Any] = {
    "num_tokens": V,
    "max_seq_len": 8 * M,
    "enc_dim": 12,
    "enc_depth": 2,
    "dec_depth": 3,
    "dec_cross_attn_layers": (2, 3),
    "heads": 2,
    "dec_dim": 8,
    "dim_head": 6,
    "chunk_size": M,
}


def make(seed: int = 0, **changes: Any) -> RETRO:
    """A small float64 model in eval mode whose every weight matters."""
    torch.manual_seed(seed)
    model = RETRO(**{**SMALL, **changes}).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("sink"):  # norms: a gain of 1 would hide a gain left out
                parameter.add_(0.3 * torch.randn_like(parameter))
            if "embedding" in name:
                parameter.normal_(std=0.7)
            if model.config.copy_rows and name.endswith("key_value.weight"):  # else the encoder's values stay zero
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))


def retrieved_for(seq: Tensor, seed: int = 7, neighbors: int = K) -> Tensor:
    return tokens(len(seq), seq.shape[1] // M, neighbors, R, seed=seed)
