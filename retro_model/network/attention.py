"""Attention: rotary positions, self-attention, cross-attention, and the shift of chunked cross-attention.

Shape suffixes are those of model.py, and `Q` queries and `J` keys of any attention. `...` are batch axes.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from retro_model.network.kernels import rotary_attention

# (projections, rotary table of their positions, dropout probability) -> the attention output (..., Q, H, F)
Attend = Callable[[Tensor, Tensor, float], Tensor]

# ---- positions -------------------------------------------------------------------------------------


def rotary_table(position_Q: Tensor, dim_head: int, dtype: torch.dtype) -> Tensor:
    """The rotary table for `rotate`: F / 2 cosines, then F / 2 sines, for each position: (Q, F).

    Pair f rotates by the angle position * 10000^(-2f/F) (Su et al. 2021). Angles are computed in float64, because
    large angles in lower precision are inaccurate modulo a full turn.
    """
    frequency_F2 = 10000.0 ** -(torch.arange(0, dim_head, 2, device=position_Q.device).double() / dim_head)
    angle_QF2 = position_Q.double()[..., None] * frequency_F2
    return torch.cat([angle_QF2.cos(), angle_QF2.sin()], dim=-1).to(dtype)


# ---- attention -------------------------------------------------------------------------------------


def attend_documents(qkv_THF: Tensor, table_NF: Tensor, dropout: float, *, groups: Sequence[tuple[int, int]]) -> Tensor:
    """Causal self-attention within each document of a stream of tokens: (T, H, F).

    `groups` lists the documents in stream order as (number of documents, tokens per document). Each group is one
    batch of equal lengths, so no mask is needed and no scores across documents are computed. The table must
    cover the longest document.
    """
    outputs = []
    parts = torch.split(qkv_THF, [count * length for count, length in groups])
    for (count, length), part in zip(groups, parts, strict=True):
        table_QF, qkv = table_NF[:length], part.view(count, length, *part.shape[1:])  # (count, length, 3H, F)
        attended = rotary_attention(qkv, None, table_QF, table_QF, causal=True, dropout=dropout)
        outputs.append(attended.flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend_context(
    query_BQHF: Tensor,
    table_QF: Tensor,
    dropout: float,
    *,
    context_BJHF: Tensor,
    key_table_JF: Tensor,
    mask_BJ: Tensor | None = None,
) -> Tensor:
    """Attention to the keys and values that `CrossAttention.context` returned: (B, Q, H, F)."""
    return rotary_attention(query_BQHF, context_BJHF, table_QF, key_table_JF, mask_BJ=mask_BJ, dropout=dropout)


class SelfAttention(nn.Module):
    """Rotary multi-head self-attention; the caller passes the function that computes the attention.

    That function differs between packed documents, neighbors and cached decoding; the weights do not. `attend`
    takes the fused queries, keys and values (..., Q, 3H, F), the rotary table of their positions and a dropout
    probability.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x_QD: Tensor, table_QF: Tensor, attend: Attend) -> Tensor:
        """The projected attention output: (..., Q, D)."""
        qkv_QHF = self.qkv(x_QD).unflatten(-1, (3 * self.heads, -1))  # (..., Q, 3HF) -> (..., Q, 3H, F)
        attended_QHF = attend(qkv_QHF, table_QF, self.dropout if self.training else 0.0)
        out: Tensor = self.out(attended_QHF.flatten(-2))  # (..., Q, H, F) -> (..., Q, HF) -> (..., Q, D)
        return out


class CrossAttention(nn.Module):
    """Rotary multi-head attention from x to a context, which may have another width.

    Queries and context have separate rotary tables; scores depend only on the difference of positions.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(dim, heads * dim_head, bias=False)
        self.key_value = nn.Linear(context_dim, 2 * heads * dim_head, bias=False)
        self.out = nn.Linear(heads * dim_head, dim, bias=False)

    def context(self, context_JE: Tensor) -> Tensor:
        """The context's keys, not yet rotated, then its values: (..., J, 2H, F)."""
        kv: Tensor = self.key_value(context_JE).unflatten(-1, (2 * self.heads, -1))  # (..., J, 2HF) -> (..., J, 2H, F)
        return kv

    def queries(self, x_QD: Tensor) -> Tensor:
        """The queries, not yet rotated: (..., Q, H, F)."""
        query_QHF: Tensor = self.query(x_QD).unflatten(-1, (self.heads, -1))  # (..., Q, HF) -> (..., Q, H, F)
        return query_QHF

    def forward(self, x_QD: Tensor, table_QF: Tensor, attend: Attend) -> Tensor:
        """The projected output of attention to the context that `attend` is bound to: (..., Q, D)."""
        attended_QHF = attend(self.queries(x_QD), table_QF, self.dropout if self.training else 0.0)
        out: Tensor = self.out(attended_QHF.flatten(-2))  # (..., Q, H, F) -> (..., Q, HF) -> (..., Q, D)
        return out


