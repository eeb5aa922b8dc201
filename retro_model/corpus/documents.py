"""Read a folder or file of text as a stream of usable documents, each assigned to a split.

A document is:

    .txt .md                        the file, or each part between lines that equal `documents_separator`
    .jsonl .jsonl.gz .jsonl.zst     a line; the text is in the record's field `text_field`
    .parquet                        a row; the text is in the column `text_field`

    corpus = Corpus(Path("data/sample"), CorpusConfig())       # reads everything once, keeps no text
    for document in corpus.documents("train"):                 # reads again, in the same fixed order
        document.number, document.source, document.record, document.text
    print("\\n".join(corpus.report.lines()))

A document's split depends on a hash of its identity (its path below the folder; for records and separated
documents, its text), so adding documents does not move others to another split. Memory holds:

    - one document (of a table, a few rows)
    - two bytes per document of the corpus, and about 60 bytes while splits are assigned
    - half a kilobyte per file
    - a MinHash signature of 1.3 kB per held-out document of 700 words, 1.7 kB for a moment

All code reads documents through `Corpus`, so that the tokenizer is trained on exactly the train documents that the
model is trained on.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from retro_model.core.artifacts import SPLITS
from retro_model.core.config import Config, setting
from retro_model.core.errors import ConfigError, DocumentError
from retro_model.core.progress import Progress
from retro_model.corpus.files import NameFilter, find_files
from retro_model.corpus.near_duplicates import NearDuplicates
from retro_model.corpus.readers import FLAWS, TEXT_SUFFIXES, Entry, read_entries
from retro_model.corpus.reading import ReadingOptions, ReadingReport

# The status of a document that is kept is the position of its split in SPLITS. These are the other two.
_DUPLICATE, _NEAR_DUPLICATE = len(SPLITS), len(SPLITS) + 1


@dataclass(frozen=True)
class CorpusConfig(Config, section="corpus"):
    """How documents are found, checked and split.

    `valid` and `test` are shares of the documents. A train document is dropped if its 13-gram Jaccard similarity
    to a held-out document is at least `near_duplicates`; 0 drops none.
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

    def reading_options(self, where: str) -> ReadingOptions:
        """Return how documents are read; `where` begins the message about an unusable one."""
        return ReadingOptions(where, self.text_field, self.documents_separator, self.bad_documents == "refuse")


class Document(NamedTuple):
    """A usable document. `number` is its position among all readable documents of the corpus.

    `record` is None if the document is a whole file, else the line (or .parquet row) where it starts, counted from
    1.
    """

    number: int
    source: str
    record: int | None
    split: str
    text: str


@dataclass
class DocumentReport(ReadingReport):
    """Counts of documents read, kept and dropped, with reasons.

    `near_duplicates` is complete after `Corpus.documents` was read to the end for the train split.
    """

    kept: Counter[str] = field(default_factory=Counter)
    exact_duplicates: int = 0
    near_duplicates: int = 0
    notes: list[str] = field(default_factory=list)

    def metrics(self) -> dict[str, int]:
        """Return the counts under flat names, for a metrics file."""
        return {
            **super().metrics(),
            "documents_kept": sum(self.kept.values()),
            "dropped_exact_duplicates": self.exact_duplicates,
            "dropped_near_duplicates": self.near_duplicates,
        }

    def lines(self) -> list[str]:
        """Return the counts, the names of files that are lost, examples and notes as lines of text."""
        kept = ", ".join(f"{self.kept[split]:,} {split}" for split in SPLITS)
        lines = [f"documents: {self.read:,} read, {sum(self.kept.values()):,} kept ({kept})"]
        if self.exact_duplicates:
            lines.append(f"dropped: {self.exact_duplicates:,} exact copies of another document")
        if self.near_duplicates:
            lines.append(f"dropped: {self.near_duplicates:,} train documents that nearly repeat held-out ones")
        return [*lines, *super().lines(), *self.notes]


