"""A database in memory over given vectors, with an exact index or one of lists or codes."""

from typing import Any

import numpy as np
import numpy.typing as npt

from retro_model.search.distances import import_faiss
from retro_model.search.index import Index
from retro_model.search.neighbors import Database

faiss = import_faiss()
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def database_of(
    vectors: Floats, documents: Ints, lists: int = 0, probes: int = 1, codes: int = 0, rescored: int = 1
) -> Database:
    """A database in memory; with `lists`, its index is IVF with centroids drawn from the vectors.

    With `codes`, that many numbers of 4 bits stand for a row in it.
    """
    num_rows, dim = vectors.shape
    index: Any = faiss.IndexFlatL2(dim)
    if lists:
        quantizer = faiss.IndexFlatL2(dim)
        quantizer.add(vectors[np.random.default_rng(0).permutation(num_rows)[:lists]])
        if codes:
            index = faiss.IndexIVFPQ(quantizer, dim, lists, codes, 4)
            index.pq.cp.min_points_per_centroid = 1
            index.train(vectors)
        else:
            index = faiss.IndexIVFFlat(quantizer, dim, lists)
            index.is_trained = True
    index.add(vectors)
    if codes:
        index = faiss.IndexIVFPQFastScan(index)
    facts = {
        "rows": num_rows,
        "dim": dim,
        "key": f"IVF{lists},{f'PQ{codes}x4fs' if codes else 'Flat'}" if lists else "Flat",
        "nprobe": probes if lists else None,
        "rescored": rescored if codes else None,
        "largest_norm": float((vectors**2).sum(axis=1).max()),
    }
    stored: Any = vectors.astype(np.float16) if (vectors.astype(np.float16) == vectors).all() else vectors
    return Database(Index(index, facts), stored, documents)
