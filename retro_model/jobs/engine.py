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
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic

from retro_model.core.artifacts import DESCRIPTION, Artifact
from retro_model.core.config import Config, setting
from retro_model.core.errors import ConfigError, DamagedArtifactError, MismatchError
from retro_model.core.progress import Progress
from retro_model.jobs.job import Job, Opened, Part, Pending, Workers
from retro_model.jobs.local import ThisProcess, count_gpus, process_pool
from retro_model.jobs.ray_cluster import ray_cluster

logger = logging.getLogger(__name__)


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
            with ray_cluster(job, self.config.ray_address, self.config.ray_cpus, self.config.ray_gpus) as workers:
                yield Running(job, workers)
            return
        num_gpus = count_gpus(self.device) if job.uses_gpus else 0
        num_workers = self.config.workers or max(num_gpus, 1)
        if num_workers == 1:
            yield Running(job, ThisProcess(job))
            return
        with process_pool(job, num_workers, num_gpus) as workers:
            yield Running(job, workers)


class Running(Generic[Opened]):
    """A job with its workers. `facts` are the facts that all parts share."""

    def __init__(self, job: Job[Opened], workers: "Workers") -> None:
        self.job = job
        self.facts: dict[str, Any] = workers.facts()
        self._workers = workers

    def make(self, parts: Iterable[Part], work: Path, bar: Progress | None = None) -> Iterator[Artifact]:
        """Yield the parts' artifacts in order; make those that are not in the folder `work` yet.

        `bar` counts the units of parts that are made, and skips the rows of parts that are reused.
        """
        work = work.absolute()
        work.mkdir(parents=True, exist_ok=True)
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
            found = Artifact.open(folder, self.job.kind).require(**facts)
        except (DamagedArtifactError, MismatchError) as error:
            logger.warning(f"{folder.name}: made again, what was there is of no use ({error})")
            shutil.rmtree(folder)
            return None
        os.utime(folder)  # kept parts are deleted in the order of their last use: see jobs.parts
        return found

    def _wait(self, pending: "Pending", folder: Path, facts: dict[str, Any], bar: Progress | None) -> Artifact:
        for num in pending:
            if bar is not None:
                bar.update(num)
        return Artifact.open(folder, self.job.kind, verify=False).require(**facts)


def _reuse(found: Artifact, bar: Progress | None) -> Artifact:
    if bar is not None:
        bar.skip(found.rows)
    return found
