"""Text generation with cached keys and values: each new token costs one token's work, each chunk one retrieval.

The cache holds the keys and values of every decoder layer and, for each layer with chunked cross-attention, those
of the encoded neighbors of the last finished chunk. Everything works on token ids; the caller passes the search as
a function.

A row ends with the end token, or at max_seq_len tokens, the length the model was trained for. To continue, prompt
again with the last part of the text.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retro_model.core.errors import ConfigError
from retro_model.network.attention import rotary_table
from retro_model.network.kernels import rotate
from retro_model.network.model import RETRO, Block, check_ids, cross_mask, cross_positions

Retrieve = Callable[[Tensor], Tensor]  # finished chunks (B', M) -> neighbors (B', K, R), pad where one is missing
Filter = Callable[[Tensor, float], Tensor]

# ---- choosing a token ------------------------------------------------------------------------------


def top_k(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Keep the largest logits, a share 1 - thres of the vocabulary and at least one; set the others to -inf."""
    _check_share("top_k", thres)
    kept = max(1, round((1 - thres) * logits.shape[-1]))
    values, indices = logits.topk(kept, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, values)


def top_p(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2020): keep the smallest set of most likely tokens with total probability
    thres or more; set the others to -inf."""
    _check_share("top_p", thres)
    values, indices = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # total of all likelier tokens
    values = values.masked_fill((before >= thres) & (before > 0), -torch.inf)
    return torch.empty_like(logits).scatter(-1, indices, values)


def _check_share(name: str, thres: float) -> None:
    if not 0 <= thres <= 1:
        raise ConfigError(f"filter_thres of {name} must be from 0 to 1: {thres}")


def sample(
    logits: Tensor,
    *,
    filter_fn: Filter,
    filter_thres: float,
    temperature: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Sample one token per row of logits (B, V): (B,). Temperature 0 takes the most likely token after filtering."""
    if temperature == 0:
        return filter_fn(logits.float(), filter_thres).argmax(-1)
    filtered = filter_fn(logits.float() / temperature, filter_thres)
    return torch.multinomial(filtered.softmax(-1), 1, generator=generator).squeeze(-1)


# ---- the cached decoder ----------------------------------------------------------------------------


