"""Documents: from a folder or file of text to a stream of usable ones, each in its split.

What counts as a document:

    .txt .md                        the file, or what stands between lines that equal `documents_separator`
    .jsonl .jsonl.gz .jsonl.zst     a record a line; the text is in `text_field`
    .parquet                        a row; the text is in the column `text_field`

    corpus = Corpus(Path("data/sample"), CorpusConfig())       # reads everything once, keeps no text
    for document in corpus.documents("train"):                 # reads again, in the same fixed order
        document.number, document.source, document.record, document.text
    print("\\n".join(corpus.report.lines()))

A document's split follows from a hash of its identity (its path below the folder; for records and
separated documents, its text), so adding documents moves none. Memory holds one document and, for each
document of the corpus, 25 bytes; for held-out ones a MinHash signature too.

Whoever needs documents goes through `Corpus`, so that the tokenizer is trained on exactly the train
documents that the model will see.
"""

import gzip
import hashlib
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from retro_model.artifacts import SPLITS
from retro_model.config import Config, setting
from retro_model.errors import ConfigError, DocumentError
from retro_model.progress import Progress

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SUFFIXES = TEXT_SUFFIXES + RECORD_SUFFIXES

# Why a document is not usable, in the words of the report.
FLAWS = {
    "empty": "empty",
    "not_utf8": "not UTF-8",
    "bad_record": "no valid record",
    "missing_field": "without the text field",
    "bad_file": "unreadable file or truncated archive",
}
MAX_EXAMPLES = 3  # of each flaw, in the report
BLOCK_BYTES = 1 << 20
ROWS_PER_BATCH = 1024
MISSED = 0.001  # share of near duplicates at the threshold that never become candidates
GRAMS_PER_BATCH = 2048  # times 128 permutations of 4 bytes: what a processor's cache holds

_DUPLICATE, _NEAR_DUPLICATE = len(SPLITS), len(SPLITS) + 1  # fates beside the places in SPLITS


@dataclass(frozen=True)
class CorpusConfig(Config, section="corpus"):
    """How documents are found, judged and split.

    `valid` and `test` are shares of the documents. `near_duplicates` is the 13-gram Jaccard similarity
    to a held-out document from which on a train document is dropped; 0 drops none.
    """

    documents_separator: str | None = None
    text_field: str = "text"
    valid: float = setting(0.05, above=0.0, below=1.0)
    test: float = setting(0.08, above=0.0, below=1.0)
    near_duplicates: float = setting(0.8, minimum=0.0, maximum=1.0)
    bad_documents: str = setting("skip", choices=("skip", "refuse"))

    def __post_init__(self) -> None:
        super().__post_init__()
        separator = self.documents_separator
        if separator is not None and (not separator.strip() or "\n" in separator):
            raise ConfigError(f"corpus.documents_separator: found {separator!r}, expected one line of text, or null")
        if not self.text_field:
            raise ConfigError("corpus.text_field: found '', expected the name of a field, such as text")
        if self.valid + self.test >= 1:
            raise ConfigError(f"corpus.valid, corpus.test: found {self.valid} and {self.test}, expected a sum below 1")


class Document(NamedTuple):
    """One usable document. `number` counts all readable documents of the corpus in reading order.

    `record` is None where the document is a whole file, else the line (or row of a .parquet file) at
    which it starts, counted from 1.
    """

    number: int
    source: str
    record: int | None
    split: str
    text: str


class Entry(NamedTuple):
    """What a file holds at one place: a text, or the reason (a key of FLAWS) why there is none."""

    source: str
    record: int | None
    text: str
    flaw: str = ""
    detail: str = ""
    times: int = 1

    @property
    def place(self) -> str:
        """Where it is, as `file:line`."""
        return self.source if self.record is None else f"{self.source}:{self.record}"


