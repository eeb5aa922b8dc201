"""Artifacts are whole or absent, give back what was written, and refuse everything else."""

import errno
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import ROOT

from retro_model.core.artifacts import (
    DESCRIPTION,
    Artifact,
    ArtifactWriter,
    file_digest,
    rows_per_part,
    whole_folder,
    write_description,
    write_json,
)
from retro_model.core.errors import DamagedArtifactError, MismatchError, MissingArtifactError


def write(folder: Path, rows: int = 25, rows_per_shard: int = 10, portion: int = 7) -> np.ndarray:
    tokens = np.arange(rows * 3, dtype=np.uint16).reshape(rows, 3)
    with ArtifactWriter(folder, "chunks", rows_per_shard) as writer:
        for start in range(0, rows, portion):
            part = tokens[start : start + portion]
            writer.append(tokens=part, documents=part[:, 0].astype(np.int32))
        (folder / "note.txt").write_text("hello")
        writer.add_file("note.txt")
        writer.facts["chunk_size"] = 2
    return tokens


def test_rows_come_back_whatever_the_shards(tmp_path: Path) -> None:
    tokens = write(tmp_path / "a")
    artifact = Artifact.open(tmp_path / "a", "chunks")
    assert artifact.rows == len(artifact["tokens"]) == 25
    assert artifact.facts["chunk_size"] == 2
    np.testing.assert_array_equal(artifact["tokens"][:], tokens)
    np.testing.assert_array_equal(artifact["documents"][:], tokens[:, 0])
    assert [len(shard) for shard in artifact["tokens"].shards()] == [10, 10, 5]


