"""Reuse the neighbors that an earlier run found, when the corpus has grown and the index is exact.

    .retro/parts/neighbors/<settings>-<content>/     what one run found, an artifact (see retro_model.jobs.parts)
        ids, distances                               of all queries: train, then valid, then test
        documents-train.npy, ...                     (documents, 3): a digest of each one's vectors, and its rows

A query's neighbors are the nearest rows of other documents by (distance, id), and a distance depends on its two
vectors alone. So for a query that was there before, the neighbors among the rows that stayed are known, and only the
added rows are compared with it. Ids change with every insertion; therefore rows are identified by documents. A
document stayed if the same vectors are there again and its place among the documents that stayed is the same: then
ids order the rows that stayed as before, and equal distances are ordered as a search of everything orders them.

If some of a query's neighbors are gone, others may follow that the earlier run did not store. The query searches
everything then, unless added rows fill the gap (as after a small change of a document).
"""

import bisect
import hashlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retro_model.core.arrays import BoolArray, Float32Array, IntArray
from retro_model.core.artifacts import DESCRIPTION, SPLITS, Artifact, ArtifactWriter, ShardedArray, save_array
from retro_model.core.errors import ArtifactError, DamagedArtifactError
from retro_model.core.rows import NO_ROW
from retro_model.jobs.job import whole_part
from retro_model.jobs.parts import Keys, code_digest, digest, keys_of, part_name, settings_digest
from retro_model.search.distances import (
    ROWS_PER_BLOCK,
    IdArray,
    import_faiss,
    pair_distances,
    rounding_margin,
    smallest,
)

logger = logging.getLogger(__name__)

KIND = "neighbors"
CODE_DIGEST = code_digest("retro_model.search")
LIBRARIES = ("numpy",)  # and faiss, whose distribution has another name with GPU functions
# An earlier run is used if it saves more than a tenth of the comparisons.
MOST_WORK = 0.9


class Documents(NamedTuple):
    """The documents of a split, in order: a digest of each one's vectors (n, 2), and the number of its rows (n,)."""

    keys: Keys
    rows: IntArray

    @property
    def total(self) -> int:
        """The number of all rows."""
        return int(self.rows.sum())

    @classmethod
    def of(cls, documents: ShardedArray, vectors: ShardedArray) -> "Documents":
        """Describe the documents of these rows. A second document with the same vectors gets another digest."""
        ids = documents[:]
        assert (np.diff(ids) >= 0).all(), "the rows of a document follow each other"
        bounds = np.append(np.flatnonzero(np.diff(ids, prepend=-1)), len(ids))
        seen: Counter[bytes] = Counter()

        def occurrences() -> Iterator[bytes]:
            for content in _contents(vectors, bounds):
                key = hashlib.blake2b(content, digest_size=16).digest()
                seen[key] += 1
                yield key + seen[key].to_bytes(8, "little")

        return cls(keys_of(occurrences()), np.diff(bounds))

    def write(self, writer: ArtifactWriter, split: str) -> None:
        """Add the documents of a split to an artifact."""
        table = np.column_stack([self.keys, self.rows.astype(np.uint64)])
        save_array(writer.folder / _table(split), table)
        writer.add_file(_table(split))

    @classmethod
    def read(cls, part: Artifact, split: str) -> "Documents":
        """Read what `write` wrote. Raises DamagedArtifactError."""
        file = part.folder / _table(split)
        try:
            table = np.load(file, allow_pickle=False)
            return cls(table[:, :2], table[:, 2].astype(np.int64))
        except (ValueError, IndexError, EOFError, FileNotFoundError) as error:
            raise DamagedArtifactError(f"{file} cannot be read ({error})") from error


def _table(split: str) -> str:
    return f"documents-{split}.npy"


def _contents(vectors: ShardedArray, bounds: IntArray) -> Iterator[bytes]:
    """The bytes of the rows of each document; document i has the rows `bounds[i]` to `bounds[i + 1]`."""
    blocks = np.unique(np.searchsorted(bounds, np.arange(0, bounds[-1] + ROWS_PER_BLOCK, ROWS_PER_BLOCK)))
    for first, last in pairwise(np.minimum(blocks, len(bounds) - 1).tolist()):
        rows = vectors[bounds[first] : bounds[last]]
        for start, stop in pairwise((bounds[first : last + 1] - bounds[first]).tolist()):
            yield rows[start:stop].tobytes()


# ---- rows that stayed --------------------------------------------------------------------------------------


class KeptRows(NamedTuple):
    """Rows that stayed, as runs: the rows from `before[i]`, `lengths[i]` many, are now those from `after[i]`.

    `before` and `after` ascend.
    """

    before: IntArray
    after: IntArray
    lengths: IntArray

    @property
    def total(self) -> int:
        """The number of rows that stayed."""
        return int(self.lengths.sum())

    def rows_after(self, rows: IntArray) -> IntArray:
        """The numbers now of rows of the earlier run, -1 for those that are gone; -1 stays -1."""
        return _moved(rows, self.before, self.after, self.lengths)

    def rows_before(self, rows: IntArray) -> IntArray:
        """The numbers in the earlier run of rows of now, -1 for those that are new."""
        return _moved(rows, self.after, self.before, self.lengths)


