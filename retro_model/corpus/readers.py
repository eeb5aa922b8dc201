"""What files hold, place by place: texts, and the reasons why there is none, with file and line.

Everything is read as a stream: memory holds one document, or a few rows of a table, however large the file,
archive or row group.
"""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from retro_model.core.errors import DocumentError

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SUFFIXES = TEXT_SUFFIXES + RECORD_SUFFIXES

# Why a document is not usable, in the words of the report.
FLAWS = {
    "empty": "empty",
    "not_utf8": "not UTF-8",
    "bad_record": "no valid record",
    "missing_field": "without the text field",
    "bad_file": "unreadable file or truncated archive",
}
BLOCK_BYTES = 1 << 20
ROWS_PER_BATCH = 64  # of a .parquet file: a row may be a book


class Entry(NamedTuple):
    """What a file holds at one place: a text, or the reason (a key of FLAWS) why there is none."""

    source: str
    record: int | None
    text: str
    flaw: str = ""
    detail: str = ""
    times: int = 1

    @property
    def place(self) -> str:
        """Where it is, as `file:line`."""
        return self.source if self.record is None else f"{self.source}:{self.record}"


def find_files(path: Path) -> tuple[list[Path], int]:
    """The files that can hold documents, ordered by their path below `path`, and the number of others.

    Hidden files and folders and DVC's `*.dvc` files are no documents and are not counted.
    """
    if path.is_file():
        if _suffix(path) not in SUFFIXES:
            raise DocumentError(f"{path}: not a file of documents, expected one of {', '.join(SUFFIXES)}")
        return [path], 0
    if not path.is_dir():
        raise DocumentError(
            f"{path}: no such folder or file; set `documents` in params.yaml to yours, or make it "
            "(`dvc repro` writes the sample, `dvc pull` fetches what a remote has)"
        )
    files, others = [], 0
    for file in _walk(path):
        if _suffix(file) in SUFFIXES:
            files.append(file)
        elif file.suffix != ".dvc":
            others += 1
    if not files:
        found = f"found {others} files of other types" if others else "found none"
        raise DocumentError(f"{path}: no documents, {found}; expected {', '.join(SUFFIXES)} files")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix()), others


def matching_files(folder: Path, glob: str) -> list[Path]:
    """The files in `folder` that match, ordered by path; at least one.

    `Path.glob` leaves out a folder that it may not list. Here a missing corner of the corpus is an error.
    """
    if not folder.is_dir():
        raise DocumentError(f"{folder}: no such folder; name the one with the text files")
    for _ in os.walk(folder, onerror=_refusal(folder)):
        if "**" not in glob:
            break
    files = sorted((file for file in folder.glob(glob) if file.is_file()), key=Path.as_posix)
    if not files:
        raise DocumentError(f"{folder}: no file matches {glob!r}; give another glob, such as '**/*.md'")
    return files


def _refusal(path: Path) -> Callable[[OSError], NoReturn]:
    def refuse(error: OSError) -> NoReturn:
        raise DocumentError(
            f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or move it out of {path}"
        ) from error

    return refuse


