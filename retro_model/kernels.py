"""Four operations whose textbook form wastes time or memory, each with its gradient written out.

Every one of them equals a line of ordinary torch, which its docstring gives and the tests compare it
with. They matter on CPUs, where eager torch spends a third of a training step on passes over memory
that a GPU hides or fuses; the loss matters everywhere.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- rotary positions ------------------------------------------------------------------------------


def rotate(x_QHF: Tensor, table_QF: Tensor) -> Tensor:
    """Turn each head's features (..., Q, H, F) by the position of its token (cosines and sines).

    The product of a rotated query and a rotated key depends on the two positions only through
    their difference, which is what makes an absolute rotation a relative position.
    """
    cos, sin = table_QF.to(x_QHF.dtype).unsqueeze(-2).chunk(2, dim=-1)  # (Q, 1, F/2): equal for all heads
    a, b = x_QHF.chunk(2, dim=-1)  # (..., Q, H, F/2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _turn(x_QHF: Tensor, cos: Tensor, sin: Tensor, out_QHF: Tensor) -> None:
    """Write the rotated x to `out`, which may be x itself."""
    (a, b), (out_a, out_b) = x_QHF.chunk(2, dim=-1), out_QHF.chunk(2, dim=-1)
    turned_a = (a * cos).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    out_a.copy_(turned_a)


class _NoGraph:
    """What a Function's forward pass leaves for its backward pass, when there will be none."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Nothing is kept."""


class _RotateParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_QHF: Tensor, table_QF: Tensor, num_parts: int, num_rotated: int) -> tuple[Tensor, ...]:
        cos, sin = table_QF.to(x_QHF.dtype).unsqueeze(-2).chunk(2, dim=-1)
        parts = x_QHF.detach().chunk(num_parts, dim=-2)
        for part in parts[:num_rotated]:
            _turn(part, cos, sin, part)
        ctx.save_for_backward(cos, sin)
        ctx.num_rotated = num_rotated
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        *outer, heads, features = grads[0].shape
        grad_QHF = grads[0].new_empty(*outer, len(grads) * heads, features)
        for number, (grad, out) in enumerate(zip(grads, grad_QHF.chunk(len(grads), dim=-2), strict=True)):
            if number < ctx.num_rotated:
                _turn(grad, cos, -sin, out)  # the gradient turns back
            else:
                out.copy_(grad)
        return grad_QHF, None, None, None


def rotate_parts(x_QHF: Tensor, table_QF: Tensor, num_parts: int, num_rotated: int) -> tuple[Tensor, ...]:
    """`x.chunk(num_parts, dim=-2)` with the first parts rotated, in the memory of x.

    x is a fused projection of queries, keys and values, which nobody needs unrotated.
    """
    if torch.compiler.is_compiling():  # a compiler fuses the plain form
        parts = x_QHF.chunk(num_parts, dim=-2)
        return tuple(rotate(part, table_QF) if i < num_rotated else part for i, part in enumerate(parts))
    if not torch.is_grad_enabled():
        return _RotateParts.forward(_NoGraph(), x_QHF, table_QF, num_parts, num_rotated)
    rotated: tuple[Tensor, ...] = _RotateParts.apply(x_QHF, table_QF, num_parts, num_rotated)  # type: ignore[no-untyped-call]
    return rotated


# ---- RMSNorm ---------------------------------------------------------------------------------------


EPSILON = 1e-6  # one for all dtypes: that of bfloat16 would drown an embedding's small numbers


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gain_D: Tensor) -> Tensor:
        size_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
        scale_T1 = size_T1.square_().div_(x_TD.shape[-1]).add_(EPSILON).rsqrt_()
        ctx.save_for_backward(x_TD, gain_D, scale_T1)
        normed_TD: Tensor = (x_TD * scale_T1).mul_(gain_D)
        return normed_TD

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
    """`F.rms_norm(x, gain.shape, gain, EPSILON)`, which on a CPU takes eleven passes over memory."""
    gain_D = gain_D.to(x_TD.dtype)
    if x_TD.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x_TD, gain_D.shape, gain_D, EPSILON)
    if not torch.is_grad_enabled():
        return _RMSNorm.forward(_NoGraph(), x_TD, gain_D)
    normed: Tensor = _RMSNorm.apply(x_TD, gain_D)  # type: ignore[no-untyped-call]
    return normed


