"""A stage ends in one line, never in a traceback that a user caused, and never with status 0 when it is half done."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import ROOT

from retro_model.core.errors import ConfigError, RetroError
from stages.common.harness import project_root, read_timings, record_timing, recorded_timings, run_stage, work_folder


def stop_with(error: BaseException) -> None:
    def main() -> None:
        raise error

    run_stage("chunk", main)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("knn: found 0, expected >= 1"), 1, "chunk: knn: found 0, expected >= 1"),
        (RetroError("two\nlines"), 1, "chunk: two\N{SYMBOL FOR LINE FEED}lines"),
        (KeyboardInterrupt(), 130, "chunk: interrupted; the next `dvc repro` goes on"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "chunk: No space left on device: while writing; mend"),
        (PermissionError(errno.EACCES, "Permission denied", "data/x"), 1, "chunk: Permission denied: data/x; mend"),
        (
            OSError(errno.ENFILE, "Too many open files in system", "x"),
            1,
            "chunk: Too many open files in system: x; mend",
        ),
    ],
)
def test_what_a_user_can_cause_is_one_line(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        stop_with(error)
    assert caught.value.code == status
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "chunk: started" and lines[1].startswith(message) and len(lines) == 2


def test_under_dvc_a_refusal_says_how_to_get_the_removed_outputs_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> str:
        with pytest.raises(SystemExit):
            stop_with(ConfigError("knn: found 0"))
        return capsys.readouterr().err.splitlines()[-1]

    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.lock").write_text("stages:\n  chunk:\n    cmd: x\n")
    assert refused() == "chunk: knn: found 0", "without DVC nothing was removed"
    monkeypatch.setenv("DVC_STAGE", "chunk")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert refused() == (
        "chunk: knn: found 0; DVC removed the old outputs of this stage before it started: `dvc checkout chunk` brings "
        "them back, and so does `dvc repro` with the old params"
    )
    monkeypatch.setenv("DVC_ROOT", str(tmp_path.parent))
    assert refused() == "chunk: knn: found 0", "an experiment's checkout: the user's outputs are untouched"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / "dvc.lock").write_text("stages:\n  embed:\n    cmd: x\n")
    assert refused() == "chunk: knn: found 0", "the stage never had outputs"
    (tmp_path / "dvc.lock").unlink()
    assert refused() == "chunk: knn: found 0"


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError(), OSError(errno.EBADF, "Bad file descriptor")])
def test_what_a_programmer_caused_keeps_its_traceback(error: BaseException) -> None:
    with pytest.raises(type(error)):
        stop_with(error)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_run_the_cleanup_and_say_so(tmp_path: Path, number: int, status: int) -> None:
    program = (
        "import time; from pathlib import Path\n"
        "from retro_model.core.artifacts import whole_folder\n"
        "from stages.common.harness import run_stage\n"
        "def main():\n"
        "    with whole_folder(Path('out')) as folder:\n"
        "        print('ready', flush=True); time.sleep(60)\n"
        "run_stage('embed', main)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == status
    assert errors.splitlines()[-1].endswith("; the next `dvc repro` goes on")
    assert list(tmp_path.iterdir()) == []


MANY_FILES = """
import resource, sys
from pathlib import Path
import numpy as np
from retro_model.core.artifacts import Artifact, ArtifactWriter
from stages.common.harness import run_stage

def main():
    with ArtifactWriter(Path("a"), "chunks", 1) as writer:
        writer.append(tokens=np.arange(100))
    assert (Artifact.open("a", "chunks")["tokens"][:] == np.arange(100)).all()

resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[1])))
run_stage("embed", main)
"""


@pytest.mark.parametrize(("most", "status"), [(200, 0), (64, 1)])
def test_a_stage_opens_as_many_files_as_it_may_and_says_when_that_is_too_few(
    tmp_path: Path, most: int, status: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MANY_FILES, str(most)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    if status:
        assert done.stderr.splitlines()[-1].startswith(
            "embed: Too many open files: 64 are allowed, raise that with `ulimit -n`; mend that and run `dvc repro`"
        )


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  train:\n    cmd: x\n    deps: [stages/train.py, retro_model/network, data]\n"
    )
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "train.py").write_text("one = 1\n")
    (tmp_path / "retro_model" / "network" / "deep" / "__pycache__").mkdir(parents=True)
    (tmp_path / "retro_model" / "network" / "deep" / "layer.py").write_text("two = 2\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "artifact.json").write_text("{}")
    return tmp_path


def working(**params: object) -> AbstractContextManager[Path]:
    return work_folder("train", SimpleNamespace(**params))


def key(**params: object) -> str:
    with working(**params) as folder:
        return folder.name


def test_work_is_found_again_by_the_same_code_inputs_and_params_only(project: Path) -> None:
    first = key(lr=1.0)
    assert key(lr=1.0) == first
    assert key(lr=2.0) != first
    (project / "data" / "artifact.json").write_text("{ }")
    assert key(lr=1.0) != first
    (project / "data" / "artifact.json").write_text("{}")
    assert key(lr=1.0) == first
    for file, code in (("stages/train.py", "one = 2\n"), ("retro_model/network/deep/layer.py", "two = 3\n")):
        before = (project / file).read_text()
        (project / file).write_text(code)
        assert key(lr=1.0) != first, file
        (project / file).write_text(before)
    (project / "retro_model" / "network" / "deep" / "__pycache__" / "layer.pyc").write_text("compiled")
    assert key(lr=1.0, runtime="elsewhere") == first
    (project / "data" / "one.txt").write_text("a document\n")
    assert (second := key(lr=1.0)) != first
    (project / "data" / "one.txt").write_text("a longer document\n")
    assert key(lr=1.0) not in (first, second)


def test_finished_work_of_other_settings_is_cleared_and_unfinished_kept(project: Path) -> None:
    home = project / ".retro" / "work" / "train"
    finished = key(lr=1.0)
    with pytest.raises(RuntimeError, match="stop"), working(lr=2.0) as unfinished:
        (unfinished / "checkpoint").write_text("x")
        raise RuntimeError("stop")
    assert not (home / finished).exists()
    with working(lr=3.0):
        assert (unfinished / "checkpoint").exists()
    os.utime(unfinished, (0, 0))
    for rate in range(4, 8):  # more unfinished work than is kept: the oldest goes
        with pytest.raises(RuntimeError, match="stop"), working(lr=rate) as folder:
            raise RuntimeError("stop")
        os.utime(folder, (rate, rate))
    assert not unfinished.exists()


def test_work_is_whole_or_absent_when_its_deletion_is_cut_short(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = project / ".retro" / "work" / "train"
    with working(lr=1.0) as finished:
        (finished / "checkpoint").write_text("x")

    def killed(path: Path) -> None:
        (path / "finished").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        key(lr=2.0)
    assert not finished.exists(), "half of it would pass for work to go on with"
    assert list(home.glob("*.deleted"))
    key(lr=3.0)
    assert not list(home.glob("*.deleted")), "the next one clears it"


# A stage that says when it works, makes a file that a second run of it finds, and then does what it was told.
WORKER = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from retro_model.core.errors import RetroError
from stages.common.harness import run_stage, work_folder

def main():
    with work_folder("train", SimpleNamespace(lr=1.0)) as work:
        found = (work / "made").exists()
        print("found" if found else "nothing", flush=True)
        (work / "made").touch()
        if sys.argv[1] != "end":
            sys.stdin.readline()
        if sys.argv[1] == "fail":
            raise RetroError("a loss that is not finite")

arguments, sys.argv[0] = sys.argv, "worker"
run_stage("train", main)
"""


