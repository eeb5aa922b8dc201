"""An index over the database, opened for searching: on the CPU, or where faiss has one on a GPU.

Which lists a row lies in and a query visits, and which candidates are reported, does not depend on
batches, threads or device. With a GPU build of faiss, lists and comparisons are computed on the GPU; codes
are compared on the CPU.

    index = Index.open(Path("data/index"))
    distances, ids = index.search(queries, 10)      # (n, 10) each, nearest first

What kinds there are: retro_model.search.keys. How they are built: retro_model.search.build.
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

LISTS_SURPLUS = 8  # centroids fetched beyond those wanted, so that rounding rarely leaves a doubt
PAIRS_AT_ONCE = 1 << 22  # distances or candidates in memory
GPU_MOST = 2048  # neighbors, and lists, that a GPU search can be asked for


# ---- the GPU -------------------------------------------------------------------------------------------


def gpu_build() -> bool:
    """Whether this faiss has GPU functions, also where no GPU is."""
    return hasattr(import_faiss(), "StandardGpuResources")


def on_gpu(device: str) -> bool:
    """Whether faiss computes on a GPU: for `auto` where it can, for `cuda` always, for `cpu` never.

    Raises ConfigError where cuda is asked for and faiss has no GPU, or no GPU functions.
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
        self._turn = threading.Lock()  # on the GPU one search at a time

    def nearest(self, queries: Float32Array, count: int) -> tuple[Float32Array, IdArray]:
        """Distances and numbers (n, count) of the lists whose centroids are nearest to each row."""
        fetched = min(len(self._vectors), count + LISTS_SURPLUS)
        if self._searched is not self._quantizer and fetched <= GPU_MOST:
            with self._turn:
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
        """Adds rows to the index that the centroids are of; a 4-bit one is not packed for fast scan yet."""
        lists = self.nearest(vectors, 1)[1][:, 0]
        swig_ptr = import_faiss().swig_ptr
        arrays = [np.ascontiguousarray(array) for array in (vectors, ids, lists)]
        self._index.add_core(len(vectors), *map(swig_ptr, arrays))


def _flat_rows(index: Any) -> Float32Array:
    """The rows of an exact index, where they lie."""
    faiss = import_faiss()
    rows: Float32Array = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    return rows


class Searcher:
    """A faiss index, on the GPU where that is asked for and it holds no codes."""

    def __init__(self, index: Any, gpu: bool = False) -> None:
        faiss = import_faiss()
        lists, rows = isinstance(index, faiss.IndexIVF), isinstance(index, (faiss.IndexFlat, faiss.IndexIVFFlat))
        self._index = index
        self._centroids = Centroids(index, gpu) if lists else None
        self._on_gpu = _to_gpu(index) if gpu and rows else None
        self._threaded = lists and self._on_gpu is None
        # Rows of lists are compared one by one on the CPU, and all else in matrix products.
        self.alone = lists and rows and not gpu

    def in_threads(self, work: Callable[[slice], Arrays], num_queries: int) -> Arrays:
        """What `work` finds for all queries, shares of which are searched at a time where that is faster.

        A search of lists is a chain of steps, of which faiss spreads some over its threads. So each share
        goes through all of them in a thread of its own. Matrix products and the GPU need no help.
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
        on_gpu = self._on_gpu is not None and max(k, probes) <= GPU_MOST
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
    """The k nearest rows in `lists` (n, probes) of each query.

    `index.nprobe` is not set for that: threads that search one index visit different numbers of lists.
    """
    faiss = import_faiss()
    distances, ids = np.empty((len(queries), k), dtype=np.float32), np.empty((len(queries), k), dtype=np.int64)
    assert queries.dtype == to_lists.dtype == np.float32 and lists.dtype == np.int64
    assert queries.shape == (len(lists), index.d) and lists.shape == to_lists.shape
    arrays = [np.ascontiguousarray(array) for array in (queries, lists, to_lists)]
    asked, visited, to_visited = map(faiss.swig_ptr, arrays)
    found = map(faiss.swig_ptr, (distances, ids))
    parameters = faiss.SearchParametersIVF(nprobe=lists.shape[1])
    index.search_preassigned_c(len(queries), asked, k, visited, to_visited, *found, False, parameters)
    return distances, ids


class Index:
    """An index opened for searching. `facts` are those of its artifact.

    `probes` is how many of its `lists` a search visits unless told otherwise, 1 of 1 for an exact index.
    `rescored` is None where reported distances are those of the rows, give or take rounding, and else
    how many candidates by code are to be scored again. `stored` are the rows of an exact index. `alone`
    says that distances are reported without rounding: each computed for itself, as by `pair_distances`.
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
        self.alone = self._searcher.alone
        self.in_threads = self._searcher.in_threads

    @classmethod
    def open(cls, artifact: Artifact, device: str = "cpu") -> "Index":
        """Reads the index in its artifact; `device` is where it searches: auto, cpu or cuda.

        Raises MismatchError for another metric, DamagedArtifactError where faiss cannot read it, and
        ConfigError where cuda is asked for and faiss has none.
        """
        faiss, gpu = import_faiss(), on_gpu(device)
        facts = artifact.require(metric="l2").facts
        path = artifact.folder / INDEX_FILE
        path.open("rb").close()  # what the system refuses is its own error, and no damage
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
        """The k nearest rows of each query: distances (n, k) and ids (n, k), nearest first.

        An id of -1, at distance inf, means that the lists visited hold no more rows. Distances are
        faiss's own: `pair_distances` has the ones that do not depend on the batch.
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
