"""What a job is: work that is done in parts, each an artifact that is complete or absent.

A part is made by `make_part` in whichever process `Workers` choose; its bytes depend on the part alone.
"""

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from retro_model.core.artifacts import DESCRIPTION

Opened = TypeVar("Opened")

# Parts submitted per worker: one in progress, one waiting.
PARTS_PER_WORKER = 2

Pending = Iterable[int]  # numbers of finished units; exhausted when the part is complete


class Part(NamedTuple):
    """One part: its folder's name, the arguments of `Job.make`, and facts that its artifact must record."""

    name: str
    arguments: tuple[Any, ...]
    facts: dict[str, Any]


class Outcome(NamedTuple):
    """Results of a finished job: `metrics` depend on the input alone, `timings` also on the machine."""

    metrics: dict[str, float]
    timings: dict[str, float]


def row_parts(split: str, rows: int, size: int, **facts: Any) -> Iterator[Part]:
    """Yield parts of `size` rows of a split, the last one shorter; one empty part if the split has no rows.

    A part's arguments are (split, start, stop).
    """
    for number, start in enumerate(range(0, max(rows, 1), size)):
        yield Part(f"{split}-{number:05d}", (split, start, min(start + size, rows)), facts)


@contextlib.contextmanager
def work_or_temporary(work: Path | None, out: Path) -> Iterator[Path]:
    """Yield `work`, or for None a temporary folder beside `out` that is deleted after the block.

    Two processes must not use the same work folder at a time.
    """
    if work is not None:
        delete_leftovers(work)
        yield work
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        yield Path(folder)


def delete_leftovers(folder: Path) -> None:
    """Delete the unfinished parts that a kill left in the folder."""
    for leftover in folder.glob("*.partial"):
        shutil.rmtree(leftover)


class Job(Protocol[Opened]):
    """A piece of work. Jobs are sent to other processes and machines, so they hold settings and absolute paths.

    `kind` is the artifact kind of the parts.
    """

    kind: ClassVar[str]

    @property
    def uses_gpus(self) -> bool:
        """Whether the job runs faster with one process per GPU."""

    def open(self) -> Opened:
        """Load what all parts need. Called once in each process."""

    def facts(self, opened: Opened) -> dict[str, Any]:
        """Return facts that every part records; a stored part with other facts is made again."""

    def make(self, opened: Opened, folder: Path, *arguments: Any) -> Iterator[int]:
        """Write a part into an empty folder; yield numbers of finished units for the progress bar."""


def make_part(job: Job[Opened], opened: Opened, folder: Path, arguments: tuple[Any, ...]) -> Iterator[int]:
    """Make one part as `folder`; yield numbers of finished units."""
    with whole_part(folder) as unfinished:
        yield from job.make(opened, unfinished, *arguments)


@contextlib.contextmanager
def whole_part(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes the part `folder`, read-only, if the block succeeds.

    `folder` is complete or absent, even if two processes make the same part. That happens if a cluster gives up a
    machine that is still running. The process that finishes second discards its work, which equals the first one's.
    """
    unfinished = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.partial")
    unfinished.mkdir()
    try:
        yield unfinished
        for file in unfinished.iterdir():
            file.chmod(0o444)  # outputs are hard links to it
        try:
            unfinished.rename(folder)
        except OSError:
            if not (folder / DESCRIPTION).is_file():
                raise
    finally:
        if unfinished.exists():
            shutil.rmtree(unfinished)


class Workers(Protocol):
    """Processes that have opened a job. At most `max_pending` parts are submitted at a time."""

    max_pending: int

    def facts(self) -> dict[str, Any]:
        """The job's facts, from a process that makes parts."""

    def submit(self, folder: Path, arguments: tuple[Any, ...]) -> Pending:
        """Start a part, or put it in the queue."""
