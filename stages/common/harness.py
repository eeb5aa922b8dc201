"""What every stage needs around its one library call: errors as one line, timings, a place for work in progress.

Git-ignored files below `.retro/` at the repository's root (also for experiments in temporary checkouts):
`timings.jsonl`, a line for each stage that ran, and `work/<stage>/<key>/`, where a stage that was
stopped finds what it had done.
"""

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml

from retro_model.core.artifacts import DESCRIPTION, file_digest
from retro_model.core.errors import RetroError
from retro_model.core.processes import allow_open_files

CODE_FOLDERS = ("retro_model", "stages")

# Unfinished work of other settings that is kept, newest first: it may still be wanted.
KEPT_UNFINISHED = 3

# What the disk or its owner can do to any stage, told in one line as it is.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
DISK_ERRORS = {*FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENFILE}

# The same in the words of libraries that raise errors of their own: faiss, safetensors, tokenizers, SQLite.
FULL_IN_WORDS = (*map(os.strerror, FULL), "disk I/O error", "database or disk is full")


def project_root() -> Path:
    """The repository that the user sees: DVC runs some experiments in temporary copies of it."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd())


def run_stage(name: str, main: Callable[[], None]) -> None:
    """Runs a stage's `main`; what a user, a disk or a corpus caused ends it with one line and status 1.

    An interrupt exits 130 (SIGINT) or 143 (SIGTERM), never 0: DVC would take a half-done stage for a
    finished one.
    """
    if Path(sys.argv[0]).stem == name and len(sys.argv) > 1:
        _stop(f"{name}: found {' '.join(sys.argv[1:])!r}, expected no argument: params.yaml has all settings", 2)
    signal.signal(signal.SIGTERM, _raise_terminated)
    allow_open_files()
    started = time.monotonic()
    print(f"{name}: started", file=sys.stderr, flush=True)
    try:
        main()
        seconds = time.monotonic() - started
        record_timing(name, seconds=seconds)
    except RetroError as error:
        _stop(f"{name}: {error}", 1)
    except _Terminated:
        _stop(f"{name}: terminated; the next `dvc repro` goes on", 143)
    except KeyboardInterrupt:
        _stop(f"{name}: interrupted; the next `dvc repro` goes on", 130)
    except Exception as error:
        if (reason := _of_the_disk(error)) is None:
            raise
        _stop(f"{name}: {reason}; mend that and run `dvc repro` again", 1)
    print(f"{name}: done in {seconds:.1f} s", file=sys.stderr, flush=True)


def _of_the_disk(error: Exception) -> str | None:
    """What the disk or its owner did, and to which file; None for any other error."""
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"{error.strerror}: {allowed} are allowed, raise that with `ulimit -n`"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.strerror}: {error.filename or 'while writing'}"
    words = full_disk(error)
    return f"{words}: while writing" if words else None


def full_disk(error: BaseException) -> str | None:
    """What the disk said, where a library tells it by an error of its own; None where it was not the disk."""
    return next((words for words in FULL_IN_WORDS if words in str(error)), None)


def record_timing(stage: str, made: str = "", /, **timings: float) -> None:
    """Appends timings to the git-ignored file that `make repro`'s last table reads.

    `made` is the fingerprint of what was made meanwhile; by it `recorded_timings` finds them.
    """
    file = timings_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"stage": stage, "workspace": project_root() == Path.cwd(), "made": made, **timings}
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def timings_file() -> Path:
    """Where timings are recorded: a line of JSON each."""
    return project_root() / ".retro" / "timings.jsonl"


def read_timings() -> list[dict[str, Any]]:
    """All that was recorded, oldest first. A line that a kill or a full disk cut short says nothing."""
    records = []
    if timings_file().is_file():
        for line in timings_file().read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "stage" in record]


def recorded_timings(made: str) -> dict[str, float]:
    """What was last recorded of the making of an artifact, as `stage.name`; nothing of one from DVC's cache."""
    return {
        f"{record['stage']}.{name}": value
        for record in read_timings()
        if record.get("made") == made
        for name, value in record.items()
        if isinstance(value, float)
    }


@contextmanager
def work_folder(stage: str, inputs: list[Path], params: Mapping[str, Any]) -> Iterator[Path]:
    """Yields the folder where this stage, on these inputs with these params and this code, keeps its progress.

    Another input, param or line of declared code is another folder, so that no old checkpoint is ever
    picked up. One process at a time: a second one is told so. When the block ends well the folder is
    marked as finished, and cleared when the stage starts with something else: a kill after the stage and
    before DVC noted it costs nothing.
    """
    folder = work_path(stage, inputs, params)
    home, key = folder.parent, folder.name
    home.mkdir(parents=True, exist_ok=True)
    with _lock(home / f"{key}.lock") as locked:
        if not locked:
            raise RetroError(f"{folder}: another process is running this very stage; wait for it or stop it")
        folder.mkdir(exist_ok=True)
        with _lock(home / "prune.lock") as alone:
            if alone:
                _prune(home, keep=key)
        yield folder
        (folder / "finished").touch()


def work_path(stage: str, inputs: list[Path], params: Mapping[str, Any]) -> Path:
    """Where that folder is, for whoever only reads in it."""
    key = hashlib.sha256(json.dumps(_identity(stage, inputs, params), sort_keys=True).encode()).hexdigest()[:16]
    return project_root() / ".retro" / "work" / stage / key


def _identity(stage: str, inputs: list[Path], params: Mapping[str, Any]) -> dict[str, Any]:
    declared = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]["deps"]
    code = {file.as_posix(): file_digest(file) for name in declared for file in _code_files(Path(name))}
    data = {path.as_posix(): file_digest(path) for folder in inputs for path in sorted(folder.rglob(DESCRIPTION))}
    return {"code": code, "inputs": data, "params": {name: repr(value) for name, value in params.items()}}


def _code_files(dependency: Path) -> list[Path]:
    """The files of a declared module or package, at any depth; none of a dependency that is data."""
    if dependency.parts[0] not in CODE_FOLDERS:
        return []
    if dependency.is_file():
        return [dependency]
    return sorted(file for file in dependency.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _prune(home: Path, keep: str) -> None:
    """Removes the finished work of other settings, and unfinished work beyond the newest few.

    Each is renamed before: half of it would pass for unfinished work, which a later run goes on with.
    """
    for leftover in home.glob("*.deleted"):
        shutil.rmtree(leftover)
    others = sorted(
        (path for path in home.iterdir() if path.is_dir() and path.name != keep),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    unfinished = [path for path in others if not (path / "finished").exists()]
    for path in others:
        if path not in unfinished[:KEPT_UNFINISHED]:
            with _lock(home / f"{path.name}.lock") as locked:
                if locked:
                    doomed = path.rename(path.with_name(f"{path.name}.deleted"))
                    shutil.rmtree(doomed)


class _Terminated(BaseException):
    """SIGTERM, raised so that cleanup runs as for an interrupt."""


def _raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def _stop(message: str, status: int) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(status)
