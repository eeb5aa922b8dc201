"""Train one model in several processes, started here or by torchrun.

    with launch(2, "cpu", work) as world:      # also runs work(world) in one worker process
        work(world)

Process 0 logs, saves and handles Ctrl-C. The workers run the same work and end when process 0 ends. With
`torchrun --nproc-per-node 4 -m stages.train`, on one machine or several, torchrun starts all processes, and
`launch` only joins their process group.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from retro_model.core.errors import ConfigError, RetroError, TrainingError
from retro_model.core.processes import end_with_parent

CPU = torch.device("cpu")
SECONDS_TO_END = 10.0  # how long to wait for a failed worker's exit status after a collective failed


@dataclass(frozen=True)
class World:
    """This process's rank, the number of processes, and this process's device; by default a single process."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def main(self) -> bool:
        """Whether this is process 0, which logs and saves."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes (all-reduce; changes `values` in place)."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, number: int) -> int:
        """The maximum of `number` over all processes (all-reduce)."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number, device=self.device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return int(numbers)

    def wait_for_all(self) -> None:
        """Barrier: return when every process has called this."""
        self.largest(0)


ALONE = World()


def started_from_outside() -> bool:
    """Whether torchrun, or a launcher that sets the same environment variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_main_process() -> bool:
    """Whether this process is the one that logs and saves, judged by torchrun's environment variables."""
    return not started_from_outside() or os.environ["RANK"] == "0"


def resolve_processes(processes: int, device: str, sequences: int) -> int:
    """The number of processes for a value of `train.processes`; 0 means one per GPU, or one without GPUs.

    0 uses the largest number of GPUs that divides `sequences`. Raises ConfigError if `processes` exceeds the GPUs.
    """
    num_gpus = torch.cuda.device_count() if device == "cuda" else 0
    if device == "cuda" and processes > num_gpus:
        raise ConfigError(f"train.processes: found {processes}, expected at most {num_gpus}, the GPUs of this machine")
    return processes or max((count for count in range(1, num_gpus + 1) if sequences % count == 0), default=1)


@contextmanager
def launch(count: int, device: str, work: Callable[[World], object]) -> Iterator[World]:
    """Start `count` - 1 worker processes that run `work`, and yield the World of this process.

    Workers are spawned, so `work` must be picklable (a module's function), and a script must call this under
    `if __name__ == "__main__"`. If the block succeeds, this waits for the workers; otherwise it kills them.
    Under torchrun, join the existing processes instead of starting any.

    Raises TrainingError if a worker fails to start or ends early.
    """
    if started_from_outside():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        with _group(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local, device, None) as world:
            yield world
        return
    if count == 1:
        yield World(device=torch.device(device))
        return
    threads = max(torch.get_num_threads() // count, 1) if device == "cpu" else torch.get_num_threads()
    store = _store(0, count, main=True)
    spawn = multiprocessing.get_context("spawn")
    workers = [
        spawn.Process(target=_worker_main, args=(rank, count, store.port, device, threads, work), daemon=True)
        for rank in range(1, count)
    ]
    before = torch.get_num_threads()
    for process in workers:
        process.start()
    try:
        torch.set_num_threads(threads)
        _wait_until_started(workers, store)
        with _group(0, count, 0, device, store) as world, _watch_workers(workers):
            yield world
    finally:
        torch.set_num_threads(before)
        for process in workers:
            process.kill()
            process.join()


def _store(port: int, size: int, main: bool) -> Any:
    """The store at which the processes of this machine find each other; port 0 picks a free port."""
    return dist.TCPStore("127.0.0.1", port, size, is_master=main, wait_for_workers=False)  # type: ignore[attr-defined]


@contextmanager
def _group(rank: int, size: int, local: int, device: str, store: Any | None) -> Iterator[World]:
    """Join the process group for the duration of the block."""
    place = torch.device(device)
    if device == "cuda":
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield World(rank, size, place)
    finally:
        dist.destroy_process_group()


@contextmanager
def _watch_workers(workers: Sequence[BaseProcess]) -> Iterator[None]:
    """Wait for the workers if the block succeeds; otherwise kill them.

    Raises TrainingError if the block failed because a worker had ended.
    """
    try:
        yield
    except BaseException as error:
        lost = _first_exited(workers) if isinstance(error, RuntimeError) else None
        for process in workers:
            process.kill()  # before they report the broken group themselves
        if lost is None:
            raise
        rank, status = lost
        raise TrainingError(
            f"process {rank} of {len(workers) + 1} ended with status {status} and left the others alone; what it said "
            "stands above; run again to go on from the last checkpoint"
        ) from error
    for process in workers:
        process.join()


def _wait_until_started(workers: Sequence[BaseProcess], store: Any) -> None:
    """Return when all workers have started. Raises TrainingError if one exits before that."""
    while not store.check([_started_key(rank) for rank in range(1, len(workers) + 1)]):
        for rank, process in enumerate(workers, start=1):
            if process.exitcode is not None:
                raise TrainingError(
                    f"process {rank} of {len(workers) + 1} ended with status {process.exitcode} before it began; what "
                    'it said stands above; a script must train below `if __name__ == "__main__":`'
                )
        time.sleep(0.05)


def _started_key(rank: int) -> str:
    return f"begun {rank}"


def _first_exited(workers: Sequence[BaseProcess]) -> tuple[int, int] | None:
    """The rank and exit status of the first worker that has exited; None if none has after SECONDS_TO_END."""
    multiprocessing.connection.wait([process.sentinel for process in workers], timeout=SECONDS_TO_END)
    for rank, process in enumerate(workers, start=1):
        if process.exitcode is not None:
            return rank, process.exitcode
    return None


def _worker_main(rank: int, size: int, port: int, device: str, threads: int, work: Callable[[World], object]) -> None:
    """The main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; process 0 decides when to stop
    end_with_parent()
    torch.set_num_threads(threads)
    store = _store(port, size, main=False)
    store.set(_started_key(rank), "")
    try:
        with _group(rank, size, rank, device, store) as world:
            work(world)
    except TrainingError:
        sys.exit(1)  # all processes see the same loss, and process 0 reports it
    except RetroError as error:
        sys.exit(f"process {rank}: {error}")