@dataclass
class DocumentReport:
    """What came in, what goes out, what was dropped and why.

    `near_duplicates` is complete once `Corpus.documents` was read to its end for the train split.
    """

    read: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    flawed: Counter[str] = field(default_factory=Counter)
    exact_duplicates: int = 0
    near_duplicates: int = 0
    other_files: int = 0
    examples: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def metrics(self) -> dict[str, int]:
        """The counts under flat names, ready for a metrics file."""
        return {
            "documents_read": self.read,
            "documents_kept": sum(self.kept.values()),
            **{f"dropped_{name}": self.flawed[name] for name in FLAWS},
            "dropped_exact_duplicates": self.exact_duplicates,
            "dropped_near_duplicates": self.near_duplicates,
            "other_files": self.other_files,
        }

    def lines(self) -> list[str]:
        """The same for a person."""
        kept = ", ".join(f"{self.kept[split]:,} {split}" for split in SPLITS)
        lines = [f"documents: {self.read:,} read, {sum(self.kept.values()):,} kept ({kept})"]
        lines += [f"dropped: {count:,} {FLAWS[name]}" for name, count in sorted(self.flawed.items())]
        if self.exact_duplicates:
            lines.append(f"dropped: {self.exact_duplicates:,} exact copies of another document")
        if self.near_duplicates:
            lines.append(f"dropped: {self.near_duplicates:,} train documents that nearly repeat held-out ones")
        if self.other_files:
            lines.append(f"left aside: {self.other_files:,} files of other types")
        return [*lines, *(f"  {example}" for example in self.examples), *self.notes]


