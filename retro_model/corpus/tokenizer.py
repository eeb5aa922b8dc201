"""Encode and decode with a tokenizer saved in one file; load any fast tokenizer of transformers.

    tokenizer = Tokenizer.open(Path("data/tokenizer"))       # written by tokenizer_training.make_tokenizer
    encoded = tokenizer.encode_batch(["two", "texts"])       # ids of both, concatenated
    tokenizer.decode(encoded.ids[: encoded.starts[1]])       # "two"

Encoding never returns a special id: text that spells a special token is encoded like any other. Only the chunking
inserts special tokens.
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
from tokenizers.decoders import WordPiece as WordPieceDecoder

from retro_model.core.arrays import BoolArray
from retro_model.core.artifacts import Artifact, ArtifactWriter
from retro_model.core.errors import ConfigError, SourceError
from retro_model.core.prefetch import prefetch

FILE = "tokenizer.json"
TRAINED = "bpe"
PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"


@dataclass(frozen=True)
class SpecialIds:
    """The ids of padding, of a document's begin and of its end."""

    pad: int
    begin: int
    end: int


class Encoded:
    """Concatenated token ids of several texts: text i is `ids[starts[i] : starts[i + 1]]`.

    `sizes` (texts,) are the texts' UTF-8 bytes; `lossy` (texts,) marks texts that decoding does not restore.
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
        # Encodings take most of a batch's memory. Keep them only if `bytes_covered` needs their offsets.
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
        """Return how many UTF-8 bytes of text `texts[i]` its first `counts[i]` tokens cover.

        All of the text's bytes if `counts[i]` is all of its tokens or more. A token that holds a part of a character
        counts exactly with a byte-level tokenizer, and as the whole character otherwise. `texts` must be sorted, and
        so must be the counts of each text.
        """
        whole = counts >= np.diff(self.starts)[texts]
        covered = self.sizes[texts]
        if self._covered is not None:
            first = self.starts[texts]
            exact = self._covered[np.minimum(first + counts, len(self.ids))] - self._covered[first]
            return np.where(whole, covered, np.minimum(exact, covered))
        text_before, end_before, bytes_before = -1, 0, 0
        covered[~whole & (counts == 0)] = 0
        for position in np.flatnonzero(~whole & (counts > 0)):
            text, last = int(texts[position]), int(counts[position]) - 1
            if text != text_before:
                text_before, end_before, bytes_before = text, 0, 0
            span = self._encodings[text].token_to_chars(last)
            end = max(end_before, span[1] if span else 0)
            bytes_before += utf8_size(self._texts[text][end_before:end])
            end_before = end
            covered[position] = bytes_before
        return covered


def utf8_size(text: str) -> int:
    """Return how many bytes `text` takes in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def check_unicode(texts: Sequence[str]) -> None:
    """Raise ConfigError, with the place, if a text has a lone surrogate: it has no UTF-8 and no tokenizer takes it."""
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"text {number}: found the lone surrogate {text[error.start]!a} at character {error.start}, expected "
                "valid Unicode; decode bytes with errors='replace', for example"
            ) from error


