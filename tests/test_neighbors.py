"""Neighbors are what brute force finds in other documents, for any batch, any surplus and any shards."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fixtures import write_vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_model import neighbors as neighbors_module
from retro_model.artifacts import SPLITS, Artifact
from retro_model.errors import ConfigError, MismatchError
from retro_model.index import Index, IndexConfig, import_faiss, make_index, pair_distances
from retro_model.neighbors import Database, NeighborsConfig, make_neighbors

faiss = import_faiss()
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of tiny searches: threads would only wait for each other."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


def database_of(vectors: Floats, documents: Ints, lists: int = 0, probes: int = 1) -> Database:
    """A database in memory; with `lists`, its index is IVF with centroids drawn from the vectors."""
    num_rows, dim = vectors.shape
    index: Any = faiss.IndexFlatL2(dim)
    if lists:
        quantizer = faiss.IndexFlatL2(dim)
        quantizer.add(vectors[np.random.default_rng(0).permutation(num_rows)[:lists]])
        index = faiss.IndexIVFFlat(quantizer, dim, lists)
        index.is_trained = True
    index.add(vectors)
    facts = {
        "rows": num_rows,
        "dim": dim,
        "key": f"IVF{lists},Flat" if lists else "Flat",
        "nprobe": probes if lists else None,
        "largest_norm": float((vectors**2).sum(axis=1).max()),
    }
    return Database(Index(SimpleNamespace(facts=facts), index), vectors, documents)  # type: ignore[arg-type]


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
    return make_neighbors(data / "embeddings", data / "index", data / "chunks", config, out, **options)


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
    assert metrics == {
        "train_missing_share": 3 / 8,
        "train_short_share": 3 / 4,
        "train_copy_share": 0.0,
        "train_first_distance_mean": sum(distances) / 4,
        "train_first_distance_median": 0.25,
        "valid_missing_share": 0.0,
        "valid_short_share": 0.0,
        "valid_copy_share": 0.0,
        "valid_first_distance_mean": 0.0,
        "valid_first_distance_median": 0.0,
        "test_missing_share": 0.0,
        "test_short_share": 0.0,
        "test_copy_share": 0.0,
        "test_first_distance_mean": 0.25,
        "test_first_distance_median": 0.25,
    }


def test_copies_are_counted_by_their_tokens(tmp_path: Path) -> None:
    vectors = {split: np.arange(51)[:, None] % 50 * 1.0 for split in SPLITS}  # row 50 is row 0 again
    documents = {split: 100 * number + np.arange(51) for number, split in enumerate(SPLITS)}
    write_vectors(tmp_path, vectors, documents)
    make_index(tmp_path / "embeddings", IndexConfig(), tmp_path / "index")
    metrics = run(tmp_path, tmp_path / "out", stored=3)
    assert metrics["train_copy_share"] == 2 / 51
    assert metrics["valid_copy_share"] == metrics["test_copy_share"] == 1


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
