"""An index of equal bytes for equal input, of the recall that was asked for, and of L2 distances."""

import hashlib
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fixtures import write_vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from index_builders import BUILDERS, needs_autofaiss

from retro_model.core.artifacts import Artifact, ArtifactWriter
from retro_model.core.errors import ArtifactError, ConfigError, DamagedArtifactError, MismatchError
from retro_model.search import build as index_building
from retro_model.search import builders, keys
from retro_model.search import distances as distances_module
from retro_model.search import index as index_module
from retro_model.search import tuning as index_effort
from retro_model.search.build import make_index
from retro_model.search.distances import (
    as_float32,
    exact_distances,
    import_faiss,
    pair_distances,
    rounding_margin,
    smallest,
    stored_distances,
)
from retro_model.search.index import INDEX_FILE, Centroids, Index, nearest_by_code, on_gpu
from retro_model.search.keys import IndexConfig, choose_key, needed_bytes, num_lists
from retro_model.search.tuning import fewest_probes

faiss = import_faiss()
DIM = 16
Floats = npt.NDArray[np.float32]


def clustered(num_rows: int, seed: int, num_topics: int = 40) -> Floats:
    """Vectors in topics, one topic after the other, as documents on disk are."""
    random = np.random.default_rng(seed)
    topics = np.random.default_rng(99).normal(size=(num_topics, DIM))
    vectors = topics[np.arange(num_rows) * num_topics // num_rows] + 0.5 * random.normal(size=(num_rows, DIM))
    return vectors.astype(np.float16).astype(np.float32)


def write_data(folder: Path, num_train: int = 3000, rows_per_shard: int = 700) -> Path:
    vectors = {"train": clustered(num_train, 1), "valid": clustered(200, 2), "test": clustered(20, 3)}
    documents = {split: np.arange(len(rows)) for split, rows in vectors.items()}
    return write_vectors(folder, vectors, documents, rows_per_shard)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def open_index(folder: Path, device: str = "cpu") -> Index:
    return Index.open(Artifact.open(folder, "index"), device)


def brute_force(queries: Floats, vectors: Floats) -> npt.NDArray[np.float64]:
    difference = queries[:, None].astype(np.float64) - vectors[None]
    return (difference**2).sum(axis=-1)


# ---- settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["", "flat", "IVF0,Flat", "IVF16", "OPQ16,PQ16", "IVF16,SQ8", "HNSW32", "Flat ", "IVF16,PQ8x4", "PQ8"]
)
def test_keys_that_are_not_known_to_work_are_refused_by_name(key: str) -> None:
    message = (
        f"index.key: found '{key}', expected auto, Flat, IVF<lists>,Flat, IVF<lists>,PQ<m>x4fs or IVF<lists>,PQ<m>x8"
    )
    with pytest.raises(ConfigError, match=message):
        IndexConfig(key=key)


@pytest.mark.parametrize("num_points", [38, 101])
def test_autofaiss_would_not_train_on_more_points(num_points: int) -> None:
    with pytest.raises(ConfigError, match="index.train_points_per_list: .* expected >= 39 and <= 100"):
        IndexConfig(train_points_per_list=num_points)


@pytest.mark.parametrize(
    ("num_rows", "gigabytes", "key"),
    [
        (1, 4.0, "Flat"),
        (200_000, 0.1, "Flat"),  # which the check of the memory then refuses
        (200_001, 4.0, "IVF2048,Flat"),
        (1_000_000, 1.6, "IVF4096,Flat"),
        (1_000_000, 1.5, "IVF4096,PQ192x4fs"),
        (10_000_000, 4.0, "IVF16384,PQ192x4fs"),
        (1_000_000, 0.1, "IVF4096,PQ96x4fs"),
        (1_000_000, 0.05, "IVF4096,PQ48x4fs"),
        (1_000_000, 0.03, "IVF4096,PQ24x4fs"),
        (1_000_000, 0.001, "IVF4096,PQ24x4fs"),
        (28_000_000_000, 4.0, "IVF524288,PQ24x4fs"),
    ],
)
def test_auto_follows_its_rule(num_rows: int, gigabytes: float, key: str) -> None:
    config = IndexConfig(max_memory_gb=gigabytes)
    assert choose_key(config, num_rows, 384) == key
    assert (
        needed_bytes(key, num_rows, 384) <= gigabytes * 1e9 or gigabytes == 0.001 or num_rows in (200_000, 28 * 10**9)
    )


def test_codes_of_vectors_of_any_width() -> None:
    config = IndexConfig(max_memory_gb=1e-3)
    assert choose_key(config, 300_000, 15) == "IVF2048,PQ15x4fs"
    assert choose_key(config, 300_000, 6) == "IVF2048,PQ3x4fs"
    assert choose_key(config, 300_000, 1024) == "IVF2048,PQ64x4fs"