class Tokenizer:
    """Converts text to ids and back; loaded from a tokenizer artifact alone."""

    def __init__(self, backend: Backend, special: SpecialIds, name: str, folder: Path, fingerprint: str) -> None:
        self.pad_id, self.begin_id, self.end_id = special.pad, special.begin, special.end
        self.name, self.folder, self.fingerprint = name, folder, fingerprint
        self.vocab_size = num_rows(backend)
        backend.encode_special_tokens = True  # text that spells a special token stays text
        self.continuation_prefix = ""  # starts the decoded text of ids that begin within a word
        if isinstance(backend.decoder, WordPieceDecoder):
            self.continuation_prefix = backend.decoder.prefix
            # The clean-up would change the text, "do not" into "don't" for example.
            backend.decoder = WordPieceDecoder(cleanup=False)
        self._backend = backend

    @classmethod
    def open(cls, folder: Path | str) -> "Tokenizer":
        """Open the tokenizer in `folder`; raises the errors of `Artifact.open`."""
        artifact = Artifact.open(folder, "tokenizer")
        facts = artifact.facts
        special = SpecialIds(facts["pad_id"], facts["begin_id"], facts["end_id"])
        backend = Backend.from_file(str(artifact.folder / FILE))
        return cls(backend, special, facts["name"], artifact.folder, artifact.fingerprint)

    def facts(self) -> dict[str, int]:
        """Return the facts that an artifact with token rows records: special ids and vocabulary size."""
        ids = {"pad_id": self.pad_id, "begin_id": self.begin_id, "end_id": self.end_id}
        return {**ids, "vocab_size": self.vocab_size}

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Encode each text without special ids, in parallel on all cores.

        Raises ConfigError for a text with a lone surrogate, which is not valid Unicode, and SourceError if the
        tokenizer turns a part of a text into a special token, which could end a document.
        """
        return self._build_encoded(texts, self._encodings(texts))

    def encode_batches(self, batches: Iterable[Sequence[str]]) -> Iterator[Encoded]:
        """Yield `encode_batch` of each batch; encode the next ones in the background."""
        return starmap(self._build_encoded, prefetch((texts, self._encodings(texts)) for texts in batches))

    def _encodings(self, texts: Sequence[str]) -> list[Encoding]:
        """Encode with the tokenizers library; compute the costly offsets only if `bytes_covered` needs them."""
        encode = self._backend.encode_batch if self._token_bytes is None else self._backend.encode_batch_fast
        try:
            encodings: list[Encoding] = encode(list(texts), add_special_tokens=False)
        except TypeError:
            check_unicode(texts)
            raise
        return encodings

    def _build_encoded(self, texts: Sequence[str], encodings: list[Encoding]) -> Encoded:
        lossy = self._find_lossy(texts, encodings) if self._token_bytes is None else None
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
        """Return the ids of one text (tokens,), without special ids; raises the errors of `encode_batch`."""
        return self.encode_batch([text]).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, without special ids."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, rows: Iterable[Iterable[int]]) -> list[str]:
        """Return the texts of several rows of ids, which may differ in length, without special ids.

        Bytes of an incomplete character, at the edge of a row, become U+FFFD.
        """
        special = {self.pad_id, self.begin_id, self.end_id}
        kept = [[int(token) for token in row if token not in special] for row in rows]
        texts: list[str] = self._backend.decode_batch(kept, skip_special_tokens=True)
        return texts

    @cached_property
    def _token_bytes(self) -> npt.NDArray[np.int64] | None:
        return bytes_of_tokens(self._backend)

    def _find_lossy(self, texts: Sequence[str], encodings: list[Encoding]) -> BoolArray:
        """Return which texts decoding changes (case, accents, unknown characters); ignores white space."""
        rows = [encoding.ids for encoding in encodings]
        pairs = zip(texts, self._backend.decode_batch(rows, skip_special_tokens=True), strict=True)
        changed = ("".join(text.split()) != "".join(back.split()) for text, back in pairs)
        return np.fromiter(changed, np.bool_, len(texts))


def num_rows(backend: Backend) -> int:
    """Return how many rows an embedding table needs: the largest id + 1, because ids can have gaps."""
    return 1 + max(backend.get_vocab(with_added_tokens=True).values())


def bytes_of_tokens(backend: Backend) -> npt.NDArray[np.int64] | None:
    """Return how many bytes of text each id stands for (ids,), or None if a token alone does not determine that.

    It does if the tokenizer is a byte-level BPE and does not change the text first: then each character of a token
    is one byte of text.
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


def load(name: str, begin: str | None = None, end: str | None = None) -> tuple[Backend, SpecialIds]:
    """Load the fast tokenizer of a folder or hub name and its special ids; add missing special tokens.

    By default begin is its [CLS] or begin-of-text token, end its [SEP] or end-of-text token; if it has only one of
    them, that is both. pad must differ from both, because labels that are pad do not count in the loss.

    Raises SourceError if it cannot be loaded or has no fast version, ConfigError if `begin` or `end` is no token of it.
    """
    from transformers import AutoTokenizer

    local = Path(name).is_dir()
    try:
        loaded = AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SourceError(_load_error_message(name, local, error)) from error
    if not getattr(loaded, "is_fast", False):
        raise SourceError(
            f"tokenizer.name: {name} has no fast version (tokenizer.json); choose one that has, or {TRAINED}"
        )
    backend = Backend.from_str(loaded.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    for key, token in (("begin", begin), ("end", end)):
        if token is not None and backend.token_to_id(token) is None:
            raise ConfigError(f"tokenizer.{key}: found {token!r}, expected a token of {name}, or null")
    begin = begin or _first_token(loaded.cls_token, loaded.bos_token, loaded.eos_token)
    end = end or _first_token(loaded.sep_token, loaded.eos_token, begin)
    pad = loaded.pad_token
    return backend, _add_special_tokens(backend, pad, begin, end)


def _add_special_tokens(backend: Backend, pad: str | None, begin: str | None, end: str | None) -> SpecialIds:
    begin = begin or end or BEGIN
    end = end or END
    pad = pad if pad is not None and pad not in (begin, end) else PAD
    # Adding a token that exists only marks it as special.
    tokens = (pad, begin, end)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    vocabulary = backend.get_vocab(with_added_tokens=True)
    return SpecialIds(*(vocabulary[token] for token in tokens))


def _first_token(*tokens: str | None) -> str | None:
    return next((token for token in tokens if token is not None), None)


def _load_error_message(name: str, local: bool, error: BaseException) -> str:
    reason = shorten(str(error), width=200, placeholder="...")
    place = f"the folder {Path(name).resolve()}" if local else "the Hugging Face hub and its cache"
    tried = place if local else f"{place} (there is no folder {name})"
    return (
        f"tokenizer.name: {name} cannot be loaded, tried {tried}: {reason}; give {TRAINED}, a folder with a "
        "tokenizer.json, or a hub name that is cached (fetch it once with a network: `hf download NAME`); with "
        f"{TRAINED} and retrofit.base, it is that model's"
    )


def save(folder: Path, backend: Backend, special: SpecialIds, name: str) -> None:
    """Write the tokenizer artifact into `folder`."""
    with ArtifactWriter(folder, "tokenizer") as writer:
        backend.save(str(folder / FILE))
        writer.add_file(FILE)
        writer.facts.update(name=name, pad_id=special.pad, begin_id=special.begin, end_id=special.end)
        writer.facts["vocab_size"] = num_rows(backend)
