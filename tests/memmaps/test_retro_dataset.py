"""RETRODataset gives one document a sequence and no neighbor more than there is, and touches no file."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import retro_model
from retro_model import RETRO, RETRODataset
from retro_model.core.errors import ConfigError, MismatchError, MissingArtifactError

M, K, L = 4, 2, 3
PAD, EOS = 0, 102


def rows_of(documents: list[list[int]], chunk_size: int = M) -> np.ndarray[Any, Any]:
    """The chunk rows of token lists, as `text_folder_to_chunks_` describes them: pad in the last column."""
    rows = []
    for tokens in documents:
        for start in range(0, len(tokens), chunk_size):
            row = tokens[start : start + chunk_size]
            following = tokens[start + chunk_size] if start + chunk_size < len(tokens) else PAD
            rows.append([*row, *[PAD] * (chunk_size - len(row)), following])
    return np.array(rows, np.int32)


def dataset(folder: Path, rows: Any, neighbors: Any, starts: Any, **changes: Any) -> RETRODataset:
    np.asarray(rows, np.int32).tofile(folder / "chunks.dat")
    np.asarray(neighbors, np.int32).tofile(folder / "knn.dat")
    np.asarray(starts, np.int32).tofile(folder / "seq.dat")
    arguments = {
        "num_chunks": len(rows),
        "chunk_size": M,
        "seq_len": L * M,
        "num_sequences": len(starts),
        "num_neighbors": K,
        "chunk_memmap_path": folder / "chunks.dat",
        "chunk_nn_memmap_path": folder / "knn.dat",
        "seq_memmap_path": folder / "seq.dat",
    }
    return RETRODataset(**{**arguments, **changes})


def slow_item(documents: list[list[int]], neighbors: Any, row: int, continuations: bool) -> tuple[Any, Any]:
    """From the documents' own tokens, one at a time."""
    places = [(number, start) for number, tokens in enumerate(documents) for start in range(0, len(tokens), M)]
    number, start = places[row]
    tokens = documents[number][start : start + L * M + 1]
    seq = tokens + [PAD] * (L * M + 1 - len(tokens))
    width = 2 * M if continuations else M
    retrieved = []
    for chunk in range(L):
        inside = start + chunk * M < len(documents[number])
        for neighbor in neighbors[row + chunk] if inside else [-1] * K:
            found: list[int] = []
            if neighbor != -1:
                other, place = places[neighbor]
                found = documents[other][place : place + width]
            retrieved.append(found + [PAD] * (width - len(found)))
    return seq, np.array(retrieved).reshape(L, K, width).tolist()


# A document's tokens, with the end token behind them unless they fill their last chunk.
one_document = st.lists(st.integers(1, 90), min_size=1, max_size=20).map(
    lambda tokens: tokens if len(tokens) % M == 0 else [*tokens, EOS]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(one_document, min_size=1, max_size=5), seed=st.integers(0, 99), continuations=st.booleans())
def test_items_are_those_of_a_slow_reference(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], seed: int, continuations: bool
) -> None:
    rows = rows_of(documents)
    neighbors = np.random.default_rng(seed).integers(-1, len(rows), (len(rows), K))
    folder = tmp_path_factory.mktemp("data")
    data = dataset(folder, rows, neighbors, range(len(rows)), add_continuations=continuations)
    for row, (seq, retrieved) in enumerate(data):
        assert seq.dtype == retrieved.dtype == torch.int64
        assert (seq.tolist(), retrieved.tolist()) == slow_item(documents, neighbors, row, continuations)


def two_documents(folder: Path, **changes: Any) -> RETRODataset:
    """Rows 0 to 2 are of the first document, which fills them; 3 and 4 of the second."""
    rows = rows_of([list(range(1, 13)), [*range(21, 27), EOS]])
    neighbors = [[3, -1], [4, 2], [-1, -1], [0, 1], [2, 4]]
    return dataset(folder, rows, neighbors, [0, 1, 3, 4], **changes)


def test_an_item_by_hand(tmp_path: Path) -> None:
    seq, retrieved = two_documents(tmp_path)[1]
    assert seq.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 0, 0, 0, 0, 0]
    assert retrieved.shape == (L, K, 2 * M)
    assert retrieved[0].tolist() == [[25, 26, EOS, 0, 0, 0, 0, 0], [9, 10, 11, 12, 0, 0, 0, 0]]
    assert not retrieved[1:].any()


