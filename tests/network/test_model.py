"""The network: parity with a loop, causality, packing, its arguments, its loss."""

import dataclasses
import math
from itertools import pairwise
from typing import Any

import network_reference as reference
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_network import SMALL, K, M, R, V, make, retrieved_for, tokens
from torch import Tensor, nn

from retro_model.core.errors import ConfigError
from retro_model.network.config import RETROConfig
from retro_model.network.model import NORMS, RETRO, RMSNorm, stream_of_documents

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deepnet": {"use_deepnet": True},
    "gated": {"gated_rmsnorm": True},
    "layernorm": {"norm_klass": "layernorm", "dec_cross_attn_layers": (1,)},
    "one encoder layer looks": {"enc_cross_attn_layers": (2,), "enc_depth": 3},
    "encoder looks at nothing": {"enc_cross_attn_layers": ()},
    "equal widths, tied": {"enc_dim": 8, "tie_embeddings": True},
    "scaled residuals": {"enc_scale_residual": 0.5, "dec_scale_residual": 1.5},
    "copying by one token": {"copy_tokens": 1},
    "copying by three, equal widths": {"copy_tokens": 3, "enc_dim": 8, "cross_attn_sink": True},
    "copying by two, equal widths, tied": {"copy_tokens": 2, "enc_dim": 8, "tie_embeddings": True},
    "sink": {"cross_attn_sink": True},
    "copying by four, sink, deepnet": {"copy_tokens": 4, "cross_attn_sink": True, "use_deepnet": True},
    "deepnet, layernorm, scaled": {"use_deepnet": True, "norm_klass": "layernorm", "dec_scale_residual": 2.0},
}


