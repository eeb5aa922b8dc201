"""The new weights: cross-attention with a gate, and what reads neighbors in a whole pass over a text.

Shape suffixes are those of network/model.py. `2D`: hidden states, and beside them the embeddings of the tokens.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retro_model.network.config import RETROConfig
from retro_model.network.model import (
    Encoder,
    Residual,
    Retrieval,
    Side,
    chunked_cross_attention,
    encode_retrieved,
    initialize_block,
    initialize_encoder,
    start_copying,
)

if TYPE_CHECKING:
    from retro_model.retrofit.model import Retrofit

GATE_SCALE = 4.0  # of the learned gate, so that it opens within tens of steps


class GatedCrossAttention(Residual):
    """h + gate * rms(h) * attention(norm(h) + e), where h are hidden states and e the embeddings of their tokens.

    The gate starts at zero, so that the new model equals its base, while everything behind the gate already starts
    as copying. Zero output projections would have the same effect, but would have to learn what to copy.

    A trained base's hidden states no longer resemble embeddings. So queries also see the embedding of each token, and
    with `copy_tokens` they start from it alone: the gain of the norm starts at zero. `rms(h)` makes the same gate
    mean the same change in every base.
    """

    def __init__(self, config: RETROConfig) -> None:
        (layer, *_) = config.dec_cross_attn_layers
        plain = Side.decoder(config).cross_attention(layer)  # the same for every layer
        assert plain is not None
        initialize_block(plain, Side.decoder(config))
        super().__init__(plain.inner, plain.norm, alpha=1.0, post_norm=False)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x_Q2D: Tensor, *args: Any) -> Tensor:
        """The changed hidden states, and the embeddings as they were: (..., Q, 2D)."""
        hidden_QD, embedded_QD = x_Q2D.chunk(2, dim=-1)
        size_Q1 = torch.linalg.vector_norm(hidden_QD, dim=-1, keepdim=True) * hidden_QD.shape[-1] ** -0.5
        attended_QD: Tensor = self.inner(self.norm(hidden_QD) + embedded_QD, *args)
        return torch.cat([hidden_QD + GATE_SCALE * self.gate * size_Q1 * attended_QD, embedded_QD], dim=-1)


class Adapters(nn.Module):
    """The encoder, and the cross-attention of each layer that has one, by the layer's number.

    Without `retrieval` there are none.
    """

    def __init__(self, config: RETROConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config) if config.retrieval else None
        self.cross_attention = nn.ModuleDict(
            {str(layer): GatedCrossAttention(config) for layer in sorted(config.dec_cross_attn_layers)}
        )
        if self.encoder is not None:
            self._initialize(self.encoder)

    @torch.no_grad()
    def _initialize(self, encoder: Encoder) -> None:
        initialize_encoder(self.config, encoder)
        if self.config.copy_tokens:
            crosses = [self.of_layer(layer) for layer in self.config.dec_cross_attn_layers]
            start_copying(encoder, [cross.inner for cross in crosses])
            for cross in crosses:
                nn.init.zeros_(cast("Tensor", cross.norm.gain))

    def of_layer(self, number: int) -> GatedCrossAttention:
        """The cross-attention after the base's layer `number`."""
        return cast("GatedCrossAttention", self.cross_attention[str(number)])

    @property
    def dtype(self) -> torch.dtype:
        """The number type of the new weights."""
        return next((parameter.dtype for parameter in self.parameters()), torch.float32)


class WholePass:
    """Reads the neighbors of a batch in one pass over whole rows (B, N), each one document."""

    def __init__(self, model: "Retrofit", seq_BN: Tensor, retrieved_BLKR: Tensor) -> None:
        self.model, (self.rows, self.length) = model, seq_BN.shape
        self.tail = -self.length % model.config.chunk_size
        self.embedded_TD = normalized(model.embed(F.pad(seq_BN, (0, self.tail)))).flatten(0, 1)
        padding = (0, 0, 0, 0, 0, 1 if self.tail else 0)  # the incomplete chunk at the end has no neighbors
        self.retrieved_CKR = F.pad(retrieved_BLKR, padding, value=model.config.pad_id).flatten(0, 1)
        self.retrieval: Retrieval | None = None

    def __call__(self, number: int, hidden_BND: Tensor) -> Tensor:
        """The output of layer `number` after its cross-attention; the first such layer encodes the neighbors."""
        model, config = self.model, self.model.config
        width, adapters = hidden_BND.shape[-1], model.adapters
        hidden_TD = F.pad(hidden_BND.to(self.embedded_TD.dtype), (0, 0, 0, self.tail)).flatten(0, 1)
        if self.retrieval is None:
            assert adapters.encoder is not None
            chunks = len(self.retrieved_CKR) // self.rows
            index_C = torch.arange(chunks, device=hidden_TD.device).repeat(self.rows)
            self.retrieval = encode_retrieved(
                config, adapters.encoder, model.embed, model.output_rows, self.retrieved_CKR, hidden_TD, index_C
            )
        x_T2D = torch.cat([hidden_TD, self.embedded_TD], dim=-1)
        changed_T2D = chunked_cross_attention(adapters.of_layer(number), x_T2D, self.retrieval, config.chunk_size)
        changed_BND = changed_T2D[:, :width].reshape(self.rows, -1, width)[:, : self.length]
        return changed_BND.to(hidden_BND.dtype)


def normalized(x_D: Tensor) -> Tensor:
    """x / rms(x), over the last axis."""
    return F.rms_norm(x_D, x_D.shape[-1:])
