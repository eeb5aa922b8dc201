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

import json
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from retro_model.artifacts import SPLITS, Artifact, ArtifactWriter, whole_folder
from retro_model.documents import Corpus, CorpusConfig, Document
from retro_model.errors import DocumentError
from retro_model.tokenizer import Encoded, Tokenizer

TABLE = "documents.jsonl"
BATCH_CHARACTERS = 1 << 21  # of text in memory at once, unless one document is longer
BATCH_DOCUMENTS = 1 << 12
ROWS_PER_SHARD = 1 << 18

Item = TypeVar("Item")


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


class _SplitWriter:
    """The chunk artifact of one split while it grows."""

    def __init__(self, folder: Path, vocab_size: int, num_documents: int) -> None:
        self.writer = ArtifactWriter(folder, "chunks", ROWS_PER_SHARD)
        self.totals: Counter[str] = Counter()
        self._token_type = np.uint16 if vocab_size <= 1 << 16 else np.int32
        self._id_type = np.int32 if num_documents < 1 << 31 else np.int64

    def __enter__(self) -> "_SplitWriter":
        self.writer.__enter__()
        self._table = (self.writer.folder / TABLE).open("w", encoding="utf-8", newline="\n")
        return self

    def append(
        self, documents: Sequence[Document], encoded: Encoded, chunks: Chunks, chosen: npt.NDArray[np.bool_]
    ) -> None:
        """Adds the chosen documents of a batch; those without a single token are counted and left out."""
        lengths = np.diff(encoded.starts)
        kept = chosen & (lengths > 0)
        self._list_documents(documents, encoded, chunks, np.flatnonzero(kept))
        rows = np.repeat(kept, chunks.counts)
        numbers = np.array([document.number for document in documents], self._id_type)
        self.writer.append(
            tokens=chunks.rows[rows].astype(self._token_type),
            documents=np.repeat(numbers, chunks.counts)[rows],
            bytes=chunks.bytes[rows],
        )
        self.totals.update(
            documents=int(kept.sum()),
            chunks=int(rows.sum()),
            tokens=int(lengths[kept].sum()),
            bytes=int(encoded.sizes[kept].sum()),
            lossy_documents=int(encoded.lossy[kept].sum()),
            without_tokens=int((chosen & ~kept).sum()),
        )

    def _list_documents(
        self, documents: Sequence[Document], encoded: Encoded, chunks: Chunks, places: npt.NDArray[np.int64]
    ) -> None:
        first = self.writer.rows
        for place in places:
            num_chunks = int(chunks.counts[place])
            entry = {
                "document": documents[place].number,
                "source": documents[place].source,
                "record": documents[place].record,
                "first_chunk": first,
                "chunks": num_chunks,
                "tokens": int(encoded.starts[place + 1] - encoded.starts[place]),
                "bytes": int(encoded.sizes[place]),
            }
            self._table.write(json.dumps(entry, ensure_ascii=False) + "\n")
            first += num_chunks

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._table.close()
        if error is None:
            self.writer.add_file(TABLE)
        self.writer.__exit__(kind, error, trace)


def make_chunks(
    documents: Path | str,
    corpus_config: CorpusConfig,
    tokenizer_folder: Path,
    chunk_size: int,
    folder: Path,
) -> dict[str, float]:
    """Writes the chunk artifacts of all splits below `folder` and returns the counts of what was done.

    Memory is that of a few batches, however large the corpus is. Raises DocumentError where a split has
    no document to cut.
    """
    tokenizer = Tokenizer.open(tokenizer_folder)
    corpus = Corpus(documents, corpus_config)
    with whole_folder(folder) as whole:
        totals = chunk_documents(corpus, tokenizer, chunk_size, whole)
    for line in corpus.report.lines():
        print(line, flush=True)
    return _metrics(corpus, totals, chunk_size)


def chunk_documents(corpus: Corpus, tokenizer: Tokenizer, chunk_size: int, folder: Path) -> dict[str, Counter[str]]:
    """Writes folder/train, folder/valid and folder/test; counts by split."""
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(_SplitWriter(folder / split, tokenizer.vocab_size, corpus.num_readable))
            for split in SPLITS
        }
        for documents, encoded in _ahead(_encode(_ahead(_batches(corpus.documents())), tokenizer)):
            chunks = cut(encoded, chunk_size, tokenizer.pad_id, tokenizer.begin_id, tokenizer.end_id)
            splits = np.array([document.split for document in documents])
            for split, writer in writers.items():
                writer.append(documents, encoded, chunks, splits == split)
        for split, writer in writers.items():
            if not writer.totals["chunks"]:
                raise DocumentError(
                    f"{corpus.path}: the tokenizer {tokenizer.name} finds no token in the documents of "
                    f"{split}; add documents or choose another tokenizer.name"
                )
            writer.writer.facts.update(
                split=split,
                chunk_size=chunk_size,
                **tokenizer.facts(),
                tokenizer=tokenizer.fingerprint,
                documents=writer.totals["documents"],
                bytes=writer.totals["bytes"],
                lossy_documents=writer.totals["lossy_documents"],
            )
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


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        if batch and (characters + len(document.text) > BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS):
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += len(document.text)
    if batch:
        yield batch


def _encode(batches: Iterable[list[Document]], tokenizer: Tokenizer) -> Iterator[tuple[list[Document], Encoded]]:
    for batch in batches:
        yield batch, tokenizer.encode_batch([document.text for document in batch])


def _ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, the next one made in a thread while this one is used.

    Reading, checking and cutting are Python, encoding is not: side by side they use the cores that it leaves.
    """
    handover: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=1)
    stop = threading.Event()
    finished = object()

    def put(item: Any, error: BaseException | None = None) -> None:
        while not stop.is_set():
            try:
                return handover.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(finished)
        except BaseException as error:  # raised again where the items are used
            put(finished, error)

    thread = threading.Thread(target=make, name="documents", daemon=True)
    thread.start()
    try:
        while True:
            item, error = handover.get()
            if error is not None:
                raise error
            if item is finished:
                return
            yield item
    finally:
        stop.set()
        thread.join()


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
    the edges of a chunk.
    """
    return [text.strip("\ufffd") for text in tokenizer.decode_batch(rows.tolist())]
