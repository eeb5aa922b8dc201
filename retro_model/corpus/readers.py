"""Read documents from text, JSON Lines and Parquet files; report unusable ones with file, line and reason.

Files are read as streams: memory holds one document, or a few rows of a table, however large the file, archive or
row group is. A .zst file also takes the window that it was compressed with, up to 2 GiB.

A file that is damaged gives the documents before the damage and an entry that says what is wrong. A file that is
not read for a reason that lies in this machine, its disk, memory or libraries, is a DocumentError.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from retro_model.core.errors import DocumentError
from retro_model.core.printable import one_line
from retro_model.core.processes import available_memory

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SUFFIXES = TEXT_SUFFIXES + RECORD_SUFFIXES

# Why a document is unusable: name -> wording in the report.
FLAWS = {
    "empty": "empty",
    "not_utf8": "not UTF-8",
    "bad_record": "no valid record",
    "missing_field": "without the text field",
    "bad_file": "unreadable file or truncated archive",
}
BLOCK_BYTES = 1 << 20
ROWS_PER_BATCH = 64  # of a .parquet file; small, because a row may be a book
LARGEST_WINDOW = 1 << 31  # of a .zst file; zstandard reads no larger one

# zstandard's messages about files that are sound, but cannot be read here.
WINDOW_TOO_LARGE = "requires too much memory"
NOT_READ_BY_ZSTANDARD = ("not enough memory", "Dictionary mismatch", "Unsupported frame parameter", "Version not supp")


class Entry(NamedTuple):
    """A document of a file: its text, or in `flaw` the reason (a key of FLAWS) why it has none.

    `detail` explains the flaw; `times` is the number of documents with it that this entry stands for.
    """

    source: str
    record: int | None
    text: str
    flaw: str = ""
    detail: str = ""
    times: int = 1

    @property
    def place(self) -> str:
        """The place as `file:line`, or the file alone if it is one document."""
        return self.source if self.record is None else f"{self.source}:{self.record}"


def suffix_of(file: Path) -> str:
    """Return which of SUFFIXES the file's name ends with; "" if none."""
    name = file.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


class _UnreadableError(Exception):
    """A file is truncated or not of the type that its name says; caught within this module."""


def read_entries(file: Path, source: str, text_field: str, separator: str | None) -> Iterator[Entry]:
    """Yield the entries of `file`, in order; if it is damaged, also those before the damage.

    `text_field` is the field of a record that holds its text. `separator` is the line between documents of a text
    file; None if a file is one document. `source` is the file's name in the entries, where it is printable: bytes
    that are not UTF-8 are backslash escapes, and control characters are pictures of them.

    Raises DocumentError if the file cannot be read here: by the system, in this memory or by these libraries.
    """
    source = one_line(source)
    suffix, record = suffix_of(file), 0
    if suffix == ".parquet":
        entries = _parquet_rows(file, source, text_field)
    elif suffix in RECORD_SUFFIXES:
        entries = _json_lines(_lines(_blocks(file, suffix)), source, text_field)
    elif separator is not None:
        entries = _split_documents(_lines(_blocks(file, suffix)), source, separator)
    else:
        entries = _whole_file(_blocks(file, suffix), source)
    try:
        for entry in entries:
            record = entry.record or 0
            yield entry
    except _UnreadableError as error:
        yield Entry(source, record + 1, "", "bad_file", str(error))
    except MemoryError as error:
        raise DocumentError(
            f"{file}: takes more memory than there is, after record {record}; split the file or its longest document, "
            "or use a machine with more memory"
        ) from error


def _blocks(file: Path, suffix: str) -> Iterator[bytes]:
    """Yield the file's bytes, decompressed and without a byte order mark at the start."""
    try:
        with _open(file) as stream:
            if suffix == ".jsonl.gz":
                blocks = _read_blocks(gzip.GzipFile(fileobj=stream))
            else:
                blocks = _zstandard_blocks(file, stream) if suffix == ".jsonl.zst" else _read_blocks(stream)
            yield next(blocks, b"").removeprefix(b"\xef\xbb\xbf")
            yield from blocks
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _UnreadableError(" ".join(str(error).split())) from error
    except OSError as error:
        raise _unreadable_file(file, error) from error


def _open(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise _unreadable_file(file, error) from error


def _unreadable_file(file: Path, error: OSError) -> DocumentError:
    """Return the error for an unreadable file. Such files are not skipped: training would silently use less text."""
    return DocumentError(
        f"{file}: cannot be read ({error.strerror or error}); bring it back or make it readable, or run again "
        "without it in the folder"
    )


def _read_blocks(stream: Any) -> Iterator[bytes]:
    while block := stream.read1(BLOCK_BYTES):  # `read` would lose the bytes before a truncation
        yield block


def _zstandard_blocks(file: Path, stream: Any) -> Iterator[bytes]:
    """Decompress frame by frame, because zstandard's own reader treats a truncated frame as the end of the file."""
    import zstandard

    frame, largest_window = None, min(LARGEST_WINDOW, available_memory())
    for block in _read_blocks(stream):
        rest = block
        while rest:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=largest_window).decompressobj()
            try:
                yield frame.decompress(rest)
            except zstandard.ZstdError as error:
                raise _zstandard_error(file, str(error), largest_window) from error
            rest = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise _UnreadableError("the compressed stream ends early")


