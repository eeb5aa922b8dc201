"""Killed at any moment, a data stage goes on with its finished parts and ends with the bytes of a quiet run."""

from pathlib import Path

import pytest
from data_stages import OUT, POINTS, STAGES, files_of, make, small_parts, start

from retro_model.jobs.engine import EngineConfig

pytestmark = pytest.mark.slow


# One stage stands for all: the engine resumes, and the next test makes every stage's parts in two processes.
@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=[] if stage == "index" else pytest.mark.torture) for stage in STAGES]
)
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
        assert bool(list(work.rglob("*.partial"))) == point.startswith("inside")
        assert not out.exists(), "whole or absent"
        for path, time in made.items():
            assert path.stat().st_mtime_ns == time, "a finished part was made again"
        made = {path: path.stat().st_mtime_ns for path in work.rglob("artifact.json")}
        assert len(made) == int(point.split()[1]) if point != "the end" else len(made) > 5
    process = start(stage, data, out, work)
    process.communicate(timeout=600)
    assert process.returncode == 0
    assert files_of(out) == files_of(data / OUT[stage])
    assert {path: path.stat().st_mtime_ns for path in work.rglob("artifact.json")} == made, "nothing was left to make"
    assert not list(tmp_path.glob("**/*.partial"))


# That `chunk` writes the same bytes in other processes is shown on a cluster, in test_ray.py.
@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=pytest.mark.torture if stage == "chunk" else []) for stage in STAGES]
)
def test_two_processes_write_the_same_bytes_as_one(
    stage: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch.setattr)
    make(stage, data, tmp_path / "out", tmp_path / "work", EngineConfig(workers=2))
    assert files_of(tmp_path / "out") == files_of(data / OUT[stage])
