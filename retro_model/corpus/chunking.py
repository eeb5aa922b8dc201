"""Cut documents into chunks: rows of token ids, none of which spans two documents.

A document's stream is s = [begin] + tokens + [end]; its chunk i is the row s[i*M : i*M + M + 1], padded on the
right. So `row[:-1]` is input and `row[1:]` is label, and each text token is a label exactly once. `end` never gets
a chunk of its own, which would be equal for all such documents: after a full last chunk it is a label only.

    data/chunks/train
        tokens-00000.npy      uint16 (int32 for more than 65,536 ids) (chunks, M + 1)
        documents-00000.npy   int32 (chunks,): the document's number, unique over all splits
        bytes-00000.npy       int32 (chunks,): UTF-8 bytes of text that the row's labels cover
        documents.jsonl       a line per document: its source, its first chunk, its number of chunks
        artifact.json         chunk length, special ids, the tokenizer's fingerprint, counts
"""

import hashlib
import json
import logging
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
from retro_model.core.progress import report_elapsed
from retro_model.corpus.chunks import DOCUMENTS, DocumentTable, SourceText, read_documents
from retro_model.corpus.documents import Corpus, CorpusConfig, Document
from retro_model.corpus.files import NameFilter
from retro_model.corpus.tokenizer import Encoded, Tokenizer, utf8_size
from retro_model.jobs.engine import Engine
from retro_model.jobs.job import Part, work_or_temporary

logger = logging.getLogger(__name__)

BATCH_BYTES = 1 << 20  # text tokenized at once; a longer document is a batch of its own
BATCH_DOCUMENTS = 1 << 12
PART_BYTES = 1 << 23  # text in one part of the job, which takes a second or two
PART_DOCUMENTS = 1 << 17
ROWS_PER_SHARD = 1 << 18


class HasText(Protocol):
    """Any object with a text."""

    @property
    def text(self) -> str:
        """The text."""


Text = TypeVar("Text", bound=HasText)


class Chunks(NamedTuple):
    """Chunk rows of several documents, in order. `counts` (documents,) is the number of rows of each document."""

    rows: npt.NDArray[np.int32]  # (n, M + 1)
    bytes: npt.NDArray[np.int32]  # (n,), UTF-8 bytes that the row's labels cover
    counts: npt.NDArray[np.int64]


