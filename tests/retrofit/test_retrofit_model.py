"""Retrofit against its base: what must be equal, what neighbors may change, and what is trained."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_bases import DEPTH, KINDS, VOCABULARY, opened, tiny_base, token_rows
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from retro_model import Retrofit
from retro_model.core.errors import ConfigError, RetroError, SourceError
from retro_model.network.model import RETRO

M, L, K, R = 8, 3, 2, 16
SEQ, RETRIEVED = token_rows(2, L * M + 3), token_rows(2, L, K, R, seed=1)


def make(kind: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Retrofit:
    """A new model for chunks of 8; with cross-attention after every layer, unless told otherwise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Retrofit(tiny_base(kind, dtype), M, **{"pad_id": 0, "cross_attn_layers": (1, 2, 3), **settings})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_equals_its_base_at_first_and_without_neighbors_always(kind: str, dtype: torch.dtype) -> None:
    model = make(kind, dtype)
    expected = model.base(SEQ).logits
    assert expected.dtype == dtype
    assert torch.equal(model(SEQ, RETRIEVED), expected), "step 0"
    opened(model)
    assert torch.equal(model(SEQ), expected), "no neighbors"
    assert torch.equal(model(SEQ, torch.zeros_like(RETRIEVED)), expected), "all missing"
    only_first = RETRIEVED.clone()
    only_first[1] = 0  # neighbor dropout: a row without neighbors beside one that has some
    mixed = model(SEQ, only_first)
    assert torch.equal(mixed[1], expected[1]) and not torch.equal(mixed[0], expected[0])
    assert torch.equal(model.base(SEQ).logits, expected), "the base alone"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_no_token_sees_what_later_tokens_retrieved(kind: str) -> None:
    """Neighbors of chunk u first change position (u + 1) * M - 1; tokens change no position before their own."""
    model = opened(make(kind, enc_cross_attn_layers=None))  # an encoder that reads the chunk has more to leak
    before = model(SEQ, RETRIEVED)
    for u in range(L):
        changed = RETRIEVED.clone()
        changed[:, u] = token_rows(2, K, R, seed=9)
        assert first_difference(model(SEQ, changed), before) == (u + 1) * M - 1
    for place in range(SEQ.shape[1]):
        changed = SEQ.clone()
        changed[:, place] = SEQ[:, place] % (VOCABULARY - 1) + 1
        assert first_difference(model(changed, RETRIEVED), before) == place


def first_difference(a: Tensor, b: Tensor) -> int:
    return int((a != b).any(-1).any(0).nonzero()[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_adapter_weight_and_no_base_weight(kind: str) -> None:
    model = opened(make(kind, enc_cross_attn_layers=None)).train()
    model(SEQ, RETRIEVED, return_loss=True).backward()
    for name, weight in model.adapter_state_dict().items():
        assert weight.grad is not None and bool(weight.grad.any()), name
    assert all(weight.grad is None for weight in model.base.parameters())


def test_a_base_that_is_not_frozen_is_trained_too() -> None:
    model = Retrofit(tiny_base("llama"), M, freeze=False, pad_id=0)
    model.train()(SEQ, RETRIEVED, return_loss=True).backward()
    assert model.base.training and all(weight.grad is not None for weight in model.base.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_frozen_base_has_no_dropout(kind: str) -> None:
    model = make(kind).train()
    assert model.training and model.adapters.training and not model.base.training
    assert torch.equal(model(SEQ), model(SEQ))


# ---- packed documents ------------------------------------------------------------------------------

DOCUMENTS = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 2]])  # of L * M + 3 tokens: the last chunk is incomplete


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_documents_are_read_as_if_each_were_alone(kind: str) -> None:
    model = opened(make(kind))
    packed = model(SEQ, RETRIEVED, documents=DOCUMENTS)
    for row, first, last in ((0, 0, 2), (0, 2, 4), (1, 0, 1), (1, 1, 2), (1, 2, 4)):
        some = slice(first * M, last * M)
        found = RETRIEVED[row : row + 1, first:last]
        alone = model(SEQ[row : row + 1, some], found)[0]
        assert torch.allclose(packed[row, some], alone, atol=2e-4 * float(alone.abs().max()))
    others = SEQ.clone()
    others[:, : 2 * M] = token_rows(2, 2 * M, seed=4)
    changed = model(others, RETRIEVED, documents=DOCUMENTS)
    assert torch.equal(changed[:, 2 * M :], packed[:, 2 * M :]), "other documents must not matter at all"


