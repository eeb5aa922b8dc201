"""Text generation with retrieval at each chunk boundary (section 2.2 of the paper).

Each new token costs one token's work (cached_decoder), each chunk one retrieval. Everything works on token ids; the
caller passes the search as a function.

A row ends with the end token, or at max_seq_len tokens, the length the model was trained for. To continue, prompt
again with the last part of the text.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retro_model.core.errors import ConfigError
from retro_model.inference.cached_decoder import CachedDecoder
from retro_model.inference.sampling import Filter, sample, top_k
from retro_model.network.language_model import LanguageModel
from retro_model.network.model import RETRO, check_ids

if TYPE_CHECKING:
    from retro_model.inference.cached_base import CachedBase

Retrieve = Callable[[Tensor], Tensor]  # finished chunks (B', M) -> neighbors (B', K, R), pad where one is missing


class Writer:
    """An iterator over generated tokens: each item is the next token of every row (B,), pad for rows that have ended.

    `text_BN`, `length_B` and `neighbors` hold the current text, its lengths and the neighbors retrieved so far. The
    arguments are those of `generate`; the model must be in eval mode.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Tensor,
        *,
        retrieve: Retrieve | None = None,
        max_new_tokens: int | None = None,
        filter_fn: Filter = top_k,
        filter_thres: float = 0.9,
        temperature: float = 1.0,
        eos_id: int | None = None,
        prompt_lengths: Tensor | None = None,
        seed: int | None = None,
    ) -> None:
        config = model.config
        self.length_B = _check_prompt(model, prompt, prompt_lengths)
        _check_options(model, retrieve, max_new_tokens, temperature)
        most = config.max_seq_len if max_new_tokens is None else max_new_tokens
        self.limit_B = (self.length_B + most).clamp(max=config.max_seq_len)
        self.model, self.retrieve, self.eos_id = model, retrieve, eos_id
        generator = None if seed is None else torch.Generator(prompt.device).manual_seed(seed)
        self.choose = partial(
            sample,
            filter_fn=filter_fn,
            filter_thres=filter_thres,
            temperature=temperature,
            generator=generator,
        )
        rows, width = prompt.shape
        longest = int(self.limit_B.max())
        text_BN = F.pad(prompt.long(), (0, max(0, longest - width)), value=config.pad_id)[:, :longest]
        filled_BN = torch.arange(longest, device=prompt.device) < self.length_B[:, None]
        self.text_BN = text_BN.where(filled_BN, config.pad_id)
        self.neighbors: list[dict[int, Tensor]] = [{} for _ in range(rows)]  # (K, R) by chunk number
        self.decoder = _cached(model, rows, longest)
        self._tokens = self._write()

    def __iter__(self) -> Iterator[Tensor]:
        """The remaining tokens; a second loop continues where the first one stopped."""
        return self._tokens

    @torch.no_grad()
    def _write(self) -> Iterator[Tensor]:
        writes_B = self.length_B < self.limit_B
        if not writes_B.any():
            return
        logits_BV = self._read_prompt()
        while True:
            tokens_B = self.choose(logits_BV).masked_fill(~writes_B, self.model.config.pad_id)
            rows = writes_B.nonzero().squeeze(1)
            self.text_BN[rows, self.length_B[rows]] = tokens_B[rows]
            self.length_B = self.length_B + writes_B
            yield tokens_B
            writes_B = writes_B & (self.length_B < self.limit_B)
            if self.eos_id is not None:
                writes_B = writes_B & (tokens_B != self.eos_id)
            if not writes_B.any():
                return
            logits_BV = self._read_last(writes_B)

    def _read_prompt(self) -> Tensor:
        """Retrieve for all chunks of the prompts in one search, read the prompts, and return the logits (B, V)."""
        chunks = (self.length_B // self.model.config.chunk_size).tolist()
        self._search([(row, u) for row, count in enumerate(chunks) for u in range(count)])
        last_BD: Tensor | None = None
        start, longest = 0, int(self.length_B.max())
        while start < longest:
            width = min(self.decoder.room(start), longest - start)
            counts_B = (self.length_B - start).clamp(0, width)
            piece_BS = self.text_BN[:, start : start + width]
            hidden_BSD = self.decoder.read(piece_BS, counts_B.tolist(), self._neighbors_of_next(counts_B > 0))
            if last_BD is None:
                last_BD = torch.zeros_like(hidden_BSD[:, 0])
            ends_B = (counts_B > 0) & (self.length_B <= start + width)
            last_BD[ends_B] = hidden_BSD[ends_B, counts_B[ends_B] - 1].to(last_BD.dtype)
            start += width
        assert last_BD is not None, "a prompt has at least one token"
        return self.decoder.logits(last_BD)

    def _read_last(self, writes_B: Tensor) -> Tensor:
        """Read the last token of the rows that continue, and return the logits (B, V)."""
        chunk_size = self.model.config.chunk_size
        finished_B = writes_B & (self.length_B % chunk_size == 0)
        rows = finished_B.nonzero().squeeze(1).tolist()
        self._search([(row, int(self.length_B[row]) // chunk_size - 1) for row in rows])
        last_B1 = self.text_BN.gather(1, self.length_B[:, None] - 1)
        hidden_B1D = self.decoder.read(last_B1, writes_B.long().tolist(), self._neighbors_of_next(finished_B))
        return self.decoder.logits(hidden_B1D[:, 0])

    def _search(self, finished: list[tuple[int, int]]) -> None:
        """Retrieve neighbors for finished chunks (row, chunk number) in one call.

        Raises ConfigError if `retrieve` returns another shape than (chunks, neighbors, tokens).
        """
        if self.retrieve is None or not finished:
            return
        m = self.model.config.chunk_size
        chunks_CM = torch.stack([self.text_BN[row, u * m : (u + 1) * m] for row, u in finished])
        retrieved_CKR = self.retrieve(chunks_CM)
        if retrieved_CKR.dim() != 3 or len(retrieved_CKR) != len(finished):
            raise ConfigError(
                f"retrieve must return ({len(finished)}, neighbors, tokens) for {len(finished)} chunks: "
                f"{tuple(retrieved_CKR.shape)}"
            )
        for (row, u), neighbors_KR in zip(finished, retrieved_CKR.to(self.text_BN), strict=True):
            self.neighbors[row][u] = neighbors_KR

    def _neighbors_of_next(self, of_rows_B: Tensor) -> dict[int, Tensor]:
        """For the given rows: the neighbors of the chunk that the decoder's next token completes, if it does."""
        found = {}
        for row in of_rows_B.nonzero().squeeze(1).tolist():
            chunks, rest = divmod(self.decoder.lengths[row] + 1, self.model.config.chunk_size)
            if rest == 0 and chunks - 1 in self.neighbors[row]:
                found[row] = self.neighbors[row][chunks - 1]
        return found


def generate(
    model: LanguageModel, prompt: Tensor, *, return_neighbors: bool = False, **options: Any
) -> Tensor | tuple[Tensor, list[dict[int, Tensor]]]:
    """Generate text: returns the prompts and their continuations, ids (B, longest), right-padded.

    prompt: ids (B, P); with `prompt_lengths` (B,), only the first `prompt_lengths[b]` ids of row b.
    retrieve: maps finished chunks (B', M) to their neighbors (B', K, R), pad where one is missing. It is called
        once for all complete chunks of the prompts, and then at each chunk boundary. None: no retrieval.
    max_new_tokens: limit per row. None: up to max_seq_len, which always limits a row.
    filter_fn, filter_thres: `top_k`, `top_p` or a function with the same signature, applied after the temperature.
    temperature: 0 takes the most likely token.
    eos_id: a row ends with this token. seed: equal seeds give equal texts.
    return_neighbors: also return a dict for each row, from chunk number to the neighbors (K, R) of that chunk.
        The neighbors of chunk u affect the tokens from (u + 1) * M on, those of the next chunk.
    """
    was_training = model.training
    model.eval()
    try:
        writer = Writer(model, prompt, **options)
        for _ in writer:
            pass
    finally:
        model.train(was_training)
    text_BN = writer.text_BN[:, : int(writer.length_B.max())]
    return (text_BN, writer.neighbors) if return_neighbors else text_BN


def _cached(model: LanguageModel, rows: int, longest: int) -> "CachedDecoder | CachedBase":
    if isinstance(model, RETRO):
        return CachedDecoder(model, rows, longest)
    from retro_model.inference.cached_base import CachedBase  # transformers takes seconds
    from retro_model.retrofit.model import Retrofit

    assert isinstance(model, Retrofit), type(model)
    return CachedBase(model, rows)


def _check_prompt(model: LanguageModel, prompt: Tensor, prompt_lengths: Tensor | None) -> Tensor:
    """The length of each prompt (B,). Raises ConfigError for invalid prompts or lengths."""
    if prompt.dim() != 2 or prompt.is_floating_point() or not prompt.numel():
        raise ConfigError(f"prompt must be integers (batch, tokens), at least 1 x 1: {tuple(prompt.shape)}")
    rows, width = prompt.shape
    if prompt_lengths is None:
        prompt_lengths = torch.full((rows,), width)
    lengths_B = prompt_lengths.to(device=prompt.device, dtype=torch.long)
    if lengths_B.shape != (rows,) or not bool(((lengths_B >= 1) & (lengths_B <= width)).all()):
        raise ConfigError(f"prompt_lengths must be {rows} numbers from 1 to {width}: {lengths_B.tolist()}")
    longest = int(lengths_B.max())
    if longest > model.config.max_seq_len:
        raise ConfigError(f"prompt has {longest} tokens; max_seq_len is {model.config.max_seq_len}")
    check_ids("prompt", prompt, model.config.num_tokens)
    return lengths_B


def _check_options(
    model: LanguageModel, retrieve: Retrieve | None, max_new_tokens: int | None, temperature: float
) -> None:
    if model.training:
        raise ConfigError("the model is in training mode: call model.eval() before writing")
    if retrieve is not None and not model.config.retrieval:
        raise ConfigError("retrieve was given for a model with retrieval=False")
    if max_new_tokens is not None and max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens must be at least 0: {max_new_tokens}")
    if not temperature >= 0:
        raise ConfigError(f"temperature must be at least 0: {temperature}")
