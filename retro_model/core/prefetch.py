"""Prefetch an iterator in a background thread."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items in order while a background thread computes the next one or two.

    An exception of the iterator is raised in place of its item. This pays if one side leaves cores idle: reading,
    checking and cutting text run in Python on one core, encoding and training use all of them.
    """
    handover: queue.Queue[tuple[list[Any], BaseException | None]] = queue.Queue(maxsize=1)
    stop = threading.Event()
    finished = object()

    def put(item: Any, error: BaseException | None = None) -> None:
        while not stop.is_set():
            try:
                return handover.put(([item], error), timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(finished)
        except BaseException as error:  # noqa: BLE001  raised again in the consumer's thread
            put(finished, error)

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            box, error = handover.get()
            if error is not None:
                raise error
            if box[0] is finished:
                return
            yield box.pop()  # keep no reference: the item may be large, and the consumer may free parts of it early
    finally:
        stop.set()
        thread.join()
