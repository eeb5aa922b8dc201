"""A corpus that grows: only what is new is tokenized and embedded, and the bytes are those of a clean run.

Neighbors are compared in one of the tests; tests/search/test_growing_neighbors.py has what is theirs alone.
"""

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_stages import files_of
from fixtures import tiny_corpus, tiny_encoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retro_model.core.artifacts import SPLITS, Artifact
from retro_model.corpus import chunking
from retro_model.corpus.chunking import block_bytes, blocks, make_chunks
from retro_model.corpus.chunks import read_documents
from retro_model.corpus.documents import CorpusConfig, Document
from retro_model.corpus.tokenizer_training import TokenizerConfig, make_tokenizer
from retro_model.embedding import embed as embedding
from retro_model.embedding.config import EmbedConfig
from retro_model.embedding.embed import make_embeddings
from retro_model.jobs import parts as kept
from retro_model.jobs.parts import Parts
from retro_model.search import earlier
from retro_model.search.build import make_index
from retro_model.search.keys import IndexConfig
from retro_model.search.neighbors import NeighborsConfig, make_neighbors

CORPUS = CorpusConfig(valid=0.15, test=0.15)
ALL = 1 << 40  # bytes: nothing is deleted


class World:
    """A folder of documents, a tokenizer that no document changes, an encoder and a folder of parts."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.documents, self.runs = folder, model, folder / "documents", 0
        self.parts = Parts(folder / "parts", ALL)

    def run(self, parts: Parts | None, **changes: Any) -> tuple[dict[str, bytes], int]:
        """The bytes of chunks and embeddings, with `stored` of neighbors, too; and how many chunks were embedded."""
        self.runs += 1
        out, tokenizer = self.folder / f"out-{self.runs}", self.model / "tokenizer"
        config = EmbedConfig(
            encoder=str(self.model / "encoder"), number_type="float32", max_tokens=changes.get("max_tokens", 24)
        )
        make_chunks(self.documents, CORPUS, tokenizer, changes.get("chunk_size", 16), out / "chunks", parts=parts)
        options: dict[str, Any] = {"parts": parts, "restore": changes.get("restore"), "batch_size": 8}
        outcome = make_embeddings(out / "chunks", tokenizer, config, out / "embeddings", device="cpu", **options)
        if "stored" in changes:
            folders = out / "embeddings", out / "index", out / "chunks"
            make_index(folders[0], IndexConfig(), folders[1])
            make_neighbors(*folders, NeighborsConfig(stored=changes["stored"]), out / "neighbors", parts=parts)
        return files_of(out), int(outcome.timings["chunks_embedded"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_encoder(folder / "encoder")
    corpus = tiny_corpus(folder / "documents", 30)
    make_tokenizer(corpus, CORPUS, TokenizerConfig(vocab_size=400), folder / "tokenizer")
    return folder


@pytest.fixture
def world(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(chunking, "LEAST_BLOCK_BYTES", 3000)
    shutil.copytree(model / "documents", tmp_path / "documents")
    return World(tmp_path, model)


def chunks_of(world: World, source: str) -> int:
    tables = [Artifact.open(world.folder / f"out-{world.runs}" / "chunks" / split, "chunks") for split in SPLITS]
    return sum(entry["chunks"] for table in tables for entry in read_documents(table) if entry["source"] == source)


def new_text(seed: int) -> str:
    words = random.Random(seed)
    return " ".join("".join(words.choices("abcdefgh", k=words.randint(2, 7))) for _ in range(150))


@pytest.mark.parametrize("name", ["aaa.txt", "document-015b.txt", "part/zzz.txt"])
def test_a_new_document_costs_its_own_chunks_wherever_it_sorts(
    world: World, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, num_embedded = world.run(world.parts)
    total = sum(Artifact.open(world.folder / "out-1" / "chunks" / split, "chunks").rows for split in SPLITS)
    assert num_embedded == total
    assert world.run(world.parts) == (before, 0)
    (world.documents / name).write_text(new_text(1))
    capsys.readouterr()
    grown, num_embedded = world.run(world.parts)
    assert num_embedded == chunks_of(world, name) > 5
    assert "chunk: 1 of 31 documents tokenized" in capsys.readouterr().out
    assert world.run(None)[0] == grown
    shards = {content for file, content in before.items() if not file.endswith("artifact.json")}
    new = [file for file, content in grown.items() if content not in shards and not file.endswith("artifact.json")]
    assert len({file.rpartition("-")[2].partition(".")[0] for file in new}) <= 4, "it changes the shards nearby"


CHANGES = st.lists(st.tuples(st.integers(0, 44), st.integers(0, 3)), min_size=1, max_size=12)


@pytest.mark.slow
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(CHANGES, min_size=1, max_size=3))
def test_any_sequence_of_changes_gives_the_bytes_of_a_clean_run(
    rounds: list[list[tuple[int, int]]], model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(model / "documents", folder / "documents")
    world = World(folder, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "LEAST_BLOCK_BYTES", 3000)
        patch.setattr(earlier, "MOST_WORK", np.inf)  # uses earlier neighbors even where that is of little use
        for changes in rounds:
            for number, what in changes:
                file = world.documents / f"document-{number:03d}.txt"
                if what:
                    file.write_text(new_text(100 * number + what))
                else:
                    file.unlink(missing_ok=True)
            grown, _ = world.run(world.parts, stored=8)
        assert grown == world.run(None, stored=8)[0]


def damage_vectors(part: Path) -> None:
    rewrite(part / "vectors-00000.npy", lambda content: content[:-1] + bytes([content[-1] ^ 1]))


def damage_keys(part: Path) -> None:
    rewrite(part / "keys.npy", lambda content: content[:-1])


def damage_flags(part: Path) -> None:
    rewrite(part / "truncated-00000.npy", lambda content: content[:-1] + b"\x02")


def lose_keys(part: Path) -> None:
    (part / "keys.npy").unlink()


def damage_description(part: Path) -> None:
    rewrite(part / "artifact.json", lambda content: content[:-9])


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    content = file.read_bytes()
    file.unlink()  # it may be a hard link
    file.write_bytes(change(content))


@pytest.mark.parametrize("damage", [damage_vectors, damage_keys, damage_flags, lose_keys, damage_description])
def test_a_damaged_part_is_never_used(world: World, damage: Callable[[Path], None]) -> None:
    world.run(world.parts)
    for part in (world.parts.folder / "embeddings").iterdir():
        damage(part)
    (world.documents / "aaa.txt").write_text(new_text(1))  # so that whole parts and items of parts are asked for
    grown, _ = world.run(world.parts)
    assert grown == world.run(None)[0]
    assert world.run(world.parts) == (grown, 0), "what was damaged was made again"


@pytest.mark.parametrize("module", ["embedding", "chunking"])
def test_parts_of_other_code_or_libraries_are_not_used(
    world: World, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, total = world.run(world.parts)
    changed = {"embedding": embedding, "chunking": chunking}[module]
    with monkeypatch.context() as patch:
        patch.setattr(changed, "CODE_DIGEST", "of other code")
        capsys.readouterr()
        _, num_embedded = world.run(world.parts)
        tokenized = "chunk: 30 of 30" in capsys.readouterr().out
        assert (num_embedded, tokenized) == ((total, False) if module == "embedding" else (0, True))
    with monkeypatch.context() as patch:
        patch.setattr(changed, "LIBRARIES", (*changed.LIBRARIES, "dvc"))
        capsys.readouterr()
        _, num_embedded = world.run(world.parts)
        tokenized = "chunk: 30 of 30" in capsys.readouterr().out
        assert (num_embedded, tokenized) == ((total, False) if module == "embedding" else (0, True))


def test_the_code_of_a_part_is_that_of_its_package_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "a_package_of_a_test"
    (package / "deep").mkdir(parents=True)
    for file in ("__init__.py", "one.py", "deep/__init__.py", "deep/two.py"):
        (package / file).write_text("x = 1\n")
    (tmp_path / "another.py").write_text("x = 1\n")
    first = kept.code_digest(package.name)
    (tmp_path / "another.py").write_text("x = 2\n")
    (package / "deep" / "two.pyc").write_text("x = 2\n")
    assert kept.code_digest(package.name) == first
    (package / "deep" / "two.py").write_text("x = 2\n")
    assert kept.code_digest(package.name) != first
    assert kept.code_digest(f"{package.name}.one") not in (first, kept.code_digest(package.name))
    settings = [
        kept.settings_digest("code", libraries, facts) for libraries in ([], ["numpy"]) for facts in ({}, {"a": 1})
    ]
    assert len({*settings, kept.settings_digest("other code", [], {})}) == 5


@pytest.mark.parametrize("linked", [True, False])
def test_outputs_are_links_or_copies_and_parts_are_read_only(
    world: World, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not linked:

        def refuse(source: object, target: object) -> None:
            raise OSError(errno.EXDEV, "another file system")

        monkeypatch.setattr(os, "link", refuse)
    made, _ = world.run(world.parts)
    shard = world.folder / "out-1" / "embeddings" / "train" / "vectors-00000.npy"
    assert shard.stat().st_nlink == (2 if linked else 1)
    files = [file for file in world.parts.folder.glob("*/*/*") if file.is_file()]
    assert files and all(file.stat().st_mode & 0o777 == 0o444 for file in files)
    assert made == world.run(None)[0]


@pytest.mark.parametrize("what", ["whole", "damaged", "of other chunks", "shorter", "parts are there", "none"])
def test_vectors_of_an_earlier_run_are_taken_over_where_there_are_no_parts(
    world: World, what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, total = world.run(None, max_tokens=20 if what == "shorter" else 24)
    (world.documents / "aaa.txt").write_text(new_text(1))
    if what == "damaged":
        rewrite(tmp_path / "out-1/embeddings/valid/vectors-00000.npy", lambda content: content[:-1] + b"!")
    if what == "of other chunks":
        world.run(None)  # with the same rows, in other places
        shutil.rmtree(tmp_path / "out-1" / "chunks")
        shutil.copytree(tmp_path / "out-2" / "chunks", tmp_path / "out-1" / "chunks")
    if what == "parts are there":
        (world.parts.folder / "embeddings" / "another").mkdir(parents=True)

    def restore(folder: Path) -> bool:
        shutil.copytree(tmp_path / "out-1", folder / "data", copy_function=os.link)
        return what != "none"

    grown, num_embedded = world.run(world.parts, restore=restore)
    if what == "whole":
        assert num_embedded == chunks_of(world, "aaa.txt") > 5
        assert f"took over {total:,} vectors" in caplog.text
    else:
        assert num_embedded > total
    assert grown == world.run(None)[0]
    assert not list(world.parts.folder.glob("*/*.partial"))


def part_names(parts: Parts) -> set[str]:
    return {path.parent.name for path in parts.folder.glob("*/*/artifact.json")}


def test_what_was_used_longest_ago_is_deleted_first(world: World) -> None:
    world.run(world.parts)
    first = part_names(world.parts)
    for part in world.parts.folder.glob("*/*"):
        os.utime(part, (1, 1))
    world.run(world.parts, chunk_size=8)  # uses none of them
    size = sum(file.stat().st_size for part in world.parts.folder.glob("*/*") for file in part.iterdir())
    both = part_names(world.parts)
    world.run(Parts(world.parts.folder, size - 1), chunk_size=8)
    assert len(both - part_names(world.parts)) == 1 and both - part_names(world.parts) <= first
    world.run(Parts(world.parts.folder, 0), chunk_size=8)
    assert not part_names(world.parts)
    assert [path.name for path in world.parts.folder.rglob("*")] != []
    assert world.run(world.parts)[0] == world.run(None)[0]


def test_nothing_is_deleted_while_another_run_uses_the_folder(world: World) -> None:
    world.run(world.parts)
    before = part_names(world.parts)
    unfinished = world.parts.folder / "embeddings" / "a.partial"
    unfinished.mkdir()
    with kept.open_parts(world.parts, "embeddings", world.folder / "out"):
        assert not unfinished.exists(), "no other run uses it: a kill left it"
        unfinished.mkdir()
        with kept.open_parts(Parts(world.parts.folder, 0), "embeddings", world.folder / "out"):
            pass
        assert unfinished.exists() and part_names(world.parts) == before
    with kept.open_parts(Parts(world.parts.folder, 0), "embeddings", world.folder / "out"):
        assert not unfinished.exists()
    assert not part_names(world.parts)


# ---- where blocks end --------------------------------------------------------------------------------------


def documents_of(sizes: list[int], seed: int = 0) -> list[Document]:
    generator = np.random.default_rng(seed)
    splits = generator.choice(SPLITS, len(sizes), p=[0.8, 0.1, 0.1])
    texts = ["".join(map(chr, generator.integers(97, 123, size))) for size in sizes]
    return [Document(n, f"{n}", None, str(splits[n]), text) for n, text in enumerate(texts)]


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 400), max_size=120), seed=st.integers(0, 99))
def test_blocks_hold_each_document_once_and_in_order(sizes: list[int], seed: int) -> None:
    documents = documents_of(sizes, seed)
    found = list(blocks(documents, 200))
    for split in SPLITS:
        expected = [document for document in documents if document.split == split]
        assert [document for block in found for document in block if document.split == split] == expected
    assert all(len({document.split for document in block}) == 1 for block in found)
    assert all(len(block) == 1 or sum(len(document.text) for document in block) <= 400 for block in found)


def test_an_insertion_changes_the_blocks_nearby_alone() -> None:
    generator = np.random.default_rng(1)
    documents = documents_of(generator.integers(100, 2000, 600).tolist())
    before = {tuple(block) for block in blocks(documents, 8000)}
    sizes = [sum(len(document.text) for document in block) for block in before]
    assert 0.7 * 8000 < np.mean(sizes) < 1.3 * 8000
    changed = []
    for place in range(0, 600, 20):
        grown = documents.copy()
        grown.insert(place, Document(-1, "new", None, "train", f"a new document {place} " * 50))
        changed.append(len({tuple(block) for block in blocks(grown, 8000)} - before))
    assert np.mean(changed) < 2.5 and max(changed) < 8


def test_blocks_of_a_larger_corpus_are_larger_until_they_are_large_enough() -> None:
    assert [block_bytes(size) for size in (0, 1 << 26, (1 << 26) + 1, 1 << 30, 1 << 36, 1 << 40)] == [
        1 << 16,
        1 << 16,
        1 << 17,
        1 << 20,
        1 << 26,
        1 << 26,
    ]
