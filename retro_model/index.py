"""The search index over the database: built through autofaiss, as wide as its measured recall demands.

Vectors are compared by squared L2 distance. Equal input gives an index of equal bytes: it is trained on
a seeded random sample, the vectors are added after that in their order, and how many of its lists a
search visits is chosen by recall against exact search, never by a clock.

Three kinds: Flat compares a query with all rows. IVF<lists>,Flat compares it with the rows of the lists
whose centroids are nearest. IVF<lists>,PQ<m> does so with codes of the rows, of m numbers each, and its
distances only choose candidates: those are scored again from the stored vectors.

With a GPU build of faiss, k-means, lists and comparisons are computed on the GPU; codes are compared on
the CPU. Which lists a row lies in and a query visits does not depend on that, nor on batches or threads.

Only this module knows faiss, and imports it when it is needed.
"""

import contextlib
import functools
import io
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
BoolArray = npt.NDArray[np.bool_]

INDEX_FILE = "knn.index"

# Up to this many rows, exact search is cheap: 2,000 queries of 384 dimensions over 100,000 rows take about
# 3 seconds on two cores.
EXACT_ROWS = 200_000
RECALL_AT = 10  # neighbors a query that recall is measured by
RECALL_QUERIES = 1000
MIN_POINTS_PER_LIST = 39  # below, faiss calls a k-means clustering unreliable
MAX_POINTS_PER_LIST = 100  # autofaiss trains on no more
CODED_DIMS = (2, 4, 8, 16)  # how many numbers of a vector share one code of 4 bits, finest first
RESCORED = (256, 512, 1024, 2048, 4096)  # how many candidates by code may be scored again
ROWS_PER_BLOCK = 65_536  # added to an index, or compared by brute force, at once
ROWS_PER_ADDED_PART = 1 << 18  # of a large index, in one part of the work: many lists' worth of rows
LISTS_SURPLUS = 8  # centroids fetched beyond those wanted, so that rounding rarely leaves a doubt
ROWS_AT_ONCE = 16_384  # stored rows gathered and turned to float32 at once
PAIRS_AT_ONCE = 1 << 22  # distances or candidates in memory
GPU_MOST = 2048  # neighbors, and lists, that a GPU search can be asked for

# What shapes a vector: the same in all embeddings that are compared with each other.
SHAPING_FACTS = ("encoder", "pooling", "normalize", "max_tokens", "number_type", "dim")

_KEY = re.compile(r"Flat|IVF([1-9][0-9]*),(?:Flat|PQ([1-9][0-9]*)(x8|x4fs)?)")
_KEYS = "Flat, IVF<lists>,Flat, IVF<lists>,PQ<m>x4fs or IVF<lists>,PQ<m>x8"


@dataclass(frozen=True)
class IndexConfig(Config, section="index"):
    """What is built and how good it must be.

    `key` is a faiss factory string: Flat, IVF<lists>,Flat, or with codes, IVF<lists>,PQ<m>x4fs (m numbers
    of 4 bits a row) or IVF<lists>,PQ<m>x8 (m bytes); auto chooses (see `choose_key`). `target_recall`
    holds for the 10 nearest of held-out queries. `seed` draws the training sample of
    `train_points_per_list` rows for each list, and the queries. `max_memory_gb` is what the finished
    index may take, in 10^9 bytes.
    """

    key: str = setting("auto")
    target_recall: float = setting(0.95, above=0.0, maximum=1.0)
    train_points_per_list: int = setting(64, minimum=MIN_POINTS_PER_LIST, maximum=MAX_POINTS_PER_LIST)
    max_memory_gb: float = setting(4.0, above=0.0)
    seed: int = setting(0, minimum=0, below=2**32)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key != "auto" and not _KEY.fullmatch(self.key):
            raise ConfigError(f"index.key: found {self.key!r}, expected auto, {_KEYS} (IVF4096,Flat)")


