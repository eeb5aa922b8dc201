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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import BoolArray
from retro_model.core.artifacts import SPLITS, Artifact, ArtifactWriter, whole_folder
from retro_model.core.errors import DocumentError
from retro_model.core.prefetch import prefetch
from retro_model.corpus.chunks import DOCUMENTS, DocumentTable, SourceText, read_documents
from retro_model.corpus.documents import Corpus, CorpusConfig, Document
from retro_model.corpus.tokenizer import Encoded, Tokenizer, utf8_size
from retro_model.jobs.engine import Engine, Part, work_or_temporary

BATCH_BYTES = 1 << 20  # of text that is tokenized at once, unless one document is longer
BATCH_DOCUMENTS = 1 << 12
PART_BYTES = 1 << 23  # of text that one part of the work has, a second or two of it
PART_DOCUMENTS = 1 << 17
ROWS_PER_SHARD = 1 << 18


class HasText(Protocol):
    """Anything with a text."""

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
    """Turns documents into chunk rows, a batch of documents a part; see retro_model.jobs.engine.

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
        with ArtifactWriter(folder, self.kind) as writer, DocumentTable(folder) as table:
            groups = list(batches(documents, BATCH_BYTES, BATCH_DOCUMENTS))
            texts = ([document.text for document in batch] for batch in groups)
            for batch, encoded in zip(groups, tokenizer.encode_batches(texts), strict=True):
                made = CutDocuments.of(batch, encoded, tokenizer, self.chunk_size)
                splits = np.array([SPLITS.index(document.split) for document in batch], np.uint8)
                writer.append(**made.columns(token_type, id_type), splits=made.per_row(splits))
                for place, entry in made.entries():
                    table.append({**entry, "split": batch[place].split})
                for split, total in totals.items():
                    total.update(made.counts(splits == SPLITS.index(split)))
                yield len(batch)
            table.close()
            writer.add_file(DOCUMENTS)
            writer.facts.update(**self.facts(tokenizer), texts=digest, totals=totals)


@dataclass(frozen=True)
class CutDocuments:
    """A batch of documents as chunk rows. Documents without a single token have none."""

    documents: Sequence[Document | SourceText]
    encoded: Encoded
    chunks: Chunks
    kept: BoolArray  # (documents,)

    @classmethod
    def of(
        cls, documents: Sequence[Document | SourceText], encoded: Encoded, tokenizer: Tokenizer, chunk_size: int
    ) -> "CutDocuments":
        """The rows of encoded documents."""
        chunks = cut(encoded, chunk_size, tokenizer.pad_id, tokenizer.begin_id, tokenizer.end_id)
        return cls(documents, encoded, chunks, np.diff(encoded.starts) > 0)

    def per_row(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A value for each document (documents,), repeated for each of its rows."""
        return np.repeat(values[self.kept], self.chunks.counts[self.kept])

    def columns(self, token_type: npt.DTypeLike, id_type: npt.DTypeLike) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a chunk artifact."""
        rows = np.repeat(self.kept, self.chunks.counts)
        numbers = np.array([document.number for document in self.documents], id_type)
        return {
            "tokens": self.chunks.rows[rows].astype(token_type),
            "documents": self.per_row(numbers),
            "bytes": self.chunks.bytes[rows],
        }

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """For each document that has rows its place in the batch and its line in documents.jsonl, but `first_chunk`."""
        for place in np.flatnonzero(self.kept):
            document = self.documents[place]
            yield (
                place,
                {
                    "document": document.number,
                    "source": document.source,
                    "record": document.record,
                    "chunks": int(self.chunks.counts[place]),
                    "tokens": int(self.encoded.starts[place + 1] - self.encoded.starts[place]),
                    "bytes": int(self.encoded.sizes[place]),
                },
            )

    def counts(self, chosen: BoolArray) -> dict[str, int]:
        """What the chosen documents (documents,) have in all; those without a token are counted apart."""
        counted = self.kept & chosen
        return {
            "documents": int(counted.sum()),
            "chunks": int(self.chunks.counts[counted].sum()),
            "tokens": int(np.diff(self.encoded.starts)[counted].sum()),
            "bytes": int(self.encoded.sizes[counted].sum()),
            "lossy_documents": int(self.encoded.lossy[counted].sum()),
            "without_tokens": int((chosen & ~self.kept).sum()),
        }


def write_chunks(
    folder: Path, split: str, texts: Iterable[SourceText], tokenizer: Tokenizer, chunk_size: int
) -> Artifact:
    """The chunk artifact of documents that are in no split of the corpus, as `make_chunks` writes one for a split.

    Raises DocumentError where the documents have not a single token.
    """
    totals: Counter[str] = Counter()
    token_type = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    with ArtifactWriter(folder, "chunks", ROWS_PER_SHARD) as writer:
        with DocumentTable(folder) as table:
            for batch in batches(texts, BATCH_BYTES):
                encoded = tokenizer.encode_batch([item.text for item in batch])
                made = CutDocuments.of(batch, encoded, tokenizer, chunk_size)
                first = writer.rows
                for _, entry in made.entries():
                    table.append({**entry, "first_chunk": first})
                    first += entry["chunks"]
                writer.append(**made.columns(token_type, np.int64))
                totals.update(made.counts(np.ones(len(batch), dtype=bool)))
        if not writer.rows:
            raise DocumentError(f"the tokenizer {tokenizer.name} finds no token in the documents of {split}")
        writer.add_file(DOCUMENTS)
        facts = {"split": split, "chunk_size": chunk_size, "tokenizer": tokenizer.fingerprint}
        writer.facts.update(**facts, **tokenizer.facts())
        writer.facts.update({name: totals[name] for name in ("documents", "bytes", "lossy_documents")})
    return Artifact.open(folder, "chunks", verify=False)


class _SplitWriter:
    """The chunk artifact of one split, gathered from the parts."""

    def __init__(self, folder: Path, split: str) -> None:
        self.split = split
        self.writer = ArtifactWriter(folder, "chunks", ROWS_PER_SHARD)
        self.table = DocumentTable(folder)
        self.totals: Counter[str] = Counter()

    def append(self, part: Artifact, entries: list[dict[str, Any]]) -> None:
        """Adds what a part has of this split."""
        first = self.writer.rows
        for entry in entries:
            self.table.append({**entry, "first_chunk": first})
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
        totals = _gather(running.make(prefetch(_parts(corpus)), work), whole, running.facts, f"{corpus.path}", name)
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
            for entry in read_documents(part):
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
            writer.writer.add_file(DOCUMENTS)
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
