"""The loss of every token of held-out documents, from sliding windows of whole chunks (section 4).

A window is up to L chunks of one document, as long as a training sequence; the next one starts half a sequence
later. Each label is scored once, in the earliest window that contains it. There it has the most context: at least
half a sequence, or everything before it in its document. Windows of different documents share a sequence and are
kept apart as in training, so that short documents cost no padding and every label has the loss that its window would
give it alone.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from retro_model.core.arrays import BoolArray, FloatArray, IntArray
from retro_model.core.artifacts import Artifact
from retro_model.core.devices import fast_float32_products
from retro_model.core.errors import TrainingError
from retro_model.core.progress import Progress
from retro_model.core.rows import NO_ROW, retrieved_tokens
from retro_model.network.language_model import LanguageModel
from retro_model.training.sequences import PackedSequences

# The part of each neighbor that the network sees: the retrieved chunk, its continuation, or both.
Part = Literal["both", "neighbor", "continuation"]


class Span(NamedTuple):
    """The chunk rows `first` to `stop` (exclusive) of one document."""

    first: int
    stop: int


class Window(NamedTuple):
    """Reads the chunk rows `first` to `stop` (exclusive) and scores those from `scored` on."""

    first: int
    scored: int
    stop: int


class Layout(NamedTuple):
    """Sequences of L chunks (S, L): the row of each chunk, -1 for none, and whether it is scored."""

    rows: npt.NDArray[np.int64]
    scored: BoolArray


# ---- windows and sequences -------------------------------------------------------------------------


def choose_spans(documents: IntArray, max_chunks: int | None, seed: int) -> list[Span]:
    """Take whole documents in random order up to `max_chunks` chunks (None: all); return them sorted by row.

    `documents` holds the document of each row. The last document taken is cut at `max_chunks`.
    """
    starts = np.flatnonzero(np.diff(documents, prepend=NO_ROW - 1))
    stops = [*starts[1:], len(documents)]
    spans = [Span(int(first), int(stop)) for first, stop in zip(starts, stops, strict=True)]
    if max_chunks is None or max_chunks >= len(documents):
        return spans
    chosen, left = [], max_chunks
    for number in np.random.default_rng(seed).permutation(len(spans)):
        first, stop = spans[number]
        chosen.append(Span(first, min(stop, first + left)))
        left -= chosen[-1].stop - first
        if left == 0:
            break
    return sorted(chosen)


def sliding_windows(span: Span, length: int) -> list[Window]:
    """Windows of `length` chunks over one document; each starts half a window after the previous one."""
    stride = max(1, length // 2)
    windows, first, scored = [], span.first, span.first
    while scored < span.stop:
        stop = min(first + length, span.stop)
        windows.append(Window(first, scored, stop))
        first, scored = first + stride, stop
    return windows


def pack(windows: Sequence[Window], length: int) -> Layout:
    """Pack the windows into sequences of `length` chunks, best fit, longest first.

    Only the last window of a document is shorter than a sequence, so two windows of one document never share a
    sequence, where the network would take them for one text.
    """
    sequences: list[list[Window]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # sequences by the number of chunks that still fit
    for window in sorted(windows, key=lambda window: window.first - window.stop):
        size = window.stop - window.first
        room = next((room for room in range(size, length) if with_room[room]), length)
        if room == length:
            sequences.append([])
            with_room[length].append(len(sequences) - 1)
        sequence = with_room[room].pop()
        sequences[sequence].append(window)
        with_room[room - size].append(sequence)
    return _lay_out(sequences, length)


def _lay_out(sequences: Sequence[Sequence[Window]], length: int) -> Layout:
    shape = (len(sequences), length)
    layout = Layout(np.full(shape, NO_ROW), np.zeros(shape, dtype=np.bool_))
    for sequence, windows in enumerate(sequences):
        rows = np.concatenate([np.arange(window.first, window.stop) for window in windows])
        scored = np.concatenate([np.arange(window.first, window.stop) >= window.scored for window in windows])
        layout.rows[sequence, : len(rows)] = rows
        layout.scored[sequence, : len(rows)] = scored
    return layout


# ---- scoring ---------------------------------------------------------------------------------------


class Scorer:
    """Scores the same rows with any model and any neighbors.

    `rows` are the scored chunk rows, sorted; losses and neighbors are in this order. Without a database nothing can
    be retrieved.
    """

    def __init__(
        self,
        chunks: Artifact,
        database: Artifact | None,
        spans: Sequence[Span],
        seq_len: int,
        *,
        device: str = "cpu",
        batch_size: int = 8,
        number_type: str = "float32",
    ) -> None:
        self.database = database
        self.device, self.batch_size, self.number_type = torch.device(device), batch_size, number_type
        self.sequences = PackedSequences(chunks, seq_len)
        length = self.sequences.rows_per_sequence
        self.layout = pack([window for span in spans for window in sliding_windows(span, length)], length)
        self.rows = np.concatenate([np.arange(*span) for span in spans])
        tokens = chunks["tokens"][self.rows].astype(np.int64)
        self.inputs, self.labels = tokens[:, :-1], tokens[:, 1:]
        self.is_label = self.labels != chunks.facts["pad_id"]
        self.bytes = chunks["bytes"][self.rows].astype(np.int64)
        self.documents = chunks["documents"][self.rows].astype(np.int64)
        # Rows whose first tokens read the neighbors of the row before. In windows of one chunk there is no such row.
        consecutive = (np.diff(self.rows) == 1) & (np.diff(self.documents) == 0) & (length > 1)
        self.follows = np.concatenate([[False], consecutive])

    @property
    def num_sequences(self) -> int:
        """The number of sequences in one pass over the rows."""
        return len(self.layout.rows)

    @torch.no_grad()
    def losses(
        self, model: LanguageModel, neighbors: IntArray | None, progress: Progress | None = None, part: Part = "both"
    ) -> FloatArray:
        """Return the loss in nats of each label (rows, M) float32, 0 where there is no label.

        `neighbors` (rows, K) are database rows, -1 for none; None means no retrieval. The network sees only `part`
        of each neighbor; the rest is padding. The batch size changes only the last bits of floating-point sums.

        Raises TrainingError if a loss is not finite.
        """
        model.eval()
        losses = np.zeros(self.labels.shape, dtype=np.float32)
        with fast_float32_products(self.device):
            for start in range(0, self.num_sequences, self.batch_size):
                block = slice(start, start + self.batch_size)
                rows, scored = self.layout.rows[block], self.layout.scored[block]
                places = np.searchsorted(self.rows, rows[scored])
                losses[places] = self._batch_losses(model, rows, neighbors, part)[scored]
                if progress is not None:
                    progress.update(len(rows))
        if not np.isfinite(losses).all():
            raise TrainingError("evaluate: a loss on held-out text is not finite; train again with a lower train.lr")
        return losses

    def _batch_losses(self, model: LanguageModel, rows: IntArray, neighbors: IntArray | None, part: Part) -> FloatArray:
        """The losses (B, L, M) of sequences made of the rows (B, L)."""
        batch = self.sequences.batch(rows, neighbors="none").to(self.device)
        retrieved = None
        if neighbors is not None:
            real = rows != NO_ROW
            ids = np.full((*rows.shape, neighbors.shape[1]), NO_ROW, dtype=np.int64)
            ids[real] = neighbors[np.searchsorted(self.rows, rows[real])]
            retrieved = torch.from_numpy(self._retrieved(ids, part)).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.number_type == "bfloat16"):
            losses = model.token_losses(batch.seq, retrieved, labels=batch.labels, documents=batch.documents)
        return losses.float().cpu().numpy().reshape(*rows.shape, -1)

    def _retrieved(self, ids: IntArray, part: Part) -> npt.NDArray[np.int64]:
        """The tokens (..., K, R) of the database rows, with all but the given part replaced by padding."""
        assert self.database is not None, "neighbors are rows of a database"
        tokens = retrieved_tokens(self.database, ids)
        chunk_size = tokens.shape[-1] // 2
        if part == "neighbor":
            tokens[..., chunk_size:] = self.database.facts["pad_id"]
        elif part == "continuation":
            tokens[..., :chunk_size] = self.database.facts["pad_id"]
        return tokens