SINGLE_THREAD_BELOW = 2**17  # multiplications; one thread finishes fewer before a second one would wake up


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Set torch's number of threads in the block, for calls from this thread; restore it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ThreadedLinear(nn.Module):
    """A linear layer split across threads, for single-token inputs.

    The product with a single token is bound by reading the matrix, and BLAS uses one thread for it. A batched
    product over parts of the output rows uses all threads. A matrix with more outputs than inputs is copied in
    transposed order, because reading along its short rows is half as fast.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        outputs, inputs = weight_OI.shape
        parts = next(number for number in range(torch.get_num_threads(), 0, -1) if outputs % number == 0)
        part_PIO = weight_OI.detach().view(parts, -1, inputs).transpose(1, 2)  # O: outputs per part
        self.part_PIO = nn.Parameter(part_PIO.contiguous() if outputs > inputs else part_PIO)

    def forward(self, x_SI: Tensor) -> Tensor:
        """`F.linear(x, weight)`."""
        parts, inputs, _ = self.part_PIO.shape
        out_PSO = torch.bmm(x_SI.reshape(1, -1, inputs).expand(parts, -1, -1), self.part_PIO)
        return out_PSO.transpose(0, 1).reshape(*x_SI.shape[:-1], -1)


def with_threaded_linears(module: nn.Module) -> nn.Module:
    """A copy of the module whose linear layers are ThreadedLinear on a CPU; all other weights are shared."""
    memo: dict[int, Any] = {id(x): x for x in (*module.parameters(), *module.buffers())}
    for part in module.modules():
        if type(part) is nn.Linear and part.bias is None and part.weight.device.type == "cpu":
            memo[id(part)] = ThreadedLinear(part.weight)
    return copy.deepcopy(module, memo)


@dataclass
class _Layer:
    """The cache of one decoder layer: tokens (B, H, max_length + M, F), neighbors (B, H, J, F).

    Keys are rotated. Each head's tokens are contiguous, because every new token reads all of them. With
    `copy_tokens`, `attending` (B, lead + max_length + M, D) holds the states that attended to neighbors, after
    `lead` zeros; otherwise it is empty.
    """

    key: Tensor
    value: Tensor
    neighbor_key: Tensor
    neighbor_value: Tensor
    attending: Tensor


class _Positions:
    """The positions of a piece's tokens, as indices into tables and caches with one entry per position.

    A piece is the next few tokens of each row. If all rows have the same length, by far the most common case, the
    index is a slice; otherwise it is a tensor with one row of indices per row.
    """

    def __init__(self, lengths: Sequence[int], width: int, chunk_size: int, device: torch.device) -> None:
        self.start, self.end = min(lengths), max(lengths) + width
        self.aligned = self.end - self.start == width
        self.in_text: slice | Tensor  # counted from the start of the text
        self.in_chunk: slice | Tensor  # counted from 0 at the last token of the previous chunk
        if self.aligned:
            first = (self.start + 1) % chunk_size
            self.in_text, self.in_chunk = slice(self.start, self.end), slice(first, first + width)
        else:
            self.in_text = torch.tensor(lengths, device=device)[:, None] + torch.arange(width, device=device)
            self.in_chunk = (self.in_text + 1) % chunk_size
            self.row_B1 = torch.arange(len(lengths), device=device)[:, None]

    def with_lead(self, kept_BND: Tensor, x_BSD: Tensor, lead: int) -> Tensor:
        """Cache the states of a piece; return them after those of the previous `lead` tokens: (B, lead + S, D)."""
        if isinstance(self.in_text, slice):
            kept_BND[:, self.start + lead : self.end + lead] = x_BSD
            return kept_BND[:, self.start : self.end + lead]
        kept_BND[self.row_B1, self.in_text + lead] = x_BSD.to(kept_BND.dtype)
        before = self.in_text[:, :1] + torch.arange(lead + x_BSD.shape[1], device=x_BSD.device)
        return kept_BND[self.row_B1, before]


class _CachedSelfAttention:
    """Causal self-attention of a piece to its row's cached tokens and to itself; adds the piece to the cache."""

    def __init__(self, positions: _Positions, rows: int, device: torch.device) -> None:
        self.positions = positions
        self.row_B1 = None if positions.aligned else torch.arange(rows, device=device)[:, None]
        self.mask_BHSJ = None
        if positions.end - positions.start > 1:
            key_J = torch.arange(positions.end, device=device)
            here = key_J[positions.in_text] if isinstance(positions.in_text, slice) else positions.in_text
            self.mask_BHSJ = (key_J <= here[..., None]).unsqueeze(-3)  # (1, S, J) or (B, 1, S, J)

    def __call__(self, qkv_BSHF: Tensor, table_SF: Tensor, _: float, *, layer: _Layer) -> Tensor:
        heads = layer.key.shape[1]
        qk_BSHF, v_BSHF = torch.split(qkv_BSHF, [2 * heads, heads], dim=-2)
        q_BSHF, k_BSHF = rotate(qk_BSHF, table_SF).chunk(2, dim=-2)
        for cache_BHNF, new_BSHF in ((layer.key, k_BSHF), (layer.value, v_BSHF)):
            if self.row_B1 is None:
                cache_BHNF[:, :, self.positions.in_text] = new_BSHF.transpose(1, 2)
            else:
                cache_BHNF[self.row_B1, :, self.positions.in_text] = new_BSHF.to(cache_BHNF.dtype)
        k_BHJF, v_BHJF = (x[:, :, : self.positions.end] for x in (layer.key, layer.value))
        return F.scaled_dot_product_attention(q_BSHF.transpose(1, 2), k_BHJF, v_BHJF, self.mask_BHSJ).transpose(1, 2)


class _Neighbors:
    """Which rows currently have neighbors, and which neighbor tokens are padding."""

    def __init__(self, mask_BJ: Tensor) -> None:
        has_B = mask_BJ.any(-1)
        self.mask_BJ = mask_BJ  # False at padding; all False for a row without neighbors
        self.any, self.all = bool(has_B.any()), bool(has_B.all())
        self.has_B11 = has_B[:, None, None]
        self.mask_BHSJ = None if bool(mask_BJ.all()) else (mask_BJ[:, None] | ~self.has_B11)[:, None]

    def attend(
        self, cross_attention: Any, layer: _Layer, x_BSD: Tensor, table_SF: Tensor, positions: _Positions
    ) -> Tensor:
        """Cross-attention of a piece to its row's neighbors: (B, S, D). Rows without neighbors stay unchanged."""
        lead = cross_attention.inner.lead
        with_lead_BSD = positions.with_lead(layer.attending, x_BSD, lead) if lead else x_BSD
        if not self.any:
            return x_BSD
        changed: Tensor = cross_attention(with_lead_BSD, table_SF, partial(self._cross_attend, layer=layer))[:, lead:]
        return changed if self.all else torch.where(self.has_B11, changed, x_BSD)

    def _cross_attend(self, query_BSHF: Tensor, table_SF: Tensor, _: float, *, layer: _Layer) -> Tensor:
        q_BHSF = rotate(query_BSHF, table_SF).transpose(1, 2)
        k_BHJF, v_BHJF = layer.neighbor_key, layer.neighbor_value
        return F.scaled_dot_product_attention(q_BHSF, k_BHJF, v_BHJF, self.mask_BHSJ).transpose(1, 2)