class Corpus:
    """The usable documents below `path`, which is a folder or a file.

    Of exact copies one survives: the first held-out one if there is any, else the first. A split that
    the hash leaves empty is given one document of the largest split, and the report says so.

    Raises DocumentError if there is no document, if fewer than three are usable, or, with
    `bad_documents: refuse`, at the first one that is not.
    """

    def __init__(self, path: Path | str, config: CorpusConfig) -> None:
        self.path = Path(path)
        self.config = config
        self.report = DocumentReport()
        files, self.report.other_files = find_files(self.path)
        whole = self.path.is_dir()
        self._files = [(file, file.relative_to(self.path).as_posix() if whole else file.name) for file in files]
        digests, identities = self._scan()
        self._fates = self._assign(digests, identities)
        self._near_duplicates_known = not config.near_duplicates
        self._count()

    @property
    def num_readable(self) -> int:
        """How many documents have text: numbers are below this."""
        return len(self._fates)

    def documents(self, *splits: str) -> Iterator[Document]:
        """Yields the documents of the given splits (all without) in reading order.

        Near duplicates are found on the way, the first time that train documents are asked for.
        Raises DocumentError if no train document is left, or if the files have changed meanwhile.
        """
        wanted = {SPLITS.index(split) for split in splits or SPLITS}
        check = not self._near_duplicates_known and SPLITS.index("train") in wanted
        held_out = self._held_out_signatures() if check else None
        for number, entry in self._readable("read"):
            fate = self._fates[number]
            if fate not in wanted:
                continue
            if held_out is not None and fate == SPLITS.index("train") and held_out.repeated_by(entry.text):
                self._fates[number] = _NEAR_DUPLICATE
                continue
            yield Document(number, entry.source, entry.record, SPLITS[fate], entry.text)
        if check:
            self._near_duplicates_known = True
            self._count()
        if not self.report.kept["train"]:
            raise DocumentError(
                f"{self.path}: no train documents left, all {self.report.near_duplicates} nearly repeat "
                "held-out ones; add documents, or raise corpus.near_duplicates (0 switches it off)"
            )

    def _entries(self, title: str) -> Iterator[Entry]:
        with Progress(title, None, "document") as shown:
            for file, source in self._files:
                for entry in read_entries(file, source, self.config):
                    yield entry
                    shown.update(entry.times)

    def _readable(self, title: str) -> Iterator[tuple[int, Entry]]:
        """Numbers the entries that have text; the numbers of every pass agree."""
        number = -1
        for number, entry in enumerate(entry for entry in self._entries(title) if not entry.flaw):
            if number >= len(self._fates):
                break
            yield number, entry
        if number + 1 != len(self._fates):
            raise DocumentError(f"{self.path}: the documents changed while they were read; run again")

    def _scan(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Two 64-bit words of content digest and one of identity for each readable document."""
        digests, identities = bytearray(), bytearray()
        for entry in self._entries("scan"):
            self.report.read += entry.times
            if entry.flaw:
                self._add_flaw(entry)
                continue
            digest = hashlib.blake2b(entry.text.encode(), digest_size=16).digest()
            digests += digest
            path = hashlib.blake2b(os.fsencode(entry.source), digest_size=8).digest()
            identities += path if entry.record is None else digest[:8]
        return np.frombuffer(digests, "<u8").reshape(-1, 2), np.frombuffer(identities, "<u8")

    def _add_flaw(self, entry: Entry) -> None:
        what = f"{entry.place}: {FLAWS[entry.flaw]}{f' ({entry.detail})' if entry.detail else ''}"
        if self.config.bad_documents == "refuse":
            raise DocumentError(
                f"{self.path}: {what}; mend it, or leave such documents out with corpus.bad_documents: skip"
            )
        if self.report.flawed[entry.flaw] < MAX_EXAMPLES:
            self.report.examples.append(what)
        self.report.flawed[entry.flaw] += entry.times

    def _assign(self, digests: npt.NDArray[np.uint64], identities: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """Each document's fate: the place of its split in SPLITS, or _DUPLICATE."""
        shares = identities / 2.0**64
        bounds = [self.config.test, self.config.test + self.config.valid]
        ranks = np.searchsorted(bounds, shares, side="right")  # 0 test, 1 valid, 2 train
        fates = (2 - ranks).astype(np.uint8)
        order = np.lexsort((np.arange(len(ranks)), ranks, digests[:, 1], digests[:, 0]))
        copies = (digests[order][1:] == digests[order][:-1]).all(axis=1)
        fates[order[1:][copies]] = _DUPLICATE
        usable = len(fates) - int(copies.sum())
        if usable < len(SPLITS):
            raise DocumentError(self._too_few(usable, int(copies.sum())))
        self._fill_empty_splits(fates, identities)
        return fates

    def _fill_empty_splits(self, fates: npt.NDArray[np.uint8], identities: npt.NDArray[np.uint64]) -> None:
        for place, split in enumerate(SPLITS):
            counts = np.bincount(fates, minlength=len(SPLITS))[: len(SPLITS)]
            if counts[place]:
                continue
            donor = int(counts.argmax())
            members = np.flatnonzero(fates == donor)
            # The held-out splits own the low hashes: the document taken is the nearest to its new split.
            nearest = identities[members].argmax() if split == "train" else identities[members].argmin()
            fates[members[nearest]] = place
            self.report.notes.append(
                f"no document fell to {split} by its hash: 1 of {SPLITS[donor]} was taken; "
                "with more documents that is not needed"
            )

    def _too_few(self, usable: int, copies: int) -> str:
        flawed = ", ".join(f"{count} {FLAWS[name]}" for name, count in sorted(self.report.flawed.items()))
        dropped = "; ".join(part for part in (flawed, f"{copies} exact copies" if copies else "") if part)
        example = f"; first: {self.report.examples[0]}" if self.report.examples else ""
        message = (
            f"{self.path}: {usable} usable documents of {self.report.read} read"
            f"{f' (dropped: {dropped}{example})' if dropped else ''}, expected at least 3: "
            "train, valid and test need one each"
        )
        if usable and any(file.suffix.lower() in TEXT_SUFFIXES for file, _ in self._files):
            separator = self.config.documents_separator
            message += (
                "; if a file holds several, set corpus.documents_separator to the line between them"
                if separator is None
                else f"; is corpus.documents_separator {separator!r} the line between the documents?"
            )
        return message

    def _held_out_signatures(self) -> "NearDuplicates":
        signatures = NearDuplicates(self.config.near_duplicates)
        held_out = {SPLITS.index("valid"), SPLITS.index("test")}
        for number, entry in self._readable("sign"):
            if self._fates[number] in held_out:
                signatures.add(number, entry.text)
        return signatures

    def _count(self) -> None:
        counts = np.bincount(self._fates, minlength=len(SPLITS) + 2)
        self.report.kept = Counter({split: int(counts[place]) for place, split in enumerate(SPLITS)})
        self.report.exact_duplicates = int(counts[_DUPLICATE])
        self.report.near_duplicates = int(counts[_NEAR_DUPLICATE])


def find_files(path: Path) -> tuple[list[Path], int]:
    """The files that can hold documents, ordered by their path below `path`, and the number of others.

    Hidden files and folders and DVC's `*.dvc` files are no documents and are not counted.
    """
    if path.is_file():
        if _suffix(path) not in SUFFIXES:
            raise DocumentError(f"{path}: not a file of documents, expected one of {', '.join(SUFFIXES)}")
        return [path], 0
    if not path.is_dir():
        raise DocumentError(
            f"{path}: no such folder or file; set `documents` in params.yaml to yours, or make it "
            "(`dvc repro` writes the sample, `dvc pull` fetches what a remote has)"
        )
    files, others = [], 0
    for file in _walk(path):
        if _suffix(file) in SUFFIXES:
            files.append(file)
        elif file.suffix != ".dvc":
            others += 1
    if not files:
        found = f"found {others} files of other types" if others else "found none"
        raise DocumentError(f"{path}: no documents, {found}; expected {', '.join(SUFFIXES)} files")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix()), others


