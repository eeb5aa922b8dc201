"""Packed sequences hold what a slow reading of the artifacts gives: rows, neighbors, document bounds."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from woven import PAD, chunk_rows, write_chunks, write_neighbors

from retro_model.core.artifacts import Artifact, ArtifactWriter, file_digest
from retro_model.core.errors import ConfigError, MismatchError
from retro_model.core.rows import NO_ROW, retrieved_tokens
from retro_model.training.sequences import PackedSequences

CHUNK = 4
DOCUMENTS = [
    [11, 12, 13, 14, 15, 16],
    [21],
    [31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41],
    [51, 52, 53],
    [61, 62, 63, 64, 65, 66, 67, 68, 69],
]
lengths = st.lists(st.integers(1, 20), min_size=1, max_size=12)
many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def fresh(folder: Path) -> Path:
    """A folder that was not there, for each of hypothesis' examples."""
    return folder / str(len(list(folder.iterdir())))


def documents_of(lengths: list[int]) -> list[list[int]]:
    return [[3 + (7 * number + i) % 200 for i in range(length)] for number, length in enumerate(lengths)]


def made_neighbors(folder: Path, chunks: Artifact, database: Artifact, stored: int = 5) -> Artifact:
    ids = np.random.default_rng(0).integers(-1, len(database["tokens"]), (len(chunks["tokens"]), stored))
    return write_neighbors(folder, ids, chunks, database)


@pytest.fixture
def chunks(tmp_path: Path) -> Artifact:
    return write_chunks(tmp_path / "chunks", DOCUMENTS, chunk_size=CHUNK)


@pytest.fixture
def neighbors(tmp_path: Path, chunks: Artifact) -> Artifact:
    return made_neighbors(tmp_path / "neighbors", chunks, chunks)


@pytest.fixture
def packed(chunks: Artifact, neighbors: Artifact) -> PackedSequences:
    return PackedSequences(chunks, 3 * CHUNK, neighbors, chunks, knn=2)


# ---- what is shown of a neighbor -------------------------------------------------------------------


@many
@given(lengths, st.integers(1, 7), st.integers(0, 2**16))
def test_retrieved_tokens_are_a_row_and_what_follows_it_in_its_document(
    tmp_path: Path, lengths: list[int], rows_per_shard: int, seed: int
) -> None:
    documents = documents_of(lengths)
    database = write_chunks(fresh(tmp_path), documents, chunk_size=CHUNK, rows_per_shard=rows_per_shard)
    expected = []  # by row
    for document in documents:
        inputs = [row[:-1] for row in chunk_rows(document, CHUNK)]
        expected += [a + b for a, b in zip(inputs, [*inputs[1:], [PAD] * CHUNK], strict=True)]
    ids = np.random.default_rng(seed).integers(-1, len(expected), (2, 3, 4))
    found = retrieved_tokens(database, ids)
    assert found.shape == (2, 3, 4, 2 * CHUNK) and found.dtype == np.int64
    for place in np.ndindex(ids.shape):
        shown = [PAD] * 2 * CHUNK if ids[place] == NO_ROW else expected[ids[place]]
        assert found[place].tolist() == shown


def test_retrieved_tokens_refuse_what_is_no_row(chunks: Artifact) -> None:
    with pytest.raises(IndexError):
        retrieved_tokens(chunks, np.array([len(chunks["tokens"])]))
    with pytest.raises(AssertionError):
        retrieved_tokens(chunks, np.array([-2]))


# ---- which rows make a sequence --------------------------------------------------------------------


@many
@given(lengths, st.integers(1, 6), st.integers(0, 2**31), st.integers(0, 5))
def test_an_epoch_has_each_row_once_but_for_less_than_a_sequence(
    tmp_path: Path, lengths: list[int], rows_per_sequence: int, seed: int, epoch: int
) -> None:
    chunks = write_chunks(fresh(tmp_path), documents_of(lengths), chunk_size=CHUNK)
    packed = PackedSequences(chunks, rows_per_sequence * CHUNK)
    count = packed.sequences_per_epoch
    rows = packed.training_rows(seed, epoch * count, count)
    real = rows[rows != NO_ROW]
    assert rows.shape == (count, rows_per_sequence)
    assert len(np.unique(real)) == len(real) > len(chunks["tokens"]) - rows_per_sequence
    if len(chunks["tokens"]) >= rows_per_sequence:
        assert len(real) == rows.size
        assert np.all(np.diff(rows) % len(chunks["tokens"]) == 1 % len(chunks["tokens"]))
    else:
        assert rows.tolist() == packed.ordered_rows().tolist()


