"""Continue a prompt as text: what `retro generate` prints and `retro serve` sends.

ids = encode_prompt(model, tokenizer, "Return the indices of the largest")
for piece in write_text(model, tokenizer, ids, Sampling(seed=1), retriever.for_generation(k=2)):
    print(piece.text, end="")
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from retro_model.core.errors import ConfigError
from retro_model.corpus.tokenizer import Tokenizer
from retro_model.inference.generation import Retrieve, Writer
from retro_model.inference.sampling import top_k, top_p
from retro_model.network.language_model import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and how many; temperature 0 takes the likeliest. `top_k` replaces `top_p` if given."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int | None = None
    seed: int = 0


class Piece(NamedTuple):
    """A generated token and the text that it adds."""

    token: int
    text: str


def encode_prompt(model: LanguageModel, tokenizer: Tokenizer, text: str, name: str = "prompt") -> list[int]:
    """The ids of the begin token and the text. Raises ConfigError if no room is left for a token after them."""
    ids = [tokenizer.begin_id, *tokenizer.encode(text).tolist()]
    if len(ids) >= model.config.max_seq_len:
        raise ConfigError(
            f"{name}: found {len(ids)} tokens, expected fewer than the {model.config.max_seq_len} that the model was "
            "trained for"
        )
    return ids


def write_text(
    model: LanguageModel, tokenizer: Tokenizer, ids: Sequence[int], sampling: Sampling, retrieve: Retrieve | None = None
) -> Iterator[Piece]:
    """Yield the tokens that follow `ids`. The text of a character comes with the last of its tokens.

    Ends with the end token, after `max_new_tokens`, or at the length that the model was trained for.
    """
    filter_fn, thres = top_p, sampling.top_p
    if sampling.top_k is not None:
        filter_fn, thres = top_k, 1 - min(sampling.top_k / model.config.num_tokens, 1)
    writer = Writer(
        model,
        torch.tensor([list(ids)], device=model.device),
        retrieve=retrieve,
        max_new_tokens=sampling.max_new_tokens,
        filter_fn=filter_fn,
        filter_thres=thres,
        temperature=sampling.temperature,
        eos_id=tokenizer.end_id,
        seed=sampling.seed,
    )
    written, before = list(ids), tokenizer.decode(ids)
    for token in writer:
        written.append(int(token))
        now = tokenizer.decode(written).rstrip("\N{REPLACEMENT CHARACTER}")
        yield Piece(written[-1], now.removeprefix(before))
        before = now
