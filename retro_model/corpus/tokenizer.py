"""Tokenizers: one trained on the documents, or any fast one of transformers, made self-contained.

    metrics = make_tokenizer(documents, corpus_config, TokenizerConfig(), Path("data/tokenizer"))
    tokenizer = Tokenizer.open(Path("data/tokenizer"))
    encoded = tokenizer.encode_batch(["two", "texts"])       # ids of both, one after the other
    tokenizer.decode(encoded.ids[: encoded.starts[1]])       # "two"

The default is a byte-level BPE: each byte is a token at worst, so nothing is unknown, in no language. Its
vocabulary is small because a small model spends much of its weights and of each step on the vocabulary:
at width 256, 4,096 tokens cost a fifth of the weights of six layers, 32,768 more than all of them.

Text never yields a special id, whatever it spells: the special tokens are put in by whoever cuts the
chunks, and text that spells one is encoded like any other.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, starmap
from pathlib import Path
from textwrap import shorten

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from retro_model.core.arrays import BoolArray
from retro_model.core.artifacts import Artifact, ArtifactWriter, whole_folder
from retro_model.core.config import Config, setting
from retro_model.core.errors import ConfigError, SourceError
from retro_model.core.prefetch import prefetch
from retro_model.corpus.documents import Corpus, CorpusConfig

FILE = "tokenizer.json"
TRAINED = "bpe"
PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"


@dataclass(frozen=True)
class TokenizerConfig(Config, section="tokenizer"):
    """`name`: bpe trains one of `vocab_size` tokens; anything else is a folder or a hub name to load."""

    name: str = TRAINED
    vocab_size: int = setting(4096, minimum=256 + 3, below=2**31)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name:
            raise ConfigError(f"tokenizer.name: found '', expected {TRAINED}, a folder or a hub name")


@dataclass(frozen=True)
class SpecialIds:
    """What stands for nothing, for a document's begin and for its end."""

    pad: int
    begin: int
    end: int