@pytest.mark.parametrize("rows", [1, 9, 10, 1234])
@pytest.mark.parametrize("column", [np.zeros(1234, np.int64), np.arange(2468, dtype=np.float16).reshape(2, -1).T])
def test_a_shard_that_was_written_in_pieces_is_what_numpy_would_save(
    column: np.ndarray, rows: int, tmp_path: Path
) -> None:
    with ArtifactWriter(tmp_path / "a", "embeddings") as writer:
        for row in range(0, rows, 7):
            writer.append(vectors=column[row : min(row + 7, rows)])
    np.save(tmp_path / "whole.npy", column[:rows].copy(order="C"))
    assert (tmp_path / "a" / "vectors-00000.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_a_writer_holds_no_shard_in_memory(tmp_path: Path) -> None:
    rows = np.zeros((1000, 256), np.float32)
    with ArtifactWriter(tmp_path / "a", "embeddings") as writer:
        writer.append(vectors=rows)
        tracemalloc.start()
        for _ in range(100):  # 102 MB in one shard
            writer.append(vectors=rows)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert Artifact.open(tmp_path / "a", "embeddings").rows == 101_000
    assert peak < 1 << 20


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 40), size=st.integers(1, 15), portion=st.integers(1, 40), data=st.data())
def test_any_gathering_equals_numpy(
    tmp_path_factory: pytest.TempPathFactory, rows: int, size: int, portion: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("gather") / "a"
    tokens = write(folder, rows, size, portion)
    array = Artifact.open(folder, "chunks")["tokens"]
    ids = np.array(data.draw(st.lists(st.integers(0, rows - 1), max_size=12)), dtype=np.int64)
    np.testing.assert_array_equal(array[ids], tokens[ids])
    if len(ids):
        np.testing.assert_array_equal(array[ids.reshape(1, -1)], tokens[ids.reshape(1, -1)])
        np.testing.assert_array_equal(array[int(ids[0])], tokens[ids[0]])
    start, stop = data.draw(st.integers(0, rows + 2)), data.draw(st.integers(0, rows + 2))
    np.testing.assert_array_equal(array[start:stop], tokens[start:stop])


def test_minus_one_is_never_the_last_row(tmp_path: Path) -> None:
    write(tmp_path / "a")
    array = Artifact.open(tmp_path / "a", "chunks")["tokens"]
    for wrong in (-1, 25, np.array([0, -1]), np.array([[3, 25]])):
        with pytest.raises(IndexError):
            array[wrong]


def test_maps_are_read_only_and_leave_the_bytes_alone(tmp_path: Path) -> None:
    write(tmp_path / "a")
    before = {path: (file_digest(path), path.stat().st_mtime_ns) for path in (tmp_path / "a").iterdir()}
    for path in before:
        path.chmod(0o444)
    array = Artifact.open(tmp_path / "a", "chunks")["tokens"]
    with pytest.raises(ValueError, match="read-only"):
        array.shards()[0][0, 0] = 9
    array[np.array([3])][0, 0] = 9  # what was gathered is a copy
    assert {path: (file_digest(path), path.stat().st_mtime_ns) for path in before} == before


def test_a_pickled_array_opens_its_own_maps(tmp_path: Path) -> None:
    tokens = write(tmp_path / "a")
    array = Artifact.open(tmp_path / "a", "chunks")["tokens"]
    array.shards()
    content = pickle.dumps(array)  # as a loader's worker process receives it; never a file
    assert len(content) < 2000
    np.testing.assert_array_equal(pickle.loads(content)[:], tokens)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name, portion in (("a", 7), ("b", 25)):
        write(tmp_path / name, portion=portion)
    first, second = Artifact.open(tmp_path / "a", "chunks"), Artifact.open(tmp_path / "b", "chunks")
    assert first.fingerprint == second.fingerprint
    write(tmp_path / "c", rows=24)
    assert Artifact.open(tmp_path / "c", "chunks").fingerprint != first.fingerprint


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def extend(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"\0" * 64)


@pytest.mark.parametrize("name", ["tokens-00001.npy", "documents-00002.npy", "note.txt"])
@pytest.mark.parametrize("fault", [flip, truncate, extend, Path.unlink])
def test_every_fault_in_a_file_is_refused(tmp_path: Path, name: str, fault: object) -> None:
    write(tmp_path / "a")
    fault(tmp_path / "a" / name)  # type: ignore[operator]
    with pytest.raises(DamagedArtifactError, match=name):
        Artifact.open(tmp_path / "a", "chunks")


@pytest.mark.parametrize("size", [0, 3, 60, 140])
def test_a_torn_shard_is_refused_even_where_bytes_were_not_verified(tmp_path: Path, size: int) -> None:
    write(tmp_path / "a")
    os.truncate(tmp_path / "a" / "tokens-00000.npy", size)
    array = Artifact.open(tmp_path / "a", "chunks", verify=False)["tokens"]
    with pytest.raises(DamagedArtifactError, match="tokens-00000.npy"):
        array[0]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_what_the_system_refuses_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(path: Path, **options: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    write(tmp_path / "a")
    array = Artifact.open(tmp_path / "a", "chunks")["tokens"]
    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        array[:]


def test_a_torn_description_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    whole = (tmp_path / "a" / DESCRIPTION).read_bytes()
    for length in range(len(whole) - 2):
        (tmp_path / "a" / DESCRIPTION).write_bytes(whole[:length])
        with pytest.raises(DamagedArtifactError):
            Artifact.open(tmp_path / "a", "chunks", verify=False)


def test_what_is_absent_or_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifactError, match="run `dvc repro` .stage chunk."):
        Artifact.open(tmp_path / "nothing", "chunks")
    write(tmp_path / "a")
    with pytest.raises(MismatchError, match="expected retro/embeddings, found retro/chunks"):
        Artifact.open(tmp_path / "a", "embeddings")
    description = json.loads((tmp_path / "a" / DESCRIPTION).read_text())
    write_json(tmp_path / "a" / DESCRIPTION, {**description, "version": 99})
    with pytest.raises(MismatchError, match="version 99"):
        Artifact.open(tmp_path / "a", "chunks")


def test_facts_that_do_not_match_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a")
    artifact = Artifact.open(tmp_path / "a", "chunks")
    assert artifact.require(chunk_size=2) is artifact
    with pytest.raises(MismatchError, match="made for chunk_size 2, expected 64"):
        artifact.require(chunk_size=64)
    with pytest.raises(MismatchError, match="made for tokenizer None"):
        artifact.require(tokenizer="abc")


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), whole_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []

    with whole_folder(tmp_path / "out") as folder:
        (folder / "first").write_text("x")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out") as folder:
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "first"]

    (tmp_path / "out.partial").mkdir()  # as a killed process leaves it
    (tmp_path / "out.partial" / "stale").write_text("x")
    with whole_folder(tmp_path / "out") as folder:
        (folder / "second").write_text("x")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "second"]


