"""Score another trained model (`evaluate.compare`) on the same held-out text: the column `compared`.

The model reads windows of its own training length and, if it was trained with retrieval, as many neighbors as in
training. If its tokenizer or chunk length differs, the same documents are chunked again for it, and neighbors are
searched among the new chunks. The loss of each of its tokens is then distributed over the bytes that the token
spells and summed over this evaluation's chunks. Sums do not change, so intervals, leakage curve and bits per byte
cover the same text for all models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_model.core.arrays import BoolArray, Float64Array
from retro_model.core.artifacts import SPLITS, Artifact
from retro_model.core.errors import ConfigError
from retro_model.core.progress import Progress
from retro_model.corpus.chunks import document_texts
from retro_model.corpus.tokenizer import Tokenizer
from retro_model.evaluation.inputs import Inputs, Searching, rechunk_documents, search_rechunked
from retro_model.evaluation.scoring import Scorer, Span
from retro_model.retrofit.loading import open_model


@dataclass(frozen=True)
class Compared:
    """Summed nats (rows,) per chunk row of the evaluation, the number of labels, and facts about the model."""

    row_losses: Float64Array
    num_labels: int
    name: str
    knn: int  # 0: no retrieval
    same_tokens: bool  # same tokenizer and chunk length
    same_training: bool  # trained on the same chunks
    lossy_documents: int  # documents that its tokenizer does not spell exactly


class Comparison:
    """Opens the model to compare and scores it with the evaluation's settings."""

    def __init__(
        self,
        folder: Path,
        data: Path,
        searching: Searching,
        work: Path,
        *,
        device: str,
        batch_size: int,
        number_type: str,
    ) -> None:
        self.model = Artifact.open(folder, "model")
        self.data, self.searching, self.work = data, searching, work
        self.device = device
        self.options: dict[str, Any] = {"device": device, "batch_size": batch_size, "number_type": number_type}

    def score(self, inputs: Inputs, spans: Sequence[Span]) -> Compared:
        """Return the model's losses on the rows of `spans` of the held-out chunks.

        Raises MismatchError if the documents cannot be chunked again for it, ConfigError if fewer neighbors are
        stored than it was trained with.
        """
        facts = self.model.facts
        wanted = {"tokenizer": inputs.tokenizer.fingerprint, "chunk_size": inputs.chunks.facts["chunk_size"]}
        same = all(facts[name] == value for name, value in wanted.items())
        if same:
            losses, is_label = self._losses(inputs.chunks, inputs, spans)
            row_losses, num_labels, lossy = losses.sum(axis=1), int(is_label.sum()), 0
        else:
            row_losses, num_labels, lossy = self._score_rechunked(inputs, spans)
        return Compared(
            row_losses=row_losses,
            num_labels=num_labels,
            name=self.model.folder.name,
            knn=facts["knn"],
            same_tokens=same,
            same_training=facts["chunks"] == Artifact.open(self.data / "chunks/train", "chunks", False).fingerprint,
            lossy_documents=lossy,
        )

    def _losses(self, chunks: Artifact, inputs: Inputs | None, spans: Sequence[Span]) -> tuple[Float64Array, BoolArray]:
        """Return the nats (rows, M) of the labels in `spans`, and a mask of which positions are labels."""
        model = open_model(self.model, device=self.device)
        database = None if inputs is None else inputs.database
        scorer = Scorer(chunks, database, spans, self.model.facts["seq_len"], **self.options)
        neighbors = None
        if inputs is not None and (knn := self.model.facts["knn"]):
            stored = inputs.neighbors["ids"].shape[1]
            if knn > stored:
                raise ConfigError(
                    f"evaluate.compare: {self.model.folder} was trained with {knn} neighbors, found {stored} stored; "
                    f"raise neighbors.stored"
                )
            neighbors = inputs.neighbors["ids"][scorer.rows][:, :knn]
        with Progress("evaluate.compare", scorer.num_sequences, unit="sequence") as progress:
            losses = scorer.losses(model, neighbors, progress)
        return losses.astype(np.float64), scorer.is_label

    def _score_rechunked(self, inputs: Inputs, spans: Sequence[Span]) -> tuple[Float64Array, int, int]:
        folder, facts = self.model.folder / "tokenizer", self.model.facts
        splits = SPLITS if facts["retrieval"] else ("test",)
        chunks_folder = rechunk_documents(inputs, self.data, folder, facts["chunk_size"], splits, self.work)
        found = search_rechunked(chunks_folder, folder, self.searching, self.work) if facts["retrieval"] else None
        chunks = Artifact.open(chunks_folder / "test", "chunks")
        mapper = _LossMapper(inputs, chunks, Tokenizer.open(folder), spans)
        losses, is_label = self._losses(chunks, found, mapper.spans)
        return *mapper.sum_over_rows(losses, is_label), chunks.facts["lossy_documents"]