def test_more_lists_than_the_rows_can_train() -> None:
    assert choose_key(IndexConfig(key="IVF4,Flat"), 156, 16) == "IVF4,Flat"
    with pytest.raises(ConfigError, match=r"index.key: IVF4,Flat needs 156 train chunks .*found 155"):
        choose_key(IndexConfig(key="IVF4,Flat"), 155, 16)


def test_codes_that_cannot_be_trained_or_do_not_fit_the_vectors() -> None:
    assert choose_key(IndexConfig(key="IVF16,PQ8x4fs"), 624, 16) == "IVF16,PQ8x4fs"
    with pytest.raises(ConfigError, match=r"the codes of IVF15,PQ8x4fs train on 624 chunks, found 623"):
        choose_key(IndexConfig(key="IVF15,PQ8x4fs"), 623, 16)
    with pytest.raises(ConfigError, match=r"the codes of IVF9,PQ8x4fs train on 624 chunks, found 576 \(64 a list"):
        choose_key(IndexConfig(key="IVF9,PQ8x4fs"), 5000, 16)
    with pytest.raises(ConfigError, match=r"the codes of IVF16,PQ8 train on 9,984 chunks"):
        choose_key(IndexConfig(key="IVF16,PQ8"), 50_000, 16)
    with pytest.raises(ConfigError, match=r"IVF16,PQ6x4fs has 6 codes a row, expected a divisor of its 16 numbers"):
        choose_key(IndexConfig(key="IVF16,PQ6x4fs"), 5000, 16)


def test_too_little_memory_is_one_line_with_both_numbers(data: Path, tmp_path: Path) -> None:
    message = (
        r"index.max_memory_gb: found 0.0001, expected >= 0.000192 for Flat over 3,000 vectors of 16 dimensions; "
        "building it takes twice that or more"
    )
    with pytest.raises(ConfigError, match=message):
        make_index(data / "embeddings", IndexConfig(max_memory_gb=0.0001), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- distances -----------------------------------------------------------------------------------------


def test_pair_distances_are_exact_and_alone() -> None:
    queries, vectors = clustered(30, 5), clustered(50, 6)
    places = np.random.default_rng(0).integers(-1, 50, size=(30, 7))
    found = pair_distances(queries, vectors, places)
    expected = np.take_along_axis(brute_force(queries, vectors), np.maximum(places, 0), axis=1)
    np.testing.assert_allclose(found, np.where(places < 0, np.inf, expected), rtol=1e-5)
    for row in range(30):
        alone = pair_distances(queries[row : row + 1], vectors[::-1], np.where(places < 0, -1, 49 - places)[[row]])
        assert alone.tobytes() == found[row].tobytes()
    assert pair_distances(queries, vectors, places[:, :0]).shape == (30, 0)
    assert pair_distances(queries[:0], vectors, places[:0]).shape == (0, 7)


def test_the_margin_covers_what_matrix_products_round(monkeypatch: pytest.MonkeyPatch) -> None:
    # faiss 1.14 would use matrix products only for more rows.
    monkeypatch.setattr(faiss.cvar, "distance_compute_blas_threshold", 1)
    queries, vectors = 30 + clustered(200, 5), 30 + clustered(500, 6)  # large norms, small distances
    reported, places = faiss.knn(queries, vectors, 20)
    exact = pair_distances(queries, vectors, places)
    off = np.abs(reported - exact)
    assert off.max() > 1e-4, "this test needs some rounding"
    assert (off <= rounding_margin(queries, float((vectors**2).sum(1).max()))).all()


def test_exact_distances_go_through_all_shards(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances_module, "ROWS_PER_BLOCK", 999)
    vectors = Artifact.open(data / "embeddings" / "train", "embeddings")["vectors"]
    queries = clustered(5, 7)
    expected = np.sort(brute_force(queries, clustered(3000, 1)), axis=1)[:, :10]
    np.testing.assert_allclose(exact_distances(queries, vectors, 10), expected, rtol=1e-4)


def test_stored_rows_in_single_precision() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)].reshape(-1, 4)
    assert as_float32(every).tobytes() == every.astype(np.float32).tobytes()
    assert as_float32(every[:0]).shape == (0, 4)
    single = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    assert as_float32(single[::-1]).tobytes() == single[::-1].tobytes()


