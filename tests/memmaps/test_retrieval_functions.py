"""The functions of retro_model.retrieval do what their users type, without the traps seen elsewhere.

A test that is named after a trap (shared with test_retro_dataset.py) shows that it is not there:
3 missing neighbors and continuations, 4 memory maps that grow, 5 stale files, 6 one document, 7 two ways to
embed, 8 text that spells special tokens, 9 chunks without text, 12 autofaiss's defaults, 13 training on the
first rows, 14 queries that are in no database. (1, 2, 10 and 11 are about the network and training.)
"""

import errno
import hashlib
import inspect
import json
import logging
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import SYLLABLES, tiny_corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from index_builders import needs_autofaiss

from retro_model import RETRODataset
from retro_model.core.artifacts import open_raw, read_record, whole_files, write_record
from retro_model.core.errors import ConfigError, DocumentError, MismatchError, MissingArtifactError, SourceError
from retro_model.corpus.chunking import batches
from retro_model.corpus.chunks import chunk_text
from retro_model.corpus.files import find_files
from retro_model.memmaps import chunks as chunks_module
from retro_model.memmaps import search
from retro_model.memmaps.autofaiss_arguments import bytes_of, index_settings
from retro_model.memmaps.encoder import ChunkEmbedder
from retro_model.memmaps.wrapper import _text_digest
from retro_model.retrieval import (
    SearchableChunks,
    bert_embed,
    beside,
    chunks_to_index_and_embed,
    chunks_to_precalculated_knn_,
    text_folder_to_chunks_,
    tokenize,
)

DIM, M = 24, 8
PAD, CLS, SEP = 0, 101, 102
WORDS = ("Bacodi", "fuga", "lem", "Verpa", "di", "tu", "wazen", "nor", "[SEP]", "[CLS]", "[PAD]", "102", "stopa", "!")


def cased_bert(folder: Path, seed: int = 0) -> Path:
    """A random two-layer BERT whose special ids are those of bert-base-cased; returns its folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    characters = [chr(code) for code in range(33, 127)]
    pieces = ["[PAD]", *(f"[unused{number}]" for number in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += [*characters, *SYLLABLES, *(f"##{piece}" for piece in (*characters, *SYLLABLES))]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(pieces) + "\n", encoding="utf-8", newline="\n")
    BertTokenizerFast(vocab=str(vocabulary), do_lower_case=False, model_max_length=128).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * DIM,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cased_bert(tmp_path_factory.mktemp("bert") / "cased")


@pytest.fixture(autouse=True)
def chosen(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRO_BERT", str(bert))


def write_texts(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8", newline="\n")
    return folder


def paths(folder: Path) -> dict[str, Path]:
    return {
        "chunks_memmap_path": folder / "train.chunks.dat",
        "seqs_memmap_path": folder / "train.seq.dat",
        "doc_ids_memmap_path": folder / "train.doc_ids.dat",
    }


def make_chunks(texts: Path, folder: Path, **changes: Any) -> dict[str, int]:
    return text_folder_to_chunks_(folder=texts, **paths(folder), **{"chunk_size": M, "seq_len": 4 * M, **changes})


def read(folder: Path, counts: dict[str, int]) -> tuple[Any, Any, Any]:
    rows = np.fromfile(folder / "train.chunks.dat", np.int32).reshape(-1, M + 1)
    starts = np.fromfile(folder / "train.seq.dat", np.int32)
    documents = np.fromfile(folder / "train.doc_ids.dat", np.int32)
    assert (len(rows), len(starts), len(documents)) == (counts["chunks"], counts["seqs"], counts["chunks"])
    return rows, starts, documents


# What their users type: names and defaults (None stands for none).
SIGNATURES: dict[Any, dict[str, Any]] = {
    tokenize: {"texts": None, "add_special_tokens": True},
    bert_embed: {"token_ids": None, "return_cls_repr": False},
    text_folder_to_chunks_: {
        **dict.fromkeys(("folder", "chunks_memmap_path", "seqs_memmap_path", "doc_ids_memmap_path")),
        **{"chunk_size": 64, "seq_len": 2048, "glob": "**/*.txt", "max_chunks": 1_000_000, "max_seqs": 100_000},
    },
    chunks_to_index_and_embed: dict.fromkeys(("num_chunks", "chunk_size", "chunk_memmap_path")),
    chunks_to_precalculated_knn_: {
        **dict.fromkeys(("num_nearest_neighbors", "num_chunks", "chunk_size", "chunk_memmap_path")),
        **{"doc_ids_memmap_path": None, "num_extra_neighbors": 10, "use_cls_repr": False},
        **{"chunks_to_embeddings_batch_size": 16, "embed_dim": 768, "index_file": "knn.index"},
        "force_reprocess": False,
    },
    RETRODataset: {
        **dict.fromkeys(("num_chunks", "chunk_size", "seq_len", "num_sequences", "num_neighbors")),
        **dict.fromkeys(("chunk_memmap_path", "chunk_nn_memmap_path", "seq_memmap_path")),
        **{"eos_id": 102, "pad_id": 0, "add_continuations": True},
    },
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_arguments_have_the_names_and_defaults_that_their_users_know(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    for name, default in SIGNATURES[function].items():
        assert parameters[name].default == (inspect.Parameter.empty if default is None else default), name
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    assert required - {"index_kwargs"} == {name for name, default in SIGNATURES[function].items() if default is None}


# ---- which tokenizer and encoder -----------------------------------------------------------------------


def test_the_argument_comes_before_the_variable(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = cased_bert(tmp_path / "other", seed=1)
    ids = tokenize(["lem tu"])
    assert not torch.allclose(bert_embed(ids), bert_embed(ids, encoder=other))
    monkeypatch.setenv("RETRO_BERT", str(other))
    assert torch.equal(bert_embed(ids), bert_embed(ids, encoder=other))
    assert torch.allclose(bert_embed(ids, encoder=bert), slow_vectors(bert, ["lem tu"]), atol=1e-5)


def test_an_encoder_that_changed_in_its_folder_is_loaded_anew(tmp_path: Path) -> None:
    folder = cased_bert(tmp_path / "bert")
    before = bert_embed(tokenize(["lem"], encoder=folder), encoder=folder)
    cased_bert(folder, seed=1)
    assert not torch.allclose(before, bert_embed(tokenize(["lem"], encoder=folder), encoder=folder))


@pytest.mark.parametrize("function", [lambda: tokenize(["a"]), lambda: ChunkEmbedder.open(M)])
def test_where_nothing_can_be_loaded_the_error_says_what_was_tried(
    function: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETRO_BERT", "no/such-encoder")
    with pytest.raises(SourceError, match=r"RETRO_BERT: no/such-encoder cannot be loaded, tried the folder .*absent"):
        function()
    monkeypatch.delenv("RETRO_BERT")
    with pytest.raises(SourceError) as raised:
        function()
    message = str(raised.value)
    for part in ("the default encoder: bert-base-cased", f"{tmp_path}", "hub", "set RETRO_BERT", "argument encoder"):
        assert part in message
    assert "\n" not in message


def test_an_encoder_folder_without_weights_is_an_error_with_its_name(tmp_path: Path) -> None:
    folder = cased_bert(tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=f"encoder: {folder} cannot be loaded"):
        bert_embed(tokenize(["a"], encoder=folder), encoder=folder)


# ---- tokenize ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_tokens_are_those_of_transformers(bert: Path, add_special_tokens: bool) -> None:
    from transformers import AutoTokenizer

    texts = ["Bacodi fuga lem!", "", "co " * 200, "Caf\u00e9 Tu"]
    expected = AutoTokenizer.from_pretrained(bert)(texts, add_special_tokens=add_special_tokens).input_ids
    found = tokenize(texts, add_special_tokens)
    assert found.dtype == torch.int64 and found.shape == (4, max(map(len, expected)))
    for row, ids in zip(found.tolist(), expected, strict=True):
        assert row == ids + [PAD] * (len(row) - len(ids))


def test_one_text_is_a_list_of_one_and_none_are_none() -> None:
    assert torch.equal(tokenize("lem tu"), tokenize(["lem tu"]))
    assert tokenize([]).shape == (0, 0) and tokenize([""], add_special_tokens=False).shape == (1, 0)


def test_trap_8_text_that_spells_special_tokens_stays_text() -> None:
    (row,) = tokenize(["lem [SEP] tu [PAD] [CLS]"]).tolist()
    assert row[0] == CLS and row[-1] == SEP
    assert not {PAD, CLS, SEP} & set(row[1:-1])


# ---- bert_embed ----------------------------------------------------------------------------------------


def slow_vectors(folder: Path, texts: list[str], cls: bool = False) -> torch.Tensor:
    """One text at a time, without padding."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    vectors = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vectors.append(states[0] if cls else states[1:].mean(0))
    return torch.stack(vectors)


