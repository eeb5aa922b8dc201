"""A chunk artifact's documents: where its rows come from, and their text.

`documents.jsonl` has a line for each document: its number, source, record in that source, first chunk, number of
chunks, tokens and bytes. This module alone writes and reads it.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from retro_model.core.arrays import IntArray
from retro_model.core.artifacts import Artifact
from retro_model.core.errors import DamagedArtifactError
from retro_model.corpus.tokenizer import Tokenizer

DOCUMENTS = "documents.jsonl"


class DocumentTable:
    """Writes documents.jsonl: a line of JSON for each document."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / DOCUMENTS

    def __enter__(self) -> "DocumentTable":
        self._stream = self._path.open("w", encoding="utf-8", newline="\n")
        return self

    def append(self, entry: dict[str, Any]) -> None:
        """Adds a document."""
        self._stream.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Ends the file; the table must be whole before its digest is taken."""
        self._stream.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_documents(chunks: Artifact) -> Iterator[dict[str, Any]]:
    """The lines of documents.jsonl, in order."""
    with (chunks.folder / DOCUMENTS).open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


class SourceText(NamedTuple):
    """A document and where it comes from. `number` is unique in all that is compared with each other."""

    number: int
    source: str
    record: int | None
    text: str


def document_texts(chunks: Artifact, tokenizer: Tokenizer) -> Iterator[SourceText]:
    """The documents of a chunk artifact in order, each put together from its tokens."""
    for entry in read_documents(chunks):
        rows = chunks["tokens"][entry["first_chunk"] : entry["first_chunk"] + entry["chunks"]]
        text = tokenizer.decode(rows[:, 1:].ravel().tolist())
        yield SourceText(entry["document"], entry["source"], entry["record"], text)


class Place(NamedTuple):
    """Where a chunk comes from: bytes `start` to `stop` (UTF-8) of a document, its `chunk`-th from 0."""

    document: int
    source: str
    record: int | None
    chunk: int
    start: int
    stop: int


def locate(chunks: Artifact, ids: Iterable[int]) -> list[Place]:
    """The places of the given chunks, in the order given; the document table is read once.

    Raises IndexError for an id that is not in the artifact, -1 included.
    """
    ids = list(ids)
    if ids and not 0 <= min(ids) <= max(ids) < chunks.rows:
        raise IndexError(f"chunks {min(ids)} to {max(ids)} of {chunks.rows} in {chunks.folder}")
    found: dict[int, Place] = {}
    wanted = iter(sorted(set(ids)))
    chunk = next(wanted, None)
    for entry in read_documents(chunks):
        if chunk is None:
            break
        while chunk is not None and chunk < entry["first_chunk"] + entry["chunks"]:
            found[chunk] = _place(chunks, chunk, entry)
            chunk = next(wanted, None)
    return [found[chunk] for chunk in ids]


def _place(chunks: Artifact, chunk: int, entry: dict[str, Any]) -> Place:
    first = entry["first_chunk"]
    sizes = chunks["bytes"][first : chunk + 1]
    stop = int(sizes.sum(dtype=np.int64))
    start = stop - int(sizes[-1])
    return Place(entry["document"], entry["source"], entry["record"], chunk - first, start, stop)


def chunk_text(tokenizer: Tokenizer, rows: IntArray) -> list[str]:
    """The texts of chunks' input tokens, rows (n, M): what is embedded, for stored and for new text alike.

    Special ids are left out, and so are the halves of characters that a byte-level tokenizer leaves at
    the edges of a chunk, and the mark of a word piece that goes on with a word of the chunk before.
    """
    texts = tokenizer.decode_batch(rows.tolist())
    return [text.removeprefix(tokenizer.continuing).strip("\ufffd") for text in texts]


def describe_rows(chunks: Artifact, rows: Iterable[int] | IntArray) -> dict[int, str]:
    """Where each chunk row comes from: source, record where there is one, and which chunk of it."""
    wanted = sorted({int(row) for row in rows})
    documents = dict(zip(wanted, chunks["documents"][np.array(wanted, dtype=np.int64)].tolist(), strict=True))
    entries = _document_entries(chunks, set(documents.values()))
    names = {}
    for row, document in documents.items():
        entry = entries[document]
        record = "" if entry["record"] is None else f", record {entry['record']}"
        names[row] = f"{entry['source']}{record}, chunk {row - entry['first_chunk'] + 1} of {entry['chunks']}"
    return names


def document_names(chunks: Artifact, documents: IntArray) -> dict[int, str]:
    """Where each of the documents comes from: source, and record where there is one."""
    return {
        number: entry["source"] + ("" if entry["record"] is None else f", record {entry['record']}")
        for number, entry in _document_entries(chunks, set(documents.tolist())).items()
    }


def _document_entries(chunks: Artifact, wanted: set[int]) -> dict[int, dict[str, Any]]:
    """The lines of documents.jsonl of the wanted documents, read one at a time."""
    entries = {entry["document"]: entry for entry in read_documents(chunks) if entry["document"] in wanted}
    if missing := wanted - entries.keys():
        raise DamagedArtifactError(
            f"{chunks.folder / DOCUMENTS}: no line for document {min(missing)}; run `dvc repro` (stage chunk)"
        )
    return entries
