"""What every loader of a model of transformers needs: quiet while it loads, and errors in one line."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers(show_downloads: bool) -> Iterator[None]:
    """Silence the loading reports of transformers in the block: the loaders themselves check what they report."""
    from transformers.utils import logging as reports  # takes a second, and most of what uses core loads no model

    verbosity, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity(logging.ERROR)
    if bars and not show_downloads:
        reports.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        reports.set_verbosity(verbosity)
        if bars and not show_downloads:
            reports.enable_progress_bar()  # type: ignore[no-untyped-call]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or what `repr` says of an error without one."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
