"""The tokenizer: trained or loaded, self-contained, and honest about what it loses."""

import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import tiny_corpus, tiny_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from unbroken import KINDS, unbroken_text

from retro_model.core.artifacts import Artifact
from retro_model.core.errors import ConfigError, DamagedArtifactError, MissingArtifactError, SourceError
from retro_model.corpus.documents import Corpus, CorpusConfig
from retro_model.corpus.tokenizer import Encoded, SpecialIds, Tokenizer, save
from retro_model.corpus.tokenizer_training import (
    MAX_WORD_BYTES,
    TokenizerConfig,
    make_tokenizer,
    train,
    training_words,
)

TEXTS = [
    "Plain text, twice: plain text.",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "\U0001f468\u200d\U0001f469 e\u0301\n\t x",
]
SPELLED = "<|pad|><|begin|> <|end|> [CLS] [SEP] [PAD] </s> <|endoftext|>"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    make_tokenizer(corpus, CorpusConfig(), TokenizerConfig(vocab_size=600), folder)
    return Tokenizer.open(folder)


def saved(folder: Path, backend: Backend) -> Path:
    """A folder as `tokenizer.name` can give it: a tokenizer.json and nothing else."""
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def loaded(folder: Path, name: str) -> Tokenizer:
    make_tokenizer("not read", CorpusConfig(), TokenizerConfig(name=name), folder)
    return Tokenizer.open(folder)


# ---- trained -------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back(trained: Tokenizer, texts: list[str]) -> None:
    encoded = trained.encode_batch(texts)
    assert [trained.decode(ids) for ids in split(encoded.ids, encoded.starts)] == texts
    assert encoded.sizes.tolist() == [len(text.encode()) for text in texts]
    assert not encoded.lossy.any()


def split(ids: np.ndarray, starts: np.ndarray) -> Iterator[np.ndarray]:  # type: ignore[type-arg]
    return iter(np.split(ids, starts[1:-1]))


@given(st.text("<|pad>beginSEP[]", max_size=40).map(lambda text: SPELLED + text + "<|end|>"))
@settings(max_examples=50, deadline=None)
def test_text_that_spells_special_tokens_stays_text(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert not np.isin(ids, [trained.pad_id, trained.begin_id, trained.end_id]).any()
    assert trained.decode(ids) == text


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), max_size=30),
        min_size=1,
    )
)
@settings(max_examples=60, deadline=None)
def test_bytes_covered_are_those_that_the_first_tokens_give_back(trained: Tokenizer, texts: list[str]) -> None:
    encoded = trained.encode_batch(texts)
    lengths = np.diff(encoded.starts)
    numbers = np.repeat(np.arange(len(texts)), lengths + 1)
    counts = np.concatenate([np.arange(length + 1) for length in lengths])
    covered = encoded.bytes_covered(numbers, counts)
    for number, count, size in zip(numbers, counts, covered, strict=True):
        back = trained.decode(encoded.ids[encoded.starts[number] :][:count])
        assert texts[number].encode()[:size].decode(errors="ignore") == back.rstrip("\ufffd")


def test_what_is_measured_by_bytes_keeps_no_encoding(trained: Tokenizer) -> None:
    class Watched(list[Any]):  # a list that can be watched
        pass

    backend = Backend.from_file(str(trained.folder / "tokenizer.json"))
    encodings = Watched(backend.encode_batch_fast(TEXTS))
    watch = weakref.ref(encodings)
    encoded = Encoded(TEXTS, encodings, np.ones(trained.vocab_size, np.int64))
    del encodings
    assert watch() is None, "encodings take most of the memory of the chunk stage"
    assert len(encoded) == len(TEXTS)


def test_batches_ahead_are_those_one_by_one(trained: Tokenizer) -> None:
    batches = [TEXTS, TEXTS[:1], TEXTS[::-1]]
    for found, texts in zip(trained.encode_batches(iter(batches)), batches, strict=True):
        expected = trained.encode_batch(texts)
        for name in ("ids", "starts", "sizes", "lossy"):
            assert np.array_equal(getattr(found, name), getattr(expected, name))


def test_special_ids_come_first_and_decode_to_nothing(trained: Tokenizer) -> None:
    assert (trained.pad_id, trained.begin_id, trained.end_id) == (0, 1, 2)
    ids = trained.encode(TEXTS[1]).tolist()
    assert trained.decode([1, *ids, 2, 0, 0]) == TEXTS[1]
    assert trained.decode_batch([[1, 2], [], [0]]) == ["", "", ""]


