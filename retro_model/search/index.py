"""Search an index over the database, on the CPU or, with a GPU build of faiss, on a GPU.

The list of each row, the lists that a query visits and the candidates that are reported do not depend on
batches, threads or device. With a GPU build of faiss, the GPU chooses lists and compares rows; codes are compared
on the CPU.

    index = Index.open(Path("data/index"))
    distances, ids = index.search(queries, 10)      # (n, 10) each, nearest first

retro_model.search.keys describes the kinds of index, retro_model.search.build builds them.
"""

import functools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import BoolArray, Float32Array
from retro_model.core.artifacts import Artifact
from retro_model.core.errors import ConfigError, DamagedArtifactError
from retro_model.search.distances import (
    IdArray,
    import_faiss,
    largest_square,
    pair_distances,
    rounding_margin,
    smallest,
)
from retro_model.search.keys import code_of, num_lists

INDEX_FILE = "knn.index"
Found = tuple[Float32Array, IdArray]  # distances and ids
Arrays = tuple[npt.NDArray[Any], npt.NDArray[Any]]

LISTS_SURPLUS = 8  # extra centroids to fetch, so that rounding rarely makes the choice uncertain
PAIRS_AT_ONCE = 1 << 22  # distances or candidates in memory
GPU_LIMIT = 2048  # faiss's limit on neighbors, and on lists, in a GPU search


# ---- the GPU -------------------------------------------------------------------------------------------


def gpu_build() -> bool:
    """Whether the installed faiss has GPU functions, even if no GPU is present."""
    return hasattr(import_faiss(), "StandardGpuResources")


def on_gpu(device: str) -> bool:
    """Whether faiss computes on a GPU: for `auto` if it can, for `cuda` always, for `cpu` never.

    Raises ConfigError for cuda if faiss has no GPU functions or sees no GPU.
    """
    assert device in ("auto", "cpu", "cuda"), device
    there = gpu_build() and import_faiss().get_num_gpus() > 0
    if device == "cuda" and not there:
        why = "faiss sees no GPU here" if gpu_build() else "this faiss has no GPU functions; run `make install GPU=1`"
        raise ConfigError(f"runtime.device: found cuda, expected auto or cpu: {why}")
    return device != "cpu" and there


@functools.cache
def _gpu_resources() -> Any:
    return import_faiss().StandardGpuResources()


def to_gpu(index: Any) -> Any:
    """A copy on the GPU in single precision, so that its distances differ by rounding only."""
    return import_faiss().index_cpu_to_gpu(_gpu_resources(), 0, index)


# ---- the index -----------------------------------------------------------------------------------------


class Centroids:
    """The centroids of an IVF index, which assign rows to lists and choose the lists that a query visits.

    The order is by (distance, list number) and does not depend on batch, threads or device.
    """

    def __init__(self, index: Any, gpu: bool = False) -> None:
        self._quantizer = import_faiss().downcast_index(index.quantizer)
        self._index = index  # owns the quantizer
        self._vectors = _flat_rows(self._quantizer)
        self._largest_norm = largest_square(self._vectors)
        self._searched = to_gpu(self._quantizer) if gpu else self._quantizer
        self._gpu_lock = threading.Lock()  # the GPU allows one search at a time

    def nearest(self, queries: Float32Array, count: int) -> tuple[Float32Array, IdArray]:
        """Distances and numbers of the `count` lists with the nearest centroids for each query: both (n, count)."""
        fetched = min(len(self._vectors), count + LISTS_SURPLUS)
        if self._searched is not self._quantizer and fetched <= GPU_LIMIT:
            with self._gpu_lock:
                reported, lists = self._searched.search(queries, fetched)
        else:
            reported, lists = self._quantizer.search(queries, fetched)
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

    def add(self, vectors: Float32Array, ids: IdArray) -> None:
        """Adds rows with these ids to the index; with 4-bit codes, before it is packed for fast scan."""
        lists = self.nearest(vectors, 1)[1][:, 0]
        swig_ptr = import_faiss().swig_ptr
        arrays = [np.ascontiguousarray(array) for array in (vectors, ids, lists)]
        self._index.add_core(len(vectors), *map(swig_ptr, arrays))