# ---- attention over few keys -----------------------------------------------------------------------

SHORT = 1024  # keys up to which plain matrix products are faster
SCORES = 2**18  # scores that are in memory at a time, so few that they stay in the cache


def short_attention_is_faster(q_BHQF: Tensor, k_BHJF: Tensor) -> bool:
    """Whether `short_attention` beats torch: in training, for bfloat16 on a CPU, with few keys.

    torch's backward pass goes through small tiles there, each converted and packed anew: three times as
    slow as plain matrix products over 128 x 128 scores, and slower than its own float32.
    """
    return (
        q_BHQF.device.type == "cpu"
        and q_BHQF.dtype == torch.bfloat16
        and q_BHQF.dim() == 4
        and k_BHJF.shape[-2] <= SHORT
        and torch.is_grad_enabled()
        and q_BHQF.requires_grad
    )


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            out = F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal)
        ctx.save_for_backward(q, k, v, bias)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, bias = ctx.saved_tensors
        q, k, v, grad = (x.contiguous() for x in (q, k, v, grads[0]))
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        num_rows, heads, num_queries, _ = q.shape
        # With causal attention a block of queries needs no later keys; without, all queries are one block.
        block = min(num_queries, 128) if ctx.causal else num_queries
        rows = max(1, SCORES // (heads * block * k.shape[2]))
        for row in range(0, num_rows, rows):
            some = slice(row, row + rows)
            for start in range(0, num_queries, block):
                end = min(start + block, num_queries)
                seen = slice(0, end if ctx.causal else k.shape[2])
                grads_some = _attention_backward(
                    q[some, :, start:end], k[some, :, seen], v[some, :, seen], grad[some, :, start:end],
                    None if bias is None else bias[some] if len(bias) > 1 else bias, start if ctx.causal else None,
                )  # fmt: skip
                grad_q[some, :, start:end] = grads_some[0]
                grad_k[some, :, seen] += grads_some[1]
                grad_v[some, :, seen] += grads_some[2]
        return grad_q, grad_k, grad_v, None, None


def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, bias: Tensor | None, first_query: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of softmax(q k + bias) v; causal if the place of the first query is given."""
    scaled = q * (1 / math.sqrt(q.shape[-1]))
    scores = scaled @ k.mT
    if bias is not None:
        scores += bias
    if first_query is not None:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(first_query + 1)
        scores.masked_fill_(future, -math.inf)
    weights = scores.softmax(-1)
    grad_weights = grad @ v.mT
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    grad_q = (grad_scores @ k).mul_(1 / math.sqrt(q.shape[-1]))
    return grad_q, grad_scores.mT @ scaled, weights.mT @ grad


def short_attention(q_BHQF: Tensor, k_BHJF: Tensor, v_BHJF: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """`F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)` with another backward pass."""
    bias = None
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=q_BHQF.dtype).masked_fill_(~mask, -math.inf)
    out: Tensor = _ShortAttention.apply(q_BHQF, k_BHJF, v_BHJF, bias, causal)  # type: ignore[no-untyped-call]
    return out


# ---- loss ------------------------------------------------------------------------------------------

ROWS_OF_LOGITS = 512  # logits that are in memory at a time


class _LinearCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of hidden @ weight.T, without ever holding all logits.

    The gradient of the logits is softmax - onehot whatever comes after the sum, up to a factor: so the
    forward pass turns each block of logits into gradients at once and forgets it.
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
                logits_SV = (hidden[some] @ weight.T).to(precise)
                log_sum_S1 = logits_SV.logsumexp(-1, keepdim=True)
                total += (log_sum_S1 - logits_SV.gather(1, labels_S1)).sum()
                if not (need_hidden or need_weight):
                    continue
                grad_SV = logits_SV.sub_(log_sum_S1).exp_()
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
    """The cross-entropy of logits hidden @ weight.T summed over all tokens, in nats."""
    total: Tensor = _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T)  # type: ignore[no-untyped-call]
    return total