# ---- parity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_a_loop_over_positions(variant: str) -> None:
    model = make(**VARIANTS[variant])
    seq = tokens(2, 3 * M + 2)
    retrieved = retrieved_for(seq)
    retrieved[0, 0, 1] = 0  # a missing neighbor
    retrieved[0, 1] = 0  # a chunk without neighbors
    retrieved[1, 2, 0, M:] = 0  # a neighbor without continuation
    retrieved[1, 0, 0, 2] = 0  # padding inside
    with torch.no_grad():
        out = model(seq, retrieved)
        for row in range(2):
            expected = reference.logits(model, seq[row].tolist(), retrieved[row].tolist())
            torch.testing.assert_close(out[row], expected, atol=1e-9, rtol=1e-9)
            alone = reference.logits(model, seq[row].tolist())
            torch.testing.assert_close(model(seq)[row], alone, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("length", range(1, 3 * M + 1))
def test_equals_a_loop_at_every_length(length: int) -> None:
    model = make()
    seq = tokens(1, length)
    retrieved = retrieved_for(seq)
    with torch.no_grad():
        expected = reference.logits(model, seq[0].tolist(), retrieved[0].tolist())
        torch.testing.assert_close(model(seq, retrieved)[0], expected, atol=1e-9, rtol=1e-9)


# ---- causality -------------------------------------------------------------------------------------


@pytest.mark.parametrize("deepnet", [False, True])
@pytest.mark.parametrize("length", range(1, 3 * M + 1))
def test_no_output_depends_on_a_later_token(length: int, deepnet: bool) -> None:
    """By gradients: of each position's logits with respect to the embedding of each input token."""
    model = make(use_deepnet=deepnet)
    seq = torch.arange(1, length + 1)[None]  # all different, so that a row of the embedding is a position
    retrieved = torch.full((1, length // M, K, R), V - 1)
    logits = model(seq, retrieved)[0]
    for position in range(length):
        (grad,) = torch.autograd.grad(logits[position].square().sum(), model.embedding.weight, retain_graph=True)
        size = grad[1 : length + 1].abs().sum(-1)
        assert (size[: position + 1] > 0).all()
        assert (size[position + 1 :] == 0).all()


@pytest.mark.parametrize("deepnet", [False, True])
@pytest.mark.parametrize("length", range(1, 3 * M + 1))
def test_neighbors_matter_from_their_chunks_end(length: int, deepnet: bool) -> None:
    """By gradients: the neighbors of chunk u first matter at (u + 1) * M - 1, and then always do."""
    model = make(use_deepnet=deepnet)
    seq = torch.full((1, length), 1)
    chunks = length // M
    retrieved = (torch.arange(chunks) + 2)[None, :, None, None].expand(1, chunks, K, R)  # chunk u holds u + 2
    logits = model(seq, retrieved)[0]
    for position in range(length):
        (grad,) = torch.autograd.grad(logits[position].square().sum(), model.embedding.weight, retain_graph=True)
        for u in range(chunks):
            assert (grad[u + 2].abs().sum() > 0) == (position >= (u + 1) * M - 1)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3 * M), st.data())
def test_changing_a_later_token_changes_nothing(length: int, data: st.DataObject) -> None:
    """By perturbation, bit for bit: same shapes, so the same arithmetic."""
    model = make()
    seq = tokens(2, length)
    at = data.draw(st.integers(0, length - 1))
    other = seq.clone()
    other[:, at] = (seq[:, at] % (V - 1)) + 1
    with torch.no_grad():
        a, b = (model(x, retrieved_for(x)) for x in (seq, other))
    assert torch.equal(a[:, :at], b[:, :at])
    assert not torch.equal(a[:, at], b[:, at])


def test_changing_neighbors_changes_nothing_before() -> None:
    model = make()
    seq = tokens(1, 3 * M)
    for u in range(3):
        retrieved, other = retrieved_for(seq), retrieved_for(seq)
        other[:, u] = tokens(1, K, R, seed=9)
        with torch.no_grad():
            a, b = model(seq, retrieved)[0], model(seq, other)[0]
        first = (u + 1) * M - 1
        torch.testing.assert_close(a[:first], b[:first], atol=0, rtol=0)
        assert ((a[first:] - b[first:]).abs().sum(-1) > 0).all()


def test_rows_are_independent() -> None:
    model = make()
    seq = tokens(3, 3 * M + 1)
    retrieved = retrieved_for(seq)
    retrieved[1, 1] = 0
    with torch.no_grad():
        together = model(seq, retrieved)
        for row in range(3):
            alone = model(seq[row : row + 1], retrieved[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-12, rtol=0)


# ---- neighbors -------------------------------------------------------------------------------------


def test_order_and_number_of_neighbors() -> None:
    model = make()
    seq = tokens(2, 3 * M)
    retrieved = retrieved_for(seq, neighbors=5)
    with torch.no_grad():
        base = model(seq, retrieved)
        shuffled = model(seq, retrieved[:, :, torch.tensor([3, 0, 4, 2, 1])])
        torch.testing.assert_close(base, shuffled, atol=1e-12, rtol=0)
        masked = torch.cat([retrieved[:, :, :2], torch.zeros_like(retrieved[:, :, :1]), retrieved[:, :, 2:]], 2)
        torch.testing.assert_close(base, model(seq, masked), atol=1e-12, rtol=0)
        longer = F.pad(retrieved, (0, 3))  # padding at a neighbor's end
        torch.testing.assert_close(base, model(seq, longer), atol=1e-12, rtol=0)
        for number in (1, 2, 3, 4):
            fewer = model(seq, retrieved[:, :, :number])
            assert fewer.isfinite().all()
            assert not torch.allclose(base, fewer)
        torch.testing.assert_close(model(seq, retrieved[:, :, 0]), model(seq, retrieved[:, :, :1]))


def test_a_missing_neighbor_gets_no_gradient_and_gives_none() -> None:
    """What stands for padding in the embedding has no influence, not even a small one."""
    model = make()
    seq = tokens(1, 2 * M)
    retrieved = retrieved_for(seq)
    retrieved[:, 0, 1] = 0
    retrieved[:, 1, 0, 3:] = 0
    model(seq, retrieved).square().sum().backward()
    assert model.embedding.weight.grad is not None
    assert (model.embedding.weight.grad[0] == 0).all()
    with torch.no_grad():
        before = model(seq, retrieved)
        model.embedding.weight[0] = 100.0
        assert torch.equal(before, model(seq, retrieved))


@pytest.mark.parametrize("variant", ["plain", "deepnet", "scaled residuals"])
def test_without_neighbors_it_is_the_plain_decoder(variant: str) -> None:
    model = make(**VARIANTS[variant])
    plain = make(retrieval=False, **VARIANTS[variant])
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if n in plain.state_dict()})
    seq = tokens(2, 3 * M)
    with torch.no_grad():
        expected = plain(seq)
        assert torch.equal(model(seq), expected)
        assert torch.equal(model(seq, torch.zeros(2, 3, K, R, dtype=torch.long)), expected)
        assert torch.equal(model(seq, torch.zeros(2, 3, 0, R, dtype=torch.long)), expected)
        retrieved = retrieved_for(seq)
        retrieved[:, 0] = 0  # then chunk 1 of both rows is still the plain decoder's
        some = model(seq, retrieved)
        torch.testing.assert_close(some[:, : 2 * M - 1], expected[:, : 2 * M - 1], atol=1e-12, rtol=0)
        assert ((some - expected)[:, 2 * M - 1 :].abs().sum(-1) > 0).all()


