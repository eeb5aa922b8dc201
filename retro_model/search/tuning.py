"""Choose the cheapest search settings that reach the target recall.

Recall is measured against exact search and time plays no part, so equal input gives equal settings.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from retro_model.core.arrays import Float32Array
from retro_model.core.errors import ConfigError
from retro_model.search.distances import (
    RECALL_AT,
    IdArray,
    Vectors,
    exact_distances,
    rounding_margin,
    smallest,
    stored_distances,
)
from retro_model.search.index import Searcher, nearest_by_code
from retro_model.search.keys import code_of, num_lists

RESCORED = (256, 512, 1024, 2048, 4096)  # choices for the number of candidates to score again
SURPLUS = 32  # extra candidates to fetch, because codes often tie


class SearchSettings(NamedTuple):
    """Search settings, the recall that they reach, and the milliseconds per query.

    probes: lists to visit; None for exact search.
    rescored: candidates to score again; None without codes.
    milliseconds: for information only; the choice does not depend on it.
    """

    probes: int | None
    rescored: int | None
    recall: float
    milliseconds: float

    def __str__(self) -> str:
        visited = f", {self.probes} lists a search" if self.probes else ""
        again = f", {self.rescored} scored again" if self.rescored else ""
        return f"{visited}{again}, recall@{RECALL_AT} {self.recall:.3f}, {self.milliseconds:.3g} ms a query"


def choose_search_settings(
    key: str,
    index: Any,
    vectors: Vectors,
    queries: Float32Array,
    largest_norm: float,
    target_recall: float,
    gpu: bool = False,
) -> SearchSettings:
    """The fewest lists (`probes`) that reach the target recall for `queries`.

    With codes, `rescored` is the smallest value of RESCORED that reaches the target with any number of lists;
    recall is measured after the candidates are scored again.

    Raises ConfigError if the codes are too coarse to reach the target.
    """
    searcher, k = Searcher(index, gpu), min(RECALL_AT, len(vectors))
    if not num_lists(key):
        return SearchSettings(None, None, 1.0, _milliseconds(lambda: searcher.search(queries, k, 1), len(queries)))
    exact = exact_distances(queries, vectors, k)[:, -1:] + rounding_margin(queries, largest_norm)

    def nearest(probes: int, rescored: int | None) -> Float32Array:
        def search(rows: Float32Array, count: int) -> tuple[Float32Array, IdArray]:
            return searcher.search(rows, count, probes)

        if rescored is None:
            return search(queries, k)[0]
        ids = nearest_by_code(search, queries, min(rescored, len(vectors)), SURPLUS, len(vectors))
        return smallest(stored_distances(queries, vectors, ids), ids, k)[0]

    def recall(rescored: int | None, probes: int) -> float:
        return float((nearest(probes, rescored) <= exact).mean())

    reached = 0.0
    for rescored in RESCORED if code_of(key) else (None,):
        probes, reached = fewest_probes(functools.partial(recall, rescored), index.nlist, target_recall)
        if reached >= target_recall:
            milliseconds = _milliseconds(functools.partial(nearest, probes, rescored), len(queries))
            return SearchSettings(probes, rescored, reached, milliseconds)
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
    """The fewest lists that reach the target and their recall; all lists and their recall if none do.

    Recall grows with the number of lists: doubles the number until it suffices, then searches by bisection.
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
