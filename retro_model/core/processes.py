"""What a process may use, and when it ends: open files, memory, exiting with the parent."""

import multiprocessing
import os
import resource
import threading
from pathlib import Path

# Each shard being read is an open file, and knn reads several arrays of up to artifacts.MOST_PARTS shards.
OPEN_FILES = 1 << 16

# The limit that a container or a batch system sets: of version 2 and of version 1 of control groups.
GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def allow_open_files() -> None:
    """Raise the limit of open files to OPEN_FILES, or as far as the system allows, also for child processes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def available_memory() -> int:
    """Return how many bytes of memory a process can take without swapping, or less if a control group limits it."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    (available,) = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    limits = [Path(path).read_text(encoding="ascii").strip() for path in GROUP_LIMITS if Path(path).is_file()]
    return min([available, *(int(limit) for limit in limits if limit != "max")])


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
