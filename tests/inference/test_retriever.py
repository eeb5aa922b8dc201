"""Live text finds what the pipeline found for it, and nothing is searched with the wrong encoder."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import tiny_corpus, tiny_data, tiny_encoder

from retro_model.core.artifacts import Artifact
from retro_model.core.errors import ConfigError, MismatchError, MissingArtifactError, SourceError
from retro_model.core.rows import retrieved_tokens
from retro_model.embedding.config import EmbedConfig
from retro_model.embedding.embed import make_embeddings
from retro_model.inference.retriever import Retriever
from retro_model.search.build import make_index
from retro_model.search.keys import IndexConfig
from retro_model.search.neighbors import NeighborsConfig, make_neighbors

K = 5


def build(folder: Path, corpus: Path, encoder: Path) -> Path:
    """The data folder of a whole run, tokenizer to neighbors."""
    data = tiny_data(folder, corpus)
    config = EmbedConfig(encoder=str(encoder))
    make_embeddings(data / "chunks", data / "tokenizer", config, data / "embeddings")
    make_index(data / "embeddings", IndexConfig(), data / "index")
    out = data / "neighbors"
    make_neighbors(data / "embeddings", data / "index", data / "chunks", NeighborsConfig(stored=K), out)
    return data


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return build(folder / "data", tiny_corpus(folder / "documents", num_documents=24), encoder)


@pytest.fixture(scope="module")
def retriever(data: Path, encoder: Path) -> Retriever:
    return Retriever.open(data, encoder=str(encoder))


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    folder = tmp_path_factory.mktemp("other")
    return build(folder / "data", tiny_corpus(folder / "documents", num_documents=9, seed=3), encoder)


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return shutil.copytree(data, tmp_path / "copy")


@pytest.mark.parametrize("split", ["train", "test"])
def test_stored_chunks_find_live_what_was_precalculated(data: Path, retriever: Retriever, split: str) -> None:
    chunks = Artifact.open(data / "chunks" / split, "chunks")
    neighbors = Artifact.open(data / "neighbors" / split, "neighbors")
    found = retriever.retrieve(chunks["tokens"][:][:, :-1], K, exclude_documents=chunks["documents"][:])
    np.testing.assert_array_equal(found.ids, neighbors["ids"][:])
    assert found.distances.tobytes() == neighbors["distances"][:].tobytes()
    database = Artifact.open(data / "chunks" / "train", "chunks")
    assert found.tokens.shape == (chunks.rows, K, 32)
    np.testing.assert_array_equal(found.tokens, retrieved_tokens(database, found.ids))


def test_without_an_excluded_document_a_chunk_finds_itself_first(data: Path, retriever: Retriever) -> None:
    tokens = Artifact.open(data / "chunks" / "train", "chunks")["tokens"][:20]
    found = retriever.retrieve(tokens[:, :-1], 1)
    assert (found.distances == 0).all()
    np.testing.assert_array_equal(found.tokens[:, 0, :16], tokens[:, :-1])  # the chunk, or an equal one


def test_a_query_does_not_depend_on_its_batch(data: Path, retriever: Retriever) -> None:
    tokens = Artifact.open(data / "chunks" / "valid", "chunks")["tokens"][:12][:, :-1]
    together = retriever.retrieve(tokens, K)
    for row in range(len(tokens)):
        alone = retriever.retrieve(tokens[row : row + 1], K)
        assert alone.ids.tolist() == together.ids[row : row + 1].tolist()
        assert alone.distances.tobytes() == together.distances[row : row + 1].tobytes()


def test_text_and_its_tokens_find_the_same(data: Path, retriever: Retriever) -> None:
    texts = ["Bacodi fuga lem.", "verpa tu"]
    ids = [retriever.tokenizer.encode(text) for text in texts]
    rows = np.zeros((2, 16), dtype=np.int64)  # padding is no text, and neither is the mark of a beginning
    for row, tokens in zip(rows, ids, strict=True):
        row[0], row[1 : 1 + len(tokens)] = retriever.tokenizer.begin_id, tokens[:15]
    assert all(len(tokens) < 16 for tokens in ids)
    assert retriever.retrieve(rows, K).ids.tolist() == retriever.retrieve_text(texts, K).ids.tolist()
    assert retriever.text(np.array([0]))[0] in "".join(
        path.read_text(encoding="utf-8") for path in (data.parent / "documents").rglob("*.txt")
    )


def test_more_neighbors_than_there_are_end_in_none_and_padding(data: Path, retriever: Retriever) -> None:
    database = Artifact.open(data / "chunks" / "train", "chunks")
    found = retriever.retrieve_text(["tu"], database.rows + 2)
    assert sorted(found.ids[0, :-2].tolist()) == list(range(database.rows))
    assert found.ids[0, -2:].tolist() == [-1, -1] and np.isinf(found.distances[0, -2:]).all()
    assert (found.tokens[0, -2:] == database.facts["pad_id"]).all()


def test_the_function_for_generation(data: Path, retriever: Retriever) -> None:
    tokens = Artifact.open(data / "chunks" / "valid", "chunks")["tokens"][:3][:, :-1].astype(np.int64)
    found = retriever.for_generation(2)(torch.from_numpy(tokens))
    assert found.dtype == torch.int64 and found.shape == (3, 2, 32)
    np.testing.assert_array_equal(found.numpy(), retriever.retrieve(tokens, 2).tokens)


def test_nothing_is_written(data: Path, encoder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    Retriever.open(data, encoder=str(encoder)).retrieve_text(["tu"], 1)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


# ---- what does not fit ---------------------------------------------------------------------------------


def test_ids_of_another_vocabulary_are_refused(retriever: Retriever) -> None:
    for wrong in (-1, 400):
        with pytest.raises(ConfigError, match=r"found token ids .* expected 0 to 399"):
            retriever.retrieve(np.full((1, 16), wrong), 1)
    with pytest.raises(ConfigError, match="knn: found 0, expected >= 1"):
        retriever.retrieve_text(["tu"], 0)


def test_an_encoder_that_is_elsewhere_now_is_named(data: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"embed.encoder: tiny cannot be loaded"):
        Retriever.open(data)
    moved = shutil.copytree(encoder, tmp_path / "moved")
    assert Retriever.open(data, encoder=str(moved)).retrieve_text(["tu"], 1).ids.shape == (1, 1)


def test_another_encoder_is_refused(data: Path, tmp_path: Path) -> None:
    other = tiny_encoder(tmp_path / "other", seed=1)
    with pytest.raises(MismatchError, match=r"embeddings/train: made by encoder tiny .*, found .*other"):
        Retriever.open(data, encoder=str(other))


@pytest.mark.parametrize("missing", ["tokenizer", "chunks", "embeddings", "index"])
def test_a_missing_part_is_named(copy: Path, encoder: Path, missing: str) -> None:
    shutil.rmtree(copy / missing)
    with pytest.raises(MissingArtifactError, match=f"copy/{missing}"):
        Retriever.open(copy, encoder=str(encoder))


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ("tokenizer", "chunks/train: made for tokenizer"),
        ("chunks", "chunks/train: made for tokenizer"),
        ("embeddings", "embeddings/train: made for chunks"),
        ("index", "index: made for embeddings"),
    ],
)
def test_parts_of_different_runs_do_not_mix(
    copy: Path, encoder: Path, other_data: Path, replaced: str, message: str
) -> None:
    shutil.rmtree(copy / replaced)
    shutil.copytree(other_data / replaced, copy / replaced)
    with pytest.raises(MismatchError, match=message):
        Retriever.open(copy, encoder=str(encoder))