def start_worker(project: Path, task: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, task],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def two_workers(project: Path, request: pytest.FixtureRequest) -> Iterator[tuple["subprocess.Popen[str]", ...]]:
    """A process in the stage, and a second one that has said that it waits for the first."""
    first = start_worker(project, request.param)
    assert first.stdout is not None and first.stdout.readline() == "nothing\n"
    second = start_worker(project, "end")
    try:
        assert second.stderr is not None and second.stderr.readline() == "train: started\n"
        said = second.stderr.readline()
        assert re.fullmatch(
            rf"train: waiting for process {first.pid} on \S+, which has been running this very stage in {project} "
            r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d; Ctrl-C stops waiting\n",
            said,
        ), said
        yield first, second
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("two_workers", "status"), [("work", 0), ("fail", 1), ("die", -signal.SIGKILL)], indirect=["two_workers"]
)
def test_the_same_stage_at_the_same_time_waits_and_continues_from_what_the_first_made(
    two_workers: tuple["subprocess.Popen[str]", "subprocess.Popen[str]"], status: int
) -> None:
    """Whether the first succeeds, fails or is killed."""
    first, second = two_workers
    if status == -signal.SIGKILL:
        first.kill()
    first.communicate("\n" if first.poll() is None else None, timeout=300)
    assert first.returncode == status
    out, errors = second.communicate(timeout=300)
    assert (second.returncode, out) == (0, "found\n")
    assert errors.splitlines()[0].startswith("train: done"), "it says once that it waits"


@pytest.mark.parametrize("two_workers", ["work"], indirect=True)
def test_waiting_ends_with_an_interrupt(
    two_workers: tuple["subprocess.Popen[str]", "subprocess.Popen[str]"],
) -> None:
    first, second = two_workers
    second.send_signal(signal.SIGINT)
    out, errors = second.communicate(timeout=300)
    assert (second.returncode, out) == (130, "")
    assert errors.splitlines() == ["train: interrupted; the next `dvc repro` goes on"]
    assert first.poll() is None, "the first goes on"
    first.communicate("\n", timeout=300)
    assert first.returncode == 0


def test_a_stage_that_waits_only_briefly_says_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with working():
        pass
    with working():
        pass
    assert capsys.readouterr().err == ""


def test_the_work_of_a_running_process_is_never_cleared(project: Path) -> None:
    with working(lr=1.0) as running:
        (running / "finished").touch()
        with working(lr=2.0):
            assert running.exists()


def test_the_root_is_the_users_repository_in_a_temporary_checkout_too(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert project_root() == project
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "elsewhere"))
    record_timing("chunk", seconds=1.0)
    assert (tmp_path / "elsewhere" / ".retro" / "timings.jsonl").read_text().startswith('{"stage": "chunk"')


def test_timings_are_found_by_what_was_made(project: Path) -> None:
    assert recorded_timings("abc") == {}
    record_timing("chunk", seconds=1.0)
    record_timing("index.search", "abc", milliseconds_per_query=2.0)
    record_timing("index.search", "another", milliseconds_per_query=3.0)
    record_timing("index.search", "abc", milliseconds_per_query=4.0)
    record_timing("index", seconds=5.0)
    assert recorded_timings("abc") == {"index.search.milliseconds_per_query": 4.0}, "the last that were recorded"
    assert recorded_timings("restored from a remote") == {}


def test_a_torn_record_of_timings_says_nothing(project: Path) -> None:
    record_timing("chunk", seconds=1.0)
    file = project / ".retro" / "timings.jsonl"
    with file.open("ab") as stream:
        stream.write(b'{"stage": "emb\xff\n[1]\n{"seconds": 2.0}\n')
    record_timing("index", "print", seconds=3.0)
    assert [record["stage"] for record in read_timings()] == ["chunk", "index"]
    assert recorded_timings("print") == {"index.seconds": 3.0}
