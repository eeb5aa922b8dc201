"""Prefetching changes nothing but the time it takes."""

import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from retro_model.core.errors import DocumentError
from retro_model.core.prefetch import prefetch


def test_reading_ahead_changes_nothing_and_hands_errors_on() -> None:
    assert list(prefetch(range(1000))) == list(range(1000))

    def broken() -> Iterator[int]:
        yield 1
        raise DocumentError("torn")

    seen = []
    with pytest.raises(DocumentError, match="torn"):
        for item in prefetch(broken()):
            seen.append(item)
    assert seen == [1]


def test_reading_ahead_ends_with_its_reader() -> None:
    threads = threading.active_count()
    reader = prefetch(iter(int, 1))  # endless
    next(reader)
    reader.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads


def test_no_more_than_one_batch_waits() -> None:
    made_so_far = []

    def items() -> Iterator[int]:
        for number in range(100):
            made_so_far.append(number)
            yield number

    for number in prefetch(items()):
        assert len(made_so_far) <= number + 4


def test_what_was_handed_over_is_not_kept() -> None:
    """All but the very last, which the maker has in hand until it makes another."""

    class Large:
        pass

    number = 0
    for item in prefetch(Large() for _ in range(20)):
        number, held = number + 1, weakref.ref(item)
        del item
        late = time.monotonic() + 10
        while number < 20 and held() is not None:
            assert time.monotonic() < late
            time.sleep(0.001)
