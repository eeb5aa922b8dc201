"""Embed all chunks: the stage `embed`, part by part (section 2.2 of the paper).

The vectors are stored in half precision, in which the search compares them. The shards are those of the chunks: each is
made from one shard of tokens and kept by its content (retro_model.jobs.parts), so only new chunks are embedded. That
gives the bytes of a run that embeds everything, because a vector is bitwise independent of the rest of its batch.
"""

import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import BoolArray, Float32Array, IntArray
from retro_model.core.artifacts import SPLITS, Artifact, ArtifactWriter, numbered, whole_folder
from retro_model.core.errors import ArtifactError, SourceError
from retro_model.core.prefetch import prefetch
from retro_model.core.progress import Progress
from retro_model.corpus.chunks import chunk_text
from retro_model.corpus.tokenizer import Tokenizer
from retro_model.embedding.config import EmbedConfig
from retro_model.embedding.encoder import ROWS_PER_BATCH, Encoder, Tokenized
from retro_model.jobs.engine import Engine
from retro_model.jobs.job import Outcome, Part, whole_part
from retro_model.jobs.parts import (
    SETTINGS,
    KeptParts,
    Keys,
    Parts,
    Source,
    code_digest,
    intact,
    keys_of,
    open_parts,
    part_name,
    settings_digest,
    write_keys,
)

logger = logging.getLogger(__name__)

ROWS_PER_BLOCK = 64  # chunks that are read, tokenized and reported at once

# What decides the bytes of a vector, besides its tokens and the encoder: how tokens become text, and text a vector.
CODE = ("retro_model.embedding", "retro_model.corpus.chunks", "retro_model.corpus.tokenizer")
LIBRARIES = ("numpy", "tokenizers", "torch", "transformers")
CODE_DIGEST = code_digest(*CODE)


