"""The decoder with cached keys and values: each new token costs one token's work.

The cache holds the keys and values of every decoder layer and, for each layer with chunked cross-attention, those
of the encoded neighbors of the last finished chunk.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retro_model.network.attention import rotary_table
from retro_model.network.kernels import rotate
from retro_model.network.model import RETRO, Block, cross_mask, cross_positions

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