@pytest.mark.parametrize("at_once", [1, 20, 16_384])
def test_distances_of_stored_rows_are_those_of_the_pairs(
    data: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(distances_module, "ROWS_AT_ONCE", at_once)
    vectors = Artifact.open(data / "embeddings" / "train", "embeddings")["vectors"]
    queries, ids = clustered(40, 5), np.random.default_rng(0).integers(-1, 3000, size=(40, 7))
    ids[3] = -1
    expected = pair_distances(queries, clustered(3000, 1), ids)
    assert stored_distances(queries, vectors, ids).tobytes() == expected.tobytes()
    in_memory: Any = clustered(3000, 1)
    assert stored_distances(queries, in_memory, ids).tobytes() == expected.tobytes()
    none = np.full((40, 2), -1)
    assert np.isinf(stored_distances(queries, vectors, none)).all()
    assert stored_distances(queries[:0], vectors, none[:0]).shape == (0, 2)


def test_lists_of_rows_report_distances_without_rounding(tmp_path: Path) -> None:
    vectors = {split: 100 + clustered(800, seed) for seed, split in enumerate(("train", "valid", "test"))}
    write_vectors(tmp_path, vectors, {split: np.arange(800) for split in vectors})
    make_index(tmp_path / "embeddings", IndexConfig(key="IVF16,Flat"), tmp_path / "index")
    index, queries = open_index(tmp_path / "index"), vectors["valid"]
    stored = Artifact.open(tmp_path / "embeddings" / "train", "embeddings")["vectors"]
    for size in (1, 33, 800):
        for k in (5, 150):
            distances, ids = index.search(queries[:size], k, 3)
            assert distances.tobytes() == stored_distances(queries[:size], stored, ids).tobytes()
    assert index.reports_pair_distances


@pytest.mark.parametrize("first_id", [-1, 0, 2**31 - 30, 2**31 - 3, 2**40])
def test_distinct_ids_and_their_places(first_id: int) -> None:
    for size in (0, 1, 40):
        ids = first_id + np.random.default_rng(size).integers(0, 20, size=(size, 3))
        distinct, places = distances_module._distinct(ids)
        assert distinct.tolist() == sorted(set(ids.ravel().tolist()))
        np.testing.assert_array_equal(distinct[places], ids)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(0, 4), st.integers(0, 9)),
    k=st.integers(1, 12),
    first_id=st.sampled_from([0, 2**31, 2**32 - 20, 2**40]),
)
def test_the_smallest_by_distance_and_id(seed: int, shape: tuple[int, int], k: int, first_id: int) -> None:
    random = np.random.default_rng(seed)
    distances = random.choice(np.array([-2.5, -0.0, 0.0, 1e-30, 1, 1.5, 3e38, np.inf], dtype=np.float32), size=shape)
    ids = first_id + np.argsort(random.random((*shape[:1], 12)), axis=1)[:, : shape[1]]
    ids = np.where(distances == np.inf, random.choice([-1, 5], size=shape), ids)
    found_distances, found_ids = smallest(distances, ids, k)
    assert found_distances.shape == found_ids.shape == (shape[0], k) and found_ids.dtype == np.int64
    for row in range(shape[0]):
        pairs = sorted((float(d), int(i)) for d, i in zip(distances[row], ids[row], strict=True) if d < np.inf)[:k]
        pairs += [(np.inf, -1)] * (k - len(pairs))
        assert list(zip(found_distances[row].tolist(), found_ids[row].tolist(), strict=True)) == pairs


# ---- lists and codes -----------------------------------------------------------------------------------


def ivf(centroids: Floats) -> Any:
    quantizer = faiss.IndexFlatL2(centroids.shape[1])
    quantizer.add(centroids)
    index = faiss.IndexIVFFlat(quantizer, centroids.shape[1], len(centroids))
    index.is_trained = True
    return index


@pytest.mark.parametrize("surplus", [0, 8])
@pytest.mark.parametrize("pairs", [1, 1 << 22])
def test_lists_are_the_nearest_by_distance_and_number_for_any_batch(
    monkeypatch: pytest.MonkeyPatch, surplus: int, pairs: int
) -> None:
    monkeypatch.setattr(index_module, "LISTS_SURPLUS", surplus)
    monkeypatch.setattr(index_module, "PAIRS_AT_ONCE", pairs)
    # Far from the origin, so that matrix products round by more than centroids are apart; many equal ones.
    centroids = 1000 + np.repeat(clustered(30, 1), 4, axis=0)
    queries = 1000 + clustered(60, 2)
    every = pair_distances(queries, centroids, np.tile(np.arange(120), (60, 1)))
    expected = np.argsort(every, axis=1, kind="stable")
    index = ivf(centroids)
    for count in (1, 5, 120):
        distances, lists = Centroids(index).nearest(queries, count)
        np.testing.assert_array_equal(lists, expected[:, :count])
        assert distances.tobytes() == np.take_along_axis(every, lists, axis=1).tobytes()
        for row in (0, 31):
            assert Centroids(index).nearest(queries[row : row + 1], count)[1].tolist() == [lists[row].tolist()]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_rows=st.integers(1, 60),
    count=st.integers(1, 70),
    surplus=st.integers(0, 20),
    kinds=st.integers(1, 30),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    pairs=st.sampled_from([1, 50, 1 << 22]),
)
def test_candidates_by_code_are_the_nearest_by_distance_and_id(
    seed: int, num_rows: int, count: int, surplus: int, kinds: int, share: float, pairs: int
) -> None:
    random = np.random.default_rng(seed)
    coded = random.integers(0, kinds, size=(9, num_rows)).astype(np.float32)  # many ties
    held = random.random((9, num_rows)) < 0.8  # in the lists that are visited
    out = random.random((9, num_rows)) < share

    def search(queries: Floats, k: int) -> tuple[Floats, Any]:
        """As faiss does: in order, equal ones in any order and any of them cut off."""
        found = np.full((len(queries), k), np.inf, dtype=np.float32)
        ids = np.full((len(queries), k), -1)
        for place, row in enumerate(queries[:, 0].astype(int)):
            rows = random.permutation(np.flatnonzero(held[row]))
            rows = rows[np.argsort(coded[row][rows], kind="stable")][:k]
            found[place, : len(rows)], ids[place, : len(rows)] = coded[row][rows], rows
        return found, ids

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "PAIRS_AT_ONCE", pairs)
        ids = nearest_by_code(
            search,
            np.arange(9, dtype=np.float32)[:, None],
            count,
            surplus,
            num_rows,
            lambda rows, ids: out[rows[:, None], np.maximum(ids, 0)],
        )
    for row in range(9):
        rows = sorted(np.flatnonzero(held[row] & ~out[row]), key=lambda one: (coded[row][one], one))[:count]
        assert ids[row].tolist() == rows + [-1] * (count - len(rows))


