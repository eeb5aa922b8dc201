"""The hand-written gradients against the one-line forms that they stand for."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from retro_model.attention import rotary_table
from retro_model.kernels import (
    ROWS_OF_LOGITS,
    linear_cross_entropy,
    rms_norm,
    rotate,
    rotate_parts,
    short_attention,
    short_attention_is_faster,
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


@pytest.mark.parametrize(("num_parts", "num_rotated"), [(1, 1), (2, 1), (3, 2)])
def test_rotate_parts(num_parts: int, num_rotated: int) -> None:
    table = rotary_table(torch.arange(5), 8, torch.float64)

    def plain(x: Tensor) -> Tensor:
        parts = x.chunk(num_parts, dim=-2)
        return torch.cat([rotate(part, table) if i < num_rotated else part for i, part in enumerate(parts)], -2)

    same(lambda x: torch.cat(rotate_parts(x, table, num_parts, num_rotated), -2), plain, randn(3, 5, 6, 8))


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    same(rms_norm, lambda x, gain: F.rms_norm(x, gain.shape, gain, 1e-6), randn(*shape), randn(shape[-1]))


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "masked"),
    [(6, 6, True, False), (300, 300, True, False), (4, 9, False, True), (5, 3, False, False)],
)
def test_short_attention(queries: int, keys: int, causal: bool, masked: bool) -> None:
    mask = None
    if masked:
        mask = torch.ones(3, 1, 1, keys, dtype=torch.bool)
        mask[1, ..., 4:] = False
    same(
        lambda q, k, v: short_attention(q, k, v, mask, causal),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal),
        randn(3, queries, 2, 8).transpose(1, 2), randn(3, keys, 2, 8).transpose(1, 2), randn(3, 2, keys, 8),
    )  # fmt: skip


def test_short_attention_over_several_blocks_of_rows() -> None:
    inputs = [x.transpose(1, 2) for x in (randn(5, 256, 1, 4), randn(5, 250, 1, 4), randn(5, 251, 1, 4)[:, :250])]
    mask = torch.rand(5, 1, 1, 250, generator=torch.Generator().manual_seed(0)) < 0.5
    same(
        lambda q, k, v: short_attention(q, k, v, mask, False),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask),
        *inputs,
    )


def test_short_attention_is_for_training_in_bfloat16() -> None:
    q = torch.zeros(1, 1, 128, 8, dtype=torch.bfloat16, requires_grad=True)
    assert short_attention_is_faster(q, q)
    assert not short_attention_is_faster(q.float(), q)
    assert not short_attention_is_faster(q, q.repeat(1, 1, 16, 1))
    with torch.no_grad():
        assert not short_attention_is_faster(q, q)


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
