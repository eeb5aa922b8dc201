"""Training sequences, packed from the rows of a chunk artifact.

On disk: the chunk artifact has rows of M + 1 tokens, the rows of a document contiguous and in order. The neighbor
artifact has, for each row, the ids of its nearest database rows, nearest first, -1 for none.
A sequence is L consecutive rows, regardless of document boundaries, so only the last row of a document is padded.
The batch's `documents` tells the network where to stop self-attention and chunked cross-attention.

    sequences = PackedSequences(chunks, seq_len=512, neighbors=neighbors, database=chunks, knn=2)
    sequences.batch(sequences.training_rows(seed=0, first=0, count=16))     # the first 16 sequences
    sequences.batch(sequences.ordered_rows()[:16], neighbors="shuffled")    # validation, the control

Shape suffixes: B sequences, L rows (chunks) in a sequence, M tokens in a chunk, N = L * M, K neighbors,
R = 2 * M tokens in a retrieved neighbor (the chunk and its continuation).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retro_model.core.arrays import BoolArray, IntArray
from retro_model.core.artifacts import Artifact
from retro_model.core.errors import ConfigError
from retro_model.core.rows import NO_ROW, retrieved_tokens


@dataclass(frozen=True)
class Batch:
    """A batch of packed sequences: the network's inputs."""

    rows: IntArray  # (B, L): the chunk rows, -1 for a row of padding
    seq: Tensor  # (B, N) int64: inputs
    labels: Tensor  # (B, N) int64: the token after each input, pad where there is none
    documents: Tensor  # (B, L) int64: the document of each row, numbered from 0 within the sequence
    bytes: Tensor  # (B, L) int64: bytes of text that the labels of each row stand for
    retrieved: Tensor | None  # (B, L, K, R) int64; None: no retrieval
    num_labels: int  # labels that are not pad

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        return Batch(
            rows=self.rows,
            seq=self.seq.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            documents=self.documents.to(device, non_blocking=True),
            bytes=self.bytes.to(device, non_blocking=True),
            retrieved=None if self.retrieved is None else self.retrieved.to(device, non_blocking=True),
            num_labels=self.num_labels,
        )


