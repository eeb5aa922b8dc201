"""Compute the vectors, the index and the neighbors of raw chunk rows.

Each file gets a NAME.json beside it, written last, with the digests and settings that it was made from. The file is
reused as long as these are the same. If several processes need the same file, one makes it and the others wait.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import Float32Array, IntArray
from retro_model.core.artifacts import one_at_a_time, open_raw, read_record, whole_files, write_record
from retro_model.core.errors import ConfigError, SourceError
from retro_model.core.prefetch import prefetch
from retro_model.core.progress import Progress
from retro_model.core.rows import NO_ROW
from retro_model.embedding.encoder import Tokenized
from retro_model.memmaps.autofaiss_arguments import IndexSettings, index_settings
from retro_model.memmaps.encoder import DEFAULT_DIM, AnyPath, ChunkEmbedder
from retro_model.memmaps.files import check_counts
from retro_model.search.build import BuiltIndex, build_index
from retro_model.search.distances import import_faiss, write_index
from retro_model.search.index import Index
from retro_model.search.neighbors import QUERIES_PER_BATCH, Database

logger = logging.getLogger(__name__)

ROWS_PER_PORTION = 256  # rows read, tokenized and written at a time


@dataclass(frozen=True)
class SearchableChunks:
    """Chunks with their vectors and an index over them; the files lie beside the chunk file.

    `embedder` embeds new chunks, `database` finds the neighbors of vectors, and
    `retro_model.memmaps.files.neighbor_tokens` converts neighbors to tokens.
    """

    path: Path
    rows: IntArray  # (n, M + 1), read-only
    embedder: ChunkEmbedder
    vectors: Float32Array  # (n, dim), read-only
    vectors_digest: str
    faiss_index: Any
    index_facts: Mapping[str, Any]
    index_digest: str

    @classmethod
    def open(
        cls,
        *,
        num_chunks: int,
        chunk_size: int,
        chunk_memmap_path: AnyPath,
        use_cls_repr: bool = False,
        chunks_to_embeddings_batch_size: int = 16,
        embed_dim: int = DEFAULT_DIM,
        index_file: AnyPath = "knn.index",
        force_reprocess: bool = False,
        encoder: AnyPath | None = None,
        number_type: str = "float32",
        device: str = "auto",
        **index_kwargs: Any,
    ) -> "SearchableChunks":
        """See `chunks_to_index_and_embed` for arguments, reuse of files and errors."""
        settings = index_settings(index_kwargs)
        check_counts(
            num_chunks=num_chunks,
            chunk_size=chunk_size,
            chunks_to_embeddings_batch_size=chunks_to_embeddings_batch_size,
        )
        path = Path(chunk_memmap_path)
        rows = open_raw(path, (num_chunks, chunk_size + 1), longer=True)
        embedder = ChunkEmbedder.open(
            chunk_size,
            use_cls_repr=use_cls_repr,
            batch_size=chunks_to_embeddings_batch_size,
            encoder=encoder,
            number_type=number_type,
            device=device,
        )
        if embed_dim not in (embedder.encoder.dim, DEFAULT_DIM):
            raise ConfigError(
                f"embed_dim: found {embed_dim}, expected {embedder.encoder.dim}, the width of {embedder.encoder.name}"
            )
        vectors, vectors_digest = _cached_vectors(rows, embedder, beside(path, "embeddings.dat"), force_reprocess)
        index_path = Path(index_file)
        if os.fspath(index_file) == index_path.name:
            index_path = beside(path, index_path.name)
        index = _cached_index(vectors, vectors_digest, settings, index_path, force_reprocess)
        return cls(path, rows, embedder, vectors, vectors_digest, *index)

    def database(self, documents: IntArray) -> Database:
        """The database to search; `documents` (n,) holds the document id of each chunk."""
        return Database(Index(self.faiss_index, self.index_facts), self.vectors, documents)


def chunks_to_index_and_embed(
    *,
    num_chunks: int,
    chunk_size: int,
    chunk_memmap_path: AnyPath,
    use_cls_repr: bool = False,
    chunks_to_embeddings_batch_size: int = 16,
    embed_dim: int = DEFAULT_DIM,
    index_file: AnyPath = "knn.index",
    force_reprocess: bool = False,
    encoder: AnyPath | None = None,
    number_type: str = "float32",
    device: str = "auto",
    **index_kwargs: Any,
) -> tuple[Any, Float32Array]:
    """Embeds chunks and indexes their vectors.

    Returns a faiss index (squared L2) and the vectors, a read-only float32 memmap (chunks, dim). The files of both
    lie beside the chunk file and are reused while chunks, encoder and settings are the same (see the top of this
    module); `force_reprocess` makes them again.

    index_file: a bare name is prefixed with the chunk file's stem and placed beside it; a path with a folder is
        used as it is.
    embed_dim: must be the encoder's width, unless it is the default 768.
    number_type: float32, as in `bert_embed`; auto is bfloat16 if the processor supports it, which is about twice
        as fast on CPUs.
    index_kwargs: builder, target_recall, train_points_per_list and seed of IndexConfig; and autofaiss's
        max_index_memory_usage and current_memory_available (the smaller one applies), index_key, index_param
        (nprobe=<lists visited>), metric_type (l2), use_gpu and nb_cores.

    Raises ConfigError for invalid settings or ones that cannot be met, MismatchError if the chunk file is too short,
    SourceError if the encoder cannot be loaded.
    """
    chunks = SearchableChunks.open(
        num_chunks=num_chunks,
        chunk_size=chunk_size,
        chunk_memmap_path=chunk_memmap_path,
        use_cls_repr=use_cls_repr,
        chunks_to_embeddings_batch_size=chunks_to_embeddings_batch_size,
        embed_dim=embed_dim,
        index_file=index_file,
        force_reprocess=force_reprocess,
        encoder=encoder,
        number_type=number_type,
        device=device,
        **index_kwargs,
    )
    return chunks.faiss_index, chunks.vectors


def chunks_to_precalculated_knn_(
    *,
    num_nearest_neighbors: int,
    num_chunks: int,
    chunk_size: int,
    chunk_memmap_path: AnyPath,
    doc_ids_memmap_path: AnyPath,
    num_extra_neighbors: int = 10,
    use_cls_repr: bool = False,
    chunks_to_embeddings_batch_size: int = 16,
    embed_dim: int = DEFAULT_DIM,
    index_file: AnyPath = "knn.index",
    force_reprocess: bool = False,
    encoder: AnyPath | None = None,
    number_type: str = "float32",
    device: str = "auto",
    **index_kwargs: Any,
) -> tuple[Path, Any]:
    """Writes each chunk's nearest chunks from other documents; returns the file's path and the faiss index.

    The file is int32 (num_chunks, num_nearest_neighbors), nearest first, ties by row; -1 if the other documents
    hold no more chunks. `num_extra_neighbors` is how many extra candidates the first search fetches; more are
    fetched for chunks whose own document takes them up. It changes speed only.

    See `chunks_to_index_and_embed` for the other arguments, reuse of files and errors.
    """
    check_counts(num_chunks=num_chunks, num_nearest_neighbors=num_nearest_neighbors)
    if isinstance(num_extra_neighbors, bool) or not isinstance(num_extra_neighbors, int) or num_extra_neighbors < 0:
        raise ConfigError(f"num_extra_neighbors: found {num_extra_neighbors!r}, expected a whole number from 0")
    documents = open_raw(Path(doc_ids_memmap_path), (num_chunks,), longer=True)
    chunks = SearchableChunks.open(
        num_chunks=num_chunks,
        chunk_size=chunk_size,
        chunk_memmap_path=chunk_memmap_path,
        use_cls_repr=use_cls_repr,
        chunks_to_embeddings_batch_size=chunks_to_embeddings_batch_size,
        embed_dim=embed_dim,
        index_file=index_file,
        force_reprocess=force_reprocess,
        encoder=encoder,
        number_type=number_type,
        device=device,
        **index_kwargs,
    )
    path = beside(chunks.path, "knn.dat")
    made_from = {
        "vectors": chunks.vectors_digest,
        "index": chunks.index_digest,
        "documents": _digest(documents),
        "neighbors": num_nearest_neighbors,
    }

    def write(partial: Path) -> dict[str, Any]:
        _write_neighbors(chunks.database(documents), num_nearest_neighbors, num_extra_neighbors, partial)
        return {}

    _make_or_reuse(path, made_from, "knn", force_reprocess, write)
    return path, chunks.faiss_index


def beside(chunks_path: AnyPath, name: str) -> Path:
    """The path of a file derived from a chunk file: train.chunks.dat and knn.dat give train.chunks.knn.dat.

    Drops only the suffix .dat, so that corpus.train and corpus.valid get different files.
    """
    path = Path(chunks_path)
    return path.with_name(f"{path.name.removesuffix('.dat')}.{name}")


def _digest(array: npt.NDArray[Any]) -> str:
    return hashlib.sha256(array.data).hexdigest()


def _make_or_reuse(
    path: Path, made_from: Mapping[str, Any], title: str, force: bool, write: Callable[[Path], Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the record of `path`; calls `write` first, unless the file exists and was made from `made_from`.

    `write` takes the path to write to and returns the facts to record. If several processes need the file (torchrun
    runs a script in each), one makes it and the others wait.
    """
    if (found := _reusable(path, made_from, title, force)) is not None:
        return found
    with one_at_a_time(path):
        if (found := _reusable(path, made_from, title, force)) is not None:
            return found
        with whole_files(path) as (partial,):
            facts = write(partial)
        return {"facts": facts, "sha256": write_record(path, made_from, **facts)}


