"""Which neighbor tokens each token looked at: as a loop over positions finds it."""

from itertools import pairwise
from typing import Any

import network_reference as reference
import pytest
import torch
from torch import Tensor

from retro_model.network.attention_maps import AttentionMaps, neighbor_attention_maps
from retro_model.network.model import RETRO

M, R, K, V = 4, 6, 3, 23

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deepnet": {"use_deepnet": True},
    "sink": {"cross_attn_sink": True},
    "copying, one layer": {"copy_tokens": 1, "dec_cross_attn_layers": (3,)},
    "copying, sink, deepnet": {"copy_tokens": 3, "cross_attn_sink": True, "use_deepnet": True},
}


def make(**changes: Any) -> RETRO:
    """A small float64 model whose attention is far from even."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_tokens": V, "max_seq_len": 8 * M, "heads": 2, "dim_head": 6, "chunk_size": M}
    encoder, decoder = {"enc_dim": 12, "enc_depth": 2}, {"dec_dim": 8, "dec_depth": 3, "dec_cross_attn_layers": (1, 3)}
    model = RETRO(**(sizes | encoder | decoder | changes)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" in name or "sink" in name:
                parameter.normal_(std=0.7)
            if "query" in name:
                parameter.mul_(8)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))


def with_gaps(retrieved: Tensor) -> Tensor:
    """The neighbors of two rows of three chunks or more, some of them missing."""
    retrieved[0, 0, 1] = 0  # a missing neighbor between two
    retrieved[0, 1] = 0  # a chunk without neighbors
    retrieved[1, 2, 0, M:] = 0  # a neighbor without continuation
    retrieved[1, 0, 0, 2] = 0  # padding inside
    return retrieved


def check(found: AttentionMaps, row: slice, model: RETRO, seq: Tensor, retrieved: Tensor) -> None:
    """Compare a part of a row with the loop over the one document that it is."""
    expected, nothing = reference.attention_to_neighbors(model, seq.tolist(), retrieved.tolist())
    torch.testing.assert_close(found.neighbors_BNKR[0, row], expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found.nothing_BN[0, row], nothing, atol=1e-9, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(("variant", "length"), [("plain", 3 * M), *((name, 3 * M + 2) for name in VARIANTS)])
def test_the_attention_is_that_of_a_loop_over_positions(variant: str, length: int) -> None:
    model = make(**VARIANTS[variant])
    seq, retrieved = tokens(2, length), with_gaps(tokens(2, 3, K, R, seed=7))
    found = neighbor_attention_maps(model, seq, retrieved)
    for row in range(2):
        of_row = AttentionMaps(found.neighbors_BNKR[row : row + 1], found.nothing_BN[row : row + 1])
        check(of_row, slice(None), model, seq[row], retrieved[row])
    total = found.neighbors_BNKR.sum((2, 3)) + found.nothing_BN
    reads = torch.ones(2, length, dtype=torch.float64)
    reads[:, : M - 1] = 0  # nothing is retrieved before the first chunk's last token
    reads[0, 2 * M - 1 : 3 * M - 1] = 0  # the tokens that read the neighbors of the chunk without any
    torch.testing.assert_close(total, reads)
    assert bool((found.nothing_BN[reads > 0] > 0).all()) == model.config.cross_attn_sink
    assert found.neighbors_BNKR.max() > 0.25, "far from even, which would be less than 0.1"


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "copying, sink, deepnet"])
def test_packed_documents_are_each_as_if_alone(variant: str) -> None:
    model = make(**VARIANTS[variant])
    documents = torch.tensor([[0, 1, 1, 1, 2, 3, 3], [0, 0, 1, 2, 2, 2, 2]])
    seq, retrieved = tokens(2, 7 * M), with_gaps(tokens(2, 7, K, R, seed=7))
    found = neighbor_attention_maps(model, seq, retrieved, documents)
    for row, numbers in enumerate(documents.tolist()):
        cuts = [0, *(place for place, (a, b) in enumerate(pairwise(numbers), start=1) if a != b), 7]
        of_row = AttentionMaps(found.neighbors_BNKR[row : row + 1], found.nothing_BN[row : row + 1])
        for start, stop in pairwise(cuts):
            inside = slice(start * M, stop * M)
            check(of_row, inside, model, seq[row, inside], retrieved[row, start:stop])


@torch.no_grad()
def test_one_neighbor_needs_no_axis_of_its_own() -> None:
    model = make(cross_attn_sink=True)
    seq, retrieved = tokens(1, 3 * M), tokens(1, 3, 1, R, seed=7)
    found = neighbor_attention_maps(model, seq, retrieved)
    check(found, slice(None), model, seq[0], retrieved[0])
    assert torch.equal(found.neighbors_BNKR, neighbor_attention_maps(model, seq, retrieved[:, :, 0]).neighbors_BNKR)


def test_without_any_neighbor_all_is_zero() -> None:
    model = make()
    seq = tokens(2, 2 * M + 1)
    for retrieved in (torch.zeros(2, 2, K, R, dtype=torch.long), torch.zeros(2, 2, 0, R, dtype=torch.long)):
        found = neighbor_attention_maps(model, seq, retrieved)
        assert found.neighbors_BNKR.shape == (2, 2 * M + 1, *retrieved.shape[2:])
        assert not found.neighbors_BNKR.any() and not found.nothing_BN.any()


@torch.no_grad()
def test_the_network_is_left_as_it_was() -> None:
    model = make()
    seq, retrieved = tokens(2, 3 * M), tokens(2, 3, K, R, seed=7)
    before = model(seq, retrieved)
    neighbor_attention_maps(model, seq, retrieved)
    assert torch.equal(model(seq, retrieved), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_bfloat16_gives_shares_in_float32() -> None:
    model = make(cross_attn_sink=True).float()
    seq, retrieved = tokens(2, 3 * M), tokens(2, 3, K, R, seed=7)
    exact = neighbor_attention_maps(model, seq, retrieved)
    with torch.autocast("cpu", torch.bfloat16):
        found = neighbor_attention_maps(model, seq, retrieved)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=0.05, rtol=0)
    total = found.neighbors_BNKR[:, M - 1 :].sum((2, 3)) + found.nothing_BN[:, M - 1 :]
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)
