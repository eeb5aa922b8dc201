"""Read every document of a folder once, and account for what is not used: counted by reason, and named.

    found, report, options = find_files(folder), ReadingReport(), ReadingOptions(where=str(folder))
    report.add_files(found)
    for file, name in found.files:
        for entry in report.usable_entries(file, name, options):
            entry.text
    print(*report.lines(), sep="\\n")

Some things are never left out, because how much text there is would then depend on the machine: a file that the
system cannot read, and one that takes more memory or another library than there is here. These are DocumentErrors.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from retro_model.core.errors import DocumentError
from retro_model.core.printable import one_line
from retro_model.corpus.files import FoundFiles
from retro_model.corpus.readers import FLAWS, Entry, read_entries

MAX_EXAMPLES = 3  # of each flaw, from files that are read otherwise
MAX_NAMES = 20  # of files that are not read


@dataclass(frozen=True)
class ReadingOptions:
    """How documents are read, and whether the first unusable one is an error; `where` begins its message."""

    where: str
    text_field: str = "text"
    separator: str | None = None
    refuse: bool = False


@dataclass
class ReadingReport:
    """What was read and what was not used, with reasons.

    `lost` names every file that no document could be read from, or that could not be read to its end, with the
    reason. `examples` are the first flaws of files that are read otherwise. `special` and `ignored` name files that
    were not opened; see FoundFiles.
    """

    read: int = 0
    flawed: Counter[str] = field(default_factory=Counter)
    other_files: int = 0
    special: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    _num_examples: Counter[str] = field(default_factory=Counter, init=False, repr=False)

    def add_files(self, found: FoundFiles) -> None:
        """Count and name the files that will not be opened."""
        self.other_files = found.other_files
        self.special = [one_line(name) for name in found.special]
        self.ignored = [one_line(name) for name in found.ignored]

    def usable_entries(self, file: Path, name: str, options: ReadingOptions) -> Iterator[Entry]:
        """Yield the documents of a file, and account for its flaws; `name` stands for the file in the report.

        Raises DocumentError at the first flaw if the options refuse it, and if the file cannot be read for a reason
        that lies in this machine.
        """
        usable, flaws = 0, list[Entry]()  # the first few of each kind, and the one that ended the reading
        counts: Counter[str] = Counter()
        for entry in read_entries(file, name, options.text_field, options.separator):
            self.read += entry.times
            if not entry.flaw:
                usable += 1
                yield entry
                continue
            if options.refuse:
                raise DocumentError(
                    f"{options.where}: {describe_flaw(entry)}; mend it, or leave such documents out with "
                    "corpus.bad_documents: skip"
                )
            if counts[entry.flaw] < MAX_EXAMPLES:
                flaws.append(entry)
            counts[entry.flaw] += entry.times
        self.flawed.update(counts)
        self._name_flaws(usable, flaws, counts)

    def _name_flaws(self, usable: int, flaws: list[Entry], counts: Counter[str]) -> None:
        """Name the file if it is lost, else up to MAX_EXAMPLES of its flaws."""
        reasons = [entry for entry in flaws if entry.flaw != "empty"]  # an empty file has nothing to lose
        if reasons and reasons[-1].flaw == "bad_file":
            kept = f"; the {usable:,} documents before that are used" if usable else ""
            self.lost.append(describe_flaw(reasons[-1]) + kept)
            flaws = flaws[:-1]
        elif reasons and not usable:
            more = counts.total() - reasons[0].times
            self.lost.append(describe_flaw(reasons[0]) + (f", and {more:,} more that are unusable" if more else ""))
            flaws = []
        for entry in flaws:
            if self._num_examples[entry.flaw] < MAX_EXAMPLES:
                self._num_examples[entry.flaw] += 1
                self.examples.append(describe_flaw(entry))

    def metrics(self) -> dict[str, int]:
        """Return the counts under flat names, for a metrics file."""
        return {
            "documents_read": self.read,
            **{f"dropped_{name}": self.flawed[name] for name in FLAWS},
            "lost_files": len(self.lost),
            "special_files": len(self.special),
            "ignored_files": len(self.ignored),
            "other_files": self.other_files,
        }

    def lines(self) -> list[str]:
        """Return what was not used, and why, as lines of text."""
        lines = [f"dropped: {count:,} {FLAWS[name]}" for name, count in sorted(self.flawed.items())]
        lines += [f"  {example}" for example in self.examples]
        if self.lost:
            lines.append(f"lost, in whole or from some place on: {len(self.lost):,} files")
            lines += [f"  {name}" for name in self.lost]
        if self.special:
            lines.append(f"not read: {len(self.special):,} pipes, sockets or devices: {_listed(self.special)}")
        if self.ignored:
            lines.append(f"not read: {len(self.ignored):,} that .dvcignore hides: {_listed(self.ignored)}")
        if self.other_files:
            lines.append(f"left aside: {self.other_files:,} files of other types")
        return lines


def describe_flaw(entry: Entry) -> str:
    """Return where an unusable document is and what is wrong with it."""
    return f"{entry.place}: {FLAWS[entry.flaw]}{f' ({entry.detail})' if entry.detail else ''}"


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more:,} more" if more > 0 else "")
