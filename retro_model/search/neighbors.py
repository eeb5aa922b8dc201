"""Find the nearest database chunks of every chunk, excluding chunks of its own document.

The result does not depend on batches, surplus, rounding or device. A query's neighbors are the `stored` nearest
candidates by (distance, id) from other documents, in the lists that it visits, with distances computed from the
stored vectors. If there are too few, the query visits twice as many lists, and so on until there are enough or it
has visited all lists. An id of -1 means that the database holds no more.

With an index of rows, all rows of the visited lists are candidates. With an index of codes, only the nearest of them
from other documents are, by (distance of the code, id): `rescored` many, or CODES_PER_NEIGHBOR per neighbor if that
is more.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from retro_model.core.arrays import BoolArray, Float32Array, IntArray
from retro_model.core.artifacts import SPLITS, Artifact, ArtifactWriter, ShardedArray, rows_per_part, whole_folder
from retro_model.core.config import Config, setting
from retro_model.core.progress import Progress
from retro_model.core.rows import NO_ROW
from retro_model.jobs.engine import Engine, Running
from retro_model.jobs.job import Outcome, row_parts, work_or_temporary
from retro_model.jobs.parts import Parts, open_parts
from retro_model.search.distances import (
    RECALL_AT,
    RECALL_QUERIES,
    ROWS_PER_BLOCK,
    SHAPING_FACTS,
    IdArray,
    Vectors,
    as_float32,
    float_blocks,
    import_faiss,
    largest_square,
    pair_distances,
    rounding_margin,
    smallest,
    stored_distances,
)
from retro_model.search.earlier import AddedRows, Earlier, KeptNeighbors
from retro_model.search.index import Index, gpu_build, nearest_by_code
from retro_model.search.keys import code_of, num_lists

logger = logging.getLogger(__name__)

QUERIES_PER_BATCH = 1024
# Extra candidates in the first search; they cover the chunks of the query's own document in most corpora. With 64
# neighbors this fetches 100 candidates, and from 100 on faiss uses a cheaper way to collect them.
SURPLUS = 36
PAIRS_AT_ONCE = 1 << 22  # candidates in memory; larger batches are split
PERCENTILES = (5, 25, 50, 75, 95)  # percentiles of the first neighbor's distance in the metrics
CODES_PER_NEIGHBOR = 4  # score at least this many candidates again for each neighbor


@dataclass(frozen=True)
class NeighborsConfig(Config, section="neighbors"):
    """How many neighbors to store for each chunk: more than any run uses, so that a sweep searches once."""

    stored: int = setting(64, minimum=1, maximum=4096)


@dataclass(frozen=True)
class Database:
    """A searchable database: the index over the train chunks, their stored vectors and their document ids."""

    index: Index
    vectors: Vectors
    documents: IntArray

    @classmethod
    def open(cls, embeddings: Artifact, index: Artifact, chunks: Artifact, device: str = "cpu") -> "Database":
        """Opens the database; `device` is where faiss searches: auto, cpu or cuda.

        Raises MismatchError if the artifacts were not made from one another, and what `Index.open` raises.
        """
        embeddings.require(chunks=chunks.fingerprint)
        index.require(embeddings=embeddings.fingerprint, chunks=chunks.fingerprint)
        return cls(Index.open(index, device), embeddings["vectors"], chunks["documents"][:])

    def nearest(
        self, queries: Float32Array, query_documents: IntArray, k: int, surplus: int = SURPLUS
    ) -> tuple[IdArray, Float32Array]:
        """Ids (n, k) and distances (n, k) of each query's k neighbors, as defined at the top of this module.

        `query_documents` (n,) is the document to exclude for each query, -1 for none. Rows with fewer than k
        neighbors are padded with id -1 at distance inf. `surplus` changes speed only.
        """

        return self.index.in_threads(
            lambda share: self._nearest(queries[share], query_documents[share], k, surplus), len(queries)
        )

    def _nearest(
        self, queries: Float32Array, query_documents: IntArray, k: int, surplus: int
    ) -> tuple[IdArray, Float32Array]:
        ids, distances = _empty_result(len(queries), k)
        search = self._nearest_in_lists if self.index.rescored is None else self._nearest_by_codes
        pending, probes = np.arange(len(queries)), self.index.probes
        while len(pending):
            found = search(queries[pending], query_documents[pending], k, surplus, probes)
            ids[pending], distances[pending] = found
            if probes == self.index.lists:
                break
            pending, probes = pending[found[0][:, -1] == NO_ROW], min(2 * probes, self.index.lists)
        return ids, distances

    def _nearest_in_lists(
        self, queries: Float32Array, query_documents: IntArray, k: int, surplus: int, probes: int
    ) -> tuple[IdArray, Float32Array]:
        """Each query's k nearest in `probes` lists; fetches more candidates until the result is certain."""
        ids, distances = _empty_result(len(queries), k)
        pending, fetched = np.arange(len(queries)), k + surplus
        while len(pending):
            fetched = min(fetched, self.index.rows)
            uncertain = []
            for part in _parts(pending, max(1, PAIRS_AT_ONCE // fetched)):
                reported, candidates = self.index.search(queries[part], fetched, probes)
                margin = self._margin(queries[part])
                excluded = self._excluded(query_documents[part], candidates)
                ids[part], distances[part] = self._select_nearest(
                    queries[part], reported, candidates, excluded, margin, k
                )
                # Up to rounding, rows that were not fetched are at least as far as the last fetched one.
                certain = reported[:, -1] > distances[part, -1] + margin[:, 0]
                exhausted = candidates[:, -1] == NO_ROW
                uncertain.append(part[~(certain | exhausted)])
            if fetched == self.index.rows:
                break
            pending, fetched = np.concatenate(uncertain), 2 * fetched
        return ids, distances

    def _select_nearest(
        self,
        queries: Float32Array,
        reported: Float32Array,
        candidates: IdArray,
        excluded: BoolArray,
        margin: Float32Array,
        k: int,
    ) -> tuple[IdArray, Float32Array]:
        """The k nearest of the `candidates` (n, c), which are sorted by their `reported` distances.

        Recomputes the distances of only those candidates that could be among the k nearest given the rounding
        error, and none if the index reports pair distances.
        """
        if self.index.reports_pair_distances:
            distances, ids = smallest(np.where(excluded, np.float32(np.inf), reported), candidates, k)
            return ids, distances
        rank = np.cumsum(~excluded, axis=1)
        kth = np.min(reported, axis=1, where=~excluded & (rank == k), initial=np.inf)[:, None]
        wanted = ~excluded & (reported <= kth + 2 * margin)
        width = int(wanted.any(axis=0).sum() and np.flatnonzero(wanted.any(axis=0))[-1] + 1)
        places = np.where(wanted[:, :width], candidates[:, :width], NO_ROW)
        distances, ids = smallest(self._distances(queries, places), places, k)
        return ids, distances

    def _nearest_by_codes(
        self, queries: Float32Array, query_documents: IntArray, k: int, surplus: int, probes: int
    ) -> tuple[IdArray, Float32Array]:
        """Each query's k nearest in `probes` lists, among the candidates that codes select."""
        assert self.index.rescored is not None
        count = min(max(self.index.rescored, CODES_PER_NEIGHBOR * k), self.index.rows)
        candidates = nearest_by_code(
            lambda rows, fetched: self.index.search(rows, fetched, probes),
            queries,
            count,
            surplus,
            self.index.rows,
            lambda rows, ids: self._excluded(query_documents[rows], ids),
        )
        distances, ids = smallest(self._distances(queries, candidates), candidates, k)
        return ids, distances

    def _excluded(self, query_documents: IntArray, candidates: IdArray) -> BoolArray:
        """A mask (n, c) of candidates that are missing (-1) or in the query's document."""
        none = candidates == NO_ROW
        excluded: BoolArray = none | (self.documents[np.where(none, 0, candidates)] == query_documents[:, None])
        return excluded

    def _margin(self, queries: Float32Array) -> Float32Array:
        if self.index.reports_pair_distances:
            return np.zeros((len(queries), 1), dtype=np.float32)
        return rounding_margin(queries, self.index.largest_norm)

    def _distances(self, queries: Float32Array, ids: IdArray) -> Float32Array:
        """Distances (n, c) of the queries to the stored vectors `ids`; inf where an id is -1."""
        if self.index.stored is not None:
            return pair_distances(queries, self.index.stored, ids)
        return stored_distances(queries, self.vectors, ids)


def _empty_result(num_queries: int, k: int) -> tuple[IdArray, Float32Array]:
    return np.full((num_queries, k), NO_ROW, dtype=np.int64), np.full((num_queries, k), np.inf, dtype=np.float32)


def _parts(rows: IntArray, size: int) -> Iterator[IntArray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


# ---- the artifact --------------------------------------------------------------------------------------


class _Opened(NamedTuple):
    database: Database
    searched: Artifact
    chunks: dict[str, Artifact]
    embeddings: dict[str, Artifact]
    grown: "_Grown | None"


class _Grown(NamedTuple):
    """A database with an exact index that has grown since an earlier run, what that run found, and the added rows."""

    database: Database
    earlier: Earlier
    found: Artifact
    added: AddedRows

    @classmethod
    def of(cls, database: Database, earlier: Earlier) -> "_Grown":
        rows, stored = earlier.added(database.index.rows), database.index.stored
        assert stored is not None
        added = AddedRows(rows, stored[rows], database.documents[rows], database.index.largest_norm)
        return cls(database, earlier, Artifact.open(earlier.folder, "neighbors", verify=False), added)

    def nearest(
        self, split: str, rows: slice, queries: Float32Array, documents: IntArray, k: int
    ) -> tuple[IdArray, Float32Array, int]:
        """What `Database.nearest` returns for these rows of a split, and how many of them looked at all rows."""
        ids, distances = _empty_result(len(queries), k)
        certain = np.zeros(len(queries), dtype=np.bool_)
        before = self.earlier.kept[split].rows_before(np.arange(rows.start, rows.stop))
        (known,) = np.nonzero(before != NO_ROW)
        for part in _parts(known, max(1, PAIRS_AT_ONCE // max(1, len(self.added.ids)))):
            found = self.earlier.neighbors(self.found, split, before[part])
            nearer = self.added.nearer(queries[part], documents[part], found.distances[:, -1])
            ids[part], distances[part], certain[part] = found.merged(*nearer)
        (unknown,) = np.nonzero(~certain)
        ids[unknown], distances[unknown] = self.database.nearest(queries[unknown], documents[unknown], k)
        return ids, distances, len(unknown)


@dataclass(frozen=True)
class KnnJob:
    """A job (see retro_model.jobs.job) whose parts are the neighbors of a range of chunks."""

    embeddings: Path
    index: Path
    chunks: Path
    config: NeighborsConfig
    queries_per_batch: int
    device: str = "auto"
    earlier: Earlier | None = None
    kind: ClassVar[str] = "neighbors"

    @property
    def uses_gpus(self) -> bool:
        """Whether faiss can search on GPUs: it is a GPU build and the index holds rows, not codes."""
        key = Artifact.open(self.index, "index", verify=False).facts["key"]
        return self.device != "cpu" and gpu_build() and code_of(key) is None

    def open(self) -> _Opened:
        """The database, and the queries' chunks and embeddings by split."""
        chunks = {split: Artifact.open(self.chunks / split, "chunks", verify=False) for split in SPLITS}
        embeddings = {split: Artifact.open(self.embeddings / split, "embeddings", verify=False) for split in SPLITS}
        index = Artifact.open(self.index, "index", verify=False)
        database = Database.open(embeddings["train"], index, chunks["train"], self.device)
        grown = _Grown.of(database, self.earlier) if self.earlier else None
        return _Opened(database, index, chunks, embeddings, grown)

    def facts(self, opened: _Opened) -> dict[str, Any]:
        """Fingerprints of the database and the index, and the number of neighbors kept."""
        return {
            "database": opened.chunks["train"].fingerprint,
            "index": opened.searched.fingerprint,
            "stored": self.config.stored,
        }

    def make(self, opened: _Opened, folder: Path, split: str, start: int, stop: int) -> Iterator[int]:
        """Writes the neighbors of chunks `start` to `stop` of a split."""
        database, _, chunks, embeddings, grown = opened
        id_type, k, searched = _id_type(database.index.rows), self.config.stored, 0
        with ArtifactWriter(folder, self.kind, max(stop - start, 1)) as writer:
            for rows in _slices(start, stop, self.queries_per_batch):
                queries = as_float32(embeddings[split]["vectors"][rows])
                documents = chunks[split]["documents"][rows]
                if grown is None:
                    (ids, distances), count = database.nearest(queries, documents, k), len(queries)
                else:
                    ids, distances, count = grown.nearest(split, rows, queries, documents, k)
                writer.append(ids=ids.astype(id_type), distances=distances)
                searched += count
                yield len(ids)
            facts = {**self.facts(opened), **_split_facts(chunks[split], embeddings[split])}
            writer.facts.update(**facts, searched=searched)


def _split_facts(chunks: Artifact, embeddings: Artifact) -> dict[str, Any]:
    return {"chunks": chunks.fingerprint, "embeddings": embeddings.fingerprint}


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """Slices of `size` rows; a single empty one if there are no rows, so that an empty array is written."""
    for first in range(start, max(stop, start + 1), size):
        yield slice(first, min(first + size, stop))


def make_neighbors(
    embeddings_folder: Path,
    index_folder: Path,
    chunks_folder: Path,
    config: NeighborsConfig,
    out_folder: Path,
    *,
    queries_per_batch: int = QUERIES_PER_BATCH,
    device: str = "auto",
    engine: Engine | None = None,
    work_folder: Path | None = None,
    parts: Parts | None = None,
) -> Outcome:
    """Writes every chunk's neighbors among the train chunks, for all splits; returns metrics and timings.

    `queries_per_batch`, `engine` and `device` (auto, cpu or cuda) change speed only. Parts that a killed run
    finished in `work_folder` are reused. With an exact index, so is what earlier runs found that is kept in `parts`:
    chunks that were there before are compared with new ones only (retro_model.search.earlier).

    Raises MismatchError if chunks, embeddings and index were not made from one another, ConfigError if the
    device is missing.
    """
    chunks = {split: Artifact.open(chunks_folder / split, "chunks") for split in SPLITS}
    embeddings = {split: Artifact.open(embeddings_folder / split, "embeddings") for split in SPLITS}
    index = Artifact.open(index_folder, "index")
    shaping = {name: embeddings["train"].facts[name] for name in SHAPING_FACTS}
    for split in SPLITS:
        embeddings[split].require(chunks=chunks[split].fingerprint, **shaping)
    total = sum(artifact.rows for artifact in chunks.values())
    with (
        open_parts(parts, KnnJob.kind, out_folder) as kept_folder,
        work_or_temporary(work_folder, out_folder) as work,
        whole_folder(out_folder) as folder,
    ):
        exact = not num_lists(index.facts["key"])
        kept = KeptNeighbors(kept_folder, config.stored, chunks, embeddings) if parts and exact else None
        folders = embeddings_folder.absolute(), index_folder.absolute(), chunks_folder.absolute()
        job = KnnJob(*folders, config, queries_per_batch, device, kept.earlier() if kept else None)
        started = time.perf_counter()
        with (engine or Engine()).open(job) as running, Progress("knn", total, "chunk") as bar:
            made = [
                part
                for split in SPLITS
                for part in _write_split(running, folder / split, chunks[split], embeddings[split], work, bar)
            ]
        seconds = time.perf_counter() - started
        if kept:
            kept.keep(made)
        metrics = _metrics(folder, chunks, embeddings)
    if not bar.num_new:
        return Outcome(metrics, {})
    milliseconds, searched = 1000 * seconds / bar.num_new, sum(part.facts["searched"] for part in made)
    logger.info(
        f"knn: {milliseconds:.3g} ms a query for its {config.stored} nearest of {chunks['train'].rows:,}; "
        f"{searched:,} of {total:,} queries looked at all of them"
    )
    return Outcome(metrics, {"milliseconds_per_query": milliseconds, "queries_searched": float(searched)})


def _write_split(
    running: Running[_Opened], folder: Path, chunks: Artifact, embeddings: Artifact, work: Path, bar: Progress
) -> Iterator[Artifact]:
    """Writes the neighbors of a split, and yields the parts they consist of."""
    facts, size = _split_facts(chunks, embeddings), rows_per_part(chunks.rows)
    with ArtifactWriter(folder, "neighbors", size) as writer:
        for part in running.make(row_parts(folder.name, chunks.rows, size, **facts), work, bar):
            writer.adopt(part)
            yield part
        writer.facts.update(**running.facts, **facts)


def _metrics(folder: Path, chunks: dict[str, Artifact], embeddings: dict[str, Artifact]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for split in SPLITS:
        found = Artifact.open(folder / split, "neighbors", verify=False)
        values = describe_neighbors(found, chunks[split], embeddings[split], chunks["train"], embeddings["train"])
        metrics |= {f"{split}_{name}": value for name, value in values.items()}
    return metrics


def describe_neighbors(
    neighbors: Artifact, chunks: Artifact, embeddings: Artifact, database: Artifact, vectors: Artifact, seed: int = 0
) -> dict[str, float]:
    """Metrics of a split's `neighbors`, in one pass over blocks of rows.

    `chunks` and `embeddings` belong to the split, `database` and `vectors` are the train chunks and embeddings.

    recall: share of the RECALL_AT nearest that were found, against exact search, for RECALL_QUERIES random queries.
    missing_share: share of all neighbor slots that hold -1.
    short_share: share of queries with fewer neighbors than are stored.
    copy_share: share of queries whose first neighbor has the same input tokens.
    first_distance_mean, first_distance_<p>: mean and p-th percentile of the first neighbor's squared distance; 0 if
        no query has a neighbor.
    """
    ids, distances = neighbors["ids"], neighbors["distances"]
    num_missing = num_short = num_copies = 0
    first = []
    for rows in _slices(0, len(ids), ROWS_PER_BLOCK):
        here = ids[rows]
        missing = here == NO_ROW
        num_missing += int(missing.sum())
        num_short += int(missing[:, -1].sum())
        found = ~missing[:, 0]
        first.append(distances[rows][found, 0])
        copies = database["tokens"][here[found, 0]][:, :-1] == chunks["tokens"][rows][found, :-1]
        num_copies += int(copies.all(axis=1).sum())
    nearest = np.concatenate(first).astype(np.float64)
    percentiles = np.percentile(nearest, PERCENTILES) if len(nearest) else np.zeros(len(PERCENTILES))
    return {
        "recall": _recall(neighbors, chunks, embeddings, database, vectors, seed),
        "missing_share": num_missing / max(ids.shape[0] * ids.shape[1], 1),
        "short_share": num_short / max(len(ids), 1),
        "copy_share": num_copies / max(len(ids), 1),
        "first_distance_mean": float(nearest.mean()) if len(nearest) else 0.0,
        **{f"first_distance_{p}": float(value) for p, value in zip(PERCENTILES, percentiles, strict=True)},
    }


def _recall(
    neighbors: Artifact, chunks: Artifact, embeddings: Artifact, database: Artifact, vectors: Artifact, seed: int
) -> float:
    """Recall against exact search, counting ties and rounding as hits; 1 if there are no neighbors to find."""
    num_rows = len(neighbors["ids"])
    if not num_rows:
        return 1.0
    rows = np.random.default_rng(seed).choice(num_rows, min(RECALL_QUERIES, num_rows), replace=False)
    queries = as_float32(embeddings["vectors"][rows])
    k = min(RECALL_AT, neighbors["ids"].shape[1])
    exact, largest = _exact_in_other_documents(
        queries, chunks["documents"][rows], vectors["vectors"], database["documents"], k
    )
    there = np.isfinite(exact).sum(axis=1)
    if not there.any():
        return 1.0
    limit = np.max(exact, axis=1, where=np.isfinite(exact), initial=0.0)[:, None] + rounding_margin(queries, largest)
    return int((neighbors["distances"][rows][:, :k] <= limit).sum()) / int(there.sum())


def _exact_in_other_documents(
    queries: Float32Array, query_documents: IntArray, vectors: ShardedArray, documents: ShardedArray, k: int
) -> tuple[Float32Array, float]:
    """Distances (n, k) of the k nearest rows in other documents, by brute force, and the largest squared norm."""
    nearest, largest = np.full((len(queries), k), np.inf, dtype=np.float32), 0.0
    start = 0
    for block in float_blocks(vectors):
        here = documents[start : start + len(block)]
        largest = max(largest, largest_square(block))
        # Fetch as many more rows as a query's own document can have in this block.
        names, counts = np.unique(here, return_counts=True)
        own = int(counts[np.isin(names, query_documents)].max(initial=0))
        fetched = min(k + own, len(block))
        for part in _slices(0, len(queries), max(1, PAIRS_AT_ONCE // fetched)):
            distances, places = import_faiss().knn(queries[part], block, fetched)
            distances[here[places] == query_documents[part, None]] = np.inf
            nearest[part] = np.sort(np.concatenate([nearest[part], distances], axis=1), axis=1)[:, :k]
        start += len(block)
    return nearest, largest


def _id_type(num_rows: int) -> type[np.signedinteger[Any]]:
    return np.int32 if num_rows <= np.iinfo(np.int32).max else np.int64
