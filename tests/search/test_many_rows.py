"""Nothing stops at 2^31 rows: arrays, ids, distances and indexes go on, on files that are mostly holes."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from retro_model.core.artifacts import VERSION, Artifact, write_description
from retro_model.core.rows import retrieved_tokens
from retro_model.search.distances import import_faiss, pair_distances, smallest, stored_distances
from retro_model.search.index import Centroids, Searcher

LIMIT = 2**31
ROWS = LIMIT + 100
ROWS_PER_SHARD = 1 << 30
# A few on both sides of where 32 bits end, and of where one shard ends.
CHOSEN = np.array([0, 1, ROWS_PER_SHARD - 1, ROWS_PER_SHARD, LIMIT - 2, LIMIT - 1, LIMIT, LIMIT + 1, ROWS - 1])


def with_holes(folder: Path, kind: str, columns: dict[str, npt.NDArray[Any]], **facts: Any) -> Artifact:
    """An artifact of ROWS rows, of which the CHOSEN ones hold `columns`, and all others zeros that no disk holds."""
    folder.mkdir()
    arrays, files = {}, {}
    for name, column in columns.items():
        arrays[name] = {"dtype": column.dtype.str, "row_shape": list(column.shape[1:])}
        for number, start in enumerate(range(0, ROWS, ROWS_PER_SHARD)):
            file = f"{name}-{number:05d}.npy"
            shape = (min(ROWS_PER_SHARD, ROWS - start), *column.shape[1:])
            shard = np.lib.format.open_memmap(folder / file, "w+", column.dtype, shape)
            here = (start <= CHOSEN) & (start + ROWS_PER_SHARD > CHOSEN)
            shard[CHOSEN[here] - start] = column[here]
            shard.flush()
            files[file] = "not read"
    write_description(
        folder,
        {
            "format": f"retro/{kind}",
            "version": VERSION,
            "rows": ROWS,
            "shards": [min(ROWS_PER_SHARD, ROWS - start) for start in range(0, ROWS, ROWS_PER_SHARD)],
            "arrays": arrays,
            "facts": facts,
            "sha256": files,
        },
    )
    return Artifact.open(folder, kind, verify=False)


@pytest.fixture(scope="module")
def vectors() -> npt.NDArray[np.float16]:
    return np.random.default_rng(0).normal(size=(len(CHOSEN), 4)).astype(np.float16)


def test_rows_beyond_32_bits_are_read_and_compared(tmp_path: Path, vectors: npt.NDArray[np.float16]) -> None:
    stored = with_holes(tmp_path / "vectors", "embeddings", {"vectors": vectors})["vectors"]
    assert len(stored) == ROWS
    np.testing.assert_array_equal(stored[CHOSEN], vectors)
    np.testing.assert_array_equal(stored[LIMIT - 2 : LIMIT + 2], vectors[4:8])
    with pytest.raises(IndexError, match=f"rows {ROWS} to {ROWS} of {ROWS}"):
        stored[np.array([ROWS])]
    queries = vectors.astype(np.float32)[::-1].copy()
    for ids in (np.tile(CHOSEN, (len(CHOSEN), 1)), CHOSEN[4:, None], np.full((2, 3), -1)):
        places = np.where(ids < 0, -1, np.searchsorted(CHOSEN, ids))
        found = stored_distances(queries[: len(ids)], stored, ids)
        assert found.tobytes() == pair_distances(queries[: len(ids)], vectors.astype(np.float32), places).tobytes()
    nearest = smallest(stored_distances(queries, stored, np.tile(CHOSEN, (len(CHOSEN), 1))), np.tile(CHOSEN, (9, 1)), 1)
    assert nearest[1][:, 0].tolist() == CHOSEN[::-1].tolist(), "each finds itself"


def test_an_index_keeps_ids_beyond_32_bits(vectors: npt.NDArray[np.float16]) -> None:
    faiss, rows = import_faiss(), vectors.astype(np.float32)
    quantizer = faiss.IndexFlatL2(4)
    quantizer.add(rows[:2])
    index = faiss.IndexIVFFlat(quantizer, 4, 2)
    index.is_trained = True
    Centroids(index).add(rows, CHOSEN)
    _, ids = Searcher(index).search(rows, 1, 2)
    assert ids[:, 0].tolist() == CHOSEN.tolist()


def test_neighbors_and_their_continuations_beyond_32_bits(tmp_path: Path) -> None:
    tokens = np.arange(10, 10 + 5 * len(CHOSEN), dtype=np.uint16).reshape(-1, 5)
    documents = np.array([1, 1, 2, 3, 4, 4, 4, 4, 5], dtype=np.int64)
    chunks = with_holes(tmp_path / "chunks", "chunks", {"tokens": tokens, "documents": documents}, pad_id=0)
    found = retrieved_tokens(chunks, np.array([[LIMIT - 1, LIMIT], [ROWS - 1, -1]]))
    assert found[0].tolist() == [[*tokens[5, :-1], *tokens[6, :-1]], [*tokens[6, :-1], *tokens[7, :-1]]]
    assert found[1].tolist() == [[*tokens[8, :-1], 0, 0, 0, 0], [0] * 8]