def _reusable(path: Path, made_from: Mapping[str, Any], title: str, force: bool) -> dict[str, Any] | None:
    record = None if force else read_record(path, made_from)
    if record is not None:
        logger.info(f"{title}: {path} is made from the same, and is used again")
    return record


def _cached_vectors(rows: IntArray, embedder: ChunkEmbedder, path: Path, force: bool) -> tuple[Float32Array, str]:
    """The chunks' vectors, from the file `path` or computed and written there; and the file's digest."""
    facts = embedder.encoder.facts()
    del facts["encoder_name"]  # the vectors do not depend on the name
    made_from = {"chunks": _digest(rows), "tokenizer": embedder.tokenizer.fingerprint, **facts}

    def write(partial: Path) -> dict[str, Any]:
        _write_vectors(rows, embedder, partial)
        return {}

    digest = _make_or_reuse(path, made_from, "embed", force, write)["sha256"]
    return open_raw(path, (len(rows), embedder.encoder.dim), np.float32), digest


def _cached_index(
    vectors: Float32Array, vectors_digest: str, settings: IndexSettings, path: Path, force: bool
) -> tuple[Any, Mapping[str, Any], str]:
    """The faiss index, from the file `path` or built and written there; the facts for `Index`; the file's digest."""
    made_from = {"vectors": vectors_digest, **settings.facts()}

    def write(partial: Path) -> dict[str, Any]:
        index, facts = _build_index(vectors, settings)
        write_index(index, partial)
        return facts

    record = _make_or_reuse(path, made_from, "index", force, write)
    return import_faiss().read_index(str(path)), record["facts"], record["sha256"]