def cut(encoded: Encoded, chunk_size: int, pad_id: int, begin_id: int, end_id: int) -> Chunks:
    """Cut every encoded text into chunk rows, and count the bytes that each row's labels cover."""
    lengths = np.diff(encoded.starts)
    counts = -(-(lengths + 1) // chunk_size)
    firsts = np.cumsum(counts) - counts
    stream = np.full(int(counts.sum()) * chunk_size, pad_id, np.int32)
    shift = firsts * chunk_size + 1 - encoded.starts[:-1]
    stream[np.arange(len(encoded.ids)) + np.repeat(shift, lengths)] = encoded.ids
    stream[firsts * chunk_size] = begin_id
    full = lengths + 1 == counts * chunk_size  # the last row's inputs are full, so `end` is only its last label
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
    positions = np.arange(len(texts)) - np.repeat(firsts, counts)
    covered = encoded.bytes_covered(texts, (positions + 1) * chunk_size)
    before = np.concatenate([[0], covered[:-1]])
    before[firsts] = 0
    sizes: npt.NDArray[np.int32] = (covered - before).astype(np.int32)
    return sizes


@dataclass(frozen=True)
class ChunkJob:
    """Turns documents into chunk rows, a batch of documents per part; see retro_model.jobs.job.

    A part holds the rows of all splits in reading order, and the split of each row.
    """

    tokenizer: Path
    chunk_size: int
    num_documents: int
    kind: ClassVar[str] = "chunks"
    uses_gpus: ClassVar[bool] = False

    def open(self) -> Tokenizer:
        """Load the tokenizer."""
        return Tokenizer.open(self.tokenizer)

    def facts(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return what readers of the rows need: chunk size, special ids, vocabulary size, tokenizer fingerprint."""
        return {"chunk_size": self.chunk_size, **tokenizer.facts(), "tokenizer": tokenizer.fingerprint}

    def make(self, tokenizer: Tokenizer, folder: Path, documents: list[Document], digest: str) -> Iterator[int]:
        """Write the rows of the documents that have a token, their lines in documents.jsonl, and counts."""
        token_type = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
        id_type = np.int32 if self.num_documents < 1 << 31 else np.int64
        totals = {split: Counter[str]() for split in SPLITS}
        with ArtifactWriter(folder, self.kind) as writer, DocumentTable(folder) as table:
            groups = list(batches(documents, BATCH_BYTES, BATCH_DOCUMENTS))
            texts = ([document.text for document in batch] for batch in groups)
            for batch, encoded in zip(groups, tokenizer.encode_batches(texts), strict=True):
                chunked = ChunkedDocuments.of(batch, encoded, tokenizer, self.chunk_size)
                splits = np.array([SPLITS.index(document.split) for document in batch], np.uint8)
                writer.append(**chunked.columns(token_type, id_type), splits=chunked.repeat_per_row(splits))
                for position, entry in chunked.entries():
                    table.append({**entry, "split": batch[position].split})
                for split, total in totals.items():
                    total.update(chunked.counts(splits == SPLITS.index(split)))
                yield len(batch)
            table.close()
            writer.add_file(DOCUMENTS)
            writer.facts.update(**self.facts(tokenizer), texts=digest, totals=totals)


@dataclass(frozen=True)
class ChunkedDocuments:
    """A batch of documents cut into chunk rows. Documents without a token are left out."""

    documents: Sequence[Document | SourceText]
    encoded: Encoded
    chunks: Chunks
    kept: BoolArray  # (documents,), whether a document has a token

    @classmethod
    def of(
        cls, documents: Sequence[Document | SourceText], encoded: Encoded, tokenizer: Tokenizer, chunk_size: int
    ) -> "ChunkedDocuments":
        """Cut encoded documents into rows."""
        chunks = cut(encoded, chunk_size, tokenizer.pad_id, tokenizer.begin_id, tokenizer.end_id)
        return cls(documents, encoded, chunks, np.diff(encoded.starts) > 0)

    def repeat_per_row(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Repeat each document's value, of `values` (documents,), for each of its rows; returns (rows,)."""
        return np.repeat(values[self.kept], self.chunks.counts[self.kept])

    def columns(self, token_type: npt.DTypeLike, id_type: npt.DTypeLike) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of a chunk artifact."""
        rows = np.repeat(self.kept, self.chunks.counts)
        numbers = np.array([document.number for document in self.documents], id_type)
        return {
            "tokens": self.chunks.rows[rows].astype(token_type),
            "documents": self.repeat_per_row(numbers),
            "bytes": self.chunks.bytes[rows],
        }

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each kept document's position in the batch and documents.jsonl entry, without `first_chunk`."""
        for position in np.flatnonzero(self.kept):
            document = self.documents[position]
            yield (
                position,
                {
                    "document": document.number,
                    "source": document.source,
                    "record": document.record,
                    "chunks": int(self.chunks.counts[position]),
                    "tokens": int(self.encoded.starts[position + 1] - self.encoded.starts[position]),
                    "bytes": int(self.encoded.sizes[position]),
                },
            )

    def counts(self, chosen: BoolArray) -> dict[str, int]:
        """Return totals over the documents of the mask `chosen` (documents,); those without a token count apart."""
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
    """Write a chunk artifact of documents outside the corpus, in the format that `make_chunks` writes for a split.

    Raises DocumentError if no document has a token.
    """
    totals: Counter[str] = Counter()
    token_type = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    with ArtifactWriter(folder, "chunks", ROWS_PER_SHARD) as writer:
        with DocumentTable(folder) as table:
            for batch in batches(texts, BATCH_BYTES):
                encoded = tokenizer.encode_batch([item.text for item in batch])
                chunked = ChunkedDocuments.of(batch, encoded, tokenizer, chunk_size)
                first = writer.rows
                for _, entry in chunked.entries():
                    table.append({**entry, "first_chunk": first})
                    first += entry["chunks"]
                writer.append(**chunked.columns(token_type, np.int64))
                totals.update(chunked.counts(np.ones(len(batch), dtype=bool)))
        if not writer.rows:
            raise DocumentError(f"the tokenizer {tokenizer.name} finds no token in the documents of {split}")
        writer.add_file(DOCUMENTS)
        facts = {"split": split, "chunk_size": chunk_size, "tokenizer": tokenizer.fingerprint}
        writer.facts.update(**facts, **tokenizer.facts())
        writer.facts.update({name: totals[name] for name in ("documents", "bytes", "lossy_documents")})
    return Artifact.open(folder, "chunks", verify=False)


class _SplitWriter:
    """Writes the chunk artifact of one split from the parts of the job."""

    def __init__(self, folder: Path, split: str) -> None:
        self.split = split
        self.writer = ArtifactWriter(folder, "chunks", ROWS_PER_SHARD)
        self.table = DocumentTable(folder)
        self.totals: Counter[str] = Counter()

    def append(self, part: Artifact, entries: list[dict[str, Any]]) -> None:
        """Append a part's rows of this split; `entries` are its documents.jsonl lines of this split."""
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
    name_filter: NameFilter | None = None,
) -> dict[str, float]:
    """Write the chunk artifacts of all splits below `folder` and return the stage's metrics.

    Memory holds a few parts of the text and what `Corpus` stores for each document and file. `engine` changes
    speed only. Parts in `work_folder` that an earlier run finished are reused. Files and folders that `name_filter`
    leaves out are not read. Prints what was read, what was dropped, and every file that is lost.

    Raises DocumentError if a split has no document with a token.
    """
    name = Tokenizer.open(tokenizer_folder).name
    corpus = Corpus(documents, corpus_config, name_filter)
    job = ChunkJob(tokenizer_folder.absolute(), chunk_size, corpus.num_readable)
    with (
        work_or_temporary(work_folder, folder) as work,
        whole_folder(folder) as whole,
        (engine or Engine()).open(job) as running,
        report_elapsed("chunk"),  # a part reports nothing while it encodes a long document
    ):
        totals = _write_splits(
            running.make(prefetch(_parts(corpus)), work), whole, running.facts, f"{corpus.path}", name
        )
    for line in corpus.report.lines():
        logger.warning(line)
    return _metrics(corpus, totals, chunk_size)


def _parts(corpus: Corpus) -> Iterator[Part]:
    for number, batch in enumerate(batches(corpus.documents(), PART_BYTES, PART_DOCUMENTS)):
        digest = hashlib.blake2b(digest_size=16)
        for document in batch:
            text = document.text.encode()
            digest.update(json.dumps([*document[:-1], len(text)]).encode() + text)
        yield Part(f"part-{number:06d}", (batch, digest.hexdigest()), {"texts": digest.hexdigest()})


def _write_splits(
    parts: Iterator[Artifact], folder: Path, facts: dict[str, Any], where: str, tokenizer: str
) -> dict[str, Counter[str]]:
    """Write folder/train, folder/valid and folder/test; return the counts of each split."""
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
    metrics: dict[str, float] = {**corpus.report.metrics()}
    metrics["documents_kept"] = everything["documents"]
    metrics["dropped_without_tokens"] = everything["without_tokens"]
    metrics["lossy_documents"] = everything["lossy_documents"]
    metrics["lossy_share"] = round(everything["lossy_documents"] / everything["documents"], 6)
    for split in SPLITS:
        for name in ("documents", "chunks", "tokens", "bytes"):
            metrics[f"{split}_{name}"] = totals[split][name]
    # The share of chunk inputs that are text tokens; the others are begin and padding.
    metrics["text_share"] = round(everything["tokens"] / (everything["chunks"] * chunk_size), 6)
    metrics["bytes_per_token"] = round(everything["bytes"] / everything["tokens"], 6)
    return metrics


def batches(
    texts: Iterable[Text], most_bytes: int = BATCH_BYTES, most_texts: int = BATCH_DOCUMENTS
) -> Iterator[list[Text]]:
    """Group the documents in order, up to `most_texts` and `most_bytes` of UTF-8 per batch, but at least one."""
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
