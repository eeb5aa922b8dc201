"""The hand-written gradients against the one-line forms that they stand for."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from retro_model.network import kernels
from retro_model.network.attention import rotary_table
from retro_model.network.kernels import (
    QUERIES,
    ROWS_OF_LOGITS,
    linear_cross_entropy,
    rms_norm,
    rotary_attention,
    rotate,
)


def same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 1e-9) -> None:
    """Equal results, and equal gradients of every input under a random weighting of the result."""
    results, gradients = [], []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*[x * 1 for x in leaves])  # not leaves, because some are overwritten
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gradients.append(torch.autograd.grad((out * weight).sum(), leaves))
        results.append(out.detach())
    torch.testing.assert_close(results[0], results[1], atol=tolerance, rtol=tolerance)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    same(rms_norm, lambda x, gain: F.rms_norm(x, gain.shape, gain, 1e-6), randn(*shape), randn(shape[-1]))


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (3, 1, 2, 5)])
def test_rms_norm_without_gradients(shape: tuple[int, ...]) -> None:
    x, gain = randn(*shape), randn(shape[-1])
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, gain), F.rms_norm(x, gain.shape, gain, 1e-6), atol=1e-9, rtol=1e-9)


def plain_attention(
    queries: Tensor, context: Tensor | None, tables: tuple[Tensor, Tensor], mask: Tensor | None, causal: bool
) -> Tensor:
    """What `rotary_attention` stands for."""
    q, k, v = queries.chunk(3, -2) if context is None else (queries, *context.chunk(2, -2))
    q, k, v = rotate(q, tables[0]).transpose(1, 2), rotate(k, tables[1]).transpose(1, 2), v.transpose(1, 2)
    mask = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2)


def tables_for(queries: int, keys: int, features: int) -> tuple[Tensor, Tensor]:
    return (
        rotary_table(torch.arange(queries) + 3, features, torch.float64),
        rotary_table(torch.arange(keys), features, torch.float64),
    )


def mask_for(rows: int, keys: int) -> Tensor:
    mask = torch.rand(rows, keys, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, 0] = True
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "queries", "keys", "heads"), [(3, 4, 9, 2), (2, 5, 3, 1), (5, 256, 250, 2)])
def test_rotary_attention_to_a_context(rows: int, queries: int, keys: int, heads: int, masked: bool) -> None:
    tables, mask = tables_for(queries, keys, 6), mask_for(rows, keys) if masked else None
    same(
        lambda q, kv: rotary_attention(q, kv, *tables, mask_BJ=mask),
        lambda q, kv: plain_attention(q, kv, tables, mask, False),
        randn(rows, queries, heads, 6), randn(rows, keys, 2 * heads, 6),
    )  # fmt: skip


@pytest.mark.parametrize("length", [1, QUERIES - 1, QUERIES, 2 * QUERIES + 5])
@pytest.mark.parametrize(("causal", "masked"), [(True, False), (False, True), (False, False)])
def test_rotary_attention_to_itself(length: int, causal: bool, masked: bool) -> None:
    tables, mask = (tables_for(length, length, 6)[1],) * 2, mask_for(2, length) if masked else None
    same(
        lambda qkv: rotary_attention(qkv, None, *tables, mask_BJ=mask, causal=causal),
        lambda qkv: plain_attention(qkv, None, tables, mask, causal),
        randn(2, length, 3 * 2, 6),
    )  # fmt: skip


@pytest.mark.parametrize("scores", [1, 4 * 4, 2 * 4 * 4, 2 * 3 * 4 * 4, 2**18])
def test_rotary_attention_in_tiles_of_any_size(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    """One head, two of three heads, all heads of one row, two rows of five, everything at once."""
    monkeypatch.setattr(kernels, "BYTES_OF_SCORES", 8 * scores)
    tables, mask = (tables_for(4, 4, 6)[1],) * 2, mask_for(5, 4)
    same(
        lambda qkv: rotary_attention(qkv, None, *tables, mask_BJ=mask),
        lambda qkv: plain_attention(qkv, None, tables, mask, False),
        randn(5, 4, 3 * 3, 6),
    )  # fmt: skip


def test_rotary_attention_gradcheck() -> None:
    tables = tables_for(3, 4, 4)
    inputs = randn(2, 3, 2, 4).requires_grad_(), randn(2, 4, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, kv: rotary_attention(q, kv, *tables, mask_BJ=mask_for(2, 4)), inputs)


def test_rotary_attention_in_bfloat16() -> None:
    """As near to float64 as torch's own attention in bfloat16 is, and under autocast no other dtype."""
    tables = (tables_for(200, 200, 16)[1],) * 2
    exact = randn(2, 200, 3 * 2, 16).requires_grad_()
    weight = randn(2, 200, 2, 16)
    (expected,) = torch.autograd.grad((plain_attention(exact, None, tables, None, True) * weight).sum(), exact)
    errors = []
    for function in (
        lambda x: rotary_attention(x, None, *tables, causal=True),
        lambda x: plain_attention(x, None, tables, None, True),
    ):
        rough = exact.detach().bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = function(rough)
        assert out.dtype == torch.bfloat16
        (grad,) = torch.autograd.grad(out, rough, weight.bfloat16())
        errors.append((grad.double() - expected).norm() / expected.norm())
    assert errors[0] < 0.02
    assert errors[0] < 2 * errors[1]


def test_rotary_attention_with_dropout_is_torchs() -> None:
    tables, qkv = (tables_for(5, 5, 6)[1],) * 2, randn(2, 5, 6, 6)
    torch.manual_seed(0)
    dropped = rotary_attention(qkv, None, *tables, causal=True, dropout=0.5)
    q, k, v = qkv.chunk(3, -2)
    q, k = rotate(q, tables[0]), rotate(k, tables[1])
    torch.manual_seed(0)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v, None, 0.5, True).transpose(1, 2)
    torch.testing.assert_close(dropped, expected)
    assert not torch.allclose(dropped, rotary_attention(qkv, None, *tables, causal=True))


@pytest.mark.parametrize("rows", [1, ROWS_OF_LOGITS, ROWS_OF_LOGITS + 3])
def test_linear_cross_entropy(rows: int) -> None:
    labels = torch.randint(0, 23, (rows,), generator=torch.Generator().manual_seed(0))
    same(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, labels),
        lambda hidden, weight: F.cross_entropy(hidden @ weight.T, labels, reduction="sum"),
        randn(rows, 5), randn(23, 5),
    )  # fmt: skip


def test_linear_cross_entropy_of_frozen_weights() -> None:
    hidden, weight, labels = randn(4, 5).requires_grad_(), randn(23, 5), torch.arange(4)
    linear_cross_entropy(hidden, weight, labels).backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, labels) > 0
