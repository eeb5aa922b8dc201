"""A sign of life: a bar in a terminal, a plain line every so often elsewhere (CI, queues, logs)."""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts `total` units of work under a title; `update(n, note)` says that n more are done.

    Goes to standard error, and counts from `done` where earlier work is continued.
    """

    def __init__(self, title: str, total: int | None = None, unit: str = "it", done: int = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = done
        self._bar = tqdm(desc=title, total=total, unit=unit, initial=done, disable=None, leave=True, dynamic_ncols=True)
        self._started = self._last_line = time.monotonic()
        self._first = done

    def update(self, num: int = 1, note: str = "") -> None:
        """Counts `num` more units; `note` stands behind the count."""
        self.done += num
        if not self._bar.disable:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(num)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._line(now, note)

    @property
    def made(self) -> int:
        """Units done since the start, those that were found done left out."""
        return self.done - self._first

    def skip(self, num: int) -> None:
        """Counts `num` units as done earlier: they say nothing about how fast it goes."""
        self.done += num
        self._first += num
        if not self._bar.disable:
            self._bar.initial += num
            self._bar.update(num)

    def _line(self, now: float, note: str) -> None:
        rate = self.made / max(now - self._started, 1e-9)
        text = f"{self.title}: {self.done:,}"
        if self.total is not None:
            text += f" of {self.total:,} {self.unit}s, {max(self.total - self.done, 0) / max(rate, 1e-9):.0f} s left"
        else:
            text += f" {self.unit}s"
        print(f"{text}, {rate:,.1f} {self.unit}s/s{', ' + note if note else ''}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def progress(items: Iterable[Item], title: str, total: int | None = None, unit: str = "it") -> Iterator[Item]:
    """Yields the items and shows how many of `total` have been taken."""
    with Progress(title, total, unit) as shown:
        for item in items:
            yield item
            shown.update()
