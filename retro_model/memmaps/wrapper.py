"""From a folder of text to a model that writes, in a few lines of a script.

    retro = RETRO(chunk_size=64, max_seq_len=2048, ...)
    wrapper = TrainingWrapper(retro=retro, knn=2, chunk_size=64, documents_path="./texts")
    for seq, retrieved in wrapper.get_dataloader(batch_size=2, shuffle=True):
        loss = retro(seq, retrieved, return_loss=True)
        ...
    ids = wrapper.generate(prompt)

Chunker, embedder, index, search, optimizer and sampler are those of the pipeline, over the raw files of
retro_model.retrieval. The counts lie in a JSON file beside what they were made from: the digest of the
text, the settings, the tokenizer and the digests of the files. All is used again while that is the same.
"""

import hashlib
import json
import os
from collections.abc import Mapping
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
from retro_model.corpus.readers import matching_files
from retro_model.corpus.tokenizer import Tokenizer
from retro_model.inference.generation import Filter, generate, top_k
from retro_model.memmaps.chunks import text_folder_to_chunks_
from retro_model.memmaps.encoder import AnyPath, open_tokenizer
from retro_model.memmaps.files import RETRODataset, check_counts, neighbor_tokens
from retro_model.memmaps.search import SearchableChunks, chunks_to_precalculated_knn_
from retro_model.network.model import RETRO
from retro_model.training.optimizer import make_optimizer

VARIABLE = "REPROCESS"
VERSION = 1  # of the JSON file