@many
@given(st.integers(0, 60), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_training_rows_do_not_depend_on_how_they_are_asked_for(tmp_path: Path, first: int, counts: list[int]) -> None:
    chunks = write_chunks(fresh(tmp_path), DOCUMENTS, chunk_size=CHUNK)
    whole = PackedSequences(chunks, 2 * CHUNK).training_rows(3, first, sum(counts))
    asked = PackedSequences(chunks, 2 * CHUNK)
    parts = []
    for count in counts:
        parts.append(asked.training_rows(3, first + sum(map(len, parts)), count))
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_epochs_and_seeds_differ_in_order_and_in_where_sequences_begin(chunks: Artifact) -> None:
    packed = PackedSequences(chunks, 3 * CHUNK)
    count = packed.sequences_per_epoch
    epochs = [packed.training_rows(0, number * count, count) for number in range(8)]
    assert len({epoch.tobytes() for epoch in epochs}) > 4
    assert len({int(epoch[0, 0]) % 3 for epoch in epochs}) > 1
    assert packed.training_rows(1, 0, 8 * count).tolist() != np.concatenate(epochs).tolist()


@many
@given(lengths, st.integers(1, 6))
def test_ordered_rows_have_each_row_once_in_order(tmp_path: Path, lengths: list[int], rows_per_sequence: int) -> None:
    chunks = write_chunks(fresh(tmp_path), documents_of(lengths), chunk_size=CHUNK)
    rows = PackedSequences(chunks, rows_per_sequence * CHUNK).ordered_rows().reshape(-1)
    count = len(chunks["tokens"])
    assert rows[:count].tolist() == list(range(count))
    assert set(rows[count:].tolist()) <= {NO_ROW} and len(rows) - count < rows_per_sequence


# ---- what is in a sequence -------------------------------------------------------------------------


def expected_batch(packed: PackedSequences, rows: npt.NDArray[np.int64]) -> tuple[list, list, list]:
    """Inputs, labels and bytes of each sequence, token by token."""
    tokens, sizes = packed.chunks["tokens"], packed.chunks["bytes"]
    nothing = [PAD] * (CHUNK + 1)
    inputs, labels, text_bytes = [], [], []
    for sequence in rows.tolist():
        shown = [nothing if row == NO_ROW else tokens[row].tolist() for row in sequence]
        inputs.append([token for row in shown for token in row[:-1]])
        labels.append([token for row in shown for token in row[1:]])
        text_bytes.append([0 if row == NO_ROW else int(sizes[row]) for row in sequence])
    return inputs, labels, text_bytes


def test_a_batch_is_what_its_rows_say(packed: PackedSequences) -> None:
    rows = np.concatenate([packed.training_rows(0, 0, 7), packed.ordered_rows()])
    batch = packed.batch(rows)
    inputs, labels, text_bytes = expected_batch(packed, rows)
    assert batch.seq.tolist() == inputs
    assert batch.labels.tolist() == labels
    assert batch.bytes.tolist() == text_bytes
    assert batch.num_labels == sum(token != PAD for sequence in labels for token in sequence)
    stored = packed.neighbors["ids"][:]
    missing = np.full(2, NO_ROW)
    ids = np.array([[missing if row == NO_ROW else stored[row, :2] for row in sequence] for sequence in rows])
    assert batch.retrieved is not None
    assert batch.retrieved.tolist() == retrieved_tokens(packed.chunks, ids).tolist()


def test_validation_covers_every_label_once(packed: PackedSequences) -> None:
    batch = packed.batch(packed.ordered_rows())
    assert batch.num_labels == sum(len(document) + 1 for document in DOCUMENTS)
    assert int(batch.bytes.sum()) == int(packed.chunks["bytes"][:].sum())


def test_documents_are_told_apart(packed: PackedSequences) -> None:
    # rows by document: 0 0, 1, 2 2 2, 3, 4 4 4
    rows = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 0, 1], [9, NO_ROW, NO_ROW], [NO_ROW] * 3])
    assert packed.batch(rows).documents.tolist() == [
        [0, 0, 1],
        [0, 0, 0],
        [0, 1, 1],
        [0, 1, 1],
        [0, 1, 1],
        [0, 0, 0],
    ]