class Encoded:
    """Texts as token ids, one after the other: text i is `ids[starts[i] : starts[i + 1]]`.

    `sizes` (texts,) are their UTF-8 bytes; `lossy` (texts,) says which ones the ids cannot give back.
    """

    def __init__(
        self,
        texts: Sequence[str],
        encodings: list[Encoding],
        token_bytes: npt.NDArray[np.int64] | None,
        lossy: BoolArray | None = None,
    ) -> None:
        lengths = np.fromiter((len(encoding) for encoding in encodings), np.int64, len(encodings))
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        flat = chain.from_iterable(encoding.ids for encoding in encodings)
        self.ids: npt.NDArray[np.int32] = np.fromiter(flat, np.int32, int(lengths.sum()))
        self.sizes = np.fromiter((utf8_size(text) for text in texts), np.int64, len(texts))
        # Of a batch of text, encodings take most of the memory, and only offsets are read from them again.
        self._texts, self._encodings = (texts, encodings) if token_bytes is None else ((), [])
        self._covered: npt.NDArray[np.int64] | None = None
        if token_bytes is not None:
            self._covered = np.concatenate([[0], np.cumsum(token_bytes[self.ids])])
            lossy = np.diff(self._covered[self.starts]) != self.sizes
        assert lossy is not None
        self.lossy = lossy

    def __len__(self) -> int:
        return len(self.sizes)

    def bytes_covered(self, texts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many UTF-8 bytes of text `texts[i]` lie before the end of its first `counts[i]` tokens.

        All bytes where that is all of its tokens; a token that holds a part of a character counts
        exactly where the tokenizer is byte-level, and as the whole character elsewhere. Expects the
        texts in order and the counts of each in order.
        """
        whole = counts >= np.diff(self.starts)[texts]
        covered = self.sizes[texts]
        if self._covered is not None:
            first = self.starts[texts]
            exact = self._covered[np.minimum(first + counts, len(self.ids))] - self._covered[first]
            return np.where(whole, covered, np.minimum(exact, covered))
        text_before, end_before, bytes_before = -1, 0, 0
        covered[~whole & (counts == 0)] = 0
        for place in np.flatnonzero(~whole & (counts > 0)):
            text, last = int(texts[place]), int(counts[place]) - 1
            if text != text_before:
                text_before, end_before, bytes_before = text, 0, 0
            span = self._encodings[text].token_to_chars(last)
            end = max(end_before, span[1] if span else 0)
            bytes_before += utf8_size(self._texts[text][end_before:end])
            end_before = end
            covered[place] = bytes_before
        return covered


def utf8_size(text: str) -> int:
    """How many bytes `text` takes in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


class Tokenizer:
    """Text to ids and back, from a folder that needs nothing else."""

    def __init__(self, backend: Backend, special: SpecialIds, name: str, folder: Path, fingerprint: str) -> None:
        self.pad_id, self.begin_id, self.end_id = special.pad, special.begin, special.end
        self.name, self.folder, self.fingerprint = name, folder, fingerprint
        self.vocab_size = num_rows(backend)
        backend.encode_special_tokens = True  # text that spells a special token stays text
        self.continuing = ""  # what the text of a row that begins within a word begins with
        if isinstance(backend.decoder, WordPieceDecoder):
            self.continuing = backend.decoder.prefix
            # Its clean-up would turn "do not" into "don't": nicer here and there, and another text.
            backend.decoder = WordPieceDecoder(cleanup=False)
        self._backend = backend

    @classmethod
    def open(cls, folder: Path | str) -> "Tokenizer":
        """Opens the tokenizer in `folder`; raises what `Artifact.open` does."""
        artifact = Artifact.open(folder, "tokenizer")
        facts = artifact.facts
        special = SpecialIds(facts["pad_id"], facts["begin_id"], facts["end_id"])
        backend = Backend.from_file(str(artifact.folder / FILE))
        return cls(backend, special, facts["name"], artifact.folder, artifact.fingerprint)

    def facts(self) -> dict[str, int]:
        """What whoever writes token rows must write down with them."""
        ids = {"pad_id": self.pad_id, "begin_id": self.begin_id, "end_id": self.end_id}
        return {**ids, "vocab_size": self.vocab_size}

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """The ids of each text, without special ones, found on all cores at once.

        Raises SourceError if the tokenizer takes a part of a text for a special token: no text may end
        a document.
        """
        return self._encoded(texts, self._encodings(texts))

    def encode_batches(self, batches: Iterable[Sequence[str]]) -> Iterator[Encoded]:
        """`encode_batch` of each batch; while one is used, the ids of those after it are looked for."""
        return starmap(self._encoded, prefetch((texts, self._encodings(texts)) for texts in batches))

    def _encodings(self, texts: Sequence[str]) -> list[Encoding]:
        """What the library knows of each text; offsets, which cost time, only where they are needed."""
        encode = self._backend.encode_batch if self._token_bytes is None else self._backend.encode_batch_fast
        encodings: list[Encoding] = encode(list(texts), add_special_tokens=False)
        return encodings

    def _encoded(self, texts: Sequence[str], encodings: list[Encoding]) -> Encoded:
        lossy = self._lossy(texts, encodings) if self._token_bytes is None else None
        encoded = Encoded(texts, encodings, self._token_bytes, lossy)
        special = np.isin(encoded.ids, [self.pad_id, self.begin_id, self.end_id])
        if special.any():
            token = self._backend.id_to_token(int(encoded.ids[special][0]))
            raise SourceError(
                f"tokenizer.name: {self.name} takes the text {token!r} for a special token even where it is "
                f"told not to; choose another tokenizer, such as {TRAINED}"
            )
        return encoded

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """The ids of one text (tokens,), without special ones."""
        return self.encode_batch([text]).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special ones left out."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, rows: Iterable[Iterable[int]]) -> list[str]:
        """The texts of several rows of ids, which need not be equally long; special ones are left out.

        Bytes that are no whole character, at the edge of a row, come out as U+FFFD.
        """
        special = {self.pad_id, self.begin_id, self.end_id}
        kept = [[int(token) for token in row if token not in special] for row in rows]
        texts: list[str] = self._backend.decode_batch(kept, skip_special_tokens=True)
        return texts

    @cached_property
    def _token_bytes(self) -> npt.NDArray[np.int64] | None:
        return bytes_of_tokens(self._backend)

    def _lossy(self, texts: Sequence[str], encodings: list[Encoding]) -> BoolArray:
        """Which texts come back changed (case, accents, unknown characters); white space is no loss."""
        rows = [encoding.ids for encoding in encodings]
        pairs = zip(texts, self._backend.decode_batch(rows, skip_special_tokens=True), strict=True)
        changed = ("".join(text.split()) != "".join(back.split()) for text, back in pairs)
        return np.fromiter(changed, np.bool_, len(texts))


def num_rows(backend: Backend) -> int:
    """How many rows an embedding table needs: ids can have gaps, so it is not the number of tokens."""
    return 1 + max(backend.get_vocab(with_added_tokens=True).values())


def bytes_of_tokens(backend: Backend) -> npt.NDArray[np.int64] | None:
    """The bytes of text that each id stands for, or None where a token alone does not say that.

    It does where the tokenizer is byte-level and changes nothing before: then each character of a
    token's name is one byte of text.
    """
    state = json.loads(backend.to_str())
    steps = state["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    exact = (
        state["normalizer"] is None
        and state["model"]["type"] == "BPE"
        and any(step.get("type") == "ByteLevel" for step in steps)
        and not any(step.get("add_prefix_space") for step in steps)
    )
    if not exact:
        return None
    added = {token["content"] for token in state["added_tokens"]}
    lengths = np.zeros(num_rows(backend), np.int64)
    for token, number in backend.get_vocab(with_added_tokens=True).items():
        lengths[number] = utf8_size(token) if token in added else len(token)
    return lengths


def make_tokenizer(
    documents: Path | str, corpus_config: CorpusConfig, config: TokenizerConfig, folder: Path
) -> dict[str, float]:
    """Writes the tokenizer that `config` asks for into `folder` and returns figures about it.

    Trained on the train split alone, or loaded by name: then the documents are not read. Equal documents
    give equal bytes. Raises DocumentError, or SourceError where a named one cannot be loaded.
    """
    figures: dict[str, float] = {}
    if config.name == TRAINED:
        corpus = Corpus(documents, corpus_config)
        backend, special = train(_counted_texts(corpus, figures), config.vocab_size)
    else:
        backend, special = load(config.name)
    with whole_folder(folder) as whole:
        save(whole, backend, special, _short_name(config.name))
    return {"vocabulary": num_rows(backend), **figures}


def _counted_texts(corpus: Corpus, figures: dict[str, float]) -> Iterator[str]:
    figures.update(train_documents=0, train_bytes=0)
    for document in corpus.documents("train"):
        figures["train_documents"] += 1
        figures["train_bytes"] += utf8_size(document.text)
        yield document.text


def train(texts: Iterable[str], vocab_size: int) -> tuple[Backend, SpecialIds]:
    """A byte-level BPE of at most `vocab_size` tokens with ids 0, 1, 2 for pad, begin and end."""
    backend = Backend(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=sorted(ByteLevel.alphabet()),  # all bytes, so that no text is unknown
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend, SpecialIds(0, 1, 2)


def load(name: str) -> tuple[Backend, SpecialIds]:
    """The fast tokenizer of that folder or hub name and its special ids; missing ones are added.

    begin is its classifier or begin-of-text token, end its separator or end-of-text token; where there is
    one only, it is both. pad must differ from both, because labels that are pad are not learned.
    """
    from transformers import AutoTokenizer

    local = Path(name).is_dir()
    try:
        loaded = AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SourceError(_not_loaded(name, local, error)) from error
    if not getattr(loaded, "is_fast", False):
        raise SourceError(
            f"tokenizer.name: {name} has no fast version (tokenizer.json); choose one that has, or {TRAINED}"
        )
    backend = Backend.from_str(loaded.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    begin = _first(loaded.cls_token, loaded.bos_token, loaded.eos_token)
    end = _first(loaded.sep_token, loaded.eos_token, begin)
    pad = loaded.pad_token
    return backend, _with_special(backend, pad, begin, end)


def _with_special(backend: Backend, pad: str | None, begin: str | None, end: str | None) -> SpecialIds:
    begin = begin or end or BEGIN
    end = end or END
    pad = pad if pad is not None and pad not in (begin, end) else PAD
    # Adding one that exists changes nothing but that it counts as special from now on.
    tokens = (pad, begin, end)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    vocabulary = backend.get_vocab(with_added_tokens=True)
    return SpecialIds(*(vocabulary[token] for token in tokens))


def _first(*tokens: str | None) -> str | None:
    return next((token for token in tokens if token is not None), None)


def _not_loaded(name: str, local: bool, error: BaseException) -> str:
    reason = shorten(str(error), width=200, placeholder="...")
    place = f"the folder {Path(name).resolve()}" if local else "the Hugging Face hub and its cache"
    tried = place if local else f"{place} (there is no folder {name})"
    return (
        f"tokenizer.name: {name} cannot be loaded, tried {tried}: {reason}; give {TRAINED}, a folder with a "
        "tokenizer.json, or a hub name that is cached (fetch it once with a network: `hf download NAME`)"
    )


def _short_name(name: str) -> str:
    return Path(name).resolve().name if Path(name).is_dir() else name.rsplit("/", 1)[-1]


def save(folder: Path, backend: Backend, special: SpecialIds, name: str) -> None:
    """Writes the tokenizer artifact into `folder`."""
    with ArtifactWriter(folder, "tokenizer") as writer:
        backend.save(str(folder / FILE))
        writer.add_file(FILE)
        writer.facts.update(name=name, pad_id=special.pad, begin_id=special.begin, end_id=special.end)
        writer.facts["vocab_size"] = num_rows(backend)
