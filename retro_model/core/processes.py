"""What a process does first, whatever it was started for."""

import multiprocessing
import os
import resource
import threading

# Each shard that is read is an open file, and knn reads several arrays of up to artifacts.MOST_PARTS shards.
OPEN_FILES = 1 << 16


def allow_open_files() -> None:
    """Lets this process, and those it starts, have OPEN_FILES open files, or as many as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


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