def test_the_vocabulary_is_as_large_as_asked_and_has_all_bytes(trained: Tokenizer) -> None:
    assert trained.vocab_size == 600
    assert trained.facts() == {"pad_id": 0, "begin_id": 1, "end_id": 2, "vocab_size": 600}
    assert trained.encode(bytes(range(256)).decode("latin-1")).max() < 600


def test_only_the_train_documents_are_learned(corpus: Path, tmp_path: Path) -> None:
    config, documents = CorpusConfig(valid=0.2, test=0.2), tmp_path / "documents"
    shutil.copytree(corpus, documents)
    held_out = list(Corpus(documents, config).documents("valid", "test"))
    for document in held_out:
        (documents / document.source).write_text("xyzzyxyzzy " * 200 + document.source)
    figures = make_tokenizer(documents, config, TokenizerConfig(vocab_size=2000), tmp_path / "tokenizer")
    tokenizer = Tokenizer.open(tmp_path / "tokenizer")
    assert len(tokenizer.encode(" xyzzyxyzzy")) > 5
    texts = [document.text for document in Corpus(documents, config).documents("train")]
    assert figures["train_documents"] == len(texts)
    assert figures["train_bytes"] == sum(len(text.encode()) for text in texts)
    backend, _ = train(texts, 2000)
    assert (tmp_path / "tokenizer/tokenizer.json").read_text() == backend_text(backend, tmp_path)


def backend_text(backend: Backend, folder: Path) -> str:
    backend.save(str(folder / "again.json"))
    return (folder / "again.json").read_text()


def test_equal_documents_give_equal_bytes_in_every_process(corpus: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from retro_model.corpus.tokenizer_training import *; from retro_model.corpus.documents import CorpusConfig\n"
        "make_tokenizer(sys.argv[1], CorpusConfig(), TokenizerConfig(vocab_size=900), Path(sys.argv[2]))"
    )
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        subprocess.run([sys.executable, "-c", program, corpus, folder], check=True, cwd=ROOT)
    one, two = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert one == two
    assert str(tmp_path).encode() not in b"".join(one.values())


# ---- long words in training ------------------------------------------------------------------------------