def test_losses_are_those_of_the_logits() -> None:
    model = opened(make())
    labels = token_rows(*SEQ.shape, seed=3)
    labels[0, 5:9] = 0
    for documents in (None, DOCUMENTS, DOCUMENTS[:, :L]):
        logits = model(SEQ, RETRIEVED, documents=documents)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=0)
        assert torch.allclose(model.token_losses(SEQ, RETRIEVED, labels, documents), losses, atol=1e-5)
        loss = model(SEQ, RETRIEVED, return_loss=True, labels=labels, documents=documents)
        assert torch.allclose(loss, losses.sum() / (labels != 0).sum(), atol=1e-5)
    whole = model(torch.cat([SEQ, labels[:, -1:]], 1), RETRIEVED, return_loss=True)
    following = torch.cat([SEQ[:, 1:], labels[:, -1:]], 1)
    assert torch.equal(whole, model(SEQ, RETRIEVED, return_loss=True, labels=following))


@torch.no_grad()
def test_any_number_of_neighbors_is_read() -> None:
    model = opened(make())
    one = model(SEQ, RETRIEVED[:, :, 0])  # (B, L, R)
    assert torch.allclose(one, model(SEQ, RETRIEVED[:, :, :1]))
    with_missing = torch.cat([RETRIEVED[:, :, :1], torch.zeros(2, L, 5, R, dtype=torch.long)], dim=2)
    assert torch.allclose(one, model(SEQ, with_missing), atol=1e-5)
    assert not torch.allclose(one, model(SEQ, RETRIEVED), atol=1e-2)


@torch.no_grad()
def test_padding_may_be_an_id_that_no_token_has() -> None:
    """A tokenizer without a padding token gets one beyond the base's embeddings, which are not resized."""
    model = opened(make(pad_id=None))
    assert model.config.pad_id == VOCABULARY == len(model.embedding.weight)
    seq, found = SEQ.clone(), RETRIEVED.clone()
    seq[:, -3:], found[:, :, 1, 5:] = VOCABULARY, VOCABULARY
    same = opened(make(pad_id=0))
    zeros, seq_with_zeros = found.masked_fill(found == VOCABULARY, 0), seq.masked_fill(seq == VOCABULARY, 0)
    assert torch.equal(model(seq, found), same(seq_with_zeros, zeros))
    assert make(pad_id=None, kind="gpt2").settings.pad_id == VOCABULARY
    assert Retrofit(tiny_base("llama", pad_token_id=4), M).config.pad_id == 4


# ---- recomputation ---------------------------------------------------------------------------------


def gradients(model: Retrofit) -> dict[str, Tensor]:
    model.zero_grad()
    # Two passes before one backward: a hook that remembered the latest pass would recompute the wrong one.
    first = model(SEQ, RETRIEVED, return_loss=True)
    (first + model(SEQ.flip(1), RETRIEVED.flip(1), return_loss=True)).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("whose", ["ours", "the base's"])
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", ["bloom", "gpt2", "llama", "opt"])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, freeze: bool, whose: str) -> None:
    no_dropout = {"bloom": ("hidden_dropout", "attention_dropout"), "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
                  "llama": (), "opt": ("dropout", "attention_dropout")}[kind]  # fmt: skip
    base = tiny_base(kind, **dict.fromkeys(no_dropout, 0.0))
    model = opened(Retrofit(base, M, freeze=freeze, pad_id=0, cross_attn_layers=(1, 3))).train()
    expected = gradients(model)
    if whose == "ours":
        model.checkpoint_activations()
    else:
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable()
    calls = count_calls(base)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name
    assert len(calls) == 2 * 2, "each layer runs once more in the backward pass"


def count_calls(base: nn.Module) -> list[int]:
    """Counts the calls of the second layer's first linear layer."""
    layer: Any = next(module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == DEPTH)
    calls: list[int] = []
    inner = next(module for module in layer[1].modules() if hasattr(module, "weight") and module.weight.dim() == 2)
    inner.register_forward_hook(lambda *_: calls.append(1))
    return calls


# ---- its parts -------------------------------------------------------------------------------------


def test_sizes_come_from_the_base_unless_they_are_given() -> None:
    config = Retrofit(tiny_base("gpt2", num_hidden_layers=14, hidden_size=256)).config
    assert (config.dec_cross_attn_layers, config.enc_dim, config.heads) == ((6, 9, 12), 64, 2)
    assert Retrofit(tiny_base("gpt2")).config.dec_cross_attn_layers == (DEPTH,), "a shallower base: its last layer"
    given = make(enc_dim=16, heads=3, dim_head=8).config
    assert (given.enc_dim, given.heads, given.dim_head, given.max_seq_len) == (16, 3, 8, 128)


