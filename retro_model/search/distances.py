"""Squared L2 distances, bitwise independent of the rest of the batch.

Reads the rows of an embeddings artifact as float32 (`float_blocks`, `as_float32`), computes distances pair by pair
(`pair_distances`, `stored_distances`) or by brute force over all rows (`exact_distances`), bounds the rounding
error of faiss's faster methods (`rounding_margin`) and selects the k smallest (`smallest`).

faiss does the arithmetic and is imported on first use.
"""

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import Float32Array
from retro_model.core.artifacts import ShardedArray

IdArray = npt.NDArray[np.int64]
Vectors = ShardedArray | npt.NDArray[Any]  # rows in half or single precision, on disk or in memory

ROWS_PER_BLOCK = 65_536  # rows added to an index, or compared by brute force, at a time
ROWS_AT_ONCE = 16_384  # stored rows gathered and converted to float32 at a time
TABLE_ENTRIES_PER_ID = 64  # `_distinct` uses a lookup table while it has fewer entries than this per id

# Recall is measured over the RECALL_AT nearest rows of RECALL_QUERIES queries.
RECALL_AT = 10
RECALL_QUERIES = 1000

# Facts that must be equal in all embeddings that are compared with each other.
SHAPING_FACTS = ("encoder", "pooling", "normalize", "max_tokens", "number_type", "dim")


@functools.cache
def import_faiss() -> Any:
    """Imports faiss on first use and returns the module.

    Its SWIG wrapper emits a DeprecationWarning while it loads; with warnings as errors, that crashes the process
    with a segmentation fault, so it is filtered here.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "builtin type .* has no __module__ attribute", DeprecationWarning)
        import faiss
    return faiss


def write_index(index: Any, path: Path) -> None:
    """Writes a faiss index through a Python file: faiss's own writer misses a full disk at its last buffer."""
    faiss = import_faiss()
    with path.open("wb") as stream:
        faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))


# ---- stored vectors ------------------------------------------------------------------------------------


def float_blocks(vectors: Vectors) -> Iterator[Float32Array]:
    """Yields the rows in order as float32, ROWS_PER_BLOCK at a time."""
    for start in range(0, len(vectors), ROWS_PER_BLOCK):
        yield as_float32(vectors[start : start + ROWS_PER_BLOCK])


def as_float32(rows: npt.NDArray[Any], into: Float32Array | None = None) -> Float32Array:
    """Converts rows (n, dim) in half or single precision to float32, into the array `into` if given."""
    if into is None:
        into = np.empty(rows.shape, dtype=np.float32)
    if rows.dtype != np.float16:
        into[:] = rows
        return into
    faiss = import_faiss()  # its conversion is several times as fast as numpy's
    codec = faiss.ScalarQuantizer(rows.shape[1], faiss.ScalarQuantizer.QT_fp16)
    codes = np.ascontiguousarray(rows).view(np.uint8)
    codec.decode_c(faiss.swig_ptr(codes), faiss.swig_ptr(into), len(rows))
    return into


def sample_rows(vectors: Vectors, num_rows: int, seed: int) -> Float32Array:
    """`num_rows` distinct random rows in random order, or all rows if there are fewer; float32."""
    rows = np.random.default_rng(seed).choice(len(vectors), min(num_rows, len(vectors)), replace=False)
    return as_float32(vectors[rows])


def largest_square(block: Float32Array) -> float:
    """The largest squared norm of a row."""
    return float(np.einsum("nd,nd->n", block, block).max())


# ---- distances -----------------------------------------------------------------------------------------


