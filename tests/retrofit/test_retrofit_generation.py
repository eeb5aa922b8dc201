"""Generation by the base's own `generate`, with retrieval: what is cached changes nothing."""

from typing import Any

import pytest
import torch
from tiny_bases import KINDS, VOCABULARY, opened, tiny_base, token_rows
from torch import Tensor
from transformers import DynamicCache

from retro_model import Retrofit
from retro_model.core.errors import ConfigError
from retro_model.retrofit.cache import RetrievalCache

M = 8
PROMPTS = (1, 7, 8, 21)  # shorter than a chunk, equal to one, and longer
NEW = 10
TOLERANCE = 1e-5


def make(kind: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Retrofit:
    """A model whose adapters matter, for chunks of 8."""
    return opened(Retrofit(tiny_base(kind, dtype), M, pad_id=0, **settings))


def retrieve(chunks_CM: Tensor) -> Tensor:
    """Two neighbors of each chunk, a function of its tokens; a fifth of the chunks have none, and some only one."""
    found = torch.stack([token_rows(2, 2 * M, seed=int(chunk.sum())) for chunk in chunks_CM.cpu()])
    for chunk, neighbors in zip(chunks_CM, found, strict=True):
        neighbors[: max(0, int(chunk.sum()) % 5 - 2)] = 0
        neighbors[1, M:] = 0
    return found


def uncached(model: Retrofit, text_BN: Tensor) -> Tensor:
    """The logits (B, N, V) of whole texts, with the neighbors of each chunk."""
    chunks_BLM = text_BN[:, : text_BN.shape[1] // M * M].unflatten(1, (-1, M))
    found = retrieve(chunks_BLM.flatten(0, 1)).unflatten(0, chunks_BLM.shape[:2]) if chunks_BLM.numel() else None
    with torch.no_grad():
        return model(text_BN, found)


def cached(model: Retrofit, prompt_BN: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Greedily written texts and the logits of each new token."""
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    out = model.generate(prompt_BN, retrieve, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences, torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_are_those_of_the_whole_text(kind: str, prompt: int) -> None:
    model = make(kind)
    text, logits = cached(model, token_rows(2, prompt))
    expected = uncached(model, text)[:, prompt - 1 : -1]
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
    chunks = text[:, : text.shape[1] // M * M].reshape(-1, M)
    if bool(retrieve(chunks).any()):  # what is written, and so whether its chunks have neighbors, depends on the base
        assert (model.base(text).logits - uncached(model, text)).abs().max() > 0.1, "the neighbors must matter"


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_they_differ_as_the_bases_own_do(kind: str) -> None:
    model = make(kind, torch.bfloat16)
    text, logits = cached(model, token_rows(2, 13))
    differs = (logits - uncached(model, text)[:, 12:-1]).abs().mean()
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.base.generate(token_rows(2, 13), attention_mask=torch.ones(2, 13).long(), **options)
    base_differs = (torch.stack(out.logits, 1) - model.base(out.sequences).logits[:, 12:-1]).abs().mean()
    assert differs <= 3 * base_differs + 1e-2


def left_padded(lengths: tuple[int, ...], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts of these lengths (B, longest), and their mask."""
    prompt, longest = token_rows(len(lengths), max(lengths)), max(lengths)
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    return prompt.where(mask.bool(), pad), mask


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_counted_from_the_first_token_of_a_left_padded_row(kind: str) -> None:
    lengths = (3, 8, 20, 13)
    model = make(kind)
    prompt, mask = left_padded(lengths)
    text, logits = cached(model, prompt, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = text[row : row + 1, prompt.shape[1] - length :]
        expected = uncached(model, alone)[0, length - 1 : -1]
        assert (logits[row] - expected).abs().max() <= 10 * TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("settings", [{"copy_tokens": 0}, {"enc_cross_attn_layers": None}, {"cross_attn_sink": False}])
def test_so_they_are_with_other_adapters(settings: dict[str, Any]) -> None:
    """Positions that depend on the row, and an encoder that reads the chunk."""
    model = make(**settings)
    prompt, mask = left_padded((5, 16, 18))
    text, logits = cached(model, prompt, attention_mask=mask, max_new_tokens=20)
    for row, length in enumerate((5, 16, 18)):
        expected = uncached(model, text[row : row + 1, 18 - length :])[0, length - 1 : -1]
        assert (logits[row] - expected).abs().max() <= 10 * TOLERANCE * expected.abs().max()


def score(model: Retrofit, text: Tensor, prompt: int) -> Tensor:
    """The log probability of the new tokens (B,), from the whole text."""
    shares = uncached(model, text)[:, prompt - 1 : -1].log_softmax(-1)
    return shares.gather(2, text[:, prompt:, None])[..., 0].sum(1)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_beams_keep_their_own_neighbors(kind: str) -> None:
    """The score of each beam is that of its whole text."""
    model = make(kind)
    prompt = token_rows(2, 13)
    out = model.generate(
        prompt, retrieve, num_beams=3, num_return_sequences=3, max_new_tokens=NEW, do_sample=False, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    expected = torch.cat([score(model, out.sequences[row : row + 1], 13) for row in range(6)])
    assert torch.allclose(out.sequences_scores, expected, atol=1e-3)


def test_sampling_follows_the_seed_and_the_neighbors() -> None:
    model = make()
    written = []
    for seed, found in ((1, retrieve), (1, retrieve), (2, retrieve), (1, None)):
        torch.manual_seed(seed)
        written.append(model.generate(token_rows(1, 9), found, do_sample=True, max_new_tokens=20).tolist())
    assert written[0] == written[1] and written[0] != written[2] and written[0] != written[3]


def test_a_text_is_continued_with_its_cache() -> None:
    model = make()
    whole = model.generate(token_rows(2, 5), retrieve, do_sample=False, max_new_tokens=30)
    cache = RetrievalCache(model, retrieve)
    options: dict[str, Any] = {"do_sample": False, "past_key_values": cache}
    first = model.generate(token_rows(2, 5), max_new_tokens=6, **options)
    assert torch.equal(model.generate(first, max_new_tokens=24, **options), whole)
    # With more text from outside, over several chunks: as if it had been read at once.
    more = torch.cat([whole, token_rows(2, 21, seed=5)], dim=1)
    written = model.generate(more, max_new_tokens=6, **options)
    assert torch.equal(written, model.generate(more, retrieve, do_sample=False, max_new_tokens=6))
    cache.reset()
    assert torch.equal(model.generate(token_rows(2, 5), max_new_tokens=30, **options), whole)


def test_rows_are_repeated_and_selected_with_their_neighbors() -> None:
    model, prompt = make(), token_rows(2, 12)
    cache = RetrievalCache(model, retrieve)
    model.generate(prompt, max_new_tokens=1, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    texts = prompt[[1, 0]]
    written = model.generate(torch.cat([texts, token_rows(2, 9, seed=3)], 1), max_new_tokens=6, past_key_values=cache)
    expected = model.generate(torch.cat([texts, token_rows(2, 9, seed=3)], 1), retrieve, max_new_tokens=6)
    assert torch.equal(written, expected)


def test_retrieval_happens_once_for_the_prompt_and_then_at_each_boundary() -> None:
    asked: list[list[list[int]]] = []

    def watched(chunks: Tensor) -> Tensor:
        asked.append(chunks.tolist())
        return retrieve(chunks)

    text = make().generate(token_rows(1, 2 * M + 3), watched, do_sample=False, max_new_tokens=15)[0].tolist()
    chunks = [text[start : start + M] for start in range(0, len(text) - M, M)]
    assert asked == [chunks[:2], *[[chunk] for chunk in chunks[2:]]]


def test_without_neighbors_it_writes_what_the_base_writes() -> None:
    model, prompt = make(), token_rows(2, 9)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 20, "do_sample": False}
    expected = model.base.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, **options), expected)
    nothing = model.generate(prompt, lambda chunks: torch.zeros(len(chunks), 2, 2 * M, dtype=torch.long), **options)
    assert torch.equal(nothing, expected)
    assert not torch.equal(model.generate(prompt, retrieve, **options), expected)
    assert torch.equal(model.base.generate(prompt, past_key_values=DynamicCache(), **options), expected)


def test_a_prompt_token_that_equals_padding_is_read() -> None:
    """transformers would mask it, if it had to guess the mask."""
    model = make()
    model.base.generation_config.pad_token_id = 7
    prompt = torch.tensor([[3, 7, 4, 9]])
    text, logits = cached(model, prompt)
    assert torch.allclose(logits, uncached(model, text)[:, 3:-1], atol=1e-4)


def test_an_id_that_no_token_has_pads_prompts_and_neighbors() -> None:
    model = opened(Retrofit(tiny_base("llama"), M))
    assert model.config.pad_id == VOCABULARY
    prompt, _ = left_padded((5, 12), pad=VOCABULARY)

    def padded(chunks: Tensor) -> Tensor:
        found = retrieve(chunks)
        return found.masked_fill(found == 0, VOCABULARY)

    written = model.generate(prompt, padded, do_sample=False, max_new_tokens=15)
    assert torch.equal(written[:, :12], prompt)
    alone = model.generate(prompt[:1, 7:], padded, do_sample=False, max_new_tokens=15)
    assert torch.equal(written[:1, 7:], alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens is not supported"),
        ({"assistant_model": object()}, "assistant_model is not supported"),
        ({"custom_generate": "somebody/code"}, "custom_generate is not supported: code from elsewhere is not run"),
        ({"past_key_values": DynamicCache()}, "must be a RetrievalCache"),
        ({"attention_mask": torch.tensor([[1] * 8 + [0]])}, "pad prompts on the left"),
    ],
)
def test_what_it_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    model = make()
    with pytest.raises(ConfigError, match=message) as caught:
        model.generate(token_rows(1, 9), max_new_tokens=2, **options)
    assert "\n" not in str(caught.value)


def test_its_cache_is_refused_where_nothing_would_be_retrieved() -> None:
    model = make()
    cache = RetrievalCache(model, retrieve)
    with pytest.raises(ConfigError, match=r"works in Retrofit\.generate alone"):
        model.base.generate(token_rows(1, 9), past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ConfigError, match="cannot be cropped"):
        cache.crop(3)
    with pytest.raises(ConfigError, match=r"retrieve must return \(1, neighbors, tokens\) for 1 chunks"):
        model.generate(token_rows(1, 9), lambda chunks: chunks, max_new_tokens=2)


def test_a_search_that_uses_the_base_itself_is_not_disturbed() -> None:
    """The base is called within a call of the base."""
    model, prompt = make(), token_rows(1, 9)
    seen: list[Tensor] = []

    def searching(chunks: Tensor) -> Tensor:
        seen.append(model.base(chunks).logits)
        return retrieve(chunks)

    written = model.generate(prompt, searching, do_sample=False, max_new_tokens=10)
    assert torch.equal(written, model.generate(prompt, retrieve, do_sample=False, max_new_tokens=10))
    assert torch.equal(seen[0], model.base(prompt[:, :M]).logits)


def test_generation_leaves_mode_and_base_as_they_were() -> None:
    model = make().train()
    model.generate(token_rows(1, 9), retrieve, max_new_tokens=2)
    assert model.training and not model.base.training
    assert not [module for module in model.base.modules() if module._forward_hooks or module._forward_pre_hooks]