def test_trap_3_a_missing_neighbor_is_padding_and_not_the_last_chunk(tmp_path: Path) -> None:
    _, retrieved = two_documents(tmp_path)[0]
    assert retrieved[0, 0].tolist() == [21, 22, 23, 24, 25, 26, EOS, 0]
    assert not retrieved[0, 1].any() and not retrieved[2].any()


def test_trap_3_a_continuation_does_not_run_into_the_next_document(tmp_path: Path) -> None:
    _, retrieved = two_documents(tmp_path)[3]
    assert retrieved[0, 0].tolist() == [9, 10, 11, 12, 0, 0, 0, 0]  # a full last chunk of its document
    assert retrieved[0, 1].tolist() == [25, 26, EOS, 0, 0, 0, 0, 0]  # the last chunk of all


def test_chunks_of_others_that_hold_what_follows_an_end(tmp_path: Path) -> None:
    """The end token in the last column, a chunk of nothing else behind it, and text behind an end token."""
    rows = [[1, 2, 3, 4, EOS], [EOS, 0, 0, 0, 0], [5, EOS, 6, 7, 8], [8, 9, 10, 11, 12], [12, 13, 14, 15, 16]]
    data = dataset(tmp_path, rows, [[0, 2], [2, 3], [4, 3], [2, 2], [0, 0]], [0, 2, 3])
    seq, retrieved = data[0]
    assert seq.tolist() == [1, 2, 3, 4, EOS] + [0] * 8
    assert retrieved[0].tolist() == [[1, 2, 3, 4, 0, 0, 0, 0], [5, EOS, 0, 0, 0, 0, 0, 0]]
    assert not retrieved[1:].any()
    seq, retrieved = data[1]
    assert seq.tolist() == [5, EOS] + [0] * 11
    assert retrieved[0].tolist() == [[12, 13, 14, 15, 0, 0, 0, 0], [8, 9, 10, 11, 12, 13, 14, 15]]
    assert data[2][0].tolist() == [8, 9, 10, 11, 12, 13, 14, 15, 16, 0, 0, 0, 0]  # the rows end


def test_other_special_ids(tmp_path: Path) -> None:
    rows = [[1, 2, 7, 9, 9], [3, 4, 5, 6, 102], [102, 0, 7, 9, 9]]
    data = dataset(tmp_path, rows, [[1, -1], [2, 0], [1, 1]], [0, 1], eos_id=7, pad_id=9)
    assert data[0][0].tolist() == [1, 2, 7] + [9] * 10
    assert data[0][1][0].tolist() == [[3, 4, 5, 6, 102, 0, 7, 9], [9] * 8]
    assert data[1][0].tolist() == [3, 4, 5, 6, 102, 0, 7] + [9] * 6


def test_indices_are_those_of_a_list(tmp_path: Path) -> None:
    data = two_documents(tmp_path)
    assert len(data) == 4 and len(list(data)) == 4
    for index in (-1, np.int64(3), torch.tensor(3)):
        assert torch.equal(data[index][0], data[3][0])
    assert torch.equal(data[-4][0], data[0][0])
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"sequence {index} of 4"):
            data[index]
    with pytest.raises(TypeError):
        data["1"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_batches_items_also_in_workers(tmp_path: Path, num_workers: int) -> None:
    data = two_documents(tmp_path)
    loader = DataLoader(data, batch_size=2, num_workers=num_workers)
    seqs, retrieved = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert torch.equal(seqs, torch.stack([seq for seq, _ in data]))
    assert torch.equal(retrieved, torch.stack([tokens for _, tokens in data]))


def test_a_pickle_holds_no_data_and_opens_its_files_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {"chunk_memmap_path": "./chunks.dat", "chunk_nn_memmap_path": "./knn.dat", "seq_memmap_path": "./seq.dat"}
    rows = rows_of([list(range(1, 90))] * 50)
    data = dataset(tmp_path, rows, np.zeros((len(rows), K)), range(len(rows)), **paths)
    expected = data[1][0]
    content = pickle.dumps(data)
    assert len(content) < 2000 < rows.nbytes
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(pickle.loads(content)[1][0], expected)


def test_trap_4_files_stay_as_they_are_and_need_not_be_writable(tmp_path: Path) -> None:
    two_documents(tmp_path)
    files = sorted(tmp_path.iterdir())
    before = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    for file in files:
        file.chmod(0o444)
    arguments = {"num_chunks": 5, "num_sequences": 4}
    data = RETRODataset(
        **arguments,
        chunk_size=M,
        seq_len=L * M,
        num_neighbors=K,
        chunk_memmap_path=str(tmp_path / "chunks.dat"),
        chunk_nn_memmap_path=str(tmp_path / "knn.dat"),
        seq_memmap_path=str(tmp_path / "seq.dat"),
    )
    for seq, retrieved in data:
        seq += 1
        retrieved += 1
    assert not any(array.flags.writeable for array in data._maps)
    assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] == before


