"""Runs of tokens that stand in another split: every one is found, across chunks and not across documents."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from woven import END, PAD, chunk_rows, write_chunks

from retro_model.evaluation.shared_runs import run_hashes, share_a_run

CHUNK_SIZE = 5

documents_of = st.lists(st.lists(st.integers(3, 5), max_size=17), min_size=1, max_size=6)


def slow(labels: list[int], documents: list[list[int]], length: int) -> bool:
    """Whether one of the chunk's runs stands in a document or at its end, by comparing lists."""
    real = [token for token in labels if token != PAD]
    runs = [real[start : start + length] for start in range(len(real) - length + 1)]
    texts = [[*document, END] for document in documents]
    return any(run == text[at : at + length] for run in runs for text in texts for at in range(len(text)))


@settings(deadline=None, max_examples=40)
@given(documents_of, documents_of, st.integers(1, CHUNK_SIZE), st.integers(1, 9))
def test_chunks_with_shared_runs_are_those_of_brute_force(
    tmp_path_factory: pytest.TempPathFactory,
    train: list[list[int]],
    test: list[list[int]],
    length: int,
    at_once: int,
) -> None:
    split = write_chunks(tmp_path_factory.mktemp("split"), train, chunk_size=CHUNK_SIZE, rows_per_shard=3)
    labels = np.array([row[1:] for document in test for row in chunk_rows(document, CHUNK_SIZE)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retro_model.evaluation.shared_runs.CHUNKS_AT_ONCE", at_once)
        found = share_a_run(labels, split, length)
    assert found.tolist() == [slow(row, train, length) for row in labels.tolist()]


@pytest.mark.parametrize("at_once", [1, 2, 1000])
def test_a_run_of_32_is_found_wherever_it_stands(tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retro_model.evaluation.shared_runs.CHUNKS_AT_ONCE", at_once)
    text = list(range(3, 203))
    split = write_chunks(tmp_path, [text[:100], text[100:]], chunk_size=64)
    within, across, one_less = text[40:72] + [250] * 32, text[84:116] + [250] * 32, [250] * 33 + text[40:71]
    at_the_end = [*text[-31:], END] + [PAD] * 32
    labels = np.array([within, across, one_less, at_the_end])
    assert share_a_run(labels, split, 32).tolist() == [True, False, False, True]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 12, 31, 32])
def test_hashes_tell_runs_apart(length: int) -> None:
    """As many hashes as runs, and equal ones for equal runs wherever they stand."""
    random = np.random.default_rng(length)
    tokens = random.integers(0, 2, 5000)
    hashes = run_hashes(random.integers(1 << 64, size=2, dtype=np.uint64)[tokens], length)
    runs = [tuple(tokens[start : start + length].tolist()) for start in range(len(tokens) - length + 1)]
    assert len(hashes) == len(runs)
    by_run = dict(zip(runs, hashes.tolist(), strict=True))
    assert [by_run[run] for run in runs] == hashes.tolist()
    assert len(set(by_run.values())) == len(by_run)


def test_chunks_shorter_than_the_run_share_none(tmp_path: Path) -> None:
    split = write_chunks(tmp_path, [[3, 4, 5, 6, 7]], chunk_size=CHUNK_SIZE)
    assert share_a_run(np.array([[3, 4, PAD, PAD, PAD]]), split, 3).tolist() == [False]
