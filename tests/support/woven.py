"""Small chunk, neighbor and tokenizer artifacts made from token lists, and a corpus in which retrieval pays.

    woven = write_woven(tmp_path, seed=0)          # chunks/{train,valid}, neighbors/{train,valid}, tokenizer
    chunks = write_chunks(tmp_path / "chunks", [[5, 6, 7], [8, 9]], chunk_size=4)

A woven document is a chain of passages of random tokens from a pool. A passage comes up in a few
documents only: too seldom to be learned by heart, and always findable in another document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retro_model.core.artifacts import Artifact, ArtifactWriter

PAD, BEGIN, END, FIRST_WORD = 0, 1, 2, 3


def write_tokenizer(folder: Path, vocab_size: int) -> Artifact:
    """A tokenizer artifact that nobody can tokenize with."""
    with ArtifactWriter(folder, "tokenizer") as writer:
        (folder / "tokenizer.json").write_text("{}\n", encoding="utf-8")
        writer.add_file("tokenizer.json")
        writer.facts.update(pad_id=PAD, begin_id=BEGIN, end_id=END, vocab_size=vocab_size, name="none")
    return Artifact.open(folder, "tokenizer")


def chunk_rows(tokens: Sequence[int], chunk_size: int) -> list[list[int]]:
    """The rows of one document, the slow and obvious way."""
    stream = [BEGIN, *tokens, END]
    rows = []
    for first in range(0, len(stream) - 1, chunk_size):
        row = stream[first : first + chunk_size + 1]
        rows.append(row + [PAD] * (chunk_size + 1 - len(row)))
    return rows


def write_chunks(
    folder: Path,
    documents: Sequence[Sequence[int]],
    *,
    chunk_size: int,
    vocab_size: int = 256,
    tokenizer: str = "tokenizer",
    first_document: int = 0,
    rows_per_shard: int = 1 << 18,
) -> Artifact:
    """The chunks of the given documents; a token stands for one byte of text."""
    with ArtifactWriter(folder, "chunks", rows_per_shard=rows_per_shard) as writer:
        for number, document in enumerate(documents, start=first_document):
            rows = np.array(chunk_rows(document, chunk_size), dtype=np.uint16)
            writer.append(
                tokens=rows,
                documents=np.full(len(rows), number, dtype=np.int32),
                bytes=np.count_nonzero(rows[:, 1:] > END, axis=1).astype(np.int32),
            )
        writer.facts.update(
            chunk_size=chunk_size,
            pad_id=PAD,
            begin_id=BEGIN,
            end_id=END,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            documents=len(documents),
        )
    return Artifact.open(folder, "chunks")


def write_neighbors(folder: Path, ids: npt.NDArray[Any], chunks: Artifact, database: Artifact) -> Artifact:
    """Neighbors (rows, K) of `chunks` in `database`, at made-up distances."""
    with ArtifactWriter(folder, "neighbors") as writer:
        distances = np.where(ids < 0, np.inf, np.arange(ids.shape[1], dtype=np.float32)).astype(np.float32)
        writer.append(ids=ids.astype(np.int32), distances=distances)
        writer.facts.update(
            chunks=chunks.fingerprint,
            database=database.fingerprint,
            index="index",
            embeddings="embeddings",
            stored=ids.shape[1],
        )
    return Artifact.open(folder, "neighbors")


@dataclass(frozen=True)
class Woven:
    """The folders of a woven corpus."""

    chunks: Path
    neighbors: Path
    tokenizer: Path


def write_woven(
    folder: Path,
    *,
    seed: int = 0,
    chunk_size: int = 16,
    vocab_size: int = 67,
    num_documents: int = 500,
    passages_per_document: int = 3,
    chunks_per_passage: int = 4,
    occurrences: int = 3,
    stored: int = 3,
) -> Woven:
    """Writes a corpus of `num_documents` training documents and a tenth as many for validation.

    A chunk's first neighbor is the same chunk of its passage in another document, where it has one;
    the others are chunks at random.
    """
    random = np.random.default_rng(seed)
    num_valid = max(num_documents // 10, 1)
    num_passages = num_documents * passages_per_document // occurrences
    pool = random.integers(FIRST_WORD, vocab_size, (num_passages, chunks_per_passage * chunk_size))
    places = random.permutation(np.arange(num_passages * occurrences) % num_passages)
    woven = {
        "train": places[: num_documents * passages_per_document].reshape(-1, passages_per_document),
        "valid": random.integers(num_passages, size=(num_valid, passages_per_document)),
    }
    tokenizer = write_tokenizer(folder / "tokenizer", vocab_size)
    chunks: dict[str, Artifact] = {}
    for split, passages in woven.items():
        documents = pool[passages].reshape(len(passages), -1)[:, :-2]  # begin and end make it whole chunks
        chunks[split] = write_chunks(
            folder / "chunks" / split,
            documents.tolist(),
            chunk_size=chunk_size,
            vocab_size=vocab_size,
            tokenizer=tokenizer.fingerprint,
            first_document=len(woven["train"]) if split == "valid" else 0,
        )
    for split, passages in woven.items():
        ids = _twins(random, woven["train"], passages, split == "train", chunks_per_passage, stored)
        write_neighbors(folder / "neighbors" / split, ids, chunks[split], chunks["train"])
    return Woven(folder / "chunks", folder / "neighbors", folder / "tokenizer")


def _twins(
    random: np.random.Generator,
    database: npt.NDArray[Any],
    passages: npt.NDArray[Any],
    is_database: bool,
    chunks_per_passage: int,
    stored: int,
) -> npt.NDArray[np.int64]:
    """For each chunk of `passages`, the rows of its twins in other documents, then rows at random."""
    width = database.shape[1] * chunks_per_passage  # chunks of a document
    num_chunks = passages.size * chunks_per_passage
    ids = random.integers(database.size * chunks_per_passage, size=(num_chunks, stored))
    if is_database:  # none of a chunk's own document
        own = np.arange(len(ids))[:, None] // width
        ids = np.where(ids // width == own, (ids + width) % len(ids), ids)
    for place, passage in enumerate(passages.reshape(-1)):
        twins = np.flatnonzero(database.reshape(-1) == passage)
        if is_database:
            twins = twins[twins // database.shape[1] != place // database.shape[1]]
        if len(twins):
            offsets = np.arange(chunks_per_passage)
            ids[place * chunks_per_passage + offsets, 0] = twins[0] * chunks_per_passage + offsets
    return ids
