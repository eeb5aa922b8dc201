"""On a tenth of the default corpus: no neighbor of its own document, none held out, none wrong.

The settings are the defaults; like all of the corpus, a tenth of it is searched exactly. The encoder is a small one,
whose vectors differ in what is near and not in what may be a neighbor: the default one takes minutes.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures import tiny_encoder
from index_builders import committed_params

from retro_model.core.artifacts import SPLITS, Artifact
from retro_model.corpus.chunking import make_chunks
from retro_model.corpus.chunks import locate
from retro_model.corpus.documents import Corpus
from retro_model.corpus.tokenizer_training import make_tokenizer
from retro_model.embedding.embed import make_embeddings
from retro_model.sample import write_sample
from retro_model.search.build import make_index
from retro_model.search.neighbors import make_neighbors
from stages.common.params import parse_params

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("default")
    params = SimpleNamespace(**parse_params(committed_params()))
    write_sample(folder / "sample", dataclasses.replace(params.sample, max_bytes=params.sample.max_bytes // 10))
    make_tokenizer(folder / "sample", params.corpus, params.tokenizer, folder / "tokenizer")
    make_chunks(folder / "sample", params.corpus, folder / "tokenizer", params.chunk_size, folder / "chunks")
    embed = dataclasses.replace(params.embed, encoder=str(tiny_encoder(folder / "encoder")))
    make_embeddings(folder / "chunks", folder / "tokenizer", embed, folder / "embeddings")
    make_index(folder / "embeddings", params.index, folder / "index")
    make_neighbors(folder / "embeddings", folder / "index", folder / "chunks", params.neighbors, folder / "neighbors")
    yield folder


def opened(data: Path, kind: str, folder: str, split: str) -> Artifact:
    return Artifact.open(data / folder / split, kind)


def test_documents_are_of_one_split_each_and_what_is_searched_is_train(data: Path) -> None:
    chunks = {split: opened(data, "chunks", "chunks", split) for split in SPLITS}
    documents = {split: set(chunks[split]["documents"][:].tolist()) for split in SPLITS}
    assert sum(map(len, documents.values())) == len(set().union(*documents.values()))
    for split in SPLITS:
        neighbors = opened(data, "neighbors", "neighbors", split)
        neighbors.require(chunks=chunks[split].fingerprint, database=chunks["train"].fingerprint)
        ids = neighbors["ids"][:]
        assert ids.shape == (chunks[split].rows, 64) and ids.min() >= 0 and ids.max() < chunks["train"].rows


@pytest.mark.parametrize("split", SPLITS)
def test_no_neighbor_is_of_its_own_document(split: str, data: Path) -> None:
    chunks, train = opened(data, "chunks", "chunks", split), opened(data, "chunks", "chunks", "train")
    neighbor_documents = train["documents"][:][opened(data, "neighbors", "neighbors", split)["ids"][:]]
    assert not (neighbor_documents == chunks["documents"][:][:, None]).any()


@pytest.mark.parametrize("split", SPLITS)
def test_they_are_those_of_brute_force(split: str, data: Path) -> None:
    """For every twentieth chunk, from the stored vectors, in float64."""
    neighbors, chunks = opened(data, "neighbors", "neighbors", split), opened(data, "chunks", "chunks", split)
    database = opened(data, "embeddings", "embeddings", "train")["vectors"][:].astype(np.float64)
    rows = np.arange(0, chunks.rows, 20)
    queries = opened(data, "embeddings", "embeddings", split)["vectors"][rows].astype(np.float64)
    distances = (queries**2).sum(1)[:, None] + (database**2).sum(1) - 2 * queries @ database.T
    train_documents = opened(data, "chunks", "chunks", "train")["documents"][:]
    distances[train_documents == chunks["documents"][rows][:, None]] = np.inf
    expected = np.sort(distances, axis=1)[:, :64]
    found = np.take_along_axis(distances, neighbors["ids"][rows].astype(np.int64), axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(neighbors["distances"][rows], expected, atol=1e-5)
    assert (np.diff(neighbors["distances"][rows], axis=1) >= 0).all()


def test_from_any_chunk_one_gets_to_its_place_in_its_document(data: Path) -> None:
    params = SimpleNamespace(**parse_params(committed_params()))
    texts = {document.source: document.text for document in Corpus(data / "sample", params.corpus).documents()}
    for split in SPLITS:
        chunks = opened(data, "chunks", "chunks", split)
        ids = range(0, chunks.rows, 97)
        for chunk, place in zip(ids, locate(chunks, ids), strict=True):
            assert place.document == chunks["documents"][chunk]
            assert 0 <= place.start <= place.stop <= len(texts[place.source].encode())
            assert place.stop - place.start == chunks["bytes"][chunk]
            assert (data / "sample" / place.source).read_bytes() == texts[place.source].encode()
