"""Artifacts are whole or absent, give back what was written, and refuse everything else."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retro_model.artifacts import DESCRIPTION, Artifact, ArtifactWriter, file_digest, whole_folder, write_json
from retro_model.errors import DamagedArtifactError, MismatchError, MissingArtifactError


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


def test_a_torn_shard_is_refused_even_where_bytes_were_not_verified(tmp_path: Path) -> None:
    write(tmp_path / "a")
    os.truncate(tmp_path / "a" / "tokens-00000.npy", 140)
    array = Artifact.open(tmp_path / "a", "chunks", verify=False)["tokens"]
    with pytest.raises(DamagedArtifactError, match="tokens-00000.npy"):
        array[0]


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
