"""Progress on standard error: a bar in a terminal, a line every ten seconds elsewhere (CI, queues, logs)."""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows how many of `total` units of work are done; `update(n, note)` adds n.

    `done` is the number of units that an earlier run finished.
    """

    def __init__(self, title: str, total: int | None = None, unit: str = "it", done: int = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = done
        self._bar = tqdm(desc=title, total=total, unit=unit, initial=done, disable=None, leave=True, dynamic_ncols=True)
        self._started = self._last_line = time.monotonic()
        self._first = done

    def update(self, num: int = 1, note: str = "") -> None:
        """Count `num` more units; `note` is printed after the count."""
        self.done += num
        if not self._bar.disable:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(num)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._print_line(now, note)

    @property
    def num_new(self) -> int:
        """Units done by this run, without those that an earlier run finished."""
        return self.done - self._first

    def skip(self, num: int) -> None:
        """Count `num` units as done by an earlier run; they do not enter the rate."""
        self.done += num
        self._first += num
        if not self._bar.disable:
            self._bar.initial += num
            self._bar.update(num)

    def _print_line(self, now: float, note: str) -> None:
        rate = self.num_new / max(now - self._started, 1e-9)
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
    """Yield the items and show how many of `total` were consumed."""
    with Progress(title, total, unit) as bar:
        for item in items:
            yield item
            bar.update()
