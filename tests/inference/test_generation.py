"""Cached decoding against the network itself, sampling, stopping, retrieval while writing."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_network import SMALL, K, M, R, V, make, tokens
from torch import Tensor

from retro_model.core.errors import ConfigError
from retro_model.inference.cached_decoder import SINGLE_THREAD_BELOW, CachedDecoder, ThreadedLinear, torch_threads
from retro_model.inference.generation import Writer, generate
from retro_model.inference.sampling import sample, top_k, top_p
from retro_model.network.model import RETRO


def search(chunks: Tensor) -> Tensor:
    """A stand-in for a database: neighbors that depend on nothing but the chunk; every fifth has fewer."""
    out = []
    for chunk in chunks.tolist():
        generator = torch.Generator().manual_seed(sum((i + 1) * token for i, token in enumerate(chunk)))
        found = torch.randint(1, V, (K, R), generator=generator)
        if sum(chunk) % 5 == 0:
            found[1] = 0
        if sum(chunk) % 7 == 0:
            found[:] = 0
        out.append(found)
    return torch.stack(out)


def uncached(model: RETRO, text: list[int], retrieve: Any = search) -> Tensor:
    """The logits (V,) after a text, by one call of the network."""
    seq = torch.tensor([text])
    whole = len(text) // M
    retrieved = None
    if retrieve is not None:
        retrieved = torch.zeros(1, 0, K, R, dtype=torch.long)
        if whole:
            retrieved = retrieve(seq[0, : whole * M].reshape(whole, M))[None]
    with torch.no_grad():
        return model(seq, retrieved)[0, -1]


# ---- cache -----------------------------------------------------------------------------------------


NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deepnet": {"use_deepnet": True},
    "copying": {"copy_tokens": 1, "cross_attn_sink": True},
    "copying, deepnet": {"copy_tokens": 3, "cross_attn_sink": True, "use_deepnet": True},
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("retrieve", [search, None], ids=["on", "off"])
def test_cached_logits_equal_uncached_ones(monkeypatch: pytest.MonkeyPatch, network: str, retrieve: Any) -> None:
    """For rows of every length from 1 to three chunks at once, and for 2 chunks written after each."""
    model = make(**NETWORKS[network])
    lengths = torch.arange(1, 3 * M + 1)
    prompt = tokens(len(lengths), 3 * M)
    caught: list[Tensor] = []

    def spy(logits: Tensor, **options: Any) -> Tensor:
        caught.append(logits)
        return sample(logits, **options)

    monkeypatch.setattr("retro_model.inference.generation.sample", spy)
    text, neighbors = generate(
        model, prompt, prompt_lengths=lengths, retrieve=retrieve, max_new_tokens=2 * M + 1, seed=1,
        return_neighbors=True,
    )  # fmt: skip
    assert len(caught) == 2 * M + 1
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(text[row, :length], prompt[row, :length])
        assert (text[row, length + 2 * M + 1 :] == 0).all()
        for step, logits in enumerate(caught):
            expected = uncached(model, text[row, : length + step].tolist(), retrieve)
            torch.testing.assert_close(logits[row], expected, atol=1e-9, rtol=0)
        if retrieve is not None:
            # the last token was written and never read, so nobody asked for its chunk
            read = length + 2 * M
            assert list(neighbors[row]) == list(range(read // M))
            for u, found in neighbors[row].items():
                assert torch.equal(found, search(text[row : row + 1, u * M : (u + 1) * M])[0])
        else:
            assert neighbors[row] == {}


def test_cached_logits_in_float32() -> None:
    """The bound that users are promised, in the number type that they use, over 16 chunks of 8."""
    torch.manual_seed(0)
    model = RETRO(**{**SMALL, "max_seq_len": 128, "chunk_size": 8, "dec_dim": 32, "dim_head": 16}).eval()
    with torch.no_grad():
        model.embedding.weight.normal_()
        model.unembedding.weight.normal_()
    seq, retrieved = tokens(1, 128), tokens(1, 16, K, 16)
    with torch.no_grad():
        expected = model(seq, retrieved)[0]
    decoder = CachedDecoder(model, 1, 128)
    for place in range(128):
        found = {0: retrieved[0, (place + 1) // 8 - 1]} if (place + 1) % 8 == 0 else {}
        hidden = decoder.read(seq[:, place : place + 1], [1], found)
        logits = decoder.logits(hidden[:, 0])[0]
        torch.testing.assert_close(logits, expected[place], atol=1e-4, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_pieces_of_any_width_read_the_same(data: st.DataObject) -> None:
    model = make()
    length = data.draw(st.integers(1, 4 * M))
    seq, retrieved = tokens(2, length), tokens(2, length // M, K, R)
    decoder = CachedDecoder(model, 2, 4 * M)
    states, place = [], 0
    while place < length:
        width = data.draw(st.integers(1, min(decoder.room(place), length - place)))
        ends = (place + 1) % M == 0
        found = {row: retrieved[row, (place + 1) // M - 1] for row in range(2)} if ends else {}
        states.append(decoder.read(seq[:, place : place + width], [width, width], found))
        place += width
    logits = decoder.logits(torch.cat(states, dim=1))
    with torch.no_grad():
        torch.testing.assert_close(logits, model(seq, retrieved), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("threads", "outputs", "parts"), [(1, 12, 1), (2, 12, 2), (8, 12, 6), (3, 4, 2), (4, 7, 1)])
def test_all_threads_have_a_part_in_a_product(
    monkeypatch: pytest.MonkeyPatch, threads: int, outputs: int, parts: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for inputs in (3, 12, 20):
        weight = torch.randn(outputs, inputs, dtype=torch.float64)
        linear = ThreadedLinear(weight)
        assert linear.part_PIO.shape == (parts, inputs, outputs // parts)
        assert linear.part_PIO.stride(2 if outputs > inputs else 1) == 1  # along the longer axis
        assert (linear.part_PIO.data_ptr() == weight.data_ptr()) == (outputs <= inputs)  # else no copy
        for shape in ((inputs,), (1, 1, inputs), (5, inputs), (2, 3, inputs)):
            x = torch.randn(shape, dtype=torch.float64)
            torch.testing.assert_close(linear(x), F.linear(x, weight), atol=1e-12, rtol=0)


def test_only_matrices_are_made_anew_for_single_tokens() -> None:
    model = make(tie_embeddings=True)
    before = {name: (id(x), x.clone(), x.stride()) for name, x in model.named_parameters()}
    decoder = CachedDecoder(model, 1, 8)
    for block, copied in zip(model.decoder, decoder.blocks, strict=True):
        own, copies = (dict(b.named_parameters()) for b in (block, copied))  # type: ignore[attr-defined]
        matrices = {name.removesuffix("weight") for name, x in own.items() if x.dim() == 2}
        assert matrices == {name.removesuffix("part_PIO") for name in copies if name.endswith("part_PIO")}
        vectors = {name: x for name, x in own.items() if x.dim() == 1}
        assert vectors and all(copies[name] is x for name, x in vectors.items())
        assert len(copies) == len(own)
    for name, weight in model.named_parameters():
        was, value, stride = before[name]
        assert id(weight) == was and torch.equal(weight, value) and weight.stride() == stride


def test_a_token_is_read_by_one_thread_and_more_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder, too, has all threads; afterwards, whatever happens, there are as many as before."""
    number = [3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[-1])
    monkeypatch.setattr(torch, "set_num_threads", number.append)
    model = make()
    decoder = CachedDecoder(model, 1, 3 * M)
    reading: list[int] = []
    encoding: list[int] = []
    decoder.blocks[-1].feed_forward.register_forward_hook(lambda *_: reading.append(number[-1]))
    model.encoder.register_forward_hook(lambda *_: encoding.append(number[-1]))  # type: ignore[union-attr]
    decoder.read(tokens(1, M - 1), [M - 1])
    decoder.read(tokens(1, 1), [1], {0: tokens(K, R)})
    assert (reading, encoding) == ([1, 1], [3])
    monkeypatch.setattr(decoder, "largest_matrix", SINGLE_THREAD_BELOW)
    decoder.read(tokens(1, 1), [1])
    assert reading == [1, 1, 3]
    with pytest.raises(KeyError), torch_threads(2):
        assert number[-1] == 2
        raise KeyError
    assert number[-1] == 3


