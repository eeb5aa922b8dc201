"""Reading, judging, splitting and de-duplicating documents."""

import errno
import gzip
import json
import os
import random
import signal
import tempfile
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_model.core.errors import ConfigError, DocumentError
from retro_model.core.processes import available_memory
from retro_model.corpus import near_duplicates
from retro_model.corpus import readers as reading
from retro_model.corpus.documents import SPLITS, Corpus, CorpusConfig
from retro_model.corpus.files import find_files, matching_files
from retro_model.corpus.near_duplicates import NearDuplicates, word_grams

WORDS = [f"word{number}" for number in range(400)]


def text_of(seed: int, num_words: int = 60) -> str:
    """A text that shares no 13 words in a row with that of another seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def write_files(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def many(num: int) -> dict[str, str | bytes]:
    return {f"{number:03d}.txt": text_of(number) for number in range(num)}


def lines_of(texts: Iterable[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def read(path: Path, **settings_: object) -> dict[str, str]:
    """What survives, by source and record."""
    corpus = Corpus(path, CorpusConfig(**settings_))  # type: ignore[arg-type]
    return {f"{document.source}:{document.record}": document.text for document in corpus.documents()}


def splits_of(path: Path, **settings_: object) -> dict[str, str]:
    corpus = Corpus(path, CorpusConfig(**settings_))  # type: ignore[arg-type]
    return {document.text: document.split for document in corpus.documents()}


# ---- what counts as a document -------------------------------------------------------------------------


def test_a_folder_that_mixes_all_kinds_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    texts = [text_of(number) for number in range(9)]
    table = pyarrow.table({"id": [1, 2], "text": texts[7:]})
    write_files(
        tmp_path,
        {
            "b/c.txt": texts[0],
            "a.MD": texts[1],
            "b.txt": texts[2],
            "d.jsonl": lines_of(texts[3:5]),
            "e.jsonl.gz": gzip.compress(lines_of(texts[5:6])),
            "f.jsonl.zst": zstandard.compress(lines_of(texts[6:7])),
        },
    )
    pyarrow.parquet.write_table(table, tmp_path / "g.parquet")
    found = read(tmp_path)
    assert list(found) == [
        "a.MD:None",
        "b.txt:None",
        "b/c.txt:None",
        "d.jsonl:1",
        "d.jsonl:2",
        "e.jsonl.gz:1",
        "f.jsonl.zst:1",
        "g.parquet:1",
        "g.parquet:2",
    ]
    assert list(found.values()) == [texts[place] for place in (1, 2, 0, 3, 4, 5, 6, 7, 8)]


def test_hidden_files_and_droppings_of_git_and_dvc_are_no_documents(tmp_path: Path) -> None:
    write_files(tmp_path, many(4))
    hidden = dict.fromkeys([".gitignore", ".git/x.txt", "more/.hidden.txt", "data.dvc", "more/x.dvc"], "x")
    write_files(tmp_path, {**hidden, "picture.png": "x", "script.py": "x"})
    corpus = Corpus(tmp_path, CorpusConfig())
    assert (corpus.report.read, corpus.report.other_files) == (4, 2)


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    inside = write_files(tmp_path / "documents", many(3))
    write_files(tmp_path / "elsewhere", {"linked.txt": text_of(50)})
    (inside / "link").symlink_to(tmp_path / "elsewhere")
    (inside / "loop").symlink_to(inside)
    assert names_below(inside) == [*many(3), "link/linked.txt"]


def names_below(folder: Path) -> list[str]:
    """The names of the documents in a folder, which must be the same for the pipeline and for raw memmaps."""
    names = [name for _, name in find_files(folder).files]
    assert [name for _, name in matching_files(folder, "**/*.txt").files] == names
    return names


def test_a_folder_is_found_by_its_own_name_and_not_by_that_of_a_link_to_it(tmp_path: Path) -> None:
    """Else a link that sorts first would rename its documents, and their splits with them."""
    write_files(tmp_path / "outside", {"c.txt": "c"})
    inside = write_files(tmp_path / "documents", {"z/a.txt": "a", "z/deep/b.txt": "b"})
    (inside / "a-link").symlink_to(inside / "z")
    (inside / "b-link").symlink_to(inside / "z" / "deep")
    (inside / "z" / "outside").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "back").symlink_to(tmp_path)  # and round again
    assert names_below(inside) == ["z/a.txt", "z/deep/b.txt", "z/outside/c.txt"]


@pytest.mark.parametrize("glob", ["*.txt", "**/*.txt", "**/b*/*.t?t", "a/**/*.md", "**/**/c.txt", "a/[bc]/*", "./*.md"])
def test_a_glob_finds_what_pathlib_finds(tmp_path: Path, glob: str) -> None:
    folders = ("", "a/", "a/b/", "a/c/", "a/b/b/", "bb/")
    write_files(tmp_path, {f"{folder}{name}": "x" for folder in folders for name in ("c.txt", "d.md", "e.TXT")})
    expected = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.glob(glob) if file.is_file())
    assert [name for _, name in matching_files(tmp_path, glob).files] == expected and expected


@pytest.fixture
def deadline() -> Iterator[None]:
    """Fails the test if it waits for a pipe, which without this it would do forever."""

    def fail(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("deadline")
def test_pipes_and_devices_among_the_documents_are_not_read_but_named(tmp_path: Path) -> None:
    write_files(tmp_path, many(4))
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "other")  # no document by its name either
    corpus = Corpus(tmp_path, CorpusConfig())
    assert (corpus.report.read, corpus.report.other_files) == (4, 1)
    assert "not read: 2 pipes, sockets or devices: pipe.txt, zero.jsonl" in corpus.report.lines()
    assert corpus.report.metrics()["special_files"] == 2
    found = matching_files(tmp_path, "**/*.txt")
    assert ([name for _, name in found.files], found.special) == ([*many(4)], ["pipe.txt"])
    assert find_files(tmp_path).special == ["pipe.txt", "zero.jsonl"]


def test_a_broken_link_is_an_error_and_not_left_out(tmp_path: Path) -> None:
    write_files(tmp_path, many(4))
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert "gone.txt: cannot be read (No such file" in refusal(tmp_path)


def test_what_a_name_filter_leaves_out_is_not_read_but_named(tmp_path: Path) -> None:
    write_files(tmp_path, {**many(4), "drafts/a.txt": "a", "b.draft.txt": "b", "c.draft": "c"})

    def no_drafts(folder: str, folders: list[str], files: list[str]) -> tuple[list[str], list[str]]:
        assert Path(folder) in (tmp_path, tmp_path / "drafts")
        return [name for name in folders if "draft" not in name], [name for name in files if "draft" not in name]

    corpus = Corpus(tmp_path, CorpusConfig(), no_drafts)
    assert {document.source for document in corpus.documents()} == {*many(4)}
    assert "not read: 2 that .dvcignore hides: b.draft.txt, drafts/" in corpus.report.lines()
    assert (corpus.report.metrics()["ignored_files"], corpus.report.other_files) == (2, 0)
    with pytest.raises(DocumentError, match="no documents, found 1 that .dvcignore hides"):
        Corpus(tmp_path / "drafts", CorpusConfig(), lambda folder, folders, files: (folders, []))


def test_text_is_given_back_as_it_is_but_for_a_byte_order_mark(tmp_path: Path) -> None:
    text = "한국어 \U0001f600 e\u0301\r\n\ttab\x0b<|end|> [SEP]\n\n"
    write_files(tmp_path, {"a.txt": b"\xef\xbb\xbf" + text.encode(), "b.jsonl": lines_of(["one " + text])})
    write_files(tmp_path, {"한글 이름.txt": "three " + text})
    assert list(read(tmp_path).values()) == [text, "one " + text, "three " + text]


@given(
    parts=st.lists(st.lists(st.text("ab-\r ", max_size=6), max_size=4), min_size=1, max_size=6),
    last_feed=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_separated_documents_are_what_stands_between_the_separator_lines(
    parts: list[list[str]], last_feed: bool
) -> None:
    parts = [[line for line in part if line.strip() != "---"] for part in parts]
    wanted = [text for part in parts if (text := "".join(line + "\n" for line in part)).strip()]
    content = "---\n".join("".join(line + "\n" for line in part) for part in parts)
    if not last_feed and content.endswith("\n"):
        content = content[:-1]
        wanted = wanted if parts[-1] == [] or not wanted else [*wanted[:-1], wanted[-1].removesuffix("\n")]
        if parts[-1] and not "".join(parts[-1]).strip():
            return  # the file's last line is blank: what was cut off belonged to no document
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "all.txt"
        file.write_bytes(content.encode())
        entries = list(reading.read_entries(file, "all.txt", "text", "---"))
    assert [entry.text for entry in entries if not entry.flaw] == wanted


def test_the_record_of_a_separated_document_is_the_line_at_which_it_starts(tmp_path: Path) -> None:
    file = tmp_path / "all.txt"
    file.write_text("one\n<end>\r\ntwo\nlines\n <end> \n\n<end>\nthree")
    found = read(file, documents_separator="<end>")
    assert found == {"all.txt:1": "one\n", "all.txt:3": "two\nlines\n", "all.txt:8": "three"}


@given(st.lists(st.binary(max_size=8).map(lambda block: block.replace(b"\x00", b"\n"))))
def test_lines_do_not_depend_on_where_blocks_are_cut(blocks: list[bytes]) -> None:
    whole = b"".join(blocks)
    assert b"".join(reading._lines(blocks)) == whole
    assert list(reading._lines(blocks)) == list(reading._lines([whole]))
    assert all(line.find(b"\n") in (-1, len(line) - 1) for line in reading._lines(blocks))


def test_zstandard_frames_one_after_the_other_are_one_file(tmp_path: Path) -> None:
    texts = [text_of(number) for number in range(6)]
    frames = b"".join(zstandard.compress(lines_of([text])) for text in texts)
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert list(read(tmp_path).values()) == texts


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet_texts_of_any_string_type_are_read(tmp_path: Path, kind: str) -> None:
    texts = [text_of(number) for number in range(4)]
    types = {
        "string": pyarrow.string(),
        "large_string": pyarrow.large_string(),
        "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    }
    column = pyarrow.array(texts).cast(types[kind])
    pyarrow.parquet.write_table(pyarrow.table({"body": column}), tmp_path / "a.parquet")
    assert list(read(tmp_path, text_field="body").values()) == texts


# ---- what is not usable --------------------------------------------------------------------------------


def parquet_bytes(**columns: object) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return bytes(sink.getvalue())


NOT_UTF8_COLUMN = pyarrow.array([b"fine text", b"\n\n\n\xff\xfe"]).cast(pyarrow.binary()).view(pyarrow.string())

FAULTS: dict[str, tuple[str, bytes, str, str]] = {
    "an empty file": ("x.txt", b"", "empty", "x.txt: empty"),
    "white space only": ("x.md", b" \n\t\r\n", "empty", "x.md: empty"),
    "an empty record": ("x.jsonl", b'\n{"text": " "}\n', "empty", "x.jsonl:2: empty"),
    "bytes that are no text": ("x.txt", b"a\nb\n\xff", "not_utf8", "x.txt:3: not UTF-8 (byte 0xff)"),
    "a bad byte in a record": ("x.jsonl", b'{"text": "\xe9"}\n', "not_utf8", "x.jsonl:1: not UTF-8"),
    "half a surrogate pair": ("x.jsonl", rb'{"text": "\ud800"}', "not_utf8", "x.jsonl:1: not UTF-8"),
    "half a pair after line feeds": ("x.jsonl", rb'{"text": "\n\n\n\ud800"}', "not_utf8", "x.jsonl:1: not UTF-8"),
    "a torn record": ("x.jsonl", b'{"text": "a', "bad_record", "x.jsonl:1: no valid record (Unterminated"),
    "a record too deep": ("x.jsonl", b"[" * 100_000, "bad_record", "x.jsonl:1: no valid record"),
    "a record that is a list": ("x.jsonl", b'["a"]', "bad_record", "(list, expected an object)"),
    "a number for a text": ("x.jsonl", b'{"text": 3}', "bad_record", "('text' holds int, expected text)"),
    "no such field": ("x.jsonl", b'{"body": "a", "id": 1}', "missing_field", "no 'text' in body, id"),
    "a null": ("x.jsonl", b'{"text": null}', "missing_field", "x.jsonl:1: without the text field"),
    "no archive": ("x.jsonl.gz", b"plain", "bad_file", "x.jsonl.gz:1: unreadable file or truncated"),
    "no zstandard": ("x.jsonl.zst", b"plain text here", "bad_file", "x.jsonl.zst:1: unreadable file"),
    "no table": ("x.parquet", b"PAR1 and no more", "bad_file", "x.parquet:1: unreadable file"),
    "no such column": ("x.parquet", parquet_bytes(body=["a"]), "missing_field", "no 'text' in body"),
    "a null in a column": ("x.parquet", parquet_bytes(text=["fine text", None]), "missing_field", ":2: with"),
    "bad bytes in a column": (
        "x.parquet",
        parquet_bytes(text=NOT_UTF8_COLUMN),
        "not_utf8",
        "x.parquet:2: not",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_usable_is_counted_named_and_left_out(tmp_path: Path, fault: str) -> None:
    name, content, reason, example = FAULTS[fault]
    write_files(tmp_path, {**many(5), name: content})
    corpus = Corpus(tmp_path, CorpusConfig())
    assert dict(corpus.report.flawed) == {reason: 1}
    assert example in "\n".join(corpus.report.lines())
    assert corpus.report.metrics()[f"dropped_{reason}"] == 1
    kept = [document.text for document in corpus.documents()]
    assert kept == [*many(5).values(), *(["fine text"] if "column" in fault and "such" not in fault else [])]


@pytest.mark.parametrize("fault", FAULTS)
def test_refuse_stops_at_the_first_one_in_one_line(tmp_path: Path, fault: str) -> None:
    name, content, _, example = FAULTS[fault]
    write_files(tmp_path, {**many(5), name: content})
    with pytest.raises(DocumentError, match=r"corpus\.bad_documents: skip") as caught:
        Corpus(tmp_path, CorpusConfig(bad_documents="refuse"))
    assert example in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_records_before_a_truncation_are_kept(tmp_path: Path, suffix: str) -> None:
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefgh ", k=4000)) for _ in range(100)]
    compress = gzip.compress if suffix == "gz" else zstandard.compress
    whole = compress(lines_of(texts))
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(whole[: len(whole) * 3 // 4])
    corpus = Corpus(tmp_path, CorpusConfig())
    kept = [document.text for document in corpus.documents()]
    assert 3 <= len(kept) < 100
    assert kept == texts[: len(kept)]
    assert corpus.report.flawed["bad_file"] == 1
    (line,) = corpus.report.lost
    assert line.startswith(f"a.jsonl.{suffix}:{len(kept) + 1}: unreadable file or truncated archive (")
    assert line.endswith(f"; the {len(kept):,} documents before that are used")


# ---- what this machine cannot read ---------------------------------------------------------------------


def long_window(texts: Iterable[str], window_log: int) -> bytes:
    """A .zst file such as `zstd --long=28` writes to a pipe, whose header asks for a window of 2 ** window_log."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    whole = bytearray(stream.compress(lines_of(texts)) + stream.flush())
    assert whole[5] == (28 - 10) << 3, "the exponent of the window"
    whole[5] = (window_log - 10) << 3
    return bytes(whole)


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_a_long_window_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_log: int) -> None:
    monkeypatch.setattr(reading, "available_memory", lambda: 1 << 40)
    texts = [text_of(number) for number in range(6)]
    (tmp_path / "dump.jsonl.zst").write_bytes(long_window(texts, window_log) + zstandard.compress(lines_of(["last"])))
    assert list(read(tmp_path).values()) == [*texts, "last"]