def _flat_rows(index: Any) -> Float32Array:
    """The rows of an exact index, as a view of its memory."""
    faiss = import_faiss()
    rows: Float32Array = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    return rows


class Searcher:
    """Searches a faiss index: on the GPU if `gpu` is set and the index holds rows, not codes."""

    def __init__(self, index: Any, gpu: bool = False) -> None:
        faiss = import_faiss()
        lists, rows = isinstance(index, faiss.IndexIVF), isinstance(index, (faiss.IndexFlat, faiss.IndexIVFFlat))
        self._index = index
        self._centroids = Centroids(index, gpu) if lists else None
        self._on_gpu = to_gpu(index) if gpu and rows else None
        self._threaded = lists and self._on_gpu is None
        # On the CPU, faiss compares the rows of lists one by one. Otherwise it uses matrix products, which round.
        self.reports_pair_distances = lists and rows and not gpu

    def in_threads(self, work: Callable[[slice], Arrays], num_queries: int) -> Arrays:
        """Runs `work` on slices of the queries, in threads if that is faster; concatenates the results.

        A search of lists has several steps, and faiss parallelizes only some. So each thread takes a slice of
        the queries through all steps. Matrix products and the GPU need no threads of ours.
        """
        faiss = import_faiss()
        num_threads = min(faiss.omp_get_max_threads(), num_queries) if self._threaded else 1
        if num_threads <= 1:
            return work(slice(0, num_queries))
        bounds = np.linspace(0, num_queries, num_threads + 1).astype(int)
        shares = [slice(start, stop) for start, stop in pairwise(bounds.tolist())]
        with ThreadPoolExecutor(num_threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
            first, second = zip(*pool.map(work, shares), strict=True)
        return np.concatenate(first), np.concatenate(second)

    def search(self, queries: Float32Array, k: int, probes: int) -> Found:
        """See `Index.search`."""
        queries = np.ascontiguousarray(queries)
        return self.in_threads(lambda rows: self._search(queries[rows], k, probes), len(queries))

    def _search(self, queries: Float32Array, k: int, probes: int) -> Found:
        on_gpu = self._on_gpu is not None and max(k, probes) <= GPU_LIMIT
        index: Any = self._on_gpu if on_gpu else self._index
        if self._centroids is None:
            distances, ids = index.search(queries, k)
        else:
            to_lists, lists = self._centroids.nearest(queries, probes)
            if on_gpu:
                index.nprobe = probes
                distances, ids = index.search_preassigned(queries, k, lists, to_lists)
            else:
                distances, ids = _search_lists(index, queries, k, lists, to_lists)
        distances[ids < 0] = np.inf
        return distances, ids


def _search_lists(index: Any, queries: Float32Array, k: int, lists: IdArray, to_lists: Float32Array) -> Found:
    """Each query's k nearest rows in its `lists` (n, probes).

    The number of lists is passed as a parameter, not set as `index.nprobe`, because threads may search the same
    index with different numbers.
    """
    faiss = import_faiss()
    distances, ids = np.empty((len(queries), k), dtype=np.float32), np.empty((len(queries), k), dtype=np.int64)
    assert queries.dtype == to_lists.dtype == np.float32 and lists.dtype == np.int64
    assert queries.shape == (len(lists), index.d) and lists.shape == to_lists.shape
    arrays = [np.ascontiguousarray(array) for array in (queries, lists, to_lists)]
    queries_ptr, lists_ptr, to_lists_ptr = map(faiss.swig_ptr, arrays)
    results = map(faiss.swig_ptr, (distances, ids))
    parameters = faiss.SearchParametersIVF(nprobe=lists.shape[1])
    index.search_preassigned_c(len(queries), queries_ptr, k, lists_ptr, to_lists_ptr, *results, False, parameters)
    return distances, ids


class Index:
    """An index opened for searching. `facts` are those of its artifact.

    probes: default number of `lists` that a search visits; 1 of 1 for an exact index.
    rescored: for an index of codes, how many candidates to score again from the stored vectors; None for an
        index of rows, whose distances are right up to rounding.
    stored: the rows of an exact index, else None.
    reports_pair_distances: whether reported distances equal those of `pair_distances` bit for bit.
    """

    def __init__(self, index: Any, facts: Mapping[str, Any], gpu: bool = False) -> None:
        self.rows: int = facts["rows"]
        self.dim: int = facts["dim"]
        self.largest_norm: float = facts["largest_norm"]
        self.lists: int = num_lists(facts["key"]) or 1
        self.probes: int = facts["nprobe"] or 1
        self.rescored: int | None = facts["rescored"] if code_of(facts["key"]) else None
        self._searcher = Searcher(index, gpu)
        self.stored = None if num_lists(facts["key"]) else _flat_rows(index)
        self.reports_pair_distances = self._searcher.reports_pair_distances
        self.in_threads = self._searcher.in_threads

    @classmethod
    def open(cls, artifact: Artifact, device: str = "cpu") -> "Index":
        """Reads the index from its artifact; `device` is where to search: auto, cpu or cuda.

        Raises MismatchError if the metric is not l2, DamagedArtifactError if faiss cannot read the file or it
        does not match the artifact's facts, and ConfigError for cuda if faiss has no GPU.
        """
        faiss, gpu = import_faiss(), on_gpu(device)
        facts = artifact.require(metric="l2").facts
        path = artifact.folder / INDEX_FILE
        path.open("rb").close()  # an OSError (such as permission denied) is not a damaged file
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise DamagedArtifactError(f"{path} is no faiss index ({error}); run `dvc repro` (stage index)") from error
        found, expected = (index.ntotal, index.d), (facts["rows"], facts["dim"])
        if found != expected or index.metric_type != faiss.METRIC_L2:
            raise DamagedArtifactError(
                f"{path} holds {found} rows and dimensions, expected {expected} and metric l2; "
                "run `dvc repro` (stage index)"
            )
        return cls(index, facts, gpu)

    def search(self, queries: Float32Array, k: int, probes: int | None = None) -> Found:
        """Each query's k nearest rows: distances (n, k) and ids (n, k), nearest first.

        An id of -1, at distance inf, means that the visited lists hold no more rows. Distances are faiss's own
        and may depend on the batch; `pair_distances` computes ones that do not.
        """
        assert queries.dtype == np.float32 and queries.shape[1:] == (self.dim,), queries
        return self._searcher.search(queries, k, self.probes if probes is None else probes)


Search = Callable[[Float32Array, int], Found]


def nearest_by_code(
    search: Search,
    queries: Float32Array,
    count: int,
    surplus: int,
    num_rows: int,
    excluded: Callable[[IdArray, IdArray], BoolArray] | None = None,
) -> IdArray:
    """Ids (n, count) of the `count` nearest rows that `search` reports, by (distance, id), padded with -1.

    `search(queries, k)` returns the k nearest of `num_rows` rows in ascending order; among equal distances it may
    choose and order freely. `excluded(query numbers, ids)` marks rows to skip. `surplus` is how many more rows the
    first search fetches; it changes speed only.
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
            # Other rows at the last fetched distance may be missing, so rows at that distance do not count yet.
            counts = (ids >= 0) & (whole | (reported < reported[:, -1:]))
            if excluded is not None:
                counts &= ~excluded(part, ids)
            found[part] = smallest(np.where(counts, reported, np.float32(np.inf)), ids, count)[1]
            uncertain.append(part[~whole[:, 0] & (found[part, -1] < 0)])
        pending, fetched = np.concatenate(uncertain), 2 * fetched
    return found
