"""Embed all chunks: the stage `embed`, part by part (section 2.2 of the paper).

The vectors are stored in half precision, in which the search compares them.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import Float32Array
from retro_model.core.artifacts import SPLITS, Artifact, ArtifactWriter, rows_per_part, whole_folder
from retro_model.core.errors import SourceError
from retro_model.core.prefetch import prefetch
from retro_model.core.progress import Progress
from retro_model.corpus.chunks import chunk_text
from retro_model.corpus.tokenizer import Tokenizer
from retro_model.embedding.config import EmbedConfig
from retro_model.embedding.encoder import ROWS_PER_BATCH, Encoder, Tokenized
from retro_model.jobs.engine import Engine
from retro_model.jobs.job import Outcome, row_parts, work_or_temporary

logger = logging.getLogger(__name__)

ROWS_PER_BLOCK = 256  # chunks that are read, tokenized and reported at once


def embed_rows(
    encoder: Encoder, tokenizer: Tokenizer, chunks: Artifact, start: int, stop: int
) -> Iterator[tuple[npt.NDArray[np.float16], int]]:
    """Embed the chunk rows `start` to `stop`, in order; yield (vectors, number of truncated texts) for each block.

    The next block is read and tokenized while the encoder works on this one.
    """
    tokens = chunks["tokens"]
    size = encoder.batch_size * max(1, ROWS_PER_BLOCK // encoder.batch_size)

    def prepare(first: int) -> Tokenized:
        return encoder.tokenize(chunk_text(tokenizer, tokens[first : min(first + size, stop)][:, :-1]))

    for tokenized in prefetch(map(prepare, range(start, stop, size))):
        yield stored_vectors(encoder.vectors(tokenized), encoder), tokenized.num_truncated


def stored_vectors(vectors: Float32Array, encoder: Encoder) -> npt.NDArray[np.float16]:
    """Return the vectors in half precision, in which they are stored and compared.

    Raises SourceError if one of them is not finite then.
    """
    with np.errstate(over="ignore"):
        halves = vectors.astype(np.float16)
    if not np.isfinite(halves).all():
        raise SourceError(
            f"embed.encoder: {encoder.name} in {encoder.config.number_type} overflows half precision; "
            "set embed.normalize: true or embed.number_type: float32"
        )
    return halves


class _Opened(NamedTuple):
    encoder: Encoder
    tokenizer: Tokenizer
    splits: dict[str, Artifact]


@dataclass(frozen=True)
class EmbedJob:
    """Embeds ranges of chunks; see retro_model.jobs.job."""

    chunks: Path
    tokenizer: Path
    config: EmbedConfig
    device: str
    batch_size: int | None
    kind: ClassVar[str] = "embeddings"
    uses_gpus: ClassVar[bool] = True

    def open(self) -> _Opened:
        """Load the encoder and the tokenizer and open the chunks."""
        tokenizer = Tokenizer.open(self.tokenizer)
        splits = {
            split: Artifact.open(self.chunks / split, "chunks", verify=False).require(tokenizer=tokenizer.fingerprint)
            for split in SPLITS
        }
        encoder = Encoder.open(self.config, splits["train"].facts["chunk_size"], self.device, self.batch_size)
        return _Opened(encoder, tokenizer, splits)

    def facts(self, opened: _Opened) -> dict[str, Any]:
        """Return all that determines a vector: the encoder's facts, and, for the rounding, device and batch shape."""
        encoder = opened.encoder
        return {**encoder.facts(), "device": encoder.device.type, "rows_alike": encoder.rows_alike}

    def make(self, opened: _Opened, folder: Path, split: str, start: int, stop: int) -> Iterator[int]:
        """Write the vectors of chunks `start` to `stop` of a split."""
        encoder, tokenizer, splits = opened
        num_truncated = 0
        with ArtifactWriter(folder, self.kind, max(stop - start, 1)) as writer:
            for vectors, truncated in embed_rows(encoder, tokenizer, splits[split], start, stop):
                writer.append(vectors=vectors)
                num_truncated += truncated
                yield len(vectors)
            if start == stop:  # a split without chunks still has an array, with no rows
                writer.append(vectors=np.empty((0, encoder.dim), dtype=np.float16))
            writer.facts.update(chunks=splits[split].fingerprint, **self.facts(opened), truncated_chunks=num_truncated)


def make_embeddings(
    chunks_folder: Path,
    tokenizer_folder: Path,
    config: EmbedConfig,
    out_folder: Path,
    *,
    batch_size: int | None = None,
    device: str = "auto",
    engine: Engine | None = None,
    work_folder: Path | None = None,
) -> Outcome:
    """Write the embeddings of every split's chunks below `out_folder` and return metrics and timings.

    `batch_size` is in chunks (None: the default for the device). It and `engine` change speed only, except that on a
    GPU another batch size may change the last bits. Parts in `work_folder` that an earlier run finished are reused,
    unless their batches rounded differently.

    Raises MismatchError if the chunks were made with another tokenizer; SourceError and ConfigError like
    `Encoder.open`.
    """
    splits = {split: Artifact.open(chunks_folder / split, "chunks") for split in SPLITS}
    job = EmbedJob(chunks_folder.absolute(), tokenizer_folder.absolute(), config, device, batch_size)
    total, num_truncated = sum(chunks.rows for chunks in splits.values()), 0
    with (
        work_or_temporary(work_folder, out_folder) as work,
        whole_folder(out_folder) as folder,
        (engine or Engine(device=device)).open(job) as running,
        Progress("embed", total, "chunk") as bar,
    ):
        facts = running.facts
        rows_per_batch = batch_size or ROWS_PER_BATCH[facts["device"]]
        logger.info(
            f"embed: {facts['encoder_name']}, {facts['dim']} dimensions, on {facts['device']} in "
            f"{facts['number_type']}, {facts['max_tokens']} tokens a chunk, {rows_per_batch} chunks a batch"
        )
        started = time.perf_counter()
        for split, chunks in splits.items():
            size, truncated = rows_per_part(chunks.rows), 0
            with ArtifactWriter(folder / split, "embeddings", size) as writer:
                parts = row_parts(split, chunks.rows, size, chunks=chunks.fingerprint)
                for part in running.make(parts, work, bar):
                    writer.adopt(part)
                    truncated += part.facts["truncated_chunks"]
                writer.facts.update(chunks=chunks.fingerprint, **facts, truncated_chunks=truncated)
                num_truncated += truncated
        seconds = time.perf_counter() - started
    metrics = {
        "vectors": total,
        "dim": facts["dim"],
        "padded_length": facts["max_tokens"],
        "truncated_chunks": num_truncated,
        "truncated_share": num_truncated / max(total, 1),
    }
    return Outcome(metrics, {"chunks_per_second": bar.num_new / seconds, "chunks_per_batch": float(rows_per_batch)})
