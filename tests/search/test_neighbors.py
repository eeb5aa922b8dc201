"""Neighbors are what brute force finds in other documents, for any batch, any surplus and any shards."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import write_vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT, SUPPORT
from small_database import Floats, Ints, database_of, faiss

from retro_model.core.artifacts import SPLITS, Artifact, ArtifactWriter
from retro_model.core.errors import ConfigError, MismatchError
from retro_model.jobs import engine as engine_module
from retro_model.search import distances as distances_module
from retro_model.search import neighbors as neighbors_module
from retro_model.search.build import make_index
from retro_model.search.distances import pair_distances
from retro_model.search.keys import IndexConfig
from retro_model.search.neighbors import Database, KnnJob, NeighborsConfig, describe_neighbors, make_neighbors


def brute_force(
    vectors: Floats, documents: Ints, queries: Floats, query_documents: Ints, k: int
) -> tuple[Ints, Floats]:
    """Query by query, row by row: all rows of other documents, sorted by (distance, id), the first k."""
    ids = np.full((len(queries), k), -1)
    distances = np.full((len(queries), k), np.inf, dtype=np.float32)
    all_rows = np.tile(np.arange(len(vectors)), (len(queries), 1))
    for number, to_all in enumerate(pair_distances(queries, vectors, all_rows)):
        rows = [row for row in range(len(vectors)) if documents[row] != query_documents[number]]
        best = sorted((float(to_all[row]), row) for row in rows)[:k]
        ids[number, : len(best)] = [row for _, row in best]
        distances[number, : len(best)] = [distance for distance, _ in best]
    return ids, distances


def made_up(seed: int, num_rows: int, num_queries: int, dim: int, kinds: int) -> tuple[Floats, Floats]:
    """Vectors with many copies and many ties: few kinds, some of them moved by a hair."""
    random = np.random.default_rng(seed)
    pool = random.integers(-2, 3, size=(kinds, dim)).astype(np.float32)
    pool += random.choice([0, 0, 1e-3], size=(kinds, 1)) * random.normal(size=(kinds, dim))
    drawn = [pool[random.integers(0, kinds, size=count)] for count in (num_rows, num_queries)]
    return drawn[0].astype(np.float16).astype(np.float32), drawn[1].astype(np.float16).astype(np.float32)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_rows=st.integers(1, 80),
    num_queries=st.integers(0, 30),
    dim=st.integers(1, 9),
    kinds=st.integers(1, 40),
    num_documents=st.integers(1, 12),
    k=st.integers(1, 90),
    surplus=st.integers(0, 100),
    pairs=st.sampled_from([1, 17, 1 << 22]),
)
def test_equal_to_brute_force_with_an_exact_index(
    seed: int,
    num_rows: int,
    num_queries: int,
    dim: int,
    kinds: int,
    num_documents: int,
    k: int,
    surplus: int,
    pairs: int,
) -> None:
    vectors, queries = made_up(seed, num_rows, num_queries, dim, kinds)
    random = np.random.default_rng(seed + 1)
    documents = np.sort(random.integers(0, num_documents, size=num_rows))
    query_documents = random.integers(-1, num_documents + 1, size=num_queries)
    database = database_of(vectors, documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors_module, "PAIRS_AT_ONCE", pairs)
        ids, distances = database.nearest(queries, query_documents, k, surplus)
    expected_ids, expected_distances = brute_force(vectors, documents, queries, query_documents, k)
    np.testing.assert_array_equal(ids, expected_ids)
    assert distances.tobytes() == expected_distances.tobytes()
    assert ids.dtype == np.int64 and distances.dtype == np.float32


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lists=st.integers(1, 12),
    probes=st.integers(1, 12),
    k=st.integers(1, 60),
    surpluses=st.tuples(st.integers(0, 5), st.integers(6, 200)),
    batch=st.integers(1, 40),
)
def test_ivf_does_not_depend_on_batch_or_surplus(
    seed: int, lists: int, probes: int, k: int, surpluses: tuple[int, int], batch: int
) -> None:
    vectors, queries = made_up(seed, 200, 40, 6, 120)
    documents = np.arange(200) // 10
    query_documents = np.random.default_rng(seed).integers(-1, 20, size=40)
    database = database_of(vectors, documents, lists, min(probes, lists))
    ids, distances = database.nearest(queries, query_documents, k, surpluses[0])
    for start in range(0, 40, batch):
        part = slice(start, start + batch)
        found = database.nearest(queries[part], query_documents[part], k, surpluses[1])
        np.testing.assert_array_equal(found[0], ids[part])
        assert found[1].tobytes() == distances[part].tobytes()
    assert (ids >= 0).all(), "190 rows of other documents are there, and k is less"
    assert (documents[ids] != query_documents[:, None]).all()
    if probes >= lists:
        np.testing.assert_array_equal(ids, brute_force(vectors, documents, queries, query_documents, k)[0])


def by_code(database: Database, queries: Floats, query_documents: Ints, k: int, rescored: int) -> tuple[Ints, Floats]:
    """Query by query, as the module's docstring says: all rows of the lists by code, then the best of them."""
    vectors = np.asarray(database.vectors).astype(np.float32)
    num_rows, count = len(vectors), max(rescored, 4 * k)
    ids = np.full((len(queries), k), -1)
    distances = np.full((len(queries), k), np.inf, dtype=np.float32)
    for number in range(len(queries)):
        query, probes = queries[number : number + 1], database.index.probes
        while True:
            reported, rows = database.index.search(query, num_rows, probes)
            pairs = [
                (float(coded), int(row))
                for coded, row in zip(reported[0], rows[0], strict=True)
                if row >= 0 and database.documents[row] != query_documents[number]
            ]
            kept = np.array([row for _, row in sorted(pairs)[:count]], dtype=np.int64)
            best = sorted(zip(pair_distances(query, vectors, kept[None])[0].tolist(), kept.tolist(), strict=True))[:k]
            if len(best) == k or probes == database.index.lists:
                break
            probes = min(2 * probes, database.index.lists)
        ids[number, : len(best)] = [row for _, row in best]
        distances[number, : len(best)] = [distance for distance, _ in best]
    return ids, distances


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lists=st.integers(1, 12),
    probes=st.integers(1, 12),
    kinds=st.sampled_from([3, 120, 500]),
    k=st.integers(1, 40),
    rescored=st.integers(1, 250),
    surpluses=st.tuples(st.integers(0, 5), st.integers(6, 200)),
    batch=st.integers(1, 40),
    num_documents=st.sampled_from([2, 20]),
)
def test_codes_choose_candidates_and_decide_nothing_else(
    seed: int,
    lists: int,
    probes: int,
    kinds: int,
    k: int,
    rescored: int,
    surpluses: tuple[int, int],
    batch: int,
    num_documents: int,
) -> None:
    vectors, queries = made_up(seed, 200, 40, 6, kinds)
    documents = np.arange(200) * num_documents // 200
    query_documents = np.random.default_rng(seed).integers(-1, num_documents, size=40)
    database = database_of(vectors, documents, lists, min(probes, lists), codes=3, rescored=rescored)
    expected = by_code(database, queries, query_documents, k, rescored)
    for surplus, size in zip(surpluses, (40, batch), strict=True):
        for start in range(0, 40, size):
            part = slice(start, start + size)
            ids, distances = database.nearest(queries[part], query_documents[part], k, surplus)
            np.testing.assert_array_equal(ids, expected[0][part])
            assert distances.tobytes() == expected[1][part].tobytes()
    assert (expected[0] >= 0).all(), "100 rows or more of other documents are there, and k is less"
    if rescored >= 200 and probes >= lists:
        np.testing.assert_array_equal(expected[0], brute_force(vectors, documents, queries, query_documents, k)[0])


