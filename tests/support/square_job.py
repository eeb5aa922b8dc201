"""A job for the engine that squares numbers, and can be told to fail, to die or to hang."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from retro_model.core.artifacts import ArtifactWriter
from retro_model.core.errors import ConfigError, RetroError
from retro_model.jobs.engine import Engine, EngineConfig
from retro_model.jobs.job import Part, work_or_temporary


def wait_until(happened: Callable[[], object]) -> None:
    """For what must come about, however busy the machine is; gives up long after it should have."""
    deadline = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@dataclass(frozen=True)
class SquareJob:
    """Squares a range of numbers; writes down which process did it."""

    diary: Path
    offset: int = 0
    together: int = 0  # so many processes must have opened the job before a part is made
    broken: str = ""  # what happens in the part that begins at 20
    kind: ClassVar[str] = "embeddings"
    uses_gpus: ClassVar[bool] = False

    def open(self) -> int:
        if self.broken == "open":
            raise RetroError("the settings are off")
        with (self.diary / f"opened-{os.getpid()}").open("a") as stream:
            stream.write("x")
        return self.offset

    def facts(self, opened: int) -> dict[str, Any]:
        return {"offset": opened}

    def make(self, opened: int, folder: Path, start: int, stop: int) -> Iterator[int]:
        with (self.diary / f"made-{start}").open("a") as stream:
            stream.write("x")
        wait_until(lambda: len(list(self.diary.glob("opened-*"))) >= self.together)
        if start == 20 and self.broken == "user":
            raise ConfigError("numbers: found 20, expected another")
        if start == 20 and self.broken == "bug":
            raise KeyError("a bug")
        if start == 20 and self.broken == "death":
            wait_until((folder.parent / "p-00" / "artifact.json").exists)
            os.kill(os.getpid(), signal.SIGKILL)
        if start == 20 and self.broken == "hangs":
            (self.diary / f"hangs-{os.getpid()}").touch()
            wait_until((self.diary / "go on").exists)
        with ArtifactWriter(folder, self.kind, 10) as writer:
            writer.append(squares=np.arange(start, stop, dtype=np.int64) ** 2 + opened)
            yield stop - start
            writer.facts.update(self.facts(opened))


PARTS = [Part(f"p-{start:02d}", (start, start + 10), {}) for start in range(0, 50, 10)]
LOCAL = EngineConfig()


def run(job: SquareJob, work: Path, config: EngineConfig = LOCAL, parts: list[Part] = PARTS) -> list[int]:
    with work_or_temporary(work, work), Engine(config, "cpu").open(job) as running:
        assert running.facts == {"offset": job.offset}
        made = [part["squares"][:] for part in running.make(parts, work)]
    return [int(x) for x in np.concatenate(made)]


def times_made(diary: Path) -> list[int]:
    return [len(path.read_text()) for path in sorted(diary.glob("made-*"))]
