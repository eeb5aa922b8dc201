"""What a process that others started does first, whatever it was started for."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Ends this process as soon as its parent has ended, however that was and whatever this one waits for.

    A killed parent tells its children nothing, and they would keep memory and GPUs for good.
    """
    threading.Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