def _moved(rows: IntArray, starts: IntArray, targets: IntArray, lengths: IntArray) -> IntArray:
    if not len(starts):
        return np.full(rows.shape, NO_ROW, dtype=np.int64)
    runs = np.searchsorted(starts, rows, side="right") - 1
    offsets = rows - starts[runs]  # for a row before the first run, `runs` is -1
    return np.where((runs >= 0) & (offsets < lengths[runs]), targets[runs] + offsets, NO_ROW)


def kept_rows(before: Documents, after: Documents) -> KeptRows:
    """The rows of documents that are in both and in the same order."""
    _, old, new = np.intersect1d(before.keys[:, 0], after.keys[:, 0], return_indices=True)
    same = (before.keys[old] == after.keys[new]).all(axis=1)  # of a digest, the line above compares one half
    old, new = old[same], new[same]
    order = np.argsort(new)
    old, new = old[order], new[order]
    kept = _longest_increasing(old)
    old, new = old[kept], new[kept]
    rows = before.rows[old]
    if not len(rows):
        return KeptRows(rows, rows, rows)
    starts = np.flatnonzero((np.diff(old, prepend=-2) != 1) | (np.diff(new, prepend=-2) != 1))
    first_before, first_after = (np.cumsum(documents.rows) - documents.rows for documents in (before, after))
    return KeptRows(first_before[old[starts]], first_after[new[starts]], np.add.reduceat(rows, starts))


def _longest_increasing(numbers: IntArray) -> IntArray:
    """The places of a longest increasing subsequence of distinct numbers."""
    if (np.diff(numbers) > 0).all():
        return np.arange(len(numbers))
    # ends[n] is the smallest number with which an increasing subsequence of length n + 1 can end.
    ends: list[int] = []
    lengths = np.empty(len(numbers), dtype=np.int64)
    for place, number in enumerate(numbers.tolist()):
        length = bisect.bisect(ends, number)
        ends[length : length + 1] = [number]
        lengths[place] = length
    chosen: list[int] = []
    wanted, limit = len(ends) - 1, 0
    for place in range(len(numbers) - 1, -1, -1):
        if lengths[place] == wanted and (not chosen or numbers[place] < limit):
            chosen.append(place)
            wanted, limit = wanted - 1, int(numbers[place])
    return np.array(chosen[::-1], dtype=np.int64)


# ---- the earlier run ----------------------------------------------------------------------------------------


class Earlier(NamedTuple):
    """What an earlier run found: the folder of its part, each split's first row there, and the rows that stayed."""

    folder: Path
    first: Mapping[str, int]
    kept: Mapping[str, KeptRows]

    def added(self, num_rows: int) -> IntArray:
        """The rows of the database that are new, of all `num_rows`, ascending."""
        return np.flatnonzero(self.kept["train"].rows_before(np.arange(num_rows)) == NO_ROW)

    def neighbors(self, part: Artifact, split: str, rows: IntArray) -> "EarlierNeighbors":
        """What `part`, the artifact of the earlier run, holds for these queries, which were there before."""
        places = self.first[split] + rows
        ids, distances = part["ids"][places], part["distances"][places]
        return EarlierNeighbors(self.kept["train"].rows_after(ids), distances, ids[:, -1] == NO_ROW)


class AddedRows(NamedTuple):
    """Rows that were added to a database: their ids, ascending, their vectors and documents.

    `largest_norm` is the largest |y|^2, or more.
    """

    ids: IntArray
    vectors: Float32Array
    documents: IntArray
    largest_norm: float

    def nearer(
        self, queries: Float32Array, query_documents: IntArray, limits: Float32Array
    ) -> tuple[IdArray, Float32Array]:
        """The ids (n, c) and distances (n, c) of the rows of other documents that are within a query's limit.

        Padded with -1 at inf. Rows slightly beyond the limit (n,) may be there, too: a matrix product selects them,
        which rounds otherwise than the distances that are returned.
        """
        norms = np.einsum("nd,nd->n", self.vectors, self.vectors)
        reported = queries @ self.vectors.T
        reported *= -2
        reported += norms
        within = limits[:, None] - np.einsum("nd,nd->n", queries, queries)[:, None]
        within += 2 * rounding_margin(queries, self.largest_norm)  # twice, for the rounding of these sums
        numbers, places = np.nonzero((reported <= within) & (self.documents != query_documents[:, None]))
        counts = np.bincount(numbers, minlength=len(queries))
        columns = np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)
        chosen = np.full((len(queries), int(counts.max(initial=0))), NO_ROW, dtype=np.int64)
        chosen[numbers, columns] = places
        ids = chosen.copy()
        ids[numbers, columns] = self.ids[places]
        return ids, pair_distances(queries, self.vectors, chosen)


