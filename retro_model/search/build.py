"""Builds the index over the train chunks' vectors, through autofaiss.

Equal input gives an index of equal bytes: it is trained on a seeded random sample, the vectors are added
after that in their order, part by part (retro_model.jobs.engine), and how much of it a search looks at follows
from the recall it reaches (retro_model.search.tuning).

With a GPU build of faiss, k-means and the comparisons that put a row into its list are computed on the GPU.
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
from retro_model.core.progress import Progress
from retro_model.jobs.engine import Engine, Outcome, Part, row_parts, work_or_temporary
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
from retro_model.search.tuning import RESCORED, choose_effort

ROWS_PER_ADDED_PART = 1 << 18  # of a large index, in one part of the work: many lists' worth of rows


@dataclass(frozen=True)
class TrainJob:
    """Trains an empty index; see retro_model.jobs.engine."""

    embeddings: Path
    key: str
    config: IndexConfig
    device: str = "auto"
    kind: ClassVar[str] = "index"
    uses_gpus: ClassVar[bool] = False

    def open(self) -> Artifact:
        """The train vectors."""
        return Artifact.open(self.embeddings, "embeddings", verify=False)

    def facts(self, train: Artifact) -> dict[str, Any]:
        """What it was trained on, for and by."""
        config = self.config
        trained = {"key": self.key, "seed": config.seed, "train_points_per_list": config.train_points_per_list}
        return {"embeddings": train.fingerprint, **trained, "gpu": _trains_on_gpu(self.key, self.device)}

    def make(self, train: Artifact, folder: Path) -> Iterator[int]:
        """The index without a vector in it."""
        with ArtifactWriter(folder, self.kind) as writer:
            gpu = _trains_on_gpu(self.key, self.device)
            index = _trained_index(train["vectors"], self.key, self.config, gpu, folder)
            write_index(index, folder / INDEX_FILE)
            writer.add_file(INDEX_FILE)
            writer.facts.update(self.facts(train))
            yield 0


class _Trained(NamedTuple):
    train: Artifact
    trained: Artifact


@dataclass(frozen=True)
class AddJob:
    """Adds ranges of vectors to copies of a trained index; see retro_model.jobs.engine."""

    embeddings: Path
    trained: Path
    device: str = "auto"
    kind: ClassVar[str] = "index"
    uses_gpus: ClassVar[bool] = False

    def open(self) -> _Trained:
        """The train vectors and the trained index."""
        train = Artifact.open(self.embeddings, "embeddings", verify=False)
        return _Trained(train, Artifact.open(self.trained, "index", verify=False))

    def facts(self, opened: _Trained) -> dict[str, Any]:
        """What was added to what."""
        return {"embeddings": opened.train.fingerprint, "trained": opened.trained.fingerprint}

    def make(self, opened: _Trained, folder: Path, split: str, start: int, stop: int) -> Iterator[int]:
        """An index of rows `start` to `stop`, under their own numbers."""
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
    """Writes the index over the train embeddings to `out_folder` and returns what there is to say.

    Recall is measured with the valid embeddings as queries, which are not in the index. `device` is where
    faiss computes: auto, cpu or cuda; k-means rounds otherwise on a GPU than on a CPU. `engine` changes
    speed only; what was finished before a kill is found again in `work_folder`.

    Raises ConfigError where key, memory, recall or device cannot be had, MismatchError where the splits
    were embedded in different ways.
    """
    gpu = on_gpu(device)
    train = Artifact.open(embeddings_folder / "train", "embeddings")
    valid = Artifact.open(embeddings_folder / "valid", "embeddings")
    valid.require(**{name: train.facts[name] for name in SHAPING_FACTS})
    vectors = train["vectors"]
    key = _key(config, vectors)
    with work_or_temporary(work_folder, out_folder) as work, whole_folder(out_folder) as folder:
        index, largest_norm = _filled_index(train, key, config, engine or Engine(), work, device)
        queries = sample_rows(valid["vectors"], RECALL_QUERIES, config.seed)
        effort = choose_effort(key, index, vectors, queries, largest_norm, config.target_recall, gpu)
        print(f"index: {key} over {len(vectors):,} chunks{effort}", flush=True)
        with ArtifactWriter(folder, "index") as writer:
            write_index(index, folder / INDEX_FILE)
            writer.add_file(INDEX_FILE)
            writer.facts.update(
                embeddings=train.fingerprint,
                chunks=train.facts["chunks"],
                metric="l2",
                recall=effort.recall,
                **_facts(key, vectors, largest_norm, effort.probes, effort.rescored),
            )
        num_bytes = (folder / INDEX_FILE).stat().st_size
    code = code_of(key)
    metrics = {
        "recall": effort.recall,
        "lists": num_lists(key),
        "probes": effort.probes or 0,
        "code_bytes": code.num_bytes if code else 0,
        "rescored": effort.rescored or 0,
        "rows": len(vectors),
        "bytes_per_vector": num_bytes / len(vectors),
    }
    return Outcome(metrics, {"milliseconds_per_query": effort.milliseconds})


class BuiltIndex(NamedTuple):
    """A faiss index in memory, and the facts that `Index` needs of it."""

    index: Any
    facts: dict[str, Any]


def build_index(vectors: Float32Array, config: IndexConfig, probes: int | None = None) -> BuiltIndex:
    """An index over the rows of `vectors`, in their order, for whoever keeps no artifacts.

    `probes` is how many lists a search visits; None: as many as reach the target recall, for queries that
    are rows of the index themselves. Raises ConfigError as `make_index` does.
    """
    key = _key(config, vectors)
    if probes is not None and probes > max(num_lists(key), 1):
        raise ConfigError(f"nprobe: found {probes}, expected <= {max(num_lists(key), 1)}, the lists of {key}")
    index, largest_norm = _trained_index(vectors, key, config), 0.0
    for block in float_blocks(vectors):
        index.add(block)
        largest_norm = max(largest_norm, largest_square(block))
    index = packed(key, index)
    rescored: int | None = RESCORED[0]
    if num_lists(key):
        if probes is None:
            # Each query finds itself, in the first list it visits. So that the others reach the target, all
            # must reach more.
            target = config.target_recall + (1 - config.target_recall) / RECALL_AT
            queries = sample_rows(vectors, RECALL_QUERIES, config.seed)
            effort = choose_effort(key, index, vectors, queries, largest_norm, target)
            probes, rescored = effort.probes, effort.rescored
        index.nprobe = probes  # for whoever searches it without `Index`
    return BuiltIndex(index, _facts(key, vectors, largest_norm, probes if num_lists(key) else None, rescored))


def _key(config: IndexConfig, vectors: Vectors) -> str:
    """The key for these vectors, after a check of the memory."""
    key = choose_key(config, *vectors.shape)
    check_memory(config, key, *vectors.shape)
    return key


def _facts(key: str, vectors: Vectors, largest_norm: float, probes: int | None, rescored: int | None) -> dict[str, Any]:
    return {
        "key": key,
        "rows": vectors.shape[0],
        "dim": vectors.shape[1],
        "nprobe": probes,
        "rescored": rescored,
        "largest_norm": largest_norm,
    }


def _filled_index(
    train: Artifact, key: str, config: IndexConfig, engine: Engine, work: Path, device: str
) -> tuple[Any, float]:
    """The index with all rows, in their order, and the largest squared norm.

    Vectors are added part by part, and the parts put together in order; to an exact index, which has
    nothing to compute, at once.
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
    return packed(key, index), largest


