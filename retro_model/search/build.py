"""Build the faiss index over the train chunks' vectors.

Equal input gives equal bytes: the index is trained on a seeded random sample (retro_model.search.builders), vectors
are then added in order, part by part (retro_model.jobs.engine), and the search settings depend on measured recall,
not on time (retro_model.search.tuning).

With a GPU build of faiss, k-means and the assignment of rows to lists run on the GPU.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from retro_model.core.arrays import Float32Array
from retro_model.core.artifacts import Artifact, ArtifactWriter, whole_folder
from retro_model.core.errors import ConfigError
from retro_model.core.progress import Progress
from retro_model.jobs.engine import Engine
from retro_model.jobs.job import Outcome, Part, row_parts, work_or_temporary
from retro_model.search.builders import pack_for_fast_scan, train_index, trains_on_gpu
from retro_model.search.distances import (
    RECALL_AT,
    RECALL_QUERIES,
    ROWS_PER_BLOCK,
    SHAPING_FACTS,
    Vectors,
    as_float32,
    float_blocks,
    import_faiss,
    largest_square,
    sample_rows,
    write_index,
)
from retro_model.search.index import INDEX_FILE, Centroids, on_gpu
from retro_model.search.keys import IndexConfig, check_memory, choose_key, code_of, num_lists
from retro_model.search.tuning import RESCORED, choose_search_settings

logger = logging.getLogger(__name__)

ROWS_PER_ADDED_PART = 1 << 18  # rows of a large index that one job part adds


@dataclass(frozen=True)
class TrainJob:
    """A job (see retro_model.jobs.job) with one part: an index that is trained and holds no vectors."""

    embeddings: Path
    key: str
    config: IndexConfig
    device: str = "auto"
    kind: ClassVar[str] = "index"
    uses_gpus: ClassVar[bool] = False

    def open(self) -> Artifact:
        """The embeddings artifact of the train split."""
        return Artifact.open(self.embeddings, "embeddings", verify=False)

    def facts(self, train: Artifact) -> dict[str, Any]:
        """Fingerprint of the embeddings, the training settings, and whether k-means runs on a GPU.

        Without config.builder: all builders write the same bytes.
        """
        config = self.config
        trained = {"key": self.key, "seed": config.seed, "train_points_per_list": config.train_points_per_list}
        return {"embeddings": train.fingerprint, **trained, "gpu": trains_on_gpu(self.key, self.device)}

    def make(self, train: Artifact, folder: Path) -> Iterator[int]:
        """Writes the trained index, without vectors."""
        with ArtifactWriter(folder, self.kind) as writer:
            gpu = trains_on_gpu(self.key, self.device)
            index = train_index(train["vectors"], self.key, self.config, gpu, folder)
            write_index(index, folder / INDEX_FILE)
            writer.add_file(INDEX_FILE)
            writer.facts.update(self.facts(train))
            yield 0


class _Trained(NamedTuple):
    train: Artifact
    trained: Artifact


@dataclass(frozen=True)
class AddJob:
    """A job (see retro_model.jobs.job) whose parts each add a range of vectors to a copy of the trained index."""

    embeddings: Path
    trained: Path
    device: str = "auto"
    kind: ClassVar[str] = "index"
    uses_gpus: ClassVar[bool] = False

    def open(self) -> _Trained:
        """The artifacts of the train embeddings and of the trained index."""
        train = Artifact.open(self.embeddings, "embeddings", verify=False)
        return _Trained(train, Artifact.open(self.trained, "index", verify=False))

    def facts(self, opened: _Trained) -> dict[str, Any]:
        """Fingerprints of the embeddings and of the trained index."""
        return {"embeddings": opened.train.fingerprint, "trained": opened.trained.fingerprint}

    def make(self, opened: _Trained, folder: Path, split: str, start: int, stop: int) -> Iterator[int]:
        """Writes an index with rows `start` to `stop`; their ids are their row numbers in the whole split."""
        faiss = import_faiss()
        index, largest = faiss.read_index(str(opened.trained.folder / INDEX_FILE)), 0.0
        centroids = Centroids(index, on_gpu(self.device))
        with ArtifactWriter(folder, self.kind) as writer:
            for first in range(start, stop, ROWS_PER_BLOCK):
                block = as_float32(opened.train["vectors"][first : min(first + ROWS_PER_BLOCK, stop)])
                centroids.add(block, np.arange(first, first + len(block)))
                largest = max(largest, largest_square(block))
                yield len(block)
            write_index(index, folder / INDEX_FILE)
            writer.add_file(INDEX_FILE)
            writer.facts.update(**self.facts(opened), largest_norm=largest)


def make_index(
    embeddings_folder: Path,
    config: IndexConfig,
    out_folder: Path,
    *,
    device: str = "auto",
    engine: Engine | None = None,
    work_folder: Path | None = None,
) -> Outcome:
    """Writes the index over the train embeddings to `out_folder`; returns its metrics and timings.

    Recall is measured with the valid embeddings as queries; they are not in the index. `device` (auto, cpu or
    cuda) is where faiss computes; k-means rounds differently on a GPU than on a CPU. `engine` changes speed
    only. Parts that a killed run finished in `work_folder` are reused.

    Raises ConfigError if the key does not fit the data, the memory limit or the target recall cannot be met,
    or the device is missing; MismatchError if the splits were embedded with different settings.
    """
    gpu = on_gpu(device)
    train = Artifact.open(embeddings_folder / "train", "embeddings")
    valid = Artifact.open(embeddings_folder / "valid", "embeddings")
    valid.require(**{name: train.facts[name] for name in SHAPING_FACTS})
    vectors = train["vectors"]
    key = _checked_key(config, vectors)
    with work_or_temporary(work_folder, out_folder) as work, whole_folder(out_folder) as folder:
        index, largest_norm = _fill_index(train, key, config, engine or Engine(), work, device)
        queries = sample_rows(valid["vectors"], RECALL_QUERIES, config.seed)
        settings = choose_search_settings(key, index, vectors, queries, largest_norm, config.target_recall, gpu)
        logger.info(f"index: {key} over {len(vectors):,} chunks{settings}")
        with ArtifactWriter(folder, "index") as writer:
            write_index(index, folder / INDEX_FILE)
            writer.add_file(INDEX_FILE)
            writer.facts.update(
                embeddings=train.fingerprint,
                chunks=train.facts["chunks"],
                metric="l2",
                recall=settings.recall,
                **_index_facts(key, vectors, largest_norm, settings.probes, settings.rescored),
            )
        num_bytes = (folder / INDEX_FILE).stat().st_size
    code = code_of(key)
    metrics = {
        "recall": settings.recall,
        "lists": num_lists(key),
        "probes": settings.probes or 0,
        "code_bytes": code.num_bytes if code else 0,
        "rescored": settings.rescored or 0,
        "rows": len(vectors),
        "bytes_per_vector": num_bytes / len(vectors),
    }
    return Outcome(metrics, {"milliseconds_per_query": settings.milliseconds})


class BuiltIndex(NamedTuple):
    """A faiss index in memory, and the facts that `Index` takes with it."""

    index: Any
    facts: dict[str, Any]


def build_index(vectors: Float32Array, config: IndexConfig, probes: int | None = None) -> BuiltIndex:
    """Builds an index over the rows of `vectors`, in order, without artifacts.

    `probes` is the number of lists that a search visits. With None it is tuned to the target recall; the
    queries are then rows of the index. Raises ConfigError as `make_index` does.
    """
    key = _checked_key(config, vectors)
    if probes is not None and probes > max(num_lists(key), 1):
        raise ConfigError(f"nprobe: found {probes}, expected <= {max(num_lists(key), 1)}, the lists of {key}")
    index, largest_norm = train_index(vectors, key, config), 0.0
    for block in float_blocks(vectors):
        index.add(block)
        largest_norm = max(largest_norm, largest_square(block))
    index = pack_for_fast_scan(key, index)
    rescored: int | None = RESCORED[0]
    if num_lists(key):
        if probes is None:
            # Each query is in the index and always finds itself, one of its RECALL_AT neighbors. Raise the
            # target so that the other neighbors reach it.
            target = config.target_recall + (1 - config.target_recall) / RECALL_AT
            queries = sample_rows(vectors, RECALL_QUERIES, config.seed)
            settings = choose_search_settings(key, index, vectors, queries, largest_norm, target)
            probes, rescored = settings.probes, settings.rescored
        index.nprobe = probes  # for callers that search the faiss index directly
    return BuiltIndex(index, _index_facts(key, vectors, largest_norm, probes if num_lists(key) else None, rescored))


def _checked_key(config: IndexConfig, vectors: Vectors) -> str:
    """The index key for these vectors. Raises ConfigError if it needs too much memory."""
    key = choose_key(config, *vectors.shape)
    check_memory(config, key, *vectors.shape)
    return key


def _index_facts(
    key: str, vectors: Vectors, largest_norm: float, probes: int | None, rescored: int | None
) -> dict[str, Any]:
    return {
        "key": key,
        "rows": vectors.shape[0],
        "dim": vectors.shape[1],
        "nprobe": probes,
        "rescored": rescored,
        "largest_norm": largest_norm,
    }


def _fill_index(
    train: Artifact, key: str, config: IndexConfig, engine: Engine, work: Path, device: str
) -> tuple[Any, float]:
    """The index with all rows in order, and the largest squared norm of a row.

    With lists, jobs add the vectors in parts, which are merged in order. An exact index has nothing to
    compute and is filled here.
    """
    faiss, vectors = import_faiss(), train["vectors"]
    with engine.open(TrainJob(train.folder.absolute(), key, config, device)) as running:
        (trained,) = running.make([Part("trained", (), {})], work)
    index, largest = faiss.read_index(str(trained.folder / INDEX_FILE)), 0.0
    with Progress("index", len(vectors), "chunk") as bar:
        if not num_lists(key):
            for block in float_blocks(vectors):
                index.add(block)
                largest = max(largest, largest_square(block))
                bar.update(len(block))
            return index, largest
        with engine.open(AddJob(train.folder.absolute(), trained.folder, device)) as running:
            for part in running.make(row_parts("added", len(vectors), ROWS_PER_ADDED_PART), work, bar):
                index.merge_from(faiss.read_index(str(part.folder / INDEX_FILE)), 0)
                largest = max(largest, part.facts["largest_norm"])
    return pack_for_fast_scan(key, index), largest
