"""Run a job part by part: in this process, in one process per GPU, or on a Ray cluster, with identical bytes.

Each part is an artifact of its own in a folder of work in progress, and appears there only when it is complete. A
second run of the job reuses the finished parts and makes the others, so a kill loses only the parts in progress.
The output depends on the parts, never on which process made them or in what order.

    with Engine().open(job) as running:
        for part in running.make(parts, work):      # artifacts, in the order of `parts`
            writer.adopt(part)

`Job.facts` returns what every part must have been made with. It is called on a machine that makes parts, because
the driver of a cluster may have no GPU and would resolve `auto` differently.
"""

import contextlib
import logging
import multiprocessing
import os
import shutil
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from retro_model.core.artifacts import DESCRIPTION, Artifact
from retro_model.core.config import Config, setting
from retro_model.core.errors import ConfigError, DamagedArtifactError, MismatchError, RetroError
from retro_model.core.printable import say
from retro_model.core.processes import allow_open_files, end_with_parent
from retro_model.core.progress import Progress

Opened = TypeVar("Opened")

# Parts submitted per worker: one in progress, one waiting.
PARTS_PER_WORKER = 2


class Part(NamedTuple):
    """One part: its folder's name, the arguments of `Job.make`, and facts that its artifact must record."""

    name: str
    arguments: tuple[Any, ...]
    facts: dict[str, Any]


class Outcome(NamedTuple):
    """Results of a finished job: `metrics` depend on the input alone, `timings` also on the machine."""

    metrics: dict[str, float]
    timings: dict[str, float]


def row_parts(split: str, rows: int, size: int, **facts: Any) -> Iterator[Part]:
    """Yield parts of `size` rows of a split, the last one shorter; one empty part if the split has no rows.

    A part's arguments are (split, start, stop).
    """
    for number, start in enumerate(range(0, max(rows, 1), size)):
        yield Part(f"{split}-{number:05d}", (split, start, min(start + size, rows)), facts)


@contextlib.contextmanager
def work_or_temporary(work: Path | None, out: Path) -> Iterator[Path]:
    """Yield `work`, or for None a temporary folder beside `out` that is deleted after the block."""
    if work is not None:
        yield work
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        yield Path(folder)


class Job(Protocol[Opened]):
    """A piece of work. Jobs are sent to other processes and machines, so they hold settings and absolute paths.

    `kind` is the artifact kind of the parts.
    """

    kind: ClassVar[str]

    @property
    def uses_gpus(self) -> bool:
        """Whether the job runs faster with one process per GPU."""

    def open(self) -> Opened:
        """Load what all parts need. Called once in each process."""

    def facts(self, opened: Opened) -> dict[str, Any]:
        """Return facts that every part records; a stored part with other facts is made again."""

    def make(self, opened: Opened, folder: Path, *arguments: Any) -> Iterator[int]:
        """Write a part into an empty folder; yield numbers of finished units for the progress bar."""


