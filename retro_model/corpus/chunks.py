"""Map the rows of a chunk artifact to their documents and text.

`documents.jsonl`, or a file `documents-00000.jsonl` for each shard, has a line for each document: its number, source,
record in that source, and number of chunks, tokens and bytes. A shard's numbers are local to it, and readers add the
shard's offset. Only this module writes and reads these files.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from retro_model.core.arrays import IntArray
from retro_model.core.artifacts import Artifact, numbered
from retro_model.core.errors import DamagedArtifactError
from retro_model.core.printable import one_line
from retro_model.corpus.tokenizer import Tokenizer

DOCUMENTS = "documents.jsonl"


class DocumentTable:
    """Writes documents.jsonl, a line of JSON for each document."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / DOCUMENTS

    def __enter__(self) -> "DocumentTable":
        self._stream = self._path.open("w", encoding="utf-8", newline="\n")
        return self

    def append(self, entry: dict[str, Any]) -> None:
        """Append a document's line."""
        self._stream.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Close the file. Call this before computing the file's digest."""
        self._stream.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_documents(chunks: Artifact) -> Iterator[dict[str, Any]]:
    """Yield the entries of all documents, in order, each with its number in the artifact and its `first_chunk`."""
    tables = [(DOCUMENTS, 0)]
    if DOCUMENTS not in chunks.files:
        offsets = chunks["documents"].offsets or []
        tables = [(numbered(DOCUMENTS, number), offset) for number, offset in enumerate(offsets)]
    first = 0
    for name, offset in tables:
        with (chunks.folder / name).open(encoding="utf-8") as lines:
            for entry in map(json.loads, lines):
                yield {**entry, "document": entry["document"] + offset, "first_chunk": first}
                first += entry["chunks"]


class SourceText(NamedTuple):
    """A document and its source. `number` is unique among all documents that are compared with each other."""

    number: int
    source: str
    record: int | None
    text: str


def document_texts(chunks: Artifact, tokenizer: Tokenizer) -> Iterator[SourceText]:
    """Yield the documents of a chunk artifact in order, each decoded from its tokens."""
    for entry in read_documents(chunks):
        rows = chunks["tokens"][entry["first_chunk"] : entry["first_chunk"] + entry["chunks"]]
        text = tokenizer.decode(rows[:, 1:].ravel().tolist())
        yield SourceText(entry["document"], entry["source"], entry["record"], text)


class Place(NamedTuple):
    """A chunk's place in its document: UTF-8 bytes `start` to `stop`, chunk number `chunk` counted from 0."""

    document: int
    source: str
    record: int | None
    chunk: int
    start: int
    stop: int


def locate(chunks: Artifact, ids: Iterable[int]) -> list[Place]:
    """Return the places of the given chunks, in the given order; reads documents.jsonl once.

    Raises IndexError for an id that is not in the artifact, including -1.
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
    """Return the text of each chunk from its input tokens, rows (n, M). This is the text that is embedded.

    Omits special ids, the partial characters that a byte-level tokenizer leaves at a chunk's edges, and the prefix
    (`##`) of a leading word piece that continues a word of the previous chunk.
    """
    texts = tokenizer.decode_batch(rows.tolist())
    return [text.removeprefix(tokenizer.continuation_prefix).strip("\ufffd") for text in texts]


def describe_rows(chunks: Artifact, rows: Iterable[int] | IntArray) -> dict[int, str]:
    """Return a printable description of each chunk row's place: document and chunk number."""
    wanted = sorted({int(row) for row in rows})
    documents = dict(zip(wanted, chunks["documents"][np.array(wanted, dtype=np.int64)].tolist(), strict=True))
    entries = _document_entries(chunks, set(documents.values()))
    names = {}
    for row, document in documents.items():
        entry = entries[document]
        names[row] = f"{_name(entry)}, chunk {row - entry['first_chunk'] + 1} of {entry['chunks']}"
    return names


def document_names(chunks: Artifact, documents: IntArray) -> dict[int, str]:
    """Return a printable name for each of the documents: its source, and its record if there is one."""
    return {number: _name(entry) for number, entry in _document_entries(chunks, set(documents.tolist())).items()}


def _name(entry: dict[str, Any]) -> str:
    record = "" if entry["record"] is None else f", record {entry['record']}"
    return one_line(f"{entry['source']}{record}")


def _document_entries(chunks: Artifact, wanted: set[int]) -> dict[int, dict[str, Any]]:
    """Return the documents.jsonl entries of the wanted documents, by number.

    Raises DamagedArtifactError if one is missing.
    """
    entries = {entry["document"]: entry for entry in read_documents(chunks) if entry["document"] in wanted}
    if missing := wanted - entries.keys():
        raise DamagedArtifactError(
            f"{chunks.folder / DOCUMENTS}: no line for document {min(missing)}; run `dvc repro` (stage chunk)"
        )
    return entries