@pytest.mark.parametrize(
    ("window_log", "memory", "message"),
    [
        (32, 1 << 40, "a larger window than zstandard reads, 2,048 MiB"),
        (28, 100 << 20, "a larger window than fits the free memory of this machine, 100 MiB"),
    ],
)
def test_a_window_that_cannot_be_held_stops_by_name_though_bad_documents_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_log: int, memory: int, message: str
) -> None:
    """To skip it would be to train on less text on one machine than on another."""
    monkeypatch.setattr(reading, "available_memory", lambda: memory)
    write_files(tmp_path, {**many(5), "dump.jsonl.zst": long_window(["a"], window_log)})
    line = refusal(tmp_path)
    assert line.startswith(f"{tmp_path / 'dump.jsonl.zst'}: ") and message in line and "zstd --long=27" in line


def test_the_memory_that_is_free_is_known() -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1 << 20 < available_memory() <= pages


def test_a_document_that_memory_cannot_hold_stops_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, {**many(2), "long.jsonl": lines_of(["a", "b", "long"])})
    decode = reading._decode

    def full(source: str, record: int | None, content: bytes, **options: bool) -> reading.Entry:
        if content == b"long":
            raise MemoryError
        return decode(source, record, content, **options)

    monkeypatch.setattr(reading, "_decode", full)
    assert f"{tmp_path / 'long.jsonl'}: takes more memory than there is, after record 2; split" in refusal(tmp_path)