def _write_vectors(rows: IntArray, embedder: ChunkEmbedder, path: Path) -> None:
    size = embedder.encoder.batch_size * max(1, ROWS_PER_PORTION // embedder.encoder.batch_size)

    def read(start: int) -> Tokenized:
        return embedder.read(np.asarray(rows[start : start + size, :-1]))

    num_truncated = 0
    with path.open("wb") as stream, Progress("embed", len(rows), "chunk") as bar:
        for tokenized in prefetch(map(read, range(0, len(rows), size))):
            vectors = embedder.encoder.vectors(tokenized)
            if not np.isfinite(vectors).all():
                raise SourceError(f"{embedder.encoder.name}: a vector is not finite; choose another encoder")
            stream.write(vectors.tobytes())
            num_truncated += tokenized.num_truncated
            bar.update(len(tokenized))
    if num_truncated:
        longest = embedder.encoder.config.max_tokens
        logger.warning(f"embed: {num_truncated:,} chunks are longer than {longest} tokens and were cut short")


def _write_neighbors(database: Database, num_neighbors: int, surplus: int, path: Path) -> None:
    vectors, documents = database.vectors, database.documents
    num_short = 0
    with path.open("wb") as stream, Progress("knn", len(vectors), "chunk") as bar:
        for start in range(0, len(vectors), QUERIES_PER_BATCH):
            part = slice(start, start + QUERIES_PER_BATCH)
            ids, _ = database.nearest(np.array(vectors[part]), documents[part], num_neighbors, surplus)
            stream.write(ids.astype(np.int32).tobytes())
            num_short += int((ids[:, -1] == NO_ROW).sum())
            bar.update(len(ids))
    if num_short:
        hint = ": all are of one document" if len(np.unique(documents)) == 1 else ""
        logger.warning(f"knn: {num_short:,} of {len(vectors):,} chunks have fewer than {num_neighbors} neighbors{hint}")


# ---- the index -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _faiss_threads(number: int | None) -> Iterator[None]:
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number or before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _build_index(vectors: Float32Array, settings: IndexSettings) -> BuiltIndex:
    """Builds the index over the vectors; a ConfigError also names the arguments that the caller gave."""
    try:
        with _faiss_threads(settings.threads):
            built = build_index(vectors, settings.config, settings.probes)
    except ConfigError as error:
        raise ConfigError(f"{error} (given: {settings.given or 'nothing'})") from error
    visited = f", {built.facts['nprobe']} lists a search" if built.facts["nprobe"] else ""
    logger.info(f"index: {built.facts['key']} over {len(vectors):,} chunks{visited}")
    return built