def embed_rows(
    encoder: Encoder, tokenizer: Tokenizer, chunks: Artifact, rows: IntArray
) -> Iterator[tuple[npt.NDArray[np.float16], BoolArray]]:
    """Embed the given chunk rows, in order; yield (vectors, which texts were truncated) for each block.

    The next block is read and tokenized while the encoder works on this one.
    """
    tokens = chunks["tokens"]
    size = encoder.batch_size * max(1, ROWS_PER_BLOCK // encoder.batch_size)

    def prepare(first: int) -> Tokenized:
        return encoder.tokenize(chunk_text(tokenizer, tokens[rows[first : first + size]][:, :-1]))

    for tokenized in prefetch(map(prepare, range(0, len(rows), size))):
        yield stored_vectors(encoder.vectors(tokenized), encoder), tokenized.truncated


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
        facts = {**encoder.facts(), "device": encoder.device.type, "rows_alike": encoder.rows_alike}
        tokenizer = opened.tokenizer.fingerprint
        return {**facts, SETTINGS: settings_digest(CODE_DIGEST, LIBRARIES, {**facts, "tokenizer": tokenizer})}

    def make(
        self,
        opened: _Opened,
        folder: Path,
        split: str,
        start: int,
        stop: int,
        sources: list[Source],
        facts: dict[str, Any],
    ) -> Iterator[int]:
        """Write the vectors of chunks `start` to `stop` of a split; those that the parts `sources` hold are copied."""
        encoder, tokenizer, splits = opened
        keys = _keys_of(splits[split], start, stop)
        vectors = np.empty((stop - start, encoder.dim), dtype=np.float16)
        truncated, missing = np.zeros((2, stop - start), dtype=np.bool_)
        missing[:] = True
        for part, source in intact(sources, folder.parent, self.kind, keys):
            vectors[source.places] = part["vectors"][source.items]
            truncated[source.places] = part["truncated"][source.items]
            missing[source.places] = False
        places, done = np.flatnonzero(missing), 0
        for made, longer in embed_rows(encoder, tokenizer, splits[split], start + places):
            here = places[done : done + len(made)]
            vectors[here], truncated[here] = made, longer
            done += len(made)
            yield len(made)
        with ArtifactWriter(folder, self.kind, max(len(vectors), 1)) as writer:
            writer.append(vectors=vectors, truncated=truncated)
            write_keys(writer, keys)
            writer.facts.update(**self.facts(opened), **facts, truncated_chunks=int(truncated.sum()))


def _keys_of(chunks: Artifact, start: int, stop: int) -> Keys:
    return keys_of(row.tobytes() for row in chunks["tokens"][start:stop][:, :-1])


def make_embeddings(
    chunks_folder: Path,
    tokenizer_folder: Path,
    config: EmbedConfig,
    out_folder: Path,
    *,
    batch_size: int | None = None,
    device: str = "auto",
    engine: Engine | None = None,
    parts: Parts | None = None,
    restore: Callable[[Path], bool] | None = None,
) -> Outcome:
    """Write the embeddings of every split's chunks below `out_folder` and return metrics and timings.

    `batch_size` is in chunks (None: the default for the device). It and `engine` change speed only, except that on a
    GPU another batch size may change the last bits. Chunks whose vectors are in `parts` are not embedded again, unless
    those were made by other code or libraries, on another kind of device or in batches that round differently.
    If `parts` has no vectors at all, `restore` is called with an empty folder. If it returns True, the folder holds
    data/chunks and data/embeddings of an earlier run of the same code, whose vectors are then taken over.

    Raises MismatchError if the chunks were made with another tokenizer; SourceError and ConfigError like
    `Encoder.open`.
    """
    splits = {split: Artifact.open(chunks_folder / split, "chunks") for split in SPLITS}
    job = EmbedJob(chunks_folder.absolute(), tokenizer_folder.absolute(), config, device, batch_size)
    total, num_truncated = sum(chunks.rows for chunks in splits.values()), 0
    with (
        open_parts(parts, job.kind, out_folder) as work,
        whole_folder(out_folder) as folder,
        (engine or Engine(device=device)).open(job) as running,
        Progress("embed", total, "chunk") as bar,
    ):
        facts = {name: fact for name, fact in running.facts.items() if name != SETTINGS}
        rows_per_batch = batch_size or ROWS_PER_BATCH[facts["device"]]
        logger.info(
            f"embed: {facts['encoder_name']}, {facts['dim']} dimensions, on {facts['device']} in "
            f"{facts['number_type']}, {facts['max_tokens']} tokens a chunk, {rows_per_batch} chunks a batch"
        )
        started = time.perf_counter()
        if restore and not any(work.iterdir()):
            _take_over(restore, work, running.facts, splits["train"].facts["tokenizer"])
        kept = KeptParts(work, job.kind, running.facts[SETTINGS])
        for split, chunks in splits.items():
            with ArtifactWriter(folder / split, job.kind) as writer:
                no_rows = np.empty(0, dtype=np.bool_)  # an artifact without rows has its arrays
                writer.append(vectors=np.empty((0, facts["dim"]), dtype=np.float16), truncated=no_rows)
                truncated = 0
                for part in running.make(_parts(kept, split, chunks, bar), work, bar):
                    writer.adopt(part)
                    truncated += part.facts["truncated_chunks"]
                writer.facts.update(chunks=chunks.fingerprint, **facts, truncated_chunks=truncated)
                num_truncated += truncated
        seconds = time.perf_counter() - started
    logger.info(f"embed: {kept.made:,} of {total:,} chunks embedded, the others were there")
    timings = {"chunks_per_second": bar.num_new / seconds, "chunks_per_batch": float(rows_per_batch)}
    return Outcome(_metrics(total, num_truncated, facts), {**timings, "chunks_embedded": float(kept.made)})


def _metrics(total: int, num_truncated: int, facts: dict[str, Any]) -> dict[str, float]:
    return {
        "vectors": total,
        "dim": facts["dim"],
        "padded_length": facts["max_tokens"],
        "truncated_chunks": num_truncated,
        "truncated_share": num_truncated / max(total, 1),
    }


def _take_over(restore: Callable[[Path], bool], work: Path, facts: dict[str, Any], tokenizer: str) -> None:
    """Write the parts that an earlier run had, from the chunks and embeddings that `restore` finds."""
    described = {name: fact for name, fact in facts.items() if name != SETTINGS}
    with tempfile.TemporaryDirectory(prefix="restored.", suffix=".partial", dir=work) as name:
        if not restore(Path(name)):
            return
        data = Path(name) / "data"
        try:
            pairs = []
            for split in SPLITS:
                chunks = Artifact.open(data / "chunks" / split, "chunks").require(tokenizer=tokenizer)
                embeddings = Artifact.open(data / "embeddings" / split, EmbedJob.kind)
                pairs.append((chunks, embeddings.require(chunks=chunks.fingerprint, **described)))
        except ArtifactError as error:
            logger.info(f"embed: the vectors of the last run are of no use here ({error})")
            return
        for chunks, embeddings in pairs:
            for number, (start, stop) in enumerate(itertools.pairwise(chunks["tokens"].starts.tolist())):
                content = chunks.files[numbered("tokens.npy", number)]
                with (
                    whole_part(work / part_name(facts[SETTINGS], content)) as folder,
                    ArtifactWriter(folder, EmbedJob.kind, max(stop - start, 1)) as writer,
                ):
                    truncated = embeddings["truncated"][start:stop]
                    writer.append(vectors=embeddings["vectors"][start:stop], truncated=truncated)
                    write_keys(writer, _keys_of(chunks, start, stop))
                    writer.facts.update(**facts, content=content, truncated_chunks=int(truncated.sum()))
    total = sum(embeddings.rows for _, embeddings in pairs)
    logger.info(f"embed: took over {total:,} vectors of the last run; which libraries made them is not known")


def _parts(kept: KeptParts, split: str, chunks: Artifact, bar: Progress) -> Iterator[Part]:
    starts = chunks["tokens"].starts.tolist()
    for number, (start, stop) in enumerate(itertools.pairwise(starts)):
        content, before = chunks.files[numbered("tokens.npy", number)], kept.found
        part = kept.part(content, (split, start, stop), stop - start, partial(_keys_of, chunks, start, stop))
        bar.skip(kept.found - before)
        yield part