class PackedSequences:
    """Sequences of L consecutive rows of a chunk artifact, with or without their neighbors.

    `seq_len` is in tokens. `neighbors` is the neighbor artifact of these chunks, `database` the chunk artifact
    whose rows it lists. Only the `knn` nearest of the stored neighbors are used.

    Raises ConfigError if `seq_len` or `knn` does not match the data, MismatchError if the artifacts were not made
    from each other.
    """

    def __init__(
        self,
        chunks: Artifact,
        seq_len: int,
        neighbors: Artifact | None = None,
        database: Artifact | None = None,
        knn: int = 0,
    ) -> None:
        self.chunks, self.neighbors, self.database, self.knn = chunks, neighbors, database, knn
        self.num_rows = len(chunks["tokens"])
        self.chunk_size: int = chunks.facts["chunk_size"]
        self.pad_id: int = chunks.facts["pad_id"]
        if seq_len < self.chunk_size or seq_len % self.chunk_size:
            raise ConfigError(f"seq_len: found {seq_len}, expected a multiple of chunk_size {self.chunk_size}")
        self.seq_len = seq_len
        self.rows_per_sequence: int = seq_len // self.chunk_size
        if not self.num_rows:
            raise ConfigError(f"{chunks.folder}: no chunks, expected one at least; add documents")
        if neighbors is not None:
            self._check_neighbors(neighbors)
        self._documents = np.asarray(chunks["documents"][:])
        self._epoch: tuple[tuple[int, int], IntArray] | None = None

    def _check_neighbors(self, neighbors: Artifact) -> None:
        assert self.database is not None, "neighbors are rows of a database"
        facts = ("tokenizer", "chunk_size", "pad_id")
        self.database.require(**{name: self.chunks.facts[name] for name in facts})
        neighbors.require(chunks=self.chunks.fingerprint, database=self.database.fingerprint)
        stored = neighbors["ids"].shape[1]
        if not 1 <= self.knn <= stored:
            raise ConfigError(f"knn: found {self.knn}, expected 1 to {stored}, which {neighbors.folder} stores")

    # ---- which rows make a sequence ----------------------------------------------------------------

    @property
    def sequences_per_epoch(self) -> int:
        """The number of sequences in an epoch of training."""
        return max(1, self.num_rows // self.rows_per_sequence)

    def training_rows(self, seed: int, first: int, count: int) -> IntArray:
        """The rows (count, L) of `count` training sequences from number `first` on, counted over all epochs.

        Depends on the arguments alone, so any process can resume anywhere. An epoch treats all rows as a ring,
        starts at a random row, and shuffles the segments of L rows. So each row appears at most once per epoch,
        and fewer than L rows, different ones each epoch, are left out. If the split has fewer than L rows, its only
        sequence is padded.
        """
        numbers = np.arange(first, first + count)
        epochs, places = np.divmod(numbers, self.sequences_per_epoch)
        rows = np.empty((count, self.rows_per_sequence), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            starts = self._epoch_starts(seed, int(epoch))[places[here]]
            rows[here] = starts[:, None] + np.arange(self.rows_per_sequence)
        if self.num_rows < self.rows_per_sequence:
            return np.where(rows < self.num_rows, rows, NO_ROW)
        return rows % self.num_rows

    def _epoch_starts(self, seed: int, epoch: int) -> IntArray:
        """The first row of each sequence of an epoch, in training order; caches the latest epoch."""
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            random = np.random.default_rng([seed, epoch])
            starts = random.permutation(self.sequences_per_epoch) * self.rows_per_sequence
            if self.num_rows >= self.rows_per_sequence:
                starts += random.integers(self.num_rows)
            self._epoch = ((seed, epoch), starts)
        return self._epoch[1]

    def ordered_rows(self) -> IntArray:
        """All rows once, in order, as sequences (ceil(rows / L), L); -1 pads the last one."""
        count = -(-self.num_rows // self.rows_per_sequence)
        rows = np.arange(count * self.rows_per_sequence, dtype=np.int64)
        return np.where(rows < self.num_rows, rows, NO_ROW).reshape(count, self.rows_per_sequence)

    # ---- what is in a sequence ---------------------------------------------------------------------

    def batch(
        self,
        rows: IntArray,
        neighbors: Literal["own", "shuffled", "none"] = "own",
        without: BoolArray | None = None,
        replaced: IntArray | None = None,
    ) -> Batch:
        """The batch for the given rows (B, L); -1 is padding.

        `neighbors` selects what is retrieved: "own", a row's own neighbors; "shuffled", the control, those of the
        row half a split away; or "none", also if there is no neighbor artifact. `without` (B,) marks sequences
        whose neighbors are dropped (neighbor dropout). `replaced` (B, L, knn) holds database rows that replace
        neighbors; -1 keeps the neighbor, and missing neighbors stay missing.
        """
        real = rows != NO_ROW
        tokens = np.full((*rows.shape, self.chunk_size + 1), self.pad_id, dtype=np.int64)
        tokens[real] = self.chunks["tokens"][rows[real]]
        text_bytes = np.zeros(rows.shape, dtype=np.int64)
        text_bytes[real] = self.chunks["bytes"][rows[real]]
        labels = tokens[..., 1:].reshape(len(rows), -1)
        retrieved = None
        if self.neighbors is not None and self.database is not None and neighbors != "none":
            ids = self.neighbor_ids(rows, shuffled=neighbors == "shuffled")
            if replaced is not None:
                ids = np.where((replaced != NO_ROW) & (ids != NO_ROW), replaced, ids)
            if without is not None:
                ids[without] = NO_ROW
            retrieved = torch.from_numpy(retrieved_tokens(self.database, ids))
        return Batch(
            rows=rows,
            seq=torch.from_numpy(tokens[..., :-1].reshape(len(rows), -1)),
            labels=torch.from_numpy(labels),
            documents=torch.from_numpy(self._document_numbers(rows)),
            bytes=torch.from_numpy(text_bytes),
            retrieved=retrieved,
            num_labels=int(np.count_nonzero(labels != self.pad_id)),
        )

    def count_labels(self, rows: IntArray) -> int:
        """The number of labels in the given rows, without padding."""
        return int(np.count_nonzero(self.chunks["tokens"][rows[rows != NO_ROW]][:, 1:] != self.pad_id))

    def neighbor_ids(self, rows: IntArray, shuffled: bool = False) -> npt.NDArray[np.int64]:
        """The nearest database rows (B, L, knn) of the given rows, -1 where there is none.

        With `shuffled`, each row gets the neighbors of the row half a split away: just as real, but retrieved for
        another document, unless one document fills half the split.
        """
        assert self.neighbors is not None
        real = rows != NO_ROW
        asked = (rows[real] + self.num_rows // 2) % self.num_rows if shuffled else rows[real]
        ids = np.full((*rows.shape, self.knn), NO_ROW, dtype=np.int64)
        ids[real] = self.neighbors["ids"][asked][:, : self.knn]
        return ids

    def _document_numbers(self, rows: IntArray) -> npt.NDArray[np.int64]:
        """Document numbers (B, L), from 0 within each sequence; non-consecutive rows count as different documents."""
        documents = self._documents[rows]  # arbitrary for padding (-1), which never follows a real row
        same_document = (np.diff(rows) == 1) & (np.diff(documents) == 0)
        same_document |= (rows[:, 1:] == NO_ROW) & (rows[:, :-1] == NO_ROW)
        first = np.zeros((len(rows), 1), dtype=np.int64)
        return np.concatenate([first, np.cumsum(~same_document, axis=1, dtype=np.int64)], axis=1)
