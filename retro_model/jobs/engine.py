"""Work in parts: by this process, by a process for each GPU, or by a Ray cluster, with the same bytes.

A job is cut into parts. Each is an artifact of its own in a folder of work in progress, there when it
is whole and not before. Whoever runs the job again finds the finished parts and makes the others, so a
kill costs the parts that were being made. What a job writes depends on its parts, never on who made
them or in what order.

    with Engine().open(job) as running:
        for part in running.make(parts, work):      # artifacts, in the order of `parts`
            writer.adopt(part)

A job says in `facts` what every part must have been made with, and is asked on a machine that makes
parts: the driver of a cluster may have no GPU, and would resolve `auto` to something else.
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
from retro_model.core.processes import allow_open_files, end_with_parent
from retro_model.core.progress import Progress

Opened = TypeVar("Opened")

# Parts in the hands of each worker: one at work, one waiting.
PARTS_PER_WORKER = 2


class Part(NamedTuple):
    """One part: the name of its folder, what the job needs to make it, and facts that it then records."""

    name: str
    arguments: tuple[Any, ...]
    facts: dict[str, Any]


class Outcome(NamedTuple):
    """What there is to say of finished work: `metrics` follow from the input, `timings` from the machine too."""

    metrics: dict[str, float]
    timings: dict[str, float]


def row_parts(split: str, rows: int, size: int, **facts: Any) -> Iterator[Part]:
    """Ranges of `size` rows of a split, the last one shorter; one of none where there are no rows.

    A job gets (split, start, stop).
    """
    for number, start in enumerate(range(0, max(rows, 1), size)):
        yield Part(f"{split}-{number:05d}", (split, start, min(start + size, rows)), facts)


@contextlib.contextmanager
def work_or_temporary(work: Path | None, out: Path) -> Iterator[Path]:
    """The folder of work in progress that was given, or one beside `out` that does not outlive the block."""
    if work is not None:
        yield work
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        yield Path(folder)


class Job(Protocol[Opened]):
    """What is to be done. It travels to other processes and machines, so it holds settings and full paths.

    `kind` is the kind of artifact that a part is.
    """

    kind: ClassVar[str]

    @property
    def uses_gpus(self) -> bool:
        """Whether it gains by a process for each GPU."""

    def open(self) -> Opened:
        """Loads what all parts need. Called once in each process."""

    def facts(self, opened: Opened) -> dict[str, Any]:
        """Facts that every part records; a part with others is of another job and is made again."""

    def make(self, opened: Opened, folder: Path, *arguments: Any) -> Iterator[int]:
        """Writes a part into an empty folder; yields numbers of units as they are done, for the progress bar."""


@dataclass(frozen=True)
class EngineConfig(Config, section="runtime"):
    """Who makes the parts.

    `workers` of the local engine are processes; 0 is one for each GPU, or one where there is none: a
    process keeps all cores busy. A Ray task takes `ray_cpus` of its node, and `ray_gpus` if it embeds, or
    searches with a faiss for GPUs.
    """

    engine: str = setting("local", choices=("local", "ray"))
    workers: int = setting(0, minimum=0, maximum=1024)
    ray_address: str = setting("auto")
    ray_cpus: int = setting(1, minimum=1)
    ray_gpus: float = setting(0.0, minimum=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ray_address in ("", "local"):  # Ray would start a cluster, and a dashboard, of its own
            raise ConfigError(
                f"runtime.ray_address: found {self.ray_address!r}, expected auto or the address of a running cluster"
            )


@dataclass(frozen=True)
class Engine:
    """Runs jobs as configured; `device` is where the job computes: auto, cpu or cuda."""

    config: EngineConfig = EngineConfig()
    device: str = "auto"

    @contextlib.contextmanager
    def open(self, job: Job[Any]) -> Iterator["Running[Any]"]:
        """The job, opened by those who will make its parts."""
        if self.config.engine == "ray":
            with _ray_cluster(self.config, job) as workers:
                yield Running(job, workers)
            return
        num_gpus = _num_gpus(self.device) if job.uses_gpus else 0
        num_workers = self.config.workers or max(num_gpus, 1)
        if num_workers == 1:
            yield Running(job, _Here(job))
            return
        with _process_pool(job, num_workers, num_gpus) as workers:
            yield Running(job, workers)


class Running(Generic[Opened]):
    """A job at work. `facts` are those that all its parts share."""

    def __init__(self, job: Job[Opened], workers: "_Workers") -> None:
        self.job = job
        self.facts: dict[str, Any] = workers.facts()
        self._workers = workers

    def make(self, parts: Iterable[Part], work: Path, shown: Progress | None = None) -> Iterator[Artifact]:
        """The parts' artifacts in order; those that are not in the folder `work` yet are made.

        `shown` counts units of parts that are made; of parts that are found, their rows.
        """
        work = work.absolute()
        work.mkdir(parents=True, exist_ok=True)
        for leftover in work.glob("*.partial"):
            shutil.rmtree(leftover)
        ahead: deque[Callable[[], Artifact]] = deque()
        for part in parts:
            folder, facts = work / part.name, {**self.facts, **part.facts}
            if found := self._found(folder, facts):
                ahead.append(partial(_take, found, shown))
            else:
                pending = self._workers.submit(folder, part.arguments)
                ahead.append(partial(self._wait, pending, folder, facts, shown))
            while len(ahead) >= self._workers.ahead:
                yield ahead.popleft()()
        while ahead:
            yield ahead.popleft()()

    def _found(self, folder: Path, facts: dict[str, Any]) -> Artifact | None:
        if not (folder / DESCRIPTION).is_file():
            if folder.exists():
                shutil.rmtree(folder)  # what a kill left of one that was being deleted
            return None
        try:
            return Artifact.open(folder, self.job.kind).require(**facts)
        except (DamagedArtifactError, MismatchError) as error:
            print(f"{folder.name}: made again, what was there is of no use ({error})", flush=True)
            shutil.rmtree(folder)
            return None

    def _wait(self, pending: "_Pending", folder: Path, facts: dict[str, Any], shown: Progress | None) -> Artifact:
        for num in pending:
            if shown is not None:
                shown.update(num)
        return Artifact.open(folder, self.job.kind, verify=False).require(**facts)


def _take(found: Artifact, shown: Progress | None) -> Artifact:
    if shown is not None:
        shown.skip(found.rows)
    return found


def make_part(job: Job[Opened], opened: Opened, folder: Path, arguments: tuple[Any, ...]) -> Iterator[int]:
    """Makes one part: whole or absent, also when two processes make the same one at a time.

    That happens when a machine is taken for dead and is not: whoever is second drops its work, which
    is the same.
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