def _walk(path: Path) -> Iterator[Path]:
    """All files that are not hidden; links to folders are followed, each folder once."""
    seen = set()
    for folder, names, file_names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (Path(folder, name) for name in file_names if not name.startswith("."))


def _suffix(file: Path) -> str:
    name = file.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


class _UnreadableError(Exception):
    """A file ends early or is not what its name says; never leaves this module."""


def read_entries(file: Path, source: str, config: CorpusConfig) -> Iterator[Entry]:
    """Yields what `file` holds, in order; text that comes before damage is not lost."""
    suffix, record = _suffix(file), 0
    if suffix == ".parquet":
        entries = _rows(file, source, config.text_field)
    elif suffix in RECORD_SUFFIXES:
        entries = _json_lines(_lines(_blocks(file, suffix)), source, config.text_field)
    elif config.documents_separator is not None:
        entries = _separated(_lines(_blocks(file, suffix)), source, config.documents_separator)
    else:
        entries = _whole_file(_blocks(file, suffix), source)
    try:
        for entry in entries:
            record = entry.record or 0
            yield entry
    except _UnreadableError as error:
        yield Entry(source, record + 1, "", "bad_file", str(error))


def _blocks(file: Path, suffix: str) -> Iterator[bytes]:
    """The file's bytes, decompressed, without a byte order mark at the start."""
    try:
        if suffix == ".jsonl.gz":
            with gzip.open(file, "rb") as stream:
                blocks = _read_blocks(stream)
                yield next(blocks, b"").removeprefix(b"\xef\xbb\xbf")
                yield from blocks
            return
        with file.open("rb") as stream:
            blocks = _zstandard_blocks(stream) if suffix == ".jsonl.zst" else _read_blocks(stream)
            yield next(blocks, b"").removeprefix(b"\xef\xbb\xbf")
            yield from blocks
    except (OSError, EOFError, zlib.error) as error:
        raise _UnreadableError(" ".join(str(error).split())) from error


def _read_blocks(stream: Any) -> Iterator[bytes]:
    while block := stream.read1(BLOCK_BYTES):  # `read` would lose what comes before a truncation
        yield block


