"""An index of equal bytes for equal input, of the recall that was asked for, and of L2 distances."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fixtures import write_vectors

from retro_model import index as index_module
from retro_model.artifacts import Artifact, ArtifactWriter
from retro_model.errors import ArtifactError, ConfigError, DamagedArtifactError, MismatchError
from retro_model.index import (
    INDEX_FILE,
    Index,
    IndexConfig,
    choose_key,
    exact_distances,
    import_faiss,
    make_index,
    num_lists,
    pair_distances,
    rounding_margin,
)

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


def brute_force(queries: Floats, vectors: Floats) -> npt.NDArray[np.float64]:
    difference = queries[:, None].astype(np.float64) - vectors[None]
    return (difference**2).sum(axis=-1)


# ---- settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "flat", "IVF0,Flat", "IVF16", "OPQ16,PQ16", "IVF16,SQ8", "HNSW32", "Flat "])
def test_keys_that_are_not_known_to_work_are_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError, match=f"index.key: found '{key}', expected auto, Flat or IVF<lists>,Flat"):
        IndexConfig(key=key)


@pytest.mark.parametrize(
    ("num_rows", "key"),
    [
        (1, "Flat"),
        (200_000, "Flat"),
        (200_001, "IVF2048,Flat"),
        (1_000_000, "IVF4096,Flat"),
        (28_000_000_000, "IVF524288,Flat"),
    ],
)
def test_auto_follows_its_rule(num_rows: int, key: str) -> None:
    assert choose_key(IndexConfig(), num_rows) == key


def test_more_lists_than_the_rows_can_train() -> None:
    assert choose_key(IndexConfig(key="IVF4,Flat"), 156) == "IVF4,Flat"
    with pytest.raises(ConfigError, match=r"index.key: IVF4,Flat needs 156 train chunks .*found 155"):
        choose_key(IndexConfig(key="IVF4,Flat"), 155)


def test_too_little_memory_is_one_line_with_both_numbers(data: Path, tmp_path: Path) -> None:
    message = r"index.max_memory_gb: found 0.0001, expected >= 0.000192 for Flat over 3,000 vectors of 16 dimensions"
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


def test_the_margin_covers_what_matrix_products_round() -> None:
    queries, vectors = 30 + clustered(200, 5), 30 + clustered(500, 6)  # large norms, small distances
    reported, places = faiss.knn(queries, vectors, 20)
    exact = pair_distances(queries, vectors, places)
    off = np.abs(reported - exact)
    assert off.max() > 1e-4, "this test needs some rounding"
    assert (off <= rounding_margin(queries, float((vectors**2).sum(1).max()))).all()


def test_exact_distances_go_through_all_shards(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "ROWS_PER_BLOCK", 999)
    vectors = Artifact.open(data / "embeddings" / "train", "embeddings")["vectors"]
    queries = clustered(5, 7)
    expected = np.sort(brute_force(queries, clustered(3000, 1)), axis=1)[:, :10]
    np.testing.assert_allclose(exact_distances(queries, vectors, 10), expected, rtol=1e-4)


# ---- the artifact --------------------------------------------------------------------------------------


def test_an_exact_index(data: Path, tmp_path: Path) -> None:
    metrics = make_index(data / "embeddings", IndexConfig(), tmp_path / "index")
    assert metrics.pop("bytes_per_vector") == pytest.approx(4 * DIM, rel=0.01)
    assert metrics == {"recall": 1.0, "lists": 0, "probes": 0, "rows": 3000}
    index = Index.open(tmp_path / "index")
    train = Artifact.open(data / "embeddings" / "train", "embeddings")
    index.artifact.require(embeddings=train.fingerprint, chunks=train.facts["chunks"], key="Flat", nprobe=None)
    queries, vectors = clustered(30, 5), clustered(3000, 1)
    assert index.largest_norm == pytest.approx(float((vectors**2).sum(1).max()))
    distances, ids = index.search(queries, 10)
    expected = brute_force(queries, vectors)
    np.testing.assert_array_equal(ids, np.argsort(expected, axis=1)[:, :10])
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :10], rtol=1e-3, atol=1e-3)


def test_fewer_rows_than_asked_for_are_none_and_infinity(data: Path, tmp_path: Path) -> None:
    small = write_data(tmp_path / "data", num_train=3)
    make_index(small / "embeddings", IndexConfig(), tmp_path / "index")
    distances, ids = Index.open(tmp_path / "index").search(clustered(4, 5), 5)
    assert (np.sort(ids[:, :3]) == [0, 1, 2]).all()
    assert (ids[:, 3:] == -1).all() and np.isinf(distances[:, 3:]).all()


@pytest.mark.parametrize("target", [0.5, 0.95, 1.0])
def test_ivf_visits_the_fewest_lists_that_reach_the_target(data: Path, tmp_path: Path, target: float) -> None:
    config = IndexConfig(key="IVF32,Flat", target_recall=target)
    metrics = make_index(data / "embeddings", config, tmp_path / "index")
    index = Index.open(tmp_path / "index")
    queries = clustered(200, 2)
    exact = np.argsort(brute_force(queries, clustered(3000, 1)), axis=1)[:, :10]

    def recall(probes: int) -> float:
        found = index.search(queries, 10, probes)[1]
        return float(np.mean([np.isin(row, truth).mean() for row, truth in zip(found, exact, strict=True)]))

    assert metrics["recall"] >= target
    assert recall(index.probes) == pytest.approx(metrics["recall"], abs=2e-3)
    assert metrics["probes"] == index.probes == index.artifact.facts["nprobe"]
    if index.probes > 1:
        assert recall(index.probes - 1) < target
    assert recall(index.lists) == 1.0 and index.lists == 32


@pytest.mark.parametrize("key", ["Flat", "IVF16,Flat"])
def test_equal_input_gives_equal_bytes(data: Path, tmp_path: Path, key: str) -> None:
    threads = faiss.omp_get_max_threads()
    fingerprints = set()
    try:
        for number, num_threads in enumerate((1, 1, 2)):
            faiss.omp_set_num_threads(num_threads)
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


def test_the_training_sample_is_random_and_not_the_first_rows(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = []
    build: Callable[[str, str], Any] = index_module._build_with_autofaiss

    def watched(folder: str, key: str) -> Any:
        samples.append(np.load(Path(folder) / "sample.npy"))
        return build(folder, key)

    monkeypatch.setattr(index_module, "_build_with_autofaiss", watched)
    config = IndexConfig(key="IVF4,Flat", train_points_per_list=50)
    make_index(data / "embeddings", config, tmp_path / "index")
    (sample,) = samples
    rows = np.array([np.flatnonzero((clustered(3000, 1) == vector).all(1))[0] for vector in sample])
    assert len(set(rows.tolist())) == 200
    assert 1200 < rows.mean() < 1800 and rows.min() < 100 and rows.max() > 2900
    built = faiss.read_index(str(tmp_path / "index" / INDEX_FILE))
    assert max(built.invlists.list_size(number) for number in range(4)) < 1500


def test_all_rows_are_added_once_and_in_order(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "ROWS_PER_BLOCK", 999)
    make_index(data / "embeddings", IndexConfig(key="IVF16,Flat"), tmp_path / "index")
    index = Index.open(tmp_path / "index")
    distances, ids = index.search(clustered(3000, 1), 2)
    np.testing.assert_array_equal(ids[:, 0], np.arange(3000))
    assert (ids[:, 1] != ids[:, 0]).all() and (distances[:, 0] == 0).all()


def test_which_lists_are_visited_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    # Far from the origin, a matrix product rounds by more than centroids are apart.
    vectors = {split: 1000 + clustered(800, seed) for seed, split in enumerate(("train", "valid", "test"))}
    write_vectors(tmp_path, vectors, {split: np.arange(800) for split in vectors})
    make_index(tmp_path / "embeddings", IndexConfig(key="IVF16,Flat", target_recall=0.1), tmp_path / "index")
    index, queries = Index.open(tmp_path / "index"), vectors["valid"][:200]
    distances, ids = index.search(queries, 10, probes=1)
    for row in range(200):
        alone = index.search(queries[row : row + 1], 10, probes=1)
        assert alone[0].tobytes() == distances[row].tobytes() and alone[1].tobytes() == ids[row].tobytes()


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


def test_what_autofaiss_only_logs_is_an_error(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> tuple[None, None]:
        logging.getLogger("autofaiss").error("not enough\nmemory")
        return None, None

    monkeypatch.setattr("autofaiss.build_index", refuse)
    with pytest.raises(ArtifactError, match="autofaiss could not build Flat: not enough memory"):
        make_index(data / "embeddings", IndexConfig(), tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_autofaiss_is_quiet_and_leaves_logging_alone(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root, logger = logging.getLogger(), logging.getLogger("autofaiss")
    before = (root.handlers[:], root.level, logger.handlers[:], logger.propagate)
    make_index(data / "embeddings", IndexConfig(key="IVF16,Flat"), tmp_path / "index")
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
        Index.open(tmp_path / "index")


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
        writer.facts.update(metric="l2", rows=5, dim=DIM, key="Flat", nprobe=None, largest_norm=1.0)
    with pytest.raises(DamagedArtifactError, match="stage index"):
        Index.open(tmp_path / "index")


def test_the_number_of_lists_is_read_from_the_key() -> None:
    assert [num_lists(key) for key in ("Flat", "IVF1,Flat", "IVF65536,Flat")] == [0, 1, 65536]