def test_codes_and_a_document_larger_than_any_surplus() -> None:
    random = np.random.default_rng(0)
    own = random.normal(size=(1000, 8)).astype(np.float32)
    others = (10 + random.normal(size=(20, 8))).astype(np.float32)
    database = database_of(np.concatenate([own, others]), np.repeat([7, 8], [1000, 20]), lists=4, codes=4)
    ids, distances = database.nearest(own[:50], np.full(50, 7), 20)
    assert (np.sort(ids, axis=1) == np.arange(1000, 1020)).all()
    assert (np.diff(distances, axis=1) >= 0).all()


def test_codes_that_are_all_equal_have_distances() -> None:
    """faiss 1.15 divides by their range, which is 0."""
    database = database_of(np.ones((64, 6), dtype=np.float32), np.arange(64), lists=1, codes=3)
    distances, ids = database.index.search(np.full((5, 6), 2, dtype=np.float32), 64)
    np.testing.assert_array_equal(np.sort(ids, axis=1), np.tile(np.arange(64), (5, 1)))
    np.testing.assert_allclose(distances, 6)


def test_only_what_rounding_could_bring_in_is_scored_again(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, _ = made_up(0, 2000, 1, 16, 2000)
    vectors += np.random.default_rng(1).normal(size=vectors.shape).astype(np.float16).astype(np.float32)
    scored = []

    def watched(queries: Floats, rows: Floats, places: Ints) -> Floats:
        scored.append(int((places >= 0).sum()))
        return pair_distances(queries, rows, places)

    monkeypatch.setattr(neighbors_module, "pair_distances", watched)
    database_of(vectors, np.arange(2000)).nearest(vectors[:100], np.arange(100), 10, 200)
    assert 1000 <= sum(scored) < 1010, "10 for each query, of 210 that were fetched"


@pytest.mark.parametrize("surplus", [0, 3, 100])
def test_what_matrix_products_round_decides_nothing(surplus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # faiss 1.14 would use matrix products only for more rows.
    monkeypatch.setattr(faiss.cvar, "distance_compute_blas_threshold", 1)
    # Far from the origin: faiss's |q|^2 + |y|^2 - 2qy is off by more than distances differ.
    vectors = (512 + 2 * np.random.default_rng(0).normal(size=(600, 32))).astype(np.float16).astype(np.float32)
    database, documents = database_of(vectors, np.arange(600) // 3), np.arange(200) // 3
    _, rows = database.index.search(vectors[:200], 20)
    assert (np.diff(pair_distances(vectors[:200], vectors, rows), axis=1) < 0).any(), "this test needs a wrong order"
    ids, distances = database.nearest(vectors[:200], documents, 10, surplus)
    expected = brute_force(vectors, database.documents, vectors[:200], documents, 10)  # type: ignore[arg-type]
    np.testing.assert_array_equal(ids, expected[0])
    assert distances.tobytes() == expected[1].tobytes()


def test_ties_at_the_edge_of_what_was_fetched_go_to_the_smaller_id() -> None:
    vectors = np.zeros((500, 4), dtype=np.float32)
    database = database_of(vectors, np.arange(500))
    for surplus in (0, 3, 1000):
        ids, _ = database.nearest(vectors[:30], np.arange(30), 5, surplus)
        assert ids[0].tolist() == [1, 2, 3, 4, 5] and ids[29].tolist() == [0, 1, 2, 3, 4]


def test_a_document_larger_than_any_surplus_does_not_use_up_its_neighbors() -> None:
    random = np.random.default_rng(0)
    own = random.normal(size=(1000, 8)).astype(np.float32)
    others = (10 + random.normal(size=(20, 8))).astype(np.float32)  # all farther than the own document
    database = database_of(np.concatenate([own, others]), np.repeat([7, 8], [1000, 20]))
    ids, distances = database.nearest(own[:50], np.full(50, 7), 20)
    assert (np.sort(ids, axis=1) == np.arange(1000, 1020)).all()
    assert (np.diff(distances, axis=1) >= 0).all()


def test_lists_that_hold_too_few_are_not_the_end() -> None:
    vectors = np.concatenate([np.zeros((50, 4)), np.ones((50, 4))]).astype(np.float32)
    vectors += np.random.default_rng(0).normal(scale=0.01, size=vectors.shape).astype(np.float32)
    database = database_of(vectors, np.arange(100), lists=8)
    ids, _ = database.nearest(vectors[:3], np.arange(3), 90)
    assert (ids >= 0).all()


# Shares go on to more lists each at its own time; where they shared that number, faiss read beyond an array.
THREADS = """
import numpy as np
from small_database import database_of, faiss

random = np.random.default_rng(0)
vectors = (random.normal(size=(20_000, 16)) * np.exp(random.normal(size=(20_000, 1)))).astype(np.float32)
database = database_of(vectors, np.arange(20_000), lists=256)  # of 2 to 672 rows each
faiss.omp_set_num_threads(1)
expected = database.nearest(vectors[:2000], np.full(2000, -1), 64)
faiss.omp_set_num_threads(8)
for _ in range(20):
    for found, right in zip(database.nearest(vectors[:2000], np.full(2000, -1), 64), expected):
        assert found.tobytes() == right.tobytes()
"""


@pytest.mark.slow
def test_threads_that_visit_different_numbers_of_lists_do_not_meet() -> None:
    program = [sys.executable, "-c", THREADS]  # a process of its own: faiss may end it
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), str(ROOT)])}
    done = subprocess.run(program, env=environment, check=False)
    assert done.returncode == 0