@settings(max_examples=100, deadline=None)
@given(lists=st.integers(1, 300), needed=st.integers(1, 320))
def test_the_fewest_lists_that_reach_the_target(lists: int, needed: int) -> None:
    asked: list[int] = []

    def recall(probes: int) -> float:
        asked.append(probes)
        return probes / 1000

    found = fewest_probes(recall, lists, needed / 1000)
    assert found == (min(needed, lists), min(needed, lists) / 1000)
    assert max(asked) <= min(lists, 2 * needed)


# ---- the artifact --------------------------------------------------------------------------------------


def test_an_exact_index(data: Path, tmp_path: Path) -> None:
    metrics, timings = make_index(data / "embeddings", IndexConfig(), tmp_path / "index")
    assert list(timings) == ["milliseconds_per_query"] and timings["milliseconds_per_query"] > 0
    assert metrics.pop("bytes_per_vector") == pytest.approx(4 * DIM, rel=0.01)
    assert metrics == {"recall": 1.0, "lists": 0, "probes": 0, "code_bytes": 0, "rescored": 0, "rows": 3000}
    index = open_index(tmp_path / "index")
    train = Artifact.open(data / "embeddings" / "train", "embeddings")
    Artifact.open(tmp_path / "index", "index").require(
        embeddings=train.fingerprint, chunks=train.facts["chunks"], key="Flat", nprobe=None
    )
    queries, vectors = clustered(30, 5), clustered(3000, 1)
    assert index.largest_norm == pytest.approx(float((vectors**2).sum(1).max()))
    distances, ids = index.search(queries, 10)
    expected = brute_force(queries, vectors)
    np.testing.assert_array_equal(ids, np.argsort(expected, axis=1)[:, :10])
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :10], rtol=1e-3, atol=1e-3)


def test_fewer_rows_than_asked_for_are_none_and_infinity(data: Path, tmp_path: Path) -> None:
    small = write_data(tmp_path / "data", num_train=3)
    make_index(small / "embeddings", IndexConfig(), tmp_path / "index")
    distances, ids = open_index(tmp_path / "index").search(clustered(4, 5), 5)
    assert (np.sort(ids[:, :3]) == [0, 1, 2]).all()
    assert (ids[:, 3:] == -1).all() and np.isinf(distances[:, 3:]).all()


@pytest.mark.parametrize("target", [0.5, 0.95, 1.0])
def test_ivf_visits_the_fewest_lists_that_reach_the_target(data: Path, tmp_path: Path, target: float) -> None:
    config = IndexConfig(key="IVF32,Flat", target_recall=target)
    metrics = make_index(data / "embeddings", config, tmp_path / "index").metrics
    index = open_index(tmp_path / "index")
    queries = clustered(200, 2)
    exact = np.argsort(brute_force(queries, clustered(3000, 1)), axis=1)[:, :10]

    def recall(probes: int) -> float:
        found = index.search(queries, 10, probes)[1]
        return float(np.mean([np.isin(row, truth).mean() for row, truth in zip(found, exact, strict=True)]))

    assert metrics["recall"] >= target
    assert recall(index.probes) == pytest.approx(metrics["recall"], abs=2e-3)
    assert metrics["probes"] == index.probes == Artifact.open(tmp_path / "index", "index").facts["nprobe"]
    if index.probes > 1:
        assert recall(index.probes - 1) < target
    assert recall(index.lists) == 1.0 and index.lists == 32


