"""Neighbors of a corpus that has grown: the bytes of a clean run, and only what is new is searched for."""

import logging
import shutil
from collections.abc import Callable, Mapping
from itertools import combinations, count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_stages import files_of
from fixtures import write_vectors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retro_model.core import artifacts
from retro_model.core.artifacts import SPLITS, Artifact
from retro_model.jobs.engine import Engine, EngineConfig
from retro_model.jobs.parts import Parts
from retro_model.search import earlier
from retro_model.search import neighbors as neighbors_module
from retro_model.search.build import make_index
from retro_model.search.distances import pair_distances
from retro_model.search.earlier import AddedRows, Documents, kept_rows
from retro_model.search.keys import IndexConfig
from retro_model.search.neighbors import NeighborsConfig, make_neighbors

Rows = tuple[tuple[int, ...], ...]
Corpus = Mapping[str, list[Rows]]  # the vectors of each document of a split
ALL = 1 << 40
NUMBERS = count()


class World:
    """A folder of parts, and runs of `knn` that use it or not."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.parts, self.searched = folder, Parts(folder / "parts", ALL), -1

    def run(self, corpus: Corpus, parts: Parts | None, stored: int = 4, key: str = "Flat", **options: Any) -> Any:
        """The files of the neighbors; `searched` is how many queries looked at all rows."""
        folder = self.folder / f"run-{next(NUMBERS)}"
        vectors = {split: np.array([row for rows in corpus[split] for row in rows]).reshape(-1, 2) for split in SPLITS}
        lengths = {split: [len(rows) for rows in corpus[split]] for split in SPLITS}
        documents = {
            split: 10_000 * number + np.repeat(np.arange(len(lengths[split])), lengths[split])
            for number, split in enumerate(SPLITS)
        }
        write_vectors(folder, vectors, documents, rows_per_shard=7)
        make_index(folder / "embeddings", IndexConfig(key=key), folder / "index")
        folders = folder / "embeddings", folder / "index", folder / "chunks"
        made = make_neighbors(*folders, NeighborsConfig(stored=stored), folder / "out", parts=parts, **options)
        self.searched = int(made.timings.get("queries_searched", -1))
        return files_of(folder / "out")

    def found(self) -> list[Path]:
        return [path.parent for path in self.parts.folder.glob("neighbors/*/artifact.json")]


def made_up(seed: int, num_documents: int, largest: int = 100) -> list[Rows]:
    random = np.random.default_rng(seed)
    return [
        tuple(map(tuple, random.integers(0, largest, (random.integers(1, 6), 2)).tolist()))
        for _ in range(num_documents)
    ]


@pytest.fixture
def corpus() -> dict[str, list[Rows]]:
    return {"train": made_up(0, 60), "valid": made_up(1, 6), "test": made_up(2, 5)}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def rows_of(*documents: list[Rows]) -> int:
    return sum(len(rows) for split in documents for rows in split)


POINTS = st.tuples(st.integers(0, 3), st.integers(0, 2))  # few, so that there are ties and copies
DOCUMENTS = st.lists(POINTS, min_size=1, max_size=5).map(tuple)
CHANGES = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "move", "change", "repeat"]), st.integers(0, 30), DOCUMENTS), max_size=6
)


def change(documents: list[Rows], changes: list[tuple[str, int, Rows]]) -> list[Rows]:
    documents = documents.copy()
    for what, number, new in changes:
        place = number % len(documents)
        if what in ("add", "repeat"):
            documents.insert(place, new if what == "add" else documents[-1 - place])
        elif what == "change":
            documents[place] = (*documents[place][:-1], new[0])
        elif len(documents) > 3:
            removed = documents.pop(place)
            if what == "move":
                documents.insert(len(new) * number % len(documents), removed)
    return documents


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    train=st.lists(DOCUMENTS, min_size=4, max_size=25),
    held_out=st.lists(DOCUMENTS, min_size=1, max_size=4),
    rounds=st.lists(st.tuples(CHANGES, CHANGES), min_size=1, max_size=3),
    stored=st.integers(1, 9),
    batch=st.sampled_from([1, 5, 1024]),
)
def test_any_sequence_of_changes_gives_the_neighbors_of_a_clean_run(
    train: list[Rows],
    held_out: list[Rows],
    rounds: list[tuple[list[tuple[str, int, Rows]], list[tuple[str, int, Rows]]]],
    stored: int,
    batch: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    world = World(tmp_path_factory.mktemp("world"))
    corpus = {"train": train, "valid": held_out, "test": held_out[1:]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "LEAST_ROWS_PER_PART", 8)
        patch.setattr(earlier, "MOST_WORK", np.inf)
        patch.setattr(earlier, "ROWS_PER_BLOCK", 6)
        world.run(corpus, world.parts, stored)
        for of_train, of_held_out in rounds:
            corpus = {**corpus, "train": change(corpus["train"], of_train), "valid": change(held_out, of_held_out)}
            grown = world.run(corpus, world.parts, stored, queries_per_batch=batch)
            assert grown == world.run(corpus, None, stored)
    shutil.rmtree(world.folder)


@pytest.mark.parametrize("place", [0, 30, 60])
def test_old_queries_look_at_new_chunks_only(
    world: World, corpus: dict[str, list[Rows]], place: int, caplog: pytest.LogCaptureFixture
) -> None:
    world.run(corpus, world.parts)
    assert world.searched == rows_of(*corpus.values())
    corpus["train"].insert(place, ((1, 1), (50, 50), (99, 2)))
    corpus["test"].append(((7, 7), (60, 3)))
    with caplog.at_level(logging.INFO):
        grown = world.run(corpus, world.parts)
    assert world.searched == 5, "the new queries"
    assert grown == world.run(corpus, None)
    total = rows_of(*corpus.values())
    assert f"{total - 5:,} of {total:,} queries are of an earlier run and look at 3 new chunks of" in caplog.text


def test_queries_that_lost_a_neighbor_search_again(world: World, corpus: dict[str, list[Rows]]) -> None:
    before = world.run(corpus, world.parts)
    assert world.run(corpus, world.parts) == before and world.searched == 0
    ids = Artifact.open(next(world.folder.glob("run-*/out/train")), "neighbors")["ids"][:]
    first, last = (rows_of(corpus["train"][:number]) for number in (20, 21))
    gone = corpus["train"].pop(20)
    after = world.run(corpus, world.parts)
    lost = ((ids >= first) & (ids < last)).any(axis=1)
    lost[first:last] = False
    assert 0 < lost.sum() <= world.searched < 4 * lost.sum(), "those of train, and the held-out ones"
    assert after == world.run(corpus, None)
    corpus["train"].insert(20, gone)
    assert world.run(corpus, world.parts) == before and world.searched == 0, "of two earlier runs, the nearer one"


def test_a_neighbor_of_a_changed_document_is_found_in_its_new_version(
    world: World, corpus: dict[str, list[Rows]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(earlier, "MOST_WORK", 1)
    world.run(corpus, world.parts)
    place = max(range(60), key=lambda number: len(corpus["train"][number]))
    corpus["train"][place] = (*corpus["train"][place], (50, 51))
    changed = len(corpus["train"][place])
    grown = world.run(corpus, world.parts)
    assert world.searched < changed + 8, "of the others, only those whose last neighbor it was"
    assert grown == world.run(corpus, None)


def test_what_would_not_save_much_is_searched_as_a_whole(
    world: World, corpus: dict[str, list[Rows]], caplog: pytest.LogCaptureFixture
) -> None:
    world.run(corpus, world.parts)
    corpus["train"] += made_up(5, 900)
    with caplog.at_level(logging.INFO):
        world.run(corpus, world.parts)
    total = rows_of(*corpus.values())
    assert world.searched == total
    assert f"{total:,} queries look at all {rows_of(corpus['train']):,} chunks" in caplog.text


@pytest.mark.parametrize("options", [{"stored": 5}, {"key": "IVF3,Flat"}, {"code": "other"}, {"library": "dvc"}])
def test_what_other_settings_found_is_not_used(
    world: World, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = {"train": made_up(0, 80), "valid": made_up(1, 6), "test": made_up(2, 5)}
    world.run(corpus, world.parts)
    if "code" in options:
        monkeypatch.setattr(earlier, "CODE_DIGEST", options.pop("code"))
    if "library" in options:
        monkeypatch.setattr(earlier, "LIBRARIES", ("numpy", options.pop("library")))
    world.run(corpus, world.parts, **options)
    assert world.searched == rows_of(*corpus.values())
    assert len(world.found()) == (1 if "key" in options else 2), "an index of lists keeps nothing"


def flip(file: Path) -> None:
    content = file.read_bytes()
    file.unlink()  # it is a hard link
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda part: flip(part / "ids-00000.npy"),
        lambda part: flip(part / "distances-00001.npy"),
        lambda part: flip(part / "documents-train.npy"),
        lambda part: (part / "documents-test.npy").unlink(),
        lambda part: (part / "artifact.json").chmod(0o600) or (part / "artifact.json").write_text("{"),
    ],
)
def test_a_damaged_part_is_never_used(
    world: World, corpus: dict[str, list[Rows]], damage: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "LEAST_ROWS_PER_PART", 16)
    world.run(corpus, world.parts)
    (part,) = world.found()
    damage(part)
    grown = {**corpus, "train": [*corpus["train"], ((1, 1), (2, 2))]}
    expected = world.run(grown, None)
    assert world.run(grown, world.parts) == expected
    assert world.searched == rows_of(*grown.values())
    assert not part.exists() and len(world.found()) == 1, "it is deleted, and a new one is there"
    damage(world.found()[0])
    assert world.run(grown, world.parts) == expected and world.run(grown, world.parts) == expected
    assert world.searched == 0, "what was damaged was made again under the same name"


@pytest.mark.parametrize("where", ["making parts", "keeping them"])
def test_a_killed_run_goes_on_and_leaves_no_part(
    world: World, corpus: dict[str, list[Rows]], where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(artifacts, "LEAST_ROWS_PER_PART", 32)
    world.run(corpus, world.parts)
    corpus["train"].insert(4, ((1, 1), (2, 2)))
    expected = world.run(corpus, None)
    owner, name = (neighbors_module.KnnJob, "make") if where == "making parts" else (Documents, "write")
    original, calls = getattr(owner, name), count()

    def killed_in_the_third_call(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed_in_the_third_call)
        with pytest.raises(KeyboardInterrupt):
            world.run(corpus, world.parts, work_folder=tmp_path / "work")
    assert len(world.found()) == 1 and len(list(world.parts.folder.glob("neighbors/*"))) == 1
    assert world.run(corpus, world.parts, work_folder=tmp_path / "work") == expected
    assert len(world.found()) == 2


def test_processes_share_what_an_earlier_run_found(world: World, corpus: dict[str, list[Rows]]) -> None:
    world.run(corpus, world.parts)
    corpus["train"].insert(30, ((1, 1), (50, 50)))
    grown = world.run(corpus, world.parts, engine=Engine(EngineConfig(workers=2), "cpu"))
    assert world.searched == 2 and grown == world.run(corpus, None)


def test_added_rows_within_the_limit_are_found_in_spite_of_rounding() -> None:
    random = np.random.default_rng(0)
    vectors = (300 + random.normal(size=(200, 16)) * random.choice([0, 0.01, 1], (200, 1))).astype(np.float32)
    queries, owners, documents = vectors[:40] + np.float32(0.001), np.arange(40) // 2, np.arange(200) // 10
    every = pair_distances(queries, vectors, np.tile(np.arange(200), (40, 1)))
    limits = every[np.arange(40), random.integers(0, 200, 40)]
    limits[-1] = np.inf
    added = AddedRows(np.arange(200) + 1000, vectors, documents, float((vectors**2).sum(axis=1).max()))
    ids, distances = added.nearer(queries, owners, limits)
    for number in range(40):
        found = dict(zip(ids[number].tolist(), distances[number].tolist(), strict=True))
        assert found.pop(-1, np.inf) == np.inf
        others = {row + 1000: every[number, row] for row in range(200) if documents[row] != owners[number]}
        assert {row for row, distance in others.items() if distance <= limits[number]} <= found.keys() <= others.keys()
        assert all(found[row] == others[row] for row in found)


# ---- rows that stayed ----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(numbers=st.permutations(range(7)), size=st.integers(0, 7))
def test_a_longest_increasing_subsequence(numbers: list[int], size: int) -> None:
    chosen = numbers[:size]
    places = earlier._longest_increasing(np.array(chosen, dtype=np.int64)).tolist()
    assert all(chosen[one] < chosen[two] and one < two for one, two in pairwise(places))
    longest = max(
        length for length in range(size + 1) for some in combinations(chosen, length) if list(some) == sorted(some)
    )
    assert len(places) == longest


@settings(max_examples=200, deadline=None)
@given(before=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3)), unique_by=lambda item: item[0]), data=st.data())
def test_rows_that_stayed_keep_their_documents_and_their_order(
    before: list[tuple[int, int]], data: st.DataObject
) -> None:
    others = [(number, 2) for number in range(10, 14)]
    after = data.draw(st.permutations(before + others))[: data.draw(st.integers(0, 14))]

    def described(documents: list[tuple[int, int]]) -> tuple[Documents, list[tuple[int, int]]]:
        keys = np.array([[number // 2, number] for number, _ in documents], dtype=np.uint64).reshape(-1, 2)
        rows = np.array([length for _, length in documents], dtype=np.int64)
        return Documents(keys, rows), [(number, row) for number, length in documents for row in range(length)]

    (old, old_rows), (new, new_rows) = described(before), described(after)
    kept = kept_rows(old, new)
    moved = kept.rows_after(np.arange(-1, len(old_rows)))
    assert moved[0] == -1
    stayed = moved[moved >= 0]
    assert (np.diff(stayed) > 0).all() and len(stayed) == kept.total
    for row, place in enumerate(moved[1:].tolist()):
        assert place == -1 or old_rows[row] == new_rows[place]
        assert place == -1 or kept.rows_before(np.array([place])) == [row]
    assert set(np.flatnonzero(kept.rows_before(np.arange(len(new_rows))) >= 0)) == set(stayed)