class NeighborAttention(CrossAttention):
    """The decoder's attention to encoded neighbors, with three options that are not in the paper.

    `copy_tokens` = n: an induction head in a single layer (Olsson et al. 2022; they call keys of the previous token
    "smeared"). The query of a token combines that token and the n - 1 before it; the key of a neighbor token
    combines the n tokens before it. Each of these n tokens takes up a part of the head's features. So query and key
    match where the last n tokens of the text precede a neighbor token, which is the token to copy.

    `copy_rows`: copying a token means raising its logit, that is, adding its row of the output matrix to the residual
    stream. With tied embeddings the encoder's input already contains these rows. Without, this option adds a
    projection of each neighbor token's row to its value.

    `sink`: each head has a learned key with value zero, so that it can attend to nothing. Its score is not divided
    by sqrt(F), because it must learn to outweigh hundreds of keys within few steps.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        dim_head: int,
        dropout: float,
        *,
        copy_tokens: int,
        copy_rows: bool,
        sink: bool,
    ) -> None:
        super().__init__(dim, context_dim, heads, dim_head, dropout)
        self.copy_tokens = copy_tokens
        self.lead = max(0, copy_tokens - 1)  # extra tokens in front of x, which the first query combines
        self.copy_rows = nn.Linear(dim, heads * dim_head, bias=False) if copy_rows else None
        self.sink = nn.Parameter(torch.zeros(heads, dim_head)) if sink else None

    def neighbor_context(self, encoded_AJE: Tensor, mask_AKR: Tensor, rows_AJD: Tensor | None) -> Tensor:
        """The keys and values of encoded neighbors: (A, J, 2H, F), with a sink (A, 1 + J, 2H, F).

        `mask_AKR` is False at padding. With `copy_tokens`, tokens before the start of a neighbor and padding
        contribute zeros to the keys. `rows_AJD` holds the normalized output rows of the tokens, for `copy_rows`.
        """
        context_AJHF = self.context(encoded_AJE)
        if self.copy_tokens:
            key_AJHF, value_AJHF = context_AJHF.chunk(2, dim=-2)
            key_AKRHF = rearrange(key_AJHF, "a (k r) h f -> a k r h f", k=mask_AKR.shape[1])
            if not bool(mask_AKR.all()):
                key_AKRHF = key_AKRHF * mask_AKR[..., None, None].to(key_AKRHF.dtype)
            key_AKRHF = torch.cat(
                [_shift_later(part, back) for back, part in enumerate(self._feature_parts(key_AKRHF), 1)], dim=-1
            )
            if self.copy_rows is not None:
                value_AJHF = value_AJHF + self.copy_rows(rows_AJD).unflatten(-1, (self.heads, -1))
            context_AJHF = torch.cat([key_AKRHF.flatten(1, 2), value_AJHF], dim=-2)
        if self.sink is not None:
            key_HF = self.sink * math.sqrt(self.sink.shape[-1])
            sink_HF = torch.cat([key_HF, torch.zeros_like(key_HF)]).to(context_AJHF.dtype)
            context_AJHF = torch.cat([sink_HF.expand(len(context_AJHF), 1, -1, -1), context_AJHF], dim=1)
        return context_AJHF

    def queries(self, x_QD: Tensor) -> Tensor:
        """The queries of all tokens after the first `lead`: (..., Q - lead, H, F)."""
        query_QHF: Tensor = super().queries(x_QD)
        if not self.lead:
            return query_QHF
        length = query_QHF.shape[-3] - self.lead
        parts = enumerate(self._feature_parts(query_QHF))
        return torch.cat([part.narrow(-3, self.lead - back, length) for back, part in parts], dim=-1)

    def _feature_parts(self, x_HF: Tensor) -> Sequence[Tensor]:
        """Split each head's features into one part per compared token, the latest token first."""
        return x_HF.tensor_split(self.copy_tokens, dim=-1)

    def forward(self, x_QD: Tensor, table_QF: Tensor, attend: Attend) -> Tensor:
        """The projected output of attention to the neighbors: (..., Q, D), zero for the first `lead` tokens."""
        return F.pad(super().forward(x_QD, table_QF, attend), (0, 0, self.lead, 0))


def _shift_later(x_AKRHF: Tensor, steps: int) -> Tensor:
    """Shift values along R, toward later tokens of each neighbor; fill the first `steps` tokens with zeros."""
    return F.pad(x_AKRHF[:, :, :-steps], (0, 0, 0, 0, steps, 0))


# ---- the shift of chunked cross-attention ----------------------------------------------------------


def attending_chunks(x_TD: Tensor, chunk_size: int, lead: int = 0) -> Tensor:
    """Group the tokens by the chunk whose neighbors they attend to, with `lead` tokens in front: (C, lead + M, D).

    The neighbors of chunk u depend on all of its tokens. So its last token and the first M - 1 tokens of chunk
    u + 1 attend to them (section 2.4, figure 2). That is the stream shifted by M - 1; zeros fill the last row.
    `lead` must be less than M; the `lead` tokens then belong to the same document as the attending tokens.
    """
    shift = chunk_size - 1
    attending_TD = F.pad(x_TD[shift - lead :], (0, 0, 0, shift))
    return attending_TD.unfold(0, lead + chunk_size, chunk_size).transpose(1, 2)


def unshift(x_CMD: Tensor, first_D: Tensor) -> Tensor:
    """The inverse of `attending_chunks`: (T, D). It starts with `first_D` (M - 1, D), which attends to no chunk."""
    x_TD = x_CMD.flatten(0, 1)
    return torch.cat([first_D, x_TD[: len(x_TD) - len(first_D)]])
