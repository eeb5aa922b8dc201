"""Make parts on this machine: in this process, or in a pool of processes that share its GPUs."""

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from retro_model.core.errors import RetroError
from retro_model.core.processes import allow_open_files, end_with_parent
from retro_model.jobs.job import PARTS_PER_WORKER, Job, Pending, make_part


class ThisProcess:
    """This process; it makes a part while the caller iterates over the part's progress."""

    max_pending = 1

    def __init__(self, job: Job[Any]) -> None:
        self._job, self._opened = job, job.open()

    def facts(self) -> dict[str, Any]:
        """See Workers."""
        return self._job.facts(self._opened)

    def submit(self, folder: Path, arguments: tuple[Any, ...]) -> Pending:
        """See Workers. The part is made as the caller iterates."""
        return make_part(self._job, self._opened, folder, arguments)


class _Pool:
    """A process pool on this machine."""

    def __init__(self, executor: ProcessPoolExecutor, num_workers: int) -> None:
        self._executor, self.max_pending = executor, num_workers * PARTS_PER_WORKER

    def facts(self) -> dict[str, Any]:
        with _pool_errors():
            facts: dict[str, Any] = self._executor.submit(_facts_in_worker).result()
            return facts

    def submit(self, folder: Path, arguments: tuple[Any, ...]) -> Pending:
        with _pool_errors():
            return self._wait(self._executor.submit(_make_in_worker, folder, arguments))

    @staticmethod
    def _wait(future: "Future[int]") -> Iterator[int]:
        with _pool_errors():
            yield future.result()


@contextlib.contextmanager
def _pool_errors() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise RetroError(
            f"a worker process died ({error}); if the system stopped it for memory, set runtime.workers lower; "
            "run again to go on with the parts that are finished"
        ) from error


@contextlib.contextmanager
def process_pool(job: Job[Any], num_workers: int, num_gpus: int) -> Iterator[_Pool]:
    """Start the processes, each with one of the GPUs in turn; they end with the block, and with this process."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
    numbers = context.SimpleQueue()
    for number in range(num_workers):
        numbers.put(number)
    threads = str(max(1, (os.cpu_count() or 1) // num_workers))
    with (
        _environment(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", threads), TOKENIZERS_PARALLELISM="false"),
        ProcessPoolExecutor(num_workers, context, _start_worker, (job, numbers, num_gpus)) as executor,
    ):
        try:
            yield _Pool(executor, num_workers)
        except BaseException:
            # They would go on with their parts, beside the workers of the next run. What is half made is of no use.
            for worker in list((executor._processes or {}).values()):  # Python 3.14 has `kill_workers`
                worker.kill()
            executor.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables in this block, for the processes that are started in it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# State of a worker process: "job", and "opened", what `job.open()` returned.
_worker: dict[str, Any] = {}


def _start_worker(job: Job[Any], numbers: Any, num_gpus: int) -> None:
    end_with_parent()
    allow_open_files()
    number = numbers.get()
    if num_gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % num_gpus]
    _worker["job"] = job


def _worker_job() -> tuple[Job[Any], Any]:
    """Return the job and what it loaded. Loading waits for the first part, so that its errors reach the caller."""
    if "opened" not in _worker:
        _worker["opened"] = _worker["job"].open()
    return _worker["job"], _worker["opened"]


def _facts_in_worker() -> dict[str, Any]:
    job, opened = _worker_job()
    return job.facts(opened)


def _make_in_worker(folder: Path, arguments: tuple[Any, ...]) -> int:
    job, opened = _worker_job()
    return sum(make_part(job, opened, folder, arguments))


def count_gpus(device: str) -> int:
    """The number of GPUs that a job on `device` (auto, cpu or cuda) can use."""
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()