# ---- who makes the parts ---------------------------------------------------------------------------

_Pending = Iterable[int]  # units done, as they are done; exhausted when the part is whole


class _Workers(Protocol):
    """Processes that have opened a job. `ahead` is how many parts may be in their hands."""

    ahead: int

    def facts(self) -> dict[str, Any]: ...

    def submit(self, folder: Path, arguments: tuple[Any, ...]) -> _Pending: ...


class _Here:
    """This process: a part is made when it is waited for."""

    ahead = 1

    def __init__(self, job: Job[Any]) -> None:
        self._job, self._opened = job, job.open()

    def facts(self) -> dict[str, Any]:
        return self._job.facts(self._opened)

    def submit(self, folder: Path, arguments: tuple[Any, ...]) -> _Pending:
        return make_part(self._job, self._opened, folder, arguments)


class _Pool:
    """Processes on this machine."""

    def __init__(self, executor: ProcessPoolExecutor, num_workers: int) -> None:
        self._executor, self.ahead = executor, num_workers * PARTS_PER_WORKER

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
    """The variables are set in the block: what is started there inherits them."""
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


# What a worker process holds: its job, and what that job loaded.
_worker: dict[str, Any] = {}


def _start_worker(job: Job[Any], numbers: Any, num_gpus: int) -> None:
    end_with_parent()
    allow_open_files()
    number = numbers.get()
    if num_gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % num_gpus]
    _worker["job"] = job


def _in_worker() -> tuple[Job[Any], Any]:
    """The job and what it loaded, loaded at the first part: so an error in it is that part's error."""
    if "opened" not in _worker:
        _worker["opened"] = _worker["job"].open()
    return _worker["job"], _worker["opened"]


def _facts_in_worker() -> dict[str, Any]:
    job, opened = _in_worker()
    return job.facts(opened)


def _make_in_worker(folder: Path, arguments: tuple[Any, ...]) -> int:
    job, opened = _in_worker()
    return sum(make_part(job, opened, folder, arguments))


def _num_gpus(device: str) -> int:
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


# ---- Ray -------------------------------------------------------------------------------------------


class _Ray:
    """Tasks on a cluster whose machines see the same files under the same paths.

    A task whose worker or machine died runs again elsewhere.
    """

    def __init__(self, ray: Any, config: EngineConfig, job: Job[Any]) -> None:
        self._ray = ray
        num_gpus = config.ray_gpus if job.uses_gpus else 0.0
        options = {"num_cpus": config.ray_cpus, "num_gpus": num_gpus, "max_retries": 5}
        self._facts = ray.remote(**options)(_facts_on_cluster)
        self._make = ray.remote(**options)(_make_on_cluster)
        self._key, self._job = uuid.uuid4().hex, ray.put(job)
        places = int(ray.cluster_resources().get("CPU", 1) // config.ray_cpus)
        if num_gpus:
            places = min(places, int(ray.cluster_resources().get("GPU", 0) / num_gpus))
        if not places:
            raise ConfigError(
                f"runtime.ray_cpus {config.ray_cpus} and runtime.ray_gpus {config.ray_gpus:g} are more than the "
                f"cluster has ({ray.cluster_resources()})"
            )
        self.ahead = places * PARTS_PER_WORKER

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
                raise error.cause from None  # the user's fault: one line, wherever it was found
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


_on_cluster: dict[str, Any] = {}  # what this worker process loaded for the job that it last worked for


def _opened_on_cluster(key: str, job: Job[Any]) -> Any:
    if key not in _on_cluster:
        allow_open_files()
        _on_cluster.clear()
        _on_cluster[key] = job.open()
    return _on_cluster[key]


def _facts_on_cluster(key: str, job: Job[Any]) -> dict[str, Any]:
    return job.facts(_opened_on_cluster(key, job))


def _make_on_cluster(key: str, job: Job[Any], folder: Path, arguments: tuple[Any, ...]) -> int:
    return sum(make_part(job, _opened_on_cluster(key, job), folder, arguments))
