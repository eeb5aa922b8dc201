"""Runs a stage: one-line errors, timings, and a folder for work in progress.

Writes git-ignored files below `.retro/` at the repository's root (also for experiments in temporary checkouts):
`timings.jsonl`, with the timings of each stage that ran, and `work/<stage>/<key>/`, from which an interrupted stage
continues.
"""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NoReturn

import yaml
from filelock import FileLock, Timeout

from retro_model.core.artifacts import DESCRIPTION, file_digest, write_json
from retro_model.core.errors import RetroError
from retro_model.core.printable import one_line, print_log
from retro_model.core.processes import allow_open_files
from stages.common.params import flat_params

CODE_FOLDERS = ("retro_model", "stages")

# A lock that is held for longer than this is waited for with a message. Its holder has then said whose it is.
SILENT_WAIT_SECONDS = 0.5

# The file of a work folder that says which process uses it, or used it last.
OWNER = "owner.json"

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
    print_log()
    started = time.monotonic()
    print(f"{name}: started", file=sys.stderr, flush=True)
    try:
        main()
        seconds = time.monotonic() - started
        record_timing(name, seconds=seconds)
    except RetroError as error:
        _stop(f"{name}: {error}{_removed_outputs(name)}", 1)
    except _Terminated:
        _stop(f"{name}: terminated; the next `dvc repro` goes on", 143)
    except KeyboardInterrupt:
        _stop(f"{name}: interrupted; the next `dvc repro` goes on", 130)
    except Exception as error:
        if (reason := _disk_error_reason(error)) is None:
            raise
        _stop(f"{name}: {reason}; mend that and run `dvc repro` again", 1)
    print(f"{name}: done in {seconds:.1f} s", file=sys.stderr, flush=True)


def _removed_outputs(stage: str) -> str:
    """How to get back the outputs that DVC removed before it ran the stage; empty if it removed none."""
    lock = Path("dvc.lock")
    # A temporary checkout of an experiment is deleted with its outputs; the user's own are untouched.
    if os.environ.get("DVC_STAGE") is None or project_root() != Path.cwd() or not lock.is_file():
        return ""
    if stage not in yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]:
        return ""
    checkout = f"`dvc checkout {stage}` brings them back, and so does `dvc repro` with the old params"
    return f"; DVC removed the old outputs of this stage before it started: {checkout}"


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


def last_made(stage: str) -> str | None:
    """The fingerprint of what the stage made when it last recorded a timing; None if it never did here."""
    made = [record.get("made") for record in read_timings() if record["stage"] == stage]
    return made[-1] if made else None


@contextmanager
def work_folder(stage: str, params: SimpleNamespace) -> Iterator[Path]:
    """Yields the folder for a stage's work in progress with the current code, inputs and params.

    `params` are all params that the stage reads. A change of one of them (except `runtime`), of an input or of a line
    of declared code gives another folder, so a run never continues from outdated work. If the block succeeds, the
    folder is marked as finished; it is deleted when the stage next runs with another folder. Until then, a kill
    before DVC records the stage costs nothing.

    While another process runs this very stage, waits for its end and then continues from what it made.
    """
    folder = work_path(stage, params)
    home, key = folder.parent, folder.name
    home.mkdir(parents=True, exist_ok=True)
    with _wait_for_lock(stage, home / f"{key}.lock", folder / OWNER):
        folder.mkdir(exist_ok=True)
        _write_owner(folder / OWNER)
        with _try_lock(home / "prune.lock") as may_prune:
            if may_prune:
                _prune(home, keep=key)
        yield folder
        (folder / "finished").touch()


def work_path(stage: str, params: SimpleNamespace) -> Path:
    """The path of `work_folder`'s folder, without creating or locking it."""
    key = hashlib.sha256(json.dumps(_identity(stage, params), sort_keys=True).encode()).hexdigest()[:16]
    return project_root() / ".retro" / "work" / stage / key


def _identity(stage: str, params: SimpleNamespace) -> dict[str, Any]:
    """All that decides a stage's output: what dvc.yaml declares as its dependencies, and the params that it reads."""
    declared = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]["deps"]
    paths = [Path(re.sub(r"\$\{([\w.]+)\}", lambda key: str(flat_params()[key[1]]), name)) for name in declared]
    code = {file.as_posix(): file_digest(file) for path in paths for file in _code_files(path)}
    data = {path.as_posix(): _data_files(path) for path in paths if path.parts[0] not in CODE_FOLDERS}
    read = {name: repr(value) for name, value in vars(params).items() if name != "runtime"}
    return {"code": code, "data": data, "params": read}


def _data_files(dependency: Path) -> list[tuple[str, str | int]]:
    """Each file of a data dependency: its path, and the digest of an artifact's description or the file's size.

    A description has the digests of its artifact. Documents are not read, because a corpus can be large: their stages
    compare the text itself before they reuse work.
    """
    files = [dependency] if dependency.is_file() else sorted(path for path in dependency.rglob("*") if path.is_file())
    return [(file.as_posix(), file_digest(file) if file.name == DESCRIPTION else file.stat().st_size) for file in files]


def _code_files(dependency: Path) -> list[Path]:
    """All files of a declared module or package, at any depth; empty for a dependency that is data."""
    if dependency.parts[0] not in CODE_FOLDERS:
        return []
    if dependency.is_file():
        return [dependency]
    return sorted(file for file in dependency.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def file_lock(path: Path) -> FileLock:
    """A lock that ends with its process, also with `kill -9`."""
    # Without a file system that has such locks, fail: filelock would use a file that outlives its process.
    return FileLock(path, fallback_to_soft=False)


@contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Holds the lock in the block; yields False, without it, if another process holds it."""
    lock = file_lock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def _wait_for_lock(stage: str, path: Path, owner: Path) -> Iterator[None]:
    """Holds the lock in the block. If another process holds it, says once which one (as `owner` tells) and waits."""
    lock = file_lock(path)
    try:
        lock.acquire(timeout=SILENT_WAIT_SECONDS)
    except Timeout:
        print(f"{stage}: waiting for {_owner_in_words(owner)}; Ctrl-C stops waiting", file=sys.stderr, flush=True)
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


def _write_owner(file: Path) -> None:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    write_json(file, {"pid": os.getpid(), "host": socket.gethostname(), "since": now, "folder": str(Path.cwd())})


def _owner_in_words(file: Path) -> str:
    if not file.is_file():  # its process has only just begun
        return "another process, which is running this very stage"
    owner = json.loads(file.read_text(encoding="utf-8"))
    return (
        f"process {owner['pid']} on {owner['host']}, which has been running this very stage in {owner['folder']} since "
        f"{owner['since']}"
    )


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
            with _try_lock(home / f"{path.name}.lock") as locked:
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
