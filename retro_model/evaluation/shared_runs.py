"""Find chunks with a run of tokens that occurs anywhere in another split, word for word.

A run shared with a neighbor could be copied from it; a run shared with the train split could be memorized. Every run
of the given length is hashed, in the chunks and throughout each document of the split, and the hashes are compared.
Two different runs have equal 64-bit hashes with a chance of about 2^-60, so a billion runs against a hundred
thousand give one false match with a chance of about one in 10,000.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import BoolArray, IntArray
from retro_model.core.artifacts import Artifact

Hashes = npt.NDArray[np.uint64]

# Chunks of the split whose runs are in memory at once.
CHUNKS_AT_ONCE = 1 << 14

FACTOR = 0x9E3779B97F4A7C15  # of the polynomial hash; odd, so that no token is lost
FILTER_BITS = 22  # index bits of the table that rules out most runs before the exact search


def share_a_run(labels_CM: IntArray, split: Artifact, length: int) -> BoolArray:
    """Return (C,): whether each chunk has `length` tokens in a row that also occur in a document of the split.

    The end of a document is a token, padding is not. Runs in the split may cross chunk borders.
    """
    pad_id = split.facts["pad_id"]
    token_hashes = np.random.default_rng(0).integers(1 << 64, size=split.facts["vocab_size"], dtype=np.uint64)
    hashes_CW = run_hashes(token_hashes[labels_CM], length)
    whole_CW = labels_CM[:, length - 1 :] != pad_id  # padding comes last: a run is whole if its last token is real
    wanted = np.unique(hashes_CW[whole_CW])
    if not len(wanted):
        return np.zeros(len(labels_CM), dtype=np.bool_)
    found = np.zeros(len(wanted), dtype=np.bool_)
    shift = np.uint64(64 - FILTER_BITS)
    possible = np.zeros(1 << FILTER_BITS, dtype=np.bool_)
    possible[wanted >> shift] = True
    for hashes in _runs_of(split, token_hashes, length):
        candidates = hashes[possible[hashes >> shift]]
        places = np.minimum(np.searchsorted(wanted, candidates), len(wanted) - 1)
        found[places[wanted[places] == candidates]] = True
    shared: BoolArray = (whole_CW & np.isin(hashes_CW, wanted[found])).any(axis=1)
    return shared


def run_hashes(token_hashes: Hashes, length: int) -> Hashes:
    """Hash each run of `length` tokens (..., n - length + 1), given the hashes of the tokens (..., n).

    hash(a + b) = hash(a) * FACTOR ** len(b) + hash(b), modulo 2^64. Hashes of runs of 1, 2, 4 ... tokens are each
    built from two halves, and those that add up to `length` are combined.
    """
    num = token_hashes.shape[-1] - length + 1
    hashes, block, size, covered = np.uint64(0) * token_hashes[..., :num], token_hashes, 1, 0
    while covered < length:
        factor = np.uint64(pow(FACTOR, size, 1 << 64))
        if length & size:
            hashes = hashes * factor + block[..., covered : covered + num]
            covered += size
        block = block[..., :-size] * factor + block[..., size:]
        size *= 2
    return hashes


def _runs_of(split: Artifact, token_hashes: Hashes, length: int) -> Iterator[Hashes]:
    """Yield the hashes of all runs within documents of the split, block by block."""
    tokens = np.empty(0, dtype=np.int64)
    documents = np.empty(0, dtype=np.int64)
    for start in range(0, split.rows, CHUNKS_AT_ONCE):
        block = slice(start, start + CHUNKS_AT_ONCE)
        labels_CM = split["tokens"][block][:, 1:]
        real = labels_CM != split.facts["pad_id"]
        kept = slice(max(0, len(tokens) - length + 1), None)  # runs may begin in the previous block
        tokens = np.concatenate([tokens[kept], labels_CM[real]])
        documents = np.concatenate([documents[kept], np.repeat(split["documents"][block], real.sum(axis=1))])
        if len(tokens) >= length:
            within = documents[length - 1 :] == documents[: len(documents) - length + 1]
            yield run_hashes(token_hashes[tokens], length)[within]