def _zstandard_error(file: Path, message: str, largest_window: int) -> DocumentError | _UnreadableError:
    if WINDOW_TOO_LARGE in message:
        limit = "zstandard reads" if largest_window == LARGEST_WINDOW else "fits the free memory of this machine"
        return DocumentError(
            f"{file}: was compressed with a larger window than {limit}, {largest_window / 2**20:,.0f} MiB; compress "
            "it again (zstd --long=27), or leave it out of the folder"
        )
    if any(part in message for part in NOT_READ_BY_ZSTANDARD):
        return DocumentError(
            f"{file}: zstandard cannot read it ({message}); compress it again (zstd --long=27), or leave it out of the "
            "folder"
        )
    return _UnreadableError(message)


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines, with their line feeds."""
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


def _decode(source: str, record: int | None, content: bytes, *, spans_lines: bool = False) -> Entry:
    """Decode the text of `record`.

    If it `spans_lines`, it starts at line `record`, and an invalid byte is reported at its own line.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        place = (record or 1) + content[: error.start].count(b"\n") if spans_lines else record
        return Entry(source, place, "", "not_utf8", f"byte 0x{content[error.start]:02x}")
    return Entry(source, record, text) if text.strip() else Entry(source, record, "", "empty")


def _whole_file(blocks: Iterable[bytes], source: str) -> Iterator[Entry]:
    yield _decode(source, None, b"".join(blocks), spans_lines=True)


def _split_documents(lines: Iterable[bytes], source: str, separator: str) -> Iterator[Entry]:
    """Yield the documents before, between and after separator lines; an empty one at either end is left out."""
    wanted, pending, start = separator.strip().encode(), list[bytes](), 1
    number = 0
    for number, line in enumerate(lines, start=1):
        if line.strip() != wanted:
            pending.append(line)
            continue
        if pending or start > 1:
            yield _decode(source, start, b"".join(pending), spans_lines=True)
        pending, start = [], number + 1
    if pending or not number:
        yield _decode(source, start, b"".join(pending), spans_lines=True)


def _json_lines(lines: Iterable[bytes], source: str, text_field: str) -> Iterator[Entry]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _json_record(source, number, line, text_field)


def _json_record(source: str, number: int, line: bytes, text_field: str) -> Entry:
    entry = _decode(source, number, line)
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
        return Entry(source, number, "", "missing_field", _missing_field_detail(text_field, list(record)))
    if not isinstance(text, str):
        detail = f"{text_field!r} holds {type(text).__name__}, expected text"
        return Entry(source, number, "", "bad_record", detail)
    # A JSON escape can be half of a surrogate pair, which is not valid UTF-8.
    return _decode(source, number, text.encode(errors="surrogatepass"))


def _missing_field_detail(text_field: str, names: list[str]) -> str:
    return f"no {text_field!r} in {', '.join(names[:8]) or 'it'}; see corpus.text_field"


def _parquet_rows(file: Path, source: str, text_field: str) -> Iterator[Entry]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with _open(file) as stream:  # pyarrow cannot open a name that is not UTF-8
            # What describes a table is shorter than the file; pyarrow's own limits are lower than that of wide tables.
            limit = min(max(os.fstat(stream.fileno()).st_size, 1), (1 << 31) - 1)
            limits = {"thrift_string_size_limit": limit, "thrift_container_size_limit": limit}
            # Without a buffer size, or with pre_buffer, pyarrow reads a row group's whole column at once.
            with pyarrow.parquet.ParquetFile(stream, buffer_size=BLOCK_BYTES, pre_buffer=False, **limits) as table:
                if unusable := _column_without_text(table, source, text_field):
                    yield unusable
                if unusable or not table.metadata.num_rows:
                    return
                for batch in table.iter_batches(batch_size=ROWS_PER_BATCH, columns=[text_field]):
                    for content in _as_bytes(batch.column(0)):
                        number += 1
                        if content is None:
                            yield Entry(source, number, "", "missing_field", "null")
                        else:
                            yield _decode(source, number, content)
    except (pyarrow.ArrowNotImplementedError, pyarrow.ArrowCapacityError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DocumentError(
            f"{file}: pyarrow cannot read it ({reason}); write it again in another way, or leave it out of the folder"
        ) from error
    except MemoryError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise _unreadable_file(file, error) from error
        raise _UnreadableError(" ".join(str(error).split())[:200]) from error
    except pyarrow.ArrowException as error:
        raise _UnreadableError(" ".join(str(error).split())[:200]) from error


def _column_without_text(table: Any, source: str, text_field: str) -> Entry | None:
    """Return the entry that stands for all rows of a table without a column of text; None if it has one."""
    names, rows = table.schema_arrow.names, table.metadata.num_rows
    if not rows:
        return None
    if text_field not in names:
        return Entry(source, 1, "", "missing_field", _missing_field_detail(text_field, names), rows)
    kind = table.schema_arrow.field(text_field).type
    if not _holds_text(kind):
        return Entry(source, 1, "", "bad_record", f"{text_field!r} holds {kind}, expected text", rows)
    return None


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    kinds = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(is_kind(kind) for is_kind in (*kinds, types.is_binary_view, types.is_fixed_size_binary, types.is_null))


def _as_bytes(column: Any) -> list[bytes | None]:
    """Return the column's texts as bytes, so that one that is not UTF-8 does not fail its whole batch."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return values
