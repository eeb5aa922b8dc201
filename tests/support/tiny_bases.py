"""Tiny causal language models of every supported kind, with random weights.

base = tiny_base("llama")
texts, found = token_rows(2, 27), neighbors_for(27)
save_base(folder)                     # with a tokenizer, for `retrofit.base`
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from retro_model import Retrofit

VOCABULARY, WIDTH, DEPTH = 50, 32, 3

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "initializer_range": 0.2,  # so that every weight matters
}
_GROUPED: dict[str, Any] = {**_SIZES, "intermediate_size": 64, "max_position_embeddings": 128, "num_key_value_heads": 2}

# Of each kind: the sizes, under the names of its config.
KINDS: dict[str, dict[str, Any]] = {
    "bloom": _SIZES,
    "gemma2": {**_GROUPED, "head_dim": 8, "sliding_window": 16},
    "gpt2": {**_SIZES, "n_positions": 128},
    "gpt_neox": {**_SIZES, "intermediate_size": 64, "max_position_embeddings": 128},
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 16},
    "opt": {**_SIZES, "ffn_dim": 64, "max_position_embeddings": 128, "word_embed_proj_dim": WIDTH, "init_std": 0.2},
    "phi": {**_GROUPED, "num_key_value_heads": 4},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
}
NO_SPECIAL_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def tiny_base(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of this kind, in eval mode."""
    config = AutoConfig.for_model(kind, **{**NO_SPECIAL_TOKENS, **KINDS[kind], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return base.eval()


def save_base(folder: Path, *, seed: int = 0, named: bool = True, **changes: Any) -> Path:
    """A folder that `retrofit.base` can name: a Llama, and its byte-level tokenizer, which has no padding token.

    Unless `named`, the tokenizer does not say which of its tokens begin and end a text.
    """
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    backend = Backend(BPE())
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=300, special_tokens=list(tokens.values()), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the same words again and again, so that there are merges"] * 9, trainer)
    tiny_base("llama", seed=seed, vocab_size=backend.get_vocab_size(), **changes).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, **(tokens if named else {})).save_pretrained(folder)
    return folder


def token_rows(*shape: int, seed: int = 0) -> Tensor:
    """Random tokens; none is 0, which the tests take for padding."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def opened(model: Retrofit, seed: int = 0) -> Retrofit:
    """The model, in eval mode, with every adapter weight changed, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.adapter_state_dict().items():
        if name.endswith("gate"):
            weight.fill_(0.2)
        else:
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model.eval()