def train_uncut(texts: list[str], vocab_size: int) -> Backend:
    """The trainer on whole words, whose time grows with the square of a word's length."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|begin|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def words_of(splitter: Any, text: str) -> list[str]:
    return [word for word, _ in splitter.pre_tokenize_str(text)]


def test_a_text_with_breaks_gives_the_bytes_of_the_trainer_on_whole_words(corpus: Path) -> None:
    texts = [document.text for document in Corpus(corpus, CorpusConfig()).documents("train")]
    texts += [file.read_text() for file in sorted((ROOT / "retro_model" / "corpus").glob("*.py"))]
    texts.append("a " + "b" * (MAX_WORD_BYTES - 1) + " " + "\u4e2d" * (MAX_WORD_BYTES // 3) + "\n" * 300 + "=" * 2000)
    assert train(texts, 2000)[0].to_str() == train_uncut(texts, 2000).to_str()


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_word_that_is_trained_on_does_not_grow_with_the_text(kind: str) -> None:
    one, four = (words_of(training_words(), unbroken_text(kind, size)) for size in (20_000, 80_000))
    assert max(map(len, one)) <= MAX_WORD_BYTES and max(map(len, four)) <= MAX_WORD_BYTES
    assert len(four) <= 4.1 * len(one)


@given(st.lists(st.text("\u0e01\u4e2d\U0001f600\u00e9a1 =\n", max_size=3), max_size=3), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_words_are_cut_between_characters_and_nothing_is_lost(parts: list[str], stride: int) -> None:
    text = "".join(part * (MAX_WORD_BYTES // stride) for part in parts)
    whole, cut = words_of(pre_tokenizers.ByteLevel(add_prefix_space=False), text), words_of(training_words(), text)
    assert "".join(cut) == "".join(whole)
    assert [word for word in cut if len(word) > MAX_WORD_BYTES] == []
    back = decoders.ByteLevel()
    assert "".join(back.decode([word]) for word in cut) == text
    pieces = iter(cut)
    for word in whole:  # no cut in a short word, and no piece across two words
        piece = next(pieces)
        assert len(word) > MAX_WORD_BYTES or piece == word
        while len(piece) < len(word):
            piece += next(pieces)
        assert piece == word


@pytest.mark.parametrize("kind", KINDS)
def test_cutting_long_words_costs_less_than_a_percent(kind: str) -> None:
    text = unbroken_text(kind, 16_000)
    cut, uncut = (len(backend.encode(text)) for backend in (train([text], 500)[0], train_uncut([text], 500)))
    assert cut <= 1.01 * uncut


# ---- loaded --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bert")
    return loaded(folder / "tokenizer", str(tiny_encoder(folder / "encoder")))


def test_a_bert_begins_with_cls_and_ends_with_sep(bert: Tokenizer) -> None:
    backend = Backend.from_file(str(bert.folder / "tokenizer.json"))
    names = [backend.id_to_token(number) for number in (bert.pad_id, bert.begin_id, bert.end_id)]
    assert names == ["[PAD]", "[CLS]", "[SEP]"]
    assert bert.name == "encoder"
    assert bert.vocab_size == backend.get_vocab_size()


def test_nothing_is_cut_or_padded_whatever_the_source_was_set_to(bert: Tokenizer) -> None:
    encoded = bert.encode_batch(["ba co " * 1000, "di"])
    assert np.diff(encoded.starts).tolist() == [2000, 1]


def test_special_tokens_in_text_are_words_to_a_bert(bert: Tokenizer) -> None:
    ids = bert.encode("[SEP] [CLS] [PAD]")
    assert not np.isin(ids, [bert.pad_id, bert.begin_id, bert.end_id]).any()
    assert bert.decode(ids).replace(" ", "") == "[sep][cls][pad]"


def test_a_bert_puts_nothing_together_that_the_text_had_apart(bert: Tokenizer) -> None:
    assert bert.decode(bert.encode("baco . di , fu")) == "baco . di , fu"


def test_text_that_a_bert_cannot_give_back_is_known(bert: Tokenizer) -> None:
    texts = ["baco di , fu .", "do not", "Baco", "ba \ud55c\uad6d", "ba\tco\n"]
    assert bert.encode_batch(texts).lossy.tolist() == [False, False, True, True, False]


@given(st.lists(st.text("ba co\u00e9\ud55c\U0001f600A.", max_size=40), min_size=1, max_size=4))
@settings(max_examples=80, deadline=None)
def test_bytes_covered_by_offsets_grow_to_the_whole_text(bert: Tokenizer, texts: list[str]) -> None:
    encoded = bert.encode_batch(texts)
    backend = Backend.from_file(str(bert.folder / "tokenizer.json"))
    for number, text in enumerate(texts):
        offsets = backend.encode(text, add_special_tokens=False).offsets
        counts = np.arange(len(offsets) + 1)
        found = encoded.bytes_covered(np.full(len(counts), number), counts)
        ends = [len(text[:end].encode()) for _, end in offsets[:-1]]
        expected = [0, *np.maximum.accumulate(ends).tolist(), len(text.encode())] if offsets else [len(text.encode())]
        assert found.tolist() == expected


def gpt2_like(**changes: object) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(changes.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    if "normalizer" in changes:
        backend.normalizer = changes["normalizer"]
    return backend


def gpt2_folder(folder: Path, backend: Backend, **special: str) -> Path:
    from transformers import PreTrainedTokenizerFast

    tokens = special or {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)
    return folder


def test_a_gpt2_begins_and_ends_with_one_token_and_gets_a_pad(tmp_path: Path) -> None:
    source = gpt2_folder(tmp_path / "source", gpt2_like())
    rows = gpt2_like().get_vocab_size()
    tokenizer = loaded(tmp_path / "tokenizer", str(source))
    assert tokenizer.begin_id == tokenizer.end_id == 0
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (rows, rows + 1)
    encoded = tokenizer.encode_batch([*TEXTS, SPELLED])
    assert [tokenizer.decode(ids) for ids in split(encoded.ids, encoded.starts)] == [*TEXTS, SPELLED]
    assert not encoded.lossy.any()


def test_a_pad_that_is_also_the_end_is_replaced_because_pads_are_not_learned(tmp_path: Path) -> None:
    one = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    source = gpt2_folder(tmp_path / "source", gpt2_like(), **one)
    tokenizer = loaded(tmp_path / "tokenizer", str(source))
    assert tokenizer.begin_id == tokenizer.end_id == 0 != tokenizer.pad_id


def test_a_bare_tokenizer_json_gets_special_tokens(tmp_path: Path) -> None:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    backend.train_from_iterator([], trainer)
    tokenizer = loaded(tmp_path / "tokenizer", str(saved(tmp_path / "source", backend)))
    assert sorted([tokenizer.pad_id, tokenizer.begin_id, tokenizer.end_id]) == [256, 257, 258]
    assert tokenizer.decode(tokenizer.encode(SPELLED)) == SPELLED


@pytest.mark.parametrize(
    ("changes", "lossy"),
    [({"add_prefix_space": True}, False), ({"normalizer": normalizers.Lowercase()}, True)],
)
def test_a_byte_level_tokenizer_that_changes_text_is_measured_by_offsets(
    tmp_path: Path, changes: dict[str, object], lossy: bool
) -> None:
    tokenizer = loaded(tmp_path / "tokenizer", str(gpt2_folder(tmp_path / "source", gpt2_like(**changes))))
    encoded = tokenizer.encode_batch(["Plain text", "plain text"])
    assert encoded.lossy.tolist() == [lossy, False]
    counts = np.diff(encoded.starts)
    assert encoded.bytes_covered(np.arange(2), counts).tolist() == [10, 10]
    assert 0 < encoded.bytes_covered(np.array([0]), counts[:1] - 1)[0] < 10


def test_a_tokenizer_that_reads_text_as_a_special_token_is_refused(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3, "word": 4}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    tokenizer = loaded(tmp_path / "tokenizer", str(gpt2_folder(tmp_path / "source", backend, **special)))
    assert tokenizer.encode("word word").tolist() == [4, 4]
    assert tokenizer.encode_batch(["word", "strange"]).lossy.tolist() == [False, True]
    with pytest.raises(SourceError, match=r"takes the text '\[SEP\]' for a special token"):
        tokenizer.encode("word [SEP]")


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    source = tiny_encoder(tmp_path / "source")
    one, two = (loaded(tmp_path / name, str(source)) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    assert str(tmp_path) not in (one.folder / "tokenizer.json").read_text()


@pytest.mark.parametrize("place", ["nobody/has-this", "missing/folder", "./data/nowhere"])
def test_a_tokenizer_that_cannot_be_loaded_says_what_was_tried(tmp_path: Path, place: str) -> None:
    with pytest.raises(SourceError, match=r"tokenizer\.name: .* tried the Hugging Face hub") as caught:
        loaded(tmp_path / "tokenizer", place)
    assert "\n" not in str(caught.value)
    assert place in str(caught.value)
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_that_holds_no_tokenizer_says_so(tmp_path: Path, content: str | None) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if content is not None:
        (source / "tokenizer.json").write_text(content)
    with pytest.raises(SourceError, match=r"tried the folder .*source") as caught:
        loaded(tmp_path / "tokenizer", str(source))
    assert "\n" not in str(caught.value)


# ---- the artifact --------------------------------------------------------------------------------------


def test_facts_are_what_the_tokenizer_opens_with(trained: Tokenizer) -> None:
    artifact = Artifact.open(trained.folder, "tokenizer")
    assert dict(artifact.facts) == {"name": "bpe", **trained.facts()}
    assert artifact.fingerprint == trained.fingerprint


def test_a_changed_or_absent_tokenizer_is_an_error(trained: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(MissingArtifactError, match="stage tokenizer"):
        Tokenizer.open(tmp_path / "none")
    copy = tmp_path / "copy"
    shutil.copytree(trained.folder, copy)
    file = copy / "tokenizer.json"
    state = json.loads(file.read_text())
    state["model"]["merges"].pop()
    file.write_text(json.dumps(state))
    with pytest.raises(DamagedArtifactError, match=r"tokenizer\.json"):
        Tokenizer.open(copy)


def test_ids_with_gaps_need_as_many_rows_as_the_largest_says(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"[UNK]": 0, "a": 7, "p": 3, "b": 4, "e": 5}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    save(tmp_path / "tokenizer", backend, SpecialIds(3, 4, 5), "gaps")
    assert Tokenizer.open(tmp_path / "tokenizer").vocab_size == 8


def test_settings_that_cannot_work_name_their_key() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size: found 258, expected >= 259"):
        TokenizerConfig(vocab_size=258)
    with pytest.raises(ConfigError, match=r"tokenizer\.name: found ''"):
        TokenizerConfig(name="")


@pytest.mark.parametrize("form", ["encode", "encode_batch", "encode_batches"])
@pytest.mark.parametrize("kind", ["trained", "loaded"])
def test_a_lone_surrogate_is_an_error_that_says_where(
    form: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """It has no UTF-8; the tokenizers library refuses it as if it were no text at all."""
    tokenizer: Tokenizer = request.getfixturevalue("trained")
    if kind == "loaded":
        make_tokenizer(
            tmp_path, CorpusConfig(), TokenizerConfig(str(tiny_encoder(tmp_path / "bert"))), tmp_path / "out"
        )
        tokenizer = Tokenizer.open(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"text 0: found the lone surrogate '\\ud800' at character 1, expected valid"):
        if form == "encode":
            tokenizer.encode("a\ud800b")
        elif form == "encode_batch":
            tokenizer.encode_batch(["a\ud800b", "fine"])
        else:
            list(tokenizer.encode_batches([["a\ud800b"]]))
    assert len(tokenizer.encode("a\U0001f600b"))
