"""Longest common runs of tokens: how much of a chunk its neighbors contain word for word (section 2.6)."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import IntArray

# Table cells per block: few enough for the processor's cache, enough to hide numpy's cost per call.
CELLS_AT_ONCE = 1 << 18


class Run(NamedTuple):
    """`length` tokens that start at `query` in one sequence and at `neighbor` in the other."""

    length: int
    query: int
    neighbor: int


def longest_shared_run(query_M: IntArray, neighbor_R: IntArray, pad_id: int) -> Run:
    """Return the longest run of tokens that both sequences contain; of ties, the first in `query_M`.

    Padding matches nothing.
    """
    lengths_MR = np.zeros((len(query_M) + 1, len(neighbor_R) + 1), dtype=np.int64)
    for place, token in enumerate(query_M, start=1):
        if token != pad_id:
            lengths_MR[place, 1:] = (lengths_MR[place - 1, :-1] + 1) * (neighbor_R == token)
    end, neighbor_end = np.unravel_index(int(lengths_MR.argmax()), lengths_MR.shape)
    length = int(lengths_MR[end, neighbor_end])
    return Run(length, int(end) - length, int(neighbor_end) - length)


def longest_shared_runs(queries_CM: IntArray, neighbors_CKR: IntArray, pad_id: int) -> npt.NDArray[np.int64]:
    """Return (C,): the length of the longest run that each chunk shares with any of its neighbors.

    Padding matches nothing.
    """
    runs_C = np.zeros(len(queries_CM), dtype=np.int64)
    step = max(1, CELLS_AT_ONCE // max(1, neighbors_CKR[0].size)) if len(runs_C) else 1
    for start in range(0, len(runs_C), step):
        block = slice(start, start + step)
        runs_C[block] = _longest_of_block(queries_CM[block], neighbors_CKR[block], pad_id)
    return runs_C


def _longest_of_block(queries_CM: IntArray, neighbors_CKR: IntArray, pad_id: int) -> npt.NDArray[np.int64]:
    """The same for one block: fill the tables of all chunks row by row, in the smallest dtype that can count."""
    num_tokens = queries_CM.shape[1]
    neighbors = np.where(neighbors_CKR == pad_id, -1, neighbors_CKR).astype(np.int32)
    dtype: type[np.unsignedinteger[Any]] = np.uint8 if num_tokens <= np.iinfo(np.uint8).max else np.uint16
    ending_here = np.zeros((*neighbors.shape[:2], neighbors.shape[2] + 1), dtype=dtype)
    longest = np.zeros(neighbors.shape, dtype=dtype)
    for place in range(num_tokens):
        same = neighbors == queries_CM[:, place].astype(np.int32)[:, None, None]
        before = ending_here[..., :-1] + 1  # a copy: the previous table row must be read before it is overwritten
        ending_here[..., 1:] = before * same
        np.maximum(longest, ending_here[..., 1:], out=longest)
    runs_C: npt.NDArray[np.int64] = longest.max(axis=(1, 2), initial=0).astype(np.int64)
    return runs_C
