"""The search index over the database: built through autofaiss, as wide as its measured recall demands.

Vectors are compared by squared L2 distance. Equal input gives an index of equal bytes: it is trained on
a seeded random sample, the vectors are added after that in their order, and how many of its lists a
search visits is chosen by recall against exact search, never by a clock.

Only this module knows faiss, and imports it when it is needed.
"""

import contextlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from retro_model.artifacts import Artifact, ArtifactWriter, ShardedArray, whole_folder
from retro_model.config import Config, setting
from retro_model.engine import Engine, Part, row_parts, work_or_temporary
from retro_model.errors import ArtifactError, ConfigError, DamagedArtifactError
from retro_model.progress import Progress

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int64]

INDEX_FILE = "knn.index"

# Up to this many rows, exact search is cheap: 2,000 queries of 384 dimensions over 100,000 rows take about
# 3 seconds on two cores.
EXACT_ROWS = 200_000
RECALL_AT = 10  # neighbors a query that recall is measured by
RECALL_QUERIES = 1000
MIN_POINTS_PER_LIST = 39  # below, faiss calls a k-means clustering unreliable
ROWS_PER_BLOCK = 65_536  # added to an index, or compared by brute force, at once
ROWS_PER_ADDED_PART = 1 << 18  # of a large index, in one part of the work: many lists' worth of rows

# What shapes a vector: the same in all embeddings that are compared with each other.
SHAPING_FACTS = ("encoder", "pooling", "normalize", "max_tokens", "number_type", "dim")

_KEY = re.compile(r"Flat|IVF([1-9][0-9]*),Flat")


@dataclass(frozen=True)
class IndexConfig(Config, section="index"):
    """What is built and how good it must be.

    `key` is a faiss factory string, Flat or IVF<lists>,Flat; auto chooses by the number of rows (see
    `choose_key`). `target_recall` holds for the 10 nearest of held-out queries. `seed` draws the
    training sample of `train_points_per_list` rows for each list, and the queries. `max_memory_gb` is
    what the finished index may take, in 10^9 bytes.
    """

    key: str = setting("auto")
    target_recall: float = setting(0.95, above=0.0, maximum=1.0)
    train_points_per_list: int = setting(64, minimum=MIN_POINTS_PER_LIST, maximum=256)
    max_memory_gb: float = setting(4.0, above=0.0)
    seed: int = setting(0, minimum=0, below=2**32)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key != "auto" and not _KEY.fullmatch(self.key):
            raise ConfigError(f"index.key: found {self.key!r}, expected auto, Flat or IVF<lists>,Flat (IVF4096,Flat)")


def choose_key(config: IndexConfig, num_rows: int) -> str:
    """The factory string for `num_rows` rows.

    auto is exact search up to EXACT_ROWS, and from there on IVF with the power of two nearest to
    4 * sqrt(num_rows) lists: so a query compares itself with about as many centroids as rows of the
    lists it visits.

    Raises ConfigError for more lists than the rows can train.
    """
    if config.key != "auto":
        lists = num_lists(config.key)
        if lists * MIN_POINTS_PER_LIST > num_rows:
            raise ConfigError(
                f"index.key: {config.key} needs {lists * MIN_POINTS_PER_LIST:,} train chunks "
                f"({MIN_POINTS_PER_LIST} a list), found {num_rows:,}; use Flat, or fewer lists"
            )
        return config.key
    if num_rows <= EXACT_ROWS:
        return "Flat"
    return f"IVF{2 ** round(np.log2(4 * np.sqrt(num_rows)))},Flat"


def num_lists(key: str) -> int:
    """The number of lists of an IVF key; 0 for exact search."""
    matched = _KEY.fullmatch(key)
    assert matched is not None, key
    return int(matched[1] or 0)


