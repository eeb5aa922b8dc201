"""The attention parts of RETRO: rotary positions, self-attention, cross-attention, and the shift by
which the decoder's chunks attend to what was retrieved for the chunk before.

The letters of model.py name the axes; besides them, `H` heads, `F` features of a head, `Q` queries
and `J` keys of any attention, `...` whatever is attended in parallel.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from retro_model.network.kernels import rotary_attention

See = Callable[[Tensor, Tensor, float], Tensor]

# ---- positions -------------------------------------------------------------------------------------


def rotary_table(position_Q: Tensor, dim_head: int, dtype: torch.dtype) -> Tensor:
    """The cosines and, after them, the sines by which `rotate` turns a head's features: (Q, F).

    Pair f turns by position * 10000^(-2f/F) (Su et al. 2021). Angles are taken in float64, because
    a product of two large numbers is all that is left of a position.
    """
    frequency_F2 = 10000.0 ** -(torch.arange(0, dim_head, 2, device=position_Q.device).double() / dim_head)
    angle_QF2 = position_Q.double()[..., None] * frequency_F2
    return torch.cat([angle_QF2.cos(), angle_QF2.sin()], dim=-1).to(dtype)


# ---- attention -------------------------------------------------------------------------------------


def attend_documents(qkv_THF: Tensor, table_NF: Tensor, dropout: float, *, groups: Sequence[tuple[int, int]]) -> Tensor:
    """Causal attention inside each document of a stream of tokens: (T, H, F).

    `groups` says how the stream is made of documents: (count, tokens of each), one after the other.
    Documents of one length are attended together, so that no mask is needed and no score between
    two documents is ever computed. The table is as long as the longest document.
    """
    outputs = []
    parts = torch.split(qkv_THF, [count * length for count, length in groups])
    for (count, length), part in zip(groups, parts, strict=True):
        table_QF, qkv = table_NF[:length], part.view(count, length, *part.shape[1:])  # (count, length, 3H, F)
        seen = rotary_attention(qkv, None, table_QF, table_QF, causal=True, dropout=dropout)
        outputs.append(seen.flatten(0, 1))
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
    """Attention to a context that went through `CrossAttention.context`: (B, Q, H, F)."""
    return rotary_attention(query_BQHF, context_BJHF, table_QF, key_table_JF, mask_BJ=mask_BJ, dropout=dropout)


class SelfAttention(nn.Module):
    """Rotary multi-head self-attention; the caller says which tokens see each other.

    That differs between packed documents, a neighbor and a cache of keys; the weights do not. `see`
    takes queries, keys and values one after the other (..., Q, 3H, F), the rotary table of their
    positions and a dropout probability.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x_QD: Tensor, table_QF: Tensor, see: See) -> Tensor:
        """What each token gets from those that it sees: (..., Q, D)."""
        qkv_QHF = self.qkv(x_QD).unflatten(-1, (3 * self.heads, -1))  # (..., Q, 3HF) -> (..., Q, 3H, F)
        seen_QHF = see(qkv_QHF, table_QF, self.dropout if self.training else 0.0)
        out: Tensor = self.out(seen_QHF.flatten(-2))  # (..., Q, H, F) -> (..., Q, HF) -> (..., Q, D)
        return out


class CrossAttention(nn.Module):
    """Rotary multi-head attention from x to a context of another width.

    Queries and context have their own positions; only their difference matters.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(dim, heads * dim_head, bias=False)
        self.key_value = nn.Linear(context_dim, 2 * heads * dim_head, bias=False)
        self.out = nn.Linear(heads * dim_head, dim, bias=False)

    def context(self, context_JE: Tensor) -> Tensor:
        """The context's keys, not yet rotated, and after them its values: (..., J, 2H, F)."""
        kv: Tensor = self.key_value(context_JE).unflatten(-1, (2 * self.heads, -1))  # (..., J, 2HF) -> (..., J, 2H, F)
        return kv

    def queries(self, x_QD: Tensor) -> Tensor:
        """The queries, not yet rotated: (..., Q, H, F)."""
        query_QHF: Tensor = self.query(x_QD).unflatten(-1, (self.heads, -1))  # (..., Q, HF) -> (..., Q, H, F)
        return query_QHF

    def forward(self, x_QD: Tensor, table_QF: Tensor, see: See) -> Tensor:
        """What each token gets from the context that `see` holds: (..., Q, D)."""
        seen_QHF = see(self.queries(x_QD), table_QF, self.dropout if self.training else 0.0)
        out: Tensor = self.out(seen_QHF.flatten(-2))  # (..., Q, H, F) -> (..., Q, HF) -> (..., Q, D)
        return out