def test_searches_may_return_different_numbers_of_neighbors() -> None:
    model = make()

    def varying(chunks: Tensor) -> Tensor:
        number = 1 + int(chunks[0, 0]) % 3
        return search(chunks)[:, :1].repeat(1, number, 1)

    def always_three(chunks: Tensor) -> Tensor:
        return torch.stack([torch.nn.functional.pad(varying(c[None])[0], (0, 0, 0, 2))[:3] for c in chunks])

    a = generate(model, tokens(1, 3), retrieve=varying, max_new_tokens=4 * M, temperature=0)
    b = generate(model, tokens(1, 3), retrieve=always_three, max_new_tokens=4 * M, temperature=0)
    assert torch.equal(a, b)


# ---- stopping --------------------------------------------------------------------------------------


def test_a_row_stops_at_the_end_token_and_stays_stopped() -> None:
    model = make()
    prompt = tokens(6, 5)
    free = generate(model, prompt, max_new_tokens=20, seed=3)
    eos = int(free[0, 8])
    text = generate(model, prompt, max_new_tokens=20, seed=3, eos_id=eos)
    ended = 0
    for row in range(6):
        written = text[row, 5:].tolist()
        if eos in written:
            ended += 1
            assert set(written[written.index(eos) + 1 :]) <= {0}
        else:
            assert 0 not in written[: len(free[0]) - 5] or 0 in free[row, 5:]
    assert ended
    # what a finished neighbor row does is nothing to the others
    alone = [generate(model, prompt[r : r + 1], max_new_tokens=20, temperature=0, eos_id=eos)[0] for r in range(6)]
    together = generate(model, prompt, max_new_tokens=20, temperature=0, eos_id=eos)
    for row in range(6):
        assert together[row, : len(alone[row])].tolist() == alone[row].tolist()
        assert (together[row, len(alone[row]) :] == 0).all()


