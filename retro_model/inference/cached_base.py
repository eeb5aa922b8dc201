"""A base with its adapters as a decoder with caches: what CachedDecoder is for RETRO.

Each row of a batch has a cache of its own, so rows may have any lengths; they are read one after the other.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from retro_model.retrofit.cache import RetrievalCache
from retro_model.retrofit.model import Retrofit


class CachedBase:
    """Reads a few tokens of each row at a time. The model's weights must not change while this is in use."""

    def __init__(self, model: Retrofit, rows: int) -> None:
        self.model = model
        self.lengths = [0] * rows  # number of tokens each row has read
        self._caches = [RetrievalCache(model, self._neighbors) for _ in range(rows)]
        self._found: Tensor | None = None  # (K, R), of the chunk that the row being read completes

    def room(self, place: int) -> int:
        """The number of tokens from position `place` on that attend to the neighbors of the same chunk."""
        return self.model.config.chunk_size - (place + 1) % self.model.config.chunk_size

    @torch.no_grad()
    def read(self, tokens_BS: Tensor, counts: Sequence[int], found: Mapping[int, Tensor] | None = None) -> Tensor:
        """Read each row's next tokens; return their logits (B, S, V). The arguments are those of CachedDecoder."""
        logits_BSV: Tensor | None = None
        for row, (cache, count) in enumerate(zip(self._caches, counts, strict=True)):
            if not count:
                continue
            self._found = (found or {}).get(row)
            self.lengths[row] += count
            with cache.reading():
                logits_1SV = self.model.base(
                    input_ids=self.model.existing(tokens_BS[row : row + 1, :count]),
                    attention_mask=tokens_BS.new_ones(1, self.lengths[row]),
                    past_key_values=cache,
                    use_cache=True,
                ).logits
            if logits_BSV is None:
                logits_BSV = logits_1SV.new_zeros(*tokens_BS.shape, logits_1SV.shape[-1])
            logits_BSV[row, :count] = logits_1SV[0]
        assert logits_BSV is not None, "no row has a token to read"
        return logits_BSV

    def logits(self, states_BV: Tensor) -> Tensor:
        """The logits (B, V) of the next token, from what `read` returned: they are these already."""
        return states_BV

    def _neighbors(self, chunks_CM: Tensor) -> Tensor:
        """The neighbors of the finished chunk: (1, K, R); padding if it has none."""
        assert len(chunks_CM) == 1, "a piece completes one chunk at most"
        if self._found is None:
            return torch.full_like(chunks_CM, self.model.config.pad_id)[:, None]
        return self._found[None]