def test_a_writer_that_failed_leaves_no_description(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), ArtifactWriter(tmp_path / "a", "chunks") as writer:
        writer.append(tokens=np.zeros((3, 2), dtype=np.uint16))
        raise RuntimeError("stop")
    with pytest.raises(MissingArtifactError):
        Artifact.open(tmp_path / "a", "chunks")


def test_json_never_holds_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "metrics.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_any_file_is_an_error_and_never_an_array(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("changed") / "a"
    write(folder, rows_per_shard=data.draw(st.integers(3, 30)))
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    flipped = content[place] ^ (1 << data.draw(st.integers(0, 7)))
    changed = data.draw(
        st.sampled_from(
            [
                content[:place],
                content + content[:1],
                content[:place] + bytes([flipped]) + content[place + 1 :],
            ]
        )
    )
    path.write_bytes(changed)
    with pytest.raises((DamagedArtifactError, MismatchError)):
        Artifact.open(folder, "chunks")


def parts_of(folder: Path, tokens: np.ndarray, size: int) -> list[Artifact]:
    parts = []
    for start in range(0, max(len(tokens), 1), size):
        with ArtifactWriter(folder / f"part-{start}", "chunks", size) as writer:
            writer.append(tokens=tokens[start : start + size], documents=tokens[start : start + size, 0])
        parts.append(Artifact.open(folder / f"part-{start}", "chunks"))
    return parts


@pytest.mark.parametrize("rows", [0, 1, 10, 25, 30])
@pytest.mark.parametrize("linked", [True, False])
def test_adopted_parts_are_the_bytes_of_appended_rows(
    rows: int, linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.arange(rows * 3, dtype=np.uint16).reshape(rows, 3)
    if not linked:

        def refuse(source: object, target: object) -> None:
            raise OSError(errno.EXDEV, "another file system")

        monkeypatch.setattr(os, "link", refuse)
    with ArtifactWriter(tmp_path / "appended", "chunks", 10) as writer:
        writer.append(tokens=tokens, documents=tokens[:, 0])
    with ArtifactWriter(tmp_path / "adopted", "chunks", 10) as writer:
        for part in parts_of(tmp_path, tokens, 10):
            writer.adopt(part)
            assert writer.rows <= rows
    files = {path.name: path.read_bytes() for path in (tmp_path / "adopted").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "appended").iterdir()}
    np.testing.assert_array_equal(Artifact.open(tmp_path / "adopted", "chunks")["tokens"][:], tokens)
    shard = tmp_path / "adopted" / "tokens-00000.npy"
    assert not rows or shard.stat().st_nlink == (2 if linked else 1)


def test_parts_of_any_size_become_shards_with_numbers_of_their_own(tmp_path: Path) -> None:
    parts = []
    for name, rows in (("a", 3), ("b", 0), ("c", 5), ("d", 1)):
        with ArtifactWriter(tmp_path / name, "chunks") as writer:
            writer.append(tokens=np.full((rows, 2), 7, np.uint16), documents=np.arange(rows, dtype=np.int32))
            (tmp_path / name / "table.jsonl").write_text(name)
            writer.add_file("table.jsonl")
        parts.append(Artifact.open(tmp_path / name, "chunks"))
    for offsets, expected in (((0, 9, 10, 20), np.int32), ((5, 6, 1 << 40, 7), np.int64)):
        with ArtifactWriter(tmp_path / f"of {offsets}", "chunks") as writer:
            for part, offset in zip(parts, offsets, strict=True):
                writer.adopt(part, ["documents"], files=["table.jsonl"], offsets={"documents": offset})
        whole = Artifact.open(tmp_path / f"of {offsets}", "chunks")
        numbers = np.concatenate([np.arange(part.rows) + offset for part, offset in zip(parts, offsets, strict=True)])
        assert whole.shards == [3, 5, 1] and list(whole.arrays) == ["documents"] and whole.rows == 9
        documents = whole["documents"]
        assert documents.dtype == documents[:].dtype == documents[np.array([4])].dtype == expected
        assert documents[:].tolist() == numbers.tolist() and documents[2:7].tolist() == numbers[2:7].tolist()
        shuffled = np.array([[8, 0, 3], [3, 7, 2]])
        assert documents[shuffled].tolist() == numbers[shuffled].tolist() and documents[5] == numbers[5]
        assert [whole.folder.joinpath(f"table-{n:05d}.jsonl").read_text() for n in range(3)] == ["a", "c", "d"]