class Corpus:
    """The usable documents below `path`, a folder or a file.

    The constructor reads all files once. Of exact copies one is kept: the first held-out one if there is any, else
    the first. If the hash leaves a split empty, it gets one document of the largest split, and the report says so.
    Files and folders that `name_filter` leaves out are not read.

    Raises DocumentError if there is no document, if fewer than three are usable, if a file takes more memory or
    another library than there is here, or, with `bad_documents: refuse`, at the first unusable document.
    """

    def __init__(self, path: Path | str, config: CorpusConfig, name_filter: NameFilter | None = None) -> None:
        self.path = Path(path)
        self.config = config
        self.report = DocumentReport()
        found = find_files(self.path, name_filter)
        self.report.add_files(found)
        self._files = found.files
        self._num_in_file = np.zeros(len(self._files), np.int64)  # readable documents
        self.num_bytes = 0  # of all readable documents, in UTF-8
        digests, identities = self._scan()
        self._statuses = self._assign(digests, identities)
        self._near_duplicates_known = not config.near_duplicates
        self._update_counts()

    def documents(self, *splits: str) -> Iterator[Document]:
        """Yield the documents of the given splits (default: all) in reading order.

        The first call that includes train documents detects and drops near duplicates while it reads.
        Raises DocumentError if no train document is left, or if the files changed since they were scanned.
        """
        wanted = {SPLITS.index(split) for split in splits or SPLITS}
        check = not self._near_duplicates_known and SPLITS.index("train") in wanted
        held_out = self._held_out_signatures() if check else None
        for number, entry in self._readable("read", wanted):
            status = self._statuses[number]
            if held_out is not None and status == SPLITS.index("train") and held_out.repeated_by(entry.text):
                self._statuses[number] = _NEAR_DUPLICATE
                continue
            yield Document(number, entry.source, entry.record, SPLITS[status], entry.text)
        if check:
            self._near_duplicates_known = True
            self._update_counts()
        if not self.report.kept["train"]:
            raise DocumentError(
                f"{self.path}: no train documents left, all {self.report.near_duplicates} nearly repeat "
                "held-out ones; add documents, or raise corpus.near_duplicates (0 switches it off)"
            )

    def _entries(self, file: Path, source: str) -> Iterator[Entry]:
        return read_entries(file, source, self.config.text_field, self.config.documents_separator)

    def _readable(self, title: str, wanted: set[int]) -> Iterator[tuple[int, Entry]]:
        """Yield the entries with one of the wanted statuses and their numbers; read only files that contain such."""
        chosen, stop = np.isin(self._statuses, list(wanted)), 0
        with Progress(title, None, "document") as bar:
            for (file, source), num in zip(self._files, self._num_in_file, strict=True):
                start, stop = stop, stop + int(num)
                if not chosen[start:stop].any():
                    continue
                number = start
                for entry in self._entries(file, source):
                    if not entry.flaw and number < stop and chosen[number]:
                        yield number, entry
                    number += not entry.flaw
                    bar.update(entry.times)
                if number != stop:
                    raise DocumentError(f"{file}: its documents changed while they were read; run again")

    def _scan(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Return a digest of each readable document's text (n, 2) and a hash of its identity (n,), 64-bit words."""
        digests, identities = bytearray(), bytearray()
        options = self.config.reading_options(str(self.path))
        with Progress("scan", None, "document") as bar:
            for position, (file, source) in enumerate(self._files):
                for entry in self.report.usable_entries(file, source, options):
                    bar.update()
                    self._num_in_file[position] += 1
                    text = entry.text.encode()
                    self.num_bytes += len(text)
                    digest = hashlib.blake2b(text, digest_size=16).digest()
                    digests += digest
                    path = hashlib.blake2b(entry.source.encode(), digest_size=8).digest()
                    identities += path if entry.record is None else digest[:8]
        return np.frombuffer(digests, "<u8").reshape(-1, 2), np.frombuffer(identities, "<u8")

    def _assign(self, digests: npt.NDArray[np.uint64], identities: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """Return each document's status (n,): the position of its split in SPLITS, or _DUPLICATE."""
        bounds = [self.config.test, self.config.test + self.config.valid]
        ranks = np.searchsorted(bounds, identities / 2.0**64, side="right").astype(np.uint8)  # 0 test, 1 valid, 2 train
        statuses = (2 - ranks).astype(np.uint8)
        order = np.lexsort((ranks, digests[:, 1], digests[:, 0]))  # stable: equal texts by rank, then in reading order
        ordered = digests[order]
        copies = (ordered[1:] == ordered[:-1]).all(axis=1)
        statuses[order[1:][copies]] = _DUPLICATE
        usable = len(statuses) - int(copies.sum())
        if usable < len(SPLITS):
            raise DocumentError(self._too_few_message(usable, int(copies.sum())))
        self._fill_empty_splits(statuses, identities)
        return statuses

    def _fill_empty_splits(self, statuses: npt.NDArray[np.uint8], identities: npt.NDArray[np.uint64]) -> None:
        for position, split in enumerate(SPLITS):
            counts = np.bincount(statuses, minlength=len(SPLITS))[: len(SPLITS)]
            if counts[position]:
                continue
            donor = int(counts.argmax())
            members = np.flatnonzero(statuses == donor)
            # Held-out splits have the low hashes, so this takes the document whose hash is nearest to the new split.
            nearest = identities[members].argmax() if split == "train" else identities[members].argmin()
            statuses[members[nearest]] = position
            self.report.notes.append(
                f"no document fell to {split} by its hash: 1 of {SPLITS[donor]} was taken; "
                "with more documents that is not needed"
            )

    def _too_few_message(self, usable: int, copies: int) -> str:
        flawed = ", ".join(f"{count} {FLAWS[name]}" for name, count in sorted(self.report.flawed.items()))
        dropped = "; ".join(part for part in (flawed, f"{copies} exact copies" if copies else "") if part)
        first = next(iter((*self.report.examples, *self.report.lost)), "")
        example = f"; first: {first}" if first else ""
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

    def _held_out_signatures(self) -> NearDuplicates:
        signatures = NearDuplicates(self.config.near_duplicates)
        for _, entry in self._readable("sign", {SPLITS.index("valid"), SPLITS.index("test")}):
            signatures.add(entry.text)
        return signatures

    def _update_counts(self) -> None:
        counts = np.bincount(self._statuses, minlength=len(SPLITS) + 2)
        self.report.kept = Counter({split: int(counts[position]) for position, split in enumerate(SPLITS)})
        self.report.exact_duplicates = int(counts[_DUPLICATE])
        self.report.near_duplicates = int(counts[_NEAR_DUPLICATE])