TEXTS = ["Bacodi fuga.", "", "lem " * 60, "co", "Verpa di tu, wazen (nor)!"]


@pytest.mark.parametrize("cls", [False, True])
def test_vectors_are_those_of_a_slow_reference(bert: Path, cls: bool) -> None:
    found = bert_embed(tokenize(TEXTS), return_cls_repr=cls)
    assert found.dtype == torch.float32 and found.shape == (len(TEXTS), DIM)
    torch.testing.assert_close(found, slow_vectors(bert, TEXTS, cls), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", [False, True])
def test_padding_does_not_influence_a_vector(cls: bool) -> None:
    ids = tokenize(TEXTS)
    padded = torch.nn.functional.pad(ids, (0, 30))
    torch.testing.assert_close(bert_embed(padded, cls), bert_embed(ids, cls), atol=1e-5, rtol=1e-5)


def test_without_cls_in_front_every_token_counts(bert: Path) -> None:
    from transformers import AutoModel

    ids = tokenize(["lem tu wa", "Bacodi"], add_special_tokens=False)
    with torch.no_grad():
        states = AutoModel.from_pretrained(bert).eval()(ids, (ids != PAD).long()).last_hidden_state
    expected = torch.stack([state[row != PAD].mean(0) for state, row in zip(states, ids, strict=True)])
    torch.testing.assert_close(bert_embed(ids), expected, atol=1e-5, rtol=1e-5)


def test_vectors_can_be_trained_on_and_ids_can_be_arrays() -> None:
    ids = tokenize(TEXTS)
    vectors = bert_embed(ids.numpy().astype(np.int32))
    assert torch.equal(vectors, bert_embed(ids))
    weight = torch.ones(DIM, requires_grad=True)
    (vectors * weight).sum().backward()  # a tensor of inference mode would refuse


def test_the_order_of_a_large_batch_is_kept() -> None:
    texts = [" ".join(SYLLABLES[place % 16] for place in range(number, number + 3)) for number in range(100)]
    ids = tokenize(texts)
    each = torch.cat([bert_embed(row[None]) for row in ids])
    torch.testing.assert_close(bert_embed(ids), each, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[CLS, 110, SEP], [PAD, PAD, PAD]]), "row 1 has no token to embed"),
        (torch.tensor([[CLS, PAD]]), "row 0 has no token to embed"),
        (torch.tensor([CLS, SEP]), r"found torch.int64 \(2,\), expected integers \(b, n\)"),
        (torch.ones(1, 2), "found torch.float32"),
        (torch.full((1, 129), 110), "found 129 tokens a text, expected <= 128"),
        (torch.tensor([[CLS, 30_000, SEP]]), "found token ids 101 to 30000"),
    ],
)
def test_ids_that_cannot_be_embedded(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bert_embed(ids)
    assert bert_embed(torch.tensor([[CLS, PAD]]), return_cls_repr=True).shape == (1, DIM)


# ---- text to chunks ------------------------------------------------------------------------------------

documents_of_words = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=40), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=documents_of_words, chunk_size=st.sampled_from([2, 3, M]), rows_per_sequence=st.integers(1, 3))
def test_chunk_rows_give_each_document_back_and_none_spans_two(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[str]], chunk_size: int, rows_per_sequence: int
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    joined = [" ".join(words) for words in texts]
    seq_len = rows_per_sequence * chunk_size
    counts = make_chunks(write_texts(folder / "texts", joined), folder, chunk_size=chunk_size, seq_len=seq_len)
    rows = np.fromfile(folder / "train.chunks.dat", np.int32).reshape(-1, chunk_size + 1)
    documents = np.fromfile(folder / "train.doc_ids.dat", np.int32)
    starts = np.fromfile(folder / "train.seq.dat", np.int32).tolist()
    assert counts == {"chunks": len(rows), "docs": len(texts), "seqs": len(starts)}
    assert len(documents) == len(rows) and (np.diff(documents) >= 0).all()

    expected_starts = []
    for number, text in enumerate(joined):
        (mine,) = np.nonzero(documents == number)
        expected_starts += mine[::rows_per_sequence].tolist()
        stream = rows[mine, :-1].ravel()
        tokens = tokenize([text], add_special_tokens=False)[0].tolist()
        whole = [CLS, *tokens, SEP]
        # As many rows as the text needs: its end never opens one (trap 9).
        assert len(mine) == -(-(len(tokens) + 1) // chunk_size)
        assert stream.tolist() == (whole + [PAD] * chunk_size)[: len(stream)]
        assert stream.tolist()[: len(tokens) + 1] == [CLS, *tokens]
        assert rows[mine[:-1], -1].tolist() == rows[mine[1:], 0].tolist() and rows[mine[-1], -1] == PAD
    assert starts == expected_starts


def test_trap_4_the_files_hold_exactly_the_rows_written(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", ["lem tu " * 20, "", "wa", "\x00 \n"])
    counts = make_chunks(texts, tmp_path)
    rows, _, documents = read(tmp_path, counts)
    assert counts["docs"] == 2 and sorted(set(documents.tolist())) == [0, 1]
    assert (rows[:, 0] != PAD).all()
    assert {file.name for file in tmp_path.glob("train*")} == {path.name for path in paths(tmp_path).values()}


def test_how_many_documents_are_read_at_once_changes_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_chunks(corpus, tmp_path)
    expected = digests(tmp_path)
    for most in ({"most_texts": 1}, {"most_texts": 3}, {"most_bytes": 1}):
        with monkeypatch.context() as patch:
            patch.setattr(chunks_module, "batches", partial(batches, **most))
            make_chunks(corpus, tmp_path)
        assert digests(tmp_path) == expected


def test_trap_8_literal_special_tokens_do_not_cut_a_document(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", ["lem [SEP] tu [SEP] [PAD] wa " * 6])
    rows, _, documents = read(tmp_path, make_chunks(texts, tmp_path))
    assert len(rows) > 8 and set(documents.tolist()) == {0}
    stream = rows[:, :-1].ravel()
    assert np.count_nonzero(stream == SEP) == 1 and np.count_nonzero(stream == CLS) == 1
    last = int(np.flatnonzero(stream == SEP)[0])
    assert (stream[:last] != PAD).all() and (stream[last + 1 :] == PAD).all()


def test_trap_9_no_chunk_holds_only_the_end_token(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", [" ".join(["lem"] * number) for number in range(1, 4 * M)])
    rows, _, documents = read(tmp_path, make_chunks(texts, tmp_path))
    assert ((rows[:, :-1] != PAD) & (rows[:, :-1] != CLS) & (rows[:, :-1] != SEP)).any(axis=1).all()
    assert np.bincount(documents).tolist() == [-(-(number + 1) // M) for number in range(1, 4 * M)]


def test_files_are_documents_in_the_order_of_their_paths_below_the_folder(tmp_path: Path) -> None:
    for name, text in (("b.txt", "ba"), ("a/z.txt", "co"), ("a/c.md", "di"), ("c.jsonl", '{"text": "fu"}\n' * 2)):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(text)
    first = {"**/*.txt": ["co", "ba"], "*.txt": ["ba"], "**/*": ["di", "co", "ba", "fu", "fu"]}
    for glob, words in first.items():
        rows, _, _ = read(tmp_path, make_chunks(tmp_path / "texts", tmp_path, glob=glob))
        assert rows[:, 1].tolist() == [tokenize(word)[0, 1].item() for word in words]


def test_what_is_no_text_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By warnings, which a script sees that has not set up logging."""
    texts = write_texts(tmp_path / "texts", ["lem", "tu", " \n"])
    (texts / "bytes.txt").write_bytes(b"lem\n\xff")
    assert make_chunks(texts, tmp_path)["docs"] == 2
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "dropped: 1 empty",
        "dropped: 1 not UTF-8",
        "  002.txt: empty",
        "lost, in whole or from some place on: 1 files",
        "  bytes.txt:2: not UTF-8 (byte 0xff)",
    ]


def test_linked_folders_are_read_once_as_in_the_pipeline(tmp_path: Path) -> None:
    """And a change behind a link changes the digest by which TrainingWrapper finds its files again."""
    texts = write_texts(tmp_path / "texts", ["Bacodi fuga", "Verpa di"])
    linked = write_texts(tmp_path / "elsewhere", ["wazen nor"])
    (texts / "link").symlink_to(linked)
    (linked / "back").symlink_to(texts)
    counts = make_chunks(texts, tmp_path)
    assert counts["docs"] == 3 == len(find_files(texts).files)
    before = _text_digest(texts, "**/*.txt")
    write_texts(tmp_path / "elsewhere", ["wazen tu"])
    assert _text_digest(texts, "**/*.txt") != before


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Path.glob would leave it out without a word."""
    texts = write_texts(tmp_path / "texts", ["lem " * 40])
    (texts / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path) == texts / "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # for root no mode locks a folder
    with pytest.raises(DocumentError, match=r"texts/locked: cannot be listed \(Permission denied\); make it readable"):
        make_chunks(texts, tmp_path, glob="**/*.txt")
    assert make_chunks(texts, tmp_path, glob="*.txt")["docs"] == 1  # which looks into no folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_chunks": 10}, r"max_chunks: found 10, expected >= 14, which the 3 documents in .*14 chunks, 5 seq"),
        ({"max_seqs": 4}, r"max_seqs: found 4, expected >= 5"),
        ({"max_chunks": 0}, r"max_chunks: found 0, expected a whole number from 1"),
        ({"seq_len": 4 * M + 1}, r"seq_len: found 33, expected a multiple of chunk_size 8"),
        ({"chunk_size": True}, r"chunk_size: found True"),
        ({"glob": "*.rst"}, r"no file matches '\*.rst'"),
        ({"folder": "nowhere"}, r"nowhere: no such folder"),
        ({"seqs_memmap_path": "train.chunks.dat"}, r"expected three different files"),
        ({"documents_separator": ""}, r"documents_separator"),
    ],
)
def test_what_cannot_be_chunked_is_named_and_nothing_is_left(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = write_texts(tmp_path / "texts", ["lem " * 40, "tu " * 40, "wa " * 15])
    arguments = {"folder": texts, **paths(Path()), "chunk_size": M, "seq_len": 4 * M}
    with pytest.raises((ConfigError, DocumentError), match=message):
        text_folder_to_chunks_(**{**arguments, **changes})
    assert {file.name for file in tmp_path.iterdir()} == {"texts"}
    assert text_folder_to_chunks_(**arguments, max_chunks=14, max_seqs=5) == {"chunks": 14, "docs": 3, "seqs": 5}


def test_a_run_that_fails_leaves_the_files_of_the_one_before(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", ["lem " * 40])
    make_chunks(texts, tmp_path)
    before = digests(tmp_path)
    write_texts(texts, ["tu " * 40, "wa"])
    with pytest.raises(ConfigError, match="max_chunks"):
        make_chunks(texts, tmp_path, max_chunks=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text(" ")
    with pytest.raises(DocumentError, match="no document with text in 1 files"):
        make_chunks(tmp_path / "empty", tmp_path)
    assert digests(tmp_path) == before


def test_trap_6_one_document_is_not_taken_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_texts(tmp_path / "texts", ["lem tu " * 20 + "\n---\n" + "wa co " * 20])
    counts = make_chunks(texts, tmp_path)
    assert counts["docs"] == 1
    assert "one document only: no chunk will have a neighbor" in (told := capsys.readouterr().out)
    assert "give documents_separator" in told
    path, _ = chunks_to_precalculated_knn_(**knn_arguments(tmp_path, counts))
    assert (np.fromfile(path, np.int32) == -1).all()
    assert f"{counts['chunks']} of {counts['chunks']} chunks have fewer than 3 neighbors: all are of one document" in (
        capsys.readouterr().out
    )
    counts = make_chunks(texts, tmp_path, documents_separator="---")
    assert counts["docs"] == 2 and "one document only" not in capsys.readouterr().out


# ---- vectors, index, neighbors -------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("train*")}


def knn_arguments(folder: Path, counts: dict[str, int], **changes: Any) -> dict[str, Any]:
    arguments = {
        "num_nearest_neighbors": 3,
        "num_chunks": counts["chunks"],
        "chunk_size": M,
        "chunk_memmap_path": folder / "train.chunks.dat",
        "doc_ids_memmap_path": folder / "train.doc_ids.dat",
    }
    return {**arguments, **changes}


def index_arguments(folder: Path, counts: dict[str, int], **changes: Any) -> dict[str, Any]:
    names = ("num_chunks", "chunk_size", "chunk_memmap_path")
    arguments = knn_arguments(folder, counts)
    return {**{name: arguments[name] for name in names}, **changes}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_corpus(tmp_path_factory.mktemp("corpus") / "texts", num_documents=4)


@pytest.fixture
def made(corpus: Path, tmp_path: Path) -> tuple[Path, dict[str, int]]:
    return tmp_path, make_chunks(corpus, tmp_path)


def test_an_index_finds_a_chunk_first_for_its_own_vector(made: tuple[Path, dict[str, int]]) -> None:
    folder, counts = made
    index, embeddings = chunks_to_index_and_embed(**index_arguments(folder, counts))
    assert isinstance(embeddings, np.memmap) and embeddings.dtype == np.float32 and not embeddings.flags.writeable
    assert embeddings.shape == (counts["chunks"], DIM)
    distances, indices = index.search(embeddings[:1], k=2)
    assert indices.shape == (1, 2) and indices[0, 0] == 0 and distances[0, 0] == pytest.approx(0, abs=1e-4)
    assert embeddings[indices].shape == (1, 2, DIM)
    assert index.ntotal == counts["chunks"] and index.d == DIM


@pytest.mark.parametrize("cls", [False, True])
def test_trap_7_chunks_and_queries_are_embedded_in_one_way(
    made: tuple[Path, dict[str, int]], bert: Path, cls: bool
) -> None:
    folder, counts = made
    rows, _, _ = read(folder, counts)
    _, embeddings = chunks_to_index_and_embed(**index_arguments(folder, counts, use_cls_repr=cls))
    embedder = ChunkEmbedder.open(M, use_cls_repr=cls)
    np.testing.assert_array_equal(embedder.embed(rows[5:8, :-1]), embeddings[5:8])  # as a prompt's chunks are
    texts = chunk_text(embedder.tokenizer, rows[:, :-1])
    by_text = bert_embed(tokenize(texts), return_cls_repr=cls)
    np.testing.assert_allclose(embeddings, by_text.numpy(), atol=1e-4)
    np.testing.assert_allclose(embeddings[:9], slow_vectors(bert, texts[:9], cls).numpy(), atol=1e-4)


def brute_force(vectors: Any, documents: Any, k: int) -> Any:
    """By (distance, id), other documents only, -1 behind; exact for vectors of small whole numbers."""
    found = np.full((len(vectors), k), -1)
    for query, vector in enumerate(vectors.astype(np.float64)):
        distances = ((vectors.astype(np.float64) - vector) ** 2).sum(1)
        order = [row for row in np.lexsort((np.arange(len(vectors)), distances)) if documents[row] != documents[query]]
        found[query, : len(order[:k])] = order[:k]
    return found


def test_neighbors_are_those_of_brute_force(made: tuple[Path, dict[str, int]]) -> None:
    folder, counts = made
    path, index = chunks_to_precalculated_knn_(**knn_arguments(folder, counts))
    assert path == folder / "train.chunks.knn.dat"
    found = np.fromfile(path, np.int32).reshape(-1, 3)
    _, _, documents = read(folder, counts)
    _, embeddings = chunks_to_index_and_embed(**index_arguments(folder, counts))
    vectors = np.asarray(embeddings, dtype=np.float64)
    assert len(found) == counts["chunks"] and found.min() >= 0
    assert (documents[found] != documents[:, None]).all()
    distances = ((vectors[found] - vectors[:, None]) ** 2).sum(-1)
    expected = ((vectors[brute_force(vectors, documents, 3)] - vectors[:, None]) ** 2).sum(-1)
    np.testing.assert_allclose(distances, expected, rtol=1e-4)
    assert index.ntotal == counts["chunks"]


def whole_number_neighbors(
    vectors: Any, documents: Any, k: int, surplus: int, folder: Path, **index_kwargs: Any
) -> Any:
    """What the functions' own search writes for made-up vectors."""
    settings_ = index_settings(index_kwargs)
    index, facts = search._build_index(vectors, settings_)
    chunks = SearchableChunks(Path(), vectors, ChunkEmbedder.open(M), vectors, "", index, facts, "")
    search._write_neighbors(chunks.database(documents), k, surplus, folder / "found.dat")
    return np.fromfile(folder / "found.dat", np.int32).reshape(len(vectors), k)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.integers(0, 4), min_size=1, max_size=50),
    k=st.integers(1, 6),
    surplus=st.sampled_from([0, 1, 10, 1000]),
    spread=st.sampled_from([1, 2, 9]),
    seed=st.integers(0, 9),
)
def test_neighbors_equal_brute_force_for_any_documents_and_surplus(
    tmp_path_factory: pytest.TempPathFactory, documents: list[int], k: int, surplus: int, spread: int, seed: int
) -> None:
    vectors = np.random.default_rng(seed).integers(-spread, spread + 1, (len(documents), 5)).astype(np.float32)
    ids = np.array(documents, np.int32)
    found = whole_number_neighbors(vectors, ids, k, surplus, tmp_path_factory.mktemp("found"))
    np.testing.assert_array_equal(found, brute_force(vectors, ids, k))


def test_trap_3_where_the_database_has_no_more_there_is_minus_one(tmp_path: Path) -> None:
    vectors = np.arange(6, dtype=np.float32)[:, None].repeat(3, 1)
    found = whole_number_neighbors(vectors, np.array([0, 0, 0, 0, 1, 1], np.int32), 3, 10, tmp_path)
    assert found[0].tolist() == [4, 5, -1] and found[5].tolist() == [3, 2, 1]


def test_trap_6_a_document_larger_than_the_surplus_widens_the_search(tmp_path: Path) -> None:
    vectors = np.arange(400, dtype=np.float32)[:, None].repeat(4, 1)
    documents = np.repeat([0, 1], [390, 10]).astype(np.int32)
    found = whole_number_neighbors(vectors, documents, 4, 10, tmp_path)
    np.testing.assert_array_equal(found, brute_force(vectors, documents, 4))
    assert found[0].tolist() == [390, 391, 392, 393]
    found = whole_number_neighbors(vectors, documents, 4, 0, tmp_path, index_key="IVF4,Flat", index_param="nprobe=1")
    assert (found >= 0).all() and (documents[found] != documents[:, None]).all()


def test_trap_12_distance_is_squared_l2_and_the_same_input_gives_the_same_index(
    made: tuple[Path, dict[str, int]],
) -> None:
    import faiss

    folder, counts = made
    rows, _, _ = read(folder, counts)
    for key in ("Flat", f"IVF{len(rows) // 40},Flat"):
        arguments = index_arguments(folder, counts, index_key=key, force_reprocess=True)
        index, embeddings = chunks_to_index_and_embed(**arguments)
        assert index.metric_type == faiss.METRIC_L2
        first = digests(folder)
        again, _ = chunks_to_index_and_embed(**arguments)
        assert digests(folder) == first
        distances, ids = again.search(embeddings[:4], k=3)
        expected = ((np.asarray(embeddings)[ids] - embeddings[:4, None]) ** 2).sum(-1)
        np.testing.assert_allclose(distances, expected, atol=1e-3)


@needs_autofaiss
def test_autofaiss_and_faiss_write_the_same_files(made: tuple[Path, dict[str, int]]) -> None:
    folder, counts = made
    arguments = index_arguments(folder, counts, index_key=f"IVF{counts['chunks'] // 40},Flat", force_reprocess=True)
    written = []
    for builder in ("faiss", "autofaiss"):
        chunks_to_index_and_embed(**arguments, builder=builder)
        written.append(digests(folder))
    assert written[0] == written[1]


def test_without_autofaiss_nothing_else_is_needed(
    made: tuple[Path, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "autofaiss", None)  # type: ignore[arg-type]
    folder, counts = made
    path, index = chunks_to_precalculated_knn_(**knn_arguments(folder, counts, index_key="Flat", nb_cores=1))
    assert path.stat().st_size and index.ntotal == counts["chunks"]
    with pytest.raises(ConfigError, match=r"^index\.builder: found autofaiss, which is not installed; set faiss, "):
        chunks_to_precalculated_knn_(**knn_arguments(folder, counts, builder="autofaiss"))


def test_trap_12_too_little_memory_is_an_error_with_both_numbers(made: tuple[Path, dict[str, int]]) -> None:
    folder, counts = made
    arguments = index_arguments(folder, counts)
    with pytest.raises(ConfigError, match=r"found 1\.024e-06, expected >= .*given: max_index_memory_usage='1k'"):
        chunks_to_index_and_embed(**arguments, max_index_memory_usage="1k", current_memory_available="1G")
    assert not beside(arguments["chunk_memmap_path"], "knn.index").exists()
    chunks_to_index_and_embed(**arguments, max_index_memory_usage="100m", current_memory_available="1G")


def test_trap_13_rows_ordered_by_topic_are_found_as_well(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    centers = 10 * random.standard_normal((20, 16))
    vectors = np.concatenate([center + random.standard_normal((100, 16)) for center in centers]).astype(np.float32)
    documents = np.arange(2000, dtype=np.int32)
    found = whole_number_neighbors(vectors, documents, 5, 10, tmp_path, index_key="IVF16,Flat")
    expected = brute_force(vectors, documents, 5)
    shared = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found.tolist(), expected.tolist(), strict=True)])
    assert shared >= 0.95


def test_an_ivf_index_visits_enough_lists_also_without_this_library(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((1000, 8)).astype(np.float32)
    for arguments, expected in (({"index_param": "nprobe=7"}, 7), ({"target_recall": 1.0}, None)):
        index, facts = search._build_index(vectors, index_settings({"index_key": "IVF16,Flat", **arguments}))
        assert index.nprobe == facts["nprobe"] and index.nprobe in ([expected] if expected else range(8, 17))


def test_trap_14_text_of_no_document_searches_the_same_database(made: tuple[Path, dict[str, int]]) -> None:
    folder, counts = made
    rows, _, documents = read(folder, counts)
    chunks = SearchableChunks.open(**index_arguments(folder, counts))
    queries = chunks.embedder.embed(rows[[40, 3], :-1])
    ids, distances = chunks.database(documents).nearest(queries, np.array([-1, documents[3]]), 4)
    assert ids[0, 0] == 40 and distances[0, 0] == 0 and (np.diff(distances) >= 0).all()
    assert (documents[ids[1]] != documents[3]).all()


def test_the_pipeline_of_functions_feeds_the_dataset(made: tuple[Path, dict[str, int]]) -> None:
    folder, counts = made
    path, _ = chunks_to_precalculated_knn_(**knn_arguments(folder, counts))
    rows, starts, documents = read(folder, counts)
    dataset = RETRODataset(
        num_chunks=counts["chunks"],
        chunk_size=M,
        seq_len=4 * M,
        num_sequences=counts["seqs"],
        num_neighbors=3,
        chunk_memmap_path=folder / "train.chunks.dat",
        chunk_nn_memmap_path=path,
        seq_memmap_path=folder / "train.seq.dat",
    )
    for (seq, retrieved), start in zip(dataset, starts, strict=True):
        mine = np.flatnonzero(documents[start : start + 4] == documents[start]) + start
        stream = [*rows[mine, :-1].ravel().tolist(), int(rows[mine[-1], -1])]
        assert seq.tolist() == stream + [PAD] * (4 * M + 1 - len(stream))
        assert (retrieved[: len(mine), :, 0] != PAD).all() and (retrieved[len(mine) :] == PAD).all()


# ---- what is used again --------------------------------------------------------------------------------


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what is really done."""
    done: Counter[str] = Counter()
    for title, name in (("embed", "_write_vectors"), ("index", "_build_index"), ("knn", "_write_neighbors")):
        real = getattr(search, name)

        def counted(*arguments: Any, real: Any = real, title: str = title) -> Any:
            done[title] += 1
            return real(*arguments)

        monkeypatch.setattr(search, name, counted)
    return done


ALL = {"embed", "index", "knn"}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change_documents(folder: Path) -> None:
    documents = np.fromfile(folder / "train.doc_ids.dat", np.int32)
    (documents // 2).tofile(folder / "train.doc_ids.dat")


def change_tokens(folder: Path) -> None:
    rows = np.fromfile(folder / "train.chunks.dat", np.int32).reshape(-1, M + 1)
    rows[7, 1:4] = 110
    rows.tofile(folder / "train.chunks.dat")


@pytest.mark.parametrize(
    ("arguments", "act", "expected"),
    [
        ({}, lambda folder: None, set()),
        ({"num_extra_neighbors": 0, "chunks_to_embeddings_batch_size": 8}, lambda folder: None, set()),
        ({}, lambda folder: os.utime(folder / "train.chunks.dat", (0, 0)), set()),
        ({"force_reprocess": True}, lambda folder: None, ALL),
        ({"num_nearest_neighbors": 2}, lambda folder: None, {"knn"}),
        ({}, change_documents, {"knn"}),
        ({}, change_tokens, ALL),
        ({"use_cls_repr": True}, lambda folder: None, ALL),
        ({"encoder": "other"}, lambda folder: None, ALL),
        ({"encoder": "copy"}, lambda folder: None, set()),
        ({"number_type": "bfloat16"}, lambda folder: None, ALL),
        ({"num_chunks": 40}, lambda folder: None, ALL),
        ({"index_key": "IVF1,Flat"}, lambda folder: None, {"index", "knn"}),
        ({"max_index_memory_usage": "200m"}, lambda folder: None, {"index"}),  # the same index comes out
        pytest.param({"builder": "autofaiss"}, lambda folder: None, set(), marks=needs_autofaiss),
        ({}, lambda folder: flip(folder / "train.chunks.knn.dat"), {"knn"}),
        ({}, lambda folder: os.truncate(folder / "train.chunks.knn.dat", 24), {"knn"}),
        ({}, lambda folder: (folder / "train.chunks.knn.dat.json").unlink(), {"knn"}),
        ({}, lambda folder: os.truncate(folder / "train.chunks.knn.dat.json", 50), {"knn"}),
        ({}, lambda folder: (folder / "train.chunks.knn.dat.json").write_text("[]"), {"knn"}),
        ({}, lambda folder: flip(folder / "train.chunks.knn.index"), {"index"}),
        ({}, lambda folder: (folder / "train.chunks.knn.index").unlink(), {"index"}),
        ({}, lambda folder: flip(folder / "train.chunks.embeddings.dat"), {"embed"}),
    ],
)
def test_trap_5_what_changed_is_made_anew_and_nothing_else(
    arguments: dict[str, Any],
    act: Any,
    expected: set[str],
    made: tuple[Path, dict[str, int]],
    bert: Path,
    work: Counter[str],
) -> None:
    folder, counts = made
    first, _ = chunks_to_precalculated_knn_(**knn_arguments(folder, counts))
    neighbors = first.read_bytes()
    assert set(work) == ALL
    work.clear()
    act(folder)
    if arguments.get("encoder") == "other":
        arguments = {"encoder": cased_bert(folder / "other", seed=1)}
    if arguments.get("encoder") == "copy":
        arguments = {"encoder": cased_bert(folder / "copy")}
    path, index = chunks_to_precalculated_knn_(**knn_arguments(folder, counts, **arguments))
    assert set(work) == expected
    width = arguments.get("num_nearest_neighbors", 3)
    rows = arguments.get("num_chunks", counts["chunks"])
    assert path.stat().st_size == 4 * rows * width and index.ntotal == rows
    if "knn" not in expected:
        assert path.read_bytes() == neighbors
    # What was used again is what a first run makes.
    reused = path.read_bytes()
    chunks_to_precalculated_knn_(**knn_arguments(folder, counts, **{**arguments, "force_reprocess": True}))
    assert path.read_bytes() == reused


def test_trap_5_what_a_kill_leaves_is_not_taken_for_finished(
    made: tuple[Path, dict[str, int]], work: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, counts = made
    for name in ("_write_vectors", "_write_neighbors"):
        real = getattr(search, name)

        def stopped(*arguments: Any, real: Any = real) -> None:
            real(*arguments)
            os.truncate(arguments[-1], 100)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(search, name, stopped)
            chunks_to_precalculated_knn_(**knn_arguments(folder, counts))
        assert not list(folder.glob("*.partial"))
    assert not (folder / "train.chunks.knn.dat").exists()
    # A kill takes no time to clean up: a partial file lies there, and the old output has lost its record.
    (folder / "train.chunks.knn.dat.partial").write_bytes(b"1234")
    path, _ = chunks_to_precalculated_knn_(**knn_arguments(folder, counts))
    assert path.stat().st_size == 12 * counts["chunks"] and not list(folder.glob("*.partial"))


def test_trap_5_a_kill_between_output_and_record_costs_the_work_only(
    made: tuple[Path, dict[str, int]], work: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, counts = made
    chunks_to_precalculated_knn_(**knn_arguments(folder, counts))

    def killed(path: Path, *arguments: Any, **facts: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(search, "write_record", killed)
        chunks_to_precalculated_knn_(**knn_arguments(folder, counts, num_nearest_neighbors=5))
    assert not (folder / "train.chunks.knn.dat.json").exists()  # the file of 5 has no record of 3
    work.clear()
    path, _ = chunks_to_precalculated_knn_(**knn_arguments(folder, counts))
    assert set(work) == {"knn"} and path.stat().st_size == 12 * counts["chunks"]


def test_two_chunk_files_in_one_folder_do_not_disturb_each_other(corpus: Path, tmp_path: Path) -> None:
    for name, chunk_size in (("one", M), ("two", 2 * M)):
        text_folder_to_chunks_(
            folder=corpus,
            chunks_memmap_path=tmp_path / f"{name}.chunks.dat",
            seqs_memmap_path=tmp_path / f"{name}.seq.dat",
            doc_ids_memmap_path=tmp_path / f"{name}.doc_ids.dat",
            chunk_size=chunk_size,
            seq_len=4 * M,
        )
    files = {name: tmp_path / f"{name}.chunks.dat" for name in ("one", "two")}
    for name, chunk_size in (("one", M), ("two", 2 * M), ("one", M)):
        chunks_to_index_and_embed(num_chunks=20, chunk_size=chunk_size, chunk_memmap_path=files[name])
        if name == "one":
            before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("one*")}
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("one*")} == before
    chunks_to_index_and_embed(
        num_chunks=20, chunk_size=M, chunk_memmap_path=files["one"], index_file=tmp_path / "sub" / "my.index"
    )
    assert (tmp_path / "sub" / "my.index").is_file() and (tmp_path / "two.chunks.knn.index").is_file()


def test_files_made_from_a_chunk_file_are_its_own() -> None:
    assert beside("./train.chunks.dat", "knn.dat") == Path("train.chunks.knn.dat")
    names = ("corpus.train", "corpus.valid", "corpus.dat", "corpus.1.dat")
    assert [beside(f"a.b/{name}", "knn.dat").as_posix() for name in names] == [
        "a.b/corpus.train.knn.dat",
        "a.b/corpus.valid.knn.dat",
        "a.b/corpus.knn.dat",
        "a.b/corpus.1.knn.dat",
    ]


def test_a_record_holds_no_path_and_says_what_the_file_was_made_from(made: tuple[Path, dict[str, int]]) -> None:
    folder, counts = made
    chunks_to_precalculated_knn_(**knn_arguments(folder, counts))
    for name in ("embeddings.dat", "knn.index", "knn.dat"):
        record = (folder / f"train.chunks.{name}.json").read_text()
        assert str(folder) not in record and json.loads(record)["made_from"]


# ---- inputs --------------------------------------------------------------------------------------------


def test_trap_4_inputs_are_read_only_and_stay_as_they_are(made: tuple[Path, dict[str, int]]) -> None:
    folder, counts = made
    before = digests(folder)
    for file in paths(folder).values():
        file.chmod(0o444)
    chunks_to_precalculated_knn_(**knn_arguments(folder, counts))
    assert {name: digest for name, digest in digests(folder).items() if name in before} == before
    (folder / "train.chunks.dat").chmod(0o644)
    with (folder / "train.chunks.dat").open("ab") as stream:  # preallocated by others: more than was counted
        stream.write(bytes(4 * (M + 1) * 10))
    path, index = chunks_to_precalculated_knn_(**knn_arguments(folder, counts))
    assert path.stat().st_size == 12 * counts["chunks"] and index.ntotal == counts["chunks"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"num_chunks": 10_000},
            MismatchError,
            r"train.doc_ids.dat: found \d+ rows of 1 int32 .* expected 10000 or more",
        ),
        ({"doc_ids_memmap_path": "short"}, MismatchError, r"short: found 3 rows of 1 int32 \(12 bytes\), expected \d+"),
        ({"doc_ids_memmap_path": "absent"}, MissingArtifactError, r"absent: no such file"),
        ({"chunk_size": 4}, ConfigError, ""),
        ({"num_nearest_neighbors": 0}, ConfigError, r"num_nearest_neighbors: found 0"),
        ({"num_extra_neighbors": -1}, ConfigError, r"num_extra_neighbors: found -1"),
        ({"chunks_to_embeddings_batch_size": 0}, ConfigError, r"chunks_to_embeddings_batch_size: found 0"),
        ({"embed_dim": 100}, ConfigError, r"embed_dim: found 100, expected 24"),
        ({"number_type": "int8"}, ConfigError, r"number_type: found 'int8'"),
        ({"index_keys": "Flat"}, ConfigError, r"index_keys: unknown argument; the index has max_index_memory_usage,"),
        ({"metric_type": "ip"}, ConfigError, r"metric_type: found 'ip', expected l2"),
        ({"max_index_memory_usage": "much"}, ConfigError, r"max_index_memory_usage: found 'much'"),
        ({"current_memory_available": 5}, ConfigError, r"current_memory_available: found 5"),
        ({"index_param": "efSearch=4"}, ConfigError, r"index_param: found 'efSearch=4'"),
        ({"index_param": "nprobe=2"}, ConfigError, r"nprobe: found 2, expected <= 1, the lists of Flat"),
        ({"index_key": "HNSW32"}, ConfigError, r"index.key: found 'HNSW32'"),
        ({"nb_cores": 0}, ConfigError, r"nb_cores: found 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    made: tuple[Path, dict[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, counts = made
    monkeypatch.chdir(folder)
    np.zeros(3, np.int32).tofile("short")
    if changes == {"chunk_size": 4}:  # other rows: ids that no tokenizer gives are found out by their range
        np.full((counts["chunks"], 5), 70_000, np.int32).tofile("train.chunks.dat")
        message = "found token ids 70000 to 70000"
    with pytest.raises(error, match=message):
        chunks_to_precalculated_knn_(**knn_arguments(folder, counts, **changes))
    assert not (folder / "train.chunks.knn.dat").exists()


def test_a_chunk_file_shorter_than_its_count_is_an_error_with_both_numbers(made: tuple[Path, dict[str, int]]) -> None:
    folder, counts = made
    num = counts["chunks"]
    with pytest.raises(MismatchError, match=rf"chunks.dat: found {num} rows of 9 int32 .* expected {num + 1} or more"):
        chunks_to_index_and_embed(**index_arguments(folder, {"chunks": num + 1}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("100m", 100 * 2**20), ("1G", 2**30), ("1.5 gb", 1.5 * 2**30), ("16B", 16), ("7", 7), (".5K", 512), ("2T", 2**41)],
)
def test_amounts_of_memory_are_read_as_autofaiss_does(text: str, expected: float) -> None:
    assert bytes_of("memory", text) == expected
    smaller = index_settings({"max_index_memory_usage": text, "current_memory_available": "3T"})
    assert smaller.config.max_memory_gb == pytest.approx(expected / 1e9)


def test_arguments_of_autofaiss_without_effect_are_told(
    made: tuple[Path, dict[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, counts = made
    chunks_to_index_and_embed(
        **index_arguments(folder, counts), max_index_query_time_ms=10, nb_cores=1, use_gpu=False, metric_type="l2"
    )
    assert "index: max_index_query_time_ms changes nothing: searches are tuned by recall" in capsys.readouterr().out


# ---- raw files -----------------------------------------------------------------------------------------


def test_raw_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    first, second = tmp_path / "deep" / "a.dat", tmp_path / "b.dat"
    with pytest.raises(RuntimeError), whole_files(first, second) as partials:
        for partial in partials:
            partial.write_bytes(b"new")
        raise RuntimeError
    assert not first.exists() and not second.exists() and not list(tmp_path.rglob("*.partial"))
    with pytest.raises(FileNotFoundError), whole_files(first) as (partial,):
        pass  # nothing was written
    with whole_files(first, second) as partials:
        for partial in partials:
            partial.write_bytes(b"old!")
    assert first.read_bytes() == second.read_bytes() == b"old!"
    write_record(first, {"size": (1, 2)}, answer=3)
    record = read_record(first, {"size": (1, 2)})
    assert record is not None and record["facts"] == {"answer": 3}
    assert read_record(first, {"size": (1, 3)}) is None and read_record(first, {}) is None
    with whole_files(first) as (partial,):
        partial.write_bytes(b"new!")
    assert read_record(first, {"size": (1, 2)}) is None


def test_a_raw_file_is_opened_for_reading_only_and_its_size_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "a.dat"
    np.arange(7, dtype=np.int32).tofile(file)
    with pytest.raises(MismatchError, match=r"found 3\.5 rows of 2 int32 \(28 bytes\), expected 3 \(24 bytes\)"):
        open_raw(file, (3, 2))
    array = open_raw(file, (3, 2), longer=True)
    assert array.tolist() == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(MismatchError, match=r"found 3\.5 rows .* expected 4 or more \(32 bytes\)"):
        open_raw(file, (4, 2), longer=True)
    assert file.stat().st_size == 28
