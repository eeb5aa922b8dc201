"""Runs a stage: one-line errors, timings, and a folder for work in progress.

Writes git-ignored files below `.retro/` at the repository's root (also for experiments in temporary checkouts):
`timings.jsonl`, with the timings of each stage that ran, and `work/<stage>/<key>/`, from which an interrupted stage
continues.
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
from retro_model.core.printable import one_line
from retro_model.core.processes import allow_open_files

CODE_FOLDERS = ("retro_model", "stages")

# How many folders of unfinished work with other settings to keep, newest first: the user may go back to them.
KEPT_UNFINISHED = 3

# Errors of the disk or its permissions that any stage reports in one line.
FULL_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
DISK_ERRORS = {*FULL_DISK_ERRNOS, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENFILE}

# Messages for a full disk from libraries with their own exceptions: faiss, safetensors, tokenizers, SQLite.
FULL_DISK_MESSAGES = (*map(os.strerror, FULL_DISK_ERRNOS), "disk I/O error", "database or disk is full")


def project_root() -> Path:
    """The user's repository; the working directory may be a temporary copy in which DVC runs an experiment."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd())


def run_stage(name: str, main: Callable[[], None]) -> None:
    """Runs a stage's `main`. Errors of the user, the disk or the corpus are one line with exit status 1.

    Exits with 130 on SIGINT and 143 on SIGTERM, never 0: DVC would take an unfinished stage for a finished one.
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
        if (reason := _disk_error_reason(error)) is None:
            raise
        _stop(f"{name}: {reason}; mend that and run `dvc repro` again", 1)
    print(f"{name}: done in {seconds:.1f} s", file=sys.stderr, flush=True)


def _disk_error_reason(error: Exception) -> str | None:
    """What failed on the disk and for which file; None for any other error."""
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"{error.strerror}: {allowed} are allowed, raise that with `ulimit -n`"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.strerror}: {error.filename or 'while writing'}"
    message = full_disk_message(error)
    return f"{message}: while writing" if message else None


def full_disk_message(error: BaseException) -> str | None:
    """The full-disk message in a library's own exception; None for any other error."""
    return next((message for message in FULL_DISK_MESSAGES if message in str(error)), None)


def record_timing(stage: str, made: str = "", /, **timings: float) -> None:
    """Appends timings to the git-ignored file that `make repro`'s summary reads.

    `made` is the fingerprint of the artifact made; `recorded_timings` looks timings up by it.
    """
    file = timings_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"stage": stage, "workspace": project_root() == Path.cwd(), "made": made, **timings}
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def timings_file() -> Path:
    """The file of timings, one JSON object per line."""
    return project_root() / ".retro" / "timings.jsonl"


def read_timings() -> list[dict[str, Any]]:
    """All recorded timings, oldest first; skips lines that a kill or a full disk cut short."""
    records = []
    if timings_file().is_file():
        for line in timings_file().read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "stage" in record]


def recorded_timings(made: str) -> dict[str, float]:
    """The last recorded timings of making an artifact, as `stage.name`; empty if it came from DVC's cache."""
    return {
        f"{record['stage']}.{name}": value
        for record in read_timings()
        if record.get("made") == made
        for name, value in record.items()
        if isinstance(value, float)
    }


@contextmanager
def work_folder(stage: str, inputs: list[Path], params: Mapping[str, Any]) -> Iterator[Path]:
    """Yields the folder for a stage's work in progress with these inputs, these params and the current code.

    A change of an input, a param or a line of declared code gives another folder, so a run never continues from
    outdated work. If the block succeeds, the folder is marked as finished; it is deleted when the stage next runs
    with another folder. Until then, a kill before DVC records the stage costs nothing.

    Raises RetroError if another process uses the folder.
    """
    folder = work_path(stage, inputs, params)
    home, key = folder.parent, folder.name
    home.mkdir(parents=True, exist_ok=True)
    with _lock(home / f"{key}.lock") as locked:
        if not locked:
            raise RetroError(f"{folder}: another process is running this very stage; wait for it or stop it")
        folder.mkdir(exist_ok=True)
        with _lock(home / "prune.lock") as may_prune:
            if may_prune:
                _prune(home, keep=key)
        yield folder
        (folder / "finished").touch()


def work_path(stage: str, inputs: list[Path], params: Mapping[str, Any]) -> Path:
    """The path of `work_folder`'s folder, without creating or locking it."""
    key = hashlib.sha256(json.dumps(_identity(stage, inputs, params), sort_keys=True).encode()).hexdigest()[:16]
    return project_root() / ".retro" / "work" / stage / key


def _identity(stage: str, inputs: list[Path], params: Mapping[str, Any]) -> dict[str, Any]:
    declared = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]["deps"]
    code = {file.as_posix(): file_digest(file) for name in declared for file in _code_files(Path(name))}
    data = {path.as_posix(): file_digest(path) for folder in inputs for path in sorted(folder.rglob(DESCRIPTION))}
    return {"code": code, "inputs": data, "params": {name: repr(value) for name, value in params.items()}}


def _code_files(dependency: Path) -> list[Path]:
    """All files of a declared module or package, at any depth; empty for a dependency that is data."""
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
    """Deletes finished work of other settings, and unfinished work except the newest KEPT_UNFINISHED.

    Renames each folder first: a half-deleted one would look like unfinished work, which a later run continues.
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
    """Raised on SIGTERM, so that cleanup runs as for an interrupt."""


def _raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def _stop(message: str, status: int) -> NoReturn:
    print(one_line(" ".join(message.split())), file=sys.stderr, flush=True)
    sys.exit(status)
