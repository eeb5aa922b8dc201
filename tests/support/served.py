"""A service over a small run: the folder, and the service opened as `retro serve` opens it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from paths import ROOT
from small_run import small_run, write_model

from retro_model.core.artifacts import Artifact
from retro_model.inference.retriever import Retriever
from retro_model.retrofit.loading import open_model
from retro_model.serving.live import LiveDatabase
from retro_model.serving.service import Service
from retro_model.serving.watched import WatchedFiles
from retro_model.serving.worker import Worker

KNN = 2


def served_run(root: Path, seq_len: int = 512, **sizes: Any) -> Path:
    """A small run whose model reads longer texts, and whose params.yaml names the encoder."""
    small_run(root)
    shutil.rmtree(root / "models/retro")
    write_model(root / "models/retro", root / "data", retrieval=True, seq_len=seq_len, knn=KNN, **sizes)
    (root / "params.yaml").write_text(yaml.safe_dump({"embed": {"encoder": str(root / "encoder")}}))
    return root


def open_service(
    root: Path, *, most_waiting: int = 8, wait_seconds: float = 120, run_seconds: float = 120, most_chunks: int = 500
) -> Service:
    """The service; close its worker when done."""
    retriever = Retriever.open(root / "data", encoder=str(root / "encoder"))
    artifact = Artifact.open(root / "models/retro", "model")
    model = open_model(artifact)
    database = LiveDatabase(retriever, most_documents=3, most_chunks=most_chunks)
    return Service(model, database, KNN, Worker(most_waiting, wait_seconds, run_seconds), WatchedFiles([artifact]))


class Served(NamedTuple):
    """A running `retro serve`: its process, its port, and the folder for temporary files that it was given."""

    process: "subprocess.Popen[str]"
    port: int
    temporary: Path

    def rss(self) -> int:
        """Its memory, in KiB."""
        found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{self.process.pid}/status").read_text(), re.M)
        assert found is not None
        return int(found[1])


@contextmanager
def running(root: Path, *options: str, no_files: bool = False) -> Iterator[Served]:
    """`retro serve` as typed in `root`, in a process of its own; `no_files`: every write to a file fails there."""
    command = [sys.executable, "-m", "retro_model", "serve", "--port", "0", "--device", "cpu", *options]
    if no_files:
        command = ["bash", "-c", 'ulimit -f 0; exec "$@"', "bash", *command]
    with tempfile.TemporaryDirectory() as temporary:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": temporary, "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None and process.stderr is not None
            found = re.search(r":(\d+)/ ", process.stdout.readline())
            assert found is not None, process.stderr.read()
            yield Served(process, int(found[1]), Path(temporary))
        finally:
            process.kill()
            process.communicate()