class NeighborAttention(CrossAttention):
    """Attention of the decoder to encoded neighbors, with optional parts that the paper does not have.

    To use a neighbor, a head has to find the place in it where the text stands now, and bring what followed
    there. With `copy_tokens` = n, the query of a token is made of itself and the n - 1 tokens before it, and the
    key of a neighbor's token of the n tokens before that one; each has a part of the head's features. Query and
    key are then alike where the last n tokens of the text stand in front of a neighbor's token. That is an
    induction head in a single layer (Olsson et al. 2022 call keys of the token before "smeared").

    To copy a token is to raise its logit: to add its row of the output matrix to the residual stream. With tied
    embeddings the encoder starts from these rows. Otherwise it does not see them, and `copy_rows` adds a projection
    of the row of each neighbor's token to its value.

    With `sink` each head has a learned key whose value is zero, so that it can attend to nothing. Its score is not
    divided by the square root of F: it has to outweigh hundreds of keys, and few steps to learn that.
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
        self.lead = max(0, copy_tokens - 1)  # tokens before the first query that it looks back to
        self.copy_rows = nn.Linear(dim, heads * dim_head, bias=False) if copy_rows else None
        self.sink = nn.Parameter(torch.zeros(heads, dim_head)) if sink else None

    def neighbor_context(self, encoded_AJE: Tensor, mask_AKR: Tensor, rows_AJD: Tensor | None) -> Tensor:
        """The keys and values of encoded neighbors: (A, J, 2H, F), with a sink (A, 1 + J, 2H, F).

        `mask_AKR` is False at padding. Keys are zero where a token is not there: in front of a neighbor, or in
        its padding. `rows_AJD` are the normalized output rows of the tokens, for `copy_rows`.
        """
        context_AJHF = self.context(encoded_AJE)
        if self.copy_tokens:
            key_AJHF, value_AJHF = context_AJHF.chunk(2, dim=-2)
            key_AKRHF = rearrange(key_AJHF, "a (k r) h f -> a k r h f", k=mask_AKR.shape[1])
            if not bool(mask_AKR.all()):
                key_AKRHF = key_AKRHF * mask_AKR[..., None, None].to(key_AKRHF.dtype)
            key_AKRHF = torch.cat([_later(part, back) for back, part in enumerate(self._parts(key_AKRHF), 1)], dim=-1)
            if self.copy_rows is not None:
                value_AJHF = value_AJHF + self.copy_rows(rows_AJD).unflatten(-1, (self.heads, -1))
            context_AJHF = torch.cat([key_AKRHF.flatten(1, 2), value_AJHF], dim=-2)
        if self.sink is not None:
            key_HF = self.sink * math.sqrt(self.sink.shape[-1])
            sink_HF = torch.cat([key_HF, torch.zeros_like(key_HF)]).to(context_AJHF.dtype)
            context_AJHF = torch.cat([sink_HF.expand(len(context_AJHF), 1, -1, -1), context_AJHF], dim=1)
        return context_AJHF

    def queries(self, x_QD: Tensor) -> Tensor:
        """The queries of all tokens but the first `lead`: (..., Q - lead, H, F)."""
        query_QHF: Tensor = super().queries(x_QD)
        if not self.lead:
            return query_QHF
        length = query_QHF.shape[-3] - self.lead
        parts = enumerate(self._parts(query_QHF))
        return torch.cat([part.narrow(-3, self.lead - back, length) for back, part in parts], dim=-1)

    def _parts(self, x_HF: Tensor) -> Sequence[Tensor]:
        """The features of each of the tokens that are compared, the latest token first."""
        return x_HF.tensor_split(self.copy_tokens, dim=-1)

    def forward(self, x_QD: Tensor, table_QF: Tensor, see: See) -> Tensor:
        """What each token gets from the neighbors: (..., Q, D), zero for the first `lead` tokens."""
        return F.pad(super().forward(x_QD, table_QF, see), (0, 0, self.lead, 0))


def _later(x_AKRHF: Tensor, steps: int) -> Tensor:
    """Each token of a neighbor gets what the token so many steps before it has; the first ones get zeros."""
    return F.pad(x_AKRHF[:, :, :-steps], (0, 0, 0, 0, steps, 0))


# ---- the shift of chunked cross-attention ----------------------------------------------------------


def attending_chunks(x_TD: Tensor, chunk_size: int, lead: int = 0) -> Tensor:
    """The tokens that may look at each chunk's neighbors, after `lead` tokens in front: (C, lead + M, D).

    Whoever sees all of chunk u may see what was retrieved with it: the last token of chunk u and the
    first M - 1 tokens of chunk u + 1 (section 2.4, figure 2). That is the stream shifted by M - 1; the last row
    is filled with zeros. Fewer than M tokens in front of these are of the same document.
    """
    shift = chunk_size - 1
    attending_TD = F.pad(x_TD[shift - lead :], (0, 0, 0, shift))
    return attending_TD.unfold(0, lead + chunk_size, chunk_size).transpose(1, 2)


def unshift(x_CMD: Tensor, first_D: Tensor) -> Tensor:
    """Undo `attending_chunks`, with the tokens `first_D` (M - 1, D) that attend to no chunk in front: (T, D)."""
    x_TD = x_CMD.flatten(0, 1)
    return torch.cat([first_D, x_TD[: len(x_TD) - len(first_D)]])