def import_faiss() -> Any:
    """The module faiss, imported when it is needed.

    Its SWIG wrapper warns of itself while it loads, and where warnings are errors that ends the process
    with a segmentation fault.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "builtin type .* has no __module__ attribute", DeprecationWarning)
        import faiss
    return faiss


# ---- distances -----------------------------------------------------------------------------------------


def pair_distances(queries: FloatArray, vectors: FloatArray, places: IdArray) -> FloatArray:
    """Squared L2 distances (n, k) of `queries` (n, dim) to the rows `places` (n, k) of `vectors`.

    Each is computed for itself, so that it does not depend on what else is asked. inf where a place
    is -1.
    """
    faiss = import_faiss()
    queries, vectors = np.ascontiguousarray(queries), np.ascontiguousarray(vectors)
    places = np.ascontiguousarray(places, dtype=np.int64)
    assert queries.dtype == vectors.dtype == np.float32 and len(queries) == len(places)
    assert places.max(initial=-1) < len(vectors)
    distances = np.full(places.shape, np.inf, dtype=np.float32)
    if places.size:
        faiss.fvec_L2sqr_by_idx(
            *map(faiss.swig_ptr, (distances, queries, vectors, places)), queries.shape[1], *places.shape
        )
    distances[places < 0] = np.inf
    return distances


def rounding_margin(queries: FloatArray, largest_norm: float) -> FloatArray:
    """How far (n, 1) a distance that faiss reports can be from the one of `pair_distances`, at the most.

    faiss takes |q|^2 + |y|^2 - 2qy for many queries at once. Its three sums of `dim` float32 terms are
    each off by dim / 2 machine epsilons at the most; `largest_norm` is the largest |y|^2.
    """
    norms = np.einsum("nd,nd->n", queries, queries)[:, None] + np.float32(largest_norm)
    return np.asarray(queries.shape[1] * np.finfo(np.float32).eps * norms, dtype=np.float32)


def float_blocks(vectors: ShardedArray) -> Iterator[FloatArray]:
    """The rows in order, as float32, ROWS_PER_BLOCK at a time."""
    for start in range(0, len(vectors), ROWS_PER_BLOCK):
        yield vectors[start : start + ROWS_PER_BLOCK].astype(np.float32)


def exact_distances(queries: FloatArray, vectors: ShardedArray, k: int) -> FloatArray:
    """The k smallest distances (n, k) of each query to all rows, in order, by brute force."""
    faiss = import_faiss()
    nearest = np.full((len(queries), k), np.inf, dtype=np.float32)
    for block in float_blocks(vectors):
        distances, _ = faiss.knn(queries, block, min(k, len(block)))
        nearest = np.sort(np.concatenate([nearest, distances], axis=1), axis=1)[:, :k]
    return nearest


# ---- the index -----------------------------------------------------------------------------------------


class Index:
    """An index opened for searching.

    `probes` is how many of its `lists` a search visits unless told otherwise, 1 of 1 for an exact index.
    """

    def __init__(self, artifact: Artifact, index: Any) -> None:
        self.artifact = artifact
        self.rows: int = artifact.facts["rows"]
        self.dim: int = artifact.facts["dim"]
        self.largest_norm: float = artifact.facts["largest_norm"]
        self.lists: int = num_lists(artifact.facts["key"]) or 1
        self.probes: int = artifact.facts["nprobe"] or 1
        self._index = index

    @classmethod
    def open(cls, folder: Path | str) -> "Index":
        """Reads the index artifact in `folder`.

        Raises what `Artifact.open` does, and DamagedArtifactError where faiss cannot read it.
        """
        faiss = import_faiss()
        artifact = Artifact.open(folder, "index").require(metric="l2")
        path = artifact.folder / INDEX_FILE
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise DamagedArtifactError(f"{path} is no faiss index ({error}); run `dvc repro` (stage index)") from error
        found, expected = (index.ntotal, index.d), (artifact.facts["rows"], artifact.facts["dim"])
        if found != expected or index.metric_type != faiss.METRIC_L2:
            raise DamagedArtifactError(
                f"{path} holds {found} rows and dimensions, expected {expected} and metric l2; "
                "run `dvc repro` (stage index)"
            )
        return cls(artifact, index)

    def search(self, queries: FloatArray, k: int, probes: int | None = None) -> tuple[FloatArray, IdArray]:
        """The k nearest rows of each query: distances (n, k) and ids (n, k), nearest first.

        An id of -1, at distance inf, means that the lists visited hold no more rows. Distances are
        faiss's own: `pair_distances` has the ones that do not depend on the batch.
        """
        assert queries.dtype == np.float32 and queries.shape[1:] == (self.dim,), queries
        return _search(self._index, queries, k, self.probes if probes is None else probes)


def _search(index: Any, queries: FloatArray, k: int, probes: int) -> tuple[FloatArray, IdArray]:
    faiss = import_faiss()
    queries = np.ascontiguousarray(queries)
    if isinstance(index, faiss.IndexIVF):
        # Centroid by centroid: which lists a query visits must not depend on the rest of its batch.
        with _no_blas():
            distances, ids = index.search(queries, k, params=faiss.SearchParametersIVF(nprobe=probes))
    else:
        distances, ids = index.search(queries, k)
    distances[ids < 0] = np.inf
    return distances, ids


@contextlib.contextmanager
def _no_blas() -> Iterator[None]:
    faiss = import_faiss()
    threshold = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 2**31 - 1
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = threshold


# ---- building ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainJob:
    """Trains an empty index; see retro_model.engine."""

    embeddings: Path
    key: str
    config: IndexConfig
    kind: ClassVar[str] = "index"

    def open(self) -> Artifact:
        """The train vectors."""
        return Artifact.open(self.embeddings, "embeddings", verify=False)

    def facts(self, train: Artifact) -> dict[str, Any]:
        """What it was trained on, and for."""
        config = self.config
        trained = {"key": self.key, "seed": config.seed, "train_points_per_list": config.train_points_per_list}
        return {"embeddings": train.fingerprint, **trained}

    def make(self, train: Artifact, folder: Path) -> Iterator[int]:
        """The index without a vector in it."""
        with ArtifactWriter(folder, self.kind) as writer:
            index = _trained_index(train["vectors"], self.key, self.config)
            import_faiss().write_index(index, str(folder / INDEX_FILE))
            writer.add_file(INDEX_FILE)
            writer.facts.update(self.facts(train))
            yield 0


class _Trained(NamedTuple):
    train: Artifact
    trained: Artifact


@dataclass(frozen=True)
class AddJob:
    """Adds ranges of vectors to copies of a trained index; see retro_model.engine."""

    embeddings: Path
    trained: Path
    kind: ClassVar[str] = "index"

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
        with ArtifactWriter(folder, self.kind) as writer:
            for first in range(start, stop, ROWS_PER_BLOCK):
                block = opened.train["vectors"][first : min(first + ROWS_PER_BLOCK, stop)].astype(np.float32)
                index.add_with_ids(block, np.arange(first, first + len(block)))
                largest = max(largest, largest_square(block))
                yield len(block)
            faiss.write_index(index, str(folder / INDEX_FILE))
            writer.add_file(INDEX_FILE)
            writer.facts.update(**self.facts(opened), largest_norm=largest)


def make_index(
    embeddings_folder: Path,
    config: IndexConfig,
    out_folder: Path,
    *,
    engine: Engine | None = None,
    work_folder: Path | None = None,
) -> dict[str, float]:
    """Writes the index over the train embeddings to `out_folder` and returns what there is to say.

    Recall is measured with the valid embeddings as queries, which are not in the index. `engine` changes
    speed only; what was finished before a kill is found again in `work_folder`.

    Raises ConfigError where key, memory or recall cannot be had, MismatchError where the splits were
    embedded in different ways.
    """
    faiss = import_faiss()
    train = Artifact.open(embeddings_folder / "train", "embeddings")
    valid = Artifact.open(embeddings_folder / "valid", "embeddings")
    valid.require(**{name: train.facts[name] for name in SHAPING_FACTS})
    vectors = train["vectors"]
    key = choose_key(config, len(vectors))
    _check_memory(config, key, vectors)
    with work_or_temporary(work_folder, out_folder) as work, whole_folder(out_folder) as folder:
        index, largest_norm = _filled_index(train, key, config, engine or Engine(), work)
        queries = _sample(valid["vectors"], RECALL_QUERIES, config.seed)
        probes, recall = None, 1.0  # of exact search
        if num_lists(key):
            margin = rounding_margin(queries, largest_norm)
            probes, recall = choose_probes(index, vectors, queries, margin, config.target_recall)
        visited = f", {probes} lists a search" if probes else ""
        print(f"index: {key} over {len(vectors):,} chunks{visited}, recall@{RECALL_AT} {recall:.3f}", flush=True)
        with ArtifactWriter(folder, "index") as writer:
            faiss.write_index(index, str(folder / INDEX_FILE))
            writer.add_file(INDEX_FILE)
            num_bytes = (folder / INDEX_FILE).stat().st_size
            writer.facts.update(
                embeddings=train.fingerprint,
                chunks=train.facts["chunks"],
                key=key,
                metric="l2",
                rows=len(vectors),
                dim=vectors.shape[1],
                nprobe=probes,
                recall=recall,
                largest_norm=largest_norm,
            )
    return {
        "recall": recall,
        "lists": num_lists(key),
        "probes": probes or 0,
        "rows": len(vectors),
        "bytes_per_vector": num_bytes / len(vectors),
    }


def _filled_index(train: Artifact, key: str, config: IndexConfig, engine: Engine, work: Path) -> tuple[Any, float]:
    """The index with all rows, in their order, and the largest squared norm.

    Vectors are added part by part, and the parts put together in order; to an exact index, which has
    nothing to compute, at once.
    """
    faiss, vectors = import_faiss(), train["vectors"]
    with engine.open(TrainJob(train.folder.absolute(), key, config)) as running:
        (trained,) = running.make([Part("trained", (), {})], work)
    index, largest = faiss.read_index(str(trained.folder / INDEX_FILE)), 0.0
    with Progress("index", len(vectors), "chunk") as bar:
        if not num_lists(key):
            for block in float_blocks(vectors):
                index.add(block)
                largest = max(largest, largest_square(block))
                bar.update(len(block))
            return index, largest
        with engine.open(AddJob(train.folder.absolute(), trained.folder)) as running:
            for part in running.make(row_parts("added", len(vectors), ROWS_PER_ADDED_PART), work, bar):
                index.merge_from(faiss.read_index(str(part.folder / INDEX_FILE)), 0)
                largest = max(largest, part.facts["largest_norm"])
    return index, largest


def largest_square(block: FloatArray) -> float:
    """The largest squared norm of any row."""
    return float(np.einsum("nd,nd->n", block, block).max())


def _check_memory(config: IndexConfig, key: str, vectors: ShardedArray) -> None:
    lists = num_lists(key)
    needed = 4 * vectors.shape[1] * (len(vectors) + lists) + (8 * len(vectors) if lists else 0)  # IVF stores ids
    if needed > config.max_memory_gb * 1e9:
        raise ConfigError(
            f"index.max_memory_gb: found {config.max_memory_gb:g}, expected >= {needed / 1e9:.3g} "
            f"for {key} over {len(vectors):,} vectors of {vectors.shape[1]} dimensions"
        )


def _sample(vectors: ShardedArray, num_rows: int, seed: int) -> FloatArray:
    """`num_rows` rows drawn without repetition, or all there are, in random order."""
    rows = np.random.default_rng(seed).permutation(len(vectors))[:num_rows]
    return vectors[rows].astype(np.float32)


def _trained_index(vectors: ShardedArray, key: str, config: IndexConfig) -> Any:
    """An empty index, trained by autofaiss on a seeded random sample.

    Left to itself, autofaiss trains on the first rows it meets, which are of few topics.
    """
    sample = _sample(vectors, max(num_lists(key) * config.train_points_per_list, RECALL_AT), config.seed)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "sample.npy", sample)
        index = _build_with_autofaiss(folder, key)
    index.reset()
    return index


def _build_with_autofaiss(folder: str, key: str) -> Any:
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
            index_param="nprobe=1" if num_lists(key) else "",
            metric_type="l2",
            max_index_memory_usage="1T",
            current_memory_available="2T",
            nb_cores=faiss.omp_get_max_threads(),
            verbose=logging.ERROR,
        )
    if index is None:
        raise ArtifactError(f"index: autofaiss could not build {key}: {' '.join(log.getvalue().split())}")
    return index


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


def choose_probes(
    index: Any, vectors: ShardedArray, queries: FloatArray, margin: FloatArray, target_recall: float
) -> tuple[int, float]:
    """The fewest lists of an IVF index to visit that reach the target recall, and that recall.

    Recall is the share of the found that are no farther than the true RECALL_AT-th nearest, give or take
    the `margin` (n, 1) of rounding: among equally distant rows any will do.
    """
    k = min(RECALL_AT, len(vectors))
    exact = exact_distances(queries, vectors, k)

    def recall(probes: int) -> float:
        return float((_search(index, queries, k, probes)[0] <= exact[:, -1:] + margin).mean())

    low, high = 1, index.nlist  # recall grows with the lists visited, and all of them are exact search
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if recall(middle) >= target_recall else (middle + 1, high)
    return low, recall(low)
