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
separated documents, its text), so adding documents moves none. Memory holds one document (of a table a few
rows) and two bytes for each one of the corpus, some 60 bytes while splits are assigned; for a file half a
kilobyte, and for a held-out document of 700 words a MinHash signature of 1.3 kB, 1.7 kB for a moment.

Whoever needs documents goes through `Corpus`, so that the tokenizer is trained on exactly the train
documents that the model will see.
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
from retro_model.corpus.near_duplicates import NearDuplicates
from retro_model.corpus.readers import FLAWS, TEXT_SUFFIXES, Entry, find_files, read_entries

MAX_EXAMPLES = 3  # of each flaw, in the report

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
        self._num_in_file = np.zeros(len(files), np.int64)  # readable documents
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
        for number, entry in self._readable("read", wanted):
            fate = self._fates[number]
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

    def _entries(self, file: Path, source: str) -> Iterator[Entry]:
        return read_entries(file, source, self.config.text_field, self.config.documents_separator)

    def _readable(self, title: str, wanted: set[int]) -> Iterator[tuple[int, Entry]]:
        """The entries with one of the wanted fates, numbered; only files that have such are read."""
        chosen, stop = np.isin(self._fates, list(wanted)), 0
        with Progress(title, None, "document") as shown:
            for (file, source), num in zip(self._files, self._num_in_file, strict=True):
                start, stop = stop, stop + int(num)
                if not chosen[start:stop].any():
                    continue
                number = start
                for entry in self._entries(file, source):
                    if not entry.flaw and number < stop and chosen[number]:
                        yield number, entry
                    number += not entry.flaw
                    shown.update(entry.times)
                if number != stop:
                    raise DocumentError(f"{file}: its documents changed while they were read; run again")

    def _scan(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Two 64-bit words of content digest and one of identity for each readable document."""
        digests, identities = bytearray(), bytearray()
        with Progress("scan", None, "document") as shown:
            for place, (file, source) in enumerate(self._files):
                for entry in self._entries(file, source):
                    self.report.read += entry.times
                    shown.update(entry.times)
                    if entry.flaw:
                        self._add_flaw(entry)
                        continue
                    self._num_in_file[place] += 1
                    digest = hashlib.blake2b(entry.text.encode(), digest_size=16).digest()
                    digests += digest
                    path = hashlib.blake2b(entry.source.encode(), digest_size=8).digest()
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
        bounds = [self.config.test, self.config.test + self.config.valid]
        ranks = np.searchsorted(bounds, identities / 2.0**64, side="right").astype(np.uint8)  # 0 test, 1 valid, 2 train
        fates = (2 - ranks).astype(np.uint8)
        order = np.lexsort((ranks, digests[:, 1], digests[:, 0]))  # stable: copies of a split in reading order
        ordered = digests[order]
        copies = (ordered[1:] == ordered[:-1]).all(axis=1)
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

    def _held_out_signatures(self) -> NearDuplicates:
        signatures = NearDuplicates(self.config.near_duplicates)
        for _, entry in self._readable("sign", {SPLITS.index("valid"), SPLITS.index("test")}):
            signatures.add(entry.text)
        return signatures

    def _count(self) -> None:
        counts = np.bincount(self._fates, minlength=len(SPLITS) + 2)
        self.report.kept = Counter({split: int(counts[place]) for place, split in enumerate(SPLITS)})
        self.report.exact_duplicates = int(counts[_DUPLICATE])
        self.report.near_duplicates = int(counts[_NEAR_DUPLICATE])