class CachedDecoder:
    """A RETRO decoder with caches, which reads a few tokens at a time.

    All rows read pieces of the same width, each at its own position. All tokens of a piece must attend to the
    neighbors of the same chunk; `room` gives the maximum width. The model's weights must not change while this
    decoder is in use.
    """

    def __init__(self, model: RETRO, rows: int, max_length: int) -> None:
        config, weight = model.config, model.embedding.weight
        device, dtype = weight.device, weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        heads, features = config.heads, config.dim_head
        tokens = rows, heads, max_length + config.chunk_size, features  # M more: room for padding in pieces
        none = rows, heads, 0, features
        self.model = model
        self.blocks = [cast("Block", with_threaded_linears(cast("nn.Module", block))) for block in model.decoder]
        output_VD = model.output_weight_VD
        self.to_logits = ThreadedLinear(output_VD) if device.type == "cpu" else partial(F.linear, weight=output_VD)
        self.largest_matrix = max(x.numel() for block in model.decoder for x in cast("nn.Module", block).parameters())
        self.threads = 1  # torch's number of threads when `read` was called
        self.lengths = [0] * rows  # number of tokens each row has read
        self.neighbors = _Neighbors(torch.zeros(rows, 0, dtype=torch.bool, device=device))
        self.hidden_BMD = weight.new_zeros(rows, config.chunk_size, config.dec_dim)  # of the current chunk
        self.table_NF = rotary_table(torch.arange(tokens[2], device=device), features, weight.dtype)
        self.query_table_MF, _ = cross_positions(config, 1, 1, weight)
        self.layers = []
        for block in self.blocks:
            lead = 0 if block.cross_attention is None else block.cross_attention.inner.lead
            attending = weight.new_zeros(rows, lead + tokens[2] if lead else 0, config.dec_dim)
            key, value, neighbor_key, neighbor_value = (
                torch.zeros(size, dtype=dtype, device=device) for size in (tokens, tokens, none, none)
            )
            self.layers.append(_Layer(key, value, neighbor_key, neighbor_value, attending))

    def room(self, place: int) -> int:
        """The number of tokens from position `place` on that attend to the neighbors of the same chunk."""
        return self.model.config.chunk_size - (place + 1) % self.model.config.chunk_size

    @torch.no_grad()
    def read(self, tokens_BS: Tensor, counts: Sequence[int], found: dict[int, Tensor] | None = None) -> Tensor:
        """Read each row's next tokens; return their final normalized states (B, S, D).

        Only the first `counts[b]` of the S tokens of row b are real; the others have no lasting effect. `found` maps
        a row to the neighbors (K, R) of the chunk that the first token of its piece completes. A row that completes
        a chunk and is not in `found` has no neighbors.
        """
        self.threads = torch.get_num_threads()
        with torch_threads(1 if tokens_BS.numel() * self.largest_matrix < SINGLE_THREAD_BELOW else self.threads):
            hidden_BSD = self._read(tokens_BS, counts, found or {})
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        return hidden_BSD

    def _read(self, tokens_BS: Tensor, counts: Sequence[int], found: dict[int, Tensor]) -> Tensor:
        model, (rows, width) = self.model, tokens_BS.shape
        positions = _Positions(self.lengths, width, model.config.chunk_size, tokens_BS.device)
        table_SF, query_table_SF = self.table_NF[positions.in_text], self.query_table_MF[positions.in_chunk]
        attend = _CachedSelfAttention(positions, rows, tokens_BS.device)
        encoded = False

        x_BSD = model.norm_in(model.embedding(tokens_BS))
        for block, layer in zip(self.blocks, self.layers, strict=True):
            x_BSD = block.attention(x_BSD, table_SF, partial(attend, layer=layer))
            if block.cross_attention is not None:
                if not encoded:  # algorithm 1: the encoder runs at the first such layer
                    self._update_neighbors(x_BSD, counts, found)
                    encoded = True
                x_BSD = self.neighbors.attend(block.cross_attention, layer, x_BSD, query_table_SF, positions)
            x_BSD = block.feed_forward(x_BSD)
        normed: Tensor = model.norm(x_BSD)
        return normed

    @torch.no_grad()
    def logits(self, hidden_BD: Tensor) -> Tensor:
        """The logits (B, V) of the next token, from states (B, D) that `read` returned."""
        logits_BV: Tensor = self.to_logits(hidden_BD)
        return logits_BV

    def _update_neighbors(self, x_BSD: Tensor, counts: Sequence[int], found: dict[int, Tensor]) -> None:
        """Collect the hidden states for the encoder; for rows that complete a chunk, encode its neighbors."""
        chunk_size = self.model.config.chunk_size
        finished = []
        for row, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            offset = length % chunk_size
            if offset + 1 < chunk_size:
                self.hidden_BMD[row, offset : offset + count] = x_BSD[row, :count]
            elif count:
                self.hidden_BMD[row, -1] = x_BSD[row, 0]
                finished.append(row)
        if finished:
            with torch_threads(self.threads):
                self.neighbors = self._encode(finished, found)
        for row in finished:
            self.hidden_BMD[row, : counts[row] - 1] = x_BSD[row, 1 : counts[row]]

    def _encode(self, finished: list[int], found: dict[int, Tensor]) -> _Neighbors:
        """Encode the neighbors of finished chunks and cache their keys and values in every cross-attending layer."""
        model, config = self.model, self.model.config
        mask_BJ = self.neighbors.mask_BJ.clone()
        mask_BJ[finished] = False  # drop the neighbors of the previous chunk
        found = {row: neighbors for row, neighbors in found.items() if (neighbors != config.pad_id).any()}
        if not found:
            return _Neighbors(mask_BJ)
        assert model.encoder is not None
        rows = list(found)
        retrieved_AKR = torch.stack(list(found.values()))
        mask_AKR = retrieved_AKR != config.pad_id
        encoded_AJE = model.encoder(model.embedding(retrieved_AKR), mask_AKR, self.hidden_BMD[rows])
        _, number, length = retrieved_AKR.shape
        _, table_JF = cross_positions(config, number, length, model.embedding.weight)
        rows_AJD = model.output_rows(retrieved_AKR)
        for block, layer in zip(model.decoder, self.layers, strict=True):
            if block.cross_attention is not None:
                attention = block.cross_attention.inner
                key_AJHF, value_AJHF = attention.neighbor_context(encoded_AJE, mask_AKR, rows_AJD).chunk(2, dim=-2)
                key_AJHF = rotate(key_AJHF, table_JF)
                layer.neighbor_key = _replace_rows(layer.neighbor_key, rows, key_AJHF.transpose(1, 2))
                layer.neighbor_value = _replace_rows(layer.neighbor_value, rows, value_AJHF.transpose(1, 2))
        mask_BHJF = _replace_rows(mask_BJ[:, None, :, None], rows, cross_mask(config, mask_AKR)[:, None, :, None])
        return _Neighbors(mask_BHJF[:, 0, :, 0])


