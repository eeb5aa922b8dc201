"""Convert a folder of text to raw memory maps: chunk rows, sequence starts and document ids."""

import contextlib
import logging
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
from retro_model.corpus.files import matching_files
from retro_model.corpus.readers import Entry
from retro_model.corpus.reading import ReadingReport
from retro_model.memmaps.encoder import AnyPath, open_tokenizer
from retro_model.memmaps.files import check_counts, check_seq_len

logger = logging.getLogger(__name__)


class _Reader:
    """Reads the documents of a folder in the order of their paths; `report` has what it leaves out."""

    def __init__(self, folder: Path, glob: str, separator: str | None) -> None:
        found = matching_files(folder, glob)
        self.folder, self.files = folder, found.files
        self._options = CorpusConfig(documents_separator=separator).reading_options(str(folder))
        self.report = ReadingReport()
        self.report.add_files(found)

    def batches(self) -> Iterator[list[str]]:
        """Yields batches of document texts."""
        for batch in batches(self._entries()):
            yield [entry.text for entry in batch]

    def _entries(self) -> Iterator[Entry]:
        for file, name in self.files:
            yield from self.report.usable_entries(file, name, self._options)


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
    """Tokenizes a folder of text into the three files; returns their counts of `chunks`, `docs` and `seqs`.

    Each file that matches `glob` is a document, in the order of the paths; links to folders are followed, and hidden
    files are not read. With `documents_separator`, lines
    equal to it split a file into documents; in .jsonl and .parquet files each record (field `text`) is one.
    A document is [CLS] text [SEP], cut into rows of `chunk_size` tokens; its last row is padded. The last
    column holds the first token of the document's next row, padding for its last row. [SEP] is left out where
    it would need a row of its own. A sequence starts at every `seq_len // chunk_size`-th row of a document.
    Empty and unreadable documents are left out and counted, and files that are lost are named.

    The files are exactly as long as their content, and appear together once all are written.

    Raises ConfigError if `max_chunks` or `max_seqs` is too small, DocumentError if there is no text, and
    SourceError if the tokenizer cannot be loaded.
    """
    check_counts(chunk_size=chunk_size, seq_len=seq_len, max_chunks=max_chunks, max_seqs=max_seqs)
    check_seq_len(seq_len, chunk_size)
    paths = [Path(path).absolute() for path in (chunks_memmap_path, seqs_memmap_path, doc_ids_memmap_path)]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"memmap paths: found {', '.join(map(str, paths))}, expected three different files")
    reader = _Reader(Path(folder), glob, documents_separator)
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
                if totals["chunks"] <= max_chunks and totals["seqs"] <= max_seqs:  # else only count, for the error
                    chunks_file.write(chunks.rows[np.repeat(kept, chunks.counts)].tobytes())
                    seqs_file.write(starts.astype(np.int32).tobytes())
                    ids_file.write(ids.astype(np.int32).tobytes())
        if without_tokens:
            reader.report.flawed["empty"] += without_tokens
        _check_totals(totals, reader, max_chunks, max_seqs)
    _log_summary(totals, reader, lossy, documents_separator)
    return dict(totals)


def _sequence_starts(counts: IntArray, rows_per_sequence: int) -> npt.NDArray[np.int64]:
    """The first row of each sequence, for consecutive documents of `counts` rows."""
    sequences = -(-counts // rows_per_sequence)
    firsts = np.cumsum(counts) - counts
    places = np.arange(sequences.sum()) - np.repeat(np.cumsum(sequences) - sequences, sequences)
    starts: npt.NDArray[np.int64] = np.repeat(firsts, sequences) + places * rows_per_sequence
    return starts


def _check_totals(totals: Mapping[str, int], reader: _Reader, max_chunks: int, max_seqs: int) -> None:
    if not totals["docs"]:
        raise DocumentError(
            f"{reader.folder}: no document with text in {len(reader.files)} files "
            f"({'; '.join(line.strip() for line in reader.report.lines())}); add text"
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


def _log_summary(totals: Mapping[str, int], reader: _Reader, lossy: int, separator: str | None) -> None:
    logger.info(
        f"chunks: {totals['chunks']:,} of {totals['docs']:,} documents, {totals['seqs']:,} sequences, from "
        f"{reader.folder}"
    )
    for line in reader.report.lines():
        logger.warning(line)
    if lossy:
        logger.warning(f"{lossy:,} documents have case or characters that the tokenizer does not give back")
    if totals["docs"] == 1:
        hint = "" if separator else "; if the file holds several, give documents_separator, the line between them"
        logger.warning(f"one document only: no chunk will have a neighbor, which comes from another document{hint}")