# ---- packing ---------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=3), st.booleans())
def test_each_document_as_if_alone(ids: list[list[int]], deepnet: bool) -> None:
    model = make(use_deepnet=deepnet)
    documents = torch.tensor(ids)
    seq, labels = tokens(len(ids), 4 * M), tokens(len(ids), 4 * M, seed=3)
    labels[:, 5] = 0
    retrieved = retrieved_for(seq)
    retrieved[0, 2] = 0
    with torch.no_grad():
        losses = model.token_losses(seq, retrieved, labels, documents)
        logits = model(seq, retrieved, documents=documents)
        for row, of_row in enumerate(ids):
            cuts = [0, *(c for c in range(1, 4) if of_row[c] != of_row[c - 1]), 4]
            for start, end in pairwise(cuts):
                here = (slice(row, row + 1), slice(start * M, end * M))
                alone = model.token_losses(seq[here], retrieved[row : row + 1, start:end], labels[here])
                torch.testing.assert_close(losses[here], alone, atol=1e-6, rtol=0)
                alone = model(seq[here], retrieved[row : row + 1, start:end])
                torch.testing.assert_close(logits[here], alone, atol=1e-12, rtol=0)
        mean = model(seq, retrieved, True, labels=labels, documents=documents)
        torch.testing.assert_close(mean.float(), losses.sum() / (labels != 0).sum(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("given_chunks", [2, 3])
def test_documents_with_a_tail(given_chunks: int) -> None:
    """Floor or ceil of N / M document numbers: the tail belongs to the last one that is given."""
    model = make()
    seq = tokens(1, 2 * M + 2)
    documents = torch.tensor([[4, 9, 9]])[:, :given_chunks]
    retrieved = retrieved_for(seq)
    with torch.no_grad():
        logits = model(seq, retrieved, documents=documents)
        torch.testing.assert_close(logits[:, M:], model(seq[:, M:], retrieved[:, 1:]), atol=1e-12, rtol=0)


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=4))
def test_stream_holds_each_chunk_once(ids: list[list[int]]) -> None:
    stream = stream_of_documents(torch.tensor(ids))
    assert stream.order_C is not None
    assert sorted(stream.order_C.tolist()) == list(range(5 * len(ids)))
    place = 0
    for count, length in stream.groups:
        for _ in range(count):
            chunks = stream.order_C[place : place + length].tolist()
            assert chunks == list(range(chunks[0], chunks[0] + length))
            assert len({(c // 5, ids[c // 5][c % 5]) for c in chunks}) == 1
            assert stream.index_C[place : place + length].tolist() == list(range(length))
            place += length


# ---- loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_neighbors", [True, False])
def test_return_loss_is_the_mean_cross_entropy(training: bool, with_neighbors: bool) -> None:
    model = make().train(training)
    seq = tokens(2, 2 * M + 2)
    seq[1, -3:] = 0
    inputs, labels = seq[:, :-1], seq[:, 1:]
    retrieved = retrieved_for(inputs) if with_neighbors else None
    loss = model(seq, retrieved, return_loss=True)
    expected = F.cross_entropy(model(inputs, retrieved).transpose(1, 2), labels, ignore_index=0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model(inputs, retrieved, True, labels=labels), expected)
    names = [name for name, _ in model.named_parameters()]
    ours = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, msg=name)


def test_token_losses() -> None:
    model = make()
    seq, labels = tokens(2, 2 * M + 1), tokens(2, 2 * M + 1, seed=5)
    labels[0, 3] = labels[1, 0] = 0
    losses = model.token_losses(seq, retrieved_for(seq), labels)
    expected = F.cross_entropy(model(seq, retrieved_for(seq)).transpose(1, 2), labels, ignore_index=0, reduction="none")
    assert losses.dtype == torch.float32
    assert losses[0, 3] == losses[1, 0] == 0
    torch.testing.assert_close(losses, expected.float())


def test_no_labels_no_loss() -> None:
    model = make()
    seq = tokens(1, M)
    loss = model(seq, return_loss=True, labels=torch.zeros_like(seq))
    assert loss == 0
    loss.backward()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("deepnet", [False, True])
def test_a_fresh_models_loss_is_the_logarithm_of_the_vocabulary(tied: bool, deepnet: bool) -> None:
    torch.manual_seed(0)
    model = RETRO(
        num_tokens=5000, dec_dim=128, dec_depth=4, dec_cross_attn_layers=(2,), enc_dim=64, enc_depth=1,
        tie_embeddings=tied, use_deepnet=deepnet,
    )  # fmt: skip
    seq = torch.randint(1, 5000, (2, 257))
    retrieved = torch.randint(1, 5000, (2, 4, 2, 128))
    with torch.no_grad():
        assert model(seq, retrieved, return_loss=True).item() == pytest.approx(math.log(5000), abs=0.01)
        # A tied model must not begin by repeating its input, whose logit is larger by 1 at most.
        repeated = torch.full((1, 257), 17)
        assert model(repeated, return_loss=True).item() == pytest.approx(math.log(5000), abs=1.01)


def test_first_losses_stay_what_they_were() -> None:
    """Golden: the first losses of plain gradient descent; a change of them is a change of the network."""
    torch.manual_seed(0)
    model = RETRO(**SMALL).double()
    seq = tokens(2, 3 * M + 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    losses = []
    for _ in range(8):
        loss = model(seq, retrieved_for(seq[:, :-1]), return_loss=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[::7] == pytest.approx(GOLDEN, abs=1e-4)


GOLDEN = [3.13370, 2.65726]


def test_autocast_is_close() -> None:
    torch.manual_seed(0)
    model = RETRO(**SMALL)
    seq = tokens(2, 3 * M + 1)
    exact = model(seq, retrieved_for(seq[:, :-1]), return_loss=True)
    exact_grads = torch.autograd.grad(exact, list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(seq, retrieved_for(seq[:, :-1]), return_loss=True)
    rough_grads = torch.autograd.grad(rough, list(model.parameters()))
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), abs=0.01)
    for (name, parameter), a, b in zip(model.named_parameters(), exact_grads, rough_grads, strict=True):
        assert b.dtype == parameter.dtype, name
        assert (a - b).norm() < 0.1 * a.norm() + 1e-5, name


# ---- arguments -------------------------------------------------------------------------------------


def count(module: nn.Module, name: str) -> int:
    return sum(name in n and p.dim() == 2 for n, p in module.named_parameters())


def test_every_argument_reaches_the_config() -> None:
    arguments = {
        **SMALL, "enc_cross_attn_layers": (1,), "enc_attn_dropout": 0.1, "enc_ff_dropout": 0.2,
        "dec_attn_dropout": 0.3, "dec_ff_dropout": 0.4, "pad_id": 3, "enc_scale_residual": 1.5,
        "dec_scale_residual": 2.5, "norm_klass": "layernorm", "gated_rmsnorm": False, "use_deepnet": True,
        "tie_embeddings": True, "retrieval": True, "copy_tokens": 2,
        "cross_attn_sink": True,
    }  # fmt: skip
    model = RETRO(**arguments)
    assert {f.name for f in dataclasses.fields(RETROConfig)} == set(arguments)
    assert model.config == RETROConfig(**arguments)
    assert RETRO.from_config(model.config).config == model.config
    assert RETROConfig.from_dict(model.config.to_dict()) == model.config


def test_heads_and_dim_head_are_honored() -> None:
    model = make(heads=5, dim_head=4)
    for block in [*model.decoder, *model.encoder.blocks]:
        assert block.attention.inner.qkv.weight.shape[0] == 3 * 5 * 4
        if block.cross_attention is not None:
            assert block.cross_attention.inner.query.weight.shape[0] == 5 * 4
    seq = tokens(1, 2 * M)
    one, two = make(heads=1, dim_head=12), make(heads=2, dim_head=6)
    two.load_state_dict(one.state_dict())  # same weights, another number of heads: another function
    assert not torch.allclose(one(seq, retrieved_for(seq)), two(seq, retrieved_for(seq)))
    model = make(heads=4, dim_head=2, dec_cross_attn_layers=(1, 3))
    with torch.no_grad():
        expected = reference.logits(model, seq[0].tolist(), retrieved_for(seq)[0].tolist())
        torch.testing.assert_close(model(seq, retrieved_for(seq))[0], expected)


def test_cross_attention_layers_are_where_they_should_be() -> None:
    model = make(enc_depth=3, enc_cross_attn_layers=(2,), dec_depth=4, dec_cross_attn_layers=(1, 4))
    assert [b.cross_attention is not None for b in model.encoder.blocks] == [False, True, False]
    assert [b.cross_attention is not None for b in model.decoder] == [True, False, False, True]
    assert all(b.cross_attention is not None for b in make(enc_cross_attn_layers=None).encoder.blocks)


@pytest.mark.parametrize("name", ["enc_attn_dropout", "enc_ff_dropout", "dec_attn_dropout", "dec_ff_dropout"])
def test_each_dropout_works_where_it_says(name: str) -> None:
    seq = tokens(2, 3 * M)
    retrieved = retrieved_for(seq)
    model, same = make(**{name: 0.5}), make()
    with torch.no_grad():
        assert torch.equal(model(seq, retrieved), same(seq, retrieved)), "eval mode drops nothing"
        model.train()
        first, second = model(seq, retrieved), model(seq, retrieved)
        assert not torch.equal(first, second)
        first, second = model(seq), model(seq)  # without neighbors the encoder does not run
        assert torch.equal(first, second) == name.startswith("enc")


def test_attention_dropout_is_also_in_cross_attention() -> None:
    seq = tokens(2, 3 * M)
    retrieved = retrieved_for(seq)
    for side, name in (("decoder", "dec_attn_dropout"), ("encoder", "enc_attn_dropout")):
        model = make(**{name: 0.5}).train()
        blocks = model.decoder if side == "decoder" else model.encoder.blocks
        for block in blocks:
            block.attention.eval()
        with torch.no_grad():
            assert not torch.equal(model(seq, retrieved), model(seq, retrieved))


def test_norms() -> None:
    kinds = {name: {type(m) for m in make(norm_klass=name).modules()} for name in NORMS}
    for name, klass in NORMS.items():
        assert klass in kinds[name]
        assert not kinds[name] & set(NORMS.values()) - {klass}
    assert RETRO(**SMALL, gated_rmsnorm=True).config.gated_rmsnorm
    own = RETRO(**SMALL, norm_klass=RMSNorm)
    with pytest.raises(ConfigError, match="norm_klass"):
        own.config.to_dict()


def test_deepnet_numbers() -> None:
    config = RETROConfig(enc_depth=3, dec_depth=5, dec_cross_attn_layers=(), use_deepnet=True)
    assert config.deepnet("enc") == pytest.approx((0.81 * 405 ** (1 / 16), 0.87 * 405 ** (-1 / 16)))
    assert config.deepnet("dec") == pytest.approx((15**0.25, 60**-0.25))
    torch.manual_seed(0)
    model = RETRO(**{**SMALL, "dec_dim": 64, "enc_dim": 64, "dim_head": 32, "use_deepnet": True})
    qkv, out = model.decoder[0].attention.inner.qkv.weight, model.decoder[0].attention.inner.out.weight
    beta, xavier = (12 * 3) ** -0.25, (2 / 128) ** 0.5
    for part, gain in zip(qkv.chunk(3), (1, 1, beta), strict=True):
        assert part.std().item() == pytest.approx(gain * xavier, rel=0.05)
    assert out.std().item() == pytest.approx(beta * xavier, rel=0.05)
    key, value = model.decoder[1].cross_attention.inner.key_value.weight.chunk(2)
    assert key.std().item() == pytest.approx(xavier, rel=0.05)
    assert value.std().item() == pytest.approx(beta * xavier, rel=0.05)
    assert model.decoder[1].cross_attention.inner.query.weight.std().item() == pytest.approx(xavier, rel=0.05)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"dec_cross_attn_layers": (2, 4)}, r"dec_cross_attn_layers.*4.*dec_depth = 3"),
    ({"dec_cross_attn_layers": (0,)}, "dec_cross_attn_layers"),
    ({"dec_cross_attn_layers": (2, 2)}, "dec_cross_attn_layers"),
    ({"dec_cross_attn_layers": None}, "dec_cross_attn_layers"),
    ({"enc_cross_attn_layers": (3,)}, r"enc_cross_attn_layers.*3.*enc_depth = 2"),
    ({"dim_head": 7}, r"dim_head.*7.*even"),
    ({"heads": 0}, r"heads.*0.*1"),
    ({"heads": 2.0}, "heads"),
    ({"heads": True}, "heads"),
    ({"pad_id": V}, f"pad_id.*{V}"),
    ({"pad_id": -1}, "pad_id"),
    ({"dec_ff_dropout": 1.0}, "dec_ff_dropout"),
    ({"enc_attn_dropout": -0.1}, "enc_attn_dropout"),
    ({"dec_scale_residual": 0}, "dec_scale_residual"),
    ({"norm_klass": "batchnorm"}, "norm_klass"),
    ({"norm_klass": "layernorm", "gated_rmsnorm": True}, "gated_rmsnorm"),
    ({"use_deepnet": 1}, "use_deepnet"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[str(change) for change, _ in WRONG])
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RETRO(**{**SMALL, **change})


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="sequence_length"):
        RETRO(sequence_length=3)