def test_a_table_that_pyarrow_does_not_read_stops_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(column: object) -> None:
        raise pyarrow.ArrowNotImplementedError("Codec type LZO not supported")

    monkeypatch.setattr(reading, "_as_bytes", unknown)
    write_files(tmp_path, {**many(5), "x.parquet": parquet_bytes(text=["a"])})
    assert f"{tmp_path / 'x.parquet'}: pyarrow cannot read it (Codec type LZO not supported)" in refusal(tmp_path)


def test_a_disk_that_fails_under_a_table_is_an_error_and_no_flaw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, {**many(5), "x.parquet": parquet_bytes(text=["a"])})

    def broken(column: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(reading, "_as_bytes", broken)
    assert f"{tmp_path / 'x.parquet'}: cannot be read (Input/output error)" in refusal(tmp_path)


def test_many_faulty_records_are_counted_and_the_first_few_named(tmp_path: Path) -> None:
    write_files(tmp_path, {**many(5), **{f"{name}.jsonl": lines_of([name]) + b"{\n" * 10 for name in "ab"}})
    report = Corpus(tmp_path, CorpusConfig()).report
    assert report.flawed["bad_record"] == 20
    assert [example.split(": ")[0] for example in report.examples] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]
    assert "dropped: 20 no valid record" in report.lines() and not report.lost


