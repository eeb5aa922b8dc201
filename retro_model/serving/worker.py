"""One thread does the work of all requests, one after the other; a few may wait.

    worker = Worker(most_waiting=8, wait_seconds=30, run_seconds=120)
    async with aclosing(worker.run(lambda: iter("abc"))) as results:
        async for result in results: ...

A caller that stops reading (its task is cancelled, or it closes the iterator) withdraws its work: if it waits, it never
starts; if it runs, it ends before its next result.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from retro_model.core.errors import RetroError

Result = TypeVar("Result")

CLOSING_SECONDS = 5.0  # how long `Worker.close` waits for the result that is being computed


class QueueFullError(RetroError):
    """As much work as allowed is waiting. `retry_after` is in seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting, which is the limit; try again in {retry_after} seconds")
        self.retry_after = retry_after


class WaitedTooLongError(RetroError):
    """The work was not started in time."""


class RanTooLongError(RetroError):
    """The work was not finished in time."""


class ClosedError(RetroError):
    """The worker is ending."""


@dataclass(frozen=True)
class _Failed:
    error: BaseException


_STARTED, _ENDED = object(), object()


class _Job:
    """Work, and the queue of the event loop that waits for its results."""

    def __init__(self, work: Callable[[], Iterator[Any]]) -> None:
        self.work = work
        self.withdrawn = False
        self.results: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def put(self, result: Any) -> None:
        """Hand a result to the loop, from any thread; the caller holds the worker's lock."""
        if not self.withdrawn:
            self._loop.call_soon_threadsafe(self.results.put_nowait, result)


class Worker:
    """Runs iterators in one thread, one at a time; `most_waiting` more wait in order.

    Work must start within `wait_seconds` and then end within `run_seconds`.
    """

    def __init__(self, most_waiting: int, wait_seconds: float, run_seconds: float) -> None:
        self.most_waiting, self.wait_seconds, self.run_seconds = most_waiting, wait_seconds, run_seconds
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._closed = False
        self._last_seconds = 1.0  # how long the latest work took
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="retro-worker", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """How many requests wait for the one that runs."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether something runs."""
        return self._running is not None

    async def run(self, work: Callable[[], Iterator[Result]]) -> AsyncGenerator[Result, None]:
        """Yield what the iterator `work()` yields; it runs in the worker's thread.

        Raises QueueFullError, WaitedTooLongError, RanTooLongError, ClosedError, and what the work raises.
        """
        job = _Job(work)
        self._submit(job)
        late: RetroError = WaitedTooLongError(
            f"the request waited {self.wait_seconds:g} seconds for others and was dropped; try again later"
        )
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.wait_seconds, job.results.put_nowait, _Failed(late))
        try:
            while (result := await job.results.get()) is not _ENDED:
                if result is _STARTED:
                    timer.cancel()
                    late = RanTooLongError(
                        f"the request ran for {self.run_seconds:g} seconds and was stopped; ask for less"
                    )
                    timer = loop.call_later(self.run_seconds, job.results.put_nowait, _Failed(late))
                elif isinstance(result, _Failed):
                    raise result.error
                else:
                    yield result
        finally:
            timer.cancel()
            self._withdraw(job)

    def stop(self) -> None:
        """End all work, running and waiting, with ClosedError, and accept no more; returns at once."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *([self._running] if self._running else [])):
                job.put(_Failed(ClosedError("the server is ending")))
                job.withdrawn = True
            self._waiting.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop, and wait for the thread to end."""
        self.stop()
        self._thread.join(CLOSING_SECONDS)

    def _submit(self, job: _Job) -> None:
        with self._changed:
            if self._closed:
                raise ClosedError("the server is ending")
            # The job that the thread will take next occupies no place: nothing runs yet.
            if len(self._waiting) >= self.most_waiting + (self._running is None):
                raise QueueFullError(len(self._waiting), max(1, math.ceil(self._last_seconds)))
            self._waiting.append(job)
            self._changed.notify_all()

    def _withdraw(self, job: _Job) -> None:
        with self._changed:
            job.withdrawn = True
            if job in self._waiting:
                self._waiting.remove(job)

    def _next(self) -> _Job | None:
        with self._changed:
            self._running = None
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._waiting:
                self._running = self._waiting.popleft()
            return self._running

    def _work(self) -> None:
        while (job := self._next()) is not None:
            started = time.monotonic()
            self._put(job, _STARTED)
            try:
                for result in job.work():
                    if job.withdrawn:
                        break
                    self._put(job, result)
                last: Any = _ENDED
            except BaseException as error:  # noqa: BLE001  raised again where the result is awaited
                last = _Failed(error)
            self._last_seconds = time.monotonic() - started
            self._put(job, last)

    def _put(self, job: _Job, result: Any) -> None:
        with self._changed:
            job.put(result)