class TrainingWrapper:
    """All that training `retro` on a folder of text needs, and what writing with it needs afterwards.

    `documents_path` holds the text: each file that matches `glob` is a document, or several, where
    `documents_separator` is the line between them. `knn` neighbors are found for each chunk. Sequences are
    as long as the model reads, `retro.config.max_seq_len`. `knn_extra_neighbors` changes speed only.
    An index file that is a bare name gets the chunk file's stem in front and lies beside it.

    `encoder`, `number_type`, `device` (of the encoder) and `index_kwargs` are those of
    `retro_model.retrieval.chunks_to_index_and_embed`.

    Work is done once: text, settings or an encoder that change do what depends on them again, and
    `REPROCESS=1` in the environment does all of it again.

    Raises ConfigError where the model does not fit the tokenizer or the arguments, and what the functions
    of retro_model.retrieval raise.
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
        files: dict[str, Any] = {
            "chunks_memmap_path": Path(chunks_memmap_path),
            "seqs_memmap_path": Path(seqs_memmap_path),
            "doc_ids_memmap_path": Path(doc_ids_memmap_path),
        }
        settings: dict[str, Any] = {
            "chunk_size": chunk_size,
            "seq_len": retro.config.max_seq_len,
            "glob": glob,
            "documents_separator": documents_separator,
        }
        stats_path = Path(processed_stats_json_path)
        made_from = {
            "text": _text_digest(Path(documents_path), glob),
            "tokenizer": self.tokenizer.fingerprint,
            **settings,
        }

        def found() -> dict[str, Any] | None:
            stats = None if force else _found(stats_path, made_from, files)
            return stats if stats and stats["chunks"] <= max_chunks and stats["seqs"] <= max_seqs else None

        def make() -> dict[str, Any]:
            stats = text_folder_to_chunks_(
                folder=documents_path,
                max_chunks=max_chunks,
                max_seqs=max_seqs,
                encoder=encoder,
                **settings,
                **files,
            )
            digests = {name: file_digest(path) for name, path in files.items()}
            write_json(stats_path, {**stats, "version": VERSION, "made_from": made_from, "sha256": digests})
            return stats

        stats = found()
        if stats is None:
            with one_at_a_time(stats_path):
                stats = found() or make()  # another process may have made it meanwhile
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
        self._chunks = SearchableChunks.open(**search)
        documents = open_raw(files["doc_ids_memmap_path"], (stats["chunks"],))
        self._database = self._chunks.database(documents)
        self.dataset = RETRODataset(
            num_chunks=stats["chunks"],
            chunk_size=chunk_size,
            seq_len=retro.config.max_seq_len,
            num_sequences=stats["seqs"],
            num_neighbors=knn,
            chunk_memmap_path=files["chunks_memmap_path"],
            chunk_nn_memmap_path=neighbors_path,
            seq_memmap_path=files["seqs_memmap_path"],
            eos_id=self.tokenizer.end_id,
            pad_id=self.tokenizer.pad_id,
        )

    def get_dataloader(self, **kwargs: Any) -> "DataLoader[tuple[Tensor, Tensor]]":
        """The sequences as torch.utils.data.DataLoader with these arguments gives them.

        A batch is `seq` (b, max_seq_len + 1) and `retrieved` (b, chunks, knn, 2 * chunk_size), int64.
        """
        return DataLoader(self.dataset, **kwargs)

    def get_optimizer(self, lr: float = 3e-4, wd: float = 1e-1) -> torch.optim.AdamW:
        """AdamW over the model's weights that are not frozen; decay on those of two or more dimensions only."""
        return make_optimizer(self.retro, lr, wd)

    def retrieve(self, token_chunks: Tensor, knn: int | None = None) -> Tensor:
        """The nearest chunks of the text for chunks of ids (n, chunk_size): (n, knn, 2 * chunk_size).

        Each with its continuation, nearest first, padding where the text holds no more; on the device of
        `token_chunks`.
        """
        rows = token_chunks.cpu().numpy()
        known = np.where(rows < self.tokenizer.vocab_size, rows, self.tokenizer.pad_id)  # the others are no text
        vectors = self._chunks.embedder.embed(known)
        anyone = np.full(len(vectors), NO_ROW)
        ids, _ = self._database.nearest(vectors, anyone, self.knn if knn is None else knn)
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
        """Prompts and what the model writes after them: ids (b, <= max_seq_len), filled up with padding.

        start: prompts (b, p); without, one text from its beginning. A row ends with the end token.
        retrieved: what to retrieve for the prompts' whole chunks, (b, p // chunk_size, neighbors, tokens) or
            without the third axis, instead of searching for it. At every chunk boundary after that it is
            searched for: `knn` neighbors, as many as for training unless told, 0 for none.
        filter_thres: 0.9 keeps the top 10% of the vocabulary (`top_k`). temperature: 0 takes the likeliest.
        seed: equal seeds give equal texts. return_neighbors: see `retro_model.inference.generation.generate`.
        """
        device = self.retro.embedding.weight.device
        if start is None:
            start = torch.tensor([[self.tokenizer.begin_id]])
        return generate(
            self.retro,
            start.to(device),
            retrieve=self._search(start, retrieved, self.knn if knn is None else knn),
            max_new_tokens=max_new_tokens,
            filter_fn=self._of_the_vocabulary(filter_fn),
            filter_thres=filter_thres,
            temperature=temperature,
            eos_id=self.tokenizer.end_id,
            seed=seed,
            return_neighbors=return_neighbors,
        )

    def _of_the_vocabulary(self, filter_fn: Filter) -> Filter:
        """The filter for a model that has more tokens than the tokenizer: it never lets those be drawn."""
        vocab_size, more = self.tokenizer.vocab_size, self.retro.config.num_tokens - self.tokenizer.vocab_size
        if not more:
            return filter_fn
        return lambda logits, thres: F.pad(filter_fn(logits[..., :vocab_size], thres), (0, more), value=-torch.inf)

    def _search(self, start: Tensor, retrieved: Tensor | None, knn: int) -> Any:
        """What `generate` calls: the first answer is `retrieved`, where it is given."""
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
                given.append(retrieved.flatten(0, 1))  # prompts are searched for all at once, row after row
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
    """Whether the environment asks for all work to be done again."""
    value = os.environ.get(VARIABLE, "").lower()
    if value not in ("", "0", "1", "false", "true"):
        raise ConfigError(f"{VARIABLE} in the environment: found {value!r}, expected 1 or 0")
    return value in ("1", "true")


def _check_model(retro: RETRO, chunk_size: int, tokenizer: Tokenizer) -> None:
    """Raises ConfigError unless the model reads such chunks and all of the tokenizer's ids."""
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


def _text_digest(folder: Path, glob: str) -> str:
    """Stands for the paths and bytes of all files that match."""
    files = matching_files(folder, glob)
    listed = [(file.relative_to(folder).as_posix(), file_digest(file)) for file in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _found(stats_path: Path, made_from: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Any] | None:
    """What the JSON file holds, if the files are there, whole, and made from just this; else None: make them."""
    try:
        stats = json.loads(stats_path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(stats, dict) or stats.get("version") != VERSION or stats.get("made_from") != made_from:
        return None
    if any(not path.is_file() or stats["sha256"].get(name) != file_digest(path) for name, path in files.items()):
        return None
    print(f"chunks: {files['chunks_memmap_path']} is made from the same, and is used again", flush=True)
    return stats