def test_every_file_that_is_lost_is_named_with_its_reason_however_many(tmp_path: Path) -> None:
    lost: dict[str, str | bytes] = {
        "gzip": b"no archive",
        "zstandard": b"no archive",
        "table": b"PAR1",
        "column": parquet_bytes(body=["a"] * 7),
        "type": parquet_bytes(text=[1, 2]),
        "nested": parquet_bytes(text=[["a"]]),
        "records": b'{"body": 1}\n' * 7,
        "latin": b"caf\xe9",
    }
    suffixes = (".jsonl.gz", ".jsonl.zst", ".parquet", ".parquet", ".parquet", ".parquet", ".jsonl", ".txt")
    files = dict(zip(lost, suffixes, strict=True))
    write_files(tmp_path, {**many(5), "empty.txt": "", "z.jsonl": lines_of(["fine"]) + b"{"})
    write_files(tmp_path, {f"{name}-{n}{files[name]}": lost[name] for name in lost for n in range(5)})
    report = Corpus(tmp_path, CorpusConfig()).report
    assert [line.split(":")[0] for line in report.lost] == sorted(
        f"{name}-{n}{files[name]}" for name in lost for n in range(5)
    )
    text = "\n".join(report.lines())
    assert "lost, in whole or from some place on: 40 files" in text and report.metrics()["lost_files"] == 40
    for line in (
        "  gzip-4.jsonl.gz:1: unreadable file or truncated archive (Not a gzipped file (b'no'))",
        "  column-4.parquet:1: without the text field (no 'text' in body; see corpus.text_field)",
        "  type-4.parquet:1: no valid record ('text' holds int64, expected text)",
        "  records-4.jsonl:1: without the text field (no 'text' in body; see corpus.text_field), and 6 more that are",
        "  latin-4.txt:1: not UTF-8 (byte 0xe9)",
    ):
        assert line in text
    assert report.flawed["missing_field"] == 5 * 7 + 5 * 7 and "z.jsonl:2" in report.examples[-1]