def test_a_small_database_ends_in_none() -> None:
    vectors = np.arange(5, dtype=np.float32)[:, None]
    database = database_of(vectors, np.array([0, 0, 1, 1, 2]))
    ids, distances = database.nearest(vectors[:1], np.array([0]), 6)
    assert ids.tolist() == [[2, 3, 4, -1, -1, -1]]
    assert distances.tolist() == [[4, 9, 16, np.inf, np.inf, np.inf]]
    ids, distances = database_of(vectors, np.zeros(5, int)).nearest(vectors, np.zeros(5, int), 2)
    assert (ids == -1).all() and np.isinf(distances).all()


# ---- the artifact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [0, 4097])
def test_a_wrong_setting_is_named(stored: int) -> None:
    with pytest.raises(ConfigError, match=f"neighbors.stored: found {stored}, expected >= 1 and <= 4096"):
        NeighborsConfig(stored=stored)


def write_data(folder: Path, first_document: int = 0, **facts: Any) -> Path:
    """300 train chunks of 30 documents, 20 valid ones of 4, 11 test ones of one, and an index."""
    train, valid = made_up(0, 300, 20, 8, 150)
    vectors = {"train": train, "valid": valid, "test": valid[:11] + 1}
    numbers = {"train": np.arange(300) // 10, "valid": 1000 + np.arange(20) // 5, "test": np.full(11, 2000)}
    documents = {split: first_document + rows for split, rows in numbers.items()}
    write_vectors(folder, vectors, documents, rows_per_shard=70, **facts)
    make_index(folder / "embeddings", IndexConfig(), folder / "index")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def run(data: Path, out: Path, stored: int = 12, **options: Any) -> dict[str, float]:
    config = NeighborsConfig(stored=stored)
    return make_neighbors(data / "embeddings", data / "index", data / "chunks", config, out, **options).metrics


def test_every_split_finds_its_neighbors_among_the_train_chunks(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out")
    index = Artifact.open(data / "index", "index")
    train = Artifact.open(data / "chunks" / "train", "chunks")
    vectors = Artifact.open(data / "embeddings" / "train", "embeddings")["vectors"][:].astype(np.float32)
    for split in SPLITS:
        found = Artifact.open(tmp_path / "out" / split, "neighbors")
        chunks = Artifact.open(data / "chunks" / split, "chunks")
        embeddings = Artifact.open(data / "embeddings" / split, "embeddings")
        found.require(chunks=chunks.fingerprint, database=train.fingerprint, stored=12)
        found.require(index=index.fingerprint, embeddings=embeddings.fingerprint)
        assert found["ids"].dtype == np.int32 and found["distances"].dtype == np.float32
        documents = chunks["documents"][:]
        queries = embeddings["vectors"][:].astype(np.float32)
        ids, distances = brute_force(vectors, train["documents"][:], queries, documents, 12)
        np.testing.assert_array_equal(found["ids"][:], ids)
        np.testing.assert_array_equal(found["distances"][:], distances)


def test_equal_bytes_for_any_batch(data: Path, tmp_path: Path) -> None:
    fingerprints = set()
    for batch in (1, 7, 1024):
        run(data, tmp_path / str(batch), queries_per_batch=batch)
        written = [Artifact.open(tmp_path / str(batch) / split, "neighbors") for split in SPLITS]
        fingerprints.add(tuple(artifact.files["ids-00000.npy"] for artifact in written))
        fingerprints.add(tuple(artifact.files["distances-00000.npy"] for artifact in written))
    assert len(fingerprints) == 2


def test_each_gpu_that_faiss_can_use_has_a_process(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, pools, process_pool = data / "embeddings", [], engine_module.process_pool

    def watched(job: Any, num_workers: int, num_gpus: int) -> Any:
        pools.append((num_workers, num_gpus))
        return process_pool(job, num_workers, num_gpus)

    def job(index: Path, device: str) -> KnnJob:
        return KnnJob(train, index, data / "chunks", NeighborsConfig(), 1024, device)

    monkeypatch.setattr(engine_module, "process_pool", watched)
    monkeypatch.setattr(engine_module, "count_gpus", lambda device: 2)
    run(data, tmp_path / "here")
    assert pools == [] and not job(data / "index", "auto").uses_gpus, "a build for CPUs"
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    with ArtifactWriter(tmp_path / "codes", "index") as writer:
        writer.facts["key"] = "IVF7,PQ2x4fs"
    assert [job(data / "index", device).uses_gpus for device in ("auto", "cuda", "cpu")] == [True, True, False]
    assert not job(tmp_path / "codes", "auto").uses_gpus, "codes are compared on the CPU"
    run(data, tmp_path / "two")  # its processes have the faiss of this machine again
    assert pools == [(2, 2)]
    for split in SPLITS:
        files = [Artifact.open(tmp_path / name / split, "neighbors").files for name in ("here", "two")]
        assert files[0] == files[1]


def test_metrics_say_what_is_in_the_artifact(tmp_path: Path) -> None:
    vectors = {split: np.zeros((0, 1)) for split in SPLITS}
    vectors["train"] = np.array([[0], [0], [3], [0.5]])
    vectors["valid"] = np.array([[3]])
    vectors["test"] = np.array([[1]])
    documents = {"train": np.array([0, 0, 0, 1]), "valid": np.array([5]), "test": np.array([6])}
    write_vectors(tmp_path, vectors, documents)
    make_index(tmp_path / "embeddings", IndexConfig(), tmp_path / "index")
    metrics = run(tmp_path, tmp_path / "out", stored=2)
    # train: rows 0 to 2 have only row 3, which has rows 0 and 1; valid finds 2, then 3; test 3, then 0
    distances = [0.25, 0.25, 6.25, 0.25]
    first = {"train": distances, "valid": [0.0], "test": [0.25]}
    expected = {f"{split}_{share}_share": 0.0 for split in SPLITS for share in ("missing", "short", "copy")}
    expected |= {f"{split}_recall": 1.0 for split in SPLITS}
    expected |= {f"{split}_first_distance_mean": float(np.mean(first[split])) for split in SPLITS}
    for percentile in (5, 25, 50, 75, 95):
        for split in SPLITS:
            expected[f"{split}_first_distance_{percentile}"] = float(np.percentile(first[split], percentile))
    assert metrics == pytest.approx(expected | {"train_missing_share": 3 / 8, "train_short_share": 3 / 4})


def test_copies_are_counted_by_their_tokens(tmp_path: Path) -> None:
    vectors = {split: np.arange(51)[:, None] % 50 * 1.0 for split in SPLITS}  # row 50 is row 0 again
    documents = {split: 100 * number + np.arange(51) for number, split in enumerate(SPLITS)}
    write_vectors(tmp_path, vectors, documents)
    make_index(tmp_path / "embeddings", IndexConfig(), tmp_path / "index")
    metrics = run(tmp_path, tmp_path / "out", stored=3)
    assert metrics["train_copy_share"] == 2 / 51
    assert metrics["valid_copy_share"] == metrics["test_copy_share"] == 1


def described(data: Path, found: Path, split: str, seed: int = 0) -> dict[str, float]:
    return describe_neighbors(
        Artifact.open(found / split, "neighbors"),
        Artifact.open(data / "chunks" / split, "chunks"),
        Artifact.open(data / "embeddings" / split, "embeddings"),
        Artifact.open(data / "chunks" / "train", "chunks"),
        Artifact.open(data / "embeddings" / "train", "embeddings"),
        seed,
    )


@pytest.mark.parametrize("block", [7, 65_536])
@pytest.mark.parametrize("stored", [3, 12])
def test_what_is_said_of_neighbors_is_in_the_artifact(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: int, block: int
) -> None:
    monkeypatch.setattr(neighbors_module, "ROWS_PER_BLOCK", block)
    monkeypatch.setattr(distances_module, "ROWS_PER_BLOCK", block)
    run(data, tmp_path / "out", stored)
    tokens = {split: Artifact.open(data / "chunks" / split, "chunks")["tokens"][:][:, :-1] for split in SPLITS}
    for split in SPLITS:
        ids = Artifact.open(tmp_path / "out" / split, "neighbors")["ids"][:]
        distances = Artifact.open(tmp_path / "out" / split, "neighbors")["distances"][:]
        said = described(data, tmp_path / "out", split)
        assert said.pop("recall") == 1
        first = distances[ids[:, 0] >= 0, 0].astype(np.float64)
        copies = [
            row[0] >= 0 and (tokens["train"][row[0]] == mine).all()
            for row, mine in zip(ids, tokens[split], strict=True)
        ]
        expected = {
            "missing_share": (ids == -1).mean(),
            "short_share": (ids == -1).any(axis=1).mean(),
            "copy_share": np.mean(copies),
            "first_distance_mean": first.mean(),
            **{f"first_distance_{p}": np.percentile(first, p) for p in (5, 25, 50, 75, 95)},
        }
        assert said == pytest.approx(expected)


def test_a_copy_has_the_same_input_and_any_label() -> None:
    database: Any = {"tokens": np.array([[5, 6, 7], [5, 8, 7]]), "documents": np.array([0, 1])}
    chunks: Any = {"tokens": np.array([[5, 6, 9], [5, 9, 7], [5, 6, 7]]), "documents": np.array([2, 3, 4])}
    vectors: Any = {"vectors": np.zeros((3, 2), dtype=np.float16)}
    stored: Any = {"vectors": np.zeros((2, 2), dtype=np.float16)}
    found: Any = {"ids": np.array([[0], [1], [-1]]), "distances": np.array([[0], [0], [np.inf]], dtype=np.float32)}
    assert describe_neighbors(found, chunks, vectors, database, stored)["copy_share"] == 1 / 3


def test_recall_counts_what_was_missed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(data, tmp_path / "out")
    found = Artifact.open(tmp_path / "out" / "train", "neighbors")
    distances = found["distances"][:]
    # Every second query lost its three nearest: the others moved up.
    lost = distances.copy()
    lost[::2, :-3], lost[::2, -3:] = distances[::2, 3:], np.inf
    with ArtifactWriter(tmp_path / "lost" / "train", "neighbors") as writer:
        writer.append(ids=np.where(np.isinf(lost), -1, found["ids"][:]).astype(np.int32), distances=lost)
    limit = distances[:, 9:10] + 1e-4
    kept = (lost[:, :10] <= limit).sum() / (10 * len(lost))
    assert described(data, tmp_path / "lost", "train")["recall"] == pytest.approx(kept) and 0.8 < kept < 0.95
    monkeypatch.setattr(neighbors_module, "RECALL_QUERIES", 20)
    sampled = {described(data, tmp_path / "lost", "train", seed)["recall"] for seed in (0, 0, 1, 2, 3)}
    assert 1 < len(sampled) <= 4, "the seed draws the queries"


def test_a_long_document_does_not_take_the_memory_of_all_its_rows_for_every_query(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(900, 8)).astype(np.float32)
    documents, rows = np.repeat([3, 4, 5], [700, 100, 100]), random.permutation(900)[:150]
    queries, expected = vectors[rows], brute_force(vectors, documents, vectors[rows], documents[rows], 10)[1]
    asked = []

    def watched(some: Floats, block: Floats, k: int) -> Any:
        asked.append(len(some) * k)
        return knn(some, block, k)

    knn = faiss.knn
    monkeypatch.setattr(faiss, "knn", watched)
    monkeypatch.setattr(distances_module, "ROWS_PER_BLOCK", 400)
    monkeypatch.setattr(neighbors_module, "PAIRS_AT_ONCE", 5000)
    found, largest = neighbors_module._exact_in_other_documents(queries, documents[rows], vectors, documents, 10)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert largest == pytest.approx(float((vectors**2).sum(axis=1).max())) and max(asked) <= 5000


def test_neighbors_that_cannot_be_are_not_missed(tmp_path: Path) -> None:
    vectors = {"train": np.arange(6.0)[:, None], "valid": np.ones((1, 1)), "test": np.ones((2, 1))}
    write_vectors(
        tmp_path, vectors, {"train": np.array([0, 0, 0, 0, 0, 1]), "valid": np.array([2]), "test": np.array([3, 4])}
    )
    make_index(tmp_path / "embeddings", IndexConfig(), tmp_path / "index")
    run(tmp_path, tmp_path / "out", stored=4)
    said = described(tmp_path, tmp_path / "out", "train")
    assert said["recall"] == 1 and said["short_share"] == 5 / 6 and said["missing_share"] == 15 / 24
    equal = {split: np.ones((3, 1)) for split in SPLITS}
    write_vectors(tmp_path / "one", equal, {split: np.full(3, place) for place, split in enumerate(SPLITS)})
    make_index(tmp_path / "one" / "embeddings", IndexConfig(), tmp_path / "one" / "index")
    run(tmp_path / "one", tmp_path / "one" / "out", stored=4)
    said = described(tmp_path / "one", tmp_path / "one" / "out", "train")
    assert said["recall"] == said["missing_share"] == 1 and said["first_distance_50"] == said["copy_share"] == 0


def test_a_database_of_one_document_has_no_neighbors_for_itself(tmp_path: Path) -> None:
    vectors = {split: np.random.default_rng(0).normal(size=(30, 4)) for split in SPLITS}
    write_vectors(tmp_path, vectors, {split: np.full(30, number) for number, split in enumerate(SPLITS)})
    make_index(tmp_path / "embeddings", IndexConfig(), tmp_path / "index")
    metrics = run(tmp_path, tmp_path / "out", stored=3)
    assert metrics["train_missing_share"] == 1 and metrics["train_first_distance_mean"] == 0
    assert metrics["valid_missing_share"] == 0


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ("index", "index: made for embeddings"),
        ("embeddings/train", "made for chunks"),
        ("embeddings/valid", "embeddings/valid: made for chunks"),
        ("chunks/test", "embeddings/test: made for chunks"),
    ],
)
def test_artifacts_of_different_runs_do_not_mix(tmp_path: Path, replaced: str, message: str) -> None:
    mine, other = write_data(tmp_path / "mine"), write_data(tmp_path / "other", first_document=5000)
    (mine / replaced).rename(tmp_path / "away")
    (other / replaced).rename(mine / replaced)
    with pytest.raises(MismatchError, match=message):
        run(mine, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_queries_of_another_encoder_are_refused(tmp_path: Path) -> None:
    mine = write_data(tmp_path / "mine")
    changed = write_data(tmp_path / "changed", pooling="cls")
    (mine / "embeddings" / "test").rename(tmp_path / "away")
    (changed / "embeddings" / "test").rename(mine / "embeddings" / "test")
    with pytest.raises(MismatchError, match="test: made for pooling cls, expected mean"):
        run(mine, tmp_path / "out")


def test_ids_are_int32_while_they_fit() -> None:
    assert neighbors_module._id_type(2**31 - 1) is np.int32
    assert neighbors_module._id_type(2**31) is np.int64
