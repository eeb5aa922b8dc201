"""Training sequences from raw memory maps, for scripts that do not use artifacts.

    chunks       int32 (num_chunks, M + 1): M tokens and the first one of the document's next chunk
    neighbors    int32 (num_chunks, K): rows of `chunks`, nearest first, -1 for none
    starts       int32 (num_sequences,): the row at which each sequence starts

`retro_model.retrieval` writes these files. They have no header, so only their size can be checked. A row is the last
chunk of its document if its last column is padding or if it contains the end token. Text never encodes to the end
token (see retro_model.corpus.tokenizer), so text cannot end a document early.

Letters as in retro_model.training.sequences: L chunks of M tokens in a sequence, N = L * M, K neighbors.
"""

import operator
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from retro_model.core.arrays import BoolArray, IntArray
from retro_model.core.artifacts import open_raw
from retro_model.core.errors import ConfigError, MismatchError
from retro_model.core.rows import NO_ROW


def ends_document(rows: IntArray, eos_id: int, pad_id: int) -> BoolArray:
    """A mask (n,) of the chunk rows (n, M + 1) that are the last of their document."""
    ends: BoolArray = (rows == eos_id).any(axis=-1) | (rows[..., -1] == pad_id)
    return ends


def neighbor_tokens(
    chunks: IntArray, ids: IntArray, *, eos_id: int, pad_id: int, add_continuations: bool = True
) -> npt.NDArray[np.int64]:
    """The tokens of the neighbors `ids` (..., K), rows of `chunks`, as the network reads them: (..., K, 2 * M).

    Each is the M tokens of its row, then the M tokens of the next row, or padding if its document ends there; all
    padding where the id is -1. Without continuations the shape is (..., K, M).

    Raises MismatchError for an id that is neither a row nor -1.
    """
    num_tokens = chunks.shape[1] - 1
    flat = np.asarray(ids, dtype=np.int64).reshape(-1)
    if flat.size and not NO_ROW <= flat.min() <= flat.max() < len(chunks):
        raise MismatchError(
            f"neighbors: found chunk ids {flat.min()} to {flat.max()}, expected -1 to {len(chunks) - 1}; "
            "find the neighbors of these chunks again"
        )
    (found,) = np.nonzero(flat != NO_ROW)
    rows = np.asarray(chunks[flat[found]])
    tokens = np.full((len(flat), num_tokens * (1 + add_continuations)), pad_id, dtype=np.int64)
    tokens[found, :num_tokens] = rows[:, :-1]
    if add_continuations:
        following = flat[found] + 1
        continued = ~ends_document(rows, eos_id, pad_id) & (following < len(chunks))
        tokens[found[continued], num_tokens:] = chunks[following[continued]][:, :-1]
    return _blank_after_end(tokens, eos_id, pad_id).reshape(*np.shape(ids), -1)


def _blank_after_end(tokens: npt.NDArray[np.int64], eos_id: int, pad_id: int) -> npt.NDArray[np.int64]:
    """Replaces what follows the first end token of each row of `tokens` (n, T) by padding."""
    ends = tokens == eos_id
    behind = (np.cumsum(ends, axis=-1) - ends) > 0
    return np.where(behind, pad_id, tokens)


class _Maps(NamedTuple):
    chunks: IntArray
    neighbors: IntArray
    starts: IntArray


