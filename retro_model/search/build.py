"""Build the faiss index over the train chunks' vectors, with autofaiss.

Equal input gives equal bytes: the index is trained on a seeded random sample, vectors are then added in order,
part by part (retro_model.jobs.engine), and the search settings depend on measured recall, not on time
(retro_model.search.tuning).

With a GPU build of faiss, k-means and the assignment of rows to lists run on the GPU.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from retro_model.core.arrays import Float32Array
from retro_model.core.artifacts import Artifact, ArtifactWriter, save_array, whole_folder
from retro_model.core.errors import ArtifactError, ConfigError
from retro_model.core.printable import say
from retro_model.core.progress import Progress
from retro_model.jobs.engine import Engine
from retro_model.jobs.job import Outcome, Part, row_parts, work_or_temporary
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
        """Fingerprint of the embeddings, the training settings, and whether k-means runs on a GPU."""
        config = self.config
        trained = {"key": self.key, "seed": config.seed, "train_points_per_list": config.train_points_per_list}
        return {"embeddings": train.fingerprint, **trained, "gpu": _trains_on_gpu(self.key, self.device)}

    def make(self, train: Artifact, folder: Path) -> Iterator[int]:
        """Writes the trained index, without vectors."""
        with ArtifactWriter(folder, self.kind) as writer:
            gpu = _trains_on_gpu(self.key, self.device)
            index = _train_index(train["vectors"], self.key, self.config, gpu, folder)
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
        say(f"index: {key} over {len(vectors):,} chunks{settings}")
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
    index, largest_norm = _train_index(vectors, key, config), 0.0
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


def _training_key(key: str) -> str:
    """The key to train with autofaiss: codes in the plain layout, without polysemous training (np)."""
    code = code_of(key)
    return key if code is None else f"{key.partition(',')[0]},PQ{code.numbers}x{code.bits}np"


def pack_for_fast_scan(key: str, index: Any) -> Any:
    """Converts a filled index with 4-bit codes to fast scan's layout; returns any other index as it is.

    The index is trained and filled in the plain layout because merging fast-scan lists gives different bytes
    from run to run. The conversion empties `index`.
    """
    if not key.endswith("fs"):
        return index
    faiss = import_faiss()
    fast_scan = faiss.IndexIVFPQFastScan(index)
    # The new index keeps a reference to `index` for its centroids. Drop the codes in `index`, or they would stay
    # in memory twice.
    empty = faiss.ArrayInvertedLists(index.nlist, index.code_size)
    empty.this.disown()
    index.replace_invlists(empty, True)
    return fast_scan


def _trains_on_gpu(key: str, device: str) -> bool:
    """Whether k-means runs on the GPU: only for IVF<lists>,Flat; faiss trains 4-bit codes on the CPU only."""
    return on_gpu(device) and num_lists(key) > 0 and code_of(key) is None


def _train_index(vectors: Vectors, key: str, config: IndexConfig, gpu: bool = False, work: Path | None = None) -> Any:
    """An empty index, trained by autofaiss on a seeded random sample; see `pack_for_fast_scan` for 4-bit codes.

    By default autofaiss trains on the first rows, which cover few topics. The sample is written below `work`,
    or to the system's temporary folder, which may be in memory.
    """
    sample = sample_rows(vectors, max(num_lists(key) * config.train_points_per_list, RECALL_AT), config.seed)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        save_array(Path(folder) / "sample.npy", sample)
        del sample  # free the memory: autofaiss reads the sample from the file
        index = _build_with_autofaiss(folder, _training_key(key), gpu)
    index.reset()
    return index


def _build_with_autofaiss(folder: str, key: str, gpu: bool) -> Any:
    """autofaiss's index over the `.npy` files in `folder`; its log is shown only in the error message."""
    faiss = import_faiss()
    with _captured_logging("autofaiss") as log:
        from autofaiss import build_index

        # A given key and parameters keep autofaiss from tuning by time. Memory was checked before; with a smaller
        # limit here, autofaiss would train on less than the sample.
        index, _ = build_index(
            folder,
            save_on_disk=False,
            index_key=key,
            index_param="nprobe=1" if key != "Flat" else "",
            metric_type="l2",
            max_index_memory_usage="1T",
            current_memory_available="2T",
            nb_cores=faiss.omp_get_max_threads(),
            use_gpu=gpu,
            verbose=logging.ERROR,
        )
    if index is None:
        raise ArtifactError(f"index: autofaiss could not build {key}: {' '.join(log.getvalue().split())}")
    return faiss.index_gpu_to_cpu(index) if gpu else index


@contextlib.contextmanager
def _captured_logging(name: str) -> Iterator[io.StringIO]:
    """Collects the named logger's messages and standard error in a buffer; restores logging afterwards."""
    root, logger, text = logging.getLogger(), logging.getLogger(name), io.StringIO()
    before = (root.handlers[:], root.level, logger.handlers[:], logger.propagate)
    root.handlers = [logging.NullHandler()]
    logger.handlers, logger.propagate = [logging.StreamHandler(text)], False
    try:
        with contextlib.redirect_stderr(text), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from autofaiss's imports on newer Pythons
            yield text
    finally:
        root.handlers, root.level, logger.handlers, logger.propagate = before
