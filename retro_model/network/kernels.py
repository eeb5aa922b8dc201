"""Faster or leaner versions of standard operations, with hand-written gradients.

Each function equals one line of plain torch. Its docstring gives that line, and the tests compare the two. RMSNorm
and attention matter on CPUs, where eager torch spends a third of a training step on passes over memory that a GPU
hides or fuses. The loss saves memory on every device. These three sections can be skipped on a first reading.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- rotary positions ------------------------------------------------------------------------------


def rotate(x_QHF: Tensor, table_QF: Tensor) -> Tensor:
    """Rotate each head's features (..., Q, H, F) by its token's position (rotary embedding, Su et al. 2021).

    `table_QF` holds cosines, then sines. The dot product of a rotated query and a rotated key depends on their
    positions only through the difference.
    """
    cos, sin = table_QF.to(x_QHF.dtype).unsqueeze(-2).chunk(2, dim=-1)  # (Q, 1, F/2): shared by all heads
    a, b = x_QHF.chunk(2, dim=-1)  # (..., Q, H, F/2)
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], dim=-1)


# ---- RMSNorm (skip on a first reading) -------------------------------------------------------------


EPSILON = 1e-6  # for all dtypes; bfloat16's machine epsilon would swamp the small values of embeddings


def _one_over_rms(x_TD: Tensor) -> Tensor:
    """RMSNorm's scale of each token, 1 / sqrt(mean(x^2) + EPSILON): (T, 1)."""
    size_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
    epsilon = size_T1.new_full((), EPSILON)
    return torch.addcmul(epsilon, size_T1, size_T1, value=1 / x_TD.shape[-1]).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """`F.rms_norm(x, gain.shape, gain, EPSILON)`."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gain_D: Tensor) -> Tensor:
        scale_T1 = _one_over_rms(x_TD)
        ctx.save_for_backward(x_TD, gain_D, scale_T1)
        return (x_TD * scale_T1).mul_(gain_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, gain_D, scale_T1 = ctx.saved_tensors
        (grad_TD,) = grads
        normed_TD = x_TD * scale_T1
        product_TD = grad_TD * normed_TD
        along_T1 = (product_TD @ gain_D)[..., None].div_(x_TD.shape[-1])
        grad_gain_D = product_TD.flatten(0, -2).sum(0)
        grad_x_TD = torch.mul(grad_TD, gain_D, out=product_TD).addcmul_(normed_TD, along_T1, value=-1)
        return grad_x_TD.mul_(scale_T1), grad_gain_D


def rms_norm(x_TD: Tensor, gain_D: Tensor) -> Tensor:
    """`F.rms_norm(x, gain.shape, gain, EPSILON)`, whose CPU version takes eleven passes over memory."""
    gain_D = gain_D.to(x_TD.dtype)
    if x_TD.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x_TD, gain_D.shape, gain_D, EPSILON)
    if not torch.is_grad_enabled():
        return (x_TD * _one_over_rms(x_TD)).mul_(gain_D)
    normed: Tensor = _RMSNorm.apply(x_TD, gain_D)  # type: ignore[no-untyped-call]
    return normed


# ---- attention (skip on a first reading) -----------------------------------------------------------

BYTES_OF_SCORES = 2**21  # attention scores held at a time; small enough to stay in the CPU's caches
QUERIES = 128  # queries per block of causal attention; a block skips all keys after its last query


def rotary_attention(
    queries: Tensor,
    context: Tensor | None,
    query_table_QF: Tensor,
    key_table_JF: Tensor,
    *,
    mask_BJ: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """`F.scaled_dot_product_attention(rotate(q), rotate(k), v)` for every head: (B, Q, H, F).

    Self-attention passes its fused projection (B, Q, 3H, F) and no context. Cross-attention passes queries
    (B, Q, H, F) and the fused projection of its context (B, J, 2H, F). `mask_BJ` is False at keys to ignore;
    causal attention takes no mask.

    On a CPU this processes a few rows and heads at a time, which stay in the cache from the rotation to the
    gradients of the projections. Calling torch's operations one after the other takes 1.5 times as long; for
    bfloat16, whose backward pass converts and repacks small tiles, twice as long.
    """
    assert not causal or mask_BJ is None
    if queries.device.type != "cpu" or torch.compiler.is_compiling() or dropout > 0:
        q, k, v = _split_qkv(queries, context)
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, query_table_QF), rotate(k, key_table_JF), v))
        mask = None if mask_BJ is None else mask_BJ[:, None, None]  # (B, 1, 1, J)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal).transpose(1, 2)
    bias = None
    if mask_BJ is not None:
        bias = queries.new_zeros(mask_BJ.shape).masked_fill_(~mask_BJ, -math.inf)
    scaled_QF = query_table_QF / math.sqrt(queries.shape[-1])  # scaling the table scales the scores for free
    tables = scaled_QF.to(queries.dtype), key_table_JF.to(queries.dtype)
    out: Tensor = _RotaryAttention.apply(queries, context, *tables, bias, causal)  # type: ignore[no-untyped-call]
    return out


class _RotaryAttention(torch.autograd.Function):
    """`F.scaled_dot_product_attention(rotate(q), rotate(k), v, bias)`, tile by tile.

    The tables include the scale of the scores. Axes are those of `rotary_attention`, and `G`, the rows times the
    heads of a tile.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, context: Tensor | None, query_table: Tensor, key_table: Tensor,
        bias: Tensor | None, causal: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(queries, context, query_table, key_table, bias)
        ctx.causal = causal
        q, k, v = _split_qkv(queries, context)
        out = q.new_empty(q.shape)
        blocks = _blocks(q, k, causal)
        with torch.autocast("cpu", enabled=False):
            for tile in _tiles(q, k, causal):
                q_GQF, k_GJF = _heads_first(q[tile], query_table), _heads_first(k[tile], key_table)
                v_GJF, bias_tile = _heads_first(v[tile]), None if bias is None else bias[tile[0]]
                for q_slice, k_slice, future in blocks:
                    weights = _weights(q_GQF[:, q_slice], k_GJF[:, k_slice], bias_tile, future)
                    _tokens_first(weights @ v_GJF[:, k_slice], out[tile][:, q_slice])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, context, query_table, key_table, bias = ctx.saved_tensors
        grad_queries = torch.empty_like(queries)
        grad_context = None if context is None else torch.empty_like(context)
        q, k, v = _split_qkv(queries, context)
        grad_q, grad_k, grad_v = _split_qkv(grad_queries, grad_context)
        blocks = _blocks(q, k, ctx.causal)
        for tile in _tiles(q, k, ctx.causal):
            q_GQF, k_GJF = _heads_first(q[tile], query_table), _heads_first(k[tile], key_table)
            v_GJF, bias_tile = _heads_first(v[tile]), None if bias is None else bias[tile[0]]
            grad_GQF = _heads_first(grads[0][tile])
            grad_q_GQF, grad_k_GJF, grad_v_GJF = (torch.empty_like(x) for x in (q_GQF, k_GJF, v_GJF))
            add = 0  # the last queries attend to all keys, so they come first and initialize the gradients
            for q_slice, k_slice, future in reversed(blocks):
                weights = _weights(q_GQF[:, q_slice], k_GJF[:, k_slice], bias_tile, future)
                grad_weights = grad_GQF[:, q_slice] @ v_GJF[:, k_slice].mT
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                grad_v_GJF[:, k_slice].baddbmm_(weights.mT, grad_GQF[:, q_slice], beta=add)
                grad_k_GJF[:, k_slice].baddbmm_(grad_scores.mT, q_GQF[:, q_slice], beta=add)
                torch.bmm(grad_scores, k_GJF[:, k_slice], out=grad_q_GQF[:, q_slice])
                add = 1
            _tokens_first(grad_q_GQF, grad_q[tile], query_table)
            _tokens_first(grad_k_GJF, grad_k[tile], key_table)
            _tokens_first(grad_v_GJF, grad_v[tile])
        return grad_queries, grad_context, None, None, None, None