class RETRODataset(Dataset[tuple[Tensor, Tensor]]):
    """A map-style dataset of training sequences and their retrieved neighbors.

    Item i is `seq` int64 (seq_len + 1,) and `retrieved` int64 (L, K, 2 * M). A sequence holds one document; after
    its end, both `seq` and `retrieved` are `pad_id`. The second half of a neighbor is its continuation, or padding
    if its document ends; without `add_continuations`, `retrieved` is (L, K, M). Missing neighbors (-1) are padding.

    Files are opened read-only. The files of chunks and starts may be longer than the counts.

    Raises MismatchError if a file does not have the size that the counts imply, or if a sequence starts outside the
    chunks; ConfigError for invalid counts, or if `seq_len` is not a multiple of `chunk_size`.
    """

    def __init__(
        self,
        *,
        num_chunks: int,
        chunk_size: int,
        seq_len: int,
        num_sequences: int,
        num_neighbors: int,
        chunk_memmap_path: str | PathLike[str],
        chunk_nn_memmap_path: str | PathLike[str],
        seq_memmap_path: str | PathLike[str],
        eos_id: int = 102,
        pad_id: int = 0,
        add_continuations: bool = True,
    ) -> None:
        check_counts(
            num_chunks=num_chunks,
            chunk_size=chunk_size,
            seq_len=seq_len,
            num_sequences=num_sequences,
            num_neighbors=num_neighbors,
        )
        check_seq_len(seq_len, chunk_size)
        self.num_chunks, self.chunk_size, self.seq_len = num_chunks, chunk_size, seq_len
        self.num_sequences, self.num_neighbors = num_sequences, num_neighbors
        self.eos_id, self.pad_id, self.add_continuations = eos_id, pad_id, add_continuations
        self.chunk_memmap_path = Path(chunk_memmap_path).absolute()
        self.chunk_nn_memmap_path = Path(chunk_nn_memmap_path).absolute()
        self.seq_memmap_path = Path(seq_memmap_path).absolute()
        self._opened: _Maps | None = None
        starts = self._maps.starts
        if not 0 <= starts.min() <= starts.max() < num_chunks:
            raise MismatchError(
                f"{self.seq_memmap_path}: found sequences that start at chunks {starts.min()} to {starts.max()}, "
                f"expected 0 to {num_chunks - 1}; give the counts that it was made with"
            )

    @property
    def _maps(self) -> _Maps:
        if self._opened is None:
            self._opened = _Maps(
                open_raw(self.chunk_memmap_path, (self.num_chunks, self.chunk_size + 1), longer=True),
                open_raw(self.chunk_nn_memmap_path, (self.num_chunks, self.num_neighbors)),
                open_raw(self.seq_memmap_path, (self.num_sequences,), longer=True),
            )
        return self._opened

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: SupportsIndex) -> tuple[Tensor, Tensor]:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"sequence {number} of {len(self)}")
        chunks, neighbors, starts = self._maps
        start = int(starts[number])
        rows = np.asarray(chunks[start : start + self.seq_len // self.chunk_size])
        ends = ends_document(rows, self.eos_id, self.pad_id)
        rows = rows[: int(ends.argmax()) + 1] if ends.any() else rows
        return self._seq(rows), self._retrieved(chunks, neighbors[start : start + len(rows)])

    def _seq(self, rows: IntArray) -> Tensor:
        stream = np.append(rows[:, :-1], rows[-1, -1]).astype(np.int64)
        seq = np.full((1, self.seq_len + 1), self.pad_id, dtype=np.int64)
        seq[0, : len(stream)] = stream
        return torch.from_numpy(_blank_after_end(seq, self.eos_id, self.pad_id)[0])

    def _retrieved(self, chunks: IntArray, ids: IntArray) -> Tensor:
        """The neighbors' tokens for each chunk of a sequence; padding for chunks after the document's end."""
        all_ids = np.full((self.seq_len // self.chunk_size, self.num_neighbors), NO_ROW, dtype=np.int64)
        all_ids[: len(ids)] = ids
        return torch.from_numpy(
            neighbor_tokens(
                chunks,
                all_ids,
                eos_id=self.eos_id,
                pad_id=self.pad_id,
                add_continuations=self.add_continuations,
            )
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # each worker process opens its own memory maps


def check_counts(**counts: int) -> None:
    """Raises ConfigError unless each count is an integer from 1 to the largest int32."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 1 <= count < 2**31:
            raise ConfigError(f"{name}: found {count!r}, expected a whole number from 1 to {2**31 - 1}")


def check_seq_len(seq_len: int, chunk_size: int) -> None:
    """Raises ConfigError unless `seq_len` is a multiple of `chunk_size`."""
    if seq_len % chunk_size:
        raise ConfigError(f"seq_len: found {seq_len}, expected a multiple of chunk_size {chunk_size}")