@pytest.mark.parametrize("key", ["Flat", "IVF16,Flat", "IVF16,PQ8x4fs"])
def test_equal_input_gives_equal_bytes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr(index_building, "ROWS_PER_ADDED_PART", 1000)
    threads = faiss.omp_get_max_threads()
    fingerprints = set()
    try:
        for number, (num_threads, block) in enumerate(((1, 65_536), (1, 65_536), (2, 425))):
            faiss.omp_set_num_threads(num_threads)
            monkeypatch.setattr(distances_module, "ROWS_PER_BLOCK", block)
            make_index(data / "embeddings", IndexConfig(key=key), tmp_path / str(number))
            fingerprints.add(Artifact.open(tmp_path / str(number), "index").fingerprint)
    finally:
        faiss.omp_set_num_threads(threads)
    assert len(fingerprints) == 1


def test_the_seed_draws_the_training_sample(data: Path, tmp_path: Path) -> None:
    digests = set()
    for seed in (0, 1):
        make_index(data / "embeddings", IndexConfig(key="IVF16,Flat", seed=seed), tmp_path / str(seed))
        digests.add(Artifact.open(tmp_path / str(seed), "index").files[INDEX_FILE])
    assert len(digests) == 2


@needs_autofaiss
@pytest.mark.parametrize(
    "key", ["auto", "Flat", "IVF1,Flat", "IVF32,Flat", "IVF32,PQ8x4fs", "IVF16,PQ1x4fs", "IVF120,PQ8", "IVF120,PQ1x8"]
)
def test_autofaiss_and_faiss_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    data = write_data(tmp_path, num_train=10_000)
    monkeypatch.setattr(keys, "EXACT_ROWS", 9_999)  # auto is IVF512,Flat
    monkeypatch.setattr(index_building, "ROWS_PER_ADDED_PART", 3_000)
    written = []
    for builder in ("autofaiss", "faiss"):
        config = IndexConfig(key=key, builder=builder, train_points_per_list=100, target_recall=0.5)
        make_index(data / "embeddings", config, tmp_path / builder)
        files = (tmp_path / builder).iterdir()
        written.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert len(written[0]) == 2 and written[0] == written[1]


def watch_training(monkeypatch: pytest.MonkeyPatch, builder: str) -> list[tuple[Floats, bool]]:
    """What the builder trains on from now on, and whether on a GPU."""
    trained = []
    name = {"autofaiss": "_build_with_autofaiss", "faiss": "_train_with_faiss"}[builder]
    build: Callable[[Any, str, bool], Any] = getattr(builders, name)

    def watched(sample: Any, key: str, gpu: bool) -> Any:
        trained.append((np.load(Path(sample) / "sample.npy") if builder == "autofaiss" else sample, gpu))
        return build(sample, key, gpu and builder == "faiss")  # autofaiss needs a real GPU

    monkeypatch.setattr(builders, name, watched)
    return trained


@pytest.mark.parametrize("builder", BUILDERS)
def test_the_training_sample_is_random_and_not_the_first_rows(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builder: str
) -> None:
    trained = watch_training(monkeypatch, builder)
    config = IndexConfig(key="IVF4,Flat", builder=builder, train_points_per_list=50)
    make_index(data / "embeddings", config, tmp_path / "index")
    ((sample, _),) = trained
    rows = np.array([np.flatnonzero((clustered(3000, 1) == vector).all(1))[0] for vector in sample])
    assert len(set(rows.tolist())) == 200
    assert 1200 < rows.mean() < 1800 and rows.min() < 100 and rows.max() > 2900
    built = faiss.read_index(str(tmp_path / "index" / INDEX_FILE))
    assert max(built.invlists.list_size(number) for number in range(4)) < 1500