@dataclass(frozen=True)
class EngineConfig(Config, section="runtime"):
    """Where parts are made.

    `workers` is the number of processes of the local engine; 0 means one per GPU, or a single one without GPUs,
    because one process keeps all cores busy. A Ray task takes `ray_cpus` of its node, and `ray_gpus` if it embeds,
    or searches with a GPU build of faiss.
    """

    engine: str = setting("local", choices=("local", "ray"))
    workers: int = setting(0, minimum=0, maximum=1024)
    ray_address: str = setting("auto")
    ray_cpus: int = setting(1, minimum=1)
    ray_gpus: float = setting(0.0, minimum=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ray_address in ("", "local"):  # with these, Ray would start its own cluster and dashboard
            raise ConfigError(
                f"runtime.ray_address: found {self.ray_address!r}, expected auto or the address of a running cluster"
            )


@dataclass(frozen=True)
class Engine:
    """Runs jobs as configured; `device` is where jobs compute: auto, cpu or cuda."""

    config: EngineConfig = EngineConfig()
    device: str = "auto"

    @contextlib.contextmanager
    def open(self, job: Job[Any]) -> Iterator["Running[Any]"]:
        """Start the workers for `job` and yield a `Running` that makes its parts."""
        if self.config.engine == "ray":
            with _ray_cluster(self.config, job) as workers:
                yield Running(job, workers)
            return
        num_gpus = _num_gpus(self.device) if job.uses_gpus else 0
        num_workers = self.config.workers or max(num_gpus, 1)
        if num_workers == 1:
            yield Running(job, _ThisProcess(job))
            return
        with _process_pool(job, num_workers, num_gpus) as workers:
            yield Running(job, workers)


class Running(Generic[Opened]):
    """A job with its workers. `facts` are the facts that all parts share."""

    def __init__(self, job: Job[Opened], workers: "_Workers") -> None:
        self.job = job
        self.facts: dict[str, Any] = workers.facts()
        self._workers = workers

    def make(self, parts: Iterable[Part], work: Path, bar: Progress | None = None) -> Iterator[Artifact]:
        """Yield the parts' artifacts in order; make those that are not in the folder `work` yet.

        `bar` counts the units of parts that are made, and skips the rows of parts that are reused.
        """
        work = work.absolute()
        work.mkdir(parents=True, exist_ok=True)
        for leftover in work.glob("*.partial"):
            shutil.rmtree(leftover)
        results: deque[Callable[[], Artifact]] = deque()
        for part in parts:
            folder, facts = work / part.name, {**self.facts, **part.facts}
            if found := self._open_finished(folder, facts):
                results.append(partial(_reuse, found, bar))
            else:
                pending = self._workers.submit(folder, part.arguments)
                results.append(partial(self._wait, pending, folder, facts, bar))
            while len(results) >= self._workers.max_pending:
                yield results.popleft()()
        while results:
            yield results.popleft()()

    def _open_finished(self, folder: Path, facts: dict[str, Any]) -> Artifact | None:
        if not (folder / DESCRIPTION).is_file():
            if folder.exists():
                shutil.rmtree(folder)  # a kill interrupted its deletion
            return None
        try:
            return Artifact.open(folder, self.job.kind).require(**facts)
        except (DamagedArtifactError, MismatchError) as error:
            say(f"{folder.name}: made again, what was there is of no use ({error})")
            shutil.rmtree(folder)
            return None

    def _wait(self, pending: "_Pending", folder: Path, facts: dict[str, Any], bar: Progress | None) -> Artifact:
        for num in pending:
            if bar is not None:
                bar.update(num)
        return Artifact.open(folder, self.job.kind, verify=False).require(**facts)


def _reuse(found: Artifact, bar: Progress | None) -> Artifact:
    if bar is not None:
        bar.skip(found.rows)
    return found


def make_part(job: Job[Opened], opened: Opened, folder: Path, arguments: tuple[Any, ...]) -> Iterator[int]:
    """Make one part atomically: `folder` is complete or absent, even if two processes make the same part.

    That happens if a cluster gives up a machine that is still running. The process that finishes second discards
    its work, which equals the first one's.
    """
    unfinished = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.partial")
    unfinished.mkdir()
    try:
        yield from job.make(opened, unfinished, *arguments)
        try:
            unfinished.rename(folder)
        except OSError:
            if not (folder / DESCRIPTION).is_file():
                raise
    finally:
        if unfinished.exists():
            shutil.rmtree(unfinished)


# ---- workers: processes that make the parts ------------------------------------------------------------

_Pending = Iterable[int]  # numbers of finished units; exhausted when the part is complete


class _Workers(Protocol):
    """Processes that have opened a job. At most `max_pending` parts are submitted at a time."""

    max_pending: int

    def facts(self) -> dict[str, Any]: ...

    def submit(self, folder: Path, arguments: tuple[Any, ...]) -> _Pending: ...


class _ThisProcess:
    """This process; it makes a part while the caller iterates over the part's progress."""

    max_pending = 1

    def __init__(self, job: Job[Any]) -> None:
        self._job, self._opened = job, job.open()

    def facts(self) -> dict[str, Any]:
        return self._job.facts(self._opened)

    def submit(self, folder: Path, arguments: tuple[Any, ...]) -> _Pending:
        return make_part(self._job, self._opened, folder, arguments)


class _Pool:
    """A process pool on this machine."""

    def __init__(self, executor: ProcessPoolExecutor, num_workers: int) -> None:
        self._executor, self.max_pending = executor, num_workers * PARTS_PER_WORKER

    def facts(self) -> dict[str, Any]:
        with _pool_errors():
            facts: dict[str, Any] = self._executor.submit(_facts_in_worker).result()
            return facts

    def submit(self, folder: Path, arguments: tuple[Any, ...]) -> _Pending:
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
def _process_pool(job: Job[Any], num_workers: int, num_gpus: int) -> Iterator[_Pool]:
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
            executor.shutdown(wait=False, cancel_futures=True)
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


def _num_gpus(device: str) -> int:
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


# ---- Ray -------------------------------------------------------------------------------------------


class _Ray:
    """Tasks on a Ray cluster whose machines share the files under the same paths.

    If a worker or a machine dies, Ray runs its task again elsewhere.
    """

    def __init__(self, ray: Any, config: EngineConfig, job: Job[Any]) -> None:
        self._ray = ray
        num_gpus = config.ray_gpus if job.uses_gpus else 0.0
        options = {"num_cpus": config.ray_cpus, "num_gpus": num_gpus, "max_retries": 5}
        self._facts = ray.remote(**options)(_facts_on_cluster)
        self._make = ray.remote(**options)(_make_on_cluster)
        self._key, self._job = uuid.uuid4().hex, ray.put(job)
        num_tasks = int(ray.cluster_resources().get("CPU", 1) // config.ray_cpus)
        if num_gpus:
            num_tasks = min(num_tasks, int(ray.cluster_resources().get("GPU", 0) / num_gpus))
        if not num_tasks:
            raise ConfigError(
                f"runtime.ray_cpus {config.ray_cpus} and runtime.ray_gpus {config.ray_gpus:g} are more than the "
                f"cluster has ({ray.cluster_resources()})"
            )
        self.max_pending = num_tasks * PARTS_PER_WORKER

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = self._get(self._facts.remote(self._key, self._job))
        return facts

    def submit(self, folder: Path, arguments: tuple[Any, ...]) -> _Pending:
        return self._wait(self._make.remote(self._key, self._job, folder, arguments))

    def _wait(self, reference: Any) -> Iterator[int]:
        yield self._get(reference)

    def _get(self, reference: Any) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            return self._ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, RetroError):
                raise error.cause from None  # without the remote traceback: stages print these as one line
            raise
        except RayError as error:
            raise RetroError(
                f"the Ray cluster at {self._ray.get_runtime_context().gcs_address} lost a part for good "
                f"({type(error).__name__}); run again to go on with the parts that are finished"
            ) from error


@contextlib.contextmanager
def _ray_cluster(config: EngineConfig, job: Job[Any]) -> Iterator[_Ray]:
    try:
        import ray
    except ImportError as error:
        raise ConfigError("runtime.engine: ray needs Ray; run `pip install ray` in this environment") from error
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=config.ray_address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"runtime.ray_address: no Ray cluster at {config.ray_address!r} ({' '.join(str(error).split())}); "
                "start one with `ray start --head`, or set runtime.engine: local"
            ) from error
    try:
        yield _Ray(ray, config, job)
    finally:
        if started:
            ray.shutdown()


_opened_jobs: dict[str, Any] = {}  # in a Ray worker: job key -> what its `open()` returned, for the latest job only


def _opened_on_cluster(key: str, job: Job[Any]) -> Any:
    if key not in _opened_jobs:
        allow_open_files()
        _opened_jobs.clear()
        _opened_jobs[key] = job.open()
    return _opened_jobs[key]


def _facts_on_cluster(key: str, job: Job[Any]) -> dict[str, Any]:
    return job.facts(_opened_on_cluster(key, job))


def _make_on_cluster(key: str, job: Job[Any], folder: Path, arguments: tuple[Any, ...]) -> int:
    return sum(make_part(job, _opened_on_cluster(key, job), folder, arguments))
