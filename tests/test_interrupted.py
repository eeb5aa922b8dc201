"""Killed at any moment, a data stage goes on with its finished parts and ends with the bytes of a quiet run."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures import tiny_corpus, tiny_data, tiny_encoder

from retro_model import artifacts, chunking, engine, index
from retro_model.chunking import make_chunks
from retro_model.documents import CorpusConfig
from retro_model.embedding import EmbedConfig, make_embeddings
from retro_model.engine import Engine, EngineConfig
from retro_model.index import IndexConfig, make_index
from retro_model.neighbors import NeighborsConfig, make_neighbors

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
    chunking.PART_CHARACTERS = 10_000
    index.ROWS_PER_ADDED_PART = 256


def main(stage: str, data: str, out: str, work: str) -> None:
    """What a child process runs: slow enough to be killed between two parts."""
    small_parts()
    quick = engine.make_part

    def slow(*arguments: object) -> object:
        time.sleep(0.1)
        yield from quick(*arguments)  # type: ignore[arg-type]

    engine.make_part = slow  # type: ignore[assignment]
    make(stage, Path(data), Path(out), Path(work), EngineConfig())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of a quiet run."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "LEAST_ROWS_PER_PART", 256)
        patch.setattr(chunking, "PART_CHARACTERS", 10_000)
        patch.setattr(index, "ROWS_PER_ADDED_PART", 256)
        tiny_data(folder, tiny_corpus(folder / "documents"))
        tiny_encoder(folder / "encoder")
        for stage in STAGES[1:]:
            make(stage, folder, folder / OUT[stage], folder / "work" / stage, EngineConfig())
    return folder


def start(stage: str, data: Path, out: Path, work: Path) -> "subprocess.Popen[bytes]":
    program = "import sys, test_interrupted; test_interrupted.main(*sys.argv[1:])"
    command = [sys.executable, "-c", program, stage, str(data), str(out), str(work)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def finished(work: Path) -> set[str]:
    return {path.parent.name for path in work.glob("*/artifact.json") if path.parent.suffix != ".partial"}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_again_and_again_it_ends_with_the_same_bytes(stage: str, data: Path, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    generator = random.Random(stage)
    kills = 0
    for wanted in (0, 1, 3, 5):  # finished parts at which it is killed
        process = start(stage, data, out, work)
        deadline = time.monotonic() + 120
        while process.poll() is None and len(finished(work)) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if wanted == 0:
            time.sleep(generator.uniform(1, 6))  # somewhere in the start
        time.sleep(generator.uniform(0, 0.1))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        assert not out.exists() or files_of(out) == files_of(data / OUT[stage]), "whole or absent"
    assert kills >= 3
    before = {path: path.stat().st_mtime_ns for name in finished(work) for path in [work / name / "artifact.json"]}
    assert len(before) >= 5
    process = start(stage, data, out, work)
    assert process.wait(timeout=300) == 0
    assert files_of(out) == files_of(data / OUT[stage])
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished part was made again"
    assert not list(tmp_path.glob("**/*.partial"))


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_write_the_same_bytes_as_one(
    stage: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "LEAST_ROWS_PER_PART", 256)
    monkeypatch.setattr(chunking, "PART_CHARACTERS", 10_000)
    monkeypatch.setattr(index, "ROWS_PER_ADDED_PART", 256)
    make(stage, data, tmp_path / "out", tmp_path / "work", EngineConfig(workers=2))
    assert files_of(tmp_path / "out") == files_of(data / OUT[stage])