class EarlierNeighbors(NamedTuple):
    """Neighbors of the earlier run, by the ids of now (n, k), -1 for those that are gone; and their distances.

    `whole` (n,) is whether there were no more rows than these.
    """

    ids: IntArray
    distances: Float32Array
    whole: BoolArray

    def merged(self, ids: IdArray, distances: Float32Array) -> tuple[IdArray, Float32Array, BoolArray]:
        """Merge with added rows, all that are as near as the last one: ids, distances (n, k), and which are certain.

        Rows that neither list has come after the last of the earlier neighbors, by (distance, id). So the result is
        certain up to that one, or if none of them is gone: then there are k that come before all others.
        """
        k = self.ids.shape[1]
        gone = (self.ids == NO_ROW) & (self.distances < np.inf)
        known = np.where(gone, np.float32(np.inf), self.distances)
        last_id, last_distance = self.ids[:, -1], self.distances[:, -1]
        distances, ids = smallest(
            np.concatenate([known, distances], axis=1), np.concatenate([self.ids, ids], axis=1), k
        )
        nearer = distances[:, -1] < last_distance
        as_near = (distances[:, -1] == last_distance) & (ids[:, -1] <= last_id)
        return ids, distances, self.whole | ~gone.any(axis=1) | nearer | as_near


class KeptNeighbors:
    """Finds the earlier run in `folder` (see `open_parts`) that saves most, and keeps what this run finds."""

    def __init__(self, folder: Path, stored: int, chunks: Mapping[str, Artifact], embeddings: Mapping[str, Artifact]):
        self._folder, self._stored = folder, stored
        self._documents = {
            split: Documents.of(chunks[split]["documents"], embeddings[split]["vectors"]) for split in SPLITS
        }
        faiss, vectors = import_faiss(), embeddings["train"]["vectors"]
        facts = {
            "stored": stored,
            "vectors": [vectors.dtype.str, vectors.shape[1]],
            "faiss": [faiss.__version__, faiss.get_compile_options()],  # the latter names the vector instructions
        }
        self._settings = settings_digest(CODE_DIGEST, LIBRARIES, facts)
        self._part = folder / part_name(self._settings, _content(self._documents.values()))

    def earlier(self) -> Earlier | None:
        """Return the earlier run that saves most comparisons; None if none saves enough. Says so in the log."""
        queries = sum(documents.total for documents in self._documents.values())
        database = self._documents["train"].total
        for work, earlier in self._by_work():
            if work > MOST_WORK:
                break
            if _intact(earlier.folder):
                kept = sum(rows.total for rows in earlier.kept.values())
                logger.info(
                    f"knn: {kept:,} of {queries:,} queries are of an earlier run and look at "
                    f"{database - earlier.kept['train'].total:,} new chunks of {database:,}, as long as all their "
                    f"neighbors are there: some {work:.1%} of the work"
                )
                return earlier
        logger.info(f"knn: {queries:,} queries look at all {database:,} chunks; no earlier run saves much")
        return None

    def _by_work(self) -> list[tuple[float, Earlier]]:
        found = []
        for file in sorted(self._folder.glob(f"{part_name(self._settings, '')}*/{DESCRIPTION}")):
            try:
                part = Artifact.open(file.parent, KIND, verify=False)
                before = {split: Documents.read(part, split) for split in SPLITS}
            except ArtifactError as error:
                _discard(file.parent, error)
                continue
            kept = {split: kept_rows(before[split], self._documents[split]) for split in SPLITS}
            totals = [before[split].total for split in SPLITS]
            first = dict(zip(SPLITS, np.cumsum([0, *totals[:-1]]).tolist(), strict=True))
            found.append((self._work(before, kept), Earlier(file.parent, first, kept)))
        return sorted(found, key=lambda pair: pair[0])

    def _work(self, before: Mapping[str, Documents], kept: Mapping[str, KeptRows]) -> float:
        """The expected comparisons with this earlier run, as a share of all queries with all rows.

        It is taken for granted that a row that is gone is as likely a neighbor as any.
        """
        database, queries = self._documents["train"].total, sum(item.total for item in self._documents.values())
        stayed, kept_queries = kept["train"].total, sum(rows.total for rows in kept.values())
        gone = 1 - stayed / max(before["train"].total, 1)
        whole = queries - kept_queries * (1 - gone) ** self._stored
        return (kept_queries * (database - stayed) + whole * database) / max(queries * database, 1)

    def keep(self, parts: Iterable[Artifact]) -> None:
        """Keep the neighbors of all queries, in `parts`, for later runs."""
        if (self._part / DESCRIPTION).is_file():
            os.utime(self._part)
            return
        if self._part.exists():
            shutil.rmtree(self._part)  # a kill interrupted its deletion
        with whole_part(self._part) as folder, ArtifactWriter(folder, KIND) as writer:
            for part in parts:
                writer.adopt(part)
            for split, documents in self._documents.items():
                documents.write(writer, split)


def _content(splits: Iterable[Documents]) -> str:
    return digest([hashlib.sha256(documents.keys.tobytes()).hexdigest() for documents in splits])


def _intact(folder: Path) -> bool:
    try:
        Artifact.open(folder, KIND)
    except ArtifactError as error:
        _discard(folder, error)
        return False
    return True


def _discard(folder: Path, error: ArtifactError) -> None:
    logger.warning(f"{folder.name}: not used, what was there is of no use ({error})")
    shutil.rmtree(folder)