def test_wrong_calls() -> None:
    model = make()
    seq = tokens(2, 3 * M)
    right = retrieved_for(seq)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((tokens(1, 8 * M + 1),), {}, f"{8 * M + 1}.*max_seq_len is {8 * M}"),
        ((seq, right[:, :2]), {}, "2 rows of 3 chunks.*2 rows of 2 chunks"),
        ((seq, right[:1]), {}, "2 rows of 3 chunks.*1 rows of 3 chunks"),
        ((seq, right[..., : M - 1]), {}, f"{M - 1} tokens.*chunk_size = {M}"),
        ((seq, right.double()), {}, "retrieved must be integers"),
        ((seq.double(),), {}, "seq must be integers"),
        ((seq[0],), {}, "seq must be integers"),
        ((seq[:, :0],), {}, "at least 1 x 1"),
        ((seq,), {"documents": torch.zeros(2, 4)}, r"documents must be \(2, 3\).*\(2, 4\)"),
        ((seq,), {"labels": seq}, "labels need return_loss"),
        ((seq, None, True), {"labels": seq[:, 1:]}, r"labels.*\(2, 12\).*\(2, 11\)"),
    ]
    for args, kwargs, message in calls:
        with pytest.raises(ConfigError, match=message):
            model(*args, **kwargs)
    with pytest.raises(ConfigError, match="retrieval=False"):
        make(retrieval=False)(seq, right)
    with pytest.raises(ConfigError, match="labels"):
        model.token_losses(seq)


