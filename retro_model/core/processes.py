"""Process setup: the limit of open files, exiting with the parent."""

import multiprocessing
import os
import resource
import threading

# Each shard being read is an open file, and knn reads several arrays of up to artifacts.MOST_PARTS shards.
OPEN_FILES = 1 << 16


def allow_open_files() -> None:
    """Raise the limit of open files to OPEN_FILES, or as far as the system allows, also for child processes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def end_with_parent() -> None:
    """Exit this process as soon as its parent ends, even if the parent was killed or this process is blocked.

    Without this, the children of a killed parent would run on and keep their memory and GPUs.
    """
    threading.Thread(target=_exit_after_parent, daemon=True).start()


def _exit_after_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
