"""Progress on standard error: a bar in a terminal, a line every ten seconds elsewhere (CI, queues, logs)."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_LOOKS = 1.0  # at a unit of work that takes long


class Progress:
    """Shows how many of `total` units of work are done; `update(n, note)` adds n.

    `done` is the number of units that an earlier run finished. Within a `with` block it also reports while one unit
    takes long, such as a very long document.
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
        else:
            self._print_if_due(note)

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

    def _look(self) -> None:
        if not self._bar.disable:
            self._bar.refresh()  # its clock goes on
        else:
            self._print_if_due()

    def _print_if_due(self, note: str = "") -> None:
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._print_line(now, note)

    def _print_line(self, now: float, note: str) -> None:
        rate = self.num_new / max(now - self._started, 1e-9)
        text = f"{self.title}: {self.done:,}"
        if self.total is not None:
            left = f"{max(self.total - self.done, 0) / rate:.0f}" if rate else "?"
            text += f" of {self.total:,} {self.unit}s, {left} s left"
        else:
            text += f" {self.unit}s"
        print(f"{text}, {rate:,.1f} {self.unit}s/s{', ' + note if note else ''}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        self._looks = _regularly(self._look, SECONDS_BETWEEN_LOOKS)
        self._looks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._looks.__exit__(None, None, None)
        self._bar.close()


def progress(items: Iterable[Item], title: str, total: int | None = None, unit: str = "it") -> Iterator[Item]:
    """Yield the items and show how many of `total` were consumed."""
    with Progress(title, total, unit) as bar:
        for item in items:
            yield item
            bar.update()


@contextmanager
def report_elapsed(title: str) -> Iterator[None]:
    """Print every ten seconds how long the block has run, for calls into a library that report nothing themselves."""
    started = time.monotonic()

    def report() -> None:
        # tqdm.write does not break the line of a bar
        tqdm.write(f"{title}: {time.monotonic() - started:.0f} s so far", file=sys.stderr)

    with _regularly(report, SECONDS_BETWEEN_LINES):
        yield


@contextmanager
def _regularly(function: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call the function every so many seconds in a background thread while the block runs."""
    ended = threading.Event()

    def call() -> None:
        while not ended.wait(seconds):
            function()

    thread = threading.Thread(target=call, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
