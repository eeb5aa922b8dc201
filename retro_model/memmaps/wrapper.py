"""Train a model on a folder of text and generate with it, in a few lines of a script.

    retro = RETRO(chunk_size=64, max_seq_len=2048, ...)
    wrapper = TrainingWrapper(retro=retro, knn=2, chunk_size=64, documents_path="./texts")
    for seq, retrieved in wrapper.get_dataloader(batch_size=2, shuffle=True):
        loss = retro(seq, retrieved, return_loss=True)
        ...
    ids = wrapper.generate(prompt)

Chunker, embedder, index, search, optimizer and sampler are those of the pipeline; the data are the raw files of
retro_model.retrieval. A JSON file records the counts, the digest of the text, the settings, the tokenizer and the
digests of the files. The files are reused while these are the same.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from retro_model.core.artifacts import file_digest, one_at_a_time, open_raw, write_json
from retro_model.core.errors import ConfigError
from retro_model.core.rows import NO_ROW
from retro_model.corpus.files import matching_files
from retro_model.corpus.tokenizer import Tokenizer
from retro_model.inference.generation import generate
from retro_model.inference.sampling import Filter, top_k
from retro_model.memmaps.chunks import text_folder_to_chunks_
from retro_model.memmaps.encoder import AnyPath, open_tokenizer
from retro_model.memmaps.files import RETRODataset, check_counts, neighbor_tokens
from retro_model.memmaps.search import SearchableChunks, chunks_to_precalculated_knn_
from retro_model.network.model import RETRO
from retro_model.training.optimizer import make_optimizer

logger = logging.getLogger(__name__)

VARIABLE = "REPROCESS"
VERSION = 1  # of the JSON file's format


class TrainingWrapper:
    """Prepares a folder of text for training `retro`, and retrieves from it for generation.

    documents_path: the folder. Each file that matches `glob` is a document, or several documents if
        `documents_separator` is given, the line between them.
    knn: how many neighbors to find for each chunk.
    knn_extra_neighbors: changes speed only.
    faiss_index_filename, encoder, number_type, device (of the encoder) and index_kwargs: see
        `retro_model.retrieval.chunks_to_index_and_embed`; faiss_index_filename is its index_file.

    Sequences are `retro.config.max_seq_len` tokens long.

    Finished work is reused. A change of the text, the settings or the encoder repeats only the work that depends
    on it; `REPROCESS=1` in the environment repeats all of it.

    Raises ConfigError if the model does not fit the tokenizer or the arguments, and the errors of
    retro_model.retrieval's functions.
    """

    def __init__(
        self,
        retro: RETRO,
        chunk_size: int,
        documents_path: AnyPath,
        knn: int,
        *,
        glob: str = "**/*.txt",
        chunks_memmap_path: AnyPath = "./train.chunks.dat",
        seqs_memmap_path: AnyPath = "./train.seq.dat",
        doc_ids_memmap_path: AnyPath = "./train.doc_ids.dat",
        max_chunks: int = 1_000_000,
        max_seqs: int = 100_000,
        knn_extra_neighbors: int = 100,
        processed_stats_json_path: AnyPath = "./processed-stats.json",
        faiss_index_filename: AnyPath = "knn.index",
        documents_separator: str | None = None,
        encoder: AnyPath | None = None,
        number_type: str = "float32",
        device: str = "auto",
        **index_kwargs: Any,
    ) -> None:
        check_counts(chunk_size=chunk_size, knn=knn, max_chunks=max_chunks, max_seqs=max_seqs)
        self.retro, self.chunk_size, self.knn = retro, chunk_size, knn
        self.tokenizer = open_tokenizer(encoder)
        _check_model(retro, chunk_size, self.tokenizer)
        force = _reprocess()
        files = {
            "chunks_memmap_path": Path(chunks_memmap_path),
            "seqs_memmap_path": Path(seqs_memmap_path),
            "doc_ids_memmap_path": Path(doc_ids_memmap_path),
        }
        settings = {
            "chunk_size": chunk_size,
            "seq_len": retro.config.max_seq_len,
            "glob": glob,
            "documents_separator": documents_separator,
        }
        text = _ChunkedText(Path(documents_path), files, Path(processed_stats_json_path), settings, encoder)
        stats = text.find_or_make(self.tokenizer, max_chunks, max_seqs, force)
        self.stats = {name: stats[name] for name in ("chunks", "docs", "seqs")}
        search: dict[str, Any] = {
            "num_chunks": stats["chunks"],
            "chunk_size": chunk_size,
            "chunk_memmap_path": files["chunks_memmap_path"],
            "index_file": faiss_index_filename,
            "encoder": encoder,
            "number_type": number_type,
            "device": device,
            **index_kwargs,
        }
        neighbors_path, self.faiss_index = chunks_to_precalculated_knn_(
            num_nearest_neighbors=knn,
            doc_ids_memmap_path=files["doc_ids_memmap_path"],
            num_extra_neighbors=knn_extra_neighbors,
            force_reprocess=force,
            **search,
        )
        self._open(SearchableChunks.open(**search), files, neighbors_path)

    def _open(self, chunks: SearchableChunks, files: Mapping[str, Path], neighbors_path: Path) -> None:
        """Opens the files as the training data set and as the database that generation searches."""
        self._chunks = chunks
        documents = open_raw(files["doc_ids_memmap_path"], (self.stats["chunks"],))
        self._database = chunks.database(documents)
        self.dataset = RETRODataset(
            num_chunks=self.stats["chunks"],
            chunk_size=self.chunk_size,
            seq_len=self.retro.config.max_seq_len,
            num_sequences=self.stats["seqs"],
            num_neighbors=self.knn,
            chunk_memmap_path=files["chunks_memmap_path"],
            chunk_nn_memmap_path=neighbors_path,
            seq_memmap_path=files["seqs_memmap_path"],
            eos_id=self.tokenizer.end_id,
            pad_id=self.tokenizer.pad_id,
        )

    def get_dataloader(self, **kwargs: Any) -> "DataLoader[tuple[Tensor, Tensor]]":
        """A torch.utils.data.DataLoader over the training sequences; `kwargs` go to its constructor.

        A batch is `seq` (b, max_seq_len + 1) and `retrieved` (b, chunks, knn, 2 * chunk_size), int64.
        """
        return DataLoader(self.dataset, **kwargs)

    def get_optimizer(self, lr: float = 3e-4, wd: float = 1e-1) -> torch.optim.AdamW:
        """AdamW over the model's trainable weights; decays only those with two or more dimensions."""
        return make_optimizer(self.retro, lr, wd)

    def retrieve(self, token_chunks: Tensor, knn: int | None = None) -> Tensor:
        """The text's nearest chunks, with continuations, for chunks of token ids (n, chunk_size).

        Returns ids (n, knn, 2 * chunk_size) on the device of `token_chunks`, nearest first; all padding where
        the text has fewer than `knn` chunks.
        """
        rows = token_chunks.cpu().numpy()
        known = np.where(
            rows < self.tokenizer.vocab_size, rows, self.tokenizer.pad_id
        )  # ids outside the vocabulary have no text
        vectors = self._chunks.embedder.embed(known)
        no_document = np.full(len(vectors), NO_ROW)  # exclude no document
        ids, _ = self._database.nearest(vectors, no_document, self.knn if knn is None else knn)
        tokenizer = self.tokenizer
        found = neighbor_tokens(self._chunks.rows, ids, eos_id=tokenizer.end_id, pad_id=tokenizer.pad_id)
        return torch.from_numpy(found).to(token_chunks.device)

    def generate(
        self,
        start: Tensor | None = None,
        retrieved: Tensor | None = None,
        filter_fn: Filter = top_k,
        filter_thres: float = 0.9,
        temperature: float = 1.0,
        *,
        max_new_tokens: int | None = None,
        knn: int | None = None,
        seed: int | None = None,
        return_neighbors: bool = False,
    ) -> Tensor | tuple[Tensor, list[dict[int, Tensor]]]:
        """Continues prompts: returns ids (b, <= max_seq_len), prompts included, padded on the right.

        start: prompts (b, p); None: one row that holds only the begin token. A row stops at the end token.
        retrieved: neighbors for the prompts' complete chunks, (b, p // chunk_size, neighbors, tokens) or without
            the third axis; None: search for them. Later chunks are always searched for.
        knn: how many neighbors to search for; None: as in training, 0: none.
        filter_thres: 0.9 keeps the top 10% of the vocabulary (`top_k`).
        temperature: 0 always takes the likeliest token.
        seed: equal seeds give equal texts.
        return_neighbors: see `retro_model.inference.generation.generate`.
        """
        device = self.retro.embedding.weight.device
        if start is None:
            start = torch.tensor([[self.tokenizer.begin_id]])
        return generate(
            self.retro,
            start.to(device),
            retrieve=self._make_retrieve(start, retrieved, self.knn if knn is None else knn),
            max_new_tokens=max_new_tokens,
            filter_fn=self._mask_unknown_tokens(filter_fn),
            filter_thres=filter_thres,
            temperature=temperature,
            eos_id=self.tokenizer.end_id,
            seed=seed,
            return_neighbors=return_neighbors,
        )

    def _mask_unknown_tokens(self, filter_fn: Filter) -> Filter:
        """`filter_fn`, extended to never sample ids that the model has but the tokenizer lacks."""
        vocab_size, more = self.tokenizer.vocab_size, self.retro.config.num_tokens - self.tokenizer.vocab_size
        if not more:
            return filter_fn
        return lambda logits, thres: F.pad(filter_fn(logits[..., :vocab_size], thres), (0, more), value=-torch.inf)

    def _make_retrieve(self, start: Tensor, retrieved: Tensor | None, knn: int) -> Any:
        """The retrieve function for `generate`; None without retrieval. The first call returns a given `retrieved`."""
        if knn < 0:
            raise ConfigError(f"knn: found {knn}, expected >= 0")
        given = []
        if retrieved is not None:
            expected = (len(start), start.shape[1] // self.chunk_size)
            if retrieved.dim() not in (3, 4) or tuple(retrieved.shape[:2]) != expected:
                raise ConfigError(
                    f"retrieved: found {tuple(retrieved.shape)}, expected ({expected[0]}, {expected[1]}, neighbors, "
                    f"tokens) for prompts {tuple(start.shape)} in chunks of {self.chunk_size}"
                )
            retrieved = retrieved if retrieved.dim() == 4 else retrieved[:, :, None]
            if expected[1]:
                given.append(retrieved.flatten(0, 1))  # the first call asks for all prompts' chunks, row by row
        if not given and not knn:
            return None

        def retrieve(token_chunks: Tensor) -> Tensor:
            if given:
                return given.pop()
            if knn:
                return self.retrieve(token_chunks, knn)
            return token_chunks.new_full((len(token_chunks), 1, 2 * self.chunk_size), self.tokenizer.pad_id)

        return retrieve


def _reprocess() -> bool:
    """Whether REPROCESS is set. Raises ConfigError for any value but 0, 1, true and false."""
    value = os.environ.get(VARIABLE, "").lower()
    if value not in ("", "0", "1", "false", "true"):
        raise ConfigError(f"{VARIABLE} in the environment: found {value!r}, expected 1 or 0")
    return value in ("1", "true")


def _check_model(retro: RETRO, chunk_size: int, tokenizer: Tokenizer) -> None:
    """Raises ConfigError unless the model has this chunk size, all of the tokenizer's ids and its padding id."""
    config = retro.config
    if config.chunk_size != chunk_size:
        raise ConfigError(f"chunk_size: found {chunk_size}, expected {config.chunk_size}, the model's")
    if config.num_tokens < tokenizer.vocab_size:
        raise ConfigError(
            f"retro: found num_tokens={config.num_tokens}, expected >= {tokenizer.vocab_size}, the vocabulary of "
            f"{tokenizer.name}"
        )
    if config.pad_id != tokenizer.pad_id:
        raise ConfigError(f"retro: found pad_id={config.pad_id}, expected {tokenizer.pad_id}, that of {tokenizer.name}")


@dataclass(frozen=True)
class _ChunkedText:
    """The chunk files of a folder of text, and the JSON file that says what they were made from."""

    folder: Path
    files: Mapping[str, Path]  # by the arguments of text_folder_to_chunks_
    stats_path: Path
    settings: Mapping[str, Any]  # the arguments that change what is in the files
    encoder: AnyPath | None

    def find_or_make(self, tokenizer: Tokenizer, max_chunks: int, max_seqs: int, force: bool) -> dict[str, Any]:
        """The counts of chunks, documents and sequences; with `force` the files are always made.

        Of several processes that need the same files, one makes them and the others wait.
        """
        text = _text_digest(self.folder, self.settings["glob"])
        made_from = {"text": text, "tokenizer": tokenizer.fingerprint, **self.settings}

        def find() -> dict[str, Any] | None:
            stats = None if force else _reusable_stats(self.stats_path, made_from, self.files)
            return stats if stats and stats["chunks"] <= max_chunks and stats["seqs"] <= max_seqs else None

        stats = find()
        if stats is None:
            with one_at_a_time(self.stats_path):
                stats = find() or self._make(made_from, max_chunks, max_seqs)  # another process may have finished
        return stats

    def _make(self, made_from: Mapping[str, Any], max_chunks: int, max_seqs: int) -> dict[str, Any]:
        """Writes the chunk files, and then the JSON file."""
        arguments: dict[str, Any] = {**self.settings, **self.files, "max_chunks": max_chunks, "max_seqs": max_seqs}
        stats: dict[str, Any] = text_folder_to_chunks_(folder=self.folder, encoder=self.encoder, **arguments)
        digests = {name: file_digest(path) for name, path in self.files.items()}
        write_json(self.stats_path, {**stats, "version": VERSION, "made_from": made_from, "sha256": digests})
        return stats


def _text_digest(folder: Path, glob: str) -> str:
    """A digest of the paths and bytes of all files that match `glob`."""
    listed = [(name, file_digest(file)) for file, name in matching_files(folder, glob).files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _reusable_stats(stats_path: Path, made_from: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Any] | None:
    """The content of the JSON file if `files` are intact and were made from `made_from`, else None."""
    try:
        stats = json.loads(stats_path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(stats, dict) or stats.get("version") != VERSION or stats.get("made_from") != made_from:
        return None
    if any(not path.is_file() or stats["sha256"].get(name) != file_digest(path) for name, path in files.items()):
        return None
    logger.info(f"chunks: {files['chunks_memmap_path']} is made from the same, and is used again")
    return stats