def _trained_key(key: str) -> str:
    """What autofaiss is told to build: codes not packed for fast scan, nor ordered for another (np)."""
    code = code_of(key)
    return key if code is None else f"{key.partition(',')[0]},PQ{code.numbers}x{code.bits}np"


def packed(key: str, index: Any) -> Any:
    """The filled index as its key has it: codes of 4 bits in the order in which fast scan reads them.

    They are not trained and added so, because fast scan's lists, put together, differ from run to run.
    `index` is left without rows.
    """
    if not key.endswith("fs"):
        return index
    faiss = import_faiss()
    made = faiss.IndexIVFPQFastScan(index)
    # It holds on to `index`, whose centroids it uses, and so to the same codes in their other order.
    empty = faiss.ArrayInvertedLists(index.nlist, index.code_size)
    empty.this.disown()
    index.replace_invlists(empty, True)
    return made


def _trains_on_gpu(key: str, device: str) -> bool:
    """Whether k-means runs on the GPU: for lists of rows. faiss trains codes of 4 bits on the CPU only."""
    return on_gpu(device) and num_lists(key) > 0 and code_of(key) is None


def _trained_index(vectors: Vectors, key: str, config: IndexConfig, gpu: bool = False, work: Path | None = None) -> Any:
    """An empty index, trained by autofaiss on a seeded random sample; see `packed` for 4-bit codes.

    Left to itself, autofaiss trains on the first rows it meets, which are of few topics. The sample lies in
    the folder `work` meanwhile, or where temporary files lie, which may be memory.
    """
    sample = sample_rows(vectors, max(num_lists(key) * config.train_points_per_list, RECALL_AT), config.seed)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        save_array(Path(folder) / "sample.npy", sample)
        del sample  # autofaiss reads it again
        index = _build_with_autofaiss(folder, _trained_key(key), gpu)
    index.reset()
    return index


def _build_with_autofaiss(folder: str, key: str, gpu: bool) -> Any:
    """autofaiss's index over the `.npy` files in `folder`, with its logging kept for the error, if any."""
    faiss = import_faiss()
    with _captured_logging("autofaiss") as log:
        from autofaiss import build_index

        # Key and parameters are given, so that nothing is tuned by time; memory was checked before, and
        # a smaller figure here would make autofaiss train on less than the sample.
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
    """Sends what the named logger and the block's standard error say to a buffer; restores all logging."""
    root, logger, text = logging.getLogger(), logging.getLogger(name), io.StringIO()
    before = (root.handlers[:], root.level, logger.handlers[:], logger.propagate)
    root.handlers = [logging.NullHandler()]
    logger.handlers, logger.propagate = [logging.StreamHandler(text)], False
    try:
        with contextlib.redirect_stderr(text), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of what it imports, on newer Pythons
            yield text
    finally:
        root.handlers, root.level, logger.handlers, logger.propagate = before
