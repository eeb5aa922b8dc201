"""Items made in a thread while those before them are used."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items in order, the next one or two made while this one is used; errors come where their item would.

    It pays where one side leaves cores idle: reading, checking and cutting are Python, encoding and
    training are not.
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

    def make() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(finished)
        except BaseException as error:  # noqa: BLE001  raised again where the items are used
            put(finished, error)

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            box, error = handover.get()
            if error is not None:
                raise error
            if box[0] is finished:
                return
            yield box.pop()  # it may be large, and whoever gets it may need only a part: nothing of it stays here
    finally:
        stop.set()
        thread.join()
