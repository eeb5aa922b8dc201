"""Retrieve neighbors for new text: prompts, generated chunks, evaluation texts; RET(C) of section 2.3.

Queries are processed exactly like the database: the same decoding of tokens to text, the same encoder in the same
number type, the same rounding to half precision, the same search. So a stored chunk retrieves the neighbors that
were precomputed for it.

    retriever = Retriever.open("data")
    found = retriever.retrieve(token_chunks, k=2)     # (B, M) ids
    found.tokens                                      # (B, 2, 2 * M): neighbor and continuation
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retro_model.core.arrays import Float32Array, IntArray
from retro_model.core.artifacts import Artifact
from retro_model.core.errors import ConfigError, MismatchError
from retro_model.core.rows import NO_ROW, retrieved_tokens
from retro_model.corpus.chunks import chunk_text
from retro_model.corpus.tokenizer import Tokenizer
from retro_model.embedding.config import EmbedConfig
from retro_model.embedding.embed import stored_vectors
from retro_model.embedding.encoder import Encoder
from retro_model.search.neighbors import Database


@dataclass(frozen=True)
class Retrieved:
    """The neighbors of B queries, nearest first."""

    tokens: npt.NDArray[np.int64]  # (B, K, 2 * M): neighbor and continuation; pad where there is none
    ids: npt.NDArray[np.int64]  # (B, K): rows of the database; -1 where there is none
    distances: Float32Array  # (B, K): squared L2; inf where there is none


class Retriever:
    """Searches a database by token chunks or by text. Create one with `Retriever.open`."""

    def __init__(self, chunks: Artifact, database: Database, encoder: Encoder, tokenizer: Tokenizer) -> None:
        self.chunks = chunks
        self.chunk_size: int = chunks.facts["chunk_size"]
        self.encoder = encoder
        self._database = database
        self.tokenizer = tokenizer

    @classmethod
    def open(
        cls,
        data_folder: Path | str = "data",
        encoder: str | None = None,
        device: str = "auto",
        batch_size: int | None = None,
        verify: bool = True,
    ) -> "Retriever":
        """Open tokenizer, train chunks, embeddings, index and encoder, and check that they belong together.

        `encoder` is the encoder's name or folder, as in `embed.encoder`; pass it if the recorded name no longer leads
        to the encoder. `verify` checks the digests of chunks, embeddings and index, about a second per gigabyte.

        Raises SourceError if the encoder cannot be loaded, MismatchError if it is not the one that made the
        embeddings or if the artifacts were not made from each other.
        """
        folder = Path(data_folder)
        tokenizer = Tokenizer.open(folder / "tokenizer")
        chunks = Artifact.open(folder / "chunks" / "train", "chunks", verify)
        chunks.require(tokenizer=tokenizer.fingerprint)
        embeddings = Artifact.open(folder / "embeddings" / "train", "embeddings", verify)
        database = Database.open(embeddings, Artifact.open(folder / "index", "index", verify), chunks)
        opened = _same_encoder(embeddings, encoder, device, batch_size)
        return cls(chunks, database, opened, tokenizer)

    def retrieve(self, token_chunks: IntArray, k: int, exclude_documents: IntArray | None = None) -> Retrieved:
        """The k nearest database chunks of each row of token ids (B, M), from the database's tokenizer.

        Rows may have any width. `exclude_documents` (B,) is, for each query, a document whose chunks are not
        returned, -1 for none.

        Raises ConfigError for ids outside the vocabulary, or if k < 1.
        """
        rows = np.asarray(token_chunks)
        vocab_size = self.chunks.facts["vocab_size"]
        if rows.size and (rows.min() < 0 or rows.max() >= vocab_size):
            raise ConfigError(
                f"retrieve: found token ids {rows.min()} to {rows.max()}, expected 0 to {vocab_size - 1}: "
                f"those of the tokenizer of {self.chunks.folder}"
            )
        return self.retrieve_text(chunk_text(self.tokenizer, rows), k, exclude_documents)

    def retrieve_text(self, texts: list[str], k: int, exclude_documents: IntArray | None = None) -> Retrieved:
        """The same for texts; the encoder truncates them as it truncates chunks."""
        return self.nearest(self.vectors(texts), k, exclude_documents)

    def vectors(self, texts: list[str]) -> Float32Array:
        """The vectors (n, dim) of texts, rounded as the database stores them."""
        return stored_vectors(self.encoder.embed(texts), self.encoder).astype(np.float32)

    def nearest(self, vectors: Float32Array, k: int, exclude_documents: IntArray | None = None) -> Retrieved:
        """The same for vectors (B, dim) that `vectors` returned."""
        if k < 1:
            raise ConfigError(f"knn: found {k}, expected >= 1")
        excluded = np.full(len(vectors), NO_ROW) if exclude_documents is None else np.asarray(exclude_documents)
        assert excluded.shape == (len(vectors),), excluded.shape
        ids, distances = self._database.nearest(vectors, excluded, k)
        return Retrieved(retrieved_tokens(self.chunks, ids), ids, distances)

    def text(self, ids: IntArray) -> list[str]:
        """The texts of database rows (n,)."""
        return chunk_text(self.tokenizer, self.chunks["tokens"][np.asarray(ids)][:, :-1])

    def for_generation(self, k: int) -> Callable[[Tensor], Tensor]:
        """The `retrieve` function for `generate`: chunks (B, M) to neighbors (B, k, 2 * M), on the same device."""

        def retrieve(token_chunks: Tensor) -> Tensor:
            found = self.retrieve(token_chunks.cpu().numpy(), k)
            return torch.from_numpy(found.tokens).to(token_chunks.device)

        return retrieve


def _same_encoder(embeddings: Artifact, source: str | None, device: str, batch_size: int | None) -> Encoder:
    """Open the encoder that made `embeddings`, from `source` or the recorded name.

    Raises MismatchError if it is another encoder.
    """
    facts = embeddings.facts
    config = EmbedConfig(
        encoder=source or facts["encoder_name"],
        pooling=facts["pooling"],
        normalize=facts["normalize"],
        max_tokens=facts["max_tokens"],
        number_type=facts["number_type"],
    )
    encoder = Encoder.open(config, device=device, batch_size=batch_size)
    if encoder.fingerprint != facts["encoder"]:
        raise MismatchError(
            f"{embeddings.folder}: made by encoder {facts['encoder_name']} ({facts['encoder'][:12]}), "
            f"found {config.encoder} ({encoder.fingerprint[:12]}); name the one that made them, or run "
            "`dvc repro -s -f embed` and then `dvc repro`"
        )
    return encoder