def _split_qkv(queries: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (B, Q or J, H, F), as views of the fused projections."""
    if context is None:
        q, k, v = queries.chunk(3, dim=-2)
    else:
        q, (k, v) = queries, context.chunk(2, dim=-2)
    return q, k, v


def _tiles(q_BQHF: Tensor, k_BJHF: Tensor, causal: bool) -> list[tuple[slice, slice, slice]]:
    """Index tuples (rows, tokens, heads), one per tile."""
    rows, num_queries, heads, _ = q_BQHF.shape
    scores_of_head = min(num_queries, QUERIES if causal else num_queries) * k_BJHF.shape[1]
    scores = BYTES_OF_SCORES // q_BQHF.element_size()
    some_heads = min(heads, max(1, scores // scores_of_head))
    some_rows = max(1, scores // (heads * scores_of_head))
    return [
        (slice(row, row + some_rows), slice(None), slice(head, head + some_heads))
        for row in range(0, rows, some_rows)
        for head in range(0, heads, some_heads)
    ]


def _blocks(q_BQHF: Tensor, k_BJHF: Tensor, causal: bool) -> list[tuple[slice, slice, Tensor | None]]:
    """Blocks of queries: (queries, keys they attend to, causal bias of the last keys).

    The bias is minus infinity where a key comes after a query; None without `causal`.
    """
    num_queries = q_BQHF.shape[1]
    if not causal:
        return [(slice(0, num_queries), slice(0, k_BJHF.shape[1]), None)]
    future = q_BQHF.new_full((QUERIES, QUERIES), -math.inf).triu_(1)
    blocks: list[tuple[slice, slice, Tensor | None]] = []
    for start in range(0, num_queries, QUERIES):
        end = min(start + QUERIES, num_queries)
        blocks.append((slice(start, end), slice(0, end), future[: end - start, : end - start]))
    return blocks


def _heads_first(x_BQHF: Tensor, table_QF: Tensor | None = None) -> Tensor:
    """Move heads before tokens for matrix products, and rotate if there is a table: (G, Q, F), contiguous."""
    if table_QF is None:
        return x_BQHF.transpose(1, 2).flatten(0, 1).contiguous()
    x_BHQF = x_BQHF.transpose(1, 2)
    out_BHQF = x_BHQF.new_empty(x_BHQF.shape)
    cos, sin = table_QF.chunk(2, dim=-1)
    _rotate_into(x_BHQF, cos, sin, out_BHQF)
    return out_BHQF.flatten(0, 1)


def _tokens_first(x_GQF: Tensor, out_BQHF: Tensor, table_QF: Tensor | None = None) -> None:
    """The inverse of `_heads_first`, written to `out`."""
    x_BHQF = x_GQF.view(len(out_BQHF), -1, *x_GQF.shape[1:])
    if table_QF is None:
        out_BQHF.copy_(x_BHQF.transpose(1, 2))
    else:
        cos, sin = table_QF.chunk(2, dim=-1)
        _rotate_into(x_BHQF, cos, -sin, out_BQHF.transpose(1, 2))


def _rotate_into(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """`out.copy_(rotate(x))`, with tokens on the second-to-last axis."""
    (a, b), (out_a, out_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)


def _weights(q_GQF: Tensor, k_GJF: Tensor, bias_BJ: Tensor | None, future: Tensor | None) -> Tensor:
    """The attention weights, softmax(q @ k.T + biases): (G, Q, J)."""
    scores = q_GQF @ k_GJF.mT
    if future is not None:
        scores[..., -len(future) :] += future
    if bias_BJ is not None:
        scores.view(len(bias_BJ), -1, *scores.shape[1:]).add_(bias_BJ[:, None, None])
    return scores.softmax(-1)


# ---- loss (skip on a first reading) ----------------------------------------------------------------

ROWS_OF_LOGITS = 512  # rows of logits held in memory at a time


class _LinearCrossEntropy(torch.autograd.Function):
    """`F.cross_entropy(hidden @ weight.T, labels, reduction="sum")`, without ever holding all logits.

    The gradient of the logits is softmax - onehot, up to a factor that depends only on what follows the sum. So
    the forward pass computes the gradients from each block of logits at once, and discards the block.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
        dtype = hidden_TD.dtype
        if torch.is_autocast_enabled(hidden_TD.device.type):
            dtype = torch.get_autocast_dtype(hidden_TD.device.type)
        precise = torch.promote_types(dtype, torch.float32)
        need_hidden, need_weight, _ = ctx.needs_input_grad
        with torch.autocast(hidden_TD.device.type, enabled=False):
            hidden, weight = hidden_TD.to(dtype), weight_VD.to(dtype)
            total = hidden.new_zeros((), dtype=precise)
            grad_hidden = torch.empty_like(hidden) if need_hidden else None
            grad_weight = torch.zeros_like(weight_VD, dtype=precise) if need_weight else None
            for start in range(0, len(labels_T), ROWS_OF_LOGITS):
                some = slice(start, start + ROWS_OF_LOGITS)
                labels_S1 = labels_T[some, None]
                log_share_SV = (hidden[some] @ weight.T).to(precise).log_softmax(-1)
                total -= log_share_SV.gather(1, labels_S1).sum()
                if not (need_hidden or need_weight):
                    continue
                grad_SV = log_share_SV.exp_()
                grad_SV.scatter_add_(1, labels_S1, grad_SV.new_full(labels_S1.shape, -1.0))
                grad_SV = grad_SV.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[some] = grad_SV @ weight
                if grad_weight is not None:
                    if dtype == precise:
                        grad_weight.addmm_(grad_SV.T, hidden[some])
                    else:
                        grad_weight += grad_SV.T @ hidden[some]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden_TD.dtype, weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        grad_hidden, grad_weight = (
            None if saved is None else (saved * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return grad_hidden, grad_weight, None


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """`F.cross_entropy(hidden @ weight.T, labels, reduction="sum")`, in nats, in little memory."""
    total: Tensor = _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T)  # type: ignore[no-untyped-call]
    return total