def test_an_end_token_in_the_prompt_ends_nothing() -> None:
    model = make()
    prompt = torch.tensor([[3, 5, 3]])
    assert generate(model, prompt, max_new_tokens=4, eos_id=3, temperature=0).shape[1] > 3


@pytest.mark.parametrize("length", [1, M, 8 * M - 1, 8 * M])
def test_a_row_ends_at_max_seq_len(length: int) -> None:
    model = make()
    prompt = tokens(2, length)
    text = generate(model, prompt, retrieve=search, max_new_tokens=1000, seed=0)
    assert text.shape == (2, 8 * M)
    assert torch.equal(text, generate(model, prompt, retrieve=search, seed=0))
    lengths = torch.tensor([length, 1])
    assert generate(model, prompt, prompt_lengths=lengths, seed=0).shape == (2, 8 * M)


def test_no_new_tokens() -> None:
    prompt = tokens(2, 5)
    assert torch.equal(generate(make(), prompt, max_new_tokens=0), prompt)


# ---- sampling --------------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40), st.floats(0, 1))
def test_top_k_keeps_a_share_of_the_vocabulary(values: list[float], thres: float) -> None:
    logits = torch.tensor([values])
    kept = top_k(logits, thres).isfinite()[0]
    assert kept.sum() == max(1, round((1 - thres) * len(values)))
    assert torch.equal(top_k(logits, thres)[0, kept], logits[0, kept])
    if not kept.all():
        assert logits[0, kept].min() >= logits[0, ~kept].max()