def choose_key(config: IndexConfig, num_rows: int, dim: int) -> str:
    """The factory string for `num_rows` rows of `dim` numbers.

    auto is exact search up to EXACT_ROWS, and from there on IVF with the power of two nearest to
    4 * sqrt(num_rows) lists: so a query compares itself with about as many centroids as rows of the
    lists it visits. Those hold the rows themselves while that fits index.max_memory_gb, and else codes:
    4 bits for every 2 numbers of a row, or for every 4, 8 or 16, the finest that fits; the coarsest
    where none does.

    Raises ConfigError for more lists or codes than the rows can train, and for codes that do not divide
    the dimensions.
    """
    if config.key != "auto":
        _check_trainable(config, num_rows, dim)
        return config.key
    if num_rows <= EXACT_ROWS:
        return "Flat"
    lists = f"IVF{2 ** round(np.log2(4 * np.sqrt(num_rows)))}"
    widths = [width for width in CODED_DIMS if dim % width == 0] or [1]
    keys = [f"{lists},Flat", *(f"{lists},PQ{dim // width}x4fs" for width in widths)]
    return next((key for key in keys if needed_bytes(key, num_rows, dim) <= config.max_memory_gb * 1e9), keys[-1])


def _check_trainable(config: IndexConfig, num_rows: int, dim: int) -> None:
    key, lists = config.key, num_lists(config.key)
    if lists * MIN_POINTS_PER_LIST > num_rows:
        raise ConfigError(
            f"index.key: {key} needs {lists * MIN_POINTS_PER_LIST:,} train chunks "
            f"({MIN_POINTS_PER_LIST} a list), found {num_rows:,}; use Flat, or fewer lists"
        )
    if code := _code(key):
        found, needed = min(lists * config.train_points_per_list, num_rows), MIN_POINTS_PER_LIST * 2**code.bits
        if found < needed:
            raise ConfigError(
                f"index.key: the codes of {key} train on {needed:,} chunks, found {found:,} "
                f"({config.train_points_per_list} a list of {num_rows:,}); use more lists, a higher "
                "index.train_points_per_list, or IVF<lists>,Flat"
            )
        if dim % code.numbers:
            raise ConfigError(
                f"index.key: {key} has {code.numbers} codes a row, expected a divisor of its {dim} numbers"
            )


def num_lists(key: str) -> int:
    """The number of lists of an IVF key; 0 for exact search."""
    matched = _KEY.fullmatch(key)
    assert matched is not None, key
    return int(matched[1] or 0)


class _Code(NamedTuple):
    numbers: int
    bits: int

    @property
    def num_bytes(self) -> int:
        return (self.numbers * self.bits + 7) // 8


def _code(key: str) -> _Code | None:
    """What a key's codes are; None where the index holds the rows themselves."""
    matched = _KEY.fullmatch(key)
    assert matched is not None, key
    return _Code(int(matched[2]), 4 if matched[3] == "x4fs" else 8) if matched[2] else None


def needed_bytes(key: str, num_rows: int, dim: int) -> int:
    """What an index takes in memory, at the most: rows or codes, ids, centroids."""
    lists, code = num_lists(key), _code(key)
    ids = 8 * num_rows if lists else 0
    if code is None:
        return 4 * dim * (num_rows + lists) + ids
    padded = num_rows + 31 * lists if code.bits == 4 else num_rows  # fast scan compares 32 codes at once
    return code.num_bytes * padded + ids + 4 * dim * lists + 4 * dim * (1 << code.bits)


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
        yield as_float32(vectors[start : start + ROWS_PER_BLOCK])


def exact_distances(queries: FloatArray, vectors: ShardedArray, k: int) -> FloatArray:
    """The k smallest distances (n, k) of each query to all rows, in order, by brute force."""
    faiss = import_faiss()
    nearest = np.full((len(queries), k), np.inf, dtype=np.float32)
    for block in float_blocks(vectors):
        distances, _ = faiss.knn(queries, block, min(k, len(block)))
        nearest = np.sort(np.concatenate([nearest, distances], axis=1), axis=1)[:, :k]
    return nearest