def pair_distances(queries: Float32Array, vectors: Float32Array, places: IdArray) -> Float32Array:
    """Squared L2 distances (n, k) of `queries` (n, dim) to the rows `places` (n, k) of `vectors`.

    Each distance is computed on its own, so it does not depend on the rest of the batch. inf where a place
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


def rounding_margin(queries: Float32Array, largest_norm: float) -> Float32Array:
    """An upper bound (n, 1) on the difference between a distance from faiss and one from `pair_distances`.

    For many queries at once faiss computes |q|^2 + |y|^2 - 2qy. Each of the three sums of `dim` float32 terms
    is off by at most dim / 2 machine epsilons. `largest_norm` is the largest |y|^2.
    """
    norms = np.einsum("nd,nd->n", queries, queries)[:, None] + np.float32(largest_norm)
    return np.asarray(queries.shape[1] * np.finfo(np.float32).eps * norms, dtype=np.float32)


def exact_distances(queries: Float32Array, vectors: Vectors, k: int) -> Float32Array:
    """Each query's k smallest distances to all rows, by brute force: (n, k), ascending."""
    faiss = import_faiss()
    nearest = np.full((len(queries), k), np.inf, dtype=np.float32)
    for block in float_blocks(vectors):
        distances, _ = faiss.knn(queries, block, min(k, len(block)))
        nearest = np.sort(np.concatenate([nearest, distances], axis=1), axis=1)[:, :k]
    return nearest


def stored_distances(queries: Float32Array, vectors: Vectors, ids: IdArray) -> Float32Array:
    """`pair_distances` (n, k) of `queries` to the rows `ids` (n, k) of the stored `vectors`.

    Buffers are allocated once and reused for each block: touching fresh pages costs more than the computation.
    """
    distances = np.empty(ids.shape, dtype=np.float32)
    step = max(1, ROWS_AT_ONCE // max(1, ids.shape[1]))
    most = min(step, len(ids)) * ids.shape[1]
    stored = np.empty((most, vectors.shape[1]), dtype=vectors.dtype)
    single = np.empty((most, vectors.shape[1]), dtype=np.float32)
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        rows, places = _distinct(ids[part])
        first = np.searchsorted(rows, 0)  # skips -1, if present
        rows, places = rows[first:], places - first
        _take_rows(vectors, rows, stored[: len(rows)])
        found = as_float32(stored[: len(rows)], single[: len(rows)])
        distances[part] = pair_distances(queries[part], found, np.maximum(places, -1))
    return distances


def _distinct(ids: IdArray) -> tuple[IdArray, IdArray]:
    """The sorted distinct ids, and each id's index among them: np.unique, but several times as fast."""
    lowest, highest = int(ids.min(initial=0)), int(ids.max(initial=0))
    if highest - lowest < TABLE_ENTRIES_PER_ID * ids.size:
        here = ids - lowest
        present = np.zeros(highest - lowest + 1, dtype=np.bool_)
        present[here] = True
        distinct = np.flatnonzero(present)
        places = np.empty(len(present), dtype=np.int64)
        places[distinct] = np.arange(len(distinct))
        return distinct + lowest, places[here]
    if highest >= 2**31:
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


def _take_rows(vectors: Vectors, rows: IdArray, into: npt.NDArray[Any]) -> None:
    """Copies `rows`, sorted ascending, from their shards to `into`."""
    if not len(rows):
        return
    assert rows[0] >= 0 and rows[-1] < len(vectors), (rows[0], rows[-1])
    shards = vectors.shards() if isinstance(vectors, ShardedArray) else [vectors]
    parts = vectors.parts_of(rows) if isinstance(vectors, ShardedArray) else [(0, 0, 0, len(rows))]
    for number, first, start, stop in parts:
        # The assertion above checks the bounds; the default mode "raise" would make another copy.
        np.take(shards[number], rows[start:stop] - first, axis=0, out=into[start:stop], mode="clip")


def smallest(distances: Float32Array, ids: IdArray, k: int) -> tuple[Float32Array, IdArray]:
    """The k smallest distances of each row of `distances` (n, c) and their `ids`: both (n, k).

    Sorted by (distance, id). An infinite distance gets id -1; rows with fewer than k are padded with inf and -1.
    """
    width = min(k, ids.shape[1])
    if ids.max(initial=0) < 2**32:
        # Pack distance and id into one int64. Non-negative floats sort like their bits, negative ones like the
        # complement of their bits.
        bits = (distances + np.float32(0)).view(np.int32)
        bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)
        pairs = (bits.astype(np.int64) << 32) | (ids & 0xFFFFFFFF)
        if width < pairs.shape[1]:
            pairs.partition(width - 1, axis=1)
            pairs = pairs[:, :width]
        pairs.sort(axis=1, kind="stable")  # fast on nearly sorted input
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