def test_trap_4_longer_chunk_and_sequence_files_are_cut_to_the_counts(tmp_path: Path) -> None:
    two_documents(tmp_path)
    expected = [seq.tolist() for seq, _ in two_documents(tmp_path)]
    for name in ("chunks.dat", "seq.dat"):
        with (tmp_path / name).open("ab") as stream:
            stream.write(np.full(100, 7, np.int32).tobytes())
    paths = {"chunk_memmap_path": tmp_path / "chunks.dat", "seq_memmap_path": tmp_path / "seq.dat"}
    data = RETRODataset(
        num_chunks=5,
        chunk_size=M,
        seq_len=L * M,
        num_sequences=4,
        num_neighbors=K,
        chunk_nn_memmap_path=tmp_path / "knn.dat",
        **paths,
    )
    assert [seq.tolist() for seq, _ in data] == expected


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_chunks": 6}, MismatchError, r"chunks.dat: found 5 rows of 5 int32 .* expected 6 or more"),
        ({"num_sequences": 9}, MismatchError, r"seq.dat: found 4 rows of 1 int32 \(16 bytes\), expected 9 or more"),
        ({"num_neighbors": 3}, MismatchError, r"knn.dat: found 3.333333333 rows of 3 int32 .* expected 5 \(60 bytes\)"),
        ({"num_neighbors": 1}, MismatchError, r"knn.dat: found 10 rows of 1 int32 .* expected 5 \(20 bytes\)"),
        ({"chunk_memmap_path": "absent.dat"}, MissingArtifactError, r"absent.dat: no such file"),
        ({"num_chunks": 4, "num_neighbors": 2}, MismatchError, r"knn.dat: found 5 rows"),
        ({"seq_len": 10}, ConfigError, r"seq_len: found 10, expected a multiple of chunk_size 4"),
        ({"seq_len": 0}, ConfigError, r"seq_len: found 0"),
        ({"num_sequences": 0}, ConfigError, r"num_sequences: found 0"),
        ({"num_neighbors": 1.0}, ConfigError, r"num_neighbors: found 1.0"),
    ],
)
def test_what_does_not_fit_is_named_with_both_numbers(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        two_documents(tmp_path, **changes)


def test_starts_and_neighbors_that_are_no_chunks(tmp_path: Path) -> None:
    rows = rows_of([list(range(1, 13))])
    with pytest.raises(MismatchError, match=r"sequences that start at chunks 0 to 3, expected 0 to 2"):
        dataset(tmp_path, rows, [[0, 0]] * 3, [0, 3])
    for wrong in (3, -2):
        data = dataset(tmp_path, rows, [[0, 0], [0, wrong], [0, 0]], [0, 2])
        with pytest.raises(MismatchError, match=r"found chunk ids .*, expected -1 to 2"):
            data[0]
        assert data[1][1].shape == (L, K, 2 * M)


def test_the_network_takes_what_a_loader_gives(tmp_path: Path) -> None:
    sizes = {"enc_dim": 16, "dec_dim": 16, "enc_depth": 1, "dec_depth": 2, "heads": 2, "dim_head": 8}
    retro = RETRO(num_tokens=128, max_seq_len=L * M, chunk_size=M, dec_cross_attn_layers=(2,), **sizes)
    for add_continuations in (True, False):
        data = two_documents(tmp_path, add_continuations=add_continuations)
        seq, retrieved = next(iter(DataLoader(data, batch_size=4)))
        loss = retro(seq, retrieved, return_loss=True)
        loss.backward()
        assert loss.isfinite()


def test_the_name_is_public() -> None:
    assert "RETRODataset" in retro_model.__all__ and retro_model.RETRODataset is RETRODataset
