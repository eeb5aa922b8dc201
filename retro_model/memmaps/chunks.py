"""A folder of text as raw memory maps: chunk rows, sequence starts and document numbers."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import IntArray
from retro_model.core.artifacts import one_at_a_time, whole_files
from retro_model.core.errors import ConfigError, DocumentError
from retro_model.corpus.chunking import batches, cut
from retro_model.corpus.documents import CorpusConfig
from retro_model.corpus.readers import FLAWS, Entry, matching_files, read_entries
from retro_model.memmaps.encoder import AnyPath, open_tokenizer
from retro_model.memmaps.files import check_counts, check_seq_len

TEXT_FIELD = "text"  # of records


class _Reader:
    """The documents of a folder, in the order of their paths; counts what is no document."""

    def __init__(self, folder: Path, glob: str, separator: str | None) -> None:
        self.folder, self._separator = folder, separator
        self.files = matching_files(folder, glob)
        self.left_out: Counter[str] = Counter()
        self.example = ""

    def batches(self) -> Iterator[list[str]]:
        """Texts of documents, some at a time."""
        for batch in batches(self._entries()):
            yield [entry.text for entry in batch]

    def _entries(self) -> Iterator[Entry]:
        for file in self.files:
            source = file.relative_to(self.folder).as_posix()
            for entry in read_entries(file, source, TEXT_FIELD, self._separator):
                if not entry.flaw:
                    yield entry
                    continue
                self.left_out[entry.flaw] += entry.times
                self.example = self.example or f"{entry.place}{f' ({entry.detail})' if entry.detail else ''}"

    def report(self) -> str:
        """What was left out, and the first of it."""
        counts = ", ".join(f"{count:,} {FLAWS[flaw]}" for flaw, count in sorted(self.left_out.items()))
        return f"{counts}; first: {self.example}" if self.example else counts


def text_folder_to_chunks_(
    *,
    folder: AnyPath,
    chunks_memmap_path: AnyPath,
    seqs_memmap_path: AnyPath,
    doc_ids_memmap_path: AnyPath,
    chunk_size: int = 64,
    seq_len: int = 2048,
    glob: str = "**/*.txt",
    max_chunks: int = 1_000_000,
    max_seqs: int = 100_000,
    documents_separator: str | None = None,
    encoder: AnyPath | None = None,
) -> dict[str, int]:
    """Writes the three files of a folder's text and returns how many `chunks`, `docs` and `seqs` they hold.

    Files that match `glob` are documents, in the order of their paths; with `documents_separator` what
    stands between such lines is, and in .jsonl and .parquet files each record (field `text`). A document is
    [CLS] text [SEP], cut into rows of `chunk_size` tokens, of which the last is filled up with padding;
    the last column is the first token of the document's next row, padding at its end. Where the text
    fills its last row, [SEP] is left out: no row holds nothing else. A sequence starts at every
    `seq_len // chunk_size`-th row of a document. Empty and unreadable documents are left out and counted.

    The files hold what was found and no more, and appear together when all is written.

    Raises ConfigError where `max_chunks` or `max_seqs` is too small, with the numbers; DocumentError where
    there is no text; SourceError where the tokenizer cannot be loaded.
    """
    check_counts(chunk_size=chunk_size, seq_len=seq_len, max_chunks=max_chunks, max_seqs=max_seqs)
    check_seq_len(seq_len, chunk_size)
    paths = [Path(path).absolute() for path in (chunks_memmap_path, seqs_memmap_path, doc_ids_memmap_path)]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"memmap paths: found {', '.join(map(str, paths))}, expected three different files")
    reader = _Reader(Path(folder), glob, CorpusConfig(documents_separator=documents_separator).documents_separator)
    tokenizer = open_tokenizer(encoder)
    totals: Counter[str] = Counter(chunks=0, docs=0, seqs=0)
    lossy = without_tokens = 0
    with one_at_a_time(paths[0]), whole_files(*paths) as partials:
        with contextlib.ExitStack() as stack:
            chunks_file, seqs_file, ids_file = (stack.enter_context(path.open("wb")) for path in partials)
            for encoded in tokenizer.encode_batches(reader.batches()):
                chunks = cut(encoded, chunk_size, tokenizer.pad_id, tokenizer.begin_id, tokenizer.end_id)
                chunks.rows[np.cumsum(chunks.counts) - 1, -1] = tokenizer.pad_id
                kept = np.diff(encoded.starts) > 0
                counts = chunks.counts[kept]
                starts = _sequence_starts(counts, seq_len // chunk_size) + totals["chunks"]
                ids = np.repeat(np.arange(len(counts)) + totals["docs"], counts)
                totals.update(chunks=int(counts.sum()), docs=len(counts), seqs=len(starts))
                lossy += int(encoded.lossy[kept].sum())
                without_tokens += int((~kept).sum())
                if totals["chunks"] <= max_chunks and totals["seqs"] <= max_seqs:  # else it counts on, for the error
                    chunks_file.write(chunks.rows[np.repeat(kept, chunks.counts)].tobytes())
                    seqs_file.write(starts.astype(np.int32).tobytes())
                    ids_file.write(ids.astype(np.int32).tobytes())
        if without_tokens:
            reader.left_out["empty"] += without_tokens
        _check_totals(totals, reader, max_chunks, max_seqs)
    _tell(totals, reader, lossy, documents_separator)
    return dict(totals)


def _sequence_starts(counts: IntArray, rows_per_sequence: int) -> npt.NDArray[np.int64]:
    """The first row of each sequence, for documents of `counts` rows that lie one after the other."""
    sequences = -(-counts // rows_per_sequence)
    firsts = np.cumsum(counts) - counts
    places = np.arange(sequences.sum()) - np.repeat(np.cumsum(sequences) - sequences, sequences)
    starts: npt.NDArray[np.int64] = np.repeat(firsts, sequences) + places * rows_per_sequence
    return starts


def _check_totals(totals: Mapping[str, int], reader: _Reader, max_chunks: int, max_seqs: int) -> None:
    if not totals["docs"]:
        raise DocumentError(
            f"{reader.folder}: no document with text in {len(reader.files)} files ({reader.report()}); add text"
        )
    for name, found, needed in (
        ("max_chunks", max_chunks, totals["chunks"]),
        ("max_seqs", max_seqs, totals["seqs"]),
    ):
        if needed > found:
            raise ConfigError(
                f"{name}: found {found}, expected >= {needed}, which the {totals['docs']} documents in "
                f"{reader.folder} give ({totals['chunks']} chunks, {totals['seqs']} sequences); nothing was written"
            )


def _tell(totals: Mapping[str, int], reader: _Reader, lossy: int, separator: str | None) -> None:
    print(
        f"chunks: {totals['chunks']:,} of {totals['docs']:,} documents, {totals['seqs']:,} sequences, from "
        f"{reader.folder}",
        flush=True,
    )
    if reader.left_out:
        print(f"left out: {reader.report()}", flush=True)
    if lossy:
        print(f"{lossy:,} documents have case or characters that the tokenizer does not give back", flush=True)
    if totals["docs"] == 1:
        hint = "" if separator else "; if the file holds several, give documents_separator, the line between them"
        print(f"one document only: no chunk will have a neighbor, which comes from another document{hint}", flush=True)