def test_top_k_default_keeps_ten_percent() -> None:
    assert top_k(torch.randn(3, 1000)).isfinite().sum(-1).tolist() == [100, 100, 100]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20), st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(values: list[float], thres: float) -> None:
    logits = torch.tensor([values], dtype=torch.float64)
    out = top_p(logits, thres)[0]
    kept = out.isfinite()
    probabilities = logits.softmax(-1)[0]
    mass = probabilities[kept].sum()
    assert torch.equal(out[kept], logits[0, kept])
    assert mass >= thres - 1e-9
    assert mass - probabilities[kept].min() < thres + 1e-9, "one token fewer would not reach it"
    if not kept.all():
        assert probabilities[kept].min() >= probabilities[~kept].max()


def test_top_p_at_its_ends() -> None:
    logits = torch.tensor([[0.1, 3.0, 1.0]])
    assert top_p(logits, 0.0).isfinite().tolist() == [[False, True, False]]
    assert top_p(logits, 1.0).isfinite().all()


def test_temperature() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.5]]).expand(20000, 3)
    options: dict[str, Any] = {"filter_fn": lambda x, _: x, "filter_thres": 0.0}
    assert (sample(logits, temperature=0, generator=None, **options) == 1).all()
    for temperature in (0.5, 1.0, 2.0):
        drawn = sample(logits, temperature=temperature, generator=torch.Generator().manual_seed(0), **options)
        share = torch.bincount(drawn, minlength=3) / len(drawn)
        torch.testing.assert_close(share, (logits[0] / temperature).softmax(-1), atol=0.02, rtol=0)


def test_greedy_is_argmax_of_the_network() -> None:
    model = make()
    prompt = tokens(1, 6)
    text = generate(model, prompt, retrieve=search, max_new_tokens=12, temperature=0)[0].tolist()
    for length in range(6, 18):
        assert text[length] == uncached(model, text[:length]).argmax()


