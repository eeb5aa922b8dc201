"""The column of another trained model (`evaluate.compare`): its loss on the same held-out text.

Every model is read in its own windows (its own training length) and, if it was trained with retrieval,
with as many neighbors as it was trained with. A model with another tokenizer or chunk length reads the
same documents cut anew, and gets neighbors of its own cut. Each of its tokens' losses is then laid on
the bytes that the token spells, and so on the chunks of this evaluation: sums stay what they are, and
intervals, leakage curve and bits per byte are over the same text for all.
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
from retro_model.evaluation.inputs import Inputs, Searching, cut_anew, searched_anew
from retro_model.evaluation.scoring import Scorer, Span
from retro_model.network.model import RETRO


@dataclass(frozen=True)
class Compared:
    """Summed nats (rows,) on the chunk rows of the evaluation, the number of labels, and what was compared."""

    row_losses: Float64Array
    num_labels: int
    name: str
    knn: int  # 0: it has no retrieval
    same_tokens: bool  # the same tokenizer and chunk length
    same_training: bool  # trained on the same chunks
    lossy_documents: int  # that its tokenizer does not spell exactly


class Comparison:
    """Opens the model that is compared, and scores it. The settings are those of the evaluation."""

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
        """The model's losses on the rows of `spans` of the held-out chunks.

        Raises MismatchError where the documents cannot be cut for it, ConfigError where fewer neighbors
        are stored than it was trained with.
        """
        facts = self.model.facts
        wanted = {"tokenizer": inputs.tokenizer.fingerprint, "chunk_size": inputs.chunks.facts["chunk_size"]}
        same = all(facts[name] == value for name, value in wanted.items())
        if same:
            losses, is_label = self._losses(inputs.chunks, inputs, spans)
            row_losses, num_labels, lossy = losses.sum(axis=1), int(is_label.sum()), 0
        else:
            row_losses, num_labels, lossy = self._score_cut_anew(inputs, spans)
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
        """Nats (rows, M) of the labels in `spans`, and which of them are labels."""
        model = RETRO.from_pretrained(self.model.folder, device=self.device)
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
        with Progress("evaluate.compare", scorer.num_sequences, unit="sequence") as shown:
            losses = scorer.losses(model, neighbors, shown)
        return losses.astype(np.float64), scorer.is_label

    def _score_cut_anew(self, inputs: Inputs, spans: Sequence[Span]) -> tuple[Float64Array, int, int]:
        folder, facts = self.model.folder / "tokenizer", self.model.facts
        splits = SPLITS if facts["retrieval"] else ("test",)
        cut = cut_anew(inputs, self.data, folder, facts["chunk_size"], splits, self.work)
        anew = searched_anew(cut, folder, self.searching, self.work) if facts["retrieval"] else None
        chunks = Artifact.open(cut / "test", "chunks")
        laid = _Laid(inputs, chunks, Tokenizer.open(folder), spans)
        losses, is_label = self._losses(chunks, anew, laid.spans)
        return *laid.lay(losses, is_label), chunks.facts["lossy_documents"]


class _Laid:
    """The same documents in two cuts: which rows of the other one the spans need, and how losses are laid on ours."""

    def __init__(self, inputs: Inputs, chunks: Artifact, tokenizer: Tokenizer, spans: Sequence[Span]) -> None:
        self.tokenizer = tokenizer
        numbers = {int(inputs.chunks["documents"][span.first]): span for span in spans}
        here = document_texts(inputs.chunks, inputs.tokenizer)
        texts = {item.number: item.text for item in here if item.number in numbers}
        documents = chunks["documents"][:]
        self.pieces: list[tuple[Span, Float64Array, bool, str]] = []  # rows, bytes before each of our rows, whole, text
        for number, span in numbers.items():
            bounds = np.concatenate([[0], np.cumsum(inputs.chunks["bytes"][span.first : span.stop], dtype=np.int64)])
            first, stop = np.searchsorted(documents, [number, number + 1])
            before = np.cumsum(chunks["bytes"][first:stop], dtype=np.int64) - chunks["bytes"][first:stop]
            whole = span.stop == inputs.chunks.rows or int(inputs.chunks["documents"][span.stop]) != number
            needed = stop if whole else first + int(np.searchsorted(before, bounds[-1]))
            self.pieces.append((Span(int(first), int(needed)), bounds.astype(np.float64), whole, texts[number]))

    @property
    def spans(self) -> list[Span]:
        """Rows of the other cut that hold the text of our spans, in order."""
        return [span for span, *_ in self.pieces]

    def lay(self, losses: Float64Array, is_label: BoolArray) -> tuple[Float64Array, int]:
        """The losses (rows of the other cut, M) summed over our rows, and the number of labels that lie in them."""
        laid, num_labels, start = [], 0, 0
        for span, bounds, whole, text in self.pieces:
            rows = slice(start, start + span.stop - span.first)
            start = rows.stop
            found = losses[rows][is_label[rows]]
            encoded = self.tokenizer.encode_batch([text])
            counts = np.arange(1, min(len(found), len(encoded.ids)) + 1)
            ends = encoded.bytes_covered(np.zeros(len(counts), dtype=np.int64), counts)
            if len(found) > len(ends):  # the end of the document: a label without a byte
                ends = np.append(ends, ends[-1])
            inside = ends <= bounds[-1] if not whole else np.ones(len(ends), dtype=np.bool_)
            num_labels += int(inside.sum())
            laid.append(lay_on_rows(found, ends.astype(np.float64), bounds, whole))
        return np.concatenate(laid), num_labels


def lay_on_rows(losses: Float64Array, ends: Float64Array, bounds: Float64Array, whole: bool) -> Float64Array:
    """The losses of tokens that end at the bytes `ends` as sums over rows between the bytes `bounds`.

    A token that lies in two rows counts in both, by its bytes there; one without a byte counts in the
    row that holds the next byte, or, at the end of a document (`whole`), in the last row.
    """
    sizes = np.diff(ends, prepend=0)
    spelled = sizes > 0
    through = np.concatenate([[0.0], np.cumsum(losses[spelled])])
    rows: Float64Array = np.diff(np.interp(bounds, np.concatenate([[0.0], ends[spelled]]), through))
    places = np.searchsorted(bounds[1:], ends[~spelled], side="right")
    here = (places < len(rows)) | whole
    np.add.at(rows, np.minimum(places[here], len(rows) - 1), losses[~spelled][here])
    return rows
