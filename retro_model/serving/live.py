"""The database that is searched while serving: the pipeline's, read-only, and live documents, in memory only.

    database = LiveDatabase(Retriever.open("data"))
    for _ in database.add("notes", "Return the indices of the smallest ..."):
        pass                                      # one step for each batch of chunks
    database.retrieve_text("Return the indices", k=2)   # neighbors from both, nearest first

Live documents are cut, embedded and rounded as the pipeline's are, so a neighbor's distance does not depend on where it
is. Among equal distances the pipeline's rows come first. All methods are for one thread.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import Float32Array, IntArray
from retro_model.core.errors import ConfigError, RetroError
from retro_model.core.rows import NO_ROW
from retro_model.corpus.chunking import Chunks, cut
from retro_model.corpus.chunks import chunk_text, describe_rows
from retro_model.corpus.tokenizer import Tokenizer
from retro_model.inference.retriever import Retriever
from retro_model.search.distances import pair_distances, smallest

ROWS_PER_STEP = 32  # chunks embedded between two chances to stop


class TooLargeError(RetroError):
    """More live documents or chunks than the limit."""


class UnknownDocumentError(RetroError):
    """No live document has this id."""


@dataclass(frozen=True)
class Neighbor:
    """A chunk that was found. `live` is the id of its live document, None for a chunk of the pipeline's database."""

    name: str
    live: int | None
    distance: float
    tokens: npt.NDArray[np.int64]  # (2 * M,): the chunk and its continuation, pad where there is none


@dataclass(frozen=True)
class LiveDocument:
    """A document that was added: its id, its name and its number of chunks."""

    id: int
    name: str
    chunks: int


@dataclass(frozen=True)
class _Rows:
    """A live document with its chunks: what the network reads of each (n, 2 * M), and their vectors (n, dim)."""

    document: LiveDocument
    tokens: npt.NDArray[np.int64]
    vectors: Float32Array


class LiveDatabase:
    """Searches the retriever's database and the live documents together."""

    def __init__(self, retriever: Retriever, most_documents: int = 1000, most_chunks: int = 10_000) -> None:
        self.retriever, self.tokenizer = retriever, retriever.tokenizer
        self.most_documents, self.most_chunks = most_documents, most_chunks
        self._live: dict[int, _Rows] = {}
        self._next_id = 1

    def documents(self) -> list[LiveDocument]:
        """The live documents, oldest first."""
        return [rows.document for rows in list(self._live.values())]

    def add(self, name: str, text: str) -> Iterator[LiveDocument | None]:
        """Add a document: yields None while it is embedded, then, once it can be found, the document.

        Raises ConfigError for a text without a token, TooLargeError above the limits.
        """
        rows = cut_text(self.tokenizer, text, self.retriever.chunk_size).rows
        num_chunks = sum(document.chunks for document in self.documents()) + len(rows)
        if len(self._live) >= self.most_documents or num_chunks > self.most_chunks:
            raise TooLargeError(
                f"documents: found {len(self._live) + 1} live documents with {num_chunks} chunks, expected at most "
                f"{self.most_documents} with {self.most_chunks}; delete some first"
            )
        texts, parts = chunk_text(self.tokenizer, rows[:, :-1]), []
        for start in range(0, len(texts), ROWS_PER_STEP):
            yield None
            parts.append(self.retriever.vectors(texts[start : start + ROWS_PER_STEP]))
        following = np.full_like(rows[:, :-1], self.tokenizer.pad_id)
        following[:-1] = rows[1:, :-1]
        document = LiveDocument(self._next_id, name, len(rows))
        tokens = np.concatenate([rows[:, :-1], following], axis=1).astype(np.int64)
        self._live[document.id] = _Rows(document, tokens, np.concatenate(parts))
        self._next_id += 1
        yield document

    def remove(self, document_id: int) -> LiveDocument:
        """Remove a live document. Raises UnknownDocumentError; the pipeline's documents have no id here."""
        if document_id not in self._live:
            raise UnknownDocumentError(f"documents: no live document has the id {document_id}")
        return self._live.pop(document_id).document

    def retrieve(self, token_chunks: IntArray, k: int) -> list[list[Neighbor]]:
        """The k nearest chunks of each row of token ids (C, M), nearest first; fewer if the database holds fewer."""
        return self._retrieve(chunk_text(self.tokenizer, token_chunks), k)

    def retrieve_text(self, text: str, k: int) -> list[Neighbor]:
        """The same for one text, which the encoder truncates as it truncates chunks."""
        return self._retrieve([text], k)[0]

    def tokens(self, found: Sequence[Sequence[Neighbor]], k: int) -> npt.NDArray[np.int64]:
        """What the network reads of the neighbors that were found for C chunks: (C, k, 2 * M), pad where none."""
        read = np.full((len(found), k, 2 * self.retriever.chunk_size), self.tokenizer.pad_id, dtype=np.int64)
        for chunk, neighbors in enumerate(found):
            for place, neighbor in enumerate(neighbors):
                read[chunk, place] = neighbor.tokens
        return read

    def _retrieve(self, texts: list[str], k: int) -> list[list[Neighbor]]:
        vectors = self.retriever.vectors(texts)
        stored = self.retriever.nearest(vectors, k)
        num_stored, live = self.retriever.chunks.rows, list(self._live.values())
        ids, distances = stored.ids, stored.distances
        if live:
            live_vectors = np.concatenate([rows.vectors for rows in live])
            places = np.tile(np.arange(len(live_vectors)), (len(texts), 1))
            distances = np.concatenate([distances, pair_distances(vectors, live_vectors, places)], axis=1)
            distances, ids = smallest(distances, np.concatenate([ids, num_stored + places], axis=1), k)
        names = describe_rows(self.retriever.chunks, ids[(ids != NO_ROW) & (ids < num_stored)])
        tokens_of_stored = {int(i): row for i, row in zip(stored.ids.ravel(), _flat(stored.tokens), strict=True)}
        of_live = [(rows, chunk) for rows in live for chunk in range(rows.document.chunks)]

        def neighbor(row: int, distance: float) -> Neighbor:
            if row < num_stored:
                return Neighbor(names[row], None, distance, tokens_of_stored[row])
            rows, chunk = of_live[row - num_stored]
            name = f"{rows.document.name}, chunk {chunk + 1} of {rows.document.chunks}"
            return Neighbor(name, rows.document.id, distance, rows.tokens[chunk])

        return [
            [neighbor(row, distance) for row, distance in zip(*pair, strict=True) if row != NO_ROW]
            for pair in zip(ids.tolist(), distances.tolist(), strict=True)
        ]


def cut_text(tokenizer: Tokenizer, text: str, chunk_size: int) -> Chunks:
    """The chunk rows of one document. Raises ConfigError for a text without a token."""
    encoded = tokenizer.encode_batch([text])
    if not len(encoded.ids):
        raise ConfigError("text: found no text, expected some")
    return cut(encoded, chunk_size, tokenizer.pad_id, tokenizer.begin_id, tokenizer.end_id)


def _flat(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return tokens.reshape(-1, tokens.shape[-1])
