"""The library calls of the data stages in small parts, and a program that stops where it is told to be killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures import tiny_corpus, tiny_data, tiny_encoder
from paths import SUPPORT

from retro_model.core import artifacts
from retro_model.corpus import chunking
from retro_model.corpus.chunking import make_chunks
from retro_model.corpus.documents import CorpusConfig
from retro_model.embedding.config import EmbedConfig
from retro_model.embedding.embed import make_embeddings
from retro_model.jobs import local
from retro_model.jobs.engine import Engine, EngineConfig
from retro_model.jobs.parts import Parts
from retro_model.search import build as index_building
from retro_model.search.build import make_index
from retro_model.search.keys import IndexConfig
from retro_model.search.neighbors import NeighborsConfig, make_neighbors

STAGES = ("chunk", "embed", "index", "knn")
OUT = {"chunk": "chunks", "embed": "embeddings", "index": "index", "knn": "neighbors"}
CORPUS = CorpusConfig(valid=0.15, test=0.15)


def make(stage: str, data: Path, out: Path, work: Path, config: EngineConfig) -> None:
    """Runs one stage's library call in small parts."""
    options = {"engine": Engine(config, "cpu"), "work_folder": work}
    keeping = {"engine": Engine(config, "cpu"), "parts": Parts(work, 1 << 40)}
    embed = EmbedConfig(encoder=str(data / "encoder"), number_type="float32")
    calls: dict[str, Callable[[], object]] = {
        "chunk": lambda: make_chunks(data / "documents", CORPUS, data / "tokenizer", 16, out, **keeping),
        "embed": lambda: make_embeddings(data / "chunks", data / "tokenizer", embed, out, device="cpu", **keeping),
        "index": lambda: make_index(data / "embeddings", IndexConfig(key="IVF16,Flat"), out, **options),
        "knn": lambda: make_neighbors(
            data / "embeddings", data / "index", data / "chunks", NeighborsConfig(stored=8), out, **options
        ),
    }
    calls[stage]()


def small_parts(set_attribute: Callable[[object, str, int], None] = setattr) -> None:
    """Makes parts so small that there are many; in a test, with monkeypatch.setattr."""
    set_attribute(artifacts, "LEAST_ROWS_PER_PART", 256)
    set_attribute(chunking, "LEAST_BLOCK_BYTES", 5_000)
    set_attribute(index_building, "ROWS_PER_ADDED_PART", 128)


# Where a process stands when it is killed: a few finished parts lie there, and it is about to make the next
# one, in the middle of it, or putting the whole result into its place.
POINTS = ("inside 0", "before 1", "inside 3", "the end")


def main(stage: str, data: str, out: str, work: str, point: str) -> None:
    """What a child process runs: says when it is at the point, and goes no further."""
    small_parts()
    make_part, replace = local.make_part, os.replace

    def reach(here: str) -> None:
        if here == point:
            print(here, flush=True)
            signal.pause()

    def making(*arguments: Any) -> Iterator[int]:
        num_finished = len(finished(Path(work)))
        reach(f"before {num_finished}")
        for units in make_part(*arguments):
            reach(f"inside {num_finished}")
            yield units

    def replacing(source: Path, target: Path) -> None:
        if target == Path(out):
            reach("the end")
        replace(source, target)

    local.make_part, os.replace = making, replacing  # type: ignore[assignment]
    make(stage, Path(data), Path(out), Path(work), EngineConfig())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def quiet_run(folder: Path) -> Path:
    """The outputs of all data stages, made in this process; returns the folder."""
    with pytest.MonkeyPatch.context() as patch:
        small_parts(patch.setattr)
        tiny_data(folder, tiny_corpus(folder / "documents"))
        tiny_encoder(folder / "encoder")
        for stage in STAGES[1:]:
            make(stage, folder, folder / OUT[stage], folder / "work" / stage, EngineConfig())
    return folder


def start(stage: str, data: Path, out: Path, work: Path, point: str = "") -> "subprocess.Popen[str]":
    program = "import sys, data_stages; data_stages.main(*sys.argv[1:])"
    command = [sys.executable, "-c", program, stage, str(data), str(out), str(work), point]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path])}
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)


def finished(work: Path) -> set[str]:
    return {path.parent.name for path in work.rglob("artifact.json") if path.parent.suffix != ".partial"}
