"""Killed at any moment, a data stage goes on with its finished parts and ends with the bytes of a quiet run."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures import tiny_corpus, tiny_data, tiny_encoder

from retro_model.core import artifacts
from retro_model.corpus import chunking
from retro_model.corpus.chunking import make_chunks
from retro_model.corpus.documents import CorpusConfig
from retro_model.embedding.embed import EmbedConfig, make_embeddings
from retro_model.jobs import engine
from retro_model.jobs.engine import Engine, EngineConfig
from retro_model.search import build as index_building
from retro_model.search.build import make_index
from retro_model.search.keys import IndexConfig
from retro_model.search.neighbors import NeighborsConfig, make_neighbors

pytestmark = pytest.mark.slow

STAGES = ("chunk", "embed", "index", "knn")
OUT = {"chunk": "chunks", "embed": "embeddings", "index": "index", "knn": "neighbors"}
CORPUS = CorpusConfig(valid=0.15, test=0.15)


def make(stage: str, data: Path, out: Path, work: Path, config: EngineConfig) -> None:
    """Runs one stage's library call in small parts."""
    options = {"engine": Engine(config, "cpu"), "work_folder": work}
    embed = EmbedConfig(encoder=str(data / "encoder"), number_type="float32")
    calls: dict[str, Callable[[], object]] = {
        "chunk": lambda: make_chunks(data / "documents", CORPUS, data / "tokenizer", 16, out, **options),
        "embed": lambda: make_embeddings(data / "chunks", data / "tokenizer", embed, out, device="cpu", **options),
        "index": lambda: make_index(data / "embeddings", IndexConfig(key="IVF16,Flat"), out, **options),
        "knn": lambda: make_neighbors(
            data / "embeddings", data / "index", data / "chunks", NeighborsConfig(stored=8), out, **options
        ),
    }
    calls[stage]()


def small_parts() -> None:
    """Settings of this file's processes: parts so small that there are many."""
    artifacts.LEAST_ROWS_PER_PART = 256
    chunking.PART_BYTES = 10_000
    index_building.ROWS_PER_ADDED_PART = 128


# Where a process stands when it is killed: a few finished parts lie there, and it is about to make the next
# one, in the middle of it, or putting the whole result into its place.
POINTS = ("before 0", "inside 0", "before 1", "inside 3", "before 5", "the end")


def main(stage: str, data: str, out: str, work: str, point: str) -> None:
    """What a child process runs: says when it is at the point, and goes no further."""
    small_parts()
    make_part, replace = engine.make_part, os.replace

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

    engine.make_part, os.replace = making, replacing  # type: ignore[assignment]
    make(stage, Path(data), Path(out), Path(work), EngineConfig())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of a quiet run."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "LEAST_ROWS_PER_PART", 256)
        patch.setattr(chunking, "PART_BYTES", 10_000)
        patch.setattr(index_building, "ROWS_PER_ADDED_PART", 128)
        tiny_data(folder, tiny_corpus(folder / "documents"))
        tiny_encoder(folder / "encoder")
        for stage in STAGES[1:]:
            make(stage, folder, folder / OUT[stage], folder / "work" / stage, EngineConfig())
    return folder


def start(stage: str, data: Path, out: Path, work: Path, point: str = "") -> "subprocess.Popen[str]":
    program = "import sys, test_interrupted; test_interrupted.main(*sys.argv[1:])"
    command = [sys.executable, "-c", program, stage, str(data), str(out), str(work), point]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)


def finished(work: Path) -> set[str]:
    return {path.parent.name for path in work.glob("*/artifact.json") if path.parent.suffix != ".partial"}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_again_and_again_it_ends_with_the_same_bytes(stage: str, data: Path, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    made: dict[Path, int] = {}
    for point in POINTS:
        process = start(stage, data, out, work, point)
        assert process.stdout is not None
        reached = any(line == f"{point}\n" for line in process.stdout)
        process.kill()
        process.communicate()
        assert reached, f"{stage} never came to {point}"
        assert bool(list(work.glob("*.partial"))) == point.startswith("inside")
        assert not out.exists(), "whole or absent"
        for path, time in made.items():
            assert path.stat().st_mtime_ns == time, "a finished part was made again"
        made = {path: path.stat().st_mtime_ns for path in work.glob("*/artifact.json")}
        assert len(made) == int(point.split()[1]) if point != "the end" else len(made) > 5
    process = start(stage, data, out, work)
    process.communicate(timeout=600)
    assert process.returncode == 0
    assert files_of(out) == files_of(data / OUT[stage])
    assert {path: path.stat().st_mtime_ns for path in work.glob("*/artifact.json")} == made, "nothing was left to make"
    assert not list(tmp_path.glob("**/*.partial"))


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_write_the_same_bytes_as_one(
    stage: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "LEAST_ROWS_PER_PART", 256)
    monkeypatch.setattr(chunking, "PART_BYTES", 10_000)
    monkeypatch.setattr(index_building, "ROWS_PER_ADDED_PART", 128)
    make(stage, data, tmp_path / "out", tmp_path / "work", EngineConfig(workers=2))
    assert files_of(tmp_path / "out") == files_of(data / OUT[stage])