def test_seed() -> None:
    model, prompt = make(), tokens(2, 5)
    a, b, c = (generate(model, prompt, max_new_tokens=20, seed=seed, filter_thres=0.0) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_greedy_too_takes_only_what_the_filter_leaves() -> None:
    """The wrapper keeps tokens that its tokenizer does not have from being written by a filter."""
    logits = torch.tensor([[0.0, 1.0, 5.0]])
    options: dict[str, Any] = {"filter_thres": 0.9, "temperature": 0, "generator": None}
    kept = sample(logits, filter_fn=lambda x, _: x.masked_fill(x > 2, -torch.inf), **options)
    assert kept.tolist() == [1] and sample(logits, filter_fn=top_p, **options).tolist() == [2]


@pytest.mark.parametrize("filter_fn", [top_k, top_p])
def test_only_what_the_filter_left_is_written(filter_fn: Any) -> None:
    model, prompt = make(), tokens(1, 5)
    text = generate(model, prompt, max_new_tokens=20, seed=1, filter_fn=filter_fn, filter_thres=0.7)[0].tolist()
    for length in range(5, 25):
        assert filter_fn(uncached(model, text[:length], None)[None], 0.7)[0, text[length]].isfinite()


# ---- retrieval and streaming -----------------------------------------------------------------------


def test_one_search_for_the_prompts_and_one_at_each_boundary() -> None:
    model = make()
    calls: list[Tensor] = []

    def counting(chunks: Tensor) -> Tensor:
        calls.append(chunks)
        return search(chunks)

    prompt = tokens(2, 2 * M + 1)
    text = generate(
        model,
        prompt,
        prompt_lengths=torch.tensor([2 * M + 1, M]),
        retrieve=counting,
        max_new_tokens=2 * M,
        seed=0,
    )
    rows = [
        text[0, :M], text[0, M : 2 * M], text[1, :M],  # the prompts', at once
        text[0, 2 * M : 3 * M],  # after M - 1 new tokens
        text[1, M : 2 * M],  # after M; the second chunk of row 1 is complete only with the last token
        text[0, 3 * M : 4 * M],
    ]  # fmt: skip
    assert [len(call) for call in calls] == [3, 1, 1, 1]
    assert torch.cat(calls).tolist() == [row.tolist() for row in rows]


def test_neighbors_change_what_is_written() -> None:
    model = make()
    prompt = tokens(1, M)
    on = generate(model, prompt, retrieve=search, max_new_tokens=4 * M, temperature=0)
    off = generate(model, prompt, max_new_tokens=4 * M, temperature=0)
    nothing = generate(
        model, prompt, retrieve=lambda c: torch.zeros_like(search(c)), max_new_tokens=4 * M, temperature=0
    )
    assert not torch.equal(on, off)
    assert torch.equal(nothing, off)


def test_streaming_token_by_token() -> None:
    model, prompt = make(), tokens(2, 3)
    writer = Writer(model, prompt, retrieve=search, max_new_tokens=2 * M, seed=5)
    for count, written in enumerate(writer, start=1):
        assert torch.equal(writer.text_BN[:, 3 + count - 1], written)
        assert writer.length_B.tolist() == [3 + count] * 2
    assert torch.equal(writer.text_BN, generate(model, prompt, retrieve=search, max_new_tokens=2 * M, seed=5))


def test_a_loop_that_was_left_goes_on_in_the_next() -> None:
    model, prompt = make(), tokens(1, 3)
    whole = generate(model, prompt, retrieve=search, max_new_tokens=2 * M, temperature=0)
    writer = Writer(model, prompt, retrieve=search, max_new_tokens=2 * M, temperature=0)
    for count, _ in enumerate(writer, start=1):
        if count == M + 1:
            break
    assert len(list(writer)) == M - 1
    assert torch.equal(writer.text_BN, whole)


def test_a_model_in_training_is_left_as_it_was() -> None:
    model, prompt = make(dec_ff_dropout=0.5).train(), tokens(1, 3)
    a, b = (generate(model, prompt, max_new_tokens=8, temperature=0) for _ in range(2))
    assert model.training
    assert torch.equal(a, b)
    with pytest.raises(ConfigError, match="eval"):
        Writer(model, prompt)


def test_a_plain_decoder_writes_too() -> None:
    text = generate(make(retrieval=False), tokens(2, 5), max_new_tokens=20, seed=0)
    assert text.shape == (2, 25)


def test_under_autocast() -> None:
    model = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        text = generate(model, tokens(2, 5), prompt_lengths=torch.tensor([5, 2]), retrieve=search, max_new_tokens=12)
    assert text.shape == (2, 17)


def test_wrong_arguments() -> None:
    model, prompt = make(), tokens(2, 5)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((model, prompt[0]), {}, "prompt must be integers"),
        ((model, prompt[:, :0]), {}, "at least 1 x 1"),
        ((model, tokens(1, 8 * M + 1)), {}, f"{8 * M + 1} tokens; max_seq_len is {8 * M}"),
        ((model, prompt), {"prompt_lengths": torch.tensor([5, 6])}, r"from 1 to 5: \[5, 6\]"),
        ((model, prompt), {"prompt_lengths": torch.tensor([0, 5])}, r"from 1 to 5: \[0, 5\]"),
        ((model, prompt), {"prompt_lengths": torch.tensor([5])}, "2 numbers"),
        ((model, prompt), {"max_new_tokens": -1}, "max_new_tokens.*-1"),
        ((model, prompt), {"temperature": -0.5}, "temperature.*-0.5"),
        ((model, prompt), {"filter_thres": 1.5}, "filter_thres of top_k.*1.5"),
        ((make(retrieval=False), prompt), {"retrieve": search}, "retrieval=False"),
        (
            (model, prompt),
            {"retrieve": lambda c: search(c)[0]},
            r"retrieve must return \(2, neighbors, tokens\)",
        ),
    ]
    for args, options, message in calls:
        with pytest.raises(ConfigError, match=message):
            generate(*args, **options)