def _replace_rows(all_BHJF: Tensor, rows: list[int], some_AHJF: Tensor) -> Tensor:
    """`all_BHJF` with the given rows replaced; zeros pad the shorter of the two along J."""
    missing = some_AHJF.shape[2] - all_BHJF.shape[2]
    out_BHJF = F.pad(all_BHJF, (0, 0, 0, max(0, missing)))
    out_BHJF[rows] = F.pad(some_AHJF, (0, 0, 0, max(0, -missing))).to(out_BHJF.dtype)
    return out_BHJF


# ---- writing ---------------------------------------------------------------------------------------


class Writer:
    """An iterator over generated tokens: each item is the next token of every row (B,), pad for rows that have ended.

    `text_BN`, `length_B` and `neighbors` hold the current text, its lengths and the neighbors retrieved so far. The
    arguments are those of `generate`; the model must be in eval mode.
    """

    def __init__(
        self,
        model: RETRO,
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
        self.decoder = CachedDecoder(model, rows, longest)
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
        last_BD = torch.zeros_like(self.decoder.hidden_BMD[:, 0])
        start, longest = 0, int(self.length_B.max())
        while start < longest:
            width = min(self.decoder.room(start), longest - start)
            counts_B = (self.length_B - start).clamp(0, width)
            piece_BS = self.text_BN[:, start : start + width]
            hidden_BSD = self.decoder.read(piece_BS, counts_B.tolist(), self._neighbors_of_next(counts_B > 0))
            ends_B = (counts_B > 0) & (self.length_B <= start + width)
            last_BD[ends_B] = hidden_BSD[ends_B, counts_B[ends_B] - 1].to(last_BD.dtype)
            start += width
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
    model: RETRO, prompt: Tensor, *, return_neighbors: bool = False, **options: Any
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


def _check_prompt(model: RETRO, prompt: Tensor, prompt_lengths: Tensor | None) -> Tensor:
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


def _check_options(model: RETRO, retrieve: Retrieve | None, max_new_tokens: int | None, temperature: float) -> None:
    if model.training:
        raise ConfigError("the model is in training mode: call model.eval() before writing")
    if retrieve is not None and not model.config.retrieval:
        raise ConfigError("retrieve was given for a model with retrieval=False")
    if max_new_tokens is not None and max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens must be at least 0: {max_new_tokens}")
    if not temperature >= 0:
        raise ConfigError(f"temperature must be at least 0: {temperature}")
