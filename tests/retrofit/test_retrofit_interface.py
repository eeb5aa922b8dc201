"""What the pipeline asks of a language model, asked of a Retrofit: generation, attention, own weights, its cost."""

from pathlib import Path

import pytest
import torch
from tiny_bases import DEPTH, WIDTH, opened, tiny_base, token_rows
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from retro_model import Retrofit, generate
from retro_model.core.errors import ConfigError, MismatchError
from retro_model.network.attention_maps import neighbor_attention_maps

M, R = 8, 16


def make(kind: str = "llama", **settings: object) -> Retrofit:
    return opened(Retrofit(tiny_base(kind), M, **{"pad_id": 0, **settings}))


def retrieve(chunks_CM: Tensor) -> Tensor:
    """Two neighbors of each chunk, a function of its tokens; some chunks have none."""
    found = torch.stack([token_rows(2, R, seed=int(chunk.sum())) for chunk in chunks_CM])
    found[chunks_CM.sum(1) % 4 == 0] = 0
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "opt"])
def test_the_library_s_generation_writes_what_the_base_s_own_does(kind: str) -> None:
    """Prompts shorter than a chunk, equal to one and longer, in one batch."""
    model, lengths = make(kind), [3, 8, 19]
    prompts = torch.zeros(3, 19, dtype=torch.long)
    for row, length in enumerate(lengths):
        prompts[row, :length] = token_rows(length, seed=row)
    options = {"temperature": 0, "max_new_tokens": 12, "retrieve": retrieve, "prompt_lengths": torch.tensor(lengths)}
    written, neighbors = generate(model, prompts, return_neighbors=True, **options)
    for row, length in enumerate(lengths):
        expected = model.generate(prompts[row : row + 1, :length], retrieve, max_new_tokens=12, do_sample=False)
        assert written[row, : length + 12].tolist() == expected[0].tolist()
        assert set(neighbors[row]) == set(range((length + 11) // M))


def test_without_neighbors_the_library_writes_what_the_plain_base_does() -> None:
    model, prompt = make(), token_rows(1, 11)
    plain = tiny_base("llama").generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, do_sample=False
    )
    alone = Retrofit(tiny_base("llama"), M, pad_id=0, retrieval=False).eval()
    for one in (model, alone):
        assert torch.equal(generate(one, prompt, temperature=0, max_new_tokens=9), plain)


def test_attention_to_neighbors_is_that_of_each_document_alone() -> None:
    model = make(cross_attn_layers=(1, 3))
    documents = torch.tensor([[0, 1, 1, 1, 2], [0, 0, 1, 2, 2]])
    seq, retrieved = token_rows(2, 5 * M), token_rows(2, 5, 2, R, seed=7)
    retrieved[0, 2], retrieved[1, 3, 1] = 0, 0
    found, nothing = neighbor_attention_maps(model, seq, retrieved, documents)
    for row, start, stop in [(0, 0, 1), (0, 1, 4), (0, 4, 5), (1, 0, 2), (1, 2, 3), (1, 3, 5)]:
        inside = slice(start * M, stop * M)
        alone = neighbor_attention_maps(model, seq[row : row + 1, inside], retrieved[row : row + 1, start:stop])
        torch.testing.assert_close(alone.neighbors_BNKR[0], found[row, inside])
        total = alone.neighbors_BNKR[0].sum((1, 2)) + alone.nothing_BN[0]
        reads = torch.ones(len(total))
        reads[: M - 1] = 0
        if (row, start) == (0, 1):
            reads[2 * M - 1 : 3 * M - 1] = 0  # the chunk without neighbors
        torch.testing.assert_close(total, reads)
    assert found.amax() > 0.1 and nothing.amax() > 0


def test_a_model_without_retrieval_is_the_base_alone() -> None:
    model = Retrofit(tiny_base("qwen2"), M, retrieval=False)
    seq = token_rows(2, 20)
    assert torch.equal(model(seq), tiny_base("qwen2")(seq).logits)
    assert not list(model.adapters.parameters()) and not model.own_weights() and not model.cross_attentions
    with pytest.raises(ConfigError, match="retrieved was given to a model with retrieval=False"):
        model(seq, token_rows(2, 2, 2, R))


@pytest.mark.parametrize("freeze", [True, False])
def test_a_model_s_own_weights_restore_it(tmp_path: Path, freeze: bool) -> None:
    model = Retrofit(tiny_base("gpt2"), M, pad_id=0, freeze=freeze)
    changed = opened(Retrofit(tiny_base("gpt2"), M, pad_id=0, freeze=freeze))
    if not freeze:
        with torch.no_grad():
            changed.embedding.weight.mul_(1.5)
    weights = changed.own_weights()
    assert all(name.startswith("adapters.") for name in weights) == freeze
    seq, retrieved = token_rows(2, 27), token_rows(2, 3, 2, R)
    model.save_weights(tmp_path, weights)
    for one in (Retrofit.from_pretrained(tmp_path, tiny_base("gpt2") if freeze else None), model.eval()):
        if one is model:
            one.load_own_weights(weights)
        assert torch.equal(one(seq, retrieved), changed(seq, retrieved))
    with pytest.raises(MismatchError, match="lacks"):
        model.load_own_weights({})


@pytest.mark.parametrize("freeze", [True, False])
def test_the_products_of_a_step_are_about_those_that_torch_counts(freeze: bool) -> None:
    """Attention is counted as causal; torch counts all scores of the base."""
    model = Retrofit(tiny_base("llama"), M, pad_id=0, freeze=freeze, cross_attn_layers=(2,))
    seq, retrieved = token_rows(2, 4 * M), token_rows(2, 4, 2, R)
    with FlopCounterMode(display=False) as counter:
        model(seq, retrieved, return_loss=True, labels=seq).backward()
    scores = 2 * 2 * (4 * M) ** 2 * WIDTH * DEPTH
    assert counter.get_total_flops() == pytest.approx(model.step_flops(2, 4 * M, 2), rel=0.1, abs=3 * scores)
    if freeze:
        assert model.step_flops(2, 4 * M, 2) < Retrofit(tiny_base("llama"), M, freeze=False).step_flops(2, 4 * M, 2)
