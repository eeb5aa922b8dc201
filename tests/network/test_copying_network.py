"""Copying across chunked cross-attention: learned in seconds with `copy_tokens`, and not without."""

from typing import Any

import pytest
import torch
from torch import Tensor

from retro_model.network.attention_maps import neighbor_attention_maps
from retro_model.network.config import RETROConfig
from retro_model.network.model import RETRO

V, M, L, K = 64, 8, 4, 2  # vocabulary, chunk, chunks of a row, neighbors


def make(**changes: Any) -> RETRO:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "num_tokens": V,
        "max_seq_len": L * M,
        "enc_dim": 32,
        "enc_depth": 1,
        "dec_dim": 32,
        "dec_depth": 1,
        "dec_cross_attn_layers": (1,),
        "heads": 2,
        "dim_head": 16,
        "chunk_size": M,
        "tie_embeddings": True,
    }
    return RETRO(**{**arguments, **changes})


def random_text(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random tokens (rows, N + 1), and neighbors (rows, L, K, 2M): one of them holds, at a random place, what follows.

    The copy has one token more in front, the last of the chunk that retrieved it, by which the place is found.
    """
    seq = torch.randint(1, V, (rows, L * M + 1), generator=generator)
    retrieved = torch.randint(1, V, (rows, L, K, 2 * M), generator=generator)
    for row in range(rows):
        for u in range(L - 1):
            at, neighbor = (int(torch.randint(0, most, (1,), generator=generator)) for most in (M, K))
            retrieved[row, u, neighbor, at : at + M + 1] = seq[row, (u + 1) * M - 1 : (u + 2) * M]
    return seq, retrieved


def loss_after_training(model: RETRO, steps: int) -> float:
    """The mean loss, on text that was never seen, of the tokens that stand in a neighbor."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for _ in range(steps):
        seq, retrieved = random_text(16, generator)
        model(seq, retrieved, return_loss=True).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seq, retrieved = random_text(32, generator)
    with torch.no_grad():
        losses = model.token_losses(seq[:, :-1], retrieved, labels=seq[:, 1:])
    return float(losses[:, M - 1 : -1].mean())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("copy_tokens", [0, 1, 2])
def test_text_that_stands_at_a_random_place_of_a_neighbor_is_copied(copy_tokens: int, tied: bool) -> None:
    loss = loss_after_training(make(copy_tokens=copy_tokens, tie_embeddings=tied), steps=60)
    chance = torch.tensor(V - 1.0).log()
    assert (loss < chance / 2) == (copy_tokens > 0), f"{loss:.2f} of {chance:.2f} nats"


@pytest.mark.parametrize("copy_tokens", [0, 1, 2])
def test_a_fresh_model_looks_at_the_token_after_the_current_one(copy_tokens: int) -> None:
    """Before any training; the paper's cross-attention has to learn what stands next to what."""
    model = make(copy_tokens=copy_tokens).eval()
    seq, retrieved = random_text(16, torch.Generator().manual_seed(2))
    maps, _ = neighbor_attention_maps(model, seq[:, :-1], retrieved)  # (B, N, K, R)
    right = []
    for row in range(len(seq)):
        for token in range(M - 1, (L - 1) * M):
            u = (token + 1) // M - 1
            looked_at = retrieved[row, u].flatten()[maps[row, token].flatten().argmax()]
            right.append(bool(looked_at == seq[row, token + 1]))
    assert (sum(right) > 0.7 * len(right)) == (copy_tokens > 0), f"{sum(right)} of {len(right)}"


@pytest.mark.parametrize("rows", [True, False])
def test_a_fresh_untied_model_raises_the_logit_of_the_token_it_copies(
    rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the output rows in its values it would raise the logits of random tokens."""
    monkeypatch.setattr(RETROConfig, "copy_rows", rows)
    model = make(copy_tokens=2, tie_embeddings=False).eval()
    seq, retrieved = random_text(16, torch.Generator().manual_seed(2))
    with torch.no_grad():
        raised = model(seq[:, :-1], retrieved) - model(seq[:, :-1])
    attending = slice(M - 1, (L - 1) * M)
    right = (raised.argmax(-1) == seq[:, 1:])[:, attending].float().mean()
    assert (right > 0.5) == rows, f"{right:.2f} of the tokens"
