"""Cached generation: a cache for the base's own `generate` that also holds what was retrieved.

    cache = RetrievalCache(model, retrieve)
    model.generate(prompt, past_key_values=cache, max_new_tokens=100)      # and again, to continue the text

A call of the base brings the next S tokens of each row. They are read in pieces: no token of a piece but the first
completes a chunk, so within a piece each row attends to the neighbors of one chunk. Tokens are counted from the first
real one of their row, so padding on the left moves no chunk boundary.

Shape suffixes are those of network/model.py. `S`: tokens of a call, or of a piece. `2D`: hidden states and embeddings.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from retro_model.core.errors import ConfigError
from retro_model.network.kernels import rotate
from retro_model.network.model import cross_mask, cross_positions
from retro_model.retrofit.adapters import GatedCrossAttention, normalized

if TYPE_CHECKING:
    from retro_model.retrofit.model import Retrieve, Retrofit


class RetrievalCache(DynamicCache):
    """The base's keys and values, and the neighbors of each row's last finished chunk; for `Retrofit.generate`.

    `retrieve` is called at each chunk boundary; None: never. It cannot be cropped, as assisted decoding would: what
    was retrieved cannot be taken back.
    """

    def __init__(self, model: "Retrofit", retrieve: "Retrieve | None") -> None:
        super().__init__(config=model.base.config)
        self.reader = CachedReader(model, retrieve)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """In the block, calls of the base with this cache attend to neighbors."""
        base = self.reader.model.base
        before = base.register_forward_pre_hook(self._begin, with_kwargs=True)
        after = base.register_forward_hook(self._end, always_call=True)
        try:
            with self.reader.model.attached(self.reader):
                yield
        finally:
            before.remove()
            after.remove()

    def _begin(self, base: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
        if options.get("past_key_values") is self:
            self.reader.begin(options["input_ids"], options.get("attention_mask"))

    def _end(self, base: nn.Module, arguments: Any, output: Any) -> None:
        self.reader.call = None

    def update(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """As DynamicCache. Raises ConfigError outside of `Retrofit.generate`, where nothing would be retrieved."""
        if self.reader.call is None:
            raise ConfigError("a RetrievalCache works in Retrofit.generate alone: call that instead of the base's")
        return super().update(*arguments, **options)

    def reset(self) -> None:
        """Forget everything."""
        super().__init__(config=self.reader.model.base.config)
        self.reader = CachedReader(self.reader.model, self.reader.retrieve)

    def crop(self, *arguments: Any) -> None:
        """Not supported: raises ConfigError."""
        raise ConfigError("a RetrievalCache cannot be cropped (assisted decoding): what was retrieved stays")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order (beam search)."""
        super().reorder_cache(cast("torch.LongTensor", beam_idx))
        self.reader.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        self.reader.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        rows = torch.arange(len(self.reader.length_B), device=self.reader.length_B.device)
        self.reader.select(rows.repeat_interleave(repeats))


class Encoded(NamedTuple):
    """The encoded neighbors of some rows."""

    rows: list[int]
    encoded_AJE: Tensor
    rows_AJD: Tensor | None
    mask_AKR: Tensor


@dataclass
class Piece:
    """Some columns of a call; the rows `finished` complete a chunk with the first one."""

    start: int
    end: int
    finished: list[int]
    encoded: Encoded | None = None  # made by the first layer with cross-attention


@dataclass
class Call:
    """One call of the base."""

    positions_BS: Tensor  # of each token in its row, from 0
    real_BS: Tensor  # False at padding
    embedded_BSD: Tensor
    neighbors: dict[tuple[int, int], Tensor]  # (K, R) by row and the column that completes the chunk
    pieces: list[Piece]


@dataclass
class LayerCache:
    """What one cross-attention keeps of each row: its last inputs, and the keys and values that it attends to."""

    lead_BL2D: Tensor
    key_BHJF: Tensor
    value_BHJF: Tensor
    mask_BJ: Tensor  # all False for a row that attends to none

    def select(self, rows: Tensor) -> None:
        """Keep these rows."""
        for name, tensor in vars(self).items():
            setattr(self, name, tensor[rows.to(tensor.device)])