def _zstandard_blocks(stream: Any) -> Iterator[bytes]:
    """Frame by frame: zstandard's own reader takes a truncated frame for the end of the file."""
    import zstandard

    frame = None
    for block in _read_blocks(stream):
        rest = block
        while rest:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(rest)
            except zstandard.ZstdError as error:
                raise _UnreadableError(str(error)) from error
            rest = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise _UnreadableError("the compressed stream ends early")


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines with their line feeds."""
    pending: list[bytes] = []
    for block in blocks:
        *whole, rest = block.split(b"\n")
        for piece in whole:
            pending.append(piece)
            yield b"".join(pending) + b"\n"
            pending.clear()
        pending.append(rest)
    if last := b"".join(pending):
        yield last


def _decoded(source: str, record: int | None, content: bytes) -> Entry:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = (record or 1) + content[: error.start].count(b"\n")
        return Entry(source, line, "", "not_utf8", f"byte 0x{content[error.start]:02x}")
    return Entry(source, record, text) if text.strip() else Entry(source, record, "", "empty")


def _whole_file(blocks: Iterable[bytes], source: str) -> Iterator[Entry]:
    yield _decoded(source, None, b"".join(blocks))


def _separated(lines: Iterable[bytes], source: str, separator: str) -> Iterator[Entry]:
    """What stands before, between and after the separator lines; nothing at either end is no document."""
    wanted, pending, start = separator.strip().encode(), list[bytes](), 1
    number = 0
    for number, line in enumerate(lines, start=1):
        if line.strip() != wanted:
            pending.append(line)
            continue
        if pending or start > 1:
            yield _decoded(source, start, b"".join(pending))
        pending, start = [], number + 1
    if pending or not number:
        yield _decoded(source, start, b"".join(pending))


def _json_lines(lines: Iterable[bytes], source: str, text_field: str) -> Iterator[Entry]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _json_record(source, number, line, text_field)


def _json_record(source: str, number: int, line: bytes, text_field: str) -> Entry:
    entry = _decoded(source, number, line)
    if entry.flaw:
        return entry
    try:
        record = json.loads(entry.text)
    except (ValueError, RecursionError) as error:
        return Entry(source, number, "", "bad_record", " ".join(str(error).split()))
    if not isinstance(record, Mapping):
        return Entry(source, number, "", "bad_record", f"{type(record).__name__}, expected an object")
    text = record.get(text_field)
    if text is None:
        return Entry(source, number, "", "missing_field", _no_field(text_field, list(record)))
    if not isinstance(text, str):
        detail = f"{text_field!r} holds {type(text).__name__}, expected text"
        return Entry(source, number, "", "bad_record", detail)
    # JSON can spell half of a surrogate pair, which no UTF-8 file can.
    return _decoded(source, number, text.encode(errors="surrogatepass"))


def _no_field(text_field: str, names: list[str]) -> str:
    return f"no {text_field!r} in {', '.join(names[:8]) or 'it'}; see corpus.text_field"


def _rows(file: Path, source: str, text_field: str) -> Iterator[Entry]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from _check_columns(table, source, text_field)
            if text_field not in table.schema_arrow.names:
                return
            for batch in table.iter_batches(batch_size=ROWS_PER_BATCH, columns=[text_field]):
                for content in _as_bytes(batch.column(0)):
                    number += 1
                    if content is None:
                        yield Entry(source, number, "", "missing_field", "null")
                    else:
                        yield _decoded(source, number, content)
    except (pyarrow.ArrowException, OSError) as error:
        raise _UnreadableError(" ".join(str(error).split())[:200]) from error


def _check_columns(table: Any, source: str, text_field: str) -> Iterator[Entry]:
    names = table.schema_arrow.names
    if text_field not in names and table.metadata.num_rows:
        yield Entry(source, 1, "", "missing_field", _no_field(text_field, names), table.metadata.num_rows)


def _as_bytes(column: Any) -> list[bytes | None]:
    """The column's texts as bytes: one that is not UTF-8 must not cost its whole batch."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return values


