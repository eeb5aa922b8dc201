"""Cut documents into chunks: rows of token ids, none of which spans two documents.

A document's stream is s = [begin] + tokens + [end]; its chunk i is the row s[i*M : i*M + M + 1], padded on the
right. So `row[:-1]` is input and `row[1:]` is label, and each text token is a label exactly once. `end` never gets
a chunk of its own, which would be equal for all such documents: after a full last chunk it is a label only.

    data/chunks/train
        tokens-00000.npy      uint16 (int32 for more than 65,536 ids) (chunks, M + 1)
        documents-00000.npy   int32 (chunks,): the document's number within its shard
        bytes-00000.npy       int32 (chunks,): UTF-8 bytes of text that the row's labels cover
        documents-00000.jsonl a line per document of the shard: its source, its number of chunks
        artifact.json         chunk length, special ids, the tokenizer's fingerprint, counts

A shard holds a block: documents of one split that follow each other. A block ends where a document's hash says so, so
a document that is added, changed or removed changes one or two shards and renumbers the others. Shards are parts of the
job that are kept (retro_model.jobs.parts): their content is the documents, so only new documents are tokenized.
"""

import hashlib
import json
import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from retro_model.core.artifacts import SPLITS, Artifact, ArtifactWriter, whole_folder
from retro_model.core.errors import DocumentError
from retro_model.core.prefetch import prefetch
from retro_model.core.progress import report_elapsed
from retro_model.corpus.chunks import DOCUMENTS, DocumentTable, SourceText, read_documents
from retro_model.corpus.documents import Corpus, CorpusConfig, Document
from retro_model.corpus.files import NameFilter
from retro_model.corpus.tokenizer import Encoded, Tokenizer, utf8_size
from retro_model.jobs.engine import Engine
from retro_model.jobs.job import Part
from retro_model.jobs.parts import (
    SETTINGS,
    KeptParts,
    Keys,
    Parts,
    Source,
    code_digest,
    intact,
    keys_of,
    open_parts,
    settings_digest,
    write_keys,
)

logger = logging.getLogger(__name__)

BATCH_BYTES = 1 << 20  # text tokenized at once; a longer document is a batch of its own
BATCH_DOCUMENTS = 1 << 12
ROWS_PER_SHARD = 1 << 14  # of chunks that are written for one evaluation; their shards do not depend on the text

# A block has about 2^16 bytes of text, which are 250 chunks of 64 tokens, in a corpus of up to MOST_BLOCKS such
# blocks. With twice the text, blocks are twice as large, up to the largest.
LEAST_BLOCK_BYTES = 1 << 16
LARGEST_BLOCK_BYTES = 1 << 26
MOST_BLOCKS = 1 << 10

# What decides the bytes of a part, besides its documents.
CODE = ("retro_model.corpus",)
LIBRARIES = ("tokenizers", "numpy")
CODE_DIGEST = code_digest(*CODE)

COLUMNS = ("tokens", "documents", "bytes")

# Document numbers of a split are this far apart and begin with the split's position, so no two splits share a number
# and none depends on how many documents the other splits have.
NUMBER_STEP = len(SPLITS)


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


class DocumentChunks(NamedTuple):
    """The chunk rows of one document."""

    rows: npt.NDArray[Any]  # (n, M + 1), of the type that an artifact stores
    bytes: npt.NDArray[np.int32]  # (n,)
    num_tokens: int
    lossy: bool

    def entry(self, document: Document | SourceText, number: int) -> dict[str, Any]:
        """Return the document's line in the table of documents."""
        return {
            "document": number,
            "source": document.source,
            "record": document.record,
            "chunks": len(self.rows),
            "tokens": self.num_tokens,
            "bytes": int(self.bytes.sum(dtype=np.int64)),
            "lossy": self.lossy,
        }


def chunk_texts(encoded: Encoded, tokenizer: Tokenizer, chunk_size: int) -> Iterator[DocumentChunks | None]:
    """Yield the rows of each encoded text, None for a text without a token."""
    chunks = cut(encoded, chunk_size, tokenizer.pad_id, tokenizer.begin_id, tokenizer.end_id)
    rows = chunks.rows.astype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    ends, lengths = np.cumsum(chunks.counts).tolist(), np.diff(encoded.starts).tolist()
    for end, num, length, lossy in zip(ends, chunks.counts.tolist(), lengths, encoded.lossy.tolist(), strict=True):
        yield DocumentChunks(rows[end - num : end], chunks.bytes[end - num : end], length, lossy) if length else None


def count(chunked: Iterable[DocumentChunks | None]) -> Counter[str]:
    """Return totals over documents; those without a token count apart."""
    totals: Counter[str] = Counter()
    for document in chunked:
        if document is None:
            totals["without_tokens"] += 1
            continue
        totals["documents"] += 1
        totals["chunks"] += len(document.rows)
        totals["tokens"] += document.num_tokens
        totals["bytes"] += int(document.bytes.sum(dtype=np.int64))
        totals["lossy_documents"] += document.lossy
    return totals