def _walk(path: Path) -> Iterator[Path]:
    """All files that are not hidden; links to folders are followed, each folder once."""
    seen = set()
    for folder, names, file_names in os.walk(path, onerror=_refusal(path), followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (Path(folder, name) for name in file_names if not name.startswith("."))


def _suffix(file: Path) -> str:
    name = file.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


class _UnreadableError(Exception):
    """A file ends early or is not what its name says; never leaves this module."""


def read_entries(file: Path, source: str, text_field: str, separator: str | None) -> Iterator[Entry]:
    """Yields what `file` holds, in order; text that comes before damage is not lost.

    `text_field` is where the text of a record is, `separator` the line that parts the documents of a text
    file, if any does. `source` is what the entries call the file; bytes of it that are not UTF-8 are spelled
    with backslashes, so that it can be written anywhere.
    """
    source = source.encode(errors="surrogateescape").decode(errors="backslashreplace")
    suffix, record = _suffix(file), 0
    if suffix == ".parquet":
        entries = _rows(file, source, text_field)
    elif suffix in RECORD_SUFFIXES:
        entries = _json_lines(_lines(_blocks(file, suffix)), source, text_field)
    elif separator is not None:
        entries = _separated(_lines(_blocks(file, suffix)), source, separator)
    else:
        entries = _whole_file(_blocks(file, suffix), source)
    try:
        for entry in entries:
            record = entry.record or 0
            yield entry
    except _UnreadableError as error:
        yield Entry(source, record + 1, "", "bad_file", str(error))


def _blocks(file: Path, suffix: str) -> Iterator[bytes]:
    """The file's bytes, decompressed, without a byte order mark at the start."""
    try:
        with _opened(file) as stream:
            if suffix == ".jsonl.gz":
                blocks = _read_blocks(gzip.GzipFile(fileobj=stream))
            else:
                blocks = _zstandard_blocks(stream) if suffix == ".jsonl.zst" else _read_blocks(stream)
            yield next(blocks, b"").removeprefix(b"\xef\xbb\xbf")
            yield from blocks
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _UnreadableError(" ".join(str(error).split())) from error
    except OSError as error:
        raise _gone(file, error) from error


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise _gone(file, error) from error


def _gone(file: Path, error: OSError) -> DocumentError:
    """What the system does not give is no flaw of a document: to skip it would be to train on less than there is."""
    return DocumentError(
        f"{file}: cannot be read ({error.strerror or error}); bring it back or make it readable, or run again "
        "without it in the folder"
    )


def _read_blocks(stream: Any) -> Iterator[bytes]:
    while block := stream.read1(BLOCK_BYTES):  # `read` would lose what comes before a truncation
        yield block


def _zstandard_blocks(stream: Any) -> Iterator[bytes]:
    """Frame by frame: zstandard's own reader takes a truncated frame for the end of the file."""
    import zstandard

    frame = None
    for block in _read_blocks(stream):
        rest = block
        while rest:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(rest)
            except zstandard.ZstdError as error:
                raise _UnreadableError(str(error)) from error
            rest = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise _UnreadableError("the compressed stream ends early")


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines with their line feeds."""
    pending: list[bytes] = []
    for block in blocks:
        *whole, rest = block.split(b"\n")
        for piece in whole:
            pending.append(piece)
            yield b"".join(pending) + b"\n"
            pending.clear()
        pending.append(rest)
    if last := b"".join(pending):
        yield last


def _decoded(source: str, record: int | None, content: bytes, *, spans_lines: bool = False) -> Entry:
    """The text at `record`. If it `spans_lines`, that is where it begins, and a flaw is at the line of its own."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        place = (record or 1) + content[: error.start].count(b"\n") if spans_lines else record
        return Entry(source, place, "", "not_utf8", f"byte 0x{content[error.start]:02x}")
    return Entry(source, record, text) if text.strip() else Entry(source, record, "", "empty")


def _whole_file(blocks: Iterable[bytes], source: str) -> Iterator[Entry]:
    yield _decoded(source, None, b"".join(blocks), spans_lines=True)


def _separated(lines: Iterable[bytes], source: str, separator: str) -> Iterator[Entry]:
    """What stands before, between and after the separator lines; nothing at either end is no document."""
    wanted, pending, start = separator.strip().encode(), list[bytes](), 1
    number = 0
    for number, line in enumerate(lines, start=1):
        if line.strip() != wanted:
            pending.append(line)
            continue
        if pending or start > 1:
            yield _decoded(source, start, b"".join(pending), spans_lines=True)
        pending, start = [], number + 1
    if pending or not number:
        yield _decoded(source, start, b"".join(pending), spans_lines=True)


def _json_lines(lines: Iterable[bytes], source: str, text_field: str) -> Iterator[Entry]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _json_record(source, number, line, text_field)


def _json_record(source: str, number: int, line: bytes, text_field: str) -> Entry:
    entry = _decoded(source, number, line)
    if entry.flaw:
        return entry
    try:
        record = json.loads(entry.text)
    except (ValueError, RecursionError) as error:
        return Entry(source, number, "", "bad_record", " ".join(str(error).split()))
    if not isinstance(record, Mapping):
        return Entry(source, number, "", "bad_record", f"{type(record).__name__}, expected an object")
    text = record.get(text_field)
    if text is None:
        return Entry(source, number, "", "missing_field", _no_field(text_field, list(record)))
    if not isinstance(text, str):
        detail = f"{text_field!r} holds {type(text).__name__}, expected text"
        return Entry(source, number, "", "bad_record", detail)
    # JSON can spell half of a surrogate pair, which no UTF-8 file can.
    return _decoded(source, number, text.encode(errors="surrogatepass"))


def _no_field(text_field: str, names: list[str]) -> str:
    return f"no {text_field!r} in {', '.join(names[:8]) or 'it'}; see corpus.text_field"


def _rows(file: Path, source: str, text_field: str) -> Iterator[Entry]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # Without a buffer size, or with pre_buffer, a row group's whole column is read at once.
        with (
            _opened(file) as stream,  # pyarrow itself opens no name that is not UTF-8
            pyarrow.parquet.ParquetFile(stream, buffer_size=BLOCK_BYTES, pre_buffer=False) as table,
        ):
            yield from _check_columns(table, source, text_field)
            if text_field not in table.schema_arrow.names:
                return
            for batch in table.iter_batches(batch_size=ROWS_PER_BATCH, columns=[text_field]):
                for content in _as_bytes(batch.column(0)):
                    number += 1
                    if content is None:
                        yield Entry(source, number, "", "missing_field", "null")
                    else:
                        yield _decoded(source, number, content)
    except (pyarrow.ArrowException, OSError) as error:
        raise _UnreadableError(" ".join(str(error).split())[:200]) from error


def _check_columns(table: Any, source: str, text_field: str) -> Iterator[Entry]:
    names = table.schema_arrow.names
    if text_field not in names and table.metadata.num_rows:
        yield Entry(source, 1, "", "missing_field", _no_field(text_field, names), table.metadata.num_rows)


def _as_bytes(column: Any) -> list[bytes | None]:
    """The column's texts as bytes: one that is not UTF-8 must not cost its whole batch."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return values