def test_typical_call_of_the_public_api() -> None:
    """public_api.md's typical model, narrower and shallower, with every keyword that it uses."""
    model = RETRO(
        chunk_size=64, max_seq_len=2048, enc_dim=56, enc_depth=2, dec_dim=50, dec_depth=12,
        dec_cross_attn_layers=(3, 6, 9, 12), heads=2, dim_head=16, dec_attn_dropout=0.25, dec_ff_dropout=0.25,
        use_deepnet=True,
    )  # fmt: skip
    seq = torch.randint(0, 28996, (2, 2049 // 8 + 1))
    loss = model(seq, torch.randint(0, 28996, (2, 4, 2, 128)), return_loss=True)
    loss.backward()
    assert loss.shape == ()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- DeepNet at depth ------------------------------------------------------------------------------


def deep_model(depth: int, plain: bool) -> RETRO:
    """A narrow decoder of `depth` layers, with DeepNet's alpha and beta or with both 1."""
    torch.manual_seed(0)
    scale = 1.0 if plain else None
    model = RETRO(
        num_tokens=64, max_seq_len=32, dec_depth=depth, dec_dim=16, heads=1, dim_head=16, chunk_size=16,
        dec_cross_attn_layers=(depth // 2, depth), enc_depth=1, enc_dim=16, use_deepnet=True, norm_klass="layernorm",
        dec_scale_residual=scale, enc_scale_residual=scale,
    )  # fmt: skip
    if plain:
        beta = model.config.deepnet("dec")[1]
        with torch.no_grad():
            for block in model.decoder:
                block.attention.inner.qkv.weight[32:] /= beta  # values; queries and keys have gain 1 anyway
                for layer in (
                    block.attention.inner.out,
                    block.feed_forward.inner.up,
                    block.feed_forward.inner.out,
                ):
                    layer.weight /= beta
    return model


def deep_training(model: RETRO, steps: int) -> tuple[list[float], float]:
    """The losses of some steps, and the first layer's gradient over the last layer's, in the first of them."""
    seq = torch.arange(2 * 33).reshape(2, 33) % 7 + 1  # each token says what the next one is
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, ratio = [], 0.0
    for step in range(steps):
        loss = model(seq, tokens(2, 2, 2, 32), return_loss=True)
        optimizer.zero_grad()
        loss.backward()
        if step == 1:  # in the first one, the tiny output layer passes nothing on
            first, last = (model.decoder[i].feed_forward.inner.out.weight.grad for i in (0, -1))
            ratio = (first.norm() / last.norm()).item()
        optimizer.step()
        losses.append(loss.item())
    return losses, ratio


@pytest.mark.slow
@pytest.mark.parametrize("depth", [200, pytest.param(1000, marks=pytest.mark.torture)])
def test_deep_models_train(depth: int) -> None:
    losses, ratio = deep_training(deep_model(depth, plain=False), 8)
    assert all(math.isfinite(loss) for loss in losses)
    assert all(later < earlier + 0.01 for earlier, later in pairwise(losses)), "no spike"
    assert losses[-1] < losses[0] - 0.3
    assert 1e-3 < ratio < 1e3, "the first layer learns, too"
    _, ratio = deep_training(deep_model(depth, plain=True), 2)
    assert ratio < 1e-6, "with alpha = beta = 1 nothing reaches it"


# ---- compiled --------------------------------------------------------------------------------------

DEEPER = [("aot_eager", 2, 3), ("inductor", 1, 1)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own, about other parts of torch
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("backend", "depth", "cases"),
    [("aot_eager", 1, 1), *(pytest.param(*case, marks=pytest.mark.torture) for case in DEEPER)],
)
def test_a_compiled_model_gives_the_same_loss_and_gradients(backend: str, depth: int, cases: int) -> None:
    """Some neighbors and packed documents, no neighbors, all neighbors and another length: in one model.

    The graph breaks where the network looks at its data: whether there are neighbors at all, which chunks
    have some, which labels are padding, how long the documents are. Each case is traced anew. The first case
    in a single layer takes seconds; more cases and layers, and compiling C++, take minutes.
    """
    torch.compiler.reset()
    model = make(dec_depth=depth, dec_cross_attn_layers=(depth,), enc_depth=1).float()
    compiled = torch.compile(model, backend=backend)
    seq, labels = tokens(2, 4 * M), tokens(2, 4 * M, seed=3)
    labels[:, 5] = 0
    whole = retrieved_for(seq)
    some = whole.clone()
    some[0, 1] = 0
    some[1, 2, 1, 3:] = 0
    all_cases: list[tuple[Tensor, Tensor | None, dict[str, Any]]] = [
        (seq, some, {"documents": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])}),
        (seq, None, {}),
        (seq[:, : 2 * M + 1], whole[:, :2], {}),
    ]
    for inputs, retrieved, options in all_cases[:cases]:
        given = {"labels": labels[:, : inputs.shape[1]], **options}
        losses, gradients = [], []
        for called in (model, compiled):
            loss = called(inputs, retrieved, return_loss=True, **given)
            losses.append(loss.detach())
            gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
        torch.testing.assert_close(losses[1], losses[0])
        for name, a, b in zip(dict(model.named_parameters()), *gradients, strict=True):
            assert (a is None) == (b is None), name
            if a is not None and b is not None:
                torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4, msg=name)
