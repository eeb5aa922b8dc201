"""Whoever makes the parts, the parts are the same, and a finished one is never made twice."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from paths import ROOT, SUPPORT
from square_job import LOCAL, PARTS, SquareJob, run, times_made, wait_until

from retro_model.core.artifacts import Artifact, rows_per_part
from retro_model.core.errors import ConfigError, RetroError
from retro_model.jobs import engine
from retro_model.jobs.engine import Engine, EngineConfig
from retro_model.jobs.job import Part, make_part, row_parts, work_or_temporary

ENGINES = [LOCAL, EngineConfig(workers=2)]


@pytest.mark.parametrize("config", ENGINES, ids=["here", "pool"])
def test_parts_come_in_order_and_are_made_once(config: EngineConfig, diary: Path, tmp_path: Path) -> None:
    expected = [x * x for x in range(50)]
    assert run(SquareJob(diary), tmp_path / "work", config) == expected
    assert run(SquareJob(diary), tmp_path / "work", config) == expected
    assert times_made(diary) == [1] * 5
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [part.name for part in PARTS]


def test_a_pool_works_in_other_processes_and_opens_the_job_once_in_each(diary: Path, tmp_path: Path) -> None:
    run(SquareJob(diary, together=2), tmp_path / "work", EngineConfig(workers=2))
    opened = list(diary.glob("opened-*"))
    assert len(opened) == 2 and diary / f"opened-{os.getpid()}" not in opened
    assert all(path.read_text() == "x" for path in opened)


@dataclass(frozen=True)
class GpuJob(SquareJob):
    """Writes down which GPUs its process sees."""

    uses_gpus: ClassVar[bool] = True

    def open(self) -> int:
        (self.diary / f"gpus-{os.environ.get('CUDA_VISIBLE_DEVICES')}").touch()
        return super().open()


@pytest.mark.parametrize(("visible", "expected"), [(None, {"gpus-0", "gpus-1"}), ("3,5", {"gpus-3", "gpus-5"})])
def test_each_process_sees_one_gpu(
    visible: str | None, expected: set[str], diary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "count_gpus", lambda device: 2)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert run(GpuJob(diary, together=2), tmp_path / "work") == [x * x for x in range(50)]
    assert {path.name for path in diary.glob("gpus-*")} == expected
    run(SquareJob(diary), tmp_path / "other")  # a job that gains nothing by GPUs stays here
    assert diary / f"opened-{os.getpid()}" in diary.iterdir()


def test_a_part_of_another_job_or_damaged_is_made_again(
    diary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    run(SquareJob(diary), work)
    shard = work / "p-10" / "squares-00000.npy"
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    assert run(SquareJob(diary), work) == [x * x for x in range(50)]
    assert times_made(diary) == [1, 2, 1, 1, 1]
    assert "p-10: made again" in capsys.readouterr().out
    assert run(SquareJob(diary, offset=1), work) == [x * x + 1 for x in range(50)]
    assert times_made(diary) == [2, 3, 2, 2, 2]


def test_a_part_whose_deletion_was_cut_short_is_made_again(diary: Path, tmp_path: Path) -> None:
    run(SquareJob(diary), tmp_path / "work")
    (tmp_path / "work" / "p-10" / "artifact.json").unlink()  # first, as it may happen
    assert run(SquareJob(diary), tmp_path / "work") == [x * x for x in range(50)]
    assert times_made(diary) == [1, 2, 1, 1, 1]


def test_a_part_made_with_other_facts_than_asked_for_is_made_again(diary: Path, tmp_path: Path) -> None:
    parts = [part._replace(facts={"offset": 0}) for part in PARTS]
    run(SquareJob(diary), tmp_path / "work", parts=parts)
    run(SquareJob(diary), tmp_path / "work", parts=parts)
    assert times_made(diary) == [1] * 5


@pytest.mark.parametrize("config", ENGINES, ids=["here", "pool"])
def test_a_users_fault_in_a_part_is_told_as_it_is_and_costs_no_finished_part(
    config: EngineConfig, diary: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="^numbers: found 20, expected another$"):
        run(SquareJob(diary, broken="user"), tmp_path / "work", config)
    assert multiprocessing.active_children() == [], "no worker goes on, and none meets those of the next run"
    with pytest.raises(KeyError, match="a bug"):
        run(SquareJob(diary, broken="bug"), tmp_path / "work", config)
    with pytest.raises(RetroError, match="the settings are off"):
        run(SquareJob(diary, broken="open"), tmp_path / "work", config)
    assert run(SquareJob(diary), tmp_path / "work", config) == [x * x for x in range(50)]
    assert times_made(diary)[:2] == [1, 1]
    assert not list((tmp_path / "work").glob("*.partial"))


def test_a_worker_that_dies_is_an_error_that_says_how_to_go_on(diary: Path, tmp_path: Path) -> None:
    with pytest.raises(RetroError, match=r"a worker process died .* run again"):
        run(SquareJob(diary, broken="death"), tmp_path / "work", EngineConfig(workers=2))
    assert run(SquareJob(diary), tmp_path / "work") == [x * x for x in range(50)]
    assert times_made(diary)[0] == 1


def test_what_a_kill_left_is_cleared_and_the_rest_goes_on(diary: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    program = f"""
        import sys
        sys.path.insert(0, {str(SUPPORT)!r})
        from pathlib import Path
        from square_job import SquareJob, run
        run(SquareJob(Path({str(diary)!r}), broken="hangs"), Path({str(work)!r}))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT)
    wait_until(lambda: list(diary.glob("hangs-*")) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(list(work.glob("p-20.*.partial"))) == 1
    assert run(SquareJob(diary), work) == [x * x for x in range(50)]
    assert times_made(diary) == [1, 1, 2, 1, 1]
    assert not list(work.glob("*.partial"))


def test_a_killed_parent_takes_its_workers_with_it(diary: Path, tmp_path: Path) -> None:
    program = f"""
        import sys
        sys.path.insert(0, {str(SUPPORT)!r})
        from pathlib import Path
        from square_job import EngineConfig, SquareJob, run
        job = SquareJob(Path({str(diary)!r}), together=2, broken="hangs")
        run(job, Path({str(tmp_path / "work")!r}), EngineConfig(workers=2))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        wait_until(lambda: list(diary.glob("hangs-*")) or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)  # until the last process that could write there has ended
    finally:
        (diary / "go on").touch()
    assert process.returncode == -signal.SIGKILL


def test_two_processes_may_make_one_part_at_a_time(diary: Path, tmp_path: Path) -> None:
    job = SquareJob(diary)
    first = make_part(job, 0, tmp_path / "p-00", (0, 10))
    next(first)
    assert sum(make_part(job, 0, tmp_path / "p-00", (0, 10))) == 10
    assert list(first) == []  # finds the part there, and drops its own
    assert Artifact.open(tmp_path / "p-00", "embeddings").rows == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diary", "p-00"]


def test_no_more_parts_are_taken_than_workers_have_hands_for(diary: Path, tmp_path: Path) -> None:
    taken = []

    def parts() -> Iterator[Part]:
        for part in PARTS:
            taken.append(part.name)
            yield part

    with Engine(EngineConfig(), "cpu").open(SquareJob(diary)) as running:
        for number, _ in enumerate(running.make(parts(), tmp_path / "work")):
            assert len(taken) == number + 1


@pytest.mark.parametrize("rows", [0, 1, 4096, 4097, 20_000, 4096 * 4096 + 1, 30_000_000_000])
def test_ranges_cover_all_rows_once(rows: int) -> None:
    parts = list(row_parts("train", rows, rows_per_part(rows), chunks="abc"))
    assert parts[0].arguments[1] == 0 and parts[-1].arguments[2] == rows
    assert all(a.arguments[2] == b.arguments[1] for a, b in itertools.pairwise(parts))
    sizes = [part.arguments[2] - part.arguments[1] for part in parts]
    assert len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0] and len(parts) <= 4096
    assert len({part.name for part in parts}) == len(parts) and parts[0].facts == {"chunks": "abc"}


def test_without_a_folder_for_work_nothing_is_left(tmp_path: Path) -> None:
    with work_or_temporary(None, tmp_path / "out") as work:
        assert work.parent == tmp_path
    assert not list(tmp_path.iterdir())
    with work_or_temporary(tmp_path / "work", tmp_path / "out") as work:
        assert work == tmp_path / "work"


def test_ray_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, diary: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"runtime.engine: ray needs Ray; run `pip install ray`"):
        run(SquareJob(diary), tmp_path / "work", EngineConfig(engine="ray"))