def as_float32(rows: npt.NDArray[Any], into: FloatArray | None = None) -> FloatArray:
    """Stored rows (n, dim), of half or single precision, in single precision; `into` this array, where given."""
    if into is None:
        into = np.empty(rows.shape, dtype=np.float32)
    if rows.dtype != np.float16:
        into[:] = rows
        return into
    faiss = import_faiss()  # whose conversion is several times as fast as numpy's
    codec = faiss.ScalarQuantizer(rows.shape[1], faiss.ScalarQuantizer.QT_fp16)
    codes = np.ascontiguousarray(rows).view(np.uint8)
    codec.decode_c(faiss.swig_ptr(codes), faiss.swig_ptr(into), len(rows))
    return into


def stored_distances(queries: FloatArray, vectors: ShardedArray, ids: IdArray) -> FloatArray:
    """`pair_distances` (n, k) of `queries` to the rows `ids` (n, k) of the stored `vectors`.

    Memory is taken once, not for each block: fresh pages cost more than what is done with them.
    """
    distances = np.empty(ids.shape, dtype=np.float32)
    step = max(1, ROWS_AT_ONCE // max(1, ids.shape[1]))
    most = min(step, len(ids)) * ids.shape[1]
    stored = np.empty((most, vectors.shape[1]), dtype=vectors.dtype)
    single = np.empty((most, vectors.shape[1]), dtype=np.float32)
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        rows, places = _distinct(ids[part])
        first = np.searchsorted(rows, 0)  # behind -1, where there is one
        rows, places = rows[first:], places - first
        _take_rows(vectors, rows, stored[: len(rows)])
        found = as_float32(stored[: len(rows)], single[: len(rows)])
        distances[part] = pair_distances(queries[part], found, np.maximum(places, -1))
    return distances


def _distinct(ids: IdArray) -> tuple[IdArray, IdArray]:
    """The distinct ids in order, and where each one of `ids` is among them: np.unique, several times as fast."""
    if ids.max(initial=0) >= 2**31:
        distinct, places = np.unique(ids, return_inverse=True)
        return distinct, places.reshape(ids.shape)
    pairs = (ids.ravel() << 32) | np.arange(ids.size)
    pairs.sort()
    ordered, origins = pairs >> 32, pairs & 0xFFFFFFFF
    new = np.ones(len(ordered), dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    places = np.empty(ids.size, dtype=np.int64)
    places[origins] = np.cumsum(new) - 1
    return ordered[new], places.reshape(ids.shape)


def _take_rows(vectors: ShardedArray, rows: IdArray, into: npt.NDArray[Any]) -> None:
    """Copies `rows`, which ascend, from the shards they lie in."""
    if not len(rows):
        return
    assert rows[0] >= 0 and rows[-1] < len(vectors), (rows[0], rows[-1])
    shards = vectors.shards() if isinstance(vectors, ShardedArray) else [vectors]
    size = len(shards[0])
    for number in range(rows[0] // size, rows[-1] // size + 1):
        start, stop = np.searchsorted(rows, [number * size, (number + 1) * size])
        # Both sides of `clip` are checked above; the other modes take by way of one more copy.
        np.take(shards[number], rows[start:stop] - number * size, axis=0, out=into[start:stop], mode="clip")


def smallest(distances: FloatArray, ids: IdArray, k: int) -> tuple[FloatArray, IdArray]:
    """The k smallest (n, k) of each row of `distances` (n, c) with their `ids`, by (distance, id).

    Where a distance is inf the id becomes -1; so does what a row has too little of.
    """
    width = min(k, ids.shape[1])
    if ids.max(initial=0) < 2**32:
        # Both in one number: floats sort like their bits, negative ones like the complement of them.
        bits = (distances + np.float32(0)).view(np.int32)
        bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)
        pairs = (bits.astype(np.int64) << 32) | (ids & 0xFFFFFFFF)
        pairs.sort(axis=1)
        pairs = pairs[:, :width]
        ids, bits = pairs & 0xFFFFFFFF, (pairs >> 32).astype(np.int32)
        bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)
        distances = bits.view(np.float32)
    else:
        order = np.lexsort((ids, distances), axis=-1)[:, :width]
        ids, distances = np.take_along_axis(ids, order, axis=1), np.take_along_axis(distances, order, axis=1)
    ids = np.where(distances == np.inf, np.int64(-1), ids)
    if width == k:
        return distances, ids
    missing = ((0, 0), (0, k - width))
    return np.pad(distances, missing, constant_values=np.inf), np.pad(ids, missing, constant_values=-1)


# ---- the GPU -------------------------------------------------------------------------------------------


def on_gpu(device: str) -> bool:
    """Whether faiss computes on a GPU: for `auto` where it can, for `cuda` always, for `cpu` never.

    Raises ConfigError where cuda is asked for and faiss has no GPU, or no GPU functions.
    """
    assert device in ("auto", "cpu", "cuda"), device
    faiss = import_faiss()
    able = hasattr(faiss, "StandardGpuResources")
    there = able and faiss.get_num_gpus() > 0
    if device == "cuda" and not there:
        why = "faiss sees no GPU here" if able else "this faiss has no GPU functions; run `make install GPU=1`"
        raise ConfigError(f"runtime.device: found cuda, expected auto or cpu: {why}")
    return device != "cpu" and there


@functools.cache
def _gpu_resources() -> Any:
    return import_faiss().StandardGpuResources()


def _to_gpu(index: Any) -> Any:
    """A copy on the GPU, in single precision, so that what it reports is off by rounding only."""
    return import_faiss().index_cpu_to_gpu(_gpu_resources(), 0, index)


# ---- the index -----------------------------------------------------------------------------------------


class Centroids:
    """The centroids of an IVF index: which lists a row lies in, and a query visits.

    That is by (distance, list), whatever the batch, the threads and the device.
    """

    def __init__(self, index: Any, gpu: bool = False) -> None:
        self._quantizer = import_faiss().downcast_index(index.quantizer)
        self._index = index  # which owns it
        self._vectors = _flat_rows(self._quantizer)
        self._largest_norm = largest_square(self._vectors)
        self._searched = _to_gpu(self._quantizer) if gpu else self._quantizer

    def nearest(self, queries: FloatArray, count: int) -> tuple[FloatArray, IdArray]:
        """Distances and numbers (n, count) of the lists whose centroids are nearest to each row."""
        fetched = min(len(self._vectors), count + LISTS_SURPLUS)
        searched = self._searched if fetched <= GPU_MOST else self._quantizer
        reported, lists = searched.search(queries, fetched)
        distances, lists = smallest(pair_distances(queries, self._vectors, lists), lists, count)
        if fetched < len(self._vectors):
            margin = rounding_margin(queries, self._largest_norm)[:, 0]
            (unsure,) = np.nonzero(reported[:, -1] <= distances[:, -1] + margin)
            step = max(1, PAIRS_AT_ONCE // len(self._vectors))
            for start in range(0, len(unsure), step):
                rows = unsure[start : start + step]
                every = np.tile(np.arange(len(self._vectors)), (len(rows), 1))
                distances[rows], lists[rows] = smallest(
                    pair_distances(queries[rows], self._vectors, every), every, count
                )
        return distances, lists

    def add(self, vectors: FloatArray, ids: IdArray) -> None:
        """Adds rows to the index that the centroids are of; a 4-bit one is not packed for fast scan yet."""
        lists = self.nearest(vectors, 1)[1][:, 0]
        swig_ptr = import_faiss().swig_ptr
        arrays = [np.ascontiguousarray(array) for array in (vectors, ids, lists)]
        self._index.add_core(len(vectors), *map(swig_ptr, arrays))


def _flat_rows(index: Any) -> FloatArray:
    """The rows of an exact index, where they lie."""
    faiss = import_faiss()
    rows: FloatArray = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    return rows


class Index:
    """An index opened for searching.

    `probes` is how many of its `lists` a search visits unless told otherwise, 1 of 1 for an exact index.
    `rescored` is None where reported distances are those of the rows, give or take rounding, and else
    how many candidates by code are to be scored again. `stored` are the rows of an exact index. `alone`
    says that distances are reported without rounding: each computed for itself, as by `pair_distances`.
    """

    def __init__(self, artifact: Artifact, index: Any, gpu: bool = False) -> None:
        facts = artifact.facts
        self.artifact = artifact
        self.rows: int = facts["rows"]
        self.dim: int = facts["dim"]
        self.largest_norm: float = facts["largest_norm"]
        self.lists: int = num_lists(facts["key"]) or 1
        self.probes: int = facts["nprobe"] or 1
        self.rescored: int | None = facts["rescored"] if _code(facts["key"]) else None
        self._searcher = _Searcher(index, gpu)
        self.stored = None if num_lists(facts["key"]) else _flat_rows(index)
        # Rows of lists are compared one by one on the CPU.
        self.alone = isinstance(index, import_faiss().IndexIVFFlat) and not gpu

    @classmethod
    def open(cls, folder: Path | str, device: str = "cpu") -> "Index":
        """Reads the index artifact in `folder`; `device` is where it searches: auto, cpu or cuda.

        Raises what `Artifact.open` does, DamagedArtifactError where faiss cannot read it, and ConfigError
        where cuda is asked for and faiss has none.
        """
        faiss, gpu = import_faiss(), on_gpu(device)
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
        return cls(artifact, index, gpu)

    def search(self, queries: FloatArray, k: int, probes: int | None = None) -> tuple[FloatArray, IdArray]:
        """The k nearest rows of each query: distances (n, k) and ids (n, k), nearest first.

        An id of -1, at distance inf, means that the lists visited hold no more rows. Distances are
        faiss's own: `pair_distances` has the ones that do not depend on the batch.
        """
        assert queries.dtype == np.float32 and queries.shape[1:] == (self.dim,), queries
        return self._searcher.search(queries, k, self.probes if probes is None else probes)


class _Searcher:
    """A faiss index, on the GPU where that is asked for and it holds no codes."""

    def __init__(self, index: Any, gpu: bool = False) -> None:
        faiss = import_faiss()
        self._index = index
        self._centroids = Centroids(index, gpu) if isinstance(index, faiss.IndexIVF) else None
        # Fast scan and the GPU use all threads themselves; other lists are searched by one where they are given.
        self._in_threads = isinstance(index, faiss.IndexIVF) and not isinstance(index, faiss.IndexIVFFastScan)
        exact = isinstance(index, (faiss.IndexFlat, faiss.IndexIVFFlat))
        self._on_gpu = _to_gpu(index) if gpu and exact else None

    def search(self, queries: FloatArray, k: int, probes: int) -> tuple[FloatArray, IdArray]:
        queries = np.ascontiguousarray(queries)
        on_gpu = self._on_gpu is not None and max(k, probes) <= GPU_MOST
        index: Any = self._on_gpu if on_gpu else self._index
        if self._centroids is None:
            distances, ids = index.search(queries, k)
        else:
            to_lists, lists = self._centroids.nearest(queries, probes)
            index.nprobe = probes
            num_threads = import_faiss().omp_get_max_threads() if self._in_threads and not on_gpu else 1
            slices = [part for part in np.array_split(np.arange(len(queries)), num_threads) if len(part)]

            def search(part: IdArray) -> tuple[FloatArray, IdArray]:
                found: tuple[FloatArray, IdArray] = index.search_preassigned(
                    queries[part], k, lists[part], to_lists[part]
                )
                return found

            if len(slices) > 1:
                with ThreadPoolExecutor(len(slices)) as pool:
                    found = list(pool.map(search, slices))
                distances, ids = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
            else:
                distances, ids = index.search_preassigned(queries, k, lists, to_lists)
        distances[ids < 0] = np.inf
        return distances, ids


Search = Callable[[FloatArray, int], tuple[FloatArray, IdArray]]


def nearest_by_code(
    search: Search,
    queries: FloatArray,
    count: int,
    surplus: int,
    num_rows: int,
    excluded: Callable[[IdArray, IdArray], BoolArray] | None = None,
) -> IdArray:
    """The `count` nearest (n, count) that `search` reports, by (distance, id), -1 behind the last one.

    `search(queries, k)` is of an index of `num_rows` rows and reports the k nearest in order, equal ones in
    any order and choice. Rows for which `excluded(numbers of queries, ids)` holds do not count. `surplus`
    changes speed only.
    """
    found = np.full((len(queries), count), -1, dtype=np.int64)
    pending, fetched = np.arange(len(queries)), count + surplus
    while len(pending):
        fetched = min(fetched, num_rows)
        uncertain = []
        for start in range(0, len(pending), max(1, PAIRS_AT_ONCE // fetched)):
            part = pending[start : start + max(1, PAIRS_AT_ONCE // fetched)]
            reported, ids = search(queries[part], fetched)
            whole = (ids[:, -1:] < 0) | (fetched == num_rows)
            # Of those as far as the last one, others may not have been fetched.
            counts = (ids >= 0) & (whole | (reported < reported[:, -1:]))
            if excluded is not None:
                counts &= ~excluded(part, ids)
            found[part] = smallest(np.where(counts, reported, np.float32(np.inf)), ids, count)[1]
            uncertain.append(part[~whole[:, 0] & (found[part, -1] < 0)])
        pending, fetched = np.concatenate(uncertain), 2 * fetched
    return found


# ---- building ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainJob:
    """Trains an empty index; see retro_model.engine."""

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
            index = _trained_index(train["vectors"], self.key, self.config, gpu)
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
            faiss.write_index(index, str(folder / INDEX_FILE))
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
) -> dict[str, float]:
    """Writes the index over the train embeddings to `out_folder` and returns what there is to say.

    Recall is measured with the valid embeddings as queries, which are not in the index. `device` is where
    faiss computes: auto, cpu or cuda; k-means rounds otherwise on a GPU than on a CPU. `engine` changes
    speed only; what was finished before a kill is found again in `work_folder`.

    Raises ConfigError where key, memory, recall or device cannot be had, MismatchError where the splits
    were embedded in different ways.
    """
    faiss, gpu = import_faiss(), on_gpu(device)
    train = Artifact.open(embeddings_folder / "train", "embeddings")
    valid = Artifact.open(embeddings_folder / "valid", "embeddings")
    valid.require(**{name: train.facts[name] for name in SHAPING_FACTS})
    vectors = train["vectors"]
    key = choose_key(config, *vectors.shape)
    _check_memory(config, key, vectors)
    with work_or_temporary(work_folder, out_folder) as work, whole_folder(out_folder) as folder:
        index, largest_norm = _filled_index(train, key, config, engine or Engine(), work, device)
        queries = _sample(valid["vectors"], RECALL_QUERIES, config.seed)
        effort = choose_effort(key, index, vectors, queries, largest_norm, config.target_recall, gpu)
        print(f"index: {key} over {len(vectors):,} chunks{effort}", flush=True)
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
                nprobe=effort.probes,
                rescored=effort.rescored,
                recall=effort.recall,
                largest_norm=largest_norm,
            )
    code = _code(key)
    return {
        "recall": effort.recall,
        "lists": num_lists(key),
        "probes": effort.probes or 0,
        "code_bytes": code.num_bytes if code else 0,
        "rescored": effort.rescored or 0,
        "rows": len(vectors),
        "bytes_per_vector": num_bytes / len(vectors),
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
    code = _code(key)
    return key if code is None else f"{key.partition(',')[0]},PQ{code.numbers}x{code.bits}np"


def packed(key: str, index: Any) -> Any:
    """The filled index as its key has it: codes of 4 bits in the order in which fast scan reads them.

    They are not trained and added so, because fast scan's lists, put together, differ from run to run.
    """
    return import_faiss().IndexIVFPQFastScan(index) if key.endswith("fs") else index


def largest_square(block: FloatArray) -> float:
    """The largest squared norm of any row."""
    return float(np.einsum("nd,nd->n", block, block).max())


def _check_memory(config: IndexConfig, key: str, vectors: ShardedArray) -> None:
    needed = needed_bytes(key, *vectors.shape)
    if needed > config.max_memory_gb * 1e9:
        raise ConfigError(
            f"index.max_memory_gb: found {config.max_memory_gb:g}, expected >= {needed / 1e9:.3g} "
            f"for {key} over {len(vectors):,} vectors of {vectors.shape[1]} dimensions"
        )


def _sample(vectors: ShardedArray, num_rows: int, seed: int) -> FloatArray:
    """`num_rows` rows drawn without repetition, or all there are, in random order."""
    rows = np.random.default_rng(seed).choice(len(vectors), min(num_rows, len(vectors)), replace=False)
    return as_float32(vectors[rows])


def _trains_on_gpu(key: str, device: str) -> bool:
    """Whether k-means runs on the GPU: for lists of rows. faiss trains codes of 4 bits on the CPU only."""
    return on_gpu(device) and num_lists(key) > 0 and _code(key) is None


def _trained_index(vectors: ShardedArray, key: str, config: IndexConfig, gpu: bool = False) -> Any:
    """An empty index, trained by autofaiss on a seeded random sample; see `packed` for 4-bit codes.

    Left to itself, autofaiss trains on the first rows it meets, which are of few topics.
    """
    sample = _sample(vectors, max(num_lists(key) * config.train_points_per_list, RECALL_AT), config.seed)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "sample.npy", sample)
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


# ---- how much is searched ------------------------------------------------------------------------------


class Effort(NamedTuple):
    """How much a search looks at, the recall that it so reaches, and the milliseconds that a query took.

    `probes` is None for exact search, `rescored` where there are no codes. The clock decides nothing.
    """

    probes: int | None
    rescored: int | None
    recall: float
    milliseconds: float

    def __str__(self) -> str:
        visited = f", {self.probes} lists a search" if self.probes else ""
        again = f", {self.rescored} scored again" if self.rescored else ""
        return f"{visited}{again}, recall@{RECALL_AT} {self.recall:.3f}, {self.milliseconds:.3g} ms a query"


def choose_effort(
    key: str,
    index: Any,
    vectors: ShardedArray,
    queries: FloatArray,
    largest_norm: float,
    target_recall: float,
    gpu: bool = False,
) -> Effort:
    """The least effort that reaches the target recall for held-out `queries`.

    With codes, `rescored` is the smallest of RESCORED with which some number of lists reaches the target,
    measured after candidates were scored again.

    Raises ConfigError where the codes are too coarse for that.
    """
    searcher, k = _Searcher(index, gpu), min(RECALL_AT, len(vectors))
    if not num_lists(key):
        return Effort(None, None, 1.0, _milliseconds(lambda: searcher.search(queries, k, 1), len(queries)))
    exact = exact_distances(queries, vectors, k)[:, -1:] + rounding_margin(queries, largest_norm)

    def nearest(probes: int, rescored: int | None) -> FloatArray:
        def search(rows: FloatArray, count: int) -> tuple[FloatArray, IdArray]:
            return searcher.search(rows, count, probes)

        if rescored is None:
            return search(queries, k)[0]
        ids = nearest_by_code(search, queries, min(rescored, len(vectors)), 0, len(vectors))
        return smallest(stored_distances(queries, vectors, ids), ids, k)[0]

    def recall(rescored: int | None, probes: int) -> float:
        return float((nearest(probes, rescored) <= exact).mean())

    reached = 0.0
    for rescored in RESCORED if _code(key) else (None,):
        probes, reached = fewest_probes(functools.partial(recall, rescored), index.nlist, target_recall)
        if reached >= target_recall:
            milliseconds = _milliseconds(functools.partial(nearest, probes, rescored), len(queries))
            return Effort(probes, rescored, reached, milliseconds)
    raise ConfigError(
        f"index.target_recall: found {target_recall:g}, expected <= {reached:.3g}: {key} reaches no more with "
        f"{RESCORED[-1]:,} candidates scored again in all {index.nlist:,} lists; use finer codes (a larger "
        "PQ<m>), for which auto may need a higher index.max_memory_gb"
    )


def _milliseconds(search: Callable[[], object], num_queries: int) -> float:
    start = time.perf_counter()
    search()
    return 1000 * (time.perf_counter() - start) / num_queries


def fewest_probes(recall: Callable[[int], float], lists: int, target_recall: float) -> tuple[int, float]:
    """The fewest lists that reach the target, and their recall; or all lists and theirs, where none do.

    Recall grows with the lists visited: doubled until it is enough, and then by halves.
    """
    low, high = 1, 1
    while (reached := recall(high)) < target_recall:
        if high == lists:
            return lists, reached
        low, high = high + 1, min(2 * high, lists)
    while low < high:
        middle = (low + high) // 2
        found = recall(middle)
        if found >= target_recall:
            high, reached = middle, found
        else:
            low = middle + 1
    return high, reached
