"""Chunks: rows that give their documents back, and never two documents in one."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from fixtures import tiny_corpus, tiny_encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_model.core.artifacts import Artifact
from retro_model.core.errors import DamagedArtifactError, DocumentError, MissingArtifactError
from retro_model.corpus import chunking as module
from retro_model.corpus.chunking import cut, make_chunks
from retro_model.corpus.chunks import chunk_text, locate
from retro_model.corpus.documents import SPLITS, Corpus, CorpusConfig, Document
from retro_model.corpus.tokenizer import Tokenizer
from retro_model.corpus.tokenizer_training import TokenizerConfig, make_tokenizer

CONFIG = CorpusConfig(valid=0.15, test=0.15)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_corpus(tmp_path_factory.mktemp("corpus"))
    records = [
        "",
        "short",
        "\ud55c\uad6d\uc5b4 " * 50,
        "\U0001f600\U0001f468\u200d\U0001f469" * 40,
        "x" * 3000,
    ]
    lines = [json.dumps({"text": text}) for text in records]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\nno record\n")
    (folder / "copy.txt").write_bytes((folder / "document-001.txt").read_bytes())
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    make_tokenizer(corpus, CONFIG, TokenizerConfig(vocab_size=500), folder)
    return Tokenizer.open(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bert")
    encoder = tiny_encoder(folder / "encoder")
    make_tokenizer("not read", CONFIG, TokenizerConfig(name=str(encoder)), folder / "tokenizer")
    return Tokenizer.open(folder / "tokenizer")


@pytest.fixture(scope="module")
def made(corpus: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("made") / "chunks"
    return folder, make_chunks(corpus, CONFIG, tokenizer.folder, 16, folder)


def opened(folder: Path) -> dict[str, Artifact]:
    return {split: Artifact.open(folder / split, "chunks") for split in SPLITS}


def table(chunks: Artifact) -> list[dict[str, object]]:
    """The documents as a program without this library reads them: a shard's numbers are local to it."""
    offsets, entries, first = chunks.arrays["documents"]["offsets"], [], 0
    for number, offset in enumerate(offsets):
        for line in (chunks.folder / f"documents-{number:05d}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            entries.append({**entry, "document": entry["document"] + offset, "first_chunk": first})
            first += entry["chunks"]
    return entries


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---- rows ----------------------------------------------------------------------------------------------


def slow_rows(tokens: list[int], size: int, pad: int, begin: int, end: int) -> list[list[int]]:
    """The definition, word for word: s[i*M : i*M + M + 1] of s = [begin] + tokens + [end]."""
    stream = [begin, *tokens, end]
    rows = [stream[start : start + size + 1] for start in range(0, len(tokens) + 1, size)]
    return [row + [pad] * (size + 1 - len(row)) for row in rows]


ANY_TEXTS = st.lists(st.text(max_size=50) | st.text("ab \ud55c\U0001f600", max_size=50), min_size=1, max_size=6)


@pytest.mark.parametrize("kind", ["tokenizer", "bert"])
@given(texts=ANY_TEXTS, size=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_rows_are_those_of_the_definition(
    kind: str, request: pytest.FixtureRequest, texts: list[str], size: int
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    special = (tokenizer.pad_id, tokenizer.begin_id, tokenizer.end_id)
    chunks = cut(tokenizer.encode_batch(texts), size, *special)
    expected = [slow_rows(tokenizer.encode(text).tolist(), size, *special) for text in texts]
    assert chunks.rows.tolist() == [row for rows in expected for row in rows]
    assert chunks.counts.tolist() == [len(rows) for rows in expected]
    ends = np.cumsum(chunks.counts)
    for text, start, stop in zip(texts, ends - chunks.counts, ends, strict=True):
        assert chunks.bytes[start:stop].sum() == len(text.encode())
    assert (chunks.bytes >= 0).all()


@given(texts=ANY_TEXTS, size=st.integers(2, 9))
@settings(max_examples=150, deadline=None)
def test_rows_give_each_document_back_and_bytes_say_which_part_is_whose(
    tokenizer: Tokenizer, texts: list[str], size: int
) -> None:
    special = (tokenizer.pad_id, tokenizer.begin_id, tokenizer.end_id)
    chunks = cut(tokenizer.encode_batch(texts), size, *special)
    start = 0
    for text, count in zip(texts, chunks.counts.tolist(), strict=True):
        rows = chunks.rows[start : start + count]
        assert tokenizer.decode(rows[:, 1:].ravel()) == text
        ends = np.cumsum(chunks.bytes[start : start + count])
        for place, end in enumerate(ends):
            labels = rows[: place + 1, 1:].ravel()
            if "\ufffd" not in text:
                assert text.encode()[:end].decode(errors="ignore") == tokenizer.decode(labels).rstrip("\ufffd")
        start += count


def test_end_is_never_an_input_of_its_own_chunk(tokenizer: Tokenizer) -> None:
    for num_tokens in range(1, 20):
        encoded = tokenizer.encode_batch(["!" * num_tokens])
        rows = cut(encoded, 4, 0, 1, 2).rows
        assert rows[-1, 0] not in (0, 2), (num_tokens, rows)
        assert (rows[:, 1:] == 2).sum() == 1


# ---- artifacts -----------------------------------------------------------------------------------------


def test_every_kept_document_can_be_read_from_the_artifacts(
    corpus: Path, tokenizer: Tokenizer, made: tuple[Path, dict[str, float]]
) -> None:
    found = {}
    for split, chunks in opened(made[0]).items():
        rows, documents, sizes = chunks["tokens"][:], chunks["documents"][:], chunks["bytes"][:]
        assert (rows.dtype, rows.shape[1], documents.dtype, sizes.dtype) == (
            np.uint16,
            17,
            np.int32,
            np.int32,
        )
        assert (np.diff(documents) >= 0).all()
        for entry in table(chunks):
            mine = np.flatnonzero(documents == entry["document"])
            assert (mine[0], len(mine)) == (entry["first_chunk"], entry["chunks"])
            assert sizes[mine].sum() == entry["bytes"]
            assert (rows[mine, 1:] >= 3).sum() == entry["tokens"]
            assert entry["document"] not in found
            found[entry["document"]] = (
                split,
                entry["source"],
                entry["record"],
                tokenizer.decode(rows[mine, 1:].ravel()),
            )
    expected = [(doc.split, doc.source, doc.record, doc.text) for doc in Corpus(corpus, CONFIG).documents(*SPLITS)]
    assert list(found.values()) == sorted(expected, key=lambda document: SPLITS.index(document[0]))


def test_facts_and_metrics_say_what_is_there(
    corpus: Path, tokenizer: Tokenizer, made: tuple[Path, dict[str, float]]
) -> None:
    folder, metrics = made
    for split, chunks in opened(folder).items():
        entries = table(chunks)
        assert dict(chunks.facts) == {
            "split": split,
            "chunk_size": 16,
            "pad_id": 0,
            "begin_id": 1,
            "end_id": 2,
            "vocab_size": 500,
            "tokenizer": tokenizer.fingerprint,
            "documents": len(entries),
            "bytes": int(chunks["bytes"][:].sum()),
            "lossy_documents": 0,
        }
        for name in ("documents", "chunks", "tokens", "bytes"):
            total = chunks.rows if name == "chunks" else sum(entry.get(name[:9], 0) for entry in entries)  # type: ignore[misc]
            assert metrics[f"{split}_{name}"] == (len(entries) if name == "documents" else total)
    assert metrics["documents_read"] == 48 + 1 + 6
    assert metrics["dropped_empty"] == metrics["dropped_bad_record"] == metrics["dropped_exact_duplicates"] == 1
    dropped = sum(value for name, value in metrics.items() if name.startswith("dropped_"))
    assert metrics["documents_kept"] + dropped == metrics["documents_read"]
    assert 0.5 < metrics["text_share"] <= 1
    assert all(isinstance(value, (int, float)) for value in metrics.values())


def test_equal_inputs_give_equal_bytes_whatever_the_batches(
    corpus: Path,
    tokenizer: Tokenizer,
    made: tuple[Path, dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 1000)
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 3)
    metrics = make_chunks(corpus, CONFIG, tokenizer.folder, 16, tmp_path / "chunks")
    assert metrics == made[1]
    assert files_of(tmp_path / "chunks") == files_of(made[0])
    assert str(corpus).encode() not in b"".join(files_of(made[0]).values())


@pytest.mark.parametrize(("vocab_size", "expected"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.int32)])
def test_ids_beyond_two_bytes_are_stored_in_four(
    tokenizer: Tokenizer, tmp_path: Path, vocab_size: int, expected: type
) -> None:
    tokenizer = Tokenizer.open(tokenizer.folder)
    tokenizer.vocab_size = vocab_size
    (tmp_path / "part").mkdir()
    job = module.ChunkJob(tokenizer.folder, 8)
    assert list(job.make(tokenizer, tmp_path / "part", [Document(0, "a", None, "train", "text")], [], {})) == [1]
    chunks = Artifact.open(tmp_path / "part", "chunks")
    assert (chunks["tokens"].dtype, chunks["documents"].dtype) == (expected, np.int32)


def test_a_document_shorter_than_a_chunk_is_one_padded_chunk(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"{number}")
    make_chunks(tmp_path, CONFIG, tokenizer.folder, 64, tmp_path / "chunks")
    for chunks in opened(tmp_path / "chunks").values():
        assert chunks.rows == chunks.facts["documents"] >= 1
        assert (chunks["tokens"][:][:, 0] == 1).all()
        assert (chunks["tokens"][:] == 0).sum() == chunks.rows * 62


def test_documents_without_a_token_are_counted_and_left_out(bert: Tokenizer, tmp_path: Path) -> None:
    for number in range(30):
        words = " ".join(random.Random(number).choices(["ba", "co", "di", "fu"], k=30))
        text = "\u0007" * (number + 1) if number % 5 == 0 else words + " Fu"  # a BERT cleans \u0007 away
        (tmp_path / f"{number:02d}.txt").write_text(text)
    config = CorpusConfig(valid=0.3, test=0.3)
    metrics = make_chunks(tmp_path, config, bert.folder, 8, tmp_path / "chunks")
    assert (metrics["documents_read"], metrics["documents_kept"], metrics["dropped_without_tokens"]) == (
        30,
        24,
        6,
    )
    assert metrics["lossy_documents"] == 24  # the capital


def test_a_split_without_a_token_is_refused_and_leaves_nothing(bert: Tokenizer, tmp_path: Path) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    for number in range(3):
        (documents / f"{number}.txt").write_text("\u0007" * (number + 1))
    with pytest.raises(DocumentError, match="finds no token in the documents of train"):
        make_chunks(documents, CONFIG, bert.folder, 8, tmp_path / "chunks")
    assert [path.name for path in tmp_path.iterdir()] == ["documents"]


def test_a_file_name_that_is_not_utf8_is_cut_and_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(4):
        (folder / os.fsdecode(b"caf\xe9-%d.txt" % number)).write_text(f"some words, {number}")
    make_chunks(folder, CONFIG, tokenizer.folder, 16, tmp_path / "chunks")
    named = [entry["source"] for chunks in opened(tmp_path / "chunks").values() for entry in table(chunks)]
    assert sorted(map(str, named)) == [rf"caf\xe9-{number}.txt" for number in range(4)]


def test_lost_text_is_counted(bert: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    metrics = make_chunks(corpus, CONFIG, bert.folder, 16, tmp_path / "chunks")
    # Every document of the corpus begins with a capital, which this tokenizer takes away.
    assert 48 <= metrics["lossy_documents"] <= metrics["documents_kept"]
    assert metrics["lossy_share"] == round(metrics["lossy_documents"] / metrics["documents_kept"], 6)


def test_missing_or_torn_inputs_stop_before_anything_is_written(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(MissingArtifactError, match="stage tokenizer"):
        make_chunks(corpus, CONFIG, tmp_path / "none", 16, tmp_path / "chunks")
    with pytest.raises(DocumentError, match="no such folder or file"):
        make_chunks(tmp_path / "none", CONFIG, tokenizer.folder, 16, tmp_path / "chunks")
    torn = tmp_path / "torn"
    torn.mkdir()
    for name, content in files_of(tokenizer.folder).items():
        (torn / name).write_bytes(content[: len(content) // 2] if name == "tokenizer.json" else content)
    with pytest.raises(DamagedArtifactError):
        make_chunks(corpus, CONFIG, torn, 16, tmp_path / "chunks")
    assert not (tmp_path / "chunks").exists()


# ---- back to the document ------------------------------------------------------------------------------


def test_every_chunk_can_be_found_in_its_document(
    corpus: Path, tokenizer: Tokenizer, made: tuple[Path, dict[str, float]]
) -> None:
    texts = {(document.source, document.record): document for document in Corpus(corpus, CONFIG).documents()}
    for chunks in opened(made[0]).values():
        ids = list(range(chunks.rows))
        random.Random(0).shuffle(ids)
        for chunk, place in zip(ids, locate(chunks, ids), strict=True):
            document = texts[place.source, place.record]
            part = document.text.encode()[place.start : place.stop]
            labels = tokenizer.decode(chunks["tokens"][chunk][1:])
            # A character that the chunk's edges cut is U+FFFD in one and gone in the other.
            assert part.decode(errors="ignore") == labels.strip("\ufffd")
            assert chunks["documents"][chunk - place.chunk] == place.document


def test_locate_keeps_the_order_and_refuses_what_is_not_there(made: tuple[Path, dict[str, float]]) -> None:
    chunks = opened(made[0])["train"]
    assert locate(chunks, []) == []
    assert [place.document for place in locate(chunks, [5, 0, 5])] == chunks["documents"][np.array([5, 0, 5])].tolist()
    for wrong in (-1, chunks.rows):
        with pytest.raises(IndexError, match=f"of {chunks.rows}"):
            locate(chunks, [0, wrong])


def test_chunk_text_is_the_text_of_the_inputs_alone(tokenizer: Tokenizer) -> None:
    text = "Text with \U0001f600 and [SEP], <|end|>. \ud55c\uad6d\uc5b4"
    rows = cut(tokenizer.encode_batch([text, "b"]), 200, 0, 1, 2).rows
    assert chunk_text(tokenizer, rows[:, :-1]) == [text, "b"]
    smiles = cut(tokenizer.encode_batch(["\U0001f600" * 9]), 6, 0, 1, 2).rows
    found = chunk_text(tokenizer, smiles[:, :-1])
    assert "\ufffd" not in "".join(found)
    assert "\U0001f600" in "".join(found)


def test_a_chunk_that_begins_within_a_word_has_no_mark_of_it(bert: Tokenizer) -> None:
    ids = bert.encode("bacodi fu ## di")
    assert bert.decode(ids[1:]).startswith("##"), "the encoder would read two number signs"
    found = chunk_text(bert, np.stack([ids[1:], ids[:-1]]))
    assert found[0] == bert.decode(ids[1:])[2:] and not found[0].startswith("#")
    assert found[1].startswith("bacodi fu # #"), "number signs of the text stay"


@pytest.mark.parametrize(("character", "most"), [("x", 4), ("\u00e9", 2), ("\ud55c", 1), ("\U0001f600", 1)])
def test_batches_hold_little_text_at_once(character: str, most: int) -> None:
    documents = [Document(number, "a", None, "train", character * (1 << 19)) for number in range(20)]
    batches = list(module.batches(iter(documents), 1 << 21, 100))
    assert [document for batch in batches for document in batch] == documents
    assert max(len(batch) for batch in batches) == most, "bytes count, not characters"