def test_adapters_have_at_least_float32() -> None:
    assert {weight.dtype for weight in make(dtype=torch.bfloat16).adapter_state_dict().values()} == {torch.float32}
    assert {weight.dtype for weight in make(dtype=torch.float64).adapter_state_dict().values()} == {torch.float64}


def test_nothing_stays_attached_to_the_base() -> None:
    model = opened(make())
    model(SEQ, RETRIEVED)
    with pytest.raises(ConfigError):
        model(SEQ, RETRIEVED[:, :1])
    assert not [module for module in model.base.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_layers_elsewhere_are_named() -> None:
    base = tiny_base("llama")
    base.model.blocks = base.model.layers
    del base.model.layers
    with pytest.raises(SourceError, match="LlamaForCausalLM keeps its decoder layers in an unknown place") as caught:
        Retrofit(base)
    assert "Gemma 2" in str(caught.value) and "layers='transformer.blocks'" in str(caught.value)
    assert Retrofit(base, layers="model.blocks").config.dec_depth == DEPTH


ENCODER_DECODER = {"vocab_size": 50, "d_model": 16, "num_layers": 1, "d_kv": 8, "d_ff": 16, "num_heads": 2}


def encoder_decoder() -> Any:
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **ENCODER_DECODER))


def narrow_embeddings() -> Any:
    config = AutoConfig.for_model("opt", **{**KINDS["opt"], "word_embed_proj_dim": 16})
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: Retrofit(encoder_decoder()), "has an encoder and a decoder"),
        (lambda: Retrofit(narrow_embeddings()), "embeddings of width 16, expected its hidden width 32"),
        (
            lambda: make(cross_attn_layers=(4,)),
            r"cross_attn_layers: found \[4\], expected one or more layers from 1 to 3",
        ),
        (lambda: make(cross_attn_layers=()), r"cross_attn_layers: found \[\]"),
        (lambda: make(enc_cross_attn_layers=(3,)), "enc_cross_attn_layers: found"),
        (lambda: make(layers="model.norm"), "layers: found 'model.norm', expected the name of a ModuleList"),
        (lambda: make(pad_id=VOCABULARY + 1), "pad_id: found 51, expected at most 50"),
        (lambda: make(copy_tokens=9), "copy_tokens: found 9, expected at most chunk_size = 8"),
        (lambda: make()(SEQ, RETRIEVED[:, :2]), "retrieved must hold 2 rows of 3 chunks"),
        (lambda: make()(SEQ + 40), "token ids .* num_tokens is 50"),
        (lambda: make()(SEQ, labels=SEQ), "labels need return_loss=True"),
        (lambda: make().token_losses(SEQ), "labels must have the shape of seq"),
        (lambda: make()(SEQ[0], return_loss=True), "seq must be integers"),
        (lambda: make()(token_rows(1, 129)), "seq has 129 tokens; max_seq_len is 128"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: Any, message: str) -> None:
    with pytest.raises(RetroError, match=message) as caught:
        arguments()
    assert "\n" not in str(caught.value)


# ---- learning --------------------------------------------------------------------------------------


def woven_rows(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random tokens (rows, 4 * M + 1), and neighbors of which one holds, at a random place, what follows its chunk."""
    seq = torch.randint(1, VOCABULARY, (rows, 4 * M + 1), generator=generator)
    retrieved = torch.randint(1, VOCABULARY, (rows, 4, K, 2 * M + 4), generator=generator)
    for row in range(rows):
        for u in range(3):
            at, neighbor = (int(torch.randint(0, most, (1,), generator=generator)) for most in (M, K))
            retrieved[row, u, neighbor, at : at + M + 3] = seq[row, (u + 1) * M - 3 : (u + 2) * M]
    return seq, retrieved


def test_around_a_frozen_base_it_learns_to_copy_from_its_neighbors() -> None:
    """Within tens of steps; neighbors of other chunks give nothing."""
    model = make(dim_head=16, heads=2).train()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.adapters.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for _ in range(40):
        model(*woven_rows(16, generator), return_loss=True).backward()
        nn.utils.clip_grad_norm_(model.adapters.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seq, retrieved = woven_rows(32, generator)
    with torch.no_grad():
        on, shuffled, off = (
            float(model.eval().token_losses(seq[:, :-1], found, seq[:, 1:])[:, M - 1 : -1].mean())
            for found in (retrieved, retrieved.roll(1, 0), None)
        )
    assert on < off / 2 and shuffled > 0.95 * off, f"{on:.2f}, shuffled {shuffled:.2f}, without {off:.2f} nats"


def test_it_is_called_as_retro_is() -> None:
    from inspect import signature

    assert signature(Retrofit.forward) == signature(RETRO.forward)
    assert signature(Retrofit.token_losses) == signature(RETRO.token_losses)
