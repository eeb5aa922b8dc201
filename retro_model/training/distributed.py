"""Several processes that train one model: started here, or by torchrun.

    with together(2, "cpu", work) as world:      # work(world) runs in one other process, or in none
        work(world)

Process 0 is the one that a person sees: it logs, saves and obeys Ctrl-C; the others do what it does and end
with it, however it ends. `torchrun --nproc-per-node 4 -m stages.train` starts all of them from outside,
on one machine or several; then `together` only joins them.
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
SECONDS_TO_END = 10.0  # for a process whose group has broken


@dataclass(frozen=True)
class World:
    """The processes that train together, as one of them sees it; alone unless told."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def main(self) -> bool:
        """Whether this is the process that logs and saves."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all processes' values, in each of them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers, in each of them."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number, device=self.device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return int(numbers)

    def wait_for_all(self) -> None:
        """Returns when every process has come here."""
        self.largest(0)


ALONE = World()


def started_from_outside() -> bool:
    """Whether torchrun, or whoever sets what it sets, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_main_process() -> bool:
    """Whether this process is the one that logs and saves, as far as the environment says."""
    return not started_from_outside() or os.environ["RANK"] == "0"


def resolve_processes(processes: int, device: str, sequences: int) -> int:
    """How many processes `train.processes` stands for: 0 is one for each GPU, or one.

    Of the GPUs only so many are used as can share `sequences` evenly. Raises ConfigError where more are asked
    for than there are.
    """
    num_gpus = torch.cuda.device_count() if device == "cuda" else 0
    if device == "cuda" and processes > num_gpus:
        raise ConfigError(f"train.processes: found {processes}, expected at most {num_gpus}, the GPUs of this machine")
    return processes or max((count for count in range(1, num_gpus + 1) if sequences % count == 0), default=1)


@contextmanager
def together(count: int, device: str, work: Callable[[World], object]) -> Iterator[World]:
    """Starts `count` - 1 other processes, in each of which `work` runs, and yields this one's world.

    `work` must be importable by them (a function of a module), and a script that calls this must do so below
    `if __name__ == "__main__"`, because they import it, too. They end with this one: well
    when the block ends well, else at once. Processes that torchrun started are joined instead.

    Raises TrainingError where another process ended and left this one alone, or never began.
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
    others = [
        spawn.Process(target=_other, args=(rank, count, store.port, device, threads, work), daemon=True)
        for rank in range(1, count)
    ]
    before = torch.get_num_threads()
    for process in others:
        process.start()
    try:
        torch.set_num_threads(threads)
        _wait_for(others, store)
        with _group(0, count, 0, device, store) as world, _ending(others):
            yield world
    finally:
        torch.set_num_threads(before)
        for process in others:
            process.kill()
            process.join()


def _store(port: int, size: int, main: bool) -> Any:
    """Where the processes of this machine meet; port 0 is any that is free."""
    return dist.TCPStore("127.0.0.1", port, size, is_master=main, wait_for_workers=False)  # type: ignore[attr-defined]


@contextmanager
def _group(rank: int, size: int, local: int, device: str, store: Any | None) -> Iterator[World]:
    """This process as a member of the group."""
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
def _ending(others: Sequence[BaseProcess]) -> Iterator[None]:
    """Waits for the others when the block ends well; else ends them, and says if it was one of them that failed."""
    try:
        yield
    except BaseException as error:
        lost = _lost(others) if isinstance(error, RuntimeError) else None
        for process in others:
            process.kill()  # before they notice that they are alone
        if lost is None:
            raise
        rank, status = lost
        raise TrainingError(
            f"process {rank} of {len(others) + 1} ended with status {status} and left the others alone; what it said "
            "stands above; run again to go on from the last checkpoint"
        ) from error
    for process in others:
        process.join()


def _wait_for(others: Sequence[BaseProcess], store: Any) -> None:
    """Returns when all others have begun; one that ends before would be waited for in vain."""
    while not store.check([_begun(rank) for rank in range(1, len(others) + 1)]):
        for rank, process in enumerate(others, start=1):
            if process.exitcode is not None:
                raise TrainingError(
                    f"process {rank} of {len(others) + 1} ended with status {process.exitcode} before it began; what "
                    'it said stands above; a script must train below `if __name__ == "__main__":`'
                )
        time.sleep(0.05)


def _begun(rank: int) -> str:
    return f"begun {rank}"


def _lost(others: Sequence[BaseProcess]) -> tuple[int, int] | None:
    """The first of the other processes that has ended, and its status."""
    multiprocessing.connection.wait([process.sentinel for process in others], timeout=SECONDS_TO_END)
    for rank, process in enumerate(others, start=1):
        if process.exitcode is not None:
            return rank, process.exitcode
    return None


def _other(rank: int, size: int, port: int, device: str, threads: int, work: Callable[[World], object]) -> None:
    """What each of the other processes runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; process 0 says when to stop
    end_with_parent()
    torch.set_num_threads(threads)
    store = _store(port, size, main=False)
    store.set(_begun(rank), "")
    try:
        with _group(rank, size, rank, device, store) as world:
            work(world)
    except TrainingError:
        sys.exit(1)  # all see the same numbers, and process 0 says it
    except RetroError as error:
        sys.exit(f"process {rank}: {error}")