class _LossMapper:
    """Maps losses from another chunking of the same documents to the chunk rows of this evaluation."""

    def __init__(self, inputs: Inputs, chunks: Artifact, tokenizer: Tokenizer, spans: Sequence[Span]) -> None:
        self.tokenizer = tokenizer
        numbers = {int(inputs.chunks["documents"][span.first]): span for span in spans}
        here = document_texts(inputs.chunks, inputs.tokenizer)
        texts = {item.number: item.text for item in here if item.number in numbers}
        documents = chunks["documents"][:]
        self.pieces: list[tuple[Span, Float64Array, bool, str]] = []  # their rows, byte offsets of ours, whole, text
        for number, span in numbers.items():
            bounds = np.concatenate([[0], np.cumsum(inputs.chunks["bytes"][span.first : span.stop], dtype=np.int64)])
            first, stop = np.searchsorted(documents, [number, number + 1])
            before = np.cumsum(chunks["bytes"][first:stop], dtype=np.int64) - chunks["bytes"][first:stop]
            whole = span.stop == inputs.chunks.rows or int(inputs.chunks["documents"][span.stop]) != number
            needed = stop if whole else first + int(np.searchsorted(before, bounds[-1]))
            self.pieces.append((Span(int(first), int(needed)), bounds.astype(np.float64), whole, texts[number]))

    @property
    def spans(self) -> list[Span]:
        """The rows of the other chunking that cover our spans, in order."""
        return [span for span, *_ in self.pieces]

    def sum_over_rows(self, losses: Float64Array, is_label: BoolArray) -> tuple[Float64Array, int]:
        """Sum losses (rows of the other chunking, M) over our rows.

        Returns the sums (our rows,) and the number of labels that lie in our rows.
        """
        per_document, num_labels, start = [], 0, 0
        for span, bounds, whole, text in self.pieces:
            rows = slice(start, start + span.stop - span.first)
            start = rows.stop
            found = losses[rows][is_label[rows]]
            encoded = self.tokenizer.encode_batch([text])
            counts = np.arange(1, min(len(found), len(encoded.ids)) + 1)
            ends = encoded.bytes_covered(np.zeros(len(counts), dtype=np.int64), counts)
            if len(found) > len(ends):  # the last label is the end of the document, which spells no byte
                ends = np.append(ends, ends[-1])
            inside = ends <= bounds[-1] if not whole else np.ones(len(ends), dtype=np.bool_)
            num_labels += int(inside.sum())
            per_document.append(spread_over_rows(found, ends.astype(np.float64), bounds, whole))
        return np.concatenate(per_document), num_labels


def spread_over_rows(losses: Float64Array, ends: Float64Array, bounds: Float64Array, whole: bool) -> Float64Array:
    """Sum the losses of tokens that end at the byte offsets `ends` over rows between the offsets `bounds`.

    The loss of a token that spans two rows is split in proportion to its bytes in each. A token without bytes counts
    in the row that holds the next byte or, at the end of a document (`whole`), in the last row.
    """
    sizes = np.diff(ends, prepend=0)
    spelled = sizes > 0
    through = np.concatenate([[0.0], np.cumsum(losses[spelled])])
    rows: Float64Array = np.diff(np.interp(bounds, np.concatenate([[0.0], ends[spelled]]), through))
    places = np.searchsorted(bounds[1:], ends[~spelled], side="right")
    here = (places < len(rows)) | whole
    np.add.at(rows, np.minimum(places[here], len(rows) - 1), losses[~spelled][here])
    return rows