def test_the_end_and_the_start_of_an_only_document_are_two(tmp_path: Path) -> None:
    chunks = write_chunks(tmp_path / "one", [list(range(3, 30))], chunk_size=CHUNK)
    packed = PackedSequences(chunks, 3 * CHUNK)
    last = len(chunks["tokens"]) - 1
    assert packed.batch(np.array([[last - 1, last, 0]])).documents.tolist() == [[0, 0, 1]]


def test_dropped_neighbors_are_missing_and_others_stay(packed: PackedSequences) -> None:
    rows = packed.training_rows(0, 0, 3)
    dropped = packed.batch(rows, without=np.array([False, True, False])).retrieved
    kept = packed.batch(rows).retrieved
    assert dropped is not None and kept is not None
    assert (dropped[1] == PAD).all() and (kept[1] != PAD).any()
    assert dropped[0].equal(kept[0]) and dropped[2].equal(kept[2])


def test_without_retrieval_nothing_is_retrieved(packed: PackedSequences, chunks: Artifact) -> None:
    rows = packed.ordered_rows()
    assert packed.batch(rows, neighbors="none").retrieved is None
    assert PackedSequences(chunks, CHUNK).batch(rows).retrieved is None


def test_shuffled_neighbors_are_those_of_another_row_each_once(packed: PackedSequences) -> None:
    rows = packed.ordered_rows()
    stored = packed.neighbors["ids"][:][:, :2]
    shuffled = packed.neighbor_ids(rows, shuffled=True)[rows != NO_ROW]
    assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, stored.tolist()))
    source = (np.arange(len(stored)) + len(stored) // 2) % len(stored)
    assert shuffled.tolist() == stored[source].tolist()
    documents = packed.chunks["documents"][:]
    assert (documents[source] != documents).all()


# ---- what does not fit together --------------------------------------------------------------------


def test_more_neighbors_than_stored_are_refused(chunks: Artifact, neighbors: Artifact) -> None:
    for knn in (0, 6):
        with pytest.raises(ConfigError, match=rf"knn: found {knn}, expected 1 to 5"):
            PackedSequences(chunks, 2 * CHUNK, neighbors, chunks, knn=knn)


@pytest.mark.parametrize("seq_len", [0, CHUNK - 1, CHUNK + 1])
def test_a_sequence_is_whole_chunks(chunks: Artifact, seq_len: int) -> None:
    with pytest.raises(ConfigError, match=f"seq_len: found {seq_len}, expected a multiple of chunk_size 4"):
        PackedSequences(chunks, seq_len)


def test_neighbors_of_other_chunks_or_in_another_database_are_refused(
    tmp_path: Path, chunks: Artifact, neighbors: Artifact
) -> None:
    other = write_chunks(tmp_path / "other", DOCUMENTS[1:], chunk_size=CHUNK)
    with pytest.raises(MismatchError, match="neighbors: made for chunks"):
        PackedSequences(other, 2 * CHUNK, neighbors, chunks, knn=2)
    with pytest.raises(MismatchError, match="neighbors: made for database"):
        PackedSequences(chunks, 2 * CHUNK, neighbors, other, knn=2)


def test_a_database_of_another_tokenizer_is_refused(tmp_path: Path, chunks: Artifact) -> None:
    other = write_chunks(tmp_path / "other", DOCUMENTS, chunk_size=CHUNK, tokenizer="another")
    with pytest.raises(MismatchError, match="made for tokenizer another"):
        PackedSequences(chunks, CHUNK, made_neighbors(tmp_path / "n", chunks, other), other, knn=1)


def test_no_chunks_are_refused(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "empty", "chunks") as writer:
        writer.append(tokens=np.empty((0, CHUNK + 1), np.uint16))
        writer.facts.update(chunk_size=CHUNK, pad_id=PAD)
    with pytest.raises(ConfigError, match="no chunks, expected one at least"):
        PackedSequences(Artifact.open(tmp_path / "empty", "chunks"), CHUNK)


def test_reading_changes_no_byte(packed: PackedSequences) -> None:
    folders = [packed.chunks.folder, packed.neighbors.folder]
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    before = [file_digest(file) for file in files]
    for file in files:
        file.chmod(0o444)
    packed.batch(packed.training_rows(0, 0, 20))
    packed.batch(packed.ordered_rows(), neighbors="shuffled")
    assert [file_digest(file) for file in files] == before