def test_the_rows_of_a_table_without_the_column_all_count(tmp_path: Path) -> None:
    write_files(tmp_path, {**many(3), "x.parquet": parquet_bytes(body=["a"] * 7)})
    report = Corpus(tmp_path, CorpusConfig()).report
    assert (report.read, report.flawed["missing_field"]) == (10, 7)


@pytest.mark.parametrize("suffix", reading.SUFFIXES)
def test_a_name_that_is_not_utf8_is_spelled_with_backslashes(tmp_path: Path, suffix: str) -> None:
    content = {
        ".jsonl": lines_of(["fine text"]),
        ".jsonl.gz": gzip.compress(lines_of(["fine text"])),
        ".jsonl.zst": zstandard.compress(lines_of(["fine text"])),
        ".parquet": parquet_bytes(text=["fine text"]),
    }
    file = tmp_path / os.fsdecode(b"caf\xe9" + suffix.encode())
    file.write_bytes(content.get(suffix, b"fine text"))
    (entry,) = reading.read_entries(file, file.name, "text", None)
    assert (entry.source, entry.text, entry.flaw) == (rf"caf\xe9{suffix}", "fine text", "")
    file.write_bytes(b"\xff")
    (entry,) = reading.read_entries(file, file.name, "text", None)
    assert entry.flaw and f"{entry.place} {entry.detail}".isascii()


HOSTILE_NAME = "a\x1b[31m\x07\nforged: line\t\x9b\u202e.txt"
SHOWN_NAME = "a\u241b[31m\u2407\u240aforged: line\u2409\ufffd\ufffd.txt"


def test_names_are_printable_wherever_they_appear(tmp_path: Path) -> None:
    write_files(tmp_path, {**many(5), HOSTILE_NAME: "fine text", f"{HOSTILE_NAME}.jsonl": "{", f"b{HOSTILE_NAME}": "b"})
    corpus = Corpus(tmp_path, CorpusConfig(), lambda _, folders, files: (folders, [n for n in files if n[0] != "b"]))
    assert SHOWN_NAME in {document.source for document in corpus.documents()}
    assert f"  {SHOWN_NAME}.jsonl:1: no valid record" in "\n".join(corpus.report.lines())
    assert all(line.isprintable() for line in corpus.report.lines())
    assert f"not read: 1 that .dvcignore hides: b{SHOWN_NAME}" in corpus.report.lines()
    with pytest.raises(DocumentError) as caught:
        Corpus(tmp_path, CorpusConfig(bad_documents="refuse"))
    assert SHOWN_NAME in str(caught.value) and str(caught.value).isprintable()
    with pytest.raises(DocumentError) as caught:
        Corpus(tmp_path / "no\x1bwhere", CorpusConfig())
    assert str(caught.value).isprintable()


# ---- refusals ------------------------------------------------------------------------------------------


def refusal(path: Path, **settings_: object) -> str:
    with pytest.raises(DocumentError) as caught:
        Corpus(path, CorpusConfig(**settings_))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_documents_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    assert "no such folder or file; set `documents`" in refusal(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no documents, found none; expected .txt, .md" in refusal(empty)
    write_files(empty, {"a.pdf": "x", "b.py": "x"})
    assert "found 2 files of other types" in refusal(empty)
    assert "a.pdf: not a file of documents, expected one of .txt" in refusal(empty / "a.pdf")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, {**many(5), "locked/a.txt": "one more"})
    locked, scandir = str(tmp_path / "locked"), os.scandir

    def refuse(path: str) -> Any:
        if path == locked:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # for root no mode locks a folder
    expected = f"{locked}: cannot be listed (Permission denied); make it readable, or move it out of {tmp_path}"
    assert refusal(tmp_path) == expected


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl.gz", "gone.parquet"])
def test_a_file_that_is_gone_when_it_is_read_is_an_error_and_no_flaw(tmp_path: Path, name: str) -> None:
    """To skip it would be to train on less than there is: a share that was unmounted, a folder that was moved."""
    gone = tmp_path / name
    with pytest.raises(DocumentError) as caught:
        list(reading.read_entries(gone, name, "text", None))
    assert str(caught.value) == (
        f"{gone}: cannot be read (No such file or directory); bring it back or make it readable, or run again "
        "without it in the folder"
    )


