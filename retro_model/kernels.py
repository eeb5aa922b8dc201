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


def _turn_(x_QHF: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x in its own memory."""
    a, b = x_QHF.chunk(2, dim=-1)
    turned_a = (a * cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).addcmul_(a, sin)
    a.copy_(turned_a)


class _RotateHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_QHF: Tensor, table_QF: Tensor, num_rotated: int) -> Tensor:
        cos, sin = table_QF.to(x_QHF.dtype).unsqueeze(-2).chunk(2, dim=-1)
        _turn_(x_QHF[..., :num_rotated, :], cos, sin)
        ctx.save_for_backward(cos, sin)
        ctx.num_rotated = num_rotated
        ctx.mark_dirty(x_QHF)
        return x_QHF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad_QHF = grads[0].clone()
        _turn_(grad_QHF[..., : ctx.num_rotated, :], cos, -sin)  # the gradient turns back
        return grad_QHF, None, None


def rotate_heads(x_QHF: Tensor, table_QF: Tensor, num_rotated: int) -> Tensor:
    """`cat([rotate(x[..., :n, :]), x[..., n:, :]], -2)`, in the memory of x.

    x is a fused projection of queries, keys and values, which nobody needs unrotated.
    """
    if torch.compiler.is_compiling():  # a compiler fuses the plain form
        return torch.cat([rotate(x_QHF[..., :num_rotated, :], table_QF), x_QHF[..., num_rotated:, :]], dim=-2)
    rotated: Tensor = _RotateHeads.apply(x_QHF, table_QF, num_rotated)  # type: ignore[no-untyped-call]
    return rotated


# ---- RMSNorm ---------------------------------------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        size_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
        scale_T1 = size_T1.square_().div_(x_TD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, gain_D, scale_T1)
        return (x_TD * scale_T1).mul_(gain_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TD, gain_D, scale_T1 = ctx.saved_tensors
        (grad_TD,) = grads
        normed_TD = x_TD * scale_T1
        product_TD = grad_TD * normed_TD
        along_T1 = (product_TD @ gain_D)[..., None].div_(x_TD.shape[-1])
        grad_gain_D = product_TD.flatten(0, -2).sum(0)
        grad_x_TD = torch.mul(grad_TD, gain_D, out=product_TD).addcmul_(normed_TD, along_T1, value=-1)
        return grad_x_TD.mul_(scale_T1), grad_gain_D, None


def rms_norm(x_TD: Tensor, gain_D: Tensor) -> Tensor:
    """`F.rms_norm(x, gain.shape, gain)`, which on a CPU takes eleven passes over memory."""
    gain_D = gain_D.to(x_TD.dtype)
    if x_TD.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x_TD, gain_D.shape, gain_D)
    normed: Tensor = _RMSNorm.apply(x_TD, gain_D, torch.finfo(x_TD.dtype).eps)  # type: ignore[no-untyped-call]
    return normed


# ---- attention over few keys -----------------------------------------------------------------------

SHORT = 512 * 256  # queries times keys up to which all scores of a few rows are cheaper than tiles


def short_attention_is_faster(q_BHQF: Tensor, k_BHJF: Tensor) -> bool:
    """Whether `short_attention` beats torch: in training, for bfloat16 on a CPU, with few keys.

    torch's backward pass goes through small tiles there, each converted and packed anew: three times as
    slow as plain matrix products over 128 x 128 scores, and slower than its own float32.
    """
    return (
        q_BHQF.device.type == "cpu"
        and q_BHQF.dtype == torch.bfloat16
        and q_BHQF.dim() == 4  # noqa: PLR2004
        and q_BHQF.shape[-2] * k_BHJF.shape[-2] <= SHORT
        and torch.is_grad_enabled()
        and q_BHQF.requires_grad
    )


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            out = F.scaled_dot_product_attention(q, k, v, bias)
        ctx.save_for_backward(q, k, v, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, bias = ctx.saved_tensors
        scale = 1 / math.sqrt(q.shape[-1])
        # (B, Q, H, F) in memory, as the projections want it
        grad_q, grad_k, grad_v = (torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
        rows = max(1, SHORT // (q.shape[2] * k.shape[2]) // 2)
        for start in range(0, len(q), rows):  # so few that their scores stay in the cache
            some = slice(start, start + rows)
            scaled, key, grad = q[some] * scale, k[some], grads[0][some]
            scores = scaled @ key.mT  # (rows, H, Q, J)
            if bias is not None:
                scores += bias[some] if len(bias) > 1 else bias
            weights = scores.softmax(-1)
            grad_v[some] = weights.mT @ grad
            grad_weights = grad @ v[some].mT
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_q[some] = (grad_scores @ key).mul_(scale)
            grad_k[some] = grad_scores.mT @ scaled
        return grad_q, grad_k, grad_v, None


def short_attention(q_BHQF: Tensor, k_BHJF: Tensor, v_BHJF: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """`F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)` with another backward pass."""
    bias = None
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=q_BHQF.dtype).masked_fill_(~mask, -math.inf)
    if causal:
        shape = q_BHQF.shape[-2], k_BHJF.shape[-2]
        bias = torch.full(shape, -math.inf, dtype=q_BHQF.dtype, device=q_BHQF.device).triu_(1)[None, None]
    out: Tensor = _ShortAttention.apply(q_BHQF, k_BHJF, v_BHJF, bias)  # type: ignore[no-untyped-call]
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
