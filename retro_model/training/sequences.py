"""Training sequences, packed from the chunk rows of an artifact.

On disk: rows of M + 1 tokens, a document's rows one after the other, documents one after the other
(chunks); for each row the ids of its nearest database rows, nearest first, -1 for none (neighbors).
A sequence is any L consecutive rows, wherever documents begin and end: nothing is padded but the last
row of a document. What keeps documents apart is the batch's `documents`, by which the network limits
self-attention and chunked cross-attention.

    sequences = PackedSequences(chunks, seq_len=512, neighbors=neighbors, database=chunks, knn=2)
    sequences.batch(sequences.training_rows(seed=0, first=0, count=16))     # the first 16 sequences
    sequences.batch(sequences.ordered_rows()[:16], neighbors="shuffled")    # validation, the control

Letters: B sequences, L rows (chunks) of a sequence, M tokens of a chunk, N = L * M, K neighbors,
R = 2 * M tokens of a retrieved neighbor (the chunk and its continuation).
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
    """Packed sequences, ready for the network."""

    rows: IntArray  # (B, L): the chunk rows, -1 for a row of padding
    seq: Tensor  # (B, N) int64: inputs
    labels: Tensor  # (B, N) int64: the token after each input, pad where there is none
    documents: Tensor  # (B, L) int64: equal for neighboring rows of one document, numbered from 0
    bytes: Tensor  # (B, L) int64: bytes of text that a row's labels stand for
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

    `seq_len` is in tokens. `neighbors` belong to these chunks, `database` is the chunk artifact whose
    rows they name, and of the neighbors stored only the `knn` nearest are used.

    Raises ConfigError where `seq_len` or `knn` does not fit the data, MismatchError where the artifacts
    were not made from each other.
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
        """How many sequences an epoch of training has."""
        return max(1, self.num_rows // self.rows_per_sequence)

    def training_rows(self, seed: int, first: int, count: int) -> IntArray:
        """The rows (count, L) of the training sequences `first` to `first + count`, counted over all epochs.

        A function of the arguments alone, so that any process can continue anywhere. An epoch is a
        ring of all rows, cut at a random place into stretches of L, in random order: each row comes
        at most once, and fewer than L of them, others in each epoch, are left out. Where there are
        fewer than L rows at all, the one sequence is padded.
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
        """Where the sequences of an epoch begin, in their order; the last answer is kept."""
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            random = np.random.default_rng([seed, epoch])
            starts = random.permutation(self.sequences_per_epoch) * self.rows_per_sequence
            if self.num_rows >= self.rows_per_sequence:
                starts += random.integers(self.num_rows)
            self._epoch = ((seed, epoch), starts)
        return self._epoch[1]

    def ordered_rows(self) -> IntArray:
        """Sequences (ceil(rows / L), L) that hold every row once, in order; the last is filled up with -1."""
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
        """The sequences of the given rows (B, L), of which -1 is padding.

        `neighbors` says what is retrieved: a row's own neighbors; the control, those of a row half the
        split away; or none. Without neighbor artifact it is none. `without` (B,) marks sequences whose
        neighbors are dropped (all missing), while others of the batch keep theirs. `replaced` (B, L, knn) has
        database rows that are read in place of the neighbors, -1 where these stay.
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
        """How many labels the sequences of the given rows have."""
        return int(np.count_nonzero(self.chunks["tokens"][rows[rows != NO_ROW]][:, 1:] != self.pad_id))

    def neighbor_ids(self, rows: IntArray, shuffled: bool = False) -> npt.NDArray[np.int64]:
        """The nearest database rows (B, L, knn) of the given rows, -1 where there is none.

        Shuffled gives each row what the row half the split away has: neighbors as good as any, and,
        unless one document fills half the split, of another document's text.
        """
        assert self.neighbors is not None
        real = rows != NO_ROW
        asked = (rows[real] + self.num_rows // 2) % self.num_rows if shuffled else rows[real]
        ids = np.full((*rows.shape, self.knn), NO_ROW, dtype=np.int64)
        ids[real] = self.neighbors["ids"][asked][:, : self.knn]
        return ids

    def _document_numbers(self, rows: IntArray) -> npt.NDArray[np.int64]:
        """Documents (B, L), numbered within each sequence; rows that do not follow each other are of two."""
        documents = self._documents[rows]  # a row of padding reads any document: it follows no row
        together = (np.diff(rows) == 1) & (np.diff(documents) == 0)
        together |= (rows[:, 1:] == NO_ROW) & (rows[:, :-1] == NO_ROW)
        first = np.zeros((len(rows), 1), dtype=np.int64)
        return np.concatenate([first, np.cumsum(~together, axis=1, dtype=np.int64)], axis=1)