class NearDuplicates:
    """Finds texts whose 13-gram Jaccard similarity to one of the added texts reaches a threshold.

    The similarity is MinHash's estimate over 128 permutations (standard error .035 at .8); texts are
    compared in lower case and by words only ([P] section 2.6 of Borgeaud et al. filters so).
    """

    NUM_PERMUTATIONS = 128
    GRAM = 13

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash, MinHashLSH

        self.threshold = threshold
        self._empty = MinHash(self.NUM_PERMUTATIONS, hashfunc=int, scheme="affine32")
        self._signatures: dict[int, MinHash] = {}
        rows = _rows_per_band(threshold, self.NUM_PERMUTATIONS)
        self._candidates = MinHashLSH(num_perm=self.NUM_PERMUTATIONS, params=(self.NUM_PERMUTATIONS // rows, rows))
        self._sampled: set[int] = set()
        # A text at the threshold has at least that share of its grams in the other one.
        self._enough = math.log(MISSED) / math.log(1 - threshold) if threshold < 1 else 1

    def add(self, number: int, text: str) -> None:
        """Remembers a text's signature under `number`."""
        grams = word_grams(text, self.GRAM)
        if len(grams):  # a text without words resembles nothing
            self._signatures[number] = self._signature(grams)
            self._candidates.insert(number, self._signatures[number])
            self._sampled.update(_sample(grams))

    def repeated_by(self, text: str) -> bool:
        """Whether `text` is at least as similar to one of the added texts as the threshold."""
        grams = _grams(text, self.GRAM)
        sample = _sample(grams)
        if not len(grams) or (len(sample) >= self._enough and self._sampled.isdisjoint(sample)):
            return False  # most texts end here, at a fraction of a signature's cost
        signature = self._signature(np.unique(grams))
        candidates = self._candidates.query(signature)
        return any(signature.jaccard(self._signatures[number]) >= self.threshold for number in candidates)

    def _signature(self, grams: npt.NDArray[np.uint32]) -> Any:
        signature = self._empty.copy()
        for start in range(0, len(grams), GRAMS_PER_BATCH):
            signature.update_batch(grams[start : start + GRAMS_PER_BATCH].tolist())
        return signature


def _sample(grams: npt.NDArray[np.uint32]) -> set[int]:
    """The same sixteenth of all grams in every text."""
    return set(grams[grams % 16 == 0].tolist())


def _rows_per_band(threshold: float, num_permutations: int) -> int:
    """The most rows a band, and so the fewest candidates, that still do not miss a text at the threshold."""
    missed = {rows: (1 - threshold**rows) ** (num_permutations // rows) for rows in range(1, num_permutations // 2 + 1)}
    return max((rows for rows, share in missed.items() if share <= MISSED), default=1)


# Chinese characters and kana stand without spaces: each counts as a word.
_WORDS = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff]|[^\W\u2e80-\u9fff\uf900-\ufaff]+")
_ASCII_WORDS = bytes(ord(char.lower()) if char.isalnum() or char == "_" else 32 for char in map(chr, range(128)))


def _words(text: str) -> list[bytes]:
    if text.isascii():  # the same words, found in a third of the time
        return text.encode().translate(_ASCII_WORDS.ljust(256)).split()
    return [word.encode() for word in _WORDS.findall(text.lower())]


def word_grams(text: str, size: int) -> npt.NDArray[np.uint32]:
    """Sorted 32-bit hashes of the distinct runs of `size` words; a shorter text is one run."""
    return np.unique(_grams(text, size))


def _grams(text: str, size: int) -> npt.NDArray[np.uint32]:
    words = _words(text)
    if not words:
        return np.empty(0, np.uint32)
    hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    size = min(size, len(words))
    grams = np.zeros(len(words) - size + 1, np.uint64)
    for place in range(size):
        # Added before it is multiplied, so that the last word too reaches the upper half.
        grams = (grams + hashes[place : place + len(grams)]) * np.uint64(0x9E3779B97F4A7C15)
    return (grams >> np.uint64(32)).astype(np.uint32)
