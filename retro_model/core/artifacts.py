"""Read and write artifacts, the folders that stages exchange. docs/formats.md describes the format.

An artifact is a folder with numpy shards (`tokens-00000.npy`), other files, and `artifact.json`, which is written
last. It holds shapes, types, the sha256 of every file, and facts that later stages read instead of deciding them again.
So an artifact is either complete or absent, and readers refuse one that was truncated, extended or changed after it was
written.

    with whole_folder(Path("data/chunks")) as folder:        # renamed into place at the end
        with ArtifactWriter(folder / "train", "chunks", rows_per_shard=65536) as writer:
            writer.append(tokens=rows, documents=ids)
            writer.facts["chunk_size"] = 64

    chunks = Artifact.open(Path("data/chunks/train"), "chunks")
    chunks["tokens"][ids]                                    # rows, gathered from read-only memory maps

Equal input gives equal bytes: nothing written depends on the clock, the host name or an absolute path.
"""

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import IntArray
from retro_model.core.errors import ArtifactError, DamagedArtifactError, MismatchError, MissingArtifactError

DESCRIPTION = "artifact.json"
VERSION = 3
READABLE_VERSIONS = (2, VERSION)  # version 2 differs in that all shards but the last have equally many rows
ROWS_PER_SHARD = 1 << 18

# Limits for shards that are computed one by one and are the units of resuming and distributing: small, but not too
# many.
LEAST_ROWS_PER_PART = 1 << 12
MOST_PARTS = 1 << 12

# Chunks, embeddings and neighbors are three artifacts each, in folders with these names.
SPLITS = ("train", "valid", "test")

# Errors of file systems that cannot lock folders (NFS); there, a second writer of a folder is not detected.
NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)

# The stage that writes each kind of artifact, for error messages.
MADE_BY = {
    "tokenizer": "tokenizer",
    "chunks": "chunk",
    "embeddings": "embed",
    "index": "index",
    "neighbors": "knn",
    "model": "baseline or train",
}


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that replaces `path` if the block succeeds.

    If the block fails, the new folder is deleted and the old one stays unchanged. After a kill, the next writer
    deletes the leftover `*.partial` folder. Raises ArtifactError if another process is writing the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    if partial.exists():
        with _locked(partial):  # fails if a writer is running; a killed writer holds no lock
            shutil.rmtree(partial)
    partial.mkdir()
    with _locked(partial):
        try:
            yield partial
            if path.exists():
                shutil.rmtree(path)
            os.replace(partial, path)
        except BaseException:
            shutil.rmtree(partial)
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes; raises ArtifactError if another process holds the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ArtifactError(
            f"{folder}: another process is writing there; wait for it or stop it, and run again"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise
    try:
        yield
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes to `path` atomically: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, keys in the given order; raises ValueError for NaN and infinity."""
    write_whole(path, _json(value))


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write `rows` as CSV with a header; all rows have the keys of the first one."""
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_whole(path, text.getvalue())


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write what np.save writes, through a Python file: np.save misses a disk that gets full at its last buffer."""
    with path.open("wb") as stream:
        np.lib.format.write_array(_WriteOnly(stream), array, allow_pickle=False)  # type: ignore[no-untyped-call]


class _WriteOnly:
    """Hides the stream's file descriptor, so that numpy calls `write` instead of writing through C's stdio."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.write = stream.write


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if the file system cannot link them."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        shutil.copyfile(source, target)


def rows_per_part(rows: int) -> int:
    """Return how many rows each part of the work has: a power of two that depends on `rows` alone."""
    size = LEAST_ROWS_PER_PART
    while size * MOST_PARTS < rows:
        size *= 2
    return size


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write artifact.json, which makes a folder an artifact; its last entry is a digest of the others."""
    write_whole(folder / DESCRIPTION, _serialize_description(description).decode())


def _serialize_description(description: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(_json(description).encode()).hexdigest()
    return _json({**description, "digest": digest}).encode()


class _Shard:
    """Writes one array's file of a shard row by row; after `close` the file is what np.save would write."""

    def __init__(self, path: Path, dtype: str, row_shape: Sequence[int]) -> None:
        self.path = path
        self._dtype, self._row_shape, self._rows = np.dtype(dtype), row_shape, 0
        self._stream = path.open("wb")
        self._write_header()

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Append rows of the array's dtype and row shape."""
        self._stream.write(np.ascontiguousarray(rows).data)
        self._rows += len(rows)

    def close(self) -> None:
        """Write the final number of rows into the header, for which numpy leaves room, and close the file."""
        self._stream.seek(0)
        self._write_header()
        self._stream.close()

    def abandon(self) -> None:
        """Close the file unfinished."""
        with suppress(OSError):  # e.g. a full disk; the error that ended the writing is already being raised
            self._stream.close()

    def _write_header(self) -> None:
        shape = (self._rows, *self._row_shape)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}  # type: ignore[no-untyped-call]
        np.lib.format.write_array_header_1_0(self._stream, header)  # type: ignore[no-untyped-call]