def test_only_empty_documents_is_refused_with_the_reasons(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.txt": "", "b.txt": " ", "c.txt": b"\xff", "d.txt": "fine"})
    message = refusal(tmp_path)
    assert "1 usable documents of 4 read (dropped: 2 empty, 1 not UTF-8; first: a.txt: empty)" in message
    assert "expected at least 3" in message


@pytest.mark.parametrize("num", [1, 2])
def test_too_few_documents_are_refused_with_the_hint_at_the_separator(tmp_path: Path, num: int) -> None:
    write_files(tmp_path, many(num))
    assert "set corpus.documents_separator to the line between them" in refusal(tmp_path)
    assert "is corpus.documents_separator '---' the line" in refusal(tmp_path, documents_separator="---")


def test_copies_are_one_document(tmp_path: Path) -> None:
    write_files(tmp_path, {f"{number}.txt": "the same" for number in range(5)})
    assert "1 usable documents of 5 read (dropped: 4 exact copies)" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"documents_separator": ""}, "corpus.documents_separator: found ''"),
        ({"documents_separator": "a\nb"}, "corpus.documents_separator"),
        ({"text_field": ""}, "corpus.text_field"),
        ({"valid": 0.5, "test": 0.5}, "corpus.valid, corpus.test: found 0.5 and 0.5, expected a sum below 1"),
        ({"test": 0.0}, "corpus.test: found 0.0, expected > 0.0"),
        ({"bad_documents": "ignore"}, "expected one of skip, refuse"),
        ({"near_duplicates": 1.1}, "corpus.near_duplicates"),
    ],
)
def test_settings_that_cannot_work_name_their_key(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match="corpus") as caught:
        CorpusConfig(**wrong)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_documents_that_change_while_they_are_read_are_noticed(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.jsonl": lines_of(text_of(number) for number in range(9))})
    corpus = Corpus(tmp_path, CorpusConfig())
    for num in (8, 10):
        write_files(tmp_path, {"a.jsonl": lines_of(text_of(number) for number in range(num))})
        with pytest.raises(DocumentError, match="changed while they were read"):
            list(corpus.documents())


def test_only_files_with_a_wanted_document_are_read_again(tmp_path: Path) -> None:
    write_files(tmp_path, many(40))
    corpus = Corpus(tmp_path, CorpusConfig(valid=0.2, test=0.2))
    sources = {split: [document.source for document in corpus.documents(split)] for split in SPLITS}
    (tmp_path / sources["train"][0]).unlink()
    for split in ("valid", "test"):
        assert [document.source for document in corpus.documents(split)] == sources[split]
    with pytest.raises(DocumentError, match="cannot be read"):
        list(corpus.documents("train"))


# ---- splits --------------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 10_000), min_size=3, max_size=60), st.data())
@settings(max_examples=30, deadline=None)
def test_adding_documents_moves_none(numbers: set[int], data: st.DataObject) -> None:
    few = data.draw(st.sets(st.sampled_from(sorted(numbers)), min_size=3))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        small, large = path / "small", path / "large"
        write_files(small, {"a.jsonl": lines_of(map(text_of, few)), "f.txt": "a file"})
        write_files(large, {"a.jsonl": lines_of(map(text_of, sorted(numbers))), "f.txt": "a file", "g.txt": "g"})
        corpora = [Corpus(each, CorpusConfig(valid=0.2, test=0.2)) for each in (small, large)]
        before, after = ({doc.text: doc.split for doc in corpus.documents()} for corpus in corpora)
        taken = sum(len(corpus.report.notes) for corpus in corpora)
        moved = [text for text in before if before[text] != after[text]]
    assert len(moved) <= taken  # only what an empty split had to take


def test_shares_are_those_asked_for_and_depend_on_nothing_but_identity(tmp_path: Path) -> None:
    texts = [text_of(number, 20) for number in range(4000)]
    write_files(tmp_path, {"a.jsonl": lines_of(texts), "b/c.jsonl": lines_of(["another one"])})
    one = splits_of(tmp_path, valid=0.1, test=0.2, near_duplicates=0)
    counts = {split: sum(found == split for found in one.values()) for split in SPLITS}
    assert abs(counts["valid"] - 400) < 60 and abs(counts["test"] - 800) < 80, counts
    write_files(tmp_path, {"a.jsonl": lines_of(reversed(texts))})
    (tmp_path / "a.jsonl").rename(tmp_path / "renamed.jsonl")
    assert splits_of(tmp_path, valid=0.1, test=0.2, near_duplicates=0) == one


def test_a_file_keeps_its_split_when_its_text_changes(tmp_path: Path) -> None:
    def by_source() -> dict[str, str]:
        corpus = Corpus(tmp_path, CorpusConfig(valid=0.3, test=0.3))
        return {document.source: document.split for document in corpus.documents()}

    write_files(tmp_path, many(30))
    before = by_source()
    write_files(tmp_path, {name: text_of(1000 + number) for number, name in enumerate(many(30))})
    assert by_source() == before
    assert set(before.values()) == set(SPLITS)


@given(st.sets(st.text("abcdefgh", min_size=1, max_size=8), min_size=3, max_size=12), st.floats(0.01, 0.49))
@settings(max_examples=40, deadline=None)
def test_every_split_has_a_document_and_the_report_says_what_was_taken(names: set[str], share: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), {f"{name}.txt": name for name in names})
        corpus = Corpus(folder, CorpusConfig(valid=share, test=share))
        again = Corpus(folder, CorpusConfig(valid=share, test=share))
        found = [(document.source, document.split) for document in corpus.documents()]
        assert {split for _, split in found} == set(SPLITS)
        assert found == [(document.source, document.split) for document in again.documents()]
        assert len(found) == len(names)
        assert all("by its hash" in note for note in corpus.report.notes)