@dataclass
class CachedReader:
    """Changes the outputs of the base's layers in cached generation; see RetrievalCache."""

    model: "Retrofit"
    retrieve: "Retrieve | None"
    length_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # real tokens read so far
    tokens_BM: Tensor | None = None  # position p of the current chunk is at p % M, here and in hidden_BMD
    hidden_BMD: Tensor | None = None  # before the first cross-attention
    layers: dict[int, LayerCache] = field(default_factory=dict)
    call: Call | None = None

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        if self.tokens_BM is None or self.hidden_BMD is None:
            return
        for name in ("length_B", "tokens_BM", "hidden_BMD"):
            tensor = getattr(self, name)
            setattr(self, name, tensor[rows.to(tensor.device)])
        for layer in self.layers.values():
            layer.select(rows)

    # -- the start of a call

    def begin(self, ids_BS: Tensor, mask: Tensor | None) -> None:
        """Count the new tokens and retrieve for the chunks that they complete, in one search."""
        config, (rows, width) = self.model.config, ids_BS.shape
        if self.tokens_BM is None or self.hidden_BMD is None:
            self.length_B = torch.zeros(rows, dtype=torch.long, device=ids_BS.device)
            self.tokens_BM = ids_BS.new_zeros(rows, config.chunk_size)
            self.hidden_BMD = self.model.embed(self.tokens_BM)  # for its shape and type
        assert mask is None or mask.dim() == 2, mask.shape
        real_BS = torch.ones_like(ids_BS, dtype=torch.bool) if mask is None else mask[:, -width:].bool()
        if bool((real_BS[:, :-1] & ~real_BS[:, 1:]).any()):
            raise ConfigError("attention_mask has padding after text; pad prompts on the left")
        positions_BS = self.length_B[:, None] + real_BS.cumsum(1) - 1
        finishes_BS = real_BS & ((positions_BS + 1) % config.chunk_size == 0)
        neighbors = self._search(ids_BS, real_BS, finishes_BS)
        starts = sorted({0, *finishes_BS.any(0).nonzero().flatten().tolist()})
        pieces = [
            Piece(start, end, finishes_BS[:, start].nonzero().flatten().tolist())
            for start, end in zip(starts, [*starts[1:], width], strict=True)
        ]
        self.length_B = self.length_B + real_BS.sum(1)
        self.call = Call(positions_BS, real_BS, normalized(self.model.embed(ids_BS)), neighbors, pieces)

    def _search(self, ids_BS: Tensor, real_BS: Tensor, finishes_BS: Tensor) -> dict[tuple[int, int], Tensor]:
        """Retrieve the neighbors of all finished chunks, and keep the tokens of unfinished ones.

        Raises ConfigError if `retrieve` returns another shape than (chunks, neighbors, tokens).
        """
        assert self.tokens_BM is not None
        m, chunks = self.model.config.chunk_size, []
        for row in range(len(ids_BS)):
            text = torch.cat([self.tokens_BM[row, : int(self.length_B[row]) % m], ids_BS[row, real_BS[row]]])
            whole = len(text) // m * m
            chunks.append(text[:whole].view(-1, m))
            self.tokens_BM[row, : len(text) - whole] = text[whole:]
        places = finishes_BS.nonzero().tolist()  # row by row, as the chunks are
        if self.retrieve is None or not places:
            return {}
        retrieved_CKR = self.retrieve(torch.cat(chunks)).to(ids_BS)
        if retrieved_CKR.dim() != 3 or len(retrieved_CKR) != len(places) or retrieved_CKR.shape[-1] < m:
            raise ConfigError(
                f"retrieve must return ({len(places)}, neighbors, tokens) for {len(places)} chunks, neighbors of at "
                f"least chunk_size = {m} tokens: {tuple(retrieved_CKR.shape)}"
            )
        return {(row, column): found for (row, column), found in zip(places, retrieved_CKR, strict=True)}

    # -- the layers

    def __call__(self, number: int, hidden_BSD: Tensor) -> Tensor | None:
        """The output of layer `number` after its cross-attention; None for a call with another cache."""
        if self.call is None:
            return None
        x_BS2D = torch.cat([hidden_BSD.to(self.call.embedded_BSD.dtype), self.call.embedded_BSD], dim=-1)
        cross = self.model.adapters.of_layer(number)
        if number not in self.layers:
            self.layers[number] = self._new_layer(cross, x_BS2D)
        is_first = number == min(self.model.config.dec_cross_attn_layers)
        changed = []
        for piece in self.call.pieces:
            if is_first:
                piece.encoded = self._encode(piece, hidden_BSD)
            self._replace_neighbors(cross, self.layers[number], piece)
            changed.append(self._attend(cross, self.layers[number], piece, x_BS2D))
        return torch.cat(changed, dim=1).to(hidden_BSD.dtype)

    def _new_layer(self, cross: GatedCrossAttention, x_BS2D: Tensor) -> LayerCache:
        rows, config = len(x_BS2D), self.model.config
        none_BHJF = x_BS2D.new_zeros(rows, config.heads, 0, config.dim_head)
        lead_BL2D = x_BS2D.new_zeros(rows, cross.inner.lead, x_BS2D.shape[-1])
        mask_BJ = torch.zeros(rows, 0, dtype=torch.bool, device=x_BS2D.device)
        return LayerCache(lead_BL2D, none_BHJF, none_BHJF, mask_BJ)

    def _encode(self, piece: Piece, hidden_BSD: Tensor) -> Encoded | None:
        """Keep the hidden states of each row's chunk; encode the neighbors of the chunks that the piece completes."""
        assert self.call is not None
        model, pad_id = self.model, self.model.config.pad_id
        self._keep(hidden_BSD, piece.start, piece.start + 1)
        found = {row: self.call.neighbors.get((row, piece.start)) for row in piece.finished}
        present = {row: x for row, x in found.items() if x is not None and bool((x != pad_id).any())}
        encoded = None
        if present:
            rows, retrieved_AKR = list(present), torch.stack(list(present.values()))
            mask_AKR = retrieved_AKR != pad_id
            assert self.hidden_BMD is not None and model.adapters.encoder is not None
            encoded_AJE = model.adapters.encoder(model.embed(retrieved_AKR), mask_AKR, self.hidden_BMD[rows])
            encoded = Encoded(rows, encoded_AJE, model.output_rows(retrieved_AKR), mask_AKR)
        self._keep(hidden_BSD, piece.start + 1, piece.end)
        return encoded

    def _keep(self, hidden_BSD: Tensor, start: int, end: int) -> None:
        assert self.call is not None and self.hidden_BMD is not None
        rows, columns = self.call.real_BS[:, start:end].nonzero(as_tuple=True)
        columns = columns + start
        places = self.call.positions_BS[rows, columns] % self.model.config.chunk_size
        self.hidden_BMD[rows, places] = hidden_BSD[rows, columns].to(self.hidden_BMD.dtype)

    def _replace_neighbors(self, cross: GatedCrossAttention, layer: LayerCache, piece: Piece) -> None:
        """Replace the keys and values of the rows that complete a chunk."""
        config = self.model.config
        mask_BJ = layer.mask_BJ.clone()
        mask_BJ[piece.finished] = False
        layer.mask_BJ = mask_BJ
        if piece.encoded is None:
            return
        rows, encoded_AJE, rows_AJD, mask_AKR = piece.encoded
        key_AJHF, value_AJHF = cross.inner.neighbor_context(encoded_AJE, mask_AKR, rows_AJD).chunk(2, dim=-2)
        _, num_neighbors, length = mask_AKR.shape
        _, table_JF = cross_positions(config, num_neighbors, length, key_AJHF)
        layer.key_BHJF = _replace(layer.key_BHJF, rows, rotate(key_AJHF, table_JF).transpose(1, 2))
        layer.value_BHJF = _replace(layer.value_BHJF, rows, value_AJHF.transpose(1, 2))
        layer.mask_BJ = _replace(layer.mask_BJ[..., None], rows, cross_mask(config, mask_AKR)[..., None])[..., 0]

    def _attend(self, cross: GatedCrossAttention, layer: LayerCache, piece: Piece, x_BS2D: Tensor) -> Tensor:
        """The hidden states (B, S, D) of a piece; those of rows without neighbors stay as they are."""
        assert self.call is not None
        config, lead, some = self.model.config, layer.lead_BL2D.shape[1], slice(piece.start, piece.end)
        with_lead = torch.cat([layer.lead_BL2D, x_BS2D[:, some]], dim=1)
        layer.lead_BL2D = with_lead[:, with_lead.shape[1] - lead :]
        hidden_BSD = x_BS2D[:, some].chunk(2, dim=-1)[0]
        has_B = layer.mask_BJ.any(1)
        if not bool(has_B.any()):
            return hidden_BSD
        query_table_MF, _ = cross_positions(config, 1, 1, x_BS2D)
        table_BSF = query_table_MF[(self.call.positions_BS[:, some] + 1) % config.chunk_size]
        attend = partial(_attend_cached, layer=layer, mask_BHSJ=(layer.mask_BJ | ~has_B[:, None])[:, None, None])
        changed_BSD = cross(with_lead, table_BSF, attend)[:, lead:].chunk(2, dim=-1)[0]
        return torch.where((has_B[:, None] & self.call.real_BS[:, some])[..., None], changed_BSD, hidden_BSD)


def _attend_cached(
    query_BSHF: Tensor, table_BSF: Tensor, dropout: float, *, layer: LayerCache, mask_BHSJ: Tensor
) -> Tensor:
    """Attention to cached keys, which are rotated, and values: (B, S, H, F)."""
    query_BHSF = rotate(query_BSHF, table_BSF).transpose(1, 2)
    value_BHSF = F.scaled_dot_product_attention(query_BHSF, layer.key_BHJF, layer.value_BHJF, mask_BHSJ)
    return value_BHSF.transpose(1, 2)


def _replace(all_: Tensor, rows: list[int], some: Tensor) -> Tensor:
    """`all_` with the given rows replaced; zeros pad the shorter of the two along the axis before the last."""
    missing = some.shape[-2] - all_.shape[-2]
    out = F.pad(all_, (0, 0, 0, max(0, missing)))
    out[rows] = F.pad(some, (0, 0, 0, max(0, -missing))).to(out.dtype)
    return out