class ArtifactWriter:
    """Writes an artifact into a new folder, shard by shard; memory holds at most the rows of one call.

    `append` begins a new shard after `rows_per_shard` rows; `adopt` takes over a part as a shard of its own.

    Use it as a context manager: `artifact.json` is written when the block ends without an error.
    """

    def __init__(self, folder: Path, kind: str, rows_per_shard: int = ROWS_PER_SHARD) -> None:
        assert kind in MADE_BY, kind
        assert rows_per_shard > 0
        self.folder = folder
        self.kind = kind
        self.rows_per_shard = rows_per_shard
        self.facts: dict[str, Any] = {}
        self._open: dict[str, _Shard] = {}
        self._filled = 0  # rows of the open shard
        self._shards: list[int] = []  # rows of each finished shard
        self._arrays: dict[str, dict[str, Any]] = {}
        self._files: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        assert not (folder / DESCRIPTION).exists(), folder

    @property
    def rows(self) -> int:
        """Number of rows written so far."""
        return sum(self._shards) + self._filled

    def append(self, **columns: npt.NDArray[Any]) -> None:
        """Append rows; every call passes the same arrays, all of the same length."""
        lengths = {name: len(column) for name, column in columns.items()}
        assert len(set(lengths.values())) == 1, lengths
        for name, column in columns.items():
            known = self._arrays.setdefault(name, _type_of(column))
            assert known == _type_of(column), (name, known, column)
        assert columns.keys() == self._arrays.keys(), (columns.keys(), self._arrays.keys())
        start, total = 0, next(iter(lengths.values()))
        while start < total:
            stop = min(total, start + self.rows_per_shard - self._filled)
            for name, column in columns.items():
                if not self._filled:
                    self._open[name] = _Shard(
                        self.folder / numbered(f"{name}.npy", len(self._shards)), **_type_of(column)
                    )
                self._open[name].append(column[start:stop])
            self._filled += stop - start
            start = stop
            if self._filled == self.rows_per_shard:
                self._close_shard()

    def adopt(
        self,
        part: "Artifact",
        arrays: Iterable[str] | None = None,
        *,
        files: Iterable[str] = (),
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        """Append a one-shard artifact as a shard, by hard links to its files if the file system can link them.

        Takes over the named `arrays`, by default all, and the named `files`, which get the shard's number. Readers add
        `offsets`, by array, to what is stored, so that a part's numbers can be local to it; with all parts or none.
        A part without rows adds no shard.
        """
        assert not self._filled and part.kind == self.kind and len(part.shards) <= 1, (part.kind, part.shards)
        if not part.arrays:
            return
        names = list(part.arrays) if arrays is None else list(arrays)
        for name in names:
            known = self._arrays.setdefault(name, dict(part.arrays[name]))
            assert {**known, **part.arrays[name]} == known, (name, known, part.arrays[name])
        if not part.rows:
            return
        for name, offset in (offsets or {}).items():
            shard_offsets = self._arrays[name].setdefault("offsets", [])
            assert len(shard_offsets) == len(self._shards), (name, shard_offsets)
            shard_offsets.append(offset)
        number = len(self._shards)
        taken = {numbered(f"{name}.npy", 0): numbered(f"{name}.npy", number) for name in names}
        for source, target in {**taken, **{name: numbered(name, number) for name in files}}.items():
            link_or_copy(part.folder / source, self.folder / target)
            self._files[target] = part.files[source]
        self._shards.append(part.rows)

    def add_file(self, name: str) -> None:
        """Record the digest of a file that the caller wrote below the folder; `name` is relative, with `/`."""
        self._files[name] = file_digest(self.folder / name)

    def _close_shard(self) -> None:
        for shard in self._open.values():
            shard.close()
            self._files[shard.path.name] = file_digest(shard.path)
        self._shards += [self._filled] if self._filled else []
        self._open, self._filled = {}, 0

    def __enter__(self) -> "ArtifactWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                return  # without artifact.json the folder is not an artifact
            self._close_shard()
        finally:
            for shard in self._open.values():
                shard.abandon()
        write_description(
            self.folder,
            {
                "format": f"retro/{self.kind}",
                "version": VERSION,
                "rows": self.rows,
                "shards": self._shards,
                "arrays": self._arrays,
                "facts": self.facts,
                "sha256": dict(sorted(self._files.items())),
            },
        )


class Artifact:
    """An artifact on disk, opened for reading only.

    `facts` is what the writer recorded. `shards` is the number of rows of each shard. `fingerprint` is the sha256 of
    artifact.json; it identifies every byte, because artifact.json holds the digest of each file.
    """

    def __init__(self, folder: Path, kind: str, description: Mapping[str, Any], fingerprint: str) -> None:
        self.folder = folder
        self.kind = kind
        self.fingerprint = fingerprint
        self.facts: Mapping[str, Any] = description["facts"]
        self.rows: int = description["rows"]
        self.shards: list[int] = _rows_of_shards(description)
        self.files: Mapping[str, str] = description["sha256"]
        self.arrays: Mapping[str, dict[str, Any]] = description["arrays"]  # name -> dtype, row_shape and any offsets
        self._arrays = {name: ShardedArray(folder, name, self.shards, array) for name, array in self.arrays.items()}

    @classmethod
    def open(cls, folder: Path | str, kind: str, verify: bool = True) -> "Artifact":
        """Open the artifact in `folder`, which must be of the given kind.

        With `verify`, every file is read once and compared with its sha256, at about a second per gigabyte.
        Without it, reading still refuses a shard that is truncated or has another shape or dtype, but changed or
        appended bytes go unnoticed.

        Raises MissingArtifactError, DamagedArtifactError, or MismatchError for another kind or format version.
        """
        assert kind in MADE_BY, kind
        folder = Path(folder)
        file = folder / DESCRIPTION
        if not file.is_file():
            raise MissingArtifactError(
                f"{folder}: no finished {kind} here ({DESCRIPTION} is missing); "
                f"run `dvc repro` (stage {MADE_BY[kind]}), or `dvc pull` where a remote has it"
            )
        content = file.read_bytes()
        try:
            description = json.loads(content)
            found_kind, found_version = description["format"], description["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(file, f"is no description of an artifact ({error!r})") from error
        if found_kind != f"retro/{kind}":
            raise MismatchError(f"{folder}: expected retro/{kind}, found {found_kind}; is the path right?")
        if found_version not in READABLE_VERSIONS:
            raise MismatchError(
                f"{folder}: format version {found_version}, expected {VERSION}; run `dvc repro` to write it anew"
            )
        if content != _serialize_description({name: value for name, value in description.items() if name != "digest"}):
            raise _damaged(file, "does not have the bytes that were written (its digest differs)")
        try:
            artifact = cls(folder, kind, description, hashlib.sha256(content).hexdigest())
        except (KeyError, TypeError, AttributeError) as error:
            raise _damaged(file, f"is incomplete ({error!r})") from error
        for name in artifact.files:
            path = folder / name
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise _damaged(file, f"names {name}, which lies outside its folder")
            if not path.is_file():
                raise _damaged(path, "is missing")
            if verify:
                artifact.verify(name)
        return artifact

    def verify(self, name: str) -> None:
        """Read a file and raise DamagedArtifactError unless it has the bytes that were written."""
        path = self.folder / name
        if not path.is_file():
            raise _damaged(path, "is missing")
        if file_digest(path) != self.files[name]:
            raise _damaged(path, "does not have the bytes that were written (sha256 differs)")

    def __getitem__(self, name: str) -> "ShardedArray":
        return self._arrays[name]

    def require(self, **facts: Any) -> "Artifact":
        """Return self if every given fact equals the recorded one; raises MismatchError otherwise."""
        for name, expected in facts.items():
            found = self.facts.get(name)
            if found != expected:
                raise MismatchError(
                    f"{self.folder}: made for {name} {_short(found)}, expected {_short(expected)}; "
                    f"run `dvc repro` (stage {MADE_BY[self.kind]})"
                )
        return self


def _rows_of_shards(description: Mapping[str, Any]) -> list[int]:
    if description["version"] == VERSION:
        shards: list[int] = description["shards"]
        assert sum(shards) == description["rows"], "only a faulty program writes another sum"
        return shards
    rows, size = description["rows"], description["rows_per_shard"]
    return [min(size, rows - start) for start in range(0, rows, size)]


class ShardedArray:
    """An array stored as rows in one or more `.npy` files, read through read-only memory maps.

    Shard i holds the rows `starts[i]` to `starts[i + 1]`. If the array has `offsets`, offset i is added to what shard i
    stores.

    Indexing returns new arrays. An index that is negative or too large raises IndexError: in this project -1 means
    "none", never "the last".
    """

    def __init__(self, folder: Path, name: str, shards: Sequence[int], array: Mapping[str, Any]) -> None:
        self.starts = np.concatenate([[0], np.cumsum(shards, dtype=np.int64)])
        self.shape: tuple[int, ...] = (int(self.starts[-1]), *array["row_shape"])
        self.paths = [folder / numbered(f"{name}.npy", number) for number in range(len(shards))]
        self.offsets: list[int] | None = array.get("offsets")
        self._stored = np.dtype(array["dtype"])
        self._maps: list[npt.NDArray[Any]] | None = None
        # Wide enough for the largest value: what a shard stores is smaller than twice the largest offset, or 2^30.
        wide = self.offsets is not None and max(self.offsets, default=0) >= 1 << 30
        self.dtype = np.dtype(np.int64) if wide else self._stored

    def __len__(self) -> int:
        return self.shape[0]

    def shards(self) -> list[npt.NDArray[Any]]:
        """Return the shards in order as they are stored, without offsets, each a read-only memory map."""
        if self._maps is None:
            maps = []
            for path, rows in zip(self.paths, np.diff(self.starts).tolist(), strict=True):
                try:
                    shard = np.load(path, mmap_mode="r", allow_pickle=False)
                except (ValueError, EOFError) as error:
                    raise _damaged(path, f"cannot be read ({error})") from error
                if shard.shape != (rows, *self.shape[1:]) or shard.dtype != self._stored:
                    expected = f"{(rows, *self.shape[1:])} {self._stored}"
                    raise _damaged(path, f"holds {shard.shape} {shard.dtype}, expected {expected}")
                maps.append(shard)
            self._maps = maps
        return self._maps

    def __getitem__(self, rows: "int | slice | IntArray") -> npt.NDArray[Any]:
        """Return rows as an array in memory: one for a number, several for a slice or an integer array."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            assert step == 1, "a slice of rows has no step"
            return self._slice(start, max(start, stop))
        ids = np.asarray(rows)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"rows {ids.min()} to {ids.max()} of {len(self)}")
        shards = self.shards()
        if len(shards) == 1:
            return self._with_offset(np.array(shards[0][ids]), 0)
        gathered = np.empty((ids.size, *self.shape[1:]), dtype=self.dtype)
        order = np.argsort(ids, axis=None, kind="stable")
        ordered = ids.reshape(-1)[order]
        for number, first, start, stop in self.parts_of(ordered):
            found = shards[number][ordered[start:stop] - first]
            gathered[order[start:stop]] = self._with_offset(found, number)
        return gathered.reshape((*ids.shape, *self.shape[1:]))

    def parts_of(self, ordered: IntArray) -> Iterator[tuple[int, int, int, int]]:
        """Yield (shard, its first row, start, stop) for each shard that holds some of the sorted row numbers `ordered`.

        It holds `ordered[start:stop]`.
        """
        if not len(ordered):
            return
        first, last = np.searchsorted(self.starts, [ordered[0], ordered[-1]], side="right") - 1
        stops = np.searchsorted(ordered, self.starts[first + 1 : last + 2])
        start = 0
        for number, stop in enumerate(stops.tolist(), start=int(first)):
            if stop > start:
                yield number, int(self.starts[number]), start, stop
            start = stop

    def _slice(self, start: int, stop: int) -> npt.NDArray[Any]:
        rows = np.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        if stop > start:
            first, last = np.searchsorted(self.starts, [start, stop - 1], side="right") - 1
            for number in range(first, last + 1):
                begin = int(self.starts[number])
                found = self.shards()[number][max(start - begin, 0) : stop - begin]
                place = max(begin, start) - start
                rows[place : place + len(found)] = self._with_offset(found, number)
        return rows

    def _with_offset(self, rows: npt.NDArray[Any], number: int) -> npt.NDArray[Any]:
        if not self.offsets:
            return rows
        return np.asarray(np.add(rows, self.offsets[number], dtype=self.dtype))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}  # a worker process opens its own maps


def numbered(name: str, number: int) -> str:
    """Return the name of a shard's file: ("tokens.npy", 3) is tokens-00003.npy."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}-{number:05d}.{suffix}"


def _type_of(column: npt.NDArray[Any]) -> dict[str, Any]:
    return {"dtype": column.dtype.str, "row_shape": list(column.shape[1:])}


def _damaged(path: Path, what: str) -> DamagedArtifactError:
    return DamagedArtifactError(
        f"{path} {what}; delete {path.parent} and run `dvc repro`; if that brings it back, DVC's cache is damaged: "
        "`chmod -R u+w .dvc/cache` makes DVC check it"
    )


def _short(fact: object) -> str:
    text = str(fact)
    return text if len(text) <= 40 else text[:12] + "..."


# ---- raw files: arrays without a header, as retro_model.retrieval writes them ----


def open_raw(
    path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike = np.int32, *, longer: bool = False
) -> npt.NDArray[Any]:
    """Return the array in `path` as a read-only memory map of `shape`.

    With `longer`, the file may hold more rows, which are ignored: other programs preallocate files.

    Raises MissingArtifactError if there is no file, MismatchError if it has another size.
    """
    assert shape[0] > 0, shape
    if not path.is_file():
        raise MissingArtifactError(f"{path}: no such file; make it with the functions of retro_model.retrieval")
    width = int(np.prod(shape[1:], dtype=np.int64))
    size, row_size = path.stat().st_size, width * np.dtype(dtype).itemsize
    if size < shape[0] * row_size or (size > shape[0] * row_size and not longer):
        raise MismatchError(
            f"{path}: found {size / row_size:.10g} rows of {width} {np.dtype(dtype).name} ({size} bytes), expected "
            f"{shape[0]}{' or more' if longer else ''} ({shape[0] * row_size} bytes); give the counts that it was "
            "made with, or make it again"
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)


@contextmanager
def whole_files(*paths: Path) -> Iterator[list[Path]]:
    """Yield a temporary path beside each of `paths`; the files written there replace `paths` if the block succeeds.

    If the block fails, nothing changes. Old and new files never mix: after a kill, all files are old, all are new,
    or some are absent. The records of the old files (`write_record`) are deleted with them. Two processes must not
    replace the same path at a time: see `one_at_a_time`.
    """
    partials = [path.with_name(path.name + ".partial") for path in paths]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partials
        for path in paths:
            _record_path(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        for partial, path in zip(partials, paths, strict=True):
            os.replace(partial, path)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock for `path` in this block; wait while another process holds it.

    After waiting, the file that the other process wrote can be used. The lock is a file beside `path`, which is
    deleted at the end of the block. Blocks for the same path must not be nested.
    """
    lock = path.with_name(path.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    locked = False
    while not locked:
        with lock.open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            locked = _is_at(stream, lock)  # else the previous holder deleted this file: lock the new one
            if locked:
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)


def _is_at(stream: IO[Any], path: Path) -> bool:
    """Return whether the open file is the file at `path`."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def write_record(path: Path, made_from: Mapping[str, Any], **facts: Any) -> str:
    """Record in `path`.json what the finished file `path` was made from; return the sha256 of its bytes."""
    digest = file_digest(path)
    write_json(_record_path(path), {"version": VERSION, "made_from": made_from, "facts": facts, "sha256": digest})
    return digest


def read_record(path: Path, made_from: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record of `path` (`facts`, `sha256`) if the file is intact and was made from `made_from`, else None.

    None also means that the file or its record is absent, unfinished or damaged; the caller then makes the file
    again.
    """
    try:
        record = json.loads(_record_path(path).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    # Compare as JSON, which turns tuples into lists.
    expected = {"version": VERSION, "made_from": json.loads(json.dumps(made_from))}
    if not isinstance(record, dict) or {name: record.get(name) for name in expected} != expected:
        return None
    return record if path.is_file() and record.get("sha256") == file_digest(path) else None


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")