def test_numbers_are_unique_over_the_splits_and_the_same_in_every_pass(tmp_path: Path) -> None:
    write_files(tmp_path, {**many(20), "empty.txt": "", "copy.txt": text_of(3)})
    corpus = Corpus(tmp_path, CorpusConfig(valid=0.3, test=0.3))
    everything = {document.number: document.text for document in corpus.documents()}
    assert list(everything) == sorted(everything)
    apart = {doc.number: doc.text for split in SPLITS for doc in corpus.documents(split)}
    assert apart == everything
    assert max(everything) < 21, "the documents that have text"


# ---- duplicates ----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.text("abcd", min_size=1, max_size=4), st.integers(0, 5)), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_of_exact_copies_one_survives_the_first_held_out_one_if_any(pairs: list[tuple[str, int]]) -> None:
    files: dict[str, str | bytes] = {f"{name}.txt": text_of(number, 5) for name, number in pairs}
    others: dict[str, str | bytes] = {f"z{number}.txt": f"other {number}" for number in range(12)}
    settings_ = {"valid": 0.3, "test": 0.3, "near_duplicates": 0.0}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as apart:
        path = write_files(Path(folder), {**files, **others})
        # What the hash says of each path alone, without copies.
        alone = write_files(Path(apart), {name: name for name in (*files, *others)})
        corpus = Corpus(path, CorpusConfig(**settings_))  # type: ignore[arg-type]
        if corpus.report.notes or Corpus(alone, CorpusConfig(**settings_)).report.notes:  # type: ignore[arg-type]
            return
        ranks = {text.removesuffix("\n"): split for text, split in splits_of(alone, **settings_).items()}
        kept = [(document.source, document.split) for document in corpus.documents()]
    for text in set(files.values()):
        copies = sorted(name for name in files if files[name] == text)
        best = min(copies, key=lambda name: (-SPLITS.index(ranks[name]), name))
        assert [(name, split) for name, split in kept if name in copies] == [(best, ranks[best])]
    assert corpus.report.exact_duplicates == len(files) - len(set(files.values()))


def held_out_and_train(path: Path) -> tuple[str, str]:
    corpus = Corpus(path, CorpusConfig(valid=0.3, test=0.3))
    found = {document.split: document.source for document in corpus.documents()}
    return found["test"], found["train"]


@pytest.mark.parametrize("upper", [False, True])
def test_a_train_document_that_nearly_repeats_a_held_out_one_is_dropped(tmp_path: Path, upper: bool) -> None:
    write_files(tmp_path, many(30))
    held_out, train = held_out_and_train(tmp_path)
    words = text_of(777, 600).split()
    changed = [*words[:590], *["new"] * 10]  # Jaccard .96 of 13-grams
    copy = ",\n ".join(changed).upper() if upper else " ".join(changed)
    write_files(tmp_path, {held_out: " ".join(words), train: copy})
    corpus = Corpus(tmp_path, CorpusConfig(valid=0.3, test=0.3))
    assert train not in [document.source for document in corpus.documents("train")]
    assert corpus.report.near_duplicates == 1
    assert len(list(corpus.documents())) == sum(corpus.report.kept.values()) == 29
    off = Corpus(tmp_path, CorpusConfig(valid=0.3, test=0.3, near_duplicates=0.0))
    assert len(list(off.documents())) == 30


def test_train_documents_may_resemble_each_other(tmp_path: Path) -> None:
    write_files(tmp_path, many(40))
    corpus = Corpus(tmp_path, CorpusConfig())
    first, second = [document.source for document in corpus.documents("train")][:2]
    write_files(tmp_path, {first: text_of(5, 300), second: text_of(5, 300) + " end"})
    assert len(read(tmp_path)) == 40


def test_a_corpus_that_repeats_its_held_out_documents_only_is_refused(tmp_path: Path) -> None:
    text = text_of(1, 500)
    write_files(tmp_path, {f"{number}.txt": f"{text} {number}" for number in range(6)})
    corpus = Corpus(tmp_path, CorpusConfig())
    with pytest.raises(DocumentError, match=r"no train documents left, all \d nearly repeat held-out ones"):
        list(corpus.documents("train"))


