"""Reading ahead changes nothing but the time it takes."""

import threading
from collections.abc import Iterator

import pytest

from retro_model.ahead import ahead
from retro_model.errors import DocumentError


def test_reading_ahead_changes_nothing_and_hands_errors_on() -> None:
    assert list(ahead(range(1000))) == list(range(1000))

    def broken() -> Iterator[int]:
        yield 1
        raise DocumentError("torn")

    seen = []
    with pytest.raises(DocumentError, match="torn"):
        for item in ahead(broken()):
            seen.append(item)
    assert seen == [1]


def test_reading_ahead_ends_with_its_reader() -> None:
    threads = threading.active_count()
    reader = ahead(iter(int, 1))  # endless
    next(reader)
    reader.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads


def test_no_more_than_one_batch_waits() -> None:
    made_so_far = []

    def items() -> Iterator[int]:
        for number in range(100):
            made_so_far.append(number)
            yield number

    for number in ahead(items()):
        assert len(made_so_far) <= number + 4