@dataclass(frozen=True)
class ChunkJob:
    """Turns blocks of documents into chunk rows; see retro_model.jobs.job."""

    tokenizer: Path
    chunk_size: int
    kind: ClassVar[str] = "chunks"
    uses_gpus: ClassVar[bool] = False

    def open(self) -> Tokenizer:
        """Load the tokenizer."""
        return Tokenizer.open(self.tokenizer)

    def facts(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return what readers of the rows need: chunk size, special ids, vocabulary size, tokenizer fingerprint."""
        facts = {"chunk_size": self.chunk_size, **tokenizer.facts(), "tokenizer": tokenizer.fingerprint}
        return {**facts, SETTINGS: settings_digest(CODE_DIGEST, LIBRARIES, facts)}

    def make(
        self,
        tokenizer: Tokenizer,
        folder: Path,
        documents: list[Document],
        sources: list[Source],
        facts: dict[str, Any],
    ) -> Iterator[int]:
        """Write the rows of the documents that have a token, their lines in documents.jsonl, and counts.

        What the parts `sources` hold of the documents is taken from there.
        """
        keys = _keys_of(documents)
        found: dict[int, DocumentChunks | None] = dict(_chunked_before(sources, folder.parent, keys))
        missing = [position for position in range(len(documents)) if position not in found]
        groups = list(batches([documents[position] for position in missing], BATCH_BYTES, BATCH_DOCUMENTS))
        texts = ([document.text for document in batch] for batch in groups)
        positions = iter(missing)
        for batch, encoded in zip(groups, tokenizer.encode_batches(texts), strict=True):
            for made in chunk_texts(encoded, tokenizer, self.chunk_size):
                found[next(positions)] = made
            yield len(batch)
        chunked = [found[position] for position in range(len(documents))]
        totals = count(chunked)
        with ArtifactWriter(folder, self.kind, max(totals["chunks"], 1)) as writer:
            with DocumentTable(folder) as table:
                _append(writer, table, documents, chunked, range(0, NUMBER_STEP * len(chunked), NUMBER_STEP), np.int32)
            writer.add_file(DOCUMENTS)
            write_keys(writer, keys[[made is not None for made in chunked]])
            writer.facts.update(**self.facts(tokenizer), **facts, totals=totals)


def _keys_of(documents: Iterable[Document]) -> Keys:
    return keys_of(document.text.encode() for document in documents)


def _chunked_before(sources: list[Source], folder: Path, keys: Keys) -> Iterator[tuple[int, DocumentChunks]]:
    """Yield the positions and the rows of documents that finished parts hold."""
    for part, source in intact(sources, folder, ChunkJob.kind, keys):
        entries, tokens, sizes = list(read_documents(part)), part["tokens"][:], part["bytes"][:]
        for item, place in zip(source.items.tolist(), source.places.tolist(), strict=True):
            entry = entries[item]
            rows = slice(entry["first_chunk"], entry["first_chunk"] + entry["chunks"])
            yield place, DocumentChunks(tokens[rows], sizes[rows], entry["tokens"], entry["lossy"])


def _append(
    writer: ArtifactWriter,
    table: DocumentTable,
    documents: Sequence[Document | SourceText],
    chunked: Sequence[DocumentChunks | None],
    numbers: Sequence[int],
    number_type: npt.DTypeLike,
) -> None:
    """Append the documents that have a token; the first one gets the first number."""
    kept = [(document, rows) for document, rows in zip(documents, chunked, strict=True) if rows is not None]
    if not kept:
        return
    numbers = numbers[: len(kept)]
    for (document, rows), number in zip(kept, numbers, strict=True):
        table.append(rows.entry(document, number))
    writer.append(
        tokens=np.concatenate([rows.rows for _, rows in kept]),
        documents=np.repeat(np.array(numbers, number_type), [len(rows.rows) for _, rows in kept]),
        bytes=np.concatenate([rows.bytes for _, rows in kept]),
    )


def write_chunks(
    folder: Path, split: str, texts: Iterable[SourceText], tokenizer: Tokenizer, chunk_size: int
) -> Artifact:
    """Write a chunk artifact of documents outside the corpus, which keep their numbers.

    Raises DocumentError if no document has a token.
    """
    totals: Counter[str] = Counter()
    with ArtifactWriter(folder, "chunks", ROWS_PER_SHARD) as writer:
        with DocumentTable(folder) as table:
            for batch in batches(texts, BATCH_BYTES):
                encoded = tokenizer.encode_batch([item.text for item in batch])
                chunked = list(chunk_texts(encoded, tokenizer, chunk_size))
                numbers = [item.number for item, rows in zip(batch, chunked, strict=True) if rows is not None]
                _append(writer, table, batch, chunked, numbers, np.int64)
                totals.update(count(chunked))
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
        self.writer = ArtifactWriter(folder, "chunks")
        self.totals: Counter[str] = Counter()
        self._position = SPLITS.index(split)

    def adopt(self, part: Artifact) -> None:
        """Take a part over as the next shard."""
        first = self._position + NUMBER_STEP * self.totals["documents"]
        self.writer.adopt(part, COLUMNS, files=[DOCUMENTS], offsets={"documents": first})
        self.totals.update(part.facts["totals"])


def make_chunks(
    documents: Path | str,
    corpus_config: CorpusConfig,
    tokenizer_folder: Path,
    chunk_size: int,
    folder: Path,
    *,
    engine: Engine | None = None,
    parts: Parts | None = None,
    name_filter: NameFilter | None = None,
) -> dict[str, float]:
    """Write the chunk artifacts of all splits below `folder` and return the stage's metrics.

    Memory holds a few blocks of the text and what `Corpus` stores for each document and file. `engine` changes
    speed only. Documents that are in `parts` already are not tokenized again. Files and folders that `name_filter`
    leaves out are not read. Prints what was read, what was dropped, and every file that is lost.

    Raises DocumentError if a split has no document with a token.
    """
    name = Tokenizer.open(tokenizer_folder).name
    corpus = Corpus(documents, corpus_config, name_filter)
    job = ChunkJob(tokenizer_folder.absolute(), chunk_size)
    with (
        open_parts(parts, job.kind, folder) as work,
        whole_folder(folder) as whole,
        (engine or Engine()).open(job) as running,
        report_elapsed("chunk"),  # a part reports nothing while it encodes a long document
    ):
        facts = {name: fact for name, fact in running.facts.items() if name != SETTINGS}
        kept = KeptParts(work, job.kind, running.facts[SETTINGS])
        splits: deque[str] = deque()  # of the parts that are being made, in their order
        made = running.make(prefetch(_parts(corpus, kept, splits)), work)
        totals = _write_splits(((splits.popleft(), part) for part in made), whole, facts)
        for split, counts in totals.items():
            if not counts["chunks"]:
                raise DocumentError(
                    f"{corpus.path}: the tokenizer {name} finds no token in the documents of {split}; "
                    "add documents or choose another tokenizer.name"
                )
    for line in corpus.report.lines():
        logger.warning(line)
    logger.info(f"chunk: {kept.made:,} of {kept.wanted:,} documents tokenized, the others were there")
    return _metrics(corpus, totals, chunk_size)


def _parts(corpus: Corpus, kept: KeptParts, splits: deque[str]) -> Iterator[Part]:
    for block in blocks(corpus.documents(), block_bytes(corpus.num_bytes)):
        keys = _keys_of(block)
        sources = json.dumps([(document.source, document.record) for document in block])
        content = hashlib.sha256(keys.tobytes() + sources.encode()).hexdigest()
        splits.append(block[0].split)
        yield kept.part(content, (block,), len(block), partial(_keys_of, block))


def block_bytes(corpus_bytes: int) -> int:
    """Return about how many bytes of text a block has: a power of two that depends on the corpus's size alone."""
    size = LEAST_BLOCK_BYTES
    while size * MOST_BLOCKS < corpus_bytes and size < LARGEST_BLOCK_BYTES:
        size *= 2
    return size


def blocks(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Group the documents of each split, in order, into blocks of about `size` bytes: half of that to twice as much.

    From half the size on, a block ends after a document whose hash is small: the longer the document, the larger the
    hash may be. So where blocks end depends on the documents nearby, and a document that is added or removed moves at
    most the next ends. Ends of blocks of twice the size are among them. A longer document is a block of its own.
    """
    open_blocks: dict[str, list[Document]] = {split: [] for split in SPLITS}
    filled = dict.fromkeys(SPLITS, 0)
    for document in documents:
        split, text = document.split, document.text.encode()
        if open_blocks[split] and filled[split] + len(text) > 2 * size:
            yield open_blocks[split]
            open_blocks[split], filled[split] = [], 0
        open_blocks[split].append(document)
        filled[split] += len(text)
        share = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2.0**64
        if filled[split] >= size / 2 and share < len(text) / (size / 2):
            yield open_blocks[split]
            open_blocks[split], filled[split] = [], 0
    yield from filter(None, open_blocks.values())


def _write_splits(
    parts: Iterator[tuple[str, Artifact]], folder: Path, facts: dict[str, Any]
) -> dict[str, Counter[str]]:
    """Write folder/train, folder/valid and folder/test from (split, part); return the counts of each split."""
    with ExitStack() as stack:
        writers = {split: _SplitWriter(folder / split, split) for split in SPLITS}
        for writer in writers.values():
            stack.enter_context(writer.writer)
        for split, part in parts:
            writers[split].adopt(part)
        for split, writer in writers.items():
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
