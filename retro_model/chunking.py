"""Chunks: documents as rows of token ids, none of which spans two documents.

A document's stream is s = [begin] + tokens + [end]; its chunk i is the row s[i*M : i*M + M + 1], padded
on the right. So `row[:-1]` is input and `row[1:]` is label, each text token is a label once, and `end` is
a label only: it never makes a chunk of its own, which would equal every other document's last one.

    data/chunks/train
        tokens-00000.npy      uint16 (int32 beyond 65,536 ids) (chunks, M + 1)
        documents-00000.npy   int32 (chunks,): the document's number, unique over all splits
        bytes-00000.npy       int32 (chunks,): UTF-8 bytes of text that the row's labels cover
        documents.jsonl       a line a document: where it came from, its first chunk, how many it has
        artifact.json         chunk length, special ids, the tokenizer's fingerprint, counts
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from retro_model.ahead import ahead
from retro_model.artifacts import SPLITS, Artifact, ArtifactWriter, whole_folder
from retro_model.documents import Corpus, CorpusConfig, Document
from retro_model.engine import Engine, Part, work_or_temporary
from retro_model.errors import DocumentError
from retro_model.tokenizer import Encoded, Tokenizer, utf8_size

TABLE = "documents.jsonl"
BATCH_BYTES = 1 << 20  # of text that is tokenized at once, unless one document is longer
BATCH_DOCUMENTS = 1 << 12
PART_BYTES = 1 << 23  # of text that one part of the work has, a second or two of it
PART_DOCUMENTS = 1 << 17
ROWS_PER_SHARD = 1 << 18


class HasText(Protocol):
    """A document, or anything else with a text."""

    @property
    def text(self) -> str:
        """The text."""


Text = TypeVar("Text", bound=HasText)


class Chunks(NamedTuple):
    """Rows of several documents, in order. `counts` (documents,) says how many rows each one has."""

    rows: npt.NDArray[np.int32]  # (n, M + 1)
    bytes: npt.NDArray[np.int32]  # (n,)
    counts: npt.NDArray[np.int64]


def cut(encoded: Encoded, chunk_size: int, pad_id: int, begin_id: int, end_id: int) -> Chunks:
    """The chunk rows of every encoded text, and the bytes that each row's labels cover."""
    lengths = np.diff(encoded.starts)
    counts = -(-(lengths + 1) // chunk_size)
    firsts = np.cumsum(counts) - counts
    stream = np.full(int(counts.sum()) * chunk_size, pad_id, np.int32)
    shift = firsts * chunk_size + 1 - encoded.starts[:-1]
    stream[np.arange(len(encoded.ids)) + np.repeat(shift, lengths)] = encoded.ids
    stream[firsts * chunk_size] = begin_id
    full = lengths + 1 == counts * chunk_size  # where end falls behind the last input
    stream[(firsts * chunk_size + 1 + lengths)[~full]] = end_id

    rows = np.empty((int(counts.sum()), chunk_size + 1), np.int32)
    rows[:, :-1] = stream.reshape(-1, chunk_size)
    rows[:-1, -1] = rows[1:, 0]
    rows[firsts + counts - 1, -1] = np.where(full, end_id, pad_id)
    return Chunks(rows, _bytes_of_labels(encoded, counts, firsts, chunk_size), counts)


def _bytes_of_labels(
    encoded: Encoded, counts: npt.NDArray[np.int64], firsts: npt.NDArray[np.int64], chunk_size: int
) -> npt.NDArray[np.int32]:
    texts = np.repeat(np.arange(len(counts)), counts)
    places = np.arange(len(texts)) - np.repeat(firsts, counts)
    covered = encoded.bytes_covered(texts, (places + 1) * chunk_size)
    before = np.concatenate([[0], covered[:-1]])
    before[firsts] = 0
    sizes: npt.NDArray[np.int32] = (covered - before).astype(np.int32)
    return sizes


@dataclass(frozen=True)
class ChunkJob:
    """Turns documents into chunk rows, a batch of documents a part; see retro_model.engine.

    A part holds the rows of all splits in reading order, with the split of each row.
    """

    tokenizer: Path
    chunk_size: int
    num_documents: int
    kind: ClassVar[str] = "chunks"
    uses_gpus: ClassVar[bool] = False

    def open(self) -> Tokenizer:
        """The tokenizer."""
        return Tokenizer.open(self.tokenizer)

    def facts(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """What whoever reads the rows must know."""
        return {"chunk_size": self.chunk_size, **tokenizer.facts(), "tokenizer": tokenizer.fingerprint}

    def make(self, tokenizer: Tokenizer, folder: Path, documents: list[Document], digest: str) -> Iterator[int]:
        """The rows of the documents that have a token, and what is to say of them."""
        token_type = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
        id_type = np.int32 if self.num_documents < 1 << 31 else np.int64
        totals = {split: Counter[str]() for split in SPLITS}
        with ArtifactWriter(folder, self.kind) as writer, _Table(folder) as table:
            groups = list(batches(documents, BATCH_BYTES, BATCH_DOCUMENTS))
            texts = ([document.text for document in batch] for batch in groups)
            for batch, encoded in zip(groups, tokenizer.encode_batches(texts), strict=True):
                chunks = cut(encoded, self.chunk_size, tokenizer.pad_id, tokenizer.begin_id, tokenizer.end_id)
                places = np.array([SPLITS.index(document.split) for document in batch], np.uint8)
                kept = np.diff(encoded.starts) > 0
                rows = np.repeat(kept, chunks.counts)
                writer.append(
                    tokens=chunks.rows[rows].astype(token_type),
                    documents=np.repeat(np.array([document.number for document in batch], id_type), chunks.counts)[
                        rows
                    ],
                    bytes=chunks.bytes[rows],
                    splits=np.repeat(places, chunks.counts)[rows],
                )
                for place in np.flatnonzero(kept):
                    table.write(_entry(batch[place], encoded, chunks, place))
                for split, total in totals.items():
                    _count(total, encoded, chunks, kept, places == SPLITS.index(split))
                yield len(batch)
            table.close()
            writer.add_file(TABLE)
            writer.facts.update(**self.facts(tokenizer), texts=digest, totals=totals)


class _Table:
    """The file of documents, while it is written: a line of JSON each."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / TABLE

    def __enter__(self) -> "_Table":
        self._stream = self._path.open("w", encoding="utf-8", newline="\n")
        return self

    def write(self, entry: dict[str, Any]) -> None:
        """Adds a document."""
        self._stream.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Ends the file; the table must be whole before its digest is taken."""
        self._stream.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _entry(document: Document, encoded: Encoded, chunks: Chunks, place: int) -> dict[str, Any]:
    return {
        "document": document.number,
        "source": document.source,
        "record": document.record,
        "chunks": int(chunks.counts[place]),
        "tokens": int(encoded.starts[place + 1] - encoded.starts[place]),
        "bytes": int(encoded.sizes[place]),
        "split": document.split,
    }


def _count(
    total: Counter[str],
    encoded: Encoded,
    chunks: Chunks,
    kept: npt.NDArray[np.bool_],
    chosen: npt.NDArray[np.bool_],
) -> None:
    """Adds the chosen documents of a batch; those without a single token are counted and left out."""
    counted = kept & chosen
    total.update(
        documents=int(counted.sum()),
        chunks=int(chunks.counts[counted].sum()),
        tokens=int(np.diff(encoded.starts)[counted].sum()),
        bytes=int(encoded.sizes[counted].sum()),
        lossy_documents=int(encoded.lossy[counted].sum()),
        without_tokens=int((chosen & ~kept).sum()),
    )


class _SplitWriter:
    """The chunk artifact of one split, gathered from the parts."""

    def __init__(self, folder: Path, split: str) -> None:
        self.split = split
        self.writer = ArtifactWriter(folder, "chunks", ROWS_PER_SHARD)
        self.table = _Table(folder)
        self.totals: Counter[str] = Counter()

    def append(self, part: Artifact, entries: list[dict[str, Any]]) -> None:
        """Adds what a part has of this split."""
        first = self.writer.rows
        for entry in entries:
            self.table.write({**entry, "first_chunk": first})
            first += entry["chunks"]
        rows = part["splits"][:] == SPLITS.index(self.split)
        self.writer.append(**{name: part[name][:][rows] for name in ("tokens", "documents", "bytes")})
        self.totals.update(part.facts["totals"][self.split])


def make_chunks(
    documents: Path | str,
    corpus_config: CorpusConfig,
    tokenizer_folder: Path,
    chunk_size: int,
    folder: Path,
    *,
    engine: Engine | None = None,
    work_folder: Path | None = None,
) -> dict[str, float]:
    """Writes the chunk artifacts of all splits below `folder` and returns the counts of what was done.

    Memory is that of a few parts of the text, beside what `Corpus` knows of each document and file. `engine`
    changes speed only; what was finished before a kill is found again in `work_folder`.

    Raises DocumentError where a split has no document to cut.
    """
    name = Tokenizer.open(tokenizer_folder).name
    corpus = Corpus(documents, corpus_config)
    job = ChunkJob(tokenizer_folder.absolute(), chunk_size, corpus.num_readable)
    with (
        work_or_temporary(work_folder, folder) as work,
        whole_folder(folder) as whole,
        (engine or Engine()).open(job) as running,
    ):
        totals = _gather(running.make(ahead(_parts(corpus)), work), whole, running.facts, f"{corpus.path}", name)
    for line in corpus.report.lines():
        print(line, flush=True)
    return _metrics(corpus, totals, chunk_size)


def _parts(corpus: Corpus) -> Iterator[Part]:
    for number, batch in enumerate(batches(corpus.documents(), PART_BYTES, PART_DOCUMENTS)):
        digest = hashlib.blake2b(digest_size=16)
        for document in batch:
            text = document.text.encode()
            digest.update(json.dumps([*document[:-1], len(text)]).encode() + text)
        yield Part(f"part-{number:06d}", (batch, digest.hexdigest()), {"texts": digest.hexdigest()})


def _gather(
    parts: Iterator[Artifact], folder: Path, facts: dict[str, Any], where: str, tokenizer: str
) -> dict[str, Counter[str]]:
    """Writes folder/train, folder/valid and folder/test; counts by split."""
    with ExitStack() as stack:
        writers = {split: _SplitWriter(folder / split, split) for split in SPLITS}
        for writer in writers.values():
            stack.enter_context(writer.writer)
            stack.enter_context(writer.table)
        for part in parts:
            entries: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
            with (part.folder / TABLE).open(encoding="utf-8") as table:
                for line in table:
                    entry = json.loads(line)
                    entries[entry.pop("split")].append(entry)
            for split, writer in writers.items():
                writer.append(part, entries[split])
        for split, writer in writers.items():
            if not writer.totals["chunks"]:
                raise DocumentError(
                    f"{where}: the tokenizer {tokenizer} finds no token in the documents of {split}; "
                    "add documents or choose another tokenizer.name"
                )
            writer.table.close()
            writer.writer.add_file(TABLE)
            counts = {name: writer.totals[name] for name in ("documents", "bytes", "lossy_documents")}
            writer.writer.facts.update(split=split, **facts, **counts)
    return {split: writer.totals for split, writer in writers.items()}


def _metrics(corpus: Corpus, totals: dict[str, Counter[str]], chunk_size: int) -> dict[str, float]:
    everything = sum(totals.values(), Counter())
    figures: dict[str, float] = {**corpus.report.metrics()}
    figures["documents_kept"] = everything["documents"]
    figures["dropped_without_tokens"] = everything["without_tokens"]
    figures["lossy_documents"] = everything["lossy_documents"]
    figures["lossy_share"] = round(everything["lossy_documents"] / everything["documents"], 6)
    for split in SPLITS:
        for name in ("documents", "chunks", "tokens", "bytes"):
            figures[f"{split}_{name}"] = totals[split][name]
    # A chunk's inputs are begin, tokens and padding; what is neither is text.
    figures["text_share"] = round(everything["tokens"] / (everything["chunks"] * chunk_size), 6)
    figures["bytes_per_token"] = round(everything["bytes"] / everything["tokens"], 6)
    return figures


def batches(
    texts: Iterable[Text], most_bytes: int = BATCH_BYTES, most_texts: int = BATCH_DOCUMENTS
) -> Iterator[list[Text]]:
    """The documents in order, some at a time: as many as have that many UTF-8 bytes, one at least."""
    batch: list[Text] = []
    total = 0
    for item in texts:
        size = utf8_size(item.text)
        if batch and (total + size > most_bytes or len(batch) == most_texts):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch


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
    with (chunks.folder / TABLE).open(encoding="utf-8") as table:
        for line in table:
            if chunk is None:
                break
            entry = json.loads(line)
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


def chunk_text(tokenizer: Tokenizer, rows: npt.NDArray[np.integer[Any]]) -> list[str]:
    """The texts of chunks' input tokens, rows (n, M): what is embedded, for stored and for new text alike.

    Special ids are left out, and so are the halves of characters that a byte-level tokenizer leaves at
    the edges of a chunk, and the mark of a word piece that goes on with a word of the chunk before.
    """
    texts = tokenizer.decode_batch(rows.tolist())
    return [text.removeprefix(tokenizer.continuing).strip("\ufffd") for text in texts]