@needs_autofaiss
def test_the_sample_for_autofaiss_lies_beside_the_index_and_not_in_memory(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    draw, build = builders.sample_rows, builders._build_with_autofaiss

    def drawing(*arguments: Any) -> Floats:
        sample = draw(*arguments)
        drawn.append(weakref.ref(sample))
        return sample

    def building(folder: str, key: str, gpu: bool) -> Any:
        assert tmp_path in Path(folder).parents, "/tmp may be memory"
        assert drawn[-1]() is None, "autofaiss has its own copy"
        return build(folder, key, gpu)

    monkeypatch.setattr(builders, "sample_rows", drawing)
    monkeypatch.setattr(builders, "_build_with_autofaiss", building)
    make_index(data / "embeddings", IndexConfig(key="IVF4,Flat", builder="autofaiss"), tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_codes_are_in_memory_once() -> None:
    vectors = clustered(3000, 1)
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(DIM), DIM, 16, 8, 4)
    index.train(vectors)
    index.add(vectors)
    made = builders.pack_for_fast_scan("IVF16,PQ8x4fs", index)
    assert index.invlists.compute_ntotal() == 0 and made.invlists.compute_ntotal() == made.ntotal == 3000
    again = faiss.IndexIVFPQ(index.quantizer, DIM, 16, 8, 4)
    again.pq = index.pq
    again.is_trained = True
    again.by_residual = index.by_residual
    again.add(vectors)
    expected = faiss.IndexIVFPQFastScan(again)
    for found, right in zip(made.search(vectors[:20], 5), expected.search(vectors[:20], 5), strict=True):
        np.testing.assert_array_equal(found, right)


def test_all_rows_are_added_once_and_in_order(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances_module, "ROWS_PER_BLOCK", 999)
    make_index(data / "embeddings", IndexConfig(key="IVF16,Flat"), tmp_path / "index")
    index = open_index(tmp_path / "index")
    distances, ids = index.search(clustered(3000, 1), 2)
    np.testing.assert_array_equal(ids[:, 0], np.arange(3000))
    assert (ids[:, 1] != ids[:, 0]).all() and (distances[:, 0] == 0).all()


def made_with_codes(data: Path, out: Path, key: str = "IVF32,PQ8x4fs", **settings: Any) -> dict[str, float]:
    return make_index(data / "embeddings", IndexConfig(key=key, **settings), out).metrics


@pytest.mark.parametrize("key", ["IVF32,PQ8x4fs", "IVF32,PQ4x4fs", "IVF120,PQ1x8"])
def test_an_index_of_codes(tmp_path: Path, key: str) -> None:
    data = write_data(tmp_path, num_train=12_000)
    metrics = made_with_codes(data, tmp_path / "index", key, train_points_per_list=100)
    index, queries = open_index(tmp_path / "index"), clustered(200, 2)
    facts, code_bytes = (
        Artifact.open(tmp_path / "index", "index").facts,
        {"8x4fs": 4, "4x4fs": 2, "1x8": 1}[key.partition("PQ")[2]],
    )
    assert metrics["lists"] == index.lists == facts["nprobe"] or metrics["probes"] == index.probes == facts["nprobe"]
    assert metrics["code_bytes"] == code_bytes and metrics["rescored"] == index.rescored == facts["rescored"]
    # What is in memory is as large as the file: no more than was promised, and not much less.
    size = (tmp_path / "index" / INDEX_FILE).stat().st_size
    assert metrics["bytes_per_vector"] == size / 12_000
    assert size - 20_000 < needed_bytes(key, 12_000, DIM) < size + 31 * 120 * code_bytes + 20_000
    # All rows are in it, and codes are near what they stand for.
    _, ids = index.search(queries, 12_000, index.lists)
    np.testing.assert_array_equal(np.sort(ids, axis=1), np.tile(np.arange(12_000), (200, 1)))
    # The recall is the one of the nearest `rescored` by code, scored again.
    distances = brute_force(queries, clustered(12_000, 1))
    truth = np.sort(distances, axis=1)[:, 9:10]

    def recall(probes: int, rescored: int) -> float:
        ids = index.search(queries, rescored, probes)[1]
        found = np.where(ids < 0, np.inf, np.take_along_axis(distances, np.maximum(ids, 0), axis=1))
        return float((np.sort(found, axis=1)[:, :10] <= truth + 1e-4).mean())

    assert metrics["recall"] >= 0.95
    assert recall(index.probes, metrics["rescored"]) == pytest.approx(metrics["recall"], abs=5e-3)
    if index.probes > 1:
        assert recall(index.probes - 1, metrics["rescored"]) < 0.955
    built = faiss.read_index(str(tmp_path / "index" / INDEX_FILE))
    assert type(built) is (faiss.IndexIVFPQFastScan if key.endswith("fs") else faiss.IndexIVFPQ)


def test_no_more_candidates_are_scored_again_than_the_target_needs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_effort, "RESCORED", (10, 20, 40, 80, 160, 320))
    metrics = made_with_codes(data, tmp_path / "index", "IVF32,PQ4x4fs")
    index, queries = open_index(tmp_path / "index"), clustered(200, 2)
    exact = np.argsort(brute_force(queries, clustered(3000, 1)), axis=1)[:, :10]

    def recall(rescored: int) -> float:
        found = index.search(queries, rescored, index.lists)[1]
        return float(np.mean([np.isin(truth, row).mean() for row, truth in zip(found, exact, strict=True)]))

    assert 20 <= metrics["rescored"] <= 320
    assert recall(int(metrics["rescored"])) >= 0.945 > recall(int(metrics["rescored"] // 2)) - 0.01


def test_what_codes_report_does_not_depend_on_the_batch_or_on_k(data: Path, tmp_path: Path) -> None:
    made_with_codes(data, tmp_path / "index")
    index, queries = open_index(tmp_path / "index"), clustered(200, 2)
    distances, _ = index.search(queries, 40, 7)
    for size, k in ((1, 40), (1, 3), (33, 40), (200, 300)):
        for start in range(0, 200, size):
            found, _ = index.search(queries[start : start + size], k, 7)
            width = min(k, 40)
            assert found[:, :width].tobytes() == distances[start : start + size, :width].tobytes()


def test_codes_too_coarse_for_the_target_are_an_error_with_both_numbers(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_effort, "RESCORED", (10, 20))
    message = r"index.target_recall: found 0.99, expected <= 0\.\d+: IVF32,PQ1x4fs reaches no more with 20 candidates"
    with pytest.raises(ConfigError, match=message):
        made_with_codes(data, tmp_path / "index", "IVF32,PQ1x4fs", target_recall=0.99)
    assert not (tmp_path / "index").exists()


def test_which_lists_are_visited_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    # Far from the origin, a matrix product rounds by more than centroids are apart.
    vectors = {split: 1000 + clustered(800, seed) for seed, split in enumerate(("train", "valid", "test"))}
    write_vectors(tmp_path, vectors, {split: np.arange(800) for split in vectors})
    make_index(tmp_path / "embeddings", IndexConfig(key="IVF16,Flat", target_recall=0.1), tmp_path / "index")
    index, queries = open_index(tmp_path / "index"), vectors["valid"][:200]
    distances, ids = index.search(queries, 10, probes=1)
    for row in range(200):
        alone = index.search(queries[row : row + 1], 10, probes=1)
        assert alone[0].tobytes() == distances[row].tobytes() and alone[1].tobytes() == ids[row].tobytes()


# ---- the GPU -------------------------------------------------------------------------------------------


class FakeGpu:
    """Gives this machine's faiss the functions of a GPU build; a copy on the "GPU" is a copy on the CPU."""

    def __init__(self, patch: pytest.MonkeyPatch, num_gpus: int = 1) -> None:
        self.copied: list[str] = []
        self.searches: list[int] = []
        self.trained: list[int] = []
        patch.setattr(faiss, "StandardGpuResources", lambda: "resources", raising=False)
        patch.setattr(faiss, "get_num_gpus", lambda: num_gpus)
        patch.setattr(faiss, "index_cpu_to_gpu", self.copy, raising=False)
        patch.setattr(faiss, "index_gpu_to_cpu", lambda index: faiss.clone_index(index.copied), raising=False)

    def copy(self, resources: str, number: int, index: Any) -> Any:
        assert (resources, number) == ("resources", 0)
        copied, searches, trained = faiss.clone_index(index), self.searches, self.trained
        self.copied.append(type(copied).__name__)

        class Counting:
            """Rounds otherwise than the CPU, as a GPU does."""

            nprobe = 1

            def __init__(self) -> None:
                self.copied = copied

            def train(self, rows: Floats) -> None:
                trained.append(len(rows))
                copied.train(rows)

            def search(self, queries: Floats, k: int) -> tuple[Floats, Any]:
                searches.append(k)
                distances, ids = copied.search(queries, k)
                return distances * np.float32(1 + 2e-7), ids

            def search_preassigned(self, queries: Floats, k: int, lists: Any, to_lists: Any) -> tuple[Floats, Any]:
                searches.append(k)
                copied.nprobe = self.nprobe
                distances, ids = copied.search_preassigned(queries, k, lists, to_lists)
                return distances * np.float32(1 + 2e-7), ids

        return Counting()


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    index_module._gpu_resources.cache_clear()
    yield FakeGpu(monkeypatch)
    index_module._gpu_resources.cache_clear()


def test_where_faiss_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not on_gpu("auto") and not on_gpu("cpu"), "this test is for a CPU build of faiss"
    with pytest.raises(ConfigError, match=r"runtime.device: found cuda, .* no GPU functions; run `make install GPU=1`"):
        on_gpu("cuda")
    FakeGpu(monkeypatch)
    assert on_gpu("auto") and on_gpu("cuda") and not on_gpu("cpu")
    FakeGpu(monkeypatch, num_gpus=0)
    assert not on_gpu("auto")
    with pytest.raises(ConfigError, match="runtime.device: found cuda, .* faiss sees no GPU here"):
        on_gpu("cuda")


def test_cuda_without_a_gpu_build_is_refused_before_any_work(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make install GPU=1"):
        make_index(data / "embeddings", IndexConfig(), tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("key", ["Flat", "IVF16,Flat", "IVF16,PQ8x4fs"])
def test_the_gpu_is_asked_for_what_it_can_do(
    data: Path, tmp_path: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, key: str, builder: str
) -> None:
    trained, config = watch_training(monkeypatch, builder), IndexConfig(key=key, builder=builder)
    make_index(data / "embeddings", config, tmp_path / "cpu", device="cpu")
    assert fake_gpu.copied == fake_gpu.trained == []
    make_index(data / "embeddings", config, tmp_path / "gpu", device="auto")
    assert [gpu for _, gpu in trained] == [False, key == "IVF16,Flat"]
    assert fake_gpu.trained == ([1024] if (key, builder) == ("IVF16,Flat", "faiss") else [])
    # The vectors were added to the same lists, so that all but k-means makes the same bytes.
    digests = [Artifact.open(tmp_path / name, "index").files[INDEX_FILE] for name in ("cpu", "gpu")]
    assert digests[0] == digests[1]
    fake_gpu.copied.clear()
    on_cpu, there = open_index(tmp_path / "cpu"), open_index(tmp_path / "gpu", "cuda")
    copied = {"Flat": ["IndexFlatL2"], "IVF16,Flat": ["IndexFlatL2", "IndexIVFFlat"], "IVF16,PQ8x4fs": ["IndexFlatL2"]}
    assert fake_gpu.copied == copied[key]
    fake_gpu.searches.clear()
    queries = clustered(30, 5)
    np.testing.assert_array_equal(there.search(queries, 10, 4)[1], on_cpu.search(queries, 10, 4)[1])
    asked = {"Flat": [10], "IVF16,Flat": [12, 10], "IVF16,PQ8x4fs": [12]}
    assert fake_gpu.searches == asked[key]
    monkeypatch.setattr(index_module, "GPU_LIMIT", 9)
    np.testing.assert_array_equal(there.search(queries, 10, 4)[1], on_cpu.search(queries, 10, 4)[1])
    assert fake_gpu.searches == asked[key], "more than a GPU can be asked for is the CPU's"


# ---- faults --------------------------------------------------------------------------------------------


def test_splits_that_were_embedded_in_different_ways(data: Path, tmp_path: Path) -> None:
    train = {split: clustered(50, 1) for split in ("train", "valid", "test")}
    documents = {split: np.arange(50) for split in train}
    other = write_vectors(tmp_path, train, documents)
    (other / "embeddings" / "valid").rename(other / "valid-before")
    changed = write_vectors(tmp_path / "changed", train, documents, encoder="another")
    (changed / "embeddings" / "valid").rename(other / "embeddings" / "valid")
    with pytest.raises(MismatchError, match="made for encoder another, expected none"):
        make_index(other / "embeddings", IndexConfig(), tmp_path / "index")


@needs_autofaiss
def test_what_autofaiss_only_logs_is_an_error(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> tuple[None, None]:
        logging.getLogger("autofaiss").error("not enough\nmemory")
        return None, None

    monkeypatch.setattr("autofaiss.build_index", refuse)
    with pytest.raises(ArtifactError, match="autofaiss could not build Flat: not enough memory"):
        make_index(data / "embeddings", IndexConfig(builder="autofaiss"), tmp_path / "index")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("builder", BUILDERS)
def test_building_is_quiet_and_leaves_logging_alone(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], builder: str
) -> None:
    root, logger = logging.getLogger(), logging.getLogger("autofaiss")
    before = (root.handlers[:], root.level, logger.handlers[:], logger.propagate)
    make_index(data / "embeddings", IndexConfig(key="IVF16,Flat", builder=builder), tmp_path / "index")
    assert (root.handlers[:], root.level, logger.handlers[:], logger.propagate) == before
    said = capfd.readouterr()
    assert said.err == ""
    assert said.out.startswith("index: IVF16,Flat over 3,000 chunks, ") and said.out.count("\n") == 1


def test_a_damaged_index_is_refused(data: Path, tmp_path: Path) -> None:
    make_index(data / "embeddings", IndexConfig(), tmp_path / "index")
    path = tmp_path / "index" / INDEX_FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedArtifactError, match="sha256 differs"):
        open_index(tmp_path / "index")


@pytest.mark.parametrize("content", ["nonsense", "other rows", "inner product"])
def test_a_file_that_is_not_the_described_index_is_refused(tmp_path: Path, content: str) -> None:
    with ArtifactWriter(tmp_path / "index", "index") as writer:
        path = tmp_path / "index" / INDEX_FILE
        if content == "nonsense":
            path.write_bytes(b"nonsense")
        else:
            index = faiss.IndexFlatIP(DIM) if content == "inner product" else faiss.IndexFlatL2(DIM)
            index.add(clustered(5 if content == "inner product" else 4, 1))
            faiss.write_index(index, str(path))
        writer.add_file(INDEX_FILE)
        writer.facts.update(metric="l2", rows=5, dim=DIM, key="Flat", nprobe=None, rescored=None, largest_norm=1.0)
    with pytest.raises(DamagedArtifactError, match="stage index"):
        open_index(tmp_path / "index")


def test_the_number_of_lists_is_read_from_the_key() -> None:
    keys = ("Flat", "IVF1,Flat", "IVF65536,Flat", "IVF8,PQ16x4fs", "IVF9,PQ16x8", "IVF10,PQ16")
    assert [num_lists(key) for key in keys] == [0, 1, 65536, 8, 9, 10]
