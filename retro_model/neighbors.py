"""The nearest database chunks of every chunk, from other documents than its own.

What comes out is defined without the index's batches, surplus or rounding: of the candidates in the
lists that a query visits, the `stored` nearest by (distance, id) that are not of its document, with
distances computed again from the stored vectors. If those lists hold too few, twice as many are
visited, until there are enough or the whole database has been seen: -1 means that there are no more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from retro_model.artifacts import SPLITS, Artifact, ArtifactWriter, ShardedArray, rows_per_part, whole_folder
from retro_model.config import Config, setting
from retro_model.engine import Engine, row_parts, work_or_temporary
from retro_model.index import SHAPING_FACTS, FloatArray, IdArray, Index, pair_distances, rounding_margin
from retro_model.progress import Progress

IntArray = npt.NDArray[np.integer[Any]]

NONE = -1  # no neighbor; also the document of a query that has none
QUERIES_PER_BATCH = 1024
SURPLUS = 32  # candidates fetched beyond those wanted, at first: the own document's share in most corpora
PAIRS_AT_ONCE = 1 << 22  # candidates in memory: a batch of many candidates is split


@dataclass(frozen=True)
class NeighborsConfig(Config, section="neighbors"):
    """`stored` neighbors are kept for each chunk: more than any run uses, so that sweeps search once."""

    stored: int = setting(64, minimum=1, maximum=4096)


@dataclass(frozen=True)
class Database:
    """What is searched: the index over the train chunks, their stored vectors and their document ids."""

    index: Index
    vectors: ShardedArray
    documents: IntArray

    @classmethod
    def open(cls, embeddings: Artifact, index: Index, chunks: Artifact) -> "Database":
        """The three, after a check that they were made from one another (MismatchError)."""
        embeddings.require(chunks=chunks.fingerprint)
        index.artifact.require(embeddings=embeddings.fingerprint, chunks=chunks.fingerprint)
        return cls(index, embeddings["vectors"], chunks["documents"][:])

    def nearest(
        self, queries: FloatArray, query_documents: IntArray, k: int, surplus: int = SURPLUS
    ) -> tuple[IdArray, FloatArray]:
        """Ids (n, k) and distances (n, k) of each query's k nearest, as defined at the top of this module.

        `query_documents` (n,) names the document whose chunks a query must not get, -1 for none. An id
        of -1, at distance inf, stands behind the last neighbor. `surplus` changes speed only.
        """
        ids, distances = _no_neighbors(len(queries), k)
        pending, probes = np.arange(len(queries)), self.index.probes
        while len(pending):
            found = self._among_lists(queries[pending], query_documents[pending], k, surplus, probes)
            ids[pending], distances[pending] = found
            if probes == self.index.lists:
                break
            pending, probes = pending[found[0][:, -1] == NONE], min(2 * probes, self.index.lists)
        return ids, distances

    def _among_lists(
        self, queries: FloatArray, query_documents: IntArray, k: int, surplus: int, probes: int
    ) -> tuple[IdArray, FloatArray]:
        """The k nearest in `probes` lists of each query, fetching more and more until they are certain."""
        ids, distances = _no_neighbors(len(queries), k)
        pending, fetched = np.arange(len(queries)), k + surplus
        while len(pending):
            fetched = min(fetched, self.index.rows)
            uncertain = []
            for part in _parts(pending, max(1, PAIRS_AT_ONCE // fetched)):
                reported, candidates = self.index.search(queries[part], fetched, probes)
                ids[part], distances[part] = self._best(queries[part], query_documents[part], candidates, k)
                # A row that was not fetched is no nearer than the last one that was, give or take rounding.
                margin = rounding_margin(queries[part], self.index.largest_norm)
                certain = reported[:, -1:] > distances[part][:, -1:] + margin
                exhausted = candidates[:, -1:] == NONE
                uncertain.append(part[~(certain | exhausted)[:, 0]])
            if fetched == self.index.rows:
                break
            pending, fetched = np.concatenate(uncertain), 2 * fetched
        return ids, distances

    def _best(
        self, queries: FloatArray, query_documents: IntArray, candidates: IdArray, k: int
    ) -> tuple[IdArray, FloatArray]:
        """The k nearest of `candidates` (n, c) from other documents, by (distance, id)."""
        rows, places = np.unique(candidates, return_inverse=True)  # -1, where there is one, comes first
        places = places.reshape(candidates.shape)
        first = int(len(rows) > 0 and rows[0] == NONE)
        rows, places = rows[first:], places - first
        if not len(rows):
            return _no_neighbors(len(queries), k)
        documents = np.append(self.documents[rows], NONE)[places]  # place -1 reads the appended one
        places = np.where((places < 0) | (documents == query_documents[:, None]), -1, places)
        distances = pair_distances(queries, self.vectors[rows].astype(np.float32), places)
        ids = np.where(places < 0, np.iinfo(np.int64).max, candidates)
        order = np.lexsort((ids, distances), axis=-1)[:, :k]
        ids, distances = np.take_along_axis(ids, order, axis=1), np.take_along_axis(distances, order, axis=1)
        ids[np.isinf(distances)] = NONE
        missing = ((0, 0), (0, k - ids.shape[1]))
        return np.pad(ids, missing, constant_values=NONE), np.pad(distances, missing, constant_values=np.inf)


def _no_neighbors(num_queries: int, k: int) -> tuple[IdArray, FloatArray]:
    return np.full((num_queries, k), NONE, dtype=np.int64), np.full((num_queries, k), np.inf, dtype=np.float32)


def _parts(rows: IntArray, size: int) -> Iterator[IntArray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


# ---- the artifact --------------------------------------------------------------------------------------


class _Opened(NamedTuple):
    database: Database
    chunks: dict[str, Artifact]
    embeddings: dict[str, Artifact]


@dataclass(frozen=True)
class KnnJob:
    """Searches for ranges of chunks; see retro_model.engine."""

    embeddings: Path
    index: Path
    chunks: Path
    config: NeighborsConfig
    queries_per_batch: int
    kind: ClassVar[str] = "neighbors"

    def open(self) -> _Opened:
        """The database, and what the queries are."""
        chunks = {split: Artifact.open(self.chunks / split, "chunks", verify=False) for split in SPLITS}
        embeddings = {split: Artifact.open(self.embeddings / split, "embeddings", verify=False) for split in SPLITS}
        return _Opened(Database.open(embeddings["train"], Index.open(self.index), chunks["train"]), chunks, embeddings)

    def facts(self, opened: _Opened) -> dict[str, Any]:
        """What was searched, and how many are kept."""
        database, chunks, _ = opened
        return {
            "database": chunks["train"].fingerprint,
            "index": database.index.artifact.fingerprint,
            "stored": self.config.stored,
        }

    def make(self, opened: _Opened, folder: Path, split: str, start: int, stop: int) -> Iterator[int]:
        """The neighbors of chunks `start` to `stop` of a split."""
        database, chunks, embeddings = opened
        id_type = _id_type(database.index.rows)
        with ArtifactWriter(folder, self.kind, max(stop - start, 1)) as writer:
            for rows in _slices(start, stop, self.queries_per_batch):
                queries = embeddings[split]["vectors"][rows].astype(np.float32)
                documents = chunks[split]["documents"][rows]
                ids, distances = database.nearest(queries, documents, self.config.stored)
                writer.append(ids=ids.astype(id_type), distances=distances)
                yield len(ids)
            writer.facts.update(**self.facts(opened), **_of_split(chunks[split], embeddings[split]))


def _of_split(chunks: Artifact, embeddings: Artifact) -> dict[str, Any]:
    return {"chunks": chunks.fingerprint, "embeddings": embeddings.fingerprint}


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """Slices of `size` rows; one of none where there are none, so that the array is written all the same."""
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
    engine: Engine | None = None,
    work_folder: Path | None = None,
) -> dict[str, float]:
    """Writes the neighbors of every split's chunks in the train chunks, and returns what there is to say.

    `queries_per_batch` and `engine` change speed only. What was finished before a kill is found again in
    `work_folder`.

    Raises MismatchError where chunks, embeddings and index were not made from one another.
    """
    chunks = {split: Artifact.open(chunks_folder / split, "chunks") for split in SPLITS}
    embeddings = {split: Artifact.open(embeddings_folder / split, "embeddings") for split in SPLITS}
    shaping = {name: embeddings["train"].facts[name] for name in SHAPING_FACTS}
    for split in SPLITS:
        embeddings[split].require(chunks=chunks[split].fingerprint, **shaping)
    job = KnnJob(
        embeddings_folder.absolute(), index_folder.absolute(), chunks_folder.absolute(), config, queries_per_batch
    )
    total = sum(artifact.rows for artifact in chunks.values())
    metrics: dict[str, float] = {}
    with (
        work_or_temporary(work_folder, out_folder) as work,
        whole_folder(out_folder) as folder,
        (engine or Engine()).open(job) as running,
        Progress("knn", total, "chunk") as bar,
    ):
        for split in SPLITS:
            facts, rows = _of_split(chunks[split], embeddings[split]), chunks[split].rows
            counts, size = _Counts(chunks["train"]["tokens"]), rows_per_part(rows)
            with ArtifactWriter(folder / split, "neighbors", size) as writer:
                start = 0
                for part in running.make(row_parts(split, rows, size, **facts), work, bar):
                    writer.adopt(part)
                    tokens = chunks[split]["tokens"][start : start + part.rows]
                    counts.add(part["ids"][:].astype(np.int64), part["distances"][:], tokens)
                    start += part.rows
                writer.facts.update(**running.facts, **facts)
            metrics |= {f"{split}_{name}": value for name, value in counts.summary().items()}
    return metrics


def _id_type(num_rows: int) -> type[np.signedinteger[Any]]:
    return np.int32 if num_rows <= np.iinfo(np.int32).max else np.int64


class _Counts:
    """What is told about a split's neighbors, gathered batch by batch."""

    def __init__(self, database_tokens: ShardedArray) -> None:
        self._database_tokens = database_tokens
        self._first: list[FloatArray] = []
        self._queries = self._slots = self._missing = self._short = self._copies = 0

    def add(self, ids: IdArray, distances: FloatArray, tokens: IntArray) -> None:
        """Counts a batch; a copy is a first neighbor with the query's own input tokens."""
        missing = ids == NONE
        self._queries += len(ids)
        self._slots += ids.size
        self._missing += int(missing.sum())
        self._short += int(missing[:, -1].sum())
        (found,) = np.nonzero(~missing[:, 0])
        self._first.append(distances[found, 0])
        neighbors = self._database_tokens[ids[found, 0]]
        self._copies += int((neighbors[:, :-1] == tokens[found][:, :-1]).all(axis=1).sum())

    def summary(self) -> dict[str, float]:
        """Shares and distances; a distance of 0 where no query has a neighbor."""
        first = np.concatenate([*self._first, np.empty(0, dtype=np.float32)]).astype(np.float64)
        middle, mean = (float(np.median(first)), float(first.mean())) if len(first) else (0.0, 0.0)
        return {
            "missing_share": self._missing / max(self._slots, 1),
            "short_share": self._short / max(self._queries, 1),
            "copy_share": self._copies / max(self._queries, 1),
            "first_distance_mean": mean,
            "first_distance_median": middle,
        }