def test_a_part_that_does_not_fit_is_a_mistake_in_the_program(tmp_path: Path) -> None:
    (short,) = parts_of(tmp_path, np.arange(15, dtype=np.uint16).reshape(5, 3), 5)
    with ArtifactWriter(tmp_path / "a", "chunks", 5) as writer:
        writer.append(tokens=np.zeros((1, 3), np.uint16), documents=np.zeros(1, np.uint16))
        with pytest.raises(AssertionError):  # within a shard
            writer.adopt(short)
    write(tmp_path / "two shards")
    with ArtifactWriter(tmp_path / "b", "chunks") as writer, pytest.raises(AssertionError):
        writer.adopt(Artifact.open(tmp_path / "two shards", "chunks"))


def test_version_2_is_read(tmp_path: Path) -> None:
    tokens = write(tmp_path / "a")
    description = json.loads((tmp_path / "a" / DESCRIPTION).read_text())
    assert (description.pop("version"), description.pop("shards"), description.pop("digest")[:0]) == (
        3,
        [10, 10, 5],
        "",
    )
    write_description(tmp_path / "a", {**description, "version": 2, "rows_per_shard": 10})
    artifact = Artifact.open(tmp_path / "a", "chunks")
    assert artifact.shards == [10, 10, 5]
    np.testing.assert_array_equal(artifact["tokens"][:], tokens)


def test_a_disk_that_fails_while_linking_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)
    (part,) = parts_of(tmp_path, np.zeros((3, 3), np.uint16), 5)
    writer = ArtifactWriter(tmp_path / "a", "chunks", 5)
    with pytest.raises(OSError, match="No space left"):
        writer.adopt(part)


@pytest.mark.parametrize("rows", [0, 1, 1 << 12, 1 << 24, (1 << 24) + 1, 28_000_000_000])
def test_parts_are_neither_tiny_nor_too_many(rows: int) -> None:
    size = rows_per_part(rows)
    assert size >= 1 << 12 and rows <= size * (1 << 12) and (size == 1 << 12 or rows > size * (1 << 11))


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from retro_model.core.artifacts import ArtifactWriter
from retro_model.search.distances import import_faiss, write_index

def shard():
    with ArtifactWriter(Path("artifact"), "chunks") as writer:
        writer.append(tokens=np.ones((300, 4), np.uint16))

def index():
    write_index(import_faiss().IndexFlatL2(300), Path("small.index"))
    made = import_faiss().IndexFlatL2(300)
    made.add(np.ones((2, 300), np.float32))
    write_index(made, Path("full.index"))

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    {"shard": shard, "index": index}[sys.argv[1]]()
except OSError as error:
    print("told", error.errno)
"""


@pytest.mark.parametrize("limit", [1, 130, 2000])
@pytest.mark.parametrize("what", ["shard", "index"])
def test_a_disk_that_is_full_at_the_last_buffer_is_told(what: str, limit: int, tmp_path: Path) -> None:
    """C's files keep what is written until they are closed, and few programs look at how that went."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, what, str(limit)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"told {errno.EFBIG}\n"
    assert not (tmp_path / "artifact" / "artifact.json").exists()
