"""Make parts as tasks on a Ray cluster whose machines share the files under the same paths."""

import contextlib
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retro_model.core.errors import ConfigError, RetroError
from retro_model.core.processes import allow_open_files
from retro_model.jobs.job import PARTS_PER_WORKER, Job, Pending, make_part


class _Ray:
    """The tasks of a job, each with `cpus` and, if the job uses GPUs, `gpus` of its node.

    If a worker or a machine dies, Ray runs its task again elsewhere.
    """

    def __init__(self, ray: Any, job: Job[Any], cpus: int, gpus: float) -> None:
        self._ray = ray
        num_gpus = gpus if job.uses_gpus else 0.0
        options = {"num_cpus": cpus, "num_gpus": num_gpus, "max_retries": 5}
        self._facts = ray.remote(**options)(_facts_on_cluster)
        self._make = ray.remote(**options)(_make_on_cluster)
        self._key, self._job = uuid.uuid4().hex, ray.put(job)
        num_tasks = int(ray.cluster_resources().get("CPU", 1) // cpus)
        if num_gpus:
            num_tasks = min(num_tasks, int(ray.cluster_resources().get("GPU", 0) / num_gpus))
        if not num_tasks:
            raise ConfigError(
                f"runtime.ray_cpus {cpus} and runtime.ray_gpus {gpus:g} are more than the "
                f"cluster has ({ray.cluster_resources()})"
            )
        self.max_pending = num_tasks * PARTS_PER_WORKER

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = self._get(self._facts.remote(self._key, self._job))
        return facts

    def submit(self, folder: Path, arguments: tuple[Any, ...]) -> Pending:
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
def ray_cluster(job: Job[Any], address: str, cpus: int, gpus: float) -> Iterator[_Ray]:
    """Connect to the running cluster at `address` and yield the tasks of `job`."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("runtime.engine: ray needs Ray; run `pip install ray` in this environment") from error
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"runtime.ray_address: no Ray cluster at {address!r} ({' '.join(str(error).split())}); "
                "start one with `ray start --head`, or set runtime.engine: local"
            ) from error
    try:
        yield _Ray(ray, job, cpus, gpus)
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
