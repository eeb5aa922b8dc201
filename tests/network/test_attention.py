"""The attention parts against loops, and the positions that chunked cross-attention sees."""

import math
from functools import partial

import network_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retro_model.network import attention, model
from retro_model.network.attention import attend_context, attend_documents, attending_chunks, rotary_table, unshift
from retro_model.network.kernels import rotate
from retro_model.network.model import RETRO


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(1, 8))
def test_rotated_score_depends_on_distance(query_at: int, key_at: int, half: int) -> None:
    q, k = randn(2, 2 * half).unbind()
    table = rotary_table(torch.tensor([query_at, key_at]), 2 * half, torch.float64)
    turned = rotate(torch.stack([q, k])[:, None], table)[:, 0]
    expected = reference.score(q, k, query_at - key_at) * math.sqrt(2 * half)
    torch.testing.assert_close(turned[0] @ turned[1], expected, atol=1e-9, rtol=1e-9)


def test_rotation_keeps_position_zero_and_length() -> None:
    x = randn(5, 3, 8)
    turned = rotate(x, rotary_table(torch.arange(5), 8, torch.float64))
    torch.testing.assert_close(turned[0], x[0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(turned[1:], x[1:])


def still(length: int, dim_head: int) -> Tensor:
    """A table that turns nothing, for tests of who sees whom."""
    return rotary_table(torch.zeros(length), dim_head, torch.float64)


def test_attention_to_a_context_is_a_masked_softmax_for_each_head() -> None:
    q, k, v = randn(2, 4, 3, 8), randn(2, 5, 3, 8, seed=1), randn(2, 5, 3, 8, seed=2)
    mask = torch.rand(2, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[..., 0] = True
    context = torch.cat([k, v], dim=2)
    out = attend_context(q, still(4, 8), 0.0, context_BJHF=context, key_table_JF=still(5, 8), mask_BJ=mask)
    for b in range(2):
        for i in range(4):
            for h in range(3):
                scores = (k[b, :, h] @ q[b, i, h] / math.sqrt(8)).masked_fill(~mask[b], -math.inf)
                torch.testing.assert_close(out[b, i, h], scores.softmax(0) @ v[b, :, h])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=4))
def test_documents_in_a_stream_do_not_see_each_other(groups: list[tuple[int, int]]) -> None:
    total = sum(count * length for count, length in groups)
    q, k, v = (randn(total, 2, 4, seed=seed) for seed in range(3))
    out = attend_documents(torch.cat([q, k, v], dim=1), still(6, 4), 0.0, groups=groups)
    start = 0
    for length in (length for count, length in groups for _ in range(count)):
        for i in range(start, start + length):
            for h in range(2):
                weights = (k[start : i + 1, h] @ q[i, h] / 2).softmax(0)
                torch.testing.assert_close(out[i, h], weights @ v[start : i + 1, h])
        start += length


@pytest.mark.parametrize("groups", [[(2, 3), (1, 5)], [(1, 7)]])
def test_every_document_counts_from_zero(groups: list[tuple[int, int]]) -> None:
    total = sum(count * length for count, length in groups)
    q, k, v = (randn(total, 2, 4, seed=seed) for seed in range(3))
    position = torch.cat([torch.arange(length) for count, length in groups for _ in range(count)])
    table = rotary_table(position, 4, torch.float64)
    turned = torch.cat([rotate(q, table), rotate(k, table), v], dim=1)
    expected = attend_documents(turned, still(7, 4), 0.0, groups=groups)
    whole = rotary_table(torch.arange(7), 4, torch.float64)
    out = attend_documents(torch.cat([q, k, v], dim=1), whole, 0.0, groups=groups)
    torch.testing.assert_close(out, expected)


def test_neighbors_see_themselves_and_no_padding() -> None:
    q, k, v = (randn(2, 3 * 4, 2, 4, seed=seed) for seed in range(3))
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0, 1, 2:] = False
    mask[1, 2] = False
    out = model.attend_neighbors(torch.cat([q, k, v], dim=2), still(4, 4), 0.0, mask_AKR=mask)
    assert out.isfinite().all()
    for a in range(2):
        for j in range(12):
            keys = [i for i in range(12) if i // 4 == j // 4 and mask[a, i // 4, i % 4]]
            if keys:
                weights = torch.einsum("khf,hf->kh", k[a, keys], q[a, j] / 2).softmax(0)
                torch.testing.assert_close(out[a, j], torch.einsum("kh,khf->hf", weights, v[a, keys]))


@given(st.integers(1, 5), st.integers(1, 4))
def test_attending_chunks_start_at_the_last_token(chunks: int, chunk_size: int) -> None:
    x = torch.arange(1, chunks * chunk_size + 1).double()[:, None]
    shifted = attending_chunks(x, chunk_size)
    for u in range(chunks):
        for i in range(chunk_size):
            position = (u + 1) * chunk_size - 1 + i
            assert shifted[u, i, 0] == (x[position, 0] if position < len(x) else 0)
    assert torch.equal(unshift(shifted, x[: chunk_size - 1]), x)


# ---- positions in chunked cross-attention: trap 1 ---------------------------------------------------


def cross_scores(monkeypatch: pytest.MonkeyPatch, chunk_size: int, num_neighbors: int, length: int) -> Tensor:
    """Scores of all queries with all keys when all queries, and all keys, are one and the same vector.

    So what differs between two scores is their position part. Taken where the network hands queries, keys
    and their tables to the kernel: (H, M, K * R) of the last attending chunk.
    """
    torch.manual_seed(0)
    retro = RETRO(
        num_tokens=11,
        enc_dim=8,
        enc_depth=1,
        dec_dim=8,
        dec_depth=1,
        dec_cross_attn_layers=(1,),
        heads=2,
        dim_head=8,
        chunk_size=chunk_size,
    ).double()
    caught: list[tuple[Tensor, Tensor]] = []
    original = attention.rotary_attention

    def spy(query: Tensor, context: Tensor, query_table: Tensor, key_table: Tensor, **options: object) -> Tensor:
        caught.append((rotate(query, query_table), rotate(context.chunk(2, dim=-2)[0], key_table)))
        return original(query, context, query_table, key_table, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "rotary_attention", spy)
    cross = retro.decoder[0].cross_attention
    assert cross is not None
    x = torch.randn(8, dtype=torch.float64).expand(3 * chunk_size, 8)
    encoded = torch.randn(8, dtype=torch.float64).expand(3, num_neighbors * length, 8)
    tables = model.cross_positions(retro.config, num_neighbors, length, encoded)
    mask = torch.ones(3, num_neighbors, length, dtype=torch.bool)
    attends = model.attends_retrieval(torch.arange(3), torch.ones(3, dtype=torch.bool), chunk_size)
    retrieval = model.Retrieval(encoded, None, mask, mask.flatten(1), None, attends, *tables)
    model.chunked_cross_attention(cross, x, retrieval, chunk_size)
    ((query, key),) = caught
    return torch.einsum("qhf,jhf->hqj", query[0], key[0]).detach()


@pytest.mark.parametrize(("chunk_size", "num_neighbors", "length"), [(4, 1, 8), (4, 3, 9), (1, 2, 2), (64, 2, 128)])
def test_cross_attention_sees_distances(
    monkeypatch: pytest.MonkeyPatch, chunk_size: int, num_neighbors: int, length: int
) -> None:
    """Query i and token j are at distance i - j + M - 1, whatever i, j, head and neighbor."""
    scores = cross_scores(monkeypatch, chunk_size, num_neighbors, length)
    scores = scores.unflatten(-1, (num_neighbors, length))  # (H, M, K, R)
    for k in range(1, num_neighbors):
        torch.testing.assert_close(scores[:, :, k], scores[:, :, 0])
    by_distance: dict[int, Tensor] = {}
    for i in range(chunk_size):
        for j in range(length):
            seen = by_distance.setdefault(i - j + chunk_size - 1, scores[:, i, 0, j])
            torch.testing.assert_close(scores[:, i, 0, j], seen, atol=1e-9, rtol=0)
    assert len(by_distance) == chunk_size + length - 1
    values = torch.stack(list(by_distance.values()))[:, 0]
    assert len(values.unique()) == len(values), "different distances must be told apart"


def test_cross_attention_distance_zero_is_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The absolute distance, not only its differences: query 0 stands at token M - 1 of a neighbor."""
    torch.manual_seed(0)
    chunk_size, length = 4, 8
    scores = cross_scores(monkeypatch, chunk_size, 1, length)
    monkeypatch.setattr(model, "cross_positions", partial(zero_positions, original=model.cross_positions))
    plain = cross_scores(monkeypatch, chunk_size, 1, length)  # nothing is turned: all products are equal
    for i in range(chunk_size):
        torch.testing.assert_close(scores[:, i, i + chunk_size - 1], plain[:, 0, 0])


def zero_positions(*args: object, original: object) -> tuple[Tensor, ...]:
    tables = original(*args)  # type: ignore[operator]
    return tuple(
        table[:1].expand_as(table) if place else rotary_table(torch.zeros(len(table)), 8, table.dtype)
        for place, table in zip((0, 1), tables, strict=True)
    )