def jaccard(one: str, other: str) -> float:
    """The definition, over tuples of words."""
    grams = []
    for text in (one, other):
        words = text.lower().split()
        grams.append({tuple(words[start : start + 13]) for start in range(max(1, len(words) - 12))})
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_the_first_candidate_that_is_similar_enough_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of one template are all candidates of each other: comparing all pairs takes the square of them."""
    monkeypatch.setattr(near_duplicates, "CANDIDATES_AT_ONCE", 1)
    compared = []
    candidates = near_duplicates._Index.candidates

    def counted(index: near_duplicates._Index, signature: np.ndarray) -> Iterator[np.ndarray]:  # type: ignore[type-arg]
        for found in candidates(index, signature):
            compared.append(len(found))
            yield found

    monkeypatch.setattr(near_duplicates._Index, "candidates", counted)
    words = [f"word{number}" for number in range(400)]
    held_out = NearDuplicates(0.8)
    for number in range(60):
        held_out.add(" ".join([*words, f"user{number}"]))
    assert held_out.repeated_by(" ".join([*words, "another"]))
    assert sum(compared) == 1
    assert not held_out.repeated_by(" ".join(words[::-1]))


@pytest.mark.parametrize("threshold", [0.3, 0.8, 1.0])
def test_near_duplicates_agree_with_the_definition(threshold: float) -> None:
    found = NearDuplicates(threshold)
    base = [text_of(seed, 500) for seed in range(10)]
    for text in base:
        found.add(text)
    for seed in range(200):
        words = base[seed % 10].split()
        start = random.Random(seed).randrange(1, 500)
        other = " ".join(words[:start] + text_of(1000 + seed, 500 - start).split())
        similarity = jaccard(base[seed % 10], other)
        if abs(similarity - threshold) > 4 * (similarity * (1 - similarity) / 128) ** 0.5 + 1e-9:
            assert found.repeated_by(other) == (similarity > threshold), (similarity, threshold)
    assert all(found.repeated_by(text) for text in base)


def test_a_text_may_be_added_after_a_question() -> None:
    found = NearDuplicates(0.8)
    assert not found.repeated_by(text_of(1, 300))
    for seed in range(3):
        found.add(text_of(seed, 300))
        assert [found.repeated_by(text_of(other, 300)) for other in range(3)] == [other <= seed for other in range(3)]


def test_signatures_are_in_memory_once() -> None:
    found = NearDuplicates(0.8)
    tracemalloc.start()
    for seed in range(300):
        found.add(text_of(seed, 700))
    assert found.repeated_by(text_of(7, 700))
    held = tracemalloc.get_traced_memory()[0] / 300
    tracemalloc.stop()
    assert held < 1_500, "512 bytes of signature, 400 of keys and 350 of a sample"


def test_texts_without_words_repeat_nothing() -> None:
    found = NearDuplicates(0.8)
    found.add("... !!! ---")
    found.add("\u2603")
    assert not found.repeated_by("??? ;;;")


@given(st.lists(st.sampled_from(["a", "b", "c", "de", "\u6f22", "\ud55c\uad6d"]), max_size=40), st.integers(1, 5))
def test_word_grams_are_as_many_as_the_definition_says(words: list[str], size: int) -> None:
    runs = {tuple(words[start : start + size]) for start in range(max(1, len(words) - size + 1))} if words else set()
    grams = word_grams(" ".join(words), size)
    assert len(grams) == len(runs)
    assert grams.dtype == np.uint64


@given(st.text(st.characters(max_codepoint=127), max_size=60))
def test_the_quick_way_to_words_finds_the_same_ones(text: str) -> None:
    slow = [word.encode() for word in near_duplicates._WORDS.findall(text.lower())]
    assert near_duplicates._pad_words(text).split() == slow
    assert near_duplicates._pad_words(text + " \u00e9").split() == [*slow, "\u00e9".encode()]


@given(st.lists(st.text(st.sampled_from("aB\u00e9\u6f22\ud55c"), min_size=1, max_size=30), max_size=20))
def test_words_have_one_number_if_they_are_as_long_and_begin_and_end_alike(words: list[str]) -> None:
    """A start or an end is eight bytes, so shorter words, and most others, must be equal."""
    found = near_duplicates._WORDS.findall(" ".join(words).lower())
    keys = [(len(word.encode()), word.encode()[:8], word.encode()[-8:]) for word in found]
    hashes = near_duplicates._word_hashes(" ".join(words)).tolist()
    assert len(hashes) == len(keys)
    assert len(set(hashes)) == len(set(keys)) == len(set(zip(hashes, keys, strict=True)))


# ---- memory --------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    peaks = []
    for num in (2_000, 20_000):
        folder = tmp_path / str(num)
        folder.mkdir()
        with gzip.open(folder / "a.jsonl.gz", "wb", compresslevel=1) as stream:
            stream.writelines(lines_of([f"{number} {'words ' * 200}"]) for number in range(num))
        tracemalloc.start()
        for _ in Corpus(folder, CorpusConfig(near_duplicates=0.0)).documents():
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 18,000 documents more are 22 MB of text, and 60 bytes each of what is known of them while splits are assigned.
    assert peaks[1] - peaks[0] < 3_000_000, peaks


def test_memory_does_not_grow_with_the_row_group_of_a_table(tmp_path: Path) -> None:
    generator, peaks = np.random.default_rng(0), []
    for num in (2_000, 20_000):
        texts = [generator.bytes(500).hex() for _ in range(num)]
        file = tmp_path / f"{num}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=num)
        entries = reading.read_entries(file, file.name, "text", None)
        peaks.append(max(pyarrow.total_allocated_bytes() for _ in entries))
    assert peaks[1] - peaks[0] < 1_000_000, peaks  # 18,000 rows more are 18 MB


def test_reading_works_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "documents", many(5))
    monkeypatch.chdir(tmp_path)
    assert read(Path("documents")) == read(tmp_path / "documents")
    assert os.listdir(tmp_path) == ["documents"]
