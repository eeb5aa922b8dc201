"""Measure the evaluation's own computation: the longest runs of tokens that chunks share with their neighbors.

    python benchmarks/evaluation.py       10,000 chunks of 64 tokens, ten neighbors of 128 tokens each

Tokens follow a Zipf distribution, as the words of a text do, and a third of the chunks have a neighbor that quotes
them. Prints the seconds of each of three turns, and the share of chunks whose runs are at most an eighth of a chunk.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
from measured import record_result  # noqa: E402

from retro_model.evaluation.overlap import longest_shared_runs  # noqa: E402

MAKE_BENCH = {"full": [""], "quick": ["--chunks 40 --turns 1"]}
VOCABULARY, CHUNK_SIZE, NEIGHBORS, RETRIEVED = 4096, 64, 10, 128


def random_tokens(num_chunks: int, seed: int = 0) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Random chunks (n, 64) and neighbors (n, 10, 128); token ids start at 1."""
    random = np.random.default_rng(seed)
    draw = np.minimum(random.zipf(1.3, size=(num_chunks, CHUNK_SIZE)), VOCABULARY - 1)
    neighbors = np.minimum(random.zipf(1.3, size=(num_chunks, NEIGHBORS, RETRIEVED)), VOCABULARY - 1)
    for chunk in np.flatnonzero(random.random(num_chunks) < 1 / 3):
        length, start = int(random.integers(2, CHUNK_SIZE)), int(random.integers(RETRIEVED - CHUNK_SIZE))
        neighbors[chunk, random.integers(NEIGHBORS), start : start + length] = draw[chunk, :length]
    return draw, neighbors


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    chunks, neighbors = random_tokens(options.chunks)
    print(f"{options.chunks:,} chunks of {CHUNK_SIZE} tokens, {NEIGHBORS} neighbors of {RETRIEVED} each")
    seconds = []
    for _ in range(options.turns):
        started = time.perf_counter()
        runs = longest_shared_runs(chunks, neighbors, pad_id=0)
        seconds.append(time.perf_counter() - started)
        print(f"longest shared runs: {seconds[-1]:.2f} s", flush=True)
    median = statistics.median(seconds)
    record_result(f"longest shared runs of {options.chunks:,} chunks", ratio=median, at_most=60, ours=median, unit="s")
    print(f"chunks that share at most {CHUNK_SIZE // 8} tokens in a row: {np.mean(runs <= CHUNK_SIZE // 8):.1%}")


if __name__ == "__main__":
    main()
